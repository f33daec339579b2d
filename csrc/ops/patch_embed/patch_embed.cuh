// Patch embedding on NVIDIA GPUs: one product, whose left side is read out of the image.
//
// For patch n of image b, x its K pixels, rounded to T after the map that they may have:
//   y[b, n, d] = bias[d] + sum over k of x[k] * weight[d, k] + positions, rounded once
// With a norm y is rounded before it, and a second kernel normalises tokens in place.
//
// 2 B N K D operations against pixels, weight and tokens moved once: in bfloat16 the operations are
// the floor everywhere. At an H200's 790 TFLOP/s, microseconds:
//   CLIP-L/14-336 x16       9,216 x   588 x 1,024    14
//   SigLIP-SO400M-384 x16  11,664 x   588 x 1,152    20
//   InternViT-448 x13      13,312 x   588 x 1,024    20
//   Qwen2-VL 1036^2         5,476 x 1,176 x 1,280    21
//   64 frames              32,768 x 1,176 x 1,280   125
//   Pixtral 1024^2          4,096 x   768 x 1,024     8
//
// A block computes a tile of tokens x channels, 128 x 128 or, where those are too few for all
// multiprocessors, 64 x 64: 4 warps, tensor cores by mma (float32: 8 x 8 FMAs a thread). Tiles of
// 64 k of pixels and weight go into shared memory by cp.async, 1 or 2 tiles ahead of the products,
// in chunks of 16 bytes that are exchanged within a row against bank conflicts. Pixels lie in runs:
// a patch's row of P, or all of a flattened patch. One copy moves 16, 8 or 4 bytes, as runs,
// strides and pointers allow (P = 14: 4). Where pixels take arithmetic they pass through registers,
// read before the products of a step and written after them. No patch matrix is stored. Products go
// through shared memory once more, so that a thread has 8 channels next to each other: 16-byte
// accesses to bias, table and tokens. Blocks beyond the tiles write the prefix.
//
// Measured on an H200, microseconds, cold inputs, with position and prefix where the model has
// them; "product" is cuBLAS on ready patches, rows not padded, "eager" convolution + flatten + cat
// + add:
//                        CLIP  SigLIP  InternViT  Qwen2-VL  64 frames  Pixtral
//   128 x 128, 4 warps     91     124        123        68        333       26
//   128 x 256, 8 warps    102     137        137        78        382       27
//   wgmma, 4 warps copy    80     110        107        51        246       19
//   product                84     111        119        27        148       12
//   eager                 479     663        917       701      3,928      366
// What lost: offsets looked up in 64 bits for every copy of 4 bytes, and tokens finished in
// unrolled code (161 for CLIP: instructions, not bytes); tiles of 128 x 64 (168 beside that);
// wgmma, whose multiplying warps wait for the copying ones half of their time and spend two fifths
// at the end of tiles. It lost too to what large sizes do: pack panels whose rows are padded,
// cuBLAS, finish (vlmops/ops/patch_embed_panels.py): 54 for CLIP, 76 for SigLIP, 17 for Pixtral, L2
// warm.
#pragma once

#include "common/gpu.cuh"
#include "ops/patch_embed/patch_embed.h"

