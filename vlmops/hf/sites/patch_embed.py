"""`vlmops.patch_embed` for the patch embeddings of vision towers.

A convolution whose stride is its kernel becomes one product per patch, whose result lies in memory
as tokens do, ``[B, N, D]``, and is handed out as the view ``[B, D, h, w]`` that a convolution
returns (for images in channels_last it has these very strides). So the ``.flatten(2).transpose(1,
2)`` that follows in every tower copies nothing. A module of an `nn.Unfold` and an `nn.Linear` that
together do the same (Llama-4) is served as a whole.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init  # draws no random numbers

from vlmops import dispatch
from vlmops.hf import embeddings, pending, plain, towers
from vlmops.hf.embeddings import Layout
from vlmops.hf.pixels import PixelMap, Raw, attributes, is_raw, normalised, require_normalised
from vlmops.hf.rebind import changed, original_class, subclass
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Place, Refused, Site
from vlmops.ops.linear_tuning import tune
from vlmops.ops.patch_embed import patch_embed
from vlmops.ops.patch_embed_panels import computes_in

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv2d, nn.Conv3d)
_CHANNELS = 16  # of what the numeric check makes of patches
_SECONDS = 0.5  # at most for timing products
_TOLERANCE = 1e-4  # of a standard deviation, beyond rounding the result: sums are off by 1e-6


@dataclasses.dataclass(frozen=True)
class _Unfolding:
    """A module that cuts patches with one child and multiplies them with the other."""

    module: nn.Module
    unfold: str
    linear: str


@dataclasses.dataclass(frozen=True)
class _Embeddings:
    """A module around a convolution, whose forward is replaced too."""

    module: nn.Module
    layout: Layout
    convolution: nn.Module


@dataclasses.dataclass(frozen=True)
class _Tower:
    """A convolution or an unfolding in a tower whose forward embeds."""

    inner: Any
    module: nn.Module
    found: towers.Surroundings


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Every convolution whose stride is its kernel, with what surrounds it; every unfolding."""
    places: list[Place] = []
    weights: dict[int, Tensor] = {}  # kept, so that no other takes an id
    for path, module in model.named_modules():
        details: Any = module if _is_patchify(module) else _unfolding(module)
        if details is None:
            continue
        place = Place(path, type(module).__name__, 1, details)
        weight = _layer(details).weight
        if id(weight) in weights:  # UDOP's: whichever of them runs
            place = dataclasses.replace(place, sites=0, note="shares its weights with another")
        weights[id(weight)] = weight
        outer = embeddings.around(model, path) if details is module else None
        if outer is not None and original_class(outer[1]):
            yield AlreadyPatched(_around(place, *outer))
        elif original_class(module):
            yield AlreadyPatched(place)
        elif (reason := _refusal(details)) is not None:
            yield Refused(place, reason)
        elif _in_decoder(model, path):
            yield LeftAlone(place, "decoders are given no pixels")
        elif outer is None:
            places.append(_in_tower(model, place))
        else:
            layout = embeddings.study(outer[1], path.removeprefix(outer[0]).lstrip("."))
            if isinstance(layout, str):
                note = f"patches alone, not {type(outer[1]).__name__}: {layout}"
                places.append(_in_tower(model, dataclasses.replace(place, note=note)))
            else:
                found = _Embeddings(outer[1], layout, module)
                places.append(_around(place, *outer, details=found, note=layout.note))
    tune((_measurable(_layer(p.details).weight) for p in places), _SECONDS)
    yield from places


def _in_tower(model: nn.Module, place: Place) -> Place:
    """The place, with what its tower adds to patches if that can be put off."""
    weight = _kernel(place.details)
    outer = towers.around(model, place.path, len(weight))
    if outer is None:
        return place
    path, tower = outer
    patched = adapt(place)[model.get_submodule(place.path)]
    found = towers.study(tower, place.path.removeprefix(path).lstrip("."), weight, patched)
    if found is None:
        return place
    note = "; ".join(n for n in (place.note, found.note) if n)
    return dataclasses.replace(place, details=_Tower(place.details, tower, found), note=note)


