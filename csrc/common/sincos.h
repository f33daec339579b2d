// sine and cosine of float32 angles, right to float32 for every finite angle.
//
// The angle is widened to float64, reduced by multiples of pi/2 split into three 29-bit parts, so
// that n * part is exact without FMA for n < 2^24, and two even polynomials (Remez on [0,
// (pi/4)^2], relative error 2^-37 for sine, absolute 2^-34 for cosine) are evaluated in float64.
// What remains is the final rounding to float32: the result is within 0.51 ulp.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace vlmops {
namespace {

constexpr float kFastAngleLimit = 0x1p24f;  // n < 2^24 with room to spare

// Any angle. NaN comes out canonical, as store_even_odd demands. cosine may be angle.
inline void sincos_slow(const float* angle, float* cosine, float* sine, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = angle[i];
    const bool number = x - x == 0.0;  // neither NaN nor infinite
    cosine[i] = number ? static_cast<float>(::cos(x)) : __builtin_nanf("");
    sine[i] = number ? static_cast<float>(::sin(x)) : __builtin_nanf("");
  }
}

inline bool all_fast(const float* angle, int64_t n) {
  Vec<int32_t, kFloats> slow = {};
  for (int64_t i = 0; i < n; i += kFloats) {
    const auto a = load<kFloats>(angle + i);
    slow |= ~((a <= kFastAngleLimit) & (a >= -kFastAngleLimit));
  }
  int32_t any = 0;
  for (int lane = 0; lane < kFloats; ++lane) any |= slow[lane];
  return any == 0;
}

// angle, cosine, sine: [n], n a multiple of 16 (pad the angles with zeros). cosine may be angle.
inline void sincos(const float* angle, float* cosine, float* sine, int64_t n) {
  using D = Vec<double, kDoubles>;
  using I = Vec<int64_t, kDoubles>;
  constexpr double kRoundingMagic =
      0x1.8p52;  // adding it rounds to an integer, left in the low bits
  if (!all_fast(angle, n)) return sincos_slow(angle, cosine, sine, n);
  for (int64_t i = 0; i < n; i += kDoubles) {
    const D x = load_doubles(angle + i);
    const D shifted = x * 0x1.45f306dc9c883p-1 + kRoundingMagic;  // 2/pi
    const I quadrant = bit_cast<I>(shifted);
    const D turns = shifted - kRoundingMagic;
    const D r = ((x - turns * 0x1.921fb54p+0) - turns * 0x1.10b4611p-30) - turns * 0x1.4c4c662p-59;
    const D z = r * r;
    const D s =
        r +
        r * z *
            (-0x1.5555554cb9eeep-3 +
             z * (0x1.11110896504bdp-7 + z * (-0x1.a00f9daac600ap-13 + z * 0x1.6cd85975b66bcp-19)));
    const D c =
        1.0 +
        z * (-0x1.ffffffd0c144ep-2 +
             z * (0x1.55553e0e9e733p-5 + z * (-0x1.6c087dcecd72ap-10 + z * 0x1.9934032052d74p-16)));
    const I odd = -(quadrant & 1);  // all ones where sine and cosine change places
    const I si = (bit_cast<I>(s) & ~odd) | (bit_cast<I>(c) & odd);
    const I ci = (bit_cast<I>(c) & ~odd) | (bit_cast<I>(s) & odd);
    const D sv = bit_cast<D>(si ^ ((quadrant & 2) << 62));
    const D cv = bit_cast<D>(ci ^ (((quadrant + 1) & 2) << 62));
    store<kDoubles>(sine + i, __builtin_convertvector(sv, Vec<float, kDoubles>));
    store<kDoubles>(cosine + i, __builtin_convertvector(cv, Vec<float, kDoubles>));
  }
}

}  // namespace
}  // namespace vlmops
