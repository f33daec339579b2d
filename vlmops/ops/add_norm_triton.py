"""The norm behind a sum in Triton. `vlmops.ops.add_norm` says what is computed.

A row is one program's, of 32,768 channels at most: forward one launch, backward one that writes the
gradient of the sum, and where vectors' gradients are wanted a second one that sums over parts of 32
rows, whose sums torch adds up: no atomics, one order.

Bytes are those of the CUDA kernels (csrc/ops/add_norm/add_norm.cuh): 17 MB for Idefics2's 8 x 64
latents of 4,096 channels in bfloat16, 4 us at the 4.3 TB/s that a copy reaches on an H200.
PREDICTED, never measured: 75 % of a copy at 4,096 rows, a launch (5 us) below.

C, dtypes, which tensors there are and whether 8 divides strides are in the compile key; numbers of
rows and strides are not. Tensors whose rows no single stride leads through, or whose channels do
not lie side by side, are copied first.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.


@triton.jit
def _vector(p, o_c, m, default: tl.constexpr):
    if p is None:
        return tl.full(o_c.shape, default, tl.float32)
    return tl.load(p + o_c, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _normed(b_s, m, eps, C: tl.constexpr, LAYER: tl.constexpr):
    """A row normed, what was subtracted and what it was multiplied by."""
    b_mean = 0.0
    if LAYER:
        b_mean = tl.sum(b_s, 0) / C
        b_s = tl.where(m, b_s - b_mean, 0.0)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_s * b_s, 0) / C + eps)
    return b_s * b_scale, b_mean, b_scale


@triton.jit(do_not_specialize=["s_x", "s_residual", "eps"])
def forward_kernel(
    p_x, p_residual, p_weight, p_bias, p_x_bias, p_out, p_sum, s_x: tl.int64, s_residual: tl.int64,
    eps: tl.float32,
    C: tl.constexpr, LAYER: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid: rows. Strides in units of VEC."""
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m = o_c < C
    b_s = tl.load(p_x + i_row * s_x * VEC + o_c, mask=m, other=0.0).to(tl.float32)
    b_s += _vector(p_x_bias, o_c, m, 0.0)
    if p_residual is not None:
        p = p_residual + i_row * s_residual * VEC + o_c
        b_s += tl.load(p, mask=m, other=0.0).to(tl.float32)
    if p_sum is not None:
        tl.store(p_sum + i_row * C + o_c, b_s.to(p_sum.dtype.element_ty), mask=m)
    b_y, _, _ = _normed(b_s, m, eps, C, LAYER)
    b_y = b_y * _vector(p_weight, o_c, m, 1.0) + _vector(p_bias, o_c, m, 0.0)
    tl.store(p_out + i_row * C + o_c, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["s_grad", "s_x", "s_added", "eps"])
