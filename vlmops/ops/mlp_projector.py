"""The projector between a vision tower and a language model: norm, one or two products, activation.

For every row x of K values::

    z = norm(x)                                         none, "layer" or "rms"
    h = activation(fc1(z))                              without a gate
    h = activation(gate(z)) * fc1(z)                    with one: SwiGLU and the like
    y = out_activation(fc2(h))                          or y = h without fc2

where fc(z) is ``z @ weight.T + bias``, and ``norm(x) = (x - mean) / sqrt(variance + norm_eps) *
(norm_offset + norm_weight) + norm_bias``, without mean for "rms". The projectors of transformers
are data:

==========================  ===========  ===============  =======================================
class                       norm         activation       else
==========================  ===========  ===============  =======================================
LLaVA, NeXT, OneVision,                  gelu
Video-LLaVA, Phi-4
VipLLaVA                    layer        gelu
InternVL                    layer        gelu
Qwen2-VL, Qwen3-VL merger                gelu             normed before tokens are merged
Qwen2.5-VL merger                        gelu             the same, "rms"
Qwen3-VL deepstack          layer        gelu
Aria                        layer        gelu_tanh        no biases
Llama-4                                  gelu             out_activation "gelu"; no biases
Mistral-3                                gelu             no biases; its norm is before the merging
Idefics2, GLM-4V                         silu             gate; no biases
Gemma-3                     rms          none             no fc2; norm_offset 1; fc1_weight is its
                                                          ``[K, N]`` transposed, a view
Idefics3, SmolVLM, Mllama,               none             no fc2
PaliGemma, BLIP-2
==========================  ===========  ===============  =======================================

GLM-4V's merger is a product, a norm and a gelu in front of its SwiGLU: `vlmops.ops.linear`, the two
by themselves, and this op. Janus' aligner is two calls.

Products are the platform's: oneDNN's or MKL's on a CPU (`vlmops.ops.linear`), cuBLAS on a GPU. What
surrounds them takes one read and one write of the data, or none where a library applies it before
it stores. Backward computes the products that are asked for and no others: where a projector alone
is trained, as in LLaVA's first stage, none for x.

Source: Liu et al., Improved Baselines with Visual Instruction Tuning (arXiv 2310.03744).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops import mlp_projector_steps as steps
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.linear import Activation, activated
from vlmops.ops.mlp_projector_steps import TENSORS, Arguments
from vlmops.ops.registration import overloads, register, triton_twin

Norm = Literal["layer", "rms"]


def mlp_projector(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    activation: Activation | None,
    out_activation: Activation | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Projects features of images into the space of text: ``fc2(activation(fc1(norm(x))))``.

    Differentiable in all tensors. Products accumulate in float32, as their libraries do; norm and
    activations are computed in float32 and rounded once. Under autocast tensors of the products are
    cast as `torch.nn.functional.linear` casts them, x before its norm.

    Args:
        x: ``[..., K]``; float32, bfloat16 or float16; any strides.
        fc1_weight: ``[H, K]``, dtype of x as all weights and biases but the norm's; any strides.
        fc1_bias: ``[H]``.
        fc2_weight: ``[N, H]``; None: the result is the hidden layer, and N is H.
        fc2_bias: ``[N]``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` (gelu_new, gelu_pytorch_tanh),
            ``"quick_gelu"`` (x sigmoid(1.702 x)), ``"silu"``, ``"relu"`` or None.
        out_activation: The same, of what fc2 yields.
        gate_weight: ``[H, K]``: the hidden layer is ``activation(gate(z)) * fc1(z)``.
        gate_bias: ``[H]``.
        norm: Of x over K: ``"layer"``, ``"rms"`` or None.
        norm_weight: ``[K]``; float32, bfloat16 or float16. None: 1.
        norm_bias: ``[K]``, the same.
        norm_eps: Added to variance or mean square; positive.
        norm_offset: Added to norm_weight; 1 for Gemma's.
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        ``[..., N]``, dtype of x, contiguous.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> fc1, fc2 = torch.nn.Linear(1024, 4096), torch.nn.Linear(4096, 4096)
        >>> x = torch.randn(1, 576, 1024)
        >>> y = vlmops.mlp_projector(
        ...     x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation="gelu")
        >>> y.shape
        torch.Size([1, 576, 4096])
    """
    tensors = {
        "x": x, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias, "gate_weight": gate_weight, "gate_bias": gate_bias,
        "norm_weight": norm_weight, "norm_bias": norm_bias,
    }  # fmt: skip
    for name, value in tensors.items():
        if value is not None or name in ("x", "fc1_weight"):
            require_tensor("mlp_projector", name, value)
    args = (*_as_autocast(*tensors.values()), activation or "none", out_activation or "none",
            norm or "none", norm_eps, norm_offset)  # fmt: skip
    ops = _COMPILED if _library.error is None else None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _library.require()
    if compiling or backend is not None or dispatch.asked.get() is not None or not x.is_cpu:
        name = dispatch.choose("mlp_projector", backend, x.device.type)
        if name == "reference":
            return _plain(*args)
        if name == "triton":
            ops = _TRITON
    assert ops is not None
    out: Tensor = (ops.forward(*args) if compiling else _forward(ops, *args))[0]
    return out


