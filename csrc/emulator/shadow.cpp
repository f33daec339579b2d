// See shadow.h for what is kept and why.
#include "emulator/shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <memory>

#include "emulator/state.h"

// The linker's marks of this library's own image, where kernels' constant tables lie.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace vlmops::emulator {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool read_only;
};

// Buffers that overlap, as views of one tensor do, share a region and its shadow.
struct Region {
  uintptr_t begin, end;
  bool any_read_only;
  Cell* cells;
};

namespace {

std::vector<Buffer> buffers;
std::vector<Region> regions;  // sorted, disjoint
bool regions_current = false;
uint32_t next_serial = 1;
std::vector<bool> published;  // by block of the launch: it did __threadfence, then an atomic

// Accesses of a block between two points where a thread gets on: some seconds.
constexpr uint64_t kFruitlessAccesses = 60'000'000;
// A thread that polls memory lets the others run now and then.
constexpr uint64_t kPollAccesses = 1 << 20;

void drop_regions() {
  for (const Region& region : regions) {
    if (region.cells) munmap(region.cells, (region.end - region.begin) * sizeof(Cell));
  }
  regions.clear();
}

void make_regions() {
  drop_regions();
  std::sort(buffers.begin(), buffers.end(),
            [](const Buffer& x, const Buffer& y) { return x.begin < y.begin; });
  for (const Buffer& buffer : buffers) {
    if (buffer.begin == buffer.end) continue;
    if (!regions.empty() && buffer.begin < regions.back().end) {
      regions.back().end = std::max(regions.back().end, buffer.end);
      regions.back().any_read_only |= buffer.read_only;
    } else {
      regions.push_back({buffer.begin, buffer.end, buffer.read_only, nullptr});
    }
  }
  for (Region& region : regions) {
    void* const cells =
        mmap(nullptr, (region.end - region.begin) * sizeof(Cell), PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) {
      drop_regions();
      return;
    }
    region.cells = static_cast<Cell*>(cells);
  }
  regions_current = true;
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return "reads";
    case Access::kWrite:
      return "writes";
    case Access::kAtomic:
      return "updates atomically";
    case Access::kCopyStart:
      return "starts a cp.async to";
    case Access::kCopyEnd:
      return "waits for a cp.async to";
  }
  return "";
}

// One access, with what is needed to tell of it.
struct Checked {
  Worker& worker;
  uintptr_t address;
  size_t bytes;
  Access access;
  const void* pc;
  Site site;

  // "writes 4 bytes of shared memory 'tile' at offset 128"
  std::string what(uintptr_t at) const {
    return std::string(verb(access)) + " " + std::to_string(bytes) + " bytes " +
           describe_address(worker, at);
  }

  [[noreturn]] void bad(const char* kind, uintptr_t at, const std::string& more) const {
    // On the stack of a thread that is never resumed: kept here so that nothing leaks.
    static thread_local std::string text;
    text = what(at) + more;
    fail(site, pc, "%s: %s", kind, text.c_str());
  }

  [[noreturn]] void race(uintptr_t at, const char* before, unsigned thread) const {
    bad("race", at,
        std::string(", which ") + describe_thread(worker, thread) + " " + before +
            " with no barrier in between");
  }

  [[noreturn]] void race_of_blocks(uintptr_t at, const char* before, uint32_t serial) const {
    bad("race", at,
        std::string(", which ") +
            (serial == kManyBlocks
                 ? "other blocks"
                 : describe_block(*worker.launch, serial - worker.launch->first_serial)) +
            " " + before + " in the same launch");
  }
};

// Whether what `thread` of this block did at `clock` is before what the running thread does now.
bool ordered(const Worker& worker, unsigned thread, uint32_t clock) {
  const unsigned self = worker.current->thread;
  if (thread == self) return true;
  if (thread / kLanes == self / kLanes) {
    return worker.warps[self / kLanes].clock[self % kLanes][thread % kLanes] >= clock;
  }
  return worker.shadow.passed[thread] >= clock;
}

// Whether the running block may rely on what another one did.
bool ordered_block(const Worker& worker, uint32_t serial) {
  if (!worker.shadow.acquired) return false;
  const uint32_t first = worker.launch->first_serial;
  if (serial != kManyBlocks) return published[serial - first];
  const size_t so_far = worker.shadow.serial - first;
  return std::all_of(published.begin(), published.begin() + static_cast<ptrdiff_t>(so_far),
                     [](bool b) { return b; });
}

