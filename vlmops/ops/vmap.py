"""A vmap rule for ops that torch has no fallback for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(op: Any) -> Callable[..., tuple[Any, Any]]:
    """One call after another: a batch has more images, not more of everything else.

    For `torch.library.register_vmap`. ``op`` takes tensors and lists of tensors, and returns one
    tensor or several.
    """

    def run(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def one(value: Any, dim: Any, i: int) -> Any:
            if isinstance(value, list | tuple):
                dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
                return [one(v, d, i) for v, d in zip(value, dims, strict=True)]
            return value if dim is None else value.select(dim, i)

        outputs = [
            op(*[one(v, d, i) for v, d in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        columns = [torch.stack(column) for column in zip(*outputs, strict=True)]
        return columns, [0] * len(columns)

    return run
