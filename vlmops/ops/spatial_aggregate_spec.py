"""Cases, benchmark shapes and bad calls of `vlmops.spatial_aggregate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.spatial_aggregate import reference, spatial_aggregate
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap

ENCODERS = 4
"""Of a case, at most; Triton takes no more."""


def _names(kind: str) -> list[str]:
    """The lists of the op come apart: a SPEC's arguments are tensors."""
    return [f"{kind}_{i}" for i in range(ENCODERS)]


def _lists(args: Arguments) -> dict[str, Any]:
    """The arguments of the op."""
    keys, values = ([args[n] for n in _names(kind) if args[n] is not None] for kind in _KINDS[:2])
    masks = [args[n] for n in _names("mask")][: len(keys)]
    rest = {n: value for n, value in args.items() if n[:-2] not in _KINDS}
    given = None if all(m is None for m in masks) else masks
    return {**rest, "keys": keys, "values": values, "masks": given, **args.get("lists", {})}


_KINDS = ("key", "value", "mask")


def _function(**args: Any) -> tuple[Tensor]:
    lists = _lists(args)
    lists.pop("lists", None)
    return (spatial_aggregate(**lists),)


def _reference(**args: Any) -> tuple[Tensor]:
    lists = _lists(args)
    lists.pop("backend", None)
    return (reference(**lists),)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    lists = _lists(args)
    return lists["q"], lists["keys"], lists["values"], lists["masks"] or [], lists["scale"]


