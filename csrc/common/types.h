// Vocabulary that host, device and emulator code share. No torch here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VLMOPS_HOST_DEVICE __host__ __device__
#else
#define VLMOPS_HOST_DEVICE
#endif

namespace vlmops {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };
enum class IntType : int { kInt64, kInt32, kInt16, kInt8, kUInt8 };

// Numbers next to each other, one for each channel; null where there is none.
struct Row {
  const void* data;
  DType dtype;
};

// Storage of the 16-bit floats; arithmetic happens in float32 only.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Element `offset` of an integer array. static: see simd.h on linkage.
VLMOPS_HOST_DEVICE static inline int64_t load_int(const void* p, IntType type, int64_t offset) {
  switch (type) {
    case IntType::kInt64:
      return static_cast<const int64_t*>(p)[offset];
    case IntType::kInt32:
      return static_cast<const int32_t*>(p)[offset];
    case IntType::kInt16:
      return static_cast<const int16_t*>(p)[offset];
    case IntType::kInt8:
      return static_cast<const int8_t*>(p)[offset];
    case IntType::kUInt8:
      return static_cast<const uint8_t*>(p)[offset];
  }
  return 0;
}

}  // namespace vlmops
