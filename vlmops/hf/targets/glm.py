"""GLM-4V and GLM-OCR, built like Qwen2-VL."""

from vlmops.hf.targets import attention, patches, projector, text, tower

EXPECTED = dict.fromkeys(
    ("glm4v", "glm_ocr"),
    (
        patches("model.visual.patch_embed.proj"),
        patches("model.visual.downsample"),
        tower("model.visual", "depth"),
        attention("model.visual.blocks.*.attn", layers="depth"),
        projector("model.visual.merger"),
        text(),
    ),
)
