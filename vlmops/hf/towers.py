"""Towers that embed in their own forward: what follows the patches, in the pass that makes them.

Qwen3-VL adds interpolated rows to its patches, GLM-4V normalises them first, Pixtral crops and
packs them, Mllama and Llama-4 put a token beside them, and all of it stands in the forward of the
whole tower. That runs as it is, while patches are put off (`vlmops.hf.pending`), and the tables and
norms that it calls play along. How far that reaches is found by a rehearsal up to the first layer,
whose result is compared with what the tower computes without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import embeddings, pending, plain
from vlmops.hf.norms import defers, rms_norm
from vlmops.hf.rebind import ops_of, original_class, subclass, was_patched, wraps

_TOLERANCE = 1e-4  # of values around 1, in float32; agreement is about 1e-6


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a tower does with its patches before the first layer."""

    convolution: str
    """Path of what makes patches, as all paths from the tower on."""
    events: int
    """Norms and sums that are put off."""
    names: tuple[str, ...]
    parts: tuple[tuple[str, Any], ...]
    """Path and class of the modules that must be what they were."""

    @property
    def note(self) -> str:
        """For the report."""
        return "with " + (", ".join(self.names) or "what its tower adds")


def around(model: nn.Module, path: str, width: int) -> tuple[str, Any] | None:
    """The path and the module that does more than embed with the convolution of this path."""
    names, convolution = path.split("."), model.get_submodule(path)
    for depth in range(1, min(len(names), 3) + 1):
        outer = ".".join(names[:-depth])
        module = model.get_submodule(outer)
        if not embeddings.only_embeds(module, convolution, width):
            return outer, module
    return None


_studied: dict[Hashable, Surroundings | None] = {}


def study(
    tower: Any, convolution: str, weight: Tensor, patched: type[nn.Module]
) -> Surroundings | None:
    """What is put off in a tower, if anything; once for each class and shapes.

    Args:
        tower: The tower.
        convolution: Path of what makes its patches.
        weight: Of the convolution, ``[D, C, .., P, P]``.
        patched: The class that the convolution gets.
    """
    width = len(weight)
    if (was_patched(tower) and ops_of(tower) != {"packed_attention"}) or "forward" in vars(tower):
        return None
    target = tower.get_submodule(convolution)
    kept = {
        n: c for n, c in tower.named_children()
        if c is target or embeddings.only_embeds(c, target, width)
    }  # fmt: skip
    tensors = itertools.chain(*(c.named_parameters(n) for n, c in kept.items()))
    own = ((n, p) for n, p in tower._parameters.items() if p is not None)
    key = (
        type(tower), type(tower).forward, convolution, patched, repr(kept),
        repr(getattr(tower, "config", None)),
        tuple((name, tuple(t.shape)) for name, t in itertools.chain(tensors, own)),
    )  # fmt: skip
    if key not in _studied:
        try:
            with torch.no_grad():
                _studied[key] = _rehearsed(tower, convolution, weight.shape, patched, set(kept))
        except Exception:  # foreign code, asked with what it was not written for: patches alone
            _studied[key] = None
    return _studied[key]


class _HaltError(Exception):
    """Carries what the first layer was given."""


