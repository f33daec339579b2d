"""`vlmops.patch` with gated_cross_attention: no expanded mask, keys of images projected once."""

import copy
import gc
import inspect
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
from hf.tiny import build, run
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmops
from vlmops.hf import kept, media, seen, targets
from vlmops.hf.rebind import ops_of
from vlmops.hf.sites import gated_cross_attention as site
from vlmops.hf.sites import packed_attention

OP, BACKWARD = "vlmops::gated_cross_attention", "vlmops::gated_cross_attention_backward"
NORM = "vlmops::pixel_shuffle"
FAMILIES = ["mllama", "idefics"]

pytestmark = [
    pytest.mark.usefixtures("only_gated_cross_attention"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]
both = pytest.mark.parametrize("family", FAMILIES)
ways = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def layers_of(model):
    return [m for m in model.modules() if site.OP in ops_of(m) and hasattr(m, "q_proj")]


def sites(model):
    (expected,) = [e for e in targets.expected_places(model.config.model_type) if e.op == site.OP]
    return expected.path, expected.sites(model.config)


def keys_of(model, batch):
    if model.config.model_type == "mllama":
        images, tiles = batch["cross_attention_mask"].shape[2:]
        return images * tiles * model.model.vision_model.num_patches
    images = batch["image_attention_mask"].shape[2]
    if model.config.use_resampler:
        return images * model.config.perceiver_config.resampler_n_latents
    vision = model.config.vision_config
    return images * ((vision.image_size // vision.patch_size) ** 2 + 1)


def expanded(model, batch):
    """Shapes of masks, of logits, and of keys that are repeated for every head."""
    (rows, tokens), keys = batch["input_ids"].shape, keys_of(model, batch)
    config = model.config.get_text_config()
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shapes = [(rows, 1, tokens, keys), (rows, heads, tokens, keys)]
    if getattr(config, "num_key_value_heads", None) not in (None, heads):
        shapes.append((rows, heads, keys, dim))
    return shapes


@both
def test_family_table_holds(family):
    model = build(family)
    report = vlmops.patch(model)
    (row,) = report.rows
    assert (row.path, row.sites, row.status) == (*sites(model), "patched")
    assert {row.status for row in vlmops.patch(model).rows} == {"already patched"}
    assert vlmops.unpatch(model) > 0


@both
@ways
def test_logits_agree_and_no_mask_is_expanded(family, attention):
    """Text before the first image sees none of them; a row without an image sees none at all."""
    model = build(family, attention)
    batches = {name: batch_of(family, name) for name in ("several_images", "right_padded", "text")}
    with torch.no_grad():
        expected = {}
        for name, batch in batches.items():
            with Shapes() as theirs:
                expected[name] = run(model, batch).logits
            if name != "text":
                assert expanded(model, batch)[0] in theirs.shapes, "Hugging Face expands its mask"
        vlmops.patch(model)
        for name, batch in batches.items():
            with Shapes() as ours:
                logits = run(model, batch).logits
            there = batch["attention_mask"].bool()
            assert_agree(logits[there], expected[name][there], name)
            reached = name != "text" or family == "idefics"
            assert ours.counts[OP] == (sites(model)[1] if reached else 0)
            if name != "text":
                assert not set(expanded(model, batch)) & set(ours.shapes)


@both
def test_gradients_agree(family):
    model, batch = build(family), batch_of(family, "several_images")
    logits, grads = gradients(model, batch)
    vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == ran.counts[BACKWARD] == sites(model)[1]
    assert ran.counts[NORM] == 2 * sites(model)[1], "norms of q and k"
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant):
    if use_reentrant and "reentrant" in tiny.row_of(family).lacks:
        pytest.skip(tiny.row_of(family).lacks["reentrant"])
    model, batch = build(family), batch_of(family, "several_images")
    logits, grads = gradients(model, batch)
    vlmops.patch(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.train()
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[OP] == 2 * sites(model)[1]
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@both
def test_bfloat16_is_at_least_as_right_as_hugging_face(family):
    batch, batch16 = (
        batch_of(family, "several_images", d) for d in (torch.float32, torch.bfloat16)
    )
    model = build(family, dtype=torch.bfloat16)
    assert_bfloat16_is_right(model, batch, batch16, OP, sites(model)[1])


@both
def test_twin_copies_and_pickles(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    norms, kept_ = 2, {"mllama": 0, "idefics": 2}[family]
    assert restored == report.counts[site.OP] * (1 + norms + kept_) + 1  # and the decoder


@both
def test_autocast_and_inference_mode(family):
    model, batch = build(family), batch_of(family, "several_images")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch).logits
    assert ran.counts[OP] == sites(model)[1]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@both
def test_weights_that_are_asked_for_are_hugging_faces(family):
    model, batch = build(family, "eager"), batch_of(family, "several_images")
    expected = run(model, batch, output_attentions=True)
    vlmops.patch(model)
    ours = run(model, batch, output_attentions=True)
    assert_agree(ours.logits, expected.logits, "logits")
    for got, weights in zip(ours.attentions, expected.attentions, strict=True):
        assert_agree(got, weights, "weights")


@both
def test_hooks_see_what_hugging_face_would_have_given_them(family):
    """Of text that sees no image too, though nobody uses it."""
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    layer = layers_of(model)[0]
    outs = []
    layer.register_forward_hook(lambda _, __, out: outs.append(out[0]))
    with torch.no_grad():
        run(model, batch)
        vlmops.unpatch(model)
        run(model, batch)
    assert_agree(*outs, "what a hook sees")


@both
def test_another_implementation_that_is_selected_gets_the_mask(family):
    model, batch = build(family), batch_of(family, "several_images")
    masks = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    with torch.no_grad():
        expected = run(model, batch).logits
    vlmops.patch(model)
    layer = layers_of(model)[-1]
    layer.config = copy.copy(layer.config)
    layer.config._attn_implementation_internal = "mine"
    ALL_ATTENTION_FUNCTIONS["mine"] = mine
    try:
        with CountOps() as ran, torch.no_grad():
            assert_agree(run(model, batch).logits, expected, "logits")
        assert ran.counts[OP] == 0, "the decoder makes one mask for all of them"
        assert {m.shape for m in masks} == {expanded(model, batch)[0]}
    finally:
        del ALL_ATTENTION_FUNCTIONS["mine"]


def test_the_decoder_compiles_with_its_own_mask():
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        torch._dynamo.reset()
        compiled = torch.compile(model.model, backend="eager")
        given = {k: v for k, v in batch.items() if k != "labels"}
        assert_agree(model.lm_head(compiled(**given)[0]), expected, "compiled")


# Generation.


def generated(model, batch, **options):
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True} | options
    return run(model, batch, model.generate, **options, output_logits=True)


@both
@ways
@pytest.mark.parametrize("beams", [1, 3])
def test_steps_of_generation(family, attention, beams):
    model, batch = build(family, attention), batch_of(family, "left_padded")
    expected = generated(model, batch, num_beams=beams)
    vlmops.patch(model)
    with CountOps() as ran:
        got = generated(model, batch, num_beams=beams)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert_agree(ours, theirs, "logits")
    assert ran.counts[OP] == 4 * sites(model)[1]


@both
@ways
def test_prompts_that_come_in_chunks(family, attention):
    """The second has images of its own that text before it did not see."""
    model, batch = build(family, attention), batch_of(family, "several_images")
    tokens = ("input_ids", "image_attention_mask", "cross_attention_mask")

    def chunks():
        cache, made = DynamicCache(config=model.config), []
        given = {k: v for k, v in batch.items() if k not in (*tokens, "attention_mask")}
        for part in (slice(0, 9), slice(9, None)):
            cut = {k: batch[k][:, part] for k in tokens if k in batch}
            end = part.stop or batch["input_ids"].shape[1]
            cut["attention_mask"] = batch["attention_mask"][:, :end]
            if family == "mllama" and made:
                given = {}
            out = model(**cut, **given, past_key_values=cache)
            made.append(out.logits)
        return torch.cat(made, 1)

    with torch.no_grad():
        expected = chunks()
        vlmops.patch(model)
        with CountOps() as ran:
            ours = chunks()
    assert_agree(ours, expected, "logits")
    assert ran.counts[OP] == 2 * sites(model)[1]


def cross_products(model, batch):
    """How often Idefics' layers project visual tokens while four tokens are generated."""
    calls = []
    handles = [
        child.register_forward_hook(lambda m, given, _: calls.append(given[0].shape))
        for layer in model.model.gated_cross_attn_layers
        for child in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)
    ]
    generated(model, batch)
    for handle in handles:
        handle.remove()
    return len(calls)


def test_visual_tokens_are_projected_once(monkeypatch):
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    layers = len(model.model.gated_cross_attn_layers)
    assert cross_products(model, batch) == 4 * 2 * layers, "Hugging Face projects in each step"
    computed = []
    keeping = kept.keeping_class

    def counted(module, compute):
        def counting(self, x):
            computed.append(x.shape)
            return compute(self, x)

        return keeping(module, counting)

    monkeypatch.setattr(kept, "keeping_class", counted)
    vlmops.patch(model)
    generated(model, batch)
    of_images = [shape for shape in computed if shape[-2] == keys_of(model, batch)]
    assert len(of_images) == 3 * layers, "k, v and the norm of k, once"
    # Another batch in between, and the same one again: nothing is mixed up.
    other = batch_of("idefics", "left_padded")
    got = [generated(model, b).logits for b in (other, batch, other)]
    vlmops.unpatch(model)
    expected = [generated(model, b).logits for b in (other, batch, other)]
    for ours, theirs in zip(sum(got, ()), sum(expected, ()), strict=True):
        assert_agree(ours, theirs, "logits")


def steps(model, batch, change):
    """Two steps by hand; ``change(model, images)`` comes between them."""
    cache = DynamicCache(config=model.config)
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "image_attention_mask")}
    with torch.no_grad():
        out = model.model(**given, pixel_values=batch["pixel_values"], past_key_values=cache)
        images, made = out.image_hidden_states, []
        which = "perceiver_embeddings" if model.config.use_resampler else "image_encoder_embeddings"
        for _ in range(2):
            mask = given["attention_mask"] = torch.nn.functional.pad(
                given["attention_mask"], (0, 1), value=1
            )
            out = model.model(
                input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=cache,
                image_attention_mask=batch["image_attention_mask"][:, -1:], **{which: images},
            )  # fmt: skip
            made.append(out.last_hidden_state)
            images = change(model, images)
    return made


