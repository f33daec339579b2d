// A launch on a tensor's device: which kernels, where they go, and what they may touch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "binding/cuda.h"

namespace vlmops {

struct Launch {
  const char* op;
  const CudaKernels* kernels;  // null: the CPU's own are to run, and the rest does nothing
  void* stream = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;

  Launch(const char* name, const torch::stable::Tensor& on) : op(name), kernels(launchers_for(on)) {
    if (kernels == nullptr) return;
    stream = stream_of(on);
    if (is_on_gpu(on)) guard.emplace(on.device().index());
    if (kernels->register_buffer != nullptr) kernels->register_buffer(nullptr, 0, nullptr, false);
  }

  void reads(const torch::stable::Tensor& t, const char* name) const {
    if (kernels != nullptr) allow(*kernels, t, name, true);
  }
  void reads(const std::optional<torch::stable::Tensor>& t, const char* name) const {
    if (t.has_value()) reads(*t, name);
  }
  void writes(const torch::stable::Tensor& t, const char* name) const {
    if (kernels != nullptr) allow(*kernels, t, name, false);
  }

  // Throws what a status other than 0 means.
  template <class... Taken, class... Given>
  void run(int (*CudaKernels::*kernel)(Taken...), const Given&... given) const {
    check_launch(*kernels, op, (kernels->*kernel)(given..., stream));
  }
};

}  // namespace vlmops
