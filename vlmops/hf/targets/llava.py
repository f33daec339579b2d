"""LLaVA and what is built like it: any tower, a projector, any language model."""

from typing import Any

from vlmops.hf.targets import Expected, attention, patches, projector, shuffle, text, tower

_PIXTRAL = Expected(
    "mrope",
    "model.vision_tower",
    lambda config: (
        config.vision_config.num_hidden_layers
        if config.vision_config.model_type == "pixtral"
        else 0
    ),
)


def _with(path: str, *model_types: str) -> Expected:
    """Patches of a tower of one of these types."""
    return patches(path, lambda config: int(config.vision_config.model_type in model_types))


_TOWERS = (
    _with("model.vision_tower.embeddings", "clip_vision_model", "siglip_vision_model"),
    _with("model.vision_tower.patch_conv", "pixtral"),
)

_ENCODER = "model.vision_tower.encoder.layers.*.self_attn"
_ATTENTION = (
    attention(_ENCODER, "clip_vision_model", "siglip_vision_model"),
    attention("model.vision_tower.transformer.layers.*.attention", "pixtral"),
)

_PROJECTOR = projector("model.multi_modal_projector")
_MERGER = shuffle("model.multi_modal_projector.patch_merger")


def _averages(config: Any) -> int:
    return int(config.spatial_pool_mode == "average")


EXPECTED = {
    "internvl": (
        _with("model.vision_tower.embeddings", "internvl_vision"),
        attention("model.vision_tower.encoder.layer.*.attention", "internvl_vision"),
        shuffle("model"),
        _PROJECTOR,
        text(),
    ),
    "llava": (*_TOWERS, *_ATTENTION, _PIXTRAL, _PROJECTOR, text()),
    "llava_next": (*_TOWERS, *_ATTENTION, _PROJECTOR, text()),
    "llava_next_video": (
        *_TOWERS,
        *_ATTENTION,
        shuffle("model.vision_resampler.pool", _averages),
        _PROJECTOR,
        text(),
    ),
    "llava_onevision": (*_TOWERS, *_ATTENTION, shuffle("model"), _PROJECTOR, text()),
    "mistral3": (*_TOWERS, *_ATTENTION, _PIXTRAL, _MERGER, _PROJECTOR, text()),
    "video_llama_3": (
        patches("model.vision_model.embeddings.patch_embedding"),
        tower("model.vision_model"),
        attention("model.vision_model.encoder.layers.*.self_attn"),
        projector("model.projector"),
        text(),
    ),
    "video_llava": (
        _with("model.image_tower.embeddings", "clip_vision_model"),
        _with("model.video_tower.embeddings", "clip_vision_model"),
        attention("model.image_tower.encoder.layers.*.self_attn", "clip_vision_model"),
        attention("model.video_tower.encoder.layers.*.self_attn", "clip_vision_model"),
        _PROJECTOR,
        text(),
    ),
    "vipllava": (*_TOWERS, *_ATTENTION, _PROJECTOR, text()),
}
