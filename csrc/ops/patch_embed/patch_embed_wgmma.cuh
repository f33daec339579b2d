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
  static constexpr size_t kBytes =
      kAlign + kStages * (kRows + kColumns) * kPitch + kSlabs * sizeof(float);
  static constexpr int kWeights = kRows * kPitch;  // of a stage, where they begin
  static __device__ __forceinline__ int place(int row, int byte) {
    return row * kPitch + ((byte / 16 ^ (row & 7)) * 16 + byte % 16);
  }
};

// Numbers of barriers.
constexpr int kCopying = 1, kFull = 2;

// The warps that copy: tile after tile of k of one output tile after another.
template <class Tile>
__device__ __forceinline__ void copy_tiles(const Params& p, const Plan& plan, char* memory,
                                           int* columns, int* row, int steps) {
  constexpr int kAll = Tile::kThreads + Tile::kMultiplying, kAhead = Tile::kStages - 2;
  const auto arrive = [](int slot) {
    wgmma_fence_shared();
    barrier_arrive(kFull + slot, kAll);
  };
  fill_column_offsets<Tile>(p, plan, columns);
  int slot = 0, landed = 0, started = 0;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t first_row = tile / plan.column_tiles * Tile::kRows;
    const int64_t first_channel = tile % plan.column_tiles * Tile::kColumns;
    barrier_sync(kCopying, Tile::kThreads);  // the last tile's rows are read
    const Offsets from = {fill_row_offsets<Tile>(p, row, first_row), row, columns};
    barrier_sync(kCopying, Tile::kThreads);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (started >= Tile::kStages) barrier_sync(kFull + Tile::kStages + slot, kAll);
      char* const stage = memory + slot * kStageBytes<Tile>;
      start_pixels<Tile>(stage, plan, from, step);
      start_weight<Tile>(stage + Tile::kWeights, p, plan, first_channel,
                         static_cast<int64_t>(step) * Tile::kDepth);
      cp_async_commit();
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

// A warp's 16 rows of a tile of tokens, slab after slab; the plan is simple. What is added to
// products is under way one slab ahead.
template <class Tile>
struct Finish {
  static constexpr int kSpans = Tile::kSlabColumns / kChannels, kStride = kWarpSize / kSpans;
  static constexpr int kTokens = 16 / kStride, kSlabs = Tile::kColumns / Tile::kSlabColumns;
  const Params& p;
  const Plan& plan;
  float* slab;
  Place* place;  // [16]
  int64_t first_channel;
  int left;  // rows of them that there are
  int lane, row, column;
  Channels addend[kTokens];

  __device__ __forceinline__ Span span(int part) const {
    return {p, first_channel + part * Tile::kSlabColumns + column * kChannels};
  }

  __device__ __forceinline__ void load(Channels (&x)[kTokens], int part) const {
    const Span at = span(part);
    if (at.count <= 0) return;
    const Channels bias =
        p.bias == nullptr ? Channels{} : load_channels(p.bias, p.dtype, at.first, kChannels, true);
    load_addends<kTokens, kStride>(x, p, place + row, at.first, bias);
  }

  __device__ __forceinline__ void begin(int64_t first_row) {
    const int64_t rows = p.images * p.patches() - first_row;
    left = static_cast<int>(rows < 16 ? rows : 16);
    __syncwarp();
    if (lane < 16) place[lane] = place_of(p, first_row + (lane < rows ? lane : rows - 1));
    __syncwarp();
    load(addend, 0);
  }

  __device__ __forceinline__ void end(const float (&c)[Tile::kColumns / 8][4]) {
#pragma unroll
    for (int part = 0; part < kSlabs; ++part) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < Tile::kSlabColumns / 8; ++j) {
        const auto& from = c[part * Tile::kSlabColumns / 8 + j];
        float* const to = slab + lane / 4 * Tile::kSlabPitch + j * 8 + lane % 4 * 2;
        store_pack(to, Pack<float, 2>{{from[0], from[1]}});
        store_pack(to + 8 * Tile::kSlabPitch, Pack<float, 2>{{from[2], from[3]}});
      }
      Channels next[kTokens] = {};
      if (part + 1 < kSlabs) load(next, part + 1);
      __syncwarp();
      const Span at = span(part);
      if (at.count > 0)
        finish_simple<kTokens, kStride>(addend, slab + row * Tile::kSlabPitch + column * kChannels,
                                        Tile::kSlabPitch, p, place + row, left - row, at.first,
                                        column);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) addend[i] = next[i];
    }
  }
};

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
  const int lane = threadIdx.x % kWarpSize;
  using F = Finish<Tile>;
  F finish = {p, plan, slabs + warp * Tile::kSlab, place + warp * 16, 0,
              0, lane, lane / F::kSpans,           lane % F::kSpans,  {}};
  int slot = 0, last = 0;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int64_t first_row = tile / plan.column_tiles * Tile::kRows;
    const int64_t first_channel = tile % plan.column_tiles * Tile::kColumns;
    finish.first_channel = first_channel;
    finish.begin(first_row + warp * 16);
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
    finish.end(c);
  }
}
#endif

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads + Tile::kMultiplying, 1)
    patch_embed_wgmma_kernel(const VLMOPS_GRID_CONSTANT Params p,
                             const VLMOPS_GRID_CONSTANT Plan plan) {
#if defined(VLMOPS_WGMMA)
  VLMOPS_DYNAMIC_SHARED(char, unaligned);
  VLMOPS_SHARED(int, row, Tile::kRows);
  VLMOPS_SHARED(Place, place, Tile::kRows);
  char* const memory = unaligned + -shared_address(unaligned) % Tile::kAlign;
  float* const slabs = reinterpret_cast<float*>(memory + Tile::kStages * kStageBytes<Tile>);
  const int steps = static_cast<int>((p.depth + Tile::kDepth - 1) / Tile::kDepth);
  if (threadIdx.x < Tile::kThreads) {
    give_registers<88>();
    copy_tiles<Tile>(p, plan, memory, reinterpret_cast<int*>(slabs + Tile::kSlabs), row, steps);
  } else {
    take_registers<208>();
    multiply_copies<Tile>(p, plan, memory, slabs, place, steps);
  }
#endif
}

}  // namespace vlmops::patch_embed
