// Attention on NVIDIA GPUs: the core that the ops on it share.
//
// Within a segment of n queries and m keys, for each query i and head:
//   s_ij = log2(e) scale q_i . k_j
//   p_ij = 2^(s_ij - m_i) / l_i    y_i = sum_j p_ij v_j
// with l_i the sum of 2^(s_ij - m_i), and m_i near the largest s_ij: any would do in exact numbers.
// For upstream g, with delta_i = g_i . y_i:
//   dv_j = sum_i p_ij g_i          ds_ij = p_ij (g_i . v_j - delta_i)
//   dk_j = scale sum_i ds_ij q_i   dq_i = scale sum_j ds_ij k_j
//
// Forward takes 4 n m D operations a head and moves q, k, v, y once: for the 5,476 patches of an
// image, 16 heads of 80 in bfloat16, 154 GFLOP against 56 MB. At an H200's 790 TFLOP/s and 4.6 TB/s
// that is 194 us against 12; windows of 64 take 1.8 GFLOP, 2.3 us, and the bytes are the floor.
// Nothing of this has run on a GPU. Predicted: mma.sync reaches three fifths of those operations,
// 320 us, and the 480 M exponentials take 134 us that hide in part: 450 to 550 us.
//
// Rows. Where group = H / H_kv heads share a KV head, row r of a segment is head r % group of query
// r / group: keys are read once for all of them. A block owns a tile of rows (forward, dq) or of
// keys (dk and dv) and visits tiles of the other side. Which segment a tile is of: there are
// floor(first row / size) + s tiles before segment s, a bound that rises, so blocks find theirs by
// search in the starts as they lie on the GPU, and those beyond a segment's rows leave.
//
// Threads. A warp has 16 or 32 of the block's own rows; mma m16n8k16 multiplies them with the other
// side's tile, which cp.async copies one tile ahead, one barrier a tile. Lane l holds of a product
// c [16, 8] rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next: what exponentials make of it
// is, rounded to 16 bits, the left side of the next product as it stands in registers. The owner of
// keys computes k q^T for the same reason. Rows of tiles are 16 bytes longer than D, against bank
// conflicts; D is rounded up to 64, 80, 96, 128 or 256 with zeros.
//
// Softmax is online: of a row the thread keeps m, its own part of l, and y. Those are scaled to a
// new m when a logit exceeds the old one by 8: 2^8 is nothing to 16 bits, and until then there is
// nothing to do but a vote. So m_i may be 8 less than the largest.
//
// Few rows over many keys, decoding, would leave the card idle: there a block takes a chunk of the
// keys, and a second kernel combines. Whether a segment is split depends on its own sizes, and
// what comes of a row on neither the tile's size nor other segments.
//
// float32 takes FMAs: 2 rows by 2 or 4 columns a thread.
#pragma once

#include "common/attention.h"
#include "common/gpu.cuh"

namespace vlmops::attention {

constexpr int kChunk = 128;                  // keys to a block, of segments with few rows
constexpr int kFewRows = 64;                 // that those have at most
constexpr float kSlack = 8.0f;               // by which a logit may exceed the maximum, in base 2
constexpr float kNever = -__builtin_inff();  // the logit of a key that is not seen

// What a launcher knows of Params beyond them.
struct Plan {
  bool wide_q, wide_k, wide_v, wide_grad, wide_out;  // 16-byte accesses
  float steep, steep_rest;                           // scale log2(e), and what that float lacks
  float steepness;                                   // its size, and not 0
  uint32_t flip;  // of the signs of two elements of q, where scale is negative
  bool few;       // blocks are chunks of keys of segments with few rows
  int slots;      // rows of one part
  float* parts;   // [tiles of keys, KV heads, slots, D]: y of a chunk, not divided
  float2* stats;  // [tiles of keys, KV heads, slots]: m and l
};

VLMOPS_HOST_DEVICE static inline bool is_few(int64_t rows, int64_t keys) {
  return rows <= kFewRows && keys > kChunk;
}

// ---- Which segment ----

// The last s of `count` with start(s) <= at, or 0; starts do not fall. All lanes look.
template <class Start>
__device__ __forceinline__ int64_t last_at_most(int64_t count, int64_t at, const Start& start) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t first = 0;
  while (count > 1) {
    const int64_t step = (count + kWarpSize - 1) / kWarpSize;
    const bool before = lane * step < count && start(first + lane * step) <= at;
    const int last = max(__popc(__ballot_sync(kFullWarp, before)) - 1, 0);
    first += last * step;
    count = min(step, count - last * step);
  }
  return first;
}

struct Segment {
  int64_t index;
  Range q, k;
  int rows, keys;  // rows: queries x group
};

struct Place {
  Segment segment;
  int tile;  // of the segment's rows or keys
};

__device__ __forceinline__ Segment segment_of(const Params& p, int64_t index) {
  const Range q = range_of(p.q_starts, p.rows, index), k = range_of(p.k_starts, p.keys, index);
  return {index, q, k, static_cast<int>(q.count * p.group()), static_cast<int>(k.count)};
}

// Of tile `t` of all, kSize rows each.
template <int kSize>
__device__ __forceinline__ Place place_of(const Params& p, const Starts& starts, int64_t rows,
                                          int group, int64_t t) {
  if (starts.data == nullptr) {
    const auto each = static_cast<uint32_t>((starts.length * group + kSize - 1) / kSize);
    const auto index = static_cast<uint32_t>(t) / each;
    return {segment_of(p, index), static_cast<int>(static_cast<uint32_t>(t) - index * each)};
  }
  const auto start = [&](int64_t s) {
    const int64_t first = load_int(starts.data, starts.type, s);
    return max(min(first, rows), int64_t{0}) * group / kSize + s;
  };
  const int64_t index = last_at_most(p.segments, t, start);
  return {segment_of(p, index), static_cast<int>(t - start(index))};
}

// Rows of one segment and KV head in a tensor.
template <class T>
struct Strip {
  T* data;
  int64_t row, head;  // strides
  int group;

  __device__ __forceinline__ int query(int r) const { return group == 1 ? r : r / group; }
  __device__ __forceinline__ T* at(int r) const {
    const int i = query(r);
    return data + i * row + (r - i * group) * head;
  }
};

template <class T>
__device__ __forceinline__ Strip<const T> strip_of(const Heads& of, const Starts& starts,
                                                   int64_t segment, int64_t first, int kv_head,
                                                   int group) {
  const int64_t offset = offset_of(starts, of, segment, first) + kv_head * group * of.head;
  return {static_cast<const T*>(of.data) + offset, of.row, of.head, group};
}

template <class T>
__device__ __forceinline__ Strip<const T> queries_of(const Params& p, const Heads& of,
                                                     const Segment& s, int kv_head) {
  return strip_of<T>(of, p.q_starts, s.index, s.q.first, kv_head, p.group());
}

template <class T>
__device__ __forceinline__ Strip<const T> keys_of(const Params& p, const Heads& of,
                                                  const Segment& s, int kv_head) {
  return strip_of<T>(of, p.k_starts, s.index, s.k.first, kv_head, 1);
}

// Of a contiguous [.., heads, D], from row `first` on.
template <class T>
__device__ __forceinline__ Strip<T> dense(void* data, int64_t first, int heads, int dim,
                                          int kv_head, int group) {
  const int64_t row = static_cast<int64_t>(heads) * dim;
  return {static_cast<T*>(data) + first * row + kv_head * group * dim, row, dim, group};
}

