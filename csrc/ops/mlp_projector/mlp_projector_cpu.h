// A projector on the CPU: what surrounds its products. Compiled once per instruction set.
//
//   y = fc2(activation(fc1(norm(x)))), with a gate: fc2(activation(gate(norm(x))) * fc1(norm(x)))
//
// The products are oneDNN's or MKL's (vlmops/ops/linear.py), of all rows at once: oneDNN packs a
// weight anew in each call (64 MB for 4096 x 4096), and panels of rows that keep the hidden layer
// in the cache lost 1 to 20 % to that. What is left takes one read and one write. LLaVA's MLP of
// 2,880 tokens in float32, two cores of a Zen 4: 121 GFLOP in 0.6 s; its activation reads and
// writes 94 MB, 5 ms at 18 GB/s, and is oneDNN's own, over tiles in the cache, with AVX-512 (2 ms;
// with AVX2 that takes 20, so that it is ours there). InternVL's norm of 3,328 x 4,096: 6 ms of
// 150.
//
// gelu is x P(-x) with P(x) = erfc(x / sqrt(2)) / 2 out of e^(-x^2 / 2), which its derivative needs
// too; gelu_tanh is x sigmoid(2 u) of tanh's argument u, so that one sigmoid serves four of them.
#pragma once

#include "common/exp.h"
#include "common/rows.h"
#include "ops/mlp_projector/mlp_projector.h"

namespace vlmops::mlp_projector {
namespace {

// f(x) and f'(x).
template <int N>
struct Value {
  Vec<float, N> f, slope;
};

// x sigmoid(u), where du/dx = slope
template <int N>
VLMOPS_INLINE Value<N> swish(Vec<float, N> x, Vec<float, N> u, Vec<float, N> slope) {
  const Vec<float, N> least = Vec<float, N>{} - 88.0f;  // e stays finite
  const Vec<float, N> e = exp<N>(-(u < least ? least : u));
  const Vec<float, N> s = 1.0f / (1.0f + e), f = x * s;
  return {f, s + f * (e * s) * slope};  // 1 - s = e s, without its cancellation
}

template <int N>
VLMOPS_INLINE Value<N> gelu(Vec<float, N> x) {
  const Vec<float, N> magnitude = x < 0.0f ? -x : x;
  const Vec<float, N> e = exp<N>(x * x * -0.5f);
  // erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.4 z); q fits to 2e-8.
  const Vec<float, N> t = 1.0f / (1.0f + 0.282842712f * magnitude);
  Vec<float, N> q = -0.0335011268715059f * t + 0.21878535612963773f;
  q = q * t - 0.5465026177592626f;
  q = q * t + 0.6093421802854352f;
  q = q * t - 0.3343118761726383f;
  q = q * t + 0.2979731945814201f;
  q = q * t + 0.12105998246941305f;
  q = q * t + 0.21668938595921516f;
  q = q * t + 0.2247486652732355f;
  q = q * t + 0.22571685743718184f;
  const Vec<float, N> tail = 0.5f * e * t * q;
  const Vec<float, N> below = x > 0.0f ? 1.0f - tail : tail;
  return {x * below, below + 0.398942280f * x * e};
}

template <Activation kind, int N>
VLMOPS_INLINE Value<N> activated(Vec<float, N> x) {
  const Vec<float, N> zero = {}, one = zero + 1.0f;
  if constexpr (kind == Activation::kGelu) {
    return gelu<N>(x);
  } else if constexpr (kind == Activation::kGeluTanh) {
    const Vec<float, N> square = x * x;
    return swish<N>(x, x * (1.59576912f + 0.0713548163f * square),
                    1.59576912f + 0.214064449f * square);
  } else if constexpr (kind == Activation::kQuickGelu) {
    return swish<N>(x, 1.702f * x, 1.702f * one);
  } else if constexpr (kind == Activation::kSilu) {
    return swish<N>(x, x, one);
  } else if constexpr (kind == Activation::kRelu) {
    return {x <= 0.0f ? zero : x, x <= 0.0f ? zero : one};  // NaN stays
  } else {
    return {x, one};
  }
}

// f(an activation as a type).
template <Activation kind>
struct Kind {
  static constexpr Activation value = kind;
};

template <class F>
VLMOPS_INLINE void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kNone:
      return f(Kind<Activation::kNone>());
    case Activation::kGelu:
      return f(Kind<Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(Kind<Activation::kGeluTanh>());
    case Activation::kQuickGelu:
      return f(Kind<Activation::kQuickGelu>());
    case Activation::kSilu:
      return f(Kind<Activation::kSilu>());
    case Activation::kRelu:
      return f(Kind<Activation::kRelu>());
  }
}

template <class T>
inline const T* at(const void* p, int64_t offset) {
  return static_cast<const T*>(p) + offset;
}

template <class T>
inline T* at(void* p, int64_t offset) {
  return static_cast<T*>(p) + offset;
}

// Elements [begin, end).
void activate(const Activate& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    with_activation(p.activation, [&](auto kind) {
      const T* hidden = at<T>(p.hidden, begin);
      const T* gate = p.gate == nullptr ? nullptr : at<T>(p.gate, begin);
      T* out = at<T>(p.out, begin);
      by_vectors(end - begin, [&](auto lanes, int64_t i) VLMOPS_INLINED {
        constexpr int N = decltype(lanes)::value;
        const auto x = load<N>(hidden + i);
        if (gate == nullptr) {
          store<N>(out + i, activated<decltype(kind)::value, N>(x).f);
        } else {
          store<N>(out + i, activated<decltype(kind)::value, N>(load<N>(gate + i)).f * x);
        }
      });
    });
  });
}

