"""Perceiver attention: what is special to it beside the contract and the core's tests."""

import pytest
import torch
from dispatch import Shapes
from testbed import HAS_TRITON, TESTED_ISAS, extra_memory, reads_proc

import vlmops

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
BATCH, LATENTS, MEDIA, HEADS, DIM = 3, 5, 70, 2, 16
NAMES = ("q", "k", "v", "k_latents", "v_latents")


def inputs(media=MEDIA, dtype=torch.float32):
    q = torch.randn(BATCH, LATENTS, HEADS, DIM)
    k, v = torch.randn(2, BATCH, media, HEADS, DIM)
    k_latents, v_latents = torch.randn(2, BATCH, LATENTS, HEADS, DIM)
    return [t.to(dtype) for t in (q, k, v, k_latents, v_latents)]


def gradients(tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = vlmops.perceiver_attention(*leaves, **options)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_segments_are_one_softmax(use_cpu_isa, isa, dtype):
    use_cpu_isa(isa)
    q, k, v, k_latents, v_latents = tensors = inputs(dtype=dtype)
    k_latents *= 3.0  # so that neither segment has all the weight
    got = gradients(tensors)
    joined = [q, torch.cat([k, k_latents], 1), torch.cat([v, v_latents], 1)]
    leaves = [t.detach().requires_grad_() for t in joined]
    out = vlmops.packed_attention(*leaves)
    torch.manual_seed(1)
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.randn_like(out))
    expected = [out, dq, dk[:, :MEDIA], dv[:, :MEDIA], dk[:, MEDIA:], dv[:, MEDIA:]]
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


@every_isa
@pytest.mark.parametrize("media", [0, MEDIA])
def test_samples_without_media_have_their_latents_alone(use_cpu_isa, isa, media):
    use_cpu_isa(isa)
    tensors = inputs(media)
    lengths = torch.tensor([media, 0, media // 2])
    out, dq, dk, *_ = gradients(tensors, key_lengths=lengths)
    alone = vlmops.packed_attention(*(tensors[i][1:2] for i in (0, 3, 4)))
    assert torch.equal(out[1:2], alone)
    assert not dk[1].any()
    assert torch.isfinite(dq).all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("media", [0.0, 40.0])
def test_segments_whose_logits_are_far_apart(backend, media):
    """By more than an exponent of 2 holds."""
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    q, k, v, k_latents, v_latents = inputs()
    q, k, k_latents = q.fill_(10.0), k.fill_(media), k_latents.fill_(40.0 - media)
    out = vlmops.perceiver_attention(q, k, v, k_latents, v_latents, backend=backend)
    expected = (v if media else v_latents).mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected)


def test_media_behind_their_number_are_not_read():
    tensors, lengths = inputs(), torch.tensor([MEDIA, 10, 0])
    expected = gradients(tensors, key_lengths=lengths)
    behind = torch.arange(MEDIA) >= lengths[:, None]
    for t in tensors[1:3]:
        t[behind] = torch.nan
    for ours, theirs in zip(gradients(tensors, key_lengths=lengths), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_steep_logits_of_either_segment_take_all_the_weight():
    """Exponents that lie a thousand apart."""
    for of in (1, 3):
        tensors = inputs()
        tensors[of] *= 1e4
        got, dq, *_ = gradients(tensors)
        exact = vlmops.perceiver_attention(*tensors, backend="reference")
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(dq).all()


def test_nothing_has_as_many_rows_as_media_and_latents():
    tensors = inputs()
    leaves = [t.requires_grad_() for t in tensors]
    with Shapes() as made:
        vlmops.perceiver_attention(*leaves).sum().backward()
    assert not [s for s in made.shapes if MEDIA + LATENTS in s]


@reads_proc
def test_eight_images_of_576_tokens_are_not_copied():
    k, v = torch.randn(2, 1, 8 * 576, 16, 64)
    q, k_latents, v_latents = torch.randn(3, 1, 64, 16, 64)
    _, largest = extra_memory(lambda: vlmops.perceiver_attention(q, k, v, k_latents, v_latents))
    assert largest < k.nbytes / 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_perceiver_attention_does_not_depend_on_threads(threads):
    tensors = inputs()
    expected = gradients(tensors)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = gradients(tensors)
    finally:
        torch.set_num_threads(before)
    for name, ours, theirs in zip(("out", *NAMES), got, expected, strict=True):
        assert torch.equal(ours, theirs), name
