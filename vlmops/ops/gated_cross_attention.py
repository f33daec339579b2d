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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmops import _library, dispatch
from vlmops.ops import packed_attention
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin


class Options(NamedTuple):
    """What ``torch.ops.vlmops.gated_cross_attention`` takes beside q, k and v, and defaults."""

    block_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    scale: float | None = None
    norm_eps: float = 1e-6
    tokens_per_block: int = 1


_TENSORS = 4  # the first of them; two have gradients


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
    if torch.compiler.is_compiling():
        name = dispatch.choose("gated_cross_attention", backend, q.device.type)
        if name == "reference":
            return _plain(q, k, v, *options)
        op = (_TRITON if name == "triton" else _COMPILED).forward
        result: Tensor = op(q, k, v, *options)[0]
        return result
    _library.require()
    for argument, tensor in {"q": q, "k": k, "v": v}.items():
        require_tensor("gated_cross_attention", argument, tensor)
    for argument, given in zip(Options._fields[:_TENSORS], options[:_TENSORS], strict=True):
        if given is not None:
            require_tensor("gated_cross_attention", argument, given)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not q.is_cpu:
        name = dispatch.choose("gated_cross_attention", backend, q.device.type)
        if name == "reference":
            return _plain(q, k, v, *options)
        if name == "triton":
            ops = _TRITON
    return _forward(ops, q, k, v, *options)[0]


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


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class _GatedCrossAttention(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(
        ctx: Any, ops: _Ops, q: Tensor, k: Tensor, v: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        o = Options(*args)
        out, statistics = packed_attention._call(ops.forward, q, k, v, *o)
        ctx.ops, ctx.numbers = ops, o[_TENSORS:]
        ctx.save_for_backward(q, k, v, out, statistics, *o[:_TENSORS])
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        made: list[Tensor | None] = [None] * (4 + len(Options._fields))
        if grad is None:
            return tuple(made)
        places = [1, 2, 3, 6, 7]  # of q, k, v and the norms
        needs = [ctx.needs_input_grad[i] for i in places]
        grads = _backward(ctx.ops, grad, *ctx.saved_tensors, *ctx.numbers, *needs)
        for i, needed, found in zip(places, needs, grads, strict=True):
            made[i] = found if needed else None
        return tuple(made)


def _norms(o: Options) -> tuple[Tensor | None, Tensor | None]:
    return o.q_norm_weight, o.k_norm_weight


def _forward(ops: _Ops, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    o = Options(*args)
    recorded = wants_grad(q, k, v, *_norms(o))
    return packed_attention.recording(_GatedCrossAttention, _plain, recorded, ops, q, k, v, *o)


def _all_needs(args: Sequence[Any]) -> tuple[Options, list[bool]]:
    """Those of backward behind the tensors; torch leaves out what is the schema's default."""
    count = len(Options._fields)
    needs = list(args[count:])
    return Options(*args[:count]), needs + [True] * (5 - len(needs))


def _backward(
    ops: _Ops,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    *args: Any,
) -> Sequence[Tensor]:
    """The gradients of the five; an empty tensor for one that nobody needs, or is not there."""
    o, needs = _all_needs(args)
    if not wants_grad(grad, q, k, v, *_norms(o)):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.backward(grad, q, k, v, out, statistics, *args)
        return result
    given = [q, k, v, *_norms(o)]
    places = [i for i, t in enumerate(given) if t is not None]

    def plain(*tensors: Tensor) -> Tensor:
        whole: list[Any] = [None] * 5
        for i, t in zip(places, tensors, strict=True):
            whole[i] = t
        options = o._replace(q_norm_weight=whole[3], k_norm_weight=whole[4])
        return _plain(*whole[:3], *options)

    found = plain_gradients(
        plain, [t for t in given if t is not None], (), [needs[i] for i in places], grad
    )
    made = [grad.new_empty(0)] * 5
    for i, t in zip(places, found, strict=True):
        made[i] = t
    return made


def _fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _same_device(Options(*args), q, k=k, v=v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(2, q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    o, needs = _all_needs(args)
    _same_device(o, q, k=k, v=v, grad=grad)
    return tuple(
        q.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
        for t, needed in zip((q, k, v, *_norms(o)), needs, strict=True)
    )


def _same_device(o: Options, q: Tensor, **others: Tensor) -> None:
    norms = {"q_norm_weight": o.q_norm_weight, "k_norm_weight": o.k_norm_weight}
    same_device("gated_cross_attention", "q", q, **others, block_mask=o.block_mask, **norms)


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "gated_cross_attention")
    _TRITON = triton_twin(_lib, "gated_cross_attention", _COMPILED)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