namespace vlmops::patch_embed {

constexpr int kChannels = 8;  // that one thread finishes at a time: 16 bytes of 16-bit numbers
constexpr int kOutside = -1;
constexpr int64_t kMaxColumns = 4096;  // whose offsets are kept
constexpr int kRowThreads = 128;       // of the kernels without a product
constexpr int kPackRows = 8;           // of the patch matrix, to a block

// What the launcher knows of a Params beyond it.
struct Plan {
  int64_t tiles;     // of the product; blocks beyond them write the prefix
  int column_tiles;  // side by side over D
  int stages;        // tiles in shared memory at a time: 2, 3 or 4
  int columns;       // bytes from there to the offsets of columns
  int pixel_unit;    // bytes of one cp.async: 4, 8 or 16
  int weight_unit;   // the same; 2: elements
  // Whether rows take accesses of 16 bytes.
  bool wide_out, wide_bias, wide_prefix, wide_norm_weight, wide_norm_bias;
  bool wide_table[kMaxPositions];
  // Nothing but rows of at most one table to add, n to token n, and everything on 16 bytes.
  bool simple;
};

// One operand's tile of the product for tensor cores: rows of 128 bytes, whose chunks of 16 are
// exchanged so that chunks of 8 rows that follow each other do not meet in a bank.
template <class T_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kBlocks_>
struct MmaTile {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kRowBytes = 128, kPitch = 128, kDepth = kRowBytes / sizeof(T);
  static constexpr int kSteps = kDepth / 16;  // of mma
  static constexpr int kUnrolled = kSteps;
  static constexpr int kThreads = kRows / kWarpRows * (kColumns / kWarpColumns) * kWarpSize;
  static constexpr int kBlocks = kBlocks_;              // on one multiprocessor
  static constexpr int kSlabPitch = kWarpColumns + 8;   // floats
  static constexpr int kSlab = kWarpRows * kSlabPitch;  // of one warp
  static constexpr int kSlabs = kSlab * kThreads / kWarpSize;
  static __device__ __forceinline__ int place(int row, int byte) {
    return row * kPitch + ((byte / 16 ^ (row & 7)) * 16 + byte % 16);
  }
};

// The same for float32: rows are padded, and a thread computes 8 x 8.
template <int kRows_, int kColumns_, int kBlocks_>
struct FmaTile {
  using T = float;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kRowBytes = 64, kPitch = 80, kDepth = 16;
  static constexpr int kSteps = 4;     // of 4 products
  static constexpr int kUnrolled = 1;  // of steps; more spills on sm_120
  static constexpr int kThreads = kRows * kColumns / 64;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kSlabPitch = kColumns + 8;
  static constexpr int kSlabs = kRows * kSlabPitch;
  static __device__ __forceinline__ int place(int row, int byte) { return row * kPitch + byte; }
};

template <class Tile>
constexpr int kStageBytes = (Tile::kRows + Tile::kColumns) * Tile::kPitch;

// A patch, and the first channel of its token in the output.
struct Place {
  int64_t out;
  int image, patch;
};

__device__ __forceinline__ Place place_of(const Params& p, int64_t row) {
  const int64_t patches = p.patches();
  // 32 bits: no memory holds the tokens of 2^32 patches, and a division of 64 bits is a call.
  const int64_t image = static_cast<uint32_t>(row) / static_cast<uint32_t>(patches);
  const int64_t patch = row - image * patches;
  const int64_t token = image * p.tokens() + (p.prefix_last ? 0 : p.prefix_tokens) + patch;
  return {token * p.channels, static_cast<int>(image), static_cast<int>(patch)};
}

__device__ __forceinline__ int pixel_bytes(Pixel pixel) {
  return pixel == Pixel::kFloat32 ? 4 : pixel == Pixel::kUInt8 ? 1 : 2;
}

__device__ __forceinline__ const char* patch_pixels(const Params& p, const Place& at) {
  const auto n = static_cast<uint32_t>(at.patch), columns = static_cast<uint32_t>(p.grid[2]);
  const auto lines = static_cast<uint32_t>(p.grid[1]), line = n / columns;
  const int64_t offset = at.image * p.image_stride + line / lines * p.grid_stride[0] +
                         line % lines * p.grid_stride[1] + n % columns * p.grid_stride[2];
  return static_cast<const char*>(p.pixels) + offset * pixel_bytes(p.pixel);
}

// Of element k of a patch: bytes from its first pixel, and its channel.
struct Column {
  int64_t offset;
  int channel;
};

__device__ __forceinline__ Column column_of(const Params& p, int64_t k) {
  if (k >= p.depth) return {kOutside, 0};
  const auto width = static_cast<uint32_t>(p.size[3]), height = static_cast<uint32_t>(p.size[2]);
  const auto frames = static_cast<uint32_t>(p.size[1]);
  const uint32_t line = static_cast<uint32_t>(k) / width, plane = line / height;
  const uint32_t channel = plane / frames;
  const int64_t offset = channel * p.size_stride[0] + plane % frames * p.size_stride[1] +
                         line % height * p.size_stride[2] +
                         static_cast<uint32_t>(k) % width * p.size_stride[3];
  return {offset * pixel_bytes(p.pixel), static_cast<int>(channel)};
}

// ---- Pixels ----

template <class Word>
__device__ __forceinline__ uint32_t raw_pixel(const char* at) {
  return *reinterpret_cast<const Word*>(at);
}

__device__ __forceinline__ float float_of(Pixel pixel, uint32_t raw) {
  switch (pixel) {
    case Pixel::kFloat32:
      return __uint_as_float(raw);
    case Pixel::kBFloat16:
      return to_float(bfloat16{static_cast<uint16_t>(raw)});
    case Pixel::kFloat16:
      return to_float(float16{static_cast<uint16_t>(raw)});
    case Pixel::kUInt8:
      return static_cast<float>(raw);
  }
  return 0.0f;
}

__device__ __forceinline__ float mapped(const Params& p, uint32_t raw, int channel) {
  if (p.map == nullptr) return float_of(p.pixel, raw);
  const float* map = p.map + channel * p.map_columns;
  return p.map_columns == 256 ? map[raw] : fmaf(map[0], float_of(p.pixel, raw), map[1]);
}

// ---- Tiles of pixels and weights ----

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  if constexpr (kBytes == 16) cp_async_16_or_zero(shared, global, bytes);
  if constexpr (kBytes == 8) cp_async_8_or_zero(shared, global, bytes);
  if constexpr (kBytes == 4) cp_async_4_or_zero(shared, global, bytes);
}

// How threads share a tile of rows in units of kBytes: kLanes of them to a row.
template <class Tile, int kBytes>
struct Share {
  static constexpr int kUnits = Tile::kRowBytes / kBytes;
  static constexpr int kLanes = kBytes == 4 ? 4 : kUnits;
  static constexpr int kStep = Tile::kThreads / kLanes;
};

// Where copies find pixels: bytes from `base`, of rows [kRows] and of every unit of a patch.
struct Offsets {
  const char* base;
  int *row, *column;
};

template <class Tile, int kBytes>
__device__ __forceinline__ void copy_pixels(char* tile, const Offsets& from, int step) {
  using S = Share<Tile, kBytes>;
  constexpr int kColumns = S::kUnits / S::kLanes, kPasses = Tile::kRows / S::kStep;
  const int first = threadIdx.x / S::kLanes, lane = threadIdx.x % S::kLanes;
  int row[kPasses], column[kColumns];
#pragma unroll
  for (int r = 0; r < kPasses; ++r) row[r] = from.row[first + r * S::kStep];
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    column[i] = from.column[step * S::kUnits + i * S::kLanes + lane];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int at = (i * S::kLanes + lane) * kBytes, bytes = column[i] == kOutside ? 0 : kBytes;
    const char* const pixels = from.base + (column[i] == kOutside ? 0 : column[i]);
#pragma unroll
    for (int r = 0; r < kPasses; ++r)
      copy_async<kBytes>(tile + Tile::place(first + r * S::kStep, at), pixels + row[r], bytes);
  }
}

