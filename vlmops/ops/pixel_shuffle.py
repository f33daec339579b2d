"""Pixel shuffle: blocks of f x f visual tokens become one, fused with a norm or an average.

For the block (i, j) of an image's grid, with x its f * f tokens of C channels::

    y[(dy * f + dx) * C + c] = x[i * f + dy, j * f + dx][c]        order "yxc", K = f * f * C
    y[c * f * f + dy * f + dx] = x[i * f + dy, j * f + dx][c]      order "cyx", as unfold has it
    y[c] = mean over dy, dx of x[i * f + dy, j * f + dx][c]        reduction "mean", K = C

Blocks follow each other row by row. A norm is taken over the K channels of y, or with
``norm_axis="channel"`` over the C channels of each token before it is merged::

    z = (x - mean(x)) / sqrt(var(x) + eps) * (norm_offset + norm_weight) + norm_bias     "layer"
    z = x / sqrt(mean(x ** 2) + eps) * (norm_offset + norm_weight) + norm_bias           "rms"

What models do is arguments:

===================  ==============================================================================
model                arguments
===================  ==============================================================================
InternVL             skip_prefix=1, norm="layer"
Idefics3             none
SmolVLM              factor=3 or 4
Llama-4              none (its towers' class token is last, and dropped before)
Ovis2                factor=hidden_stride
Qwen2-VL             grid_hw="blocks", norm="layer", norm_axis="channel", eps=1e-6
Qwen2.5-VL           grid_hw="blocks", norm="rms", norm_axis="channel", eps=1e-6
Qwen3-VL             as Qwen2-VL; its deepstack mergers norm_axis="merged"
Mistral-3            grid_hw=[(h, w), ..], order="cyx", norm="rms", norm_axis="channel",
                     drop_remainder=True
GLM-4V               grid_hw="blocks", order="cyx", norm="rms", norm_axis="channel": the operand of
                     its convolution's weight [D, C * 2 * 2]
Gemma-3              factor=4, reduction="mean", norm="rms", norm_offset=1.0, eps=1e-6
LLaVA-NeXT-Video     reduction="mean"
Phi-4                reduction="mean" (odd grids are reflected by the caller)
===================  ==============================================================================

Data is read once and written once. Statistics are float32, and the result is rounded once. Backward
computes statistics again from hidden_states, which it reads anyway, so that without a norm nothing
is saved, and with one the input alone.

torch.nn.functional.pixel_unshuffle moves in the direction of this op, on ``[B, C, H, W]``.

Sources: Shi et al., Real-Time Single Image Super-Resolution (arXiv 1609.05158); Chen et al., How
Far Are We to GPT-4V? (InternVL 1.5, arXiv 2404.16821).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, register, triton_twin

Grid = tuple[int, int] | Sequence[tuple[int, int]] | Literal["blocks"]
Order = Literal["yxc", "cyx"]
Norm = Literal["layer", "rms"]
NormAxis = Literal["merged", "channel"]


class Options(NamedTuple):
    """What ``torch.ops.vlmops.pixel_shuffle`` takes beside hidden_states, with its defaults."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    factor: int = 2
    layout: str = "auto"
    """``"auto"``, ``"grid"`` (one for all), ``"packed"`` (one for each image) or ``"blocks"``."""
    grid_hw: Sequence[int] = ()
    order: str = "yxc"
    norm: str = "none"
    norm_axis: str = "merged"
    eps: float = 1e-5
    norm_offset: float = 0.0
    reduction: str = "none"
    skip_prefix: int = 0
    drop_remainder: bool = False


