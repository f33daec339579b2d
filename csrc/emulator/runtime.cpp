// Fibers, barriers, collectives and launches of the emulator. See state.h for the picture.
#define VLMOPS_EMULATOR_RUNTIME
#include "emulator/runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <thread>

#include "emulator/control.h"
#include "emulator/state.h"

#if !defined(__x86_64__)
#error "the emulator's stack switch is written for x86-64"
#endif

// const where kernels see them (runtime.h).
__thread uint3 threadIdx;
__thread uint3 blockIdx;
__thread uint3 vlmops_block_dim;
__thread uint3 vlmops_grid_dim;

// Saves what a function must preserve, swaps stacks, and returns on the other one. swapcontext
// would also save the signal mask, by a system call: five times as slow.
asm(R"(
.text
.hidden vlmops_switch
.globl vlmops_switch
.type vlmops_switch, @function
vlmops_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vlmops_switch, .-vlmops_switch
)");
extern "C" void vlmops_switch(void** save, void* load);

namespace vlmops::emulator {

__thread Worker* t_worker;

namespace {

std::mutex launch_mutex;  // one launch at a time: what follows, and the shadow memory

struct Settings {
  int architecture = 80;
  int multiprocessors = 8;
  int host_threads = 0;  // 0: as many as there are
};
Settings settings;
std::map<const void*, size_t> dynamic_limits;  // by kernel, from allow_dynamic_shared
std::string last_error_message;
std::string host_error;  // something undefined in a launcher

const char* const kCollectiveNames[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma"};

constexpr unsigned kFruitlessYields = 50'000'000;

// Bytes of shared memory a block may have if its kernel was allowed to.
size_t shared_limit() {
  switch (settings.architecture) {
    case 80:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:  // 86, 89, 120
      return 99 << 10;
  }
}

constexpr size_t kDefaultSharedLimit = 48 << 10;

unsigned bit(unsigned lane) { return 1u << lane; }

// The first set bit after `after`, around the end.
unsigned next_bit(unsigned bits, unsigned after) {
  const unsigned later = after >= 31 ? 0 : bits & (~0u << (after + 1));
  return static_cast<unsigned>(__builtin_ctz(later ? later : bits));
}

void set_ready(Worker& worker, unsigned warp, unsigned lanes) {
  worker.warps[warp].ready |= lanes;
  worker.warp_ready |= bit(warp);
}

void set_not_ready(Worker& worker, const Fiber& fiber) {
  Warp& warp = worker.warps[fiber.thread / kLanes];
  warp.ready &= ~bit(fiber.thread % kLanes);
  if (warp.ready == 0) worker.warp_ready &= ~bit(fiber.thread / kLanes);
}

// Runs the next thread that can; the host, which diagnoses, if there is none.
void switch_away(Worker& worker) {
  Fiber* const from = worker.current;
  if (worker.warp_ready == 0) {
    vlmops_switch(&from->stack_pointer, worker.host_stack_pointer);
    return;
  }
  unsigned warp = from->thread / kLanes, lane = from->thread % kLanes;
  if (worker.warps[warp].ready == 0) {
    warp = next_bit(worker.warp_ready, warp);
    lane = 31;
  }
  Fiber* const to = &worker.fibers[warp * kLanes + next_bit(worker.warps[warp].ready, lane)];
  if (to == from) return;
  worker.current = to;
  threadIdx = to->index;
  vlmops_switch(&from->stack_pointer, to->stack_pointer);
}

std::string format(const char* pattern, va_list list) {
  va_list copy;
  va_copy(copy, list);
  std::string text(static_cast<size_t>(vsnprintf(nullptr, 0, pattern, copy)), '\0');
  va_end(copy);
  vsnprintf(text.data(), text.size() + 1, pattern, list);
  return text;
}

std::string describe_site(Site site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void keep_error(Launch& launch, std::string text, const void* pc) {
  const std::lock_guard<std::mutex> lock(launch.mutex);
  if (launch.failed) return;
  launch.error = std::move(text);
  launch.error_pc = pc;
  launch.failed = true;
}

void first_frame() {
  Worker& worker = *t_worker;
  worker.launch->parameters.invoke(worker.launch->parameters.arguments);
  Fiber& fiber = *worker.current;
  Warp& warp = worker.warp();
  const unsigned self = bit(worker.lane());
  fiber.state = State::kExited;
  warp.exited |= self;
  --worker.running;
  worker.fruitless = 0;
  worker.shadow.accesses = 0;
  set_not_ready(worker, fiber);
  switch_away(worker);
  std::abort();  // nobody switches to a thread that has left
}

// Why nothing can run although threads are left. One of those that wait is to blame or to name.
void diagnose(Worker& worker, uint64_t block) {
  Launch& launch = *worker.launch;
  std::string kind = "deadlock", text = "no thread can run";
  const auto name = [&](const Fiber& fiber) { return describe_thread(worker, fiber.thread); };
  const Fiber *waits = nullptr, *left = nullptr, *meets = nullptr;
  for (int t = 0; t < worker.threads; ++t) {
    const Fiber& fiber = worker.fibers[t];
    if (!waits && fiber.state == State::kAtBarrier) waits = &fiber;
    if (!left && fiber.state == State::kExited) left = &fiber;
    if (!meets && fiber.state == State::kAtCollective) meets = &fiber;
  }
  if (meets) {
    const unsigned warp = meets->thread / kLanes;
    text = name(*meets) + " waits in " + kCollectiveNames[static_cast<int>(meets->collective)] +
           " at " + describe_site(meets->site) + " for ";
    for (unsigned rest = meets->mask; rest; rest &= rest - 1) {
      const Fiber& other =
          worker.fibers[warp * kLanes + static_cast<unsigned>(__builtin_ctz(rest))];
      if (other.state == State::kExited) {
        kind = "lane has left";
        text += name(other) + ", which has left the kernel";
        break;
      }
      if (other.state == State::kAtBarrier) {
        text += name(other) + ", which waits in __syncthreads at " + describe_site(other.site);
        break;
      }
      if (other.collective != meets->collective || other.mask != meets->mask) {
        char masks[64];
        snprintf(masks, sizeof masks, " (masks 0x%08x and 0x%08x)", meets->mask, other.mask);
        text += name(other) + ", which waits in " +
                kCollectiveNames[static_cast<int>(other.collective)] + " at " +
                describe_site(other.site) + masks;
        break;
      }
    }
  } else if (waits && left) {
    kind = "divergent barrier";
    text = name(*waits) + " waits in __syncthreads at " + describe_site(waits->site) + ", but " +
           name(*left) + " has left the kernel";
  }
  keep_error(launch, kind + ": " + describe_block(launch, block) + ", " + text, nullptr);
}

void begin_fiber(Worker& worker, unsigned thread) {
  Fiber& fiber = worker.fibers[thread];
  const dim3& dim = worker.launch->parameters.block;
  fiber.thread = thread;
  fiber.index = {thread % dim.x, thread / dim.x % dim.y, thread / dim.x / dim.y};
  fiber.state = State::kReady;
  fiber.copies.clear();
  fiber.copy_groups = 0;
  // Stacks start at different offsets in their pages: at the same one they would share the few
  // cache lines of one set.
  unsigned char* const top = worker.stack(thread) + kStackBytes - 256 - thread * 192 % 4096;
  void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  *--frame = nullptr;  // the first frame's return address: it never returns
  *--frame = reinterpret_cast<void*>(&first_frame);
  fiber.stack_pointer = frame - 6;
}

void run_block(Worker& worker, uint64_t block) {
  Launch& launch = *worker.launch;
  const dim3 &grid = launch.parameters.grid, &dim = launch.parameters.block;
  blockIdx = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
              static_cast<unsigned>(block / grid.x / grid.y)};
  worker.threads = worker.running = static_cast<int>(dim.x * dim.y * dim.z);
  worker.at_barrier = worker.counting = 0;
  worker.fruitless = 0;
  worker.warp_ready = 0;
  // Not a multiple of more than 16: nobody may rely on what CUDA does not promise.
  worker.arena_used = 16 + kSharedGap + launch.parameters.dynamic_shared;
  worker.shared_bytes = launch.parameters.dynamic_shared;
  worker.arrays.clear();
  std::memset(worker.arena, 0xff, worker.arena_used);
  for (int t = 0; t < worker.threads; ++t) begin_fiber(worker, static_cast<unsigned>(t));
  for (int t = 0; t < worker.threads; t += kLanes) {
    Warp& warp = worker.warps[t / kLanes];
    const int lanes = worker.threads - t;
    const unsigned all = lanes >= kLanes ? ~0u : bit(static_cast<unsigned>(lanes)) - 1;
    warp.ready = warp.at_collective = 0;
    warp.exited = ~all;  // lanes that never were
    set_ready(worker, static_cast<unsigned>(t / kLanes), all);
  }
  if (kChecked) shadow_begin_block(worker, block);
  worker.current = &worker.fibers[0];
  threadIdx = worker.current->index;
  t_worker = &worker;
  vlmops_switch(&worker.host_stack_pointer, worker.current->stack_pointer);
  t_worker = nullptr;
  if (worker.running != 0 && !launch.failed) diagnose(worker, block);
}

unsigned char* map_memory(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
}

// Workers are kept: their stacks are expensive to touch for the first time.
std::mutex pool_mutex;
std::vector<std::unique_ptr<Worker>> pool;

std::unique_ptr<Worker> take_worker() {
  {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (!pool.empty()) {
      auto worker = std::move(pool.back());
      pool.pop_back();
      return worker;
    }
  }
  auto worker = std::make_unique<Worker>();
  worker->stacks = map_memory(kMaxThreads * kStackBytes);
  worker->arena = map_memory(kSharedArena);
  worker->shadow.shared = reinterpret_cast<Cell*>(map_memory(kSharedArena * sizeof(Cell)));
  if (!worker->stacks || !worker->arena || !worker->shadow.shared) return nullptr;
  return worker;
}

void run_blocks(Launch& launch) {
  auto worker = take_worker();
  if (!worker) return keep_error(launch, "the host has no memory for stacks", nullptr);
  worker->launch = &launch;
  vlmops_block_dim = {launch.parameters.block.x, launch.parameters.block.y,
                      launch.parameters.block.z};
  vlmops_grid_dim = {launch.parameters.grid.x, launch.parameters.grid.y, launch.parameters.grid.z};
  while (!launch.failed) {
    const uint64_t block = launch.next_block++;
    if (block >= launch.blocks) break;
    run_block(*worker, block);
  }
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(std::move(worker));
}

// "void vlmops::mrope::rotate_kernel<float>(vlmops::mrope::Params)" without result and parameters.
std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "?";
  int status = 0;
  char* const demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  if (!demangled) return info.dli_sname;
  std::string name = demangled;
  std::free(demangled);
  int depth = 0;
  size_t begin = 0, end = name.size();
  for (size_t i = 0; i < name.size(); ++i) {
    const char c = name[i];
    if (c == '<') ++depth;
    if (c == '>') --depth;
    if (depth == 0 && c == ' ' && end == name.size()) begin = i + 1;
    if (depth == 0 && c == '(') {
      end = i;
      break;
    }
  }
  return name.substr(begin, end - begin);
}

// " (at file:line)" of the instruction before pc, from the debug information; empty without
// addr2line. What was inlined from the headers above kernels is not where the kernel's author
// looks.
std::string source_line(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "";
  char command[4096];
  const auto offset = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           offset - 1);
  FILE* const pipe = popen(command, "r");
  if (!pipe) return "";
  char line[512];
  std::string found;
  while (found.empty() && fgets(line, sizeof line, pipe)) {
    line[std::strcspn(line, " \n")] = '\0';
    const std::string text = line;
    const bool header = text.rfind("gpu.cuh:", 0) == 0 || text.rfind("device.h:", 0) == 0;
    if (!header && text[0] != '?') found = " (at " + text + ")";
  }
  pclose(pipe);
  return found;
}

std::string launch_error(const LaunchParameters& p) {
  const dim3 &grid = p.grid, &block = p.block;
  char text[256] = "";
  if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) {
    snprintf(text, sizeof text, "a dimension is zero: grid (%u,%u,%u), block (%u,%u,%u)", grid.x,
             grid.y, grid.z, block.x, block.y, block.z);
  } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    snprintf(text, sizeof text, "grid (%u,%u,%u) is over the limit (2147483647,65535,65535)",
             grid.x, grid.y, grid.z);
  } else if (block.x > 1024 || block.y > 1024 || block.z > 64 ||
             static_cast<uint64_t>(block.x) * block.y * block.z > kMaxThreads) {
    snprintf(text, sizeof text,
             "block (%u,%u,%u) is over the limit (1024,1024,64), 1024 threads together", block.x,
             block.y, block.z);
  } else {
    const auto allowed = dynamic_limits.find(p.kernel);
    const size_t limit = allowed == dynamic_limits.end() ? kDefaultSharedLimit : allowed->second;
    if (p.dynamic_shared > limit) {
      snprintf(text, sizeof text, "%zu bytes of dynamic shared memory are over the limit of %zu%s",
               p.dynamic_shared, limit,
               limit == kDefaultSharedLimit ? " (allow_dynamic_shared raises it)" : "");
    }
  }
  return text[0] ? std::string("launch limit: ") + text : "";
}

}  // namespace

