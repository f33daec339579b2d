// What the lanes of a warp do together once all have arrived, and atomic operations.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator/device.h"
#include "emulator/state.h"

namespace vlmops::emulator {
namespace {

int lane() { return static_cast<int>(t_worker->lane()); }

// Outside of its segment of `width` lanes a lane keeps its own value.
int in_segment(int source, int width) {
  const int first = lane() & ~(width - 1);
  return source < first || source >= first + width ? lane() : source;
}

float widen(uint32_t bits, Mma::Type type) {
  if (type == Mma::kBFloat16) return __builtin_bit_cast(float, bits << 16);
  return __half2float(__half(__half_raw{static_cast<uint16_t>(bits)}));
}

// Checks and counts before an atomic operation. Loops around compareAndSwap let others run.
void atomic_begin(void* p, size_t bytes, const void* pc) {
  Worker& worker = *t_worker;
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail_misaligned({}, pc, p, bytes);
  if (kChecked) {
    check_access(worker, reinterpret_cast<uintptr_t>(p), bytes, Access::kAtomic, pc, nullptr, 0);
  }
  if (++worker.fruitless % 64 == 0) yield();
}

template <class T>
T add(T* p, T value, const void* pc) {
  atomic_begin(p, sizeof(T), pc);
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

template <class T>
T compare_and_swap(T* p, T expected, T value, const void* pc) {
  atomic_begin(p, sizeof(T), pc);
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

// Any operation on T by way of the integer of its size.
template <class Bits, class T, class Operation>
T update(T* p, const void* pc, Operation operation) {
  atomic_begin(p, sizeof(T), pc);
  auto* const bits = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (true) {
    const T value = operation(__builtin_bit_cast(T, before));
    if (__atomic_compare_exchange_n(bits, &before, __builtin_bit_cast(Bits, value), false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
      return __builtin_bit_cast(T, before);
    }
  }
}

}  // namespace

int shuffle_source(int source, int width) {
  return (lane() & ~(width - 1)) | (source & (width - 1));
}
int shuffle_source_up(unsigned delta, int width) {
  return in_segment(lane() - static_cast<int>(delta & 31), width);
}
int shuffle_source_down(unsigned delta, int width) {
  return in_segment(lane() + static_cast<int>(delta & 31), width);
}
// A later segment's lane is out of reach, an earlier one's is not: so CUDA's manual.
int shuffle_source_xor(unsigned lane_mask, int width) {
  const int source = lane() ^ static_cast<int>(lane_mask & 31);
  return source >= (lane() & ~(width - 1)) + width ? lane() : source;
}

void shuffle_lanes(void* const* operands, unsigned mask) {
  uint64_t values[kLanes];
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const int source = static_cast<Exchange*>(operands[lane])->source;
    if (!(mask >> source & 1)) {
      const Fiber& self = *t_worker->current;
      fail(self.site, nullptr,
           "warp mask: in a shuffle with mask 0x%08x lane %d reads lane %d, which is not in it",
           mask, lane, source);
    }
    values[lane] = static_cast<Exchange*>(operands[source])->value;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    static_cast<Exchange*>(operands[lane])->value = values[lane];
  }
}

void vote_lanes(void* const* operands, unsigned mask) {
  unsigned ballot = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (static_cast<Vote*>(operands[lane])->predicate) ballot |= 1u << lane;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    static_cast<Vote*>(operands[__builtin_ctz(rest)])->ballot = ballot;
  }
}

// Lane l gets of matrix i the pair at row l / 4, columns 2 (l % 4) and on; transposed, of its
// column.
void load_matrices(void* const* operands, unsigned) {
  Worker& worker = *t_worker;
  const Fiber* const lanes = worker.current - worker.lane();
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* operand = static_cast<const Ldmatrix*>(operands[lane]);
    const Site site = lanes[lane].site;
    // The row is read in the name of the lane that gave its address.
    Fiber* const self = worker.current;
    worker.current = &worker.fibers[lanes[lane].thread];
    check_aligned(operand->row, 16, site.file, site.line);
    if (kChecked) {
      check_access(worker, reinterpret_cast<uintptr_t>(operand->row), 16, Access::kRead, nullptr,
                   site.file, site.line);
    }
    worker.current = self;
    std::memcpy(matrix[lane / 8][lane % 8], operand->row, 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* operand = static_cast<const Ldmatrix*>(operands[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrix[i];
      operand->r[i] = operand->transposed
                          ? m[column][row] | static_cast<uint32_t>(m[column + 1][row]) << 16
                          : m[row][column] | static_cast<uint32_t>(m[row][column + 1]) << 16;
    }
  }
}

// Products are exact, sums are float32 in the order of k. Tensor cores add in another order and
// keep fewer bits: compare with a tolerance.
void multiply_matrices(void* const* operands, unsigned) {
  const auto* const* const mma = reinterpret_cast<const Mma* const*>(operands);
  const Mma::Type type = mma[0]->type;
  float a[16][16], b[16][8], c[16][8];
  const int depth = type == Mma::kTf32 ? 8 : 16;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Mma& operand = *mma[lane];
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      if (type == Mma::kTf32) {
        a[row][member + i / 2 * 4] = __builtin_bit_cast(float, operand.a[i] & ~0x1fffu);
      } else {
        const int k = member * 2 + i / 2 * 8;
        a[row][k] = widen(operand.a[i] & 0xffff, type);
        a[row][k + 1] = widen(operand.a[i] >> 16, type);
      }
      c[group + i / 2 * 8][member * 2 + i % 2] = operand.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      if (type == Mma::kTf32) {
        b[member + i * 4][group] = __builtin_bit_cast(float, operand.b[i] & ~0x1fffu);
      } else {
        const int k = member * 2 + i * 8;
        b[k][group] = widen(operand.b[i] & 0xffff, type);
        b[k + 1][group] = widen(operand.b[i] >> 16, type);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) mma[lane]->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace vlmops::emulator

using namespace vlmops::emulator;

#define PC __builtin_return_address(0)  // the kernel's

float atomicAdd(float* p, float value) {
  return update<uint32_t>(p, PC, [=](float x) { return x + value; });
}
double atomicAdd(double* p, double value) {
  return update<uint64_t>(p, PC, [=](double x) { return x + value; });
}
int atomicAdd(int* p, int value) { return add(p, value, PC); }
unsigned atomicAdd(unsigned* p, unsigned value) { return add(p, value, PC); }
unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
  return add(p, value, PC);
}
int atomicMax(int* p, int value) {
  return update<uint32_t>(p, PC, [=](int x) { return x < value ? value : x; });
}
unsigned atomicMax(unsigned* p, unsigned value) {
  return update<uint32_t>(p, PC, [=](unsigned x) { return x < value ? value : x; });
}
unsigned long long atomicMax(unsigned long long* p, unsigned long long value) {
  return update<uint64_t>(p, PC, [=](unsigned long long x) { return x < value ? value : x; });
}
int atomicCAS(int* p, int expected, int value) { return compare_and_swap(p, expected, value, PC); }
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value) {
  return compare_and_swap(p, expected, value, PC);
}
unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected,
                             unsigned long long value) {
  return compare_and_swap(p, expected, value, PC);
}
int atomicExch(int* p, int value) {
  return update<uint32_t>(p, PC, [=](int) { return value; });
}
unsigned atomicExch(unsigned* p, unsigned value) {
  return update<uint32_t>(p, PC, [=](unsigned) { return value; });
}
float atomicExch(float* p, float value) {
  return update<uint32_t>(p, PC, [=](float) { return value; });
}
