// The only file of the spatial aggregation that knows torch: schema, checks, Tensor -> Params,
// registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "binding/check.h"
#include "binding/launch.h"
#include "binding/parallel.h"
#include "binding/rows.h"
#include "common/cpu_kernels.h"

#if defined(__GLIBCXX__)
// What a list of tensors is returned by asks for a C++ library of 2021, for this alone.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw std::bad_alloc(); }
}  // namespace std
__asm__(".hidden _ZSt28__throw_bad_array_new_lengthv");  // libstdc++'s declaration says default
#endif

namespace vlmops::spatial_aggregate {
namespace {

using Tensors = std::vector<Tensor>;
using Masks = std::vector<std::optional<Tensor>>;

std::string item(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

struct Call {
  const char* op;
  const Tensor& q;
  const Tensors &keys, &values;
  const Masks& masks;
  std::optional<double> scale;
};

void check_like_q(const Argument& a, const Argument& q) {
  a.device_like(q);
  if (a.tensor.scalar_type() != q.tensor.scalar_type()) {
    fail(a.op, a.name, "expected dtype ", describe(q.tensor.scalar_type()), ", that of q, got ",
         describe(a.tensor.scalar_type()));
  }
}

void check_q(const Argument& q, Params& p) {
  p.dtype = q.floating();
  const auto sizes = q.tensor.sizes();
  if (sizes.size() != 5)
    fail(q.op, "q", "expected [B, G_h, G_w, H, D], got shape ", describe(sizes));
  if (sizes[1] == 0 || sizes[2] == 0)
    fail(q.op, "q", "expected a grid of at least one query, got shape ", describe(sizes));
  if (sizes[4] % 8 != 0 || sizes[4] < 8 || sizes[4] > kMaxHeadDim) {
    fail(q.op, "q", "expected heads of a multiple of 8 channels up to ", kMaxHeadDim,
         ", got shape ", describe(sizes));
  }
  p.batch = sizes[0];
  p.grid_h = sizes[1];
  p.grid_w = sizes[2];
  p.heads = static_cast<int>(sizes[3]);
  p.head_dim = static_cast<int>(sizes[4]);
}

// One encoder's map, its values and mask; its windows.
void check_encoder(const Call& call, size_t i, const Argument& q, Params& p) {
  const std::string key_name = item("keys", i), value_name = item("values", i);
  const Argument key{call.op, key_name.c_str(), call.keys[i]};
  const Argument value{call.op, value_name.c_str(), call.values[i]};
  const auto sizes = key.tensor.sizes(), of_q = q.tensor.sizes();
  check_like_q(key, q);
  const bool fits = sizes.size() == 5 && sizes[0] == of_q[0] && sizes[3] == of_q[3] &&
                    sizes[4] == of_q[4] && sizes[1] > 0 && sizes[2] > 0 &&
                    sizes[1] % p.grid_h == 0 && sizes[2] % p.grid_w == 0;
  if (!fits) {
    fail(call.op, key.name, "expected [", of_q[0], ", h, w, ", of_q[3], ", ", of_q[4],
         "], h and w multiples of the grid ", p.grid_h, " x ", p.grid_w, " of q ", describe(of_q),
         ", got shape ", describe(sizes));
  }
  Encoder& of = p.encoders[i];
  const int64_t height = sizes[1] / p.grid_h, width = sizes[2] / p.grid_w;
  if (height > kMaxKeys || width > kMaxKeys || p.keys + height * width > kMaxKeys) {
    fail(call.op, key.name, "expected at most ", kMaxKeys,
         " keys for a query, over all encoders, got a window of ", height, " x ", width, " beside ",
         p.keys, " others");
  }
  check_like_q(value, q);
  value.shape(sizes, key.name);
  of.height = static_cast<int>(height);
  of.width = static_cast<int>(width);
  p.keys += of.height * of.width;
  if (call.masks.empty() || !call.masks[i].has_value()) return;
  const std::string mask_name = item("masks", i);
  const Argument mask{call.op, mask_name.c_str(), *call.masks[i]};
  mask.boolean();
  mask.device_like(q);
  mask.shape(Sizes{sizes[0], sizes[1], sizes[2]}, "one for each token of the encoder's map");
}

// All but pointers and strides.
Params check(const Call& call) {
  Params p{};
  const Argument q{call.op, "q", call.q};
  check_q(q, p);
  const size_t count = call.keys.size();
  if (count < 1 || count > kMaxEncoders)
    fail(call.op, "keys", "expected one map each of 1 to ", kMaxEncoders, " encoders, got ", count);
  if (call.values.size() != count)
    fail(call.op, "values", "expected as many as keys, ", count, ", got ", call.values.size());
  if (!call.masks.empty() && call.masks.size() != count) {
    fail(call.op, "masks", "expected one for each of the ", count, " encoders, or none, got ",
         call.masks.size());
  }
  p.encoder_count = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) check_encoder(call, i, q, p);
  const double scale = call.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  if (!std::isfinite(scale)) fail(call.op, "scale", "expected a finite number, got ", scale);
  p.scale = static_cast<float>(scale);
  return p;
}

void check_grad(const Argument& grad, const Argument& q) {
  check_like_q(grad, q);
  grad.shape(q.tensor.sizes(), "that of the result");
}

Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.dim() == 5 ? t.stride(3) : 0};
}

