"""ERNIE-4.5-VL and PaddleOCR-VL."""

from vlmops.hf.targets import attention, patches, projector, text, tower

EXPECTED = {
    "ernie4_5_vl_moe": (
        tower("model.vision_tower", "depth"),
        attention("model.vision_tower.blocks.*.attn", layers="depth"),
        projector("model.resampler_model.spatial_linear"),
        projector("model.resampler_model.temporal_linear"),
        text(),
    ),
    "paddleocr_vl": (
        patches("model.visual.vision_model.embeddings.patch_embedding"),
        tower("model.visual.vision_model.encoder"),
        attention("model.visual.vision_model.encoder.layers.*.self_attn"),
        projector("model.projector"),
        text(),
    ),
}
