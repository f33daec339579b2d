// What emulated kernels call: the scheduler of one launch, seen from inside a CUDA thread.
//
// Everything here is out of line on purpose. The kernels may be compiled with instrumentation
// (instrument.cpp); the run time never is, so that its own accesses are not taken for the kernel's.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

// A thread sees one value for as long as it runs, so the compiler may keep it in a register over a
// switch, and `const` keeps instrumentation away from it. Only runtime.cpp writes them.
#if defined(VLMOPS_EMULATOR_RUNTIME)
#define VLMOPS_THREAD_CONST
#else
#define VLMOPS_THREAD_CONST const
#endif
#define VLMOPS_THREAD_VARIABLE extern VLMOPS_THREAD_CONST __thread uint3
VLMOPS_THREAD_VARIABLE threadIdx __attribute__((tls_model("initial-exec")));
VLMOPS_THREAD_VARIABLE blockIdx __attribute__((tls_model("initial-exec")));
VLMOPS_THREAD_VARIABLE vlmops_block_dim __attribute__((tls_model("initial-exec")));
VLMOPS_THREAD_VARIABLE vlmops_grid_dim __attribute__((tls_model("initial-exec")));
#undef VLMOPS_THREAD_VARIABLE
#undef VLMOPS_THREAD_CONST
#define blockDim vlmops_block_dim
#define gridDim vlmops_grid_dim
#define warpSize 32

namespace vlmops::emulator {

// Lanes of a warp meet in these. All lanes of the mask must call the same one.
enum class Collective : uint8_t { kSyncWarp, kShuffle, kVote, kLdmatrix, kMma };

// Called once, by the last lane to arrive; operands[lane] is what that lane passed.
using Complete = void (*)(void* const* operands, unsigned mask);

void collective(Collective kind, unsigned mask, void* operand, Complete complete, const char* file,
                int line);
// How many threads of the block came with a true predicate.
int sync_threads(bool predicate, const char* file, int line);
[[noreturn]] void trap(const char* file, int line);

// The static shared array that belongs to `key`, made at its first use in a block.
void* shared_array(const void* key, const char* name, size_t bytes);
void* dynamic_shared();

void check_aligned(const void* p, size_t bytes, const char* file = nullptr, int line = 0);
// Writes `width` bytes of which the first `bytes` are copied.
void cp_async(void* shared, const void* global, int width, int bytes, const char* file, int line);
void cp_async_commit();
void cp_async_wait(int groups_left);

void fence();  // __threadfence
void yield();  // lets the other threads of the block run

struct LaunchParameters {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  void (*invoke)(const void* arguments);  // calls the kernel with arguments
  const void* arguments;                  // readable by the kernel, like CUDA's parameter space
  size_t argument_bytes;
};

int launch(const LaunchParameters& parameters);
int allow_dynamic_shared(const void* kernel, size_t bytes);
const char* describe_status(int status);
void register_named_buffer(const void* p, size_t bytes, const char* name, bool read_only);
int architecture();
int multiprocessors();

}  // namespace vlmops::emulator
