"""Idefics 1 to 3, SmolVLM."""

from vlmops.hf.targets import patches, projector, shuffle, text

_TOWER = patches("model.vision_model.embeddings")
_CONNECTOR = shuffle("model.connector")

EXPECTED = {
    "idefics": (_TOWER, text("model.*.*.*")),  # a rotary module in each attention module
    "idefics2": (
        _TOWER,
        projector("model.connector.modality_projection"),
        text("model.text_model"),
    ),
    "idefics3": (_TOWER, _CONNECTOR, text("model.text_model")),
    "smolvlm": (_TOWER, _CONNECTOR, text("model.text_model")),
}
