"""HD transform: the crops of pictures and their whole views, as one packed sequence of tokens.

A picture comes as h x w square crops and one more that shows all of it, each g x g features of C
channels. Blocks of f x f features are merged into one token, with s = g / f tokens on a side of a
crop::

    token(crop, y, x) = the f * f features of block (y, x), (dy, dx, c)    K = f * f * C
                        their mean, with reduction="mean"                  K = C

The crops of a picture are put where they lie in it, h * s rows of w * s tokens. Every row, of the
picture as of its whole view, ends in ``newline``::

    sub = for row in h * s:  w * s tokens, newline          valid_hw: of its first rows and columns
    glb = for row in s:          s tokens, newline
    y   = sub, separator, glb      order "sub_glb"
          glb, separator, sub      order "glb_sub"

so that an image has (h * s) * (w * s + 1) + 1 + s * (s + 1) tokens.

=================  =================================================================================
model              arguments
=================  =================================================================================
Phi-3-vision,      skip_prefix=1 (CLIP's class token), newline=sub_GN, separator=glb_GN; g = 24,
Phi-3.5-vision     C = 1024
InternLM-          the same; order="glb_sub"
XComposer2-4KHD
Phi-4-multimodal   reduction="mean", newline=sub_img_feature_extensor,
                   separator=global_img_feature_extensor, valid_hw from its attention mask; g = 32,
                   C = 1152
=================  =================================================================================

Everything is moved once: no merged crop, no picture and no row with its newline is stored. Nothing
is saved for backward but shapes; the gradients of newline and separator are sums in float64, in one
order.

Sources: Dong et al., InternLM-XComposer2-4KHD (arXiv 2404.06512); Abdin et al., Phi-3 (arXiv
2404.14219); Abouelenin et al., Phi-4-Mini (arXiv 2503.01743).
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
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin

Order = Literal["sub_glb", "glb_sub"]
Pairs = Sequence[tuple[int, int]]


class Options(NamedTuple):
    """What ``torch.ops.vlmops.hd_transform`` takes beside tensors, with its defaults."""

    crop_grids: Sequence[int]
    valid_hw: Sequence[int] = ()
    factor: int = 2
    reduction: str = "none"
    order: str = "sub_glb"
    skip_prefix: int = 0


def hd_transform(
    image_features: Tensor,
    crop_grids: Pairs,
    newline: Tensor,
    separator: Tensor,
    *,
    valid_hw: Pairs | None = None,
    factor: int = 2,
    reduction: Literal["mean"] | None = None,
    order: Order = "sub_glb",
    skip_prefix: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Lays out the features of pictures' crops as tokens, with a newline at the end of each row.

    Differentiable in image_features, newline and separator. Bits are moved; means are computed in
    float32 and rounded once.

    Args:
        image_features: ``[sum of 1 + h * w, N, C]``, each picture's whole view before its crops,
            which follow row by row; or ``[B, crops, N, C]``, where crops beyond its 1 + h * w are
            padding and not read. N = skip_prefix + g * g features of a square crop, row by row;
            float32, bfloat16 or float16; any strides.
        crop_grids: Rows and columns ``(h, w)`` of each picture's crops, on the host: output sizes
            depend on them.
        newline: K values that end each row, in any shape ``[.., K]``; float32, bfloat16 or float16,
            rounded to the dtype of image_features.
        separator: K values between the picture's crops and its whole view, likewise.
        valid_hw: Rows and columns of tokens ``(height, width)`` that are kept of each picture's
            crops, for pictures that do not fill them, on the host. None: all.
        factor: f, features on a side of a block; 1 to 16; divides g.
        reduction: ``"mean"`` averages a block instead of merging it, as AvgPool2d does.
        order: ``"sub_glb"``: the crops before the whole view; or ``"glb_sub"``.
        skip_prefix: Features before each crop's grid that are left out.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[sum of tokens, K]``, contiguous, one picture after the other; `hd_token_counts` says how
        many are whose. K = f * f * C, or C with ``reduction="mean"``.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor, or grids are not pairs of integers.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> features = torch.randn(7 + 3, 577, 1024)  # CLIP-L/14-336 on 2 x 3 crops, then on 1 x 2
        >>> newline, separator = torch.randn(4096), torch.randn(4096)
        >>> grids = [(2, 3), (1, 2)]
        >>> tokens = vlmops.hd_transform(features, grids, newline, separator, skip_prefix=1)
        >>> tokens.shape
        torch.Size([1502, 4096])
        >>> of_each_picture = tokens.split(vlmops.hd_token_counts(grids, side=12))
    """
    options = _options(crop_grids, valid_hw, factor, reduction, order, skip_prefix)
    args = (image_features, newline, separator, *options)
    if torch.compiler.is_compiling():
        name = dispatch.choose("hd_transform", backend, image_features.device.type)
        if name == "reference":
            return _plain(*args)
        op = (_TRITON if name == "triton" else _COMPILED).forward
        result: Tensor = op(*args)
        return result
    _library.require()
    tensors = {"image_features": image_features, "newline": newline, "separator": separator}
    for argument, tensor in tensors.items():
        require_tensor("hd_transform", argument, tensor)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not image_features.is_cpu:
        name = dispatch.choose("hd_transform", backend, image_features.device.type)
        if name == "reference":
            return _plain(*args)
        if name == "triton":
            ops = _TRITON
    return _forward(ops, *args)


