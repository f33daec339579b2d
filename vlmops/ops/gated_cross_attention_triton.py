"""Gated cross-attention in Triton: the kernels of pixel shuffle's norms and of packed attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.ops import (
    packed_attention,
    packed_attention_triton,
    pixel_shuffle,
    pixel_shuffle_triton,
)
from vlmops.ops.gated_cross_attention import OP, Options
from vlmops.ops.packed_attention_triton import INTERPRETED as INTERPRETED


def _core(o: Options) -> packed_attention.Options:
    return packed_attention.Options(
        block_mask=o.block_mask,
        key_lengths=o.key_lengths,
        scale=o.scale,
        tokens_per_block=o.tokens_per_block,
    )


def _norm(o: Options, weight: Tensor) -> pixel_shuffle.Options:
    """A norm alone: blocks of one token."""
    return pixel_shuffle.Options(weight, factor=1, norm="rms", eps=o.norm_eps)


def _normed(o: Options, x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return pixel_shuffle_triton.forward(x, *_norm(o, weight)).view(x.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, o: Options, *of_backward: Tensor) -> None:
    torch.ops.vlmops.gated_cross_attention_check(q, k, v, *o, *of_backward)


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``vlmops::gated_cross_attention_triton``."""
    o = Options(*args)
    _check(q, k, v, o)
    normed = _normed(o, q, o.q_norm_weight), _normed(o, k, o.k_norm_weight)
    return packed_attention_triton.forward(*normed, v, *_core(o))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``vlmops::gated_cross_attention_triton_backward``."""
    o, needs = OP.parts(args)
    _check(q, k, v, o, grad, out, statistics)
    weights = o.q_norm_weight, o.k_norm_weight
    of_norms = [n and w is not None for n, w in zip(needs[3:], weights, strict=True)]
    of_core = needs[0] or of_norms[0], needs[1] or of_norms[1], needs[2]
    normed = _normed(o, q, weights[0]), _normed(o, k, weights[1])
    grads = packed_attention_triton.backward(grad, *normed, v, out, statistics, *_core(o), *of_core)
    made, of_weights = list(grads), [grad.new_empty(0)] * 2
    for i, (x, weight) in enumerate(zip((q, k), weights, strict=True)):
        if weight is not None and of_core[i]:
            made[i], of_weights[i], _ = pixel_shuffle_triton.backward(
                grads[i].flatten(1, 2), x, *_norm(o, weight), needs[i], of_norms[i], False
            )
    return *made, *of_weights
