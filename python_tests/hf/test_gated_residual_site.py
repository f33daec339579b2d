"""`vlmops.patch` with gated_residual: one pass for branch, gate, mask and residual."""

import inspect

import pytest
import torch
from dispatch import CountOps
from hf.checks import (
    assert_agree,
    assert_bfloat16_is_right,
    assert_gradients_agree,
    assert_twin_copies_and_pickles,
    batch_of,
    gradients,
)
from hf.tiny import build, row_of, run

import vlmops
from vlmops.hf import gates, lazy, targets
from vlmops.hf.gates import Gate, Rows
from vlmops.hf.lazy import StandIn
from vlmops.hf.sites import gated_residual as site

OP, BACKWARD = "vlmops::gated_residual", "vlmops::gated_residual_backward"
FAMILIES = ["mllama", "idefics"]
both = pytest.mark.parametrize("family", FAMILIES)
pytestmark = [
    pytest.mark.usefixtures("only_gated_residual"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]


def opened(family, *args, **options):
    """A model whose gates are open."""
    model = build(family, *args, **options)
    draw = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "gate" in name.rpartition(".")[2] or "alpha" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw))
    return model


def sites(model):
    places = targets.expected_places(model.config.model_type)
    (expected,) = [e for e in places if e.op == site.OP]
    return expected.path, expected.sites(model.config)


@both
def test_family_table_holds(family):
    model = build(family)
    (row,) = vlmops.patch(model).rows
    assert (row.path, row.sites, row.status) == (*sites(model), "patched")
    assert {row.status for row in vlmops.patch(model).rows} == {"already patched"}
    assert vlmops.unpatch(model) > 0


@both
def test_logits_agree(family):
    """Rows without an image, and text before it, too."""
    model = opened(family)
    batches = {name: batch_of(family, name) for name in ("several_images", "right_padded", "text")}
    with torch.no_grad():
        expected = {name: run(model, batch).logits for name, batch in batches.items()}
        vlmops.patch(model)
        for name, batch in batches.items():
            with CountOps() as ran:
                logits = run(model, batch).logits
            there = batch["attention_mask"].bool()
            assert_agree(logits[there], expected[name][there], name)
            reached = name != "text" or family == "idefics"
            assert ran.counts[OP] == (sites(model)[1] if reached else 0)


@both
def test_closed_gates_leave_text_as_it_is(family):
    """Bit for bit as Hugging Face has it."""
    model, batch = opened(family), batch_of(family, "several_images")
    for name, p in model.named_parameters():
        if "gate" in name.rpartition(".")[2] or "alpha" in name:
            p.data.zero_()
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        assert torch.equal(run(model, batch).logits, expected)


@both
def test_gradients_agree(family):
    model, batch = opened(family), batch_of(family, "several_images")
    logits, grads = gradients(model, batch)
    vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == ran.counts[BACKWARD] == sites(model)[1]
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@both
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant):
    if use_reentrant and "reentrant" in row_of(family).lacks:
        pytest.skip(row_of(family).lacks["reentrant"])
    model, batch = opened(family), batch_of(family, "several_images")
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
    dtypes = (torch.float32, torch.bfloat16)
    batch, batch16 = (batch_of(family, "several_images", d) for d in dtypes)
    model = opened(family, dtype=torch.bfloat16)
    assert_bfloat16_is_right(model, batch, batch16, OP, sites(model)[1])


@both
def test_dropout_comes_before_the_gate(family):
    """Of Idefics' layers in training; Mllama's have none."""
    model, batch = opened(family).train(), batch_of(family, "several_images")
    for module in model.modules():
        if type(module).__name__ == "IdeficsGatedCrossAttentionLayer":
            module.config = 0.5
    with torch.no_grad():
        torch.manual_seed(0)
        expected = run(model, batch, use_cache=False).logits
        vlmops.patch(model)
        torch.manual_seed(0)
        with CountOps() as ran:
            assert_agree(run(model, batch, use_cache=False).logits, expected, "logits")
    assert ran.counts[OP] == sites(model)[1]


@both
def test_twin_copies_and_pickles(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    assert 2 * restored == report.counts[site.OP]


@both
@pytest.mark.parametrize("changes", [{"SMALL": 1 << 18}, {}], ids=["small", "autocast"])
def test_what_runs_as_it_is(family, changes, monkeypatch):
    for name, value in changes.items():
        monkeypatch.setattr(site, name, value)
    model, batch = opened(family), batch_of(family, "several_images")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not changes):
        expected = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            assert torch.equal(run(model, batch).logits, expected)
    assert ran.counts[OP] == 0


def test_layers_compile_to_one_graph():
    model, batch = opened("mllama"), batch_of("mllama", "several_images")
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        torch._dynamo.reset()
        layer = model.model.language_model.layers[1]
        layer.compile(fullgraph=True, backend="eager")
        assert_agree(run(model, batch).logits, expected, "logits")