std::string describe_thread(const Worker& worker, unsigned thread) {
  const dim3& dim = worker.launch->parameters.block;
  return "thread (" + std::to_string(thread % dim.x) + "," +
         std::to_string(thread / dim.x % dim.y) + "," + std::to_string(thread / dim.x / dim.y) +
         ")";
}

std::string describe_block(const Launch& launch, uint64_t block) {
  const dim3& grid = launch.parameters.grid;
  return "block (" + std::to_string(block % grid.x) + "," +
         std::to_string(block / grid.x % grid.y) + "," + std::to_string(block / grid.x / grid.y) +
         ")";
}

void fail(Site site, const void* pc, const char* pattern, ...) {
  Worker& worker = *t_worker;
  {
    va_list list;
    va_start(list, pattern);
    std::string text = format(pattern, list);
    va_end(list);
    const size_t colon = text.find(": ");  // after the class of the error
    const uint64_t block =
        blockIdx.x + worker.launch->parameters.grid.x *
                         (blockIdx.y + uint64_t{worker.launch->parameters.grid.y} * blockIdx.z);
    text.insert(colon + 2, describe_block(*worker.launch, block) + ", " +
                               describe_thread(worker, worker.current->thread) + " ");
    if (site.file) text += " (at " + describe_site(site) + ")";
    keep_error(*worker.launch, std::move(text), site.file ? nullptr : pc);
  }
  void* abandoned;
  vlmops_switch(&abandoned, worker.host_stack_pointer);
  __builtin_unreachable();
}

