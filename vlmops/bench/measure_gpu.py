"""Measures the variants of an op on a GPU. `gpu` says how time is taken there and why."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import vlmops
from vlmops import dispatch, ops
from vlmops.bench import BenchError, gpu
from vlmops.bench.measure import (
    Call,
    Key,
    Request,
    Row,
    admitted,
    chosen,
    known_cases,
    progress,
    rows_of,
)
from vlmops.ops.spec import Arguments, BenchCase, Spec

LAUNCH: Key = ("floor", "launch")


def run(request: Request, device: gpu.Device | None = None) -> dict[str, Any]:
    """Environment, ceilings and rows of a request.

    A case with a wrong result, or one that fails, has rows without numbers and a line in
    ``errors``; the others are measured all the same, since a GPU may be there only once.

    Raises:
        BenchError: there is no device, or its clock is wrong.
    """
    device = gpu.open_device(request.device) if device is None else device
    spec = ops.spec(request.op)
    known = known_cases(spec, request.models, request.sizes)
    backend, others = backends(spec, device.torch.type)
    result: dict[str, Any] = {"device": device.describe(), **_versions(device)}
    result["backends"] = {"vlmops": backend, **{f"vlmops {name}": name for name in others}}
    rows: list[Row] = []
    errors: list[str] = []
    start = time.monotonic()
    with torch.no_grad(), device.stream():
        progress("measuring copy bandwidth and matmul rate")
        ceilings = gpu.measure_ceilings(device, request.dtypes, request.quick)
        for dtype in request.dtypes:
            for name in request.cases:
                case = known[name]
                if request.budget is not None and time.monotonic() - start > request.budget:
                    errors.append(f"{name} {dtype}: not measured: --budget was spent before it")
                    continue
                try:
                    found = measure_case(request, spec, case, getattr(torch, dtype), device,
                                         ceilings, others)  # fmt: skip
                except Exception as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    progress(f"{name} {dtype}: {reason}")
                    errors.append(f"{name} {dtype}: {reason}")
                    head = _head(case.name, dtype, 0, 0.0)
                    row = {"direction": "forward", "variant": "vlmops", "unavailable": reason}
                    found = [{**head, **row}]
                else:
                    errors += [
                        f"{name} {dtype} {row['direction']} {row['variant']}: {row['unavailable']}"
                        for row in found
                        if row.get("impossible")
                    ]
                rows += found
    result["device"]["clocks_after"] = device.describe()["clocks"]
    return {**result, "ceilings": ceilings.to_dict(), "errors": errors, "rows": rows}


def backends(spec: Spec, device_type: str) -> tuple[str, list[str]]:
    """The default backend, and the others that can run there.

    Raises:
        BenchError: none can.
    """
    try:
        default = dispatch.default(spec.op, device_type).backend
    except RuntimeError as error:
        raise BenchError(str(error)) from None
    if device_type != "cuda":
        return default, []
    others = [name for name in ("cuda", "triton") if name != default]
    return default, [n for n in others if dispatch.unavailable(spec.op, n, device_type) is None]


def measure_case(
    request: Request,
    spec: Spec,
    case: BenchCase,
    dtype: torch.dtype,
    device: gpu.Device,
    ceilings: gpu.Ceilings,
    others: Sequence[str] = (),
) -> list[Row]:
    """Checks the variants of one case, then times them in turns, cold, and judges the times.

    Raises:
        BenchError: a variant computes something wrong.
    """
    torch.manual_seed(0)
    dtype_name = str(dtype).removeprefix("torch.")
    name = f"{case.name} {dtype_name}"
    args = case.make(dtype, device.torch)
    progress(f"{name}: checking" + (" and compiling" if request.compiles else ""))
    ours = {f"vlmops {b}": functools.partial(spec.function, backend=b) for b in others}
    peers = {} if spec.peers is None else spec.peers(args)
    variants = admitted(spec, name, args, request.compiles, ours, peers)
    builds: dict[Key, Callable[[Arguments], Call]] = {
        ("floor", "copy"): functools.partial(_copy, case),
        **{
            key: functools.partial(_chosen, request, spec, key)
            for key in chosen(request, spec, args)
        },
        **variants.builds,
    }

    progress(f"{name}: timing")
    calls = {
        ("floor", "copy"): _copy(case, args),
        **chosen(request, spec, args),
        **variants.calls,
    }
    if "eager" not in request.against:
        calls = {key: call for key, call in calls.items() if key[1] != "eager"}
    moved = sum(t.numel() * t.element_size() for t in case.moved(args))
    latencies = {key: gpu.latency(device, call) for key, call in calls.items()}
    shortest = min(gpu.estimate(device, call, latencies[key]) for key, call in calls.items())
    works: dict[Key, tuple[Call, int]] = {key: (call, 1) for key, call in calls.items()}
    why_not: dict[Key, str] = {}
    # A graph keeps inputs and results of its calls, and what their forward saved: eager's most.
    count = gpu.calls_per_graph(device, shortest, 32 * moved)
    sets = [args, *(case.make(dtype, device.torch) for _ in range(count - 1))]
    works[LAUNCH] = (device.capture([device.launch] * count), count)
    for key, build in builds.items():
        if key not in calls:
            continue
        try:
            works[key] = (device.capture([build(one) for one in sets]), count)
        except RuntimeError as error:
            why_not[key] = (str(error).strip() or type(error).__name__).splitlines()[0]
    budget, rounds = (0.2, (5, 20)) if request.quick else (1.5, (15, 100))
    ahead = {key: latencies[key] for key in why_not}
    timings = gpu.interleave(device, works, budget, rounds, variants.restore, ahead)

    rows = []
    head = _head(case.name, dtype_name, 2 * moved, case.flops(args))
    for row in rows_of(head, timings):
        key = (row["direction"], row["variant"])
        row["timing"] = "events" if key in why_not else "graph"
        if key in why_not:
            row["not_captured"] = why_not[key]
        if key in latencies:
            row["latency_ms"] = latencies[key] * 1e3
        if key == ("floor", "copy"):  # which multiplies nothing
            row["flops"] = 0.0
        rows.append(row if key == LAUNCH else judged(row, ceilings))
    return rows + [
        {**head, "direction": direction, "variant": variant, "unavailable": reason}
        for (direction, variant), reason in variants.unavailable.items()
    ]


def judged(row: Row, ceilings: gpu.Ceilings) -> Row:
    """The row with its per cent of the ceilings; without numbers if it is above one."""
    if "median_ms" not in row:
        return row
    seconds = row["median_ms"] * 1e-3
    reason = ceilings.beaten(row["bytes"], row["flops"], row["dtype"], seconds)
    if reason is not None:
        kept = ("case", "dtype", "thp_mem_alloc", "bytes", "flops", "direction", "variant")
        return {**{k: row[k] for k in kept}, "unavailable": reason, "impossible": True,
                "would_be_ms": row["median_ms"]}  # fmt: skip
    return {**row, "percent_of_ceiling": 100 * row["bytes"] / seconds / ceilings.copy_bytes_per_s}


def _chosen(request: Request, spec: Spec, key: Key, args: Arguments) -> Call:
    return chosen(request, spec, args)[key]


def _copy(case: BenchCase, args: Arguments) -> Call:
    moved = case.moved(args)
    existing = [torch.empty_like(t) for t in moved]

    def copy() -> None:
        for to, source in zip(existing, moved, strict=True):
            to.copy_(source)

    return copy


def _head(case: str, dtype: str, bytes_: int, flops: float) -> Row:
    # thp_mem_alloc: of the CPU's allocator; here so that rows look like the CPU's.
    return {"case": case, "dtype": dtype, "thp_mem_alloc": False, "bytes": bytes_, "flops": flops}


def _versions(device: gpu.Device) -> dict[str, Any]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    capability = device.describe()["capability"]
    built_for = torch.cuda.get_arch_list() if device.torch.type == "cuda" else []
    return {
        "isa": {"vlmops": capability, "torch": " ".join(built_for)},
        "threads": torch.get_num_threads(),
        "versions": {
            "vlmops": vlmops.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }
