// Checks, Tensor -> Params and launches of the ops on the attention core.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "binding/attention.h"
#include "binding/launch.h"
#include "common/cpu_kernels.h"

namespace vlmops::attention {
namespace {

using Sizes = std::vector<int64_t>;

// A tensor whose channels are side by side; a copy if they are not.
Tensor readable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
}

Heads heads_of(const Tensor& t) {
  const bool batched = t.dim() == 4;
  const int64_t row = batched ? 1 : 0;
  return {t.const_data_ptr(), batched ? t.stride(0) : 0, t.stride(row), t.stride(row + 1)};
}

int64_t rows_of(const Tensor& t) { return t.dim() == 4 ? t.size(0) * t.size(1) : t.size(0); }

void check_heads(const Argument& x, const Argument& q) {
  const auto sizes = x.tensor.sizes(), of_q = q.tensor.sizes();
  x.device_like(q);
  if (x.tensor.scalar_type() != q.tensor.scalar_type())
    fail(x.op, x.name, "expected dtype ", describe(q.tensor.scalar_type()), ", that of q, got ",
         describe(x.tensor.scalar_type()));
  if (x.tensor.dim() != q.tensor.dim())
    fail(x.op, x.name, "expected as many dimensions as q has, shape ", describe(of_q),
         ", got shape ", describe(sizes));
  const size_t last = sizes.size() - 1;
  if (sizes[last] != of_q[last])
    fail(x.op, x.name, "expected heads of ", of_q[last], " channels, as q ", describe(of_q),
         " has, got shape ", describe(sizes));
  if (last == 3 && sizes[0] != of_q[0])
    fail(x.op, x.name, "expected a batch of ", of_q[0], ", as q ", describe(of_q),
         " has, got shape ", describe(sizes));
  const int64_t heads = sizes[last - 1];
  if (heads == 0 ? of_q[last - 1] != 0 : of_q[last - 1] % heads != 0)
    fail(x.op, x.name, "expected a number of heads that divides q's ", of_q[last - 1],
         ", got shape ", describe(sizes));
}

// Looks at the values where they are on the host.
void check_starts(const Argument& starts, int64_t rows, const char* of, int64_t longest) {
  const IntType type = starts.integer();
  const Tensor& t = starts.tensor;
  if (type != IntType::kInt64 && type != IntType::kInt32)
    fail(starts.op, starts.name, "expected dtype int32 or int64, got ", describe(t.scalar_type()));
  if (t.dim() != 1 || t.size(0) == 0)
    fail(starts.op, starts.name, "expected [segments + 1] integers, got shape ",
         describe(t.sizes()));
  if (!t.is_cpu()) return;
  const auto at = [&](int64_t i) { return load_int(t.const_data_ptr(), type, i * t.stride(0)); };
  if (at(0) != 0) fail(starts.op, starts.name, "expected 0 first, got ", at(0));
  const int64_t segments = t.size(0) - 1;
  for (int64_t i = 0; i < segments; ++i) {
    if (at(i + 1) < at(i))
      fail(starts.op, starts.name, "expected ends that do not fall, got ", at(i + 1), " after ",
           at(i), " at ", i + 1);
    if (longest != 0 && at(i + 1) - at(i) > longest)
      fail(starts.op, "max_seqlen", "expected at least the ", at(i + 1) - at(i),
           " rows of segment ", i, ", got ", longest);
  }
  if (at(segments) != rows)
    fail(starts.op, starts.name, "expected ", rows, " last, the rows of ", of, ", got ",
         at(segments));
}

// Everything but what is computed.
struct Call {
  Params p;
  Tensor q, k, v;                // readable
  MaybeTensor starts, starts_k;  // where q is
  MaybeTensor padding, block_mask, key_lengths;
};

// On q's device, its elements side by side.
MaybeTensor placed(const MaybeTensor& given, const Tensor& q) {
  if (!given.has_value()) return {};
  Tensor t = torch::stable::contiguous(*given);
  if (t.is_cpu() && !q.is_cpu()) t = torch::stable::to(t, q.device());
  return t;
}

// A mask of blocks, for q [B, S, H, D] over k [B, S_k, H_kv, D].
void check_blocks(const Options& o, const Argument& q, const Tensor& k) {
  if (o.tokens_per_block < 1)
    fail(o.op, "tokens_per_block", "expected 1 or more, got ", o.tokens_per_block);
  if (!o.block_mask.has_value()) {
    if (o.tokens_per_block != 1)
      fail(o.op, "tokens_per_block", "expected 1 where there is no ", o.of_blocks, ", got ",
           o.tokens_per_block);
    return;
  }
  const Argument mask{o.op, o.of_blocks, *o.block_mask};
  mask.device_like(q);
  mask.boolean();
  if (o.cu_seqlens.has_value() || o.padding.has_value() || o.causal)
    fail(o.op, mask.name, "expected none beside cu_seqlens, padding or causal");
  const auto sizes = q.tensor.sizes();
  if (k.size(1) % o.tokens_per_block != 0)
    fail(o.op, "tokens_per_block", "expected a number that divides the ", k.size(1), " keys of ",
         o.of_k, " ", describe(k.sizes()), ", got ", o.tokens_per_block);
  mask.shape(Sizes{sizes[0], sizes[1], k.size(1) / o.tokens_per_block},
             "queries of q by blocks of tokens_per_block keys");
}

// Keys that rows of a batch have; looks at the values where they are on the host.
void check_lengths(const Options& o, const Argument& q, const Tensor& k) {
  if (!o.key_lengths.has_value()) return;
  const Argument lengths{o.op, "key_lengths", *o.key_lengths};
  const Tensor& t = lengths.tensor;
  const IntType type = lengths.integer();
  if (type != IntType::kInt64 && type != IntType::kInt32)
    fail(o.op, lengths.name, "expected dtype int32 or int64, got ", describe(t.scalar_type()));
  if (o.cu_seqlens.has_value() || o.padding.has_value() || o.causal)
    fail(o.op, lengths.name, "expected none beside cu_seqlens, padding or causal");
  lengths.shape(Sizes{k.size(0)}, "one for each row of the batch");
  if (!t.is_cpu()) return lengths.device_like(q);
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t count = load_int(t.const_data_ptr(), type, i * t.stride(0));
    if (count < 0 || count > k.size(1))
      fail(o.op, lengths.name, "expected 0 to ", k.size(1), ", the keys of k ", describe(k.sizes()),
           ", got ", count, " at ", i);
  }
}

