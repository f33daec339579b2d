"""`vlmops.patch` with projectors: same outputs and gradients, only projectors, only what may be."""

import copy
import functools

import pytest
import torch
import transformers
from dispatch import CountOps
from hf.checks import (
    assert_agree,
    assert_gradients_agree,
    assert_twin_copies_and_pickles,
    batch_of,
    gradients,
)
from hf.tiny import FAMILIES, UNLISTED, build, config_of, row_of, run
from torch import nn
from transformers.models.aria.modeling_aria import AriaProjectorMLP
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

import vlmops
from vlmops import dispatch, survey
from vlmops.hf import projectors, targets
from vlmops.hf.sites import mlp_projector as site
from vlmops.ops import linear as ways

pytestmark = [
    pytest.mark.usefixtures("only_mlp_projector"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]

OP, BACKWARD = "vlmops::mlp_projector", "vlmops::mlp_projector_backward"
DEEPSTACK = "model.visual.deepstack_merger_list.0"
UNLISTED_PLACES = {
    "lighton_ocr": ["model.vision_projection"],
    "exaone4_5": ["model.visual.merger"],
    "minimax_m3_vl": ["model.multi_modal_projector"],
    "lfm2_vl": ["model.multi_modal_projector"],
    "muse_glimmer": ["model.vision_adapter"],
    "kimi_k25": ["model.mm_projector"],
}
# One layer, which is `linear`'s; Phi-4's stand in a module with its tower.
WITHOUT = {
    "mllama", "gemma3", "paligemma", "paligemma2", "idefics", "idefics3", "smolvlm",
    "phi4_multimodal",
}  # fmt: skip
EVERY = [*FAMILIES, *UNLISTED]
served = pytest.mark.parametrize("family", [name for name in EVERY if name not in WITHOUT])
# Two chains in one module; a call for each of two images.
CALLS = {"minimax_m3_vl": 2, "paddleocr_vl": 2, "lfm2_vl": 2}


def places(report, status="patched"):
    return {row.path: row.sites for row in report.rows if row.sites and row.status == status}


def calls_of(family, sites):
    return CALLS.get(family, sites)


# Modules by themselves.


def vipllava():
    config = transformers.VipLlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 24, "num_attention_heads": 2},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "num_attention_heads": 2,
        },
    )
    return VipLlavaMultiModalProjector(config)


def janus(depth):
    config = transformers.JanusVisionConfig(hidden_size=16, projection_dim=24, depth=depth)
    return JanusVisionAlignerMLP(config)


class Made(nn.Module):
    """A projector as nobody has written it yet."""

    def __init__(self, activation, dropout=0.0, norm=None, bias=True):
        super().__init__()
        self.before = nn.Identity() if norm is None else norm
        self.first = nn.Linear(16, 32, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(32, 24, bias=bias)
        self.activation = activation

    def forward(self, x):
        return self.second(self.dropout(self.activation(self.first(self.before(x)))))


class Halves(nn.Module):
    """A gate and what it multiplies are halves of one layer's result, as in Cohere's."""

    def __init__(self, gated=1, bias=True, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.both = nn.Linear(16, 64, bias=bias)
        self.act = nn.SiLU()
        self.down = nn.Linear(32, 24, bias=bias)
        self.gated = gated

    def forward(self, x):
        halves = self.both(self.norm(x)).chunk(2, dim=-1)
        return self.down(self.act(halves[self.gated]) * halves[1 - self.gated])


def series():
    return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24))


