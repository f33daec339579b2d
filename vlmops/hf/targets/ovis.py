"""Ovis2, Aria and Janus: a tower of the family's own, a Llama or Qwen2."""

from vlmops.hf.targets import patches, text

EXPECTED = {
    "aria": (patches("model.vision_tower.embeddings"), text()),
    "janus": (patches("model.vision_model.embeddings"), text()),
    "ovis2": (patches("model.vision_tower.transformer.embeddings"), text()),
}
