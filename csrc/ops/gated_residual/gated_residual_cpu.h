// The gated residual on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
//   out = x + tanh(gate) * y                in rows that are added, x elsewhere
//   grad_y = tanh(gate) * grad              there, 0 elsewhere
//   grad_gate = (1 - tanh(gate)^2) * sum of y * grad over those rows
//
// Bytes: x and y read, out written, 3 C * sizeof(T) a row: 2,048 tokens of Mllama's 4,096 channels
// are 50 MB in bfloat16. Backward reads grad and y and writes grad_y, as many; where the gate is
// frozen y is not read. Eager writes and reads the product once more, and the masked y before it.
//
// tanh is computed once a call, and lies in the order in which channels come into vectors. Sums are
// float64, of products that are exact: the gradient of a single gate is one number, whose error no
// other hides. kTogether rows at a time keep the traffic of the sums, 8 bytes a channel, low.
#pragma once

#include "common/rows.h"
#include "common/stream.h"
#include "common/tanh.h"
#include "ops/gated_residual/gated_residual.h"

namespace vlmops::gated_residual {
namespace {

constexpr int kTogether = 4;

inline void tanh_of_gate(const Params& p, float* to) {
  with_type(p.gate.dtype, [&](auto* type) {
    using G = Pointee<decltype(type)>;
    const auto* gate = static_cast<const G*>(p.gate.data);
    const int64_t n = p.gate.per_channel ? p.channels : 1;
    for (int64_t i = 0; i < n; ++i) to[i] = one(gate + i * p.gate.stride);
  });
  const int64_t n = p.gate.per_channel ? p.channels : 1;
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    const auto y = tanh<width>(load<width>(to + i));
    // NaN without a payload: see store_even_odd.
    store<width>(to + i, y == y ? y : Vec<float, width>{} + __builtin_nanf(""));
  });
  with_type(p.dtype, [&](auto* type) {
    using A = AccessOf<Pointee<decltype(type)>>;
    if constexpr (A::kVectors > 1) {
      for (int64_t first = 0; n > 1 && first < whole_steps<A>(n); first += A::kStep) {
        float ordered[A::kStep];
        for (int i = 0; i < A::kStep; ++i) ordered[A::place(i)] = to[first + i];
        __builtin_memcpy(to + first, ordered, sizeof ordered);
      }
    }
  });
}

// What kernels multiply by.
template <bool kChannels>
struct Tanh {
  const float* data;
  VLMOPS_INLINE Vec<float, kFloats> vector(int64_t at) const {
    if constexpr (kChannels) return load<kFloats>(data + at);
    return Vec<float, kFloats>{} + data[0];
  }
  VLMOPS_INLINE float at(int64_t place) const { return data[kChannels ? place : 0]; }
};

template <class T, bool kChannels>
void forward_rows(const Params& p, const float* table, int64_t begin, int64_t end) {
  using A = AccessOf<T>;
  const Tanh<kChannels> tanh{table};
  const int64_t n = p.channels, x_step = p.x_stride.channel, y_step = p.y_stride.channel;
  const int64_t whole = x_step == 1 && y_step == 1 ? whole_steps<A>(n) : 0;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row_at(p, p.x_stride, row);
    T* out = static_cast<T*>(p.out) + row * n;
    if (!is_added(p, row)) {
      if (x_step == 1) {
        copy_run(out, x, n, p.streams);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = x[i * x_step];
      }
      continue;
    }
    const T* y = static_cast<const T*>(p.y) + row_at(p, p.y_stride, row);
    const bool streamed = p.streams && aligned(out);
    int64_t i = 0;
    for (; i < whole; i += A::kStep) {
      auto sum = A::read(x + i);
      const auto gated = A::read(y + i);
      for (int v = 0; v < A::kVectors; ++v) sum.v[v] += tanh.vector(i + v * kFloats) * gated.v[v];
      A::write(out + i, sum, streamed);
    }
    for (; i < n; ++i) {
      const float sum = one(x + i * x_step) + tanh.at(place_of<A>(i, n)) * one(y + i * y_step);
      store<1>(out + i, Vec<float, 1>{sum});
    }
  }
  finish_streams();
}

