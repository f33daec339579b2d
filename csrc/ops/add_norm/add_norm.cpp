// The only file of the norm behind a sum that knows torch: schema, checks, Tensor -> Params,
// registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/numbers.h"
#include "binding/parallel.h"
#include "binding/rows.h"
#include "common/cpu_kernels.h"

namespace vlmops::add_norm {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kNames[kVectors] = {"weight", "bias", "x_bias"};

const Tensor* given(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

// Checks all arguments but tensors of x's shape; `x` is the gradient in backward.
Params check(const Argument& x, const OptionalTensor (&vectors)[kVectors], double eps, bool rms) {
  Params p{};
  p.dtype = x.floating();
  const Sizes sizes = sizes_of(x.tensor);
  if (sizes.empty()) fail(x.op, x.name, "expected [.., C], got shape []");
  p.channels = sizes.back();
  const int64_t expected[] = {p.channels};
  for (int k = 0; k < kVectors; ++k) {
    if (!vectors[k].has_value()) continue;
    const Argument a{x.op, kNames[k], *vectors[k]};
    p.vectors[k].dtype = a.floating();
    a.device_like(x);
    a.shape({expected, 1}, "[C], one for each channel of x");
  }
  if (rms && vectors[kBias].has_value())
    fail(x.op, "bias", "expected None with rms=True, whose norm has none, got a tensor");
  p.eps = static_cast<float>(eps);
  if (!(p.eps > 0.0f && p.eps <= std::numeric_limits<float>::max()))
    fail(x.op, "eps", "expected a positive, finite float32 number, got ", eps);
  p.layer = !rms;
  p.rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) p.rows *= sizes[i];
  return p;
}

// Strides and pointers. Rows whose channels are apart, or that more than two strides lead through,
// are copied. Vectors are made to lie side by side on a GPU, which strided ones cost more than
// that.
struct Operands {
  Tensor x;
  OptionalTensor residual, grad, vectors[kVectors];

  Operands(const Tensor& x_, const OptionalTensor& residual_, const OptionalTensor& grad_,
           const OptionalTensor (&vectors_)[kVectors], Params& p)
      : x(x_), residual(residual_), grad(grad_) {
    const auto apart = [&](const Tensor* t) {
      return t != nullptr && p.channels != 1 && t->stride(t->dim() - 1) != 1;
    };
    const auto merge = [&] {
      const RowsOf all[] = {
          {&x, &p.x_stride}, {given(residual), &p.residual_stride}, {given(grad), &p.grad_stride}};
      if (apart(&x) || apart(given(residual)) || apart(given(grad))) return false;
      return merge_dimensions(sizes_of(x), all, p.inner);
    };
    if (!merge()) {
      x = torch::stable::contiguous(x);
      if (residual.has_value()) residual = torch::stable::contiguous(*residual);
      if (grad.has_value()) grad = torch::stable::contiguous(*grad);
      merge();
    }
    p.x = x.const_data_ptr();
    if (residual.has_value()) p.residual = residual->const_data_ptr();
    if (grad.has_value()) p.grad = grad->const_data_ptr();
    for (int k = 0; k < kVectors; ++k) {
      if (!vectors_[k].has_value()) continue;
      const bool on_gpu = launchers_for(x) != nullptr;
      vectors[k] = on_gpu ? torch::stable::contiguous(*vectors_[k]) : *vectors_[k];
      p.vectors[k].data = vectors[k]->const_data_ptr();
      p.vectors[k].stride = vectors[k]->stride(0);
    }
    const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    p.streams = p.rows * p.channels * bytes >= kStreamBytes;
  }

  void allow(const Launch& launch, const char* x_name, const char* residual_name) const {
    launch.reads(x, x_name);
    launch.reads(residual, residual_name);
    launch.reads(grad, "grad");
    for (int k = 0; k < kVectors; ++k) launch.reads(vectors[k], kNames[k]);
  }
};

// n numbers that begin on a cache line.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t n) : data_(static_cast<size_t>(n) + 64 / sizeof(T)) {}
  T* get() {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<T> data_;
};

// Unless kMade the result is left empty. The sum is empty unless it is needed and something is
// added.
template <bool kMade>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& residual,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& x_bias, double eps, bool rms,
                                   bool needs_sum) {
  const char* op = "add_norm";
  const Argument input{op, "x", x};
  const OptionalTensor vectors[] = {weight, bias, x_bias};
  Params p = check(input, vectors, eps, rms);
  if (residual.has_value()) Argument{op, "residual", *residual}.like(input);
  const bool keeps = needs_sum && (residual.has_value() || x_bias.has_value());
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  Tensor sum = torch::stable::new_empty(x, keeps ? sizes_of(x) : Sizes{0});
  if (!kMade || out.numel() == 0) return {out, sum};
  const Operands operands(x, residual, std::nullopt, vectors, p);
  p.out = out.mutable_data_ptr();
  if (keeps) p.sum = sum.mutable_data_ptr();
  const Launch launch(op, x);
  if (launch.kernels != nullptr) {
    operands.allow(launch, "x", "residual");
    launch.writes(out, "the result");
    launch.writes(sum, "the sum");
    launch.run(&CudaKernels::add_norm, p);
    return {out, sum};
  }
  Memory<float> table(kVectors * p.channels);
  cpu_kernels().add_norm_table(p, table.get());
  const auto kernel = cpu_kernels().add_norm;
  torch::stable::parallel_for(0, p.rows, grain(p.channels), [&](int64_t begin, int64_t end) {
    Memory<float> row(p.channels);
    kernel(p, table.get(), begin, end, row.get());
  });
  return {out, sum};
}

// Sums [kVectors, C], of which those that are needed are made. Chunks, and with them the order of
// summation, do not depend on the number of threads. Few of them: the sums of each are read and
// written once more.
std::vector<double> backward_on_cpu(const Params& p, const bool (&needs)[kVectors]) {
  Memory<float> table(kVectors * p.channels);
  cpu_kernels().add_norm_table(p, table.get());
  const int64_t chunk = std::max({grain(p.channels), int64_t{32}, (p.rows + 31) / 32});
  const int64_t chunks = (p.rows + chunk - 1) / chunk;
  const bool any = std::any_of(std::begin(needs), std::end(needs), [](bool b) { return b; });
  const int64_t n = any ? kVectors * p.channels : 0;
  Memory<double> sums(chunks * n);
  std::vector<double> total(static_cast<size_t>(n));
  const auto kernel = cpu_kernels().add_norm_backward;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      CpuSums of{};
      for (int k = 0; k < kVectors; ++k)
        if (needs[k]) of.of[k] = sums.get() + i * n + k * p.channels;
      kernel(p, table.get(), i * chunk, std::min(p.rows, (i + 1) * chunk), of);
    }
  });
  for (const double* of = sums.get(); of != sums.get() + chunks * n; of += n) {
    for (int64_t i = 0; i < n; ++i) total[static_cast<size_t>(i)] += of[i];
  }
  return total;
}

