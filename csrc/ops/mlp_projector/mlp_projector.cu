// Launches of what surrounds a projector's products on NVIDIA GPUs: Params and a stream in, an
// error's number out. No torch.
#include <limits>

#include "ops/mlp_projector/mlp_projector.cuh"

namespace vlmops::mlp_projector {
namespace {

template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return (aligned(pointers) && ...);  // null is
}

// f.run<T, V>() with 16 bytes at a time if `wide`, else 1 element.
template <class T, class F>
int by_width(bool wide, const F& f) {
  return wide ? f.template run<T, kPack<T>>() : f.template run<T, 1>();
}

template <class F>
int by_dtype(DType dtype, bool wide, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return by_width<float>(wide, f);
    case DType::kBFloat16:
      return by_width<bfloat16>(wide, f);
    case DType::kFloat16:
      return by_width<float16>(wide, f);
  }
  return 0;
}

int pack_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

template <class Params>
int launch_1d(void (*kernel)(Params), int64_t blocks, int threads, const Params& p, void* stream) {
  if (blocks > std::numeric_limits<int>::max()) return kInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, p);
}

// Blocks of a kernel that sums V columns in each thread.
template <int V>
int64_t tiles(int64_t rows, int64_t width) {
  return divide_up(width, kWarpSize * V) * parts_of(rows, gpu_part_rows(rows, width));
}

struct RunActivate {
  const Activate& p;
  void* stream;
  template <class T, int V>
  int run() const {
    const int64_t packs = divide_up(p.rows * p.width, V);
    return launch_1d(mlp_projector_activate_kernel<T, V>, divide_up(packs, kThreads), kThreads, p,
                     stream);
  }
};

struct RunActivateBackward {
  const Activate& p;
  void* stream;
  template <class T, int V>
  int run() const {
    return launch_1d(mlp_projector_activate_backward_kernel<T, V>, tiles<V>(p.rows, p.width),
                     kThreads, p, stream);
  }
};

bool is_wide(const Norm& p) {
  const int pack = pack_of(p.dtype);
  return p.width % pack == 0 && p.x_stride % pack == 0 &&
         all_aligned(p.x, p.weight.data, p.bias.data, p.out, p.grad, p.grad_x);
}

// f(type of weight and bias, threads) where a block of as many threads holds a row in packs, else
// any().
template <class T, class F, class Any>
int by_vectors(const Norm& p, const F& f, const Any& any) {
  const int threads = is_wide(p) ? norm_threads<T>(p.width / kPack<T>) : 0;
  if (threads == 0) return any();
  return with_vectors<T>(
      p.dtype, vector_of(p.weight), vector_of(p.bias), [&](auto* type) { return f(type, threads); },
      any);
}

struct RunNorm {
  const Norm& p;
  void* stream;
  template <class T, int V>
  int run() const {
    return by_vectors<T>(
        p,
        [&](auto* type, int threads) {
          using TW = std::remove_pointer_t<decltype(type)>;
          return launch_1d(mlp_projector_norm_kernel<T, TW>, p.rows, threads, p, stream);
        },
        [&] {
          return launch_1d(mlp_projector_norm_any_kernel<T>, p.rows, kAnyThreads, p, stream);
        });
  }
};

struct RunNormBackward {
  const Norm& p;
  void* stream;
  template <class T, int V>
  int run() const {
    const int status = by_vectors<T>(
        p,
        [&](auto* type, int threads) {
          using TW = std::remove_pointer_t<decltype(type)>;
          return launch_1d(mlp_projector_norm_backward_kernel<T, TW>, p.rows, threads, p, stream);
        },
        [&] {
          return launch_1d(mlp_projector_norm_backward_any_kernel<T>, p.rows, kAnyThreads, p,
                           stream);
        });
    if (status != 0 || (p.weight_sums == nullptr && p.bias_sums == nullptr)) return status;
    return launch_1d(mlp_projector_norm_sums_kernel<T, V>, tiles<V>(p.rows, p.width), kThreads, p,
                     stream);
  }
};

}  // namespace

int norm_cuda(const Norm& p, void* stream) {
  if (p.rows * p.width == 0) return 0;
  return by_dtype(p.dtype, true, RunNorm{p, stream});
}

int norm_backward_cuda(const Norm& p, void* stream) {
  if (p.rows * p.width == 0) return 0;  // no parts either: sums of nothing are 0
  return by_dtype(p.dtype, is_wide(p), RunNormBackward{p, stream});
}

int activate_cuda(const Activate& p, void* stream) {
  if (p.rows * p.width == 0) return 0;
  return by_dtype(p.dtype, all_aligned(p.hidden, p.gate, p.out), RunActivate{p, stream});
}

int activate_backward_cuda(const Activate& p, void* stream) {
  if (p.rows * p.width == 0) return 0;
  const bool wide = p.width % pack_of(p.dtype) == 0 &&
                    all_aligned(p.hidden, p.gate, p.grad, p.out, p.grad_hidden, p.grad_gate);
  return by_dtype(p.dtype, wide, RunActivateBackward{p, stream});
}

namespace {

template <class T, class Out>
int sum_rows(const void* x, int64_t rows, int64_t slices, int64_t width, void* out, void* stream) {
  const int64_t blocks = divide_up(width, kWarpSize * 4 / static_cast<int64_t>(sizeof(T)));
  if (slices > 65535) return kInvalidValue;
  return launch(mlp_projector_sum_rows_kernel<T, Out>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), dim3(kThreads),
                0, stream, static_cast<const T*>(x), rows, width, static_cast<Out*>(out));
}

struct SumRows {
  const RowSum& p;
  int64_t slices;
  void* stream;
  template <class T, int>
  int run() const {
    if (slices > 1) return sum_rows<T, float>(p.x, p.rows, slices, p.width, p.partial, stream);
    switch (p.out_dtype) {
      case DType::kFloat32:
        return sum_rows<T, float>(p.x, p.rows, 1, p.width, p.out, stream);
      case DType::kBFloat16:
        return sum_rows<T, bfloat16>(p.x, p.rows, 1, p.width, p.out, stream);
      case DType::kFloat16:
        return sum_rows<T, float16>(p.x, p.rows, 1, p.width, p.out, stream);
    }
    return 0;
  }
};

}  // namespace

int sum_rows_cuda(const RowSum& p, void* stream) {
  if (p.width == 0) return 0;
  const int64_t slices = slices_of(p.rows);
  const int status = by_dtype(p.dtype, false, SumRows{p, slices, stream});
  if (status != 0 || slices < 2) return status;
  const RowSum rest{p.partial, DType::kFloat32, slices, p.width, p.out, p.out_dtype, nullptr};
  return by_dtype(DType::kFloat32, false, SumRows{rest, 1, stream});
}

}  // namespace vlmops::mlp_projector