// Rows from `row` on of the weight, columns from k on. Below the last row it is read again.
template <class Tile, int kBytes>
__device__ __forceinline__ void copy_weight(char* tile, const Params& p, int64_t row, int64_t k) {
  using S = Share<Tile, kBytes>;
  constexpr int kElement = sizeof(typename Tile::T);
  const int first = threadIdx.x / S::kLanes, lane = threadIdx.x % S::kLanes;
  const int64_t pitch = p.depth * kElement;
  const char* const weight = static_cast<const char*>(p.weight) + row * pitch + k * kElement;
  const int last = static_cast<int>(p.channels - 1 - row < Tile::kColumns ? p.channels - 1 - row
                                                                          : Tile::kColumns);
#pragma unroll
  for (int i = 0; i < S::kUnits / S::kLanes; ++i) {
    const int unit = lane + i * S::kLanes;
    const bool inside = k * kElement + unit * kBytes < pitch;
    const char* column = weight + (inside ? unit * kBytes : -k * kElement);
    const int bytes = inside ? kBytes : 0;
    if (last >= Tile::kColumns - 1) {
      column += first * pitch;
#pragma unroll 8
      for (int r = 0; r < Tile::kColumns; r += S::kStep) {
        copy_async<kBytes>(tile + Tile::place(first + r, unit * kBytes), column, bytes);
        column += S::kStep * pitch;
      }
    } else {
#pragma unroll 2
      for (int r = 0; r < Tile::kColumns; r += S::kStep)
        copy_async<kBytes>(tile + Tile::place(first + r, unit * kBytes),
                           column + (first + r < last ? first + r : last) * pitch, bytes);
    }
  }
}

// The same where no cp.async is narrow enough.
template <class Tile>
__device__ __forceinline__ void load_weight(char* tile, const Params& p, int64_t row, int64_t k) {
  using Word = typename PackWord<sizeof(typename Tile::T)>::type;
  for (int i = threadIdx.x; i < Tile::kColumns * Tile::kDepth; i += Tile::kThreads) {
    const int r = i / Tile::kDepth, c = i % Tile::kDepth;
    const int64_t d = row + r < p.channels ? row + r : p.channels - 1;
    const Word word =
        k + c < p.depth ? static_cast<const Word*>(p.weight)[d * p.depth + k + c] : Word{};
    *reinterpret_cast<Word*>(tile + Tile::place(r, c * static_cast<int>(sizeof(Word)))) = word;
  }
}

template <class Tile>
__device__ __forceinline__ void start_weight(char* tile, const Params& p, const Plan& plan,
                                             int64_t row, int64_t k) {
  if (plan.weight_unit == 16)
    copy_weight<Tile, 16>(tile, p, row, k);
  else if (plan.weight_unit == 8)
    copy_weight<Tile, 8>(tile, p, row, k);
  else if (plan.weight_unit == 4)
    copy_weight<Tile, 4>(tile, p, row, k);
  else
    load_weight<Tile>(tile, p, row, k);
}

template <class Tile>
__device__ __forceinline__ void start_pixels(char* tile, const Plan& plan, const Offsets& from,
                                             int step) {
  if (plan.pixel_unit == 16)
    copy_pixels<Tile, 16>(tile, from, step);
  else if (plan.pixel_unit == 8)
    copy_pixels<Tile, 8>(tile, from, step);
  else
    copy_pixels<Tile, 4>(tile, from, step);
}

// Pixels that take arithmetic: read into registers before the products of a step, written to the
// tile after them. A thread has kSide elements next to each other, 4 bytes, of kPasses rows a step.
template <class Tile>
struct Converter {
  using T = typename Tile::T;
  static constexpr int kSide = 4 / sizeof(T);
  static constexpr int kLanes = Tile::kRowBytes / 4;
  static constexpr int kStep = Tile::kThreads / kLanes;
  static constexpr int kPasses = Tile::kRows / kStep / Tile::kSteps;
  static_assert(kPasses * kStep * Tile::kSteps == Tile::kRows, "every step reads whole rows");

  int64_t offset[kSide];
  int channel[kSide];
  uint32_t raw[kPasses][kSide];

  __device__ __forceinline__ static int row_of(int step, int pass) {
    return (step * kPasses + pass) * kStep + static_cast<int>(threadIdx.x) / kLanes;
  }

  __device__ __forceinline__ void take_columns(const int64_t* offsets, const int* channels) {
#pragma unroll
    for (int e = 0; e < kSide; ++e) {
      offset[e] = offsets[threadIdx.x % kLanes * kSide + e];
      channel[e] = channels[threadIdx.x % kLanes * kSide + e];
    }
  }

  template <class Word>
  __device__ __forceinline__ void read_words(const char* const* row, int step) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const char* from = row[row_of(step, pass)];
#pragma unroll
      for (int e = 0; e < kSide; ++e)
        raw[pass][e] = offset[e] == kOutside ? 0 : raw_pixel<Word>(from + offset[e]);
    }
  }

  __device__ __forceinline__ void read(const Params& p, const char* const* row, int step) {
    if (p.pixel == Pixel::kUInt8)
      read_words<uint8_t>(row, step);
    else if (p.pixel == Pixel::kFloat32)
      read_words<uint32_t>(row, step);
    else
      read_words<uint16_t>(row, step);
  }

  __device__ __forceinline__ void write(const Params& p, char* tile, int step) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Pack<T, kSide> pack;
#pragma unroll
      for (int e = 0; e < kSide; ++e)
        pack[e] = from_float<T>(offset[e] == kOutside ? 0.0f : mapped(p, raw[pass][e], channel[e]));
      const int at = Tile::place(row_of(step, pass), threadIdx.x % kLanes * 4);
      store_pack(reinterpret_cast<T*>(tile + at), pack);
    }
  }
};

// ---- Tokens ----

struct Channels {
  float v[kChannels];
};

__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[at];
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(data)[at]);
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(data)[at]);
  }
  return 0.0f;
}

template <class T>
__device__ __forceinline__ Channels load_wide(const T* from) {
  Channels out;
#pragma unroll
  for (int at = 0; at < kChannels; at += kPack<T>) {
    const auto pack = load_pack<kPack<T>>(from + at);
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) out.v[at + e] = to_float(pack[e]);
  }
  return out;
}

