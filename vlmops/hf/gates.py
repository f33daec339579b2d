"""Gated residuals of a layer, put off until what is added is known.

A gated layer ends both of its branches with ``residual + gate.tanh() * h``, with rows of h stopped
on the way, in a few lines of its forward. Those lines run as they are, on a stand-in for the module
whose gates are `Lazy`, and masks of rows that are: what they follow becomes one call of
`vlmops.gated_residual`, anything else is done with the tensors that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmops.ops.gated_residual import gated_residual


class Lazy:
    """Stands for a tensor that nobody has computed."""

    def value(self) -> Tensor:
        """The tensor, by the model's own steps."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    def __mul__(self, other: Any) -> Any:
        return self.value() * _plain(other)

    def __add__(self, other: Any) -> Any:
        return self.value() + _plain(other)

    def __eq__(self, other: object) -> Any:
        return self.value() == other

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and (follow := _FOLLOWED.get(func)) is not None:
            made = follow(*args)
            if made is not None:
                return made
        kwargs = {name: _plain(value) for name, value in (kwargs or {}).items()}
        return func(*(_plain(a) for a in args), **kwargs)


class Gate(Lazy):
    """A layer's parameter, or its tanh."""

    def __init__(self, parameter: Tensor, squashed: bool = False) -> None:
        """``squashed``: the tanh of it."""
        self.parameter, self.squashed = parameter, squashed

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        return self.parameter.tanh() if self.squashed else self.parameter

    def tanh(self) -> Any:
        """As a tensor has it."""
        return torch.tanh(self)  # type: ignore[arg-type]

    def __mul__(self, other: Any) -> Any:
        branch, rows = (other.branch, other) if isinstance(other, Stopped) else (other, None)
        if self.squashed and isinstance(branch, Tensor):
            return Gated(self, branch, rows)
        return super().__mul__(other)


class Rows(Lazy):
    """Which rows go through, 1 or 0, ``[B, S]`` with dimensions of 1; or which do not, True."""

    def __init__(self, mask: Tensor, stopped: bool = False) -> None:
        """``stopped``: True in the mask stops a row."""
        self.mask, self.stopped = mask, stopped

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        return self.mask

    def __getitem__(self, index: Any) -> Any:
        return Rows(self.mask[index], self.stopped)

    def __eq__(self, other: object) -> Any:
        if other == 0 and not self.stopped:
            return Rows(self.mask == 0, True)
        return super().__eq__(other)

    def __mul__(self, other: Any) -> Any:
        if not self.stopped and isinstance(other, Tensor):
            return Stopped(self, other)
        return super().__mul__(other)

    def go(self, like: Tensor) -> Tensor | None:
        """Rows of a tensor that go through, bool; None if that is not what the mask says."""
        if self.mask.shape != (*like.shape[:-1], 1):
            return None
        mask = self.mask[..., 0]
        return ~mask if self.stopped else mask != 0


class Stopped(Lazy):
    """A branch, of which some rows are zero."""

    def __init__(self, rows: Rows, branch: Tensor) -> None:
        self.rows, self.branch = rows, branch

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        if self.rows.stopped:
            return self.branch.masked_fill(self.rows.mask, 0.0)
        return self.rows.mask * self.branch


class Gated(Lazy):
    """A branch, times its gate."""

    def __init__(self, gate: Gate, branch: Tensor, stopped: Stopped | None) -> None:
        self.gate, self.branch, self.stopped = gate, branch, stopped

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        branch = self.branch if self.stopped is None else self.stopped.value()
        return self.gate.value() * branch


def _tanh(gate: Any) -> Gate | None:
    if isinstance(gate, Gate) and not gate.squashed:
        return Gate(gate.parameter, True)
    return None


def _masked_fill(branch: Any, rows: Any, value: Any) -> Stopped | None:
    known = isinstance(rows, Rows) and rows.stopped and value == 0.0
    return Stopped(rows, branch) if known and isinstance(branch, Tensor) else None


def _add(x: Any, gated: Any) -> Tensor | None:
    if not (type(x) is Tensor and isinstance(gated, Gated)):
        return None
    y, gate, rows = gated.branch, gated.gate.parameter, None
    if x.shape != y.shape or not x.dtype == y.dtype == gate.dtype:
        return None
    if gated.stopped is not None:
        rows = gated.stopped.rows.go(y)
        if rows is None:
            return None
    return gated_residual(x, y, gate.flatten(), rows)


_FOLLOWED: Mapping[Any, Callable[..., Any]] = {
    torch.tanh: _tanh,
    torch.Tensor.masked_fill: _masked_fill,
    torch.Tensor.add: _add,
    torch.Tensor.__add__: _add,
    torch.add: _add,
}


def _plain(value: Any) -> Any:
    return value.value() if isinstance(value, Lazy) else value


class StandIn:
    """In a layer's forward: the layer, with `Gate` for its gates."""

    def __init__(self, layer: Any, gates: Mapping[str, Gate]) -> None:
        self._layer, self._gates = layer, gates

    def __getattr__(self, name: str) -> Any:
        gate = self._gates.get(name)
        return getattr(self._layer, name) if gate is None else gate
