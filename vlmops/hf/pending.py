"""Tokens that are put off, until what a model adds to them is known.

Between a convolution and the first layer a tower moves patches about, adds rows of tables to them,
puts a token in front, normalises them. While `putting_off` is in force, the patched convolution
returns `Tokens` and a table is `Rows`: tensors without memory that know what they stand for. The
functions in `_FOLLOWED` take them to others of their kind, shapes are read off them, and at the end
one call of `patch_embed` makes them all. Any other function gets what the model's own code would
have computed, by that code. Nothing of a forward is copied, and nothing is assumed about it.

Interpolated rows are weighted sums of rows of the table, whose weights depend on sizes alone: they
are read off torch's own interpolation of a unit matrix, an axis at a time. So there is nothing to
cache that a change of the table could outdate, and gradients flow as without us.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.ops.patch_embed import Norm, Position, patch_embed

_Make = Callable[[], Any]
_MOST_TAPS = 64
"""Rows for a token; where antialiasing takes more, torch's own way of an axis at a time wins."""
_MOST_POSITIONS = 4  # that the op takes


@dataclasses.dataclass
class PuttingOff:
    """What is put off within one forward of a module."""

    convolution: nn.Module
    events: int | None
    """Norms and sums that are put off before tokens are made; None: until somebody needs them."""
    rehearsal: bool
    """Whether `NeededError` is raised instead."""
    seen: int = 0
    used: frozenset[int] = frozenset()
    """Where the norm, prefix and tables of the tokens that were made lie in memory."""
    begun: bool = False


_current: contextvars.ContextVar[PuttingOff | None] = contextvars.ContextVar(
    "vlmops_putting_off", default=None
)


@contextlib.contextmanager
def putting_off(
    convolution: nn.Module, events: int | None = None, rehearsal: bool = False
) -> Iterator[PuttingOff]:
    """Patches of this convolution are put off, once, for the length of a ``with`` block."""
    made = PuttingOff(convolution, events, rehearsal)
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)


def begins(convolution: nn.Module) -> bool:
    """Whether the patches that a convolution makes now are put off."""
    if torch.compiler.is_compiling():
        return False
    current = _current.get()
    return current is not None and not current.begun and current.convolution is convolution


def is_on() -> bool:
    """Whether tokens that are put off may still come by."""
    if torch.compiler.is_compiling():
        return False
    current = _current.get()
    return (
        current is not None
        and current.begun
        and (current.events is None or current.seen < current.events)
    )


class Pending(Tensor):
    """A tensor that nobody has computed; as much of it is Tensor as shapes need.

    Attributes:
        taken: ``[*lead, t]``, int64: what its elements stand for, shape but for the channels first.
        weight: Of each index; None: 1.
        channel: Which dimension are the channels.
    """

    taken: Tensor
    weight: Tensor | None
    channel: int
    _make: _Make
    _value: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        follow = _FOLLOWED.get(func)
        if follow is not None:
            # What cannot be followed, wrong arguments too, is the function's own to answer.
            with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError):
                return follow(lambda: func(*computed(args), **computed(kwargs)), *args, **kwargs)
        return func(*computed(args), **computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{func} was given tokens that vlmops had put off, and could not be told: call "
            "vlmops.unpatch, and please report the model"
        )

    def moved(
        self, make: _Make, index: Tensor, channel: int, weight: Tensor | None, dtype: Any = None
    ) -> Any:
        """The same elements elsewhere."""
        raise NotImplementedError


class Tokens(Pending):
    """Patches, and what was added to them; ``taken`` are their numbers, -1 is the prefix."""

    source: _Source
    normed: _Norm | None
    prefix: Tensor | None
    positions: tuple[Position, ...]

    weight = None

    def moved(
        self, make: _Make, index: Tensor, channel: int, weight: Tensor | None, dtype: Any = None
    ) -> Tokens:
        """See `Pending.moved`."""
        shape = _with_channels(index.shape[:-1], channel, self.source.weight.shape[0])
        made: Tokens = _made(Tokens, make, shape, self.dtype, self.device)
        made.taken, made.channel, made.source = index, channel, self.source
        made.normed, made.prefix, made.positions = self.normed, self.prefix, self.positions
        return made


