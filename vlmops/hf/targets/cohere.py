"""Aya Vision and Command A Vision: Cohere 2 rotates in its sliding layers only, Cohere in all."""

from typing import Any

from vlmops.hf.targets import Expected, attention, patches, projector, shuffle


def _rotating(config: Any) -> int:
    types = getattr(config.text_config, "layer_types", None)
    return types.count("sliding_attention") if types else int(config.text_config.num_hidden_layers)


EXPECTED = dict.fromkeys(
    ("aya_vision", "cohere2_vision"),
    (
        patches("model.vision_tower.embeddings"),
        attention("model.vision_tower.encoder.layers.*.self_attn"),
        shuffle("model.multi_modal_projector"),
        projector("model.multi_modal_projector"),
        Expected("mrope", "model.language_model", _rotating),
    ),
)
