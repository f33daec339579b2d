"""``vlmops bench compare``: an op's time in this checkout over its time in another revision.

Both revisions are built with the same flags. One process cannot hold both, since they register ops
of the same names, so two worker processes are bound to the same cores and take turns, sample by
sample. What differs between two processes that run the same code (where memory lies) would pass
for a difference between revisions: each launch is a new pair of processes, and half the distance
between the farthest launches is the noise.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmops import _cpus
from vlmops.bench import BenchError, measure, runner
from vlmops.bench.measure import Request
from vlmops.bench.timer import ATTEMPTS, ENOUGH, SHORTEST_SAMPLE

LAUNCHES, ROUNDS = 5, 9

_SETTLE = 0.02
"""Seconds between samples: OpenMP's threads spin for some milliseconds after their work."""

Key = tuple[str, str, str]
"""Case, dtype and variant."""
Times = tuple[float, float, float]
"""Medians of one launch: seconds of base, seconds of new, and of the ratios of neighbours."""


def run(
    base: str,
    request: Request,
    threads: int | None = None,
    threshold: float = 1.05,
    launches: int = LAUNCHES,
) -> dict[str, Any]:
    """Compares; the result is ready for JSON. What computes something wrong is not timed.

    Args:
        base: The revision to compare with, as git names it.
        request: Op, cases, dtypes and instruction set.
        threads: Of torch, each bound to a core; all cores by default.
        threshold: What is slower by more than this factor and the noise counts as slower.
        launches: Pairs of processes.

    Raises:
        BenchError: no checkout, no such revision or instruction set, a failed build, a wrong
            result, or a process that died.
    """
    env = runner.bound(request.isa, threads)
    env.pop("VLMOPS_LIBRARY", None)  # each revision's own
    root = _checkout()
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", check=False)
    if not commit:
        raise BenchError(f"--base: expected a revision of {root}, got {base!r}")
    found: dict[Key, list[Times | None]] = {}
    with tempfile.TemporaryDirectory(prefix="vlmops-compare-") as name:
        folder = Path(name)
        sites = [folder / "base-site", folder / "new-site"]
        try:
            _git(root, "worktree", "add", "--quiet", "--detach", str(folder / "base"), commit)
            build(folder / "base", sites[0])
        finally:  # whatever is there: why nothing is must not be hidden
            _git(root, "worktree", "remove", "--force", str(folder / "base"), check=False)
        build(root, sites[1])
        isa = _gate(request, sites[1], env)
        for launch in range(launches):
            _progress(f"launch {launch + 1} of {launches}")
            for key, times in _launch(request, sites, env, new_first=launch % 2 == 1):
                found.setdefault(key, []).append(times)
    if not found:
        raise BenchError(f"--base: {base} has none of the cases; nothing was compared")
    return {
        "base": commit,
        **runner.commit(),
        "op": request.op,
        "device": _cpus.name(),
        "isa": isa,
        "threads": int(env["OMP_NUM_THREADS"]),
        "threshold": threshold,
        "launches": launches,
        "rows": [row(key, times, threshold) for key, times in found.items()],
    }


