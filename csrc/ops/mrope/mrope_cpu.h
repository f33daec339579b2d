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
// Arithmetic is float32 with one rounding to T at the store. The loops run along the channels with
// a ladder of vector widths (16, 8, 4, 1), so D = 72, 80, 88 need no masks.
#pragma once

#include "common/sincos.h"
#include "ops/mrope/mrope.h"

namespace vlmops::mrope {
namespace {

constexpr int64_t kTableFloats = 4096;  // 16 KiB: half of the smallest L1
constexpr int64_t kMinRow = 2 * 16;     // floats of a token with the fewest frequencies

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

// The table of a block of tokens, and the frequencies in its order.
struct Table {
  int64_t padded;  // R rounded up to 16, the granule of sincos
  int64_t sine;    // offset of the sines
  int64_t row;     // floats per token
  float inv_freq[kMaxFrequencies];
  int32_t freq_axis[kMaxFrequencies];
  alignas(64) float rows[kTableFloats];
};

template <Order order>
inline void init_table(const Params& p, Table& t) {
  t.padded = p.frequencies == 0 ? 16 : (p.frequencies + 15) / 16 * 16;
  t.sine = order == Order::kDoubled ? 2 * t.padded : t.padded;
  t.row = 2 * t.sine;
  for (int64_t j = 0; j < t.padded; ++j) {
    const int64_t at = order == Order::kEvenOdd ? j / 2 + (j % 2) * (t.padded / 2) : j;
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
  for (int64_t j = 0; j < t.padded; ++j) angle[j] = position[t.freq_axis[j]] * t.inv_freq[j];
}

template <Order order>
inline void angles_to_row(const Params& p, const Table& t, float* row) {
  const float sine_scale = p.sine_sign * p.scaling;
  float* sines = row + t.sine;
  if constexpr (order == Order::kDoubled) {
    float cosine[kMaxFrequencies], sine[kMaxFrequencies];
    sincos(row, cosine, sine, t.padded);
    for (int64_t j = 0; j < p.frequencies; ++j) {
      row[2 * j] = row[2 * j + 1] = cosine[j] * p.scaling;
      sines[2 * j] = -sine[j] * sine_scale;
      sines[2 * j + 1] = sine[j] * sine_scale;
    }
  } else {
    sincos(row, row, sines, t.padded);
    for (int64_t j = 0; j < t.padded; ++j) row[j] *= p.scaling;
    for (int64_t j = 0; j < t.padded; ++j) sines[j] *= sine_scale;
  }
}

// All angles first: read back at once, their narrow stores would stall the wide loads of sincos.
template <Order order>
inline void fill_table(const Params& p, Table& t, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) fill_angles(p, t, i, t.rows + (i - first) * t.row);
  for (int64_t i = first; i < last; ++i) angles_to_row<order>(p, t, t.rows + (i - first) * t.row);
}

// The rotations below do N vector lanes at a time from channel i on and return the first channel
// not done.

// x[j], x[R + j] for j in [i, R); c, s plain.
template <int N, class T>
inline int64_t half(const T* x, T* y, const float* c, const float* s, int64_t i, int64_t r) {
  for (; i + N <= r; i += N) {
    const auto a = load<N>(x + i), b = load<N>(x + r + i);
    const auto cosine = load<N>(c + i), sine = load<N>(s + i);
    store<N>(y + i, a * cosine - b * sine);
    store<N>(y + r + i, b * cosine + a * sine);
  }
  return i;
}

// The same for bfloat16; c, s even before odd, `odd` floats apart.
template <int N>
inline int64_t half(const bfloat16* x, bfloat16* y, const float* c, const float* s, int64_t i,
                    int64_t r, int64_t odd) {
  for (; i + 2 * N <= r; i += 2 * N) {
    const auto a = load_even_odd<N>(x + i), b = load_even_odd<N>(x + r + i);
    const auto c0 = load<N>(c + i / 2), c1 = load<N>(c + odd + i / 2);
    const auto s0 = load<N>(s + i / 2), s1 = load<N>(s + odd + i / 2);
    store_even_odd<N>(y + i, a.even * c0 - b.even * s0, a.odd * c1 - b.odd * s1);
    store_even_odd<N>(y + r + i, b.even * c0 + a.even * s0, b.odd * c1 + a.odd * s1);
  }
  return i;
}

// x[2j], x[2j + 1] for channels in [i, 2R); c, s doubled.
template <int N, class T>
inline int64_t pairs(const T* x, T* y, const float* c, const float* s, int64_t i, int64_t r) {
  for (; i + N <= 2 * r; i += N) {
    const auto v = load<N>(x + i);
    store<N>(y + i, v * load<N>(c + i) + swap_neighbours<N>(v) * load<N>(s + i));
  }
  return i;
}

// The same for bfloat16; c, s plain.
template <int N>
inline int64_t pairs(const bfloat16* x, bfloat16* y, const float* c, const float* s, int64_t i,
                     int64_t r) {
  for (; i + 2 * N <= 2 * r; i += 2 * N) {
    const auto v = load_even_odd<N>(x + i);
    const auto cosine = load<N>(c + i / 2), sine = load<N>(s + i / 2);
    store_even_odd<N>(y + i, v.even * cosine - v.odd * sine, v.odd * cosine + v.even * sine);
  }
  return i;
}

// Calls f(lanes, i) -> i for the machine's vector width and every narrower one down to kNarrowest.
template <int kNarrowest, class F>
inline int64_t widths(const F& f) {
  int64_t i = 0;
  if constexpr (kFloats >= 16) i = f(Lanes<16>{}, i);
  if constexpr (kFloats >= 8) i = f(Lanes<8>{}, i);
  i = f(Lanes<4>{}, i);
  return f(Lanes<kNarrowest>{}, i);
}

template <Rotation rotation, class T>
inline void rotate_head(const T* x, T* y, const float* c, const float* s, int64_t r,
                        const Table& t) {
  if constexpr (kOrder<rotation, T> == Order::kEvenOdd) {
    const int64_t odd = t.padded / 2;
    const int64_t i =
        widths<1>([&](auto n, int64_t i) { return half<n.value>(x, y, c, s, i, r, odd); });
    if (i < r) half<1, T>(x, y, c - i / 2, s - i / 2, i, r);  // an odd R leaves one even channel
  } else if constexpr (rotation == Rotation::kHalf) {
    widths<1>([&](auto n, int64_t i) { return half<n.value>(x, y, c, s, i, r); });
  } else {
    constexpr int kNarrowest = kOrder<rotation, T> == Order::kDoubled ? 2 : 1;
    widths<kNarrowest>([&](auto n, int64_t i) { return pairs<n.value>(x, y, c, s, i, r); });
  }
}

// One head whose channels are not adjacent in memory: through a buffer.
template <Rotation rotation, class T>
inline void rotate_strided_head(const T* x, int64_t x_stride, T* y, int64_t y_stride,
                                const float* c, const float* s, int64_t r, const Table& t) {
  T buffer[2 * kMaxFrequencies];
  for (int64_t i = 0; i < 2 * r; ++i) buffer[i] = x[i * x_stride];
  rotate_head<rotation>(buffer, buffer, c, s, r, t);
  for (int64_t i = 0; i < 2 * r; ++i) y[i * y_stride] = buffer[i];
}

template <Rotation rotation, class T>
inline void rotate_one(const Params& p, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                       const float* row, const Table& t) {
  if (x_stride == 1 && y_stride == 1) {
    rotate_head<rotation>(x, y, row, row + t.sine, p.frequencies, t);
  } else {
    rotate_strided_head<rotation>(x, x_stride, y, y_stride, row, row + t.sine, p.frequencies, t);
  }
  if (x != y) {
    for (int64_t i = 2 * p.frequencies; i < p.head_dim; ++i) y[i * y_stride] = x[i * x_stride];
  }
}

// The tokens [first, last), whose table is filled, in the order of memory: storage [B, H, S, D]
// wants tokens innermost, [B, S, H, D] heads.
template <Rotation rotation, class T>
inline void rotate_rows(const Params& p, const Rows& rows, const Table& t, int64_t first,
                        int64_t last) {
  const int64_t* xs = rows.src_stride;
  const int64_t* ys = rows.dst_stride;
  const bool tokens_inner = xs[1] < xs[2];
  // Offsets of the tokens, so that no division is left in the loop over heads.
  int64_t x_token[kTableFloats / kMinRow], y_token[kTableFloats / kMinRow];
  for (int64_t i = 0; i < last - first; ++i) {
    const int64_t b = (first + i) / p.tokens, s = (first + i) % p.tokens;
    x_token[i] = b * xs[0] + s * xs[1];
    y_token[i] = b * ys[0] + s * ys[1];
  }
  const T* src = static_cast<const T*>(rows.src);
  T* dst = static_cast<T*>(rows.dst);
  const int64_t outer = tokens_inner ? rows.heads : last - first;
  const int64_t inner = tokens_inner ? last - first : rows.heads;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t token = tokens_inner ? j : i, head = tokens_inner ? i : j;
      rotate_one<rotation>(p, src + x_token[token] + head * xs[2], xs[3],
                           dst + y_token[token] + head * ys[2], ys[3], t.rows + token * t.row, t);
    }
  }
}

template <Rotation rotation, class T>
void run_typed(const Params& p, int64_t begin, int64_t end) {
  constexpr Order order = kOrder<rotation, T>;
  Table table;
  init_table<order>(p, table);
  const int64_t block = kTableFloats / table.row;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t last = first + block < end ? first + block : end;
    fill_table<order>(p, table, first, last);
    for (const Rows& rows : p.rows) rotate_rows<rotation, T>(p, rows, table, first, last);
  }
}

template <class T>
void run_rotation(const Params& p, int64_t begin, int64_t end) {
  if (p.rotation == Rotation::kHalf) {
    run_typed<Rotation::kHalf, T>(p, begin, end);
  } else {
    run_typed<Rotation::kPairs, T>(p, begin, end);
  }
}

void run(const Params& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_rotation<float>(p, begin, end);
    case DType::kBFloat16:
      return run_rotation<bfloat16>(p, begin, end);
    case DType::kFloat16:
      return run_rotation<float16>(p, begin, end);
  }
}

}  // namespace
}  // namespace vlmops::mrope
