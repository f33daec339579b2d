"""`vlmops.patch` with patch embeddings: same outputs and gradients, only what may be replaced."""

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
from hf.tiny import FAMILIES, UNLISTED, P, build, config_of, inputs, row_of, run
from torch import nn

import vlmops
from vlmops import dispatch
from vlmops.hf import targets
from vlmops.hf.sites import patch_embed as site
from vlmops.ops import linear as ways

pytestmark = [
    pytest.mark.usefixtures("only_patch_embed"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]

OP, BACKWARD = "vlmops::patch_embed", "vlmops::patch_embed_backward"
# Their patches come flattened, for an nn.Linear; then the families of `UNLISTED`.
WITHOUT = {"ernie4_5_vl_moe", "lfm2_vl", "muse_glimmer"}
UNLISTED_PLACES = {
    "lighton_ocr": ["model.vision_encoder.patch_conv"],
    "exaone4_5": ["model.visual.patch_embed.proj"],
    "minimax_m3_vl": ["model.vision_tower.embeddings.proj"],
    "kimi_k25": ["model.vision_tower.patch_embed.proj"],
}
EVERY = [*FAMILIES, *UNLISTED]
served = pytest.mark.parametrize("family", [name for name in EVERY if name not in WITHOUT])


def places(report, status="patched"):
    return {row.path: row.sites for row in report.rows if row.sites and row.status == status}


# Convolutions by themselves.


def patched(layer):
    """A copy of a layer, patched."""
    model = nn.Sequential(copy.deepcopy(layer))
    assert vlmops.patch(model).counts == {"patch_embed": 1}
    return model[0]


def agree(layer, x, calls=1, tolerance=1e-5):
    """Of values, gradients, dtype and shape, with so many calls of the op."""
    ours, found = patched(layer), {}
    for name, module in (("theirs", layer), ("ours", ours)):
        given = x.detach().clone().requires_grad_(x.is_floating_point())
        with CountOps() as ran:
            out = module(given)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
            wanted = [given, *module.parameters()]
            found[name] = out, torch.autograd.grad(out, wanted, upstream.to(out.dtype))
    assert ran.counts[OP] == calls
    (out, grads), (expected, expected_grads) = found["ours"], found["theirs"]
    assert out.dtype == expected.dtype
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == theirs.dtype
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)


LAYERS = {
    "plain": (nn.Conv2d(3, 8, 4, 4), (2, 3, 12, 20)),
    "no_bias": (nn.Conv2d(3, 8, 4, 4, bias=False), (2, 3, 12, 20)),
    "valid": (nn.Conv2d(3, 8, 4, 4, padding="valid"), (2, 3, 12, 20)),
    "remainder": (nn.Conv2d(3, 8, 4, 4), (2, 3, 15, 18)),
    "rectangle": (nn.Conv2d(3, 8, (4, 2), (4, 2)), (1, 3, 9, 9)),
    "one_patch": (nn.Conv2d(3, 8, 4, 4), (5, 3, 4, 4)),
    "many_channels": (nn.Conv2d(33, 8, 2, 2), (2, 33, 6, 4)),
    "video": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)), (2, 3, 5, 9, 12)),
    "qwen": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (7, 3, 2, 4, 4)),
    "no_images": (nn.Conv2d(3, 8, 4, 4), (0, 3, 12, 20)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strides", ["contiguous", "channels_last", "transposed", "expanded"])
def test_convolutions_agree(name, strides):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    if strides == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif strides == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif strides == "expanded" and len(x):
        x = x[:1].expand(shape)
    agree(layer, x)


@pytest.mark.parametrize("name", ["plain", "qwen"])
def test_channels_last_weights(name):
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    agree(layer.to(memory_format=memory), torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "qwen"])
def test_sixteen_bits(name, dtype):
    layer, shape = copy.deepcopy(LAYERS[name][0]).to(dtype), LAYERS[name][1]
    agree(layer, torch.randn(shape).to(dtype), tolerance=2 * torch.finfo(dtype).eps)


def test_tokens_are_not_copied():
    """What towers do with the result gives the op's own memory, as tokens."""
    layer, (_, channels, *_) = patched(nn.Conv2d(3, 8, 4, 4)), (2, 3)
    out = layer(torch.randn(2, channels, 12, 20))
    tokens = out.flatten(2).transpose(1, 2)
    assert tokens.is_contiguous()
    assert tokens.data_ptr() == out.data_ptr()
    flat = patched(nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)))(torch.randn(7, 3, 2, 4, 4))
    assert flat.shape == (7, 8, 1, 1, 1)
    assert flat.view(-1, 8).data_ptr() == flat.data_ptr()


def test_patches_that_are_ready_are_not_gathered():
    layer = patched(nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4)))
    with torch.no_grad(), CountOps() as ran:
        layer(torch.randn(7, 3, 2, 4, 4))
    assert (ran.counts[OP], ran.counts["vlmops::patch_embed_pack"]) == (1, 0)


# What the op does not serve; the convolution's own code runs, with its errors.
OTHERS = {
    "unbatched": lambda m: m(torch.randn(3, 12, 20)),
    "too_small": lambda m: m(torch.randn(2, 3, 12, 3)),
    "channels": lambda m: m(torch.randn(2, 4, 12, 20)),
    "rank": lambda m: m(torch.randn(12, 20)),
    "float64": lambda m: m.double()(torch.randn(2, 3, 12, 20).double()),
    "pixels_float64": lambda m: m(torch.randn(2, 3, 12, 20).double()),
    "pixels_bfloat16": lambda m: m(torch.randn(2, 3, 12, 20).bfloat16()),
    "pixels_uint8": lambda m: m(torch.ones(2, 3, 12, 20, dtype=torch.uint8)),
    "bias_bfloat16": lambda m: (
        setattr(m.bias, "data", m.bias.data.bfloat16()) or m(torch.randn(2, 3, 12, 20))
    ),
    "meta": lambda m: m.to("meta")(torch.randn(2, 3, 12, 20, device="meta")).shape,
    "autocast_float64": lambda m: autocast(m)(torch.randn(2, 3, 12, 20).double()),
    "vmap": lambda m: torch.func.vmap(m)(torch.randn(4, 2, 3, 12, 20)),
    "grad": lambda m: torch.func.grad(lambda x: m(x).square().sum())(torch.randn(2, 3, 12, 20)),
    "jvp": lambda m: torch.func.jvp(m, (torch.randn(2, 3, 12, 20),), (torch.ones(2, 3, 12, 20),)),
    "forward_ad": lambda m: dual(m, torch.randn(2, 3, 12, 20)),
    "subclass": lambda m: m(torch.randn(2, 3, 12, 20).as_subclass(Wrapped)),
    "sharded": lambda m: with_subclass_weight(m)(torch.randn(2, 3, 12, 20)),
}


class Wrapped(torch.Tensor):
    pass


def autocast(module):
    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    return call


def dual(module, x):
    with torch.autograd.forward_ad.dual_level():
        out = module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(out)


def outcome(function, module):
    torch.manual_seed(0)
    try:
        return function(module)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_op_does_not_serve_runs_as_before(name):
    layer = nn.Conv2d(3, 8, 4, 4)
    ours = patched(layer)
    with CountOps() as ran:
        got = outcome(OTHERS[name], ours)
    assert ran.counts[OP] == 0
    expected = outcome(OTHERS[name], layer)
    assert type(got) is type(expected)
    flat = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_tracing_records_the_convolution():
    layer = nn.Conv2d(3, 8, 4, 4)
    x = torch.randn(2, 3, 12, 20)
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="torch.jit"):
        traced = torch.jit.trace(patched(layer), x)
    assert "vlmops" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_what_it_does_to_convolutions(dtype):
    layer, x = nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 12, 20)
    ours = patched(layer)
    found = []
    for module in (layer, ours):
        with torch.autocast("cpu", dtype), CountOps() as ran:
            out = module(x)
        out.float().square().sum().backward()
        found.append((out, module.weight.grad, module.bias.grad))
    assert ran.counts[OP] == 1
    for theirs, our in zip(*found, strict=True):
        assert our.dtype == theirs.dtype
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(our, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps * largest)


def test_a_layer_that_moved_runs_as_before(monkeypatch):
    """To a device that has no kernel."""
    layer, x = nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 12, 20)
    ours = patched(layer)
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: "no kernel there")
    with CountOps() as ran:
        assert torch.equal(ours(x), layer(x))
    assert ran.counts[OP] == 0


