"""The products of patch embedding, a panel of patches at a time: forward on the CPU, and backward.

A panel is some hundred patches, gathered by the compiled library, small enough to stay in the cache
between the gathering, the product and what finishes it. Functions take the arguments of the op
``vlmops::patch_embed`` in its order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops import linear as products

INDEX, WEIGHT, PATCHES_ONLY = 1, 2, 4
"""Bits of position_kinds, as in patch_embed.cpp."""

PANEL = 2**20
"""Elements of a panel of patches, or of its product, on the CPU: 2 or 4 MB."""
FILLED_FROM = 512
"""Patches of an image from which on its product is added to what has been written."""
PANEL_ON_GPU = 2**26
"""The same on a GPU."""
LARGE_ON_GPU = 2**20
"""Elements of a result from which on a GPU works in panels (an H200, bench/results/h200)."""
_PITCH = 8
"""Elements of 16 bits that rows of a panel are a multiple of: cuBLAS wants 16 bytes."""


class Arguments(NamedTuple):
    """Of the op, with its defaults: torch leaves out what equals them."""

    pixel_values: Sequence[Tensor]
    weight: Tensor
    positions: Sequence[Tensor]
    position_kinds: Sequence[int]
    bias: Tensor | None = None
    pixel_map: Tensor | None = None
    listed: bool = False
    channels_last: bool = False
    image_sizes: Sequence[int] = ()
    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 1e-6
    prefix: Tensor | None = None
    prefix_last: bool = False
    dtype: torch.dtype | None = None

    @property
    def flat(self) -> bool:
        """Whether patches come flattened."""
        return not self.listed and not self.image_sizes and self.pixel_values[0].dim() < 4

    @property
    def packed(self) -> bool:
        """Whether the result is one sequence."""
        flat_rank = self.pixel_values[0].dim() if self.flat else 0
        return self.listed or len(self.image_sizes) > 0 or flat_rank == 2

    @property
    def differentiable(self) -> list[Tensor | None]:
        """What may get gradients, in the order of the backward op; indices get none."""
        return [*self.pixel_values, self.weight, self.bias, self.norm_weight, self.norm_bias,
                self.prefix, *self.positions]  # fmt: skip

    def grids(self) -> list[tuple[int, ...]]:
        """Patches along (frames,) rows and columns of each image; of one if all are alike."""
        if self.flat:
            return [(self.pixel_values[0].shape[-2],)]
        sizes = self.weight.shape[2:]
        last = len(sizes) + 1 if self.channels_last else None
        shapes = [x.shape[int(not self.listed) :] for x in self.pixel_values]
        shapes = [s[:-1] if last else s[1:] for s in shapes]
        if self.image_sizes:
            pairs = zip(self.image_sizes[::2], self.image_sizes[1::2], strict=True)
            shapes = [(*shapes[0][:-2], *pair) for pair in pairs]  # type: ignore[misc]
        return [tuple(n // p for n, p in zip(s, sizes, strict=True)) for s in shapes]

    def patches(self) -> list[int]:
        """Of each image of a packed sequence; else of one."""
        return [math.prod(grid) for grid in self.grids()]

    def rows(self) -> int:
        """Patches of all sequences."""
        return (1 if self.packed else self.pixel_values[0].shape[0]) * sum(self.patches())

    @property
    def extra(self) -> int:
        """M, the tokens that an image has beside its patches."""
        return 0 if self.prefix is None else self.prefix.shape[0]

    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        patches, channels = self.patches(), self.weight.shape[0]
        if self.packed:
            return sum(patches) + self.extra * len(patches), channels
        return self.pixel_values[0].shape[0], self.extra + patches[0], channels

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[D, K]``."""
        return self.weight.reshape(self.weight.shape[0], -1).to(dtype)

    def pack(self, begin: int, end: int, dtype: torch.dtype, pitch: int = 0) -> Tensor:
        """Patches ``[begin, end)``, ``[end - begin, K]``; on a GPU zeros follow, up to pitch."""
        panel: Tensor = torch.ops.vlmops.patch_embed_pack(
            self.pixel_values, self.weight, self.pixel_map, self.listed, self.channels_last,
            self.image_sizes, begin, end, dtype, pitch,
        )  # fmt: skip
        return panel


