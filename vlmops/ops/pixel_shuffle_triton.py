"""Pixel shuffle in Triton: kernels and launchers. `vlmops.ops.pixel_shuffle` says what is computed.

Bytes: every element is read once and written once; backward with a norm reads two tensors.
InternVL, 13 tiles x 1024 tokens x 1024 channels in bfloat16: 54.5 MB, 13 us at the 4.3 TB/s that a
copy reaches on an H200, 18 at the 3.0 of an H100. PREDICTED, never measured: 90 % of a copy for
moves, 80 with a norm.

Threads: moves have a program for each 1024 channels of a merged token. What a channel is of its
block (pixel and channel) are divisions by constants, from which the compiler sees runs of C:
16-byte accesses. In order "cyx" with factor 2 a program reads a run of each of the four pixels and
interleaves them in registers. A norm's row is one program's, padded to a power of two. Backward 512
programs walk over the rows and keep the sums for the norm's weight and bias in registers.

C, factor, order, dtypes and options are in the compile key; grids, batches and strides are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmops.ops.pixel_shuffle import Options, _merged_shape

MAX_NORM = 16384  # channels that one program norms

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.
# Strides of pixels: image, row of blocks, column of blocks, y, x, channel; of merged tokens: image,
# token, channel. All but those of channels come in units of VEC elements.

_PLACE = ["s_image", "s_row", "s_column", "s_y", "s_x", "s_c", "s_m_image", "s_m_token", "s_m_c"]
_NUMBERS = [*_PLACE, "n_columns", "n_tokens", "n_rows"]


@triton.jit
def _place(
    i_token, n_columns, n_tokens, s_image, s_row, s_column, s_m_image, s_m_token,
    VEC: tl.constexpr,
):  # fmt: skip
    """Where the block of pixels of a merged token begins, and where the token does."""
    i_image = (i_token // n_tokens).to(tl.int64)
    i_number = i_token % n_tokens
    i_row, i_column = (i_number // n_columns).to(tl.int64), (i_number % n_columns).to(tl.int64)
    o_block = (i_image * s_image + i_row * s_row + i_column * s_column) * VEC
    return o_block, (i_image * s_m_image + i_number.to(tl.int64) * s_m_token) * VEC


@triton.jit
def _pixels(o_pixel, o_c, s_y, s_x, s_c, F: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Offsets of channels of pixels in their block."""
    o = (o_pixel // F).to(tl.int64) * (s_y * VEC) + (o_pixel % F).to(tl.int64) * (s_x * VEC)
    return o + (o_c if UNIT else o_c * s_c)


@triton.jit
def _quads(p, o_c, m, s_y, s_x, VEC: tl.constexpr):
    """The channels of the four pixels of a block, in order "cyx"."""
    b_0 = tl.load(p + o_c, mask=m, other=0.0)
    b_1 = tl.load(p + s_x * VEC + o_c, mask=m, other=0.0)
    b_2 = tl.load(p + s_y * VEC + o_c, mask=m, other=0.0)
    b_3 = tl.load(p + (s_y + s_x) * VEC + o_c, mask=m, other=0.0)
    return tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))


