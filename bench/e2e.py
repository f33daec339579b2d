"""Measures a whole model: prefill and decoding as Hugging Face has them, and patched.

    python bench/e2e.py [--model internvl] [--isa avx2] [--dtype bfloat16] [--json PATH]

A Qwen2-VL of the 2B model's width, 4 + 4 layers, random weights, one picture of 1,024 tokens; or
one of bench/models.py. The variants are copies that share their weights, timed in turns by
vlmops.bench's clock, which voids what other programs disturbed. Their logits are compared first.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import models
import torch

import vlmops
from vlmops.bench import measure, runner
from vlmops.bench.timer import interleave
from vlmops.demo.inputs import pictures, random_subject

STARTED = "_VLMOPS_BENCH_STARTED"
"""In the environment of a command that was started again; OMP_PROC_BIND may be the caller's."""

QWEN2_VL = "qwen2_vl"
VARIANTS = {"unpatched": [], "linear": ["linear"], "all": None}
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # of the largest logit


def variants(model):
    """Copies of a model that share its tensors, and what was patched in each."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twins = {name: copy.deepcopy(model, dict(shared)) for name in VARIANTS}
    return twins, {name: vlmops.patch(twins[name], ops=ops) for name, ops in VARIANTS.items()}


def calls_of(model, inputs):
    """Prefill of the prompt, and decoding of one token after it."""

    def prefill():
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        return model(**inputs, use_cache=True, logits_to_keep=1)

    out = prefill()
    cache = out.past_key_values
    token = torch.tensor([[7]])

    def decode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return out.logits, {"prefill": prefill, "decode": decode}


def subject_of(name, dtype, options):
    """A model and its inputs."""
    if name != QWEN2_VL:
        return models.made(name, dtype)
    shown = pictures([], options.side)[:1]
    shown[0].image = shown[0].image.resize((options.side, options.side))
    subject = random_subject(shown, 4, 4, dtype)
    return subject.model, subject.inputs


@torch.no_grad()
def measured(name_of_model, dtype, options):
    """Rows of one model and dtype."""
    model, inputs = subject_of(name_of_model, getattr(torch, dtype), options)
    twins, reports = variants(model)
    calls: dict = {}
    logits = {}
    for name, model in twins.items():
        logits[name], of_model = calls_of(model, inputs)
        calls |= {(stage, name): call for stage, call in of_model.items()}
    largest = logits["unpatched"].abs().max()
    for name, got in logits.items():
        error = float((got - logits["unpatched"]).abs().max() / largest)
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"e2e: {dtype}, {name}: logits are off by {error:.2g}: not timed")
    for stage in ("decode", "prefill"):
        group = {key: call for key, call in calls.items() if key[0] == stage}
        timings = timings_of(group, options)
        theirs = timings[stage, "unpatched"].median
        for (_, name), timing in timings.items():
            median = timing.median
            yield {
                "model": name_of_model,
                "dtype": dtype,
                "stage": stage,
                "tokens": inputs["input_ids"].shape[1],
                "variant": name,
                "sites": reports[name].counts,
                "samples": timing.samples,
                "voided": timing.voided,
                "median_ms": None if median is None else median * 1e3,
                "times_unpatched": theirs / median if theirs and median else None,
            }


def options_of(description, **more):
    """The command line; starts the command again with what torch reads at its start."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, (value, text) in more.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    parser.add_argument("--isa", choices=list(runner.TORCH_CAPS), help="cap the instruction set")
    parser.add_argument("--dtype", choices=runner.DTYPES, action="append")
    parser.add_argument("--seconds", type=float, default=30, help="of timing for each comparison")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, by the time it runs: for a machine that others use too",
    )
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args()
    if STARTED not in os.environ:
        env = {**runner.bound(options.isa, 1 if options.cpu_time else None), STARTED: "1"}
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=env).returncode)
    return options


def timings_of(calls, options):
    """`interleave`, by the chosen clock."""
    if not options.cpu_time:
        return interleave(calls, options.seconds, (3, 60))
    clock = time.process_time
    return interleave(calls, options.seconds, (3, 60), clock=clock, waiting=lambda: {0: 0.0})


def write(options, op, rows):
    """The report, as vlmops bench writes it; its kind tells that it has other rows."""
    if options.json is not None:
        report = {
            "schema": runner.SCHEMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "kind": f"bench/{op}.py",
            "op": op,
            "clock": "cpu" if options.cpu_time else "wall",
            **runner.commit(),
            **measure.environment(torch.device("cpu")),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def main():
    of_qwen = f"pixels of {QWEN2_VL}'s picture, 28 to a token"
    known = f"{QWEN2_VL}, {', '.join(models.MAKERS)}, or all"
    options = options_of(__doc__, side=(896, of_qwen), model=(QWEN2_VL, known))
    names = [QWEN2_VL, *models.MAKERS] if options.model == "all" else [options.model]
    unknown = set(names) - {QWEN2_VL, *models.MAKERS}
    if unknown:
        raise SystemExit(f"e2e: --model: expected {known}, got {options.model}")
    rows = []
    for name, dtype in itertools.product(names, options.dtype or ("float32", "bfloat16")):
        for row in measured(name, dtype, options):
            rows.append(row)
            shown = "busy" if row["median_ms"] is None else f"{row['median_ms']:.1f} ms"
            ratio = row["times_unpatched"]
            print(
                f"{name:10} {dtype:9} {row['stage']:8} {row['variant']:10}{shown:>12}"
                f"{f'{ratio:.2f}x' if ratio else '':>8}  void {row['voided']}",
                flush=True,
            )
    write(options, "e2e", rows)


if __name__ == "__main__":
    main()