// A reader, one of those the cell knows, that the running thread is not ordered after; or -1.
int unordered_reader(const Worker& worker, const Cell& cell) {
  if (cell.read_warp == kManyWarps) return -1;
  for (unsigned rest = cell.read_lanes; rest; rest &= rest - 1) {
    const unsigned thread = cell.read_warp * kLanes + static_cast<unsigned>(__builtin_ctz(rest));
    if (!ordered(worker, thread, cell.read_clock)) return static_cast<int>(thread);
  }
  return -1;
}

template <bool shared>
void check_cell(const Checked& c, Cell& cell, uintptr_t at) {
  Worker& worker = c.worker;
  ShadowState& shadow = worker.shadow;
  const unsigned self = worker.current->thread;
  const uint32_t clock = worker.warp().clock[self % kLanes][self % kLanes];
  const uint32_t oldest = shared ? shadow.serial : worker.launch->first_serial;
  const bool atomic = c.access == Access::kAtomic, reads = c.access == Access::kRead;

  // Against the last write.
  if (cell.write_block >= oldest) {
    const bool both_atomic = atomic && (cell.flags & kAtomic);
    if (cell.write_block == shadow.serial) {
      if ((cell.flags & kPending) && c.access != Access::kCopyEnd) {
        c.bad("cp.async", at,
              ", where a cp.async of " + describe_thread(worker, cell.write_thread) +
                  " has not been waited for");
      }
      if (cell.write_thread == kManyThreads) {
        if (!both_atomic && cell.write_clock >= shadow.barriers) {
          c.bad("race", at, ", which other threads updated atomically with no barrier in between");
        }
      } else if (!both_atomic && !ordered(worker, cell.write_thread, cell.write_clock)) {
        c.race(at, "wrote", cell.write_thread);
      }
    } else if (!both_atomic && !ordered_block(worker, cell.write_block)) {
      c.race_of_blocks(at, "wrote", cell.write_block);
    }
  } else if (shared && (reads || atomic)) {
    c.bad("uninitialised", at, ", which no thread of the block has written");
  }

  const bool has_readers = cell.read_block == kManyBlocks
                               ? cell.read_clock == worker.launch->first_serial
                               : cell.read_block != 0 && cell.read_block >= oldest;
  if (reads) {
    if (has_readers && cell.read_block == kManyBlocks) return;
    if (has_readers && cell.read_block != shadow.serial) {
      cell.read_block = kManyBlocks;
      cell.read_clock = worker.launch->first_serial;
      return;
    }
    const auto warp = static_cast<uint8_t>(self / kLanes);
    if (has_readers && cell.read_warp == kManyWarps) {
      if (cell.read_clock == shadow.barriers) return;
    } else if (has_readers) {
      const bool same_warp = cell.read_warp == warp;
      if (same_warp && cell.read_lanes == 1u << self % kLanes) {
        cell.read_clock = clock;
        return;
      }
      if (unordered_reader(worker, cell) >= 0) {
        if (same_warp) {
          cell.read_lanes |= 1u << self % kLanes;
          cell.read_clock = std::min(cell.read_clock, clock);
        } else {
          cell.read_warp = kManyWarps;
          cell.read_clock = shadow.barriers;
        }
        return;
      }
    }
    cell.read_block = shadow.serial;
    cell.read_warp = warp;
    cell.read_lanes = 1u << self % kLanes;
    cell.read_clock = clock;
    return;
  }

  // A write: against the reads since the last one.
  if (has_readers) {
    if (cell.read_block != shadow.serial) {
      if (!ordered_block(worker, cell.read_block)) {
        c.race_of_blocks(at, "read", cell.read_block);
      }
    } else if (cell.read_warp == kManyWarps) {
      if (cell.read_clock >= shadow.barriers) {
        c.bad("race", at, ", which threads of several warps read with no barrier in between");
      }
    } else if (const int reader = unordered_reader(worker, cell); reader >= 0) {
      c.race(at, "read", static_cast<unsigned>(reader));
    }
  }
  const bool many =
      atomic && (cell.flags & kAtomic) && cell.write_block == shadow.serial &&
      (cell.write_thread == kManyThreads || !ordered(worker, cell.write_thread, cell.write_clock));
  cell.read_block = 0;
  cell.write_block = shadow.serial;
  cell.write_thread = many ? kManyThreads : static_cast<uint16_t>(self);
  cell.write_clock = many ? shadow.barriers : clock;
  cell.flags = static_cast<uint8_t>((atomic ? kAtomic : 0) |
                                    (c.access == Access::kCopyStart ? kPending : 0));
}

