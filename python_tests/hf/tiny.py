"""Tiny random models of the real classes, and inputs for them; built in well under a second."""

import logging
from collections.abc import Callable

import torch
import transformers

VOCABULARY = 200
_IDS = {
    "image_token_id": 190,
    "video_token_id": 191,
    "vision_start_token_id": 192,
    "vision_end_token_id": 193,
}
_TEXT = {
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
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}


def _qwen2_vl(text, **config):
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    cfg = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **_IDS, **config)
    return transformers.Qwen2VLForConditionalGeneration(cfg)


def _qwen2_5_vl(text, **config):
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    cfg = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IDS, **config)
    return transformers.Qwen2_5_VLForConditionalGeneration(cfg)


FAMILIES: dict[str, Callable] = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl}


def build(family, attention="sdpa", dtype=torch.float32, **text):
    """A model in eval mode; the same weights every time."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(1)
    model = FAMILIES[family]({**_TEXT, **text}, attn_implementation=attention)
    # Default initialisation is so small that attention barely depends on positions.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def inputs(rows, dtype=torch.float32, pad="left"):
    """Processor-like inputs from rows of pieces: a number is that many text tokens, a pair (h, w)
    an image of h x w patches."""
    torch.manual_seed(2)
    row_ids, row_types, grids = [], [], []
    for row in rows:
        ids, types = [], []
        for piece in row:
            if isinstance(piece, int):
                ids += torch.randint(3, 180, (piece,)).tolist()
                types += [0] * piece
            else:
                tokens = piece[0] * piece[1] // 4
                ids += [_IDS["vision_start_token_id"]] + [_IDS["image_token_id"]] * tokens
                ids += [_IDS["vision_end_token_id"]]
                types += [0] + [1] * tokens + [0]
                grids.append((1, *piece))
        row_ids.append(ids)
        row_types.append(types)
    width = max(map(len, row_ids))

    def padded(values, filler):
        gap = [filler] * (width - len(values))
        return gap + values if pad == "left" else values + gap

    batch = {
        "input_ids": torch.tensor([padded(ids, 0) for ids in row_ids]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids in row_ids]),
        "mm_token_type_ids": torch.tensor([padded(types, 0) for types in row_types]),
    }
    if grids:
        patches = sum(t * h * w for t, h, w in grids)
        batch["image_grid_thw"] = torch.tensor(grids)
        batch["pixel_values"] = torch.randn(patches, 3 * 2 * 14 * 14).to(dtype)
    return batch


def run(model, batch, **kwargs):
    model.model.rope_deltas = None  # state that a previous call leaves
    return model(**batch, **kwargs)
