// Launches of the gated residual on NVIDIA GPUs: Params and a stream in, an error's number out. No
// torch.
#include <algorithm>
#include <limits>

#include "ops/gated_residual/gated_residual.cuh"

namespace vlmops::gated_residual {
namespace {

constexpr int64_t kBlocksPerMultiprocessor = 4;

// Whether a pack of what kernels read and write lies on 16 bytes.
template <class T>
bool is_wide(const Params& p) {
  bool wide = p.channels % kPack<T> == 0;
  const auto check = [&](const void* base, const RowStrides& s) {
    wide = wide && reinterpret_cast<uintptr_t>(base) % 16 == 0 && s.channel == 1 &&
           s.outer % kPack<T> == 0 && s.row % kPack<T> == 0;
  };
  check(p.x, p.x_stride);
  if (p.y != nullptr) check(p.y, p.y_stride);
  return wide && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

// Of blocks of channels times `blocks` of rows.
template <class T, class... Given>
int run(void (*wide)(Params, Given...), void (*any)(Params, Given...), const Params& p,
        int64_t blocks, void* stream, Given... given) {
  blocks *= divide_up(p.channels, kTile<T>);
  // Rows are counted in 32 bits, elements in 64.
  if (p.rows > std::numeric_limits<uint32_t>::max() || blocks > std::numeric_limits<int>::max())
    return kInvalidValue;
  return launch(is_wide<T>(p) ? wide : any, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                stream, p, given...);
}

int64_t row_parts(const Params& p) { return divide_up(p.rows, gpu_part_rows(p.rows, p.channels)); }

}  // namespace

int forward_cuda(const Params& p, void* stream) {
  return by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t most = kBlocksPerMultiprocessor * multiprocessors();
    const int64_t fill = std::max<int64_t>(1, most / divide_up(p.channels, kTile<T>));
    const int64_t blocks = std::min(divide_up(p.rows, kWarps), fill);
    return run<T, int64_t>(gated_residual_kernel<T, true>, gated_residual_kernel<T, false>, p,
                           blocks, stream, blocks);
  });
}

int64_t parts_cuda(const Params& p) {
  if (p.gate.per_channel) return row_parts(p);
  return by_dtype(p.dtype, [&](auto* type) {
    return row_parts(p) * divide_up(p.channels, kTile<std::remove_pointer_t<decltype(type)>>);
  });
}

int backward_cuda(const Params& p, double* partial, void* stream) {
  return by_dtype(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return run<T, double*>(gated_residual_backward_kernel<T, true>,
                           gated_residual_backward_kernel<T, false>, p, row_parts(p), stream,
                           partial);
  });
}

int gate_grad_cuda(const GateGrad& p, void* stream) {
  const auto blocks = static_cast<unsigned>(divide_up(p.columns, kWarpSize));
  return launch(gated_residual_gate_grad_kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace vlmops::gated_residual
