// SIMD on GCC/Clang vector extensions, compiled once per instruction set.
//
// Everything lives in an unnamed namespace, and nothing from the standard library's templates is
// used: a template with external linkage would be emitted by every one of these translation units,
// and the linker could hand the AVX-512 copy to a baseline caller.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/types.h"

// For what would cost its vectors a trip through memory if the compiler did not inline it.
#define VLMOPS_INLINED __attribute__((always_inline))  // lambdas
#define VLMOPS_INLINE inline VLMOPS_INLINED

namespace vlmops {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloats = kVectorBytes / 4;   // float32 lanes of a register
constexpr int kDoubles = kVectorBytes / 8;  // float64 lanes of a register

// may_alias, aligned(1): vectors are loaded from and stored to memory of any type and alignment.
template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N), aligned(1), may_alias));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

// A number of lanes as a type, to pass to generic lambdas.
template <int N>
struct Lanes {
  static constexpr int value = N;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// N values of T, widened to float32.
template <int N>
inline Vec<float, N> load(const float* p) {
  return *reinterpret_cast<const Vec<float, N>*>(p);
}

template <int N>
inline Vec<float, N> load(const bfloat16* p) {
  const auto bits = *reinterpret_cast<const Vec<uint16_t, N>*>(p);
  return bit_cast<Vec<float, N>>(__builtin_convertvector(bits, Vec<uint32_t, N>) << 16);
}

template <int N>
inline Vec<float, N> load(const float16* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<Vec<float, N>>(_mm512_maskz_cvtph_ps(0xffff, half));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bit_cast<Vec<float, N>>(_mm256_cvtph_ps(half));
  }
#endif
  // Shifted into float32's fields a half is too small by 2^112; the product is exact, subnormals
  // too.
  const auto bits =
      __builtin_convertvector(*reinterpret_cast<const Vec<uint16_t, N>*>(p), Vec<uint32_t, N>);
  const auto magnitude = (bits & 0x7fffu) << 13;
  const auto scaled = bit_cast<Vec<uint32_t, N>>(bit_cast<Vec<float, N>>(magnitude) * 0x1p112f);
  const auto inf_or_nan = magnitude | 0x7f800000u;
  const auto value = magnitude >= 0x0f800000u ? inf_or_nan : scaled;
  return bit_cast<Vec<float, N>>(value | ((bits & 0x8000u) << 16));
}

// N float32 values rounded to T, to nearest even; NaN stays NaN.
template <int N>
inline void store(float* p, Vec<float, N> v) {
  *reinterpret_cast<Vec<float, N>*>(p) = v;
}

template <int N>
inline void store(bfloat16* p, Vec<float, N> v) {
  const auto raw = bit_cast<Vec<uint32_t, N>>(v);
  const auto bits = v == v ? raw : raw * 0u + 0x7fc00000u;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *reinterpret_cast<Vec<uint16_t, N>*>(p) = __builtin_convertvector(rounded, Vec<uint16_t, N>);
}

template <int N>
inline void store(float16* p, Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const auto half = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const auto half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    return;
  }
#endif
  const auto bits = bit_cast<Vec<uint32_t, N>>(v);
  const auto magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent by -112 and round the 13 bits that fall off.
  const auto normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: one ulp of 0.5f is the smallest half, so the adder rounds for us.
  const auto subnormal =
      bit_cast<Vec<uint32_t, N>>(bit_cast<Vec<float, N>>(magnitude) + 0.5f) - 0x3f000000u;
  auto value = magnitude < 0x38800000u ? subnormal : normal;
  const Vec<uint32_t, N> infinity = value * 0u + 0x7c00u, quiet_nan = value * 0u + 0x7e00u;
  value = magnitude >= 0x47800000u ? infinity : value;
  value = magnitude > 0x7f800000u ? quiet_nan : value;
  value |= (bits >> 16) & 0x8000u;
  *reinterpret_cast<Vec<uint16_t, N>*>(p) = __builtin_convertvector(value, Vec<uint16_t, N>);
}

// kDoubles float32 values, widened. GCC widens halves one by one where there is an instruction.
inline Vec<double, kDoubles> load_doubles(const float* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec<double, kDoubles>>(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
#elif defined(__AVX2__)
  return bit_cast<Vec<double, kDoubles>>(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#else
  return __builtin_convertvector(load<kDoubles>(p), Vec<double, kDoubles>);
#endif
}

// to[0 .. kFloats) += v, which is widened.
inline void add_to_doubles(double* to, const Vec<float, kFloats>& v) {
  for (int i = 0; i < kFloats; i += kDoubles) {
    auto* sum = reinterpret_cast<Vec<double, kDoubles>*>(to + i);
    *sum += load_doubles(reinterpret_cast<const float*>(&v) + i);
  }
}

// 2N bfloat16 values as those at even and at odd places: a shift and a mask, where widening in
// order needs shuffles both ways (2.5x slower with AVX2).
template <int N>
struct EvenOdd {
  Vec<float, N> even, odd;
};

template <int N>
inline EvenOdd<N> load_even_odd(const bfloat16* p) {
  const auto words = *reinterpret_cast<const Vec<uint32_t, N>*>(p);
  return {bit_cast<Vec<float, N>>(words << 16), bit_cast<Vec<float, N>>(words & 0xffff0000u)};
}

// NaN must have come from bfloat16 or be canonical (0x7fc00000): then its low half is zero, the
// carry of rounding stops there, and the test for NaN, a sixth of the instructions, is saved.
template <int N>
inline void store_even_odd(bfloat16* p, Vec<float, N> even, Vec<float, N> odd) {
  const auto e = bit_cast<Vec<uint32_t, N>>(even), o = bit_cast<Vec<uint32_t, N>>(odd);
  const auto lower = (e + 0x7fffu + ((e >> 16) & 1u)) >> 16;
  const auto upper = (o + 0x7fffu + ((o >> 16) & 1u)) & 0xffff0000u;
  *reinterpret_cast<Vec<uint32_t, N>*>(p) = lower | upper;
}

// Halves made one by `join` until one lane is left.
template <int N, class Join>
inline float fold_lanes(Vec<float, N> v, const Join& join) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    struct Halves {
      Vec<float, N / 2> low, high;
    };
    const auto halves = bit_cast<Halves>(v);
    return fold_lanes<N / 2>(join(halves.low, halves.high), join);
  }
}

template <int N>
inline float sum_lanes(Vec<float, N> v) {
  return fold_lanes<N>(v, [](auto a, auto b) VLMOPS_INLINED { return a + b; });
}

// (v1, v0, v3, v2, ..)
template <int N>
inline Vec<float, N> swap_neighbours(Vec<float, N> v) {
#if defined(__clang__)
  Vec<float, N> swapped;
  for (int lane = 0; lane < N; ++lane) swapped[lane] = v[lane ^ 1];
  return swapped;
#else
  Vec<int32_t, N> order;
  for (int lane = 0; lane < N; ++lane) order[lane] = lane ^ 1;
  return __builtin_shuffle(v, order);
#endif
}

}  // namespace
}  // namespace vlmops
