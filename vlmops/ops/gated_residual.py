"""Gated residual: what a tanh-gated cross-attention layer adds to its residual, in one pass.

::

    out[r] = x[r] + tanh(gate) * y[r]     where row_mask[r], or without one
    out[r] = x[r]                         elsewhere; y is not read there

========  =========================================================================================
model     arguments
========  =========================================================================================
Mllama    gate [1]: attention without a mask; MLP with row_mask, the rows that see an image (its
          ``full_text_row_masked_out_mask``)
Idefics   gate [1] or [1, 1, C]: attention with row_mask (its ``cross_attention_gate != 0``), MLP
          without
Flamingo  gate [1], no mask
========  =========================================================================================

Where Hugging Face multiplies the rows of y by 0 (Mllama) or fills them with zeros (Idefics), this
leaves them out: the same for finite y, and x to the bit, while 0 * NaN is NaN.

tanh and sum are float32, rounded once. The gradient of x is the gradient of the result itself, no
copy. y is saved for the gate's gradient alone: frozen gates save none. Sums over rows are float64,
or as exact, in one order.

Sources: Alayrac et al., Flamingo (arXiv 2204.14198); Laurençon et al., OBELICS (Idefics, arXiv
2306.16527); Llama Team, The Llama 3 Herd of Models (arXiv 2407.21783).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    row_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds tanh(gate) * y to x, in the rows that row_mask names.

    Differentiable in x, y and gate.

    Args:
        x: The residual, ``[.., C]``; float32, bfloat16 or float16; any strides.
        y: What is gated; shape and dtype of x, any strides.
        gate: One number, in any shape, or C numbers, ``[C]`` or ``[1, .., 1, C]``; float32,
            bfloat16 or float16, whatever x has.
        row_mask: bool ``x.shape[:-1]``: the rows that y is added to. Others are x to the bit, and y
            may be NaN there. None: all rows.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        Shape and dtype of x; contiguous.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> residual, hidden = torch.randn(2, 1, 512, 4096)
        >>> gate = torch.tensor([0.3])
        >>> sees_an_image = torch.arange(512).expand(1, 512) > 3
        >>> out = vlmops.gated_residual(residual, hidden, gate, sees_an_image)
        >>> torch.equal(out[:, :4], residual[:, :4])
        True
    """
    args = (x, y, gate, row_mask)
    if torch.compiler.is_compiling():
        name = dispatch.choose("gated_residual", backend, x.device.type)
        if name == "reference":
            return _plain(*args)
        result: Tensor = (_TRITON if name == "triton" else _COMPILED).forward(*args)
        return result
    _library.require()
    for argument, tensor in {"x": x, "y": y, "gate": gate, "row_mask": row_mask}.items():
        if tensor is not None or argument != "row_mask":
            require_tensor("gated_residual", argument, tensor)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not x.is_cpu:
        name = dispatch.choose("gated_residual", backend, x.device.type)
        if name == "reference":
            return _plain(*args)
        if name == "triton":
            ops = _TRITON
    return _forward(ops, *args)


def reference(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """`gated_residual` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """
    x, tanh = x.double(), gate.double().flatten().tanh()
    if row_mask is None:
        return x + tanh * y.double()
    added = row_mask[..., None]
    # Twice: what is not added shall be neither in the sum nor in the gate's gradient.
    return torch.where(added, x + tanh * torch.where(added, y.double(), 0.0), x)


def _plain(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """`reference`, rounded: a backend, and derivatives without a kernel."""
    return reference(x, y, gate, row_mask).to(x.dtype)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class _GatedResidual(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(
        ctx: Any, ops: _Ops, x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None
    ) -> Tensor:
        ctx.ops = ops
        _, _, needs_y, needs_gate, _ = ctx.needs_input_grad
        if needs_y or needs_gate:
            ctx.save_for_backward(y if needs_gate else None, gate, row_mask)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = ops.forward(x, y, gate, row_mask)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_y, needs_gate, _ = ctx.needs_input_grad
        of_y = of_gate = None
        if needs_y or needs_gate:
            y, gate, row_mask = ctx.saved_tensors
            of_y, of_gate = _backward(ctx.ops, grad, y, gate, row_mask, needs_y, needs_gate)
        return (
            None,
            grad if needs_x else None,
            of_y if needs_y else None,
            of_gate if needs_gate else None,
            None,
        )


def _forward(
    ops: _Ops, x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None
) -> Tensor:
    """Skips autograd's Python layer when no derivative can be asked for."""
    args = (x, y, gate, row_mask)
    if forward_ad._current_level >= 0:
        return _plain(*args)
    recorded = wants_grad(x, y, gate)
    result: Tensor
    if torch._C._functorch.maybe_current_level() is not None:
        result = _plain(*args) if recorded else ops.forward(*args)
    elif recorded:
        result = _GatedResidual.apply(ops, *args)  # type: ignore[no-untyped-call]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = ops.forward(*args)
    return result


def _backward(
    ops: _Ops,
    grad: Tensor,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None = None,
    needs_y: bool = True,
    needs_gate: bool = True,
) -> Sequence[Tensor]:
    """The gradients of y and gate; an empty tensor for one that nobody needs."""
    if not wants_grad(grad, y, gate):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.backward(grad, y, gate, row_mask, needs_y, needs_gate)
        return result
    nothing = grad.detach().new_zeros(()).expand(grad.shape)
    plain = functools.partial(_plain, nothing)
    tensors = (nothing if y is None else y, gate)
    return plain_gradients(plain, tensors, (row_mask,), (needs_y, needs_gate), grad)


def _fake(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    same_device("gated_residual", "x", x, y=y, gate=gate, row_mask=row_mask)
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor,
    y: Tensor | None,
    gate: Tensor,
    row_mask: Tensor | None = None,
    needs_y: bool = True,
    needs_gate: bool = True,
) -> tuple[Tensor, Tensor]:
    same_device("gated_residual_backward", "grad", grad, y=y, gate=gate, row_mask=row_mask)
    return (
        grad.new_empty(grad.shape if needs_y else 0),
        gate.new_empty(gate.shape if needs_gate else 0),
    )


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "gated_residual")
    _TRITON = triton_twin(_lib, "gated_residual", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
