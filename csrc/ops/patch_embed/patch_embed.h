// Parameters of patch embedding: all that host, device and emulator code share.
#pragma once

#include "common/types.h"

namespace vlmops::patch_embed {

enum class Pixel : int { kFloat32, kBFloat16, kFloat16, kUInt8 };
enum class Norm : int { kNone, kLayer, kRms };

constexpr int kMaxPositions = 4;

// Rows of a table that are added to tokens: the sum over taps i of weight[i] * table[index[i]].
struct Position {
  const void* table;  // [rows, D], channels side by side
  DType dtype;
  int64_t rows;
  int64_t row_stride;  // elements
  int64_t taps;        // 1 without an index
  const void* index;   // null: row n to token n
  IntType index_type;
  int64_t index_stride[3];  // sequence, token, tap; 0 where it is broadcast
  const void* weight;       // null: 1
  DType weight_dtype;
  int64_t weight_stride[3];  // the same
  bool patches_only;         // tokens are counted without the prefix, which gets nothing
};

// Images of one size. Element (b, g, k) of the patches lies at
//   pixels + b * image_stride + sum of g[i] * grid_stride[i] + sum of k[i] * size_stride[i]
// with g = (frame, row, column) of the grid and k = (channel, frame, row, column) of the patch, the
// order of a convolution's weight. Flattened patches are a grid of one row, and patches of one row.
struct Images {
  const void* pixels;
  Pixel pixel;
  int64_t images;        // B
  int64_t grid[3];       // N is their product
  int64_t size[4];       // K is their product
  int64_t image_stride;  // elements, as all strides
  int64_t grid_stride[3];
  int64_t size_stride[4];
  const float* map;     // [channels, map_columns] of what pixels become; null: themselves
  int64_t map_columns;  // 256: by value, of uint8; 2: slope and intercept

  DType dtype;       // of weight and bias: what patches are rounded to, and multiplied in
  int64_t channels;  // D
  int64_t depth;     // K

  VLMOPS_HOST_DEVICE int64_t patches() const { return grid[0] * grid[1] * grid[2]; }  // N
};

struct Params : Images {
  const void* weight;          // [D, K], contiguous
  const void* bias;            // [D], or null
  Norm norm;                   // of a patch's D channels, before positions
  Row norm_weight, norm_bias;  // [D]
  float norm_eps;

  Row prefix;             // [prefix_tokens, D], contiguous
  int64_t prefix_tokens;  // M
  bool prefix_last;
  Position positions[kMaxPositions];
  int position_count;

  void* out;  // the first token of these images; [M + N, D] for each of them
  DType out_dtype;
  // Where these images begin in their sequence, for positions: 0 unless images are packed into one.
  int64_t first_token, first_patch;

  VLMOPS_HOST_DEVICE int64_t tokens() const { return prefix_tokens + patches(); }  // M + N
};

// Rows [begin, end) of the B * N patches, image-major, into panel [end - begin, K].
using CpuPack = void (*)(const Params&, int64_t begin, int64_t end, void* panel, DType dtype);

// Their product with the weight, bias included, product [end - begin, D] with rows `stride` apart,
// into their tokens: norm, positions, rounding. Product and tokens may be the same memory.
using CpuFinish = void (*)(const Params&, int64_t begin, int64_t end, const void* product,
                           int64_t stride, DType dtype);

// The way back: rows [begin, end) of the gradients of patches, [end - begin, K] with rows `stride`
// apart, into those of pixels, which lie where Params says that pixels are; times the map's slope.
using CpuUnpack = void (*)(const Params&, int64_t begin, int64_t end, const void* panel,
                           int64_t stride, DType dtype);

// Columns [begin, end) of the sums over `rows` rows of a matrix, rows `stride` apart.
using CpuColumnSums = void (*)(const void* matrix, DType dtype, int64_t rows, int64_t stride,
                               int64_t begin, int64_t end, float* sums);

// The prefix of images [begin, end), with its positions.
using CpuPrefix = void (*)(const Params&, int64_t begin, int64_t end);

// On a GPU, where all pointers of Params are the device's. They return 0 or an error's number.
// run: everything, in one kernel but for a norm.
using CudaRun = int (*)(const Params&, void* stream);

// As CpuPack; rows of the panel have `pitch` elements, zeros behind the patch's K.
using CudaPack = int (*)(const Params&, int64_t begin, int64_t end, void* panel, int64_t pitch,
                         DType dtype, void* stream);

// As CpuFinish; with begin 0 the prefix of all images too.
using CudaFinish = int (*)(const Params&, int64_t begin, int64_t end, const void* product,
                           DType dtype, void* stream);

int run_cuda(const Params& p, void* stream);
int pack_cuda(const Params& p, int64_t begin, int64_t end, void* panel, int64_t pitch, DType dtype,
              void* stream);
int finish_cuda(const Params& p, int64_t begin, int64_t end, const void* product, DType dtype,
                void* stream);

}  // namespace vlmops::patch_embed
