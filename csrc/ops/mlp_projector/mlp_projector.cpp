// The only file of the projector that knows torch: schemas, checks, Tensor -> Params, registration.
// The op is put together in Python (vlmops/ops/mlp_projector_steps.py), since its products are
// torch's; here is what comes before, between and after them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/parallel.h"
#include "common/cpu_kernels.h"

namespace vlmops::mlp_projector {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr const char* kOp = "mlp_projector";

constexpr std::pair<const char*, Activation> kActivations[] = {
    {"none", Activation::kNone},          {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh}, {"quick_gelu", Activation::kQuickGelu},
    {"silu", Activation::kSilu},          {"relu", Activation::kRelu}};

Activation activation_of(const char* name, const std::string& value) {
  for (const auto& [known, activation] : kActivations)
    if (value == known) return activation;
  fail(kOp, name, "expected 'gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'relu' or None, got '",
       value, "'");
}

bool is_layer(const std::string& norm) { return norm == "layer"; }

// [columns], one number for each of what.
void check_row(const Argument& a, const Argument& like, int64_t columns, const char* what) {
  a.device_like(like);
  const int64_t expected[] = {columns};
  a.shape({expected, 1}, what);
  a.floating();
}

void same_dtype(const Argument& a, const Argument& like) {
  if (a.tensor.scalar_type() != like.tensor.scalar_type())
    fail(kOp, a.name, "expected dtype ", describe(like.tensor.scalar_type()), ", that of ",
         like.name, ", got ", describe(a.tensor.scalar_type()));
}

// A weight [N, columns] and its bias [N]; rows: N, or -1 for any.
void check_product(const Argument& weight, const char* bias_name, const OptionalTensor& bias,
                   const Argument& x, int64_t columns, int64_t rows) {
  weight.device_like(x);
  const auto shape = weight.tensor.sizes();
  if (weight.tensor.dim() != 2 || weight.tensor.size(1) != columns ||
      (rows >= 0 && weight.tensor.size(0) != rows)) {
    fail(kOp, weight.name, "expected shape [", rows < 0 ? "N" : std::to_string(rows), ", ", columns,
         "] for x ", describe(x.tensor.sizes()), ", got ", describe(shape));
  }
  same_dtype(weight, x);
  if (!bias.has_value()) return;
  const Argument b{kOp, bias_name, *bias};
  check_row(b, x, weight.tensor.size(0), "one for each row of the weight");
  same_dtype(b, x);
}

void check(const Tensor& x, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
           const OptionalTensor& fc2_weight, const OptionalTensor& fc2_bias,
           const OptionalTensor& gate_weight, const OptionalTensor& gate_bias,
           const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
           const std::string& activation, const std::string& out_activation,
           const std::string& norm, double norm_eps, double norm_offset, bool) {
  const Argument input{kOp, "x", x};
  input.floating();
  if (x.dim() == 0) fail(kOp, "x", "expected shape [..., K], got []");
  const int64_t depth = x.size(x.dim() - 1);
  check_product({kOp, "fc1_weight", fc1_weight}, "fc1_bias", fc1_bias, input, depth, -1);
  const int64_t hidden = fc1_weight.size(0);
  if (gate_weight.has_value()) {
    check_product({kOp, "gate_weight", *gate_weight}, "gate_bias", gate_bias, input, depth, hidden);
  } else if (gate_bias.has_value()) {
    fail(kOp, "gate_bias", "expected None without a gate_weight, got a tensor");
  }
  if (fc2_weight.has_value()) {
    check_product({kOp, "fc2_weight", *fc2_weight}, "fc2_bias", fc2_bias, input, hidden, -1);
  } else if (fc2_bias.has_value()) {
    fail(kOp, "fc2_bias", "expected None without a fc2_weight, got a tensor");
  }
  activation_of("activation", activation);
  if (activation_of("out_activation", out_activation) != Activation::kNone &&
      !fc2_weight.has_value())
    fail(kOp, "out_activation", "expected None without a fc2_weight, got '", out_activation, "'");
  if (norm != "none" && !is_layer(norm) && norm != "rms")
    fail(kOp, "norm", "expected 'layer', 'rms' or None, got '", norm, "'");
  if (norm == "none" && (norm_weight.has_value() || norm_bias.has_value()))
    fail(kOp, "norm", "expected 'layer' or 'rms', as a norm_weight or norm_bias is given");
  if (norm_weight.has_value())
    check_row({kOp, "norm_weight", *norm_weight}, input, depth, "one for each channel of x");
  if (norm_bias.has_value())
    check_row({kOp, "norm_bias", *norm_bias}, input, depth, "one for each channel of x");
  const auto eps = static_cast<float>(norm_eps);
  if (!(eps > 0.0f && eps <= std::numeric_limits<float>::max()))
    fail(kOp, "norm_eps", "expected a positive, finite float32 number, got ", norm_eps);
  if (!(norm_offset - norm_offset == 0.0))
    fail(kOp, "norm_offset", "expected a finite number, got ", norm_offset);
}

// Contiguous [n], or null; float32 for the CPU's kernels.
struct KeptRow {
  OptionalTensor tensor;
  Row row{};
  KeptRow(const char* name, const OptionalTensor& t) {
    if (!t.has_value()) return;
    tensor = torch::stable::contiguous(*t);
    if (launchers_for(*t) == nullptr) tensor = torch::stable::to(*tensor, ScalarType::Float);
    row = {tensor->const_data_ptr(), Argument{kOp, name, *tensor}.floating()};
  }
};

// Of x [rows, width], whose rows are contiguous: Python sees to it.
Norm norm_of(const Tensor& x, const std::string& norm, const KeptRow& weight, const KeptRow& bias,
             double eps, double offset) {
  Norm p{};
  p.x = x.const_data_ptr();
  p.rows = x.size(0), p.width = x.size(1);
  p.x_stride = x.stride(0);
  p.dtype = Argument{kOp, "x", x}.floating();
  p.layer = is_layer(norm);
  p.weight = weight.row, p.bias = bias.row;
  p.eps = static_cast<float>(eps), p.offset = static_cast<float>(offset);
  return p;
}

Tensor norm(const Tensor& x, const std::string& kind, const OptionalTensor& weight,
            const OptionalTensor& bias, double eps, double offset) {
  const KeptRow w{"norm_weight", weight}, b{"norm_bias", bias};
  Norm p = norm_of(x, kind, w, b, eps, offset);
  Tensor out = torch::stable::new_empty(x, Sizes{p.rows, p.width});
  p.out = out.mutable_data_ptr();
  const Launch launch(kOp, x);
  if (launch.kernels != nullptr) {
    launch.reads(x, "x");
    launch.reads(w.tensor, "norm_weight");
    launch.reads(b.tensor, "norm_bias");
    launch.writes(out, "the normalised x");
    launch.run(&CudaKernels::mlp_projector_norm, p);
    return out;
  }
  const auto kernel = cpu_kernels().mlp_projector_norm;
  torch::stable::parallel_for(0, p.rows, grain(p.width),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

Tensor sums_like(const Tensor& x, bool needed) {
  const int64_t rows = x.size(0);
  const int64_t of_a_part =
      launchers_for(x) != nullptr ? gpu_part_rows(rows, x.size(1)) : kPartRows;
  const Sizes shape{needed ? parts_of(rows, of_a_part) : 0, x.size(1)};
  return torch::stable::new_empty(x, shape, ScalarType::Float);
}

float* floats(Tensor& t, bool needed) {
  return needed ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
}

// Writes the gradient of x, where grad_x is given; on the CPU it may be grad itself. Returns parts
// of the gradients of weight and bias, which add up to them; empty where they are not asked for.
std::tuple<Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                         const std::string& kind, const OptionalTensor& weight,
                                         double eps, double offset, OptionalTensor grad_x,
                                         bool needs_weight, bool needs_bias) {
  const KeptRow w{"norm_weight", weight}, none{"norm_bias", std::nullopt};
  Norm p = norm_of(x, kind, w, none, eps, offset);
  p.grad = grad.const_data_ptr();
  if (grad_x.has_value()) p.grad_x = grad_x->mutable_data_ptr();
  Tensor weight_sums = sums_like(x, needs_weight), bias_sums = sums_like(x, needs_bias);
  p.weight_sums = floats(weight_sums, needs_weight);
  p.bias_sums = floats(bias_sums, needs_bias);
  const Launch launch(kOp, x);
  if (launch.kernels != nullptr) {
    Tensor scales = torch::stable::new_empty(x, Sizes{p.rows, kScales}, ScalarType::Float);
    p.scales = floats(scales, true);
    launch.reads(x, "x");
    launch.reads(grad, "the gradient");
    launch.reads(w.tensor, "norm_weight");
    if (grad_x.has_value()) launch.writes(*grad_x, "the gradient of x");
    launch.writes(scales, "mean, factor and shift");
    launch.writes(weight_sums, "sums of norm_weight");
    launch.writes(bias_sums, "sums of norm_bias");
    launch.run(&CudaKernels::mlp_projector_norm_backward, p);
  } else {
    const auto kernel = cpu_kernels().mlp_projector_norm_backward;
    torch::stable::parallel_for(0, parts_of(p.rows), grain(kPartRows * p.width),
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
  return {weight_sums, bias_sums};
}

Activate activate_of(const Tensor& hidden, const OptionalTensor& gate,
                     const std::string& activation) {
  Activate p{};
  p.hidden = hidden.const_data_ptr();
  p.gate = gate.has_value() ? gate->const_data_ptr() : nullptr;
  p.rows = hidden.size(0), p.width = hidden.size(1);
  p.dtype = Argument{kOp, "hidden", hidden}.floating();
  p.activation = activation_of("activation", activation);
  return p;
}

// out may be hidden itself. All are [rows, width] and contiguous: they are the steps' own.
void activate(const Tensor& hidden, const OptionalTensor& gate, const std::string& activation,
              Tensor out) {
  Activate p = activate_of(hidden, gate, activation);
  p.out = out.mutable_data_ptr();
  const Launch launch(kOp, hidden);
  if (launch.kernels != nullptr) {
    if (p.out != p.hidden) launch.reads(hidden, "the hidden layer");
    launch.reads(gate, "the gate");
    launch.writes(out, "the activated layer");
    launch.run(&CudaKernels::mlp_projector_activate, p);
    return;
  }
  const auto kernel = cpu_kernels().mlp_projector_activate;
  torch::stable::parallel_for(0, p.rows * p.width, grain(1),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Writes the gradient of hidden, which may lie where grad does. Returns that of gate, the activated
// layer, and parts of the sums of both gradients; empty where they are not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> activate_backward(
    const Tensor& grad, const Tensor& hidden, const OptionalTensor& gate,
    const std::string& activation, Tensor grad_hidden, bool needs_out, bool needs_hidden_sums,
    bool needs_gate_sums) {
  Activate p = activate_of(hidden, gate, activation);
  p.grad = grad.const_data_ptr();
  const Sizes whole{p.rows, p.width}, nothing{0, p.width};
  const bool gated = gate.has_value();
  needs_gate_sums = needs_gate_sums && gated;
  Tensor grad_gate = torch::stable::new_empty(hidden, gated ? whole : nothing);
  Tensor out = torch::stable::new_empty(hidden, needs_out ? whole : nothing);
  Tensor hidden_sums = sums_like(hidden, needs_hidden_sums);
  Tensor gate_sums = sums_like(hidden, needs_gate_sums);
  p.grad_hidden = grad_hidden.mutable_data_ptr();
  p.grad_gate = gated ? grad_gate.mutable_data_ptr() : nullptr;
  p.out = needs_out ? out.mutable_data_ptr() : nullptr;
  p.hidden_sums = floats(hidden_sums, needs_hidden_sums);
  p.gate_sums = floats(gate_sums, needs_gate_sums);
  const Launch launch(kOp, hidden);
  if (launch.kernels != nullptr) {
    if (p.grad_hidden != p.grad) launch.reads(grad, "the gradient");
    launch.reads(hidden, "the hidden layer");
    launch.reads(gate, "the gate");
    launch.writes(grad_hidden, "the gradient of the hidden layer");
    launch.writes(grad_gate, "the gradient of the gate");
    launch.writes(out, "the activated layer");
    launch.writes(hidden_sums, "sums of the hidden layer");
    launch.writes(gate_sums, "sums of the gate");
    launch.run(&CudaKernels::mlp_projector_activate_backward, p);
  } else {
    const auto kernel = cpu_kernels().mlp_projector_activate_backward;
    torch::stable::parallel_for(0, parts_of(p.rows), grain(kPartRows * p.width),
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
  return {grad_gate, out, hidden_sums, gate_sums};
}

// The sums over the rows of x, in the dtype of `like`; on a GPU.
Tensor sum_rows(const Tensor& x, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, Sizes{x.size(1)});
  RowSum p{};
  p.x = x.const_data_ptr();
  p.dtype = Argument{kOp, "x", x}.floating();
  p.rows = x.size(0), p.width = x.size(1);
  p.out = out.mutable_data_ptr();
  p.out_dtype = Argument{kOp, "like", like}.floating();
  const int64_t slices = slices_of(p.rows);
  const Sizes size{slices > 1 ? slices : 0, p.width};
  Tensor partial = torch::stable::new_empty(x, size, ScalarType::Float);
  p.partial = floats(partial, true);
  const Launch launch(kOp, x);
  if (launch.kernels == nullptr) fail(kOp, "x", "expected a tensor on a GPU; use x.sum(0)");
  launch.reads(x, "x");
  launch.writes(partial, "partial sums");
  launch.writes(out, "sums over rows");
  launch.run(&CudaKernels::mlp_projector_sum_rows, p);
  return out;
}

}  // namespace
}  // namespace vlmops::mlp_projector

#define VLMOPS_MLP_PROJECTOR_ARGUMENTS                                                          \
  "Tensor x, Tensor fc1_weight, Tensor? fc1_bias=None, Tensor? fc2_weight=None, Tensor? "       \
  "fc2_bias=None, Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? norm_weight=None, " \
  "Tensor? norm_bias=None, str activation=\"none\", str out_activation=\"none\", str "          \
  "norm=\"none\", float norm_eps=1e-5, float norm_offset=0.0, bool keep=False"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The result and, with keep, what backward takes: layers before their activations.
  m.def("mlp_projector(" VLMOPS_MLP_PROJECTOR_ARGUMENTS ") -> Tensor[]");
  // Of the tensors of the schema, in its order; empty where `needs` says so.
  m.def(
      "mlp_projector_backward(Tensor grad, Tensor[] kept, bool[] "
      "needs, " VLMOPS_MLP_PROJECTOR_ARGUMENTS ") -> Tensor[]");
  // The parts of the op, on matrices [rows, width].
  m.def("mlp_projector_check(" VLMOPS_MLP_PROJECTOR_ARGUMENTS ") -> ()");
  m.def(
      "mlp_projector_norm(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, float "
      "offset) -> Tensor");
  m.def(
      "mlp_projector_norm_backward(Tensor grad, Tensor x, str norm, Tensor? weight, float eps, "
      "float offset, Tensor(a!)? grad_x, bool needs_weight, bool needs_bias) -> (Tensor, Tensor)");
  m.def(
      "mlp_projector_activate(Tensor hidden, Tensor? gate, str activation, Tensor(a!) out) -> ()");
  m.def(
      "mlp_projector_activate_backward(Tensor grad, Tensor hidden, Tensor? gate, str activation, "
      "Tensor(a!) grad_hidden, bool needs_out, bool needs_hidden_sums, bool needs_gate_sums) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("mlp_projector_sum_rows(Tensor x, Tensor like) -> Tensor");
}

#define VLMOPS_MLP_PROJECTOR_IMPL(m)                                                               \
  m.impl("mlp_projector_check", TORCH_BOX(&vlmops::mlp_projector::check));                         \
  m.impl("mlp_projector_norm", TORCH_BOX(&vlmops::mlp_projector::norm));                           \
  m.impl("mlp_projector_norm_backward", TORCH_BOX(&vlmops::mlp_projector::norm_backward));         \
  m.impl("mlp_projector_activate", TORCH_BOX(&vlmops::mlp_projector::activate));                   \
  m.impl("mlp_projector_activate_backward", TORCH_BOX(&vlmops::mlp_projector::activate_backward)); \
  m.impl("mlp_projector_sum_rows", TORCH_BOX(&vlmops::mlp_projector::sum_rows))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_MLP_PROJECTOR_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_MLP_PROJECTOR_IMPL(m); }
