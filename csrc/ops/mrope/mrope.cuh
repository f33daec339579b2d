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
// bfloat16: 16 KiB a token, 64 MiB for 4,096 tokens. Measured on an H200 (bench/results/h200), us,
// bfloat16, with the time of copying the same tensors:
//   Qwen2-VL-7B        4,096 tokens 20.3, copy 18.9;   16,384 tokens 69.7, copy 66.3
//   Qwen3-VL-8B, norm  4,096 tokens 29.6, copy 22.9;   backward 47.6
//
// A block has a token, or with few tokens a share of its heads. Its warps first ask for the
// channels of their first heads, then all threads compute c and s of every frequency into shared
// memory, once for all heads of q and k, while those arrive: 64 of them against 4,096 channels, so
// that an exact reduction in float64 costs nothing even where float64 runs at 1/64. A unit is as
// many heads as fit 32 lanes; a lane keeps an item, the two packs of V channels that rotate with
// each other, in registers from the one read to the one write. An item beyond the 2R channels that
// turn is two packs that do not.
//
// Time goes to instructions: what lost to this was 16-bit elements in arrays (three more
// instructions an element), IEEE division and root, 64-bit divisions and products of strides in
// every lane, a second read of the channels after the norm's sum (44 us), a warp with a table of
// its own to a token (26 and 39 us: its 64 sines one after the other), two units on their way at
// once (22.7 and 34 us: registers).
//
// The norm's backward, with g the gradient rotated back, r = rsqrt(mean(x^2) + eps), w = offset +
// weight, reads x and the gradient and writes dx:
//   dx = r * (w g - r x * mean(w g r x));   dweight = sum over tokens and heads of g r x
// Every lane adds its channels' part of dweight up in registers over all units of its warp, a block
// writes one row of sums, and a second kernel adds those in their order. With sums in shared memory
// and that kernel's rows one after the other it was 124 us.
//
// V depends on R, D and the dtype alone, and so does who adds what: results depend neither on
// strides and alignment, nor on which gradients are asked for.
#pragma once

#include "common/gpu.cuh"
#include "common/gpu_sincos.cuh"
#include "ops/mrope/mrope.h"

