"""`vlmops.pixel_shuffle` wherever a model merges blocks of tokens into one, or averages them.

Methods, and functions that a forward calls, that only rearrange (`vlmops.hf.shuffles`), and modules
that do more (`vlmops.hf.mergers`). Left to the model's own code, which is as fast, are small
tensors on a CPU.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops import dispatch
from vlmops.hf import mergers, plain, shuffles
from vlmops.hf.mergers import Pool, Pooling, Unfolding
from vlmops.hf.rebind import changed, owner, rebind, references, replaced, subclass
from vlmops.hf.shuffles import Mover, Table
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Place, Refused, Site


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of a module that is replaced."""

    module: nn.Module
    mover: Mover
    table: Table

    @property
    def method(self) -> str:
        """The method of the module that changes."""
        return self.mover.name if self.mover.is_method else "forward"

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(str(shuffle) for _, shuffle in self.table))


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module whose forward is replaced."""

    module: nn.Module
    does: Unfolding | Pooling | Pool
    method = "forward"

    def __str__(self) -> str:
        return str(self.does)


_Details = _Function | _Module
_Judgement = Place | Refused | AlreadyPatched


def find(model: nn.Module) -> Iterator[_Judgement]:
    """Everything that merges or averages blocks of tokens."""
    for path, module in model.named_modules():
        found = list(_found(module))
        for details in found:
            yield _judged(path, module, details)
        for reason in [] if found else mergers.left_alone(module):
            yield LeftAlone(Place(path, type(module).__name__, 1), reason)
        for name, child in module.named_children():
            if not found and mergers.is_pool(child) and shuffles.turns_for(module, name):
                pool = _Module(child, Pool(mergers.side_of(child)))
                yield _judged(f"{path}.{name}".strip("."), child, pool)


def _judged(path: str, module: nn.Module, details: _Details | str) -> _Judgement:
    """What becomes of a module with something to serve."""
    place = Place(path, type(module).__name__, 1)
    if isinstance(details, str):
        return Refused(place, details)
    if details.method in replaced(module):
        return AlreadyPatched(place)
    reason = _refusal(details)
    if reason is not None:
        return Refused(place, reason)
    return dataclasses.replace(place, details=details, note=str(details))


def _found(module: nn.Module) -> Iterator[_Details | str]:
    """What a module does to blocks of tokens, or why that is not served."""
    for mover in shuffles.movers(module):
        table = shuffles.study(module, mover)
        if table is not None:
            yield table if isinstance(table, str) else _Function(module, mover, table)
    whole = mergers.unfolding(module) or mergers.pooling(module)
    if whole is not None:
        yield whole if isinstance(whole, str) else _Module(module, whole)


def _refusal(details: _Details) -> str | None:
    module = details.module
    reason = changed(module, details.method)
    if reason is not None:
        return reason
    if isinstance(details, _Function):
        reason = _replaced_function(details)
    elif isinstance(details.does, Pooling | Pool):
        reason = details.does.refuses(module)
    weight = next(module.parameters(), None)
    if reason is not None or weight is None:
        return reason
    return dispatch.refuses("pixel_shuffle", weight.device)


def _replaced_function(details: _Function) -> str | None:
    """Who put another function in the place of the one that would be replaced."""
    module, mover = details.module, details.mover
    function: Any
    if mover.is_method:
        function = getattr(type(module), mover.name)
    else:
        home = type(module).forward.__module__
        function = inspect.unwrap(type(module).forward).__globals__[mover.name]
        if function.__globals__["__name__"] != home:
            return f"{mover.name} in {home} was replaced by {owner(function)}; undo that first"
    if function is not mover.function:
        return f"{mover.name} is decorated, and a replacement would not be"
    return None


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    return {place.details.module: _class(place.details)}


def _class(details: _Details) -> type[nn.Module]:
    original: Any = type(details.module)
    function = getattr(original, details.method)
    if isinstance(details, _Module):
        absorbs = details.does.absorbs
        key: tuple[Any, ...] = ("pixel_shuffle", details.does, function)
        return subclass(original, key, lambda _: _forward(function, details.does), absorbs)
    mover = details.mover
    replacement = _replacement(mover, details.table)
    key = ("pixel_shuffle", mover, details.table, function)
    if mover.is_method:
        return subclass(original, key, lambda _: replacement, method=mover.name)
    return subclass(
        original,
        (*key, references(function)),
        lambda label: rebind(function, label, **{mover.name: replacement}),
    )


def _like(replacement: Any, function: Any) -> Any:
    """A replacement that looks like the function that it replaces."""
    replacement.__name__, replacement.__doc__ = function.__name__, function.__doc__
    replacement.__signature__ = inspect.signature(function)
    return replacement


def _replacement(mover: Mover, table: Table) -> Callable[..., Any]:
    function, names = mover.function, [p.name for p in mover.parameters]
    defaults = {p.name: p.default for p in mover.parameters if p.default is not p.empty}

    def shuffled(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """None where the model's own code has to run."""
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if len(args) > len(names) or given.keys() != set(names):
            return None
        x, scale = given[names[0]], given[names[1]] if len(names) == 2 else None
        if not isinstance(x, Tensor) or not plain.runs("pixel_shuffle", [x]):
            return None
        if shuffles.is_small(x):
            return None
        if any(shuffles.number(module, name) != value for name, value in mover.numbers):
            return None
        for known, shuffle in table:
            if type(known) is type(scale) and known == scale:
                return shuffle(x)
        return None

    if mover.is_method:

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            y = shuffled(self, args, kwargs)
            return function(self, *args, **kwargs) if y is None else y

        return _like(method, function)  # type: ignore[no-any-return]

    def called(*args: Any, **kwargs: Any) -> Any:
        y = shuffled(None, args, kwargs)
        return function(*args, **kwargs) if y is None else y

    return _like(called, function)  # type: ignore[no-any-return]


def _forward(function: Any, does: Unfolding | Pooling | Pool) -> Callable[..., Any]:
    names = list(inspect.signature(function).parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x: Any = given.get(names[0])
        y = None
        fits = len(args) <= len(names) and given.keys() == set(names) and isinstance(x, Tensor)
        if fits and plain.runs("pixel_shuffle", [x]) and not shuffles.is_small(x):
            y = does(self, *(given[name] for name in names))
        return function(self, *args, **kwargs) if y is None else y

    return _like(forward, function)  # type: ignore[no-any-return]


_checked: dict[Any, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the op against the model's own code; once for each function and what it does."""
    details: _Details = place.details
    key = _class(details)
    if key not in _checked:
        _checked[key] = _difference(details)
    return _checked[key]


@torch.no_grad()
def _difference(details: _Details) -> str | None:
    """Why the op is not what it replaces, on tokens that are no probe, to the bit."""
    if isinstance(details, _Module):
        return details.does.difference(details.module)
    for scale, shuffle in details.table:
        theirs, f = shuffles.bound(details.module, details.mover, scale), shuffle.factor
        for h, w in ((4 * f, 4 * f), (f, f), *([(5 * f, 2 * f)] if shuffle.takes_grid else [])):
            shape = (3, h, w, 24) if shuffle.takes_grid else (3, h * w, 24)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for dtype in plain.DTYPES:
                got, expected = shuffle(x.to(dtype)), theirs(x.to(dtype))
                if got is None or got.dtype != dtype or not torch.equal(got, expected):
                    return f"the numeric check failed: {details.mover.name} of {dtype} differs"
    return None


SITE = Site("pixel_shuffle", find, adapt, check)
