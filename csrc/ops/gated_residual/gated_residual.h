// Parameters of the gated residual: all that host, device and emulator code share.
#pragma once

#include "common/strides.h"

namespace vlmops::gated_residual {

// One number, or one for each channel.
struct Gate {
  const void* data;
  DType dtype;
  bool per_channel;
  int64_t stride;
};

// Rows of C channels. Strides in elements.
struct Params {
  const void* x;         // the residual; in backward the gradient of the result
  const void* y;         // what is gated; backward reads it where the gate's gradient is wanted
  const bool* row_mask;  // of each row, whether y is added; null: to all
  void* out;             // the result; in backward y's gradient, or null; contiguous
  DType dtype;           // of x, y and out
  Gate gate;
  RowStrides x_stride, y_stride, mask_stride;
  int64_t rows, inner, channels;
  bool streams;  // what is written is too large for the CPU's caches
};

VLMOPS_HOST_DEVICE static inline bool is_added(const Params& p, int64_t row) {
  return p.row_mask == nullptr || p.row_mask[row_at(p, p.mask_stride, row)];
}

// tanh of the gate [C], or of its one number, as the kernels below read it.
using CpuTanh = void (*)(const Params&, float* tanh);

// Rows [begin, end).
using CpuKernel = void (*)(const Params&, const float* tanh, int64_t begin, int64_t end);

// The same in backward. `sums` [C], or one number, zeros, gets the rows' share of the sums of what
// is added times its gradient; null where nobody needs them.
using CpuBackward = void (*)(const Params&, const float* tanh, int64_t begin, int64_t end,
                             double* sums);

// On a GPU, where all pointers are the device's. They return 0 or an error's number.
using CudaKernel = int (*)(const Params&, void* stream);

// partial [parts, C], or [parts], one number for each block: those sums; or null.
using CudaBackward = int (*)(const Params&, double* partial, void* stream);
using CudaParts = int64_t (*)(const Params&);

// The gate's gradient from partial [parts, columns].
struct GateGrad {
  const double* partial;
  int64_t parts, columns;
  Gate gate;
  void* out;  // contiguous, the gate's dtype
};
using CudaGateGrad = int (*)(const GateGrad&, void* stream);

int forward_cuda(const Params& p, void* stream);
int backward_cuda(const Params& p, double* partial, void* stream);
int64_t parts_cuda(const Params& p);
int gate_grad_cuda(const GateGrad& p, void* stream);

}  // namespace vlmops::gated_residual
