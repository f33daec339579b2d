// Pixel shuffle on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
// A block of f x f pixels of C channels becomes one merged token of K = f * f * C channels, or
// their mean of K = C:
//   y[(dy * f + dx) * C + c] = x[dy, dx][c]     order "yxc"
//   y[c * f * f + dy * f + dx] = x[dy, dx][c]   order "cyx"
// with a norm over K, or over the C channels of each pixel before it is merged:
//   z = (x - mean) * r * w + b;   r = 1 / sqrt(var + eps)       "rms": mean 0, var = mean(x^2)
// Backward, with xh = (x - mean) * r:
//   dx = r * (w g - mean(w g) - xh * mean(w g xh));   dw = sum g xh;   db = sum g     "rms": no
//   mean(w g)
// Mean and r are computed again from x, which backward reads anyway: stored, they would save one of
// the passes over L1 and cost a tensor.
//
// Bytes: every element once read, once written. 13 tiles x 1024 tokens x 1024 channels of float32
// are 109 MB.
//
// "yxc" moves runs of f * C channels. Rows that are normed are read from memory once, and again for
// each pass from L1, or from L2 where K is beyond some thousand channels. Everything is done in the
// dtype's own bits but for the arithmetic, which is float32 and rounded once; "cyx" permutes bits,
// in registers for factor 2, before or after the arithmetic.
#pragma once

#include "common/norm_cpu.h"
#include "ops/pixel_shuffle/pixel_shuffle.h"

