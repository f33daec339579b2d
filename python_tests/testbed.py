"""What the tests run on: the device, Triton interpreted or not, instruction sets."""

import importlib.util
import os

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Where the contract suite runs: the CPU, or cuda (bench/gpu_check.sh).
TEST_DEVICE = os.environ.get("VLMOPS_TEST_DEVICE", "cpu")
ON_GPU = TEST_DEVICE == "cuda"
if HAS_TRITON and not ON_GPU:  # before anything imports a kernel
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

import vlmops  # noqa: E402

ISA_LEVELS = ["portable", "avx2", "avx512"]
TESTED_ISAS = ISA_LEVELS[: ISA_LEVELS.index(vlmops.cpu_isa()) + 1]

DEVICE = torch.device(TEST_DEVICE)

NOT_ON_A_GPU = {
    "cpu": "the CPU's kernels and their instruction sets",
    "emulator": "the emulated GPU: the real one is here",
    "values": "the host reads no value back, so a call is not refused for the values of a tensor",
}
"""Every rule by which the contract leaves something out on a GPU, where nothing else is."""
