"""A norm behind a sum, in one pass: what follows a product in transformer blocks.

::

    s = x + x_bias + residual            x_bias and residual where they are given
    out = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias        layer norm, over channels
    out = s / sqrt(mean(s^2) + eps) * weight                        rms=True

======================================  ==========================================================
block                                   arguments
======================================  ==========================================================
post-norm: Q-Former, BERT, BLIP's text  x: the product without its bias, x_bias, residual, weight,
                                        bias, eps 1e-12
pre-norm: ViT, CLIP, LLaMA, perceivers  the last product and the residual before it;
                                        return_sum=True: the sum is the next residual
norms of q and k, of latents            residual None; heads ``[B, S, H, D]`` as a projection leaves
                                        them, C = D
======================================  ==========================================================

The sum is float32 and normed before it is rounded; it is returned, and kept for backward, rounded
once. Nothing else is kept: mean and variance are computed again from it, so that this holds less
than torch's layer norm does. x and residual have one gradient, and it is one tensor. Sums over rows
are added up in one order.

Sources: Ba et al., Layer Normalization (arXiv 1607.06450); Zhang and Sennrich, Root Mean Square
Layer Normalization (arXiv 1910.07467); Devlin et al., BERT (arXiv 1810.04805); Li et al., BLIP-2
(arXiv 2301.12597).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin


@overload
def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    return_sum: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    return_sum: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Norms x + x_bias + residual over its channels.

    Differentiable in every tensor.

    Args:
        x: ``[.., C]``; float32, bfloat16 or float16. Rows with any strides are read where they lie,
            if channels lie side by side.
        residual: What is added: shape and dtype of x, or a shape that expands to it.
        weight: ``[C]``, multiplies what was normed; float32, bfloat16 or float16, whatever x has.
            None: ones.
        bias: ``[C]``, is added to that; dtypes as weight. None with rms=True.
        x_bias: ``[C]``, is added to x: the bias of the product that x comes from; dtypes as weight.
        eps: Added to the variance, or to the mean square; positive.
        rms: RMSNorm, which subtracts no mean, in place of LayerNorm.
        return_sum: Whether the sum is returned too.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        Shape and dtype of x; contiguous. With return_sum the pair of that and the sum, which is x
        itself where nothing is added.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> hidden, residual = torch.randn(2, 8, 32, 768)
        >>> dense, norm = torch.nn.Linear(768, 768), torch.nn.LayerNorm(768, eps=1e-12)
        >>> out = vlmops.add_norm(
        ...     hidden @ dense.weight.t(), residual, norm.weight, norm.bias,
        ...     x_bias=dense.bias, eps=norm.eps,
        ... )
        >>> torch.allclose(out, norm(dense(hidden) + residual), atol=1e-5)
        True
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _library.require()
        require_tensor("add_norm", "x", x)
        optional = {"residual": residual, "weight": weight, "bias": bias, "x_bias": x_bias}
        for argument, tensor in optional.items():
            if tensor is not None:
                require_tensor("add_norm", argument, tensor)
    if residual is not None and residual.shape != x.shape:
        residual = _expanded(residual, x)
    added = residual is not None or x_bias is not None
    args = (x, residual, weight, bias, x_bias, eps, rms, return_sum)
    ops = _COMPILED
    name = None
    if compiling or backend is not None or dispatch.asked.get() is not None or not x.is_cpu:
        name = dispatch.choose("add_norm", backend, x.device.type)
        if name == "triton":
            ops = _TRITON
    if name == "reference":
        out, total = _plain(*args)
    elif compiling:
        out, total = ops.forward(*args)
    else:
        out, total = _forward(ops, *args)
    if not return_sum:
        return out
    return out, total if added else x


def _expanded(residual: Tensor, x: Tensor) -> Tensor:
    """Residual seen in x's shape, if it is; what it is otherwise, which is refused by name."""
    if residual.dim() > x.dim():
        return residual
    pairs = zip(reversed(residual.shape), reversed(x.shape), strict=False)
    return residual.expand(x.shape) if all(a in (1, b) for a, b in pairs) else residual


