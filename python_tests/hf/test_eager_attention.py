"""`vlmops.patch` with qformer_attention where attention is written out: BLIP's text, Perceiver."""

import copy
import gc
import inspect
import io
import math
import pickle
import weakref

import pytest
import torch
import transformers
from dispatch import CountOps, Shapes
from hf import tiny
from hf.checks import assert_agree, assert_gradients_agree
from torch import nn
from torch.nn import functional

import vlmops
from vlmops.hf import eager_attention, eager_modules, targets
from vlmops.hf.eager_attention import Query, Weights
from vlmops.hf.lazy import computed
from vlmops.hf.rebind import ops_of

OP, BACKWARD = "vlmops::qformer_attention", "vlmops::qformer_attention_backward"
CAPTION, ANSWER, RETRIEVE = (
    f"BlipFor{name}"
    for name in ("ConditionalGeneration", "QuestionAnswering", "ImageTextRetrieval")
)
MIN = torch.finfo(torch.float32).min

pytestmark = pytest.mark.usefixtures("only_qformer_attention")


def words(pad="right", rows=2):
    """Token ids of texts of 7 and 4, and their mask."""
    ids = torch.randint(3, 99, (rows, 7), generator=torch.Generator().manual_seed(2))
    there = torch.ones_like(ids)
    there[1:, 4:] = 0
    if pad == "left":
        there = there.flip(1)
    return {"input_ids": torch.where(there == 1, ids, 0), "attention_mask": there}


def pixels(rows=2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    return torch.randn(rows, 3, 16, 16, generator=draw).to(dtype)


def caption(model, pad="right", **more):
    text = words(pad)
    dtype = next(model.parameters()).dtype
    logits = model(pixel_values=pixels(dtype=dtype), **text, **more).logits
    return logits[text["attention_mask"].bool()]


def answer(model, pad="right", **more):
    start = words()["input_ids"][:, :3]
    given = {"decoder_input_ids": start, "labels": start, **more}
    return model(pixel_values=pixels(), **words(pad), **given).loss


def matched(model, pad="right", **more):
    return model(pixel_values=pixels(), **words(pad), use_itm_head=True, **more).itm_score


def compared(model, pad="right", **more):
    return model(pixel_values=pixels(), **words(pad), use_itm_head=False, **more).itm_score


def classified(model, **more):
    draw = torch.Generator().manual_seed(3)
    return model(inputs=torch.randn(2, 3, 8, 8, generator=draw), **more).logits


def blip(name=CAPTION, **options):
    if name == ANSWER:  # its decoder attends to its encoder's text
        options = {"hidden_size": 48, "num_attention_heads": 6, **options}
    return tiny.blip(name, **options)


# Name -> model, how it is run, sites that the report counts, of which the run reaches.
MODELS = {
    "captions": (lambda **o: blip(**o), caption, 4, 4),
    "answers": (lambda **o: blip(ANSWER, **o), answer, 8, 8),
    "matches": (lambda **o: blip(RETRIEVE, **o), matched, 4, 4),
    "compares": (lambda **o: blip(RETRIEVE, **o), compared, 4, 2),
    "perceiver": (tiny.perceiver, classified, 4, 4),
}
everywhere = pytest.mark.parametrize("name", MODELS)
BLIP, PERCEIVER = ("captions", "perceiver")


def gradients(model, forward, **more):
    model.zero_grad()
    out = forward(model, **more)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out))
    return out.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def attention_of(model):
    return [m for m in model.modules() if "qformer_attention" in ops_of(m)]


@everywhere
def test_what_is_found(name):
    build, _, sites, _ = MODELS[name]
    model = build()
    report = vlmops.patch(model)
    assert {row.status for row in report.rows} == {"patched"}
    assert report.counts["qformer_attention"] == len(attention_of(model)) == sites
    assert {row.status for row in vlmops.patch(model).rows} == {"already patched"}
    assert vlmops.unpatch(model) == sites


