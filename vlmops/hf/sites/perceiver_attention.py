"""`vlmops.perceiver_attention` where latents attend to images and to themselves.

Found are modules whose forward joins two sequences and attends to both. It runs as it is, but for
what joins them (`vlmops.hf.eager_attention.Joining`): projections and norms of heads are applied to
each sequence, attention is one call of the op. Whether a forward writes attention out (Idefics) or
calls an attention function (Idefics2) is the same to it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import attentions, eager_attention, plain, rehearsal
from vlmops.hf.attentions import OTHER_MATHS, SDPA, SELECTED
from vlmops.hf.eager_attention import Attend, Joining, Segments
from vlmops.hf.eager_modules import (
    DROPS,
    Heads,
    Spy,
    difference,
    following,
    forward_of,
    key_of,
    linears,
    refusal,
)
from vlmops.hf.lazy import StandIn, computed
from vlmops.hf.rebind import innermost, ops_of, original_class, rebuild, references, subclass
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Place, Refused, Site
from vlmops.hf.sites.packed_attention import asked_of, common, drops, implementation_of, starred

OP = "perceiver_attention"
_JOINS = {"cat", "concat", "concatenate"}


@dataclasses.dataclass(frozen=True)
class Details:
    """A place."""

    attentions: tuple[nn.Module, ...]


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Modules of one class that do the same."""
    groups: dict[Hashable, tuple[Heads, list[str], list[nn.Module]]] = {}
    for path, module in model.named_modules():
        heads = _study(module)
        if heads is not None:
            kind = original_class(module) or type(module)
            _, paths, modules = groups.setdefault((kind, heads), (heads, [], []))
            if module not in modules:
                paths.append(starred(path))
                modules.append(module)
    for heads, paths, modules in groups.values():
        module = modules[0]
        place = Place(common(paths), type(module).__name__, len(modules), Details(tuple(modules)))
        if drops(module):
            place = dataclasses.replace(place, note=DROPS)
        if all(OP in ops_of(module) for module in modules):
            yield AlreadyPatched(place)
            continue
        selected = implementation_of(module)
        if asked_of(forward_of(module)) and selected not in SELECTED:
            stands = " and ".join(SELECTED)
            yield LeftAlone(place, f"{selected} is selected, and the op stands for {stands}")
            continue
        reason = refusal(modules, OP) or heads.refusal() or _layers(modules)
        yield place if reason is None else Refused(place, reason)


def _layers(modules: list[nn.Module]) -> str | None:
    """Why layers of the keys cannot be given two sequences one after the other."""
    for module in modules:
        for name, linear in linears(module).items():
            reason = plain.refusal(linear, nn.Linear)
            if reason is not None and original_class(linear) is not nn.Linear:
                return f"{name}: {reason}"
    return None


_studied: dict[Hashable, Heads | None] = {}


def _study(module: nn.Module) -> Heads | None:
    """What a module multiplies, if it attends to two sequences that it joins."""
    forward = forward_of(module)
    if forward is None or len(linears(module)) < 3:
        return None
    names = set(forward.__code__.co_names)
    if not names & _JOINS or not names & {"softmax", "Softmax", "get_interface"}:
        return None
    key = key_of(module), implementation_of(module)
    if key not in _studied:
        spy = Spy()
        _run(module, {}, spy)
        _studied[key] = spy.heads
    return _studied[key]


