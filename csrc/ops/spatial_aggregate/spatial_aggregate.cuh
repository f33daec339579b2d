// The spatial aggregation on NVIDIA GPUs; spatial_aggregate_cpu.h has the formulas.
//
// Bytes: all keys and values once, q and the result. Cambrian-1's grid of 24 x 24, maps of 24, 24,
// 24 and 96 on a side and 1,024 channels are 47 MB in bfloat16: 11 us at the 4.3 TB/s that a copy
// reaches on an H200; backward twice that. PREDICTED, never measured: 80 % of a copy from one image
// on (2,304 warps of 19 keys, 5 for each scheduler, hold 128 bytes a lane in flight). Instructions
// are about 1.6 a byte, a fourth of what an H200 issues in that time.
//
// Threads: 8, 16 or 32 lanes have a head of a query, 16 bytes of its channels each (32 bytes above
// 128 channels in float32); a warp has one query's neighbouring heads, so that it reads a token's
// heads side by side. Tokens come four at a time: where they lie, then all loads, then products,
// whose sums cross the lanes of a head, then the softmax online. No block shares anything.
//
// Backward passes over the tokens twice: for logits and weights' gradients, which go to shared
// memory, 8 bytes a token and head; then, once the head's lanes have shared the softmax among them,
// for the gradients, with keys read again, from the caches, for q's alone. Every token is one
// query's: gradients are written once, nothing is added up across warps.
#pragma once

#include "common/gpu.cuh"
#include "ops/spatial_aggregate/spatial_aggregate.h"

namespace vlmops::spatial_aggregate {

constexpr int kMostWarps = 4;
constexpr int kTogether = 4;  // tokens
constexpr float kNothing = -__builtin_inff();

struct Cell {
  int64_t batch, y, x;
};

__device__ __forceinline__ int64_t at(const Strides& s, const Cell& c) {
  return c.batch * s.batch + c.y * s.y + c.x * s.x;
}

// A lane's place: which query's which head, and which of its channels, the first of kPacks packs.
template <class T, int kLanes>
struct Place {
  Cell cell;
  int64_t number;  // of the cell
  int head, channel;
  int warp, of_warp;  // the head's place among those of the warp
  bool exists;        // of a whole warp

  __device__ __forceinline__ explicit Place(const Params& p) {
    constexpr int kHeads = kWarpSize / kLanes;
    const int lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
    const int groups = (p.heads + kHeads - 1) / kHeads;
    number = unit / groups;
    of_warp = lane / kLanes;
    head = static_cast<int>(unit - number * groups) * kHeads + of_warp;
    channel = lane % kLanes * kPack<T>;
    cell = {number / (p.grid_h * p.grid_w), number / p.grid_w % p.grid_h, number % p.grid_w};
    exists = number < p.cells();
  }
};

// The tokens of a query's windows, one after the other.
class Walk {
 public:
  int64_t key, value;  // from the tensor's first element to the token's
  int64_t token;       // counted over the map
  int encoder = 0;

  __device__ __forceinline__ Walk(const Params& p, const Cell& cell) : p_(p), cell_(cell) {
    enter();
  }
  __device__ __forceinline__ const Encoder& of() const { return p_.encoders[encoder]; }
  __device__ __forceinline__ bool ended() const { return encoder == p_.encoder_count; }
  __device__ __forceinline__ bool exists() const {
    return of().mask == nullptr || of().mask[mask_];
  }

  __device__ __forceinline__ void next() {
    const Encoder& e = of();
    key += e.key_stride.x;
    value += e.value_stride.x;
    mask_ += e.mask_stride.x;
    ++token;
    if (++x_ < e.width) return;
    x_ = 0;
    key += e.key_stride.y - e.width * e.key_stride.x;
    value += e.value_stride.y - e.width * e.value_stride.x;
    mask_ += e.mask_stride.y - e.width * e.mask_stride.x;
    token += (p_.grid_w - 1) * e.width;
    if (++y_ < e.height) return;
    y_ = 0;
    ++encoder;
    enter();
  }

 private:
  const Params& p_;
  const Cell& cell_;
  int64_t mask_;
  int x_ = 0, y_ = 0;

  // The first token of an encoder's window.
  __device__ __forceinline__ void enter() {
    if (ended()) return;
    const Encoder& e = of();
    const Cell first = {cell_.batch, cell_.y * e.height, cell_.x * e.width};
    key = at(e.key_stride, first);
    value = at(e.value_stride, first);
    mask_ = at(e.mask_stride, first);
    token = (first.batch * p_.grid_h * e.height + first.y) * p_.grid_w * e.width + first.x;
  }
};

// A lane's channels of one row.
template <class T, int kPacks>
struct Row {
  Words<T, kPack<T>> pack[kPacks];
};

template <class T, int kLanes, int kPacks>
__device__ __forceinline__ bool has_pack(const Params& p, const Place<T, kLanes>& place, int i) {
  return place.head < p.heads && place.channel + i * kLanes * kPack<T> < p.head_dim;
}

// Zeros where there is nothing to read; `from` is the head's first channel.
template <class T, int kLanes, int kPacks>
__device__ __forceinline__ void read(const Params& p, const Place<T, kLanes>& place, const T* from,
                                     bool exists, Row<T, kPacks>& row) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    row.pack[i] = {};
    if (exists && has_pack<T, kLanes, kPacks>(p, place, i))
      row.pack[i] = load_words<kPack<T>>(from + place.channel + i * kLanes * kPack<T>);
  }
}

