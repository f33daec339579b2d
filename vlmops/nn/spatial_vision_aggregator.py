"""Cambrian-1's connector: queries that look at several encoders' features where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.nn.parts import require_heads
from vlmops.ops.spatial_aggregate import Masks, spatial_aggregate


def existing_tokens(
    image_sizes: Sequence[tuple[int, int]],
    map_size: tuple[int, int],
    grid: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens of a map are the picture's, and not of what made it square.

    As Cambrian-1's published code has it, windows of padding alone exist as a whole, so that no
    query is without tokens; what becomes of such queries is cut off before the language model.

    Args:
        image_sizes: Height and width in pixels of each picture, before padding.
        map_size: Rows and columns of tokens ``(h, w)``.
        grid: Rows and columns of queries, which divide them.
        device: Of the result.

    Returns:
        ``[B, h, w]`` bool, a mask for `vlmops.spatial_aggregate`.

    Raises:
        ValueError: grid does not divide map_size.

    Example:
        >>> import vlmops.nn
        >>> mask = vlmops.nn.existing_tokens([(200, 400)], (8, 8), (2, 2))  # twice as wide as high
        >>> mask[0, :, 0].int().tolist()
        [0, 0, 1, 1, 1, 1, 0, 0]
    """
    rows, columns = map_size
    if rows % grid[0] or columns % grid[1]:
        raise ValueError(
            "vlmops.nn.existing_tokens: map_size: expected multiples of the grid "
            f"{grid[0]} x {grid[1]}, got {rows} x {columns}"
        )
    edges = []
    for height, width in image_sizes:
        if width / height > columns / rows:  # bars above and below
            edges.append(((rows - int(height * (columns / width))) // 2, 0))
        else:
            edges.append((0, (columns - int(width * (rows / height))) // 2))
    top, left = torch.tensor(edges, device=device).view(-1, 2, 1).unbind(1)  # [B, 1]
    y, x = (torch.arange(n, device=device) for n in map_size)
    in_rows, in_columns = (y >= top) & (y < rows - top), (x >= left) & (x < columns - left)
    mask = in_rows[:, :, None] & in_columns[:, None]
    windows = mask.view(len(mask), grid[0], rows // grid[0], grid[1], columns // grid[1])
    return (windows | ~windows.any((2, 4), keepdim=True)).view(mask.shape)


class _CrossAttention(nn.Module):
    """Projections of q, and of each encoder's k and v, behind a norm each."""

    def __init__(self, size: int, encoders: int, eps: float, made: dict[str, Any]) -> None:
        super().__init__()

        def projection() -> nn.Sequential:
            return nn.Sequential(
                nn.LayerNorm(size, eps, **made), nn.Linear(size, size, bias=False, **made)
            )

        self.q_proj = projection()
        for i in range(encoders):
            setattr(self, f"k_proj_{i}", projection())
            setattr(self, f"v_proj_{i}", projection())
        self.o_proj = nn.Linear(size, size, bias=False, **made)


class _Layer(nn.Module):
    """One cross-attention and what surrounds it."""

    def __init__(
        self,
        query_size: int,
        context_size: int,
        size: int,
        windows: Sequence[int],
        eps: float,
        made: dict[str, Any],
    ) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, **made)

        self.proj_context = linear(context_size, size)
        self.proj_in = linear(query_size + size, size)
        self.proj_out = nn.ModuleDict(
            {"linear_1": linear(size, size), "linear_2": linear(size, query_size)}
        )
        self.norm = nn.LayerNorm(size, eps, **made)
        self.cross_attn = _CrossAttention(size, len(windows), eps, made)
        for i, m in enumerate(windows):
            if m > 1:
                setattr(self, f"pos_embed_{i}", nn.Parameter(torch.randn(m * m, size, **made)))


class VisionTokenSampler(nn.Module):
    """Layers in which queries on a grid look at their windows of several maps.

    For queries y, the context c of the whole picture and each encoder's tokens x_k of a query's
    window, a layer is::

        z = proj_in([y, proj_context(c)])
        a = attention(q_proj(norm(z)), k_proj_k(norm(x_k + pos_k)), v_proj_k(norm(x_k + pos_k)))
        y = y + linear_2(gelu(linear_1(norm(z + o_proj(a)))))

    with one softmax over all encoders' windows (`vlmops.spatial_aggregate`); each norm has its own
    weights. Cambrian-1 has three such layers in front of its language model (in
    `SpatialVisionAggregator`), and single ones within it, whose queries are its image tokens.

    Args:
        query_size: C_q, channels of queries.
        context_size: C_c, of the context.
        hidden_size: C, of maps and attention; num_heads times a multiple of 8 up to 256.
        window_sizes: m_k: tokens on a side of a window, for each of 1 to 8 encoders.
        depth: Layers.
        num_heads: H.
        eps: Of all norms.
        device, dtype: Of the parameters.

    Keys of its ``state_dict``, those of the published checkpoints, each behind
    ``layers.{layer}.``; no linear layer has a bias:
        proj_context.weight: ``[C, C_c]``.
        proj_in.weight: ``[C, C_q + C]``.
        cross_attn.q_proj.{0,1}: LayerNorm ``[C]``, weight and bias; Linear ``[C, C]``, weight.
        cross_attn.k_proj_{k}.{0,1}, cross_attn.v_proj_{k}.{0,1}: the same for each encoder.
        cross_attn.o_proj.weight: ``[C, C]``.
        pos_embed_{k}: ``[m_k * m_k, C]``, where m_k > 1.
        norm: LayerNorm ``[C]``.
        proj_out.linear_1.weight, proj_out.linear_2.weight: ``[C, C]``, ``[C_q, C]``.

    Source: Tong et al., Cambrian-1 (arXiv 2406.16860), section 4.

    Example:
        >>> import torch, vlmops.nn
        >>> sampler = vlmops.nn.VisionTokenSampler(4096, 1024, 1024, (1, 4), depth=1)
        >>> maps = [torch.randn(1, 24, 24, 1024), torch.randn(1, 96, 96, 1024)]
        >>> text = torch.randn(1, 24, 24, 4096)  # hidden states of image tokens
        >>> sampler(text, maps[0].mean((1, 2)), maps).shape
        torch.Size([1, 24, 24, 4096])
    """

    def __init__(
        self,
        query_size: int,
        context_size: int,
        hidden_size: int,
        window_sizes: Sequence[int],
        *,
        depth: int = 3,
        num_heads: int = 16,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_heads("VisionTokenSampler", hidden_size, num_heads)
        self.num_heads, self.window_sizes = num_heads, tuple(window_sizes)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = query_size, context_size, hidden_size, self.window_sizes
        self.layers = nn.ModuleList(_Layer(*sizes, eps, made) for _ in range(depth))

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        maps: Sequence[Tensor],
        masks: Masks | None = None,
    ) -> Tensor:
        """What queries have become.

        Args:
            queries: ``[B, G_h, G_w, C_q]``, or one for a whole grid, ``[B, 1, 1, C_q]``, which is
                projected once.
            context: ``[B, C_c]``.
            maps: Of each encoder ``[B, G_h * m_k, G_w * m_k, C]``.
            masks: Of each encoder, ``[B, G_h * m_k, G_w * m_k]`` bool or None: which tokens exist.

        Returns:
            ``[B, G_h, G_w, C_q]``.

        Raises:
            RuntimeError: shapes do not fit; see `vlmops.spatial_aggregate`.
        """
        for layer in self.layers:
            queries = self._layer(layer, queries, context, maps, masks)
        return queries

    def _layer(
        self,
        layer: Any,
        queries: Tensor,
        context: Tensor,
        maps: Sequence[Tensor],
        masks: Masks | None,
    ) -> Tensor:
        of_queries, of_context = layer.proj_in.weight.split(
            (queries.shape[-1], layer.proj_context.weight.shape[0]), 1
        )
        # The context is one for all queries: it is not put beside each of them.
        shared = functional.linear(layer.proj_context(context), of_context)[:, None, None]
        z = functional.linear(queries, of_queries) + shared
        attention = layer.cross_attn
        q = self._heads(attention.q_proj(z))
        keys, values = [], []
        for i, (x, m) in enumerate(zip(maps, self.window_sizes, strict=True)):
            placed = x if m == 1 else _placed(x, getattr(layer, f"pos_embed_{i}"), m)
            keys.append(self._heads(getattr(attention, f"k_proj_{i}")(placed)))
            values.append(self._heads(getattr(attention, f"v_proj_{i}")(placed)))
        grid = [n // self.window_sizes[0] for n in maps[0].shape[1:3]]
        q = q.expand(-1, *grid, -1, -1)
        out = spatial_aggregate(q, keys, values, masks=masks)
        hidden = layer.norm(z + attention.o_proj(out.flatten(3)))
        hidden = functional.gelu(layer.proj_out["linear_1"](hidden))
        result: Tensor = queries + layer.proj_out["linear_2"](hidden)
        return result

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the layers."""
        return f"num_heads={self.num_heads}, window_sizes={self.window_sizes}"


def _placed(x: Tensor, embedding: Tensor, m: int) -> Tensor:
    """Tokens with the embeddings of their places in windows; no window is copied."""
    windows: Tensor = x.unflatten(2, (-1, m)).unflatten(1, (-1, m))  # [B, G_h, m, G_w, m, C]
    return (windows + embedding.to(x.dtype).view(m, 1, m, -1)).flatten(3, 4).flatten(1, 2)


class SpatialVisionAggregator(nn.Module):
    """Features of several vision encoders in, the language model's image tokens out.

    Each encoder's features are projected to C channels. Each group of queries, one learned vector
    on a grid of its own, looks at them in `VisionTokenSampler`'s layers, with the mean of the first
    encoder's features for context. Groups are brought to the first one's grid, put side by side and
    projected.

    Parameters have the names of Cambrian-1's published checkpoints, where they stand behind
    ``model.``::

        mine = {name: checkpoint["model." + name] for name in module.state_dict()}
        module.load_state_dict(mine)

    Args:
        vision_sizes: Channels of each encoder's features.
        map_sides: Tokens on a side of each encoder's square map; multiples of all grids.
        hidden_size: D, of the language model.
        vision_hidden_size: C; num_heads times a multiple of 8 up to 256.
        grids: Queries on a side, for each group; the first is the result's.
        depth: Layers of each group.
        num_heads: H.
        eps: Of all norms.
        device, dtype: Of the parameters.

    Keys of its ``state_dict``:
        vision_query: ``[groups, C]``.
        mm_projector_aux_{k}: of each encoder: 0 Linear to C, 2 Linear ``[C, C]``, with biases and a
            GELU between them, 3 LayerNorm ``[C]``.
        vision_sampler_{group}: `VisionTokenSampler`.
        mm_projector: 0 Linear ``[D, groups * C]``, 2 Linear ``[D, D]``, a GELU between them.

    Source: Tong et al., Cambrian-1 (arXiv 2406.16860), section 4.

    Example:
        >>> import torch, vlmops.nn
        >>> connector = vlmops.nn.SpatialVisionAggregator((1152, 3072), (24, 96), 4096)
        >>> features = [torch.randn(1, 576, 1152), torch.randn(1, 9216, 3072)]
        >>> connector(features, image_sizes=[(600, 800)]).shape
        torch.Size([1, 576, 4096])
    """

    def __init__(
        self,
        vision_sizes: Sequence[int],
        map_sides: Sequence[int],
        hidden_size: int,
        *,
        vision_hidden_size: int = 1024,
        grids: Sequence[int] = (24,),
        depth: int = 3,
        num_heads: int = 16,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(vision_sizes) != len(map_sides):
            raise ValueError(
                "vlmops.nn.SpatialVisionAggregator: map_sides: expected one for each of the "
                f"{len(vision_sizes)} encoders of vision_sizes, got {len(map_sides)}"
            )
        if any(side % grid for side in map_sides for grid in grids):
            raise ValueError(
                "vlmops.nn.SpatialVisionAggregator: map_sides: expected multiples of all grids "
                f"{list(grids)}, got {list(map_sides)}"
            )
        self.grids, self.map_sides = tuple(grids), tuple(map_sides)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        size = vision_hidden_size
        self.vision_query = nn.Parameter(torch.randn(len(grids), size, **made) * hidden_size**-0.5)

        def mlp(inputs: int, outputs: int) -> list[nn.Module]:
            first, second = nn.Linear(inputs, outputs, **made), nn.Linear(outputs, outputs, **made)
            return [first, nn.GELU(), second]

        for k, channels in enumerate(vision_sizes):
            norm = nn.LayerNorm(size, eps, **made)
            setattr(self, f"mm_projector_aux_{k}", nn.Sequential(*mlp(channels, size), norm))
        for i, grid in enumerate(grids):
            windows = [side // grid for side in map_sides]
            sampler = VisionTokenSampler(
                size, size, size, windows, depth=depth, num_heads=num_heads, eps=eps, **made
            )
            setattr(self, f"vision_sampler_{i}", sampler)
        self.mm_projector = nn.Sequential(*mlp(len(grids) * size, hidden_size))

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Projected features, which layers within the language model look at too.

        Args:
            features: Of each encoder ``[B, side * side, channels]``, row by row.

        Returns:
            Of each encoder ``[B, side, side, C]``.
        """
        return [
            getattr(self, f"mm_projector_aux_{k}")(x).unflatten(1, (side, side))
            for k, (x, side) in enumerate(zip(features, self.map_sides, strict=True))
        ]

    def forward(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Image tokens.

        Args:
            features: Of each encoder ``[B, side * side, channels]``, row by row.
            image_sizes: Height and width in pixels of each picture, on the host, before it was
                padded to a square: tokens of padding are not looked at (`existing_tokens`). None:
                there is no padding.

        Returns:
            ``[B, G * G, D]``, G of the first group; those of padding are among them.

        Raises:
            RuntimeError: shapes do not fit; see `vlmops.spatial_aggregate`.
            ValueError: there are not as many features as encoders.
        """
        maps = self.maps(features)
        context = maps[0].mean((1, 2))
        groups = []
        for i, grid in enumerate(self.grids):
            masks: Masks | None = None
            if image_sizes is not None:
                masks = [
                    existing_tokens(image_sizes, (side, side), (grid, grid), context.device)
                    for side in self.map_sides
                ]
            queries = self.vision_query[i].expand(len(context), 1, 1, -1)
            groups.append(getattr(self, f"vision_sampler_{i}")(queries, context, maps, masks))
        tokens = torch.cat([_resized(x, self.grids[0]) for x in groups], -1)
        result: Tensor = self.mm_projector(tokens.flatten(1, 2))
        return result

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return f"grids={self.grids}, map_sides={self.map_sides}"


def _resized(x: Tensor, side: int) -> Tensor:
    """A grid ``[B, G, G, C]`` brought to another one."""
    if x.shape[1] == side:
        return x
    of_channels = x.permute(0, 3, 1, 2).float()
    resized = functional.interpolate(of_channels, (side, side), mode="bilinear")
    return resized.permute(0, 2, 3, 1).to(x.dtype)
