"""What is special to the HD transform's Triton kernel."""

from pathlib import Path

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.hd_transform_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}
CPU = torch.device("cpu")
HERE = Path(__file__).parent.parent
# Interpreted tokens take a hundredth of a second each: the large ones are for a GPU.
LEFT = set(CASES) - {c.name for c in SPEC.few} - {"threads", "threads_mean", "many", "many_glb_sub"}


def triton_module():
    from vlmops.ops import hd_transform_triton

    return hd_transform_triton


@pytest.mark.parametrize("name", sorted(LEFT))
def test_serves_every_case(name):
    """Those that the contract does not run on the interpreter."""
    args = CASES[name].make(torch.bfloat16, CPU)
    (got,) = SPEC.function(**args, backend="triton")
    (exact,), (eager,) = SPEC.reference(**args), SPEC.eager_for(args)(**args)
    assert mismatch(got, exact, eager.dtype, largest_error(eager, exact)) is None


def test_strides_of_16_bytes_where_there_are_and_nowhere_else(monkeypatch):
    module, vectors = triton_module(), []
    launch = module._launch

    def noted(*args, **constants):
        vectors.append(constants["VEC"])
        launch(*args, **constants)

    monkeypatch.setattr(module, "_launch", noted)
    expected = {"phi3_5": 8, "phi3_padded": 8, "sliced": 1, "transposed": 1, "factor_3": 1}
    for name, vector in expected.items():
        vectors.clear()
        args = CASES[name].make(torch.bfloat16, CPU)
        vlmops.hd_transform(**args, backend="triton")
        assert set(vectors) == {vector}, name
        assert len(vectors) == 2 * len(args["crop_grids"])


def test_moves_nans_as_they_are():
    args = CASES["phi3_5"].make(torch.bfloat16, CPU)
    bits = torch.randint(-(2**15), 2**15, args["image_features"].shape, dtype=torch.int16)
    args["image_features"] = bits.view(torch.bfloat16)
    got, expected = (vlmops.hd_transform(**args, backend=b) for b in ("triton", "cpu"))
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_backward_refuses_a_gradient_of_another_shape():
    args = CASES["phi3_5"].make(torch.float32, CPU)
    given = SPEC.schema_arguments(args)
    grad = torch.zeros(3, 96)
    with pytest.raises(RuntimeError, match=r"backend 'triton': grad: expected \[36, 96\] of"):
        torch.ops.vlmops.hd_transform_triton_backward(grad, *given)


def test_no_size_of_a_picture_makes_a_new_compile_key():
    keys = eval(without_interpreter("import triton_aot; print(triton_aot.hd_transform_keys())"))
    assert len(keys) >= 4
    assert all(n == 1 for n in keys.values()), keys


def test_without_a_gpu_or_the_interpreter_it_says_what_to_do():
    out = without_interpreter(
        "import torch, vlmops\n"
        "x, row = torch.zeros(2, 4, 2), torch.zeros(8)\n"
        "try:\n"
        "    vlmops.hd_transform(x, [(1, 1)], row, row, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "backend 'triton', asked for by backend: expected tensors on a GPU" in out
    assert "TRITON_INTERPRET=1" in out
