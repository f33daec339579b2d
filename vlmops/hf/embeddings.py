"""Modules that embed an image: patches, and what is written around and added to them.

A module that holds one convolution that cuts patches, parameters and tables as wide as its
channels, and nothing else that computes, can only do a few things with them. Which ones is found by
running it once, at its own size and with random values, and comparing with all of them: a token in
front or behind, a norm, a table row for row or by ids, from a buffer or computed by the module's
own code. What none of them explains is left to the convolution alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import plain
from vlmops.hf.norms import rms_norm
from vlmops.hf.rebind import changed, subclass
from vlmops.ops.patch_embed import Norm, Position, patch_embed

_TOLERANCE = 1e-4  # of values around 1, in float32; agreement is about 1e-6
_COMPARED = 64  # channels that a guess is compared in


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a module does in the plain case: with defaults for all arguments but the pixels."""

    convolution: str
    table: str | None
    """A parameter, or an `nn.Embedding`."""
    ids: str | None = None
    """The buffer of ids that are looked up in the table; None: row n is for token n."""
    computes_ids: bool = False
    """Whether the module's own code computes the ids, from further arguments."""
    prefix: str | None = None
    prefix_last: bool = False
    norm: str | None = None
    kind: Norm | None = None
    eps: float = 1e-6
    size: tuple[int, ...] | None = None
    """Height and width of images in the plain case; None: any."""
    casts: bool = False
    """Whether pixels of other dtypes are cast to the weight's."""
    optional: tuple[str, ...] = ()
    """Flags that are off by default, and by None as well."""

    @property
    def note(self) -> str:
        """For the report."""
        return "with " + ", ".join(n for n in (self.prefix, self.norm, self.table) if n)


class _UnlikeError(Exception):
    """Why a module's convolution is served alone, in words that follow a colon."""


def around(model: nn.Module, path: str) -> tuple[str, Any] | None:
    """The path and the module that embeds with the convolution of this path, if there is one."""
    names = path.split(".")
    convolution = model.get_submodule(path)
    for depth in range(1, min(len(names), 2) + 1):
        outer = ".".join(names[:-depth])
        module = model.get_submodule(outer)
        if not _only_embeds(module, convolution):
            return None
        if _tables(module, convolution.out_channels):  # type: ignore[arg-type]
            return outer, module
    return None


def _only_embeds(module: nn.Module, convolution: Any) -> bool:
    for child in module.modules():
        if child is convolution or isinstance(child, nn.Embedding | nn.Dropout | nn.Identity):
            continue
        if any(child.children()):
            if child is not module and any(True for _ in child.parameters(recurse=False)):
                return False
        elif any(p.shape != (convolution.out_channels,) for p in child.parameters()):
            return False  # no norm
    return True


