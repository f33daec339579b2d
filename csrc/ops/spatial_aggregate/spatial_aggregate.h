// Parameters of the spatial aggregation: all that host, device and emulator code share.
#pragma once

#include "common/types.h"

namespace vlmops::spatial_aggregate {

constexpr int kMaxEncoders = 8;
constexpr int kMaxKeys = 1024;    // of a query, over all encoders
constexpr int kMaxHeadDim = 256;  // and a multiple of 8

// Of a map [B, h, w, H, D] in elements; channels lie side by side. A mask [B, h, w] has no heads.
struct Strides {
  int64_t batch, y, x, head;
};

struct Encoder {
  const void *key, *value;
  const bool* mask;             // whether a token exists; null: all do
  void *key_grad, *value_grad;  // of backward, contiguous; null where nobody needs them
  Strides key_stride, value_stride, mask_stride;
  int height, width;  // tokens of a window
};

// Queries on a grid [B, grid_h, grid_w, H, D]; an encoder's map has a window for each.
struct Params {
  const void* q;
  const void* grad;  // of the result, in backward
  void* out;         // the result; in backward the gradient of q, or null; contiguous
  DType dtype;       // of all but masks
  Strides q_stride, grad_stride;
  int64_t batch, grid_h, grid_w;
  int heads, head_dim;
  int encoder_count;
  int keys;            // of a query, masked ones among them
  float scale;         // of logits
  bool needs_weights;  // backward: gradients of q or of a key are wanted, not of values alone
  bool streams;        // what backward writes is too large for the CPU's caches
  Encoder encoders[kMaxEncoders];

  VLMOPS_HOST_DEVICE int64_t cells() const { return batch * grid_h * grid_w; }
};

// Cells [begin, end), counted over batch and grid.
using CpuKernel = void (*)(const Params&, int64_t begin, int64_t end);

// On a GPU, where all pointers are the device's and rows of channels lie on 16 bytes. They return 0
// or an error's number.
using CudaKernel = int (*)(const Params&, void* stream);

int forward_cuda(const Params& p, void* stream);
int backward_cuda(const Params& p, void* stream);

}  // namespace vlmops::spatial_aggregate
