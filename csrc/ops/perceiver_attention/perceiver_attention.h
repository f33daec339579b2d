// Parameters of Perceiver attention beside those of its two segments of keys, which are the
// attention core's (common/attention.h): what joins their results. All that host, device and
// emulator code share.
#pragma once

#include <cmath>

#include "common/types.h"

namespace vlmops::perceiver_attention {

// The same queries over two segments of keys, each with a softmax of its own, to that over both.
struct Params {
  void* out;          // [rows, H, D], contiguous: of the first segment, then of both
  const void* other;  // the same of the second
  // [2, H, rows]: attention::Params::most and part, of the first segment, the second, and both.
  const float *first_statistics, *other_statistics;
  float* statistics;
  DType dtype;
  int heads, dim;
  int64_t rows;
  float steepness;  // what turns a difference of two mosts into an exponent of 2
};

// first + other, rounded once: contiguous, so many elements.
struct Sum {
  void* to;
  const float *first, *other;
  DType dtype;
  int64_t count;
};

// Rows [begin, end), and elements.
using CpuJoin = void (*)(const Params&, int64_t begin, int64_t end);
using CpuAdd = void (*)(const Sum&, int64_t begin, int64_t end);

// On a GPU, where all pointers are the device's. They return 0 or an error's number.
using CudaJoin = int (*)(const Params&, void* stream);
using CudaAdd = int (*)(const Sum&, void* stream);

int join_cuda(const Params& p, void* stream);
int add_cuda(const Sum& s, void* stream);

// How much of the joint result the two segments' results are, and the joint statistics.
struct Shares {
  float first, other, most, part;
};

// In double: the errors of several steps would be those of all weights. static: see simd.h on
// linkage.
VLMOPS_HOST_DEVICE static inline Shares shares_of(const Params& p, int64_t at) {
  const int64_t parts = p.heads * p.rows;
  const float of_first = p.first_statistics[parts + at], of_other = p.other_statistics[parts + at];
  const float first = p.first_statistics[at], other = p.other_statistics[at];
  // A segment without keys that are seen has a part of 0; the other's numbers are those of both.
  if (of_other == 0.0f) return {1.0f, 0.0f, first, of_first};
  if (of_first == 0.0f) return {0.0f, 1.0f, other, of_other};
  const float most = first > other ? first : other;
  const auto weight = [&](double own, double part) {
    return ::exp2((own - most) * p.steepness) / part;
  };
  const double x = weight(first, of_first), y = weight(other, of_other), sum = x + y;
  return {static_cast<float>(x / sum), static_cast<float>(y / sum), most,
          static_cast<float>(1.0 / sum)};
}

}  // namespace vlmops::perceiver_attention
