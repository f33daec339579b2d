// Sums over the rows of matrices on NVIDIA GPUs: parts of the rows first, then the parts. No
// atomics: the same bits in every run.
#pragma once

#include "common/gpu.cuh"
#include "common/norm.cuh"

namespace vlmops {

constexpr int kSumThreads = 256;
constexpr int kSumWarps = kSumThreads / kWarpSize;

template <int V>
struct Floats {
  float v[V];
};

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

// Where a thread of the kernels that sum is: V columns, rows of a part that are kSumWarps apart.
template <int V>
struct Tile {
  int64_t column, part, row, last;
  bool inside;
  __device__ __forceinline__ Tile(int64_t rows, int64_t width) {
    const int64_t columns = (width + kWarpSize * V - 1) / (kWarpSize * V);
    column = (blockIdx.x % columns * kWarpSize + threadIdx.x % kWarpSize) * V;
    part = blockIdx.x / columns;
    const int64_t part_rows = gpu_part_rows(rows, width);
    row = part * part_rows + threadIdx.x / kWarpSize;
    last = (part + 1) * part_rows < rows ? (part + 1) * part_rows : rows;
    inside = column < width;
  }
};

// sums[part, columns] from those of the block's warps; all threads come here.
template <int V>
__device__ __forceinline__ void add_up(float* sums, const Floats<V>& own, const Tile<V>& tile,
                                       int64_t width, float* shared) {
  if (sums == nullptr) return;  // of all threads
  float* const to = sums + tile.part * width + tile.column;
  add_warps<kSumWarps>(own.v, shared, [&](int e, float sum) {
    if (tile.inside) to[e] = sum;
  });
  __syncthreads();  // shared is used again
}

template <int V>
__device__ __forceinline__ void add(Floats<V>& sum, const Floats<V>& x) {
#pragma unroll
  for (int e = 0; e < V; ++e) sum.v[e] += x.v[e];
}

constexpr int kSlices = 8;  // of partial sums

// f(column, sum) for the sums of `parts` rows, `stride` apart, of n columns from partial on; by the
// threads of blocks (32, kSlices) in a grid over columns. shared: kSlices * 32.
template <class F>
__device__ __forceinline__ void add_parts(const float* partial, int64_t parts, int64_t stride,
                                          int64_t n, double* shared, const F& f) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool mine = column < n;
  double sum = 0.0;
  if (mine) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += kSlices)
      sum += partial[part * stride + column];
  }
  shared[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !mine) return;
  for (int i = 1; i < kSlices; ++i) sum += shared[i * kWarpSize + threadIdx.x];
  f(column, static_cast<float>(sum));
}

}  // namespace vlmops
