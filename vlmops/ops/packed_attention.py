"""Packed attention: softmax(scale q k^T) v within each of the segments that one tensor holds.

Segments are the images, frames or windows of a vision tower, the rows of a batch, or anything else
whose tokens look at each other only. For query i and head h of a segment, with KV head
h' = h / (H / H_kv)::

    s_ij = log2(e) scale q_ih . k_jh'               over the keys j that i sees
    m_i  = max_j s_ij,    l_i = sum_j 2^(s_ij - m_i)
    y_ih = sum_j 2^(s_ij - m_i) v_jh' / l_i

=========================  =========================================================================
who                        arguments
=========================  =========================================================================
Qwen2-VL, Qwen3-VL,        q, k, v ``[N, H, D]``, slices of one product; cu_seqlens of frames
GLM-4V towers
Qwen2.5-VL's tower         cu_seqlens of windows of at most 64 patches, or of frames
Pixtral, Mistral-3         cu_seqlens of images
CLIP, SigLIP, InternViT,   q, k, v ``[B, S, H, D]``
EVA, DINOv2, ViT, Llama-4
Mllama's tower             ``[B, S, H, D]`` and padding: its mask hides padding from padding alone
Mllama's text              ``[B, S, H, D]`` over ``[B, G * 1601, H_kv, D]``, block_mask of tiles
decoders                   ``[B, 1, H, D]`` over ``[B, S, H_kv, D]``, or causal
=========================  =========================================================================

Logits, their maximum, sums and y are accumulated in float32, one block of keys after another; of
size N x N nothing is stored. Saved for backward are q, k, v, y, and m and 1 / l, ``[2, H, N]`` in
float32. What comes of a segment does not depend on the others.

Sources: Dao et al., FlashAttention (arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691);
Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint

from vlmops.ops.attention_op import AttentionOp


class Options(NamedTuple):
    """What ``torch.ops.vlmops.packed_attention`` takes beside q, k and v, with its defaults."""

    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    padding: Tensor | None = None
    block_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    max_seqlen: int = 0
    tokens_per_block: int = 1


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    padding: Tensor | None = None,
    block_mask: Tensor | None = None,
    tokens_per_block: int = 1,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention within segments, packed one after the other or rows of a batch.

    Differentiable in q, k and v. There is no dropout: a model that drops attention weights in
    training runs its own attention there.

    Args:
        q: Queries, ``[N, H, D]`` with cu_seqlens, ``[B, S, H, D]`` without: every row of the batch
            is a segment. float32, bfloat16 or float16; any strides (slices of a fused product are
            read where they lie, if their channels are side by side). D is a multiple of 8 up to
            256; 64, 72, 80, 88, 96 and 128 are the quick ones.
        k: Keys, ``[N_k, H_kv, D]`` or ``[B, S_k, H_kv, D]``, of q's dtype. H_kv divides H.
        v: Values, like k.
        cu_seqlens: Where segments begin, ``[segments + 1]``, int32 or int64: 0, then ends, which do
            not fall; the last is N. Segments may be empty. With q on a GPU it may lie on the host:
            it is copied there, and nothing is read back.
        cu_seqlens_k: The same of the keys. None: that of the queries.
        max_seqlen: No segment has more queries. Never needed: on a GPU it picks kernels for short
            segments, and with cu_seqlens on the host it is checked.
        padding: ``[N]`` or ``[B, S]`` bool, where q and k have the same segments: queries that are
            padding (True) see the keys that are not, all others see every key of their segment.
            That is what Mllama's vision mask comes to. Not with causal.
        block_mask: ``[B, S, G]`` bool, without cu_seqlens: which of G blocks of tokens_per_block
            keys each query sees, tiles or images that tokens of text look at, say. Blocks that none
            of a tile's queries see are left out, and a mask of queries by keys is never made. Not
            with causal or padding.
        tokens_per_block: Keys of a block; G of them are all of k's.
        key_lengths: ``[B]``, int32 or int64, without cu_seqlens: how many keys each row of the
            batch has; what lies behind them in k and v is not read. Not with causal or padding.
        scale: Of the logits. None: 1 / sqrt(D).
        causal: Query i of n sees the keys up to i + m - n of its segment's m: the last query sees
            all of them.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        Of q's shape and dtype, contiguous. Zeros for queries that see no key.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came. On a GPU the values of cu_seqlens and
            key_lengths are not looked at: what lies outside is kept within the tensors.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q, k, v = torch.randn(5476, 3, 16, 80).unbind(1)  # an image of Qwen2.5-VL's tower
        >>> windows = torch.tensor([*range(0, 5476, 64), 5476])
        >>> vlmops.packed_attention(q, k, v, windows).shape
        torch.Size([5476, 16, 80])
        >>> q, k, v = torch.randn(5, 577, 3, 16, 64).unbind(2)  # five tiles of CLIP-L
        >>> vlmops.packed_attention(q, k, v).shape
        torch.Size([5, 577, 16, 64])
    """
    options = Options(
        cu_seqlens, cu_seqlens_k, padding, block_mask, key_lengths, scale, causal,
        max_seqlen or 0, tokens_per_block,
    )  # fmt: skip
    return OP(backend, q, k, v, *options)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    padding: Tensor | None = None,
    block_mask: Tensor | None = None,
    tokens_per_block: int = 1,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """`packed_attention` in plain torch and float64, one segment after another; slow.

    Arguments that do not fit raise what torch raises.
    """
    shape, group = q.shape, q.shape[-2] // max(k.shape[-2], 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    starts = (_cu_seqlens(q, cu_seqlens), _cu_seqlens(k, cu_seqlens_k, cu_seqlens))
    hidden = None if padding is None else padding.flatten()
    blocks = None if block_mask is None else (block_mask.flatten(0, 1), tokens_per_block)
    lengths = None if key_lengths is None else key_lengths.to(k.device)
    q, k, v = (t.double().flatten(0, -3) for t in (q, k, v))
    made = [q[:0] + 0.0 * (k[:0].sum() + v[:0].sum())]  # all three, where there are no segments
    for rows, keys, seen in _segments(q, k, *starts, hidden, blocks, lengths, causal):
        of_q, (of_k, of_v) = q[rows], (t[keys].repeat_interleave(group, 1) for t in (k, v))
        if is_fake(q) or seen.numel() * q.shape[1] <= _MOST_WEIGHTS:
            made.append(_attend(of_q, of_k, of_v, seen, scale))
            continue
        # A head at a time, which backward does again: weights of all of them are gigabytes.
        heads = [
            checkpoint(_attend, *head, seen, scale, use_reentrant=False)
            for head in zip(*(t.split(1, 1) for t in (of_q, of_k, of_v)), strict=True)
        ]
        made.append(torch.cat(heads, 1))
    return torch.cat(made).view(shape)


