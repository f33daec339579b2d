"""Spatial aggregation: queries on a grid look at their own windows of several encoders' maps.

::

    out[b, y, x, h] = sum over t of softmax(scale * q[b, y, x, h] . k_t)_t v_t

where t are the tokens of one query: of each encoder's map ``[h_k, w_k]`` the window of
``m_h x m_w`` tokens, m_h = h_k / G_h and m_w = w_k / G_w, that lies where the query does on the
grid ``[G_h, G_w]``; all encoders' windows in one softmax. This is the cross-attention of
Cambrian-1's Spatial Vision Aggregator: 24 x 24 queries, maps of 24, 24, 24 and 96 tokens on a side,
16 heads of 64 channels.

Where the published code copies windows one by one and keys of all encoders into a row, this reads
them where they lie: no window is unfolded, no map copied. Logits, weights and sums are float32,
rounded once. Every token is one query's, so that gradients of keys and values are written once.
Nothing is saved for backward but the arguments.

A query of whose tokens none exists gives zeros. The published code never asks: it makes windows
that are masked as a whole exist again, each encoder's for itself (`vlmops.nn.existing_tokens`).

Source: Tong et al., Cambrian-1 (arXiv 2406.16860), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin

Masks = Sequence[Tensor | None]


def spatial_aggregate(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    masks: Masks | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of each query of a grid to its own windows of several maps, in one softmax.

    Differentiable in q, keys and values.

    Args:
        q: ``[B, G_h, G_w, H, D]``; float32, bfloat16 or float16; D a multiple of 8 up to 256; any
            strides, those of one query seen as many too.
        keys: For each of 1 to 8 encoders ``[B, h, w, H, D]``, h a multiple of G_h, w of G_w; dtype
            of q; any strides: slices of a fused product, or of a map, are not copied where channels
            lie side by side. At most 1,024 tokens for a query.
        values: Like keys, with their shapes.
        masks: For each encoder which tokens exist, bool ``[B, h, w]``, or None: all. Others are not
            read, and may be NaN. A query of whose tokens none exists gives zeros.
        scale: Of logits; None: ``D ** -0.5``.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say. Triton takes up to 4
            encoders.

    Returns:
        ``[B, G_h, G_w, H, D]``, dtype of q, contiguous.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor, or not a list of tensors.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q = torch.randn(1, 24, 24, 16, 64)
        >>> sides = (24, 24, 24, 96)
        >>> fused = [torch.randn(1, side, side, 2, 16, 64) for side in sides]
        >>> keys, values = zip(*(x.unbind(3) for x in fused))
        >>> vlmops.spatial_aggregate(q, keys, values).shape
        torch.Size([1, 24, 24, 16, 64])
    """
    args = (q, _listed("keys", keys), _listed("values", values), _masks(masks), scale)
    if torch.compiler.is_compiling():
        name = dispatch.choose("spatial_aggregate", backend, q.device.type)
        if name == "reference":
            return _plain(*args)
        result: Tensor = (_TRITON if name == "triton" else _COMPILED).forward(*args)
        return result
    _library.require()
    require_tensor("spatial_aggregate", "q", q)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not q.is_cpu:
        name = dispatch.choose("spatial_aggregate", backend, q.device.type)
        if name == "reference":
            return _plain(*args)
        if name == "triton":
            ops = _TRITON
    return _forward(ops, *args)


def reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    masks: Masks | None = None,
    scale: float | None = None,
) -> Tensor:
    """`spatial_aggregate` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """
    grid = q.shape[1:3]

    def windows(x: Tensor) -> Tensor:  # [B, G_h, G_w, tokens of a window, ..]
        x = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
        return x.transpose(2, 3).flatten(3, 4)

    k = torch.cat([windows(x.double()) for x in keys], 3)
    v = torch.cat([windows(x.double()) for x in values], 3)
    given = masks or [None] * len(keys)
    everything = [x.new_ones(x.shape[:3], dtype=torch.bool) for x in keys]
    exist = [e if m is None else m for m, e in zip(given, everything, strict=True)]
    mask = torch.cat([windows(x) for x in exist], 3)[..., None, None]
    # Twice: what does not exist shall be neither in the products nor in their gradients.
    k, v = torch.where(mask, k, 0.0), torch.where(mask, v, 0.0)
    logits = (q.double()[:, :, :, None] * k).sum(-1, keepdim=True)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    any_exists = mask.any(3, keepdim=True)
    weights = logits.masked_fill(~mask & any_exists, -torch.inf).softmax(3)
    return (torch.where(mask, weights, 0.0) * v).sum(3)


