"""Loads the compiled library, and keeps the reason where it does not load.

``libvlmops`` holds schemas, checks and CPU kernels of every op. It is bound to torch's stable ABI,
so one build serves every torch from 2.11 and every CPython.
"""

from __future__ import annotations

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


path: Path | None
error: str | None
path, error = _load()


def require() -> None:
    """Raises ImportError with the reason and the remedy if the library is not loaded."""
    if error is not None:
        raise ImportError(f"vlmops: {error}")


def cpu_isa() -> str:
    """The CPU instruction set in force: ``"portable"``, ``"avx2"`` or ``"avx512"``.

    The best that the machine runs, capped by the environment variable ``VLMOPS_CPU_ISA``.

    Raises:
        ImportError: the compiled library is not loaded.
        RuntimeError: ``VLMOPS_CPU_ISA`` names no instruction set.
    """
    require()
    return str(torch.ops.vlmops.cpu_isa())
