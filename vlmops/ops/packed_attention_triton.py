"""Packed attention in Triton. `vlmops.ops.packed_attention` says what is computed.

FlashAttention-2: a program of forward has a tile of queries of one head, [BM, D], and walks over
the keys of its segment, BN at a time, with maximum and sum of its rows in float32; logits stay in
registers. Backward recomputes them, twice: dQ by tiles of queries, dK and dV by tiles of
keys, which walk over the queries of all heads that share them. Each result is one program's, so
there are no atomics, and bits do not depend on a schedule.

Tiles of segments that lie anywhere, with nothing summed up or read back: segment s has the tiles
[cu[s] // BM + s, cu[s + 1] // BM + s + 1) of N // BM + segments, which are enough for its rows and
overlap no others. A program finds its s by bisection; one that has no rows is done. Where it is
known how long segments are, all have as many tiles, if those are fewer.

D of 72, 80, 88 and 96 is 64 channels and 16 or 32 more, in products of their own, not 128.

FLOPs: 4 n m D a segment and head in forward, 5/2 of it in backward, and 7/2 with what is computed
twice. Qwen2.5-VL, an image of 5,476 patches, 16 heads of 80, bfloat16: 154 GFLOP over the whole of
it, 155 us at 989 TFLOP/s; in windows of 64 1.8 GFLOP and 56 MB, 13 us at the 4.3 TB/s that a copy
reaches on an H200. PREDICTED, never measured: 40 to 55 % of a tensor core's rate in forward on an
H100, 60 to 70 on sm_80, 10 less in backward; D of 80 pays 10 % for its second product. float32 has
no tensor core ("ieee"): a fifth to a third of the FMA rate.

Threads: 16-byte accesses where heads begin on such a boundary. D, dtypes, options and the class of
the tile are in the compile key; sizes, strides and scale are not.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops.packed_attention import OP, Options

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count; _2: of
# the second part of the channels. Strides come in units of VEC elements: b of the batch, n of rows,
# h of heads. Rows and keys are counted from the segment's first.

_LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _segment(p_starts, p_lengths, i_segment, n_length, n_rows, CHECK: tl.constexpr):
    """Where a segment begins among all rows, and how many it has."""
    if p_starts is None:
        o_first, n = i_segment.to(tl.int64) * n_length, n_length
        if p_lengths is not None:
            n = tl.load(p_lengths + i_segment)
            if CHECK:
                m = (n >= 0) & (n <= n_length)
                tl.device_assert(m, "vlmops.packed_attention: key_lengths: more than k has")
            n = tl.minimum(tl.maximum(n, 0), n_length).to(tl.int32)
    else:
        o_begin = tl.load(p_starts + i_segment).to(tl.int64)
        o_end = tl.load(p_starts + i_segment + 1).to(tl.int64)
        if CHECK:
            m = (o_begin >= 0) & (o_begin <= o_end) & (o_end <= n_rows)
            tl.device_assert(m, "vlmops.packed_attention: cu_seqlens: outside of what it is of")
        # Values that nobody may read back must not lead out of bounds either.
        o_first = tl.minimum(tl.maximum(o_begin, 0), n_rows)
        o_end = tl.minimum(tl.maximum(o_end, 0), n_rows)
        n = tl.maximum(o_end - o_first, 0).to(tl.int32)
    return o_first, n


@triton.jit
def _tile(
    p_starts, p_lengths, i_tile, n_segments, n_rows, n_length, n_tiles,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """A program's segment: number, first row, rows; where its tile begins, steps to its next one.

    EVEN: each segment has n_tiles.
    """
    if EVEN:
        i_segment = i_tile // n_tiles
        i_tile = i_tile % n_tiles
    else:
        i_segment, i_last = i_tile * 0, i_tile * 0 + n_segments - 1
        while i_segment < i_last:
            i = (i_segment + i_last + 1) // 2
            o = tl.minimum(tl.maximum(tl.load(p_starts + i).to(tl.int64), 0), n_rows)
            m = o // BLOCK + i <= i_tile
            i_segment = tl.where(m, i, i_segment)
            i_last = tl.where(m, i_last, i - 1)
        o = tl.minimum(tl.maximum(tl.load(p_starts + i_segment).to(tl.int64), 0), n_rows)
        i_tile = (i_tile - i_segment - o // BLOCK).to(tl.int32)
    o_first, n = _segment(p_starts, p_lengths, i_segment, n_length, n_rows, CHECK)
    # What is said of the longest segment may be wrong.
    n_next = n_tiles * BLOCK if EVEN else tl.maximum(n, 1)
    return i_segment, o_first, n, i_tile * BLOCK, n_next


@triton.jit
def _head(
    p, p_starts, i_segment, o_first, i_head, s_b, s_n, s_h, VEC: tl.constexpr,
):  # fmt: skip
    """A head of the segment's first row."""
    o = i_segment.to(tl.int64) * s_b if p_starts is None else o_first * s_n
    return p + (o + i_head.to(tl.int64) * s_h) * VEC


