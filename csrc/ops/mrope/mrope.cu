// Launches of M-RoPE on NVIDIA GPUs: Params and a stream in, an error's number out. No torch.
#include <algorithm>

#include "ops/mrope/mrope.cuh"

namespace vlmops::mrope {
namespace {

constexpr size_t kSumsBytes = 24 << 10;  // of shared memory, for the sums of the norm's backward

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// Whether q and k can be read and written in packs of V.
template <class T>
bool packs(const Params& p, int v) {
  const auto fits = [&](const void* base, const int64_t* stride) {
    bool good = reinterpret_cast<uintptr_t>(base) % (v * sizeof(T)) == 0 && stride[3] == 1;
    for (int i = 0; i < 3; ++i) good = good && stride[i] % v == 0;
    return good;
  };
  if (p.frequencies % v != 0 || p.head_dim % v != 0) return false;
  for (const Rows& rows : p.rows) {
    if (rows.heads == 0) continue;
    if (!fits(rows.src, rows.src_stride) || !fits(rows.dst, rows.dst_stride)) return false;
    if (rows.x != nullptr && !fits(rows.x, rows.x_stride)) return false;
  }
  return true;
}

// Threads to a head: a power of two that covers its items, a warp at most.
int lanes_for(const Params& p, int v) {
  const int64_t items = std::max(p.frequencies, p.head_dim - 2 * p.frequencies) / v;
  int lanes = 1;
  while (lanes < items && lanes < kWarpSize) lanes *= 2;
  return lanes;
}

// As many tokens as leave every multiprocessor eight blocks.
int tokens_for(const Params& p) {
  const int64_t blocks = 8 * std::max(1, multiprocessors());
  return static_cast<int>(std::clamp<int64_t>(p.batch * p.tokens / blocks, 1, kMaxTokens));
}

template <class T, Rotation rotation, int V>
int rotate_with(const Params& p, void* stream) {
  const bool norm = p.rows[0].norm_weight != nullptr || p.rows[1].norm_weight != nullptr;
  const int tokens = tokens_for(p);
  const int64_t blocks = round_up(p.batch * p.tokens, tokens);
  const auto kernel =
      norm ? mrope_kernel<T, rotation, V, true> : mrope_kernel<T, rotation, V, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                Shared::bytes(p, tokens, norm, 0), stream, p, tokens, lanes_for(p, V));
}

template <class T, Rotation rotation, int V>
int norm_backward_with(const Params& p, int parts, float* partial, void* stream) {
  const int lanes = lanes_for(p, V);
  int threads = kThreads;
  while (threads > kWarpSize &&
         threads / lanes * Shared::pad(p.head_dim) * sizeof(float) > kSumsBytes)
    threads /= 2;
  return launch(mrope_norm_backward_kernel<T, rotation, V>, dim3(parts, 2), dim3(threads),
                Shared::bytes(p, 1, true, threads / lanes), stream, p, 1, lanes, partial);
}

// Calls f.run<T, rotation, V>() for what p asks for.
template <class T, class F>
int by_layout(const Params& p, const F& f) {
  constexpr int wide = kPack<T>;
  const bool half = p.rotation == Rotation::kHalf;
  if (packs<T>(p, wide))
    return half ? f.template run<T, Rotation::kHalf, wide>()
                : f.template run<T, Rotation::kPairs, wide>();
  if constexpr (wide == 8) {
    if (packs<T>(p, 4))
      return half ? f.template run<T, Rotation::kHalf, 4>()
                  : f.template run<T, Rotation::kPairs, 4>();
  }
  return half ? f.template run<T, Rotation::kHalf, 1>() : f.template run<T, Rotation::kPairs, 1>();
}

template <class F>
int by_dtype(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kFloat32:
      return by_layout<float>(p, f);
    case DType::kBFloat16:
      return by_layout<bfloat16>(p, f);
    case DType::kFloat16:
      return by_layout<float16>(p, f);
  }
  return 0;
}

struct Rotate {
  const Params& p;
  void* stream;
  template <class T, Rotation rotation, int V>
  int run() const {
    return rotate_with<T, rotation, V>(p, stream);
  }
};

struct NormBackward {
  const Params& p;
  int parts;
  float* partial;
  void* stream;
  template <class T, Rotation rotation, int V>
  int run() const {
    return norm_backward_with<T, rotation, V>(p, parts, partial, stream);
  }
};

bool nothing_to_do(const Params& p) {
  return p.batch * p.tokens == 0 || (p.rows[0].heads + p.rows[1].heads) * p.head_dim == 0;
}

}  // namespace

int run_cuda(const Params& p, void* stream) {
  return nothing_to_do(p) ? 0 : by_dtype(p, Rotate{p, stream});
}

int norm_backward_parts_cuda(const Params& p) {
  const int64_t most = 4 * std::max(1, multiprocessors());
  return static_cast<int>(std::clamp<int64_t>(p.batch * p.tokens, 1, most));
}

int run_norm_backward_cuda(const Params& p, int parts, float* partial,
                           float* const (&weight_grad)[2], void* stream) {
  // With no tokens the sums are written all the same: zeros.
  const int status = by_dtype(p, NormBackward{p, parts, partial, stream});
  if (status != 0 || p.head_dim == 0) return status;
  const auto blocks = static_cast<unsigned>(round_up(2 * p.head_dim, kThreads));
  return launch(mrope_weight_grad_kernel, dim3(blocks), dim3(kThreads), 0, stream, p,
                static_cast<const float*>(partial), parts, weight_grad[0], weight_grad[1]);
}

}  // namespace vlmops::mrope
