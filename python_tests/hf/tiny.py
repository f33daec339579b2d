"""Tiny random models of the real classes, one row a family, and inputs as their processors make."""

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 200
IMAGE, VIDEO, START, END = 190, 191, 192, 193
P = 4  # side of a patch in pixels, in every tower

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Images:
    """How a family's processor turns images into placeholders and pixels."""

    tokens: Callable[[Size], int]
    """Placeholders of an image of h x w, in units that every family can divide it into."""
    pixels: Callable[[list[list[Size]], torch.Tensor], dict[str, Any]]
    """The processor's other outputs, from the images of each row and input_ids."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table."""

    architecture: str
    images: Images
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    places: Mapping[str, int]
    """Path -> calls of the op in one forward with images."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flat: bool = False
    """Whether the text model's settings stand in the config itself."""
    decoder: str = "model.language_model"
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path -> what the report says of it."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path -> why q and k are not rotated in place there when nothing requires grad."""
    in_5_17: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is different in the oldest transformers that vlmops supports."""
    idle: int = 0
    """Sites that the report counts and no forward reaches."""
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Check -> why Hugging Face's own code fails it, or what is refused."""

    @property
    def towers(self) -> dict[str, int]:
        return {path: n for path, n in self.places.items() if "vis" in path}

    def calls(self, towers: int, texts: int) -> tuple[int, int]:
        """Calls of the op in so many forwards of towers and of text models, and how many of those
        copy although nothing requires grad."""
        calls = {p: n * (towers if p in self.towers else texts) for p, n in self.places.items()}
        for path in calls.keys() - self.towers.keys():
            calls[path] -= self.idle * texts
        return sum(calls.values()), sum(calls[path] for path in self.copies)


# Images.


def _flatten(rows):
    return [size for row in rows for size in row]


def _patches(channels, keyed=None, each=None, merge=2):
    """One row of pixels a patch, all images after each other, and their grids."""

    def pixels(rows, _):
        grids = [(1, h * merge, w * merge) for h, w in _flatten(rows)]
        count = sum(h * w for _, h, w in grids)
        more = {key: torch.full((len(grids),), value) for key, value in (each or {}).items()}
        shape = (*(keyed or ()), count, *channels)
        return {"pixel_values": torch.randn(shape), "image_grid_thw": torch.tensor(grids), **more}

    return Images(lambda size: size[0] * size[1], pixels)


def _squares(side, tokens, nested=False, **masks):
    """Images of one size ``[n, 3, side, side]``; nested: ``[B, images of a row, 3, side, side]``.

    masks: name -> shape of a mask of ones for each image.
    """

    def pixels(rows, _):
        sizes = _flatten(rows)
        first = (len(rows), max(map(len, rows))) if nested else (len(sizes),)
        batch = {"pixel_values": torch.randn(*first, 3, side, side)}
        if nested:
            for row, images in enumerate(rows):
                batch["pixel_values"][row, len(images) :] = 0  # what a processor pads with
        return batch | {k: torch.ones(*first, *s, dtype=torch.long) for k, s in masks.items()}

    return Images(lambda _: tokens, pixels)


def _padded(merge):
    """Images of several sizes, padded to one: Pixtral's."""
    side = P * merge

    def pixels(rows, _):
        sizes = _flatten(rows)
        height, width = (max(s[i] for s in sizes) * side for i in (0, 1))
        return {
            "pixel_values": torch.randn(len(sizes), 3, height, width),
            "image_sizes": torch.tensor(sizes) * side,
        }

    return Images(lambda size: size[0] * size[1], pixels)


def _llava_next_pixels(rows, _):
    """Two tiles an image, the whole and one of itself: 4 tokens, and 2 rows of 2 and a newline."""
    count = len(_flatten(rows))
    return {
        "pixel_values": torch.randn(count, 2, 3, 8, 8),
        "image_sizes": torch.tensor([[8, 8]] * count),
    }


def _naflex_pixels(rows, _):
    sizes = torch.tensor(_flatten(rows)) * 2
    most = int(sizes.prod(dim=1).max())
    mask = torch.arange(most) < sizes.prod(dim=1, keepdim=True)
    return {
        "pixel_values": torch.randn(len(sizes), most, 3 * P * P),
        "spatial_shapes": sizes,
        "pixel_attention_mask": mask.long(),
    }


