// M-RoPE on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
// For every token and frequency j, with the axis a = freq_axis[j]:
//   angle = float32(id[a]) * inv_freq[j];   c, s = scaling * (cos(angle), sin(angle))
// and for every head, with channels (m, n) = (j, j + R) for rotation "half", (2j, 2j + 1) for
// "pairs":
//   y[m] = x[m] c - x[n] s;   y[n] = x[n] c + x[m] s
// Backward is the same with -s.
//
// Bytes: (Hq + Hk) * D * sizeof(T) read and written per token; ids and frequencies are noise. At
// Qwen2-VL-7B's shape, 28 + 4 heads of 128, that is 32 KiB a token in float32. torch's copy of it
// takes 1.15 us on two cores of a Zen 4, since it reads what it overwrites; in place takes 0.7.
// c and s of a block of tokens are computed once into L1 and shared by all heads of q and k, so a
// [A, B, S, D] tensor never exists; in float64 they cost 0.13 us a token and thread, a fifth of the
// time of bfloat16 in place.
//
// Towers: 16 + 16 heads of 80 are 5 KiB a token in bfloat16, and 40 angles: 0.1 of 0.57 us a token
// and thread in the cache; out of memory it takes 1.1 us, and a copy by one thread 0.9.
//
// With a norm (RMSNorm of every head over D, before its rotation) x[m] stands for
//   x[m] * rsqrt(mean(x^2) + eps) * (offset + weight[m])
// It moves the same bytes: a head is summed, then rotated out of L1. The arithmetic grows from 3 to
// 7 operations a channel. Expected was 1.4 of the time without a norm where everything lies in the
// cache, measured is 1.5 (33 against 21 ns for 128 channels of bfloat16): 1.5 to 2 copies by one
// thread. float32 stays below 1.
//
// Backward with a norm reads x and the gradient and writes dx, one head at a time in float32 in L1.
// With g the gradient rotated back, r = rsqrt(mean(x^2) + eps), w = offset + weight:
//   dx = r * (w g - r x * mean(w g r x));   dweight = sum over tokens and heads of g r x
//
// Arithmetic is float32 with one rounding to T at the store. The loops run along the channels with
// a ladder of vector widths (16, 8, 4, 1), so D = 72, 80, 88 need no masks.
#pragma once

#include "common/sincos.h"
#include "ops/mrope/mrope.h"

