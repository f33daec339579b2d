// Planted bugs of the emulator's tests: one a kernel. Buffer 0 is an input, 1 an output, both of 64
// floats, which is n. What must be said of each stands in python_tests/emulator/test_emulator.py.
#pragma once

#include "common/gpu.cuh"
#include "emulator/cases.h"

// VLMOPS_PLANTED(name, grid, block) { body of a kernel } with x, y and n in scope.
#define VLMOPS_PLANTED(name, grid, block)                                                   \
  __global__ void name##_kernel(const float* x, float* y, int n);                           \
  VLMOPS_CASE(name) {                                                                       \
    return launch(name##_kernel, dim3(grid), dim3(block), 0, arguments.stream,              \
                  arguments.buffer<const float>(0), arguments.buffer<float>(1), 64);        \
  }                                                                                         \
  __global__ void name##_kernel([[maybe_unused]] const float* x, [[maybe_unused]] float* y, \
                                [[maybe_unused]] int n)
