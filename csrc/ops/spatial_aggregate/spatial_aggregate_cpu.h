// The spatial aggregation on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
//   s_t = scale * q . k_t       over all tokens t of the query's windows that exist, in float32
//   p = softmax(s);  out = sum of p_t v_t       zeros where no token exists
//   backward: r_t = p_t (grad . v_t - sum of p_u grad . v_u) scale
//             grad_q = sum of r_t k_t;  grad_k_t = r_t q;  grad_v_t = p_t grad
//
// Bytes: every key and value is one query's, so all are read once, q read and out written:
// Cambrian-1's grid of 24 x 24, maps of 24, 24, 24 and 96 on a side and 1,024 channels are 47 MB in
// bfloat16, 94 in float32. Backward reads them and grad, and writes as many again. Eager writes and
// reads windows of keys and values once more, then all of them in a row, then by heads.
//
// Channels are in lanes, four tokens at a time. Tokens are the outer loop and heads the inner one:
// a token's heads lie side by side, and whole rows of them are read in one go.
#pragma once

#include "common/exp.h"
#include "common/rows.h"
#include "common/stream.h"
#include "ops/spatial_aggregate/spatial_aggregate.h"

namespace vlmops::spatial_aggregate {
namespace {

constexpr int kTogether = 4;    // tokens
constexpr int kRest = 8;        // channels; divides those of a head
constexpr int kScratch = 8192;  // floats of a block of heads: of their channels, of their weights

struct Cell {
  int64_t batch, y, x;
};

inline int64_t at(const Strides& s, const Cell& c) {
  return c.batch * s.batch + c.y * s.y + c.x * s.x;
}

// A token of a query's windows.
template <class T>
struct Token {
  const T *key, *value;
  const Encoder* of;
  int64_t place;  // in a contiguous map
};

// Those of a cell that exist. Gradients of the others are cleared.
template <class T>
inline int gather(const Params& p, const Cell& cell, Token<T>* tokens) {
  const int64_t depth = static_cast<int64_t>(p.heads) * p.head_dim;
  int n = 0;
  for (int e = 0; e < p.encoder_count; ++e) {
    const Encoder& of = p.encoders[e];
    for (int i = 0; i < of.height; ++i) {
      for (int j = 0; j < of.width; ++j) {
        const Cell c{cell.batch, cell.y * of.height + i, cell.x * of.width + j};
        const int64_t row = c.batch * p.grid_h * of.height + c.y;
        const int64_t place = (row * p.grid_w * of.width + c.x) * depth;
        if (of.mask == nullptr || of.mask[at(of.mask_stride, c)]) {
          tokens[n++] = {static_cast<const T*>(of.key) + at(of.key_stride, c),
                         static_cast<const T*>(of.value) + at(of.value_stride, c), &of, place};
          continue;
        }
        void* const grads[] = {of.key_grad, of.value_grad};
        for (void* grad : grads)
          if (grad != nullptr)
            __builtin_memset(static_cast<T*>(grad) + place, 0, depth * sizeof(T));
      }
    }
  }
  return n;
}

// f(how many, the first) of n tokens.
template <class F>
VLMOPS_INLINE void by_four(int n, const F& f) {
  int i = 0;
  for (; i + kTogether <= n; i += kTogether) f(Lanes<kTogether>(), i);
  for (; i < n; ++i) f(Lanes<1>(), i);
}

// whole(i) for steps of channels as Access reads them, rest(i) for kRest of those left.
template <class T, class Whole, class Rest>
VLMOPS_INLINE void by_channels(int d, const Whole& whole, const Rest& rest) {
  int i = 0;
  for (; i + AccessOf<T>::kStep <= d; i += AccessOf<T>::kStep) whole(i);
  for (; i < d; i += kRest) rest(i);
}

// x . rows[n]
template <int N, class T>
VLMOPS_INLINE void products(const T* x, const T* const (&rows)[N], int d, float (&of)[N]) {
  using A = AccessOf<T>;
  Vec<float, kFloats> sums[N] = {}, others[N] = {};
  Vec<float, kRest> rest[N] = {};
  by_channels<T>(
      d,
      [&](int i) VLMOPS_INLINED {
        const auto a = A::read(x + i);
        for (int n = 0; n < N; ++n) {
          const auto b = A::read(rows[n] + i);
          for (int v = 0; v < A::kVectors; ++v) sums[n] += a.v[v] * b.v[v];
          if (i + A::kStep == d / (2 * A::kStep) * A::kStep) {  // half of them: shorter chains
            others[n] = sums[n];
            sums[n] = Vec<float, kFloats>{};
          }
        }
      },
      [&](int i) VLMOPS_INLINED {
        const auto a = load<kRest>(x + i);
        for (int n = 0; n < N; ++n) rest[n] += a * load<kRest>(rows[n] + i);
      });
  for (int n = 0; n < N; ++n)
    of[n] = sum_lanes<kFloats>(sums[n] + others[n]) + sum_lanes<kRest>(rest[n]);
}

// sums += weights[n] * rows[n], in the order in which channels come into vectors.
template <int N, class T>
VLMOPS_INLINE void add_rows(float* sums, const T* const (&rows)[N], const float (&weights)[N],
                            int d) {
  using A = AccessOf<T>;
  by_channels<T>(
      d,
      [&](int i) VLMOPS_INLINED {
        Vec<float, kFloats> sum[A::kVectors];
        for (int v = 0; v < A::kVectors; ++v) sum[v] = load<kFloats>(sums + i + v * kFloats);
        for (int n = 0; n < N; ++n) {
          const auto x = A::read(rows[n] + i);
          for (int v = 0; v < A::kVectors; ++v) sum[v] += weights[n] * x.v[v];
        }
        for (int v = 0; v < A::kVectors; ++v) store<kFloats>(sums + i + v * kFloats, sum[v]);
      },
      [&](int i) VLMOPS_INLINED {
        auto sum = load<kRest>(sums + i);
        for (int n = 0; n < N; ++n) sum += weights[n] * load<kRest>(rows[n] + i);
        store<kRest>(sums + i, sum);
      });
}

// What add_rows summed, rounded.
template <class T>
VLMOPS_INLINE void write_sums(T* to, const float* sums, int d) {
  using A = AccessOf<T>;
  by_channels<T>(
      d,
      [&](int i) VLMOPS_INLINED {
        typename A::Values x;
        for (int v = 0; v < A::kVectors; ++v) x.v[v] = load<kFloats>(sums + i + v * kFloats);
        A::write(to + i, x, false);
      },
      [&](int i) VLMOPS_INLINED { store<kRest>(to + i, load<kRest>(sums + i)); });
}

template <class T>
VLMOPS_INLINE void write_scaled(T* to, const T* row, float factor, int d, bool streams) {
  using A = AccessOf<T>;
  streams = streams && aligned(to);
  by_channels<T>(
      d,
      [&](int i) VLMOPS_INLINED {
        auto x = A::read(row + i);
        for (int v = 0; v < A::kVectors; ++v) x.v[v] *= factor;
        A::write(to + i, x, streams);
      },
      [&](int i) VLMOPS_INLINED { store<kRest>(to + i, factor * load<kRest>(row + i)); });
}

// Of n >= 1 logits, in place.
inline void softmax(float* s, int n) {
  float most = s[0], sum = 0.0f;
  for (int i = 1; i < n; ++i) most = s[i] > most ? s[i] : most;
  Vec<float, kFloats> sums = {};
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    const auto x = exp<width>(load<width>(s + i) - most);
    store<width>(s + i, x);
    if constexpr (width == kFloats) {
      sums += x;
    } else {
      sum += x[0];
    }
  });
  sum += sum_lanes<kFloats>(sums);
  for (int i = 0; i < n; ++i) s[i] /= sum;
}

