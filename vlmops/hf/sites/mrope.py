"""`vlmops.mrope` in language models: no cosine, no sine, one call per attention layer.

Hugging Face computes ``position_embeddings = rotary_emb(hidden_states, position_ids)`` once per
forward and every attention layer calls ``apply_rotary_pos_emb(q, k, *position_embeddings)``.
Patched, ``rotary_emb`` hands on ``(position_ids, inv_freq)`` and the function is `mrope`. So the
rotary module and all the layers that it serves change together or not at all.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf.rebind import original_class, rebind, subclass
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.ops.mrope import Rotation, mrope, mrope_

_AXES = 3  # time, height, width
_ROTARY_SIGNATURE = ["self", "x", "position_ids"]
_APPLY_SIGNATURE = ["q", "k", "cos", "sin", "unsqueeze_dim"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the probe read off: constants of one model."""

    freq_axis: tuple[int, ...]
    rotation: Rotation
    scaling: float


@dataclasses.dataclass(frozen=True)
class _Details:
    rotary: nn.Module
    attentions: tuple[nn.Module, ...]
    apply_name: str
    apply: Callable[..., tuple[Tensor, Tensor]]
    layout: Layout


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Decoders whose ``rotary_emb`` takes one position per axis and serves all their ``layers``."""
    for path, decoder in model.named_modules():
        rotary, layers = getattr(decoder, "rotary_emb", None), getattr(decoder, "layers", None)
        if not isinstance(rotary, nn.Module) or not isinstance(layers, nn.ModuleList):
            continue
        if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            continue
        callers = [_callers(layer) for layer in layers]
        attentions = tuple(module for found in callers for module, _ in found)
        if not attentions:
            continue
        place = Place(path, type(attentions[0]).__name__, len(attentions))
        if all(original_class(m) for m in (rotary, *attentions)):
            yield AlreadyPatched(place)
            continue
        probed = _examine(rotary, callers)
        if isinstance(probed, _Details):
            yield dataclasses.replace(place, details=probed)
        elif probed is not None:
            yield Refused(place, probed)


def _callers(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules in a layer whose forward calls a global ``f(q, k, cos, sin, ..)``, and its name."""
    found = []
    for module in layer.modules():
        forward = inspect.unwrap(type(module).forward)
        if not inspect.isfunction(forward):  # TorchScript, C++
            continue
        for name in forward.__code__.co_names:
            function = forward.__globals__.get(name)
            if (
                inspect.isfunction(function)
                and list(inspect.signature(function).parameters) == _APPLY_SIGNATURE
            ):
                found.append((module, name))
    return found


def _examine(
    rotary: nn.Module, callers: list[list[tuple[nn.Module, str]]]
) -> _Details | str | None:
    """The details of a place; why it is refused; or None if it has no multi-axis rotary at all."""
    if not _takes_axes(rotary):
        return None
    for i, found in enumerate(callers):
        if len(found) != 1:
            return f"layer {i} has {len(found)} attention modules that rotate q and k, expected 1"
    attentions = [found[0][0] for found in callers]
    for module in (rotary, *attentions):
        if original_class(module):
            return f"some of its {type(module).__name__} modules are patched and others are not"
        if "forward" in vars(module):
            owner = _owner(vars(module)["forward"])
            return (
                f"{type(module).__name__}.forward was replaced on the instance by {owner}; "
                "undo that, patch, then redo it"
            )
    names = {name for ((_, name),) in callers}
    functions = {_forward(m).__globals__[name] for ((m, name),) in callers}
    if len(names) != 1 or len(functions) != 1:
        return f"its layers rotate with different functions: {', '.join(sorted(names))}"
    (name,), (function,) = names, functions
    home = _forward(attentions[0]).__module__
    if inspect.unwrap(function).__module__ != home:
        return f"{name} in {home} was replaced by {_owner(function)}; undo that first"
    device = rotary.inv_freq.device
    if device.type not in ("cpu", "meta"):
        return f"no kernel for {device.type} in this build of vlmops: only the CPU is served yet"
    layout = _probe(_on_cpu(rotary), function)
    if isinstance(layout, str):
        return layout
    return _Details(rotary, tuple(attentions), name, function, layout)