namespace vlmops::mrope {
namespace {

constexpr int64_t kTableFloats = 4096;                  // 16 KiB: half of the smallest L1
constexpr int64_t kMaxBlock = kTableFloats / (2 * 16);  // tokens, with the fewest frequencies

// How a token's cosines lie in its row of the table; the sines follow in the same order.
enum class Order {
  kPlain,    // c0 c1 c2 ..
  kEvenOdd,  // c0 c2 c4 .. | c1 c3 c5 ..
  kDoubled,  // c0 c0 c1 c1 .., the sines -s0 s0 -s1 s1 ..
};

// bfloat16 is read two channels to a word (EvenOdd in simd.h), the others one by one.
template <Rotation rotation, class T>
constexpr Order kOrder = rotation == Rotation::kHalf ? Order::kPlain : Order::kDoubled;
template <>
constexpr Order kOrder<Rotation::kHalf, bfloat16> = Order::kEvenOdd;
template <>
constexpr Order kOrder<Rotation::kPairs, bfloat16> = Order::kPlain;

template <class T>
constexpr bool kInWords = false;
template <>
constexpr bool kInWords<bfloat16> = true;

// Handed on by value: stores of vectors alias everything, so what lies in memory would be read
// again after each of them.
struct Offsets {
  int64_t padded;  // R rounded up to 16, the granule of sincos
  int64_t sine;    // of the sines in a row
};

// The table of a block of tokens, and the frequencies in its order.
struct Table {
  Offsets at;
  int64_t row;  // floats per token
  float inv_freq[kMaxFrequencies];
  int32_t freq_axis[kMaxFrequencies];
  alignas(64) float rows[kTableFloats];
};

template <Order order>
inline void init_table(const Params& p, Table& t) {
  t.at.padded = p.frequencies == 0 ? 16 : (p.frequencies + 15) / 16 * 16;
  t.at.sine = order == Order::kDoubled ? 2 * t.at.padded : t.at.padded;
  t.row = 2 * t.at.sine;
  for (int64_t j = 0; j < t.at.padded; ++j) {
    const int64_t at = order == Order::kEvenOdd ? j / 2 + (j % 2) * (t.at.padded / 2) : j;
    t.inv_freq[at] = j < p.frequencies ? p.inv_freq[j] : 0.0f;
    t.freq_axis[at] = j < p.frequencies ? p.freq_axis[j] : 0;
  }
}

// The angles of one token, where its cosines will be.
inline void fill_angles(const Params& p, const Table& t, int64_t token, float* angle) {
  float position[kMaxAxes];
  const int64_t b = token / p.tokens, s = token % p.tokens;
  for (int64_t axis = 0; axis < p.axes; ++axis) {
    const int64_t offset = axis * p.id_stride[0] + b * p.id_stride[1] + s * p.id_stride[2];
    position[axis] = static_cast<float>(load_int(p.position_ids, p.id_type, offset));
  }
  for (int64_t j = 0; j < t.at.padded; ++j) angle[j] = position[t.freq_axis[j]] * t.inv_freq[j];
}

template <Order order>
inline void angles_to_row(const Params& p, const Table& t, float* row) {
  const float sine_scale = p.sine_sign * p.scaling;
  float* sines = row + t.at.sine;
  if constexpr (order == Order::kDoubled) {
    float cosine[kMaxFrequencies], sine[kMaxFrequencies];
    sincos(row, cosine, sine, t.at.padded);
    for (int64_t j = 0; j < p.frequencies; ++j) {
      row[2 * j] = row[2 * j + 1] = cosine[j] * p.scaling;
      sines[2 * j] = -sine[j] * sine_scale;
      sines[2 * j + 1] = sine[j] * sine_scale;
    }
  } else {
    sincos(row, row, sines, t.at.padded);
    for (int64_t j = 0; j < t.at.padded; ++j) row[j] *= p.scaling;
    for (int64_t j = 0; j < t.at.padded; ++j) sines[j] *= sine_scale;
  }
}

// All angles first: read back at once, their narrow stores would stall the wide loads of sincos.
template <Order order>
inline void fill_table(const Params& p, Table& t, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) fill_angles(p, t, i, t.rows + (i - first) * t.row);
  for (int64_t i = first; i < last; ++i) angles_to_row<order>(p, t, t.rows + (i - first) * t.row);
}

// The vectors of N lanes that a rotation reads, turns and writes at once, for each way in which
// channels lie: `i` is their first channel, `at` the place of its cosine. place(v, ..) is where
// vector v lies among all channels in kernel order: float32, the lanes of a vector side by side.
// Weights and everything in backward lie so.
template <int N, int K>
struct Vectors {
  Vec<float, N> v[K];
};

// x[j], x[R + j]; c, s plain.
struct Half {
  VLMOPS_INLINE static int64_t place(int v, int64_t at, Offsets o) { return at + v * o.padded; }

  template <int N, class T>
  VLMOPS_INLINE static Vectors<N, 2> read(const T* x, int64_t i, int64_t r) {
    return {{load<N>(x + i), load<N>(x + r + i)}};
  }
  template <int N, class T>
  VLMOPS_INLINE static void write(T* y, int64_t i, int64_t r, const Vectors<N, 2>& u) {
    store<N>(y + i, u.v[0]);
    store<N>(y + r + i, u.v[1]);
  }
  template <int N>
  VLMOPS_INLINE static Vectors<N, 2> turn(const Vectors<N, 2>& u, const float* row, int64_t at,
                                          Offsets o) {
    const auto a = u.v[0], b = u.v[1];
    const auto cosine = load<N>(row + at), sine = load<N>(row + o.sine + at);
    return {{a * cosine - b * sine, b * cosine + a * sine}};
  }
};

// The same for bfloat16 in words: even channels, odd channels of either half; c, s even before odd.
struct HalfWords {
  VLMOPS_INLINE static int64_t place(int v, int64_t at, Offsets o) {
    return at + (v % 2) * (o.padded / 2) + (v / 2) * o.padded;
  }

