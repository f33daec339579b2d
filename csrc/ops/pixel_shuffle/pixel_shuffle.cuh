// Pixel shuffle on NVIDIA GPUs. pixel_shuffle_cpu.h has the maths.
//
// Every element is read once and written once. Floors, predicted and not measured, are bytes over
// the speed of a copy (H100 3.0, H200 4.3 TB/s), in bfloat16:
//                          bytes     H100    H200
//   13 x 1024 x 1024      54.5 MB     18      13 us
//   13 x 1024 x 3200       170 MB     57      40 us
// and half as much again backward with a norm, which reads two tensors. Aimed at: 90 % of the speed
// of a copy for moves, 85 % with a norm.
//
// Moves: a warp takes kAhead packs of 16 bytes a lane of one merged token, all loaded before the
// first is stored; which block the token is takes its divisions once for them. In order "cyx" with
// factor 2 a pack gathers 4 bytes from each of four pixels: loads of 128 bytes a warp, and stores
// of 512; the other way round backward. Anything else goes element by element.
//
// Norms: a row (a merged token, a pixel of C channels where those are normed, or the four pixels of
// a "cyx" token at once) is one block's, kPer packs a thread, held in registers between the sums
// and the result: one read. Sums are those of deviations from a first mean, as on the CPU. Backward
// a block takes rows in steps of the grid and keeps the sums of the gradients of weight and bias in
// shared memory, where each thread has the same columns for all rows. What it reads again for each
// of its two or three passes lies in L1 or L2. Sums in registers lost: 64 of them a thread for rows
// of 12,800 channels, which spilled on every architecture. Rows that are longer than registers or
// shared memory allow, unaligned or strided go element by element.
#pragma once

#include "common/gpu.cuh"
#include "ops/pixel_shuffle/pixel_shuffle.h"

namespace vlmops::pixel_shuffle {

constexpr int kAhead = 4;  // packs a lane moves at once
constexpr int kMoveThreads = 256;
constexpr int kPer = 4;  // packs of a row that a thread holds
constexpr int kRowThreads = 1024;
constexpr int kBackwardThreads = 384;
constexpr int kBackwardBlocks = 2;  // on one multiprocessor
constexpr int kAnyThreads = 256;
constexpr int kMostSums = 16;

// What a row of packs is; see the head.
enum class Layout { kYxc, kCyx, kMean };

// Where a merged token is.
struct Place {
  const Group* group;
  int number, image, row, column;  // number: among the tokens of its image
};

__device__ __forceinline__ Place find(const Params& p, int64_t token) {
  int at = 0;
  while (at + 1 < p.group_count && p.groups[at + 1].first <= token) ++at;
  const Group& group = p.groups[at];
  const auto n = static_cast<uint32_t>(token - group.first);
  const auto columns = static_cast<uint32_t>(group.columns);
  const uint32_t tokens = static_cast<uint32_t>(group.rows) * columns;
  const uint32_t image = n / tokens, number = n - image * tokens, row = number / columns;
  return {&group, static_cast<int>(number), static_cast<int>(image), static_cast<int>(row),
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
  return static_cast<const T*>(p.merged) + at.group->merged + at.image * at.group->image +
         at.number * p.token_stride;
}

template <class T>
__device__ __forceinline__ T* merged_out_at(const Params& p, const Place& at) {
  return static_cast<T*>(p.merged_out) + at.group->merged_out + at.image * at.group->image_out +
         at.number * p.token_stride_out;
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
      packs[j] = load_words<V>(static_cast<const T*>(p.pixels) + block_at(at, at.group->from) +
                               pixel_at(p, at.group->from, pixel) + (u - pixel * per_pixel) * V);
    }
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      const int pixel = u / per_pixel;
      store_words(static_cast<T*>(p.pixels_out) + block_at(at, at.group->to) +
                      pixel_at(p, at.group->to, pixel) + (u - pixel * per_pixel) * V,
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
  __device__ __forceinline__ void load(const T* block, const Pixels& pixels, int unit) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of[i] = load_pack<1>(reinterpret_cast<const uint32_t*>(block + place(pixels, unit, i))).v[0];
  }
  __device__ __forceinline__ void store(T* block, const Pixels& pixels, int unit) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_pack(reinterpret_cast<uint32_t*>(block + place(pixels, unit, i)),
                 Pack<uint32_t, 1>{{of[i]}});
  }

