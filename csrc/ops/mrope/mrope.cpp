// The only file of M-RoPE that knows torch: schema, checks, Tensor -> Params, registration.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/check.h"
#include "binding/cuda.h"
#include "binding/numbers.h"
#include "binding/parallel.h"
#include "common/cpu_kernels.h"

namespace vlmops::mrope {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Options {
  const char* op;
  std::string rotation;
  double scaling;
  int64_t head_axis;
  float sine_sign;
  double norm_eps = 1e-6;
  double norm_offset = 0.0;
};

// inv_freq and freq_axis as the kernels want them: a few hundred bytes, copied per call; on a GPU
// what the arguments are, unless their dtype or strides are others.
struct Frequencies {
  float inv_freq[kMaxFrequencies];
  int32_t freq_axis[kMaxFrequencies];
  OptionalTensor on_gpu[2];
};

[[noreturn]] void fail_frequencies(const Argument& a) {
  fail(a.op, a.name, "expected a floating dtype, got ", describe(a.tensor.scalar_type()));
}

// inv_freq [R] as float32.
void read_floats(const Argument& a, int64_t n, float* out) {
  // Each call into torch costs as much as ten elements.
  const void* p = a.tensor.const_data_ptr();
  const int64_t stride = a.tensor.stride(0);
  const auto copy = [&](const auto* from) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(from[i * stride]);
  };
  switch (a.tensor.scalar_type()) {
    case ScalarType::Float:
      return copy(static_cast<const float*>(p));
    case ScalarType::Double:
      return copy(static_cast<const double*>(p));
    case ScalarType::BFloat16:
      return copy(static_cast<const torch::headeronly::BFloat16*>(p));
    case ScalarType::Half:
      return copy(static_cast<const torch::headeronly::Half*>(p));
    default:
      fail_frequencies(a);
  }
}

void arrange(const Tensor& t, int64_t head_axis, int64_t* stride) {
  const bool packed = t.dim() == 3;  // [N, H, D]: one batch of N tokens
  stride[0] = packed ? 0 : t.stride(0);
  stride[1] = packed ? t.stride(0) : t.stride(head_axis == 1 ? 2 : 1);
  stride[2] = t.stride(head_axis);
  stride[3] = t.stride(packed ? 2 : 3);
}

Rows rows_of(const Tensor& src, const Tensor& dst, int64_t head_axis) {
  Rows rows{};
  rows.src = src.const_data_ptr();
  rows.dst = dst.mutable_data_ptr();
  rows.heads = src.size(head_axis);
  arrange(src, head_axis, rows.src_stride);
  arrange(dst, head_axis, rows.dst_stride);
  return rows;
}

// Checks a norm's weight, which lies next to q, and hands it to rows.
void set_norm(Rows& rows, const Argument& q, const char* name, const OptionalTensor& weight) {
  if (!weight.has_value()) return;
  const Argument a{q.op, name, *weight};
  rows.norm_dtype = a.floating();
  a.device_like(q);
  const int64_t head_dim[] = {q.tensor.size(q.tensor.dim() - 1)};
  a.shape({head_dim, 1}, "[D], one weight for each channel of a head");
  if (head_dim[0] > kMaxNormDim)
    fail(a.op, a.name, "expected at most ", kMaxNormDim, " channels, got ", head_dim[0]);
  rows.norm_weight = weight->const_data_ptr();
  rows.norm_stride = weight->stride(0);
}

