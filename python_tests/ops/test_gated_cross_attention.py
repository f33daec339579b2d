"""Gated cross-attention: what is special to it beside the contract."""

import itertools

import pytest
import torch
from dispatch import CountOps
from testbed import NATIVE_BF16, TESTED_ISAS, extra_memory, reads_proc
from torch.nn import functional

import vlmops
import vlmops.nn
from vlmops.demo.gated_cross_attention import train

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
    """2,048 tokens over four tiles: a float mask of both would be 52 MB, repeated heads 13."""
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


# The layer.


def flamingo(x, visual, mask, weights, heads, activation, eps):
    """The paper's formulas, a token and a head at a time, in float64."""
    w = {name: t.double() for name, t in weights.items()}

    def layer_norm(y, name):
        y = y - y.mean()
        return y / (y.square().mean() + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def rms_norm(y, name):
        if f"{name}.weight" not in w:
            return y
        return y / (y.square().mean() + eps).sqrt() * w[f"{name}.weight"]

    kv_heads = w["k_proj.weight"].shape[0] * heads // w["q_proj.weight"].shape[0]
    rows = []
    for b, i in itertools.product(range(x.shape[0]), range(x.shape[1])):
        y = x[b, i].double()
        q = (w["q_proj.weight"] @ layer_norm(y, "attn_norm")).view(heads, -1)
        images = [visual[b, m].double() for m in range(visual.shape[1]) if mask[b, i, m]]
        outs = []
        for h in range(heads):
            of_kv = h * kv_heads // heads
            keys, values = (
                [(w[f"{n}_proj.weight"] @ t).view(kv_heads, -1)[of_kv] for m in images for t in m]
                for n in "kv"
            )
            if not keys:
                outs.append(torch.zeros(q.shape[1], dtype=torch.float64))
                continue
            keys = torch.stack([rms_norm(k, "k_norm") for k in keys])
            logits = keys @ rms_norm(q[h], "q_norm") / q.shape[1] ** 0.5
            outs.append(logits.softmax(0) @ torch.stack(values))
        y = y + w["attn_gate"].tanh() * (w["o_proj.weight"] @ torch.cat(outs))
        hidden = activation(w["fc1.weight"] @ layer_norm(y, "mlp_norm"))
        rows.append(y + w["mlp_gate"].tanh() * (w["fc2.weight"] @ hidden))
    return torch.stack(rows).view(x.shape)


BLOCKS = {
    "flamingo": {"num_heads": 2, "activation": "squared_relu"},
    "norms": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "vector_gates": True},
    "head_dim": {"num_heads": 3, "head_dim": 8, "activation": "silu"},
}


def block_of(name):
    block = vlmops.nn.GatedCrossAttentionBlock(32, 24, **BLOCKS[name])
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[0, [1, 4]] = where[1, [0]] = True
    return block, torch.randn(2, 7, 32), torch.randn(2, 2, 5, 24), where


@pytest.mark.parametrize("only_latest", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_what_the_paper_says(name, only_latest):
    block, text, images, where = block_of(name)
    mask = vlmops.nn.image_mask(where, 2, only_latest)
    assert not mask[0, 0].any(), "before the first image"
    activation = {"gelu": functional.gelu, "silu": functional.silu}.get(
        block.activation, lambda x: functional.relu(x) ** 2
    )
    exact = flamingo(text, images, mask, block.state_dict(), block.num_heads, activation, block.eps)
    torch.testing.assert_close(block(text, images, mask).double(), exact, rtol=1e-5, atol=1e-5)
    kept = block.keys_and_values(images)
    step = block(text[:, -1:], None, mask[:, -1:], keys_and_values=kept)
    torch.testing.assert_close(step.double(), exact[:, -1:], rtol=1e-5, atol=1e-5)
    made = vlmops.nn.gated_cross_attention_block(
        text, *kept, block.state_dict(), num_heads=block.num_heads, block_mask=mask,
        tokens_per_block=5, activation=block.activation,
    )  # fmt: skip
    assert torch.equal(made, block(text, images, mask))


def test_block_without_images_and_with_closed_gates():
    block, text, images, where = block_of("flamingo")
    assert block(text, None) is text
    torch.nn.init.zeros_(block.attn_gate)
    torch.nn.init.zeros_(block.mlp_gate)
    assert torch.equal(block(text, images, vlmops.nn.image_mask(where, 2)), text)


def test_block_learns_where_text_is_frozen():
    """Gates that are closed learn first, and open the way for the rest."""
    losses = train(40)
    assert losses[0] > 2.0, "chance, by a model that nobody trained"
    assert losses[-1] < 0.5


def test_block_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, .* got 'swish'"):
        vlmops.nn.GatedCrossAttentionBlock(32, 24, activation="swish")
    block, text, images, where = block_of("flamingo")
    with pytest.raises(RuntimeError, match="block_mask: expected shape"):
        block(text, images, vlmops.nn.image_mask(where, 2)[:, 1:])