MODULES = {
    "aria": (lambda: AriaProjectorMLP(16, 32, 24), (2, 5, 16)),
    "vipllava": (vipllava, (2, 5, 40)),
    "idefics2": (lambda: Idefics2MLP(16, 32, 24, "silu"), (2, 5, 16)),
    "qwen2_5": (lambda: Qwen2_5_VLPatchMerger(24, 8), (12, 8)),
    "janus": (lambda: janus(2), (2, 5, 16)),
    "janus_deep": (lambda: janus(4), (2, 5, 16)),
    "sequential": (series, (2, 5, 16)),
    "gelu": (lambda: Made(nn.GELU()), (2, 5, 16)),
    "gelu_tanh": (lambda: Made(nn.GELU("tanh"), bias=False), (2, 5, 16)),
    "quick_gelu": (lambda: Made(transformers.activations.QuickGELUActivation()), (3, 16)),
    "silu": (lambda: Made(nn.SiLU()), (2, 5, 16)),
    "relu": (lambda: Made(nn.ReLU()), (2, 0, 16)),
    "layer": (lambda: Made(nn.GELU(), norm=nn.LayerNorm(16, eps=1e-3)), (2, 5, 16)),
    "layer_without_bias": (lambda: Made(nn.GELU(), norm=nn.LayerNorm(16, bias=False)), (5, 16)),
    "halves": (Halves, (2, 5, 16)),
    "halves_first": (lambda: Halves(gated=0), (5, 16)),
    "halves_bare": (lambda: Halves(bias=False, norm=False), (2, 5, 16)),
    "rms": (lambda: Made(nn.GELU(), norm=nn.RMSNorm(16, eps=1e-3)), (2, 5, 16)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def drawn(module):
    """With weights that count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    return module.eval()


def patched(module, dtype=torch.float32):
    """A copy, patched, and the module."""
    module = drawn(module).to(dtype)
    model = nn.ModuleDict({"projector": copy.deepcopy(module)})
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path, row.sites) == ("patched", "projector", 1)
    return model["projector"], module


def outcome(module, x):
    """Results, gradients of all, and what ran."""
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    with CountOps() as ran:
        out = module(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out))
    grads = [p.grad for p in module.parameters()]
    module.zero_grad()
    return [out.detach(), x.grad, *grads], ran.counts


def assert_same(ours, theirs, tolerance=2e-5):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


@every_module
def test_results_and_gradients_agree(name):
    make, shape = MODULES[name]
    ours, theirs = patched(make())
    x = torch.randn(shape)
    (got, ran), (expected, _) = outcome(ours, x), outcome(theirs, x)
    chains = 1 + (name == "janus_deep")
    assert (ran[OP], ran[BACKWARD]) == (chains, chains)
    assert_same(got, expected)


@every_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_at_least_as_right(name, dtype):
    make, shape = MODULES[name]
    ours, theirs = patched(make(), dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad(), CountOps() as ran:
        exact = copy.deepcopy(theirs).double()(x.double())
        got, expected = ours(x), theirs(x)
    assert ran.counts[OP] == 1 + (name == "janus_deep")
    assert got.dtype == dtype
    if exact.numel():
        errors = [(y.double() - exact).abs().max() for y in (got, expected)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max()


@every_module
def test_compiles_to_one_graph(name):
    make, shape = MODULES[name]
    ours, theirs = patched(make())
    x, graphs = torch.randn(shape), []
    torch._dynamo.reset()
    record = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    got = torch.compile(ours, fullgraph=True, backend=record)(x)
    assert_same([got.detach()], [theirs(x).detach()])
    called = {node.target for node in graphs[0].graph.nodes}
    assert torch.ops.vlmops.mlp_projector.default in called
    assert torch._C._nn.linear not in called


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["aria", "idefics2", "qwen2_5", "sequential"])
def test_exports_the_op(name, strict):
    make, shape = MODULES[name]
    ours, theirs = patched(make())
    x = torch.randn(shape)
    with torch.no_grad():
        program = torch.export.export(ours, (x,), strict=strict)
        assert_same([program.module()(x)], [theirs(x)])
    assert torch.ops.vlmops.mlp_projector.default in [n.target for n in program.graph.nodes]


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """As in LLaVA's first stage: the projector alone is trained; and a frozen one."""
    ours, theirs = patched(Made(nn.GELU(), norm=nn.LayerNorm(16)))
    x, needed = torch.randn(2, 5, 16), []
    right = torch.ops.vlmops.mlp_projector_backward.default

    class Spy(CountOps):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is right:
                needed.append(list(args[2]))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Spy():
        ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert [n for n, on in enumerate(needed[0]) if on] == [1, 2, 3, 4, 7, 8]
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    ours.requires_grad_(False)
    with Spy():
        ours(x.requires_grad_()).square().sum().backward()
    assert [n for n, on in enumerate(needed[1]) if on] == [0]
    with Spy():
        ours(x.detach())
    assert len(needed) == 2


# What happens to a module after it was patched: its own code runs.


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Lora(nn.Module):
    """As PEFT puts it in the place of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = drawn(nn.Linear(base.in_features, 2, bias=False))
        self.up = drawn(nn.Linear(2, base.out_features, bias=False))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def hook(path, register="register_forward_hook"):
    def change(module):
        part = module.get_submodule(path)
        if "backward" in register:
            getattr(part, register)(lambda _, grads, *more: None)
        else:
            getattr(part, register)(lambda _, args, *out: args if not out else 2 * out[0])

    return change


def lora(module):
    module.first = Lora(module.first)


def another_class(module):
    module.second.__class__ = Doubled


def another_activation(module):
    module.activation = nn.SiLU()


def replaced_forward(module):
    module.second.forward = lambda x: 3 * nn.Linear.forward(module.second, x)


def drop(module):
    module.train()
    module.dropout.p = 0.5


def two_dtypes(module):
    module.double()


DISTURBED = {
    "hook_on_first": hook("first"),
    "pre_hook_on_second": hook("second", "register_forward_pre_hook"),
    "hook_on_activation": hook("activation"),
    "hook_on_norm": hook("before"),
    "backward_hook": hook("first", "register_full_backward_hook"),
    "lora": lora,
    "class": another_class,
    "activation": another_activation,
    "approximate": lambda m: setattr(m.activation, "approximate", "tanh"),
    "eps": lambda m: setattr(m.before, "eps", 1.0),
    "forward": replaced_forward,
    "dropout": drop,
    "float64": two_dtypes,
}


@pytest.mark.parametrize("case", DISTURBED)
def test_everything_else_runs_as_before(case):
    modules = patched(Made(nn.GELU(), norm=nn.LayerNorm(16)))
    before = modules[1](torch.ones(3, 16))
    found = []
    for module in modules:
        DISTURBED[case](module)
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
        found.append(outcome(module, x.to(next(module.parameters()).dtype)))
    (ours, ran), (theirs, _) = found
    assert ran[OP] == 0
    assert_same(ours, theirs, tolerance=0)
    silent = case in ("backward_hook", "pre_hook_on_second", "float64", "dropout", "eps")
    assert silent or not torch.allclose(modules[1](torch.ones(3, 16)), before)


CALLED = {
    "autocast": lambda m, x: autocast(m, x),
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda y: m(y).square().sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),))[1],
    "subclass": lambda m, x: m(x.as_subclass(Wrapped)),
    "meta": lambda m, x: m.to("meta")(x.to("meta")).shape,
    "float64": lambda m, x: m(x.double()),
    "bfloat16": lambda m, x: m(x.bfloat16()),
    "two_dtypes": lambda m, x: m.second.bfloat16() and m(x),
    "width": lambda m, x: m(x[..., 1:]),
}


class Wrapped(torch.Tensor):
    pass


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


@pytest.mark.parametrize("case", CALLED)
def test_what_the_op_does_not_serve_runs_as_before(case):
    modules, found = patched(Made(nn.GELU(), norm=nn.LayerNorm(16))), []
    for module in reversed(modules):
        with CountOps() as ran:
            try:
                found.append(CALLED[case](module, torch.ones(2, 5, 16)))
            except RuntimeError as error:
                found.append(str(error))
    assert ran.counts[OP] == 0
    theirs, ours = found
    assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_a_projector_that_moved_runs_as_before(monkeypatch):
    ours, theirs = patched(Made(nn.GELU()))
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: "no kernel there")
    with CountOps() as ran:
        assert torch.equal(ours(torch.ones(3, 16)), theirs(torch.ones(3, 16)))
    assert ran.counts[OP] == 0


def test_weights_that_change_are_used():
    ours, theirs = patched(Made(nn.GELU(), norm=nn.LayerNorm(16)))
    with torch.no_grad():
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.mul_(-2)
    x = torch.randn(2, 5, 16)
    assert_same(outcome(ours, x)[0], outcome(theirs, x)[0])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_llama4_drops_by_a_number_of_its_own(p):
    model = build("llama4")
    theirs = copy.deepcopy(model.vision_model.vision_adapter.mlp)
    vlmops.patch(model)
    ours, found = model.vision_model.vision_adapter.mlp, []
    for module in (ours, theirs):
        module.train()
        module.dropout = p
        found.append(outcome(module, torch.ones(2, 4, 160)))
    (got, ran), (expected, _) = found
    assert ran[OP] == int(p == 0)
    assert_same(got, expected)


# What is not patched.


class Scaled(Made):
    def forward(self, x):
        return self.second(2 * self.activation(self.first(x)))


class InPlace(Made):
    """What a layer returned stays where it is, and changes."""

    def forward(self, x):
        return self.second(self.activation(self.first(x)).mul_(2))


class HalvesOfRows(Halves):
    """Cut in two along the second dimension where that is the last of three."""

    def forward(self, x):
        one, gate = self.both(self.norm(x)).chunk(2, 2)
        return self.down(self.act(gate) * one)


class AddedHalves(Halves):
    def forward(self, x):
        one, gate = self.both(self.norm(x)).chunk(2, -1)
        return self.down(self.act(gate) + one)


class BothActivated(Halves):
    def forward(self, x):
        one, gate = self.both(self.norm(x)).chunk(2, -1)
        return self.down(self.act(gate) * self.act(one))


class SplitHalves(Halves):
    def forward(self, x):
        one, gate = self.both(self.norm(x)).split(32, -1)
        return self.down(self.act(gate) * one)


class Residual(Made):
    def __init__(self):
        super().__init__(nn.GELU())
        self.second = nn.Linear(32, 16)

    def forward(self, x):
        return x + self.second(self.activation(self.first(x)))


class TwoInputs(Made):
    def forward(self, x, mask):
        return self.second(self.activation(self.first(x))) * mask


class NoTensor(Made):
    def forward(self, x):
        return (super().forward(x),)


class Raising(Made):
    def forward(self, x):
        raise NotImplementedError("no features today")


class InTraining(Made):
    def forward(self, x):
        out = self.second(self.activation(self.first(x)))
        return out * 2 if self.training else out


UNLIKE = {
    "scaled": (lambda: Scaled(nn.GELU()), "more than an activation or a gate lies between"),
    "activation": (lambda: Made(nn.Tanh()), "Tanh is no activation that vlmops.mlp_projector"),
    "in_place": (lambda: Made(nn.ReLU(inplace=True)), "more than an activation or a gate lies"),
    "added": (AddedHalves, "more than an activation or a gate lies between"),
    "both_activated": (BothActivated, "more than an activation or a gate lies between"),
    "split": (SplitHalves, "its forward raised AttributeError"),
    "written": (lambda: InPlace(nn.GELU()), "its results differ by"),
    "homogeneous": (
        lambda: InPlace(nn.ReLU(), bias=False),
        "it writes to what its layers return",
    ),
    "inputs": (lambda: TwoInputs(nn.GELU()), "its forward wants mask, which vlmops does not know"),
    "tuple": (lambda: NoTensor(nn.GELU()), "it returns a tuple, not a tensor"),
    "raising": (lambda: Raising(nn.GELU()), "its forward raised NotImplementedError"),
    "training": (lambda: InTraining(nn.GELU()), "it does something else in training"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_modules_that_do_something_else_keep_their_forward(case):
    make, reason = UNLIKE[case]
    model = nn.ModuleDict({"projector": make()})
    kind = type(model["projector"])
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path) == ("refused", "projector")
    assert reason in row.reason
    assert type(model["projector"]) is kind


def test_halves_of_another_dimension_raise():
    ours, theirs = patched(HalvesOfRows())
    assert_same(outcome(ours, torch.ones(2, 5, 16))[0], outcome(theirs, torch.ones(2, 5, 16))[0])
    with pytest.raises(ValueError, match="its features are not cut in two"):
        ours(torch.ones(2, 5, 4, 16))


def test_what_is_added_after_it_stays():
    ours, theirs = patched(Residual())
    x = torch.randn(2, 5, 16)
    (got, ran), (expected, _) = outcome(ours, x), outcome(theirs, x)
    assert ran[OP] == 1
    assert_same(got, expected)


REFUSED = {
    "hook": (hook("first"), "first: hooks are registered on it"),
    "hook_on_activation": (hook("activation"), "hooks are registered on activation"),
    "lora": (lora, "first: Lora is a subclass with a forward of its own"),
    "forward": (replaced_forward, "second: its forward was replaced on the instance"),
    "own_forward": (
        lambda m: setattr(m, "forward", functools.partial(m.forward)),
        "Made.forward was replaced on the instance",
    ),
    "float64": (lambda m: m.double(), "no kernel for weights of torch.float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    change, reason = REFUSED[case]
    module = Made(nn.GELU())
    change(module)
    (row,) = vlmops.patch(nn.ModuleDict({"projector": module})).rows
    assert (row.status, row.path) == ("refused", "projector")
    assert reason in row.reason
    assert type(module) is Made


def test_refuses_devices_without_a_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: f"{op}: no kernel for {device}")
    (row,) = vlmops.patch(nn.ModuleDict({"projector": Made(nn.GELU())})).rows
    assert row.reason == "mlp_projector: no kernel for cpu"


@pytest.mark.parametrize("change", [lambda y: y + 0.01, lambda y: y[:-1], lambda y: y.double()])
def test_refuses_what_fails_the_check(monkeypatch, change):
    monkeypatch.setattr(site, "_checked", {})
    right = projectors.mlp_projector
    monkeypatch.setattr(projectors, "mlp_projector", lambda *a, **kw: change(right(*a, **kw)))
    model = nn.ModuleDict({"projector": Made(nn.GELU(), norm=nn.LayerNorm(16))})
    (row,) = vlmops.patch(model).rows
    assert row.status == "refused"
    assert "the numeric check failed" in row.reason
    assert vlmops.patch(model, verify=False).counts["mlp_projector"] == 1


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 16)
        self.mlp = Made(nn.GELU())


def block():
    """As a tower's pooling head: of one width throughout."""
    head = nn.Module()
    head.probe = nn.Parameter(torch.randn(1, 1, 16))
    head.mlp = Residual()
    return nn.ModuleDict({"head": head})


def scores():
    """As a head of a language model."""
    head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 99))
    return nn.ModuleDict({"head": head, "table": nn.Embedding(99, 16)})


