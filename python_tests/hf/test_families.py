"""What `vlmops.patch` promises and what it leaves as it was: every check on every family."""

import copy
import inspect
import io
import pathlib
import pickle
import time

import pytest
import torch
import transformers
from dispatch import CountOps
from hf.checks import (
    BATCHES,
    assert_agree,
    assert_gradients_agree,
    batch_of,
    gradients,
    image_features,
)
from hf.tiny import (
    FAMILIES,
    ROPES,
    TEXT,
    UNLISTED,
    build,
    config_of,
    inputs,
    row_of,
    run,
    stretched,
)

import vlmops
from vlmops.hf import rotary, targets

pytestmark = [
    pytest.mark.usefixtures("only_mrope"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]
everywhere = pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
with_towers = pytest.mark.parametrize(
    "family", [name for name in (*FAMILIES, *UNLISTED) if row_of(name).towers]
)


def skip_unless_able(family, check):
    """Of rows in which Hugging Face's own code fails a check."""
    if check in row_of(family).lacks:
        pytest.skip(row_of(family).lacks[check])


def counted(ran):
    """Calls of the op, and those of them that copied."""
    copies = ran.counts["vlmops::mrope"]
    return copies + ran.counts["vlmops::mrope_"], copies


@everywhere
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_agree(family, attention):
    row, model = row_of(family), build(family, attention)
    batches = {name: batch_of(family, name) for name in BATCHES}
    expected = {name: gradients(model, batch) for name, batch in batches.items()}
    report = vlmops.patch(model)
    assert report.counts["mrope"] == sum(row.places.values())
    for name, batch in batches.items():
        with CountOps() as ran:
            logits, grads = gradients(model, batch)
        calls, _ = row.calls(towers=name != "text", texts=1)
        assert counted(ran) == (calls, calls)
        backward = ("vlmops::mrope_backward", "vlmops::mrope_norm_backward")
        assert sum(ran.counts[name] for name in backward) == calls
        assert_agree(logits, expected[name][0], name)
        assert_gradients_agree(grads, expected[name][1])


@with_towers
def test_towers_agree(family):
    model, batch = build(family), batch_of(family, "several_images")

    def run_tower():
        model.zero_grad()
        features = image_features(model, batch)
        upstream = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
        features.backward(upstream)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return features.detach(), grads

    features, grads = run_tower()
    vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = run_tower()
    calls, _ = row_of(family).calls(towers=1, texts=0)
    assert counted(ran) == (calls, calls)
    assert_agree(ours, features, "features")
    assert_gradients_agree(our_grads, grads, at_least=10)
    with torch.no_grad(), CountOps() as ran:
        assert_agree(image_features(model, batch), features, "features in place")
    assert counted(ran) == row_of(family).calls(towers=1, texts=0)


@everywhere
@pytest.mark.parametrize("name", ["left_padded", "several_images"])
def test_greedy_generation_agrees(family, name):
    model, batch = build(family), batch_of(family, name)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    expected = run(model, batch, model.generate, **options)
    vlmops.patch(model)
    with CountOps() as ran:
        got = run(model, batch, model.generate, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == 6
    for step, (ours, theirs) in enumerate(zip(got.logits, expected.logits, strict=True)):
        assert_agree(ours, theirs, f"logits of step {step}")
    # Nothing requires grad or is recorded in generation: in place wherever it can be.
    assert counted(ran) == row_of(family).calls(towers=1, texts=6)


@everywhere
def test_positions_matter_in_these_models(family):
    """In each place, else the tests above would pass with any rotation."""
    model, batch = build(family), batch_of(family, "several_images")
    places = row_of(family).places
    with torch.no_grad():
        right = run(model, batch).logits
        for path in places:
            changed = copy.deepcopy(model)
            root = changed.get_submodule(path.split(".*")[0])
            for module in root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if rotary.is_rotary(module) and "original" not in name:
                        buffer.copy_(buffer.square() if buffer.is_complex() else buffer * 0.5)
            difference = (run(changed, batch).logits - right).abs().max() / right.abs().max()
            assert difference > 0.005, path


@everywhere
def test_bfloat16_is_at_least_as_right_as_hugging_face(family):
    dtypes = (torch.float32, torch.bfloat16)
    batch, batch16 = (batch_of(family, "several_images", dtype) for dtype in dtypes)
    model = build(family, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), batch).logits
        theirs = run(model, batch16).logits
        vlmops.patch(model)
        ours = run(model, batch16).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


@everywhere
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant):
    if use_reentrant:
        skip_unless_able(family, "reentrant")
    row, batch = row_of(family), batch_of(family, "several_images")
    logits, grads = gradients(build(family), batch)
    model = build(family)
    vlmops.patch(model)
    # Newer name first; transformers 5.17 has only the other.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.train()  # no dropout in these models; checkpointing runs in training mode only
    with CountOps() as ran:
        patched_logits, patched_grads = gradients(model, batch, use_cache=False)
    # Forward, and again in backward; the first time without a graph, so in place, if reentrant.
    calls, copies = row.calls(towers=1, texts=1)
    assert counted(ran) == (2 * calls, calls + copies if use_reentrant else 2 * calls)
    assert_agree(patched_logits, logits, "logits")
    assert_gradients_agree(patched_grads, grads)