def _mllama_pixels(rows, input_ids):
    images, tiles = max(map(len, rows)), 2
    used = torch.zeros(len(rows), images, tiles, dtype=torch.long)
    cross = torch.zeros(*input_ids.shape, images, tiles, dtype=torch.long)
    for row, sizes in enumerate(rows):
        starts = (input_ids[row] == IMAGE).nonzero()[:, 0].tolist()
        for image, start in enumerate(starts):
            used[row, image] = 1
            cross[row, start:, image] = 1
        assert len(starts) == len(sizes)
    return {
        "pixel_values": torch.randn(len(rows), images, tiles, 3, 8, 8),
        "aspect_ratio_ids": used[:, :, 0] * 2,
        "aspect_ratio_mask": used,
        "cross_attention_mask": cross,
    }


def _idefics_pixels(rows, input_ids):
    """A text without images gets a blank one that nothing looks at."""
    images = max(1, *map(len, rows))
    seen = (input_ids == START).cumsum(dim=1)[..., None]
    return {
        "pixel_values": torch.randn(len(rows), images, 3, 8, 8),
        "image_attention_mask": (seen > torch.arange(images)).long(),
    }


def _phi4_pixels(rows, _):
    """The whole image and one crop of it: (2 rows of 2 and a separator) twice, and one between."""
    count = len(_flatten(rows))
    return {
        "image_pixel_values": torch.randn(count, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * count),
        "image_attention_mask": torch.ones(count, 2, 4, 4),
    }


# transformers' rope types, with 16 tokens as the length that was trained.
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 16},
}

# Text models and towers.

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def _rope(**more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}


_PLAIN = _rope()
_MROPE = _rope(mrope_section=[2, 3, 3])
# Two heads of 20 channels: 5 pairs of each axis, no multiple of anything.
_DEPTH = {"depth": 2, "hidden_size": 40, "num_heads": 2, "patch_size": P}
_WINDOWS = {"fullatt_block_indexes": [1], "window_size": 4 * P}
_LAYERS = {
    "num_hidden_layers": 2,
    "hidden_size": 40,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": P,
}
_PIXTRAL = {**_LAYERS, "model_type": "pixtral", "head_dim": 20, "image_size": 64, **_PLAIN}
_CLIP = {**_LAYERS, "model_type": "clip_vision_model", "image_size": 8}
_SIGLIP = {
    **_LAYERS,
    "model_type": "siglip_vision_model",
    "image_size": 8,
    "vision_use_head": False,
}
_IDEFICS3 = {**_LAYERS, "image_size": 16}


def _moe(**names):
    return {"num_experts_per_tok": 2, "moe_intermediate_size": 32, **names}


