"""RMSNorm of q and k in front of their rotation: found, put off, and left to `vlmops.mrope`.

The forward of an attention module calls its norms, then the function that rotates. Patched, a norm
returns what it was given, and the rotation normalises too. Which norms those are is read off by
running the forward once with norms that return constants: the ones that arrive at the rotation.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmops.hf import plain, rehearsal
from vlmops.hf.rebind import original_class, subclass, wraps
from vlmops.hf.rotary import Apply
from vlmops.ops.pixel_shuffle import pixel_shuffle


@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms of an attention module that are put off."""

    q: str
    k: str
    eps: float
    offset: float


class Deferred(NamedTuple):
    """Travels in place of what stands for the sines: that, and the norms that were put off."""

    carried: Tensor
    q_norm: nn.Module
    k_norm: nn.Module


class _Marker(nn.Module):
    """Returns a constant in place of a norm, and counts its calls."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, self.value)


@dataclasses.dataclass(frozen=True)
class Study:
    """How an attention module comes to rotate."""

    calls: int
    """Of the function that rotates, in one forward; 1 if it cannot be told."""
    rehearsed: bool
    norms: Norms | str | None
    """The norms of q and k right in front of it; None if there are none, or why they stay."""


def study(attention: Any, apply: Apply, packed: bool) -> Study:
    """Runs an attention module with a spy in place of the function that rotates.

    Args:
        attention: The module.
        apply: The function.
        packed: See `rehearsal.run`.
    """
    kinds = {name: kind for name, m in attention.named_children() if (kind := rms_norm(m))}
    try:
        made = rehearsal.twin(attention)
        for value, name in enumerate(kinds, start=1):
            made._modules[name] = _Marker(value)
        calls = _arrivals(made, apply, packed)
    except rehearsal.ImpossibleError as reason:
        return Study(1, False, str(reason) if kinds else None)
    if not kinds or apply.complex or apply.rows != 2 or len(calls) != 1:
        return Study(len(calls), True, None)
    return Study(1, True, _put_off(attention, made, kinds, *calls[0]))


def _put_off(
    attention: nn.Module,
    made: Any,
    kinds: dict[str, tuple[float, float]],
    *arrived: float | None,
) -> Norms | str | None:
    names = {made._modules[name].value: name for name in kinds if made._modules[name].calls == 1}
    q, k = (names.get(value) for value in arrived)
    if q is None and k is None:
        return None
    if q is None or k is None:
        return "something happens between the norms and the rotation"
    if kinds[q] != kinds[k]:
        return f"{q} and {k} differ in eps or offset"
    if "position_embeddings" not in inspect.signature(type(attention).forward).parameters:
        return "its forward takes no position_embeddings"
    for module in (getattr(attention, q), getattr(attention, k)):
        if not defers(module):
            return f"{type(module).__name__} has hooks, another forward or a special weight"
    return Norms(q, k, *kinds[q])


def _arrivals(attention: Any, apply: Apply, packed: bool) -> list[tuple[float | None, ...]]:
    """For each call of the function, the constants that q and k are; None for no constant."""
    calls: list[tuple[float | None, ...]] = []

    def constant(x: Tensor) -> float | None:
        value = x.flatten()[0]
        return float(value) if bool((x == value).all()) else None

    def spy(*args: Any, **_: Any) -> Any:
        rows = args[: apply.rows]
        calls.append(tuple(constant(x) for x in rows))
        return rows if apply.rows > 1 else rows[0]

    forward: Any = inspect.unwrap((original_class(attention) or type(attention)).forward)
    spied = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, apply.name: spy},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    spied.__kwdefaults__ = forward.__kwdefaults__
    anything = torch.ones(1) if apply.complex else (torch.ones(1), torch.ones(1))
    given = dict.fromkeys(rehearsal.positions(forward), anything)
    rehearsal.run(spied, attention, packed, **given)
    return calls


def rms_norm(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) of a module that is an RMSNorm over its weight's length."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or any(module.children()):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or original_class(module):
        return None
    # Small numbers too, where eps counts.
    x = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-5, 1, 8)[:, None]
    try:
        made = rehearsal.twin(module)
        with torch.no_grad():
            got = made(x)
            plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                if torch.allclose(got, plain * (offset + made.weight), rtol=1e-4, atol=1e-7):
                    return eps, offset
    except Exception:  # foreign code that wants more than x is no norm, whatever it raises
        return None
    return None


def defers(norm: Any) -> bool:
    """Whether a norm leaves its work to the rotation; asked by both of them in each call.

    Not if anybody watches or wraps it, or holds its weight elsewhere.
    """
    return (
        "forward" not in norm.__dict__
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and not norm._backward_hooks
        and not norm._backward_pre_hooks
        and type(norm.weight) in (nn.Parameter, Tensor)
    )


def deferring_class(norm: nn.Module) -> type[nn.Module]:
    """The class that puts off the work of a norm."""
    original: Any = type(norm)

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if defers(self) and len(args) + len(kwargs) == 1:
                return args[0] if args else next(iter(kwargs.values()))
            return original.forward(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("deferred", original.forward), make_forward)


def of_heads(eps: float, offset: float, theirs: Any) -> Callable[[Any, Tensor], Tensor]:
    """The forward of a norm of heads ``[B, H, S, D]``, one pass; ``theirs`` for all else."""
    key = eps, offset, theirs
    if key not in _of_heads:

        def forward(self: Any, x: Tensor) -> Tensor:
            weight = self.weight
            if x.dim() != 4 or x.dtype != weight.dtype or not defers(self):
                return theirs(self, x)  # type: ignore[no-any-return]
            if not plain.runs("pixel_shuffle", (x, weight)):
                return theirs(self, x)  # type: ignore[no-any-return]
            tokens = x.transpose(1, 2)
            made = pixel_shuffle(
                tokens, 1, norm="rms", norm_weight=weight, eps=eps, norm_offset=offset
            )
            return made.view(tokens.shape).transpose(1, 2)

        _of_heads[key] = forward
    return _of_heads[key]


_of_heads: dict[Any, Callable[[Any, Tensor], Tensor]] = {}


def heads_class(norm: nn.Module, compute: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """The class of a norm of heads that computes so, `of_heads`."""
    original: Any = type(norm)

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            return compute(self, *args, *kwargs.values())

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    return subclass(original, ("gated_cross_attention", compute), make_forward)


def normalise(norm: Any, x: Tensor) -> Tensor:
    """What a norm has put off, by the model's own code."""
    if not defers(norm):
        return x
    original: Any = original_class(norm)
    result: Tensor = original.forward(norm, x)
    return result


def defer(norms: Norms, forward: Any) -> Callable[..., Any]:
    """Lets a forward hand its norms on to the rotation, with position_embeddings."""
    made: Callable[..., Any] = wraps(forward, functools.partial(_deferring, norms))
    return made


def _deferring(norms: Norms, forward: Any) -> Callable[..., Any]:
    at = list(inspect.signature(forward).parameters).index("position_embeddings") - 1

    def deferring(self: Any, *args: Any, **kwargs: Any) -> Any:
        q_norm, k_norm = getattr(self, norms.q), getattr(self, norms.k)
        if len(args) > at:
            cos, sin = args[at]
            args = (*args[:at], (cos, Deferred(sin, q_norm, k_norm)), *args[at + 1 :])
        else:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos, Deferred(sin, q_norm, k_norm)
        return forward(self, *args, **kwargs)

    deferring.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return deferring
