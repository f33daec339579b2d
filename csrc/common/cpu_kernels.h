// The CPU kernels of every op, one table per instruction set; chosen at run time.
#pragma once

#include "ops/add_norm/add_norm.h"
#include "ops/gated_residual/gated_residual.h"
#include "ops/hd_transform/hd_transform.h"
#include "ops/mlp_projector/mlp_projector.h"
#include "ops/mrope/mrope.h"
#include "ops/patch_embed/patch_embed.h"
#include "ops/perceiver_attention/perceiver_attention.h"
#include "ops/pixel_shuffle/pixel_shuffle.h"
#include "ops/spatial_aggregate/spatial_aggregate.h"

namespace vlmops {

namespace attention {
struct CpuKernels;  // common/attention.h
}

struct CpuKernels {
  const char* isa;
  const attention::CpuKernels* attention;
  mrope::CpuKernel mrope;
  mrope::CpuNormBackward mrope_norm_backward;
  patch_embed::CpuPack patch_embed_pack;
  patch_embed::CpuFinish patch_embed_finish;
  patch_embed::CpuPrefix patch_embed_prefix;
  patch_embed::CpuUnpack patch_embed_unpack;
  patch_embed::CpuColumnSums patch_embed_column_sums;
  pixel_shuffle::CpuKernel pixel_shuffle;
  pixel_shuffle::CpuKernel pixel_shuffle_inverse;
  pixel_shuffle::CpuNormBackward pixel_shuffle_norm_backward;
  mlp_projector::CpuNorm mlp_projector_norm;
  mlp_projector::CpuNormBackward mlp_projector_norm_backward;
  mlp_projector::CpuActivate mlp_projector_activate;
  mlp_projector::CpuActivateBackward mlp_projector_activate_backward;
  hd_transform::CpuKernel hd_transform;
  hd_transform::CpuKernel hd_transform_backward;
  hd_transform::CpuSums hd_transform_sums;
  gated_residual::CpuTanh gated_residual_tanh;
  gated_residual::CpuKernel gated_residual;
  gated_residual::CpuBackward gated_residual_backward;
  spatial_aggregate::CpuKernel spatial_aggregate;
  spatial_aggregate::CpuKernel spatial_aggregate_backward;
  perceiver_attention::CpuJoin perceiver_attention_join;
  perceiver_attention::CpuAdd perceiver_attention_add;
  add_norm::CpuTable add_norm_table;
  add_norm::CpuKernel add_norm;
  add_norm::CpuBackward add_norm_backward;
};

// The table in force: the best that this machine runs, capped by VLMOPS_CPU_ISA. Throws
// std::runtime_error if that names no instruction set.
const CpuKernels& cpu_kernels();

}  // namespace vlmops
