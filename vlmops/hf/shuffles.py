"""Functions that merge blocks of tokens: found by what they name, read by probing.

A method, a function that a forward calls, or the forward of a module without weights is a candidate
if its code names nothing but ways to rearrange a tensor and numbers of its module. Such a function
can be run on anything: it is fed with numbers that all differ on a small grid of tokens, and where
they come out is what it does. What `pixel_shuffle` would not give is not replaced.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf.rebind import is_ours, original_class
from vlmops.ops.pixel_shuffle import Order, pixel_shuffle, reference

TURNS = {"permute", "transpose"}
"""Names by which code turns tokens around."""
_NAMES = {
    "size", "shape", "dim", "ndim", "view", "reshape", "flatten", "unflatten", "contiguous",
    "squeeze", "unsqueeze", "int", "math", "sqrt", "isqrt", "ValueError", "config",
    *TURNS,
}  # fmt: skip
LARGEST = 16
"""Of the factors that the op takes."""
SMALL = 1 << 20
"""Bytes below which copying twice on a CPU takes less time than to call an op, by 12 us at most."""
_CHANNELS = 3  # of a probe
_ORDERS: tuple[Order, ...] = ("yxc", "cyx")


def is_small(x: Tensor) -> bool:
    """Whether the model's own code takes no longer than the op."""
    return x.device.type == "cpu" and x.numel() * x.element_size() < SMALL


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """What a function does, in the arguments of `pixel_shuffle`."""

    factor: int
    order: Order = "yxc"
    takes_grid: bool = False
    """Whether it takes ``[B, h, w, C]``; else ``[B, N, C]`` of square images."""
    gives_grid: bool = False
    """Whether it returns ``[B, h / f, w / f, K]``; else ``[B, N / f^2, K]``."""

    def __str__(self) -> str:
        return f"blocks of {self.factor} x {self.factor} ({', '.join(self.order)})"

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result, or None for tensors whose tokens are no grid of such blocks."""
        if x.dim() != (4 if self.takes_grid else 3) or x.numel() == 0:
            return None
        if self.takes_grid:
            h, w = x.shape[1:3]
        else:
            h = w = int(x.shape[1] ** 0.5)
            if h * w != x.shape[1]:
                return None
        if h % self.factor or w % self.factor:
            return None
        grid = None if self.takes_grid else (h, w)
        y = pixel_shuffle(x, self.factor, grid_hw=grid, order=self.order)
        return y.unflatten(1, (h // self.factor, w // self.factor)) if self.gives_grid else y


@dataclasses.dataclass(frozen=True)
class Mover:
    """A function that only rearranges, in a module."""

    name: str
    """Of the method, or of the global that the module's forward calls."""
    function: types.FunctionType
    is_method: bool
    numbers: tuple[tuple[str, Any], ...]
    """What it reads from the module or its config, by name."""

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Without self."""
        return list(inspect.signature(self.function).parameters.values())[self.is_method :]


def movers(module: nn.Module) -> Iterator[Mover]:
    """The functions of a module that only rearrange what they are given."""
    seen = set()
    for name, function in methods(module):
        if name not in seen and (name != "forward" or _is_bare(module)):
            found = _mover(module, name, function, True)
            if found is not None:
                yield found
        seen.add(name)
    forward = _plain(getattr(original_class(module) or type(module), "forward", None))
    for name in forward.__code__.co_names if forward else ():
        found = _mover(module, name, forward.__globals__.get(name), False)  # type: ignore[union-attr]
        if found is not None:
            yield found


def methods(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and functions of a module's class and its bases, the nearest first; none of ours."""
    for cls in (original_class(module) or type(module)).__mro__:
        if cls.__module__.partition(".")[0] == "torch":
            return
        for name, value in () if is_ours(cls) else vars(cls).items():
            if not name.startswith("__") and isinstance(value, types.FunctionType):
                yield name, value


def _is_bare(module: nn.Module) -> bool:
    """Whether a module has nothing but numbers."""
    return not any((module._modules, module._parameters, module._buffers))


def _plain(function: Any) -> types.FunctionType | None:
    function = inspect.unwrap(function) if callable(function) else None
    return function if isinstance(function, types.FunctionType) else None


def _mover(module: nn.Module, name: str, value: Any, is_method: bool) -> Mover | None:
    function = _plain(value)
    if function is None:
        return None
    code = function.__code__
    names = set(code.co_names)
    if (
        not names & TURNS
        or code.co_freevars
        or any(isinstance(constant, types.CodeType) for constant in code.co_consts)
        or any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code))
        or code.co_argcount - is_method not in (1, 2)
        or code.co_kwonlyargcount
        or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    ):
        return None
    numbers = {n: number(module, n) for n in sorted(names - _NAMES)} if is_method else {}
    if len(numbers) != len(names - _NAMES) or None in numbers.values():
        return None
    return Mover(name, function, is_method, tuple(numbers.items()))