namespace vlmops::mrope {

constexpr int kMaxWarps = 8;  // of a block
constexpr int kBlocks = 4;    // of so many warps, on one multiprocessor: bounds the registers
constexpr int kAhead = 1;     // units of a warp that are on their way
// The same of the norm's backward.
constexpr int kBackwardWarps = 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBackwardBlocks = 3;  // with 4 ptxas spills
#else
constexpr int kBackwardBlocks = 4;
#endif

template <int V>
struct Floats {
  float v[V];
};

// V channels of a head: one element, or what is held and moved as words.
template <class T, int V>
using Channels = std::conditional_t<V == 1, Pack<T, 1>, Words<T, V>>;

// By one access if they lie side by side and aligned.
template <int V, bool kWide, class T>
__device__ __forceinline__ Channels<T, V> load(const T* p, int channel, int64_t stride) {
  if constexpr (kWide) {
    return load_words<V>(p + channel);
  } else if constexpr (V == 1) {
    return {p[channel * stride]};
  } else {
    return gather_words<V>(p + channel * stride, stride);
  }
}

template <int V, bool kWide, class T>
__device__ __forceinline__ void store(T* p, int channel, int64_t stride, const Channels<T, V>& x) {
  if constexpr (kWide) {
    store_words(p + channel, x);
  } else if constexpr (V == 1) {
    p[channel * stride] = x[0];
  } else {
    scatter_words(p + channel * stride, stride, x);
  }
}

template <class T, int N>
__device__ __forceinline__ Floats<N> floats_of(const Words<T, N>& x) {
  Floats<N> out;
  widen(x, out.v);
  return out;
}
template <class T>
__device__ __forceinline__ Floats<1> floats_of(const Pack<T, 1>& x) {
  return {{to_float(x[0])}};
}

template <class T, int V>
__device__ __forceinline__ Channels<T, V> channels_of(const Floats<V>& x) {
  if constexpr (V == 1) {
    return {{from_float<T>(x.v[0])}};
  } else {
    return narrow<T>(x.v);
  }
}

// V floats of shared memory, 16-byte aligned if V > 1.
template <int V>
__device__ __forceinline__ Floats<V> read(const float* p) {
  Floats<V> x;
  if constexpr (V == 1) {
    x.v[0] = *p;
  } else {
#pragma unroll
    for (int at = 0; at < V; at += 4) {
      const auto four = load_pack<4>(p + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) x.v[at + e] = four[e];
    }
  }
  return x;
}

// Where item i of a head lies. 2R channels turn; `both` is false where the rest ends within it.
template <Rotation rotation, int V>
struct Item {
  int first, second, frequency;
  bool turns, both;
  __device__ __forceinline__ Item(int i, const Params& p) {
    const int r = static_cast<int>(p.frequencies);
    turns = i < r / V;
    const bool half = rotation == Rotation::kHalf && turns;
    first = half ? i * V : 2 * i * V;
    second = first + (half ? r : V);
    frequency = i * V;
    both = second < static_cast<int>(p.head_dim);
  }
  static __host__ __device__ int count(const Params& p) {
    return static_cast<int>((p.head_dim / V + 1) / 2);
  }
};

// The packs of an item.
template <class T, int V>
struct Two {
  Channels<T, V> a, b;
};

template <bool kWide, class T, Rotation rotation, int V>
__device__ __forceinline__ Two<T, V> load_item(const T* p, const Item<rotation, V>& item,
                                               int64_t stride) {
  Two<T, V> x = {};
  x.a = load<V, kWide>(p, item.first, stride);
  if (item.both) x.b = load<V, kWide>(p, item.second, stride);
  return x;
}

template <bool kWide, class T, Rotation rotation, int V>
__device__ __forceinline__ void store_item(T* p, const Item<rotation, V>& item, int64_t stride,
                                           const Two<T, V>& x) {
  store<V, kWide>(p, item.first, stride, x.a);
  if (item.both) store<V, kWide>(p, item.second, stride, x.b);
}

// Channel e of the V pairs of an item that turns.
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

template <int V>
__device__ __forceinline__ float squares(const Floats<V>& x) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < V; ++e) sum += x.v[e] * x.v[e];
  return sum;
}

template <int V>
__device__ __forceinline__ void scale(Floats<V>& x, float factor, const float* weight) {
  const auto w = read<V>(weight);
#pragma unroll
  for (int e = 0; e < V; ++e) x.v[e] = x.v[e] * factor * w.v[e];
}

