"""The HD transform in Triton. `vlmops.ops.hd_transform` says what is computed.

A picture and its whole view are the same to the kernel, which takes crops of a grid, 1 x 1 for the
latter: rows of tokens, a newline after each and, behind whichever comes first, the separator. Two
launches an image, a program a token. Backward is the same kernel with reading and writing
exchanged: every feature that a token has belongs to one token. Those that none has are cleared
before, and the gradients of the learned rows are torch's sums of strided views.

Bytes: each token read and written once, and what is cleared. Phi-3.5-vision's 4 x 4 crops in
bfloat16 are 20.6 MB each way, 9.6 us at the 4.3 TB/s that a copy reaches on an H200. PREDICTED,
never measured: 80 % of a copy for one image, launches (5 us each) for many small ones, where
`vlmops`' CUDA kernel takes 32 images to a launch.

Bits are moved as integers. C, f, the element type and whether 8 divides all strides are in the
compile key; sizes of pictures and the strides are not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops.hd_transform import Options, _all_needs

# Kernel. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.

_STRIDES = ["s_crop", "s_pixel", "s_x", "s_token", "s_y"]
_SIZES = ["n_height", "n_width", "n_w_crop", "n_side", "n_prefix"]


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def place_kernel(
    p_x, p_newline, p_separator, p_y,
    s_crop: tl.int64, s_pixel: tl.int64, s_x: tl.int64, s_token: tl.int64, s_y: tl.int64,
    n_height: tl.int32, n_width: tl.int32, n_w_crop: tl.int32, n_side: tl.int32,
    n_prefix: tl.int32,
    C: tl.constexpr, F: tl.constexpr, MEAN: tl.constexpr, BACKWARD: tl.constexpr,
    VEC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Token i of a picture, between features p_x and tokens p_y. Grid: tokens x blocks of K.

    Strides are in units of VEC elements; those between channels are 1 unless VEC is.
    """
    n_k: tl.constexpr = C if MEAN else F * F * C
    i_token = tl.program_id(0)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < n_k
    i_y = i_token // (n_width + 1)
    i_x = i_token % (n_width + 1)
    is_separator = i_y == n_height
    is_newline = (i_x == n_width) & (i_y != n_height)
    m_block = m_k & (i_x != n_width) & (i_y != n_height)
    i_crop = i_y // n_side * n_w_crop + i_x // n_side
    p_crop = p_x + i_crop.to(tl.int64) * s_crop * VEC
    i_first = n_prefix + (i_y % n_side * F) * (n_side * F) + i_x % n_side * F  # feature of a block
    o_x, o_y = o_k % C, o_k
    if VEC == 1:
        o_x, o_y = o_x * s_x, o_y * s_y
    p_token = p_y + i_token.to(tl.int64) * s_token * VEC + o_y
    if MEAN:
        if BACKWARD:
            b = tl.load(p_token, mask=m_block, other=0.0).to(tl.float32)
            b = (b * (1.0 / (F * F))).to(p_x.dtype.element_ty)
            for i in tl.static_range(F * F):
                i_row = i_first + i // F * (n_side * F) + i % F
                tl.store(p_crop + i_row.to(tl.int64) * s_pixel * VEC + o_x, b, mask=m_block)
        else:
            b_sum = tl.zeros([BK], dtype=tl.float32)
            for i in tl.static_range(F * F):
                i_row = i_first + i // F * (n_side * F) + i % F
                p = p_crop + i_row.to(tl.int64) * s_pixel * VEC + o_x
                b_sum += tl.load(p, mask=m_block, other=0.0).to(tl.float32)
            b = (b_sum * (1.0 / (F * F))).to(p_y.dtype.element_ty)
            tl.store(p_token, b, mask=m_block)
    else:
        i_part = o_k // C
        i_row = i_first + i_part // F * (n_side * F) + i_part % F
        p = p_crop + i_row.to(tl.int64) * s_pixel * VEC + o_x
        if BACKWARD:
            tl.store(p, tl.load(p_token, mask=m_block, other=0), mask=m_block)
        else:
            tl.store(p_token, tl.load(p, mask=m_block, other=0), mask=m_block)
    if not BACKWARD:
        b = tl.load(p_newline + o_k, mask=m_k & is_newline, other=0)
        tl.store(p_token, b, mask=m_k & is_newline)
        b = tl.load(p_separator + o_k, mask=m_k & is_separator, other=0)
        tl.store(p_token, b, mask=m_k & is_separator)


# Launchers.

INTERPRETED = not isinstance(place_kernel, triton.JITFunction)
CHECK = os.environ.get("VLMOPS_CHECK") == "1"
_BLOCK = 4096  # elements: 4 accesses of 16 bytes a thread
_VECTOR = 8  # elements: 16 bytes of bfloat16


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    if INTERPRETED:
        return 0
    return sum(len(cache[0]) for cache in place_kernel.device_caches.values())