namespace vlmops::pixel_shuffle {
namespace {

constexpr int64_t kMaxBlock = kMaxFactor * kMaxFactor;
static_assert(kMaxBlock <= kMaxRuns);

inline RowNorm norm_of(const Params& p) { return {p.norm == Norm::kLayer, p.eps}; }

// Where the pixels of a block begin, or the pieces of one merged token.
template <class T>
struct Block {
  T* pixel[kMaxBlock];
};

template <class T>
inline void place_block(const Params& p, T* base, const Pixels& at, int64_t image, int64_t row,
                        int64_t column, Block<T>& block) {
  base += at.offset + image * at.image + row * at.block_row + column * at.block_column;
  for (int64_t y = 0; y < p.factor; ++y)
    for (int64_t x = 0; x < p.factor; ++x)
      block.pixel[y * p.factor + x] = base + y * at.y + x * at.x;
}

// a0 b0 a1 b1 .., in two vectors, and back.
template <class V>
struct Two {
  V first, second;
};

template <class U, int N>
VLMOPS_INLINE Two<Vec<U, N>> zip(const Vec<U, N>& a, const Vec<U, N>& b) {
#if defined(__clang__)
  Two<Vec<U, N>> out;
  for (int i = 0; i < N; ++i) {
    (i < N / 2 ? out.first : out.second)[2 * i % N] = a[i];
    (i < N / 2 ? out.first : out.second)[2 * i % N + 1] = b[i];
  }
  return out;
#else
  Vec<U, N> low, high;
  for (int i = 0; i < N; ++i) {
    low[i] = static_cast<U>(i / 2 + i % 2 * N);
    high[i] = static_cast<U>(N / 2 + i / 2 + i % 2 * N);
  }
  return {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
#endif
}

template <class U, int N>
VLMOPS_INLINE Two<Vec<U, N>> unzip(const Vec<U, N>& a, const Vec<U, N>& b) {
#if defined(__clang__)
  Two<Vec<U, N>> out;
  for (int i = 0; i < N; ++i) {
    out.first[i] = i < N / 2 ? a[2 * i] : b[2 * i - N];
    out.second[i] = i < N / 2 ? a[2 * i + 1] : b[2 * i + 1 - N];
  }
  return out;
#else
  Vec<U, N> even, odd;
  for (int i = 0; i < N; ++i) {
    even[i] = static_cast<U>(2 * i);
    odd[i] = static_cast<U>(2 * i + 1);
  }
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd)};
#endif
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};

// The C channels of f * f pixels, `stride` apart, to their places in a merged token.
template <class T>
inline void merge(const Params& p, Order order, const Block<const T>& from, int64_t stride, T* to,
                  bool streams) {
  const int64_t n = p.block(), c = p.channels;
  if (order == Order::kYxc) {
    for (int64_t i = 0; i < n;) {
      if (stride != 1) {
        for (int64_t k = 0; k < c; ++k) to[i * c + k] = from.pixel[i][k * stride];
        ++i;
        continue;
      }
      int64_t run = 1;
      while (i + run < n && from.pixel[i + run] == from.pixel[i] + run * c) ++run;
      copy_run(to + i * c, from.pixel[i], run * c, streams);
      i += run;
    }
    return;
  }
  int64_t k = 0;
  if (p.factor == 2 && stride == 1) {
    using U = typename BitsOf<sizeof(T)>::type;
    constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
    using V = Vec<U, lanes>;
    const bool streamed = streams && aligned(to);
    for (; k + lanes <= c; k += lanes) {
      const auto at = [&](int i)
                          VLMOPS_INLINED { return *reinterpret_cast<const V*>(from.pixel[i] + k); };
      const auto even = zip<U, lanes>(at(0), at(2)), odd = zip<U, lanes>(at(1), at(3));
      const auto low = zip<U, lanes>(even.first, odd.first);
      const auto high = zip<U, lanes>(even.second, odd.second);
      const V out[4] = {low.first, low.second, high.first, high.second};
      for (int i = 0; i < 4; ++i) {
        T* at_out = to + 4 * k + i * lanes;
        if (streamed) {
          stream(at_out, bit_cast<Vec<uint8_t, kVectorBytes>>(out[i]));
        } else {
          *reinterpret_cast<V*>(at_out) = out[i];
        }
      }
    }
  }
  for (; k < c; ++k)
    for (int64_t i = 0; i < n; ++i) to[k * n + i] = from.pixel[i][k * stride];
}

// And back; the channels of a merged token lie `stride` apart, those of pixels side by side.
template <class T>
inline void split(const Params& p, Order order, const T* from, int64_t stride, const Block<T>& to,
                  bool streams) {
  const int64_t n = p.block(), c = p.channels;
  if (order == Order::kYxc) {
    for (int64_t i = 0; i < n;) {
      if (stride != 1) {
        for (int64_t k = 0; k < c; ++k) to.pixel[i][k] = from[(i * c + k) * stride];
        ++i;
        continue;
      }
      int64_t run = 1;
      while (i + run < n && to.pixel[i + run] == to.pixel[i] + run * c) ++run;
      copy_run(to.pixel[i], from + i * c, run * c, streams);
      i += run;
    }
    return;
  }
  int64_t k = 0;
  if (p.factor == 2 && stride == 1) {
    using U = typename BitsOf<sizeof(T)>::type;
    constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
    using V = Vec<U, lanes>;
    bool streamed = streams;
    for (int i = 0; i < 4; ++i) streamed = streamed && aligned(to.pixel[i]);
    for (; k + lanes <= c; k += lanes) {
      const auto at = [&](int i) VLMOPS_INLINED {
        return *reinterpret_cast<const V*>(from + 4 * k + i * lanes);
      };
      const auto low = unzip<U, lanes>(at(0), at(1)), high = unzip<U, lanes>(at(2), at(3));
      const auto even = unzip<U, lanes>(low.first, high.first);
      const auto odd = unzip<U, lanes>(low.second, high.second);
      const V out[4] = {even.first, odd.first, even.second, odd.second};
      for (int i = 0; i < 4; ++i) {
        if (streamed) {
          stream(to.pixel[i] + k, bit_cast<Vec<uint8_t, kVectorBytes>>(out[i]));
        } else {
          *reinterpret_cast<V*>(to.pixel[i] + k) = out[i];
        }
      }
    }
  }
  for (; k < c; ++k)
    for (int64_t i = 0; i < n; ++i) to.pixel[i][k] = from[(k * n + i) * stride];
}

template <class T>
inline bool adjacent_pixels(const Params& p, const Block<T>& block) {
  for (int64_t i = 1; i < p.factor; ++i)
    if (block.pixel[i] != block.pixel[i - 1] + p.channels) return false;
  return true;
}

// The pixels of a block as runs: a row of the block each, or a pixel.
template <class T>
inline void runs_of(const Params& p, const Block<T>& block, bool by_row, Runs<T>& runs) {
  const int64_t each = by_row ? p.factor : 1;
  runs.count = p.block() / each;
  runs.length = each * p.channels;
  for (int64_t i = 0; i < runs.count; ++i) runs.run[i] = block.pixel[i * each];
}

// Scratch of a call, in floats. Weights and biases lie in the order of Access.
struct Scratch {
  float *weight, *bias;
  float *x[kTogether], *dx[kTogether], *g[kTogether];  // a row each; forward has two, in x
  int64_t normed;
  bool words;  // of weights
  bool has_bias;

