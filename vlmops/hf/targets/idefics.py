"""Idefics 1 to 3, SmolVLM."""

from typing import Any

from vlmops.hf.targets import Expected, attention, patches, projector, shuffle, text

_TOWER = patches("model.vision_model.embeddings")
_ATTENTION = attention("model.vision_model.encoder.layers.*.self_attn")
_CONNECTOR = shuffle("model.connector")


def _resampled(config: Any) -> int:
    return int(config.perceiver_config.resampler_depth) if config.use_resampler else 0


EXPECTED = {
    "idefics": (
        _TOWER,
        _ATTENTION,
        Expected(
            "gated_cross_attention",
            "model.gated_cross_attn_layers.*.cross_attn",
            lambda config: int(config.num_hidden_layers // config.cross_layer_interval),
        ),
        Expected(
            "gated_residual",
            "model.gated_cross_attn_layers.*",
            lambda config: int(2 * (config.num_hidden_layers // config.cross_layer_interval)),
        ),
        Expected("perceiver_attention", "model.perceiver_resampler.blocks.*.*", _resampled),
        text("model.*.*.*"),
    ),  # a rotary module in each attention module
    "idefics2": (
        _TOWER,
        _ATTENTION,
        projector("model.connector.modality_projection"),
        Expected(
            "perceiver_attention",
            "model.connector.perceiver_resampler.layers.*.self_attn",
            lambda config: int(config.perceiver_config.resampler_depth),
        ),
        text("model.text_model"),
    ),
    "idefics3": (_TOWER, _ATTENTION, _CONNECTOR, text("model.text_model")),
    "smolvlm": (_TOWER, _ATTENTION, _CONNECTOR, text("model.text_model")),
}
