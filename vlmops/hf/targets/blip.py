"""BLIP, BLIP-2, InstructBLIP: towers without rotary embeddings."""

from vlmops.hf.targets import attention, patches

_EMBEDDINGS = "vision_model.embeddings"

_ATTENTION = attention("vision_model.encoder.layers.*.self_attn")

EXPECTED = {
    "blip": (patches(_EMBEDDINGS),),  # it calls no attention function
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"), (patches(_EMBEDDINGS), _ATTENTION)
    ),
}