void fail_host(Site site, const char* what) {
  host_error = std::string(what) + " in host code (at " + describe_site(site) + ")";
}

void fail_misaligned(Site site, const void* pc, const void* p, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  fail(site, pc, "misaligned: accesses %zu bytes %s, %zu bytes off a multiple of %zu", bytes,
       describe_address(*t_worker, address).c_str(), static_cast<size_t>(address % bytes), bytes);
}

void trap(const char* file, int line) { fail({file, line}, nullptr, "trap: ran into __trap()"); }

int sync_threads(bool predicate, const char* file, int line) {
  Worker& worker = *t_worker;
  Fiber& fiber = *worker.current;
  fiber.site = {file, line};
  fiber.state = State::kAtBarrier;
  worker.fruitless = 0;
  worker.shadow.accesses = 0;
  worker.counting += predicate;
  if (++worker.at_barrier < worker.threads) {
    set_not_ready(worker, fiber);
    switch_away(worker);
    return worker.counted;  // all have read it before all meet again
  }
  worker.counted = worker.counting;
  worker.counting = 0;
  for (int t = 0; t < worker.threads; ++t) {
    Fiber& other = worker.fibers[t];
    if (other.site.line != line || std::strcmp(other.site.file, file) != 0) {
      fail(fiber.site, nullptr, "divergent barrier: waits in another __syncthreads than %s at %s",
           describe_thread(worker, other.thread).c_str(), describe_site(other.site).c_str());
    }
    other.state = State::kReady;
  }
  worker.at_barrier = 0;
  if (kChecked) shadow_sync_threads(worker);
  for (int t = 0; t < worker.threads; t += kLanes) {
    const auto warp = static_cast<unsigned>(t / kLanes);
    set_ready(worker, warp, ~worker.warps[warp].exited);
  }
  return worker.counted;
}

void collective(Collective kind, unsigned mask, void* operand, Complete complete, const char* file,
                int line) {
  Worker& worker = *t_worker;
  Fiber& fiber = *worker.current;
  Warp& warp = worker.warp();
  const unsigned self = bit(worker.lane());
  Fiber* const lanes = &worker.fibers[fiber.thread / kLanes * kLanes];
  const char* const name = kCollectiveNames[static_cast<int>(kind)];
  fiber.site = {file, line};
  if (!(mask & self)) {
    fail(fiber.site, nullptr, "warp mask: calls %s with mask 0x%08x, which it is not in", name,
         mask);
  }
  if (mask & warp.exited) {
    const unsigned gone = static_cast<unsigned>(__builtin_ctz(mask & warp.exited));
    fail(fiber.site, nullptr, "lane has left: calls %s with mask 0x%08x, but lane %u %s", name,
         mask, gone,
         fiber.thread / kLanes * kLanes + gone < static_cast<unsigned>(worker.threads)
             ? "has left the kernel"
             : "does not exist: the block ends before it");
  }
  fiber.state = State::kAtCollective;
  fiber.collective = kind;
  fiber.mask = mask;
  fiber.operand = operand;
  worker.fruitless = 0;
  worker.shadow.accesses = 0;
  warp.at_collective |= self;
  void* operands[kLanes];
  if ((warp.at_collective & mask) != mask) {
    set_not_ready(worker, fiber);
    return switch_away(worker);
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(rest));
    const Fiber& other = lanes[lane];
    if (other.collective != kind || other.mask != mask) {
      set_not_ready(worker, fiber);
      return switch_away(worker);
    }
    operands[lane] = other.operand;
  }
  if (complete) complete(operands, mask);
  if (kChecked && kind == Collective::kSyncWarp) {
    shadow_sync_warp(worker, fiber.thread / kLanes, mask);
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    lanes[__builtin_ctz(rest)].state = State::kReady;
  }
  warp.at_collective &= ~mask;
  set_ready(worker, fiber.thread / kLanes, mask);
}

