// Where the rows of tensors lie whose leading dimensions are counted in one number.
#pragma once

#include "common/types.h"

namespace vlmops {

// In elements; row r begins at
//   r / inner * outer + r % inner * row
struct RowStrides {
  int64_t outer, row, channel;
};

// Where row `row` begins; p has `rows` and `inner`. static: see simd.h on linkage. Rows are counted
// in 32 bits on a GPU.
template <class Params>
VLMOPS_HOST_DEVICE static inline int64_t row_at(const Params& p, const RowStrides& s, int64_t row) {
  if (p.inner == p.rows) return row * s.row;
  const auto outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.inner);
  return outer * s.outer + (row - outer * p.inner) * s.row;
}

}  // namespace vlmops