@everywhere
def test_frozen_model_is_not_differentiated(family):
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    model.requires_grad_(False)
    with CountOps() as ran:
        run(model, batch)
    assert counted(ran) == row_of(family).calls(towers=1, texts=1)


@everywhere
def test_save_pretrained_round_trip(family, tmp_path):
    model, batch = build(family), batch_of(family, "several_images")
    keys = list(model.state_dict())
    vlmops.patch(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        logits = run(model, batch).logits
    model.save_pretrained(tmp_path)
    attention = model.config._attn_implementation
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert vlmops.unpatch(loaded) == 0
    with torch.no_grad():
        assert_agree(run(loaded, batch).logits, logits, "reloaded")
        vlmops.patch(loaded)
        assert torch.equal(run(loaded, batch).logits, logits)


@everywhere
def test_twin_is_untouched_and_unpatch_restores_every_bit(family):
    model, twin, batch = build(family), build(family), batch_of(family, "several_images")
    logits, grads = gradients(twin, batch)
    classes = [type(m) for m in model.modules()]
    config = copy.deepcopy(model.config)
    vlmops.patch(model)
    run(model, batch)
    again, grads_again = gradients(twin, batch)
    assert torch.equal(again, logits)
    assert all(torch.equal(grads_again[n], g) for n, g in grads.items())
    assert vlmops.unpatch(model) > sum(row_of(family).places.values())
    assert [type(m) for m in model.modules()] == classes
    assert model.config == config
    restored, grads_restored = gradients(model, batch)
    assert torch.equal(restored, logits)
    assert all(torch.equal(grads_restored[n], g) for n, g in grads.items())


@everywhere
def test_patching_again_and_copies_change_nothing(family):
    model, batch = build(family), batch_of(family, "several_images")
    report = vlmops.patch(model)
    with torch.no_grad():
        logits = run(model, batch).logits
        for patched in (model, copy.deepcopy(model)):
            again = vlmops.patch(patched)
            assert again.counts == report.counts
            assert {row.status for row in again.rows} <= {"already patched", "refused"}
            assert torch.equal(run(patched, batch).logits, logits)


@everywhere
def test_pickles_load_without_vlmops(family):
    """Pickled, a model is Hugging Face's again."""
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    pickled, buffer = pickle.dumps(model), io.BytesIO()
    torch.save(model, buffer)
    assert b"vlmops" not in pickled
    assert b"vlmops" not in buffer.getvalue()
    buffer.seek(0)
    with torch.no_grad():
        logits = run(model, batch).logits
        for plain in (pickle.loads(pickled), torch.load(buffer, weights_only=False)):
            assert vlmops.unpatch(plain) == 0
            assert_agree(run(plain, batch).logits, logits, "loaded")


@everywhere
def test_outputs_that_are_asked_for_are_still_there(family):
    model, batch = build(family, "eager"), batch_of(family, "several_images")
    ask = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = run(model, batch, **ask)
        vlmops.patch(model)
        got = run(model, batch, **ask)
    assert len(got.hidden_states) == len(expected.hidden_states) > 0
    assert len(got.attentions) == len(expected.attentions) > 0
    for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
        assert_agree(ours, theirs, "attention weights")


@everywhere
def test_signatures_are_unchanged_and_unknown_kwargs_pass(family):
    model, batch = build(family), batch_of(family, "text")
    before = [inspect.signature(m.forward) for m in model.modules()]
    vlmops.patch(model)
    assert [inspect.signature(m.forward) for m in model.modules()] == before
    run(model, batch, an_argument_of_tomorrow=1)


@everywhere
def test_autocast_and_inference_mode(family):
    skip_unless_able(family, "autocast")
    model, batch = build(family), batch_of(family, "several_images")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model)
        ours = run(model, batch).logits
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


# One family of each language model.
DECODERS = {row_of(n).text.get("model_type", n): n for n in (*FAMILIES, *UNLISTED)}


@pytest.mark.parametrize("family", DECODERS.values())
def test_decoder_compiles_to_one_graph(family):
    skip_unless_able(family, "compile")
    model = build(family)
    vlmops.patch(model)
    decoder = model.get_submodule(row_of(family).decoder)
    torch._dynamo.reset()  # what other families have compiled of the same code counts as recompiles
    embeds = torch.randn(2, 9, TEXT["hidden_size"])
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        ours, theirs = (
            f(inputs_embeds=embeds, use_cache=False).last_hidden_state for f in (compiled, decoder)
        )
    assert_agree(ours, theirs, "compiled")


