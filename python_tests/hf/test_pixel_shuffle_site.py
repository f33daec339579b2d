"""`vlmops.patch` with pixel_shuffle: same outputs and gradients, only what may be replaced."""

import copy
import inspect
import pickle
import types

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
from hf.tiny import FAMILIES, UNLISTED, build, config_of, inputs, row_of, run
from torch import nn

import vlmops
from vlmops import dispatch
from vlmops.hf import mergers, shuffles, targets
from vlmops.hf.rebind import original_class
from vlmops.hf.sites import pixel_shuffle as site

pytestmark = [
    pytest.mark.usefixtures("only_pixel_shuffle"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]

OP, BACKWARD = "vlmops::pixel_shuffle", "vlmops::pixel_shuffle_backward"
EVERY = [*FAMILIES, *UNLISTED]
PLACES = {
    "internvl": "model",
    "idefics3": "model.connector",
    "smolvlm": "model.connector",
    "llama4": "vision_model.vision_adapter",
    "aya_vision": "model.multi_modal_projector",
    "cohere2_vision": "model.multi_modal_projector",
    "mistral3": "model.multi_modal_projector.patch_merger",
    "gemma3": "model.multi_modal_projector",
    "lighton_ocr": "model.vision_projection.patch_merger",
    "lfm2_vl": "model.multi_modal_projector",
}
# Its tower's tokens lie side by side where patch_embed is patched too: see the test of its pool.
POOLS = {"phi4_multimodal": "model.embed_tokens_extend.image_embed.image_token_compression"}
LEFT = {"llava_onevision": "model"}  # bilinear, of videos
EACH_IMAGE = {"lfm2_vl"}  # its model calls the method for each image
served = pytest.mark.parametrize("family", PLACES)
# What moves bits alone; Gemma-3's averages are rounded.
moved = pytest.mark.parametrize("family", [name for name in PLACES if name != "gemma3"])


def places(report, status="patched"):
    return {row.path: row.sites for row in report.rows if row.sites and row.status == status}


def calls(family, images):
    return images if family in EACH_IMAGE else 1


# Functions by themselves.


class Method(nn.Module):
    """As InternVL's, Idefics' and Cohere's have it: grids or squares, with or without a scale."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config or types.SimpleNamespace(ratio=0.5)
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.merge(x, self.config.ratio)

    def merge(self, x, scale: float = 0.5):
        """Merges."""
        b, h, w, c = x.shape
        if h % (1 / scale) or w % (1 / scale):
            raise ValueError("no grid of blocks")
        x = x.reshape(b, h, int(w * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
        x = x.view(b, int(w * scale), int(h * scale), int(c / scale**2))
        return x.permute(0, 2, 1, 3).contiguous()


class ByRows(nn.Module):
    """Unfold's order, and a number of its own in place of a scale."""

    def __init__(self, factor=2):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        b, n, c = x.shape
        side = int(n**0.5)
        x = x.view(b, side // self.factor, self.factor, side // self.factor, self.factor, c)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(b, -1, c * self.factor**2)


def merge_tokens(x, scale):
    b, n, c = x.shape
    side = int(n**0.5)
    x = x.view(b, int(side / scale), scale, int(side / scale), scale, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, int(n / scale**2), c * scale**2)


class Global(nn.Module):
    def __init__(self, scale=3):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return 2 * merge_tokens(x, self.scale)


# A module, and tokens that it takes.
MODULES = {
    "method": (Method, (2, 4, 6, 5)),
    "third": (lambda: Method(types.SimpleNamespace(ratio=1 / 3)), (2, 6, 9, 5)),
    "quarter": (lambda: Method(types.SimpleNamespace(ratio=0.25)), (1, 8, 4, 3)),
    "by_rows": (ByRows, (2, 36, 5)),
    "global": (Global, (2, 81, 5)),
    "one_block": (lambda: Global(4), (3, 16, 8)),
}
NOTES = {
    "method": "blocks of 2 x 2 (y, x, c)",
    "third": "blocks of 3 x 3 (y, x, c)",
    "quarter": "blocks of 4 x 4 (y, x, c)",
    "by_rows": "blocks of 2 x 2 (c, y, x)",
    "global": "blocks of 3 x 3 (y, x, c)",
    "one_block": "blocks of 4 x 4 (y, x, c)",
}


def patched(module):
    """A copy of a module, patched."""
    model = nn.Sequential(copy.deepcopy(module))
    assert vlmops.patch(model).counts == {"pixel_shuffle": 1}
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "skipped"])
@pytest.mark.parametrize("name", MODULES)
def test_functions_agree_to_the_bit(name, strides, dtype):
    module, shape = MODULES[name][0](), MODULES[name][1]
    x = torch.randn(shape).to(dtype)
    if strides == "transposed" and len(shape) == 4:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif strides == "skipped":  # as a class token leaves it
        x = torch.cat((x[:, :1], x), 1)[:, 1:]
    ours, found = patched(module), []
    for forward in (module, ours):
        given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with CountOps() as ran:
            out = forward(given)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            found.append((out, *torch.autograd.grad(out, given, upstream.to(dtype))))
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (1, 1)
    for theirs, our in zip(*found, strict=True):
        assert our.dtype == dtype
        assert torch.equal(our, theirs)


