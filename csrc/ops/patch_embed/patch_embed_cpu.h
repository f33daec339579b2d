// Patch embedding on the CPU: what surrounds the product. Compiled once per instruction set.
//
//   y[n, :] = norm(weight @ patch[n] + bias) + positions[n]
//
// Patches go, some hundred at a time, into a panel that stays in the cache; the product is oneDNN's
// or MKL's (vlmops/ops/linear.py), and its rows go from there into their tokens. The matrix of all
// patches is never stored. Bytes beyond the product's own: pixels read, panel written, product
// read, tokens written; CLIP-L/14-336 with 5 images in float32: 6.8 + 6.8 + 11.8 + 11.8 MB, of
// which the pixels and the tokens are memory's: 1 ms on two cores of a Zen 4, against 3.5 GFLOP in
// 14 ms.
//
// pack walks a row of the grid at a time, channel by channel and pixel row by pixel row, so that
// memory is read in order; runs of 14 and 16 pixels are moved by code made for that length, which
// takes a third of the time of a loop. finish adds a token up in float32 in L1 and rounds it once; a
// row of the product may be the token itself, or one row (the bias) may stand for all, where products
// are added afterwards (16 bits). unpack is pack's way back, for gradients.
#pragma once

#include "common/rows.h"
#include "ops/patch_embed/patch_embed.h"

namespace vlmops::patch_embed {
namespace {

constexpr int64_t kMaxRow = 4096;  // floats of a token that are added up at a time

template <class To, class From>
inline To rounded(From x) {
  To to;
  if constexpr (__is_same(From, uint8_t)) {
    store<1>(&to, Vec<float, 1>{static_cast<float>(x)});
  } else {
    store<1>(&to, load<1>(&x));
  }
  return to;
}

// n pixels in a row, n known to the compiler unless kRun is 0.
template <int kRun, class From, class To>
VLMOPS_INLINE void copy_run(const From* from, int64_t stride, To* to, int64_t n) {
  if constexpr (kRun != 0) n = kRun;
  if constexpr (__is_same(From, uint8_t)) {
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<To>(from[i * stride]);
  } else if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = rounded<To>(from[i * stride]);
  } else if constexpr (__is_same(From, To)) {
    __builtin_memcpy(to, from, n * sizeof(To));
  } else {
    by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
      constexpr int width = decltype(lanes)::value;
      store<width>(to + i, load<width>(from + i));
    });
  }
}

// The same through the map of their channel.
template <int kRun, class From, class To>
VLMOPS_INLINE void map_run(const From* from, int64_t stride, To* to, int64_t n, const float* map) {
  if constexpr (kRun != 0) n = kRun;
  for (int64_t i = 0; i < n; ++i) {
    float x;
    if constexpr (__is_same(From, uint8_t)) {
      x = map[from[i * stride]];
    } else {
      x = load<1>(&from[i * stride])[0] * map[0] + map[1];
    }
    to[i] = rounded<To>(x);
  }
}

// `count` patches that follow each other in a row of the grid; panel [count, K].
template <int kRun, class From, class To>
inline void pack_row(const Params& p, const From* from, int64_t count, To* panel) {
  int64_t k = 0;
  for (int64_t c = 0; c < p.size[0]; ++c) {
    const float* map = p.map == nullptr ? nullptr : p.map + c * p.map_columns;
    for (int64_t t = 0; t < p.size[1]; ++t) {
      for (int64_t y = 0; y < p.size[2]; ++y, k += p.size[3]) {
        const From* row = from + c * p.size_stride[0] + t * p.size_stride[1] + y * p.size_stride[2];
        for (int64_t x = 0; x < count; ++x) {
          const From* run = row + x * p.grid_stride[2];
          To* to = panel + x * p.depth + k;
          if (map != nullptr) {
            if (p.size_stride[3] == 1) {
              map_run<kRun>(run, 1, to, p.size[3], map);
            } else {
              map_run<kRun>(run, p.size_stride[3], to, p.size[3], map);
            }
          } else {
            copy_run<kRun>(run, p.size_stride[3], to, p.size[3]);
          }
        }
      }
    }
  }
}

