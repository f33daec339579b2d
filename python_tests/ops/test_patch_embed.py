"""`vlmops.ops.patch_embed.reference` is what transformers computes, class by class."""

import pytest
import torch
import transformers as tr
from torch import nn
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

from vlmops.ops.patch_embed import Position, reference

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
