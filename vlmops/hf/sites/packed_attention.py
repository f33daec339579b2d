"""`vlmops.packed_attention` in the attention of vision towers, and cross-attention to them.

Found are modules whose forward asks ``ALL_ATTENTION_FUNCTIONS`` for a function and gives it q, k
and v. Its answer is replaced (`vlmops.hf.attentions`), in these modules alone; projections, norms
and rotation stay the model's own code. Towers that cut q, k and v into segments are led into the
branch that hands the whole on, as for flash attention; towers that make a mask of segments or of
padding make what the op takes in its place. Where tokens attend to all others, torch has an
attention of its own, and measurements decide. Text that attends to tiles or images is
`vlmops.gated_cross_attention`'s, `vlmops.hf.sites.gated_cross_attention`; it is found, adapted and
checked by what is here.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from vlmops import dispatch
from vlmops.hf import attentions, grids, media, plain, rehearsal, rotary
from vlmops.hf.attentions import CROSS, Kind
from vlmops.hf.rebind import (
    OPS,
    changed,
    innermost,
    ops_of,
    original_class,
    owner,
    rebuild,
    references,
    subclass,
)
from vlmops.hf.seen import SeenImages
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Place, Refused, Site
from vlmops.ops.packed_attention import packed_attention

_OP, _CROSS_OP, _QUERY_OP = "packed_attention", "gated_cross_attention", "qformer_attention"
_BESIDE: frozenset[Hashable] = frozenset({"mrope", "patch_embed"})
_TOLERANCE = 1e-4  # of values around 1, in float32: agreement is about 1e-6
_CLEARLY = 0.95  # of the time of torch's own attention is what the op may take
_MOST_TOKENS = 1024  # of a measurement
_SMALL = 2**18  # multiplications; below, attention is all overhead
_ROUNDS = 3
_KEYS = 1024  # that the query of a decode step meets in a measurement
DECODES = "where a token is generated that sees all before it"
"""What the report says of a decoder."""
_HOPELESS = 4.0
# Parameters of the functions that make masks for all layers of a tower.
_MASKS: Mapping[tuple[str, ...], Kind] = {
    ("patch_embeds_list", "tensor"): "images",
    ("aspect_ratio_mask", "num_patches", "target_length", "dtype"): "padding",
    ("cross_attention_mask", "num_vision_tokens", "dtype"): "tiles",
}
_DROPOUT = ("dropout", "attention_dropout", "dropout_p")
"""Attributes of attention modules: the share of weights that is dropped in training."""
_OTHERS = {"context", "cross_attention_states", "encoder_hidden_states", "key_value_states"}
"""Parameters of a forward that attends to other tokens than its own."""
_CARRIED: Mapping[Kind, Callable[[Any], Callable[..., Any]]] = {
    "images": attentions.mask_of_images,
    "padding": attentions.mask_of_padding,
    "tiles": attentions.mask_of_tiles,
}


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What makes the mask of a tower: a function that its forward calls, or the forward itself."""

    tower: nn.Module
    name: str
    function: Any


@dataclasses.dataclass(frozen=True)
class Details:
    """A place: the modules, and what else changes for them."""

    attentions: tuple[nn.Module, ...]
    kind: Kind
    mask: _Mask | None
    grids: nn.Module | None
    """The tower that works out segments and more from grids."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """All of them."""
        towers = self.grids, None if self.mask is None else self.mask.tower
        return (*self.attentions, *(tower for tower in towers if tower is not None))


@dataclasses.dataclass(frozen=True)
class Heads:
    """What a module gives its attention function."""

    heads: int
    kv_heads: int
    dim: int


@dataclasses.dataclass
class _Group:
    kind: Kind
    mask: _Mask | None
    grids: nn.Module | None
    paths: list[str] = dataclasses.field(default_factory=list)
    modules: list[nn.Module] = dataclasses.field(default_factory=list)


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Attention modules of one class below one module, and the tower that makes their mask."""
    yield from find_groups(model, _OP)


