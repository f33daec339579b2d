"""Cases, benchmark shapes and bad calls of `vlmops.perceiver_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops import packed_attention_spec as core
from vlmops.ops.perceiver_attention import perceiver_attention, reference
from vlmops.ops.qformer_attention import of_queries
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (perceiver_attention(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


_HEADS = ("q", "k", "v", "k_latents", "v_latents")


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    mask = of_queries(args["key_mask"], args["q"])
    rest = (args[name] for name in ("key_lengths", "scale", "tokens_per_block"))
    return *(args[name] for name in _HEADS), mask, *rest


def _inputs(
    batch: int,
    latents: int,
    media: int,
    heads: int = 2,
    dim: int = 16,
    *,
    kv_heads: int | None = None,
    own: int | None = None,
    blocks: Sequence[int] | None = None,
    of: int = 1,
    per_latent: bool = False,
    lengths: Sequence[int] | None = None,
    layout: str = "contiguous",
    spread: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``own``: keys of the latents, if not one each. ``blocks``: that each sample sees, ``of`` all.

    ``per_latent``: the first latent sees none of them. ``layout``, ``spread``: see packed
    attention's.
    """
    keys = latents if own is None else own
    of_media, of_latents = (
        core._inputs(
            [latents] * batch, heads, dim, keys=[n] * batch, kv_heads=kv_heads, layout=layout,
            batched=True, spread=spread,
        )
        for n in (media, keys)
    )  # fmt: skip

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        args, more = of_media(dtype, device), of_latents(dtype, device)
        mask = None if blocks is None else torch.arange(of) < torch.tensor(blocks)[:, None]
        if mask is not None and per_latent:
            mask = mask[:, None].repeat(1, latents, 1)
            mask[:, 0] = False
        counts = None if lengths is None else torch.tensor(lengths)
        return {
            **{name: args[name] for name in ("q", "k", "v")},
            "k_latents": more["k"],
            "v_latents": more["v"],
            "key_mask": None if mask is None else mask.to(device),
            "tokens_per_block": 1 if mask is None else media // of,
            "key_lengths": None if counts is None else counts.to(device),
            "scale": None,
            **options,
        }

    return make


_ROWS = {
    # As models have it.
    "idefics2": _inputs(2, 9, 3 * 20, 4, 96, kv_heads=2, blocks=[3, 1], of=3),
    "idefics": _inputs(2, 8, 57, 2, 96),
    "flamingo": _inputs(3, 7, 40, 2, 64, lengths=[40, 0, 13], layout="fused"),
    "per_token": _inputs(2, 5, 21, blocks=[21, 4], of=21, per_latent=True, kv_heads=1),
    # Options.
    "long": _inputs(1, 3, 1100, 1, 16),
    "mask_and_lengths": _inputs(2, 5, 70, blocks=[5, 1], of=7, lengths=[31, 70]),
    "no_latents": _inputs(2, 5, 40, own=0, lengths=[40, 0]),
    "one_latent": _inputs(2, 1, 12, lengths=[1, 0]),
    "steep": _inputs(1, 33, 70, 1, 64, scale=-3.0),
    "scale_0": _inputs(1, 3, 9, scale=0.0),
    "strided": _inputs(2, 5, 9, layout="channels_apart"),
    "no_media": _inputs(2, 5, 0),
    "no_queries": _inputs(2, 0, 9, own=3),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("per_token", "no_latents", "no_media")
FEW = [case for case in CASES if case.name in _FEW]


def _joined(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Attention over keys of media and latents in one tensor, as models' code has it."""

    def run(**args: Any) -> Any:
        q, k = args["q"], args["k"]
        media, own = k.shape[1], args["k_latents"].shape[1]
        mask = of_queries(args["key_mask"], q)
        if mask is not None:
            mask = mask.repeat_interleave(args["tokens_per_block"], 2)
        if args["key_lengths"] is not None:
            there = torch.arange(media, device=q.device) < args["key_lengths"][:, None, None]
            mask = there.expand(-1, q.shape[1], -1) if mask is None else mask & there
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:2], own)], 2)
        empty = dict.fromkeys(("cu_seqlens", "cu_seqlens_k", "padding", "key_lengths"))
        return attend(
            q=q, k=torch.cat([k, args["k_latents"]], 1),
            v=torch.cat([args["v"], args["v_latents"]], 1), block_mask=mask, tokens_per_block=1,
            causal=False, scale=args["scale"], **empty,
        )  # fmt: skip

    return run


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What models run: keys put into one tensor, two products around a softmax in float32."""
    return _joined(core.eager_for(args))


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """The same; in float32 torch's fused attention, see `packed_attention_spec`."""
    return _joined(core.yardstick_for(args))


