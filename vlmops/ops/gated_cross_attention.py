"""Cross-attention of text to visual tokens, as gated layers inside a language model have it.

Of query i and the keys of its row of the batch, with RMSNorm over the D channels of each head::

    q'_i = norm(q_i) if q_norm_weight is given, else q_i;    k'_j likewise
    out_i = sum_j softmax_j(scale q'_i k'_j) v_j

over the keys j that i sees: those whose block ``j // tokens_per_block`` is True in its row of
block_mask, and ``j < key_lengths``. A mask of queries by keys is never made. The gate is that of
the residual that follows, `vlmops.gated_residual`; `vlmops.nn.gated_cross_attention_block` is a
layer of both.

====================  =============================================================================
model                 arguments
====================  =============================================================================
Llama-3.2-Vision      q ``[B, S, 32, 128]`` over k ``[B, images * tiles * 1601, 8, 128]``;
                      block_mask of tiles, tokens_per_block=1601; both norms. A token that sees no
                      tile attends to all of them there, ``block_mask | ~block_mask.any(-1, True)``,
                      and the MLP's branch alone is stopped, by its residual's row_mask
Idefics               q ``[B, S, 32, 128]`` over ``[B, images * 64, 32, 128]``; block_mask of
                      images, tokens_per_block=64; norms of q and k if qk_layer_norms. A token that
                      sees no image gets nothing: the attention's branch is stopped by its row_mask
Flamingo              as Idefics, each token sees the image before it, or all before it
====================  =============================================================================

Keys that are kept while text is generated are kept normalised: give those without k_norm_weight.
Saved for backward are q, k, v, out and the statistics of `vlmops.packed_attention`, whose kernels
these are; normalised q and k are made again.

Sources: Alayrac et al., Flamingo (arXiv 2204.14198); Laurencon et al., OBELICS (arXiv 2306.16527);
the Llama 3 herd of models (arXiv 2407.21783).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from vlmops.ops import packed_attention
from vlmops.ops.attention_op import AttentionOp


class Options(NamedTuple):
    """What ``torch.ops.vlmops.gated_cross_attention`` takes beside q, k and v, and defaults."""

    block_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    scale: float | None = None
    norm_eps: float = 1e-6
    tokens_per_block: int = 1


def gated_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None = None,
    tokens_per_block: int = 1,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Attention of text tokens to the visual tokens that each of them may see.

    Differentiable in q, k, v and the weights of the norms. There is no dropout: a model that drops
    attention weights in training runs its own attention there.

    Args:
        q: Queries of text, ``[B, S, H, D]``; float32, bfloat16 or float16; any strides. D is a
            multiple of 8 up to 256.
        k: Keys, ``[B, S_k, H_kv, D]``, of q's dtype. H_kv divides H.
        v: Values, like k.
        block_mask: ``[B, S, G]`` bool: which of G blocks (tiles, images) each query sees. None:
            all.
        tokens_per_block: Keys of a block; G of them are all of k's.
        key_lengths: ``[B]``, int32 or int64: how many keys each row of the batch has; what lies
            behind them in k and v is not read, but by the norm of k, which wants finite numbers.
            None: all.
        scale: Of the logits. None: 1 / sqrt(D).
        q_norm_weight: ``[D]``: RMSNorm of each query's heads; float32, bfloat16 or float16.
        k_norm_weight: The same of keys.
        norm_eps: Added to the mean of squares of both; positive.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[B, S, H, D]`` of q's dtype, contiguous. Zeros for queries that see no key.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came. On a GPU the values of key_lengths are
            not looked at: what lies outside is kept within the tensors.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q = torch.randn(1, 5, 32, 128)  # five tokens of Llama-3.2-Vision's text
        >>> k, v = torch.randn(2, 1, 4 * 1601, 8, 128)  # the four tiles of its image
        >>> seen = torch.tensor([[[True, True, True, False]] * 5])  # of which it fills three
        >>> vlmops.gated_cross_attention(q, k, v, seen, 1601, q_norm_weight=torch.ones(128)).shape
        torch.Size([1, 5, 32, 128])
    """
    options = Options(
        block_mask, key_lengths, q_norm_weight, k_norm_weight, scale, norm_eps, tokens_per_block
    )
    return OP(backend, q, k, v, *options)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor | None = None,
    tokens_per_block: int = 1,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """`gated_cross_attention` in plain torch and float64; slow.

    Arguments that do not fit raise what torch raises.
    """

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.double()
        if weight is None:
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt() * weight.double()

    return packed_attention.reference(
        normed(q, q_norm_weight),
        normed(k, k_norm_weight),
        v,
        block_mask=block_mask,
        tokens_per_block=tokens_per_block,
        key_lengths=key_lengths,
        scale=scale,
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    return reference(q, k, v, **Options(*args)._asdict()).to(q.dtype)


OP = AttentionOp(
    "gated_cross_attention",
    ("q", "k", "v"),
    Options,
    4,
    _plain,
    weights=("q_norm_weight", "k_norm_weight"),
)
