"""Patch embedding, fused: pixels in, tokens out.

A convolution whose stride is its kernel is one product per patch. For patch n of an image, with x
its K = C * T * P * P pixels in the order of the weight::

    x = (x * rescale_factor - image_mean) / image_std        where pixels are raw
    y = norm(weight @ x + bias)                              none, "layer" or "rms"
    y = cat(prefix, y)  or  cat(y, prefix)
    y = y + sum over positions, and over their taps i, of weight[n, i] * table[index[n, i]]

What remains of H and W beyond whole patches is dropped, as the convolution does. The embeddings of
transformers are data:

=====================  =========================  ==============================  =============
class                  pixels and weight          positions                       else
=====================  =========================  ==============================  =============
Qwen2-VL, 2.5-VL       flat, Conv3d
Qwen3-VL               flat, Conv3d               4 taps
GLM-4V                 flat, Conv3d               16 taps (bicubic)               norm "rms"
CLIP, Idefics          images                     dense                           prefix
SigLIP, Janus          images                     dense
SigLIP2                flat (P, P, C), Linear     taps for each image's size
DINOv2, InternVL, ViT  images                     dense                           prefix
BLIP, BLIP-2,          images                     dense                           prefix
InstructBLIP
Idefics2, 3, SmolVLM,  images                     one tap (bucketize)
Phi-4, Aria
Pixtral                images of ``image_sizes``                                  packed
Mllama                 images, one a tile         tile: one tap, patches alone;   prefix
                                                  dense; one tap; weights: gates
Llama-4                images, Linear as Conv2d   dense                           prefix, last
Ovis2                  images                     dense                           norm "rms"
=====================  =========================  ==============================  =============

A table interpolated to another size is taps with weights too: 4 where bilinear, 16 where bicubic,
more where antialiased. Perceiver is not served: it concatenates positions instead of adding them.

The matrix of patches is never stored. On the CPU some hundred patches at a time are gathered into
a panel that fits the cache, multiplied there, and finished into their tokens
(`vlmops.ops.patch_embed_panels`); on a GPU a product's tiles are gathered from the image. Backward
gathers the patches again.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv 2010.11929).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.utils._python_dispatch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from vlmops import _library, dispatch
from vlmops.ops import patch_embed_panels as panels
from vlmops.ops.checks import require_tensor, wants_grad
from vlmops.ops.patch_embed_panels import INDEX, PATCHES_ONLY, WEIGHT, Arguments
from vlmops.ops.registration import overloads, register, triton_twin

Norm = Literal["layer", "rms"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Rows of a table, added to tokens.

    Attributes:
        table: ``[R, D]``.
        index: Rows to add ``[t]``, ``[N, t]`` or ``[B, N, t]``, integer, for N tokens; what is
            packed is one sequence, B = 1. None: row n to token n.
        weight: Of each row, broadcast against ``index`` (``[N, 1]`` or a scalar without one);
            differentiable, as gates are. None: 1.
        patches_only: Counts patches alone; else all tokens, prefix included.
    """

    table: Tensor
    index: Tensor | None = None
    weight: Tensor | None = None
    patches_only: bool = False


