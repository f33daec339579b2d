// The device half of CUDA C++ for g++: what gpu.cuh includes under VLMOPS_EMULATOR in place of
// <cuda_runtime.h>. Types and 16-bit arithmetic are CUDA's own headers, which compile for the host.
#pragma once

#include <vector_functions.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator/runtime.h"

#undef __launch_bounds__
#define VLMOPS_GRID_CONSTANT
#define __launch_bounds__(...)

#define VLMOPS_SHARED(T, name, n)                         \
  static char name##_key_;                                \
  T(&name)                                                \
  [n] = *static_cast<::vlmops::emulator::ArrayOf<T, n>*>( \
      ::vlmops::emulator::shared_array(&name##_key_, #name, sizeof(T) * (n)))
#define VLMOPS_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::vlmops::emulator::dynamic_shared())
#define VLMOPS_CHECK_ALIGNED(p, bytes) ::vlmops::emulator::check_aligned(p, bytes)

// Where a call stands: default arguments are evaluated at the call.
#define VLMOPS_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace vlmops::emulator {

template <class T, size_t N>
using ArrayOf = T[N];

struct Exchange {
  uint64_t value;
  int source;  // lane
};

struct Vote {
  bool predicate;
  unsigned ballot;
};

struct Ldmatrix {
  uint32_t* r;
  const void* row;
  bool transposed;
};

struct Mma {
  enum Type { kBFloat16, kFloat16, kTf32 } type;
  float* c;
  const uint32_t *a, *b;
};

void shuffle_lanes(void* const* operands, unsigned mask);
void vote_lanes(void* const* operands, unsigned mask);
void load_matrices(void* const* operands, unsigned mask);
void multiply_matrices(void* const* operands, unsigned mask);

int shuffle_source_up(unsigned delta, int width);
int shuffle_source_down(unsigned delta, int width);
int shuffle_source_xor(unsigned lane_mask, int width);
int shuffle_source(int lane, int width);

template <class T>
inline T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  Exchange exchange = {0, source};
  std::memcpy(&exchange.value, &value, sizeof(T));
  collective(Collective::kShuffle, mask, &exchange, shuffle_lanes, file, line);
  std::memcpy(&value, &exchange.value, sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  Vote vote = {predicate, 0};
  collective(Collective::kVote, mask, &vote, vote_lanes, file, line);
  return vote.ballot;
}

}  // namespace vlmops::emulator

inline void __syncthreads(VLMOPS_HERE) { vlmops::emulator::sync_threads(false, file, line); }
inline int __syncthreads_count(int predicate, VLMOPS_HERE) {
  return vlmops::emulator::sync_threads(predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, VLMOPS_HERE) {
  return vlmops::emulator::sync_threads(predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, VLMOPS_HERE) {
  return vlmops::emulator::sync_threads(predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, VLMOPS_HERE) {
  using namespace vlmops::emulator;
  collective(Collective::kSyncWarp, mask, nullptr, nullptr, file, line);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, VLMOPS_HERE) {
  using namespace vlmops::emulator;
  return shuffle(mask, value, shuffle_source(lane, width), file, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, VLMOPS_HERE) {
  using namespace vlmops::emulator;
  return shuffle(mask, value, shuffle_source_up(delta, width), file, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, VLMOPS_HERE) {
  using namespace vlmops::emulator;
  return shuffle(mask, value, shuffle_source_down(delta, width), file, line);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, VLMOPS_HERE) {
  using namespace vlmops::emulator;
  return shuffle(mask, value, shuffle_source_xor(lane_mask, width), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, VLMOPS_HERE) {
  return vlmops::emulator::ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, VLMOPS_HERE) {
  return vlmops::emulator::ballot(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, VLMOPS_HERE) {
  return vlmops::emulator::ballot(mask, predicate != 0, file, line) == mask;
}

float atomicAdd(float* p, float value);
double atomicAdd(double* p, double value);
int atomicAdd(int* p, int value);
unsigned atomicAdd(unsigned* p, unsigned value);
unsigned long long atomicAdd(unsigned long long* p, unsigned long long value);
int atomicMax(int* p, int value);
unsigned atomicMax(unsigned* p, unsigned value);
unsigned long long atomicMax(unsigned long long* p, unsigned long long value);
int atomicCAS(int* p, int expected, int value);
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                             unsigned long long value);
int atomicExch(int* p, int value);
unsigned atomicExch(unsigned* p, unsigned value);
float atomicExch(float* p, float value);

inline void __threadfence() { vlmops::emulator::fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { vlmops::emulator::yield(); }
[[noreturn]] inline void __trap(VLMOPS_HERE) { vlmops::emulator::trap(file, line); }

template <class T>
inline T __ldg(const T* p) {
  return *p;
}

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }

// Off by as much as CUDA allows: two units in the last place.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x) * (1.0f + 0x1p-22f); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
// Never contracted into an FMA, there or here: the volatile keeps g++ from it.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) {
  volatile float sum = x + y;
  return sum;
}
inline float __fsub_rn(float x, float y) { return __fadd_rn(x, -y); }
inline int __float2int_rn(float x) { return static_cast<int>(lrintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline long long __float2ll_rn(float x) { return llrintf(x); }
inline int __double2int_rn(double x) { return static_cast<int>(lrint(x)); }
inline long long __double2ll_rn(double x) { return llrint(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define VLMOPS_MIN_MAX(T)                          \
  inline T min(T x, T y) { return y < x ? y : x; } \
  inline T max(T x, T y) { return x < y ? y : x; }
VLMOPS_MIN_MAX(int)
VLMOPS_MIN_MAX(unsigned)
VLMOPS_MIN_MAX(long)
VLMOPS_MIN_MAX(unsigned long)
VLMOPS_MIN_MAX(long long)
VLMOPS_MIN_MAX(unsigned long long)
#undef VLMOPS_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

namespace vlmops {

template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  void* /*stream*/, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call = {kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(arguments)...)};
  const auto invoke = [](const void* p) {
    const auto* call = static_cast<const Call*>(p);
    std::apply(call->kernel, call->arguments);
  };
  return emulator::launch({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, invoke,
                           &call, sizeof(call)});
}

template <class... Parameters>
inline int allow_dynamic_shared(void (*kernel)(Parameters...), size_t bytes) {
  return emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline int architecture() { return emulator::architecture(); }
inline int multiprocessors() { return emulator::multiprocessors(); }

inline void cp_async_16(void* shared, const void* global, VLMOPS_HERE) {
  emulator::cp_async(shared, global, 16, 16, file, line);
}
inline void cp_async_16_or_zero(void* shared, const void* global, int bytes, VLMOPS_HERE) {
  emulator::cp_async(shared, global, 16, bytes, file, line);
}
inline void cp_async_8_or_zero(void* shared, const void* global, int bytes, VLMOPS_HERE) {
  emulator::cp_async(shared, global, 8, bytes, file, line);
}
inline void cp_async_4_or_zero(void* shared, const void* global, int bytes, VLMOPS_HERE) {
  emulator::cp_async(shared, global, 4, bytes, file, line);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
inline void cp_async_wait() {
  emulator::cp_async_wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, VLMOPS_HERE) {
  emulator::Ldmatrix operand = {r, shared_row, false};
  emulator::collective(emulator::Collective::kLdmatrix, 0xffffffffu, &operand,
                       emulator::load_matrices, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, VLMOPS_HERE) {
  emulator::Ldmatrix operand = {r, shared_row, true};
  emulator::collective(emulator::Collective::kLdmatrix, 0xffffffffu, &operand,
                       emulator::load_matrices, file, line);
}

inline void mma(emulator::Mma::Type type, float* c, const uint32_t* a, const uint32_t* b,
                const char* file, int line) {
  emulator::Mma operand = {type, c, a, b};
  emulator::collective(emulator::Collective::kMma, 0xffffffffu, &operand,
                       emulator::multiply_matrices, file, line);
}
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         __nv_bfloat16, VLMOPS_HERE) {
  mma(emulator::Mma::kBFloat16, c, a, b, file, line);
}
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                         VLMOPS_HERE) {
  mma(emulator::Mma::kFloat16, c, a, b, file, line);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             VLMOPS_HERE) {
  mma(emulator::Mma::kTf32, c, a, b, file, line);
}

}  // namespace vlmops