// Of [H, rows], which m, 1 / l and delta are.
template <class T>
__device__ __forceinline__ Strip<T> statistics(const Params& p, T* data, const Segment& s,
                                               int kv_head) {
  return {data + kv_head * p.group() * p.rows + s.q.first, 1, p.rows, p.group()};
}

// ---- What is seen ----

// Padding of a segment's rows or keys; none where data is null.
struct Hidden {
  const bool* data;
  int group, count;

  __device__ __forceinline__ bool at(int r) const {
    return r < count && data[group == 1 ? r : r / group];
  }
  // Bit c: of row first + c. All lanes.
  template <int kSize>
  __device__ __forceinline__ uint64_t bits(int first) const {
    if (data == nullptr) return 0;
    const int lane = threadIdx.x % kWarpSize;
    uint64_t bits = __ballot_sync(kFullWarp, at(first + lane));
    if constexpr (kSize > kWarpSize)
      bits |= static_cast<uint64_t>(__ballot_sync(kFullWarp, at(first + kWarpSize + lane)))
              << kWarpSize;
    return bits;
  }
};

// Which blocks of keys the rows of a segment see. Nothing of it stays in registers: only few calls
// have a mask.
struct Blocks {
  const Params& p;
  const Segment& segment;

  __device__ __forceinline__ bool hide() const { return p.blocks != nullptr; }
  __device__ __forceinline__ const bool* of_query(int i) const {
    return p.blocks + (segment.q.first + i) * p.block_count;
  }
  __device__ __forceinline__ int of_key(int key) const {
    return static_cast<int>(static_cast<uint32_t>(key) / static_cast<uint32_t>(p.block));
  }
  // Row and key of a tile, which may lie beyond the last.
  __device__ __forceinline__ bool sees(int row, int key) const {
    const int r = min(row, segment.rows - 1);
    return of_query(p.group() == 1 ? r : r / p.group())[of_key(min(key, segment.keys - 1))];
  }
  // Whether any row of [row, end_row) sees any key of [key, end_key).
  __device__ __forceinline__ bool any(int row, int end_row, int key, int end_key) const {
    end_row = min(end_row, segment.rows);
    end_key = min(end_key, segment.keys);
    if (row >= end_row || key >= end_key) return false;
    const int last = of_key(end_key - 1);
    for (int i = row / p.group(); i <= (end_row - 1) / p.group(); ++i) {
      for (int block = of_key(key); block <= last; ++block)
        if (of_query(i)[block]) return true;
    }
    return false;
  }
};

// Tiles of kSize rows up to `end`, in order, without those of nothing but padding if all that the
// block owns is padding, and without those of which what it owns, [first_own, end_own), sees
// nothing. A warp looks at 32 of them at a time.
template <int kSize>
struct Walk {
  Hidden hidden;
  bool skips;
  int end;
  Blocks blocks;
  bool owns_rows;  // and visits keys, or the other way round
  int first_own, end_own;
  int begin = 0;  // where tile 0 begins
  int base = -kWarpSize;
  uint32_t live = 0;

  // The first at or after `tile`; end if there is none. All lanes.
  __device__ __forceinline__ int next(int tile) {
    if (!skips && !blocks.hide()) return tile;
    for (; tile < end; tile = base + kWarpSize) {
      if (tile >= base + kWarpSize) {
        base = tile;
        live = __ballot_sync(kFullWarp, sees(base + static_cast<int>(threadIdx.x % kWarpSize)));
      }
      const uint32_t rest = live >> (tile - base);
      if (rest != 0) return tile + __ffs(static_cast<int>(rest)) - 1;
    }
    return end;
  }

  __device__ __forceinline__ bool sees(int tile) const {
    if (tile >= end) return false;
    if (blocks.hide()) {
      const int first = begin + tile * kSize;
      return owns_rows ? blocks.any(first_own, end_own, first, first + kSize)
                       : blocks.any(first, first + kSize, first_own, end_own);
    }
    const int last = min((tile + 1) * kSize, hidden.count);
    for (int r = tile * kSize; r < last; ++r)
      if (!hidden.at(r)) return true;
    return false;
  }
};

__device__ __forceinline__ const bool* padding_of(const Params& p, const Segment& s) {
  return p.padding == nullptr ? nullptr : p.padding + s.q.first;
}

// Whether all of the kSize rows from `first` on are padding; what is no row is. All threads.
template <int kSize, int kThreads>
__device__ __forceinline__ bool all_hidden(const Hidden& hidden, int first) {
  if (hidden.data == nullptr) return false;
  bool all = true;
  for (int r = first + threadIdx.x; r < first + kSize; r += kThreads)
    all = all && (r >= hidden.count || hidden.at(r));
  return __syncthreads_and(all);
}

// ---- Tiles in shared memory ----

template <int kDim>
constexpr int kPitchOf = kDim + 8;  // elements of 16 bits

// kRows rows from `first` on, what is outside as zeros. Threads side by side copy 16 bytes side by
// side. A copy of no bytes reads nothing, wherever it points.
template <int kDim, int kRows, int kThreads, class T>
__device__ __forceinline__ void copy_rows(T* tile, const Strip<const T>& from, int first, int count,
                                          int channels, bool wide) {
  constexpr int kPass = kRows < kThreads / 2 ? kRows : kThreads / 2;  // rows at a time
  constexpr int kLanes = kThreads / kPass, kPacks = kDim / 8 / kLanes;
  static_assert(kPacks * kLanes * 8 == kDim && kRows % kPass == 0);
  const int row = threadIdx.x / kLanes, channel = threadIdx.x % kLanes * 8;
#pragma unroll
  for (int pass = 0; pass < kRows; pass += kPass) {
    const int r = first + pass + row;
    const T* const src = (r < count ? from.at(r) : from.data) + channel;
    T* const to = tile + (pass + row) * kPitchOf<kDim> + channel;
    if (wide && channels == kDim) {
      const int bytes = r < count ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kPacks; ++i)
        cp_async_16_or_zero(to + i * kLanes * 8, src + i * kLanes * 8, bytes);
      continue;
    }
    const int inside = r < count ? channels - channel : 0;
    if (wide) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int c = i * kLanes * 8;
        cp_async_16_or_zero(to + c, src + c, c < inside ? 16 : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPacks; ++i) {
        const int c = i * kLanes * 8;
        Pack<T, 8> pack;
#pragma unroll
        for (int e = 0; e < 8; ++e) pack[e] = c < inside ? src[c + e] : from_float<T>(0.0f);
        store_pack(to + c, pack);
      }
    }
  }
}

// Rows of a tile into a contiguous tensor.
template <int kDim, int kRows, int kThreads, class T>
__device__ __forceinline__ void write_rows(const T* tile, const Strip<T>& to, int first, int count,
                                           int channels) {
  constexpr int kPass = kRows < kThreads / 2 ? kRows : kThreads / 2;
  constexpr int kLanes = kThreads / kPass;
#pragma unroll 1
  for (int pass = 0; pass < kRows; pass += kPass) {
    const int row = pass + static_cast<int>(threadIdx.x) / kLanes;
    if (first + row >= count) continue;
    T* const out = to.at(first + row);
#pragma unroll 1
    for (int c = threadIdx.x % kLanes * 8; c < channels; c += kLanes * 8)
      store_pack(out + c, load_pack<8>(tile + row * kPitchOf<kDim> + c));
  }
}

// ---- Products ----