NONE = {
    "in_layers": lambda: nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}),
    "in_one_layer": lambda: nn.ModuleDict({"layers": nn.ModuleList([Layer()])}),
    "in_series": lambda: nn.ModuleDict({"layers": nn.Sequential(Layer(), Layer())}),
    "layers": lambda: nn.ModuleDict({"layers": nn.ModuleList([Scaled(nn.GELU())] * 2)}),
    "block": block,
    "scores": scores,
    "one_layer": lambda: nn.ModuleDict({"p": nn.Sequential(nn.Linear(16, 24), nn.GELU())}),
    "no_activation": lambda: nn.ModuleDict({"p": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}),
}


@pytest.mark.parametrize("case", NONE)
def test_finds_nothing(case):
    assert [row.status for row in vlmops.patch(NONE[case]()).rows] == ["not present"]


def test_a_list_of_projectors_is_found():
    """As Qwen3-VL's."""
    model = nn.ModuleDict({"mergers": nn.ModuleList([Made(nn.GELU()), Made(nn.GELU())])})
    assert places(vlmops.patch(model)) == {"mergers.0": 1, "mergers.1": 1}


def test_linear_layers_are_not_counted_twice(monkeypatch):
    monkeypatch.undo()  # all ops
    always = (True,) * len(ways.FROM_ROWS)
    monkeypatch.setattr(ways, "wins", lambda *_: always)
    monkeypatch.setattr("vlmops.ops.linear_tuning.wins", lambda *_: always)
    for family, absorbed in (("llava", 2), ("qwen2_vl", 2), ("glm4v", 3), ("aya_vision", 2)):
        counts = [
            vlmops.patch(build(family), ops=ops).counts["linear"]
            for ops in (["linear"], ["mlp_projector", "linear"])
        ]
        assert counts[0] == counts[1] + absorbed


