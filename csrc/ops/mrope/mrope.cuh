// M-RoPE on NVIDIA GPUs: forward, backward and in place in one kernel, the norm's backward in two.
//
// For every token and frequency j, with the axis a = freq_axis[j]:
//   angle = float32(id[a]) * inv_freq[j];   c, s = scaling * (cos(angle), sin(angle))
// and for every head, with channels (m, n) = (j, j + R) for rotation "half", (2j, 2j + 1) for
// "pairs":
//   y[m] = x[m] c - x[n] s;   y[n] = x[n] c + x[m] s
// Backward is the same with -s. With a norm x[m] stands for
//   x[m] * rsqrt(mean(x^2) + eps) * (offset + weight[m])
//
// Bytes: (Hq + Hk) * D * sizeof(T) read and written per token. Qwen2-VL-7B, 28 + 4 heads of 128 in
// bfloat16: 16 KiB a token, 64 MiB for 4,096 tokens: 15.6 us at an H200's 4.3 TB/s (measured copy),
// 22 us at an H100's 3.0. Predicted, not measured: 85 per cent of that from 4,096 tokens on; one
// token is 8 KiB each way, an empty launch.
//
// A block owns a few tokens. First its threads compute c and s of every (token, frequency) into
// shared memory, once for all heads of q and k: 64 of them against 4,096 channels, so that an exact
// reduction in float64 costs nothing even where float64 runs at 1/64. Then groups of `lanes`
// threads take (token, head) in turn. A thread takes the two packs of V channels that rotate with
// each other, 16 bytes each where strides and R allow it; with a norm the group adds up the head's
// squares by shuffles first and reads its channels again, out of L1.
//
// The norm's backward, with g the gradient rotated back, r = rsqrt(mean(x^2) + eps), w = offset +
// weight, reads x and the gradient and writes dx:
//   dx = r * (w g - r x * mean(w g r x));   dweight = sum over tokens and heads of g r x
// Every group adds its heads' part of dweight up in shared memory, a block writes one row of
// partial sums, and a second kernel adds those in their order: the result depends on sizes and
// device only.
#pragma once

#include "common/gpu.cuh"
#include "common/gpu_sincos.cuh"
#include "ops/mrope/mrope.h"

namespace vlmops::mrope {

constexpr int kThreads = 256;
// Of kThreads each, on one multiprocessor: without this ptxas spills in three kernels.
constexpr int kBlocks = 3;
constexpr int kMaxTokens = 4;  // of a block at a time

// What one head's channels are: packs of V where they lie side by side.
template <int V>
struct Floats {
  float v[V];
};

template <int V, class T>
__device__ __forceinline__ Floats<V> read(const T* p, int64_t channel, int64_t stride) {
  Floats<V> out;
  if constexpr (V == 1) {
    out.v[0] = to_float(p[channel * stride]);
  } else {
    constexpr int n = V < kPack<T> ? V : kPack<T>;
#pragma unroll
    for (int at = 0; at < V; at += n) {
      const auto pack = load_pack<n>(p + channel + at);
#pragma unroll
      for (int e = 0; e < n; ++e) out.v[at + e] = to_float(pack[e]);
    }
  }
  return out;
}

template <int V, class T>
__device__ __forceinline__ void write(T* p, int64_t channel, int64_t stride, const Floats<V>& x) {
  if constexpr (V == 1) {
    p[channel * stride] = from_float<T>(x.v[0]);
  } else {
    Pack<T, V> pack;
#pragma unroll
    for (int e = 0; e < V; ++e) pack[e] = from_float<T>(x.v[e]);
    store_pack(p + channel, pack);
  }
}

// The two packs of item i of a head, and the V frequencies that turn them.
template <Rotation rotation, int V>
struct Item {
  int first, second, frequency;
  __device__ __forceinline__ Item(int i, int frequencies)
      : first(rotation == Rotation::kHalf ? i * V : 2 * i * V),
        second(first + (rotation == Rotation::kHalf ? frequencies : V)),
        frequency(i * V) {}
};

// Channel e of the V pairs of an item lies in pack kPack at place kAt.
template <Rotation rotation, int V>
__device__ __forceinline__ void turn(Floats<V>& a, Floats<V>& b, const Floats<V>& c,
                                     const Floats<V>& s) {
  if constexpr (rotation == Rotation::kHalf || V == 1) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float x = a.v[e], y = b.v[e];
      a.v[e] = x * c.v[e] - y * s.v[e];
      b.v[e] = y * c.v[e] + x * s.v[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      Floats<V>& side = e < V / 2 ? a : b;
      const int m = 2 * (e % (V / 2));
      const float x = side.v[m], y = side.v[m + 1];
      side.v[m] = x * c.v[e] - y * s.v[e];
      side.v[m + 1] = y * c.v[e] + x * s.v[e];
    }
  }
}