  template <int N>
  VLMOPS_INLINE static Vectors<N, 4> read(const bfloat16* x, int64_t i, int64_t r) {
    const auto a = load_even_odd<N>(x + i), b = load_even_odd<N>(x + r + i);
    return {{a.even, a.odd, b.even, b.odd}};
  }
  template <int N>
  VLMOPS_INLINE static void write(bfloat16* y, int64_t i, int64_t r, const Vectors<N, 4>& u) {
    store_even_odd<N>(y + i, u.v[0], u.v[1]);
    store_even_odd<N>(y + r + i, u.v[2], u.v[3]);
  }
  template <int N>
  VLMOPS_INLINE static Vectors<N, 4> turn(const Vectors<N, 4>& u, const float* row, int64_t at,
                                          Offsets o) {
    const auto even = Half::turn<N>({{u.v[0], u.v[2]}}, row, at, o);
    const auto odd = Half::turn<N>({{u.v[1], u.v[3]}}, row, at + o.padded / 2, o);
    return {{even.v[0], odd.v[0], even.v[1], odd.v[1]}};
  }
};

// x[2j], x[2j + 1] side by side; c, s doubled.
struct Pairs {
  VLMOPS_INLINE static int64_t place(int, int64_t at, Offsets) { return at; }

  template <int N, class T>
  VLMOPS_INLINE static Vectors<N, 1> read(const T* x, int64_t i, int64_t) {
    return {{load<N>(x + i)}};
  }
  template <int N, class T>
  VLMOPS_INLINE static void write(T* y, int64_t i, int64_t, const Vectors<N, 1>& u) {
    store<N>(y + i, u.v[0]);
  }
  template <int N>
  VLMOPS_INLINE static Vectors<N, 1> turn(const Vectors<N, 1>& u, const float* row, int64_t at,
                                          Offsets o) {
    const auto v = u.v[0];
    return {{v * load<N>(row + at) + swap_neighbours<N>(v) * load<N>(row + o.sine + at)}};
  }
};

// The same for bfloat16 in words: even channels, odd channels; c, s plain.
struct PairsWords {
  VLMOPS_INLINE static int64_t place(int v, int64_t at, Offsets o) { return at + v * o.padded; }

  template <int N>
  VLMOPS_INLINE static Vectors<N, 2> read(const bfloat16* x, int64_t i, int64_t) {
    const auto v = load_even_odd<N>(x + i);
    return {{v.even, v.odd}};
  }
  template <int N>
  VLMOPS_INLINE static void write(bfloat16* y, int64_t i, int64_t, const Vectors<N, 2>& u) {
    store_even_odd<N>(y + i, u.v[0], u.v[1]);
  }
  template <int N>
  VLMOPS_INLINE static Vectors<N, 2> turn(const Vectors<N, 2>& u, const float* row, int64_t at,
                                          Offsets o) {
    return Half::turn<N>(u, row, at, o);
  }
};

// Calls f(set, lanes, i, at) for channels from i on, over [0, end) in steps of kStep * lanes
// channels, with the machine's vector width and then every narrower one down to kNarrowest. Returns
// the first channel not done.
template <class Set, int kStep, int kNarrowest, class F>
VLMOPS_INLINE int64_t widths(int64_t end, const F& f) {
  int64_t i = 0;
  const auto run = [&](auto lanes) VLMOPS_INLINED {
    constexpr int step = kStep * decltype(lanes)::value;
    for (; i + step <= end; i += step) f(Set{}, lanes, i, i / kStep);
  };
  if constexpr (kFloats >= 16) run(Lanes<16>{});
  if constexpr (kFloats >= 8) run(Lanes<8>{});
  run(Lanes<4>{});
  run(Lanes<kNarrowest>{});
  return i;
}

// All channels that are rotated.
template <Rotation rotation, class T, class F>
VLMOPS_INLINE void each_set(int64_t r, const F& f) {
  constexpr Order order = kOrder<rotation, T>;
  if constexpr (order == Order::kEvenOdd) {
    const int64_t i = widths<HalfWords, 2, 1>(r, f);
    if (i < r) f(Half{}, Lanes<1>{}, i, i / 2);  // an odd R leaves one even channel
  } else if constexpr (rotation == Rotation::kHalf) {
    widths<Half, 1, 1>(r, f);
  } else if constexpr (order == Order::kDoubled) {
    widths<Pairs, 1, 2>(2 * r, f);
  } else {
    widths<PairsWords, 2, 1>(2 * r, f);
  }
}

// Channels [2R, D), which follow the others in kernel order: f(lanes, channel, place).
template <class F>
VLMOPS_INLINE void each_rest(const Params& p, const Table& t, const F& f) {
  const int64_t first = 2 * p.frequencies;
  widths<Pairs, 1, 1>(p.head_dim - first,
                      [&](Pairs, auto lanes, int64_t i, int64_t)
                          VLMOPS_INLINED { f(lanes, first + i, 2 * t.at.padded + i); });
}

template <Rotation rotation, class T>
inline int64_t place_of(int64_t channel, const Params& p, const Table& t) {
  const int64_t r = p.frequencies;
  if (channel >= 2 * r) return 2 * t.at.padded + channel - 2 * r;
  if constexpr (kOrder<rotation, T> == Order::kDoubled) return channel;
  if constexpr (rotation == Rotation::kPairs) return channel / 2 + (channel % 2) * t.at.padded;
  const int64_t second = channel >= r, j = channel - second * r;
  if constexpr (kOrder<rotation, T> == Order::kEvenOdd)
    return second * t.at.padded + j / 2 + (j % 2) * (t.at.padded / 2);
  return second * t.at.padded + j;
}

// Floats of a head in kernel order, gaps included.
inline int64_t flat_size(const Params& p, const Table& t) {
  return 2 * t.at.padded + (p.head_dim - 2 * p.frequencies + 15) / 16 * 16;
}
constexpr int64_t kMaxFlat = kMaxNormDim + 3 * 16;

// The weights of a norm plus the offset, in kernel order; zeros in the gaps.
template <Rotation rotation, class T>
inline void init_weight(const Params& p, const Rows& rows, const Table& t, float* weight) {
  for (int64_t i = 0; i < flat_size(p, t); ++i) weight[i] = 0.0f;
  const auto fill = [&](const auto* source) {
    for (int64_t channel = 0; channel < p.head_dim; ++channel) {
      const float w = load<1>(source + channel * rows.norm_stride)[0] + p.norm_offset;
      weight[place_of<rotation, T>(channel, p, t)] = w == w ? w : __builtin_nanf("");
    }
  };
  switch (rows.norm_dtype) {
    case DType::kFloat32:
      return fill(static_cast<const float*>(rows.norm_weight));
    case DType::kBFloat16:
      return fill(static_cast<const bfloat16*>(rows.norm_weight));
    case DType::kFloat16:
      return fill(static_cast<const float16*>(rows.norm_weight));
  }
}

// A sum in 16 lanes, and so in the same order, on AVX2 and AVX-512.
struct Sum {
  static constexpr int kParts = 16 / kFloats;
  Vec<float, kFloats> part[kParts] = {};

