// Planted bugs: cp.async that is not waited for or not ordered, ldmatrix and mma misused.

#include "emulator/planted/planted.h"

namespace vlmops::planted {

VLMOPS_PLANTED(copy_without_wait, 1, 16) {
  VLMOPS_SHARED(float, row, 64);
  cp_async_16(row + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  __syncthreads();
  store_pack(y + threadIdx.x * 4, load_pack<4>(row + threadIdx.x * 4));
}

// Waits for the group before the one that it reads.
VLMOPS_PLANTED(copy_wait_one_short, 1, 16) {
  VLMOPS_SHARED(float, row, 128);
  for (int stage = 0; stage < 2; ++stage) {
    cp_async_16(row + stage * 64 + threadIdx.x * 4, x + threadIdx.x * 4);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  store_pack(y + threadIdx.x * 4, load_pack<4>(row + 64 + threadIdx.x * 4));
}

VLMOPS_PLANTED(copy_without_commit, 1, 16) {
  VLMOPS_SHARED(float, row, 64);
  cp_async_16(row + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_wait<0>();
  __syncthreads();
  store_pack(y + threadIdx.x * 4, load_pack<4>(row + threadIdx.x * 4));
}

// A thread's wait is for its own copies only.
VLMOPS_PLANTED(copy_without_barrier, 1, 16) {
  VLMOPS_SHARED(float, row, 64);
  store_pack(row + threadIdx.x * 4, Pack<float, 4>());
  __syncthreads();
  cp_async_16(row + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  store_pack(y + threadIdx.x * 4, load_pack<4>(row + (60 - threadIdx.x * 4)));
}

// The next copy starts while others still read.
VLMOPS_PLANTED(copy_over_readers, 1, 16) {
  VLMOPS_SHARED(float, row, 64);
  float sum = 0.0f;
  for (int turn = 0; turn < 2; ++turn) {
    cp_async_16(row + threadIdx.x * 4, x + threadIdx.x * 4);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    sum += row[63 - threadIdx.x];
  }
  y[threadIdx.x] = sum;
}

VLMOPS_PLANTED(copy_past_end, 1, 16) {
  VLMOPS_SHARED(float, row, 64);
  cp_async_16(row + threadIdx.x * 4, x + (threadIdx.x + 1) * 4);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = row[threadIdx.x * 4];
}

VLMOPS_PLANTED(copy_past_shared_end, 1, 16) {
  VLMOPS_SHARED(float, row, 60);
  cp_async_16(row + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = row[threadIdx.x * 4];
}

VLMOPS_PLANTED(copy_misaligned, 1, 16) {
  VLMOPS_SHARED(float, row, 68);
  cp_async_16(row + threadIdx.x * 4 + 1, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = row[threadIdx.x * 4 + 1];
}

// The second of two words of 4 bytes.
VLMOPS_PLANTED(narrow_copy_misaligned, 1, 16) {
  VLMOPS_SHARED(float, row, 66);
  cp_async_8_or_zero(row + threadIdx.x * 4 + 1, x + threadIdx.x * 4, 8);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = row[threadIdx.x * 4 + 1];
}

VLMOPS_PLANTED(narrow_copy_past_shared_end, 1, 16) {
  VLMOPS_SHARED(float, row, 15);
  cp_async_4_or_zero(row + threadIdx.x, x + threadIdx.x, 0);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = row[threadIdx.x];
}

VLMOPS_PLANTED(copy_to_global, 1, 16) {
  cp_async_16(y + threadIdx.x * 4, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
}

VLMOPS_PLANTED(ldmatrix_misaligned, 1, 32) {
  VLMOPS_SHARED(float, row, 136);
  for (int i = threadIdx.x; i < 136; i += 32) row[i] = x[i % 64];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, row + threadIdx.x * 4 + 2);
  y[threadIdx.x] = __uint_as_float(r[0]);
}

// The tile is read by other lanes than those that wrote it.
VLMOPS_PLANTED(ldmatrix_race, 1, 32) {
  VLMOPS_SHARED(float, row, 128);
  for (int i = threadIdx.x; i < 128; i += 32) row[i] = x[i % 64];
  uint32_t r[4];
  ldmatrix_x4(r, row + threadIdx.x * 4);
  y[threadIdx.x] = __uint_as_float(r[0]);
}

// Half a warp cannot multiply.
VLMOPS_PLANTED(mma_of_half_a_warp, 1, 32) {
  if (threadIdx.x >= 16) return;
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16(c, a, b, __half());
  y[threadIdx.x] = c[0] + x[0];
}

}  // namespace vlmops::planted
