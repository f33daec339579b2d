// Launches of patch embedding on NVIDIA GPUs: Params and a stream in, an error's number out. No
// torch.
#include <algorithm>
#include <limits>

#include "ops/patch_embed/patch_embed.cuh"

namespace vlmops::patch_embed {
namespace {

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether 32 bits hold how far the pixels of 256 patches are apart, and shared memory their
// columns.
bool offsets_fit(const Params& p, int unit) {
  const auto bytes = static_cast<int64_t>(size_of(p.dtype));
  const int64_t images = std::min(p.images, 256 / std::max<int64_t>(p.patches(), 1) + 2);
  int64_t apart = (images - 1) * p.image_stride;
  for (int i = 0; i < 3; ++i) apart += std::max<int64_t>(p.grid[i] - 1, 0) * p.grid_stride[i];
  for (int i = 0; i < 4; ++i) apart += std::max<int64_t>(p.size[i] - 1, 0) * p.size_stride[i];
  return apart * bytes <= std::numeric_limits<int>::max() && p.depth * bytes / unit <= kMaxColumns;
}

// The most bytes, 16 at most, that one copy of pixels may move; 0 where they take arithmetic.
int pixel_unit(const Params& p) {
  const bool same = (p.pixel == Pixel::kFloat32 && p.dtype == DType::kFloat32) ||
                    (p.pixel == Pixel::kBFloat16 && p.dtype == DType::kBFloat16) ||
                    (p.pixel == Pixel::kFloat16 && p.dtype == DType::kFloat16);
  if (!same || p.map != nullptr || (p.size[3] > 1 && p.size_stride[3] != 1)) return 0;
  const auto bytes = static_cast<int64_t>(size_of(p.dtype));
  for (int unit = 16; unit >= 4; unit /= 2) {
    bool fits = aligned(p.pixels, unit) && p.size[3] * bytes % unit == 0;
    const auto step = [&](int64_t count, int64_t stride) {
      fits = fits && (count <= 1 || stride * bytes % unit == 0);
    };
    step(p.images, p.image_stride);
    for (int i = 0; i < 3; ++i) step(p.grid[i], p.grid_stride[i]);
    for (int i = 0; i < 3; ++i) step(p.size[i], p.size_stride[i]);
    if (fits) return offsets_fit(p, unit) ? unit : 0;
  }
  return 0;
}

int weight_unit(const Params& p) {
  const auto bytes = static_cast<int64_t>(size_of(p.dtype));
  for (int unit = 16; unit >= 4; unit /= 2)
    if (aligned(p.weight, unit) && p.depth * bytes % unit == 0) return unit;
  return static_cast<int>(bytes);
}

bool wide(const Params& p, const void* row, DType dtype, int64_t stride = 0) {
  return p.channels % kChannels == 0 && aligned(row, 16) && stride * size_of(dtype) % 16 == 0;
}

Plan plan_of(const Params& p) {
  Plan plan{};
  plan.pixel_unit = pixel_unit(p);
  plan.weight_unit = weight_unit(p);
  plan.wide_out = wide(p, p.out, p.out_dtype);
  plan.wide_bias = wide(p, p.bias, p.dtype);
  plan.wide_prefix = wide(p, p.prefix.data, p.prefix.dtype);
  plan.wide_norm_weight = wide(p, p.norm_weight.data, p.norm_weight.dtype);
  plan.wide_norm_bias = wide(p, p.norm_bias.data, p.norm_bias.dtype);
  for (int i = 0; i < p.position_count; ++i) {
    const Position& q = p.positions[i];
    plan.wide_table[i] = wide(p, q.table, q.dtype, q.row_stride);
  }
  const Position& q = p.positions[0];
  const bool dense = p.position_count == 0 || (p.position_count == 1 && q.index == nullptr &&
                                               q.weight == nullptr && plan.wide_table[0]);
  plan.simple =
      plan.wide_out && (p.bias == nullptr || plan.wide_bias) && (p.norm != Norm::kNone || dense);
  return plan;
}

// Cards with 100 KiB of shared memory take two tiles of 32 KiB, the others three.
int stages_of() {
  const int arch = architecture();
  return arch == 80 || arch == 90 || arch == 100 || arch == 103 ? 3 : 2;
}

template <class Tile>
size_t columns_bytes(const Params& p, const Plan& plan) {
  if (plan.pixel_unit == 0) return 0;
  const int64_t units = Tile::kRowBytes / plan.pixel_unit;
  return divide_up(p.depth, Tile::kDepth) * units * sizeof(int);
}

template <class Tile, class Kernel>
int launch_product(Kernel kernel, const Params& p, Plan plan, int stages, void* stream) {
  const int64_t row_tiles = divide_up(p.images * p.patches(), Tile::kRows);
  plan.column_tiles = static_cast<int>(divide_up(p.channels, Tile::kColumns));
  plan.tiles = row_tiles * plan.column_tiles;
  plan.stages = stages;
  const int64_t prefix = divide_up(p.images * p.prefix_tokens, Tile::kThreads / kWarpSize);
  plan.columns = std::max<int>(stages * kStageBytes<Tile>, Tile::kSlabs * sizeof(float));
  const size_t bytes = plan.columns + columns_bytes<Tile>(p, plan);
  const int status = allow_dynamic_shared(kernel, bytes);
  if (status != 0) return status;
  return launch(kernel, dim3(static_cast<unsigned>(plan.tiles + prefix)), dim3(Tile::kThreads),
                bytes, stream, p, plan);
}

template <class Tile>
int run_mma(const Params& p, const Plan& plan, void* stream) {
  const auto kernel = plan.pixel_unit == 0 ? patch_embed_mma_kernel<Tile, true>
                                           : patch_embed_mma_kernel<Tile, false>;
  return launch_product<Tile>(kernel, p, plan, stages_of(), stream);
}

template <class Tile>
int run_fma(const Params& p, const Plan& plan, void* stream) {
  const auto kernel = plan.pixel_unit == 0 ? patch_embed_fma_kernel<Tile, true>
                                           : patch_embed_fma_kernel<Tile, false>;
  return launch_product<Tile>(kernel, p, plan, 3, stream);
}

// Whether tiles of 128 x 128 keep every multiprocessor busy.
bool is_large(const Params& p) {
  return divide_up(p.images * p.patches(), 128) * divide_up(p.channels, 128) >= multiprocessors();
}

template <class T>
int run_16_bit(const Params& p, const Plan& plan, void* stream) {
  return is_large(p) ? run_mma<MmaTile<T, 128, 128, 64, 64, 2>>(p, plan, stream)
                     : run_mma<MmaTile<T, 64, 64, 32, 32, 3>>(p, plan, stream);
}

int run_product(const Params& p, const Plan& plan, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return is_large(p) ? run_fma<FmaTile<128, 128, 1>>(p, plan, stream)
                         : run_fma<FmaTile<64, 64, 4>>(p, plan, stream);
    case DType::kBFloat16:
      return run_16_bit<__nv_bfloat16>(p, plan, stream);
    case DType::kFloat16:
      return run_16_bit<__half>(p, plan, stream);
  }
  return 0;
}

// Rows of a product, or of the output where there is none, into tokens.
int run_finish(const Params& p, const Plan& plan, int64_t begin, int64_t end, const Rows& rows,
               bool own, int64_t prefixes, void* stream) {
  const int64_t warps = end - begin + prefixes;
  if (warps == 0) return 0;
  const auto blocks = static_cast<unsigned>(divide_up(warps, kRowThreads / kWarpSize));
  return launch(patch_embed_finish_kernel, dim3(blocks), dim3(kRowThreads), 0, stream, p, plan,
                begin, end, rows, own, prefixes);
}

template <class Word>
int copy_as(const Params& p, int64_t begin, int64_t end, void* panel, int64_t pitch, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(end - begin, kPackRows)));
  return launch(patch_embed_copy_kernel<Word>, grid, dim3(kRowThreads), 0, stream, p, begin, end,
                static_cast<Word*>(panel), pitch);
}

template <class T>
int pack_as(const Params& p, int64_t begin, int64_t end, void* panel, int64_t pitch, DType dtype,
            void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(end - begin, kPackRows)));
  switch (dtype) {
    case DType::kFloat32:
      return launch(patch_embed_pack_kernel<T, float>, grid, dim3(kRowThreads), 0, stream, p, begin,
                    end, static_cast<float*>(panel), pitch);
    case DType::kBFloat16:
      return launch(patch_embed_pack_kernel<T, bfloat16>, grid, dim3(kRowThreads), 0, stream, p,
                    begin, end, static_cast<bfloat16*>(panel), pitch);
    case DType::kFloat16:
      return launch(patch_embed_pack_kernel<T, float16>, grid, dim3(kRowThreads), 0, stream, p,
                    begin, end, static_cast<float16*>(panel), pitch);
  }
  return 0;
}

}  // namespace

int run_cuda(const Params& p, void* stream) {
  if (p.images * p.tokens() * p.channels == 0) return 0;
  const Plan plan = plan_of(p);
  const int status = run_product(p, plan, stream);
  if (status != 0 || p.norm == Norm::kNone) return status;
  return run_finish(p, plan, 0, p.images * p.patches(), {p.out, p.out_dtype, plan.wide_out}, true,
                    0, stream);
}

int pack_cuda(const Params& p, int64_t begin, int64_t end, void* panel, int64_t pitch, DType dtype,
              void* stream) {
  if (begin >= end || pitch == 0) return 0;
  const int unit = dtype == p.dtype ? pixel_unit(p) : 0;
  if (unit != 0 && aligned(panel, unit) && pitch * size_of(dtype) % unit == 0) {
    if (unit == 16) return copy_as<uint4>(p, begin, end, panel, pitch, stream);
    if (unit == 8) return copy_as<uint2>(p, begin, end, panel, pitch, stream);
    return copy_as<uint32_t>(p, begin, end, panel, pitch, stream);
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return pack_as<float>(p, begin, end, panel, pitch, dtype, stream);
    case DType::kBFloat16:
      return pack_as<bfloat16>(p, begin, end, panel, pitch, dtype, stream);
    case DType::kFloat16:
      return pack_as<float16>(p, begin, end, panel, pitch, dtype, stream);
  }
  return 0;
}

int finish_cuda(const Params& p, int64_t begin, int64_t end, const void* product, DType dtype,
                void* stream) {
  if (p.images * p.tokens() * p.channels == 0) return 0;
  const Rows rows{product, dtype, wide(p, product, dtype)};
  const int64_t prefixes = begin == 0 ? p.images * p.prefix_tokens : 0;
  return run_finish(p, plan_of(p), begin, end, rows, false, prefixes, stream);
}

}  // namespace vlmops::patch_embed
