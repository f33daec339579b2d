"""Measures the variants of an op in this process: ours, eager, torch.compile, and the floors.

``python -m vlmops.bench.measure REQUEST OUTPUT`` is what the runner starts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmops
from vlmops import _cpus, ops
from vlmops.bench import BenchError, report, shapes
from vlmops.bench.gate import Gate
from vlmops.bench.timer import Timing, interleave
from vlmops.ops.spec import Arguments, BenchCase, Spec

COMPILED = "torch.compile"
TOO_FEW = "the machine was busy: too few undisturbed samples"

Call = Callable[[], Any]
Key = tuple[str, str]
"""Direction (floor, forward, backward) and variant."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure. Names are those of `Spec.bench` and of torch's dtypes."""

    op: str
    cases: Sequence[str]
    dtypes: Sequence[str]
    isa: str | None = None
    compile: bool = True
    quick: bool = False
    models: Sequence[str] = ()
    """Names of `shapes.MODELS`, whose cases are named ``MODEL/CASE``."""
    sizes: Sequence[int] = ()
    """Tokens and patches of their cases; typical ones if there are none."""


@dataclasses.dataclass
class Variants:
    """Ways to compute one case, all of which passed the gate."""

    calls: dict[Key, Call] = dataclasses.field(default_factory=dict)
    unavailable: dict[Key, str] = dataclasses.field(default_factory=dict)
    restore: Callable[[], None] = lambda: None
    """Gives in-place variants fresh inputs: theirs would decay or grow from call to call."""


def known_cases(spec: Spec, models: Sequence[str], sizes: Sequence[int]) -> dict[str, BenchCase]:
    """The cases of an op by name: its own, and those of models."""
    cases = dict(spec.bench)
    for name in models:
        assert spec.model_cases is not None
        model = shapes.MODELS[name]
        patches = sizes or [model.tower.patches(*picture) for picture in shapes.PICTURES]
        for case in spec.model_cases(model, sizes or shapes.TOKENS, patches):
            cases[f"{name}/{case.name}"] = dataclasses.replace(case, name=f"{name}/{case.name}")
    return cases


def measure(request: Request, spec: Spec, device: torch.device) -> list[Row]:
    """Rows of every dtype and case of a request.

    Raises:
        BenchError: a variant computes something wrong.
    """
    known = known_cases(spec, request.models, request.sizes)
    return [
        row
        for dtype in request.dtypes
        for case in request.cases
        for row in measure_case(request, spec, known[case], getattr(torch, dtype), device)
    ]