// What a block keeps in shared memory; sizes in the order of the pointers.
struct Shared {
  int64_t* offset;  // [tokens, 2 rows, src, dst, x] elements
  float* cosine;    // [tokens, padded]
  float* sine;      // [tokens, padded]
  float* weight;    // [2, D] with a norm: offset + weight
  float* sums;      // [groups, D] in backward
  int padded;       // R rounded up to 4, so that packs of the table are aligned

  static __host__ __device__ int pad(int64_t n) { return static_cast<int>((n + 3) / 4 * 4); }

  static __host__ __device__ size_t bytes(const Params& p, int tokens, bool norm, int groups) {
    size_t floats = 2 * static_cast<size_t>(tokens) * pad(p.frequencies);
    if (norm) floats += 2 * pad(p.head_dim);
    floats += static_cast<size_t>(groups) * pad(p.head_dim);
    return tokens * 6 * sizeof(int64_t) + floats * sizeof(float);
  }

  __device__ Shared(unsigned char* memory, const Params& p, int tokens, bool norm)
      : padded(pad(p.frequencies)) {
    offset = reinterpret_cast<int64_t*>(memory);
    cosine = reinterpret_cast<float*>(offset + tokens * 6);
    sine = cosine + tokens * padded;
    weight = sine + tokens * padded;
    sums = weight + (norm ? 2 * pad(p.head_dim) : 0);
  }
};

__device__ __forceinline__ float load_weight(const Rows& rows, int64_t channel) {
  const int64_t at = channel * rows.norm_stride;
  switch (rows.norm_dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(rows.norm_weight)[at];
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(rows.norm_weight)[at]);
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(rows.norm_weight)[at]);
  }
  return 0.0f;
}

__device__ inline void fill_weights(const Params& p, const Shared& shared) {
  const int d = static_cast<int>(p.head_dim), row = Shared::pad(d);
  for (int i = threadIdx.x; i < 2 * d; i += blockDim.x) {
    const int which = i >= d, channel = i - which * d;
    const Rows& rows = p.rows[which];
    if (rows.norm_weight != nullptr)
      shared.weight[which * row + channel] = load_weight(rows, channel) + p.norm_offset;
  }
}

// Where the tokens [first, first + n) begin, and their cosines and sines.
__device__ inline void fill_tokens(const Params& p, const Shared& shared, int64_t first, int n) {
  for (int i = threadIdx.x; i < 6 * n; i += blockDim.x) {
    const int64_t token = first + i / 6;
    const int64_t b = token / p.tokens, s = token % p.tokens;
    const Rows& rows = p.rows[i % 6 / 3];
    const int kind = i % 3;
    const int64_t* stride = kind == 0   ? rows.src_stride
                            : kind == 1 ? rows.dst_stride
                                        : rows.x_stride;
    shared.offset[i] = b * stride[0] + s * stride[1];
  }
  const int r = static_cast<int>(p.frequencies);
  for (int i = threadIdx.x; i < n * r; i += blockDim.x) {
    const int64_t token = first + i / r;
    const int j = i % r;
    int64_t axis = p.freq_axis[j];
    axis = axis < 0 ? 0 : axis < p.axes ? axis : p.axes - 1;  // nobody looked: that takes a sync
    const int64_t at = axis * p.id_stride[0] + token / p.tokens * p.id_stride[1] +
                       token % p.tokens * p.id_stride[2];
    const float id = static_cast<float>(load_int(p.position_ids, p.id_type, at));
    float c, s;
    sincos_any(__fmul_rn(id, p.inv_freq[j]), c, s);
    shared.cosine[i / r * shared.padded + j] = c * p.scaling;
    shared.sine[i / r * shared.padded + j] = s * p.sine_sign * p.scaling;
  }
}

