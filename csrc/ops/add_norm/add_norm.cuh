// The norm behind a sum on NVIDIA GPUs; add_norm_cpu.h has the formulas.
//
// Bytes: x and residual read, out and, where it is needed later, the sum written. Idefics2's
// perceiver, 8 x 64 latents of 4,096 in bfloat16, is 17 MB, 4 us at the 4.3 TB/s that a copy
// reaches on an H200; 4,096 x 4,096 is 134 MB, 31 us. Backward reads grad, the sum and perhaps a
// gradient of it, writes one, and reads all of them again, in part out of L2, for the vectors'
// gradients. PREDICTED, never measured: 75 % of a copy forward at 4,096 rows, as the norms of
// norm.cuh do, a launch (3 us) below; backward half.
//
// Threads: norm.cuh; rows that one warp holds come kShortRows to a block. What is unaligned or
// longer than registers allow, and vectors of several dtypes, go element by element. The sums for
// weight, bias and x_bias are row_sums.cuh's, x_bias's of the gradient that was written.
#pragma once

#include "common/norm.cuh"
#include "common/row_sums.cuh"
#include "ops/add_norm/add_norm.h"

namespace vlmops::add_norm {

constexpr int kShortRows = 4;
constexpr int kAnyThreads = 128;

template <class T>
__device__ __forceinline__ const T* rows_of(const Params& p, const void* data, const RowStrides& s,
                                            int64_t row) {
  return static_cast<const T*>(data) + row_at(p, s, row);
}

// Grid: rows by threadIdx.y. TW: of weight and bias; x_bias is of T. Two blocks of float32 spill.
template <class T, class TW>
__global__ void __launch_bounds__(kNormThreads, sizeof(T) == 4 ? 1 : 2)
    add_norm_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  constexpr int V = kPack<T>;
  using Held = HeldRow<T>;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // a warp, where a block has several rows: no barrier follows
  const int packs = static_cast<int>(p.channels) / V;
  const T* const x = rows_of<T>(p, p.x, p.x_stride, row);
  Held held;
  Held::each(packs, [&](int j, int u) { load_floats(x + u * V, held.x[j]); });
  const auto add = [&](const T* from) {
    Held::each(packs, [&](int j, int u) {
      float more[V];
      load_floats(from + u * V, more);
#pragma unroll
      for (int e = 0; e < V; ++e) held.x[j][e] += more[e];
    });
  };
  if (p.vectors[kXBias].data != nullptr) add(static_cast<const T*>(p.vectors[kXBias].data));
  if (p.residual != nullptr) add(rows_of<T>(p, p.residual, p.residual_stride, row));
  if (p.sum != nullptr) {
    T* const sum = static_cast<T*>(p.sum) + row * p.channels;
    Held::each(packs, [&](int j, int u) { store_words(sum + u * V, narrow<T>(held.x[j])); });
  }
  Statistics by[1];
  held.statistics(packs, p.layer, p.eps, 1.0f / static_cast<float>(p.channels), add_up, by);
  const Affine<TW, V> affine(p.vectors[kWeight].data, p.vectors[kBias].data, 0.0f);
  T* const out = static_cast<T*>(p.out) + row * p.channels;
  affine.template each<T>(packs, [&](int j, int u, const float (&w)[V], const float (&b)[V]) {
#pragma unroll
    for (int e = 0; e < V; ++e)
      held.x[j][e] = (held.x[j][e] * by[0].scale + by[0].shift) * w[e] + b[e];
    store_words(out + u * V, narrow<T>(held.x[j]));
  });
}

// The same grid. scales [rows, kScales], or null.
template <class T, class TW>
__global__ void __launch_bounds__(kNormThreads, 1)
    add_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Params p, float* scales) {
  constexpr int V = kPack<T>;
  using Held = HeldRow<T>;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const int packs = static_cast<int>(p.channels) / V;
  const T* const x = rows_of<T>(p, p.x, p.x_stride, row);
  const T* const grad = rows_of<T>(p, p.grad, p.grad_stride, row);
  Held held;
  float wg[Held::P][V];
  const Affine<TW, V> affine(p.vectors[kWeight].data, nullptr, 0.0f);
  Held::each(packs, [&](int j, int u) { load_floats(x + u * V, held.x[j]); });
  Held::each(packs, [&](int j, int u) { load_floats(grad + u * V, wg[j]); });
  Held::each(packs, [&](int j, int u) {
    float w[V];
    affine.weights(u, w);
#pragma unroll
    for (int e = 0; e < V; ++e) wg[j][e] *= w[e];
  });
  Statistics by[1];
  held.pull_back(wg, packs, p.layer, p.eps, 1.0f / static_cast<float>(p.channels), add_up, by);
  if (scales != nullptr && threadIdx.x == 0) keep(scales, row, by[0]);
  if (p.out == nullptr) return;
  if (p.residual != nullptr) {
    const T* const added = rows_of<T>(p, p.residual, p.residual_stride, row);
    Held::each(packs, [&](int j, int u) {
      float more[V];
      load_floats(added + u * V, more);
#pragma unroll
      for (int e = 0; e < V; ++e) held.x[j][e] += more[e];
    });
  }
  T* const out = static_cast<T*>(p.out) + row * p.channels;
  Held::each(packs, [&](int j, int u) { store_words(out + u * V, narrow<T>(held.x[j])); });
}

// A row element by element: any length, alignment and vectors. It is read again out of L1.
template <class T>
struct AnyRow {
  const Params& p;
  const T *x, *residual;  // residual: null in backward, where it is no part of the row