 private:
  static __device__ __forceinline__ int64_t place(const Pixels& pixels, int unit, int i) {
    return i / 2 * pixels.y + i % 2 * pixels.x + unit * N;
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
      quads[j].load(static_cast<const T*>(p.pixels) + block_at(at, at.group->from), at.group->from,
                    u);
    }
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) {
    const int u = segment.first + j * kWarpSize;
    if (u >= units) break;
    if constexpr (kInverse) {
      quads[j].store(static_cast<T*>(p.pixels_out) + block_at(at, at.group->to), at.group->to, u);
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
      static_cast<T*>(p.pixels_out)[block_at(at, at.group->to) +
                                    pixel_at(p, at.group->to, e.pixel) + e.channel] =
          merged_at<T>(p, at)[k * p.merged_stride];
    } else {
      merged_out_at<T>(p, at)[k] = static_cast<const T*>(
          p.pixels)[block_at(at, at.group->from) + pixel_at(p, at.group->from, e.pixel) +
                    e.channel * p.pixel_stride];
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
      T* block = static_cast<T*>(p.pixels_out) + block_at(at, at.group->to) + k;
      for (int i = 0; i < n; ++i) block[pixel_at(p, at.group->to, i)] = share;
    } else {
      const T* block = static_cast<const T*>(p.pixels) + block_at(at, at.group->from);
      merged_out_at<T>(p, at)[k] = from_float<T>(mean_at(p, block, at.group->from, k));
    }
  }
}

// Sums over the threads of a block, of N numbers at once. Two buffers take turns: the barrier of
// one sum orders the reads of the one before and the writes of the one behind.
class BlockSum {
 public:
  __device__ explicit BlockSum(float* shared) : shared_(shared) {}

  template <int N>
  __device__ __forceinline__ void operator()(float (&x)[N]) {
    static_assert(N <= kMostSums);
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = over_warp(x[n], kWarpSize);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (warps == 1) return;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* const mine = shared_ + turn_ * kWarpSize * kMostSums;
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) mine[n * kWarpSize + warp] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
      x[n] = over_warp(lane < warps ? mine[n * kWarpSize + lane] : 0.0f, kWarpSize);
  }

  static constexpr int kFloats = 2 * kWarpSize * kMostSums;

 private:
  static __device__ __forceinline__ float over_warp(float x, int lanes) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      if (distance < lanes) x += __shfl_xor_sync(kFullWarp, x, distance);
    }
    return x;
  }

  float* shared_;
  int turn_ = 0;
};

// (x - mean) * scale + shift is x normed.
struct Statistics {
  float mean, scale, shift;
};

// From sums over n of (x - mean) and its square: what the mean lacks is shifted.
__device__ __forceinline__ Statistics statistics_of(const Params& p, float mean, float sum,
                                                    float squares, float per_element) {
  const float rest = p.norm == Norm::kLayer ? sum * per_element : 0.0f;
  const float scale = 1.0f / sqrtf(squares * per_element - rest * rest + p.eps);
  return {mean, scale, -rest * scale};
}

__device__ __forceinline__ float element(const Weight& w, int64_t k) {
  const int64_t at = k * w.stride;
  switch (w.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(w.data)[at];
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(w.data)[at]);
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(w.data)[at]);
  }
  return 0.0f;
}

__device__ __forceinline__ float weight_at(const Params& p, int64_t k) {
  return p.weight.data == nullptr ? 1.0f : element(p.weight, k) + p.offset;
}

__device__ __forceinline__ float bias_at(const Params& p, int64_t k) {
  return p.bias.data == nullptr ? 0.0f : element(p.bias, k);
}