@dataclasses.dataclass(frozen=True)
class Addend:
    """A position, as the op gets it; ``at`` is the place of its table among the tensors."""

    at: int
    table: Tensor
    index: Tensor | None
    weight: Tensor | None
    patches_only: bool


def addends(a: Arguments) -> Iterator[Addend]:
    """The positions of a call."""
    at = 0
    for kind in a.position_kinds:
        rest = iter(a.positions[at:])
        table = next(rest)
        index = next(rest) if kind & INDEX else None
        weight = next(rest) if kind & WEIGHT else None
        yield Addend(at, table, index, weight, bool(kind & PATCHES_ONLY))
        at += 1 + bool(kind & INDEX) + bool(kind & WEIGHT)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Neither autograd nor autocast reaches into an op."""
    with torch.no_grad():
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def computes_in(weight: Tensor) -> torch.dtype:
    """Dtype of products with a weight: float32 if the CPU would multiply 16 bits one by one."""
    dtype = weight.dtype
    native = dtype == torch.float32 or not weight.is_cpu or products.multiplies(dtype)
    return dtype if native else torch.float32


def _parts(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """``rows`` in equal parts of at most ``most``."""
    count = -(-rows // max(most, 1))
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count


def forward(*args: Any) -> Tensor:
    """The op on the CPU and on a GPU; on the emulated one where a test has put it."""
    a = Arguments(*args)
    on_gpu = a.weight.is_cuda or torch.ops.vlmops.emulated(a.weight)
    if on_gpu and not goes_in_panels(a):
        result: Tensor = torch.ops.vlmops.patch_embed_launch(*args)
        return result
    with _plainly():
        out: Tensor = torch.ops.vlmops.patch_embed_empty(*args)  # all checks
        dtype = computes_in(a.weight)
        alone = _is_alone(a)
        if alone and _is_matrix(a):
            return _product_of(a, on_gpu).view(out.shape)
        weight, bias = _padded(a, dtype), None if a.bias is None else a.bias.to(dtype)
        channels, pitch = weight.shape
        rows = a.rows()
        most = (PANEL_ON_GPU if on_gpu else PANEL) // max(channels, pitch, 1)
        if not on_gpu and _takes_sums(a, dtype):
            return _added(a, args, out, weight, most)
        multiply = functional.linear if on_gpu else products.for_panels(dtype, channels, pitch)
        for begin, end in _parts(rows, most):
            product = multiply(a.pack(begin, end, dtype, pitch), weight, bias)
            if on_gpu and alone and end - begin == rows:
                return product.view(out.shape)
            if not on_gpu and end - begin == rows and _is_shaped(product, out, a):
                out = product.view(out.shape)  # finished where it is
            torch.ops.vlmops.patch_embed_finish(out, product, begin, *args)
        if rows == 0:
            torch.ops.vlmops.patch_embed_finish(out, weight.new_empty(0, channels), 0, *args)
        return out


def _is_shaped(product: Tensor, out: Tensor, a: Arguments) -> bool:
    """Whether the product can become the result."""
    return product.dtype == out.dtype and product.numel() == out.numel()


def _takes_sums(a: Arguments, dtype: torch.dtype) -> bool:
    """Whether products can be added to tokens that hold everything else.

    That saves writing them elsewhere, in 16 bits; in float32 ``addmm`` is MKL's.
    """
    alike = dtype != torch.float32 and dtype == (a.dtype or a.weight.dtype)
    large = a.prefix is None or min(a.patches(), default=0) >= FILLED_FROM
    return alike and a.norm == "none" and large


def _added(a: Arguments, args: Sequence[Any], out: Tensor, weight: Tensor, most: int) -> Tensor:
    """Of products and what has been written before them, both in the dtype of the result."""
    channels = weight.shape[0]
    bias = weight.new_zeros(channels) if a.bias is None else a.bias
    tokens = out if out.dim() == 3 else out[None]
    parts = _patch_rows(a, tokens)
    torch.ops.vlmops.patch_embed_finish(out, bias.expand(sum(map(len, parts)), -1), 0, *args)
    row = 0
    for rows in parts:
        for begin, end in _parts(len(rows), most):
            panel = a.pack(row + begin, row + end, weight.dtype)
            rows[begin:end].addmm_(panel, weight.t())
        row += len(rows)
    return out


def goes_in_panels(a: Arguments) -> bool:
    """Whether a GPU takes the platform's product, between two kernels that pack and finish.

    Else one kernel does everything: what is small waits for launches. Nothing has been checked yet.
    """
    pixels = sum(x.numel() for x in a.pixel_values)
    return pixels * a.weight.shape[0] >= LARGE_ON_GPU * a.weight[:1].numel()


def _padded(a: Arguments, dtype: torch.dtype) -> Tensor:
    """The weight; on a GPU with as many columns of zeros behind it as make 16-byte rows.

    Without them cuBLAS takes 4 times as long.
    """
    weight = a.matrix(dtype)
    missing = -weight.shape[1] % _PITCH if weight.is_cuda and dtype != torch.float32 else 0
    return functional.pad(weight, (0, missing)) if missing else weight


def _is_alone(a: Arguments) -> bool:
    """Whether nothing is done to what a product yields."""
    alike = (a.dtype or a.weight.dtype) == a.weight.dtype
    return alike and a.norm == "none" and a.prefix is None and not a.positions


def _is_matrix(a: Arguments) -> bool:
    """Whether patches come as they are multiplied."""
    if not a.flat or a.pixel_map is not None:
        return False
    x = a.pixel_values[0]
    return x.dtype == a.weight.dtype and x.numel() > 0


def _product_of(a: Arguments, on_gpu: bool) -> Tensor:
    multiply = functional.linear if on_gpu else products.linear
    return multiply(a.pixel_values[0], a.matrix(a.weight.dtype), a.bias)


Pack = Callable[[Arguments, int, int, torch.dtype, int], Tensor]


def backward(
    grad: Tensor, needs: Sequence[bool], *args: Any, pack: Pack = Arguments.pack
) -> list[Tensor]:
    """The gradients of pixels, weight, bias, the norm's weight and bias, prefix, positions.

    Empty tensors where ``needs`` says no, and for indices. ``pack`` gathers patches.
    """
    a = Arguments(*args)
    tensors = a.differentiable
    found: list[Tensor | None] = [None] * len(tensors)
    around = len(a.pixel_values) + 4  # where what is not part of the product begins
    with _plainly():
        grad = (grad if grad.dim() == 3 else grad[None]).contiguous()  # [S, M + N, D]
        if any(needs[:around]):
            found[:around] = _of_products(a, grad, needs, pack)
        if needs[around]:
            found[around] = _prefixes(a, grad).float().sum(0)
        for position in addends(a):
            at = around + 1 + position.at
            weight_at = at + 1 + (position.index is not None)
            wanted = needs[at], position.weight is not None and needs[weight_at]
            table, weight = _of_position(a, grad, position, *wanted)
            found[at] = table
            if position.weight is not None:
                found[weight_at] = weight
    return [
        grad.new_empty(0)
        if t is None or g is None or not needed
        else g.to(t.dtype).reshape(t.shape)
        for g, t, needed in zip(found, tensors, needs, strict=True)
    ]


def _starts(a: Arguments) -> list[int]:
    """Where the images of a packed sequence begin."""
    starts = [0]
    for n in a.patches():
        starts.append(starts[-1] + n + a.extra)
    return starts[:-1]


def _patch_rows(a: Arguments, grad: Tensor) -> list[Tensor]:
    """What belongs to patches, in their order: ``[n, D]`` each."""
    if a.extra == 0:
        return [grad.reshape(-1, grad.shape[-1])]
    skip = 0 if a.prefix_last else a.extra
    if not a.packed:
        return list(grad.narrow(1, skip, grad.shape[1] - a.extra))
    pairs = zip(_starts(a), a.patches(), strict=True)
    return [grad[0].narrow(0, start + skip, n) for start, n in pairs]


def _prefixes(a: Arguments, grad: Tensor) -> Tensor:
    """What belongs to the prefixes, ``[images, M, D]``."""
    patches = a.patches()
    if not a.packed:
        return grad.narrow(1, patches[0] if a.prefix_last else 0, a.extra)
    rows = [
        grad[0].narrow(0, start + (n if a.prefix_last else 0), a.extra)
        for start, n in zip(_starts(a), patches, strict=True)
    ]
    return torch.stack(rows) if rows else grad.new_empty(0, a.extra, grad.shape[-1])


def _of_products(
    a: Arguments, grad: Tensor, needs: Sequence[bool], pack: Pack
) -> list[Tensor | None]:
    """Of pixels, weight, bias and the norm's weight and bias."""
    count = len(a.pixel_values)
    needs_pixels = any(needs[:count])
    needs_weight, needs_bias = needs[count : count + 2]
    dtype = computes_in(a.weight)
    weight = _padded(a, dtype)
    channels, pitch = weight.shape
    depth = a.weight[:1].numel()
    sums = grad.new_zeros(3, channels, dtype=torch.float32)  # of bias, the norm's weight and bias
    weight_grad = None
    of_pixels = _PixelGrads(a) if needs_pixels else None
    normed = a.norm != "none"
    most = (PANEL if grad.is_cpu else PANEL_ON_GPU) // max(channels, pitch, 1)
    row = 0
    for rows in _patch_rows(a, grad):
        for begin, end in _parts(len(rows), most):
            g = rows[begin:end]
            panel = None
            if needs_weight or normed:
                panel = pack(a, row + begin, row + end, dtype, pitch)
            if normed and panel is not None:
                bias = None if a.bias is None else a.bias.to(dtype)
                g = _through_norm(a, g.float(), products.linear(panel, weight, bias).float(), sums)
            if needs_bias:
                sums[0] += _sum_of_rows(g)
            g = g.to(dtype)
            if needs_weight and panel is not None:
                weight_grad = _with_product(weight_grad, g.t(), panel)
            if of_pixels is not None:
                of_pixels.take(g @ weight, row + begin)
        row += len(rows)
    pixels = [None] * count if of_pixels is None else of_pixels.found()
    if weight_grad is None:
        weight_grad = weight.new_zeros(channels, pitch)
    return [*pixels, weight_grad[:, :depth], *sums]


