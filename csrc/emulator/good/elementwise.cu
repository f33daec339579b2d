// Good kernels of the emulator's tests: packs with ragged tails, reductions, atomics, dynamic
// shared memory. No alarm may go off on any of them.
#include "common/gpu.cuh"
#include "emulator/cases.h"

namespace vlmops::emulator_good {

// y = a x + y over n elements, a pack at a time, the tail one by one.
template <class T>
__global__ void __launch_bounds__(128)
    axpy_kernel(const T* __restrict__ x, T* __restrict__ y, float a, int64_t n) {
  const int64_t packs = n / kPack<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    const auto px = load_pack<kPack<T>>(x + i * kPack<T>);
    auto py = load_pack<kPack<T>>(y + i * kPack<T>);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
      py[j] = from_float<T>(fmaf(a, to_float(px[j]), to_float(py[j])));
    store_pack(y + i * kPack<T>, py);
  }
  for (int64_t i = packs * kPack<T> + first; i < n; i += step) {
    y[i] = from_float<T>(fmaf(a, to_float(x[i]), to_float(y[i])));
  }
}

template <class T>
int axpy(const emulator::Arguments& arguments) {
  const int64_t n = arguments.sizes[0];
  const auto blocks = static_cast<unsigned>(n / kPack<T> / 128 + 1);
  return launch(axpy_kernel<T>, dim3(blocks), dim3(128), 0, arguments.stream,
                arguments.buffer<const T>(0), arguments.buffer<T>(1), 0.5f, n);
}

VLMOPS_CASE(axpy_f32) { return axpy<float>(arguments); }
VLMOPS_CASE(axpy_bf16) { return axpy<bfloat16>(arguments); }
VLMOPS_CASE(axpy_f16) { return axpy<__half>(arguments); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) v += __shfl_xor_sync(kFullWarp, v, delta);
  return v;
}

// Every thread gets the block's sum.
__device__ __forceinline__ float block_sum(float v) {
  VLMOPS_SHARED(float, partial, kWarpSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  v = warp_sum(v);
  __syncthreads();  // the last call's partial sums have been read
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  return warp_sum(lane < warps ? partial[lane] : 0.0f);
}

// y = x rsqrt(mean x^2 + eps) - its mean: two reductions one after the other. One row a block.
__global__ void norm_kernel(const float* __restrict__ x, float* __restrict__ y, int width) {
  x += static_cast<int64_t>(blockIdx.x) * width;
  y += static_cast<int64_t>(blockIdx.x) * width;
  float squares = 0.0f, sum = 0.0f;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    squares += x[i] * x[i];
    sum += x[i];
  }
  const float scale = rsqrtf(block_sum(squares) / width + 1e-6f);
  const float mean = block_sum(sum) / width * scale;
  for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = x[i] * scale - mean;
}

VLMOPS_CASE(norm) {
  return launch(norm_kernel, dim3(arguments.size(0)), dim3(256), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1), arguments.size(1));
}

// counts[v] += how often v in [0, 64) occurs; the block's own counts are collected in shared
// memory.
__global__ void histogram_kernel(const int* __restrict__ x, int* counts, float* total, int n) {
  VLMOPS_SHARED(int, local, 64);
  if (threadIdx.x < 64) local[threadIdx.x] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  if (threadIdx.x < 64) {
    atomicAdd(&counts[threadIdx.x], local[threadIdx.x]);
    atomicAdd(total, static_cast<float>(local[threadIdx.x]));
  }
}

VLMOPS_CASE(histogram) {
  const int n = arguments.size(0);
  return launch(histogram_kernel, dim3(n / 128 + 1), dim3(128), 0, arguments.stream,
                arguments.buffer<const int>(0), arguments.buffer<int>(1),
                arguments.buffer<float>(2), n);
}

// y[i] = the sum over each block's x, by the block that finishes last: __threadfence and a ticket.
__global__ void last_block_kernel(const float* __restrict__ x, float* partial, unsigned* ticket,
                                  float* y) {
  VLMOPS_SHARED(bool, is_last, 1);
  const float sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  float all = 0.0f;
  for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) all += partial[i];
  all = block_sum(all);
  if (threadIdx.x == 0) *y = all;
}

VLMOPS_CASE(last_block) {
  return launch(last_block_kernel, dim3(arguments.size(0)), dim3(64), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1),
                arguments.buffer<unsigned>(2), arguments.buffer<float>(3));
}

