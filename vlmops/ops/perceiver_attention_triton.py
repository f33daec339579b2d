"""Perceiver attention in Triton: the kernels of packed attention, and one that joins two results.

Bytes of the latter: both results read, one written; 8 samples of 64 latents of 16 x 96 channels in
bfloat16 are 4.7 MB, less than a launch (5 us) at an H200's 4.3 TB/s. PREDICTED, never measured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops import packed_attention, packed_attention_triton
from vlmops.ops.packed_attention_triton import INTERPRETED as INTERPRETED
from vlmops.ops.perceiver_attention import OP, Options

_launch = packed_attention_triton._launch

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, n_ count.


@triton.jit(do_not_specialize=["n_rows", "n_heads"])
def join_kernel(
    p_out, p_other, p_first, p_second, p_joint, n_rows: tl.int64, n_heads: tl.int64,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The softmax over both segments' keys, over the result of the first: out [rows, H, D]."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # of rows and heads
    n_all = n_rows * n_heads
    m_row = o_row < n_all
    o = o_row % n_heads * n_rows + o_row // n_heads
    b_top = tl.load(p_first + o, mask=m_row, other=0.0)
    b_top_2 = tl.load(p_second + o, mask=m_row, other=0.0)
    b_part = tl.load(p_first + n_all + o, mask=m_row, other=0.0)
    b_part_2 = tl.load(p_second + n_all + o, mask=m_row, other=0.0)
    # A segment without keys that are seen has a part of 0; the other's numbers are those of both.
    m_first, m_second = b_part_2 == 0.0, (b_part == 0.0) & (b_part_2 != 0.0)
    m_one = m_first | m_second
    b_most = tl.where(m_first | ((b_top > b_top_2) & ~m_second), b_top, b_top_2)
    b_x = tl.exp2(b_top - b_most) / tl.where(m_one, 1.0, b_part)
    b_y = tl.exp2(b_top_2 - b_most) / tl.where(m_one, 1.0, b_part_2)
    b_share = tl.where(m_one, tl.where(m_first, 1.0, 0.0), b_x / (b_x + b_y))
    b_share_2 = tl.where(m_one, tl.where(m_first, 0.0, 1.0), b_y / (b_x + b_y))
    b_part = tl.where(m_one, tl.where(m_first, b_part, b_part_2), 1.0 / (b_x + b_y))
    tl.store(p_joint + o, b_most, mask=m_row)
    tl.store(p_joint + n_all + o, b_part, mask=m_row)
    o_d = tl.arange(0, BD)
    o_x = o_row[:, None] * D + o_d[None, :]
    m = m_row[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_out + o_x, mask=m, other=0.0).to(tl.float32) * b_share[:, None]
    b_y = tl.load(p_other + o_x, mask=m, other=0.0).to(tl.float32) * b_share_2[:, None]
    tl.store(p_out + o_x, (b_x + b_y).to(p_out.dtype.element_ty), mask=m)


def _join(out: Tensor, other: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Makes ``out`` the result over both segments; returns the joint statistics."""
    joint = torch.empty_like(first)
    if out.numel():
        dim = out.shape[3]
        wide = int(triton.next_power_of_2(dim))
        block = max(4096 // wide, 1)
        _launch(
            join_kernel,
            (triton.cdiv(out.numel() // dim, block),),
            out.device,
            *(out, other, first, second, joint, first.shape[2], first.shape[1]),
            D=dim,
            BD=wide,
            BM=block,
            num_warps=4,
        )
    return joint


def _media(o: Options) -> packed_attention.Options:
    return packed_attention.Options(
        block_mask=o.key_mask,
        key_lengths=o.key_lengths,
        scale=o.scale,
        tokens_per_block=o.tokens_per_block,
    )


def _latents(o: Options) -> packed_attention.Options:
    return packed_attention.Options(scale=o.scale)


def forward(
    q: Tensor, k: Tensor, v: Tensor, k_latents: Tensor, v_latents: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """``vlmops::perceiver_attention_triton``."""
    o = Options(*args)
    torch.ops.vlmops.perceiver_attention_check(q, k, v, k_latents, v_latents, *o)
    out, first = packed_attention_triton.forward(q, k, v, *_media(o))
    other, second = packed_attention_triton.forward(q, k_latents, v_latents, *_latents(o))
    return out, _join(out, other, first, second)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    out: Tensor,
    statistics: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    """``vlmops::perceiver_attention_triton_backward``."""
    o, needs = OP.parts(args)
    heads = q, k, v, k_latents, v_latents
    torch.ops.vlmops.perceiver_attention_check(*heads, *o, grad, out, statistics)
    run = functools.partial(packed_attention_triton.backward, exact_q=True)
    saved = out, statistics
    dq, dk, dv = run(grad, q, k, v, *saved, *_media(o), *needs[:3])
    of_latents = needs[0], *needs[3:]
    more, dk_2, dv_2 = run(grad, q, k_latents, v_latents, *saved, *_latents(o), *of_latents)
    return (dq + more).to(grad.dtype), dk, dv, dk_2, dv_2
