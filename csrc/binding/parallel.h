// How CPU kernels share their rows among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace vlmops {

// The fewest rows that are worth a thread: 32k elements are 5 us of work, the price of waking one.
inline int64_t grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(elements_per_row, 1));
}

// From this size on what is written bypasses the CPU's caches: memory is not read before it is
// overwritten.
constexpr int64_t kStreamBytes = 8 << 20;

}  // namespace vlmops