// f(patches that follow each other in a row of the grid, the first's pixels, its row) for rows
// [begin, end).
template <class F>
VLMOPS_INLINE void by_grid_rows(const Params& p, int64_t begin, int64_t end, const F& f) {
  const int64_t patches = p.patches(), width = p.grid[2];
  for (int64_t n = begin; n < end;) {
    const int64_t g = n % patches, x = g % width, y = g / width % p.grid[1];
    const int64_t count = end - n < width - x ? end - n : width - x;
    const int64_t pixel = n / patches * p.image_stride + g / width / p.grid[1] * p.grid_stride[0] +
                          y * p.grid_stride[1] + x * p.grid_stride[2];
    f(count, pixel, n - begin);
    n += count;
  }
}

template <class From, class To>
inline void pack_rows(const Params& p, int64_t begin, int64_t end, To* panel) {
  by_grid_rows(p, begin, end, [&](int64_t count, int64_t pixel, int64_t row) {
    const From* from = static_cast<const From*>(p.pixels) + pixel;
    To* to = panel + row * p.depth;
    switch (p.size[3]) {
      case 14:
        return pack_row<14>(p, from, count, to);
      case 16:
        return pack_row<16>(p, from, count, to);
      default:
        return pack_row<0>(p, from, count, to);
    }
  });
}

void pack(const Params& p, int64_t begin, int64_t end, void* panel, DType dtype) {
  with_type(dtype, [&](auto* to) {
    auto* typed = static_cast<decltype(to)>(panel);
    switch (p.pixel) {
      case Pixel::kFloat32:
        return pack_rows<float>(p, begin, end, typed);
      case Pixel::kBFloat16:
        return pack_rows<bfloat16>(p, begin, end, typed);
      case Pixel::kFloat16:
        return pack_rows<float16>(p, begin, end, typed);
      case Pixel::kUInt8:
        return pack_rows<uint8_t>(p, begin, end, typed);
    }
  });
}

// `count` patches that follow each other in a row of the grid, as pack_row reads them.
template <int kRun, class From, class To>
inline void unpack_row(const Params& p, const From* panel, int64_t stride, int64_t count, To* to) {
  const int64_t n = kRun != 0 ? kRun : p.size[3], step = p.size_stride[3];
  int64_t k = 0;
  for (int64_t c = 0; c < p.size[0]; ++c) {
    const float slope = p.map == nullptr ? 1.0f : p.map[c * p.map_columns];
    for (int64_t t = 0; t < p.size[1]; ++t) {
      for (int64_t y = 0; y < p.size[2]; ++y, k += n) {
        To* row = to + c * p.size_stride[0] + t * p.size_stride[1] + y * p.size_stride[2];
        for (int64_t x = 0; x < count; ++x) {
          const From* run = panel + x * stride + k;
          To* pixels = row + x * p.grid_stride[2];
          if (p.map != nullptr) {
            for (int64_t i = 0; i < n; ++i)
              pixels[i * step] = rounded<To>(load<1>(run + i)[0] * slope);
          } else if (step != 1) {
            for (int64_t i = 0; i < n; ++i) pixels[i * step] = rounded<To>(run[i]);
          } else {
            copy_run<kRun>(run, 1, pixels, n);
          }
        }
      }
    }
  }
}

template <class To, class From>
inline void unpack_rows(const Params& p, int64_t begin, int64_t end, const From* panel,
                        int64_t stride) {
  by_grid_rows(p, begin, end, [&](int64_t count, int64_t pixel, int64_t row) {
    To* to = static_cast<To*>(const_cast<void*>(p.pixels)) + pixel;
    const From* from = panel + row * stride;
    switch (p.size[3]) {
      case 14:
        return unpack_row<14>(p, from, stride, count, to);
      case 16:
        return unpack_row<16>(p, from, stride, count, to);
      default:
        return unpack_row<0>(p, from, stride, count, to);
    }
  });
}

void unpack(const Params& p, int64_t begin, int64_t end, const void* panel, int64_t stride,
            DType dtype) {
  with_type(dtype, [&](auto* from) {
    const auto* typed = static_cast<decltype(from)>(const_cast<void*>(panel));
    switch (p.pixel) {
      case Pixel::kFloat32:
        return unpack_rows<float>(p, begin, end, typed, stride);
      case Pixel::kBFloat16:
        return unpack_rows<bfloat16>(p, begin, end, typed, stride);
      case Pixel::kFloat16:
        return unpack_rows<float16>(p, begin, end, typed, stride);
      case Pixel::kUInt8:  // has no gradient
        return;
    }
  });
}

