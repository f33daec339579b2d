"""The steps of a projector: products of torch's, and kernels before, between and after them.

Functions take the arguments of the op ``vlmops::mlp_projector`` in its order. `Kernels` says whose
kernels: the compiled library's, which has them for the CPU and for CUDA, or Triton's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops import linear as products


class Arguments(NamedTuple):
    """Of the op, with its defaults: torch leaves out what equals them."""

    x: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None = None
    fc2_weight: Tensor | None = None
    fc2_bias: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    activation: str = "none"
    out_activation: str = "none"
    norm: str = "none"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    keep: bool = False

    @property
    def differentiable(self) -> list[Tensor | None]:
        """The tensors, in the order of `backward`'s gradients."""
        return [self.x, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias,
                self.gate_weight, self.gate_bias, self.norm_weight, self.norm_bias]  # fmt: skip

    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        last = self.fc1_weight if self.fc2_weight is None else self.fc2_weight
        return (*self.x.shape[:-1], last.shape[0])

    def widths(self) -> list[int]:
        """Of the layers that are kept for backward: see `forward`."""
        hidden = self.fc1_weight.shape[0]
        gate = [hidden] if self.gate_weight is not None else []
        if self.fc2_weight is None:
            return [hidden, *gate] if gate or self.activation != "none" else []
        out = [] if self.out_activation == "none" else [self.fc2_weight.shape[0]]
        return [hidden, *gate, *out]


TENSORS = 9
"""How many of the arguments are tensors; they come first."""

PANEL = 28 * 2**20
"""Bytes of normalised rows that a CPU has at a time."""
_LEAST = 1024
"""Rows that make up for the packing of a weight, which each product begins with."""


class Kernels(NamedTuple):
    """What surrounds the products, on matrices ``[rows, width]``; see mlp_projector.cpp."""

    norm: Callable[..., Tensor]
    norm_backward: Callable[..., Sequence[Tensor]]
    activate: Callable[..., None]
    activate_backward: Callable[..., Sequence[Tensor]]
    sum_rows: Callable[[Tensor, Tensor], Tensor]
    """Over the first dimension, in the dtype of the second argument; on a GPU."""


@functools.cache
def compiled() -> Kernels:
    """The library's."""
    ops = torch.ops.vlmops
    return Kernels(*(getattr(ops, f"mlp_projector_{name}").default for name in Kernels._fields))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Neither autograd nor autocast reaches into an op."""
    with torch.no_grad():
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


def _rows(x: Tensor) -> Tensor:
    """``[rows, K]`` with rows that are contiguous; a view where that can be."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _normed(kernels: Kernels, a: Arguments, x: Tensor) -> Tensor:
    if a.norm == "none":
        return x
    return kernels.norm(x, a.norm, a.norm_weight, a.norm_bias, a.norm_eps, a.norm_offset)


def _on_gpu(kernels: Kernels, x: Tensor) -> bool:
    """Whether products are a GPU's: on the emulated and the interpreted one too."""
    return x.is_cuda or kernels is not compiled() or bool(torch.ops.vlmops.emulated(x))


def _has_epilogue(activation: str, x: Tensor) -> bool:
    """Whether cuBLASLt applies the activation: tanh's gelu alone, before it rounds to 16 bits.

    In float32 its tanh is less accurate than torch's (measured on an H200).
    """
    return activation == "gelu_tanh" and x.is_cuda and x.dtype != torch.float32


def forward(kernels: Kernels, *args: Any) -> list[Tensor]:
    """The result and, with ``keep``, what `backward` takes: each layer before its activation.

    Backward needs a layer before and after its activation. The second is made from the first in a
    pass that reads it anyway, for one store more; keeping both would take as much memory again.
    """
    a = Arguments(*args)
    with plainly():
        torch.ops.vlmops.mlp_projector_check(*args)
        x = _rows(a.x)
        step = _panel(a) if x.is_cpu else len(x)
        if len(x) <= step:
            out, *kept = _forward(kernels, a, x)
            return [out.view(a.shape()), *kept]
        whole: list[Tensor] = []
        for begin in range(0, len(x), step):
            parts = _forward(kernels, a, x[begin : begin + step])
            whole = whole or [part.new_empty(len(x), part.shape[1]) for part in parts]
            for to, part in zip(whole, parts, strict=True):
                to[begin : begin + step] = part
        return [whole[0].view(a.shape()), *whole[1:]]


