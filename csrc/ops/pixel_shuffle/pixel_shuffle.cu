// Launches of pixel shuffle on NVIDIA GPUs: Params and a stream in, an error's number out. No
// torch.
#include <algorithm>
#include <limits>

#include "ops/pixel_shuffle/pixel_shuffle.cuh"

namespace vlmops::pixel_shuffle {
namespace {

int64_t bytes_of(const Params& p) { return p.dtype == DType::kFloat32 ? 4 : 2; }

bool on(int64_t bytes, const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether every pixel begins on so many bytes.
bool pixels_on(int64_t bytes, const Params& p, const void* base, Pixels Group::* of) {
  const int64_t size = bytes_of(p);
  bool good = on(bytes, base);
  for (int i = 0; i < p.group_count; ++i) {
    const Pixels& at = p.groups[i].*of;
    const int64_t strides[] = {at.offset, at.image, at.block_row, at.block_column, at.y, at.x};
    for (const int64_t stride : strides) good = good && stride * size % bytes == 0;
  }
  return good;
}

bool merged_on(int64_t bytes, const Params& p, const void* base, int64_t token,
               int64_t Group::* offset, int64_t Group::* image) {
  const int64_t size = bytes_of(p);
  bool good = on(bytes, base) && token * size % bytes == 0;
  for (int i = 0; i < p.group_count; ++i) {
    good =
        good && p.groups[i].*offset * size % bytes == 0 && p.groups[i].*image * size % bytes == 0;
  }
  return good;
}

// Whether offsets within a block of pixels fit 32 bits.
bool blocks_are_near(const Params& p, Pixels Group::* of) {
  bool good = true;
  for (int i = 0; i < p.group_count; ++i) {
    const Pixels& at = p.groups[i].*of;
    good = good && p.factor * (at.y + at.x) + p.channels < int64_t{1} << 31;
  }
  return good;
}

// Whether packs of 16 bytes fit all that is read and written; in order "cyx" 4 bytes of each pixel
// make one up.
bool packs(const Params& p) {
  const bool quads = p.order == Order::kCyx && !p.mean;
  if (quads && p.factor != 2) return false;
  const int64_t piece = quads ? 4 : 16;
  if (p.channels * bytes_of(p) % piece != 0) return false;
  if (p.pixels != nullptr && !blocks_are_near(p, &Group::from)) return false;
  if (p.pixels_out != nullptr && !blocks_are_near(p, &Group::to)) return false;
  if (p.pixels != nullptr && !(p.pixel_stride == 1 && pixels_on(piece, p, p.pixels, &Group::from)))
    return false;
  if (p.pixels_out != nullptr && !pixels_on(piece, p, p.pixels_out, &Group::to)) return false;
  if (p.merged != nullptr && !(p.merged_stride == 1 && merged_on(16, p, p.merged, p.token_stride,
                                                                 &Group::merged, &Group::image)))
    return false;
  return p.merged_out == nullptr ||
         merged_on(16, p, p.merged_out, p.token_stride_out, &Group::merged_out, &Group::image_out);
}

// Kernels count tokens, and the elements of one, in 32 bits; elements of all in 64.
bool fits_int(const Params& p) {
  const int64_t most = int64_t{1} << 31;
  return p.tokens * p.block() < most && p.block() * p.channels < most / 2;
}

template <class Kernel>
int launch_move(Kernel kernel, const Params& p, int64_t units, void* stream) {
  const int64_t warps = p.tokens * divide_up(units, kAhead * kWarpSize);
  const int64_t blocks = divide_up(warps, kMoveThreads / kWarpSize);
  if (blocks >= int64_t{1} << 31) return kInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMoveThreads), 0, stream, p);
}

template <class T, bool kInverse>
int move(const Params& p, void* stream) {
  const int64_t elements = p.block() * p.channels;
  if (!packs(p)) return launch_move(pixel_shuffle_any_kernel<T, kInverse>, p, elements, stream);
  if (p.order == Order::kYxc)
    return launch_move(pixel_shuffle_kernel<T, kInverse>, p, elements / kPack<T>, stream);
  return launch_move(pixel_shuffle_cyx_kernel<T, kInverse>, p, elements / kPack<T>, stream);
}

// Of the dtype's bits: moves need no more.
template <bool kInverse>
int move_bits(const Params& p, void* stream) {
  return p.dtype == DType::kFloat32 ? move<float, kInverse>(p, stream)
                                    : move<bfloat16, kInverse>(p, stream);
}

template <class F>
int by_dtype(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<bfloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<float16*>(nullptr));
  }
  return 0;
}

// Calls f(layout, type of weight and bias, packs, threads) for the kernel of packs that p asks for,
// or any() where there is none. A row of "cyx" is a whole token, whose pixels are normed each for
// itself. Averages, whose packs are many loads, get a thread for each pack.
template <class T, class F, class Any>
int by_layout(const Params& p, const F& f, const Any& any) {
  const int64_t units = p.normed() / kPack<T>;
  const auto call = [&](auto layout, int64_t n) {
    int threads = packs(p) ? norm_threads<T>(n) : 0;
    if (threads == 0) return any();
    if (p.mean)
      threads =
          static_cast<int>(std::min<int64_t>(divide_up(n, kWarpSize) * kWarpSize, kNormThreads));
    return with_vectors<T>(
        p.dtype, p.weight, p.bias,
        [&](auto* type) { return f(layout, type, n, static_cast<unsigned>(threads)); }, any);
  };
  if (p.mean) return call(std::integral_constant<Layout, Layout::kMean>(), units);
  if (p.order == Order::kYxc) return call(std::integral_constant<Layout, Layout::kYxc>(), units);
  if (p.norm_channels)
    return call(std::integral_constant<Layout, Layout::kCyx>(), 4 * p.channels / kPack<T>);
  return any();
}

template <class T>
Plan plan_of(const Params& p, Layout layout, int64_t units) {
  const int64_t rows = layout == Layout::kYxc ? normed_rows(p) : p.tokens;
  const int64_t sets = layout == Layout::kCyx ? 4 : 1;  // rows that are normed in one of packs
  return {static_cast<int>(units), rows, static_cast<int>(part_rows_of(p) / sets),
          Divider::of(std::max<int64_t>(p.channels / kPack<T>, 1)), Divider::of(p.factor)};
}

template <class T>
int norm(const Params& p, void* stream) {
  return by_layout<T>(
      p,
      [&](auto layout, auto* type, int64_t units, unsigned threads) {
        using TW = std::remove_pointer_t<decltype(type)>;
        const Plan plan = plan_of<T>(p, layout, units);
        return launch(pixel_shuffle_norm_kernel<T, TW, decltype(layout)::value>,
                      dim3(static_cast<unsigned>(plan.rows)), dim3(threads), 0, stream, p, plan);
      },
      [&] {
        if (p.norm == Norm::kNone)
          return launch_move(pixel_shuffle_mean_any_kernel<T, false>, p, p.channels, stream);
        return launch(pixel_shuffle_norm_any_kernel<T>, dim3(static_cast<unsigned>(normed_rows(p))),
                      dim3(kAnyThreads), 0, stream, p);
      });
}

template <class T>
int norm_backward(const Params& p, float* scales, float* partial, void* stream) {
  const int64_t parts = parts_of(p);
  return by_layout<T>(
      p,
      [&](auto of, auto* type, int64_t units, unsigned threads) {
        using TW = std::remove_pointer_t<decltype(type)>;
        constexpr Layout layout = decltype(of)::value;
        const Plan plan = plan_of<T>(p, layout, units);
        const int status = launch(pixel_shuffle_norm_backward_kernel<T, TW, layout>,
                                  dim3(static_cast<unsigned>(plan.rows)), dim3(threads), 0, stream,
                                  p, plan, scales);
        const int64_t blocks = parts * divide_up(units, kWarpSize);
        if (status != 0 || partial == nullptr) return status;
        if (blocks >= int64_t{1} << 31) return kInvalidValue;
        return launch(pixel_shuffle_norm_sums_kernel<T, layout>,
                      dim3(static_cast<unsigned>(blocks)), dim3(kSumThreads), 0, stream, p, plan,
                      static_cast<const float*>(scales), partial);
      },
      [&] {
        return launch(pixel_shuffle_norm_backward_any_kernel<T>, dim3(static_cast<unsigned>(parts)),
                      dim3(kAnyThreads), 0, stream, p, normed_rows(p), partial);
      });
}

}  // namespace

int run_cuda(const Params& p, void* stream) {
  if (!fits_int(p)) return kInvalidValue;
  if (p.norm == Norm::kNone && !p.mean) return move_bits<false>(p, stream);
  return by_dtype(
      p, [&](auto* type) { return norm<std::remove_pointer_t<decltype(type)>>(p, stream); });
}

int run_inverse_cuda(const Params& p, void* stream) {
  if (!fits_int(p)) return kInvalidValue;
  if (!p.mean) return move_bits<true>(p, stream);
  return by_dtype(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_move(pixel_shuffle_mean_any_kernel<T, true>, p, p.channels, stream);
  });
}

int run_norm_backward_cuda(const Params& p, float* scales, float* partial, void* stream) {
  if (!fits_int(p)) return kInvalidValue;
  if (p.tokens == 0) return 0;
  return by_dtype(p, [&](auto* type) {
    return norm_backward<std::remove_pointer_t<decltype(type)>>(p, scales, partial, stream);
  });
}

int run_weight_grad_cuda(const float* partial, int64_t parts, int64_t normed, float* weight_grad,
                         float* bias_grad, void* stream) {
  if (normed == 0) return 0;
  const auto columns = static_cast<unsigned>(divide_up(normed, kWarpSize));
  return launch(pixel_shuffle_weight_grad_kernel, dim3(columns, 2), dim3(kWarpSize, kSlices), 0,
                stream, partial, parts, normed, weight_grad, bias_grad);
}

}  // namespace vlmops::pixel_shuffle
