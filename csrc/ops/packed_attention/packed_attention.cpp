// The schema of packed attention; what it calls is binding/attention_call.cpp's.
#include <torch/csrc/stable/library.h>

#include "binding/attention.h"

namespace vlmops::packed_attention {
namespace {

using attention::MaybeTensor;
using attention::Options;

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const MaybeTensor& cu_seqlens, const MaybeTensor& cu_seqlens_k,
                                   const MaybeTensor& padding, const MaybeTensor& block_mask,
                                   const MaybeTensor& key_lengths, std::optional<double> scale,
                                   bool causal, int64_t max_seqlen, int64_t tokens_per_block) {
  const Options o{"packed_attention", cu_seqlens, cu_seqlens_k, padding,    block_mask,
                  key_lengths,        scale,      causal,       max_seqlen, tokens_per_block};
  return attention::forward(o, q, k, v);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& cu_seqlens,
           const MaybeTensor& cu_seqlens_k, const MaybeTensor& padding,
           const MaybeTensor& block_mask, const MaybeTensor& key_lengths,
           std::optional<double> scale, bool causal, int64_t max_seqlen, int64_t tokens_per_block,
           const MaybeTensor& grad, const MaybeTensor& out, const MaybeTensor& statistics) {
  const char* const op = grad.has_value() ? "packed_attention_backward" : "packed_attention";
  const Options o{op,          cu_seqlens, cu_seqlens_k, padding,    block_mask,
                  key_lengths, scale,      causal,       max_seqlen, tokens_per_block};
  attention::check(o, q, k, v, grad, out, statistics);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& statistics, const MaybeTensor& cu_seqlens, const MaybeTensor& cu_seqlens_k,
    const MaybeTensor& padding, const MaybeTensor& block_mask, const MaybeTensor& key_lengths,
    std::optional<double> scale, bool causal, int64_t max_seqlen, int64_t tokens_per_block,
    bool needs_q, bool needs_k, bool needs_v) {
  const Options o{"packed_attention_backward",
                  cu_seqlens,
                  cu_seqlens_k,
                  padding,
                  block_mask,
                  key_lengths,
                  scale,
                  causal,
                  max_seqlen,
                  tokens_per_block};
  return attention::backward(o, grad, q, k, v, out, statistics, needs_q, needs_k, needs_v);
}

}  // namespace
}  // namespace vlmops::packed_attention

#define VLMOPS_PACKED_ATTENTION_OPTIONS                                        \
  "Tensor? cu_seqlens=None, Tensor? cu_seqlens_k=None, Tensor? padding=None, " \
  "Tensor? block_mask=None, Tensor? key_lengths=None, float? scale=None, "     \
  "bool causal=False, int max_seqlen=0, int tokens_per_block=1"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  // The result, and of each query [2, H, N] what backward asks for, in float32: attention.h.
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, " VLMOPS_PACKED_ATTENTION_OPTIONS
        ") -> (Tensor, Tensor)");
  // The gradients of q, k and v; those that nobody needs are empty.
  m.def("packed_attention_check(Tensor q, Tensor k, Tensor v, " VLMOPS_PACKED_ATTENTION_OPTIONS
        ", Tensor? grad=None, Tensor? out=None, Tensor? statistics=None) -> ()");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor statistics, " VLMOPS_PACKED_ATTENTION_OPTIONS
      ", bool needs_q=True, bool needs_k=True, bool needs_v=True) -> (Tensor, Tensor, Tensor)");
}

#define VLMOPS_PACKED_ATTENTION_IMPL(m)                                          \
  m.impl("packed_attention", TORCH_BOX(&vlmops::packed_attention::forward));     \
  m.impl("packed_attention_check", TORCH_BOX(&vlmops::packed_attention::check)); \
  m.impl("packed_attention_backward", TORCH_BOX(&vlmops::packed_attention::backward))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_PACKED_ATTENTION_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_PACKED_ATTENTION_IMPL(m); }
