// What CPU kernels do to rows of numbers. Internal linkage only, as in simd.h.
#pragma once

#include "common/simd.h"

namespace vlmops {
namespace {

template <class Pointer>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
  using type = T;
};
template <class Pointer>
using Pointee = typename PointeeOf<Pointer>::type;

// f(a null pointer of the type).
template <class F>
VLMOPS_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<float16*>(nullptr));
  }
}

// f(n) for n vectors of kFloats and then single elements.
template <class F>
VLMOPS_INLINE void by_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) f(Lanes<kFloats>(), i);
  for (; i < n; ++i) f(Lanes<1>(), i);
}

struct Scale {
  float mean, factor;
};

// Of a row of n: what LayerNorm (`layer`) and RMSNorm subtract, and multiply by. The mean
// is mended once: long sums of numbers far from 0 lose digits. Passes but the first are over L1.
template <class T>
inline Scale statistics(const T* row, int64_t n, bool layer, float eps) {
  const auto moment = [&](float mean, auto of) {
    Vec<float, kFloats> sums = {};
    float sum = 0.0f;
    by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
      constexpr int width = decltype(lanes)::value;
      const auto x = of(load<width>(row + i) - mean);
      if constexpr (width == kFloats) {
        sums += x;
      } else {
        sum += x[0];
      }
    });
    return (sum_lanes<kFloats>(sums) + sum) / static_cast<float>(n);
  };
  const auto itself = [](auto x) VLMOPS_INLINED { return x; };
  float mean = layer ? moment(0.0f, itself) : 0.0f;
  if (layer) mean += moment(mean, itself);
  const float square = moment(mean, [](auto x) VLMOPS_INLINED { return x * x; });
  return {mean, 1.0f / __builtin_sqrtf(square + eps)};
}

}  // namespace
}  // namespace vlmops