@pytest.mark.parametrize("name", [CAPTION, ANSWER, RETRIEVE])
def test_family_table_holds(name):
    model = blip(name)
    rows = vlmops.patch(model).rows
    for place in targets.expected_places("blip"):
        if place.op == "qformer_attention":
            found = [row for row in rows if row.path.endswith(place.path)]
            assert found
            assert {row.sites for row in found} == {place.sites(model.config)}


@everywhere
@pytest.mark.parametrize("pad", ["right", "left"])
def test_outputs_and_gradients_agree(name, pad):
    build, forward, _, reached = MODELS[name]
    more = {} if name == PERCEIVER else {"pad": pad}
    if (name, pad) == (BLIP, "left"):
        reached -= 2  # a causal mask in which padding sees nothing, for which it sees everything
    model = build()
    expected, grads = gradients(model, forward, **more)
    vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = gradients(model, forward, **more)
    assert ran.counts[OP] == ran.counts[BACKWARD] == reached
    assert_agree(ours, expected, name)
    assert_gradients_agree(our_grads, grads)


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_no_weights_are_made(name):
    build, forward, *_ = MODELS[name]
    model = build(num_attention_heads=2) if name == BLIP else build(num_self_attention_heads=2)
    logits = {(2, 2, 7, 7), (2, 2, 7, 17), (2, 2, 6, 64), (2, 2, 6, 6), (2, 2, 1, 6)}
    with torch.no_grad():
        with Shapes() as theirs:
            forward(model)
        vlmops.patch(model)
        with Shapes() as ours:
            forward(model)
    assert logits & set(theirs.shapes)
    assert not logits & set(ours.shapes)


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_bfloat16_is_at_least_as_right_as_hugging_face(name):
    build, forward, _, reached = MODELS[name]
    model = build(dtype=torch.bfloat16)
    with torch.no_grad(), cast_pixels(model):
        exact = forward(copy.deepcopy(model).float())
        theirs = forward(model)
        vlmops.patch(model)
        with CountOps() as ran:
            ours = forward(model)
    assert ran.counts[OP] == reached
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


class cast_pixels:  # noqa: N801
    """For the length of a ``with`` block models take float32 pixels."""

    def __init__(self, model):
        self.model = type(model)

    def __enter__(self):
        self.forward = self.model.forward

        def forward(model, *args, **kwargs):
            dtype = next(model.parameters()).dtype
            kwargs = {
                k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in kwargs.items()
            }
            return self.forward(model, *args, **kwargs)

        self.model.forward = forward

    def __exit__(self, *_):
        self.model.forward = self.forward


