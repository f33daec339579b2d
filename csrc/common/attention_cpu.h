// Attention on a CPU, forward and backward. Internal linkage only, as in simd.h.
//
// Lanes are queries. kPanelRows rows (queries times the heads that share a KV head) make a panel;
// their q lies transposed, [D, kPanelRows], and with K and V row by row
//
//   S^T [n, rows] = K [n, D] Q^T [D, rows]      a tile: J keys, V vectors of rows
//   P^T           = 2^(S^T c - m c)             c = scale log2(e); m: a row's largest S so far
//   O^T [D, rows] = alpha O^T + V^T P^T         a tile: J channels, V vectors of rows
//
// are products of a vector of rows with one number that all rows share: no sum ever crosses lanes,
// D is a loop of any length, and maximum, sum and rescaling are vertical. J V = 24 accumulators
// with AVX-512, 12 with 16 registers; a step reads V vectors and J numbers for J V products.
// Keys come in blocks of kKeyBlock, for all panels of a job before the next block: a block's K and
// V, converted to float32 where they are not, stay in L1 and L2. A row's arithmetic has one order,
// whatever else is in its panel.
//
// bfloat16 on machines that multiply it (kPairs): forward sums two channels, then two keys, a step.
// An element of a vector is a pair of a row's numbers, bfloat16 as they are; K stays as it lies, V
// is packed to pairs of keys, weights are rounded to bfloat16 once they are summed.
//
// What a segment of n queries and m keys costs: 4 n m D FLOPs a head; moved are q, k, v and out,
// once. The floor is the machine's best float32 product.
#pragma once

#include "common/attention.h"
#include "common/exp.h"
#include "common/rows.h"

namespace vlmops::attention {
namespace {

#if defined(__AVX512F__)
constexpr int kMostVectors = 4, kAccumulators = 24;
#else
constexpr int kMostVectors = 2, kAccumulators = 12;
#endif
constexpr int kPanelRows = kMostVectors * kFloats;
constexpr float kInfinity = __builtin_inff();

using Floats = Vec<float, kFloats>;
using Ints = Vec<int32_t, kFloats>;

// Whether numbers of type T are multiplied in pairs.
template <class T>
constexpr bool kPairs = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairs<bfloat16> = true;
#endif

// ---- Vectors ----

// 2^x, 0 below 2^-126, where polynomial(r) is 2^r for r within a half of 0.
template <class Polynomial>
VLMOPS_INLINE Floats power_of_2(Floats x, const Polynomial& polynomial) {
  constexpr float kRound = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  const Floats shifted = x + kRound;
  const Floats y = polynomial(x - (shifted - kRound));
  const Floats power = bit_cast<Floats>(bit_cast<Ints>(y) + (bit_cast<Ints>(shifted) << 23));
  return x < -126.0f ? Floats{} : power;
}

// To 1 unit in the last place, for x <= 128.
VLMOPS_INLINE Floats exp2(Floats x) {
  return power_of_2(x, [](Floats r) VLMOPS_INLINED {
    Floats y = r * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
    y = y * r + 0x1.3b2d4cp-7f;
    y = y * r + 0x1.c6aee8p-5f;
    y = y * r + 0x1.ebfbdcp-3f;
    y = y * r + 0x1.62e43p-1f;
    return y * r + 1.0f;
  });
}

// To 3e-6, for what bfloat16 keeps; 1 of 0.
VLMOPS_INLINE Floats exp2_roughly(Floats x) {
  return power_of_2(x, [](Floats r) VLMOPS_INLINED {
    Floats y = r * 0x1.3a02ccp-7f + 0x1.c9fc46p-5f;
    y = y * r + 0x1.ec0378p-3f;
    y = y * r + 0x1.62e12cp-1f;
    return y * r + 1.0f;
  });
}

#if defined(__AVX512BF16__)
// Both, rounded, lane by lane: `first` in the lower halves.
VLMOPS_INLINE Ints pair_up(Floats first, Floats second) {
  Vec<int16_t, 32> order;
  for (int16_t e = 0; e < 32; ++e) order[e] = static_cast<int16_t>(e / 2 + e % 2 * 16);
  const auto rounded = _mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
  return bit_cast<Ints>(
      _mm512_permutexvar_epi16(bit_cast<__m512i>(order), bit_cast<__m512i>(rounded)));
}

// Products of both numbers of each pair are added.
VLMOPS_INLINE void add_product(Floats& sum, Ints a, Ints b) {
  sum = bit_cast<Floats>(
      _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
VLMOPS_INLINE void add_product(Floats& sum, Ints a, int32_t by) {
  add_product(sum, a, bit_cast<Ints>(_mm512_set1_epi32(by)));
}

VLMOPS_INLINE int32_t pair_at(const bfloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return pair;
}

// Turns the signs of both numbers of each pair where a factor is negative.
VLMOPS_INLINE Ints flip_for(float factor) {
  return Ints{} + (factor < 0.0f ? static_cast<int32_t>(0x80008000u) : 0);
}

// The first n lanes, zeros in the others.
VLMOPS_INLINE Ints load_pairs(const bfloat16* p, int n) {
  const auto lanes = static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
  return bit_cast<Ints>(_mm512_maskz_loadu_epi32(lanes, p));
}
#endif

VLMOPS_INLINE void add_product(Floats& sum, Floats a, Floats b) { sum += a * b; }
VLMOPS_INLINE void add_product(Floats& sum, Floats a, float by) { sum += a * by; }

// Lanes of a, but those of b where e & Step.
template <int Step>
VLMOPS_INLINE Floats blend(Floats a, Floats b) {
#if defined(__clang__)
  for (int e = 0; e < kFloats; ++e) a[e] = e & Step ? b[e] : a[e];
  return a;
#else
  Ints order;
  for (int e = 0; e < kFloats; ++e) order[e] = e & Step ? kFloats + e : e;
  return __builtin_shuffle(a, b, order);
#endif
}

// What blend leaves out of both, moved by Step to the lanes of the other.
template <int Step>
VLMOPS_INLINE Floats cross(Floats a, Floats b) {
#if defined(__clang__)
  Floats x;
  for (int e = 0; e < kFloats; ++e) x[e] = e & Step ? b[e - Step] : a[e + Step];
  return x;
#else
  Ints order;
  for (int e = 0; e < kFloats; ++e) order[e] = e & Step ? kFloats + e - Step : e + Step;
  return __builtin_shuffle(a, b, order);
#endif
}

template <int Step>
VLMOPS_INLINE void exchange(Floats (&x)[kFloats]) {
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) {
    if (i & Step) continue;
    const Floats a = x[i], b = x[i + Step], crossed = cross<Step>(a, b);
    x[i] = blend<Step>(a, crossed);
    x[i + Step] = blend<Step>(crossed, b);
  }
  if constexpr (Step > 1) exchange<Step / 2>(x);
}

// x[i][j] <-> x[j][i]
VLMOPS_INLINE void transpose(Floats (&x)[kFloats]) { exchange<kFloats / 2>(x); }

// The first n lanes, n a multiple of 8 or all; zeros in the others.
template <class T>
VLMOPS_INLINE Floats load_lanes(const T* p, int n) {
  if (n >= kFloats) return load<kFloats>(p);
#if defined(__AVX512F__)
  struct Halves {
    Vec<float, 8> low, high;
  };
  return bit_cast<Floats>(Halves{load<8>(p), {}});
#else
  return Floats{};  // D is a multiple of 8: there are none
#endif
}

// The same; of whole vectors, without a look.
template <bool kWhole, class T>
VLMOPS_INLINE Floats load_some(const T* p, int n) {
  return kWhole ? load<kFloats>(p) : load_lanes(p, n);
}

template <class T>
VLMOPS_INLINE void store_lanes(T* p, Floats x, int n) {
  if (n >= kFloats) return store<kFloats>(p, x);
#if defined(__AVX512F__)
  struct Halves {
    Vec<float, 8> low, high;
  };
  store<8>(p, bit_cast<Halves>(x).low);
#endif
}

inline int64_t padded(int64_t n) { return (n + kFloats - 1) / kFloats * kFloats; }
inline int64_t panels_of(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// f(Lanes<n>()) for 1 <= n <= Most.
template <int Most, class F>
VLMOPS_INLINE void with_number(int n, const F& f) {
  if constexpr (Most == 1) {
    f(Lanes<1>());
  } else {
    if (n == Most) return f(Lanes<Most>());
    with_number<Most - 1>(n, f);
  }
}

// f(Lanes<J>(), first) for tiles of nearly equal J <= Most that make up `count`.
template <int Most, class F>
VLMOPS_INLINE void by_tiles(int count, const F& f) {
  int parts = (count + Most - 1) / Most;
  for (int first = 0; parts > 0; --parts) {
    const int size = (count - first + parts - 1) / parts;
    with_number<Most>(size, [&](auto tile) VLMOPS_INLINED { f(tile, first); });
    first += size;
  }
}

// ---- Tiles ----

constexpr int most_of(int vectors) {
  return kAccumulators / vectors > 12 ? 12 : kAccumulators / vectors;
}

// Rows of D numbers, or of D pairs.
template <class E>
struct RowsOf {
  const E* data;
  int64_t stride;
};
using Rows = RowsOf<float>;

// each(j, v, sum) of the J x V vectors that a tile of a product has: sum over i < depth of a number
// of a, for j, times vector v of row i of x. Numbers are float, or int32_t for pairs.
template <int V, int J, class X, class Number, class Each>
VLMOPS_INLINE void product(const X* x, int64_t stride, int depth, const Number& number,
                           const Each& each) {
  Floats sums[J][V] = {};
  for (int i = 0; i < depth; ++i, x += stride) {
    Vec<X, kFloats> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Vec<X, kFloats>*>(x + v * kFloats);
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
      const auto by = number(j, i);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) add_product(sums[j][v], row[v], by);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) each(j, v, sums[j][v]);
  }
}

// a's rows from a.data on, number i of each with row i of x.
template <int V, int J, class Each>
VLMOPS_INLINE void rows_product(const Rows& a, const float* x, int64_t stride, int depth,
                                const Each& each) {
  const float* row[J];
  for (int j = 0; j < J; ++j) row[j] = a.data + j * a.stride;
  product<V, J>(x, stride, depth, [&](int j, int i) VLMOPS_INLINED { return row[j][i]; }, each);
}

// a's columns from a.data on.
template <int V, int J, class X, class Each>
VLMOPS_INLINE void columns_product(const RowsOf<X>& a, const X* x, int64_t stride, int depth,
                                   const Each& each) {
  const X* row = a.data;
  product<V, J>(
      x, stride, depth,
      [&](int j, int) VLMOPS_INLINED {
        const X by = row[j];
        if (j == J - 1) row += a.stride;
        return by;
      },
      each);
}

// ---- Where rows lie ----

// One KV head of a job. Row r of it is head r % group of query r / group.
struct HeadOf {
  const Params& p;
  const Job& job;
  int kv_head;

