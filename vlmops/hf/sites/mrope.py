"""`vlmops.mrope` in language models: no cosine, no sine, one call per attention layer.

Hugging Face computes ``position_embeddings = rotary_emb(hidden_states, position_ids)`` once per
forward and every attention layer calls ``apply_rotary_pos_emb(q, k, *position_embeddings)``.
Patched, ``rotary_emb`` hands on ``(position_ids, inv_freq)`` and the function is `mrope`. So the
rotary module and all the layers that it serves change together or not at all.

Where the kernel cannot serve a call (float64, torch.jit.trace, ..) ``rotary_emb`` does what it did
before, and a layer that meets real cosines and sines applies them as it did before.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf.aliasing import may_overwrite
from vlmops.hf.rebind import original_class, rebind, references, subclass
from vlmops.hf.rotary import AXES, Layout, on_cpu, read_layout, takes_axes
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.ops.mrope import mrope, mrope_

_APPLY_SIGNATURE = ["q", "k", "cos", "sin", "unsqueeze_dim"]
_ROTARY_DECORATORS = {"torch.utils._contextlib", "transformers.modeling_rope_utils"}
_TOLERANCE = 1e-4  # float32, standard normal inputs, ids to 1,000: agreement is about 1e-6

Apply = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class _Details:
    rotary: Any
    attentions: tuple[nn.Module, ...]
    apply_name: str
    apply: Apply
    layout: Layout


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Decoders whose ``rotary_emb`` takes one position per axis and serves all their ``layers``."""
    for path, decoder in model.named_modules():
        # Not getattr: wrappers (compiled modules, PEFT) forward it to the decoder inside them.
        rotary, layers = decoder._modules.get("rotary_emb"), decoder._modules.get("layers")
        if rotary is None or not isinstance(layers, nn.ModuleList):
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
        elif original_class(rotary) or takes_axes(rotary):
            examined = _examine(rotary, callers)
            if isinstance(examined, str):
                yield Refused(place, examined)
            else:
                yield dataclasses.replace(place, details=examined)