// `count` elements of a row from `at` on; the rest is 0. wide: all of them, on 16 bytes.
__device__ __forceinline__ Channels load_channels(const void* data, DType dtype, int64_t at,
                                                  int count, bool wide) {
  if (wide) {
    if (dtype == DType::kFloat32) return load_wide(static_cast<const float*>(data) + at);
    if (dtype == DType::kBFloat16) return load_wide(static_cast<const bfloat16*>(data) + at);
    return load_wide(static_cast<const float16*>(data) + at);
  }
  Channels out;
#pragma unroll
  for (int e = 0; e < kChannels; ++e) out.v[e] = e < count ? load_float(data, dtype, at + e) : 0.0f;
  return out;
}

template <class T>
__device__ __forceinline__ void store_as(T* to, const Channels& y, int count, bool wide) {
  if (wide) {
#pragma unroll
    for (int at = 0; at < kChannels; at += kPack<T>) {
      Pack<T, kPack<T>> pack;
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) pack[e] = from_float<T>(y.v[at + e]);
      store_pack(to + at, pack);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kChannels; ++e)
    if (e < count) to[e] = from_float<T>(y.v[e]);
}

__device__ __forceinline__ void store_channels(void* data, DType dtype, int64_t at,
                                               const Channels& y, int count, bool wide) {
  if (dtype == DType::kFloat32)
    store_as(static_cast<float*>(data) + at, y, count, wide);
  else if (dtype == DType::kBFloat16)
    store_as(static_cast<bfloat16*>(data) + at, y, count, wide);
  else
    store_as(static_cast<float16*>(data) + at, y, count, wide);
}

__device__ __forceinline__ void add(Channels& y, const Channels& x, float factor) {
#pragma unroll
  for (int e = 0; e < kChannels; ++e) y.v[e] += factor * x.v[e];
}

// The channels that one thread finishes: from `first` on, `count` of them.
struct Span {
  int64_t first;
  int count;
  __device__ __forceinline__ Span(const Params& p, int64_t channel)
      : first(channel),
        count(static_cast<int>(p.channels - channel < kChannels ? p.channels - channel
                                                                : kChannels)) {}
};

// Adds a position to `kTokens` tokens of a sequence each, so that their loads are under way at
// once.
template <int kTokens>
__device__ __forceinline__ void add_rows(Channels (&y)[kTokens], const Position& q,
                                         const int64_t (&sequence)[kTokens],
                                         const int64_t (&token)[kTokens], const Span& span,
                                         bool wide) {
  for (int64_t tap = 0; tap < q.taps; ++tap) {
    int64_t row[kTokens];
    float factor[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      row[i] = token[i];
      factor[i] = 1.0f;
      if (q.index != nullptr)
        row[i] = load_int(q.index, q.index_type,
                          sequence[i] * q.index_stride[0] + token[i] * q.index_stride[1] +
                              tap * q.index_stride[2]);
      if (q.weight != nullptr)
        factor[i] = load_float(q.weight, q.weight_dtype,
                               sequence[i] * q.weight_stride[0] + token[i] * q.weight_stride[1] +
                                   tap * q.weight_stride[2]);
    }
    Channels x[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      // Nobody looked at them: that takes a sync.
      const int64_t at = row[i] < 0 ? 0 : row[i] < q.rows ? row[i] : q.rows - 1;
      x[i] = load_channels(q.table, q.dtype, at * q.row_stride + span.first, span.count, wide);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) add(y[i], x[i], factor[i]);
  }
}

// Tokens and what is counted without the prefix: patches.
template <int kTokens>
__device__ __forceinline__ void add_positions(Channels (&y)[kTokens], const Params& p,
                                              const Plan& plan, const Place (&at)[kTokens],
                                              const Span& span) {
  for (int i = 0; i < p.position_count; ++i) {
    const Position& q = p.positions[i];
    const int64_t before =
        q.patches_only ? p.first_patch : p.first_token + (p.prefix_last ? 0 : p.prefix_tokens);
    int64_t image[kTokens], token[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      image[t] = at[t].image;
      token[t] = before + at[t].patch;
    }
    add_rows(y, q, image, token, span, plan.wide_table[i]);
  }
}

// Products of patches with the weight, bias included, into their tokens.
template <int kTokens>
__device__ __forceinline__ void finish(Channels (&y)[kTokens], const Params& p, const Plan& plan,
                                       const Place (&at)[kTokens], const bool (&inside)[kTokens],
                                       const Span& span) {
  if (p.norm == Norm::kNone) add_positions(y, p, plan, at, span);
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    if (inside[i])
      store_channels(p.out, p.out_dtype, at[i].out + span.first, y[i], span.count, plan.wide_out);
}

__device__ __forceinline__ Channels load_bias(const Params& p, const Plan& plan, const Span& span) {
  if (p.bias == nullptr) return {};
  return load_channels(p.bias, p.dtype, span.first, span.count, plan.wide_bias);
}

// Prefix token `row` of all images', by one warp.
__device__ __forceinline__ void write_prefix(const Params& p, const Plan& plan, int64_t row) {
  const auto tokens = static_cast<uint32_t>(p.prefix_tokens);
  const int64_t image = static_cast<uint32_t>(row) / tokens,
                i = static_cast<uint32_t>(row) % tokens;
  const int64_t token = p.prefix_last ? p.patches() + i : i;
  for (int64_t c = threadIdx.x % kWarpSize * kChannels; c < p.channels;
       c += kWarpSize * kChannels) {
    const Span span(p, c);
    Channels y[1] = {load_channels(p.prefix.data, p.prefix.dtype, i * p.channels + c, span.count,
                                   plan.wide_prefix)};
    for (int q = 0; q < p.position_count; ++q)
      if (!p.positions[q].patches_only)
        add_rows(y, p.positions[q], {image}, {p.first_token + token}, span, plan.wide_table[q]);
    store_channels(p.out, p.out_dtype, (image * p.tokens() + token) * p.channels + c, y[0],
                   span.count, plan.wide_out);
  }
}

