// The gated residual on NVIDIA GPUs; gated_residual_cpu.h has the formulas.
//
// Bytes: x and y read, out written; 2,048 tokens of Mllama's 4,096 channels in bfloat16 are 50 MB,
// 12 us at the 4.3 TB/s that a copy reaches on an H200. Backward the same, of grad, y and grad_y,
// and sums of 8 bytes a channel for each part of 32 to 128 rows: 2 MB there. PREDICTED, never
// measured: 85 % of a copy from 512 tokens on, a launch (3 us) below.
//
// Threads: a lane has a pack of 16 bytes of the channels, whose tanh it computes once; the 8 warps
// of a block take rows in turns, and read some of them before they write the first. Forward the
// number of blocks follows the GPU's size; backward, where they sum, it does not. What is not
// aligned is read element by element into the same packs, so that no sum changes its order.
//
// Sums are of products that are exact, with what rounding loses carried along: the gradient of a
// single gate is one number, whose error no other hides. Float64 instead would cost consumer GPUs,
// which do 1 of it where they do 64 of float32, as long as the bytes do.
#pragma once

#include "common/gpu.cuh"
#include "common/norm.h"
#include "ops/gated_residual/gated_residual.h"

namespace vlmops::gated_residual {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kAhead = 4, kBackwardAhead = 2;  // rows of a warp

// Channels of a block.
template <class T>
constexpr int64_t kTile = kWarpSize * kPack<T>;

// The first n of a pack at p; kWide: all of them, side by side and aligned.
template <bool kWide, class T>
__device__ __forceinline__ Words<T, kPack<T>> read(const T* p, int64_t stride, int n) {
  constexpr int V = kPack<T>;
  if constexpr (kWide) {
    return load_words<V>(p);
  } else {
    Words<T, V> x = {};
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (e >= n) continue;
      if constexpr (sizeof(T) == 4) {
        x.w[e] = __float_as_uint(p[e * stride]);
      } else {
        x.w[e / 2] |= static_cast<uint32_t>(p[e * stride].bits) << (16 * (e % 2));
      }
    }
    return x;
  }
}

template <bool kWide, class T>
__device__ __forceinline__ void write(T* p, int n, const Words<T, kPack<T>>& x) {
  if constexpr (kWide) {
    store_words(p, x);
  } else {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) {
      if (e >= n) continue;
      if constexpr (sizeof(T) == 4) {
        p[e] = __uint_as_float(x.w[e]);
      } else {
        p[e] = {static_cast<uint16_t>(x.w[e / 2] >> (16 * (e % 2)))};
      }
    }
  }
}

template <class G, int V>
__device__ __forceinline__ void load_gate(const Gate& gate, int64_t column, int n, float (&g)[V]) {
  const G* const from = static_cast<const G*>(gate.data);
  if (gate.per_channel) {
#pragma unroll
    for (int e = 0; e < V; ++e) g[e] = e < n ? to_float(from[(column + e) * gate.stride]) : 0.0f;
#pragma unroll
    for (int e = 0; e < V; ++e) g[e] = tanhf(g[e]);
  } else {
    const float one = tanhf(to_float(from[0]));
#pragma unroll
    for (int e = 0; e < V; ++e) g[e] = one;
  }
}

// tanh of the gates of n channels from `column` on.
template <int V>
__device__ __forceinline__ void tanh_of(const Gate& gate, int64_t column, int n, float (&t)[V]) {
  switch (gate.dtype) {
    case DType::kFloat32:
      return load_gate<float>(gate, column, n, t);
    case DType::kBFloat16:
      return load_gate<bfloat16>(gate, column, n, t);
    case DType::kFloat16:
      return load_gate<float16>(gate, column, n, t);
  }
}

// A thread's channels: n of them, from `column` on; and which of the blocks that share them this
// is.
template <class T>
struct Tile {
  int64_t column, number;
  int n;
  int lane, warp;
  __device__ __forceinline__ explicit Tile(int64_t channels) {
    const int64_t tiles = (channels + kTile<T> - 1) / kTile<T>;
    lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    number = blockIdx.x / tiles;
    column = (blockIdx.x - number * tiles) * kTile<T> + lane * kPack<T>;
    const int64_t left = channels - column;
    n = left < kPack<T> ? static_cast<int>(left) : kPack<T>;
  }
};