void yield() {
  Worker& worker = *t_worker;
  if (++worker.fruitless > kFruitlessYields) {
    fail({}, __builtin_return_address(0), "deadlock: waits for what no other thread will do");
  }
  switch_away(worker);
}

void fence() {
  if (kChecked) shadow_fence(*t_worker);
}

void* shared_array(const void* key, const char* name, size_t bytes) {
  Worker& worker = *t_worker;
  for (const SharedArray& array : worker.arrays) {
    if (array.key == key) return worker.arena + array.offset;
  }
  worker.shared_bytes += bytes;
  const size_t dynamic = worker.launch->parameters.dynamic_shared;
  const size_t statics = worker.shared_bytes - dynamic;
  if (statics > kDefaultSharedLimit || worker.shared_bytes > shared_limit() ||
      (dynamic <= kDefaultSharedLimit && !dynamic_limits.count(worker.launch->parameters.kernel) &&
       worker.shared_bytes > kDefaultSharedLimit)) {
    fail({}, nullptr,
         "launch limit: uses shared '%s', with which the block has %zu bytes of static and %zu of "
         "dynamic shared "
         "memory; sm_%d gives 49152 static, and %zu in all to kernels with allow_dynamic_shared",
         name, statics, dynamic, settings.architecture, shared_limit());
  }
  const size_t offset = (worker.arena_used + kSharedGap + 15) & ~size_t{15};
  worker.arena_used = offset + bytes;
  worker.arrays.push_back({key, name, offset, bytes});
  std::memset(worker.arena + offset, 0xff, bytes);  // NaN, where nobody checks
  return worker.arena + offset;
}

void* dynamic_shared() { return t_worker->arena + 16 + kSharedGap; }

void check_aligned(const void* p, size_t bytes, const char* file, int line) {
  if (t_worker && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail_misaligned({file, line}, __builtin_return_address(0), p, bytes);
  }
}

// Copies land as late as they may: when they are waited for. So that a missing wait shows in the
// numbers too, and without instrumentation.
void cp_async(void* shared, const void* global, int width, int bytes, const char* file, int line) {
  Worker& worker = *t_worker;
  check_aligned(shared, static_cast<size_t>(width), file, line);
  check_aligned(global, bytes > 0 ? static_cast<size_t>(width) : 1, file, line);
  if (bytes < 0 || bytes > width) {
    fail({file, line}, nullptr, "cp.async: copies %d bytes, not 0 to %d", bytes, width);
  }
  if (kChecked) {
    if (bytes > 0) {
      check_access(worker, reinterpret_cast<uintptr_t>(global), static_cast<size_t>(bytes),
                   Access::kRead, nullptr, file, line);
    }
    check_access(worker, reinterpret_cast<uintptr_t>(shared), static_cast<size_t>(width),
                 Access::kCopyStart, nullptr, file, line);
  }
  Copy copy = {shared, {}, width, worker.current->copy_groups, {file, line}};
  std::memcpy(copy.data, global, static_cast<size_t>(bytes));
  worker.current->copies.push_back(copy);
}