def find_groups(model: nn.Module, op: str) -> Iterator[Place | Refused | AlreadyPatched]:
    """Those that become calls of an op."""
    for group in _groups(model):
        if op_of(group.kind) != op:
            continue
        details = Details(tuple(group.modules), group.kind, group.mask, group.grids)
        module = group.modules[0]
        place = Place(common(group.paths), type(module).__name__, len(group.modules), details)
        if all(op in ops_of(part) for part in details.parts):
            yield AlreadyPatched(place)
            continue
        selected = implementation_of(module)
        if selected not in attentions.SELECTED:
            stands = " and ".join(attentions.SELECTED)
            yield LeftAlone(place, f"{selected} is selected, and the op stands for {stands}")
            continue
        if group.grids is not None and (reason := _changed(group.grids)) is not None:
            details = dataclasses.replace(details, grids=None)
            note = f"without what its tower makes of grids: {reason}"
            place = dataclasses.replace(place, details=details, note=note)
        reason = _refusal(details)
        if reason is not None:
            yield Refused(place, reason)
            continue
        if group.kind == "decode":
            place = dataclasses.replace(place, note=DECODES)
        elif drops(module):
            dropped = "in training its own attention, which drops some weights"
            place = dataclasses.replace(place, note="; ".join(filter(None, (place.note, dropped))))
        reason = _left_alone(module, group.kind)
        if reason is not None:
            yield LeftAlone(place, reason)
            continue
        if group.kind == "dense" and (reason := _left_alone(module, group.kind, trained=True)):
            details = dataclasses.replace(details, kind="inference")
            note = f"where nothing is differentiated; there {reason}"
            place = dataclasses.replace(place, details=details, note=note)
        yield place


def drops(module: nn.Module) -> bool:
    """Whether attention weights are dropped in training."""
    shares = (getattr(module, name, None) for name in _DROPOUT)
    return any(isinstance(share, float) and share > 0.0 for share in shares)


def op_of(kind: Kind) -> str:
    """The op that does the work."""
    return _CROSS_OP if kind in CROSS else _QUERY_OP if kind == "queries" else _OP


def _groups(model: nn.Module) -> list[_Group]:
    groups: dict[Hashable, _Group] = {}
    masks: dict[nn.Module, tuple[Kind, _Mask]] = {}
    hosts: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        made = _mask(module)
        if made is not None:
            masks |= dict.fromkeys(module.modules(), made)
        if _helpers(module):
            hosts |= dict.fromkeys(module.modules(), module)
        kind = _kind(module)
        if kind is None:
            continue
        mask: _Mask | None = None
        known = masks.get(module)
        if kind in CROSS and (known is None or known[0] != kind):
            continue  # nobody says what is seen
        if known is not None and (kind in CROSS or (kind == "dense" and known[0] not in CROSS)):
            kind, mask = known
        host = hosts.get(module) if kind == "segments" else None
        path = starred(path)
        key = original_class(module) or type(module), path if mask is None else mask, host
        group = groups.setdefault(key, _Group(kind, mask, host))
        if module not in group.modules:
            group.paths.append(path)
            group.modules.append(module)
    return list(groups.values())


def starred(path: str) -> str:
    """With a * for numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def common(paths: list[str]) -> str:
    """model.visual.blocks.*.attn for a group of several."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] if len(set(names)) == 1 else "*" for names in parts)


def is_cross(module: nn.Module) -> bool:
    """Whether a module is attention of text to tiles or images."""
    return _kind(module) in CROSS


def _forward(module: nn.Module) -> Any:
    """The model's own forward, without decorators; None for C++ and TorchScript."""
    forward = innermost(inspect.getattr_static(original_class(module) or type(module), "forward"))
    return forward if inspect.isfunction(forward) else None


def asked_of(forward: Any) -> dict[str, Any]:
    """By which global names a forward asks for its attention function and how it is called."""
    from transformers.modeling_utils import AttentionInterface

    names = forward.__code__.co_names
    if "get_interface" not in names:
        return {}
    found = {name: forward.__globals__[name] for name in names if name in forward.__globals__}
    asked = {
        name: value
        for name, value in found.items()
        if isinstance(value, AttentionInterface)
        or getattr(value, "__name__", "") == "is_flash_attention_requested"
    }
    return asked if any(not callable(value) for value in asked.values()) else {}


