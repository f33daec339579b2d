"""Attention of a Perceiver's latents to media and to themselves, without joining their keys.

::

    out_i = sum_j softmax_j(scale q_i k_j) v_j

where j runs over the keys of the media that latent i sees, those whose key_mask is True and ``j <
key_lengths``, and over the keys of all latents.

====================  =============================================================================
model                 arguments
====================  =============================================================================
Flamingo              latents ``[B, 64, H, D]``, media ``[B, T * v, H, D]`` of T frames
Idefics               ``[B, 64, 16, 96]`` over an image's 257 tokens
Idefics2              ``[B, 64, 16, 96]`` over 4 KV heads of up to 4,900 tokens; key_mask False
                      where an image is padded
====================  =============================================================================

Hugging Face's code puts media and latents into one tensor, before K and V are made of it. Here the
two are softmaxes of their own, by the kernels of `vlmops.packed_attention`, whose results are
joined: ``w_1 out_1 + w_2 out_2``, with the shares that their sums of exponentials have. In 16 bits
both results are rounded before that. Saved for backward are the arguments, out and statistics.

Sources: Alayrac et al., Flamingo (arXiv 2204.14198); Jaegle et al., Perceiver (arXiv 2103.03206);
Laurençon et al., Idefics2 (arXiv 2405.02246).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmops.ops.attention_op import AttentionOp
from vlmops.ops.qformer_attention import of_queries


class Options(NamedTuple):
    """What ``torch.ops.vlmops.perceiver_attention`` takes beside heads, and defaults.

    There key_mask is ``[B, L, G]``.
    """

    key_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    scale: float | None = None
    tokens_per_block: int = 1


def perceiver_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    key_mask: Tensor | None = None,
    *,
    tokens_per_block: int = 1,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of latents to the media of their sample and to all latents.

    Differentiable in the first five. There is no dropout: a model that drops attention weights in
    training runs its own attention there.

    Args:
        q: Queries of the latents, ``[B, L, H, D]``; float32, bfloat16 or float16; any strides. D
            is a multiple of 8 up to 256.
        k: Keys of the media, ``[B, S, H_kv, D]``, of q's dtype. H_kv divides H. S may be 0.
        v: Values, like k.
        k_latents: Keys of the latents, ``[B, L, H_kv, D]`` (or another number of them).
        v_latents: Values, like k_latents.
        key_mask: bool, ``[B, G]`` or ``[B, L, G]``: which of G blocks of media tokens are seen, by
            all latents of the sample or by each. None: all.
        tokens_per_block: Media tokens of a block, an image's or a frame's, say; G of them are all.
        key_lengths: ``[B]``, int32 or int64: how many media tokens each sample has, from 0 on; what
            lies behind them in k and v is not read. None: all.
        scale: Of the logits. None: 1 / sqrt(D).
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[B, L, H, D]`` of q's dtype, contiguous. Zeros for queries that see no key at all.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came. On a GPU the values of key_lengths are
            not looked at: what lies outside is kept within the tensors.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q = torch.randn(2, 64, 16, 96)
        >>> k, v = torch.randn(2, 2, 8 * 576, 4, 96)  # eight images
        >>> k_latents, v_latents = torch.randn(2, 2, 64, 4, 96)
        >>> images = torch.arange(8) < torch.tensor([[8], [3]])  # of which the second has three
        >>> vlmops.perceiver_attention(
        ...     q, k, v, k_latents, v_latents, images, tokens_per_block=576
        ... ).shape
        torch.Size([2, 64, 16, 96])
    """
    options = Options(of_queries(key_mask, q), key_lengths, scale, tokens_per_block)
    return OP(backend, q, k, v, k_latents, v_latents, *options)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_latents: Tensor,
    v_latents: Tensor,
    key_mask: Tensor | None = None,
    *,
    tokens_per_block: int = 1,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`perceiver_attention` in plain torch and float64, keys in one tensor; slow.

    Arguments that do not fit raise what torch raises.
    """
    q, k, v, k_latents, v_latents = (t.double() for t in (q, k, v, k_latents, v_latents))
    group = q.shape[2] // max(k.shape[2], 1)
    keys = torch.cat([k, k_latents], 1).repeat_interleave(group, 2)
    values = torch.cat([v, v_latents], 1).repeat_interleave(group, 2)
    rows, media = (*q.shape[:2], k.shape[1]), torch.arange(k.shape[1], device=q.device)
    seen = torch.ones(rows, dtype=torch.bool, device=q.device)
    if key_mask is not None:
        seen = seen & of_queries(key_mask, q)[:, :, media // tokens_per_block]
    if key_lengths is not None:
        seen = seen & (media < key_lengths.to(q.device)[:, None, None])
    seen = torch.cat([seen, seen.new_ones(*rows[:2], k_latents.shape[1])], 2)[:, None]
    logits = torch.einsum("bihd,bjhd->bhij", q, keys)
    logits = logits * (1.0 / math.sqrt(q.shape[3]) if scale is None else scale)
    # Rows without a key: zeros, in derivatives too.
    blind = ~seen.any(3, keepdim=True)
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(blind, 0.0)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(3).masked_fill(blind, 0.0), values)


def _plain(*args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded."""
    return reference(*args[:5], **Options(*args[5:])._asdict()).to(args[0].dtype)


OP = AttentionOp(
    "perceiver_attention", ("q", "k", "v", "k_latents", "v_latents"), Options, 2, _plain
)
