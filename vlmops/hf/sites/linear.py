"""`vlmops.ops.linear` in every plain ``torch.nn.Linear`` of a model on the CPU.

The subclass is still a ``torch.nn.Linear``, so PEFT, quantisers and state dicts see what they saw;
code that asks for ``type(module) is nn.Linear`` should run before patching.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import plain
from vlmops.hf.rebind import absorbed, ops_of, original_class, subclass
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Place, Refused, Site
from vlmops.ops.linear import (
    alternative,
    has_alternative,
    is_small,
    linear,
    measured,
    reference,
)
from vlmops.ops.linear_tuning import gains, tune

_TOLERANCE = 1e-4  # beyond rounding the result: float32 sums are off by 1e-6 to 6e-6


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """All linear layers together, and one refusal for each reason."""
    elsewhere = absorbed(model)  # another op multiplies by their weights
    linears: list[Any] = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and m not in elsewhere and ops_of(m) <= {"linear"}
    ]
    patched = [m for m in linears if original_class(m) is nn.Linear]
    refusals = {m: _refusal(m) for m in linears if m not in set(patched)}
    served: list[Any] = [m for m, reason in refusals.items() if reason is None]
    tune(m.weight for m in served if m.weight.device.type == "cpu")  # not from meta: no values
    gainful = [m for m in served if gains(*_class(m))]

    if patched:
        yield AlreadyPatched(Place("", "Linear", len(patched), backend=_backend(patched)))
    if gainful:
        guessed = sum(_class(m) not in measured for m in gainful)
        note = f"{f'{guessed} ' if guessed < len(gainful) else ''}not measured" if guessed else ""
        yield Place("", "Linear", len(gainful), gainful, _backend(gainful), note)
    others = Counter(_why_not(m) for m in set(served).difference(gainful))
    for reason, count in sorted(others.items()):
        yield LeftAlone(Place("", "Linear", count), reason)
    for reason, count in Counter(filter(None, refusals.values())).items():
        yield Refused(Place("", "Linear", count), reason)


def _class(module: Any) -> tuple[torch.dtype, int, int]:
    n, k = module.weight.shape
    return module.weight.dtype, n, k


def _why_not(module: Any) -> str:
    """Why a linear layer that can be served is left alone."""
    key = _class(module)
    if key in measured:
        return "measured: torch's own product is as fast here"
    if is_small(*key[1:]):
        return "too small to gain"
    return "not measured: the default for this machine is torch's own"


def _backend(modules: list[Any]) -> str:
    names = {"oneDNN" if m.weight.dtype == torch.float32 else "float32 panels" for m in modules}
    return ", ".join(sorted(names))


def _refusal(module: Any) -> str | None:
    """Why a linear layer is none that can be served."""
    reason = plain.refusal(module, nn.Linear)
    if reason is not None:
        return reason
    for tensor in plain.tensors(module):
        if tensor.device.type not in ("cpu", "meta"):
            return f"no kernel for {tensor.device.type}: this is for the CPU"
        if tensor.layout is not torch.strided or not has_alternative(tensor.dtype):
            return f"no faster way is known for weights of {tensor.dtype}, {tensor.layout}"
    return None


_checked: dict[Hashable, float] = {}


def check(place: Place) -> str | None:
    """Runs oneDNN's and the panels' products against float64, once per dtype and K."""
    for module in place.details:
        key = module.weight.dtype, module.in_features
        if key not in _checked:
            _checked[key] = _largest_error(*key)
        if not _checked[key] <= _TOLERANCE:
            return (
                f"the numeric check failed: products over {key[1]} elements of {key[0]} are off by "
                f"{_checked[key]:.3g} of their standard deviation"
            )
    return None


@torch.no_grad()
def _largest_error(dtype: torch.dtype, k: int) -> float:
    draw: Any = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    x, weight, bias = (torch.randn(*s, **draw).to(dtype) for s in ((9, k), (16, k), (16,)))
    exact = reference(x, weight, bias)
    error = (alternative(x, weight, bias).double() - exact).abs()
    rounding = exact.abs() * (torch.finfo(dtype).eps / 2)
    return float((error - rounding).max() / k**0.5)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    patched = subclass(nn.Linear, "linear", _make_forward)
    return dict.fromkeys(place.details, patched)


def _make_forward(_: str) -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    forward.__signature__ = inspect.signature(nn.Linear.forward)  # type: ignore[attr-defined]
    return forward


SITE = Site("linear", find, adapt, check)
