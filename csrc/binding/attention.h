// The attention core on the CPU: how the work is cut, and shared among threads.
#pragma once

#include "common/attention.h"

namespace vlmops::attention {

void forward_on_cpu(const Params& p);
void backward_on_cpu(const Backward& b);

}  // namespace vlmops::attention
