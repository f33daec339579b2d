// Pixel shuffle on NVIDIA GPUs. pixel_shuffle_cpu.h has the maths.
//
// Every element is read once and written once: 54.5 MB for 13 tiles of 1024 tokens of 1024 channels
// in bfloat16, 170 MB for 3200. Measured on an H200 (bench/results/h200), microseconds in bfloat16,
// L2 cold; `copy` is of the same bytes, by torch:
//                            copy  forward  torch.compile  eager   backward  torch.compile  eager
//   13 x 1024 x 1024         14.4     15.6           14.5     89       15.5           26.6     76
//   ... with LayerNorm       14.5     25.0           27.9    113       66.0           94.7    130
//   13 x 1024 x 3200         41.6     42.9           46.1    267       43.1           88.4    227
//   ... with LayerNorm       41.7     81.2          103.8    352      218            204      407
//   Mistral-3, RMSNorm       13.2     24.1            110    397       63.0            989    869
// Moves reach 92 and 97 % of a copy, and nothing could be much faster. Aimed at with a norm were
// 85 %: float32 reaches 78 and 88 %, bfloat16 58 and 51 %, since it has as many instructions for
// half the bytes.
//
// Moves: a warp takes kAhead packs of 16 bytes a lane of one merged token, all loaded before the
// first is stored; which block the token is takes its divisions once for them. In order "cyx" with
// factor 2 a pack gathers 4 bytes from each of four pixels: loads of 128 bytes a warp, and stores
// of 512; the other way round backward. Anything else goes element by element.
//
// Norms: a row (a merged token, a pixel of C channels where those are normed, or the four pixels of
// a "cyx" token at once) is one block's; see norm.cuh. Backward a second kernel reads x and the
// gradient again, in part out of L2, for the sums of the gradients of weight and bias. Sums within
// the first, in shared memory by blocks that stay for many rows, took twice as long. Rows that are
// longer than registers allow, unaligned ones and vectors of two dtypes go element by element.
#pragma once

#include "common/norm.cuh"
#include "common/row_sums.cuh"
#include "ops/pixel_shuffle/pixel_shuffle.h"

namespace vlmops::pixel_shuffle {

constexpr int kAhead = 4;  // packs a lane moves at once
constexpr int kMoveThreads = 256;
constexpr int kAnyThreads = 256;

// What a row of packs is; see the head.
enum class Layout { kYxc, kCyx, kMean };

// Where a merged token is.
struct Place {
  int group, number, image, row, column;  // number: among the tokens of its image
};

__device__ __forceinline__ Place find(const Params& p, int64_t token) {
  int at = 0;
  while (at + 1 < p.group_count && p.groups[at + 1].first <= token) ++at;
  const Group& group = p.groups[at];
  const auto n = static_cast<uint32_t>(token - group.first);
  const auto columns = static_cast<uint32_t>(group.columns);
  const uint32_t tokens = static_cast<uint32_t>(group.rows) * columns;
  const uint32_t image = n / tokens, number = n - image * tokens, row = number / columns;
  return {at, static_cast<int>(number), static_cast<int>(image), static_cast<int>(row),
          static_cast<int>(number - row * columns)};
}

__device__ __forceinline__ int64_t block_at(const Place& at, const Pixels& pixels) {
  return pixels.offset + at.image * pixels.image + at.row * pixels.block_row +
         at.column * pixels.block_column;
}

__device__ __forceinline__ int64_t pixel_at(const Params& p, const Pixels& pixels, int pixel) {
  const int y = pixel / p.factor;
  return y * pixels.y + (pixel - y * p.factor) * pixels.x;
}

template <class T>
__device__ __forceinline__ const T* merged_at(const Params& p, const Place& at) {
  return static_cast<const T*>(p.merged) + p.groups[at.group].merged +
         at.image * p.groups[at.group].image + at.number * p.token_stride;
}

template <class T>
__device__ __forceinline__ T* merged_out_at(const Params& p, const Place& at) {
  return static_cast<T*>(p.merged_out) + p.groups[at.group].merged_out +
         at.image * p.groups[at.group].image_out + at.number * p.token_stride_out;
}

// Warps share merged tokens out in segments of kAhead units to a lane.
struct Segment {
  int64_t token;
  int first;  // this lane's first unit; the next is a warp's width further
  __device__ __forceinline__ Segment(int64_t tokens, int units) {
    const int segments = (units + kAhead * kWarpSize - 1) / (kAhead * kWarpSize);
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
    token = warp / segments;
    const auto segment = static_cast<int>(warp - token * segments);
    first = segment * kAhead * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize);
    if (token >= tokens) token = -1;
  }
};

