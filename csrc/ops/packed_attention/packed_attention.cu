// Launches of packed attention on NVIDIA GPUs: Params and a stream in, an error's number out. No
// torch.
#include <algorithm>
#include <cmath>

#include "ops/packed_attention/packed_attention.cuh"

namespace vlmops::packed_attention {
namespace {

using attention::BackwardTile;
using attention::FmaTile;
using attention::ForwardTile;
using attention::Heads;
using attention::Starts;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether all rows begin on 16 bytes.
bool wide(const Heads& of, DType dtype) {
  const auto bytes = static_cast<int64_t>(size_of(dtype));
  return aligned(of.data) && of.batch * bytes % 16 == 0 && of.row * bytes % 16 == 0 &&
         of.head * bytes % 16 == 0;
}

// Blocks whose tiles of `size` rows cover every segment, wherever segments begin.
int64_t tiles_of(const Params& p, const Starts& starts, int64_t rows, int group, int size) {
  if (starts.data == nullptr) return p.segments * divide_up(starts.length * group, size);
  return rows * group / size + p.segments;
}

int64_t key_tiles(const Params& p, int size) { return tiles_of(p, p.k_starts, p.keys, 1, size); }

int64_t row_tiles(const Params& p, int size) {
  return tiles_of(p, p.q_starts, p.rows, p.group(), size);
}

dim3 grid_of(const Params& p, int64_t tiles) {
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.kv_heads));
}

// Which segments may have few rows for their keys, as far as is known without looking at starts.
enum class Few { kNone, kSome, kAll };

Few few_of(const Params& p) {
  if (p.dtype == DType::kFloat32) return Few::kNone;
  if (p.q_starts.data == nullptr && p.k_starts.data == nullptr) {
    if (!attention::is_few(p.q_starts.length * p.group(), p.k_starts.length)) return Few::kNone;
    return p.k_starts.lengths == nullptr ? Few::kAll : Few::kSome;
  }
  const bool same = p.q_starts.data == p.k_starts.data;  // as many queries as keys
  return same || p.keys <= attention::kChunk ? Few::kNone : Few::kSome;
}

Plan plan_of(const Params& p) {
  Plan plan{};
  plan.wide_q = wide(p.q, p.dtype);
  plan.wide_k = wide(p.k, p.dtype);
  plan.wide_v = wide(p.v, p.dtype);
  plan.wide_out = aligned(p.out);
  const double steep = (static_cast<double>(p.scale) + p.scale_rest) * attention::kLog2E;
  plan.steep = static_cast<float>(steep);
  plan.steep_rest = static_cast<float>(steep - plan.steep);
  // Times the logit of a key that is not seen, 0 would be NaN.
  plan.steepness = std::max(std::fabs(plan.steep), 1e-30f);
  plan.flip = p.scale < 0.0f ? 0x80008000u : 0u;
  return plan;
}

void plan_parts(const Params& p, Plan& plan, void* scratch) {
  const int64_t bound = p.longest == 0 ? p.rows : p.longest;
  plan.slots = static_cast<int>(std::min<int64_t>(bound * p.group(), attention::kFewRows));
  const int64_t rows = key_tiles(p, attention::kChunk) * p.kv_heads * plan.slots;
  plan.stats = static_cast<float2*>(scratch);
  plan.parts = reinterpret_cast<float*>(plan.stats + rows);
}

template <class Kernel, class Parameters>
int run(Kernel kernel, const Params& p, int64_t tiles, int threads, size_t shared,
        const Parameters& parameters, const Plan& plan, void* stream) {
  const int status = allow_dynamic_shared(kernel, shared);
  if (status != 0) return status;
  return launch(kernel, grid_of(p, tiles), dim3(threads), shared, stream, parameters, plan);
}

