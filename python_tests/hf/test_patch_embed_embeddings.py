"""`vlmops.patch` with modules around patch embeddings: prefix and positions in the same pass."""

import copy
import re

import pytest
import torch
import transformers
from dispatch import CountOps
from hf.checks import batch_of
from hf.tiny import build, run
from torch import nn

import vlmops
from vlmops.hf import embeddings, pending, plain
from vlmops.hf.sites import patch_embed as site
from vlmops.ops.patch_embed import Position

pytestmark = pytest.mark.usefixtures("only_patch_embed")

OP, BACKWARD = "vlmops::patch_embed", "vlmops::patch_embed_backward"
_SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
_TINY = {**_SIZES, "hidden_size": 40, "image_size": 12, "patch_size": 4}

# Class of the tower, settings, what the report says is fused, whether pixels are cast.
TOWERS = {
    "clip": ("CLIPVisionModel", _TINY, "class_embedding, position_embedding", True),
    "siglip": ("SiglipVisionModel", _TINY, "position_embedding", True),
    "internvl": (
        "InternVLVisionModel",
        {**_TINY, "image_size": [12, 12], "patch_size": [4, 4], "use_mask_token": True},
        "cls_token, position_embeddings",
        True,
    ),
    "blip": ("BlipVisionModel", _TINY, "class_embedding, position_embedding", True),
    "blip_2": ("Blip2VisionModel", _TINY, "class_embedding, position_embedding", True),
    "instructblip": ("InstructBlipVisionModel", _TINY, "class_embedding, position_embedding", True),
    "dinov2": ("Dinov2Model", _TINY, "cls_token, position_embeddings", True),
    "vit": ("ViTModel", {**_TINY, "image_size": [12, 20]}, "cls_token, position_embeddings", False),
    "janus": ("JanusVisionModel", _TINY, "position_embedding", True),
    "ovis2": ("Ovis2VisionModel", _TINY, "rms_norm, position_embedding", True),
    "idefics2": ("Idefics2VisionTransformer", _TINY, "position_embedding", False),
    "idefics3": ("Idefics3VisionTransformer", _TINY, "position_embedding", False),
    "smolvlm": ("SmolVLMVisionTransformer", _TINY, "position_embedding", False),
}
every = pytest.mark.parametrize("name", TOWERS)
with_masks = ["idefics2", "idefics3", "smolvlm"]


def class_of(name):
    """Some towers are no part of the library's top level."""
    architecture = TOWERS[name][0]
    found = getattr(transformers, architecture, None)
    if found is None:
        stem = {"smolvlm": "smolvlm"}.get(name, name)
        module = f"transformers.models.{stem}.modeling_{stem}"
        found = getattr(__import__(module, fromlist=[architecture]), architecture)
    return found


