"""Modules whose forward writes attention out: found, adapted and checked.

A module is one if its forward, run on a few made up tokens with noise in place of its linear
layers, turns out to be attention that `vlmops.hf.eager_attention` can follow. The layer from whose
result on it can is the one that makes q.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops import dispatch
from vlmops.hf import eager_attention, rehearsal
from vlmops.hf.attentions import MAX_DIM
from vlmops.hf.eager_attention import Attend, Parts
from vlmops.hf.lazy import computed
from vlmops.hf.rebind import changed, innermost, ops_of, original_class, references, subclass
from vlmops.hf.sites import AlreadyPatched, Place, Refused
from vlmops.hf.sites.packed_attention import starred

DROPS = "in training its own attention, which drops some weights"
"""What the report says of a module with dropout."""
_OTHERS = rehearsal.TOKENS + 2  # tokens that a module may be given beside its own
_TOLERANCE = 1e-4  # of values around 1, in float32: agreement is about 1e-6


@dataclasses.dataclass(frozen=True)
class Heads:
    """What a module multiplies."""

    heads: int
    kv_heads: int
    dim: int
    values_dim: int

    def refusal(self) -> str | None:
        """Why no kernel takes it."""
        if self.dim != self.values_dim:
            return (
                f"heads of {self.dim} channels for q and k, of {self.values_dim} for v: the kernel "
                "takes one width"
            )
        if self.dim % 8 or self.dim > MAX_DIM:
            return f"heads of {self.dim} channels: the kernel takes multiples of 8 up to {MAX_DIM}"
        return None


class Spy:
    """Stands for an `Attend`: keeps what it is given."""

    def __init__(self, then: Attend | None = None) -> None:
        """``then``: what does the work; None: the model's own steps."""
        self.then, self.calls = then, 0
        self.heads: Heads | None = None

    def __call__(
        self, q: Tensor, k: Parts, v: Parts, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """See `Attend`."""
        out = None if self.then is None else self.then(q, k, v, mask, scale)
        self.calls += out is not None
        self.heads = Heads(q.shape[1], k[0].shape[1], q.shape[3], v[0].shape[3])
        return out


@dataclasses.dataclass(frozen=True)
class Details:
    """A place."""

    attentions: tuple[nn.Module, ...]
    query: str
    """The layer that makes q."""


@dataclasses.dataclass(frozen=True)
class _Studied:
    query: str
    heads: Heads


def find(model: nn.Module, op: str) -> Iterator[Place | Refused | AlreadyPatched]:
    """Modules of one class at one place of a model's layers.

    Args:
        model: Any.
        op: For which they are found.
    """
    groups: dict[tuple[str, type, _Studied], list[nn.Module]] = {}
    for path, module in model.named_modules():
        studied = _study(module)
        if studied is not None:
            kind = original_class(module) or type(module)
            group = groups.setdefault((starred(path), kind, studied), [])
            if module not in group:
                group.append(module)
    for (path, _, studied), modules in groups.items():
        details = Details(tuple(modules), studied.query)
        place = Place(path, type(modules[0]).__name__, len(modules), details)
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules[0].children()):
            place = dataclasses.replace(place, note=DROPS)
        if all(op in ops_of(module) for module in modules):
            yield AlreadyPatched(place)
            continue
        reason = refusal(modules, op) or studied.heads.refusal()
        yield place if reason is None else Refused(place, reason)


def refusal(modules: list[nn.Module], op: str) -> str | None:
    """Why the forward of attention modules may not be replaced, or would gain nothing."""
    for module in modules:
        reason = changed(module)
        if reason is not None:
            return reason
    tensors = [t for module in modules for t in module.parameters()]
    for device in sorted({t.device for t in tensors}, key=str):
        reason = dispatch.refuses(op, device)
        if reason is not None:
            return reason
    doubles = any(t.dtype == torch.float64 for t in tensors)
    return f"no kernel for {torch.float64}" if doubles else None


def forward_of(module: nn.Module) -> Any:
    """The model's own forward, without decorators; None for C++ and TorchScript."""
    forward = innermost(inspect.getattr_static(original_class(module) or type(module), "forward"))
    return forward if inspect.isfunction(forward) else None


def linears(module: nn.Module) -> dict[str, Any]:
    """The linear layers right below a module, or whatever others put in their place."""
    return {name: m for name, m in module.named_children() if rehearsal.is_linear(m)}


def key_of(module: nn.Module) -> Hashable:
    """Equal for modules whose forward does the same."""
    forward = forward_of(module)
    shapes = tuple((n, m.in_features, m.out_features) for n, m in linears(module).items())
    numbers = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float) and name not in ("layer_idx", "training")
    )
    children = tuple((n, original_class(m) or type(m)) for n, m in module.named_children())
    return references(forward), shapes, numbers, children


_studied: dict[Hashable, _Studied | None] = {}


