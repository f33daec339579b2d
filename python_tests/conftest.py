"""Uninitialised memory is NaN in every test: an output that is not written in full shows.

Triton runs in its interpreter, if it is installed.
"""

import importlib.util
import os

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:  # before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import vlmops  # noqa: E402

if HAS_TRITON:
    import triton_interpreter

    triton_interpreter.mend()

ISA_LEVELS = ["portable", "avx2", "avx512"]
TESTED_ISAS = ISA_LEVELS[: ISA_LEVELS.index(vlmops.cpu_isa()) + 1]


def pytest_report_header():
    missing = [isa for isa in ISA_LEVELS if isa not in TESTED_ISAS]
    tested = f"vlmops: instruction sets tested: {', '.join(TESTED_ISAS)}"
    tested += f"; not on this machine: {', '.join(missing)}" if missing else ""
    few = "every case" if os.environ.get("VLMOPS_ALL_CASES") == "1" else "few and tiny cases"
    how = f"interpreted, {few}" if HAS_TRITON else "not installed, its tests are left out"
    return [tested, f"vlmops: triton: {how}"]


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
    """Call with a name of TESTED_ISAS; the level that was in force returns after the test."""

    def use(isa):
        assert torch.ops.vlmops.set_cpu_isa(isa) == isa

    previous = vlmops.cpu_isa()
    yield use
    use(previous)