// A tensor as kernels read it: channels side by side and, on a GPU, rows on 16 bytes.
Tensor laid_out(const Tensor& t, const Launch& launch) {
  const int64_t pack = t.scalar_type() == ScalarType::Float ? 4 : 8;  // elements
  const auto on_packs = [&](const Tensor& x) {
    bool on = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < 4; ++i) on = on && (x.size(i) == 1 || x.stride(i) % pack == 0);
    return on || launch.kernels == nullptr;
  };
  if (t.stride(4) == 1 && on_packs(t)) return t;
  const Tensor copy = torch::stable::contiguous(t);
  return on_packs(copy) ? copy : torch::stable::clone(copy);
}

// Pointers and strides of what is read, and the tensors that hold the memory.
struct Operands {
  Tensors kept;

  Operands(const Call& call, const Launch& launch, const std::optional<Tensor>& grad, Params& p) {
    const auto keep = [&](const Tensor& t, const std::string& name) -> const Tensor& {
      kept.push_back(laid_out(t, launch));
      launch.reads(kept.back(), name.c_str());
      return kept.back();
    };
    const auto take = [&](const Tensor& t, const std::string& name, const void*& data,
                          Strides& stride) {
      const Tensor& laid = keep(t, name);
      data = laid.const_data_ptr();
      stride = strides_of(laid);
    };
    take(call.q, "q", p.q, p.q_stride);
    if (grad.has_value()) take(*grad, "grad", p.grad, p.grad_stride);
    for (size_t i = 0; i < call.keys.size(); ++i) {
      Encoder& of = p.encoders[i];
      take(call.keys[i], item("keys", i), of.key, of.key_stride);
      take(call.values[i], item("values", i), of.value, of.value_stride);
      if (call.masks.empty() || !call.masks[i].has_value()) continue;
      const Tensor& mask = *call.masks[i];
      launch.reads(mask, item("masks", i).c_str());
      of.mask = static_cast<const bool*>(mask.const_data_ptr());
      of.mask_stride = strides_of(mask);
    }
  }
};