def _around(place: Place, path: str, module: nn.Module, **more: Any) -> Place:
    return dataclasses.replace(place, path=path, module=type(module).__name__, **more)


def _in_decoder(model: nn.Module, path: str) -> bool:
    """Whether a module lies in the decoder of an encoder-decoder model (UDOP's has all parts)."""
    names = path.split(".")
    above = (model.get_submodule(".".join(names[:i])) for i in range(len(names)))
    configs = [getattr(module, "config", None) for module in above]
    marks = ("is_encoder_decoder", "is_decoder")
    return any(all(getattr(c, mark, None) is True for mark in marks) for c in configs)


def _layer(details: Any) -> Any:
    """What has the weights."""
    if isinstance(details, _Tower):
        return _layer(details.inner)
    if isinstance(details, _Unfolding):
        return getattr(details.module, details.linear)
    return details.convolution if isinstance(details, _Embeddings) else details


def _kernel(details: Any) -> Tensor:
    """The weights as those of a convolution."""
    weight: Tensor = _layer(details).weight
    if isinstance(details, _Unfolding):
        weight = weight.unflatten(1, (-1, *_patch(details)))
    return weight


def _measurable(weight: Tensor) -> Tensor:
    """The matrix that patches are multiplied with; empty where there are no numbers to time."""
    if not weight.is_cpu:
        return weight.new_empty(0, 0)
    return weight.detach().flatten(1).to(computes_in(weight))


def _is_patchify(module: Any) -> bool:
    """Whether a module is a convolution that reads every pixel once, all channels together."""
    return (
        isinstance(module, _CONVOLUTIONS)
        and module.stride == module.kernel_size
        and math.prod(module.kernel_size) > 1
        and (module.padding == "valid" or not any(module.padding))
        and not any(side != 1 for side in module.dilation)
        and module.groups == 1
    )


def _unfolding(module: nn.Module) -> _Unfolding | None:
    """What a module of exactly an `nn.Unfold` and an `nn.Linear` is."""
    children = dict(module.named_children())
    unfolds = [name for name, m in children.items() if isinstance(m, nn.Unfold)]
    linears = [name for name, m in children.items() if isinstance(m, nn.Linear)]
    own = any(True for _ in module.parameters(recurse=False)) or any(module._buffers)
    if own or len(children) != 2 or len(unfolds) != 1 or len(linears) != 1:
        return None
    unfold, linear = module.get_submodule(unfolds[0]), module.get_submodule(linears[0])
    sides = {name: _pair(getattr(unfold, name)) for name in ("kernel_size", "stride", "padding")}
    fits = (
        sides["kernel_size"] == sides["stride"]
        and sides["padding"] == (0, 0)
        and _pair(unfold.dilation) == (1, 1)
        and linear.in_features % math.prod(sides["kernel_size"]) == 0  # type: ignore[operator]
    )
    return _Unfolding(module, unfolds[0], linears[0]) if fits else None


def _pair(side: Any) -> tuple[int, ...]:
    return (side, side) if isinstance(side, int) else tuple(side)


def _refusal(details: Any) -> str | None:
    """Why what looks right is not replaced."""
    layer = _layer(details)
    if isinstance(details, _Unfolding):
        reason = changed(details.module)
        unfold = getattr(details.module, details.unfold)
        if type(unfold) is not nn.Unfold or plain.watched(unfold):
            reason = reason or "its Unfold is a subclass, or has hooks; remove them, then patch"
        if original_class(layer) is not nn.Linear:
            reason = reason or plain.refusal(layer, nn.Linear)
    else:
        reason = plain.refusal(layer, next(c for c in _CONVOLUTIONS if isinstance(layer, c)))
    if reason is not None:
        return reason
    for tensor in plain.tensors(layer):
        if tensor.dtype not in plain.DTYPES or tensor.layout is not torch.strided:
            return f"no kernel for weights of {tensor.dtype}, {tensor.layout}"
    return dispatch.refuses("patch_embed", layer.weight.device)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details = place.details
    if isinstance(details, _Tower):
        width = len(_layer(details).weight)
        inner = adapt(dataclasses.replace(place, details=details.inner))
        return inner | towers.classes(details.module, details.found, width)
    if isinstance(details, _Unfolding):
        return {details.module: _unfolding_class(details)}
    convolution = _layer(details)
    classes = {convolution: _convolution_class(type(convolution))}
    if isinstance(details, _Embeddings):
        classes[details.module] = embeddings.patched_class(details.module, details.layout)
    return classes


