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

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "ops/pixel_shuffle/pixel_shuffle.h"

namespace vlmops::pixel_shuffle {
namespace {

constexpr int64_t kMaxBlock = kMaxFactor * kMaxFactor;

// Stores that leave the caches alone, for what is larger than they are: memory is not read before
// it is overwritten. `to` is aligned.
VLMOPS_INLINE void stream(void* to, const Vec<uint8_t, kVectorBytes>& v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#else
  *static_cast<Vec<uint8_t, kVectorBytes>*>(to) = v;
#endif
}

// Streamed stores become visible to other threads.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

VLMOPS_INLINE bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

template <class T>
inline void copy_run(T* to, const T* from, int64_t n, bool streams) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  if (!streams || !aligned(to)) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  auto* out = reinterpret_cast<uint8_t*>(to);
  const auto* in = reinterpret_cast<const uint8_t*>(from);
  int64_t i = 0;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes)
    stream(out + i, *reinterpret_cast<const Vec<uint8_t, kVectorBytes>*>(in + i));
  __builtin_memcpy(out + i, in + i, bytes - i);
}

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

// How kStep elements that lie side by side come into float vectors, and where the weights of a norm
// lie for them. bfloat16 comes two channels to a word (simd.h) where rows have whole vectors of
// them.
template <class T, bool kWords>
struct Access {
  static constexpr int kVectors = 1, kStep = kFloats;
  struct Values {
    Vec<float, kFloats> v[1];
  };
  VLMOPS_INLINE static Values read(const T* p) { return {{load<kFloats>(p)}}; }
  VLMOPS_INLINE static void write(T* p, const Values& x, bool streams) {
    if constexpr (sizeof(T) == 4) {
      if (streams) return stream(p, bit_cast<Vec<uint8_t, kVectorBytes>>(x.v[0]));
    }
    store<kFloats>(p, x.v[0]);
  }
  // Of channel k, among floats.
  static int64_t place(int64_t k) { return k; }
};

template <>
struct Access<bfloat16, true> {
  static constexpr int kVectors = 2, kStep = 2 * kFloats;
  struct Values {
    Vec<float, kFloats> v[2];
  };
  VLMOPS_INLINE static Values read(const bfloat16* p) {
    const auto x = load_even_odd<kFloats>(p);
    return {{x.even, x.odd}};
  }
  VLMOPS_INLINE static void write(bfloat16* p, const Values& x, bool streams) {
    if (!streams) return store_even_odd<kFloats>(p, x.v[0], x.v[1]);
    Vec<uint8_t, kVectorBytes> word;
    store_even_odd<kFloats>(reinterpret_cast<bfloat16*>(&word), x.v[0], x.v[1]);
    stream(p, word);
  }
  static int64_t place(int64_t k) { return k / kStep * kStep + k % 2 * kFloats + k % kStep / 2; }
};

// Elements that are normed together: `count` runs of `length` that lie side by side.
template <class T>
struct Runs {
  int64_t count, length;
  T* run[kMaxBlock];
};

template <class T>
inline void one_run(Runs<T>& runs, T* at, int64_t length) {
  runs.count = 1;
  runs.length = length;
  runs.run[0] = at;
}

// The pixels of a block as runs: as few as both have alike.
template <class A, class B>
inline void runs_of(const Params& p, const Block<A>& a, const Block<B>* b, Runs<A>& to_a,
                    Runs<B>* to_b) {
  const int64_t n = p.block(), f = p.factor, c = p.channels;
  int64_t each = n;  // pixels of a run
  for (int64_t i = 1; i < n; ++i) {
    const auto adjacent = [&](const auto& block) {
      return block.pixel[i] == block.pixel[i - 1] + c;
    };
    if (adjacent(a) && (b == nullptr || adjacent(*b))) continue;
    if (i % f != 0) {
      each = 1;
      break;
    }
    each = f;
  }
  to_a.count = n / each;
  to_a.length = each * c;
  for (int64_t i = 0; i < to_a.count; ++i) to_a.run[i] = a.pixel[i * each];
  if (b == nullptr) return;
  to_b->count = to_a.count;
  to_b->length = to_a.length;
  for (int64_t i = 0; i < to_a.count; ++i) to_b->run[i] = b->pixel[i * each];
}

