"""`vlmops.patch` with qformer_attention: Q-Formers through attention functions."""

import pytest
import torch
from dispatch import CountOps
from hf.checks import assert_agree, assert_gradients_agree, assert_left_alone
from hf.qformers import FAMILIES, FRAMES, INSTRUCTION, QUERIES, SITES, build, inputs

import vlmops
from vlmops.hf.rebind import ops_of
from vlmops.hf.sites import qformer_attention as site

OP, BACKWARD = "vlmops::qformer_attention", "vlmops::qformer_attention_backward"
READ = "aten::_local_scalar_dense"

pytestmark = pytest.mark.usefixtures("only_qformer_attention")
every = pytest.mark.parametrize("family", FAMILIES)
ways = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def run(model, batch, **more):
    return model(**batch, **more)


def gradients(model, batch):
    model.zero_grad()
    logits = run(model, batch).logits
    draw = torch.Generator().manual_seed(3)
    logits.backward(torch.randn(logits.shape, generator=draw).to(logits))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def attentions_of(model):
    return [m for m in model.modules() if site.OP in ops_of(m)]


@every
@ways
@pytest.mark.parametrize("padded", [(0, 0), (0, 2), (INSTRUCTION, 1)], ids=str)
def test_logits_agree(family, attention, padded):
    """Also where an instruction is nothing but padding."""
    model, batch = build(family, attention), inputs(family, padded)
    with torch.no_grad():
        expected = run(model, batch).logits
        report = vlmops.patch(model)
        with CountOps() as ran:
            logits = run(model, batch).logits
    assert_agree(logits, expected, "logits")
    assert report.counts == {site.OP: SITES}
    # Eager code is given masks to be added: those are its own business.
    masked = attention == "eager" and family != "blip_2" and any(padded)
    assert ran.counts[OP] == (2 if masked else SITES)


@every
@ways
def test_gradients_agree(family, attention):
    model, batch = build(family, attention), inputs(family)
    logits, grads = gradients(model, batch)
    vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == ran.counts[BACKWARD] > 0
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@every
def test_nothing_is_read_back(family):
    """Hugging Face itself looks whether a mask is all ones."""
    model, batch = build(family), inputs(family)
    with torch.no_grad():
        with CountOps() as theirs:
            run(model, batch)
        vlmops.patch(model)
        with CountOps() as ours:
            run(model, batch)
    assert ours.counts[READ] == theirs.counts[READ]


def test_queries_of_batch_1_serve_all_images():
    model = build("blip_2").qformer
    images = torch.randn(3, 5, 24)
    queries = torch.randn(1, QUERIES, 32)
    layer = model.encoder.layer[0].crossattention.attention
    with torch.no_grad():
        expected = layer(queries, encoder_hidden_states=images)[0]
        vlmops.patch(model)
        with CountOps() as ran:
            got = layer(queries, encoder_hidden_states=images)[0]
    assert ran.counts[OP] == 1
    assert_agree(got, expected, "of three images")


def test_a_qformer_stays_float32_in_a_bfloat16_model():
    """As transformers loads BLIP-2 in float16."""
    model = build("blip_2").bfloat16()
    model.qformer.float()
    model.query_tokens.data = model.query_tokens.data.float()
    batch = inputs("blip_2")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            logits = run(model, batch).logits
    assert ran.counts[OP] == SITES
    assert {p.dtype for p in model.qformer.parameters()} == {torch.float32}
    error = (logits.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < 0.02, "roundings of bfloat16 text layers"


@every
def test_dropout_in_training_is_the_models_own(family):
    model = build(family, attention_probs_dropout_prob=0.5)
    batch = inputs(family)
    report = vlmops.patch(model)
    assert str(report).count("drops some weights") == len(report.rows)
    with CountOps() as ran:
        run(model.train(), batch)
    assert ran.counts[OP] == 0
    with CountOps() as ran, torch.no_grad():
        run(model.eval(), batch)
    assert ran.counts[OP] == SITES


@every
def test_attention_weights_that_are_asked_for_are_there(family):
    model = build(family, "eager").qformer
    given = {"query_embeds": torch.randn(2, QUERIES, 32)}
    given["encoder_hidden_states"] = torch.randn(2, 5, 24)
    if family != "blip_2":
        given["input_ids"] = torch.randint(0, 50, (2, INSTRUCTION))
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        vlmops.patch(model)
        got = model(**given, output_attentions=True)
    for weights in ("attentions", "cross_attentions"):
        assert len(getattr(expected, weights)) > 0
        for theirs, ours in zip(getattr(expected, weights), getattr(got, weights), strict=True):
            assert torch.equal(ours, theirs)


@every
def test_generated_text_agrees(family):
    model, batch = build(family), inputs(family)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**batch, **options)
    vlmops.patch(model)
    with CountOps() as ran:
        got = model.generate(**batch, **options)
    assert torch.equal(got, expected)
    assert ran.counts[OP] == SITES, "once for the whole text"


def test_frames_count_as_a_batch():
    family = "instructblipvideo"
    model, batch = build(family), inputs(family)
    shapes = []
    vlmops.patch(model)
    for module in attentions_of(model):
        module.register_forward_hook(lambda _, given, out: shapes.append(out[0].shape[0]))
    with torch.no_grad():
        run(model, batch)
    assert shapes == [2 * FRAMES[family]] * SITES


@every
def test_twin_copies_and_pickles(family, tmp_path):
    _, restored = assert_left_alone(build(family), build(family), inputs(family), tmp_path)
    assert restored == SITES


@every
def test_qformer_compiles_to_one_graph(family):
    model = build(family)
    vlmops.patch(model)
    torch._dynamo.reset()
    images = torch.randn(2, 5, 24)
    layer = model.qformer.encoder.layer[0]
    hidden = torch.randn(2, QUERIES, 32)

    def call():
        return layer(hidden, None, images, query_length=QUERIES)

    with torch.no_grad():
        expected = call()
        assert_agree(torch.compile(call, fullgraph=True, backend="eager")(), expected, "compiled")


def test_masks_that_are_not_of_keys_alone_run_what_they_say():
    """A mask of queries by keys is one too; another for each head is the model's own business."""
    model = build("blip_2")
    layer = model.qformer.encoder.layer[1].attention.attention
    hidden = torch.randn(2, QUERIES, 32)
    by_query = torch.rand(2, 1, QUERIES, QUERIES) < 0.7
    by_query[..., 0] = True
    by_head = by_query.repeat(1, 2, 1, 1)
    by_head[:, 1] = True
    added = torch.where(by_query, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = [layer(hidden, mask)[0] for mask in (by_query, by_head, added)]
        vlmops.patch(model)
        for mask, theirs, calls in zip(
            (by_query, by_head, added), expected, (1, 0, 0), strict=True
        ):
            with CountOps() as ran:
                got = layer(hidden, mask)[0]
            assert ran.counts[OP] == calls
            assert_agree(got, theirs, "masked")