  Scratch(const Params& p, float* memory) : normed(p.normed()) {
    const int64_t k = p.depth();
    auto* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    const auto next = [&] {
      float* part = at;
      at += (k + 15) / 16 * 16 + kScratchGap;
      return part;
    };
    weight = next();
    bias = next();
    for (float*& part : x) part = next();
    for (float*& part : dx) part = next();
    for (float*& part : g) part = next();
  }
};

// Whether rows are read as words: all runs must have whole vectors of them.
inline bool in_words(const Params& p) {
  return p.dtype == DType::kBFloat16 && !p.mean && p.channels % (2 * kFloats) == 0;
}

inline int64_t place_of(const Scratch& s, int64_t k) {
  return s.words ? Access<bfloat16, true>::place(k) : k;
}

inline void init_norm(const Params& p, Scratch& s) {
  s.words = in_words(p);
  s.has_bias = p.bias.data != nullptr;
  for (int64_t k = 0; k < s.normed; ++k) {
    const int64_t at = place_of(s, k);
    s.weight[at] = p.weight.data == nullptr ? 1.0f : canonical(element(p.weight, k) + p.offset);
    if (s.has_bias) s.bias[at] = canonical(element(p.bias, k));
  }
}

template <class A, bool kBias, class S, class T>
inline void write_normed(Statistics by, const Scratch& s, const Runs<const S>& x, T* y,
                         bool streams) {
  const bool streamed = streams && aligned(y) && (x.length * sizeof(T)) % kVectorBytes == 0;
  each_step<A>(x.count, x.length, [&](A a, int64_t r, int64_t i, int64_t at, int) VLMOPS_INLINED {
    auto values = a.read(x.run[r] + i);
    for (int v = 0; v < A::kVectors; ++v) {
      auto& u = values.v[v];
      const int64_t place = at + v * kFloats;
      u = ((u - by.mean) * by.scale + by.shift) * load<kFloats>(s.weight + place);
      if constexpr (kBias) u += load<kFloats>(s.bias + place);
    }
    using To = Access<T, (A::kVectors > 1)>;
    To::write(y + at, bit_cast<typename To::Values>(values), streamed);
  });
  each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t at) VLMOPS_INLINED {
    float u = ((one(x.run[r] + i) - by.mean) * by.scale + by.shift) * s.weight[at];
    if constexpr (kBias) u += s.bias[at];
    store<1>(y + at, Vec<float, 1>{u});
  });
}

// y: as many elements as x has, side by side.
template <class A, class S, class T>
inline void norm_row(const Params& p, const Scratch& s, const Runs<const S>& x, T* y,
                     bool streams) {
  const Statistics by = statistics<A>(norm_of(p), x);
  if (s.has_bias) {
    write_normed<A, true>(by, s, x, y, streams);
  } else {
    write_normed<A, false>(by, s, x, y, streams);
  }
}

