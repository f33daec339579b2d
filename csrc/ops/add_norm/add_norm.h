// Parameters of the norm behind a sum: all that host, device and emulator code share.
#pragma once

#include "common/norm.h"
#include "common/strides.h"

namespace vlmops::add_norm {

// The vectors of C numbers, in the order of tables, sums and gradients.
enum Vector : int { kWeight, kBias, kXBias, kVectors };

// Rows of C channels, side by side. Strides in elements.
struct Params {
  const void* x;         // in backward what was normed
  const void* residual;  // added to x, or null; in backward to the gradient of the sum
  const void* grad;      // in backward: of the result
  void* out;             // the result; in backward the gradient of the sum, or null; contiguous
  void* sum;             // forward: what is normed, rounded, or null; contiguous
  DType dtype;           // of all five
  NormVector vectors[kVectors];
  RowStrides x_stride, residual_stride, grad_stride;
  int64_t rows, inner, channels;
  bool layer;  // else "rms": no mean
  float eps;
  bool streams;  // what is written is too large for the CPU's caches
};

// [kVectors, C] as the kernels below read vectors: ones for a weight, zeros for others where there
// are none.
using CpuTable = void (*)(const Params&, float* table);

// Rows [begin, end). row: memory for C floats.
using CpuKernel = void (*)(const Params&, const float* table, int64_t begin, int64_t end,
                           float* row);

// Sums over rows, [C] each and zeros at first; null where nobody needs them.
struct CpuSums {
  double* of[kVectors];
};
using CpuBackward = void (*)(const Params&, const float* table, int64_t begin, int64_t end,
                             const CpuSums&);

// On a GPU, where all pointers are the device's. They return 0 or an error's number.
using CudaKernel = int (*)(const Params&, void* stream);

// The gradients of vectors that are needed. parts: of rows, gpu_part_rows(rows, channels) each.
struct VectorGrads {
  float* scales;        // [rows, kScales]; null where no vector's gradient is needed
  float* partial;       // [kVectors, parts, C]
  int64_t parts;        // 0 likewise
  void* out[kVectors];  // [C], contiguous, or null
  DType dtype[kVectors];
};
using CudaBackward = int (*)(const Params&, const VectorGrads&, void* stream);

int forward_cuda(const Params& p, void* stream);
int backward_cuda(const Params& p, const VectorGrads& grads, void* stream);

}  // namespace vlmops::add_norm
