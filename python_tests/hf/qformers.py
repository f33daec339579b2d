"""Tiny models with a Q-Former, and batches for them."""

import torch
import transformers
from transformers import AutoConfig

QUERIES, IMAGE, IMAGES, INSTRUCTION = 4, 99, 2, 5
"""Learned queries; the token that stands for one; images of a batch; tokens of an instruction."""
_VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "encoder_hidden_size": 24, "vocab_size": 50, "max_position_embeddings": 32,
    "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_TEXT = {
    "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 120, "max_position_embeddings": 64,
    "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1,
}  # fmt: skip
FAMILIES = {"blip_2": "blip-2", "instructblip": "instructblip",
            "instructblipvideo": "instructblipvideo"}  # fmt: skip
FRAMES = {"instructblipvideo": 3}
CROSS, LAYERS = 2, 3
SITES = CROSS + LAYERS


def build(family, attention="sdpa", **qformer):
    """A model in eval mode, from one seed."""
    torch.manual_seed(0)
    token = {"video_token_index" if family in FRAMES else "image_token_index": IMAGE}
    config = AutoConfig.for_model(
        FAMILIES[family], vision_config=dict(_VISION), qformer_config={**_QFORMER, **qformer},
        text_config=dict(_TEXT), num_query_tokens=QUERIES, **token,
    )  # fmt: skip
    config._attn_implementation = attention
    classes = {
        "blip_2": transformers.Blip2ForConditionalGeneration,
        "instructblip": transformers.InstructBlipForConditionalGeneration,
        "instructblipvideo": transformers.InstructBlipVideoForConditionalGeneration,
    }
    model = classes[family](config)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, p in model.named_parameters():  # queries begin as zeros, norms as ones
            p.copy_(
                torch.randn(p.shape) * (0.1 if p.dim() > 1 else 0.02) + ("norm.w" in name.lower())
            )
    return model.eval()


def inputs(family, padded=(0, 2)):
    """A batch of two samples; ``padded``: tokens of the instruction, of each, that are."""
    torch.manual_seed(1)
    frames = FRAMES.get(family)
    pixels = (IMAGES, 3, 8, 8) if frames is None else (IMAGES, frames, 3, 8, 8)
    ids = torch.randint(2, 90, (IMAGES, 6))
    marks = torch.full((IMAGES, QUERIES * (frames or 1)), IMAGE)
    batch = {"pixel_values": torch.randn(pixels), "input_ids": torch.cat([marks, ids], 1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if family != "blip_2":
        batch["qformer_input_ids"] = torch.randint(0, 50, (IMAGES, INSTRUCTION))
        there = torch.arange(INSTRUCTION) < INSTRUCTION - torch.tensor(padded)[:, None]
        batch["qformer_attention_mask"] = there.long()
    return batch