template <class T>
__device__ __forceinline__ uint32_t two(float x, float y) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    memcpy(&word, &both, sizeof(word));
  } else {
    const __half2 both = __floats2half2_rn(x, y);
    memcpy(&word, &both, sizeof(word));
  }
  return word;
}

// Rows 16 i and on of a tile, channels 16 step and on, as the left side of mma.
template <int kPitch, class T>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int i, int step) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4(a, tile + (i * 16 + lane % 16) * kPitch + step * 16 + lane / 16 * 8);
}

// c += a b^T over channels; left(i, step, fragment) gives a's, b is a tile.
template <int kPitch, int kSteps, int kM, int kN, class T, class Left>
__device__ __forceinline__ void multiply_channels(float (&c)[kM][kN][4], const Left& left,
                                                  const T* b) {
  const int lane = threadIdx.x % kWarpSize;
  const T* const rows = b + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) left(i, step, a[i]);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, rows + j * 8 * kPitch + step * 16);
      const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16(c[i][j], a[i], first, T());
        mma_m16n8k16(c[i][j + 1], a[i], second, T());
      }
    }
  }
}

// c += p b over the rows of tile b, kParts columns of mma from b on.
template <int kPitch, int kM, int kN, int kParts, class T>
__device__ __forceinline__ void multiply_rows(float (&c)[kM][kParts][4],
                                              const float (&p)[kM][kN][4], const T* b) {
  const int lane = threadIdx.x % kWarpSize;
  const T* const rows = b + lane % 16 * kPitch + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kN / 2; ++step) {
    uint32_t a[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[i][e] = two<T>(p[i][2 * step + e / 2][e % 2 * 2], p[i][2 * step + e / 2][e % 2 * 2 + 1]);
    }
#pragma unroll
    for (int j = 0; j < kParts; j += 2) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, rows + step * 16 * kPitch + j * 8);
      const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_m16n8k16(c[i][j], a[i], first, T());
        mma_m16n8k16(c[i][j + 1], a[i], second, T());
      }
    }
  }
}

// A product times `factor(i, half)`, rounded, into rows of a tile from `tile` on.
template <int kPitch, int kM, int kParts, class T, class Factor>
__device__ __forceinline__ void place_rows(T* tile, const float (&c)[kM][kParts][4],
                                           const Factor& factor) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float f = factor(i, half);
      T* const row = tile + (i * 16 + half * 8 + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        *reinterpret_cast<uint32_t*>(row + j * 8) =
            two<T>(c[i][j][2 * half] * f, c[i][j][2 * half + 1] * f);
    }
  }
}

// 2^x to two units in the last place; what would be subnormal is 0.
__device__ __forceinline__ float power_of_2(float x) {
#if defined(VLMOPS_EMULATOR)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// m + log2 l, to be subtracted from logits; of a row without keys such that nothing is left. Fewer
// digits than m and l have apart, enough for 16 bits.
__device__ __forceinline__ float subtrahend(float most, float part) {
  return part == 0.0f ? -kNever : most - log2f(part);
}

// ---- Forward, 16 bits ----

template <class T_, int kDim_, int kM_, int kKeys_, bool kHeld_>
struct ForwardTile {
  using T = T_;
  static constexpr int kDim = kDim_, kPitch = kPitchOf<kDim>, kSteps = kDim / 16;
  static constexpr int kM = kM_;                                 // 16 rows of a warp each
  static constexpr int kBlocks = kM == 1 && kDim <= 80 ? 3 : 2;  // on one multiprocessor
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kRows = kWarps * kM * 16;
  static constexpr int kKeys = kKeys_, kN = kKeys / 8;
  static constexpr bool kHeld = kHeld_;                   // q in registers
  static constexpr int kStage = 2 * kKeys * kPitch;       // k and v
  static constexpr int kQ = kHeld ? kStage : 2 * kStage;  // where q lies at first, or always
  static constexpr int kElements = kHeld ? 2 * kStage : kQ + kRows * kPitch;
  static_assert(kQ + kRows * kPitch <= kElements);
  static_assert(kChunk % kKeys == 0);
};

template <class Tile>
__device__ __forceinline__ void forward(const Params& p, const Plan& plan) {
  using T = typename Tile::T;
  constexpr int kM = Tile::kM, kN = Tile::kN, kPitch = Tile::kPitch, kParts = Tile::kDim / 8;
  VLMOPS_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int kv_head = blockIdx.y, group = p.group();
  const bool few = kM == 1 && plan.few;
  const int64_t t = p.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;  // the longest first
  const Place place = few ? place_of<kChunk>(p, p.k_starts, p.keys, 1, t)
                          : place_of<Tile::kRows>(p, p.q_starts, p.rows, group, t);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  if (place.tile < 0 || is_few(rows, keys) != few) return;
  const int first_row = few ? 0 : place.tile * Tile::kRows;
  int begin = 0, end = keys;
  if (few) {
    begin = place.tile * kChunk;
    if (begin >= keys) return;
    end = min(keys, begin + kChunk);
  } else if (first_row >= rows) {
    return;
  }
  if (p.causal) end = min(end, (min(first_row + Tile::kRows, rows) - 1) / group + offset + 1);

  const auto q = queries_of<T>(p, p.q, segment, kv_head);
  const auto k = keys_of<T>(p, p.k, segment, kv_head), v = keys_of<T>(p, p.v, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  const auto copy = [&](int tile, int buffer) {
    T* const stage = shared + buffer * Tile::kStage;
    const int first = begin + tile * Tile::kKeys;
    copy_rows<Tile::kDim, Tile::kKeys, Tile::kThreads>(stage, k, first, keys, p.dim, plan.wide_k);
    copy_rows<Tile::kDim, Tile::kKeys, Tile::kThreads>(stage + Tile::kKeys * kPitch, v, first, keys,
                                                       p.dim, plan.wide_v);
  };

  Walk<Tile::kKeys> walk = {hidden_keys,
                            all_hidden<Tile::kRows, Tile::kThreads>(hidden_rows, first_row),
                            max(end - begin + Tile::kKeys - 1, 0) / Tile::kKeys,
                            blocks,
                            true,
                            first_row,
                            first_row + Tile::kRows,
                            begin};
  T* const q_tile = shared + Tile::kQ;
  copy_rows<Tile::kDim, Tile::kRows, Tile::kThreads>(q_tile, q, first_row, rows, p.dim,
                                                     plan.wide_q);
  int tile = walk.next(0), buffer = 0;
  if (tile < walk.end) copy(tile, 0);
  cp_async_commit();

  const T* const own = q_tile + warp * kM * 16 * kPitch;
  const auto load_q = [&](int i, int step, uint32_t (&a)[4]) {
    load_left<kPitch>(a, own, i, step);
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] ^= plan.flip;
  };
  uint32_t held[kM][Tile::kHeld ? Tile::kSteps : 1][4];
  if constexpr (Tile::kHeld) {
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) load_q(i, step, held[i][step]);
    }
  }
  const auto left = [&](int i, int step, uint32_t (&a)[4]) {
    if constexpr (Tile::kHeld) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = held[i][step][e];
    } else {
      load_q(i, step, a);
    }
  };

  const int warp_row = first_row + warp * kM * 16;
  const float slack = kSlack / plan.steepness;
  float y[kM][kParts][4] = {}, sum[kM][2] = {}, shift[kM][2] = {}, bound[kM][2];
  int limit[kM][2];  // keys that a row sees, but for padding
  uint32_t hidden_row = 0;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + i * 16 + half * 8 + lane / 4;
      bound[i][half] = kNever;
      limit[i][half] = p.causal ? min(keys, q.query(row) + offset + 1) : keys;
      if (padding != nullptr)
        hidden_row |= static_cast<uint32_t>(hidden_rows.at(row)) << (2 * i + half);
    }
  }
  const int least = p.causal ? min(keys, q.query(warp_row) + offset + 1) : keys;

  for (; tile < walk.end; buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // tile has come, and the other buffer is free
    const int next = walk.next(tile + 1);
    if (next < walk.end) copy(next, buffer ^ 1);
    cp_async_commit();
    if (warp_row < rows) {
      const T* const k_tile = shared + buffer * Tile::kStage;
      float s[kM][kN][4] = {};
      multiply_channels<kPitch, Tile::kSteps>(s, left, k_tile);

      const int first = begin + tile * Tile::kKeys;
      const uint64_t hidden_key = hidden_keys.bits<Tile::kKeys>(first);
      if (first + Tile::kKeys > least || hidden_key != 0 || blocks.hide()) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int j = 0; j < kN; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int column = j * 8 + lane % 4 * 2 + e % 2;
              const bool both = (hidden_row >> (2 * i + e / 2) & hidden_key >> column & 1) != 0;
              const int row = warp_row + i * 16 + e / 2 * 8 + lane / 4;
              if (first + column >= limit[i][e / 2] || both ||
                  (blocks.hide() && !blocks.sees(row, first + column)))
                s[i][j][e] = kNever;
            }
          }
        }
      }

      float top[kM][2];
      bool exceeds = false;
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = kNever;
#pragma unroll
          for (int j = 0; j < kN; ++j)
            most = fmaxf(most, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
          top[i][half] = most;
          exceeds = exceeds || most > bound[i][half];
        }
      }
      if (__any_sync(kFullWarp, exceeds)) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float most = top[i][half];
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
            if (most > bound[i][half]) {
              const float to = most * plan.steepness;
              const float scale = bound[i][half] == kNever ? 0.0f : power_of_2(shift[i][half] - to);
              bound[i][half] = most + slack;
              shift[i][half] = to;
              sum[i][half] *= scale;
#pragma unroll
              for (int j = 0; j < kParts; ++j) {
                y[i][j][2 * half] *= scale;
                y[i][j][2 * half + 1] *= scale;
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = power_of_2(fmaf(s[i][j][e], plan.steepness, -shift[i][e / 2]));
            s[i][j][e] = x;
            sum[i][e / 2] += x;
          }
        }
      }
      multiply_rows<kPitch>(y, s, k_tile + Tile::kKeys * kPitch);
    }
    tile = next;
  }

  float inverse[kM][2];
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  const int64_t slot = (t * p.kv_heads + kv_head) * plan.slots;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + i * 16 + half * 8 + lane / 4;
      float total = sum[i][half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      inverse[i][half] = total == 0.0f ? 0.0f : 1.0f / total;
      if (lane % 4 != 0 || row >= rows) continue;
      if (few) {
        plan.stats[slot + row] = {total == 0.0f ? kNever : shift[i][half], total};
      } else {
        *mosts.at(row) = shift[i][half];
        *parts.at(row) = inverse[i][half];
      }
    }
  }
  if (few) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + half * 8 + lane / 4;
      float* const to = plan.parts + (slot + row) * p.dim + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kParts; ++j)
        if (row < rows && j * 8 < p.dim)
          store_pack(to + j * 8, Pack<float, 2>{y[0][j][2 * half], y[0][j][2 * half + 1]});
    }
    return;
  }
  cp_async_wait<0>();
  __syncthreads();  // shared memory is y's now
  T* const y_tile = shared;
  place_rows<kPitch>(y_tile + warp * kM * 16 * kPitch, y,
                     [&](int i, int half) { return inverse[i][half]; });
  __syncthreads();
  write_rows<Tile::kDim, Tile::kRows, Tile::kThreads>(
      static_cast<const T*>(y_tile),
      dense<T>(p.out, segment.q.first, p.heads, p.dim, kv_head, group), first_row, rows, p.dim);
}