@pytest.mark.parametrize("name", MODULES)
def test_report_says_what_a_function_does(name):
    (row,) = vlmops.patch(nn.Sequential(MODULES[name][0]())).rows
    assert (row.status, row.path, row.reason) == ("patched", "0", NOTES[name])


def test_without_grad_nothing_is_copied_twice():
    module, x = patched(Method()), torch.randn(2, 4, 6, 5)
    with torch.no_grad(), CountOps() as ran:
        module(x)
    assert not ran.counts.keys() & {"aten::clone", "aten::copy_", "aten::permute"}


def test_the_replacement_looks_like_the_method():
    module = patched(Method())
    assert inspect.signature(module.merge) == inspect.signature(Method().merge)
    assert inspect.signature(module.forward) == inspect.signature(Method().forward)
    assert (module.merge.__name__, module.merge.__doc__) == ("merge", "Merges.")
    x = torch.randn(2, 4, 6, 5)
    expected = Method().merge(x)
    for given in ({"x": x}, {"x": x, "scale": 0.5}, {"scale": 0.5, "x": x}):
        with CountOps() as ran:
            assert torch.equal(module.merge(**given), expected)
        assert ran.counts[OP] == 1


# What the op does not serve; the model's own code runs, with its errors.
OTHERS = {
    "odd": lambda m: m.merge(torch.randn(2, 5, 6, 4)),
    "rank": lambda m: m.merge(torch.randn(2, 16, 4)),
    "empty": lambda m: m.merge(torch.randn(0, 4, 4, 4)),
    "no_channels": lambda m: m.merge(torch.randn(1, 4, 4, 0)),
    "float64": lambda m: m.merge(torch.randn(2, 4, 4, 4).double()),
    "ints": lambda m: m.merge(torch.ones(2, 4, 4, 4, dtype=torch.long)),
    "meta": lambda m: m.merge(torch.randn(2, 4, 4, 4, device="meta")).shape,
    "another_scale": lambda m: m.merge(torch.randn(2, 8, 8, 4), 0.25),
    "an_integer": lambda m: m.merge(torch.randn(2, 4, 4, 4), 1),
    "no_scale": lambda m: m.merge(torch.randn(2, 4, 4, 4), None),
    "too_many": lambda m: m.merge(torch.randn(2, 4, 4, 4), 0.5, 3),
    "unknown": lambda m: m.merge(torch.randn(2, 4, 4, 4), factor=2),
    "twice": lambda m: m.merge(torch.randn(2, 4, 4, 4), x=0.5),
    "missing": lambda m: m.merge(scale=0.5),
    "no_tensor": lambda m: m.merge([1.0]),
    "subclass": lambda m: m.merge(torch.randn(2, 4, 4, 4).as_subclass(Wrapped)),
    "vmap": lambda m: torch.func.vmap(m.merge)(torch.randn(3, 2, 4, 4, 4)),
    "jvp": lambda m: torch.func.jvp(m.merge, *[(torch.ones(2, 4, 4, 4),)] * 2),
}


class Wrapped(torch.Tensor):
    pass


def outcome(function, module):
    torch.manual_seed(0)
    try:
        return function(module)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return str(error)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_op_does_not_serve_runs_as_before(name):
    module = Method()
    ours = patched(module)
    with CountOps() as ran:
        got = outcome(OTHERS[name], ours)
    assert ran.counts[OP] == 0
    expected = outcome(OTHERS[name], module)
    assert type(got) is type(expected)
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("module", "shape"), [(ByRows, (1, 25, 4)), (Global, (1, 18, 4)), (Global, (1, 10, 4))]
)
def test_tokens_that_are_no_square_of_blocks_run_as_before(module, shape):
    x = torch.randn(shape)
    ours = patched(module())
    with CountOps() as ran:
        got = outcome(lambda m: m(x), ours)
    assert ran.counts[OP] == 0
    assert got == outcome(lambda m: m(x), module())