// What is the same for all cells of a call, and a block of heads of one of them.
template <class T>
struct Block {
  const Params& p;
  const Token<T>* tokens;
  int n;             // of them
  int first, count;  // heads

  // to[h * n + t] = row h of x . a token's, times the scale.
  template <const T* Token<T>::* kRow, Strides Encoder::* kStride>
  VLMOPS_INLINE void multiply(const T* x, int64_t x_head, float scale, float* to) const {
    by_four(n, [&](auto some, int t) VLMOPS_INLINED {
      constexpr int N = decltype(some)::value;
      for (int h = 0; h < count; ++h) {
        const T* rows[N];
        float of[N];
        for (int i = 0; i < N; ++i) rows[i] = row<kRow, kStride>(t + i, h);
        products(x + h * x_head, rows, p.head_dim, of);
        for (int i = 0; i < N; ++i) to[h * n + t + i] = scale * of[i];
      }
    });
  }

  // sums[h] = sum of weights[h * n + t] * a token's row h
  template <const T* Token<T>::* kRow, Strides Encoder::* kStride>
  VLMOPS_INLINE void sum(const float* weights, float* sums) const {
    __builtin_memset(sums, 0, sizeof(float) * count * p.head_dim);
    by_four(n, [&](auto some, int t) VLMOPS_INLINED {
      constexpr int N = decltype(some)::value;
      for (int h = 0; h < count; ++h) {
        const T* rows[N];
        float of[N];
        for (int i = 0; i < N; ++i) {
          rows[i] = row<kRow, kStride>(t + i, h);
          of[i] = weights[h * n + t + i];
        }
        add_rows(sums + h * p.head_dim, rows, of, p.head_dim);
      }
    });
  }