template <class Tile>
int run_forward(const Params& p, const Plan& plan, void* stream) {
  const int64_t tiles = plan.few ? key_tiles(p, attention::kChunk) : row_tiles(p, Tile::kRows);
  return run(packed_attention_kernel<Tile>, p, tiles, Tile::kThreads,
             Tile::kElements * sizeof(typename Tile::T), p, plan, stream);
}

// Whether tiles of 128 rows fill themselves and all multiprocessors.
bool is_large(const Params& p) {
  const int64_t rows =
      (p.longest == 0 ? p.rows / std::max<int64_t>(p.segments, 1) : p.longest) * p.group();
  return rows > 64 && row_tiles(p, 128) * p.kv_heads >= 2 * multiprocessors();
}

// Large and small tiles have as many keys: what comes of a row is the same.
template <class Large, class Small>
int run_rows(const Params& p, const Plan& plan, void* stream) {
  static_assert(Large::kKeys == Small::kKeys);
  return !plan.few && is_large(p) ? run_forward<Large>(p, plan, stream)
                                  : run_forward<Small>(p, plan, stream);
}

template <class T>
int run_16_bit(const Params& p, const Plan& plan, void* stream) {
  if (p.dim <= 64)
    return run_rows<ForwardTile<T, 64, 2, 64, false>, ForwardTile<T, 64, 1, 64, true>>(p, plan,
                                                                                       stream);
  if (p.dim <= 80)
    return run_rows<ForwardTile<T, 80, 2, 64, false>, ForwardTile<T, 80, 1, 64, true>>(p, plan,
                                                                                       stream);
  if (p.dim <= 96)
    return run_rows<ForwardTile<T, 96, 2, 32, false>, ForwardTile<T, 96, 1, 32, true>>(p, plan,
                                                                                       stream);
  if (p.dim <= 128)
    return run_rows<ForwardTile<T, 128, 2, 32, false>, ForwardTile<T, 128, 1, 32, true>>(p, plan,
                                                                                         stream);
  return run_forward<ForwardTile<T, 256, 1, 32, false>>(p, plan, stream);
}

template <class T>
int run_both(const Params& p, Plan& plan, void* scratch, void* stream) {
  const Few few = few_of(p);
  if (few != Few::kAll) {
    const int status = run_16_bit<T>(p, plan, stream);
    if (status != 0) return status;
  }
  if (few == Few::kNone) return 0;
  plan.few = true;
  plan_parts(p, plan, scratch);
  const int status = run_16_bit<T>(p, plan, stream);
  if (status != 0) return status;
  return launch(packed_attention_combine_kernel<T>, grid_of(p, key_tiles(p, attention::kChunk)),
                dim3(kCombineThreads), 0, stream, p, plan);
}

template <class Tile>
int run_forward_float(const Params& p, const Plan& plan, void* stream) {
  return run(packed_attention_float_kernel<Tile>, p, row_tiles(p, Tile::kTile), Tile::kThreads,
             (3 * Tile::kFloats + Tile::kWeights) * sizeof(float), p, plan, stream);
}

template <class Tile>
int run_backward(const Backward& b, const Plan& plan, void* stream) {
  const Params& p = b.p;
  const size_t elements = Tile::kElements * sizeof(typename Tile::T);
  if (b.dq != nullptr) {
    const int status = run(packed_attention_queries_kernel<Tile>, p, row_tiles(p, Tile::kOwn),
                           Tile::kThreads, elements, b, plan, stream);
    if (status != 0) return status;
  }
  if (b.dk == nullptr && b.dv == nullptr) return 0;
  return run(packed_attention_keys_kernel<Tile>, p, key_tiles(p, Tile::kOwn), Tile::kThreads,
             elements + 2 * Tile::kStatistics * sizeof(float), b, plan, stream);
}