// sum[i] += weight * row[i]
template <class T>
inline void add_row(float* sum, const T* row, float weight, int64_t n) {
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    store<width>(sum + i, load<width>(sum + i) + weight * load<width>(row + i));
  });
}

// Sums of 64 rows, and of 64 of those: a plain float32 sum over all rows of a video loses digits.
void column_sums(const void* matrix, DType dtype, int64_t rows, int64_t stride, int64_t begin,
                 int64_t end, float* sums) {
  constexpr int64_t kRows = 64, kColumns = 512;
  with_type(dtype, [&](auto* type) {
    const auto* typed = static_cast<decltype(type)>(const_cast<void*>(matrix));
    for (int64_t c = begin; c < end; c += kColumns) {
      const int64_t n = end - c < kColumns ? end - c : kColumns;
      alignas(64) float block[kColumns] = {}, blocks[kColumns] = {}, all[kColumns] = {};
      for (int64_t r = 0; r < rows; ++r) {
        add_row(block, typed + r * stride + c, 1.0f, n);
        if ((r + 1) % kRows == 0 || r + 1 == rows) {
          add_row(blocks, block, 1.0f, n);
          __builtin_memset(block, 0, sizeof block);
        }
        if ((r + 1) % (kRows * kRows) == 0 || r + 1 == rows) {
          add_row(all, blocks, 1.0f, n);
          __builtin_memset(blocks, 0, sizeof blocks);
        }
      }
      __builtin_memcpy(sums + c, all, n * sizeof(float));
    }
  });
}

// Of a token of the image, or of its patch, among those that a position counts.
inline int64_t place_of(const Params& p, const Position& q, int64_t token, int64_t patch) {
  return q.patches_only ? p.first_patch + patch : p.first_token + token;
}

// The row of its table that it adds.
inline int64_t row_at(const Params& p, const Position& q, int64_t image, int64_t token,
                      int64_t patch, int64_t tap) {
  const int64_t at = place_of(p, q, token, patch);
  if (q.index == nullptr) return at;
  return load_int(q.index, q.index_type,
                  image * q.index_stride[0] + at * q.index_stride[1] + tap * q.index_stride[2]);
}

inline float weight_at(const Position& q, int64_t sequence, int64_t token, int64_t tap) {
  if (q.weight == nullptr) return 1.0f;
  const int64_t at =
      sequence * q.weight_stride[0] + token * q.weight_stride[1] + tap * q.weight_stride[2];
  switch (q.weight_dtype) {
    case DType::kFloat32:
      return load<1>(static_cast<const float*>(q.weight) + at)[0];
    case DType::kBFloat16:
      return load<1>(static_cast<const bfloat16*>(q.weight) + at)[0];
    case DType::kFloat16:
      return load<1>(static_cast<const float16*>(q.weight) + at)[0];
  }
  return 0.0f;
}

// Channels [first, first + n) of what is added to a token, or to a patch alone.
inline void add_positions(const Params& p, float* sum, int64_t image, int64_t token, int64_t patch,
                          int64_t first, int64_t n) {
  for (int i = 0; i < p.position_count; ++i) {
    const Position& q = p.positions[i];
    if (q.patches_only && patch < 0) continue;
    for (int64_t tap = 0; tap < q.taps; ++tap) {
      const int64_t row = row_at(p, q, image, token, patch, tap);
      const float weight = weight_at(q, image, place_of(p, q, token, patch), tap);
      with_type(q.dtype, [&](auto* type) {
        const auto* table = static_cast<const decltype(type)>(const_cast<void*>(q.table));
        add_row(sum, table + row * q.row_stride + first, weight, n);
      });
    }
  }
}

template <class T>
inline void read_row(float* sum, const T* row, int64_t n) {
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    store<width>(sum + i, load<width>(row + i));
  });
}

inline void write_row(const Params& p, int64_t token, int64_t first, const float* sum, int64_t n) {
  with_type(p.out_dtype, [&](auto* type) {
    auto* to = static_cast<decltype(type)>(p.out) + token * p.channels + first;
    by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
      constexpr int width = decltype(lanes)::value;
      store<width>(to + i, load<width>(sum + i));
    });
  });
}

