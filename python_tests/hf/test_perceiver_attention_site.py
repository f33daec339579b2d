"""`vlmops.patch` with perceiver_attention: images and latents are never joined."""

import copy
import types

import pytest
import torch
from dispatch import CountOps, Shapes
from hf import tiny
from hf.checks import (
    assert_agree,
    assert_bfloat16_is_right,
    assert_gradients_agree,
    assert_twin_copies_and_pickles,
    batch_of,
    gradients,
)
from hf.tiny import run
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmops
from vlmops.hf import eager_attention, targets
from vlmops.hf.eager_attention import Joining, Segments
from vlmops.hf.lazy import computed
from vlmops.hf.rebind import ops_of
from vlmops.hf.sites import packed_attention
from vlmops.hf.sites import perceiver_attention as site

OP, BACKWARD = "vlmops::perceiver_attention", "vlmops::perceiver_attention_backward"
LATENTS = 3

pytestmark = pytest.mark.usefixtures("only_perceiver_attention")


def idefics(norms):
    """With a resampler, whose heads are normalised or not."""

    def build(*args, **options):
        resampler = {
            "use_resampler": True,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 24,
            "qk_layer_norms_perceiver": norms,
        }
        options = {"use_resampler": True, "perceiver_config": resampler, **options}
        return tiny.build("idefics", *args, **options)

    return build


MODELS = {
    "idefics": ("idefics", idefics(False)),
    "idefics, norms": ("idefics", idefics(True)),
    "idefics2": ("idefics2", lambda *args, **o: tiny.build("idefics2", *args, **o)),
}
everywhere = pytest.mark.parametrize("name", MODELS)
ways = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def built(name, *args, **options):
    """A model and a batch for it; some of Idefics2's images are padded."""
    family, build = MODELS[name]
    dtype = options.get("dtype", torch.float32)
    batch = batch_of(family, "left_padded", dtype)
    if family == "idefics2":
        batch["pixel_attention_mask"][0, 1, 10:] = 0
        batch["pixel_attention_mask"][1, 0, :, 9:] = 0
    return build(*args, **options), batch


def attention_of(model):
    return [m for m in model.modules() if site.OP in ops_of(m)]


def expected_place(model):
    places = targets.expected_places(model.config.model_type)
    (place,) = [e for e in places if e.op == site.OP]
    return place.path, place.sites(model.config)


@everywhere
def test_family_table_holds(name):
    model, _ = built(name)
    (row,) = vlmops.patch(model).rows
    assert (row.path, row.sites, row.status) == (*expected_place(model), "patched")
    assert {row.status for row in vlmops.patch(model).rows} == {"already patched"}
    assert vlmops.unpatch(model) == row.sites


@everywhere
@ways
def test_logits_and_gradients_agree(name, attention):
    model, batch = built(name, attention)
    expected, grads = gradients(model, batch)
    vlmops.patch(model)
    with CountOps() as ran:
        logits, our_grads = gradients(model, batch)
    assert ran.counts[OP] == ran.counts[BACKWARD] == expected_place(model)[1]
    assert_agree(logits, expected, "logits")
    assert_gradients_agree(our_grads, grads)
    reached = [n for n in grads if "resampler" in n and "proj" in n]
    assert len(reached) >= 8
    assert all(grads[n].abs().max() > 0 for n in reached)


@ways
@pytest.mark.parametrize(
    ("name", "padded"), [*((name, False) for name in MODELS), ("idefics2", True)]
)
def test_nothing_is_joined(name, attention, padded):
    """Neither hidden states nor keys, values, weights and their gradients; masks are."""
    family, build = MODELS[name]
    model, tokens = build(attention), 41
    resampler = (model.model if family == "idefics" else model.model.connector).perceiver_resampler
    width = next(m for m in resampler.modules() if hasattr(m, "k_proj")).k_proj.in_features
    context = torch.randn(2, tokens, width, requires_grad=True)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, 30:] = 0 if padded else 1
    given = () if family == "idefics" else (mask,)

    def joined():
        with Shapes() as made:
            out = resampler(context, *given)
            (grad,) = torch.autograd.grad(out.square().sum(), context)
        both = tokens + LATENTS
        shapes = [s for s in made.shapes if both in s]
        return out, grad, [s for s in shapes if s[-1] != both or (len(s) == 4 and s[1] > 1)]

    out, grad, theirs = joined()
    vlmops.patch(model)
    our_out, our_grad, ours = joined()
    assert len(theirs) > 20
    assert not ours
    assert_agree(our_out, out, "latents")
    assert_agree(our_grad, grad, "gradient of images")