  __device__ __forceinline__ explicit AnyRow(const Params& p)
      : p(p),
        x(rows_of<T>(p, p.x, p.x_stride, blockIdx.x)),
        residual(p.residual == nullptr || p.grad != nullptr
                     ? nullptr
                     : rows_of<T>(p, p.residual, p.residual_stride, blockIdx.x)) {}

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t i = threadIdx.x; i < p.channels; i += kAnyThreads) f(i);
  }
  __device__ __forceinline__ float operator()(int64_t i) const {
    const float s = to_float(x[i]) + element(p.vectors[kXBias], i, 0.0f);
    return residual == nullptr ? s : s + to_float(residual[i]);
  }
  __device__ __forceinline__ float weight(int64_t i) const {
    return weight_at(p.vectors[kWeight], 0.0f, i);
  }
};

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    add_norm_any_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const AnyRow<T> row(p);
  const Statistics by = statistics_of_each(p.channels, row, p.layer, p.eps, add_up);
  T* const out = static_cast<T*>(p.out) + blockIdx.x * p.channels;
  T* const sum = p.sum == nullptr ? nullptr : static_cast<T*>(p.sum) + blockIdx.x * p.channels;
  row.each([&](int64_t i) {
    const float s = row(i);
    if (sum != nullptr) sum[i] = from_float<T>(s);
    const float bias = element(p.vectors[kBias], i, 0.0f);
    out[i] = from_float<T>(by.normed(s) * row.weight(i) + bias);
  });
}

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    add_norm_backward_any_kernel(const VLMOPS_GRID_CONSTANT Params p, float* scales) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const AnyRow<T> row(p);
  const Statistics by = statistics_of_each(p.channels, row, p.layer, p.eps, add_up);
  if (scales != nullptr && threadIdx.x == 0) keep(scales, blockIdx.x, by);
  if (p.out == nullptr) return;
  const T* const grad = rows_of<T>(p, p.grad, p.grad_stride, blockIdx.x);
  float sums[2] = {};
  row.each([&](int64_t i) {
    const float wg = row.weight(i) * to_float(grad[i]);
    sums[0] += wg;
    sums[1] += wg * by.normed(row(i));
  });
  add_up(sums);
  const float per_element = 1.0f / static_cast<float>(p.channels);
  const float mean = p.layer ? sums[0] * per_element : 0.0f, along = sums[1] * per_element;
  const T* const added =
      p.residual == nullptr ? nullptr : rows_of<T>(p, p.residual, p.residual_stride, blockIdx.x);
  T* const out = static_cast<T*>(p.out) + blockIdx.x * p.channels;
  row.each([&](int64_t i) {
    const float wg = row.weight(i) * to_float(grad[i]);
    const float of_sum = (wg - mean - by.normed(row(i)) * along) * by.scale;
    out[i] = from_float<T>(added == nullptr ? of_sum : of_sum + to_float(added[i]));
  });
}

// g.partial, of the vectors that are needed. Grid: parts times 32 V columns.
template <class T, int V>
__global__ void __launch_bounds__(kSumThreads)
    add_norm_sums_kernel(const VLMOPS_GRID_CONSTANT Params p,
                         const VLMOPS_GRID_CONSTANT VectorGrads g) {
  VLMOPS_SHARED(float, shared, kSumThreads* V);
  const Tile<V> tile(p.rows, p.channels);
  Floats<V> sums[kVectors] = {};
#pragma unroll 4
  for (int64_t row = tile.inside ? tile.row : tile.last; row < tile.last; row += kSumWarps) {
    const Floats<V> of = load<T, V>(p.grad, row_at(p, p.grad_stride, row) + tile.column);
    add(sums[kBias], of);
    if (g.out[kWeight] != nullptr) {
      const Statistics by = kept(g.scales, row);
      Floats<V> y = load<T, V>(p.x, row_at(p, p.x_stride, row) + tile.column);
#pragma unroll
      for (int e = 0; e < V; ++e) y.v[e] = by.normed(y.v[e]) * of.v[e];
      add(sums[kWeight], y);
    }
    if (g.out[kXBias] != nullptr)
      add(sums[kXBias], load<T, V>(p.out, row * p.channels + tile.column));
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    float* const to = g.partial + k * g.parts * p.channels;
    add_up(g.out[k] == nullptr ? nullptr : to, sums[k], tile, p.channels, shared);
  }
}

// Grid: 32 columns times kVectors. Block: 32 x kSlices.
__global__ void __launch_bounds__(kWarpSize* kSlices)
    add_norm_vectors_kernel(const VLMOPS_GRID_CONSTANT VectorGrads g, int64_t channels) {
  VLMOPS_SHARED(double, shared, kSlices* kWarpSize);
  void* const out = g.out[blockIdx.y];
  if (out == nullptr) return;
  const float* const partial = g.partial + blockIdx.y * g.parts * channels;
  add_parts(partial, g.parts, channels, channels, shared, [&](int64_t i, float sum) {
    switch (g.dtype[blockIdx.y]) {
      case DType::kFloat32:
        static_cast<float*>(out)[i] = sum;
        break;
      case DType::kBFloat16:
        static_cast<bfloat16*>(out)[i] = from_float<bfloat16>(sum);
        break;
      case DType::kFloat16:
        static_cast<float16*>(out)[i] = from_float<float16>(sum);
        break;
    }
  });
}

}  // namespace vlmops::add_norm