  int64_t rows() const { return job.q.count * p.group(); }
  int64_t query(int64_t r) const {  // in its segment
    const int64_t i = p.group() == 1 ? r : r / p.group();
    return job.q_rows == nullptr ? job.position + i : job.q_rows[i];
  }
  int head(int64_t r) const {
    return kv_head * p.group() + static_cast<int>(p.group() == 1 ? 0 : r % p.group());
  }
  int64_t key(int64_t n) const { return job.k_rows == nullptr ? n : job.k_rows[n]; }
  // The last key that row r sees.
  int64_t limit(int64_t r) const { return p.causal ? query(r) + job.visible : job.k.count - 1; }
};

template <class T>
VLMOPS_INLINE const T* base_of(const Heads& of, const Starts& starts, const HeadOf& h,
                               const Range& range) {
  return static_cast<const T*>(of.data) + offset_of(starts, of, h.job.segment, range.first);
}

// Row 0 of k or v, in a KV head.
template <class T>
VLMOPS_INLINE const T* keys_base(const Heads& of, const HeadOf& h, int kv_head) {
  return base_of<T>(of, h.p.k_starts, h, h.job.k) + kv_head * of.head;
}

// Rows [first, first + rows) of q, or of what has its strides, transposed: to [width, kPanelRows],
// of read(row, from, lanes). Lanes beyond the rows repeat the last.
template <class T, class Read>
VLMOPS_INLINE void pack_rows(const Heads& of, const HeadOf& h, int64_t first, int rows, int width,
                             const Read& read, float* to) {
  const T* const base = base_of<T>(of, h.p.q_starts, h, h.job.q);
  for (int v = 0; v * kFloats < rows; ++v) {
    const T* row[kFloats];
    for (int i = 0; i < kFloats; ++i) {
      const int at = v * kFloats + i;
      const int64_t r = first + (at < rows ? at : rows - 1);
      row[i] = base + h.query(r) * of.row + h.head(r) * of.head;
    }
    for (int d = 0; d < width; d += kFloats) {
      Floats x[kFloats];
      const int lanes = width - d;
#pragma GCC unroll 16
      for (int i = 0; i < kFloats; ++i) x[i] = read(row[i], d, lanes);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kFloats; ++i) {
        if (i < lanes) store<kFloats>(to + (d + i) * kPanelRows + v * kFloats, x[i]);
      }
    }
  }
}

// In float32, times `factor`.
template <class T>
inline void pack_queries(const Heads& of, const HeadOf& h, int64_t first, int rows, float factor,
                         float* to) {
  const auto read = [&](const T* row, int d, int lanes)
                        VLMOPS_INLINED { return load_lanes(row + d, lanes) * factor; };
  pack_rows<T>(of, h, first, rows, h.p.dim, read, to);
}

// Keys [first, first + count) of k or v as float32 rows: where they lie, or packed into `to`.
template <class T>
inline Rows keys_of(const Heads& of, const HeadOf& h, int64_t first, int count, bool pack,
                    float* to) {
  const T* const base = keys_base<T>(of, h, h.kv_head);
  if constexpr (sizeof(T) == 4) {
    if (!pack && h.job.k_rows == nullptr) return {base + first * of.row, of.row};
  }
  for (int n = 0; n < count; ++n) {
    const T* const row = base + h.key(first + n) * of.row;
    for (int d = 0; d < h.p.dim; d += kFloats)
      store_lanes(to + n * h.p.dim + d, load_lanes(row + d, h.p.dim - d), h.p.dim - d);
  }
  return {to, h.p.dim};
}

// T is bfloat16, and is where these are called; they are defined for machines that multiply it.
template <class T>
void pack_query_pairs(const Heads& of, const HeadOf& h, int64_t first, int rows, float sign,
                      float* to);
template <class T>
RowsOf<T> key_rows(const Heads& of, const HeadOf& h, int64_t first, int count, bool pack,
                   float* to);
template <class T>
RowsOf<int32_t> key_pairs(const Heads& of, const HeadOf& h, int64_t first, int count, float* to);
template <class T>
void pair_rows(const T* first, const T* second, int dim, float* to);

#if defined(__AVX512BF16__)
// As pairs of channels, of a sign: to [D / 2, kPanelRows].
template <>
inline void pack_query_pairs<bfloat16>(const Heads& of, const HeadOf& h, int64_t first, int rows,
                                       float sign, float* to) {
  const Ints flip = flip_for(sign);
  const auto read = [&](const bfloat16* row, int d, int lanes) VLMOPS_INLINED {
    return bit_cast<Floats>(load_pairs(row + 2 * d, lanes) ^ flip);
  };
  pack_rows<bfloat16>(of, h, first, rows, h.p.dim / 2, read, to);
}

// Keys [first, first + count) of k or v: where they lie, or packed into `to`.
template <>
inline RowsOf<bfloat16> key_rows<bfloat16>(const Heads& of, const HeadOf& h, int64_t first,
                                           int count, bool pack, float* to) {
  const auto* const base = keys_base<bfloat16>(of, h, h.kv_head);
  if (!pack && h.job.k_rows == nullptr) return {base + first * of.row, of.row};
  auto* const packed = reinterpret_cast<bfloat16*>(to);
  for (int n = 0; n < count; ++n)
    __builtin_memcpy(packed + n * h.p.dim, base + h.key(first + n) * of.row,
                     static_cast<size_t>(h.p.dim) * sizeof(bfloat16));
  return {packed, h.p.dim};
}

// Of two rows, [dim]; zeros for a second that is null.
template <>
inline void pair_rows<bfloat16>(const bfloat16* first, const bfloat16* second, int dim, float* to) {
  for (int d = 0; d < dim; d += 8) {
    const auto wide = [&](const bfloat16* from) VLMOPS_INLINED {
      return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d)));
    };
    __m256i pairs = wide(first);
    if (second != nullptr) pairs = _mm256_or_si256(pairs, _mm256_slli_epi32(wide(second), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), pairs);
  }
}