// Checks everything that no kernel checks, and fills all of Params but rows.
Params check(const Options& o, const Argument& q, const Argument& k, const Argument& position_ids,
             const Argument& inv_freq, const Argument& freq_axis, Frequencies& frequencies) {
  Params p{};
  p.dtype = q.floating();
  if (k.tensor.scalar_type() != q.tensor.scalar_type()) {
    fail(o.op, k.name, "expected dtype ", describe(q.tensor.scalar_type()), ", that of ", q.name,
         ", got ", describe(k.tensor.scalar_type()));
  }
  for (const Argument* a : {&k, &position_ids, &inv_freq, &freq_axis}) a->device_like(q);

  const int64_t rank = q.tensor.dim();
  if (rank != 3 && rank != 4) {
    fail(o.op, q.name,
         "expected [B, H, S, D] (head_axis=1), [B, S, H, D] (head_axis=2) or [N, H, D], got shape ",
         describe(q.tensor.sizes()));
  }
  if (o.head_axis != 1 && !(o.head_axis == 2 && rank == 4)) {
    fail(o.op, "head_axis", "expected ",
         rank == 4 ? "1 for [B, H, S, D] or 2 for [B, S, H, D]" : "1 for [N, H, D]", ", got ",
         o.head_axis);
  }
  std::vector<int64_t> expected(q.tensor.sizes().begin(), q.tensor.sizes().end());
  if (k.tensor.dim() == rank) expected[o.head_axis] = k.tensor.size(o.head_axis);
  k.shape(expected, "that of q but for the number of heads");

  p.batch = rank == 4 ? q.tensor.size(0) : 1;
  p.tokens = rank == 4 ? q.tensor.size(3 - o.head_axis) : q.tensor.size(0);
  p.head_dim = q.tensor.size(rank - 1);
  if (p.head_dim % 2 != 0)
    fail(o.op, q.name, "expected an even head_dim, got shape ", describe(q.tensor.sizes()));

  if (inv_freq.tensor.dim() != 1) {
    fail(o.op, inv_freq.name, "expected shape [R], got ", describe(inv_freq.tensor.sizes()));
  }
  p.frequencies = inv_freq.tensor.size(0);
  if (2 * p.frequencies > p.head_dim) {
    fail(o.op, inv_freq.name, "expected at most head_dim / 2 = ", p.head_dim / 2,
         " frequencies, got ", p.frequencies);
  }
  if (p.frequencies > kMaxFrequencies) {
    fail(o.op, inv_freq.name, "expected at most ", kMaxFrequencies, " frequencies, got ",
         p.frequencies);
  }
  const int64_t r[] = {p.frequencies};
  freq_axis.shape({r, 1}, "[R] like inv_freq");

  const int64_t position_rank = position_ids.tensor.dim();
  p.id_type = position_ids.integer();
  if (position_rank != rank - 1) {
    fail(o.op, position_ids.name, "expected shape ", rank == 4 ? "[A, B, S]" : "[A, N]",
         " for q of shape ", describe(q.tensor.sizes()), ", got ",
         describe(position_ids.tensor.sizes()));
  }
  p.axes = position_ids.tensor.size(0);
  if (p.axes < 1 || p.axes > kMaxAxes) {
    fail(o.op, position_ids.name, "expected 1 to ", kMaxAxes,
         " axes in its first dimension, got shape ", describe(position_ids.tensor.sizes()));
  }
  const int64_t tokens[] = {p.axes, rank == 4 ? p.batch : p.tokens, p.tokens};
  position_ids.shape({tokens, static_cast<size_t>(position_rank)},
                     rank == 4 ? "[A, B, S] with q's batch and length" : "[A, N] with q's length");
  p.id_stride[0] = position_ids.tensor.stride(0);
  p.id_stride[1] = rank == 4 ? position_ids.tensor.stride(1) : 0;
  p.id_stride[2] = position_ids.tensor.stride(position_rank - 1);
  p.position_ids = position_ids.tensor.const_data_ptr();

  if (o.rotation == "half") {
    p.rotation = Rotation::kHalf;
  } else if (o.rotation == "pairs") {
    p.rotation = Rotation::kPairs;
  } else {
    fail(o.op, "rotation", "expected 'half' or 'pairs', got '", o.rotation, "'");
  }
  p.scaling = o.scaling == o.scaling ? static_cast<float>(o.scaling) : __builtin_nanf("");
  p.sine_sign = o.sine_sign;
  p.norm_eps = static_cast<float>(o.norm_eps);
  if (!(p.norm_eps > 0.0f && p.norm_eps <= std::numeric_limits<float>::max()))
    fail(o.op, "norm_eps", "expected a positive, finite float32 number, got ", o.norm_eps);
  p.norm_offset = static_cast<float>(o.norm_offset);

  const IntType axis_type = freq_axis.integer();
  if (is_on_gpu(q.tensor)) {  // values stay there: the kernel clamps axes
    const ScalarType dtype = inv_freq.tensor.scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::Double &&
        dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
      fail_frequencies(inv_freq);
    }
    frequencies.on_gpu[0] =
        torch::stable::contiguous(torch::stable::to(inv_freq.tensor, ScalarType::Float));
    frequencies.on_gpu[1] =
        torch::stable::contiguous(torch::stable::to(freq_axis.tensor, ScalarType::Int));
    p.inv_freq = static_cast<const float*>(frequencies.on_gpu[0]->const_data_ptr());
    p.freq_axis = static_cast<const int32_t*>(frequencies.on_gpu[1]->const_data_ptr());
    return p;
  }
  read_floats(inv_freq, p.frequencies, frequencies.inv_freq);
  const void* axes = freq_axis.tensor.const_data_ptr();
  const int64_t axis_stride = freq_axis.tensor.stride(0);
  for (int64_t j = 0; j < p.frequencies; ++j) {
    const int64_t axis = load_int(axes, axis_type, j * axis_stride);
    if (axis < 0 || axis >= p.axes) {
      fail(o.op, freq_axis.name, "expected axes in [0, ", p.axes, "), as position_ids has ", p.axes,
           ", got ", axis, " at index ", j);
    }
    frequencies.freq_axis[j] = static_cast<int32_t>(axis);
  }
  p.inv_freq = frequencies.inv_freq;
  p.freq_axis = frequencies.freq_axis;
  return p;
}