template <int N>
VLMOPS_INLINE void add_to(float* sums, int64_t i, Vec<float, N> x) {
  if (sums != nullptr) store<N>(sums + i, load<N>(sums + i) + x);
}

inline float* part_of(float* sums, int64_t part, int64_t width) {
  if (sums == nullptr) return nullptr;
  sums += part * width;
  __builtin_memset(sums, 0, width * sizeof(float));
  return sums;
}

// What is summed is what is stored: rounded.
template <int N, class T>
VLMOPS_INLINE Vec<float, N> store_rounded(T* to, Vec<float, N> x) {
  store<N>(to, x);
  return load<N>(to);
}

// Parts [begin, end), of kPartRows rows.
void activate_backward(const Activate& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    with_activation(p.activation, [&](auto kind) {
      for (int64_t part = begin; part < end; ++part) {
        float* const hidden_sums = part_of(p.hidden_sums, part, p.width);
        float* const gate_sums = part_of(p.gate_sums, part, p.width);
        const int64_t first = part * kPartRows, left = p.rows - first;
        for (int64_t row = first; row < first + (left < kPartRows ? left : kPartRows); ++row) {
          const int64_t start = row * p.width;
          const T *hidden = at<T>(p.hidden, start), *grad = at<T>(p.grad, start);
          const T* gate = p.gate == nullptr ? nullptr : at<T>(p.gate, start);
          T* out = p.out == nullptr ? nullptr : at<T>(p.out, start);
          T* grad_hidden = at<T>(p.grad_hidden, start);
          T* grad_gate = p.gate == nullptr ? nullptr : at<T>(p.grad_gate, start);
          by_vectors(p.width, [&](auto lanes, int64_t i) VLMOPS_INLINED {
            constexpr int N = decltype(lanes)::value;
            const auto x = load<N>(hidden + i), g = load<N>(grad + i);
            if (gate == nullptr) {
              const auto y = activated<decltype(kind)::value, N>(x);
              if (out != nullptr) store<N>(out + i, y.f);
              add_to<N>(hidden_sums, i, store_rounded<N>(grad_hidden + i, g * y.slope));
            } else {
              const auto y = activated<decltype(kind)::value, N>(load<N>(gate + i));
              if (out != nullptr) store<N>(out + i, y.f * x);
              add_to<N>(hidden_sums, i, store_rounded<N>(grad_hidden + i, g * y.f));
              add_to<N>(gate_sums, i, store_rounded<N>(grad_gate + i, g * x * y.slope));
            }
          });
        }
      }
    });
  });
}