template <class Tile>
int run_backward_float(const Backward& b, const Plan& plan, void* stream) {
  const Params& p = b.p;
  const size_t tiles = 4 * Tile::kFloats;
  if (b.dq != nullptr) {
    const int status =
        run(packed_attention_queries_float_kernel<Tile>, p, row_tiles(p, Tile::kTile),
            Tile::kThreads, (tiles + Tile::kWeights) * sizeof(float), b, plan, stream);
    if (status != 0) return status;
  }
  if (b.dk == nullptr && b.dv == nullptr) return 0;
  return run(packed_attention_keys_float_kernel<Tile>, p, key_tiles(p, Tile::kTile), Tile::kThreads,
             (tiles + 2 * Tile::kWeights) * sizeof(float), b, plan, stream);
}

template <class T>
int run_delta(const Backward& b, const Plan& plan, void* stream) {
  const int64_t blocks = divide_up(b.p.rows * b.p.heads, kDeltaThreads / 8);
  return launch(packed_attention_delta_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kDeltaThreads), 0, stream, b, plan);
}

template <class T>
int run_backward_16_bit(const Backward& b, const Plan& plan, void* stream) {
  const int dim = b.p.dim;
  if (dim <= 64) return run_backward<BackwardTile<T, 64, 4, 1, 64>>(b, plan, stream);
  if (dim <= 80) return run_backward<BackwardTile<T, 80, 4, 1, 64>>(b, plan, stream);
  if (dim <= 96) return run_backward<BackwardTile<T, 96, 4, 1, 64>>(b, plan, stream);
  if (dim <= 128) return run_backward<BackwardTile<T, 128, 4, 1, 32>>(b, plan, stream);
  return run_backward<BackwardTile<T, 256, 2, 2, 16>>(b, plan, stream);
}

}  // namespace

int64_t forward_scratch_cuda(const Params& p) {
  if (p.rows == 0 || p.heads == 0 || few_of(p) == Few::kNone) return 0;
  Plan plan{};
  plan_parts(p, plan, nullptr);
  const int64_t rows = key_tiles(p, attention::kChunk) * p.kv_heads * plan.slots;
  return rows * static_cast<int64_t>(sizeof(float2) + p.dim * sizeof(float));
}

int forward_cuda(const Params& p, void* scratch, void* stream) {
  if (p.rows == 0 || p.heads == 0) return 0;
  Plan plan = plan_of(p);
  switch (p.dtype) {
    case DType::kFloat32:
      if (p.dim <= 64) return run_forward_float<FmaTile<64>>(p, plan, stream);
      if (p.dim <= 128) return run_forward_float<FmaTile<128>>(p, plan, stream);
      return run_forward_float<FmaTile<256>>(p, plan, stream);
    case DType::kBFloat16:
      return run_both<__nv_bfloat16>(p, plan, scratch, stream);
    case DType::kFloat16:
      return run_both<__half>(p, plan, scratch, stream);
  }
  return 0;
}

int64_t backward_scratch_cuda(const Backward&) { return 0; }

int backward_cuda(const Backward& b, void*, void* stream) {
  const Params& p = b.p;
  if (p.rows == 0 && p.keys == 0) return 0;
  if (p.heads == 0) return 0;
  Plan plan = plan_of(p);
  plan.wide_grad = wide(b.grad, p.dtype);
  const auto sums = [&](auto type) {
    return p.rows == 0 ? 0 : run_delta<decltype(type)>(b, plan, stream);
  };
  int status = 0;
  switch (p.dtype) {
    case DType::kFloat32:
      status = sums(float());
      if (status != 0) return status;
      if (p.dim <= 64) return run_backward_float<FmaTile<64>>(b, plan, stream);
      if (p.dim <= 128) return run_backward_float<FmaTile<128>>(b, plan, stream);
      return run_backward_float<FmaTile<256>>(b, plan, stream);
    case DType::kBFloat16:
      status = sums(__nv_bfloat16());
      return status != 0 ? status : run_backward_16_bit<__nv_bfloat16>(b, plan, stream);
    case DType::kFloat16:
      status = sums(__half());
      return status != 0 ? status : run_backward_16_bit<__half>(b, plan, stream);
  }
  return status;
}

}  // namespace vlmops::packed_attention