def pixel_shuffle(
    hidden_states: Tensor,
    factor: int = 2,
    *,
    grid_hw: Grid | None = None,
    order: Order = "yxc",
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_axis: NormAxis = "merged",
    norm_offset: float = 0.0,
    reduction: Literal["mean"] | None = None,
    skip_prefix: int = 0,
    drop_remainder: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Merges each block of factor x factor tokens into one token, or averages it.

    Differentiable in hidden_states, norm_weight and norm_bias. Without norm and reduction the bits
    are moved; else arithmetic is float32, rounded once.

    Args:
        hidden_states: Tokens ``[B, N, C]``, ``[N, C]`` or ``[B, h, w, C]``, rows of the grid one
            after the other; N = skip_prefix + h * w, or the sum of that over images that are
            packed into one sequence; float32, bfloat16 or float16; any strides.
        factor: f, tokens on a side of a block; 1 to 16.
        grid_hw: ``(h, w)`` of all images; a list of them, one for each image that is packed into
            ``[N, C]`` or ``[1, N, C]``; None: square, or what ``[B, h, w, C]`` says; ``"blocks"``:
            the f * f tokens of a block follow each other already, as in Qwen's towers. Then the
            shuffle alone is ``hidden_states.view(B, -1, f * f * C)``, and this op makes a copy.
        order: Of the channels of a merged token: ``"yxc"`` (row, column, channel) or ``"cyx"``.
        norm: ``"layer"``, ``"rms"`` or None.
        norm_weight: ``[K]``, or ``[C]`` with ``norm_axis="channel"``; float32, bfloat16 or float16.
        norm_bias: The same.
        eps: Added to the variance, or to the mean of squares; positive.
        norm_axis: ``"merged"``: over the K channels of the result; ``"channel"``: over the C of
            each token, before the merge.
        norm_offset: Added to norm_weight in float32; 1.0 for Gemma's (1 + weight).
        reduction: ``"mean"`` averages a block instead of merging it, in float32, as AvgPool2d does;
            a norm is taken over the average.
        skip_prefix: Tokens before each image's grid that are left out.
        drop_remainder: Leaves out the last rows and columns that the factor leaves, as unfold and
            AvgPool2d do; False: an error.
        out: Where to write the result; channels side by side, memory of its own. None: new memory.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[B, N / f^2, K]``, K = f^2 * C, or C with ``reduction="mean"``; ``[N / f^2, K]`` for
        ``[N, C]``; contiguous, or ``out``.

    Raises:
        RuntimeError: an argument does not fit, out is given where a gradient is wanted, or the
            backend that was asked for cannot run; the message names it, what was expected, what
            came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor, or grid_hw not a grid.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> tiles = torch.randn(13, 1025, 1024)  # InternVL: a class token, then 32 x 32
        >>> weight, bias = torch.ones(4096), torch.zeros(4096)
        >>> tokens = vlmops.pixel_shuffle(tiles, skip_prefix=1, norm="layer", norm_weight=weight,
        ...                               norm_bias=bias)
        >>> tokens.shape
        torch.Size([13, 256, 4096])
    """
    layout, sides = _layout("pixel_shuffle", grid_hw)
    options = (norm_weight, norm_bias, factor, layout, sides, order, norm or "none", norm_axis, eps,
               norm_offset, reduction or "none", skip_prefix, drop_remainder)  # fmt: skip
    if torch.compiler.is_compiling():
        name = dispatch.choose("pixel_shuffle", backend, hidden_states.device.type)
        if name == "reference":
            result = _plain(hidden_states, *options)
            if out is not None:
                out.copy_(result)
            return result if out is None else out
        ops = _TRITON if name == "triton" else _COMPILED
        if out is None:
            made: Tensor = ops.forward(hidden_states, *options)
            return made
        ops.out(hidden_states, out, *options)
        return out
    _library.require()
    require_tensor("pixel_shuffle", "hidden_states", hidden_states)
    given = {"norm_weight": norm_weight, "norm_bias": norm_bias, "out": out}
    for argument, tensor in given.items():
        if tensor is not None:
            require_tensor("pixel_shuffle", argument, tensor)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not hidden_states.is_cpu:
        name = dispatch.choose("pixel_shuffle", backend, hidden_states.device.type)
        if name == "reference":
            result = _plain(hidden_states, *options)
            return result if out is None else out.copy_(result)
        if name == "triton":
            ops = _TRITON
    if out is None:
        return _forward(ops, hidden_states, *options)
    _into(ops, hidden_states, out, *options)
    return out


def pixel_shuffle_inverse(
    hidden_states: Tensor,
    factor: int = 2,
    *,
    grid_hw: Grid | None = None,
    order: Order = "yxc",
    backend: str | None = None,
) -> Tensor:
    """Gives each token its block of factor x factor tokens back: undoes `pixel_shuffle` to the bit.

    Differentiable. torch.nn.functional.pixel_shuffle moves in this direction, on ``[B, C, H, W]``,
    while this module's names follow Hugging Face, whose pixel_shuffle is torch's pixel_unshuffle.

    Args:
        hidden_states: ``[B, N, f^2 * C]`` or ``[N, f^2 * C]``; float32, bfloat16 or float16; any
            strides.
        factor: f; 1 to 16.
        grid_hw: As it was given to `pixel_shuffle`: h and w of the result.
        order: As it was given to `pixel_shuffle`.
        backend: See `pixel_shuffle`.

    Returns:
        ``[B, N * f^2, C]`` or ``[N * f^2, C]``, contiguous.

    Raises: as `pixel_shuffle`.

    Example:
        >>> x = torch.randn(1, 35 * 20, 8)
        >>> y = vlmops.pixel_shuffle(x, 5, grid_hw=(35, 20))
        >>> torch.equal(vlmops.pixel_shuffle_inverse(y, 5, grid_hw=(35, 20)), x)
        True
    """
    layout, sides = _layout("pixel_shuffle_inverse", grid_hw)
    options = (factor, layout, sides, order)
    if not torch.compiler.is_compiling():
        _library.require()
        require_tensor("pixel_shuffle_inverse", "hidden_states", hidden_states)
    name = dispatch.choose("pixel_shuffle", backend, hidden_states.device.type)
    if name == "reference":
        return _plain_inverse(hidden_states, *options)
    ops = _TRITON if name == "triton" else _COMPILED
    result: Tensor = ops.inverse(hidden_states, *options)
    return result


def reference(
    hidden_states: Tensor,
    factor: int = 2,
    *,
    grid_hw: Grid | None = None,
    order: Order = "yxc",
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_axis: NormAxis = "merged",
    norm_offset: float = 0.0,
    reduction: Literal["mean"] | None = None,
    skip_prefix: int = 0,
    drop_remainder: bool = False,
) -> Tensor:
    """`pixel_shuffle` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """

    def normed(x: Tensor) -> Tensor:
        weight = None if norm_weight is None else norm_offset + norm_weight.double()
        bias = None if norm_bias is None else norm_bias.double()
        if norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def merged(blocks: Tensor) -> Tensor:  # [B, T, f * f, C]
        if reduction == "mean":
            y = blocks.mean(2)
            return y if norm is None else normed(y)
        if norm is not None and norm_axis == "channel":
            blocks = normed(blocks)
        y = blocks.flatten(2) if order == "yxc" else blocks.transpose(2, 3).flatten(2)
        return normed(y) if norm is not None and norm_axis == "merged" else y

    del drop_remainder  # what is left is always dropped here
    x = hidden_states.double()
    y = torch.cat([merged(blocks) for blocks in _blocks(x, factor, grid_hw, skip_prefix)], 1)
    return y[0] if x.dim() == 2 else y


def _blocks(x: Tensor, factor: int, grid_hw: Grid | None, skip_prefix: int) -> list[Tensor]:
    """The blocks ``[B, T, f * f, C]`` of each image of a sequence, or of the images of a batch."""
    channels = x.shape[-1]
    if not isinstance(grid_hw, str) and grid_hw is not None and len(grid_hw) == 0:
        return [x.reshape(1, 0, factor**2, channels)]
    if isinstance(grid_hw, str):
        x = x[None] if x.dim() == 2 else x
        x = x[:, skip_prefix:]
        return [x.reshape(len(x), x.shape[1] // factor**2, factor**2, channels)]
    if x.dim() == 4:
        grids = [x]
    else:
        x = x[None] if x.dim() == 2 else x
        if grid_hw is None:
            side = math.isqrt(x.shape[1] - skip_prefix)
            sides = [(side, side)]
        elif len(grid_hw) == 2 and isinstance(grid_hw[0], int):
            sides = [grid_hw]  # type: ignore[list-item]
        else:
            sides = list(grid_hw)  # type: ignore[arg-type]
        images = x.split([skip_prefix + h * w for h, w in sides], 1)
        grids = [
            image[:, skip_prefix:].unflatten(1, (h, w))
            for image, (h, w) in zip(images, sides, strict=True)
        ]
    found = []
    for grid in grids:
        h, w = grid.shape[1] // factor, grid.shape[2] // factor
        grid = grid[:, : h * factor, : w * factor]
        grid = grid.reshape(len(grid), h, factor, w, factor, channels).transpose(2, 3)
        found.append(grid.reshape(len(grid), h * w, factor**2, channels))
    return found


def reference_inverse(
    hidden_states: Tensor,
    factor: int = 2,
    *,
    grid_hw: Grid | None = None,
    order: Order = "yxc",
) -> Tensor:
    """`pixel_shuffle_inverse` in plain torch."""
    x = hidden_states[None] if hidden_states.dim() == 2 else hidden_states
    area = factor**2
    channels = x.shape[-1] // area
    shape = (len(x), x.shape[1] * area, channels)
    # Which element of its input each element of the shuffle comes from, undone.
    where = torch.arange(math.prod(shape), device=x.device).view(shape)
    blocks = torch.cat(_blocks(where, factor, grid_hw, 0), 1)
    if order == "cyx":
        blocks = blocks.transpose(2, 3)
    y = x.flatten()[blocks.flatten().argsort()].view(shape)
    return y[0] if hidden_states.dim() == 2 else y


def _layout(op: str, grid_hw: Any) -> tuple[str, list[int]]:
    """``layout`` and ``grid_hw`` of the op."""
    if grid_hw is None:
        return "auto", []
    if isinstance(grid_hw, str):
        if grid_hw == "blocks":
            return "blocks", []
    elif isinstance(grid_hw, Sequence):
        if len(grid_hw) == 2 and all(isinstance(side, int | torch.SymInt) for side in grid_hw):
            return "grid", list(grid_hw)
        pairs = [list(pair) for pair in grid_hw if isinstance(pair, Sequence) and len(pair) == 2]
        sides = [side for pair in pairs for side in pair]
        if len(pairs) == len(grid_hw) and all(isinstance(s, int | torch.SymInt) for s in sides):
            return "packed", sides
    raise TypeError(
        f"vlmops.{op}: grid_hw: expected None, (h, w), a list of (h, w) or 'blocks', got "
        f"{grid_hw!r}"
    )


def _grid_of(o: Options) -> Grid | None:
    """``grid_hw`` of the function, for `_layout`'s."""
    pairs = list(zip(o.grid_hw[::2], o.grid_hw[1::2], strict=True))
    grids: dict[str, Any] = {"auto": None, "blocks": "blocks", "packed": pairs}
    grid: Grid | None = pairs[0] if o.layout == "grid" else grids[o.layout]
    return grid


def _plain(hidden_states: Tensor, *args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    o = Options(*args)
    result = reference(
        hidden_states,
        o.factor,
        grid_hw=_grid_of(o),
        order=o.order,  # type: ignore[arg-type]
        norm=None if o.norm == "none" else o.norm,  # type: ignore[arg-type]
        norm_weight=o.norm_weight,
        norm_bias=o.norm_bias,
        eps=o.eps,
        norm_axis=o.norm_axis,  # type: ignore[arg-type]
        norm_offset=o.norm_offset,
        reduction=None if o.reduction == "none" else "mean",
        skip_prefix=o.skip_prefix,
    )
    return result.to(hidden_states.dtype)


def _plain_inverse(hidden_states: Tensor, *args: Any) -> Tensor:
    o = Options(None, None, *args)
    order: Any = o.order
    return reference_inverse(hidden_states, o.factor, grid_hw=_grid_of(o), order=order)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    out: Any
    backward: Any
    inverse: Any


class _Shuffle(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: _Ops,
        hidden_states: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        options = Options(norm_weight, norm_bias, *rest)
        ctx.ops, ctx.rest, ctx.shape = ops, options[2:], hidden_states.shape
        saved = None if options.norm == "none" else hidden_states
        ctx.save_for_backward(saved, norm_weight, norm_bias)
        return _call(ops.forward, hidden_states, norm_weight, norm_bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, *norm = ctx.saved_tensors
        if hidden_states is None:  # nothing of it is read but its shape
            hidden_states = grad.new_empty(()).expand(ctx.shape)
        needs = ctx.needs_input_grad[1:4]
        grads = _backward(ctx.ops, grad, hidden_states, *norm, *ctx.rest, *needs)
        used = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        return None, *used, *[None] * (len(ctx.needs_input_grad) - 4)


class _Inverse(torch.autograd.Function):
    """The inverse moves bits, and its adjoint is the shuffle."""

    @staticmethod
    def forward(ctx: Any, ops: _Ops, hidden_states: Tensor, *options: Any) -> Tensor:
        ctx.ops, ctx.options = ops, options
        return _call(ops.inverse, hidden_states, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shuffled = _forward(ctx.ops, grad, None, None, *ctx.options)
        return None, shuffled, *[None] * len(ctx.options)


def _call(op: Any, *args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = op(*args)
    return result


def _forward(
    ops: _Ops,
    hidden_states: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    """Skips autograd's Python layer when no derivative can be asked for."""
    args = (hidden_states, norm_weight, norm_bias, *rest)
    if forward_ad._current_level >= 0:
        return _plain(*args)
    recorded = wants_grad(hidden_states, norm_weight, norm_bias)
    if torch._C._functorch.maybe_current_level() is not None:
        result: Tensor = _plain(*args) if recorded else ops.forward(*args)
        return result
    if not recorded:
        return _call(ops.forward, *args)
    result = _Shuffle.apply(ops, *args)  # type: ignore[no-untyped-call]
    return result


def _into(ops: _Ops, hidden_states: Tensor, out: Tensor, *args: Any) -> None:
    if wants_grad(hidden_states, out, *args[:2]):
        raise RuntimeError(
            "vlmops.pixel_shuffle: out: expected no tensor that requires grad beside it, since "
            "what is written there has no history; leave out away, or use torch.no_grad()"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "vlmops.pixel_shuffle: out: expected no forward-mode differentiation, since tangents "
            "would get lost; leave out away"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "vlmops.pixel_shuffle: out: expected a tensor made outside torch.inference_mode(), or "
            "to be called inside; leave out away"
        )
    with torch._C._AutoDispatchBelowAutograd():
        ops.out(hidden_states, out, *args)
    if not out.is_inference():
        torch.autograd.graph.increment_version([out])


def _backward(
    ops: _Ops,
    grad: Tensor,
    hidden_states: Tensor,
    *args: Any,
) -> Sequence[Tensor]:
    """The gradients of hidden_states and the norm; an empty tensor for one that nobody needs."""
    o = Options(*args[: len(Options._fields)])
    needs = [*args[len(Options._fields) :]]
    needs += [True] * (3 - len(needs))  # torch leaves out what is the schema's default
    if not wants_grad(grad, hidden_states, o.norm_weight, o.norm_bias):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.backward(grad, hidden_states, *args)
        return result
    inputs = [
        t if t is None or t.requires_grad else t.detach().requires_grad_()
        for t in (hidden_states, o.norm_weight, o.norm_bias)
    ]
    wanted = {i: t for i, t in enumerate(inputs) if needs[i] and t is not None}
    out = _plain(hidden_states if inputs[0] is None else inputs[0], *inputs[1:], *o[2:])
    grads = torch.autograd.grad(out, list(wanted.values()), grad, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found[i] if i in found else grad.new_empty(0) for i in range(3)]


def _inverse(ops: _Ops, hidden_states: Tensor, *options: Any) -> Tensor:
    if forward_ad._current_level >= 0:
        return _plain_inverse(hidden_states, *options)
    recorded = wants_grad(hidden_states)
    if torch._C._functorch.maybe_current_level() is not None:
        result: Tensor = (
            _plain_inverse(hidden_states, *options)
            if recorded
            else ops.inverse(hidden_states, *options)
        )
        return result
    if not recorded:
        return _call(ops.inverse, hidden_states, *options)
    result = _Inverse.apply(ops, hidden_states, *options)  # type: ignore[no-untyped-call]
    return result


def _merged_shape(hidden_states: Tensor, o: Options) -> tuple[Any, ...]:
    """Of the result, if everything fits."""
    shape, f = hidden_states.shape, o.factor
    channels = shape[-1] * (1 if o.reduction == "mean" else f * f)
    batch = () if len(shape) == 2 else shape[:1]
    if len(shape) == 4:
        return *batch, (shape[1] // f) * (shape[2] // f), channels
    pixels = shape[-2] - o.skip_prefix
    if o.layout == "blocks":
        return *batch, pixels // (f * f), channels
    sides = list(o.grid_hw) or [math.isqrt(max(int(pixels), 0))] * 2
    if o.layout == "packed":
        sides = list(o.grid_hw)
    tokens = sum((h // f) * (w // f) for h, w in zip(sides[::2], sides[1::2], strict=True))
    return *batch, tokens, channels


def _fake(hidden_states: Tensor, *args: Any) -> Tensor:
    o = Options(*args)
    same_device(
        "pixel_shuffle",
        "hidden_states",
        hidden_states,
        norm_weight=o.norm_weight,
        norm_bias=o.norm_bias,
    )
    return hidden_states.new_empty(_merged_shape(hidden_states, o))


def _fake_out(hidden_states: Tensor, out: Tensor, *args: Any) -> None:
    o = Options(*args)
    same_device(
        "pixel_shuffle",
        "hidden_states",
        hidden_states,
        out=out,
        norm_weight=o.norm_weight,
        norm_bias=o.norm_bias,
    )


def _fake_backward(grad: Tensor, hidden_states: Tensor, *args: Any) -> tuple[Tensor, ...]:
    o = Options(*args[: len(Options._fields)])
    needs = [*args[len(Options._fields) :]]
    needs += [True] * (3 - len(needs))
    same_device(
        "pixel_shuffle",
        "hidden_states",
        hidden_states,
        grad=grad,
        norm_weight=o.norm_weight,
        norm_bias=o.norm_bias,
    )
    return tuple(
        grad.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
        for t, needed in zip((hidden_states, o.norm_weight, o.norm_bias), needs, strict=True)
    )


def _fake_inverse(hidden_states: Tensor, factor: int = 2, *_: Any) -> Tensor:
    *batch, tokens, channels = hidden_states.shape
    return hidden_states.new_empty(*batch, tokens * factor**2, channels // factor**2)


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "pixel_shuffle")
    _TRITON = triton_twin(_lib, "pixel_shuffle", _COMPILED)
    _AUTOGRAD = (_forward, _into, _backward, _inverse)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, _AUTOGRAD, (_fake, _fake_out, _fake_backward, _fake_inverse))
