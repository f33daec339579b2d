"""Whether a tensor may be written in place: nobody but the caller can see it change.

Asking for forward hooks would miss whoever else kept a tensor: a module that hands out its own
buffer, a dispatch mode, an autograd graph. So everything that can keep x's memory alive is counted:
users of the storage and of its Python handle, of x, and of the tensor that x is a view of. The
counts are compared with those of tensors that are known to be fresh, taken by the same calls from
the running torch and Python. Any other count, higher or lower, means no.

Known to be fresh are what a projection returned, seen through views, and a third of what a fused
projection returned while the other two are alive. The latter cannot tell q's own other view from
v; a model whose attention keeps one differs when it is rehearsed (`vlmops.hf.rehearsal`), which
runs in place.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def may_overwrite(x: Tensor) -> bool:
    """Whether x, a local variable of the caller's caller, can be written in place unseen.

    False under torch.compile, functorch and forward-mode differentiation, for tensors that require
    grad in grad mode, for subclasses of Tensor, and for memory that torch does not own.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return _users(x) in _of_fresh_views(x.is_inference())


def _users(x: Tensor) -> tuple[Any, ...]:
    storage, base = x.untyped_storage(), x._base
    return (
        storage.resizable(),  # False for NumPy's memory, DLPack's, ..
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        x._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(x),
        None if base is None else base._use_count(),  # type: ignore[attr-defined]
        None if base is None else sys.getrefcount(base),
    )


@functools.cache
def _of_fresh_views(inference: bool) -> tuple[tuple[Any, ...], ...]:
    """Counts of what a projection returned, and of a third of it, held by one variable each."""

    def may_overwrite(x: Tensor) -> tuple[Any, ...]:
        return _users(x)

    def apply(q: Tensor) -> tuple[Any, ...]:
        return may_overwrite(q)

    with _disable_current_modes(), torch.inference_mode(inference):
        query = torch.zeros(2, device="cpu").view(2, 1).transpose(0, 1)
        alone = apply(query)
        # Three names that are not used, as in an attention layer's forward.
        query, _key, _value = torch.zeros(3, device="cpu").view(1, 3).permute(1, 0).unbind(0)
        return alone, apply(query)
