"""What is special to pixel shuffle's Triton kernels."""

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.pixel_shuffle_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


@pytest.mark.parametrize("order", ["yxc", "cyx"])
@pytest.mark.parametrize("channels", [40, 7])
def test_moves_bits(order, channels):
    """NaNs with any payload among them."""
    bits = torch.randint(-(2**15), 2**15, (2, 16, channels), dtype=torch.int16)
    x = bits.view(torch.bfloat16)
    got, expected = (
        vlmops.pixel_shuffle(x, order=order, backend=b).view(torch.int16) for b in ("triton", "cpu")
    )
    assert torch.equal(got, expected)


def test_backward_of_vectors_alone():
    """Nothing is computed for tokens that are frozen."""
    args = next(c for c in SPEC.cases if c.name == "internvl").make(
        torch.float32, torch.device("cpu")
    )
    names = ("norm_weight", "norm_bias")
    leaves = [args[name].requires_grad_() for name in names]
    found = []
    for backend in ("triton", "cpu"):
        out = vlmops.pixel_shuffle(**{**args, "backend": backend})
        found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_size_of_a_batch_makes_a_new_compile_key():
    keys = eval(without_interpreter("import triton_aot; print(triton_aot.pixel_shuffle_keys())"))
    assert len(keys) >= 4
    assert all(n == 1 for n in keys.values()), keys
