// What joins two softmaxes over different keys on NVIDIA GPUs; perceiver_attention_cpu.h has the
// formula.
//
// Bytes: both results read, one written; 8 samples of 64 latents of 16 x 96 channels in bfloat16
// are 4.7 MB, less than a launch (3 us) at an H200's 4.3 TB/s. PREDICTED, never measured.
//
// Threads: each has a pack of 16 bytes of one head's channels, and computes the two shares for
// itself: D / 8 threads do the same, which costs less than telling each other.
#pragma once

#include "common/gpu.cuh"
#include "ops/perceiver_attention/perceiver_attention.h"

namespace vlmops::perceiver_attention {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    perceiver_attention_join_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  constexpr int V = kPack<T>;
  const int64_t packs = p.dim / V, thread = thread_of_grid();
  if (thread >= p.rows * p.heads * packs) return;
  const int64_t row_and_head = thread / packs;
  const int64_t row = row_and_head / p.heads, head = row_and_head % p.heads;
  const int64_t at = head * p.rows + row;
  const Shares s = shares_of(p, at);
  if (thread % packs == 0) {
    p.statistics[at] = s.most;
    p.statistics[p.heads * p.rows + at] = s.part;
  }
  T* const out = static_cast<T*>(p.out) + thread * V;
  Pack<T, V> x = load_pack<V>(out);
  const Pack<T, V> y = load_pack<V>(static_cast<const T*>(p.other) + thread * V);
#pragma unroll
  for (int e = 0; e < V; ++e)
    x[e] = from_float<T>(to_float(x[e]) * s.first + to_float(y[e]) * s.other);
  store_pack(out, x);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    perceiver_attention_add_kernel(const VLMOPS_GRID_CONSTANT Sum s) {
  constexpr int V = kPack<T>;
  const int64_t at = thread_of_grid() * V;
  if (at >= s.count) return;
  Pack<T, V> sum;
#pragma unroll
  for (int e = 0; e < V; e += 4) {
    const Pack<float, 4> x = load_pack<4>(s.first + at + e), y = load_pack<4>(s.other + at + e);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[e + i] = from_float<T>(x[i] + y[i]);
  }
  store_pack(static_cast<T*>(s.to) + at, sum);
}

}  // namespace vlmops::perceiver_attention
