"""The image embedding of Phi-3-vision and Phi-3.5-vision behind its tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.ops.hd_transform import Order, Pairs, hd_transform


class HDTransform(nn.Module):
    """HD transform and projector: features of a picture's crops in, the decoder's tokens out.

    Each 2 x 2 block of features becomes one token of 4 C channels, crops lie where they do in the
    picture, rows end in ``sub_GN``, and ``glb_GN`` separates the picture from its whole view
    (`vlmops.hd_transform`). A linear layer, a GELU and a linear layer follow.

    Parameters have the names of the published checkpoints, where they stand behind
    ``model.vision_embed_tokens.`` next to the tower's (``img_processor``)::

        prefix = "model.vision_embed_tokens."
        mine = {name: checkpoint[prefix + name] for name in module.state_dict()}
        module.load_state_dict(mine)

    Args:
        image_dim_out: C, channels of the tower; 1024 for CLIP-L.
        hidden_size: D, of the decoder; 3072.
        order: ``"sub_glb"``, as both models have it: the crops before the whole view; or
            ``"glb_sub"``.
        skip_prefix: Features before each crop's grid that are left out: 1 for what CLIP returns, 0
            where its class token is gone already.
        crop_size: Pixels on a side of a crop, for ``image_sizes``.
        bias: Of both linear layers.
        device, dtype: Of the parameters.

    Attributes:
        glb_GN: ``[1, 1, 4 C]``.
        sub_GN: ``[1, 1, 1, 4 C]``.
        img_projection: Linear 4 C to D, GELU (erf), Linear D to D.

    Source: Abdin et al., Phi-3 (arXiv 2404.14219); Dong et al., InternLM-XComposer2-4KHD (arXiv
    2404.06512).

    Example:
        >>> import torch, vlmops.nn
        >>> embed = vlmops.nn.HDTransform(1024, 3072, skip_prefix=1)
        >>> features = torch.randn(2, 7, 577, 1024)  # 2 pictures; the second has padding
        >>> embed(features, [(672, 1008), (672, 672)]).shape
        torch.Size([1802, 3072])
    """

    def __init__(
        self,
        image_dim_out: int = 1024,
        hidden_size: int = 3072,
        *,
        order: Order = "sub_glb",
        skip_prefix: int = 0,
        crop_size: int = 336,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.order, self.skip_prefix, self.crop_size = order, skip_prefix, crop_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        depth = 4 * image_dim_out
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, depth, **made))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, depth, **made))
        self.img_projection = nn.Sequential(
            nn.Linear(depth, hidden_size, bias=bias, **made),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, bias=bias, **made),
        )

    def forward(
        self,
        image_features: Tensor,
        image_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        *,
        crop_grids: Pairs | None = None,
    ) -> Tensor:
        """Tokens of all pictures, packed.

        Args:
            image_features: ``[B, crops, N, C]``, each picture's whole view before its crops, those
                beyond a picture's own not read; or ``[sum of 1 + h * w, N, C]``.
            image_sizes: Height and width ``[B, 2]`` in pixels of each picture, as padded to whole
                crops. A list, or a tensor: on a GPU that is read back to the host.
            crop_grids: Rows and columns of each picture's crops, instead of image_sizes.

        Returns:
            ``[sum of tokens, D]``; `vlmops.hd_token_counts` says how many are whose.

        Raises:
            ValueError: both or neither of image_sizes and crop_grids are given, or a size is no
                multiple of crop_size.
            RuntimeError, TypeError: as `vlmops.hd_transform`.
        """
        if (image_sizes is None) == (crop_grids is None):
            raise ValueError(
                "vlmops.nn.HDTransform: expected either image_sizes or crop_grids, got "
                f"{'neither' if image_sizes is None else 'both'}"
            )
        if crop_grids is None:
            crop_grids = self._grids(image_sizes)
        tokens = hd_transform(
            image_features,
            crop_grids,
            self.sub_GN,
            self.glb_GN,
            order=self.order,
            skip_prefix=self.skip_prefix,
        )
        result: Tensor = self.img_projection(tokens)
        return result

    def _grids(self, image_sizes: Any) -> list[tuple[int, int]]:
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        side = self.crop_size
        if any(h % side or w % side for h, w in sizes):
            raise ValueError(
                "vlmops.nn.HDTransform: image_sizes: expected heights and widths of whole crops of "
                f"{side} pixels, as padded pictures have, got {sizes}"
            )
        return [(h // side, w // side) for h, w in sizes]

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return f"order={self.order!r}, skip_prefix={self.skip_prefix}, crop_size={self.crop_size}"
