"""Attention of learned queries: what is special to it beside the contract and the core's tests."""

import pytest
import torch
from testbed import TESTED_ISAS

import vlmops

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
BATCH, QUERIES, KEYS, HEADS, DIM = 3, 5, 21, 2, 16


def inputs(batch=BATCH):
    q = torch.randn(batch, QUERIES, HEADS, DIM)
    k, v = torch.randn(2, BATCH, KEYS, HEADS, DIM)
    return q, k, v


@every_isa
def test_queries_of_batch_1_have_one_gradient_the_sum(use_cpu_isa, isa):
    use_cpu_isa(isa)
    q, k, v = inputs(1)
    shared, each = q.clone().requires_grad_(), q.repeat(BATCH, 1, 1, 1).requires_grad_()
    out, expected = (vlmops.qformer_attention(t, k, v) for t in (shared, each))
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, shared, grad)
    (theirs,) = torch.autograd.grad(expected, each, grad)
    assert ours.shape == q.shape
    torch.testing.assert_close(ours, theirs.sum(0, keepdim=True), rtol=1e-6, atol=1e-6)


@every_isa
def test_padded_keys_are_as_if_they_were_not_there(use_cpu_isa, isa):
    use_cpu_isa(isa)
    q, k, v = inputs()
    there = torch.rand(BATCH, KEYS) < 0.6
    there[1] = False
    out = vlmops.qformer_attention(q, k, v, there)
    assert torch.equal(out, vlmops.qformer_attention(q, k, v, there[:, None].repeat(1, QUERIES, 1)))
    assert not out[1].any(), "no key, no result"
    for i in (0, 2):
        alone = (t[i : i + 1, there[i]] for t in (k, v))
        torch.testing.assert_close(out[i : i + 1], vlmops.qformer_attention(q[i : i + 1], *alone))


def test_lengths_are_a_mask_of_the_first_keys():
    q, k, v = inputs()
    lengths = torch.tensor([KEYS, 0, 7])
    mask = torch.arange(KEYS) < lengths[:, None]
    torch.testing.assert_close(
        vlmops.qformer_attention(q, k, v, key_lengths=lengths),
        vlmops.qformer_attention(q, k, v, mask),
    )
