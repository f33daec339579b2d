"""M-RoPE in Triton: kernels and launchers. What is computed stands in `vlmops.ops.mrope`.

Forward, backward and in place are one kernel (the adjoint turns by the opposite angle), the norm's
backward is a second one.

Bytes: q and k are read once and written once; ids, frequencies and weights are noise. Qwen2-VL-7B,
S = 4096, bfloat16: 4096 x (28 + 4) heads x 128 x 2 bytes x 2 = 67 MB. Floor: 15.6 us at the
4.3 TB/s that a copy reaches on an H200; measured there (bench/results/h200) 21.1 us, and 72.4 us
for S = 16384, 90 to 92 % of a copy of the same tensors. Decode takes 2.4 us in a CUDA graph and 122
us when called from Python. Backward of the norm reads x too, 1.5 times the bytes: 81 us for
Qwen3-VL-8B's 4096 tokens.

Threads: a program has one token, computes its R cosines and sines once, and walks over tiles of
heads of q, then of k, that are [heads, R] and hold 1024 pairs of channels: 8 of each half for each
of 128 threads, one 16-byte access in bfloat16. With few tokens (decode) a second grid dimension
gives every tile a program of its own. No size is part of the compile key, nor is any stride.

Angles: id x inv_freq rounds to float32, as the models were trained. It is reduced by the nearest
multiple of pi/2 in three float32 parts with fused multiply-adds. The first step is exact for
angles below 2^24: k x fl(pi/2) and the angle are both multiples of 2^-23, and so is their small
difference. `tl.sin` would bring libdevice's slow path with its stack frame, float64 is 64 times
slower than float32 on consumer GPUs.
"""

import ctypes
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FREQUENCIES = 1024
MAX_NORM_DIM = 2048
MAX_AXES = 16
MAX_ID = 2**24

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.


@triton.jit
def _sine(b_angle, b_quarters):
    """sin(angle + quarters x pi/2): sine for 0 quarters, cosine for 1."""
    b_turns = b_angle * 0.6366197723675814
    # Beyond 2^23 a float32 is an integer, and adding 1/2 would round it to the next but one.
    b_k = tl.where(tl.abs(b_turns) < 8388608.0, tl.floor(b_turns + 0.5), b_turns)
    # Rounded, k may be off by one from 2^22 on: what remains says so, and is formed anew.
    b_r = tl.fma(-b_k, -4.371138828673793e-08, tl.fma(-b_k, 1.5707963705062866, b_angle))
    b_k += tl.floor(b_r * 0.6366197723675814 + 0.5)
    b_r = tl.fma(-b_k, 1.5707963705062866, b_angle)
    b_r = tl.fma(-b_k, -4.371138828673793e-08, b_r)
    b_r = tl.fma(-b_k, -1.7151245100058819e-15, b_r)
    # Beyond 2^24 k has no last bit: bounded, if not right to all bits of a number that has none.
    b_more = tl.floor(b_r * 0.6366197723675814 + 0.5)
    b_r = tl.fma(-b_more, 1.5707963705062866, b_r)
    b_r = tl.fma(-b_more, -4.371138828673793e-08, b_r)
    b_quarters += (b_k - 4.0 * tl.floor(b_k * 0.25) + b_more).to(tl.int32)
    b_z = b_r * b_r
    b_p = tl.fma(b_z, -1.9515295891e-4, 8.3321608736e-3)
    b_p = tl.fma(b_z, b_p, -1.6666654611e-1)
    b_s = tl.fma(b_z * b_r, b_p, b_r)
    b_p = tl.fma(b_z, 2.443315711809948e-5, -1.388731625493765e-3)
    b_p = tl.fma(b_z, b_p, 4.166664568298827e-2)
    b_c = tl.fma(b_z * b_z, b_p, tl.fma(b_z, -0.5, 1.0))
    b_sine = tl.where((b_quarters & 1) != 0, b_c, b_s)
    return tl.where((b_quarters & 2) != 0, -b_sine, b_sine)