def reference(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_norm` and its sum in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """
    s = x.double()
    for more in (x_bias, residual):
        if more is not None:
            s = s + more.double()
    centred = s if rms else s - s.mean(-1, keepdim=True)
    out = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        out = out * weight.double()
    return out if bias is None else out + bias.double(), s


def _plain(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    needs_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """`reference`, rounded: a backend, and derivatives without a kernel."""
    out, s = reference(x, residual, weight, bias, x_bias, eps, rms)
    kept = needs_sum and (residual is not None or x_bias is not None)
    return out.to(x.dtype), s.to(x.dtype) if kept else x.new_empty(0)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class _AddNorm(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: _Ops,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x_bias: Tensor | None,
        eps: float,
        rms: bool,
        needs_sum: bool,
    ) -> tuple[Tensor, Tensor]:
        _, needs_x, needs_residual, needs_weight, needs_bias, needs_x_bias, *_ = (
            ctx.needs_input_grad
        )
        of_sum = needs_x or needs_residual
        ctx.ops, ctx.options, ctx.rms = ops, (eps, rms), rms
        ctx.needs = of_sum, needs_weight, needs_bias, needs_x_bias
        reads = of_sum or needs_weight or needs_x_bias
        with torch._C._AutoDispatchBelowAutograd():
            out, total = ops.forward(
                x, residual, weight, bias, x_bias, eps, rms, needs_sum or reads
            )
        added = residual is not None or x_bias is not None
        normed = (total if added else x) if reads else None
        ctx.save_for_backward(
            normed, weight, bias if needs_bias else None, x_bias if needs_x_bias else None
        )
        ctx.set_materialize_grads(False)
        if not added or not (of_sum or needs_x_bias):
            ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_sum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        normed, weight, bias, x_bias = ctx.saved_tensors
        if grad is None:
            if grad_sum is None:
                return (None,) * 9
            grad = torch.zeros_like(grad_sum)
        grads = _backward(
            ctx.ops, grad, normed, weight, bias, x_bias, grad_sum, *ctx.options, *ctx.needs
        )
        of_sum, *of_vectors = (
            g if needed else None for g, needed in zip(grads, ctx.needs, strict=True)
        )
        _, needs_x, needs_residual, *_ = ctx.needs_input_grad
        of_x, of_residual = of_sum if needs_x else None, of_sum if needs_residual else None
        return None, of_x, of_residual, *of_vectors, None, None, None


def _forward(
    ops: _Ops,
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    needs_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """Skips autograd's Python layer when no derivative can be asked for."""
    args = (x, residual, weight, bias, x_bias, eps, rms, needs_sum)
    if forward_ad._current_level >= 0:
        return _plain(*args)
    recorded = wants_grad(x, residual, weight, bias, x_bias)
    result: tuple[Tensor, Tensor]
    if torch._C._functorch.maybe_current_level() is not None:
        result = _plain(*args) if recorded else ops.forward(*args)
    elif recorded:
        result = _AddNorm.apply(ops, *args)  # type: ignore[no-untyped-call]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = ops.forward(*args)
    return result


def _backward(
    ops: _Ops,
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
) -> Sequence[Tensor]:
    """The gradients of sum, weight, bias and x_bias; an empty tensor for one that nobody needs."""
    needs = (needs_sum, needs_weight, needs_bias, needs_x_bias)
    vectors = (weight, bias, x_bias)
    if not wants_grad(grad, total, *vectors, grad_sum):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.backward(
                grad, total, *vectors, grad_sum, eps, rms, *needs
            )
        return result
    ones, zeros = grad.new_ones(grad.shape[-1]), grad.new_zeros(grad.shape[-1])
    given = (grad.detach() if total is None else total, ones if weight is None else weight,
             zeros if bias is None else bias)  # fmt: skip
    # Views: the sum comes from a node of this class, which derivatives by the weight alone would
    # otherwise be followed through.
    inputs = [t.view_as(t) for t in given]

    def plain(s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _plain(s, None, weight, bias, None, eps, rms)[0]

    of_sum, of_weight, of_bias = plain_gradients(
        plain, inputs, (), (needs_sum or needs_x_bias, needs_weight, needs_bias), grad
    )
    if grad_sum is not None and (needs_sum or needs_x_bias):
        of_sum = of_sum + grad_sum
    of_x_bias = grad.new_empty(0)
    if needs_x_bias and x_bias is not None:
        of_x_bias = of_sum.flatten(0, -2).sum(0, dtype=torch.float32).to(x_bias.dtype)
    return [of_sum if needs_sum else grad.new_empty(0), of_weight, of_bias, of_x_bias]


def _fake(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    needs_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    same_device("add_norm", "x", x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    kept = needs_sum and (residual is not None or x_bias is not None)
    return x.new_empty(x.shape), x.new_empty(x.shape if kept else 0)


def _fake_backward(
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
    same_device(
        "add_norm_backward", "grad", grad, sum=total, weight=weight, bias=bias, x_bias=x_bias,
        grad_sum=grad_sum,
    )  # fmt: skip

    def of(vector: Tensor | None, needed: bool) -> Tensor:
        return grad.new_empty(0) if vector is None or not needed else vector.new_empty(vector.shape)

    return (
        grad.new_empty(grad.shape if needs_sum else 0),
        of(weight, needs_weight),
        of(bias, needs_bias),
        of(x_bias, needs_x_bias),
    )


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "add_norm")
    _TRITON = triton_twin(_lib, "add_norm", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