  // Of a token's gradient row h is weights[h * n + t] * row h of x.
  template <void* Encoder::* kGrad>
  VLMOPS_INLINE void spread(const float* weights, const T* x, int64_t x_head) const {
    for (int t = 0; t < n; ++t) {
      auto* grad = static_cast<T*>(tokens[t].of->*kGrad);
      if (grad == nullptr) continue;
      grad += tokens[t].place + static_cast<int64_t>(first) * p.head_dim;
      for (int h = 0; h < count; ++h)
        write_scaled(grad + h * p.head_dim, x + h * x_head, weights[h * n + t], p.head_dim,
                     p.streams);
    }
  }

 private:
  template <const T* Token<T>::* kRow, Strides Encoder::* kStride>
  VLMOPS_INLINE const T* row(int t, int h) const {
    return tokens[t].*kRow + (first + h) * (tokens[t].of->*kStride).head;
  }
};

// f(cell's number, cell, a block of its heads).
template <class T, class F>
inline void by_blocks(const Params& p, int64_t begin, int64_t end, const F& f) {
  Token<T> tokens[kMaxKeys];
  const int wide = p.keys > p.head_dim ? p.keys : p.head_dim, most = kScratch / wide;
  for (int64_t i = begin; i < end; ++i) {
    const Cell cell{i / (p.grid_h * p.grid_w), i / p.grid_w % p.grid_h, i % p.grid_w};
    const int n = gather(p, cell, tokens);
    for (int first = 0; first < p.heads; first += most) {
      const int left = p.heads - first;
      f(i, cell, Block<T>{p, tokens, n, first, left < most ? left : most});
    }
  }
}

template <class T>
void write_block(const Block<T>& block, int64_t cell, const float* sums) {
  const Params& p = block.p;
  T* out = static_cast<T*>(p.out) + (cell * p.heads + block.first) * p.head_dim;
  for (int h = 0; h < block.count; ++h)
    write_sums(out + h * p.head_dim, sums + h * p.head_dim, p.head_dim);
}

template <class T>
void forward_cells(const Params& p, int64_t begin, int64_t end) {
  alignas(64) float weights[kScratch], sums[kScratch];
  by_blocks<T>(p, begin, end, [&](int64_t i, const Cell& cell, const Block<T>& block) {
    const int64_t head = p.q_stride.head;
    const T* q = static_cast<const T*>(p.q) + at(p.q_stride, cell) + block.first * head;
    block.template multiply<&Token<T>::key, &Encoder::key_stride>(q, head, p.scale, weights);
    for (int h = 0; block.n != 0 && h < block.count; ++h) softmax(weights + h * block.n, block.n);
    block.template sum<&Token<T>::value, &Encoder::value_stride>(weights, sums);
    write_block(block, i, sums);
  });
}

// p (r - sum of p r) scale, into r: in float64, as the difference cancels.
inline void through_softmax(const float* p, float* r, int n, double scale) {
  double mean = 0.0;
  for (int i = 0; i < n; ++i) mean += static_cast<double>(p[i]) * r[i];
  for (int i = 0; i < n; ++i) r[i] = static_cast<float>(p[i] * (r[i] - mean) * scale);
}

template <class T>
void backward_cells(const Params& p, int64_t begin, int64_t end) {
  alignas(64) float weights[kScratch], slopes[kScratch], sums[kScratch];
  by_blocks<T>(p, begin, end, [&](int64_t i, const Cell& cell, const Block<T>& block) {
    const int64_t q_head = p.q_stride.head, grad_head = p.grad_stride.head;
    const T* q = static_cast<const T*>(p.q) + at(p.q_stride, cell) + block.first * q_head;
    const T* grad =
        static_cast<const T*>(p.grad) + at(p.grad_stride, cell) + block.first * grad_head;
    block.template multiply<&Token<T>::key, &Encoder::key_stride>(q, q_head, p.scale, weights);
    for (int h = 0; block.n != 0 && h < block.count; ++h) softmax(weights + h * block.n, block.n);
    block.template spread<&Encoder::value_grad>(weights, grad, grad_head);
    if (!p.needs_weights) return;
    block.template multiply<&Token<T>::value, &Encoder::value_stride>(grad, grad_head, 1.0f,
                                                                      slopes);
    for (int h = 0; h < block.count; ++h)
      through_softmax(weights + h * block.n, slopes + h * block.n, block.n, p.scale);
    block.template spread<&Encoder::key_grad>(slopes, q, q_head);
    if (p.out == nullptr) return;
    block.template sum<&Token<T>::key, &Encoder::key_stride>(slopes, sums);
    write_block(block, i, sums);
  });
  finish_streams();
}

void forward(const Params& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) { forward_cells<Pointee<decltype(type)>>(p, begin, end); });
}

void backward(const Params& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) { backward_cells<Pointee<decltype(type)>>(p, begin, end); });
}

}  // namespace
}  // namespace vlmops::spatial_aggregate
