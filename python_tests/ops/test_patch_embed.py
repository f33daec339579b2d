"""Patch embedding: what is special to it beside the contract.

First, `reference` is what transformers computes, class by class."""

import numpy
import pytest
import torch
import transformers as tr
from emulator.build import emulated
from testbed import extra_memory, reads_proc
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.models.blip import modeling_blip
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.clip import modeling_clip
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.internvl import modeling_internvl
from transformers.models.llama4 import modeling_llama4
from transformers.models.ovis2 import modeling_ovis2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2
from transformers.models.vit import modeling_vit

import vlmops
from vlmops.ops import patch_embed_panels as panels
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.patch_embed import Position, reference
from vlmops.ops.patch_embed_spec import SPEC

D, P = 24, 4
SMALL = {"hidden_size": D, "patch_size": P, "image_size": 16, "num_attention_heads": 2}


def made(cls, config, *args):
    """Random parameters, those that start at zero too; float64."""
    module = cls(config, *args).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def dense(table):
    return [Position(table.squeeze(0) if table.dim() == 3 else table)]


def clip():
    m = made(modeling_clip.CLIPVisionEmbeddings, tr.CLIPVisionConfig(**SMALL))
    x = torch.randn(2, 3, 16, 16).double()
    return m(x), reference(
        x, m.patch_embedding.weight, prefix=m.class_embedding,
        positions=dense(m.position_embedding.weight),
    )  # fmt: skip


def siglip():
    m = made(modeling_siglip.SiglipVisionEmbeddings, tr.SiglipVisionConfig(**SMALL))
    x = torch.randn(2, 3, 16, 16).double()
    w, b = m.patch_embedding.weight, m.patch_embedding.bias
    return m(x), reference(x, w, b, positions=dense(m.position_embedding.weight))


def blip(cls=modeling_blip.BlipVisionEmbeddings, config=tr.BlipVisionConfig):
    m = made(cls, config(**SMALL))
    x = torch.randn(2, 3, 16, 16).double()
    w, b = m.patch_embedding.weight, m.patch_embedding.bias
    positions = dense(m.position_embedding)
    return m(x), reference(x, w, b, prefix=m.class_embedding, positions=positions)


def blip2():
    return blip(modeling_blip_2.Blip2VisionEmbeddings, tr.Blip2VisionConfig)


def vit():
    m = made(modeling_vit.ViTEmbeddings, tr.ViTConfig(**SMALL))
    x = torch.randn(2, 3, 16, 16).double()
    p = m.patch_embeddings.projection
    positions = dense(m.position_embeddings)
    return m(x), reference(x, p.weight, p.bias, prefix=m.cls_token, positions=positions)


def dinov2():
    m = made(modeling_dinov2.Dinov2Embeddings, tr.Dinov2Config(**SMALL))
    x = torch.randn(2, 3, 16, 16).double()
    p = m.patch_embeddings.projection
    positions = dense(m.position_embeddings)
    return m(x), reference(x, p.weight, p.bias, prefix=m.cls_token, positions=positions)


def internvl():
    config = tr.InternVLVisionConfig(
        **{**SMALL, "image_size": [16, 16], "patch_size": [P, P]},
        use_absolute_position_embeddings=True,
    )
    m = made(modeling_internvl.InternVLVisionEmbeddings, config)
    x = torch.randn(2, 3, 16, 16).double()
    p = m.patch_embeddings.projection
    expected = m(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    positions = dense(m.position_embeddings)
    return expected, reference(x, p.weight, p.bias, prefix=m.cls_token, positions=positions)


def qwen2_vl():
    m = made(modeling_qwen2_vl.PatchEmbed, P, 2, 3, D)
    x = torch.randn(10, 3 * 2 * P * P).double()
    return m(x), reference(x, m.proj.weight)


def qwen2_5_vl():
    m = made(modeling_qwen2_5_vl.Qwen2_5_VisionPatchEmbed, P, 2, 3, D)
    x = torch.randn(10, 3 * 2 * P * P).double()
    return m(x), reference(x, m.proj.weight)


def qwen3_vl():
    """A video as pixels in place of its patches: the same tokens, and four taps."""
    config = tr.Qwen3VLConfig().vision_config
    config.hidden_size, config.patch_size = D, P
    m = made(modeling_qwen3_vl.Qwen3VLVisionPatchEmbed, config)
    x = torch.randn(1, 3, 4, 8, 12).double()
    cubes = x.view(3, 2, 2, 2, P, 3, P).permute(1, 3, 5, 0, 2, 4, 6)
    table, index = torch.randn(9, D).double(), torch.randint(9, (12, 4))
    weight = torch.rand(12, 4).double()
    expected = m(cubes.reshape(12, -1)) + (table[index] * weight[..., None]).sum(1)
    positions = [Position(table, index, weight)]
    return expected, reference(x, m.proj.weight, m.proj.bias, positions=positions)[0]


def siglip2():
    config = tr.Siglip2VisionConfig(hidden_size=D, patch_size=P, num_patches=16)
    m = made(modeling_siglip2.Siglip2VisionEmbeddings, config)
    x = torch.randn(2, 16, P * P * 3).double()
    p, shapes = m.patch_embedding, torch.tensor([[4, 4], [4, 4]])
    return m(x, shapes), reference(
        x, p.weight, p.bias, positions=dense(m.position_embedding.weight)
    )


def idefics2(module=modeling_idefics2.Idefics2VisionEmbeddings, config=tr.Idefics2Config):
    vision = config().vision_config
    vision.hidden_size, vision.patch_size, vision.image_size = D, P, 16
    m = made(module, vision)
    x = torch.randn(2, 3, 8, 12).double()  # smaller than the table: buckets
    expected = m(x, torch.ones(2, 2, 3, dtype=torch.bool))
    index = torch.tensor([[r * 4 + c] for r in (0, 2) for c in (0, 1, 2)])
    p, table = m.patch_embedding, m.position_embedding.weight
    return expected, reference(x, p.weight, p.bias, positions=[Position(table, index)])


def idefics3():
    return idefics2(modeling_idefics3.Idefics3VisionEmbeddings, tr.Idefics3Config)


def llama4():
    config = tr.Llama4VisionConfig(**SMALL, num_channels=3)
    unfold = made(modeling_llama4.Llama4UnfoldConvolution, config)
    x = torch.randn(2, 3, 16, 16).double()
    cls, table = torch.randn(D).double(), torch.randn(17, D).double()
    expected = torch.cat((unfold(x), cls.expand(2, 1, -1)), 1) + table
    weight = unfold.linear.weight.view(D, 3, P, P)
    return expected, reference(x, weight, prefix=cls, prefix_last=True, positions=dense(table))


def ovis2():
    vision = tr.Ovis2Config().vision_config
    vision.hidden_size, vision.patch_size, vision.image_size = D, P, 16
    m = made(modeling_ovis2.Ovis2VisionEmbeddings, vision)
    x = torch.randn(2, 3, 16, 16).double()
    p = m.patch_embedding
    return m(x), reference(
        x, p.weight, p.bias, norm="rms", norm_weight=m.rms_norm.weight,
        norm_eps=m.rms_norm.variance_epsilon, positions=dense(m.position_embedding.weight),
    )  # fmt: skip


def pixtral():
    """Images of different sizes in one padded batch; `PixtralVisionModel.forward`'s own steps."""
    conv = nn.Conv2d(3, D, P, P, bias=False).double()
    x, sizes = torch.randn(2, 3, 16, 16).double(), [(8, 16), (12, 8)]
    rows = [
        conv(i[None])[0, :, : h // P, : w // P].flatten(1).T
        for i, (h, w) in zip(x, sizes, strict=True)
    ]
    expected = torch.cat(rows)
    listed = [i[:, :h, :w] for i, (h, w) in zip(x, sizes, strict=True)]
    torch.testing.assert_close(reference(listed, conv.weight), expected)
    return expected, reference(x, conv.weight, image_sizes=sizes)


def mllama():
    """`MllamaVisionModel.forward` up to the norm, with its two embeddings."""
    from transformers.models.mllama import modeling_mllama

    config = tr.MllamaConfig().vision_config
    config.hidden_size, config.patch_size, config.image_size = D, P, 16
    tile = made(modeling_mllama.MllamaPrecomputedAspectRatioEmbedding, config, True)
    position = made(modeling_mllama.MllamaPrecomputedPositionEmbedding, config)
    conv, cls = nn.Conv2d(3, D, P, P, bias=False).double(), torch.randn(D).double()
    ids, tiles = torch.tensor([1, 6]), config.max_num_tiles
    x = torch.randn(2 * tiles, 3, 16, 16).double()
    y = conv(x).flatten(2).transpose(1, 2).reshape(2, tiles, 16, D)
    y = tile(y, ids).reshape(2 * tiles, 16, D)
    y = torch.cat((cls.expand(2 * tiles, 1, -1), y), 1).reshape(2, tiles, 17, D)
    expected = position(y, ids).reshape(2 * tiles, 17, D)

    image = (ids[:, None] * tiles + torch.arange(tiles)).reshape(-1, 1, 1)
    token = torch.arange(17)[:, None]
    gate = position.gate.tanh()
    positions = [
        Position(tile.embedding.weight.view(-1, D), image, tile.gate.tanh(), True),
        Position(position.embedding, None, 1 - gate),
        Position(position.tile_embedding.weight.view(-1, D), image * 17 + token, gate),
    ]
    return expected, reference(x, conv.weight, prefix=cls, positions=positions)


CLASSES = [clip, siglip, siglip2, blip, blip2, vit, dinov2, internvl, qwen2_vl, qwen2_5_vl,
           qwen3_vl, idefics2, idefics3, llama4, ovis2, pixtral, mllama]  # fmt: skip
FLOAT32 = [siglip2, ovis2]
"""Those that compute a part in float32 (interpolation, norm), whatever they are given."""


@pytest.mark.parametrize("case", CLASSES, ids=lambda case: case.__name__)
def test_reference_is_what_transformers_computes(case):
    torch.manual_seed(0)
    expected, found = case()
    tolerance = 1e-5 if case in FLOAT32 else 1e-10
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_raw_pixels_are_normalised_as_the_processor_does():
    image = torch.randint(256, (1, 9, 8, 3), dtype=torch.uint8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    x = image.double().movedim(-1, 1) / 255
    x = (x - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    conv = nn.Conv2d(3, D, P, P).double()
    found = reference(image, conv.weight, conv.bias, image_mean=mean, image_std=std,
                      rescale_factor=1 / 255, channels_last=True)  # fmt: skip
    torch.testing.assert_close(found, conv(x).flatten(2).transpose(1, 2))


def drawn(*shape, **options):
    return torch.randn(*shape, **options)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_an_image_is_embedded_alike_in_every_form():
    """Batch, list, padded batch, flattened, channels last: the same tokens to the bit."""
    image, conv = drawn(3, 12, 20), nn.Conv2d(3, D, P, P)
    w, b = conv.weight.detach(), conv.bias.detach()
    expected = vlmops.patch_embed(image[None], w, b)[0]
    flat = image.unfold(1, P, P).unfold(2, P, P).permute(1, 2, 0, 3, 4).reshape(-1, 3 * P * P)
    padded = torch.full((1, 3, 17, 23), float("nan"))
    padded[0, :, :12, :20] = image
    forms = {
        "list": vlmops.patch_embed([image], w, b),
        "padded": vlmops.patch_embed(padded, w, b, image_sizes=[(12, 20)]),
        "flattened": vlmops.patch_embed(flat, w, b),
        "flattened, linear": vlmops.patch_embed(flat, w.flatten(1), b),
        "batch of flattened": vlmops.patch_embed(flat[None], w, b)[0],
        "channels last": vlmops.patch_embed(
            image.movedim(0, -1)[None].contiguous(), w, b, channels_last=True
        )[0],
        "video": vlmops.patch_embed(image[None, :, None], w[:, :, None], b)[0],
    }
    for name, found in forms.items():
        assert torch.equal(found, expected), name


def test_a_packed_sequence_counts_its_tokens_through():
    images, w = [drawn(3, 8, 8), drawn(3, 4, 12), drawn(3, 5, 4)], drawn(D, 3, P, P)
    cls, table = drawn(2, D), drawn(14, D)
    found = vlmops.patch_embed(images, w, prefix=cls, positions=[Position(table)])
    alone = [vlmops.patch_embed(x[None], w, prefix=cls)[0] for x in images]
    assert [len(x) for x in alone] == [6, 5, 3]
    close(found, torch.cat(alone) + table)
    index = torch.randint(14, (8, 2))
    found = vlmops.patch_embed(
        images, w, prefix=cls, positions=[Position(table, index, None, True)]
    )
    rows = table[index].sum(1).split([4, 3, 1])
    expected = [x + torch.cat((torch.zeros(2, D), r)) for x, r in zip(alone, rows, strict=True)]
    close(found, torch.cat(expected))


def test_gradients_of_a_list_of_images():
    images = [drawn(3, 9, 8, requires_grad=True), drawn(3, 4, 12, requires_grad=True)]
    w, cls = drawn(D, 3, P, P, requires_grad=True), drawn(1, D, requires_grad=True)
    table = drawn(9, D, requires_grad=True)
    leaves = [*images, w, cls, table]
    options = {"prefix": cls, "positions": [Position(table)]}
    grad = drawn(9, D)
    found = torch.autograd.grad(vlmops.patch_embed(images, w, **options), leaves, grad)
    exact = torch.autograd.grad(reference(images, w, **options), leaves, grad.double())
    for f, e in zip(found, exact, strict=True):
        close(f, e)
    assert found[0][:, 8:].eq(0).all()  # the row that no patch reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_pixels_are_what_the_processor_makes_of_them_to_the_bit(dtype):
    """transformers' torchvision backend: float32, mean and std divided by rescale_factor."""
    mean, std, rescale = (
        [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.2757],
        1 / 255,
    )
    image = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)[None]  # [1, 3, 1, 256]
    m, s = (torch.tensor(v) * (1.0 / rescale) for v in (mean, std))
    processed = (image.float() - m.view(3, 1, 1)) / s.view(3, 1, 1)
    each = torch.eye(3, dtype=dtype)[:, :, None, None]  # a 1 x 1 patch of each channel
    raw = {"image_mean": mean, "image_std": std, "rescale_factor": rescale}
    found = vlmops.patch_embed(image, each, **raw)
    assert torch.equal(found, vlmops.patch_embed(processed, each))
    assert torch.equal(found, vlmops.patch_embed(image, each, pixel_map=processed[0, :, 0]))
    assert torch.equal(found[0].T, processed[0].flatten(1).to(dtype))


@reads_proc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_patches_is_stored(dtype):
    """Two panels at most, one of patches and one of their product."""
    torch.use_deterministic_algorithms(False)
    x, w = drawn(40, 3, 224, 224, dtype=dtype), drawn(64, 3, 14, 14, dtype=dtype)
    panel = panels.PANEL * 4  # float32 where the CPU has no bfloat16
    patches = 40 * 256 * 588 * x.element_size()
    for cls in (None, drawn(64, dtype=dtype)):
        tokens = vlmops.patch_embed(x, w, prefix=cls)
        result = tokens.numel() * tokens.element_size()
        grown, largest = extra_memory(lambda c=cls: vlmops.patch_embed(x, w, prefix=c))
        assert largest <= panel + 4096 < patches
        assert grown <= result + 2 * panel + 2**20


def test_pixels_beyond_2_to_the_31():
    """Addresses are 64 bits wide: the second image lies 2^31 bytes after the first."""
    far = torch.zeros(2**31 + 3 * 64, dtype=torch.uint8)
    images = far.as_strided((2, 3, 8, 8), (2**31, 64, 8, 1))
    images.random_(256)
    w = drawn(8, 3, P, P)
    assert torch.equal(vlmops.patch_embed(images, w), vlmops.patch_embed(images.clone(), w))


def test_nan_pixels_stay_in_their_patch():
    x, w = drawn(1, 3, 8, 8), drawn(D, 3, P, P)
    x[0, 1, 5, 2] = float("nan")
    found = vlmops.patch_embed(x, w)
    assert found[0].isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(dtype):
    """Half an ulp above 1: down to even; above the next: up."""
    ulp = torch.finfo(dtype).eps
    w = torch.ones(1, 1, 1, 1, dtype=dtype)
    table = torch.tensor([[ulp / 2], [ulp / 2], [-ulp / 4]], dtype=dtype)
    x = torch.tensor([1.0, 1.0 + ulp, 1.0], dtype=dtype).view(1, 1, 1, 3)
    found = vlmops.patch_embed(x, w, positions=[Position(table)])
    assert found.flatten().tolist() == [1.0, 1.0 + 2 * ulp, 1.0]


def test_a_product_alone_is_a_product(monkeypatch):
    """Flattened patches with nothing around them are multiplied where they lie."""
    calls = []
    pack = panels.Arguments.pack
    monkeypatch.setattr(panels.Arguments, "pack", lambda *a: calls.append(a) or pack(*a))
    x, w = drawn(10, 48), drawn(D, 3, P, P)
    close(vlmops.patch_embed(x, w), x @ w.flatten(1).T)
    assert not calls
    vlmops.patch_embed(x, w, prefix=drawn(D))
    assert len(calls) == 1


def test_panels_of_any_size_give_the_same(monkeypatch):
    x, w = drawn(3, 3, 16, 12), drawn(D, 3, P, P, requires_grad=True)
    cls, table = drawn(D), drawn(13, D)

    def both():
        tokens = vlmops.patch_embed(x, w, prefix=cls, positions=[Position(table)])
        return tokens.detach(), torch.autograd.grad(tokens, w, torch.ones_like(tokens))[0]

    whole = both()
    monkeypatch.setattr(panels, "PANEL", 5 * 48)
    for got, expected in zip(both(), whole, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    "name",
    [
        "clip",
        "llama4_last",
        "mllama_tiles",
        "siglip",
        "tile_by_patch",
        "pixtral_list",
        "uint8",
    ],
)
def test_products_are_added_to_what_is_written_first(monkeypatch, name):
    """Large images in 16 bits; here small ones too, and whether or not the CPU is good at it."""
    case = next(c for c in SPEC.cases if c.name == name)
    args = case.make(torch.bfloat16, torch.device("cpu"))
    expected = SPEC.function(**args)[0].float()
    monkeypatch.setattr(panels.products, "multiplies", lambda dtype: True)
    monkeypatch.setattr(panels, "FILLED_FROM", 1)
    finished = []
    finish = torch.ops.vlmops.patch_embed_finish
    monkeypatch.setattr(
        torch.ops.vlmops, "patch_embed_finish", lambda *a: finished.append(a) or finish(*a)
    )
    found = SPEC.function(**args)[0].float()
    assert len(finished) == 1
    assert finished[0][1].stride(0) == 0
    torch.testing.assert_close(found, expected, atol=2**-6, rtol=2**-6)


def test_long_sums_lose_no_digits():
    rows = torch.full((2**15, 600), 0.1)
    exact = rows[:, 0].double().sum()
    in_turn = numpy.cumsum(rows[:, 0].numpy(), dtype=numpy.float32)[-1]
    assert abs(in_turn / exact - 1) > 2**-16
    found = torch.ops.vlmops.patch_embed_column_sums(rows)
    assert (found / exact - 1).abs().max() < 2**-19


@pytest.mark.parametrize("native", [True, False])
def test_16_bits_are_multiplied_in_float32_where_the_cpu_has_no_other(monkeypatch, native):
    packed = []
    pack = panels.Arguments.pack
    monkeypatch.setattr(panels.products, "multiplies", lambda dtype: native)
    monkeypatch.setattr(panels.Arguments, "pack", lambda *a: packed.append(pack(*a)) or packed[-1])
    x, w = drawn(1, 3, 8, 8).bfloat16(), drawn(D, 3, P, P).bfloat16()
    found = vlmops.patch_embed(x, w)
    assert [panel.dtype for panel in packed] == [torch.bfloat16 if native else torch.float32]
    close(found, reference(x, w).bfloat16(), 0.02)


def test_autocast_of_others_does_not_reach_the_products():
    x, w = drawn(1, 3, 8, 8), drawn(D, 3, P, P, requires_grad=True)
    expected = vlmops.patch_embed(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        found = vlmops.patch_embed(x, w)
    assert torch.equal(found, expected)


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    w, table = drawn(D, 3, P, P), drawn(64, D)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def embed(x):
        return vlmops.patch_embed(x, w, positions=[Position(table)])

    for side in (8, 12, 20):
        x = drawn(2, 3, side, side)
        close(embed(x), vlmops.patch_embed(x, w, positions=[Position(table)]))
    assert counter.frame_count == 1


def test_the_other_backends_and_what_is_no_position():
    x, w = drawn(1, 3, 8, 8), drawn(D, 3, P, P)
    close(vlmops.patch_embed(x, w, backend="reference"), vlmops.patch_embed(x, w))
    with pytest.raises(TypeError, match=r"positions: expected vlmops.Position, got Tensor"):
        vlmops.patch_embed(x, w, positions=[drawn(4, D)])
    with pytest.raises(RuntimeError, match=r"positions: expected at most 4, got 5"):
        vlmops.patch_embed(x, w, positions=[Position(drawn(4, D))] * 5)
    with pytest.raises(RuntimeError, match=r"image_sizes: expected a height and a width for each"):
        vlmops.patch_embed(x, w, image_sizes=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_panels_on_the_emulator(case, dtype, monkeypatch):
    """What a GPU does with large inputs: a kernel that packs, a product, one that finishes."""
    monkeypatch.setattr(panels, "LARGE_ON_GPU", 0)
    monkeypatch.setattr(panels, "PANEL_ON_GPU", 2**11)
    args = case.make(dtype, torch.device("cpu"))
    exact = SPEC.reference(**args)[0]
    yardstick = SPEC.yardstick_for(args)(**args)[0]
    with emulated("checked"):
        found = SPEC.function(**args)[0]
    assert mismatch(found, exact, yardstick.dtype, largest_error(yardstick, exact)) is None


def test_rows_of_panels_are_padded_with_zeros_on_the_emulator():
    x, w = drawn(2, 3, 10, 15).bfloat16(), drawn(D, 3, 5, 5).bfloat16()
    args = panels.Arguments([x], w, [], [])
    expected = args.pack(3, 11, torch.bfloat16)
    with emulated("checked"):
        found = args.pack(3, 11, torch.bfloat16, 80)
    assert found.shape == (8, 80)
    assert torch.equal(found[:, :75], expected)
    assert found[:, 75:].eq(0).all()
