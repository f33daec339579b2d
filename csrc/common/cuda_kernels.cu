// Fills the table of launchers. Compiled by nvcc into libvlmops_cuda, by g++ into the emulator.
#include "common/cuda_kernels.h"

#include "common/gpu.cuh"

namespace vlmops {
namespace {

#if defined(VLMOPS_EMULATOR)
using emulator::describe_status;
constexpr auto register_buffer = &emulator::register_named_buffer;
#else
const char* describe_status(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
constexpr decltype(CudaKernels::register_buffer) register_buffer = nullptr;
#endif

const CudaKernels kernels = {&describe_status, register_buffer, &mrope::run_cuda,
                             &mrope::norm_backward_parts_cuda, &mrope::run_norm_backward_cuda};

}  // namespace
}  // namespace vlmops

extern "C" const vlmops::CudaKernels* vlmops_cuda_kernels() { return &vlmops::kernels; }
