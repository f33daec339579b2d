// What joins two softmaxes over different keys, on the CPU. Compiled once per instruction set
// (common/cpu_kernels.cpp).
//
//   w_i = 2^(m_i - m) l_i,  out = (w_1 out_1 + w_2 out_2) / (w_1 + w_2)      m = max(m_1, m_2)
//
// of results out_i whose weights are 2^(logit - m_i) / l_i. Bytes: both results read, one written;
// 64 latents of 16 x 96 channels are 1 MB in float32, next to the 57 MB of K and V of 4,608 tokens
// of media, which are not copied.
#pragma once

#include "common/rows.h"
#include "ops/perceiver_attention/perceiver_attention.h"

namespace vlmops::perceiver_attention {
namespace {

inline void join(const Params& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      for (int head = 0; head < p.heads; ++head) {
        const int64_t at = head * p.rows + row, place = (row * p.heads + head) * p.dim;
        const Shares s = shares_of(p, at);
        p.statistics[at] = s.most;
        p.statistics[p.heads * p.rows + at] = s.part;
        T* const out = static_cast<T*>(p.out) + place;
        const T* const other = static_cast<const T*>(p.other) + place;
        by_vectors(p.dim, [&](auto lanes, int64_t i) VLMOPS_INLINED {
          constexpr int width = decltype(lanes)::value;
          store<width>(out + i, load<width>(out + i) * s.first + load<width>(other + i) * s.other);
        });
      }
    }
  });
}

inline void add(const Sum& s, int64_t begin, int64_t end) {
  with_type(s.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    T* const to = static_cast<T*>(s.to) + begin;
    const float *const x = s.first + begin, *const y = s.other + begin;
    by_vectors(end - begin, [&](auto lanes, int64_t i) VLMOPS_INLINED {
      constexpr int width = decltype(lanes)::value;
      store<width>(to + i, load<width>(x + i) + load<width>(y + i));
    });
  });
}

}  // namespace
}  // namespace vlmops::perceiver_attention