def test_a_number_that_changes_is_seen():
    module, x = ByRows(), torch.randn(2, 36, 5)  # of blocks of either size
    ours = patched(module)
    module.factor = ours.factor = 3
    with CountOps() as ran:
        assert torch.equal(ours(x), module(x))
    assert ran.counts[OP] == 0


def test_a_scale_of_another_type_is_no_scale():
    """It is a number that views do not take."""
    module, x = Global(), torch.randn(2, 81, 5)
    ours = patched(module)
    module.scale = ours.scale = 3.0
    with CountOps() as ran:
        got = outcome(lambda m: m(x), ours)
    assert ran.counts[OP] == 0
    assert isinstance(got, str)
    assert got == outcome(lambda m: m(x), module)


def test_small_tensors_are_left_to_the_model(monkeypatch):
    x = torch.randn(2, 4, 6, 5)
    for smallest, count in ((x.nbytes, 1), (x.nbytes + 1, 0)):
        monkeypatch.setattr(shuffles, "SMALL", smallest)
        module = patched(Method())
        with CountOps() as ran:
            assert torch.equal(module(x), Method()(x))
        assert ran.counts[OP] == count


def test_a_module_that_moved_runs_as_before(monkeypatch):
    """To a device that has no kernel."""
    module, x = patched(Method()), torch.randn(2, 4, 6, 5)
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: "no kernel there")
    with CountOps() as ran:
        assert torch.equal(module(x), Method()(x))
    assert ran.counts[OP] == 0


@pytest.mark.parametrize("name", MODULES)
def test_compiles_to_one_graph(name):
    module, x = patched(MODULES[name][0]()), torch.randn(MODULES[name][1])
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=keep)
    assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1
    assert graphs[0].count("vlmops.pixel_shuffle") == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_records_the_model_s_own_code():
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="torch.jit"):
        traced = torch.jit.trace(patched(Method()), x)
    assert "vlmops" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), Method()(x))


# What is no shuffle, and what may not be replaced.


class Columns(Method):
    """Blocks column by column: squares would not tell."""

    def merge(self, x, scale: float = 0.5):
        b, h, w, c = x.shape
        x = x.reshape(b, h, int(w * scale), int(c / scale)).permute(0, 2, 1, 3)
        return x.reshape(b, int(w * scale), int(h * scale), int(c / scale**2))


class Reordered(Method):
    """Channels of a token by (dx, dy, c)."""

    def merge(self, x, scale: float = 0.5):
        b, h, w, c = x.shape
        x = x.reshape(b, int(h * scale), 2, int(w * scale), 2, c).permute(0, 1, 3, 4, 2, 5)
        return x.reshape(b, int(h * scale), int(w * scale), 4 * c)


