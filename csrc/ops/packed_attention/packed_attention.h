// Packed attention's kernels on the attention core.
#pragma once

#include "common/attention.h"

namespace vlmops::packed_attention {

using attention::Backward;
using attention::Params;

// On a GPU, where all pointers are the device's. They return 0 or an error's number. `scratch`:
// forward_scratch(p) or backward_scratch(b) bytes.
using CudaScratch = int64_t (*)(const Params&);
using CudaForward = int (*)(const Params&, void* scratch, void* stream);
using CudaBackwardScratch = int64_t (*)(const Backward&);
using CudaBackward = int (*)(const Backward&, void* scratch, void* stream);

int64_t forward_scratch_cuda(const Params& p);
int forward_cuda(const Params& p, void* scratch, void* stream);
int64_t backward_scratch_cuda(const Backward& b);
int backward_cuda(const Backward& b, void* scratch, void* stream);

}  // namespace vlmops::packed_attention
