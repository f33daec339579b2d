"""`vlmops.patch` with add_norm: sum and norm at the ends of BERT's blocks are one pass."""

import copy

import pytest
import torch
from dispatch import CountOps
from hf import qformers, tiny
from hf.checks import assert_agree, assert_gradients_agree, assert_left_alone
from torch import nn
from transformers.models.bert.modeling_bert import BertConfig, BertOutput, BertSelfOutput

import vlmops
from vlmops.hf import targets
from vlmops.hf.sites import add_norm as site

OP, BACKWARD = "vlmops::add_norm", "vlmops::add_norm_backward"
pytestmark = pytest.mark.usefixtures("only_add_norm")

# Family -> places that the report names, and their modules. With text, a Q-Former's layer has a
# feed-forward block for each of both.
PLACES = {
    "blip_2": {"attention.output": 3, "crossattention.output": 2, "output_query": 3},
    "instructblip": {
        "attention.output": 3, "crossattention.output": 2, "output_query": 3, "output": 3
    },
    "blip": {"attention.output": 2, "crossattention.output": 2, "output": 2},
}  # fmt: skip
PLACES["instructblipvideo"] = PLACES["instructblip"]
every = pytest.mark.parametrize("family", PLACES)


def build(family, **options):
    if family == "blip":
        return tiny.blip(**options)
    return qformers.build(family, **options)


def inputs(family):
    if family != "blip":
        return qformers.inputs(family)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (2, 7), generator=draw)
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw), "input_ids": ids}


def gradients(model, batch):
    model.zero_grad()
    logits = model(**batch).logits
    draw = torch.Generator().manual_seed(3)
    logits.backward(torch.randn(logits.shape, generator=draw).to(logits))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def block(kind=BertOutput, dropout=0.0):
    torch.manual_seed(0)
    made = kind(BertConfig(hidden_size=32, intermediate_size=48, hidden_dropout_prob=dropout))
    nn.init.normal_(made.LayerNorm.weight)
    nn.init.normal_(made.LayerNorm.bias)
    return made.eval()


def rows(made, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    widths = made.dense.in_features, made.dense.out_features
    return [torch.randn(2, 5, n, generator=draw).to(dtype) for n in widths]


@every
def test_places_and_outputs_and_gradients(family):
    model, batch = build(family), inputs(family)
    logits, grads = gradients(model, batch)
    report = vlmops.patch(model)
    assert {row.status for row in report.rows} == {"patched"}
    assert {row.path.partition(".layer.*.")[2]: row.sites for row in report.rows} == PLACES[family]
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    assert ran.counts[OP] == ran.counts[BACKWARD] == sum(PLACES[family].values())
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@every
def test_family_table_holds(family):
    model = build(family)
    found = {row.path: row.sites for row in vlmops.patch(model).rows}
    expected = [
        place
        for place in targets.expected_places(model.config.model_type)
        if place.op == site.OP and place.sites(model.config)
    ]
    named = {
        path: sites
        for path, sites in found.items()
        if any(path.endswith(place.path) for place in expected)
    }
    assert named == found
    for place in expected:
        (sites,) = {n for path, n in found.items() if path.endswith(place.path)}
        assert sites == place.sites(model.config)


@every
def test_twin_copies_and_pickles(family, tmp_path):
    _, restored = assert_left_alone(build(family), build(family), inputs(family), tmp_path)
    assert restored == sum(PLACES[family].values())


@pytest.mark.parametrize("kind", [BertSelfOutput, BertOutput])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_block_is_one_product_and_one_pass(kind, dtype):
    made = block(kind).to(dtype)
    x, residual = rows(made, dtype)
    with torch.no_grad():
        expected, exact = made(x, residual), copy.deepcopy(made).double()(x.double(), residual)
        vlmops.patch(made)
        for given in ((x, residual), (x,)):
            more = {} if len(given) == 2 else {"input_tensor": residual}
            with CountOps() as ran:
                got = made(*given, **more)
            assert ran.counts[OP] == 1
            assert ran.counts["aten::add"] == ran.counts["aten::native_layer_norm"] == 0
            assert got.dtype == dtype
            error = (got - exact).abs().max()
            assert error <= 1.5 * (expected - exact).abs().max() + 1e-6


def test_dropout_in_training_is_the_models_own():
    made = block(dropout=0.5)
    x, residual = rows(made)
    report = vlmops.patch(made)
    assert "in training with dropout its own code" in str(report)
    with CountOps() as ran:
        made.train()(x, residual)
    assert ran.counts[OP] == 0
    assert ran.counts["aten::native_dropout"] + ran.counts["aten::bernoulli_"] > 0
    with CountOps() as ran:
        made.eval()(x, residual)
        made.train()
        made.dropout.p = 0.0
        made(x, residual)
    assert ran.counts[OP] == 2


def _hook(which, child):
    def register(made):
        seen = []
        getattr(getattr(made, child), f"register_{which}")(lambda *given: seen.append(given))
        return seen

    return register


@pytest.mark.parametrize(
    "disturb",
    [_hook(which, child) for which in ("forward_hook", "forward_pre_hook",
                                       "full_backward_hook") for child in ("LayerNorm", "dropout")],
)  # fmt: skip
def test_hooks_see_what_hugging_face_would_have_given_them(disturb):
    made = block()
    x, residual = rows(made)
    vlmops.patch(made)
    seen = disturb(made)
    with CountOps() as ran:
        made(x.requires_grad_(), residual).sum().backward()
    assert ran.counts[OP] == 0
    assert len(seen) == 1


def test_hooks_on_all_modules_see_every_layer():
    made = block()
    vlmops.patch(made)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        made(*rows(made))
    finally:
        handle.remove()
    assert seen[:3] == [nn.Linear, nn.Dropout, nn.LayerNorm]


class Adapted(nn.Linear):
    """What an adapter puts in the place of a linear layer."""

    def forward(self, x):
        return super().forward(x) * 2


def test_linear_layers_that_others_adapt_are_called():
    """Before patching and after it."""
    made = block()
    x, residual = rows(made)
    made.dense.__class__ = Adapted
    expected = made(x, residual)
    vlmops.patch(made)
    with CountOps() as ran:
        assert_agree(made(x, residual), expected, "adapted")
    assert ran.counts[OP] == 1
    made.dense.__class__ = nn.Linear
    assert_agree(made(x, residual), block()(x, residual), "plain again")


def test_norms_that_others_replace_are_called():
    made = block()
    x, residual = rows(made)
    vlmops.patch(made)
    made.LayerNorm = nn.Identity()
    assert torch.equal(made(x, residual), made.dense(x) + residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_its_dtypes(dtype):
    for made in (block(), block().to(dtype)):
        x, residual = rows(made, made.dense.weight.dtype)
        residuals = {residual.dtype: residual, dtype: residual.to(dtype)}.values()
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected = [made(x, residual) for residual in residuals]
            vlmops.patch(made)
            with CountOps() as ran:
                results = [made(x, residual) for residual in residuals]
        assert ran.counts[OP] == 0
        for got, theirs in zip(results, expected, strict=True):
            assert got.dtype == theirs.dtype
            assert torch.equal(got, theirs)


def test_what_the_op_does_not_take_is_the_models_own():
    """A residual of another dtype, one that is broadcast, one of nothing but its shape."""
    made = block()
    x, residual = rows(made)
    vlmops.patch(made)
    for other in (residual.double(), residual[:1], residual[0, 0]):
        products = []
        handle = made.dense.register_forward_hook(lambda _, x, y, seen=products: seen.append(y))
        with CountOps() as ran:
            got = made(x, other) if other.dtype == residual.dtype else None
            if got is None:
                with pytest.raises(RuntimeError, match=r"dtype|type"):
                    made(x, other)
        handle.remove()
        assert ran.counts[OP] == 0
        assert len(products) == 1
        if got is not None:
            assert torch.equal(got, made.LayerNorm(made.dense(x) + other))
    with pytest.raises(RuntimeError, match="size of tensor"):
        made(x, residual[..., :7])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        made(x)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_is_small_is_the_models_own(recorded, monkeypatch):
    made = block()
    x, residual = rows(made)
    vlmops.patch(made)
    for small, calls in ((residual.numel() + 1, 0), (residual.numel(), 1)):
        monkeypatch.setattr(site, "SMALL_RECORDED" if recorded else "SMALL", small)
        with CountOps() as ran, torch.set_grad_enabled(recorded):
            made(x, residual)
        assert ran.counts[OP] == calls


def test_a_block_compiles_to_one_graph():
    made = block()
    x, residual = rows(made)
    with torch.no_grad():
        expected = made(x, residual)
        vlmops.patch(made)
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(
            made, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph
        )
        assert_agree(compiled(x, residual), expected, "compiled")
    assert len(graphs) == 1
    assert "vlmops" not in graphs[0], "torch's compiler joins sum and norm itself"


def test_meta_device():
    with torch.device("meta"):
        made = BertOutput(BertConfig(hidden_size=32, intermediate_size=48)).eval()
        x, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 32)
    vlmops.patch(made)
    assert made(x, residual).shape == residual.shape


class Like(nn.Module):
    """Layers of a block."""

    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(48, 32), nn.LayerNorm(32)
        self.dropout = nn.Dropout(0.0)


class PreNorm(Like):
    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x)) + residual