inline void normalise(const Params& p, Scale scale, float* sum, int64_t first, int64_t n) {
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    store<width>(sum + i, (load<width>(sum + i) - scale.mean) * scale.factor);
  });
  if (p.norm_weight.data != nullptr) {
    with_type(p.norm_weight.dtype, [&](auto* type) {
      const auto* w = static_cast<decltype(type)>(const_cast<void*>(p.norm_weight.data)) + first;
      by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
        constexpr int width = decltype(lanes)::value;
        store<width>(sum + i, load<width>(sum + i) * load<width>(w + i));
      });
    });
  }
  if (p.norm_bias.data != nullptr) {
    with_type(p.norm_bias.dtype, [&](auto* type) {
      add_row(sum, static_cast<decltype(type)>(const_cast<void*>(p.norm_bias.data)) + first, 1.0f,
              n);
    });
  }
}

// One table of the tokens' dtype and nothing else to do, as in most towers: no detour over L1.
template <class T>
inline bool is_plain_sum(const Params& p) {
  if (p.norm != Norm::kNone || p.position_count != 1) return false;
  const Position& q = p.positions[0];
  constexpr DType type = __is_same(T, float)      ? DType::kFloat32
                         : __is_same(T, bfloat16) ? DType::kBFloat16
                                                  : DType::kFloat16;
  return q.taps == 1 && q.weight == nullptr && q.dtype == type && p.out_dtype == type;
}

// product: rows of p.channels, `stride` apart; stride 0: one row for all.
template <class T>
inline void finish_rows(const Params& p, int64_t begin, int64_t end, const T* product,
                        int64_t stride) {
  const int64_t patches = p.patches(), before = p.prefix_last ? 0 : p.prefix_tokens;
  const bool plain = is_plain_sum<T>(p);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t image = n / patches, patch = n % patches, token = before + patch;
    const T* row = product + (n - begin) * stride;
    if (plain) {
      const T* addend =
          static_cast<const T*>(p.positions[0].table) +
          row_at(p, p.positions[0], image, token, patch, 0) * p.positions[0].row_stride;
      T* to = static_cast<T*>(p.out) + (image * p.tokens() + token) * p.channels;
      by_vectors(p.channels, [&](auto lanes, int64_t i) VLMOPS_INLINED {
        constexpr int width = decltype(lanes)::value;
        store<width>(to + i, load<width>(row + i) + load<width>(addend + i));
      });
      continue;
    }
    Scale scale{};
    if (p.norm != Norm::kNone)
      scale = statistics(row, p.channels, p.norm == Norm::kLayer, p.norm_eps);
    for (int64_t first = 0; first < p.channels; first += kMaxRow) {
      const int64_t count = p.channels - first < kMaxRow ? p.channels - first : kMaxRow;
      alignas(64) float sum[kMaxRow];
      read_row(sum, row + first, count);
      if (p.norm != Norm::kNone) normalise(p, scale, sum, first, count);
      add_positions(p, sum, image, token, patch, first, count);
      write_row(p, image * p.tokens() + token, first, sum, count);
    }
  }
}

void finish(const Params& p, int64_t begin, int64_t end, const void* product, int64_t stride,
            DType dtype) {
  with_type(dtype, [&](auto* type) {
    finish_rows(p, begin, end, static_cast<decltype(type)>(const_cast<void*>(product)), stride);
  });
}

void write_prefix(const Params& p, int64_t begin, int64_t end) {
  const int64_t before = p.prefix_last ? p.patches() : 0;
  for (int64_t i = begin * p.prefix_tokens; i < end * p.prefix_tokens; ++i) {
    const int64_t image = i / p.prefix_tokens, m = i % p.prefix_tokens, token = before + m;
    for (int64_t first = 0; first < p.channels; first += kMaxRow) {
      const int64_t count = p.channels - first < kMaxRow ? p.channels - first : kMaxRow;
      alignas(64) float sum[kMaxRow];
      with_type(p.prefix.dtype, [&](auto* type) {
        const auto* prefix = static_cast<decltype(type)>(const_cast<void*>(p.prefix.data));
        read_row(sum, prefix + m * p.channels + first, count);
      });
      add_positions(p, sum, image, token, -1, first, count);
      write_row(p, image * p.tokens() + token, first, sum, count);
    }
  }
}

}  // namespace
}  // namespace vlmops::patch_embed
