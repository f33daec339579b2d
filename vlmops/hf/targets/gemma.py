"""Gemma 3 and PaliGemma: a SigLIP tower, which has no rotary embedding."""

from vlmops.hf.targets import text

EXPECTED = dict.fromkeys(("gemma3", "paligemma"), (text(),))
