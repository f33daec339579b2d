// STAND-IN: a naive loop, replaced by the real kernels shortly.
#pragma once
#include "common/attention.h"
#include "common/exp.h"
#include "common/rows.h"
namespace vlmops::attention {
namespace {
inline float at_(const void* d, DType t, int64_t i) {
  switch (t) {
    case DType::kFloat32: return static_cast<const float*>(d)[i];
    case DType::kBFloat16: return load<1>(static_cast<const bfloat16*>(d) + i)[0];
    default: return load<1>(static_cast<const float16*>(d) + i)[0];
  }
}
inline void put_(void* d, DType t, int64_t i, float v) {
  const Vec<float, 1> x = {v};
  switch (t) {
    case DType::kFloat32: static_cast<float*>(d)[i] = v; break;
    case DType::kBFloat16: store<1>(static_cast<bfloat16*>(d) + i, x); break;
    default: store<1>(static_cast<float16*>(d) + i, x);
  }
}
inline size_t scratch(const Params& p, int64_t) { return static_cast<size_t>(p.keys + p.dim + 64); }
inline size_t backward_scratch(const Params& p, int64_t) { return static_cast<size_t>(3 * p.keys * p.dim + p.dim + 64); }
inline int64_t row_(const int32_t* rows, int64_t i) { return rows == nullptr ? i : rows[i]; }
inline void forward(const Params& p, const Job& j, int begin, int end, float* s) {
  const int G = p.group();
  for (int h = begin * G; h < end * G; ++h) for (int64_t i = 0; i < j.q.count; ++i) {
    const int64_t qi = j.q_rows ? j.q_rows[i] : j.position + i;
    int64_t m = j.k.count;
    if (p.causal) { const int64_t lim = j.position + i + j.visible + 1; m = lim < 0 ? 0 : lim < m ? lim : m; }
    float top = -__builtin_inff();
    for (int64_t n = 0; n < m; ++n) {
      float acc = 0;
      for (int d = 0; d < p.dim; ++d) acc += at_(p.q.data, p.dtype, offset_of(p.q_starts, p.q, j.segment, j.q.first) + qi * p.q.row + h * p.q.head + d) * at_(p.k.data, p.dtype, offset_of(p.k_starts, p.k, j.segment, j.k.first) + row_(j.k_rows, n) * p.k.row + h / G * p.k.head + d);
      s[n] = acc * p.scale; top = s[n] > top ? s[n] : top;
    }
    float sum = 0; float* o = s + p.keys;
    for (int d = 0; d < p.dim; ++d) o[d] = 0;
    for (int64_t n = 0; n < m; ++n) {
      const float e = exp<1>(Vec<float, 1>{s[n] - top})[0]; sum += e;
      const int64_t voff = offset_of(p.k_starts, p.v, j.segment, j.k.first);
      for (int d = 0; d < p.dim; ++d) o[d] += e * at_(p.v.data, p.dtype, voff + row_(j.k_rows, n) * p.v.row + h / G * p.v.head + d);
    }
    const int64_t r = j.q.first + qi;
    for (int d = 0; d < p.dim; ++d) put_(p.out, p.dtype, (r * p.heads + h) * p.dim + d, sum > 0 ? o[d] / sum : 0.0f);
    p.lse[h * p.rows + r] = top + __builtin_logf(sum);
  }
}
inline void backward(const Backward&, const Job*, int64_t, int, float*) { __builtin_trap(); }
}  // namespace
}  // namespace vlmops::attention