// y = x transposed by way of dynamic shared memory, in tiles of tile^2; 3-D threads and blocks.
__global__ void transpose_kernel(const double* __restrict__ x, double* __restrict__ y, int rows,
                                 int columns, int tile) {
  VLMOPS_DYNAMIC_SHARED(double, staged);
  const int row = blockIdx.y * tile + threadIdx.y, column = blockIdx.x * tile + threadIdx.x;
  if (row < rows && column < columns) {
    staged[threadIdx.y * (tile + 1) + threadIdx.x] =
        x[static_cast<int64_t>(row) * columns + column];
  }
  __syncthreads();
  const int to_row = blockIdx.x * tile + threadIdx.y, to_column = blockIdx.y * tile + threadIdx.x;
  if (to_row < columns && to_column < rows) {
    y[static_cast<int64_t>(to_row) * rows + to_column] =
        staged[threadIdx.x * (tile + 1) + threadIdx.y];
  }
}

VLMOPS_CASE(transpose) {
  const int rows = arguments.size(0), columns = arguments.size(1), tile = 16;
  const dim3 grid((columns + tile - 1) / tile, (rows + tile - 1) / tile);
  return launch(transpose_kernel, grid, dim3(tile, tile), tile * (tile + 1) * sizeof(double),
                arguments.stream, arguments.buffer<const double>(0), arguments.buffer<double>(1),
                rows, columns, tile);
}

// Half-warps that go their own ways: votes, shuffles and __syncwarp with partial masks; results in
// y [blockDim]. Warps hand values on through shared memory with __syncwarp alone.
__global__ void half_warps_kernel(int* y) {
  VLMOPS_SHARED(int, staged, 64);
  const int lane = threadIdx.x % kWarpSize;
  const bool upper = lane >= 16;
  const unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
  int value = lane;
  if (upper) {
    value = __shfl_down_sync(mask, value, 3, 16);
  } else {
    value = __shfl_up_sync(mask, value, 2, 16) + __popc(__ballot_sync(mask, lane % 4 == 0));
  }
  staged[threadIdx.x] = value;
  __syncwarp(mask);
  const int neighbour = staged[threadIdx.x ^ 1];
  __syncwarp();
  staged[threadIdx.x ^ 31] = neighbour;
  __syncwarp();
  y[threadIdx.x] = staged[threadIdx.x] + 100 * __all_sync(kFullWarp, lane >= 0) +
                   1000 * __any_sync(kFullWarp, lane == 40);
}

VLMOPS_CASE(half_warps) {
  return launch(half_warps_kernel, dim3(1), dim3(64), 0, arguments.stream,
                arguments.buffer<int>(0));
}

// The greatest x as int, as unsigned and as 64 bits; their sum in float64 and, behind a lock, in
// float32; how many there are.
__global__ void atomics_kernel(const int* __restrict__ x, int* greatest,
                               unsigned* unsigned_greatest, unsigned long long* wide, double* sum,
                               float* locked_sum, unsigned* lock, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicMax(greatest, x[i]);
  atomicMax(unsigned_greatest, static_cast<unsigned>(x[i]));
  atomicMax(wide, static_cast<unsigned long long>(abs(x[i])));
  atomicAdd(wide + 1, 1ull);
  atomicAdd(sum, static_cast<double>(x[i]));
  while (atomicCAS(lock, 0u, 1u) != 0u) {
  }
  atomicExch(locked_sum, atomicAdd(locked_sum, 0.0f) + static_cast<float>(x[i]));
  __threadfence();
  atomicExch(lock, 0u);
}

VLMOPS_CASE(atomics) {
  const int n = arguments.size(0);
  return launch(atomics_kernel, dim3(n / 64 + 1), dim3(64), 0, arguments.stream,
                arguments.buffer<const int>(0), arguments.buffer<int>(1),
                arguments.buffer<unsigned>(2), arguments.buffer<unsigned long long>(3),
                arguments.buffer<double>(4), arguments.buffer<float>(5),
                arguments.buffer<unsigned>(6), n);
}

// y = how many of the block's x are positive; whether any, whether all, each by the barrier itself.
__global__ void counting_barriers_kernel(const float* __restrict__ x, int* y) {
  const bool positive = x[threadIdx.x] > 0.0f;
  const int count = __syncthreads_count(positive);
  const int any = __syncthreads_or(positive), all = __syncthreads_and(positive);
  if (threadIdx.x == 0) {
    y[0] = count;
    y[1] = any;
    y[2] = all;
  }
}

VLMOPS_CASE(counting_barriers) {
  static const int devices = multiprocessors() > 0;
  return launch(counting_barriers_kernel, dim3(devices), dim3(96), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<int>(1));
}

}  // namespace vlmops::emulator_good
