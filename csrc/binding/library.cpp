// What belongs to the library rather than to an op: the choice of the instruction set, and whether
// a CPU tensor goes to the emulated GPU.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "binding/cuda.h"
#include "common/cpu_kernels.h"

namespace vlmops {

extern const CpuKernels kernels_portable;
#ifdef VLMOPS_X86
extern const CpuKernels kernels_avx2, kernels_avx512;
namespace attention {
extern const CpuKernels kernels_avx512_bf16;
}
#endif

namespace {

// Best first. `runs` asks the CPU and the operating system.
struct Level {
  const CpuKernels* kernels;
  bool runs;
};

std::vector<Level> levels() {
  std::vector<Level> all;
#ifdef VLMOPS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const CpuKernels avx512_bf16 = [] {
    CpuKernels kernels = kernels_avx512;
    kernels.isa = "avx512_bf16";
    kernels.attention = &attention::kernels_avx512_bf16;
    return kernels;
  }();
  all.push_back({&avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")});
  all.push_back({&kernels_avx512, avx512});
  all.push_back({&kernels_avx2, avx2});
#endif
  all.push_back({&kernels_portable, true});
  return all;
}

// The best level that runs, at or below `cap` (empty: no cap).
const CpuKernels* choose(const std::string& cap) {
  bool allowed = cap.empty();
  std::string known;
  for (const Level& level : levels()) {
    allowed = allowed || cap == level.kernels->isa;
    if (allowed && level.runs) return level.kernels;
    known += (known.empty() ? "" : ", ") + std::string(level.kernels->isa);
  }
  throw std::runtime_error("VLMOPS_CPU_ISA: expected one of " + known + ", got '" + cap + "'");
}

std::atomic<const CpuKernels*> current{nullptr};

std::string cpu_isa() { return cpu_kernels().isa; }

// Returns the level now in force, which is lower than `cap` where the machine has no better.
std::string set_cpu_isa(const std::string& cap) {
  current = choose(cap);
  return cpu_isa();
}

bool emulated(const torch::stable::Tensor& tensor) {
  return !is_on_gpu(tensor) && launchers_for(tensor) != nullptr;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = current.load(std::memory_order_relaxed);
  if (kernels == nullptr) {
    const char* cap = std::getenv("VLMOPS_CPU_ISA");
    kernels = choose(cap == nullptr ? "" : cap);
    current = kernels;
  }
  return *kernels;
}

}  // namespace vlmops

STABLE_TORCH_LIBRARY_FRAGMENT(vlmops, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str cap) -> str");
  m.def("emulated(Tensor tensor) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(vlmops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vlmops::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&vlmops::set_cpu_isa));
  m.impl("emulated", TORCH_BOX(&vlmops::emulated));
}
