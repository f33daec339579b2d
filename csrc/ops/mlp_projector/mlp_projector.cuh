// What surrounds a projector's products on NVIDIA GPUs: norm, activation, and their backward.
//
//   norm                z = (x - mean) * factor * (offset + weight) + bias, of each row
//   activate            a = activation(h), or activation(gate) * h
//   activate_backward   grad_h = grad * activation'(h) and so on; a again; sums of both over rows
//   norm_backward       grad_x, and sums over rows for weight and bias
//
// The products are cuBLAS's, which adds biases before it rounds. Its own epilogue for activations
// knows tanh's gelu alone (steps.forward uses that); for the others a layer is read and written
// once more. Microseconds in bfloat16 at the 4.3 TB/s that a copy reaches on an H200, products at
// 790 TFLOP/s beside them. PREDICTED: none of these kernels has run on a GPU.
//
//                                     norm   activate   products   activate_backward norm_backward
//   LLaVA      2,880 x 1,024 -> 4,096             11        153                  22
//   InternVL   3,328 x 4,096 ->   896   13         3         38                   6       19, sums
//   32 Qwen2-VL   1,225 x 5,120 -> 5,120              6        138                  12 Idefics2
//   4,900 x 1,152 -> 14,336 (gated)    98        612                 196
//
// (backward: one layer kept, read with its gradient; one gradient and the layer after written.)
// gelu takes some 35 instructions an element, e^x and 1/x by the special unit: 14 us for LLaVA's
// 11.8 M elements at 132 multiprocessors, so that it, not memory, may be what bounds activate.
//
// Threads: elementwise, one pack of 16 bytes each. Norms: 128 threads to a row, which is read again
// out of L1 for variance and result. Sums: 8 warps to 32 rows (a part) of 32 packs of columns, 4
// rows to a warp in registers, warps added up in shared memory; the parts are added by torch. No
// atomics: the same bits in every run. Reading x and its gradient a second time for the norm's sums
// keeps them out of the kernel that owns rows, which would need shared memory of 8 bytes a channel.
#pragma once

#include "common/gpu.cuh"
#include "ops/mlp_projector/mlp_projector.h"

namespace vlmops::mlp_projector {

constexpr int kThreads = 256;     // of elementwise kernels and of sums
constexpr int kRowThreads = 128;  // of a norm
constexpr int kSumWarps = kThreads / kWarpSize;

template <int V>
struct Floats {
  float v[V];
};

// f(x) and f'(x).
struct Value {
  float f, slope;
};

// x sigmoid(u), where du/dx = slope
__device__ __forceinline__ Value swish(float x, float u, float slope) {
  const float e = __expf(-(u < -88.0f ? -88.0f : u));  // finite
  const float s = __fdividef(1.0f, 1.0f + e), f = x * s;
  return {f, s + f * (e * s) * slope};  // 1 - s = e s, without its cancellation
}

__device__ __forceinline__ Value gelu(float x) {
  const float e = __expf(-0.5f * x * x);
  // erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.4 z); q fits to 2e-8. __fdividef is 0 beyond 2^126.
  const float t = __fdividef(1.0f, 1.0f + 0.282842712f * fabsf(x));
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

__device__ __forceinline__ Value activated(Activation kind, float x) {
  switch (kind) {
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return swish(x, x * (1.59576912f + 0.0713548163f * x * x),
                   1.59576912f + 0.214064449f * x * x);
    case Activation::kQuickGelu:
      return swish(x, 1.702f * x, 1.702f);
    case Activation::kSilu:
      return swish(x, x, 1.0f);
    case Activation::kRelu:
      return x <= 0.0f ? Value{0.0f, 0.0f} : Value{x, 1.0f};  // NaN stays
    case Activation::kNone:
      break;
  }
  return {x, 1.0f};
}

// V elements at an offset, by one access.
template <class T, int V>
__device__ __forceinline__ Floats<V> load(const void* p, int64_t offset) {
  const T* const from = static_cast<const T*>(p) + offset;
  Floats<V> x;
  if constexpr (V == 1) {
    x.v[0] = to_float(*from);
  } else {
    widen<T, V>(load_words<V>(from), x.v);
  }
  return x;
}

// Returns what was stored, rounded.
template <class T, int V>
__device__ __forceinline__ Floats<V> store(void* p, int64_t offset, const Floats<V>& x) {
  T* const to = static_cast<T*>(p) + offset;
  Floats<V> rounded;
  if constexpr (V == 1) {
    const T rounded_to = from_float<T>(x.v[0]);
    *to = rounded_to;
    rounded.v[0] = to_float(rounded_to);
  } else {
    const Words<T, V> words = narrow<T, V>(x.v);
    store_words<T, V>(to, words);
    widen<T, V>(words, rounded.v);
  }
  return rounded;
}

template <class T, int V>
__device__ __forceinline__ void activate_at(const Activate& p, int64_t i) {
  const Floats<V> x = load<T, V>(p.hidden, i);
  Floats<V> y;
  if (p.gate == nullptr) {
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = activated(p.activation, x.v[e]).f;
  } else {
    const Floats<V> gate = load<T, V>(p.gate, i);
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = activated(p.activation, gate.v[e]).f * x.v[e];
  }
  store<T, V>(p.out, i, y);
}

// A pack to a thread, and what is left of them to the first block.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_activate_kernel(const VLMOPS_GRID_CONSTANT Activate p) {
  const int64_t elements = p.rows * p.width, packs = elements / V;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < packs) activate_at<T, V>(p, i * V);
  if constexpr (V > 1) {
    if (i < elements - packs * V) activate_at<T, 1>(p, packs * V + i);
  }
}

