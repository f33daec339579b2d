// The norm behind a sum, on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
//   s = x + x_bias + residual
//   out = (s - mean) * r * weight + bias;   r = 1 / sqrt(var + eps)    "rms": mean 0, var mean(s^2)
//   grad_s = r * (wg - mean(wg) - y * mean(wg y)) + grad_sum           "rms": no mean(wg)
//   grad_weight = sum of grad * y;  grad_bias = sum of grad;  grad_x_bias = sum of grad_s
// with y = (s - mean) * r and wg = weight * grad.
//
// Bytes: x and residual read, out written and, where it is needed later, s: 3 or 4 C * sizeof(T) a
// row. BLIP-2's Q-Former, 8 x 32 queries of 768 in float32, is 2.4 MB, 3.1 when it is recorded.
// Backward reads grad and s and writes grad_s, and reads grad_sum where s went on as the residual.
// Eager adds twice and norms: 5 C more forward.
//
// A row's sum lies in L1 as float32, in the order in which channels come into vectors, from its one
// read on; it is normed before it is rounded. Mean and r are computed again from the rounded s in
// backward, which reads it anyway. kTogether rows at a time keep the traffic of the sums over rows,
// 8 bytes a channel and vector, low.
#pragma once

#include "common/norm_cpu.h"
#include "common/rows.h"
#include "ops/add_norm/add_norm.h"

namespace vlmops::add_norm {
namespace {

constexpr int kTogether = 4;

inline void table_of(const Params& p, float* table) {
  const int64_t n = p.channels;
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    using A = AccessOf<T>;
    for (int k = 0; k < kVectors; ++k, table += n) {
      const NormVector& v = p.vectors[k];
      if (v.data == nullptr) {
        for (int64_t i = 0; i < n; ++i) table[i] = k == kWeight ? 1.0f : 0.0f;
        continue;
      }
      int64_t i = 0;
      if (v.dtype == p.dtype && v.stride == 1) {
        const T* from = static_cast<const T*>(v.data);
        for (; i < whole_steps<A>(n); i += A::kStep) {
          const auto x = A::read(from + i);
          for (int u = 0; u < A::kVectors; ++u) store<kFloats>(table + i + u * kFloats, x.v[u]);
        }
      }
      for (; i < n; ++i) table[place_of<A>(i, n)] = canonical(element(v, i));
    }
  });
}

inline RowNorm norm_of(const Params& p) { return {p.layer, p.eps}; }

// Leaves s in `row`, and rounded in p.sum.
template <class T>
VLMOPS_INLINE void add_row(const Params& p, const float* x_bias, int64_t number, float* row,
                           Sums& sums, Sums& squares) {
  using A = AccessOf<T>;
  const int64_t n = p.channels;
  const T* x = static_cast<const T*>(p.x) + row_at(p, p.x_stride, number);
  const T* residual = p.residual == nullptr ? nullptr
                                            : static_cast<const T*>(p.residual) +
                                                  row_at(p, p.residual_stride, number);
  T* sum = p.sum == nullptr ? nullptr : static_cast<T*>(p.sum) + number * n;
  const bool streamed = p.streams && aligned(sum);
  each_step<A>(1, n, [&](A a, int64_t, int64_t i, int64_t, int slot) VLMOPS_INLINED {
    auto s = a.read(x + i);
    for (int v = 0; v < A::kVectors; ++v) s.v[v] += load<kFloats>(x_bias + i + v * kFloats);
    if (residual != nullptr) {
      const auto more = a.read(residual + i);
      for (int v = 0; v < A::kVectors; ++v) s.v[v] += more.v[v];
    }
    if (sum != nullptr) a.write(sum + i, s, streamed);
    for (int v = 0; v < A::kVectors; ++v) {
      sums.part[slot] += s.v[v];
      squares.part[slot] += s.v[v] * s.v[v];
      store<kFloats>(row + i + v * kFloats, s.v[v]);
    }
  });
  each_left<A>(1, n, [&](int64_t, int64_t i, int64_t) VLMOPS_INLINED {
    row[i] = one(x + i) + x_bias[i];
    if (residual != nullptr) row[i] += one(residual + i);
    if (sum != nullptr) store<1>(sum + i, Vec<float, 1>{row[i]});
    sums.left += row[i];
    squares.left += row[i] * row[i];
  });
}

template <class T>
void forward_rows(const Params& p, const float* table, int64_t begin, int64_t end, float* row) {
  using A = AccessOf<T>;
  const int64_t n = p.channels;
  const float *weight = table, *bias = table + n, *x_bias = table + 2 * n;
  for (int64_t number = begin; number < end; ++number) {
    const auto moments = [&](float about, float& to_sum, float& to_squares) {
      Sums sums, squares;
      if (about == 0.0f) {
        add_row<T>(p, x_bias, number, row, sums, squares);
      } else {  // the row is far from 0
        each_step<Access<float, false>>(
            1, n, [&](auto, int64_t, int64_t i, int64_t, int slot) VLMOPS_INLINED {
              const auto off = load<kFloats>(row + i) - about;
              sums.part[slot] += off;
              squares.part[slot] += off * off;
            });
        each_left<Access<float, false>>(1, n, [&](int64_t, int64_t i, int64_t) VLMOPS_INLINED {
          const float off = row[i] - about;
          sums.left += off;
          squares.left += off * off;
        });
      }
      to_sum = sums.total();
      to_squares = squares.total();
    };
    const Statistics by = statistics(norm_of(p), 0.0f, n, moments);
    T* out = static_cast<T*>(p.out) + number * n;
    const bool streamed = p.streams && aligned(out);
    each_step<A>(1, n, [&](A a, int64_t, int64_t i, int64_t, int) VLMOPS_INLINED {
      typename A::Values y;
      for (int v = 0; v < A::kVectors; ++v) {
        const int64_t at = i + v * kFloats;
        const auto normed = (load<kFloats>(row + at) - by.mean) * by.scale + by.shift;
        y.v[v] = normed * load<kFloats>(weight + at) + load<kFloats>(bias + at);
      }
      a.write(out + i, y, streamed);
    });
    each_left<A>(1, n, [&](int64_t, int64_t i, int64_t) VLMOPS_INLINED {
      const float normed = (row[i] - by.mean) * by.scale + by.shift;
      store<1>(out + i, Vec<float, 1>{normed * weight[i] + bias[i]});
    });
  }
  finish_streams();
}

