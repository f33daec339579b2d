"""Cases, benchmark shapes and bad calls of `vlmops.patch_embed`.

A case's arguments are flat: ``table``, ``index`` and ``table_weight`` are one position, those of
``tile`` another, of patches alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.linear import alternative, has_alternative
from vlmops.ops.patch_embed import Position, arguments, patch_embed, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap, yardstick_linear

_POSITIONS = (
    ("table", "index", "table_weight", False),
    ("tile", "tile_index", "tile_weight", True),
)


def _split(args: Arguments) -> Arguments:
    """The arguments of `patch_embed`."""
    args = dict(args)
    positions = []
    for table, index, weight, patches_only in _POSITIONS:
        position = Position(args.pop(table), args.pop(index), args.pop(weight), patches_only)
        if position.table is not None:
            positions.append(position)
    values = args["pixel_values"]
    args["pixel_values"] = list(values) if isinstance(values, tuple) else values
    return {**args, "positions": positions}


def _function(**args: Any) -> tuple[Tensor]:
    return (patch_embed(**_split(args)),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    args.pop("dtype", None)
    return (reference(**_split(args)),)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    return arguments(**_split(args))


def _inputs(
    shape: Sequence[int] | Sequence[Sequence[int]] = (2, 3, 30, 29),
    weight: Sequence[int] = (24, 3, 7, 7),
    bias: bool = True,
    pixels: str = "plain",
    pixel_dtype: torch.dtype | None = None,
    norm: str | None = None,
    affine: bool = True,
    prefix: int = 0,
    prefix_last: bool = False,
    rows: int = 0,
    index: Sequence[int] = (),
    weighted: Sequence[int] | None = None,
    tile: Sequence[int] = (),
    table_dtype: torch.dtype | None = None,
    dtype_out: torch.dtype | None = None,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``shape`` of pixels, or of each image of a list; ``rows`` of a table, ``index`` shaped so."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(*size: int, scale: float = 1.0, of: torch.dtype | None = None) -> Tensor:
            return (torch.randn(size, device=device) * scale).to(of or dtype)

        def image(size: Sequence[int]) -> Tensor:
            if pixel_dtype == torch.uint8:
                x = torch.randint(256, tuple(size), dtype=torch.uint8, device=device)
            else:
                x = draw(*size, of=pixel_dtype)
            if pixels == "channels_last":
                return x.contiguous(memory_format=torch.channels_last)
            if pixels == "sliced":  # every other pixel of every other row
                big = x.new_zeros(*size[:-2], 2 * size[-2], 2 * size[-1])
                big[..., ::2, 1::2] = x
                return big[..., ::2, 1::2]
            if pixels == "transposed":
                return x.transpose(-1, -2).contiguous().transpose(-1, -2)
            if pixels == "expanded":
                return x[:1].expand(tuple(size))
            if pixels == "unaligned":
                return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(tuple(size))
            return x

        channels, depth = weight[0], math.prod(weight[1:])
        listed = bool(shape) and not isinstance(shape[0], int)
        values: Any = tuple(map(image, shape)) if listed else image(shape)  # type: ignore[arg-type]
        w = draw(*weight, scale=depth**-0.5)
        if pixels == "channels_last":
            w = w.contiguous(memory_format=torch.channels_last)
        return {
            "pixel_values": values,
            "weight": w,
            "bias": draw(channels) if bias else None,
            "norm": norm,
            "norm_weight": draw(channels) if norm and affine else None,
            "norm_bias": draw(channels) if norm == "layer" and affine else None,
            "prefix": draw(prefix, channels) if prefix else None,
            "prefix_last": prefix_last,
            "table": draw(rows, channels, of=table_dtype) if rows else None,
            "index": torch.randint(rows, tuple(index)).to(device) if index else None,
            "table_weight": None if weighted is None else draw(*weighted),
            "tile": draw(5, channels) if tile else None,
            "tile_index": torch.randint(5, tuple(tile)).to(device) if tile else None,
            "tile_weight": draw(1) if tile else None,
            "dtype": dtype_out,
            **options,
        }

    return make


_RAW: dict[str, Any] = {
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255,
}  # fmt: skip

_ROWS = {
    # As towers have it.
    "clip": _inputs(bias=False, prefix=1, rows=17),
    "qwen_flat": _inputs((37, 96), (40, 3, 2, 4, 4), rows=29, index=(37, 4), weighted=(37, 4)),
    "siglip": _inputs((2, 3, 45, 42), (32, 3, 14, 14), rows=9),
    "siglip2_linear": _inputs((2, 9, 48), (33, 48), rows=11, index=(2, 9, 3), weighted=(2, 9, 3)),
    "pixtral_sizes": _inputs((3, 3, 32, 40), (24, 3, 8, 8), bias=False,
                             image_sizes=[(16, 40), (32, 8), (31, 25)]),
    "pixtral_list": _inputs(((3, 16, 40), (3, 33, 8)), (24, 3, 8, 8), prefix=2, rows=18),
    "mllama_tiles": _inputs((4, 3, 16, 16), (96, 3, 4, 4), bias=False, prefix=1, rows=17,
                            weighted=(1,), tile=(4, 1, 1)),
    "tile_by_patch": _inputs((2, 3, 16, 16), (24, 3, 4, 4), prefix=1, rows=17, tile=(2, 16, 1)),
    "llama4_last": _inputs((2, 3, 16, 16), (24, 3, 4, 4), prefix=1, prefix_last=True, rows=17),
    "idefics2_bucket": _inputs((2, 3, 8, 12), (24, 3, 4, 4), rows=16, index=(2, 6, 1)),
    "ovis2_rms": _inputs((2, 3, 16, 16), (48, 3, 4, 4), norm="rms", rows=16),
    "layer_norm": _inputs((2, 3, 16, 16), (48, 3, 4, 4), norm="layer", prefix=1, rows=17),
    "norm_plain": _inputs((1, 3, 8, 8), (40, 3, 4, 4), norm="layer", affine=False, norm_eps=1e-5),
    "video": _inputs((2, 3, 5, 9, 12), (24, 3, 2, 4, 4), rows=12),
    # Pixels that are raw, or of another dtype.
    "uint8": _inputs((2, 3, 29, 30), (24, 3, 7, 7), pixel_dtype=torch.uint8, prefix=1, rows=17,
                     **_RAW),
    "uint8_channels_last": _inputs((2, 28, 30, 3), (32, 3, 14, 14), pixel_dtype=torch.uint8,
                                   channels_last=True, **_RAW),
    "uint8_plain": _inputs((1, 3, 8, 8), (24, 3, 4, 4), pixel_dtype=torch.uint8),
    "uint8_rescaled": _inputs((1, 3, 8, 8), (24, 3, 4, 4), pixel_dtype=torch.uint8,
                              rescale_factor=1 / 255),
    "raw_floats": _inputs((1, 3, 16, 16), (24, 3, 4, 4), **_RAW),
    "pixels_fp32": _inputs((2, 3, 32, 32), (64, 3, 16, 16), pixel_dtype=torch.float32),
    "table_fp32": _inputs((2, 3, 32, 32), (64, 3, 16, 16), rows=4, table_dtype=torch.float32,
                          dtype_out=torch.float32),
    # Strides.
    "channels_last": _inputs((2, 3, 32, 32), (64, 3, 16, 16), pixels="channels_last"),
    "sliced": _inputs((2, 3, 32, 31), (24, 3, 8, 8), pixels="sliced"),
    "transposed": _inputs((2, 3, 32, 31), (24, 3, 8, 8), pixels="transposed"),
    "expanded": _inputs((3, 3, 28, 28), (24, 3, 14, 14), pixels="expanded"),
    "unaligned": _inputs((2, 3, 32, 32), (64, 3, 16, 16), pixels="unaligned"),
    # Sizes.
    "wide_p14": _inputs((1, 3, 168, 70), (144, 3, 14, 14), prefix=1, rows=61),
    "wide_p16": _inputs((1, 3, 160, 208), (136, 3, 16, 16), rows=130),
    "flat_wide": _inputs((131, 1176), (136, 3, 2, 14, 14), bias=False),
    "one": _inputs((1, 1, 3, 3), (1, 1, 3, 3)),
    "one_column": _inputs((2, 3, 28, 16), (24, 3, 14, 14)),
    "patch_1x1": _inputs((2, 20, 3, 4), (37, 20, 1, 1), rows=12),
    "rectangle": _inputs((2, 3, 12, 20), (24, 3, 4, 5), rows=12),
    "no_images": _inputs((0, 3, 14, 14), (24, 3, 7, 7), prefix=1, rows=5),
    "no_patches": _inputs((0, 48), (24, 48), prefix=1, rows=3),
}  # fmt: skip

CASES = [Case(name, make) for name, make in _ROWS.items()]
FEW = [case for case in CASES if case.name in ("clip", "qwen_flat", "siglip", "wide_p14")]


def eager_for(
    args: Arguments, linear: Callable[..., Tensor] = functional.linear
) -> Callable[..., tuple[Tensor]]:
    """Hugging Face's embeddings in their dtypes: normalise, cast, convolve, flatten, cat, add."""

    def eager(**args: Any) -> tuple[Tensor]:
        values = args["pixel_values"]
        if isinstance(values, Tensor) and values.dim() > 2 and len(values) == 0:
            one = values.new_zeros(1, *values.shape[1:])
            return (eager(**{**args, "pixel_values": torch.cat((values, one))})[0][:0],)
        call = _split(args)
        weight, bias, norm = call["weight"], call["bias"], call["norm"]
        values = call["pixel_values"]
        listed = isinstance(values, list)
        sizes = call.get("image_sizes")
        raw = [call.get(name) for name in ("rescale_factor", "image_mean", "image_std")]

        def convolved(x: Tensor) -> Tensor:  # [B, N, D]
            if x.dim() < 4 and not (listed or weight.dim() == 2):
                x = x.view(-1, *weight.shape[1:])
            if call.get("channels_last"):
                x = x.movedim(-1, 1)
            if any(v is not None for v in raw):
                x = _normalised(x.float(), *raw)
            x = x.to(weight.dtype)
            if weight.dim() == 2:
                return linear(x, weight, bias)
            conv = functional.conv2d if weight.dim() == 4 else functional.conv3d
            return conv(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)

        packed = listed or sizes is not None or values.dim() == 2
        if listed:
            parts = [convolved(x[None])[0] for x in values]
        elif sizes is not None:
            parts = [
                convolved(x[None, :, :h, :w])[0] for x, (h, w) in zip(values, sizes, strict=True)
            ]
        elif values.dim() == 2:
            parts = [convolved(values).reshape(len(values), weight.shape[0])]
        elif values.dim() == 3 and weight.dim() > 2:
            parts = [convolved(x).reshape(len(x), weight.shape[0]) for x in values]
        else:
            parts = list(convolved(values))
        if norm is not None:
            parts = [_norm(call, y) for y in parts]
        whole = [parts] if packed else [[y] for y in parts]
        sequences = []
        for number, ys in enumerate(whole):
            y = torch.cat(ys)
            y = _added(call, y, number, True)
            if call["prefix"] is not None:
                split = y.split([len(part) for part in ys])
                pairs = ((x, call["prefix"]) for x in split)
                last = call["prefix_last"]
                y = torch.cat([t for x, p in pairs for t in ((x, p) if last else (p, x))])
            sequences.append(_added(call, y, number, False))
        y = sequences[0] if packed else torch.stack(sequences)
        return (y.to(call["dtype"] or weight.dtype),)

    return eager


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """Flattened patches by F.linear, as transformers' fusion has them: a plain product's errors."""
    values, weight = args["pixel_values"], args["weight"]
    if isinstance(values, tuple) or values.dim() > 3 or weight.dim() == 2:
        return eager_for(args)
    multiply = yardstick_linear(weight, weight[0].numel())

    def eager(**args: Any) -> tuple[Tensor]:
        return eager_for(args, multiply)(**{**args, "weight": args["weight"].flatten(1)})

    return eager