def backward_kernel(
    p_grad, p_x, p_added, p_weight, p_out, p_scales, s_grad: tl.int64, s_x: tl.int64,
    s_added: tl.int64, eps: tl.float32,
    C: tl.constexpr, LAYER: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of x, what was normed, to which another one is added, and means and scales.

    Grid: rows. p_added, p_out and p_scales may be None.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m = o_c < C
    b_x = tl.load(p_x + i_row * s_x * VEC + o_c, mask=m, other=0.0).to(tl.float32)
    b_y, b_mean, b_scale = _normed(b_x, m, eps, C, LAYER)
    if p_scales is not None:
        tl.store(p_scales + 2 * i_row, b_mean)
        tl.store(p_scales + 2 * i_row + 1, b_scale)
    if p_out is not None:
        b_g = tl.load(p_grad + i_row * s_grad * VEC + o_c, mask=m, other=0.0).to(tl.float32)
        b_g *= _vector(p_weight, o_c, m, 1.0)
        b_of_x = b_g - b_y * (tl.sum(b_g * b_y, 0) / C)
        if LAYER:
            b_of_x -= tl.sum(b_g, 0) / C
        b_of_x *= b_scale
        if p_added is not None:
            p = p_added + i_row * s_added * VEC + o_c
            b_of_x += tl.load(p, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + i_row * C + o_c, b_of_x.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["s_grad", "s_x", "n_rows"])
def sums_kernel(
    p_grad, p_x, p_of_x, p_scales, p_weight_sums, p_bias_sums, p_x_bias_sums, s_grad: tl.int64,
    s_x: tl.int64, n_rows: tl.int64,
    C: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over a part of BM rows, of BC columns. p_of_x: the gradient that backward_kernel wrote.

    Grid: parts x blocks of columns.
    """
    i_part = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    o_row = i_part * BM + tl.arange(0, BM)
    m_row, m_c = o_row < n_rows, o_c < C
    m = m_row[:, None] & m_c[None, :]
    o_sum = i_part * C + o_c
    if p_x_bias_sums is not None:
        p = p_of_x + (o_row * C)[:, None] + o_c[None, :]
        b_of_x = tl.load(p, mask=m, other=0.0).to(tl.float32)
        tl.store(p_x_bias_sums + o_sum, tl.sum(b_of_x, 0), mask=m_c)
    p = p_grad + (o_row * s_grad * VEC)[:, None] + o_c[None, :]
    b_g = tl.load(p, mask=m, other=0.0).to(tl.float32)
    if p_bias_sums is not None:
        tl.store(p_bias_sums + o_sum, tl.sum(b_g, 0), mask=m_c)
    if p_weight_sums is not None:
        p = p_x + (o_row * s_x * VEC)[:, None] + o_c[None, :]
        b_x = tl.load(p, mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_scales + 2 * o_row, mask=m_row, other=0.0)
        b_scale = tl.load(p_scales + 2 * o_row + 1, mask=m_row, other=0.0)
        b_y = (b_x - b_mean[:, None]) * b_scale[:, None]
        tl.store(p_weight_sums + o_sum, tl.sum(b_g * b_y, 0), mask=m_c)


# Launchers.

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
CHECK = os.environ.get("VLMOPS_CHECK") == "1"
MAX_CHANNELS = 32768
_PART = {"BM": 32, "BC": 64}
_VECTOR = 8  # elements: 16 bytes of bfloat16


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = () if INTERPRETED else (forward_kernel, backward_kernel, sums_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def _refuse(argument: str, reason: str) -> None:
    raise RuntimeError(
        f"vlmops.add_norm: backend 'triton': {argument}: {reason}; use backend='cuda'"
    )


def _launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    if programs >= 2**31:
        _refuse("x", "expected fewer rows, a launch of Triton's holds 2^31 - 1 programs, got "
                f"{programs}")  # fmt: skip
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.add_norm: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[(programs,)](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants)


def _rows(t: Tensor) -> Tensor:
    """``[rows, C]``, channels side by side."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strides(*rows: Tensor | None) -> tuple[list[int], int]:
    """Those of rows, in units of what is returned last."""
    strides = [0 if t is None else t.stride(0) for t in rows]
    vector = _VECTOR if all(s % _VECTOR == 0 for s in strides) else 1
    return [s // vector for s in strides], vector


def _constants(channels: int, rms: bool, vector: int) -> dict[str, Any]:
    """What is known when kernels of whole rows are compiled."""
    if channels > MAX_CHANNELS:
        _refuse("x", f"expected at most {MAX_CHANNELS} channels, which one program norms, got "
                f"{channels}")  # fmt: skip
    block = triton.next_power_of_2(channels)
    return {
        "C": channels, "LAYER": not rms, "VEC": vector, "BC": block,
        "num_warps": min(max(block // 512, 1), 16), "num_stages": 1,
    }  # fmt: skip


def forward(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    needs_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """``vlmops::add_norm_triton``."""
    # All checks.
    out, total = torch.ops.vlmops.add_norm_empty(
        x, residual, weight, bias, x_bias, eps, rms, needs_sum
    )
    if out.numel() == 0:
        return out, total
    rows, more = _rows(x), None if residual is None else _rows(residual)
    strides, vector = _strides(rows, more)
    _launch(
        forward_kernel, len(rows), x.device,
        rows, more, _row(weight), _row(bias), _row(x_bias), out,
        total if total.numel() else None, *strides, eps,
        **_constants(x.shape[-1], rms, vector),
    )  # fmt: skip
    return out, total


def backward(
    grad: Tensor,
    total: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    grad_sum: Tensor | None,
    eps: float,
    rms: bool,
    needs_sum: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``vlmops::add_norm_triton_backward``."""
    for more in (total, grad_sum):  # checks
        torch.ops.vlmops.add_norm_empty(grad, more, weight, bias, x_bias, eps, rms)
    writes = needs_sum or needs_x_bias
    if total is None and (writes or needs_weight):
        raise RuntimeError(
            "vlmops.add_norm_backward: backend 'triton': sum: expected what was normed, since more "
            "than bias's gradient is wanted, got None"
        )
    given, needs = (weight, bias, x_bias), (needs_weight, needs_bias, needs_x_bias)
    for name, vector, needed in zip(("weight", "bias", "x_bias"), given, needs, strict=True):
        if needed and vector is None:
            raise RuntimeError(
                f"vlmops.add_norm_backward: backend 'triton': {name}: expected a tensor, since its "
                "gradient is wanted, got None"
            )
    of_sum = grad.new_empty(grad.shape if writes else 0)
    rows = _rows(grad)
    x, added = (None if t is None else _rows(t) for t in (total, grad_sum))
    n_rows, channels = rows.shape
    parts = triton.cdiv(n_rows, _PART["BM"])
    sums = [rows.new_empty(parts, channels, dtype=torch.float32) if n else None for n in needs]
    if grad.numel() == 0:
        sums = [None if part is None else part.zero_() for part in sums]
    else:
        scales = rows.new_empty(n_rows, 2, dtype=torch.float32) if needs_weight else None
        strides, wide = _strides(rows, x, added)
        constants = _constants(channels, rms, wide)
        if writes or needs_weight:
            _launch(
                backward_kernel, n_rows, grad.device,
                rows, x, added, _row(weight), of_sum if writes else None, scales, *strides, eps,
                **constants,
            )  # fmt: skip
        if any(needs):
            _launch(
                sums_kernel, parts * triton.cdiv(channels, _PART["BC"]), grad.device,
                rows, x, of_sum if writes else None, scales, *sums, *strides[:2], n_rows,
                C=channels, VEC=wide, **_PART, num_warps=4, num_stages=1,
            )  # fmt: skip
    of_weight, of_bias, of_x_bias = (
        grad.new_empty(0) if vector is None or part is None else part.sum(0).to(vector.dtype)
        for vector, part in zip(given, sums, strict=True)
    )
    return of_sum if needs_sum else grad.new_empty(0), of_weight, of_bias, of_x_bias
