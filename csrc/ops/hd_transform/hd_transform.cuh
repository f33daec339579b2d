// The HD transform on NVIDIA GPUs: rows of C elements that move, one warp to a row.
//
// Forward a row is one feature of a block's f * f, or a part of `newline` or `separator`, and goes
// to its part of a token; backward it is one feature, and comes from there, or is zero. Where
// blocks are averaged a row is a token, read from f * f features; backward a feature, scaled.
//
// Bytes: forward K * sizeof(T) read and written per token, K = f * f * C; backward the same, and
// zeros for features that no token has (class tokens, padding). Phi-3.5-vision's 4 x 4 crops and
// the whole picture, 2,509 tokens of 4,096 channels in bfloat16: 20.6 MB each way, 9.6 us at
// the 4.3 TB/s that a copy reaches on an H200. Measured there (bench/results/h200), microseconds:
//                                  copy  forward  eager  backward  eager
//   Phi-3.5-vision, 4 x 4          11.3     12.4    150      19.6    175
//   16 pictures                    34.7     35.9    568      69.6   1839
//   Phi-4, 4 x 4                   18.3     15.2    188      26.0    562
//   XComposer2-4KHD                33.0     34.6    451      42.9    559
//
// A row of 1,024 bfloat16 is 2 KiB: 4 accesses of 16 bytes a lane, all read before the first is
// written. Which image, crop and block a row belongs to is found once a warp, from the sizes of at
// most 32 images that travel with the launch: no table has to be copied to the GPU.
//
// Gradients of the learned rows are sums over the ends of rows: 8 slices of rows a block, in
// float64, added up in one order.
#pragma once

#include "common/gpu.cuh"
#include "ops/hd_transform/hd_transform.h"

namespace vlmops::hd_transform {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlocks = 4;  // on one multiprocessor; if not told, ptxas spills to have more
constexpr int kAtOnce = 4;  // accesses of a lane before it waits
constexpr int kSlices = 8;

// f(first element) for this lane's packs of V of n elements.
template <int V, class F>
__device__ __forceinline__ void each_pack(int64_t n, const F& f) {
  for (int64_t i = threadIdx.x % kWarpSize * V; i < n; i += kWarpSize * V) f(i);
}

// n elements; `stride` is 1 where V is not.
template <int V, class T>
__device__ __forceinline__ void copy_row(const T* from, int64_t stride, T* to, int64_t n) {
  constexpr int64_t step = kWarpSize * V;
  for (int64_t i = threadIdx.x % kWarpSize * V; i < n; i += kAtOnce * step) {
    Pack<T, V> x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t at = i + k * step;
      if (at < n) x[k] = load_pack<V>(from + (V == 1 ? at * stride : at));
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t at = i + k * step;
      if (at < n) store_pack(to + at, x[k]);
    }
  }
}

template <int V, class T>
__device__ __forceinline__ void clear_row(T* to, int64_t n) {
  Pack<T, V> zero;
#pragma unroll
  for (int k = 0; k < V; ++k) zero[k] = T{};
  each_pack<V>(n, [&](int64_t i) { store_pack(to + i, zero); });
}

// The row of this warp.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
}

// The first feature of a block, in elements; those of its row `dy` are pixel_stride apart.
__device__ __forceinline__ int64_t feature_of(const Params& p, const Image& image, const Source& s,
                                              int dy, int dx) {
  const int64_t row = p.prefix + (static_cast<int64_t>(s.y) * p.factor + dy) * (p.side * p.factor) +
                      s.x * p.factor + dx;
  return image.offset + s.crop * p.crop_stride + row * p.pixel_stride;
}

template <class T, int V>
__device__ __forceinline__ void average(const Params& p, const Image& image, const Source& s,
                                        T* to) {
  const T* const block = static_cast<const T*>(p.src) + feature_of(p, image, s, 0, 0);
  const int64_t line = static_cast<int64_t>(p.side) * p.factor * p.pixel_stride;
  each_pack<V>(p.channels, [&](int64_t i) {
    float sum[V] = {};
    for (int dy = 0; dy < p.factor; ++dy) {
#pragma unroll 2  // four spill on sm_120
      for (int dx = 0; dx < p.factor; ++dx) {
        const Pack<T, V> x =
            load_pack<V>(block + dy * line + dx * p.pixel_stride + i * p.channel_stride);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += to_float(x[k]);
      }
    }
    Pack<T, V> mean;
#pragma unroll
    for (int k = 0; k < V; ++k) mean[k] = from_float<T>(sum[k] * p.scale);
    store_pack(to + i, mean);
  });
}