_MOST_WEIGHTS = 2**26


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """``[n, H, D]``, ``[m, H, D]`` twice; which keys each query sees ``[n, m]``."""
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    logits = logits.masked_fill(~seen, -math.inf)
    # Rows without a key: zeros, in derivatives too.
    blind = ~seen.any(1, keepdim=True)
    weights = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("hij,jhd->ihd", weights, v)


def _cu_seqlens(x: Tensor, *given: Tensor | None) -> Tensor:
    """The first of what is given; else that of the rows of a batch."""
    for starts in given:
        if starts is not None:
            return starts.to(x.device)
    return torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]


def _segments(
    q: Tensor,
    k: Tensor,
    of_q: Tensor,
    of_k: Tensor,
    hidden: Tensor | None,
    blocks: tuple[Tensor, int] | None,
    lengths: Tensor | None,
    causal: bool,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Queries, keys, and which of them see which; all at once where nobody knows the numbers."""
    places = []
    for starts, x in ((of_q, q), (of_k, k)):
        at = torch.arange(x.shape[0], device=x.device)
        segment = torch.searchsorted(starts[1:].contiguous(), at, right=True)
        # Of a segment's last: query i of n is opposite key i + m - n of m.
        places.append((segment, at - starts[segment + 1]))
    (row_segment, row), (key_segment, key) = places
    parts = [(slice(None), slice(None))]
    if len(of_q) > 1 and not is_fake(of_q):
        bounds = [itertools.pairwise(starts.tolist()) for starts in (of_q, of_k)]
        parts = [(slice(*i), slice(*j)) for i, j in zip(*bounds, strict=True)]
    for rows, keys in parts:
        seen = row_segment[rows, None] == key_segment[None, keys]
        if causal:
            seen = seen & (key[None, keys] <= row[rows, None])
        if hidden is not None:
            seen = seen & ~(hidden[rows, None] & hidden[None, keys])
        at = torch.arange(k.shape[0], device=k.device)[keys] - of_k[key_segment[keys]]
        if blocks is not None:
            mask, size = blocks
            seen = seen & mask[rows][:, at // size]
        if lengths is not None:
            seen = seen & (at < lengths[key_segment[keys]])
        yield rows, keys, seen


def _plain(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    o = Options(*args)
    result = reference(
        q,
        k,
        v,
        o.cu_seqlens,
        cu_seqlens_k=o.cu_seqlens_k,
        padding=o.padding,
        block_mask=o.block_mask,
        tokens_per_block=o.tokens_per_block,
        key_lengths=o.key_lengths,
        scale=o.scale,
        causal=o.causal,
    )
    return result.to(q.dtype)


OP = AttentionOp("packed_attention", ("q", "k", "v"), Options, 5, _plain)
