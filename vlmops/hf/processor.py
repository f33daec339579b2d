"""Processors that hand over uint8 pixels and leave the arithmetic to the model.

An image processor does all that it did before, but rescale and normalise. What it does afterwards
(tiles, patches, batches) moves pixels; where it does more, pads with zeros say, pixels have to be
normalised first. So a value v is marked in place of being normalised: after each step that it
should have gone through it is 1000 more, as int16. What comes out of the processor, whatever it did
there, holds nothing but pixels marked by all steps, or the call is made again without any of this.
That is decided in each call, and nothing is remembered.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmops.hf.pixels import PixelMap
from vlmops.hf.rebind import derived, original_class

_STEPS = ("rescale", "normalize", "rescale_and_normalize")
_MARK = 1000
_EXACT = ("int16", "int32", "int64", "float32", "float64")
"""Dtypes that marked pixels survive in."""
_CHANNELS = ("images", "outer", "inner")
_SIZES = ((80, 112), (112, 64))  # height and width of the pictures that processors are tried with

Step = tuple[Any, ...]
"""Name and arguments of a step, comparable."""

_handovers: weakref.WeakSet[Handover] = weakref.WeakSet()
_tapped_classes: dict[type, type] = {}


class _DifferentError(Exception):
    """A call that does something else than was tried."""


class Handover:
    """What processors hand over, and the modules that take it."""

    def __init__(self, learned: Learned, classes: Mapping[nn.Module, type[nn.Module]]):
        self._pixels, self._steps, self._kind = learned.pixels, learned.steps, learned.kind
        self._modules = [(weakref.ref(m), new) for m, new in classes.items()]
        self._processors: weakref.WeakSet[Any] = weakref.WeakSet()

    def stands(self) -> bool:
        """Whether the model takes raw pixels still; asked in each call."""
        return all(type(module()) is expected for module, expected in self._modules)

    def is_to(self, model: nn.Module) -> bool:
        """Whether this model takes them."""
        modules = set(model.modules())
        return any(module() in modules for module, _ in self._modules)

    def begin(self, processor: Any) -> None:
        """From now on a processor hands over."""
        original = type(processor)

        @functools.wraps(original.__call__)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = of(self).call(self, original, args, kwargs) if of(self).stands() else None
            return original.__call__(self, *args, **kwargs) if found is None else found

        processor.__class__ = derived(original, __call__=call, _vlmops_handover=self)
        self._processors.add(processor)
        _handovers.add(self)

    def end(self) -> None:
        """Processors do again what they did before."""
        for processor in self._processors:
            if of(processor) is self:
                processor.__class__ = original_class(processor)
        _handovers.discard(self)

    def call(self, processor: Any, original: Any, args: Any, kwargs: Any) -> Any:
        """What a call returns, its pixels raw; None where they have to be normalised."""
        inner = _inner(processor)
        if _kind(inner) is not self._kind:
            return None
        tap = _Marking(inner, self._steps)
        shadow = tapped = _tapped(inner, tap)
        if inner is not processor:
            shadow = _shadow(processor, original, image_processor=tapped)
        try:
            found = original.__call__(shadow, *args, **kwargs)
            if tap.marked:
                self._unmark(found)
        except Exception:  # what is wrong with the call itself, the processor's own will say
            return None
        return found

    def _unmark(self, found: Any) -> None:
        for key, value in list(found.items()):
            if key != self._pixels.name:
                if _is_marked(value):
                    raise _DifferentError
                continue
            raw = _unmarked(value, len(self._steps))
            if raw is None:
                raise _DifferentError
            found[key] = raw


def of(processor: Any) -> Any:
    """The handover of a processor, or None."""
    return getattr(type(processor), "_vlmops_handover", None)


def settle() -> None:
    """Ends what hands over to a model that no longer takes it."""
    for handover in list(_handovers):
        if not handover.stands():
            handover.end()


def _inner(processor: Any) -> Any:
    """The image processor of a processor."""
    return getattr(processor, "image_processor", processor)


def require_processor(processor: Any) -> None:
    """Raises TypeError unless a processor has to do with images."""
    if not callable(processor) or not hasattr(type(_inner(processor)), "preprocess"):
        raise TypeError(
            "processor: expected a Hugging Face processor or image processor, got "
            f"{type(processor).__name__}"
        )


def _kind(processor: Any) -> type:
    found: type = original_class(processor) or type(processor)
    return found


class _Recording:
    """Runs steps, and notes them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.calls: dict[Step, tuple[str, Any, Any, Any]] = {}

    def __call__(self, name: str, image: Any, args: Any, kwargs: Any) -> Any:
        self.calls.setdefault(
            _step(self.processor, name, image, args, kwargs), (name, image, args, kwargs)
        )
        return getattr(self.processor, name)(image, *args, **kwargs)


class _Marking:
    """Marks pixels in place of running steps."""

    def __init__(self, processor: Any, steps: tuple[Step, ...]) -> None:
        self.processor, self.steps, self.marked = processor, steps, False

    def __call__(self, name: str, image: Any, args: Any, kwargs: Any) -> Any:
        step = _step(self.processor, name, image, args, kwargs)
        if step not in self.steps or (isinstance(image, Tensor) and not image.is_cpu):
            raise _DifferentError
        done = self.steps.index(step)
        if _dtype(image) != ("int16" if done else "uint8"):
            raise _DifferentError
        self.marked = True
        if not done:
            image = image.to(torch.int16) if isinstance(image, Tensor) else image.astype(np.int16)
        return image + _MARK