// to[0 .. kFloats) += x * y, exact but for the sums.
template <class T>
VLMOPS_INLINE void add_products(double* to, const Vec<float, kFloats>& x,
                                const Vec<float, kFloats>& y) {
  if constexpr (sizeof(T) == 2) {
    add_to_doubles(to, x * y);
  } else {
    for (int i = 0; i < kFloats; i += kDoubles) {
      auto* sum = reinterpret_cast<Vec<double, kDoubles>*>(to + i);
      *sum += load_doubles(reinterpret_cast<const float*>(&x) + i) *
              load_doubles(reinterpret_cast<const float*>(&y) + i);
    }
  }
}

// Of kRows rows that are added. Every sum gets its rows in their order, whatever strides they have.
template <class T, bool kChannels, int kRows>
VLMOPS_INLINE void backward_rows(const Params& p, const Tanh<kChannels>& tanh, const int64_t* rows,
                                 double* sums) {
  using A = AccessOf<T>;
  const int64_t n = p.channels, g_step = p.x_stride.channel, y_step = p.y_stride.channel;
  const T *g[kRows], *y[kRows];
  T* out[kRows];
  bool streamed = p.streams;
  for (int r = 0; r < kRows; ++r) {
    g[r] = static_cast<const T*>(p.x) + row_at(p, p.x_stride, rows[r]);
    y[r] = sums == nullptr ? nullptr : static_cast<const T*>(p.y) + row_at(p, p.y_stride, rows[r]);
    out[r] = p.out == nullptr ? nullptr : static_cast<T*>(p.out) + rows[r] * n;
    streamed = streamed && aligned(out[r]);
  }
  const bool side_by_side = g_step == 1 && (sums == nullptr || y_step == 1);
  const int64_t whole = side_by_side ? whole_steps<A>(n) : 0;
  int64_t i = 0;
  for (; i < whole; i += A::kStep) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto grad = A::read(g[r] + i);
      if (p.out != nullptr) {
        auto of_y = grad;
        for (int v = 0; v < A::kVectors; ++v) of_y.v[v] *= tanh.vector(i + v * kFloats);
        A::write(out[r] + i, of_y, streamed);
      }
      if (sums == nullptr) continue;
      const auto added = A::read(y[r] + i);
      for (int v = 0; v < A::kVectors; ++v)
        add_products<T>(sums + (kChannels ? i : 0) + v * kFloats, grad.v[v], added.v[v]);
    }
  }
  for (; i < n; ++i) {
    const int64_t place = place_of<A>(i, n);
    for (int r = 0; r < kRows; ++r) {
      const float grad = one(g[r] + i * g_step);
      if (p.out != nullptr) store<1>(out[r] + i, Vec<float, 1>{grad * tanh.at(place)});
      if (sums == nullptr) continue;
      const double product =
          static_cast<double>(grad) * static_cast<double>(one(y[r] + i * y_step));
      sums[kChannels ? place : place % A::kStep] += product;
    }
  }
}

template <class T, bool kChannels>
void backward_typed(const Params& p, const float* table, int64_t begin, int64_t end,
                    double* total) {
  using A = AccessOf<T>;
  const Tanh<kChannels> tanh{table};
  alignas(64) double lanes[A::kStep] = {};  // of a single gate
  double* const sums = total == nullptr || kChannels ? total : lanes;
  int64_t rows[kTogether];
  int together = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (!is_added(p, row)) {
      if (p.out != nullptr)
        __builtin_memset(static_cast<T*>(p.out) + row * p.channels, 0, p.channels * sizeof(T));
      continue;
    }
    rows[together++] = row;
    if (together < kTogether) continue;
    backward_rows<T, kChannels, kTogether>(p, tanh, rows, sums);
    together = 0;
  }
  for (int r = 0; r < together; ++r) backward_rows<T, kChannels, 1>(p, tanh, rows + r, sums);
  finish_streams();
  if (total == nullptr) return;
  if constexpr (!kChannels) {
    for (const double lane : lanes) *total += lane;
  } else {
    in_order<A>(total, p.channels);
  }
}

void forward(const Params& p, const float* tanh, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    p.gate.per_channel ? forward_rows<T, true>(p, tanh, begin, end)
                       : forward_rows<T, false>(p, tanh, begin, end);
  });
}

void backward(const Params& p, const float* tanh, int64_t begin, int64_t end, double* sums) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    p.gate.per_channel ? backward_typed<T, true>(p, tanh, begin, end, sums)
                       : backward_typed<T, false>(p, tanh, begin, end, sums);
  });
}

}  // namespace
}  // namespace vlmops::gated_residual
