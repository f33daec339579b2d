"""What surrounds a projector's products in Triton; `vlmops.ops.mlp_projector` has the formulas.

Elementwise kernels move a block of 1,024 elements, norms a row, kernels that sum 32 rows of 64
columns, whose sums torch adds up: no atomics, the same bits in every run. Bytes are those of the
CUDA kernels (csrc/ops/mlp_projector/mlp_projector.cuh), and the products are cuBLAS's as there.
LLaVA's hidden layer of 2,880 x 4,096 in bfloat16: 47 MB for its activation, 11 us at the 4.3 TB/s
that a copy reaches on an H200, beside 153 us of products. PREDICTED: none of this has run on a GPU.

Widths and activations are part of the compile key, numbers of rows and strides are not: strides of
x come in units of 8 elements where they are multiples of it. A norm is one program's, of 32,768
channels at most; more are refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops.mlp_projector_steps import Kernels

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.


@triton.jit
def _swish(b_x, b_u, b_slope):
    """Returns x sigmoid(u) and its derivative, where du/dx = b_slope."""
    b_e = tl.exp(-tl.where(b_u < -88.0, -88.0, b_u))  # finite
    b_s = 1.0 / (1.0 + b_e)
    b_f = b_x * b_s
    return b_f, b_s + b_f * (b_e * b_s) * b_slope


@triton.jit
def _activated(b_x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x) in float32."""
    if ACTIVATION == "gelu":
        b_below = 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))
        return b_x * b_below, b_below + 0.3989422804014327 * b_x * tl.exp(-0.5 * b_x * b_x)
    elif ACTIVATION == "gelu_tanh":
        b_square = b_x * b_x
        b_u = b_x * (1.5957691216057308 + 0.07135481627159756 * b_square)
        return _swish(b_x, b_u, 1.5957691216057308 + 0.2140644488147927 * b_square)
    elif ACTIVATION == "quick_gelu":
        return _swish(b_x, 1.702 * b_x, 1.702)
    elif ACTIVATION == "silu":
        return _swish(b_x, b_x, 1.0)
    elif ACTIVATION == "relu":
        m = b_x <= 0.0  # NaN stays
        return tl.where(m, 0.0, b_x), tl.where(m, 0.0, 1.0)
    else:
        return b_x, tl.full(b_x.shape, 1.0, tl.float32)


