"""BLIP, BLIP-2, InstructBLIP: towers without rotary embeddings."""

from typing import Any

from vlmops.hf.targets import Expected, attention, patches

_EMBEDDINGS = "vision_model.embeddings"

_ATTENTION = attention("vision_model.encoder.layers.*.self_attn")

# Of its text encoder, its text decoder, or both.
_TEXT = tuple(
    Expected(
        op, f"encoder.layer.*.{path}", lambda config: int(config.text_config.num_hidden_layers)
    )
    for op, path in (
        ("qformer_attention", "attention.self"),
        ("qformer_attention", "crossattention.self"),
        ("add_norm", "attention.output"),
        ("add_norm", "crossattention.output"),
        ("add_norm", "output"),
    )
)


def _layers(config: Any) -> int:
    return int(config.qformer_config.num_hidden_layers)


def _crossing(config: Any) -> int:
    qformer = config.qformer_config
    return -(-_layers(config) // int(qformer.cross_attention_frequency))


def _qformer(*text: str) -> tuple[Expected, ...]:
    """Of a Q-Former; text: of its places, those that only text reaches."""
    places = {"attention.attention": _layers, "crossattention.attention": _crossing}
    blocks = {"attention.output": _layers, "crossattention.output": _crossing}
    blocks |= dict.fromkeys(("output_query", *text), _layers)
    found = {"qformer_attention": places, "add_norm": blocks}
    return tuple(
        Expected(op, f"qformer.encoder.layer.*.{path}", sites)
        for op, paths in found.items()
        for path, sites in paths.items()
    )


EXPECTED = {
    "blip": (patches(_EMBEDDINGS), *_TEXT),  # its tower calls no attention function
    "blip-2": (patches(_EMBEDDINGS), _ATTENTION, *_qformer()),
    **dict.fromkeys(
        ("instructblip", "instructblipvideo"),
        (patches(_EMBEDDINGS), _ATTENTION, *_qformer("output")),
    ),
}
