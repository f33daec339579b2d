"""Builds and loads the emulator (csrc/emulator), and launches its test kernels.

`load("fast")` runs kernels as quickly as it can; `load("checked")` sees every access of theirs.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from vlmops import _library

ROOT = Path(__file__).resolve().parents[2]
# Other sources to test: broken on purpose (python_tests/mutate.py).
SOURCES = Path(os.environ.get("VLMOPS_TEST_SOURCES", ROOT / "csrc"))
BUILD = SOURCES.parent / "build" / "emulator"
MODES = ("fast", "checked")


def cuda_include():
    """Directory of CUDA's headers; PyPI's nvidia-cuda-runtime puts them under site-packages."""
    for directory in sys.path:
        include = Path(directory, "nvidia", "cu13", "include")
        if (include / "cuda_fp16.h").exists():
            return include
    raise RuntimeError("cuda_fp16.h not found: pip install -e '.[dev]' brings nvidia-cuda-runtime")


@functools.cache
def build():
    """Builds both modes: about 20 s, a second where nothing has changed."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = [
        *("cmake", "-S", SOURCES / "emulator", "-B", BUILD, "-G", "Ninja"),
        f"-DVLMOPS_CUDA_INCLUDE={cuda_include()}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["ninja", "-C", BUILD]):
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "PATH": tools},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the emulator does not build:\n{done.stdout}\n{done.stderr}")
    return BUILD


@functools.cache
def load(mode):
    """The emulator's module in one of MODES. Its file is a library of launchers as well."""
    name = f"vlmops_emulator_{mode}"
    spec = importlib.util.spec_from_file_location(name, build() / f"{name}.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.checked == (mode == "checked")
    return module


@contextlib.contextmanager
def buffers(mode, inputs=(), outputs=()):
    """Within it kernels may touch these tensors and no other memory, and may not write inputs.

    A tensor that is not contiguous counts from its first element to its last.
    """
    module = load(mode)
    module.clear_buffers()
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for i, tensor in enumerate(tensors):
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (last + 1) * tensor.element_size() if tensor.numel() else 0
            module.register_buffer(tensor.data_ptr(), size, f"{kind} {i}", kind == "input")
    try:
        yield module
    finally:
        module.clear_buffers()


@contextlib.contextmanager
def emulated(mode):
    """CPU tensors are served by vlmops' CUDA kernels on the emulated GPU."""
    module, library = load(mode), ctypes.CDLL(str(_library.path))
    library.vlmops_set_emulator.argtypes = [ctypes.c_void_p]
    library.vlmops_set_emulator(module.cuda_kernels())
    try:
        yield module
    finally:
        library.vlmops_set_emulator(None)
        module.clear_buffers()


def launch(mode, case, inputs, outputs, sizes):
    """Runs a case of csrc/emulator/{good,planted}; RuntimeError if the emulator objects."""
    with buffers(mode, inputs, outputs) as module:
        module.run_case(case, [t.data_ptr() for t in (*inputs, *outputs)], sizes)