class Rows(Pending):
    """Rows of a table, t at a time summed."""

    table: Tensor
    scale: Tensor | None
    """A factor of all, as gates are."""

    def moved(
        self, make: _Make, index: Tensor, channel: int, weight: Tensor | None, dtype: Any = None
    ) -> Rows:
        """See `Pending.moved`."""
        if index.shape[-1] > _MOST_TAPS:
            raise _UnknownError
        shape = _with_channels(index.shape[:-1], channel, self.table.shape[1])
        made: Rows = _made(Rows, make, shape, dtype or self.dtype, self.device)
        made.taken, made.channel, made.table = index, channel, self.table
        made.weight, made.scale = weight, self.scale
        return made


@dataclasses.dataclass(frozen=True)
class _Source:
    """Patches as the op takes them."""

    pixels: Tensor
    weight: Tensor
    bias: Tensor | None
    pixel_map: Tensor | None
    grid: tuple[int, ...]
    """Of an image; that of one sequence is its length."""
    flat: bool

    @property
    def patches(self) -> int:
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class _Norm:
    kind: Norm | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


class NeededError(Exception):
    """Somebody needs what a rehearsal does not compute."""


class _UnknownError(RuntimeError):
    """The function has to run on what was put off."""


def _made(kind: Any, make: _Make, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Any:
    made: Any = Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=dtype, device=device)
    made._make, made._value = make, None
    return made


def _with_channels(lead: Sequence[int], channel: int, width: int) -> tuple[int, ...]:
    return (*lead[:channel], width, *lead[channel:])


def computed(given: Any) -> Any:
    """What was put off, and anything else as it is."""
    if isinstance(given, Pending):
        if given._value is None:
            if isinstance(given, Tokens) and (current := _current.get()) and current.rehearsal:
                raise NeededError
            fused = _fused(given) if isinstance(given, Tokens) else None
            given._value = given._make() if fused is None else fused
        return given._value
    if type(given) in (tuple, list):
        return type(given)(computed(x) for x in given)
    if type(given) is dict:
        return {name: computed(x) for name, x in given.items()}
    return given


def tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    make: _Make,
    as_grid: bool = True,
    pixel_map: Tensor | None = None,
) -> Tensor:
    """Stands for the patches of images ``x``.

    Args:
        x: ``[B, C, H, W]``, or ``[N, C, T, P, P]``, a patch each.
        weight: Of the convolution.
        bias: Of the convolution.
        make: Computes the patches alone.
        as_grid: Whether they are ``[B, D, h, w]``, else ``[B, N, D]``.
        pixel_map: Of raw pixels, as `patch_embed` has it.
    """
    current = _current.get()
    assert current is not None
    current.begun = True
    grid = tuple(n // p for n, p in zip(x.shape[2:], weight.shape[2:], strict=True))
    flat = x.dim() == 5 and math.prod(grid) == 1
    count = len(x) * math.prod(grid)
    source = _Source(
        x.reshape(len(x), -1) if flat else x,
        weight,
        bias,
        pixel_map,
        (count,) if flat else grid,
        flat,
    )
    lead = (len(x), *grid) if as_grid else (len(x), math.prod(grid))
    channel = 1 if as_grid else 2
    shape = _with_channels(lead, channel, weight.shape[0])
    made = _made(Tokens, make, shape, weight.dtype, weight.device)
    made.taken = torch.arange(count, device="cpu").view(*lead, 1)
    made.channel, made.source, made.normed, made.prefix, made.positions = (
        channel,
        source,
        None,
        None,
        (),
    )
    result: Tensor = made
    return result


def rows(table: Tensor) -> Tensor:
    """Stands for a table ``[..., R, D]`` itself."""
    made = _made(Rows, lambda: table, table.shape, table.dtype, table.device)
    made.table = table.reshape(-1, table.shape[-1])
    made.taken = torch.arange(len(made.table), device="cpu").view(*table.shape[:-1], 1)
    made.channel, made.weight, made.scale = table.dim() - 1, None, None
    result: Tensor = made
    return result


def normalised(x: Tensor, kind: Norm, norm: Any, eps: float, make: _Make) -> Any:
    """Tokens after a norm over their channels, or None where that is not put off."""
    if not isinstance(x, Tokens) or x._value is not None:
        return None
    try:
        return _with_norm(x, make, _Norm(kind, norm.weight, getattr(norm, "bias", None), eps))
    except _UnknownError:
        return None


def _with_norm(x: Tokens, make: _Make, norm: _Norm) -> Tensor:
    if x.normed or x.positions or x.prefix is not None or not _last(x) or _layout(x) is None:
        raise _UnknownError
    made = x.moved(make, x.taken, x.channel, None)
    made.normed = norm
    return _happened(made)


def _happened(made: Tokens) -> Tensor:
    """The tokens, made if nothing else is to come."""
    current = _current.get()
    if current is None:
        return made
    current.seen += 1
    if current.events is not None and current.seen >= current.events:
        result: Tensor = computed(made)
        return result
    return made


def _last(x: Pending) -> bool:
    return x.channel == x.taken.dim() - 1


# What tokens stand for.


def _layout(x: Tokens) -> tuple[int, int, list[tuple[int, int]]] | None:
    """Sequences, tokens of each, and the sizes that images are cropped to; None if out of order."""
    source, order = x.source, x.taken.flatten()
    images = 1 if source.flat else len(source.pixels)
    expected = torch.arange(images * source.patches, device="cpu").view(images, source.patches)
    if x.prefix is not None:
        prefix = torch.full((images, 1), -1, device="cpu")
        expected = torch.cat((prefix, expected) if _is_first(x) else (expected, prefix), dim=1)
    if torch.equal(order, expected.flatten()):
        return *expected.shape, []
    return None if x.prefix is not None or source.flat else _cropped(source, order)


def _is_first(x: Tokens) -> bool:
    """Whether the prefix comes before the patches."""
    return int(x.taken.flatten()[0]) < 0


def _cropped(source: _Source, order: Tensor) -> tuple[int, int, list[tuple[int, int]]] | None:
    """The same for images packed into one sequence, of each its upper left corner."""
    if len(source.grid) != 2 or not len(order):
        return None
    images, (height, width) = len(source.pixels), source.grid
    grid = torch.arange(height * width, device="cpu").view(height, width)
    counts = torch.bincount(order // (height * width), minlength=images).tolist()
    sizes, expected, begin = [], [], 0
    for image, count in enumerate(counts):
        first = image * height * width
        columns = int((order[begin : begin + count] < first + width).sum())
        if columns == 0 or count % columns:
            return None
        sizes.append((count // columns, columns))
        expected.append(grid[: count // columns, :columns].flatten() + first)
        begin += count
    return (1, len(order), sizes) if torch.equal(order, torch.cat(expected)) else None


def _fused(x: Tokens) -> Tensor | None:
    """Tokens with all that was added to them; None for patches alone."""
    if x.normed is None and x.prefix is None and not x.positions:
        return None
    found = _layout(x) if _last(x) else None
    if found is None:
        return None
    source, norm = x.source, x.normed or _Norm()
    sides = source.weight.shape[-2:]
    sizes = [(h * sides[0], w * sides[1]) for h, w in found[2]]
    if (current := _current.get()) is not None:
        given = (norm.weight, x.prefix, *(p.table for p in x.positions))
        places = (t.untyped_storage().data_ptr() for t in given if t is not None)
        current.used = frozenset(places)
    made = patch_embed(
        source.pixels,
        source.weight,
        source.bias,
        pixel_map=source.pixel_map,
        image_sizes=sizes or None,
        norm=norm.kind,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        norm_eps=norm.eps,
        prefix=x.prefix,
        prefix_last=x.prefix is not None and not _is_first(x),
        positions=x.positions,
    )
    return made.view(x.shape)


def _plus(make: _Make, a: Any, b: Any, *, alpha: float = 1) -> Tensor:
    x, other = (a, b) if isinstance(a, Tokens) else (b, a)
    if not isinstance(x, Tokens) or isinstance(other, Tokens) or alpha != 1 or not _last(x):
        raise _UnknownError
    if type(other) in (Tensor, nn.Parameter) and other.dim() and other.shape[-1] == x.shape[-1]:
        other = rows(other)
    found = _layout(x)
    if (
        not isinstance(other, Rows)
        or found is None
        or not _last(other)
        or other.shape[-1] != x.shape[-1]
        or other.device != x.device
        or torch.promote_types(other.dtype, x.dtype) != x.dtype
        or len(x.positions) == _MOST_POSITIONS
    ):
        raise _UnknownError
    lead = x.taken.shape[:-1]
    if other.dim() > x.dim() or torch.broadcast_shapes(other.shape[:-1], lead) != lead:
        raise _UnknownError

    def each(given: Tensor) -> Tensor:
        taps = given.expand(*lead, given.shape[-1]).reshape(*found[:2], -1)
        return taps[0] if found[0] == 1 or taps.stride(0) == 0 else taps

    index = each(other.taken)
    weight = None if other.weight is None else each(other.weight)
    if other.scale is not None:
        weight = other.scale.reshape(1) if weight is None else weight * other.scale.reshape(1)
    made = x.moved(make, x.taken, x.channel, None)
    dense = (
        torch.equal(index, torch.arange(found[1], device="cpu")[:, None])
        and len(other.table) >= found[1]
    )
    position = Position(
        other.table, None if dense else index, weight, patches_only=x.prefix is None
    )
    made.positions = (*x.positions, position)
    return _happened(made)


# Functions that are followed; `make` calls them on what was put off.


def _reshape(make: _Make, x: Pending, *shape: Any, **named: Any) -> Any:
    given = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if named or not all(isinstance(n, int) for n in given) or not x.numel():
        raise _UnknownError
    known = math.prod(n for n in given if n != -1)
    return _reshaped(make, x, tuple(x.numel() // known if n == -1 else n for n in given))


def _reshaped(make: _Make, x: Pending, shape: tuple[int, ...]) -> Any:
    if math.prod(shape) != x.numel():
        raise _UnknownError
    width, before = x.shape[x.channel], math.prod(x.shape[: x.channel])
    for channel, size in enumerate(shape):
        if size == width and math.prod(shape[:channel]) == before:
            lead = (*shape[:channel], *shape[channel + 1 :])
            return _each(make, x, functools.partial(_shaped, lead), channel)
    if isinstance(x, Rows) and _last(x) and width % shape[-1] == 0 and x.taken.shape[-1] == 1:
        return _reshaped(make, _split(x, shape[-1]), shape)
    raise _UnknownError


def _shaped(lead: Sequence[int], taken: Tensor) -> Tensor:
    return taken.reshape(*lead, taken.shape[-1])


def _split(x: Rows, width: int) -> Rows:
    """Wide rows as several narrow ones, in a dimension of their own."""
    parts = x.shape[-1] // width
    index = (x.taken * parts + torch.arange(parts, device="cpu"))[..., None]  # [*lead, parts, 1]
    weight = None if x.weight is None else x.weight[..., None].expand(index.shape)
    made = _made(Rows, x._make, (*x.shape[:-1], parts, width), x.dtype, x.device)
    made.table, made.taken, made.weight = x.table.reshape(-1, width), index, weight
    made.channel, made.scale = x.channel + 1, x.scale
    result: Rows = made
    return result


def _each(make: _Make, x: Pending, change: Callable[[Tensor], Tensor], channel: int) -> Any:
    """The same change of index and weight."""
    weight = None if x.weight is None else change(x.weight.expand(x.taken.shape))
    return x.moved(make, change(x.taken), channel, weight)


def _flatten(make: _Make, x: Pending, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.dim(), end_dim % x.dim()
    inner = math.prod(x.shape[start : end + 1])
    return _reshaped(make, x, (*x.shape[:start], inner, *x.shape[end + 1 :]))


def _unsqueeze(make: _Make, x: Pending, dim: int) -> Any:
    at = dim % (x.dim() + 1)
    return _reshaped(make, x, (*x.shape[:at], 1, *x.shape[at:]))


def _squeeze(make: _Make, x: Pending, dim: int) -> Any:
    at = dim % x.dim()
    return _reshaped(make, x, (*x.shape[:at], *x.shape[at + (x.shape[at] == 1) :]))


def _permute(make: _Make, x: Pending, *dims: Any) -> Any:
    given = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = [d % x.dim() for d in given]
    lead = [d - (d > x.channel) for d in order if d != x.channel]
    return _each(make, x, lambda t: t.permute(*lead, -1), order.index(x.channel))


def _transpose(make: _Make, x: Pending, dim0: int, dim1: int) -> Any:
    order = list(range(x.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(make, x, order)


def _turned(make: _Make, x: Pending) -> Any:
    return _permute(make, x, list(reversed(range(x.dim()))))


def _item(make: _Make, x: Pending, key: Any) -> Any:
    keys = list(key) if isinstance(key, tuple) else [key]
    if not all(k is ... or isinstance(k, int | slice) for k in keys):
        raise _UnknownError
    if ... in keys:
        at = keys.index(...)
        keys[at : at + 1] = [slice(None)] * (x.dim() - len(keys) + 1)
    keys += [slice(None)] * (x.dim() - len(keys))
    if len(keys) != x.dim() or keys[x.channel] != slice(None):
        raise _UnknownError
    lead = (*keys[: x.channel], *keys[x.channel + 1 :], slice(None))
    channel = sum(isinstance(k, slice) for k in keys[: x.channel])
    return _each(make, x, lambda t: t[lead], channel)


def _unbound(make: _Make, x: Pending, dim: int = 0) -> Any:
    """What loops over a tensor call."""
    if dim != 0:
        raise _UnknownError
    return tuple(x[i] for i in range(len(x)))


def _to(make: _Make, x: Pending, *args: Any, **kwargs: Any) -> Any:
    device, dtype, _, memory = torch._C._nn._parse_to(*args, **kwargs)
    if device not in (None, x.device) or memory is not None:
        raise _UnknownError
    if dtype in (None, x.dtype):
        return x
    if not isinstance(x, Rows) or not dtype.is_floating_point:
        raise _UnknownError
    return x.moved(make, x.taken, x.channel, x.weight, dtype)


def _cat(make: _Make, tensors: Sequence[Any], dim: int = 0) -> Any:
    first = next(t for t in tensors if isinstance(t, Pending))
    at = dim % first.dim()
    if at == first.channel:
        raise _UnknownError
    lead = at - (at > first.channel)
    if not all(isinstance(t, type(first)) and t.channel == first.channel for t in tensors):
        return _with_prefix(make, tensors, at)
    if isinstance(first, Tokens):
        if any(t.source is not first.source or t.normed or t.positions or t.prefix is not None
               for t in tensors):  # fmt: skip
            raise _UnknownError
    elif isinstance(first, Rows) and any(
        t.table is not first.table or t.scale is not None for t in tensors
    ):
        raise _UnknownError
    most = max(t.taken.shape[-1] for t in tensors)
    index = torch.cat([_padded(t.taken, most) for t in tensors], dim=lead)
    weight = None
    if most > 1 or any(t.weight is not None for t in tensors):
        given = [
            torch.ones(t.taken.shape, dtype=torch.float32, device="cpu")
            if t.weight is None
            else t.weight
            for t in tensors
        ]
        weight = torch.cat([_padded(t, most, 0.0) for t in given], dim=lead)
    return first.moved(make, index, first.channel, weight)


def _padded(taps: Tensor, count: int, value: float | None = None) -> Tensor:
    """With the first row again, or with weights of 0."""
    more = taps[..., :1].expand(*taps.shape[:-1], count - taps.shape[-1])
    return torch.cat((taps, more if value is None else torch.full_like(more, value)), dim=-1)


def _with_prefix(make: _Make, tensors: Sequence[Any], dim: int) -> Any:
    """A token of its own before or after each image's."""
    kinds = [isinstance(t, Tokens) for t in tensors]
    if len(tensors) != 2 or sum(kinds) != 1:
        raise _UnknownError
    x, prefix = tensors if kinds[0] else reversed(tensors)
    if (
        type(prefix) not in (Tensor, nn.Parameter)
        or x.source.flat
        or x.prefix is not None
        or (dim, x.channel, x.dim()) != (1, 2, 3)
        or x.shape[:2] != (len(x.source.pixels), x.source.patches)
        or prefix.shape != (len(x), 1, x.shape[2])
        or (len(x) > 1 and prefix.stride(0) != 0)
        or (prefix.dtype, prefix.device) != (x.dtype, x.device)
        or not len(x)
    ):
        raise _UnknownError
    own = torch.full((len(x), 1, 1), -1, device="cpu")
    made = x.moved(make, torch.cat((x.taken, own) if kinds[0] else (own, x.taken), dim=1), 2, None)
    made.prefix = prefix[0]
    return made


def _times(make: _Make, a: Any, b: Any) -> Any:
    x, factor = (a, b) if isinstance(a, Rows) else (b, a)
    if type(factor) not in (Tensor, nn.Parameter) or not factor.is_floating_point():
        raise _UnknownError
    dtype = torch.promote_types(x.dtype, factor.dtype) if factor.dim() else x.dtype
    if factor.numel() == 1 and factor.dim() <= x.dim() and x.scale is None:
        made = x.moved(make, x.taken, x.channel, x.weight, dtype)
        made.scale = factor
        return made
    if not _last(x) or factor.shape != (*x.shape[:-1], 1):
        raise _UnknownError
    weight = factor.expand(x.taken.shape)
    return x.moved(
        make, x.taken, x.channel, weight if x.weight is None else x.weight * weight, dtype
    )


def _summed(make: _Make, x: Any, dim: Any) -> Any:
    if not isinstance(x, Rows) or not isinstance(dim, int) or dim % x.dim() == x.channel:
        raise _UnknownError
    at = dim % x.dim()
    lead = at - (at > x.channel)
    return _each(make, x, lambda t: t.movedim(lead, -2).flatten(-2), x.channel - (at < x.channel))


def _looked_up(make: _Make, ids: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """`functional.embedding`; its other arguments change neither values nor, here, gradients."""
    if not isinstance(x, Rows) or isinstance(ids, Pending) or x.dim() != 2 or not _last(x):
        raise _UnknownError
    if ids.numel() and int(ids.min()) < 0:  # indexing would count from the end
        raise _UnknownError
    return _each(make, x, lambda t: t[ids], ids.dim())


def _same(make: _Make, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise _UnknownError
    return x


def _layer_norm(
    make: _Make, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    if not isinstance(x, Tokens) or tuple(shape) != (x.shape[-1],):
        raise _UnknownError
    return _with_norm(x, make, _Norm("layer", weight, bias, eps))


def _image(x: Any) -> Tensor:
    """What a table ``[1, C, H, W]`` has at its places: rows ``[H, W]``."""
    if not isinstance(x, Rows) or x.dim() != 4 or x.channel != 1 or len(x) != 1:
        raise _UnknownError
    if x.weight is not None or x.scale is not None or x.taken.shape[-1] != 1:
        raise _UnknownError
    return x.taken[0, ..., 0]


def _interpolated(
    make: _Make, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
    align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:  # fmt: skip
    """`functional.interpolate`."""
    places = _image(x)
    options = (mode, align_corners, recompute_scale_factor, antialias)
    pairs = [g if isinstance(g, tuple | list) else (g, g) for g in (size, scale_factor)]
    (h_taps, h_weight), (w_taps, w_weight) = (
        _axis(places.shape[i], pairs[0][i], pairs[1][i], *options) for i in (0, 1)
    )
    index = places[h_taps[:, None, :, None], w_taps[None, :, None, :]]  # [h, w, t_h, t_w]
    weight = h_weight[:, None, :, None] * w_weight[None, :, None, :]
    return x.moved(make, index.flatten(2)[None], 1, weight.flatten(2)[None])


@functools.lru_cache(maxsize=256)
def _axis(
    count: int, size: int | None, scale: float | None, mode: str, *options: Any
) -> tuple[Tensor, Tensor]:
    """Which of ``count`` values torch's interpolation takes for each of ``size``, and how much."""
    align_corners, recompute, antialias = options
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        # In a row: of a single column, torch 2.13 antialiases the dimension of size 1.
        unit = torch.eye(count, dtype=torch.float32)[None, :, None]
        out = functional.interpolate(
            unit, None if size is None else (1, size), None if scale is None else (1.0, scale),
            mode, align_corners, recompute, antialias,
        )[0, :, 0].T  # fmt: skip
        taps = max(int((out != 0).sum(dim=1).max()), 1)
        index = out.abs().topk(taps, dim=1).indices
        return index, out.gather(1, index)


def _sampled(
    make: _Make, x: Any, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Any:  # fmt: skip
    """`functional.grid_sample`, as torch computes coordinates and the weights of neighbours."""
    places = _image(x)
    if mode != "bicubic" or padding_mode != "border" or grid.shape[0] != 1 or grid.requires_grad:
        raise _UnknownError
    columns, lines = (
        _neighbours(grid[0, ..., i], places.shape[1 - i], bool(align_corners)) for i in (0, 1)
    )
    index = places[lines[0][..., :, None], columns[0][..., None, :]]
    weight = lines[1][..., :, None] * columns[1][..., None, :]
    return x.moved(make, index.flatten(-2)[None], 1, weight.flatten(-2)[None])


def _neighbours(at: Tensor, size: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Four places each, and their weights by the cubic convolution with a = -0.75."""
    at = (at + 1) / 2 * (size - 1) if align_corners else ((at + 1) * size - 1) / 2
    floor = at.floor()
    t, a = (at - floor)[..., None], -0.75
    near = torch.cat((t, 1 - t), dim=-1)
    far = near + 1
    near = ((a + 2) * near - (a + 3)) * near * near + 1
    far = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    places = floor.long()[..., None] + torch.arange(-1, 3, device="cpu")
    weights = torch.cat((far[..., :1], near, far[..., 1:]), dim=-1)
    return places.clamp(0, size - 1), weights


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _flatten),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _transpose),
    **dict.fromkeys((Tensor.permute, torch.permute), _permute),
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _unsqueeze),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _squeeze),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _plus),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _times),
    **dict.fromkeys((Tensor.sum, torch.sum), _summed),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    Tensor.T.__get__: _turned,  # type: ignore[attr-defined]
    Tensor.to: _to,
    Tensor.__getitem__: _item,
    **dict.fromkeys((Tensor.unbind, torch.unbind), _unbound),
    functional.dropout: _same,
    functional.embedding: _looked_up,
    functional.layer_norm: _layer_norm,
    functional.interpolate: _interpolated,
    functional.grid_sample: _sampled,
}

_ASKED = {
    *(getattr(Tensor, name).__get__ for name in
      ("shape", "dtype", "device", "ndim", "layout", "is_cpu", "is_cuda", "is_meta")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.__hash__,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, Tensor.get_device,
}  # fmt: skip
"""What can be told without values."""
