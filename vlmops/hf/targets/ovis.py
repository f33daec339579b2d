"""Ovis2, Aria and Janus: a tower of the family's own, a Llama or Qwen2."""

from vlmops.hf.targets import patches, projector, shuffle, text

EXPECTED = {
    "aria": (
        patches("model.vision_tower.embeddings"),
        projector("model.multi_modal_projector.feed_forward"),
        text(),
    ),
    "janus": (
        patches("model.vision_model.embeddings"),
        projector("model.aligner"),
        projector("model.generation_aligner"),
        text(),
    ),
    "ovis2": (
        patches("model.vision_tower.transformer.embeddings"),
        shuffle("model.vision_tower", lambda config: int(config.vision_config.hidden_stride > 1)),
        text(),
    ),
}
