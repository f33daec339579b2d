"""What is special to pixel shuffle's Triton kernels."""

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.pixel_shuffle import reference
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


@pytest.mark.parametrize("order", ["yxc", "cyx"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_out_is_written_and_nothing_else(norm, order):
    x, memory = torch.randn(2, 16, 40), torch.full((2, 6, 170), 7.0)
    options = {"order": order, "norm": norm, "norm_axis": "channel"}
    out = memory[:, 1:-1, 4:-6]
    vlmops.pixel_shuffle(x, out=out, backend="triton", **options)
    torch.testing.assert_close(out, vlmops.pixel_shuffle(x, **options), rtol=1e-5, atol=1e-5)
    out.fill_(7.0)
    assert (memory == 7.0).all()


def test_programs_that_take_many_rows(monkeypatch):
    from vlmops.ops import pixel_shuffle_triton

    monkeypatch.setattr(pixel_shuffle_triton, "_BACKWARD_PROGRAMS", 3)
    leaves = [torch.randn(n, requires_grad=True) for n in ((2, 16, 8), (32,), (32,))]

    def grads(function, inputs, **options):
        x, weight, bias = inputs
        y = function(x, norm="layer", norm_weight=weight, norm_bias=bias, **options)
        return torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1).sin())

    found = grads(vlmops.pixel_shuffle, leaves, backend="triton")
    exact = grads(reference, [t.detach().double().requires_grad_() for t in leaves])
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_refuses_rows_that_no_program_holds():
    x = torch.zeros(1, 4, 4104)
    assert vlmops.pixel_shuffle(x, backend="triton").shape == (1, 1, 16416)
    with pytest.raises(RuntimeError, match=r"norm: expected at most 16384 channels.*got 16416"):
        vlmops.pixel_shuffle(x, norm="layer", backend="triton")


def test_no_size_of_a_batch_makes_a_new_compile_key():
    keys = eval(without_interpreter("import triton_aot; print(triton_aot.pixel_shuffle_keys())"))
    assert len(keys) >= 4
    assert all(n == 1 for n in keys.values()), keys