// Parts of a segment with few rows, put together: one block for a segment and KV head.
template <class T>
__device__ __forceinline__ void combine(const Params& p, const Plan& plan) {
  const int kv_head = blockIdx.y;
  const Place place = place_of<kChunk>(p, p.k_starts, p.keys, 1, blockIdx.x);
  const Segment& segment = place.segment;
  if (place.tile != 0 || !is_few(segment.rows, segment.keys)) return;
  const int chunks = (segment.keys + kChunk - 1) / kChunk;
  const int64_t step = static_cast<int64_t>(p.kv_heads) * plan.slots;
  const int64_t slot = (static_cast<int64_t>(blockIdx.x) * p.kv_heads + kv_head) * plan.slots;
  const auto out = dense<T>(p.out, segment.q.first, p.heads, p.dim, kv_head, p.group());
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  for (int row = threadIdx.x / kWarpSize; row < segment.rows; row += blockDim.x / kWarpSize) {
    const float2* const stats = plan.stats + slot + row;
    float most = kNever, total = 0.0f;
    for (int i = 0; i < chunks; ++i) most = fmaxf(most, stats[i * step].x);
    for (int i = 0; i < chunks; ++i)
      if (stats[i * step].x != kNever)
        total += power_of_2(stats[i * step].x - most) * stats[i * step].y;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int c = threadIdx.x % kWarpSize; c < p.dim; c += kWarpSize) {
      float y = 0.0f;
      for (int i = 0; i < chunks; ++i)
        if (stats[i * step].x != kNever)
          y += power_of_2(stats[i * step].x - most) *
               plan.parts[(slot + i * step + row) * p.dim + c];
      out.at(row)[c] = from_float<T>(y * inverse);
    }
    if (threadIdx.x % kWarpSize == 0) {
      *mosts.at(row) = total == 0.0f ? 0.0f : most;
      *parts.at(row) = inverse;
    }
  }
}

// ---- Backward, 16 bits ----

// delta: of each row and head the sum of grad * out. Eight lanes to a pair of them.
template <class T>
__device__ __forceinline__ void sum_delta(const Backward& b, const Plan& plan) {
  const Params& p = b.p;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 8) + threadIdx.x / 8;
  const int64_t row = min(pair / p.heads, p.rows - 1);
  const auto head = static_cast<int>(pair % p.heads);
  const bool whole = b.p.q_starts.data == nullptr;
  const int64_t segment = whole ? row / p.q_starts.length : 0;
  const int64_t within = whole ? row - segment * p.q_starts.length : row;
  const T* const grad = static_cast<const T*>(b.grad.data) + segment * b.grad.batch +
                        within * b.grad.row + head * b.grad.head;
  const T* const out = static_cast<const T*>(p.out) + (row * p.heads + head) * p.dim;
  constexpr int kPack = vlmops::kPack<T>;
  float sum = 0.0f;
  for (int c = threadIdx.x % 8 * kPack; c < p.dim; c += 8 * kPack) {
    Pack<T, kPack> g, y;
    if (plan.wide_grad) {
      g = load_pack<kPack>(grad + c);
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) g[e] = grad[c + e];
    }
    if (plan.wide_out) {
      y = load_pack<kPack>(out + c);
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) y[e] = out[c + e];
    }
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum = fmaf(to_float(g[e]), to_float(y[e]), sum);
  }
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  if (threadIdx.x % 8 == 0 && pair < p.rows * p.heads) b.delta[head * p.rows + row] = sum;
}

