"""The projector: what is special to it beside the contract.

First, `reference` is what transformers computes, class by class."""

import functools

import pytest
import torch
import transformers as tr
from emulator.build import emulated
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from transformers.models.aria import modeling_aria
from transformers.models.glm4v import modeling_glm4v
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.internvl import modeling_internvl
from transformers.models.llava import modeling_llava
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.vipllava import modeling_vipllava

import vlmops
from vlmops.ops import linear as products
from vlmops.ops import mlp_projector_steps as steps
from vlmops.ops.mlp_projector import reference
from vlmops.ops.mlp_projector_spec import SPEC
from vlmops.ops.mlp_projector_spec import _inputs as inputs
from vlmops.ops.spec import BadCall

CPU = torch.device("cpu")
CASES = {case.name: case for case in SPEC.cases}


def made(module):
    """Random parameters, those that start at 0 or 1 too; float64."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def layers(fc1, fc2=None):
    return fc1.weight, fc1.bias, *((None, None) if fc2 is None else (fc2.weight, fc2.bias))


def norm(module, kind="layer"):
    eps = module.eps if kind == "layer" else module.variance_epsilon
    bias = module.bias if kind == "layer" else None
    return {"norm": kind, "norm_weight": module.weight, "norm_bias": bias, "norm_eps": eps}


def llava():
    vision, text = tr.CLIPVisionConfig(hidden_size=12), tr.LlamaConfig(hidden_size=32)
    m = made(modeling_llava.LlavaMultiModalProjector(
        tr.LlavaConfig(vision_config=vision, text_config=text)))  # fmt: skip
    x = torch.randn(2, 5, 12).double()
    return m(x), reference(x, *layers(m.linear_1, m.linear_2), activation="gelu")


def vipllava():
    vision, text = tr.CLIPVisionConfig(hidden_size=12), tr.LlamaConfig(hidden_size=32)
    config = tr.VipLlavaConfig(vision_config=vision, text_config=text, vision_feature_layers=[0, 1])
    m = made(modeling_vipllava.VipLlavaMultiModalProjector(config))
    x = torch.randn(2, 5, 24).double()
    options = norm(m.projector_layernorm)
    return m(x), reference(x, *layers(m.linear_1, m.linear_2), activation="gelu", **options)


def internvl():
    vision, text = tr.InternVLVisionConfig(hidden_size=6), tr.Qwen2Config(hidden_size=20)
    m = made(modeling_internvl.InternVLMultiModalProjector(
        tr.InternVLConfig(vision_config=vision, text_config=text)))  # fmt: skip
    x = torch.randn(2, 5, 24).double()
    options = norm(m.layer_norm)
    return m(x), reference(x, *layers(m.linear_1, m.linear_2), activation="gelu", **options)


def qwen2_vl():
    m = made(modeling_qwen2_vl.PatchMerger(dim=20, context_dim=6))
    x = torch.randn(12, 6).double()
    merged = m.ln_q(x).view(-1, 24)
    return m(x), reference(merged, *layers(m.mlp[0], m.mlp[2]), activation="gelu")


def qwen3_vl_deepstack():
    config = tr.Qwen3VLConfig().vision_config
    config.hidden_size, config.out_hidden_size = 6, 20
    m = made(modeling_qwen3_vl.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True))
    x = torch.randn(12, 6).double()
    fcs = layers(m.linear_fc1, m.linear_fc2)
    return m(x), reference(x.view(-1, 24), *fcs, activation="gelu", **norm(m.norm))


def idefics2():
    config = tr.Idefics2Config()
    m = made(modeling_idefics2.Idefics2MLP(12, 28, 20, "silu"))
    assert config.text_config.hidden_act == "silu"
    x = torch.randn(2, 5, 12).double()
    fcs = layers(m.up_proj, m.down_proj)
    return m(x), reference(x, *fcs, activation="silu", gate_weight=m.gate_proj.weight)


def glm4v():
    """Its product and norm in front are calls of their own."""
    m = made(modeling_glm4v.Glm4vVisionPatchMerger(dim=12, context_dim=28, hidden_act="silu"))
    x = torch.randn(5, 12).double()
    front = functional.gelu(m.post_projection_norm(m.proj(x)))
    fcs = layers(m.up_proj, m.down_proj)
    return m(x), reference(front, *fcs, activation="silu", gate_weight=m.gate_proj.weight)


def aria():
    """Its projector's feed-forward layers, behind their norm."""
    m = made(modeling_aria.AriaProjectorMLP(12, 28, 20))
    x, ln = torch.randn(2, 5, 12).double(), made(nn.LayerNorm(12))
    fcs = layers(m.linear_in, m.linear_out)
    return m(ln(x)), reference(x, *fcs, activation="gelu_tanh", **norm(ln))


