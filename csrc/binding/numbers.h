// Small numbers that bindings compute on the host.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "binding/check.h"

namespace vlmops {

// The largest whole number whose square is at most n >= 0.
inline int64_t square_root(int64_t n) {
  auto root = static_cast<int64_t>(std::sqrt(static_cast<double>(n)));
  while (root * root > n) --root;
  while ((root + 1) * (root + 1) <= n) ++root;
  return root;
}

// Sums in the shape and dtype of a tensor on the CPU.
inline Tensor rounded_like(const Tensor& like, const double* sums) {
  const std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  Tensor out = torch::stable::new_empty(like, shape);
  void* p = out.mutable_data_ptr();
  for (int64_t i = 0; i < out.numel(); ++i) {
    const auto value = static_cast<float>(sums[i]);
    switch (out.scalar_type()) {
      case ScalarType::BFloat16:
        static_cast<torch::headeronly::BFloat16*>(p)[i] = value;
        break;
      case ScalarType::Half:
        static_cast<torch::headeronly::Half*>(p)[i] = value;
        break;
      default:
        static_cast<float*>(p)[i] = value;
    }
  }
  return out;
}

}  // namespace vlmops