def _callers(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules in a layer whose forward calls a global ``f(q, k, cos, sin, ..)``, and its name."""
    found = []
    for module in layer.modules():
        forward = inspect.unwrap(type(module).forward)
        if not inspect.isfunction(forward):  # TorchScript, C++
            continue
        names = forward.__code__.co_names
        found += [(module, name) for name in names if _applies(forward.__globals__.get(name))]
    return found


def _applies(function: Any) -> bool:
    if isinstance(function, nn.Module):  # what the `kernels` package makes of decorated functions
        function = function.forward
    return (
        inspect.isroutine(function)
        and list(inspect.signature(function).parameters) == _APPLY_SIGNATURE
    )


def _examine(rotary: Any, callers: list[list[tuple[nn.Module, str]]]) -> _Details | str:
    """The details of a place, or why it is refused."""
    for i, found in enumerate(callers):
        if len(found) != 1:
            return f"layer {i} has {len(found)} attention modules that rotate q and k, expected 1"
    attentions = tuple(found[0][0] for found in callers)
    for module in (rotary, *attentions):
        reason = _changed(module)
        if reason is not None:
            return reason
    if rotary._forward_hooks:
        return f"forward hooks on {type(rotary).__name__} expect cosines and sines; remove them"
    names = {name for ((_, name),) in callers}
    functions = {type(m).forward.__globals__[name] for ((m, name),) in callers}
    if len(names) != 1 or len(functions) != 1:
        return f"its layers rotate with different functions: {', '.join(sorted(names))}"
    (name,), (apply,) = names, functions
    home = type(attentions[0]).forward.__module__
    if not isinstance(apply, nn.Module) and apply.__globals__["__name__"] != home:
        return f"{name} in {home} was replaced by {_owner(apply)}; undo that first"
    device = rotary.inv_freq.device
    if device.type not in ("cpu", "meta"):
        return f"no kernel for {device.type} in this build of vlmops: only the CPU is served yet"
    layout = read_layout(on_cpu(rotary), apply)
    return layout if isinstance(layout, str) else _Details(rotary, attentions, name, apply, layout)


def _changed(module: nn.Module) -> str | None:
    """What somebody did to a module's forward that patching would undo."""
    name = type(module).__name__
    if original_class(module):
        return f"some of its {name} modules are patched and others are not"
    if "forward" in vars(module):
        owner = _owner(vars(module)["forward"])
        return f"{name}.forward was replaced on the instance by {owner}; undo that, then patch"
    forward: Any = type(module).forward
    while getattr(forward, "__wrapped__", None) and (
        forward.__globals__["__name__"] in _ROTARY_DECORATORS
    ):
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


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the replacement against the model's own code; once per class and layout."""
    details: _Details = place.details
    key = (type(details.rotary).forward, details.apply, details.layout)
    if key not in _checked:
        error = _largest_difference(details)
        _checked[key] = None
        if not error <= _TOLERANCE:
            _checked[key] = (
                f"the numeric check failed: rotated q and k differ by {error:.3g} from "
                f"{details.apply_name}"
            )
    return _checked[key]


def _largest_difference(details: _Details) -> float:
    rotary, layout = on_cpu(details.rotary), details.layout
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    head_dim = 2 * len(layout.freq_axis)
    q = torch.randn(2, 5, 3, head_dim, **draw).transpose(1, 2)
    k = torch.randn(2, 5, 1, head_dim, **draw).transpose(1, 2)
    position_ids = torch.randint(1000, (AXES, 2, 5), generator=draw["generator"])
    expected = details.apply(q, k, *type(rotary).forward(rotary, q, position_ids))
    carried = _make_rotary_forward(type(rotary), layout.scaling)(rotary, q, position_ids)
    got = _make_apply(layout, details.apply)(q, k, *carried)
    pairs = zip(got, expected, strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    layout, original = details.layout, type(details.rotary)
    replaced = {details.apply_name: _make_apply(layout, details.apply)}

    def attention_class(attention: nn.Module) -> type[nn.Module]:
        forward: Any = type(attention).forward
        key = ("mrope", layout, references(forward))
        return subclass(type(attention), key, lambda label: rebind(forward, label, **replaced))

    rotary_class = subclass(
        original,
        ("mrope", layout.scaling, original.forward),
        lambda _: _make_rotary_forward(original, layout.scaling),
    )
    classes = {attention: attention_class(attention) for attention in details.attentions}
    return {details.rotary: rotary_class, **classes}


def _make_rotary_forward(original: Any, scaling: float) -> Callable[..., tuple[Tensor, Tensor]]:
    from transformers.modeling_rope_utils import dynamic_rope_update

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def carry(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        # A copy, since dynamic types change the buffer; as bits, since wrappers that cast floating
        # inputs (FSDP's mixed precision) would round it.
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float32, copy=True)
        if (
            not torch.compiler.is_compiling()
            and position_ids.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            position_ids = position_ids.clone()  # backward could not save it
        return position_ids.expand(AXES, -1, -1), inv_freq.view(torch.int32)

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(self, "attention_scaling", 1.0) != scaling:
            raise RuntimeError(
                f"attention_scaling of {type(self).__name__} was {scaling} when vlmops patched the "
                f"model and is {self.attention_scaling} now: call vlmops.unpatch and vlmops.patch"
            )
        served = (
            x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not position_ids.is_floating_point()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and not self._forward_hooks  # they expect cosines and sines
        )
        carried: tuple[Tensor, Tensor] = (carry if served else original.forward)(
            self, x, position_ids
        )
        return carried

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    return forward


def _make_apply(layout: Layout, original: Apply) -> Apply:
    on_the_cpu = torch.tensor(layout.freq_axis, dtype=torch.int32)

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if sin.dtype != torch.int32:  # the rotary module was not asked, or could not serve
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        freq_axis = on_the_cpu if q.device.type == "cpu" else on_the_cpu.to(q.device)
        options: dict[str, Any] = {
            "position_ids": cos.expand(-1, q.shape[0], -1),
            "inv_freq": sin.view(torch.float32),
            "freq_axis": freq_axis,
            "rotation": layout.rotation,
            "scaling": layout.scaling,
            "head_axis": unsqueeze_dim,
        }
        if q.dtype != k.dtype:  # autocast around one of the projections
            nothing = slice(0, 0)
            return mrope(q, q[:, nothing], **options)[0], mrope(k, k[:, nothing], **options)[0]
        if may_overwrite(q) and may_overwrite(k):
            return mrope_(q, k, **options)
        return mrope(q, k, **options)

    return apply_rotary_pos_emb


SITE = Site("mrope", find, adapt, check)