def test_images_without_padding_have_no_mask():
    model = tiny.build("idefics2")
    batch = batch_of("idefics2", "left_padded")
    masks = []
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        real = eager_attention.perceiver_attention
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(
                eager_attention,
                "perceiver_attention",
                lambda *args, **more: masks.append(args[5]) or real(*args, **more),
            )
            assert_agree(run(model, batch).logits, expected, "logits")
    assert masks == [None, None]


def test_padding_is_a_mask_of_images_alone(monkeypatch):
    model, batch = built("idefics2")
    vlmops.patch(model)
    masks, real = [], eager_attention.perceiver_attention

    def spy(*args, **more):
        masks.append(args[5])
        return real(*args, **more)

    monkeypatch.setattr(eager_attention, "perceiver_attention", spy)
    with torch.no_grad():
        run(model, batch)
    assert [(m.shape, m.dtype) for m in masks] == [((3, 16), torch.bool)] * 2
    assert masks[0] is masks[1], "looked at once"
    assert 0 < masks[0].sum() < masks[0].numel()


@everywhere
def test_greedy_generation_agrees(name):
    model, batch = built(name)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = run(model, batch, model.generate, **options)
    vlmops.patch(model)
    with CountOps() as ran:
        got = run(model, batch, model.generate, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert_agree(ours, theirs, "logits")
    assert ran.counts[OP] == expected_place(model)[1], "images are resampled once"


@everywhere
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(name, use_reentrant):
    model, batch = built(name)
    logits, grads = gradients(model, batch)
    vlmops.patch(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.train()
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[OP] >= expected_place(model)[1]  # resamplers are no checkpointed layers
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@everywhere
def test_bfloat16_is_at_least_as_right_as_hugging_face(name):
    _, batch = built(name)
    model, batch16 = built(name, dtype=torch.bfloat16)
    assert_bfloat16_is_right(model, batch, batch16, OP, expected_place(model)[1])


@everywhere
def test_autocast_and_inference_mode(name):
    model, batch = built(name)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch).logits
    assert ran.counts[OP] == expected_place(model)[1]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("family", ["idefics2"])
def test_twin_copies_and_pickles(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    assert restored == report.counts[site.OP] == 2


@everywhere
def test_resamplers_compile_to_one_graph(name):
    model, batch = built(name)
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        torch._dynamo.reset()
        for module in attention_of(model):
            module.compile(fullgraph=True, backend="eager")
        assert_agree(run(model, batch).logits, expected, "compiled")


@everywhere
def test_what_is_small_is_the_models_own(name, monkeypatch):
    monkeypatch.setattr(eager_attention, "SMALL", 1 << 20)
    model, batch = built(name)
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            assert torch.equal(run(model, batch).logits, expected)
    assert ran.counts[OP] == 0


def test_dropout_in_training_is_the_models_own():
    model, batch = built("idefics2")
    for module in model.modules():
        if type(module).__name__ == "Idefics2PerceiverAttention":
            module.attention_dropout = 0.3
    model.train()
    torch.manual_seed(0)
    expected, grads = gradients(model, batch)
    (row,) = vlmops.patch(model).rows
    assert row.reason == "in training its own attention, which drops some weights"
    torch.manual_seed(0)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == 0
    assert torch.equal(ours, expected)
    assert all(torch.equal(our_grads[n], g) for n, g in grads.items())
    with CountOps() as ran, torch.no_grad():
        run(model.eval(), batch)
    assert ran.counts[OP] == 2


# Whoever looks at weights, or at modules.


def test_weights_that_are_asked_for_are_hugging_faces():
    model, _ = built("idefics2", "eager")
    vlmops.patch(model)
    module = attention_of(model)[0]
    given = {"latents": torch.randn(1, 3, 64), "context": torch.randn(1, 16, 64)}
    with torch.no_grad():
        with CountOps() as ran:
            ours, weights = module(**given, output_attentions=True)
        vlmops.unpatch(model)
        expected = module(**given)
    assert ran.counts[OP] == 0
    assert torch.equal(ours, expected[0])
    assert torch.equal(weights, expected[1])


@everywhere
@pytest.mark.parametrize("layer", ["k_proj", "v_proj", "q_proj"])
def test_hooks_see_what_hugging_face_would_have_given_them(name, layer):
    """Of keys and values of both together."""
    model, batch = built(name)
    vlmops.patch(model)
    seen = []
    module = attention_of(model)[0]
    handle = getattr(module, layer).register_forward_hook(lambda _, given, out: seen.append(out))
    with torch.no_grad():
        with CountOps() as ran:
            run(model, batch)
        assert ran.counts[OP] == expected_place(model)[1] - 1
        vlmops.unpatch(model)
        run(model, batch)
    handle.remove()
    assert torch.equal(*seen)


class Adapted(nn.Linear):
    """What LoRA does."""

    def forward(self, x):
        assert type(x) is torch.Tensor
        return super().forward(x) + functional.linear(x, self.more)


@everywhere
@pytest.mark.parametrize("layers", [("k_proj", "v_proj"), ("q_proj",)])
def test_layers_that_others_adapt_later(name, layers):
    model, batch = built(name)
    vlmops.patch(model)
    torch.manual_seed(7)
    for module in attention_of(model):
        for layer in layers:
            child = getattr(module, layer)
            child.__class__ = Adapted
            child.more = nn.Parameter(torch.randn(child.weight.shape) * 0.1)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == (expected_place(model)[1] if layers == ("q_proj",) else 0)
    vlmops.unpatch(model)
    expected, grads = gradients(model, batch)
    assert_agree(ours, expected, "logits")
    assert_gradients_agree(our_grads, grads)
    assert any("more" in name for name in grads)


def test_patched_linear_layers_are_given_both(monkeypatch):
    """Whichever is patched first."""
    from vlmops.hf.sites import linear

    model, batch = built("idefics2")
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        for module in attention_of(model):
            layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
            for layer, kind in linear.adapt(packed_attention.Place("", "", 1, layers)).items():
                layer.__class__ = kind
        with CountOps() as ran:
            assert_agree(run(model, batch).logits, expected, "logits")
        assert ran.counts[OP] == 2


def test_another_implementation_that_is_selected_gets_both_together():
    model, batch = tiny.build("idefics2"), batch_of("idefics2", "left_padded")
    shapes = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        shapes.append((key.shape, type(key), type(value), isinstance(module, nn.Module)))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        for module in attention_of(model):
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = "mine"
        ALL_ATTENTION_FUNCTIONS["mine"] = mine
        try:
            with CountOps() as ran:
                assert_agree(run(model, batch).logits, expected, "logits")
            assert ran.counts[OP] == 0
            assert shapes == [((3, 2, 19, 24), torch.Tensor, torch.Tensor, True)] * 2
            (row,) = vlmops.patch(model).rows
            assert row.status == "already patched"
            vlmops.unpatch(model)
            (row,) = vlmops.patch(model).rows
            assert row.status == "left alone"
            assert "mine is selected" in row.reason
        finally:
            del ALL_ATTENTION_FUNCTIONS["mine"]


# Steps of a forward on two sequences.

DRAW = torch.Generator().manual_seed(0)
MEDIA, LAST = torch.randn(2, 5, 16, generator=DRAW), torch.randn(2, 3, 16, generator=DRAW)
QUERIES = torch.randn(2, 3, 16, generator=DRAW)
PADDED = torch.zeros(2, 1, 1, 8)
PADDED[1, ..., 2:4] = torch.finfo(torch.float32).min
HIDDEN = torch.zeros(2, 1, 1, 8)
HIDDEN[1, ..., 6:] = torch.finfo(torch.float32).min
UNSEEN = torch.zeros(2, 1, 1, 8)
UNSEEN[1, ..., :5] = torch.finfo(torch.float32).min
ROWS = torch.zeros(2, 1, 3, 8)
ROWS[:, :, 1, :4] = torch.finfo(torch.float32).min


def sdpa(module, query, key, value, mask, scaling=None, is_causal=False, **_):
    """Of transformers', as far as it is looked at."""
    return functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, is_causal=is_causal
    ).transpose(1, 2), None


sdpa.__module__ = site.SDPA


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 1),
        ({"scaling": 0.3}, 1),
        ({"is_causal": True}, 0),
        ({"dropout": 0.1}, 0),
        ({"softcap": 1.0}, 0),
        ({"position_bias": torch.zeros(())}, 0),
        ({"known": False}, 0),
    ],
    ids=str,
)
def test_functions_are_called_for_what_the_op_does_not_do(options, calls):
    torch.manual_seed(0)
    q, of_media, of_latents = (torch.randn(2, 4, n, 8) for n in (7, 5, 2))
    parts = of_media, of_latents
    both = Segments(lambda: torch.cat(parts, 2), parts, 2, eager_attention.served)
    module = types.SimpleNamespace(_module=None, is_causal=False)
    options = dict(options)
    known = options.pop("known", True)
    with CountOps() as ran:
        got, _ = site._attend(sdpa, known, module, q, both, both, None, **options)
    assert ran.counts[OP] == calls
    expected, _ = sdpa(None, q, torch.cat(parts, 2), torch.cat(parts, 2), None, **options)
    torch.testing.assert_close(computed(got), expected)


