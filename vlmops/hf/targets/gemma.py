"""Gemma 3 and PaliGemma: a SigLIP tower, which has no rotary embedding."""

from typing import Any

from vlmops.hf.targets import attention, patches, shuffle, text


def _pools(config: Any) -> int:
    """Unless there are as many tokens as patches."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 > config.mm_tokens_per_image)


_TOWER = patches("model.vision_tower.embeddings")
_ATTENTION = attention("model.vision_tower.encoder.layers.*.self_attn")

EXPECTED = {
    "gemma3": (_TOWER, _ATTENTION, shuffle("model.multi_modal_projector", _pools), text()),
    "paligemma": (_TOWER, _ATTENTION, text()),
}
