"""`vlmops.mrope` wherever a model rotates q and k: no cosine, no sine, one call a layer.

Hugging Face computes cosines and sines once per forward in a rotary module and every attention
layer applies them with a function that its forward finds among its globals. Patched, the rotary
module hands on positions and frequencies in their place, and the function is `mrope`
(`vlmops.hf.carry`). So rotary modules and all the attention modules below the module that holds
them change together or not at all. What they do is read off by probing (`vlmops.hf.rotary`), and
compared afterwards: the function alone, and a rehearsal of the whole attention module.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import carry, norms, rehearsal, rotary
from vlmops.hf.carry import Layouts
from vlmops.hf.norms import Norms, Study
from vlmops.hf.rebind import (
    changed,
    ops_of,
    original_class,
    owner,
    rebind,
    references,
    subclass,
)
from vlmops.hf.rotary import Apply, Layout
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site

_BESIDE: frozenset[Hashable] = frozenset({"packed_attention"})
"""What else may have replaced the forward of an attention module."""
_TOLERANCE = 1e-4  # float32, standard normal inputs, ids to 1,000: agreement is about 1e-6


@dataclasses.dataclass(frozen=True)
class _Attention:
    module: nn.Module
    apply: Apply
    study: Study


@dataclasses.dataclass(frozen=True)
class _Details:
    rotaries: Mapping[nn.Module, Layouts]
    attentions: tuple[_Attention, ...]


@dataclasses.dataclass
class _Group:
    """Modules that change together: rotary modules and what rotates by them."""

    paths: list[str] = dataclasses.field(default_factory=list)
    rotaries: list[nn.Module] = dataclasses.field(default_factory=list)
    below: list[nn.Module] = dataclasses.field(default_factory=list)


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Rotary modules and all the attention modules that those serve."""
    for group in _groups(model):
        callers = {m: applies for m in group.below if (applies := _applies(m))}
        unknown = {m: reason for m in group.below if (reason := _unknown(m))}
        if not callers and not unknown:
            continue
        name = type(next(iter(callers or unknown))).__name__
        place = Place(_common(group.paths), name, len(callers or unknown))
        if unknown:
            yield Refused(place, next(iter(unknown.values())))
            continue
        several = [a for applies in callers.values() if len(applies) > 1 for a in applies]
        if several:
            names = ", ".join(sorted({a.name for a in several}))
            yield Refused(place, f"{name} rotates with more than one function: {names}")
            continue
        studied = [_study(module, apply) for module, (apply,) in callers.items()]
        attentions = tuple(a for a in studied if a.study.calls)  # some layers go without
        if not attentions:
            continue
        place = dataclasses.replace(place, sites=sum(a.study.calls for a in attentions))
        parts = (*group.rotaries, *(a.module for a in attentions))
        if all("mrope" in ops_of(module) for module in parts):
            yield AlreadyPatched(place)
            continue
        examined = _examine(group.rotaries, attentions)
        if isinstance(examined, str):
            yield Refused(place, examined)
        else:
            yield dataclasses.replace(place, details=examined, note=_note(attentions))


def _groups(model: nn.Module) -> Iterable[_Group]:
    """By rotary module; attention modules that have one of their own, by class."""
    holders = list(rotary.modules_with_rotaries(model))
    known = {id(holder) for _, holder, _ in holders}
    groups: dict[Any, _Group] = collections.defaultdict(_Group)
    for path, holder, rotaries in holders:
        group = groups[type(holder) if _applies(holder) else rotaries[0]]
        group.paths.append(path)
        group.rotaries += [m for m in rotaries if m not in group.rotaries]
        group.below += [m for m in _below(holder, known) if m not in rotaries]
    return groups.values()


def _common(paths: list[str]) -> str:
    """model.layers.*.self_attn for a group of several."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] if len(set(names)) == 1 else "*" for names in parts)


def _study(module: nn.Module, apply: Apply) -> _Attention:
    packed = apply.unsqueeze_dim is None and not apply.complex  # a tower's [N, H, D]
    return _Attention(module, apply, norms.study(module, apply, packed))


def _note(attentions: tuple[_Attention, ...]) -> str:
    """What the report says of the norms, and of what was compared."""
    notes = []
    if not all(a.study.rehearsed for a in attentions):
        notes.append("not rehearsed: rotated out of place")
    for found in dict.fromkeys(a.study.norms for a in attentions):
        if isinstance(found, Norms):
            notes.append(f"with {found.q} and {found.k}")
        elif found is not None:
            notes.append(f"without its norms: {found}")
    return "; ".join(notes)


def _below(holder: nn.Module, holders: set[int]) -> Iterator[nn.Module]:
    """The holder and all modules in it, but for those that have rotary modules of their own."""
    yield holder
    for child in holder.children():
        if id(child) not in holders:
            yield from _below(child, holders)


def _forward(module: nn.Module) -> Any:
    """The model's own forward, without decorators; None for C++ and TorchScript."""
    forward: Any = inspect.getattr_static(original_class(module) or type(module), "forward")
    forward = inspect.unwrap(forward)
    return forward if inspect.isfunction(forward) else None


