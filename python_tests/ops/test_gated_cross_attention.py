"""Gated cross-attention: what is special to it beside the contract."""

import itertools

import pytest
import torch
from dispatch import CountOps
from testbed import NATIVE_BF16, TESTED_ISAS, extra_memory, reads_proc

import vlmops

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS + NATIVE_BF16)
BATCH, TEXT, KEYS, HEADS, KV_HEADS, DIM = 3, 9, 70, 4, 2, 32
LENGTHS = [70, 0, 33]


def inputs(dtype=torch.float32, text=TEXT, keys=KEYS):
    q = torch.randn(BATCH, text, HEADS, DIM).to(dtype)
    k, v = torch.randn(2, BATCH, keys, KV_HEADS, DIM).to(dtype)
    return q, k, v, torch.randn(2, DIM).to(dtype)


def gradients(q, k, v, norms=(None, None), **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *norms) if t is not None]
    given = dict(zip(("q_norm_weight", "k_norm_weight"), leaves[3:], strict=False))
    out = vlmops.gated_cross_attention(*leaves[:3], **given, **options)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@every_isa
@pytest.mark.parametrize("text", [1, TEXT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_behind_their_number_are_not_read(use_cpu_isa, isa, dtype, text):
    use_cpu_isa(isa)
    q, k, v, norms = inputs(dtype, text)
    lengths = torch.tensor(LENGTHS)
    options = {"key_lengths": lengths, "norms": norms[:1]}
    expected = gradients(q, k, v, **options)
    behind = torch.arange(KEYS) >= lengths[:, None]
    k[behind] = v[behind] = torch.nan
    got = gradients(q, k, v, **options)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not got[2][behind].any()
    assert not got[3][behind].any()
    assert not got[0][1].any(), "no key, no result"


@every_isa
@pytest.mark.parametrize("text", [1, TEXT])
def test_a_row_of_fewer_keys_is_as_it_would_be_alone(use_cpu_isa, isa, text):
    use_cpu_isa(isa)
    q, k, v, _ = inputs(text=text)
    together = vlmops.gated_cross_attention(q, k, v, key_lengths=torch.tensor(LENGTHS))
    for row, n in enumerate(LENGTHS):
        alone = (q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n])
        assert torch.equal(vlmops.gated_cross_attention(*alone), together[row : row + 1])


@every_isa
def test_few_queries_over_many_keys_of_several_lengths(use_cpu_isa, isa):
    """Cut into parts of 1,024 keys, wherever a row's keys end."""
    use_cpu_isa(isa)
    q, k, v, _ = inputs(text=1, keys=2500)
    lengths = torch.tensor([2500, 1024, 1025], dtype=torch.int32)
    seen = torch.tensor([[True, False], [True, True], [False, True]])[:, None]
    options = {"block_mask": seen, "tokens_per_block": 1250, "key_lengths": lengths}
    got = vlmops.gated_cross_attention(q, k, v, **options)
    exact = vlmops.gated_cross_attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)
    assert not got[2].any(), "its keys end before the block that it sees"


def test_norms_are_those_of_pixel_shuffle():
    q, k, v, (of_q, of_k) = inputs()
    norm = {"norm": "rms", "eps": 1e-5}
    normed_q = vlmops.pixel_shuffle(q, 1, norm_weight=of_q, **norm).view(q.shape)
    normed_k = vlmops.pixel_shuffle(k, 1, norm_weight=of_k, **norm).view(k.shape)
    expected = vlmops.packed_attention(normed_q, normed_k, v)
    got = vlmops.gated_cross_attention(
        q, k, v, q_norm_weight=of_q, k_norm_weight=of_k, norm_eps=1e-5
    )
    assert torch.equal(got, expected)
    # Keys that are kept are kept normalised.
    assert torch.equal(
        vlmops.gated_cross_attention(q, normed_k, v, q_norm_weight=of_q, norm_eps=1e-5), expected
    )


def test_tokens_that_see_no_block_get_nothing():
    q, k, v, _ = inputs(keys=72)
    mask = torch.ones(BATCH, TEXT, 3, dtype=torch.bool)
    mask[:, :4] = False
    out, dq, dk, _ = gradients(q, k, v, block_mask=mask, tokens_per_block=24)
    assert not out[:, :4].any()
    assert not dq[:, :4].any()
    assert torch.isfinite(dk).all()
    alone = vlmops.gated_cross_attention(q[:, 4:], k, v, mask[:, 4:], 24)
    assert torch.equal(out[:, 4:], alone)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gated_cross_attention_does_not_depend_on_threads(threads):
    q, k, v, norms = inputs()
    options = {"key_lengths": torch.tensor(LENGTHS), "norms": norms}
    expected = gradients(q, k, v, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gradients(q, k, v, **options)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_that_nobody_needs_are_not_computed():
    q, k, v, (of_q, of_k) = inputs(text=3, keys=5)
    for wanted in itertools.product((True, False), repeat=5):
        tensors = (q, k, v, of_q, of_k)
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        *three, of_q_, of_k_ = leaves
        with CountOps() as ran:
            out = vlmops.gated_cross_attention(*three, q_norm_weight=of_q_, k_norm_weight=of_k_)
            if any(wanted):
                out.sum().backward()
        calls = [a for f, a, _ in ran.calls if "gated_cross_attention_backward" in str(f)]
        needs = [[*a[13:], *[True] * 5][:5] for a in calls]  # torch leaves out defaults
        assert needs == ([list(wanted)] if any(wanted) else [])
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


@reads_proc
def test_masks_are_never_expanded_and_heads_never_repeated():
    """Text of 2,048 over four tiles: a float mask of both would be 52 MB, repeated heads 13 each."""
    q, (k, v) = torch.randn(1, 2048, 4, 64), torch.randn(2, 1, 6404, 2, 64)
    mask = torch.arange(4) < torch.tensor([3, 1]).repeat(1024)[None, :, None]
    norms = torch.ones(2, 64)
    options = {"block_mask": mask, "tokens_per_block": 1601}

    def forward():
        weights = {"q_norm_weight": norms[0], "k_norm_weight": norms[1]}
        return vlmops.gated_cross_attention(q, k, v, **options, **weights)

    grown, largest = extra_memory(forward)
    assert largest <= k.nbytes  # normalised
    assert grown < k.nbytes + 2 * q.nbytes + 8e6
    grown, largest = extra_memory(lambda: gradients(q, k, v, norms, **options))
    assert largest <= k.nbytes
    assert grown < 6 * k.nbytes + 8 * q.nbytes + 24e6
