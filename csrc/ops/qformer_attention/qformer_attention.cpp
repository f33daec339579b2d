// Attention of learned queries to visual tokens: the attention core, its kernels and checks
// (common/attention*, binding/attention*), under the op's name and with its arguments.
#include <torch/csrc/stable/library.h>

#include "binding/attention.h"

namespace vlmops::qformer_attention {
namespace {

using attention::MaybeTensor;

attention::Options options_of(const MaybeTensor& key_mask, const MaybeTensor& key_lengths,
                              std::optional<double> scale) {
  auto o = attention::batched("qformer_attention", key_mask, key_lengths, scale, 1);
  o.of_blocks = "key_mask";
  return o;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const MaybeTensor& key_mask, const MaybeTensor& key_lengths,
                                   std::optional<double> scale) {
  return attention::forward(options_of(key_mask, key_lengths, scale), q, k, v);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_mask,
           const MaybeTensor& key_lengths, std::optional<double> scale, const MaybeTensor& grad,
           const MaybeTensor& out, const MaybeTensor& statistics) {
  attention::check(options_of(key_mask, key_lengths, scale), q, k, v, grad, out, statistics);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out,
                                            const Tensor& statistics, const MaybeTensor& key_mask,
                                            const MaybeTensor& key_lengths,
                                            std::optional<double> scale, bool needs_q, bool needs_k,
                                            bool needs_v) {
  return attention::backward(options_of(key_mask, key_lengths, scale), grad, q, k, v, out,
                             statistics, needs_q, needs_k, needs_v);
}

}  // namespace
}  // namespace vlmops::qformer_attention

#define VLMOPS_QFORMER_ATTENTION_OPTIONS \
  "Tensor? key_mask=None, Tensor? key_lengths=None, float? scale=None"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The result, and of each query [2, H, N] what backward asks for, in float32: attention.h.
  m.def("qformer_attention(Tensor q, Tensor k, Tensor v, " VLMOPS_QFORMER_ATTENTION_OPTIONS
        ") -> (Tensor, Tensor)");
  m.def("qformer_attention_check(Tensor q, Tensor k, Tensor v, " VLMOPS_QFORMER_ATTENTION_OPTIONS
        ", Tensor? grad=None, Tensor? out=None, Tensor? statistics=None) -> ()");
  // The gradients of q, k and v; those that nobody needs are empty.
  m.def(
      "qformer_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor statistics, " VLMOPS_QFORMER_ATTENTION_OPTIONS
      ", bool needs_q=True, bool needs_k=True, bool needs_v=True) -> (Tensor, Tensor, Tensor)");
}

#define VLMOPS_QFORMER_ATTENTION_IMPL(m)                                           \
  m.impl("qformer_attention", TORCH_BOX(&vlmops::qformer_attention::forward));     \
  m.impl("qformer_attention_check", TORCH_BOX(&vlmops::qformer_attention::check)); \
  m.impl("qformer_attention_backward", TORCH_BOX(&vlmops::qformer_attention::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_QFORMER_ATTENTION_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_QFORMER_ATTENTION_IMPL(m); }
