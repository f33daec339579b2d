"""Matrix products on the CPU: ``activation(x @ weight.T + bias) + residual``, the fastest way.

None of the ways is ours; what is ours is the choice, by dtype, size and number of rows:

=========  ========================================================================================
torch      ``F.linear``: MKL in float32, oneDNN in 16 bits where oneDNN has a primitive for them
onednn     float32 by oneDNN, which ships with torch: up to 3x MKL on AMD, where MKL runs AVX2 code
panels     bfloat16 and float16 where the CPU has none: some rows of the weight at a time are
           converted to float32 and multiplied there. The result is rounded once
=========  ========================================================================================

The choice is `linear_tuning`'s where that has measured this machine, as `vlmops.patch` makes it
do, and otherwise `_default`'s, from the measurements of ``bench/linear.py``. Nothing derived from a
weight is kept.

A plain function, not an op: `F.linear` through it takes 3 us more, through an op registered from
Python 6, with autograd 9; and C++ on the stable ABI cannot call oneDNN's op, which takes scalars.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
# Those that oneDNN applies before it stores: attr and algorithm. Its relu turns NaN into 0.
_FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
          "silu": ("swish", "")}  # fmt: skip

FROM_ROWS = (1, 2, 8, 64, 512)
"""Numbers of rows from which on the choice may be another."""

Wins = tuple[bool, ...]
"""For each of `FROM_ROWS`, whether the alternative to F.linear is the faster."""

measured: dict[tuple[torch.dtype, int, int], Wins] = {}
"""By dtype, N and K: what `linear_tuning` found on this machine, in this process."""

_SMALL = 2**20  # elements of a weight; oneDNN's call costs 28 us more than F.linear's
_PANEL = 2**20  # elements of a panel: 4 MB
_BLOCK = 4096  # rows of x that are float32 at a time
_FUSE_FROM = 32  # rows; below, a 16-bit activation of its own costs less than oneDNN's call


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ weight.T + bias) + residual``, differentiable in all four.

    What is no plain CPU tensor (other devices, subclasses, tensors under functorch, autocast,
    forward-mode differentiation or a tracer) goes to ``F.linear`` as it is. So does everything
    under ``torch.compile``, whose compiler knows that operator and can fuse it.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16 (other dtypes: ``F.linear``); any strides.
        weight: ``[N, K]``, dtype of x; any strides.
        bias: ``[N]``, dtype of x.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or
            ``"quick_gelu"`` (x sigmoid(1.702 x)).
        residual: ``[..., N]``, dtype of x.

    Returns:
        ``[..., N]``, dtype of x.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: an unknown activation.

    Example:
        >>> import torch
        >>> from vlmops.ops.linear import linear
        >>> x, weight = torch.randn(2, 5, 64), torch.randn(256, 64)
        >>> linear(x, weight, activation="gelu_tanh").shape
        torch.Size([2, 5, 256])
    """
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"vlmops.ops.linear: activation: expected one of {', '.join(_ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    plain = not torch.compiler.is_compiling() and is_plain(x, weight, bias)
    if plain:
        _check(x, weight, bias)
        out = _product(x, weight, bias, activation)
    else:
        out = activated(functional.linear(x, weight, bias), activation)
    if residual is None:
        return out
    if residual.shape != out.shape or (plain and residual.dtype != out.dtype):
        raise _error("residual", f"{list(out.shape)} of {out.dtype}", residual)
    if not plain or (torch.is_grad_enabled() and (out.requires_grad or residual.requires_grad)):
        return out + residual
    return out.add_(residual)  # nobody else has seen it


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` in float64."""
    out = x.double() @ weight.double().t()
    if bias is not None:
        out = out + bias.double()
    out = activated(out, activation)
    return out if residual is None else out + residual.double()


def alternative(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """The product by what competes with F.linear: oneDNN in float32, panels in 16 bits."""
    if x.dtype == torch.float32:
        return _onednn(x, weight, bias, activation)
    return _panels(x, weight, bias, activation)


def differentiable_alternative(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`alternative` with derivatives."""
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def for_panels(dtype: torch.dtype, n: int, k: int) -> Callable[..., Tensor]:
    """``f(x, weight, bias)`` for hundreds of rows in the cache: F.linear or oneDNN.

    Args:
        dtype: Of all three; one that the CPU multiplies.
        n: Rows of the weight ``[n, k]``, which is contiguous.
        k: Its columns.
    """
    if dtype != torch.float32 or not has_alternative(dtype):
        return functional.linear
    known = measured.get((dtype, n, k))
    # On AMD oneDNN takes 0.3 to 0.5 of MKL's time with AVX-512, and 0.6 to 1 with AVX2.
    if _vendor() == "AuthenticAMD" if known is None else known[-1]:
        return lambda x, weight, bias: _onednn(x, weight, bias, None)
    return functional.linear


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    finish: Callable[[Tensor, Activation], Tensor],
) -> Tensor:
    """`linear` without derivatives, for an op that has kernels of its own for activations.

    Args:
        x: ``[rows, K]``, hundreds of rows; a plain CPU tensor, as the next two are.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        activation: As in `linear`.
        finish: Applies an activation to the product, which it may overwrite, where oneDNN does not
            do so while the product is in the cache.
    """
    n, k = weight.shape
    rows, dtype = len(x), x.dtype
    if rows * n * k == 0:
        faster = False
    elif dtype == torch.float32:
        faster = for_panels(dtype, n, k) is not functional.linear
    else:
        faster = wins(dtype, n, k)[_bracket(rows)]
    if faster and dtype != torch.float32:
        return _panels(x, weight, bias, activation)
    # With AVX2 oneDNN takes four times as long for it as a pass over the memory.
    fused = activation in _FUSED and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if faster:  # it packs the weight anyway; MKL's bits change with the number of threads
        out = _onednn(x, weight.contiguous(), bias, activation if fused else None)
    elif fused and rows >= _FUSE_FROM and _fuses(dtype, weight, activation):
        out = _onednn(x, weight, bias, activation)
    else:
        out, fused = functional.linear(x, weight, bias), False
    return out if fused or activation is None else finish(out, activation)


def has_alternative(dtype: torch.dtype) -> bool:
    """Whether there is another way than F.linear."""
    served = (torch.float32, torch.bfloat16, torch.float16)
    return dtype in served and torch.backends.mkldnn.is_available()


def wins(dtype: torch.dtype, n: int, k: int) -> Wins:
    """For each of `FROM_ROWS`, whether a weight ``[n, k]`` goes the alternative's way."""
    found = measured.get((dtype, n, k))
    if found is None:
        found = _default(None if is_small(n, k) else dtype)
    return found


def _bracket(rows: int) -> int:
    """The place in `FROM_ROWS` of what holds for a number of rows, 1 or more."""
    return bisect.bisect_right(FROM_ROWS, rows) - 1


def is_small(n: int, k: int) -> bool:
    """Whether a weight ``[n, k]`` that nobody measured is left to F.linear for its size alone."""
    return n * k < _SMALL


@functools.cache
def _default(dtype: torch.dtype | None) -> Wins:
    if dtype is None or not has_alternative(dtype):
        return (False,) * len(FROM_ROWS)
    if dtype == torch.float32:
        # With AVX2 it depends on the shape and the threads: 0.8 to 2 times F.linear's speed.
        avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        return (avx512 and _vendor() == "AuthenticAMD",) * len(FROM_ROWS)
    return tuple(rows >= 8 and not multiplies(dtype) for rows in FROM_ROWS)


@functools.cache
def _vendor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: unknown
        return None
    return next((line.split()[-1] for line in lines if line.startswith("vendor_id")), None)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies 16 bits of this dtype on this CPU; F.linear is then oneDNN too."""
    with _disable_current_modes(), torch.no_grad():
        x = torch.zeros(1, 16, dtype=dtype, device="cpu")
        try:
            _onednn(x, x, None, None)
        except RuntimeError:  # "could not create a primitive descriptor": it has none
            return False
    return True


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing but the values of these tensors is at stake."""
    return (
        type(x) is Tensor
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.is_cpu))
        and x.is_cpu
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


_PLAIN = (Tensor, nn.Parameter)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2:
        raise _error("weight", "[N, K]", weight)
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise _error("x", f"[..., {k}], as weight is {list(weight.shape)},", x)
    if x.dtype != weight.dtype:
        raise _error("x", f"{weight.dtype}, as weight is,", x)
    if bias is not None and (bias.shape != (n,) or bias.dtype != weight.dtype):
        raise _error("bias", f"[{n}] of {weight.dtype}", bias)


def _error(name: str, expected: str, got: Tensor) -> RuntimeError:
    return RuntimeError(
        f"vlmops.ops.linear: {name}: expected {expected} got {list(got.shape)} of {got.dtype}"
    )


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    dtype = x.dtype
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    faster = rows * n > 0 and wins(dtype, n, k)[_bracket(rows)]
    # Gradients come with transposed weights: with AVX2 oneDNN is slower then, with AVX-512 hardly
    # faster, and with other strides its results are not to be relied on.
    if faster and dtype == torch.float32:
        faster = weight.is_contiguous()
    if not faster:
        if wants_grad or rows < _FUSE_FROM or not _fuses(dtype, weight, activation):
            return activated(functional.linear(x, weight, bias), activation)
        return _onednn(x, weight, bias, activation)
    if not wants_grad:
        return alternative(x, weight, bias, activation)
    return activated(differentiable_alternative(x, weight, bias), activation)


def _fuses(dtype: torch.dtype, weight: Tensor, activation: Activation | None) -> bool:
    """Whether oneDNN, which F.linear calls anyway, can apply the activation too."""
    return (
        activation is not None
        and activation in _FUSED
        and dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and has_alternative(dtype)
        and multiplies(dtype)
    )


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    if bias is not None and not bias.is_contiguous():  # oneDNN would read on regardless
        bias = bias.contiguous()
    attr, algorithm = _FUSED.get(activation, _FUSED[None])
    # With strides of 0 its results are wrong.
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x.contiguous(), weight, bias, attr, [], algorithm
    )
    return out if activation in _FUSED else activated(out, activation)


def _panels(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None
) -> Tensor:
    n, k = weight.shape
    height = max(16, _PANEL // k)
    out = x.new_empty(*x.shape[:-1], n)
    onednn = _default(torch.float32)[0]
    blocks = x.reshape(-1, k).split(_BLOCK), out.view(-1, n).split(_BLOCK)
    for some, written in zip(*blocks, strict=True):
        rows = some.float()
        for start in range(0, n, height):
            panel = weight[start : start + height].float()
            part = None if bias is None else bias[start : start + height].float()
            if onednn and panel.is_contiguous():
                product = _onednn(rows, panel, part, activation)
            else:
                product = activated(functional.linear(rows, panel, part), activation)
            written[:, start : start + height] = product
    return out


def activated(out: Tensor, activation: Activation | None) -> Tensor:
    """``activation(out)`` by torch's operators."""
    return out if activation is None else _ACTIVATIONS[activation](out)


class _Linear(torch.autograd.Function):
    """Its gradients are products too, by `linear`, which makes them differentiable in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return alternative(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            None if weight is None else linear(grad, weight.t()),
            None if x is None else linear(rows.t(), x.reshape(-1, x.shape[-1]).t()),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )
