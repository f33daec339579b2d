"""Models of real width and few layers, with random weights, for `bench/e2e.py`.

Each is a function of the numbers of layers, of text and of the tower, and returns a config, the ids
of a prompt, and what else the model is given. Widths, heads, patches and tokens are those of the
published checkpoints; `LAYERS` are fewer.
"""

import argparse
import sys

import torch
import transformers

from vlmops.demo.inputs import random_model

LAYERS = {"smolvlm": (6, 4), "internvl": (4, 4), "qwen2_5_vl": (4, 4),
          "mllama": (4, 3)}  # fmt: skip
NAMES = {
    "smolvlm": "SmolVLM-256M",
    "internvl": "InternVL3-1B",
    "qwen2_5_vl": "Qwen2.5-VL-3B",
    "mllama": "Llama-3.2-11B-Vision",
}
TEXT = 32  # tokens of a question around the picture
IMAGE = 5  # the id that stands for a token of an image


def ids(images):
    """A question around so many tokens of images."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(10, 1000, (TEXT,), generator=draw).tolist()
    return torch.tensor([words[: TEXT // 2] + [IMAGE] * images + words[TEXT // 2 :]])


def smolvlm(text, vision):
    """Four tiles of 512 x 512 and the whole picture: 5 x 64 tokens."""
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280,
                     "num_hidden_layers": text, "rope_theta": 100000.0},
        vision_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                       "num_hidden_layers": vision, "image_size": 512, "patch_size": 16},
        scale_factor=4, image_token_id=IMAGE,
    )  # fmt: skip
    pixels = {"pixel_values": torch.randn(1, 5, 3, 512, 512)}
    return config, ids(5 * 64), pixels


def internvl(text, vision):
    """Four tiles of 448 x 448 and the whole picture: 5 x 256 tokens."""
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674,
                     "num_hidden_layers": text},
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                       "num_hidden_layers": vision, "image_size": [448, 448],
                       "patch_size": [14, 14], "layer_scale_init_value": 0.1},
        image_token_id=IMAGE,
    )  # fmt: skip
    pixels = {"pixel_values": torch.randn(5, 3, 448, 448)}
    return config, ids(5 * 256), pixels


def qwen2_5_vl(text, vision):
    """1,036 x 1,036 pixels: 5,476 patches, 1,369 tokens; one tower layer of four sees all."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
                     "num_key_value_heads": 2, "vocab_size": 151936, "num_hidden_layers": text,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                         "mrope_section": [16, 24, 24]}},
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "depth": vision, "out_hidden_size": 2048,
                       "fullatt_block_indexes": [vision - 1]},
        image_token_id=IMAGE, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    pixels = {
        "pixel_values": torch.randn(74 * 74, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 74, 74]]),
        "mm_token_type_ids": (ids(37 * 37) == IMAGE).int(),
    }
    return config, ids(37 * 37), pixels


def mllama(text, vision):
    """A picture of one tile of four; one text layer of four looks at it. 32,000 words."""
    config = transformers.MllamaConfig(
        text_config={"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 32000, "num_hidden_layers": text,
                     "cross_attention_layers": [1], "bos_token_id": 1, "eos_token_id": 2,
                     "pad_token_id": 0},
        vision_config={"hidden_size": 1280, "intermediate_size": 5120, "attention_heads": 16,
                       "num_hidden_layers": vision - 1, "num_global_layers": 1,
                       "image_size": 560, "patch_size": 14, "max_num_tiles": 4,
                       "intermediate_layers_indices": list(range(vision - 1)),
                       "vision_output_dim": 1280 * vision},
        image_token_index=IMAGE,
    )  # fmt: skip
    tokens = ids(1)
    seen = torch.zeros(1, tokens.shape[1], 1, 4, dtype=torch.long)
    seen[:, TEXT // 2 :, :, 0] = 1
    pixels = {
        "pixel_values": torch.randn(1, 1, 4, 3, 560, 560),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": seen,
    }
    return config, tokens, pixels


MAKERS = {f.__name__: f for f in (smolvlm, internvl, qwen2_5_vl, mllama)}


def made(name, dtype):
    """A model and its inputs."""
    config, tokens, inputs = MAKERS[name](*LAYERS[name])
    inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return random_model(config, dtype), inputs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    for name, make in MAKERS.items():
        text, vision = LAYERS[name]
        print(f"{name}: {NAMES[name]}, {text} + {vision} layers. {make.__doc__}")


if __name__ == "__main__":
    sys.exit(main())