def patch_embed(
    pixel_values: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    rescale_factor: float | None = None,
    pixel_map: Tensor | None = None,
    channels_last: bool = False,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: Tensor | None = None,
    prefix_last: bool = False,
    positions: Sequence[Position] = (),
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cuts images into patches and makes a token of each, in the layout that a tower reads.

    Differentiable in pixels, weights, biases, prefix, tables and their weights. Products accumulate
    in float32; what is added to them is added in float32 and rounded once.

    Args:
        pixel_values: Images ``[B, C, H, W]`` or videos ``[B, C, T, H, W]`` (``[B, H, W, C]`` and
            ``[B, T, H, W, C]`` with ``channels_last``), flattened patches ``[N, K]`` or
            ``[B, N, K]`` in the weight's order, or a list of images ``[C, H, W]`` of any sizes;
            float32, bfloat16, float16 or uint8; any strides. What is left beyond whole patches is
            dropped.
        weight: ``[D, C, P, P]``, ``[D, C, T, P, P]`` or, for flattened patches, ``[D, K]``;
            float32, bfloat16 or float16. Patches are rounded to its dtype, as towers do.
        bias: ``[D]``, dtype of weight.
        image_mean: Of each channel, subtracted from rescaled pixels. With it, ``image_std`` or
            ``rescale_factor`` pixels are raw; those that are uint8 become, to the bit, what the
            image processors of transformers (their torchvision backend) make of them.
        image_std: Of each channel, divides what is left; not 0.
        rescale_factor: Multiplies pixels first; 1/255 makes a uint8 one of [0, 1].
        pixel_map: ``[C, 256]``, float32, contiguous: what each value of uint8 pixels becomes, in
            place of these three numbers.
        channels_last: The channels of images are their last dimension.
        image_sizes: Height and width, in pixels, of each image of a padded batch; the rest of it is
            not read, and the result is packed.
        norm: Of each patch over D, before positions: ``"layer"``, ``"rms"`` or None.
        norm_weight: ``[D]``.
        norm_bias: ``[D]``.
        norm_eps: Added to variance or mean square; positive.
        prefix: ``[D]``, ``[M, D]`` or ``[1, M, D]``: tokens added to each image.
        prefix_last: After the patches instead of before them.
        positions: What is added to tokens, at most 4; see `Position`.
        dtype: Of the result; None: that of weight.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[B, M + N, D]``; ``[sum of M + N, D]``, the images packed into one sequence, for flattened
        ``[N, K]``, lists and ``image_sizes``.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: mean, std or rescale_factor are of no use or come with pixel_map, or there is
            no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> image = torch.randint(256, (1, 3, 336, 336), dtype=torch.uint8)
        >>> conv = torch.nn.Conv2d(3, 1024, 14, 14)
        >>> cls, table = torch.randn(1024), torch.randn(577, 1024)
        >>> with torch.no_grad():
        ...     tokens = vlmops.patch_embed(image, conv.weight, conv.bias, prefix=cls,
        ...         rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.25] * 3,
        ...         positions=[vlmops.Position(table)])
        >>> tokens.shape
        torch.Size([1, 577, 1024])
    """
    args = arguments(
        pixel_values, weight, bias, image_mean, image_std, rescale_factor, channels_last,
        image_sizes, norm, norm_weight, norm_bias, norm_eps, prefix, prefix_last, positions, dtype,
        pixel_map,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        name = dispatch.choose("patch_embed", backend, weight.device.type)
        if name == "reference":
            return _plain(*args)
        op = torch.ops.vlmops.patch_embed_triton if name == "triton" else _COMPILED.forward
        result: Tensor = op(*args)
        return result
    _library.require()
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not weight.is_cpu:
        name = dispatch.choose("patch_embed", backend, weight.device.type)
        if name == "reference":
            return _plain(*args)
        if name == "triton":
            ops = _TRITON
    return _forward(ops, *args)


def arguments(
    pixel_values: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    rescale_factor: float | None = None,
    channels_last: bool = False,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: Tensor | None = None,
    prefix_last: bool = False,
    positions: Sequence[Position] = (),
    dtype: torch.dtype | None = None,
    pixel_map: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.vlmops.patch_embed`` for those of `patch_embed`.

    Raises: as `patch_embed`.
    """
    listed = not isinstance(pixel_values, Tensor)
    values: list[Tensor] = list(pixel_values) if listed else [pixel_values]  # type: ignore[list-item]
    named = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias,
             "prefix": prefix, "pixel_map": pixel_map}  # fmt: skip
    for i, values_of_one in enumerate(values):
        require_tensor(
            "patch_embed", f"pixel_values[{i}]" if listed else "pixel_values", values_of_one
        )
    for name, value in named.items():
        if value is not None or name == "weight":
            require_tensor("patch_embed", name, value)
    if prefix is not None and (prefix.dim() == 1 or (prefix.dim() == 3 and prefix.shape[0] == 1)):
        prefix = prefix.reshape(-1, prefix.shape[-1])
    tensors: list[Tensor] = []
    kinds = []
    for position in positions:
        if not isinstance(position, Position):
            raise TypeError(
                f"vlmops.patch_embed: positions: expected vlmops.Position, got "
                f"{type(position).__name__}"
            )
        kinds.append(INDEX * (position.index is not None)
                     + WEIGHT * (position.weight is not None)
                     + PATCHES_ONLY * position.patches_only)  # fmt: skip
        require_tensor("patch_embed", "positions.table", position.table)
        given = {"table": position.table, "index": position.index, "weight": position.weight}
        for name, value in given.items():
            if value is not None:
                require_tensor("patch_embed", f"positions.{name}", value)
                tensors.append(value)
    if image_mean is not None or image_std is not None or rescale_factor is not None:
        if pixel_map is not None:
            raise ValueError(
                "vlmops.patch_embed: pixel_map: expected none beside image_mean, image_std or "
                f"rescale_factor, got one of shape {list(pixel_map.shape)}"
            )
        raw = bool(values) and values[0].dtype == torch.uint8
        if weight.dim() < 3:
            raise ValueError(
                "vlmops.patch_embed: image_mean, image_std, rescale_factor: expected a weight that "
                f"names the channels of a patch, [D, C, P, P], got {list(weight.shape)}"
            )
        pixel_map = pixel_map_of(
            raw, weight.shape[1], weight.device, _numbers("image_mean", image_mean),
            _numbers("image_std", image_std), rescale_factor,
        )  # fmt: skip
    sizes = [int(side) for size in image_sizes or () for side in size]
    if image_sizes is not None and not listed and len(image_sizes) == 0 and len(values[0]):
        raise RuntimeError(
            "vlmops.patch_embed: image_sizes: expected a height and a width for each of the "
            f"{len(values[0])} images, got none"
        )
    return (values, weight, tensors, kinds, bias, pixel_map, listed, channels_last, sizes,
            norm or "none", norm_weight, norm_bias, norm_eps, prefix, prefix_last,
            dtype)  # fmt: skip