// Over the `lanes` threads of a group, a power of two; every lane of the warp must call it.
__device__ __forceinline__ float add_up(float x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

__device__ __forceinline__ float per_channel(const Params& p) {
  return __fdividef(1.0f, static_cast<float>(p.head_dim));
}

// Floats of shared memory. Packs of them are aligned, and 2V channels too many do no harm.
__host__ __device__ inline int padded_dim(const Params& p) {
  return static_cast<int>((p.head_dim + 15) / 16 * 16);
}
__host__ __device__ inline int table_size(const Params& p) {  // cosines, then sines
  return 2 * static_cast<int>((p.frequencies + 3) / 4 * 4);
}

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

// offset + weight [padded_dim], by the whole block.
__device__ inline void fill_weight(const Params& p, const Rows& rows, float* weight) {
  if (rows.norm_weight == nullptr) return;
  for (int i = threadIdx.x; i < padded_dim(p); i += blockDim.x)
    weight[i] = i < p.head_dim ? load_weight(rows, i) + p.norm_offset : 0.0f;
}

// All tokens of a call are fewer than 2^31: the launcher sees to it.
struct Token {
  int b, s;  // batch, place in it
  __device__ __forceinline__ Token(const Params& p, int token) : b(0), s(token) {
    if (p.batch == 1) return;
    const int tokens = static_cast<int>(p.tokens);
    b = token / tokens;
    s = token - b * tokens;
  }
  __device__ __forceinline__ int64_t offset(const int64_t* stride) const {
    return b * stride[0] + s * stride[1];
  }
};

constexpr int kFewAxes = 4;

// ids[a] of the axes, or if there are more, ids[0] of the one that is asked for.
template <class I>
__device__ __forceinline__ float load_id(const Params& p, int64_t at, const int32_t* axis_of) {
  const I* const ids = static_cast<const I*>(p.position_ids) + at;
  if (p.axes > kFewAxes) {
    const int64_t axis = max(0, min(*axis_of, static_cast<int>(p.axes) - 1));
    return static_cast<float>(ids[axis * p.id_stride[0]]);
  }
  // All of them, not to wait for the axis first: two misses one after the other are most of the
  // time of a decoded token. Axes are clamped, since nobody looked: that takes a sync.
  const int last = static_cast<int>(p.axes) - 1;
  I id[kFewAxes];
#pragma unroll
  for (int a = 0; a < kFewAxes; ++a) id[a] = ids[min(a, last) * p.id_stride[0]];
  const int axis = max(0, min(*axis_of, last));
  return static_cast<float>(axis == 0 ? id[0] : axis == 1 ? id[1] : axis == 2 ? id[2] : id[3]);
}

// Cosines and sines of a token, by the whole block.
__device__ inline void fill_table(const Params& p, const Token& token, float* table) {
  const int r = static_cast<int>(p.frequencies);
  const int64_t at = token.b * p.id_stride[1] + token.s * p.id_stride[2];
  for (int j = threadIdx.x; j < r; j += blockDim.x) {
    const float frequency = p.inv_freq[j];
    float id = 0.0f;
    switch (p.id_type) {
      case IntType::kInt64:
        id = load_id<int64_t>(p, at, p.freq_axis + j);
        break;
      case IntType::kInt32:
        id = load_id<int32_t>(p, at, p.freq_axis + j);
        break;
      case IntType::kInt16:
        id = load_id<int16_t>(p, at, p.freq_axis + j);
        break;
      case IntType::kInt8:
        id = load_id<int8_t>(p, at, p.freq_axis + j);
        break;
      case IntType::kUInt8:
        id = load_id<uint8_t>(p, at, p.freq_axis + j);
        break;
    }
    float c, s;
    sincos_any(__fmul_rn(id, frequency), c, s);
    table[j] = c * p.scaling;
    table[table_size(p) / 2 + j] = s * p.sine_sign * p.scaling;
  }
}

// The cosines and sines of an item, for all heads.
template <int V>
struct Turn {
  Floats<V> c, s;
  template <Rotation rotation>
  __device__ __forceinline__ void take(const Params& p, const float* table,
                                       const Item<rotation, V>& item) {
    if (!item.turns) return;
    c = read<V>(table + item.frequency);
    s = read<V>(table + table_size(p) / 2 + item.frequency);
  }
};

// What a lane does: item `lane % lanes` of head `lane / lanes` of a unit of `at_once` heads.
struct Place {
  int at_once, group, item;
  bool mine;  // else the lane only helps to add up
  __device__ __forceinline__ Place(int lanes, int items) {
    const int lane = threadIdx.x % kWarpSize;
    at_once = kWarpSize / lanes;
    group = lane / lanes;
    item = lane % lanes;
    mine = group < at_once && item < items;
    if (!mine) item = 0;
  }
  __host__ __device__ static int units(int64_t heads, int at_once) {
    return static_cast<int>((heads + at_once - 1) / at_once);
  }
};

// Of this thread, as a value that the compiler knows to be the warp's.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / kWarpSize), 0);
}

// This lane's head of a unit. All but the lane's part is the warp's.
template <class T>
__device__ __forceinline__ T* head_at(T* base, const Token& token, const int64_t* stride,
                                      int first_head, int group) {
  return base + (token.offset(stride) + first_head * stride[2]) + group * stride[2];
}

// A block has a token, or with few tokens a share of its units, which its warps take in turn. Items
// fit a warp: head_dim <= 64 V. `lanes` is a power of two where there is a norm.
template <class T, Rotation rotation, int V, bool kWide, bool kNorm>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kBlocks)
    mrope_kernel(const VLMOPS_GRID_CONSTANT Params p, int lanes) {
  VLMOPS_DYNAMIC_SHARED(float, memory);
  float* const table = memory + (kNorm ? 2 * padded_dim(p) : 0);
  const Place place(lanes, Item<rotation, V>::count(p));
  const Item<rotation, V> item(place.item, p);
  const Token token(p, blockIdx.x);
  const int q_units = Place::units(p.rows[0].heads, place.at_once);
  const int units = q_units + Place::units(p.rows[1].heads, place.at_once);
  const int warps = blockDim.x / kWarpSize, stride = gridDim.y * warps;
  const int first = blockIdx.y * warps + warp_index();

  const auto fetch = [&](int unit) {
    const bool is_k = unit >= q_units;
    const Rows& rows = p.rows[is_k];
    const int head = (unit - (is_k ? q_units : 0)) * place.at_once + place.group;
    if (!place.mine || head >= rows.heads) return Two<T, V>{};
    return load_item<kWide>(
        static_cast<const T*>(rows.src) + token.offset(rows.src_stride) + head * rows.src_stride[2],
        item, rows.src_stride[3]);
  };
  Two<T, V> coming[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (first + i * stride < units) coming[i] = fetch(first + i * stride);
  fill_table(p, token, table);
  if constexpr (kNorm) {
    fill_weight(p, p.rows[0], memory);
    fill_weight(p, p.rows[1], memory + padded_dim(p));
  }
  __syncthreads();

  const float channel_part = per_channel(p);
  const auto rotate = [&](int unit, const Two<T, V>& x) {
    const bool is_k = unit >= q_units;
    const Rows& rows = p.rows[is_k];
    const int head = (unit - (is_k ? q_units : 0)) * place.at_once;
    const bool active = place.mine && head + place.group < rows.heads;
    T* dst = head_at(static_cast<T*>(rows.dst), token, rows.dst_stride, head, place.group);
    const bool normed = kNorm && rows.norm_weight != nullptr;
    if (normed || item.turns) {
      auto a = floats_of(x.a), b = floats_of(x.b);
      if (normed) {
        const float mean = add_up(squares(a) + squares(b), lanes) * channel_part;
        const float factor = rsqrtf(mean + p.norm_eps);
        const float* weight = memory + (is_k ? padded_dim(p) : 0);
        scale(a, factor, weight + item.first);
        scale(b, factor, weight + item.second);
      }
      if (item.turns) {
        Turn<V> turns;
        turns.take(p, table, item);
        turn<rotation>(a, b, turns.c, turns.s);
      }
      if (active)
        store_item<kWide>(dst, item, rows.dst_stride[3],
                          Two<T, V>{channels_of<T>(a), channels_of<T>(b)});
    } else if (active && rows.src != rows.dst) {  // moved as it is
      store_item<kWide>(dst, item, rows.dst_stride[3], x);
    }
  };
  for (int unit = first; unit < units; unit += kAhead * stride) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (unit + i * stride >= units) break;
      const Two<T, V> x = coming[i];
      if (unit + (i + kAhead) * stride < units) coming[i] = fetch(unit + (i + kAhead) * stride);
      rotate(unit + i * stride, x);
    }
  }
}

// Any sizes and strides: a unit is a head, items take turns, with a norm they are read twice.
template <class T, Rotation rotation, bool kNorm>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kBlocks)
    mrope_any_kernel(const VLMOPS_GRID_CONSTANT Params p) {
  VLMOPS_DYNAMIC_SHARED(float, memory);
  float* const table = memory + (kNorm ? 2 * padded_dim(p) : 0);
  const Token token(p, blockIdx.x);
  fill_table(p, token, table);
  if constexpr (kNorm) {
    fill_weight(p, p.rows[0], memory);
    fill_weight(p, p.rows[1], memory + padded_dim(p));
  }
  __syncthreads();
  const int warps = blockDim.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int items = Item<rotation, 1>::count(p);
  const int64_t heads = p.rows[0].heads + p.rows[1].heads;
  for (int64_t i = blockIdx.y * warps + threadIdx.x / kWarpSize; i < heads;
       i += gridDim.y * warps) {
    const bool is_k = i >= p.rows[0].heads;
    const Rows& rows = p.rows[is_k];
    const int64_t head = i - (is_k ? p.rows[0].heads : 0);
    const T* src =
        static_cast<const T*>(rows.src) + token.offset(rows.src_stride) + head * rows.src_stride[2];
    T* dst = static_cast<T*>(rows.dst) + token.offset(rows.dst_stride) + head * rows.dst_stride[2];
    const float* weight = memory + (is_k ? padded_dim(p) : 0);
    float factor = 1.0f;
    const bool normed = kNorm && rows.norm_weight != nullptr;
    if (normed) {
      float sum = 0.0f;
      for (int at = lane; at < items; at += kWarpSize) {
        const auto x = load_item<false>(src, Item<rotation, 1>(at, p), rows.src_stride[3]);
        sum += squares(floats_of(x.a)) + squares(floats_of(x.b));
      }
      factor = rsqrtf(add_up(sum, kWarpSize) * per_channel(p) + p.norm_eps);
    }
    for (int at = lane; at < items; at += kWarpSize) {
      const Item<rotation, 1> item(at, p);
      if (!item.turns && !normed && rows.src == rows.dst) break;
      auto x = load_item<false>(src, item, rows.src_stride[3]);
      auto a = floats_of(x.a), b = floats_of(x.b);
      if (normed) {
        scale(a, factor, weight + item.first);
        scale(b, factor, weight + item.second);
      }
      if (item.turns) {
        Turn<1> turns;
        turns.take(p, table, item);
        turn<rotation>(a, b, turns.c, turns.s);
      }
      if (item.turns || normed) x = {channels_of<T>(a), channels_of<T>(b)};
      store_item<false>(dst, item, rows.dst_stride[3], x);
    }
  }
}

