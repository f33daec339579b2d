"""Attention of learned queries in Triton: the kernels of packed attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmops.ops import packed_attention, packed_attention_triton
from vlmops.ops.packed_attention_triton import INTERPRETED as INTERPRETED
from vlmops.ops.qformer_attention import OP, Options


def _core(o: Options) -> packed_attention.Options:
    return packed_attention.Options(block_mask=o.key_mask, key_lengths=o.key_lengths, scale=o.scale)


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """``vlmops::qformer_attention_triton``."""
    o = Options(*args)
    torch.ops.vlmops.qformer_attention_check(q, k, v, *o)
    return packed_attention_triton.forward(q, k, v, *_core(o))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``vlmops::qformer_attention_triton_backward``."""
    o, needs = OP.parts(args)
    torch.ops.vlmops.qformer_attention_check(q, k, v, *o, grad, out, statistics)
    return packed_attention_triton.backward(grad, q, k, v, out, statistics, *_core(o), *needs)