def _panel(a: Arguments) -> int:
    """Rows of x at a time on a CPU, so that those normalised lie in memory that was used before.

    From 32 MB on malloc takes new pages from the system each time; writing to those costs 5 to 20
    times as much. Other layers are results of products, which allocate alike whoever calls them.
    """
    rows = a.x.shape[:-1].numel()
    if a.norm == "none":
        return rows
    most = max(_LEAST, PANEL // max(a.x.shape[-1] * a.x.element_size(), 1))
    return -(-rows // max(-(-rows // most), 1))


def _forward(kernels: Kernels, a: Arguments, x: Tensor) -> list[Tensor]:
    """`forward` of rows ``[rows, K]``."""
    on_gpu = _on_gpu(kernels, x)
    kept: list[Tensor] = []

    def activated(x: Tensor, activation: str, gate: Tensor | None = None) -> Tensor:
        if activation == "none" and gate is None:
            return x
        out = torch.empty_like(x) if a.keep else x
        kernels.activate(x, gate, activation, out)
        return out

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        if a.keep and activation != "none":
            kept.append(layer(x, weight, bias, "none"))
            return activated(kept[-1], activation)
        if _has_epilogue(activation, x) and bias is not None:
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        if not products.is_plain(x, weight, bias):
            return activated(functional.linear(x, weight, bias), activation)
        if on_gpu:  # an emulated one
            return activated(products.product(x, weight, bias, None, activated), activation)
        fused = None if activation == "none" else cast(products.Activation, activation)
        return products.product(x, weight, bias, fused, activated)

    z = _normed(kernels, a, x)
    if a.gate_weight is not None:
        gate = layer(z, a.gate_weight, a.gate_bias, "none")
        hidden = layer(z, a.fc1_weight, a.fc1_bias, "none")
        if a.keep:
            kept += [hidden, gate]
        out = activated(hidden, a.activation, gate)
    else:
        out = layer(z, a.fc1_weight, a.fc1_bias, a.activation)
        if a.keep and a.activation == "none" and a.fc2_weight is not None:
            kept.append(out)
    if a.fc2_weight is not None:
        out = layer(out, a.fc2_weight, a.fc2_bias, a.out_activation)
    return [out, *kept]


def backward(
    kernels: Kernels, grad: Tensor, kept: Sequence[Tensor], needs: Sequence[bool], *args: Any
) -> list[Tensor]:
    """The gradients of the op's tensors, in its order; empty where ``needs`` says no."""
    a = Arguments(*args)
    with plainly():
        found = _gradients(kernels, grad, kept, a, needs)
        return [
            grad.new_empty(0)
            if t is None or g is None or not needed
            else g.to(t.dtype).reshape(t.shape)
            for g, t, needed in zip(found, a.differentiable, needs, strict=True)
        ]


def _gradients(
    kernels: Kernels, grad: Tensor, kept: Sequence[Tensor], a: Arguments, needs: Sequence[bool]
) -> list[Tensor | None]:
    on_gpu = _on_gpu(kernels, a.x)

    def through(g: Tensor, weight: Tensor, to: Tensor | None = None) -> Tensor:
        if on_gpu:
            return g @ weight
        if to is None or not (g.dtype == torch.float32 or products.multiplies(g.dtype)):
            return products.linear(g, weight.t())
        return torch.mm(g, weight, out=to)

    def summed(x: Tensor, like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return kernels.sum_rows(x, like) if on_gpu else x.sum(0)

    def of_weight(g: Tensor, x: Tensor) -> Tensor:
        return g.t() @ x if on_gpu else products.linear(g.t(), x.t())

    (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gate_weight, gate_bias, norm_weight,
     norm_bias) = needs  # fmt: skip
    below = x or norm_weight or norm_bias
    needs_hidden = below or fc1_weight or fc1_bias or gate_weight or gate_bias
    found: dict[str, Tensor | None] = {}
    layers = iter(kept)
    g = _rows(grad).contiguous()
    plain = a.activation == "none" and a.gate_weight is None
    hidden = next(layers) if a.fc2_weight is not None or not plain else None
    gate = next(layers) if a.gate_weight is not None else None
    above = g
    if a.fc2_weight is not None:
        if a.out_activation != "none":
            above = torch.empty_like(g)
            _, _, sums, _ = kernels.activate_backward(
                g, next(layers), None, a.out_activation, above, False, fc2_bias, False
            )
            if fc2_bias:
                found["fc2_bias"] = summed(sums, a.fc2_bias)
        elif fc2_bias:
            found["fc2_bias"] = summed(g, a.fc2_bias)
        g = through(above, a.fc2_weight) if needs_hidden else above
    out, of_gate = hidden, None
    if not plain and needs_hidden:
        of_hidden = torch.empty_like(g) if a.fc2_weight is None else g  # else nobody has seen g
        of_gate, out, sums, gate_sums = kernels.activate_backward(
            g, hidden, gate, a.activation, of_hidden, fc2_weight, fc1_bias, gate_bias
        )
        g = of_hidden
        if fc1_bias:
            found["fc1_bias"] = summed(sums, a.fc1_bias)
        if gate_bias:
            found["gate_bias"] = summed(gate_sums, a.gate_bias)
    elif not plain and fc2_weight and hidden is not None:
        out = torch.empty_like(hidden)
        kernels.activate(hidden, gate, a.activation, out)
    elif fc1_bias:
        found["fc1_bias"] = summed(g, a.fc1_bias)
    if fc2_weight and out is not None:
        found["fc2_weight"] = of_weight(above, out)
    del out
    z = None
    if fc1_weight or gate_weight:
        z = _normed(kernels, a, _rows(a.x))
        if fc1_weight:
            found["fc1_weight"] = of_weight(g, z)
        if gate_weight and of_gate is not None:
            found["gate_weight"] = of_weight(of_gate, z)
    if below:
        of_z = through(g, a.fc1_weight, None if a.norm == "none" else z)  # z is of no more use
        if a.gate_weight is not None and of_gate is not None:
            of_z = of_z.add_(through(of_gate, a.gate_weight))
        found["x"] = of_z
        if a.norm != "none":
            # A GPU reads the gradient again for its sums.
            of_x = None if not x else torch.empty_like(of_z) if on_gpu else of_z
            sums, bias_sums = kernels.norm_backward(
                of_z, _rows(a.x), a.norm, a.norm_weight, a.norm_eps, a.norm_offset, of_x,
                norm_weight, norm_bias,
            )  # fmt: skip
            if of_x is not None:
                found["x"] = of_x
            if norm_weight:
                found["norm_weight"] = summed(sums, a.norm_weight)
            if norm_bias:
                found["norm_bias"] = summed(bias_sums, a.norm_bias)
    return [found.get(name) for name in Arguments._fields[:TENSORS]]
