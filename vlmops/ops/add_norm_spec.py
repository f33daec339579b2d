"""Cases, benchmark shapes and bad calls of `vlmops.add_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.add_norm import add_norm, reference
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap


def _function(**args: Any) -> tuple[Tensor, ...]:
    result = add_norm(**args)
    return (result,) if isinstance(result, Tensor) else result


def _reference(**args: Any) -> tuple[Tensor, ...]:
    args.pop("backend", None)
    return_sum = args.pop("return_sum", False)
    return reference(**args)[: 1 + return_sum]


def _strided(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` with the strides that ``layout`` names."""
    if layout == "sliced":  # rows of something wider, and more of them
        big = x.new_zeros(*(n + 1 for n in x.shape[:-1]), x.shape[-1] + 3)[..., 1:-2]
        for dim in range(x.dim() - 1):
            big = big.narrow(dim, 1, x.shape[dim])
        return big.copy_(x)
    if layout == "columns":  # some columns of something wider, as a fused projection's
        return torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "heads":  # the middle dimensions the other way round in memory
        return x.transpose(1, -2).contiguous().transpose(1, -2)
    if layout == "apart":  # channels two apart
        return torch.stack((x, x), -1)[..., 0]
    if layout == "unaligned":  # an element past where a wide access may start
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    return x


def _inputs(
    shape: tuple[int, ...] = (2, 5, 48),
    given: str = "residual weight bias x_bias",
    *,
    dtypes: dict[str, torch.dtype] | None = None,
    layouts: tuple[str, str] = ("", ""),
    rows: tuple[int, ...] | None = None,
    centre: float = 0.3,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """Of rows like a model's.

    Args:
        shape: Of x.
        given: The optional tensors that there are.
        dtypes: Of vectors, by name, if they are others than x's.
        layouts: Of x and residual.
        rows: Residual's shape.
        centre: About the mean of rows.
        options: Further arguments.
    """

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        x = centre + torch.randn(shape)
        args: Arguments = {"x": _strided(x.to(device, dtype), layouts[0]), "residual": None}
        if "residual" in given.split():
            residual = torch.randn(shape if rows is None else rows).to(device, dtype)
            args["residual"] = _strided(residual, layouts[1])
        for name in ("weight", "bias", "x_bias"):
            vector = torch.randn(shape[-1]) * 0.5 + (name == "weight")
            vector = vector.to(device, (dtypes or {}).get(name, dtype))
            args[name] = vector if name in given.split() else None
        return {**args, **options}

    return make


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_ROWS = {
    # As models have it.
    "qformer": _inputs(eps=1e-12),
    "prenorm_rms": _inputs((2, 7, 40), "residual weight", rms=True, return_sum=True, eps=1e-6),
    "prenorm": _inputs((3, 72), "residual weight bias x_bias", return_sum=True),
    "heads": _inputs((2, 3, 4, 64), "weight", rms=True, layouts=("heads", "")),
    # What is given.
    "plain": _inputs((3, 40), "weight bias"),
    "nothing": _inputs((3, 40), ""),
    "x_bias_only": _inputs((3, 40), "x_bias bias", return_sum=True),
    "expanded": _inputs(given="residual weight", rows=(5, 48)),
    "weights_fp32": _inputs(dtypes={"weight": _F32, "bias": _F32}),
    "weights_mixed": _inputs(dtypes={"weight": _BF16, "bias": _F32, "x_bias": _F16}),
    # Sizes: what one vector, one warp, one block of a GPU and one thread leave.
    "odd": _inputs((3, 5, 37), return_sum=True),
    "one": _inputs((3, 1), "residual weight"),
    "wide": _inputs((6, 1544), "residual weight x_bias", rms=True),
    "long": _inputs((2, 16400)),
    "threads": _inputs((150, 9, 40)),
    "far": _inputs((9, 200), centre=40.0),
    "no_rows": _inputs((2, 0, 40)),
    # Strides.
    "columns": _inputs((2, 5, 40), layouts=("columns", "sliced"), return_sum=True),
    "apart": _inputs((4, 40), layouts=("apart", "")),
    "unaligned": _inputs((4, 40), layouts=("unaligned", "unaligned"), return_sum=True),
}

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("qformer", "prenorm_rms", "weights_mixed", "odd", "no_rows")
FEW = [case for case in CASES if case.name in _FEW]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor, ...]]:
    """What Hugging Face runs: a sum that is rounded, then LayerNorm, or the T5 and LLaMA norm."""

    def eager(
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        x_bias: Tensor | None = None,
        eps: float = 1e-5,
        rms: bool = False,
        return_sum: bool = False,
    ) -> tuple[Tensor, ...]:
        s = x if x_bias is None else (x + x_bias).to(x.dtype)
        s = s if residual is None else s + residual
        if rms:
            wide = s.float()
            normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
            out = normed if weight is None else (weight * normed).to(x.dtype)
        elif weight is None or weight.dtype == x.dtype == (weight if bias is None else bias).dtype:
            out = functional.layer_norm(s, x.shape[-1:], weight, bias, eps)
        else:  # as under mixed precision
            w, b = (v if v is None else v.float() for v in (weight, bias))
            out = functional.layer_norm(s.float(), x.shape[-1:], w, b, eps).to(x.dtype)
        return (out, s)[: 1 + return_sum]

    return eager