  VLMOPS_INLINE float total() const {
    Vec<float, kFloats> folded[kParts];
    for (int n = 0; n < kParts; ++n) folded[n] = part[n];
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int n = 0; n < half; ++n) folded[n] += folded[n + half];
    return sum_lanes<kFloats>(folded[0]);
  }
};

// Of d adjacent channels.
template <class T>
inline float sum_of_squares(const T* x, int64_t d) {
  Sum sum;
  int64_t i = 0;
  if constexpr (kInWords<T>) {
    Sum odd;
    for (; i + 32 <= d; i += 32) {
      for (int n = 0; n < Sum::kParts; ++n) {
        const auto v = load_even_odd<kFloats>(x + i + 2 * n * kFloats);
        sum.part[n] += v.even * v.even;
        odd.part[n] += v.odd * v.odd;
      }
    }
    for (int n = 0; n < Sum::kParts; ++n) sum.part[n] += odd.part[n];
  } else {
    for (; i + 16 <= d; i += 16) {
      for (int n = 0; n < Sum::kParts; ++n) {
        const auto v = load<kFloats>(x + i + n * kFloats);
        sum.part[n] += v * v;
      }
    }
  }
  float total = sum.total();
  for (; i < d; ++i) total += load<1>(x + i)[0] * load<1>(x + i)[0];
  return total;
}

inline float norm_scale(const Params& p, float sum_of_squares) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(p.head_dim) + p.norm_eps);
}

struct NoNorm {
  static constexpr bool kNone = true;
  template <int N>
  Vec<float, N> of(Vec<float, N> v, int64_t) const {
    return v;
  }
};

struct Norm {
  static constexpr bool kNone = false;
  const float* weight;  // kernel order
  float scale;

  template <int N>
  Vec<float, N> of(Vec<float, N> v, int64_t place) const {
    return v * scale * load<N>(weight + place);
  }
};

// One head with adjacent channels. x may be y. Without a norm [2R, D) is left alone.
template <Rotation rotation, class T, class N>
VLMOPS_INLINE void rotate_head(const Params& p, const Table& t, const float* row, const T* x, T* y,
                               const N norm) {
  const int64_t r = p.frequencies;
  const Offsets o = t.at;
  each_set<rotation, T>(r, [&](auto set, auto lanes, int64_t i, int64_t at) VLMOPS_INLINED {
    constexpr int n = decltype(lanes)::value;
    auto u = set.template read<n>(x, i, r);
    int vector = 0;
    for (auto& v : u.v) v = norm.template of<n>(v, set.place(vector++, at, o));
    set.template write<n>(y, i, r, set.template turn<n>(u, row, at, o));
  });
  if constexpr (!N::kNone) {
    each_rest(p, t, [&](auto lanes, int64_t channel, int64_t place) VLMOPS_INLINED {
      constexpr int n = decltype(lanes)::value;
      store<n>(y + channel, norm.template of<n>(load<n>(x + channel), place));
    });
  }
}

// x, or its n channels side by side in buffer if they do not lie so.
template <class T>
inline const T* adjacent(const T* x, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i * stride];
  return buffer;
}

template <Rotation rotation, class T, class N>
inline void rotate_one(const Params& p, const Table& t, const float* row, const T* x,
                       int64_t x_stride, T* y, int64_t y_stride, const N& norm) {
  const int64_t n = N::kNone ? 2 * p.frequencies : p.head_dim;
  if (x_stride == 1 && y_stride == 1) {
    rotate_head<rotation>(p, t, row, x, y, norm);
  } else {
    T from[2 * kMaxFrequencies], to[2 * kMaxFrequencies];
    rotate_head<rotation>(p, t, row, adjacent(x, x_stride, n, from), to, norm);
    for (int64_t i = 0; i < n; ++i) y[i * y_stride] = to[i];
  }
  if (x != y) {
    for (int64_t i = n; i < p.head_dim; ++i) y[i * y_stride] = x[i * x_stride];
  }
}

// Where the tokens [first, last) begin, so that no division is left in the loop over heads.
inline void token_offsets(const Params& p, const int64_t* stride, int64_t first, int64_t last,
                          int64_t* offset) {
  for (int64_t i = first; i < last; ++i)
    *offset++ = i / p.tokens * stride[0] + i % p.tokens * stride[1];
}

// Storage [B, H, S, D] wants tokens innermost, [B, S, H, D] heads.
inline bool tokens_inner(const int64_t* stride) { return stride[1] < stride[2]; }

// The tokens [first, last), whose table is filled, in the order of memory. weight: see init_weight.
template <Rotation rotation, class T, bool kNormed>
inline void rotate_rows(const Params& p, const Rows& rows, const Table& t, int64_t first,
                        int64_t last, const float* weight) {
  const int64_t* xs = rows.src_stride;
  const int64_t* ys = rows.dst_stride;
  int64_t x_token[kMaxBlock], y_token[kMaxBlock];
  token_offsets(p, xs, first, last, x_token);
  token_offsets(p, ys, first, last, y_token);
  const T* src = static_cast<const T*>(rows.src);
  T* dst = static_cast<T*>(rows.dst);
  const bool by_token = !tokens_inner(xs);
  const int64_t outer = by_token ? last - first : rows.heads;
  const int64_t inner = by_token ? rows.heads : last - first;
  for (int64_t i = 0; i < outer; ++i) {
    const auto x_at = [&](int64_t j) VLMOPS_INLINED {
      const int64_t token = by_token ? i : j, head = by_token ? j : i;
      return src + x_token[token] + head * xs[2];
    };
    const auto rotate = [&](int64_t j, auto norm) VLMOPS_INLINED {
      const int64_t token = by_token ? i : j, head = by_token ? j : i;
      T* y = dst + y_token[token] + head * ys[2];
      rotate_one<rotation>(p, t, t.rows + token * t.row, x_at(j), xs[3], y, ys[3], norm);
    };
    if constexpr (kNormed) {
      // The scales of several heads first, which stay in L1: the latencies of their sums, roots and
      // divisions overlap.
      constexpr int64_t kHeads = 16;
      for (int64_t j = 0; j < inner; j += kHeads) {
        const int64_t n = inner - j < kHeads ? inner - j : kHeads;
        float scale[kHeads] = {};
        T buffer[kMaxNormDim];
        for (int64_t h = 0; h < n; ++h)
          scale[h] = sum_of_squares(adjacent(x_at(j + h), xs[3], p.head_dim, buffer), p.head_dim);
        for (float& s : scale) s = norm_scale(p, s);
        for (int64_t h = 0; h < n; ++h) rotate(j + h, Norm{weight, scale[h]});
      }
    } else {
      for (int64_t j = 0; j < inner; ++j) rotate(j, NoNorm{});
    }
  }
}