// Of V channels in the norm's backward, where g is the gradient rotated back. Adds to the head's
// sums of x^2 and of w g x.
template <int V>
__device__ __forceinline__ void add_products(const Floats<V>& g, const Floats<V>& x,
                                             const float* weight, float& square, float& product) {
  const auto w = read<V>(weight);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    square += x.v[e] * x.v[e];
    product += w.v[e] * g.v[e] * x.v[e];
  }
}

// Adds g r x to the sums, and turns g into dx = r w g - x k, with k = r^2 mean.
template <int V>
__device__ __forceinline__ void norm_gradient(Floats<V>& g, const Floats<V>& x, const float* weight,
                                              float* sums, float r, float k) {
  const auto w = read<V>(weight);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float scaled = r * g.v[e];
    sums[e] += scaled * x.v[e];
    g.v[e] = w.v[e] * scaled - x.v[e] * k;
  }
}

// Shared memory of the norm's backward: weights of q and k, sums of every warp, tables.
struct Shared {
  float *weight, *sums, *table;
  __device__ Shared(float* memory, const Params& p, int rows_of_sums)
      : weight(memory),
        sums(weight + 2 * padded_dim(p)),
        table(sums + rows_of_sums * padded_dim(p)) {}
  static size_t bytes(const Params& p, int rows_of_sums, int tables) {
    return sizeof(float) * ((2 + rows_of_sums) * padded_dim(p) + tables * table_size(p));
  }
};

