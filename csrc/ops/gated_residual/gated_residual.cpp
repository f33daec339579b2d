// The only file of the gated residual that knows torch: schema, checks, Tensor -> Params,
// registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/numbers.h"
#include "binding/parallel.h"
#include "binding/rows.h"
#include "common/cpu_kernels.h"

namespace vlmops::gated_residual {
namespace {

using OptionalTensor = std::optional<Tensor>;

Gate check_gate(const Argument& gate, const Argument& x) {
  Gate g{nullptr, gate.floating(), false, 0};
  gate.device_like(x);
  const Tensor& t = gate.tensor;
  const int64_t channels = x.tensor.size(x.tensor.dim() - 1), n = t.numel();
  const int64_t last = t.dim() == 0 ? 1 : t.size(t.dim() - 1);
  if (n != 1 && (n != channels || last != n)) {
    fail(gate.op, gate.name, "expected one number, or [C] or [1, .., 1, C], C = ", channels,
         ", one for each channel of ", x.name, ", got shape ", describe(t.sizes()));
  }
  g.per_channel = n != 1;
  if (g.per_channel) g.stride = t.stride(t.dim() - 1);
  return g;
}

// Checks all arguments; `x` is the gradient in backward.
Params check(const Argument& x, const OptionalTensor& y, const Tensor& gate,
             const OptionalTensor& row_mask) {
  Params p{};
  p.dtype = x.floating();
  const Sizes sizes = sizes_of(x.tensor);
  if (sizes.empty()) fail(x.op, x.name, "expected [.., C], got shape []");
  if (y.has_value()) Argument{x.op, "y", *y}.like(x);
  p.gate = check_gate({x.op, "gate", gate}, x);
  if (row_mask.has_value()) {
    const Argument mask{x.op, "row_mask", *row_mask};
    mask.boolean();
    mask.device_like(x);
    const Sizes rows(sizes.begin(), sizes.end() - 1);
    mask.shape(rows, "one for each row of C channels");
  }
  p.channels = sizes.back();
  p.rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) p.rows *= sizes[i];
  return p;
}

// Strides and pointers. Tensors that more than two strides lead through are copied.
struct Operands {
  Tensor x;
  OptionalTensor y, row_mask;

  Operands(const Tensor& x_, const OptionalTensor& y_, const Tensor& gate,
           const OptionalTensor& row_mask_, Params& p)
      : x(x_), y(y_), row_mask(row_mask_) {
    const auto merge = [&] {
      const auto given = [](const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; };
      const RowsOf all[] = {
          {&x, &p.x_stride}, {given(y), &p.y_stride}, {given(row_mask), &p.mask_stride}};
      return merge_dimensions(sizes_of(x), all, p.inner);
    };
    if (!merge()) {
      x = torch::stable::contiguous(x);
      if (y.has_value()) y = torch::stable::contiguous(*y);
      if (row_mask.has_value()) row_mask = torch::stable::contiguous(*row_mask);
      merge();
    }
    p.x = x.const_data_ptr();
    p.x_stride.channel = x.stride(x.dim() - 1);
    if (y.has_value()) {
      p.y = y->const_data_ptr();
      p.y_stride.channel = y->stride(y->dim() - 1);
    }
    if (row_mask.has_value()) p.row_mask = static_cast<const bool*>(row_mask->const_data_ptr());
    p.gate.data = gate.const_data_ptr();
    const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    p.streams = p.rows * p.channels * bytes >= kStreamBytes;
  }

  void allow(const Launch& launch, const char* x_name, const Tensor& gate) const {
    launch.reads(x, x_name);
    launch.reads(y, "y");
    launch.reads(row_mask, "row_mask");
    launch.reads(gate, "gate");
  }
};

std::vector<float> tanh_on_cpu(const Params& p) {
  std::vector<float> tanh(static_cast<size_t>(p.gate.per_channel ? p.channels : 1));
  cpu_kernels().gated_residual_tanh(p, tanh.data());
  return tanh;
}

// Unless kMade the result is left empty.
template <bool kMade>
Tensor forward(const Tensor& x, const Tensor& y, const Tensor& gate,
               const OptionalTensor& row_mask) {
  const char* op = "gated_residual";
  Params p = check({op, "x", x}, y, gate, row_mask);
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  if (!kMade || out.numel() == 0) return out;
  const Operands operands(x, y, gate, row_mask, p);
  p.out = out.mutable_data_ptr();
  const Launch launch(op, x);
  if (launch.kernels != nullptr) {
    operands.allow(launch, "x", gate);
    launch.writes(out, "the result");
    launch.run(&CudaKernels::gated_residual, p);
    return out;
  }
  const std::vector<float> tanh = tanh_on_cpu(p);
  const auto kernel = cpu_kernels().gated_residual;
  torch::stable::parallel_for(0, p.rows, grain(p.channels), [&](int64_t begin, int64_t end) {
    kernel(p, tanh.data(), begin, end);
  });
  return out;
}

// 1 - tanh(g)^2 without its cancellation.
double slope(double g) {
  const double e = std::exp(-2.0 * std::fabs(g));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

// Widens one element of a gate.
double gate_at(const Gate& gate, int64_t i) {
  const int64_t at = i * gate.stride;
  switch (gate.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(gate.data)[at];
    case DType::kBFloat16:
      return static_cast<const torch::headeronly::BFloat16*>(gate.data)[at];
    case DType::kFloat16:
      return static_cast<const torch::headeronly::Half*>(gate.data)[at];
  }
  return 0.0;
}

// Chunks, and with them the order of summation, do not depend on the number of threads. Few of
// them: the sums of each are read and written once more.
std::vector<double> backward_on_cpu(const Params& p, bool needs_gate) {
  const std::vector<float> tanh = tanh_on_cpu(p);
  const int64_t chunk = std::max({grain(p.channels), int64_t{32}, (p.rows + 31) / 32});
  const int64_t chunks = (p.rows + chunk - 1) / chunk;
  const size_t n = needs_gate ? tanh.size() : 0;
  std::vector<double> sums(chunks * n), total(n);
  const auto kernel = cpu_kernels().gated_residual_backward;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(p, tanh.data(), i * chunk, std::min(p.rows, (i + 1) * chunk),
             needs_gate ? sums.data() + i * n : nullptr);
    }
  });
  for (auto sum = sums.cbegin(); sum != sums.cend();)
    for (double& all : total) all += *sum++;
  for (size_t i = 0; i < n; ++i) total[i] *= slope(gate_at(p.gate, static_cast<int64_t>(i)));
  return total;
}

