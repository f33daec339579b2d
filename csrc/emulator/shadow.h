// Shadow memory: what is known of every byte of shared memory and of the registered buffers.
//
// Races are found by order, not by chance. Each thread has a clock, which steps at every barrier.
// A byte remembers its last writer and the readers since, with their clocks, and an access is a
// race if the other one's clock has not been passed on:
//   in a warp     through Warp::clock (what lane i has seen of lane j), joined by __syncwarp;
//   in a block    through `passed` (each thread's clock at the last __syncthreads);
//   over blocks   never, but through __threadfence and an atomic operation on both sides.
// Shuffles and votes order nothing: CUDA's manual says that they imply no memory barrier.
//
// Cells are never cleared. Every block that runs has a serial number, and a cell of another block
// (shared memory) or of a block before this launch (global memory) is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vlmops::emulator {

struct Worker;

struct Cell {
  uint32_t write_block;  // serial; 0: never written
  uint32_t write_clock;
  uint32_t read_block;  // serial; 0: no reads since; kManyBlocks: then read_clock is launch's first
  uint32_t read_lanes;  // of read_warp
  uint32_t read_clock;  // the least of them; kManyWarps: the block's count of barriers
  uint16_t write_thread;  // kManyThreads: atomic; then write_clock is the block's count of barriers
  uint8_t read_warp;
  uint8_t flags;
};

constexpr uint32_t kManyBlocks = 0xffffffffu;
constexpr uint16_t kManyThreads = 0xffff;
constexpr uint8_t kManyWarps = 0xff;
constexpr uint8_t kAtomic = 1;   // the last write was an atomic operation
constexpr uint8_t kPending = 2;  // a cp.async that has not been waited for

struct ShadowState {
  Cell* shared;  // one a byte of the arena
  uint32_t serial;
  uint32_t barriers;      // of this block
  uint32_t passed[1024];  // by thread
  bool fenced, acquired;  // this block did __threadfence; an atomic operation on global memory
  uint64_t accesses;      // since a thread last got anywhere
  struct Region* last_region;
};

enum class Access : uint8_t { kRead, kWrite, kAtomic, kCopyStart, kCopyEnd };

// Called before the access; fails the launch if it must not happen.
void check_access(Worker& worker, uintptr_t address, size_t bytes, Access access, const void* pc,
                  const char* file, int line);
// "of shared 'tile' at offset 128", "of 'output 0' at offset 4", "at 0x7f.."
std::string describe_address(const Worker& worker, uintptr_t address);

// False if there is no memory for it.
bool shadow_begin_launch(uint32_t& first_serial, uint64_t blocks);
void shadow_begin_block(Worker& worker, uint64_t block);
void shadow_sync_threads(Worker& worker);
void shadow_sync_warp(Worker& worker, unsigned warp, unsigned mask);
void shadow_fence(Worker& worker);

// Memory that kernels may touch. With none registered, only shared memory is checked.
void register_buffer(const void* p, size_t bytes, const std::string& name, bool read_only);
void clear_buffers();

}  // namespace vlmops::emulator