// Before anything is written: an in-place op must not stop half way.
void check_ids(const Params& p, const Argument& position_ids) {
  if (is_on_gpu(position_ids.tensor)) return;  // that would take a synchronisation
  if (p.id_type != IntType::kInt64 && p.id_type != IntType::kInt32) return;
  for (int64_t axis = 0; axis < p.axes; ++axis) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t row = axis * p.id_stride[0] + b * p.id_stride[1];
      for (int64_t s = 0; s < p.tokens; ++s) {
        const int64_t id = load_int(p.position_ids, p.id_type, row + s * p.id_stride[2]);
        if (id >= -kMaxId && id <= kMaxId) continue;
        fail(position_ids.op, position_ids.name,
             "expected ids within +-2^24, the integers that float32 holds, got ", id, " at axis ",
             axis, ", batch ", b, ", token ", s);
      }
    }
  }
}

// Tells the emulator of everything that a kernel may touch.
void allow_all(const CudaKernels& kernels, const Params& p, const Argument& position_ids,
               std::initializer_list<const Tensor*> read, std::initializer_list<Tensor*> written) {
  if (kernels.register_buffer == nullptr) return;
  kernels.register_buffer(nullptr, 0, nullptr, false);
  for (const Tensor* t : read) allow(kernels, *t, "an input", true);
  for (Tensor* t : written) allow(kernels, *t, "an output", false);
  allow(kernels, position_ids.tensor, position_ids.name, true);
  kernels.register_buffer(p.inv_freq, p.frequencies * sizeof(float), "inv_freq", true);
  kernels.register_buffer(p.freq_axis, p.frequencies * sizeof(int32_t), "freq_axis", true);
  const char* name[] = {"q_norm_weight", "k_norm_weight"};
  for (int i = 0; i < 2; ++i) {
    const Rows& rows = p.rows[i];
    if (rows.norm_weight == nullptr || p.head_dim == 0) continue;
    const int64_t size = rows.norm_dtype == DType::kFloat32 ? 4 : 2;
    kernels.register_buffer(rows.norm_weight, ((p.head_dim - 1) * rows.norm_stride + 1) * size,
                            name[i], true);
  }
}

void launch_cuda(const CudaKernels& kernels, const char* op, const Params& p, const Tensor& q) {
  const auto device = q.device();
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (is_on_gpu(q)) guard.emplace(device.index());
  check_launch(kernels, op, kernels.mrope(p, stream_of(q)));
}

