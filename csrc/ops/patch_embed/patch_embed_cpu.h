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
// takes a third of the time of a loop. finish adds a token up in float32 in L1 and rounds it once.
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
template <class From, class To>
inline void map_run(const From* from, int64_t stride, To* to, int64_t n, const float* map) {
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
            map_run(run, p.size_stride[3], to, p.size[3], map);
          } else {
            copy_run<kRun>(run, p.size_stride[3], to, p.size[3]);
          }
        }
      }
    }
  }
}

template <class From, class To>
inline void pack_rows(const Params& p, int64_t begin, int64_t end, To* panel) {
  const int64_t patches = p.patches(), width = p.grid[2];
  for (int64_t n = begin; n < end;) {
    const int64_t g = n % patches, x = g % width, y = g / width % p.grid[1];
    const int64_t count = end - n < width - x ? end - n : width - x;
    const From* from = static_cast<const From*>(p.pixels) + n / patches * p.image_stride +
                       g / width / p.grid[1] * p.grid_stride[0] + y * p.grid_stride[1] +
                       x * p.grid_stride[2];
    To* to = panel + (n - begin) * p.depth;
    switch (p.size[3]) {
      case 14:
        pack_row<14>(p, from, count, to);
        break;
      case 16:
        pack_row<16>(p, from, count, to);
        break;
      default:
        pack_row<0>(p, from, count, to);
    }
    n += count;
  }
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

// sum[i] += weight * row[i]
template <class T>
inline void add_row(float* sum, const T* row, float weight, int64_t n) {
  by_vectors(n, [&](auto lanes, int64_t i) VLMOPS_INLINED {
    constexpr int width = decltype(lanes)::value;
    store<width>(sum + i, load<width>(sum + i) + weight * load<width>(row + i));
  });
}

// Channels [first, first + n) of what is added to a token, or to a patch alone.
inline void add_positions(const Params& p, float* sum, int64_t image, int64_t token, int64_t patch,
                          int64_t first, int64_t n) {
  for (int i = 0; i < p.position_count; ++i) {
    const Position& q = p.positions[i];
    if (q.patches_only && patch < 0) continue;
    const int64_t at = q.patches_only ? p.first_patch + patch : p.first_token + token;
    for (int64_t tap = 0; tap < q.taps; ++tap) {
      const int64_t row = q.index == nullptr
                              ? at
                              : load_int(q.index, q.index_type,
                                         image * q.index_stride[0] + at * q.index_stride[1] +
                                             tap * q.index_stride[2]);
      const float weight = weight_at(q, image, at, tap);
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

template <class T>
inline void finish_rows(const Params& p, int64_t begin, int64_t end, const T* product) {
  const int64_t patches = p.patches(), before = p.prefix_last ? 0 : p.prefix_tokens;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t image = n / patches, patch = n % patches, token = before + patch;
    const T* row = product + (n - begin) * p.channels;
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

void finish(const Params& p, int64_t begin, int64_t end, const void* product, DType dtype) {
  with_type(dtype, [&](auto* type) {
    finish_rows(p, begin, end, static_cast<decltype(type)>(const_cast<void*>(product)));
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