def in_place(_, images):
    images.mul_(1.5)
    return images


def elsewhere(_, images):
    return images * 0.5


def weights(model, images):
    for layer in model.model.gated_cross_attn_layers:
        layer.cross_attn.v_proj.weight.mul_(2.0)
    return images


@pytest.mark.parametrize("change", [in_place, elsewhere, weights])
def test_what_was_kept_is_not_used_for_something_else(change):
    batch = batch_of("idefics", "several_images")
    expected = steps(build("idefics"), batch, change)
    model = build("idefics")
    vlmops.patch(model)
    for ours, theirs in zip(steps(model, batch, change), expected, strict=True):
        assert_agree(ours, theirs, "a step")


def test_what_was_kept_is_of_the_dtype_that_is_asked_for():
    layer, x = torch.nn.Linear(8, 8).requires_grad_(False), torch.randn(1, 3, 8)
    layer.__class__ = kept.keeping_class(layer)
    later = types.SimpleNamespace(get_seq_length=lambda: 1)
    with kept.step_of(later):
        first = layer(x)
        assert layer(x) is first
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32
    assert layer(x) is not first


def test_what_was_kept_goes_with_the_images():
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    vlmops.patch(model)
    out = generated(model, batch)
    assert torch.isfinite(out.logits[-1]).all()
    del out
    gc.collect()
    assert not [m for m in kept._kept if m in set(model.modules())]