void backward_on_gpu(const Launch& launch, const Params& p, const Tensor& grad, Tensor* of_gate) {
  if (of_gate == nullptr) {
    launch.run(&CudaKernels::gated_residual_backward, p, static_cast<double*>(nullptr));
    return;
  }
  GateGrad g{};
  g.columns = p.gate.per_channel ? p.channels : 1;
  g.parts = launch.kernels->gated_residual_parts(p);
  g.gate = p.gate;
  g.out = of_gate->mutable_data_ptr();
  const Tensor partial =
      torch::stable::new_empty(grad, Sizes{g.parts, g.columns}, ScalarType::Double);
  launch.writes(partial, "partial sums");
  launch.writes(*of_gate, "the gradient of gate");
  auto* const sums = static_cast<double*>(partial.mutable_data_ptr());
  launch.run(&CudaKernels::gated_residual_backward, p, sums);
  g.partial = sums;
  launch.run(&CudaKernels::gated_residual_gate_grad, g);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const OptionalTensor& y, const Tensor& gate,
                                    const OptionalTensor& row_mask, bool needs_y, bool needs_gate) {
  const char* op = "gated_residual_backward";
  Params p = check({op, "grad", grad}, y, gate, row_mask);
  if (needs_gate && !y.has_value())
    fail(op, "y", "expected the y of the forward call, since gate's gradient is wanted, got None");
  const Sizes none = {0};
  Tensor of_y = torch::stable::new_empty(grad, needs_y ? sizes_of(grad) : none);
  Tensor of_gate = torch::stable::new_empty(gate, needs_gate ? sizes_of(gate) : none);
  if (!needs_y && !needs_gate) return {of_y, of_gate};
  if (grad.numel() == 0) return {of_y, needs_gate ? torch::stable::zero_(of_gate) : of_gate};
  const Operands operands(grad, needs_gate ? y : std::nullopt, gate, row_mask, p);
  if (needs_y) p.out = of_y.mutable_data_ptr();
  const Launch launch(op, grad);
  if (launch.kernels != nullptr) {
    operands.allow(launch, "grad", gate);
    if (needs_y) launch.writes(of_y, "the gradient of y");
    backward_on_gpu(launch, p, grad, needs_gate ? &of_gate : nullptr);
    return {of_y, of_gate};
  }
  const std::vector<double> sums = backward_on_cpu(p, needs_gate);
  if (needs_gate) of_gate = rounded_like(gate, sums.data());
  return {of_y, of_gate};
}

}  // namespace
}  // namespace vlmops::gated_residual

#define VLMOPS_GATED_RESIDUAL_ARGUMENTS "Tensor x, Tensor y, Tensor gate, Tensor? row_mask=None"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("gated_residual(" VLMOPS_GATED_RESIDUAL_ARGUMENTS ") -> Tensor");
  // Memory for the result, once everything was checked.
  m.def("gated_residual_empty(" VLMOPS_GATED_RESIDUAL_ARGUMENTS ") -> Tensor");
  // The gradients of y and gate, empty where nobody needs them; y is read for the gate's alone.
  // That of x is grad.
  m.def(
      "gated_residual_backward(Tensor grad, Tensor? y, Tensor gate, Tensor? row_mask=None, bool "
      "needs_y=True, bool needs_gate=True) -> (Tensor, Tensor)");
}

#define VLMOPS_GATED_RESIDUAL_IMPL(m)                                                 \
  m.impl("gated_residual", TORCH_BOX(&vlmops::gated_residual::forward<true>));        \
  m.impl("gated_residual_empty", TORCH_BOX(&vlmops::gated_residual::forward<false>)); \
  m.impl("gated_residual_backward", TORCH_BOX(&vlmops::gated_residual::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_GATED_RESIDUAL_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_GATED_RESIDUAL_IMPL(m); }
