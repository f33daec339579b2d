// Launches of the HD transform on NVIDIA GPUs: Params and a stream in, an error's number out. No
// torch.
#include <limits>

#include "ops/hd_transform/hd_transform.cuh"

namespace vlmops::hd_transform {
namespace {

// Whether everything that is read and written takes accesses of v elements of `bytes`.
bool is_wide(const Params& p, int v, int bytes, bool forward) {
  const auto aligned = [&](const void* base) {
    return reinterpret_cast<uintptr_t>(base) % (v * bytes) == 0;
  };
  bool wide = p.channels % v == 0 && aligned(p.src) && aligned(p.dst);
  if (!forward) return wide && p.token_channel_stride == 1 && p.token_stride % v == 0;
  wide = wide && aligned(p.newline) && aligned(p.separator) && p.channel_stride == 1 &&
         p.pixel_stride % v == 0 && p.crop_stride % v == 0;
  for (int i = 0; i < p.image_count; ++i) wide = wide && p.images[i].offset % v == 0;
  return wide;
}

int run(void (*kernel)(Params), const Params& p, int64_t rows, void* stream) {
  // Rows are counted in 32 bits, elements in 64.
  if (rows > std::numeric_limits<uint32_t>::max()) return kInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(divide_up(rows, kWarps))), dim3(kThreads), 0,
                stream, p);
}

template <class T, bool kMean>
int forward_as(const Params& p, void* stream) {
  const bool wide = is_wide(p, kPack<T>, sizeof(T), true);
  return run(wide ? hd_transform_kernel<T, kPack<T>, kMean> : hd_transform_kernel<T, 1, kMean>, p,
             p.tokens * (kMean ? 1 : p.block()), stream);
}

template <class T, bool kMean>
int backward_as(const Params& p, void* stream) {
  const bool wide = is_wide(p, kPack<T>, sizeof(T), false);
  return run(wide ? hd_transform_backward_kernel<T, kPack<T>, kMean>
                  : hd_transform_backward_kernel<T, 1, kMean>,
             p, p.pixels, stream);
}

template <class T>
int sums_as(const Params& p, float* sums, void* stream) {
  return launch(hd_transform_sums_kernel<T>,
                dim3(static_cast<unsigned>(divide_up(p.depth(), kWarpSize)), 2),
                dim3(kWarpSize, kSlices), 0, stream, p, sums);
}

}  // namespace

int forward_cuda(const Params& p, void* stream) {
  if (p.tokens * p.channels == 0) return 0;
  if (!p.mean) {
    return p.dtype == DType::kFloat32 ? forward_as<uint32_t, false>(p, stream)
                                      : forward_as<uint16_t, false>(p, stream);
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return forward_as<float, true>(p, stream);
    case DType::kBFloat16:
      return forward_as<bfloat16, true>(p, stream);
    case DType::kFloat16:
      return forward_as<float16, true>(p, stream);
  }
  return 0;
}

int backward_cuda(const Params& p, void* stream) {
  if (p.pixels * p.channels == 0) return 0;
  if (!p.mean) {
    return p.dtype == DType::kFloat32 ? backward_as<uint32_t, false>(p, stream)
                                      : backward_as<uint16_t, false>(p, stream);
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float, true>(p, stream);
    case DType::kBFloat16:
      return backward_as<bfloat16, true>(p, stream);
    case DType::kFloat16:
      return backward_as<float16, true>(p, stream);
  }
  return 0;
}

int sums_cuda(const Params& p, float* sums, void* stream) {
  if (p.depth() == 0) return 0;
  switch (p.dtype) {
    case DType::kFloat32:
      return sums_as<float>(p, sums, stream);
    case DType::kBFloat16:
      return sums_as<bfloat16>(p, sums, stream);
    case DType::kFloat16:
      return sums_as<float16>(p, sums, stream);
  }
  return 0;
}

}  // namespace vlmops::hd_transform
