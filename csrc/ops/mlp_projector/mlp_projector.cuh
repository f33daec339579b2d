// What surrounds a projector's products on NVIDIA GPUs: norm, activation, and their backward.
//
//   norm                z = (x - mean) * factor * (offset + weight) + bias, of each row
//   activate            a = activation(h), or activation(gate) * h
//   activate_backward   grad_h = grad * activation'(h) and so on; a again; sums of both over rows
//   norm_backward       grad_x, and sums over rows for weight and bias
//
// The products are cuBLAS's, which adds biases before it rounds. Its own epilogue for activations
// knows tanh's gelu alone (steps.forward uses that for 16 bits); for the others a layer is read and
// written once more. Measured on an H200 (bench/results/h200, torch 2.11), microseconds in
// bfloat16, L2 cold, beside the bare products:
//                               forward: products  ours  eager   backward: products  ours  eager
//   LLaVA, 576 rows                          38      46     46                 89     105    121
//   2,880 rows                              187     208    209                356     401    426
//   InternVL, 3,328 rows, norm               44      68     76                 99     188    189
//   Qwen2-VL-7B, 1,225 rows                 162     174    173                346     371    396
//   Idefics2, 4,900 rows, gated            1342    1455   1534               2602    2879   2945
// Forward eager's kernels read and write as much as ours, so that little is to be gained; backward
// ours keep one layer instead of two, and add biases up where their gradients are read anyway.
//
// Of kernels by themselves: a norm of 3,328 rows of 4,096 takes 17 to 18 (a copy 14; eager's 25 in
// the same trace), its backward 29 and 18 for the sums (eager's 29 and 25), gelu of 2,880 x 4,096
// 16 (a copy 11), its backward 28, of which 22 is what its bytes take.
//
// Threads: elementwise, one pack of 16 bytes each, and the activation chosen once. Norms: norm.cuh.
// Sums: 8 warps to a part of the rows and 32 packs of columns, warps added up in shared memory; the
// parts are added by a kernel of their own. No atomics: the same bits in every run.
#pragma once

#include "common/norm.cuh"
#include "common/row_sums.cuh"
#include "ops/mlp_projector/mlp_projector.h"

namespace vlmops::mlp_projector {

constexpr int kThreads = kSumThreads;  // of elementwise kernels and of sums
constexpr int kAnyThreads = 128;       // of a norm element by element

// f(x) and f'(x).
struct Value {
  float f, slope;
};

// e^x and x / y, to the last place or, for results that are rounded to 16 bits, to two.
template <bool kExact>
__device__ __forceinline__ float exp_of(float x) {
  return kExact ? expf(x) : __expf(x);
}
template <bool kExact>
__device__ __forceinline__ float quotient(float x, float y) {
  return kExact ? x / y : __fdividef(x, y);
}

// x sigmoid(u), where du/dx = slope
template <bool kExact>
__device__ __forceinline__ Value swish(float x, float u, float slope) {
  const float e = exp_of<kExact>(-(u < -88.0f ? -88.0f : u));  // finite
  const float s = quotient<kExact>(1.0f, 1.0f + e), f = x * s;
  return {f, s + f * (e * s) * slope};  // 1 - s = e s, without its cancellation
}

template <bool kExact>
__device__ __forceinline__ Value gelu(float x) {
  const float e = exp_of<kExact>(-0.5f * x * x);
  // erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.4 z); q fits to 2e-8. __fdividef is 0 beyond 2^126.
  const float t = quotient<kExact>(1.0f, 1.0f + 0.282842712f * fabsf(x));
  float q = fmaf(-0.0335011268715059f, t, 0.21878535612963773f);
  q = fmaf(q, t, -0.5465026177592626f);
  q = fmaf(q, t, 0.6093421802854352f);
  q = fmaf(q, t, -0.3343118761726383f);
  q = fmaf(q, t, 0.2979731945814201f);
  q = fmaf(q, t, 0.12105998246941305f);
  q = fmaf(q, t, 0.21668938595921516f);
  q = fmaf(q, t, 0.2247486652732355f);
  q = fmaf(q, t, 0.22571685743718184f);
  const float tail = 0.5f * e * t * q;
  const float below = x > 0.0f ? 1.0f - tail : tail;
  return {x * below, below + 0.398942280f * x * e};
}

template <Activation kind, bool kExact>
__device__ __forceinline__ Value activated(float x) {
  if constexpr (kind == Activation::kGelu) {
    return gelu<kExact>(x);
  } else if constexpr (kind == Activation::kGeluTanh) {
    return swish<kExact>(x, x * (1.59576912f + 0.0713548163f * x * x),
                         1.59576912f + 0.214064449f * x * x);
  } else if constexpr (kind == Activation::kQuickGelu) {
    return swish<kExact>(x, 1.702f * x, 1.702f);
  } else if constexpr (kind == Activation::kSilu) {
    return swish<kExact>(x, x, 1.0f);
  } else if constexpr (kind == Activation::kRelu) {
    return x <= 0.0f ? Value{0.0f, 0.0f} : Value{x, 1.0f};  // NaN stays
  } else {
    return {x, 1.0f};
  }
}

// f(kind), a constant: chosen once, so that the elements of a pack are computed side by side.
template <class F>
__device__ __forceinline__ void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kQuickGelu:
      return f(std::integral_constant<Activation, Activation::kQuickGelu>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>());
  }
}