def test_inputs_that_are_parameters_are_served():
    """Adversarial pixels."""
    layer = patched(nn.Conv2d(3, 8, 4, 4))
    pixels = nn.Parameter(torch.randn(2, 3, 12, 20))
    with CountOps() as ran:
        layer(pixels).square().sum().backward()
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (1, 1)
    assert pixels.grad.abs().min() > 0


def test_hooks_that_come_later_run():
    """As those by which PEFT makes the outputs of frozen embeddings require grad."""
    layer = patched(nn.Conv2d(3, 8, 4, 4)).requires_grad_(False)
    layer.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    out = layer(torch.randn(2, 3, 12, 20))
    assert out.requires_grad
    out.sum().backward()


def test_weights_that_change_are_used():
    layer = nn.Conv2d(3, 8, 4, 4)
    ours, x = patched(layer), torch.randn(2, 3, 12, 20)
    ours(x)
    with torch.no_grad():
        for module in (layer, ours):
            module.weight.mul_(-2)
        torch.testing.assert_close(ours(x), layer(x))
    stateless = {name: 3 * p.detach() for name, p in layer.named_parameters()}
    got, expected = (torch.func.functional_call(m, stateless, x) for m in (ours, layer))
    torch.testing.assert_close(got, expected)


def test_compiles_to_one_graph():
    layer, x = nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 15, 20)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(patched(layer), fullgraph=True, backend="aot_eager", dynamic=True)
    assert_agree(compiled(x), expected, "compiled")
    with torch.no_grad():
        assert_agree(compiled(x), expected, "compiled without gradients")
    graphs = []
    record = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    torch.compile(patched(layer), fullgraph=True, backend=record)(x)
    assert "vlmops.patch_embed" in graphs[0].code


# What is not patched.


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(layer, register):
    getattr(layer, register)(lambda *_: None)
    return layer


def replaced(layer):
    layer.forward = functools.partial(layer.forward)
    return layer


def with_subclass_weight(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Wrapped))
    return layer


def with_plain_weight(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


REFUSED = {
    "subclass": (lambda layer: Scaled(3, 8, 4, 4), "Scaled is a subclass"),
    "parametrized": (nn.utils.parametrizations.weight_norm, "ParametrizedConv2d is a subclass"),
    "weight_norm": (with_plain_weight, "of type Tensor, not plain parameters"),
    "sharded": (with_subclass_weight, "of type Wrapped, not plain parameters"),
    "float64": (lambda layer: layer.double(), "no kernel for weights of torch.float64"),
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
    layer = change(nn.Conv2d(3, 8, 4, 4))
    kind = type(layer)
    model = nn.Sequential(layer)
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.path) == ("refused", "0")
    assert reason in row.reason
    assert type(model[0]) is kind


def test_refuses_a_class_that_another_library_wrapped(monkeypatch):
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: original(self, x))
    with pytest.raises(ValueError, match=r"Conv2d.forward was replaced by .*test_patch_embed_site"):
        vlmops.patch(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), ops=["patch_embed"])


def test_refuses_devices_without_a_backend(monkeypatch):
    monkeypatch.setattr(dispatch, "refuses", lambda op, device: f"{op}: no kernel for {device}")
    (row,) = vlmops.patch(nn.Sequential(nn.Conv2d(3, 8, 4, 4))).rows
    assert row.reason == "patch_embed: no kernel for cpu"


NONE = {
    "overlapping": nn.Conv2d(3, 8, 4, 2),
    "with_gaps": nn.Conv2d(3, 8, 2, 4),
    "one_pixel": nn.Conv2d(3, 8, 1, 1),
    "padded": nn.Conv2d(3, 8, 4, 4, padding=1),
    "dilated": nn.Conv2d(3, 8, 2, 2, dilation=2),
    "groups": nn.Conv2d(4, 8, 4, 4, groups=2),
    "one_dimension": nn.Conv1d(3, 8, 4, 4),
    "transposed": nn.ConvTranspose2d(3, 8, 4, 4),
    "unfold_alone": nn.Sequential(nn.Unfold(4, stride=4)),
    "unfold_overlapping": nn.Sequential(nn.Unfold(4, stride=2), nn.Linear(48, 8)),
    "unfold_padded": nn.Sequential(nn.Unfold(4, stride=4, padding=1), nn.Linear(48, 8)),
}