// Checks options and sizes.
Call call_of(const Options& o, const Tensor& q, const Tensor& k, const Tensor& v) {
  const Argument of_q{o.op, "q", q}, of_k{o.op, o.of_k, k}, of_v{o.op, o.of_v, v};
  const int64_t rank = q.dim();
  Call call{{}, q, k, v, {}, {}, {}, {}, {}};
  Params& p = call.p;
  p.dtype = of_q.floating();
  const bool packed = o.cu_seqlens.has_value();
  if (rank != (packed ? 3 : 4))
    fail(o.op, "q", "expected ",
         packed ? "[N, H, D] with cu_seqlens" : "[B, S, H, D] without cu_seqlens", ", got shape ",
         describe(q.sizes()));
  check_heads(of_k, of_q);
  check_heads(of_v, of_q);
  of_v.shape(k.sizes(), (std::string("that of ") + o.of_k).c_str());
  const int64_t dim = q.size(rank - 1);
  if (dim % 8 != 0 || dim < 8 || dim > kMaxDim)
    fail(o.op, "q", "expected heads of a multiple of 8 channels up to ", kMaxDim, ", got shape ",
         describe(q.sizes()));
  p.heads = static_cast<int>(q.size(rank - 2));
  p.kv_heads = static_cast<int>(k.size(rank - 2));
  p.dim = static_cast<int>(dim);
  p.rows = rows_of(q);
  p.keys = rows_of(k);
  const double scale = o.scale.value_or(1.0 / std::sqrt(static_cast<double>(dim)));
  if (!std::isfinite(scale)) fail(o.op, "scale", "expected a finite number, got ", scale);
  p.scale = static_cast<float>(scale);
  p.scale_rest = static_cast<float>(scale - p.scale);
  p.causal = o.causal;
  if (o.max_seqlen < 0) fail(o.op, "max_seqlen", "expected 0 or more, got ", o.max_seqlen);
  p.longest = packed ? o.max_seqlen : q.size(1);
  if (packed) {
    const Argument starts{o.op, "cu_seqlens", *o.cu_seqlens};
    check_starts(starts, p.rows, "q", o.max_seqlen);
    if (!starts.tensor.is_cpu()) starts.device_like(of_q);
    p.segments = starts.tensor.size(0) - 1;
  } else {
    if (o.cu_seqlens_k.has_value())
      fail(o.op, "cu_seqlens_k", "expected none without cu_seqlens, got one");
    if (o.max_seqlen != 0 && o.max_seqlen < p.longest)
      fail(o.op, "max_seqlen", "expected at least the ", p.longest, " rows of q ",
           describe(q.sizes()), ", got ", o.max_seqlen);
    p.segments = q.size(0);
    p.q_starts.length = q.size(1);
    p.k_starts.length = k.size(1);
  }
  if (o.cu_seqlens_k.has_value()) {
    const Argument starts{o.op, "cu_seqlens_k", *o.cu_seqlens_k};
    check_starts(starts, p.keys, "k", 0);
    if (!starts.tensor.is_cpu()) starts.device_like(of_q);
    if (starts.tensor.size(0) != p.segments + 1)
      fail(o.op, starts.name, "expected ", p.segments + 1,
           " integers, as cu_seqlens has, got shape ", describe(starts.tensor.sizes()));
  } else if (packed && p.keys != p.rows) {
    fail(o.op, "k", "expected the ", p.rows, " rows of q ", describe(q.sizes()),
         " where there is no cu_seqlens_k, got shape ", describe(k.sizes()));
  }
  if (o.padding.has_value()) {
    const Argument padding{o.op, "padding", *o.padding};
    padding.device_like(of_q);
    padding.boolean();
    padding.shape(packed ? Sizes{q.size(0)} : Sizes{q.size(0), q.size(1)}, "one for each query");
    if (o.cu_seqlens_k.has_value() || p.keys != p.rows)
      fail(o.op, padding.name, "expected none where queries and keys have segments of their own");
    if (o.causal) fail(o.op, padding.name, "expected none where causal");
  }
  check_blocks(o, of_q, k);
  check_lengths(o, of_q, k);
  call.q = readable(q);
  call.k = readable(k);
  call.v = readable(v);
  p.q = heads_of(call.q);
  p.k = heads_of(call.k);
  p.v = heads_of(call.v);
  call.starts = placed(o.cu_seqlens, q);
  call.starts_k = o.cu_seqlens_k.has_value() ? placed(o.cu_seqlens_k, q) : call.starts;
  call.padding = placed(o.padding, q);
  const auto width_of = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Long ? IntType::kInt64 : IntType::kInt32;
  };
  const auto starts_of = [&](const MaybeTensor& t, int64_t length) {
    if (!t.has_value()) return Starts{nullptr, IntType::kInt64, length, nullptr, {}};
    return Starts{t->const_data_ptr(), width_of(*t), 0, nullptr, {}};
  };
  p.q_starts = starts_of(call.starts, p.q_starts.length);
  p.k_starts = starts_of(call.starts_k, p.k_starts.length);
  call.key_lengths = placed(o.key_lengths, q);
  if (call.key_lengths.has_value()) {
    p.k_starts.lengths = call.key_lengths->const_data_ptr();
    p.k_starts.lengths_type = width_of(*call.key_lengths);
  }
  if (call.padding.has_value())
    p.padding = static_cast<const bool*>(call.padding->const_data_ptr());
  call.block_mask = placed(o.block_mask, q);
  if (call.block_mask.has_value()) {
    p.blocks = static_cast<const bool*>(call.block_mask->const_data_ptr());
    p.block = o.tokens_per_block;
    p.block_count = call.block_mask->size(2);
  }
  return call;
}

