"""Gated residuals of a layer, put off until what is added is known.

A gated layer ends both of its branches with ``residual + gate.tanh() * h``, with rows of h stopped
on the way, in a few lines of its forward. Those lines run as they are, on a stand-in for the module
whose gates and masks of rows are stand-ins themselves (`vlmops.hf.lazy`): what is followed becomes
one call of `vlmops.gated_residual`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.hf.lazy import Compute, Lazy
from vlmops.ops.gated_residual import gated_residual


class _Part(Lazy):
    """Of a gated residual."""


class Gate(_Part):
    """A layer's parameter, or its tanh."""

    def __init__(self, parameter: Tensor, squashed: bool = False) -> None:
        """``squashed``: the tanh of it."""
        self.parameter, self.squashed = parameter, squashed

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        return self.parameter.tanh() if self.squashed else self.parameter

    def __mul__(self, other: Any) -> Any:
        branch, rows = (other.branch, other) if isinstance(other, Stopped) else (other, None)
        if self.squashed and isinstance(branch, Tensor):
            return Gated(self, branch, rows)
        return self._call(Tensor.__mul__, other)


class Rows(_Part):
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
        return self._call(Tensor.__eq__, other)

    def __mul__(self, other: Any) -> Any:
        if not self.stopped and isinstance(other, Tensor):
            return Stopped(self, other)
        return self._call(Tensor.__mul__, other)

    def go(self, like: Tensor) -> Tensor | None:
        """Rows of a tensor that go through, bool; None if that is not what the mask says."""
        if self.mask.shape != (*like.shape[:-1], 1):
            return None
        mask = self.mask[..., 0]
        return ~mask if self.stopped else mask != 0


class Stopped(_Part):
    """A branch, of which some rows are zero."""

    def __init__(self, rows: Rows, branch: Tensor) -> None:
        self.rows, self.branch = rows, branch

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        if self.rows.stopped:
            return self.branch.masked_fill(self.rows.mask, 0.0)
        return self.rows.mask * self.branch


class Gated(_Part):
    """A branch, times its gate."""

    def __init__(self, gate: Gate, branch: Tensor, stopped: Stopped | None) -> None:
        self.gate, self.branch, self.stopped = gate, branch, stopped

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        branch = self.branch if self.stopped is None else self.stopped.value()
        return self.gate.value() * branch


def _tanh(_: Compute, gate: Any, **more: Any) -> Gate | None:
    if not more and isinstance(gate, Gate) and not gate.squashed:
        return Gate(gate.parameter, True)
    return None


def _masked_fill(_: Compute, branch: Any, mask: Any, value: Any) -> Stopped | None:
    known = isinstance(mask, Rows) and mask.stopped and value == 0.0
    return Stopped(mask, branch) if known and isinstance(branch, Tensor) else None


def _add(_: Compute, x: Any, gated: Any, **more: Any) -> Tensor | None:
    if more or not (type(x) is Tensor and isinstance(gated, Gated)):
        return None
    y, gate, rows = gated.branch, gated.gate.parameter, None
    if x.shape != y.shape or not x.dtype == y.dtype == gate.dtype:
        return None
    if gated.stopped is not None:
        rows = gated.stopped.rows.go(y)
        if rows is None:
            return None
    return gated_residual(x, y, gate.flatten(), rows)


_Part.followed = {
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
    Tensor.masked_fill: _masked_fill,
    Tensor.add: _add,
    Tensor.__add__: _add,
    torch.add: _add,
}
