"""Decoders that make the mask of images themselves, in the middle of their forward (Idefics')."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmops.hf.kept import step_of
from vlmops.hf.rebind import innermost, original_class
from vlmops.hf.seen import SeenImages

_MASK, _GATE = "image_attention_mask", "cross_attention_gate"


def expands_images(forward: Any) -> bool:
    """Whether a forward is given a mask of images, and makes of it one of tokens and a gate."""
    code = forward.__code__
    return (
        _MASK in inspect.signature(forward).parameters
        and _GATE in code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    )


def carrying(inner: Any) -> Callable[..., Any]:
    """A decoder's forward, given `SeenImages` for the mask of images."""
    signature = inspect.signature(inner)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return inner(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        mask = given.get(_MASK)
        if type(mask) is Tensor and mask.dim() == 3:
            seen = SeenImages(mask.bool())
            at = names.index(_MASK)
            if at < len(args):
                args = (*args[:at], seen, *args[at + 1 :])
            else:
                kwargs[_MASK] = seen
        with step_of(given.get("past_key_values")):
            return inner(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


_SEEN = torch.tensor([[[0, 0], [1, 0], [1, 1], [0, 1]]])  # [B, S, images]
_TOKENS = 3  # of an image


class _Layer:
    """Stands for a gated layer: keeps what it is given."""

    given: dict[str, Any]

    def __call__(self, hidden_states: Tensor, *_: Any, **given: Any) -> Tensor:
        self.given = given
        return hidden_states


def difference(decoder: Any) -> str | None:
    """Why a decoder's forward makes something else of `SeenImages` than of the mask."""
    name = type(decoder).__name__
    forward = innermost((original_class(decoder) or type(decoder)).forward)
    config, results = decoder.config, []
    features = torch.zeros(1, _SEEN.shape[2], _TOKENS, 4)
    which = "perceiver_embeddings" if config.use_resampler else "image_encoder_embeddings"
    for mask in (_SEEN, SeenImages(_SEEN.bool())):
        layer = _Layer()
        stand_in = types.SimpleNamespace(
            config=config,
            dtype=torch.float32,
            layers=[lambda hidden_states, **_: hidden_states],
            gated_cross_attn_layers=[layer],
            cross_layer_interval=1,
            norm=lambda hidden_states: hidden_states,
        )
        given = {"inputs_embeds": torch.zeros(1, _SEEN.shape[1], 4), which: features, _MASK: mask}
        try:
            forward(stand_in, **given)
            results.append([layer.given[_MASK], layer.given[_GATE]])
        except Exception as error:  # foreign code, asked with what it was not written for
            return f"{name} cannot be rehearsed: its forward raised {error!r}"
    (mask, gate), (seen, our_gate) = results
    with contextlib.suppress(RuntimeError):  # shapes that do not broadcast differ
        if isinstance(seen, SeenImages) and bool(
            (seen.tensor() == mask).all() and (gate == our_gate).all()
        ):
            return None
    return f"the numeric check failed: {name} makes another mask of the images that are seen"