def _listed(name: str, tensors: Any) -> list[Tensor]:
    if not isinstance(tensors, list | tuple):
        raise TypeError(
            f"vlmops.spatial_aggregate: {name}: expected a list of tensors, one for each encoder, "
            f"got {type(tensors).__name__}"
        )
    for i, tensor in enumerate(tensors):
        require_tensor("spatial_aggregate", f"{name}[{i}]", tensor)
    return list(tensors)


def _masks(masks: Any) -> list[Tensor | None]:
    """None for all where a mask says so for each."""
    if masks is None or (isinstance(masks, list | tuple) and all(m is None for m in masks)):
        return []
    if not isinstance(masks, list | tuple):
        raise TypeError(
            "vlmops.spatial_aggregate: masks: expected a list of tensors or None, one for each "
            f"encoder, got {type(masks).__name__}"
        )
    for i, mask in enumerate(masks):
        if mask is not None:
            require_tensor("spatial_aggregate", f"masks[{i}]", mask)
    return list(masks)


class Arguments(NamedTuple):
    """What ``torch.ops.vlmops.spatial_aggregate`` takes; torch leaves out a scale of None."""

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    masks: Masks
    scale: float | None = None

    @property
    def differentiable(self) -> list[Tensor]:
        """In the order in which backward returns gradients."""
        return [self.q, *self.keys, *self.values]


def _plain(*args: Any) -> Tensor:
    """`reference`, rounded: a backend, and derivatives without a kernel."""
    a = Arguments(*args)
    return reference(a.q, a.keys, a.values, masks=a.masks, scale=a.scale).to(a.q.dtype)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.
# autograd.Function looks into no list: it takes the tensors one by one.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class _SpatialAggregate(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(ctx: Any, ops: _Ops, pack: Callable[..., Arguments], *tensors: Any) -> Tensor:
        ctx.ops, ctx.pack = ops, pack
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = ops.forward(*pack(*tensors))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a = ctx.pack(*ctx.saved_tensors)
        count = len(a.differentiable)
        needs = [int(needed) for needed in ctx.needs_input_grad[2 : 2 + count]]
        grads = _backward(ctx.ops, grad, needs, *a)
        used = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        return None, None, *used, *[None] * len(a.masks)


def _apart(a: Arguments) -> tuple[list[Any], Callable[..., Arguments]]:
    """The tensors among the op's arguments, and what makes arguments of them again."""
    count, scale = len(a.keys), a.scale

    def together(q: Tensor, *given: Any) -> Arguments:
        keys, values, masks = given[:count], given[count : 2 * count], given[2 * count :]
        return Arguments(q, list(keys), list(values), list(masks), scale)

    return [*a.differentiable, *a.masks], together


def _forward(ops: _Ops, *args: Any) -> Tensor:
    """Skips autograd's Python layer when no derivative can be asked for."""
    if forward_ad._current_level >= 0:
        return _plain(*args)
    a = Arguments(*args)
    recorded = wants_grad(*a.differentiable)
    result: Tensor
    if torch._C._functorch.maybe_current_level() is not None:
        result = _plain(*args) if recorded else ops.forward(*args)
    elif recorded:
        tensors, together = _apart(a)
        result = _SpatialAggregate.apply(ops, together, *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch._C._AutoDispatchBelowAutograd():
            result = ops.forward(*args)
    return result


def _backward(ops: _Ops, grad: Tensor, needs: Sequence[int], *args: Any) -> list[Tensor]:
    """The gradients of q, keys and values; an empty tensor for one that nobody needs."""
    a = Arguments(*args)
    if not wants_grad(grad, *a.differentiable):
        with torch._C._AutoDispatchBelowAutograd():
            result: list[Tensor] = ops.backward(grad, needs, *args)
        return result
    count = len(a.keys)

    def plain(q: Tensor, *given: Any) -> Tensor:
        return _plain(q, given[:count], given[count:], a.masks, a.scale)

    return plain_gradients(plain, a.differentiable, (), [n != 0 for n in needs], grad)


def _fake(*args: Any) -> Tensor:
    a = Arguments(*args)
    others = dict(zip(_names(a)[1:], [*a.keys, *a.values, *a.masks], strict=True))
    same_device("spatial_aggregate", "q", a.q, **others)
    return a.q.new_empty(a.q.shape)


def _names(a: Arguments) -> list[str]:
    lists = {"keys": a.keys, "values": a.values, "masks": a.masks}
    return ["q", *(f"{name}[{i}]" for name, of in lists.items() for i in range(len(of)))]


def _fake_backward(grad: Tensor, needs: Sequence[int], *args: Any) -> list[Tensor]:
    a = Arguments(*args)
    same_device("spatial_aggregate_backward", "q", a.q, grad=grad)
    return [
        t.new_empty(t.shape if needed else 0)
        for t, needed in zip(a.differentiable, needs, strict=True)
    ]


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "spatial_aggregate")
    _TRITON = triton_twin(_lib, "spatial_aggregate", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