@triton.jit(do_not_specialize=_NUMBERS)
def shuffle_kernel(
    p_pixels, p_merged,
    s_image: tl.int64, s_row: tl.int64, s_column: tl.int64, s_y: tl.int64, s_x: tl.int64,
    s_c: tl.int64, s_m_image: tl.int64, s_m_token: tl.int64, s_m_c: tl.int64,
    n_columns: tl.int32, n_tokens: tl.int32,
    C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr, MEAN: tl.constexpr, INVERSE: tl.constexpr,
    UNIT: tl.constexpr, M_UNIT: tl.constexpr, VEC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pixels to merged tokens or back. Grid: tokens of images of one grid x parts of a token."""
    n_block: tl.constexpr = F * F
    n_k: tl.constexpr = C if MEAN else C * n_block
    o_block, o_merged = _place(
        tl.program_id(0), n_columns, n_tokens, s_image, s_row, s_column, s_m_image, s_m_token, VEC
    )
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m = o_k < n_k
    p_m = p_merged + o_merged + (o_k if M_UNIT else o_k * s_m_c)
    if MEAN:
        if INVERSE:
            b = tl.load(p_m, mask=m, other=0.0).to(tl.float32) * (1.0 / n_block)
            for i in range(n_block):
                o = _pixels(i + o_k * 0, o_k, s_y, s_x, s_c, F, UNIT, VEC)
                tl.store(p_pixels + o_block + o, b.to(p_pixels.dtype.element_ty), mask=m)
        else:
            b = tl.zeros([BK], tl.float32)
            for i in range(n_block):
                o = _pixels(i + o_k * 0, o_k, s_y, s_x, s_c, F, UNIT, VEC)
                b += tl.load(p_pixels + o_block + o, mask=m, other=0.0).to(tl.float32)
            tl.store(p_m, (b * (1.0 / n_block)).to(p_merged.dtype.element_ty), mask=m)
    elif CYX and F == 2 and UNIT and not INVERSE:
        o_c = tl.program_id(1) * (BK // 4) + tl.arange(0, BK // 4)
        tl.store(p_m, _quads(p_pixels + o_block, o_c, o_c < C, s_y, s_x, VEC), mask=m)
    else:
        o_pixel, o_c = (o_k % n_block, o_k // n_block) if CYX else (o_k // C, o_k % C)
        p_x = p_pixels + o_block + _pixels(o_pixel, o_c, s_y, s_x, s_c, F, UNIT, VEC)
        if INVERSE:
            tl.store(p_x, tl.load(p_m, mask=m), mask=m)
        else:
            tl.store(p_m, tl.load(p_x, mask=m), mask=m)


@triton.jit
def _total(b_x):
    """In float64: the order of a sum follows the layout, and so alignment and strides, unseen."""
    return tl.sum(b_x.to(tl.float64)).to(tl.float32)


@triton.jit
def _row(
    p_pixels, i_pixel, o_k, m, s_y, s_x, s_c,
    C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr, MEAN: tl.constexpr, CHANNEL: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A row in float32: a pixel's C channels, the merged token, or the mean of its pixels."""
    n_block: tl.constexpr = F * F
    if MEAN:
        b_x = tl.zeros([BK], tl.float32)
        for i in range(n_block):
            o = _pixels(i + o_k * 0, o_k, s_y, s_x, s_c, F, UNIT, VEC)
            b_x += tl.load(p_pixels + o, mask=m, other=0.0).to(tl.float32)
        b_x = b_x * (1.0 / n_block)
    else:
        o = _own(i_pixel, o_k, s_y, s_x, s_c, C, F, CYX, CHANNEL, UNIT, VEC)
        b_x = tl.load(p_pixels + o, mask=m, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _own(
    i_pixel, o_k, s_y, s_x, s_c,
    C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr, CHANNEL: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Offsets of a row's elements in their block of pixels, where they are not averaged."""
    if CHANNEL:
        o = _pixels(i_pixel + o_k * 0, o_k, s_y, s_x, s_c, F, UNIT, VEC)
    elif CYX:
        o = _pixels(o_k % (F * F), o_k // (F * F), s_y, s_x, s_c, F, UNIT, VEC)
    else:
        o = _pixels(o_k // C, o_k % C, s_y, s_x, s_c, F, UNIT, VEC)
    return o


@triton.jit
def _in_token(
    i_pixel, o_k, s_m_c, C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr,
    CHANNEL: tl.constexpr, M_UNIT: tl.constexpr,
):  # fmt: skip
    """Offsets of a row's elements in their merged token."""
    o = o_k
    if CHANNEL:
        o = o_k * (F * F) + i_pixel if CYX else i_pixel * C + o_k
    return o if M_UNIT else o * s_m_c


@triton.jit
def _statistics(b_x, m, eps, n: tl.constexpr, LAYER: tl.constexpr):
    """X normed, and what it was multiplied by. Sums are of deviations from a first mean."""
    b_d = b_x
    if LAYER:
        b_d = tl.where(m, b_x - _total(b_x) / n, 0.0)
        b_d = tl.where(m, b_d - _total(b_d) / n, 0.0)
    b_scale = 1.0 / tl.sqrt_rn(_total(b_d * b_d) / n + eps)
    return b_d * b_scale, b_scale


@triton.jit
def _vector(p, o_k, m, s, default: tl.constexpr):
    if p is None:
        b = o_k.to(tl.float32) * 0.0 + default
    else:
        b = tl.load(p + o_k * s, mask=m, other=0.0).to(tl.float32)
    return b


@triton.jit(do_not_specialize=[*_NUMBERS, "s_w", "s_b", "eps", "offset"])
def norm_kernel(
    p_pixels, p_merged, p_weight, p_bias,
    s_image: tl.int64, s_row: tl.int64, s_column: tl.int64, s_y: tl.int64, s_x: tl.int64,
    s_c: tl.int64, s_m_image: tl.int64, s_m_token: tl.int64, s_m_c: tl.int64,
    n_columns: tl.int32, n_tokens: tl.int32, s_w: tl.int64, s_b: tl.int64,
    eps: tl.float32, offset: tl.float32,
    C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr, MEAN: tl.constexpr, CHANNEL: tl.constexpr,
    LAYER: tl.constexpr, UNIT: tl.constexpr, M_UNIT: tl.constexpr, VEC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Merged tokens, normed. Grid: tokens of images of one grid x rows of a token."""
    n: tl.constexpr = C if MEAN or CHANNEL else C * F * F
    o_block, o_merged = _place(
        tl.program_id(0), n_columns, n_tokens, s_image, s_row, s_column, s_m_image, s_m_token, VEC
    )
    i_pixel = tl.program_id(1)
    o_k = tl.arange(0, BK)
    m = o_k < n
    b_x = _row(
        p_pixels + o_block, i_pixel, o_k, m, s_y, s_x, s_c, C, F, CYX, MEAN, CHANNEL, UNIT, VEC, BK
    )
    b_x, _ = _statistics(b_x, m, eps, n, LAYER)
    if p_weight is not None:
        b_x = b_x * (_vector(p_weight, o_k, m, s_w, 1.0) + offset)
    b_x = b_x + _vector(p_bias, o_k, m, s_b, 0.0)
    p_m = p_merged + o_merged + _in_token(i_pixel, o_k, s_m_c, C, F, CYX, CHANNEL, M_UNIT)
    tl.store(p_m, b_x.to(p_merged.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=[*_NUMBERS, "s_w", "s_b", "eps", "offset"])
def norm_quads_kernel(
    p_pixels, p_merged, p_weight, p_bias,
    s_image: tl.int64, s_row: tl.int64, s_column: tl.int64, s_y: tl.int64, s_x: tl.int64,
    s_c: tl.int64, s_m_image: tl.int64, s_m_token: tl.int64, s_m_c: tl.int64,
    n_columns: tl.int32, n_tokens: tl.int32, s_w: tl.int64, s_b: tl.int64,
    eps: tl.float32, offset: tl.float32,
    C: tl.constexpr, LAYER: tl.constexpr, VEC: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same for four pixels that are normed each for itself, in order "cyx". Grid: tokens."""
    o_block, o_merged = _place(
        tl.program_id(0), n_columns, n_tokens, s_image, s_row, s_column, s_m_image, s_m_token, VEC
    )
    o_c = tl.arange(0, BC)
    m = o_c < C
    b_w = _vector(p_weight, o_c, m, s_w, 1.0)
    if p_weight is not None:
        b_w = b_w + offset
    b_b = _vector(p_bias, o_c, m, s_b, 0.0)
    p_0 = p_pixels + o_block + o_c
    b_0, _ = _statistics(tl.load(p_0, mask=m, other=0.0).to(tl.float32), m, eps, C, LAYER)
    p_1 = p_0 + s_x * VEC
    b_1, _ = _statistics(tl.load(p_1, mask=m, other=0.0).to(tl.float32), m, eps, C, LAYER)
    p_2 = p_0 + s_y * VEC
    b_2, _ = _statistics(tl.load(p_2, mask=m, other=0.0).to(tl.float32), m, eps, C, LAYER)
    p_3 = p_1 + s_y * VEC
    b_3, _ = _statistics(tl.load(p_3, mask=m, other=0.0).to(tl.float32), m, eps, C, LAYER)
    b_even = tl.interleave(b_0 * b_w + b_b, b_2 * b_w + b_b)
    b_odd = tl.interleave(b_1 * b_w + b_b, b_3 * b_w + b_b)
    o_k = tl.arange(0, 4 * BC)
    b_y = tl.interleave(b_even, b_odd).to(p_merged.dtype.element_ty)
    tl.store(p_merged + o_merged + o_k, b_y, mask=o_k < 4 * C)


@triton.jit(do_not_specialize=[*_NUMBERS, "s_w", "eps", "offset", "s_o_row", "s_o_column", "s_o_y",
                               "s_o_x", "s_o_image"])  # fmt: skip
def norm_backward_kernel(
    p_pixels, p_merged, p_out, p_weight, p_sums,
    s_image: tl.int64, s_row: tl.int64, s_column: tl.int64, s_y: tl.int64, s_x: tl.int64,
    s_c: tl.int64, s_m_image: tl.int64, s_m_token: tl.int64, s_m_c: tl.int64,
    s_o_image: tl.int64, s_o_row: tl.int64, s_o_column: tl.int64, s_o_y: tl.int64, s_o_x: tl.int64,
    n_columns: tl.int32, n_tokens: tl.int32, n_rows: tl.int64, s_w: tl.int64,
    eps: tl.float32, offset: tl.float32,
    C: tl.constexpr, F: tl.constexpr, CYX: tl.constexpr, MEAN: tl.constexpr, CHANNEL: tl.constexpr,
    LAYER: tl.constexpr, UNIT: tl.constexpr, M_UNIT: tl.constexpr, VEC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Gradients of pixels, and each program's sums [2, n] for weight and bias; either may be None.

    p_merged is the gradient of the result. Grid: programs, which take rows in turns.
    """
    n_block: tl.constexpr = F * F
    n: tl.constexpr = C if MEAN or CHANNEL else C * n_block
    o_k = tl.arange(0, BK)
    m = o_k < n
    b_w = _vector(p_weight, o_k, m, s_w, 1.0)
    if p_weight is not None:
        b_w = b_w + offset
    b_of_weight, b_of_bias = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    i_first = tl.program_id(0).to(tl.int64)
    for i_turn in range(0, (n_rows - i_first + tl.num_programs(0) - 1) // tl.num_programs(0)):
        i_line = i_first + i_turn * tl.num_programs(0)
        i_token, i_pixel = (
            (i_line // n_block, i_line % n_block) if CHANNEL else (i_line, i_line * 0)
        )
        o_block, o_merged = _place(
            i_token, n_columns, n_tokens, s_image, s_row, s_column, s_m_image, s_m_token, VEC
        )
        b_x = _row(
            p_pixels + o_block, i_pixel, o_k, m, s_y, s_x, s_c,
            C, F, CYX, MEAN, CHANNEL, UNIT, VEC, BK,
        )  # fmt: skip
        o_g = _in_token(i_pixel, o_k, s_m_c, C, F, CYX, CHANNEL, M_UNIT)
        b_g = tl.load(p_merged + o_merged + o_g, mask=m, other=0.0).to(tl.float32)
        b_x, b_scale = _statistics(b_x, m, eps, n, LAYER)
        b_of_weight += b_g * b_x
        b_of_bias += b_g
        if p_out is not None:
            b_wg = b_w * b_g
            b_d = b_wg - b_x * (_total(b_wg * b_x) / n)
            if LAYER:
                b_d -= _total(b_wg) / n
            b_d = b_d * b_scale
            o_out, _ = _place(
                i_token, n_columns, n_tokens, s_o_image, s_o_row, s_o_column, 0, 0, VEC
            )
            if MEAN:
                b_d = b_d * (1.0 / n_block)
                for i in range(n_block):
                    o = _pixels(i + o_k * 0, o_k, s_o_y, s_o_x, 1, F, True, VEC)
                    tl.store(p_out + o_out + o, b_d.to(p_out.dtype.element_ty), mask=m)
            else:
                o = _own(i_pixel, o_k, s_o_y, s_o_x, 1, C, F, CYX, CHANNEL, True, VEC)
                tl.store(p_out + o_out + o, b_d.to(p_out.dtype.element_ty), mask=m)
    if p_sums is not None:
        p = p_sums + tl.program_id(0).to(tl.int64) * (2 * n) + o_k
        tl.store(p, b_of_weight, mask=m)
        tl.store(p + n, b_of_bias, mask=m)


# Launchers.

CHECK = os.environ.get("VLMOPS_CHECK") == "1"
INTERPRETED = not isinstance(shuffle_kernel, triton.JITFunction)
_VECTOR = 8  # elements: 16 bytes of bfloat16
_PART = 1024  # channels that one program moves
_BACKWARD_PROGRAMS = 512


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = (shuffle_kernel, norm_kernel, norm_quads_kernel, norm_backward_kernel)
    if INTERPRETED:
        return 0
    # What a device's entry holds first is the kernels by key.
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


class Images(NamedTuple):
    """Images of one grid that follow one another; pixels and tokens begin with theirs."""

    count: int  # type: ignore[assignment]
    rows: int
    columns: int
    """Blocks of an image."""
    pixel: int
    token: int
    """The first one, in its sequence."""
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Merged ones, of an image."""
        return self.rows * self.columns


def _images(shape: torch.Size, o: Options) -> Iterator[Images]:
    f = o.factor
    batch = 1 if len(shape) == 2 else shape[0]
    if o.layout == "blocks":
        blocks = (shape[-2] - o.skip_prefix) // (f * f)
        yield Images(batch, 1, blocks, o.skip_prefix, 0, 0, 0)
        return
    if len(shape) == 4:
        grids = [(shape[1], shape[2])]
    elif o.layout == "auto":
        side = round((shape[-2] - o.skip_prefix) ** 0.5)
        grids = [(side, side)]
    else:
        grids = list(zip(o.grid_hw[::2], o.grid_hw[1::2], strict=True))
    pixel = token = 0
    at = 0
    while at < len(grids):
        h, w = grids[at]
        alike = 1
        while at + alike < len(grids) and grids[at + alike] == (h, w):
            alike += 1
        count = alike if o.layout == "packed" else batch
        images = Images(count, h // f, w // f, pixel + o.skip_prefix, token, h, w)
        yield images
        pixel += alike * (o.skip_prefix + h * w)
        token += alike * images.tokens
        at += alike


def _pixel_strides(t: Tensor, images: Images, o: Options) -> tuple[int, list[int]]:
    """Offset of the first block, and strides as the kernels take them."""
    f, token, channel = o.factor, t.stride(-2), t.stride(-1)
    if o.layout == "blocks":
        whole = 0 if t.dim() == 2 else t.stride(0)
        return images.pixel * token, [whole, 0, f * f * token, f * token, token, channel]
    y = t.stride(1) if t.dim() == 4 else images.width * token
    if o.layout == "packed":
        whole = (o.skip_prefix + images.height * images.width) * token
    else:
        whole = 0 if t.dim() == 2 else t.stride(0)
    return images.pixel * token, [whole, f * y, f * token, y, token, channel]


def _merged_strides(t: Tensor, images: Images, o: Options) -> tuple[int, list[int]]:
    token = t.stride(-2)
    whole = 0 if t.dim() == 2 else t.stride(0)
    if o.layout == "packed":
        whole = images.tokens * token
    return images.token * token, [whole, token, t.stride(-1)]


def _from(t: Tensor, offset: int) -> Tensor:
    """A view of the tensor's memory from an element on."""
    return t.as_strided((1,), (1,), t.storage_offset() + offset)


def _width(*strides: list[int]) -> int:
    """Elements that all strides but those of channels are multiples of."""
    return _VECTOR if all(s % _VECTOR == 0 for some in strides for s in some[:-1]) else 1


def _units(strides: list[int], vector: int) -> list[int]:
    return [*(s // vector for s in strides[:-1]), strides[-1]]


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.pixel_shuffle: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        constants.pop("num_warps")
        kernel[grid](*args, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **constants, num_stages=1)


def _fail(name: str, problem: str) -> None:
    raise RuntimeError(f"vlmops.pixel_shuffle: backend 'triton': {name}: {problem}")


def _normed(o: Options, channels: int) -> int:
    """Numbers that one mean and variance are taken over."""
    merged = o.norm_axis == "merged" and o.reduction == "none"
    return channels * (o.factor**2 if merged else 1)


def _refuse(o: Options, channels: int, merged: Tensor) -> None:
    if o.norm != "none" and _normed(o, channels) > MAX_NORM:
        _fail(
            "norm",
            f"expected at most {MAX_NORM} channels, which one program normalises, got "
            f"{_normed(o, channels)}; use backend='cuda'",
        )
    tokens = merged.numel() // max(merged.shape[-1], 1)
    if tokens * o.factor**2 >= 2**31:
        _fail(
            "hidden_states",
            "expected fewer than 2^31 tokens, a launch of Triton's holds no more, got a result of "
            f"shape {list(merged.shape)}; use backend='cuda', or call with a part of the batch",
        )


def _constants(o: Options, channels: int) -> dict[str, Any]:
    return {"C": channels, "F": o.factor, "CYX": o.order == "cyx", "MEAN": o.reduction == "mean"}


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _move(pixels: Tensor, merged: Tensor, o: Options, inverse: bool) -> None:
    channels, depth = pixels.shape[-1], merged.shape[-1]
    for images in _images(pixels.shape, o):
        tokens = images.count * images.tokens
        if tokens * channels == 0:
            continue
        x_at, x = _pixel_strides(pixels, images, o)
        m_at, m = _merged_strides(merged, images, o)
        vector = _width([x_at, *x], [m_at, *m])
        block = min(_PART, max(triton.next_power_of_2(depth), 4))
        _launch(
            shuffle_kernel,
            (tokens, triton.cdiv(depth, block)),
            pixels.device,
            _from(pixels, x_at), _from(merged, m_at),
            *_units(x, vector), *_units(m, vector), images.columns, images.tokens,
            **_constants(o, channels), INVERSE=inverse,
            UNIT=x[-1] == 1, M_UNIT=m[-1] == 1, VEC=vector, BK=block, num_warps=4,
        )  # fmt: skip


def _norm(pixels: Tensor, merged: Tensor, o: Options) -> None:
    channels = pixels.shape[-1]
    by_channel = o.norm_axis == "channel"
    weights = [0 if v is None else v.stride(0) for v in (o.norm_weight, o.norm_bias)]
    for images in _images(pixels.shape, o):
        tokens = images.count * images.tokens
        if tokens * channels == 0:
            continue
        x_at, x = _pixel_strides(pixels, images, o)
        m_at, m = _merged_strides(merged, images, o)
        vector = _width([x_at, *x], [m_at, *m])
        args = (
            _from(pixels, x_at), _from(merged, m_at), o.norm_weight, o.norm_bias,
            *_units(x, vector), *_units(m, vector), images.columns, images.tokens, *weights,
            o.eps, o.norm_offset,
        )  # fmt: skip
        layer = o.norm == "layer"
        if by_channel and o.order == "cyx" and o.factor == 2 and x[-1] == m[-1] == 1:
            block = triton.next_power_of_2(channels)
            _launch(
                norm_quads_kernel, (tokens,), pixels.device, *args,
                C=channels, LAYER=layer, VEC=vector, BC=block, num_warps=_warps(2 * block),
            )  # fmt: skip
            continue
        block = triton.next_power_of_2(_normed(o, channels))
        _launch(
            norm_kernel,
            (tokens, o.factor**2 if by_channel else 1),
            pixels.device,
            *args,
            **_constants(o, channels), CHANNEL=by_channel, LAYER=layer,
            UNIT=x[-1] == 1, M_UNIT=m[-1] == 1, VEC=vector, BK=block, num_warps=_warps(block),
        )  # fmt: skip


def _check(hidden_states: Tensor, out: Tensor | None, grad: Tensor | None, o: Options) -> None:
    torch.ops.vlmops.pixel_shuffle_check(hidden_states, out, grad, *o)


def _run(hidden_states: Tensor, merged: Tensor, o: Options) -> None:
    _refuse(o, hidden_states.shape[-1], merged)
    if o.norm == "none":
        _move(hidden_states, merged, o, inverse=False)
    else:
        _norm(hidden_states, merged, o)


def forward(hidden_states: Tensor, *args: Any) -> Tensor:
    """``vlmops::pixel_shuffle_triton``."""
    o = Options(*args)
    _check(hidden_states, None, None, o)
    merged = hidden_states.new_empty(_merged_shape(hidden_states, o))
    _run(hidden_states, merged, o)
    return merged


def out(hidden_states: Tensor, given: Tensor, *args: Any) -> None:
    """``vlmops::pixel_shuffle_triton_out``."""
    o = Options(*args)
    _check(hidden_states, given, None, o)
    _run(hidden_states, given, o)


def _new_pixels(hidden_states: Tensor, merged: Tensor, o: Options) -> Tensor:
    """Zeros where no merged token has them."""
    depth = hidden_states.shape[-1] * (1 if o.reduction == "mean" else o.factor**2)
    covered = merged.numel() // max(depth, 1) * o.factor**2 * hidden_states.shape[-1]
    new = merged.new_empty if covered == hidden_states.numel() else merged.new_zeros
    return new(hidden_states.shape)


def backward(grad: Tensor, hidden_states: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``vlmops::pixel_shuffle_triton_backward``."""
    count = len(Options._fields)
    o = Options(*args[:count])
    needs = [*args[count:], True, True, True][:3]
    _check(hidden_states, None, grad, o)
    channels = hidden_states.shape[-1]
    _refuse(o, channels, grad)
    nothing = grad.new_empty(0)
    pixels = _new_pixels(hidden_states, grad, o) if needs[0] else None
    if o.norm == "none":
        if pixels is not None:
            _move(pixels, grad, o, inverse=True)
        return nothing if pixels is None else pixels, nothing, nothing
    of_weight = needs[1] and o.norm_weight is not None
    of_bias = needs[2] and o.norm_bias is not None
    sums = []
    n, by_channel = _normed(o, channels), o.norm_axis == "channel"
    for images in _images(hidden_states.shape, o):
        rows = images.count * images.tokens * (o.factor**2 if by_channel else 1)
        if rows * channels == 0:
            continue
        x_at, x = _pixel_strides(hidden_states, images, o)
        m_at, m = _merged_strides(grad, images, o)
        to_at, to = (0, [0] * 6) if pixels is None else _pixel_strides(pixels, images, o)
        vector = _width([x_at, *x], [m_at, *m], [to_at, *to])
        programs = min(rows, _BACKWARD_PROGRAMS)
        partial = None
        if of_weight or of_bias:
            partial = grad.new_empty((programs, 2, n), dtype=torch.float32)
            sums.append(partial)
        block = triton.next_power_of_2(n)
        _launch(
            norm_backward_kernel,
            (programs,),
            grad.device,
            _from(hidden_states, x_at), _from(grad, m_at),
            None if pixels is None else _from(pixels, to_at), o.norm_weight, partial,
            *_units(x, vector), *_units(m, vector), *_units(to, vector)[:-1],
            images.columns, images.tokens, rows,
            0 if o.norm_weight is None else o.norm_weight.stride(0), o.eps, o.norm_offset,
            **_constants(o, channels), CHANNEL=by_channel, LAYER=o.norm == "layer",
            UNIT=x[-1] == 1, M_UNIT=m[-1] == 1, VEC=vector, BK=block, num_warps=_warps(block),
        )  # fmt: skip

    def vector_grad(given: Tensor | None, which: int, wanted: bool) -> Tensor:
        if given is None or not wanted:
            return nothing
        if not sums:
            return torch.zeros_like(given, memory_format=torch.contiguous_format)
        # In a fixed order, in float64: deterministic, and no worse than the CPU's.
        return torch.cat(sums)[:, which].sum(0, dtype=torch.float64).to(given.dtype)

    return (
        nothing if pixels is None else pixels,
        vector_grad(o.norm_weight, 0, of_weight),
        vector_grad(o.norm_bias, 1, of_bias),
    )


def inverse(
    hidden_states: Tensor,
    factor: int = 2,
    layout: str = "auto",
    grid_hw: Any = (),
    order: str = "yxc",
) -> Tensor:
    """``vlmops::pixel_shuffle_triton_inverse``: the compiled op knows what to refuse, and how."""
    pixels: Tensor = torch.ops.vlmops.pixel_shuffle_inverse_empty(
        hidden_states, factor, layout, grid_hw, order
    )
    o = Options(None, None, factor, layout, grid_hw, order)
    _refuse(o, pixels.shape[-1], hidden_states)
    _move(pixels, hidden_states, o, inverse=True)
    return pixels
