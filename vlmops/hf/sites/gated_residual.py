"""`vlmops.gated_residual` at the ends of gated layers' branches.

Found are modules with parameters of their own around cross-attention to visual tokens. Which of the
parameters are gates is read off by running a layer's forward with `vlmops.hf.gates` in their place
and with noise in the place of its children. Small tensors, where a few functions of torch's cost
less than following them, run the layer's own code, and so do torch.compile and mixed dtypes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlmops.hf import plain
from vlmops.hf.gates import Gate, Rows
from vlmops.hf.lazy import StandIn
from vlmops.hf.rebind import changed, innermost, ops_of, original_class, references, subclass
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site, packed_attention

OP = "gated_residual"
SMALL = 1 << 18
"""Elements of a branch below which following it costs more than it saves."""
_ROWS = {"full_text_row_masked_out_mask": (1, 1, 4, 1), "cross_attention_gate": (1, 4)}
"""Parameters of a forward that say which rows go through, and shapes of them."""
_TOKENS = 4
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class _Details:
    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    """Of the gates."""


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Layers of one class."""
    groups: dict[Any, tuple[list[str], list[nn.Module]]] = {}
    for path, module in model.named_modules():
        crosses = any(packed_attention.is_cross(child) for child in module.children())
        if crosses and _candidates(module):
            key = original_class(module) or type(module)
            paths, modules = groups.setdefault(key, ([], []))
            if module not in modules:
                paths.append(packed_attention.starred(path))
                modules.append(module)
    for paths, modules in groups.values():
        layer = modules[0]
        place = Place(packed_attention.common(paths), type(layer).__name__, 0, _Details((), ()))
        names = _gates(layer)
        if isinstance(names, str):
            yield Refused(dataclasses.replace(place, sites=len(modules)), names)
            continue
        details = _Details(tuple(modules), names)
        place = dataclasses.replace(place, sites=len(names) * len(modules), details=details)
        if all(OP in ops_of(module) for module in modules):
            yield AlreadyPatched(place)
            continue
        reasons = (changed(module, decorated=True) for module in modules)
        reason = next((r for r in reasons if r is not None), None)
        yield place if reason is None else Refused(place, reason)


def _candidates(module: nn.Module) -> list[str]:
    """Parameters of a module's own that could be gates."""
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if p.numel() == max((1, *p.shape[-1:]))]


def _forward(module: nn.Module) -> Any:
    return innermost((original_class(module) or type(module)).forward)


_studied: dict[Hashable, tuple[str, ...] | str] = {}


def _gates(layer: nn.Module) -> tuple[str, ...] | str:
    """Those of a layer, or why it cannot be told."""
    shapes = tuple(getattr(layer, name).shape for name in _candidates(layer))
    key = references(_forward(layer)), shapes
    if key not in _studied:
        _studied[key] = _study(layer)
    return _studied[key]


def _study(layer: nn.Module) -> tuple[str, ...] | str:
    """The parameters without which a branch is gone, once they are 0."""
    name, candidates = type(layer).__name__, _candidates(layer)
    try:
        made, forward, given = _rehearsed(layer)
        with torch.no_grad():
            expected = _first(forward(made, **given))
            closed = {c: Gate(torch.zeros_like(getattr(made, c))) for c in candidates}
            outs = {c: _first(forward(StandIn(made, {c: closed[c]}), **given)) for c in candidates}
    except Exception as error:  # foreign code, asked with what it was not written for
        return f"{name} cannot be rehearsed: its forward raised {error!r}"
    found = tuple(c for c, out in outs.items() if not torch.equal(out, expected))
    return found or f"{name} does nothing with {', '.join(candidates)}"


def _rehearsed(layer: nn.Module) -> tuple[Any, Any, dict[str, Any]]:
    """A layer that can be run, its forward and arguments."""
    channels = max(getattr(layer, c).shape[-1] for c in _candidates(layer))
    forward = _forward(layer)
    return _twin(layer), forward, _given(forward, channels)


