"""No speed of a wrong result: compares with the float64 reference before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmops.bench import BenchError


class Gate:
    """Lets pass what errs by at most twice eager's worst error plus one rounding.

    Args:
        expected: float64 results of the reference.
        eager: Results of eager, in the dtype of the op.
    """

    def __init__(self, expected: Sequence[Tensor], eager: Sequence[Tensor]):
        self._expected = expected
        self._dtypes = [e.dtype for e in eager]
        self._eager_errors = [
            (e.double() - x).abs_().max().item() if x.numel() else 0.0
            for e, x in zip(eager, expected, strict=True)
        ]

    def check(self, what: str, got: Sequence[Tensor]) -> None:
        """Raises BenchError, exit code 1, with the worst element of the first wrong result."""
        if len(got) != len(self._expected):
            raise _wrong(what, f"expected {len(self._expected)} results, got {len(got)}")
        for i, (result, expected) in enumerate(zip(got, self._expected, strict=True)):
            if result.shape != expected.shape or result.dtype != self._dtypes[i]:
                raise _wrong(
                    f"{what}, result {i}",
                    f"expected {list(expected.shape)} of {self._dtypes[i]}, "
                    f"got {list(result.shape)} of {result.dtype}",
                )
            if result.numel():
                self._check_values(f"{what}, result {i}", result, expected, self._eager_errors[i])

    def _check_values(
        self, what: str, result: Tensor, expected: Tensor, eager_error: float
    ) -> None:
        rounding = torch.finfo(result.dtype).eps / 2
        allowed = expected.abs().mul_(rounding).add_(2 * eager_error)
        excess = (result.double() - expected).abs_().sub_(allowed)
        at = torch.unravel_index(excess.argmax(), excess.shape)  # argmax finds a NaN first
        if not excess[at] <= 0:
            where = ", ".join(str(int(index)) for index in at)
            raise _wrong(
                f"{what} at [{where}]",
                f"expected {expected[at].item():.9g} within {allowed[at].item():.2g}, "
                f"got {result[at].item():.9g}",
            )


def _wrong(what: str, how: str) -> BenchError:
    return BenchError(f"{what}: {how}. A wrong result has no speed: nothing is reported", code=1)
