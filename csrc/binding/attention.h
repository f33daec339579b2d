// The attention core as ops see it: arguments and their checks, calls, and how the work is cut and
// shared among the CPU's threads.
#pragma once

#include <optional>
#include <tuple>

#include "binding/check.h"
#include "common/attention.h"

namespace vlmops::attention {

using MaybeTensor = std::optional<Tensor>;

// Of an op on the core, which messages name; see vlmops/ops/packed_attention.py.
struct Options {
  const char* op;
  const MaybeTensor &cu_seqlens, &cu_seqlens_k, &padding, &block_mask, &key_lengths;
  std::optional<double> scale;
  bool causal;
  int64_t max_seqlen, tokens_per_block;
  // What messages call them.
  const char *of_k = "k", *of_v = "v", *of_blocks = "block_mask";
};

// Of an op whose segments are the rows of a batch, and whose queries see keys alike but for these.
inline Options batched(const char* op, const MaybeTensor& block_mask,
                       const MaybeTensor& key_lengths, std::optional<double> scale,
                       int64_t tokens_per_block) {
  static const MaybeTensor none;
  return {op, none, none, none, block_mask, key_lengths, scale, false, 0, tokens_per_block};
}

// What forward and backward raise of arguments that do not fit.
void check(const Options& o, const Tensor& q, const Tensor& k, const Tensor& v,
           const MaybeTensor& grad, const MaybeTensor& out, const MaybeTensor& statistics);

// The result, and of each query [2, H, N] what backward asks for.
std::tuple<Tensor, Tensor> forward(const Options& o, const Tensor& q, const Tensor& k,
                                   const Tensor& v);

// The gradients of q, k and v; those that nobody needs are empty. exact_q: that of q is float32.
std::tuple<Tensor, Tensor, Tensor> backward(const Options& o, const Tensor& grad, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& statistics, bool needs_q, bool needs_k,
                                            bool needs_v, bool exact_q = false);

void forward_on_cpu(const Params& p);
void backward_on_cpu(const Backward& b);

}  // namespace vlmops::attention