def test_an_implementation_that_nobody_knows_is_not_replaced():
    theirs = types.SimpleNamespace(get_interface=lambda _, default: default)
    functions = site._Functions(theirs)
    for implementation, known in (("eager", True), ("sdpa", True), ("flash_attention_2", False)):
        assert functions.get_interface(implementation, sdpa).args == (sdpa, known)


def heads(x, of=2):
    return x.view(x.shape[0], x.shape[1], of, -1).transpose(1, 2)


def attend(kv, v=None, mask=None, q=QUERIES):
    scores = torch.einsum("...id,...jd->...ij", heads(q), heads(kv))
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) @ heads(kv if v is None else v)


STEPS = {
    "joined": (lambda t: attend(t.cat([MEDIA, LAST], dim=-2)), 1),
    "concat": (lambda t: attend(t.concat((MEDIA, LAST), 1)), 1),
    "twice": (lambda t: attend(t.cat([MEDIA, LAST], 1), t.cat([MEDIA, LAST], 1)), 1),
    "padded": (lambda t: attend(t.cat([MEDIA, LAST], 1), mask=PADDED), 1),
    "for some queries": (lambda t: attend(t.cat([MEDIA, LAST], 1), mask=ROWS), 1),
    "only latents seen": (lambda t: attend(t.cat([MEDIA, LAST], 1), mask=UNSEEN), 1),
    "latents hidden": (lambda t: attend(t.cat([MEDIA, LAST], 1), mask=HIDDEN), 0),
    "by permute": (lambda t: t.softmax(
        heads(QUERIES) @ t.cat([MEDIA, LAST], 1).view(2, 8, 2, 8).permute(0, 2, 3, 1), -1
    ) @ t.cat([MEDIA, LAST], 1).reshape(2, -1, 2, 8).permute((0, 2, 1, 3)), 1),
    "channels joined": (lambda t: attend(t.cat([MEDIA, MEDIA], -1)[..., :16]), 0),
    "batches joined": (lambda t: attend(t.cat([MEDIA[:1], MEDIA[:1]])), 0),
    "three": (lambda t: attend(t.cat([MEDIA, LAST, LAST], 1)), 0),
    "cut elsewhere": (
        lambda t: attend(t.cat([MEDIA, LAST], 1), t.cat([LAST, MEDIA], 1)), 0),
    "values of one tensor": (lambda t: attend(t.cat([MEDIA, LAST], 1), t.ones(2, 8, 16)), 0),
    "tokens become heads": (lambda t: attend(t.cat([MEDIA, LAST], 1).view(2, 16, 8).repeat(
        1, 1, 2)), 0),
    "moved by one": (lambda t: attend(t.cat([MEDIA, LAST], 1).roll(1, 1)), 0),
    "written to": (lambda t: attend(t.cat([MEDIA, LAST], 1).mul_(2)), 0),
    "looked at, written to": (lambda t: attend(doubled(t.cat([MEDIA, LAST], 1))), 0),
    "no media": (lambda t: attend(t.cat([MEDIA[:, :0], LAST], 1)), 0),
    "one query for all": (lambda t: attend(t.cat([MEDIA, LAST], 1), q=QUERIES[:1]), 0),
}  # fmt: skip