// Grid: blocks of channels times `blocks` that take rows in turns.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    gated_residual_kernel(const VLMOPS_GRID_CONSTANT Params p, int64_t blocks) {
  constexpr int V = kPack<T>;
  const Tile<T> tile(p.channels);
  if (tile.n <= 0) return;
  const int64_t step = blocks * kWarps;
  const T* const x = static_cast<const T*>(p.x) + tile.column * p.x_stride.channel;
  const T* const y = static_cast<const T*>(p.y) + tile.column * p.y_stride.channel;
  T* const out = static_cast<T*>(p.out) + tile.column;
  float t[V];
  tanh_of(p.gate, tile.column, tile.n, t);
  for (int64_t first = tile.number * kWarps + tile.warp; first < p.rows; first += kAhead * step) {
    Words<T, V> of_x[kAhead], of_y[kAhead];
    bool added[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * step;
      added[k] = row < p.rows && is_added(p, row);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * step;
      if (row < p.rows)
        of_x[k] = read<kWide>(x + row_at(p, p.x_stride, row), p.x_stride.channel, tile.n);
      if (added[k])
        of_y[k] = read<kWide>(y + row_at(p, p.y_stride, row), p.y_stride.channel, tile.n);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = first + k * step;
      if (added[k]) {
        float sum[V], gated[V];
        widen(of_x[k], sum);
        widen(of_y[k], gated);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] = fmaf(t[e], gated[e], sum[e]);
        of_x[k] = narrow<T>(sum);
      }
      if (row < p.rows) write<kWide>(out + row * p.channels, tile.n, of_x[k]);
    }
  }
}

// A sum of floats, and what rounding has taken from it.
struct Sum {
  float sum, lost;

  __device__ __forceinline__ void add(float x) {
    const float next = __fadd_rn(sum, x), of_x = __fsub_rn(next, sum);
    lost += __fsub_rn(sum, __fsub_rn(next, of_x)) + __fsub_rn(x, of_x);
    sum = next;
  }
  // T: what x and y come from. The product of two 16-bit numbers is exact.
  template <class T>
  __device__ __forceinline__ void add_product(float x, float y) {
    const float product = __fmul_rn(x, y);
    add(product);
    if constexpr (sizeof(T) == 4) lost += fmaf(x, y, -product);
  }
  __device__ __forceinline__ double value() const {
    return static_cast<double>(sum) + static_cast<double>(lost);
  }
};