def _with_product(total: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """``total + x @ y``; in float32 if there is something to add."""
    if total is None:
        return x @ y
    if x.dtype == torch.float32:
        return total.addmm_(x, y)
    return total.float().add_(x @ y)


def _sum_of_rows(rows: Tensor) -> Tensor:
    """``[N, D]``, channels side by side, to ``[D]``; float32."""
    if not rows.is_cpu:
        return rows.float().sum(0)
    found: Tensor = torch.ops.vlmops.patch_embed_column_sums(rows)
    return found


class _PixelGrads:
    """The gradients of pixels, which those of patches ``[rows, K]`` are folded into."""

    def __init__(self, a: Arguments):
        self.a = a
        self.parts: list[Tensor] = []  # on a GPU
        self.whole: list[Tensor] | None = None
        if a.weight.is_cpu:
            covered = sum(x.numel() for x in a.pixel_values) == a.rows() * a.weight[:1].numel()
            new = torch.empty_like if covered else torch.zeros_like  # what is not read gets none
            self.whole = [new(x) for x in a.pixel_values]

    def take(self, patches: Tensor, begin: int) -> None:
        """Those of patches from ``begin`` on."""
        if self.whole is None:
            self.parts.append(patches)
            return
        a = self.a
        torch.ops.vlmops.patch_embed_unpack(
            self.whole, patches, begin, a.weight, a.pixel_map, a.listed, a.channels_last,
            a.image_sizes,
        )  # fmt: skip

    def found(self) -> list[Tensor]:
        if self.whole is not None:
            return self.whole
        a, depth = self.a, self.a.weight[:1].numel()
        rows = torch.cat(self.parts) if self.parts else a.weight.new_empty(0, depth)
        return _folded(a, rows[:, :depth])


def _through_norm(a: Arguments, grad: Tensor, y: Tensor, sums: Tensor) -> Tensor:
    """The gradient of what was normalised; adds those of the norm's weight and bias to sums[1:]."""
    layer = a.norm == "layer"
    if layer:
        y = y - y.mean(-1, keepdim=True)
    scale = (y.square().mean(-1, keepdim=True) + a.norm_eps).rsqrt()
    y = y * scale
    sums[1] += (grad * y).sum(0)
    sums[2] += grad.sum(0)
    if a.norm_weight is not None:
        grad = grad * a.norm_weight.float()
    inner = grad - y * (grad * y).mean(-1, keepdim=True)
    if layer:
        inner = inner - grad.mean(-1, keepdim=True)
    return inner * scale


def _folded(a: Arguments, rows: Tensor) -> list[Tensor]:
    """Gradients of patches ``[rows, K]`` as those of pixels; what was not read has none."""
    if a.flat:
        return [rows.reshape(a.pixel_values[0].shape)]
    found = [torch.zeros_like(x, dtype=rows.dtype) for x in a.pixel_values]
    places = found if a.listed else list(found[0]) if a.image_sizes else found[:1]
    channels, *sizes = a.weight.shape[1:]
    dims = len(sizes)
    grids = a.grids()
    whole = not (a.listed or a.image_sizes)  # one tensor of images of one size
    images = a.pixel_values[0].shape[0] if whole else 1
    parts = rows.split([images * math.prod(grid) for grid in grids])
    for to, part, grid in zip(places, parts, grids, strict=True):
        patches = part.reshape(images, *grid, channels, *sizes)
        order = [0, dims + 1]  # image, channel, then each side's patch and pixel
        for i in range(dims):
            order += [1 + i, dims + 2 + i]
        if a.pixel_map is not None:  # [C, 2]: its slope
            patches = patches * a.pixel_map[:, 0].view(-1, *[1] * dims)
        sides = [n * p for n, p in zip(grid, sizes, strict=True)]
        image = patches.permute(order).reshape(images, channels, *sides)
        to = to if whole else to[None]
        to = to.movedim(-1, 1) if a.channels_last else to
        for dim, side in enumerate(sides, start=2):
            to = to.narrow(dim, 0, side)
        to.copy_(image)
    return found


def _of_position(
    a: Arguments, grad: Tensor, position: Addend, needs_table: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a table and of what weighs its rows."""
    if not needs_table and not needs_weight:
        return None, None
    if position.patches_only and a.extra:
        grad = torch.cat(_patch_rows(a, grad)).view(len(grad), -1, grad.shape[-1])
    table, index, weight = position.table, position.index, position.weight
    if index is None and weight is None:
        tokens, channels = grad.shape[1:]
        rows = grad[0] if len(grad) == 1 else _sum_of_rows(grad.flatten(1)).view(tokens, channels)
        return functional.pad(rows, (0, 0, 0, len(table) - tokens)), None
    # A plain sum over as many tokens as meet in a row needs more than float32.
    grad = grad.double() if grad.is_cpu and index is not None else grad.float()
    sequences, tokens, channels = grad.shape
    taps = 1 if index is None else index.shape[-1]
    table_grad = grad.new_zeros(table.shape) if needs_table else None
    factors = None if weight is None else weight.to(grad.dtype).expand(sequences, tokens, taps)
    products_of = []
    for tap in range(taps):
        part = grad if factors is None else grad * factors[..., tap, None]
        if index is None:
            if table_grad is not None:
                table_grad[:tokens] = part.sum(0)
            rows = table[:tokens].to(grad.dtype)
        else:
            at = index.expand(sequences, tokens, taps)[..., tap].long()
            if table_grad is not None:  # sorted on a GPU: the same in every run
                table_grad += torch.ops.aten.embedding_dense_backward(
                    part.reshape(-1, channels), at.reshape(-1), len(table), -1, False
                )
            rows = table[at].to(grad.dtype) if needs_weight else grad
        if needs_weight:
            products_of.append((grad * rows).sum(-1))
    if weight is None or not needs_weight:
        return table_grad, None
    return table_grad, torch.stack(products_of, -1).sum_to_size(weight.shape)