def llama4():
    """`Llama4VisionMLP2`, whose activation comes twice."""
    from transformers.models.llama4 import modeling_llama4

    config = tr.Llama4VisionConfig(
        hidden_size=6, intermediate_size=24, projector_input_dim=20, projector_output_dim=20,
        projector_dropout=0.0,
    )  # fmt: skip
    m = made(modeling_llama4.Llama4VisionMLP2(config))
    x = torch.randn(2, 5, 24).double()
    fcs = layers(m.fc1, m.fc2)
    return m(x), reference(x, *fcs, activation="gelu", out_activation="gelu")


def gemma3():
    """`Gemma3MultiModalProjector` after its pooling."""
    from transformers.models.gemma3 import modeling_gemma3

    rms, weight = made(modeling_gemma3.Gemma3RMSNorm(12, eps=1e-6)), torch.randn(12, 20).double()
    x = torch.randn(2, 5, 12).double()
    return rms(x).to(x) @ weight, reference(
        x, weight.t(), activation=None, norm="rms", norm_weight=rms.weight, norm_eps=rms.eps,
        norm_offset=1.0,
    )  # fmt: skip


CLASSES = [llava, vipllava, internvl, qwen2_vl, qwen3_vl_deepstack, idefics2, glm4v, aria, llama4,
           gemma3]  # fmt: skip


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.__name__)
def test_reference_is_what_transformers_computes(case):
    torch.manual_seed(0)
    expected, found = case()
    tolerance = 1e-5 if case is gemma3 else 1e-10  # its norm is float32's
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def kernels_on(backend):
    """The library's kernels, on the CPU or on the emulated GPU."""
    return steps.compiled(), emulated("checked") if backend == "emulator" else torch.no_grad()


KINDS = ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]


@pytest.mark.parametrize("backend", ["cpu", "emulator"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_right_to_their_tails(kind, backend):
    """float32 against float64, value and slope, from -30 to 30 and beyond."""
    x = torch.cat((torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4, 0.0])))
    x = x.view(1, -1)
    exact = x.double().requires_grad_()
    y = products.activated(exact, kind)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    kernels, where = kernels_on(backend)
    with where:
        out = torch.empty_like(x)
        kernels.activate(x, None, kind, out)
        grad = torch.ones_like(x)
        _, again, _, _ = kernels.activate_backward(grad, x, None, kind, grad, True, False, False)
    assert torch.equal(out, again) or backend == "cpu"
    for got, expected in ((out, y.detach()), (again, y.detach()), (grad, slope)):
        error = (got.double() - expected).abs() / expected.abs().clamp(min=1.0)
        assert error.nan_to_num(9.0).max() < 4e-7, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "emulator"])
def test_nan_stays_in_its_element(kind, backend):
    x = torch.zeros(3, 37)
    x[1, 5] = float("nan")
    kernels, where = kernels_on(backend)
    with where:
        out = torch.empty_like(x)
        kernels.activate(x, None, kind, out)
        grad, ones = torch.empty_like(x), torch.ones_like(x)
        kernels.activate_backward(ones, x, None, kind, grad, False, False, False)
    assert out.isnan().nonzero().tolist() == [[1, 5]]
    assert grad.isnan().nonzero().tolist() == ([] if kind == "relu" else [[1, 5]])


@pytest.mark.parametrize("backend", ["cpu", "emulator"])
@pytest.mark.parametrize("width", [3, 7, 128, 1030, 4104])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_any_width(kind, width, backend):
    """Rows that hardly differ keep their variance; sums of more rows than a part has."""
    x = 100 + torch.randn(37, width)
    grad, weight, bias = torch.randn(37, width), torch.randn(width), torch.randn(width)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    z = leaves[0] - leaves[0].mean(-1, keepdim=True) if kind == "layer" else leaves[0]
    z = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    z = z * (0.5 + leaves[1]) + leaves[2]
    exact = torch.autograd.grad(z, leaves, grad.double())
    kernels, where = kernels_on(backend)
    with where:
        out = kernels.norm(x, kind, weight, bias, 1e-5, 0.5)
        of_x = torch.empty_like(x)
        sums = kernels.norm_backward(grad, x, kind, weight, 1e-5, 0.5, of_x, True, True)
    close(out, z, 5e-5)
    scale = max(exact[0].abs().max().item(), 1.0)
    close(of_x / scale, exact[0] / scale, 5e-5)
    for got, expected in zip(sums, exact[1:], strict=True):
        close(got.sum(0), expected, 2e-4)


