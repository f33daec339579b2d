"""Uninitialised memory is NaN in every test: an output that is not written in full shows.

Triton runs in its interpreter, if it is installed. VLMOPS_TEST_DEVICE=cuda runs the contract on a
GPU, where Triton compiles.
"""

import os

import pytest
import torch
from testbed import (
    HAS_TRITON,
    ISA_LEVELS,
    NATIVE_BF16,
    NOT_ON_A_GPU,
    ON_GPU,
    TEST_DEVICE,
    TESTED_ISAS,
)

import vlmops

if TEST_DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"VLMOPS_TEST_DEVICE: expected cpu or cuda, got {TEST_DEVICE!r}")

if ON_GPU:  # errors are judged by what torch computes in float32
    torch.backends.cudnn.allow_tf32 = False

if HAS_TRITON and not ON_GPU:
    import triton_interpreter

    triton_interpreter.mend()


def pytest_report_header():
    if ON_GPU:
        left_out = "; ".join(f"{rule}: {why}" for rule, why in NOT_ON_A_GPU.items())
        return [f"vlmops: device cuda, every case; left out: {left_out}"]
    found = TESTED_ISAS + NATIVE_BF16
    missing = [isa for isa in ISA_LEVELS if isa not in found]
    tested = f"vlmops: instruction sets tested: {', '.join(found)}"
    tested += f"; not on this machine: {', '.join(missing)}" if missing else ""
    few = "every case" if os.environ.get("VLMOPS_ALL_CASES") == "1" else "few and tiny cases"
    how = f"interpreted, {few}" if HAS_TRITON else "not installed, its tests are left out"
    return [tested, f"vlmops: triton: {how}"]


class _Told:
    """On a GPU a crash or a time limit may come before the summary: failures are told at once."""

    def __init__(self, config):
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report):
        terminal = self.plugins.get_plugin("terminalreporter")  # a worker of xdist has none
        if report.failed and terminal is not None:
            terminal.write(f"\n{report.nodeid}\n{report.longreprtext}\n", flush=True)


def pytest_configure(config):
    if ON_GPU:
        config.pluginmanager.register(_Told(config))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # Reaches what C++ allocates through torch as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def use_cpu_isa():
    """Call with a name of TESTED_ISAS or NATIVE_BF16; what was in force returns after the test."""

    def use(isa):
        assert torch.ops.vlmops.set_cpu_isa(isa) == isa

    previous = vlmops.cpu_isa()
    yield use
    use(previous)
