// LayerNorm and RMSNorm of rows on NVIDIA GPUs: what the norms of several ops have in common.
//
// A row is one block's, of as few warps as hold it: kNormElements a thread in registers, as packs
// of 16 bytes, from its one read on. Two things bound such a kernel, and both are instructions
// rather than bytes: what is done for each element (some 12 forward), and what is done for each
// row (addresses, sums over the block), which is why rows that fit a warp get no more.
//
// Sums are those of deviations from a first mean, which is what remains in registers; what that
// mean lacks by rounding is shifted. Kinds of elements ("sets") that are normed each for itself
// take turns: element e of a pack is of set e % kSets.
#pragma once

#include "common/gpu.cuh"
#include "common/norm.h"

namespace vlmops {

constexpr int kNormElements = 32;  // of a row, that a thread holds
constexpr int kNormThreads = 512;  // at most
constexpr int kMostSums = 16;

template <class T>
constexpr int kNormPacks = kNormElements / kPack<T>;

// Threads of a row of so many packs; 0: it is too long.
template <class T>
int norm_threads(int64_t packs) {
  constexpr int64_t of_a_warp = kNormPacks<T> * kWarpSize;
  const int64_t warps = packs < of_a_warp ? 1 : (packs + of_a_warp - 1) / of_a_warp;
  return warps * kWarpSize <= kNormThreads ? static_cast<int>(warps * kWarpSize) : 0;
}

// Sums over the threads of a block, of N numbers at once. Two buffers take turns: the barrier of
// one sum orders the reads of the one before and the writes of the one behind.
class BlockSum {
 public:
  __device__ explicit BlockSum(float* shared) : shared_(shared) {}

  template <int N>
  __device__ __forceinline__ void operator()(float (&x)[N]) {
    static_assert(N <= kMostSums);
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (warps == 1) return;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* const mine = shared_ + turn_ * kWarpSize * kMostSums;
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) mine[n * kWarpSize + warp] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = warp_sum(lane < warps ? mine[n * kWarpSize + lane] : 0.0f);
  }

  static constexpr int kFloats = 2 * kWarpSize * kMostSums;

 private:
  float* shared_;
  int turn_ = 0;
};

struct Statistics {
  float mean, scale, shift;

  __device__ __forceinline__ float normed(float x) const { return (x - mean) * scale + shift; }
};

__device__ __forceinline__ void keep(float* scales, int64_t row, const Statistics& by) {
  float* const to = scales + row * kScales;
  to[0] = by.mean;
  to[1] = by.scale;
  to[2] = by.shift;
}

__device__ __forceinline__ Statistics kept(const float* scales, int64_t row) {
  const float* const from = scales + row * kScales;
  return {from[0], from[1], from[2]};
}

// From sums over n of d and its square.
__device__ __forceinline__ Statistics statistics_of(bool layer, float eps, float mean, float sum,
                                                    float squares, float per_element) {
  const float rest = layer ? sum * per_element : 0.0f;
  const float scale = 1.0f / sqrtf(squares * per_element - rest * rest + eps);
  return {mean, scale, -rest * scale};
}

// Of n numbers load(k), by all threads of a block, which ask for each number twice.
template <class Load>
__device__ __forceinline__ Statistics statistics_of_each(int64_t n, const Load& load, bool layer,
                                                         float eps, BlockSum& add_up) {
  const float per_element = 1.0f / static_cast<float>(n);
  float mean[1] = {}, sums[2] = {};
  if (layer) {
    for (int64_t k = threadIdx.x; k < n; k += blockDim.x) mean[0] += load(k);
    add_up(mean);
    mean[0] *= per_element;
  }
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) {
    const float off = load(k) - mean[0];
    sums[0] += off;
    sums[1] += off * off;
  }
  add_up(sums);
  return statistics_of(layer, eps, mean[0], sums[0], sums[1], per_element);
}

// A thread's part of a row: packs threadIdx.x, threadIdx.x + blockDim.x, ... of `packs`.
template <class T>
struct HeldRow {
  static constexpr int V = kPack<T>, P = kNormPacks<T>;
  float x[P][V];

  // f(j, u) for each pack u of this thread.
  template <class F>
  static __device__ __forceinline__ void each(int packs, const F& f) {
#pragma unroll
    for (int j = 0; j < P; ++j) {
      const int u = static_cast<int>(threadIdx.x + j * blockDim.x);
      if (u < packs) f(j, u);
    }
  }

  // Subtracts the means; zeros for "rms".
  template <int S>
  __device__ __forceinline__ void centre(int packs, bool layer, float per_element, BlockSum& add_up,
                                         float (&mean)[S]) {
#pragma unroll
    for (int s = 0; s < S; ++s) mean[s] = 0.0f;
    if (!layer) return;
    each(packs, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e) mean[e % S] += x[j][e];
    });
    add_up(mean);
#pragma unroll
    for (int s = 0; s < S; ++s) mean[s] *= per_element;
    each(packs, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e) x[j][e] -= mean[e % S];
    });
  }

  // Leaves deviations in x.
  template <int S>
  __device__ __forceinline__ void statistics(int packs, bool layer, float eps, float per_element,
                                             BlockSum& add_up, Statistics (&by)[S]) {
    float mean[S], sums[2 * S] = {};
    centre(packs, layer, per_element, add_up, mean);
    each(packs, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sums[e % S] += x[j][e];
        sums[S + e % S] += x[j][e] * x[j][e];
      }
    });
    add_up(sums);
#pragma unroll
    for (int s = 0; s < S; ++s)
      by[s] = statistics_of(layer, eps, mean[s], sums[s], sums[S + s], per_element);
  }

  // x becomes the gradient of the row, from wg, that of what is normed times the norm's weight:
  // (wg - mean(wg) - y mean(wg y)) * scale, for "rms" without mean(wg).
  template <int S>
  __device__ __forceinline__ void pull_back(float (&wg)[P][V], int packs, bool layer, float eps,
                                            float per_element, BlockSum& add_up,
                                            Statistics (&by)[S]) {
    float mean[S], sums[4 * S] = {};
    centre(packs, layer, per_element, add_up, mean);
    each(packs, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int s = e % S;
        sums[s] += x[j][e];
        sums[S + s] += x[j][e] * x[j][e];
        sums[2 * S + s] += wg[j][e];
        sums[3 * S + s] += wg[j][e] * x[j][e];
      }
    });
    add_up(sums);
    float by_wg[S], by_x[S], rest[S];
#pragma unroll
    for (int s = 0; s < S; ++s) {
      by[s] = statistics_of(layer, eps, mean[s], sums[s], sums[S + s], per_element);
      const float scale = by[s].scale, shift = by[s].shift;
      const float along = (sums[3 * S + s] * scale + sums[2 * S + s] * shift) * per_element;
      by_wg[s] = scale;
      by_x[s] = -along * scale * scale;
      rest[s] = -((layer ? sums[2 * S + s] * per_element : 0.0f) + along * shift) * scale;
    }
    each(packs, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < V; ++e)
        x[j][e] = wg[j][e] * by_wg[e % S] + (x[j][e] * by_x[e % S] + rest[e % S]);
    });
  }
};

// N elements that lie side by side, on as many bytes or on 16.
template <class T, int N>
__device__ __forceinline__ Words<T, N> load_bits(const T* p) {
  constexpr int kBytes = N * static_cast<int>(sizeof(T));
  Words<T, N> x;
  if constexpr (kBytes > 16) {
    constexpr int kPart = kPack<T>;
#pragma unroll
    for (int first = 0; first < N; first += kPart) {
      const auto part = load_words<kPart>(p + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) x.w[first / kPart * 4 + i] = part.w[i];
    }
  } else if constexpr (kBytes >= 8) {
    x = load_words<N>(p);
  } else {
    x.w[0] = load_pack<1>(reinterpret_cast<const uint32_t*>(p)).v[0];
  }
  return x;
}