// Order "yxc", everything on 16 bytes. T: of so many bytes as an element has.
template <class T, bool kInverse>
__global__ void __launch_bounds__(kMoveThreads)
    pixel_shuffle_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  constexpr int V = kPack<T>;
  const int per_pixel = static_cast<int>(p.channels) / V;
  const int units = static_cast<int>(p.block()) * per_pixel;
  const Segment segment(p.tokens, units);
  if (segment.token < 0) return;
  const Place at = find(p, segment.token);
  Words<T, V> packs[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      packs[j] = load_words<V>(merged_at<T>(p, at) + static_cast<int64_t>(u) * V);
    } else {
      const int pixel = u / per_pixel;
      packs[j] =
          load_words<V>(static_cast<const T*>(p.pixels) + block_at(at, p.groups[at.group].from) +
                        pixel_at(p, p.groups[at.group].from, pixel) + (u - pixel * per_pixel) * V);
    }
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      const int pixel = u / per_pixel;
      store_words(static_cast<T*>(p.pixels_out) + block_at(at, p.groups[at.group].to) +
                      pixel_at(p, p.groups[at.group].to, pixel) + (u - pixel * per_pixel) * V,
                  packs[j]);
    } else {
      store_words(merged_out_at<T>(p, at) + static_cast<int64_t>(u) * V, packs[j]);
    }
  }
}

// Of one pack of a "cyx" token with factor 2: 4 bytes, N channels, of each of its four pixels.
template <class T>
struct Quad {
  static constexpr int V = kPack<T>, N = V / 4;
  uint32_t of[4];

  __device__ __forceinline__ Words<T, V> merged() const {
    if constexpr (N == 1) {
      return {{of[0], of[1], of[2], of[3]}};
    } else {
      return {{(of[0] & 0xffffu) | of[1] << 16, (of[2] & 0xffffu) | of[3] << 16,
               of[0] >> 16 | (of[1] & 0xffff0000u), of[2] >> 16 | (of[3] & 0xffff0000u)}};
    }
  }
  __device__ __forceinline__ void split(const Words<T, V>& from) {
    const auto& w = from.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (N == 1) {
        of[i] = w[i];
      } else if (i % 2 == 0) {
        of[i] = (w[i / 2] & 0xffffu) | w[2 + i / 2] << 16;
      } else {
        of[i] = w[i / 2] >> 16 | (w[2 + i / 2] & 0xffff0000u);
      }
    }
  }
  // unit: number of the pack.
  __device__ __forceinline__ void load(const T* block, int y, int x, int unit) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of[i] = load_pack<1>(reinterpret_cast<const uint32_t*>(block + place(y, x, unit, i))).v[0];
  }
  __device__ __forceinline__ void store(T* block, int y, int x, int unit) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_pack(reinterpret_cast<uint32_t*>(block + place(y, x, unit, i)),
                 Pack<uint32_t, 1>{{of[i]}});
  }

 private:
  static __device__ __forceinline__ int place(int y, int x, int unit, int i) {
    return i / 2 * y + i % 2 * x + unit * N;
  }
};

