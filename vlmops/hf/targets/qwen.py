"""Qwen-VL from 2 on, and the thinker of Qwen2.5-Omni: one tower of packed patches."""

from vlmops.hf.targets import patches, text, tower

_PLACES = (patches("model.visual.patch_embed.proj"), tower("model.visual", "depth"), text())

EXPECTED = dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni_thinker"), _PLACES
)