def _kind(module: nn.Module) -> Kind | None:
    """Who attends in a module; None if it is no attention, or attends to others as nobody knows."""
    forward = _forward(module)
    asked = {} if forward is None else asked_of(forward)
    if not asked:
        return None
    parameters = inspect.signature(forward).parameters
    if "cu_seqlens" in parameters and any(callable(value) for value in asked.values()):
        return "segments"
    if "cu_seqlens" in parameters:
        return None
    if "cross_attention_states" in parameters and "past_key_values" in parameters:
        return "tiles"
    if "key_value_states" in parameters and getattr(module, "is_cross_attention", False) is True:
        return "media"
    if {"encoder_hidden_states", "encoder_attention_mask"} <= set(parameters):
        return None if "past_key_values" in parameters else "queries"
    if _OTHERS & set(parameters):
        return None
    # Decoders have a cache, and say whether they are causal.
    if "past_key_values" in parameters and hasattr(module, "is_causal"):
        return "decode"
    return "dense"


def _mask(module: nn.Module) -> tuple[Kind, _Mask] | None:
    """Of a tower, what makes the mask of its layers."""
    forward = _forward(module)
    if forward is None:
        return None
    if media.expands_images(forward):
        return "media", _Mask(module, "image_attention_mask", None)
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if inspect.isfunction(function):
            kind = _MASKS.get(tuple(inspect.signature(function).parameters))
            if kind is not None:
                return kind, _Mask(module, name, function)
    return None