void allow_reads(const Options& o, const Launch& launch, const Call& call) {
  launch.reads(call.q, "q");
  launch.reads(call.k, o.of_k);
  launch.reads(call.v, o.of_v);
  launch.reads(call.starts, "cu_seqlens");
  launch.reads(call.starts_k, "cu_seqlens_k");
  launch.reads(call.padding, "padding");
  launch.reads(call.block_mask, o.of_blocks);
  launch.reads(call.key_lengths, "key_lengths");
}

// Memory that a launch needs for itself.
Tensor scratch_for(const Launch& launch, const Tensor& like, int64_t bytes) {
  Tensor t = torch::stable::new_empty(like, Sizes{(bytes + 3) / 4}, ScalarType::Float);
  launch.writes(t, "scratch");
  return t;
}

// Of backward's tensors beside q, k and v.
void check_saved(const char* op, const Params& p, const Tensor& q, const MaybeTensor& grad,
                 const MaybeTensor& out, const MaybeTensor& statistics) {
  const Argument of_q{op, "q", q};
  const auto like_q = [&](const char* name, const MaybeTensor& given) {
    if (!given.has_value()) return;
    const Argument x{op, name, *given};
    x.device_like(of_q);
    x.shape(q.sizes(), "that of q");
    if (given->scalar_type() != q.scalar_type())
      fail(op, name, "expected dtype ", describe(q.scalar_type()), ", that of q, got ",
           describe(given->scalar_type()));
  };
  like_q("grad", grad);
  like_q("out", out);
  if (!statistics.has_value()) return;
  const Argument x{op, "statistics", *statistics};
  x.device_like(of_q);
  x.shape(Sizes{2, p.heads, p.rows}, "[2, H, N]");
  if (statistics->scalar_type() != ScalarType::Float)
    fail(op, "statistics", "expected dtype float32, got ", describe(statistics->scalar_type()));
}

}  // namespace