// ---- The product ----

// What the block's threads look up of rows and columns of their tile where pixels are converted.
template <class Tile>
struct Lookup {
  const char** row;  // [kRows] the patch's first pixel
  int64_t* offset;   // [stages, kDepth]
  int* channel;      // [stages, kDepth]

  // Of the tile at depth k.
  __device__ __forceinline__ void fill_columns(const Params& p, int slot, int64_t k) const {
    for (int i = threadIdx.x; i < Tile::kDepth; i += Tile::kThreads) {
      const Column column = column_of(p, k + i);
      offset[slot * Tile::kDepth + i] = column.offset;
      channel[slot * Tile::kDepth + i] = column.channel;
    }
  }
};

template <class Tile>
__device__ __forceinline__ void fill_places(const Params& p, Place* place, int64_t first,
                                            int thread) {
  const int64_t left = p.images * p.patches() - 1 - first;
  if (thread < Tile::kRows) place[thread] = place_of(p, first + (thread < left ? thread : left));
}

// Of rows from `first` on.
template <class Tile>
__device__ __forceinline__ const char* fill_row_offsets(const Params& p, int* row, int64_t first) {
  const int64_t left = p.images * p.patches() - 1 - first;
  const char* const base = patch_pixels(p, place_of(p, first));
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads)
    row[r] = static_cast<int>(patch_pixels(p, place_of(p, first + (r < left ? r : left))) - base);
  return base;
}

// Of all units of a patch, and of those that fill the last tile.
template <class Tile>
__device__ __forceinline__ void fill_column_offsets(const Params& p, const Plan& plan,
                                                    int* column) {
  const int elements = plan.pixel_unit / static_cast<int>(sizeof(typename Tile::T));
  const int depth = static_cast<int>(p.depth);
  const int units = (depth + Tile::kDepth - 1) / Tile::kDepth * (Tile::kDepth / elements);
  for (int i = threadIdx.x; i < units; i += Tile::kThreads)
    column[i] = static_cast<int>(column_of(p, static_cast<int64_t>(i) * elements).offset);
}

constexpr int kMaxStages = 4;

// Until tiles of all stages but the newest, kStages - 2 of them, may be in flight.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 2)
    cp_async_wait<0>();
  else if (stages == 3)
    cp_async_wait<1>();
  else
    cp_async_wait<2>();
}

// Accumulates the block's tile of the product: calls multiply(pixels, weights, step) for all steps
// of all tiles in order of k. Pixels are copied, from offsets in `columns`.
template <class Tile, class Multiply>
__device__ __forceinline__ void multiply_copied(const Params& p, const Plan& plan, char* memory,
                                                int* columns, int64_t first_row,
                                                int64_t first_channel, const Multiply& multiply) {
  VLMOPS_SHARED(int, row, Tile::kRows);
  const int tiles = static_cast<int>((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  const int stages = plan.stages;
  fill_column_offsets<Tile>(p, plan, columns);
  const Offsets from = {fill_row_offsets<Tile>(p, row, first_row), row, columns};
  __syncthreads();
  const auto start = [&](int tile, int stage) {
    char* const to = memory + stage * kStageBytes<Tile>;
    if (tile < tiles) {
      start_pixels<Tile>(to, plan, from, tile);
      start_weight<Tile>(to + Tile::kRows * Tile::kPitch, p, plan, first_channel,
                         static_cast<int64_t>(tile) * Tile::kDepth);
    }
    cp_async_commit();
  };
  for (int s = 0; s < stages - 1; ++s) start(s, s);
  int current = 0, next = stages - 1;  // stages of this tile, and of the one that is started
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_stage(stages);
    __syncthreads();
    start(tile + stages - 1, next);
    const char* const pixels = memory + current * kStageBytes<Tile>;
#pragma unroll Tile::kUnrolled
    for (int step = 0; step < Tile::kSteps; ++step)
      multiply(pixels, pixels + Tile::kRows * Tile::kPitch, step);
    current = current + 1 == stages ? 0 : current + 1;
    next = next + 1 == stages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The same where pixels take arithmetic.
template <class Tile, class Multiply>
__device__ __forceinline__ void multiply_converted(const Params& p, const Plan& plan, char* memory,
                                                   int64_t first_row, int64_t first_channel,
                                                   const Multiply& multiply) {
  VLMOPS_SHARED(const char*, row, Tile::kRows);
  VLMOPS_SHARED(int64_t, offset, kMaxStages* Tile::kDepth);
  VLMOPS_SHARED(int, channel, kMaxStages* Tile::kDepth);
  const Lookup<Tile> lookup = {row, offset, channel};
  const int tiles = static_cast<int>((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  const int stages = plan.stages;
  const auto depth_of = [](int tile) { return static_cast<int64_t>(tile) * Tile::kDepth; };
  const int64_t left = p.images * p.patches() - 1 - first_row;
  for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads)
    row[r] = patch_pixels(p, place_of(p, first_row + (r < left ? r : left)));
  for (int s = 0; s < stages; ++s) lookup.fill_columns(p, s, depth_of(s));
  __syncthreads();
  Converter<Tile> converter;
  const auto start = [&](int tile, int stage) {
    if (tile < tiles) {
      converter.take_columns(offset + stage * Tile::kDepth, channel + stage * Tile::kDepth);
      start_weight<Tile>(memory + stage * kStageBytes<Tile> + Tile::kRows * Tile::kPitch, p, plan,
                         first_channel, depth_of(tile));
    }
    cp_async_commit();
  };
  for (int s = 0; s < stages - 1; ++s) {
    start(s, s);
    if (s >= tiles) continue;
#pragma unroll 1
    for (int step = 0; step < Tile::kSteps; ++step) {
      converter.read(p, row, step);
      converter.write(p, memory + s * kStageBytes<Tile>, step);
    }
  }
  int current = 0, next = stages - 1;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_stage(stages);
    __syncthreads();
    const int starting = tile + stages - 1;
    start(starting, next);
    lookup.fill_columns(p, current, depth_of(starting + 1));
    const char* const pixels = memory + current * kStageBytes<Tile>;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if (starting < tiles) converter.read(p, row, step);
      multiply(pixels, pixels + Tile::kRows * Tile::kPitch, step);
      if (starting < tiles) converter.write(p, memory + next * kStageBytes<Tile>, step);
    }
    current = current + 1 == stages ? 0 : current + 1;
    next = next + 1 == stages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// This warp's part of a step: a [kWarpRows, 16] and b [kWarpColumns, 16].
template <class Tile>
struct Fragments {
  static constexpr int kA = Tile::kWarpRows / 16, kB = Tile::kWarpColumns / 8;
  uint32_t a[kA][4], b[kB][2];

  __device__ __forceinline__ void load(const char* pixels, const char* weights, int row, int column,
                                       int step) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kA; ++i)
      ldmatrix_x4(a[i], pixels + Tile::place(row + i * 16 + lane % 16, step * 32 + lane / 16 * 16));
#pragma unroll
    for (int j = 0; j < kB; j += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, weights + Tile::place(column + j * 8 + lane / 16 * 8 + lane % 8,
                                           step * 32 + lane / 8 % 2 * 16));
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
  }
};

// 8 floats of a slab in two accesses, in whose order lanes differ so that they do not meet in
// banks.
__device__ __forceinline__ Channels load_slab(const float* from, int column) {
  const int flip = column / 4 % 2 * 4;
  const auto one = load_pack<4>(from + flip), other = load_pack<4>(from + 4 - flip);
  Channels y;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    y.v[e] = flip ? other[e] : one[e];
    y.v[4 + e] = flip ? one[e] : other[e];
  }
  return y;
}

// 16 bytes of a table's row or of the output, or 32 of float32.
template <class T>
__device__ __forceinline__ Channels simple_row(const Params& p, int patch, int64_t channel) {
  const Position& q = p.positions[0];
  int64_t row = patch + (q.patches_only ? p.first_patch
                                        : p.first_token + (p.prefix_last ? 0 : p.prefix_tokens));
  row = row < q.rows ? row : q.rows - 1;
  return load_wide(static_cast<const T*>(q.table) + row * q.row_stride + channel);
}

// What is added to products where the plan is simple, of every kStride-th patch from `place` on.
template <int kTokens, int kStride>
__device__ __forceinline__ void load_addends(Channels (&x)[kTokens], const Params& p,
                                             const Place* place, int64_t channel,
                                             const Channels& bias) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) x[i] = bias;
  if (p.norm != Norm::kNone || p.position_count == 0) return;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int patch = place[i * kStride].patch;
    add(x[i],
        p.positions[0].dtype == DType::kFloat32    ? simple_row<float>(p, patch, channel)
        : p.positions[0].dtype == DType::kBFloat16 ? simple_row<bfloat16>(p, patch, channel)
                                                   : simple_row<float16>(p, patch, channel),
        1.0f);
  }
}

