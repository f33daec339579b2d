"""The one comparison of a kernel's result with the exact one, judged at the worst element."""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch(got: Tensor, exact: Tensor, yardstick: Tensor) -> str | None:
    """Says where ``got`` is worse than a good implementation in its dtype may be.

    Allowed at every element: twice the largest error of ``yardstick`` (the same computation by
    torch's own operators in the same dtype) plus one rounding to that dtype of the exact value.

    Args:
        got: The result to judge.
        exact: float64, same shape.
        yardstick: The eager result, same shape and dtype as ``got``.

    Returns:
        None, or one line that names the worst element, what was expected and what came.
    """
    if got.shape != exact.shape or got.dtype != yardstick.dtype:
        return f"expected {yardstick.dtype} {list(exact.shape)}, got {got.dtype} {list(got.shape)}"
    if got.numel() == 0:
        return None
    slack = 2 * (yardstick.double() - exact).abs().max()
    allowed = slack + torch.finfo(got.dtype).eps / 2 * exact.abs()
    excess = (got.double() - exact).abs() - allowed
    excess = excess.nan_to_num(nan=torch.inf)  # a NaN is never right
    worst = int(excess.argmax())
    if excess.flatten()[worst] <= 0:
        return None
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)]
    wrong = int((excess > 0).sum())
    return (
        f"{wrong} of {got.numel()} elements are off, worst at {where}: "
        f"expected {exact.flatten()[worst].item():.9g} "
        f"+- {allowed.flatten()[worst].item():.3g}, got {got.flatten()[worst].item():.9g}"
    )
