// RMSNorm for ops that have one in front of something else.
#pragma once

#include <tuple>

#include "binding/check.h"

namespace vlmops {

// x / sqrt(mean(x ** 2) + eps) * weight over the last dimension of x [B, S, H, D]; weight [D].
// Contiguous, statistics in float32. Arguments have been checked; op is what a launch is called.
Tensor rms_norm(const char* op, const Tensor& x, const Tensor& weight, double eps);

// The gradients of x and weight; those that nobody needs are empty.
std::tuple<Tensor, Tensor> rms_norm_backward(const char* op, const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, double eps, bool needs_x,
                                             bool needs_weight);

}  // namespace vlmops