// Their products, every kStride-th row of a slab, and what is added into tokens: those of patches
// before `left`.
template <int kTokens, int kStride>
__device__ __forceinline__ void finish_simple(Channels (&x)[kTokens], const float* slab, int pitch,
                                              const Params& p, const Place* place, int left,
                                              int64_t channel, int column) {
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    add(x[i], load_slab(slab + i * kStride * pitch, column), 1.0f);
    if (i * kStride < left)
      store_channels(p.out, p.out_dtype, place[i * kStride].out + channel, x[i], kChannels, true);
  }
}

// The same for every plan.
template <int kTokens, int kStride>
__device__ __forceinline__ void finish_any(const float* slab, int pitch, const Params& p,
                                           const Plan& plan, const Place* place, int left,
                                           const Span& span, const Channels& bias, int column) {
  Channels y[kTokens];
  Place at[kTokens];
  bool inside[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    y[i] = load_slab(slab + i * kStride * pitch, column);
    add(y[i], bias, 1.0f);
    at[i] = place[i * kStride];
    inside[i] = i * kStride < left;
  }
  finish(y, p, plan, at, inside, span);
}

// Rows `thread`, thread + kStride, .. of the kRows of a slab, whose first is row `first_row` of
// all: this thread has 8 columns of them, the span's, which is the slab's number `column`.
template <int kTokens, int kRows, int kStride>
__device__ __forceinline__ void finish_rows(const float* slab, int pitch, const Params& p,
                                            const Plan& plan, const Place* place, int64_t first_row,
                                            int thread, const Span& span, int column) {
  if (span.count <= 0) return;
  const int64_t left = p.images * p.patches() - first_row;
  const Channels bias = load_bias(p, plan, span);
#pragma unroll 1
  for (int r = thread; r < kRows; r += kTokens * kStride) {
    const float* const from = slab + r * pitch + column * kChannels;
    const int inside = static_cast<int>(left - r < kRows ? left - r : kRows);
    if (plan.simple) {
      Channels x[kTokens];
      load_addends<kTokens, kStride>(x, p, place + r, span.first, bias);
      finish_simple<kTokens, kStride>(x, from, pitch, p, place + r, inside, span.first, column);
    } else {
      finish_any<kTokens, kStride>(from, pitch, p, plan, place + r, inside, span, bias, column);
    }
  }
}