class _Count(TorchDispatchMode):
    """Counts calls of the op."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func._schema.name == f"vlmops::{OP}"
        return func(*args, **(kwargs or {}))


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


class _Noise(nn.Module):
    """Stands for a child: returns noise of the shape that it is given."""

    def __init__(self, seed: int, attends: bool) -> None:
        super().__init__()
        self.seed, self.attends = seed, attends

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        out = torch.randn(x.shape, generator=torch.Generator().manual_seed(self.seed)) + x
        return (out, None) if self.attends else out


def _twin(layer: Any) -> Any:
    """The same layer with noise for its children, but for those without parameters (nn.Tanh)."""
    made: Any = type(layer).__new__(type(layer))  # type: ignore[call-overload]
    made.__dict__.update({k: v for k, v in layer.__dict__.items() if k != "forward"})
    draw = torch.Generator().manual_seed(0)
    made._parameters = {
        name: nn.Parameter(torch.randn(p.shape, generator=draw), False)
        for name, p in layer._parameters.items()
    }
    made._modules = {
        name: _Noise(seed, packed_attention.is_cross(child))
        if any(True for _ in child.parameters())
        else child
        for seed, (name, child) in enumerate(layer._modules.items())
    }
    made.training = False
    return made


def _given(forward: Any, channels: int) -> dict[str, Any]:
    """Arguments of a layer's forward, by name."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, _TOKENS, channels if channels > 1 else 8, generator=draw)
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if name in _ROWS:
            given[name] = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(_ROWS[name])
        elif name in ("hidden_states", "image_hidden_states", "cross_attention_states"):
            given[name] = x
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            given[name] = None
    return given


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    return {module: _class(module, details.names) for module in details.layers}


def _class(module: nn.Module, names: tuple[str, ...]) -> type[nn.Module]:
    original: Any = type(module)
    inner, own = original.forward, innermost(original.forward)
    signature = inspect.signature(inner)
    parameters = list(signature.parameters)[1:]

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            x: Any = args[0] if args else kwargs.get("hidden_states")
            if not _serves(self, names, x):
                return inner(self, *args, **kwargs)
            args = (
                tuple(_rows(name, value, x) for name, value in zip(parameters, args, strict=False))
                + args[len(parameters) :]
            )
            kwargs = {name: _rows(name, value, x) for name, value in kwargs.items()}
            stand_in = StandIn(self, {name: Gate(getattr(self, name)) for name in names})
            return own(stand_in, *args, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    key = (OP, names, inner, references(own))
    return subclass(original, key, make_forward)


def _serves(layer: Any, names: tuple[str, ...], x: Any) -> bool:
    """Whether a layer's branches are followed in this call."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.numel() < SMALL:
        return False
    return plain.runs(OP, (x, *(getattr(layer, name) for name in names)))


def _rows(name: str, value: Any, x: Tensor) -> Any:
    """A mask of rows, if that is what it is: 1 and 0, which nobody looks at on a GPU."""
    if name not in _ROWS or type(value) is not Tensor:
        return value
    if value.device.type == "cpu" and not bool(((value == 0) | (value == 1)).all()):
        return value
    return Rows(value)


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs a layer's forward, its gates and masks of rows followed and not; once per class."""
    details: _Details = place.details
    layer = details.layers[0]
    key = references(_forward(layer)), details.names
    if key not in _checked:
        _checked[key] = _difference(layer, details.names)
    return _checked[key]


def _difference(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    name = type(layer).__name__
    made, forward, given = _rehearsed(layer)
    followed = {n: Rows(v) if n in _ROWS else v for n, v in given.items()}
    stand_in = StandIn(made, {n: Gate(getattr(made, n)) for n in names})
    with torch.no_grad():
        expected = _first(forward(made, **given))
        with _Count() as ran:  # type: ignore[no-untyped-call]
            got = _first(forward(stand_in, **followed))
    if ran.calls != len(names):
        return f"{name} does something else than to add a branch times {', '.join(names)}"
    off = float((got - expected).abs().max())
    return None if off <= _TOLERANCE else f"the numeric check failed: {name} differs by {off:.3g}"


SITE = Site(OP, find, adapt, check)