void check_shared(const Checked& c, size_t offset) {
  Worker& worker = c.worker;
  const size_t dynamic = worker.launch->parameters.dynamic_shared;
  const size_t begin = 16 + kSharedGap;
  const char* name = nullptr;
  size_t start = begin, bytes = dynamic;
  // The array that the access lies in, or the last one that begins before it.
  for (const SharedArray& array : worker.arrays) {
    if (offset >= array.offset - kSharedGap / 2) {
      name = array.name;
      start = array.offset;
      bytes = array.bytes;
    }
  }
  if (offset < start || offset + c.bytes > start + bytes) {
    static thread_local std::string text;
    text = std::string(verb(c.access)) + " " + std::to_string(c.bytes) + " bytes at offset " +
           std::to_string(static_cast<ptrdiff_t>(offset - start)) + " of " +
           (name ? std::string("shared '") + name + "'" : "dynamic shared memory") +
           ", which has " + std::to_string(bytes);
    fail(c.site, c.pc, "out of bounds: %s", text.c_str());
  }
  for (size_t i = 0; i < c.bytes; ++i) {
    check_cell<true>(c, worker.shadow.shared[offset + i], c.address + i);
  }
}

// Names the nearest buffer.
[[noreturn]] void fail_outside(const Checked& c) {
  static thread_local std::string text;
  char at[32];
  snprintf(at, sizeof at, "%p", reinterpret_cast<void*>(c.address));
  text = std::string(verb(c.access)) + " " + std::to_string(c.bytes) + " bytes at " + at;
  const Buffer* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Buffer& buffer : buffers) {
    const uintptr_t d = c.address >= buffer.end    ? c.address - buffer.end
                        : c.address < buffer.begin ? buffer.begin - c.address
                                                   : 0;
    if (d < distance) {
      distance = d;
      nearest = &buffer;
    }
  }
  if (c.address < 4096) {
    text += ", a null pointer";
  } else if (c.address - reinterpret_cast<uintptr_t>(c.worker.stacks) < kMaxThreads * kStackBytes) {
    text += ", another thread's local memory";
  } else if (nearest) {
    text += ": offset " + std::to_string(static_cast<ptrdiff_t>(c.address - nearest->begin)) +
            " of '" + nearest->name + "', which has " +
            std::to_string(nearest->end - nearest->begin);
  }
  fail(c.site, c.pc, "out of bounds: %s", text.c_str());
}

// Constant tables of kernels, and their parameters.
bool is_constant(const Checked& c) {
  const LaunchParameters& p = c.worker.launch->parameters;
  const auto inside = [&](const void* begin, size_t bytes) {
    const uintptr_t offset = c.address - reinterpret_cast<uintptr_t>(begin);
    return offset < bytes && c.bytes <= bytes - offset;
  };
  return c.access == Access::kRead &&
         (inside(__ehdr_start, static_cast<size_t>(_end - __ehdr_start)) ||
          inside(p.arguments, p.argument_bytes));
}

void check_global(const Checked& c) {
  ShadowState& shadow = c.worker.shadow;
  const uintptr_t end = c.address + c.bytes;
  Region* region = shadow.last_region;
  if (!region || c.address < region->begin || end > region->end) {
    const auto after =
        std::upper_bound(regions.begin(), regions.end(), c.address,
                         [](uintptr_t p, const Region& other) { return p < other.begin; });
    region = after == regions.begin() ? nullptr : &*(after - 1);
    if (!region || end > region->end) {
      if (!is_constant(c)) fail_outside(c);
      return;
    }
    shadow.last_region = region;
  }
  if (region->any_read_only && c.access != Access::kRead) {
    for (const Buffer& buffer : buffers) {
      if (buffer.read_only && c.address < buffer.end && end > buffer.begin) {
        c.bad("read-only", std::max(c.address, buffer.begin), ", which is an input");
      }
    }
  }
  if (c.access == Access::kAtomic) {
    shadow.acquired = true;
    if (shadow.fenced) published[shadow.serial - c.worker.launch->first_serial] = true;
  }
  for (uintptr_t p = c.address; p < end; ++p) {
    check_cell<false>(c, region->cells[p - region->begin], p);
  }
}

}  // namespace

