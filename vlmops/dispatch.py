"""Which kernels an op runs on: asked for, or by default.

A call's ``backend=`` comes first, then ``with vlmops.backend(name):``, then the environment
variable ``VLMOPS_BACKEND`` (read when vlmops is imported), then the default of the op on the
device. What was asked for by name and cannot run is an error, never something else.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import os
from types import TracebackType
from typing import NamedTuple

import torch

from vlmops import _library

BACKENDS = ("cpu", "cuda", "triton", "reference")

asked: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "vlmops.backend", default=os.environ.get("VLMOPS_BACKEND") or None
)


class _Traced:
    """What `asked` says, where Dynamo can see and guard it: it traces no ContextVar.

    One for the process: under torch.compile threads that ask for different backends at one time
    get either. threading.local would be traced, but its values are neither seen nor guarded.
    """

    def __init__(self) -> None:
        self.backend = asked.get()


traced = _Traced()


class backend:  # noqa: N801
    """Runs the ops within on one backend: ``with vlmops.backend("triton"):``.

    A derivative runs on the backend that its forward ran on. Of a thread or an asyncio task in
    eager code, of the process under `torch.compile`, which compiles once for each backend.

    Args:
        name: ``"cpu"`` and ``"cuda"`` (compiled C++ and CUDA), ``"triton"``, or ``"reference"``
            (plain torch in float64, slow).

    Raises:
        ValueError: there is no such backend.

    Example:
        >>> with vlmops.backend("reference"):
        ...     q_rotated, k_rotated = vlmops.mrope(q, k, position_ids, inv_freq, freq_axis)
    """

    def __init__(self, name: str) -> None:
        self.name = _known(name, "backend")
        self._token: contextvars.Token[str | None] | None = None
        self._traced: str | None = None

    def __enter__(self) -> None:
        self._traced = traced.backend
        traced.backend = self.name
        if not torch.compiler.is_compiling():
            self._token = asked.set(self.name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        traced.backend = self._traced
        if not torch.compiler.is_compiling() and self._token is not None:
            asked.reset(self._token)


class Default(NamedTuple):
    """The backend that an op runs on if none is asked for."""

    backend: str
    measured: bool
    """False: a guess, since no measurement of this device is committed."""
    why: str


_MEASURED = {
    "mrope": "on an H200 within 3 us of Triton's kernels or quicker, in a norm's backward by 27 to "
    "60 %, and a call costs 90 us less: bench/results/h200",
    "patch_embed": "on an H200 0.6 to 0.9 of the time of Triton's kernel from 2 million elements "
    "of the result on, and up to twice it for single small images: bench/results/h200",
}
"""Ops whose CUDA and Triton kernels were timed against each other, and what came of it."""


def default(op: str, device: str | torch.device) -> Default:
    """The default backend of ``op`` on a type of device.

    Raises:
        RuntimeError: nothing can run there; the message says why, and what to do.
    """
    device_type = torch.device(device).type
    if device_type != "cuda":
        return Default("cpu", True, "the only compiled kernels; bench/results/")
    refused = {}
    for name in ("cuda", "triton"):
        reason = unavailable(op, name, device_type)
        if reason is None and name == "cuda" and op in _MEASURED:
            return Default(name, True, _MEASURED[op])
        if reason is None:
            return Default(name, False, f"a guess: {op} has not been measured on a GPU so")
        refused[name] = reason
    raise RuntimeError(
        f"vlmops.{op}: no backend for tensors on {device_type}: "
        + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    )


def refuses(op: str, device: torch.device) -> str | None:
    """Why ``op`` runs on no backend there and what to do, or None if it does: in models, that is.

    Models on meta have no numbers yet, and may go anywhere.
    """
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"no kernel for {device.type}: move the model to the CPU or to a CUDA device"
    try:
        default(op, device)
    except RuntimeError as error:
        return str(error)
    return None


# Of strings, and the same for the life of the process.
@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable(op: str, name: str, device_type: str) -> str | None:
    """Why a backend cannot run ``op`` on a type of device and what to do, or None if it can."""
    if device_type == "meta" or name == "reference":
        return None
    if name in ("cpu", "cuda"):
        if device_type != name:
            return f"expected tensors on {name}, got {device_type}; move them, or ask for none"
        if name == "cpu":
            return None
        return _cuda_refuses()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run 'pip install triton', or ask for no backend"
    if importlib.util.find_spec(f"vlmops.ops.{op}_triton") is None:
        return f"{op} has no Triton kernel; ask for no backend"
    if device_type == "cpu":
        module = importlib.import_module(f"vlmops.ops.{op}_triton")
        if not module.INTERPRETED:
            return (
                "expected tensors on a GPU, since Triton compiles for GPUs, got cpu; use "
                "backend='cpu', or start Python with TRITON_INTERPRET=1 to debug the kernel"
            )
    elif device_type != "cuda":
        return f"expected tensors on cuda, got {device_type}; move them, or ask for no backend"
    return None


@functools.cache
def _cuda_refuses() -> str | None:
    # Not when vlmops is imported: asking for the capability starts CUDA, and breaks later forks.
    return _library.cuda_error or _library.cuda_refuses(torch.cuda.get_device_capability())


def choose(op: str, name: str | None, device_type: str) -> str:
    """The backend of a call. ``name`` is its argument.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: what was asked for cannot run.
    """
    if name is not None:
        source = "backend"
    else:
        name = traced.backend if torch.compiler.is_compiling() else asked.get()
        source = "vlmops.backend(..) or VLMOPS_BACKEND"
    if name is None:
        return default(op, device_type).backend
    _known(name, source)
    reason = unavailable(op, name, device_type)
    if reason is not None:
        raise RuntimeError(f"vlmops.{op}: backend {name!r}, asked for by {source}: {reason}")
    return name


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name
