"""No speed of a wrong result: compares with the float64 reference before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmops.bench import BenchError
from vlmops.ops.compare import largest_error, mismatch


class Gate:
    """Lets pass what errs by at most twice the worst error of eager plus one rounding.

    Args:
        exact: float64 results of the reference.
        eager: Results of eager, and of the yardstick of an op that has another: in the op's dtype.
    """

    def __init__(self, exact: Sequence[Tensor], *eager: Sequence[Tensor]):
        self._allowed = [
            (x, results[0].dtype, max(largest_error(result, x) for result in results))
            for x, *results in zip(exact, *eager, strict=True)
        ]

    def check(self, what: str, got: Sequence[Tensor]) -> None:
        """Raises BenchError, exit code 1, with the worst element of the first wrong result."""
        if len(got) != len(self._allowed):
            raise _wrong(what, f"expected {len(self._allowed)} results, got {len(got)}")
        for i, (result, allowed) in enumerate(zip(got, self._allowed, strict=True)):
            problem = mismatch(result, *allowed)
            if problem is not None:
                raise _wrong(f"{what}, result {i}", problem)


def _wrong(what: str, how: str) -> BenchError:
    return BenchError(f"{what}: {how}. A wrong result has no speed: nothing is reported", code=1)
