"""Patch embedding, fused: pixels in, tokens out. So far its reference; kernels and the op follow.

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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Norm = Literal["layer", "rms"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Rows of a table, added to tokens.

    Attributes:
        table: ``[R, D]``.
        index: Rows to add ``[t]``, ``[N, t]`` or ``[B, N, t]``, integer; N as for ``weight``. None:
            row n to token n.
        weight: Of each row, broadcast against ``index`` (``[N, 1]`` or a scalar without one);
            differentiable, as gates are. None: 1.
        patches_only: Counts patches alone; else all tokens, prefix included.
    """

    table: Tensor
    index: Tensor | None = None
    weight: Tensor | None = None
    patches_only: bool = False


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
    sequences = []
    for number, image in enumerate(images):
        x = image.double()
        if x.dim() > 2:  # else flattened already
            x = _patches(_normalised(x.movedim(-1, 0) if channels_last else x, rescale_factor,
                                     image_mean, image_std), kernel.shape)  # fmt: skip
        y = x @ kernel.flatten(1).T
        if bias is not None:
            y = y + bias.double()
        if norm is not None:
            y = _norm(y, norm, norm_weight, norm_bias, norm_eps)
        before = 0
        for position in positions:
            if position.patches_only:
                y = y + _rows(position, number, len(y))
        if prefix is not None:
            before = prefix.numel() // y.shape[-1]
            extra = prefix.double().reshape(before, -1)
            y = torch.cat((y, extra) if prefix_last else (extra, y))
        for position in positions:
            if not position.patches_only:
                y = y + _rows(position, number, len(y))
        sequences.append(y)
    return torch.cat(sequences) if packed else torch.stack(sequences)


def _normalised(
    x: Tensor,
    rescale_factor: float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Tensor:
    def of_channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))

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