class Counting(ByRows):
    def forward(self, x):
        self.factor = self.factor
        b, n, c = x.shape
        side = int(n**0.5)
        x = x.view(b, side // self.factor, self.factor, side // self.factor, self.factor, c)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(b, -1, c * self.factor**2)


class Negated(ByRows):
    """Does more than rearrange."""

    def forward(self, x):
        b, n, c = x.shape
        side = int(n**0.5)
        x = x.view(b, side // self.factor, self.factor, side // self.factor, self.factor, c)
        return x.permute(0, 1, 3, 5, 2, 4).reshape(b, -1, c * self.factor**2).neg()


class Heads(nn.Module):
    """Attention's own turning around of heads."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4

    def forward(self, x):
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)


class Scaled(ByRows):
    def forward(self, x):
        return super().forward(x) * 2


def test_orders_of_their_own_are_refused():
    for module in (Columns(), Reordered()):
        (row,) = vlmops.patch(nn.Sequential(module)).rows
        assert (row.status, row.path) == ("refused", "0")
        assert row.reason == "merge by 0.5: it merges blocks of tokens in an order of its own"


@pytest.mark.parametrize("module", [Counting, Heads, Negated, Scaled, lambda: nn.AvgPool2d(2)])
def test_finds_nothing(module):
    assert [r.status for r in vlmops.patch(nn.Sequential(module())).rows] == ["not present"]


def on_instance(module):
    module.merge = types.MethodType(Method.merge, module)


def below(module):
    """Somebody else's class on top of ours."""
    vlmops.patch(nn.Sequential(module))
    module.__class__ = type("Other", (type(module),), {})


REFUSED = {
    "instance": (on_instance, "Method.merge was replaced on the instance by"),
    "class": (below, "Other's class was replaced after vlmops patched it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    change, reason = REFUSED[name]
    module = Method()
    change(module)
    kind = type(module)
    (row,) = vlmops.patch(nn.Sequential(module)).rows
    assert row.status == "refused"
    assert reason in row.reason
    assert type(module) is kind


def test_refuses_methods_that_are_wrapped(monkeypatch):
    wrapped = torch.no_grad()(Method.merge)
    monkeypatch.setattr(Method, "merge", wrapped)
    (row,) = vlmops.patch(nn.Sequential(Method())).rows
    assert row.reason == "merge is decorated, and a replacement would not be"


def test_refuses_functions_that_another_library_replaced(monkeypatch):
    from transformers.models.llama4 import modeling_llama4

    other = types.FunctionType(
        modeling_llama4.pixel_shuffle.__code__, {**globals(), "math": __import__("math")}
    )
    model = build("llama4")
    monkeypatch.setattr(modeling_llama4, "pixel_shuffle", other)
    rows = [row for row in vlmops.patch(model).rows if row.sites]
    assert [row.status for row in rows] == ["refused"]
    assert "pixel_shuffle in transformers.models.llama4.modeling_llama4 was replaced by" in (
        rows[0].reason
    )


def test_refuses_devices_without_a_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: f"{op}: no kernel for {device}")
    (row,) = vlmops.patch(nn.Sequential(Method())).rows
    assert row.reason == "pixel_shuffle: no kernel for cpu"


@pytest.mark.parametrize("change", [lambda y: y + 1e-3, lambda y: y[:, :-1], lambda y: y.double()])
def test_refuses_what_fails_the_check(monkeypatch, change):
    monkeypatch.setattr(site, "_checked", {})
    right = shuffles.pixel_shuffle
    monkeypatch.setattr(shuffles, "pixel_shuffle", lambda *a, **k: change(right(*a, **k)))
    model = nn.Sequential(ByRows())
    (row,) = vlmops.patch(model).rows
    assert "the numeric check failed" in row.reason
    assert vlmops.patch(model, verify=False).counts["pixel_shuffle"] == 1


def test_the_model_may_be_called_with_what_its_callers_do_not_name():
    """Then by the default, which is probed."""

    class Plain(Method):
        def forward(self, x):
            return self.merge(x)

    theirs, x = Plain(types.SimpleNamespace()), torch.randn(2, 4, 6, 5)
    module = patched(theirs)
    with CountOps() as ran:
        assert torch.equal(module(x), theirs(x))
    assert ran.counts[OP] == 1


# Ops that share a module, and order.


def test_two_ops_share_a_module():
    """In either order, and each undone by its own `with` block."""

    def other(module):
        from vlmops.hf.rebind import subclass

        forward = type(module).forward
        module.__class__ = subclass(
            type(module), ("other", forward), lambda _: lambda self, x: forward(self, x) + 1
        )

    x, both = torch.randn(2, 4, 6, 5), Method()(torch.zeros(2, 4, 6, 5)) + 1
    for first in ("ours", "other"):
        model = nn.Sequential(Method())
        if first == "other":
            other(model[0])
        with vlmops.patched(model) as report:
            assert report.counts["pixel_shuffle"] == 1
            if first == "ours":
                other(model[0])
            with CountOps() as ran:
                got = model(x)
            assert torch.equal(got, Method()(x) + 1)
            assert ran.counts[OP] == 1
            assert got.shape == both.shape
            assert original_class(model[0]) is Method
            assert b"vlmops" not in pickle.dumps(model[0].state_dict())
            assert vlmops.patch(model).rows[0].status == "already patched"
        if first == "other":
            assert torch.equal(model(x), Method()(x) + 1)
        vlmops.unpatch(model)
        assert type(model[0]) is Method


def test_unpatch_refuses_a_method_that_was_wrapped_since():
    module = patched(Method())
    module.merge = module.merge
    with pytest.raises(RuntimeError, match="the merge of a Method was replaced on the instance"):
        vlmops.unpatch(module)
    del module.merge
    assert vlmops.unpatch(module) == 1


# Patch mergers: Mistral-3.


def merger(model):
    return model.model.multi_modal_projector.patch_merger


def merged(sizes, as_list=False, dtype=torch.float32):
    """The merger's own result and ours, with the op's calls: outputs and gradients."""
    model = build("mistral3", dtype=dtype)
    theirs = merger(model)
    ours = copy.deepcopy(theirs)
    vlmops.patch(ours)
    x = torch.randn(sum(h * w for h, w in sizes), 40).to(dtype)
    pixels = torch.tensor(sizes) * 4 + torch.tensor([3, 0])
    pixels = pixels.tolist() if as_list else pixels
    found = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        with CountOps() as ran:
            out = module(given, pixels)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            wanted = [given, module.merging_layer.weight]
            found.append((out, *torch.autograd.grad(out, wanted, upstream.to(dtype))))
    return *found, ran.counts[OP]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("sizes", [[(2, 2)], [(4, 6)], [(5, 7), (2, 3), (4, 4)], [(3, 9)] * 4])
def test_patch_mergers_agree_to_the_bit(sizes, as_list, dtype):
    """Odd sides included: the last row and column are dropped."""
    theirs, ours, ran = merged(sizes, as_list, dtype)
    assert ran == 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_patch_mergers_take_what_the_op_does_not():
    model = build("mistral3")
    theirs = merger(model)
    ours = copy.deepcopy(theirs)
    vlmops.patch(ours)
    cases = {
        "one_row": (torch.randn(6, 40), torch.tensor([[4, 24]])),
        "tokens_missing": (torch.randn(5, 40), torch.tensor([[8, 12]])),
        "floats": (torch.randn(6, 40), torch.tensor([[8.0, 12.0]])),
        "rank": (torch.randn(1, 6, 40), torch.tensor([[8, 12]])),
        "no_images": (torch.randn(0, 40), torch.zeros(0, 2, dtype=torch.long)),
    }
    for name, given in cases.items():
        with CountOps() as ran:
            got = outcome(lambda m, given=given: m(*given), ours)
        assert ran.counts[OP] == 0, name
        expected = outcome(lambda m, given=given: m(*given), theirs)
        assert type(got) is type(expected), name
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_hooks_of_the_merging_layer_run():
    model, batch = build("mistral3"), batch_of("mistral3", "several_images")
    vlmops.patch(model)
    seen = []
    merger(model).merging_layer.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert (len(seen), ran.counts[OP]) == (1, 1)


@pytest.mark.parametrize("scale", [1, 2])
def test_patch_mergers_of_another_way_are_refused(scale):
    """That turn tokens around before, or do something after."""
    model = build("mistral3")
    merge = type(merger(model)).forward

    class Other(type(merger(model))):
        def forward(self, image_features, image_sizes):
            features = torch.nn.functional.unfold(image_features[None, None], 1, stride=1)
            features = features.view_as(image_features)
            features = features.flip(0) if scale == 1 else features
            assert self.spatial_merge_size < self.patch_size  # named, so tried
            return merge(self, features, image_sizes) * scale

    merger(model).__class__ = Other
    row = next(row for row in vlmops.patch(model).rows if row.sites)
    assert (row.status, row.module) == ("refused", "Other")
    assert "in a way of its own" in row.reason


def test_patch_mergers_that_fail_the_check_are_refused(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    right = mergers.pixel_shuffle
    monkeypatch.setattr(mergers, "pixel_shuffle", lambda *a, **k: right(*a, **k) + 1e-3)
    row = next(row for row in vlmops.patch(build("mistral3")).rows if row.sites)
    assert "the numeric check failed" in row.reason


# Pooling projectors: Gemma-3.


def projector(model):
    return model.model.multi_modal_projector


def test_pooling_projectors_agree():
    model, batch = build("gemma3"), batch_of("gemma3", "several_images")
    expected, grads = gradients(model, batch)
    assert vlmops.patch(model).counts["pixel_shuffle"] == 1
    with CountOps() as ran:
        got, our_grads = gradients(model, batch)
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (1, 1)
    assert ran.counts["aten::avg_pool2d"] == 0
    assert_agree(got, expected, "logits")
    assert_gradients_agree(our_grads, grads)


@pytest.mark.parametrize("part", ["avg_pool", "mm_soft_emb_norm"])
def test_hooks_inside_a_pooling_projector_run(part):
    model, batch = build("gemma3"), batch_of("gemma3", "several_images")
    vlmops.patch(model)
    seen = []
    getattr(projector(model), part).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert (len(seen), ran.counts[OP]) == (1, 0)
    vlmops.unpatch(model)
    row = next(row for row in vlmops.patch(model).rows if row.sites)
    assert row.status == "refused"
    assert "hooks" in row.reason


def test_pooling_projectors_run_their_own_code_on_other_sizes_and_dtypes():
    model = build("gemma3")
    ours, theirs = projector(model), copy.deepcopy(projector(model))
    vlmops.patch(model)
    for x in (torch.randn(2, 25, 40), torch.randn(2, 16, 40).double(), torch.randn(0, 16, 40)):
        with CountOps() as ran:
            got = outcome(lambda m, x=x: m(x), ours)
        expected = outcome(lambda m, x=x: m(x), theirs)
        assert ran.counts[OP] == 0
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
    x = torch.randn(2, 16, 40)
    with torch.autocast("cpu", torch.bfloat16), CountOps() as ran:
        assert torch.equal(ours(x), theirs(x))
    assert ran.counts[OP] == 0


def test_pooling_projectors_that_do_more_are_refused():
    model = build("gemma3")

    class Shifted(type(projector(model))):
        def forward(self, vision_outputs):
            return super().forward(vision_outputs) + 0.01

    projector(model).__class__ = Shifted
    row = next(row for row in vlmops.patch(model).rows if row.sites)
    assert (row.status, row.module) == ("refused", "Shifted")
    assert "it does something else with its pool, norm and matrix" in row.reason


# Pools.


class Pooled(nn.Module):
    """As LLaVA-NeXT-Video's has it: the pool sees tokens that lie in channels_last."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("factor", "shape"),
    [(2, (2, 4, 6, 8)), (2, (1, 5, 7, 3)), (3, (2, 9, 4, 40)), (4, (1, 4, 4, 1))],
)
def test_pools_of_tokens_agree(factor, shape, dtype):
    """Remainders included, which are dropped."""
    theirs = Pooled(nn.AvgPool2d(factor))
    model = nn.Sequential(copy.deepcopy(theirs))
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path) == ("patched", "0.pool")
    assert row.reason == f"blocks of {factor} x {factor} (mean)"
    x, found = torch.randn(shape).to(dtype), []
    for module in (theirs, model[0]):
        given = x.clone().requires_grad_()
        with CountOps() as ran:
            out = module(given)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
            found.append((out, *torch.autograd.grad(out, given, upstream)))
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (1, 1)
    for theirs, ours in zip(*found, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (dtype, theirs.shape, theirs.stride())
        if factor == 3:  # a third of a third is rounded
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)


def autocast(pool, x):
    with torch.autocast("cpu", torch.bfloat16):
        return pool(x)


def channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


POOLED = {
    "channels_first": lambda pool: pool(torch.randn(2, 8, 4, 4)),
    "one_image": lambda pool: pool(torch.randn(8, 4, 4)),
    "smaller_than_a_block": lambda pool: pool(channels_last(2, 8, 1, 4)),
    "empty": lambda pool: pool(channels_last(0, 8, 4, 4)),
    "autocast": lambda pool: autocast(pool, channels_last(2, 8, 4, 4)),
    "float64": lambda pool: pool(channels_last(2, 8, 4, 4).double()),
    "another_stride": lambda pool: setattr(pool, "stride", 1) or pool(channels_last(2, 8, 4, 4)),
    "vmap": lambda pool: torch.func.vmap(pool)(torch.randn(2, 1, 8, 4, 4)),
}


@pytest.mark.parametrize("name", POOLED)
def test_pools_of_anything_else_run_as_before(name):
    model = nn.Sequential(Pooled(nn.AvgPool2d(2)))
    assert vlmops.patch(model).counts == {"pixel_shuffle": 1}
    with CountOps() as ran:
        got = outcome(POOLED[name], model[0].pool)
    assert ran.counts[OP] == 0
    expected = outcome(POOLED[name], nn.AvgPool2d(2))
    assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_pools_compile_to_one_graph():
    model, graphs = nn.Sequential(Pooled(nn.AvgPool2d(2))), []
    x = torch.randn(2, 4, 6, 5)
    expected = model(x)
    vlmops.patch(model)
    torch._dynamo.reset()
    keep = lambda graph, _: graphs.append(graph.code) or graph  # noqa: E731
    assert torch.equal(torch.compile(model, fullgraph=True, backend=keep)(x), expected)
    assert [code.count("vlmops.pixel_shuffle") for code in graphs] == [1]


def test_pools_that_fail_the_check_are_refused(monkeypatch):
    right = mergers.pixel_shuffle
    for change, reason in (
        (lambda y: y * 1.02, "averages of torch.float32 differ"),
        (lambda y: y[..., 1:], "averages of torch.float32 are of another size"),
    ):
        monkeypatch.setattr(site, "_checked", {})
        monkeypatch.setattr(
            mergers, "pixel_shuffle", lambda *a, change=change, **k: change(right(*a, **k))
        )
        (row,) = vlmops.patch(nn.Sequential(Pooled(nn.AvgPool2d(2)))).rows
        assert (row.status, row.reason) == ("refused", f"the numeric check failed: {reason}")


class OwnPool(nn.AvgPool2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_pools_of_a_class_of_their_own_are_refused():
    (row,) = vlmops.patch(nn.Sequential(Pooled(OwnPool(2)))).rows
    assert (row.status, row.path) == ("refused", "0.pool")
    assert "OwnPool is a subclass" in row.reason


def test_hooks_of_a_pool_run():
    model, seen = nn.Sequential(Pooled(nn.AvgPool2d(2))), []
    vlmops.patch(model)
    model[0].pool.register_forward_hook(lambda *_: seen.append(1))
    with CountOps() as ran:
        model(torch.randn(2, 4, 6, 5))
    assert (len(seen), ran.counts[OP]) == (1, 1)


@pytest.mark.parametrize("mode", ["average", "max"])
def test_pools_of_videos(mode):
    """LLaVA-NeXT-Video's, and no other way of pooling."""
    vision = {**row_of("llava_next").vision, "image_size": 16}
    config = transformers.LlavaNextVideoConfig(
        vision_config=dict(vision),
        text_config={**config_of("llava_next").text_config.to_dict()},
        spatial_pool_mode=mode,
        **row_of("llava_next").config,
    )
    model = transformers.LlavaNextVideoForConditionalGeneration(config).eval()
    x = torch.randn(3, 16, model.config.vision_config.hidden_size)
    expected = model.model.vision_resampler(x)
    found = places(vlmops.patch(model))
    assert found == ({"model.vision_resampler.pool": 1} if mode == "average" else {})
    with CountOps() as ran:
        assert torch.equal(model.model.vision_resampler(x), expected)
    assert ran.counts[OP] == len(found)


def test_pools_of_crops(monkeypatch):
    """Phi-4's, whose tower keeps the strides of its patches."""
    monkeypatch.undo()  # all ops
    monkeypatch.setattr(shuffles, "SMALL", 0)
    model, batch = build("phi4_multimodal"), batch_of("phi4_multimodal", "several_images")
    with torch.no_grad():
        expected = run(model, batch).logits
        for ops, count in ((["pixel_shuffle"], 0), (["patch_embed"], 1)):
            vlmops.patch(model, ops=ops)
            with CountOps() as ran:
                assert_agree(run(model, batch).logits, expected, "logits")
            assert (ran.counts[OP], ran.counts["aten::avg_pool2d"]) == (count, 1 - count)


# What is left alone.


def left_alone(model):
    return {row.path: row.reason for row in vlmops.patch(model).rows if row.status == "left alone"}


def on_meta(name, **config):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**config)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize(
    ("stride", "reason"),
    [
        (1, {}),
        (2, {"model.vision_tower": "its merging of 2 x 2 takes no time beside the product that "
                                   "follows"}),
    ],
)  # fmt: skip
def test_tokens_that_a_tower_merges_itself_are_left_alone(stride, reason):
    """Ovis2's."""
    layers = {"num_hidden_layers": 1}
    model = on_meta("Ovis2", vision_config={"hidden_stride": stride, **layers}, text_config=layers)
    assert left_alone(model) == reason


class Inside(nn.Module):
    """Merges in a forward that does more, for a layer of some width."""

    def __init__(self, width, hidden_size=6):
        super().__init__()
        self.config = types.SimpleNamespace(stride=2, channels=6, hidden_size=hidden_size)
        self.proj = nn.Linear(width, 8)

    def forward(self, x):
        b, n, c = x.shape
        f, side = self.config.stride, int(n**0.5) // self.config.stride
        x = x.reshape(b, side, f, side, f, c).permute(0, 1, 3, 2, 4, 5)
        return self.proj(x.reshape(b, side * side, -1)).exp()


class Resized(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.resize(x) * 2

    def resize(self, x):
        side = int(x.shape[1] ** 0.5)
        x = x.transpose(1, 2).unflatten(2, (side, side))
        x = nn.functional.interpolate(x, scale_factor=self.scale, mode="bilinear")
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Inside(24), True),
        (Inside(28), False),  # of something else
        (Inside(24, hidden_size=24), False),  # of one token, as attention's
        (Resized(0.5), True),
        (Resized(2.0), False),
    ],
)
def test_what_else_multiplies_or_interpolates(module, found):
    assert bool(left_alone(nn.Sequential(module))) == found


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (378, "27 x 27 tokens to 14 x 14, which averages no blocks"),
        (336, "24 x 24 tokens to 12 x 12"),
    ],
)
def test_tokens_that_are_interpolated_are_left_alone(size, reason):
    """LLaVA-OneVision's videos."""
    model = on_meta(
        "LlavaOnevision",
        vision_config={**row_of("llava_onevision").vision, "image_size": size, "patch_size": 14},
        text_config={"num_hidden_layers": 1, "model_type": "qwen2"},
    )
    assert left_alone(model) == {"model": f"apply_pooling interpolates {reason}"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"kernel_size": 2}, True),
        ({"kernel_size": (2, 2), "stride": (2, 2)}, True),
        ({"kernel_size": 2, "stride": 1}, False),
        ({"kernel_size": (2, 3)}, False),
        ({"kernel_size": 1}, False),
        ({"kernel_size": 17}, False),
        ({"kernel_size": 2, "padding": 1}, False),
        ({"kernel_size": 2, "ceil_mode": True}, False),
        ({"kernel_size": 2, "divisor_override": 3}, False),
    ],
)
def test_which_pools_average_blocks(options, found):
    assert mergers.is_pool(nn.AvgPool2d(**options)) == found