@pytest.mark.parametrize("name", NONE)
def test_finds_nothing(name):
    model = nn.Sequential(NONE[name])
    assert [row.status for row in vlmops.patch(model).rows] == ["not present"]


@pytest.mark.parametrize("change", [lambda y: y + 1e-3, lambda y: y[:, :-1], lambda y: y.double()])
def test_refuses_what_fails_the_check(monkeypatch, change):
    monkeypatch.setattr(site, "_checked", {})
    right = site.patch_embed
    monkeypatch.setattr(
        site, "patch_embed", lambda *args, **options: change(right(*args, **options))
    )
    model = nn.Sequential(nn.Conv2d(3, 8, (4, 2), (4, 2)))
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.sites) == ("refused", 1)
    assert "the numeric check failed" in row.reason
    assert vlmops.patch(model, verify=False).counts["patch_embed"] == 1


def test_lora_around_a_convolution_still_adds_its_own():
    """As PEFT wraps it; what is inside is served, and so is the convolution that LoRA adds."""

    class Lora(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer
            self.lora_A = nn.Conv2d(3, 2, 4, 4, bias=False)
            self.lora_B = nn.Conv2d(2, 40, 1, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_layer, name)

    model, batch = build("llava"), batch_of("llava", "several_images")
    embeddings = model.model.vision_tower.embeddings
    embeddings.patch_embedding = Lora(embeddings.patch_embedding)
    expected, grads = gradients(model, batch)
    report = vlmops.patch(model)
    assert type(embeddings.patch_embedding) is Lora
    assert report.counts["patch_embed"] == 2
    got, our_grads = gradients(model, batch)
    assert_agree(got, expected, "logits")
    assert_gradients_agree(our_grads, grads)


def test_products_are_measured_where_there_are_numbers(monkeypatch):
    seen = []
    monkeypatch.setattr(site, "tune", lambda weights, seconds: seen.extend(weights))
    with torch.device("meta"):
        meta = nn.Conv2d(3, 8, 4, 4)
    monkeypatch.setattr(ways, "multiplies", lambda dtype: False)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Scaled(3, 8, 4, 4), meta)
    model.append(nn.Conv2d(3, 8, 4, 4).bfloat16())
    assert vlmops.patch(model).counts["patch_embed"] == 3
    kinds = [(tuple(w.shape), w.dtype) for w in seen if w.numel()]
    assert kinds == [((8, 48), torch.float32)] * 2  # bfloat16 is multiplied in float32 panels
    assert seen[0].data_ptr() == model[0].weight.data_ptr()


# Llama-4: an Unfold and a Linear.


def unfolding(model):
    return model.vision_model.patch_embedding


def test_the_linear_layer_of_an_unfolding_is_not_counted_twice(monkeypatch):
    monkeypatch.undo()  # all ops
    always = (True,) * len(ways.FROM_ROWS)
    monkeypatch.setattr(ways, "wins", lambda *_: always)
    monkeypatch.setattr("vlmops.ops.linear_tuning.wins", lambda *_: always)
    counts = {}
    for ops in (["linear"], ["patch_embed", "linear"]):
        model = build("llama4")
        counts[len(ops)] = vlmops.patch(model, ops=ops).counts["linear"]
    assert counts[1] == counts[2] + 1
    assert type(unfolding(model).linear) is nn.Linear


@pytest.mark.parametrize("part", ["unfold", "linear"])
def test_hooks_inside_an_unfolding_run(part):
    model, batch = build("llama4"), batch_of("llama4", "several_images")
    seen = []
    vlmops.patch(model)
    getattr(unfolding(model), part).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert len(seen) == 1
    assert ran.counts[OP] == 0
    vlmops.unpatch(model)
    (row,) = vlmops.patch(model).rows
    assert row.status == "refused"
    assert "hooks" in row.reason


def test_an_unfolding_whose_parts_are_replaced_later_runs_them():
    model, batch = build("llama4"), batch_of("llama4", "several_images")
    vlmops.patch(model)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    unfolding(model).linear.__class__ = Doubled
    with torch.no_grad(), CountOps() as ran:
        got = run(model, batch).logits
        vlmops.unpatch(model)
        assert torch.equal(got, run(model, batch).logits)
    assert ran.counts[OP] == 0


