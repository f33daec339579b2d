"""`vlmops.mrope` wherever a model rotates q and k: no cosine, no sine, one call a layer.

Hugging Face computes cosines and sines once per forward in a rotary module and every attention
layer applies them with a function that its forward finds among its globals. Patched, the rotary
module hands on positions and frequencies in their place, and the function is `mrope`. So rotary
modules and all the attention modules below the module that holds them change together or not at
all. What the two do is read off by probing (`vlmops.hf.rotary`).

In place of cos ``[*tokens, D]`` travel the position ids ``[*tokens, A]``, in place of sin the bits
of the frequencies ``[*tokens, R]``, one row of memory seen as many: whatever a model does along the
tokens (Qwen2.5-VL sorts them into windows) does the right thing to both. Complex rotations
``[*tokens, R]`` become integers ``[*tokens, A + R]``.

Where the kernel cannot serve a call (float64, torch.jit.trace, ..) the rotary module does what it
did before, and an attention layer that meets real cosines and sines applies them as it did before.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import norms, rehearsal, rotary
from vlmops.hf.aliasing import may_overwrite
from vlmops.hf.norms import Deferred, Norms
from vlmops.hf.rebind import original_class, rebind, references, subclass
from vlmops.hf.rotary import Apply, Layout, LayoutKey
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.ops.mrope import mrope, mrope_

_DECORATORS = {"torch.utils._contextlib", "transformers.modeling_rope_utils"}
_TOLERANCE = 1e-4  # float32, standard normal inputs, ids to 1,000: agreement is about 1e-6

Layouts = Mapping[LayoutKey, Layout]


@dataclasses.dataclass(frozen=True)
class _Attention:
    module: nn.Module
    apply: Apply
    calls: int
    """Of the function in one forward."""
    norms: Norms | str | None
    """See `norms.study`."""


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
        attentions = tuple(a for a in studied if a.calls)  # some layers go without
        place = dataclasses.replace(place, sites=sum(a.calls for a in attentions))
        if all(original_class(m) for m in (*group.rotaries, *(a.module for a in attentions))):
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
    return _Attention(module, apply, *norms.study(module, apply, packed))


def _note(attentions: tuple[_Attention, ...]) -> str:
    """What the report says of the norms."""
    notes = []
    for found in dict.fromkeys(a.norms for a in attentions):
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
    forward: Any = inspect.unwrap((original_class(module) or type(module)).forward)
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
        reason = _changed(module)
        if reason is not None:
            return reason
    for module in rotaries:
        if module._forward_hooks:
            return f"forward hooks on {type(module).__name__} expect cosines and sines; remove them"
    for attention in attentions:
        reason = _replaced(attention)
        if reason is not None:
            return reason
    devices = {t.device.type for m in parts for t in (*m.parameters(), *m.buffers())}
    for device in sorted(devices - {"cpu", "meta"}):
        return f"no kernel for {device} in this build of vlmops: only the CPU is served yet"

    layouts: dict[nn.Module, Layouts] = {}
    for module in rotaries:
        for apply in {a.apply for a in attentions}:
            read = rotary.read_layouts(rotary.on_cpu(module), apply)
            if isinstance(read, str):
                return read
            if layouts.setdefault(module, read) != read:
                return "its attention modules rotate in different ways"
    if _turns(layouts.values()) is None:
        return "its rotary modules and layer types differ in scaling or in the order of channels"
    return _Details(layouts, attentions)


def _replaced(attention: _Attention) -> str | None:
    """Who put another function in the place of the one that rotates."""
    home, name = type(attention.module).forward.__module__, attention.apply.name
    function: Any = attention.apply.function
    if isinstance(_forward(attention.module).__globals__[name], nn.Module):
        return None
    if getattr(function, "__globals__", {}).get("__name__") == home:
        return None
    return f"{name} in {home} was replaced by {_owner(function)}; undo that first"


def _changed(module: nn.Module) -> str | None:
    """What somebody did to a module's forward that patching would undo."""
    name = type(module).__name__
    if original_class(module):
        return f"some of its {name} modules are patched and others are not"
    if "forward" in vars(module):
        owner = _owner(vars(module)["forward"])
        return f"{name}.forward was replaced on the instance by {owner}; undo that, then patch"
    forward: Any = type(module).forward
    while getattr(forward, "__wrapped__", None) and forward.__globals__["__name__"] in _DECORATORS:
        forward = forward.__wrapped__
    if not inspect.isfunction(forward) or forward.__globals__["__name__"] != forward.__module__:
        return f"{name}.forward was wrapped by {_owner(forward)}; undo that, then patch"
    return None


def _owner(function: Any) -> str:
    """Where the code of a function stands, whatever functools.wraps copied onto it."""
    function = getattr(function, "__func__", getattr(function, "func", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{function.__globals__['__name__']}.{getattr(code, 'co_qualname', code.co_name)}"


# What travels.


@dataclasses.dataclass(frozen=True)
class _Turn:
    """What an attention layer needs beside what travels: it depends on A and R alone."""

    freq_axis: tuple[int, ...]
    rotation: Any
    scaling: float


def _turns(layouts: Any) -> dict[tuple[int, int], _Turn] | None:
    """(A, R) -> turn for all layouts of a place; None if that is ambiguous."""
    turns: dict[tuple[int, int], _Turn] = {}
    for layout in (layout for by_key in layouts for layout in by_key.values()):
        turn = _Turn(layout.freq_axis, layout.rotation, layout.scaling)
        if turns.setdefault((layout.axes, len(layout.freq_axis)), turn) != turn:
            return None
    return turns


def _make_rotary_forward(original: Any, layouts: Layouts) -> Callable[..., Any]:
    """A forward that returns what travels, or what it returned before."""
    if (None, 0) in layouts:
        return _make_table_forward(original)

    @torch.no_grad()
    def carry(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        given = () if layer_type is None else (layer_type,)
        layout = _layout_for(layouts, position_ids, layer_type)
        if layout is None or rotary.read_scaling(self, layer_type) != layout.scaling:
            return original(self, x, position_ids, *given)
        # A copy, since dynamic types change the buffer; as bits, since wrappers that cast floating
        # inputs (FSDP's mixed precision) would round it.
        inv_freq = getattr(self, layout.buffer).to(device=x.device, dtype=torch.float32, copy=True)
        if layout.freq_index != tuple(range(len(inv_freq))):
            inv_freq = inv_freq[_constant(layout.freq_index, x.device)]
        ids = position_ids
        if (
            not torch.compiler.is_compiling()
            and ids.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            ids = ids.clone()  # backward could not save it
        if layout.axes_dim is None:
            ids = ids[..., None]
        elif layout.axes_dim == 0:
            ids = ids.expand(layout.axes, -1, -1).movedim(0, -1)
        bits = inv_freq.view(torch.int32).expand(*ids.shape[:-1], -1)
        return torch.cat((ids.int(), bits), dim=-1) if layout.complex else (ids, bits)

    if _is_dynamic(original):
        from transformers.modeling_rope_utils import dynamic_rope_update

        carry = dynamic_rope_update(carry)  # type: ignore[no-untyped-call]

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        given = () if layer_type is None else (layer_type,)
        served = (
            x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not position_ids.is_floating_point()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and not self._forward_hooks  # they expect cosines and sines
        )
        return (carry if served else original)(self, x, position_ids, *given)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _make_table_forward(original: Any) -> Callable[..., Any]:
    """The same for a constant table of rotations (`rotary.table_of`)."""

    @torch.no_grad()
    def forward(self: Any, x: Tensor) -> Tensor:
        table: Tensor = original(self, x)
        if torch.jit.is_tracing() or self._forward_hooks:  # type: ignore[attr-defined, no-untyped-call]
            return table
        ids, inv_freq = rotary.factor_table(table)
        bits = inv_freq.view(torch.int32).expand(len(ids), -1)
        return torch.cat((ids.int(), bits), dim=-1)[:, None]  # [N, 1, A + R]

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _layout_for(layouts: Layouts, ids: Tensor, layer_type: str | None) -> Layout | None:
    for (known, axes), layout in layouts.items():
        if known != layer_type:
            continue
        if layout.axes_dim is None and ids.dim() == 2:
            return layout
        if layout.axes_dim == 0 and ids.dim() == 3 and ids.shape[0] in (1, axes):
            return layout
        if layout.axes_dim == -1 and ids.shape[-1] == axes:
            return layout
    return None


def _is_dynamic(function: Any) -> bool:
    while function is not None:
        if function.__globals__["__name__"] == "transformers.modeling_rope_utils":
            return True
        function = getattr(function, "__wrapped__", None)
    return False


_constants: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.int32, device=device)
    if (values, device) not in _constants:
        with torch.inference_mode(False):
            tensor = torch.tensor(values, dtype=torch.int32, device=device)
        _constants[values, device] = tensor
    return _constants[values, device]


def _make_apply(apply: Apply, turns: Mapping[tuple[int, int], _Turn], put_off: Norms | None) -> Any:
    """The function that rotates, for what travels; the model's own for anything else."""
    default = apply.unsqueeze_dim

    def rotate_complex(q: Tensor, k: Tensor, freqs: Any = None, **named: Any) -> Any:
        freqs = named.popitem()[1] if freqs is None else freqs  # whatever its name is
        if freqs.is_complex():
            return apply.function(q, k, freqs)
        in_place = may_overwrite(q) and may_overwrite(k)
        axes = next(axes for axes, frequencies in turns if axes + frequencies == freqs.shape[-1])
        if freqs.dim() == q.dim() - 1 and freqs.shape[1] == 1 != q.shape[1]:
            freqs = freqs[:, 0]  # a tower's table
        return _rotate(turns, q, k, freqs[..., :axes], freqs[..., axes:], 2, in_place)

    def rotate_one(x: Tensor, cos: Any, sin: Any, unsqueeze_dim: int | None = default) -> Any:
        if sin.dtype != torch.int32:
            return apply.function(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
        in_place = may_overwrite(x)
        heads = rotary.heads_from_right(apply, cos.dim() - 1, unsqueeze_dim)
        return _rotate(turns, x, x.narrow(-heads, 0, 0), cos, sin, heads, in_place)[0]

    def rotate(
        q: Tensor, k: Tensor, cos: Any, sin: Any, unsqueeze_dim: int | None = default
    ) -> Any:
        sin, *deferred = sin if isinstance(sin, Deferred) else (sin,)
        if sin.dtype != torch.int32:  # the rotary module was not asked, or could not serve
            if deferred:
                q, k = norms.normalise(deferred[0], q), norms.normalise(deferred[1], k)
            given = {} if unsqueeze_dim is None else {"unsqueeze_dim": unsqueeze_dim}
            return apply.function(q, k, cos, sin, **given)
        in_place = may_overwrite(q) and may_overwrite(k)
        heads = rotary.heads_from_right(apply, cos.dim() - 1, unsqueeze_dim)
        weights: list[Any] = [n.weight if norms.defers(n) else None for n in deferred]
        return _rotate(turns, q, k, cos, sin, heads, in_place, weights, put_off)

    return rotate_complex if apply.complex else rotate if apply.rows == 2 else rotate_one


def _rotate(
    turns: Mapping[tuple[int, int], _Turn],
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    bits: Tensor,
    heads: int,
    in_place: bool,
    weights: Sequence[Tensor | None] = (),
    put_off: Norms | None = None,
) -> tuple[Tensor, Tensor]:
    """`mrope` of q and k, given what travels.

    Args:
        turns: See `_turns`.
        q: Queries, their heads in the dimension ``-heads``.
        k: Keys.
        ids: ``[*tokens, A]``.
        bits: ``[*tokens, R]``.
        heads: 2 or 3.
        in_place: Whether q and k may be written.
        weights: Of the norms of q and k, if they were put off.
        put_off: Those norms.
    """
    turn = turns[ids.shape[-1], bits.shape[-1]]
    position_ids = ids.movedim(-1, 0)  # [A, *tokens]
    if position_ids.dim() < q.dim() - 1:
        position_ids = position_ids[:, None]
    if q.dim() == 4:
        position_ids = position_ids.expand(-1, q.shape[0], -1)
    while bits.dim() > 1:
        bits = bits[0] if bits.shape[0] else bits.new_zeros(bits.shape[-1])
    options: dict[str, Any] = {
        "position_ids": position_ids,
        "inv_freq": bits.view(torch.float32),
        "freq_axis": _constant(turn.freq_axis, q.device),
        "rotation": turn.rotation,
        "scaling": turn.scaling,
        "head_axis": q.dim() - heads,
    }
    if put_off is not None:
        options |= {"norm_eps": put_off.eps, "norm_offset": put_off.offset}
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights, strict=True))
    if q.dtype != k.dtype:  # autocast around one of the projections
        none_of_q, none_of_k = q.narrow(-heads, 0, 0), k.narrow(-heads, 0, 0)
        return mrope(q, none_of_q, **options)[0], mrope(none_of_k, k, **options)[1]
    if in_place:
        return mrope_(q, k, **options)
    return mrope(q, k, **options)


# Change of class.


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    turns = _turns(details.rotaries.values())
    assert turns is not None
    classes = {
        module: _rotary_class(type(module), layouts) for module, layouts in details.rotaries.items()
    }
    for attention in details.attentions:
        classes[attention.module] = _attention_class(attention, turns)
        if isinstance(attention.norms, Norms):
            for name in (attention.norms.q, attention.norms.k):
                norm = getattr(attention.module, name)
                classes[norm] = norms.deferring_class(norm)
    return classes


def _rotary_class(original: Any, layouts: Layouts) -> type[nn.Module]:
    key = ("mrope", tuple(layouts.items()), original.forward)
    return subclass(original, key, lambda _: _make_rotary_forward(original.forward, layouts))


def _attention_class(
    attention: _Attention, turns: Mapping[tuple[int, int], _Turn]
) -> type[nn.Module]:
    original: Any = type(attention.module)
    put_off = attention.norms if isinstance(attention.norms, Norms) else None
    apply = attention.apply

    def make_forward(label: str) -> Callable[..., Any]:
        replaced = {apply.name: _make_apply(apply, turns, put_off)}
        forward = rebind(original.forward, label, **replaced)
        return forward if put_off is None else norms.defer(put_off, forward)

    key = ("mrope", tuple(turns.items()), put_off, references(original.forward))
    return subclass(original, key, make_forward)


# The numeric check.

_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the replacement against the model's own code; once per class and layout."""
    details: _Details = place.details
    turns = _turns(details.rotaries.values())
    assert turns is not None
    for module, layouts in details.rotaries.items():
        for attention in {type(a.module): a for a in details.attentions}.values():
            key = (
                type(module).forward,
                tuple(layouts.items()),
                _attention_class(attention, turns),
            )
            if key not in _checked:
                _checked[key] = _difference(module, layouts, attention, turns)
            if _checked[key] is not None:
                return _checked[key]
    return None


def _difference(
    module: Any, layouts: Layouts, attention: _Attention, turns: Mapping[tuple[int, int], _Turn]
) -> str | None:
    """Why the replacement is not what it replaces: the function alone, and the whole attention."""
    apply, name = attention.apply, type(attention.module).__name__
    ours = _make_apply(apply, turns, None)
    carry = _make_rotary_forward(type(module).forward, layouts)
    unproved = None
    for (layer_type, axes), layout in layouts.items():
        probe = rotary.on_cpu(module)
        ids = torch.randint(
            1000, (rehearsal.TOKENS, layout.axes), generator=torch.Generator().manual_seed(0)
        )
        x = torch.zeros(1, 1, 1, dtype=torch.float32)
        given: tuple[Any, ...] = (x, rotary.arranged(ids, layout.axes_dim), layer_type)
        given = given[: 1 if not axes else 2 if layer_type is None else 3]
        original, carried = type(module).forward(probe, *given), carry(probe, *given)
        tokens = rehearsal.TOKENS if axes else len(original)
        noise = torch.randn(
            tokens, 3, 2 * len(layout.freq_axis), generator=torch.Generator().manual_seed(1)
        )
        error = _largest_difference(
            rotary.call(apply, carried, noise, ours), rotary.call(apply, original, noise)
        )
        if error <= _TOLERANCE:
            try:
                error = _largest_difference(*_rehearse(attention, turns, original, carried))
            except _NotRehearsedError as reason:
                unproved = reason
            except rehearsal.ImpossibleError as reason:
                return f"{name} cannot be patched: {reason}"
        if not error <= _TOLERANCE:
            return f"the numeric check failed: {name} or {apply.name} differs by {error:.3g}"
    # Norms are put off only where a whole forward has been compared.
    if unproved is not None and isinstance(attention.norms, Norms):
        return f"{name} cannot be patched: {unproved}"
    return None


class _NotRehearsedError(Exception):
    """The model's own code cannot be rehearsed: only the function that rotates was compared."""


def _rehearse(
    attention: _Attention, turns: Mapping[tuple[int, int], _Turn], original: Any, carried: Any
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
    if isinstance(attention.norms, Norms):
        for name in (attention.norms.q, attention.norms.k):
            getattr(ours, name).__class__ = norms.deferring_class(getattr(ours, name))
    forward = _attention_class(attention, turns).forward
    rehearsal.run(forward, ours, packed, **dict.fromkeys(names, carried))
    return given


def _largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


SITE = Site("mrope", find, adapt, check)
