"""Cases, benchmark shapes and bad calls of `vlmops.hd_transform`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.hd_transform import _options, hd_token_counts, hd_transform, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (hd_transform(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


_OPTIONS = ("crop_grids", "valid_hw", "factor", "reduction", "order", "skip_prefix")


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    options = _options(*(args[name] for name in _OPTIONS))
    return args["image_features"], args["newline"], args["separator"], *options


def _strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with the strides that ``layout`` names."""
    if layout == "sliced":  # wider rows, behind another crop
        big = x.new_zeros(x.shape[0] + 1, *x.shape[1:-1], x.shape[-1] + 3)
        big[1:, ..., 2:-1] = x
        return big[1:, ..., 2:-1]
    if layout == "wider":  # the first row is aligned, and what lies between rows is not
        return torch.cat((x, x[..., :3]), -1)[..., :-3]
    if layout == "apart":  # the same of images
        images = x.flatten(1)
        return torch.cat((images, images[:, :3]), -1)[:, :-3].view(x.shape)
    if layout == "transposed":  # channels first in memory, as convolutions leave them
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # one crop seen as many
        return x[:1].expand(x.shape)
    if layout == "unaligned":  # an element past where a wide access may start
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    return x


def _inputs(
    grids: Sequence[tuple[int, int]] = ((1, 2),),
    side: int = 2,
    channels: int = 16,
    *,
    factor: int = 2,
    padded: int = 0,
    shapes: str = "rows",
    learned_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``padded``: crops of each image, where images are the first dimension; ``side`` of tokens."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        features = options.get("skip_prefix", 0) + (side * factor) ** 2
        crops = sum(1 + h * w for h, w in grids)
        first = (len(grids), padded) if padded else (crops,)
        x = torch.randn(*first, features, channels, device=device).to(dtype)
        depth = channels * (1 if options.get("reduction") else factor**2)
        newline, separator = torch.randn(2, depth).to(device, learned_dtype or dtype)
        if shapes == "phi3":
            newline, separator = newline.view(1, 1, 1, -1), separator.view(1, 1, -1)
        elif shapes == "scattered":
            newline, separator = torch.stack((newline, separator), -1).unbind(-1)
        return {
            "image_features": _strided(x, layout),
            "crop_grids": list(grids),
            "newline": newline,
            "separator": separator,
            "valid_hw": None,
            "factor": factor,
            "reduction": None,
            "order": "sub_glb",
            "skip_prefix": 0,
            **options,
        }

    return make


_SEVERAL = [(1, 2), (3, 1), (2, 2)]
_MANY = [(1, 1 + i % 3) for i in range(40)]  # more than one launch holds

_ROWS = {
    # As models have it.
    "phi3_5": _inputs([(2, 1), (1, 2)], 2, 24, skip_prefix=1, shapes="phi3"),
    "phi3_padded": _inputs(_SEVERAL, 2, 24, padded=6, shapes="phi3"),
    "xcomposer2_4khd": _inputs([(2, 3)], 2, 24, skip_prefix=1, order="glb_sub"),
    "phi4": _inputs(_SEVERAL, 3, 40, padded=5, reduction="mean", valid_hw=[(3, 5), (8, 2), (6, 4)],
                    shapes="phi3"),
    "phi4_pooled": _inputs(_SEVERAL, 3, 40, padded=5, factor=1, valid_hw=[(3, 5), (8, 2), (6, 4)]),
    # Options.
    "one_crop": _inputs([(1, 1)]),
    "several": _inputs(_SEVERAL, 3),
    "many": _inputs(_MANY, 1, 8),
    "many_glb_sub": _inputs(_MANY, 1, 8, padded=4, order="glb_sub", reduction="mean"),
    "glb_sub_valid": _inputs(_SEVERAL, 2, order="glb_sub", valid_hw=[(1, 3), (5, 1), (3, 4)]),
    "valid_nothing": _inputs(_SEVERAL, 2, valid_hw=[(0, 0), (2, 0), (0, 2)]),
    "factor_3": _inputs(_SEVERAL, 2, 12, factor=3),
    "factor_3_mean": _inputs(_SEVERAL, 2, 20, factor=3, reduction="mean"),
    "mean_prefix": _inputs(_SEVERAL, 2, 33, skip_prefix=2, reduction="mean"),
    "learned_fp32": _inputs(learned_dtype=torch.float32),
    "learned_bf16": _inputs(learned_dtype=torch.bfloat16, shapes="phi3"),
    "learned_fp16": _inputs(learned_dtype=torch.float16),
    # Strides.
    "scattered": _inputs(shapes="scattered"),
    "sliced": _inputs(_SEVERAL, 2, layout="sliced"),
    "wider": _inputs(_SEVERAL, 2, layout="wider"),
    "apart": _inputs(_SEVERAL, 2, padded=6, layout="apart"),
    "transposed": _inputs(_SEVERAL, 2, layout="transposed"),
    "transposed_mean": _inputs(_SEVERAL, 2, 24, layout="transposed", reduction="mean"),
    "expanded": _inputs(_SEVERAL, 2, layout="expanded"),
    "unaligned": _inputs(_SEVERAL, 2, layout="unaligned"),
    "unaligned_mean": _inputs(_SEVERAL, 2, layout="unaligned", reduction="mean"),
    # Sizes.
    "threads": _inputs([(3, 4), (2, 2)], 6, 64, skip_prefix=1),
    "threads_mean": _inputs([(3, 4), (2, 2)], 6, 64, reduction="mean"),
    "wide": _inputs([(2, 1)], 2, 1100),
    "narrow": _inputs(_SEVERAL, 2, 1),
    "no_channels": _inputs(channels=0),
    "no_features": _inputs(side=0),
    "no_images": _inputs([]),
}  # fmt: skip

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("phi3_5", "xcomposer2_4khd", "phi4", "factor_3", "mean_prefix", "valid_nothing",
        "learned_fp32", "transposed", "no_images")  # fmt: skip
FEW = [case for case in CASES if case.name in _FEW]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What models run, image for image: merge or pool, place, crop, a newline column, cat."""

    def eager(**args: Any) -> tuple[Tensor]:
        x = args["image_features"][..., args["skip_prefix"] :, :]
        newline, separator = (args[n].reshape(1, 1, -1).to(x.dtype) for n in _LEARNED)
        # Empty, so that all three are in the graph where there are no images.
        made, crop = [newline[0, :0], separator[0, :0], x.sum().expand_as(newline[0])[:0]], 0
        for i, (h, w) in enumerate(args["crop_grids"]):
            crops = x[i] if x.dim() == 4 else x[crop : crop + 1 + h * w]
            crop += 1 + h * w
            glb, sub = (_placed(args, part, *grid) for part, grid in (
                (crops[:1], (1, 1)), (crops[1 : 1 + h * w], (h, w))))  # fmt: skip
            if args["valid_hw"] is not None:
                height, width = args["valid_hw"][i]
                sub = sub[:height, :width]
            glb, sub = (
                torch.cat((t, newline.expand(len(t), -1, -1)), 1).flatten(0, 1) for t in (glb, sub)
            )
            parts = [sub, separator[0], glb]
            made += parts if args["order"] == "sub_glb" else parts[::-1]
        return (torch.cat(made),)

    return eager


_LEARNED = ("newline", "separator")


def _placed(args: Arguments, crops: Tensor, h: int, w: int) -> Tensor:
    """Crops ``[h * w, g * g, C]`` where they lie in the picture, ``[h * s, w * s, K]``."""
    f, channels = args["factor"], crops.shape[-1]
    g = math.isqrt(crops.shape[1])
    side = g // f
    if args["reduction"] == "mean" and crops.numel():
        grid = crops.reshape(h * w, g, g, channels).permute(0, 3, 1, 2)
        merged = functional.avg_pool2d(grid, f).permute(0, 2, 3, 1)
    else:
        merged = crops.reshape(h * w, side, f, side, f, channels).permute(0, 1, 3, 2, 4, 5)
    depth = channels if args["reduction"] == "mean" else f * f * channels
    merged = merged.reshape(h, w, side, side, depth).permute(0, 2, 1, 3, 4)
    return merged.reshape(h * side, w * side, depth)


# The good call is CASES[0]: [3 + 3, 1 + 4 * 4, 24], crop_grids (2, 1), (1, 2), K = 96.
ERRORS = [
    BadCall("rank", alter("image_features", lambda t: t[0]),
            r"image_features: expected \[crops, N, C\] or \[B, crops, N, C\], got .*\[17, 24\]"),
    BadCall("float64", alter("image_features", Tensor.double),
            r"image_features: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("no_tensor", swap(image_features=3),
            r"image_features: expected a torch.Tensor, got int", TypeError),
    BadCall("no_square", swap(skip_prefix=0),
            r"image_features: expected crops of skip_prefix \+ g \* g features.* 0, got 17"),
    BadCall("prefix_long", swap(skip_prefix=18),
            r"image_features: expected crops of skip_prefix .* 18, got 17"),
    BadCall("prefix_negative", swap(skip_prefix=-1), r"skip_prefix: expected 0 or more, got -1"),
    BadCall("factor_odd", swap(factor=3),
            r"image_features: expected crops whose side factor 3 divides, got 4 x 4"),
    BadCall("factor_0", swap(factor=0), r"factor: expected 1 to 16, got 0"),
    BadCall("factor_17", swap(factor=17), r"factor: expected 1 to 16, got 17"),
    BadCall("reduction", swap(reduction="max"), r"reduction: expected None or 'mean', got 'max'"),
    BadCall("order", swap(order="sub"), r"order: expected 'sub_glb' or 'glb_sub', got 'sub'"),
    BadCall("crops_missing", swap(crop_grids=[(2, 1), (1, 3)]),
            r"image_features: expected the 7 crops of crop_grids' 2 images"),
    BadCall("crops_left", swap(crop_grids=[(2, 1)]),
            r"image_features: expected the 3 crops of crop_grids' 1 images"),
    BadCall("crops_none", swap(crop_grids=[(2, 1), (0, 2)]),
            r"crop_grids: expected at least one row and column of crops, got 0 x 2 for image 1"),
    BadCall("crops_padded", lambda a: {**a, "crop_grids": [(2, 1), (1, 3)],
                                       "image_features": a["image_features"].view(2, 3, 17, 24)},
            r"crop_grids: expected 1 \+ rows \* columns of at most 3 crops.*got 1 x 3 for image 1"),
    BadCall("images_padded", alter("image_features", lambda t: t.view(2, 3, 17, 24)[:1]),
            r"crop_grids: expected one for each of the 1 images of image_features.*got 2"),
    BadCall("grids_text", swap(crop_grids="2x1"),
            r"crop_grids: expected a list of pairs of integers.*got '2x1'", TypeError),
    BadCall("grids_tensor", swap(crop_grids=torch.ones(2, 2)),
            r"crop_grids: expected a list of pairs of integers", TypeError),
    BadCall("grids_triple", swap(crop_grids=[(2, 1, 1)]),
            r"crop_grids: expected a list of pairs of integers", TypeError),
    BadCall("valid_count", swap(valid_hw=[(4, 2)]),
            r"valid_hw: expected one for each of crop_grids' 2 images, got 1"),
    BadCall("valid_none", swap(valid_hw=[]),
            r"valid_hw: expected one for each of crop_grids' 2 images, got 0"),
    BadCall("valid_large", swap(valid_hw=[(4, 2), (2, 5)]),
            r"valid_hw: expected at most the 2 x 4 tokens of the crops, got 2 x 5 for image 1"),
    BadCall("valid_negative", swap(valid_hw=[(4, 2), (-1, 4)]),
            r"valid_hw: expected .*got -1 x 4"),
    BadCall("valid_float", swap(valid_hw=[(4.0, 2), (2, 4)]),
            r"valid_hw: expected a list of pairs of integers", TypeError),
    BadCall("newline_length", alter("newline", lambda t: t[..., :24]),
            r"newline: expected one row of 96 values.*got shape \[1, 1, 1, 24\]"),
    BadCall("newline_mean", swap(reduction="mean"),
            r"newline: expected one row of 24 values.*got shape \[1, 1, 1, 96\]"),
    BadCall("newline_rows", alter("newline", lambda t: t.view(2, 48)),
            r"newline: expected one row of 96 values.*got shape \[2, 48\]"),
    BadCall("newline_integer", alter("newline", Tensor.int),
            r"newline: expected dtype float32, bfloat16 or float16, got int32"),
    BadCall("newline_no_tensor", swap(newline=[1.0] * 96),
            r"newline: expected a torch.Tensor, got list", TypeError),
    BadCall("separator_length", alter("separator", lambda t: t[..., 1:]),
            r"separator: expected one row of 96 values.*got shape \[1, 1, 95\]"),
    BadCall("device", alter("separator", lambda t: t.to("meta")), r"expected.* on .*got"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as are read and written: a copy reads half of them, writes half."""
    x, f = args["image_features"], args["factor"]
    side = math.isqrt(x.shape[-2] - args["skip_prefix"]) // f
    counts = hd_token_counts(args["crop_grids"], side, valid_hw=args["valid_hw"])
    written = sum(counts) * args["newline"].numel()
    read = written * (f * f if args["reduction"] else 1)
    return [torch.zeros((read + written) // 2, dtype=x.dtype, device=x.device)]


def _flops(args: Arguments) -> float:
    return float(args["image_features"].numel()) if args["reduction"] else 0.0


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    return BenchCase(name, _inputs(*inputs, **options), moved=_moved, flops=_flops)


_BENCH = [
    _bench("phi3_5_4x4", [(4, 4)], 12, 1024, skip_prefix=1),
    _bench("phi3_5_16_images", [(1, 1), (2, 2), (1, 3), (2, 1)] * 4, 12, 1024, skip_prefix=1),
    _bench("phi4_4x4", [(4, 4)], 16, 1152, reduction="mean", valid_hw=[(58, 64)]),
    _bench("xcomposer2_4khd", [(5, 11)], 12, 1024, skip_prefix=1, order="glb_sub"),
]


SPEC = Spec(
    op="hd_transform",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("image_features", "newline", "separator"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("several", "many", "many_glb_sub", "factor_3_mean", "learned_bf16", "learned_fp16",
           "scattered", "sliced", "wider", "apart", "transposed", "transposed_mean", "expanded",
           "unaligned", "unaligned_mean", "threads", "threads_mean", "wide", "narrow", "one_crop"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
)  # fmt: skip