def test_training_keeps_nothing():
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    vlmops.patch(model)
    out = run(model, batch, past_key_values=DynamicCache(config=model.config))
    assert not [m for m in kept._kept if m in set(model.modules())]
    assert out.logits.requires_grad


class Doubled(torch.nn.Linear):
    """As adapters are: a linear layer with a forward of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def test_projections_of_another_class_run():
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    for layer in model.model.gated_cross_attn_layers:
        layer.cross_attn.v_proj.__class__ = Doubled
    expected = generated(model, batch).logits
    vlmops.patch(model)
    for ours, theirs in zip(generated(model, batch).logits, expected, strict=True):
        assert_agree(ours, theirs, "logits")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3, 5, 16), torch.bfloat16), ((3, 16), torch.float32)]
)
def test_norms_of_something_else_are_the_models_own(shape, dtype):
    model, x = build("mllama"), torch.randn(shape).to(dtype)
    norm = model.model.language_model.layers[1].cross_attn.q_norm
    expected = norm(x)
    vlmops.patch(model)
    with CountOps() as ran:
        got = norm(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert ran.counts[NORM] == 0


def test_hooked_projections_run():
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    projection = model.model.gated_cross_attn_layers[0].cross_attn.k_proj
    called = []
    projection.register_forward_hook(lambda *_: called.append(1))
    vlmops.patch(model)
    generated(model, batch)
    assert len(called) == 4


def test_hooks_that_come_later_run_in_each_step():
    """On what a projection made, not on what they made of it the step before."""
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    vlmops.patch(model)
    projection = model.model.gated_cross_attn_layers[0].cross_attn.v_proj
    projection.register_forward_hook(lambda _, __, out: out.mul_(1.5))
    ours = generated(model, batch).logits
    vlmops.unpatch(model)
    for got, theirs in zip(ours, generated(model, batch).logits, strict=True):
        assert_agree(got, theirs, "logits")


def test_each_generation_projects_anew():
    """Whatever became of weights in between, where no version counter sees it."""
    model, batch = build("idefics"), batch_of("idefics", "several_images")
    vlmops.patch(model)

    def twice():
        images, made = None, []
        for _ in range(2):
            given = {"perceiver_embeddings" if model.config.use_resampler else
                     "image_encoder_embeddings": images}  # fmt: skip
            given = {"pixel_values": batch["pixel_values"]} if images is None else given
            cache = DynamicCache(config=model.config)
            names = ("input_ids", "attention_mask", "image_attention_mask")
            given |= {name: batch[name] for name in names}
            out = model.model(**given, past_key_values=cache)
            images = out.image_hidden_states if images is None else images
            made.append(out.last_hidden_state)
            for layer in model.model.gated_cross_attn_layers:
                layer.cross_attn.v_proj.weight.data *= 1.5
        return made

    with torch.no_grad():
        before = {k: v.clone() for k, v in model.state_dict().items()}
        ours = twice()
        vlmops.unpatch(model)
        model.load_state_dict(before)
        for got, theirs in zip(ours, twice(), strict=True):
            assert_agree(got, theirs, "hidden states")


# What is refused.


def test_a_decoder_that_makes_another_mask_is_refused(monkeypatch):
    monkeypatch.setattr(packed_attention, "_checked", {})
    monkeypatch.setattr(seen.SeenImages, "tensor", lambda self: torch.zeros(1, 1, 4, 6))
    (row,) = vlmops.patch(build("idefics")).rows
    assert "makes another mask of the images that are seen" in row.reason


def test_a_step_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(packed_attention, "_checked", {})
    monkeypatch.delattr(seen.SeenImages, "expand")
    (row,) = vlmops.patch(build("idefics")).rows
    assert row.status == "refused"
    assert "IdeficsModel cannot be rehearsed" in row.reason


def test_seen_images_answer_as_their_mask():
    """What is not followed is done with the mask itself."""
    images = torch.tensor([[[True, False], [False, False], [True, True]]])
    mask = seen.SeenImages(images, 3, torch.float32)
    floats = mask.tensor()
    assert mask.shape == floats.shape == (1, 1, 3, 6)
    assert torch.equal(torch.softmax(mask, -1), torch.softmax(floats, -1))
    assert torch.equal(mask[0], floats[0])
    assert torch.equal((mask == 0.0).any(dim=-1), (floats == 0.0).any(dim=-1))
    assert torch.equal(mask == 1.0, floats == 1.0)


def test_signatures_are_unchanged():
    model = build("idefics")
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    vlmops.patch(model)
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures


def test_expanding_decoders_are_known_by_what_they_do():
    model = build("idefics")
    found = [
        type(m).__name__
        for m in model.modules()
        if inspect.isfunction(f := inspect.unwrap(type(m).forward)) and media.expands_images(f)
    ]
    assert found == ["IdeficsModel"]