template <class S, class T>
inline void norm_any_row(const Params& p, const Scratch& s, const Runs<const S>& x, T* y,
                         bool streams) {
  if constexpr (__is_same(S, bfloat16)) {
    if (s.words) return norm_row<Access<S, true>>(p, s, x, y, streams);
  }
  norm_row<Access<S, false>>(p, s, x, y, streams);
}

// dx of kRows rows, and what they add to the gradients of weight and bias, if `total` has them:
// summed over these rows in float32, then in float64.
template <class A, int kRows, class S, class G>
inline void backward_rows(const Scratch& s, const BackwardRow<S, G>* rows, double* total,
                          bool streams) {
  using OfGrad = Access<G, (A::kVectors > 1)>;
  const int64_t count = rows[0].x.count, length = rows[0].x.length;
  const bool needs_dx = rows[0].dx.count != 0;
  double* const bias_total = total + s.normed;
  bool streamed = streams && (length * sizeof(S)) % kVectorBytes == 0;
  for (int row = 0; row < kRows; ++row)
    for (int64_t r = 0; r < rows[row].dx.count; ++r)
      streamed = streamed && aligned(rows[row].dx.run[r]);
  each_step<A>(count, length, [&](A a, int64_t r, int64_t i, int64_t at, int) VLMOPS_INLINED {
    Vec<float, kFloats> weight_grad[A::kVectors] = {}, bias_grad[A::kVectors] = {};
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const BackwardRow<S, G>& of = rows[row];
      auto xs = a.read(of.x.run[r] + i);
      const auto gs = bit_cast<typename A::Values>(OfGrad::read(of.g + at));
      for (int v = 0; v < A::kVectors; ++v) {
        const auto xh = (xs.v[v] - of.by.mean) * of.by.scale + of.by.shift;
        weight_grad[v] += gs.v[v] * xh;
        bias_grad[v] += gs.v[v];
        const auto wg = gs.v[v] * load<kFloats>(s.weight + at + v * kFloats);
        xs.v[v] = (wg - of.mean_wg - xh * of.mean_along) * of.by.scale;
      }
      if (needs_dx) a.write(of.dx.run[r] + i, xs, streamed);
    }
    if (total == nullptr) return;
    for (int v = 0; v < A::kVectors; ++v) {
      add_to_doubles(total + at + v * kFloats, weight_grad[v]);
      add_to_doubles(bias_total + at + v * kFloats, bias_grad[v]);
    }
  });
  each_left<A>(count, length, [&](int64_t r, int64_t i, int64_t at) VLMOPS_INLINED {
    float weight_grad = 0.0f, bias_grad = 0.0f;
    for (int row = 0; row < kRows; ++row) {
      const BackwardRow<S, G>& of = rows[row];
      const float xh = (one(of.x.run[r] + i) - of.by.mean) * of.by.scale + of.by.shift;
      const float grad = one(of.g + at);
      weight_grad += grad * xh;
      bias_grad += grad;
      const float dx = (grad * s.weight[at] - of.mean_wg - xh * of.mean_along) * of.by.scale;
      if (needs_dx) store<1>(of.dx.run[r] + i, Vec<float, 1>{dx});
    }
    if (total == nullptr) return;
    total[at] += static_cast<double>(weight_grad);
    bias_total[at] += static_cast<double>(bias_grad);
  });
}

// Which block a merged token is.
struct Place {
  const Group* group;
  int64_t number, image, row, column;  // number: among the tokens of its image
};

inline Place find(const Params& p, int64_t token) {
  const Group* group = p.groups;
  while (group + 1 < p.groups + p.group_count && group[1].first <= token) ++group;
  const int64_t n = token - group->first, tokens = group->rows * group->columns;
  const int64_t number = n % tokens;
  return {group, number, n / tokens, number / group->columns, number % group->columns};
}