def hd_token_counts(crop_grids: Pairs, side: int, *, valid_hw: Pairs | None = None) -> list[int]:
    """How many tokens `hd_transform` makes of each picture.

    Args:
        crop_grids: As for `hd_transform`.
        side: Tokens on a side of a crop, g / factor: 12 for Phi-3.5-vision.
        valid_hw: As for `hd_transform`.

    Raises:
        TypeError: grids are not pairs of integers.

    Example:
        >>> vlmops.hd_token_counts([(2, 3), (1, 2)], side=12)
        [1045, 457]
    """
    grids = _flat("crop_grids", crop_grids)
    valid = [n * side for n in grids] if valid_hw is None else _flat("valid_hw", valid_hw)
    sizes = zip(valid[::2], valid[1::2], strict=True)
    return [height * (width + 1) + 1 + side * (side + 1) for height, width in sizes]


def reference(
    image_features: Tensor,
    crop_grids: Pairs,
    newline: Tensor,
    separator: Tensor,
    *,
    valid_hw: Pairs | None = None,
    factor: int = 2,
    reduction: Literal["mean"] | None = None,
    order: Order = "sub_glb",
    skip_prefix: int = 0,
) -> Tensor:
    """`hd_transform` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """
    x = image_features.double()[..., skip_prefix:, :]
    side = math.isqrt(x.shape[-2]) // factor
    x = x.unflatten(-2, (side, factor, side, factor)).transpose(-4, -3)  # [.., s, s, f, f, C]
    x = x.mean((-3, -2)) if reduction == "mean" else x.flatten(-3)
    ends = newline.double().reshape(1, 1, -1)

    def lines(picture: Tensor) -> Tensor:  # [rows, columns, K], a newline to each row
        return torch.cat((picture, ends.expand(len(picture), 1, -1)), 1).flatten(0, 1)

    between = separator.double().reshape(1, -1)
    # Empty, so that all three are in the graph where there are no pictures.
    rows, crop = [t[:0] for t in (x.flatten(0, -2), ends[0], between)], 0
    for i, (h, w) in enumerate(crop_grids):
        crops = x[i] if image_features.dim() == 4 else x[crop : crop + 1 + h * w]
        crop += 1 + h * w
        parts = crops[1 : 1 + h * w].unflatten(0, (h, w)).transpose(1, 2)
        picture = parts.flatten(2, 3).flatten(0, 1)  # [h * s, w * s, K]
        if valid_hw is not None:
            picture = picture[: valid_hw[i][0], : valid_hw[i][1]]
        made = [lines(picture), between, lines(crops[0])]
        rows += made if order == "sub_glb" else made[::-1]
    return torch.cat(rows)


def _options(
    crop_grids: Any, valid_hw: Any, factor: int, reduction: Any, order: str, skip_prefix: int
) -> Options:
    valid = []
    if valid_hw is not None:
        valid = _flat("valid_hw", valid_hw)
        if not valid and len(crop_grids):
            raise RuntimeError(
                "vlmops.hd_transform: valid_hw: expected one for each of crop_grids' "
                f"{len(crop_grids)} images, got 0"
            )
    grids = _flat("crop_grids", crop_grids)
    return Options(grids, valid, factor, reduction or "none", order, skip_prefix)


