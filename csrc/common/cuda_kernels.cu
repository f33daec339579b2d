// Fills the table of launchers. Compiled by nvcc into libvlmops_cuda, by g++ into the emulator.
#include <cstdio>

#include "common/cuda_kernels.h"
#include "common/gpu.cuh"

namespace vlmops {
namespace {

#if defined(VLMOPS_EMULATOR)
#define VLMOPS_CUDA_ARCHITECTURES ""
using emulator::describe_status;
constexpr auto register_buffer = &emulator::register_named_buffer;
#else
const char* describe_status(int status) {
  if (status != cudaErrorNoKernelImageForDevice)
    return cudaGetErrorString(static_cast<cudaError_t>(status));
  static char message[256];
  std::snprintf(message, sizeof message,
                "this build of vlmops is for the architectures " VLMOPS_CUDA_ARCHITECTURES
                " and the GPU is an sm_%d: build it with -C "
                "cmake.define.VLMOPS_CUDA_ARCHITECTURES=%d",
                architecture(), architecture());
  return message;
}
constexpr decltype(CudaKernels::register_buffer) register_buffer = nullptr;
#endif

const CudaKernels kernels = {&describe_status,
                             register_buffer,
                             &mrope::run_cuda,
                             &mrope::norm_backward_parts_cuda,
                             &mrope::run_norm_backward_cuda,
                             &patch_embed::run_cuda,
                             &patch_embed::pack_cuda,
                             &patch_embed::finish_cuda,
                             &pixel_shuffle::run_cuda,
                             &pixel_shuffle::run_inverse_cuda,
                             &pixel_shuffle::run_norm_backward_cuda,
                             &pixel_shuffle::run_weight_grad_cuda,
                             &mlp_projector::norm_cuda,
                             &mlp_projector::norm_backward_cuda,
                             &mlp_projector::activate_cuda,
                             &mlp_projector::activate_backward_cuda,
                             &mlp_projector::sum_rows_cuda,
                             &hd_transform::forward_cuda,
                             &hd_transform::backward_cuda,
                             &hd_transform::sums_cuda,
                             &gated_residual::forward_cuda,
                             &gated_residual::parts_cuda,
                             &gated_residual::backward_cuda,
                             &gated_residual::gate_grad_cuda,
                             &packed_attention::forward_scratch_cuda,
                             &packed_attention::forward_cuda,
                             &packed_attention::backward_scratch_cuda,
                             &packed_attention::backward_cuda,
                             &spatial_aggregate::forward_cuda,
                             &spatial_aggregate::backward_cuda,
                             &perceiver_attention::join_cuda,
                             &perceiver_attention::add_cuda,
                             &add_norm::forward_cuda,
                             &add_norm::backward_cuda};

}  // namespace
}  // namespace vlmops

const vlmops::CudaKernels* vlmops_cuda_kernels() { return &vlmops::kernels; }

const char* vlmops_cuda_architectures() { return VLMOPS_CUDA_ARCHITECTURES; }