def _globals(module: nn.Module) -> list[tuple[str, Any]]:
    """The global names that a module's forward uses, and what they stand for."""
    forward = _forward(module)
    if forward is None:
        return []
    names = forward.__code__.co_names
    return [(n, forward.__globals__[n]) for n in names if n in forward.__globals__]


def _applies(module: nn.Module) -> list[Apply]:
    """The functions that rotate among the globals of a module's forward."""
    found = (rotary.find_apply(name, value) for name, value in _globals(module))
    return [apply for apply in found if apply is not None]


def _unknown(module: nn.Module) -> str | None:
    """Who in a module uses cosines and sines in a way that is not known here."""
    for name, value in _globals(module):
        if rotary.find_apply(name, value) is None and rotary.takes_cosines(value):
            return f"{type(module).__name__} rotates with {name}, which vlmops does not know"
    forward = _forward(module)
    if (
        forward is None
        or _applies(module)
        or not {"cos", "sin"} <= set(forward.__code__.co_varnames)
    ):
        return None
    return f"{type(module).__name__} applies cosines and sines itself"


def _examine(rotaries: list[nn.Module], attentions: tuple[_Attention, ...]) -> _Details | str:
    """The details of a place, or why it is refused."""
    parts = (*rotaries, *(a.module for a in attentions))
    for module in parts:
        reason = changed(module, beside=_BESIDE)
        if reason is not None:
            return reason
    for module in rotaries:
        if module._forward_hooks:
            return f"forward hooks on {type(module).__name__} expect cosines and sines; remove them"
    for attention in attentions:
        reason = _replaced(attention)
        if reason is not None:
            return reason
    devices = {t.device for m in parts for t in (*m.parameters(), *m.buffers())}
    for reason in map(carry.refuses, sorted(devices, key=str)):
        if reason is not None:
            return reason

    layouts: dict[nn.Module, Layouts] = {}
    for module in rotaries:
        for apply in {a.apply for a in attentions}:
            read = rotary.read_layouts(module, apply)
            if isinstance(read, str):
                return read
            if layouts.setdefault(module, read) != read:
                return "its attention modules rotate in different ways"
    if carry.turns_of(layouts.values()) is None:
        return "its rotary modules and layer types differ in scaling or in the order of channels"
    return _Details(layouts, attentions)


def _replaced(attention: _Attention) -> str | None:
    """Who put another function in the place of the one that rotates."""
    forward, name = _forward(attention.module), attention.apply.name
    home = forward.__module__
    function: Any = attention.apply.function
    if isinstance(forward.__globals__[name], nn.Module):
        return None
    if getattr(function, "__globals__", {}).get("__name__") == home:
        return None
    return f"{name} in {home} was replaced by {owner(function)}; undo that first"


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    turns = carry.turns_of(details.rotaries.values())
    assert turns is not None
    classes = {
        module: _rotary_class(type(module), layouts) for module, layouts in details.rotaries.items()
    }
    for attention in details.attentions:
        classes[attention.module] = _attention_class(attention, turns)
        if isinstance(attention.study.norms, Norms):
            for name in (attention.study.norms.q, attention.study.norms.k):
                norm = getattr(attention.module, name)
                classes[norm] = norms.deferring_class(norm)
    return classes


def _rotary_class(original: Any, layouts: Layouts) -> type[nn.Module]:
    key = ("mrope", tuple(layouts.items()), original.forward)
    return subclass(original, key, lambda _: carry.rotary_forward(original.forward, layouts))


def _attention_class(attention: _Attention, turns: carry.Turns) -> type[nn.Module]:
    original: Any = type(attention.module)
    apply, study = attention.apply, attention.study
    put_off = study.norms if isinstance(study.norms, Norms) else None

    def make_forward(label: str) -> Callable[..., Any]:
        replaced = {apply.name: carry.apply_function(apply, turns, study)}
        forward = rebind(original.forward, label, **replaced)
        return forward if put_off is None else norms.defer(put_off, forward)

    key = ("mrope", tuple(turns.items()), put_off, study.rehearsed, references(original.forward))
    return subclass(original, key, make_forward)


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the replacement against the model's own code; once per class and layout."""
    details: _Details = place.details
    turns = carry.turns_of(details.rotaries.values())
    assert turns is not None
    for module, layouts in details.rotaries.items():
        for cls, attention in {_attention_class(a, turns): a for a in details.attentions}.items():
            key = (type(module).forward, tuple(layouts.items()), cls)
            if key not in _checked:
                _checked[key] = _difference(module, layouts, attention, turns)
            if _checked[key] is not None:
                return _checked[key]
    return None


