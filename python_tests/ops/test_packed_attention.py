"""Packed attention: what is special to it beside the contract."""

import itertools
import math

import pytest
import torch
from dispatch import CountOps
from testbed import NATIVE_BF16, TESTED_ISAS, extra_memory, reads_proc

import vlmops
from vlmops.ops import packed_attention
from vlmops.ops.compare import largest_error
from vlmops.ops.packed_attention import reference

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS + NATIVE_BF16)
LENGTHS = [1, 0, 64, 17, 300, 5, 65, 128]


def packed(lengths, heads=2, dim=40, kv_heads=None, dtype=torch.float32):
    rows = sum(lengths)
    counts = (heads, kv_heads or heads, kv_heads or heads)
    q, k, v = (torch.randn(rows, count, dim).to(dtype) for count in counts)
    return q, k, v, starts_of(lengths)


def starts_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def gradients(q, k, v, *args, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = vlmops.packed_attention(*leaves, *args, **options)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@every_isa
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["all", "causal"])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_is_the_same_alone(use_cpu_isa, isa, dtype, kv_heads, options):
    use_cpu_isa(isa)
    q, k, v, starts = packed(LENGTHS, kv_heads=kv_heads, dtype=dtype)
    out = vlmops.packed_attention(q, k, v, starts, **options)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    upstream = torch.randn_like(out)
    together = torch.autograd.grad(
        vlmops.packed_attention(*leaves, starts, **options), leaves, upstream
    )
    for first, end in itertools.pairwise(starts.tolist()):
        alone = [t[first:end].detach().requires_grad_() for t in (q, k, v)]
        one = vlmops.packed_attention(*alone, starts_of([end - first]), **options)
        assert torch.equal(one, out[first:end])
        for got, grad in zip(
            torch.autograd.grad(one, alone, upstream[first:end]), together, strict=True
        ):
            assert torch.equal(got, grad[first:end])


