"""Cases, benchmark shapes and bad calls of `vlmops.mlp_projector`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.linear import (
    activated,
    alternative,
    has_alternative,
)
from vlmops.ops.mlp_projector import mlp_projector, reference
from vlmops.ops.mlp_projector_steps import Arguments as OfOp
from vlmops.ops.spec import Arguments, BadCall, BenchCase, Case, Spec, alter, swap, yardstick_linear

_TENSORS = OfOp._fields[:9]


def _function(**args: Any) -> tuple[Tensor]:
    return (mlp_projector(**args),)


def _reference(**args: Any) -> tuple[Tensor]:
    args.pop("backend", None)
    return (reference(**args),)


def _schema_arguments(args: Arguments) -> tuple[Any, ...]:
    texts = [args[name] or "none" for name in ("activation", "out_activation", "norm")]
    tensors = [args[name] for name in _TENSORS]
    return (*tensors, *texts, args["norm_eps"], args["norm_offset"])


def _inputs(
    shape: Sequence[int] = (2, 5, 24),
    hidden: int = 40,
    out: int | None = 16,
    activation: str | None = "gelu",
    bias: bool = True,
    gate: bool = False,
    out_activation: str | None = None,
    norm: str | None = None,
    affine: bool = True,
    norm_dtype: torch.dtype | None = None,
    x: str = "plain",
    weights: str = "plain",
    scale: float = 1.0,
    **options: Any,
) -> Callable[[torch.dtype, torch.device], Arguments]:
    """``scale`` of what activations meet: their tails."""

    def make(dtype: torch.dtype, device: torch.device) -> Arguments:
        def draw(*size: int, scale: float = 1.0, of: torch.dtype | None = None) -> Tensor:
            return (torch.randn(size, device=device) * scale).to(of or dtype)

        def weight(n: int, k: int, scale: float) -> Tensor:
            if weights == "transposed":  # Gemma-3's [in, out]
                return draw(k, n, scale=scale * max(k, 1) ** -0.5).t()
            if weights == "sliced":
                return draw(n, 2 * k, scale=scale * max(k, 1) ** -0.5)[:, 1::2]
            if weights == "expanded":
                return draw(1, k, scale=scale * max(k, 1) ** -0.5).expand(n, k)
            return draw(n, k, scale=scale * max(k, 1) ** -0.5)

        k = shape[-1]
        values = draw(*shape)
        if norm:  # far from 0, as residual streams are
            values = values + 2.0
        if x == "transposed":
            values = values.transpose(0, -1).contiguous().transpose(0, -1)
        elif x == "sliced":
            values = torch.cat((values, values), -1)[..., :k]
        elif x == "wider":  # the first row is aligned, and what lies between rows is not
            values = torch.cat((values, values[..., :3]), -1)[..., :k]
        elif x == "strided":
            values = values.repeat_interleave(2, -1)[..., ::2]
        elif x == "expanded":
            values = values[:1].expand(tuple(shape))
        elif x == "unaligned":
            values = torch.cat((values.new_zeros(1), values.flatten()))[1:].view(tuple(shape))
        return {
            "x": values,
            "fc1_weight": weight(hidden, k, scale),
            "fc1_bias": draw(hidden) if bias else None,
            "fc2_weight": None if out is None else weight(out, hidden, scale),
            "fc2_bias": draw(out) if bias and out is not None else None,
            "gate_weight": weight(hidden, k, scale) if gate else None,
            "gate_bias": draw(hidden) if gate and bias else None,
            "norm_weight": draw(k, of=norm_dtype) if norm and affine else None,
            "norm_bias": draw(k, of=norm_dtype) if norm == "layer" and affine else None,
            "activation": activation,
            "out_activation": out_activation,
            "norm": norm,
            "norm_eps": 1e-5,
            "norm_offset": 0.0,
            **options,
        }

    return make


_ROWS = {
    # As projectors have it.
    "llava": _inputs(),
    "internvl": _inputs((3, 4, 32), 24, 24, norm="layer"),
    "llama4": _inputs(bias=False, out_activation="gelu"),
    "idefics2": _inputs((2, 7, 24), 40, 16, "silu", bias=False, gate=True),
    "aria": _inputs((2, 7, 24), 40, 16, "gelu_tanh", bias=False, norm="layer"),
    "gemma3": _inputs((2, 4, 24), 40, None, None, bias=False, norm="rms", norm_offset=1.0,
                      weights="transposed"),
    "mistral3_norm": _inputs((9, 33), 21, None, None, bias=False, norm="rms"),
    "linear": _inputs((2, 5, 24), 16, None, None),
    # Activations.
    "quick_gelu": _inputs(activation="quick_gelu"),
    "relu": _inputs(activation="relu"),
    "no_activation": _inputs(activation=None),
    "one_layer": _inputs(out=None, activation="gelu"),
    "gated_one_layer": _inputs(out=None, activation="silu", gate=True),
    "gated_gelu": _inputs((2, 5, 24), activation="gelu", gate=True, norm="rms"),
    "glu_without_activation": _inputs((2, 5, 24), activation=None, gate=True),
    "tails_gelu": _inputs(out=80, scale=6.0),
    "tails_tanh": _inputs(activation="gelu_tanh", out_activation="silu", out=80, scale=6.0),
    "out_relu": _inputs(activation="silu", out_activation="relu"),
    # Norms.
    "norm_plain": _inputs(norm="layer", affine=False, norm_eps=1e-6),
    "norm_fp32": _inputs(norm="layer", norm_dtype=torch.float32),
    "norm_sliced": _inputs((3, 4, 24), norm="layer", x="sliced"),
    "norm_wider": _inputs((3, 4, 24), norm="layer", x="wider"),
    "norm_wider_odd": _inputs((3, 4, 13), norm="layer", x="wider"),
    "norm_strided": _inputs((3, 4, 24), norm="rms", x="strided"),
    "norm_expanded": _inputs((3, 4, 24), norm="rms", x="expanded"),
    "norm_unaligned": _inputs((3, 4, 24), norm="layer", x="unaligned"),
    "norm_wide": _inputs((5, 150), 17, 9, norm="layer"),
    # Strides.
    "transposed": _inputs((3, 4, 24), x="transposed"),
    "expanded": _inputs((3, 4, 24), x="expanded"),
    "weights_sliced": _inputs(weights="sliced"),
    "weights_expanded": _inputs(weights="expanded"),
    # Sizes.
    "many_rows": _inputs((2, 45, 24), 72, 40, norm="layer"),
    "many_gated": _inputs((90, 24), 300, 17, "silu", gate=True),
    "odd": _inputs((7, 13), 11, 3, norm="layer"),
    "vector": _inputs((24,)),
    "one": _inputs((1, 1), 1, 1),
    "no_rows": _inputs((2, 0, 24), norm="layer"),
    "no_rows_gated": _inputs((0, 24), gate=True, out_activation="gelu"),
}  # fmt: skip

CASES = [Case(name, make) for name, make in _ROWS.items()]
_FEW = ("llava", "internvl", "llama4", "idefics2", "gemma3", "norm_wider")
FEW = [case for case in CASES if case.name in _FEW]


def eager_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """Hugging Face's projectors: norm, linear, activation, linear, each by itself."""
    return _with_products(functional.linear)