@pytest.mark.parametrize("backend", ["emulator"])
@pytest.mark.parametrize("width", [128, 131])
def test_sums_of_a_norm_alone(width, backend):
    """Where nobody needs the gradient of x, and the float32 mean lacks as much as rows differ.

    The CPU's mean is mended but rounded again: it is off by half a unit in its last place.
    """
    x, grad, weight = 3e4 + torch.randn(9, width), torch.randn(9, width), torch.randn(width)
    z = x.double() - x.double().mean(-1, keepdim=True)
    z = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    kernels, where = kernels_on(backend)
    with where:
        sums = kernels.norm_backward(grad, x, "layer", weight, 1e-5, 0.5, None, True, True)
    close(sums[0].sum(0), (grad * z).sum(0))
    close(sums[1].sum(0), grad.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (5, 1), (255, 33), (513, 64), (65_793, 3)])
def test_emulator_sums_over_rows(rows, width, dtype):
    """None, some of one slice, several slices, as many as are added up in slices themselves."""
    x = torch.randn(rows, width).to(dtype)
    with emulated("fast" if rows > 1000 else "checked"):
        found = steps.compiled().sum_rows(x, torch.empty(width))
        as_x = steps.compiled().sum_rows(x, x)
    close(found / max(rows, 1) ** 0.5, x.double().sum(0) / max(rows, 1) ** 0.5)
    assert torch.equal(as_x, found.to(dtype))


@pytest.fixture
def multiplied(monkeypatch):
    """[rows, K, N] of each product of what follows."""
    shapes = []

    def note(x, weight):
        shapes.append((x.shape[0], x.shape[1], weight.shape[0]))

    linear, product = products.linear, products.product
    monkeypatch.setattr(products, "linear", lambda x, w, *a: note(x, w) or linear(x, w, *a))
    monkeypatch.setattr(products, "product", lambda x, w, *a: note(x, w) or product(x, w, *a))
    return shapes


def gradients(names, multiplied, **options):
    """The products of a backward that is asked for these gradients alone."""
    args = inputs((2, 5, 24), 40, 16, **options)(torch.float32, CPU)
    for name in names:
        args[name] = args[name].requires_grad_()
    (out,) = SPEC.function(**args)
    multiplied.clear()
    out.sum().backward()
    return sorted(multiplied)


def test_only_the_products_of_the_gradients_that_are_asked_for(multiplied):
    through_fc2, through_fc1 = (10, 16, 40), (10, 40, 24)
    of_fc2, of_fc1 = (16, 10, 40), (40, 10, 24)
    # LLaVA's first stage: the projector alone.
    all_of_it = ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
    asked = functools.partial(gradients, multiplied=multiplied)
    assert asked(all_of_it) == sorted([through_fc2, of_fc2, of_fc1])
    assert asked(["x"]) == sorted([through_fc2, through_fc1])
    assert asked(["fc2_weight"]) == [of_fc2]
    assert asked(["fc2_bias"]) == []
    assert asked(["fc1_bias"]) == [through_fc2]
    assert asked(["norm_weight"], norm="layer") == sorted([through_fc2, through_fc1])
    assert asked(["fc2_weight"], gate=True) == [of_fc2]
    gated = asked(["gate_weight"], gate=True, activation="silu")
    assert gated == sorted([through_fc2, of_fc1])


def test_one_layer_is_kept_for_backward():
    """Before its activation; after it comes again from there."""
    args = CASES["llava"].make(torch.float32, CPU)
    args = {n: t.requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in args.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        SPEC.function(**args)
    own = {t.data_ptr() for t in args.values() if isinstance(t, torch.Tensor)}
    kept = [t for t in saved if t.data_ptr() not in own]
    assert [list(t.shape) for t in kept] == [[10, 40]]
    exact = functional.linear(args["x"], args["fc1_weight"], args["fc1_bias"])
    close(kept[0].view(2, 5, 40), exact)


def test_a_norm_and_an_activation_copy_nothing_more_than_they_write():
    """Largest allocations: the normalised x, the hidden layer, the result."""
    args = inputs((400, 256), 512, 128, norm="layer", activation="quick_gelu")(torch.float32, CPU)
    with torch.profiler.profile(profile_memory=True) as profile:
        SPEC.function(**args)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert allocated <= 1.1 * 4 * 400 * (256 + 512 + 128)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("no_rows")])