// Keys of k or v as pairs of keys, [(count + 1) / 2, D].
template <>
inline RowsOf<int32_t> key_pairs<bfloat16>(const Heads& of, const HeadOf& h, int64_t first,
                                           int count, float* to) {
  const auto* const base = keys_base<bfloat16>(of, h, h.kv_head);
  for (int n = 0; n < count; n += 2)
    pair_rows<bfloat16>(base + h.key(first + n) * of.row,
                        n + 1 < count ? base + h.key(first + n + 1) * of.row : nullptr, h.p.dim,
                        to + n / 2 * h.p.dim);
  return {reinterpret_cast<const int32_t*>(to), h.p.dim};
}
#endif

// ---- Forward ----

// q takes the scale's sign, so that a row's largest product is its largest logit, S c.
inline float sign_of(const Params& p) { return p.scale < 0.0f ? -1.0f : 1.0f; }

// c, rounded as the scale is in models' own code.
struct Base2 {
  float c;

  explicit Base2(const Params& p) : c(steepness_of(static_cast<double>(p.scale) + p.scale_rest)) {}

  // Of products that lie `off` below the largest.
  VLMOPS_INLINE Floats weight(Floats off) const { return exp2(off * c); }
  VLMOPS_INLINE Floats weight_roughly(Floats off) const { return exp2_roughly(off * c); }
};

// f(begin, end) for the parts of a sum over `depth` products. Long sums are cut, one of 256 has
// twice the error that four of 64 have; sums for few rows, which libraries add up in lanes, are cut
// finely.
template <int V, class F>
VLMOPS_INLINE void by_parts(int depth, const F& f) {
  constexpr int kMost = kFloats == 4 ? 8 : V == kMostVectors ? 48 : V == 1 ? 16 : 32;
  const int parts = (depth + kMost - 1) / kMost;
  for (int part = 0; part < parts; ++part) f(depth * part / parts, depth * (part + 1) / parts);
}

// s[j][rows] of J keys, and each(v, vector) of it.
template <int V, int J, class Each>
VLMOPS_INLINE void scores(const Rows& k, const float* q, int dim, float* s, const Each& each) {
  by_parts<V>(dim, [&](int d, int end) VLMOPS_INLINED {
    rows_product<V, J>({k.data + d, k.stride}, q + d * kPanelRows, kPanelRows, end - d,
                       [&](int j, int v, Floats sum) VLMOPS_INLINED {
                         float* const at = s + j * kPanelRows + v * kFloats;
                         if (d != 0) sum += load<kFloats>(at);
                         store<kFloats>(at, sum);
                         if (end == dim) each(v, sum);
                       });
  });
}

#if defined(__AVX512BF16__)
template <int V, int J, class Each>
VLMOPS_INLINE void scores(const RowsOf<bfloat16>& k, const float* q, int dim, float* s,
                          const Each& each) {
  product<V, J>(
      reinterpret_cast<const int32_t*>(q), kPanelRows, dim / 2,
      [&](int j, int i) VLMOPS_INLINED { return pair_at(k.data + j * k.stride + 2 * i); },
      [&](int j, int v, Floats sum) VLMOPS_INLINED {
        store<kFloats>(s + j * kPanelRows + v * kFloats, sum);
        each(v, sum);
      });
}
#endif

struct Panel {
  const float* q;  // [D, kPanelRows], or [D / 2, kPanelRows] of pairs
  float* o;        // [D, kPanelRows]
  int vectors, rows;
  int64_t first;          // row
  int64_t least, most;    // of the last keys that its rows see
  float* top;             // [kPanelRows], a row's largest S so far
  float* sum;             // [kPanelRows]
  const int32_t* limits;  // [kPanelRows], the last key that each row sees
};

// Floats of a panel in scratch.
inline int64_t panel_floats(const Params& p) { return (2 * p.dim + 3) * kPanelRows; }

// Asks for rows that are read next, a few with each tile: caches do not foresee rows that lie
// apart.
struct Ahead {
  struct Of {
    const char* row;
    int64_t stride;  // bytes
  };
  Of of[3];
  int count = 0;  // of them
  int rows = 0;   // that are left
  int at_once = 0;
  int64_t bytes = 0;

  VLMOPS_INLINE void step() {
    for (int n = 0; n < at_once && rows > 0; ++n, --rows) {
      for (int i = 0; i < count; ++i) {
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(of[i].row + b);
        of[i].row += of[i].stride;
      }
    }
  }
};

// Keys [first, first + count) of a panel: s [count, kPanelRows] is scratch. V's rows are keys', or
// those of pairs.
template <int V, class K, class X>
inline void attend(const Panel& panel, const RowsOf<K>& k, const RowsOf<X>& v, int dim,
                   int64_t first, int count, const Base2& base, float* s, Ahead& ahead) {
  Floats top[V], old[V], sum[V], alpha[V];
  for (int u = 0; u < V; ++u) top[u] = old[u] = load<kFloats>(panel.top + u * kFloats);
  const bool masked = first + count - 1 > panel.least;
  by_tiles<most_of(V)>(count, [&](auto tile, int n) VLMOPS_INLINED {
    ahead.step();
    constexpr int J = decltype(tile)::value;
    scores<V, J>(RowsOf<K>{k.data + n * k.stride, k.stride}, panel.q, dim, s + n * kPanelRows,
                 [&](int u, Floats x) VLMOPS_INLINED {
                   if (!masked) top[u] = x > top[u] ? x : top[u];
                 });
  });
  if (masked) {
    for (int n = 0; n < count; ++n) {
      for (int u = 0; u < V; ++u) {
        float* const at = s + n * kPanelRows + u * kFloats;
        const Ints limit = *reinterpret_cast<const Ints*>(panel.limits + u * kFloats);
        const Floats x =
            limit >= static_cast<int32_t>(first + n) ? load<kFloats>(at) : Floats{} - kInfinity;
        store<kFloats>(at, x);
        top[u] = x > top[u] ? x : top[u];
      }
    }
  }
  for (int u = 0; u < V; ++u) {
    store<kFloats>(panel.top + u * kFloats, top[u]);
    // Where nothing was seen yet there is nothing to rescale.
    const Floats from = top[u] == -kInfinity ? Floats{} : top[u];
    alpha[u] = base.weight(old[u] - from);
    sum[u] = Floats{};
    top[u] = from;
  }
#if defined(__AVX512BF16__)
  if constexpr (kPairs<K>) {
    for (int n = 0; n < count; n += 2) {
      for (int u = 0; u < V; ++u) {
        const float* const at = s + n * kPanelRows + u * kFloats;
        const Floats even = base.weight_roughly(load<kFloats>(at) - top[u]);
        Floats odd = {};
        if (n + 1 < count) odd = base.weight_roughly(load<kFloats>(at + kPanelRows) - top[u]);
        store<kFloats>(s + n / 2 * kPanelRows + u * kFloats, bit_cast<Floats>(pair_up(even, odd)));
        sum[u] += even;
        sum[u] += odd;
      }
    }
  }
#endif
  if constexpr (!kPairs<K>) {
    for (int n = 0; n < count; ++n) {
      for (int u = 0; u < V; ++u) {
        float* const at = s + n * kPanelRows + u * kFloats;
        const Floats e = base.weight(load<kFloats>(at) - top[u]);
        store<kFloats>(at, e);
        sum[u] += e;
      }
    }
  }
  // Blocks are summed by themselves: one sum of all keys lost a digit at 4,100.
  for (int u = 0; u < V; ++u) {
    float* const at = panel.sum + u * kFloats;
    store<kFloats>(at, load<kFloats>(at) * alpha[u] + sum[u]);
  }
  by_tiles<most_of(V)>(dim, [&](auto tile, int d) VLMOPS_INLINED {
    ahead.step();
    constexpr int J = decltype(tile)::value;
    const auto sum_up = [&](int n, int end) VLMOPS_INLINED {
      columns_product<V, J>(RowsOf<X>{v.data + n * v.stride + d, v.stride},
                            reinterpret_cast<const X*>(s) + n * kPanelRows, kPanelRows, end - n,
                            [&](int j, int u, Floats x) VLMOPS_INLINED {
                              float* const at = panel.o + (d + j) * kPanelRows + u * kFloats;
                              if (n != 0) {
                                x += load<kFloats>(at);
                              } else if (first != 0) {
                                x += load<kFloats>(at) * alpha[u];
                              }
                              store<kFloats>(at, x);
                            });
    };
    if constexpr (kPairs<K>) {
      sum_up(0, (count + 1) / 2);
    } else {
      by_parts<V>(count, sum_up);
    }
  });
}

