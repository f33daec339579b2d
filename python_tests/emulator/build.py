"""Builds and loads the emulator (csrc/emulator): `load("fast")`, `load("checked")`."""

import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from vlmops import _library

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
MODES = ("fast", "checked")


def cuda_include():
    """Directory of CUDA's headers; PyPI's nvidia-cuda-runtime puts them under site-packages."""
    purelib = Path(sysconfig.get_path("purelib"))
    for directory in [purelib, *map(Path, sys.path)]:
        include = directory / "nvidia" / "cu13" / "include"
        if (include / "cuda_fp16.h").exists():
            return include
    raise RuntimeError("cuda_fp16.h not found: pip install -e '.[dev]' brings nvidia-cuda-runtime")


@functools.cache
def build():
    """Builds both modes; a second of work where nothing has changed."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = [
        *("cmake", "-S", ROOT / "csrc" / "emulator", "-B", BUILD, "-G", "Ninja"),
        f"-DVLMOPS_CUDA_INCLUDE={cuda_include()}",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["ninja", "-C", BUILD]):
        done = subprocess.run(
            list(map(str, command)), env={**os.environ, "PATH": tools}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"the emulator does not build:\n{done.stdout}\n{done.stderr}")
    return BUILD


@functools.cache
def load(mode):
    """The emulator's module in one of MODES."""
    name = f"vlmops_emulator_{mode}"
    spec = importlib.util.spec_from_file_location(name, build() / f"{name}.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.checked == (mode == "checked")
    return module


def launch(mode, case, inputs, outputs, sizes):
    """Runs a case of csrc/emulator on tensors; kernels may touch nothing else, nor write inputs."""
    module = load(mode)
    module.clear_buffers()
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for i, tensor in enumerate(tensors):
            assert tensor.is_contiguous()
            name = f"{kind} {i}"
            module.register_buffer(tensor.data_ptr(), tensor.nbytes, name, read_only=kind == "input")
    try:
        module.run_case(case, [t.data_ptr() for t in [*inputs, *outputs]], sizes)
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
