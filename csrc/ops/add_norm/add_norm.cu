// Launches of the norm behind a sum on NVIDIA GPUs: Params and a stream in, an error's number out.
// No torch.
#include <limits>

#include "ops/add_norm/add_norm.cuh"

namespace vlmops::add_norm {
namespace {

// Whether a pack of what kernels read and write, vectors aside, lies on 16 bytes.
template <class T>
bool is_wide(const Params& p) {
  bool wide = p.channels % kPack<T> == 0 && aligned(p.out) && aligned(p.sum);
  const auto check = [&](const void* data, const RowStrides& s) {
    wide = wide && aligned(data) && s.outer % kPack<T> == 0 && s.row % kPack<T> == 0;
  };
  check(p.x, p.x_stride);
  if (p.residual != nullptr) check(p.residual, p.residual_stride);
  if (p.grad != nullptr) check(p.grad, p.grad_stride);
  return wide;
}

template <class... Taken, class... Given>
int launch_1d(void (*kernel)(Taken...), int64_t blocks, dim3 block, void* stream,
              const Given&... given) {
  if (blocks > std::numeric_limits<int>::max()) return kInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), block, 0, stream, given...);
}

// The kernel packed(a null pointer to the type of weight and bias) where blocks hold rows in packs,
// else `any`.
template <class T, class Packed, class... Given>
int run(const Params& p, const Packed& packed, void (*any)(Params, Given...), void* stream,
        Given... given) {
  // Rows are counted in 32 bits, elements in 64.
  if (p.rows > std::numeric_limits<int>::max()) return kInvalidValue;
  const auto element_by_element = [&] {
    return launch_1d(any, p.rows, dim3(kAnyThreads), stream, p, given...);
  };
  const NormVector& x_bias = p.vectors[kXBias];
  const bool fits = x_bias.data == nullptr || (x_bias.dtype == p.dtype && aligned(x_bias.data));
  const int threads = is_wide<T>(p) && fits ? norm_threads<T>(p.channels / kPack<T>) : 0;
  if (threads == 0) return element_by_element();
  const int rows = threads == kWarpSize ? kShortRows : 1;
  return with_vectors<T>(
      p.dtype, p.vectors[kWeight], p.vectors[kBias],
      [&](auto* type) {
        return launch_1d(packed(type), divide_up(p.rows, rows), dim3(threads, rows), stream, p,
                         given...);
      },
      element_by_element);
}

}  // namespace

int forward_cuda(const Params& p, void* stream) {
  return by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto packed = [](auto* w) {
      return &add_norm_kernel<T, std::remove_pointer_t<decltype(w)>>;
    };
    return run<T>(p, packed, add_norm_any_kernel<T>, stream);
  });
}

int backward_cuda(const Params& given, const VectorGrads& grads, void* stream) {
  Params p = given;
  p.vectors[kBias] = p.vectors[kXBias] = NormVector{};  // not read
  return by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto packed = [](auto* w) {
      return &add_norm_backward_kernel<T, std::remove_pointer_t<decltype(w)>>;
    };
    int status = run<T>(p, packed, add_norm_backward_any_kernel<T>, stream, grads.scales);
    if (status != 0 || grads.parts == 0) return status;
    const auto sum = [&](auto kernel, int64_t pack) {
      const int64_t blocks = grads.parts * divide_up(p.channels, kWarpSize * pack);
      return launch_1d(kernel, blocks, dim3(kSumThreads), stream, p, grads);
    };
    status = is_wide<T>(p) ? sum(add_norm_sums_kernel<T, kPack<T>>, kPack<T>)
                           : sum(add_norm_sums_kernel<T, 1>, 1);
    if (status != 0) return status;
    const auto columns = static_cast<unsigned>(divide_up(p.channels, kWarpSize));
    return launch(add_norm_vectors_kernel, dim3(columns, kVectors), dim3(kWarpSize, kSlices), 0,
                  stream, grads, p.channels);
  });
}

}  // namespace vlmops::add_norm