def _forward(module: nn.Module) -> types.FunctionType:
    forward = inspect.unwrap(type(module).forward)
    assert isinstance(forward, types.FunctionType)
    return forward


def _owner(function: Any) -> str:
    function = inspect.unwrap(getattr(function, "func", function))
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _takes_axes(rotary: nn.Module) -> bool:
    """Whether rotary takes position_ids [A, B, S] and returns cos and sin [B, S, width]."""
    if list(inspect.signature(type(rotary).forward).parameters) != _ROTARY_SIGNATURE:
        return False
    probe = _on_cpu(rotary)
    try:
        out = type(probe).forward(probe, torch.zeros(1, 1, 1), torch.zeros(_AXES, 1, 2).long())
    except (RuntimeError, ValueError, IndexError):  # written for [B, S]
        return False
    return (
        isinstance(out, tuple)
        and len(out) == 2
        and all(isinstance(t, Tensor) and t.dim() == 3 and t.shape[:2] == (1, 2) for t in out)
    )


def _on_cpu(rotary: nn.Module) -> nn.Module:
    """A copy to experiment with: dynamic types change their own buffers when called."""
    config = getattr(rotary, "config", None)
    if rotary.inv_freq.device.type == "meta":
        with torch.device("cpu"):
            return type(rotary)(config=config)
    memo = {} if config is None else {id(config): config}
    return copy.deepcopy(rotary, memo).to("cpu")


def _probe(rotary: Any, function: Callable[..., Any]) -> Layout | str:
    """Reads a model's layout off its own code.

    One-hot positions show which axis drives each frequency: token 0 is at position 0 on every axis,
    token 1 + a at position 1 on axis a alone. A one-hot query turned by 90 degrees shows which
    channel is the partner of channel 0.
    """
    inv_freq = rotary.inv_freq.float()
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    frequencies = len(inv_freq)
    one_hot = torch.cat((torch.zeros(_AXES, 1), torch.eye(_AXES)), dim=1).long()[:, None]
    cos, sin = type(rotary).forward(rotary, torch.zeros(1, 1, 1), one_hot)  # [1, 1 + A, width]
    if cos.shape[-1] != 2 * frequencies:
        return f"cos has {cos.shape[-1]} channels for {frequencies} frequencies"
    driven = sin[0, 1:, :frequencies]  # [A, R]: sin(inv_freq) on the axis that drives, else 0
    axis = driven.abs().argmax(dim=0)
    expected = nn.functional.one_hot(axis, _AXES).T * inv_freq.sin() * scaling
    if not torch.allclose(driven, expected, rtol=1e-5, atol=0):
        return "its channels are not driven by one axis and one frequency each"

    query = torch.zeros(1, 1, 1, 2 * frequencies)
    query[..., 0] = 1
    turned, _ = function(query, query, torch.zeros_like(cos[:, :1]), torch.ones_like(sin[:, :1]))
    partner = turned.flatten().nonzero().flatten().tolist()
    rotations: dict[int, Rotation] = {frequencies: "half", 1: "pairs"}
    if len(partner) != 1 or partner[0] not in rotations:
        return f"it turns channel 0 into channels {partner}: neither halves nor pairs"
    return Layout(tuple(axis.tolist()), rotations[partner[0]], scaling)


_TOLERANCE = 1e-4  # float32, standard normal inputs, ids to 1,000: agreement is about 1e-6
_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the replacement against the model's own code; once per class and layout."""
    details: _Details = place.details
    key = (type(details.rotary), details.apply, details.layout)
    if key not in _checked:
        error = _largest_difference(details)
        _checked[key] = (
            None
            if error <= _TOLERANCE
            else (
                f"the numeric check failed: rotated q and k differ by {error:.3g} from "
                f"{details.apply_name}"
            )
        )
    return _checked[key]


