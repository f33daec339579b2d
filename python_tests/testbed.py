"""What the tests run on: the device, Triton interpreted or not, instruction sets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Where the contract suite runs: the CPU, or cuda (bench/gpu_check.sh).
TEST_DEVICE = os.environ.get("VLMOPS_TEST_DEVICE", "cpu")
ON_GPU = TEST_DEVICE == "cuda"
if HAS_TRITON and not ON_GPU:  # before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import vlmops  # noqa: E402

ISA_LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
_RUNNING = ISA_LEVELS[: ISA_LEVELS.index(vlmops.cpu_isa()) + 1]
# The last has kernels of its own for bfloat16 in ops whose SPEC says so, and avx512's for the rest.
TESTED_ISAS, NATIVE_BF16 = _RUNNING[:3], _RUNNING[3:]

DEVICE = torch.device(TEST_DEVICE)

NOT_ON_A_GPU = {
    "cpu": "the CPU's kernels and their instruction sets",
    "emulator": "the emulated GPU: the real one is here",
    "values": "the host reads no value back, so a call is not refused for the values of a tensor",
}
"""Every rule by which the contract leaves something out on a GPU, where nothing else is."""

reads_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc"
)


def _peak_rss():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def extra_memory(function):
    """Growth of the peak resident size, and the largest single allocation, while function runs."""
    function()  # threads and libraries have theirs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_rss()
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = function()
    grown = _peak_rss() - before
    del result
    events = profile.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return grown, max(sizes, default=0)


def without_interpreter(script):
    """stdout of a Python process in which Triton compiles for GPUs."""
    kept = {n: os.environ[n] for n in ("VLMOPS_LIBRARY",) if n in os.environ}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            **kept,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout
