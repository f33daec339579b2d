// How CPU kernels pass over rows that are larger than the caches. Internal linkage only, as in
// simd.h.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/simd.h"

namespace vlmops {
namespace {

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

template <class T>
using AccessOf = Access<T, __is_same(T, bfloat16)>;

// Channels that come in whole steps, and where channel i lies among the floats of a row.
template <class A>
inline int64_t whole_steps(int64_t channels) {
  return channels / A::kStep * A::kStep;
}
template <class A>
inline int64_t place_of(int64_t i, int64_t channels) {
  return i < whole_steps<A>(channels) ? A::place(i) : i;
}

// Sums in that order, in the channels' own.
template <class A>
inline void in_order(double* sums, int64_t channels) {
  if constexpr (A::kVectors > 1) {
    for (int64_t first = 0; first < whole_steps<A>(channels); first += A::kStep) {
      double ordered[A::kStep];
      for (int i = 0; i < A::kStep; ++i) ordered[i] = sums[first + A::place(i)];
      __builtin_memcpy(sums + first, ordered, sizeof ordered);
    }
  }
}

template <class T>
VLMOPS_INLINE float one(const T* p) {
  return load<1>(p)[0];
}

}  // namespace
}  // namespace vlmops
