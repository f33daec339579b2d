// Gated cross-attention: the norms of q and k, and the attention core. Kernels are those of
// csrc/common/attention* and of pixel shuffle's norms. Between forward and backward normalised q
// and k are not kept: backward makes them again, which costs a tenth of what its products do.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "binding/attention.h"
#include "binding/rms_norm.h"

namespace vlmops::gated_cross_attention {
namespace {

using attention::MaybeTensor;

struct Options {
  const char* op;
  const MaybeTensor &block_mask, &key_lengths, &q_norm_weight, &k_norm_weight;
  std::optional<double> scale;
  double norm_eps;
  int64_t tokens_per_block;

  attention::Options core() const {
    return attention::batched(op, block_mask, key_lengths, scale, tokens_per_block);
  }
};

void check_norm(const Options& o, const char* name, const MaybeTensor& weight, const Tensor& x) {
  if (!weight.has_value()) return;
  const Argument of_norm{o.op, name, *weight};
  of_norm.floating();
  of_norm.device_like({o.op, "q", x});
  const int64_t dim = x.size(x.dim() - 1);
  of_norm.shape({&dim, 1}, "[D], one for each channel of a head");
}

void check_all(const Options& o, const Tensor& q, const Tensor& k, const Tensor& v,
               const MaybeTensor& grad, const MaybeTensor& out, const MaybeTensor& statistics) {
  attention::check(o.core(), q, k, v, grad, out, statistics);
  check_norm(o, "q_norm_weight", o.q_norm_weight, q);
  check_norm(o, "k_norm_weight", o.k_norm_weight, k);
  const auto eps = static_cast<float>(o.norm_eps);
  if (!(eps > 0.0f && eps <= std::numeric_limits<float>::max()))
    fail(o.op, "norm_eps", "expected a positive, finite float32 number, got ", o.norm_eps);
}

Tensor normed(const Options& o, const Tensor& x, const MaybeTensor& weight) {
  return weight.has_value() ? rms_norm(o.op, x, *weight, o.norm_eps) : x;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const MaybeTensor& block_mask, const MaybeTensor& key_lengths,
                                   const MaybeTensor& q_norm_weight,
                                   const MaybeTensor& k_norm_weight, std::optional<double> scale,
                                   double norm_eps, int64_t tokens_per_block) {
  const Options o{"gated_cross_attention", block_mask, key_lengths, q_norm_weight,
                  k_norm_weight,           scale,      norm_eps,    tokens_per_block};
  check_all(o, q, k, v, {}, {}, {});
  return attention::forward(o.core(), normed(o, q, q_norm_weight), normed(o, k, k_norm_weight), v);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& block_mask,
           const MaybeTensor& key_lengths, const MaybeTensor& q_norm_weight,
           const MaybeTensor& k_norm_weight, std::optional<double> scale, double norm_eps,
           int64_t tokens_per_block, const MaybeTensor& grad, const MaybeTensor& out,
           const MaybeTensor& statistics) {
  const char* const op =
      grad.has_value() ? "gated_cross_attention_backward" : "gated_cross_attention";
  check_all({op, block_mask, key_lengths, q_norm_weight, k_norm_weight, scale, norm_eps,
             tokens_per_block},
            q, k, v, grad, out, statistics);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& statistics, const MaybeTensor& block_mask, const MaybeTensor& key_lengths,
    const MaybeTensor& q_norm_weight, const MaybeTensor& k_norm_weight, std::optional<double> scale,
    double norm_eps, int64_t tokens_per_block, bool needs_q, bool needs_k, bool needs_v,
    bool needs_q_norm_weight, bool needs_k_norm_weight) {
  const Options o{"gated_cross_attention_backward",
                  block_mask,
                  key_lengths,
                  q_norm_weight,
                  k_norm_weight,
                  scale,
                  norm_eps,
                  tokens_per_block};
  check_all(o, q, k, v, grad, out, statistics);
  const bool of_q_norm = needs_q_norm_weight && q_norm_weight.has_value();
  const bool of_k_norm = needs_k_norm_weight && k_norm_weight.has_value();
  auto [dq, dk, dv] =
      attention::backward(o.core(), grad, normed(o, q, q_norm_weight), normed(o, k, k_norm_weight),
                          v, out, statistics, needs_q || of_q_norm, needs_k || of_k_norm, needs_v);
  const int64_t nothing[] = {0};
  const Tensor none = torch::stable::new_empty(grad, {nothing, 1});
  Tensor d_q_norm = none, d_k_norm = none;
  if (q_norm_weight.has_value() && (needs_q || of_q_norm))
    std::tie(dq, d_q_norm) =
        rms_norm_backward(o.op, dq, q, *q_norm_weight, norm_eps, needs_q, of_q_norm);
  if (k_norm_weight.has_value() && (needs_k || of_k_norm))
    std::tie(dk, d_k_norm) =
        rms_norm_backward(o.op, dk, k, *k_norm_weight, norm_eps, needs_k, of_k_norm);
  return {dq, dk, dv, d_q_norm, d_k_norm};
}

}  // namespace
}  // namespace vlmops::gated_cross_attention

#define VLMOPS_GATED_CROSS_ATTENTION_OPTIONS                                        \
  "Tensor? block_mask=None, Tensor? key_lengths=None, Tensor? q_norm_weight=None, " \
  "Tensor? k_norm_weight=None, float? scale=None, float norm_eps=1e-6, int tokens_per_block=1"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The result, and of each query [2, H, N] what backward asks for, in float32: attention.h.
  m.def("gated_cross_attention(Tensor q, Tensor k, Tensor v, " VLMOPS_GATED_CROSS_ATTENTION_OPTIONS
        ") -> (Tensor, Tensor)");
  m.def(
      "gated_cross_attention_check(Tensor q, Tensor k, Tensor "
      "v, " VLMOPS_GATED_CROSS_ATTENTION_OPTIONS
      ", Tensor? grad=None, Tensor? out=None, Tensor? statistics=None) -> ()");
  // The gradients of q, k, v and the norms' weights; those that nobody needs are empty.
  m.def(
      "gated_cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor statistics, " VLMOPS_GATED_CROSS_ATTENTION_OPTIONS
      ", bool needs_q=True, bool needs_k=True, bool needs_v=True, bool needs_q_norm_weight=True, "
      "bool needs_k_norm_weight=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#define VLMOPS_GATED_CROSS_ATTENTION_IMPL(m)                                               \
  m.impl("gated_cross_attention", TORCH_BOX(&vlmops::gated_cross_attention::forward));     \
  m.impl("gated_cross_attention_check", TORCH_BOX(&vlmops::gated_cross_attention::check)); \
  m.impl("gated_cross_attention_backward", TORCH_BOX(&vlmops::gated_cross_attention::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_GATED_CROSS_ATTENTION_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_GATED_CROSS_ATTENTION_IMPL(m); }