def _difference(
    module: Any, layouts: Layouts, attention: _Attention, turns: carry.Turns
) -> str | None:
    """Why the replacement is not what it replaces: the function alone, and the whole attention."""
    apply, name = attention.apply, type(attention.module).__name__
    ours = carry.apply_function(apply, turns, Study(1, False, None))
    make = carry.rotary_forward(type(module).forward, layouts)
    proved, unproved = False, ""
    for (layer_type, axes), layout in layouts.items():
        pairs = []
        for ids in _ids(module, layout):
            probe = rotary.on_cpu(module)
            x = torch.zeros(1, 1, 1, dtype=torch.float32)
            given: tuple[Any, ...] = (x, rotary.arranged(ids, layout.axes_dim), layer_type)
            given = given[: 1 if not axes else 2 if layer_type is None else 3]
            pairs.append((type(module).forward(probe, *given), make(probe, *given)))
        error = 0.0
        for original, carried in pairs:
            last = [_last(made) if axes else made for made in (carried, original)]
            tokens = rehearsal.TOKENS if axes else len(original)
            noise = torch.randn(
                tokens, 3, 2 * len(layout.freq_axis), generator=torch.Generator().manual_seed(1)
            )
            found = rotary.call(apply, last[0], noise, ours), rotary.call(apply, last[1], noise)
            error = max(error, _largest_difference(*found))
        original, carried = pairs[0]
        if not axes:  # a table of many tokens
            original, carried = original[: rehearsal.TOKENS], carried[: rehearsal.TOKENS]
        if error <= _TOLERANCE:
            try:
                error = _largest_difference(
                    *_rehearse(attention, layouts, turns, original, carried)
                )
                proved = True
            except _NotRehearsedError as reason:
                unproved = str(reason)
            except rehearsal.ImpossibleError as reason:
                return f"{name} cannot be patched: {reason}"
        if not error <= _TOLERANCE:
            return f"the numeric check failed: {name} or {apply.name} differs by {error:.3g}"
    # Norms are put off, and memory overwritten, only where a whole forward has been compared.
    if attention.study.rehearsed and not proved:
        return f"{name} cannot be patched: {unproved}"
    return None


def _ids(module: Any, layout: Layout) -> list[Tensor]:
    """Position ids ``[T, A]``: a few, and more than the model was made for."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(1000, (rehearsal.TOKENS, layout.axes), generator=generator)
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None) or 1024
    many = torch.arange(min(2 * longest, 1 << 15) + 1)[:, None].expand(-1, layout.axes)
    return [few, many]


def _last(made: Any) -> Any:
    """Of what a rotary module returned, the last tokens."""
    if isinstance(made, tuple):
        return tuple(t[..., -rehearsal.TOKENS :, :] for t in made)
    return made[..., -rehearsal.TOKENS :, :]


class _NotRehearsedError(Exception):
    """The model's own code cannot be rehearsed: only the function that rotates was compared."""


def _rehearse(
    attention: _Attention,
    layouts: Layouts,
    turns: carry.Turns,
    original: Any,
    carried: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the linear layers of an attention module are given, patched and not."""
    given: tuple[list[Tensor], list[Tensor]] = ([], [])
    packed = attention.apply.unsqueeze_dim is None and not attention.apply.complex
    forward: Any = type(attention.module).forward
    ours, theirs = (rehearsal.twin(attention.module, inputs) for inputs in given)
    names = rehearsal.positions(forward)
    try:
        rehearsal.run(forward, theirs, packed, **dict.fromkeys(names, original))
    except rehearsal.ImpossibleError as reason:
        raise _NotRehearsedError(str(reason)) from reason
    if isinstance(attention.study.norms, Norms):
        for name in (attention.study.norms.q, attention.study.norms.k):
            getattr(ours, name).__class__ = norms.deferring_class(getattr(ours, name))
    for child in list(ours.modules()):
        if rotary.is_rotary(child):  # Idefics: in the attention module itself
            child.__class__ = _rotary_class(type(child), layouts)
    forward = _attention_class(attention, turns).forward
    rehearsal.run(forward, ours, packed, **dict.fromkeys(names, carried))
    return given


def _largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


SITE = Site("mrope", find, adapt, check)