# Every family: last, they take the longest.


@pytest.mark.parametrize("family", EVERY)
def test_family_table_holds(family):
    """A site that rots with a new transformers turns this red; so does one that appears."""
    model = build(family)
    report = vlmops.patch(model)
    path = (PLACES | POOLS).get(family)
    assert places(report) == ({path: 1} if path else {})
    left = LEFT.get(family)
    assert places(report, "left alone") == ({left: 1} if left else {})
    assert places(report, "refused") == {}
    expected = targets.expected_places(model.config.model_type)
    expected = {p.path: p.sites(model.config) for p in expected if p.op == "pixel_shuffle"}
    if family not in UNLISTED:
        present = {path: sites for path, sites in expected.items() if sites}
        assert present == {**places(report), **places(report, "left alone")}


@moved
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_and_gradients_are_equal_to_the_bit(family, dtype):
    if family == "cohere2_vision" and dtype == torch.bfloat16:
        pytest.skip("its product of strided tokens adds the bias to what is rounded already")
    model, batch = build(family, dtype=dtype), batch_of(family, "several_images", dtype)
    expected, grads = gradients(model, batch)
    assert vlmops.patch(model).counts["pixel_shuffle"] == 1
    with CountOps() as ran:
        got, our_grads = gradients(model, batch)
    count = calls(family, 2)
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (count, count)
    assert torch.equal(got, expected)
    assert our_grads.keys() == grads.keys()
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())