// Whole steps of the mean of n pixels [C], or of kPixels where that is not 0; returns their end.
template <class A, int kPixels, class T, class U>
inline int64_t average_steps(const Block<const T>& from, int64_t n, int64_t c, U* to,
                             bool streams) {
  using To = Access<U, (A::kVectors > 1)>;
  const int64_t count = kPixels > 0 ? kPixels : n;
  const float share = 1.0f / static_cast<float>(count);
  const bool streamed = streams && aligned(to);
  int64_t k = 0;
  for (; k + A::kStep <= c; k += A::kStep) {
    auto sum = A::read(from.pixel[0] + k);
    for (int64_t i = 1; i < count; ++i) {
      const auto more = A::read(from.pixel[i] + k);
      for (int v = 0; v < A::kVectors; ++v) sum.v[v] += more.v[v];
    }
    for (auto& v : sum.v) v *= share;
    To::write(to + k, bit_cast<typename To::Values>(sum), streamed);
  }
  return k;
}

// The mean of a block's pixels [C], computed in float32.
template <class T, class U>
inline void average(const Params& p, const Block<const T>& from, int64_t stride, U* to,
                    bool streams) {
  constexpr bool kWords = __is_same(T, bfloat16) && __is_same(U, bfloat16);
  using A = Access<T, kWords>;
  const int64_t n = p.block(), c = p.channels;
  int64_t k = 0;
  if (stride == 1)
    k = n == 4 ? average_steps<A, 4>(from, n, c, to, streams)
               : average_steps<A, 0>(from, n, c, to, streams);
  const float share = 1.0f / static_cast<float>(n);
  for (; k < c; ++k) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += one(from.pixel[i] + k * stride);
    store<1>(to + k, Vec<float, 1>{sum * share});
  }
}

// x [C], times the share of each pixel, to all of them.
template <class S, class T>
inline void spread(const Params& p, const S* x, int64_t stride, const Block<T>& to) {
  const int64_t n = p.block(), c = p.channels;
  const float share = 1.0f / static_cast<float>(n);
  int64_t k = 0;
  if (stride == 1) {
    for (; k + kFloats <= c; k += kFloats) {
      const auto v = load<kFloats>(x + k) * share;
      for (int64_t i = 0; i < n; ++i) store<kFloats>(to.pixel[i] + k, v);
    }
  }
  for (; k < c; ++k) {
    const Vec<float, 1> v{one(x + k * stride) * share};
    for (int64_t i = 0; i < n; ++i) store<1>(to.pixel[i] + k, v);
  }
}

// Pieces of C that lie one after the other.
template <class T>
inline void pieces_of(const Params& p, T* base, Block<T>& block) {
  for (int64_t i = 0; i < p.block(); ++i) block.pixel[i] = base + i * p.channels;
}

// n elements, `stride` apart, side by side.
template <class T>
inline const T* adjacent(const T* x, int64_t stride, int64_t n, T* buffer) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i * stride];
  return buffer;
}

template <class T>
void forward_typed(const Params& p, int64_t begin, int64_t end, float* memory) {
  Scratch s(p, memory);
  if (p.norm != Norm::kNone) init_norm(p, s);
  Block<const T> block;
  for (int64_t token = begin; token < end; ++token) {
    const Place at = find(p, token);
    place_block(p, static_cast<const T*>(p.pixels), at.group->from, at.image, at.row, at.column,
                block);
    T* y = static_cast<T*>(p.merged_out) + at.group->merged_out + at.image * at.group->image_out +
           at.number * p.token_stride_out;
    if (p.mean) {
      if (p.norm == Norm::kNone) {
        average(p, block, p.pixel_stride, y, p.streams);
        continue;
      }
      average(p, block, p.pixel_stride, s.x[0], false);
      Runs<const float> runs;
      one_run<const float>(runs, s.x[0], p.channels);
      norm_any_row(p, s, runs, y, p.streams);
      continue;
    }
    if (p.norm == Norm::kNone) {
      merge(p, p.order, block, p.pixel_stride, y, p.streams);
      continue;
    }
    Runs<const T> runs;
    if (p.norm_channels) {
      T* out = p.order == Order::kYxc ? y : reinterpret_cast<T*>(s.x[0]);
      T* buffer = reinterpret_cast<T*>(s.x[1]);
      for (int64_t i = 0; i < p.block(); ++i) {
        one_run(runs, adjacent(block.pixel[i], p.pixel_stride, p.channels, buffer), p.channels);
        norm_any_row(p, s, runs, out + i * p.channels, p.streams && out == y);
      }
      if (out == y) continue;
      pieces_of<const T>(p, out, block);
      merge(p, p.order, block, 1, y, p.streams);
      continue;
    }
    if (p.order == Order::kYxc && p.pixel_stride == 1) {
      runs_of<const T>(p, block, adjacent_pixels(p, block), runs);
    } else {
      T* merged = reinterpret_cast<T*>(s.x[0]);
      merge(p, p.order, block, p.pixel_stride, merged, false);
      one_run<const T>(runs, merged, p.depth());
    }
    norm_any_row(p, s, runs, y, p.streams);
  }
  finish_streams();
}

