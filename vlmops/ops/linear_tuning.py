"""Measures which way of `vlmops.ops.linear` is the faster for the weights of a model.

Each class of weights (dtype, N, K) is timed at a few numbers of rows, the heaviest class first,
until the time is used up; the others keep the defaults. The weights take turns, so that they come
from memory as they do in a model, and a slice stands for a weight that is too large to be quick.
Results hold for the process, and for the number of threads that was set.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from vlmops.ops.linear import FROM_ROWS, Wins, alternative, has_alternative, measured, wins

_ROUNDS = (3, 7)  # at least, and at most if they are quick
_QUICK = 0.02  # seconds
_CLEARLY = 0.95  # of F.linear's time is what the alternative may take where F.linear is the default
_ELEMENTS = 2**24  # of a weight, at most: 64 MB in float32, more than most caches
_PRODUCTS = 2**28  # multiplications in one call, at most: a few milliseconds
_TINY = 2**16  # elements of a weight; below, a product is all overhead, and F.linear has the least
_USED = 4  # weights of a class: more are not needed to leave the caches

Class = tuple[torch.dtype, int, int]


def tune(weights: Iterable[Tensor], seconds: float = 1.0) -> None:
    """Measures classes that were not measured before; `vlmops.ops.linear.linear` heeds the results.

    Args:
        weights: ``[N, K]`` each; on the CPU, dense.
        seconds: After which no further class is begun.
    """
    classes: dict[Class, list[Tensor]] = {}
    for weight in weights:
        classes.setdefault((weight.dtype, *weight.shape), []).append(weight.detach())
    end = time.perf_counter() + seconds
    hopeless: set[torch.dtype] = set()
    for key, members in sorted(classes.items(), key=lambda item: -_elements(item[1])):
        dtype, n, k = key
        if key in measured or not has_alternative(dtype) or n * k < _TINY:
            continue
        if dtype in hopeless:
            measured[key] = (False,) * len(FROM_ROWS)
        elif time.perf_counter() < end:
            with _disable_current_modes(), torch.no_grad():
                measured[key] = _measure(members[:_USED])
            # Panels of the heaviest weights have the most rows to pay for them.
            if dtype != torch.float32 and not any(measured[key]):
                hopeless.add(dtype)


def gains(dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether a weight ``[n, k]`` is multiplied faster than by F.linear for some number of rows."""
    return any(wins(dtype, n, k))


def _elements(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _measure(weights: Sequence[Tensor]) -> Wins:
    dtype, (n, k) = weights[0].dtype, weights[0].shape
    expected = wins(dtype, n, k)

    def faster(rows: int) -> bool:
        limit = 1.0 if expected[FROM_ROWS.index(rows)] else _CLEARLY
        return _is_faster(weights, rows, limit)

    few, some, many = map(faster, (8, 64, 512))
    # Between two numbers of rows, what wins at both.
    if dtype == torch.float32:
        one = faster(1)
        return one, one and few, few and some, some and many, many
    # A panel is written and read again, which few rows never pay for.
    return False, False, few and some and many, some and many, many


def _is_faster(weights: Sequence[Tensor], rows: int, limit: float) -> bool:
    """Whether the alternative takes less than `limit` of F.linear's time."""
    k = weights[0].shape[1]
    height = max(16, min(_ELEMENTS // k, _PRODUCTS // (rows * k)))
    pool = itertools.cycle([weight[:height] for weight in weights])
    x = torch.full((rows, k), 0.5, dtype=weights[0].dtype, device="cpu")

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        weight = next(pool)
        start = time.perf_counter()
        product(x, weight)
        return time.perf_counter() - start

    for product in (functional.linear, alternative):  # compiles kernels
        seconds(product)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + _QUICK
    while len(times) < _ROUNDS[0] or (len(times) < _ROUNDS[1] and time.perf_counter() < end):
        times.append((seconds(functional.linear), seconds(alternative)))
    # The least of each: whatever disturbs a measurement makes it longer.
    theirs, other = map(min, zip(*times, strict=True))
    return bool(other < limit * theirs)
