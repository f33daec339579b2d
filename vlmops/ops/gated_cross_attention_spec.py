"""Cases, benchmark shapes and bad calls of `vlmops.gated_cross_attention`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.ops import packed_attention_spec as core
from vlmops.ops.gated_cross_attention import Options, gated_cross_attention, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (gated_cross_attention(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    return tuple(args[name] for name in ("q", "k", "v", *Options._fields))


def _inputs(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    blocks: int | None = None,
    seen: int | None = None,
    lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    norms: str = "",
    norm_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    spread: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``norms`` of "q", "k" or both. ``blocks``, ``seen``, ``layout``: see packed attention's."""
    of_core = core._inputs(
        [queries] * batch, heads, dim, keys=[keys] * batch, kv_heads=kv_heads, layout=layout,
        batched=True, blocks=blocks, seen=seen, spread=spread,
    )  # fmt: skip

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        args = of_core(dtype, device)
        weights = (torch.randn(dim, device=device) + 1.0).to(norm_dtype or dtype)
        counts = None if lengths is None else torch.tensor(lengths, dtype=lengths_dtype)
        return {
            **{name: args[name] for name in ("q", "k", "v", "block_mask", "tokens_per_block")},
            "key_lengths": None if counts is None else counts.to(device),
            "scale": None,
            "q_norm_weight": weights if "q" in norms else None,
            "k_norm_weight": weights.flip(0) if "k" in norms else None,
            "norm_eps": 1e-6,
            **options,
        }

    return make


