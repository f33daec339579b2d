"""Builds, checks and measures vlmops on this machine's GPU; ``OUT_DIR/verdict.txt`` comes last.

Needs no network. Steps run in the order of what their answers are worth, each with a log and a time
budget of its own; one that fails stops none but those that need it. A second run with the same
OUT_DIR keeps what has finished on the same commit and does the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 520.0
"""Seconds for everything; what is left when it is spent is for the next run."""

BUILD = [
    *("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."),
    *("-C", "cmake.define.VLMOPS_CUDA=ON", "-C", "cmake.define.VLMOPS_CUDA_ARCHITECTURES=native"),
]
"""The one place that knows how both libraries are built for the card that is present."""

BUILDS = ("build", "build-cpu-half")
"""Steps of which one must have passed for nearly all others."""

DONE = ("passed", "failed")
"""What a rerun keeps; a step that was skipped, timed out or not reached is tried again."""

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHES = {
    "pixel_shuffle": (180, ("bfloat16", "float32"), ()),
    "mlp_projector": (100, ("bfloat16",), ("--no-compile",)),
    "gated_residual": (30, ("bfloat16",), ()),
    "add_norm": (40, ("bfloat16",), ()),
    "hd_transform": (60, ("bfloat16",), ("--no-compile",)),
    "patch_embed": (120, ("bfloat16",), ()),
    "packed_attention": (150, ("bfloat16",), ("--no-compile",)),
    "gated_cross_attention": (90, ("bfloat16",), ("--no-compile",)),
    "qformer_attention": (90, ("bfloat16",), ("--no-compile",)),
    "perceiver_attention": (60, ("bfloat16",), ("--no-compile",)),
    "spatial_aggregate": (60, ("bfloat16",), ("--no-compile",)),
}
"""Seconds, dtypes and options of what is measured beside mrope, whose numbers have targets."""

REHEARSED = {
    "pixel_shuffle": "smolvlm_f4",
    "gated_residual": "mllama_1",
    "add_norm": "qformer",
    "hd_transform": "phi4_4x4",
    "patch_embed": "siglip_so400m_384",
    "packed_attention": "decode_b1",
    "gated_cross_attention": "idefics_1",
    "qformer_attention": "blip2_b1",
    "perceiver_attention": "idefics_b8",
    "spatial_aggregate": "cambrian",
}
"""What a dry run measures; mlp_projector's products take a CPU minutes."""

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3", "llama4", "mllama", "gemma3"),
    *("paligemma", "llava", "llava_next", "llava_onevision", "internvl", "idefics3"),
    *("phi4_multimodal", "idefics"),
)
TARGETS = {"percent_of_ceiling": 85.0, "times_eager": 8.0, "times_compiled": 1.5, "launches": 1.2}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command. ``skip`` says why it cannot run here, or None."""

    name: str
    seconds: float
    command: Sequence[str]
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    """Steps of which at least one must have passed."""
    instead_of: str | None = None
    """Runs only if that step failed."""
    skip: Callable[[], str | None] = lambda: None
    makes: Path | None = None
    """A file that must be there afterwards."""


@dataclasses.dataclass
class Outcome:
    """How a step ended: passed, failed, timed out, skipped or not reached."""

    status: str
    seconds: float = 0.0
    why: str = ""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU: only the device is replaced"
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these steps, and the build")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (default 520)")
    parser.add_argument("--do", choices=sorted(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.do:
        return PARTS[args.do](args.out, args.dry_run)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = steps(out, args.dry_run)
    if args.only is not None:
        unknown = set(args.only) - {step.name for step in chosen}
        if unknown:
            names = ", ".join(step.name for step in chosen)
            parser.error(f"--only: expected {names}, got {', '.join(sorted(unknown))}")
        chosen = [s for s in chosen if s.name in (*args.only, *BUILDS)]
    check = Check(chosen, out, identity(args.dry_run), args.budget, args.fresh)
    return check.run()


def steps(out: Path, dry_run: bool) -> list[Step]:
    """Everything, the most valuable answers first."""
    python = sys.executable
    device = "rehearsal" if dry_run else "cuda"
    test_device = {"VLMOPS_TEST_DEVICE": "cpu" if dry_run else "cuda"}

    def part(name: str) -> list[str]:
        return [python, __file__, str(out), "--do", name, *(["--dry-run"] if dry_run else [])]

    def contract(backend: str, seconds: float) -> Step:
        selected = {"cuda": "cpu_portable and qwen2vl_s17", "triton": "triton and tiny_s1"}
        # Warnings differ from one torch to the next: they are read in the log here.
        suite = [python, "-m", "pytest", "-v", "-rf", "-W", "default", "-p", "no:cacheprovider"]
        suite += ["--tb=short", "--maxfail=30", *workers(), "python_tests/test_contract.py"]
        suite += ["-k", selected[backend] if dry_run else backend]
        skip = without("triton") if backend == "triton" else lambda: None
        return Step(f"contract-{backend}", seconds, suite, test_device, BUILDS, skip=skip)

    def bench(name: str, seconds: float, *options: str, op: str = "mrope") -> Step:
        path = out / f"{name}.json"
        command = [python, "-m", "vlmops", "bench", op, "--device", device, *options]
        return Step(name, seconds, [*command, "--json", str(path)], needs=BUILDS, makes=path)

    def bench_of(op: str) -> Step:
        seconds, dtypes, options = BENCHES[op]
        chosen = ["--quick", *(word for dtype in dtypes for word in ("--dtype", dtype)), *options]
        if dry_run:
            chosen = ["--quick", "--dtype", dtypes[0], "--no-compile", "--case", REHEARSED[op]]
            return bench(f"bench-{op}", seconds, *chosen, op=op)
        # What has been measured by then is worth more than the next case.
        return bench(f"bench-{op}", seconds, *chosen, "--budget", str(0.75 * seconds), op=op)

    def sanitizer(tool: str) -> Step:
        program = find_sanitizer()
        # torch's caching allocator would hide accesses beyond a tensor's end.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        missing = "compute-sanitizer is not installed; it comes with the CUDA toolkit"
        skip = lambda: None if program else missing  # noqa: E731
        return Step(f"sanitizer-{tool}", 60, [*command, *part("calls")], env, BUILDS, skip=skip)

    quick = ["--quick", "--no-compile", "--dtype", "bfloat16"]
    shapes = ["decode_b1", "s1024"] if dry_run else ["decode_b1", "s4096", "s16384", "norm_s4096"]
    cases = [option for shape in shapes for option in ("--case", shape)]
    # A build that was made elsewhere only has to load.
    loads_only = dry_run or "VLMOPS_LIBRARY" in os.environ
    build = part("imports") if loads_only else [python, *BUILD]
    return [
        Step("environment", 30, part("environment")),
        Step("build", 150, build),
        Step("build-cpu-half", 90, [python, *BUILD[:-4]], instead_of="build"),
        Step("small", 80, part("small"), needs=BUILDS),
        contract("cuda", 300),
        bench("bench-headline", 60, *quick, *cases),
        *(bench_of(op) for op in (REHEARSED if dry_run else BENCHES)),
        Step("patched", 120, part("patched"), needs=BUILDS, skip=without("transformers")),
        contract("triton", 300),
        *(sanitizer(tool) for tool in SANITIZERS[:2]),
        bench("bench", 120, *([*quick, "--case", "decode_b1"] if dry_run else [])),
        *(sanitizer(tool) for tool in SANITIZERS[2:]),
        Step("plots", 20, part("plots"), needs=("bench", "bench-headline")),
    ]


def without(module: str) -> Callable[[], str | None]:
    """Skips what needs a package that is not installed."""
    import importlib.util

    missing = f"{module} is not installed; run 'pip install {module}'"
    return lambda: None if importlib.util.find_spec(module) else missing


def workers() -> list[str]:
    """Pytest's options for several processes; one that dies takes only the test it was at."""
    import importlib.util

    if not importlib.util.find_spec("xdist"):
        return []
    return ["-n", str(max(1, min(12, (os.cpu_count() or 1) * 3 // 4))), "--dist", "worksteal"]


def find_sanitizer() -> str | None:
    name = "compute-sanitizer"
    found = shutil.which(name)
    beside = Path("/usr/local/cuda/bin") / name
    return found or (str(beside) if beside.exists() else None)


def identity(dry_run: bool) -> str:
    """What results belong to: commit, changes, machine."""

    def git(*command: str) -> bytes:
        try:
            return subprocess.run(["git", *command], cwd=ROOT, capture_output=True).stdout
        except OSError:
            return b""

    changes = hashlib.sha256(git("diff", "HEAD")).hexdigest()[:8]
    commit = git("rev-parse", "HEAD").decode().strip() or "no commit"
    return f"{commit}+{changes} on {platform.node()}{', dry run' if dry_run else ''}"


class Check:
    """Runs steps, keeps their outcomes in ``state.json``, writes the verdict.

    Args:
        steps: In order.
        out: Folder of logs and results.
        identity: A state of another one is not continued.
        budget: Seconds.
        fresh: Forgets what was done.
        clock: Seconds.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        out: Path,
        identity: str,
        budget: float = BUDGET,
        fresh: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps, self.out, self.identity, self.clock = steps, out, identity, clock
        self.start, self.budget = clock(), budget
        self.state_path = out / "state.json"
        self.outcomes: dict[str, Outcome] = {} if fresh else self._kept()

    def _kept(self) -> dict[str, Outcome]:
        try:
            state = json.loads(self.state_path.read_text())
            kept = {name: Outcome(**outcome) for name, outcome in state["steps"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{self.state_path} cannot be read ({error}): starting over")
            return {}
        if state["identity"] != self.identity:
            print(f"{self.out} holds results of {state['identity']}: starting over")
            return {}
        return {name: outcome for name, outcome in kept.items() if outcome.status in DONE}

    def run(self) -> int:
        """0: everything that ran passed and nothing is missing but what is skipped."""
        for step in self.steps:
            kept = step.name in self.outcomes
            if not kept:
                print(f"{step.name}: running", flush=True)
                self.outcomes[step.name] = self._outcome(step)
                self._save()
            outcome = self.outcomes[step.name]
            told = f"{step.name}: {outcome.status}{', kept' if kept else ''}"
            print(f"{told} ({outcome.seconds:.0f} s) {outcome.why}".rstrip(), flush=True)
        text = verdict(self.steps, self.outcomes, self.out, self.identity)
        (self.out / "verdict.txt").write_text(text)
        print(f"\n{text}", end="")
        bad = ("failed", "timed out", "not reached")
        return int(any(outcome.status in bad for outcome in self.outcomes.values()))

    def _outcome(self, step: Step) -> Outcome:
        left = self.budget - (self.clock() - self.start)
        if step.instead_of is not None:
            instead = self.outcomes.get(step.instead_of)
            if instead is None or instead.status == "passed":
                return Outcome("skipped", why=f"not needed: {step.instead_of} passed")
        passed = [
            n for n in step.needs if n in self.outcomes and self.outcomes[n].status == "passed"
        ]
        if step.needs and not passed:
            return Outcome("skipped", why=f"needs {' or '.join(step.needs)}, which did not pass")
        reason = step.skip()
        if reason is not None:
            return Outcome("skipped", why=reason)
        if left <= 1:
            return Outcome("not reached", why="the time was spent; run again to continue")
        return self._execute(step, min(step.seconds, left))

    def _execute(self, step: Step, limit: float) -> Outcome:
        log_path = self.out / f"{step.name}.log"
        start = self.clock()
        if step.makes is not None:
            step.makes.unlink(missing_ok=True)
        with log_path.open("w") as log:
            log.write(f"$ {' '.join(step.command)}\n")
            log.flush()
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **step.env},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome("failed", why=f"did not start: {error}")
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                why = f"after {limit:.0f} s, which is its budget; see {log_path.name}"
                return Outcome("timed out", self.clock() - start, f"{counts(log_path)}{why}")
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        told = counts(log_path)
        seconds = self.clock() - start
        if code == 0 and step.makes is not None and not step.makes.exists():
            return Outcome("failed", seconds, f"code 0, and {step.makes.name} was not written")
        if code == 0:
            return Outcome("passed", seconds, told)
        return Outcome("failed", seconds, f"{told}code {code}: {last_line(log_path)}")

    def _save(self) -> None:
        steps = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        new = self.state_path.with_suffix(".new")  # a run that is killed here leaves the old one
        new.write_text(json.dumps({"identity": self.identity, "steps": steps}, indent=1))
        new.replace(self.state_path)


def counts(log: Path) -> str:
    """How many tests passed, failed and were skipped, also if pytest was stopped."""
    # With workers "[gw0] [ 1%] PASSED file::test", without "file::test PASSED [ 1%]".
    words = re.findall(
        r"^(?=\S+::|\[gw\d+\]).* (PASSED|FAILED|SKIPPED|ERROR)\b", log.read_text(), re.MULTILINE
    )
    kinds = [f"{words.count(k)} {k.lower()}" for k in dict.fromkeys(words)]
    return f"{', '.join(kinds)}; " if kinds else ""


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def verdict(
    steps: Sequence[Step], outcomes: Mapping[str, Outcome], out: Path, identity: str
) -> str:
    """Short: what passed, what did not and why, numbers against targets."""
    lines = [f"vlmops {identity}"]
    for step in steps:
        outcome = outcomes.get(step.name, Outcome("not reached"))
        line = f"{outcome.status.upper():12}{step.name:22}{outcome.seconds:5.0f} s  {outcome.why}"
        lines.append(line.rstrip().removesuffix(";"))
    for name in ("bench", "bench-headline"):
        path = out / f"{name}.json"
        if path.exists() and outcomes.get(name, Outcome("")).status in DONE:
            lines += ["", *numbers(json.loads(path.read_text()))]
            break
    else:
        lines += ["", "NUMBERS     none were measured"]
    for op in BENCHES:
        path = out / f"bench-{op}.json"
        if path.exists() and outcomes.get(path.stem, Outcome("")).status in DONE:
            lines += ["", *times(json.loads(path.read_text()))]
    statuses = [outcome.status for outcome in outcomes.values()]
    bad = sum(status in ("failed", "timed out", "not reached") for status in statuses)
    lines += ["", f"VERDICT     {bad or 'no'} of {len(steps)} steps did not pass, "
              f"{statuses.count('skipped')} skipped"]  # fmt: skip
    return "\n".join(lines) + "\n"


def numbers(report: Mapping[str, Any]) -> list[str]:
    """Forward in bfloat16 against the targets, one line each."""
    device, ceilings = report["device"], report["ceilings"]
    lines = [
        f"{device['name']}, driver {device['driver']}, torch {report['versions']['torch']}; copy "
        f"{ceilings['copy_gb_per_s']:.0f} GB/s, launch {ceilings['launch_us']:.2f} us"
    ]
    timed = {
        (row["case"], row["variant"]): row
        for row in report["rows"]
        if row["dtype"] == "bfloat16"
        and (row["direction"] == "forward" or row["variant"] == "launch")
        and "median_ms" in row
    }
    for (case, variant), row in timed.items():
        if not variant.startswith("vlmops"):
            continue
        found: dict[str, float | None] = {}
        tokens = re.search(r"s(\d+)$", case)
        if tokens and int(tokens[1]) >= 4096:
            found["percent_of_ceiling"] = row["percent_of_ceiling"]
            if variant != "vlmops in place":
                found["times_eager"] = row["times_eager"]
                compiled = timed.get((case, "torch.compile"))
                if compiled is not None:
                    found["times_compiled"] = compiled["median_ms"] / row["median_ms"]
        elif case.startswith("decode") and (case, "launch") in timed:
            found["launches"] = row["median_ms"] / timed[case, "launch"]["median_ms"]
        for name, value in found.items():
            if value is None:
                continue
            target = TARGETS[name]
            met = value <= target if name == "launches" else value >= target
            sign = "<=" if name == "launches" else ">="
            lines.append(
                f"{'met' if met else 'MISSED':12}{case:12}{variant:17}{name} {value:.4g} "
                f"(target {sign} {target:g})"
            )
    return lines + [f"ERROR       {error}" for error in report.get("errors", ())]


def times(report: Mapping[str, Any]) -> list[str]:
    """Each of our times, against everything that was measured beside it."""
    keys = ("case", "dtype", "direction")
    compiled = {
        tuple(row[key] for key in keys): row["median_ms"]
        for row in report["rows"]
        if row["variant"] == "torch.compile" and "median_ms" in row
    }
    lines = []
    for row in report["rows"]:
        if not row["variant"].startswith("vlmops") or "median_ms" not in row:
            continue
        found = {
            "x eager": row.get("times_eager"),
            "x torch.compile": None,
            "% of copy's speed": row.get("percent_of_ceiling"),
            "x product": row.get("over_product"),
        }
        other = compiled.get(tuple(row[key] for key in keys))
        if other is not None:
            found["x torch.compile"] = other / row["median_ms"]
        told = ", ".join(
            f"{value:.2f} {name}" for name, value in found.items() if value is not None
        )
        lines.append(
            f"{row['case']:20}{row['dtype']:10}{row['direction']:9}{row['variant']:15}"
            f"{row['median_ms'] * 1e3:9.1f} us, {told}"
        )
    return lines + [f"ERROR       {error}" for error in report.get("errors", ())]


# Parts that run in processes of their own: they import torch, and may crash.


def environment(out: Path, dry_run: bool) -> int:
    """What this machine has."""
    commands = [
        ["nvidia-smi"],
        ["nvcc", "--version"],
        ["cmake", "--version"],
        ["ninja", "--version"],
        ["c++", "--version"],
        [find_sanitizer() or "compute-sanitizer", "--version"],
        [sys.executable, "-m", "pip", "list", "--format=freeze"],
    ]
    for command in commands:
        print(f"$ {' '.join(command)}", flush=True)
        try:
            subprocess.run(command, stderr=subprocess.STDOUT, check=False, timeout=15)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"not there: {error}", flush=True)
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version}")
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0))
    elif not dry_run:
        print("torch sees no CUDA device; install a torch built for CUDA, or try --dry-run")
        return 1
    return 0


def imports(out: Path, dry_run: bool) -> int:
    """The dry run's build: the library is there."""
    from vlmops import _library

    _library.require()
    return 0


def small(out: Path, dry_run: bool) -> int:
    """Tiny cases of every op on every backend, against the reference."""
    import torch

    import vlmops
    from vlmops import dispatch
    from vlmops.ops.compare import largest_error, mismatch

    device = torch.device("cpu" if dry_run else "cuda")
    wrong = ran = 0
    for op in vlmops.ops.__all__:
        spec = vlmops.ops.spec(op)
        for backend in ["cpu"] if dry_run else ["cuda", "triton"]:
            reason = dispatch.unavailable(op, backend, device.type)
            if reason is not None:
                print(f"{op} {backend}: left out: {reason}")
                wrong += backend == "cuda"
                continue
            for case in spec.few:
                for dtype in (torch.float32, torch.bfloat16):
                    torch.manual_seed(0)
                    args = case.make(dtype, device)
                    names = spec.differentiable_in(args)
                    leaves = {n: args[n].detach().requires_grad_() for n in names}
                    outputs = spec.function(**{**args, **leaves}, backend=backend)
                    upstream = [torch.randn_like(o) for o in outputs]
                    torch.autograd.grad(outputs, list(leaves.values()), upstream)
                    exact, eager = spec.reference(**args), spec.eager_for(args)(**args)
                    for o, x, e in zip(outputs, exact, eager, strict=True):
                        problem = mismatch(o.detach(), x, dtype, largest_error(e, x))
                        if problem is not None:
                            print(f"{op} {backend} {case.name} {dtype}: {problem}")
                            wrong += 1
                    ran += 1
    print(f"{ran} calls forward and backward, {wrong} wrong")
    return int(wrong > 0 or ran == 0)


def calls(out: Path, dry_run: bool) -> int:
    """The same cases on the compiled backend alone: what sanitizers watch.

    With the reference and Triton, whose kernels they would look into as well, they take minutes.
    """
    import torch

    import vlmops

    device, ran = torch.device("cpu" if dry_run else "cuda"), 0
    for op in vlmops.ops.__all__:
        spec = vlmops.ops.spec(op)
        for case in spec.few:
            torch.manual_seed(0)
            made = case.make(torch.bfloat16, torch.device("cpu"))
            args = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in made.items()}
            names = spec.differentiable_in(args)
            leaves = {n: args[n].detach().requires_grad_() for n in names}
            outputs = spec.function(**{**args, **leaves}, backend=device.type)
            upstream = [torch.ones(o.shape, dtype=o.dtype).to(device) for o in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), upstream)
            ran += 1
    if not dry_run:
        torch.cuda.synchronize()
    print(f"{ran} calls forward and backward")
    return int(ran == 0)


def patched(out: Path, dry_run: bool) -> int:
    """Tiny models of Hugging Face's, before and after `vlmops.patch`: logits and gradients."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    import torch
    from dispatch import CountOps  # type: ignore[import-not-found]
    from hf import checks, tiny  # type: ignore[import-not-found]

    import vlmops

    device, wrong = torch.device("cpu" if dry_run else "cuda"), 0
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # on by default; 6e-5 of a convolution's gradient
    for family in FAMILIES[:1] if dry_run else FAMILIES:
        model = tiny.build(family).to(device)
        batch = {k: v.to(device) for k, v in checks.batch_of(family, "several_images").items()}
        before, grads = checks.gradients(model, batch)
        report = vlmops.patch(model)
        with CountOps() as ran:
            after, our_grads = checks.gradients(model, batch)
        calls = {n.split("::")[1]: c for n, c in ran.counts.items() if n.startswith("vlmops")}
        try:
            checks.assert_agree(after, before, "logits")
            checks.assert_gradients_agree(our_grads, grads)
            assert calls, f"no call of ours; {report}"
        except AssertionError as error:
            print(f"{family}: {error}")
            wrong += 1
        else:
            print(f"{family}: logits and {len(grads)} gradients agree; ours: {calls}")
    return int(wrong > 0)


def plots(out: Path, dry_run: bool) -> int:
    """SVG of every report."""
    from vlmops.cli import main as vlmops

    reports = [str(p) for p in (out / "bench.json", out / "bench-headline.json") if p.exists()]
    return vlmops(["bench", "plot", *reports, "--out", str(out / "plots")])


PARTS: dict[str, Callable[[Path, bool], int]] = {
    "environment": environment,
    "imports": imports,
    "small": small,
    "calls": calls,
    "patched": patched,
    "plots": plots,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