def pixel_map_of(
    raw: bool,
    channels: int,
    device: torch.device,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale_factor: float | None,
) -> Tensor:
    """What pixels become: ``[C, 256]`` for uint8, else slope and intercept ``[C, 2]``; float32.

    The table holds what transformers' processors compute: mean and std are divided by
    rescale_factor, and pixels, as float32, reduced by the one and divided by the other.

    Raises:
        ValueError: a number is missing, 0 or not finite.
    """
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(
                f"vlmops.patch_embed: {name}: expected one number for each of the {channels} "
                f"channels of weight, got {list(values)}"
            )
    if std is not None and not all(s * s > 0 for s in std):
        raise ValueError(
            f"vlmops.patch_embed: image_std: expected numbers other than 0, got {list(std)}"
        )
    if rescale_factor is not None and not rescale_factor * rescale_factor > 0:
        raise ValueError(
            "vlmops.patch_embed: rescale_factor: expected a number other than 0, got "
            f"{rescale_factor}"
        )
    real = torch.utils._python_dispatch._get_current_dispatch_mode() is None
    if real and not torch.compiler.is_compiling():
        return _kept_map(raw, channels, device, mean, std, rescale_factor)
    return _pixel_map(raw, channels, mean, std, rescale_factor).to(device)


@functools.lru_cache(maxsize=64)
def _kept_map(raw: bool, channels: int, device: torch.device, *numbers: Any) -> Tensor:
    """Making it takes 0.3 ms, and a copy to a GPU cannot be captured in a graph."""
    with torch.inference_mode(False):
        return _pixel_map(raw, channels, *numbers).to(device)