template <class T, bool kInverse>
__global__ void __launch_bounds__(kMoveThreads)
    pixel_shuffle_cyx_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  constexpr int V = kPack<T>;
  const int units = static_cast<int>(p.channels) / Quad<T>::N;
  const Segment segment(p.tokens, units);
  if (segment.token < 0) return;
  const Place at = find(p, segment.token);
  Quad<T> quads[kAhead];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      quads[j].split(load_words<V>(merged_at<T>(p, at) + static_cast<int64_t>(u) * V));
    } else {
      quads[j].load(static_cast<const T*>(p.pixels) + block_at(at, p.groups[at.group].from),
                    static_cast<int>(p.groups[at.group].from.y),
                    static_cast<int>(p.groups[at.group].from.x), u);
    }
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      quads[j].store(static_cast<T*>(p.pixels_out) + block_at(at, p.groups[at.group].to),
                     static_cast<int>(p.groups[at.group].to.y),
                     static_cast<int>(p.groups[at.group].to.x), u);
    } else {
      store_words(merged_out_at<T>(p, at) + static_cast<int64_t>(u) * V, quads[j].merged());
    }
  }
}

// Which pixel and channel of a block element k of its merged token is.
struct Element {
  int pixel, channel;
  __device__ __forceinline__ Element(const Params& p, int k) {
    if (p.order == Order::kYxc) {
      pixel = k / static_cast<int>(p.channels);
      channel = k - pixel * static_cast<int>(p.channels);
    } else {
      const int block = static_cast<int>(p.block());
      channel = k / block;
      pixel = k - channel * block;
    }
  }
};

// Any factor, order and strides.
template <class T, bool kInverse>
__global__ void __launch_bounds__(kMoveThreads)
    pixel_shuffle_any_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  const int units = static_cast<int>(p.block() * p.channels);
  const Segment segment(p.tokens, units);
  if (segment.token < 0) return;
  const Place at = find(p, segment.token);
  for (int j = 0; j < kAhead; ++j) {
    const int k = segment.first + j * kWarpSize;
    if (k >= units) break;
    const Element e(p, k);
    if constexpr (kInverse) {
      static_cast<T*>(p.pixels_out)[block_at(at, p.groups[at.group].to) +
                                    pixel_at(p, p.groups[at.group].to, e.pixel) + e.channel] =
          merged_at<T>(p, at)[k * p.merged_stride];
    } else {
      merged_out_at<T>(p, at)[k] = static_cast<const T*>(
          p.pixels)[block_at(at, p.groups[at.group].from) +
                    pixel_at(p, p.groups[at.group].from, e.pixel) + e.channel * p.pixel_stride];
    }
  }
}

// The mean of channel k of a block.
template <class T>
__device__ __forceinline__ float mean_at(const Params& p, const T* block, const Pixels& pixels,
                                         int k) {
  float sum = 0.0f;
  const int n = static_cast<int>(p.block());
  for (int i = 0; i < n; ++i) sum += to_float(block[pixel_at(p, pixels, i) + k * p.pixel_stride]);
  return sum * (1.0f / static_cast<float>(n));
}

// Averages, any strides; kInverse: a merged token's share to each of its pixels.
template <class T, bool kInverse>
__global__ void __launch_bounds__(kMoveThreads)
    pixel_shuffle_mean_any_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  const int units = static_cast<int>(p.channels);
  const Segment segment(p.tokens, units);
  if (segment.token < 0) return;
  const Place at = find(p, segment.token);
  const int n = static_cast<int>(p.block());
  for (int j = 0; j < kAhead; ++j) {
    const int k = segment.first + j * kWarpSize;
    if (k >= units) break;
    if constexpr (kInverse) {
      const T share = from_float<T>(to_float(merged_at<T>(p, at)[k * p.merged_stride]) *
                                    (1.0f / static_cast<float>(n)));
      T* block = static_cast<T*>(p.pixels_out) + block_at(at, p.groups[at.group].to) + k;
      for (int i = 0; i < n; ++i) block[pixel_at(p, p.groups[at.group].to, i)] = share;
    } else {
      const T* block = static_cast<const T*>(p.pixels) + block_at(at, p.groups[at.group].from);
      merged_out_at<T>(p, at)[k] = from_float<T>(mean_at(p, block, p.groups[at.group].from, k));
    }
  }
}

// n / d by one multiplication, for n d < 2^32.
struct Divider {
  uint32_t d, inverse;