def _flat(name: str, pairs: Any) -> list[int]:
    """The integers of pairs, one after the other."""
    if isinstance(pairs, Sequence) and not isinstance(pairs, str):
        found = [list(pair) for pair in pairs if isinstance(pair, Sequence) and len(pair) == 2]
        flat = [n for pair in found for n in pair]
        if len(found) == len(pairs) and all(isinstance(n, int | torch.SymInt) for n in flat):
            return flat
    raise TypeError(
        f"vlmops.hd_transform: {name}: expected a list of pairs of integers, one for each image, "
        f"got {pairs!r}"
    )


def _plain(image_features: Tensor, newline: Tensor, separator: Tensor, *args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    o = Options(*args)
    pairs = [list(zip(n[::2], n[1::2], strict=True)) for n in (o.crop_grids, o.valid_hw)]
    result = reference(
        image_features,
        pairs[0],
        newline,
        separator,
        valid_hw=pairs[1] or None,
        factor=o.factor,
        reduction=None if o.reduction == "none" else "mean",
        order=o.order,  # type: ignore[arg-type]
        skip_prefix=o.skip_prefix,
    )
    return result.to(image_features.dtype)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class _HDTransform(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: _Ops,
        image_features: Tensor,
        newline: Tensor,
        separator: Tensor,
        *options: Any,
    ) -> Tensor:
        ctx.ops, ctx.options, ctx.shape = ops, options, image_features.shape
        ctx.save_for_backward(newline, separator)
        return _call(ops.forward, image_features, newline, separator, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:4]
        shape_alone = grad.new_empty(()).expand(ctx.shape)
        args = (grad, shape_alone, *ctx.saved_tensors, *ctx.options, *needs)
        grads = _backward(ctx.ops, *args)
        used = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        return None, *used, *[None] * len(ctx.options)


def _call(op: Any, *args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = op(*args)
    return result


def _forward(ops: _Ops, *args: Any) -> Tensor:
    """Skips autograd's Python layer when no derivative can be asked for."""
    if forward_ad._current_level >= 0:
        return _plain(*args)
    recorded = wants_grad(*args[:3])
    if torch._C._functorch.maybe_current_level() is not None:
        result: Tensor = _plain(*args) if recorded else ops.forward(*args)
        return result
    if not recorded:
        return _call(ops.forward, *args)
    result = _HDTransform.apply(ops, *args[:3], *Options(*args[3:]))  # type: ignore[no-untyped-call]
    return result


def _all_needs(args: Sequence[Any]) -> tuple[Options, list[bool]]:
    """Those of backward behind the tensors; torch leaves out what is the schema's default."""
    count = len(Options._fields)
    needs = list(args[count:])
    return Options(*args[:count]), needs + [True] * (3 - len(needs))


def _backward(
    ops: _Ops,
    grad: Tensor,
    image_features: Tensor,
    newline: Tensor,
    separator: Tensor,
    *args: Any,
) -> Sequence[Tensor]:
    """The gradients of the three; an empty tensor for one that nobody needs."""
    if not wants_grad(grad, image_features, newline, separator):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.backward(
                grad, image_features, newline, separator, *args
            )
        return result
    options, needs = _all_needs(args)
    return plain_gradients(_plain, (image_features, newline, separator), options, needs, grad)


def _fake(image_features: Tensor, newline: Tensor, separator: Tensor, *args: Any) -> Tensor:
    o = Options(*args)
    same_device(
        "hd_transform", "image_features", image_features, newline=newline, separator=separator
    )
    features, channels = image_features.shape[-2:]
    side = math.isqrt(max(int(features) - o.skip_prefix, 0)) // o.factor
    pairs = [list(zip(n[::2], n[1::2], strict=True)) for n in (o.crop_grids, o.valid_hw)]
    tokens = sum(hd_token_counts(pairs[0], side, valid_hw=pairs[1] or None))
    depth = channels if o.reduction == "mean" else channels * o.factor**2
    return image_features.new_empty(tokens, depth)


def _fake_backward(
    grad: Tensor, image_features: Tensor, newline: Tensor, separator: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    _, needs = _all_needs(args)
    same_device(
        "hd_transform",
        "image_features",
        image_features,
        grad=grad,
        newline=newline,
        separator=separator,
    )
    return tuple(
        t.new_empty(t.shape if needed else 0)
        for t, needed in zip((image_features, newline, separator), needs, strict=True)
    )


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "hd_transform")
    _TRITON = triton_twin(_lib, "hd_transform", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