// factor * row where the token exists, zeros elsewhere: not what a NaN makes of them.
template <class T, int kLanes, int kPacks>
__device__ __forceinline__ void write(const Params& p, const Place<T, kLanes>& place, T* to,
                                      const float (&row)[kPacks][kPack<T>], float factor,
                                      bool exists) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float x[kPack<T>];
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) x[c] = exists ? factor * row[i][c] : 0.0f;
    if (has_pack<T, kLanes, kPacks>(p, place, i))
      store_words(to + place.channel + i * kLanes * kPack<T>, narrow<T>(x));
  }
}

template <class T, int kPacks>
__device__ __forceinline__ void widen(const Row<T, kPacks>& row, float (&x)[kPacks][kPack<T>]) {
#pragma unroll
  for (int i = 0; i < kPacks; ++i) vlmops::widen(row.pack[i], x[i]);
}

// A lane's share of a product.
template <class T, int kPacks>
__device__ __forceinline__ float multiply(const float (&x)[kPacks][kPack<T>],
                                          const Row<T, kPacks>& row) {
  float y[kPacks][kPack<T>], sum = 0.0f;
  widen(row, y);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) sum = fmaf(x[i][c], y[i][c], sum);
  }
  return sum;
}

template <class T, int kPacks>
__device__ __forceinline__ void add(float weight, const Row<T, kPacks>& row,
                                    float (&sums)[kPacks][kPack<T>]) {
  float x[kPacks][kPack<T>];
  widen(row, x);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int c = 0; c < kPack<T>; ++c) sums[i][c] = fmaf(weight, x[i][c], sums[i][c]);
  }
}

// Over the lanes of a head, for all of them, of kTogether numbers at once.
template <int kLanes>
__device__ __forceinline__ void sum_lanes(float (&x)[kTogether]) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) x[n] += __shfl_xor_sync(kFullWarp, x[n], distance);
  }
}

// The next kTogether tokens, or what is left of them.
template <class T>
struct Tokens {
  const T *key[kTogether], *value[kTogether];  // the head's first channels
  T *key_grad[kTogether], *value_grad[kTogether];
  bool listed[kTogether], exists[kTogether];

  __device__ __forceinline__ Tokens(const Params& p, int head, Walk& walk) {
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      listed[n] = !walk.ended();
      exists[n] = false;
      key[n] = value[n] = nullptr;
      key_grad[n] = value_grad[n] = nullptr;
      if (!listed[n]) continue;
      const Encoder& e = walk.of();
      exists[n] = walk.exists();
      key[n] = static_cast<const T*>(e.key) + walk.key + head * e.key_stride.head;
      value[n] = static_cast<const T*>(e.value) + walk.value + head * e.value_stride.head;
      const int64_t row = (walk.token * p.heads + head) * p.head_dim;
      if (e.key_grad != nullptr) key_grad[n] = static_cast<T*>(e.key_grad) + row;
      if (e.value_grad != nullptr) value_grad[n] = static_cast<T*>(e.value_grad) + row;
      walk.next();
    }
  }
};

// Of one number: the sum, or the largest.
template <int kLanes, bool kLargest = false>
__device__ __forceinline__ float of_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, x, distance);
    x = kLargest ? fmaxf(x, other) : x + other;
  }
  return x;
}

// Makes weights of the logits in x, the lanes of a head in turns; the mean of y by the weights. No
// lane reads what another one writes.
template <int kLanes>
__device__ __forceinline__ float softmax(float2* kept, int count) {
  const int first = threadIdx.x % kLanes;
  float most = kNothing, sum = 0.0f, mean = 0.0f;
  for (int t = first; t < count; t += kLanes) most = fmaxf(most, kept[t].x);
  most = of_lanes<kLanes, true>(most);
  if (most == kNothing) most = 0.0f;  // no token exists
  for (int t = first; t < count; t += kLanes) {
    const float weight = expf(kept[t].x - most);
    kept[t].x = weight;
    sum += weight;
  }
  sum = of_lanes<kLanes>(sum);
  if (sum == 0.0f) sum = 1.0f;
  for (int t = first; t < count; t += kLanes) {
    kept[t].x /= sum;
    mean = fmaf(kept[t].x, kept[t].y, mean);
  }
  return of_lanes<kLanes>(mean);
}

// The softmax of logits that come a few at a time.
struct Online {
  float most = kNothing, sum = 0.0f;