@pytest.mark.parametrize(("family", "calls"), [("lfm2_vl", 2), ("aya_vision", 1)])
@pytest.mark.parametrize("first", ["pixel_shuffle", "mlp_projector"])
def test_another_op_in_the_same_module(monkeypatch, first, family, calls):
    """It merges its tokens by a method of its own, and is patched for that too."""
    monkeypatch.undo()  # all ops
    ops = sorted(["pixel_shuffle", "mlp_projector"], key=lambda op: op != first)
    model, batch = build(family), batch_of(family, "several_images")
    kind = type(model.model.multi_modal_projector)
    with torch.no_grad():
        expected = run(model, batch).logits
        for op in ops:
            assert vlmops.patch(model, ops=[op]).counts[op] == 1
        with CountOps() as ran:
            assert_agree(run(model, batch).logits, expected, "logits")
    assert ran.counts[OP] == calls
    assert {row.status for row in vlmops.patch(model, ops=ops).rows} == {"already patched"}
    vlmops.unpatch(model)
    assert type(model.model.multi_modal_projector) is kind


def test_a_module_is_studied_once_and_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(projectors, "_studied", {})
    monkeypatch.setattr(site, "_checked", {})
    seen, right = [], projectors._proved
    monkeypatch.setattr(projectors, "_proved", lambda *a: seen.append(a) or right(*a))
    models = [build("llama4") for _ in range(2)]
    before = torch.get_rng_state()
    for model in models:
        vlmops.patch(model)
    assert torch.equal(torch.get_rng_state(), before)
    mlps = [m for (m,) in seen if type(m).__name__ == "Llama4VisionMLP2"]
    assert len(mlps) == 1


