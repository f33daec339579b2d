"""What `vlmops demo` measures: generations, the time of their stages, how two of them agree."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vlmops
from vlmops.bench.timer import longest_wait, waits
from vlmops.demo.inputs import DemoError, Subject, first_line

_SECONDS_OF_TIMING = 16.0
_TOWERS = {"visual", "vision_tower", "vision_model", "image_tower"}
Span = tuple[float, float]  # seconds, and seconds of them inside rotary code


@dataclasses.dataclass
class Generation:
    """What one call of `generate` gave, and when.

    Attributes:
        tokens: New token ids.
        logits: float32 ``[steps, vocabulary]``.
        seconds: The whole call.
        first: Until the first token's logits were there.
        tower: The vision tower; zeros if the model has none that is known.
        prefill: The first forward call, without the tower.
        steps: Number of decode steps after the first token.
    """

    tokens: list[int]
    logits: Tensor
    seconds: float
    first: float
    tower: Span
    prefill: Span
    steps: int

    def stages(self) -> dict[str, float]:
        """Seconds by stage, in order."""
        stages = {"vision tower": self.tower[0]} if self.tower[0] else {}
        stages["text prefill"] = self.prefill[0]
        stages["first token, in all"] = self.first
        if self.steps:
            stages["decode, per token"] = (self.seconds - self.first) / self.steps
        stages["whole generation"] = self.seconds
        return stages


class _RopeClock:
    """Time inside rotary code, as the interpreter tells of calls and returns (`sys.setprofile`)."""

    def __init__(self, model: nn.Module) -> None:
        rotary = {type(m) for m in model.modules() if "rotary" in type(m).__name__.lower()}
        self._codes = {inspect.unwrap(cls.forward).__code__ for cls in rotary}
        self._outermost: FrameType | None = None
        self._start = 0.0
        self.seconds = 0.0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self._outermost is None:
            if event == "call" and self._is_rope(frame):
                self._outermost, self._start = frame, time.perf_counter()
        elif event == "return" and frame is self._outermost:
            self._outermost = None
            self.seconds += time.perf_counter() - self._start

    def _is_rope(self, frame: FrameType) -> bool:
        code = frame.f_code
        return (
            code in self._codes
            or (code.co_name.startswith("apply_") and "rotary" in code.co_name)
            or frame.f_globals.get("__name__") in ("vlmops.ops.mrope", "vlmops.hf.carry")
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        previous = sys.getprofile()
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(previous)


class _Stopwatch:
    """Times of the forward calls of a model and of its vision tower, from hooks.

    Some versions of transformers call the tower before the first forward call, others inside it.
    """

    def __init__(self, model: nn.Module, clock: _RopeClock | None) -> None:
        self._model, self._clock = model, clock
        towers = (m for name, m in model.named_modules() if name.rsplit(".")[-1] in _TOWERS)
        self._tower = next(towers, None)
        self.tower: Span = (0.0, 0.0)
        self.prefill: Span | None = None
        self.ends: list[float] = []

    def _now(self) -> Span:
        return time.perf_counter(), self._clock.seconds if self._clock else 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        handles: list[Any] = []

        def watch(module: nn.Module, leave: Callable[[Span], None]) -> None:
            begun: list[Span] = []
            handles.append(module.register_forward_pre_hook(lambda *_: begun.append(self._now())))
            handles.append(
                module.register_forward_hook(lambda *_: leave(_minus(self._now(), begun.pop())))
            )

        inside: list[Span] = []  # of the tower, since the model's last forward call ended

        def leave_tower(span: Span) -> None:
            self.tower = (self.tower[0] + span[0], self.tower[1] + span[1])
            inside.append(span)

        def enter_model(*_: Any) -> None:
            inside.clear()

        def leave_model(span: Span) -> None:
            self.ends.append(time.perf_counter())
            if self.prefill is None:
                for part in inside:
                    span = _minus(span, part)
                self.prefill = span

        handles.append(self._model.register_forward_pre_hook(enter_model))
        watch(self._model, leave_model)
        if self._tower is not None:
            watch(self._tower, leave_tower)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _minus(a: Span, b: Span) -> Span:
    return a[0] - b[0], a[1] - b[1]


def generate(subject: Subject, new_tokens: int, rope: bool = False) -> Generation:
    """Greedy generation from a fresh state; with `rope`, under the clock for rotary code."""
    model, inputs = subject.model, subject.inputs
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
    clock = _RopeClock(model) if rope else None
    watch = _Stopwatch(model, clock)
    with watch.running(), clock.running() if clock else contextlib.nullcontext():
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
    assert watch.prefill is not None
    return Generation(
        tokens=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        logits=torch.cat(output.logits).float(),
        seconds=seconds,
        first=watch.ends[0] - start,
        tower=watch.tower,
        prefill=watch.prefill,
        steps=len(watch.ends) - 1,
    )


@dataclasses.dataclass
class Agreement:
    """How two generations compare; steps count while both have seen the same tokens.

    Attributes:
        first_difference: Step of the first token that differs, else None.
        margin: By how much the two tokens' logits differ there, before patching.
        steps: Steps compared.
        argmax: Steps of these in which the largest logit belongs to the same id.
        prefill: Largest absolute difference of the first step's logits.
        worst: The same over all steps compared.
        largest: Largest absolute logit before patching.
        tolerance: For `prefill` and `worst`.
    """

    tokens: int
    equal_tokens: int
    first_difference: int | None
    margin: float | None
    steps: int
    argmax: int
    prefill: float
    worst: float
    largest: float
    tolerance: float

    @property
    def agree(self) -> bool:
        """Within the tolerance, and tokens differ at most where two logits tie within it.

        Two logits that both moved by the tolerance can change places across twice of it.
        """
        tie = self.margin is None or self.margin <= 2 * self.tolerance
        return self.worst <= self.tolerance and tie


def compare(before: Generation, after: Generation, tolerance: float) -> Agreement:
    """Tokens and logits of two generations from one prompt."""
    pairs = list(zip(before.tokens, after.tokens, strict=False))
    equal = [a == b for a, b in pairs]
    difference = equal.index(False) if False in equal else None
    steps = len(pairs) if difference is None else difference + 1
    old, new = before.logits[:steps], after.logits[:steps]
    # A NaN or an infinity on either side is a difference like any other, never an agreement.
    gaps = (old - new).abs().nan_to_num(nan=math.inf).amax(1)
    margin = None
    if difference is not None:
        a, b = pairs[difference]
        margin = float(old[difference, a] - old[difference, b])
    return Agreement(
        tokens=len(before.tokens),
        equal_tokens=sum(equal),
        first_difference=difference,
        margin=margin,
        steps=steps,
        argmax=int((old.argmax(1) == new.argmax(1)).sum()),
        prefill=float(gaps[0]),
        worst=float(gaps.max()),
        largest=float(old.abs().max()),
        tolerance=tolerance,
    )


class _ExactConvolutions(TorchFunctionMode):
    """Convolutions in float64, rounded once: what the patches of an image are multiplied by."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.conv2d, torch.conv3d):
            return func(*args, **kwargs or {})
        x, weight, bias, *rest = args
        wide = None if bias is None else bias.double()
        return func(x.double(), weight.double(), wide, *rest, **kwargs or {}).to(x.dtype)