// Where a thread of the kernels that sum is: V columns, rows of a part that are kSumWarps apart.
template <int V>
struct Tile {
  int64_t column, part, row, last;
  bool inside;
  __device__ __forceinline__ Tile(int64_t rows, int64_t width) {
    const int64_t columns = (width + kWarpSize * V - 1) / (kWarpSize * V);
    column = (blockIdx.x % columns * kWarpSize + threadIdx.x % kWarpSize) * V;
    part = blockIdx.x / columns;
    row = part * kPartRows + threadIdx.x / kWarpSize;
    last = (part + 1) * kPartRows < rows ? (part + 1) * kPartRows : rows;
    inside = column < width;
  }
};

// sums[part, columns] from those of the block's warps; all threads come here.
template <int V>
__device__ __forceinline__ void add_up(float* sums, const Floats<V>& own, const Tile<V>& tile,
                                       int64_t width, float* shared) {
  if (sums == nullptr) return;  // of all threads
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int e = 0; e < V; ++e) shared[(warp * V + e) * kWarpSize + lane] = own.v[e];
  __syncthreads();
  if (warp == 0 && tile.inside) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      float sum = 0.0f;
      for (int w = 0; w < kSumWarps; ++w) sum += shared[(w * V + e) * kWarpSize + lane];
      sums[tile.part * width + tile.column + e] = sum;
    }
  }
  __syncthreads();
}

