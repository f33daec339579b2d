"""What is special to the gated residual's Triton kernels."""

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.gated_residual_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}


@pytest.mark.parametrize("name", sorted(CASES.keys() - {c.name for c in SPEC.few} - {"threads"}))
def test_serves_every_case(name):
    """Those that the contract does not run on the interpreter."""
    args = CASES[name].make(torch.bfloat16, torch.device("cpu"))
    (got,) = SPEC.function(**args, backend="triton")
    (exact,), (eager,) = SPEC.reference(**args), SPEC.eager_for(args)(**args)
    assert mismatch(got, exact, eager.dtype, largest_error(eager, exact)) is None


def test_rows_that_are_not_added_to_are_moved_and_what_they_hide_is_not_read():
    bits = torch.randint(-(2**15), 2**15, (5, 70), dtype=torch.int16)  # NaNs too
    bits[1] = -(2**15)  # -0, which becomes 0 where 0 is added
    x, added = bits.view(torch.bfloat16), torch.tensor([True, False, True, True, False])
    y = torch.randn(5, 70).bfloat16().masked_fill(~added[:, None], float("nan"))
    gate = torch.linspace(-1, 1, 70)
    out = vlmops.gated_residual(x, y, gate, added, backend="triton")
    assert torch.equal(out.view(torch.int16)[~added], bits[~added])
    got, expected = (
        getattr(torch.ops.vlmops, op)(y, y, gate, added)
        for op in ("gated_residual_triton_backward", "gated_residual_backward")
    )
    assert (got[0].view(torch.int16)[~added] == 0).all()
    assert got[1].isfinite().all()
    torch.testing.assert_close(got[1], expected[1])


def test_sums_of_many_rows():
    grad, y, gate = torch.randn(520, 8), torch.randn(520, 8), torch.randn(8)
    _, got = torch.ops.vlmops.gated_residual_triton_backward(grad, y, gate)
    _, expected = torch.ops.vlmops.gated_residual_backward(grad, y, gate)
    torch.testing.assert_close(got, expected)


def test_strides_of_16_bytes_where_there_are_and_nowhere_else(monkeypatch):
    from vlmops.ops import gated_residual_triton as module

    vectors, launch = [], module._launch

    def noted(*args, **constants):
        vectors.append(constants["VEC"])
        launch(*args, **constants)

    monkeypatch.setattr(module, "_launch", noted)
    for name, vector in {"mllama": 8, "sliced": 1, "odd": 1}.items():
        vectors.clear()
        vlmops.gated_residual(
            **CASES[name].make(torch.bfloat16, torch.device("cpu")), backend="triton"
        )
        assert vectors == [vector], name


def test_no_number_of_rows_makes_a_new_compile_key():
    keys = eval(without_interpreter("import triton_aot; print(triton_aot.gated_residual_keys())"))
    assert len(keys) >= 3
    assert all(n == 1 for n in keys.values()), keys
