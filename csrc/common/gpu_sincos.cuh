// sine and cosine of float32 angles on the GPU: within an ulp for every finite angle, without local
// memory, which CUDA's own sinf needs for large angles.
//
// The angle is reduced by multiples of pi/2: up to 2^30 in float64, by two parts of pi/2 with FMA;
// beyond in integers, by the 96 bits of 2/pi that matter (Payne and Hanek). The remainder r is
// rounded to float32; what that loses goes into the polynomials to first order.
#pragma once

#include "common/gpu.cuh"

namespace vlmops {

// Bits [32 i, 32 i + 32) of the fraction 2/pi.
__device__ __forceinline__ uint32_t two_over_pi(int i) {
  switch (i) {
    case 0:
      return 0xa2f9836eu;
    case 1:
      return 0x4e441529u;
    case 2:
      return 0xfc2757d1u;
    case 3:
      return 0xf534ddc0u;
    case 4:
      return 0xdb629599u;
    case 5:
      return 0x3c439041u;
    default:
      return 0xfe5163abu;
  }
}

// x = (quadrant + fraction) * pi/2 for finite x >= 2^30; returns the remainder in radians.
__device__ inline double reduce_large(float x, int& quadrant) {
  const uint32_t bits = __float_as_uint(x);
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  const int exponent = static_cast<int>(bits >> 23) - 150;  // x = mantissa * 2^exponent, >= 7
  // The bit of 2/pi that 2^exponent makes worth 2; those above are whole turns.
  const int word = (exponent - 2) >> 5, shift = (exponent - 2) & 31;
  uint64_t window[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint64_t two =
        static_cast<uint64_t>(two_over_pi(word + i)) << 32 | two_over_pi(word + i + 1);
    window[i] = (two << shift) >> 32;
  }
  const uint64_t low = mantissa * window[2];
  const uint64_t middle = mantissa * window[1] + (low >> 32);
  const uint64_t high = mantissa * window[0] + (middle >> 32);
  const uint64_t turns = high << 32 | (middle & 0xffffffffu);  // mod 4, two bits of it whole
  const uint64_t fraction = turns << 2;
  quadrant = static_cast<int>(turns >> 62) + static_cast<int>(fraction >> 63);
  return static_cast<double>(static_cast<int64_t>(fraction)) * (0x1.921fb54442d18p+0 * 0x1p-64);
}

// NaN for angles that are not finite.
__device__ inline void sincos_any(float angle, float& cosine, float& sine) {
  const float x = fabsf(angle);
  int quadrant;
  double r;
  if (x < 0x1p30f) {
    const double turns = rint(x * 0x1.45f306dc9c883p-1);  // 2/pi
    quadrant = static_cast<int>(turns);
    r = fma(-turns, 0x1.921fb54442d18p+0, static_cast<double>(x));
    r = fma(-turns, 0x1.1a62633145c07p-54, r);
  } else if (x <= 0x1.fffffep127f) {
    r = reduce_large(x, quadrant);
  } else {
    cosine = sine = __uint_as_float(0x7fc00000u);
    return;
  }
  const float f = static_cast<float>(r);
  const float rest = static_cast<float>(r - f);
  const float z = f * f;
  // Taylor's series moved to the least error on [-pi/4, pi/4] (Cephes' sinf and cosf).
  float s = fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = fmaf(s, z, -1.6666654611e-1f);
  s = fmaf(s * z, f, f);
  float c = fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = fmaf(c, z, 4.166664568298827e-2f);
  c = fmaf(c, z, -0.5f);
  c = fmaf(c, z, 1.0f);
  const float sr = fmaf(rest, c, s), cr = fmaf(-rest, s, c);
  const bool swapped = quadrant & 1;
  sine = swapped ? cr : sr;
  cosine = swapped ? sr : cr;
  if (((quadrant & 2) != 0) != (angle < 0.0f)) sine = -sine;
  if ((quadrant + 1) & 2) cosine = -cosine;
}

}  // namespace vlmops
