"""BLIP, BLIP-2, InstructBLIP: towers without rotary embeddings."""

from vlmops.hf.targets import Expected, attention, patches

_EMBEDDINGS = "vision_model.embeddings"

_ATTENTION = attention("vision_model.encoder.layers.*.self_attn")

# Of its text encoder, its text decoder, or both.
_TEXT = tuple(
    Expected(
        "qformer_attention",
        f"encoder.layer.*.{name}.self",
        lambda config: int(config.text_config.num_hidden_layers),
    )
    for name in ("attention", "crossattention")
)

EXPECTED = {
    "blip": (patches(_EMBEDDINGS), *_TEXT),  # its tower calls no attention function
    **dict.fromkeys(
        ("blip-2", "instructblip", "instructblipvideo"), (patches(_EMBEDDINGS), _ATTENTION)
    ),
}
