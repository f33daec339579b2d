// Fills the table of launchers. Compiled by nvcc into libvlmops_cuda, by g++ into the emulator.
#include "common/cuda_kernels.h"
#include "common/gpu.cuh"

namespace vlmops {
namespace {

#if defined(VLMOPS_EMULATOR)
const CudaKernels kernels = {&emulator::describe_status, &emulator::register_named_buffer};
#else
const char* describe_status(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
const CudaKernels kernels = {&describe_status, nullptr};
#endif

}  // namespace
}  // namespace vlmops

extern "C" const vlmops::CudaKernels* vlmops_cuda_kernels() { return &vlmops::kernels; }