# Every family: last, they take the longest.


@pytest.mark.parametrize("family", EVERY)
def test_family_table_holds(family):
    """A site that rots with a new transformers turns this red; so does one that appears."""
    model = build(family)
    report = vlmops.patch(model)
    found = places(report)
    assert not [row for row in report.rows if row.status == "refused"]
    if family in UNLISTED:
        assert found == dict.fromkeys(UNLISTED_PLACES[family], 1)
        return
    assert bool(found) == (family not in WITHOUT)
    expected = targets.expected_places(model.config.model_type)
    expected = {p.path: p.sites(model.config) for p in expected if p.op == "mlp_projector"}
    if row_of(family).in_5_17 and transformers.__version__.startswith("5.17."):
        return  # a part of it hangs elsewhere
    assert found == {path: sites for path, sites in expected.items() if sites}


def test_nothing_but_projectors_is_found_in_any_model_type():
    """Places in default configs of all types: every one is named as what it is."""
    words = ("proj", "merger", "aligner", "adapter", "resampler")
    found, types = {}, survey.model_types()
    with survey._quiet():
        for model_type in types:
            try:
                config = survey._config(model_type)[0]
                with torch.device("meta"):
                    model = survey._model_class(config)._from_config(config)
            except ImportError:  # of a package that its tower comes from
                continue
            for path, module in projectors.candidates(model):
                if not isinstance(projectors.study(module), str):
                    found[model_type, path] = type(module).__name__
    assert len({model_type for model_type, _ in found}) > 45
    others = {key: kind for key, kind in found.items() if not any(w in key[1] for w in words)}
    assert not others


