"""Families: what is expected where, so that a site that rots is noticed.

Nothing is patched because it stands here; sites find their places by structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Expected:
    """One place that a family's models have."""

    op: str
    path: str
    """As in ``model.named_modules()`` of the ``...ForConditionalGeneration``."""
    sites: Callable[[Any], int]
    """Number of calls in one forward pass, from the model's config; 0 for models without it."""


def text(path: str = "model.language_model") -> Expected:
    """A language model that rotates in every layer."""
    return Expected("mrope", path, lambda config: int(config.get_text_config().num_hidden_layers))


def tower(path: str, layers: str = "num_hidden_layers") -> Expected:
    """A vision tower that rotates in every layer; layers: what its config calls their number."""
    return Expected("mrope", path, lambda config: int(getattr(config.vision_config, layers)))


def attention(path: str, *model_types: str, layers: str = "num_hidden_layers") -> Expected:
    """The attention modules of a vision tower.

    Args:
        path: With a * for the number of a layer.
        model_types: Of the tower; any if none is named.
        layers: What its config calls their number.
    """

    def sites(config: Any) -> int:
        vision = config.vision_config
        known = not model_types or vision.model_type in model_types
        return int(getattr(vision, layers)) if known else 0

    return Expected("packed_attention", path, sites)


def patches(path: str, sites: Callable[[Any], int] = lambda _: 1) -> Expected:
    """What makes tokens of pixels, once a forward; sites: 0 for configs that have it elsewhere."""
    return Expected("patch_embed", path, sites)


def shuffle(path: str, sites: Callable[[Any], int] = lambda _: 1) -> Expected:
    """What merges blocks of tokens, once a forward; sites: 0 for configs that do without."""
    return Expected("pixel_shuffle", path, sites)


def projector(path: str, sites: Callable[[Any], int] = lambda _: 1) -> Expected:
    """What takes features of images to the width of the text model."""
    return Expected("mlp_projector", path, sites)


def expected_places(model_type: str) -> tuple[Expected, ...]:
    """What is expected in a model of this ``config.model_type``; empty for unknown families."""
    return next((family[model_type] for family in families() if model_type in family), ())


def families() -> tuple[Mapping[str, tuple[Expected, ...]], ...]:
    """What is expected, by model type, of each family."""
    from vlmops.hf.targets import (
        blip,
        cohere,
        gemma,
        glm,
        idefics,
        llama,
        llava,
        ovis,
        paddle,
        phi,
        qwen,
    )

    groups = (blip, cohere, gemma, glm, idefics, llama, llava, ovis, paddle, phi, qwen)
    return tuple(group.EXPECTED for group in groups)