  static Divider of(int64_t d) {  // on the host
    const auto n = static_cast<uint32_t>(d);
    return {n, static_cast<uint32_t>(((uint64_t{1} << 32) + n - 1) / n)};
  }
  __device__ __forceinline__ int operator()(int n) const {
    return d == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), inverse));
  }
};

// What the launcher knows of a Params beyond it.
struct Plan {
  int units;  // packs of a row
  int64_t rows;
  int part_rows;              // that leave one sum in backward
  Divider per_pixel, factor;  // packs of a pixel; Params' factor
};

struct PlaceOfRow {
  Place at;
  int pixel;  // where a row is one pixel; else -1
};

template <Layout layout>
__device__ __forceinline__ PlaceOfRow find_row(const Params& p, int64_t row) {
  if (layout != Layout::kYxc || !p.norm_channels) return {find(p, row), -1};
  const int block = static_cast<int>(p.block());
  const int64_t token = row / block;
  return {find(p, token), static_cast<int>(row - token * block)};
}

// One row of packs.
template <class T, Layout layout>
struct Row {
  static constexpr int V = kPack<T>;
  static constexpr int kSets = layout == Layout::kCyx ? 4 : 1;  // normed each for itself: pixels
  // Of the columns of the norm that element e of a pack is one of; a pack has kColumns.
  static constexpr int kColumns = layout == Layout::kCyx ? V / 4 : V;
  static __device__ __forceinline__ constexpr int column_of(int e) {
    return layout == Layout::kCyx ? e / 4 : e;
  }

  const Params& p;
  const Plan& plan;
  Place at;
  int pixel;

  __device__ __forceinline__ Row(const Params& p, const Plan& plan, const PlaceOfRow& place)
      : p(p), plan(plan), at(place.at), pixel(place.pixel) {}

  // The block of pixels a row is from, within which offsets have 32 bits.
  template <class Pointer>
  struct Block {
    Pointer data;
    int y, x;
    __device__ __forceinline__ Block(Pointer base, const Place& at, const Pixels& pixels)
        : data(base + block_at(at, pixels)),
          y(static_cast<int>(pixels.y)),
          x(static_cast<int>(pixels.x)) {}
  };
  __device__ __forceinline__ Block<const T*> from() const {
    return {static_cast<const T*>(p.pixels), at, p.groups[at.group].from};
  }
  __device__ __forceinline__ Block<T*> to() const {
    return {static_cast<T*>(p.pixels_out), at, p.groups[at.group].to};
  }

  // Pack u in the block, for layouts where it lies in one pixel.
  template <class Pointer>
  __device__ __forceinline__ Pointer pack(const Block<Pointer>& block, int u) const {
    const int i = pixel >= 0 ? pixel : plan.per_pixel(u), dy = plan.factor(i);
    const int in_pixel = pixel >= 0 ? u : u - i * static_cast<int>(plan.per_pixel.d);
    return block.data + (dy * block.y + (i - dy * p.factor) * block.x + in_pixel * V);
  }

  __device__ __forceinline__ void load(const Block<const T*>& block, int u, float (&x)[V]) const {
    if constexpr (layout == Layout::kYxc) {
      load_floats(pack(block, u), x);
    } else if constexpr (layout == Layout::kCyx) {
      Quad<T> quad;
      quad.load(block.data, block.y, block.x, u);
      widen(quad.merged(), x);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) x[e] = 0.0f;
      for (int dy = 0; dy < p.factor; ++dy) {
        const T* line = block.data + dy * block.y + u * V;
#pragma unroll 4
        for (int dx = 0; dx < p.factor; ++dx) {
          float one[V];
          load_floats(line + dx * block.x, one);
#pragma unroll
          for (int e = 0; e < V; ++e) x[e] += one[e];
        }
      }
      const float share = 1.0f / static_cast<float>(p.block());
#pragma unroll
      for (int e = 0; e < V; ++e) x[e] *= share;
    }
  }

  // To the pixels that pack u comes from.
  __device__ __forceinline__ void store(const Block<T*>& block, int u, const float (&x)[V]) const {
    if constexpr (layout == Layout::kYxc) {
      store_words(pack(block, u), narrow<T>(x));
    } else if constexpr (layout == Layout::kCyx) {
      Quad<T> quad;
      quad.split(narrow<T>(x));
      quad.store(block.data, block.y, block.x, u);
    } else {
      float share[V];
#pragma unroll
      for (int e = 0; e < V; ++e) share[e] = x[e] * (1.0f / static_cast<float>(p.block()));
      const auto words = narrow<T>(share);
      for (int dy = 0; dy < p.factor; ++dy) {
        T* line = block.data + dy * block.y + u * V;
        for (int dx = 0; dx < p.factor; ++dx) store_words(line + dx * block.x, words);
      }
    }
  }

  // Where pack u lies in its merged token.
  __device__ __forceinline__ int merged(int u) const {
    return (pixel > 0 ? pixel * static_cast<int>(p.channels) : 0) + u * V;
  }
};

