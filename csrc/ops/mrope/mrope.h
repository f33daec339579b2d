// Parameters of M-RoPE: all that host, device and emulator code share.
#pragma once

#include "common/types.h"

namespace vlmops::mrope {

enum class Rotation : int { kHalf, kPairs };

constexpr int64_t kMaxFrequencies = 1024;  // R: head_dim up to 2048 rotated channels
constexpr int64_t kMaxNormDim = 2048;      // D where there is a norm
constexpr int64_t kMaxAxes = 16;           // A
constexpr int64_t kMaxId = 1 << 24;        // beyond it float32 cannot hold every integer

// One of q, k. Strides in elements, order batch, token, head, channel. src == dst means in place.
struct Rows {
  const void* src;  // in backward the gradient of the result
  void* dst;
  int64_t heads;  // H; 0 where nothing is to be done
  int64_t src_stride[4];
  int64_t dst_stride[4];
  // RMSNorm of every head before its rotation.
  const void* norm_weight;  // [D]; null: no norm
  DType norm_dtype;
  int64_t norm_stride;
  // Its backward alone:
  const void* x;  // what was normalised
  int64_t x_stride[4];
  bool needs_grad;         // else dst is not written
  bool needs_weight_grad;  // else the weight's gradient is not computed
};

struct Params {
  Rows rows[2];         // q, k
  DType dtype;          // of q and k
  int64_t batch;        // B
  int64_t tokens;       // S
  int64_t head_dim;     // D
  int64_t frequencies;  // R, 2R <= D
  Rotation rotation;
  const void* position_ids;  // [A, B, S]
  IntType id_type;
  int64_t id_stride[3];      // axis, batch, token
  int64_t axes;              // A
  const float* inv_freq;     // [R], radians per position
  const int32_t* freq_axis;  // [R], in [0, A)
  float scaling;             // multiplies cosine and sine; if NaN, canonical (simd.h)
  float sine_sign;           // +1 forward, -1 backward
  float norm_eps;            // added to the mean of squares
  float norm_offset;         // added to the weights
};

// Rotates the tokens [begin, end) of the B * S tokens, b-major.
using CpuKernel = void (*)(const Params&, int64_t begin, int64_t end);

// Backward where there is a norm. Adds the tokens' share of the weights' gradients to weight_grad
// [2, D], q's before k's.
using CpuNormBackward = void (*)(const Params&, int64_t begin, int64_t end, double* weight_grad);

// On a GPU, where all pointers of Params but Params itself are the device's. They return 0 or an
// error's number.
using CudaKernel = int (*)(const Params&, void* stream);

// Blocks along the tokens in backward where there is a norm, each of which leaves [2, D] sums.
using CudaNormBackwardParts = int (*)(const Params&);

// `heads` are those of q and k, needed or not: what a gradient is must not depend on what is
// needed. partial [parts, 2, D] is scratch; weight_grad[i] [D] is q's, k's, or null where nobody
// needs it.
using CudaNormBackward = int (*)(const Params&, const int64_t (&heads)[2], int parts,
                                 float* partial, float* const (&weight_grad)[2], void* stream);

int run_cuda(const Params& p, void* stream);
int norm_backward_parts_cuda(const Params& p);
int run_norm_backward_cuda(const Params& p, const int64_t (&heads)[2], int parts, float* partial,
                           float* const (&weight_grad)[2], void* stream);

}  // namespace vlmops::mrope
