"""Pixels that a processor has not normalised, on their way through a model.

A processor that hands over uint8 (`vlmops.hf.processor`) leaves rescaling and normalising to the
model: to `vlmops.patch_embed` where uint8 gets there as it is, else to the method that the pixels
enter by, before the model casts or reads them. Which of the two it is, is found by running each
method up to the patch embedding, with raw pixels and with normalised ones: what arrives there has
to be the same.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmops.hf import plain
from vlmops.hf.rebind import derived, is_ours, was_patched

_LIMIT = 16.0
"""Above all normalised pixels, and below the brightest raw one of any picture that is not black."""
_RAW, _PIXELS = "_vlmops_raw", "_vlmops_pixels"


class PixelMap:
    """What uint8 pixels become: the numbers that a processor computes. Equal if these are."""

    def __init__(self, name: str, table: Tensor, channels: str) -> None:
        """What a processor returns by a name.

        Args:
            name: Key of the pixels among what the processor returns.
            table: ``[C, 256]``, float32.
            channels: Where they are: "images" ``[.., C, H, W]``, or patches ``[.., K]`` with the
                channels as the "outer" or as the "inner" part of K.
        """
        self.name, self.table, self.channels = name, table.contiguous(), channels
        self._key = (name, channels, self.table.numpy().tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PixelMap) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def on(self, device: torch.device) -> Tensor:
        """The table; copied to another device once."""
        table = self.table
        if table.device != device:
            table = table.to(device)
            if device.type != "meta" and not torch.compiler.is_compiling():
                self.table = table
        return table

    def normalised(self, raw: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
        """What the processor would have returned, cast to a dtype.

        ``dim`` is where the channels are now; None: where the processor has put them.
        """
        count, flat = len(self.table), dim is None and self.channels != "images"
        if flat:
            raw = raw.unflatten(-1, (count, -1) if self.channels == "outer" else (-1, count))
        if dim is None:
            dim = {"images": -3, "outer": -2, "inner": -1}[self.channels]
        parts = zip(self.on(raw.device).to(dtype), raw.unbind(dim), strict=True)
        found = torch.stack([row[part.int()] for row, part in parts], dim)
        return found.flatten(-2) if flat else found

    def accepted(self, value: Any, dtype: torch.dtype) -> Any:
        """The argument of a method, normalised where it is raw."""
        if isinstance(value, list | tuple):
            return type(value)(self.accepted(v, dtype) for v in value)
        return self.normalised(value, dtype) if is_raw(value) else value


def is_raw(value: Any) -> bool:
    """Whether this is what a processor hands over."""
    return isinstance(value, Tensor) and value.dtype == torch.uint8


def normalised(pixels: PixelMap | None, value: Any, weight: Tensor) -> Any:
    """What a patch embedding's own code takes, in place of what it is called with."""
    if pixels is None or not is_raw(value):
        return value
    return pixels.normalised(value, weight.dtype, _dim(weight))


def _dim(weight: Tensor) -> int:
    """Where the channels are of what a patch embedding takes: ``[.., C, (T,) H, W]``."""
    return -4 if weight.dim() == 5 else -3


def require_normalised(pixels: Any) -> None:
    """Stops raw pixels that were cast on their way; they would be taken for normalised ones.

    Raises:
        RuntimeError: they are; on a GPU asynchronously.
    """
    if isinstance(pixels, Tensor) and pixels.is_floating_point() and pixels.numel():
        torch._assert_async(
            ~(pixels.detach().amax() > _LIMIT),  # NaN passes
            "pixel_values: expected uint8 as the patched processor returns them, or normalised "
            f"pixels; got numbers above {_LIMIT:g}, which raw pixels have that were cast. Leave "
            "them uint8, or call vlmops.unpatch(model)",
        )


class Raw(NamedTuple):
    """What `adapted` has to know of a patched patch embedding; in its class."""

    class_with: Callable[[Any, PixelMap], type[nn.Module]]
    """The class in which a module takes raw pixels besides."""
    layer: str
    """Path to the child that has the weight; empty: the module itself."""
    channels: Callable[[Any], int]
    """Of the images that a module embeds."""


def attributes(pixels: PixelMap | None, raw: Raw) -> dict[str, Any]:
    """Of the class of a patched patch embedding."""
    return {_RAW: raw, _PIXELS: pixels}


def takes_raw(module: nn.Module) -> PixelMap | None:
    """What a module of a patched model does with raw pixels, if it takes them."""
    found: PixelMap | None = getattr(type(module), _PIXELS, None)
    return found


class _ArrivedError(BaseException):
    """Ends a run at a patch embedding; no `Exception`, since models catch these."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A method by which pixels enter a module, on their way to a patch embedding."""

    module: nn.Module
    name: str
    between: tuple[nn.Module, ...]
    sites: tuple[nn.Module, ...]
    layer: str
    """Path from the module to what has the weight."""

    def __str__(self) -> str:
        return f"{type(self.module).__name__}.{self.name}"

    @property
    def weight(self) -> Tensor:
        return _weight(self.module, self.layer)


def _weight(module: nn.Module, layer: str) -> Tensor:
    weight: Tensor = module.get_submodule(layer).weight  # type: ignore[assignment]
    return weight


def adapted(
    model: nn.Module, pixels: PixelMap, sample: Mapping[str, Any]
) -> dict[nn.Module, type[nn.Module]] | str:
    """The classes by which the modules of a model take raw pixels, or why they cannot.

    Args:
        model: Patched with ``patch_embed``.
        pixels: What raw pixels become.
        sample: What the processor returned for an image, pixels raw.
    """
    twins = _twins(model)
    twin = twins[model]
    sites = dict(_embeddings(twin, len(pixels.table)))
    if not sites:
        return "no patch embedding of this model is patched"
    for path, site in sites.items():
        if takes_raw(site) not in (None, pixels):
            return f"{path} takes raw pixels of another processor; call vlmops.unpatch(model) first"
        if _weight(site, _raw(site).layer).is_meta:
            return "its weights are on meta, where pixels cannot be followed"
    entries = list(_entries(twin, pixels.name, sites))
    if not entries:
        return f"no method of this model that leads to a patch embedding takes {pixels.name}"
    for site in sites.values():
        site.__class__ = _raw(site).class_with(site, pixels)
    replaced = {twins[module] for module in model.modules() if "forward" in vars(module)}
    watched = replaced | {twins[module] for module in model.modules() if plain.watched(module)}
    before = {entry.module: type(entry.module) for entry in entries}
    patched = {module for module in before if was_patched(module)}
    methods: dict[nn.Module, dict[str, Any]] = {}
    for entry in entries:
        module, was = entry.module, before[entry.module]
        if getattr(was, _PIXELS, None) or (
            watched.isdisjoint((module, *entry.between)) and _is_intact(entry, pixels, sample)
        ):
            continue
        hidden = entry.name in vars(module) or (entry.name == "forward" and module in replaced)
        if hidden or (module in patched and not is_ours(was)):
            return f"{entry} casts or reads pixels, and was replaced; undo that, then patch"
        made = methods.setdefault(module, {})
        made[entry.name] = _adapter(getattr(was, entry.name), entry, pixels)
        module.__class__ = derived(was, **{_PIXELS: pixels}, **made)
    seen = [_agrees(entry, pixels, sample) for entry in entries]
    if True not in seen:
        return "pixels could not be followed to a patch embedding from any of its methods"
    for entry, agrees in zip(entries, seen, strict=True):
        if agrees is False:
            return f"{entry} does not do with raw pixels what it does with normalised ones"
    takers = {*sites.values(), *before}
    return {module: type(twins[module]) for module in model.modules() if twins[module] in takers}


def _twins(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Modules of the same weights, to run: what models note of a run, and hook up, stays there."""
    twins: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        twins[module] = twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin.__dict__.pop("forward", None)  # a wrapper's, that would run the module itself
        for name, value in module.__dict__.items():
            if isinstance(value, dict):
                twin.__dict__[name] = OrderedDict() if "_hooks" in name else value.copy()
    for module, twin in twins.items():
        children = {n: twins[c] if c is not None else None for n, c in module._modules.items()}
        twin.__dict__["_modules"] = children
    return twins


def _raw(site: nn.Module) -> Raw:
    found: Raw = vars(type(site))[_RAW]
    return found


def _embeddings(model: nn.Module, channels: int) -> Iterator[tuple[str, nn.Module]]:
    """The patched patch embeddings of images, by path; without those inside of another."""
    outer: str | None = None
    for path, module in model.named_modules():
        if outer is not None and path.startswith(f"{outer}."):
            continue
        if _RAW in vars(type(module)) and _raw(module).channels(module) == channels:
            outer = path
            yield path, module


def _entries(model: nn.Module, name: str, sites: Mapping[str, nn.Module]) -> Iterator[_Entry]:
    """Inner modules first, and of one module the methods that others call."""
    for path, module in reversed(list(model.named_modules())):
        start = f"{path}." if path else ""
        led_to = {p: m for p, m in sites.items() if p.startswith(start) and p != path}
        if not led_to:
            continue
        first = next(iter(led_to))
        layer = ".".join(filter(None, (first.removeprefix(start), _raw(led_to[first]).layer)))
        between = [
            m for p, m in module.named_modules()
            if p and any(site.startswith(f"{start}{p}.") for site in led_to)
        ]  # fmt: skip
        getters = sorted(n for n in dir(type(module)) if n.startswith("get_"))
        for method in (*getters, "forward", "generate"):
            if name in _parameters(getattr(type(module), method, None)):
                yield _Entry(module, method, tuple(between), tuple(led_to.values()), layer)


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters) if inspect.isfunction(function) else []


def _adapter(original: Any, entry: _Entry, pixels: PixelMap) -> Any:
    """The method, with raw pixels normalised before it sees them."""
    name, layer = pixels.name, entry.layer
    position = _parameters(original).index(name) - 1  # without self

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = _weight(self, layer).dtype
        if name in kwargs:
            kwargs[name] = pixels.accepted(kwargs[name], dtype)
        elif len(args) > position:
            value = pixels.accepted(args[position], dtype)
            args = (*args[:position], value, *args[position + 1 :])
        return original(self, *args, **kwargs)

    return method


def _is_intact(entry: _Entry, pixels: PixelMap, sample: Mapping[str, Any]) -> bool:
    """Whether raw pixels may enter by a method: they arrive untouched, and nobody else is there."""
    known = {entry.module, *entry.between, *(m for site in entry.sites for m in site.modules())}
    for module in entry.module.modules():
        if module not in known and pixels.name in _parameters(type(module).forward):
            return False  # it may get them as well
    called = [getattr(type(entry.module), entry.name)]
    called += [type(module).forward for module in entry.between]
    if any(_asks_dtype(function, pixels.name) for function in called):
        return False
    return _agrees(entry, pixels, sample) is True


def _asks_dtype(function: Any, name: str) -> bool:
    """Whether a method reads the dtype of pixels, and may go on with it elsewhere."""
    function = inspect.unwrap(function)
    arguments, last = {name, *_parameters(function)[1:2]}, None
    for step in dis.get_instructions(function):
        if step.opname.startswith("LOAD_ATTR") and step.argval == "dtype" and last in arguments:
            return True
        loads = step.opname.startswith("LOAD_FAST")
        last = (
            (step.argval[-1] if isinstance(step.argval, tuple) else step.argval) if loads else None
        )
    return False


@torch.no_grad()
def _agrees(entry: _Entry, pixels: PixelMap, sample: Mapping[str, Any]) -> bool | None:
    """Whether raw pixels arrive as what normalised ones arrive as; None: they do not arrive."""
    weight, given = entry.weight, sample[pixels.name].to(entry.weight.device)
    shapes = [given.shape]
    if pixels.channels == "images" and given.dim() > 4:
        shapes.append(given.flatten(0, -4).shape)  # of a tower's own argument
    for shape in shapes:
        expected = _arrival(
            entry, pixels, sample, pixels.normalised(given.view(shape), weight.dtype)
        )
        if expected is not None and expected.dim() == max(4, weight.dim()):
            break
    else:
        return None
    for raw in (given.view(shape), given.new_zeros(shape), given.new_full(shape, 255)):
        expected = _arrival(entry, pixels, sample, pixels.normalised(raw, weight.dtype))
        found = _arrival(entry, pixels, sample, raw)
        if expected is None or found is None or found.shape != expected.shape:
            return False
        if is_raw(found):
            found = pixels.normalised(found, weight.dtype, _dim(weight))
        if not torch.equal(found.to(weight.dtype), expected.to(weight.dtype)):
            return False
    return True


def _arrival(
    entry: _Entry, pixels: PixelMap, sample: Mapping[str, Any], values: Tensor
) -> Tensor | None:
    """What a patch embedding is called with, if a method gets there."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _ArrivedError(args[0] if args else next(iter(kwargs.values())))

    method = getattr(entry.module, entry.name)
    more = {**sample, pixels.name: values, "input_ids": torch.zeros(1, 2, dtype=torch.long)}
    names = _parameters(getattr(type(entry.module), entry.name))
    more = {
        name: value.to(values.device) if isinstance(value, Tensor) else value
        for name, value in more.items() if name in names
    }  # fmt: skip
    hooks = [site.register_forward_pre_hook(stop, with_kwargs=True) for site in entry.sites]
    try:
        method(**more)
    except _ArrivedError as arrived:
        return arrived.pixels if isinstance(arrived.pixels, Tensor) else None
    except Exception:  # foreign code, called with less than it may want
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return None
