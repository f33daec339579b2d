"""Cases, benchmark shapes and bad calls of `vlmops.packed_attention`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.packed_attention import Options, _cu_seqlens, packed_attention, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (packed_attention(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


_SCHEMA = ("q", "k", "v", *Options._fields)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    return tuple(args[name] or 0 if name == "max_seqlen" else args[name] for name in _SCHEMA)


def _cu(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def _strided(heads: Sequence[Tensor], layout: str) -> list[Tensor]:
    """q, k and v with the strides that ``layout`` names."""
    if layout == "fused":  # slices of one product: [.., 3, H, D]
        wide = torch.cat([t.flatten(-2) for t in heads], -1)
        parts = wide.split([t.shape[-2] * t.shape[-1] for t in heads], -1)
        return [p.unflatten(-1, t.shape[-2:]) for p, t in zip(parts, heads, strict=True)]
    if layout == "heads_first":  # [.., H, N, D] in memory
        return [t.transpose(-2, -3).contiguous().transpose(-2, -3) for t in heads]
    if layout == "channels_apart":
        return [torch.stack((t, t), -1)[..., 0] for t in heads]
    if layout == "odd":  # rows on no boundary of a pack
        return [torch.cat((t, t[..., :3]), -1)[..., :-3] for t in heads]
    if layout == "expanded":  # one head seen as many
        return [t[..., :1, :].expand(t.shape) for t in heads]
    return list(heads)


def _inputs(
    lengths: Sequence[int],
    heads: int = 2,
    dim: int = 16,
    *,
    keys: Sequence[int] | None = None,
    kv_heads: int | None = None,
    layout: str = "fused",
    batched: bool = False,
    padding: Sequence[int] | None = None,
    blocks: int | None = None,
    seen: int | None = None,
    lengths_k: Sequence[int] | None = None,
    starts_dtype: torch.dtype = torch.int32,
    spread: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``padding``: rows of each segment that are. ``spread`` of q, and so of logits.

    ``blocks`` of a segment's keys: queries see the first ``seen``, or else some of them or none,
    and in segments beyond the first all see the first alone.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        of_k = lengths if keys is None else keys
        counts = (heads, kv_heads or heads, kv_heads or heads)
        rows = (sum(lengths), sum(of_k), sum(of_k))
        made = [torch.randn(n, h, dim, device=device) for n, h in zip(rows, counts, strict=True)]
        made[0] *= spread
        made = [t.to(dtype) for t in made]
        hidden = None
        if padding is not None:
            ends = [torch.arange(n) >= n - p for n, p in zip(lengths, padding, strict=True)]
            hidden = torch.cat(ends).to(device)
        if batched:
            made = [t.unflatten(0, (len(lengths), -1)) for t in made]
            hidden = None if hidden is None else hidden.unflatten(0, (len(lengths), -1))
        if layout == "fused" and keys is not None:
            made = [*_strided(made[:1], layout), *_strided(made[1:], layout)]
        else:
            made = _strided(made, layout)
        own = keys is not None and not batched
        mask = None
        if blocks is not None:
            mask = torch.arange(blocks) <= torch.randint(-1, blocks, (len(lengths), lengths[0], 1))
            mask[1:] = torch.arange(blocks) < 1
            if seen is not None:
                mask[:] = torch.arange(blocks) < seen
            mask = mask.to(device)
        return {
            **dict(zip("qkv", made, strict=True)),
            "cu_seqlens": None if batched else _cu(lengths, starts_dtype).to(device),
            "cu_seqlens_k": _cu(of_k, starts_dtype).to(device) if own else None,
            "padding": hidden,
            "block_mask": mask,
            "tokens_per_block": 1 if blocks is None else of_k[0] // blocks,
            "key_lengths": None if lengths_k is None else torch.tensor(lengths_k, device=device),
            "scale": None,
            "causal": False,
            "max_seqlen": None,
            **options,
        }

    return make


_SEVERAL = [5, 1, 0, 17, 64, 3]

_ROWS = {
    # As models have it.
    "qwen2_5_vl": _inputs([16, 16, 8, 4], 2, 80),
    "frames": _inputs([70, 70], 2, 80, starts_dtype=torch.int64, max_seqlen=70),
    "clip": _inputs([37] * 2, 2, 64, batched=True),
    "siglip": _inputs([30] * 2, 2, 72, batched=True),
    "eva": _inputs([26], 1, 88, batched=True, layout="heads_first"),
    "mllama": _inputs([40] * 2, 2, 80, batched=True, padding=[13, 0]),
    "mllama_packed": _inputs([40, 21], 2, 80, padding=[13, 21]),
    "decode": _inputs([1] * 2, 14, 64, keys=[67] * 2, kv_heads=2, batched=True,
                      layout="heads_first"),
    "prefill": _inputs([33] * 2, 6, 64, kv_heads=2, batched=True, causal=True),
    "qformer": _inputs([32], 2, 64, keys=[57], batched=True),
    "mllama_text": _inputs([19] * 2, 4, 128, keys=[4 * 37] * 2, kv_heads=2, batched=True, blocks=4),
    "mllama_decode": _inputs([1] * 3, 8, 64, keys=[4 * 41] * 3, kv_heads=2, batched=True, blocks=4,
                             layout="heads_first"),
    "idefics": _inputs([70] * 2, 2, 96, keys=[3 * 64] * 2, batched=True, blocks=3),
    # Options.
    "several": _inputs(_SEVERAL),
    "several_causal": _inputs(_SEVERAL, causal=True),
    "blocks_of_one": _inputs([9] * 2, 2, 64, keys=[5] * 2, batched=True, blocks=5),
    "lengths": _inputs([9] * 3, 2, 64, keys=[70] * 3, batched=True, lengths_k=[70, 0, 41]),
    "cross": _inputs([3, 0, 40, 2], keys=[9, 4, 70, 0]),
    "cross_causal": _inputs([3, 8, 40, 2], keys=[9, 4, 70, 0], causal=True),
    "gqa": _inputs(_SEVERAL, 6, kv_heads=2),
    "gqa_causal": _inputs([70, 9], 8, kv_heads=2, causal=True),
    "one_kv_head": _inputs(_SEVERAL, 5, kv_heads=1),
    "few_queries": _inputs([2, 3], 3, 64, keys=[150, 81]),
    "few_causal": _inputs([2, 3], 4, 64, keys=[150, 81], kv_heads=2, causal=True),
    "scale": _inputs([9, 20], scale=0.5),
    "scale_negative": _inputs([9, 20], scale=-0.3),
    "scale_0": _inputs([9, 20], scale=0.0),
    "steep": _inputs([70, 20], 1, 64, spread=80.0),
    # Strides.
    "contiguous": _inputs([9, 20], layout="contiguous"),
    "heads_first": _inputs([9, 20], layout="heads_first"),
    "channels_apart": _inputs([9, 20], layout="channels_apart"),
    "odd": _inputs([9, 20], layout="odd"),
    "expanded": _inputs([9, 20], layout="expanded"),
    # Sizes.
    "dim_8": _inputs([20, 3], dim=8),
    "dim_96": _inputs([20, 3], dim=96),
    "dim_128": _inputs([70, 3], 1, 128),
    "dim_168": _inputs([20, 3], 1, 168),
    "dim_256": _inputs([70, 3], 1, 256),
    "long": _inputs([331, 130], 2, 32),
    "long_padding": _inputs([331], 1, 32, padding=[129]),
    "long_causal": _inputs([331], 2, 32, kv_heads=1, causal=True),
    "no_rows": _inputs([0, 0]),
    "no_segments": _inputs([]),
    "no_heads": _inputs([4], 0),
    "no_keys": _inputs([4, 2], keys=[0, 0]),
}  # fmt: skip

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("qwen2_5_vl", "mllama", "several_causal", "cross", "gqa", "blocks_of_one", "no_rows")
# Interpreted programs are one to a head and segment.
_TINY = {
    "tiny_decode": _inputs([1] * 2, 4, 64, keys=[67] * 2, kv_heads=2, batched=True,
                           layout="heads_first"),
    "tiny_mllama_decode": _inputs([1] * 2, 4, 64, keys=[4 * 41] * 2, kv_heads=2, batched=True,
                                  blocks=4, layout="heads_first"),
}  # fmt: skip
FEW = [case for case in CASES if case.name in _FEW]
FEW += [Case(name, make) for name, make in _TINY.items()]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What models run, segment for segment: two products around a softmax in float32."""
    return _per_segment(_eager)


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """The same; in float32 torch's fused attention, which is what models run unless told otherwise.

    Any fused backward takes rowsum(grad * out) for the sum over keys that the plain one takes of
    its own products, and so has an error where one key has most of the weight that it has not.
    """
    return _per_segment(_sdpa if args["q"].dtype == torch.float32 else _eager)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[H, n, D]``; mask: True where a query sees a key."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.matmul(weights, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t[None] if t.stride(-1) == 1 else t.contiguous()[None] for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0]
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _per_segment(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    def run(**args: Any) -> tuple[Tensor]:
        q, shape, group = args["q"], args["q"].shape, 1
        if args["k"].shape[-2]:
            group = shape[-2] // args["k"].shape[-2]
        scale = args["scale"]
        scale = 1.0 / math.sqrt(shape[-1]) if scale is None else scale
        starts = _cu_seqlens(q, args["cu_seqlens"]).tolist()
        starts_k = _cu_seqlens(args["k"], args["cu_seqlens_k"], args["cu_seqlens"]).tolist()
        hidden = args["padding"]
        hidden = None if hidden is None else hidden.flatten()
        q, k, v = (args[n].flatten(0, -3).transpose(0, 1) for n in "qkv")  # [H, N, D]
        if group > 1:
            k, v = (t.repeat_interleave(group, 0) for t in (k, v))
        made = [q[:, :0] + 0.0 * (k[:, :0].sum() + v[:, :0].sum())]
        for i in range(len(starts) - 1):
            rows, keys = slice(*starts[i : i + 2]), slice(*starts_k[i : i + 2])
            mask = None
            n, m = starts[i + 1] - starts[i], starts_k[i + 1] - starts_k[i]
            if args["causal"]:
                mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
            if hidden is not None:
                mask = ~(hidden[rows, None] & hidden[None, keys])
            if args["block_mask"] is not None:
                mask = args["block_mask"][i].repeat_interleave(args["tokens_per_block"], -1)
            if args["key_lengths"] is not None:
                there = torch.arange(m, device=q.device) < args["key_lengths"][i]
                mask = there.expand(n, m) if mask is None else mask & there
            made.append(attend(q[:, rows], k[:, keys], v[:, keys], mask, scale))
        return (torch.cat(made, 1).transpose(0, 1).reshape(shape),)

    return run


def _sdpa_batched(**args: Any) -> tuple[Tensor]:
    """One call of torch's for all segments, which have one length."""
    lengths = _lengths(args["q"], args["cu_seqlens"])
    q, k, v = (args[n] if args[n].dim() == 4 else args[n].unflatten(0, (len(lengths), -1))
               for n in "qkv")  # fmt: skip
    mask = None
    if args["padding"] is not None:
        hidden = args["padding"].view(len(lengths), -1)
        mask = ~(hidden[:, None, :, None] & hidden[:, None, None, :])
    if args["block_mask"] is not None:
        mask = _expanded(args)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=args["causal"],
        scale=args["scale"],
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return (out.transpose(1, 2).reshape(args["q"].shape),)


def _expanded(args: Arguments) -> Tensor:
    """``[B, 1, S, S_k]``, as models make it of a mask of blocks, in q's dtype."""
    hidden = ~args["block_mask"].repeat_interleave(args["tokens_per_block"], -1)[:, None]
    dtype = args["q"].dtype
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _sdpa_folded(**args: Any) -> tuple[Tensor]:
    """The same, the heads that share keys as more queries."""
    q, k, v = args["q"], args["k"], args["v"]
    batch, rows, heads, dim = q.shape
    kv_heads = k.shape[2]
    folded = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None
    if args["block_mask"] is not None:
        mask = _expanded(args).repeat(1, 1, heads // kv_heads, 1)
    out = functional.scaled_dot_product_attention(
        folded, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=args["scale"]
    )
    out = out.view(batch, kv_heads, heads // kv_heads, rows, dim).permute(0, 3, 1, 2, 4)
    return (out.reshape(q.shape),)


def _lengths(x: Tensor, *given: Tensor | None) -> list[int]:
    starts = _cu_seqlens(x, *given).tolist()
    return [b - a for a, b in itertools.pairwise(starts)]


def peers(args: Arguments) -> dict[str, Callable[..., Any]]:
    """Fused attention of torch, as models call it and as they could."""
    q, k = args["q"], args["k"]
    equal = len(set(_lengths(q, args["cu_seqlens"]))) == 1 and args["cu_seqlens_k"] is None
    found: dict[str, Callable[..., Any]] = {}
    if equal:
        found["sdpa"] = _sdpa_batched
    if args["cu_seqlens"] is not None:
        found["sdpa_loop"] = _per_segment(_sdpa)
    if q.dim() == 4 and q.shape[2] != k.shape[2] and not args["causal"]:
        found["sdpa_folded"] = _sdpa_folded
    return found


def _in_blocks(args: Arguments) -> Arguments:
    """The good call as a batch of four, whose keys are one block each."""
    batched = {n: args[n].unflatten(0, (4, 11)) for n in "qkv"}
    mask = batched["q"].new_ones(4, 11, 1, dtype=torch.bool)
    return {
        **args, **batched, "cu_seqlens": None, "block_mask": mask, "tokens_per_block": 11,
        "max_seqlen": None,
    }  # fmt: skip


# The good call is CASES[0]: q, k, v [44, 2, 80], cu_seqlens [5].
ERRORS = [
    BadCall("no_tensor", swap(q=3), r"q: expected a torch.Tensor, got int", TypeError),
    BadCall("float64", alter("q", Tensor.double),
            r"q: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("rank_4", alter("q", lambda t: t[None]),
            r"q: expected \[N, H, D\] with cu_seqlens, got shape \[1, 44, 2, 80\]"),
    BadCall("rank_3", swap(cu_seqlens=None),
            r"q: expected \[B, S, H, D\] without cu_seqlens, got shape \[44, 2, 80\]"),
    BadCall("dim", lambda a: {**a, **{n: a[n][..., :12] for n in "qkv"}},
            r"q: expected heads of a multiple of 8 channels up to 256, got shape \[44, 2, 12\]"),
    BadCall("dim_264", lambda a: {**a, **{n: a[n].repeat(1, 1, 4)[..., :264] for n in "qkv"}},
            r"q: expected heads of a multiple of 8 channels up to 256, got shape \[44, 2, 264\]"),
    BadCall("k_dtype", alter("k", lambda t: t.to(torch.float16 if t.dtype != torch.float16
                                                    else torch.float32)),
            r"k: expected dtype .*that of q, got"),
    BadCall("k_rank", alter("k", lambda t: t[None]),
            r"k: expected as many dimensions as q has, shape \[44, 2, 80\], got"),
    BadCall("k_dim", alter("k", lambda t: t[..., :72]),
            r"k: expected heads of 80 channels, as q \[44, 2, 80\] has, got shape \[44, 2, 72\]"),
    BadCall("k_heads", alter("k", lambda t: t.repeat(1, 2, 1)[:, :3]),
            r"k: expected a number of heads that divides q's 2, got shape \[44, 3, 80\]"),
    BadCall("k_rows", lambda a: {**a, "k": a["k"][1:], "v": a["v"][1:]},
            r"k: expected the 44 rows of q \[44, 2, 80\] where there is no cu_seqlens_k"),
    BadCall("v_rows", alter("v", lambda t: t[1:]), r"v: expected shape \[44, 2, 80\].*that of k"),
    BadCall("v_no_tensor", swap(v=None), r"v: expected a torch.Tensor, got NoneType", TypeError),
    BadCall("starts_float", alter("cu_seqlens", Tensor.float),
            r"cu_seqlens: expected .*int.*got float32"),
    BadCall("starts_int16", alter("cu_seqlens", Tensor.short),
            r"cu_seqlens: expected dtype int32 or int64, got int16"),
    BadCall("starts_rank", alter("cu_seqlens", lambda t: t[None]),
            r"cu_seqlens: expected \[segments \+ 1\] integers, got shape \[1, 5\]"),
    BadCall("starts_empty", alter("cu_seqlens", lambda t: t[:0]),
            r"cu_seqlens: expected \[segments \+ 1\] integers, got shape \[0\]"),
    BadCall("starts_list", swap(cu_seqlens=[0, 44]),
            r"cu_seqlens: expected a torch.Tensor, got list", TypeError),
    BadCall("starts_first", alter("cu_seqlens", lambda t: t.clamp(min=1)),
            r"cu_seqlens: expected 0 first, got 1", reads_values=True),
    BadCall("starts_fall", alter("cu_seqlens", lambda t: t.index_fill(0, torch.tensor([2]), 3)),
            r"cu_seqlens: expected ends that do not fall, got 3 after 16 at 2", reads_values=True),
    BadCall("starts_last", alter("cu_seqlens", lambda t: t[:-1]),
            r"cu_seqlens: expected 44 last, the rows of q, got 40", reads_values=True),
    BadCall("starts_k_count", lambda a: {**a, "cu_seqlens_k": a["cu_seqlens"][[0, 4]]},
            r"cu_seqlens_k: expected 5 integers, as cu_seqlens has, got shape \[2\]"),
    BadCall("max_seqlen", swap(max_seqlen=15),
            r"max_seqlen: expected at least the 16 rows of segment 0, got 15", reads_values=True),
    BadCall("max_seqlen_negative", swap(max_seqlen=-1),
            r"max_seqlen: expected 0 or more, got -1"),
    BadCall("scale", swap(scale=math.inf), r"scale: expected a finite number, got inf"),
    BadCall("padding_dtype", lambda a: {**a, "padding": a["q"][:, 0, 0]},
            r"padding: expected dtype bool, got"),
    BadCall("padding_shape", lambda a: {**a, "padding": a["q"][1:, 0, 0] > 0},
            r"padding: expected shape \[44\].*one for each query"),
    BadCall("padding_causal", lambda a: {**a, "padding": a["q"][:, 0, 0] > 0, "causal": True},
            r"padding: expected none where causal"),
    BadCall("padding_cross", lambda a: {**a, "padding": a["q"][:, 0, 0] > 0,
                                        "cu_seqlens_k": a["cu_seqlens"]},
            r"padding: expected none where queries and keys have segments of their own"),
    BadCall("blocks_packed", lambda a: {**a, "block_mask": a["q"][None, :, :, 0] > 0},
            r"block_mask: expected none beside cu_seqlens"),
    BadCall("blocks_causal", lambda a: {**_in_blocks(a), "causal": True},
            r"block_mask: expected none beside .*causal"),
    BadCall("blocks_dtype", lambda a: {**_in_blocks(a), "block_mask": torch.ones(4, 11, 1)},
            r"block_mask: expected dtype bool, got"),
    BadCall("blocks_count", lambda a: {**_in_blocks(a), "tokens_per_block": 1},
            r"block_mask: expected shape \[4, 11, 11\].*got .*\[4, 11, 1\]"),
    BadCall("blocks_size", lambda a: {**_in_blocks(a), "tokens_per_block": 3},
            r"tokens_per_block: expected a number that divides the 11 keys of k"),
    BadCall("blocks_0", lambda a: {**_in_blocks(a), "tokens_per_block": 0},
            r"tokens_per_block: expected 1 or more, got 0"),
    BadCall("no_blocks", swap(tokens_per_block=2),
            r"tokens_per_block: expected 1 where there is no block_mask, got 2"),
    BadCall("blocks_no_tensor", lambda a: {**_in_blocks(a), "block_mask": [True]},
            r"block_mask: expected a torch.Tensor, got list", TypeError),
    BadCall("device", alter("k", lambda t: t.to("meta")), r"expected.* on .*got"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    return [args["q"], args["k"]]


def _flops(args: Arguments) -> float:
    """Of two products over the pairs that are seen."""
    q, starts = args["q"], args["cu_seqlens"]
    of_q, of_k = _lengths(q, starts), _lengths(args["k"], args["cu_seqlens_k"], starts)
    pairs = float(sum(n * m for n, m in zip(of_q, of_k, strict=True)))
    if args["padding"] is not None:
        hidden = args["padding"].flatten().split(of_q)
        pairs -= sum(int(h.sum()) ** 2 for h in hidden)
    if args["block_mask"] is not None:
        pairs = float(args["block_mask"].sum()) * args["tokens_per_block"]
    if args["causal"]:
        pairs -= sum(n * (n - 1) // 2 for n in of_q)
    return float(4 * q.shape[-1] * q.shape[-2] * pairs)


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    return BenchCase(name, _inputs(*inputs, **options), moved=_moved, flops=_flops)


# 74 x 74 patches: 86 windows of 64 would be 5,504; the edges of a page have smaller ones.
_WINDOWS = [64] * 81 + [16] * 17 + [4] + [16]

_BENCH = [
    _bench("qwen2_5_vl_windows", [64] * 86, 16, 80, max_seqlen=64),
    _bench("qwen2_5_vl_edges", _WINDOWS, 16, 80, max_seqlen=64),
    _bench("qwen2_5_vl_full", [5476], 16, 80),
    _bench("qwen3_vl", [4096], 16, 72),
    _bench("tokens_4100", [4100], 16, 80),
    _bench("clip_l_336_x5", [577] * 5, 16, 64, batched=True),
    _bench("internvit_300m_x13", [1025] * 13, 16, 64, batched=True),
    _bench("siglip_384", [729], 16, 72, batched=True),
    _bench("mllama_1_tile", [6432], 16, 80, batched=True, padding=[4831]),
    _bench("mllama_text_1", [1], 32, 128, keys=[6404], kv_heads=8, batched=True, blocks=4,
           seen=3),
    _bench("mllama_text_64", [64], 32, 128, keys=[6404], kv_heads=8, batched=True, blocks=4,
           seen=3),
    _bench("mllama_text_512", [512], 32, 128, keys=[6404], kv_heads=8, batched=True, blocks=4,
           seen=3),
    _bench("decode_b1", [1], 14, 64, keys=[1312], kv_heads=2, batched=True, layout="heads_first"),
    _bench("decode_b16", [1] * 16, 14, 64, keys=[1312] * 16, kv_heads=2, batched=True,
           layout="heads_first"),
]  # fmt: skip


SPEC = Spec(
    op="packed_attention",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("q", "k", "v"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("several", "gqa", "gqa_causal", "one_kv_head", "few_queries", "few_causal", "contiguous",
           "heads_first", "channels_apart", "odd", "expanded", "dim_8", "dim_96", "dim_128",
           "dim_168", "dim_256", "long", "long_padding", "long_causal", "steep", "scale",
           "siglip", "eva"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    peers=peers,
    yardstick_for=yardstick_for,
    multiplies_bf16=True,
)  # fmt: skip