def test_an_unfolding_that_does_more_is_refused():
    model = build("llama4")

    class Flipped(type(unfolding(model))):
        def forward(self, hidden_states):
            return super().forward(hidden_states).flip(1)

    unfolding(model).__class__ = Flipped
    (row, *_) = vlmops.patch(model).rows
    assert row.status == "refused"
    assert "the numeric check failed" in row.reason


def test_odd_images():
    """A remainder beyond whole patches is dropped; Pixtral's images of several sizes."""
    for family, key in (("llava_pixtral", "pixel_values"), ("internvl", "pixel_values")):
        model, batch = build(family), inputs(family, [[3, (4, 4), 2]])
        tower = model.model.vision_tower
        pixels = torch.nn.functional.pad(batch[key], (0, P - 1, 0, 1), value=7.0)
        given = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
        with torch.no_grad():
            expected = tower(pixels, **given).last_hidden_state
            vlmops.patch(model)
            with CountOps() as ran:
                assert_agree(tower(pixels, **given).last_hidden_state, expected, family)
        assert ran.counts[OP] == 1


# Every family: last, they take the longest.


@pytest.mark.parametrize("family", EVERY)
def test_family_table_holds(family):
    """A site that rots with a new transformers turns this red; so does one that appears."""
    model = build(family)
    found = places(vlmops.patch(model))
    if family in UNLISTED:
        assert found == dict.fromkeys(UNLISTED_PLACES.get(family, ()), 1)
        return
    expected = targets.expected_places(model.config.model_type)
    expected = {p.path: p.sites(model.config) for p in expected if p.op == "patch_embed"}
    if row_of(family).in_5_17 and transformers.__version__.startswith("5.17."):
        return  # a part of it hangs elsewhere
    assert found == {path: sites for path, sites in expected.items() if sites}
    assert bool(found) == (family not in WITHOUT)


def test_expected_places_are_found_in_default_configs():
    """Of families that have no row in `tiny.py`."""
    missing = {}
    for model_type in sorted({t for family in targets.families() for t in family} - set(FAMILIES)):
        config = transformers.AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(config)
        report = vlmops.patch(model, verify=False)
        missing[model_type] = [row.reason for row in report.rows if row.status == "refused"]
        assert report.counts["patch_embed"] > 0, model_type
    assert len(missing) > 5
    assert not any(missing.values())


@served
def test_logits_and_gradients_agree(family):
    model = build(family)
    batches = {name: batch_of(family, name) for name in ("text", "several_images")}
    expected = {name: gradients(model, batch) for name, batch in batches.items()}
    sites = vlmops.patch(model).counts["patch_embed"]
    assert sites > 0
    for name, batch in batches.items():
        with CountOps() as ran:
            logits, grads = gradients(model, batch)
        calls = sites if name != "text" or family == "idefics" else 0
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
        sites = vlmops.patch(model).counts["patch_embed"]
        with CountOps() as ran:
            ours = run(model, batch16).logits
    assert ran.counts[OP] == sites
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


@served
def test_gradient_checkpointing(family):
    batch = batch_of(family, "several_images")
    logits, grads = gradients(build(family), batch)
    model = build(family)
    sites = vlmops.patch(model).counts["patch_embed"]
    # Newer name first; transformers 5.17 has only the other.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with CountOps() as ran:
        patched_logits, patched_grads = gradients(model, batch, use_cache=False)
    assert ran.counts[OP] == sites  # outside of the layers, so once
    assert_agree(patched_logits, logits, "logits")
    assert_gradients_agree(patched_grads, grads)


@served
def test_frozen_towers_are_not_differentiated(family):
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vis" not in name and "embed_tokens_extend" not in name)
    with CountOps() as ran:
        gradients(model, batch)
    assert ran.counts[OP] > 0
    assert ran.counts[BACKWARD] == 0


@served
def test_twin_copies_pickles_and_unpatch(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    assert restored >= len(places(report))


@served
def test_autocast(family):
    if "autocast" in row_of(family).lacks:
        pytest.skip(row_of(family).lacks["autocast"])
    model, batch = build(family), batch_of(family, "several_images")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        vlmops.patch(model)
        ours = run(model, batch).logits
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@served
def test_meta_device(family):
    config = config_of(family)
    with torch.device("meta"):
        model = getattr(transformers, row_of(family).architecture)(config)
    assert places(vlmops.patch(model)) == places(vlmops.patch(build(family)))