template <class T, int V, Activation kind>
__device__ __forceinline__ void activate_at(const Activate& p, int64_t i) {
  constexpr bool kExact = sizeof(T) == 4;
  const Floats<V> x = load<T, V>(p.hidden, i);
  Floats<V> y;
  if (p.gate == nullptr) {
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = activated<kind, kExact>(x.v[e]).f;
  } else {
    const Floats<V> gate = load<T, V>(p.gate, i);
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = activated<kind, kExact>(gate.v[e]).f * x.v[e];
  }
  store<T, V>(p.out, i, y);
}

// A pack to a thread, and what is left of them to the first block.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_activate_kernel(const VLMOPS_GRID_CONSTANT Activate p) {
  const int64_t elements = p.rows * p.width, packs = elements / V;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  with_activation(p.activation, [&](auto kind) {
    if (i < packs) activate_at<T, V, decltype(kind)::value>(p, i * V);
    if constexpr (V > 1) {
      if (i < elements - packs * V) activate_at<T, 1, decltype(kind)::value>(p, packs * V + i);
    }
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_activate_backward_kernel(const VLMOPS_GRID_CONSTANT Activate p) {
  constexpr bool kExact = sizeof(T) == 4;
  VLMOPS_SHARED(float, shared, kThreads* V);
  const Tile<V> tile(p.rows, p.width);
  Floats<V> hidden_sum = {}, gate_sum = {};
  with_activation(p.activation, [&](auto type) {
    constexpr Activation kind = decltype(type)::value;
    if (!tile.inside) return;
    for (int64_t row = tile.row; row < tile.last; row += kSumWarps) {
      const int64_t i = row * p.width + tile.column;
      const Floats<V> x = load<T, V>(p.hidden, i), g = load<T, V>(p.grad, i);
      Floats<V> out, of_hidden;
      if (p.gate == nullptr) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const Value y = activated<kind, kExact>(x.v[e]);
          out.v[e] = y.f;
          of_hidden.v[e] = g.v[e] * y.slope;
        }
      } else {
        const Floats<V> gate = load<T, V>(p.gate, i);
        Floats<V> of_gate;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const Value y = activated<kind, kExact>(gate.v[e]);
          out.v[e] = y.f * x.v[e];
          of_hidden.v[e] = g.v[e] * y.f;
          of_gate.v[e] = g.v[e] * x.v[e] * y.slope;
        }
        add(gate_sum, store<T, V>(p.grad_gate, i, of_gate));
      }
      add(hidden_sum, store<T, V>(p.grad_hidden, i, of_hidden));
      if (p.out != nullptr) store<T, V>(p.out, i, out);
    }
  });
  add_up(p.hidden_sums, hidden_sum, tile, p.width, shared);
  add_up(p.gate_sums, gate_sum, tile, p.width, shared);
}

// ---- Sums over rows ----

// Grid: 32 threads' columns times slices. With `slices` 1 the result, else partial sums.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_sum_rows_kernel(const T* x, int64_t rows, int64_t width, Out* out) {
  constexpr int V = 4 / static_cast<int>(sizeof(T));
  VLMOPS_SHARED(float, shared, kThreads* V);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + lane) * V;
  const int64_t first = blockIdx.y * kSliceRows;
  const int64_t last = gridDim.y == 1 || first + kSliceRows > rows ? rows : first + kSliceRows;
  const bool pairs = V == 1 || width % V == 0;
  float sum[V] = {};
  if (column < width) {
#pragma unroll 8
    for (int64_t row = first + warp; row < last; row += kSumWarps) {
      const T* const from = x + row * width + column;
      float one[V];
      if (pairs) {
        const auto pack = load_pack<V>(from);
#pragma unroll
        for (int e = 0; e < V; ++e) one[e] = to_float(pack.v[e]);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) one[e] = column + e < width ? to_float(from[e]) : 0.0f;
      }
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += one[e];
    }
  }
  add_warps<kSumWarps>(sum, shared, [&](int e, float total) {
    if (column + e < width) out[blockIdx.y * width + column + e] = from_float<Out>(total);
  });
}

// ---- Norms ----

VLMOPS_HOST_DEVICE inline NormVector vector_of(const Row& row) { return {row.data, row.dtype, 1}; }

// A block to a row, in packs. TW: of weight and bias.
template <class T, class TW>
__global__ void __launch_bounds__(kNormThreads, 2)
    mlp_projector_norm_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  constexpr int V = kPack<T>;
  using Held = HeldRow<T>;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const int packs = static_cast<int>(p.width) / V;
  const T* const x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  T* const out = static_cast<T*>(p.out) + blockIdx.x * p.width;
  Held held;
  const Affine<TW, V> affine(p.weight.data, p.bias.data, p.offset);
  Held::each(packs, [&](int j, int u) { load_floats(x + u * V, held.x[j]); });
  Statistics by[1];
  held.statistics(packs, p.layer, p.eps, 1.0f / static_cast<float>(p.width), add_up, by);
  affine.template each<T>(packs, [&](int j, int u, const float (&w)[V], const float (&b)[V]) {
#pragma unroll
    for (int e = 0; e < V; ++e)
      held.x[j][e] = (held.x[j][e] * by[0].scale + by[0].shift) * w[e] + b[e];
    store_words(out + u * V, narrow<T>(held.x[j]));
  });
}

