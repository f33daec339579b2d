// The product of patch embedding for Hopper's tensor cores: the tiles, copies and tokens of
// patch_embed.cuh around wgmma. Blocks stay and take tile after tile; four warps copy, two
// warpgroups multiply and write tokens while the next tile's copies are under way.
#pragma once

#include "common/gpu_wgmma.cuh"
#include "ops/patch_embed/patch_embed.cuh"

namespace vlmops::patch_embed {

// 128 rows: two warpgroups of 64, each over all columns. kThreads are those that copy.
template <class T_, int kColumns_, int kStages_>
struct WgmmaTile {
  using T = T_;
  static constexpr int kRows = 128, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kRowBytes = 128, kPitch = 128, kDepth = kRowBytes / sizeof(T);
  static constexpr int kSteps = kDepth / 16;
  static constexpr int kThreads = 128, kMultiplying = 256;
  static constexpr int kAlign = 1024;
  static constexpr int kSlabColumns = kColumns == 256 ? 32 : 64, kSlabPitch = kSlabColumns + 8;
  static constexpr int kSlab = 16 * kSlabPitch;
  static constexpr int kSlabs = kSlab * kMultiplying / kWarpSize;
  static constexpr int kWeights = kRows * kPitch;  // of a stage, where they begin
  static __device__ __forceinline__ int place(int row, int byte) {
    return row * kPitch + ((byte / 16 ^ (row & 7)) * 16 + byte % 16);
  }
};

// Numbers of barriers.
constexpr int kCopying = 1, kMultiplyingBarrier = 2, kFull = 3;

// The warps that copy: tile after tile of k of one output tile after another.
template <class Tile>
__device__ __forceinline__ void copy_tiles(const Params& p, const Plan& plan, char* memory,
                                           const Lookup<Tile>& lookup, int steps) {
  constexpr int kAll = Tile::kThreads + Tile::kMultiplying, kAhead = Tile::kStages - 2;
  const int elements = plan.pixel_unit / static_cast<int>(sizeof(typename Tile::T));
  const auto arrive = [](int slot) {
    wgmma_fence_shared();
    barrier_arrive(kFull + slot, kAll);
  };
  int slot = 0, landed = 0, started = 0;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t first_row = tile / plan.column_tiles * Tile::kRows;
    const int64_t first_channel = tile % plan.column_tiles * Tile::kColumns;
    barrier_sync(kCopying, Tile::kThreads);
    lookup.fill_rows(p, first_row);
    lookup.fill_columns(p, 0, 0, elements);
    for (int step = 0; step < steps; ++step) {
      barrier_sync(kCopying, Tile::kThreads);
      if (started >= Tile::kStages) barrier_sync(kFull + Tile::kStages + slot, kAll);
      char* const stage = memory + slot * kStageBytes<Tile>;
      start_pixels<Tile>(stage, plan, lookup.row, lookup.offset + step % 2 * Tile::kDepth);
      start_weight<Tile>(stage + Tile::kWeights, p, plan, first_channel,
                         static_cast<int64_t>(step) * Tile::kDepth);
      cp_async_commit();
      lookup.fill_columns(p, (step + 1) % 2, static_cast<int64_t>(step + 1) * Tile::kDepth,
                          elements);
      if (started >= kAhead) {
        cp_async_wait<kAhead>();
        arrive(landed);
        landed = landed + 1 == Tile::kStages ? 0 : landed + 1;
      }
      if (started < Tile::kStages) ++started;
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    }
  }
  cp_async_wait<0>();
  for (; landed != slot; landed = landed + 1 == Tile::kStages ? 0 : landed + 1) arrive(landed);
}