def yardstick_for(args: Arguments) -> Callable[..., tuple[Tensor]]:
    """The same, by products that add up as those of the library do."""
    return _with_products(yardstick_linear(args["x"], max(w.shape[1] for w in _weights(args))))


def _with_products(linear: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    def eager(**args: Any) -> tuple[Tensor]:
        z = args["x"]
        if args["norm"] is not None:
            z = _norm(args)
        hidden = linear(z, args["fc1_weight"], args["fc1_bias"])
        if args["gate_weight"] is None:
            hidden = activated(hidden, args["activation"])
        else:
            gate = linear(z, args["gate_weight"], args["gate_bias"])
            hidden = activated(gate, args["activation"]) * hidden
        if args["fc2_weight"] is None:
            return (hidden,)
        out = linear(hidden, args["fc2_weight"], args["fc2_bias"])
        return (activated(out, args["out_activation"]),)

    return eager


def _norm(args: Arguments) -> Tensor:
    x: Tensor = args["x"]
    weight, bias = args["norm_weight"], args["norm_bias"]
    eps, offset = args["norm_eps"], args["norm_offset"]
    if args["norm"] == "layer":
        mixed = weight is not None and weight.dtype != x.dtype
        y = functional.layer_norm(x.float() if mixed else x, x.shape[-1:], weight, bias, eps)
        return y.to(x.dtype)
    z: Tensor = x.float()
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    if offset:  # Gemma's
        z = z * (offset + weight.float())
        return z.to(x.dtype)
    z = z.to(x.dtype)
    if weight is not None:
        z = (weight * z).to(x.dtype)
    return z


# The good call is CASES[0]: x [2, 5, 24], fc1_weight [40, 24], fc2_weight [16, 40].
ERRORS = [
    BadCall("x_float64", alter("x", Tensor.double),
            r"x: expected dtype float32, bfloat16 or float16, got float64"),
    BadCall("x_scalar", swap(x=torch.tensor(1.0)), r"x: expected shape \[\.\.\., K\], got \[\]"),
    BadCall("x_width", alter("x", lambda t: t[..., :23]),
            r"fc1_weight: expected shape \[N, 23\] for x \[2, 5, 23\], got \[40, 24\]"),
    BadCall("x_no_tensor", swap(x=[1.0]), r"x: expected a torch.Tensor, got list", TypeError),
    BadCall("weight_none", swap(fc1_weight=None),
            r"fc1_weight: expected a torch.Tensor, got NoneType", TypeError),
    BadCall("weight_rank", alter("fc1_weight", torch.flatten),
            r"fc1_weight: expected shape \[N, 24\].*got \[960\]"),
    BadCall("mixed", alter("fc1_weight", Tensor.bfloat16),
            r"fc1_weight: expected dtype float32, that of x, got bfloat16"),
    BadCall("mixed_x", alter("x", Tensor.half),
            r"fc1_weight: expected dtype float16, that of x, got float32"),
    BadCall("fc2_width", alter("fc2_weight", lambda t: t[:, :39]),
            r"fc2_weight: expected shape \[N, 40\].*got \[16, 39\]"),
    BadCall("fc2_dtype", alter("fc2_weight", Tensor.half),
            r"fc2_weight: expected dtype float32, that of x, got float16"),
    BadCall("fc1_bias_length", swap(fc1_bias=torch.zeros(39)),
            r"fc1_bias: expected shape \[40\].*got \[39\]"),
    BadCall("fc2_bias_length", swap(fc2_bias=torch.zeros(40)),
            r"fc2_bias: expected shape \[16\].*got \[40\]"),
    BadCall("bias_dtype", swap(fc2_bias=torch.zeros(16, dtype=torch.half)),
            r"fc2_bias: expected dtype float32, that of x, got float16"),
    BadCall("gate_shape", swap(gate_weight=torch.zeros(39, 24)),
            r"gate_weight: expected shape \[40, 24\].*got \[39, 24\]"),
    BadCall("gate_bias_alone", swap(gate_bias=torch.zeros(40)),
            r"gate_bias: expected None without a gate_weight"),
    BadCall("fc2_bias_alone", swap(fc2_weight=None),
            r"fc2_bias: expected None without a fc2_weight"),
    BadCall("activation", swap(activation="swish"),
            r"activation: expected 'gelu', .*or None, got 'swish'"),
    BadCall("out_activation", swap(out_activation="gelu_new"),
            r"out_activation: expected 'gelu', .*or None, got 'gelu_new'"),
    BadCall("out_activation_alone", swap(fc2_weight=None, fc2_bias=None, out_activation="gelu"),
            r"out_activation: expected None without a fc2_weight, got 'gelu'"),
    BadCall("norm", swap(norm="batch"), r"norm: expected 'layer', 'rms' or None, got 'batch'"),
    BadCall("norm_weight_alone", swap(norm_weight=torch.zeros(24)),
            r"norm: expected 'layer' or 'rms', as a norm_weight"),
    BadCall("norm_weight_length", swap(norm="rms", norm_weight=torch.zeros(23)),
            r"norm_weight: expected shape \[24\].*got \[23\]"),
    BadCall("norm_bias_length", swap(norm="layer", norm_bias=torch.zeros(1)),
            r"norm_bias: expected shape \[24\].*got \[1\]"),
    BadCall("norm_eps", swap(norm="rms", norm_eps=0.0), r"norm_eps: expected a positive.*got 0"),
    BadCall("norm_offset", swap(norm="rms", norm_offset=float("nan")),
            r"norm_offset: expected a finite number, got nan"),
    BadCall("device", swap(fc2_bias=torch.zeros(16, device="meta")), r"fc2_bias: expected.*on"),
]  # fmt: skip


def _weights(args: Arguments) -> list[Tensor]:
    names = ("gate_weight", "fc1_weight", "fc2_weight")
    return [args[name] for name in names if args[name] is not None]


def _moved(args: Arguments) -> list[Tensor]:
    """As many bytes as x, weights and result have: a copy reads half of them, writes half."""
    x = args["x"]
    rows, last = x.shape[:-1].numel(), _weights(args)[-1]
    elements = x.numel() + sum(w.numel() for w in _weights(args)) + rows * len(last)
    return [torch.zeros(elements * x.element_size() // 2, dtype=torch.uint8, device=x.device)]


def _flops(args: Arguments) -> float:
    rows = args["x"].shape[:-1].numel()
    return float(sum(2 * rows * w.numel() for w in _weights(args)))


def _products(args: Arguments) -> Mapping[tuple[str, str], Callable[[], Any]]:
    """Forward, and the gradients of weights and of what they multiply."""
    weights = _weights(args)
    rows = args["x"].shape[:-1].numel()
    given = [torch.randn(rows, w.shape[1], device=w.device).to(w) for w in weights]
    outs = [w.new_empty(rows, len(w)) for w in weights]
    grads = [torch.randn(rows, len(w), device=w.device).to(w) for w in weights]

    def each(multiply: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for x, w, out in zip(given, weights, outs, strict=True):
                multiply(x, w, out)

        return run

    def backward() -> None:
        for x, w, grad in zip(given, weights, grads, strict=True):
            torch.mm(grad.t(), x)
            torch.mm(grad, w)

    found: dict[tuple[str, str], Callable[[], Any]] = {
        ("forward", "torch.mm"): each(lambda x, w, out: torch.mm(x, w.t(), out=out)),
        ("forward", "F.linear"): each(lambda x, w, out: functional.linear(x, w)),
        ("backward", "torch.mm"): backward,
    }
    if weights[0].is_cpu and has_alternative(weights[0].dtype):
        found["forward", "oneDNN"] = each(lambda x, w, out: alternative(x, w))
    return found


def _bench(name: str, **inputs: Any) -> BenchCase:
    return BenchCase(name, _inputs(**inputs), moved=_moved, flops=_flops)


_BENCH = [
    _bench("llava_576", shape=(576, 1024), hidden=4096, out=4096),
    _bench("llava_2880", shape=(2880, 1024), hidden=4096, out=4096),
    _bench("internvl_x13", shape=(13 * 256, 4096), hidden=896, out=896, norm="layer"),
    _bench("qwen2vl_7b", shape=(1225, 5120), hidden=5120, out=3584),
    _bench("qwen2vl_2b", shape=(1225, 5120), hidden=5120, out=1536),
    _bench("qwen3vl_deepstack", shape=(1225, 4608), hidden=4608, out=4096, norm="layer"),
    _bench("idefics2", shape=(4900, 1152), hidden=14336, out=4096, activation="silu", bias=False,
           gate=True),
]  # fmt: skip


SPEC = Spec(
    op="mlp_projector",
    function=_function,
    in_place=None,
    reference=_reference,
    eager_for=eager_for,
    yardstick_for=yardstick_for,
    alike=("quick_gelu", "relu", "tails_gelu", "tails_tanh", "norm_plain", "norm_sliced",
           "norm_wider", "norm_wider_odd", "norm_strided", "norm_unaligned", "norm_wide",
           "transposed", "weights_sliced", "many_rows", "many_gated", "odd", "one", "out_relu",
           "gated_gelu", "mistral3_norm"),
    differentiable=_TENSORS,
    written=(),
    cases=CASES,
    few=FEW,
    bench={case.name: case for case in _BENCH},
    errors=ERRORS,
    schema_arguments=_schema_arguments,
    products=_products,
    casts_under_autocast=_TENSORS[:-2],
)  # fmt: skip
