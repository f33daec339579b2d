"""What an attention module calls instead of its model's attention functions.

The forward of such a module asks ``ALL_ATTENTION_FUNCTIONS`` for the function that is selected and
calls it with q, k and v. Patched, it gets a function that calls `packed_attention` where that gives
the same, and else the one that was asked for. Masks that only say where images or padding begin
travel as that, not as ``[S, S]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vlmops.hf import plain
from vlmops.hf.grids import know_longest, longest_of
from vlmops.hf.seen import SeenImages
from vlmops.ops.gated_cross_attention import gated_cross_attention
from vlmops.ops.packed_attention import packed_attention
from vlmops.ops.qformer_attention import qformer_attention

Kind = Literal[
    "segments", "images", "padding", "tiles", "media", "queries", "dense", "inference", "decode"
]
"""Who attends: tokens within segments that the forward is given; within images, where a mask was;
all to all but padding to padding; text to the tiles that it sees, or to the images; a Q-Former's
queries to visual tokens and among themselves; all to all, and the same where nothing is
differentiated; a token that is generated to all before it."""
CROSS: frozenset[Kind] = frozenset({"tiles", "media"})
"""Those of `gated_cross_attention`."""

SELECTED = ("eager", "sdpa")
"""The implementations that the op stands for."""
OTHER_MATHS = ("softcap", "position_bias", "s_aux", "sinks", "head_mask", "cache")
_VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
MAX_DIM = 256


class Functions:
    """Stands where the forward of an attention module looks for ``ALL_ATTENTION_FUNCTIONS``."""

    def __init__(self, theirs: Any, kind: Kind, mask: Any = None) -> None:
        """See `replaced`."""
        self._theirs, self._mask = theirs, mask
        self._attend = _segments if kind == "segments" else _dense
        self._kind = kind

    def get_interface(self, implementation: Any, default: Any) -> Callable[..., Any]:
        """See transformers.AttentionInterface."""
        theirs: Callable[..., Any] = self._theirs.get_interface(implementation, default)
        if implementation not in SELECTED:
            return theirs
        known = theirs is default or theirs.__module__ == SDPA
        return functools.partial(self._attend, theirs, known, self._kind, self._mask)


SDPA = "transformers.integrations.sdpa_attention"
_TRAVELS: Mapping[Kind, tuple[torch.dtype, int]] = {
    "images": (torch.int32, 1),
    "padding": (torch.bool, 2),
    "tiles": (torch.bool, 4),
    "queries": (torch.bool, 4),
}
"""Dtype and rank of what travels in place of a mask, or of a mask that is understood."""


def replaced(found: dict[str, Any], kind: Kind, mask: Any = None) -> dict[str, Any]:
    """What the globals of a forward stand for in a patched one.

    Args:
        found: From `globals_of`: name -> the model's own.
        kind: Who attends.
        mask: The model's function whose mask `Functions` makes of what travels in its place.
    """
    made: dict[str, Any] = {}
    for name, theirs in found.items():
        if callable(theirs):
            made[name] = _asks_for_segments(theirs)
        else:
            made[name] = Functions(theirs, kind, mask)
    return made


def _asks_for_segments(theirs: Any) -> Callable[..., bool]:
    """In place of ``is_flash_attention_requested``: the branch that passes cu_seqlens on."""

    def is_flash_attention_requested(config: Any = None, *args: Any, **kwargs: Any) -> bool:
        if config is not None and config._attn_implementation in SELECTED:
            return True
        return bool(theirs(config, *args, **kwargs))

    return is_flash_attention_requested


def _segments(
    theirs: Any,
    known: bool,
    kind: Kind,
    mask: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``[1, H, N, D]``, given where segments begin; else one call of ``theirs`` for each segment.

    The weights, which no tower looks at, are None.
    """
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        result: tuple[Tensor, Tensor | None] = theirs(
            module, query, key, value, attention_mask=attention_mask, **kwargs
        )
        return result
    if (
        known
        and attention_mask is None
        and query.shape[0] == 1
        and _servable(*(cast := _cast(query, key, value)), kwargs)
        and _starts(starts)
    ):
        return _packed(*cast, starts, kwargs), None
    rest = {name: value for name, value in kwargs.items() if name not in _VARLEN}
    lengths = (starts[1:] - starts[:-1]).tolist()
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outs = [theirs(module, *part, attention_mask=attention_mask, **rest)[0] for part in parts]
    return torch.cat(outs, dim=1), None


def _dense(
    theirs: Any,
    known: bool,
    kind: Kind,
    mask: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``[B, H, S, D]``, without a mask or with what travels in place of one; else ``theirs``."""
    carried = isinstance(attention_mask, SeenImages) or (
        attention_mask is not None
        and kind in _TRAVELS
        and (attention_mask.dtype, attention_mask.dim()) == _TRAVELS[kind]
    )
    sdpa = theirs.__module__ == SDPA
    causal = bool(sdpa and attention_mask is None and is_causal(module, query, kwargs))
    if (
        known
        and (attention_mask is None or carried)
        and not (kind == "decode" and query.shape[2] != 1)
        and not (kind == "inference" and _is_differentiated(query, key, value))
        and not (causal and query.shape[2] != key.shape[2])
        and not (carried and kind == "images" and query.shape[0] != 1)
        and not (carried and kind == "queries" and not (sdpa and attention_mask.shape[1] == 1))
        and (sdpa or not weights_wanted(module, kwargs))
        # Idefics' layers drop what comes of tokens that see no image, so nothing is made of it.
        and not (kind == "media" and plain.watched(module))
        and _servable(*(cast := _cast(query, key, value)), kwargs, shared=kind == "queries")
    ):
        if kind == "images" and attention_mask is not None:
            return _packed(*cast, attention_mask, kwargs), None
        q, k, v = (t.transpose(1, 2) for t in cast)  # [B, S, H, D]
        scale = kwargs.get("scaling")
        if kind == "queries":
            seen = None
            if attention_mask is not None:
                seen = attention_mask[:, 0].expand(k.shape[0], q.shape[1], k.shape[1])
            return qformer_attention(q, k, v, seen, scale=scale), None
        if attention_mask is None:
            return packed_attention(q, k, v, scale=scale, causal=causal), None
        if kind in CROSS:
            seen = _seen(attention_mask)
            size = k.shape[1] // max(seen.shape[2], 1)
            return gated_cross_attention(q, k, v, seen, size, scale=scale), None
        return _padded(q, k, v, attention_mask, scale), None
    if carried:
        if kind == "images":
            lengths = (attention_mask[1:] - attention_mask[:-1]).tolist()
            attention_mask = mask(lengths, query.transpose(1, 2).flatten(2))
        elif kind == "media":
            attention_mask = attention_mask.tensor()
        elif kind == "tiles":
            attention_mask = tiles_mask(attention_mask, key.shape[2], query.dtype)
        elif kind == "padding":
            attention_mask = padding_mask(attention_mask, query.dtype)
    result: tuple[Tensor, Tensor | None] = theirs(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _seen(mask: Any) -> Tensor:
    """``[B, S, G]``: which tiles or images text sees."""
    seen: Tensor = mask.images if isinstance(mask, SeenImages) else mask[:, 0]
    return seen


def _packed(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, H, D]
    longest = kwargs.get("max_length_q")
    longest = longest if isinstance(longest, int) else longest_of(starts)
    scale = kwargs.get("scaling")
    return packed_attention(q, k, v, starts, max_seqlen=longest, scale=scale)[None]


def _padded(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, scale: Any) -> Tensor:
    """Where all of a row is padding, its mask is the same everywhere: every key weighs as much."""
    made = packed_attention(q, k, v, padding=padding, scale=scale)
    if _on_host(padding):
        return made  # `mask_of_padding` has looked
    nothing = padding.all(1)[:, None, None, None]
    return torch.where(nothing, v.mean(1, keepdim=True), made)


def is_causal(module: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """As `sdpa_attention_forward` takes it where there is no mask."""
    given = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return query.shape[2] > 1 and bool(causal)


def _is_differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _starts(starts: Tensor) -> bool:
    return starts.dim() == 1 and starts.dtype in (torch.int32, torch.int64)


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast casts what its products are given, torch's fused attention among them."""
    device = query.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (query.dtype, key.dtype):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _servable(
    query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], shared: bool = False
) -> bool:
    """Whether the op gives what the model's own attention gives for these, without a mask.

    shared: queries of batch 1 serve all samples.
    """
    dim = query.shape[-1]
    if not query.dtype == key.dtype == value.dtype or key.shape != value.shape:
        return False
    if dim % 8 or not 0 < dim <= MAX_DIM or dim != key.shape[-1]:
        return False
    if (
        key.shape[1] == 0
        or query.shape[1] % key.shape[1]
        or not (key.shape[0] == query.shape[0] or (shared and query.shape[0] == 1))
    ):
        return False
    if kwargs.get("dropout") or any(kwargs.get(name) is not None for name in OTHER_MATHS):
        return False
    return plain.runs("packed_attention", (query, key, value))