def _pixel_map(
    raw: bool,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    rescale_factor: float | None,
) -> Tensor:
    def of(values: Sequence[float] | None, default: float) -> Tensor:
        given = [default] * channels if values is None else values
        return torch.tensor(given, dtype=torch.float32, device="cpu")

    means, stds = of(mean, 0.0), of(std, 1.0)
    pixels = torch.arange(256, dtype=torch.float32, device="cpu")
    if not raw:
        slope = (1.0 if rescale_factor is None else rescale_factor) / stds.double()
        return torch.stack((slope, -means.double() / stds.double()), -1).float()
    if mean is None and std is None:
        return (pixels * (rescale_factor or 1.0)).repeat(channels, 1)
    if rescale_factor is not None:
        means, stds = means * (1.0 / rescale_factor), stds * (1.0 / rescale_factor)
    return (pixels - means[:, None]) / stds[:, None]


def _numbers(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        return tuple(float(v) for v in values)
    except TypeError:
        raise TypeError(
            f"vlmops.patch_embed: {name}: expected a number for each channel, got {values!r}"
        ) from None


def reference(
    pixel_values: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    rescale_factor: float | None = None,
    channels_last: bool = False,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    prefix: Tensor | None = None,
    prefix_last: bool = False,
    positions: Sequence[Position] = (),
) -> Tensor:
    """What the op computes, in float64 and plain torch.

    Args:
        pixel_values: ``[B, C, H, W]`` or ``[B, C, T, H, W]`` (``[B, H, W, C]`` with
            ``channels_last``), flattened patches ``[N, K]`` or ``[B, N, K]`` in the weight's order,
            or images ``[C, H, W]`` of different sizes; floating or uint8.
        weight: ``[D, C, P, P]``, ``[D, C, T, P, P]`` or, for flattened patches, ``[D, K]``.
        bias: ``[D]``.
        image_mean: Subtracted after rescaling, one for each channel.
        image_std: Divides what is left.
        rescale_factor: Multiplies pixels first.
        channels_last: The channels of images are their last dimension.
        image_sizes: Height and width of each image in a padded batch; the rest is not read.
        norm: Of the patches, over D, before positions.
        norm_weight: ``[D]``.
        norm_bias: ``[D]``.
        norm_eps: Added to variance or mean square.
        prefix: ``[D]`` or ``[M, D]``, tokens added to each image.
        prefix_last: After the patches instead of before them.
        positions: What is added, see `Position`.

    Returns:
        ``[B, M + N, D]``, or ``[sum of M + N, D]`` for flattened ``[N, K]`` and for images of
        different sizes; float64.
    """
    kernel = weight.double()
    if isinstance(pixel_values, Tensor) and pixel_values.dim() > 2 and len(pixel_values) == 0:
        given = {name: value for name, value in locals().items() if name != "kernel"}
        one = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        # Of one image, for the number of tokens.
        return reference(**{**given, "pixel_values": torch.cat((pixel_values, one))})[:0]
    if isinstance(pixel_values, Tensor):
        images = [pixel_values] if pixel_values.dim() == 2 else list(pixel_values)
    else:
        images = list(pixel_values)
    packed = not isinstance(pixel_values, Tensor) or pixel_values.dim() == 2
    if image_sizes is not None:
        packed = True
        images = [
            image[:h, :w] if channels_last else image[..., :h, :w]
            for image, (h, w) in zip(images, image_sizes, strict=True)
        ]
    patches = []
    for image in images:
        x = image.double()
        if x.dim() > 2:  # else flattened already
            x = _patches(_normalised(x.movedim(-1, 0) if channels_last else x, rescale_factor,
                                     image_mean, image_std), kernel.shape)  # fmt: skip
        y = x @ kernel.flatten(1).T
        if bias is not None:
            y = y + bias.double()
        if norm is not None:
            y = _norm(y, norm, norm_weight, norm_bias, norm_eps)
        patches.append(y)
    sequences = []
    for number, parts in enumerate([patches] if packed else [[y] for y in patches]):
        y = torch.cat(parts) if parts else kernel.new_zeros(0, kernel.shape[0])
        for position in positions:
            if position.patches_only:
                y = y + _rows(position, number, len(y))
        if prefix is not None:
            extra = prefix.double().reshape(-1, y.shape[-1])
            split = y.split([len(part) for part in parts])
            y = torch.cat([t for x in split for t in ((x, extra) if prefix_last else (extra, x))])
        for position in positions:
            if not position.patches_only:
                y = y + _rows(position, number, len(y))
        sequences.append(y)
    return sequences[0] if packed else torch.stack(sequences)


def _normalised(
    x: Tensor,
    rescale_factor: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    def of_channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))

    if rescale_factor is not None:
        x = x * rescale_factor
    if mean is not None:
        x = x - of_channels(mean)
    return x if std is None else x / of_channels(std)