def doubled(x):
    x.mul_(2)
    return x


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_forward(name):
    steps, calls = STEPS[name]
    with torch.no_grad():
        expected = steps(torch)
        with CountOps() as ran:
            got = computed(steps(Joining(eager_attention.served)))
    torch.testing.assert_close(got, expected)
    assert ran.counts[OP] == calls


def test_only_layers_that_treat_each_token_alone_are_given_both():
    class Own(nn.LayerNorm):
        """Which might do anything."""

    layers = {
        nn.Linear(16, 4): True,
        nn.LayerNorm(16): True,
        nn.LayerNorm((8, 16)): False,
        nn.Conv1d(8, 8, 1): False,
        Own(16): False,
    }
    for layer, apart in layers.items():
        given = Joining(eager_attention.served).cat([MEDIA, LAST], 1)
        got = eager_attention._Child(layer, None)(given)
        assert isinstance(got, Segments) == apart, layer
        expected = layer(torch.cat([MEDIA, LAST], 1))
        torch.testing.assert_close(computed(got), expected)
        if apart:
            torch.testing.assert_close(torch.cat(got.parts, 1), expected)


# What is refused.


def test_layers_that_are_not_plain_are_refused():
    model, _ = built("idefics2")
    model.model.connector.perceiver_resampler.layers[1].self_attn.k_proj.__class__ = Adapted
    (row,) = vlmops.patch(model).rows
    assert row.status == "refused"
    assert "k_proj: Adapted is a subclass with a forward of its own" in row.reason


