// e^x in float32 on vectors, to 1 ulp. Internal linkage only, as in simd.h.
#pragma once

#include "common/simd.h"

namespace vlmops {
namespace {

// 2^n e^r with |r| <= ln(2) / 2, in two factors: results may be subnormal, 0 or infinite. NaN
// stays.
template <int N>
VLMOPS_INLINE Vec<float, N> exp(Vec<float, N> x) {
  constexpr float kRound = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  const Vec<float, N> high = Vec<float, N>{} + 90.0f, low = Vec<float, N>{} - 105.0f;
  x = x > high ? high : x;
  x = x < low ? low : x;
  const Vec<float, N> shifted = x * 0x1.715476p0f + kRound;
  const Vec<float, N> n = shifted - kRound;
  const Vec<float, N> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float, N> y = r * 0x1.6d761p-10f + 0x1.127084p-7f;
  y = y * r + 0x1.5554acp-5f;
  y = y * r + 0x1.555402p-3f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const auto power = bit_cast<Vec<int32_t, N>>(shifted) - 0x4b400000;
  const auto half = power >> 1;
  const auto of = [](Vec<int32_t, N> k)
                      VLMOPS_INLINED { return bit_cast<Vec<float, N>>((k + 127) << 23); };
  return y * of(half) * of(power - half);
}

}  // namespace
}  // namespace vlmops