// The first q_warps warps of a block have q's units of a token, the others k's; a block goes over
// the tokens in steps of the grid. partial [grid, 2, head_dim].
template <class T, Rotation rotation, int V, bool kWide>
__global__ void __launch_bounds__(kBackwardWarps* kWarpSize, kBackwardBlocks)
    mrope_norm_backward_kernel(const VLMOPS_GRID_CONSTANT Params p, int lanes, int q_warps,
                               float* partial) {
  VLMOPS_DYNAMIC_SHARED(float, memory);
  const int warps = blockDim.x / kWarpSize, warp = warp_index();
  const Place place(lanes, Item<rotation, V>::count(p));
  const Item<rotation, V> item(place.item, p);
  const Shared shared(memory, p, warps * place.at_once);
  const bool is_k = warp >= q_warps;
  const Rows& rows = p.rows[is_k];
  const int units = Place::units(rows.heads, place.at_once);
  const int first = is_k ? warp - q_warps : warp, stride = is_k ? warps - q_warps : q_warps;
  const bool normed = rows.norm_weight != nullptr;
  const float* const weight = shared.weight + (is_k ? padded_dim(p) : 0);
  const float channel_part = per_channel(p);
  const int tokens = static_cast<int>(p.batch * p.tokens);
  fill_weight(p, p.rows[0], shared.weight);
  fill_weight(p, p.rows[1], shared.weight + padded_dim(p));
  if (static_cast<int>(blockIdx.x) < tokens) fill_table(p, Token(p, blockIdx.x), shared.table);
  __syncthreads();

  Floats<V> sa = {}, sb = {};
  int current = 0;
  for (int index = blockIdx.x; index < tokens; index += gridDim.x) {
    const Token token(p, index);
    const float* const table = shared.table + current * table_size(p);
    current ^= 1;
    for (int unit = first; unit < units; unit += stride) {
      const int head = unit * place.at_once;
      const bool active = place.mine && head + place.group < rows.heads;
      Two<T, V> g = {}, x = {};
      if (active) {
        g = load_item<kWide>(
            head_at(static_cast<const T*>(rows.src), token, rows.src_stride, head, place.group),
            item, rows.src_stride[3]);
        if (normed)
          x = load_item<kWide>(
              head_at(static_cast<const T*>(rows.x), token, rows.x_stride, head, place.group), item,
              rows.x_stride[3]);
      }
      T* dst = head_at(static_cast<T*>(rows.dst), token, rows.dst_stride, head, place.group);
      if (normed || item.turns) {
        auto a = floats_of(g.a), b = floats_of(g.b);
        if (item.turns) {
          Turn<V> turns;
          turns.take(p, table, item);
          turn<rotation>(a, b, turns.c, turns.s);
        }
        if (normed) {
          float square = 0.0f, product = 0.0f;
          add_products(a, floats_of(x.a), weight + item.first, square, product);
          add_products(b, floats_of(x.b), weight + item.second, square, product);
          const float r = rsqrtf(add_up(square, lanes) * channel_part + p.norm_eps);
          const float k = r * r * (r * add_up(product, lanes) * channel_part);
          norm_gradient(a, floats_of(x.a), weight + item.first, sa.v, r, k);
          norm_gradient(b, floats_of(x.b), weight + item.second, sb.v, r, k);
        }
        if (active && rows.needs_grad)
          store_item<kWide>(dst, item, rows.dst_stride[3],
                            Two<T, V>{channels_of<T>(a), channels_of<T>(b)});
      } else if (active && rows.needs_grad) {  // moved as it is
        store_item<kWide>(dst, item, rows.dst_stride[3], g);
      }
    }
    const int next = index + static_cast<int>(gridDim.x);
    if (next < tokens) fill_table(p, Token(p, next), shared.table + current * table_size(p));
    __syncthreads();
  }

  const int row = padded_dim(p);
  if (place.mine) {
    float* sums = shared.sums + (warp * place.at_once + place.group) * row;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      sums[item.first + e] = sa.v[e];
      if (item.both) sums[item.second + e] = sb.v[e];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * p.head_dim; i += blockDim.x) {
    const bool of_k = i >= p.head_dim;
    if (!p.rows[of_k].needs_weight_grad) continue;
    const int channel = i - (of_k ? static_cast<int>(p.head_dim) : 0);
    const int begin = (of_k ? q_warps : 0) * place.at_once;
    const int end = (of_k ? warps : q_warps) * place.at_once;
    float sum = 0.0f;
    for (int at = begin; at < end; ++at) sum += shared.sums[at * row + channel];
    partial[blockIdx.x * 2 * p.head_dim + i] = sum;
  }
}