// Grid: rows. Where there is no norm a row's mean alone is taken. TW: of weight and bias.
template <class T, class TW, Layout layout>
__global__ void __launch_bounds__(kNormThreads, 1)
    pixel_shuffle_norm_kernel(const VLMOPS_GRID_CONSTANT Params p,
                              const VLMOPS_GRID_CONSTANT Plan plan) {
  using R = Row<T, layout>;
  using Held = HeldRow<T>;
  constexpr int V = R::V, S = R::kSets;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const R row(p, plan, find_row<layout>(p, blockIdx.x));
  Held held;
  constexpr int C = R::kColumns;
  const auto from = row.from();
  Held::each(plan.units, [&](int j, int u) { row.load(from, u, held.x[j]); });
  T* const out = merged_out_at<T>(p, row.at);
  if (p.norm == Norm::kNone) {
    Held::each(plan.units,
               [&](int j, int u) { store_words(out + row.merged(u), narrow<T>(held.x[j])); });
    return;
  }
  Statistics by[S];
  held.statistics(plan.units, p.norm == Norm::kLayer, p.eps, 1.0f / static_cast<float>(p.normed()),
                  add_up, by);
  const Affine<TW, C> affine(p.weight.data, p.bias.data, p.offset);
  const auto finish = [&](int j, int u, const float (&w)[C], const float (&b)[C]) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float y = held.x[j][e] * by[e % S].scale + by[e % S].shift;
      held.x[j][e] = y * w[R::column_of(e)] + b[R::column_of(e)];
    }
    store_words(out + row.merged(u), narrow<T>(held.x[j]));
  };
  affine.template each<T>(plan.units, finish);
}

// Grid: rows. scales [rows that are normed, kScales], for the sums below; or null.
template <class T, class TW, Layout layout>
__global__ void __launch_bounds__(kNormThreads, 1)
    pixel_shuffle_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Params p,
                                       const VLMOPS_GRID_CONSTANT Plan plan, float* scales) {
  using R = Row<T, layout>;
  using Held = HeldRow<T>;
  constexpr int V = R::V, S = R::kSets;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const R row(p, plan, find_row<layout>(p, blockIdx.x));
  const T* const grad = merged_at<T>(p, row.at);
  Held held;
  float wg[Held::P][V];
  const Affine<TW, R::kColumns> affine(p.weight.data, nullptr, p.offset);
  const auto from = row.from();
  Held::each(plan.units, [&](int j, int u) { row.load(from, u, held.x[j]); });
  Held::each(plan.units, [&](int j, int u) { load_floats(grad + row.merged(u), wg[j]); });
  Held::each(plan.units, [&](int j, int u) {
    float w[R::kColumns];
    affine.weights(u, w);
#pragma unroll
    for (int e = 0; e < V; ++e) wg[j][e] *= w[R::column_of(e)];
  });
  Statistics by[S];
  held.pull_back(wg, plan.units, p.norm == Norm::kLayer, p.eps,
                 1.0f / static_cast<float>(p.normed()), add_up, by);
  if (scales != nullptr && threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < S; ++s) keep(scales, static_cast<int64_t>(blockIdx.x) * S + s, by[s]);
  }
  if (p.pixels_out == nullptr) return;
  const auto to = row.to();
  Held::each(plan.units, [&](int j, int u) { row.store(to, u, held.x[j]); });
}

