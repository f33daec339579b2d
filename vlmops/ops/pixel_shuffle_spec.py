"""Cases, benchmark shapes and bad calls of `vlmops.pixel_shuffle`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.pixel_shuffle import Options, _layout, pixel_shuffle, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (pixel_shuffle(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    layout, sides = _layout("pixel_shuffle", args["grid_hw"])
    given = {name: args[name] for name in Options._fields if name in args}
    for name in ("norm", "reduction"):
        given[name] = given[name] or "none"
    return args["hidden_states"], *Options(**{**given, "layout": layout, "grid_hw": sides})


def _strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with the strides that ``layout`` names."""
    if layout == "sliced":  # behind a class token, before a last one, of wider rows
        big = x.new_zeros(*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3)
        big[..., 1:-1, 2:-1] = x
        return big[..., 1:-1, 2:-1]
    if layout == "transposed":  # channels first in memory, as convolutions leave them
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # one image seen as many
        return x[:1].expand(x.shape)
    if layout == "unaligned":  # an element past where a wide access may start
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    if layout == "columns":  # [B, h, w, C] of images that lie on their side
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def _inputs(
    shape: Sequence[int] = (2, 16, 40),
    factor: int = 2,
    norm: str | None = None,
    norm_axis: str = "merged",
    affine: str = "wb",
    norm_dtype: torch.dtype | None = None,
    norm_offset: float = 0.0,
    layout: str = "contiguous",
    mean: float = 0.0,
    scattered: bool = True,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``affine`` names the vectors of the norm, ``scattered`` or not; ``mean`` is the tokens'."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        def vector(size: int, around: float) -> Tensor:
            drawn = torch.randn(size, 3, device=device) * 0.3 + around
            column = drawn.to(norm_dtype or dtype)[:, 1]
            return column if scattered else column.contiguous()

        x = _strided((torch.randn(tuple(shape), device=device) + mean).to(dtype), layout)
        channels = shape[-1]
        if norm_axis == "merged" and options.get("reduction") is None:
            channels *= factor**2
        return {
            "hidden_states": x,
            "factor": factor,
            "grid_hw": None,
            "order": "yxc",
            "norm": norm,
            "norm_weight": vector(channels, 1.0 - norm_offset) if norm and "w" in affine else None,
            "norm_bias": vector(channels, 0.0) if norm and "b" in affine else None,
            "eps": 1e-5,
            "norm_axis": norm_axis,
            "norm_offset": norm_offset,
            "reduction": None,
            "skip_prefix": 0,
            "drop_remainder": False,
            **options,
        }

    return make


_PACKED = [(4, 6), (2, 2), (2, 2), (6, 4), (2, 8)]
_MANY = [(2, 2 * (1 + i % 3)) for i in range(40)]
_CHANNEL: dict[str, Any] = {"norm_axis": "channel"}

_ROWS = {
    # As models have it.
    "internvl": _inputs((2, 17, 40), norm="layer", skip_prefix=1),
    "idefics3": _inputs((2, 16, 72)),
    "smolvlm_f3": _inputs((1, 81, 24), 3),
    "smolvlm_f4": _inputs((2, 64, 16), 4),
    "mistral3": _inputs((58, 32), grid_hw=[(5, 7), (2, 3), (1, 5), (3, 4)], order="cyx", norm="rms",
                        affine="w", drop_remainder=True, **_CHANNEL),
    "qwen_merger": _inputs((24, 64), grid_hw="blocks", norm="layer", eps=1e-6, **_CHANNEL),
    "qwen2_5_merger": _inputs((24, 40), grid_hw="blocks", norm="rms", affine="w", **_CHANNEL),
    "deepstack": _inputs((1, 24, 64), grid_hw="blocks", norm="layer"),
    "gemma3": _inputs((2, 64, 72), 4, reduction="mean", norm="rms", affine="w", norm_offset=1.0),
    "llava_next_video": _inputs((2, 36, 24), reduction="mean"),
    "internvl_4d": _inputs((2, 4, 6, 32)),
    # Orders and norms.
    "cyx": _inputs((2, 16, 40), order="cyx"),
    "cyx_wide": _inputs((1, 16, 131), order="cyx"),
    "cyx_f3": _inputs((1, 36, 20), 3, order="cyx"),
    "cyx_layer": _inputs((2, 16, 36), order="cyx", norm="layer"),
    "cyx_f3_layer_channel": _inputs((1, 36, 20), 3, order="cyx", norm="layer", **_CHANNEL),
    "rms": _inputs((2, 16, 64), norm="rms", affine="w"),
    "rms_bias": _inputs((1, 16, 24), norm="rms"),
    "layer_plain": _inputs((1, 16, 33), norm="layer", affine=""),
    "layer_weight": _inputs((1, 16, 33), norm="layer", affine="w"),
    "layer_bias": _inputs((1, 16, 128), norm="layer", affine="b", **_CHANNEL),
    "layer_far": _inputs((1, 16, 64), norm="layer", mean=30.0),
    "layer_eps": _inputs((1, 16, 24), norm="layer", eps=0.3),
    "mean_layer": _inputs((2, 16, 48), norm="layer", reduction="mean"),
    "mean_remainder": _inputs((2, 25, 20), reduction="mean", drop_remainder=True),
    "weights_fp32": _inputs((1, 16, 64), norm="layer", norm_dtype=torch.float32),
    "weights_bf16": _inputs((1, 16, 64), norm="rms", norm_dtype=torch.bfloat16, norm_offset=1.0),
    "weights_fp16": _inputs((1, 16, 64), norm="layer", norm_dtype=torch.float16, **_CHANNEL),
    # Grids.
    "rectangle": _inputs((2, 24, 24), grid_hw=(4, 6), norm="layer"),
    "remainder": _inputs((2, 35, 24), grid_hw=(5, 7), drop_remainder=True),
    "remainder_layer": _inputs((2, 36, 24), grid_hw=(5, 7), drop_remainder=True, norm="layer",
                               skip_prefix=1),
    "remainder_4d": _inputs((2, 5, 3, 24), drop_remainder=True, norm="rms", affine="w"),
    "no_block": _inputs((2, 3, 24), grid_hw=(1, 3), drop_remainder=True, norm="layer"),
    "packed": _inputs((72, 24), grid_hw=_PACKED),
    "packed_layer": _inputs((1, 77, 24), grid_hw=_PACKED, norm="layer", skip_prefix=1),
    "packed_many": _inputs((sum(h * w for h, w in _MANY), 8), grid_hw=_MANY, norm="rms"),
    "packed_mean": _inputs((72, 24), grid_hw=_PACKED, reduction="mean"),
    "one_sequence": _inputs((16, 24)),
    "blocks_f3": _inputs((2, 28, 24), 3, grid_hw="blocks", skip_prefix=1),
    "blocks_cyx": _inputs((2, 24, 32), grid_hw="blocks", order="cyx"),
    "factor_1": _inputs((2, 16, 24), 1, norm="layer"),
    # Strides.
    "sliced": _inputs((2, 16, 40), layout="sliced"),
    "sliced_layer": _inputs((2, 16, 40), layout="sliced", norm="layer"),
    "transposed": _inputs((2, 16, 40), layout="transposed"),
    "transposed_layer": _inputs((2, 16, 40), layout="transposed", norm="layer"),
    "transposed_channel": _inputs((2, 16, 40), layout="transposed", norm="rms", **_CHANNEL),
    "transposed_cyx": _inputs((2, 16, 40), layout="transposed", order="cyx"),
    "transposed_mean": _inputs((2, 16, 40), layout="transposed", reduction="mean"),
    "expanded": _inputs((3, 16, 24), layout="expanded", norm="layer"),
    "unaligned": _inputs((2, 16, 40), layout="unaligned"),
    "unaligned_layer": _inputs((2, 16, 64), layout="unaligned", norm="layer"),
    "columns": _inputs((2, 4, 6, 40), layout="columns", norm="layer"),
    # Sizes.
    "threads": _inputs((4, 256, 64), norm="layer"),
    "threads_channel": _inputs((2, 256, 96), norm="rms", order="cyx", **_CHANNEL),
    "wide": _inputs((1, 16, 1100), norm="layer"),
    "one_channel": _inputs((2, 16, 1), norm="layer"),
    "no_channels": _inputs((2, 16, 0)),
    "empty_batch": _inputs((0, 16, 24), norm="layer"),
    "no_tokens": _inputs((2, 0, 24), norm="layer"),
    "no_images": _inputs((0, 24), grid_hw=[], norm="layer"),
}  # fmt: skip

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("internvl", "idefics3", "smolvlm_f3", "mistral3", "qwen_merger", "deepstack", "cyx", "rms",
        "rectangle", "sliced", "unaligned_layer", "empty_batch", "gemma3", "packed_mean",
        "packed_layer", "transposed_layer")  # fmt: skip
FEW = [case for case in CASES if case.name in _FEW]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What Hugging Face runs: two permutes, unfold, a view or AvgPool2d, its norms around them."""

    def eager(**args: Any) -> tuple[Tensor]:
        x, f, grid = args["hidden_states"], args["factor"], args["grid_hw"]
        skip, channels = args["skip_prefix"], args["hidden_states"].shape[-1]
        flat = x[None] if x.dim() == 2 else x
        by_channel = args["norm"] is not None and args["norm_axis"] == "channel"
        if by_channel:
            flat = _norm(args, flat)
        if grid == "blocks":
            parts = [flat[:, skip:].reshape(len(flat), -1, f * f, channels)]
            if args["order"] == "cyx":
                parts = [parts[0].transpose(2, 3)]
            parts = [parts[0].flatten(2)]
        else:
            if flat.dim() == 4:
                images = [flat]
            elif isinstance(grid, list):
                lengths = [skip + h * w for h, w in grid]
                each = flat.split(lengths, 1) if grid else (flat,)
                sides = grid or [(0, f)]
                images = [
                    one[:, skip:].unflatten(1, hw) for one, hw in zip(each, sides, strict=True)
                ]
            else:
                side = math.isqrt(flat.shape[1] - skip)
                images = [flat[:, skip:].unflatten(1, grid or (side, side))]
            parts = [_merged(args, image) for image in images]
        y = torch.cat(parts, 1)
        if args["norm"] is not None and not by_channel:
            y = _norm(args, y)
        return (y[0] if x.dim() == 2 else y,)

    return eager


def _merged(args: Arguments, image: Tensor) -> Tensor:
    """``[B, h, w, C]`` to ``[B, N, K]``."""
    f, (batch, h, w, channels) = args["factor"], image.shape
    if image.numel() == 0 or min(h, w) < f:
        depth = channels * (1 if args["reduction"] else f * f)
        return image.new_zeros(batch, (h // f) * (w // f), depth) + image.sum() * 0
    if args["reduction"] == "mean":
        return functional.avg_pool2d(image.permute(0, 3, 1, 2), f).flatten(2).transpose(1, 2)
    if args["order"] == "cyx":
        return functional.unfold(image.permute(0, 3, 1, 2), f, stride=f).transpose(1, 2)
    h, w = h // f * f, w // f * f
    x = image[:, :h, :w].reshape(batch, h, w // f, channels * f).permute(0, 2, 1, 3).contiguous()
    x = x.view(batch, w // f, h // f, channels * f * f).permute(0, 2, 1, 3).contiguous()
    return x.view(batch, -1, channels * f * f)


def _norm(args: Arguments, x: Tensor) -> Tensor:
    weight, bias, offset = args["norm_weight"], args["norm_bias"], args["norm_offset"]
    eps = args["eps"]
    if args["norm"] == "layer":
        if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
            weight, bias = (None if t is None else t.float() for t in (weight, bias))
            return functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        y = (y * (offset + weight.float())).to(x.dtype)
    else:
        y = y.to(x.dtype) if weight is None else (weight * y.to(x.dtype)).to(x.dtype)
    return y if bias is None else (y + bias).to(x.dtype)


def _out(change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    """``change`` of memory for the result."""

    def put(args: Arguments) -> Arguments:
        return {**args, "out": change(torch.zeros(2, 4, 160, device=args["hidden_states"].device))}

    return put


# The good call is CASES[0]: [2, 1 + 4 * 4, 40], factor 2, norm "layer" with weight and bias [160].
ERRORS = [
    BadCall("rank", alter("hidden_states", lambda t: t[0, 0]),
            r"hidden_states: expected \[B, N, C\], \[N, C\] or \[B, h, w, C\], got shape \[40\]"),
    BadCall("float64", alter("hidden_states", Tensor.double),
            r"hidden_states: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("no_tensor", swap(hidden_states=3),
            r"hidden_states: expected a torch.Tensor, got int", TypeError),
    BadCall("no_square", alter("hidden_states", lambda t: t[:, :16]),
            r"hidden_states: expected a square number of tokens where grid_hw is None, got 15"),
    BadCall("odd_square", alter("hidden_states", lambda t: t[:, :10]),
            r"hidden_states: expected a grid that factor 2 divides, got 3 x 3; drop_remainder"),
    BadCall("odd_grid", swap(grid_hw=(1, 16)),
            r"grid_hw: expected a grid that factor 2 divides, got 1 x 16; drop_remainder"),
    BadCall("odd_width", swap(grid_hw=(16, 1)),
            r"grid_hw: expected a grid that factor 2 divides, got 16 x 1; drop_remainder"),
    BadCall("odd_packed", lambda a: {**a, "hidden_states": a["hidden_states"][:1],
                                     "grid_hw": [(2, 2), (3, 4)]},
            r"grid_hw: expected a grid that factor 2 divides, got 3 x 4"),
    BadCall("odd_4d", lambda a: {**a, "hidden_states": a["hidden_states"][:, None, 1:],
                                 "skip_prefix": 0},
            r"hidden_states: expected a grid that factor 2 divides, got 1 x 16"),
    BadCall("grid_tokens", swap(grid_hw=(4, 6)),
            r"hidden_states: expected 25 tokens, that is skip_prefix and 4 x 6, got shape"),
    BadCall("grid_negative", swap(grid_hw=(-4, -4)), r"grid_hw: expected a height .*got -4 x -4"),
    BadCall("packed_tokens", lambda a: {**a, "hidden_states": a["hidden_states"][0],
                                        "grid_hw": [(2, 2), (2, 4)]},
            r"hidden_states: expected the 14 tokens of grid_hw's 2 images, prefixes included"),
    BadCall("packed_batch", swap(grid_hw=[(2, 2), (2, 4)]),
            r"hidden_states: expected one sequence.*for a list of grids, got shape \[2, 17, 40\]"),
    BadCall("grid_of_4d", lambda a: {
                **a, "hidden_states": a["hidden_states"][:, 1:].view(2, 4, 4, 40),
                "skip_prefix": 0, "grid_hw": (2, 8)},
            r"grid_hw: expected the grid of hidden_states \[2, 4, 4, 40\], got 2 x 8"),
    BadCall("blocks_of_4d", lambda a: {
                **a, "hidden_states": a["hidden_states"][:, 1:].view(2, 4, 4, 40),
                "skip_prefix": 0, "grid_hw": "blocks"},
            r"grid_hw: expected None or the grid of hidden_states .*got 'blocks'"),
    BadCall("prefix_of_4d", alter("hidden_states", lambda t: t[:, 1:].view(2, 4, 4, 40)),
            r"skip_prefix: expected 0 with hidden_states of \[B, h, w, C\], got 1"),
    BadCall("blocks_tokens", swap(grid_hw="blocks", skip_prefix=0),
            r"hidden_states: expected blocks of 4 tokens, got 17"),
    BadCall("grid_text", swap(grid_hw="rows"),
            r"grid_hw: expected None, \(h, w\), a list of \(h, w\) or 'blocks', got 'rows'",
            TypeError),
    BadCall("grid_triple", swap(grid_hw=(1, 4, 4)), r"grid_hw: expected None.*got \(1, 4, 4\)",
            TypeError),
    BadCall("prefix_long", swap(skip_prefix=18),
            r"hidden_states: expected at least the 18 tokens of skip_prefix"),
    BadCall("prefix_negative", swap(skip_prefix=-1), r"skip_prefix: expected 0 or more, got -1"),
    BadCall("factor_0", swap(factor=0), r"factor: expected 1 to 16, got 0"),
    BadCall("factor_17", swap(factor=17), r"factor: expected 1 to 16, got 17"),
    BadCall("order", swap(order="xyc"), r"order: expected 'yxc' or 'cyx', got 'xyc'"),
    BadCall("norm", swap(norm="batch"), r"norm: expected None, 'layer' or 'rms', got 'batch'"),
    BadCall("norm_axis", swap(norm_axis="tokens"),
            r"norm_axis: expected 'merged' or 'channel', got 'tokens'"),
    BadCall("reduction", swap(reduction="max"), r"reduction: expected None or 'mean', got 'max'"),
    BadCall("mean_of_normed", swap(reduction="mean", norm_axis="channel"),
            r"norm_axis: expected 'merged'.*with reduction='mean', got 'channel'"),
    BadCall("eps_zero", swap(eps=0.0), r"eps: expected a positive, finite float32 number, got 0"),
    BadCall("eps_nan", swap(eps=math.nan), r"eps: expected a positive.*got nan"),
    BadCall("eps_underflows", swap(eps=1e-60), r"eps: expected a positive.*got 1e-60"),
    BadCall("weight_alone", swap(norm=None),
            r"norm: expected 'layer' or 'rms', as a norm_weight is given, got None"),
    BadCall("weight_length", swap(norm_weight=torch.ones(40)),
            r"norm_weight: expected shape \[160\].*got \[40\]"),
    BadCall("weight_channel", swap(norm_axis="channel"),
            r"norm_weight: expected shape \[40\].*got \[160\]"),
    BadCall("weight_mean", swap(reduction="mean"),
            r"norm_weight: expected shape \[40\].*got \[160\]"),
    BadCall("weight_integer", swap(norm_weight=torch.ones(160, dtype=torch.int64)),
            r"norm_weight: expected dtype float32, bfloat16 or float16, got int64"),
    BadCall("weight_no_tensor", swap(norm_weight=[1.0] * 160),
            r"norm_weight: expected a torch.Tensor, got list", TypeError),
    BadCall("bias_length", swap(norm_bias=torch.ones(159)),
            r"norm_bias: expected shape \[160\].*got \[159\]"),
    BadCall("device", swap(norm_bias=torch.ones(160, device="meta")), r"expected.* on .*got"),
    BadCall("out_shape", _out(lambda t: t[:1]),
            r"out: expected shape \[2, 4, 160\].*got \[1, 4, 160\]"),
    BadCall("out_dtype", _out(Tensor.half), r"out: expected dtype float32, that of hidden_states"),
    BadCall("out_strides", _out(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
            r"out: expected channels side by side, got strides \[640, 1, 4\]"),
    BadCall("out_shared", _out(lambda t: t[:1].expand(2, 4, 160)),
            r"out: expected a tensor whose elements do not share memory"),
    BadCall("out_of_input", lambda a: {
                **a, "out": a["hidden_states"].flatten()[-1280:].view(2, 4, 160)},
            r"out: expected memory of its own, since hidden_states is read while it is written"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as are read and written: a copy reads half of them, writes half."""
    x = args["hidden_states"]
    out = reference(**{**args, "hidden_states": x.new_empty(1).expand(x.shape)}).numel()
    read = out if args["reduction"] is None else out * args["factor"] ** 2
    return [torch.zeros((read + out) // 2, dtype=x.dtype, device=x.device)]


def _flops(args: Arguments) -> float:
    # LayerNorm sums, centres, squares, sums, centres, scales, weighs, shifts; RMSNorm half of it.
    each = {None: 0.0, "layer": 8.0, "rms": 4.0}[args["norm"]]
    return float(args["hidden_states"].numel() * (each if args["reduction"] is None else 1.0))


def _bench(name: str, **inputs: Any) -> BenchCase:
    return BenchCase(name, _inputs(**inputs, scattered=False), moved=_moved, flops=_flops)


_BENCH = [
    _bench("internvl_1024", shape=(13, 1024, 1024)),
    _bench("internvl_1024_layer", shape=(13, 1024, 1024), norm="layer"),
    _bench("internvl_3200", shape=(13, 1024, 3200)),
    _bench("internvl_3200_layer", shape=(13, 1024, 3200), norm="layer"),
    _bench("idefics3", shape=(13, 676, 1152)),
    _bench("smolvlm_f3", shape=(13, 729, 1152), factor=3),
    _bench("smolvlm_f4", shape=(13, 1024, 768), factor=4),
    _bench("llama4", shape=(5, 576, 1408)),
    _bench("mistral3", shape=(12100, 1024), grid_hw=[(110, 110)], order="cyx", norm="rms",
           affine="w", norm_axis="channel", drop_remainder=True),
    _bench("qwen_merger", shape=(4900, 1280), grid_hw="blocks", norm="layer", eps=1e-6,
           norm_axis="channel"),
    _bench("gemma3", shape=(1, 4096, 1152), factor=4, reduction="mean", norm="rms", affine="w",
           norm_offset=1.0, eps=1e-6),
]  # fmt: skip


SPEC = Spec(
    op="pixel_shuffle",
    function=_function,
    in_place=None,
    into=_function,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("hidden_states", "norm_weight", "norm_bias"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("idefics3", "smolvlm_f4", "qwen2_5_merger", "deepstack", "llava_next_video", "cyx_f3",
           "cyx_f3_layer_channel", "layer_plain", "layer_weight", "weights_fp16", "mean_remainder",
           "blocks_f3", "blocks_cyx", "remainder_layer", "rms", "layer_far", "layer_eps",
           "rectangle", "sliced", "sliced_layer", "transposed",
           "transposed_layer", "transposed_channel", "transposed_cyx", "transposed_mean",
           "unaligned", "unaligned_layer", "columns", "threads", "threads_channel", "wide",
           "cyx_wide", "one_channel", "smolvlm_f3", "packed_many"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
)  # fmt: skip