@every_isa
def test_packed_attention_batches_are_segments_of_one_length(use_cpu_isa, isa):
    use_cpu_isa(isa)
    q, k, v, starts = packed([70] * 3, heads=4, kv_heads=2)
    batched = [t.unflatten(0, (3, 70)) for t in (q, k, v)]
    assert torch.equal(
        vlmops.packed_attention(*batched).flatten(0, 1), vlmops.packed_attention(q, k, v, starts)
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_packed_attention_does_not_depend_on_threads(threads):
    q, k, v, starts = packed(LENGTHS, heads=3)
    expected = gradients(q, k, v, starts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gradients(q, k, v, starts)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@every_isa
def test_packed_attention_padding_hides_padding_from_padding(use_cpu_isa, isa):
    use_cpu_isa(isa)
    q, k, v, _ = packed([90] * 2)
    q, k, v = (t.unflatten(0, (2, 90)) for t in (q, k, v))
    padding = torch.rand(2, 90) < 0.4
    padding[1, :70] = True
    out = vlmops.packed_attention(q, k, v, padding=padding)
    mask = ~(padding[:, None, :, None] & padding[:, None, None, :])
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    assert largest_error(out, exact) < 2e-6


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_attention_of_large_numbers(use_cpu_isa, isa, dtype):
    """Logits of +-80 and more, and values near float16's largest."""
    use_cpu_isa(isa)
    q, k, v, starts = packed([130, 1], dim=64, dtype=dtype)
    q = q * 10
    logits = torch.einsum("ihd,jhd->hij", q.float(), k.float()) / 8
    assert logits.abs().max() > 30
    v = (v.sign() * 6e4).to(dtype)
    out = vlmops.packed_attention(q, k, v, starts)
    assert out.isfinite().all()
    exact = reference(q, k, v, starts)
    assert largest_error(out / 6e4, exact / 6e4) < 8 * torch.finfo(dtype).eps + 1e-5


@every_isa
def test_packed_attention_gives_nan_where_nan_was_seen(use_cpu_isa, isa):
    use_cpu_isa(isa)
    q, k, v, starts = packed([20, 70])
    for name, x in (("q", q), ("k", k), ("v", v)):
        spoilt = {"q": q, "k": k, "v": v, name: x.clone()}
        spoilt[name][25, 1, 3] = math.nan
        out = vlmops.packed_attention(**spoilt, cu_seqlens=starts)
        assert out[:20].isfinite().all()
        assert out[20:, 0].isfinite().all()
        hit = out[25, 1] if name == "q" else out[20:, 1, 3] if name == "v" else out[20:, 1]
        assert hit.isnan().all()


@every_isa
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_of_few_queries_comes_in_parts(use_cpu_isa, isa, dtype, causal):
    use_cpu_isa(isa)
    lengths, keys = [1, 2, 2, 1], [2100, 1024, 1027, 3000]
    q = torch.randn(6, 8, 64).to(dtype)
    k, v = torch.randn(2, sum(keys), 2, 64).to(dtype)
    k[: 2 * 1024] -= q[0, 0].sign()  # the last part of the first segment has all the weight
    starts, starts_k = starts_of(lengths), starts_of(keys)
    out = vlmops.packed_attention(q, k, v, starts, cu_seqlens_k=starts_k, causal=causal)
    exact = reference(q, k, v, starts, cu_seqlens_k=starts_k, causal=causal)
    assert largest_error(out, exact) < 8 * torch.finfo(dtype).eps
    ends = zip(
        itertools.pairwise(starts.tolist()), itertools.pairwise(starts_k.tolist()), strict=True
    )
    for (first, end), (first_k, end_k) in ends:
        alone = vlmops.packed_attention(
            q[first:end], k[first_k:end_k], v[first_k:end_k], starts_of([end - first]),
            cu_seqlens_k=starts_of([end_k - first_k]), causal=causal,
        )  # fmt: skip
        assert torch.equal(alone, out[first:end])


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_of_blocks_that_queries_see(use_cpu_isa, isa, dtype):
    """Queries that see the same blocks lie apart, some see none, and some one each."""
    use_cpu_isa(isa)
    q = torch.randn(3, 140, 4, 64).to(dtype)
    k, v = torch.randn(2, 3, 5 * 30, 2, 64).to(dtype)
    mask = torch.rand(3, 140, 5) < 0.4
    mask[1] = torch.nn.functional.one_hot(torch.arange(140) % 5, 5).bool()
    mask[2, 3:], mask[2, :3] = True, False
    assert not mask.any(-1).all()
    options = {"block_mask": mask, "tokens_per_block": 30}
    found = gradients(q, k, v, **options)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact = [reference(*leaves, **options)]
    torch.manual_seed(1)
    exact += torch.autograd.grad(exact[0], leaves, torch.randn_like(found[0]).double())
    for got, expected in zip(found, exact, strict=True):
        assert largest_error(got, expected) < 8 * torch.finfo(dtype).eps
    assert not found[0][~mask.any(-1)].any()
    for i in range(3):
        one = [t[i, None] for t in (q, k, v)]
        options["block_mask"] = mask[i, None]
        assert torch.equal(vlmops.packed_attention(*one, **options)[0], found[0][i])


@reads_proc
def test_packed_attention_never_expands_a_mask_of_blocks():
    """512 queries and 6,404 keys: a mask of both would be 13 MB, repeated heads 26."""
    q, (k, v) = torch.randn(1, 512, 4, 64), torch.randn(2, 1, 6404, 2, 64)
    mask = torch.arange(4) < torch.tensor([3, 1]).repeat(256)[None, :, None]
    options = {"block_mask": mask, "tokens_per_block": 1601}
    grown, largest = extra_memory(lambda: vlmops.packed_attention(q, k, v, **options))
    assert largest <= q.nbytes
    assert grown < q.nbytes + 6e6
    grown, largest = extra_memory(lambda: gradients(q, k, v, **options))
    assert largest <= k.nbytes


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_one_key_gets_all_the_weight(use_cpu_isa, isa, dtype):
    use_cpu_isa(isa)
    q, k, v, starts = packed([1] * 9, dtype=dtype)
    out, dq, dk, dv = gradients(q, k, v, starts)
    torch.manual_seed(1)
    assert torch.equal(out, v)
    assert torch.equal(dv, torch.randn_like(out))
    assert not dq.any()
    assert not dk.any()


def test_packed_attention_reference_of_long_segments(monkeypatch):
    q, k, v, starts = packed([9, 20], heads=4, kv_heads=2)

    def results():
        leaves = [t.double().requires_grad_() for t in (q, k, v)]
        out = reference(*leaves, starts, causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    at_once = results()
    monkeypatch.setattr(packed_attention, "_MOST_WEIGHTS", 4 * 9 * 9)  # the second is longer
    torch.testing.assert_close(results(), at_once, rtol=1e-13, atol=1e-13)


def test_packed_attention_skips_gradients_that_nobody_needs():
    q, k, v, starts = packed([40, 9])
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip((q, k, v), wanted, strict=True)]
        with CountOps() as ran:
            vlmops.packed_attention(*leaves, starts).sum().backward()
        assert [call[0].name() for call in ran.calls][-1] == "vlmops::packed_attention_backward"
        for leaf, w in zip(leaves, wanted, strict=True):
            assert (leaf.grad is not None) == w


@reads_proc
def test_packed_attention_memory_grows_with_tokens_alone():
    """8,192 tokens: a row of logits for each would be 268 MB a head."""
    q, k, v, starts = packed([8192], heads=2, dim=64)
    grown, largest = extra_memory(lambda: vlmops.packed_attention(q, k, v, starts))
    out = q.numel() * q.element_size()
    assert largest <= out
    assert grown < 3 * out + 8e6

    def backward():
        return gradients(q, k, v, starts)

    grown, largest = extra_memory(backward)
    assert largest <= out
    assert grown < 16 * out + 16e6


def test_packed_attention_reads_no_value_back():
    q, k, v, starts = packed([40, 9])

    class Values(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Values.seen += "_local_scalar_dense" in function.name()
            return function(*args, **(kwargs or {}))

    with Values():
        gradients(q, k, v, starts, max_seqlen=40)
    assert Values.seen == 0
