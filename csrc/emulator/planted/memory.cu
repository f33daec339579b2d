// Planted bugs: accesses that must not happen.

#include <cassert>
#include <cstring>

#include "emulator/planted/planted.h"

namespace vlmops::planted {

__device__ __forceinline__ int global_thread() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// The neighbour of the last element is none.
VLMOPS_PLANTED(read_past_end, 2, 32) {
  const int i = global_thread();
  y[i] = x[i] + x[i + 1];
}

VLMOPS_PLANTED(write_past_end, 2, 32) {
  const int i = global_thread();
  if (i <= n) y[i == n - 1 ? n : i] = x[i];
}

VLMOPS_PLANTED(read_before_start, 2, 32) {
  const int i = global_thread();
  y[i] = x[n - 65 - i];
}

// The last pack begins inside and ends outside.
VLMOPS_PLANTED(pack_over_end, 2, 32) {
  const int i = global_thread() * 4;
  if (i < n) store_pack(y + i, load_pack<4>(x + i));
  if (i == n - 4) y[0] = load_pack<4>(x + n - 4)[0] + load_pack<4>(x + n)[0];
}

VLMOPS_PLANTED(null_pointer, 2, 32) {
  const float* table = n > 0 ? nullptr : x;
  y[global_thread()] = table[threadIdx.x];
}

VLMOPS_PLANTED(memcpy_past_end, 2, 32) {
  float local[8];
  const int i = global_thread();
  std::memcpy(local, x + i, sizeof(float) * (n / 8));
  y[i] = local[i % 8];
}

VLMOPS_PLANTED(other_threads_local, 2, 32) {
  VLMOPS_SHARED(float*, mine, 32);
  float local = x[global_thread()];
  mine[threadIdx.x] = &local;
  __syncthreads();
  y[global_thread()] = *mine[threadIdx.x ^ 1];
  __syncthreads();
}

VLMOPS_PLANTED(write_to_input, 2, 32) {
  const int i = global_thread();
  const_cast<float*>(x)[i] = 2.0f * x[i];
  y[i] = 0.0f;
}

VLMOPS_PLANTED(atomic_past_end, 2, 32) { atomicAdd(&y[global_thread() + n / 2], x[0]); }

VLMOPS_PLANTED(shared_past_end, 2, 32) {
  VLMOPS_SHARED(float, row, 32);
  float* const p = row + (n - 64);
  p[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[global_thread()] = row[threadIdx.x ? threadIdx.x : 1];
}

// As above, with an index that g++ can see to leave the array.
VLMOPS_PLANTED(shared_index, 2, 32) {
  VLMOPS_SHARED(float, row, 32);
  row[threadIdx.x + n / 64] = x[threadIdx.x];
  __syncthreads();
  y[global_thread()] = row[threadIdx.x ? threadIdx.x : 1];
}

VLMOPS_PLANTED(local_index, 2, 32) {
  float local[4] = {};
  local[threadIdx.x % 4 + n / 64] = x[threadIdx.x];
  y[global_thread()] = local[1] + local[2];
}

__global__ void dynamic_past_end_kernel(const float* x, float* y) {
  VLMOPS_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x];
}

VLMOPS_CASE(dynamic_past_end) {
  return launch(dynamic_past_end_kernel, dim3(1), dim3(32), 31 * sizeof(float), arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1));
}

// Rows of 3 floats do not begin at multiples of 16 bytes.
VLMOPS_PLANTED(misaligned_pack, 2, 32) {
  const int i = global_thread() * 3;
  if (i + 4 <= n) y[i] = load_pack<4>(x + i)[3];
}

VLMOPS_PLANTED(misaligned_shared_pack, 2, 32) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = row[threadIdx.x + 32] = x[threadIdx.x];
  __syncthreads();
  y[global_thread()] = load_pack<2>(row + threadIdx.x)[0];
}

VLMOPS_PLANTED(misaligned_cast, 2, 32) {
  const int i = global_thread();
  const auto* bytes = reinterpret_cast<const char*>(x);
  if (i < 8) y[i] = *reinterpret_cast<const float*>(bytes + i * 2 + n);
}

VLMOPS_PLANTED(misaligned_vector_cast, 2, 32) {
  const int i = global_thread();
  if (i + 4 < n) y[i] = reinterpret_cast<const float4*>(x + i)->y;
}

VLMOPS_PLANTED(uninitialised_shared, 2, 32) {
  VLMOPS_SHARED(float, row, 32);
  if (threadIdx.x > 0) row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[global_thread()] = row[threadIdx.x];
}

// What a block finds there was written by the block before it.
VLMOPS_PLANTED(shared_of_other_block, 2, 32) {
  VLMOPS_SHARED(float, row, 32);
  if (blockIdx.x == 0) row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[global_thread()] = row[threadIdx.x];
}

VLMOPS_PLANTED(shift_too_far, 2, 32) {
  y[global_thread()] = x[0] + static_cast<float>(1 << (n - 64 + static_cast<int>(threadIdx.x) * 2));
}

VLMOPS_PLANTED(trapped, 2, 32) {
  if (global_thread() == n - 1) __trap();
  y[global_thread()] = x[0];
}

VLMOPS_PLANTED(asserted, 2, 32) {
  assert(global_thread() < n - 1);
  y[global_thread()] = x[0];
}

}  // namespace vlmops::planted