// partial [parts, 2, normed]: of plan.part_rows rows each, the sums of the gradients of weight and
// bias. Grid: parts times the packs of a row by kWarpSize.
template <class T, Layout layout>
__global__ void __launch_bounds__(kSumThreads)
    pixel_shuffle_norm_sums_kernel(const VLMOPS_GRID_CONSTANT Params p,
                                   const VLMOPS_GRID_CONSTANT Plan plan, const float* scales,
                                   float* partial) {
  using R = Row<T, layout>;
  constexpr int V = R::V, S = R::kSets, C = R::kColumns, kWarps = kSumThreads / kWarpSize;
  constexpr int kMostRows = kLargePart / S;  // a "cyx" token is S rows that are normed
  VLMOPS_SHARED(PlaceOfRow, places, kMostRows);
  VLMOPS_SHARED(float, shared, kWarps * 2 * C * kWarpSize);
  const int columns = (plan.units + kWarpSize - 1) / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t part = blockIdx.x / columns;
  const int u = static_cast<int>(blockIdx.x - part * columns) * kWarpSize + lane;
  const int64_t first = part * plan.part_rows, left = plan.rows - first;
  const int rows = left < plan.part_rows ? static_cast<int>(left) : plan.part_rows;
  if (static_cast<int>(threadIdx.x) < rows)
    places[threadIdx.x] = find_row<layout>(p, first + threadIdx.x);
  __syncthreads();
  float sums[2 * C] = {};
#pragma unroll 4
  for (int i = u < plan.units ? warp : rows; i < rows; i += kWarps) {
    const R row(p, plan, places[i]);
    float x[V], g[V];
    row.load(row.from(), u, x);
    load_floats(merged_at<T>(p, row.at) + row.merged(u), g);
    Statistics by[S];
#pragma unroll
    for (int s = 0; s < S; ++s) by[s] = kept(scales, (first + i) * S + s);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sums[R::column_of(e)] += g[e] * by[e % S].normed(x[e]);
      sums[C + R::column_of(e)] += g[e];
    }
  }
  float* const to = partial + part * 2 * p.normed();
  add_warps<kWarps>(sums, shared, [&](int i, float sum) {
    if (u < plan.units) to[i / C * p.normed() + static_cast<int64_t>(u) * C + i % C] = sum;
  });
}

// A row element by element: any factor, order, strides and length.
template <class T>
struct AnyRow {
  Place at;
  int pixel;  // where a row is one pixel; else -1

  __device__ __forceinline__ AnyRow(const Params& p, int64_t row) {
    const int block = static_cast<int>(p.block());
    const int64_t token = p.norm_channels ? row / block : row;
    pixel = p.norm_channels ? static_cast<int>(row - token * block) : -1;
    at = find(p, token);
  }
  __device__ __forceinline__ Element element_of(const Params& p, int k) const {
    Element e(p, k);
    if (pixel >= 0) {
      e.pixel = pixel;
      e.channel = k;
    }
    return e;
  }
  __device__ __forceinline__ float load(const Params& p, int k) const {
    const Pixels& pixels = p.groups[at.group].from;
    const T* block = static_cast<const T*>(p.pixels) + block_at(at, pixels);
    if (p.mean) return mean_at(p, block, pixels, k);
    const Element e = element_of(p, k);
    return to_float(block[pixel_at(p, pixels, e.pixel) + e.channel * p.pixel_stride]);
  }
  __device__ __forceinline__ void store_pixels(const Params& p, int k, float x) const {
    const Pixels& pixels = p.groups[at.group].to;
    T* block = static_cast<T*>(p.pixels_out) + block_at(at, pixels);
    if (p.mean) {
      const int n = static_cast<int>(p.block());
      const T share = from_float<T>(x * (1.0f / static_cast<float>(n)));
      for (int i = 0; i < n; ++i) block[pixel_at(p, pixels, i) + k] = share;
      return;
    }
    const Element e = element_of(p, k);
    block[pixel_at(p, pixels, e.pixel) + e.channel] = from_float<T>(x);
  }
  // Where element k lies in its merged token.
  __device__ __forceinline__ int64_t merged(const Params& p, int k) const {
    if (pixel < 0) return k;
    return p.order == Order::kYxc ? pixel * p.channels + k : k * p.block() + pixel;
  }
};

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    pixel_shuffle_norm_any_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const AnyRow<T> row(p, blockIdx.x);
  const int n = static_cast<int>(p.normed());
  const auto load = [&](int64_t k) { return row.load(p, static_cast<int>(k)); };
  const Statistics by = statistics_of_each(n, load, p.norm == Norm::kLayer, p.eps, add_up);
  T* const out = merged_out_at<T>(p, row.at);
  for (int k = threadIdx.x; k < n; k += kAnyThreads) {
    const float y = by.normed(row.load(p, k)) * weight_at(p.weight, p.offset, k);
    out[row.merged(p, k)] = from_float<T>(y + element(p.bias, k, 0.0f));
  }
}