void launch_cpu(const Params& p) {
  const int64_t tokens = p.batch * p.tokens;
  const int64_t elements = (p.rows[0].heads + p.rows[1].heads) * p.head_dim;  // per token
  if (tokens == 0 || elements == 0) return;
  const mrope::CpuKernel kernel = cpu_kernels().mrope;
  if (tokens <= grain(elements)) return kernel(p, 0, tokens);
  torch::stable::parallel_for(0, tokens, grain(elements),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Returns the weights' gradients [2, D]. Each chunk of tokens has its own sum, and chunks depend
// neither on the number of threads nor on what is needed: neither does the result. `heads` are
// those of q and k, needed or not.
std::vector<double> launch_norm_backward_cpu(const Params& p, int64_t heads) {
  const int64_t tokens = p.batch * p.tokens;
  const int64_t elements = heads * p.head_dim;  // per token
  std::vector<double> total(2 * p.head_dim);
  if (tokens == 0 || elements == 0) return total;
  const int64_t chunk = std::max(grain(elements), (tokens + 63) / 64);
  const int64_t chunks = (tokens + chunk - 1) / chunk;
  std::vector<double> sums(chunks * total.size());
  const CpuNormBackward kernel = cpu_kernels().mrope_norm_backward;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel(p, i * chunk, std::min(tokens, (i + 1) * chunk), sums.data() + i * total.size());
    }
  });
  for (auto sum = sums.cbegin(); sum != sums.cend();)
    for (double& all : total) all += *sum++;
  return total;
}

std::tuple<Tensor, Tensor> out_of_place(const Options& o, const Argument& q, const Argument& k,
                                        const Argument& position_ids, const Argument& inv_freq,
                                        const Argument& freq_axis, const OptionalTensor& q_weight,
                                        const OptionalTensor& k_weight) {
  Frequencies frequencies;
  Params p = check(o, q, k, position_ids, inv_freq, freq_axis, frequencies);
  check_ids(p, position_ids);
  Tensor q_out = torch::stable::empty_like(q.tensor), k_out = torch::stable::empty_like(k.tensor);
  p.rows[0] = rows_of(q.tensor, q_out, o.head_axis);
  p.rows[1] = rows_of(k.tensor, k_out, o.head_axis);
  set_norm(p.rows[0], q, "q_norm_weight", q_weight);
  set_norm(p.rows[1], q, "k_norm_weight", k_weight);
  if (const CudaKernels* kernels = launchers_for(q.tensor)) {
    allow_all(*kernels, p, position_ids, {&q.tensor, &k.tensor}, {&q_out, &k_out});
    launch_cuda(*kernels, o.op, p, q.tensor);
  } else {
    launch_cpu(p);
  }
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& position_ids,
                                   const Tensor& inv_freq, const Tensor& freq_axis,
                                   std::string rotation, double scaling, int64_t head_axis,
                                   OptionalTensor q_norm_weight, OptionalTensor k_norm_weight,
                                   double norm_eps, double norm_offset) {
  const char* op = "mrope";
  return out_of_place({op, rotation, scaling, head_axis, 1.0f, norm_eps, norm_offset}, {op, "q", q},
                      {op, "k", k}, {op, "position_ids", position_ids}, {op, "inv_freq", inv_freq},
                      {op, "freq_axis", freq_axis}, q_norm_weight, k_norm_weight);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_q, const Tensor& grad_k,
                                    const Tensor& position_ids, const Tensor& inv_freq,
                                    const Tensor& freq_axis, std::string rotation, double scaling,
                                    int64_t head_axis) {
  const char* op = "mrope_backward";
  return out_of_place({op, rotation, scaling, head_axis, -1.0f}, {op, "grad_q", grad_q},
                      {op, "grad_k", grad_k}, {op, "position_ids", position_ids},
                      {op, "inv_freq", inv_freq}, {op, "freq_axis", freq_axis}, {}, {});
}

void in_place(Tensor q, Tensor k, const Tensor& position_ids, const Tensor& inv_freq,
              const Tensor& freq_axis, std::string rotation, double scaling, int64_t head_axis,
              OptionalTensor q_norm_weight, OptionalTensor k_norm_weight, double norm_eps,
              double norm_offset) {
  const char* op = "mrope_";
  const Argument q_arg{op, "q", q}, k_arg{op, "k", k}, ids_arg{op, "position_ids", position_ids};
  Frequencies frequencies;
  Params p = check({op, rotation, scaling, head_axis, 1.0f, norm_eps, norm_offset}, q_arg, k_arg,
                   ids_arg, {op, "inv_freq", inv_freq}, {op, "freq_axis", freq_axis}, frequencies);
  check_ids(p, ids_arg);
  q_arg.no_internal_overlap();
  k_arg.no_internal_overlap();
  k_arg.no_overlap_with(q_arg);
  p.rows[0] = rows_of(q, q, head_axis);
  p.rows[1] = rows_of(k, k, head_axis);
  set_norm(p.rows[0], q_arg, "q_norm_weight", q_norm_weight);
  set_norm(p.rows[1], q_arg, "k_norm_weight", k_norm_weight);
  if (const CudaKernels* kernels = launchers_for(q)) {
    allow_all(*kernels, p, ids_arg, {}, {&q, &k});
    return launch_cuda(*kernels, op, p, q);
  }
  launch_cpu(p);
}

