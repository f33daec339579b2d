// Entry points of the compiler's sanitizers, our own ones.
//
// Checked kernels are compiled with -fsanitize=thread and -fsanitize=undefined but not linked with
// libtsan or libubsan: g++ puts a call of __tsan_readN or __tsan_writeN before every memory access
// and of __ubsan_handle_* where something is undefined, and those calls end here. So a plain shared
// library, loaded into a plain Python, sees every access of a kernel with its address and size.
#include <cstring>

#include "emulator/state.h"

namespace vlmops::emulator {
namespace {

inline void on_access(void* p, size_t bytes, size_t alignment, Access access, const void* pc) {
  Worker* const worker = t_worker;
  if (!worker) return;  // host code
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address - reinterpret_cast<uintptr_t>(worker->stack(worker->current->thread)) < kStackBytes) {
    return;
  }
  if (address % alignment != 0) {
    fail_misaligned({}, pc, p, alignment);
  }
  check_access(*worker, address, bytes, access, pc, nullptr, 0);
}

// What the compiler lays down beside a check: first of all where it stands.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  uint8_t log_alignment, kind;
};

void undefined(const void* data, const char* what) {
  const auto* location = static_cast<const SourceLocation*>(data);
  const Site site = {location->file, static_cast<int>(location->line)};
  if (!t_worker) return fail_host(site, what);
  fail(site, nullptr, "%s", what);
}

}  // namespace
}  // namespace vlmops::emulator

using namespace vlmops::emulator;

#define PC __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// 16 bytes need not be one access: two doubles are 8-byte aligned. Packs check themselves.
#define VLMOPS_ACCESS(bytes, alignment)                                                   \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, alignment, Access::kRead, PC); } \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, alignment, Access::kWrite, PC); }
VLMOPS_ACCESS(1, 1)
VLMOPS_ACCESS(2, 2)
VLMOPS_ACCESS(4, 4)
VLMOPS_ACCESS(8, 8)
VLMOPS_ACCESS(16, 8)
#undef VLMOPS_ACCESS

#define VLMOPS_UNALIGNED(bytes)                                                             \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, 1, Access::kRead, PC); } \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, 1, Access::kWrite, PC); }
VLMOPS_UNALIGNED(2)
VLMOPS_UNALIGNED(4)
VLMOPS_UNALIGNED(8)
VLMOPS_UNALIGNED(16)
#undef VLMOPS_UNALIGNED

void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, 1, Access::kRead, PC); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, 1, Access::kWrite, PC); }
void __tsan_vptr_read(void* p) { on_access(p, 8, 8, Access::kRead, PC); }
void __tsan_vptr_update(void* p, void*) { on_access(p, 8, 8, Access::kWrite, PC); }

// C++ atomics, which kernels do not use and launchers do (a function's static variable has one).
#define VLMOPS_ATOMIC_OPERATION(bits, T, name, builtin)      \
  T __tsan_atomic##bits##_##name(T* p, T value, int) {       \
    on_access(p, sizeof(T), sizeof(T), Access::kAtomic, PC); \
    return builtin(p, value, __ATOMIC_SEQ_CST);              \
  }
#define VLMOPS_COMPARE_EXCHANGE(bits, T, kind)                                               \
  bool __tsan_atomic##bits##_compare_exchange_##kind(T* p, T* expected, T value, int, int) { \
    on_access(p, sizeof(T), sizeof(T), Access::kAtomic, PC);                                 \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,          \
                                       __ATOMIC_SEQ_CST);                                    \
  }
#define VLMOPS_ATOMICS(bits, T)                                              \
  T __tsan_atomic##bits##_load(const T* p, int) {                            \
    on_access(const_cast<T*>(p), sizeof(T), sizeof(T), Access::kAtomic, PC); \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                             \
  }                                                                          \
  void __tsan_atomic##bits##_store(T* p, T value, int) {                     \
    on_access(p, sizeof(T), sizeof(T), Access::kAtomic, PC);                 \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                            \
  }                                                                          \
  VLMOPS_ATOMIC_OPERATION(bits, T, exchange, __atomic_exchange_n)            \
  VLMOPS_ATOMIC_OPERATION(bits, T, fetch_add, __atomic_fetch_add)            \
  VLMOPS_ATOMIC_OPERATION(bits, T, fetch_sub, __atomic_fetch_sub)            \
  VLMOPS_ATOMIC_OPERATION(bits, T, fetch_and, __atomic_fetch_and)            \
  VLMOPS_ATOMIC_OPERATION(bits, T, fetch_or, __atomic_fetch_or)              \
  VLMOPS_COMPARE_EXCHANGE(bits, T, strong)                                   \
  VLMOPS_COMPARE_EXCHANGE(bits, T, weak)
VLMOPS_ATOMICS(8, uint8_t)
VLMOPS_ATOMICS(32, uint32_t)
VLMOPS_ATOMICS(64, uint64_t)
#undef VLMOPS_ATOMICS
#undef VLMOPS_COMPARE_EXCHANGE
#undef VLMOPS_ATOMIC_OPERATION

// memcpy and memset of checked kernels, renamed by checked_memory.h: the compiler calls nothing
// before them, libtsan would take their place.
void* vlmops_checked_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) {
    on_access(const_cast<void*>(from), bytes, 1, Access::kRead, PC);
    on_access(to, bytes, 1, Access::kWrite, PC);
  }
  return std::memcpy(to, from, bytes);
}
void* vlmops_checked_memset(void* to, int value, size_t bytes) {
  if (bytes > 0) on_access(to, bytes, 1, Access::kWrite, PC);
  return std::memset(to, value, bytes);
}

void __ubsan_handle_out_of_bounds(void* data, void*) {
  undefined(data, "out of bounds: indexes an array outside of its size");
}
void __ubsan_handle_pointer_overflow(void* data, void*, void*) {
  undefined(data, "undefined: pointer arithmetic overflows");
}
// Of these the checks for alignment alone are on (CMakeLists.txt).
void __ubsan_handle_type_mismatch_v1(void* data, void* p) {
  const auto* mismatch = static_cast<const TypeMismatch*>(data);
  const SourceLocation& at = mismatch->location;
  if (!t_worker) return undefined(data, "misaligned: accesses a value");
  fail_misaligned({at.file, static_cast<int>(at.line)}, nullptr, p,
                  size_t{1} << mismatch->log_alignment);
}
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
  undefined(data, "undefined: shifts by too much, or a negative number");
}
void __ubsan_handle_divrem_overflow(void* data, void*, void*) {
  undefined(data, "undefined: divides by zero, or overflows");
}
void __ubsan_handle_add_overflow(void* data, void*, void*) {
  undefined(data, "undefined: a signed sum overflows");
}
void __ubsan_handle_sub_overflow(void* data, void*, void*) {
  undefined(data, "undefined: a signed difference overflows");
}
void __ubsan_handle_mul_overflow(void* data, void*, void*) {
  undefined(data, "undefined: a signed product overflows");
}
void __ubsan_handle_negate_overflow(void* data, void*) {
  undefined(data, "undefined: a signed negation overflows");
}
void __ubsan_handle_load_invalid_value(void* data, void*) {
  undefined(data, "undefined: loads a bool or enum that is none of its values");
}
void __ubsan_handle_missing_return(void* data) {
  undefined(data, "undefined: leaves a function without a result");
}
void __ubsan_handle_builtin_unreachable(void* data) {
  undefined(data, "undefined: reaches what was called unreachable");
}

}  // extern "C"
