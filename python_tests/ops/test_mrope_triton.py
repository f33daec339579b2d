"""What is special to M-RoPE's Triton kernels, and to their being interpreted."""

from pathlib import Path

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

import vlmops
from vlmops.ops.mrope import reference
from vlmops.ops.mrope_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in [*SPEC.cases, *SPEC.few]}
CPU = torch.device("cpu")
HERE = Path(__file__).parent.parent


def case(name, dtype=torch.float32):
    return CASES[name].make(dtype, CPU)


def rotated_ones(ids, inv_freq):
    """Cosines and sines [N, R]: what q of ones and zeros turns into."""
    q = torch.cat((torch.ones(len(ids), 1, len(inv_freq)), torch.zeros(len(ids), 1, len(inv_freq))),
                  dim=-1)  # fmt: skip
    axis = torch.zeros(len(inv_freq), dtype=torch.int32)
    turned, _ = vlmops.mrope(q, q[:, :0], ids[None], inv_freq, axis, backend="triton")
    return turned[:, 0].chunk(2, dim=-1)


@pytest.mark.parametrize("magnitude", [1, 10, 10**3, 10**5, 10**6, 2**22, 2**23, 2**24])
def test_sine_and_cosine_over_the_whole_range(magnitude):
    # One token, a thousand angles: inv_freq draws them.
    inv_freq = torch.rand(1024)
    ids = torch.tensor([magnitude, -magnitude])
    angle = (ids.float()[:, None] * inv_freq).double()
    for got, exact in zip(rotated_ones(ids, inv_freq), (angle.cos(), angle.sin()), strict=True):
        ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor().clamp_min(-60)
        assert ((got.double() - exact).abs() / ulp).max() < 2


def test_multiples_of_half_pi_keep_their_last_bits():
    """Where the remainder is tiny, all of pi/2's parts count."""
    k = torch.arange(1, 1025, dtype=torch.float64)
    inv_freq = (k * 10007 * torch.pi / 2).float() / 2.0**16
    ids = torch.tensor([2**16])
    angle = (ids.float()[:, None] * inv_freq).double()
    cos, sin = rotated_ones(ids, inv_freq)
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=2e-7, atol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=2e-7, atol=0)


def test_angles_beyond_the_range_stay_bounded():
    cos, sin = rotated_ones(torch.tensor([2**24]), torch.logspace(0, 6, 64))
    assert cos.abs().max() <= 1.0000005
    assert sin.abs().max() <= 1.0000005


def test_the_interpreter_rounds_to_nearest_even_and_fuses():
    x = torch.randn(1, 4, 3, 128)
    zeros = torch.zeros(1, 1, 3, dtype=torch.int64)
    nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    weight = torch.ones(128)
    # A norm whose scale is 1 computes in float32 and rounds.
    args = (x.bfloat16(), x.bfloat16(), zeros, *nothing)
    options = {"q_norm_weight": weight * 1.01, "norm_eps": 1e-6, "backend": "triton"}
    got, _ = vlmops.mrope(*args, **options)
    exact, _ = reference(*args, q_norm_weight=weight * 1.01)
    differ = got != exact.bfloat16()
    # Truncation would be wrong in half of them.
    assert differ.sum() <= 2