def _as_autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The op's tensors, those of products in the dtype that autocast has for them."""
    x = tensors[0]
    assert x is not None
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    of_products = len(tensors) - 2  # the last are the norm's
    return [
        t.to(dtype)
        if t is not None and i < of_products and t.is_floating_point() and t.dtype != torch.float64
        else t
        for i, t in enumerate(tensors)
    ]


def reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    activation: Activation | None,
    out_activation: Activation | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    norm: Norm | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
) -> Tensor:
    """`mlp_projector` in float64 and plain torch."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.double().t()
        return y if bias is None else y + bias.double()

    z = x.double()
    if norm == "layer":
        z = z - z.mean(-1, keepdim=True)
    if norm is not None:
        z = z * (z.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        if norm_weight is not None:
            z = z * (norm_offset + norm_weight.double())
        if norm_bias is not None:
            z = z + norm_bias.double()
    hidden = linear(z, fc1_weight, fc1_bias)
    if gate_weight is None:
        hidden = activated(hidden, activation)
    else:
        hidden = activated(linear(z, gate_weight, gate_bias), activation) * hidden
    if fc2_weight is None:
        return hidden
    return activated(linear(hidden, fc2_weight, fc2_bias), out_activation)


def _plain(*args: Any) -> Tensor:
    """`reference` on the op's arguments, rounded: a backend, and derivatives without a kernel."""
    given = Arguments(*args)._asdict()
    del given["keep"]
    for name in ("activation", "out_activation", "norm"):
        given[name] = None if given[name] == "none" else given[name]
    return reference(**given).to(given["x"].dtype)


# Registration. The schemas and the kernels between products are the library's, the op itself is
# `steps.forward`. Triton's op has the same schema.


class _Ops(NamedTuple):
    forward: Any
    backward: Any


class _MlpProjector(torch.autograd.Function):
    """First derivatives; those beyond are `reference`'s."""

    @staticmethod
    def forward(ctx: Any, ops: _Ops, options: tuple[Any, ...], *tensors: Any) -> Any:
        ctx.ops, ctx.options = ops, options
        with torch._C._AutoDispatchBelowAutograd():
            out, *kept = ops.forward(*tensors, *options, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)  # zeros for what was kept would be as large as that
        return out, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (2 + TENSORS)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        tensors, kept = saved[:TENSORS], saved[TENSORS:]
        grads = _backward(ctx.ops, grad, kept, needs, *tensors, *ctx.options)
        return None, None, *(g if n else None for g, n in zip(grads, needs, strict=True))


def _forward(ops: _Ops, *args: Any) -> Sequence[Tensor]:
    a = Arguments(*args)
    recorded = wants_grad(*a.differentiable)
    if forward_ad._current_level >= 0:
        return [_plain(*args)]
    if torch._C._functorch.maybe_current_level() is not None:
        result: Sequence[Tensor] = [_plain(*args)] if recorded else ops.forward(*args)
        return result
    if not recorded:
        with torch._C._AutoDispatchBelowAutograd():
            result = ops.forward(*args)
        return result
    options = a[TENSORS : len(Arguments._fields) - 1]
    result = _MlpProjector.apply(ops, options, *a[:TENSORS])  # type: ignore[no-untyped-call]
    return result if a.keep else result[:1]


def _backward(
    ops: _Ops, grad: Tensor, kept: Sequence[Tensor], needs: Sequence[bool], *args: Any
) -> list[Tensor]:
    a = Arguments(*args)
    if not wants_grad(grad, *a.differentiable):
        with torch._C._AutoDispatchBelowAutograd():
            result: list[Tensor] = ops.backward(grad, kept, needs, *args)
        return result
    tensors = a.differentiable
    wanted = {}
    for i, t in enumerate(tensors):
        if needs[i] and t is not None:
            wanted[i] = tensors[i] = t if t.requires_grad else t.detach().requires_grad_()
    grads = torch.autograd.grad(
        _plain(*tensors, *a[TENSORS:]), list(wanted.values()), grad, create_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i, grad.new_empty(0)) for i in range(TENSORS)]


def _fake(*args: Any) -> list[Tensor]:
    a = Arguments(*args)
    others = dict(zip(Arguments._fields[1:], a.differentiable[1:], strict=False))
    same_device("mlp_projector", "x", a.x, **others)
    rows = math.prod(a.x.shape[:-1])
    kept = [a.x.new_empty(rows, width) for width in a.widths()] if a.keep else []
    return [a.x.new_empty(a.shape()), *kept]


def _fake_backward(
    grad: Tensor, kept: Sequence[Tensor], needs: Sequence[bool], *args: Any
) -> list[Tensor]:
    return [
        grad.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
        for t, needed in zip(Arguments(*args).differentiable, needs, strict=True)
    ]


def _on_triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module("vlmops.ops.mlp_projector_triton").KERNELS
        return getattr(steps, name)(kernels, *args)

    return run


def _on_library(name: str) -> Callable[..., Any]:
    return lambda *args: getattr(steps, name)(steps.compiled(), *args)


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "mlp_projector")
    for _op, _name in zip(_COMPILED, _Ops._fields, strict=True):
        for _key in ("CPU", "CUDA"):
            _lib.impl(_op, _on_library(_name), _key)
    _TRITON = triton_twin(_lib, "mlp_projector", _COMPILED, _on_triton)
    for _ops in (_COMPILED, _TRITON):
        register(_lib, _ops, (_forward, _backward), (_fake, _fake_backward))
