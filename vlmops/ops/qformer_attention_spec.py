"""Cases, benchmark shapes and bad calls of `vlmops.qformer_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops import packed_attention_spec as core
from vlmops.ops.qformer_attention import of_queries, qformer_attention, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (qformer_attention(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


def _whole_q(args: Arguments) -> Tensor:
    q: Tensor = args["q"].expand(args["k"].shape[0], -1, -1, -1)
    return q


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    q = _whole_q(args)
    mask = of_queries(args["key_mask"], q)
    return q, args["k"], args["v"], mask, args["key_lengths"], args["scale"]


def _inputs(
    batch: int,
    queries: int,
    keys: int,
    heads: int = 2,
    dim: int = 64,
    *,
    kv_heads: int | None = None,
    shared: bool = False,
    padded: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    layout: str = "contiguous",
    per_query: bool = False,
    spread: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``shared``: q of batch 1. ``padded``: of each sample's keys, the last that nobody sees.

    ``per_query``: and of the first query another is hidden. ``layout``, ``spread``: see packed
    attention's.
    """
    of_core = core._inputs(
        [queries] * batch, heads, dim, keys=[keys] * batch, kv_heads=kv_heads, layout=layout,
        batched=True, spread=spread,
    )  # fmt: skip

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        args = of_core(dtype, device)
        mask = None
        if padded is not None:
            mask = torch.arange(keys) < keys - torch.tensor(padded)[:, None]
        if mask is not None and per_query:
            mask = mask[:, None].repeat(1, queries, 1)
            mask[:, 0, 1] = False
        counts = None if lengths is None else torch.tensor(lengths)
        return {
            "q": args["q"][:1] if shared else args["q"],
            "k": args["k"],
            "v": args["v"],
            "key_mask": None if mask is None else mask.to(device),
            "key_lengths": None if counts is None else counts.to(device),
            "scale": None,
            **options,
        }

    return make


