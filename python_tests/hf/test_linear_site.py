"""`vlmops.patch` with linear layers: same outputs and gradients, and only what may be replaced."""

import copy
import functools
import inspect
import pickle
from unittest.mock import ANY

import pytest
import torch
from dispatch import CountOps
from hf import checks
from hf.tiny import FAMILIES, build, inputs, row_of, run
from torch import nn

import vlmops
from vlmops.hf.sites import linear as site
from vlmops.ops import linear as ways
from vlmops.ops import linear_tuning
from vlmops.ops.linear import FROM_ROWS

ONEDNN = "mkldnn::_linear_pointwise"
BATCH = [[3, (4, 6), 5, (8, 4), 2]]
families = pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch):
    """Tiny weights gain nothing; nothing is measured."""

    def always(dtype, n, k):
        return (True,) * len(FROM_ROWS)

    monkeypatch.setattr(ways, "wins", always)
    monkeypatch.setattr(linear_tuning, "wins", always)


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def gradients(model, batch, **kwargs):
    model.zero_grad()
    logits = run(model, batch, **kwargs).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(upstream.to(logits.dtype))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_agree(got, expected, what, tolerance=2e-5):
    error = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < tolerance, f"{what}: relative error {error:.3g}"


def the_row(report, status):
    (row,) = [r for r in report.rows if r.op == "linear" and r.status == status]
    return row


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_agree(family, checkpointing):
    model, batch = build(family), inputs(family, BATCH)
    logits, grads = gradients(model, batch)
    if checkpointing:
        # Newer name first; transformers 5.17 has only the other.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
    report = vlmops.patch(model, ops=["linear"])
    assert report.counts == {"linear": len(linears(model))}
    with CountOps() as ran:
        patched, patched_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[ONEDNN] >= report.counts["linear"]
    assert_agree(patched, logits, "logits")
    assert patched_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert_agree(patched_grads[name], grad, name)


@families
def test_every_site_that_is_reported_runs(family):
    model, batch = build(family), inputs(family, BATCH)
    report = vlmops.patch(model, ops=["linear"])
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert ran.counts[ONEDNN] == report.counts["linear"]
    row = the_row(report, "patched")
    assert (row.module, row.sites, row.backend) == ("Linear", len(linears(model)), "oneDNN")


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_panels_are_at_least_as_right_as_hugging_face(family, dtype):
    model = build(family, dtype=dtype)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), inputs(family, BATCH)).logits
        theirs = run(model, inputs(family, BATCH, dtype)).logits
        report = vlmops.patch(model, ops=["linear"])
        ours = run(model, inputs(family, BATCH, dtype)).logits
    assert the_row(report, "patched").backend == "float32 panels"
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


def test_layers_that_another_op_took_are_not_its():
    """Idefics' projections of images are kept, by the quicker product where there is one."""
    model = build("idefics")
    report = vlmops.patch(model)
    assert "already patched" not in {row.status for row in report.rows}
    assert "patched" not in {row.status for row in vlmops.patch(model).rows}


@families
def test_with_mrope_rotation_stays_in_place(family):
    """What a patched projection returns is as fresh as what F.linear returns."""
    model, batch = build(family), inputs(family, BATCH)
    report = vlmops.patch(model)
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert ran.counts["vlmops::mrope_"] == report.counts["mrope"] > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_mrope_logits_and_gradients_agree(family):
    """What `vlmops.patch(model)` does by default."""
    model, batch = build(family), checks.batch_of(family, "several_images")
    expected, grads = checks.gradients(model, batch)
    report = vlmops.patch(model)
    patches, shuffles, projectors = (
        sum(r.sites for r in report.rows if r.op == op and r.status == "patched")
        for op in ("patch_embed", "pixel_shuffle", "mlp_projector")
    )
    rotations = sum(row_of(family).places.values())
    crops = int(family == "phi4_multimodal")
    counts = {"mrope": rotations, "patch_embed": patches, "pixel_shuffle": shuffles}
    counts |= {"hd_transform": crops, "mlp_projector": projectors}
    counts |= dict.fromkeys(("packed_attention", "linear"), ANY)
    counts |= dict.fromkeys(("gated_cross_attention", "gated_residual"), ANY)
    counts |= dict.fromkeys(("add_norm", "perceiver_attention", "qformer_attention"), ANY)
    assert report.counts == counts
    with CountOps() as ran:
        got, our_grads = checks.gradients(model, batch)
    assert ran.counts[ONEDNN] > 0
    assert ran.counts["vlmops::patch_embed"] == patches
    # What lays out crops projects them too, and is one site.
    assert bool(ran.counts["vlmops::mlp_projector"]) == bool(projectors + crops)
    assert ran.counts["vlmops::hd_transform"] == crops
    checks.assert_agree(got, expected, family)
    checks.assert_gradients_agree(our_grads, grads)