def test_head_tiles_and_programs_cover_every_head():
    args = case("tiny_s1")
    for heads in (1, 2, 15, 16, 17, 31, 33):
        q, k = torch.randn(1, heads, 1, 128), torch.randn(1, 40 - heads, 1, 128)
        got = vlmops.mrope(**{**args, "q": q, "k": k, "backend": "triton"})
        expected = vlmops.mrope(**{**args, "q": q, "k": k, "backend": "cpu"})
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_prefill_gives_a_program_a_token_and_the_same_bits(monkeypatch):
    """More than 512 tokens share no tiles out; here a launch of few is made to do the same."""
    from vlmops.ops import mrope_triton

    args = case("tiny_qwen2vl", torch.bfloat16)
    shared = vlmops.mrope(**args, backend="triton")
    launch, grids = mrope_triton._launch, []

    def in_one(kernel, grid, *rest, **constants):
        grids.append(grid)
        launch(kernel, (grid[0], 1), *rest, **constants)

    monkeypatch.setattr(mrope_triton, "_launch", in_one)
    alone = vlmops.mrope(**args, backend="triton")
    assert grids[0][1] > 1
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_offsets_beyond_2_to_31():
    """Two tokens, 4 GiB apart."""
    d, stride = 8, 2**31 + 16
    memory = torch.zeros(stride + d, dtype=torch.bfloat16)  # pages that nobody touches
    q = memory.as_strided((1, 1, 2, d), (0, 0, stride, 1))
    memory[:d], memory[stride:] = 1, 2
    ids = torch.zeros(1, 1, 2, dtype=torch.int64)
    args = (q, q[:, :0], ids, torch.ones(4), torch.zeros(4, dtype=torch.int32))
    got, _ = vlmops.mrope(*args, backend="triton")
    assert got[0, 0, :, 0].tolist() == [1, 2]


def test_weight_gradients_do_not_depend_on_what_is_frozen():
    args = case("tiny_norm")
    names = ("q", "k", "q_norm_weight", "k_norm_weight")
    upstream = [torch.randn_like(args["q"]), torch.randn_like(args["k"])]

    def grads(wanted):
        leaves = {n: args[n].detach().clone().requires_grad_(n in wanted) for n in names}
        outputs = vlmops.mrope(**{**args, **leaves}, backend="triton")
        return torch.autograd.grad(outputs, [leaves[n] for n in wanted], upstream)

    together = dict(zip(names, grads(names), strict=True))
    for name in names:
        assert torch.equal(grads((name,))[0], together[name]), name


def test_in_place_refuses_shared_memory_and_takes_slices():
    args = {**case("tiny_tower_d72"), "backend": "triton"}
    fused = torch.randn(3, 3, 3, 72)
    q, k, _ = fused.unbind(1)
    expected = vlmops.mrope(**{**args, "q": q.clone(), "k": k.clone()})
    vlmops.mrope_(**{**args, "q": q, "k": k})
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    with pytest.raises(RuntimeError, match=r"k: expected memory of its own"):
        vlmops.mrope_(**{**args, "q": q, "k": q})
    with pytest.raises(RuntimeError, match=r"k: expected memory of its own"):
        vlmops.mrope_(**{**args, "q": fused[:, 0], "k": fused[:, 0, 1:]})
    with pytest.raises(RuntimeError, match=r"q: expected a tensor whose elements do not share"):
        vlmops.mrope_(**{**args, "q": q[:, :1].expand(3, 3, 72), "k": k})


def test_norm_backward_wants_what_was_normalised():
    args = case("tiny_norm")
    order = [args[n] for n in ("position_ids", "inv_freq", "freq_axis")]
    weights = (args["q_norm_weight"], args["k_norm_weight"])
    op = torch.ops.vlmops.mrope_triton_norm_backward
    q, k = args["q"], args["k"]
    with pytest.raises(RuntimeError, match=r"q: expected a tensor, since q_norm_weight is given"):
        op(q, k, None, k, *order, "half", 1.0, 1, *weights)
    with pytest.raises(RuntimeError, match=r"k: expected dtype float32, that of its gradient"):
        op(q, k, q, k.double(), *order, "half", 1.0, 1, *weights)


def test_no_size_and_no_decode_step_makes_a_new_compile_key():
    out = without_interpreter("import triton_aot; print(triton_aot.keys_by_model())")
    keys = eval(out)
    assert len(keys) >= 8
    assert all(n == 1 for n in keys.values()), keys


def test_without_a_gpu_or_the_interpreter_it_says_what_to_do():
    out = without_interpreter(
        "import torch, vlmops\n"
        "x = torch.randn(3, 1, 8)\n"
        "try:\n"
        "    vlmops.mrope(x, x, torch.zeros(1, 3, dtype=torch.int64), torch.ones(4),\n"
        "                 torch.zeros(4, dtype=torch.int32), backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "backend 'triton', asked for by backend: expected tensors on a GPU" in out
    assert "TRITON_INTERPRET=1" in out