@triton.jit
def activate_kernel(
    p_hidden, p_gate, p_out, n_rows: tl.int64,
    W: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes activation(hidden), or activation(gate) * hidden."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n_rows * W  # known to be a multiple of what divides W
    b_x = tl.load(p_hidden + o, mask=m, other=0.0).to(tl.float32)
    if p_gate is None:
        b_y, _ = _activated(b_x, ACTIVATION)
    else:
        b_y, _ = _activated(tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32), ACTIVATION)
        b_y *= b_x
    tl.store(p_out + o, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def activate_backward_kernel(
    p_grad, p_hidden, p_gate, p_grad_hidden, p_grad_gate, p_out, p_hidden_sums, p_gate_sums,
    n_rows: tl.int64,
    W: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of a part of BM rows and BD columns, and their sums over the rows."""
    i_part = tl.program_id(0) // tl.cdiv(W, BD)
    o_d = tl.program_id(0) % tl.cdiv(W, BD) * BD + tl.arange(0, BD)
    o_row = i_part.to(tl.int64) * BM + tl.arange(0, BM)
    m = (o_row < n_rows)[:, None] & (o_d < W)[None, :]
    o = o_row[:, None] * W + o_d[None, :]
    b_g = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(p_hidden + o, mask=m, other=0.0).to(tl.float32)
    o_sum = i_part.to(tl.int64) * W + o_d
    if p_gate is None:
        b_y, b_slope = _activated(b_x, ACTIVATION)
        b_of_hidden = b_g * b_slope
    else:
        b_gate = tl.load(p_gate + o, mask=m, other=0.0).to(tl.float32)
        b_f, b_slope = _activated(b_gate, ACTIVATION)
        b_y = b_f * b_x
        b_of_hidden = b_g * b_f
        b_of_gate = (b_g * b_x * b_slope).to(p_grad_gate.dtype.element_ty)
        tl.store(p_grad_gate + o, b_of_gate, mask=m)
        if p_gate_sums is not None:
            tl.store(p_gate_sums + o_sum, tl.sum(b_of_gate.to(tl.float32), 0), mask=o_d < W)
    b_of_hidden = b_of_hidden.to(p_grad_hidden.dtype.element_ty)
    tl.store(p_grad_hidden + o, b_of_hidden, mask=m)
    if p_out is not None:
        tl.store(p_out + o, b_y.to(p_out.dtype.element_ty), mask=m)
    if p_hidden_sums is not None:
        tl.store(p_hidden_sums + o_sum, tl.sum(b_of_hidden.to(tl.float32), 0), mask=o_d < W)


@triton.jit
def _statistics(p_x, o_d, m, eps, W: tl.constexpr, LAYER: tl.constexpr):
    """A row less its mean, the mean, and what to multiply by."""
    b_x = tl.load(p_x + o_d, mask=m, other=0.0).to(tl.float32)
    b_mean = 0.0
    if LAYER:
        b_mean = tl.sum(b_x, 0) / W
        b_x = tl.where(m, b_x - b_mean, 0.0)
    return b_x, b_mean, 1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / W + eps)


@triton.jit
def _weight(p_weight, o_d, m, offset):
    if p_weight is None:
        return tl.full(o_d.shape, 1.0, tl.float32)
    return tl.load(p_weight + o_d, mask=m, other=0.0).to(tl.float32) + offset


@triton.jit
def norm_kernel(
    p_x, p_weight, p_bias, p_out, s_x: tl.int64, eps: tl.float32, offset: tl.float32,
    W: tl.constexpr, LAYER: tl.constexpr, VEC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m = o_d < W
    b_x, _, b_factor = _statistics(p_x + i_row * s_x * VEC, o_d, m, eps, W, LAYER)
    b_y = b_x * b_factor * _weight(p_weight, o_d, m, offset)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * W + o_d, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def norm_backward_kernel(
    p_grad, p_x, p_weight, p_grad_x, p_scales, s_x: tl.int64, eps: tl.float32, offset: tl.float32,
    W: tl.constexpr, LAYER: tl.constexpr, VEC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One row: (g - mean(g) - y mean(g y)) * factor, for "rms" without mean(g).

    y is what was normalised, g its gradient times the weight.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    m = o_d < W
    b_x, b_mean, b_factor = _statistics(p_x + i_row * s_x * VEC, o_d, m, eps, W, LAYER)
    tl.store(p_scales + 2 * i_row, b_mean)
    tl.store(p_scales + 2 * i_row + 1, b_factor)
    if p_grad_x is not None:
        b_y = b_x * b_factor
        b_g = tl.load(p_grad + i_row * W + o_d, mask=m, other=0.0).to(tl.float32)
        b_g *= _weight(p_weight, o_d, m, offset)
        b_of_x = b_g - b_y * (tl.sum(b_g * b_y, 0) / W)
        if LAYER:
            b_of_x -= tl.sum(b_g, 0) / W
        b_of_x *= b_factor
        tl.store(p_grad_x + i_row * W + o_d, b_of_x.to(p_grad_x.dtype.element_ty), mask=m)


@triton.jit
def norm_sums_kernel(
    p_grad, p_x, p_scales, p_weight_sums, p_bias_sums, n_rows: tl.int64, s_x: tl.int64,
    W: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over a part of BM rows, of BD columns."""
    i_part = tl.program_id(0) // tl.cdiv(W, BD)
    o_d = tl.program_id(0) % tl.cdiv(W, BD) * BD + tl.arange(0, BD)
    o_row = i_part.to(tl.int64) * BM + tl.arange(0, BM)
    m_row, m_d = o_row < n_rows, o_d < W
    m = m_row[:, None] & m_d[None, :]
    b_g = tl.load(p_grad + o_row[:, None] * W + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    o_sum = i_part.to(tl.int64) * W + o_d
    if p_bias_sums is not None:
        tl.store(p_bias_sums + o_sum, tl.sum(b_g, 0), mask=m_d)
    if p_weight_sums is not None:
        p_row = p_x + o_row * s_x * VEC
        b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_mean = tl.load(p_scales + 2 * o_row, mask=m_row, other=0.0)
        b_factor = tl.load(p_scales + 2 * o_row + 1, mask=m_row, other=0.0)
        b_y = (b_x - b_mean[:, None]) * b_factor[:, None]
        tl.store(p_weight_sums + o_sum, tl.sum(b_g * b_y, 0), mask=m_d)


CHECK = os.environ.get("VLMOPS_CHECK") == "1"
INTERPRETED = not isinstance(norm_kernel, triton.JITFunction)
MAX_NORM_CHANNELS = 32768
_BLOCK = 1024
_PART = {"BM": 32, "BD": 64}
_VECTOR = 8


def compiled() -> int:
    """Number of kernels that Triton has compiled in this process."""
    kernels = () if INTERPRETED else (
        activate_kernel, activate_backward_kernel, norm_kernel, norm_backward_kernel,
        norm_sums_kernel,
    )  # fmt: skip
    return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if 0 in grid:
        return
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.mlp_projector: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _grid(programs: int) -> tuple[int]:
    if programs >= 2**31:
        raise RuntimeError(
            "vlmops.mlp_projector: backend 'triton': x: expected fewer rows, a launch of Triton's "
            f"holds 2^31 - 1 programs, got {programs}; use backend='cuda'"
        )
    return (programs,)


def _parts(x: Tensor) -> tuple[int]:
    rows, width = x.shape
    return _grid(triton.cdiv(rows, _PART["BM"]) * triton.cdiv(width, _PART["BD"]))


def _sums(x: Tensor, needed: bool) -> Tensor:
    parts = triton.cdiv(len(x), _PART["BM"]) if needed else 0
    return x.new_empty(parts, x.shape[1], dtype=torch.float32)


def _or_none(t: Tensor, needed: bool) -> Tensor | None:
    return t if needed else None


def _of_rows(x: Tensor, norm: str) -> tuple[int, dict[str, Any]]:
    """The stride of x in units of VEC, and the compile-time arguments of what normalises rows."""
    width = x.shape[1]
    if width > MAX_NORM_CHANNELS:
        raise RuntimeError(
            f"vlmops.mlp_projector: backend 'triton': norm: expected at most {MAX_NORM_CHANNELS} "
            f"channels, which one program normalises, got {width}; use backend='cuda'"
        )
    vector = _VECTOR if x.stride(0) % _VECTOR == 0 else 1
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)
    return x.stride(0) // vector, {
        "W": width, "LAYER": norm == "layer", "VEC": vector, "BD": block, "num_warps": warps,
        "num_stages": 1,
    }  # fmt: skip


def _row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def norm(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float
) -> Tensor:
    """As ``vlmops::mlp_projector_norm``."""
    out = x.new_empty(x.shape)
    stride, constants = _of_rows(x, norm)
    args = (x, _row(weight), _row(bias), out, stride, eps, offset)
    _launch(norm_kernel, _grid(len(x)), x.device, *args, **constants)
    return out


def norm_backward(
    grad: Tensor, x: Tensor, norm: str, weight: Tensor | None, eps: float, offset: float,
    grad_x: Tensor | None, needs_weight: bool, needs_bias: bool,
) -> list[Tensor]:  # fmt: skip
    """As ``vlmops::mlp_projector_norm_backward``."""
    stride, constants = _of_rows(x, norm)
    scales = x.new_empty(len(x), 2, dtype=torch.float32)
    weight_sums, bias_sums = _sums(x, needs_weight), _sums(x, needs_bias)
    args = (grad, x, _row(weight), grad_x, scales, stride, eps, offset)
    _launch(norm_backward_kernel, _grid(len(x)), x.device, *args, **constants)
    if needs_weight or needs_bias:
        sums = _or_none(weight_sums, needs_weight), _or_none(bias_sums, needs_bias)
        _launch(
            norm_sums_kernel, _parts(x), x.device, grad, x, scales, *sums, len(x), stride,
            W=x.shape[1], VEC=constants["VEC"], **_PART, num_warps=4, num_stages=1,
        )  # fmt: skip
    return [weight_sums, bias_sums]


def activate(hidden: Tensor, gate: Tensor | None, activation: str, out: Tensor) -> None:
    """As ``vlmops::mlp_projector_activate``."""
    rows, width = hidden.shape
    _launch(
        activate_kernel, _grid(triton.cdiv(rows * width, _BLOCK)), hidden.device,
        hidden, gate, out, rows,
        W=width, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip


def activate_backward(
    grad: Tensor, hidden: Tensor, gate: Tensor | None, activation: str, grad_hidden: Tensor,
    needs_out: bool, needs_hidden_sums: bool, needs_gate_sums: bool,
) -> list[Tensor]:  # fmt: skip
    """As ``vlmops::mlp_projector_activate_backward``."""
    gated = gate is not None
    needs_gate_sums = needs_gate_sums and gated
    grad_gate = hidden.new_empty(hidden.shape if gated else (0,))
    out = hidden.new_empty(hidden.shape if needs_out else (0,))
    hidden_sums, gate_sums = _sums(hidden, needs_hidden_sums), _sums(hidden, needs_gate_sums)
    _launch(
        activate_backward_kernel, _parts(hidden), hidden.device,
        grad, hidden, gate, grad_hidden, _or_none(grad_gate, gated), _or_none(out, needs_out),
        _or_none(hidden_sums, needs_hidden_sums), _or_none(gate_sums, needs_gate_sums), len(hidden),
        W=hidden.shape[1], ACTIVATION=activation, **_PART, num_warps=4, num_stages=1,
    )  # fmt: skip
    return [grad_gate, out, hidden_sums, gate_sums]


def sum_rows(x: Tensor, like: Tensor) -> Tensor:
    """The platform's."""
    return x.sum(0, dtype=torch.float32).to(like.dtype)


KERNELS = Kernels(norm, norm_backward, activate, activate_backward, sum_rows)
