"""What vision towers work out from the grids of their images, made once and on the host.

Positions, windows, segments and interpolation follow from ``grid_thw`` alone. The helpers of
transformers make them picture by picture, where the grid lies: on a GPU with a value read back for
each size. Patched, a tower's forward calls them with the grid on the host, which is read once, and
the result is kept for the next pictures of the same sizes.
"""

from __future__ import annotations

import collections
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_HOME = "transformers.vision_utils"
_KEPT = 16  # results; of a long video one takes about a megabyte
_LONGEST = "_vlmops_longest"
"""An attribute of starts of segments: the length of the longest."""

_results: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
_lock = threading.Lock()
_last = threading.local()


def helpers(forward: Any) -> dict[str, Any]:
    """By which names a forward calls helpers that take a grid: what stands for them."""
    found = {}
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not isinstance(function, types.FunctionType):
            continue
        parameters = list(inspect.signature(function).parameters)
        if function.__module__ == _HOME and parameters[0] == "grid_thw" and "kwargs" in parameters:
            found[name] = _hosted(function)
    return found


def _hosted(theirs: types.FunctionType) -> Callable[..., Any]:
    """A helper that works on the host, and remembers."""

    def hosted(grid_thw: Any, *args: Any, kwargs: dict[str, Any] | None = None, **more: Any) -> Any:
        device = getattr(grid_thw, "device", None)
        given = (*args, *more.values())
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or type(grid_thw) is not Tensor
            or grid_thw.device.type not in ("cpu", "cuda")
            or not all(isinstance(value, _PLAIN) or _is_config(value) for value in given)
            or (kwargs is not None and any(name in kwargs for name in _PRECOMPUTED))
        ):
            return theirs(grid_thw, *args, kwargs=kwargs, **more)
        grid, values = _on_host(grid_thw)
        plain = tuple(value for value in given if isinstance(value, _PLAIN))
        key = theirs, values, grid.dtype, plain, tuple(more), device
        with _lock:
            result = _results.get(key)
        if result is None:
            with torch.inference_mode(False), torch.no_grad():
                result = _there(theirs(grid, *args, **more), device)
            with _lock:
                _results[key] = result
                while len(_results) > _KEPT:
                    _results.popitem(last=False)
        return result

    return hosted


_PLAIN = (int, float, str, bool, type(None))
_PRECOMPUTED = (
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
    "window_index",
    "cu_window_seqlens",
    "interp_indices",
    "interp_weights",
)


def _is_config(value: Any) -> bool:
    """It only says which implementation is selected."""
    return hasattr(value, "_attn_implementation")


def _on_host(grid: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A grid and its values; read once, however many helpers ask for it."""
    known = getattr(_last, "grid", None)
    # Tensors of inference mode have no version.
    version = None if grid.is_inference() else grid._version
    if version is None or known is None or known[0]() is not grid or known[1] != version:
        host = grid.detach().cpu()
        known = weakref.ref(grid), version, host, tuple(host.flatten().tolist())
        _last.grid = known
    return known[2], known[3]


def _there(result: Any, device: Any) -> Any:
    """On the device; starts of segments know the longest."""
    if isinstance(result, tuple):
        return tuple(_there(part, device) for part in result)
    if not isinstance(result, Tensor):
        return result
    made = result.to(device, non_blocking=True)
    if result.dtype == torch.int32 and result.dim() == 1 and len(result) > 1:
        know_longest(made, int((result[1:] - result[:-1]).max()))
    return made


def know_longest(starts: Tensor, longest: int) -> None:
    """Notes how long the longest segment is, for whoever meets ``starts`` again."""
    setattr(starts, _LONGEST, longest)


def longest_of(starts: Any) -> int | None:
    """What `know_longest` has noted, if it has."""
    if torch.compiler.is_compiling():
        return None
    longest: int | None = getattr(starts, _LONGEST, None)
    return longest