def _tables(module: nn.Module, width: int) -> dict[str, int]:
    """Names of a module's tables of positions, and their rows."""
    found = {n: p.numel() // width for n, p in _own(module, width) if p.numel() > width}
    for name, child in module.named_children():
        if isinstance(child, nn.Embedding) and child.embedding_dim == width:
            found[name] = child.num_embeddings
    return found


def _own(module: nn.Module, width: int) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters that have rows of this width."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() and parameter.shape[-1] == width:
            yield name, parameter


_studied: dict[Hashable, Layout | str] = {}


def study(module: Any, convolution: str) -> Layout | str:
    """What a module from `around` does, or why it is not patched; once for each class and shapes.

    Args:
        module: The module.
        convolution: Its path in the module.
    """
    reason = changed(module) or _unfit(module, convolution)
    if reason is not None:
        return reason
    described = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    key = (
        type(module), type(module).forward, convolution, repr(described), repr(module),
        tuple((name, tuple(t.shape)) for name, t in tensors),
    )  # fmt: skip
    if key not in _studied:
        try:
            with torch.no_grad():
                _studied[key] = _proved(module, convolution)
        except _UnlikeError as reason:
            _studied[key] = str(reason)
        except Exception as error:  # foreign code, asked with what it was not written for
            _studied[key] = f"its forward raised {error!r}"
    return _studied[key]


def _unfit(module: nn.Module, convolution: str) -> str | None:
    """What about a module's parts forbids to do their work elsewhere."""
    for name, child in module.named_modules():
        if name in ("", convolution):
            continue
        if plain.watched(child):
            return f"hooks are registered on {name}; remove them, then patch"
        if "forward" in vars(child):
            return f"{name}.forward was replaced on the instance; undo that, then patch"
        if isinstance(child, nn.Embedding):
            reason = plain.refusal(child, nn.Embedding)
            special = (child.max_norm, child.padding_idx, child.scale_grad_by_freq, child.sparse)
            if reason is not None or any(special[2:]) or special[:2] != (None, None):
                return reason or f"{name} is a table with options that only nn.Embedding knows"
    return None


def _proved(module: Any, convolution: str) -> Layout:
    """The layout by which the patched forward gives what the module's own does."""
    twin = random_twin(module, torch.Generator().manual_seed(0))
    layout = _computed(twin, convolution) if _wants_more(module) else _guessed(twin, convolution)
    forward = patched_class(module, layout).forward
    for size in (layout.size,) if layout.size else _some_sizes(twin.get_submodule(convolution)):
        given = _arguments(twin, convolution, 2, size)
        expected, got = type(module).forward(twin, *given), forward(twin, *given)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise _UnlikeError(f"its tokens are {list(expected.shape)}, not {list(got.shape)}")
        error = float((got - expected).abs().max())
        if not error <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise _UnlikeError(f"its tokens differ by {error:.3g}")
    if layout.computes_ids:
        return layout
    flags = [p.name for p in _parameters(type(module).forward) if p.default is False]
    same = (name for name in flags if _is_off(twin, given, name, expected))
    return dataclasses.replace(layout, optional=tuple(same))


def _is_off(twin: Any, given: list[Tensor], name: str, expected: Tensor) -> bool:
    """Whether None for an argument changes nothing."""
    try:
        return torch.equal(type(twin).forward(twin, *given, **{name: None}), expected)
    except (TypeError, ValueError, RuntimeError):
        return False


def random_twin(module: Any, draw: torch.Generator) -> Any:
    """A module of the same class and sizes on the CPU, with random numbers in float32."""
    made: Any = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            made.__dict__[name] = OrderedDict()

    def drawn(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if not tensor.is_floating_point():  # ids, in an order that tells them from row numbers
            return torch.randperm(tensor.numel(), generator=draw).view(tensor.shape)
        scale = tensor[0].numel() ** -0.5 if tensor.dim() > 3 else 1.0
        values = torch.randn(tensor.shape, generator=draw, dtype=torch.float32) * scale
        return nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values

    made._parameters = {name: drawn(p) for name, p in module._parameters.items()}
    made._buffers = {name: drawn(b) for name, b in module._buffers.items()}
    made._modules = {
        n: None if c is None else random_twin(c, draw) for n, c in module._modules.items()
    }
    made.training = False
    return made


def _parameters(function: Any) -> list[inspect.Parameter]:
    """Of a forward, without self."""
    return list(inspect.signature(function).parameters.values())[1:]


def _wants_more(module: Any) -> bool:
    """Whether a module's forward wants more than pixels."""
    return len(_required(type(module).forward)) > 1


def _required(function: Any) -> list[str]:
    """Names of the arguments that have no default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = _parameters(function)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _arguments(module: Any, convolution: str, count: int, size: tuple[int, ...]) -> list[Tensor]:
    """Images, and masks of their patches where a forward wants them."""
    conv, draw = module.get_submodule(convolution), torch.Generator().manual_seed(1)
    given = [torch.randn(count, conv.in_channels, *size, generator=draw)]
    if not _wants_more(module):
        return given
    names = _required(type(module).forward)[1:]
    if names != ["patch_attention_mask"]:
        raise _UnlikeError(f"its forward wants {', '.join(names)}, which vlmops does not know")
    mask = torch.ones(count, *_grid(conv, size), dtype=torch.bool)
    for image in range(1, count):  # padded on the right and below
        mask[image, -image:] = False
        mask[image, :, -2 * image :] = False
    return [*given, mask]


def _grid(conv: Any, size: tuple[int, ...]) -> list[int]:
    return [n // p for n, p in zip(size, conv.kernel_size, strict=True)]


def _some_sizes(conv: Any) -> list[tuple[int, ...]]:
    """Where any size is served."""
    patch = conv.kernel_size
    return [(7 * patch[0], 5 * patch[1]), (4 * patch[0], 6 * patch[1] + patch[1] - 1)]


def _native_sizes(module: Any, conv: Any) -> Iterator[tuple[int, ...]]:
    """Heights and widths that a module may be made for."""
    for part in module.modules():
        side = getattr(part, "image_size", None)
        if isinstance(side, int):
            yield side, side
        elif isinstance(side, tuple | list) and len(side) == 2:
            yield side[0], side[1]
    for rows in _tables(module, conv.out_channels).values():
        for patches in (rows, rows - 1):
            if math.isqrt(patches) ** 2 == patches > 0:
                side = math.isqrt(patches)
                yield side * conv.kernel_size[0], side * conv.kernel_size[1]


def _guessed(twin: Any, convolution: str) -> Layout:
    """The layout of a module that takes pixels alone, by trying."""
    conv = twin.get_submodule(convolution)
    width, tables = conv.out_channels, _tables(twin, conv.out_channels)
    sizes = [s for s in _native_sizes(twin, conv) if math.prod(_grid(conv, s)) in _counts(tables)]
    if not sizes:
        raise _UnlikeError("its tables have rows for none of its sizes")
    images = _arguments(twin, convolution, 1, sizes[0])[0]
    casts, found = _run(twin, images)
    patches = math.prod(_grid(conv, sizes[0]))
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[::2] != (1, width):
        raise _UnlikeError("it returns no tokens [B, N, D]")
    extra = found.shape[1] - patches
    if extra not in (0, 1):
        raise _UnlikeError(f"{found.shape[1]} tokens come of {patches} patches")
    tokens = conv(images).flatten(2).transpose(1, 2)[0]
    prefixes = [n for n, p in _own(twin, width) if p.numel() == width] if extra else [None]
    ids = [
        None,
        *(n for n, b in twin._buffers.items() if b is not None and not b.is_floating_point()),
    ]
    base = Layout(convolution, None, size=sizes[0], casts=casts)
    for (norm, kind, eps), prefix, last in itertools.product(
        _norms(twin, convolution), prefixes, (False, True) if extra else (False,)
    ):
        y = tokens if norm is None else twin.get_submodule(norm)(tokens)
        if prefix is not None:
            token = getattr(twin, prefix).view(1, width)
            y = torch.cat((y, token) if last else (token, y))
        for table, name in ((None, None), *itertools.product(tables, ids)):
            rows: Any = 0.0
            if table is not None:
                rows = _rows(twin, table)
                if len(rows) < len(y) or (name and getattr(twin, name).numel() != len(y)):
                    continue
                rows = rows[: len(y)] if name is None else rows[getattr(twin, name).flatten()]
            error = (y + rows - found[0])[:, :_COMPARED].abs().max()
            if error <= _TOLERANCE * found.abs().max():
                return dataclasses.replace(
                    base, table=table, ids=name, prefix=prefix, prefix_last=last, norm=norm,
                    kind=kind, eps=eps,
                )  # fmt: skip
    raise _UnlikeError("it does something else with its patches, parameters and tables")


def _counts(tables: dict[str, int]) -> set[int]:
    """Numbers of patches that tables may have rows for."""
    return {rows - extra for rows in tables.values() for extra in (0, 1)}


def _run(twin: Any, images: Tensor) -> tuple[bool, Any]:
    """Whether pixels of another dtype are cast, or refused by the convolution; what is returned."""
    try:
        return True, type(twin).forward(twin, images.double())
    except RuntimeError:
        return False, type(twin).forward(twin, images)


def _norms(twin: Any, convolution: str) -> Iterator[tuple[str | None, Norm | None, float]]:
    yield None, None, 1e-6
    for name, child in twin.named_modules():
        if isinstance(child, nn.LayerNorm):
            yield name, "layer", child.eps
        elif name not in ("", convolution) and (found := rms_norm(child)) and found[1] == 0.0:
            yield name, "rms", found[0]


def _rows(module: Any, table: str) -> Tensor:
    """A table as rows ``[R, D]``."""
    found = getattr(module, table)
    found = found.weight if isinstance(found, nn.Embedding) else found
    return found.reshape(-1, found.shape[-1])


def _computed(twin: Any, convolution: str) -> Layout:
    """The layout of a module that computes ids; that it does is for the comparison to show."""
    _arguments(twin, convolution, 1, _some_sizes(twin.get_submodule(convolution))[0])
    tables = [name for name, child in twin.named_children() if isinstance(child, nn.Embedding)]
    if len(tables) != 1 or "." in convolution or any(True for _ in twin.parameters(recurse=False)):
        raise _UnlikeError("it has other tables or parameters")
    return Layout(convolution, tables[0], computes_ids=True)


def patched_class(module: Any, layout: Layout) -> type[nn.Module]:
    """The class of a module whose forward writes tokens in one pass."""
    original: Any = type(module)
    parts = tuple(
        (name, type(child)) for name, child in module.named_modules()
        if name and name != layout.convolution
    )  # fmt: skip
    known = {
        p.name: (p.default, None) if p.name in layout.optional else (p.default,)
        for p in _parameters(original.forward)
    }
    first = next(iter(known))

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            pixels = args[0] if args else kwargs.get(first)
            tokens = None
            if _undisturbed(self, layout, parts) and _is_plain(known, args, kwargs):
                tokens = _embedded(self, layout, original, pixels, args, kwargs)
            return original.forward(self, *args, **kwargs) if tokens is None else tokens

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    key = ("patch_embed", layout, parts, original.forward)
    return subclass(original, key, make_forward)


def _undisturbed(module: Any, layout: Layout, parts: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the parts of a module are what they were, and nobody watches them."""
    if not plain.bypassable(_part(module, layout.convolution), nn.Conv2d, nn.Conv3d):
        return False
    for name, kind in parts:
        child = _part(module, name)
        if child is None or not plain.bypassable(child, kind):
            return False
        if isinstance(child, nn.Dropout) and child.training and child.p > 0:
            return False
    return True


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _is_plain(known: dict[str, tuple[Any, ...]], args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call gives nothing but what has no default, or what is as good as the default."""
    given = {**dict(zip(known, args, strict=False)), **kwargs}
    return len(args) <= len(known) and all(
        name in known
        and any(plain is inspect.Parameter.empty or value is plain for plain in known[name])
        for name, value in given.items()
    )


def _embedded(
    module: Any, layout: Layout, original: Any, pixels: Any, args: Any, kwargs: Any
) -> Tensor | None:
    """Tokens, or None where the module's own code has to run."""
    conv = _part(module, layout.convolution)
    norm = None if layout.norm is None else _part(module, layout.norm)
    prefix = None if layout.prefix is None else getattr(module, layout.prefix)
    rows = None if layout.table is None else _rows(module, layout.table)
    weights = [t for t in (conv.weight, conv.bias, prefix) if t is not None]
    weights += [] if norm is None else plain.tensors(norm)
    table = [] if rows is None else [rows]
    if not isinstance(pixels, Tensor) or not plain.runs("patch_embed", [pixels, *weights, *table]):
        return None
    if torch.is_autocast_enabled(pixels.device.type):
        return None
    dtype = conv.weight.dtype
    if any(t.dtype != dtype for t in (*weights, *table)):
        return None  # sums would have another dtype
    if pixels.dtype != dtype and not layout.casts:
        return None
    if pixels.dim() != 4 or pixels.shape[1] != conv.in_channels:
        return None
    size = tuple(pixels.shape[2:])
    if min(_grid(conv, size)) == 0 or layout.size not in (None, size):
        return None
    positions = []
    tokens = math.prod(_grid(conv, size)) + (prefix is not None)
    if rows is not None:
        ids = None if layout.ids is None else getattr(module, layout.ids).reshape(-1, 1)
        if layout.computes_ids:
            ids = _looked_up(module, layout, original, size, args, kwargs)
            if ids is None:
                return None
        elif len(rows) < tokens or (ids is not None and len(ids) != tokens):
            return None
        positions.append(Position(rows, ids))
    return patch_embed(
        pixels,
        conv.weight,
        conv.bias,
        norm=layout.kind,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else getattr(norm, "bias", None),
        norm_eps=layout.eps,
        prefix=None if prefix is None else prefix.reshape(1, -1),
        prefix_last=layout.prefix_last,
        positions=positions,
    )


def _looked_up(
    module: Any, layout: Layout, original: Any, size: tuple[int, ...], args: Any, kwargs: Any
) -> Tensor | None:
    """The ids ``[B, N, 1]`` that a module's own code looks up in its table.

    It runs without pixels and rows: tensors on meta stand for them, which take no time.
    """
    if torch.compiler.is_compiling():
        return None
    conv, found = _part(module, layout.convolution), []
    width, dtype = conv.out_channels, conv.weight.dtype

    def convolve(x: Tensor) -> Tensor:
        return torch.empty(len(x), width, *_grid(conv, size), dtype=dtype, device="meta")

    def look_up(ids: Tensor) -> Tensor:
        found.append(ids)
        return torch.empty(*ids.shape, width, dtype=dtype, device="meta")

    shadow: Any = object.__new__(original)
    shadow.__dict__.update(module.__dict__)
    replaced = {layout.convolution: convolve, layout.table: look_up}
    shadow.__dict__["_modules"] = {**module._modules, **replaced}
    tokens = original.forward(shadow, *args, **kwargs)
    if len(found) != 1 or found[0].dim() != 2 or tokens.shape != (*found[0].shape, width):
        return None
    ids: Tensor = found[0][..., None]
    return ids