// One head in kernel order, with zeros in the gaps.
struct Scratch {
  alignas(64) float grad[kMaxFlat] = {};
  alignas(64) float x[kMaxFlat] = {};
  alignas(64) float out[kMaxFlat];
};

// A head into kernel order, turned by `row` unless that is null.
template <Rotation rotation, class T>
inline void spread(const Params& p, const Table& t, const float* row, const T* x, int64_t stride,
                   float* flat) {
  T buffer[kMaxNormDim];
  x = adjacent(x, stride, p.head_dim, buffer);
  const int64_t r = p.frequencies;
  const Offsets o = t.at;
  each_set<rotation, T>(r, [&](auto set, auto lanes, int64_t i, int64_t at) VLMOPS_INLINED {
    constexpr int n = decltype(lanes)::value;
    auto u = set.template read<n>(x, i, r);
    if (row != nullptr) u = set.template turn<n>(u, row, at, o);
    int vector = 0;
    for (const auto& v : u.v) store<n>(flat + set.place(vector++, at, o), v);
  });
  each_rest(p, t, [&](auto lanes, int64_t channel, int64_t place) VLMOPS_INLINED {
    constexpr int n = decltype(lanes)::value;
    store<n>(flat + place, load<n>(x + channel));
  });
}

template <Rotation rotation, class T>
inline void collect(const Params& p, const Table& t, const float* flat, T* y, int64_t stride) {
  T buffer[kMaxNormDim];
  T* to = stride == 1 ? y : buffer;
  const int64_t r = p.frequencies;
  const Offsets o = t.at;
  each_set<rotation, T>(r, [&](auto set, auto lanes, int64_t i, int64_t at) VLMOPS_INLINED {
    constexpr int n = decltype(lanes)::value;
    auto u = set.template read<n>(to, i, r);  // for its type
    int vector = 0;
    for (auto& v : u.v) v = load<n>(flat + set.place(vector++, at, o));
    set.template write<n>(to, i, r, u);
  });
  each_rest(p, t, [&](auto lanes, int64_t channel, int64_t place) VLMOPS_INLINED {
    constexpr int n = decltype(lanes)::value;
    store<n>(to + channel, load<n>(flat + place));
  });
  if (to != y) {
    for (int64_t i = 0; i < p.head_dim; ++i) y[i * stride] = to[i];
  }
}

// Backward of the norm of one head, in kernel order: there it does not see rotation and layout.
//   xh = x * scale;  out = scale * (w grad - xh * mean(w grad xh));  weight_grad += grad xh
inline void norm_backward(const Params& p, int64_t flat, const float* weight, Scratch& head,
                          float* weight_grad) {
  Sum squares, products;
  for (int64_t i = 0; i < flat; i += 16) {
    for (int n = 0; n < Sum::kParts; ++n) {
      const int64_t at = i + n * kFloats;
      const auto x = load<kFloats>(head.x + at);
      squares.part[n] += x * x;
      products.part[n] += x * load<kFloats>(weight + at) * load<kFloats>(head.grad + at);
    }
  }
  const float scale = norm_scale(p, squares.total());
  const float mean = products.total() * scale / static_cast<float>(p.head_dim);
  for (int64_t i = 0; i < flat; i += kFloats) {
    const auto xh = load<kFloats>(head.x + i) * scale, grad = load<kFloats>(head.grad + i);
    store<kFloats>(head.out + i, scale * (load<kFloats>(weight + i) * grad - xh * mean));
    if (weight_grad != nullptr)
      store<kFloats>(weight_grad + i, load<kFloats>(weight_grad + i) + grad * xh);
  }
}

// The sum of grad xh over heads, in kernel order: float32 over a few heads, float64 beyond.
class WeightSum {
 public:
  explicit WeightSum(int64_t flat) : flat_(flat) {
    for (int64_t i = 0; i < flat; ++i) total_[i] = recent_[i] = 0.0f;
  }
  // Where the next head is to be added.
  float* next() {
    if (heads_++ % 8 == 0) flush();
    return recent_;
  }
  const double* flush() {
    for (int64_t i = 0; i < flat_; ++i) total_[i] += static_cast<double>(recent_[i]);
    for (int64_t i = 0; i < flat_; ++i) recent_[i] = 0.0f;
    return total_;
  }

