// The one header through which kernels and launchers reach the machine.
//
// Kernels are ordinary CUDA C++. nvcc takes this file as a thin layer over CUDA's own headers; with
// VLMOPS_EMULATOR the same kernels and launchers go through g++ and run on the CPU, one fiber per
// CUDA thread (csrc/emulator/). What the two cannot spell alike stands here under one name: shared
// arrays, launches, 16-byte packs, cp.async, ldmatrix and mma.
//
//   VLMOPS_SHARED(T, name, n)          static shared T name[n], 16-byte aligned
//   VLMOPS_DYNAMIC_SHARED(T, name)     T* to the launch's dynamic shared memory
//   launch(kernel, grid, block, shared_bytes, stream, args...)   0 or an error's number
//   allow_dynamic_shared(kernel, bytes)    before a launch with more than 48 KiB
//   Pack<T, N>, load_pack<N>(p), store_pack(p, pack)   one access of N elements
//   to_float(x), from_float<T>(x)      storage types and CUDA's own, rounding to nearest even
//   cp_async_16, cp_async_{4,8,16}_or_zero, cp_async_commit, cp_async_wait<N>
//   ldmatrix_x4, ldmatrix_x4_trans, mma_m16n8k16, mma_m16n8k8_tf32
//
// Launchers get device facts from architecture() and multiprocessors().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/types.h"

#if defined(VLMOPS_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime.h>

#define VLMOPS_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define VLMOPS_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char vlmops_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(vlmops_dynamic_shared)
#define VLMOPS_CHECK_ALIGNED(p, bytes)
#define VLMOPS_GRID_CONSTANT __grid_constant__

namespace vlmops {

template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  void* stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(
      cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...));
}

template <class... Parameters>
inline int allow_dynamic_shared(void (*kernel)(Parameters...), size_t bytes) {
  return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(bytes)));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

// 80, 90, 120: of the current device; 0 if there is none.
inline int architecture() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// Copies the first `bytes` of 16 and fills the rest with zeros; 0 bytes read nothing.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// The same of 8 and of 4: those go through L1.
__device__ __forceinline__ void cp_async_8_or_zero(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_4_or_zero(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the last N committed groups of this thread have landed.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the rows of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]; the last argument only chooses the type of a and b.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 8] b [8, 8]; a and b are float32 bits of which the machine reads the
// upper 19.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace vlmops
#endif

namespace vlmops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Over the threads of a warp, for all of them.
__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

template <int Bytes>
struct PackWord;
template <>
struct PackWord<1> {
  using type = uint8_t;
};
template <>
struct PackWord<2> {
  using type = uint16_t;
};
template <>
struct PackWord<4> {
  using type = uint32_t;
};
template <>
struct PackWord<8> {
  using type = uint2;
};
template <>
struct PackWord<16> {
  using type = uint4;
};

// N elements that are read and written by one instruction; sizeof is 1, 2, 4, 8 or 16.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

// Elements of a 16-byte pack.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  VLMOPS_CHECK_ALIGNED(p, sizeof(Word));
  const Word word = *reinterpret_cast<const Word*>(p);
  return reinterpret_cast<const Pack<T, N>&>(word);
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  VLMOPS_CHECK_ALIGNED(p, sizeof(Word));
  *reinterpret_cast<Word*>(p) = reinterpret_cast<const Word&>(pack);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) {
  return __half2float(__half(__half_raw{x.bits}));
}
__device__ __forceinline__ float to_float(bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

// float32 rounded to T, to nearest even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return {static_cast<__half_raw>(__float2half_rn(x)).x};
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
}

// N elements as the 32-bit words that registers hold: an array of 16-bit ones would be taken apart
// and put together again, element by element.
template <class T, int N>
struct Words {
  static_assert(sizeof(T) * N % 4 == 0);
  static constexpr int kCount = static_cast<int>(sizeof(T)) * N / 4;
  uint32_t w[kCount];
};

// An assignment of four words whose values come from branches is compiled to four stores.
template <class Word>
__device__ __forceinline__ void store_whole(Word* p, const Word& word) {
#if defined(VLMOPS_EMULATOR)
  *p = word;
#else
  __stwb(p, word);
#endif
}

// By one access, of 8 or 16 bytes.
template <int N, class T>
__device__ __forceinline__ Words<T, N> load_words(const T* p) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  VLMOPS_CHECK_ALIGNED(p, sizeof(Word));
  const Word word = *reinterpret_cast<const Word*>(p);
  if constexpr (sizeof(Word) == 8) {
    return {{word.x, word.y}};
  } else {
    return {{word.x, word.y, word.z, word.w}};
  }
}

template <class T, int N>
__device__ __forceinline__ void store_words(T* p, const Words<T, N>& x) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  VLMOPS_CHECK_ALIGNED(p, sizeof(Word));
  Word word;
  if constexpr (sizeof(Word) == 8) {
    word = {x.w[0], x.w[1]};
  } else {
    word = {x.w[0], x.w[1], x.w[2], x.w[3]};
  }
  store_whole(reinterpret_cast<Word*>(p), word);
}

// Element by element, `stride` apart.
template <int N, class T>
__device__ __forceinline__ Words<T, N> gather_words(const T* p, int64_t stride) {
  Words<T, N> x;
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      x.w[i] = __float_as_uint(p[i * stride]);
    } else {
      x.w[i] = p[2 * i * stride].bits | static_cast<uint32_t>(p[(2 * i + 1) * stride].bits) << 16;
    }
  }
  return x;
}

template <class T, int N>
__device__ __forceinline__ void scatter_words(T* p, int64_t stride, const Words<T, N>& x) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      p[i * stride] = __uint_as_float(x.w[i]);
    } else {
      p[2 * i * stride] = {static_cast<uint16_t>(x.w[i])};
      p[(2 * i + 1) * stride] = {static_cast<uint16_t>(x.w[i] >> 16)};
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void widen(const Words<T, N>& words, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) {
    const uint32_t word = words.w[i];
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      x[2 * i] = __uint_as_float(word << 16);
      x[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      x[2 * i] = to_float(float16{static_cast<uint16_t>(word)});
      x[2 * i + 1] = to_float(float16{static_cast<uint16_t>(word >> 16)});
    }
  }
}

// To nearest even; NaN stays NaN.
template <class T, int N>
__device__ __forceinline__ Words<T, N> narrow(const float (&x)[N]) {
  Words<T, N> words;
#pragma unroll
  for (int i = 0; i < Words<T, N>::kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words.w[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&words.w[i], &two, sizeof(two));
    } else {
      const __half2 two = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&words.w[i], &two, sizeof(two));
    }
  }
  return words;
}

// For launchers: whether accesses of 16 bytes may start there.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// f(a null pointer of the type).
template <class F>
inline auto by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace vlmops