// Any sizes and strides. A warp has its sums [padded_dim] in shared memory.
template <class T, Rotation rotation>
__global__ void __launch_bounds__(kBackwardWarps* kWarpSize, kBackwardBlocks)
    mrope_norm_backward_any_kernel(const VLMOPS_GRID_CONSTANT Params p, int q_warps,
                                   float* partial) {
  VLMOPS_DYNAMIC_SHARED(float, memory);
  const int warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int row = padded_dim(p), items = Item<rotation, 1>::count(p);
  const Shared shared(memory, p, warps);
  const bool is_k = warp >= q_warps;
  const Rows& rows = p.rows[is_k];
  const int first = is_k ? warp - q_warps : warp, stride = is_k ? warps - q_warps : q_warps;
  const bool normed = rows.norm_weight != nullptr;
  const float* const weight = shared.weight + (is_k ? row : 0);
  float* const sums = shared.sums + warp * row;
  for (int i = lane; i < row; i += kWarpSize) sums[i] = 0.0f;
  fill_weight(p, p.rows[0], shared.weight);
  fill_weight(p, p.rows[1], shared.weight + row);
  const int tokens = static_cast<int>(p.batch * p.tokens);
  for (int index = blockIdx.x; index < tokens; index += gridDim.x) {
    const Token token(p, index);
    __syncthreads();  // nobody reads the last token's table any more
    fill_table(p, token, shared.table);
    __syncthreads();
    for (int64_t head = first; head < rows.heads; head += stride) {
      const T* grad = static_cast<const T*>(rows.src) + token.offset(rows.src_stride) +
                      head * rows.src_stride[2];
      const T* from =
          static_cast<const T*>(rows.x) + token.offset(rows.x_stride) + head * rows.x_stride[2];
      T* dst =
          static_cast<T*>(rows.dst) + token.offset(rows.dst_stride) + head * rows.dst_stride[2];
      // Of an item: the gradient rotated back, and x.
      const auto fetch = [&](const Item<rotation, 1>& item, Floats<1>& a, Floats<1>& b) {
        const auto g = load_item<false>(grad, item, rows.src_stride[3]);
        a = floats_of(g.a);
        b = floats_of(g.b);
        if (item.turns) {
          Turn<1> turns;
          turns.take(p, shared.table, item);
          turn<rotation>(a, b, turns.c, turns.s);
        }
        return normed ? load_item<false>(from, item, rows.x_stride[3]) : g;
      };
      Floats<1> a, b;
      float r = 1.0f, k = 0.0f;
      if (normed) {
        float square = 0.0f, product = 0.0f;
        for (int i = lane; i < items; i += kWarpSize) {
          const Item<rotation, 1> item(i, p);
          const auto x = fetch(item, a, b);
          add_products(a, floats_of(x.a), weight + item.first, square, product);
          add_products(b, floats_of(x.b), weight + item.second, square, product);
        }
        r = rsqrtf(add_up(square, kWarpSize) * per_channel(p) + p.norm_eps);
        k = r * r * (r * add_up(product, kWarpSize) * per_channel(p));
      }
      for (int i = lane; i < items; i += kWarpSize) {
        const Item<rotation, 1> item(i, p);
        const auto x = fetch(item, a, b);
        if (normed) {
          norm_gradient(a, floats_of(x.a), weight + item.first, sums + item.first, r, k);
          norm_gradient(b, floats_of(x.b), weight + item.second, sums + item.second, r, k);
        }
        if (!rows.needs_grad) continue;
        const Two<T, 1> y = {channels_of<T>(a), channels_of<T>(b)};
        store_item<false>(dst, item, rows.dst_stride[3], item.turns || normed ? y : x);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * p.head_dim; i += blockDim.x) {
    const bool of_k = i >= p.head_dim;
    if (!p.rows[of_k].needs_weight_grad) continue;
    const int channel = i - (of_k ? static_cast<int>(p.head_dim) : 0);
    float sum = 0.0f;
    for (int at = of_k ? q_warps : 0; at < (of_k ? warps : q_warps); ++at)
      sum += shared.sums[at * row + channel];
    partial[blockIdx.x * 2 * p.head_dim + i] = sum;
  }
}

constexpr int kSlices = 32;  // of the rows of partial sums

// q_weight_grad, k_weight_grad [D]: the sums of partial [parts, 2, D] in their order. Grid (D / 32,
// 2), block (32, kSlices).
__global__ void __launch_bounds__(kWarpSize* kSlices)
    mrope_weight_grad_kernel(const VLMOPS_GRID_CONSTANT Params p, const float* partial, int parts,
                             float* q_weight_grad, float* k_weight_grad) {
  VLMOPS_SHARED(double, sums, kSlices* kWarpSize);
  float* const out = blockIdx.y == 0 ? q_weight_grad : k_weight_grad;
  if (out == nullptr) return;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  const bool mine = channel < p.head_dim;
  const float* const column = partial + blockIdx.y * p.head_dim + channel;
  double sum = 0.0;
  if (mine) {
#pragma unroll 8
    for (int part = threadIdx.y; part < parts; part += kSlices)
      sum += column[part * 2 * p.head_dim];
  }
  sums[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || !mine) return;
  for (int i = 1; i < kSlices; ++i) sum += sums[i * kWarpSize + threadIdx.x];
  out[channel] = static_cast<float>(sum);
}

}  // namespace vlmops::mrope