template <int V>
__device__ __forceinline__ void add(Floats<V>& sum, const Floats<V>& x) {
#pragma unroll
  for (int e = 0; e < V; ++e) sum.v[e] += x.v[e];
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_activate_backward_kernel(const VLMOPS_GRID_CONSTANT Activate p) {
  VLMOPS_SHARED(float, shared, kThreads* V);
  const Tile<V> tile(p.rows, p.width);
  Floats<V> hidden_sum = {}, gate_sum = {};
  for (int64_t row = tile.row; tile.inside && row < tile.last; row += kSumWarps) {
    const int64_t i = row * p.width + tile.column;
    const Floats<V> x = load<T, V>(p.hidden, i), g = load<T, V>(p.grad, i);
    Floats<V> out, of_hidden;
    if (p.gate == nullptr) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const Value y = activated(p.activation, x.v[e]);
        out.v[e] = y.f;
        of_hidden.v[e] = g.v[e] * y.slope;
      }
    } else {
      const Floats<V> gate = load<T, V>(p.gate, i);
      Floats<V> of_gate;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const Value y = activated(p.activation, gate.v[e]);
        out.v[e] = y.f * x.v[e];
        of_hidden.v[e] = g.v[e] * y.f;
        of_gate.v[e] = g.v[e] * x.v[e] * y.slope;
      }
      add(gate_sum, store<T, V>(p.grad_gate, i, of_gate));
    }
    add(hidden_sum, store<T, V>(p.grad_hidden, i, of_hidden));
    if (p.out != nullptr) store<T, V>(p.out, i, out);
  }
  add_up(p.hidden_sums, hidden_sum, tile, p.width, shared);
  add_up(p.gate_sums, gate_sum, tile, p.width, shared);
}

// ---- Norms ----

struct Pair {
  float a, b;
};

// Sums over a row's threads, for all of them.
__device__ __forceinline__ Pair row_sums(Pair x, Pair* shared) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x.a += __shfl_xor_sync(kFullWarp, x.a, distance);
    x.b += __shfl_xor_sync(kFullWarp, x.b, distance);
  }
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  Pair sum = {};
  for (int w = 0; w < kRowThreads / kWarpSize; ++w) {
    sum.a += shared[w].a;
    sum.b += shared[w].b;
  }
  __syncthreads();
  return sum;
}

// (x - mean) * factor + shift is x normed.
struct Scale {
  float mean, factor, shift;
};

// What the mean lacks is found in the variance's pass, which has the row in L1, and shifted: added
// to the mean it would be rounded away again where a row is far from 0.
template <class T, int V>
__device__ __forceinline__ Scale statistics(const Norm& p, int64_t start, Pair* shared) {
  const auto moments = [&](float mean) {  // of x - mean and of its square
    Pair sum = {};
    for (int64_t i = threadIdx.x * V; i < p.width; i += kRowThreads * V) {
      const Floats<V> x = load<T, V>(p.x, start + i);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float off = x.v[e] - mean;
        sum.a += off;
        sum.b += off * off;
      }
    }
    sum = row_sums(sum, shared);
    const auto width = static_cast<float>(p.width);
    return Pair{sum.a / width, sum.b / width};
  };
  const float mean = p.layer ? moments(0.0f).a : 0.0f;
  const Pair off = moments(mean);
  if (!p.layer) return {0.0f, 1.0f / sqrtf(off.b + p.eps), 0.0f};
  const float factor = 1.0f / sqrtf(off.b - off.a * off.a + p.eps);
  return {mean, factor, -off.a * factor};
}

template <class T, int V>
__device__ __forceinline__ Floats<V> load_as(const void* p, int64_t offset) {
  constexpr int kAtOnce = V * sizeof(T) > 16 ? kPack<T> : V;
  Floats<V> x;
#pragma unroll
  for (int first = 0; first < V; first += kAtOnce) {
    const Floats<kAtOnce> part = load<T, kAtOnce>(p, offset + first);
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) x.v[first + e] = part.v[e];
  }
  return x;
}

// Numbers of a vector of any dtype, or `missing`.
template <int V>
__device__ __forceinline__ Floats<V> load_row(const Row& row, int64_t i, float missing) {
  Floats<V> x;
  if (row.data == nullptr) {
#pragma unroll
    for (int e = 0; e < V; ++e) x.v[e] = missing;
    return x;
  }
  switch (row.dtype) {
    case DType::kFloat32:
      return load_as<float, V>(row.data, i);
    case DType::kBFloat16:
      return load_as<bfloat16, V>(row.data, i);
    case DType::kFloat16:
      return load_as<float16, V>(row.data, i);
  }
  return x;
}

template <int V>
__device__ __forceinline__ Floats<V> norm_weight(const Norm& p, int64_t i) {
  Floats<V> weight = load_row<V>(p.weight, i, 1.0f - p.offset);
#pragma unroll
  for (int e = 0; e < V; ++e)
    weight.v[e] = p.weight.data == nullptr ? 1.0f : weight.v[e] + p.offset;
  return weight;
}

// A block to a row.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    mlp_projector_norm_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(Pair, shared, kRowThreads / kWarpSize);
  const int64_t row = blockIdx.x, start = row * p.x_stride;
  const Scale scale = statistics<T, V>(p, start, shared);
  for (int64_t i = threadIdx.x * V; i < p.width; i += kRowThreads * V) {
    Floats<V> x = load<T, V>(p.x, start + i);
    const Floats<V> weight = norm_weight<V>(p, i), bias = load_row<V>(p.bias, i, 0.0f);
#pragma unroll
    for (int e = 0; e < V; ++e)
      x.v[e] = ((x.v[e] - scale.mean) * scale.factor + scale.shift) * weight.v[e] + bias.v[e];
    store<T, V>(p.out, row * p.width + i, x);
  }
}

// With y the normalised row and g its gradient times the weight:
// grad_x = (g - mean(g) - y mean(g y)) * factor, for "rms" without mean(g).
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    mlp_projector_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(Pair, shared, kRowThreads / kWarpSize);
  const int64_t row = blockIdx.x, start = row * p.x_stride;
  const Scale scale = statistics<T, V>(p, start, shared);
  if (threadIdx.x == 0) {
    p.scales[kScales * row] = scale.mean;
    p.scales[kScales * row + 1] = scale.factor;
    p.scales[kScales * row + 2] = scale.shift;
  }
  if (p.grad_x == nullptr) return;
  // f(columns, y, g) for this thread's part of the row
  const auto each = [&](auto f) {
    for (int64_t i = threadIdx.x * V; i < p.width; i += kRowThreads * V) {
      Floats<V> y = load<T, V>(p.x, start + i), g = load<T, V>(p.grad, row * p.width + i);
      const Floats<V> weight = norm_weight<V>(p, i);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        y.v[e] = (y.v[e] - scale.mean) * scale.factor + scale.shift;
        g.v[e] *= weight.v[e];
      }
      f(i, y, g);
    }
  };
  Pair sum = {};
  each([&](int64_t, const Floats<V>& y, const Floats<V>& g) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sum.a += g.v[e];
      sum.b += g.v[e] * y.v[e];
    }
  });
  sum = row_sums(sum, shared);
  const auto width = static_cast<float>(p.width);
  const float mean = p.layer ? sum.a / width : 0.0f, slope = sum.b / width;
  each([&](int64_t i, const Floats<V>& y, Floats<V>& g) {
#pragma unroll
    for (int e = 0; e < V; ++e) g.v[e] = (g.v[e] - mean - y.v[e] * slope) * scale.factor;
    store<T, V>(p.grad_x, row * p.width + i, g);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    mlp_projector_norm_sums_kernel(const VLMOPS_GRID_CONSTANT Norm p) {
  VLMOPS_SHARED(float, shared, kThreads* V);
  const Tile<V> tile(p.rows, p.width);
  Floats<V> weight_sum = {}, bias_sum = {};
  for (int64_t row = tile.row; tile.inside && row < tile.last; row += kSumWarps) {
    const float* const scale = p.scales + kScales * row;
    const float mean = scale[0], factor = scale[1], shift = scale[2];
    Floats<V> y = load<T, V>(p.x, row * p.x_stride + tile.column);
    const Floats<V> g = load<T, V>(p.grad, row * p.width + tile.column);
#pragma unroll
    for (int e = 0; e < V; ++e) y.v[e] = ((y.v[e] - mean) * factor + shift) * g.v[e];
    add(weight_sum, y);
    add(bias_sum, g);
  }
  add_up(p.weight_sums, weight_sum, tile, p.width, shared);
  add_up(p.bias_sums, bias_sum, tile, p.width, shared);
}

}  // namespace vlmops::mlp_projector
