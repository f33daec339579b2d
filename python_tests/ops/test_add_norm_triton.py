"""What is special to the Triton kernels of the norm behind a sum."""

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.add_norm_spec import SPEC
from vlmops.ops.compare import largest_error, mismatch

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}


@pytest.mark.parametrize("name", sorted(CASES.keys() - {c.name for c in SPEC.few} - {"threads"}))
def test_serves_every_case(name):
    """Those that the contract does not run on the interpreter."""
    args = CASES[name].make(torch.bfloat16, torch.device("cpu"))
    got, exact = SPEC.function(**args, backend="triton"), SPEC.reference(**args)
    eager = SPEC.eager_for(args)(**args)
    for g, x, e in zip(got, exact, eager, strict=True):
        assert mismatch(g, x, e.dtype, largest_error(e, x)) is None


def test_sums_of_many_rows():
    grad, total, more = torch.randn(3, 70, 100)
    vectors = torch.randn(3, 100)
    got, expected = (
        getattr(torch.ops.vlmops, op)(
            grad, total, *vectors, more, 1e-5, False, True, True, True, True
        )
        for op in ("add_norm_triton_backward", "add_norm_backward")
    )
    torch.testing.assert_close(got, expected)


def test_the_sum_is_normed_before_it_is_rounded():
    x, residual = torch.randn(2, 5, 200)
    x, residual = (40 * x).bfloat16(), residual.bfloat16()
    out, total = vlmops.add_norm(x, residual, return_sum=True, backend="triton")
    exact = x.float() + residual.float()
    assert torch.equal(total, exact.bfloat16())
    exact, rounded = (
        torch.nn.functional.layer_norm(s.float(), (200,)).bfloat16() for s in (exact, total)
    )
    assert (out == exact).float().mean() > 0.98
    assert (out == rounded).float().mean() < 0.95


def test_strides_of_16_bytes_where_there_are_and_nowhere_else(monkeypatch):
    from vlmops.ops import add_norm_triton as module

    vectors, launch = [], module._launch

    def noted(*args, **constants):
        vectors.append(constants["VEC"])
        launch(*args, **constants)

    monkeypatch.setattr(module, "_launch", noted)
    wider = torch.randn(2, 4, 43).bfloat16()
    for x, vector in ((wider[..., :40], 1), (wider[..., :40].contiguous(), 8), (wider, 1)):
        vectors.clear()
        vlmops.add_norm(x, backend="triton")
        assert vectors == [vector]


def test_refuses_rows_that_no_program_holds():
    with pytest.raises(RuntimeError, match=r"x: expected at most 32768 channels, .* got 32769"):
        vlmops.add_norm(torch.randn(1, 32769), backend="triton")


def test_no_number_of_rows_makes_a_new_compile_key():
    keys = eval(without_interpreter("import triton_aot; print(triton_aot.add_norm_keys())"))
    assert len(keys) >= 3
    assert all(n == 1 for n in keys.values()), keys