template <class T, int N>
__device__ __forceinline__ void load_floats(const T* p, float (&x)[N]) {
  widen(load_bits<T, N>(p), x);
}

// Weight and bias of a norm: N columns to a pack. TW: of both; null where there is none.
template <class TW, int N>
struct Affine {
  const TW *weight, *bias;
  float offset;  // added to the weight

  __device__ __forceinline__ Affine(const void* weight, const void* bias, float offset)
      : weight(static_cast<const TW*>(weight)),
        bias(static_cast<const TW*>(bias)),
        offset(offset) {}

  __device__ __forceinline__ void weights(int u, float (&w)[N]) const {
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] = 1.0f;
    if (weight == nullptr) return;
    load_floats(weight + u * N, w);
    if (offset == 0.0f) return;
#pragma unroll
    for (int e = 0; e < N; ++e) w[e] += offset;
  }

  // finish(j, u, w, b) for each pack u of a row. The usual case, which has both vectors, is by
  // itself: it spares each element three instructions.
  template <class T, class F>
  __device__ __forceinline__ void each(int packs, const F& finish) const {
    if (weight != nullptr && bias != nullptr && offset == 0.0f) {
      HeldRow<T>::each(packs, [&](int j, int u) {
        float w[N], b[N];
        load_floats(weight + u * N, w);
        load_floats(bias + u * N, b);
        finish(j, u, w, b);
      });
    } else {
      HeldRow<T>::each(packs, [&](int j, int u) {
        float w[N], b[N];
        weights(u, w);
#pragma unroll
        for (int e = 0; e < N; ++e) b[e] = 0.0f;
        if (bias != nullptr) load_floats(bias + u * N, b);
        finish(j, u, w, b);
      });
    }
  }
};

// Element k, or `missing` where there is no vector.
__device__ __forceinline__ float element(const NormVector& v, int64_t k, float missing) {
  if (v.data == nullptr) return missing;
  const int64_t at = k * v.stride;
  switch (v.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(v.data)[at];
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16*>(v.data)[at]);
    case DType::kFloat16:
      return to_float(static_cast<const float16*>(v.data)[at]);
  }
  return missing;
}

__device__ __forceinline__ float weight_at(const NormVector& v, float offset, int64_t k) {
  return v.data == nullptr ? 1.0f : element(v, k, 0.0f) + offset;
}

// What the threads of a block sum over rows, N numbers each, added up over its kWarps warps:
// f(i, sum) with the lane's sum of number i, by one thread each. shared: kWarps * N * kWarpSize.
template <int kWarps, int N, class F>
__device__ __forceinline__ void add_warps(const float (&own)[N], float* shared, const F& f) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < N; ++i) shared[(warp * N + i) * kWarpSize + lane] = own[i];
  __syncthreads();
  for (int i = warp; i < N; i += kWarps) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[(w * N + i) * kWarpSize + lane];
    f(i, static_cast<float>(sum));
  }
}

// Calls f of a null pointer to the one type that both vectors have, the row's own or float, and
// none() where they have none.
template <class T, class F, class None>
int with_vectors(DType own, const NormVector& weight, const NormVector& bias, const F& f,
                 const None& none) {
  const auto all = [&](DType dtype) {
    bool good = true;
    for (const NormVector* v : {&weight, &bias}) {
      if (v->data == nullptr) continue;
      good = good && v->dtype == dtype && v->stride == 1 &&
             reinterpret_cast<uintptr_t>(v->data) % 16 == 0;
    }
    return good;
  };
  if (all(own)) return f(static_cast<T*>(nullptr));
  if constexpr (!std::is_same_v<T, float>) {
    if (all(DType::kFloat32)) return f(static_cast<float*>(nullptr));
  }
  return none();
}

}  // namespace vlmops