// Over the `lanes` threads of a group, a power of two; every lane of the warp must call it.
__device__ __forceinline__ float add_up(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

__device__ __forceinline__ float norm_scale(const Params& p, float sum_of_squares) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(p.head_dim) + p.norm_eps);
}

template <int V>
__device__ __forceinline__ float squares(const Floats<V>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < V; ++e) sum += x.v[e] * x.v[e];
  return sum;
}

template <int V>
__device__ __forceinline__ void scale(Floats<V>& x, float factor, const float* weight) {
  const auto w = read<V>(weight, 0, 1);
#pragma unroll
  for (int e = 0; e < V; ++e) x.v[e] = x.v[e] * factor * w.v[e];
}

// One head: `lanes` threads, of which this is `lane`. `weight` [D] is null without a norm.
template <class T, Rotation rotation, int V>
__device__ __forceinline__ void rotate_head(const Params& p, const Rows& rows, const T* src, T* dst,
                                            const float* cosine, const float* sine,
                                            const float* weight, float factor, int lane,
                                            int lanes) {
  const int r = static_cast<int>(p.frequencies), d = static_cast<int>(p.head_dim);
  const int64_t from = rows.src_stride[3], to = rows.dst_stride[3];
  for (int i = lane; i < r / V; i += lanes) {
    const Item<rotation, V> item(i, r);
    auto a = read<V>(src, item.first, from), b = read<V>(src, item.second, from);
    if (weight != nullptr) {
      scale<V>(a, factor, weight + item.first);
      scale<V>(b, factor, weight + item.second);
    }
    turn<rotation, V>(a, b, read<V>(cosine, item.frequency, 1), read<V>(sine, item.frequency, 1));
    write<V>(dst, item.first, to, a);
    write<V>(dst, item.second, to, b);
  }
  if (weight == nullptr && static_cast<const void*>(src) == static_cast<const void*>(dst)) return;
  for (int channel = 2 * r + lane * V; channel < d; channel += lanes * V) {
    auto a = read<V>(src, channel, from);
    if (weight != nullptr) scale<V>(a, factor, weight + channel);
    write<V>(dst, channel, to, a);
  }
}

template <class T, Rotation rotation, int V, bool kNorm>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mrope_kernel(const VLMOPS_GRID_CONSTANT Params p, int tokens_per_block, int lanes) {
  VLMOPS_DYNAMIC_SHARED(unsigned char, memory);
  const Shared shared(memory, p, tokens_per_block, kNorm);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tokens_per_block;
  const int64_t left = p.batch * p.tokens - first;
  const int n = left < tokens_per_block ? static_cast<int>(left) : tokens_per_block;
  fill_tokens(p, shared, first, n);
  if constexpr (kNorm) fill_weights(p, shared);
  __syncthreads();

  const int q_heads = static_cast<int>(p.rows[0].heads);
  const int heads = q_heads + static_cast<int>(p.rows[1].heads), d = static_cast<int>(p.head_dim);
  const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  for (int base = 0; base < n * heads; base += groups) {  // as often for every thread: shuffles
    const bool active = base + group < n * heads;
    const int work = active ? base + group : 0;
    const int token = work / heads, head = work % heads, which = head >= q_heads;
    const Rows& rows = p.rows[which];
    const int64_t* offset = shared.offset + token * 6 + which * 3;
    const int64_t row = head - which * q_heads;
    const T* src = static_cast<const T*>(rows.src) + offset[0] + row * rows.src_stride[2];
    T* dst = static_cast<T*>(rows.dst) + offset[1] + row * rows.dst_stride[2];
    const float* weight = nullptr;
    float factor = 1.0f;
    if constexpr (kNorm) {
      float sum = 0.0f;
      if (active && rows.norm_weight != nullptr) {
        weight = shared.weight + which * Shared::pad(d);
        for (int channel = lane * V; channel < d; channel += lanes * V)
          sum += squares<V>(read<V>(src, channel, rows.src_stride[3]));
      }
      factor = norm_scale(p, add_up(sum, lanes));
      __syncwarp();  // in place, lanes overwrite what others have just summed
    }
    if (active) {
      rotate_head<T, rotation, V>(p, rows, src, dst, shared.cosine + token * shared.padded,
                                  shared.sine + token * shared.padded, weight, factor, lane, lanes);
    }
  }
}

