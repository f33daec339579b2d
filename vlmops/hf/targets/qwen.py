"""Qwen-VL from 2 on, and the thinker of Qwen2.5-Omni: one tower of packed patches."""

from vlmops.hf.targets import attention, patches, projector, text, tower

_PLACES = (
    patches("model.visual.patch_embed.proj"),
    tower("model.visual", "depth"),
    attention("model.visual.blocks.*.attn", layers="depth"),
    projector("model.visual.merger"),
    text(),
)
_DEEPSTACK = projector(
    "model.visual.deepstack_merger_list.0",
    lambda config: int(len(config.vision_config.deepstack_visual_indexes) > 0),
)

EXPECTED = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _PLACES),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), (*_PLACES, _DEEPSTACK)),
}