def _normalised(
    x: Tensor, rescale: float | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    def of_channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=x.device).view(-1, *[1] * (x.dim() - 2))

    x = x if rescale is None else x * rescale
    x = x if mean is None else x - of_channels(mean)
    return x if std is None else x / of_channels(std)


def _norm(call: Arguments, y: Tensor) -> Tensor:
    weight, bias, eps = call["norm_weight"], call["norm_bias"], call.get("norm_eps", 1e-6)
    if call["norm"] == "layer":
        return functional.layer_norm(y, y.shape[-1:], weight, bias, eps)
    x = y.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x.to(y.dtype) if weight is None else weight * x.to(y.dtype)


def _added(call: Arguments, y: Tensor, number: int, patches_only: bool) -> Tensor:
    for position in call["positions"]:
        if position.patches_only != patches_only:
            continue
        table, index, weight = position.table, position.index, position.weight
        if index is None:
            rows = table[: len(y)]
            y = y + (rows if weight is None else rows * weight)
            continue
        if index.dim() == 3:
            index = index[number]
            weight = weight[number] if weight is not None and weight.dim() == 3 else weight
        taps = table[index]
        y = y + (taps if weight is None else taps * weight[..., None]).sum(-2)
    return y


def _gathered(index: Tensor, weight: Tensor | None = None) -> Callable[[Arguments], Arguments]:
    return swap(index=index, table_weight=weight)