def _patches(image: Tensor, shape: Sequence[int]) -> Tensor:
    """``[C, (T,) H, W]`` to ``[N, K]``, K in the order of a convolution's weight."""
    sizes = shape[2:]
    for dim, size in enumerate(sizes, start=1):
        image = image.narrow(dim, 0, image.shape[dim] // size * size).unfold(dim, size, size)
    dims = len(sizes)
    image = image.movedim(0, dims)  # [grid.., C, sizes..]
    return image.reshape(-1, image.shape[dims:].numel())


def _norm(y: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    shape, y = y.shape[-1:], y.double()
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    if norm == "layer":
        return functional.layer_norm(y, shape, weight, bias, eps)
    y = functional.rms_norm(y, shape, weight, eps)
    return y if bias is None else y + bias


def _rows(position: Position, image: int, tokens: int) -> Tensor:
    """``[tokens, D]``, or one row for all tokens."""
    table = position.table.double()
    weight = None if position.weight is None else position.weight.double()
    if position.index is None:
        rows = table[:tokens]
        return rows if weight is None else rows * weight
    index = position.index
    if index.dim() == 3:
        index = index[image]
        if weight is not None and weight.dim() == 3:
            weight = weight[image]
    taps = table[index]  # [.., t, D]
    if weight is not None:
        taps = taps * weight[..., None]
    return taps.sum(-2)


def _plain(*args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    a = Arguments(*args)
    values = list(a.pixel_values)
    if a.pixel_map is not None:
        channel = -1 if a.channels_last else 1 - a.weight.dim()
        values = [_mapped(x, a.pixel_map, channel) for x in values]
    sizes = list(zip(a.image_sizes[::2], a.image_sizes[1::2], strict=True))
    result = reference(
        values if a.listed else values[0],
        a.weight,
        a.bias,
        channels_last=a.channels_last,
        image_sizes=sizes or None,
        norm=None if a.norm == "none" else a.norm,  # type: ignore[arg-type]
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        norm_eps=a.norm_eps,
        prefix=a.prefix,
        prefix_last=a.prefix_last,
        positions=[Position(p.table, p.index, p.weight, p.patches_only) for p in panels.addends(a)],
    )
    return result.to(a.dtype or a.weight.dtype)


def _mapped(x: Tensor, pixel_map: Tensor, channel: int) -> Tensor:
    x = x.movedim(channel, 0)
    if pixel_map.shape[1] == 2:
        slope, intercept = pixel_map.to(x.device).view(-1, 2, *[1] * (x.dim() - 1)).unbind(1)
        x = x.float() * slope + intercept
    else:
        x = torch.stack([row[values.long()] for row, values in zip(pixel_map, x, strict=True)])
    return x.movedim(0, channel)


# Registration. The schemas and the kernels between products are the library's, the op itself is
# `panels.forward`. Triton's op has the same schema.


class _Ops(NamedTuple):
    forward: Any
    backward: Any


class _PatchEmbed(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(ctx: Any, ops: _Ops, pack: Callable[..., tuple[Any, ...]], *tensors: Any) -> Tensor:
        ctx.ops, ctx.pack = ops, pack
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = ops.forward(*pack(*tensors))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        args = ctx.pack(*tensors)
        # In the order of the schema, which has the map among the tensors and no gradient for it.
        count = len(args[0])
        wanted = [*needs[: count + 2], *needs[count + 3 :]]
        grads = _backward(ctx.ops, grad, wanted, *args)
        used = [g if needed else None for g, needed in zip(grads, wanted, strict=True)]
        return None, None, *used[: count + 2], None, *used[count + 2 :]


def _apart(args: tuple[Any, ...]) -> tuple[list[Any], Callable[..., tuple[Any, ...]]]:
    """The tensors among the op's arguments, and what makes arguments of them again."""
    a = Arguments(*args)
    count = len(a.pixel_values)
    tensors = [*a.pixel_values, a.weight, a.bias, a.pixel_map, a.norm_weight, a.norm_bias,
               a.prefix, *a.positions]  # fmt: skip
    nothing: Any = None
    options = a._replace(
        pixel_values=(), weight=nothing, positions=(), bias=None, pixel_map=None, norm_weight=None,
        norm_bias=None, prefix=None,
    )  # fmt: skip

    def together(*given: Any) -> tuple[Any, ...]:
        weight, bias, pixel_map, norm_weight, norm_bias, prefix, *positions = given[count:]
        return options._replace(
            pixel_values=list(given[:count]), weight=weight, bias=bias, pixel_map=pixel_map,
            norm_weight=norm_weight, norm_bias=norm_bias, prefix=prefix, positions=positions,
        )  # fmt: skip

    return tensors, together


def _forward(ops: _Ops, *args: Any) -> Tensor:
    if forward_ad._current_level >= 0:
        return _plain(*args)
    if torch._C._functorch.maybe_current_level() is not None:
        return _plain(*args) if _wants_grad(args) else ops.forward(*args)
    if not _wants_grad(args):
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = ops.forward(*args)
        return result
    tensors, together = _apart(args)
    result = _PatchEmbed.apply(ops, together, *tensors)  # type: ignore[no-untyped-call]
    return result


def _wants_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and wants_grad(*_apart(args)[0])


def _backward(ops: _Ops, grad: Tensor, needs: Sequence[bool], *args: Any) -> list[Tensor]:
    a = Arguments(*args)
    if not (wants_grad(grad) or _wants_grad(args)):
        with torch._C._AutoDispatchBelowAutograd():
            result: list[Tensor] = ops.backward(grad, needs, *args)
        return result
    tensors, together = _apart(args)
    count = len(a.pixel_values)
    places = [i for i in range(len(tensors)) if i != count + 2]  # not the map
    wanted = [i for i, needed in zip(places, needs, strict=True) if needed and _floats(tensors[i])]
    for i in wanted:
        if not tensors[i].requires_grad:
            tensors[i] = tensors[i].detach().requires_grad_()
    out = _plain(*together(*tensors))
    grads = torch.autograd.grad(
        out, [tensors[i] for i in wanted], grad, create_graph=True, materialize_grads=True
    )
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i, grad.new_empty(0)) for i in places]


def _floats(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _fake(*args: Any) -> Tensor:
    a = Arguments(*args)
    for tensor in _apart(args)[0]:  # on the meta device nothing else looks
        if tensor is not None and tensor.device != a.weight.device:
            raise RuntimeError(
                f"vlmops.patch_embed: expected all tensors on {a.weight.device}, where weight is, "
                f"got one of shape {list(tensor.shape)} on {tensor.device}"
            )
    return a.weight.new_empty(a.shape(), dtype=a.dtype or a.weight.dtype)


def _fake_backward(grad: Tensor, needs: Sequence[bool], *args: Any) -> list[Tensor]:
    tensors = Arguments(*args).differentiable
    return [
        t.new_empty(t.shape) if t is not None and needed and t.is_floating_point()
        else grad.new_empty(0)
        for t, needed in zip(tensors, needs, strict=True)
    ]  # fmt: skip


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "patch_embed")
    for _op, _kernel in zip(_COMPILED, (panels.forward, panels.backward), strict=True):
        for _key in ("CPU", "CUDA"):
            _lib.impl(_op, _kernel, _key)
    _TRITON = triton_twin(_lib, "patch_embed", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
