// Parameters of pixel shuffle: all that host, device and emulator code share.
#pragma once

#include "common/norm.h"

namespace vlmops::pixel_shuffle {

enum class Order : int { kYxc, kCyx };  // channels of a merged token: (dy, dx, c) or (c, dy, dx)
enum class Norm : int { kNone, kLayer, kRms };

constexpr int64_t kMaxFactor = 16;
constexpr int kMaxGroups = 16;  // of images of one grid, that one Params holds

// Where the pixels of images of one grid lie. Strides in elements; pixel (dy, dx) of block
// (row, column) of image i begins at
//   offset + i * image + row * block_row + column * block_column + dy * y + dx * x
struct Pixels {
  int64_t offset, image, block_row, block_column, y, x;
};

// Images of one grid. A block of f x f pixels is one merged token.
struct Group {
  int64_t first;          // its first merged token, counted over all groups
  int64_t rows, columns;  // blocks of an image
  Pixels from, to;        // in `pixels` and in `pixels_out`
  int64_t merged, image;  // where its first merged token lies, stride of images; in `merged`
  int64_t merged_out, image_out;  // in `merged_out`
};

// Pixels [.., C] on one side, merged tokens [.., K] on the other: K = f * f * C, or C where blocks
// are averaged.
struct Params {
  const void* pixels;    // read by all but the inverse
  const void* merged;    // read by the inverse and in backward: the gradient of merged_out
  void* pixels_out;      // written by the inverse and in backward; null where nobody needs it
  void* merged_out;      // written forward
  DType dtype;           // of all four
  int64_t channels;      // C
  int64_t pixel_stride;  // between channels of `pixels`; those of what is written lie side by side
  int64_t merged_stride, token_stride;  // between channels, and tokens, of `merged`
  int64_t token_stride_out;             // of `merged_out`
  int factor;                           // f
  Order order;
  bool mean;  // average a block instead of merging it
  Norm norm;
  bool norm_channels;  // over the C channels of each pixel instead of over the merged token's K
  NormVector weight, bias;
  float eps;       // added to the variance, or to the mean square
  float offset;    // added to the weight
  bool streams;    // what is written is too large for the caches
  int64_t tokens;  // merged tokens of all groups
  int group_count;
  Group groups[kMaxGroups];

  VLMOPS_HOST_DEVICE int64_t block() const { return static_cast<int64_t>(factor) * factor; }
  VLMOPS_HOST_DEVICE int64_t depth() const { return mean ? channels : block() * channels; }  // K
  // Numbers that one mean and variance are taken over.
  VLMOPS_HOST_DEVICE int64_t normed() const { return norm_channels ? channels : depth(); }
};

// Merged tokens [begin, end); `scratch` has scratch_floats() floats.
using CpuKernel = void (*)(const Params&, int64_t begin, int64_t end, float* scratch);

// Backward where there is a norm. weight_grad [2, normed()], zeros, gets the tokens' share of the
// gradients of the norm's weight and bias; null where nobody needs them.
using CpuNormBackward = void (*)(const Params&, int64_t begin, int64_t end, float* scratch,
                                 double* weight_grad);

constexpr int kTogether = 4;  // rows of backward on the CPU

// Rows, apart by more than a page's size is a multiple of: else they would meet in the same
// sets of a cache.
constexpr int64_t kScratchGap = 80;
inline int64_t scratch_floats(const Params& p, bool backward) {
  return (backward ? 2 + 3 * kTogether : 4) * (p.depth() + 16 + kScratchGap) + 16;
}

// On a GPU, where all pointers of Params are the device's. They return 0 or an error's number.
using CudaKernel = int (*)(const Params&, void* stream);

// Rows that are normed.
inline int64_t normed_rows(const Params& p) {
  return p.norm_channels ? p.tokens * p.block() : p.tokens;
}
inline int64_t part_rows_of(const Params& p) { return gpu_part_rows(normed_rows(p), p.normed()); }
inline int64_t parts_of(const Params& p) {
  return (normed_rows(p) + part_rows_of(p) - 1) / part_rows_of(p);
}

// partial [parts, 2, normed()] is written, scales [rows, kScales] is scratch; both null where
// nobody needs the gradients of weight and bias.
using CudaNormBackward = int (*)(const Params&, float* scales, float* partial, void* stream);

// weight_grad, bias_grad [normed], null where nobody needs them: the sums of partial over its
// parts.
using CudaWeightGrad = int (*)(const float* partial, int64_t parts, int64_t normed,
                               float* weight_grad, float* bias_grad, void* stream);

int run_cuda(const Params& p, void* stream);
int run_inverse_cuda(const Params& p, void* stream);
int run_norm_backward_cuda(const Params& p, float* scales, float* partial, void* stream);
int run_weight_grad_cuda(const float* partial, int64_t parts, int64_t normed, float* weight_grad,
                         float* bias_grad, void* stream);

}  // namespace vlmops::pixel_shuffle
