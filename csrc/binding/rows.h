// Tensors that kernels read as rows of channels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "binding/check.h"
#include "common/strides.h"

namespace vlmops {

using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// What a kernel reads of a tensor, but for its channels: strides of two leading dimensions.
struct RowsOf {
  const Tensor* tensor;  // null where there is none
  RowStrides* to;
};

// Makes the leading dimensions of all tensors two, those of `sizes` but its last, and `inner` the
// size of the second; false where their strides need more.
template <size_t N>
bool merge_dimensions(const Sizes& sizes, const RowsOf (&all)[N], int64_t& inner) {
  struct Dimension {
    int64_t size;
    int64_t strides[N];
  };
  std::vector<Dimension> merged;  // the last first
  int64_t rows = 1;
  for (size_t i = sizes.size() - 1; i-- > 0;) {
    rows *= sizes[i];
    if (sizes[i] == 1) continue;
    Dimension d{sizes[i], {}};
    for (size_t t = 0; t < N; ++t) {
      if (all[t].tensor != nullptr) d.strides[t] = all[t].tensor->stride(static_cast<int64_t>(i));
    }
    bool follows = !merged.empty();
    for (size_t t = 0; follows && t < N; ++t)
      follows = d.strides[t] == merged.back().strides[t] * merged.back().size;
    if (follows) {
      merged.back().size *= d.size;
    } else {
      merged.push_back(d);
    }
  }
  if (merged.size() > 2) return false;
  inner = merged.size() == 2 ? merged[0].size : rows;
  for (size_t t = 0; t < N; ++t) {
    all[t].to->row = merged.empty() ? 0 : merged[0].strides[t];
    all[t].to->outer = merged.size() == 2 ? merged[1].strides[t] : 0;
  }
  return true;
}

}  // namespace vlmops
