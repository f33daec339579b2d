// LayerNorm and RMSNorm of rows on the CPU: what the norms of several ops have in common. Internal
// linkage only, as in simd.h.
#pragma once

#include "common/norm.h"
#include "common/stream.h"

namespace vlmops {
namespace {

// What is subtracted is the mean (`layer`), or nothing; the variance, or the mean square, gets eps.
struct RowNorm {
  bool layer;
  float eps;
};

constexpr int64_t kMaxRuns = 256;

// Elements that are normed together: `count` runs of `length` that lie side by side.
template <class T>
struct Runs {
  int64_t count, length;
  T* run[kMaxRuns];
};

template <class T>
inline void one_run(Runs<T>& runs, T* at, int64_t length) {
  runs.count = 1;
  runs.length = length;
  runs.run[0] = at;
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

// Near the mean of a row, mostly: that of its first steps.
template <class A, class S>
inline float guess_mean(const RowNorm& norm, const Runs<const S>& x) {
  const int64_t n = x.length < 4 * A::kStep ? x.length / A::kStep * A::kStep : 4 * A::kStep;
  if (!norm.layer) return 0.0f;
  if (n == 0) return one(x.run[0]);
  Vec<float, kFloats> sum{};
  for (int64_t i = 0; i < n; i += A::kStep)
    for (const auto& v : A::read(x.run[0] + i).v) sum += v;
  return sum_lanes<kFloats>(sum) / static_cast<float>(n);
}

// (x - mean) * scale + shift is x normed; `mean` is about the mean, shift makes up for the rest.
struct Statistics {
  float mean, scale, shift;
};

// Calls sums(about, sum, squares) for the sums over n of (x - about) and its square: once, or again
// with the mean that the first call found, where `about` is so far off that a row whose values
// hardly differ would lose its variance.
template <class F>
inline Statistics statistics(const RowNorm& norm, float about, int64_t n, const F& sums) {
  const double count = static_cast<double>(n);
  for (bool again = false;; again = true) {
    float sum = 0.0f, squares = 0.0f;
    sums(about, sum, squares);
    const double rest = norm.layer ? sum / count : 0.0;
    const double variance = squares / count - rest * rest;
    if (!again && rest * rest > variance) {
      about += static_cast<float>(rest);
      continue;
    }
    const double scale = 1.0 / __builtin_sqrt(variance + norm.eps);
    return {about, static_cast<float>(scale), static_cast<float>(-rest * scale)};
  }
}

template <class A, class S>
inline Statistics statistics(const RowNorm& norm, const Runs<const S>& x) {
  const auto sums = [&](float about, float& to_sum, float& to_squares) {
    Sums sum, squares;
    each_step<A>(x.count, x.length,
                 [&](A a, int64_t r, int64_t i, int64_t, int slot) VLMOPS_INLINED {
                   const auto values = a.read(x.run[r] + i);
                   for (const auto& v : values.v) {
                     const auto centred = v - about;
                     sum.part[slot] += centred;
                     squares.part[slot] += centred * centred;
                   }
                 });
    each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t) VLMOPS_INLINED {
      const float centred = one(x.run[r] + i) - about;
      sum.left += centred;
      squares.left += centred * centred;
    });
    to_sum = sum.total();
    to_squares = squares.total();
  };
  return statistics(norm, guess_mean<A>(norm, x), x.count * x.length, sums);
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

// A row in backward. dx: like x, or no runs where nobody needs it.
template <class S, class G>
struct BackwardRow {
  Runs<const S> x;
  const G* g;
  Runs<S> dx;
  Statistics by;
  float mean_wg, mean_along;
};

// Its statistics.
template <class A, class S, class G>
inline void backward_statistics(const RowNorm& norm, const float* weight, BackwardRow<S, G>& row) {
  using OfGrad = Access<G, (A::kVectors > 1)>;
  const Runs<const S>& x = row.x;
  const G* g = row.g;
  const int64_t n = x.count * x.length;
  float all = 0.0f, all_along = 0.0f;
  const auto sums = [&](float about, float& to_sum, float& to_squares) {
    Sums sum, square, plain, along;
    each_step<A>(x.count, x.length,
                 [&](A a, int64_t r, int64_t i, int64_t at, int slot) VLMOPS_INLINED {
                   const auto xs = a.read(x.run[r] + i);
                   const auto gs = bit_cast<typename A::Values>(OfGrad::read(g + at));
                   for (int v = 0; v < A::kVectors; ++v) {
                     const auto centred = xs.v[v] - about;
                     const auto wg = gs.v[v] * load<kFloats>(weight + at + v * kFloats);
                     sum.part[slot] += centred;
                     square.part[slot] += centred * centred;
                     plain.part[slot] += wg;
                     along.part[slot] += wg * centred;
                   }
                 });
    each_left<A>(x.count, x.length, [&](int64_t r, int64_t i, int64_t at) VLMOPS_INLINED {
      const float centred = one(x.run[r] + i) - about, wg = one(g + at) * weight[at];
      sum.left += centred;
      square.left += centred * centred;
      plain.left += wg;
      along.left += wg * centred;
    });
    to_sum = sum.total();
    to_squares = square.total();
    all = plain.total();
    all_along = along.total();
  };
  row.by = statistics(norm, guess_mean<A>(norm, x), n, sums);
  const float share = 1.0f / static_cast<float>(n);
  row.mean_wg = norm.layer ? all * share : 0.0f;
  row.mean_along = (all_along * row.by.scale + all * row.by.shift) * share;
}

// A NaN with low bits set could be rounded to a number (store_even_odd).
inline float canonical(float x) { return x == x ? x : __builtin_nanf(""); }

}  // namespace
}  // namespace vlmops
