"""The one comparison of a kernel's result with the exact one, judged at the worst element."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Largest distance of ``result`` from the float64 ``exact``; 0 if there are no elements."""
    return (result.double() - exact).abs_().max().item() if exact.numel() else 0.0


def mismatch(got: Tensor, exact: Tensor, dtype: torch.dtype, eager_error: float) -> str | None:
    """Says where ``got`` is worse than a good implementation in ``dtype`` may be.

    Allowed at every element: twice the largest error of the same computation by torch's own
    operators in the same dtype, plus one rounding of the exact value to that dtype.

    Args:
        got: The result to judge.
        exact: float64, same shape.
        dtype: The dtype that ``got`` should have.
        eager_error: `largest_error` of the eager result.

    Returns:
        None, or one line that names the worst element, what was expected and what came.
    """
    if got.shape != exact.shape or got.dtype != dtype:
        return f"expected {list(exact.shape)} of {dtype}, got {list(got.shape)} of {got.dtype}"
    if got.numel() == 0:
        return None
    allowed = exact.abs().mul_(torch.finfo(dtype).eps / 2).add_(2 * eager_error)
    excess = (got.double() - exact).abs_().sub_(allowed)
    at = torch.unravel_index(excess.argmax(), excess.shape)  # argmax finds a NaN first
    if excess[at] <= 0:
        return None
    where = ", ".join(str(int(index)) for index in at)
    return (
        f"{int((~(excess <= 0)).sum())} of {got.numel()} elements are off, worst at [{where}]: "
        f"expected {exact[at].item():.9g} within {allowed[at].item():.2g}, "
        f"got {got[at].item():.9g}"
    )
