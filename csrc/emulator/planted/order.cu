// Planted bugs: threads that do not wait for each other, or wait for ever.

#include "emulator/planted/planted.h"

namespace vlmops::planted {

VLMOPS_PLANTED(race_write_read, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = row[n - 1 - threadIdx.x];
}

// Threads run one after the other here, so that the reader finds what it wants: all the same.
VLMOPS_PLANTED(race_write_read_later, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x > 0) y[threadIdx.x] = row[threadIdx.x - 1];
}

// The second turn overwrites what others still read.
VLMOPS_PLANTED(race_read_write, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  float sum = 0.0f;
  for (int turn = 0; turn < 2; ++turn) {
    row[threadIdx.x] = x[threadIdx.x] + turn;
    __syncthreads();
    sum += row[(threadIdx.x + 32) % n];
  }
  y[threadIdx.x] = sum;
}

VLMOPS_PLANTED(race_write_write, 1, 64) {
  VLMOPS_SHARED(float, total, 1);
  total[0] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = total[0];
}

// A sum without an atomic.
VLMOPS_PLANTED(race_sum, 1, 64) {
  VLMOPS_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0.0f;
  __syncthreads();
  total[0] += x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = total[0];
}

VLMOPS_PLANTED(race_atomic_and_read, 1, 64) {
  VLMOPS_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0.0f;
  __syncthreads();
  atomicAdd(&total[0], x[threadIdx.x]);
  y[threadIdx.x] = total[0];
}

// Lanes of a warp do not run in step since Volta.
VLMOPS_PLANTED(race_in_warp, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = row[threadIdx.x ^ 1];
}

// A shuffle orders no memory.
VLMOPS_PLANTED(race_over_shuffle, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  y[threadIdx.x] = row[threadIdx.x ^ 1] + other;
}

// __syncwarp does not reach the other warp.
VLMOPS_PLANTED(race_over_syncwarp, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = row[threadIdx.x ^ 32];
}

// Nor does half a warp's reach the other half.
VLMOPS_PLANTED(race_over_half_syncwarp, 1, 64) {
  VLMOPS_SHARED(float, row, 64);
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  y[threadIdx.x] = row[threadIdx.x ^ 16];
}

// Through global memory within a block: in place, the neighbour may have been overwritten.
VLMOPS_PLANTED(race_in_place, 1, 64) {
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = y[(threadIdx.x + 1) % n] + x[threadIdx.x];
}

__global__ void race_of_blocks_kernel(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

VLMOPS_CASE(race_of_blocks) {
  return launch(race_of_blocks_kernel, dim3(2), dim3(32), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1));
}

// The gradient of a weight, summed over blocks without atomics or a ticket.
__global__ void race_of_blocks_read_kernel(const float* x, float* y) {
  y[blockIdx.x] = x[blockIdx.x];
  if (blockIdx.x == 1) y[1] += y[0];
}

VLMOPS_CASE(race_of_blocks_read) {
  return launch(race_of_blocks_read_kernel, dim3(2), dim3(1), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1));
}

// A ticket without the fence before it.
__global__ void ticket_without_fence_kernel(const float* x, float* y) {
  if (blockIdx.x == 0) y[1] = x[0];
  const float ticket = atomicAdd(&y[0], 1.0f);
  if (blockIdx.x == 1) y[2] = y[1] + ticket;
}

VLMOPS_CASE(ticket_without_fence) {
  return launch(ticket_without_fence_kernel, dim3(2), dim3(1), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1));
}

VLMOPS_PLANTED(exit_before_barrier, 1, 64) {
  if (threadIdx.x >= 50) return;
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] += 1.0f;
}

VLMOPS_PLANTED(barrier_in_branch, 1, 64) {
  if (threadIdx.x < 32) {
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
  } else {
    __syncthreads();
    y[threadIdx.x] = 1.0f;
  }
}

VLMOPS_PLANTED(barrier_skipped, 1, 64) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

VLMOPS_PLANTED(shuffle_after_exit, 1, 64) {
  if (threadIdx.x >= 50) return;
  y[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 16);
}

// The lane leaves while the others wait for it.
VLMOPS_PLANTED(exit_during_shuffle, 1, 64) {
  if (threadIdx.x == 63) return;
  y[threadIdx.x] = __shfl_down_sync(kFullWarp, x[threadIdx.x], 1);
}

VLMOPS_PLANTED(vote_after_exit, 1, 64) {
  if (threadIdx.x < 3) return;
  y[threadIdx.x] = __any_sync(kFullWarp, x[threadIdx.x] > 0.0f);
}

__global__ void ragged_warp_kernel(const float* x, float* y) {
  y[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
}

VLMOPS_CASE(ragged_warp) {
  return launch(ragged_warp_kernel, dim3(1), dim3(48), 0, arguments.stream,
                arguments.buffer<const float>(0), arguments.buffer<float>(1));
}

VLMOPS_PLANTED(caller_not_in_mask, 1, 64) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
}

VLMOPS_PLANTED(source_not_in_mask, 1, 64) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 16);
}

VLMOPS_PLANTED(masks_differ, 1, 64) {
  const unsigned mask = threadIdx.x % 32 == 5 ? 0x0000ffffu : kFullWarp;
  y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

VLMOPS_PLANTED(shuffle_against_vote, 1, 64) {
  if (threadIdx.x % 32 == 0) {
    y[threadIdx.x] = __any_sync(kFullWarp, 1);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  }
}

VLMOPS_PLANTED(shuffle_against_barrier, 1, 64) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  y[threadIdx.x] = __shfl_xor_sync(kFullWarp, x[threadIdx.x], 1);
  if (threadIdx.x % 32 != 0) __syncthreads();
}

// A lock that the holder never gives back.
VLMOPS_PLANTED(lock_kept, 1, 64) {
  auto* const lock = reinterpret_cast<unsigned*>(y);
  if (threadIdx.x == 0) atomicExch(lock, 0u);
  __syncthreads();
  while (atomicCAS(lock, 0u, 1u) != 0u) {
  }
  y[1] = x[0];
}

// Polls what nobody writes any more.
VLMOPS_PLANTED(polls_for_ever, 1, 64) {
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile float*>(x) < 1e30f) {
    }
  }
  y[threadIdx.x] = 1.0f;
}

}  // namespace vlmops::planted