def _strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` ``[B, h, w, H, D]`` with the strides that ``layout`` names."""
    if layout == "sliced":  # of a larger map, as that of a padded image is
        big = functional.pad(x, (0, 0, 0, 0, 1, 2, 1, 1))
        return big[:, 1:-1, 1:-2]
    if layout == "heads_first":
        return x.transpose(1, 3).contiguous().transpose(1, 3)
    if layout == "channels_apart":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":  # one row of tokens seen as many
        return x[:, :1].expand(x.shape)
    if layout == "unaligned":  # an element past where a wide access may start
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    return x


def _mask(kind: str, shape: Sequence[int], window: tuple[int, int]) -> Tensor | None:
    if kind == "none":
        return None
    exists = torch.rand(tuple(shape)) < 0.6
    exists[:, : window[0]] = False  # whole windows, as above a wide picture
    return exists.transpose(1, 2).contiguous().transpose(1, 2) if kind == "strided" else exists


def _inputs(
    grid: tuple[int, int] = (2, 3),
    windows: Sequence[tuple[int, int]] = ((1, 1), (2, 2)),
    heads: int = 2,
    dim: int = 16,
    batch: int = 1,
    masks: Sequence[str] = (),
    layout: str = "",
    scale: float | None = None,
    steep: float = 1.0,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``steep``: what q is multiplied by; ``layout``: of all tensors, or ``fused``."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        q = (torch.randn(batch, *grid, heads, dim) * steep).to(device, dtype)
        given: Arguments = {n: None for kind in _KINDS for n in _names(kind)}
        for i, (height, width) in enumerate(windows):
            shape = (batch, grid[0] * height, grid[1] * width)
            maps = torch.randn(*shape, 2, heads, dim).to(device, dtype)
            of_encoder = maps.unbind(3)
            if layout != "fused":
                of_encoder = tuple(_strided(x.contiguous(), layout) for x in of_encoder)
            given[f"key_{i}"], given[f"value_{i}"] = of_encoder
            mask = _mask(masks[i], shape, windows[i]) if masks else None
            given[f"mask_{i}"] = None if mask is None else mask.to(device)
        return {"q": _strided(q, layout), **given, "scale": scale}

    return make


_ROWS = {
    "padded": _inputs(masks=("none", "mixed")),
    "rectangles": _inputs((2, 3), ((2, 1), (1, 3)), 5, 24, batch=2),
    # As models have it.
    "cambrian": _inputs((2, 2), ((1, 1), (1, 1), (1, 1), (4, 4)), 4, 64),
    "all_padded": _inputs(
        (3, 2), ((1, 1), (2, 2), (1, 1)), 4, 32, masks=("mixed", "strided", "mixed")
    ),
    "one_token": _inputs((2, 2), ((1, 1),), 2, 16),
    "one_query": _inputs((1, 1), ((3, 5), (7, 2)), 2, 16),
    "steep": _inputs((2, 2), ((3, 3),), 2, 64, steep=20.0),
    "scale": _inputs(scale=-0.7),
    # Sizes.
    "dim_8": _inputs((2, 2), ((2, 2),), 5, 8),
    "dim_72": _inputs((1, 2), ((2, 2), (1, 1)), 3, 72),
    "dim_136": _inputs((1, 2), ((2, 1), (1, 1)), 2, 136),
    "dim_256": _inputs((1, 2), ((2, 2), (1, 1)), 4, 256),
    "threads": _inputs((4, 4), ((1, 1), (4, 4)), 4, 64),
    "no_images": _inputs(batch=0),
    # Strides.
    "fused": _inputs(heads=4, dim=32, layout="fused"),
    "sliced": _inputs(layout="sliced", masks=("mixed", "strided")),
    "heads_first": _inputs(heads=4, dim=32, layout="heads_first"),
    "channels_apart": _inputs(heads=4, dim=32, layout="channels_apart"),
    "expanded": _inputs(heads=4, dim=32, batch=2, layout="expanded"),
    "unaligned": _inputs(heads=4, dim=32, layout="unaligned"),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("padded", "rectangles", "one_token", "dim_72", "fused", "no_images")
FEW = [case for case in CASES if case.name in _FEW]


def _unfolded(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A copy, ``[B * queries, tokens of a window, ..]``."""
    x = x.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
    return x.transpose(2, 3).contiguous().flatten(0, 2).flatten(1, 2)


def _published(
    args: Arguments, attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
) -> tuple[Tensor]:
    """Windows are copied, then keys of all encoders into a row; a query is a row of the batch."""
    given, q = _lists(args), args["q"]
    grid = q.shape[1:3]
    k, v = (torch.cat([_unfolded(x, grid) for x in given[n]], 1) for n in ("keys", "values"))
    mask = None
    if given["masks"] is not None:
        each = zip(given["masks"], given["keys"], strict=True)
        all_of = [k.new_ones(k.shape[:3], dtype=torch.bool) if m is None else m for m, k in each]
        mask = torch.cat([_unfolded(m, grid) for m in all_of], 1)[:, None, None]
    scale = q.shape[-1] ** -0.5 if args["scale"] is None else args["scale"]
    rows = q.flatten(0, 2)[:, :, None]  # [B * queries, H, 1, D]
    out = attend(rows, k.transpose(1, 2), v.transpose(1, 2), mask, scale)
    return (out.reshape(q.shape),)


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = q @ k.transpose(2, 3) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    if mask is not None:  # queries of whose tokens none exists
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if q.is_cuda and mask is not None:  # as published
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """Copies of windows, one row of keys, softmax."""
    return lambda **given: _published(given, _softmax)


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """float32 is judged by torch's fused attention, which is what the published code runs."""
    attend = _sdpa if args["q"].dtype == torch.float32 else _softmax
    return lambda **given: _published(given, attend)


def peers(args: Arguments) -> dict[str, Callable[..., Any]]:
    """The published code: torch's fused attention on the same copies."""
    return {"sdpa": lambda **given: _published(given, _sdpa)}


def _list(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Arguments], Arguments]:
    """Another list than the arguments make."""
    return lambda args: {**args, "lists": {name: change(_lists(args)[name])}}


# The good call is CASES[0]: q [1, 2, 3, 2, 16], maps [1, 2, 3, ..] and [1, 4, 6, ..], masks[1].
ERRORS = [
    BadCall("no_tensor", swap(q=3), r"q: expected a torch.Tensor, got int", TypeError),
    BadCall("float64", alter("q", Tensor.double),
            r"q: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("rank", alter("q", lambda t: t.flatten(1, 2)),
            r"q: expected \[B, G_h, G_w, H, D\], got shape \[1, 6, 2, 16\]"),
    BadCall("no_grid", alter("q", lambda t: t[:, :0]),
            r"q: expected a grid of at least one query, got shape \[1, 0, 3, 2, 16\]"),
    BadCall("dim", alter("q", lambda t: t[..., :12]),
            r"q: expected heads of a multiple of 8 channels up to 256, got shape \[1, 2, 3, 2, 12"),
    BadCall("dim_264", alter("q", lambda t: t.repeat(1, 1, 1, 1, 17)[..., :264]),
            r"q: expected heads of a multiple of 8 channels up to 256, got .*264\]"),
    BadCall("keys_tensor", _list("keys", lambda x: x[0]),
            r"keys: expected a list of tensors, one for each encoder, got Tensor", TypeError),
    BadCall("keys_none", _list("keys", lambda x: [x[0], None]),
            r"keys\[1\]: expected a torch.Tensor, got NoneType", TypeError),
    BadCall("no_keys", _list("keys", lambda x: []),
            r"keys: expected one map each of 1 to 8 encoders, got 0"),
    BadCall("nine_keys", _list("keys", lambda x: x[:1] * 9),
            r"keys: expected one map each of 1 to 8 encoders, got 9"),
    BadCall("values_count", _list("values", lambda x: x[:1]),
            r"values: expected as many as keys, 2, got 1"),
    BadCall("values_tensor", _list("values", lambda x: x[0]),
            r"values: expected a list of tensors, .*got Tensor", TypeError),
    BadCall("key_dtype", alter("key_1", Tensor.half),
            r"keys\[1\]: expected dtype float32, that of q, got float16"),
    BadCall("key_rank", alter("key_0", lambda t: t.flatten(1, 2)),
            r"keys\[0\]: expected \[1, h, w, 2, 16\], h and w multiples of the grid 2 x 3 of q .*"
            r"got shape \[1, 6, 2, 16\]"),
    BadCall("key_grid", alter("key_1", lambda t: t[:, :, :5]),
            r"keys\[1\]: expected .*multiples of the grid 2 x 3.*got shape \[1, 4, 5, 2, 16\]"),
    BadCall("key_empty", alter("key_1", lambda t: t[:, :0]),
            r"keys\[1\]: expected .*multiples of the grid.*got shape \[1, 0, 6, 2, 16\]"),
    BadCall("key_batch", alter("key_0", lambda t: t.repeat(2, 1, 1, 1, 1)),
            r"keys\[0\]: expected \[1, h, w, 2, 16\].*got shape \[2, 2, 3, 2, 16\]"),
    BadCall("key_heads", alter("key_0", lambda t: t[:, :, :, :1]),
            r"keys\[0\]: expected \[1, h, w, 2, 16\].*got shape \[1, 2, 3, 1, 16\]"),
    BadCall("key_many", alter("key_0", lambda t: t[:, :1, :1].expand(1, 64, 99, 2, 16)),
            r"keys\[0\]: expected at most 1024 keys for a query, over all encoders, got a window "
            r"of 32 x 33 beside 0 others"),
    BadCall("key_device", alter("key_1", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("value_shape", alter("value_1", lambda t: t[:, :2]),
            r"values\[1\]: expected shape \[1, 4, 6, 2, 16\], that is keys\[1\], got"),
    BadCall("value_dtype", alter("value_0", Tensor.bfloat16),
            r"values\[0\]: expected dtype float32, that of q, got bfloat16"),
    BadCall("masks_count", _list("masks", lambda x: x[1:]),
            r"masks: expected one for each of the 2 encoders, or none, got 1"),
    BadCall("masks_tensor", _list("masks", lambda x: x[1]),
            r"masks: expected a list of tensors or None, .*got Tensor", TypeError),
    BadCall("mask_list", _list("masks", lambda x: [[True], None]),
            r"masks\[0\]: expected a torch.Tensor, got list", TypeError),
    BadCall("mask_dtype", alter("mask_1", Tensor.float),
            r"masks\[1\]: expected dtype bool, got float32"),
    BadCall("mask_shape", alter("mask_1", lambda t: t.flatten(1)),
            r"masks\[1\]: expected shape \[1, 4, 6\], that is one for each token .*got \[1, 24\]"),
    BadCall("mask_device", alter("mask_1", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("scale", swap(scale=math.inf), r"scale: expected a finite number, got inf"),
]  # fmt: skip


def _maps(args: Arguments) -> list[Tensor]:
    return [args[n] for n in _names("key") if args[n] is not None]


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as are read and written: a copy reads half of them, writes half."""
    q = args["q"]
    elements = q.numel() + sum(k.numel() for k in _maps(args))
    return [torch.zeros(elements, dtype=q.dtype, device=q.device)]


def _flops(args: Arguments) -> float:
    """Of two products."""
    return 4.0 * sum(k.numel() for k in _maps(args))


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    return BenchCase(name, _inputs(*inputs, **options), moved=_moved, flops=_flops)


_CAMBRIAN = ((1, 1), (1, 1), (1, 1), (4, 4))

_BENCH = [
    _bench("cambrian", (24, 24), _CAMBRIAN, 16, 64),
    _bench("cambrian_x8", (24, 24), _CAMBRIAN, 16, 64, batch=8),
    # Within the language model, of a picture's own 24 x 18 queries.
    _bench("unpadded", (24, 18), _CAMBRIAN, 16, 64, layout="sliced"),
    _bench("padded", (24, 24), _CAMBRIAN, 16, 64, masks=("mixed",) * 4),
    _bench("maps_48", (24, 24), ((1, 1), (2, 2), (4, 4)), 16, 64),
    _bench("grid_12", (12, 12), ((2, 2), (2, 2), (2, 2), (8, 8)), 16, 64),
]


SPEC = Spec(
    op="spatial_aggregate",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("q", *_names("key"), *_names("value")),
    written=(),
    cases=CASES,
    few=FEW,
    alike=tuple(_ROWS.keys() - {"padded", "cambrian"}),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    peers=peers,
    yardstick_for=yardstick_for,
)
