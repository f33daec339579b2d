// Hopper's matrix products of a warpgroup (wgmma), for kernels that only sm_90a has; the emulator
// knows none of this. Both operands lie in shared memory: rows of 128 bytes of 16-bit elements
// along k, in which chunk c of 16 bytes of row r lies at c ^ r % 8; a tile begins at a multiple of
// 1024 bytes.
#pragma once

#include "common/gpu.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VLMOPS_WGMMA 1
#endif

#if !defined(VLMOPS_EMULATOR)
namespace vlmops {

// Of a tile, for wgmma; 32 bytes further along k are 2 more.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  constexpr uint64_t kGroupOfRows = uint64_t{1024 >> 4} << 32, kSwizzle128 = uint64_t{1} << 62;
  return (shared_address(tile) & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroupOfRows | kSwizzle128;
}

// Before wgmma reads what this thread wrote to shared memory, itself or by a cp.async that landed.
__device__ __forceinline__ void wgmma_fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barriers of some of a block's threads, by number; 0 is __syncthreads'.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#if defined(VLMOPS_WGMMA)
// This warpgroup's threads have N registers from here on.
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the last N committed groups are done.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define VLMOPS_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define VLMOPS_C16(j) VLMOPS_C4(j), VLMOPS_C4(j + 1), VLMOPS_C4(j + 2), VLMOPS_C4(j + 3)

// c [64, N] = a [64, 16] b [N, 16]^T, added to c unless `add` is 0, by the 128 threads of a
// warpgroup: warp w has rows 16 w to 16 w + 15, c[j] is what mma_m16n8k16 has of columns 8 j to 8 j
// + 7.
__device__ __forceinline__ void wgmma_k16(float (&c)[16][4], uint64_t a, uint64_t b, int add,
                                          __nv_bfloat16) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_k16(float (&c)[16][4], uint64_t a, uint64_t b, int add,
                                          __half) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_k16(float (&c)[24][4], uint64_t a, uint64_t b, int add,
                                          __nv_bfloat16) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95 "
      "}, %96, %97, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12), VLMOPS_C16(16), VLMOPS_C16(20)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_k16(float (&c)[24][4], uint64_t a, uint64_t b, int add,
                                          __half) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95 "
      "}, %96, %97, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12), VLMOPS_C16(16), VLMOPS_C16(20)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_k16(float (&c)[32][4], uint64_t a, uint64_t b, int add,
                                          __nv_bfloat16) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12), VLMOPS_C16(16), VLMOPS_C16(20),
        VLMOPS_C16(24), VLMOPS_C16(28)
      : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_k16(float (&c)[32][4], uint64_t a, uint64_t b, int add,
                                          __half) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 "
      "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : VLMOPS_C16(0), VLMOPS_C16(4), VLMOPS_C16(8), VLMOPS_C16(12), VLMOPS_C16(16), VLMOPS_C16(20),
        VLMOPS_C16(24), VLMOPS_C16(28)
      : "l"(a), "l"(b), "r"(add));
}

#undef VLMOPS_C16
#undef VLMOPS_C4
#endif

}  // namespace vlmops
#endif
