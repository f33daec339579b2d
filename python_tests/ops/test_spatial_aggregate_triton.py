"""What is special to the spatial aggregation's Triton kernels."""

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.spatial_aggregate_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(CASES.keys() - {c.name for c in SPEC.few} - {"threads"}))
def test_serves_every_case(name):
    """Those that the contract does not run on the interpreter."""
    args = CASES[name].make(torch.bfloat16, CPU)
    (got,) = SPEC.function(**args, backend="triton")
    (exact,), (eager,) = SPEC.reference(**args), SPEC.eager_for(args)(**args)
    assert mismatch(got, exact, eager.dtype, largest_error(eager, exact)) is None


def drawn(*windows):
    """q, an upstream gradient, keys and values on one row of two queries."""
    q, grad = torch.randn(2, 1, 1, 2, 2, 8)
    maps = [torch.randn(2, 1, h, 2 * w, 2, 8) for h, w in windows]
    return q, grad, *(list(of) for of in zip(*maps, strict=True))


def test_tokens_that_do_not_exist_are_not_read():
    q, grad, keys, values = drawn((1, 1), (2, 2))
    masks = [torch.tensor([[[False, True]]]), torch.rand(1, 2, 4) < 0.5]
    masks[1][:, :, :2] = False  # all of the first query's
    poisoned = [
        [x.masked_fill(~m[..., None, None], float("nan")) for x, m in zip(of, masks, strict=True)]
        for of in (keys, values)
    ]
    out = vlmops.spatial_aggregate(q, *poisoned, masks=masks, backend="triton")
    torch.testing.assert_close(out, vlmops.spatial_aggregate(q, keys, values, masks=masks))
    got, expected = (
        getattr(torch.ops.vlmops, op)(grad, [1] * 5, q, *maps, masks)
        for op, maps in (
            ("spatial_aggregate_triton_backward", poisoned),
            ("spatial_aggregate_backward", (keys, values)),
        )
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert (out[:, :, 0] == 0).all()


@pytest.mark.parametrize("wanted", range(5))
def test_computes_what_is_needed(wanted):
    q, grad, keys, values = drawn((1, 1), (5, 5))  # two blocks of tokens
    needs = [int(i == wanted) for i in range(5)]
    got = torch.ops.vlmops.spatial_aggregate_triton_backward(grad, needs, q, keys, values, [])
    expected = torch.ops.vlmops.spatial_aggregate_backward(grad, [1] * 5, q, keys, values, [])
    torch.testing.assert_close(got[wanted], expected[wanted])
    assert [len(g) for g in got] == needs


def test_refuses_more_encoders_than_it_takes():
    q, grad, keys, values = drawn(*[(1, 1)] * 5)
    with pytest.raises(RuntimeError, match=r"'triton': keys: expected maps of at most 4 .*got 5"):
        vlmops.spatial_aggregate(q, keys, values, backend="triton")
    with pytest.raises(RuntimeError, match=r"'triton': keys: expected maps of at most 4 .*got 5"):
        torch.ops.vlmops.spatial_aggregate_triton_backward(grad, [1] * 11, q, keys, values, [])


def test_strides_of_16_bytes_where_there_are_and_copies_of_what_is_not_in_a_row(monkeypatch):
    from vlmops.ops import spatial_aggregate_triton as module

    seen, launch = [], module._launch

    def noted(*args, **constants):
        seen.append((constants["VEC"], args))
        launch(*args, **constants)

    monkeypatch.setattr(module, "_launch", noted)
    for name, copied in {"fused": False, "sliced": True, "padded": False}.items():
        args = CASES[name].make(torch.bfloat16, CPU)
        SPEC.function(**args, backend="triton")
        vector, given = seen.pop()
        assert vector == 8, name
        pointers = {t.data_ptr() for t in given if isinstance(t, torch.Tensor)}
        assert (args["key_1"].data_ptr() not in pointers) == copied, name


def test_no_batch_grid_or_number_of_heads_makes_a_new_compile_key():
    keys = eval(without_interpreter(
        "import triton_aot; print(triton_aot.spatial_aggregate_keys())"
    ))  # fmt: skip
    assert len(keys) >= 3
    assert all(n == 1 for n in keys.values()), keys
