// Attention of latents to media and to themselves: two calls of the attention core, whose softmaxes
// are joined, so that keys and values of the two lie where they were made. Backward is the core's
// for each, with the joint result and statistics; of q it is the sum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "binding/attention.h"
#include "binding/launch.h"
#include "binding/parallel.h"
#include "common/cpu_kernels.h"

namespace vlmops::perceiver_attention {
namespace {

using attention::MaybeTensor;

constexpr const char* kOp = "perceiver_attention";

struct Options {
  const MaybeTensor &key_mask, &key_lengths;
  std::optional<double> scale;
  int64_t tokens_per_block;

  attention::Options media() const {
    auto o = attention::batched(kOp, key_mask, key_lengths, scale, tokens_per_block);
    o.of_blocks = "key_mask";
    return o;
  }
  attention::Options latents() const {
    static const MaybeTensor none;
    auto o = attention::batched(kOp, none, none, scale, 1);
    o.of_k = "k_latents";
    o.of_v = "v_latents";
    return o;
  }
};

// What the core, which has checked both, does not see.
void check_heads(const Tensor& k, const Tensor& k_latents) {
  if (k.size(2) != k_latents.size(2))
    fail(kOp, "k_latents", "expected the ", k.size(2), " heads of k ", describe(k.sizes()),
         ", got shape ", describe(k_latents.sizes()));
}

DType dtype_of(const Tensor& q) { return Argument{kOp, "q", q}.floating(); }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& k_latents, const Tensor& v_latents,
                                   const MaybeTensor& key_mask, const MaybeTensor& key_lengths,
                                   std::optional<double> scale, int64_t tokens_per_block) {
  const Options o{key_mask, key_lengths, scale, tokens_per_block};
  const auto [out, first] = attention::forward(o.media(), q, k, v);
  const auto [other, of_other] = attention::forward(o.latents(), q, k_latents, v_latents);
  check_heads(k, k_latents);
  const Tensor statistics = torch::stable::new_empty(first, first.sizes());
  if (out.numel() == 0) return {out, statistics};
  const Launch launch(kOp, q);
  const bool on_cpu = launch.kernels == nullptr;
  const double of_logits = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
  const Params p{
      out.mutable_data_ptr(),
      other.const_data_ptr(),
      static_cast<const float*>(first.const_data_ptr()),
      static_cast<const float*>(of_other.const_data_ptr()),
      static_cast<float*>(statistics.mutable_data_ptr()),
      dtype_of(q),
      static_cast<int>(q.size(2)),
      static_cast<int>(q.size(3)),
      q.size(0) * q.size(1),
      on_cpu ? attention::steepness_of(of_logits) : 1.0f};  // a GPU's statistics are in base 2
  if (on_cpu) {
    const auto kernel = cpu_kernels().perceiver_attention_join;
    torch::stable::parallel_for(0, p.rows, grain(p.heads * p.dim),
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    return {out, statistics};
  }
  launch.reads(other, "the result of the latents");
  launch.reads(first, "statistics of the media");
  launch.reads(of_other, "statistics of the latents");
  launch.writes(out, "the result");
  launch.writes(statistics, "statistics");
  launch.run(&CudaKernels::perceiver_attention_join, p);
  return {out, statistics};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_latents,
           const Tensor& v_latents, const MaybeTensor& key_mask, const MaybeTensor& key_lengths,
           std::optional<double> scale, int64_t tokens_per_block, const MaybeTensor& grad,
           const MaybeTensor& out, const MaybeTensor& statistics) {
  const Options o{key_mask, key_lengths, scale, tokens_per_block};
  attention::check(o.media(), q, k, v, grad, out, statistics);
  attention::check(o.latents(), q, k_latents, v_latents, {}, {}, {});
  check_heads(k, k_latents);
}

// first + other as q has it.
Tensor sum_of(const Tensor& first, const Tensor& other, const Tensor& q) {
  const Tensor to = torch::stable::new_empty(q, first.sizes());
  if (to.numel() == 0) return to;
  const Sum s{to.mutable_data_ptr(), static_cast<const float*>(first.const_data_ptr()),
              static_cast<const float*>(other.const_data_ptr()), dtype_of(q), to.numel()};
  const Launch launch(kOp, q);
  if (launch.kernels == nullptr) {
    const auto kernel = cpu_kernels().perceiver_attention_add;
    torch::stable::parallel_for(0, s.count, grain(1),
                                [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
    return to;
  }
  launch.reads(first, "the gradient of q by the media");
  launch.reads(other, "the gradient of q by the latents");
  launch.writes(to, "the gradient of q");
  launch.run(&CudaKernels::perceiver_attention_add, s);
  return to;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_latents,
    const Tensor& v_latents, const Tensor& out, const Tensor& statistics,
    const MaybeTensor& key_mask, const MaybeTensor& key_lengths, std::optional<double> scale,
    int64_t tokens_per_block, bool needs_q, bool needs_k, bool needs_v, bool needs_k_latents,
    bool needs_v_latents) {
  const Options o{key_mask, key_lengths, scale, tokens_per_block};
  const auto [dq, dk, dv] = attention::backward(o.media(), grad, q, k, v, out, statistics, needs_q,
                                                needs_k, needs_v, true);
  const auto [more, dk_latents, dv_latents] =
      attention::backward(o.latents(), grad, q, k_latents, v_latents, out, statistics, needs_q,
                          needs_k_latents, needs_v_latents, true);
  check_heads(k, k_latents);
  return {sum_of(dq, more, q), dk, dv, dk_latents, dv_latents};
}

}  // namespace
}  // namespace vlmops::perceiver_attention

#define VLMOPS_PERCEIVER_ATTENTION_HEADS \
  "Tensor q, Tensor k, Tensor v, Tensor k_latents, Tensor v_latents, "
#define VLMOPS_PERCEIVER_ATTENTION_OPTIONS \
  "Tensor? key_mask=None, Tensor? key_lengths=None, float? scale=None, int tokens_per_block=1"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The result, and of each query [2, H, N] what backward asks for, in float32: attention.h.
  m.def("perceiver_attention(" VLMOPS_PERCEIVER_ATTENTION_HEADS VLMOPS_PERCEIVER_ATTENTION_OPTIONS
        ") -> (Tensor, Tensor)");
  m.def(
      "perceiver_attention_"
      "check(" VLMOPS_PERCEIVER_ATTENTION_HEADS VLMOPS_PERCEIVER_ATTENTION_OPTIONS
      ", Tensor? grad=None, Tensor? out=None, Tensor? statistics=None) -> ()");
  // The gradients of the first five; those that nobody needs are empty.
  m.def("perceiver_attention_backward(Tensor grad, " VLMOPS_PERCEIVER_ATTENTION_HEADS
        "Tensor out, Tensor statistics, " VLMOPS_PERCEIVER_ATTENTION_OPTIONS
        ", bool needs_q=True, bool needs_k=True, bool needs_v=True, bool needs_k_latents=True, "
        "bool needs_v_latents=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define VLMOPS_PERCEIVER_ATTENTION_IMPL(m)                                             \
  m.impl("perceiver_attention", TORCH_BOX(&vlmops::perceiver_attention::forward));     \
  m.impl("perceiver_attention_check", TORCH_BOX(&vlmops::perceiver_attention::check)); \
  m.impl("perceiver_attention_backward", TORCH_BOX(&vlmops::perceiver_attention::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_PERCEIVER_ATTENTION_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_PERCEIVER_ATTENTION_IMPL(m); }
