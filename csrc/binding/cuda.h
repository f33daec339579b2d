// The CUDA half as the bindings see it: libvlmops_cuda where torch has CUDA, or tests' emulator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/cuda_kernels.h"

namespace vlmops {

bool is_on_gpu(const torch::stable::Tensor& tensor);

// What launches on this tensor's device, or null for the CPU's own kernels. Throws
// std::runtime_error for a CUDA tensor if the CUDA half is not loaded, with the reason.
const CudaKernels* launchers_for(const torch::stable::Tensor& tensor);

// The current stream of a CUDA tensor's device; null for the emulator's.
void* stream_of(const torch::stable::Tensor& tensor);

// Throws what a launcher's status other than 0 means.
void check_launch(const CudaKernels& kernels, const char* op, int status);

// Tells the emulator that kernels may touch a tensor.
void allow(const CudaKernels& kernels, const torch::stable::Tensor& tensor, const char* name,
           bool read_only);

}  // namespace vlmops