def implementation_of(module: Any) -> Any:
    """The attention implementation that is selected for a module; None if it has no config."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _helpers(module: nn.Module) -> dict[str, Any]:
    """Of a tower, what works on grids."""
    forward = _forward(module)
    return {} if forward is None else grids.helpers(forward)


def _changed(module: nn.Module) -> str | None:
    """What somebody did to a forward that patching would undo, or would not get past."""
    reason = changed(module, beside=_BESIDE, decorated=True)
    if reason is not None:
        return reason
    inner = innermost(type(module).forward)
    if inner.__code__ is not _forward(module).__code__:
        return f"{type(module).__name__}.forward is wrapped by {owner(inner)}"
    return None


def _refusal(details: Details) -> str | None:
    """Why modules that look right cannot be patched."""
    modules, mask = details.attentions, details.mask
    for module in details.parts:
        reason = _changed(module)
        if reason is not None:
            return reason
    if mask is not None and mask.function is not None:
        home = mask.function.__globals__["__name__"]
        if home != _forward(mask.tower).__module__:
            return f"{mask.name} was replaced by {owner(mask.function)}; undo that first"
    tensors = [t for m in modules for t in m.parameters()]
    for device in sorted({t.device for t in tensors}, key=str):
        reason = dispatch.refuses(_OP, device)
        if reason is not None:
            return reason
    for dtype in sorted({t.dtype for t in tensors if t.is_floating_point()}, key=str):
        if dtype == torch.float64:
            return f"no kernel for {dtype}"
    studied = _study(modules[0])
    if isinstance(studied, str):
        return studied
    if studied.dim % 8 or studied.dim > attentions.MAX_DIM:
        return (
            f"heads of {studied.dim} channels: the kernel takes multiples of 8 up to "
            f"{attentions.MAX_DIM}"
        )
    return None


# Whether it gains.


def _left_alone(module: Any, kind: Kind, trained: bool = False) -> str | None:
    """Why a module that can be patched would gain nothing, forward or with its derivative."""
    if kind not in ("dense", "decode"):
        return None
    tokens = _KEYS if kind == "decode" else _tokens(getattr(module, "config", None))
    if tokens is None:
        return "its config does not say how many tokens it attends to: not measured"
    studied = _study(module)
    assert isinstance(studied, Heads)
    weight = next((p for p in module.parameters() if p.dtype in plain.DTYPES), None)
    if weight is None:
        return "its weights do not say what it computes in: not measured"
    queries = 1 if kind == "decode" else tokens
    return worthwhile(queries, tokens, studied, weight.dtype, weight.device, trained)


def _tokens(config: Any) -> int | None:
    """Patches of an image of the size that a tower is made for."""
    patches = getattr(config, "num_patches", None)
    if isinstance(patches, int):
        return patches
    image, patch = (_pair(getattr(config, name, None)) for name in ("image_size", "patch_size"))
    if image is None or patch is None:
        return None
    return max(1, image[0] // patch[0] * (image[1] // patch[1]))


def _pair(side: Any) -> tuple[int, int] | None:
    if isinstance(side, int):
        return side, side
    return tuple(side) if isinstance(side, list | tuple) and len(side) == 2 else None


_measured: dict[Hashable, float] = {}
"""The op's time as a share of that of torch's own attention."""


def worthwhile(
    queries: int,
    keys: int,
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    trained: bool = False,
) -> str | None:
    """Why torch's own attention is as fast where all queries see all keys; or None.

    Measured once for each shape and number of threads, on a few of the heads.
    """
    if device.type != "cpu":
        return f"not measured on {device.type}: torch's own attention stays"
    queries, keys = (min(tokens, _MOST_TOKENS) for tokens in (queries, keys))
    if queries * keys * heads.heads * heads.dim < _SMALL:
        return "too small to gain"
    threads = torch.get_num_threads()
    if queries > 1:
        few = min(heads.kv_heads, max(2, threads))
        heads = Heads(few * (heads.heads // heads.kv_heads), few, heads.dim)
    key = queries, keys, heads, dtype, threads, trained
    if key not in _measured:
        with _disable_current_modes(), torch.inference_mode(False), torch.set_grad_enabled(trained):
            _measured[key] = _share(queries, keys, heads, dtype, trained)
    share = _measured[key]
    if share < _CLEARLY:
        return None
    return f"measured: torch's own attention takes {1 / share:.2f} of the op's time"


def _share(queries: int, keys: int, heads: Heads, dtype: torch.dtype, trained: bool) -> float:
    draw = torch.Generator().manual_seed(0)
    counts = heads.heads, heads.kv_heads, heads.kv_heads
    rows = queries, keys, keys
    shapes = [(n, h, heads.dim) for n, h in zip(rows, counts, strict=True)]
    q, k, v = (torch.randn(1, *s, generator=draw).to(dtype) for s in shapes)
    grad = torch.randn_like(q)
    for tensor in (q, k, v):
        tensor.requires_grad_(trained)

    def theirs() -> Tensor:
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return functional.scaled_dot_product_attention(
            *heads_first, enable_gqa=counts[0] != counts[1]
        ).transpose(1, 2)

    def seconds(function: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        out = function()
        if trained:
            torch.autograd.grad(out, (q, k, v), grad)
        return time.perf_counter() - start

    functions = theirs, lambda: packed_attention(q, k, v)
    share = 0.0
    for rounds in (1, _ROUNDS):  # the first is for caches, and for what is far off
        # The least of each: whatever disturbs a measurement makes it longer.
        torchs, ours = (min(seconds(f) for _ in range(rounds)) for f in functions)
        share = ours / torchs
        if share > _HOPELESS:
            break
    return share


# What modules become.


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: Details = place.details
    function = None if details.mask is None else details.mask.function
    classes = {m: _attention_class(m, details.kind, function) for m in details.attentions}
    if details.mask is not None:
        tower = details.mask.tower
        paths = {module: path for path, module in tower.named_modules()}
        below = tuple(paths[m] for m in details.attentions)
        classes[tower] = _tower_class(details.mask, details.kind, below)
    if details.grids is not None and _OP not in ops_of(details.grids):
        classes[details.grids] = _grids_class(details.grids)
    return classes


def _grids_class(tower: nn.Module) -> type[nn.Module]:
    original: Any = type(tower)

    def make_forward(label: str) -> Any:
        return rebuild(original.forward, label, **_helpers(tower))

    key = (_OP, "grids", original.forward, references(innermost(original.forward)))
    return subclass(original, key, make_forward)


def _attention_class(module: nn.Module, kind: Kind, mask: Any) -> type[nn.Module]:
    original: Any = type(module)
    forward = innermost(original.forward)

    def make_forward(label: str) -> Any:
        new = attentions.replaced(asked_of(_forward(module)), kind, mask)
        return rebuild(original.forward, label, **new)

    key = (op_of(kind), kind, mask, original.forward, references(forward))
    return subclass(original, key, make_forward)


def _tower_class(mask: _Mask, kind: Kind, below: tuple[str, ...]) -> type[nn.Module]:
    original: Any = type(mask.tower)

    def make_forward(label: str) -> Any:
        if mask.function is None:
            carries = media.carrying(original.forward)
        else:
            new = {mask.name: _CARRIED[kind](mask.function)}
            carries = rebuild(original.forward, label, **new)

        def either(inner: Any) -> Callable[..., Any]:
            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                ready = _ready(self, below, op_of(kind))
                return (carries if ready else inner)(self, *args, **kwargs)

            forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
            return forward

        return either(original.forward)

    forward = innermost(original.forward)
    key = (op_of(kind), kind, mask.name, below, original.forward, references(forward))
    return subclass(original, key, make_forward)


def _ready(tower: Any, below: tuple[str, ...], op: str) -> bool:
    """Whether all attention modules of a tower understand what travels in place of its mask."""
    if tower.config._attn_implementation not in attentions.SELECTED:
        return False
    for path in below:
        module = tower
        for name in path.split("."):
            module = getattr(module, name, None)
        if op not in getattr(type(module), OPS, ()) or "forward" in module.__dict__:
            return False
        if implementation_of(module) not in attentions.SELECTED:
            return False
    return True


# What they do, by running them with made up projections.

_studied: dict[Hashable, Heads | str] = {}


def _key(module: Any) -> Hashable:
    """Equal for modules that do the same."""
    numbers = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float) and name not in ("layer_idx", "training")
    )
    layers = tuple(
        (name, m.in_features, m.out_features)
        for name, m in module.named_modules()
        if rehearsal.is_linear(m)
    )
    forward = _forward(module)
    return forward, references(forward), implementation_of(module), numbers, layers


class _Spy:
    """In place of ``ALL_ATTENTION_FUNCTIONS``: keeps what its functions are given."""

    def __init__(self, theirs: Any) -> None:
        self.theirs, self.calls = theirs, list[Any]()
        self.last: Any = None

    def get_interface(self, *args: Any) -> Callable[..., Any]:
        function = self.theirs.get_interface(*args)

        def spied(module: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any) -> Any:
            self.calls.append((q, k, v))
            self.last = args, module, rest, kw
            return function(module, q, k, v, *rest, **kw)

        return spied


def _study(module: Any) -> Heads | str:
    """Shapes of what a module gives its attention function, or why it cannot be told."""
    key = _key(module)
    if key not in _studied:
        spies = {n: _Spy(f) for n, f in asked_of(_forward(module)).items() if not callable(f)}
        try:
            _rehearse(module, _forward(module), spies)
        except Exception as reason:  # foreign code, asked with what it was not written for
            _studied[key] = f"{type(module).__name__} cannot be rehearsed: {reason}"
        else:
            _studied[key] = _heads(module, [c for spy in spies.values() for c in spy.calls])
    return _studied[key]


def _heads(module: Any, calls: list[tuple[Tensor, Tensor, Tensor]]) -> Heads | str:
    name = type(module).__name__
    if not calls:
        return f"{name} does not call its attention function"
    q, k, v = calls[0]
    if q.dim() != 4 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        shapes = ", ".join(str(list(t.shape)) for t in calls[0])
        return f"{name} attends with q, k and v of shapes {shapes}"
    if q.shape[2] != k.shape[2]:
        return f"{name} attends to other tokens than its own"
    return Heads(q.shape[1], k.shape[1], q.shape[3])


_STARTS = torch.tensor([0, 2, rehearsal.TOKENS], dtype=torch.int32)


def _rehearse(module: Any, forward: Any, new: Mapping[str, Any], mask: Any = None) -> list[Tensor]:
    """What the linear layers of a module are given, where nothing is rotated."""
    found = {
        name: apply
        for name in forward.__code__.co_names
        if (apply := rotary.find_apply(name, forward.__globals__.get(name))) is not None
    }
    turns = {name: _unturned(apply) for name, apply in found.items()}
    rebuilt = rebuild(forward, "rehearsal", **turns, **new)
    one = torch.ones(1)
    anything: Any = one if any(apply.complex for apply in found.values()) else (one, one)
    positions = dict.fromkeys(rehearsal.positions(forward), anything)
    problem = None
    parameters = inspect.signature(forward).parameters
    for packed in (True, False) if "cu_seqlens" in parameters else (False,):
        given: list[Tensor] = []
        made = rehearsal.twin(module, given)
        made.config._attn_implementation = {"": implementation_of(module)}
        more: dict[str, Any] = {"attention_mask": mask, "cu_seqlens": _STARTS, **positions}
        more = {name: value for name, value in more.items() if name in parameters}
        try:
            rehearsal.run(rebuilt, made, packed, **more)
        except rehearsal.ImpossibleError as error:
            problem = problem or error
        else:
            return given
    assert problem is not None
    raise problem


def _unturned(apply: Any) -> Callable[..., Any]:
    def unturned(*args: Any, **_: Any) -> Any:
        return args[: apply.rows] if apply.rows > 1 else args[0]

    return unturned


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Rehearses the modules, patched and not; once per class, shapes and kind."""
    details: Details = place.details
    if details.kind == "media":
        assert details.mask is not None
        decoder = details.mask.tower
        forward = innermost((original_class(decoder) or type(decoder)).forward)
        if forward not in _checked:
            _checked[forward] = media.difference(decoder)
        if _checked[forward] is not None:
            return _checked[forward]
    for module in details.attentions:
        key = _key(module), details.kind, details.mask and details.mask.function
        if key not in _checked:
            with torch.no_grad():
                _checked[key] = _difference(module, details.kind, details.mask)
        if _checked[key] is not None:
            return _checked[key]
    return None


