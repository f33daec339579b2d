"""BLIP, BLIP-2, InstructBLIP: towers without rotary embeddings."""

from vlmops.hf.targets import patches

_EMBEDDINGS = "vision_model.embeddings"

EXPECTED = dict.fromkeys(
    ("blip", "blip-2", "instructblip", "instructblipvideo"), (patches(_EMBEDDINGS),)
)
