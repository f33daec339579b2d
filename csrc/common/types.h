// Vocabulary that host, device and emulator code share. No torch here.
#pragma once

#include <cstdint>

namespace vlmops {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };
enum class IntType : int { kInt64, kInt32, kInt16, kInt8, kUInt8 };

// Storage of the 16-bit floats; arithmetic happens in float32 only.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace vlmops