@triton.jit
def _turn(
    p_ids, p_freq, p_axis, o_id, s_id_axis, s_freq, s_axis,
    cos_scale, sin_scale,
    R: tl.constexpr, A: tl.constexpr, BR: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [BR] of one token."""
    # One tensor of both, so that with R = 64 each of 128 threads computes one of them. It has 128
    # elements at least: smaller ones the compiler computes again in every thread that needs an
    # element, up to 16 times over, rather than hand them around through shared memory.
    n_sines: tl.constexpr = 2 * BR if 2 * BR > 128 else 128
    o_w = tl.arange(0, n_sines)
    o_r = (o_w // 2) % BR
    b_is_cos = (o_w + 1) % 2
    m_r = o_r < R
    b_axis = tl.load(p_axis + o_r * s_axis, mask=m_r, other=0).to(tl.int64)
    if CHECK:
        tl.device_assert((b_axis >= 0) & (b_axis < A), "vlmops.mrope: freq_axis: names no axis")
    # A value that nobody may read back must not lead out of bounds either.
    b_axis = tl.minimum(tl.maximum(b_axis, 0), A - 1)
    b_id = tl.load(p_ids + o_id + b_axis * s_id_axis, mask=m_r, other=0).to(tl.int64)
    if CHECK:
        tl.device_assert((b_id >= -16777216) & (b_id <= 16777216),
                         "vlmops.mrope: position_ids: beyond +-2^24")  # fmt: skip
    b_id = tl.minimum(tl.maximum(b_id, -16777216), 16777216)
    b_freq = tl.load(p_freq + o_r * s_freq, mask=m_r, other=0.0).to(tl.float32)
    b_sine = _sine(b_id.to(tl.float32) * b_freq, b_is_cos)
    b_sine *= tl.where(b_is_cos != 0, cos_scale, sin_scale)
    if n_sines > 2 * BR:  # the first 2 BR of them
        b_sine = tl.where(o_w < 2 * BR, b_sine, 0.0)
        b_sine = tl.sum(tl.reshape(b_sine, [n_sines // (2 * BR), 2 * BR]), axis=0)
    b_cos, b_sin = tl.split(tl.reshape(b_sine, [BR, 2]))
    return b_cos, b_sin


@triton.jit
def _sum(b_x, axis: tl.constexpr):
    """In float64: the order of a sum follows the layout, and so alignment and strides, unseen."""
    return tl.sum(b_x.to(tl.float64), axis=axis).to(tl.float32)


@triton.jit
def _load_pairs(
    p, s_c, m_h,
    R: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The two channels of every pair, each [BH, BR] in float32. p is [BH] pointers, one a head."""
    if PAIRS:
        o_c = tl.arange(0, 2 * BR)
        m = m_h[:, None] & (o_c < 2 * R)[None, :]
        if not UNIT:
            o_c = o_c * s_c
        b_x = tl.load(p[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_a, b_b = tl.split(tl.reshape(b_x, [BH, BR, 2]))
    else:
        o_c = tl.arange(0, BR)
        m = m_h[:, None] & (o_c < R)[None, :]
        if UNIT:
            b_a = tl.load(p[:, None] + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            b_b = tl.load(p[:, None] + (o_c + R)[None, :], mask=m, other=0.0).to(tl.float32)
        else:
            b_a = tl.load(p[:, None] + (o_c * s_c)[None, :], mask=m, other=0.0).to(tl.float32)
            b_b = tl.load(p[:, None] + ((o_c + R) * s_c)[None, :], mask=m, other=0.0).to(tl.float32)
    return b_a, b_b


@triton.jit
def _store_pairs(
    p, s_c, m_h, b_a, b_b,
    R: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = p.dtype.element_ty
    if PAIRS:
        o_c = tl.arange(0, 2 * BR)
        m = m_h[:, None] & (o_c < 2 * R)[None, :]
        if not UNIT:
            o_c = o_c * s_c
        b_x = tl.reshape(tl.join(b_a, b_b), [BH, 2 * BR])
        tl.store(p[:, None] + o_c[None, :], b_x.to(dtype), mask=m)
    else:
        o_c = tl.arange(0, BR)
        m = m_h[:, None] & (o_c < R)[None, :]
        if UNIT:
            tl.store(p[:, None] + o_c[None, :], b_a.to(dtype), mask=m)
            tl.store(p[:, None] + (o_c + R)[None, :], b_b.to(dtype), mask=m)
        else:
            tl.store(p[:, None] + (o_c * s_c)[None, :], b_a.to(dtype), mask=m)
            tl.store(p[:, None] + ((o_c + R) * s_c)[None, :], b_b.to(dtype), mask=m)


@triton.jit
def _rest(
    p, s_c, m_h, D: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, BREST: tl.constexpr
):  # fmt: skip
    """Pointers and mask of the channels that are not rotated, [BH, BREST]."""
    o_c = 2 * R + tl.arange(0, BREST)
    m = m_h[:, None] & (o_c < D)[None, :]
    if not UNIT:
        o_c = o_c * s_c
    return p[:, None] + o_c[None, :], m


@triton.jit
def _load_weight(
    p_w, s_w, offset,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, BR: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """Weights of the first and second channels of the pairs [BR], and of the rest [BREST]."""
    o_r = tl.arange(0, BR)
    if PAIRS:
        o_a = 2 * o_r
        o_b = o_a + 1
    else:
        o_a = o_r
        o_b = o_a + R
    o_c = 2 * R + tl.arange(0, BREST)
    b_a = tl.load(p_w + o_a * s_w, mask=o_r < R, other=0.0).to(tl.float32) + offset
    b_b = tl.load(p_w + o_b * s_w, mask=o_r < R, other=0.0).to(tl.float32) + offset
    b_c = tl.load(p_w + o_c * s_w, mask=o_c < D, other=0.0).to(tl.float32) + offset
    return b_a, b_b, b_c


@triton.jit
def _rotate_rows(
    p_x, p_y, p_w, s_x_h, s_x_c, s_y_h, s_y_c, s_w,
    i_first, n_programs, n_heads, eps, offset, b_cos, b_sin,
    D: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr,
    COPY: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
    BH: tl.constexpr, BR: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """Tiles i_first, i_first + n_programs, .. of one token's heads."""
    if NORM:
        b_wa, b_wb, b_wc = _load_weight(p_w, s_w, offset, D, R, PAIRS, BR, BREST)
    for i_h in range(i_first * BH, n_heads, n_programs * BH):
        o_h = i_h + tl.arange(0, BH)
        m_h = o_h < n_heads
        p_src = p_x + o_h.to(tl.int64) * (s_x_h * VEC)
        p_dst = p_y + o_h.to(tl.int64) * (s_y_h * VEC)
        b_a, b_b = _load_pairs(p_src, s_x_c, m_h, R, PAIRS, UNIT, BH, BR)
        if NORM:
            b_square = _sum(b_a * b_a + b_b * b_b, axis=1)
            if 2 * R < D:
                p_rest, m_rest = _rest(p_src, s_x_c, m_h, D, R, UNIT, BREST)
                b_c = tl.load(p_rest, mask=m_rest, other=0.0).to(tl.float32)
                b_square += _sum(b_c * b_c, axis=1)
            b_scale = 1.0 / tl.sqrt_rn(b_square / D + eps)
            b_a = b_a * b_scale[:, None] * b_wa[None, :]
            b_b = b_b * b_scale[:, None] * b_wb[None, :]
            if 2 * R < D:
                b_c = b_c * b_scale[:, None] * b_wc[None, :]
                p_rest, m_rest = _rest(p_dst, s_y_c, m_h, D, R, UNIT, BREST)
                tl.store(p_rest, b_c.to(p_y.dtype.element_ty), mask=m_rest)
        elif COPY:
            p_rest, m_rest = _rest(p_src, s_x_c, m_h, D, R, UNIT, BREST)
            b_c = tl.load(p_rest, mask=m_rest, other=0.0)
            p_rest, m_rest = _rest(p_dst, s_y_c, m_h, D, R, UNIT, BREST)
            tl.store(p_rest, b_c, mask=m_rest)
        b_y = b_a * b_cos[None, :] - b_b * b_sin[None, :]
        b_b = b_b * b_cos[None, :] + b_a * b_sin[None, :]
        _store_pairs(p_dst, s_y_c, m_h, b_y, b_b, R, PAIRS, UNIT, BH, BR)


# What would otherwise make a new compile key: sizes, and ids that start anywhere (decode).
_SIZES = ["n_tokens", "n_q", "n_k", "n_all"]
_Q = [f"s_{x}_{d}" for x in ("q", "qo") for d in "bthc"]
_K = [f"s_{x}_{d}" for x in ("k", "ko") for d in "bthc"]
_OTHER = ["s_id_a", "s_id_b", "s_id_t", "s_freq", "s_axis", "s_qw", "s_kw"]
_UNALIGNED = ["p_ids", "p_freq", "p_axis", "p_qw", "p_kw"]


@triton.jit(
    do_not_specialize=[*_SIZES, *_Q, *_K, *_OTHER], do_not_specialize_on_alignment=_UNALIGNED
)
def mrope_kernel(
    p_q, p_qo, p_k, p_ko, p_ids, p_freq, p_axis, p_qw, p_kw,
    # In units of VEC elements, but for the channels'.
    s_q_b: tl.int64, s_q_t: tl.int64, s_q_h: tl.int64, s_q_c: tl.int64,
    s_qo_b: tl.int64, s_qo_t: tl.int64, s_qo_h: tl.int64, s_qo_c: tl.int64,
    s_k_b: tl.int64, s_k_t: tl.int64, s_k_h: tl.int64, s_k_c: tl.int64,
    s_ko_b: tl.int64, s_ko_t: tl.int64, s_ko_h: tl.int64, s_ko_c: tl.int64,
    s_id_a: tl.int64, s_id_b: tl.int64, s_id_t: tl.int64,
    s_freq: tl.int64, s_axis: tl.int64, s_qw: tl.int64, s_kw: tl.int64,
    n_tokens: tl.int32, n_q: tl.int32, n_k: tl.int32,
    cos_scale: tl.float32, sin_scale: tl.float32, eps: tl.float32, offset: tl.float32,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, PAIRS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, COPY: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, BHQ: tl.constexpr, BHK: tl.constexpr, BR: tl.constexpr,
    BREST: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rotates q and k, normalised if asked to: grid (tokens, shares of the tiles of heads)."""
    i_token, i_part, n_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_b, i_t = (i_token // n_tokens).to(tl.int64), (i_token % n_tokens).to(tl.int64)
    b_cos, b_sin = _turn(
        p_ids, p_freq, p_axis, i_b * s_id_b + i_t * s_id_t, s_id_a, s_freq, s_axis,
        cos_scale, sin_scale, R, A, BR, CHECK,
    )  # fmt: skip
    _rotate_rows(
        p_q + (i_b * s_q_b + i_t * s_q_t) * VEC, p_qo + (i_b * s_qo_b + i_t * s_qo_t) * VEC, p_qw,
        s_q_h, s_q_c, s_qo_h, s_qo_c, s_qw,
        i_part, n_parts, n_q, eps, offset, b_cos, b_sin,
        D, R, PAIRS, Q_NORM, COPY, UNIT, VEC, BHQ, BR, BREST,
    )  # fmt: skip
    # k's tiles follow q's in the count.
    i_part = (i_part + n_parts - tl.cdiv(n_q, BHQ) % n_parts) % n_parts
    _rotate_rows(
        p_k + (i_b * s_k_b + i_t * s_k_t) * VEC, p_ko + (i_b * s_ko_b + i_t * s_ko_t) * VEC, p_kw,
        s_k_h, s_k_c, s_ko_h, s_ko_c, s_kw,
        i_part, n_parts, n_k, eps, offset, b_cos, b_sin,
        D, R, PAIRS, K_NORM, COPY, UNIT, VEC, BHK, BR, BREST,
    )  # fmt: skip


@triton.jit
def _norm_backward_rows(
    p_g, p_x, p_y, p_w, p_ids, p_freq, p_axis, p_sum,
    s_g_b, s_g_t, s_g_h, s_g_c, s_x_b, s_x_t, s_x_h, s_x_c, s_y_b, s_y_t, s_y_h, s_y_c,
    s_id_a, s_id_b, s_id_t, s_freq, s_axis, s_w,
    n_tokens, n_all, n_heads, cos_scale, sin_scale, eps, offset,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr, GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BREST: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    if NORM:
        b_wa, b_wb, b_wc = _load_weight(p_w, s_w, offset, D, R, PAIRS, BR, BREST)
        b_sa = tl.zeros([BH, BR], tl.float32)
        b_sb = tl.zeros([BH, BR], tl.float32)
        b_sc = tl.zeros([BH, BREST], tl.float32)
    dtype: tl.constexpr = p_y.dtype.element_ty
    for i_token in range(tl.program_id(0), n_all, tl.num_programs(0)):
        i_b, i_t = (i_token // n_tokens).to(tl.int64), (i_token % n_tokens).to(tl.int64)
        b_cos, b_sin = _turn(
            p_ids, p_freq, p_axis, i_b * s_id_b + i_t * s_id_t, s_id_a, s_freq, s_axis,
            cos_scale, sin_scale, R, A, BR, CHECK,
        )  # fmt: skip
        for i_h in range(0, n_heads, BH):
            o_h = i_h + tl.arange(0, BH)
            m_h = o_h < n_heads
            o_h = o_h.to(tl.int64)
            p_grad = p_g + (i_b * s_g_b + i_t * s_g_t + o_h * s_g_h) * VEC
            p_in = p_x + (i_b * s_x_b + i_t * s_x_t + o_h * s_x_h) * VEC
            p_out = p_y + (i_b * s_y_b + i_t * s_y_t + o_h * s_y_h) * VEC
            b_ga, b_gb = _load_pairs(p_grad, s_g_c, m_h, R, PAIRS, UNIT, BH, BR)
            b_a = b_ga * b_cos[None, :] - b_gb * b_sin[None, :]
            b_b = b_gb * b_cos[None, :] + b_ga * b_sin[None, :]
            if 2 * R < D:
                p_rest, m_rest = _rest(p_grad, s_g_c, m_h, D, R, UNIT, BREST)
                b_c = tl.load(p_rest, mask=m_rest, other=0.0).to(tl.float32)
            if NORM:
                b_xa, b_xb = _load_pairs(p_in, s_x_c, m_h, R, PAIRS, UNIT, BH, BR)
                b_square = _sum(b_xa * b_xa + b_xb * b_xb, axis=1)
                if 2 * R < D:
                    p_rest, m_rest = _rest(p_in, s_x_c, m_h, D, R, UNIT, BREST)
                    b_xc = tl.load(p_rest, mask=m_rest, other=0.0).to(tl.float32)
                    b_square += _sum(b_xc * b_xc, axis=1)
                b_scale = (1.0 / tl.sqrt_rn(b_square / D + eps))[:, None]
                b_xa *= b_scale
                b_xb *= b_scale
                if WEIGHT_GRAD:
                    b_sa += b_a * b_xa
                    b_sb += b_b * b_xb
                b_a *= b_wa[None, :]
                b_b *= b_wb[None, :]
                b_mean = _sum(b_a * b_xa + b_b * b_xb, axis=1)
                if 2 * R < D:
                    b_xc *= b_scale
                    if WEIGHT_GRAD:
                        b_sc += b_c * b_xc
                    b_c *= b_wc[None, :]
                    b_mean += _sum(b_c * b_xc, axis=1)
                b_mean = (b_mean / D)[:, None]
                b_a = b_scale * (b_a - b_xa * b_mean)
                b_b = b_scale * (b_b - b_xb * b_mean)
                if 2 * R < D:
                    b_c = b_scale * (b_c - b_xc * b_mean)
            if GRAD:
                _store_pairs(p_out, s_y_c, m_h, b_a, b_b, R, PAIRS, UNIT, BH, BR)
                if 2 * R < D:
                    p_rest, m_rest = _rest(p_out, s_y_c, m_h, D, R, UNIT, BREST)
                    tl.store(p_rest, b_c.to(dtype), mask=m_rest)
    if NORM and WEIGHT_GRAD:
        p_sum += tl.program_id(0).to(tl.int64) * D
        o_r = tl.arange(0, BR)
        if PAIRS:
            o_a = 2 * o_r
            o_b = o_a + 1
        else:
            o_a = o_r
            o_b = o_a + R
        o_c = 2 * R + tl.arange(0, BREST)
        tl.store(p_sum + o_a, _sum(b_sa, axis=0), mask=o_r < R)
        tl.store(p_sum + o_b, _sum(b_sb, axis=0), mask=o_r < R)
        tl.store(p_sum + o_c, _sum(b_sc, axis=0), mask=o_c < D)


_X = [f"s_{x}_{d}" for x in ("qx", "kx") for d in "bthc"]


@triton.jit(
    do_not_specialize=[*_SIZES, *_Q, *_K, *_X, *_OTHER], do_not_specialize_on_alignment=_UNALIGNED
)
def mrope_norm_backward_kernel(
    p_q, p_qx, p_qo, p_k, p_kx, p_ko, p_ids, p_freq, p_axis, p_qw, p_kw, p_q_sum, p_k_sum,
    s_q_b: tl.int64, s_q_t: tl.int64, s_q_h: tl.int64, s_q_c: tl.int64,
    s_qx_b: tl.int64, s_qx_t: tl.int64, s_qx_h: tl.int64, s_qx_c: tl.int64,
    s_qo_b: tl.int64, s_qo_t: tl.int64, s_qo_h: tl.int64, s_qo_c: tl.int64,
    s_k_b: tl.int64, s_k_t: tl.int64, s_k_h: tl.int64, s_k_c: tl.int64,
    s_kx_b: tl.int64, s_kx_t: tl.int64, s_kx_h: tl.int64, s_kx_c: tl.int64,
    s_ko_b: tl.int64, s_ko_t: tl.int64, s_ko_h: tl.int64, s_ko_c: tl.int64,
    s_id_a: tl.int64, s_id_b: tl.int64, s_id_t: tl.int64,
    s_freq: tl.int64, s_axis: tl.int64, s_qw: tl.int64, s_kw: tl.int64,
    n_tokens: tl.int32, n_all: tl.int32, n_q: tl.int32, n_k: tl.int32,
    cos_scale: tl.float32, sin_scale: tl.float32, eps: tl.float32, offset: tl.float32,
    D: tl.constexpr, R: tl.constexpr, A: tl.constexpr, PAIRS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_GRAD: tl.constexpr, K_GRAD: tl.constexpr,
    QW_GRAD: tl.constexpr, KW_GRAD: tl.constexpr, UNIT: tl.constexpr,
    VEC: tl.constexpr, BHQ: tl.constexpr, BHK: tl.constexpr, BR: tl.constexpr,
    BREST: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Gradients where there is a norm: grid (programs, 2), q's and k's.

    A program walks over every n-th token, so that its sums of the weights' gradients stay in
    registers and few are left to add up.
    """
    if tl.program_id(1) == 0:
        _norm_backward_rows(
            p_q, p_qx, p_qo, p_qw, p_ids, p_freq, p_axis, p_q_sum,
            s_q_b, s_q_t, s_q_h, s_q_c, s_qx_b, s_qx_t, s_qx_h, s_qx_c,
            s_qo_b, s_qo_t, s_qo_h, s_qo_c, s_id_a, s_id_b, s_id_t, s_freq, s_axis, s_qw,
            n_tokens, n_all, n_q, cos_scale, sin_scale, eps, offset,
            D, R, A, PAIRS, Q_NORM, Q_GRAD, QW_GRAD, UNIT, VEC, BHQ, BR, BREST, CHECK,
        )  # fmt: skip
    else:
        _norm_backward_rows(
            p_k, p_kx, p_ko, p_kw, p_ids, p_freq, p_axis, p_k_sum,
            s_k_b, s_k_t, s_k_h, s_k_c, s_kx_b, s_kx_t, s_kx_h, s_kx_c,
            s_ko_b, s_ko_t, s_ko_h, s_ko_c, s_id_a, s_id_b, s_id_t, s_freq, s_axis, s_kw,
            n_tokens, n_all, n_k, cos_scale, sin_scale, eps, offset,
            D, R, A, PAIRS, K_NORM, K_GRAD, KW_GRAD, UNIT, VEC, BHK, BR, BREST, CHECK,
        )  # fmt: skip


# Checks, in the order and the words of csrc/ops/mrope/mrope.cpp.


class _Argument(NamedTuple):
    name: str
    tensor: Tensor


def _fail(op: str, name: str, problem: str) -> None:
    raise RuntimeError(f"vlmops.{op}: {name}: {problem}")


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _floating(op: str, a: _Argument) -> None:
    if a.tensor.dtype not in _FLOATS:
        _fail(op, a.name, f"expected dtype float32, bfloat16 or float16, got {_dtype(a.tensor)}")


def _integer(op: str, a: _Argument) -> None:
    if a.tensor.dtype not in _INTEGERS:
        _fail(
            op,
            a.name,
            "expected an integer dtype (int64, int32, int16, int8, uint8), got " + _dtype(a.tensor),
        )


def _on(op: str, a: _Argument, q: _Argument) -> None:
    if a.tensor.device != q.tensor.device:
        _fail(
            op, a.name, f"expected on {q.tensor.device}, where {q.name} is, got {a.tensor.device}"
        )


def _same_dtype(op: str, a: _Argument, other: _Argument, meaning: str) -> None:
    if a.tensor.dtype != other.tensor.dtype:
        expected, got = _dtype(other.tensor), _dtype(a.tensor)
        _fail(op, a.name, f"expected dtype {expected}, that of {meaning}, got {got}")


def _shape(op: str, a: _Argument, expected: Sequence[int], meaning: str) -> None:
    if list(a.tensor.shape) != list(expected):
        _fail(
            op,
            a.name,
            f"expected shape {list(expected)}, that is {meaning}, got {list(a.tensor.shape)}",
        )


def _check(
    op: str,
    q: _Argument,
    k: _Argument,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str,
    head_axis: int,
    norm_eps: float,
) -> None:
    """Everything but weights and memory. Values of ids and axes are read on the CPU only."""
    ids, frequencies = _Argument("position_ids", position_ids), _Argument("inv_freq", inv_freq)
    axes = _Argument("freq_axis", freq_axis)
    _floating(op, q)
    _same_dtype(op, k, q, q.name)
    for a in (k, ids, frequencies, axes):
        _on(op, a, q)
    shape = list(q.tensor.shape)
    rank = len(shape)
    if rank not in (3, 4):
        _fail(
            op,
            q.name,
            "expected [B, H, S, D] (head_axis=1), [B, S, H, D] (head_axis=2) or [N, H, D], got "
            f"shape {shape}",
        )
    if head_axis != 1 and not (head_axis == 2 and rank == 4):
        which = "1 for [B, H, S, D] or 2 for [B, S, H, D]" if rank == 4 else "1 for [N, H, D]"
        _fail(op, "head_axis", f"expected {which}, got {head_axis}")
    expected = list(shape)
    if k.tensor.dim() == rank:
        expected[head_axis] = k.tensor.shape[head_axis]
    _shape(op, k, expected, "that of q but for the number of heads")
    batch = shape[0] if rank == 4 else 1
    tokens = shape[3 - head_axis] if rank == 4 else shape[0]
    if shape[-1] % 2:
        _fail(op, q.name, f"expected an even head_dim, got shape {shape}")
    if inv_freq.dim() != 1:
        _fail(op, "inv_freq", f"expected shape [R], got {list(inv_freq.shape)}")
    r = inv_freq.shape[0]
    if 2 * r > shape[-1]:
        _fail(
            op,
            "inv_freq",
            f"expected at most head_dim / 2 = {shape[-1] // 2} frequencies, got {r}",
        )
    if r > MAX_FREQUENCIES:
        _fail(op, "inv_freq", f"expected at most {MAX_FREQUENCIES} frequencies, got {r}")
    _shape(op, axes, [r], "[R] like inv_freq")
    _integer(op, ids)
    if position_ids.dim() != rank - 1:
        form = "[A, B, S]" if rank == 4 else "[A, N]"
        _fail(
            op,
            ids.name,
            f"expected shape {form} for q of shape {shape}, got {list(position_ids.shape)}",
        )
    n_axes = position_ids.shape[0]
    if not 1 <= n_axes <= MAX_AXES:
        _fail(
            op,
            ids.name,
            f"expected 1 to {MAX_AXES} axes in its first dimension, got shape "
            f"{list(position_ids.shape)}",
        )
    _shape(
        op,
        ids,
        [n_axes, batch, tokens] if rank == 4 else [n_axes, tokens],
        f"[A, {'B, S' if rank == 4 else 'N'}] with q's "
        + ("batch and length" if rank == 4 else "length"),
    )
    if batch * tokens >= 2**31:
        _fail(
            op,
            q.name,
            f"expected fewer than 2^31 tokens, a launch of Triton's holds no more, got shape "
            f"{shape}",
        )
    if rotation not in ("half", "pairs"):
        _fail(op, "rotation", f"expected 'half' or 'pairs', got '{rotation}'")
    eps = ctypes.c_float(norm_eps).value
    if not (eps > 0 and math.isfinite(eps)):
        _fail(op, "norm_eps", f"expected a positive, finite float32 number, got {norm_eps:g}")
    if not inv_freq.dtype.is_floating_point:
        _fail(op, "inv_freq", f"expected a floating dtype, got {_dtype(inv_freq)}")
    _integer(op, axes)
    if position_ids.is_cpu:
        _check_values(op, position_ids, freq_axis)


def _check_values(op: str, position_ids: Tensor, freq_axis: Tensor) -> None:
    """Through numpy, which the interpreter brings: torch's own ways are those of a host sync."""
    ids, axes = position_ids.numpy(), freq_axis.numpy().astype("int64")
    n = ids.shape[0]
    for j in ((axes < 0) | (axes >= n)).nonzero()[0][:1]:
        _fail(
            op,
            "freq_axis",
            f"expected axes in [0, {n}), as position_ids has {n}, got {axes[j]} at index {j}",
        )
    if ids.size == 0:
        return
    ids = ids.astype("int64").reshape(n, -1, ids.shape[-1])
    for axis, b, token in zip(*((ids < -MAX_ID) | (ids > MAX_ID)).nonzero(), strict=True):
        _fail(
            op,
            "position_ids",
            "expected ids within +-2^24, the integers that float32 holds, got "
            f"{ids[axis, b, token]} at axis {axis}, batch {b}, token {token}",
        )


def _check_weight(op: str, q: _Argument, name: str, weight: Tensor | None) -> None:
    if weight is None:
        return
    a = _Argument(name, weight)
    _floating(op, a)
    _on(op, a, q)
    d = q.tensor.shape[-1]
    _shape(op, a, [d], "[D], one weight for each channel of a head")
    if d > MAX_NORM_DIM:
        _fail(op, name, f"expected at most {MAX_NORM_DIM} channels, got {d}")


def _check_no_internal_overlap(op: str, a: _Argument) -> None:
    reach = 0  # largest offset that the dimensions so far can make
    if a.tensor.numel() == 0:
        return
    sizes = zip(a.tensor.stride(), a.tensor.shape, strict=True)
    for stride, size in sorted((s, n) for s, n in sizes if n > 1):
        if stride <= reach:
            _fail(
                op,
                a.name,
                "expected a tensor whose elements do not share memory, since it is written in "
                f"place, got shape {list(a.tensor.shape)} with strides {list(a.tensor.stride())}; "
                "clone it first",
            )
        reach += stride * (size - 1)


def _disjoint(first: Tensor, second: Tensor, distance: int) -> bool:
    """Whether two tensors provably touch no element both; ``distance`` elements apart."""
    rows = list(zip(first.shape, second.shape, first.stride(), second.stride(), strict=True))
    if distance > sum((n - 1) * stride for n, _, stride, _ in rows):
        return True  # one after the other
    if any(n > 1 and m > 1 and s != t for n, m, s, t in rows):
        return False
    dims = sorted((s if n > 1 else t, n - 1, m - 1) for n, m, s, t in rows if n > 1 or m > 1)
    # Slices of one tensor, as of a fused qkv: the second fits between the first's end and its next
    # repetition, for the dimensions below some stride.
    first_reach = second_reach = 0
    for stride, n, m in dims:
        if distance > first_reach and distance + second_reach < stride:
            return True
        first_reach += stride * n
        second_reach += stride * m
    return False


def _check_no_overlap(op: str, q: _Argument, k: _Argument) -> None:
    if q.tensor.numel() == 0 or k.tensor.numel() == 0:
        return
    distance, odd = divmod(k.tensor.data_ptr() - q.tensor.data_ptr(), q.tensor.element_size())
    if distance >= 0:
        apart = _disjoint(q.tensor, k.tensor, distance)
    else:
        apart = _disjoint(k.tensor, q.tensor, -distance)
    if odd or not apart:
        _fail(
            op,
            k.name,
            f"expected memory of its own, since {q.name} and {k.name} are written in place, got "
            f"one that may overlap {q.name}; clone it first",
        )


# Launchers.

CHECK = os.environ.get("VLMOPS_CHECK") == "1"
INTERPRETED = not isinstance(mrope_kernel, triton.JITFunction)
_VECTOR = 8  # elements: 16 bytes of bfloat16
_TILE = 1024  # pairs of channels, 8 a thread
_BACKWARD_PROGRAMS = 1024  # rows of partial sums: the result must not depend on the device


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = () if INTERPRETED else (mrope_kernel, mrope_norm_backward_kernel)
    # What a device's entry holds first is the kernels by key.
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


class Rows(NamedTuple):
    """One of q, k, its output and what else has its shape: strides as the kernel wants them."""

    tensors: tuple[Tensor, ...]
    heads: int
    strides: list[list[int]]  # batch, token, head, channel


def _rows(head_axis: int, *tensors: Tensor, heads: int | None = None) -> Rows:
    packed = tensors[0].dim() == 3
    order = (None, 0, 1, 2) if packed else (0, 3 - head_axis, head_axis, 3)

    def stride(t: Tensor, dim: int | None) -> int:
        return 0 if dim is None or t.shape[dim] <= 1 else t.stride(dim)

    strides = [[stride(t, dim) for dim in order] for t in tensors]
    n = tensors[0].shape[head_axis] if heads is None else heads
    return Rows(tensors, n, strides)


def _arguments(
    q: Rows, k: Rows, position_ids: Tensor, inv_freq: Tensor, rotation: str
) -> tuple[list[int], dict[str, Any]]:
    """Strides in units of VEC, and the compile-time arguments that both kernels share."""
    used = [s for rows in (q, k) if rows.heads for s in rows.strides]
    vector = _VECTOR if all(x % _VECTOR == 0 for s in used for x in s[:3]) else 1
    strides = [
        x for rows in (q, k) for s in rows.strides for x in (*(x // vector for x in s[:3]), s[3])
    ]
    d, r = q.tensors[0].shape[-1], inv_freq.shape[0]
    width = max(triton.next_power_of_2(d) // 2, 1)

    def tile(heads: int) -> int:
        return int(min(max(_TILE // width, 1), triton.next_power_of_2(max(heads, 1))))

    constants = {
        "D": d,
        "R": r,
        "A": position_ids.shape[0],
        "PAIRS": rotation == "pairs",
        "UNIT": all(s[3] == 1 for s in used),
        "VEC": vector,
        "BHQ": tile(q.heads),
        "BHK": tile(k.heads),
        "BR": triton.next_power_of_2(max(r, 1)),
        "BREST": triton.next_power_of_2(max(d - 2 * r, 1)),
        "CHECK": CHECK,
    }
    return strides, constants


def _positions(position_ids: Tensor, *vectors: Tensor | None) -> list[int]:
    batch = position_ids.stride(1) if position_ids.dim() == 3 else 0
    ids = [position_ids.stride(0), batch, position_ids.stride(-1)]
    return ids + [0 if v is None else v.stride(0) for v in vectors]


def _tokens(t: Tensor, head_axis: int) -> tuple[int, int]:
    """Tokens of a batch, and of all."""
    tokens = t.shape[3 - head_axis] if t.dim() == 4 else t.shape[0]
    return tokens, tokens * (t.shape[0] if t.dim() == 4 else 1)


def _launch(
    kernel: Any, grid: tuple[int, int], device: torch.device, *args: Any, **constants: Any
) -> None:
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.mrope: backend 'triton': expected tensors on a GPU, since Triton compiles "
                "for GPUs, got cpu; use backend='cpu', or start Python with TRITON_INTERPRET=1 to "
                "debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    options = {"num_warps": 4, "num_stages": 1, **({"debug": True} if CHECK else {})}
    with torch.cuda.device(device):
        kernel[grid](*args, **constants, **options)


def _rotate(
    rows: tuple[Rows, Rows],
    positions: tuple[Tensor, Tensor, Tensor],
    rotation: str,
    head_axis: int,
    cos_scale: float,
    sin_scale: float,
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    offset: float,
) -> None:
    q, k = rows
    position_ids, inv_freq, _ = positions
    tokens, all_tokens = _tokens(q.tensors[0], head_axis)
    strides, constants = _arguments(q, k, position_ids, inv_freq, rotation)
    tiles = triton.cdiv(q.heads, constants["BHQ"]) + triton.cdiv(k.heads, constants["BHK"])
    if all_tokens == 0 or tiles == 0 or constants["D"] == 0:
        return
    parts = tiles if all_tokens <= 512 else 1
    in_place = q.tensors[0] is q.tensors[1]  # pointers of empty tensors are all null
    _launch(
        mrope_kernel,
        (all_tokens, parts),
        q.tensors[0].device,
        *q.tensors, *k.tensors, *positions, *weights,
        *strides, *_positions(*positions, *weights),
        tokens, q.heads, k.heads, cos_scale, sin_scale, eps, offset,
        **constants,
        Q_NORM=weights[0] is not None, K_NORM=weights[1] is not None,
        COPY=2 * constants["R"] < constants["D"] and not in_place,
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``vlmops::mrope_triton``."""
    a, b = _Argument("q", q), _Argument("k", k)
    positions = (position_ids, inv_freq, freq_axis)
    _check("mrope", a, b, *positions, rotation, head_axis, eps)
    _check_weight("mrope", a, "q_norm_weight", q_weight)
    _check_weight("mrope", a, "k_norm_weight", k_weight)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rows = _rows(head_axis, q, q_out), _rows(head_axis, k, k_out)
    norm = (q_weight, k_weight)
    _rotate(rows, positions, rotation, head_axis, scaling, scaling, norm, eps, offset)
    return q_out, k_out


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
) -> tuple[Tensor, Tensor]:
    """``vlmops::mrope_triton_backward``."""
    a, b = _Argument("grad_q", grad_q), _Argument("grad_k", grad_k)
    positions = (position_ids, inv_freq, freq_axis)
    _check("mrope_backward", a, b, *positions, rotation, head_axis, 1.0)
    q_out, k_out = torch.empty_like(grad_q), torch.empty_like(grad_k)
    rows = _rows(head_axis, grad_q, q_out), _rows(head_axis, grad_k, k_out)
    norm = (None, None)
    _rotate(rows, positions, rotation, head_axis, scaling, -scaling, norm, 1.0, 0.0)
    return q_out, k_out


def in_place(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> None:
    """``vlmops::mrope_triton_``."""
    a, b = _Argument("q", q), _Argument("k", k)
    positions = (position_ids, inv_freq, freq_axis)
    _check("mrope_", a, b, *positions, rotation, head_axis, eps)
    _check_no_internal_overlap("mrope_", a)
    _check_no_internal_overlap("mrope_", b)
    _check_no_overlap("mrope_", a, b)
    _check_weight("mrope_", a, "q_norm_weight", q_weight)
    _check_weight("mrope_", a, "k_norm_weight", k_weight)
    rows = _rows(head_axis, q, q), _rows(head_axis, k, k)
    norm = (q_weight, k_weight)
    _rotate(rows, positions, rotation, head_axis, scaling, scaling, norm, eps, offset)


def _side_rows(
    op: str,
    grad: _Argument,
    x_name: str,
    x: Tensor | None,
    weight: Tensor | None,
    needs_grad: bool,
    needs_weight_grad: bool,
    head_axis: int,
) -> tuple[Rows, Tensor, bool]:
    """Rows of gradient, input and output; the output; whether the weight's gradient is wanted."""
    _check_weight(op, grad, f"{x_name}_norm_weight", weight)
    if weight is None:
        x = grad.tensor
    elif x is None:
        problem = f"expected a tensor, since {x_name}_norm_weight is given, got None"
        raise RuntimeError(f"vlmops.{op}: {x_name}: {problem}")
    else:
        a = _Argument(x_name, x)
        _on(op, a, grad)
        _shape(op, a, grad.tensor.shape, "that of its gradient")
        _same_dtype(op, a, grad, "its gradient")
    out = torch.empty_like(grad.tensor) if needs_grad else grad.tensor.new_empty(0)
    sums = weight is not None and needs_weight_grad
    heads = grad.tensor.shape[head_axis] if needs_grad or sums else 0
    rows = _rows(head_axis, grad.tensor, x, out if needs_grad else grad.tensor, heads=heads)
    return rows, out, sums


def norm_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    needs_q: bool = True,
    needs_k: bool = True,
    needs_q_weight: bool = True,
    needs_k_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``vlmops::mrope_triton_norm_backward``."""
    op = "mrope_norm_backward"
    a, b = _Argument("grad_q", grad_q), _Argument("grad_k", grad_k)
    _check(op, a, b, position_ids, inv_freq, freq_axis, rotation, head_axis, eps)
    q_rows, q_out, q_sums = _side_rows(op, a, "q", q, q_weight, needs_q, needs_q_weight, head_axis)
    k_rows, k_out, k_sums = _side_rows(op, b, "k", k, k_weight, needs_k, needs_k_weight, head_axis)
    tokens, all_tokens = _tokens(grad_q, head_axis)
    strides, constants = _arguments(q_rows, k_rows, position_ids, inv_freq, rotation)
    programs = min(all_tokens, _BACKWARD_PROGRAMS)
    d = grad_q.shape[-1]
    sums = torch.empty(
        (2, programs, d if q_sums or k_sums else 0), dtype=torch.float32, device=grad_q.device
    )
    if programs and d and (q_rows.heads or k_rows.heads):
        _launch(
            mrope_norm_backward_kernel,
            (programs, 2),
            grad_q.device,
            *q_rows.tensors, *k_rows.tensors, position_ids, inv_freq, freq_axis,
            q_weight, k_weight, sums[0], sums[1],
            *strides, *_positions(position_ids, inv_freq, freq_axis, q_weight, k_weight),
            tokens, all_tokens, q_rows.heads, k_rows.heads, scaling, -scaling, eps, offset,
            **constants,
            Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
            Q_GRAD=needs_q, K_GRAD=needs_k, QW_GRAD=q_sums, KW_GRAD=k_sums,
        )  # fmt: skip
    elif sums.numel():
        sums.zero_()

    def weight_grad(weight: Tensor | None, sum_: Tensor, wanted: bool) -> Tensor:
        if weight is None or not wanted:
            return (grad_q if weight is None else weight).new_empty(0)
        # In a fixed order, in float64: deterministic, and no worse than the CPU's.
        return sum_.sum(0, dtype=torch.float64).to(weight.dtype)

    return (
        q_out,
        k_out,
        weight_grad(q_weight, sums[0], q_sums),
        weight_grad(k_weight, sums[1], k_sums),
    )