// Where the rows of a vector lie in [rows, heads, D].
struct Places {
  int64_t of[kFloats];
  int count;

  Places(const HeadOf& h, int64_t first, int rows) : count(rows < kFloats ? rows : kFloats) {
    for (int i = 0; i < count; ++i)
      of[i] = ((h.job.q.first + h.query(first + i)) * h.p.heads + h.head(first + i)) * h.p.dim;
  }
};

// A vector of rows times `factor`, from [D, kPanelRows] to their places.
template <class T>
inline void unpack(const float* from, Floats factor, const Places& places, int dim, T* to) {
  for (int d = 0; d < dim; d += kFloats) {
    Floats x[kFloats];
    const int lanes = dim - d;
#pragma GCC unroll 16
    for (int i = 0; i < kFloats; ++i)
      x[i] = i < lanes ? load<kFloats>(from + (d + i) * kPanelRows) * factor : Floats{};
    transpose(x);
    for (int i = 0; i < places.count; ++i) store_lanes(to + places.of[i] + d, x[i], lanes);
  }
}

// o / sum and the statistics of a panel, to where they belong.
template <class T>
inline void finish(const Panel& panel, const HeadOf& h) {
  const Params& p = h.p;
  for (int u = 0; u < panel.vectors; ++u) {
    const int64_t first = panel.first + u * kFloats;
    const Places places(h, first, panel.rows - u * kFloats);
    const Floats sum = load<kFloats>(panel.sum + u * kFloats);
    const Floats top = load<kFloats>(panel.top + u * kFloats);
    const auto blind = sum == 0.0f;
    const Floats part = blind ? Floats{} : 1.0f / sum;
    unpack(panel.o + u * kFloats, part, places, p.dim, static_cast<T*>(p.out));
    for (int i = 0; i < places.count; ++i) {
      const int64_t at = h.head(first + i) * p.rows + h.job.q.first + h.query(first + i);
      p.most[at] = blind[i] ? 0.0f : top[i];
      p.part[at] = part[i];
    }
  }
}

template <class T>
VLMOPS_INLINE void ask_for(Ahead& ahead, const Heads& of, const T* row) {
  ahead.of[ahead.count++] = {reinterpret_cast<const char*>(row),
                             of.row * static_cast<int64_t>(sizeof(T))};
}

// ---- Few rows: decoding ----
//
// A panel of one row would be mostly empty lanes. Here lanes are channels: K and V are read once,
// as they lie, kFloats keys at a time whose products with a row are added up across lanes together.
// Keys come in parts that any thread may do (binding/attention.cpp).

// Lane i: the sum of the lanes of x[i]. Pairs of vectors are folded into one until one is left.
template <int Count = kFloats>
VLMOPS_INLINE Floats sum_each(Floats (&x)[kFloats]) {
  if constexpr (Count == 1) {
    return x[0];
  } else {
    constexpr int kStep = Count / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kStep; ++i)
      x[i] = blend<kStep>(x[i], x[i + kStep]) + cross<kStep>(x[i], x[i + kStep]);
    return sum_each<kStep>(x);
  }
}

// What part of the keys gives few rows: sums of weighted V, not yet over the sum of weights. Of
// each 32 channels, pairs have the first four of every eight in the first vector.
struct Part {
  float* o;  // [rows, width]
  float *top, *sum;

  static int64_t width(const Params& p) {
    const bool pairs = kPairs<bfloat16> && p.dtype == DType::kBFloat16;
    return pairs ? (p.dim + 2 * kFloats - 1) / (2 * kFloats) * 2 * kFloats : padded(p.dim);
  }
  static int64_t floats(const Params& p, int64_t rows) { return rows * (width(p) + 2); }
  Part(const Params& p, int64_t rows, float* at)
      : o(at), top(at + rows * width(p)), sum(top + rows) {}
};

inline size_t part_floats(const Params& p, int64_t rows, int64_t) {
  return static_cast<size_t>(Part::floats(p, rows * p.group()));
}

// Scratch of few rows: q, weights, and kFloats keys.
inline int64_t few_floats(const Params& p) {
  return kFewOnCpu * (Part::width(p) + kKeyBlock) + kFloats * Part::width(p);
}

