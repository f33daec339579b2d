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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
AGAINST = ("eager", "compile", "linear", "sdpa", "sdpa_loop", "sdpa_folded")
"""Yardsticks that can be chosen; "linear" are the bare products of an op that has some."""
_BACKWARD = " backward"
_NO_PRODUCTS = ("copy", "clone", "launch")
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
    device: str = "cpu"
    """One of `gpu.DEVICES`, or the CPU."""
    against: Sequence[str] = AGAINST
    budget: float | None = None
    """Seconds after which no further case is started."""

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is measured."""
        return self.compile and "compile" in self.against


@dataclasses.dataclass
class Variants:
    """Ways to compute one case, all of which passed the gate."""

    calls: dict[Key, Call] = dataclasses.field(default_factory=dict)
    builds: dict[Key, Callable[[Arguments], Call]] = dataclasses.field(default_factory=dict)
    """The same for other arguments, of the shapes that passed the gate."""
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
    rows: list[Row] = []
    start = time.monotonic()
    for dtype in request.dtypes:
        for case in request.cases:
            if request.budget is not None and time.monotonic() - start > request.budget:
                progress(f"{case} {dtype}: not measured: --budget was spent before it")
                continue
            rows += measure_case(request, spec, known[case], getattr(torch, dtype), device)
    return rows


@torch.no_grad()
def measure_case(
    request: Request, spec: Spec, case: BenchCase, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """Checks the variants of one case, then times them and the copy floors in turns."""
    torch.manual_seed(0)
    dtype_name = str(dtype).removeprefix("torch.")
    name = f"{case.name} {dtype_name}"
    args = case.make(dtype, device)
    progress(f"{name}: checking" + (" and compiling" if request.compiles else ""))
    peers = {} if spec.peers is None else spec.peers(args)
    peers = {peer: call for peer, call in peers.items() if peer in request.against}
    variants = admitted(spec, name, args, request.compiles, peers=peers)

    moved = case.moved(args)
    calls = {**_floors(moved), **chosen(request, spec, args), **variants.calls}
    if "eager" not in request.against:
        calls = {key: call for key, call in calls.items() if key[1] != "eager"}
    budget, rounds = (0.5, (5, 20)) if request.quick else (6.0, (11, 100))
    progress(f"{name}: timing")
    timings = interleave(calls, budget, rounds, after_round=variants.restore)
    head = {
        "case": case.name,
        "dtype": dtype_name,
        "thp_mem_alloc": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "bytes": 2 * sum(t.numel() * t.element_size() for t in moved),
        "flops": case.flops(args),
    }
    rows = list(rows_of(head, timings))
    disturbed = report.busy(rows, torch.get_num_threads())
    if disturbed is not None:  # now, not when all cases were measured in vain
        progress(f"{name}: {disturbed}")
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


def chosen(request: Request, spec: Spec, args: Arguments) -> dict[Key, Call]:
    """The bare products of an op, where they are asked for."""
    if spec.products is None or "linear" not in request.against:
        return {}
    return {_floor_of(*key): call for key, call in spec.products(args).items()}


def _floor_of(direction: str, product: str) -> Key:
    return "floor", product if direction == "forward" else f"{product}{_BACKWARD}"


@torch.no_grad()
def admitted(
    spec: Spec,
    case: str,
    args: Arguments,
    compiled: bool = False,
    others: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    peers: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Variants:
    """The ways to compute a case, each of which has computed it once.

    Args:
        spec: The op.
        case: What errors call it.
        args: Of the op.
        compiled: Whether torch.compile is among them.
        others: More of ours, by variant: forward and backward; one that refuses gets no number,
            one that is wrong ends the benchmark.
        peers: Of other libraries, and backward only of ops without ``spec.written``: they may write
            over what that names. What is wrong or fails gets no number.

    Raises:
        BenchError: ours or eager computes something wrong, code 1.
    """
    eager = spec.eager_for(args)
    functions = {"vlmops": spec.function, **others, "eager": eager}
    if compiled:
        functions[COMPILED] = _compile(eager)
    variants = Variants()

    def admit(gate: Gate, direction: str, variant: str, build: Callable[[Arguments], Call]) -> None:
        forgiven = variant == COMPILED or variant in peers
        may_refuse = forgiven or variant in others
        try:
            call = build(args)
            results = _tensors(call())
        except Exception as error:
            if not may_refuse:
                raise
            reason = str(error).strip() or type(error).__name__
            variants.unavailable[direction, variant] = reason.splitlines()[0]
            return
        try:
            gate.check(f"{case} {direction} {variant}", results)
        except BenchError as error:
            if not forgiven:
                raise
            # A miscompiled yardstick has no speed either, and is no reason to withhold ours.
            variants.unavailable[direction, variant] = str(error)
            return
        variants.calls[direction, variant] = call
        variants.builds[direction, variant] = build

    restores: list[Callable[[], None]] = []

    def on_scratch(function: Callable[..., Any], own: bool, args: Arguments) -> Call:
        call, restore = _in_place(function, spec.written, args, own)
        restores.append(restore)
        return call

    def restore() -> None:
        for one in restores:
            one()

    variants.restore = restore
    differentiable = spec.differentiable_in(args)
    exact = {**args, **{name: args[name].double() for name in differentiable}}
    outputs = _tensors(eager(**args))
    yardsticks = [eager] if spec.yardstick_for is None else [eager, spec.yardstick_for(args)]
    gate = Gate(_tensors(spec.reference(**exact)), *(_tensors(y(**args)) for y in yardsticks))
    for variant, function in functions.items():
        admit(gate, "forward", variant, functools.partial(_forward, function))
    if spec.in_place is not None:
        build = functools.partial(on_scratch, spec.in_place, False)
        admit(gate, "forward", "vlmops in place", build)
    if (into := spec.into) is not None:
        out = {"out": torch.empty_like(outputs[0], memory_format=torch.contiguous_format)}
        admit(gate, "forward", "vlmops out=", lambda args: _forward(into, {**args, **out}))
    for variant, function in peers.items():
        admit(gate, "forward", variant, functools.partial(on_scratch, function, True))

    if differentiable:
        upstream = [torch.randn_like(output) for output in outputs]
        backward = functools.partial(_backward, differentiable)
        gate = Gate(
            backward([t.double() for t in upstream], spec.reference, exact)(),
            *(backward(upstream, y, args)() for y in yardsticks),
        )
        for variant, function in {**functions, **({} if spec.written else peers)}.items():
            admit(gate, "backward", variant, functools.partial(backward, upstream, function))
    return variants


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # backward runs many times on one graph, which must be kept
    torch.compiler.reset()  # a graph of its own for each case: no recompile limit, no other guards
    return torch.compile(function, dynamic=False)


def _forward(function: Callable[..., Any], args: Arguments) -> Call:
    return functools.partial(function, **args)


def _in_place(
    function: Callable[..., Any], names: Sequence[str], args: Arguments, own: bool = False
) -> tuple[Call, Callable[[], None]]:
    """The call on scratch copies, and what gives them their first values back.

    It returns what it wrote over, or with ``own`` what the function returned.
    """
    scratch = {**args, **{name: args[name].clone() for name in names}}
    written = [scratch[name] for name in names]

    def call() -> Any:
        result = function(**scratch)
        return result if own else written

    def restore() -> None:
        for name in names:
            scratch[name].copy_(args[name])

    return call, restore


def _backward(
    names: Sequence[str], upstream: Sequence[Tensor], function: Callable[..., Any], args: Arguments
) -> Call:
    """From the gradients of the outputs to those of the inputs, on a graph that is kept."""
    inputs = {name: args[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        outputs = _tensors(function(**{**args, **inputs}))
    leaves = list(inputs.values())
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def _tensors(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def rows_of(head: Row, timings: Mapping[Key, Timing]) -> Iterator[Row]:
    """A row for each timing, related to the floors and to eager."""

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
        of_copy, of_clone = (
            ratio(("floor", floor), timing.median) if ("floor", floor) in timings else None
            for floor in ("copy", "clone")
        )
        measured = direction in ("forward", "backward")
        eager = None
        if measured and (direction, "eager") in timings:
            eager = ratio((direction, "eager"), timing.median)
        products = [
            timing.median
            for (kind, name), timing in timings.items()
            if kind == "floor" and name not in _NO_PRODUCTS and timing.median is not None
            if measured and name.endswith(_BACKWARD) == (direction == "backward")
        ]
        yield {
            **row,
            "median_ms": timing.median * 1e3,
            "p25_ms": timing.p25 * 1e3,
            "p75_ms": timing.p75 * 1e3,
            "gb_per_s": head["bytes"] / timing.median / 1e9,
            "percent_of_copy": None if of_copy is None else 100 * of_copy,
            "percent_of_clone": None if of_clone is None else 100 * of_clone,
            "times_eager": eager,
            **({"over_product": timing.median / min(products)} if products else {}),
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


def progress(line: str) -> None:
    """Says on stderr what is being done."""
    print(f"vlmops bench: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """Measures the request ``argv[0]`` (JSON); result or error go to the file ``argv[1]``."""
    request = Request(**json.loads(argv[0]))
    device = torch.device("cpu")
    try:
        if request.device != "cpu":
            from vlmops.bench import measure_gpu

            result = measure_gpu.run(request)
            Path(argv[1]).write_text(json.dumps(result))
            return 0
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