// A block owns kOwn rows or keys, two tensors of them, and copies tiles of the other side's two.
// Where D is large, kAcross warps share 16 of them, each with its part of D.
template <class T_, int kDim_, int kDown_, int kAcross_, int kOther_>
struct BackwardTile {
  using T = T_;
  static constexpr int kDim = kDim_, kPitch = kPitchOf<kDim>, kSteps = kDim / 16;
  static constexpr int kDown = kDown_, kAcross = kAcross_;
  static constexpr int kThreads = kDown * kAcross * kWarpSize;
  static constexpr int kOwn = kDown * 16, kOther = kOther_, kN = kOther / 8;
  static constexpr int kColumns = kDim / kAcross, kParts = kColumns / 8;
  static constexpr int kStage = 2 * kOther * kPitch;
  static constexpr int kStages = 2 * kOwn * kPitch;  // where they begin
  static constexpr int kElements = kStages + 2 * kStage;
  static constexpr int kStatistics = 2 * kOther;  // floats of a stage: m + log2 l, and delta
};

template <class Tile>
__device__ __forceinline__ void backward_queries(const Backward& b, const Plan& plan) {
  using T = typename Tile::T;
  constexpr int kN = Tile::kN, kPitch = Tile::kPitch;
  const Params& p = b.p;
  VLMOPS_DYNAMIC_SHARED(T, shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int down = warp % Tile::kDown, across = warp / Tile::kDown;
  const int kv_head = blockIdx.y, group = p.group();
  const int64_t t = p.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const Place place = place_of<Tile::kOwn>(p, p.q_starts, p.rows, group, t);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  const int first_row = place.tile * Tile::kOwn;
  if (place.tile < 0 || first_row >= rows) return;
  int end = keys;
  if (p.causal) end = min(end, (min(first_row + Tile::kOwn, rows) - 1) / group + offset + 1);

  const auto q = queries_of<T>(p, p.q, segment, kv_head);
  const auto grad = queries_of<T>(p, b.grad, segment, kv_head);
  const auto k = keys_of<T>(p, p.k, segment, kv_head), v = keys_of<T>(p, p.v, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  const auto copy = [&](int tile, int buffer) {
    T* const stage = shared + Tile::kStages + buffer * Tile::kStage;
    const int first = tile * Tile::kOther;
    copy_rows<Tile::kDim, Tile::kOther, Tile::kThreads>(stage, k, first, keys, p.dim, plan.wide_k);
    copy_rows<Tile::kDim, Tile::kOther, Tile::kThreads>(stage + Tile::kOther * kPitch, v, first,
                                                        keys, p.dim, plan.wide_v);
  };

  Walk<Tile::kOther> walk = {hidden_keys,
                             all_hidden<Tile::kOwn, Tile::kThreads>(hidden_rows, first_row),
                             max(end + Tile::kOther - 1, 0) / Tile::kOther,
                             blocks,
                             true,
                             first_row,
                             first_row + Tile::kOwn};
  copy_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(shared, q, first_row, rows, p.dim, plan.wide_q);
  copy_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(shared + Tile::kOwn * kPitch, grad, first_row,
                                                    rows, p.dim, plan.wide_grad);
  int tile = walk.next(0), buffer = 0;
  if (tile < walk.end) copy(tile, 0);
  cp_async_commit();

  const T* const q_own = shared + down * 16 * kPitch;
  const T* const grad_own = q_own + Tile::kOwn * kPitch;
  const int warp_row = first_row + down * 16;
  const float steepness = plan.steep;
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  const auto deltas = statistics(p, b.delta, segment, kv_head);
  float dq[1][Tile::kParts][4] = {}, shift[2], delta[2];
  int limit[2];
  uint32_t hidden_row = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    shift[half] = row < rows ? subtrahend(*mosts.at(row), *parts.at(row)) : -kNever;
    delta[half] = row < rows ? *deltas.at(row) : 0.0f;
    limit[half] = p.causal ? min(keys, q.query(row) + offset + 1) : keys;
    if (padding != nullptr) hidden_row |= static_cast<uint32_t>(hidden_rows.at(row)) << half;
  }
  const int least = p.causal ? min(keys, q.query(warp_row) + offset + 1) : keys;

  for (; tile < walk.end; buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // tile has come, and the other buffer is free
    const int next = walk.next(tile + 1);
    if (next < walk.end) copy(next, buffer ^ 1);
    cp_async_commit();
    if (warp_row < rows) {
      const T* const k_tile = shared + Tile::kStages + buffer * Tile::kStage;
      float s[1][kN][4] = {}, ds[1][kN][4] = {};
      multiply_channels<kPitch, Tile::kSteps>(
          s, [&](int i, int step, uint32_t (&a)[4]) { load_left<kPitch>(a, q_own, i, step); },
          k_tile);
      multiply_channels<kPitch, Tile::kSteps>(
          ds, [&](int i, int step, uint32_t (&a)[4]) { load_left<kPitch>(a, grad_own, i, step); },
          k_tile + Tile::kOther * kPitch);
      const int first = tile * Tile::kOther;
      const uint64_t hidden_key = hidden_keys.bits<Tile::kOther>(first);
      const bool all = first + Tile::kOther <= least && hidden_key == 0 && !blocks.hide();
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float x = power_of_2(fmaf(s[0][j][e], steepness, -shift[e / 2]));
          if (!all) {
            const int column = j * 8 + lane % 4 * 2 + e % 2;
            const bool both = (hidden_row >> (e / 2) & hidden_key >> column & 1) != 0;
            const int row = warp_row + e / 2 * 8 + lane / 4;
            if (first + column >= limit[e / 2] || both ||
                (blocks.hide() && !blocks.sees(row, first + column)))
              x = 0.0f;
          }
          ds[0][j][e] = x * (ds[0][j][e] - delta[e / 2]);
        }
      }
      multiply_rows<kPitch>(dq, ds, k_tile + across * Tile::kColumns);
    }
    tile = next;
  }

  cp_async_wait<0>();
  if (b.exact_dq) {
    const auto to = dense<float>(b.dq, segment.q.first, p.heads, p.dim, kv_head, group);
#pragma unroll
    for (int j = 0; j < Tile::kParts; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = warp_row + e / 2 * 8 + lane / 4;
        const int column = across * Tile::kColumns + j * 8 + lane % 4 * 2 + e % 2;
        if (row < rows && column < p.dim) to.at(row)[column] = dq[0][j][e] * p.scale;
      }
    }
    return;
  }
  __syncthreads();  // the queries' place is their gradients' now
  place_rows<kPitch>(shared + down * 16 * kPitch + across * Tile::kColumns, dq,
                     [&](int, int) { return p.scale; });
  __syncthreads();
  write_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(
      static_cast<const T*>(shared),
      dense<T>(b.dq, segment.q.first, p.heads, p.dim, kv_head, group), first_row, rows, p.dim);
}