@everywhere
def test_family_table_holds(family):
    """A site that rots with a new transformers turns this red; so does one that appears."""
    row, model = row_of(family), build(family)
    report = vlmops.patch(model)
    assert {r.path: r.sites for r in report.rows if r.status == "patched"} == row.places
    refused = {r.path: r.reason for r in report.rows if r.status == "refused"}
    assert refused.keys() == row.refused.keys()
    assert all(reason in refused[path] for path, reason in row.refused.items())
    expected = targets.expected_places(model.config.model_type)
    expected = [place for place in expected if place.op == "mrope"]
    if family in UNLISTED:
        assert not expected
    elif not row.in_5_17 or not transformers.__version__.startswith("5.17."):
        present = {place.path: n for place in expected if (n := place.sites(model.config))}
        assert present == row.places


@pytest.mark.parametrize("family", UNLISTED)
def test_unlisted_families_are_named_nowhere(family):
    """So what works there was found by probing."""
    package = pathlib.Path(vlmops.__file__).parent
    text = "\n".join(path.read_text().lower() for path in package.rglob("*.py"))
    stem = row_of(family).architecture.removesuffix("ForConditionalGeneration").lower()
    assert "qwen2_vl" in text
    assert family not in text
    assert stem not in text


@everywhere
def test_meta_device(family):
    config = config_of(family)
    with torch.device("meta"):
        model = getattr(transformers, row_of(family).architecture)(config)
    assert vlmops.patch(model).counts["mrope"] == sum(row_of(family).places.values())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava"])
def test_a_model_of_real_size_is_patched_at_once(family):
    real = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    }
    section = {"qwen2_vl": {"mrope_section": [16, 24, 24]}}.get(family, {})
    real["rope_parameters"] = {**row_of(family).text["rope_parameters"], **section}
    if family == "qwen3_vl":
        real |= {"head_dim": 128}
        real["rope_parameters"]["mrope_section"] = [24, 20, 20]
    with torch.device("meta"):
        model = getattr(transformers, row_of(family).architecture)(config_of(family, **real))
    start = time.perf_counter()
    report = vlmops.patch(model)
    assert time.perf_counter() - start < 2
    assert report.rows[-1].sites == 28
    assert vlmops.unpatch(model) > 28


@everywhere
@pytest.mark.parametrize("rope", ROPES)
def test_rope_types(family, rope):
    """Below and above the trained length in turn: some types change their frequencies then."""
    skip_unless_able(family, rope)
    model = build(family, **stretched(family, rope))
    plain = copy.deepcopy(model)
    assert vlmops.patch(model).counts["mrope"] == sum(row_of(family).places.values())
    with torch.no_grad():
        for length in (9, 40, 9, 60, 12):
            batch = inputs(family, [[length]])
            expected = run(plain, batch).logits
            assert_agree(run(model, batch).logits, expected, f"{length} tokens")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_pixtral", "llama4"])
def test_towers_compile(family):
    """To one graph where Hugging Face's own code does: others read sizes back to the host."""
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = image_features(model, batch)
        for path in row_of(family).towers:
            model.get_submodule(path).compile(fullgraph=family == "llama4", backend="eager")
        assert_agree(image_features(model, batch), expected, "compiled")


class WideTensors(CountOps):
    """Also keeps the shapes of floating tensors with a row for each token and no heads."""

    def __init__(self, tokens, head_dim):
        super().__init__()
        self._widths = {(tokens, head_dim), (tokens, head_dim // 2)}
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and self._owns(tensor):
                self.found.append((func._schema.name, list(tensor.shape)))
        return out

    def _owns(self, tensor):
        shape = [size for size in tensor.shape if size > 1]
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_floating_point():  # Qwen2.5-VL sorts the bits of frequencies by windows
            return False
        return tuple(shape) in self._widths and tensor.untyped_storage().nbytes() >= size


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("part", ["tower", "decoder"])
def test_no_cosine_is_computed_and_nothing_is_kept_for_each_token(family, part):
    model, batch = build(family), batch_of(family, "several_images")
    tokens, head_dim = (len(batch["pixel_values"]), 20) if part == "tower" else (57, 16)
    embeds = torch.randn(1, 57, 64)
    decoder = model.model.language_model

    def seen():
        with torch.no_grad(), WideTensors(tokens, head_dim) as ran:
            if part == "tower":
                image_features(model, batch)
            else:
                decoder(inputs_embeds=embeds, use_cache=False)
        return ran.counts["aten::cos"] + ran.counts["aten::sin"], ran.found

    trigonometry, found = seen()
    assert trigonometry == 2
    assert found
    vlmops.patch(model)
    assert seen() == (0, [])
