// Launches of the spatial aggregation on NVIDIA GPUs: Params and a stream in, an error's number
// out. No torch.
#include <algorithm>
#include <limits>

#include "ops/spatial_aggregate/spatial_aggregate.cuh"

namespace vlmops::spatial_aggregate {
namespace {

constexpr int64_t kShared = 48 << 10;  // bytes that a block has without asking

template <class T, int kLanes, int kPacks>
int run(const Params& p, bool backward, void* stream) {
  constexpr int kHeads = kWarpSize / kLanes;
  const int64_t bytes = backward ? int64_t{sizeof(float2)} * kHeads * p.keys : 0;  // of a warp
  const int64_t warps = std::min<int64_t>(kMostWarps, kShared / std::max<int64_t>(bytes, 1));
  const int64_t blocks = divide_up(p.cells() * divide_up(p.heads, kHeads), warps);
  if (warps == 0 || blocks > std::numeric_limits<int>::max()) return kInvalidValue;
  return launch(backward ? spatial_aggregate_backward_kernel<T, kLanes, kPacks>
                         : spatial_aggregate_kernel<T, kLanes, kPacks>,
                dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(warps * kWarpSize)),
                static_cast<size_t>(bytes * warps), stream, p);
}

template <class T>
int by_lanes(const Params& p, bool backward, void* stream) {
  const int packs = p.head_dim / kPack<T>;
  if (packs <= 8) return run<T, 8, 1>(p, backward, stream);
  if (packs <= 16) return run<T, 16, 1>(p, backward, stream);
  if (packs <= 32) return run<T, 32, 1>(p, backward, stream);
  if constexpr (sizeof(T) == 4) return run<T, 32, 2>(p, backward, stream);
  return kInvalidValue;
}

int by_dtype(const Params& p, bool backward, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return by_lanes<float>(p, backward, stream);
    case DType::kBFloat16:
      return by_lanes<bfloat16>(p, backward, stream);
    case DType::kFloat16:
      return by_lanes<float16>(p, backward, stream);
  }
  return kInvalidValue;
}

}  // namespace

int forward_cuda(const Params& p, void* stream) { return by_dtype(p, false, stream); }
int backward_cuda(const Params& p, void* stream) { return by_dtype(p, true, stream); }

}  // namespace vlmops::spatial_aggregate