void run(const Launch& launch, const Params& p, CpuKernel kernel,
         CudaKernel CudaKernels::* on_gpu) {
  if (launch.kernels != nullptr) return launch.run(on_gpu, p);
  const int64_t elements = int64_t{2} * p.keys * p.heads * p.head_dim;
  torch::stable::parallel_for(0, p.cells(), grain(elements),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Unless kMade the result is left empty.
template <bool kMade>
Tensor forward(const Tensor& q, const Tensors& keys, const Tensors& values, const Masks& masks,
               std::optional<double> scale) {
  const Call call{"spatial_aggregate", q, keys, values, masks, scale};
  Params p = check(call);
  Tensor out = torch::stable::new_empty(q, sizes_of(q));
  if (!kMade || out.numel() == 0) return out;
  const Launch launch(call.op, q);
  const Operands operands(call, launch, std::nullopt, p);
  launch.writes(out, "the result");
  p.out = out.mutable_data_ptr();
  run(launch, p, cpu_kernels().spatial_aggregate, &CudaKernels::spatial_aggregate);
  return out;
}

// The gradients of q, of keys and of values, in this order.
template <bool kMade>
Tensors backward(const Tensor& grad, const Sizes& needs, const Tensor& q, const Tensors& keys,
                 const Tensors& values, const Masks& masks, std::optional<double> scale) {
  const Call call{"spatial_aggregate_backward", q, keys, values, masks, scale};
  Params p = check(call);
  check_grad({call.op, "grad", grad}, {call.op, "q", q});
  const size_t count = keys.size();
  if (needs.size() != 1 + 2 * count) {
    fail(call.op, "needs", "expected ", 1 + 2 * count, ", one for q, each key and each value, got ",
         needs.size());
  }
  Tensors grads;
  const auto make = [&](const Tensor& like, size_t i) {
    grads.push_back(torch::stable::new_empty(like, needs[i] != 0 ? sizes_of(like) : Sizes{0}));
  };
  make(q, 0);
  for (size_t i = 0; i < count; ++i) make(keys[i], 1 + i);
  for (size_t i = 0; i < count; ++i) make(values[i], 1 + count + i);
  bool wanted = false;
  for (const int64_t needed : needs) wanted = wanted || needed != 0;
  if (!kMade || !wanted || q.numel() == 0) return grads;
  const Launch launch(call.op, q);
  const Operands operands(call, launch, grad, p);
  const auto of = [&](size_t i) -> void* {
    if (needs[i] == 0) return nullptr;
    launch.writes(grads[i], "a gradient");
    p.needs_weights = p.needs_weights || i <= count;
    p.streams = p.streams || bytes_spanned(grads[i]) >= kStreamBytes;
    return grads[i].mutable_data_ptr();
  };
  p.out = of(0);
  for (size_t i = 0; i < count; ++i) {
    p.encoders[i].key_grad = of(1 + i);
    p.encoders[i].value_grad = of(1 + count + i);
  }
  run(launch, p, cpu_kernels().spatial_aggregate_backward,
      &CudaKernels::spatial_aggregate_backward);
  return grads;
}

}  // namespace
}  // namespace vlmops::spatial_aggregate

#define VLMOPS_SPATIAL_AGGREGATE_ARGUMENTS \
  "Tensor q, Tensor[] keys, Tensor[] values, Tensor?[] masks, float? scale=None"

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("spatial_aggregate(" VLMOPS_SPATIAL_AGGREGATE_ARGUMENTS ") -> Tensor");
  // The gradients of q, of each key and of each value, empty where needs has 0.
  m.def("spatial_aggregate_backward(Tensor grad, int[] needs, " VLMOPS_SPATIAL_AGGREGATE_ARGUMENTS
        ") -> Tensor[]");
  // Memory for the results of both, once everything was checked.
  m.def("spatial_aggregate_empty(" VLMOPS_SPATIAL_AGGREGATE_ARGUMENTS ") -> Tensor");
  m.def(
      "spatial_aggregate_backward_empty(Tensor grad, bool[] "
      "needs, " VLMOPS_SPATIAL_AGGREGATE_ARGUMENTS ") -> Tensor[]");
}

#define VLMOPS_SPATIAL_AGGREGATE_IMPL(m)                                                       \
  m.impl("spatial_aggregate", TORCH_BOX(&vlmops::spatial_aggregate::forward<true>));           \
  m.impl("spatial_aggregate_empty", TORCH_BOX(&vlmops::spatial_aggregate::forward<false>));    \
  m.impl("spatial_aggregate_backward", TORCH_BOX(&vlmops::spatial_aggregate::backward<true>)); \
  m.impl("spatial_aggregate_backward_empty", TORCH_BOX(&vlmops::spatial_aggregate::backward<false>))

STABLE_TORCH_LIBRARY_IMPL(vlmops, CPU, m) { VLMOPS_SPATIAL_AGGREGATE_IMPL(m); }
STABLE_TORCH_LIBRARY_IMPL(vlmops, CUDA, m) { VLMOPS_SPATIAL_AGGREGATE_IMPL(m); }