// partial: as above, written over by each row.
template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    pixel_shuffle_norm_backward_any_kernel(const VLMOPS_GRID_CONSTANT Params p, int64_t rows,
                                           float* partial) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const int n = static_cast<int>(p.normed());
  const float per_element = 1.0f / static_cast<float>(n);
  const bool layer = p.norm == Norm::kLayer;
  float* const of_weight =
      partial == nullptr ? nullptr : partial + static_cast<int64_t>(blockIdx.x) * 2 * n;
  float* const of_bias = partial == nullptr ? nullptr : of_weight + n;
  for (int k = threadIdx.x; partial != nullptr && k < n; k += kAnyThreads)
    of_weight[k] = of_bias[k] = 0.0f;
  for (int64_t number = blockIdx.x; number < rows; number += gridDim.x) {
    const AnyRow<T> row(p, number);
    const T* const grad = merged_at<T>(p, row.at);
    float mean[1] = {};
    if (layer) {
      for (int k = threadIdx.x; k < n; k += kAnyThreads) mean[0] += row.load(p, k);
      add_up(mean);
      mean[0] *= per_element;
    }
    float sums[4] = {};
    for (int k = threadIdx.x; k < n; k += kAnyThreads) {
      const float centred = row.load(p, k) - mean[0];
      const float wg =
          weight_at(p.weight, p.offset, k) * to_float(grad[row.merged(p, k) * p.merged_stride]);
      sums[0] += centred;
      sums[1] += centred * centred;
      sums[2] += wg;
      sums[3] += wg * centred;
    }
    add_up(sums);
    const Statistics by = statistics_of(layer, p.eps, mean[0], sums[0], sums[1], per_element);
    const float mean_wg = layer ? sums[2] * per_element : 0.0f;
    const float mean_along = (sums[3] * by.scale + sums[2] * by.shift) * per_element;
    for (int k = threadIdx.x; k < n; k += kAnyThreads) {
      const float xh = by.normed(row.load(p, k));
      const float g = to_float(grad[row.merged(p, k) * p.merged_stride]);
      if (partial != nullptr) {
        of_weight[k] += g * xh;
        of_bias[k] += g;
      }
      if (p.pixels_out != nullptr)
        row.store_pixels(
            p, k, (weight_at(p.weight, p.offset, k) * g - mean_wg - xh * mean_along) * by.scale);
    }
  }
}

// weight_grad, bias_grad [normed], or null: the sums of partial [parts, 2, normed]. Grid (normed /
// 32, 2), block (32, kSlices).
__global__ void __launch_bounds__(kWarpSize* kSlices)
    pixel_shuffle_weight_grad_kernel(const float* partial, int64_t parts, int64_t normed,
                                     float* weight_grad, float* bias_grad) {
  VLMOPS_SHARED(double, shared, kSlices* kWarpSize);
  float* const out = blockIdx.y == 0 ? weight_grad : bias_grad;
  if (out == nullptr) return;
  add_parts(partial + blockIdx.y * normed, parts, 2 * normed, normed, shared,
            [&](int64_t column, float sum) { out[column] = sum; });
}

}  // namespace vlmops::pixel_shuffle
