"""Patch embedding in Triton: kernels and launchers. `vlmops.ops.patch_embed` says what is computed.

One product whose left side is read from where the pixels are: a program has a tile of tokens and
channels, [BM, BD], walks over K in steps of BK, and finds pixel k of patch n at an offset of the
patch plus one of k; nothing of the size of the patches is ever stored. Rows are tokens, not
patches: those of a prefix multiply nothing (1 in 577) and are filled in by the epilogue, which adds
bias and positions in float32 and rounds once. What takes whole rows (norms) and tables beyond the
first go over tokens that are kept in float32, in `finish_kernel`, once for each.

Bytes: pixels, weight and table once from DRAM, tokens once to it. Programs that share pixels run
side by side, and weights of at most 3 MB stay in L2. CLIP-L/14-336, 5 images, bfloat16: 11.7 MB,
2.7 us at the 4.3 TB/s that a copy reaches on an H200, and 3.5 GFLOP, 3.5 us at 989 TFLOP/s.
Qwen2-VL, 64 frames: 161 MB, 37 us, but 99 GFLOP, 100 us: a product like others.

PREDICTED, never measured: 50 to 65 % of a tensor core's rate where patches come flattened or are
16 wide; 30 to 50 % where they are 14 wide, since rows of 28 bytes can be read 4 bytes at a time at
most, and a warp's 128 bytes then lie in 5 rows. float32 has no tensor core here ("ieee"): 30 to 50
% of the FMA rate. A norm adds 8 bytes an element, each further table as much.

Threads: pixels come by cp.async, 2 to a thread where patches are 14 wide, else 8 (bfloat16).
Sizes of images, batches, grids and all strides stay out of the compile key; C, T, P, D, dtypes and
the class of the tile are in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from vlmops.ops import patch_embed_panels as panels
from vlmops.ops.patch_embed_panels import Addend, Arguments

# Kernels. i_ index, o_ offset, m_ mask, p_ pointer, b_ block of values, s_ stride, n_ count.


@triton.jit
def _place(
    o_patch, n_grid_h, n_grid_w, s_t, s_h, s_w,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Where patches of an image begin in it, in elements."""
    o_w = (o_patch % n_grid_w).to(tl.int64)
    o_row = o_patch // n_grid_w
    o_h = (o_row % n_grid_h).to(tl.int64)
    o_t = (o_row // n_grid_h).to(tl.int64)
    b_place = o_w * SW
    if not UNIT:
        b_place *= s_w
    return o_t * s_t * (ST * VEC) + o_h * s_h * (SH * VEC) + b_place


@triton.jit
def _gather(
    p_x, p_map, b_place, m_row, o_k, s_c, s_t, s_h, s_w,
    dtype: tl.constexpr, SC: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Pixels o_k of the patches that begin at b_place, rounded to dtype: [rows, o_k]."""
    b_o = (o_k % SW).to(tl.int64)
    if not UNIT:
        b_o *= s_w
    # Strides are multiples of VEC: Triton then knows that pixels side by side are aligned too.
    if SH > 1:
        b_o += (o_k // SW % SH).to(tl.int64) * s_h * VEC
    if ST > 1:
        b_o += (o_k // (SW * SH) % ST).to(tl.int64) * s_t * VEC
    o_c = o_k // (SW * SH * ST)
    if SC > 1:
        b_o += o_c.to(tl.int64) * s_c * VEC
    m_k = o_k < SC * ST * SH * SW
    m = m_row[:, None] & m_k[None, :]
    b_x = tl.load(p_x + b_place[:, None] + b_o[None, :], mask=m, other=0)
    if p_map is not None:
        if p_x.dtype.element_ty == tl.uint8:
            b_x = tl.load(p_map + (o_c * 256)[None, :] + b_x.to(tl.int32), mask=m, other=0.0)
        else:
            b_slope = tl.load(p_map + 2 * o_c, mask=m_k, other=0.0)
            b_intercept = tl.load(p_map + 2 * o_c + 1, mask=m_k, other=0.0)
            b_x = b_x.to(tl.float32) * b_slope[None, :] + b_intercept[None, :]
    if b_x.dtype != dtype:
        b_x = b_x.to(tl.float32).to(dtype)
    return b_x


@triton.jit
def _tokens_of(o_row, n_rows, n_prefix, n_patches, LAST: tl.constexpr):
    """Image, token and patch of each row, and whether it is a patch."""
    n_tokens = n_prefix + n_patches
    o_image = o_row // n_tokens
    o_token = o_row % n_tokens
    o_patch = o_token
    if not LAST:
        o_patch = o_token - n_prefix
    m_patch = (o_patch >= 0) & (o_patch < n_patches) & (o_row < n_rows)
    return o_image.to(tl.int64), o_token, o_patch, m_patch


@triton.jit
def _add_position(
    b_y, p_table, p_index, p_factor, o_image, o_token, m_row, o_d,
    s_index_b, s_index_n, s_index_t, s_factor_b, s_factor_n, s_factor_t, n_taps, n_table,
    D: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """b_y [rows, o_d] and the rows of a table that belong to tokens."""
    m = m_row[:, None] & (o_d < D)[None, :]
    p_f = p_factor
    if p_factor is not None:
        p_f = p_factor + o_image * s_factor_b + o_token * s_factor_n
    if p_index is None:
        p_row = p_table + o_token.to(tl.int64) * D
        b_row = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if p_factor is not None:
            b_row *= tl.load(p_f, mask=m_row, other=0.0).to(tl.float32)[:, None]
        b_y += b_row
    else:
        p_i = p_index + o_image * s_index_b + o_token * s_index_n
        for i_tap in range(0, n_taps):
            b_i = tl.load(p_i + i_tap * s_index_t, mask=m_row, other=0).to(tl.int64)
            if CHECK:
                m_i = (b_i >= 0) & (b_i < n_table)
                tl.device_assert(m_i, "vlmops.patch_embed: positions.index: names no row")
            # A value that nobody may read back must not lead out of bounds either.
            b_i = tl.minimum(tl.maximum(b_i, 0), n_table - 1)
            p_row = p_table + b_i * D
            b_row = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            if p_factor is not None:
                b_f = tl.load(p_f + i_tap * s_factor_t, mask=m_row, other=0.0)
                b_row *= b_f.to(tl.float32)[:, None]
            b_y += b_row
    return b_y


# What would otherwise make a new compile key: sizes and strides; memory that starts anywhere.
_PIXELS = ["s_b", "s_c", "s_t", "s_h", "s_w"]
_TAPS = [f"s_{x}_{d}" for x in ("index", "factor") for d in "bnt"]
_SIZES = ["n_rows", "n_prefix", "n_patches", "n_grid_h", "n_grid_w", "n_first", "n_taps", "n_table"]
_UNALIGNED = ["p_bias", "p_map", "p_prefix", "p_index", "p_factor", "p_norm", "p_norm_bias"]


@triton.jit(
    do_not_specialize=[*_PIXELS, *_TAPS, *_SIZES], do_not_specialize_on_alignment=_UNALIGNED
)
def product_kernel(
    p_x, p_map, p_w, p_bias, p_prefix, p_table, p_index, p_factor, p_out,
    # Of pixels in units of VEC elements, but for the columns'.
    s_b: tl.int64, s_c: tl.int64, s_t: tl.int64, s_h: tl.int64, s_w: tl.int64,
    s_index_b: tl.int64, s_index_n: tl.int64, s_index_t: tl.int64,
    s_factor_b: tl.int64, s_factor_n: tl.int64, s_factor_t: tl.int64,
    n_rows: tl.int32, n_prefix: tl.int32, n_patches: tl.int32,
    n_grid_h: tl.int32, n_grid_w: tl.int32, n_first: tl.int32,
    n_taps: tl.int32, n_table: tl.int32,
    D: tl.constexpr, SC: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, PATCHES_ONLY: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Tokens [n_rows, D] of images of one size. Grid: tiles of tokens x tiles of channels."""
    # Channels first, so that programs that read the same pixels run at one time.
    n_tiles: tl.constexpr = (D + BD - 1) // BD
    i_m, i_d = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    n_k: tl.constexpr = SC * ST * SH * SW
    dtype: tl.constexpr = p_w.dtype.element_ty
    o_row = i_m * BM + tl.arange(0, BM)
    o_d = i_d * BD + tl.arange(0, BD)
    m_row, m_d = o_row < n_rows, o_d < D
    o_image, o_token, o_patch, m_patch = _tokens_of(o_row, n_rows, n_prefix, n_patches, LAST)
    b_place = _place(o_patch, n_grid_h, n_grid_w, s_t, s_h, s_w, ST, SH, SW, UNIT, VEC)
    b_place += o_image * s_b * VEC
    p_rows = p_w + o_d.to(tl.int64) * n_k
    b_y = tl.zeros([BM, BD], tl.float32)
    for i_k in range(0, n_k, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = _gather(
            p_x, p_map, b_place, m_patch, o_k, s_c, s_t, s_h, s_w,
            dtype, SC, ST, SH, SW, UNIT, VEC,
        )  # fmt: skip
        m_w = (o_k < n_k)[:, None] & m_d[None, :]
        b_w = tl.load(p_rows[None, :] + o_k[:, None], mask=m_w, other=0.0)
        if dtype == tl.float32:
            # A sum of sums: one chain of K additions is less exact than a library that splits
            # K. By fma, since a plain addition would be made part of the chain.
            b_y = tl.fma(tl.dot(b_x, b_w, input_precision="ieee"), 1.0, b_y)
        else:
            b_y = tl.dot(b_x, b_w, b_y)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if p_prefix is not None:
        o_extra = o_token
        if LAST:
            o_extra = o_token - n_patches
        m_extra = (m_row & (m_patch == 0))[:, None]
        p_extra = p_prefix + (o_extra.to(tl.int64) * D)[:, None] + o_d[None, :]
        b_extra = tl.load(p_extra, mask=m_extra & m_d[None, :], other=0.0)
        b_y = tl.where(m_extra, b_extra.to(tl.float32), b_y)
    if p_table is not None:
        o_place, m_place = o_token + n_first, m_row
        if PATCHES_ONLY:
            o_place, m_place = o_patch + n_first, m_patch
        b_y = _add_position(
            b_y, p_table, p_index, p_factor, o_image, o_place, m_place, o_d,
            s_index_b, s_index_n, s_index_t, s_factor_b, s_factor_n, s_factor_t, n_taps, n_table,
            D, CHECK,
        )  # fmt: skip
    p_y = p_out + (o_row.to(tl.int64) * D)[:, None] + o_d[None, :]
    tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=[*_TAPS, *_SIZES], do_not_specialize_on_alignment=_UNALIGNED)
def finish_kernel(
    p_y, p_norm, p_norm_bias, p_table, p_index, p_factor, p_out,
    s_index_b: tl.int64, s_index_n: tl.int64, s_index_t: tl.int64,
    s_factor_b: tl.int64, s_factor_n: tl.int64, s_factor_t: tl.int64,
    n_rows: tl.int32, n_prefix: tl.int32, n_patches: tl.int32, n_first: tl.int32,
    n_taps: tl.int32, n_table: tl.int32, eps: tl.float32,
    D: tl.constexpr, NORM: tl.constexpr, LAST: tl.constexpr, PATCHES_ONLY: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Norm and a position of tokens [n_rows, D], float32. Grid: BM tokens each."""
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_row, m_d = o_row < n_rows, o_d < D
    o_image, o_token, o_patch, m_patch = _tokens_of(o_row, n_rows, n_prefix, n_patches, LAST)
    o_y = (o_row.to(tl.int64) * D)[:, None] + o_d[None, :]
    m = m_row[:, None] & m_d[None, :]
    b_y = tl.load(p_y + o_y, mask=m, other=0.0)
    if NORM != "none":
        b_n = b_y
        if NORM == "layer":
            b_mean = tl.sum(b_y, axis=1) / D
            b_n = tl.where(m, b_y - b_mean[:, None], 0.0)
        b_n *= (1.0 / tl.sqrt_rn(tl.sum(b_n * b_n, axis=1) / D + eps))[:, None]
        if p_norm is not None:
            b_n *= tl.load(p_norm + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if p_norm_bias is not None:
            b_n += tl.load(p_norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_y = tl.where(m_patch[:, None], b_n, b_y)
    if p_table is not None:
        o_place, m_place = o_token + n_first, m_row
        if PATCHES_ONLY:
            o_place, m_place = o_patch + n_first, m_patch
        b_y = _add_position(
            b_y, p_table, p_index, p_factor, o_image, o_place, m_place, o_d,
            s_index_b, s_index_n, s_index_t, s_factor_b, s_factor_n, s_factor_t, n_taps, n_table,
            D, CHECK,
        )  # fmt: skip
    tl.store(p_out + o_y, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit(
    do_not_specialize=[*_PIXELS, *_SIZES, "n_begin"], do_not_specialize_on_alignment=_UNALIGNED
)
def pack_kernel(
    p_x, p_map, p_out,
    s_b: tl.int64, s_c: tl.int64, s_t: tl.int64, s_h: tl.int64, s_w: tl.int64,
    n_begin: tl.int32, n_rows: tl.int32, n_patches: tl.int32, n_grid_h: tl.int32,
    n_grid_w: tl.int32,
    SC: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    UNIT: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Patches [n_begin, n_begin + n_rows) of images of one size. Grid: tiles of rows x of K."""
    n_k: tl.constexpr = SC * ST * SH * SW
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_row = o_row < n_rows
    o_all = o_row + n_begin
    b_place = _place(o_all % n_patches, n_grid_h, n_grid_w, s_t, s_h, s_w, ST, SH, SW, UNIT, VEC)
    b_place += (o_all // n_patches).to(tl.int64) * s_b * VEC
    b_x = _gather(
        p_x, p_map, b_place, m_row, o_k, s_c, s_t, s_h, s_w,
        p_out.dtype.element_ty, SC, ST, SH, SW, UNIT, VEC,
    )  # fmt: skip
    p_y = p_out + (o_row.to(tl.int64) * n_k)[:, None] + o_k[None, :]
    tl.store(p_y, b_x, mask=m_row[:, None] & (o_k < n_k)[None, :])


# Launchers.

CHECK = os.environ.get("VLMOPS_CHECK") == "1"
INTERPRETED = not isinstance(product_kernel, triton.JITFunction)
MAX_NORM_CHANNELS = 8192
_VECTOR = 8  # elements: 16 bytes of bfloat16
_STAGED = 96 * 1024  # bytes of shared memory for stages, on every architecture from sm_80 on
_WAVE = 128  # programs that fill a GPU


def compiled() -> int:
    """Number of kernels that were compiled in this process."""
    kernels = () if INTERPRETED else (product_kernel, finish_kernel, pack_kernel)
    # What a device's entry holds first is the kernels by key.
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


class Images(NamedTuple):
    """Images of one size, and where they begin in their sequence."""

    pixels: Tensor
    batch: int
    grid: tuple[int, int, int]
    strides: tuple[int, int, int, int, int]  # image, channel, frame, row, column
    first_token: int
    first_patch: int

    @property
    def patches(self) -> int:
        """Of an image."""
        return math.prod(self.grid)


def _sizes(a: Arguments) -> tuple[int, int, int, int]:
    """Channels, frames, rows and columns of a patch."""
    channels, depth = a.weight.shape[0], a.weight[:1].numel()
    if a.flat:
        parts = 1 if a.pixel_map is None else a.weight.shape[1]
        return parts, 1, 1, (depth if channels else a.pixel_values[0].shape[-1]) // parts
    c, *rest = a.weight.shape[1:]
    return (c, 1, *rest) if len(rest) == 2 else (c, *rest)  # type: ignore[return-value]


def _images(a: Arguments, sizes: Sequence[int]) -> Iterator[Images]:
    """Those of a call, in the order of its tokens."""
    values = a.pixel_values
    if a.flat:
        x = values[0]
        x = x if x.dim() == 3 else x[None]
        images, rows, _ = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
        column = x.stride(2)
        strides = (images, column * sizes[3], 0, rows, column)
        yield Images(x, x.shape[0], (1, x.shape[1], 1), strides, 0, 0)
        return
    if a.listed:
        parts = [x[None] for x in values]
    elif a.image_sizes:
        parts = list(values[0].split(1))
    else:
        parts = [values[0]]
    token = patch = 0
    for x, grid in zip(parts, a.grids(), strict=True):
        x = x.movedim(-1, 1) if a.channels_last else x
        x = x if x.dim() == 5 else x.unsqueeze(2)
        in_image = tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
        whole = (1, *grid) if len(grid) == 2 else grid
        yield Images(x, x.shape[0], whole, in_image, token, patch)  # type: ignore[arg-type]
        if a.packed:
            patch += math.prod(grid)
            token += math.prod(grid) + a.extra


def _pixels(images: Images, sizes: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Strides in units of VEC, and the compile-time arguments of what gathers."""
    *strides, column = images.strides
    vector = 1
    if column == 1:
        vector = math.gcd(_VECTOR, sizes[3], *strides)
    c, t, h, w = sizes
    constants = {"SC": c, "ST": t, "SH": h, "SW": w, "UNIT": column == 1, "VEC": vector}
    return [*(s // vector for s in strides), column], constants


def _grid(images: Images) -> list[int]:
    """Rows and columns; 1 where there are none, since what is masked is divided by them too."""
    return [max(n, 1) for n in images.grid[1:]]


def _position(position: Addend | None, images: Images) -> tuple[list[Any], list[int], list[int]]:
    """Tensors, strides and sizes of what is added, as the kernels take them."""
    if position is None:
        return [None] * 3, [0] * 6, [0] * 3

    def strides(t: Tensor | None) -> list[int]:
        if t is None:
            return [0, 0, 0]
        known = [0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
        return [*[0] * (3 - t.dim()), *known]

    taps = 1 if position.index is None else position.index.shape[-1]
    first = images.first_patch if position.patches_only else images.first_token
    return (
        [position.table.contiguous(), position.index, position.weight],
        [*strides(position.index), *strides(position.weight)],
        [first, taps, position.table.shape[0]],
    )


class Tile(NamedTuple):
    """Block shape and options of a launch."""

    rows: int
    channels: int
    depth: int
    num_warps: int
    num_stages: int


def tile(rows: int, channels: int, dtype: torch.dtype, pixels: torch.dtype, vector: int) -> Tile:
    """By dtypes, by pixels side by side, and by whether large tiles leave a GPU idle. PREDICTED.

    What sets the limits are registers: offsets of pixels that are read two at a time, and maps.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 16, 4, 3)
    if pixels == torch.uint8:
        return Tile(64, 128, 32, 8, 3)
    large = triton.cdiv(rows, 128) * triton.cdiv(channels, 128) >= _WAVE
    side, warps = (128, 8) if large else (64, 4)
    depth, stages = (64, 3) if vector >= 4 else (32, 4)
    staged = side * depth * (dtype.itemsize + pixels.itemsize)
    return Tile(side, side, depth, warps, min(stages, _STAGED // staged))


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if device.type == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "vlmops.patch_embed: backend 'triton': expected tensors on a GPU, since Triton "
                "compiles for GPUs, got cpu; use backend='cpu', or start Python with "
                "TRITON_INTERPRET=1 to debug the kernel"
            )
        kernel[grid](*args, **constants)
        return
    if CHECK:
        constants["debug"] = True
    with torch.cuda.device(device):
        kernel[grid](*args, **constants)


def _row(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _product(a: Arguments, images: Images, position: Addend | None, out: Tensor) -> None:
    """Tokens of images ``[rows, D]``: product, bias, prefix, a position."""
    rows, channels = out.shape
    sizes = _sizes(a)
    strides, constants = _pixels(images, sizes)
    added, added_strides, (first, taps, table) = _position(position, images)
    t = tile(rows, channels, a.weight.dtype, images.pixels.dtype, constants["VEC"])
    _launch(
        product_kernel,
        (triton.cdiv(rows, t.rows) * triton.cdiv(channels, t.channels),),
        out.device,
        images.pixels, a.pixel_map, a.weight.contiguous(), _row(a.bias), _row(a.prefix),
        *added, out,
        *strides, *added_strides,
        rows, a.extra, images.patches, *_grid(images), first, taps, table,
        D=channels, **constants, LAST=a.prefix_last,
        PATCHES_ONLY=position is not None and position.patches_only,
        BM=t.rows, BD=t.channels, BK=t.depth, CHECK=CHECK,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


def _finish(
    a: Arguments, images: Images, norm: str, position: Addend | None, tokens: Tensor, out: Tensor
) -> None:
    """Norm and a position of float32 tokens ``[rows, D]``."""
    rows, channels = out.shape
    added, added_strides, (first, taps, table) = _position(position, images)
    width = triton.next_power_of_2(channels)
    block = max(1, 4096 // width)
    normed = norm != "none"
    _launch(
        finish_kernel,
        (triton.cdiv(rows, block),),
        out.device,
        tokens, _row(a.norm_weight) if normed else None, _row(a.norm_bias) if normed else None,
        *added, out,
        *added_strides, rows, a.extra, images.patches, first, taps, table, a.norm_eps,
        D=channels, NORM=norm, LAST=a.prefix_last,
        PATCHES_ONLY=position is not None and position.patches_only,
        BM=block, BD=width, CHECK=CHECK,
        num_warps=4 if width <= 2048 else 8, num_stages=1,
    )  # fmt: skip


def _fail(name: str, problem: str) -> None:
    raise RuntimeError(f"vlmops.patch_embed: backend 'triton': {name}: {problem}")


def _refuse(a: Arguments, out: Tensor) -> None:
    channels = out.shape[-1]
    if out.numel() // channels >= 2**31:
        _fail(
            "pixel_values",
            "expected fewer than 2^31 tokens, a launch of Triton's holds no more, got a result of "
            f"shape {list(out.shape)}; use backend='cuda', or call with a part of the batch",
        )
    if a.norm != "none" and channels > MAX_NORM_CHANNELS:
        _fail(
            "norm",
            f"expected at most {MAX_NORM_CHANNELS} channels, which one program normalises, got "
            f"{channels}; use backend='cuda'",
        )


def forward(*args: Any) -> Tensor:
    """``vlmops::patch_embed_triton``."""
    a = Arguments(*args)
    out: Tensor = torch.ops.vlmops.patch_embed_empty(*args)  # all checks
    if out.numel() == 0:
        return out
    _refuse(a, out)
    first, *rest = [*panels.addends(a), None][: max(len(a.position_kinds), 1)]
    passes = [("none", position) for position in rest]
    if a.norm != "none":
        passes.insert(0, (a.norm, first))
        first = None
    tokens = out.new_empty(out.shape, dtype=torch.float32) if passes else out
    for images in _images(a, _sizes(a)):
        begin = images.first_token
        end = begin + images.batch * (images.patches + a.extra)
        made, finished = (t.view(-1, t.shape[-1])[begin:end] for t in (tokens, out))
        _product(a, images, first, made)
        for i, (norm, position) in enumerate(passes):
            last = i == len(passes) - 1
            _finish(a, images, norm, position, made, finished if last else made)
    return out


def backward(grad: Tensor, needs: Sequence[bool], *args: Any) -> list[Tensor]:
    """``vlmops::patch_embed_triton_backward``: products are torch's."""
    return panels.backward(grad, needs, *args, pack=pack)


def pack(a: Arguments, begin: int, end: int, dtype: torch.dtype, pitch: int = 0) -> Tensor:
    """Patches ``[begin, end)`` of all, ``[end - begin, K]``; zeros follow, to pitch."""
    sizes = _sizes(a)
    depth = math.prod(sizes)
    panel = a.weight.new_empty(end - begin, depth, dtype=dtype)
    start = 0
    for images in _images(a, sizes):
        rows = images.batch * images.patches
        low, high = max(begin, start), min(end, start + rows)
        if low < high and depth:
            strides, constants = _pixels(images, sizes)
            _launch(
                pack_kernel,
                (triton.cdiv(high - low, 64), triton.cdiv(depth, 64)),
                panel.device,
                images.pixels, a.pixel_map, panel[low - begin : high - begin],
                *strides, low - start, high - low, images.patches, *_grid(images),
                **constants, BM=64, BK=64, num_warps=4, num_stages=1,
            )  # fmt: skip
        start += rows
    return functional.pad(panel, (0, pitch - depth)) if pitch > depth else panel