// T: an integer of the elements' size unless kMean.
template <class T, int V, bool kMean>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hd_transform_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  const int64_t row = row_of_warp();
  // 32 bits: the launcher sees to it.
  const auto parts = kMean ? 1u : static_cast<uint32_t>(p.block());
  const int64_t token = static_cast<uint32_t>(row) / parts;
  if (token >= p.tokens) return;
  const int part = static_cast<int>(row - token * parts);
  const Image& image = p.images[image_of(p, &Image::token, token)];
  const Source s = source_of(p, image, token - image.token);
  T* const to = static_cast<T*>(p.dst) + row * p.channels;
  if (s.kind != Kind::kBlock) {
    const void* const learned = s.kind == Kind::kNewline ? p.newline : p.separator;
    copy_row<V>(static_cast<const T*>(learned) + part * p.channels, 1, to, p.channels);
  } else if constexpr (kMean) {
    average<T, V>(p, image, s, to);
  } else {
    const int64_t from = feature_of(p, image, s, part / p.factor, part % p.factor);
    copy_row<V>(static_cast<const T*>(p.src) + from, p.channel_stride, to, p.channels);
  }
}

template <class T, int V, bool kMean>
__global__ void __launch_bounds__(kThreads, kBlocks)
    hd_transform_backward_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  const int64_t row = row_of_warp();
  if (row >= p.pixels) return;
  const Image& image = p.images[image_of(p, &Image::pixel, row)];
  const Target target = target_of(p, image, row);
  T* const to = static_cast<T*>(p.dst) + row * p.channels;
  if (target.token < 0) return clear_row<V>(to, p.channels);
  const int64_t stride = p.token_channel_stride;
  const T* const from = static_cast<const T*>(p.src) + target.token * p.token_stride +
                        target.part * p.channels * stride;
  if constexpr (kMean) {
    each_pack<V>(p.channels, [&](int64_t i) {
      Pack<T, V> x = load_pack<V>(from + i * stride);
#pragma unroll
      for (int k = 0; k < V; ++k) x[k] = from_float<T>(to_float(x[k]) * p.scale);
      store_pack(to + i, x);
    });
  } else {
    copy_row<V>(from, stride, to, p.channels);
  }
}

// Adds to sums [2, K]. Grid (K / 32, 2): newline's columns, separator's; block (32, kSlices).
template <class T>
__global__ void __launch_bounds__(kWarpSize* kSlices)
    hd_transform_sums_kernel(const VLMOPS_GRID_CONSTANT Params p, float* sums) {
  VLMOPS_SHARED(double, slices, kSlices* kWarpSize);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool mine = column < p.depth();
  const T* const grad = static_cast<const T*>(p.src) + column * p.token_channel_stride;
  double sum = 0.0;
  const auto add = [&](int64_t row) {
    sum += static_cast<double>(to_float(grad[row * p.token_stride]));
  };
  for (int i = 0; mine && i < p.image_count; ++i) {
    const Image& image = p.images[i];
    const int64_t whole = whole_tokens(p), parts = part_tokens(image);
    if (blockIdx.y == 1) {
      if (threadIdx.y == i % kSlices) add(image.token + (p.sub_first ? parts : whole));
      continue;
    }
    const int64_t part_at = image.token + (p.sub_first ? 0 : whole + 1);
    const int64_t whole_at = image.token + (p.sub_first ? parts + 1 : 0);
    for (int y = threadIdx.y; y < image.height; y += kSlices)
      add(part_at + (y + 1) * (image.width + int64_t{1}) - 1);
    for (int y = threadIdx.y; y < p.side; y += kSlices)
      add(whole_at + (y + 1) * (p.side + int64_t{1}) - 1);
  }
  slices[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !mine) return;
  for (int i = 1; i < kSlices; ++i) sum += slices[i * kWarpSize + threadIdx.x];
  sums[blockIdx.y * p.depth() + column] += static_cast<float>(sum);
}

}  // namespace vlmops::hd_transform