class _Halt(nn.Module):
    """In place of a layer, or of many."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _HaltError((*args, *kwargs.values()))

    def __iter__(self) -> Iterator[Any]:
        return iter([self])

    def __getitem__(self, key: Any) -> Any:
        return self


def _rehearsed(
    tower: Any, convolution: str, shape: torch.Size, patched: type[nn.Module], kept: set[str]
) -> Surroundings | None:
    made, width = {convolution: patched, **_classes(tower, shape[0])}, shape[0]
    inputs = _inputs(tower, shape)
    counts = {_events(_twin(tower, kept, None, made), convolution, x, width) for x in inputs}
    events = counts.pop()
    if counts or events == 0:
        return None
    theirs = _twin(tower, kept, torch.Generator().manual_seed(0))
    ours = _twin(tower, kept, torch.Generator().manual_seed(0), made)
    used: set[int] = set()
    for given in inputs:
        with pending.putting_off(ours.get_submodule(convolution), events) as current:
            got = _first(ours, given, width)
        expected = _first(theirs, given, width)
        if type(got) is not Tensor or got.dtype != expected.dtype:
            return None
        if not (got - expected).abs().max() <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            return None
        used |= current.used
    found = (n for n, p in ours.named_parameters() if p.untyped_storage().data_ptr() in used)
    names = tuple(dict.fromkeys(name.split(".")[0] for name in found))
    return Surroundings(convolution, events, names, tuple(_parts(tower, convolution, names)))


def _twin(
    tower: Any,
    kept: set[str],
    draw: torch.Generator | None,
    classes: dict[str, type[nn.Module]] | None = None,
) -> Any:
    """A tower as far as its first layer; with random numbers, or any."""
    made: Any = object.__new__(type(tower))
    made.__dict__.update(tower.__dict__)
    for name, value in tower.__dict__.items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            made.__dict__[name] = OrderedDict()
    made._parameters = {n: embeddings.drawn(p, draw) for n, p in tower._parameters.items()}
    made._modules = {
        n: embeddings.stand_in(c, draw) if n in kept else _Halt() for n, c in tower._modules.items()
    }
    made.training = False
    for path, kind in (classes or {}).items():
        made.get_submodule(path).__class__ = kind
    return made


def _events(twin: Any, convolution: str, given: dict[str, Any], width: int) -> int:
    """How much a tower does to its patches before they are needed; nothing is computed."""
    with (
        pending.putting_off(twin.get_submodule(convolution), rehearsal=True) as current,
        contextlib.suppress(pending.NeededError),
    ):
        _first(twin, given, width)
    return current.seen


def _parts(tower: Any, convolution: str, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    above = convolution.split(".")
    paths = {".".join(above[: i + 1]) for i in range(len(above))}
    for name in names:
        if name in tower._modules:
            paths.update(".".join((name, n)) if n else name
                         for n, _ in tower._modules[name].named_modules())  # fmt: skip
    for path in sorted(paths):
        module = tower.get_submodule(path)
        yield path, original_class(module) or type(module)


def _first(twin: Any, inputs: dict[str, Any], width: int) -> Any:
    """Tokens as the first layer gets them."""
    try:
        type(twin).forward(twin, **inputs)
    except _HaltError as halt:
        given = (t for t in halt.args[0] if isinstance(t, Tensor) and t.shape[-1:] == (width,))
        return next(given, None)
    return None


def _inputs(tower: Any, shape: torch.Size) -> list[dict[str, Any]]:
    """What a tower may be given, by the names that its forward wants."""
    function: Any = type(tower).forward
    first, *names = embeddings.required(function)
    channels, *sides = shape[1:]
    draw = torch.Generator().manual_seed(1)
    if names == ["grid_thw"]:
        grids = torch.tensor([[1, 4, 6], [1, 2, 4]])
        count = int(grids.prod(dim=1).sum())
        patches = torch.randn(count, shape[1:].numel(), generator=draw)
        return [{first: patches, "grid_thw": grids}]
    if names == ["aspect_ratio_ids", "aspect_ratio_mask"]:
        tiles, size = tower.max_num_tiles, tower.image_size
        images = torch.randn(1, 1, tiles, channels, size, size, generator=draw)
        ids, mask = torch.tensor([[1]]), torch.ones(1, 1, tiles, dtype=torch.long)
        return [{first: images, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}]
    if names:
        raise ValueError(f"its forward wants {names}")
    if "image_sizes" in inspect.signature(function).parameters:
        height, width = 5 * sides[0], 3 * sides[1]
        images = torch.randn(2, channels, height + 1, width, generator=draw)
        sizes = torch.tensor([[3 * sides[0], 2 * sides[1]], [height, width]])
        return [{first: images, "image_sizes": sizes}, {first: images}]
    size = tower.config.image_size
    return [{first: torch.randn(2, channels, size, size, generator=draw)}]


# What modules become.


def classes(tower: Any, found: Surroundings, width: int) -> dict[nn.Module, type[nn.Module]]:
    """The classes of a tower and of its parts that put their work off."""
    made: dict[nn.Module, type[nn.Module]] = {tower: _tower_class(type(tower), found)}
    for path, kind in _classes(tower, width).items():
        if path.split(".")[0] in found.names:
            made[tower.get_submodule(path)] = kind
    return made


def _classes(tower: Any, width: int) -> dict[str, type[nn.Module]]:
    """Of children that hold tables or are norms; LayerNorm is a function that is followed."""
    found: dict[str, type[nn.Module]] = {}
    for name, child in tower.named_children():
        if isinstance(child, nn.Embedding):
            if child.embedding_dim % width == 0 and embeddings.is_plain_table(child):
                found[name] = _table_class(type(child))
        elif (tables := list(child.children())) and all(map(embeddings.is_plain_table, tables)):
            found[name] = _holder_class(type(child))
        elif [p.shape for p in child.parameters()] == [(width,)]:
            norm = rms_norm(child)
            if norm and norm[1] == 0.0:
                found[name] = _norm_class(type(child), norm[0])
    return found


def _tower_class(original: Any, found: Surroundings) -> type[nn.Module]:
    def putting_off(inner: Any) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not _undisturbed(self, found.parts):
                return inner(self, *args, **kwargs)
            convolution = embeddings.part(self, found.convolution)
            with pending.putting_off(convolution, found.events):
                return inner(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        return forward

    def make_forward(_: str) -> Callable[..., Any]:
        made: Callable[..., Any] = wraps(original.forward, putting_off)
        return made

    return subclass(original, ("patch_embed", found, original.forward), make_forward)


def _undisturbed(tower: Any, parts: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the parts are what they were, and nobody watches them."""
    modules = ((embeddings.part(tower, path), kind) for path, kind in parts)
    return all(module is not None and plain.bypassable(module, kind) for module, kind in modules)


def _table_class(original: Any) -> type[nn.Module]:
    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, input: Tensor) -> Tensor:
            if not pending.is_on():
                result: Tensor = original.forward(self, input)
                return result
            return nn.functional.embedding(input, pending.rows(self.weight))

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("patch_embed", original.forward), make_forward)


def _holder_class(original: Any) -> type[nn.Module]:
    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            module = embeddings.with_rows(self, original) if pending.is_on() else self
            return original.forward(module, *args, **kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("patch_embed", original.forward), make_forward)


def _norm_class(original: Any, eps: float) -> type[nn.Module]:
    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if len(given) == 1 and pending.is_on() and defers(self):
                put_off = pending.normalised(
                    *given,
                    "rms",
                    self,
                    eps,
                    lambda: original.forward(self, *pending.computed(given)),
                )
                if put_off is not None:
                    return put_off
            return original.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("patch_embed", eps, original.forward), make_forward)
