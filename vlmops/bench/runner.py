"""Runs the measurement in processes of their own and puts their results together."""

from __future__ import annotations

import dataclasses
import datetime
import getpass
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vlmops
from vlmops import _cpus, _library, ops
from vlmops.bench import BenchError, gpu, shapes
from vlmops.bench.measure import AGAINST, Request, known_cases

SCHEMA = 1

DTYPES = ("float32", "bfloat16", "float16")

# What makes torch run as on a machine with no better instruction set.
TORCH_CAPS: Mapping[str, Mapping[str, str]] = {
    "portable": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


def request(
    op: str,
    cases: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    isa: str | None = None,
    compile: bool = True,
    quick: bool = False,
    models: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    device: str = "cpu",
    against: Sequence[str] | None = None,
    budget: float | None = None,
) -> Request:
    """A request whose every name exists; all cases, float32 and bfloat16 by default.

    Raises:
        BenchError: a name does not exist; the message lists those that do.
    """
    try:
        spec = ops.spec(op)
    except ValueError as error:
        raise BenchError(str(error)) from None
    models, sizes = models or [], sizes or []
    _check_names("--model", models, list(shapes.MODELS))
    if models and spec.model_cases is None:
        raise BenchError(
            f"--model: {op} has no cases made from models; leave it out, or see --case"
        )
    if sizes and not models:
        raise BenchError("--sizes: expected a --model, whose cases have sizes to choose")
    known = known_cases(spec, models, sizes)
    from_models = [case for case in known if case not in spec.bench]
    cases = cases or from_models or list(spec.bench)
    dtypes = dtypes or ["float32", "bfloat16"]
    _check_names("--case", cases, list(known))
    _check_names("--dtype", dtypes, DTYPES)
    _check_names("--device", [device], ["cpu", *gpu.DEVICES])
    _check_names("--isa", [isa] if isa else [], list(TORCH_CAPS))
    _check_names("--against", against or [], AGAINST)
    if budget is not None and not budget > 0:
        raise BenchError(f"--budget: expected seconds above 0, got {budget:g}")
    return Request(
        op, cases, dtypes, isa, compile, quick, models, sizes, device, against or AGAINST, budget
    )


def _check_names(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise BenchError(f"{option}: expected one of {', '.join(allowed)}, got {name!r}")


def run(request: Request, threads: int | None = None) -> dict[str, Any]:
    """Measures, on the CPU without and with huge pages in torch's allocator: ready for JSON.

    Args:
        request: What to measure.
        threads: Threads of torch, each bound to a core; all cores by default.

    Raises:
        BenchError: a wrong result (code 1), an impossible request (2), or a process that died.
    """
    env = bound(request.isa, threads)
    try:
        _library.require()
    except ImportError as error:
        raise BenchError(str(error)) from None
    settings = "01" if request.device == "cpu" else "0"  # huge pages are the CPU's
    if request.budget is not None:
        request = dataclasses.replace(request, budget=request.budget / len(settings))
    results = [_measure(request, {**env, "THP_MEM_ALLOC_ENABLE": value}) for value in settings]
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "op": request.op,
        "quick": request.quick,
        **commit(),
        **results[0],
        "rows": [row for result in results for row in result["rows"]],
    }


def bound(isa: str | None, threads: int | None) -> dict[str, str]:
    """The environment of processes that measure; they inherit all CPUs from this one.

    Raises:
        BenchError: there are not so many CPUs.
    """
    if threads is not None and not 1 <= threads <= len(_cpus.ALLOWED):
        raise BenchError(
            f"--threads: expected 1 to {len(_cpus.ALLOWED)}, the CPUs this process may use, "
            f"got {threads}"
        )
    os.sched_setaffinity(0, _cpus.ALLOWED)  # see _cpus
    count = str(threads or _cpus.cores())
    env = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of idle workers would share our cores
    }
    if isa is not None:
        # torch's cache of compiled graphs does not tell instruction sets apart: code for 8 lanes,
        # compiled for 16, writes past the ends of tensors (torch 2.13).
        default = str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
        compiled = env.get("TORCHINDUCTOR_CACHE_DIR", default)
        env |= {"TORCHINDUCTOR_CACHE_DIR": f"{compiled}-{isa}"}
        env |= {"VLMOPS_CPU_ISA": isa, **TORCH_CAPS[isa]}
    return env


def _measure(request: Request, env: dict[str, str]) -> dict[str, Any]:
    thp = f"THP_MEM_ALLOC_ENABLE={env['THP_MEM_ALLOC_ENABLE']}"
    where = thp if request.device == "cpu" else request.device
    print(f"vlmops bench: {request.op}, {where}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        arguments = [json.dumps(dataclasses.asdict(request)), str(output)]
        # torch caches compiled graphs without regard to a capped instruction set: from a shared
        # cache this process could run code of another one, or leave its own to other programs.
        env = {**env, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "torchinductor")}
        # From the folder of this very package: `-m` looks there first.
        code = subprocess.run(
            [sys.executable, "-m", "vlmops.bench.measure", *arguments],
            env=env,
            cwd=package().parent,
            check=False,
        ).returncode
        if code != 0:
            raise BenchError(death(code), code=1)
        result: dict[str, Any] = json.loads(output.read_text())
    if "error" in result:
        raise BenchError(result["error"], result["code"])
    return result


def death(code: int) -> str:
    """What to tell of a process that ended with this code."""
    if code < 0:
        return (
            f"the measuring process was ended by signal {-code}; if memory ran out, choose smaller "
            "shapes with --case"
        )
    return f"the measuring process failed with code {code}, for the reason above; please report it"


def package() -> Path:
    """The folder of this very package."""
    return Path(vlmops.__file__).resolve().parent


def commit() -> dict[str, str | bool | None]:
    """The commit that this package belongs to; an installed one belongs to none."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=package(), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