_CUBES = _patches([3 * 2 * P * P])
_LLAMA_CLIP = {"image_token_index": IMAGE, "vision_feature_layer": -1}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _CUBES,
        _MROPE,
        {"depth": 2, "embed_dim": 40, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
        | {"patch_size": P},
        {"model.visual": 2, "model.language_model": 3},
        _IDS,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _CUBES,
        _MROPE,
        {**_DEPTH, **_WINDOWS, "intermediate_size": 48, "out_hidden_size": 64},
        {"model.visual": 2, "model.language_model": 3},
        _IDS,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        _CUBES,
        {**_rope(mrope_section=[4, 2, 2], mrope_interleaved=True), "head_dim": 16},
        {**_DEPTH, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0]},
        {"model.visual": 2, "model.language_model": 3},
        _IDS,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        _CUBES,
        {**_rope(mrope_section=[8, 4, 4], mrope_interleaved=True), "head_dim": 32}
        | _moe(num_experts=4, decoder_sparse_step=1),
        {**_DEPTH, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0]},
        {"model.visual": 2, "model.language_model": 3},
        _IDS,
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _CUBES,
        _MROPE,
        {**_DEPTH, **_WINDOWS, "intermediate_size": 48, "out_hidden_size": 64},
        {"model.visual": 2, "model.language_model": 3},
        {
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "audio_token_index": 194,
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "output_dim": 64,
            },
        },
        in_5_17={
            "places": {"model": 3},
            "refused": {"visual": "was wrapped by transformers"},
            "decoder": "model",
        },
    ),
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        _CUBES,
        _rope(mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
        {**_DEPTH, "intermediate_size": 48, "out_hidden_size": 64, "image_size": 32},
        {"model.visual": 2, "model.language_model": 3},
        {**_IDS, "image_start_token_id": START, "image_end_token_id": END},
    ),
    "glm_ocr": Family(
        "GlmOcrForConditionalGeneration",
        _CUBES,
        {**_MROPE, "head_dim": 16},
        {**_DEPTH, "intermediate_size": 48, "out_hidden_size": 64},
        {"model.visual": 2, "model.language_model": 3},
        {**_IDS, "image_start_token_id": START, "image_end_token_id": END},
    ),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        _patches([3 * P * P]),
        _rope(mrope_section=[3, 3, 2])
        | {"moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4},
        {**_DEPTH, "intermediate_size": 48},
        {"model.vision_tower": 2, "model.language_model": 3},
        {
            "image_token_id": IMAGE,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_token_id": VIDEO,
        },
        lacks=dict.fromkeys(ROPES, "it takes the default type only"),
    ),
    "paddleocr_vl": Family(
        "PaddleOCRVLForConditionalGeneration",
        _patches([3, P, P]),
        {**_MROPE, "head_dim": 16},
        {**_LAYERS, "image_size": 32},
        {"model.visual.vision_model.encoder": 2, "model.language_model": 3},
        _IDS,
    ),
    "video_llama_3": Family(
        "VideoLlama3ForConditionalGeneration",
        _patches([3 * P * P], each={"image_merge_sizes": 2}),
        {**_PLAIN, "model_type": "qwen2"},
        _LAYERS,
        {"model.vision_model": 2, "model.language_model": 3},
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        _padded(2),
        {**_PLAIN, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        _PIXTRAL,
        {"model.vision_tower": 2, "model.language_model": 3},
        {"image_token_index": IMAGE, "spatial_merge_size": 2},
    ),
    "llava_pixtral": Family(
        "LlavaForConditionalGeneration",
        _padded(1),
        {**_PLAIN, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        _PIXTRAL,
        {"model.vision_tower": 2, "model.language_model": 3},
        {**_LLAMA_CLIP, "vision_feature_select_strategy": "full"},
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        _squares(16, 4),
        {**_PLAIN, "head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 4}
        | {"no_rope_layers": [1, 1, 0], "interleave_moe_layer_step": 2},
        {**_LAYERS, "image_size": 16, "intermediate_size": 160, "vision_output_dim": 48}
        | {"projector_input_dim": 48, "projector_output_dim": 48, "hidden_size": 40}
        | _PLAIN,
        {"vision_model": 2, "language_model.model": 2},  # the third layer has no positions
        {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END},
        decoder="language_model.model",
        lacks={
            "reentrant": "its tower gives hidden states by name, where checkpointing misses them"
        },
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        Images(lambda _: 1, _mllama_pixels),
        {**_PLAIN, "cross_attention_layers": [1], "num_hidden_layers": 4},
        {
            "hidden_size": 40,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_size": 48,
            "vision_output_dim": 80,
            "intermediate_layers_indices": [0],
            "image_size": 8,
            "patch_size": P,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        {"model.language_model": 3},
        {"image_token_index": IMAGE},
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        _squares(16, 4),
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        {**_SIGLIP, "image_size": 16},
        {"model.language_model": 3},
        {"image_token_index": IMAGE, "mm_tokens_per_image": 4},
        lacks=dict.fromkeys(("yarn", "longrope"), "layer types of two scalings are refused"),
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        _squares(8, 4),
        {**_PLAIN, "model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1},
        _SIGLIP,
        {"model.language_model": 3},
        {"image_token_index": IMAGE, "projection_dim": 64},
        lacks={"compile": "called without a mask, its own code gives something else compiled"},
    ),
    "paligemma2": Family(
        "PaliGemmaForConditionalGeneration",
        _squares(8, 4),
        {**_PLAIN, "model_type": "gemma2", "head_dim": 32, "sliding_window": 8},
        _SIGLIP,
        {"model.language_model": 3},
        {"image_token_index": IMAGE, "projection_dim": 64},
        lacks={"sdpa": "its attention scores are capped"},
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        _squares(8, 4),
        {**_PLAIN, "model_type": "llama"},
        _CLIP,
        {"model.language_model": 3},
        _LLAMA_CLIP,
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        Images(lambda _: 4 + 2 * (2 + 1), _llava_next_pixels),
        {**_PLAIN, "model_type": "mistral", "sliding_window": 16},
        _CLIP,
        {"model.language_model": 3},
        {**_LLAMA_CLIP, "image_grid_pinpoints": [[8, 8]]},
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        Images(lambda _: 4 + 2 * (2 + 1), _llava_next_pixels),
        {**_PLAIN, "model_type": "qwen2"},
        _SIGLIP,
        {"model.language_model": 3},
        {**_LLAMA_CLIP, "image_grid_pinpoints": [[8, 8]], "video_token_index": VIDEO},
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        _squares(16, 4),
        {**_PLAIN, "model_type": "qwen2"},
        {**_LAYERS, "image_size": [16, 16], "patch_size": [P, P]},
        {"model.language_model": 3},
        {"image_token_id": IMAGE},
    ),
    "idefics": Family(
        "IdeficsForVisionText2Text",
        Images(lambda _: 0, _idefics_pixels),
        {**_PLAIN, "num_hidden_layers": 4, "cross_layer_interval": 2, "freeze_text_layers": False}
        | {"freeze_vision_layers": False, "qk_layer_norms": True, "num_key_value_heads": None},
        {"embed_dim": 40, "image_size": 8, "intermediate_size": 48, "patch_size": P}
        | {"num_hidden_layers": 2, "num_attention_heads": 2},
        {"model.*.*.*": 4},
        {"alpha_type": "vector"},
        flat=True,
        decoder="model",
        lacks={"compile": "its decoder wants pixels"},
    ),
    "idefics2": Family(
        "Idefics2ForConditionalGeneration",
        _squares(16, 3, nested=True, pixel_attention_mask=(16, 16)),
        {**_PLAIN, "model_type": "mistral", "sliding_window": None},
        {**_IDEFICS3, "model_type": "idefics2_vision"},
        {"model.text_model": 3},
        {
            "image_token_id": IMAGE,
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 3,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 24,
                "num_key_value_heads": 2,
            },
        },
        decoder="model.text_model",
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        _squares(16, 4, nested=True, pixel_attention_mask=(16, 16)),
        {**_PLAIN, "model_type": "llama"},
        _IDEFICS3,
        {"model.text_model": 3},
        {"image_token_id": IMAGE, "scale_factor": 2},
        decoder="model.text_model",
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        _squares(16, 1, nested=True, pixel_attention_mask=(16, 16)),
        {**_PLAIN, "model_type": "llama"},
        _IDEFICS3,
        {"model.text_model": 3},
        {"image_token_id": IMAGE, "scale_factor": 4},
        decoder="model.text_model",
        in_5_17={"lacks": {"autocast": "its tower mixes dtypes"}},
    ),
    "phi4_multimodal": Family(
        "Phi4MultimodalForCausalLM",
        Images(lambda _: 2 * 2 * (2 + 1) + 1, _phi4_pixels),
        _rope(partial_rotary_factor=0.75)
        | {"original_max_position_embeddings": 512, "sliding_window": None},
        {**_LAYERS, "image_size": 16, "crop_size": 16, "image_token_id": IMAGE},
        {"model": 3},
        {
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "nemo_conv_channels": 8,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "audio_token_id": 194,
            },
        },
        flat=True,
        decoder="model",
        copies={"model": "its forward keeps the fused projection"},
        lacks=dict.fromkeys(("linear", "dynamic", "yarn", "llama3"), "it takes longrope only"),
    ),
    "aya_vision": Family(
        "AyaVisionForConditionalGeneration",
        _squares(16, 4),
        {**_PLAIN, "model_type": "cohere"},
        {**_SIGLIP, "image_size": 16},
        {"model.language_model": 3},
        {"image_token_index": IMAGE, "adapter_layer_norm_eps": 1e-6},
    ),
    "cohere2_vision": Family(
        "Cohere2VisionForConditionalGeneration",
        _squares(16, 4),
        {**_PLAIN, "model_type": "cohere2", "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        {**_SIGLIP, "image_size": 16},
        {"model.language_model": 2},  # full attention has no positions
        {"image_token_id": IMAGE, "alignment_intermediate_size": 64},
    ),
}

# Types that nothing in vlmops/ names.
UNLISTED: dict[str, Family] = {
    "lighton_ocr": Family(
        "LightOnOcrForConditionalGeneration",
        _padded(2),
        {**_PLAIN, "model_type": "qwen3", "head_dim": 16},
        _PIXTRAL,
        {"model.vision_encoder": 2, "model.language_model": 3},
        {"image_token_id": IMAGE},
    ),
    "exaone4_5": Family(
        "Exaone4_5_ForConditionalGeneration",
        _CUBES,
        {**_PLAIN, "model_type": "exaone4", "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {**_DEPTH, **_WINDOWS, "intermediate_size": 48, "out_hidden_size": 64}
        | {"num_key_value_heads": 1},
        {"model.visual": 2, "model.language_model": 2},  # full attention has no positions
        {"image_token_id": IMAGE, "video_token_id": VIDEO},
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3SparseForConditionalGeneration",
        _CUBES,
        _rope(partial_rotary_factor=0.5)
        | {"head_dim": 32, "rotary_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"dense_intermediate_size": 48, "shared_intermediate_size": 32}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
        {**_LAYERS, "image_size": 32},
        {"model.vision_tower": 2, "model.language_model": 3},
        {"image_token_index": IMAGE, "video_token_index": VIDEO, "projector_hidden_size": 64},
        in_5_17={
            "places": {"model.language_model": 3},
            "refused": {"model.vision_tower": "cannot be probed"},
        },
    ),
    "lfm2_vl": Family(
        "Lfm2VlForConditionalGeneration",
        Images(lambda size: size[0] * size[1], _naflex_pixels),
        {**_PLAIN, "model_type": "lfm2", "layer_types": ["full_attention", "conv"] * 2}
        | {"num_hidden_layers": 4},
        {**_LAYERS, "model_type": "siglip2_vision_model", "num_patches": 64}
        | {"vision_use_head": False},
        {"model.language_model": 2},
        {"image_token_id": IMAGE, "projector_hidden_size": 48},
    ),
    "muse_glimmer": Family(
        "MuseGlimmerForConditionalGeneration",
        _patches([3 * 2 * P * P]),
        {**_PLAIN, "head_dim": 16, "sliding_window": 8, "layer_rope_theta": [1e4, 1e4, 0]}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        {**_LAYERS, "pos_emb_height": 8, "pos_emb_width": 8},
        {"model.vision_tower": 2, "model.language_model": 3},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "out_hidden_size": 160}
        | {"projector_hidden_size": 48},
        idle=1,  # its model withholds the positions from the third layer
        copies={"model.language_model": "it scales q after its norm"},
    ),
    "kimi_k25": Family(
        "Kimi_K25ForConditionalGeneration",
        _patches([3, P, P]),
        {**_PLAIN, "model_type": "deepseek_v3", "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4}
        | {"num_key_value_heads": 4, "first_k_dense_replace": 3},
        {**_LAYERS, "pos_emb_height": 8, "pos_emb_width": 8},
        {"model.vision_tower": 2},
        {**_IDS, "projection_hidden_size": 40},
        refused={"model.language_model": "apply_rotary_pos_emb_interleave"},
        lacks=dict.fromkeys(
            ROPES, "only its tower is rotated by the op, and that by the default type"
        ),
    ),
}


def row_of(family):
    """The family's row, as it is in the transformers that runs."""
    row = (FAMILIES | UNLISTED)[family]
    older = transformers.__version__.startswith("5.17.")
    return dataclasses.replace(row, **row.in_5_17) if older else row


def config_of(family, **text):
    """The config of a row's model; text overrides settings of the text model."""
    row = row_of(family)
    architecture = getattr(transformers, row.architecture, None)
    if architecture is None:
        pytest.skip(f"{row.architecture} is not in transformers {transformers.__version__}")
    text = copy.deepcopy({**TEXT, **row.text, **text})
    parts = text if row.flat else {"text_config": text}
    vision = copy.deepcopy(dict(row.vision))
    return architecture.config_class(**parts, vision_config=vision, **copy.deepcopy(row.config))


def stretched(family, rope):
    """Settings of the text model with another rope type; of two layer types the second."""
    row = row_of(family)
    rotary = copy.deepcopy(row.text["rope_parameters"])
    changed = rotary.get("full_attention", rotary)
    changed |= {"rope_type": rope, **ROPES[rope]}
    if rope == "longrope":
        head_dim = row.text.get("head_dim", TEXT["hidden_size"] // TEXT["num_attention_heads"])
        pairs = int(head_dim * changed.get("partial_rotary_factor", 1.0)) // 2
        changed["short_factor"] = torch.linspace(1, 2, pairs).tolist()
        changed["long_factor"] = torch.linspace(2, 8, pairs).tolist()
    most = 16 if rope == "dynamic" else 64
    return {"rope_parameters": rotary, "max_position_embeddings": most}


def build(family, attention="sdpa", dtype=torch.float32, **text):
    """A model in eval mode; the same weights every time."""
    attention = "eager" if "sdpa" in row_of(family).lacks else attention
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(1)
    config = config_of(family, **text)
    config._attn_implementation = attention
    model = getattr(transformers, row_of(family).architecture)(config)
    return drawn(model, dtype)


def drawn(model, dtype=torch.float32):
    """A model with other weights, in eval mode."""
    # Default initialisation is so small that attention barely depends on positions, and norms and
    # gates do nothing.
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            if parameter.dim() > 1:
                parameter.normal_(std=fan_in**-0.5)
            else:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
            # Parameters only, as from_pretrained; model.to would spoil complex buffers.
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def blip(architecture="BlipForConditionalGeneration", dtype=torch.float32, **text):
    """BLIP, which has no rotary embeddings and three architectures; text: settings of its text."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(1)
    tokens = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = sizes | {"encoder_hidden_size": 48, "intermediate_size": 48, "vocab_size": 99} | text
    vision = {**sizes, "hidden_size": 48, "intermediate_size": 48, "image_size": 16}
    config = transformers.BlipConfig(
        text_config={"max_position_embeddings": 64, "projection_dim": 16, **tokens, **text},
        vision_config={**vision, "patch_size": P},
        image_text_hidden_size=16,
    )
    return drawn(getattr(transformers, architecture)(config), dtype)


def perceiver(architecture="PerceiverForImageClassificationLearned", dtype=torch.float32, **config):
    """Perceiver on images of 8 x 8 or on text."""
    torch.manual_seed(1)
    sizes = {"d_latents": 64, "d_model": 64, "num_latents": 6, "num_blocks": 1, "image_size": 8}
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 2}
    layers = {"num_self_attends_per_block": 2, "attention_probs_dropout_prob": 0.0}
    text = {"vocab_size": 50, "max_position_embeddings": 16, "num_labels": 5}
    made = transformers.PerceiverConfig(**sizes | heads | layers | text | config)
    return drawn(getattr(transformers, architecture)(made), dtype)


def inputs(family, rows: Sequence[Sequence[int | Size]], dtype=torch.float32, pad="left"):
    """Processor-like inputs from rows of pieces: a number is that many text tokens, a pair (h, w)
    an image."""
    torch.manual_seed(2)
    row = row_of(family)
    row_ids = []
    for pieces in rows:
        ids = []
        for piece in pieces:
            if isinstance(piece, int):
                ids += torch.randint(3, 180, (piece,)).tolist()
            else:
                ids += [START] + [IMAGE] * row.images.tokens(piece) + [END]
        row_ids.append(ids)
    width = max(map(len, row_ids))

    def padded(values):
        gap = [0] * (width - len(values))
        return gap + values if pad == "left" else values + gap

    input_ids = torch.tensor([padded(ids) for ids in row_ids])
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([padded([1] * len(ids)) for ids in row_ids]),
    }
    accepted = inspect.signature(getattr(transformers, row.architecture).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            batch[name] = (input_ids == IMAGE).long()
    sizes = [[piece for piece in pieces if not isinstance(piece, int)] for pieces in rows]
    if any(sizes) or row.architecture == "IdeficsForVisionText2Text":
        batch |= row.images.pixels(sizes, input_ids)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def run(model, batch, function=None, **kwargs):
    """Calls a model, or a method of it."""
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = None  # state that a previous call leaves
    if hasattr(model, "rope_deltas"):
        model.rope_deltas = None
    return (function or model)(**batch, **kwargs)