def _largest_difference(details: _Details) -> float:
    rotary, layout = _on_cpu(details.rotary), details.layout
    draw = torch.Generator().manual_seed(0)
    head_dim = 2 * len(layout.freq_axis)
    q = torch.randn(2, 5, 3, head_dim, generator=draw).transpose(1, 2)
    k = torch.randn(2, 5, 1, head_dim, generator=draw).transpose(1, 2)
    position_ids = torch.randint(1000, (_AXES, 2, 5), generator=draw)
    expected = details.apply(q, k, *type(rotary).forward(rotary, q, position_ids))
    carried = _make_rotary_forward(layout.scaling)(rotary, q, position_ids)
    got = _make_apply(layout)(q, k, *carried)
    pairs = zip(got, expected, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    layout = details.layout

    def rotary_forward(_: str) -> Callable[..., Any]:
        forward = _make_rotary_forward(layout.scaling)
        forward.__signature__ = inspect.signature(type(details.rotary).forward)  # type: ignore[attr-defined]
        return forward

    def attention_class(attention: nn.Module) -> type[nn.Module]:
        def forward(label: str) -> Callable[..., Any]:
            return rebind(_forward(attention), label, **{details.apply_name: _make_apply(layout)})

        return subclass(type(attention), ("mrope", layout), forward)

    rotary_class = subclass(type(details.rotary), ("mrope", layout.scaling), rotary_forward)
    classes = {attention: attention_class(attention) for attention in details.attentions}
    return {details.rotary: rotary_class, **classes}


def _make_rotary_forward(scaling: float) -> Callable[..., tuple[Tensor, Tensor]]:
    from transformers.modeling_rope_utils import dynamic_rope_update

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(self, "attention_scaling", 1.0) != scaling:
            raise RuntimeError(
                f"attention_scaling of {type(self).__name__} was {scaling} when vlmops patched the "
                f"model and is {self.attention_scaling} now: call vlmops.unpatch and vlmops.patch"
            )
        # A copy, since dynamic types change the buffer; as bits, since wrappers that cast floating
        # inputs (FSDP's mixed precision) would round it.
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32, copy=True)
        return position_ids.expand(_AXES, -1, -1), inv_freq.view(torch.int32)

    rotary_forward: Callable[..., tuple[Tensor, Tensor]] = forward
    return rotary_forward


def _make_apply(layout: Layout) -> Callable[..., tuple[Tensor, Tensor]]:
    on_cpu = torch.tensor(layout.freq_axis, dtype=torch.int32)
    rotation, scaling = layout.rotation, layout.scaling

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        # cos and sin are what the patched rotary module returned: position_ids and inv_freq.
        position_ids = cos.expand(-1, q.shape[0], -1)
        inv_freq = sin.view(torch.float32)
        freq_axis = on_cpu if q.device == on_cpu.device else on_cpu.to(q.device)
        op = mrope_ if _may_overwrite(q) and _may_overwrite(k) else mrope
        return op(
            q,
            k,
            position_ids,
            inv_freq,
            freq_axis,
            rotation=rotation,
            scaling=scaling,
            head_axis=unsqueeze_dim,
        )

    return apply_rotary_pos_emb


def _may_overwrite(x: Tensor) -> bool:
    """Whether nobody but the caller can see x change: no graph, hook, buffer or other view."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and _users(x) in _UNSHARED


def _users(x: Tensor) -> tuple[int, ...]:
    """Counts of what can reach x's memory: whoever keeps a tensor on it raises one of them.

    Users of the storage (a forward hook that recorded a view, a buffer handed out), and of the
    tensor that x is a view of (a hook that recorded the projection's output itself).
    """
    storage: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    base = x._base
    if base is None:
        return (storage,)
    tensor: int = base._use_count()  # type: ignore[attr-defined]
    return storage, tensor, sys.getrefcount(base)


def _unshared() -> set[tuple[int, ...]]:
    """The counts that this Python and this torch give for fresh tensors seen through views."""
    with torch.inference_mode():
        inference = _users(torch.zeros(2).view(2, 1).transpose(0, 1))
    return {inference, _users(torch.zeros(2).view(2, 1).transpose(0, 1))}


_UNSHARED = _unshared()

SITE = Site("mrope", find, adapt, check)
