"""Gemma 3 and PaliGemma: a SigLIP tower, which has no rotary embedding."""

from vlmops.hf.targets import patches, text

EXPECTED = dict.fromkeys(
    ("gemma3", "paligemma"), (patches("model.vision_tower.embeddings"), text())
)