def _step(processor: Any, name: str, image: Any, args: Any, kwargs: Any) -> Step:
    bound = inspect.signature(getattr(processor, name)).bind(image, *args, **kwargs)
    bound.apply_defaults()
    return name, *((key, _comparable(v)) for key, v in list(bound.arguments.items())[1:])


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    return value if isinstance(value, int | float | str | None) else repr(value)


def _shadow(instance: Any, kind: Any, **attributes: Any) -> Any:
    """A shallow copy of another class."""
    made = object.__new__(kind)
    made.__dict__.update(instance.__dict__, **attributes)
    return made


def _tapped(processor: Any, tap: Callable[..., Any]) -> Any:
    """A copy of an image processor whose steps are given to another function."""
    original = _kind(processor)
    kind = _tapped_classes.get(original)
    if kind is None:
        steps = {name: _tap(name) for name in _STEPS if hasattr(original, name)}
        kind = _tapped_classes[original] = derived(original, **steps)
    return _shadow(processor, kind, _vlmops_tap=tap)


def _tap(name: str) -> Callable[..., Any]:
    def step(self: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
        return self._vlmops_tap(name, image, args, kwargs)

    return step


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _arrays(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _arrays(part)
    elif isinstance(value, Tensor | np.ndarray):
        yield value


def _is_marked(value: Any) -> bool:
    """Whether marked pixels are in what a processor returns; ids are int64."""
    return any(
        _dtype(array) != "int64" and bool((array >= _MARK).any())
        for array in _arrays(value) if _dtype(array) in _EXACT
    )  # fmt: skip


def _unmarked(value: Any, steps: int) -> Any:
    """Raw pixels of marked ones; None if that is not all there is."""
    if isinstance(value, list | tuple):
        parts = [_unmarked(part, steps) for part in value]
        return None if any(part is None for part in parts) else type(value)(parts)
    if not isinstance(value, Tensor | np.ndarray) or _dtype(value) not in _EXACT:
        return None
    found = value - steps * _MARK
    raw = found.to(torch.uint8) if isinstance(found, Tensor) else found.astype(np.uint8)
    same: Any = raw == found
    return raw if same.all() else None


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a processor does with pixels."""

    pixels: PixelMap
    steps: tuple[Step, ...]
    sample: dict[str, Any]
    """What it returned for an image, pixels raw."""
    kind: type
    """Of the image processor."""
    note: str = ""
    """When it does not hand over."""


def learn(processor: Any) -> Learned | str:
    """Tries a processor on images of noise; why it cannot hand over, if it cannot."""
    inner = _inner(processor)
    draw = np.random.default_rng(0)
    noise = [draw.integers(256, size=(*size, 3), dtype=np.uint8) for size in _SIZES]
    recording = _Recording(inner)
    try:
        expected = dict(_tapped(inner, recording)(images=noise[:1], return_tensors="pt"))
    except Exception as error:  # foreign code, asked with what it may not have been written for
        return f"it could not be tried on an image: {error!r}"
    steps = tuple(recording.calls)
    if not steps or len({name for name, *_ in steps}) != len(steps):
        return "it does not rescale and normalise in one way"
    table = _table(recording)
    if isinstance(table, str):
        return table
    try:
        found = dict(_tapped(inner, _Marking(inner, steps))(images=noise[:1], return_tensors="pt"))
    except Exception as error:  # what is done to marked pixels raises what it likes
        return f"it does more with normalised pixels than to move them: {error!r}"
    marked = [key for key, value in found.items() if _is_marked(value)]
    if len(marked) != 1:
        return f"its pixels are in {', '.join(marked) or 'nothing that it returns'}"
    (name,) = marked
    raw = _unmarked(found[name], len(steps))
    if not isinstance(raw, Tensor):
        return f"{name} is more than pixels that were moved: it pads them once they are normalised"
    for channels in _CHANNELS:
        pixels = PixelMap(name, table, channels)
        if _same(pixels, raw, expected[name]):
            sample = {**expected, name: raw}
            return Learned(pixels, steps, sample, _kind(inner), _note(inner, steps, noise, name))
    return f"{name} are not what its steps make of pixels"


def _table(recording: _Recording) -> Tensor | str:
    """What the steps make of each value of each channel, ``[3, 256]``."""
    image = next(iter(recording.calls.values()))[1]
    if _dtype(image) != "uint8" or image.ndim < 3 or image.shape[-3] != 3:
        return "it does not rescale images [.., 3, H, W] of uint8"
    values: Any = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = np.broadcast_to(values, (*(1,) * (image.ndim - 3), 3, 16, 16)).copy()
    if isinstance(image, Tensor):
        values = torch.from_numpy(values)
    for name, _, args, kwargs in recording.calls.values():
        values = getattr(recording.processor, name)(values, *args, **kwargs)
    table = torch.as_tensor(values)
    if table.dtype != torch.float32:
        return f"it returns {_dtype(table)}, not float32"
    return table.reshape(3, 256)


def _same(pixels: PixelMap, raw: Tensor, expected: Tensor) -> bool:
    """To the bit."""
    count = len(pixels.table)
    if pixels.channels == "images":
        fits = raw.dim() > 3 and raw.shape[-3] == count
    else:
        fits = raw.shape[-1] % count == 0
    return fits and torch.equal(pixels.normalised(raw, torch.float32), expected)


def _note(inner: Any, steps: tuple[Step, ...], noise: list[Any], name: str) -> str:
    """What images of several sizes come as."""
    try:
        found = _tapped(inner, _Marking(inner, steps))(images=noise, return_tensors="pt")
    except Exception:  # in this call it does not hand over, or nothing comes of it at all
        return ""
    several = _unmarked(found[name], len(steps))
    return "" if several is not None else "float32 where it pads images of several sizes"