template <class Tile>
__device__ __forceinline__ void backward_keys(const Backward& b, const Plan& plan) {
  using T = typename Tile::T;
  constexpr int kN = Tile::kN, kPitch = Tile::kPitch;
  const Params& p = b.p;
  VLMOPS_DYNAMIC_SHARED(T, shared);
  float* const numbers = reinterpret_cast<float*>(shared + Tile::kElements);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int down = warp % Tile::kDown, across = warp / Tile::kDown;
  const int kv_head = blockIdx.y, group = p.group();
  const Place place = place_of<Tile::kOwn>(p, p.k_starts, p.keys, 1, blockIdx.x);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  const int first_key = place.tile * Tile::kOwn;
  if (place.tile < 0 || first_key >= keys) return;

  const auto q = queries_of<T>(p, p.q, segment, kv_head);
  const auto grad = queries_of<T>(p, b.grad, segment, kv_head);
  const auto k = keys_of<T>(p, p.k, segment, kv_head), v = keys_of<T>(p, p.v, segment, kv_head);
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  const auto deltas = statistics(p, b.delta, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  const auto copy = [&](int tile, int buffer) {
    T* const stage = shared + Tile::kStages + buffer * Tile::kStage;
    const int first = tile * Tile::kOther;
    copy_rows<Tile::kDim, Tile::kOther, Tile::kThreads>(stage, q, first, rows, p.dim, plan.wide_q);
    copy_rows<Tile::kDim, Tile::kOther, Tile::kThreads>(stage + Tile::kOther * kPitch, grad, first,
                                                        rows, p.dim, plan.wide_grad);
    float* const to = numbers + buffer * Tile::kStatistics;
    for (int r = threadIdx.x; r < Tile::kOther; r += Tile::kThreads) {
      const bool inside = first + r < rows;
      to[r] = inside ? subtrahend(*mosts.at(first + r), *parts.at(first + r)) : -kNever;
      to[Tile::kOther + r] = inside ? *deltas.at(first + r) : 0.0f;
    }
  };

  Walk<Tile::kOther> walk = {hidden_rows,
                             all_hidden<Tile::kOwn, Tile::kThreads>(hidden_keys, first_key),
                             (rows + Tile::kOther - 1) / Tile::kOther,
                             blocks,
                             false,
                             first_key,
                             first_key + Tile::kOwn};
  copy_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(shared, k, first_key, keys, p.dim, plan.wide_k);
  copy_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(shared + Tile::kOwn * kPitch, v, first_key,
                                                    keys, p.dim, plan.wide_v);
  const int first_seen = p.causal ? max(first_key - offset, 0) * group / Tile::kOther : 0;
  int tile = walk.next(first_seen), buffer = 0;
  if (tile < walk.end) copy(tile, 0);
  cp_async_commit();

  const T* const k_own = shared + down * 16 * kPitch;
  const T* const v_own = k_own + Tile::kOwn * kPitch;
  const int warp_key = first_key + down * 16;
  const float steepness = plan.steep;
  float dk[1][Tile::kParts][4] = {}, dv[1][Tile::kParts][4] = {};
  int limit[2];  // the first row that sees a key, but for padding
  uint32_t hidden_key = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = warp_key + half * 8 + lane / 4;
    limit[half] = p.causal ? (key - offset) * group : 0;
    if (padding != nullptr) hidden_key |= static_cast<uint32_t>(hidden_keys.at(key)) << half;
  }
  const int most = p.causal ? (warp_key + 15 - offset) * group : 0;

  for (; tile < walk.end; buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // tile has come, and the other buffer is free
    const int next = walk.next(tile + 1);
    if (next < walk.end) copy(next, buffer ^ 1);
    cp_async_commit();
    if (warp_key < keys) {
      const T* const q_tile = shared + Tile::kStages + buffer * Tile::kStage;
      const T* const grad_tile = q_tile + Tile::kOther * kPitch;
      const float* const shift = numbers + buffer * Tile::kStatistics + lane % 4 * 2;
      const float* const delta = shift + Tile::kOther;
      float s[1][kN][4] = {};
      multiply_channels<kPitch, Tile::kSteps>(
          s, [&](int i, int step, uint32_t (&a)[4]) { load_left<kPitch>(a, k_own, i, step); },
          q_tile);
      const int first = tile * Tile::kOther;
      const uint64_t hidden_row = hidden_rows.bits<Tile::kOther>(first);
      const bool all = first >= most && hidden_row == 0 && !blocks.hide();
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const Pack<float, 2> of = load_pack<2>(shift + j * 8);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float x = power_of_2(fmaf(s[0][j][e], steepness, -of[e % 2]));
          if (!all) {
            const int column = j * 8 + lane % 4 * 2 + e % 2;
            const bool both = (hidden_key >> (e / 2) & hidden_row >> column & 1) != 0;
            const int key = warp_key + e / 2 * 8 + lane / 4;
            if (first + column < limit[e / 2] || both ||
                (blocks.hide() && !blocks.sees(first + column, key)))
              x = 0.0f;
          }
          s[0][j][e] = x;
        }
      }
      if (b.dv != nullptr) multiply_rows<kPitch>(dv, s, grad_tile + across * Tile::kColumns);
      if (b.dk != nullptr) {
        float ds[1][kN][4] = {};
        multiply_channels<kPitch, Tile::kSteps>(
            ds, [&](int i, int step, uint32_t (&a)[4]) { load_left<kPitch>(a, v_own, i, step); },
            grad_tile);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const Pack<float, 2> of = load_pack<2>(delta + j * 8);
#pragma unroll
          for (int e = 0; e < 4; ++e) ds[0][j][e] = s[0][j][e] * (ds[0][j][e] - of[e % 2]);
        }
        multiply_rows<kPitch>(dk, ds, q_tile + across * Tile::kColumns);
      }
    }
    tile = next;
  }

  cp_async_wait<0>();
  __syncthreads();  // the keys' place is their gradients' now
  T* const dk_tile = shared;
  T* const dv_tile = shared + Tile::kOwn * kPitch;
  const int corner = down * 16 * kPitch + across * Tile::kColumns;
  place_rows<kPitch>(dk_tile + corner, dk, [&](int, int) { return p.scale; });
  place_rows<kPitch>(dv_tile + corner, dv, [&](int, int) { return 1.0f; });
  __syncthreads();
  const auto write = [&](const T* tile, void* to) {
    if (to == nullptr) return;
    write_rows<Tile::kDim, Tile::kOwn, Tile::kThreads>(
        tile, dense<T>(to, segment.k.first, p.kv_heads, p.dim, kv_head, 1), first_key, keys, p.dim);
  };
  write(dk_tile, b.dk);
  write(dv_tile, b.dv);
}

// ---- float32 ----

// A block owns kTile rows or keys and visits as many of the other side at a time. Eight lanes share
// two of its rows: each has every eighth column of logits, and every eighth float4 of D.
template <int kDim_>
struct FmaTile {
  static constexpr int kDim = kDim_, kPitch = kDim + 4;
  static constexpr int kTile = kDim > 128 ? 16 : 32, kThreads = kTile * 4;
  static constexpr int kN = kTile / 8, kParts = kDim / 32;
  static constexpr int kFloats = kTile * kPitch;  // of a tile
  static constexpr int kWeightPitch = kTile + 1;
  static constexpr int kWeights = (kTile * kWeightPitch + 3) / 4 * 4;
};

// Where a thread stands in it.
struct FmaPlace {
  int row, lane;  // of two rows; among eight lanes

  __device__ __forceinline__ FmaPlace()
      : row(static_cast<int>(threadIdx.x) / 8 * 2), lane(threadIdx.x % 8) {}
};

template <class Tile>
__device__ __forceinline__ void load_floats(float* tile, const Strip<const float>& from, int first,
                                            int count, int channels, bool wide) {
  for (int i = threadIdx.x; i < Tile::kTile * (Tile::kDim / 4); i += Tile::kThreads) {
    const int row = i / (Tile::kDim / 4), c = i % (Tile::kDim / 4) * 4;
    Pack<float, 4> pack = {};
    if (first + row < count && c < channels) {
      const float* const src = from.at(first + row) + c;
      if (wide) {
        pack = load_pack<4>(src);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) pack[e] = src[e];
      }
    }
    store_pack(tile + row * Tile::kPitch + c, pack);
  }
}