template <class Tile, bool kConvert>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    patch_embed_mma_kernel(const VLMOPS_GRID_CONSTANT Params p,
                           const VLMOPS_GRID_CONSTANT Plan plan) {
  VLMOPS_DYNAMIC_SHARED(char, memory);
  VLMOPS_SHARED(Place, place, Tile::kRows);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (blockIdx.x >= plan.tiles) {
    const int64_t row = (blockIdx.x - plan.tiles) * (Tile::kThreads / kWarpSize) + warp;
    if (row < p.images * p.prefix_tokens) write_prefix(p, plan, row);
    return;
  }
  constexpr int kAcross = Tile::kColumns / Tile::kWarpColumns;
  const int row = warp / kAcross * Tile::kWarpRows, column = warp % kAcross * Tile::kWarpColumns;
  const int64_t first_row = blockIdx.x / plan.column_tiles * static_cast<int64_t>(Tile::kRows);
  const int64_t first_channel =
      blockIdx.x % plan.column_tiles * static_cast<int64_t>(Tile::kColumns);

  using F = Fragments<Tile>;
  float c[F::kA][F::kB][4] = {};
  const auto multiply = [&](const char* pixels, const char* weights, int step) {
    F f;
    f.load(pixels, weights, row, column, step);
#pragma unroll
    for (int i = 0; i < F::kA; ++i) {
#pragma unroll
      for (int j = 0; j < F::kB; ++j) mma_m16n8k16(c[i][j], f.a[i], f.b[j], typename Tile::T());
    }
  };
  if constexpr (kConvert)
    multiply_converted<Tile>(p, plan, memory, first_row, first_channel, multiply);
  else
    multiply_copied<Tile>(p, plan, memory, reinterpret_cast<int*>(memory + plan.columns), first_row,
                          first_channel, multiply);

  float* const slab = reinterpret_cast<float*>(memory) + warp * Tile::kSlab;
#pragma unroll
  for (int i = 0; i < F::kA; ++i) {
#pragma unroll
    for (int j = 0; j < F::kB; ++j) {
      float* const to = slab + (i * 16 + lane / 4) * Tile::kSlabPitch + j * 8 + lane % 4 * 2;
      store_pack(to, Pack<float, 2>{{c[i][j][0], c[i][j][1]}});
      store_pack(to + 8 * Tile::kSlabPitch, Pack<float, 2>{{c[i][j][2], c[i][j][3]}});
    }
  }
  fill_places<Tile>(p, place, first_row, threadIdx.x);
  __syncthreads();
  constexpr int kSpans = Tile::kWarpColumns / kChannels;
  finish_rows<4, Tile::kWarpRows, kWarpSize / kSpans>(
      slab, Tile::kSlabPitch, p, plan, place + row, first_row + row, lane / kSpans,
      Span(p, first_channel + column + lane % kSpans * kChannels), lane % kSpans);
}

template <class Tile, bool kConvert>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    patch_embed_fma_kernel(const VLMOPS_GRID_CONSTANT Params p,
                           const VLMOPS_GRID_CONSTANT Plan plan) {
  VLMOPS_DYNAMIC_SHARED(char, memory);
  VLMOPS_SHARED(Place, place, Tile::kRows);
  constexpr int kAcross = Tile::kColumns / 8, kDown = Tile::kRows / 8;
  if (blockIdx.x >= plan.tiles) {
    const int64_t row =
        (blockIdx.x - plan.tiles) * (Tile::kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    if (row < p.images * p.prefix_tokens) write_prefix(p, plan, row);
    return;
  }
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t first_row = blockIdx.x / plan.column_tiles * static_cast<int64_t>(Tile::kRows);
  const int64_t first_channel =
      blockIdx.x % plan.column_tiles * static_cast<int64_t>(Tile::kColumns);

  // Rows down + kDown * i, columns across + kAcross * j: the sum of kPart tiles of k, and of those
  // sums, since libraries split k too and have a smaller error than one long sum.
  constexpr int kPart = 8;
  float part[8][8] = {}, c[8][8] = {};
  int tiles = 0;
  const auto add_part = [&] {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        c[i][j] += part[i][j];
        part[i][j] = 0.0f;
      }
    }
  };
  const auto multiply = [&](const char* pixels, const char* weights, int step) {
    const auto quad = [step](const char* tile, int row) {
      return load_pack<4>(reinterpret_cast<const float*>(tile + Tile::place(row, step * 16)));
    };
    Pack<float, 4> b[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) b[j] = quad(weights, across + kAcross * j);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto a = quad(pixels, down + kDown * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[i][j] = fmaf(a[e], b[j][e], part[i][j]);
      }
    }
    if (step == Tile::kSteps - 1 && ++tiles % kPart == 0) add_part();
  };
  if constexpr (kConvert)
    multiply_converted<Tile>(p, plan, memory, first_row, first_channel, multiply);
  else
    multiply_copied<Tile>(p, plan, memory, reinterpret_cast<int*>(memory + plan.columns), first_row,
                          first_channel, multiply);
  add_part();

  float* const slab = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      slab[(down + kDown * i) * Tile::kSlabPitch + across + kAcross * j] = c[i][j];
  }
  fill_places<Tile>(p, place, first_row, threadIdx.x);
  __syncthreads();
  finish_rows<4, Tile::kRows, kDown>(slab, Tile::kSlabPitch, p, plan, place, first_row, down,
                                     Span(p, first_channel + across * kChannels), across);
}

// ---- The norm, and the patch matrix itself ----

// Rows of a product, or the output itself.
struct Rows {
  const void* data;
  DType dtype;
  bool wide;
};

// The mean over a row of x - mean, or of its square; of all lanes of a warp.
template <bool kSquared>
__device__ __forceinline__ float moment(const Params& p, const Rows& rows, int64_t start,
                                        float mean) {
  float total = 0.0f;
  for (int64_t c = threadIdx.x % kWarpSize * kChannels; c < p.channels;
       c += kWarpSize * kChannels) {
    const Span span(p, c);
    const Channels x = load_channels(rows.data, rows.dtype, start + c, span.count, rows.wide);
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      const float off = e < span.count ? x.v[e] - mean : 0.0f;
      total += kSquared ? off * off : off;
    }
  }
  return warp_sum(total) / static_cast<float>(p.channels);
}