// K and V lie in two places, and a block of either is as long as four pages: what fetches memory
// ahead of a stream starts anew with each. So rows of V are asked for while those of K are read,
// and rows of the next block of K while V is: 2.5x at 4,803 keys of 128 bfloat16 numbers.
template <class T>
VLMOPS_INLINE void ask_for_row(const T* row, int dim) {
  for (int d = 0; d < dim; d += static_cast<int>(64 / sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// Adds the products of weights s [rows, kKeyBlock] and `count` rows of v to o, which is rescaled.
// ask(n) is called for each of the rows.
template <bool kWhole, class T, class Ask>
inline void add_values(const HeadOf& h, const T* v, int64_t first, int count, int rows,
                       const float* s, const float* alpha, const Part& part, const Ask& ask) {
  const Params& p = h.p;
  const int64_t width = Part::width(p);
  const auto row_of = [&](int n) VLMOPS_INLINED { return v + h.key(first + n) * p.v.row; };
  // W vectors of o from vector `at` on, of J rows from r on.
  const auto put = [&](auto&& sums, int count_j, int count_w, int r, int at) VLMOPS_INLINED {
    for (int j = 0; j < count_j; ++j) {
      for (int u = 0; u < count_w; ++u) {
        float* const to = part.o + (r + j) * width + (at + u) * kFloats;
        store<kFloats>(to, load<kFloats>(to) * alpha[r + j] + sums[j][u]);
      }
    }
  };
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    bfloat16 rounded[kFewOnCpu * kKeyBlock];
    for (int64_t i = 0; i < rows * kKeyBlock; i += kFloats)
      store<kFloats>(rounded + i, load<kFloats>(s + i));
    by_tiles<2>(static_cast<int>(width) / (2 * kFloats), [&](auto groups, int g) VLMOPS_INLINED {
      constexpr int W = decltype(groups)::value;  // of 32 channels
      by_tiles<kAccumulators / 4>(rows, [&](auto tile, int r) VLMOPS_INLINED {
        constexpr int J = decltype(tile)::value;
        Floats sums[J][2 * W] = {};
        for (int n = 0; n < count; n += 2) {
          if (g == 0 && r == 0) ask(n), ask(n + 1);
          Ints x[2 * W];
#pragma GCC unroll 2
          for (int u = 0; u < W; ++u) {
            const int at = (g + u) * 2 * kFloats, lanes = (p.dim - at) / 2;
            const auto even = bit_cast<__m512i>(load_pairs(row_of(n) + at, lanes));
            auto odd = _mm512_setzero_si512();
            if (n + 1 < count) odd = bit_cast<__m512i>(load_pairs(row_of(n + 1) + at, lanes));
            x[2 * u] = bit_cast<Ints>(_mm512_unpacklo_epi16(even, odd));
            x[2 * u + 1] = bit_cast<Ints>(_mm512_unpackhi_epi16(even, odd));
          }
#pragma GCC unroll 6
          for (int j = 0; j < J; ++j) {
            const int32_t by = pair_at(rounded + (r + j) * kKeyBlock + n);
#pragma GCC unroll 4
            for (int u = 0; u < 2 * W; ++u) add_product(sums[j][u], x[u], by);
          }
        }
        put(sums, J, 2 * W, r, g * 2);
      });
    });
    return;
  }
#endif
  by_tiles<4>(static_cast<int>(width) / kFloats, [&](auto vectors, int at) VLMOPS_INLINED {
    constexpr int W = decltype(vectors)::value;
    by_tiles<kAccumulators / 4>(rows, [&](auto tile, int r) VLMOPS_INLINED {
      constexpr int J = decltype(tile)::value;
      Floats sums[J][W] = {};
      for (int n = 0; n < count; ++n) {
        if (at == 0 && r == 0) ask(n);
        const T* const row = row_of(n) + at * kFloats;
        Floats x[W];
#pragma GCC unroll 4
        for (int u = 0; u < W; ++u)
          x[u] = load_some<kWhole>(row + u * kFloats, p.dim - (at + u) * kFloats);
#pragma GCC unroll 6
        for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
          for (int u = 0; u < W; ++u) sums[j][u] += x[u] * s[(r + j) * kKeyBlock + n];
        }
      }
      put(sums, J, W, r, at);
    });
  });
}

// Keys [begin, end) of a head. kWhole: its channels are whole vectors.
template <class T, bool kWhole>
inline void few_rows_of_width(const HeadOf& h, int64_t begin, int64_t end, float* scratch,
                              const Part& part) {
  const Params& p = h.p;
  const int rows = static_cast<int>(h.rows());
  const int64_t width = Part::width(p);
  const Base2 base(p);
  float* const q = scratch;                       // [rows, width]
  float* const s = q + kFewOnCpu * width;         // [rows, kKeyBlock]
  float* const wide = s + kFewOnCpu * kKeyBlock;  // [kFloats, width], keys in float32
  float* const top = part.top;
  float* const sum = part.sum;
  float alpha[kFewOnCpu];
  const T* const of_q = base_of<T>(p.q, p.q_starts, h, h.job.q);
  const T* const of_k = keys_base<T>(p.k, h, h.kv_head);
  const T* const of_v = keys_base<T>(p.v, h, h.kv_head);
  for (int r = 0; r < rows; ++r) {
    const T* const row = of_q + h.query(r) * p.q.row + h.head(r) * p.q.head;
#if defined(__AVX512BF16__)
    if constexpr (kPairs<T>) {
      const Ints flip = flip_for(p.scale);
      for (int d = 0; d < p.dim / 2; d += kFloats)
        store<kFloats>(q + r * width + d,
                       bit_cast<Floats>(load_pairs(row + 2 * d, p.dim / 2 - d) ^ flip));
    }
#endif
    if constexpr (!kPairs<T>) {
      for (int d = 0; d < p.dim; d += kFloats)
        store<kFloats>(q + r * width + d, load_lanes(row + d, p.dim - d) * sign_of(p));
    }
    for (int64_t d = 0; d < width; d += kFloats) store<kFloats>(part.o + r * width + d, Floats{});
    top[r] = -kInfinity;
    sum[r] = 0.0f;
  }
  const int64_t last = h.limit(rows - 1) + 1;
  if (last < end) end = last;
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const int count = static_cast<int>(end - first < kKeyBlock ? end - first : kKeyBlock);
    for (int n = 0; n < count; n += kFloats) {
      const T* key[kFloats];
      for (int i = 0; i < kFloats; ++i)
        key[i] = of_k + h.key(first + (n + i < count ? n + i : count - 1)) * p.k.row;
      for (int i = 0; i < kFloats && n + i < count; ++i)
        ask_for_row(of_v + h.key(first + n + i) * p.v.row, p.dim);
      const bool widens = sizeof(T) == 2 && !kPairs<T> && rows > 1;  // once for all rows
      if (widens) {
        for (int i = 0; i < kFloats; ++i)
          for (int d = 0; d < p.dim; d += kFloats)
            store<kFloats>(wide + i * width + d, load_lanes(key[i] + d, p.dim - d));
      }
      for (int r = 0; r < rows; ++r) {
        Floats x[kFloats] = {};
        const float* const of_row = q + r * width;
        // f(i, d) adds what row and key i have in a vector of channels.
        const auto sum_up = [&](int channels, const auto& f) VLMOPS_INLINED {
          for (int d = 0; d < channels; d += kFloats) {
#pragma GCC unroll 16
            for (int i = 0; i < kFloats; ++i) f(i, d);
          }
        };
#if defined(__AVX512BF16__)
        if constexpr (kPairs<T>) {
          sum_up(p.dim / 2, [&](int i, int d) VLMOPS_INLINED {
            add_product(x[i], bit_cast<Ints>(load<kFloats>(of_row + d)),
                        load_pairs(key[i] + 2 * d, p.dim / 2 - d));
          });
        }
#endif
        if constexpr (!kPairs<T>) {
          if (widens) {
            sum_up(p.dim, [&](int i, int d) VLMOPS_INLINED {
              x[i] += load<kFloats>(of_row + d) * load<kFloats>(wide + i * width + d);
            });
          } else {
            sum_up(p.dim, [&](int i, int d) VLMOPS_INLINED {
              x[i] += load<kFloats>(of_row + d) * load_some<kWhole>(key[i] + d, p.dim - d);
            });
          }
        }
        Floats logits = sum_each(x);
        const int64_t seen = h.limit(r) - first - n;  // the last lane that r sees
        for (int64_t i = seen < 0 ? 0 : seen + 1; i < kFloats; ++i) logits[i] = -kInfinity;
        store<kFloats>(s + r * kKeyBlock + n, logits);
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* const of_row = s + r * kKeyBlock;
      Floats largest = Floats{} + top[r];
      for (int n = 0; n < count; n += kFloats) {
        const Floats x = load<kFloats>(of_row + n);
        largest = x > largest ? x : largest;
      }
      const float most =
          fold_lanes<kFloats>(largest, [](auto a, auto b) VLMOPS_INLINED { return a > b ? a : b; });
      const float from = most == -kInfinity ? 0.0f : most;
      alpha[r] = base.weight(Floats{} + (top[r] - from))[0];
      top[r] = most;
      Floats weights = {};
      for (int n = 0; n < count; n += kFloats) {
        const Floats e = base.weight(load<kFloats>(of_row + n) - from);
        store<kFloats>(of_row + n, e);
        weights += e;
      }
      sum[r] = sum[r] * alpha[r] + sum_lanes<kFloats>(weights);
    }
    add_values<kWhole>(h, of_v, first, count, rows, s, alpha, part, [&](int n) VLMOPS_INLINED {
      const int64_t next = first + kKeyBlock + n;
      if (next < end) ask_for_row(of_k + h.key(next) * p.k.row, p.dim);
    });
  }
}

template <class T>
inline void few_rows(const HeadOf& h, int64_t begin, int64_t end, float* scratch,
                     const Part& part) {
  if (h.p.dim % kFloats == 0) return few_rows_of_width<T, true>(h, begin, end, scratch, part);
  few_rows_of_width<T, false>(h, begin, end, scratch, part);
}

// The result of `count` parts that lie one after the other. Each row sees keys of the first.
template <class T>
inline void finish_few(const HeadOf& h, float* parts, int64_t count) {
  const Params& p = h.p;
  const int64_t rows = h.rows(), width = Part::width(p);
  const Base2 base(p);
  const auto part_of = [&](int64_t i) { return Part(p, rows, parts + i * Part::floats(p, rows)); };
  const Part all = part_of(0);
  for (int64_t r = 0; r < rows; ++r) {
    float top = all.top[r], sum = all.sum[r];
    float* const o = all.o + r * width;
    for (int64_t i = 1; i < count; ++i) {
      const Part more = part_of(i);
      const float most = more.top[r] > top ? more.top[r] : top;
      const float old = base.weight(Floats{} + (top - most))[0];
      const float by = base.weight(Floats{} + (more.top[r] - most))[0];
      for (int64_t d = 0; d < width; d += kFloats)
        store<kFloats>(o + d,
                       load<kFloats>(o + d) * old + load<kFloats>(more.o + r * width + d) * by);
      sum = sum * old + more.sum[r] * by;
      top = most;
    }
    const int64_t row = h.job.q.first + h.query(r);
    const float part = sum == 0.0f ? 0.0f : 1.0f / sum;
    T* const to = static_cast<T*>(p.out) + (row * p.heads + h.head(r)) * p.dim;
    if constexpr (kPairs<T>) {  // channels into their order
      for (int64_t d = 0; d < width; d += 32) {
        Vec<float, 4> eights[8];
        __builtin_memcpy(eights, o + d, sizeof(eights));
        for (int i = 0; i < 4; ++i) {
          store<4>(o + d + 8 * i, eights[i]);
          store<4>(o + d + 8 * i + 4, eights[4 + i]);
        }
      }
    }
    for (int d = 0; d < p.dim; d += kFloats)
      store_lanes(to + d, load<kFloats>(o + d) * part, p.dim - d);
    p.most[h.head(r) * p.rows + row] = sum == 0.0f ? 0.0f : top;
    p.part[h.head(r) * p.rows + row] = part;
  }
}

inline size_t scratch(const Params& p, int64_t rows, int64_t) {
  const int64_t panels = panels_of(rows * p.group());
  const int64_t many = panels * panel_floats(p) + kKeyBlock * (kPanelRows + 2 * p.dim);
  const int64_t few = few_floats(p) + Part::floats(p, kFewOnCpu);
  return static_cast<size_t>(many > few ? many : few);
}

template <class T>
inline void forward_head(const HeadOf& h, bool another, float* scratch) {
  const Params& p = h.p;
  if (few_rows_of(p, h.job)) {
    float* const all = scratch + few_floats(p);
    few_rows<T>(h, 0, h.job.k.count, scratch, Part(p, h.rows(), all));
    return finish_few<T>(h, all, 1);
  }
  const int64_t rows = h.rows(), keys = h.job.k.count;
  const int panels = static_cast<int>(panels_of(rows));
  float* const of_panels = scratch;
  float* const s = of_panels + panels * panel_floats(p);
  float* const packed_k = s + kKeyBlock * kPanelRows;
  float* const packed_v = packed_k + kKeyBlock * p.dim;
  const Base2 base(p);
  const auto panel_of = [&](int i) {
    float* const at = of_panels + i * panel_floats(p);
    Panel panel;
    panel.q = at;
    panel.o = at + p.dim * kPanelRows;
    panel.top = panel.o + p.dim * kPanelRows;
    panel.sum = panel.top + kPanelRows;
    panel.limits = reinterpret_cast<const int32_t*>(panel.sum + kPanelRows);
    panel.first = static_cast<int64_t>(i) * kPanelRows;
    panel.rows =
        static_cast<int>(rows - panel.first < kPanelRows ? rows - panel.first : kPanelRows);
    panel.vectors = (panel.rows + kFloats - 1) / kFloats;
    panel.least = h.limit(panel.first);
    panel.most = h.limit(panel.first + panel.rows - 1);
    return panel;
  };
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_of(i);
    auto* const q = const_cast<float*>(panel.q);
    if constexpr (kPairs<T>) {
      pack_query_pairs<T>(p.q, h, panel.first, panel.rows, sign_of(p), q);
    } else {
      pack_queries<T>(p.q, h, panel.first, panel.rows, sign_of(p), q);
    }
    auto* const limits = const_cast<int32_t*>(panel.limits);
    for (int r = 0; r < kPanelRows; ++r) {
      panel.top[r] = -kInfinity;
      panel.sum[r] = 0.0f;
      limits[r] = static_cast<int32_t>(h.limit(panel.first + (r < panel.rows ? r : 0)));
    }
  }
  const int64_t last = panel_of(panels - 1).most + 1, end = last < keys ? last : keys;
  for (int64_t first = 0; first < end; first += kKeyBlock) {
    const int count = static_cast<int>(end - first < kKeyBlock ? end - first : kKeyBlock);
    const auto k = [&] {
      if constexpr (kPairs<T>) {
        return key_rows<T>(p.k, h, first, count, panels > 1, packed_k);
      } else {
        return keys_of<T>(p.k, h, first, count, panels > 1, packed_k);
      }
    }();
    const auto v = [&] {
      if constexpr (kPairs<T>) {
        return key_pairs<T>(p.v, h, first, count, packed_v);
      } else {
        return keys_of<T>(p.v, h, first, count, panels > 1, packed_v);
      }
    }();
    Ahead ahead;
    if (h.job.k_rows == nullptr) {
      if (first + count < end) {
        ask_for(ahead, p.k, keys_base<T>(p.k, h, h.kv_head) + (first + count) * p.k.row);
        ask_for(ahead, p.v, keys_base<T>(p.v, h, h.kv_head) + (first + count) * p.v.row);
        ahead.rows =
            static_cast<int>(end - first - count < kKeyBlock ? end - first - count : kKeyBlock);
      } else if (another && h.job.q_rows == nullptr) {
        ask_for(ahead, p.k, keys_base<T>(p.k, h, h.kv_head + 1));
        ask_for(ahead, p.v, keys_base<T>(p.v, h, h.kv_head + 1));
        if (p.group() == 1)
          ask_for(ahead, p.q,
                  base_of<T>(p.q, p.q_starts, h, h.job.q) + (h.kv_head + 1) * p.q.head +
                      h.job.position * p.q.row);
        ahead.rows = static_cast<int>(keys < kKeyBlock ? keys : kKeyBlock);
      }
      ahead.bytes = p.dim * static_cast<int64_t>(sizeof(T));
      const int steps = panels * (kKeyBlock / 6 + p.dim / 6);
      ahead.at_once = (ahead.rows + steps - 1) / steps;
    }
    for (int i = 0; i < panels; ++i) {
      const Panel panel = panel_of(i);
      if (panel.most < first) continue;
      const int seen =
          static_cast<int>(panel.most + 1 - first < count ? panel.most + 1 - first : count);
      with_number<kMostVectors>(panel.vectors, [&](auto vectors) {
        attend<decltype(vectors)::value>(panel, k, v, p.dim, first, seen, base, s, ahead);
      });
    }
  }
  for (int i = 0; i < panels; ++i) {
    const Panel panel = panel_of(i);
    if (panel.most < 0 || keys == 0) {  // no key was seen
      for (int64_t n = 0; n < p.dim * kPanelRows; ++n) panel.o[n] = 0.0f;
    }
    finish<T>(panel, h);
  }
}

inline void forward(const Params& p, const Job& job, int begin, int end, float* scratch) {
  for (int head = begin; head < end; ++head) {
    with_type(p.dtype, [&](auto* type) {
      forward_head<Pointee<decltype(type)>>({p, job, head}, head + 1 < end, scratch);
    });
  }
}

inline void forward_part(const Params& p, const Job& job, int head, int64_t begin, int64_t end,
                         float* scratch, float* to) {
  with_type(p.dtype, [&](auto* type) {
    const HeadOf h{p, job, head};
    few_rows<Pointee<decltype(type)>>(h, begin, end, scratch, Part(p, h.rows(), to));
  });
}

inline void join_parts(const Params& p, const Job& job, int head, float* parts, int64_t count) {
  with_type(p.dtype,
            [&](auto* type) { finish_few<Pointee<decltype(type)>>({p, job, head}, parts, count); });
}

// ---- Backward ----
//
// With P of the kept statistics and dP = V dO^T, both [keys, rows] as in forward, and delta =
// rowsum(dO O):
//
//   dS = P (dP - delta)    dV = P dO    dK = scale dS Q    dQ^T = scale K^T dS
//
// A block of keys meets all rows of its segment, a panel at a time, and is done: five products. dK
// and dV have D in their lanes, and read q and dO row by row; dQ^T is kept for all rows.

// What is kept of rows, all of a segment's.
struct Taken {
  int64_t rows;               // padded, of the segment's jobs one after the other
  int dim, width;             // D, and D padded
  float *q, *grad;            // a panel: [D, kPanelRows]; of pairs, half of it
  float* dq;                  // the same
  float *q_rows, *grad_rows;  // [rows, width], zeros beyond D; pairs of rows are rows / 2
  float *top, *part, *delta;  // [rows]

  static int64_t floats(int64_t rows, int dim) { return rows * (3 * dim + 2 * padded(dim) + 3); }
  Taken(float* at, int64_t rows, int dim)
      : rows(rows), dim(dim), width(static_cast<int>(padded(dim))) {
    const auto next = [&](int64_t count) {
      float* const here = at;
      at += count;
      return here;
    };
    q = next(rows * dim);
    grad = next(rows * dim);
    dq = next(rows * dim);
    q_rows = next(rows * width);
    grad_rows = next(rows * width);
    top = next(rows);
    part = next(rows);
    delta = next(rows);
  }
};

inline size_t backward_scratch(const Params& p, int64_t rows, int64_t jobs) {
  const int64_t taken = (panels_of(rows * p.group()) + jobs) * kPanelRows;
  return static_cast<size_t>(Taken::floats(taken, p.dim) +
                             kKeyBlock * (3 * kPanelRows + 2 * p.dim + 2 * padded(p.dim)));
}

// delta of rows of `t` from `at` on, from gradient and result as panels of width x kPanelRows: in
// the order of dP, so that of one key that has all the weight dP - delta is 0.
template <int V, class X>
inline void take_delta(const Taken& t, int64_t at, const X* gradient, const X* result, int width) {
  for (int u = 0; u < V; ++u) {
    const auto vector = [&](const X* of, int d) VLMOPS_INLINED {
      return *reinterpret_cast<const Vec<X, kFloats>*>(of + d * kPanelRows + u * kFloats);
    };
    Floats delta = {};
    const auto part = [&](int d, int end) VLMOPS_INLINED {
      Floats sum = {};
      for (; d < end; ++d) add_product(sum, vector(gradient, d), vector(result, d));
      delta += sum;
    };
    if constexpr (__is_same(X, float)) {
      by_parts<V>(width, part);
    } else {
      part(0, width);
    }
    store<kFloats>(t.delta + at + u * kFloats, delta);
  }
}