def _study(module: nn.Module) -> _Studied | None:
    """How a module attends, if it does and can be followed."""
    forward = forward_of(module)
    if forward is None or len(linears(module)) < 3:
        return None
    names = set(forward.__code__.co_names)
    if not names & {"softmax", "Softmax"} or "get_interface" in names:
        return None
    key = key_of(module)
    if key not in _studied:
        _studied[key] = next(_followed(module), None)
    return _studied[key]


def _followed(module: nn.Module) -> Iterator[_Studied]:
    """Ways to run a module in which its attention is followed."""
    forward = forward_of(module)
    for name in linears(module):
        for given in _arguments(module, name):
            spy = Spy()
            if _run(forward, module, given, spy, name) is not None and spy.heads is not None:
                yield _Studied(name, spy.heads)


def _arguments(module: nn.Module, query: str) -> Iterator[dict[str, Any]]:
    """Made up arguments of a forward: its own tokens, then one more that may be other tokens."""
    own, *more = list(inspect.signature(forward_of(module)).parameters.values())[1:]
    widths = {name: m.in_features for name, m in linears(module).items()}
    other = next((w for w in widths.values() if w != widths[query]), widths[query])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, rehearsal.TOKENS, widths[query], generator=draw)
    others = torch.randn(1, _OTHERS, other, generator=draw)
    given = {own.name: tokens}
    more = [p for p in more if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given |= {p.name: others for p in more if p.default is p.empty}
    yield given
    for parameter in more:
        yield given | {parameter.name: others}


def _run(
    forward: Any, module: nn.Module, given: dict[str, Any], attend: Attend | None, query: str
) -> tuple[Tensor, ...] | None:
    """What a forward returns for made up arguments; None if it raises.

    Args:
        forward: The model's own.
        module: Attention.
        given: Arguments by name.
        attend: See `eager_attention.standing_in`; None: nothing is followed.
        query: The layer that makes q.
    """
    try:
        with torch.no_grad():
            made = rehearsal.twin(module)
            if attend is not None:
                made = eager_attention.standing_in(made, attend, query)
            out = forward(made, **given)
    except Exception:  # foreign code, asked with what it was not written for
        return None
    return tuple(computed(x) for x in (out if isinstance(out, tuple) else (out,)))


def adapt(place: Place, op: str) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: Details = place.details
    return {module: _class(module, details.query, op) for module in details.attentions}


def _class(module: nn.Module, query: str, op: str) -> type[nn.Module]:
    original: Any = type(module)

    def make_forward(_: str) -> Callable[..., Any]:
        return following(
            original.forward,
            original.forward,
            lambda self: eager_attention.standing_in(self, eager_attention.attend, query),
        )

    key = (op, query, original.forward, references(forward_of(module)))
    return subclass(original, key, make_forward)


def following(inner: Any, steps: Any, stand_in: Callable[[Any], Any]) -> Callable[..., Any]:
    """A forward that is followed where nobody can tell.

    Args:
        inner: The forward that a module has.
        steps: What runs instead on a stand-in for the module.
        stand_in: Makes one.
    """
    signature = inspect.signature(inner)
    names = list(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not eager_attention.may_follow(self, given):
            return inner(self, *args, **kwargs)
        return eager_attention.finished(steps(stand_in(self), *args, **kwargs))

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs a module, followed and not, with masks and without; once per class and shapes."""
    details: Details = place.details
    for module in details.attentions:
        key = key_of(module), details.query
        if key not in _checked:
            _checked[key] = _difference(module, details.query)
        if _checked[key] is not None:
            return _checked[key]
    return None


def _difference(module: nn.Module, query: str) -> str | None:
    forward, name = forward_of(module), type(module).__name__
    calls = 0
    for given in _arguments(module, query):
        optional = [p for p in inspect.signature(forward).parameters if p not in given][1:]
        for mask in (None, *optional):
            for keys in (rehearsal.TOKENS, _OTHERS):
                more = given if mask is None else given | {mask: padding(keys)}
                expected = _run(forward, module, more, None, query)
                if expected is None:
                    continue
                spy = Spy(eager_attention.served)
                got = _run(forward, module, more, spy, query)
                reason = difference(name, got, expected)
                if reason is not None:
                    return reason
                calls += spy.calls
    return None if calls else f"{name} does something else than attention when it is followed"


def padding(keys: int) -> Tensor:
    """A mask to add, ``[1, 1, 1, S]``, that hides the last keys."""
    mask = torch.zeros(1, 1, 1, keys)
    mask[..., -2:] = torch.finfo(mask.dtype).min
    return mask


def difference(name: str, got: Any, expected: tuple[Tensor, ...]) -> str | None:
    """Why two results of a module are not the same."""
    tensors = [x for x in expected if isinstance(x, Tensor)]
    ours = [x for x in got or () if isinstance(x, Tensor)]
    if [x.shape for x in ours] != [x.shape for x in tensors]:
        return f"the numeric check failed: {name} returns something else"
    off = max(float((a - b).abs().max()) for a, b in zip(ours, tensors, strict=True))
    return None if off <= _TOLERANCE else f"the numeric check failed: {name} differs by {off:.3g}"
