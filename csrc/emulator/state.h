// The state of a running launch. Private to the run time: kernels see runtime.h only.
//
// A Worker is one host thread with the stacks, the shared memory and the shadow memory of the block
// it runs. Blocks are handed out in order. A thread of the block is a fiber on a stack of its own;
// it runs until it meets the others in a barrier or a warp's collective, then the next one that can
// run does.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/runtime.h"
#include "emulator/shadow.h"

namespace vlmops::emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedArena = 320 << 10;  // the largest shared memory and the gaps in it
constexpr size_t kSharedGap = 144;          // between arrays, so that a step outside shows

// Whether the kernels were compiled with instrumentation (mode.cpp, next to them).
extern const bool kChecked;

struct Site {
  const char* file = nullptr;
  int line = 0;
};

struct Copy {  // a cp.async that has not landed
  void* shared;
  unsigned char data[16];
  int width;  // bytes that are written
  unsigned group;
  Site site;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kExited };

struct Fiber {
  void* stack_pointer;
  uint3 index;
  unsigned thread;  // in the block
  State state;
  Collective collective;
  unsigned mask;
  void* operand;
  Site site;  // where it waits
  std::vector<Copy> copies;
  unsigned copy_groups;  // committed
};

struct Warp {
  unsigned ready, exited, at_collective;
  // What lane i has seen of lane j: see shadow.h.
  uint32_t clock[kLanes][kLanes];
};

struct SharedArray {
  const void* key;
  const char* name;
  size_t offset, bytes;
};

// What all workers of a launch share.
struct Launch {
  LaunchParameters parameters;
  std::string kernel;
  uint64_t blocks;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;               // the first
  const void* error_pc = nullptr;  // instruction, if the message knows no line
  uint32_t first_serial;           // of the launch's blocks, see shadow.h
};

struct Worker {
  Launch* launch;
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxWarps];
  unsigned warp_ready;  // bit per warp: has a lane that can run
  int threads, running, at_barrier;
  int counting, counted;  // __syncthreads_count: at the next barrier, at the last one
  Fiber* current;
  void* host_stack_pointer;
  unsigned char* stacks;
  unsigned char* arena;
  size_t arena_used;    // in this block
  size_t shared_bytes;  // without gaps, what the device would count
  std::vector<SharedArray> arrays;
  unsigned fruitless;  // yields and atomic operations since a thread last got anywhere
  ShadowState shadow;

  unsigned lane() const { return current->thread % kLanes; }
  Warp& warp() { return warps[current->thread / kLanes]; }
  unsigned char* stack(unsigned thread) { return stacks + thread * kStackBytes; }
};

extern __thread Worker* t_worker __attribute__((tls_model("initial-exec")));

// Stops the launch with a message about the running thread and never returns to it. printf-like.
[[noreturn]] void fail(Site site, const void* pc, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

[[noreturn]] void fail_misaligned(Site site, const void* pc, const void* p, size_t bytes);
// The same outside of a launch, in a launcher: the next launch is refused with it.
void fail_host(Site site, const char* what);

std::string describe_thread(const Worker& worker, unsigned thread);
std::string describe_block(const Launch& launch, uint64_t block);

}  // namespace vlmops::emulator