// Of two packs of a head in backward: the gradient rotated back, and x.
template <int V>
struct Both {
  Floats<V> g[2], x[2];
};

template <class T, Rotation rotation, int V>
__device__ __forceinline__ Both<V> read_both(const Rows& rows, const T* grad, const T* x,
                                             const float* cosine, const float* sine,
                                             const Item<rotation, V>& item) {
  Both<V> both;
  const int channel[2] = {item.first, item.second};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    both.g[i] = read<V>(grad, channel[i], rows.src_stride[3]);
    both.x[i] = read<V>(x, channel[i], rows.x_stride[3]);
  }
  turn<rotation, V>(both.g[0], both.g[1], read<V>(cosine, item.frequency, 1),
                    read<V>(sine, item.frequency, 1));
  return both;
}

// The sums of x^2 and of w g x over packs.
template <int V>
__device__ __forceinline__ void add_products(const Floats<V>& g, const Floats<V>& x,
                                             const float* weight, float& square, float& product) {
  const auto w = read<V>(weight, 0, 1);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    square += x.v[e] * x.v[e];
    product += w.v[e] * g.v[e] * x.v[e];
  }
}

// Adds g r x to the group's sums, and turns g into dx.
template <int V>
__device__ __forceinline__ void norm_gradient(Floats<V>& g, const Floats<V>& x, const float* weight,
                                              float* sums, float r, float mean) {
  const auto w = read<V>(weight, 0, 1);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float normed = r * x.v[e];
    sums[e] += g.v[e] * normed;
    g.v[e] = r * (w.v[e] * g.v[e] - normed * mean);
  }
}