// Rows [first, first + count) of a job to those of `t` from `at` on, a multiple of kPanelRows.
template <class T>
inline void take(const Backward& b, const HeadOf& h, int64_t first, int count, int64_t at,
                 const Taken& t) {
  const Params& p = h.p;
  const Heads out{p.out, p.q_starts.length * p.heads * p.dim, p.heads * p.dim, p.dim};
  float* const gradient = t.grad + at * t.dim;
  float* const result = t.dq + at * t.dim;
  const auto pack = [&](const Heads& of, float sign, float* to) {
    if constexpr (kPairs<T>) {
      pack_query_pairs<T>(of, h, first, count, sign, to);
    } else {
      pack_queries<T>(of, h, first, count, sign, to);
    }
  };
  pack(p.q, sign_of(p), t.q + at * t.dim);
  pack(b.grad, 1.0f, gradient);
  pack(out, 1.0f, result);
  with_number<kMostVectors>((count + kFloats - 1) / kFloats, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    if constexpr (kPairs<T>) {
      take_delta<V>(t, at, reinterpret_cast<const int32_t*>(gradient),
                    reinterpret_cast<const int32_t*>(result), t.dim / 2);
    } else {
      take_delta<V>(t, at, gradient, result, t.dim);
    }
  });
  for (int64_t i = 0; i < static_cast<int64_t>(t.dim) * kPanelRows; ++i) result[i] = 0.0f;
  const auto row_of = [&](const Heads& of, int i) {
    return base_of<T>(of, p.q_starts, h, h.job.q) + h.query(first + i) * of.row +
           h.head(first + i) * of.head;
  };
  const auto take_rows = [&](const Heads& of, float* to) {
    if constexpr (kPairs<T>) {
      for (int i = 0; i < count; i += 2) {
        float* const pairs = to + (at + i) / 2 * t.width;
        pair_rows(row_of(of, i), i + 1 < count ? row_of(of, i + 1) : nullptr, t.dim, pairs);
        for (int d = t.dim; d < t.width; ++d) pairs[d] = 0.0f;
      }
    } else {
      for (int i = 0; i < count; ++i) {
        const T* const row = row_of(of, i);
        for (int d = 0; d < t.dim; d += kFloats)
          store<kFloats>(to + (at + i) * t.width + d, load_lanes(row + d, t.dim - d));
      }
    }
  };
  take_rows(p.q, t.q_rows);
  take_rows(b.grad, t.grad_rows);
  for (int i = 0; i < count; ++i) {
    const int64_t of = h.head(first + i) * p.rows + h.job.q.first + h.query(first + i);
    t.top[at + i] = p.most[of];
    t.part[at + i] = p.part[of];
  }
  for (int i = count; i < kPanelRows; ++i) {  // they repeat the last, and have no weight
    t.top[at + i] = t.top[at + count - 1];
    t.part[at + i] = 0.0f;
  }
}

// Keys [first, first + count) and a panel of rows: adds to dk, dv [count, width] and dq. p, ds
// [count, kPanelRows]: scratch.
struct Block {
  Rows k, v;
  RowsOf<bfloat16> k_bfloat16, v_bfloat16;
  RowsOf<int32_t> k_pairs;
  int64_t first;
  int count;
  float *p, *ds, *dk, *dv;
  bfloat16 *rounded_p, *rounded_ds;  // the same
};

// Weights of a block and their gradients, from its products S and dP.
class Weights {
 public:
  Weights(const HeadOf& h, const Block& block, const Taken& t, int64_t row, int rows, int64_t at)
      : h_(h),
        block_(block),
        t_(t),
        base_(h.p),
        at_(at),
        masked_(h.p.causal && block.first + block.count - 1 > h.limit(row)) {
    if (!masked_) return;
    for (int r = 0; r < kPanelRows; ++r)
      limits_[r] = static_cast<int32_t>(h.limit(row + (r < rows ? r : rows - 1)));
  }

  // Whether none of the panel's rows sees key n of the block.
  VLMOPS_INLINE bool hides(int n) const {
    const int64_t key = block_.first + n;
    if (h_.job.blocks != nullptr) return !h_.job.blocks[key / h_.p.block];
    return h_.p.padding != nullptr && h_.job.k_rows != nullptr &&
           h_.p.padding[h_.job.k.first + key];
  }
  // Of key n and vector u of the rows.
  VLMOPS_INLINE Floats weight(int n, int u, bool hidden) const {
    const Floats s = load<kFloats>(block_.p + n * kPanelRows + u * kFloats);
    Floats e = base_.weight(s - load<kFloats>(t_.top + at_ + u * kFloats)) *
               load<kFloats>(t_.part + at_ + u * kFloats);
    if (masked_) {
      const Ints limit = *reinterpret_cast<const Ints*>(limits_ + u * kFloats);
      e = limit >= static_cast<int32_t>(block_.first + n) ? e : Floats{};
    }
    return hidden ? Floats{} : e;
  }
  VLMOPS_INLINE Floats gradient(int n, int u, Floats weight) const {
    const Floats dp = load<kFloats>(block_.ds + n * kPanelRows + u * kFloats);
    return weight * (dp - load<kFloats>(t_.delta + at_ + u * kFloats));
  }

 private:
  const HeadOf& h_;
  const Block& block_;
  const Taken& t_;
  const Base2 base_;
  const int64_t at_;
  const bool masked_;
  int32_t limits_[kPanelRows];
};

constexpr int kMostSummed = kFloats == 4 ? 8 : 32;  // rows

// f(W, J, v, n) for tiles of [count, width] that have W vectors from vector v on and J keys from n.
template <class F>
VLMOPS_INLINE void by_key_tiles(int count, int width, const F& f) {
  by_tiles<kMostVectors>(width / kFloats, [&](auto vectors, int v) VLMOPS_INLINED {
    by_tiles<most_of(decltype(vectors)::value)>(
        count, [&](auto tile, int n) VLMOPS_INLINED { f(vectors, tile, v, n); });
  });
}

VLMOPS_INLINE void add_to(float* at, Floats x) { store<kFloats>(at, load<kFloats>(at) + x); }

// S and dP of a block, in its p and ds.
template <int V, class K>
inline void block_products(const RowsOf<K>& k, const RowsOf<K>& v, const Block& block,
                           const Taken& t, int64_t at, bool needs_ds) {
  const auto of_rows = [&](const RowsOf<K>& a, const float* x, float* to) VLMOPS_INLINED {
    by_tiles<most_of(V)>(block.count, [&](auto tile, int n) VLMOPS_INLINED {
      constexpr int J = decltype(tile)::value;
      scores<V, J>(RowsOf<K>{a.data + n * a.stride, a.stride}, x + at * t.dim, t.dim,
                   to + n * kPanelRows, [](int, Floats) VLMOPS_INLINED {});
    });
  };
  of_rows(k, t.q, block.p);
  if (needs_ds) of_rows(v, t.grad, block.ds);
}

template <int V, class T>
inline void pull_back(const Backward& b, const HeadOf& h, const Block& block, const Taken& t,
                      int64_t row, int rows, int64_t at) {
  const bool needs_ds = b.dq != nullptr || b.dk != nullptr;
  const Weights weights(h, block, t, row, rows, at);
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    block_products<V>(block.k_bfloat16, block.v_bfloat16, block, t, at, needs_ds);
    // Both are rounded: [count, kPanelRows], whose pairs are of rows, and ds once more as pairs of
    // keys where it lies.
    const auto put = [&](bfloat16* to, int n, int u, Floats x) VLMOPS_INLINED {
      const auto rounded = _mm512_cvtneps_pbh(bit_cast<__m512>(x));
      __builtin_memcpy(to + n * kPanelRows + u * kFloats, &rounded, sizeof(rounded));
    };
    for (int n = 0; n < block.count; n += 2) {
      for (int u = 0; u < V; ++u) {
        Floats ds[2] = {};
        for (int i = 0; i < 2 && n + i < block.count; ++i) {
          const Floats e = weights.weight(n + i, u, weights.hides(n + i));
          put(block.rounded_p, n + i, u, e);
          if (!needs_ds) continue;
          ds[i] = weights.gradient(n + i, u, e);
          put(block.rounded_ds, n + i, u, ds[i]);
        }
        if (needs_ds)
          store<kFloats>(block.ds + n / 2 * kPanelRows + u * kFloats,
                         bit_cast<Floats>(pair_up(ds[0], ds[1])));
      }
    }
    const auto of_keys = [&](const bfloat16* a, const float* x, float* to) {
      by_key_tiles(block.count, t.width, [&](auto vectors, auto tile, int v, int n) VLMOPS_INLINED {
        const bfloat16* const from = a + n * kPanelRows;
        product<decltype(vectors)::value, decltype(tile)::value>(
            reinterpret_cast<const int32_t*>(x) + at / 2 * t.width + v * kFloats, t.width,
            (rows + 1) / 2,
            [&](int j, int i) VLMOPS_INLINED { return pair_at(from + j * kPanelRows + 2 * i); },
            [&](int j, int u, Floats sum)
                VLMOPS_INLINED { add_to(to + (n + j) * t.width + (v + u) * kFloats, sum); });
      });
    };
    if (b.dv != nullptr) of_keys(block.rounded_p, t.grad_rows, block.dv);
    if (b.dk != nullptr) of_keys(block.rounded_ds, t.q_rows, block.dk);
    if (b.dq == nullptr) return;
    by_tiles<most_of(V)>(t.dim, [&](auto tile, int d) VLMOPS_INLINED {
      columns_product<V, decltype(tile)::value>(
          RowsOf<int32_t>{block.k_pairs.data + d, block.k_pairs.stride},
          reinterpret_cast<const int32_t*>(block.ds), kPanelRows, (block.count + 1) / 2,
          [&](int j, int u, Floats sum) VLMOPS_INLINED {
            add_to(t.dq + at * t.dim + (d + j) * kPanelRows + u * kFloats, sum);
          });
    });
    return;
  }