def _run(module: Any, more: dict[str, Any], attend: Attend | None) -> tuple[Any, ...] | None:
    """What a module's forward returns for made up sequences; None if it raises.

    Args:
        module: Attention.
        more: Further arguments by name.
        attend: What attention to both becomes a call of; None: nothing is followed.
    """
    forward = forward_of(module)
    draw, width = torch.Generator().manual_seed(0), next(iter(linears(module).values())).in_features
    required = [
        p.name
        for p in list(inspect.signature(forward).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    given = {
        name: torch.randn(1, rehearsal.TOKENS + place, width, generator=draw)
        for place, name in enumerate(required)
    }
    try:
        made = rehearsal.twin(module, stand_in=rehearsal.Sparse)
        if getattr(module, "config", None) is not None:
            selected = implementation_of(module)
            made.config._attn_implementation = {"": selected if selected in SELECTED else "eager"}
        with torch.no_grad():
            if attend is None:
                out = forward(made, **given, **more)
            else:
                steps = rebuild(forward, "rehearsal", **_globals(forward, attend))
                out = steps(eager_attention.standing_in(made, attend), **given, **more)
    except Exception:  # foreign code, asked with what it was not written for
        return None
    return tuple(computed(x) for x in (out if isinstance(out, tuple) else (out,)))


def _globals(forward: Any, attend: Attend) -> dict[str, Any]:
    """What the globals of a forward stand for, so that sequences stay apart."""
    return {"torch": Joining(attend)} | {
        name: _Functions(theirs)
        for name, theirs in asked_of(forward).items()
        if not callable(theirs)
    }


class _Functions:
    """Stands where a forward looks for ``ALL_ATTENTION_FUNCTIONS``."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def get_interface(self, implementation: Any, default: Any) -> Callable[..., Any]:
        """See transformers.AttentionInterface."""
        theirs = self._theirs.get_interface(implementation, default)
        known = implementation in SELECTED and (theirs is default or theirs.__module__ == SDPA)
        return functools.partial(_attend, theirs, known)


def _attend(
    theirs: Any,
    known: bool,
    module: StandIn,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """In place of an attention function; keys and values may be two sequences each."""
    parts = [x.parts if isinstance(x, Segments) and x.dim == 2 else None for x in (key, value)]
    sdpa, mask = theirs.__module__ == SDPA, attention_mask
    causal = sdpa and mask is None and attentions.is_causal(module, query, kwargs)
    booleans = mask is not None and mask.dtype == torch.bool
    if (
        known
        and parts[0] is not None
        and parts[1] is not None
        and not causal
        and (sdpa or not booleans)  # eager code adds them
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in OTHER_MATHS)
    ):
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = key.attend(query, *parts, mask, scale)
        if out is not None:
            return out.transpose(1, 2), None
    result: tuple[Tensor, Tensor | None] = theirs(
        module._module, query, computed(key), computed(value), mask, **kwargs
    )
    return result


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: Details = place.details
    return {module: _class(module) for module in details.attentions}


def _class(module: nn.Module) -> type[nn.Module]:
    original: Any = type(module)
    attend = eager_attention.attend

    def make_forward(label: str) -> Callable[..., Any]:
        new = _globals(forward_of(module), attend)
        return following(
            original.forward,
            rebuild(original.forward, label, **new),
            lambda self: eager_attention.standing_in(self, attend),
        )

    key = (OP, original.forward, references(innermost(original.forward)))
    return subclass(original, key, make_forward)


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs a module, its sequences joined and not, with masks and without; once per class."""
    details: Details = place.details
    for module in details.attentions:
        key = key_of(module), implementation_of(module)
        if key not in _checked:
            _checked[key] = _difference(module)
        if _checked[key] is not None:
            return _checked[key]
    return None


def _difference(module: nn.Module) -> str | None:
    name, calls = type(module).__name__, 0
    for more in _masks(module):
        expected = _run(module, more, None)
        if expected is None:
            continue
        spy = Spy(eager_attention.served)
        got = _run(module, more, spy) or ()
        reason = difference(name, got[:1], expected[:1])  # behind it, weights that nobody asks for
        if reason is not None:
            return reason
        calls += spy.calls
    return None if calls else f"{name} does something else than attention when it is followed"


def _masks(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Further arguments: none, and one that may be a mask and hides the first tokens."""
    yield {}
    tokens = 2 * rehearsal.TOKENS + 1
    seen = (torch.arange(tokens) > 1)[None, None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for parameter in inspect.signature(forward_of(module)).parameters.values():
        if parameter.default is None:
            yield {parameter.name: seen}
            yield {parameter.name: added}


SITE = Site(OP, find, adapt, check)
