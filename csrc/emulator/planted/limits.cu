// Planted bugs: launches that a device refuses. sizes: grid x, y, z, block x, y, z, dynamic shared.
#include "emulator/planted/planted.h"

namespace vlmops::planted {

__global__ void nothing_kernel() {}

static int launch_nothing(const emulator::Arguments& arguments) {
  unsigned d[6];
  for (int i = 0; i < 6; ++i) d[i] = static_cast<unsigned>(arguments.sizes[i]);
  return launch(nothing_kernel, dim3(d[0], d[1], d[2]), dim3(d[3], d[4], d[5]),
                static_cast<size_t>(arguments.sizes[6]), arguments.stream);
}

VLMOPS_CASE(launch_shape) { return launch_nothing(arguments); }

__global__ void big_static_kernel(float* y) {
  VLMOPS_SHARED(float, big, 12289);
  big[threadIdx.x] = 0.0f;
  y[threadIdx.x] = big[threadIdx.x];
}

VLMOPS_CASE(static_shared) {
  return launch(big_static_kernel, dim3(1), dim3(32), 0, arguments.stream,
                arguments.buffer<float>(1));
}

__global__ void big_sum_kernel(float* y) {
  VLMOPS_SHARED(float, fixed, 1024);
  VLMOPS_DYNAMIC_SHARED(float, dynamic);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 0.0f;
  y[threadIdx.x] = fixed[threadIdx.x] + dynamic[threadIdx.x];
}

VLMOPS_CASE(static_and_dynamic_shared) {
  return launch(big_sum_kernel, dim3(1), dim3(32), 46 << 10, arguments.stream,
                arguments.buffer<float>(1));
}

__global__ void asks_kernel() {}

// sizes: bytes that the launcher asks for.
VLMOPS_CASE(too_much_asked) {
  const auto bytes = static_cast<size_t>(arguments.sizes[0]);
  const int status = allow_dynamic_shared(asks_kernel, bytes);
  return status != 0 ? status : launch(asks_kernel, dim3(1), dim3(32), bytes, arguments.stream);
}

// Sizes multiplied or added in int before they reach the grid.
VLMOPS_CASE(overflow_in_launcher) {
  const int threads = 0x7fffffff - static_cast<int>(arguments.sizes[0]);
  return launch(nothing_kernel, dim3((threads + 31) / 32), dim3(32), 0, arguments.stream);
}

}  // namespace vlmops::planted
