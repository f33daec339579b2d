"""Pixel shuffle: what is special to it beside the contract.

First, `reference` is what transformers computes, model by model."""

import contextlib

import pytest
import torch
import transformers as tr
from emulator.build import emulated
from testbed import TESTED_ISAS
from torch import nn
from torch.nn import functional
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.internvl import modeling_internvl
from transformers.models.llama4 import modeling_llama4
from transformers.models.llava_next_video import modeling_llava_next_video
from transformers.models.mistral3 import modeling_mistral3
from transformers.models.ovis2 import modeling_ovis2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

import vlmops
from vlmops.ops.pixel_shuffle import Options, reference, reference_inverse
from vlmops.ops.pixel_shuffle_spec import SPEC

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


on_both = pytest.mark.parametrize("backend", ["cpu", "emulator"])


def run_by(backend, mode="checked"):
    """The library's kernels, on the CPU or on the emulated GPU."""
    return emulated(mode) if backend == "emulator" else contextlib.nullcontext()


def drawn(*shape, dtype=torch.float64):
    return torch.randn(shape).to(dtype)


def made(module):
    """Random parameters, those that start at zero or one too; float64."""
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def internvl():
    x = drawn(2, 4, 6, 8)
    shuffled = modeling_internvl.InternVLModel.pixel_shuffle(None, x, scale_factor=0.5)
    norm = made(nn.LayerNorm(32))
    return norm(shuffled.flatten(1, 2)), reference(
        x, norm="layer", norm_weight=norm.weight, norm_bias=norm.bias
    )


def idefics3(factor=2):
    x = drawn(2, (2 * factor) ** 2, 8)
    shuffle = modeling_idefics3.Idefics3Connector.pixel_shuffle
    return shuffle(None, x, factor), reference(x, factor)


def smolvlm():
    return idefics3(3)


def llama4():
    x = drawn(2, 17, 8)[:, :-1]  # the class token is last
    return modeling_llama4.pixel_shuffle(x.contiguous(), 0.5), reference(x)


def ovis2():
    x = drawn(2, 16, 8)
    config = tr.Ovis2Config().vision_config
    config.hidden_size, config.hidden_stride, config.vocab_size, config.num_hidden_layers = (
        8,
        2,
        9,
        1,
    )
    config.num_attention_heads = 1
    tower = made(modeling_ovis2.Ovis2VisionModel(config))
    tower.transformer.forward = lambda *_, **__: (x,)
    return tower(drawn(2, 3, 14, 14)).last_hidden_state, reference(x)


def qwen2_vl():
    merger = made(modeling_qwen2_vl.PatchMerger(5, 8))
    merger.mlp = nn.Identity()
    x = drawn(24, 8)
    return merger(x), reference(
        x, grid_hw="blocks", norm="layer", norm_axis="channel", eps=1e-6,
        norm_weight=merger.ln_q.weight, norm_bias=merger.ln_q.bias,
    )  # fmt: skip


def qwen2_5_vl():
    merger = made(modeling_qwen2_5_vl.Qwen2_5_VLPatchMerger(5, 8))
    merger.mlp = nn.Identity()
    x = drawn(24, 8)
    expected = merger.ln_q.double()(x).view(-1, 32)
    return expected, reference(
        x, grid_hw="blocks", norm="rms", norm_axis="channel", eps=1e-6,
        norm_weight=merger.ln_q.weight,
    )  # fmt: skip


def deepstack():
    config = tr.Qwen3VLConfig().vision_config
    config.hidden_size, config.out_hidden_size = 8, 6
    merger = made(modeling_qwen3_vl.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True))
    merger.linear_fc1 = merger.act_fn = merger.linear_fc2 = nn.Identity()
    x = drawn(24, 8)
    return merger(x), reference(
        x, grid_hw="blocks", norm="layer", eps=1e-6,
        norm_weight=merger.norm.weight, norm_bias=merger.norm.bias,
    )  # fmt: skip


def mistral3():
    config = tr.Mistral3Config()
    config.vision_config.hidden_size, config.vision_config.patch_size = 8, 1
    merger = made(modeling_mistral3.Mistral3PatchMerger(config))
    merger.merging_layer = nn.Identity()
    norm = made(modeling_mistral3.Mistral3RMSNorm(8, eps=1e-5))
    grids = [(5, 7), (2, 3), (4, 4)]
    x = drawn(sum(h * w for h, w in grids), 8)
    return merger(norm(x), grids), reference(
        x, grid_hw=grids, order="cyx", norm="rms", norm_axis="channel", norm_weight=norm.weight,
        drop_remainder=True,
    )  # fmt: skip


def glm4v():
    x, weight = drawn(24, 8), drawn(5, 8, 2, 2)
    blocks = x.view(-1, 2, 2, 8).permute(0, 3, 1, 2)
    merged = reference(x, grid_hw="blocks", order="cyx")
    return functional.conv2d(blocks, weight, stride=2).flatten(1), merged @ weight.flatten(1).T


def gemma3():
    config = tr.Gemma3Config()
    config.vision_config.image_size, config.vision_config.patch_size = 64, 8
    config.vision_config.hidden_size, config.text_config.hidden_size = 12, 12
    config.mm_tokens_per_image = 4
    projector = made(modeling_gemma3.Gemma3MultiModalProjector(config))
    projector.mm_input_projection_weight.data = torch.eye(12).double()
    x, norm = drawn(2, 64, 12), projector.mm_soft_emb_norm
    norm.forward = lambda t: norm._norm(t) * (1.0 + norm.weight)  # in float64
    return projector(x), reference(
        x, 4, reduction="mean", norm="rms", norm_weight=norm.weight, norm_offset=1.0, eps=norm.eps
    )


def llava_next_video():
    config = tr.LlavaNextVideoConfig()
    config.vision_config.image_size, config.vision_config.patch_size = 60, 10
    pooler = modeling_llava_next_video.LlavaNextVideoPooler(config)
    x = drawn(2, 36, 8)
    return pooler(x), reference(x, reduction="mean")


MODELS = [internvl, idefics3, smolvlm, llama4, ovis2, qwen2_vl, qwen2_5_vl, deepstack, mistral3,
          glm4v, gemma3, llava_next_video]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_reference_is_what_transformers_computes(model):
    expected, found = model()
    # RMSNorm of transformers computes its root in float32.
    tolerance = 1e-6 if model in (qwen2_5_vl, mistral3) else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_torch_names_the_directions_the_other_way():
    x = drawn(1, 4, 6, 5, dtype=torch.float32)
    merged = functional.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert torch.equal(vlmops.pixel_shuffle(x, order="cyx"), merged)
    back = functional.pixel_shuffle(merged.transpose(1, 2).unflatten(2, (2, 3)), 2)
    assert torch.equal(
        vlmops.pixel_shuffle_inverse(merged, grid_hw=(4, 6), order="cyx").view(1, 4, 6, 5),
        back.permute(0, 2, 3, 1),
    )


def test_rows_of_transformers_phi4_are_pooled_once_they_are_padded():
    x = drawn(1, 6, 6, 8)
    expected = functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reference(x, reduction="mean"), expected)


# The inverse.

GRIDS = [
    ((2, 36, 12), {"grid_hw": None}),
    ((2, 24, 12), {"grid_hw": (4, 6)}),
    ((28, 40), {"grid_hw": [(4, 2), (4, 2), (2, 6)]}),
    ((2, 24, 33), {"grid_hw": "blocks"}),
    ((2, 81, 20), {"grid_hw": None, "factor": 3}),
    ((0, 16, 20), {"grid_hw": None}),
    ((0, 20), {"grid_hw": []}),
]


@every_isa
@every_dtype
@pytest.mark.parametrize("order", ["yxc", "cyx"])
@pytest.mark.parametrize(("shape", "options"), GRIDS)
def test_inverse_undoes_to_the_bit(isa, use_cpu_isa, dtype, order, shape, options):
    use_cpu_isa(isa)
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)  # NaN of every kind among them
    x = bits.view(dtype) if dtype != torch.float32 else drawn(*shape, dtype=dtype)
    merged = vlmops.pixel_shuffle(x, order=order, **options)
    back = vlmops.pixel_shuffle_inverse(merged, order=order, **options)
    assert back.is_contiguous()
    assert back.shape == x.shape
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.view(whole), x.view(whole))
    exact = reference_inverse(merged.view(whole), order=order, **options)
    assert torch.equal(exact, x.view(whole))


@pytest.mark.parametrize("order", ["yxc", "cyx"])
def test_inverse_takes_any_strides(order):
    merged = drawn(2, 9, 48, dtype=torch.float32)
    expected = vlmops.pixel_shuffle_inverse(merged, order=order)
    sideways = merged.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(vlmops.pixel_shuffle_inverse(sideways, order=order), expected)
    assert torch.equal(
        vlmops.pixel_shuffle_inverse(merged[:1].expand(2, 9, 48), order=order)[1], expected[0]
    )


@pytest.mark.parametrize("order", ["yxc", "cyx"])
def test_derivatives_of_the_inverse(order):
    x = torch.randn(1, 4, 12, requires_grad=True)

    def call(x):
        return vlmops.pixel_shuffle_inverse(x, order=order)

    upstream = torch.randn(1, 16, 3)
    (grad,) = torch.autograd.grad(call(x), x, upstream)
    assert torch.equal(grad, vlmops.pixel_shuffle(upstream, order=order))
    upstream.requires_grad_()
    (grad,) = torch.autograd.grad(call(x), x, upstream, create_graph=True)
    (second,) = torch.autograd.grad((grad * grad).sum(), upstream)
    assert torch.equal(second, 2 * upstream)
    tangent = torch.randn_like(x)
    _, turned = torch.func.jvp(call, (x.detach(),), (tangent,))
    assert torch.equal(turned, call(tangent))
    stacked = torch.randn(3, 1, 4, 12)
    each = torch.stack([call(one) for one in stacked])
    assert torch.equal(torch.vmap(call)(stacked), each)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))


def test_inverse_passes_opcheck():
    x = torch.randn(1, 4, 12, requires_grad=True)
    torch.library.opcheck(torch.ops.vlmops.pixel_shuffle_inverse.default, (x,))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 4, 10), {}, r"hidden_states: expected channels that factor\^2 = 4 divides"),
        ((2, 5, 8), {}, r"hidden_states: expected a square number of tokens.*got 5"),
        ((2, 6, 8), {"grid_hw": (4, 4)}, r"hidden_states: expected 16 tokens, that is 4 x 4"),
        ((2, 6, 8), {"grid_hw": (3, 8)}, r"grid_hw: expected a grid that factor 2 divides"),
        ((8,), {}, r"hidden_states: expected \[B, N, factor\^2 C\]"),
        ((2, 4, 8), {"order": "xyc"}, r"order: expected 'yxc' or 'cyx'"),
        ((2, 4, 8), {"factor": 0}, r"factor: expected 1 to 16, got 0"),
    ],
)
def test_inverse_refuses(shape, options, message):
    with pytest.raises(RuntimeError, match=message):
        vlmops.pixel_shuffle_inverse(torch.randn(shape), **options)


# out=.


def case(name, dtype=torch.float32):
    (found,) = (c for c in SPEC.cases if c.name == name)
    return found.make(dtype, torch.device("cpu"))


@every_isa
@every_dtype
@pytest.mark.parametrize(
    "name",
    [
        "internvl",
        "idefics3",
        "mistral3",
        "qwen_merger",
        "gemma3",
        "cyx",
        "packed_layer",
        "empty_batch",
    ],
)
def test_out_is_written_and_nothing_else(isa, use_cpu_isa, dtype, name):
    use_cpu_isa(isa)
    args = case(name, dtype)
    expected = vlmops.pixel_shuffle(**args)
    *batch, tokens, depth = expected.shape
    memory = torch.full((*batch, tokens + 2, depth + 5), 7.0, dtype=dtype)
    out = memory[..., 1:-1, 2:-3]
    version = out._version
    assert vlmops.pixel_shuffle(**args, out=out) is out
    assert torch.equal(out, expected)
    assert out._version > version
    out.fill_(7.0)
    assert (memory == 7.0).all()


def test_out_under_compile():
    x, out = torch.randn(2, 16, 8), torch.zeros(2, 4, 32)
    expected = vlmops.pixel_shuffle(x * 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, out):
        return vlmops.pixel_shuffle(x * 2, out=out) + 1

    assert torch.equal(call(x, out), expected + 1)
    assert torch.equal(out, expected)


def test_out_passes_opcheck():
    torch.library.opcheck(
        torch.ops.vlmops.pixel_shuffle_out.default, (torch.randn(2, 16, 8), torch.zeros(2, 4, 32))
    )


def test_out_refuses_what_would_lose_a_gradient():
    x, out = torch.randn(1, 16, 8, requires_grad=True), torch.zeros(1, 4, 32)
    with pytest.raises(RuntimeError, match="out: expected no tensor that requires grad"):
        vlmops.pixel_shuffle(x, out=out)
    with pytest.raises(RuntimeError, match="out: expected no tensor that requires grad"):
        torch.ops.vlmops.pixel_shuffle_out(x, out)
    weight = torch.ones(32, requires_grad=True)
    with pytest.raises(RuntimeError, match="out: expected no tensor that requires grad"):
        vlmops.pixel_shuffle(x.detach(), norm="rms", norm_weight=weight, out=out)
    with torch.no_grad():
        assert torch.equal(vlmops.pixel_shuffle(x, out=out), vlmops.pixel_shuffle(x))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="out: expected no forward-mode"),
    ):
        vlmops.pixel_shuffle(x.detach(), out=out)
    with torch.inference_mode():
        inference = torch.zeros(1, 4, 32)
    with pytest.raises(RuntimeError, match="out: expected a tensor made outside"):
        vlmops.pixel_shuffle(x.detach(), out=inference)


def test_out_beside_the_norms_vectors():
    x, memory = torch.randn(1, 16, 8), torch.ones(1, 4, 32)
    with pytest.raises(RuntimeError, match="since norm_weight is read"):
        vlmops.pixel_shuffle(x, norm="rms", norm_weight=memory[0, 1], out=memory)
    with pytest.raises(RuntimeError, match="since norm_bias is read"):
        vlmops.pixel_shuffle(x, norm="rms", norm_bias=memory[0, 1], out=memory)
    both = torch.randn(2 * 128)  # side by side, nothing shared
    x, out = both[:128].view(1, 16, 8), both[128:].view(1, 4, 32)
    assert torch.equal(vlmops.pixel_shuffle(x, out=out), vlmops.pixel_shuffle(x))


# Large results are written past the caches.


@every_isa
@every_dtype
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"order": "cyx"}, {"norm": "layer"}, {"norm": "rms", "norm_axis": "channel"},
     {"norm": "rms", "norm_axis": "channel", "order": "cyx"}],
)  # fmt: skip
def test_large_results_are_those_of_small_ones(isa, use_cpu_isa, dtype, offset, options):
    use_cpu_isa(isa)
    torch.use_deterministic_algorithms(False)
    tiles = 12 if dtype == torch.float32 else 24  # 9 MB
    channels = 192 if options else 200  # whole vectors; runs that end within one
    x = torch.randn(tiles, 1024, channels).to(dtype)
    each = torch.cat([vlmops.pixel_shuffle(tile[None], **options) for tile in x])
    memory = torch.empty(each.numel() + offset, dtype=dtype).fill_(7.0)
    out = memory[offset:].view(each.shape)
    assert torch.equal(vlmops.pixel_shuffle(x, out=out, **options), each)
    x.requires_grad_()
    upstream = torch.randn(each.shape).to(dtype)
    (grad,) = torch.autograd.grad(vlmops.pixel_shuffle(x, **options), x, upstream)
    one = x[:1].detach().requires_grad_()
    (of_one,) = torch.autograd.grad(vlmops.pixel_shuffle(one, **options), one, upstream[:1])
    assert torch.equal(grad[:1], of_one)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_2_to_31(isa, use_cpu_isa, dtype):
    """Images 2^31 elements apart: only the pages that are touched become memory."""
    use_cpu_isa(isa)
    far = 2**31 + 7
    torch.use_deterministic_algorithms(False)  # the poison would make 17 GB real
    memory = torch.empty(far * 2 + 4096, dtype=dtype)
    x = memory.as_strided((3, 16, 8), (far, 8, 1))
    x.copy_(torch.randn(x.shape))
    near = x.clone(memory_format=torch.contiguous_format)
    out = memory.as_strided((3, 4, 32), (far, 32, 1), 512)
    for options in ({}, {"norm": "layer"}, {"order": "cyx", "norm": "rms", "norm_axis": "channel"}):
        expected = vlmops.pixel_shuffle(near, **options)
        assert torch.equal(vlmops.pixel_shuffle(x, **options), expected)
    with pytest.raises(RuntimeError, match="out: expected memory of its own"):
        vlmops.pixel_shuffle(x, out=out)  # between the images of x: not looked at so closely
    assert torch.equal(vlmops.pixel_shuffle(near, out=out), vlmops.pixel_shuffle(near))
    grad = vlmops.pixel_shuffle_inverse(out)
    assert torch.equal(grad, near)


# Numbers.


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["yxc", "cyx"])
def test_rounding_is_to_nearest_even(isa, use_cpu_isa, dtype, order):
    """The bias chooses what is rounded: a weight of 0 leaves nothing else."""
    use_cpu_isa(isa)
    x = torch.randn(1, 16, 64).to(dtype)
    bias = torch.cat((torch.randn(192), torch.randn(64) * 2.0**-20)).float()
    ulp = torch.finfo(dtype).eps
    bias[:3] = torch.tensor([1.0 + ulp / 2, 1.0 + 1.5 * ulp, 1.0 - ulp / 8])  # ties, to even
    found = vlmops.pixel_shuffle(
        x, norm="rms", norm_weight=torch.zeros(256), norm_bias=bias, order=order
    )
    assert torch.equal(found, bias.to(dtype).expand(1, 4, 256))


@every_isa
@every_dtype
def test_norm_of_zeros_and_of_no_numbers(isa, use_cpu_isa, dtype):
    use_cpu_isa(isa)
    x = torch.zeros(1, 64, 64, dtype=dtype)
    merged = vlmops.pixel_shuffle(x, norm="layer", norm_bias=torch.full((256,), 0.5))
    assert (merged == 0.5).all()
    x[0, 9, 5] = torch.nan  # block (0, 0)
    x[0, 2, 7] = torch.inf  # block (0, 1)
    merged = vlmops.pixel_shuffle(x, norm="layer")
    assert merged[0, :2].isnan().all()
    assert (merged[0, 2:] == 0).all()
    each = vlmops.pixel_shuffle(x, norm="rms", norm_axis="channel")
    assert each.isnan().sum() == 64 + 1  # one token, and infinity over itself


@on_both
@every_dtype
@pytest.mark.parametrize("name", ["norm_weight", "norm_bias"])
def test_nan_of_a_vector_stays(name, dtype, backend):
    """All of its bits are set: rounding must not carry."""
    x, vector = torch.randn(1, 16, 64).to(dtype), torch.ones(256)
    vector[5::7] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    with run_by(backend):
        merged = vlmops.pixel_shuffle(x, norm="layer", **{name: vector})
    assert torch.equal(merged.isnan(), vector.isnan().expand_as(merged))


@on_both
@pytest.mark.parametrize(
    ("channels", "misleads"),
    [(96, 0), (95, 0), (4096, 128)],  # packs; element by element on a GPU; a row that starts apart
)
def test_a_mean_that_is_large_keeps_the_variance(channels, misleads, backend):
    x, weight = torch.randn(1, 16, channels) + 3e4, torch.randn(4 * channels)
    x[..., :misleads] -= 6e4
    upstream = torch.randn(1, 4, 4 * channels)

    def results(function, x, weight, upstream):
        leaves = x.requires_grad_(), weight.requires_grad_()
        y = function(leaves[0], norm="layer", norm_weight=leaves[1])
        return y, *torch.autograd.grad(y, leaves, upstream)

    exact = results(reference, x.double(), weight.double(), upstream.double())
    with run_by(backend):
        found = results(vlmops.pixel_shuffle, x, weight, upstream)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"order": "cyx"}, {"norm": "layer"}])
def test_emulator_takes_rows_that_begin_between_packs(options):
    """The first of them is aligned, and their channels make up packs, but not their strides."""
    x, memory = torch.randn(2, 16, 40), torch.zeros(2, 4, 163)
    x, out = torch.cat((x, x[..., :3]), -1)[..., :40], memory[..., :160]
    expected = vlmops.pixel_shuffle(x, **options)
    with emulated("checked"):
        torch.testing.assert_close(
            vlmops.pixel_shuffle(x, **options), expected, rtol=1e-5, atol=1e-5
        )
        vlmops.pixel_shuffle(x.contiguous(), **options, out=out)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if "norm" not in options:
            assert torch.equal(vlmops.pixel_shuffle_inverse(out, **options), x)


def test_emulator_sums_alike_whatever_the_strides_of_a_gradient():
    leaves = [torch.randn(n, requires_grad=True) for n in ((2, 64, 40), (160,), (160,))]
    options = {"norm": "layer", "norm_weight": leaves[1], "norm_bias": leaves[2]}
    upstream = torch.randn(2, 160, 16).transpose(1, 2)
    with emulated("checked"):
        found = [
            torch.autograd.grad(vlmops.pixel_shuffle(leaves[0], **options), leaves, grad)
            for grad in (upstream, upstream.contiguous())
        ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_emulator_takes_rows_that_no_block_holds():
    """More packs than the threads of a block keep in registers: element by element."""
    x = torch.randn(1, 4, 8200)
    expected = vlmops.pixel_shuffle(x, norm="layer")
    with emulated("checked"):
        found = vlmops.pixel_shuffle(x, norm="layer")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_emulator_takes_pixels_of_a_block_that_are_far_apart():
    """A GPU's kernels that count within a block in 32 bits do not take them."""
    far = 2**31 + 8
    torch.use_deterministic_algorithms(False)  # the poison would make 4 GB real
    memory = torch.empty(far + 32, dtype=torch.bfloat16)
    x = memory.as_strided((1, 2, 4, 8), (2 * far, far, 8, 1))
    x.copy_(torch.randn(x.shape))
    near = x.clone(memory_format=torch.contiguous_format)
    for options in ({}, {"norm": "layer"}, {"order": "cyx"}):
        with emulated("fast"):
            expected = vlmops.pixel_shuffle(near, **options)
            assert torch.equal(vlmops.pixel_shuffle(x, **options), expected)


def test_vector_instruction_sets_agree_to_rounding(use_cpu_isa):
    args = case("threads")
    results = []
    for isa in TESTED_ISAS:
        use_cpu_isa(isa)
        results.append(vlmops.pixel_shuffle(**args))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)


# What is saved and what is computed.


def test_saves_nothing_without_a_norm():
    x = torch.randn(2, 16, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vlmops.pixel_shuffle(x)
        assert not saved
        vlmops.pixel_shuffle(x, norm="layer")
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_gradients_of_vectors_are_the_same_whatever_the_threads():
    args = case("threads")
    vectors = [args[name].requires_grad_() for name in ("norm_weight", "norm_bias")]
    upstream = torch.randn(4, 64, 256)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(torch.autograd.grad(vlmops.pixel_shuffle(**args), vectors, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_gradients_of_vectors_are_summed_in_float64():
    """Beyond a few rows: 2^24 + 1 is no float32."""
    x, bias = torch.randn(1, 64, 8), torch.zeros(8, requires_grad=True)
    upstream = torch.ones(1, 64, 8)
    upstream[:, 0], upstream[:, 1:4] = 2.0**24, 0.0
    out = vlmops.pixel_shuffle(x, 1, norm="layer", norm_bias=bias)
    (grad,) = torch.autograd.grad(out, bias, upstream)
    assert (grad == 2.0**24 + 60).all()


@on_both
@pytest.mark.parametrize("needed", ["hidden_states", "norm_weight", "norm_bias"])
def test_gradients_that_nobody_needs_are_empty(needed, backend):
    args = case("internvl")
    vectors = args["norm_weight"], args["norm_bias"]
    options = Options(*vectors, norm="layer", skip_prefix=1)
    names = ("hidden_states", "norm_weight", "norm_bias")
    grad = torch.randn(2, 4, 160)
    call = torch.ops.vlmops.pixel_shuffle_backward
    with run_by(backend):
        some = call(grad, args["hidden_states"], *options, *[name == needed for name in names])
        every = call(grad, args["hidden_states"], *options)
    for name, one, whole in zip(names, some, every, strict=True):
        assert torch.equal(one, whole) if name == needed else one.numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.double, r"grad: expected dtype float32, that of hidden_states, got float64"),
        (lambda t: t[:, 1:], r"grad: expected shape \[2, 4, 32\].*got \[2, 3, 32\]"),
    ],
)
def test_backward_refuses(change, message):
    x, grad = torch.randn(2, 16, 8), torch.randn(2, 4, 32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vlmops.pixel_shuffle_backward(change(grad), x)


def test_what_is_left_out_gets_no_gradient():
    x = torch.randn(2, 36, 8, requires_grad=True)
    out = vlmops.pixel_shuffle(x, grid_hw=(5, 7), skip_prefix=1, drop_remainder=True)
    (grad,) = torch.autograd.grad(out.sum(), x)
    kept = torch.zeros(2, 5, 7, 8)
    kept[:, :4, :6] = 1
    assert torch.equal(grad[:, 1:].view(2, 5, 7, 8), kept)
    assert (grad[:, 0] == 0).all()


def test_grids_of_torch_size_and_dynamic_batches():
    x = torch.randn(3, 16, 8)
    assert torch.equal(vlmops.pixel_shuffle(x, grid_hw=torch.Size([4, 4])), vlmops.pixel_shuffle(x))
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(vlmops.pixel_shuffle, fullgraph=True, backend=counter)
    for batch in (3, 4, 5, 9):
        compiled(torch.randn(batch, 16, 8))
    assert counter.frame_count <= 2


def test_backends_that_are_asked_for():
    args = case("internvl")
    expected = vlmops.pixel_shuffle(**args)
    found = vlmops.pixel_shuffle(**args, backend="reference")
    torch.testing.assert_close(found, expected)
    out = torch.zeros_like(expected)
    assert vlmops.pixel_shuffle(**args, backend="reference", out=out) is out
    assert torch.equal(out, found)
    merged = torch.randn(1, 4, 8)
    assert torch.equal(
        vlmops.pixel_shuffle_inverse(merged, backend="reference"),
        vlmops.pixel_shuffle_inverse(merged),
    )
    with pytest.raises(RuntimeError, match=r"backend 'cuda'.*expected tensors on cuda"):
        vlmops.pixel_shuffle(**args, backend="cuda")


@pytest.mark.parametrize("backend", ["emulator"])
@pytest.mark.parametrize(
    ("rows", "factor", "options"),
    [(51_237, 1, {}), (51_236, 2, {"order": "cyx", "norm_axis": "channel"})],
)
def test_sums_over_many_rows(rows, factor, options, backend):
    """So many that parts of them are large, on a GPU."""
    torch.manual_seed(0)
    shape, grid = (1, rows, 256), (factor, rows // factor)
    leaves = [torch.randn(s, requires_grad=True) for s in (shape, shape[-1:], shape[-1:])]

    def grads(function, inputs):
        x, weight, bias = inputs
        options_of_norm = {"norm": "layer", "norm_weight": weight, "norm_bias": bias}
        y = function(x, factor, grid_hw=grid, **options_of_norm, **options)
        return torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1).sin())

    with emulated("fast"):
        found = grads(vlmops.pixel_shuffle, leaves)
    exact = grads(reference, [t.detach().double().requires_grad_() for t in leaves])
    for name, got, expected in zip(("x", "weight", "bias"), found, exact, strict=True):
        torch.testing.assert_close(
            got.double(), expected, rtol=1e-4, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
