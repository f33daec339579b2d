// A good matrix product for the emulator's tests: tiles come by cp.async into two buffers,
// fragments by ldmatrix, products by mma. y [M, N] = x [M, K] w^T, w [N, K], or w [K, N] where it
// says so.
//
// Everything counts in units of 16 bytes, what one cp.async moves and one row of ldmatrix's 8x8
// matrices holds: 8 halves or 4 float32. One mma is two units deep in either type.
#include "common/gpu.cuh"
#include "emulator/cases.h"

namespace vlmops::emulator_good {

constexpr int kTile = 64;  // rows and columns of y a block computes, with 2x2 warps
constexpr int kUnits = 4;  // depth of a tile of x and w
constexpr int kStride =
    kUnits + 1;  // of a row in shared memory: a unit off, against bank conflicts

struct alignas(16) Unit {
  uint32_t words[4];
};

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float) {
  mma_m16n8k8_tf32(c, a, b);
}
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    T type) {
  mma_m16n8k16(c, a, b, type);
}

// Starts copying `rows` x `units` units of src [limit, stride], from row `row` and column `column`;
// what is outside is zero.
template <class T>
__device__ __forceinline__ void copy_tile(Unit* shared, int shared_stride, int rows, int units,
                                          const T* src, int row, int column, int limit, int width) {
  constexpr int kElements = 16 / sizeof(T);
  for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
    const int r = row + i / units, c = column + i % units * kElements;
    const bool inside = r < limit && c < width;
    cp_async_16_or_zero(shared + i / units * shared_stride + i % units,
                        inside ? src + static_cast<int64_t>(r) * width + c : src, inside ? 16 : 0);
  }
}

template <class T, bool kWeightByDepth>
__global__ void __launch_bounds__(128) gemm_kernel(const T* __restrict__ x, const T* __restrict__ w,
                                                   float* __restrict__ y, int m, int n, int k) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kDepth = kUnits * kElements;
  constexpr int kWStride = kWeightByDepth ? kTile / kElements + 1 : kStride;
  constexpr int kWRows = kWeightByDepth ? kDepth : kTile;
  VLMOPS_DYNAMIC_SHARED(Unit, staged);
  Unit* const xs = staged;                        // [2, kTile, kStride]
  Unit* const ws = staged + 2 * kTile * kStride;  // [2, kWRows, kWStride]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = blockIdx.y * kTile, column = blockIdx.x * kTile;
  const auto copy = [&](int step) {
    const int buffer = step % 2;
    copy_tile(xs + buffer * kTile * kStride, kStride, kTile, kUnits, x, row, step * kDepth, m, k);
    if (kWeightByDepth) {
      copy_tile(ws + buffer * kWRows * kWStride, kWStride, kDepth, kTile / kElements, w,
                step * kDepth, column, k, n);
    } else {
      copy_tile(ws + buffer * kWRows * kWStride, kWStride, kTile, kUnits, w, column, step * kDepth,
                n, k);
    }
    cp_async_commit();
  };

  float c[2][4][4] = {};  // 16-row tile, 8-column tile, registers of one mma
  const int steps = (k + kDepth - 1) / kDepth;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const Unit* const xt = xs + step % 2 * kTile * kStride;
    const Unit* const wt = ws + step % 2 * kWRows * kWStride;
#pragma unroll
    for (int unit = 0; unit < kUnits; unit += 2) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp / 2 * 32 + i * 16 + lane % 16;
        ldmatrix_x4(a[i], xt + r * kStride + unit + lane / 16);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        const int first = warp % 2 * 32 + j * 8;
        if (kWeightByDepth) {
          const int depth = unit * kElements + lane % 16;
          ldmatrix_x4_trans(r, wt + depth * kWStride + first / kElements + lane / 16);
        } else {
          ldmatrix_x4(r, wt + (first + lane / 16 * 8 + lane % 8) * kWStride + unit + lane / 8 % 2);
        }
        b[j][0] = r[0];
        b[j][1] = r[1];
        b[j + 1][0] = r[2];
        b[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(c[i][j], a[i], b[j], T());
      }
    }
    __syncthreads();  // before the next copy into this buffer
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + warp / 2 * 32 + i * 16 + lane / 4 + e / 2 * 8;
        const int col = column + warp % 2 * 32 + j * 8 + lane % 4 * 2 + e % 2;
        if (r < m && col < n) y[static_cast<int64_t>(r) * n + col] = c[i][j][e];
      }
    }
  }
}

// sizes: M, N, K; rows of x and w must be multiples of 16 bytes.
template <class T, bool kWeightByDepth>
int gemm(const emulator::Arguments& arguments) {
  const int m = arguments.size(0), n = arguments.size(1), k = arguments.size(2);
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kWUnits =
      kWeightByDepth ? kUnits * kElements * (kTile / kElements + 1) : kTile * kStride;
  const size_t bytes = 2 * (kTile * kStride + kWUnits) * sizeof(Unit);
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  return launch(gemm_kernel<T, kWeightByDepth>, grid, dim3(128), bytes, arguments.stream,
                arguments.buffer<const T>(0), arguments.buffer<const T>(1),
                arguments.buffer<float>(2), m, n, k);
}

VLMOPS_CASE(gemm_bf16) { return gemm<__nv_bfloat16, false>(arguments); }
VLMOPS_CASE(gemm_f16) { return gemm<__half, false>(arguments); }
VLMOPS_CASE(gemm_tf32) { return gemm<float, false>(arguments); }
VLMOPS_CASE(gemm_f16_by_depth) { return gemm<__half, true>(arguments); }

// More dynamic shared memory than 48 KiB, all of it used. sizes: floats.
__global__ void large_shared_kernel(const float* __restrict__ x, float* __restrict__ y, int n) {
  VLMOPS_DYNAMIC_SHARED(float, all);
  for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = all[n - 1 - i];
}

VLMOPS_CASE(large_shared) {
  const size_t bytes = arguments.sizes[0] * sizeof(float);
  const int status = allow_dynamic_shared(large_shared_kernel, bytes);
  return status != 0 ? status
                     : launch(large_shared_kernel, dim3(1), dim3(1024), bytes, arguments.stream,
                              arguments.buffer<const float>(0), arguments.buffer<float>(1),
                              arguments.size(0));
}

}  // namespace vlmops::emulator_good