def _difference(module: Any, kind: Kind, mask: _Mask | None) -> str | None:
    """Why the replacement is not what it replaces."""
    if kind == "decode":
        return _difference_of_a_step(module)
    forward, name = _forward(module), type(module).__name__
    function = None if mask is None else mask.function
    new = attentions.replaced(asked_of(forward), kind, function)
    for theirs, ours in _masks(kind, function, implementation_of(module)):
        try:
            expected = _rehearse(module, forward, {}, theirs)
            got = _rehearse(module, forward, new, ours)
        except Exception as error:  # foreign code, asked with what it was not written for
            return f"{name} cannot be rehearsed: {error}"
        if [t.shape for t in got] != [t.shape for t in expected]:
            return f"the numeric check failed: {name} attends to other shapes"
        off = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
        if not off <= _TOLERANCE:
            return f"the numeric check failed: {name} differs by {off:.3g}"
    return None


def _difference_of_a_step(module: Any) -> str | None:
    """The same of a decode step, by the function alone: one query and more keys."""
    forward, name = _forward(module), type(module).__name__
    spies = {n: _Spy(theirs) for n, theirs in asked_of(forward).items() if not callable(theirs)}
    _rehearse(module, forward, spies)
    spy = next(spy for spy in spies.values() if spy.calls)
    asked, made, rest, options = spy.last
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, t.shape[1], n, t.shape[3], generator=draw)
        for t, n in zip(spy.calls[-1], (1, 9, 9), strict=True)
    )
    functions = spy.theirs, attentions.Functions(spy.theirs, "decode")
    expected, got = (f.get_interface(*asked)(made, q, k, v, *rest, **options)[0] for f in functions)
    off = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
    return None if off <= _TOLERANCE else f"the numeric check failed: {name} differs by {off:.3g}"