def test_an_op_without_a_site_leaves_the_others_unpatched():
    model = nn.Sequential(nn.Linear(8, 8))
    for call in (vlmops.patch, lambda *args, **kw: vlmops.patched(*args, **kw).__enter__()):
        with pytest.raises(ValueError, match="'mrope' has no site"):
            call(model, ops=["linear", "mrope"])
        assert type(model[0]) is nn.Linear


def test_unpatch_leaves_classes_that_others_put_on_top():
    model = nn.Sequential(nn.Linear(8, 8))
    vlmops.patch(model, ops=["linear"])
    x = torch.randn(2, 8)
    expected = model(x)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(RuntimeError, match="class of a Linear was replaced"):
        vlmops.unpatch(model)
    torch.testing.assert_close(model(x), expected)


@families
def test_greedy_generation_agrees(family):
    model, batch = build(family), inputs(family, BATCH)

    def generate():
        model.model.rope_deltas = None
        return model.generate(**batch, max_new_tokens=8, do_sample=False)

    expected = generate()
    vlmops.patch(model, ops=["linear"])
    assert torch.equal(generate(), expected)


def test_unpatch_restores_and_patching_is_idempotent():
    model, batch = build("qwen2_vl"), inputs("qwen2_vl", BATCH)
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    with torch.no_grad():
        before = run(model, batch).logits
    count = vlmops.patch(model, ops=["linear"]).counts["linear"]
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures
    assert all(type(m).__name__ == "Linear" and type(m) is not nn.Linear for m in linears(model))
    again = vlmops.patch(model, ops=["linear"])
    assert again.counts == {"linear": count}
    assert [r.status for r in again.rows] == ["already patched"]
    assert vlmops.patch(model, ops=["mrope"]).counts == {"mrope": 5}
    assert vlmops.unpatch(model) == count + 7
    assert all(type(m) is nn.Linear for m in linears(model))
    with torch.no_grad():
        assert torch.equal(run(model, batch).logits, before)


def test_other_ops_leave_linears_alone():
    model = build("qwen2_vl")
    vlmops.patch(model, ops=["mrope"])
    assert all(type(m) is nn.Linear for m in linears(model))


def test_copies_and_pickles():
    model = nn.Sequential(nn.Linear(4, 3))
    vlmops.patch(model)
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    data = pickle.dumps(model)
    assert b"vlmops" not in data
    assert type(pickle.loads(data)[0]) is nn.Linear


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer, register):
    getattr(layer, register)(lambda *_: None)
    return layer


def replaced(layer):
    layer.forward = functools.partial(layer.forward)
    return layer


def with_subclass_weight(layer):
    class Sharded(torch.Tensor):
        pass

    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Sharded))
    return layer