_ROWS = {
    # As models have it.
    "instructblip": _inputs(3, 41, 41, padded=[0, 9, 4], layout="fused"),
    "blip2": _inputs(2, 32, 57, shared=True),
    "qwen_vl": _inputs(2, 40, 70, 1, 128, shared=True),
    "blip_step": _inputs(2, 1, 77, 4),
    "per_query": _inputs(2, 9, 21, 2, 16, padded=[3, 20], per_query=True, kv_heads=1),
    # Options.
    "lengths": _inputs(3, 5, 40, 2, 16, lengths=[40, 0, 19], shared=True),
    "all_hidden": _inputs(2, 5, 9, 2, 16, padded=[9, 2]),
    "mask_and_lengths": _inputs(2, 5, 70, 2, 16, padded=[3, 30], lengths=[50, 70]),
    "steep": _inputs(1, 33, 70, 2, 64, scale=-3.0, padded=[6]),
    "strided": _inputs(2, 19, 33, 2, 32, layout="channels_apart", shared=True),
    "no_queries": _inputs(2, 0, 9, 2, 16),
    "no_keys": _inputs(2, 3, 0, 2, 16),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("per_query", "lengths")
FEW = [case for case in CASES if case.name in _FEW]


def _of_core(args: Arguments) -> Arguments:
    """The arguments of packed attention."""
    q = _whole_q(args)
    empty = dict.fromkeys(("cu_seqlens", "cu_seqlens_k", "padding"))
    return {
        **empty, "q": q, "k": args["k"], "v": args["v"], "key_lengths": args["key_lengths"],
        "block_mask": of_queries(args["key_mask"], q), "tokens_per_block": 1, "causal": False,
        "scale": args["scale"],
    }  # fmt: skip


def _as_core(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **args: attend(**_of_core(args))


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What models run: two products around a softmax in float32."""
    return _as_core(core.eager_for(args))


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """The same; in float32 torch's fused attention, see `packed_attention_spec`."""
    return _as_core(core.yardstick_for(args))


def peers(args: Arguments) -> dict[str, Callable[..., Any]]:
    """Fused attention of torch."""
    return {"sdpa": _as_core(core._sdpa_batched)} if args["key_lengths"] is None else {}


# The good call is CASES[0]: q, k and v [3, 41, 2, 64], key_mask [3, 41]. What the core checks is in
# its own list; these are what the op calls otherwise.
ERRORS = [
    BadCall("no_tensor", swap(q=3), r"q: expected a torch.Tensor, got int", TypeError),
    BadCall("mask_no_tensor", swap(key_mask=[True]),
            r"key_mask: expected a torch.Tensor, got list", TypeError),
    BadCall("rank", alter("q", lambda t: t[0]),
            r"q: expected \[B, S, H, D\].*got shape \[41, 2, 64\]"),
    BadCall("batch", alter("q", lambda t: t[:2]), r"k: expected a batch of 2, as q"),
    BadCall("v_keys", alter("v", lambda t: t[:, :-1]),
            r"v: expected shape \[3, 41, 2, 64\], that is that of k, got \[3, 40, 2, 64\]"),
    BadCall("heads", lambda a: {**a, "k": a["k"][:, :, :0], "v": a["v"][:, :, :0]},
            r"k: expected a number of heads that divides q's 2"),
    BadCall("mask_keys", alter("key_mask", lambda t: t[:, :-1]),
            r"key_mask: expected shape \[3, 41, 41\].*got \[3, 41, 40\]"),
    BadCall("mask_batch", alter("key_mask", lambda t: t[:2]),
            r"key_mask: expected shape \[3, 41, 41\].*got \[2, 41, 41\]"),
    BadCall("mask_rank", alter("key_mask", lambda t: t[:, None, None]),
            r"key_mask: expected shape \[3, 41, 41\].*got \[3, 1, 1, 41\]"),
    BadCall("mask_dtype", alter("key_mask", Tensor.long),
            r"key_mask: expected dtype bool, got int64"),
    BadCall("lengths_shape", swap(key_lengths=torch.tensor([3])),
            r"key_lengths: expected shape \[3\], that is one for each row of the batch, got \[1\]"),
    BadCall("lengths_many", swap(key_lengths=torch.tensor([3, 42, 1])),
            r"key_lengths: expected 0 to 41.*got 42 at 1"),
    BadCall("scale", swap(scale=float("nan")), r"scale: expected a finite number"),
    BadCall("device", alter("k", lambda t: t.to("meta")), r"expected.* on .*got"),
]  # fmt: skip


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    def flops(args: Arguments) -> float:
        q, k = _whole_q(args), args["k"]
        return float(4 * q.numel() * k.shape[1])

    def moved(args: Arguments) -> list[Tensor]:
        q = _whole_q(args)
        return [args["k"]] if args["k"].numel() > q.numel() else [q]

    return BenchCase(name, _inputs(*inputs, **options), moved=moved, flops=flops)


# BLIP-2's cross-attention at several batches; InstructBLIP's self-attention over 32 queries and as
# many tokens; BLIP's decoder; the resampler of Qwen-VL.
_BENCH = [
    *(_bench(f"blip2_b{batch}", batch, 32, 257, 12, 64) for batch in (1, 5, 8, 64)),
    _bench("instructblip_self_b8", 8, 64, 64, 12, 64, padded=[0, 5, 9, 12, 20, 24, 30, 32]),
    _bench("blip_text", 4, 20, 577, 12, 64),
    _bench("blip_step", 4, 1, 577, 12, 64, layout="heads_first"),
    _bench("qwen_vl", 4, 256, 1024, 32, 128, shared=True),
]


SPEC = Spec(
    op="qformer_attention",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("q", "k", "v"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("qwen_vl", "blip_step", "steep", "mask_and_lengths", "strided"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    peers=peers,
    yardstick_for=yardstick_for,
    multiplies_bf16=True,
)