// A warp's 16 rows of a tile of tokens.
template <class Tile>
__device__ __forceinline__ void finish_rows(const float (&c)[Tile::kColumns / 8][4],
                                            const Params& p, const Plan& plan, float* slab,
                                            const Place* place, int64_t rows,
                                            int64_t first_channel) {
  constexpr int kSpans = Tile::kSlabColumns / kChannels;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int part = 0; part < Tile::kColumns / Tile::kSlabColumns; ++part) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kSlabColumns / 8; ++j) {
      const auto& from = c[part * Tile::kSlabColumns / 8 + j];
      float* const to = slab + lane / 4 * Tile::kSlabPitch + j * 8 + lane % 4 * 2;
      store_pack(to, Pack<float, 2>{{from[0], from[1]}});
      store_pack(to + 8 * Tile::kSlabPitch, Pack<float, 2>{{from[2], from[3]}});
    }
    __syncwarp();
    const Span span(p, first_channel + part * Tile::kSlabColumns + lane % kSpans * kChannels);
    if (span.count <= 0) continue;
    const Channels bias = load_bias(p, plan, span);
    finish_slab<kSpans>(slab, Tile::kSlabPitch, p, plan, place, rows, span, bias);
  }
}

#if defined(VLMOPS_WGMMA)
template <class Tile>
__device__ __forceinline__ void multiply_copies(const Params& p, const Plan& plan,
                                                const char* memory, float* slabs, Place* place,
                                                int steps) {
  constexpr int kAll = Tile::kThreads + Tile::kMultiplying;
  const int thread = threadIdx.x - Tile::kThreads, warp = thread / kWarpSize;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (Tile::kMultiplying / kWarpSize) + warp;
       row < p.images * p.prefix_tokens;
       row += static_cast<int64_t>(gridDim.x) * (Tile::kMultiplying / kWarpSize))
    write_prefix(p, plan, row);
  const int64_t rows = p.images * p.patches();
  int slot = 0, last = 0;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t first_row = tile / plan.column_tiles * Tile::kRows;
    const int64_t first_channel = tile % plan.column_tiles * Tile::kColumns;
    float c[Tile::kColumns / 8][4];
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_sync(kFull + slot, kAll);
      const char* const stage = memory + slot * kStageBytes<Tile>;
      const uint64_t a = wgmma_descriptor(stage + warp / 4 * 64 * Tile::kPitch);
      const uint64_t b = wgmma_descriptor(stage + Tile::kWeights);
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < Tile::kSteps; ++i)
        wgmma_k16(c, a + 2 * i, b + 2 * i, step + i, typename Tile::T());
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) barrier_arrive(kFull + Tile::kStages + last, kAll);
      last = slot;
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    }
    wgmma_wait<0>();
    barrier_arrive(kFull + Tile::kStages + last, kAll);
    barrier_sync(kMultiplyingBarrier, Tile::kMultiplying);  // the last tile's places are read
    if (thread < Tile::kRows)
      place[thread] = place_of(p, first_row + thread < rows ? first_row + thread : rows - 1);
    barrier_sync(kMultiplyingBarrier, Tile::kMultiplying);
    finish_rows<Tile>(c, p, plan, slabs + warp * Tile::kSlab, place + warp * 16,
                      rows - first_row - warp * 16, first_channel);
  }
}
#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads + Tile::kMultiplying, 1)
    patch_embed_wgmma_kernel(const VLMOPS_GRID_CONSTANT Params p,
                             const VLMOPS_GRID_CONSTANT Plan plan) {
#if defined(VLMOPS_WGMMA)
  VLMOPS_DYNAMIC_SHARED(char, unaligned);
  VLMOPS_SHARED(const char*, row, Tile::kRows);
  VLMOPS_SHARED(int64_t, offset, 2 * Tile::kDepth);
  VLMOPS_SHARED(Place, place, Tile::kRows);
  char* const memory = unaligned + -shared_address(unaligned) % Tile::kAlign;
  float* const slabs = reinterpret_cast<float*>(memory + Tile::kStages * kStageBytes<Tile>);
  const int steps = static_cast<int>((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  if (threadIdx.x < Tile::kThreads) {
    give_registers<104>();
    copy_tiles<Tile>(p, plan, memory, {row, nullptr, offset, nullptr}, steps);
  } else {
    take_registers<200>();
    multiply_copies<Tile>(p, plan, memory, slabs, place, steps);
  }
#endif
}

}  // namespace vlmops::patch_embed
