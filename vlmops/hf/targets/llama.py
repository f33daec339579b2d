"""Llama-4 and Llama-3.2-Vision (Mllama)."""

from vlmops.hf.targets import Expected, attention, patches, projector, shuffle, tower

EXPECTED = {
    "llama4": (
        patches("vision_model.patch_embedding"),
        tower("vision_model"),
        attention("vision_model.model.layers.*.self_attn"),
        shuffle("vision_model.vision_adapter"),
        projector("vision_model.vision_adapter.mlp"),
        # One stands for a layer with positions.
        Expected(
            "mrope",
            "language_model.model",
            lambda config: int(sum(config.text_config.no_rope_layers)),
        ),
    ),
    "mllama": (
        patches("model.vision_model.patch_embedding"),
        Expected(
            "packed_attention",
            "model.vision_model.*.layers.*.self_attn",
            lambda config: (
                config.vision_config.num_hidden_layers + config.vision_config.num_global_layers
            ),
        ),
        Expected(
            "gated_cross_attention",
            "model.language_model.layers.*.cross_attn",
            lambda config: len(config.text_config.cross_attention_layers),
        ),
        Expected(
            "gated_residual",
            "model.language_model.layers.*",
            lambda config: 2 * len(config.text_config.cross_attention_layers),
        ),
        Expected(
            "mrope",
            "model.language_model",
            lambda config: (
                config.text_config.num_hidden_layers
                - len(config.text_config.cross_attention_layers)
            ),
        ),
    ),
}