void check(const Options& o, const Tensor& q, const Tensor& k, const Tensor& v,
           const MaybeTensor& grad, const MaybeTensor& out, const MaybeTensor& statistics) {
  check_saved(o.op, call_of(o, q, k, v).p, q, grad, out, statistics);
}

std::tuple<Tensor, Tensor> forward(const Options& o, const Tensor& q, const Tensor& k,
                                   const Tensor& v) {
  Call call = call_of(o, q, k, v);
  Params& p = call.p;
  Tensor out = torch::stable::new_empty(q, Sizes(q.sizes().begin(), q.sizes().end()));
  Tensor statistics = torch::stable::new_empty(q, Sizes{2, p.heads, p.rows}, ScalarType::Float);
  if (out.numel() == 0) return {out, statistics};
  p.out = out.mutable_data_ptr();
  p.most = static_cast<float*>(statistics.mutable_data_ptr());
  p.part = p.most + p.heads * p.rows;
  const Launch launch(o.op, q);
  if (launch.kernels == nullptr) {
    forward_on_cpu(p);
    return {out, statistics};
  }
  allow_reads(o, launch, call);
  launch.writes(out, "the result");
  launch.writes(statistics, "statistics");
  const Tensor scratch =
      scratch_for(launch, q, launch.kernels->packed_attention_forward_scratch(p));
  launch.run(&CudaKernels::packed_attention_forward, p, scratch.mutable_data_ptr());
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Options& o, const Tensor& grad, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& statistics, bool needs_q, bool needs_k,
                                            bool needs_v, bool exact_q) {
  Call call = call_of(o, q, k, v);
  Backward b{};
  b.p = call.p;
  check_saved(o.op, b.p, q, grad, out, statistics);
  const auto made = [&](const Tensor& like, bool needed, bool exact = false) {
    return torch::stable::new_empty(
        like, needed ? Sizes(like.sizes().begin(), like.sizes().end()) : Sizes{0},
        exact ? ScalarType::Float : like.scalar_type());
  };
  b.exact_dq = exact_q;
  Tensor dq = made(q, needs_q, exact_q), dk = made(k, needs_k), dv = made(v, needs_v);
  if (dq.numel() + dk.numel() + dv.numel() == 0) return {dq, dk, dv};
  if (o.key_lengths.has_value()) {  // kernels write no further
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  const Tensor given = readable(grad), result = torch::stable::contiguous(out);
  const Tensor sums = torch::stable::contiguous(statistics);
  b.grad = heads_of(given);
  b.p.out = const_cast<void*>(result.const_data_ptr());
  b.p.most = const_cast<float*>(static_cast<const float*>(sums.const_data_ptr()));
  b.p.part = b.p.most + b.p.heads * b.p.rows;
  const auto pointer = [](const Tensor& t) {
    return t.numel() == 0 ? nullptr : t.mutable_data_ptr();
  };
  b.dq = pointer(dq);
  b.dk = pointer(dk);
  b.dv = pointer(dv);
  const Launch launch(o.op, q);
  if (launch.kernels == nullptr) {
    backward_on_cpu(b);
    return {dq, dk, dv};
  }
  const Tensor delta = torch::stable::new_empty(sums, Sizes{b.p.heads, b.p.rows});
  b.delta = static_cast<float*>(delta.mutable_data_ptr());
  allow_reads(o, launch, call);
  launch.reads(given, "grad");
  launch.reads(result, "out");
  launch.reads(sums, "statistics");
  launch.writes(delta, "delta");
  launch.writes(dq, "the gradient of q");
  launch.writes(dk, "the gradient of k");
  launch.writes(dv, "the gradient of v");
  const Tensor scratch =
      scratch_for(launch, q, launch.kernels->packed_attention_backward_scratch(b));
  launch.run(&CudaKernels::packed_attention_backward, b, scratch.mutable_data_ptr());
  return {dq, dk, dv};
}

}  // namespace vlmops::attention
