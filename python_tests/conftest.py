"""Uninitialised memory is NaN in every test: an output that is not written in full shows.

Triton runs in its interpreter, if it is installed. VLMOPS_TEST_DEVICE=cuda runs the contract on a
GPU, where Triton compiles.
"""

import importlib.util
import os

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Where the contract suite runs: the CPU, or cuda (bench/gpu_check.sh).
TEST_DEVICE = os.environ.get("VLMOPS_TEST_DEVICE", "cpu")
ON_GPU = TEST_DEVICE == "cuda"
if HAS_TRITON and not ON_GPU:  # before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import vlmops  # noqa: E402

if TEST_DEVICE not in ("cpu", "cuda"):
    raise pytest.UsageError(f"VLMOPS_TEST_DEVICE: expected cpu or cuda, got {TEST_DEVICE!r}")

if HAS_TRITON and not ON_GPU:
    import triton_interpreter

    triton_interpreter.mend()

ISA_LEVELS = ["portable", "avx2", "avx512"]
TESTED_ISAS = ISA_LEVELS[: ISA_LEVELS.index(vlmops.cpu_isa()) + 1]

DEVICE = torch.device(TEST_DEVICE)

NOT_ON_A_GPU = {
    "cpu": "the CPU's kernels and their instruction sets",
    "emulator": "the emulated GPU: the real one is here",
    "values": "the host reads no value back, so a call is not refused for the values of a tensor",
}
"""Every rule by which the contract leaves something out on a GPU, where nothing else is."""


def pytest_report_header():
    if ON_GPU:
        left_out = "; ".join(f"{rule}: {why}" for rule, why in NOT_ON_A_GPU.items())
        return [f"vlmops: device cuda, every case; left out: {left_out}"]
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