template <class T, int N>
__device__ __forceinline__ void load_floats(const T* p, float (&x)[N]) {
  if constexpr (sizeof(T) * N >= 8) {
    widen(load_words<N>(p), x);
  } else {
    const auto pack = load_pack<N>(p);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = to_float(pack.v[e]);
  }
}

// N weights that follow each other from k on, in wide accesses where `wide`.
template <int N>
__device__ __forceinline__ void load_vector(const Weight& w, bool wide, int64_t k, float offset,
                                            float (&x)[N]) {
  if (!wide) {
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = element(w, k + e) + offset;
    return;
  }
  switch (w.dtype) {
    case DType::kFloat32: {
      constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
      for (int e = 0; e < N; e += kPart) {
        float part[kPart];
        load_floats(static_cast<const float*>(w.data) + k + e, part);
#pragma unroll
        for (int i = 0; i < kPart; ++i) x[e + i] = part[i];
      }
      break;
    }
    case DType::kBFloat16:
      load_floats(static_cast<const bfloat16*>(w.data) + k, x);
      break;
    case DType::kFloat16:
      load_floats(static_cast<const float16*>(w.data) + k, x);
      break;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] += offset;
}

// What the launcher knows of a Params beyond it.
struct Plan {
  int units;  // packs of a row
  int64_t rows;
  bool wide_weight, wide_bias;
};

// One row of packs.
template <class T, Layout layout>
struct Row {
  static constexpr int V = kPack<T>;
  static constexpr int kSets = layout == Layout::kCyx ? 4 : 1;  // of statistics: one a pixel
  // Of element e of a pack.
  static __device__ __forceinline__ constexpr int set_of(int e) {
    return layout == Layout::kCyx ? e % 4 : 0;
  }

  Place at;
  int pixel;  // where a row is one pixel; else -1

  __device__ __forceinline__ Row(const Params& p, int64_t row) {
    pixel = -1;
    int64_t token = row;
    if (layout == Layout::kYxc && p.norm_channels) {
      const int block = static_cast<int>(p.block());
      token = row / block;
      pixel = static_cast<int>(row - token * block);
    }
    at = find(p, token);
  }

  // Bits of pack u from a block of pixels, for layouts that have them.
  __device__ __forceinline__ int64_t offset(const Params& p, const Pixels& pixels, int u) const {
    if (pixel >= 0) return pixel_at(p, pixels, pixel) + u * V;
    const int per_pixel = static_cast<int>(p.channels) / V, i = u / per_pixel;
    return pixel_at(p, pixels, i) + (u - i * per_pixel) * V;
  }

  __device__ __forceinline__ void load(const Params& p, int u, float (&x)[V]) const {
    const Pixels& pixels = at.group->from;
    const T* block = static_cast<const T*>(p.pixels) + block_at(at, pixels);
    if constexpr (layout == Layout::kYxc) {
      load_floats(block + offset(p, pixels, u), x);
    } else if constexpr (layout == Layout::kCyx) {
      Quad<T> quad;
      quad.load(block, pixels, u);
      widen(quad.merged(), x);
    } else {
      const int n = static_cast<int>(p.block());
#pragma unroll
      for (int e = 0; e < V; ++e) x[e] = 0.0f;
#pragma unroll 2
      for (int i = 0; i < n; ++i) {
        float one[V];
        load_floats(block + pixel_at(p, pixels, i) + u * V, one);
#pragma unroll
        for (int e = 0; e < V; ++e) x[e] += one[e];
      }
      const float share = 1.0f / static_cast<float>(n);
#pragma unroll
      for (int e = 0; e < V; ++e) x[e] *= share;
    }
  }

  // To the pixels that pack u comes from.
  __device__ __forceinline__ void store_pixels(const Params& p, int u, const float (&x)[V]) const {
    const Pixels& pixels = at.group->to;
    T* block = static_cast<T*>(p.pixels_out) + block_at(at, pixels);
    if constexpr (layout == Layout::kYxc) {
      store_words(block + offset(p, pixels, u), narrow<T>(x));
    } else if constexpr (layout == Layout::kCyx) {
      Quad<T> quad;
      quad.split(narrow<T>(x));
      quad.store(block, pixels, u);
    } else {
      const int n = static_cast<int>(p.block());
      float share[V];
#pragma unroll
      for (int e = 0; e < V; ++e) share[e] = x[e] * (1.0f / static_cast<float>(n));
      const auto pack = narrow<T>(share);
      for (int i = 0; i < n; ++i) store_words(block + pixel_at(p, pixels, i) + u * V, pack);
    }
  }

  // Where pack u lies in its merged token.
  __device__ __forceinline__ int64_t merged(const Params& p, int u) const {
    return (pixel > 0 ? pixel * p.channels : 0) + static_cast<int64_t>(u) * V;
  }

  // The first of the norm's columns of pack u, and how many they are.
  static constexpr int kColumns = layout == Layout::kCyx ? V / 4 : V;
  static __device__ __forceinline__ constexpr int column_of(int e) {
    return layout == Layout::kCyx ? e / 4 : e;
  }
};

// Grid: rows. Where there is no norm a row's mean alone is taken.
template <class T, Layout layout>
__global__ void __launch_bounds__(kRowThreads)
    pixel_shuffle_norm_kernel(const VLMOPS_GRID_CONSTANT Params p,
                              const VLMOPS_GRID_CONSTANT Plan plan) {
  using R = Row<T, layout>;
  constexpr int V = R::V, S = R::kSets;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  BlockSum add_up(shared);
  const R row(p, blockIdx.x);
  const int stride = static_cast<int>(blockDim.x);
  float x[kPer][V];
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int u = static_cast<int>(threadIdx.x) + j * stride;
    if (u < plan.units) row.load(p, u, x[j]);
  }
  Statistics by[S];
#pragma unroll
  for (int s = 0; s < S; ++s) by[s] = {0.0f, 1.0f, 0.0f};
  if (p.norm != Norm::kNone) {
    const float per_element = 1.0f / static_cast<float>(p.normed());
    float mean[S] = {};
    if (p.norm == Norm::kLayer) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (static_cast<int>(threadIdx.x) + j * stride >= plan.units) break;
#pragma unroll
        for (int e = 0; e < V; ++e) mean[R::set_of(e)] += x[j][e];
      }
      add_up(mean);
#pragma unroll
      for (int s = 0; s < S; ++s) mean[s] *= per_element;
    }
    float sums[2 * S] = {};
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      if (static_cast<int>(threadIdx.x) + j * stride >= plan.units) break;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float centred = x[j][e] - mean[R::set_of(e)];
        sums[R::set_of(e)] += centred;
        sums[S + R::set_of(e)] += centred * centred;
      }
    }
    add_up(sums);
#pragma unroll
    for (int s = 0; s < S; ++s)
      by[s] = statistics_of(p, mean[s], sums[s], sums[S + s], per_element);
  }
  T* const out = merged_out_at<T>(p, row.at);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int u = static_cast<int>(threadIdx.x) + j * stride;
    if (u >= plan.units) break;
    float w[R::kColumns];
    if (p.norm != Norm::kNone) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        x[j][e] =
            (x[j][e] - by[R::set_of(e)].mean) * by[R::set_of(e)].scale + by[R::set_of(e)].shift;
    }
    if (p.weight.data != nullptr) {
      load_vector(p.weight, plan.wide_weight, static_cast<int64_t>(u) * R::kColumns, p.offset, w);
#pragma unroll
      for (int e = 0; e < V; ++e) x[j][e] *= w[R::column_of(e)];
    }
    if (p.bias.data != nullptr) {
      load_vector(p.bias, plan.wide_bias, static_cast<int64_t>(u) * R::kColumns, 0.0f, w);
#pragma unroll
      for (int e = 0; e < V; ++e) x[j][e] += w[R::column_of(e)];
    }
    store_words(out + row.merged(p, u), narrow<T>(x[j]));
  }
}