def peers(args: Arguments) -> dict[str, Callable[..., Any]]:
    """Fused attention of torch over the joint keys."""
    return {"sdpa": _joined(core._sdpa_batched)}


# The good call is CASES[0]: q [2, 9, 4, 96], k and v [2, 60, 2, 96], k_latents and v_latents
# [2, 9, 2, 96], key_mask [2, 3], tokens_per_block 20. What the core checks is in its own list.
ERRORS = [
    BadCall("no_tensor", swap(q=3), r"q: expected a torch.Tensor, got int", TypeError),
    BadCall("latents_no_tensor", swap(k_latents=None),
            r"k_latents: expected a torch.Tensor, got NoneType", TypeError),
    BadCall("rank", alter("q", lambda t: t[0]),
            r"q: expected \[B, S, H, D\].*got shape \[9, 4, 96\]"),
    BadCall("batch", alter("q", lambda t: t[:1]), r"k: expected a batch of 1, as q"),
    BadCall("latents_batch", lambda a: {**a, "k_latents": a["k_latents"][:1],
                                        "v_latents": a["v_latents"][:1]},
            r"k_latents: expected a batch of 2, as q"),
    BadCall("latents_values", alter("v_latents", lambda t: t[:, :-1]),
            r"v_latents: expected shape \[2, 9, 2, 96\], that is that of k_latents, got"),
    BadCall("latents_heads", lambda a: {**a, "k_latents": a["k_latents"][:, :, :1],
                                        "v_latents": a["v_latents"][:, :, :1]},
            r"k_latents: expected the 2 heads of k \[2, 60, 2, 96\], got shape \[2, 9, 1, 96\]"),
    BadCall("latents_channels", lambda a: {**a, "k_latents": a["k_latents"][..., :64],
                                           "v_latents": a["v_latents"][..., :64]},
            r"k_latents: expected heads of 96 channels"),
    BadCall("latents_dtype", alter("v_latents", Tensor.double),
            r"v_latents: expected dtype float32, that of q, got float64"),
    BadCall("mask", alter("key_mask", lambda t: t[:, :2]),
            r"key_mask: expected shape \[2, 9, 3\].*got \[2, 9, 2\]"),
    BadCall("mask_dtype", alter("key_mask", Tensor.long),
            r"key_mask: expected dtype bool, got int64"),
    BadCall("block", swap(tokens_per_block=16),
            r"tokens_per_block: expected a number that divides the 60 keys of k"),
    BadCall("block_alone", swap(key_mask=None),
            r"tokens_per_block: expected 1 where there is no key_mask, got 20"),
    BadCall("lengths_many", swap(key_lengths=torch.tensor([3, 61])),
            r"key_lengths: expected 0 to 60.*got 61 at 1"),
    BadCall("lengths_shape", swap(key_lengths=torch.tensor([3])),
            r"key_lengths: expected shape \[2\]"),
    BadCall("scale", swap(scale=float("nan")), r"scale: expected a finite number"),
    BadCall("device", alter("k_latents", lambda t: t.to("meta")), r"expected.* on .*got"),
]  # fmt: skip


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    def flops(args: Arguments) -> float:
        return float(4 * args["q"].numel() * (args["k"].shape[1] + args["k_latents"].shape[1]))

    return BenchCase(name, _inputs(*inputs, **options), moved=lambda args: [args["k"]], flops=flops)


# Idefics2, one large image and a batch of eight, of which a half is padded; Idefics; Flamingo with
# eight images of 576 tokens.
_BENCH = [
    _bench("idefics2_4900", 1, 64, 4900, 16, 96, kv_heads=4),
    _bench("idefics2_b8", 8, 64, 980, 16, 96, kv_heads=4, lengths=[980, 490] * 4),
    _bench("idefics_b8", 8, 64, 257, 16, 96),
    _bench("flamingo_8_images", 1, 64, 8 * 576, 16, 64),
]


SPEC = Spec(
    op="perceiver_attention",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=_HEADS,
    written=(),
    cases=CASES,
    few=FEW,
    alike=("idefics", "long", "mask_and_lengths", "one_latent", "steep", "scale_0", "strided"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    peers=peers,
    yardstick_for=yardstick_for,
    multiplies_bf16=True,
)
