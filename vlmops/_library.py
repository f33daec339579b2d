"""Loads the compiled library, and keeps the reason where it does not load.

``libvlmops`` holds schemas, checks and CPU kernels of every op. It is bound to torch's stable ABI,
so one build serves every torch from 2.11 and every CPython. ``libvlmops_cuda`` holds the CUDA
kernels and knows no torch; it is loaded where torch has CUDA, and hands ``libvlmops`` its table of
launchers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from pathlib import Path

import torch

import vlmops

_NAME = "libvlmops.so"


def _candidates() -> list[Path]:
    if os.environ.get("VLMOPS_LIBRARY"):  # a build to test: sanitized, broken on purpose
        return [Path(os.environ["VLMOPS_LIBRARY"])]
    # Beside the Python files, or, in an editable install, where the build was put.
    found = [Path(root) / _NAME for root in vlmops.__path__]
    try:
        files = importlib.metadata.files("vlmops") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return found + [Path(str(f.locate())) for f in files if f.name == _NAME]


def _load() -> tuple[Path | None, str | None]:
    for path in _candidates():
        if path.exists():
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                return None, (
                    f"{path} does not load into torch {torch.__version__}: {error}. "
                    "vlmops needs torch 2.11 or later; reinstall with: "
                    "pip install --force-reinstall --no-deps vlmops"
                )
            return path, None
    return None, (
        f"no compiled library at {' or '.join(map(str, _candidates()))}: this looks like a source "
        "tree that was not built. Run 'pip install .' in it (in a checkout: 'make setup')"
    )


def _load_cuda() -> tuple[str, str | None]:
    """Hands `libvlmops` the CUDA kernels: their architectures, and why there are none, if so."""
    if path is None:
        return "", error
    library = ctypes.CDLL(str(path))
    library.vlmops_set_cuda.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    cuda = path.with_name("libvlmops_cuda.so")
    table, stream, reason, architectures = None, None, None, ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build for CPUs"
    elif not cuda.exists():
        reason = (
            f"vlmops was built without CUDA ({cuda} is not there): install it beside this torch "
            "with nvcc on PATH, and -C cmake.define.VLMOPS_CUDA=ON to be told what is missing"
        )
    else:
        try:
            half = ctypes.CDLL(str(cuda))
            half.vlmops_cuda_kernels.restype = ctypes.c_void_p
            half.vlmops_cuda_architectures.restype = ctypes.c_char_p
            architectures = half.vlmops_cuda_architectures().decode()
            torch_cuda = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
            stream = ctypes.cast(torch_cuda.aoti_torch_get_current_cuda_stream, ctypes.c_void_p)
            table = half.vlmops_cuda_kernels()
        except (OSError, AttributeError) as failed:
            reason = f"{cuda} does not load beside torch {torch.__version__}: {failed}"
    library.vlmops_set_cuda(table, stream, (reason or "").encode())
    return architectures, reason


path: Path | None
error: str | None
path, error = _load()
cuda_architectures: str
"""What the CUDA kernels are built for, as CMake has it: ``"80-real 90-real 120"``."""
cuda_error: str | None
"""Why there are no CUDA kernels; None if they are loaded."""
cuda_architectures, cuda_error = _load_cuda()


def cuda_refuses(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on a GPU of that compute capability; None if they do.

    Machine code runs on later GPUs of the same generation; PTX, which an entry without ``-real``
    contains, on all later ones; code for an ``a`` architecture on that one alone.
    """
    if cuda_error is not None:
        return cuda_error
    major, minor = capability
    gpu = 10 * major + minor
    for entry in cuda_architectures.split():
        number, _, kind = entry.partition("-")
        own = number[-1].isalpha()
        built = int(number.rstrip("af"))
        if built == gpu or (not own and built < gpu and (kind != "real" or built // 10 == major)):
            return None
    entries = [entry.partition("-") for entry in cuda_architectures.split()]
    contains = ", ".join(f"sm_{n}" + (" with PTX" if k != "real" else "") for n, _, k in entries)
    return (
        f"the GPU is an sm_{gpu}, and this build of vlmops has kernels for {contains}; install "
        f"from source with -C cmake.define.VLMOPS_CUDA_ARCHITECTURES={gpu}, or use "
        "backend='triton'"
    )


def require() -> None:
    """Raises ImportError with the reason and the remedy if the library is not loaded."""
    if error is not None:
        raise ImportError(f"vlmops: {error}")


def cpu_isa() -> str:
    """The CPU instruction set in force.

    ``"portable"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"``, with which attention multiplies
    bfloat16 as it is: the best that the machine runs, capped by the environment variable
    ``VLMOPS_CPU_ISA``.

    Raises:
        ImportError: the compiled library is not loaded.
        RuntimeError: ``VLMOPS_CPU_ISA`` names no instruction set.
    """
    require()
    return str(torch.ops.vlmops.cpu_isa())
