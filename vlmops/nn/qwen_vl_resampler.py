"""The connector of the first Qwen-VL: queries on a grid that look at a tower's tokens once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.nn.parts import (
    product,
    require,
    require_heads,
    require_lengths,
    require_mask,
)
from vlmops.ops.linear import linear
from vlmops.ops.qformer_attention import qformer_attention


def _sine_positions(side: int, size: int) -> Tensor:
    """``[side * side, size]``: of the column, then of the row, sines, then cosines of each."""
    frequencies = 10000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    of_side = torch.cat((angles.sin(), angles.cos()), 1)
    columns, rows = of_side.expand(side, -1, -1), of_side[:, None].expand(-1, side, -1)
    return torch.cat((columns, rows), -1).flatten(0, 1).float()


class _Attention(nn.Module):
    """The parameters of ``torch.nn.MultiheadAttention``."""

    def __init__(self, size: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size, **made))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size, **made))
        self.out_proj = nn.Linear(size, size, **made)
        for weight in (self.in_proj_weight, self.out_proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.out_proj.bias)


class QwenVLResampler(nn.Module):
    """Qwen-VL's position-aware adapter: one cross-attention of G x G learned queries.

    Of visual tokens x and the embeddings of places p_q of queries and p_k of tokens, fixed sines
    and cosines on a grid::

        x = ln_kv(kv_proj(x))
        attention(W_q (ln_q(query) + p_q), W_k (x + p_k), W_v x)

    and an output projection; biases belong to all of W. Queries are the same for all images: they
    are projected once, and not expanded.

    Parameters have the names of Qwen-VL's published checkpoints, where they stand behind
    ``transformer.visual.attn_pool.``::

        prefix = "transformer.visual.attn_pool."
        mine = {name: checkpoint[prefix + name] for name in module.state_dict()}
        module.load_state_dict(mine)

    ``ln_post``, a LayerNorm with eps 1e-6, and ``proj`` ``[C, C]`` follow there, behind
    ``transformer.visual.``: ``ln_post(resampled) @ proj``.

    Args:
        visual_size: C_v, of visual tokens; 1664.
        hidden_size: C; num_heads times a multiple of 8 up to 256; 4096.
        grid_size: G: queries on a side; 16.
        num_heads: H. None: C / 128.
        eps: Of both norms.
        device, dtype: Of the parameters.

    Keys of its ``state_dict``:
        query: ``[G G, C]``, row by row.
        pos_embed: ``[G G, C]``, a parameter that does not learn.
        kv_proj.weight: ``[C, C_v]``, unless C_v is C.
        attn.in_proj_weight, attn.in_proj_bias: ``[3 C, C]``, ``[3 C]``: q, k and v.
        attn.out_proj: Linear ``[C, C]``, weight and bias.
        ln_q, ln_kv: LayerNorm ``[C]``.

    Source: Bai et al., Qwen-VL (arXiv 2308.12966), section 2.1.

    Example:
        >>> import torch, vlmops.nn
        >>> resampler = vlmops.nn.QwenVLResampler(1664, 1024)
        >>> resampler(torch.randn(1, 1024, 1664)).shape  # 32 x 32 tokens
        torch.Size([1, 256, 1024])
    """

    def __init__(
        self,
        visual_size: int = 1664,
        hidden_size: int = 4096,
        *,
        grid_size: int = 16,
        num_heads: int | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = max(hidden_size // 128, 1) if num_heads is None else num_heads
        require_heads("QwenVLResampler", hidden_size, heads)
        self.visual_size, self.num_heads, self.grid_size = visual_size, heads, grid_size
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        positions = _sine_positions(grid_size, hidden_size).to(device, dtype)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.query = nn.Parameter(torch.empty(grid_size * grid_size, hidden_size, **made))
        nn.init.trunc_normal_(self.query, std=0.02)
        if visual_size != hidden_size:
            self.kv_proj = nn.Linear(visual_size, hidden_size, bias=False, **made)
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)
        self.attn = _Attention(hidden_size, made)
        self.ln_q = nn.LayerNorm(hidden_size, eps, **made)
        self.ln_kv = nn.LayerNorm(hidden_size, eps, **made)

    def forward(
        self,
        visual_states: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        visual_mask: Tensor | None = None,
        visual_lengths: Tensor | None = None,
    ) -> Tensor:
        """Image tokens.

        Args:
            visual_states: ``[B, S, C_v]``, row by row.
            grid: Rows and columns of these tokens. None: a square. ``pos_embed`` is interpolated to
                them (bicubic, without antialiasing) unless they are G x G.
            visual_mask: ``[B, S]`` bool: which tokens exist. Where none does, attention gives zeros
                and the result is the bias of ``out_proj``.
            visual_lengths: ``[B]`` int32 or int64: how many tokens exist.

        Returns:
            ``[B, G G, C]``.

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected, what
                came.
            RuntimeError: as `vlmops.qformer_attention`.
        """
        require(
            "QwenVLResampler", "visual_states", visual_states, ("B", "S", self.visual_size),
            self.query,
        )  # fmt: skip
        batch, count = visual_states.shape[:2]
        if grid is None:
            grid = (math.isqrt(count), math.isqrt(count))
        if count == 0 or grid[0] * grid[1] != count:
            raise ValueError(
                "vlmops.nn.QwenVLResampler: grid: expected rows and columns of the tokens of "
                f"visual_states, {count}, got {grid[0]} x {grid[1]}"
            )
        require_mask("QwenVLResampler", "visual_mask", visual_mask, (batch, count))
        require_lengths("QwenVLResampler", "visual_lengths", visual_lengths, (batch,))
        x = self.ln_kv(self._projected(visual_states))
        q = self.ln_q(self.query) + self.pos_embed
        parts = zip(
            (q[None], x + self._positions(grid), x),
            self.attn.in_proj_weight.chunk(3),
            self.attn.in_proj_bias.chunk(3),
            strict=True,
        )
        heads = (self.num_heads, -1)
        q, k, v = (linear(part, w, b).unflatten(-1, heads) for part, w, b in parts)
        out = qformer_attention(q, k, v, visual_mask, key_lengths=visual_lengths)
        return product(self.attn.out_proj, out.flatten(2))

    def _projected(self, x: Tensor) -> Tensor:
        return x if self.visual_size == self.query.shape[1] else product(self.kv_proj, x)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """``pos_embed`` on another grid, ``[rows * columns, C]``."""
        side = self.grid_size
        if grid == (side, side):
            return self.pos_embed
        of_channels = self.pos_embed.t().unflatten(1, (side, side))[None].float()
        placed = functional.interpolate(of_channels, grid, mode="bicubic")
        return placed[0].flatten(1).t().to(self.pos_embed.dtype)

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}"
