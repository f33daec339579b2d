"""What is special to patch embedding's Triton kernels, and to their being interpreted."""

from pathlib import Path

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.patch_embed_panels import Arguments
from vlmops.ops.patch_embed_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}
CPU = torch.device("cpu")
HERE = Path(__file__).parent.parent


def case(name, dtype=torch.float32):
    return CASES[name].make(dtype, CPU)


def triton_module():
    from vlmops.ops import patch_embed_triton

    return patch_embed_triton


def assert_correct(args, got):
    (exact,), (eager,) = SPEC.reference(**args), SPEC.eager_for(args)(**args)
    assert mismatch(got, exact, eager.dtype, largest_error(eager, exact)) is None


def recorded(monkeypatch):
    """The launches that follow: names of kernels, and their compile-time arguments."""
    module, launches = triton_module(), []
    launch = module._launch

    def noted(kernel, *args, **constants):
        launches.append((kernel.__name__, constants))
        launch(kernel, *args, **constants)

    monkeypatch.setattr(module, "_launch", noted)
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in {c.name for c in SPEC.few}])
def test_serves_every_case(name, dtype):
    """Those that the contract does not run on the interpreter."""
    args = case(name, dtype)
    (got,) = SPEC.function(**args, backend="triton")
    assert_correct(args, got)


@pytest.mark.parametrize("name", ["clip", "wide_p14", "qwen_flat", "uint8"])
def test_large_tiles_compute_the_same(name, monkeypatch):
    """What fills a GPU is too much for the interpreter: here a wave is one program."""
    args = case(name, torch.bfloat16)
    launches = recorded(monkeypatch)
    SPEC.function(**args, backend="triton")
    monkeypatch.setattr(triton_module(), "_WAVE", 1)
    (got,) = SPEC.function(**args, backend="triton")
    (_, small), (_, large) = launches
    assert (large["BM"] > small["BM"]) == (name != "uint8")
    assert_correct(args, got)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packs_as_the_library_does(name, dtype):
    a = Arguments(*SPEC.schema_arguments(case(name, torch.bfloat16)))
    rows = sum(a.patches()) * (1 if a.packed else a.pixel_values[0].shape[0])
    for begin, end in ((0, rows), (rows // 3, rows - rows // 4)):
        got = triton_module().pack(a, begin, end, dtype)
        expected = a.pack(begin, end, dtype)
        if name == "raw_floats":  # slope and intercept: the CPU's may be fused
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)


def test_one_launch_unless_a_norm_or_a_second_table_asks_for_more(monkeypatch):
    launches = recorded(monkeypatch)

    def kernels(name):
        launches.clear()
        SPEC.function(**case(name), backend="triton")
        return [kernel for kernel, _ in launches]

    for name in ("clip", "qwen_flat", "siglip2_linear", "video", "table_fp32", "no_patches"):
        assert kernels(name) == ["product_kernel"], name
    for name in ("ovis2_rms", "norm_plain", "mllama_tiles"):
        assert kernels(name) == ["product_kernel", "finish_kernel"], name
    assert kernels("pixtral_sizes") == ["product_kernel"] * 3
    assert kernels("no_images") == []


def test_three_tables_as_mllama_has_them():
    args = case("mllama_tiles")
    x, weight, prefix = args["pixel_values"], args["weight"], args["prefix"]
    tokens, d = 17, len(weight)
    tables = [torch.randn(n, d) for n in (5, tokens, 30)]
    index = torch.randint(30, (len(x), tokens, 1))
    positions = [
        vlmops.Position(tables[0], torch.randint(5, (len(x), 1, 1)), torch.rand(1), True),
        vlmops.Position(tables[1], None, torch.rand(1)),
        vlmops.Position(tables[2], index, torch.rand(1)),
    ]
    call = {"prefix": prefix, "positions": positions}
    for norm in (None, "layer"):
        got, expected = (
            vlmops.patch_embed(x, weight, norm=norm, **call, backend=backend)
            for backend in ("triton", "cpu")
        )
        torch.testing.assert_close(got, expected)


def untouched(tmp_path, size, dtype):
    """Zeros, of whose pages there are only those that are used."""
    return torch.from_file(str(tmp_path / "pages"), shared=True, size=size, dtype=dtype)


def test_pixels_beyond_2_to_31(tmp_path):
    """Two images, two channels and four rows, each further apart."""
    p, stride = 2, 2**31 + 16
    memory = untouched(tmp_path, 16 * stride, torch.uint8)
    image = memory.as_strided((2, 2, 2 * p, p), (stride, 2 * stride, 4 * stride, 1))
    image[:] = torch.randint(256, image.shape, dtype=torch.uint8)
    weight = torch.randn(3, 2, p, p)
    got, expected = (
        vlmops.patch_embed(x, weight, backend=backend)
        for x, backend in ((image, "triton"), (image.clone(), "cpu"))
    )
    torch.testing.assert_close(got, expected)


def test_a_table_beyond_2_to_31(tmp_path):
    d = 16
    table = untouched(tmp_path, 2**31 + 2 * d, torch.bfloat16).view(-1, d)
    table[0], table[-1] = 1, 2
    x, weight = torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(d, 4, dtype=torch.bfloat16)
    index = torch.tensor([[len(table) - 1], [0]])
    got = vlmops.patch_embed(x, weight, positions=[vlmops.Position(table, index)], backend="triton")
    assert got[:, 0].tolist() == [2, 1]


def test_refuses_by_name_what_it_does_not_serve():
    x = torch.zeros(1, 2)
    wide = torch.zeros(triton_module().MAX_NORM_CHANNELS + 1, 2)
    with pytest.raises(RuntimeError, match=r"'triton': norm: expected at most 8192 channels"):
        vlmops.patch_embed(x, wide, norm="rms", backend="triton")
    many = torch.zeros(1, 1, device="meta").expand(2**31, 1)
    args = Arguments([many], torch.zeros(1, 1, device="meta"), [], [])
    with pytest.raises(RuntimeError, match=r"pixel_values: expected fewer than 2\^31 tokens"):
        triton_module()._refuse(args, torch.empty(2**31, 1, device="meta"))


def test_the_interpreter_multiplies_bfloat16_as_numbers():
    x, weight = torch.eye(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    got = vlmops.patch_embed(x, weight, backend="triton")
    assert torch.equal(got, weight.T[:3])


def test_no_size_of_a_class_makes_a_new_compile_key():
    out = without_interpreter("import triton_aot; print(triton_aot.patch_embed_keys())")
    keys = eval(out)
    assert len(keys) >= 8
    assert all(n == 1 for n in keys.values()), keys


def test_without_a_gpu_or_the_interpreter_it_says_what_to_do():
    out = without_interpreter(
        "import torch, vlmops\n"
        "try:\n"
        "    vlmops.patch_embed(torch.zeros(1, 2), torch.zeros(3, 2), backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "backend 'triton', asked for by backend: expected tensors on a GPU" in out
    assert "TRITON_INTERPRET=1" in out