#endif
  block_products<V>(block.k, block.v, block, t, at, needs_ds);
  for (int n = 0; n < block.count; ++n) {
    const bool hidden = weights.hides(n);
    for (int u = 0; u < V; ++u) {
      const Floats e = weights.weight(n, u, hidden);
      store<kFloats>(block.p + n * kPanelRows + u * kFloats, e);
      if (needs_ds)
        store<kFloats>(block.ds + n * kPanelRows + u * kFloats, weights.gradient(n, u, e));
    }
  }
  const auto of_keys = [&](const float* a, const float* x, float* to) {
    by_key_tiles(block.count, t.width, [&](auto vectors, auto tile, int v, int n) VLMOPS_INLINED {
      for (int r = 0; r < rows; r += kMostSummed) {
        const int count = rows - r < kMostSummed ? rows - r : kMostSummed;
        rows_product<decltype(vectors)::value, decltype(tile)::value>(
            {a + n * kPanelRows + r, kPanelRows}, x + (at + r) * t.width + v * kFloats, t.width,
            count, [&](int j, int u, Floats sum) VLMOPS_INLINED {
              add_to(to + (n + j) * t.width + (v + u) * kFloats, sum);
            });
      }
    });
  };
  if (b.dv != nullptr) of_keys(block.p, t.grad_rows, block.dv);
  if (b.dk != nullptr) of_keys(block.ds, t.q_rows, block.dk);
  if (b.dq == nullptr) return;
  by_tiles<most_of(V)>(t.dim, [&](auto tile, int d) VLMOPS_INLINED {
    by_parts<V>(block.count, [&](int n, int end) VLMOPS_INLINED {
      columns_product<V, decltype(tile)::value>(
          Rows{block.k.data + n * block.k.stride + d, block.k.stride}, block.ds + n * kPanelRows,
          kPanelRows, end - n, [&](int j, int u, Floats sum) VLMOPS_INLINED {
            add_to(t.dq + at * t.dim + (d + j) * kPanelRows + u * kFloats, sum);
          });
    });
  });
}

// Whether a job's queries see any key of a block, where they see blocks.
inline bool sees_any(const HeadOf& h, const Block& block) {
  const int64_t last = (block.first + block.count - 1) / h.p.block;
  for (int64_t i = block.first / h.p.block; i <= last; ++i) {
    if (h.job.blocks[i]) return true;
  }
  return false;
}

// Of keys, [count, width] times `factor`, to rows of one head.
template <class T>
inline void put_keys(const float* from, float factor, const HeadOf& h, int64_t first, int count,
                     void* to) {
  if (to == nullptr) return;
  const Params& p = h.p;
  for (int n = 0; n < count; ++n) {
    T* const row =
        static_cast<T*>(to) + ((h.job.k.first + first + n) * p.kv_heads + h.kv_head) * p.dim;
    for (int d = 0; d < p.dim; d += kFloats) {
      store_lanes(row + d, load<kFloats>(from + n * padded(p.dim) + d) * factor, p.dim - d);
    }
  }
}

template <class T>
inline void backward_head(const Backward& b, const Job* jobs, int64_t count, int head,
                          float* scratch) {
  const Params& p = b.p;
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += panels_of(jobs[i].q.count * p.group()) * kPanelRows;
  const Taken t(scratch, rows, p.dim);
  // f(job's head, first row, rows, where they are in t) of each panel.
  const auto panels = [&](const auto& f) {
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      const HeadOf h{p, jobs[i], head};
      for (int64_t row = 0; row < h.rows(); row += kPanelRows, at += kPanelRows) {
        const int64_t left = h.rows() - row;
        f(h, row, static_cast<int>(left < kPanelRows ? left : kPanelRows), at);
      }
    }
  };
  panels([&](const HeadOf& h, int64_t row, int n, int64_t at) { take<T>(b, h, row, n, at, t); });
  Block block{};
  block.p = scratch + Taken::floats(rows, p.dim);
  block.ds = block.p + kKeyBlock * kPanelRows;
  float* const k = block.ds + kKeyBlock * kPanelRows;
  float* const v = k + kKeyBlock * p.dim;
  block.dk = v + kKeyBlock * p.dim;
  block.dv = block.dk + kKeyBlock * t.width;
  block.rounded_p = reinterpret_cast<bfloat16*>(block.dv + kKeyBlock * t.width);
  block.rounded_ds = block.rounded_p + kKeyBlock * kPanelRows;
  Job every = jobs[0];  // all keys of the segment, one after another
  every.k = range_of(p.k_starts, p.keys, every.segment);
  every.k_rows = nullptr;
  const HeadOf all{p, every, head};
  for (block.first = 0; block.first < all.job.k.count; block.first += kKeyBlock) {
    const int64_t left = all.job.k.count - block.first;
    block.count = static_cast<int>(left < kKeyBlock ? left : kKeyBlock);
    if constexpr (kPairs<T>) {
      block.k_bfloat16 = key_rows<T>(p.k, all, block.first, block.count, true, k);
      block.k_pairs = key_pairs<T>(p.k, all, block.first, block.count, k + kKeyBlock / 2 * p.dim);
      block.v_bfloat16 = key_rows<T>(p.v, all, block.first, block.count, true, v);
    } else {
      block.k = keys_of<T>(p.k, all, block.first, block.count, true, k);
      block.v = keys_of<T>(p.v, all, block.first, block.count, true, v);
    }
    for (int64_t i = 0; i < kKeyBlock * 2 * static_cast<int64_t>(t.width); ++i) block.dk[i] = 0.0f;
    bool seen = p.padding == nullptr;  // by queries that are padding
    for (int n = 0; n < block.count && !seen; ++n)
      seen = !p.padding[all.job.k.first + block.first + n];
    panels([&](const HeadOf& h, int64_t row, int n, int64_t at) {
      if (h.limit(row + n - 1) < block.first && p.causal) return;
      if (h.job.k_rows != nullptr && !(h.job.blocks == nullptr ? seen : sees_any(h, block))) return;
      with_number<kMostVectors>((n + kFloats - 1) / kFloats, [&](auto vectors) {
        pull_back<decltype(vectors)::value, T>(b, h, block, t, row, n, at);
      });
    });
    put_keys<T>(block.dk, p.scale, all, block.first, block.count, b.dk);
    put_keys<T>(block.dv, 1.0f, all, block.first, block.count, b.dv);
  }
  if (b.dq == nullptr) return;
  panels([&](const HeadOf& h, int64_t row, int n, int64_t at) {
    for (int u = 0; u * kFloats < n; ++u) {
      const Places places(h, row + u * kFloats, n - u * kFloats);
      const auto put = [&](auto* to) {
        unpack(t.dq + at * t.dim + u * kFloats, Floats{} + p.scale, places, p.dim, to);
      };
      b.exact_dq ? put(static_cast<float*>(b.dq)) : put(static_cast<T*>(b.dq));
    }
  });
}

inline void backward(const Backward& b, const Job* jobs, int64_t count, int head, float* scratch) {
  with_type(b.p.dtype, [&](auto* type) {
    backward_head<Pointee<decltype(type)>>(b, jobs, count, head, scratch);
  });
}

}  // namespace
}  // namespace vlmops::attention
