"""What is asked of tensors before the compiled library looks at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def require_tensor(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless the argument ``name`` of an op is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"vlmops.{op}: {name}: expected a torch.Tensor, got {type(value).__name__}")


def same_device(op: str, name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError unless others lie where the argument ``name`` does.

    For fakes: on the meta device nothing else looks.
    """
    for other, given in others.items():
        if given is not None and given.device != tensor.device:
            raise RuntimeError(
                f"vlmops.{op}: {other}: expected on {tensor.device}, where {name} is, got "
                f"{given.device}"
            )


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