// blockIdx.y is 0 for q, 1 for k; a block goes over the tokens in steps of the grid. partial
// [grid.x, 2, D].
template <class T, Rotation rotation, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mrope_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Params p, int tokens_per_block, int lanes,
                               float* partial) {
  VLMOPS_DYNAMIC_SHARED(unsigned char, memory);
  const Shared shared(memory, p, tokens_per_block, true);
  const int which = blockIdx.y;
  const Rows& rows = p.rows[which];
  const int heads = static_cast<int>(rows.heads);
  if (heads == 0 && !rows.needs_weight_grad) return;
  const int d = static_cast<int>(p.head_dim), r = static_cast<int>(p.frequencies);
  const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const float* weight = shared.weight + which * Shared::pad(d);
  float* sums = shared.sums + group * Shared::pad(d);
  for (int i = threadIdx.x; i < groups * Shared::pad(d); i += blockDim.x) shared.sums[i] = 0.0f;
  fill_weights(p, shared);

  const int64_t tokens = p.batch * p.tokens;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tokens_per_block; first < tokens;
       first += static_cast<int64_t>(gridDim.x) * tokens_per_block) {
    const int n =
        tokens - first < tokens_per_block ? static_cast<int>(tokens - first) : tokens_per_block;
    __syncthreads();  // the table is in use until here
    fill_tokens(p, shared, first, n);
    __syncthreads();
    for (int base = 0; base < n * heads; base += groups) {
      const bool active = base + group < n * heads;
      const int work = active ? base + group : 0, token = work / heads;
      const int64_t row = work % heads;
      const int64_t* offset = shared.offset + token * 6 + which * 3;
      const T* grad = static_cast<const T*>(rows.src) + offset[0] + row * rows.src_stride[2];
      T* dst = static_cast<T*>(rows.dst) + offset[1] + row * rows.dst_stride[2];
      const float *cosine = shared.cosine + token * shared.padded,
                  *sine = shared.sine + token * shared.padded;
      if (rows.norm_weight == nullptr) {
        if (active)
          rotate_head<T, rotation, V>(p, rows, grad, dst, cosine, sine, nullptr, 1.0f, lane, lanes);
        continue;
      }
      const T* x = static_cast<const T*>(rows.x) + offset[2] + row * rows.x_stride[2];
      float square = 0.0f, product = 0.0f;
      if (active) {
        for (int i = lane; i < r / V; i += lanes) {
          const Item<rotation, V> item(i, r);
          const auto both = read_both<T, rotation, V>(rows, grad, x, cosine, sine, item);
          add_products<V>(both.g[0], both.x[0], weight + item.first, square, product);
          add_products<V>(both.g[1], both.x[1], weight + item.second, square, product);
        }
        for (int channel = 2 * r + lane * V; channel < d; channel += lanes * V) {
          add_products<V>(read<V>(grad, channel, rows.src_stride[3]),
                          read<V>(x, channel, rows.x_stride[3]), weight + channel, square, product);
        }
      }
      const float factor = norm_scale(p, add_up(square, lanes));
      const float mean = factor * add_up(product, lanes) / static_cast<float>(d);
      if (!active) continue;
      for (int i = lane; i < r / V; i += lanes) {
        const Item<rotation, V> item(i, r);
        auto both = read_both<T, rotation, V>(rows, grad, x, cosine, sine, item);
        norm_gradient<V>(both.g[0], both.x[0], weight + item.first, sums + item.first, factor,
                         mean);
        norm_gradient<V>(both.g[1], both.x[1], weight + item.second, sums + item.second, factor,
                         mean);
        if (!rows.needs_grad) continue;
        write<V>(dst, item.first, rows.dst_stride[3], both.g[0]);
        write<V>(dst, item.second, rows.dst_stride[3], both.g[1]);
      }
      for (int channel = 2 * r + lane * V; channel < d; channel += lanes * V) {
        auto g = read<V>(grad, channel, rows.src_stride[3]);
        norm_gradient<V>(g, read<V>(x, channel, rows.x_stride[3]), weight + channel, sums + channel,
                         factor, mean);
        if (rows.needs_grad) write<V>(dst, channel, rows.dst_stride[3], g);
      }
    }
  }
  if (!rows.needs_weight_grad) return;
  __syncthreads();
  for (int channel = threadIdx.x; channel < d; channel += blockDim.x) {
    float sum = 0.0f;
    for (int g = 0; g < groups; ++g) sum += shared.sums[g * Shared::pad(d) + channel];
    partial[(static_cast<int64_t>(blockIdx.x) * 2 + which) * d + channel] = sum;
  }
}

// q_weight_grad, k_weight_grad [D]: the partial sums [parts, 2, D] in their order.
__global__ void __launch_bounds__(kThreads, kBlocks)
    mrope_weight_grad_kernel(const VLMOPS_GRID_CONSTANT Params p, const float* partial, int parts,
                             float* q_weight_grad, float* k_weight_grad) {
  const int d = static_cast<int>(p.head_dim);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= 2 * d) return;
  float* out = i < d ? q_weight_grad : k_weight_grad;
  if (out == nullptr) return;
  double sum = 0.0;
  for (int part = 0; part < parts; ++part) sum += partial[static_cast<int64_t>(part) * 2 * d + i];
  out[i < d ? i : i - d] = static_cast<float>(sum);
}

}  // namespace vlmops::mrope