// The two rows' products with every eighth of the other tile's, over channels.
template <class Tile>
__device__ __forceinline__ void dots(float (&c)[2][Tile::kN], const float* own, const float* other,
                                     int channels) {
  const FmaPlace at;
  float4 sums[2][Tile::kN] = {};
#pragma unroll 2
  for (int d = 0; d < channels; d += 4) {
    Pack<float, 4> x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = load_pack<4>(own + (at.row + i) * Tile::kPitch + d);
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const Pack<float, 4> y = load_pack<4>(other + (at.lane + 8 * j) * Tile::kPitch + d);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float4& sum = sums[i][j];
        sum = {fmaf(x[i][0], y[0], sum.x), fmaf(x[i][1], y[1], sum.y), fmaf(x[i][2], y[2], sum.z),
               fmaf(x[i][3], y[3], sum.w)};
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j)
      c[i][j] = (sums[i][j].x + sums[i][j].y) + (sums[i][j].z + sums[i][j].w);
  }
}

// c += weights [kTile, kTile] other: of two rows every eighth float4. A tile is summed by itself:
// one chain of sums over all rows would round more than a matrix product does.
template <class Tile>
__device__ __forceinline__ void add_rows(float (&c)[2][Tile::kParts][4], const float* weights,
                                         const float* other) {
  const FmaPlace at;
#pragma unroll
  for (int part = 0; part < Tile::kParts; ++part) {
    float sums[2][4] = {};
#pragma unroll 4
    for (int r = 0; r < Tile::kTile; ++r) {
      const Pack<float, 4> y = load_pack<4>(other + r * Tile::kPitch + part * 32 + at.lane * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = weights[(at.row + i) * Tile::kWeightPitch + r];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][e] = fmaf(weight, y[e], sums[i][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][part][e] += sums[i][e];
    }
  }
}

template <class Tile>
__device__ __forceinline__ void place_weights(float* weights, const float (&x)[2][Tile::kN]) {
  const FmaPlace at;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j)
      weights[(at.row + i) * Tile::kWeightPitch + at.lane + 8 * j] = x[i][j];
  }
}

template <class Tile, class Factor>
__device__ __forceinline__ void write_floats(const Strip<float>& to,
                                             const float (&c)[2][Tile::kParts][4], int first,
                                             int count, int channels, const Factor& factor) {
  const FmaPlace at;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (first + at.row + i >= count) continue;
    float* const row = to.at(first + at.row + i);
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const int d = part * 32 + at.lane * 4;
      Pack<float, 4> pack;
#pragma unroll
      for (int e = 0; e < 4; ++e) pack[e] = c[i][part][e] * factor(i);
      if (d < channels) store_pack(row + d, pack);
    }
  }
}

// Whether row `row` of a segment sees key `key`; both are there.
__device__ __forceinline__ bool sees(const Params& p, const Hidden& hidden_rows,
                                     const Hidden& hidden_keys, const Blocks& blocks, int row,
                                     int key, int offset) {
  if (p.causal && key > row / p.group() + offset) return false;
  if (blocks.hide() && !blocks.sees(row, key)) return false;
  return hidden_rows.data == nullptr || !hidden_rows.at(row) || !hidden_keys.at(key);
}

// In base 2; two floats of scale log2(e), as the roundings of one would add up in a row.
__device__ __forceinline__ float logit(const Plan& plan, float product) {
  return fmaf(product, plan.steep, product * plan.steep_rest);
}

template <class Tile>
__device__ __forceinline__ void forward_float(const Params& p, const Plan& plan) {
  VLMOPS_DYNAMIC_SHARED(float, shared);
  float* const q_tile = shared;
  float* const k_tile = q_tile + Tile::kFloats;
  float* const v_tile = k_tile + Tile::kFloats;
  float* const weights = v_tile + Tile::kFloats;
  const FmaPlace at;
  const int kv_head = blockIdx.y, group = p.group();
  const Place place = place_of<Tile::kTile>(p, p.q_starts, p.rows, group, blockIdx.x);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  const int first_row = place.tile * Tile::kTile;
  if (place.tile < 0 || first_row >= rows) return;
  int end = keys;
  if (p.causal) end = min(end, (min(first_row + Tile::kTile, rows) - 1) / group + offset + 1);

  const auto k = keys_of<float>(p, p.k, segment, kv_head);
  const auto v = keys_of<float>(p, p.v, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  Walk<Tile::kTile> walk = {hidden_keys,
                            all_hidden<Tile::kTile, Tile::kThreads>(hidden_rows, first_row),
                            max(end + Tile::kTile - 1, 0) / Tile::kTile,
                            blocks,
                            true,
                            first_row,
                            first_row + Tile::kTile};
  load_floats<Tile>(q_tile, queries_of<float>(p, p.q, segment, kv_head), first_row, rows, p.dim,
                    plan.wide_q);
  float y[2][Tile::kParts][4] = {}, most[2] = {kNever, kNever}, sum[2] = {};
  for (int tile = walk.next(0); tile < walk.end; tile = walk.next(tile + 1)) {
    const int first = tile * Tile::kTile;
    __syncthreads();  // the last tile has been read
    load_floats<Tile>(k_tile, k, first, keys, p.dim, plan.wide_k);
    load_floats<Tile>(v_tile, v, first, keys, p.dim, plan.wide_v);
    __syncthreads();
    float s[2][Tile::kN];
    dots<Tile>(s, q_tile, k_tile, p.dim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + at.row + i;
      float top = most[i];
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        const int key = first + at.lane + 8 * j;
        const bool seen =
            row < rows && key < keys && sees(p, hidden_rows, hidden_keys, blocks, row, key, offset);
        s[i][j] = seen ? logit(plan, s[i][j]) : kNever;
        top = fmaxf(top, s[i][j]);
      }
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2)
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, lanes));
      const float shift = top == kNever ? 0.0f : top;
      const float scale = most[i] == kNever ? 0.0f : exp2f(most[i] - shift);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        s[i][j] = exp2f(s[i][j] - shift);
        part += s[i][j];
      }
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2) part += __shfl_xor_sync(kFullWarp, part, lanes);
      sum[i] = sum[i] * scale + part;
      most[i] = top;
#pragma unroll
      for (int d = 0; d < Tile::kParts; ++d) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[i][d][e] *= scale;
      }
    }
    place_weights<Tile>(weights, s);
    __syncwarp();  // a warp's rows are read by itself
    add_rows<Tile>(y, weights, v_tile);
  }
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inverse[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    const int row = first_row + at.row + i;
    if (at.lane == 0 && row < rows) {
      *mosts.at(row) = sum[i] == 0.0f ? 0.0f : most[i];
      *parts.at(row) = inverse[i];
    }
  }
  write_floats<Tile>(dense<float>(p.out, segment.q.first, p.heads, p.dim, kv_head, group), y,
                     first_row, rows, p.dim, [&](int i) { return inverse[i]; });
}

