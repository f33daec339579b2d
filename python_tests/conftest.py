"""Uninitialised memory is NaN in every test: an output that is not written in full shows."""

import pytest
import torch

import vlmops

ISA_LEVELS = ["portable", "avx2", "avx512"]
TESTED_ISAS = ISA_LEVELS[: ISA_LEVELS.index(vlmops.cpu_isa()) + 1]


def pytest_report_header():
    missing = [isa for isa in ISA_LEVELS if isa not in TESTED_ISAS]
    tested = f"vlmops: instruction sets tested: {', '.join(TESTED_ISAS)}"
    return tested + (f"; not on this machine: {', '.join(missing)}" if missing else "")


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