def _convolution_class(original: Any, raw: PixelMap | None = None) -> type[nn.Module]:
    def make_forward(_: str) -> Callable[..., Tensor]:
        def forward(self: Any, input: Tensor) -> Tensor:
            result: Tensor
            if raw is not None:
                require_normalised(input)
            if pending.begins(self) and _may_wait(input, self.weight, self.bias, raw):
                return pending.tokens(
                    input, self.weight, self.bias, lambda: forward(self, input),
                    pixel_map=_map_of(input, raw),
                )  # fmt: skip
            tokens = _embedded(input, self.weight, self.bias, raw)
            if tokens is None:
                result = original.forward(self, normalised(raw, input, self.weight))
                return result
            grid = [n // p for n, p in zip(input.shape[2:], self.weight.shape[2:], strict=True)]
            result = tokens.transpose(1, 2).unflatten(2, grid)
            return result

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    raw_too = Raw(
        lambda _, pixels: _convolution_class(original, pixels),
        "",
        lambda module: int(module.in_channels),
    )
    more = attributes(raw, raw_too)
    return subclass(original, ("patch_embed", raw), make_forward, **more)


def _unfolding_class(found: _Unfolding, raw: PixelMap | None = None) -> type[nn.Module]:
    original: Any = original_class(found.module) or type(found.module)
    names = found.unfold, found.linear  # found has the module, which a class should not keep

    def make_forward(_: str) -> Callable[..., Tensor]:
        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            unfold, linear = (getattr(self, name) for name in names)
            if raw is not None:
                require_normalised(hidden_states)
            if plain.bypassable(unfold, nn.Unfold) and plain.bypassable(linear, nn.Linear):
                weight = linear.weight.unflatten(1, (-1, *_pair(unfold.kernel_size)))
                if pending.begins(self) and _may_wait(hidden_states, weight, linear.bias, raw):
                    return pending.tokens(
                        hidden_states, weight, linear.bias, lambda: forward(self, hidden_states),
                        as_grid=False, pixel_map=_map_of(hidden_states, raw),
                    )  # fmt: skip
                tokens = _embedded(hidden_states, weight, linear.bias, raw)
                if tokens is not None:
                    return tokens
            pixels = normalised(raw, hidden_states, linear.weight)
            result: Tensor = original.forward(self, pixels)
            return result

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    def channels(module: Any) -> int:
        unfold, linear = (getattr(module, name) for name in names)
        return int(linear.in_features // math.prod(_pair(unfold.kernel_size)))

    raw_too = Raw(
        lambda module, pixels: _unfolding_class(_Unfolding(module, *names), pixels),
        names[1],
        channels,
    )
    more = attributes(raw, raw_too)
    key = ("patch_embed", *names, original.forward, raw)
    return subclass(original, key, make_forward, absorbs=names[1:], **more)


def _embedded(
    x: Tensor, weight: Tensor, bias: Tensor | None, raw: PixelMap | None
) -> Tensor | None:
    """Tokens ``[B, N, D]``, or None where the model's own code has to run.

    That raises where the convolution raises, and knows what the op does not: tracing, functorch,
    subclasses of tensors, other dtypes and devices.
    """
    pixel_map = _map_of(x, raw)
    named = {"x": x if pixel_map is None else None, "weight": weight, "bias": bias}
    floats = {name: t for name, t in named.items() if t is not None}
    if not plain.runs("patch_embed", list(floats.values()), x):
        return None
    if torch.is_autocast_enabled(x.device.type):  # as convolutions and products do
        dtype = torch.get_autocast_dtype(x.device.type)
        floats = {name: t.to(dtype) for name, t in floats.items()}
        x, weight, bias = floats.get("x", x), floats["weight"], floats.get("bias")
    if not _fits(x, list(floats.values())):
        return None
    sides, patch = x.shape[2:], weight.shape[2:]
    if sides == patch and x.is_contiguous():  # Qwen's: a patch each, as they are multiplied
        x = x.flatten(1)
        return patch_embed(x, weight, bias, pixel_map=pixel_map)[:, None]
    return patch_embed(x, weight, bias, pixel_map=pixel_map)


def _fits(x: Tensor, floats: list[Tensor]) -> bool:
    """Whether what is multiplied is of one dtype, and pixels make a patch of the weight at least.

    Args:
        x: Pixels.
        floats: The weight and what else is floating.
    """
    weight = next(t for t in floats if t is not x)
    return (
        len({t.dtype for t in floats}) == 1
        and x.dim() == weight.dim()
        and x.shape[1] == weight.shape[1]
        and all(n >= p for n, p in zip(x.shape[2:], weight.shape[2:], strict=True))
    )


def _map_of(x: Tensor, raw: PixelMap | None) -> Tensor | None:
    """What raw pixels become; None for others."""
    return raw.on(x.device) if raw is not None and is_raw(x) else None


def _may_wait(x: Tensor, weight: Tensor, bias: Tensor | None, raw: PixelMap | None) -> bool:
    """Whether patches can be put off until more is known: on the CPU, where that is measured."""
    floats = [weight] if bias is None else [weight, bias]
    if _map_of(x, raw) is None:
        floats.append(x)
    return (
        plain.runs("patch_embed", floats, x)
        and x.is_cpu
        and len(x) > 0
        and not torch.is_autocast_enabled("cpu")
        and all(type(t) in (Tensor, nn.Parameter) for t in (*floats, x))
        and _fits(x, floats)
    )


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the replacement against the model's own code; once per kind, patch and dtype."""
    layer, details = _layer(place.details), place.details
    # What surrounds it has been compared when it was found.
    details = details.inner if isinstance(details, _Tower) else details
    details = layer if isinstance(details, _Embeddings) else details
    patched = adapt(place)[details.module if isinstance(details, _Unfolding) else details]
    key = (
        patched,
        _patch(details),
        layer.weight[0].numel(),
        layer.weight.dtype,
        layer.bias is None,
    )
    if key not in _checked:
        _checked[key] = _difference(details, patched)
    return _checked[key]


def _patch(details: Any) -> tuple[int, ...]:
    """Sides of a patch in pixels."""
    if isinstance(details, _Unfolding):
        return _pair(getattr(details.module, details.unfold).kernel_size)
    sides: tuple[int, ...] = details.kernel_size
    return sides


@torch.no_grad()
def _difference(details: Any, patched: Any) -> str | None:
    """Why the replacement is not what it replaces, on few channels; in float64 it is not asked."""
    layer, patch = _layer(details), _patch(details)
    depth, dtype, bias = layer.weight[0].numel(), layer.weight.dtype, layer.bias is not None
    channels = depth // math.prod(patch)
    if isinstance(details, _Unfolding):
        twin: Any = copy.copy(details.module)
        linear = skip_init(nn.Linear, depth, _CHANNELS, bias)
        twin.__dict__["_modules"] = {**details.module._modules, details.linear: linear}
    else:
        twin = skip_init(type(details), channels, _CHANNELS, patch, patch, bias=bias)
    draw = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw).to(dtype))
    several = tuple(side * (2 + i) + min(i, side - 1) for i, side in enumerate(patch))
    for size in (patch, several):  # patches as such, and images with a remainder
        images = torch.randn(2, channels, *size, generator=draw).to(dtype)
        exact = patched.forward(twin.double(), images.double())
        ours = patched.forward(twin.to(dtype), images)
        if ours.shape != exact.shape or ours.dtype != dtype:
            return (
                f"the numeric check failed: expected {list(exact.shape)} of {dtype}, got "
                f"{list(ours.shape)} of {ours.dtype}"
            )
        rounding = exact.abs() * (torch.finfo(dtype).eps / 2)
        error = float(((ours.double() - exact).abs() - rounding).max() / depth**0.5)
        if not error <= _TOLERANCE:
            return (
                f"the numeric check failed: patches of {depth} pixels in {dtype} are off by "
                f"{error:.3g} of their standard deviation"
            )
    return None


SITE = Site("patch_embed", find, adapt, check)