// Of q or k: what its gradients are made from, and which are wanted.
struct NormBackward {
  Argument grad;
  const char* name;  // of x
  const OptionalTensor& x;
  const char* weight_name;
  const OptionalTensor& weight;
  bool needs_grad, needs_weight_grad;
};

// Returns the gradient of x, like that of the result; empty if nobody needs it.
Tensor norm_backward_rows(const NormBackward& b, int64_t head_axis, Rows& rows) {
  const int64_t none[] = {0};
  const Tensor& grad = b.grad.tensor;
  Tensor out =
      b.needs_grad ? torch::stable::empty_like(grad) : torch::stable::new_empty(grad, {none, 1});
  rows = rows_of(grad, b.needs_grad ? out : grad, head_axis);
  if (!b.needs_grad && !(b.weight.has_value() && b.needs_weight_grad)) rows.heads = 0;
  set_norm(rows, b.grad, b.weight_name, b.weight);
  rows.needs_grad = b.needs_grad;
  if (!b.weight.has_value()) return out;
  if (!b.x.has_value())
    fail(b.grad.op, b.name, "expected a tensor, since ", b.weight_name, " is given, got None");
  const Argument x{b.grad.op, b.name, *b.x};
  x.device_like(b.grad);
  x.shape(grad.sizes(), "that of its gradient");
  if (b.x->scalar_type() != grad.scalar_type()) {
    fail(x.op, x.name, "expected dtype ", describe(grad.scalar_type()),
         ", that of its gradient, got ", describe(b.x->scalar_type()));
  }
  rows.x = b.x->const_data_ptr();
  arrange(*b.x, head_axis, rows.x_stride);
  rows.needs_weight_grad = b.needs_weight_grad;
  return out;
}

// sum [D] in the dtype of the weight; empty if nobody needs it.
Tensor weight_gradient(const NormBackward& b, const double* sum) {
  if (b.weight.has_value() && b.needs_weight_grad) return rounded_like(*b.weight, sum);
  const int64_t none[] = {0};
  return torch::stable::new_empty(b.weight.has_value() ? *b.weight : b.grad.tensor, {none, 1});
}