def weights_wanted(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether anybody may look at the attention weights that eager code returns."""
    if kwargs.get("output_attentions"):
        return True
    return any(_looks_at_weights(hook) for hook in module._forward_hooks.values())


def _looks_at_weights(hook: Any) -> bool:
    """A hook of the user, or one by which transformers collects weights now."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return True
    collected = hook.__globals__["_active_collector"].get()
    return collected is not None and any("hidden_states" not in name for name in collected)


# Masks. Mllama's and Pixtral's towers make them for all their layers.


def mask_of_images(theirs: Any) -> Callable[..., Tensor]:
    """In place of ``generate_block_attention_mask``: where images begin, ``[images + 1]``."""

    def generate_block_attention_mask(patch_embeds_list: Any, tensor: Tensor) -> Tensor:
        lengths = list(patch_embeds_list)
        if tensor.shape[0] != 1 or sum(lengths) != tensor.shape[1]:
            mask: Tensor = theirs(patch_embeds_list, tensor)
            return mask
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        starts = ends.to(tensor.device, non_blocking=True)
        if lengths and not torch.compiler.is_compiling():
            know_longest(starts, max(lengths))
        return starts

    return generate_block_attention_mask


def mask_of_padding(theirs: Any) -> Callable[..., Tensor]:
    """In place of Mllama's ``_prepare_aspect_ratio_attention_mask``: its padding, ``[B, S]``."""

    def _prepare_aspect_ratio_attention_mask(
        aspect_ratio_mask: Tensor, num_patches: int, target_length: int, dtype: torch.dtype
    ) -> Tensor:
        unusual = _on_host(aspect_ratio_mask) and not _is_ordinary(aspect_ratio_mask)
        if num_patches >= target_length or unusual:
            mask: Tensor = theirs(
                aspect_ratio_mask=aspect_ratio_mask,
                num_patches=num_patches,
                target_length=target_length,
                dtype=dtype,
            )
            return mask
        rows, tiles = aspect_ratio_mask.shape
        behind = torch.arange(target_length, device=aspect_ratio_mask.device) >= num_patches
        padding = (aspect_ratio_mask == 0)[:, :, None] | behind
        return padding.view(rows, tiles * target_length)

    return _prepare_aspect_ratio_attention_mask


def mask_of_tiles(theirs: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place of Mllama's ``_prepare_cross_attention_mask``: the tiles that each token sees.

    ``[B, 1, S, images * tiles]`` bool, which its callers may slice as they do the mask. Tokens that
    see no tile attend to all of them there, and a second result stops what comes of that.
    """

    def _prepare_cross_attention_mask(
        cross_attention_mask: Tensor, num_vision_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        seen = ((1.0 - cross_attention_mask).to(dtype) == 0).flatten(2)[:, None]
        some = seen.any(-1, keepdim=True)
        return seen | ~some, some.to(dtype)

    return _prepare_cross_attention_mask


def tiles_mask(seen: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """The mask that stands for seen tiles ``[B, 1, S, G]`` of so many keys."""
    hidden = ~seen.repeat_interleave(keys // seen.shape[3], -1)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _on_host(tensor: Tensor) -> bool:
    """Whether values may be looked at."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_ordinary(tiles: Tensor) -> bool:
    """Whether all are 0 or 1, and every row has some."""
    used = tiles != 0
    return bool((used == tiles).all() & used.any(1).all())


def padding_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that stands for padding ``[B, S]``."""
    hidden = padding[:, None, :, None] & padding[:, None, None, :]
    return hidden.to(dtype) * torch.finfo(dtype).min