_ROWS = {
    # As models have it.
    "mllama": _inputs(2, 9, 4 * 17, 4, 2, 128, blocks=4, norms="qk", norm_eps=1e-5),
    "mllama_step": _inputs(2, 1, 4 * 23, 8, 2, 64, blocks=4, norms="q", layout="heads_first"),
    "idefics": _inputs(2, 40, 3 * 16, 2, 2, 96, blocks=3),
    "idefics_norms": _inputs(1, 5, 2 * 9, 2, 2, 16, blocks=2, norms="qk"),
    "flamingo": _inputs(2, 7, 3 * 8, 2, 2, 64, blocks=3, layout="fused"),
    # Options.
    "lengths": _inputs(3, 5, 40, 2, 1, 16, lengths=[40, 0, 19], lengths_dtype=torch.int32),
    "lengths_blocks": _inputs(2, 70, 3 * 30, 2, 2, 32, lengths=[61, 7], blocks=3, norms="qk"),
    "lengths_step": _inputs(2, 1, 150, 3, 1, 64, lengths=[149, 64]),
    "k_norm": _inputs(1, 3, 9, 2, 2, 16, norms="k", scale=0.3),
    "steep": _inputs(1, 6, 70, 2, 2, 64, norms="qk", scale=3.0),
    "steep_blocks": _inputs(1, 20, 4 * 20, 2, 1, 64, blocks=4, spread=80.0),
    "one_key": _inputs(2, 3, 4, 2, 2, 16, norms="qk", lengths=[1, 4]),
    "wide_norm": _inputs(1, 4, 9, 2, 2, 16, norms="qk", norm_dtype=torch.float32),
    "strided": _inputs(2, 19, 33, 2, 2, 32, norms="qk", layout="channels_apart"),
    "no_queries": _inputs(2, 0, 9, 2, 2, 16, norms="qk"),
    "no_keys": _inputs(2, 3, 0, 2, 2, 16, norms="qk"),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("idefics_norms", "lengths", "no_keys")
FEW = [case for case in CASES if case.name in _FEW]


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As MllamaTextRMSNorm and IdeficsRMSNorm have it."""
    if weight is None:
        return x
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _with_norms(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The model's norms, then attention as `packed_attention_spec` has it."""

    def run(**args: Any) -> Any:
        eps = args["norm_eps"]
        options = {name: args[name] for name in ("v", "block_mask", "tokens_per_block", "scale")}
        empty = dict.fromkeys(("cu_seqlens", "cu_seqlens_k", "padding"))
        return attend(
            q=_normed(args["q"], args["q_norm_weight"], eps).to(args["q"].dtype),
            k=_normed(args["k"], args["k_norm_weight"], eps).to(args["k"].dtype),
            key_lengths=args["key_lengths"], causal=False, **empty, **options,
        )  # fmt: skip

    return run


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What models run: norms, two products around a softmax in float32."""
    return _with_norms(core.eager_for(args))


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """The same; in float32 with torch's fused attention, see `packed_attention_spec`.

    With norms and steep logits in any dtype: rounding the result costs rowsum(grad * out) digits,
    which the weights of the norms make larger, and every fused backward starts from that sum.
    """
    steep = args["scale"] is not None and args["scale"] > 1.0
    return _with_norms(core._per_segment(core._sdpa) if steep else core.yardstick_for(args))


def peers(args: Arguments) -> dict[str, Callable[..., Any]]:
    """Fused attention of torch, with the expanded mask, as models call it and as they could."""
    found = {"sdpa": _with_norms(core._sdpa_batched)}
    if args["q"].shape[2] != args["k"].shape[2]:
        found["sdpa_folded"] = _with_norms(core._sdpa_folded)
    return found


# The good call is CASES[0]: q [2, 9, 4, 128], k and v [2, 68, 2, 128], block_mask [2, 9, 4].
ERRORS = [
    BadCall("no_tensor", swap(q=3), r"q: expected a torch.Tensor, got int", TypeError),
    BadCall("norm_no_tensor", swap(q_norm_weight=1.0),
            r"q_norm_weight: expected a torch.Tensor, got float", TypeError),
    BadCall("rank", alter("q", lambda t: t[0]),
            r"q: expected \[B, S, H, D\].*got shape \[9, 4, 128\]"),
    BadCall("float64", alter("q", Tensor.double),
            r"q: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("v_keys", alter("v", lambda t: t[:, :-1]),
            r"v: expected shape \[2, 68, 2, 128\], that is that of k, got \[2, 67, 2, 128\]"),
    BadCall("heads", lambda a: {**a, "q": a["q"][:, :, :3]},
            r"k: expected a number of heads that divides q's 3"),
    BadCall("tiles", alter("block_mask", lambda t: t[..., :3]),
            r"block_mask: expected shape \[2, 9, 4\].*got \[2, 9, 3\]"),
    BadCall("tiles_of_text", alter("block_mask", lambda t: t[:, :8]),
            r"block_mask: expected shape \[2, 9, 4\].*got \[2, 8, 4\]"),
    BadCall("tile_size", swap(tokens_per_block=16),
            r"tokens_per_block: expected a number that divides the 68 keys of k"),
    BadCall("mask_dtype", alter("block_mask", Tensor.float),
            r"block_mask: expected dtype bool, got float32"),
    BadCall("lengths_shape", swap(key_lengths=torch.tensor([3])),
            r"key_lengths: expected shape \[2\], that is one for each row of the batch, got \[1\]"),
    BadCall("lengths_dtype", swap(key_lengths=torch.tensor([3.0, 4.0])),
            r"key_lengths: expected an integer dtype"),
    BadCall("lengths_int16", swap(key_lengths=torch.tensor([3, 4], dtype=torch.int16)),
            r"key_lengths: expected dtype int32 or int64, got int16"),
    BadCall("lengths_many", swap(key_lengths=torch.tensor([3, 69])),
            r"key_lengths: expected 0 to 68.*got 69 at 1"),
    BadCall("lengths_negative", swap(key_lengths=torch.tensor([-1, 3])),
            r"key_lengths: expected 0 to 68.*got -1 at 0"),
    BadCall("norm_size", alter("q_norm_weight", lambda t: t[:64]),
            r"q_norm_weight: expected shape \[128\], that is \[D\].*got \[64\]"),
    BadCall("norm_rank", alter("k_norm_weight", lambda t: t[None]),
            r"k_norm_weight: expected shape \[128\].*got \[1, 128\]"),
    BadCall("norm_dtype", alter("k_norm_weight", Tensor.double),
            r"k_norm_weight: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("eps", swap(norm_eps=0.0), r"norm_eps: expected a positive, finite .* got 0"),
    BadCall("scale", swap(scale=float("nan")), r"scale: expected a finite number"),
    BadCall("device", alter("k", lambda t: t.to("meta")), r"expected.* on .*got"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """K and V of the blocks that are seen; q and the result where they are more."""
    k, mask = args["k"], args["block_mask"]
    if mask is not None:
        k = k[:, : int(mask.any(1).any(0).sum()) * args["tokens_per_block"]]
    return [k] if k.numel() > args["q"].numel() else [args["q"]]


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    def flops(args: Arguments) -> float:
        q = args["q"]
        seen = args["block_mask"].sum() * args["tokens_per_block"]
        return float(4 * q.shape[2] * q.shape[3] * seen)

    return BenchCase(name, _inputs(*inputs, **options), moved=_moved, flops=flops)


# A layer of Llama-3.2-11B-Vision, of whose four tiles the image fills three; keys that are kept are
# normed already. Idefics-9B, two images.
_MLLAMA: Any = {"blocks": 4, "seen": 3, "norms": "q", "norm_eps": 1e-5}
_BENCH = [
    _bench("mllama_1", 1, 1, 6404, 32, 8, 128, layout="heads_first", **_MLLAMA),
    _bench("mllama_1_b16", 16, 1, 6404, 32, 8, 128, layout="heads_first", **_MLLAMA),
    _bench("mllama_64", 1, 64, 6404, 32, 8, 128, **{**_MLLAMA, "norms": "qk"}),
    _bench("mllama_512", 1, 512, 6404, 32, 8, 128, **{**_MLLAMA, "norms": "qk"}),
    _bench("mllama_2048", 1, 2048, 6404, 32, 8, 128, **{**_MLLAMA, "norms": "qk"}),
    _bench("idefics_1", 1, 1, 128, 32, 32, 128, blocks=2, seen=2, layout="heads_first"),
    _bench("idefics_512", 1, 512, 128, 32, 32, 128, blocks=2, seen=2),
]


SPEC = Spec(
    op="gated_cross_attention",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("q", "k", "v", "q_norm_weight", "k_norm_weight"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("idefics_norms", "flamingo", "steep", "steep_blocks", "wide_norm", "strided",
           "one_key", "lengths_step"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    peers=peers,
    yardstick_for=yardstick_for,
    multiplies_bf16=True,
)  # fmt: skip