def number(module: Any, name: str) -> Any:
    """A number of a module or its config, or None."""
    for holder in (module, getattr(module, "config", None)):
        value = getattr(holder, "__dict__", {}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return None


def scales(module: nn.Module, mover: Mover) -> list[Any]:
    """What a function with a second parameter is called with: what callers name, or its default."""
    callers = [f for _, value in methods(module) if (f := _plain(value))]
    codes = [f.__code__ for f in callers if mover.name in f.__code__.co_names]
    found = [number(module, name) for code in codes for name in code.co_names]
    unique = {(type(scale), scale): scale for scale in found if _factor(scale)}
    default = mover.parameters[1].default
    return list(unique.values()) or ([default] if _factor(default) else [])


def _factor(scale: Any) -> int | None:
    """The factor that a scale stands for: itself, or what it is one part in."""
    if isinstance(scale, int) and not isinstance(scale, bool) and 2 <= scale <= LARGEST:
        return scale
    if isinstance(scale, float) and 1 / LARGEST <= scale < 1:
        factor = round(1 / scale)
        return factor if abs(factor * scale - 1) < 1e-6 else None
    return None


def bound(module: nn.Module, mover: Mover, scale: Any) -> Callable[[Tensor], Any]:
    """A function of tokens alone; scale: None where there is none."""

    def run(x: Tensor) -> Any:
        given = (x,) if scale is None else (x, scale)
        return mover.function(module, *given) if mover.is_method else mover.function(*given)

    return run


def turns_for(module: nn.Module, name: str) -> bool:
    """Whether a method of a module that names this child turns tokens around."""
    found = (f.__code__.co_names for _, value in methods(module) if (f := _plain(value)))
    return any(name in names and TURNS & set(names) for names in found)


Table = tuple[tuple[Any, Shuffle], ...]
"""What a function does, by its second argument; None where it has none."""


def study(module: nn.Module, mover: Mover) -> Table | str | None:
    """What a function does, why that is not served, or None if it merges no blocks at all."""
    second = len(mover.parameters) == 2
    table: list[tuple[Any, Shuffle]] = []
    cases = (
        [(s, s) for s in scales(module, mover)] if second else [(None, n) for _, n in mover.numbers]
    )
    for scale, value in cases:
        factor, run = _factor(value), bound(module, mover, scale)
        found = None if factor is None else _explain(run, factor)
        if isinstance(found, str):
            return f"{mover.name}{'' if scale is None else f' by {scale}'}: {found}"
        if found is not None:
            table.append((scale, found))
    return tuple(table) or None


def _explain(run: Callable[[Tensor], Any], factor: int) -> Shuffle | str | None:
    """What a function does to blocks of factor x factor tokens."""
    for takes_grid, sides in (
        (True, ((2 * factor, 3 * factor), (3 * factor, factor))),
        (False, ((2 * factor,) * 2, (3 * factor,) * 2)),
    ):
        found: set[Shuffle | str | None] = set()
        for h, w in sides:
            shape = (2, h, w, _CHANNELS) if takes_grid else (2, h * w, _CHANNELS)
            x = torch.randperm(2 * h * w * _CHANNELS, generator=torch.Generator().manual_seed(h))
            x = x.float().view(shape)
            try:
                y = run(x)
            except Exception:  # foreign code, asked with what it was not written for
                found.clear()
                break
            found.add(_compare(x, y, factor, (h, w)))
        if len(found) == 1:
            return found.pop()
        if found:
            return "it does not do the same to all grids"
    return None


def _compare(x: Tensor, y: Any, factor: int, grid: tuple[int, int]) -> Shuffle | str | None:
    """What gives y for x, if it has the size of a shuffle's result."""
    h, w = grid[0] // factor, grid[1] // factor
    if not isinstance(y, Tensor) or y.dim() < 3 or y.numel() != x.numel():
        return None
    if y.shape[0] != len(x) or y.shape[-1] != factor**2 * _CHANNELS:
        return None
    for order in _ORDERS:
        expected = reference(x, factor, grid_hw=None if x.dim() == 4 else grid, order=order)
        if y.dim() == 4:
            expected = expected.unflatten(1, (h, w))
        if torch.equal(y.double(), expected):
            return Shuffle(factor, order, x.dim() == 4, y.dim() == 4)
    return "it merges blocks of tokens in an order of its own"
