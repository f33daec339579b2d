"""The gated residual in Triton. `vlmops.ops.gated_residual` says what is computed.

A program takes a block of rows and channels, one launch forward; backward the same program writes
y's gradient and, where the gate's is wanted, float64 sums of its block, which a second launch adds
up: no atomics, one order.

Bytes are those of the CUDA kernels (csrc/ops/gated_residual/gated_residual.cuh): 50 MB for 2,048
tokens of Mllama's 4,096 channels in bfloat16, 12 us at the 4.3 TB/s that a copy reaches on an H200.
PREDICTED, never measured: 85 % of a copy from 512 tokens on, a launch (5 us) below.

C, dtypes, the form of the gate and whether 8 divides strides are in the compile key; numbers of
rows and strides are not. Tensors whose rows no single stride leads through, or whose channels do
not lie side by side, are copied first.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.


@triton.jit
def _tanh(b_x):
    """As csrc/common/tanh.h has it. NaN stays."""
    b_square = b_x * b_x
    b_near = b_square * -0.005704986397176981 + 0.02063908614218235
    b_near = b_near * b_square - 0.05373971536755562
    b_near = b_near * b_square + 0.13331441581249237
    b_near = b_near * b_square - 0.3333328068256378
    b_near = b_x + b_x * (b_square * b_near)
    b_size = tl.abs(b_x)
    b_far = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(b_size > 20.0, 20.0, b_size)) + 1.0)
    return tl.where(b_size < 0.625, b_near, tl.where(b_x < 0.0, -b_far, b_far))


@triton.jit
def _place(n_rows, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Rows and channels of a program, and which of them exist."""
    o_row = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64) * BM + tl.arange(0, BM)
    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    return o_row, o_c, o_row < n_rows, o_c < C


@triton.jit
def _gate(p_gate, o_c, m_c, CHANNELS: tl.constexpr):
    o_gate = o_c if CHANNELS else o_c * 0
    return _tanh(tl.load(p_gate + o_gate, mask=m_c, other=0.0).to(tl.float32))


@triton.jit
def _added(p_mask, o_row, m_row):
    m = m_row
    if p_mask is not None:
        m = m & (tl.load(p_mask + o_row, mask=m_row, other=0) != 0)
    return m


@triton.jit(do_not_specialize=["s_x", "s_y", "n_rows"])
def forward_kernel(
    p_x, p_y, p_gate, p_mask, p_out, s_x: tl.int64, s_y: tl.int64, n_rows: tl.int64,
    C: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows x blocks of channels. Strides of rows in units of VEC."""
    o_row, o_c, m_row, m_c = _place(n_rows, C, BM, BC)
    m_added = _added(p_mask, o_row, m_row)
    m = m_row[:, None] & m_c[None, :]
    b_x = tl.load(p_x + (o_row * s_x * VEC)[:, None] + o_c[None, :], mask=m, other=0.0)
    p = p_y + (o_row * s_y * VEC)[:, None] + o_c[None, :]
    b_y = tl.load(p, mask=m_added[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    b_sum = b_x.to(tl.float32) + _gate(p_gate, o_c, m_c, CHANNELS)[None, :] * b_y
    b_out = tl.where(m_added[:, None], b_sum.to(p_out.dtype.element_ty), b_x)
    tl.store(p_out + (o_row * C)[:, None] + o_c[None, :], b_out, mask=m)


@triton.jit(do_not_specialize=["s_grad", "s_y", "n_rows"])
def backward_kernel(
    p_grad, p_y, p_gate, p_mask, p_out, p_sums, s_grad: tl.int64, s_y: tl.int64,
    n_rows: tl.int64,
    C: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Gradients of y, and sums [blocks of rows, C], or one number a program; either may be None."""
    o_row, o_c, m_row, m_c = _place(n_rows, C, BM, BC)
    m_added = _added(p_mask, o_row, m_row)
    m = m_added[:, None] & m_c[None, :]
    b_g = tl.load(p_grad + (o_row * s_grad * VEC)[:, None] + o_c[None, :], mask=m, other=0.0)
    b_g = b_g.to(tl.float32)
    if p_out is not None:
        b_out = (b_g * _gate(p_gate, o_c, m_c, CHANNELS)[None, :]).to(p_out.dtype.element_ty)
        b_out = tl.where(m_added[:, None], b_out, 0.0)  # not -0, not a gate's NaN
        p = p_out + (o_row * C)[:, None] + o_c[None, :]
        tl.store(p, b_out, mask=m_row[:, None] & m_c[None, :])
    if p_sums is not None:
        b_y = tl.load(p_y + (o_row * s_y * VEC)[:, None] + o_c[None, :], mask=m, other=0.0)
        b_sum = tl.sum(b_g.to(tl.float64) * b_y.to(tl.float64), 0)
        if CHANNELS:
            i_part = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
            tl.store(p_sums + i_part * C + o_c, b_sum, mask=m_c)
        else:
            tl.store(p_sums + tl.program_id(0), tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["n_parts"])
def gate_grad_kernel(
    p_sums, p_gate, p_out, n_parts: tl.int64, N: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sums [parts, N] over their parts, times 1 - tanh^2. Grid: blocks of N."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < N
    b_sum = tl.zeros([BC], tl.float64)
    for i in range(0, tl.cdiv(n_parts, BM)):
        o_part = i * BM + tl.arange(0, BM).to(tl.int64)
        m = (o_part < n_parts)[:, None] & m_c[None, :]
        b_sum += tl.sum(
            tl.load(p_sums + (o_part * N)[:, None] + o_c[None, :], mask=m, other=0.0), 0
        )
    b_gate = tl.load(p_gate + o_c, mask=m_c, other=0.0).to(tl.float64)
    b_e = tl.exp(-2.0 * tl.abs(b_gate))  # without the cancellation of 1 - tanh^2
    b_sum = b_sum * (4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e)))
    tl.store(p_out + o_c, b_sum.to(tl.float32).to(p_out.dtype.element_ty), mask=m_c)


