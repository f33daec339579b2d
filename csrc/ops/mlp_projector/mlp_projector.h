// Parameters of what surrounds the products of a projector: all that host, device and emulator code
// share. Matrices are [rows, width], of one dtype and contiguous, unless it is said otherwise.
#pragma once

#include "common/norm.h"

namespace vlmops::mlp_projector {

enum class Activation : int { kNone, kGelu, kGeluTanh, kQuickGelu, kSilu, kRelu };

// Sums over rows are kept for this many rows each, whatever CPU runs them: their order is the same.
// A GPU's parts: gpu_part_rows.
constexpr int64_t kPartRows = 32;

VLMOPS_HOST_DEVICE constexpr int64_t parts_of(int64_t rows, int64_t part_rows = kPartRows) {
  return (rows + part_rows - 1) / part_rows;
}

// out = (x - mean) / sqrt(variance + eps) * (offset + weight) + bias, of each row
struct Norm {
  const void* x;
  int64_t x_stride;  // elements from row to row
  int64_t rows, width;
  DType dtype;
  bool layer;  // else "rms": no mean
  Row weight, bias;
  float eps, offset;
  void* out;

  // Backward: from the gradient of out to that of x, and parts of those of weight and bias.
  const void* grad;
  void* grad_x;        // or null
  float* scales;       // [rows, kScales], on a GPU with sums
  float* weight_sums;  // [parts, width], or null
  float* bias_sums;    // the same
};

// out = activation(hidden), or activation(gate) * hidden where there is a gate
struct Activate {
  const void* hidden;
  const void* gate;  // or null
  int64_t rows, width;
  DType dtype;
  Activation activation;
  void* out;  // may be hidden; in backward null where it is not asked for

  // Backward: from the gradient of out to those of hidden and gate, and parts of the sums of both.
  const void* grad;
  void* grad_hidden;
  void* grad_gate;     // where there is a gate
  float* hidden_sums;  // [parts, width], or null
  float* gate_sums;    // the same
};

// out [width], the sums over the rows of x.
struct RowSum {
  const void* x;
  DType dtype;
  int64_t rows, width;
  void* out;
  DType out_dtype;
  float* partial;  // [slices_of(rows), width] where those are several
};

constexpr int64_t kSliceRows = 256;
inline int64_t slices_of(int64_t rows) { return (rows + kSliceRows - 1) / kSliceRows; }

using CpuNorm = void (*)(const Norm&, int64_t begin, int64_t end);                  // rows
using CpuNormBackward = void (*)(const Norm&, int64_t begin, int64_t end);          // parts
using CpuActivate = void (*)(const Activate&, int64_t begin, int64_t end);          // elements
using CpuActivateBackward = void (*)(const Activate&, int64_t begin, int64_t end);  // parts

// On a GPU, where all pointers are the device's. They return 0 or an error's number.
using CudaNorm = int (*)(const Norm&, void* stream);
using CudaActivate = int (*)(const Activate&, void* stream);
using CudaRowSum = int (*)(const RowSum&, void* stream);

int norm_cuda(const Norm& p, void* stream);
int norm_backward_cuda(const Norm& p, void* stream);
int activate_cuda(const Activate& p, void* stream);
int activate_backward_cuda(const Activate& p, void* stream);
int sum_rows_cuda(const RowSum& p, void* stream);

}  // namespace vlmops::mlp_projector