// Calls f(lanes, run, i, at, slot) for elements i of each run, which are `at` among all. Slots 0 to
// 3 change from call to call: sums that wait for one another overlap.
template <class A, class F>
VLMOPS_INLINE void each_step(int64_t runs, int64_t length, const F& f) {
  for (int64_t r = 0, first = 0; r < runs; ++r, first += length) {
    int64_t i = 0;
    for (; i + 4 * A::kStep <= length; i += 4 * A::kStep) {
#pragma GCC unroll 4
      for (int slot = 0; slot < 4; ++slot)
        f(A{}, r, i + slot * A::kStep, first + i + slot * A::kStep, slot);
    }
    for (; i + A::kStep <= length; i += A::kStep) f(A{}, r, i, first + i, 0);
  }
}

// What is left of each run behind whole steps, one by one: f(run, i, at).
template <class A, class F>
VLMOPS_INLINE void each_left(int64_t runs, int64_t length, const F& f) {
  if (length % A::kStep == 0) return;
  for (int64_t r = 0; r < runs; ++r)
    for (int64_t i = length / A::kStep * A::kStep; i < length; ++i) f(r, i, r * length + i);
}

struct Sums {
  Vec<float, kFloats> part[4] = {};
  float left = 0.0f;
  float total() const {
    return sum_lanes<kFloats>((part[0] + part[1]) + (part[2] + part[3])) + left;
  }
};

template <class T>
inline float one(const T* p) {
  return load<1>(p)[0];
}

template <class A, class S>
inline float mean_of(const Runs<const S>& x) {
  Sums sum;
  each_step<A>(x.count, x.length, [&](A a, int64_t r, int64_t i, int64_t, int slot) VLMOPS_INLINED {
    const auto values = a.read(x.run[r] + i);
    for (const auto& v : values.v) sum.part[slot] += v;
  });
  each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t) VLMOPS_INLINED {
    sum.left += one(x.run[r] + i);
  });
  return sum.total() / static_cast<float>(x.count * x.length);
}

// (x - mean) * scale + shift is x normed.
struct Statistics {
  float mean, scale, shift;
};

// From sums over n of (x - mean) and its square. What the float32 mean lacks is shifted: where it
// is large, its last bit is not small beside the deviations.
inline Statistics statistics_of(const Params& p, float mean, float sum, float squares, int64_t n) {
  const double count = static_cast<double>(n);
  const double rest = p.norm == Norm::kLayer ? sum / count : 0.0;
  const double scale = 1.0 / __builtin_sqrt(squares / count - rest * rest + p.eps);
  return {mean, static_cast<float>(scale), static_cast<float>(-rest * scale)};
}

// In two passes: a row whose values hardly differ keeps its variance.
template <class A, class S>
inline Statistics statistics(const Params& p, const Runs<const S>& x) {
  const float mean = p.norm == Norm::kLayer ? mean_of<A>(x) : 0.0f;
  Sums sum, squares;
  each_step<A>(x.count, x.length, [&](A a, int64_t r, int64_t i, int64_t, int slot) VLMOPS_INLINED {
    const auto values = a.read(x.run[r] + i);
    for (const auto& v : values.v) {
      const auto centred = v - mean;
      sum.part[slot] += centred;
      squares.part[slot] += centred * centred;
    }
  });
  each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t) VLMOPS_INLINED {
    const float centred = one(x.run[r] + i) - mean;
    sum.left += centred;
    squares.left += centred * centred;
  });
  return statistics_of(p, mean, sum.total(), squares.total(), x.count * x.length);
}

// Scratch of a call, in floats. Weights, biases and their gradients lie in the order of Access.
struct Scratch {
  float *weight, *bias, *weight_grad, *bias_grad, *first, *second, *third, *fourth;
  int64_t normed;
  bool words;  // of weights
  bool has_bias;

  Scratch(const Params& p, float* memory) : normed(p.normed()) {
    const int64_t k = p.depth();
    float** const parts[] = {&weight, &bias,   &weight_grad, &bias_grad,
                             &first,  &second, &third,       &fourth};
    auto* at = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
    for (float** part : parts) {
      *part = at;
      at += (k + 15) / 16 * 16 + kScratchGap;
    }
  }
};

// Whether rows are read as words: all runs must have whole vectors of them.
inline bool in_words(const Params& p) {
  return p.dtype == DType::kBFloat16 && !p.mean && p.channels % (2 * kFloats) == 0;
}

inline int64_t place_of(const Scratch& s, int64_t k) {
  return s.words ? Access<bfloat16, true>::place(k) : k;
}

inline float element(const NormVector& w, int64_t i) {
  switch (w.dtype) {
    case DType::kFloat32:
      return one(static_cast<const float*>(w.data) + i * w.stride);
    case DType::kBFloat16:
      return one(static_cast<const bfloat16*>(w.data) + i * w.stride);
    case DType::kFloat16:
      return one(static_cast<const float16*>(w.data) + i * w.stride);
  }
  return 0.0f;
}

inline void init_norm(const Params& p, Scratch& s) {
  s.words = in_words(p);
  s.has_bias = p.bias.data != nullptr;
  // A NaN with low bits set could be rounded to a number (store_even_odd).
  const auto canonical = [](float x) { return x == x ? x : __builtin_nanf(""); };
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
  const Statistics by = statistics<A>(p, x);
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

// Backward of norm_row. dx: like x, or no runs where nobody needs it.
template <class A, class S, class G>
inline void norm_backward_row(const Params& p, const Scratch& s, bool weight_grad,
                              const Runs<const S>& x, const G* g, const Runs<S>& dx, bool streams) {
  using OfGrad = Access<G, (A::kVectors > 1)>;
  const auto gradient = [&](int64_t at) VLMOPS_INLINED {
    return bit_cast<typename A::Values>(OfGrad::read(g + at));
  };
  const bool layer = p.norm == Norm::kLayer;
  const float mean = layer ? mean_of<A>(x) : 0.0f;
  Sums sum, square, plain, along;
  each_step<A>(x.count, x.length,
               [&](A a, int64_t r, int64_t i, int64_t at, int slot) VLMOPS_INLINED {
                 const auto xs = a.read(x.run[r] + i), gs = gradient(at);
                 for (int v = 0; v < A::kVectors; ++v) {
                   const auto centred = xs.v[v] - mean;
                   const auto wg = gs.v[v] * load<kFloats>(s.weight + at + v * kFloats);
                   sum.part[slot] += centred;
                   square.part[slot] += centred * centred;
                   plain.part[slot] += wg;
                   along.part[slot] += wg * centred;
                 }
               });
  each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t at) VLMOPS_INLINED {
    const float centred = one(x.run[r] + i) - mean, wg = one(g + at) * s.weight[at];
    sum.left += centred;
    square.left += centred * centred;
    plain.left += wg;
    along.left += wg * centred;
  });
  const int64_t n = x.count * x.length;
  const Statistics by = statistics_of(p, mean, sum.total(), square.total(), n);
  const float all = plain.total(), share = 1.0f / static_cast<float>(n);
  const float mean_wg = layer ? all * share : 0.0f;
  const float mean_along = (along.total() * by.scale + all * by.shift) * share;
  const bool needs_dx = dx.count != 0;
  bool streamed = streams && (x.length * sizeof(S)) % kVectorBytes == 0;
  for (int64_t r = 0; r < dx.count; ++r) streamed = streamed && aligned(dx.run[r]);
  each_step<A>(x.count, x.length, [&](A a, int64_t r, int64_t i, int64_t at, int) VLMOPS_INLINED {
    auto xs = a.read(x.run[r] + i);
    const auto gs = gradient(at);
    for (int v = 0; v < A::kVectors; ++v) {
      const int64_t place = at + v * kFloats;
      const auto xh = (xs.v[v] - mean) * by.scale + by.shift;
      if (weight_grad) {
        store<kFloats>(s.weight_grad + place, load<kFloats>(s.weight_grad + place) + gs.v[v] * xh);
        store<kFloats>(s.bias_grad + place, load<kFloats>(s.bias_grad + place) + gs.v[v]);
      }
      const auto wg = gs.v[v] * load<kFloats>(s.weight + place);
      xs.v[v] = (wg - mean_wg - xh * mean_along) * by.scale;
    }
    if (needs_dx) a.write(dx.run[r] + i, xs, streamed);
  });
  each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t at) VLMOPS_INLINED {
    const float xh = (one(x.run[r] + i) - mean) * by.scale + by.shift, grad = one(g + at);
    if (weight_grad) {
      s.weight_grad[at] += grad * xh;
      s.bias_grad[at] += grad;
    }
    const float wg = grad * s.weight[at];
    if (needs_dx)
      store<1>(dx.run[r] + i, Vec<float, 1>{(wg - mean_wg - xh * mean_along) * by.scale});
  });
}