# The good call is CASES[0]: [2, 3, 30, 29], weight [24, 3, 7, 7], prefix [1, 24], table [17, 24].
ERRORS = [
    BadCall("channels", alter("pixel_values", lambda t: t[:, :2]),
            r"pixel_values: expected 3 channels.*got 2 in shape \[2, 2, 30, 29\]"),
    BadCall("channels_last", swap(channels_last=True),
            r"pixel_values: expected 3 channels.*got 29.*channels_last"),
    BadCall("too_low", alter("pixel_values", lambda t: t[:, :, :6]),
            r"pixel_values: expected images of at least one patch.*got 1 x 6 x 29"),
    BadCall("too_narrow", alter("pixel_values", lambda t: t[..., :6]),
            r"pixel_values: expected images of at least one patch.*got 1 x 30 x 6"),
    BadCall("pixels_rank", alter("pixel_values", lambda t: t[None]),
            r"pixel_values: expected .*\[B, C, H, W\].*got shape \[1, 2, 3, 30, 29\]"),
    BadCall("depth", alter("pixel_values", lambda t: t.flatten(1)[:, :146]),
            r"pixel_values: expected patches of 147 values.*got shape \[2, 146\]"),
    BadCall("pixels_float64", alter("pixel_values", Tensor.double),
            r"pixel_values: expected dtype float32, bfloat16, float16 or uint8, got float64"),
    BadCall("pixels_no_tensor", swap(pixel_values=(1,)),
            r"pixel_values\[0\]: expected a torch.Tensor, got int", TypeError),
    BadCall("list_rank", lambda a: {**a, "pixel_values": (a["pixel_values"],)},
            r"pixel_values: expected images \[C, H, W\].*got shape \[2, 3, 30, 29\]"),
    BadCall("weight_rank", alter("weight", lambda t: t.flatten()),
            r"weight: expected shape \[D, C, P, P\].*got \[3528\]"),
    BadCall("weight_float64", alter("weight", Tensor.double),
            r"weight: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("weight_empty", alter("weight", lambda t: t[..., :0]),
            r"weight: expected patches that are not empty"),
    BadCall("linear_of_images", alter("weight", lambda t: t.flatten(1)),
            r"pixel_values: expected \[N, K\] or \[B, N, K\] for a weight of shape \[24, 147\]"),
    BadCall("bias_length", swap(bias=torch.zeros(23)), r"bias: expected shape \[24\].*got \[23\]"),
    BadCall("bias_dtype", swap(bias=torch.zeros(24, dtype=torch.bfloat16)),
            r"bias: expected dtype float32, that of weight, got bfloat16"),
    BadCall("prefix_width", swap(prefix=torch.zeros(1, 23)),
            r"prefix: expected shape \[M, 24\].*got \[1, 23\]"),
    BadCall("table_short", alter("table", lambda t: t[:16]),
            r"positions.table: expected a row for each of the 17 tokens.*got shape \[16, 24\]"),
    BadCall("table_width", alter("table", lambda t: t[:, :23]),
            r"positions.table: expected shape \[R, 24\].*got \[17, 23\]"),
    BadCall("table_integer", alter("table", Tensor.long),
            r"positions.table: expected dtype float32, bfloat16 or float16, got int64"),
    BadCall("index_length", _gathered(torch.zeros(16, 1, dtype=torch.int64)),
            r"positions.index: expected a shape that fits \[2, 17, 1\].*got \[16, 1\]"),
    BadCall("index_float", _gathered(torch.zeros(17, 1)),
            r"positions.index: expected an integer dtype.*got float32"),
    BadCall("index_rank", _gathered(torch.zeros(1, 2, 17, 1, dtype=torch.int64)),
            r"positions.index: expected shape \[t\], \[N, t\] or \[B, N, t\]"),
    BadCall("index_beyond", _gathered(torch.full((17, 2), 17)),
            r"positions.index: expected rows of the table in \[0, 17\), got 17 at",
            reads_values=True),
    BadCall("index_negative", _gathered(torch.full((17, 2), -1)),
            r"positions.index: .*got -1 at", reads_values=True),
    BadCall("weight_of_rows", _gathered(torch.zeros(17, 2, dtype=torch.int64), torch.zeros(17, 3)),
            r"positions.weight: expected a shape that fits \[2, 17, 2\].*got \[17, 3\]"),
    BadCall("norm", swap(norm="batch"), r"norm: expected 'none', 'layer' or 'rms', got 'batch'"),
    BadCall("norm_eps", swap(norm="rms", norm_eps=0.0), r"norm_eps: expected a positive.*got 0"),
    BadCall("norm_weight_alone", swap(norm_weight=torch.zeros(24)),
            r"norm: expected 'layer' or 'rms', as a norm_weight"),
    BadCall("norm_weight_length", swap(norm="rms", norm_weight=torch.zeros(23)),
            r"norm_weight: expected shape \[24\].*got \[23\]"),
    BadCall("std_zero", swap(image_std=[0.5, 0.0, 0.5]),
            r"image_std: expected numbers other than 0", ValueError),
    BadCall("std_count", swap(image_std=[0.5]),
            r"image_std: expected one number for each of the 3 channels", ValueError),
    BadCall("mean_count", swap(image_mean=[0.5] * 4),
            r"image_mean: expected one number for each of the 3 channels", ValueError),
    BadCall("rescale_zero", swap(rescale_factor=0.0),
            r"rescale_factor: expected a number other than 0", ValueError),
    BadCall("map_and_numbers", swap(pixel_map=torch.zeros(3, 256), rescale_factor=1 / 255),
            r"pixel_map: expected none beside.*got one of shape \[3, 256\]", ValueError),
    BadCall("map_of_floats", swap(pixel_map=torch.zeros(3, 256)),
            r"pixel_map: expected shape \[3, 2\], that is \[C, 256\] for uint8.*got \[3, 256\]"),
    BadCall("sizes_count", swap(image_sizes=[(7, 7)]),
            r"image_sizes: expected a height and a width for each image.*got 1"),
    BadCall("sizes_beyond", swap(image_sizes=[(7, 7), (31, 29)]),
            r"image_sizes: expected sizes within pixel_values.*got 31 x 29 for image 1"),
    BadCall("device", swap(bias=torch.zeros(24, device="meta")), r"expected.* on .*got"),
    BadCall("out_dtype", swap(dtype=torch.int64),
            r"dtype: expected float32, bfloat16 or float16, got int64"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as pixels, weight and tokens have: a copy reads half of them, writes half."""
    tokens = math.prod(reference_shape(args)) * args["weight"].element_size()
    values = args["pixel_values"]
    read = [args["weight"], *(values if isinstance(values, tuple) else (values,))]
    moved = tokens + sum(t.numel() * t.element_size() for t in read)
    return [torch.zeros(moved // 2, dtype=torch.uint8, device=args["weight"].device)]


def reference_shape(args: Arguments) -> tuple[int, ...]:
    """Of the result."""
    from vlmops.ops.patch_embed_panels import Arguments as OfOp

    return OfOp(*_schema_arguments(args)).shape()


def _flops(args: Arguments) -> float:
    tokens = math.prod(reference_shape(args)[:-1])
    return float(2 * tokens * args["weight"].numel())


def _products(args: Arguments) -> Mapping[tuple[str, str], Callable[[], Any]]:
    """Forward, and the gradients of weight and, unless they are raw, of pixels."""
    weight = args["weight"].flatten(1)
    tokens = math.prod(reference_shape(args)[:-1])
    patches = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight)
    grad, out = (
        torch.randn(tokens, len(weight), device=weight.device).to(weight),
        weight.new_empty(tokens, len(weight)),
    )
    values = args["pixel_values"]

    def backward() -> None:
        torch.mm(grad.t(), patches)
        if isinstance(values, Tensor) and values.is_floating_point():
            torch.mm(grad, weight)

    found: dict[tuple[str, str], Callable[[], Any]] = {
        ("forward", "torch.mm"): lambda: torch.mm(patches, weight.t(), out=out),
        ("forward", "F.linear"): lambda: functional.linear(patches, weight),
        ("backward", "torch.mm"): backward,
    }
    if weight.is_cpu and has_alternative(weight.dtype):
        found["forward", "oneDNN"] = lambda: alternative(patches, weight)
    return found


def _bench(name: str, **inputs: Any) -> BenchCase:
    return BenchCase(name, _inputs(**inputs), moved=_moved, flops=_flops)


_BENCH = [
    _bench("clip_l14_336_x5", shape=(5, 3, 336, 336), weight=(1024, 3, 14, 14), bias=False,
           prefix=1, rows=577),
    _bench("siglip_so400m_384", shape=(1, 3, 384, 384), weight=(1152, 3, 14, 14), rows=729),
    _bench("internvit_448_x13", shape=(13, 3, 448, 448), weight=(1024, 3, 14, 14), prefix=1,
           rows=1025),
    _bench("pixtral_1024", shape=((3, 1024, 1024),), weight=(1024, 3, 16, 16), bias=False),
    _bench("qwen2vl_1036", shape=(5476, 1176), weight=(1280, 3, 2, 14, 14), bias=False),
    _bench("qwen2vl_video64", shape=(32 * 1024, 1176), weight=(1280, 3, 2, 14, 14), bias=False),
    _bench("uint8_clip_x5", shape=(5, 3, 336, 336), weight=(1024, 3, 14, 14), bias=False,
           pixel_dtype=torch.uint8, prefix=1, rows=577, **_RAW),
]  # fmt: skip


SPEC = Spec(
    op="patch_embed",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    yardstick_for=yardstick_for,
    alike=("siglip", "norm_plain", "sliced", "transposed", "unaligned", "wide_p14", "wide_p16",
           "flat_wide", "one", "patch_1x1", "rectangle", "pixels_fp32", "uint8_rescaled",
           "uint8_channels_last", "raw_floats"),
    differentiable=("pixel_values", "weight", "bias", "norm_weight", "norm_bias", "prefix", "table",
                    "table_weight", "tile", "tile_weight"),
    written=(),
    cases=CASES,
    few=FEW,
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    products=_products,
)  # fmt: skip