@served
def test_texts_without_images_do_not_call_the_op(family):
    model, batch = build(family), batch_of(family, "text")
    vlmops.patch(model)
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert ran.counts[OP] == 0


@pytest.mark.parametrize("family", ["mistral3", "lighton_ocr", "lfm2_vl"])
def test_several_grids(family):
    """Rectangles, in the model."""
    model = build(family)
    batch = inputs(family, [[3, (2, 3), 5, (4, 2), 2, (1, 1)]])
    with torch.no_grad():
        expected = run(model, batch).logits
        vlmops.patch(model)
        with CountOps() as ran:
            assert torch.equal(run(model, batch).logits, expected)
    assert ran.counts[OP] == calls(family, 3)


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision"])
def test_bfloat16_is_at_least_as_right_as_hugging_face(family):
    dtypes = (torch.float32, torch.bfloat16)
    batch, batch16 = (batch_of(family, "several_images", dtype) for dtype in dtypes)
    model = build(family, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), batch).logits
        theirs = run(model, batch16).logits
        vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch16).logits
    assert ran.counts[OP] == 1
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


@served
def test_gradient_checkpointing(family):
    batch = batch_of(family, "several_images")
    logits, grads = gradients(build(family), batch)
    model = build(family)
    vlmops.patch(model)
    # Newer name first; transformers 5.17 has only the other.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with CountOps() as ran:
        patched_logits, patched_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[OP] == calls(family, 2)  # outside of the layers, so once
    assert_agree(patched_logits, logits, "logits")
    assert_gradients_agree(patched_grads, grads)


@served
def test_twin_copies_pickles_and_unpatch(family, tmp_path):
    _, restored = assert_twin_copies_and_pickles(family, tmp_path)
    assert restored == 1


@served
def test_meta_device(family):
    config = config_of(family)
    with torch.device("meta"):
        model = getattr(transformers, row_of(family).architecture)(config)
    assert places(vlmops.patch(model)) == {PLACES[family]: 1}