@everywhere
def test_autocast_and_inference_mode(name):
    build, forward, _, reached = MODELS[name]
    model = build()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = forward(model)
        vlmops.patch(model)
        with CountOps() as ran:
            ours = forward(model)
    assert ran.counts[OP] == reached
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = blip(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model.vision_model.requires_grad_(True)
    expected, grads = gradients(model, caption)
    vlmops.patch(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.train()
    with CountOps() as ran:
        ours, our_grads = gradients(model, caption)
    assert ran.counts[OP] == 2 * 4
    assert_agree(ours, expected, "logits")
    assert_gradients_agree(our_grads, grads)


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_dropout_in_training_is_the_models_own(name):
    """Bit for bit, and the same weights are dropped."""
    build, forward, *_ = MODELS[name]
    model = build(attention_probs_dropout_prob=0.3).train()
    torch.manual_seed(0)
    expected, grads = gradients(model, forward)
    assert all("drops some weights" in row.note for row in places(model))
    vlmops.patch(model)
    torch.manual_seed(0)
    with CountOps() as ran:
        ours, our_grads = gradients(model, forward)
    assert ran.counts[OP] == 0
    assert torch.equal(ours, expected)
    assert all(torch.equal(our_grads[n], g) for n, g in grads.items())


def places(model):
    return list(eager_modules.find(model, "qformer_attention"))


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_what_is_small_is_the_models_own(name, monkeypatch):
    monkeypatch.setattr(eager_attention, "SMALL", 1 << 20)
    build, forward, *_ = MODELS[name]
    model = build()
    with torch.no_grad():
        expected = forward(model)
        vlmops.patch(model)
        with CountOps() as ran:
            assert torch.equal(forward(model), expected)
    assert ran.counts[OP] == 0


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_layers_compile_to_one_graph(name):
    build, forward, *_ = MODELS[name]
    model = build()
    with torch.no_grad():
        expected = forward(model)
        vlmops.patch(model)
        torch._dynamo.reset()
        for module in attention_of(model):
            if name == PERCEIVER or "crossattention" in path_of(model, module):
                module.compile(fullgraph=True, backend="eager")
        assert_agree(forward(model), expected, "compiled")


def path_of(model, module):
    return next(path for path, m in model.named_modules() if m is module)


@pytest.mark.parametrize("name", [BLIP, PERCEIVER])
def test_twin_copies_and_pickles(name):
    build, forward, sites, _ = MODELS[name]
    model, twin = build(), build()
    classes = [type(m) for m in model.modules()]
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = forward(twin)
        vlmops.patch(model)
        data, buffer = pickle.dumps(model), io.BytesIO()
        torch.save(model, buffer)
        assert b"vlmops" not in data + buffer.getvalue()
        assert vlmops.unpatch(pickle.loads(data)) == 0
        ours = forward(model)
        assert torch.equal(forward(twin), expected)
        assert list(model.state_dict()) == keys
        assert [inspect.signature(m.forward) for m in model.modules()] == signatures
        assert torch.equal(forward(copy.deepcopy(model)), ours)
        assert vlmops.unpatch(model) == sites
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(forward(model), expected)


def test_models_that_nothing_names_are_found_by_what_they_do():
    """GIT, whose decoder attends to an image and to the text before."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    tokens = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GitConfig(vision_config=vision, intermediate_size=48, **sizes, **tokens)
    model = tiny.drawn(transformers.GitForCausalLM(config))

    def forward(model):
        return model(pixel_values=pixels(), **words()).logits

    expected, grads = gradients(model, forward)
    assert vlmops.patch(model).counts["qformer_attention"] == 2
    with CountOps() as ran:
        ours, our_grads = gradients(model, forward)
    assert ran.counts[OP] == ran.counts[BACKWARD] == 2
    assert_agree(ours, expected, "logits")
    assert_gradients_agree(our_grads, grads)


# Generation.


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [CAPTION, ANSWER])
def test_generation(name, beams):
    """Image's keys come from the cache after the first step, which is `EncoderDecoderCache`'s."""
    model, text = blip(name), words()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    decoder, kept = model.text_decoder, []
    generate = decoder.generate
    decoder.generate = lambda **given: (
        kept.append(generate(**given, **options)) or kept[-1].sequences
    )

    def run():
        if name == CAPTION:
            return model.generate(pixel_values=pixels(), **{k: v.clone() for k, v in text.items()})
        return model.generate(pixel_values=pixels(), **text)

    expected = run()
    vlmops.patch(model)
    with CountOps() as ran:
        assert torch.equal(run(), expected)
    theirs, ours = (out.logits for out in kept)
    assert len(ours) == len(theirs) == 5
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_agree(a, b, f"step {step}")
    encoder = 4 if name == ANSWER else 0
    assert ran.counts[OP] == encoder + 5 * 4


def test_caches_hold_tensors():
    model = blip()
    vlmops.patch(model)
    image = torch.randn(2, 17, 48)
    with torch.no_grad():
        cache = model.text_decoder(
            **words(), encoder_hidden_states=image, use_cache=True
        ).past_key_values
    layers = (*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers)
    kinds = {type(t) for layer in layers for t in (layer.keys, layer.values)}
    assert kinds == {torch.Tensor}


# Whoever looks at weights, or at modules.


def test_weights_that_are_asked_for_are_hugging_faces():
    model = blip()
    given = {**words(), "encoder_hidden_states": torch.randn(2, 17, 48), "output_attentions": True}
    with torch.no_grad():
        expected = model.text_decoder(**given)
        vlmops.patch(model)
        with CountOps() as ran:
            ours = model.text_decoder(**given)
        assert ran.counts[OP] == 0
        for kind in ("attentions", "cross_attentions"):
            assert len(expected[kind]) == 2
            for got, weights in zip(ours[kind], expected[kind], strict=True):
                assert torch.equal(got, weights)
        del given["output_attentions"]  # hooks that collect them are still there
        with CountOps() as ran:
            model.text_decoder(**given)
    assert ran.counts[OP] == 4


def test_perceivers_weights_that_are_asked_for_are_hugging_faces():
    model = tiny.perceiver()
    inputs = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(inputs=inputs, output_attentions=True)
        vlmops.patch(model)
        ours = model(inputs=inputs, output_attentions=True)
    assert len(ours.attentions) == 2
    for got, weights in zip(
        (*ours.attentions, *ours.cross_attentions),
        (*expected.attentions, *expected.cross_attentions),
        strict=True,
    ):
        assert torch.equal(got, weights)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("which", ["itself", "query", "dropout", "any module"])
def test_hooks_see_what_hugging_face_would_have_given_them(kind, which):
    """Tensors, since the model's own code runs there."""
    model, seen = blip(), []
    vlmops.patch(model)
    layer = model.text_decoder.bert.encoder.layer[0]
    module = layer.attention.self
    states = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 17, 48, requires_grad=True)
    if which == "any module":
        register = {
            "forward": nn.modules.module.register_module_forward_hook,
            "backward": nn.modules.module.register_module_full_backward_hook,
        }[kind]
        handle = register(lambda *given: seen.append(given[-1]))
    else:
        watched = module if which == "itself" else getattr(module, which)
        register = {
            "forward": watched.register_forward_hook,
            "backward": watched.register_full_backward_hook,
        }[kind]
        handle = register(lambda *given: seen.append(given[-1]))
    try:
        with CountOps() as ran:
            layer(*states).sum().backward()
    finally:
        handle.remove()
    assert ran.counts[OP] == (0 if which == "any module" else 1)
    outs = [x for out in seen for x in (out if isinstance(out, tuple) else (out,))]
    assert outs
    assert all(x is None or type(x) is torch.Tensor for x in outs)


def test_weights_are_right_for_whoever_looks_at_them_later():
    """A hook of the module around, which gets them from a module that nobody watches."""
    model, looked = blip(), []
    layer = model.text_decoder.bert.encoder.layer[0]
    for part in (layer.attention, layer.crossattention):
        part.register_forward_hook(lambda _, __, out: looked.append(out[1].detach() * 1))
    with torch.no_grad():
        caption(model)
        vlmops.patch(model)
        with CountOps() as ran:
            caption(model)
    assert ran.counts[OP] == 4
    own, cross, ours, our_cross = looked
    assert torch.equal(ours, own)
    assert_agree(our_cross, cross, "weights of what the op made")


def test_weights_that_are_dropped_hold_no_memory():
    model = blip()
    vlmops.patch(model)
    module = attention_of(model)[0]
    with torch.no_grad():
        _, weights = module(torch.randn(2, 7, 32))
    assert isinstance(weights, Weights)
    of = weakref.ref(weights.scores.q)
    del weights
    gc.collect()
    assert of() is None


class Adapted(nn.Linear):
    """What LoRA does."""

    def forward(self, x):
        return super().forward(x) + functional.linear(self.dropout(x), self.more)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_that_others_adapt(when):
    model = blip()

    def adapt():
        for module in model.modules():
            if type(module).__name__ == "BlipTextSelfAttention":
                for child in (module.query, module.key, module.value):
                    child.__class__ = Adapted
                    child.more = nn.Parameter(torch.randn(child.weight.shape) * 0.1)
                    child.dropout = nn.Dropout(0.0)

    torch.manual_seed(7)
    if when == "before":
        adapt()
    vlmops.patch(model)
    if when == "after":
        adapt()
    with CountOps() as ran:
        ours, our_grads = gradients(model, caption)
    assert ran.counts[OP] == 4
    vlmops.unpatch(model)
    expected, grads = gradients(model, caption)
    assert_agree(ours, expected, "logits")
    assert_gradients_agree(our_grads, grads)
    assert any("more" in name for name in grads)


# Steps of a forward: what is not followed is done with the tensors themselves.


DRAW = torch.Generator().manual_seed(0)
Q, K, V = torch.randn(3, 2, 4, 5, 8, generator=DRAW)
PADDED = torch.zeros(2, 1, 1, 5)
PADDED[1, ..., 3:] = MIN
CAUSAL = torch.full((1, 1, 5, 5), MIN).triu(1)
ROWS = torch.zeros(2, 1, 5, 5)
ROWS[0, :, :, 4] = ROWS[1, :, 2, :2] = -torch.inf
NONE = torch.zeros(2, 1, 5, 5)
SOME = torch.randn(2, 1, 5, 5, generator=DRAW)
BIAS = SOME * torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
NOTHING = torch.zeros(2, 1, 5, 5)
NOTHING[0, :, 2] = MIN
HEADS = torch.zeros(2, 4, 5, 5)
HEADS[:, 1, :, 3:] = MIN


def written(q, k, v, mask=None):
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
    scores = scores if mask is None else scores + mask
    return torch.matmul(nn.Softmax(dim=-1)(scores), v)


def in_einsums(q, k, v):
    scores = torch.einsum("... i d, ... j d -> ... i j", q * 8**-0.5, k)
    weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def in_place(q, k, v):
    scores = q @ k.mT
    scores[..., 2:] = -1.0
    return scores.softmax(-1) @ v


def added_in_place(q, k, v):
    scores = q @ k.mT
    again = scores
    scores += SOME
    return again.softmax(-1) @ v


def divided_in_place(q, k, v):
    scores = q @ k.mT
    scores.div_(8)
    return scores.softmax(-1) @ v


def looked_at(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    assert weights.sum() > 0
    weights.mul_(2)
    return weights @ v


STEPS = {
    "written out": (written, 1),
    "einsums, stabilised": (in_einsums, 1),
    "operators": (lambda q, k, v: ((q @ k.transpose(2, 3)) * 0.5).softmax(-1) @ v, 1),
    "a number first": (lambda q, k, v: (0.5 * (q @ k.mT)).softmax(-1) @ v, 1),
    "scaled twice": (lambda q, k, v: (q * 2 @ k.mT / 3 * 2).softmax(-1) @ v, 1),
    "functions": (
        lambda q, k, v: torch.matmul(
            functional.dropout(functional.softmax(torch.mul(q.matmul(k.mT), 0.3), dim=-1), 0.0), v
        ), 1),
    "dropout in eval": (
        lambda q, k, v: functional.dropout((q @ k.mT).softmax(3), 0.5, training=False) @ v, 1),
    "q of one row": (lambda q, k, v: (q[:1] @ k.mT).softmax(-1) @ v, 0),
    "padding": (lambda q, k, v: written(q, k, v, PADDED), 1),
    "a mask first": (lambda q, k, v: (PADDED + q @ k.mT).softmax(-1) @ v, 1),
    "causal": (lambda q, k, v: written(q, k, v, CAUSAL), 1),
    "infinite": (lambda q, k, v: written(q, k, v, ROWS), 1),
    "all seen": (lambda q, k, v: written(q, k, v, NONE), 1),
    "a bias": (lambda q, k, v: written(q, k, v, SOME), 0),
    "a bias for some keys": (lambda q, k, v: written(q, k, v, BIAS), 0),
    "nothing seen": (lambda q, k, v: written(q, k, v, NOTHING), 0),
    "heads see different keys": (lambda q, k, v: written(q, k, v, HEADS), 0),
    "a mask of doubles": (lambda q, k, v: written(q, k, v.double(), PADDED.double()), 0),
    "a mask of booleans": (lambda q, k, v: written(q, k, v, PADDED == 0), 0),
    "a mask of fewer dimensions": (lambda q, k, v: written(q, k, v, CAUSAL[0, 0]), 0),
    "two masks": (lambda q, k, v: (q @ k.mT + PADDED + CAUSAL).softmax(-1) @ v, 0),
    "scaled once masked": (lambda q, k, v: ((q @ k.mT + PADDED) * -0.3).softmax(-1) @ v, 0),
    "two softmaxes": (lambda q, k, v: (q @ k.mT).softmax(-1).softmax(-1) @ v, 0),
    "over queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, 0),
    "over heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, 0),
    "in doubles": (lambda q, k, v: torch.softmax(q @ k.mT, -1, torch.float64) @ v.double(), 0),
    "in doubles by name": (
        lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float64) @ v.double(), 0),
    "another largest": (
        lambda q, k, v: ((q @ k.mT) - (k @ q.mT).amax(-1, keepdim=True)).softmax(-1) @ v, 0),
    "the largest of each key": (
        lambda q, k, v: ((s := q @ k.mT) - s.amax(-2, keepdim=True)).softmax(-1) @ v, 0),
    "weights first": (lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT, 0),
    "sharpened": (lambda q, k, v: ((q @ k.mT) ** 2).softmax(-1) @ v, 0),
    "capped": (lambda q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v, 0),
    "clamped": (lambda q, k, v: (q @ k.mT).clamp(max=1.0).softmax(-1) @ v, 0),
    "turned": (lambda q, k, v: (torch.relu(q) @ k.mT).softmax(-1) @ v, 0),
    "k first": (lambda q, k, v: (k @ q.mT).softmax(-1) @ v, 0),
    "weights of weights": (lambda q, k, v: (s := (q @ k.mT).softmax(-1)) @ (s @ v), 2),
    "other weights": (
        lambda q, k, v: torch.einsum("bhij,bhid->bhjd", (q @ k.mT).softmax(-1), v), 0),
    "values of another width": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v[..., :4], 0),
    "fewer keys": (lambda q, k, v: (q @ k[:, :, :3].mT).softmax(-1) @ v[:, :, :3], 1),
    "one head of keys": (lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1], 0),
    "written to": (in_place, 0),
    "added in place": (added_in_place, 0),
    "divided in place": (divided_in_place, 0),
    "looked at": (looked_at, 0),
    "doubles": (lambda q, k, v: (q.double() @ k.double().mT).softmax(-1) @ v.double(), 0),
    "no keys": (lambda q, k, v: (q @ k[:, :, :0].mT).softmax(-1) @ v[:, :, :0], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_forward(name):
    """Of a module whose q comes out as a stand-in; transposed and cut it is one, too."""
    steps, calls = STEPS[name]

    def run(wrap):
        q = wrap(Q.transpose(1, 2).flatten(2)).view(2, 5, 4, 8).permute(0, 2, 1, 3)
        return steps(q, K, V)

    with torch.no_grad():
        expected = run(lambda q: q)
        with CountOps() as ran:
            got = computed(run(lambda q: Query(q, eager_attention.served)))
    torch.testing.assert_close(got, expected)
    assert ran.counts[OP] == calls


def test_a_mask_that_learns_has_its_gradient():
    bias = torch.zeros(2, 1, 5, 5, requires_grad=True)
    out = written(Query(Q, eager_attention.served), K, V, bias)
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    expected = torch.autograd.grad(written(Q, K, V, bias).square().sum(), bias)[0]
    torch.testing.assert_close(grad, expected)
    assert expected.abs().max() > 0


def test_batches_of_one_query_are_not_expanded():
    q, seen = Q[:1], []

    def spy(*given):
        seen.append(given[0].shape)
        return eager_attention.served(*given)

    torch.testing.assert_close(written(Query(q, spy), K, V), written(q, K, V))
    assert seen == [q.shape]


@pytest.mark.parametrize("kind", ["floats", "booleans"])
def test_masks_are_looked_at_once(kind, monkeypatch):
    looks, look = [], eager_attention._look

    def counted(*given):
        looks.append(given)
        return look(*given)

    monkeypatch.setattr(eager_attention, "_look", counted)
    added = torch.zeros_like(PADDED)
    mask = added if kind == "floats" else added == 0

    def run(mask, added):
        out = eager_attention.served(Q, (K,), (V,), mask, 8**-0.5)
        assert_agree(out, written(Q, K, V, added), "attention")

    run(mask, added)
    run(mask, added)
    assert len(looks) == 1
    added.copy_(PADDED)
    mask.copy_(PADDED if kind == "floats" else PADDED == 0)
    run(mask, added)
    assert len(looks) == 2
    of = weakref.ref(mask)
    looks.clear()
    del mask, added
    gc.collect()
    assert of() is None, "what is known of a mask goes with it"


def test_products_that_autocast_casts_are_the_models_own():
    with torch.autocast("cpu", torch.bfloat16), CountOps() as ran:
        for q, k, v in ((Q, K, V), (Q, K.bfloat16(), V), (Q.bfloat16(), K, V)):
            got = (Query(q, eager_attention.served) @ k.mT).softmax(-1) @ v
            assert torch.equal(got, (q @ k.mT).softmax(-1) @ v)
    assert ran.counts[OP] == 0


def test_errors_are_torchs():
    scores = Query(Q, eager_attention.served) @ K.mT
    with pytest.raises(RuntimeError, match="Double"):
        _ = scores.softmax(-1, dtype=torch.float64) @ V
    with pytest.raises(RuntimeError, match="size"):
        _ = scores.softmax(-1) @ V[:, :, :3]


# What is refused.


def test_heads_that_no_kernel_takes_are_refused():
    rows = vlmops.patch(tiny.perceiver("PerceiverForMaskedLM", qk_channels=32, v_channels=64)).rows
    assert {row.status for row in rows} == {"refused"}
    assert "heads of 16 channels for q and k, of 32 for v: the kernel takes one width" in str(rows)
    rows = vlmops.patch(blip(num_attention_heads=8)).rows
    assert {row.status for row in rows} == {"refused"}
    assert "heads of 4 channels: the kernel takes multiples of 8 up to 256" in str(rows)


def test_models_of_doubles_are_refused():
    rows = vlmops.patch(blip(dtype=torch.float64)).rows
    assert {row.reason for row in rows} == {"no kernel for torch.float64"}


def test_modules_that_were_changed_are_refused():
    model = blip()
    module = model.text_decoder.bert.encoder.layer[0].attention.self
    module.forward = module.forward
    own, cross = vlmops.patch(model).rows
    assert "forward was replaced on the instance" in own.reason
    assert cross.status == "patched"


def test_what_differs_is_refused(monkeypatch):
    monkeypatch.setattr(eager_modules, "_checked", {})
    served = eager_attention.served
    monkeypatch.setattr(
        eager_attention, "served", lambda *a: None if (x := served(*a)) is None else x * 1.01
    )
    rows = vlmops.patch(blip()).rows
    assert {row.status for row in rows} == {"refused"}
    assert "the numeric check failed: BlipTextSelfAttention differs by" in rows[0].reason


def test_what_no_op_takes_is_refused(monkeypatch):
    monkeypatch.setattr(eager_modules, "_checked", {})
    monkeypatch.setattr(eager_attention, "served", lambda *_: None)
    rows = vlmops.patch(blip()).rows
    assert "does something else than attention when it is followed" in rows[0].reason


def test_meta_device():
    config = blip().config
    with torch.device("meta"):
        model = transformers.BlipForConditionalGeneration(config)
    assert vlmops.patch(model).counts["qformer_attention"] == 4
