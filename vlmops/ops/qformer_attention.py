"""Attention of learned queries to visual tokens, and of text to them: few rows, many keys.

::

    out_i = sum_j softmax_j(scale q_i k_j) v_j

over the keys j that query i sees: those whose key_mask is True, and ``j < key_lengths``. Queries
that are the same for the whole batch are given once.

====================  =============================================================================
model                 arguments
====================  =============================================================================
BLIP-2                q ``[B, 32, 12, 64]`` over k ``[B, 257, 12, 64]``; self-attention: k of the
                      queries themselves
InstructBLIP          the same; self-attention over ``[B, 32 + T, 12, 64]``, queries and
                      instruction, key_mask False where the instruction is padded. For videos B
                      counts frames
BLIP                  text ``[B, S, 12, 64]`` over ``[B, 577, 12, 64]``
Qwen-VL               q ``[1, 256, 32, 128]`` over k ``[B, 1024, 32, 128]``, with position
                      embeddings in both before they are projected
====================  =============================================================================

These are the kernels of `vlmops.packed_attention`. Saved for backward are q, k, v, out and their
statistics.

Sources: Li et al., BLIP-2 (arXiv 2301.12597); Dai et al., InstructBLIP (arXiv 2305.06500); Bai et
al., Qwen-VL (arXiv 2308.12966).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vlmops.ops import packed_attention
from vlmops.ops.attention_op import AttentionOp


class Options(NamedTuple):
    """What ``torch.ops.vlmops.qformer_attention`` takes beside q, k and v, and defaults.

    There key_mask is ``[B, Q, S]``, and q has the batch of k.
    """

    key_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    scale: float | None = None


def qformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of queries to the visual tokens of their sample.

    Differentiable in q, k and v. There is no dropout: a model that drops attention weights in
    training runs its own attention there.

    Args:
        q: Queries, ``[B, Q, H, D]``, or ``[1, Q, H, D]``: the same for every sample, read where
            they lie, with one gradient, the sum. float32, bfloat16 or float16; any strides. D is a
            multiple of 8 up to 256.
        k: Keys, ``[B, S, H_kv, D]``, of q's dtype. H_kv divides H.
        v: Values, like k.
        key_mask: bool, ``[B, S]`` or ``[B, Q, S]``: the keys that are seen, by all queries of the
            sample or by each. None: all.
        key_lengths: ``[B]``, int32 or int64: how many keys each sample has; what lies behind them
            in k and v is not read. None: all.
        scale: Of the logits. None: 1 / sqrt(D).
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[B, Q, H, D]`` of q's dtype, contiguous. Zeros for queries that see no key.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came. On a GPU the values of key_lengths are
            not looked at: what lies outside is kept within the tensors.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q = torch.randn(1, 32, 12, 64)  # BLIP-2's queries
        >>> k, v = torch.randn(2, 8, 257, 12, 64)  # the tokens of eight images
        >>> vlmops.qformer_attention(q, k, v).shape
        torch.Size([8, 32, 12, 64])
    """
    shaped = isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4
    if shaped and q.shape[0] == 1:
        q = q.expand(k.shape[0], -1, -1, -1)
    return OP(backend, q, k, v, of_queries(key_mask, q), key_lengths, scale)


def of_queries(key_mask: Any, q: Any) -> Any:
    """A mask of keys ``[B, S]``, which queries share, as one for each of them."""
    if not (isinstance(key_mask, Tensor) and isinstance(q, Tensor)):
        return key_mask
    if key_mask.dim() != 2 or q.dim() != 4:
        return key_mask
    return key_mask[:, None].expand(-1, q.shape[1], -1)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`qformer_attention` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """
    return packed_attention.reference(
        q.expand(k.shape[0], -1, -1, -1),
        k,
        v,
        block_mask=of_queries(key_mask, q),
        key_lengths=key_lengths,
        scale=scale,
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded."""
    return reference(q, k, v, **Options(*args)._asdict()).to(q.dtype)


OP = AttentionOp("qformer_attention", ("q", "k", "v"), Options, 2, _plain)
