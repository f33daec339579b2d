// Parameters of the HD transform: all that host, device and emulator code share.
#pragma once

#include "common/types.h"

namespace vlmops::hd_transform {

constexpr int64_t kMaxFactor = 16;
constexpr int kMaxImages = 32;  // that one Params holds

// A picture: one crop that shows all of it, then h_crop * w_crop crops that are its parts.
struct Image {
  int64_t token;      // its first token, counted over all images
  int64_t pixel;      // its first row of features, prefixes among them
  int64_t offset;     // elements from the first feature of all to its own
  int w_crop, crops;  // crops in a row of the picture, in the picture
  int height, width;  // tokens of the picture that are kept, newlines not counted
};

// Features [crops, prefix + (f side)^2, C] on one side, tokens [T, K] on the other: K = f^2 C, or C
// where blocks are averaged. Strides in elements.
struct Params {
  const void* src;                  // features; in backward the gradient of the tokens
  void* dst;                        // tokens; in backward the gradient of the features, contiguous
  const void *newline, *separator;  // [K]; not read in backward
  DType dtype;                      // of all four
  int64_t channels;                 // C
  int64_t crop_stride, pixel_stride, channel_stride;  // of features
  int64_t token_stride, token_channel_stride;         // of tokens
  int factor;                                         // f
  int side;                                           // tokens on a side of a crop
  int prefix;              // rows of features before those of a crop's grid
  bool mean;               // average a block instead of merging it
  float scale;             // of the sum of a block: 1 / (f * f)
  bool sub_first;          // the picture's parts before the whole of it
  int64_t tokens, pixels;  // of all images: rows of tokens and of features
  int image_count;
  Image images[kMaxImages];

  VLMOPS_HOST_DEVICE int block() const { return factor * factor; }
  VLMOPS_HOST_DEVICE int64_t depth() const { return mean ? channels : block() * channels; }  // K
  VLMOPS_HOST_DEVICE int64_t rows_of_crop() const {
    return prefix + static_cast<int64_t>(block()) * side * side;
  }
};

enum class Kind : int { kBlock, kNewline, kSeparator };

// What a token is: block (y, x) of a crop, or one of the two learned rows.
struct Source {
  Kind kind;
  int crop, y, x;
};

// static: see simd.h on linkage.

// Tokens of the whole picture, newlines among them, and of its parts.
VLMOPS_HOST_DEVICE static inline int64_t whole_tokens(const Params& p) {
  return static_cast<int64_t>(p.side) * (p.side + 1);
}
VLMOPS_HOST_DEVICE static inline int64_t part_tokens(const Image& image) {
  return static_cast<int64_t>(image.height) * (image.width + 1);
}

// The image that the row `at` belongs to; `first` is Image::token or Image::pixel.
VLMOPS_HOST_DEVICE static inline int image_of(const Params& p, int64_t Image::* first, int64_t at) {
  int low = 0, high = p.image_count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.images[middle].*first <= at ? low : high) = middle;
  }
  return low;
}

// Of token `at` of an image.
VLMOPS_HOST_DEVICE static inline Source source_of(const Params& p, const Image& image, int64_t at) {
  const int64_t whole = whole_tokens(p), parts = part_tokens(image);
  const int64_t first = p.sub_first ? parts : whole;
  if (at == first) return {Kind::kSeparator, 0, 0, 0};
  const bool second = at > first;
  const auto place = static_cast<uint32_t>(second ? at - first - 1 : at);
  if (second == p.sub_first) {
    const auto columns = static_cast<uint32_t>(p.side + 1);
    const int y = static_cast<int>(place / columns), x = static_cast<int>(place % columns);
    return {x == p.side ? Kind::kNewline : Kind::kBlock, 0, y, x};
  }
  const auto columns = static_cast<uint32_t>(image.width + 1);
  const int y = static_cast<int>(place / columns), x = static_cast<int>(place % columns);
  if (x == image.width) return {Kind::kNewline, 0, y, x};
  const int crop = 1 + y / p.side * image.w_crop + x / p.side;
  return {Kind::kBlock, crop, y % p.side, x % p.side};
}

// The token, counted within its image, that block (y, x) of a crop is; -1 if it is none.
VLMOPS_HOST_DEVICE static inline int64_t token_of(const Params& p, const Image& image, int crop,
                                                  int y, int x) {
  if (crop == 0) {
    return (p.sub_first ? part_tokens(image) + 1 : 0) + static_cast<int64_t>(y) * (p.side + 1) + x;
  }
  if (crop > image.crops) return -1;
  const int row = (crop - 1) / image.w_crop * p.side + y;
  const int column = (crop - 1) % image.w_crop * p.side + x;
  if (row >= image.height || column >= image.width) return -1;
  return (p.sub_first ? 0 : whole_tokens(p) + 1) + static_cast<int64_t>(row) * (image.width + 1) +
         column;
}

// The part of a token's row, in units of C, that a row of features goes to, and where that row is.
struct Target {
  int64_t token;  // counted over all images; -1: none
  int part;       // 0 where blocks are averaged
};

// Of row `at` of the features, counted over all images.
VLMOPS_HOST_DEVICE static inline Target target_of(const Params& p, const Image& image, int64_t at) {
  const int64_t rows = p.rows_of_crop(), within = at - image.pixel;
  const auto crop = static_cast<uint32_t>(within) / static_cast<uint32_t>(rows);
  const int64_t place = within - crop * rows - p.prefix;
  if (place < 0) return {-1, 0};
  const auto width = static_cast<uint32_t>(p.side * p.factor);
  const auto factor = static_cast<uint32_t>(p.factor);
  const uint32_t y = static_cast<uint32_t>(place) / width, x = static_cast<uint32_t>(place) % width;
  const int64_t token = token_of(p, image, static_cast<int>(crop), static_cast<int>(y / factor),
                                 static_cast<int>(x / factor));
  if (token < 0) return {-1, 0};
  return {image.token + token, p.mean ? 0 : static_cast<int>(y % factor * factor + x % factor)};
}

// Forward: rows [begin, end) of the tokens. Backward: of the features.
using CpuKernel = void (*)(const Params&, int64_t begin, int64_t end);

// Adds the gradients of columns [begin, end) of newline and separator to sums [2, K].
using CpuSums = void (*)(const Params&, int64_t begin, int64_t end, double* sums);

// On a GPU, where all pointers of Params are the device's. They return 0 or an error's number.
using CudaKernel = int (*)(const Params&, void* stream);

// Adds the gradients of newline and separator to sums [2, K], float32.
using CudaSums = int (*)(const Params&, float* sums, void* stream);

int forward_cuda(const Params& p, void* stream);
int backward_cuda(const Params& p, void* stream);
int sums_cuda(const Params& p, float* sums, void* stream);

}  // namespace vlmops::hd_transform
