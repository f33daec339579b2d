"""Idefics 1 and 3, SmolVLM."""

from vlmops.hf.targets import text

EXPECTED = {
    "idefics": (text("model.*.*.*"),),  # a rotary module in each attention module
    "idefics3": (text("model.text_model"),),
    "smolvlm": (text("model.text_model"),),
}