@triton.jit
def _rows(
    p, o_row, m_row, s_n, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    VEC: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Channels from START on: [o_row, WIDTH], zeros where there are none. ALL: every row is."""
    o_d = START + tl.arange(0, WIDTH)
    p_x = p + (o_row.to(tl.int64) * s_n * VEC)[:, None] + o_d[None, :]
    if START + WIDTH <= D and ALL:
        b = tl.load(p_x)
    elif START + WIDTH <= D:
        b = tl.load(p_x, mask=m_row[:, None], other=0.0)
    elif ALL:
        b = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        b = tl.load(p_x, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    return b


@triton.jit
def _store(
    p, b, o_row, m_row, i_head, n_heads, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Channels from START on of [rows, n_heads, D]."""
    o_d = START + tl.arange(0, WIDTH)
    o = (o_row * n_heads + i_head) * D
    m = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p + o[:, None] + o_d[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _dot(b_a, b_b, b_c):
    return tl.dot(b_a, b_b, b_c, input_precision="ieee")


@triton.jit
def _seen(p_padding, o_first, n, BLOCK: tl.constexpr):
    """From the first to behind the last row of a segment that is no padding."""
    i_first, i_end = n, n * 0
    for i in range(0, n, BLOCK):
        o = i + tl.arange(0, BLOCK)
        m = (o < n) & (tl.load(p_padding + o_first + o, mask=o < n, other=1) == 0)
        i_first = tl.minimum(i_first, tl.min(tl.where(m, o, n)))
        i_end = tl.maximum(i_end, tl.max(tl.where(m, o + 1, 0)))
    return i_first, i_end


@triton.jit
def _blocks(p_blocks, o_row, m_row, o_key, m_key, n_block, n_blocks):
    """Which queries see which keys, [rows, keys]: of blocks of n_block keys."""
    o = o_row.to(tl.int64)[:, None] * n_blocks + (o_key // n_block)[None, :]
    return tl.load(p_blocks + o, mask=m_row[:, None] & m_key[None, :], other=0) != 0


@triton.jit
def _attend(
    b_q, b_q_2, b_y, b_y_2, b_top, b_sum, p_k, p_v, p_hidden, b_hidden, o_last, p_blocks, o_row,
    m_row, n_block, n_blocks, i_begin, i_end, n, s_k_n, s_v_n, factor,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, ALL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys [i_begin, i_end) of n. ALL: all queries see all of them."""
    for i_key in tl.range(i_begin, i_end, BN, num_stages=STAGES):
        o_key = i_key + tl.arange(0, BN)
        m_key = o_key < n
        b_blocks = m_key
        if p_blocks is not None:
            b_blocks = _blocks(p_blocks, o_row, m_row, o_key, m_key, n_block, n_blocks)
        b_k = _rows(p_k, o_key, m_key, s_k_n, 0, D_1, D, VEC, ALL)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if D_2 > 0:
            b_k_2 = _rows(p_k, o_key, m_key, s_k_n, D_1, D_2, D, VEC, ALL)
            b_s = _dot(b_q_2, tl.trans(b_k_2), b_s)
        if NEGATIVE:
            b_s = -b_s
        if not ALL:
            m = m_key[None, :]
            if CAUSAL:
                m = m & (o_key[None, :] <= o_last[:, None])
            if p_hidden is not None:
                b_h = tl.load(p_hidden + o_key, mask=m_key, other=0)
                m = m & ((b_hidden[:, None] == 0) | (b_h[None, :] == 0))
            if p_blocks is not None:
                m = m & b_blocks
            b_s = tl.where(m, b_s, -_INF)
        b_new = tl.maximum(b_top, tl.max(b_s, 1) * factor)
        b_shift = b_new
        if not ALL:
            b_shift = tl.where(b_new == -_INF, 0.0, b_new)
        b_p = tl.exp2(tl.fma(b_s, factor, -b_shift[:, None]))
        b_scale = tl.exp2(b_top - b_shift)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_top = b_new
        b_v = _rows(p_v, o_key, m_key, s_v_n, 0, D_1, D, VEC, ALL)
        b_p = b_p.to(b_v.dtype)
        b_y = _dot(b_p, b_v, b_y * b_scale[:, None])
        if D_2 > 0:
            b_v_2 = _rows(p_v, o_key, m_key, s_v_n, D_1, D_2, D, VEC, ALL)
            b_y_2 = _dot(b_p, b_v_2, b_y_2 * b_scale[:, None])
    return b_y, b_y_2, b_top, b_sum


# What would otherwise make a new compile key: sizes and strides; memory that starts anywhere.
_STRIDES = [f"s_{x}_{d}" for x in "qkvg" for d in "bnh"]
_SIZES = ["n_segments", "n_rows", "n_keys", "n_length", "n_length_k", "n_tiles", "n_heads",
          "n_group", "n_block", "n_blocks"]  # fmt: skip
_UNALIGNED = ["p_starts", "p_starts_k", "p_padding", "p_blocks", "p_lengths"]


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "scale"], do_not_specialize_on_alignment=_UNALIGNED
)
def forward_kernel(
    p_q, p_k, p_v, p_out, p_top, p_part, p_starts, p_starts_k, p_padding, p_blocks,
    p_lengths,
    s_q_b: tl.int64, s_q_n: tl.int64, s_q_h: tl.int64,
    s_k_b: tl.int64, s_k_n: tl.int64, s_k_h: tl.int64,
    s_v_b: tl.int64, s_v_n: tl.int64, s_v_h: tl.int64,
    n_segments: tl.int32, n_rows: tl.int32, n_keys: tl.int32,
    n_length: tl.int32, n_length_k: tl.int32, n_tiles: tl.int32,
    n_heads: tl.int32, n_group: tl.int32, n_block: tl.int32, n_blocks: tl.int32,
    scale: tl.float32,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, VEC: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Result and statistics. Grid: tiles of queries x heads."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:  # those with the most keys first
        i_tile = tl.num_programs(0) - 1 - i_tile
    i_segment, o_first, n, i_begin, n_next = _tile(
        p_starts, None, i_tile, n_segments, n_rows, n_length, n_tiles, BM, EVEN, CHECK
    )
    o_first_k, m = _segment(p_starts_k, p_lengths, i_segment, n_length_k, n_keys, CHECK)
    p_q = _head(p_q, p_starts, i_segment, o_first, i_head, s_q_b, s_q_n, s_q_h, VEC)
    i_kv = i_head // n_group
    p_k = _head(p_k, p_starts, i_segment, o_first_k, i_kv, s_k_b, s_k_n, s_k_h, VEC)
    p_v = _head(p_v, p_starts, i_segment, o_first_k, i_kv, s_v_b, s_v_n, s_v_h, VEC)
    # NEGATIVE is its sign; it is never 0, which times -inf is none.
    factor = tl.maximum(tl.abs(scale) * _LOG2E, 1e-30)
    for i_row in range(i_begin, n, n_next):
        o_row = i_row + tl.arange(0, BM)
        m_row = o_row < n
        b_q = _rows(p_q, o_row, m_row, s_q_n, 0, D_1, D, VEC, False)
        b_q_2 = b_q
        b_y, b_y_2 = tl.zeros([BM, D_1], tl.float32), tl.zeros([BM, 16], tl.float32)
        if D_2 > 0:
            b_q_2 = _rows(p_q, o_row, m_row, s_q_n, D_1, D_2, D, VEC, False)
            b_y_2 = tl.zeros([BM, D_2], tl.float32)
        b_top, b_sum = tl.full([BM], -_INF, tl.float32), tl.zeros([BM], tl.float32)
        # Keys that some of the rows see, and that all of them do.
        i_first, i_end, i_all = n * 0, m, m // BN * BN
        p_hidden, b_hidden, p_rows = p_padding, m_row, p_blocks
        o_last = o_row + (m - n)
        if CAUSAL:
            i_end = tl.minimum(m, tl.minimum(i_row + BM, n) + (m - n))
            i_all = tl.maximum(tl.minimum(m, i_row + 1 + (m - n)), 0) // BN * BN
        if p_padding is not None:
            p_hidden = p_padding + o_first
            b_hidden = tl.load(p_hidden + o_row, mask=m_row, other=1)
            i_all = i_first
            if tl.min(b_hidden.to(tl.int32)) != 0:
                i_first, i_end = _seen(p_padding, o_first, n, 1024)
                i_first = i_first // BN * BN
                i_all = i_first
        elif p_blocks is not None:
            p_rows = p_blocks + o_first * n_blocks
            i_all = i_first
        else:
            b_y, b_y_2, b_top, b_sum = _attend(
                b_q, b_q_2, b_y, b_y_2, b_top, b_sum, p_k, p_v, p_hidden, b_hidden, o_last,
                p_rows, o_row, m_row, n_block, n_blocks, i_first, i_all, m, s_k_n, s_v_n, factor,
                D, D_1, D_2, VEC, BN, CAUSAL, NEGATIVE, True, STAGES,
            )  # fmt: skip
        # Few are left, but for padding.
        b_y, b_y_2, b_top, b_sum = _attend(
            b_q, b_q_2, b_y, b_y_2, b_top, b_sum, p_k, p_v, p_hidden, b_hidden, o_last,
            p_rows, o_row, m_row, n_block, n_blocks, i_all, i_end, m, s_k_n, s_v_n, factor,
            D, D_1, D_2, VEC, BN, CAUSAL, NEGATIVE, False,
            1 if p_padding is None and p_blocks is None else STAGES,
        )  # fmt: skip
        o_all = o_first + o_row
        m_blind = b_top == -_INF
        b_part = tl.where(m_blind, 0.0, 1.0 / tl.where(m_blind, 1.0, b_sum))
        o_row = i_head.to(tl.int64) * n_rows + o_all
        tl.store(p_top + o_row, tl.where(m_blind, 0.0, b_top), mask=m_row)
        tl.store(p_part + o_row, b_part, mask=m_row)
        b_part = b_part[:, None]
        _store(p_out, b_y * b_part, o_all, m_row, i_head, n_heads, 0, D_1, D)
        if D_2 > 0:
            _store(p_out, b_y_2 * b_part, o_all, m_row, i_head, n_heads, D_1, D_2, D)


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def delta_kernel(
    p_g, p_out, p_top, p_part, p_delta, p_less, s_g_b: tl.int64, s_g_n: tl.int64, s_g_h: tl.int64,
    n_rows: tl.int32, n_length: tl.int32, n_heads: tl.int32,
    D: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The sum over D of gradient and result, and what logits less are weights: log2 of its power.

    Grid: tiles of all rows x heads.
    """
    i_head = tl.program_id(1)
    o_row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_row = o_row < n_rows
    m = m_row[:, None] & (o_d < D)[None, :]
    o_g = o_row // n_length * s_g_b + o_row % n_length * s_g_n + i_head.to(tl.int64) * s_g_h
    b_g = tl.load(p_g + (o_g * VEC)[:, None] + o_d[None, :], mask=m, other=0.0)
    o_out = (o_row * n_heads + i_head) * D
    b_y = tl.load(p_out + o_out[:, None] + o_d[None, :], mask=m, other=0.0)
    # In float64: the order of a sum follows the layout, and so alignment and strides, unseen.
    b_delta = tl.sum(b_g.to(tl.float64) * b_y.to(tl.float64), 1)
    o_sum = i_head.to(tl.int64) * n_rows + o_row
    tl.store(p_delta + o_sum, b_delta.to(tl.float32), mask=m_row)
    if p_less is not None:
        b_part = tl.load(p_part + o_sum, mask=m_row, other=1.0)
        b_top = tl.load(p_top + o_sum, mask=m_row, other=0.0)
        b_part = tl.where(b_part == 0.0, 1.0, b_part)  # whose queries see nothing
        tl.store(p_less + o_sum, b_top - tl.log2(b_part), mask=m_row)


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "scale"], do_not_specialize_on_alignment=_UNALIGNED
)
def backward_kv_kernel(
    p_q, p_k, p_v, p_g, p_top, p_part, p_delta, p_dk, p_dv, p_starts, p_starts_k, p_padding,
    p_blocks, p_lengths,
    s_q_b: tl.int64, s_q_n: tl.int64, s_q_h: tl.int64,
    s_k_b: tl.int64, s_k_n: tl.int64, s_k_h: tl.int64,
    s_v_b: tl.int64, s_v_n: tl.int64, s_v_h: tl.int64,
    s_g_b: tl.int64, s_g_n: tl.int64, s_g_h: tl.int64,
    n_segments: tl.int32, n_rows: tl.int32, n_keys: tl.int32,
    n_length: tl.int32, n_length_k: tl.int32, n_tiles: tl.int32,
    n_heads: tl.int32, n_group: tl.int32, n_block: tl.int32, n_blocks: tl.int32,
    scale: tl.float32,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, VEC: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; either may be None. Grid: tiles of keys x KV heads (n_heads).

    Blocks of logits are [keys, queries].
    """
    i_tile, i_kv = tl.program_id(0), tl.program_id(1)
    i_segment, o_first_k, m, i_begin, n_next = _tile(
        p_starts_k, p_lengths, i_tile, n_segments, n_keys, n_length_k, n_tiles, BN, EVEN, CHECK
    )
    o_first, n = _segment(p_starts, None, i_segment, n_length, n_rows, CHECK)
    p_k = _head(p_k, p_starts, i_segment, o_first_k, i_kv, s_k_b, s_k_n, s_k_h, VEC)
    p_v = _head(p_v, p_starts, i_segment, o_first_k, i_kv, s_v_b, s_v_n, s_v_h, VEC)
    factor = scale * _LOG2E
    for i_key in range(i_begin, m, n_next):
        o_key = i_key + tl.arange(0, BN)
        m_key = o_key < m
        b_k = _rows(p_k, o_key, m_key, s_k_n, 0, D_1, D, VEC, False)
        b_v, b_k_2, b_v_2 = b_k, b_k, b_k
        b_dk, b_dk_2 = tl.zeros([BN, D_1], tl.float32), tl.zeros([BN, 16], tl.float32)
        b_dv, b_dv_2 = tl.zeros([BN, D_1], tl.float32), tl.zeros([BN, 16], tl.float32)
        if p_dk is not None:
            b_v = _rows(p_v, o_key, m_key, s_v_n, 0, D_1, D, VEC, False)
        if D_2 > 0:
            b_k_2 = _rows(p_k, o_key, m_key, s_k_n, D_1, D_2, D, VEC, False)
            b_dk_2 = tl.zeros([BN, D_2], tl.float32)
            b_dv_2 = tl.zeros([BN, D_2], tl.float32)
            if p_dk is not None:
                b_v_2 = _rows(p_v, o_key, m_key, s_v_n, D_1, D_2, D, VEC, False)
        # Queries that see any of the keys.
        i_first, i_end = n * 0, n
        b_hidden = m_key
        if CAUSAL:
            i_first = tl.maximum(i_key - (m - n), 0) // BM * BM
        if p_padding is not None:
            b_hidden = tl.load(p_padding + o_first + o_key, mask=m_key, other=1)
            if tl.min(b_hidden.to(tl.int32)) != 0:
                i_first, i_end = _seen(p_padding, o_first, n, 1024)
                i_first = i_first // BM * BM
        for i_of_group in range(0, n_group):
            i_head = i_kv * n_group + i_of_group
            p_q_h = _head(p_q, p_starts, i_segment, o_first, i_head, s_q_b, s_q_n, s_q_h, VEC)
            p_g_h = _head(p_g, p_starts, i_segment, o_first, i_head, s_g_b, s_g_n, s_g_h, VEC)
            o_sums = i_head.to(tl.int64) * n_rows + o_first
            for i_row in range(i_first, i_end, BM):
                o_row = i_row + tl.arange(0, BM)
                m_row = o_row < n
                b_q = _rows(p_q_h, o_row, m_row, s_q_n, 0, D_1, D, VEC, False)
                b_q_2 = b_q
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                if D_2 > 0:
                    b_q_2 = _rows(p_q_h, o_row, m_row, s_q_n, D_1, D_2, D, VEC, False)
                    b_s = _dot(b_k_2, tl.trans(b_q_2), b_s)
                b_top = tl.load(p_top + o_sums + o_row, mask=m_row, other=_INF)
                b_part = b_top
                if p_part is not None:
                    b_part = tl.load(p_part + o_sums + o_row, mask=m_row, other=0.0)
                b_s = tl.fma(b_s, factor, -b_top[None, :])
                if CAUSAL:
                    b_s = tl.where(o_key[:, None] <= (o_row + (m - n))[None, :], b_s, -_INF)
                if p_padding is not None:
                    b_h = tl.load(p_padding + o_first + o_row, mask=m_row, other=0)
                    b_s = tl.where((b_hidden[:, None] == 0) | (b_h[None, :] == 0), b_s, -_INF)
                if p_blocks is not None:
                    p_seen = p_blocks + o_first * n_blocks
                    b_seen = _blocks(p_seen, o_row, m_row, o_key, m_key, n_block, n_blocks)
                    b_s = tl.where(tl.trans(b_seen), b_s, -_INF)
                b_p = tl.exp2(b_s)
                if p_part is not None:
                    b_p *= b_part[None, :]
                b_g = _rows(p_g_h, o_row, m_row, s_g_n, 0, D_1, D, VEC, False)
                b_g_2 = b_g
                if D_2 > 0:
                    b_g_2 = _rows(p_g_h, o_row, m_row, s_g_n, D_1, D_2, D, VEC, False)
                if p_dv is not None:
                    b_w = b_p.to(b_g.dtype)
                    b_dv = _dot(b_w, b_g, b_dv)
                    if D_2 > 0:
                        b_dv_2 = _dot(b_w, b_g_2, b_dv_2)
                if p_dk is not None:
                    b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
                    if D_2 > 0:
                        b_dp = _dot(b_v_2, tl.trans(b_g_2), b_dp)
                    b_delta = tl.load(p_delta + o_sums + o_row, mask=m_row, other=0.0)
                    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
                    b_dk = _dot(b_ds, b_q, b_dk)
                    if D_2 > 0:
                        b_dk_2 = _dot(b_ds, b_q_2, b_dk_2)
        o_all = o_first_k + o_key
        if p_dk is not None:
            _store(p_dk, b_dk * scale, o_all, m_key, i_kv, n_heads, 0, D_1, D)
            if D_2 > 0:
                _store(p_dk, b_dk_2 * scale, o_all, m_key, i_kv, n_heads, D_1, D_2, D)
        if p_dv is not None:
            _store(p_dv, b_dv, o_all, m_key, i_kv, n_heads, 0, D_1, D)
            if D_2 > 0:
                _store(p_dv, b_dv_2, o_all, m_key, i_kv, n_heads, D_1, D_2, D)


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "scale"], do_not_specialize_on_alignment=_UNALIGNED
)
def backward_q_kernel(
    p_q, p_k, p_v, p_g, p_top, p_part, p_delta, p_dq, p_starts, p_starts_k, p_padding,
    p_blocks, p_lengths,
    s_q_b: tl.int64, s_q_n: tl.int64, s_q_h: tl.int64,
    s_k_b: tl.int64, s_k_n: tl.int64, s_k_h: tl.int64,
    s_v_b: tl.int64, s_v_n: tl.int64, s_v_h: tl.int64,
    s_g_b: tl.int64, s_g_n: tl.int64, s_g_h: tl.int64,
    n_segments: tl.int32, n_rows: tl.int32, n_keys: tl.int32,
    n_length: tl.int32, n_length_k: tl.int32, n_tiles: tl.int32,
    n_heads: tl.int32, n_group: tl.int32, n_block: tl.int32, n_blocks: tl.int32,
    scale: tl.float32,
    D: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, VEC: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Gradients of queries. Grid: tiles of queries x heads."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    if CAUSAL:
        i_tile = tl.num_programs(0) - 1 - i_tile
    i_segment, o_first, n, i_begin, n_next = _tile(
        p_starts, None, i_tile, n_segments, n_rows, n_length, n_tiles, BM, EVEN, CHECK
    )
    o_first_k, m = _segment(p_starts_k, p_lengths, i_segment, n_length_k, n_keys, CHECK)
    p_q = _head(p_q, p_starts, i_segment, o_first, i_head, s_q_b, s_q_n, s_q_h, VEC)
    p_g = _head(p_g, p_starts, i_segment, o_first, i_head, s_g_b, s_g_n, s_g_h, VEC)
    i_kv = i_head // n_group
    p_k = _head(p_k, p_starts, i_segment, o_first_k, i_kv, s_k_b, s_k_n, s_k_h, VEC)
    p_v = _head(p_v, p_starts, i_segment, o_first_k, i_kv, s_v_b, s_v_n, s_v_h, VEC)
    factor = scale * _LOG2E
    for i_row in range(i_begin, n, n_next):
        o_row = i_row + tl.arange(0, BM)
        m_row = o_row < n
        b_q = _rows(p_q, o_row, m_row, s_q_n, 0, D_1, D, VEC, False)
        b_g = _rows(p_g, o_row, m_row, s_g_n, 0, D_1, D, VEC, False)
        b_q_2, b_g_2 = b_q, b_g
        b_dq, b_dq_2 = tl.zeros([BM, D_1], tl.float32), tl.zeros([BM, 16], tl.float32)
        if D_2 > 0:
            b_q_2 = _rows(p_q, o_row, m_row, s_q_n, D_1, D_2, D, VEC, False)
            b_g_2 = _rows(p_g, o_row, m_row, s_g_n, D_1, D_2, D, VEC, False)
            b_dq_2 = tl.zeros([BM, D_2], tl.float32)
        o_all = o_first + o_row
        o_sums = i_head.to(tl.int64) * n_rows + o_first
        b_top = tl.load(p_top + o_sums + o_row, mask=m_row, other=_INF)
        b_part = b_top
        if p_part is not None:
            b_part = tl.load(p_part + o_sums + o_row, mask=m_row, other=0.0)
        b_delta = tl.load(p_delta + o_sums + o_row, mask=m_row, other=0.0)
        i_first, i_end = n * 0, m
        b_hidden = m_row
        if CAUSAL:
            i_end = tl.minimum(m, tl.minimum(i_row + BM, n) + (m - n))
        if p_padding is not None:
            b_hidden = tl.load(p_padding + o_all, mask=m_row, other=1)
            if tl.min(b_hidden.to(tl.int32)) != 0:
                i_first, i_end = _seen(p_padding, o_first, n, 1024)
                i_first = i_first // BN * BN
        for i_key in range(i_first, i_end, BN):
            o_key = i_key + tl.arange(0, BN)
            m_key = o_key < m
            b_k = _rows(p_k, o_key, m_key, s_k_n, 0, D_1, D, VEC, False)
            b_v = _rows(p_v, o_key, m_key, s_v_n, 0, D_1, D, VEC, False)
            b_k_2 = b_k
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
            if D_2 > 0:
                b_k_2 = _rows(p_k, o_key, m_key, s_k_n, D_1, D_2, D, VEC, False)
                b_v_2 = _rows(p_v, o_key, m_key, s_v_n, D_1, D_2, D, VEC, False)
                b_s = _dot(b_q_2, tl.trans(b_k_2), b_s)
                b_dp = _dot(b_g_2, tl.trans(b_v_2), b_dp)
            b_s = tl.fma(b_s, factor, -b_top[:, None])
            m_s = m_key[None, :]
            if CAUSAL:
                m_s = m_s & (o_key[None, :] <= (o_row + (m - n))[:, None])
            if p_padding is not None:
                b_h = tl.load(p_padding + o_first + o_key, mask=m_key, other=0)
                m_s = m_s & ((b_hidden[:, None] == 0) | (b_h[None, :] == 0))
            if p_blocks is not None:
                p_seen = p_blocks + o_first * n_blocks
                m_s = m_s & _blocks(p_seen, o_row, m_row, o_key, m_key, n_block, n_blocks)
            b_p = tl.exp2(tl.where(m_s, b_s, -_INF))
            if p_part is not None:
                b_p *= b_part[:, None]
            b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
            b_dq = _dot(b_ds, b_k, b_dq)
            if D_2 > 0:
                b_dq_2 = _dot(b_ds, b_k_2, b_dq_2)
        _store(p_dq, b_dq * scale, o_all, m_row, i_head, n_heads, 0, D_1, D)
        if D_2 > 0:
            _store(p_dq, b_dq_2 * scale, o_all, m_row, i_head, n_heads, D_1, D_2, D)


# Launchers.

CHECK = os.environ.get("VLMOPS_CHECK") == "1"
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
MAX_ROWS = 2**30  # programs count rows, and as far again, in 32 bits
_VECTOR = 8  # elements: 16 bytes of bfloat16


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = (forward_kernel, delta_kernel, backward_kv_kernel, backward_q_kernel)
    if INTERPRETED:
        return 0
    # What a device's entry holds first is the kernels by key.
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


class Tile(NamedTuple):
    """Queries and keys of a block, and options of a launch."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def split(dim: int) -> tuple[int, int]:
    """Channels of the two parts that products take, powers of two; 0: one part is less."""
    whole = max(int(triton.next_power_of_2(dim)), 16)
    first = whole // 2
    rest = max(int(triton.next_power_of_2(max(dim - first, 1))), 16)
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def forward_tile(dtype: torch.dtype, dim: int, longest: int, padding: bool) -> Tile:
    """Small ones for short segments; else what registers and shared memory hold. PREDICTED."""
    width, exact = sum(split(dim)), dtype == torch.float32
    if exact:
        tile = Tile(64, 32, 8, 1) if width <= 96 else Tile(32, 32, 8, 1)
        tile = tile if width <= 128 else Tile(16, 16, 8, 1)
    elif width <= 128:
        tile = Tile(128, 64 if width <= 64 else 32, 8, 1 if padding else 3)
    else:
        tile = Tile(64, 32, 8, 1)
    rows = 16 if longest <= 16 else 64
    if longest > 64 or rows >= tile.rows:
        return tile
    if exact:
        return Tile(rows, tile.keys, 4, 1)
    return Tile(rows, 64, 4, 2) if width <= 64 else Tile(rows, 32, 4, 3 if width <= 128 else 1)


def backward_kv_tile(dtype: torch.dtype, dim: int, padding: bool) -> Tile:
    """Few queries: products with all of a tile of keys hold them in registers. PREDICTED."""
    width = sum(split(dim))
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1) if width <= 96 else Tile(16, 32, 4, 1)
        return tile if width <= 128 else Tile(16, 16, 4, 1)
    if width <= 64:
        return Tile(32, 32, 4, 2)
    return Tile(32 if width <= 80 and not padding else 16, 64, 8, 1 if padding else 2)


def backward_q_tile(dtype: torch.dtype, dim: int, padding: bool) -> Tile:
    """PREDICTED."""
    width = sum(split(dim))
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if width <= 128 else Tile(16, 16, 4, 1)
    stages = 1 if padding else 2
    return Tile(64, 32, 4, stages) if width <= 128 else Tile(32, 32, 8, stages)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.packed_attention: backend 'triton': expected tensors on a GPU, since "
                "Triton compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _refuse(q: Tensor, k: Tensor) -> None:
    for name, t in (("q", q), ("k", k)):
        if math.prod(t.shape[:-2]) >= MAX_ROWS:
            raise RuntimeError(
                f"vlmops.packed_attention: backend 'triton': {name}: expected fewer than 2^30 "
                f"rows, which programs count in 32 bits, got shape {list(t.shape)}; use "
                "backend='cuda', or call with a part of the segments"
            )


def _readable(t: Tensor) -> Tensor:
    """A tensor whose channels are side by side; a copy if they are not."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _placed(starts: Tensor | None, q: Tensor) -> Tensor | None:
    """On q's device, one number after another."""
    return None if starts is None else starts.to(q.device, non_blocking=True).contiguous()


class Call:
    """What all kernels of a call are given."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, o: Options, *like_q: Tensor) -> None:
        self.tensors = [_readable(t) for t in (q, k, v, *like_q)]
        self.device, self.dtype, self.dim = q.device, q.dtype, q.shape[-1]
        self.heads, self.kv_heads = q.shape[-2], k.shape[-2]
        self.rows, self.keys = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
        packed = o.cu_seqlens is not None
        self.starts = _placed(o.cu_seqlens, q)
        self.starts_k = self.starts if o.cu_seqlens_k is None else _placed(o.cu_seqlens_k, q)
        self.padding, self.blocks = (
            None if t is None else t.contiguous().view(torch.uint8)
            for t in (o.padding, o.block_mask)
        )
        count = 0 if self.blocks is None else self.blocks.shape[-1]
        self.blocks_sizes = o.tokens_per_block, count
        self.key_lengths = _placed(o.key_lengths, q)
        self.lengths = (0, 0) if packed else (q.shape[1], k.shape[1])
        self.segments = q.shape[0] if self.starts is None else self.starts.shape[0] - 1
        # The longest of queries and of keys; 0 where it is not known.
        self.longest = self.lengths
        if packed:
            self.longest = (o.max_seqlen, 0 if o.cu_seqlens_k is not None else o.max_seqlen)
        self.scale = 1.0 / math.sqrt(self.dim) if o.scale is None else o.scale
        self.causal = o.causal
        strides = [_strides(t) for t in self.tensors]
        self.vector = _VECTOR if all(x % _VECTOR == 0 for s in strides for x in s) else 1
        self.strides = [[x // self.vector for x in s] for s in strides]

    def masked(self) -> bool:
        """Whether it takes a look which keys of a tile are seen."""
        return self.padding is not None or self.blocks is not None

    def typical(self) -> int:
        """Queries of the longest segment; twice the mean where it is not known."""
        return self.longest[0] or 2 * self.rows // max(self.segments, 1)

    def tiles(self, of_keys: bool, block: int) -> tuple[int, int]:
        """Tiles of all segments, and of each; the latter 0 where programs have to find theirs."""
        rows, longest = ((self.rows, self.keys)[of_keys], self.longest[of_keys])
        of_all, of_each = rows // block + self.segments, triton.cdiv(longest, block)
        if self.starts is None or (longest and self.segments * of_each <= of_all):
            return self.segments * of_each, max(of_each, 1)
        return of_all, 0

    def sizes(self, tiles: int, heads: int) -> list[int | float]:
        """The numbers of a kernel, in its order."""
        group = self.heads // max(self.kv_heads, 1)
        numbers = (self.segments, self.rows, self.keys, *self.lengths, max(tiles, 1), heads)
        return [*numbers, group, *self.blocks_sizes, self.scale]

    def constants(self, tile: Tile, even: bool) -> dict[str, Any]:
        """Compile-time arguments, and options of the launch."""
        first, rest = split(self.dim)
        return {
            "D": self.dim, "D_1": first, "D_2": rest, "VEC": self.vector,
            "CAUSAL": self.causal, "EVEN": even, "BM": tile.rows, "BN": tile.keys, "CHECK": CHECK,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip


def _strides(t: Tensor) -> list[int]:
    """Of batch, rows and heads."""
    kept = t if t.dim() == 4 else t[None]
    return [0 if n == 1 else s for n, s in zip(kept.shape[:3], kept.stride()[:3], strict=True)]


def _check(q: Tensor, k: Tensor, v: Tensor, o: Options, *of_backward: Tensor) -> None:
    torch.ops.vlmops.packed_attention_check(q, k, v, *o, *of_backward)


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``vlmops::packed_attention_triton``."""
    o = Options(*args)
    _check(q, k, v, o)
    _refuse(q, k)
    out = q.new_empty(q.shape)
    call = Call(q, k, v, o)
    statistics = q.new_empty(2, call.heads, call.rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    tile = forward_tile(call.dtype, call.dim, call.typical(), call.masked())
    tiles, of_each = call.tiles(False, tile.rows)
    _launch(
        forward_kernel,
        (tiles, call.heads),
        call.device,
        *call.tensors, out, *statistics, call.starts, call.starts_k, call.padding,
        call.blocks, call.key_lengths, *(x for s in call.strides for x in s),
        *call.sizes(of_each, call.heads),
        **call.constants(tile, of_each > 0), NEGATIVE=call.scale < 0, STAGES=tile.num_stages,
    )  # fmt: skip
    return out, statistics


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *args: Any,
    exact_q: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``vlmops::packed_attention_triton_backward``; exact_q: the gradient of q is float32."""
    o, needs = OP.parts(args)
    _check(q, k, v, o, grad, out, statistics)
    _refuse(q, k)
    dq, dk, dv = (
        t.new_empty(t.shape if needed else 0) for t, needed in zip((q, k, v), needs, strict=True)
    )
    if exact_q:
        dq = torch.empty_like(dq, dtype=torch.float32)
    if o.key_lengths is not None:  # kernels write no further
        dk.zero_()
        dv.zero_()
    call = Call(q, k, v, o, grad)
    tensors, (top, part) = call.tensors, statistics.contiguous()
    strides = [x for s in call.strides for x in s]
    # To 16 bits it makes no difference whether forward's two numbers become one.
    exact = call.dtype == torch.float32
    delta = torch.empty_like(top)
    less = None if exact else torch.empty_like(top)
    if delta.numel():
        block = max(4096 // split(call.dim)[0], 16)
        _launch(
            delta_kernel,
            (triton.cdiv(call.rows, block), call.heads),
            call.device,
            tensors[3], out.contiguous(), top, part, delta, less, *call.strides[3],
            call.rows, call.lengths[0] or call.rows, call.heads,
            D=call.dim, BD=max(triton.next_power_of_2(call.dim), 16), VEC=call.vector, BM=block,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    sums = (top, part, delta) if exact else (less, None, delta)
    placed = call.starts, call.starts_k, call.padding, call.blocks, call.key_lengths
    if dk.numel() or dv.numel():
        tile = backward_kv_tile(call.dtype, call.dim, call.masked())
        tiles, of_each = call.tiles(True, tile.keys)
        _launch(
            backward_kv_kernel,
            (tiles, call.kv_heads),
            call.device,
            *tensors, *sums, *(t if t.numel() else None for t in (dk, dv)), *placed,
            *strides, *call.sizes(of_each, call.kv_heads), **call.constants(tile, of_each > 0),
        )  # fmt: skip
    if dq.numel():
        tile = backward_q_tile(call.dtype, call.dim, call.masked())
        tiles, of_each = call.tiles(False, tile.rows)
        _launch(
            backward_q_kernel,
            (tiles, call.heads),
            call.device,
            *tensors, *sums, dq, *placed,
            *strides, *call.sizes(of_each, call.heads), **call.constants(tile, of_each > 0),
        )  # fmt: skip
    return dq, dk, dv