// partial [grid, 2, normed]: the sums of the gradients of weight and bias over the rows of each
// block; null where nobody needs them. Dynamic shared memory: as many floats as a part has.
template <class T, Layout layout>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    pixel_shuffle_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Params p,
                                       const VLMOPS_GRID_CONSTANT Plan plan, float* partial) {
  using R = Row<T, layout>;
  constexpr int V = R::V, S = R::kSets, C = R::kColumns;
  VLMOPS_SHARED(float, shared, BlockSum::kFloats);
  VLMOPS_DYNAMIC_SHARED(float, totals);  // [2, C, units]: threads side by side meet in no bank
  BlockSum add_up(shared);
  const int first = static_cast<int>(threadIdx.x), stride = static_cast<int>(blockDim.x);
  const int units = plan.units;
  const float per_element = 1.0f / static_cast<float>(p.normed());
  const bool layer = p.norm == Norm::kLayer;
  for (int u = first; partial != nullptr && u < units; u += stride) {
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) totals[i * units + u] = 0.0f;
  }
  for (int64_t number = blockIdx.x; number < plan.rows; number += gridDim.x) {
    const R row(p, number);
    const T* const grad = merged_at<T>(p, row.at);
    float mean[S] = {};
    if (layer) {
      for (int u = first; u < units; u += stride) {
        float x[V];
        row.load(p, u, x);
#pragma unroll
        for (int e = 0; e < V; ++e) mean[R::set_of(e)] += x[e];
      }
      add_up(mean);
#pragma unroll
      for (int s = 0; s < S; ++s) mean[s] *= per_element;
    }
    const auto weights = [&](int u, float (&w)[C]) {
#pragma unroll
      for (int c = 0; c < C; ++c) w[c] = 1.0f;
      if (p.weight.data != nullptr)
        load_vector(p.weight, plan.wide_weight, static_cast<int64_t>(u) * C, p.offset, w);
    };
    float sums[4 * S] = {};  // of deviations, their squares, w g, w g times the deviation
    for (int u = first; u < units; u += stride) {
      float x[V], g[V], w[C];
      row.load(p, u, x);
      load_floats(grad + row.merged(p, u), g);
      weights(u, w);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int s = R::set_of(e);
        const float centred = x[e] - mean[s], wg = w[R::column_of(e)] * g[e];
        sums[s] += centred;
        sums[S + s] += centred * centred;
        sums[2 * S + s] += wg;
        sums[3 * S + s] += wg * centred;
      }
    }
    add_up(sums);
    Statistics by[S];
    float mean_wg[S], mean_along[S];
