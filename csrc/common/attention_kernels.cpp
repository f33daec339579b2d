// The attention core's CPU kernels, apart from the ops': they compile longest. As cpu_kernels.cpp.
#include "common/attention_cpu.h"

#define VLMOPS_CONCAT_(a, b) a##b
#define VLMOPS_CONCAT(a, b) VLMOPS_CONCAT_(a, b)

namespace vlmops::attention {

extern const CpuKernels VLMOPS_CONCAT(kernels_, VLMOPS_ISA);
const CpuKernels VLMOPS_CONCAT(kernels_, VLMOPS_ISA) = {
    &scratch, &forward, &part_floats, &forward_part, &join_parts, &backward_scratch, &backward};

}  // namespace vlmops::attention