def with_plain_weight(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


REFUSED = {
    "subclass": (lambda layer: Scaled(4, 3), "Scaled is a subclass"),
    "parametrized": (
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        "ParametrizedLinear is a subclass",
    ),
    "weight_norm": (with_plain_weight, "of type Tensor, not plain parameters"),
    "sharded": (with_subclass_weight, "of type Sharded, not plain parameters"),
    "float64": (lambda layer: layer.double(), "no faster way is known for weights of torch.float6"),
    "offloaded": (replaced, "its forward was replaced on the instance"),
    **{
        register: (functools.partial(hooked, register=register), "hooks are registered on it")
        for register in (
            "register_forward_pre_hook",
            "register_forward_hook",
            "register_full_backward_pre_hook",
            "register_full_backward_hook",
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    change, reason = REFUSED[name]
    layer = change(nn.Linear(4, 3))
    kind = type(layer)
    model = nn.Sequential(layer, nn.Linear(3, 2))
    report = vlmops.patch(model)
    assert report.counts["linear"] == 1
    assert reason in the_row(report, "refused").reason
    assert type(model[0]) is kind


def test_refuses_a_class_that_another_library_wrapped(monkeypatch):
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, x))
    with pytest.raises(ValueError, match=r"Linear.forward was replaced by .*test_linear_site"):
        vlmops.patch(nn.Sequential(nn.Linear(4, 3)), ops=["linear"])


def test_refuses_what_fails_the_check(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    wrong = ways._onednn
    monkeypatch.setattr(ways, "_onednn", lambda x, w, b, a: wrong(x, w, None, a))
    model = nn.Sequential(nn.Linear(4, 3))
    report = vlmops.patch(model)
    assert "the numeric check failed: products over 4" in the_row(report, "refused").reason
    assert vlmops.patch(model, verify=False).counts["linear"] == 1


def test_one_row_for_each_reason():
    layers = [Scaled(4, 4), nn.Linear(4, 4), Scaled(4, 4), nn.Linear(4, 4).double()]
    report = vlmops.patch(nn.Sequential(*layers))
    rows = [(r.status, r.sites) for r in report.rows if r.op == "linear"]
    assert rows == [("patched", 1), ("refused", 2), ("refused", 1)]


def test_what_gains_nothing_is_left_alone(monkeypatch):
    monkeypatch.setattr(linear_tuning, "wins", lambda *_: (False,) * len(FROM_ROWS))
    model = nn.Sequential(nn.Linear(4, 3))
    report = vlmops.patch(model, ops=["linear"])  # asked for by name, and no error
    assert report.counts == {"linear": 0}
    assert the_row(report, "left alone").reason == "too small to gain"
    assert type(model[0]) is nn.Linear


def test_reasons_tell_measured_from_not_measured(monkeypatch):
    monkeypatch.setattr(site, "tune", lambda weights: list(weights))
    sizes = [(8, 4), (1024, 1024), (1024, 1024), (1024, 1032), (1024, 1040)]
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    key = torch.float32, 1040, 1024
    monkeypatch.setitem(ways.measured, key, (False,) * len(FROM_ROWS))

    def reasons(gains):
        monkeypatch.setattr(site, "gains", lambda dtype, n, k: (dtype, n, k) in gains)
        return {r.reason: r.sites for r in vlmops.patch(copy.deepcopy(model)).rows if r.sites}

    assert reasons([]) == {
        "measured: torch's own product is as fast here": 1,
        "not measured: the default for this machine is torch's own": 3,
        "too small to gain": 1,
    }
    assert reasons([key])[""] == 1
    other = torch.float32, 1024, 1024
    assert reasons([other])["not measured"] == 2
    assert reasons([key, other])["2 not measured"] == 3


def test_measures_what_has_values(monkeypatch):
    seen = []
    monkeypatch.setattr(site, "tune", lambda weights: seen.extend(weights))
    with torch.device("meta"):
        meta = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 3), Scaled(4, 4), meta)
    report = vlmops.patch(model)
    assert [w.data_ptr() for w in seen] == [model[0].weight.data_ptr()]
    assert report.counts["linear"] == 2


def test_hooks_that_come_later_run():
    model = nn.Sequential(nn.Linear(4, 3))
    vlmops.patch(model)
    seen = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model(torch.ones(2, 4))
    assert seen == [(2, 3)]


def test_tied_embeddings():
    """The head multiplies by the embedding's own parameter, also after it was changed."""
    model, batch = build("qwen2_vl", tie_word_embeddings=True), inputs("qwen2_vl", BATCH)
    model.lm_head.weight = model.get_input_embeddings().weight
    twin = copy.deepcopy(model)
    vlmops.patch(model, ops=["linear"])
    with torch.no_grad():
        for m in (model, twin):
            m.get_input_embeddings().weight.mul_(0.5)
        assert_agree(run(model, batch).logits, run(twin, batch).logits, "logits")


def test_compiles_to_one_graph():
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3))
    x = torch.randn(5, 8)
    expected = model(x)
    vlmops.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(x), expected, "compiled")
    with torch.no_grad():
        assert_agree(compiled(x), expected, "compiled without gradients")


def test_autocast():
    model, batch = build("qwen2_vl"), inputs("qwen2_vl", BATCH)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model, ops=["linear"])
        assert torch.equal(run(model, batch).logits, theirs)