std::string describe_address(const Worker& worker, uintptr_t at) {
  const uintptr_t offset = at - reinterpret_cast<uintptr_t>(worker.arena);
  if (offset < kSharedArena) {
    for (const SharedArray& array : worker.arrays) {
      if (offset - array.offset < array.bytes) {
        return std::string("of shared '") + array.name + "' at offset " +
               std::to_string(offset - array.offset);
      }
    }
    return "of dynamic shared memory at offset " + std::to_string(offset - 16 - kSharedGap);
  }
  for (const Buffer& buffer : buffers) {
    if (at - buffer.begin < buffer.end - buffer.begin) {
      return "of '" + buffer.name + "' at offset " + std::to_string(at - buffer.begin);
    }
  }
  char text[64];
  snprintf(text, sizeof text, "at 0x%zx", static_cast<size_t>(at));
  return text;
}

void check_access(Worker& worker, uintptr_t address, size_t bytes, Access access, const void* pc,
                  const char* file, int line) {
  const Checked c = {worker, address, bytes, access, pc, {file, line}};
  if (++worker.shadow.accesses % kPollAccesses == 0) {
    if (worker.shadow.accesses > kFruitlessAccesses) {
      c.bad("deadlock", address, ", again and again, and no thread gets on");
    }
    yield();
  }
  const size_t offset = address - reinterpret_cast<uintptr_t>(worker.arena);
  if (offset < kSharedArena) return check_shared(c, offset);
  if (access == Access::kCopyStart || access == Access::kCopyEnd) {
    c.bad("cp.async", address, ", which is not shared memory");
  }
  if (!regions.empty()) check_global(c);
}

bool shadow_begin_launch(uint32_t& first_serial, uint64_t blocks) {
  if (!regions_current) make_regions();
  if (!regions_current) return false;
  first_serial = next_serial;
  next_serial += static_cast<uint32_t>(blocks);
  published.assign(blocks, false);
  return true;
}

void shadow_begin_block(Worker& worker, uint64_t block) {
  ShadowState& shadow = worker.shadow;
  shadow.serial = worker.launch->first_serial + static_cast<uint32_t>(block);
  shadow.barriers = 0;
  shadow.fenced = shadow.acquired = false;
  shadow.accesses = 0;
  shadow.last_region = nullptr;
  for (int t = 0; t < worker.threads; ++t) shadow.passed[t] = 0;
  for (int warp = 0; warp * kLanes < worker.threads; ++warp) {
    auto& clock = worker.warps[warp].clock;
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) clock[i][j] = i == j;
    }
  }
}

void shadow_sync_threads(Worker& worker) {
  ++worker.shadow.barriers;
  for (int t = 0; t < worker.threads; ++t) {
    worker.shadow.passed[t] = worker.warps[t / kLanes].clock[t % kLanes][t % kLanes];
  }
  for (int warp = 0; warp * kLanes < worker.threads; ++warp) {
    shadow_sync_warp(worker, static_cast<unsigned>(warp), ~0u);
  }
}

void shadow_sync_warp(Worker& worker, unsigned warp, unsigned mask) {
  auto& clock = worker.warps[warp].clock;
  uint32_t seen[kLanes] = {};
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const uint32_t (&row)[kLanes] = clock[__builtin_ctz(rest)];
    for (int j = 0; j < kLanes; ++j) seen[j] = std::max(seen[j], row[j]);
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    for (int j = 0; j < kLanes; ++j) clock[lane][j] = seen[j];
    ++clock[lane][lane];
  }
}

void shadow_fence(Worker& worker) { worker.shadow.fenced = true; }

void register_buffer(const void* p, size_t bytes, const std::string& name, bool read_only) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  buffers.push_back({begin, begin + bytes, name, read_only});
  regions_current = false;
}

void clear_buffers() {
  buffers.clear();
  regions_current = false;
}

}  // namespace vlmops::emulator
