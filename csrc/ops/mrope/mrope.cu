// Launches of M-RoPE on NVIDIA GPUs: Params and a stream in, an error's number out. No torch.
#include <algorithm>
#include <limits>

#include "ops/mrope/mrope.cuh"

namespace vlmops::mrope {
namespace {

constexpr size_t kSharedBytes = 48 << 10;  // what a block may have without being asked for
constexpr int kWarpsToFill = 32;           // a multiprocessor: with fewer, tokens are shared out

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// Whether q and k can be read and written in packs of V.
template <class T>
bool packs(const Params& p, int v) {
  const auto fits = [&](const void* base, const int64_t* stride) {
    bool good = reinterpret_cast<uintptr_t>(base) % (v * sizeof(T)) == 0 && stride[3] == 1;
    for (int i = 0; i < 3; ++i) good = good && stride[i] % v == 0;
    return good;
  };
  for (const Rows& rows : p.rows) {
    if (rows.heads == 0) continue;
    if (!fits(rows.src, rows.src_stride) || !fits(rows.dst, rows.dst_stride)) return false;
    if (rows.x != nullptr && !fits(rows.x, rows.x_stride)) return false;
  }
  return true;
}

// Whether items of two packs of V make up a head and fit a warp.
bool divides(const Params& p, int v) {
  return p.frequencies % v == 0 && p.head_dim % v == 0 && p.head_dim <= 2 * v * kWarpSize;
}

bool has_norm(const Params& p) {
  return p.rows[0].norm_weight != nullptr || p.rows[1].norm_weight != nullptr;
}

// Lanes to a head of so many items: sums are made over powers of two.
int lanes_for(int items, bool norm) {
  if (!norm) return std::max(items, 1);
  int lanes = 1;
  while (lanes < items) lanes *= 2;
  return lanes;
}

// Grid and block for so many units of a token: four to a warp, or one where tokens are few, and
// then several blocks to a token.
struct Launch {
  dim3 grid, block;
  Launch(const Params& p, int64_t units) {
    const int64_t tokens = p.batch * p.tokens,
                  slots = std::max(1, multiprocessors()) * kWarpsToFill;
    const bool few = tokens * round_up(units, 2) < slots;
    const int64_t warps = std::clamp<int64_t>(few ? units : round_up(units, 4), 1, kMaxWarps);
    const int64_t shares = few ? round_up(units, warps) : 1;
    grid = dim3(static_cast<unsigned>(tokens),
                static_cast<unsigned>(std::min<int64_t>(shares, 65535)));
    block = dim3(static_cast<unsigned>(warps * kWarpSize));
  }
};

template <class T, Rotation rotation, int V, bool kWide>
int rotate_with(const Params& p, void* stream) {
  const bool norm = has_norm(p);
  const int lanes = lanes_for(Item<rotation, V>::count(p), norm), at_once = kWarpSize / lanes;
  const Launch on(p,
                  Place::units(p.rows[0].heads, at_once) + Place::units(p.rows[1].heads, at_once));
  const auto kernel =
      norm ? mrope_kernel<T, rotation, V, kWide, true> : mrope_kernel<T, rotation, V, kWide, false>;
  const size_t floats = table_size(p) + (norm ? 2 * padded_dim(p) : 0);
  return launch(kernel, on.grid, on.block, floats * sizeof(float), stream, p, lanes);
}

template <class T, Rotation rotation>
int rotate_any(const Params& p, void* stream) {
  const bool norm = has_norm(p);
  const Launch on(p, p.rows[0].heads + p.rows[1].heads);
  const auto kernel =
      norm ? mrope_any_kernel<T, rotation, true> : mrope_any_kernel<T, rotation, false>;
  const size_t floats = table_size(p) + (norm ? 2 * padded_dim(p) : 0);
  return launch(kernel, on.grid, on.block, floats * sizeof(float), stream, p);
}

struct Backward {
  int64_t heads[2];  // of q, k, needed or not
  int parts;
  float* partial;
};

// Warps of a block for units of q and of k: as few as make no warp take more turns.
struct Warps {
  int q, k;
  Warps(int64_t q_units, int64_t k_units, int most) : q(1), k(1) {
    int64_t best = std::numeric_limits<int64_t>::max();
    for (int n = 2; n <= most; ++n) {
      for (int of_q = 1; of_q < n; ++of_q) {
        const int64_t turns =
            std::max(round_up(std::max<int64_t>(q_units, 1), of_q), round_up(k_units, n - of_q));
        if (turns >= best) continue;
        best = turns;
        q = of_q;
        k = n - of_q;
      }
    }
  }
  dim3 block() const { return dim3((q + k) * kWarpSize); }
};

template <class T, Rotation rotation, int V, bool kWide>
int norm_backward_with(const Params& p, const Backward& b, void* stream) {
  const int lanes = lanes_for(Item<rotation, V>::count(p), true), at_once = kWarpSize / lanes;
  const Warps warps(Place::units(b.heads[0], at_once), Place::units(b.heads[1], at_once),
                    kBackwardWarps);
  return launch(mrope_norm_backward_kernel<T, rotation, V, kWide>, dim3(b.parts), warps.block(),
                Shared::bytes(p, (warps.q + warps.k) * at_once, 2), stream, p, lanes, warps.q,
                b.partial);
}

template <class T, Rotation rotation>
int norm_backward_any(const Params& p, const Backward& b, void* stream) {
  int most = kBackwardWarps;
  while (most > 2 && Shared::bytes(p, most, 1) > kSharedBytes) --most;
  const Warps warps(b.heads[0], b.heads[1], most);
  return launch(mrope_norm_backward_any_kernel<T, rotation>, dim3(b.parts), warps.block(),
                Shared::bytes(p, warps.q + warps.k, 1), stream, p, warps.q, b.partial);
}

// Calls f.run<T, rotation, V, kWide>() or f.any<T, rotation>() for what p asks for. With a norm V
// must not depend on strides: sums would.
template <class T, Rotation rotation, class F>
int by_layout(const Params& p, const F& f) {
  constexpr int wide = kPack<T>;
  const bool fits = divides(p, wide);
  if (fits && packs<T>(p, wide)) return f.template run<T, rotation, wide, true>();
  if constexpr (wide == 8) {
    if (divides(p, 4) && !(fits && has_norm(p))) {
      if (packs<T>(p, 4)) return f.template run<T, rotation, 4, true>();
      if (!fits) return f.template run<T, rotation, 4, false>();
    }
  }
  if (fits) return f.template run<T, rotation, wide, false>();
  return f.template any<T, rotation>();
}

template <class T, class F>
int by_rotation(const Params& p, const F& f) {
  return p.rotation == Rotation::kHalf ? by_layout<T, Rotation::kHalf>(p, f)
                                       : by_layout<T, Rotation::kPairs>(p, f);
}

template <class F>
int by_dtype(const Params& p, const F& f) {
  switch (p.dtype) {
    case DType::kFloat32:
      return by_rotation<float>(p, f);
    case DType::kBFloat16:
      return by_rotation<bfloat16>(p, f);
    case DType::kFloat16:
      return by_rotation<float16>(p, f);
  }
  return 0;
}

struct Rotate {
  const Params& p;
  void* stream;
  template <class T, Rotation rotation, int V, bool kWide>
  int run() const {
    return rotate_with<T, rotation, V, kWide>(p, stream);
  }
  template <class T, Rotation rotation>
  int any() const {
    return rotate_any<T, rotation>(p, stream);
  }
};

struct NormBackward {
  const Params& p;
  const Backward& backward;
  void* stream;
  template <class T, Rotation rotation, int V, bool kWide>
  int run() const {
    return norm_backward_with<T, rotation, V, kWide>(p, backward, stream);
  }
  template <class T, Rotation rotation>
  int any() const {
    return norm_backward_any<T, rotation>(p, backward, stream);
  }
};

// Kernels count tokens and heads of a token in 32 bits; elements in 64.
bool fits_int(const Params& p) {
  const int64_t most = int64_t{1} << 31;
  return p.batch * p.tokens < most && p.rows[0].heads + p.rows[1].heads < most / (4 * kWarpSize);
}

bool nothing_to_do(const Params& p) {
  return p.batch * p.tokens == 0 || (p.rows[0].heads + p.rows[1].heads) * p.head_dim == 0;
}

}  // namespace

int run_cuda(const Params& p, void* stream) {
  if (nothing_to_do(p)) return 0;
  return fits_int(p) ? by_dtype(p, Rotate{p, stream}) : kInvalidValue;
}

int norm_backward_parts_cuda(const Params& p) {
  const int64_t blocks = architecture() >= 100 ? kBackwardBlocks - 1 : kBackwardBlocks;
  const int64_t most = blocks * std::max(1, multiprocessors());
  return static_cast<int>(std::clamp<int64_t>(p.batch * p.tokens, 1, most));
}

int run_norm_backward_cuda(const Params& p, const int64_t (&heads)[2], int parts, float* partial,
                           float* const (&weight_grad)[2], void* stream) {
  if (!fits_int(p)) return kInvalidValue;
  // With no tokens the sums are written all the same: zeros.
  const Backward backward = {{heads[0], heads[1]}, parts, partial};
  const int status = by_dtype(p, NormBackward{p, backward, stream});
  if (status != 0 || p.head_dim == 0) return status;
  if (weight_grad[0] == nullptr && weight_grad[1] == nullptr) return 0;
  const auto columns = static_cast<unsigned>(round_up(p.head_dim, kWarpSize));
  return launch(mrope_weight_grad_kernel, dim3(columns, 2), dim3(kWarpSize, kSlices), 0, stream, p,
                static_cast<const float*>(partial), parts, weight_grad[0], weight_grad[1]);
}

}  // namespace vlmops::mrope
