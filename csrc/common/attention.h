// Parameters of attention: all that host, device and emulator code of the ops on this core share.
#pragma once

#include <cstddef>

#include "common/types.h"

namespace vlmops::attention {

constexpr int kMaxDim = 256;  // D; a multiple of 8
constexpr double kLog2E = 0x1.71547652b82fep0;

// [rows, heads, D] of one segment after another, D numbers side by side. Strides in elements.
struct Heads {
  const void* data;
  int64_t batch;  // between segments of equal length; 0 where they are packed
  int64_t row, head;
};

// Where segments begin among rows, [segments + 1].
struct Starts {
  const void* data;  // null: every segment has `length` rows
  IntType type;
  int64_t length;
  // [segments], where data is null: how many of a segment's rows there are; null: all.
  const void* lengths;
  IntType lengths_type;
};

// softmax(scale q k^T) v within each of `segments` segments; KV head h / (heads / kv_heads) serves
// head h. A query without keys gets zeros.
struct Params {
  Heads q, k, v;
  void* out;  // [rows, H, D], contiguous
  // [H, rows], what backward asks for: a number m that no logit of a query exceeds by much, and 1 /
  // the sum of 2^(logit - m) over its keys; both 0 without keys. The one number that they make,
  // lse, would cost float32 half of its digits. On a CPU m is |q k^T| of the largest logit, with
  // its sign, elsewhere a logit in base 2: backward and forward of a backend belong together.
  float *most, *part;
  DType dtype;
  int heads, kv_heads, dim;
  float scale, scale_rest;  // what it lacks of the double that was given
  // Query i of n sees the keys up to i + m - n of m.
  bool causal;
  // [rows], or null; of segments whose queries are its keys. A query that is padding sees the keys
  // that are not, any other query sees all.
  const bool* padding;
  // [rows, block_count], or null; of segments of one length. A query sees the keys of its segment
  // whose block, `block` keys each, has true.
  const bool* blocks;
  int64_t block, block_count;
  int64_t segments, rows, keys;  // of all segments
  int64_t longest;               // no segment has more queries; 0: not known
  Starts q_starts, k_starts;

  VLMOPS_HOST_DEVICE int group() const { return heads / kv_heads; }
};

// Upstream and gradients, beside what forward was given and returned.
struct Backward {
  Params p;
  Heads grad;          // of out
  float* delta;        // [H, rows], scratch: the sum over D of grad * out
  void *dq, *dk, *dv;  // contiguous [rows or keys, heads, D]; null where nobody asks
  bool exact_dq;       // dq is float32, for who adds to it
};

struct Range {
  int64_t first, count;  // rows, counted over all segments
};

// static: see simd.h on linkage. What is read on a GPU may be anything, and is kept within `rows`.
VLMOPS_HOST_DEVICE static inline Range range_of(const Starts& starts, int64_t rows,
                                                int64_t segment) {
  const auto within = [](int64_t at, int64_t end) { return at < 0 ? 0 : at > end ? end : at; };
  if (starts.data == nullptr) {
    const int64_t first = segment * starts.length;
    if (starts.lengths == nullptr) return {first, starts.length};
    const int64_t count = load_int(starts.lengths, starts.lengths_type, segment);
    return {first, within(count, starts.length)};
  }
  const int64_t first = within(load_int(starts.data, starts.type, segment), rows);
  const int64_t end = within(load_int(starts.data, starts.type, segment + 1), rows);
  return {first, end > first ? end - first : 0};
}

// Elements from Heads::data to a segment's first row, which is row `first` of all.
VLMOPS_HOST_DEVICE static inline int64_t offset_of(const Starts& starts, const Heads& of,
                                                   int64_t segment, int64_t first) {
  return starts.data == nullptr ? segment * of.batch : first * of.row;
}

// ---- On a CPU ----

// What turns products, of the scale's sign, into exponents of 2.
static inline float steepness_of(double scale) {
  const auto steepness = static_cast<float>((scale < 0.0 ? -scale : scale) * kLog2E);
  return steepness == 0.0f ? 0x1p-126f : steepness;  // 0 times what is hidden, -inf, would be NaN
}

// Queries of one segment and the keys that they see, causality aside.
struct Job {
  int64_t segment;
  Range q, k;                      // those of the segment, but for q's count
  int64_t position;                // of the first query in its segment
  int64_t visible;                 // keys that the segment's first query sees, if causal
  const int32_t *q_rows, *k_rows;  // rows counted from those of q and k; null: one after another
  const bool* blocks;              // Params::blocks of its queries; null: they see all
};

// Queries of a job, so that K and V are packed once for several panels of rows.
constexpr int64_t kJobRows = 256;

constexpr int kKeyBlock = 64;

// Rows of so few queries and heads are done with channels in lanes, and their keys in parts of
// kPartKeys whatever else is there: a result depends on nothing else. Of fewer keys backward must
// find the very sums that forward had: one key has all the weight.
constexpr int64_t kFewOnCpu = 8, kPartKeys = 1024;
static_assert(kPartKeys % kKeyBlock == 0);
static inline bool few_rows_of(const Params& p, const Job& job) {
  return job.q.count * p.group() <= kFewOnCpu && job.k.count >= kKeyBlock;
}

// Floats of scratch, on a boundary of 64 bytes, for `rows` queries in so many jobs.
using CpuScratch = size_t (*)(const Params&, int64_t rows, int64_t jobs);
// KV heads [begin, end) of a job.
using CpuForward = void (*)(const Params&, const Job&, int begin, int end, float* scratch);
// Few rows of KV head `head` over keys [begin, end), to part_floats() floats, and the result of
// `count` such parts that lie one after the other.
using CpuForwardPart = void (*)(const Params&, const Job&, int head, int64_t begin, int64_t end,
                                float* scratch, float* to);
using CpuJoinParts = void (*)(const Params&, const Job&, int head, float* parts, int64_t count);
// One KV head; the jobs are all those of one segment.
using CpuBackward = void (*)(const Backward&, const Job* jobs, int64_t count, int head,
                             float* scratch);

struct CpuKernels {
  CpuScratch scratch;
  CpuForward forward;
  CpuScratch part_floats;
  CpuForwardPart forward_part;
  CpuJoinParts join_parts;
  CpuScratch backward_scratch;
  CpuBackward backward;
};

}  // namespace vlmops::attention