@torch.no_grad()
def measure_case(
    request: Request, spec: Spec, case: BenchCase, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Checks the variants of one case, then times them and the copy floors in turns."""
    torch.manual_seed(0)
    dtype_name = str(dtype).removeprefix("torch.")
    name = f"{case.name} {dtype_name}"
    args = case.make(dtype, device)
    _progress(f"{name}: checking" + (" and compiling" if request.compile else ""))
    variants = admitted(spec, name, args, request.compile)

    moved = case.moved(args)
    calls = {**_floors(moved), **variants.calls}
    budget, rounds = (0.5, (5, 20)) if request.quick else (6.0, (11, 100))
    _progress(f"{name}: timing")
    timings = interleave(calls, budget, rounds, after_round=variants.restore)
    head = {
        "case": case.name,
        "dtype": dtype_name,
        "thp_mem_alloc": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "bytes": 2 * sum(t.numel() * t.element_size() for t in moved),
        "flops": case.flops(args),
    }
    rows = list(_rows(head, timings))
    disturbed = report.busy(rows, torch.get_num_threads())
    if disturbed is not None:  # now, not when all cases were measured in vain
        _progress(f"{name}: {disturbed}")
    return rows + [
        {**head, "direction": direction, "variant": variant, "unavailable": reason}
        for (direction, variant), reason in variants.unavailable.items()
    ]


def _floors(moved: Sequence[Tensor]) -> dict[Key, Call]:
    """What no implementation can beat: into memory that exists, and into fresh memory."""
    existing = [torch.empty_like(t) for t in moved]

    def copy() -> None:
        for to, source in zip(existing, moved, strict=True):
            to.copy_(source)

    return {("floor", "copy"): copy, ("floor", "clone"): lambda: [t.clone() for t in moved]}


@torch.no_grad()
def admitted(spec: Spec, case: str, args: Arguments, compiled: bool = False) -> Variants:
    """The ways to compute a case, each of which has computed it once.

    Args:
        spec: The op.
        case: What errors call it.
        args: Of the op.
        compiled: Whether torch.compile is among them.

    Raises:
        BenchError: ours or eager computes something wrong, code 1.
    """
    eager = spec.eager_for(args)
    functions = {"vlmops": spec.function, "eager": eager}
    if compiled:
        functions[COMPILED] = _compile(eager)
    variants = Variants()

    def admit(gate: Gate, direction: str, variant: str, build: Callable[[], Call]) -> None:
        try:
            call = build()
            results = _tensors(call())
        except Exception as error:
            if variant != COMPILED:
                raise
            reason = str(error).strip() or type(error).__name__
            variants.unavailable[direction, variant] = reason.splitlines()[0]
            return
        try:
            gate.check(f"{case} {direction} {variant}", results)
        except BenchError as error:
            if variant != COMPILED:
                raise
            # A miscompiled yardstick has no speed either, and is no reason to withhold ours.
            variants.unavailable[direction, variant] = str(error)
            return
        variants.calls[direction, variant] = call

    differentiable = spec.differentiable_in(args)
    exact = {**args, **{name: args[name].double() for name in differentiable}}
    outputs = _tensors(eager(**args))
    gate = Gate(_tensors(spec.reference(**exact)), outputs)
    for variant, function in functions.items():
        admit(gate, "forward", variant, functools.partial(functools.partial, function, **args))
    if spec.in_place is not None:
        in_place, variants.restore = _in_place(spec.in_place, spec.written, args)
        admit(gate, "forward", "vlmops in place", lambda: in_place)

    if differentiable:
        upstream = [torch.randn_like(output) for output in outputs]
        backward = functools.partial(_backward, differentiable)
        gate = Gate(
            backward(exact, [t.double() for t in upstream], spec.reference)(),
            backward(args, upstream, eager)(),
        )
        for variant, function in functions.items():
            build = functools.partial(backward, args, upstream, function)
            admit(gate, "backward", variant, build)
    return variants


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # backward runs many times on one graph, which must be kept
    torch.compiler.reset()  # a graph of its own for each case: no recompile limit, no other guards
    return torch.compile(function, dynamic=False)


def _in_place(
    function: Callable[..., Any], names: Sequence[str], args: Arguments
) -> tuple[Call, Callable[[], None]]:
    """The call on scratch copies, and what gives them their first values back."""
    scratch = {**args, **{name: args[name].clone() for name in names}}
    written = [scratch[name] for name in names]

    def call() -> list[Tensor]:
        function(**scratch)
        return written

    def restore() -> None:
        for name in names:
            scratch[name].copy_(args[name])

    return call, restore


def _backward(
    names: Sequence[str], args: Arguments, upstream: Sequence[Tensor], function: Callable[..., Any]
) -> Call:
    """From the gradients of the outputs to those of the inputs, on a graph that is kept."""
    inputs = {name: args[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        outputs = _tensors(function(**{**args, **inputs}))
    leaves = list(inputs.values())
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def _tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _rows(head: Row, timings: Mapping[Key, Timing]) -> Iterator[Row]:
    def ratio(key: Key, median: float) -> float | None:
        other = timings[key].median
        return None if other is None else other / median

    for (direction, variant), timing in timings.items():
        row = {
            **head,
            "direction": direction,
            "variant": variant,
            "samples": timing.samples,
            "voided": timing.voided,
            "calls_per_sample": timing.calls_per_sample,
        }
        if timing.median is None or timing.p25 is None or timing.p75 is None:
            yield {**row, "unavailable": TOO_FEW}
            continue
        of_copy, of_clone = (ratio(("floor", floor), timing.median) for floor in ("copy", "clone"))
        eager = None if direction == "floor" else ratio((direction, "eager"), timing.median)
        yield {
            **row,
            "median_ms": timing.median * 1e3,
            "p25_ms": timing.p25 * 1e3,
            "p75_ms": timing.p75 * 1e3,
            "gb_per_s": head["bytes"] / timing.median / 1e9,
            "percent_of_copy": None if of_copy is None else 100 * of_copy,
            "percent_of_clone": None if of_clone is None else 100 * of_clone,
            "times_eager": eager,
        }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of this process depend on."""
    return {
        "device": {"type": device.type, "name": _cpus.name()},
        "isa": {"vlmops": vlmops.cpu_isa(), "torch": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
        "binding": {name: os.environ.get(name) for name in ("OMP_PROC_BIND", "OMP_PLACES")},
        "huge_pages": _cpus.read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "versions": {
            "vlmops": vlmops.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def require_isa(asked: str | None, got: str) -> None:
    """Raises BenchError if the cap that was asked for is above what the machine has."""
    if asked not in (None, got):
        raise BenchError(f"--isa: this machine has no {asked}; its best is {got}")


def _progress(line: str) -> None:
    print(f"vlmops bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Measures the request ``argv[0]`` (JSON); result or error go to the file ``argv[1]``."""
    request = Request(**json.loads(argv[0]))
    device = torch.device("cpu")
    try:
        result = environment(device)
        require_isa(request.isa, result["isa"]["vlmops"])
        result["rows"] = measure(request, ops.spec(request.op), device)
    except BenchError as error:
        result = {"error": str(error), "code": error.code}
    except KeyboardInterrupt:
        return 130
    Path(argv[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
