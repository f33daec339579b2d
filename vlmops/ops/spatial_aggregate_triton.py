"""The spatial aggregation in Triton. `vlmops.ops.spatial_aggregate` says what is computed.

A program has some heads of one query and all its tokens, a block of one encoder's at a time; one
launch forward, one backward, which passes over the tokens twice. Up to four encoders: more are
refused, and `vlmops`' CUDA kernels take them.

Bytes are those of the CUDA kernels (csrc/ops/spatial_aggregate/spatial_aggregate.cuh): 47 MB for
Cambrian-1's maps in bfloat16, 11 us at the 4.3 TB/s that a copy reaches on an H200, backward twice
that. PREDICTED, never measured: 70 % of a copy.

D, windows, dtypes, which tensors there are, heads of a program and whether 8 divides strides are in
the compile key; the batch, the grid, the number of heads and strides are not. Maps whose tokens no
single stride leads through, or whose heads do not lie side by side, are copied first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops.spatial_aggregate import Arguments

ENCODERS = 4

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count; of
# encoder e: p_ke, p_ve, p_me keys, values, mask; Me x We a window, Ne tokens of a block.


@triton.jit
def _place(n_grid_h, n_grid_w, n_heads, D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    """Batch, row, column and number of a program's query, its heads' channels and which exist."""
    n_groups = tl.cdiv(n_heads, BH)
    i_cell = tl.program_id(0) // n_groups
    i_b = (i_cell // (n_grid_h * n_grid_w)).to(tl.int64)
    i_y = i_cell // n_grid_w % n_grid_h
    i_x = i_cell % n_grid_w
    o_h = tl.program_id(0) % n_groups * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    o = o_h[:, None] * D + o_d[None, :]
    return i_b, i_y, i_x, o, (o_h < n_heads)[:, None] & (o_d < D)[None, :]


@triton.jit
def _query(p, s_b, s_t, i_b, i_y, i_x, n_grid_w, o, m, VEC: tl.constexpr):
    i_token = (i_y * n_grid_w + i_x).to(tl.int64)
    return tl.load(p + (i_b * s_b + i_token * s_t) * VEC + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _tokens(
    p_m, i_block, i_b, i_y, i_x, n_grid_h, n_grid_w,
    M: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of a block of a window: tokens of the image's map and of all, which are, which exist."""
    o_t = i_block * N + tl.arange(0, N)
    m_listed = o_t < M * W
    o_token = ((i_y * M + o_t // W) * (n_grid_w * W) + i_x * W + o_t % W).to(tl.int64)
    o_all = i_b * (n_grid_h * n_grid_w * M * W) + o_token
    m_exists = m_listed
    if p_m is not None:
        m_exists = m_listed & (tl.load(p_m + o_all, mask=m_listed, other=0) != 0)
    return o_token, o_all, m_listed, m_exists


@triton.jit
def _rows(p, s_b, s_t, i_b, o_token, m_exists, o, m, VEC: tl.constexpr):
    """``[N, BH, BD]``."""
    o_row = (i_b * s_b + o_token * s_t) * VEC
    m_all = m_exists[:, None, None] & m[None, :, :]
    return tl.load(p + o_row[:, None, None] + o[None, :, :], mask=m_all, other=0.0).to(tl.float32)


@triton.jit
def _online(b_most, b_sum, b_s, m_exists):
    """Maximum, sum, weights of logits ``[N, BH]`` and what sums before are to be multiplied by."""
    b_s = tl.where(m_exists[:, None], b_s, -float("inf"))
    b_now = tl.maximum(b_most, tl.max(b_s, 0))
    b_shift = tl.where(b_now == -float("inf"), 0.0, b_now)
    b_before = tl.exp(b_most - b_shift)
    b_w = tl.exp(b_s - b_shift[None, :])
    return b_now, b_sum * b_before + tl.sum(b_w, 0), b_w, b_before


@triton.jit
def _attend(
    p_k, p_v, p_m, s_kb, s_kt, s_vb, s_vt, b_q, b_most, b_sum, b_out, scale,
    i_b, i_y, i_x, n_grid_h, n_grid_w, o, m,
    M: tl.constexpr, W: tl.constexpr, N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    for i in range(0, tl.cdiv(M * W, N)):
        o_token, _, _, m_exists = _tokens(p_m, i, i_b, i_y, i_x, n_grid_h, n_grid_w, M, W, N)
        b_k = _rows(p_k, s_kb, s_kt, i_b, o_token, m_exists, o, m, VEC)
        b_v = _rows(p_v, s_vb, s_vt, i_b, o_token, m_exists, o, m, VEC)
        b_s = tl.sum(b_q[None, :, :] * b_k, 2) * scale
        b_most, b_sum, b_w, b_before = _online(b_most, b_sum, b_s, m_exists)
        b_out = b_out * b_before[:, None] + tl.sum(b_w[:, :, None] * b_v, 0)
    return b_most, b_sum, b_out


_STRIDES = [f"s_{kind}{e}{of}" for e in range(ENCODERS) for kind in "kv" for of in "bt"]
_SIZES = ["s_qb", "s_qt", "n_grid_h", "n_grid_w", "n_heads"]


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def forward_kernel(
    p_q, p_out, s_qb: tl.int64, s_qt: tl.int64, scale: tl.float32,
    n_grid_h: tl.int32, n_grid_w: tl.int32, n_heads: tl.int32,
    p_k0, p_v0, p_m0, s_k0b: tl.int64, s_k0t: tl.int64, s_v0b: tl.int64, s_v0t: tl.int64,
    p_k1, p_v1, p_m1, s_k1b: tl.int64, s_k1t: tl.int64, s_v1b: tl.int64, s_v1t: tl.int64,
    p_k2, p_v2, p_m2, s_k2b: tl.int64, s_k2t: tl.int64, s_v2b: tl.int64, s_v2t: tl.int64,
    p_k3, p_v3, p_m3, s_k3b: tl.int64, s_k3t: tl.int64, s_v3b: tl.int64, s_v3t: tl.int64,
    M0: tl.constexpr, W0: tl.constexpr, N0: tl.constexpr,
    M1: tl.constexpr, W1: tl.constexpr, N1: tl.constexpr,
    M2: tl.constexpr, W2: tl.constexpr, N2: tl.constexpr,
    M3: tl.constexpr, W3: tl.constexpr, N3: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Grid: queries x groups of BH heads. Strides of images and tokens in units of VEC."""
    i_b, i_y, i_x, o, m = _place(n_grid_h, n_grid_w, n_heads, D, BH, BD)
    b_q = _query(p_q, s_qb, s_qt, i_b, i_y, i_x, n_grid_w, o, m, VEC)
    b_most = tl.full([BH], -float("inf"), tl.float32)
    b_sum = tl.zeros([BH], tl.float32)
    b_out = tl.zeros([BH, BD], tl.float32)
    b_most, b_sum, b_out = _attend(
        p_k0, p_v0, p_m0, s_k0b, s_k0t, s_v0b, s_v0t, b_q, b_most, b_sum, b_out, scale,
        i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M0, W0, N0, VEC,
    )  # fmt: skip
    if p_k1 is not None:
        b_most, b_sum, b_out = _attend(
            p_k1, p_v1, p_m1, s_k1b, s_k1t, s_v1b, s_v1t, b_q, b_most, b_sum, b_out, scale,
            i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M1, W1, N1, VEC,
        )  # fmt: skip
    if p_k2 is not None:
        b_most, b_sum, b_out = _attend(
            p_k2, p_v2, p_m2, s_k2b, s_k2t, s_v2b, s_v2t, b_q, b_most, b_sum, b_out, scale,
            i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M2, W2, N2, VEC,
        )  # fmt: skip
    if p_k3 is not None:
        b_most, b_sum, b_out = _attend(
            p_k3, p_v3, p_m3, s_k3b, s_k3t, s_v3b, s_v3t, b_q, b_most, b_sum, b_out, scale,
            i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M3, W3, N3, VEC,
        )  # fmt: skip
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]  # zeros where no token exists
    o_cell = (i_b * n_grid_h + i_y) * n_grid_w + i_x
    tl.store(p_out + o_cell * (n_heads * D) + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _statistics(
    p_k, p_v, p_m, s_kb, s_kt, s_vb, s_vt, b_q, b_grad, b_most, b_sum, b_mean, scale,
    i_b, i_y, i_x, n_grid_h, n_grid_w, o, m,
    M: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WEIGHTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The softmax's, and the sum of what weights' gradients are, by the weights."""
    for i in range(0, tl.cdiv(M * W, N)):
        o_token, _, _, m_exists = _tokens(p_m, i, i_b, i_y, i_x, n_grid_h, n_grid_w, M, W, N)
        b_k = _rows(p_k, s_kb, s_kt, i_b, o_token, m_exists, o, m, VEC)
        b_s = tl.sum(b_q[None, :, :] * b_k, 2) * scale
        b_most, b_sum, b_w, b_before = _online(b_most, b_sum, b_s, m_exists)
        if WEIGHTS:
            b_v = _rows(p_v, s_vb, s_vt, i_b, o_token, m_exists, o, m, VEC)
            b_r = tl.sum(b_grad[None, :, :] * b_v, 2)
            b_mean = b_mean * b_before + tl.sum(b_w * b_r, 0)
    return b_most, b_sum, b_mean


@triton.jit
def _gradients(
    p_k, p_v, p_m, s_kb, s_kt, s_vb, s_vt, p_of_k, p_of_v, b_q, b_grad, b_shift, b_inverse,
    b_mean, b_of_q, scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, s_row,
    M: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WEIGHTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Writes those of keys and values, returns the sum of q's."""
    for i in range(0, tl.cdiv(M * W, N)):
        o_token, o_all, m_listed, m_exists = _tokens(
            p_m, i, i_b, i_y, i_x, n_grid_h, n_grid_w, M, W, N
        )
        m_there = m_exists[:, None]
        m_written = m_listed[:, None, None] & m[None, :, :]
        o_written = (o_all * s_row)[:, None, None] + o[None, :, :]
        b_k = _rows(p_k, s_kb, s_kt, i_b, o_token, m_exists, o, m, VEC)
        b_s = tl.where(m_there, tl.sum(b_q[None, :, :] * b_k, 2) * scale, -float("inf"))
        b_w = tl.exp(b_s - b_shift[None, :]) * b_inverse[None, :]
        if p_of_v is not None:
            b = tl.where(m_exists[:, None, None], b_w[:, :, None] * b_grad[None, :, :], 0.0)
            tl.store(p_of_v + o_written, b.to(p_of_v.dtype.element_ty), mask=m_written)
        if WEIGHTS:
            b_v = _rows(p_v, s_vb, s_vt, i_b, o_token, m_exists, o, m, VEC)
            b_r = tl.sum(b_grad[None, :, :] * b_v, 2)
            b_r = tl.where(m_there, b_w * (b_r - b_mean[None, :]) * scale, 0.0)
            b_of_q += tl.sum(b_r[:, :, None] * b_k, 0)
            if p_of_k is not None:
                b = tl.where(m_exists[:, None, None], b_r[:, :, None] * b_q[None, :, :], 0.0)
                tl.store(p_of_k + o_written, b.to(p_of_k.dtype.element_ty), mask=m_written)
    return b_of_q


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES, "s_gb", "s_gt"])
def backward_kernel(
    p_q, p_out, s_qb: tl.int64, s_qt: tl.int64, scale: tl.float32,
    n_grid_h: tl.int32, n_grid_w: tl.int32, n_heads: tl.int32,
    p_k0, p_v0, p_m0, s_k0b: tl.int64, s_k0t: tl.int64, s_v0b: tl.int64, s_v0t: tl.int64,
    p_k1, p_v1, p_m1, s_k1b: tl.int64, s_k1t: tl.int64, s_v1b: tl.int64, s_v1t: tl.int64,
    p_k2, p_v2, p_m2, s_k2b: tl.int64, s_k2t: tl.int64, s_v2b: tl.int64, s_v2t: tl.int64,
    p_k3, p_v3, p_m3, s_k3b: tl.int64, s_k3t: tl.int64, s_v3b: tl.int64, s_v3t: tl.int64,
    p_grad, s_gb: tl.int64, s_gt: tl.int64,
    p_of_k0, p_of_v0, p_of_k1, p_of_v1, p_of_k2, p_of_v2, p_of_k3, p_of_v3,
    M0: tl.constexpr, W0: tl.constexpr, N0: tl.constexpr,
    M1: tl.constexpr, W1: tl.constexpr, N1: tl.constexpr,
    M2: tl.constexpr, W2: tl.constexpr, N2: tl.constexpr,
    M3: tl.constexpr, W3: tl.constexpr, N3: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, VEC: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The same grid. Gradients that are None are not computed, WEIGHTS unless values' alone are."""
    i_b, i_y, i_x, o, m = _place(n_grid_h, n_grid_w, n_heads, D, BH, BD)
    b_q = _query(p_q, s_qb, s_qt, i_b, i_y, i_x, n_grid_w, o, m, VEC)
    b_grad = _query(p_grad, s_gb, s_gt, i_b, i_y, i_x, n_grid_w, o, m, VEC)
    b_most = tl.full([BH], -float("inf"), tl.float32)
    b_sum = tl.zeros([BH], tl.float32)
    b_mean = tl.zeros([BH], tl.float32)
    b_most, b_sum, b_mean = _statistics(
        p_k0, p_v0, p_m0, s_k0b, s_k0t, s_v0b, s_v0t, b_q, b_grad, b_most, b_sum, b_mean, scale,
        i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M0, W0, N0, WEIGHTS, VEC,
    )  # fmt: skip
    if p_k1 is not None:
        b_most, b_sum, b_mean = _statistics(
            p_k1, p_v1, p_m1, s_k1b, s_k1t, s_v1b, s_v1t, b_q, b_grad, b_most, b_sum, b_mean,
            scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M1, W1, N1, WEIGHTS, VEC,
        )  # fmt: skip
    if p_k2 is not None:
        b_most, b_sum, b_mean = _statistics(
            p_k2, p_v2, p_m2, s_k2b, s_k2t, s_v2b, s_v2t, b_q, b_grad, b_most, b_sum, b_mean,
            scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M2, W2, N2, WEIGHTS, VEC,
        )  # fmt: skip
    if p_k3 is not None:
        b_most, b_sum, b_mean = _statistics(
            p_k3, p_v3, p_m3, s_k3b, s_k3t, s_v3b, s_v3t, b_q, b_grad, b_most, b_sum, b_mean,
            scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, M3, W3, N3, WEIGHTS, VEC,
        )  # fmt: skip
    b_shift = tl.where(b_most == -float("inf"), 0.0, b_most)
    b_inverse = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
    b_mean = b_mean * b_inverse
    b_of_q = tl.zeros([BH, BD], tl.float32)
    s_row = n_heads * D
    b_of_q = _gradients(
        p_k0, p_v0, p_m0, s_k0b, s_k0t, s_v0b, s_v0t, p_of_k0, p_of_v0, b_q, b_grad, b_shift,
        b_inverse, b_mean, b_of_q, scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, s_row,
        M0, W0, N0, WEIGHTS, VEC,
    )  # fmt: skip
    if p_k1 is not None:
        b_of_q = _gradients(
            p_k1, p_v1, p_m1, s_k1b, s_k1t, s_v1b, s_v1t, p_of_k1, p_of_v1, b_q, b_grad, b_shift,
            b_inverse, b_mean, b_of_q, scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, s_row,
            M1, W1, N1, WEIGHTS, VEC,
        )  # fmt: skip
    if p_k2 is not None:
        b_of_q = _gradients(
            p_k2, p_v2, p_m2, s_k2b, s_k2t, s_v2b, s_v2t, p_of_k2, p_of_v2, b_q, b_grad, b_shift,
            b_inverse, b_mean, b_of_q, scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, s_row,
            M2, W2, N2, WEIGHTS, VEC,
        )  # fmt: skip
    if p_k3 is not None:
        b_of_q = _gradients(
            p_k3, p_v3, p_m3, s_k3b, s_k3t, s_v3b, s_v3t, p_of_k3, p_of_v3, b_q, b_grad, b_shift,
            b_inverse, b_mean, b_of_q, scale, i_b, i_y, i_x, n_grid_h, n_grid_w, o, m, s_row,
            M3, W3, N3, WEIGHTS, VEC,
        )  # fmt: skip
    if p_out is not None:
        o_cell = (i_b * n_grid_h + i_y) * n_grid_w + i_x
        tl.store(p_out + o_cell * s_row + o, b_of_q.to(p_out.dtype.element_ty), mask=m)


# Launchers.

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
CHECK = os.environ.get("VLMOPS_CHECK") == "1"
_ELEMENTS = 4096  # of a block of keys
_TOKENS = 16  # of it, at most
_VECTOR = 8  # elements: 16 bytes of bfloat16


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = () if INTERPRETED else (forward_kernel, backward_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if grid[0] >= 2**31:
        raise RuntimeError(
            "vlmops.spatial_aggregate: backend 'triton': q: expected fewer queries, a launch of "
            f"Triton's holds 2^31 - 1 programs, got {grid[0]}; use backend='cuda'"
        )
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.spatial_aggregate: backend 'triton': expected tensors on a GPU, since "
                "Triton compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _require_few(op: str, a: Arguments) -> None:
    if len(a.keys) > ENCODERS:
        raise RuntimeError(
            f"vlmops.{op}: backend 'triton': keys: expected maps of at most {ENCODERS} encoders, "
            f"got {len(a.keys)}; use backend='cuda' or 'cpu'"
        )


def _laid_out(x: Tensor) -> Tensor:
    """One stride from token to token, and each token's heads side by side."""
    _, _, columns, _, channels = x.shape
    fits = x.stride(4) == 1 and x.stride(3) == channels and x.stride(1) == columns * x.stride(2)
    return x if fits else x.contiguous()


def _run(
    kernel: Any, a: Arguments, out: Tensor | None, grad: Tensor | None, *of_backward: Any,
    **constants: Any,
) -> None:  # fmt: skip
    batch, grid_h, grid_w, heads, channels = a.q.shape
    q = _laid_out(a.q)
    maps = [_laid_out(x) for pair in zip(a.keys, a.values, strict=True) for x in pair]
    read = [q, *maps]
    if grad is not None:
        grad = _laid_out(grad)
        read.append(grad)
    strides = [s for x in read for s in (x.stride(0), x.stride(2))]
    vector = _VECTOR if all(s % _VECTOR == 0 for s in strides) else 1
    strides = [s // vector for s in strides]
    encoders: list[Any] = []
    most = 1
    for e in range(ENCODERS):
        if e >= len(a.keys):
            encoders += [None] * 3 + [0] * 4
            constants |= {f"M{e}": 1, f"W{e}": 1, f"N{e}": 1}
            continue
        mask = a.masks[e] if a.masks else None
        byte = None if mask is None else mask.contiguous().view(torch.uint8)
        encoders += [maps[2 * e], maps[2 * e + 1], byte, *strides[2 + 4 * e : 6 + 4 * e]]
        height, width = maps[2 * e].shape[1] // grid_h, maps[2 * e].shape[2] // grid_w
        tokens = min(_TOKENS, triton.next_power_of_2(height * width))
        constants |= {f"M{e}": height, f"W{e}": width, f"N{e}": tokens}
        most = max(most, tokens)
    wide = triton.next_power_of_2(channels)
    group = max(1, min(triton.next_power_of_2(heads), _ELEMENTS // (wide * most)))
    scale = 1.0 / math.sqrt(channels) if a.scale is None else a.scale
    _launch(
        kernel, (batch * grid_h * grid_w * triton.cdiv(heads, group),), q.device,
        q, out, *strides[:2], scale, grid_h, grid_w, heads, *encoders,
        *(() if grad is None else (grad, *strides[-2:])), *of_backward,
        **constants, D=channels, BH=group, BD=wide, VEC=vector, num_warps=4, num_stages=1,
    )  # fmt: skip


def forward(*args: Any) -> Tensor:
    """``vlmops::spatial_aggregate_triton``."""
    a = Arguments(*args)
    out: Tensor = torch.ops.vlmops.spatial_aggregate_empty(*args)  # all checks
    _require_few("spatial_aggregate", a)
    if out.numel() != 0:
        _run(forward_kernel, a, out, None)
    return out


def backward(grad: Tensor, needs: Sequence[int], *args: Any) -> list[Tensor]:
    """``vlmops::spatial_aggregate_triton_backward``."""
    a = Arguments(*args)
    grads: list[Tensor] = torch.ops.vlmops.spatial_aggregate_backward_empty(grad, needs, *args)
    _require_few("spatial_aggregate_backward", a)
    if not any(needs) or a.q.numel() == 0:
        return grads
    of_q, *others = (g if needed else None for g, needed in zip(grads, needs, strict=True))
    count = len(a.keys)
    pairs = [x for pair in zip(others[:count], others[count:], strict=True) for x in pair]
    pairs += [None] * (2 * (ENCODERS - count))
    _run(backward_kernel, a, of_q, grad, *pairs, WEIGHTS=any(needs[: 1 + count]))
    return grads