// Channels [i, i + N) of the norm's weight and bias, which are float32 here.
template <int N>
VLMOPS_INLINE Vec<float, N> norm_weight(const Norm& p, int64_t i) {
  const Vec<float, N> one = Vec<float, N>{} + 1.0f;
  return p.weight.data == nullptr ? one : load<N>(at<float>(p.weight.data, i)) + p.offset;
}

template <int N>
VLMOPS_INLINE Vec<float, N> norm_bias(const Norm& p, int64_t i) {
  return p.bias.data == nullptr ? Vec<float, N>{} : load<N>(at<float>(p.bias.data, i));
}

// Rows [begin, end).
void norm(const Norm& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      const T* x = at<T>(p.x, row * p.x_stride);
      T* out = at<T>(p.out, row * p.width);
      const Scale scale = statistics(x, p.width, p.layer, p.eps);
      by_vectors(p.width, [&](auto lanes, int64_t i) VLMOPS_INLINED {
        constexpr int N = decltype(lanes)::value;
        const auto y = (load<N>(x + i) - scale.mean) * scale.factor;
        store<N>(out + i, y * norm_weight<N>(p, i) + norm_bias<N>(p, i));
      });
    }
  });
}

// Parts [begin, end), of kPartRows rows. With y the normalised row and g its gradient times the
// weight: grad_x = (g - mean(g) - y mean(g y)) * factor, for "rms" without mean(g).
void norm_backward(const Norm& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    for (int64_t part = begin; part < end; ++part) {
      float* const weight_sums = part_of(p.weight_sums, part, p.width);
      float* const bias_sums = part_of(p.bias_sums, part, p.width);
      const int64_t first = part * kPartRows, left = p.rows - first;
      for (int64_t row = first; row < first + (left < kPartRows ? left : kPartRows); ++row) {
        const T *x = at<T>(p.x, row * p.x_stride), *grad = at<T>(p.grad, row * p.width);
        const Scale scale = statistics(x, p.width, p.layer, p.eps);
        Vec<float, kFloats> sums[2] = {};
        float rest[2] = {};
        by_vectors(p.width, [&](auto lanes, int64_t i) VLMOPS_INLINED {
          constexpr int N = decltype(lanes)::value;
          const auto y = (load<N>(x + i) - scale.mean) * scale.factor;
          const auto raw = load<N>(grad + i), g = raw * norm_weight<N>(p, i);
          add_to<N>(weight_sums, i, raw * y);
          add_to<N>(bias_sums, i, raw);
          if constexpr (N == kFloats) {
            sums[0] += g;
            sums[1] += g * y;
          } else {
            rest[0] += g[0];
            rest[1] += g[0] * y[0];
          }
        });
        if (p.grad_x == nullptr) continue;
        const auto width = static_cast<float>(p.width);
        const float mean = p.layer ? (sum_lanes<kFloats>(sums[0]) + rest[0]) / width : 0.0f;
        const float slope = (sum_lanes<kFloats>(sums[1]) + rest[1]) / width;
        T* grad_x = at<T>(p.grad_x, row * p.width);
        by_vectors(p.width, [&](auto lanes, int64_t i) VLMOPS_INLINED {
          constexpr int N = decltype(lanes)::value;
          const auto y = (load<N>(x + i) - scale.mean) * scale.factor;
          const auto g = load<N>(grad + i) * norm_weight<N>(p, i);
          store<N>(grad_x + i, (g - mean - y * slope) * scale.factor);
        });
      }
    }
  });
}

}  // namespace
}  // namespace vlmops::mlp_projector