void cp_async_commit() { ++t_worker->current->copy_groups; }

void cp_async_wait(int groups_left) {
  Worker& worker = *t_worker;
  Fiber& fiber = *worker.current;
  size_t landed = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group + static_cast<unsigned>(groups_left) >= fiber.copy_groups) break;
    if (kChecked) {
      check_access(worker, reinterpret_cast<uintptr_t>(copy.shared),
                   static_cast<size_t>(copy.width), Access::kCopyEnd, nullptr, copy.site.file,
                   copy.site.line);
    }
    std::memcpy(copy.shared, copy.data, static_cast<size_t>(copy.width));
    ++landed;
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(landed));
}

int launch(const LaunchParameters& parameters) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  Launch launch;
  launch.parameters = parameters;
  launch.kernel = kernel_name(parameters.kernel);
  std::string refused = host_error.empty() ? launch_error(parameters) : host_error;
  host_error.clear();
  if (!refused.empty()) {
    last_error_message = "kernel " + launch.kernel + ": " + refused;
    return kLaunchRefused;
  }
  launch.blocks = uint64_t{parameters.grid.x} * parameters.grid.y * parameters.grid.z;
  unsigned host_threads = 1;
  if (kChecked) {
    // One host thread: the shadow memory of global buffers is written without locks.
    if (!shadow_begin_launch(launch.first_serial, launch.blocks)) {
      last_error_message = "kernel " + launch.kernel +
                           ": the host has no memory for the shadow of " + "the registered buffers";
      return kLaunchRefused;
    }
  } else {
    const unsigned have = settings.host_threads > 0 ? static_cast<unsigned>(settings.host_threads)
                                                    : std::thread::hardware_concurrency();
    const uint64_t threads =
        launch.blocks * parameters.block.x * parameters.block.y * parameters.block.z;
    // Starting a host thread costs as much as some thousand threads of a kernel.
    if (threads > 8192 && launch.blocks > 1) host_threads = have;
  }
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < host_threads; ++i) helpers.emplace_back([&] { run_blocks(launch); });
  run_blocks(launch);
  for (auto& helper : helpers) helper.join();
  if (!launch.failed) return 0;
  last_error_message =
      "kernel " + launch.kernel + ": " + launch.error + source_line(launch.error_pc);
  return kLaunchFailed;
}

int allow_dynamic_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (bytes > shared_limit()) {
    last_error_message =
        "kernel " + kernel_name(kernel) + ": launch limit: " + std::to_string(bytes) +
        " bytes of shared memory are over sm_" + std::to_string(settings.architecture) +
        "'s limit of " + std::to_string(shared_limit());
    return kLaunchRefused;
  }
  dynamic_limits[kernel] = bytes;
  return 0;
}

int architecture() { return settings.architecture; }
int multiprocessors() { return settings.multiprocessors; }

void set_device(int architecture, int multiprocessors) {
  settings.architecture = architecture;
  settings.multiprocessors = multiprocessors;
}
void set_host_threads(int n) { settings.host_threads = n; }
const char* describe_status(int status) { return status == 0 ? "no error" : last_error(); }
void register_named_buffer(const void* p, size_t bytes, const char* name, bool read_only) {
  if (p == nullptr) return clear_buffers();
  register_buffer(p, bytes, name, read_only);
}
const char* last_error() { return last_error_message.c_str(); }

}  // namespace vlmops::emulator

// assert in a kernel stops the launch, not Python. In a launcher it is an assert.
extern "C" void __assert_fail(const char* condition, const char* file, unsigned line,
                              const char* function) noexcept {
  using namespace vlmops::emulator;
  if (t_worker) fail({file, static_cast<int>(line)}, nullptr, "trap: asserted %s", condition);
  std::fprintf(stderr, "%s:%u: %s: asserted %s\n", file, line, function, condition);
  std::abort();
}
