"""The Q-Former's layer, BLIP-2's connector: queries that look at visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmops.nn.parts import (
    normed_sum,
    product,
    require,
    require_activation,
    require_heads,
    require_lengths,
    require_mask,
)
from vlmops.ops.perceiver_attention import perceiver_attention
from vlmops.ops.qformer_attention import qformer_attention


def _output(inputs: int, outputs: int, eps: float, made: dict[str, Any]) -> nn.ModuleDict:
    norm = nn.LayerNorm(outputs, eps, **made)
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs, **made), "LayerNorm": norm})


def _attention(size: int, of_keys: int, eps: float, made: dict[str, Any]) -> nn.ModuleDict:
    inputs = {"query": size, "key": of_keys, "value": of_keys}
    projections = {name: nn.Linear(n, size, **made) for name, n in inputs.items()}
    return nn.ModuleDict(
        {"attention": nn.ModuleDict(projections), "output": _output(size, size, eps, made)}
    )


class QFormerLayer(nn.Module):
    """A layer of BLIP-2's and InstructBLIP's Q-Former.

    Of queries y, instruction tokens t and visual tokens x, with norms behind, as BERT has them::

        y, t = norm(dense(attention([y; t], [y; t])) + [y; t])
        y    = norm(dense(attention(y, x)) + y)                    with visual_size
        y    = norm(dense_2(activation(dense_1(y))) + y)
        t    = the same with weights of its own                    with text

    Queries and text stay two tensors: neither is split off or put beside the other. Queries may be
    one row for a whole batch, as they are learned: what is the same for all rows is then computed
    once. There is no dropout.

    Args:
        hidden_size: C, of queries and text; num_heads times a multiple of 8 up to 256.
        visual_size: C_v, of visual tokens; 1408 for BLIP-2's. None: without cross-attention, as
            every second layer is.
        num_heads: H.
        intermediate_size: Of the feed-forward layers. None: 4 C.
        text: Whether there is a feed-forward layer for text.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"squared_relu"``.
        eps: Of all norms.
        device, dtype: Of the parameters.

    Keys of its ``state_dict``, those of ``Blip2QFormerLayer`` and ``InstructBlipQFormerLayer`` of
    transformers, where they stand behind ``qformer.encoder.layer.{i}.``; linear layers have a
    weight ``[outputs, inputs]`` and a bias, norms ``[C]`` of both:
        attention.attention.{query,key,value}: Linear, C to C.
        attention.output.dense, attention.output.LayerNorm: Linear, C to C; LayerNorm.
        crossattention.*: The same, but key and value C_v to C; with visual_size.
        intermediate_query.dense: Linear, C to intermediate_size.
        output_query.dense, output_query.LayerNorm: Linear, intermediate_size to C; LayerNorm.
        intermediate.*, output.*: The same; with text.

    Source: Li et al., BLIP-2 (arXiv 2301.12597), section 3.1; Dai et al., InstructBLIP (arXiv
    2305.06500), section 2.3.

    Example:
        >>> import torch, vlmops.nn
        >>> layer = vlmops.nn.QFormerLayer(768, 1408, text=True)
        >>> queries, images = torch.randn(1, 32, 768), torch.randn(2, 257, 1408)
        >>> text, mask = torch.randn(2, 9, 768), torch.arange(9) < torch.tensor([[9], [4]])
        >>> queries, text = layer(queries, images, text, text_mask=mask)
        >>> queries.shape, text.shape
        (torch.Size([2, 32, 768]), torch.Size([2, 9, 768]))
    """

    def __init__(
        self,
        hidden_size: int = 768,
        visual_size: int | None = 1408,
        *,
        num_heads: int = 12,
        intermediate_size: int | None = None,
        text: bool = False,
        activation: str = "gelu",
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_heads("QFormerLayer", hidden_size, num_heads)
        require_activation("QFormerLayer", activation)
        self.hidden_size, self.visual_size = hidden_size, visual_size
        self.num_heads, self.activation = num_heads, activation
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        width = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.attention = _attention(hidden_size, hidden_size, eps, made)
        if visual_size is not None:
            self.crossattention = _attention(hidden_size, visual_size, eps, made)
        for suffix in ("_query", "") if text else ("_query",):
            dense = nn.Linear(hidden_size, width, **made)
            setattr(self, f"intermediate{suffix}", nn.ModuleDict({"dense": dense}))
            setattr(self, f"output{suffix}", _output(width, hidden_size, eps, made))
        self.text = text

    def forward(
        self,
        queries: Tensor,
        visual_states: Tensor | None = None,
        text_states: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        visual_mask: Tensor | None = None,
        visual_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What queries and text have become, for the next layer.

        Args:
            queries: ``[B, Q, C]``, or ``[1, Q, C]`` for all rows of the others.
            visual_states: ``[B, S, C_v]``. A layer without cross-attention does not look at it, so
                that all layers can be given the same.
            text_states: ``[B, T, C]``: an instruction's tokens; T may be 0.
            text_mask: ``[B, T]`` bool: which of them exist. Where none does, the row's queries and
                padded tokens see the queries alone.
            visual_mask: ``[B, S]`` bool: which visual tokens exist. Where none does, attention to
                them gives zeros, of which ``dense`` makes its bias.
            visual_lengths: ``[B]`` int32 or int64: how many visual tokens exist.

        Returns:
            ``[B, Q, C]`` and ``[B, T, C]``, or None where there was no text. Queries stay one row
            if nothing of more rows was looked at.

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected, what
                came.
            RuntimeError: as `vlmops.qformer_attention` and `vlmops.perceiver_attention`.
        """
        queries, text_states = self._among_themselves(queries, text_states, text_mask)
        if self.visual_size is not None:
            if visual_states is None:
                raise ValueError(
                    "vlmops.nn.QFormerLayer: visual_states: expected a tensor, as this layer has "
                    "cross-attention, got None"
                )
            queries = self._to_visual(queries, visual_states, visual_mask, visual_lengths)
        queries = self._feed_forward(queries, "_query")
        if text_states is not None:
            text_states = self._feed_forward(text_states, "")
        return queries, text_states

    def _among_themselves(
        self, queries: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        module: Any = self.attention
        weight = module["output"]["dense"].weight
        require("QFormerLayer", "queries", queries, ("B", "Q", self.hidden_size), weight)
        of_queries = self._projected(module, queries)
        if text is None:
            if mask is not None:
                raise ValueError(
                    "vlmops.nn.QFormerLayer: text_mask: expected None, as there are no text_states,"
                    f" got shape {list(mask.shape)}"
                )
            return self._added(module, qformer_attention(*of_queries), queries), None
        if not self.text:
            raise ValueError(
                "vlmops.nn.QFormerLayer: text_states: expected None, as the layer was made without "
                f"text=True, got shape {list(text.shape)}"
            )
        batch: Any = "B" if len(queries) == 1 else len(queries)
        require("QFormerLayer", "text_states", text, (batch, "T", self.hidden_size), weight)
        require_mask("QFormerLayer", "text_mask", mask, tuple(text.shape[:2]))
        # Keys are two segments: those of the queries are seen by all, nothing is concatenated.
        q, k, v = (x.expand(len(text), -1, -1, -1) for x in of_queries)
        q_text, k_text, v_text = self._projected(module, text)
        out, out_of_text = (
            perceiver_attention(of, k_text, v_text, k, v, mask) for of in (q, q_text)
        )
        return self._added(module, out, queries), self._added(module, out_of_text, text)

    def _to_visual(
        self, queries: Tensor, visual: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        module: Any = self.crossattention
        parts = module["attention"]
        batch: Any = "B" if len(queries) == 1 else len(queries)
        require(
            "QFormerLayer",
            "visual_states",
            visual,
            (batch, "S", self.visual_size or 0),
            module["output"]["dense"].weight,
        )
        if visual.shape[1] == 0:
            raise ValueError(
                "vlmops.nn.QFormerLayer: visual_states: expected at least one token, got shape "
                f"{list(visual.shape)}; visual_mask or visual_lengths say which rows have none"
            )
        require_mask("QFormerLayer", "visual_mask", mask, tuple(visual.shape[:2]))
        require_lengths("QFormerLayer", "visual_lengths", lengths, tuple(visual.shape[:1]))
        q = self._heads(product(parts["query"], queries))
        k, v = (self._heads(product(parts[name], visual)) for name in ("key", "value"))
        out = qformer_attention(q, k, v, mask, key_lengths=lengths)
        return self._added(module, out, queries)

    def _projected(self, module: Any, x: Tensor) -> list[Tensor]:
        parts = module["attention"]
        return [self._heads(product(parts[name], x)) for name in ("query", "key", "value")]

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads

    def _added(self, module: Any, out: Tensor, x: Tensor) -> Tensor:
        parts = module["output"]
        added: Tensor = normed_sum(parts["dense"], out.flatten(2), x, parts["LayerNorm"])
        return added

    def _feed_forward(self, x: Tensor, suffix: str) -> Tensor:
        first: Any = getattr(self, f"intermediate{suffix}")
        second: Any = getattr(self, f"output{suffix}")
        hidden = product(first["dense"], x, self.activation)
        out: Tensor = normed_sum(second["dense"], hidden, x, second["LayerNorm"])
        return out

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return f"num_heads={self.num_heads}, activation={self.activation!r}"
