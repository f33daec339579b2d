// The launchers of every op, as one table of function pointers: what libvlmops asks of the library
// that holds the CUDA half. There are two such libraries, libvlmops_cuda and the emulator's, and
// both export vlmops_cuda_kernels. Neither knows torch; a launcher takes Params and a stream.
#pragma once

#include <cstddef>

#include "ops/add_norm/add_norm.h"
#include "ops/gated_residual/gated_residual.h"
#include "ops/hd_transform/hd_transform.h"
#include "ops/mlp_projector/mlp_projector.h"
#include "ops/mrope/mrope.h"
#include "ops/packed_attention/packed_attention.h"
#include "ops/patch_embed/patch_embed.h"
#include "ops/perceiver_attention/perceiver_attention.h"
#include "ops/pixel_shuffle/pixel_shuffle.h"
#include "ops/spatial_aggregate/spatial_aggregate.h"

namespace vlmops {

struct CudaKernels {
  // What a launcher's status other than 0 means.
  const char* (*describe_status)(int status);
  // Tells the emulator of memory that kernels may touch; a null p: of none. Null in libvlmops_cuda.
  void (*register_buffer)(const void* p, size_t bytes, const char* name, bool read_only);

  mrope::CudaKernel mrope;
  mrope::CudaNormBackwardParts mrope_norm_backward_parts;
  mrope::CudaNormBackward mrope_norm_backward;
  patch_embed::CudaRun patch_embed;
  patch_embed::CudaPack patch_embed_pack;
  patch_embed::CudaFinish patch_embed_finish;
  pixel_shuffle::CudaKernel pixel_shuffle;
  pixel_shuffle::CudaKernel pixel_shuffle_inverse;
  pixel_shuffle::CudaNormBackward pixel_shuffle_norm_backward;
  pixel_shuffle::CudaWeightGrad pixel_shuffle_weight_grad;
  mlp_projector::CudaNorm mlp_projector_norm;
  mlp_projector::CudaNorm mlp_projector_norm_backward;
  mlp_projector::CudaActivate mlp_projector_activate;
  mlp_projector::CudaActivate mlp_projector_activate_backward;
  mlp_projector::CudaRowSum mlp_projector_sum_rows;
  hd_transform::CudaKernel hd_transform;
  hd_transform::CudaKernel hd_transform_backward;
  hd_transform::CudaSums hd_transform_sums;
  gated_residual::CudaKernel gated_residual;
  gated_residual::CudaParts gated_residual_parts;
  gated_residual::CudaBackward gated_residual_backward;
  gated_residual::CudaGateGrad gated_residual_gate_grad;
  packed_attention::CudaScratch packed_attention_forward_scratch;
  packed_attention::CudaForward packed_attention_forward;
  packed_attention::CudaBackwardScratch packed_attention_backward_scratch;
  packed_attention::CudaBackward packed_attention_backward;
  spatial_aggregate::CudaKernel spatial_aggregate;
  spatial_aggregate::CudaKernel spatial_aggregate_backward;
  perceiver_attention::CudaJoin perceiver_attention_join;
  perceiver_attention::CudaAdd perceiver_attention_add;
  add_norm::CudaKernel add_norm;
  add_norm::CudaBackward add_norm_backward;
};

}  // namespace vlmops

extern "C" {
__attribute__((visibility("default"))) const vlmops::CudaKernels* vlmops_cuda_kernels();
// What the build contains, as CMAKE_CUDA_ARCHITECTURES has it, with blanks between.
__attribute__((visibility("default"))) const char* vlmops_cuda_architectures();
}