__device__ __forceinline__ double warp_sum(double x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

// Grid: blocks of channels times parts of the rows.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)  // 3 blocks spill on sm_100 and sm_120
    gated_residual_backward_kernel(const VLMOPS_GRID_CONSTANT Params p, double* partial) {
  constexpr int V = kPack<T>;
  VLMOPS_SHARED(double, shared, kThreads* V);
  const Tile<T> tile(p.channels);
  const int64_t part_rows = gpu_part_rows(p.rows, p.channels);
  const int64_t end = (tile.number + 1) * part_rows, last = end < p.rows ? end : p.rows;
  const T* const grad = static_cast<const T*>(p.x) + tile.column * p.x_stride.channel;
  const T* const y = static_cast<const T*>(p.y) + tile.column * p.y_stride.channel;
  T* const out = p.out == nullptr ? nullptr : static_cast<T*>(p.out) + tile.column;
  Sum sums[V] = {};
  float t[V];
  if (tile.n > 0) tanh_of(p.gate, tile.column, tile.n, t);
  int64_t first = tile.n > 0 ? tile.number * part_rows + tile.warp : last;
  for (; first < last; first += kBackwardAhead * kWarps) {
    Words<T, V> of_grad[kBackwardAhead], of_y[kBackwardAhead];
    bool added[kBackwardAhead];
#pragma unroll
    for (int k = 0; k < kBackwardAhead; ++k) {
      const int64_t row = first + k * kWarps;
      added[k] = row < last && is_added(p, row);
    }
#pragma unroll
    for (int k = 0; k < kBackwardAhead; ++k) {
      const int64_t row = first + k * kWarps;
      of_grad[k] = {};
      of_y[k] = {};
      if (!added[k]) continue;
      of_grad[k] = read<kWide>(grad + row_at(p, p.x_stride, row), p.x_stride.channel, tile.n);
      if (partial != nullptr)
        of_y[k] = read<kWide>(y + row_at(p, p.y_stride, row), p.y_stride.channel, tile.n);
    }
#pragma unroll
    for (int k = 0; k < kBackwardAhead; ++k) {
      const int64_t row = first + k * kWarps;
      if (row >= last) continue;
      float g[V], gated[V];
      widen(of_grad[k], g);
      if (partial != nullptr) {
        widen(of_y[k], gated);
#pragma unroll
        for (int e = 0; e < V; ++e) sums[e].template add_product<T>(g[e], gated[e]);
      }
      if (out == nullptr) continue;
#pragma unroll
      for (int e = 0; e < V; ++e) g[e] = added[k] ? g[e] * t[e] : 0.0f;
      write<kWide>(out + row * p.channels, tile.n, narrow<T>(g));
    }
  }
  if (partial == nullptr) return;  // of all threads
#pragma unroll
  for (int e = 0; e < V; ++e) shared[(tile.warp * V + e) * kWarpSize + tile.lane] = sums[e].value();
  __syncthreads();
  if (p.gate.per_channel) {
    for (int e = tile.warp; e < tile.n; e += kWarps) {
      double sum = 0.0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[(w * V + e) * kWarpSize + tile.lane];
      partial[tile.number * p.channels + tile.column + e] = sum;
    }
  } else if (tile.warp == 0) {
    double sum = 0.0;
    for (int i = 0; i < kWarps * V; ++i) sum += shared[i * kWarpSize + tile.lane];
    sum = warp_sum(sum);
    if (tile.lane == 0) partial[blockIdx.x] = sum;
  }
}

__device__ __forceinline__ double gate_at(const Gate& gate, int64_t i) {
  switch (gate.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(gate.data)[i * gate.stride];
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(gate.data)[i * gate.stride]);
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(gate.data)[i * gate.stride]);
  }
  return 0.0;
}

// The sums of partial [parts, columns] times 1 - tanh(gate)^2. A block has a warp's width of
// columns, or the only one.
__global__ void __launch_bounds__(kThreads)
    gated_residual_gate_grad_kernel(const VLMOPS_GRID_CONSTANT GateGrad p) {
  VLMOPS_SHARED(double, shared, kThreads);
  const int width = p.columns == 1 ? 1 : kWarpSize;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * width + thread % width;
  double sum = 0.0;
  if (column < p.columns) {
#pragma unroll 4
    for (int64_t part = thread / width; part < p.parts; part += kThreads / width)
      sum += p.partial[part * p.columns + column];
  }
  shared[thread] = sum;
  __syncthreads();
  for (int n = kThreads / 2; n >= width; n /= 2) {
    if (thread < n) shared[thread] += shared[thread + n];
    __syncthreads();
  }
  if (thread >= width || column >= p.columns) return;
  // Without the cancellation of 1 - tanh^2.
  const double e = exp(-2.0 * fabs(gate_at(p.gate, column)));
  const auto grad = static_cast<float>(shared[thread] * (4.0 * e / ((1.0 + e) * (1.0 + e))));
  switch (p.gate.dtype) {
    case DType::kFloat32:
      static_cast<float*>(p.out)[column] = grad;
      break;
    case DType::kBFloat16:
      static_cast<bfloat16*>(p.out)[column] = from_float<bfloat16>(grad);
      break;
    case DType::kFloat16:
      static_cast<float16*>(p.out)[column] = from_float<float16>(grad);
      break;
  }
}

}  // namespace vlmops::gated_residual
