"""What is special to packed attention's Triton kernels."""

import functools

import pytest
import torch
from testbed import HAS_TRITON, without_interpreter

from vlmops.ops.packed_attention import Options, reference
from vlmops.ops.packed_attention_spec import SPEC

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

CASES = {case.name: case for case in SPEC.cases}
CPU = torch.device("cpu")


def triton_module():
    from vlmops.ops import packed_attention_triton

    return packed_attention_triton


def small_tiles(monkeypatch, rows=16, keys=16):
    """What one program has on a GPU is all of a small case."""
    module = triton_module()
    for name in ("forward_tile", "backward_kv_tile", "backward_q_tile"):
        monkeypatch.setattr(module, name, lambda *_: module.Tile(rows, keys, 4, 1))


def options_of(args):
    given = {name: args[name] for name in Options._fields}
    return Options(**{**given, "max_seqlen": args["max_seqlen"] or 0})


def both(args, *, unchecked=None):
    """Result and gradients of the kernels, and exact ones; unchecked: options nobody looks at."""
    module, q = triton_module(), args["q"]
    grad = torch.randn_like(q)
    options = unchecked or options_of(args)
    out, statistics = module.forward(q, args["k"], args["v"], *options)
    grads = module.backward(grad, q, args["k"], args["v"], out, statistics, *options)
    leaves = {n: args[n].detach().double().requires_grad_() for n in "qkv"}
    exact = reference(**{**args, **leaves})
    exact_grads = torch.autograd.grad(exact, [*leaves.values()], grad.double())
    return [out, *grads], [exact, *exact_grads]


def assert_equal(found, exact):
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-5, atol=2e-5)


MANY_TILES = ["frames", "mllama", "mllama_packed", "several", "several_causal", "cross",
              "cross_causal", "gqa_causal", "few_causal", "prefill", "scale_negative", "scale_0",
              "odd", "channels_apart", "dim_96", "no_keys"]  # fmt: skip


@pytest.mark.parametrize("name", MANY_TILES)
def test_many_tiles(name, monkeypatch):
    small_tiles(monkeypatch)
    assert_equal(*both(CASES[name].make(torch.float32, CPU)))


@pytest.mark.parametrize("name", ["long_padding", "dim_168", "dim_256"])
def test_tiles_of_a_gpu(name):
    assert_equal(*both(CASES[name].make(torch.float32, CPU)))


def test_every_tile_is_some_programs(monkeypatch):
    """Segments that begin anywhere in a tile, empty ones, and programs that have none."""
    small_tiles(monkeypatch)
    lengths = [1, 0, 15, 16, 17, 0, 0, 31, 1, 1, 40, 0]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = torch.randn(int(starts[-1]), 3, 2, 8).unbind(1)
    args = CASES["several"].make(torch.float32, CPU)
    assert_equal(*both({**args, "q": q, "k": k, "v": v, "cu_seqlens": starts}))


def test_longest_segment_that_is_said_to_be_shorter(monkeypatch):
    """On a GPU nobody looks."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(triton_module(), "_check", lambda *_: None)
    args = CASES["frames"].make(torch.float32, CPU)
    assert_equal(*both(args, unchecked=options_of(args)._replace(max_seqlen=20)))


def test_starts_outside_of_the_tensors(monkeypatch):
    """Kept within them, as far as they can be; memory around is not read."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(triton_module(), "_check", lambda *_: None)
    monkeypatch.setattr(triton_module(), "CHECK", False)
    q, k, v = torch.randn(40, 3, 2, 8).unbind(1)
    wide = torch.full((3, 60, 2, 8), torch.nan)
    wide[:, 10:50] = torch.stack([q, k, v])
    starts = torch.tensor([-7, 24, 70])
    out, _ = triton_module().forward(*wide[:, 10:50], starts)
    expected = reference(q, k, v, torch.tensor([0, 24, 40]))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_numbers_of_keys_outside_of_the_tensors(monkeypatch):
    small_tiles(monkeypatch)
    monkeypatch.setattr(triton_module(), "_check", lambda *_: None)
    monkeypatch.setattr(triton_module(), "CHECK", False)
    q, (k, v) = torch.randn(3, 4, 2, 8), torch.randn(2, 3, 20, 2, 8)
    made = [
        triton_module().forward(q, k, v, *Options(key_lengths=torch.tensor(lengths)))[0]
        for lengths in ([0, 20, 7], [-3, 99, 7])
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_skips_what_nobody_needs(needs, monkeypatch):
    module, ran = triton_module(), []
    args = CASES["gqa"].make(torch.float32, CPU)
    options, tensors = options_of(args), [args[n] for n in "qkv"]
    out, statistics = module.forward(*tensors, *options)
    grad = torch.randn_like(out)
    whole = module.backward(grad, *tensors, out, statistics, *options)
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda k, *a, **c: (ran.append(k), launch(k, *a, **c)))
    found = module.backward(grad, *tensors, out, statistics, *options, *needs)
    for got, expected, needed in zip(found, whole, needs, strict=True):
        assert torch.equal(got, expected) if needed else got.shape == (0,)
    assert (module.backward_q_kernel in ran) == needs[0]
    assert (module.backward_kv_kernel in ran) == (needs[1] or needs[2])


def test_hidden_keys_are_not_read_by_tiles_of_padding(monkeypatch):
    """Tiles whose queries are all padding stop where keys begin that are, too."""
    small_tiles(monkeypatch)
    args = CASES["mllama_packed"].make(torch.float32, CPU)
    args["padding"] = torch.arange(61) >= 16
    args["cu_seqlens"] = torch.tensor([0, 61])
    poisoned = args["v"].clone()
    poisoned[32:] = torch.nan
    module = triton_module()
    (expected, _), (got, _) = (
        module.forward(args["q"], args["k"], v, *options_of(args)) for v in (args["v"], poisoned)
    )
    assert torch.equal(got[32:], expected[32:])


def test_refuses_rows_that_programs_cannot_count():
    row = torch.zeros(1, 1, 1, 8)
    q = row.expand(1, 2**30, 1, 8)
    with pytest.raises(RuntimeError, match=r"q: expected fewer than 2\^30 rows.*got shape"):
        triton_module()._refuse(q, row)
    with pytest.raises(RuntimeError, match=r"k: expected fewer than 2\^30 rows.*got shape"):
        triton_module()._refuse(row, q)


@functools.cache
def keys():
    return eval(without_interpreter("import triton_aot; print(triton_aot.packed_attention_keys())"))


def test_no_size_of_a_batch_makes_a_new_compile_key():
    assert len(keys()) >= 4
    assert all(n == 1 for n in keys().values()), keys()
