"""Phi-4-multimodal: all hangs off the decoder."""

from vlmops.hf.targets import text

EXPECTED = {"phi4_multimodal": (text("model"),)}
