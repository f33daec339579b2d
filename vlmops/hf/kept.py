"""Keys and values of images, kept while a text is generated about them.

Models that keep no cache for cross-attention (Idefics) project the same visual tokens in each step.
Patched, a projection returns what it returned in the step before if it is given the same tokens:
the same memory, not written to since. So whatever reorders, repeats or replaces them (beam search,
another batch) leads to a projection of its own. The first step of each generation computes, and
what was kept goes with the tokens that it was made of.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import plain
from vlmops.hf.rebind import subclass

_steps: contextvars.ContextVar[bool | None] = contextvars.ContextVar("vlmops_steps", default=None)
"""Whether a text is generated: False in its first step, True in those after it."""


@contextlib.contextmanager
def step_of(cache: Any) -> Iterator[None]:
    """One forward of a decoder, for the length of a ``with`` block.

    Args:
        cache: Its past keys and values, or None.
    """
    token = _steps.set(None if cache is None else cache.get_seq_length() > 0)
    try:
        yield
    finally:
        _steps.reset(token)


@dataclasses.dataclass(frozen=True)
class _Kept:
    given: Hashable
    storage: weakref.ref[Any]
    out: Tensor


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def keeping_class(
    module: nn.Module, compute: Callable[[Any, Tensor], Tensor] | None = None
) -> type[nn.Module]:
    """The class of a module that returns again what it returned for the same tensor.

    Args:
        module: A linear layer or a norm: what it returns depends on its weights and one tensor.
        compute: ``compute(self, x)`` in place of its forward; None: its forward.
    """
    original: Any = type(module)
    compute = compute or original.forward

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, x: Tensor) -> Tensor:
            continues = None if torch.compiler.is_compiling() else _steps.get()
            if continues is None or not _keeps(self, x):
                return compute(self, x)
            given = _identity(self, x)
            kept = _kept.get(self) if continues else None
            if kept is not None and kept.given == given:
                return kept.out
            out = compute(self, x)
            _kept[self] = _Kept(given, weakref.ref(x.untyped_storage(), _forgetting(self)), out)
            return out

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("gated_cross_attention", "kept", compute), make_forward)


def _keeps(module: Any, x: Tensor) -> bool:
    """Whether nobody can tell a result from one that was kept."""
    weights = plain.tensors(module)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return False
    return not plain.watched(module) and plain.runs("gated_cross_attention", (x, *weights))


def _identity(module: Any, x: Tensor) -> Hashable:
    """What a result depends on, but for the numbers; those of inference mode have no version.

    Nothing else can lie where x does before what was made of x has been forgotten.
    """
    tensors = (x, *plain.tensors(module))
    versions = [None if t.is_inference() else t._version for t in tensors]
    places = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return *places, *versions, autocast


def _forgetting(module: nn.Module) -> Callable[[weakref.ref[Any]], None]:
    """What forgets a result once the memory is gone that it was made of."""
    of = weakref.ref(module)

    def forget(storage: weakref.ref[Any]) -> None:
        alive = of()
        if alive is not None and alive in _kept and _kept[alive].storage is storage:
            del _kept[alive]

    return forget
