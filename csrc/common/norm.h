// What host and device share of norms on NVIDIA GPUs: see norm.cuh.
#pragma once

#include "common/types.h"

namespace vlmops {

// A vector of a norm: its weight, or its bias.
struct NormVector {
  const void* data;  // null where there is none
  DType dtype;
  int64_t stride;
};

constexpr int64_t kScales = 3;  // numbers that backward keeps of a row: mean, scale, shift

// In backward so many rows leave one sum together, whatever GPU runs them: the order is the same.
// The end of such a part costs as much as 16 rows: parts are large if that leaves blocks enough, of
// 256 columns each, for all multiprocessors three times.
constexpr int64_t kSmallPart = 32, kLargePart = 128;
VLMOPS_HOST_DEVICE constexpr int64_t gpu_part_rows(int64_t rows, int64_t width) {
  return rows / kLargePart * (width / 256) < 400 ? kSmallPart : kLargePart;
}

}  // namespace vlmops
