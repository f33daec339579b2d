// The HD transform on the CPU. Compiled once per instruction set (common/cpu_kernels.cpp).
//
// Token (y, x) of an image, counted over the crops of its picture, are the f * f features of block
// (y, x), one after the other in the order (dy, dx), or their mean. Every row of tokens ends in
// `newline`; `separator` stands between the whole picture and its parts.
//
// Bytes: K * sizeof(T) read and written per token, K = f * f * C. At Phi-3.5-vision's 4 x 4 crops
// and the whole picture, 2,509 tokens of 4,096 channels, that is 41 MB in float32. f features of a
// row of a block lie side by side: they are copied in runs of f * C elements, 8 KiB there. Backward
// copies one feature at a time, and writes zeros where no token has it.
#pragma once

#include "common/rows.h"
#include "ops/hd_transform/hd_transform.h"

namespace vlmops::hd_transform {
namespace {

constexpr int64_t kColumns = 512;  // that are summed at a time, in L1

template <class Word>
VLMOPS_INLINE void copy(const Word* from, int64_t stride, Word* to, int64_t n) {
  if (stride == 1) {
    __builtin_memcpy(to, from, n * sizeof(Word));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  }
}

// N values of T, `stride` apart, widened.
template <int N, class T>
VLMOPS_INLINE Vec<float, N> gather(const T* from, int64_t stride) {
  if (stride == 1) return load<N>(from);
  T values[N];
  for (int i = 0; i < N; ++i) values[i] = from[i * stride];
  return load<N>(values);
}

// Where block row `dy` of a token begins, in elements.
inline int64_t run_of(const Params& p, const Image& image, const Source& s, int dy) {
  const int64_t width = static_cast<int64_t>(p.side) * p.factor;
  const int64_t row = p.prefix + (static_cast<int64_t>(s.y) * p.factor + dy) * width +
                      static_cast<int64_t>(s.x) * p.factor;
  return image.offset + s.crop * p.crop_stride + row * p.pixel_stride;
}

template <class Word>
inline void merge(const Params& p, const Image& image, const Source& s, const Word* features,
                  Word* to) {
  const int64_t c = p.channels, f = p.factor;
  const bool adjacent = p.channel_stride == 1 && p.pixel_stride == c;
  for (int dy = 0; dy < f; ++dy, to += f * c) {
    const Word* from = features + run_of(p, image, s, dy);
    if (adjacent) {
      copy(from, 1, to, f * c);
    } else {
      for (int64_t dx = 0; dx < f; ++dx)
        copy(from + dx * p.pixel_stride, p.channel_stride, to + dx * c, c);
    }
  }
}

// The mean of count rows, `stride` between channels, from element i on.
template <int N, class T>
VLMOPS_INLINE void average_lanes(const T* const* rows, int count, int64_t stride, float scale,
                                 int64_t i, T* to) {
  Vec<float, N> sum = {};
  for (int r = 0; r < count; ++r) sum += gather<N>(rows[r] + i * stride, stride);
  store<N>(to + i, sum * scale);
}

template <class T>
inline void average(const Params& p, const Image& image, const Source& s, const T* features,
                    T* to) {
  const T* rows[kMaxFactor * kMaxFactor];
  const int count = p.block();
  for (int dy = 0; dy < p.factor; ++dy) {
    const T* from = features + run_of(p, image, s, dy);
    for (int dx = 0; dx < p.factor; ++dx) rows[dy * p.factor + dx] = from + dx * p.pixel_stride;
  }
  const int64_t n = p.channels, stride = p.channel_stride;
  int64_t i = 0;
  if (stride == 1) {
    if constexpr (__is_same(T, bfloat16)) {
      for (; i + 2 * kFloats <= n; i += 2 * kFloats) {
        Vec<float, kFloats> even = {}, odd = {};
        for (int r = 0; r < count; ++r) {
          const auto x = load_even_odd<kFloats>(rows[r] + i);
          even += x.even;
          odd += x.odd;
        }
        store_even_odd<kFloats>(to + i, even * p.scale, odd * p.scale);
      }
    }
    for (; i + kFloats <= n; i += kFloats) average_lanes<kFloats>(rows, count, 1, p.scale, i, to);
  }
  for (; i < n; ++i) average_lanes<1>(rows, count, stride, p.scale, i, to);
}

// f(image, row) for rows [begin, end), whose images begin at `first`.
template <class F>
VLMOPS_INLINE void each_row(const Params& p, int64_t Image::* first, int64_t begin, int64_t end,
                            const F& f) {
  if (begin >= end) return;
  int image = image_of(p, first, begin);
  for (int64_t row = begin; row < end; ++row) {
    while (image + 1 < p.image_count && p.images[image + 1].*first <= row) ++image;
    f(p.images[image], row);
  }
}

template <class T, class Block>
inline void write_tokens(const Params& p, int64_t begin, int64_t end, const Block& block) {
  const int64_t depth = p.depth();
  each_row(p, &Image::token, begin, end, [&](const Image& image, int64_t row) VLMOPS_INLINED {
    T* to = static_cast<T*>(p.dst) + row * depth;
    const Source s = source_of(p, image, row - image.token);
    if (s.kind == Kind::kBlock) {
      block(image, s, static_cast<const T*>(p.src), to);
    } else {
      const void* learned = s.kind == Kind::kNewline ? p.newline : p.separator;
      copy(static_cast<const T*>(learned), 1, to, depth);
    }
  });
}

template <class T, class Row>
inline void write_features(const Params& p, int64_t begin, int64_t end, const Row& write) {
  const int64_t c = p.channels;
  each_row(p, &Image::pixel, begin, end, [&](const Image& image, int64_t row) VLMOPS_INLINED {
    T* to = static_cast<T*>(p.dst) + row * c;
    const Target t = target_of(p, image, row);
    if (t.token < 0) {
      __builtin_memset(static_cast<void*>(to), 0, c * sizeof(T));
    } else {
      write(static_cast<const T*>(p.src) + t.token * p.token_stride +
                t.part * c * p.token_channel_stride,
            to);
    }
  });
}

void forward(const Params& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (p.mean) {
      write_tokens<T>(p, begin, end,
                      [&](const Image& image, const Source& s, const T* features, T* to) {
                        average(p, image, s, features, to);
                      });
    } else {
      write_tokens<T>(p, begin, end,
                      [&](const Image& image, const Source& s, const T* features, T* to) {
                        merge(p, image, s, features, to);
                      });
    }
  });
}