template <class T, class TW>
__global__ void __launch_bounds__(kNormThreads, 1)
    mlp_projector_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  constexpr int V = kPack<T>;
  using Held = HeldRow<T>;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const int packs = static_cast<int>(p.width) / V;
  const T* const x = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  const T* const grad = static_cast<const T*>(p.grad) + blockIdx.x * p.width;
  Held held;
  float wg[Held::P][V];
  const Affine<TW, V> affine(p.weight.data, nullptr, p.offset);
  Held::each(packs, [&](int j, int u) { load_floats(x + u * V, held.x[j]); });
  Held::each(packs, [&](int j, int u) { load_floats(grad + u * V, wg[j]); });
  Held::each(packs, [&](int j, int u) {
    float w[V];
    affine.weights(u, w);
#pragma unroll
    for (int e = 0; e < V; ++e) wg[j][e] *= w[e];
  });
  Statistics by[1];
  held.pull_back(wg, packs, p.layer, p.eps, 1.0f / static_cast<float>(p.width), add_up, by);
  if (threadIdx.x == 0) keep(p.scales, blockIdx.x, by[0]);
  if (p.grad_x == nullptr) return;
  T* const to = static_cast<T*>(p.grad_x) + blockIdx.x * p.width;
  Held::each(packs, [&](int j, int u) { store_words(to + u * V, narrow<T>(held.x[j])); });
}

// Any width and strides: element by element, a block to a row, which is read again out of L1.
template <class T>
struct AnyRow {
  const Norm& p;
  const T* x;

  __device__ __forceinline__ explicit AnyRow(const Norm& p)
      : p(p), x(static_cast<const T*>(p.x) + blockIdx.x * p.x_stride) {}

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    for (int64_t i = threadIdx.x; i < p.width; i += kAnyThreads) f(i);
  }
  __device__ __forceinline__ float weight(int64_t i) const {
    return weight_at(vector_of(p.weight), p.offset, i);
  }
  __device__ __forceinline__ Statistics statistics(BlockSum& add_up) const {
    const auto load = [&](int64_t i) { return to_float(x[i]); };
    return statistics_of_each(p.width, load, p.layer, p.eps, add_up);
  }
  __device__ __forceinline__ float normed(int64_t i, const Statistics& by) const {
    return by.normed(to_float(x[i]));
  }
};

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    mlp_projector_norm_any_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const AnyRow<T> row(p);
  const Statistics by = row.statistics(add_up);
  T* const out = static_cast<T*>(p.out) + blockIdx.x * p.width;
  row.each([&](int64_t i) {
    const float bias = element(vector_of(p.bias), i, 0.0f);
    out[i] = from_float<T>(row.normed(i, by) * row.weight(i) + bias);
  });
}

template <class T>
__global__ void __launch_bounds__(kAnyThreads)
    mlp_projector_norm_backward_any_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const AnyRow<T> row(p);
  const Statistics by = row.statistics(add_up);
  if (threadIdx.x == 0) keep(p.scales, blockIdx.x, by);
  if (p.grad_x == nullptr) return;
  const T* const grad = static_cast<const T*>(p.grad) + blockIdx.x * p.width;
  T* const to = static_cast<T*>(p.grad_x) + blockIdx.x * p.width;
  float sums[2] = {};
  row.each([&](int64_t i) {
    const float wg = row.weight(i) * to_float(grad[i]);
    sums[0] += wg;
    sums[1] += wg * row.normed(i, by);
  });
  add_up(sums);
  const float per_element = 1.0f / static_cast<float>(p.width);
  const float mean = p.layer ? sums[0] * per_element : 0.0f, along = sums[1] * per_element;
  row.each([&](int64_t i) {
    const float wg = row.weight(i) * to_float(grad[i]);
    to[i] = from_float<T>((wg - mean - row.normed(i, by) * along) * by.scale);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_norm_sums_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(float, shared, kThreads* V);
  const Tile<V> tile(p.rows, p.width);
  Floats<V> weight_sum = {}, bias_sum = {};
#pragma unroll 4
  for (int64_t row = tile.inside ? tile.row : tile.last; row < tile.last; row += kSumWarps) {
    const Statistics by = kept(p.scales, row);
    Floats<V> y = load<T, V>(p.x, row * p.x_stride + tile.column);
    const Floats<V> g = load<T, V>(p.grad, row * p.width + tile.column);
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = by.normed(y.v[e]) * g.v[e];
    add(weight_sum, y);
    add(bias_sum, g);
  }
  add_up(p.weight_sums, weight_sum, tile, p.width, shared);
  add_up(p.bias_sums, bias_sum, tile, p.width, shared);
}

}  // namespace vlmops::mlp_projector