def _masks(kind: Kind, function: Any, selected: Any) -> Iterator[tuple[Any, Any]]:
    """A mask as the model makes it, and what stands for it."""
    tokens = rehearsal.TOKENS
    if kind == "media":
        all_but_later = torch.ones(1, tokens, tokens, dtype=torch.bool).tril()
        images = SeenImages(all_but_later, 1, torch.float32)
        yield images.tensor(), images
        return
    if kind == "queries" and selected == "sdpa":
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        seen[..., 1] = False
        yield seen, seen
    if function is None:
        yield None, None
        return
    make = _CARRIED[kind](function)
    if kind == "images":
        like = torch.zeros(1, rehearsal.TOKENS, 8)
        lengths = (_STARTS[1:] - _STARTS[:-1]).tolist()
        yield function(lengths, like), make(lengths, like)
        return
    if kind == "tiles":
        seen = torch.ones(1, tokens, 1, tokens, dtype=torch.long).tril(-1)  # the first sees none
        (theirs, _), (ours, _) = (f(seen, 1, torch.float32) for f in (function, make))
        yield theirs, ours
        return
    for tiles in (torch.ones(1, 1), torch.zeros(1, 1)):
        args = (tiles.long(), tokens - 2, tokens, torch.float32)
        yield function(*args), make(*args)


SITE = Site(_OP, find, adapt, check)
