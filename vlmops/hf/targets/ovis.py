"""Ovis2, Aria and Janus: a tower of the family's own, a Llama or Qwen2."""

from vlmops.hf.targets import attention, patches, projector, shuffle, text

EXPECTED = {
    "aria": (
        patches("model.vision_tower.embeddings"),
        attention("model.vision_tower.encoder.layers.*.self_attn"),
        projector("model.multi_modal_projector.feed_forward"),
        text(),
    ),
    "janus": (
        patches("model.vision_model.embeddings"),
        attention("model.vision_model.encoder.layers.*.self_attn"),
        projector("model.aligner"),
        projector("model.generation_aligner"),
        text(),
    ),
    "ovis2": (
        patches("model.vision_tower.transformer.embeddings"),
        attention("model.vision_tower.transformer.encoder.layers.*.attention"),
        shuffle("model.vision_tower", lambda config: int(config.vision_config.hidden_stride > 1)),
        text(),
    ),
}
