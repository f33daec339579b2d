"""Which images a text sees, where a forward expands that to a mask of their tokens.

Idefics' decoder repeats the mask of images for each of their tokens and makes floats of it, in the
middle of its forward. Given `SeenImages` in place of the tensor, the same lines make nothing: it
follows the steps that it knows and hands the mask of images to attention. Anything else that is
asked of it is asked of the tensor that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WHOLE = slice(None)


class SeenImages:
    """Stands for a mask ``[B, S, images * tokens_per_image]``, or ``[B, 1, S, ..]`` of floats.

    Attributes:
        images: ``[B, S, images]`` bool.
        tokens_per_image: 0 until the forward has said how many.
    """

    def __init__(self, images: Tensor, tokens_per_image: int = 0, dtype: Any = None) -> None:
        """``dtype``: of the floats, once the mask has been made of them; see `tensor`."""
        self.images, self.tokens_per_image, self.dtype = images, tokens_per_image, dtype

    @property
    def shape(self) -> torch.Size:
        """Of what it stands for; before it is expanded that of the mask of images."""
        rows, texts, images = self.images.shape
        if self.dtype is not None:
            return torch.Size((rows, 1, texts, images * self.tokens_per_image))
        return torch.Size((rows, texts, images * max(self.tokens_per_image, 1)))

    def __getitem__(self, index: Any) -> Any:
        if index == (..., None) and not self.tokens_per_image:
            return self
        if index == (_WHOLE, None, _WHOLE, _WHOLE) and self.tokens_per_image:
            return self
        return self.tensor()[index]

    def expand(self, *sizes: int) -> SeenImages:
        """``[B, S, images, 1]`` to as many as an image has tokens."""
        *others, tokens = sizes
        if others != [-1, -1, -1] or self.tokens_per_image:
            raise _UnknownError(f"expand{sizes}")
        return SeenImages(self.images, tokens)

    def reshape(self, *shape: int) -> SeenImages:
        """To ``[B, S, -1]``."""
        if shape != (*self.images.shape[:2], -1) or not self.tokens_per_image:
            raise _UnknownError(f"reshape{shape}")
        return self

    def bool(self) -> SeenImages:
        """As it is."""
        return self

    def __eq__(self, other: object) -> Any:
        if self.dtype is not None and other == 0.0:
            return _Seen(self)
        return self.tensor() == other

    __hash__ = None  # type: ignore[assignment]

    def tensor(self) -> Tensor:
        """The mask that it stands for."""
        mask = self.images
        if self.tokens_per_image:
            mask = mask.repeat_interleave(self.tokens_per_image, -1)
        if self.dtype is None:
            return mask
        hidden = ~mask[:, None]
        floats = torch.zeros_like(hidden, dtype=self.dtype)
        return floats.masked_fill(hidden, torch.finfo(self.dtype).min)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.where and len(args) == 3 and isinstance(args[0], cls) and not kwargs:
            mask, seen, hidden = args
            dtype = seen.dtype if isinstance(seen, Tensor) else None
            if mask.tokens_per_image and dtype is not None and hidden == torch.finfo(dtype).min:
                return cls(mask.images, mask.tokens_per_image, dtype)
        return func(*(_plain(a) for a in args), **{k: _plain(v) for k, v in kwargs.items()})


class _Seen:
    """``SeenImages == 0.0``: of which only it is asked whether a token sees any."""

    def __init__(self, mask: SeenImages) -> None:
        self._mask = mask

    def any(self, dim: int) -> Tensor:
        if dim != -1:
            raise _UnknownError(f"any(dim={dim})")
        return self._mask.images.any(-1)[:, None]


def _plain(value: Any) -> Any:
    return value.tensor() if isinstance(value, SeenImages) else value


class _UnknownError(Exception):
    """A step that is not followed here; found when the forward is rehearsed."""