def tower(name, dtype=torch.float32):
    torch.manual_seed(1)
    kind = class_of(name)
    model = kind(kind.config_class(**copy.deepcopy(TOWERS[name][1])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0)
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def inner(model):
    """The module that embeds, and its convolution."""
    (path,) = {
        p.rpartition(".embeddings")[0] + ".embeddings" if "." in p else p
        for p, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    found = model.get_submodule(path.removeprefix("."))
    (conv,) = [m for m in found.modules() if isinstance(m, nn.Conv2d)]
    return found, conv


def given(name, dtype=torch.float32, size=None):
    torch.manual_seed(2)
    side = TOWERS[name][1]["image_size"]
    height, width = size or ((side, side) if isinstance(side, int) else side)
    args = [torch.randn(3, 3, height, width).to(dtype)]
    if name in with_masks:
        mask = torch.ones(3, height // 4, width // 4, dtype=torch.bool)
        mask[1, -1:] = False
        mask[2, :, -2:] = False
        args.append(mask)
    return args


@pytest.fixture
def fused(monkeypatch):
    """Calls of the op that wrote what surrounds patches."""
    calls, right = [], embeddings.patch_embed

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return right(*args, **kwargs)

    for module in (embeddings, pending):
        monkeypatch.setattr(module, "patch_embed", spy)
    return calls


def patched(name, dtype=torch.float32):
    """The embeddings of a tower and the same, patched; proved outside of what is spied upon."""
    model = tower(name, dtype)
    twin = inner(copy.deepcopy(model))[0]
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.sites) == ("patched", 1)
    assert row.reason == f"with {TOWERS[name][2]}"
    return inner(model)[0], twin


def outcome(module, *args, **kwargs):
    try:
        return module(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return type(error), str(error)


def assert_same(ours, theirs, exact=True):
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs
    elif exact:
        assert torch.equal(ours, theirs)
    else:
        ours, theirs = ours.detach(), theirs.detach()
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


@every
def test_tokens_and_gradients_agree(name, fused):
    ours, theirs = patched(name)
    fused.clear()
    found = []
    for module in (theirs, ours):
        args = given(name)
        args[0].requires_grad_()
        with CountOps() as ran:
            out = module(*args)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
        grads = {n: p.grad for n, p in module.named_parameters()}
        found.append((out.detach(), {"pixels": args[0].grad, **grads}))
    assert (ran.counts[OP], ran.counts[BACKWARD], len(fused)) == (1, 1, 1)
    assert ran.counts["aten::cat"] == ran.counts["aten::convolution"] == 0
    assert name in with_masks or ran.counts["aten::add"] == 0
    (expected, expected_grads), (got, grads) = found
    assert_same(got, expected, exact=False)
    for key, grad in expected_grads.items():
        assert (grads[key] is None) == (grad is None), key
        if grad is not None:
            assert_same(grads[key], grad, exact=False)


@every
def test_whole_towers_agree(name, fused):
    model = tower(name)
    args = dict(zip(("pixel_values", "patch_attention_mask"), given(name), strict=False))
    with torch.no_grad():
        expected = model(**args).last_hidden_state
        vlmops.patch(model)
        fused.clear()
        assert_same(model(**args).last_hidden_state, expected, exact=False)
    assert len(fused) == 1


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_at_least_as_right(name, dtype, fused):
    ours, theirs = patched(name, dtype)
    fused.clear()
    args = given(name, dtype)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(args[0].double(), *args[1:])
        errors = [(m(*args).double() - exact).abs().max() for m in (ours, theirs)]
    assert len(fused) == 1
    assert errors[0] <= errors[1] + torch.finfo(dtype).eps / 2 * exact.abs().max()


@every
@pytest.mark.parametrize("pixels", [torch.float32, torch.float16], ids=str)
def test_pixels_of_another_dtype(name, pixels, fused):
    """Cast where the module casts them; where it does not, its error."""
    ours, theirs = patched(name, torch.bfloat16)
    fused.clear()
    args = given(name, pixels)
    with torch.no_grad():
        got, expected = (outcome(m, *args) for m in (ours, theirs))
    casts = TOWERS[name][3]
    assert len(fused) == int(casts)
    assert isinstance(expected, torch.Tensor) == casts
    if casts:
        assert got.dtype == expected.dtype == torch.bfloat16
        assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    else:
        assert got == expected


@every
def test_other_sizes(name, fused):
    """What the module makes of them: interpolated positions, an error, or any size."""
    ours, theirs = patched(name)
    for size in ((16, 12), (24, 24), (13, 14), (3, 12)):
        fused.clear()
        args = given(name, size=size)
        got, expected = (outcome(m, *args) for m in (ours, theirs))
        if isinstance(expected, torch.Tensor):  # the norm of Ovis2's wants values
            assert len(fused) == int(name != "ovis2")
        assert_same(got, expected, exact=False)


ASKED = ("clip", "siglip", "blip", "blip_2", "instructblip", "janus")


@pytest.mark.parametrize("size", [(20, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("name", ["internvl", "dinov2", *ASKED])
def test_interpolated_positions_are_in_the_pass(name, size, fused):
    """Where towers interpolate always, and where they are asked to."""
    ours, theirs = patched(name)
    kwargs = {"interpolate_pos_encoding": True} if name in ASKED else {}
    fused.clear()
    found = []
    for module in (theirs, ours):
        args = given(name, size=size)
        args[0].requires_grad_()
        with CountOps() as ran:
            out = module(*args, **kwargs)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        found.append((out, {"pixels": args[0].grad, **grads}))
    assert (ran.counts[OP], ran.counts[BACKWARD], len(fused)) == (1, 1, 1)
    assert fused[0]["positions"][0].weight is not None
    (expected, expected_grads), (got, grads) = found
    assert_same(got, expected, exact=False)
    assert grads.keys() == expected_grads.keys()
    for key, grad in expected_grads.items():
        assert_same(grads[key], grad, exact=False)


def test_interpolated_positions_follow_the_table():
    """In place, and behind the back of version counters."""
    ours, theirs = patched("dinov2")
    args = given("dinov2", size=(20, 16))
    with torch.no_grad():
        for change in (lambda p: p.mul_(-2), lambda p: p.data.copy_(p.data.flip(1))):
            for module in (ours, theirs):
                change(module.position_embeddings)
            assert_same(ours(*args), theirs(*args), exact=False)


def change_dropout(module):
    module.train()
    module.dropout.p = 0.5


def swap_table(module):
    module.position_embedding = copy.deepcopy(module.position_embedding)
    module.position_embedding.__class__ = Doubled


class Doubled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(path, register="register_forward_hook"):
    def change(module):
        getattr(module.get_submodule(path), register)(lambda *_: None)

    return change


def table_of(dtype):
    def change(module):
        module.position_embedding.weight.data = module.position_embedding.weight.data.to(dtype)

    return change


def replaced_forward(module):
    conv = module.patch_embedding
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)


def short_table(module):
    module.position_embedding.weight.data = torch.randn(4, 40)


# What happens to a module after it was patched, and how it is called: its own code runs.
OTHERS = {
    "dropout": ("internvl", change_dropout, {}),
    "swapped": ("clip", swap_table, {}),
    "hook_on_table": ("clip", hook("position_embedding"), {}),
    "pre_hook_on_table": ("clip", hook("position_embedding", "register_forward_pre_hook"), {}),
    "hook_on_convolution": ("clip", hook("patch_embedding"), {}),
    "hook_between": ("internvl", hook("patch_embeddings"), {}),
    "hook_on_norm": ("ovis2", hook("rms_norm"), {}),
    "hook_with_mask": ("idefics3", hook("position_embedding"), {}),
    "wide_table": ("siglip", table_of(torch.float64), {}),
    "short_table": ("siglip", short_table, {}),
    "forward": ("clip", replaced_forward, {}),
    "masked": ("internvl", None, {"bool_masked_pos": torch.ones(3, 9, dtype=torch.bool)}),
    "unknown": ("clip", None, {"an_argument_of_tomorrow": 1}),
    "float64": ("clip", lambda m: m.double(), {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_runs_as_before(case, fused):
    name, change, kwargs = OTHERS[case]
    modules = patched(name)
    fused.clear()
    found = []
    for module in modules:
        if change is not None:
            change(module)
        torch.manual_seed(4)
        found.append(outcome(module, *given(name), **kwargs))
    assert not fused
    assert_same(*found, exact=False)


def test_calls_that_give_the_defaults_are_plain(fused):
    ours, theirs = patched("clip")
    args = given("clip")
    for call in (
        lambda m: m(*args, False),
        lambda m: m(*args, interpolate_pos_encoding=False),
        lambda m: m(pixel_values=args[0]),
    ):
        fused.clear()
        assert_same(call(ours), call(theirs), exact=False)
        assert len(fused) == 1


@pytest.mark.parametrize("name", ["clip", "siglip", "idefics3"])
def test_autocast_and_tracing_run_as_before(name, fused):
    ours, theirs = patched(name)
    fused.clear()
    args = given(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(*args), theirs(*args)
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    with torch.no_grad(), pytest.warns():
        traced = torch.jit.trace(ours, tuple(args), check_trace=False)
    assert_same(traced(*args), theirs(*args), exact=False)
    assert not fused


def test_ids_in_the_buffer_are_looked_up(fused):
    ours, theirs = patched("clip")
    for module in (ours, theirs):
        module.position_ids = module.position_ids.flip(1)
    fused.clear()
    assert_same(ours(*given("clip")), theirs(*given("clip")), exact=False)
    assert len(fused) == 1


def test_weights_that_change_are_used():
    ours, theirs = patched("clip")
    with torch.no_grad():
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.mul_(-2)
        assert_same(ours(*given("clip")), theirs(*given("clip")), exact=False)


def test_frozen_towers_with_trained_positions(fused):
    """Gradients for what needs them alone."""
    ours, theirs = patched("clip")
    found = []
    for module in (ours, theirs):
        module.requires_grad_(False)
        module.position_embedding.weight.requires_grad_()
        module(*given("clip")).square().sum().backward()
        found.append(module.position_embedding.weight.grad)
        assert module.patch_embedding.weight.grad is None
    assert_same(*found, exact=False)


@pytest.mark.parametrize("name", ["clip", "internvl", "ovis2"])
def test_compiles_to_one_graph(name):
    ours, theirs = patched(name)
    args, graphs = given(name), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(ours, fullgraph=True, backend=backend)(*args)
        assert_same(got, theirs(*args), exact=False)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.vlmops.patch_embed.default in called
    assert torch.cat not in called
    assert torch.conv2d not in called


def test_ids_that_are_computed_compile_to_one_graph():
    """The convolution's op and the module's own table: a compiler fuses the sum."""
    ours, theirs = patched("idefics3")
    args = given("idefics3")
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(ours, fullgraph=True, backend="eager")(*args)
        assert_same(got, theirs(*args), exact=False)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["clip", "idefics3"])
def test_exports_the_op(name, strict):
    ours, theirs = patched(name)
    args = tuple(given(name))
    batch = torch.export.Dim("batch", min=2, max=64)
    sizes = tuple({0: batch} for _ in args)
    with torch.no_grad():
        program = torch.export.export(ours, args, dynamic_shapes=sizes, strict=strict)
        more = [torch.cat((x, x)) for x in args]
        assert_same(program.module()(*more), theirs(*more), exact=False)
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.vlmops.patch_embed.default in targets


# What looks like embeddings and does something else: the convolution alone is served.


def subclassed(name, forward):
    """A tower whose embeddings have another forward."""
    model = tower(name)
    module, _ = inner(model)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})
    return model


def scaled(self, pixel_values):
    return 2 * type(self).__mro__[1].forward(self, pixel_values)


def a_list(self, pixel_values):
    return [type(self).__mro__[1].forward(self, pixel_values)]


def raising(self, pixel_values):
    raise NotImplementedError("no pixels today")


def wants_more(self, pixel_values, bbox):
    return type(self).__mro__[1].forward(self, pixel_values)


def two_tokens(self, pixel_values):
    out = type(self).__mro__[1].forward(self, pixel_values)
    return torch.cat((out[:, :1], out), dim=1)


def by_chance(self, pixel_values):
    """Right for one image, not for several."""
    out = type(self).__mro__[1].forward(self, pixel_values)
    return out + torch.arange(len(out))[:, None, None]


UNLIKE = {
    "scaled": (scaled, "it does something else with its patches"),
    "a_list": (a_list, r"it returns no tokens \[B, N, D\]"),
    "raising": (raising, "its forward raised NotImplementedError"),
    "wants_more": (wants_more, "its forward wants bbox, which vlmops does not know"),
    "two_tokens": (two_tokens, "11 tokens come of 9 patches"),
    "by_chance": (by_chance, "its tokens differ by"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_modules_that_do_something_else_keep_their_forward(case):
    forward, reason = UNLIKE[case]
    model = subclassed("clip", forward)
    module, conv = inner(model)
    kind, expected = type(module), outcome(module, *given("clip"))
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path) == ("patched", "embeddings.patch_embedding")
    assert row.reason.startswith("patches alone, not CLIPVisionEmbeddings: ")
    assert re.search(reason, row.reason)
    assert type(module) is kind
    assert type(conv) is not nn.Conv2d
    got = outcome(module, *given("clip"))
    for ours, theirs in zip(
        got if isinstance(got, list | tuple) else [got],
        expected if isinstance(expected, list | tuple) else [expected],
        strict=True,
    ):
        assert_same(ours, theirs, exact=False)


CHANGED = {
    "hook": (hook("position_embedding"), "hooks are registered on position_embedding"),
    "table": (swap_table, "Doubled is a subclass"),
    "sparse": (lambda m: setattr(m.position_embedding, "sparse", True), "is a table with options"),
    "padding": (
        lambda m: setattr(m.position_embedding, "padding_idx", 3),
        "is a table with options",
    ),
    "forward": (lambda m: setattr(m, "forward", m.forward), "forward was replaced on the instance"),
    "child": (
        lambda m: setattr(m.position_embedding, "forward", m.position_embedding.forward),
        "position_embedding.forward was replaced on the instance",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_modules_that_others_changed_keep_their_forward(case):
    change, reason = CHANGED[case]
    model = tower("clip")
    change(inner(model)[0])
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path) == ("patched", "embeddings.patch_embedding")
    assert reason in row.reason


def test_modules_with_more_in_them_are_none():
    model = tower("clip")
    inner(model)[0].add_module("adapter", nn.Linear(40, 40))
    (row,) = vlmops.patch(model).rows
    assert (row.path, row.reason) == ("embeddings.patch_embedding", "")


def test_a_module_is_studied_once(monkeypatch):
    monkeypatch.setattr(embeddings, "_studied", {})
    seen, right = [], embeddings._proved
    monkeypatch.setattr(embeddings, "_proved", lambda *a: seen.append(a) or right(*a))
    for _ in range(2):
        vlmops.patch(tower("clip"))
    assert len(seen) == 1
    model = tower("clip")
    inner(model)[0].image_size = 16  # another number, another study: no size fits its table
    (row,) = vlmops.patch(model).rows
    assert len(seen) == 2
    assert "patches alone" in row.reason


@pytest.mark.parametrize("name", ["clip", "llama4"])
def test_patching_draws_no_random_numbers(name, monkeypatch):
    """Dropout after it drops what it dropped before."""
    monkeypatch.setattr(embeddings, "_studied", {})
    monkeypatch.setattr(site, "_checked", {})
    model = build(name) if name == "llama4" else tower(name)
    before = torch.get_rng_state()
    assert vlmops.patch(model).counts["patch_embed"] == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_unpatch_restores_both_and_patching_again_changes_nothing():
    model = tower("internvl")
    module, conv = inner(model)
    kinds = type(module), type(conv)
    report = vlmops.patch(model)
    assert (type(module), type(conv)) != kinds
    assert all(plain.original_class(m) for m in (module, conv))
    again = vlmops.patch(model)
    assert again.counts == report.counts
    assert [(r.path, r.status) for r in again.rows] == [("embeddings", "already patched")]
    assert vlmops.unpatch(model) == 2
    assert (type(module), type(conv)) == kinds


@pytest.mark.parametrize("family", ["llava", "idefics3", "internvl", "phi4_multimodal"])
def test_models_write_positions_with_their_patches(family, fused):
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    fused.clear()
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert len(fused) == ran.counts[OP] == 1
    assert [type(p) for p in fused[0]["positions"]] == [Position]


class Made(nn.Module):
    """Embeddings as no tower of today has them."""

    def __init__(self, last, norm, width=24):
        super().__init__()
        self.image_size = 12
        self.projection = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, width))
        self.unused = nn.Parameter(torch.randn(width))
        self.rows = nn.Parameter(torch.randn(10, width))
        self.norm = norm
        self.last = last

    def forward(self, pixel_values):
        x = self.norm(self.projection(pixel_values).flatten(2).transpose(1, 2))
        token = self.token.expand(len(x), 1, -1)
        return torch.cat((x, token) if self.last else (token, x), dim=1) + self.rows


NORMS = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(24, eps=1e-3),
    "layer_without_bias": lambda: nn.LayerNorm(24, bias=False),
    "rms": lambda: nn.RMSNorm(24, eps=1e-3),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_modules_that_nobody_has_written_yet(last, norm, fused):
    torch.manual_seed(0)
    module = Made(last, NORMS[norm]())
    with torch.no_grad():
        for parameter in module.norm.parameters():
            parameter.normal_()
    theirs, model = copy.deepcopy(module), nn.Sequential(module)
    (row,) = vlmops.patch(model).rows
    assert row.path == "0"
    assert row.reason.startswith("with token, ")
    fused.clear()
    x, found = torch.randn(2, 3, 12, 12), []
    for made in (module, theirs):
        out = made(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
        found.append([out, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert len(fused) == 1
    for ours, other in zip(*found, strict=True):
        assert_same(ours, other, exact=False)