template <class S, class G>
inline void norm_backward_any_row(const Params& p, const Scratch& s, bool weight_grad,
                                  const Runs<const S>& x, const G* g, const Runs<S>& dx,
                                  bool streams) {
  if constexpr (__is_same(S, bfloat16)) {
    if (s.words) return norm_backward_row<Access<S, true>>(p, s, weight_grad, x, g, dx, streams);
  }
  norm_backward_row<Access<S, false>>(p, s, weight_grad, x, g, dx, streams);
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
      average(p, block, p.pixel_stride, s.first, false);
      Runs<const float> runs;
      one_run<const float>(runs, s.first, p.channels);
      norm_any_row(p, s, runs, y, p.streams);
      continue;
    }
    if (p.norm == Norm::kNone) {
      merge(p, p.order, block, p.pixel_stride, y, p.streams);
      continue;
    }
    Runs<const T> runs;
    if (p.norm_channels) {
      T* out = p.order == Order::kYxc ? y : reinterpret_cast<T*>(s.first);
      T* buffer = reinterpret_cast<T*>(s.second);
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
      runs_of<const T, T>(p, block, nullptr, runs, nullptr);
    } else {
      T* merged = reinterpret_cast<T*>(s.first);
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

// The sums of the gradients of weight and bias: float32 over a few rows, float64 beyond.
class WeightSums {
 public:
  WeightSums(const Scratch& s, double* total) : s_(s), total_(total) {
    for (int64_t k = 0; k < s_.normed; ++k) s_.weight_grad[k] = s_.bias_grad[k] = 0.0f;
  }
  void count(int64_t rows) {
    rows_ += rows;
    if (rows_ >= 4) flush();
  }
  // The channels of `total` into their own order.
  void finish() {
    flush();
    if (!s_.words || total_ == nullptr) return;
    order(total_);
    order(total_ + s_.normed);
  }

 private:
  void flush() {
    rows_ = 0;
    if (total_ == nullptr) return;
    add(s_.weight_grad, total_);
    add(s_.bias_grad, total_ + s_.normed);
  }
  void order(double* total) const {
    auto* ordered = reinterpret_cast<double*>(s_.third);  // and s_.fourth
    for (int64_t k = 0; k < s_.normed; ++k) ordered[k] = total[place_of(s_, k)];
    for (int64_t k = 0; k < s_.normed; ++k) total[k] = ordered[k];
  }
  void add(float* grad, double* total) const {
    int64_t k = 0;
    for (; k + kDoubles <= s_.normed; k += kDoubles) {
      auto* sum = reinterpret_cast<Vec<double, kDoubles>*>(total + k);
      *sum += load_doubles(grad + k);
    }
    for (; k < s_.normed; ++k) total[k] += static_cast<double>(grad[k]);
    for (k = 0; k < s_.normed; ++k) grad[k] = 0.0f;
  }

  const Scratch& s_;
  double* total_;
  int64_t rows_ = 0;
};

template <class T>
void norm_backward_typed(const Params& p, int64_t begin, int64_t end, float* memory,
                         double* weight_grad) {
  Scratch s(p, memory);
  init_norm(p, s);
  WeightSums sums(s, weight_grad);
  const bool sums_wanted = weight_grad != nullptr, needs_dx = p.pixels_out != nullptr;
  Block<const T> block;
  Block<T> out;
  for (int64_t token = begin; token < end; ++token) {
    const Place at = find(p, token);
    place_block(p, static_cast<const T*>(p.pixels), at.group->from, at.image, at.row, at.column,
                block);
    if (needs_dx)
      place_block(p, static_cast<T*>(p.pixels_out), at.group->to, at.image, at.row, at.column, out);
    const T* g = static_cast<const T*>(p.merged) + at.group->merged + at.image * at.group->image +
                 at.number * p.token_stride;
    T* buffer = reinterpret_cast<T*>(s.fourth);
    if (p.mean) {
      average(p, block, p.pixel_stride, s.first, false);
      g = adjacent(g, p.merged_stride, p.channels, buffer);
      Runs<const float> x;
      Runs<float> dx;
      one_run<const float>(x, s.first, p.channels);
      one_run(dx, s.second, p.channels);
      if (!needs_dx) dx.count = 0;
      norm_backward_any_row(p, s, sums_wanted, x, g, dx, false);
      if (needs_dx) spread(p, s.second, 1, out);
      sums.count(1);
      continue;
    }
    Runs<const T> x;
    Runs<T> dx;
    if (p.norm_channels) {
      if (p.order == Order::kCyx || p.merged_stride != 1) {
        Block<T> pieces;
        pieces_of(p, reinterpret_cast<T*>(s.first), pieces);
        split(p, p.order, g, p.merged_stride, pieces, false);
        g = pieces.pixel[0];
      }
      for (int64_t i = 0; i < p.block(); ++i) {
        one_run(x, adjacent(block.pixel[i], p.pixel_stride, p.channels, buffer), p.channels);
        one_run(dx, needs_dx ? out.pixel[i] : nullptr, p.channels);
        if (!needs_dx) dx.count = 0;
        norm_backward_any_row(p, s, sums_wanted, x, g + i * p.channels, dx, p.streams);
      }
      sums.count(p.block());
      continue;
    }
    g = adjacent(g, p.merged_stride, p.depth(), buffer);
    if (p.order == Order::kYxc && p.pixel_stride == 1) {
      if (needs_dx) {
        runs_of(p, block, &out, x, &dx);
      } else {
        runs_of<const T, T>(p, block, nullptr, x, nullptr);
        dx.count = 0;
      }
      norm_backward_any_row(p, s, sums_wanted, x, g, dx, p.streams);
    } else {
      T* merged = reinterpret_cast<T*>(s.first);
      T* merged_dx = reinterpret_cast<T*>(s.second);
      merge(p, p.order, block, p.pixel_stride, merged, false);
      one_run<const T>(x, merged, p.depth());
      one_run(dx, merged_dx, p.depth());
      if (!needs_dx) dx.count = 0;
      norm_backward_any_row(p, s, sums_wanted, x, g, dx, false);
      if (needs_dx) split(p, p.order, merged_dx, 1, out, p.streams);
    }
    sums.count(1);
  }
  sums.finish();
  finish_streams();
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
