// Compiled once per instruction set with -DVLMOPS_ISA=portable|avx2|avx512 and the matching -march.
#include "common/cpu_kernels.h"

#include "ops/add_norm/add_norm_cpu.h"
#include "ops/gated_residual/gated_residual_cpu.h"
#include "ops/hd_transform/hd_transform_cpu.h"
#include "ops/mlp_projector/mlp_projector_cpu.h"
#include "ops/mrope/mrope_cpu.h"
#include "ops/patch_embed/patch_embed_cpu.h"
#include "ops/perceiver_attention/perceiver_attention_cpu.h"
#include "ops/pixel_shuffle/pixel_shuffle_cpu.h"
#include "ops/spatial_aggregate/spatial_aggregate_cpu.h"

#define VLMOPS_CONCAT_(a, b) a##b
#define VLMOPS_CONCAT(a, b) VLMOPS_CONCAT_(a, b)
#define VLMOPS_STRING_(a) #a
#define VLMOPS_STRING(a) VLMOPS_STRING_(a)

namespace vlmops {

namespace attention {
extern const CpuKernels VLMOPS_CONCAT(kernels_, VLMOPS_ISA);
}

extern const CpuKernels VLMOPS_CONCAT(kernels_, VLMOPS_ISA);
const CpuKernels VLMOPS_CONCAT(kernels_, VLMOPS_ISA) = {
    VLMOPS_STRING(VLMOPS_ISA),
    &attention::VLMOPS_CONCAT(kernels_, VLMOPS_ISA),
    &mrope::run,
    &mrope::run_backward,
    &patch_embed::pack,
    &patch_embed::finish,
    &patch_embed::write_prefix,
    &patch_embed::unpack,
    &patch_embed::column_sums,
    &pixel_shuffle::forward,
    &pixel_shuffle::inverse,
    &pixel_shuffle::norm_backward,
    &mlp_projector::norm,
    &mlp_projector::norm_backward,
    &mlp_projector::activate,
    &mlp_projector::activate_backward,
    &hd_transform::forward,
    &hd_transform::backward,
    &hd_transform::sums,
    &gated_residual::tanh_of_gate,
    &gated_residual::forward,
    &gated_residual::backward,
    &spatial_aggregate::forward,
    &spatial_aggregate::backward,
    &perceiver_attention::join,
    &perceiver_attention::add,
    &add_norm::table_of,
    &add_norm::forward,
    &add_norm::backward};

}  // namespace vlmops