template <class T>
void inverse_typed(const Params& p, int64_t begin, int64_t end) {
  Block<T> block;
  for (int64_t token = begin; token < end; ++token) {
    const Place at = find(p, token);
    place_block(p, static_cast<T*>(p.pixels_out), at.group->to, at.image, at.row, at.column, block);
    const T* merged = static_cast<const T*>(p.merged) + at.group->merged +
                      at.image * at.group->image + at.number * p.token_stride;
    if (p.mean) {
      spread(p, merged, p.merged_stride, block);
    } else {
      split(p, p.order, merged, p.merged_stride, block, p.streams);
    }
  }
  finish_streams();
}

// Rows are normed kTogether at a time, counted from the first: sums of the gradients of weight and
// bias are longer than L1, and are read and written as seldom. Which rows meet depends on nothing
// but their number, so that strides change no bit. A: how S is read, the type of normed values
// (T's, or float for means).
template <class A, class S, class T>
void norm_backward_rows(const Params& p, const Scratch& s, int64_t begin, int64_t end,
                        double* total) {
  const bool needs_dx = p.pixels_out != nullptr, means = p.mean;
  // Where merged tokens are runs of pixels.
  const bool in_place = !means && p.order == Order::kYxc && p.pixel_stride == 1;
  const bool streams = p.streams && (in_place || p.norm_channels);
  const bool splits = p.norm_channels && (p.order == Order::kCyx || p.merged_stride != 1);
  const int64_t of_token = p.norm_channels ? p.block() : 1;  // rows
  const auto locate = [&](int64_t row, Block<const T>& block, Block<T>& out) {
    const Place at = find(p, begin + row / of_token);
    place_block(p, static_cast<const T*>(p.pixels), at.group->from, at.image, at.row, at.column,
                block);
    if (needs_dx)
      place_block(p, static_cast<T*>(p.pixels_out), at.group->to, at.image, at.row, at.column, out);
    return static_cast<const T*>(p.merged) + at.group->merged + at.image * at.group->image +
           at.number * p.token_stride;
  };
  const auto prepare = [&](int64_t number, int slot, BackwardRow<S, T>& row) {
    Block<const T> block;
    Block<T> out{};
    const T* g = locate(number, block, out);
    auto* x = reinterpret_cast<S*>(s.x[slot]);
    auto* dx = reinterpret_cast<S*>(s.dx[slot]);
    auto* to_g = reinterpret_cast<T*>(s.g[slot]);
    if (p.norm_channels) {
      const int64_t pixel = number % of_token;
      if (splits) {  // the whole token at once
        Block<T> pieces{};
        pieces_of(p, reinterpret_cast<T*>(s.g[number / of_token % kTogether]), pieces);
        if (pixel == 0) split(p, p.order, g, p.merged_stride, pieces, false);
        row.g = pieces.pixel[pixel];
      } else {
        row.g = g + pixel * p.channels;
      }
      if constexpr (__is_same(S, T)) {
        one_run(row.x, adjacent(block.pixel[pixel], p.pixel_stride, p.channels, x), p.channels);
        one_run(row.dx, out.pixel[pixel], p.channels);
      }
    } else if (in_place) {
      row.g = adjacent(g, p.merged_stride, p.depth(), to_g);
      if constexpr (__is_same(S, T)) {
        const bool by_row = adjacent_pixels(p, block) && (!needs_dx || adjacent_pixels(p, out));
        runs_of<const T>(p, block, by_row, row.x);
        runs_of(p, out, by_row, row.dx);
      }
    } else {
      row.g = adjacent(g, p.merged_stride, s.normed, to_g);
      if (means) {
        average(p, block, p.pixel_stride, x, false);
      } else if constexpr (__is_same(S, T)) {
        merge(p, p.order, block, p.pixel_stride, x, false);
      }
      one_run<const S>(row.x, x, s.normed);
      one_run(row.dx, dx, s.normed);
    }
    if (!needs_dx) row.dx.count = 0;
    backward_statistics<A>(norm_of(p), s.weight, row);
  };
  // dx that lies in a slot goes to its pixels.
  const auto finish = [&](int64_t number, int slot) {
    if (!needs_dx || in_place || p.norm_channels) return;
    Block<const T> block;
    Block<T> out{};
    locate(number, block, out);
    if (means) {
      spread(p, reinterpret_cast<const S*>(s.dx[slot]), 1, out);
    } else {
      split(p, p.order, reinterpret_cast<const T*>(s.dx[slot]), 1, out, p.streams);
    }
  };
  BackwardRow<S, T> rows[kTogether];
  const int64_t count = (end - begin) * of_token;
  for (int64_t first = 0; first < count; first += kTogether) {
    const int together = count - first < kTogether ? static_cast<int>(count - first) : kTogether;
    for (int i = 0; i < together; ++i) prepare(first + i, i, rows[i]);
    if (together == kTogether) {
      backward_rows<A, kTogether>(s, rows, total, streams);
    } else {
      for (int i = 0; i < together; ++i) backward_rows<A, 1>(s, rows + i, total, streams);
    }
    for (int i = 0; i < together; ++i) finish(first + i, i);
  }
  finish_streams();
}

