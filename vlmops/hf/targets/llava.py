"""LLaVA and what is built like it: any tower, a projector, any language model."""

from vlmops.hf.targets import Expected, text, tower

_PIXTRAL = Expected(
    "mrope",
    "model.vision_tower",
    lambda config: (
        config.vision_config.num_hidden_layers
        if config.vision_config.model_type == "pixtral"
        else 0
    ),
)

EXPECTED = {
    "internvl": (text(),),
    "llava": (_PIXTRAL, text()),
    "llava_next": (text(),),
    "llava_onevision": (text(),),
    "mistral3": (_PIXTRAL, text()),
    "video_llama_3": (tower("model.vision_model"), text()),
}
