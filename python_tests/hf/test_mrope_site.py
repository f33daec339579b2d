"""What is special to patching with M-RoPE: in place or not, other libraries, what is refused."""

import copy
import functools
import inspect
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch
from dispatch import CountOps
from hf import checks
from hf.checks import assert_agree, gradients
from hf.tiny import build, run, stretched
from torch import nn

import vlmops
from vlmops import dispatch
from vlmops.hf import aliasing, carry
from vlmops.hf import patch as patching
from vlmops.ops.mrope_spec import SPEC

LAYERS, TOWER = 3, 2  # of the tiny Qwen2-VL
BOTH = {"mrope": LAYERS + TOWER}
MODULES = LAYERS + TOWER + 2  # each part has a rotary module


pytestmark = pytest.mark.usefixtures("only_mrope")


def batch_of(name, dtype=torch.float32):
    return checks.batch_of("qwen2_vl", name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_is_hugging_faces_own_code(dtype):
    """Bit for bit: errors and speed-ups are relative to what users run."""
    rotary = build("qwen2_vl").model.language_model.rotary_emb
    args = {
        "q": torch.randn(2, 7, 4, 16).transpose(1, 2).to(dtype),
        "k": torch.randn(2, 7, 2, 16).transpose(1, 2).to(dtype),
        "position_ids": torch.randint(5000, (3, 2, 7)),
        "inv_freq": rotary.inv_freq,
        "freq_axis": vlmops.mrope_freq_axis([2, 3, 3]),
    }
    ours = SPEC.eager_for(args)(**args)
    module = inspect.getmodule(type(rotary))
    cos, sin = rotary(args["q"], args["position_ids"])
    theirs = module.apply_rotary_pos_emb(args["q"], args["k"], cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


KEEPERS = {
    "output": lambda out: out,
    "detached": lambda out: out.detach(),
    "slice": lambda out: out[0],
    "numpy": lambda out: out.detach().numpy(),
    "storage": lambda out: out.untyped_storage(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_hooks_see_what_they_saw_before(family, projection, keep, mode):
    """Rotating in place must not reach into what a forward hook recorded, in whatever form."""
    model, batch = build(family), batch_of("text")
    attention = model.model.language_model.layers[1].self_attn
    kept, copies = [], []

    def record(module, args, out):
        copies.append(out.clone())
        kept.append(keep(out))

    getattr(attention, projection).register_forward_hook(record)
    vlmops.patch(model)
    with mode(), CountOps() as ran:
        run(model, batch)
    with mode():
        assert_bytes_equal(kept[0], keep(copies[0]))
    assert ran.counts["vlmops::mrope"] == 1
    assert ran.counts["vlmops::mrope_"] == LAYERS - 1


def assert_bytes_equal(got, expected):
    if isinstance(got, torch.UntypedStorage):
        got, expected = (torch.tensor(s.tolist(), dtype=torch.uint8) for s in (got, expected))
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected))


HANDED_OUT = {
    "the same tensor": lambda array, tensor: tensor,
    "a view": lambda array, tensor: tensor.view_as(tensor),
    "numpy's memory": lambda array, tensor: torch.from_numpy(array),
}


@pytest.mark.parametrize("hand_out", HANDED_OUT.values(), ids=HANDED_OUT)
def test_projections_that_hand_out_their_own_memory_are_not_overwritten(hand_out):
    """As a captured graph would, or a server that reuses its buffers."""
    model, batch = build("qwen2_vl"), batch_of("text")
    array = np.random.default_rng(0).standard_normal((2, 9, 64), np.float32)
    output = torch.tensor(array)
    before = array.copy()

    class Static(nn.Module):
        def forward(self, x):
            return hand_out(array, output)

    model.model.language_model.layers[0].self_attn.q_proj = Static()
    vlmops.patch(model)
    with torch.no_grad():
        run(model, batch)
    assert np.array_equal(array, before)
    assert np.array_equal(output, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_that_are_no_views_are_not_overwritten(mode):
    """Attention that normalises after the transpose: a hook sees q itself."""
    kept = []

    def rotate(q, k, cos, sin):
        kept.append(q)
        return apply(q, k, cos, sin)

    model = build("qwen2_vl")
    vlmops.patch(model)
    decoder = model.model.language_model
    apply = type(decoder.layers[0].self_attn).forward.__globals__["apply_rotary_pos_emb"]
    with mode():
        carried = decoder.rotary_emb(torch.zeros(1), torch.arange(5).expand(3, 1, 5))
        q = torch.randn(1, 4, 5, 16)
        before = q.clone()
        rotate(q, torch.randn(1, 2, 5, 16), *carried)
    assert torch.equal(kept[0], before)


def test_what_counts_as_unseen_does_not_depend_on_where_it_was_learnt():
    aliasing._of_fresh_views.cache_clear()
    model, batch = build("qwen2_vl"), batch_of("text")
    with torch.inference_mode(), torch.device("meta"), CountOps():
        vlmops.patch(model)
        assert aliasing._of_fresh_views(False) != aliasing._of_fresh_views(True)
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert ran.counts["vlmops::mrope_"] == LAYERS


def test_compiles_with_gradients():
    model = build("qwen2_vl")
    vlmops.patch(model)
    decoder = model.model.language_model
    embeds = torch.randn(2, 9, 64)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")

    def hidden(f):
        return f(inputs_embeds=embeds, use_cache=False).last_hidden_state

    with torch.no_grad():
        assert_agree(hidden(compiled), hidden(decoder), "compiled")
    weight = decoder.layers[0].self_attn.q_proj.weight
    ours, theirs = (
        torch.autograd.grad(hidden(f).square().sum(), weight)[0] for f in (compiled, decoder)
    )
    assert_agree(ours, theirs, "gradient of the compiled model")


def test_inv_freq_is_read_where_it_stands():
    """`model.to(bfloat16)` rounds the buffer, and Hugging Face uses it as it is."""
    model = build("qwen2_vl").to(torch.bfloat16)
    vlmops.patch(model)
    carried = model.model.language_model.rotary_emb(
        torch.zeros(1, 1, 1), torch.zeros(3, 1, 1, dtype=torch.long)
    )
    buffer = model.model.language_model.rotary_emb.inv_freq
    assert buffer.dtype == torch.bfloat16
    assert torch.equal(carried[1].view(torch.float32)[0, 0], buffer.float())


def test_default_device_and_dtype_do_not_matter(monkeypatch):
    model = build("qwen2_vl")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert vlmops.patch(model).counts == BOTH
    finally:
        torch.set_default_dtype(torch.float32)


def test_report():
    model = build("qwen2_vl")
    report = vlmops.patch(model)
    text = str(report)
    for word in ("mrope", "Qwen2VLAttention", "model.language_model", "3", "cpu", "patched"):
        assert word in text
    assert report.to_dict()["counts"] == BOTH
    assert report.to_dict()["rows"][0]["backend"] == f"cpu ({vlmops.cpu_isa()})"
    again = vlmops.patch(model)
    assert again.counts == report.counts
    assert [r.status for r in again.rows] == ["already patched"] * 2


def test_ops_argument():
    model = build("qwen2_vl")
    with pytest.raises(ValueError, match="ops: expected names among mrope, got 'rope'"):
        vlmops.patch(model, ops=["rope"])
    with pytest.raises(TypeError, match=r"ops: expected a list of names.*write \['mrope'\]"):
        vlmops.patch(model, ops="mrope")
    assert vlmops.patch(model, ops=[]).counts == {}
    assert vlmops.patch(model, ops=["mrope"]).counts == BOTH


def test_model_without_a_site():
    model = nn.Sequential(nn.Linear(2, 2))
    report = vlmops.patch(model)
    assert report.counts == {"mrope": 0}
    assert "not present" in str(report)
    with pytest.raises(ValueError, match=r"ops: 'mrope' has no site(.|\n)*not present"):
        vlmops.patch(model, ops=["mrope"])


@pytest.mark.parametrize("function", [vlmops.patch, vlmops.unpatch])
def test_not_a_model(function):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        function("Qwen/Qwen2-VL-2B")


def test_old_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(__version__="5.16.2"))
    with pytest.raises(ImportError, match=r"needs transformers 5.17 or later, found 5.16.2: pip"):
        vlmops.patch(nn.Linear(1, 1))


def refusal(model, path="model.language_model"):
    """Why one part of a model is refused; the others are patched."""
    rows = {row.path: row for row in vlmops.patch(model).rows}
    refused = rows.pop(path)
    assert refused.status == "refused"
    assert all(row.status == "patched" for row in rows.values())
    return refused.reason


def attention_class():
    return type(build("qwen2_vl").model.language_model.layers[0].self_attn)


@pytest.mark.parametrize("module", ["rotary_emb", "layers.1.self_attn"])
def test_forward_replaced_on_an_instance_is_kept(module):
    model = build("qwen2_vl")
    replaced = model.model.language_model.get_submodule(module)
    replaced.forward = functools.partial(replaced.forward)
    assert "forward was replaced on the instance" in refusal(model)
    assert "forward" in vars(replaced)


def test_forward_wrapped_on_the_class_is_kept(monkeypatch):
    original = attention_class().forward

    @functools.wraps(original)
    def half(self, *args, **kwargs):
        out, weights = original(self, *args, **kwargs)
        return out / 2, weights

    monkeypatch.setattr(attention_class(), "forward", half)
    reason = refusal(build("qwen2_vl"))
    assert "Qwen2VLAttention.forward was wrapped by test_mrope_site" in reason


@pytest.mark.parametrize("wraps", [True, False])
def test_function_replaced_by_another_library_is_kept(monkeypatch, wraps):
    module = inspect.getmodule(attention_class())
    original = module.apply_rotary_pos_emb

    def spy(q, k, cos, sin, unsqueeze_dim=1):
        return original(q, k, cos, sin, unsqueeze_dim)

    replacement = functools.wraps(original)(spy) if wraps else spy
    monkeypatch.setattr(module, "apply_rotary_pos_emb", replacement)
    reason = refusal(build("qwen2_vl"))
    assert "was replaced by test_mrope_site" in reason
    assert "undo that first" in reason


def test_helpers_replaced_between_two_patches_are_seen(monkeypatch):
    """The rebuilt forward is not reused once its globals have changed."""
    vlmops.patch(build("qwen2_vl"))
    module = inspect.getmodule(attention_class())
    original = module.eager_attention_forward

    def half(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        return out / 2, weights

    monkeypatch.setattr(module, "eager_attention_forward", half)
    model, batch = build("qwen2_vl", "eager"), batch_of("text")
    with torch.no_grad():
        expected = run(model, batch).logits
        assert vlmops.patch(model).counts == BOTH
        assert_agree(run(model, batch).logits, expected, "after the replacement")


def test_function_of_the_kernels_package_is_found(monkeypatch):
    """It turns decorated functions into modules."""
    module = inspect.getmodule(attention_class())
    original = module.apply_rotary_pos_emb

    class Func(nn.Module):
        def forward(self, q, k, cos, sin, unsqueeze_dim=1):
            return original(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", Func())
    model, batch = build("qwen2_vl"), batch_of("text")
    with torch.no_grad():
        expected = run(model, batch).logits
        assert vlmops.patch(model).counts == BOTH
        assert_agree(run(model, batch).logits, expected, "logits")


def test_hooks_on_the_rotary_module():
    """They expect cosines and sines: refused if there, obeyed if they come later."""
    model, batch = build("qwen2_vl"), batch_of("text")
    rotary = model.model.language_model.rotary_emb

    def twice(module, args, out):
        return 2 * out[0], 2 * out[1]

    hook = rotary.register_forward_hook(twice)
    with torch.no_grad():
        expected = run(model, batch).logits
    assert "forward hooks on Qwen2VLRotaryEmbedding" in refusal(model)
    hook.remove()
    vlmops.patch(model)
    rotary.register_forward_hook(twice)
    with torch.no_grad():
        assert torch.equal(run(model, batch).logits, expected)


def test_wrappers_that_forward_attributes():
    """As compiled modules and PEFT do: the decoder inside is found, once."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model, batch = build("qwen2_vl"), batch_of("text")
    with torch.no_grad():
        expected = run(model, batch).logits
        model.model.language_model = Wrapper(model.model.language_model)
        report = vlmops.patch(model)
        assert report.counts == BOTH
        assert_agree(run(model, batch).logits, expected, "wrapped")
    assert vlmops.unpatch(model) == MODULES


@pytest.mark.parametrize(
    ("part", "paths"),
    [
        ("model", ["visual", "language_model"]),
        ("model.language_model", [""]),
        ("model.visual", [""]),
    ],
)
def test_parts_of_a_model(part, paths):
    """Nothing is reported missing when only a part is given."""
    report = vlmops.patch(build("qwen2_vl").get_submodule(part))
    assert [(row.path, row.status) for row in report.rows] == [(path, "patched") for path in paths]


def test_a_site_that_rots_is_noticed():
    """A family's model in which the expected place is gone."""
    model = build("qwen2_vl")
    model.model.language_model.rotary_emb.inv_freq = None
    rows = vlmops.patch(model).rows
    assert [row.status for row in rows] == ["patched", "refused"]
    assert "expected in qwen2_vl and not found" in rows[1].reason


def test_calls_that_the_kernel_cannot_serve_run_as_before():
    batch = batch_of("text")
    positions = torch.arange(9).expand(3, 2, 9)

    def logits(model, **kwargs):
        with torch.no_grad():
            return run(model, {**batch, **kwargs}).logits

    model = build("qwen2_vl")
    expected = logits(model, position_ids=positions.float())
    expected64 = logits(model.double())
    model.float()
    vlmops.patch(model)
    assert torch.equal(logits(model, position_ids=positions.float()), expected)
    assert torch.equal(logits(model.double()), expected64)
    decoder = model.float().requires_grad_(False).model.language_model
    embeds = torch.randn(2, 9, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's end, and the tracer's own
        traced = torch.jit.trace(
            lambda x: decoder(inputs_embeds=x, use_cache=False)[0], embeds, check_trace=False
        )
    with torch.no_grad():
        assert_agree(traced(embeds), decoder(inputs_embeds=embeds)[0], "traced")


def test_a_model_that_moved_runs_as_before(monkeypatch):
    """To a device that has no kernel."""
    model, batch = build("qwen2_vl"), batch_of("several_images")
    expected, grads = gradients(model, batch)
    vlmops.patch(model)
    monkeypatch.setattr(carry, "refuses", lambda device: "no kernel there")
    with CountOps() as ran:
        got, our_grads = gradients(model, batch)
    assert ran.counts["vlmops::mrope"] == 0
    assert torch.equal(got, expected)
    assert all(torch.equal(our_grads[name], grad) for name, grad in grads.items())


def test_projections_of_two_dtypes():
    """Autocast around one of them: each is rotated in its own."""
    model, batch = build("qwen2_vl"), batch_of("text")

    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x).bfloat16()

    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.__class__ = Half
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run(model, batch).logits
        vlmops.patch(model)
        got = run(model, batch).logits
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_positions_made_in_inference_mode_can_train():
    model, batch = build("qwen2_vl"), batch_of("text")
    vlmops.patch(model)
    with torch.inference_mode():
        positions = torch.arange(9).expand(3, 2, 9)
    run(model, {**batch, "position_ids": positions}).logits.sum().backward()


def test_wrappers_that_cast_floating_inputs():
    """FSDP's mixed precision casts what a layer gets; frequencies must not be rounded by it."""
    model, batch = build("qwen2_vl"), batch_of("several_images")
    with torch.no_grad():
        expected = run(model, batch).logits

    def cast(module, args, kwargs):
        low = tuple(
            t.bfloat16().float() if t.is_floating_point() else t
            for t in kwargs["position_embeddings"]
        )
        return args, {**kwargs, "position_embeddings": low}

    vlmops.patch(model)
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(cast, with_kwargs=True)
    with torch.no_grad():
        assert_agree(run(model, batch).logits, expected, "cast")


def test_dynamic_rope_between_forward_and_backward():
    """A later forward changes inv_freq in place; the graph of the first must not notice."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    model, batch = build("qwen2_vl", rope_parameters=parameters), batch_of("text")
    _, expected = gradients(model, batch)
    vlmops.patch(model)
    model.zero_grad()
    logits = run(model, batch).logits
    model.model.language_model.rotary_emb.inv_freq.mul_(0.5)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(upstream)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_agree(parameter.grad, expected[name], name)


def test_unpatch_leaves_what_was_wrapped_after_patching():
    model = build("qwen2_vl")
    vlmops.patch(model)
    rotary = model.model.language_model.rotary_emb
    rotary.forward = functools.partial(rotary.forward)
    with pytest.raises(RuntimeError, match=r"replaced on the instance after .* undo that first"):
        vlmops.unpatch(model)
    assert vlmops.patch(model).rows[0].status == "already patched"
    del rotary.forward
    assert vlmops.unpatch(model) == MODULES


def test_an_error_while_patching_leaves_nothing_half_done(monkeypatch):
    model = build("qwen2_vl")
    monkeypatch.setattr(patching, "_backend", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlmops.patch(model)
    assert vlmops.unpatch(model) == 0


def test_layers_without_attention_are_left_alone():
    """As linear attention and state space layers are."""

    class Mean(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states.cumsum(1), None

    model, batch = build("qwen2_vl"), batch_of("text")
    model.model.language_model.layers[1].self_attn = Mean()
    with torch.no_grad():
        expected = run(model, batch).logits
        assert vlmops.patch(model).counts == {"mrope": LAYERS - 1 + TOWER}
        assert_agree(run(model, batch).logits, expected, "logits")


class Gated(nn.Module):
    """Looks like a norm, and wants more."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x, gate):
        return x * gate * self.weight


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Identity())


FOREIGN = {
    "a large buffer": lambda m: m.register_buffer("mask", torch.ones(300, 300)),
    "a gated norm": lambda m: m.add_module("gated", Gated()),
    "TorchScript": lambda m: m.add_module("scripted", scripted()),
}


@pytest.mark.parametrize("add", FOREIGN.values(), ids=FOREIGN)
def test_what_attention_modules_may_hold_besides(add):
    """Refused with a reason, or no matter."""
    model, batch = build("qwen3_vl"), checks.batch_of("qwen3_vl", "several_images")
    expected = run(model, batch).logits
    for layer in model.model.language_model.layers:
        add(layer.self_attn)
    assert vlmops.patch(model).counts["mrope"] > 0
    assert_agree(run(model, batch).logits, expected, "logits")


def test_a_rotary_module_that_cannot_be_copied_is_refused():
    model = build("qwen2_vl")
    model.model.language_model.rotary_emb.lock = threading.Lock()
    assert "cannot be probed: TypeError" in refusal(model)


def test_rotary_that_differs_is_refused():
    class Squared(type(build("qwen2_vl").model.language_model.rotary_emb)):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids**2)

    model = build("qwen2_vl")
    model.model.language_model.rotary_emb.__class__ = Squared
    assert "the numeric check failed" in refusal(model)
    assert vlmops.patch(model, verify=False).counts == BOTH


def test_rotary_driven_by_two_axes_is_refused():
    class Mixed(type(build("qwen2_vl").model.language_model.rotary_emb)):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids + position_ids.flip(0))

    model = build("qwen2_vl")
    model.model.language_model.rotary_emb.__class__ = Mixed
    assert "not driven by one axis" in refusal(model)


def test_scaling_that_changes_after_patching_is_used():
    """The rotary module then returns cosines and sines as it did before."""
    model, batch = build("qwen2_vl"), batch_of("text")
    scaled = copy.deepcopy(model)
    vlmops.patch(model)
    for changed in (model, scaled):
        changed.model.language_model.rotary_emb.attention_scaling = 2.0
    with torch.no_grad(), CountOps() as ran:
        assert torch.equal(run(model, batch).logits, run(scaled, batch).logits)
    assert ran.counts["vlmops::mrope_"] == 0


def test_patched_restores_even_after_an_exception():
    model = build("qwen2_vl")

    def fail():
        with vlmops.patched(model) as report:
            assert report.counts == BOTH
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vlmops.unpatch(model) == 0
    vlmops.patch(model)
    with vlmops.patched(model):
        pass
    assert vlmops.unpatch(model) == MODULES


def test_layer_types_of_two_scalings_are_refused():
    model = build("gemma3", **stretched("gemma3", "yarn"))
    assert "layer types differ in scaling" in refusal(model)


def rotates(function):
    """A model whose attention turns q and k by this function."""
    model = build("qwen2_vl")
    original = attention_class()
    body = {"forward": with_globals(original.forward, apply_rotary_pos_emb=function)}
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = type("Foreign", (original,), body)
    return model


def with_globals(function, **new):
    made = types.FunctionType(
        function.__code__,
        {**function.__globals__, **new},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def test_functions_that_are_not_known_are_refused_by_name():
    def turn_by_degrees(q, k, cos, sin, degrees=360):
        raise AssertionError("not called")

    reason = refusal(rotates(turn_by_degrees))
    assert reason == ("Foreign rotates with apply_rotary_pos_emb, which vlmops does not know")


def test_modules_that_use_cosines_themselves_are_refused_by_name():
    class Own(nn.Module):
        def forward(self, hidden_states, position_embeddings, **_):
            cos, sin = position_embeddings
            return hidden_states * cos.mean() + sin.mean(), None

    model = build("qwen2_vl")
    model.model.language_model.layers[1].self_attn = Own()
    assert refusal(model) == "Own applies cosines and sines itself"


def rotary_with(forward):
    """A model whose rotary module of the text has this forward."""
    model = build("qwen2_vl")
    rotary = model.model.language_model.rotary_emb
    original = type(rotary).forward

    class Changed(type(rotary)):
        def forward(self, x, position_ids):
            return forward(*original(self, x, position_ids), position_ids)

    rotary.__class__ = Changed
    return model


ROTARIES = {
    "stochastic": (
        lambda cos, sin, _: (cos + 0.01 * torch.rand_like(cos), sin),
        "Changed returns something else each time",
    ),
    "depends on the length": (
        lambda cos, sin, ids: (cos, sin) if ids.shape[-1] < 5 else (cos * 2, sin * 2),
        "the numeric check failed",
    ),
    "returns one tensor": (
        lambda cos, sin, _: torch.cat((cos, sin), -1),
        "returns neither cosines and sines nor complex numbers",
    ),
    "returns three": (
        lambda cos, sin, _: (cos, sin, sin),
        "returns neither cosines and sines nor complex numbers",
    ),
    "turns the other way": (lambda cos, sin, _: (cos, -sin), "are not driven by one axis"),
    "other pairs": (lambda cos, sin, _: (cos, sin.roll(1, -1)), "are not driven by one axis"),
}


@pytest.mark.parametrize(("forward", "reason"), ROTARIES.values(), ids=ROTARIES)
def test_rotary_modules_that_are_no_rotation_are_refused(forward, reason):
    assert reason in refusal(rotary_with(forward))


def test_a_rotary_module_shared_by_two_models_of_one():
    """Draft and target, say: its attention modules change together."""
    model, batch = build("qwen2_vl"), batch_of("text")
    second = build("qwen2_vl").model.language_model
    second.rotary_emb = model.model.language_model.rotary_emb
    both = nn.ModuleDict({"first": model, "second": second})
    embeds = torch.randn(1, 9, 64)

    def outputs():
        with torch.no_grad():
            hidden = second(inputs_embeds=embeds, use_cache=False).last_hidden_state
            return run(model, batch).logits, hidden

    expected = outputs()
    report = vlmops.patch(both)
    assert report.counts == {"mrope": TOWER + 2 * LAYERS}
    for ours, theirs in zip(outputs(), expected, strict=True):
        assert_agree(ours, theirs, "outputs")
    assert vlmops.unpatch(both) == MODULES + LAYERS


def test_other_devices_are_refused(monkeypatch):
    """One part of a model there is enough; on meta the weights are yet to come."""
    model = build("qwen2_vl")
    weight = model.model.language_model.layers[2].self_attn.q_proj.weight

    class Elsewhere(nn.Parameter):
        @property
        def device(self):
            return torch.device("cuda:1")

    def none(op, device):
        raise RuntimeError(f"no backend for {device}")

    monkeypatch.setattr(dispatch, "default", none)
    model.model.language_model.layers[2].self_attn.q_proj.weight = Elsewhere(weight.data)
    assert refusal(model) == "no backend for cuda:1"
    model = build("qwen2_vl")
    model.model.language_model.layers[0].self_attn.to("meta")
    assert vlmops.patch(model).counts == BOTH


# Norms of q and k, which are put off until the rotation.


def text_row(model):
    (row,) = (row for row in vlmops.patch(model).rows if row.path == "model.language_model")
    assert row.status == "patched"
    return row


def norms_of(model):
    attention = model.model.language_model.layers[1].self_attn
    return attention.q_norm, attention.k_norm


def halve(module, args, out):
    return out / 2


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_norms_with_hooks_run_themselves(before, which):
    model, batch = build("qwen3_vl"), checks.batch_of("qwen3_vl", "text")
    plain = copy.deepcopy(model)
    norms_of(plain)[which].register_forward_hook(halve)
    if before:
        norms_of(model)[which].register_forward_hook(halve)
        assert "hooks" in text_row(model).reason
    else:
        assert text_row(model).reason == "with q_norm and k_norm"
        norms_of(model)[which].register_forward_hook(halve)
    with torch.no_grad():
        assert_agree(run(model, batch).logits, run(plain, batch).logits, "logits")


def test_norms_that_are_put_off_take_their_argument_by_name():
    model = build("qwen3_vl")
    vlmops.patch(model)
    x = torch.randn(3, 16)
    assert norms_of(model)[0](hidden_states=x) is x


def test_norms_that_differ_are_not_fused():
    model, batch = build("qwen3_vl"), checks.batch_of("qwen3_vl", "text")
    norms_of(model)[0].variance_epsilon = 1e-2
    with torch.no_grad():
        expected = run(model, batch).logits
        assert "q_norm and k_norm differ in eps or offset" in text_row(model).reason
        assert_agree(run(model, batch).logits, expected, "logits")


def test_weights_of_norms_are_read_when_they_are_used():
    """They are trained, swapped and loaded after patching."""
    model, batch = build("qwen3_vl"), checks.batch_of("qwen3_vl", "text")
    plain = copy.deepcopy(model)
    vlmops.patch(model)
    for changed in (model, plain):
        gradients(changed, batch)
        q_norm, k_norm = norms_of(changed)
        with torch.no_grad():
            q_norm.weight -= q_norm.weight.grad
        k_norm.weight = nn.Parameter(k_norm.weight.detach() * 2)
    logits, grads = gradients(model, batch)
    expected, expected_grads = gradients(plain, batch)
    assert_agree(logits, expected, "logits")
    checks.assert_gradients_agree(grads, expected_grads)
