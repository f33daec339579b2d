// Packed attention's kernels on NVIDIA GPUs: entry points of the core in common/attention.cuh,
// whose head has the maths, bytes, operations and threads.
#pragma once

#include "common/attention.cuh"
#include "ops/packed_attention/packed_attention.h"

namespace vlmops::packed_attention {

using attention::Plan;

constexpr int kCombineThreads = 256, kDeltaThreads = 256;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    packed_attention_kernel(const VLMOPS_GRID_CONSTANT Params p,
                            const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::forward<Tile>(p, plan);
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    packed_attention_combine_kernel(const VLMOPS_GRID_CONSTANT Params p,
                                    const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::combine<T>(p, plan);
}

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    packed_attention_delta_kernel(const VLMOPS_GRID_CONSTANT Backward b,
                                  const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::sum_delta<T>(b, plan);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    packed_attention_queries_kernel(const VLMOPS_GRID_CONSTANT Backward b,
                                    const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::backward_queries<Tile>(b, plan);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    packed_attention_keys_kernel(const VLMOPS_GRID_CONSTANT Backward b,
                                 const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::backward_keys<Tile>(b, plan);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    packed_attention_float_kernel(const VLMOPS_GRID_CONSTANT Params p,
                                  const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::forward_float<Tile>(p, plan);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    packed_attention_queries_float_kernel(const VLMOPS_GRID_CONSTANT Backward b,
                                          const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::backward_queries_float<Tile>(b, plan);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    packed_attention_keys_float_kernel(const VLMOPS_GRID_CONSTANT Backward b,
                                       const VLMOPS_GRID_CONSTANT Plan plan) {
  attention::backward_keys_float<Tile>(b, plan);
}

}  // namespace vlmops::packed_attention
