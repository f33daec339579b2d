"""Cases, benchmark shapes and bad calls of `vlmops.gated_residual`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmops.ops.gated_residual import gated_residual, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor]:
    return (gated_residual(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


def _strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with the strides that ``layout`` names."""
    if layout == "sliced":  # rows of something wider, and more of them
        big = x.new_zeros(*(n + 1 for n in x.shape[:-1]), x.shape[-1] + 3)[..., 1:-2]
        for dim in range(x.dim() - 1):
            big = big.narrow(dim, 1, x.shape[dim])
        return big.copy_(x)
    if layout == "transposed":  # channels first in memory
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "apart":  # channels two apart, rows on 16 bytes
        return torch.stack((x, x), -1)[..., 0]
    if layout == "swapped":  # the first dimensions the other way round in memory
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "expanded":  # one row seen as many
        return x[:, :1].expand(x.shape)
    if layout == "unaligned":  # an element past where a wide access may start
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    return x


def _inputs(
    shape: tuple[int, ...] = (2, 7, 48),
    gate: str = "one",
    mask: str | None = None,
    *,
    gate_dtype: torch.dtype | None = None,
    layouts: tuple[str, str] = ("", ""),
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``gate``: its form; ``layouts``: of x and of y."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        x, y = torch.randn(2, *shape).to(device, dtype)
        channels = shape[-1]
        forms: dict[str, tuple[int, ...]] = {
            "one": (1,), "number": (), "channels": (channels,), "idefics": (1, 1, channels)
        }  # fmt: skip
        gates = torch.empty(forms[gate]).uniform_(-1.5, 1.5)
        if gates.numel() > 1:
            gates = torch.linspace(-5, 5, channels)[torch.randperm(channels)].view(forms[gate])
        rows = None
        if mask == "mixed":
            rows = torch.rand(shape[:-1]) < 0.6
        elif mask == "strided":
            rows = (torch.rand(*shape[:-1], 2) < 0.6)[..., 1]
        elif mask is not None:
            rows = torch.full(shape[:-1], mask == "all")
        return {
            "x": _strided(x, layouts[0]),
            "y": _strided(y, layouts[1]),
            "gate": gates.to(device, gate_dtype or dtype),
            "row_mask": None if rows is None else rows.to(device),
        }

    return make


_ROWS = {
    # As models have it.
    "mllama_mlp": _inputs(mask="mixed"),
    "idefics": _inputs(gate="idefics", mask="mixed"),
    "mllama": _inputs(),
    "flamingo": _inputs((5, 40), "number"),
    # Gates and masks.
    "channels": _inputs((3, 4, 40), "channels"),
    "gate_fp32": _inputs(gate="channels", mask="mixed", gate_dtype=torch.float32),
    "gate_bf16": _inputs(gate="one", gate_dtype=torch.bfloat16),
    "gate_fp16": _inputs(gate="channels", gate_dtype=torch.float16),
    "none_added": _inputs(gate="channels", mask="none"),
    "all_added": _inputs(mask="all"),
    "one_row": _inputs((72,), "channels", "all"),
    # Sizes: what one vector, one block of a GPU and one thread leave.
    "odd": _inputs((3, 5, 37), "idefics", "mixed"),
    "wide": _inputs((3, 1100), "channels", "mixed"),
    "threads": _inputs((40, 33, 64), "channels", "mixed"),
    "no_rows": _inputs((2, 0, 40), "channels", "mixed"),
    "no_channels": _inputs((2, 3, 0)),
    # Strides.
    "sliced": _inputs((14, 40), "channels", "mixed", layouts=("sliced", "sliced")),
    "swapped": _inputs((2, 3, 4, 40), mask="strided", layouts=("swapped", "sliced")),
    "transposed": _inputs((2, 7, 40), "channels", layouts=("", "transposed")),
    "apart": _inputs((7, 40), "channels", layouts=("", "apart")),
    "expanded": _inputs((2, 7, 40), mask="strided", layouts=("expanded", "")),
    "unaligned": _inputs((2, 7, 40), "channels", layouts=("unaligned", "unaligned")),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("mllama_mlp", "idefics", "gate_fp32", "odd", "sliced", "no_rows")
FEW = [case for case in CASES if case.name in _FEW]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """What Hugging Face runs: Mllama's product with the mask, or Idefics' masked_fill."""
    by_product = args["gate"].dim() < 3

    def eager(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None) -> tuple[Tensor]:
        if row_mask is not None and by_product:
            y = row_mask.type_as(y)[..., None] * y
        elif row_mask is not None:
            y = y.masked_fill(~row_mask[..., None], 0.0)
        # flatten: a gate may have more dimensions than x. A gate of another dtype promotes.
        return ((x + gate.flatten().tanh() * y).to(x.dtype),)

    return eager


# The good call is CASES[0]: x, y [2, 7, 48], gate [1], row_mask [2, 7].
ERRORS = [
    BadCall("x_rank", swap(x=torch.ones(())), r"x: expected \[.., C\], got shape \[\]"),
    BadCall("x_float64", alter("x", Tensor.double),
            r"x: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("x_no_tensor", swap(x=3), r"x: expected a torch.Tensor, got int", TypeError),
    BadCall("y_broadcast", alter("y", lambda t: t[:, :1]),
            r"y: expected shape \[2, 7, 48\], that is x, got \[2, 1, 48\]"),
    BadCall("y_dtype", alter("y", Tensor.half),
            r"y: expected dtype float32, that of x, got float16"),
    BadCall("y_device", alter("y", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("y_no_tensor", swap(y=None), r"y: expected a torch.Tensor, got NoneType", TypeError),
    BadCall("gate_length", swap(gate=torch.ones(7)),
            r"gate: expected one number, or \[C\].*C = 48, .*got shape \[7\]"),
    BadCall("gate_rows", swap(gate=torch.ones(48, 1)), r"gate: expected one.*got shape \[48, 1\]"),
    BadCall("gate_empty", swap(gate=torch.ones(0)), r"gate: expected one.*got shape \[0\]"),
    BadCall("gate_integer", alter("gate", Tensor.int),
            r"gate: expected dtype float32, bfloat16 or float16, got int32"),
    BadCall("gate_device", alter("gate", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("gate_no_tensor", swap(gate=0.5), r"gate: expected a torch.Tensor, got float",
            TypeError),
    BadCall("mask_float", alter("row_mask", Tensor.float),
            r"row_mask: expected dtype bool, got float32"),
    BadCall("mask_shape", alter("row_mask", lambda t: t[..., None]),
            r"row_mask: expected shape \[2, 7\], that is .*, got \[2, 7, 1\]"),
    BadCall("mask_device", alter("row_mask", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("mask_no_tensor", swap(row_mask=[True]),
            r"row_mask: expected a torch.Tensor, got list", TypeError),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as are read and written: a copy reads half of them, writes half."""
    x = args["x"]
    return [torch.zeros(x.numel() * 3 // 2, dtype=x.dtype, device=x.device)]


def _bench(name: str, *inputs: Any) -> BenchCase:
    return BenchCase(
        name, _inputs(*inputs), moved=_moved, flops=lambda args: 2.0 * args["x"].numel()
    )


_BENCH = [
    *(_bench(f"mllama_{n}", (1, n, 4096), "one", "all") for n in (1, 64, 512, 2048)),
    _bench("idefics_9b_512", (1, 512, 4096), "idefics", "all"),
]


SPEC = Spec(
    op="gated_residual",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("x", "y", "gate"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("idefics", "mllama", "flamingo", "channels", "gate_fp32", "gate_bf16", "gate_fp16",
           "none_added", "all_added", "one_row", "odd", "wide", "threads", "no_rows", "sliced",
           "swapped", "transposed", "apart", "expanded", "unaligned"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
)  # fmt: skip
