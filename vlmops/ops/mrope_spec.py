"""Cases, benchmark shapes and bad calls of `vlmops.mrope`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops.bench.shapes import MODELS, Model, Text, Tower
from vlmops.ops.mrope import Rotation, mrope, mrope_, mrope_freq_axis, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, swap


def _empty(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Q or k of ``shape`` with the strides that ``layout`` names; the contents are drawn later."""
    empty: Callable[..., Tensor] = functools.partial(torch.empty, dtype=dtype, device=device)
    if layout == "view":  # Hugging Face: [B, H, S, D] seen through a transpose of [B, S, H, D]
        b, h, s, d = shape
        return empty(b, s, h, d).transpose(1, 2)
    if layout == "fused":  # towers: [N, H, D], every third block of a fused qkv
        n, h, d = shape
        return empty(n, 3, h, d).unbind(1)[1]
    if layout == "channels":  # neighbouring channels do not lie side by side
        return empty(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "expanded":  # one head seen as many
        return empty(shape[0], 1, *shape[2:]).expand(shape)
    if layout == "unaligned":  # an element past where a wide access may start
        return empty(math.prod(shape) + 1)[1:].view(shape)
    return empty(shape)


def _inputs(
    batch: int | None = 2,
    tokens: int = 17,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 128,
    sections: tuple[int, ...] = (16, 24, 24),
    interleaved: bool = False,
    rotation: Rotation = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    layout: str = "view",
    ids: Callable[..., Tensor] | None = None,
    max_id: int = 5000,
    id_dtype: torch.dtype = torch.int64,
    freq_dtype: torch.dtype = torch.float32,
    norms: str = "",
    norm_dtype: torch.dtype | None = None,
    norm_offset: float = 0.0,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``batch=None`` gives the packed form ``[N, H, D]``; ``norms`` names those of q and k to norm.

    The weights have the dtype of q unless ``norm_dtype`` is given.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        def rows(h: int) -> Tensor:
            if batch is None:
                shape: tuple[int, ...] = (tokens, h, head_dim)
            elif head_axis == 1:
                shape = (batch, h, tokens, head_dim)
            else:
                shape = (batch, tokens, h, head_dim)
            x = _empty(shape, layout, dtype, device)
            if layout == "expanded":
                x._base.normal_()  # type: ignore[union-attr]
                return x
            return x.normal_()

        def weight() -> Tensor:
            scattered = torch.empty(head_dim, 3, dtype=norm_dtype or dtype, device=device)
            return scattered.normal_(1.0 - norm_offset, 0.3)[:, 1]

        frequencies = sum(sections)
        shape = (len(sections), tokens) if batch is None else (len(sections), batch, tokens)
        position_ids = torch.randint(max_id + 1, shape) if ids is None else ids(shape)
        inv_freq = 10000.0 ** -(torch.arange(frequencies) / max(frequencies, 1))
        return {
            "q": rows(heads[0]),
            "k": rows(heads[1]),
            "position_ids": position_ids.to(device=device, dtype=id_dtype),
            "inv_freq": inv_freq.to(device=device, dtype=freq_dtype),
            "freq_axis": mrope_freq_axis(sections, interleaved).to(device),
            "rotation": rotation,
            "scaling": scaling,
            "head_axis": head_axis,
            "q_norm_weight": weight() if "q" in norms else None,
            "k_norm_weight": weight() if "k" in norms else None,
            "norm_eps": 1e-6,
            "norm_offset": norm_offset,
        }

    return make


def _text_ids(shape: tuple[int, ...]) -> Tensor:
    """Text: all axes count alike, one row of memory seen as many."""
    return torch.arange(shape[-1]).expand(shape)


def _transposed_ids(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(5000, shape[::-1]).permute(*reversed(range(len(shape))))


def _grid_ids(shape: tuple[int, ...]) -> Tensor:
    """Rows and columns of an image's patches: [2, N] seen through a transpose, as in towers."""
    patch = torch.arange(shape[-1])
    width = max(math.isqrt(shape[-1]), 1)
    return torch.stack((patch // width, patch % width), dim=-1).T


def _negative_ids(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-5000, 5000, shape)


CASES = [
    Case("qwen2vl_s17", _inputs()),
    Case("qwen3vl_norm_s33", _inputs(tokens=33, sections=(24, 20, 20), interleaved=True,
                                     norms="qk")),
    Case("qwen2vl_s1", _inputs(tokens=1, heads=(28, 4))),
    Case("qwen2vl_threads_s131", _inputs(tokens=131, heads=(28, 4))),
    Case("qwen2vl_text_s67", _inputs(tokens=67, ids=_text_ids)),
    Case("qwen3vl_interleaved_s33", _inputs(tokens=33, sections=(24, 20, 20), interleaved=True)),
    Case("glm4v_pairs_partial", _inputs(sections=(8, 12, 12), rotation="pairs")),
    Case("tower_d80_fused", _inputs(batch=None, tokens=50, heads=(16, 16), head_dim=80,
                                    sections=(20, 20), layout="fused", max_id=64)),
    Case("tower_d72_fused", _inputs(batch=None, heads=(3, 3), head_dim=72, sections=(18, 18),
                                    layout="fused", max_id=64)),
    Case("tower_d88_pairs", _inputs(batch=None, heads=(2, 2), head_dim=88, sections=(22, 22),
                                    rotation="pairs", layout="contiguous")),
    Case("llama_one_axis", _inputs(sections=(64,), layout="contiguous")),
    Case("partial_half_d256_r32", _inputs(head_dim=256, sections=(32,))),
    Case("one_head", _inputs(heads=(1, 1))),
    Case("no_k_heads", _inputs(heads=(4, 0))),
    Case("bshd", _inputs(head_axis=2, layout="contiguous")),
    Case("bshd_strided", _inputs(head_axis=2, layout="view", heads=(5, 3))),
    Case("odd_r3_half", _inputs(head_dim=6, sections=(1, 1, 1))),
    Case("odd_r23_half", _inputs(head_dim=46, sections=(11, 6, 6))),
    Case("odd_r23_pairs", _inputs(head_dim=50, sections=(11, 6, 6), rotation="pairs")),
    Case("one_channel_pair", _inputs(head_dim=2, sections=(1,))),
    Case("no_frequencies", _inputs(sections=(0,))),
    Case("scaled_yarn", _inputs(scaling=1.3)),
    Case("channels_strided", _inputs(layout="channels")),
    Case("channels_strided_pairs", _inputs(layout="channels", rotation="pairs", head_dim=40,
                                           sections=(7, 6, 6))),
    Case("expanded_heads", _inputs(layout="expanded")),
    Case("unaligned", _inputs(layout="unaligned")),
    Case("ids_to_1e6", _inputs(max_id=10**6, tokens=41)),
    Case("ids_to_2p24", _inputs(max_id=2**24, tokens=41, layout="contiguous")),
    Case("ids_negative", _inputs(ids=_negative_ids)),
    Case("ids_transposed", _inputs(ids=_transposed_ids)),
    Case("ids_int32", _inputs(id_dtype=torch.int32)),
    Case("ids_uint8", _inputs(id_dtype=torch.uint8, max_id=255)),
    Case("inv_freq_bf16", _inputs(freq_dtype=torch.bfloat16)),
    Case("empty_sequence", _inputs(tokens=0)),
    Case("empty_batch", _inputs(batch=0)),
    Case("norm_threads_s131", _inputs(tokens=131, heads=(17, 3), norms="qk")),
    Case("norm_s1", _inputs(tokens=1, heads=(32, 8), norms="qk")),
    Case("norm_q_alone", _inputs(norms="q", heads=(17, 2))),
    Case("norm_k_alone", _inputs(norms="k", layout="contiguous")),
    Case("norm_gemma_d256", _inputs(norms="qk", norm_offset=1.0, head_dim=256, sections=(128,))),
    Case("norm_pairs_partial", _inputs(norms="qk", sections=(8, 12, 12), rotation="pairs")),
    Case("norm_half_partial_d256_r32", _inputs(norms="qk", norm_offset=1.0, head_dim=256,
                                               sections=(32,))),
    Case("norm_d72_fused", _inputs(norms="qk", batch=None, heads=(3, 3), head_dim=72,
                                   sections=(18, 18), layout="fused", max_id=64)),
    Case("norm_d80_pairs", _inputs(norms="qk", batch=None, heads=(3, 3), head_dim=80,
                                   sections=(20, 20), rotation="pairs", layout="contiguous")),
    Case("norm_d88", _inputs(norms="qk", head_dim=88, sections=(22, 22))),
    Case("norm_odd_r23_half", _inputs(norms="qk", head_dim=50, sections=(11, 6, 6))),
    Case("norm_odd_r5_half", _inputs(norms="qk", head_dim=10, sections=(2, 2, 1))),
    Case("norm_no_frequencies", _inputs(norms="qk", sections=(0,))),
    Case("norm_bshd_strided", _inputs(norms="qk", head_axis=2, layout="view", heads=(5, 3))),
    Case("norm_channels_strided", _inputs(norms="qk", layout="channels", scaling=1.3)),
    Case("norm_channels_strided_pairs", _inputs(norms="qk", layout="channels", rotation="pairs",
                                                head_dim=40, sections=(6, 6, 6))),
    Case("norm_expanded_heads", _inputs(norms="qk", layout="expanded")),
    Case("norm_unaligned", _inputs(norms="qk", layout="unaligned")),
    Case("norm_weight_fp32", _inputs(norms="qk", norm_dtype=torch.float32)),
    Case("norm_weight_bf16", _inputs(norms="qk", norm_dtype=torch.bfloat16, norm_offset=1.0)),
    Case("norm_weight_fp16", _inputs(norms="qk", norm_dtype=torch.float16)),
    Case("norm_widest", _inputs(norms="qk", head_dim=2048, sections=(1009,), tokens=3,
                                heads=(2, 1))),
    Case("norm_no_k_heads", _inputs(norms="qk", heads=(4, 0))),
    Case("norm_empty_sequence", _inputs(norms="qk", tokens=0)),
    Case("empty_packed", _inputs(batch=None, tokens=0, layout="contiguous")),
]  # fmt: skip

_TINY: dict[str, Any] = {"batch": 1, "tokens": 2, "heads": (3, 2)}
_TWO: dict[str, Any] = {**_TINY, "batch": 2}

FEW = [
    Case("tiny_qwen2vl", _inputs(**_TWO)),
    Case("tiny_norm", _inputs(**_TWO, norms="qk", sections=(24, 20, 20), interleaved=True)),
    Case("tiny_s1", _inputs(batch=1, tokens=1, heads=(28, 4))),
    Case("tiny_pairs_partial", _inputs(**_TINY, sections=(8, 12, 12), rotation="pairs")),
    Case("tiny_half_partial", _inputs(**_TINY, head_dim=50, sections=(7, 6, 6), scaling=1.3)),
    Case("tiny_tower_d72", _inputs(batch=None, tokens=3, heads=(3, 3), head_dim=72,
                                   sections=(18, 18), layout="fused", max_id=64)),
    Case("tiny_bshd", _inputs(**_TWO, head_axis=2, ids=_transposed_ids, id_dtype=torch.int32)),
    Case("tiny_channels_strided", _inputs(**_TINY, layout="channels")),
    Case("tiny_channels_strided_pairs", _inputs(**_TINY, layout="channels", rotation="pairs",
                                                head_dim=40, sections=(7, 6, 6))),
    Case("tiny_unaligned", _inputs(**_TINY, layout="unaligned")),
    Case("tiny_expanded", _inputs(**_TINY, layout="expanded", ids=_negative_ids)),
    Case("tiny_ids_to_2p24", _inputs(batch=1, tokens=4, heads=(1, 1), max_id=2**24)),
    Case("tiny_ids_uint8", _inputs(**_TINY, id_dtype=torch.uint8, max_id=255,
                                   freq_dtype=torch.bfloat16)),
    Case("tiny_no_frequencies", _inputs(**_TINY, sections=(0,))),
    Case("tiny_no_k_heads", _inputs(batch=1, tokens=2, heads=(4, 0))),
    Case("tiny_no_q_heads_partial", _inputs(batch=1, tokens=2, heads=(0, 3), sections=(8, 8, 8))),
    Case("tiny_empty_sequence", _inputs(tokens=0)),
    Case("tiny_norm_q_alone", _inputs(norms="q", batch=1, tokens=2, heads=(11, 2), head_dim=256,
                                      sections=(128,), norm_offset=1.0)),
    Case("tiny_norm_k_alone", _inputs(**_TINY, norms="k", sections=(8, 12, 12),
                                      rotation="pairs", layout="contiguous")),
    Case("tiny_norm_partial_strided", _inputs(**_TINY, norms="qk", layout="channels", head_dim=88,
                                              sections=(19, 9, 9), norm_dtype=torch.float32)),
    Case("tiny_norm_no_frequencies", _inputs(**_TINY, norms="qk", sections=(0,))),
    Case("tiny_norm_empty_sequence", _inputs(norms="qk", tokens=0)),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    return [args["q"], args["k"]]


def _flops(args: Arguments) -> float:
    head_dim = args["q"].shape[-1]
    flops = 0.0
    for x, weight in (("q", "q_norm_weight"), ("k", "k_norm_weight")):
        # Per pair of channels 4 products, 2 sums; the norm squares, sums and scales twice.
        per_head = 6.0 * len(args["inv_freq"]) + (0 if args[weight] is None else 4.0 * head_dim)
        flops += args[x].numel() / head_dim * per_head
    return flops


def _bench(name: str, **kwargs: Any) -> BenchCase:
    return BenchCase(name, _inputs(**{"max_id": 4096, **kwargs}), _moved, _flops)


def _text(text: Text) -> dict[str, Any]:
    return {
        "batch": 1,
        "heads": (text.heads, text.kv_heads),
        "head_dim": text.head_dim,
        "sections": text.mrope_section,
        "interleaved": text.interleaved,
        "rotation": text.rotation,
        "norms": "qk" if text.norm else "",
    }


def _tower(tower: Tower) -> dict[str, Any]:
    return {
        "batch": None,
        "heads": (tower.heads, tower.heads),
        "head_dim": tower.head_dim,
        "sections": (tower.head_dim // 4, tower.head_dim // 4),
        "layout": "fused" if tower.fused else "contiguous",
        "ids": _grid_ids,
    }


def model_cases(model: Model, tokens: Sequence[int], patches: Sequence[int]) -> Iterator[BenchCase]:
    """Rotary of the text and of the tower."""
    for count in tokens:
        yield _bench(f"s{count}", **_text(model.text), tokens=count)
    for count in patches:
        yield _bench(f"tower_n{count}", **_tower(model.tower), tokens=count)


_QWEN2_VL = _text(MODELS["qwen2_vl-7b"].text)
_QWEN2_VL_TOWER = _tower(MODELS["qwen2_vl-7b"].tower)
_QWEN3_VL = _text(MODELS["qwen3_vl-8b"].text)

BENCH = {
    case.name: case
    for case in [
        _bench("decode_b1", **_QWEN2_VL, tokens=1),
        _bench("decode_b16", **{**_QWEN2_VL, "batch": 16}, tokens=1),
        _bench("s1024", **_QWEN2_VL, tokens=1024),
        _bench("s4096", **_QWEN2_VL, tokens=4096),
        _bench("s16384", **_QWEN2_VL, tokens=16384),
        _bench("tower_n4900", **_QWEN2_VL_TOWER, tokens=4900),
        _bench("tower_n16384", **_QWEN2_VL_TOWER, tokens=16384),
        _bench("norm_b1", **_QWEN3_VL, tokens=1),
        _bench("norm_s1024", **_QWEN3_VL, tokens=1024),
        _bench("norm_s4096", **_QWEN3_VL, tokens=4096),
    ]
}


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor, Tensor]]:
    """The steps of Hugging Face's Qwen2-VL in their order and dtypes, for every layout.

    Angles for all axes, cosine and sine in float32, recomposed from splits, cast to the dtype of q,
    then ``q * cos + rotate_half(q) * sin``. Towers, which are packed, cast q and k to float32 and
    the results back instead. In front the RMSNorm of Qwen3, or with an offset that of Gemma-3.
    """
    runs = [(axis, len(list(g))) for axis, g in itertools.groupby(args["freq_axis"].tolist())]
    axes, lengths = zip(*runs, strict=True) if runs else ((0,), (0,))

    def eager(
        q: Tensor,
        k: Tensor,
        position_ids: Tensor,
        inv_freq: Tensor,
        freq_axis: Tensor,
        *,
        rotation: Rotation = "half",
        scaling: float = 1.0,
        head_axis: int = 1,
        q_norm_weight: Tensor | None = None,
        k_norm_weight: Tensor | None = None,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float32 if q.dim() == 3 else q.dtype
        angles = position_ids[..., None].float() * inv_freq.float()  # [A, *tokens, R]

        def recompose(table: Tensor) -> Tensor:
            parts = zip(axes, table.split(lengths, dim=-1), strict=True)
            table = torch.cat([part[axis] for axis, part in parts], -1)
            doubled = torch.cat((table, table), -1)
            if rotation == "pairs":
                doubled = table.repeat_interleave(2, -1)
            return doubled.to(dtype).unsqueeze(head_axis)

        cos, sin = recompose(angles.cos() * scaling), recompose(angles.sin() * scaling)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm_eps)
            if norm_offset:
                return (y * (norm_offset + weight.float())).type_as(x)
            return (weight * y.to(x.dtype)).to(x.dtype)

        def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
            if weight is not None:
                x = norm(x, weight)
            x = x.to(dtype)
            head, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
            if rotation == "half":
                a, b = head.chunk(2, dim=-1)
                turned = torch.cat((-b, a), dim=-1)
            else:
                turned = torch.stack((-head[..., 1::2], head[..., 0::2]), dim=-1).flatten(-2)
            head = head * cos + turned * sin
            head = torch.cat((head, rest), dim=-1) if rest.shape[-1] else head
            return head.to(q.dtype)

        return rotate(q, q_norm_weight), rotate(k, k_norm_weight)

    return eager


def _with_norm(**changes: Any) -> Callable[[Arguments], Arguments]:
    return swap(q_norm_weight=torch.ones(128), **changes)


def _too_wide(args: Arguments) -> Arguments:
    q = args["q"].repeat_interleave(17, dim=-1)[..., :2050]
    return {**args, "q": q, "k": q.clone(), "k_norm_weight": torch.ones(2050)}


def _each(*names: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    return lambda args: {**args, **{name: change(args[name]) for name in names}}


def _id_beyond(value: int) -> Callable[[Arguments], Arguments]:
    def change(args: Arguments) -> Arguments:
        ids = args["position_ids"].clone()
        ids[1, 1, 3] = value
        return {**args, "position_ids": ids}

    return change


ERRORS = [
    BadCall("freq_axis_length", _each("freq_axis", change=lambda t: t[:-1]),
            r"freq_axis: expected shape \[64\].*got \[63\]"),
    BadCall("freq_axis_names_no_axis", _each("freq_axis", change=lambda t: t + 1),
            r"freq_axis: expected axes in \[0, 3\).*got 3 at index 40", reads_values=True),
    BadCall("freq_axis_negative", _each("freq_axis", change=lambda t: t - 1),
            r"freq_axis: expected axes in \[0, 3\).*got -1 at index 0", reads_values=True),
    BadCall("freq_axis_float", _each("freq_axis", change=Tensor.float),
            r"freq_axis: expected an integer dtype.*got float32"),
    BadCall("odd_head_dim", _each("q", "k", change=lambda t: t[..., :-1]),
            r"q: expected an even head_dim, got shape \[2, 4, 17, 127\]"),
    BadCall("too_many_frequencies", _each("q", "k", change=lambda t: t[..., :64]),
            r"inv_freq: expected at most head_dim / 2 = 32 frequencies, got 64"),
    BadCall("inv_freq_rank", _each("inv_freq", change=lambda t: t[None]),
            r"inv_freq: expected shape \[R\], got \[1, 64\]"),
    BadCall("inv_freq_integer", _each("inv_freq", change=Tensor.long),
            r"inv_freq: expected a floating dtype, got int64"),
    BadCall("q_rank", _each("q", change=lambda t: t[None]),
            r"q: expected \[B, H, S, D\].*got shape \[1, 2, 4, 17, 128\]"),
    BadCall("k_rank", _each("k", change=lambda t: t[0]), r"k: expected shape.*got \[2, 17, 128\]"),
    BadCall("k_head_dim", _each("k", change=lambda t: t[..., :64]),
            r"k: expected shape \[2, 2, 17, 128\].*got \[2, 2, 17, 64\]"),
    BadCall("k_length", _each("k", change=lambda t: t[:, :, 1:]),
            r"k: expected shape \[2, 2, 17, 128\].*got \[2, 2, 16, 128\]"),
    BadCall("k_dtype", _each("k", change=Tensor.double),
            r"k: expected dtype (float32|bfloat16|float16), that of q, got float64"),
    BadCall("float64", _each("q", "k", change=Tensor.double),
            r"q: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("ids_float", _each("position_ids", change=Tensor.float),
            r"position_ids: expected an integer dtype.*got float32"),
    BadCall("ids_bool", _each("position_ids", change=Tensor.bool),
            r"position_ids: expected an integer dtype.*got bool"),
    BadCall("ids_rank", _each("position_ids", change=lambda t: t[:, 0]),
            r"position_ids: expected shape \[A, B, S\].*got \[3, 17\]"),
    BadCall("ids_batch", _each("position_ids", change=lambda t: t[:, :1]),
            r"position_ids: expected shape \[3, 2, 17\].*got \[3, 1, 17\]"),
    BadCall("ids_length", _each("position_ids", change=lambda t: t[:, :, 1:]),
            r"position_ids: expected shape \[3, 2, 17\].*got \[3, 2, 16\]"),
    BadCall("ids_no_axis", _each("position_ids", change=lambda t: t[:0]),
            r"position_ids: expected 1 to 16 axes.*got shape \[0, 2, 17\]"),
    BadCall("ids_beyond_2p24", _id_beyond(2**24 + 1),
            r"position_ids: expected ids within.*got 16777217 at axis 1, batch 1, token 3",
            reads_values=True),
    BadCall("ids_beyond_minus_2p24", _id_beyond(-(2**24) - 1), r"position_ids: .*got -16777217",
            reads_values=True),
    BadCall("devices", _each("position_ids", change=lambda t: t.to("meta")),
            r"expected.* on .*got"),
    BadCall("rotation", swap(rotation="quarter"),
            r"rotation: expected 'half' or 'pairs', got 'quarter'"),
    BadCall("norm_eps_zero", _with_norm(norm_eps=0.0),
            r"norm_eps: expected a positive, finite float32 number, got 0"),
    BadCall("norm_eps_negative", _with_norm(norm_eps=-1e-6), r"norm_eps: .*got -1e-06"),
    BadCall("norm_eps_no_number", _with_norm(norm_eps=math.nan), r"norm_eps: .*got nan"),
    BadCall("norm_eps_infinite", _with_norm(norm_eps=math.inf), r"norm_eps: .*got inf"),
    BadCall("norm_eps_underflows", _with_norm(norm_eps=1e-60), r"norm_eps: .*got 1e-60"),
    BadCall("q_norm_weight_length", swap(q_norm_weight=torch.ones(127)),
            r"q_norm_weight: expected shape \[128\].*got \[127\]"),
    BadCall("k_norm_weight_length", swap(k_norm_weight=torch.ones(1)),
            r"k_norm_weight: expected shape \[128\].*got \[1\]"),
    BadCall("q_norm_weight_rank", swap(q_norm_weight=torch.ones(4, 128)),
            r"q_norm_weight: expected shape \[128\].*got \[4, 128\]"),
    BadCall("k_norm_weight_integer", swap(k_norm_weight=torch.ones(128, dtype=torch.int64)),
            r"k_norm_weight: expected dtype float32, bfloat16 or float16, got int64"),
    BadCall("q_norm_weight_float64", swap(q_norm_weight=torch.ones(128).double()),
            r"q_norm_weight: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("q_norm_weight_device", swap(q_norm_weight=torch.ones(128, device="meta")),
            r"expected.* on .*got"),
    BadCall("k_norm_weight_device", swap(k_norm_weight=torch.ones(128, device="meta")),
            r"expected.* on .*got"),
    BadCall("norm_too_wide", _too_wide, r"k_norm_weight: expected at most 2048 channels, got 2050"),
    BadCall("head_axis", swap(head_axis=3), r"head_axis: expected 1.*or 2.*got 3"),
]  # fmt: skip


SPEC = Spec(
    op="mrope",
    function=mrope,
    in_place=mrope_,
    reference=reference,
    alike=(
        "tower_d72_fused",
        "llama_one_axis",
        "odd_r23_half",
        "odd_r23_pairs",
        "one_channel_pair",
        "channels_strided_pairs",
        "ids_to_1e6",
        "ids_to_2p24",
        "ids_negative",
        "ids_transposed",
        "ids_uint8",
        "scaled_yarn",
        "norm_gemma_d256",
        "norm_half_partial_d256_r32",
        "norm_d72_fused",
        "norm_d80_pairs",
        "norm_d88",
        "norm_odd_r23_half",
        "norm_odd_r5_half",
        "norm_channels_strided_pairs",
        "norm_unaligned",
        "norm_weight_fp16",
        "norm_widest",
        "norm_no_frequencies",
        "tiny_s1",
        "tiny_channels_strided_pairs",
        "tiny_unaligned",
        "tiny_ids_to_2p24",
        "tiny_norm_no_frequencies",
    ),
    eager_for=eager_for,
    differentiable=("q", "k", "q_norm_weight", "k_norm_weight"),
    written=("q", "k"),
    cases=CASES,
    few=FEW,
    bench=BENCH,
    errors=ERRORS,
    model_cases=model_cases,
)