@served
def test_logits_and_gradients_agree(family):
    model = build(family)
    batches = {name: batch_of(family, name) for name in ("text", "several_images")}
    expected = {name: gradients(model, batch) for name, batch in batches.items()}
    sites = vlmops.patch(model).counts["mlp_projector"]
    for name, batch in batches.items():
        with CountOps() as ran:
            logits, grads = gradients(model, batch)
        calls = calls_of(family, sites) if name != "text" else 0
        assert (ran.counts[OP], ran.counts[BACKWARD]) == (calls, calls)
        assert_agree(logits, expected[name][0], name)
        assert_gradients_agree(grads, expected[name][1])


@served
def test_bfloat16_is_at_least_as_right_as_hugging_face(family):
    dtypes = (torch.float32, torch.bfloat16)
    batch, batch16 = (batch_of(family, "several_images", dtype) for dtype in dtypes)
    model = build(family, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), batch).logits
        theirs = run(model, batch16).logits
        sites = vlmops.patch(model).counts["mlp_projector"]
        with CountOps() as ran:
            ours = run(model, batch16).logits
    assert ran.counts[OP] == calls_of(family, sites)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


@served
def test_gradient_checkpointing(family):
    batch = batch_of(family, "several_images")
    logits, grads = gradients(build(family), batch)
    model = build(family)
    sites = vlmops.patch(model).counts["mlp_projector"]
    # Newer name first; transformers 5.17 has only the other.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with CountOps() as ran:
        patched_logits, patched_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[OP] == calls_of(family, sites)  # outside of the layers, so once
    assert_agree(patched_logits, logits, "logits")
    assert_gradients_agree(patched_grads, grads)


@served
def test_twin_copies_pickles_and_unpatch(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    assert restored == len(places(report))


@served
def test_autocast(family):
    if "autocast" in row_of(family).lacks:
        pytest.skip(row_of(family).lacks["autocast"])
    model, batch = build(family), batch_of(family, "several_images")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model)
        assert torch.equal(run(model, batch).logits, theirs)


@served
def test_meta_device(family):
    config = config_of(family)
    with torch.device("meta"):
        model = getattr(transformers, row_of(family).architecture)(config)
    assert places(vlmops.patch(model)) == places(vlmops.patch(build(family)))