 private:
  int64_t flat_, heads_ = 0;
  alignas(64) float recent_[kMaxFlat];
  alignas(64) double total_[kMaxFlat];
};

// Adds the block's share to weight_grad [D].
template <Rotation rotation, class T>
inline void norm_backward_rows(const Params& p, const Rows& rows, const Table& t, int64_t first,
                               int64_t last, const float* weight, double* weight_grad) {
  int64_t x_token[kMaxBlock], grad_token[kMaxBlock], dx_token[kMaxBlock];
  token_offsets(p, rows.x_stride, first, last, x_token);
  token_offsets(p, rows.src_stride, first, last, grad_token);
  token_offsets(p, rows.dst_stride, first, last, dx_token);
  const int64_t flat = flat_size(p, t);
  Scratch scratch;
  WeightSum sum(flat);
  // By x: the order of summation shall not hang on the strides of the gradient, which
  // torch.compile changes.
  const bool by_token = !tokens_inner(rows.x_stride);
  const int64_t outer = by_token ? last - first : rows.heads;
  const int64_t inner = by_token ? rows.heads : last - first;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t token = by_token ? i : j, head = by_token ? j : i;
      const auto at = [&](const void* base, const int64_t* offset, const int64_t* stride) {
        return static_cast<const T*>(base) + offset[token] + head * stride[2];
      };
      spread<rotation>(p, t, t.rows + token * t.row, at(rows.src, grad_token, rows.src_stride),
                       rows.src_stride[3], scratch.grad);
      spread<rotation>(p, t, nullptr, at(rows.x, x_token, rows.x_stride), rows.x_stride[3],
                       scratch.x);
      norm_backward(p, flat, weight, scratch, rows.needs_weight_grad ? sum.next() : nullptr);
      if (rows.needs_grad) {
        collect<rotation>(p, t, scratch.out,
                          static_cast<T*>(rows.dst) + dx_token[token] + head * rows.dst_stride[2],
                          rows.dst_stride[3]);
      }
    }
  }
  if (!rows.needs_weight_grad) return;
  const double* total = sum.flush();
  for (int64_t channel = 0; channel < p.head_dim; ++channel)
    weight_grad[channel] += total[place_of<rotation, T>(channel, p, t)];
}

// weight_grad: null forward.
template <Rotation rotation, class T>
void run_typed(const Params& p, int64_t begin, int64_t end, double* weight_grad) {
  constexpr Order order = kOrder<rotation, T>;
  Table table;
  init_table<order>(p, table);
  float weight[2][kMaxFlat];
  for (int r = 0; r < 2; ++r)
    if (p.rows[r].norm_weight != nullptr) init_weight<rotation, T>(p, p.rows[r], table, weight[r]);
  const int64_t block = kTableFloats / table.row;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = first + block < end ? first + block : end;
    fill_table<order>(p, table, first, last);
    for (int r = 0; r < 2; ++r) {
      const Rows& rows = p.rows[r];
      if (rows.norm_weight == nullptr) {
        rotate_rows<rotation, T, false>(p, rows, table, first, last, nullptr);
      } else if (weight_grad == nullptr) {
        rotate_rows<rotation, T, true>(p, rows, table, first, last, weight[r]);
      } else {
        norm_backward_rows<rotation, T>(p, rows, table, first, last, weight[r],
                                        weight_grad + r * p.head_dim);
      }
    }
  }
}

template <class T>
void run_rotation(const Params& p, int64_t begin, int64_t end, double* weight_grad) {
  if (p.rotation == Rotation::kHalf) {
    run_typed<Rotation::kHalf, T>(p, begin, end, weight_grad);
  } else {
    run_typed<Rotation::kPairs, T>(p, begin, end, weight_grad);
  }
}

void run_backward(const Params& p, int64_t begin, int64_t end, double* weight_grad) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_rotation<float>(p, begin, end, weight_grad);
    case DType::kBFloat16:
      return run_rotation<bfloat16>(p, begin, end, weight_grad);
    case DType::kFloat16:
      return run_rotation<float16>(p, begin, end, weight_grad);
  }
}

void run(const Params& p, int64_t begin, int64_t end) { run_backward(p, begin, end, nullptr); }

}  // namespace
}  // namespace vlmops::mrope