@both
def test_a_gate_that_is_replaced_is_the_one_that_is_used(family):
    model, batch = opened(family), batch_of(family, "several_images")
    vlmops.patch(model)
    layers = [m for m in model.modules() if hasattr(m, "cross_attn")]
    names = [n for n, _ in layers[0].named_parameters(recurse=False)]
    with torch.no_grad():
        for name in names:
            setattr(layers[0], name, torch.nn.Parameter(getattr(layers[0], name) * 2))
        ours = run(model, batch).logits
        vlmops.unpatch(model)
        assert_agree(ours, run(model, batch).logits, "logits")


def test_signatures_are_unchanged():
    model = build("mllama")
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    vlmops.patch(model)
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures


# Lazy tensors: what they do not follow is done with what they stand for.

X, Y = torch.randn(2, 1, 5, 8).unbind()
GATE = torch.randn(1)
MASK = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
STEPS = {
    "followed": (lambda x, y, g, m: x + g.tanh() * (m[..., None] * y), 1),
    "masked_fill": (
        lambda x, y, g, m: x + torch.tanh(g) * y.masked_fill((m == 0)[:, :, None], 0.0), 1),
    "no mask": (lambda x, y, g, m: x + g.tanh() * y, 1),
    "no tanh": (lambda x, y, g, m: x + g * y, 0),
    "twice": (lambda x, y, g, m: x + g.tanh().tanh() * y, 0),
    "the branch first": (lambda x, y, g, m: x + y * g.tanh(), 0),
    "two branches": (lambda x, y, g, m: x + (g.tanh() * y + g.tanh() * x), 0),
    "subtracted": (lambda x, y, g, m: x - g.tanh() * y, 0),
    "scaled": (lambda x, y, g, m: torch.add(x, g.tanh() * y, alpha=2.0), 0),
    "filled with something": (
        lambda x, y, g, m: x + g.tanh() * y.masked_fill((m == 0)[:, :, None], 3.0), 1),
    "a mask of other rows": (lambda x, y, g, m: x + g.tanh() * (m[:, 1:2, None] * y), 0),
    "a mask that counts": (lambda x, y, g, m: x * m.sum() + g.tanh() * y, 1),
    "where the mask is": (lambda x, y, g, m: x + torch.where(m[..., None] == 1, y, x), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_forward(name):
    steps, calls = STEPS[name]
    with torch.no_grad(), CountOps() as ran:
        got = steps(X, Y, Gate(GATE), Rows(MASK))
        expected = steps(X, Y, GATE, MASK)
    torch.testing.assert_close(lazy.computed(got), expected)
    assert ran.counts[OP] == calls


@pytest.mark.parametrize("other", ["gate", "branch"])
def test_other_dtypes_are_promoted_as_torch_does(other):
    y = Y.bfloat16() if other == "branch" else Y
    gate = GATE.bfloat16() if other == "gate" else GATE
    with CountOps() as ran:
        got, expected = X + Gate(gate).tanh() * y, X + gate.tanh() * y
    assert torch.equal(got, expected)
    assert ran.counts[OP] == 0


def test_masks_that_are_none_keep_their_meaning():
    model, batch = opened("mllama"), batch_of("mllama", "several_images")
    layer = model.model.language_model.layers[1]
    mask = torch.rand(1, 1, 6, 1)
    given = {
        "hidden_states": torch.randn(1, 6, 64), "cross_attention_mask": None,
        "cross_attention_states": torch.randn(1, 4, 64), "attention_mask": None,
        "full_text_row_masked_out_mask": mask,
    }  # fmt: skip
    with torch.no_grad():
        expected = layer(**given)
        vlmops.patch(model)
        assert_agree(layer(**given), expected, "fractions of a row")
    assert "pixel_values" in batch


def test_stand_ins_are_the_layer_but_for_its_gates():
    layer = torch.nn.Linear(3, 4)
    made = StandIn(layer, {"weight": Gate(layer.weight)})
    assert isinstance(made.weight, Gate)
    assert made.bias is layer.bias
    assert made.training


# What is refused.


def test_layers_that_do_something_else_with_a_gate_are_refused(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    monkeypatch.setattr(gates._Part, "followed", {torch.Tensor.tanh: gates._tanh})
    (row,) = vlmops.patch(build("mllama")).rows
    assert "does something else than to add a branch times cross_attn_attn_gate" in row.reason


def test_what_differs_is_refused(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    monkeypatch.setattr(gates, "gated_residual", lambda *a: vlmops.gated_residual(*a) * 1.01)
    (row,) = vlmops.patch(build("idefics")).rows
    assert "the numeric check failed: IdeficsGatedCrossAttentionLayer differs by" in row.reason


def test_layers_that_were_changed_are_refused():
    model = build("mllama")
    layer = model.model.language_model.layers[1]
    layer.forward = layer.forward
    (row,) = vlmops.patch(model).rows
    assert "forward was replaced on the instance" in row.reason