def tolerance(subject: Subject, before: Generation) -> float:
    """Three times what roundings of Hugging Face's own make of the prefill's logits.

    That is, its eager against its SDPA attention, and its convolutions against the same in float64.
    All are right, and differ only in how they round, as does a rope that rounds once where Hugging
    Face rounds four times, and a product that adds in another order. The difference carries what
    the model's depth, width and weights make of a rounding. 3 because later steps may fare worse
    than the one measured.

    Raises:
        DemoError: the two cannot be compared, or differ so much that agreement would mean nothing.
    """
    model = subject.model
    saved = _attention_of(model.config)
    other = "sdpa" if saved[""] == "eager" else "eager"
    try:
        model.set_attn_implementation(other)
        with _ExactConvolutions():
            logits = generate(subject, 1).logits
    except (ValueError, ImportError) as error:
        raise DemoError(
            f"this model does not run with {other!r} attention, which sizes the tolerance "
            f"({first_line(error)})"
        ) from error
    finally:
        model.set_attn_implementation(saved)
    largest = float(before.logits.abs().max())
    rounding = torch.finfo(next(model.parameters()).dtype).eps * largest
    found = max(3 * float((logits[0] - before.logits[0]).abs().max()), rounding)
    if not found < largest / 4:
        raise DemoError(
            "Hugging Face's own eager and SDPA attention, with its convolutions as they are and in "
            f"float64, differ by {found / 3:.2g} in logits up to {largest:.2g}: agreement would "
            "mean nothing; try --dtype float32"
        )
    return found


def _attention_of(config: Any) -> dict[str, str]:
    """The attention implementation of a config and its sub-configs, as one sets them."""
    subs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    chosen = {name: sub._attn_implementation for name, sub in subs.items() if sub is not None}
    return {"": config._attn_implementation, **chosen}


def time_stages(
    subject: Subject,
    new_tokens: int,
    repeats: int | None,
    like: Generation,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Medians of interleaved runs, before and after patching.

    Args:
        subject: Unpatched, and so it is left.
        new_tokens: To generate in each run.
        repeats: Rounds; None for as many as fit, from 1 to 5.
        like: A generation, by which to tell how many fit.
        progress: Called with a line before each round.
    """
    if repeats is None:
        repeats = max(1, min(5, int(_SECONDS_OF_TIMING / (2 * (like.seconds + like.first)))))
    stages: dict[str, dict[str, list[float]]] = {}
    rope: dict[str, dict[str, list[float]]] = {}

    def run(when: str) -> None:
        timed = generate(subject, new_tokens)
        clocked = generate(subject, 1, rope=True)
        in_rope = {
            "rope in the tower": clocked.tower[1],
            "rope in the text prefill": clocked.prefill[1],
        }
        for target, values in ((stages, timed.stages()), (rope, in_rope)):
            for name, value in values.items():
                if value > 0:
                    target.setdefault(name, {"before": [], "after": []})[when].append(value)

    waited, start = waits(), time.perf_counter()
    for number in range(1, repeats + 1):
        progress(f"timing, round {number} of {repeats}")
        run("before")
        with vlmops.patched(subject.model):
            run("after")
    elapsed = time.perf_counter() - start
    return {
        "repeats": repeats,
        "stages": _medians(stages),
        "rope": _medians(rope),
        "waiting": longest_wait(waited, waits()) / elapsed,
    }


def _medians(samples: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    medians = {}
    for name, sides in samples.items():
        middle = {side: statistics.median(values) for side, values in sides.items()}
        spreads = [(max(v) - min(v)) / max(middle[side], 1e-9) for side, v in sides.items()]
        medians[name] = {**middle, "spread": max(spreads)}
    return medians
