"""Compiles what a patched model will need before the first user waits for it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What `warmup` did.

    Attributes:
        device: Where the model is.
        sizes: Numbers of tokens that the model ran on.
        compiled: Number of Triton kernels that were compiled.
        note: The same in words.
    """

    device: torch.device
    sizes: tuple[int, ...]
    compiled: int
    note: str

    def __str__(self) -> str:
        return f"vlmops.warmup: {self.note}"


def _text(model: nn.Module, size: int) -> None:
    device = next(model.parameters()).device
    model(input_ids=torch.zeros(1, size, dtype=torch.int64, device=device))


def warmup(
    model: nn.Module,
    sizes: Sequence[int] = (1, 16, 17),
    run: Callable[[nn.Module, int], Any] | None = None,
) -> Warmup:
    """Runs a patched model once for each size, so that Triton has compiled what it needs.

    No kernel of ours is compiled for a size (tests hold each to one key for 1, multiples of 16, odd
    ones and decode steps), so that one size serves for all; other kernels of the model may differ.
    The default runs text alone. A tower's kernels are compiled by a ``run`` that passes pictures.

    Args:
        model: The model, patched, on the device that it will run on.
        sizes: Numbers of tokens.
        run: Called with the model and each size; None: one sequence of text ids.

    Returns:
        What was done; on a CPU nothing, since those kernels were compiled with vlmops.

    Raises:
        ValueError: a size is below 1, or the model has no parameters.

    Example:
        >>> print(vlmops.warmup(model, sizes=[1, 512]))
        vlmops.warmup: nothing to compile on cpu: its kernels were compiled with vlmops
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: expected numbers of tokens of 1 or more, got {list(sizes)}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"model: expected a module with parameters, got {type(model).__name__}")
    device = parameter.device
    if device.type == "cpu":
        return Warmup(
            device, (), 0, "nothing to compile on cpu: its kernels were compiled with vlmops"
        )
    before = _compiled()
    with torch.no_grad():
        for size in sizes:
            (run or _text)(model, size)
    compiled = _compiled() - before
    ran = ", ".join(map(str, sizes))
    note = f"{compiled} Triton kernels compiled on {device} by running {ran} tokens"
    return Warmup(device, tuple(sizes), compiled, note)


def _compiled() -> int:
    """Kernels that Triton has compiled for us; its modules are imported when they are used."""
    modules = [m for name, m in sys.modules.items() if _is_triton(name)]
    return sum(int(module.compiled()) for module in modules)


def _is_triton(name: str) -> bool:
    return name.startswith("vlmops.ops.") and name.endswith("_triton")