// A row in backward, whose statistics are known.
template <class T>
struct Row {
  BackwardRow<T, T> normed;
  const T* added;  // the gradient of the sum, or null
};

template <class T>
inline void prepare(const Params& p, const float* weight, int64_t number, Row<T>& row) {
  auto& of = row.normed;
  one_run(of.x, static_cast<const T*>(p.x) + row_at(p, p.x_stride, number), p.channels);
  of.g = static_cast<const T*>(p.grad) + row_at(p, p.grad_stride, number);
  of.dx.run[0] = p.out == nullptr ? nullptr : static_cast<T*>(p.out) + number * p.channels;
  row.added = p.residual == nullptr
                  ? nullptr
                  : static_cast<const T*>(p.residual) + row_at(p, p.residual_stride, number);
  backward_statistics<AccessOf<T>>(norm_of(p), weight, of);
}

// Sums of kRows rows are float32, then float64.
template <class T, int kRows>
VLMOPS_INLINE void backward_rows(const Params& p, const float* weight, const Row<T>* rows,
                                 const CpuSums& to) {
  using A = AccessOf<T>;
  const int64_t n = p.channels;
  const bool adds = p.residual != nullptr, writes = p.out != nullptr;
  bool streamed = p.streams;
  for (int r = 0; r < kRows; ++r) streamed = streamed && aligned(rows[r].normed.dx.run[0]);
  each_step<A>(1, n, [&](A a, int64_t, int64_t i, int64_t, int) VLMOPS_INLINED {
    Vec<float, kFloats> sums[kVectors][A::kVectors] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto& of = rows[r].normed;
      auto s = a.read(of.x.run[0] + i);
      const auto g = a.read(of.g + i);
      typename A::Values added{};
      if (adds) added = a.read(rows[r].added + i);
      for (int v = 0; v < A::kVectors; ++v) {
        const auto y = (s.v[v] - of.by.mean) * of.by.scale + of.by.shift;
        const auto wg = g.v[v] * load<kFloats>(weight + i + v * kFloats);
        s.v[v] = (wg - of.mean_wg - y * of.mean_along) * of.by.scale + added.v[v];
        sums[kWeight][v] += g.v[v] * y;
        sums[kBias][v] += g.v[v];
        sums[kXBias][v] += s.v[v];
      }
      if (writes) a.write(of.dx.run[0] + i, s, streamed);
    }
    for (int k = 0; k < kVectors; ++k) {
      if (to.of[k] == nullptr) continue;
      for (int v = 0; v < A::kVectors; ++v) add_to_doubles(to.of[k] + i + v * kFloats, sums[k][v]);
    }
  });
  each_left<A>(1, n, [&](int64_t, int64_t i, int64_t) VLMOPS_INLINED {
    float sums[kVectors] = {};
    for (int r = 0; r < kRows; ++r) {
      const auto& of = rows[r].normed;
      const float y = (one(of.x.run[0] + i) - of.by.mean) * of.by.scale + of.by.shift;
      const float g = one(of.g + i), added = adds ? one(rows[r].added + i) : 0.0f;
      const float s = (g * weight[i] - of.mean_wg - y * of.mean_along) * of.by.scale + added;
      sums[kWeight] += g * y;
      sums[kBias] += g;
      sums[kXBias] += s;
      if (writes) store<1>(of.dx.run[0] + i, Vec<float, 1>{s});
    }
    for (int k = 0; k < kVectors; ++k)
      if (to.of[k] != nullptr) to.of[k][i] += static_cast<double>(sums[k]);
  });
}

void forward(const Params& p, const float* table, int64_t begin, int64_t end, float* row) {
  with_type(p.dtype,
            [&](auto* type) { forward_rows<Pointee<decltype(type)>>(p, table, begin, end, row); });
}

void backward(const Params& p, const float* table, int64_t begin, int64_t end,
              const CpuSums& sums) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    Row<T> rows[kTogether];
    for (int64_t first = begin; first < end; first += kTogether) {
      const int together = end - first < kTogether ? static_cast<int>(end - first) : kTogether;
      for (int r = 0; r < together; ++r) prepare(p, table, first + r, rows[r]);
      if (together == kTogether) {
        backward_rows<T, kTogether>(p, table, rows, sums);
      } else {
        for (int r = 0; r < together; ++r) backward_rows<T, 1>(p, table, rows + r, sums);
      }
    }
    finish_streams();
    for (double* of : sums.of)
      if (of != nullptr) in_order<AccessOf<T>>(of, p.channels);
  });
}

}  // namespace
}  // namespace vlmops::add_norm