// The gradients of the weights of q and k, in their dtypes; of both norms in one launch.
void launch_norm_backward_cuda(const CudaKernels& kernels, const Params& p,
                               const int64_t (&heads)[2], const NormBackward& of_q,
                               const NormBackward& of_k, Tensor (&weight_grad)[2]) {
  const Tensor& grad = of_q.grad.tensor;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (is_on_gpu(grad)) guard.emplace(grad.device().index());
  const int parts = kernels.mrope_norm_backward_parts(p);
  const int64_t scratch[] = {parts, 2, p.head_dim}, none[] = {0};
  Tensor partial = torch::stable::new_empty(grad, {scratch, 3}, ScalarType::Float);
  allow(kernels, partial, "partial sums", false);
  float* sums[2] = {nullptr, nullptr};
  const NormBackward* of[] = {&of_q, &of_k};
  for (int i = 0; i < 2; ++i) {
    const bool wanted = of[i]->weight.has_value() && of[i]->needs_weight_grad;
    const int64_t size[] = {wanted ? p.head_dim : 0};
    weight_grad[i] = torch::stable::new_empty(grad, {size, 1}, ScalarType::Float);
    if (wanted) sums[i] = static_cast<float*>(weight_grad[i].mutable_data_ptr());
    allow(kernels, weight_grad[i], "the gradient of a weight", false);
  }
  check_launch(
      kernels, of_q.grad.op,
      kernels.mrope_norm_backward(p, heads, parts, static_cast<float*>(partial.mutable_data_ptr()),
                                  sums, stream_of(grad)));
  for (int i = 0; i < 2; ++i) {
    if (of[i]->weight.has_value())
      weight_grad[i] = torch::stable::to(weight_grad[i], of[i]->weight->scalar_type());
    else
      weight_grad[i] = torch::stable::new_empty(grad, {none, 1});
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad_q, const Tensor& grad_k, OptionalTensor q, OptionalTensor k,
    const Tensor& position_ids, const Tensor& inv_freq, const Tensor& freq_axis,
    std::string rotation, double scaling, int64_t head_axis, OptionalTensor q_norm_weight,
    OptionalTensor k_norm_weight, double norm_eps, double norm_offset, bool needs_q, bool needs_k,
    bool needs_q_weight, bool needs_k_weight) {
  const char* op = "mrope_norm_backward";
  const NormBackward of_q{{op, "grad_q", grad_q}, "q", q, "q_norm_weight", q_norm_weight, needs_q,
                          needs_q_weight};
  const NormBackward of_k{{op, "grad_k", grad_k}, "k", k, "k_norm_weight", k_norm_weight, needs_k,
                          needs_k_weight};
  const Argument ids{op, "position_ids", position_ids};
  Frequencies frequencies;
  Params p =
      check({op, rotation, scaling, head_axis, -1.0f, norm_eps, norm_offset}, of_q.grad, of_k.grad,
            ids, {op, "inv_freq", inv_freq}, {op, "freq_axis", freq_axis}, frequencies);
  check_ids(p, ids);
  Tensor q_out = norm_backward_rows(of_q, head_axis, p.rows[0]);
  Tensor k_out = norm_backward_rows(of_k, head_axis, p.rows[1]);
  const int64_t heads[2] = {grad_q.size(head_axis), grad_k.size(head_axis)};
  if (const CudaKernels* kernels = launchers_for(grad_q)) {
    allow_all(*kernels, p, ids, {&grad_q, &grad_k}, {&q_out, &k_out});
    if (q.has_value()) allow(*kernels, *q, "q", true);
    if (k.has_value()) allow(*kernels, *k, "k", true);
    Tensor weight_grad[2] = {grad_q, grad_k};
    launch_norm_backward_cuda(*kernels, p, heads, of_q, of_k, weight_grad);
    return {q_out, k_out, weight_grad[0], weight_grad[1]};
  }
  const std::vector<double> sums = launch_norm_backward_cpu(p, heads[0] + heads[1]);
  return {q_out, k_out, weight_gradient(of_q, sums.data()),
          weight_gradient(of_k, sums.data() + p.head_dim)};
}

}  // namespace
}  // namespace vlmops::mrope

#define VLMOPS_MROPE_ROTATION                                                             \
  "Tensor position_ids, Tensor inv_freq, Tensor freq_axis, str rotation=\"half\", float " \
  "scaling=1.0, int head_axis=1"
#define VLMOPS_MROPE_NORM                                                                 \
  ", Tensor? q_norm_weight=None, Tensor? k_norm_weight=None, float norm_eps=1e-6, float " \
  "norm_offset=0.0"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("mrope(Tensor q, Tensor k, " VLMOPS_MROPE_ROTATION VLMOPS_MROPE_NORM
        ") -> (Tensor, Tensor)");
  m.def("mrope_(Tensor(a!) q, Tensor(b!) k, " VLMOPS_MROPE_ROTATION VLMOPS_MROPE_NORM ") -> ()");
  m.def("mrope_backward(Tensor grad_q, Tensor grad_k, " VLMOPS_MROPE_ROTATION
        ") -> (Tensor, Tensor)");
  // The four gradients; those that nobody needs are empty.
  m.def(
      "mrope_norm_backward(Tensor grad_q, Tensor grad_k, Tensor? q, Tensor? "
      "k, " VLMOPS_MROPE_ROTATION VLMOPS_MROPE_NORM
      ", bool needs_q=True, bool needs_k=True, bool needs_q_norm_weight=True, bool "
      "needs_k_norm_weight=True) -> (Tensor, Tensor, Tensor, Tensor)");
}

#define VLMOPS_MROPE_IMPL(m)                                     \
  m.impl("mrope", TORCH_BOX(&vlmops::mrope::forward));           \
  m.impl("mrope_", TORCH_BOX(&vlmops::mrope::in_place));         \
  m.impl("mrope_backward", TORCH_BOX(&vlmops::mrope::backward)); \
  m.impl("mrope_norm_backward", TORCH_BOX(&vlmops::mrope::norm_backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_MROPE_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_MROPE_IMPL(m); }