template <class T>
void norm_backward_typed(const Params& p, int64_t begin, int64_t end, float* memory,
                         double* total) {
  Scratch s(p, memory);
  init_norm(p, s);
  if (p.mean) return norm_backward_rows<Access<float, false>, float, T>(p, s, begin, end, total);
  if constexpr (__is_same(T, bfloat16)) {
    if (s.words) {
      norm_backward_rows<Access<T, true>, T, T>(p, s, begin, end, total);
      if (total == nullptr) return;
      auto* ordered = reinterpret_cast<double*>(s.x[0]);  // and x[1] .. x[3]
      for (int64_t k = 0; k < 2 * s.normed; ++k)
        ordered[k] = total[k / s.normed * s.normed + place_of(s, k % s.normed)];
      for (int64_t k = 0; k < 2 * s.normed; ++k) total[k] = ordered[k];
      return;
    }
  }
  norm_backward_rows<Access<T, false>, T, T>(p, s, begin, end, total);
}

// f(a null pointer of the type).
template <class F>
inline void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<float16*>(nullptr));
  }
}

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

void forward(const Params& p, int64_t begin, int64_t end, float* scratch) {
  by_dtype(p.dtype, [&](auto* type) {
    forward_typed<typename Pointee<decltype(type)>::type>(p, begin, end, scratch);
  });
}

void inverse(const Params& p, int64_t begin, int64_t end, float*) {
  by_dtype(p.dtype, [&](auto* type) {
    inverse_typed<typename Pointee<decltype(type)>::type>(p, begin, end);
  });
}

void norm_backward(const Params& p, int64_t begin, int64_t end, float* scratch,
                   double* weight_grad) {
  by_dtype(p.dtype, [&](auto* type) {
    norm_backward_typed<typename Pointee<decltype(type)>::type>(p, begin, end, scratch,
                                                                weight_grad);
  });
}

}  // namespace
}  // namespace vlmops::pixel_shuffle