  // Makes weights of logits; what sums of the weights before are to be multiplied by.
  __device__ __forceinline__ float operator()(float (&s)[kTogether],
                                              const bool (&exists)[kTogether]) {
    float now = most;
    bool any = false;  // NaN is something: it stays
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (!exists[n] || s[n] == kNothing) continue;
      any = true;
      now = fmaxf(now, s[n]);
    }
    const float before = any ? expf(most - now) : 1.0f;
    sum *= before;
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      s[n] = any && exists[n] ? expf(s[n] - now) : 0.0f;
      sum += s[n];
    }
    most = now;
    return before;
  }
  // Zero where no token exists.
  __device__ __forceinline__ float inverse() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
};

// Where the head of a tensor of queries begins.
template <class T, int kLanes>
__device__ __forceinline__ const T* head_of(const void* data, const Strides& s,
                                            const Place<T, kLanes>& place) {
  return static_cast<const T*>(data) + at(s, place.cell) + place.head * s.head;
}

template <class T, int kLanes>
__device__ __forceinline__ T* out_of(const Params& p, const Place<T, kLanes>& place) {
  return static_cast<T*>(p.out) + (place.number * p.heads + place.head) * p.head_dim;
}

// Grid: warps that have a query's heads in groups of kWarpSize / kLanes.
template <class T, int kLanes, int kPacks>
__global__ void __launch_bounds__(kMostWarps* kWarpSize)
    spatial_aggregate_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  const Place<T, kLanes> place(p);
  if (!place.exists) return;
  Row<T, kPacks> row;
  float q[kPacks][kPack<T>], sums[kPacks][kPack<T>] = {};
  read(p, place, head_of(p.q, p.q_stride, place), true, row);
  widen(row, q);
  Online online;
  for (Walk walk(p, place.cell); !walk.ended();) {
    const Tokens<T> tokens(p, place.head, walk);
    Row<T, kPacks> key[kTogether], value[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) read(p, place, tokens.key[n], tokens.exists[n], key[n]);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) read(p, place, tokens.value[n], tokens.exists[n], value[n]);
    float s[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) s[n] = multiply(q, key[n]);
    sum_lanes<kLanes>(s);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) s[n] *= p.scale;
    const float before = online(s, tokens.exists);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kPack<T>; ++c) sums[i][c] *= before;
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) add(s[n], value[n], sums);
  }
  write(p, place, out_of(p, place), sums, online.inverse(), true);
}

// The same grid. Shared: a logit and what its weight's gradient is, of each token of each head.
template <class T, int kLanes, int kPacks>
__global__ void __launch_bounds__(kMostWarps* kWarpSize)
    spatial_aggregate_backward_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  VLMOPS_DYNAMIC_SHARED(float2, shared);
  const Place<T, kLanes> place(p);
  if (!place.exists) return;
  float2* const kept = shared + (place.warp * (kWarpSize / kLanes) + place.of_warp) * p.keys;
  Row<T, kPacks> row;
  float q[kPacks][kPack<T>], grad[kPacks][kPack<T>];
  read(p, place, head_of(p.q, p.q_stride, place), true, row);
  widen(row, q);
  read(p, place, head_of(p.grad, p.grad_stride, place), true, row);
  widen(row, grad);
  int t = 0;
  for (Walk walk(p, place.cell); !walk.ended(); t += kTogether) {
    const Tokens<T> tokens(p, place.head, walk);
    Row<T, kPacks> key[kTogether], value[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      read(p, place, tokens.key[n], tokens.exists[n], key[n]);
      read(p, place, tokens.value[n], tokens.exists[n] && p.needs_weights, value[n]);
    }
    float s[kTogether], r[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      s[n] = multiply(q, key[n]);
      r[n] = multiply(grad, value[n]);
    }
    sum_lanes<kLanes>(s);
    sum_lanes<kLanes>(r);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (tokens.listed[n] && place.channel == 0)
        kept[t + n] = {tokens.exists[n] ? s[n] * p.scale : kNothing, r[n]};
    }
  }
  __syncwarp();
  const float mean = softmax<kLanes>(kept, p.keys);
  __syncwarp();
  float sums[kPacks][kPack<T>] = {};
  t = 0;
  for (Walk walk(p, place.cell); !walk.ended(); t += kTogether) {
    const Tokens<T> tokens(p, place.head, walk);
    Row<T, kPacks> key[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n)
      read(p, place, tokens.key[n], tokens.exists[n] && p.out != nullptr, key[n]);
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      if (!tokens.listed[n]) continue;
      const float2 of = kept[t + n];
      const bool exists = tokens.exists[n];
      const float slope = exists ? of.x * (of.y - mean) * p.scale : 0.0f;
      if (tokens.key_grad[n] != nullptr) write(p, place, tokens.key_grad[n], q, slope, exists);
      if (tokens.value_grad[n] != nullptr)
        write(p, place, tokens.value_grad[n], grad, of.x, exists);
      if (p.out != nullptr) add(slope, key[n], sums);
    }
  }
  if (p.out != nullptr) write(p, place, out_of(p, place), sums, 1.0f, true);
}

}  // namespace vlmops::spatial_aggregate