void backward_on_gpu(const Launch& launch, const Params& p, const Tensor& grad, Tensor* sum_grad,
                     Tensor (&of)[kVectors], const bool (&needs)[kVectors]) {
  VectorGrads g{};
  bool any = false;
  for (int k = 0; k < kVectors; ++k) {
    if (!needs[k]) continue;
    any = true;
    g.out[k] = of[k].mutable_data_ptr();
    g.dtype[k] = p.vectors[k].dtype;
    launch.writes(of[k], "the gradient of a vector");
  }
  if (any) {
    const int64_t part = gpu_part_rows(p.rows, p.channels);
    g.parts = (p.rows + part - 1) / part;
  }
  const Tensor scales =
      torch::stable::new_empty(grad, Sizes{any ? p.rows : 0, kScales}, ScalarType::Float);
  const Tensor partial =
      torch::stable::new_empty(grad, Sizes{kVectors, g.parts, p.channels}, ScalarType::Float);
  if (any) {
    g.scales = static_cast<float*>(scales.mutable_data_ptr());
    g.partial = static_cast<float*>(partial.mutable_data_ptr());
  }
  launch.writes(scales, "statistics of rows");
  launch.writes(partial, "partial sums");
  if (sum_grad != nullptr) launch.writes(*sum_grad, "the gradient of the sum");
  launch.run(&CudaKernels::add_norm_backward, p, g);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const OptionalTensor& sum, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& x_bias, const OptionalTensor& grad_sum,
    double eps, bool rms, bool needs_sum, bool needs_weight, bool needs_bias, bool needs_x_bias) {
  const char* op = "add_norm_backward";
  const Argument upstream{op, "grad", grad};
  const OptionalTensor vectors[] = {weight, bias, x_bias};
  const bool needs[] = {needs_weight, needs_bias, needs_x_bias};
  Params p = check(upstream, vectors, eps, rms);
  if (sum.has_value()) Argument{op, "sum", *sum}.like(upstream);
  if (grad_sum.has_value()) Argument{op, "grad_sum", *grad_sum}.like(upstream);
  if (!sum.has_value() && (needs_sum || needs_weight || needs_x_bias))
    fail(op, "sum",
         "expected what was normed, since more than bias's gradient is wanted, got "
         "None");
  const Sizes none = {0};
  Tensor of[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    if (needs[k] && !vectors[k].has_value())
      fail(op, kNames[k], "expected a tensor, since its gradient is wanted, got None");
    const Tensor& like = needs[k] ? *vectors[k] : grad;
    of[k] = torch::stable::new_empty(like, needs[k] ? sizes_of(like) : none);
  }
  Tensor of_sum = torch::stable::new_empty(grad, needs_sum ? sizes_of(grad) : none);
  const auto result = [&] { return std::make_tuple(of_sum, of[0], of[1], of[2]); };
  if (grad.numel() == 0) {
    for (Tensor& t : of) torch::stable::zero_(t);
    return result();
  }
  if (!needs_sum && !needs_weight && !needs_bias && !needs_x_bias) return result();
  // bias's gradient hangs on no value of the sum.
  const Operands operands(sum.has_value() ? *sum : grad, grad_sum, grad, vectors, p);
  const Launch launch(op, grad);
  if (launch.kernels != nullptr) {
    operands.allow(launch, "sum", "grad_sum");
    // The sums for x_bias are of what was written.
    Tensor written =
        needs_x_bias && !needs_sum ? torch::stable::new_empty(grad, sizes_of(grad)) : of_sum;
    const bool writes = needs_sum || needs_x_bias;
    if (writes) p.out = written.mutable_data_ptr();
    backward_on_gpu(launch, p, grad, writes ? &written : nullptr, of, needs);
    return result();
  }
  if (needs_sum) p.out = of_sum.mutable_data_ptr();
  const std::vector<double> sums = backward_on_cpu(p, needs);
  for (int k = 0; k < kVectors; ++k)
    if (needs[k]) of[k] = rounded_like(*vectors[k], sums.data() + k * p.channels);
  return result();
}

}  // namespace
}  // namespace vlmops::add_norm

#define VLMOPS_ADD_NORM_ARGUMENTS                                                     \
  "Tensor x, Tensor? residual=None, Tensor? weight=None, Tensor? bias=None, Tensor? " \
  "x_bias=None, float eps=1e-5, bool rms=False, bool needs_sum=False"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The normed sum, and the sum; that is empty unless it is needed and something is added. Where
  // autograd records the call it may be needed for that.
  m.def("add_norm(" VLMOPS_ADD_NORM_ARGUMENTS ") -> (Tensor, Tensor)");
  // Memory for the results, once everything was checked.
  m.def("add_norm_empty(" VLMOPS_ADD_NORM_ARGUMENTS ") -> (Tensor, Tensor)");
  // The gradients of the sum, weight, bias and x_bias, empty where nobody needs them. sum: what was
  // normed; grad_sum: another gradient of it, which is added.
  m.def(
      "add_norm_backward(Tensor grad, Tensor? sum, Tensor? weight, Tensor? bias, Tensor? x_bias, "
      "Tensor? grad_sum, float eps, bool rms, bool needs_sum, bool needs_weight, bool needs_bias, "
      "bool needs_x_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define VLMOPS_ADD_NORM_IMPL(m)                                           \
  m.impl("add_norm", TORCH_BOX(&vlmops::add_norm::forward<true>));        \
  m.impl("add_norm_empty", TORCH_BOX(&vlmops::add_norm::forward<false>)); \
  m.impl("add_norm_backward", TORCH_BOX(&vlmops::add_norm::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_ADD_NORM_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_ADD_NORM_IMPL(m); }