#pragma unroll
    for (int s = 0; s < S; ++s) {
      by[s] = statistics_of(p, mean[s], sums[s], sums[S + s], per_element);
      mean_wg[s] = layer ? sums[2 * S + s] * per_element : 0.0f;
      mean_along[s] = (sums[3 * S + s] * by[s].scale + sums[2 * S + s] * by[s].shift) * per_element;
    }
    for (int u = first; u < units; u += stride) {
      float x[V], g[V], w[C];
      row.load(p, u, x);
      load_floats(grad + row.merged(p, u), g);
      weights(u, w);
      float of_weight[C] = {}, of_bias[C] = {};
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int s = R::set_of(e), c = R::column_of(e);
        const float xh = (x[e] - by[s].mean) * by[s].scale + by[s].shift;
        of_weight[c] += g[e] * xh;
        of_bias[c] += g[e];
        x[e] = (w[c] * g[e] - mean_wg[s] - xh * mean_along[s]) * by[s].scale;
      }
      if (p.pixels_out != nullptr) row.store_pixels(p, u, x);
      if (partial == nullptr) continue;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        totals[c * units + u] += of_weight[c];
        totals[(C + c) * units + u] += of_bias[c];
      }
    }
  }
  if (partial == nullptr) return;
  float* const mine = partial + static_cast<int64_t>(blockIdx.x) * 2 * p.normed();
  for (int u = first; u < units; u += stride) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      mine[static_cast<int64_t>(u) * C + c] = totals[c * units + u];
      mine[p.normed() + static_cast<int64_t>(u) * C + c] = totals[(C + c) * units + u];
    }
  }
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
    const Pixels& pixels = at.group->from;
    const T* block = static_cast<const T*>(p.pixels) + block_at(at, pixels);
    if (p.mean) return mean_at(p, block, pixels, k);
    const Element e = element_of(p, k);
    return to_float(block[pixel_at(p, pixels, e.pixel) + e.channel * p.pixel_stride]);
  }
  __device__ __forceinline__ void store_pixels(const Params& p, int k, float x) const {
    const Pixels& pixels = at.group->to;
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
  const float per_element = 1.0f / static_cast<float>(n);
  float mean[1] = {};
  if (p.norm == Norm::kLayer) {
    for (int k = threadIdx.x; k < n; k += kAnyThreads) mean[0] += row.load(p, k);
    add_up(mean);
    mean[0] *= per_element;
  }
  float sums[2] = {};
  for (int k = threadIdx.x; k < n; k += kAnyThreads) {
    const float centred = row.load(p, k) - mean[0];
    sums[0] += centred;
    sums[1] += centred * centred;
  }
  add_up(sums);
  const Statistics by = statistics_of(p, mean[0], sums[0], sums[1], per_element);
  T* const out = merged_out_at<T>(p, row.at);
  for (int k = threadIdx.x; k < n; k += kAnyThreads) {
    const float xh = (row.load(p, k) - by.mean) * by.scale + by.shift;
    out[row.merged(p, k)] = from_float<T>(xh * weight_at(p, k) + bias_at(p, k));
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
      const float wg = weight_at(p, k) * to_float(grad[row.merged(p, k) * p.merged_stride]);
      sums[0] += centred;
      sums[1] += centred * centred;
      sums[2] += wg;
      sums[3] += wg * centred;
    }
    add_up(sums);
    const Statistics by = statistics_of(p, mean[0], sums[0], sums[1], per_element);
    const float mean_wg = layer ? sums[2] * per_element : 0.0f;
    const float mean_along = (sums[3] * by.scale + sums[2] * by.shift) * per_element;
    for (int k = threadIdx.x; k < n; k += kAnyThreads) {
      const float xh = (row.load(p, k) - by.mean) * by.scale + by.shift;
      const float g = to_float(grad[row.merged(p, k) * p.merged_stride]);
      if (partial != nullptr) {
        of_weight[k] += g * xh;
        of_bias[k] += g;
      }
      if (p.pixels_out != nullptr)
        row.store_pixels(p, k, (weight_at(p, k) * g - mean_wg - xh * mean_along) * by.scale);
    }
  }
}

constexpr int kSlices = 8;  // of the rows of partial sums

// weight_grad, bias_grad [normed], or null: the sums of partial [parts, 2, normed]. Grid (normed /
// 32, 2), block (32, kSlices).
__global__ void __launch_bounds__(kWarpSize* kSlices)
    pixel_shuffle_weight_grad_kernel(const float* partial, int parts, int64_t normed,
                                     float* weight_grad, float* bias_grad) {
  VLMOPS_SHARED(double, sums, kSlices* kWarpSize);
  float* const out = blockIdx.y == 0 ? weight_grad : bias_grad;
  if (out == nullptr) return;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool mine = column < normed;
  double sum = 0.0;
  if (mine) {
    for (int part = threadIdx.y; part < parts; part += kSlices)
      sum += partial[(static_cast<int64_t>(part) * 2 + blockIdx.y) * normed + column];
  }
  sums[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !mine) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kWarpSize + threadIdx.x];
  out[column] = static_cast<float>(sum);
}

}  // namespace vlmops::pixel_shuffle
