"""Runs one revision's op for `compare`: a process of its own, told what to do in lines of JSON.

Started as ``python compare_worker.py SITE``, with the revision's package in the folder SITE. Of
that package it times no more than the op's SPEC has, so that it serves revisions older than
itself; the gate is for the new revision alone.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(site: str) -> None:
    """Answers requests from stdin until it ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    # An editable install of vlmops would answer before the folder of the revision does.
    sys.meta_path = [f for f in sys.meta_path if "vlmops" not in type(f).__module__]
    sys.path[0] = site
    import torch

    import vlmops
    from vlmops import _library

    for loaded in (vlmops.__file__, _library.path):
        if loaded is None or not Path(loaded).is_relative_to(site):
            sys.exit(f"expected vlmops and its library in {site}, got {loaded}")
    torch.set_grad_enabled(False)
    timer = _load_timer()
    calls: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {}

    def sample(call: Callable[[], Any], restore: Callable[[], None], repeats: int) -> list[Any]:
        restore()
        before, start = timer.waits(), time.perf_counter()
        for _ in range(repeats):
            call()
        elapsed = time.perf_counter() - start
        waited = timer.longest_wait(before, timer.waits())
        return [elapsed / repeats, waited > timer.DISTURBED * elapsed]

    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "isa" in request:
            capability = torch.backends.cpu.get_cpu_capability()
            answer = {"vlmops": vlmops.cpu_isa(), "torch": capability}
        elif "gate" in request:
            answer = _wrong(**request["gate"])
        elif "case" in request:
            calls.clear()  # before the next inputs take memory
            calls.update(_calls(**request))
            answer = {
                name: min(sample(*pair, 1)[0] for _ in range(3)) for name, pair in calls.items()
            }
        else:
            answer = sample(*calls[request["variant"]], request["repeats"])
        print(json.dumps(answer), file=answers, flush=True)


def _wrong(op: str, case: str, dtype: str) -> str | None:
    """What is wrong with the results of a case, if anything is."""
    import torch

    from vlmops import ops
    from vlmops.bench import BenchError, measure

    spec = ops.spec(op)
    torch.manual_seed(0)
    args = spec.bench[case].make(getattr(torch, dtype), torch.device("cpu"))
    try:
        measure.admitted(spec, f"{case} {dtype}", args)
    except BenchError as error:
        return str(error)
    return None


def _load_timer() -> Any:
    """The timer beside this file, whatever the revision has."""
    spec = importlib.util.spec_from_file_location("timer", Path(__file__).with_name("timer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["timer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _calls(
    op: str, case: str, dtype: str
) -> dict[str, tuple[Callable[[], Any], Callable[[], None]]]:
    """Variant -> what to time, and what to do before; empty if the revision has no such case."""
    import torch

    from vlmops import ops

    if op not in ops.__all__ or case not in ops.spec(op).bench:
        return {}
    spec: Any = ops.spec(op)
    torch.manual_seed(0)
    args = spec.bench[case].make(getattr(torch, dtype), torch.device("cpu"))
    found: dict[str, tuple[Callable[[], Any], Callable[[], None]]] = {
        "forward": (lambda: spec.function(**args), lambda: None)
    }
    if spec.in_place is not None:
        written = getattr(spec, "written", spec.differentiable)
        scratch = {**args, **{name: args[name].clone() for name in written}}

        def restore() -> None:  # values would decay or grow from call to call
            for name in written:
                scratch[name].copy_(args[name])

        found["in place"] = (lambda: spec.in_place(**scratch), restore)
    names = [name for name in spec.differentiable if args[name] is not None]
    if names:
        inputs = {name: args[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            result = spec.function(**{**args, **inputs})
        outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        upstream = [torch.randn_like(output) for output in outputs]
        leaves = list(inputs.values())

        def backward() -> Any:
            return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

        found["backward"] = (backward, lambda: None)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