def row(key: Key, times: Sequence[Times | None], threshold: float) -> dict[str, Any]:
    """What the launches of one case, dtype and variant come to, with a verdict."""
    result: dict[str, Any] = dict(zip(("case", "dtype", "variant"), key, strict=True))
    measured = [launch for launch in times if launch is not None]
    if len(measured) < min(ENOUGH, len(times)):
        return {**result, "verdict": "not measured"}
    base, new, ratios = zip(*measured, strict=True)
    ratio, noise = statistics.median(ratios), (max(ratios) - min(ratios)) / 2
    verdict = "same"
    if ratio - noise > threshold:
        verdict = "slower"
    elif ratio + noise < 1 / threshold:
        verdict = "faster"
    return {
        **result,
        "base_ms": 1e3 * statistics.median(base),
        "new_ms": 1e3 * statistics.median(new),
        "ratio": ratio,
        "noise": noise,
        "verdict": verdict,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result, for people."""
    width = max(12, *(len(row["case"]) + 2 for row in result["rows"]))
    lines = [
        f"{result['op']} on {result['device']}, {result['isa']['vlmops']} "
        f"(torch: {result['isa']['torch']}), threads: {result['threads']}, bound; "
        f"{result['launches']} launches",
        f"base {result['base'][:10]}, new {result['commit'][:10]}"
        f"{' with changes' if result['dirty'] else ''}",
        "",
        f"{'case':{width}}{'dtype':10}{'variant':10}{'base ms':>10}{'new ms':>10}{'new/base':>10}"
        f"{'noise':>8}  verdict",
    ]
    for row in result["rows"]:
        start = f"{row['case']:{width}}{row['dtype']:10}{row['variant']:10}"
        if "ratio" in row:
            start += f"{row['base_ms']:10.4f}{row['new_ms']:10.4f}{row['ratio']:10.3f}"
            start += f"{row['noise']:8.3f}"
        else:
            start += " " * 38
        lines.append(f"{start}  {row['verdict']}")
    return "\n".join(lines)


def _checkout() -> Path:
    package = runner.package()
    if runner.commit()["commit"] is None:
        raise BenchError(
            f"compare needs a git checkout, and this vlmops is installed in {package}; clone the "
            "repository, run make setup there, and use its .venv/bin/vlmops"
        )
    return Path(_git(package, "rev-parse", "--show-toplevel"))


def _git(folder: Path, *args: str, check: bool = True) -> str:
    """What git prints; without check, perhaps nothing."""
    told = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False)
    if check and told.returncode != 0:
        command = " ".join(args[:2])
        raise BenchError(f"git {command} failed: {told.stderr.strip()}", code=1)
    return told.stdout.strip()


def build(source: Path, site: Path) -> None:
    """Installs a source tree into a folder of its own.

    Raises:
        BenchError: the build failed, code 1; with the last lines of what it said.
    """
    _progress(f"building {source}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-build-isolation", "--no-deps", "--target", str(site)]
    command += ["--config-settings", f"build-dir={site}-build", str(source)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        last = "\n".join(told.stderr.strip().splitlines()[-15:])
        raise BenchError(f"{source} does not build, with {' '.join(command)}:\n{last}", code=1)


class _Worker:
    """A process with one revision; answers one request at a time, see `compare_worker`."""

    def __init__(self, site: Path, env: Mapping[str, str]) -> None:
        script = Path(__file__).with_name("compare_worker.py")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(site)], env=dict(env), text=True, **pipes
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, which is told
            print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise BenchError(runner.death(self._process.wait()), code=1)
        time.sleep(_SETTLE)
        return json.loads(answer)


def _gate(request: Request, site: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Checks the new revision's results, in a process of its own; its instruction sets."""
    with _Worker(site, env) as new:
        isa: dict[str, str] = new.ask(isa=True)
        measure.require_isa(request.isa, isa["vlmops"])
        for dtype in request.dtypes:
            for case in request.cases:
                _progress(f"{case} {dtype}: checking")
                wrong = new.ask(gate={"op": request.op, "case": case, "dtype": dtype})
                if wrong is not None:
                    raise BenchError(wrong, code=1)
    return isa


def _launch(
    request: Request, sites: Sequence[Path], env: Mapping[str, str], new_first: bool
) -> Iterator[tuple[Key, Times | None]]:
    order = (1, 0) if new_first else (0, 1)  # the first gets other memory than the second
    with _Worker(sites[order[0]], env) as first, _Worker(sites[order[1]], env) as second:
        base, new = (second, first) if new_first else (first, second)
        for dtype in request.dtypes:
            for case in request.cases:
                about = {"op": request.op, "case": case, "dtype": dtype}
                quickest = [worker.ask(**about) for worker in (base, new)]
                if not quickest[0]:
                    _progress(f"{case}: not in the base")
                for variant in (v for v in quickest[0] if v in quickest[1]):
                    longest = max(seconds[variant] for seconds in quickest)
                    repeats = max(1, math.ceil(SHORTEST_SAMPLE / max(longest, 1e-7)))
                    yield (case, dtype, variant), _turns(base, new, variant, repeats)


def _turns(base: _Worker, new: _Worker, variant: str, repeats: int) -> Times | None:
    """Samples in turn, each first as often as second; pairs that were disturbed are repeated."""
    pairs: list[tuple[float, float]] = []
    for turn in range(ATTEMPTS * ROUNDS):
        if len(pairs) == ROUNDS:
            break
        order = (base, new) if turn % 2 == 0 else (new, base)
        samples = {worker: worker.ask(variant=variant, repeats=repeats) for worker in order}
        if not any(disturbed for _, disturbed in samples.values()):
            pairs.append((samples[base][0], samples[new][0]))
    if len(pairs) < ENOUGH:
        return None
    before, after = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(before), statistics.median(after), ratio


def _progress(line: str) -> None:
    print(f"vlmops bench compare: {line}", file=sys.stderr, flush=True)