void backward(const Params& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    const int64_t stride = p.token_channel_stride;
    if (p.mean) {
      write_features<T>(p, begin, end, [&](const T* from, T* to) {
        by_vectors(p.channels, [&](auto lanes, int64_t i) VLMOPS_INLINED {
          constexpr int n = decltype(lanes)::value;
          store<n>(to + i, gather<n>(from + i * stride, stride) * p.scale);
        });
      });
    } else {
      write_features<T>(p, begin, end,
                        [&](const T* from, T* to) { copy(from, stride, to, p.channels); });
    }
  });
}

// Adds row `row` of the tokens' gradient to `sum`.
template <class T>
VLMOPS_INLINE void add_row(const Params& p, int64_t row, int64_t begin, int64_t n, float* sum) {
  const int64_t stride = p.token_channel_stride;
  const T* from = static_cast<const T*>(p.src) + row * p.token_stride + begin * stride;
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    store<width>(sum + i, load<width>(sum + i) + gather<width>(from + i * stride, stride));
  });
}

// Columns [begin, begin + n): in float32 over 64 rows, in float64 beyond.
template <class T>
inline void add_columns(const Params& p, int64_t begin, int64_t n, double* newline,
                        double* separator) {
  constexpr int kRows = 64;
  alignas(64) float sum[kColumns] = {};
  int rows = 0;
  const auto flush = [&](double* total) {
    for (int64_t i = 0; i < n; ++i) total[i] += static_cast<double>(sum[i]);
    __builtin_memset(sum, 0, sizeof sum);
    rows = 0;
  };
  for (int i = 0; i < p.image_count; ++i) {
    const Image& image = p.images[i];
    const int64_t whole = whole_tokens(p), parts = part_tokens(image);
    const int64_t part_at = image.token + (p.sub_first ? 0 : whole + 1);
    const int64_t whole_at = image.token + (p.sub_first ? parts + 1 : 0);
    const auto add = [&](int64_t row) {
      add_row<T>(p, row, begin, n, sum);
      if (++rows == kRows) flush(newline);
    };
    for (int y = 1; y <= image.height; ++y) add(part_at + y * (image.width + int64_t{1}) - 1);
    for (int y = 1; y <= p.side; ++y) add(whole_at + y * (p.side + int64_t{1}) - 1);
  }
  flush(newline);
  for (int i = 0; i < p.image_count; ++i) {
    const Image& image = p.images[i];
    add_row<T>(p, image.token + (p.sub_first ? part_tokens(image) : whole_tokens(p)), begin, n,
               sum);
    if (++rows == kRows) flush(separator);
  }
  flush(separator);
}

void sums(const Params& p, int64_t begin, int64_t end, double* sums) {
  with_type(p.dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t n = end - c < kColumns ? end - c : kColumns;
      add_columns<T>(p, c, n, sums + c, sums + p.depth() + c);
    }
  });
}

}  // namespace
}  // namespace vlmops::hd_transform