def _arguments(args: Arguments) -> tuple[Any, ...]:
    """Those of the schema; residual in x's shape."""
    given = {"eps": 1e-5, "rms": False, "return_sum": False, **args}
    if given["residual"] is not None:
        given["residual"] = given["residual"].expand(given["x"].shape)
    names = ("x", "residual", "weight", "bias", "x_bias", "eps", "rms", "return_sum")
    return tuple(given[name] for name in names)


def _bad_vectors() -> list[BadCall]:
    """What is asked of weight, bias and x_bias alike."""
    return [
        bad
        for name in ("weight", "bias", "x_bias")
        for bad in (
            BadCall(f"{name}_length", swap(**{name: torch.ones(47)}),
                    rf"{name}: expected shape \[48\], that is \[C\], .*got \[47\]"),
            BadCall(f"{name}_integer", alter(name, Tensor.int),
                    rf"{name}: expected dtype float32, bfloat16 or float16, got int32"),
            BadCall(f"{name}_device", alter(name, lambda t: t.to("meta")),
                    r"expected.* on .*got"),
            BadCall(f"{name}_no_tensor", swap(**{name: 0.5}),
                    rf"{name}: expected a torch.Tensor, got float", TypeError),
        )
    ]  # fmt: skip


# The good call is CASES[0]: x and residual [2, 5, 48], and all vectors.
ERRORS = [
    BadCall("x_rank", swap(x=torch.ones(()), residual=None),
            r"x: expected \[.., C\], got shape \[\]"),
    BadCall("x_float64", alter("x", Tensor.double),
            r"x: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("x_no_tensor", swap(x=3), r"x: expected a torch.Tensor, got int", TypeError),
    BadCall("residual_shape", alter("residual", lambda t: t[:, :3]),
            r"residual: expected shape \[2, 5, 48\], that is x, got \[2, 3, 48\]"),
    BadCall("residual_rank", alter("residual", lambda t: t[None]),
            r"residual: expected shape \[2, 5, 48\], that is x, got \[1, 2, 5, 48\]"),
    BadCall("residual_dtype", alter("residual", Tensor.half),
            r"residual: expected dtype float32, that of x, got float16"),
    BadCall("residual_device", alter("residual", lambda t: t.to("meta")), r"expected.* on .*got"),
    BadCall("residual_no_tensor", swap(residual=[1.0]),
            r"residual: expected a torch.Tensor, got list", TypeError),
    *_bad_vectors(),
    BadCall("bias_rms", swap(rms=True), r"bias: expected None with rms=True"),
    BadCall("eps_zero", swap(eps=0.0), r"eps: expected a positive, finite.*got 0"),
    BadCall("eps_nan", swap(eps=float("nan")), r"eps: expected a positive, finite.*got nan"),
]  # fmt: skip


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as are read and written: a copy reads half of them, writes half."""
    x = args["x"]
    tensors = 3 + args.get("return_sum", False)
    return [torch.zeros(x.numel() * tensors // 2, dtype=x.dtype, device=x.device)]


def _bench(name: str, *inputs: Any, **options: Any) -> BenchCase:
    return BenchCase(
        name,
        _inputs(*inputs, **options),
        moved=_moved,
        # Two sums, those for the mean and the square, and four to norm.
        flops=lambda args: 9.0 * args["x"].numel(),
    )


_POST = "residual weight bias x_bias"
_BENCH = [
    _bench("qformer", (8, 32, 768), _POST, eps=1e-12),
    _bench("instructblip", (8, 64, 768), _POST, eps=1e-12),
    _bench("idefics2_latents", (8, 64, 4096), "residual weight", rms=True, return_sum=True),
    _bench("vit", (4, 577, 1024), "residual weight bias", return_sum=True),
    _bench("long", (4096, 4096), "residual weight", rms=True, return_sum=True),
]


SPEC = Spec(
    op="add_norm",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    differentiable=("x", "residual", "weight", "bias", "x_bias"),
    written=(),
    cases=CASES,
    few=FEW,
    alike=("weights_fp32", "weights_mixed", "odd", "one", "wide", "long", "threads", "far",
           "no_rows", "columns", "apart", "unaligned", "plain"),
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_arguments,
)  # fmt: skip