def test_panels_of_any_size_give_the_same(name, monkeypatch):
    def both():
        torch.manual_seed(0)
        args = CASES[name].make(torch.float32, CPU)
        leaves = {n: args[n].detach().requires_grad_() for n in SPEC.differentiable_in(args)}
        (alone,), (out,) = SPEC.function(**args), SPEC.function(**{**args, **leaves})
        return alone, out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    whole = both()
    monkeypatch.setattr(steps, "PANEL", 1)
    monkeypatch.setattr(steps, "_LEAST", 3)
    for got, expected in zip(both(), whole, strict=True):
        close(got / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_multiplied_in_float32_where_the_cpu_has_no_other(monkeypatch, dtype):
    panels = []
    convert = products._panels
    monkeypatch.setattr(products, "multiplies", lambda dtype: False)
    monkeypatch.setattr(products, "_panels", lambda *a: panels.append(a[3]) or convert(*a))
    products._default.cache_clear()
    args = inputs((20, 1024), 1024, 1024)(dtype, CPU)
    (found,) = SPEC.function(**args)
    products._default.cache_clear()
    assert panels == ["gelu", None]
    close(found, SPEC.reference(**args)[0].to(dtype), 0.02)


def test_gemmas_weight_is_taken_as_it_lies():
    x, weight = torch.randn(2, 5, 24), torch.randn(24, 16)
    found = vlmops.mlp_projector(x, weight.t(), activation=None)
    close(found, x @ weight)
    weight.requires_grad_()
    vlmops.mlp_projector(x, weight.t(), activation=None).sum().backward()
    close(weight.grad, x.sum((0, 1))[:, None].expand(24, 16))


def test_autocast_trains_float32_weights():
    args = CASES["internvl"].make(torch.float32, CPU)
    leaves = {n: t.requires_grad_() for n, t in args.items() if isinstance(t, torch.Tensor)}
    args["x"] = args["x"].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = SPEC.function(**args)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    del leaves["x"]
    exact = {**args, **{n: t.detach().double().requires_grad_() for n, t in leaves.items()}}
    SPEC.reference(**exact)[0].sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        scale = exact[name].grad.abs().max()
        close(leaf.grad / scale, exact[name].grad / scale, 0.03)


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    args = CASES["internvl"].make(torch.float32, CPU)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def project(x):
        return vlmops.mlp_projector(**{**args, "x": x})

    for rows in (3, 5, 8):
        x = torch.randn(2, rows, 32)
        close(project(x), vlmops.mlp_projector(**{**args, "x": x}))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "emulator"])
def test_rounding_is_to_nearest_even(dtype, backend):
    """Half an ulp above 1: down to even; above the next: up. Of a gate's product and of a norm."""
    ulp = torch.finfo(dtype).eps
    hidden = torch.tensor([[1.0, 1.0 + ulp, 1.0 + ulp]], dtype=dtype)
    gate = torch.tensor([[1.0 + ulp / 2, 1.0, 1.0 + ulp]]).to(dtype)
    exact = gate.float() * hidden.float()
    kernels, where = kernels_on(backend)
    with where:
        out = torch.empty_like(hidden)
        kernels.activate(hidden, gate, "none", out)
        x = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=dtype)
        bias = torch.tensor([1.0 + ulp / 2, 0.0, 1.0 + 1.5 * ulp, 0.0])
        z = kernels.norm(x, "layer", torch.zeros(4), bias, 1e-5, 0.0)
    assert torch.equal(out, exact.to(dtype))
    assert z[0].tolist() == [1.0, 0.0, 1.0 + 2 * ulp, 0.0]


def test_the_other_backend():
    args = CASES["internvl"].make(torch.float32, CPU)
    close(SPEC.function(**args, backend="reference")[0], SPEC.function(**args)[0])


def test_bad_calls_name_what_is_wrong():
    """The contract tries them; here, that each of the op's tensors has one."""
    named = " ".join(bad.pattern for bad in SPEC.errors if isinstance(bad, BadCall))
    assert all(name in named for name in SPEC.differentiable)


@pytest.mark.parametrize("backend", ["emulator"])
def test_sums_over_many_rows(backend):
    """So many that parts of them are large, on a GPU."""
    torch.manual_seed(0)
    rows, width = 51_237, 256
    x = torch.randn(rows, width)
    names = ("fc1_bias", "fc2_bias", "norm_weight", "norm_bias")
    vectors = [torch.randn(n, requires_grad=True) for n in (width, 8, width, width)]
    weights = torch.randn(width, width) / 16, torch.randn(8, width) / 16

    def grads(function, x, weights, vectors):
        fc1_bias, fc2_bias, norm_weight, norm_bias = vectors
        y = function(x, weights[0], fc1_bias, weights[1], fc2_bias, activation="gelu",
                     norm="layer", norm_weight=norm_weight, norm_bias=norm_bias)  # fmt: skip
        return torch.autograd.grad(y, vectors, torch.ones_like(y).cumsum(0).sin())

    with emulated("fast"):
        found = grads(vlmops.mlp_projector, x, weights, vectors)
    doubles = [v.detach().double().requires_grad_() for v in vectors]
    exact = grads(reference, x.double(), [w.double() for w in weights], doubles)
    for name, got, expected in zip(names, found, exact, strict=True):
        scale = expected.abs().max().item()
        assert (got.double() - expected).abs().max().item() < 3e-6 * max(scale, 100.0), name