def test_modules_that_were_changed_are_refused():
    model, _ = built("idefics")
    module = model.model.perceiver_resampler.blocks[0][0]
    module.forward = module.forward
    (row,) = vlmops.patch(model).rows
    assert "forward was replaced on the instance" in row.reason


@everywhere
def test_what_differs_is_refused(name, monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    real = eager_attention.perceiver_attention
    monkeypatch.setattr(
        eager_attention, "perceiver_attention", lambda *a, **more: real(*a, **more) * 1.01
    )
    model, _ = built(name)
    (row,) = vlmops.patch(model).rows
    assert "the numeric check failed" in row.reason


def test_heads_that_no_kernel_takes_are_refused():
    config = {"hidden_size": 64, "resampler_n_latents": 3, "resampler_depth": 1}
    config |= {"resampler_n_heads": 4, "resampler_head_dim": 12, "num_key_value_heads": 2}
    made = tiny.config_of("idefics2")
    made.perceiver_config = type(made.perceiver_config)(**config)
    model = type(tiny.build("idefics2"))(made)
    (row,) = vlmops.patch(model).rows
    assert "heads of 12 channels: the kernel takes multiples of 8 up to 256" in row.reason


def test_packed_attention_leaves_resamplers_to_this_op():
    model, _ = built("idefics2")
    places = list(packed_attention.find(model))
    assert not [p for p in places if "Perceiver" in getattr(p, "place", p).module]