# Launchers.

INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
CHECK = os.environ.get("VLMOPS_CHECK") == "1"
_BLOCK = {"BM": 4, "BC": 1024}
_BACKWARD_BLOCK = {"BM": 32, "BC": 128}  # few sums of parts
_SUM_BLOCK = {"BM": 16, "BC": 256}
_VECTOR = 8  # elements: 16 bytes of bfloat16


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = () if INTERPRETED else (forward_kernel, backward_kernel, gate_grad_kernel)
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if grid[0] >= 2**31:
        raise RuntimeError(
            "vlmops.gated_residual: backend 'triton': x: expected fewer rows, a launch of Triton's "
            f"holds 2^31 - 1 programs, got {grid[0]}; use backend='cuda'"
        )
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.gated_residual: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _rows(t: Tensor) -> Tensor:
    """``[rows, C]``, channels side by side."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _mask(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask.contiguous().view(torch.uint8)


def _programs(x: Tensor, block: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(len(x), block["BM"]) * triton.cdiv(x.shape[1], block["BC"]),)


def _constants(gate: Tensor, *rows: Tensor) -> tuple[list[int], dict[str, Any]]:
    """Strides of rows in units of VEC, and what is known when kernels are compiled."""
    strides = [t.stride(0) for t in rows]
    vector = _VECTOR if all(s % _VECTOR == 0 for s in strides) else 1
    return [s // vector for s in strides], {
        "C": rows[0].shape[1], "CHANNELS": gate.numel() != 1, "VEC": vector,
        "num_warps": 8, "num_stages": 1,
    }  # fmt: skip


def forward(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """``vlmops::gated_residual_triton``."""
    # All checks.
    out: Tensor = torch.ops.vlmops.gated_residual_empty(x, y, gate, row_mask)
    if out.numel() == 0:
        return out
    x, y = _rows(x), _rows(y)
    strides, constants = _constants(gate, x, y)
    _launch(
        forward_kernel, _programs(x, _BLOCK), x.device,
        x, y, gate.contiguous(), _mask(row_mask), out, *strides, len(x),
        **constants, **_BLOCK,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None = None,
    needs_y: bool = True,
    needs_gate: bool = True,
) -> tuple[Tensor, Tensor]:
    """``vlmops::gated_residual_triton_backward``."""
    if needs_gate and y is None:
        raise RuntimeError(
            "vlmops.gated_residual_backward: backend 'triton': y: expected the y of the forward "
            "call, since gate's gradient is wanted, got None"
        )
    torch.ops.vlmops.gated_residual_empty(grad, grad if y is None else y, gate, row_mask)  # checks
    of_y = grad.new_empty(grad.shape if needs_y else 0)
    of_gate = gate.new_zeros(gate.shape if needs_gate else 0)
    if grad.numel() == 0 or not (needs_y or needs_gate):
        return of_y, of_gate
    grad = _rows(grad)
    y = _rows(y) if needs_gate and y is not None else None
    strides, constants = _constants(gate, grad, grad if y is None else y)
    programs = _programs(grad, _BACKWARD_BLOCK)
    n = grad.shape[1] if constants["CHANNELS"] else 1
    parts = triton.cdiv(len(grad), _BACKWARD_BLOCK["BM"]) if constants["CHANNELS"] else programs[0]
    sums = grad.new_empty(parts, n, dtype=torch.float64) if needs_gate else None
    gate = gate.contiguous()
    _launch(
        backward_kernel, programs, grad.device,
        grad, y, gate, _mask(row_mask), of_y if needs_y else None, sums, *strides, len(grad),
        **constants, **_BACKWARD_BLOCK,
    )  # fmt: skip
    if sums is not None:
        _launch(
            gate_grad_kernel, (triton.cdiv(n, _SUM_BLOCK["BC"]),), grad.device,
            sums, gate, of_gate, parts,
            N=n, **(_SUM_BLOCK if n > 1 else {"BM": 1024, "BC": 1}), num_warps=4, num_stages=1,
        )  # fmt: skip
    return of_y, of_gate