class Picture(NamedTuple):
    """Crops of a grid, and their tokens."""

    features: Tensor  # [h * w, N, C]
    first: int  # token of all
    height: int  # rows of tokens
    width: int
    w_crop: int
    separated: bool  # the separator follows

    @property
    def rows(self) -> int:
        """Tokens without the separator."""
        return self.height * (self.width + 1)


def _side(features: Tensor, o: Options) -> int:
    return math.isqrt(features.shape[-2] - o.skip_prefix) // o.factor


def _pictures(features: Tensor, o: Options) -> Iterator[Picture]:
    """The pictures and their whole views, as their tokens follow each other."""
    side, crop, first = _side(features, o), 0, 0
    for i, (h, w) in enumerate(zip(o.crop_grids[::2], o.crop_grids[1::2], strict=True)):
        crops = features[i] if features.dim() == 4 else features[crop : crop + 1 + h * w]
        crop += 1 + h * w
        height, width = o.valid_hw[2 * i : 2 * i + 2] if o.valid_hw else (h * side, w * side)
        both = [(crops[1 : 1 + h * w], height, width, w), (crops[:1], side, side, 1)]
        for separated, one in zip((True, False), both if o.order == "sub_glb" else both[::-1],
                                  strict=True):  # fmt: skip
            picture = Picture(one[0], first, *one[1:], separated)
            first += picture.rows + separated
            yield picture


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.hd_transform: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _place(
    o: Options, features: Tensor, learned: tuple[Tensor | None, ...], tokens: Tensor
) -> None:
    """Features into tokens; the other way round where nothing is learned."""
    depth, mean = tokens.shape[1], o.reduction == "mean"
    backward = learned[0] is None
    block = min(triton.next_power_of_2(depth), _BLOCK)
    strides = [*features.stride()[-3:], *tokens.stride()]
    side_by_side = features.shape[-1] % _VECTOR == 0 and strides[2] == strides[4] == 1
    fits = side_by_side and all(s % _VECTOR == 0 for s in (*strides[:2], strides[3]))
    vector = _VECTOR if fits else 1
    for p in _pictures(features, o):
        rows = p.rows + (p.separated and not backward)
        if rows == 0:
            continue
        _launch(
            place_kernel,
            (rows, triton.cdiv(depth, block)),
            tokens.device,
            p.features, *learned, tokens[p.first :],
            *(s // vector for s in strides),
            p.height, p.width, p.w_crop, max(_side(features, o), 1), o.skip_prefix,
            C=features.shape[-1], F=o.factor, MEAN=mean, BACKWARD=backward,
            VEC=vector, BK=block,
            num_warps=8 if block * tokens.element_size() > 8192 else 4, num_stages=1,
        )  # fmt: skip


def forward(image_features: Tensor, newline: Tensor, separator: Tensor, *args: Any) -> Tensor:
    """``vlmops::hd_transform_triton``."""
    o = Options(*args)
    # All checks.
    out: Tensor = torch.ops.vlmops.hd_transform_empty(image_features, newline, separator, *args)
    if out.numel() == 0:
        return out
    learned = [t.to(out.dtype).flatten().contiguous() for t in (newline, separator)]
    given = (image_features, *learned, out)
    features, ends, between, tokens = given if o.reduction == "mean" else map(_bits, given)
    _place(o, features, (ends, between), tokens)
    return out


def backward(
    grad: Tensor, image_features: Tensor, newline: Tensor, separator: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``vlmops::hd_transform_triton_backward``."""
    o, needs = _all_needs(args)
    made = torch.ops.vlmops.hd_transform_empty(image_features, newline, separator, *o)
    if (grad.shape, grad.dtype, grad.device) != (made.shape, made.dtype, made.device):
        raise RuntimeError(
            f"vlmops.hd_transform_backward: backend 'triton': grad: expected {list(made.shape)} of "
            f"{made.dtype} on {made.device}, got {list(grad.shape)} of {grad.dtype} on "
            f"{grad.device}"
        )
    grads = [t.new_empty(0) for t in (image_features, newline, separator)]
    if needs[0]:
        grads[0] = image_features.new_zeros(image_features.shape)
        if grad.numel() != 0 and grads[0].numel() != 0:
            moved = (grads[0], grad) if o.reduction == "mean" else (_bits(grads[0]), _bits(grad))
            _place(o, moved[0], (None, None), moved[1])
    pictures = list(_pictures(image_features, o))
    ends = [
        grad[p.first : p.first + p.rows].unflatten(0, (p.height, p.width + 1))[:, -1]
        for p in pictures
    ]
    between = [grad[p.first + p.rows :][:1] for p in pictures if p.separated]
    for i, (learned, rows) in enumerate(((newline, ends), (separator, between)), start=1):
        if needs[i]:
            total = torch.cat([grad[:0], *rows]).sum(0, dtype=torch.float64)
            grads[i] = total.to(torch.float32).to(learned.dtype).view(learned.shape)
    return tuple(grads)
