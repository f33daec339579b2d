"""Shapes of real models, from their published configs: what ``vlmops bench --model`` measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Text:
    """A language model; q is ``[B, heads, S, head_dim]``, k has ``kv_heads``."""

    hidden: int
    heads: int
    kv_heads: int
    layers: int
    mrope_section: tuple[int, ...]
    """Frequencies of each position axis."""
    interleaved: bool = False
    """Whether neighbouring frequencies belong to different axes."""
    rotation: Literal["half", "pairs"] = "half"
    norm: bool = False
    """Whether q and k are RMS-normalised per head before they are rotated."""
    head_dim: int = 128


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower; q and k are ``[N, heads, head_dim]``."""

    heads: int
    head_dim: int
    layers: int
    patch: int
    """Pixels on a side."""
    merge: int = 2
    """Patches on a side that become one token of text."""
    fused: bool = True
    """Whether q and k are slices of one ``[N, 3, heads, head_dim]``."""

    def patches(self, height: int, width: int) -> int:
        """N of a picture, in pixels, cut to whole tokens."""
        block = self.patch * self.merge
        return height // block * (width // block) * self.merge**2


@dataclasses.dataclass(frozen=True)
class Model:
    """The parts of a vision-language model."""

    text: Text
    tower: Tower


TOKENS = (1, 256, 1024, 4096, 16384)
"""S, where nothing else is asked for; 1 is a decoding step."""

PICTURES = ((448, 448), (1344, 1008))
"""Height and width of a thumbnail and of a page or photograph."""

_QWEN2 = Tower(heads=16, head_dim=80, layers=32, patch=14)
_CHUNKED = (16, 24, 24)
_INTERLEAVED = (24, 20, 20)

MODELS: Mapping[str, Model] = {
    "qwen2_vl-2b": Model(Text(1536, 12, 2, 28, _CHUNKED), _QWEN2),
    "qwen2_vl-7b": Model(Text(3584, 28, 4, 28, _CHUNKED), _QWEN2),
    "qwen2_vl-72b": Model(Text(8192, 64, 8, 80, _CHUNKED), _QWEN2),
    "qwen2_5_vl-3b": Model(Text(2048, 16, 2, 36, _CHUNKED), _QWEN2),
    "qwen2_5_vl-7b": Model(Text(3584, 28, 4, 28, _CHUNKED), _QWEN2),
    "qwen3_vl-4b": Model(
        Text(2560, 32, 8, 36, _INTERLEAVED, interleaved=True, norm=True), Tower(16, 64, 24, 16)
    ),
    "qwen3_vl-8b": Model(
        Text(4096, 32, 8, 36, _INTERLEAVED, interleaved=True, norm=True), Tower(16, 72, 27, 16)
    ),
    "qwen3_vl-30b-a3b": Model(
        Text(2048, 32, 4, 48, _INTERLEAVED, interleaved=True, norm=True), Tower(16, 72, 27, 16)
    ),
    "glm4v-9b": Model(Text(4096, 32, 2, 40, (8, 12, 12), rotation="pairs"), Tower(12, 128, 24, 14)),
}