__device__ __forceinline__ void normalise(Channels& y, const Params& p, const Plan& plan,
                                          const Span& span, float mean, float scale) {
  Channels weight, bias = {};
  for (float& w : weight.v) w = 1.0f;
  if (p.norm_weight.data != nullptr)
    weight = load_channels(p.norm_weight.data, p.norm_weight.dtype, span.first, span.count,
                           plan.wide_norm_weight);
  if (p.norm_bias.data != nullptr)
    bias = load_channels(p.norm_bias.data, p.norm_bias.dtype, span.first, span.count,
                         plan.wide_norm_bias);
#pragma unroll
  for (int e = 0; e < kChannels; ++e) y.v[e] = (y.v[e] - mean) * scale * weight.v[e] + bias.v[e];
}

// Patches [begin, end) from rows [end - begin, D] of a product, or from their own tokens: norm,
// positions, rounding. A warp to a token; what a norm reads again comes out of L1. Warps beyond
// them write as many prefix tokens. With the 8, ptxas takes 64 registers where it would spill.
__global__ void __launch_bounds__(kRowThreads, 8)
    patch_embed_finish_kernel(const VLMOPS_GRID_CONSTANT Params p,
                              const VLMOPS_GRID_CONSTANT Plan plan, int64_t begin, int64_t end,
                              const VLMOPS_GRID_CONSTANT Rows rows, bool own, int64_t prefixes) {
  const int64_t row = begin + static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarpSize) +
                      threadIdx.x / kWarpSize;
  if (row >= end) {
    if (row - end < prefixes) write_prefix(p, plan, row - end);
    return;
  }
  const Place at = place_of(p, row);
  const int64_t start = own ? at.out : (row - begin) * p.channels;
  const float mean = p.norm == Norm::kLayer ? moment<false>(p, rows, start, 0.0f) : 0.0f;
  const float scale =
      p.norm == Norm::kNone ? 1.0f : 1.0f / sqrtf(moment<true>(p, rows, start, mean) + p.norm_eps);
  for (int64_t c = threadIdx.x % kWarpSize * kChannels; c < p.channels;
       c += kWarpSize * kChannels) {
    const Span span(p, c);
    Channels y[1] = {load_channels(rows.data, rows.dtype, start + c, span.count, rows.wide)};
    if (p.norm != Norm::kNone) normalise(y[0], p, plan, span, mean, scale);
    add_positions(y, p, plan, {at}, span);
    store_channels(p.out, p.out_dtype, at.out + c, y[0], span.count, plan.wide_out);
  }
}

// Rows [begin, end) of the patch matrix, `pitch` elements each, zeros behind K. A block has
// kPackRows of them, a thread column after column. T is what pixels are rounded to, Panel what the
// panel holds.
template <class T, class Panel>
__global__ void __launch_bounds__(kRowThreads)
    patch_embed_pack_kernel(const VLMOPS_GRID_CONSTANT Params p, int64_t begin, int64_t end,
                            Panel* panel, int64_t pitch) {
  VLMOPS_SHARED(const char*, row, kPackRows);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackRows, left = end - begin - first;
  const int rows = left < kPackRows ? static_cast<int>(left) : kPackRows;
  if (threadIdx.x < rows)
    row[threadIdx.x] = patch_pixels(p, place_of(p, begin + first + threadIdx.x));
  __syncthreads();
  for (int64_t k = threadIdx.x; k < pitch; k += kRowThreads) {
    const Column column = column_of(p, k);
    Panel* const to = panel + first * pitch + k;
    for (int r = 0; r < rows; ++r) {
      T rounded = from_float<T>(0.0f);
      if (k < p.depth) {
        const char* at = row[r] + column.offset;
        const uint32_t raw = p.pixel == Pixel::kUInt8     ? raw_pixel<uint8_t>(at)
                             : p.pixel == Pixel::kFloat32 ? raw_pixel<uint32_t>(at)
                                                          : raw_pixel<uint16_t>(at);
        rounded = from_float<T>(mapped(p, raw, column.channel));
      }
      to[r * pitch] = from_float<Panel>(to_float(rounded));
    }
  }
}

// The same where pixels are moved as they are, a Word of 4, 8 or 16 bytes at a time.
template <class Word>
__global__ void __launch_bounds__(kRowThreads)
    patch_embed_copy_kernel(const VLMOPS_GRID_CONSTANT Params p, int64_t begin, int64_t end,
                            Word* panel, int64_t pitch) {
  VLMOPS_SHARED(const char*, row, kPackRows);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackRows, left = end - begin - first;
  const int rows = left < kPackRows ? static_cast<int>(left) : kPackRows;
  if (threadIdx.x < rows)
    row[threadIdx.x] = patch_pixels(p, place_of(p, begin + first + threadIdx.x));
  __syncthreads();
  const int elements = static_cast<int>(sizeof(Word)) / pixel_bytes(p.pixel);
  const int64_t words = pitch / elements;  // of a row
  for (int64_t w = threadIdx.x; w < words; w += kRowThreads) {
    const int64_t offset = column_of(p, w * elements).offset;  // kOutside behind K
    Word* const to = panel + first * words + w;
    if (rows == kPackRows && offset >= 0) {
      Word read[kPackRows];
#pragma unroll
      for (int r = 0; r < kPackRows; ++r) read[r] = *reinterpret_cast<const Word*>(row[r] + offset);
#pragma unroll
      for (int r = 0; r < kPackRows; ++r) to[r * words] = read[r];
      continue;
    }
    for (int r = 0; r < rows; ++r)
      to[r * words] = offset >= 0 ? *reinterpret_cast<const Word*>(row[r] + offset) : Word{};
  }
}

}  // namespace vlmops::patch_embed
