"""Layers of torch's own: which of them compute what torch wrote, and nothing besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from vlmops import dispatch
from vlmops.hf.rebind import original_class

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute in."""
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
"""Whose values are all there is to them; the last two while a model is exported."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def watched(module: nn.Module) -> bool:
    """Whether hooks are registered on a module."""
    return any(getattr(module, name) for name in _HOOKS)


def refusal(module: Any, kind: Any) -> str | None:
    """Why the forward of a layer may not be replaced by one that computes what ``kind`` does.

    Args:
        module: An instance of ``kind`` or of a subclass.
        kind: ``nn.Linear``, ``nn.Conv2d``, ...
    """
    if type(module) is not kind:
        return f"{type(module).__name__} is a subclass with a forward of its own"
    if watched(module):
        return "hooks are registered on it; remove them, then patch"
    for tensor in tensors(module):
        if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
            name = type(tensor.data if type(tensor) is nn.Parameter else tensor).__name__
            return f"its weights are of type {name}, not plain parameters"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as offloading does; undo that, then patch"
    owner = kind.forward.__globals__["__name__"]
    if owner != kind.__module__:
        return f"torch.nn.{kind.__name__}.forward was replaced by {owner}; undo that, then patch"
    return None


def tensors(module: Any) -> list[Any]:
    """Weight and bias, as far as a layer has them."""
    found = (getattr(module, name, None) for name in ("weight", "bias"))
    return [tensor for tensor in found if tensor is not None]


def bypassable(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether others may do the work of a module without anybody noticing; asked in each call.

    Args:
        module: A child of a patched module, whatever became of it since.
        kinds: The classes that it may have, or have had before it was patched.
    """
    return (
        (type(module) in kinds or original_class(module) in kinds)
        and not watched(module)
        and "forward" not in module.__dict__
        and all(type(tensor) in _TENSORS for tensor in tensors(module))
    )


def runs(op: str, tensors: Sequence[Tensor], *integers: Tensor) -> bool:
    """Whether an op may take these tensors now, instead of the model's own code.

    ``integers`` are what else it takes, of whatever dtype.

    Not if they are traced, transformed by functorch or differentiated forward, are subclasses or
    sparse, or lie where no backend of the op runs.
    """
    device = tensors[0].device
    if device.type not in ("cpu", "cuda") or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    for tensor in (*tensors, *integers):
        if type(tensor) not in _TENSORS or tensor.device != device:
            return False
        if tensor.layout is not torch.strided:
            return False
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        return False
    if dispatch.refuses(op, device) is not None:  # the model moved after it was patched
        return False
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0