class Scaled(Like):
    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) * 0.5 + residual)


class Twice(Like):
    def forward(self, x, residual):
        return self.LayerNorm(self.dense(self.dropout(x)) + residual + residual)


class More(Like):
    def forward(self, x, residual, scale=1.0):
        return self.LayerNorm(self.dense(x) + residual)


class Notes(Like):
    """Does something beside."""

    def forward(self, x, residual):
        self.last = x
        return self.LayerNorm(self.dense(x) + residual)


class Other(Like):
    """The other way round, under other names."""

    def forward(self, residual, x):
        return self.LayerNorm(residual + self.dense(x))


class Renamed(Like):
    def forward(self, features, shortcut):
        return self.LayerNorm(shortcut + self.dropout(self.dense(features)))


@pytest.mark.parametrize("kind", [PreNorm, Scaled, Twice, More, Notes, Other])
def test_what_computes_something_else_is_no_place(kind):
    assert [row.status for row in vlmops.patch(kind()).rows] == ["not present"]


def test_blocks_that_nothing_names_are_found_by_what_they_do():
    made = Renamed()
    x, residual = rows(made)
    expected = made(x, residual)
    assert [row.status for row in vlmops.patch(made).rows] == ["patched"]
    assert_agree(made(features=x, shortcut=residual), expected, "renamed")


def test_places_that_cannot_be_patched_are_refused():
    hooked, doubles, own = block(), block().double(), block()
    hooked.LayerNorm.register_forward_hook(lambda *_: None)
    own.forward = own.forward
    reasons = ["hooks are registered", "float64", "forward was replaced on the instance"]
    for made, reason in zip((hooked, doubles, own), reasons, strict=True):
        (row,) = vlmops.patch(made).rows
        assert row.status == "refused"
        assert reason in row.reason


def test_what_differs_is_refused(monkeypatch):
    monkeypatch.setattr(site, "_finish", lambda h, residual, norm: norm(h + residual) + 0.001)
    site._checked.clear()
    (row,) = vlmops.patch(block()).rows
    assert "the numeric check failed" in row.reason
    site._checked.clear()