template <class Tile>
__device__ __forceinline__ void backward_queries_float(const Backward& b, const Plan& plan) {
  const Params& p = b.p;
  VLMOPS_DYNAMIC_SHARED(float, shared);
  float* const q_tile = shared;
  float* const grad_tile = q_tile + Tile::kFloats;
  float* const k_tile = grad_tile + Tile::kFloats;
  float* const v_tile = k_tile + Tile::kFloats;
  float* const weights = v_tile + Tile::kFloats;
  const FmaPlace at;
  const int kv_head = blockIdx.y, group = p.group();
  const Place place = place_of<Tile::kTile>(p, p.q_starts, p.rows, group, blockIdx.x);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  const int first_row = place.tile * Tile::kTile;
  if (place.tile < 0 || first_row >= rows) return;
  int end = keys;
  if (p.causal) end = min(end, (min(first_row + Tile::kTile, rows) - 1) / group + offset + 1);

  const auto k = keys_of<float>(p, p.k, segment, kv_head);
  const auto v = keys_of<float>(p, p.v, segment, kv_head);
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  const auto deltas = statistics(p, b.delta, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  Walk<Tile::kTile> walk = {hidden_keys,
                            all_hidden<Tile::kTile, Tile::kThreads>(hidden_rows, first_row),
                            max(end + Tile::kTile - 1, 0) / Tile::kTile,
                            blocks,
                            true,
                            first_row,
                            first_row + Tile::kTile};
  load_floats<Tile>(q_tile, queries_of<float>(p, p.q, segment, kv_head), first_row, rows, p.dim,
                    plan.wide_q);
  load_floats<Tile>(grad_tile, queries_of<float>(p, b.grad, segment, kv_head), first_row, rows,
                    p.dim, plan.wide_grad);
  float dq[2][Tile::kParts][4] = {}, shift[2], part[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + at.row + i;
    shift[i] = row < rows ? *mosts.at(row) : 0.0f;
    part[i] = row < rows ? *parts.at(row) : 0.0f;
    delta[i] = row < rows ? *deltas.at(row) : 0.0f;
  }
  for (int tile = walk.next(0); tile < walk.end; tile = walk.next(tile + 1)) {
    const int first = tile * Tile::kTile;
    __syncthreads();  // the last tile has been read
    load_floats<Tile>(k_tile, k, first, keys, p.dim, plan.wide_k);
    load_floats<Tile>(v_tile, v, first, keys, p.dim, plan.wide_v);
    __syncthreads();
    float s[2][Tile::kN], ds[2][Tile::kN];
    dots<Tile>(s, q_tile, k_tile, p.dim);
    dots<Tile>(ds, grad_tile, v_tile, p.dim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + at.row + i;
#pragma unroll
      for (int j = 0; j < Tile::kN; ++j) {
        const int key = first + at.lane + 8 * j;
        const bool seen =
            row < rows && key < keys && sees(p, hidden_rows, hidden_keys, blocks, row, key, offset);
        const float x = seen ? exp2f(logit(plan, s[i][j]) - shift[i]) * part[i] : 0.0f;
        ds[i][j] = x * (ds[i][j] - delta[i]);
      }
    }
    place_weights<Tile>(weights, ds);
    __syncwarp();  // a warp's rows are read by itself
    add_rows<Tile>(dq, weights, k_tile);
  }
  write_floats<Tile>(dense<float>(b.dq, segment.q.first, p.heads, p.dim, kv_head, group), dq,
                     first_row, rows, p.dim, [&](int) { return p.scale; });
}

template <class Tile>
__device__ __forceinline__ void backward_keys_float(const Backward& b, const Plan& plan) {
  const Params& p = b.p;
  VLMOPS_DYNAMIC_SHARED(float, shared);
  float* const k_tile = shared;
  float* const v_tile = k_tile + Tile::kFloats;
  float* const q_tile = v_tile + Tile::kFloats;
  float* const grad_tile = q_tile + Tile::kFloats;
  float* const weights = grad_tile + Tile::kFloats;
  float* const d_weights = weights + Tile::kWeights;
  const FmaPlace at;
  const int kv_head = blockIdx.y, group = p.group();
  const Place place = place_of<Tile::kTile>(p, p.k_starts, p.keys, 1, blockIdx.x);
  const Segment& segment = place.segment;
  const int rows = segment.rows, keys = segment.keys, offset = keys - rows / group;
  const int first_key = place.tile * Tile::kTile;
  if (place.tile < 0 || first_key >= keys) return;

  const auto q = queries_of<float>(p, p.q, segment, kv_head);
  const auto grad = queries_of<float>(p, b.grad, segment, kv_head);
  const auto mosts = statistics(p, p.most, segment, kv_head);
  const auto parts = statistics(p, p.part, segment, kv_head);
  const auto deltas = statistics(p, b.delta, segment, kv_head);
  const bool* const padding = padding_of(p, segment);
  const Hidden hidden_rows = {padding, group, rows}, hidden_keys = {padding, 1, keys};
  const Blocks blocks = {p, segment};
  Walk<Tile::kTile> walk = {hidden_rows,
                            all_hidden<Tile::kTile, Tile::kThreads>(hidden_keys, first_key),
                            (rows + Tile::kTile - 1) / Tile::kTile,
                            blocks,
                            false,
                            first_key,
                            first_key + Tile::kTile};
  load_floats<Tile>(k_tile, keys_of<float>(p, p.k, segment, kv_head), first_key, keys, p.dim,
                    plan.wide_k);
  load_floats<Tile>(v_tile, keys_of<float>(p, p.v, segment, kv_head), first_key, keys, p.dim,
                    plan.wide_v);
  float dk[2][Tile::kParts][4] = {}, dv[2][Tile::kParts][4] = {};
  const int first_seen = p.causal ? max(first_key - offset, 0) * group / Tile::kTile : 0;
  for (int tile = walk.next(first_seen); tile < walk.end; tile = walk.next(tile + 1)) {
    const int first = tile * Tile::kTile;
    __syncthreads();  // the last tile has been read
    load_floats<Tile>(q_tile, q, first, rows, p.dim, plan.wide_q);
    load_floats<Tile>(grad_tile, grad, first, rows, p.dim, plan.wide_grad);
    __syncthreads();
    float s[2][Tile::kN], ds[2][Tile::kN];
    dots<Tile>(s, k_tile, q_tile, p.dim);
    dots<Tile>(ds, v_tile, grad_tile, p.dim);
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const int row = first + at.lane + 8 * j;
      const float shift = row < rows ? *mosts.at(row) : 0.0f;
      const float part = row < rows ? *parts.at(row) : 0.0f;
      const float delta = row < rows ? *deltas.at(row) : 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = first_key + at.row + i;
        const bool seen =
            row < rows && key < keys && sees(p, hidden_rows, hidden_keys, blocks, row, key, offset);
        s[i][j] = seen ? exp2f(logit(plan, s[i][j]) - shift) * part : 0.0f;
        ds[i][j] = s[i][j] * (ds[i][j] - delta);
      }
    }
    place_weights<Tile>(weights, s);
    place_weights<Tile>(d_weights, ds);
    __syncwarp();  // a warp's rows are read by itself
    if (b.dv != nullptr) add_rows<Tile>(dv, weights, grad_tile);
    if (b.dk != nullptr) add_rows<Tile>(dk, d_weights, q_tile);
  }
  const auto write = [&](void* to, const float (&c)[2][Tile::kParts][4], float factor) {
    if (to == nullptr) return;
    write_floats<Tile>(dense<float>(to, segment.k.first, p.kv_heads, p.dim, kv_head, 1), c,
                       first_key, keys, p.dim, [&](int) { return factor; });
  };
  write(b.dk, dk, p.scale);
  write(b.dv, dv, 1.0f);
}

}  // namespace vlmops::attention
