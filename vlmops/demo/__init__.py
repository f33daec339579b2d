"""`vlmops demo`: photographs through a vision-language model, before and after `vlmops.patch`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import vlmops
from vlmops import _library
from vlmops.bench.timer import DISTURBED
from vlmops.cli import CommandError, Parser, add_json, write_json
from vlmops.demo.inputs import (
    DemoError,
    Subject,
    checkpoint_subject,
    first_line,
    need,
    pictures,
    random_subject,
)
from vlmops.demo.measure import Agreement, Generation, compare, generate, time_stages, tolerance

_DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str], config: Any = None) -> int:
    """Runs the demo.

    Args:
        argv: Arguments of the command line, without the program's name.
        config: A `Qwen2VLConfig` for the random model, in place of the 2B model's.

    Returns:
        0 if tokens and logits agree before and after patching, 1 if they do not, 2 if the demo
        could not run.
    """
    options = _parse(argv)
    progress = _Progress()
    # With JSON on stdout, the text goes to stderr.
    text = sys.stderr if options.json == "-" else sys.stdout
    try:
        if _library.error is not None:
            raise DemoError(_library.error)
        runs = []
        with contextlib.redirect_stdout(text):
            for dtype in [options.dtype] if options.dtype else _DTYPES:
                options.dtype = dtype
                runs.append(_run(options, config, progress))
        if options.json is not None:
            write_json(options.json, {"runs": runs})
    except (DemoError, CommandError) as error:
        print(f"vlmops demo: {error}", file=sys.stderr)
        return 2
    return 0 if all(run["agreement"]["agree"] for run in runs) else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="vlmops demo",
        description="Generates from photographs before and after vlmops.patch, compares tokens and "
        "logits, and times each stage. Without --model: Qwen2-VL with random weights, no network.",
        epilog="Exit code: 0 tokens and logits agree before and after; 1 they do not; 2 the "
        "command is wrong, or the demo could not run.",
    )
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="PATH", help="a picture; repeatable")
    add("--image-size", type=_positive, default=252, metavar="PX",
        help="pictures are first made to fit a square of this side (default 252)")  # fmt: skip
    add("--model", metavar="PATH_OR_ID", help="a checkpoint: a directory, or an id on the Hub")
    add("--prompt", help="the question, with --model (default: 'What do the pictures show?')")
    add("--layers", type=_positive, help="text layers of the random model (default 4)")
    add("--vision-layers", type=_positive, help="its vision layers (default 2)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: float32, then bfloat16)")  # fmt: skip
    add("--new-tokens", type=_positive, default=16, metavar="N", help="to generate (default 16)")
    add("--repeat", type=_positive, metavar="N",
        help="timed runs each way (default: what fits 16 s, from 1 to 5)")  # fmt: skip
    add_json(parser)
    options = parser.parse_args(argv)
    if options.model and (options.layers or options.vision_layers):
        parser.error("--layers and --vision-layers shape the random model; leave out --model")
    if options.prompt and not options.model:
        parser.error("--prompt needs a tokenizer; give a checkpoint with --model")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


class _Progress:
    """Lines on stderr with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, what: str) -> None:
        sys.stdout.flush()
        elapsed = time.perf_counter() - self.start
        print(f"[{elapsed:5.1f} s] {what}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, config: Any, progress: _Progress) -> dict[str, Any]:
    progress("importing transformers")
    need("transformers")
    subject = _subject(options, config, progress)
    _print_setting(subject, options)
    model = subject.model

    progress("first generation, as Hugging Face has it")
    before = _first_generation(subject, options)
    start = time.perf_counter()
    with vlmops.patched(model) as report:
        patching = time.perf_counter() - start
        print(f"\n{report}\n")
        if not sum(report.counts.values()):
            raise DemoError("nothing in this model could be patched; the report says why")
        progress("first generation, patched")
        after = generate(subject, options.new_tokens)
    progress("one prefill with Hugging Face's other attention, to size rounding errors")
    agreement = compare(before, after, tolerance(subject, before))
    _print_agreement(agreement, subject, before, after)

    results = _results(subject, options, agreement, report)
    if agreement.agree:
        times = time_stages(subject, options.new_tokens, options.repeat, after, progress)
        times |= {"preprocessing": subject.preprocessing, "patching": patching}
        _print_times(times)
        results |= times
    else:
        print(
            "vlmops demo: tokens or logits disagree, so nothing was timed; please report this with "
            "the output above, and use the model unpatched",
            file=sys.stderr,
        )
    return results


def _first_generation(subject: Subject, options: argparse.Namespace) -> Generation:
    """Also tells whether the model runs at all, before vlmops has touched it."""
    try:
        return generate(subject, options.new_tokens)
    except Exception as error:
        if not options.model:
            raise
        raise DemoError(
            f"--model {options.model}: it fails to generate, unpatched ({first_line(error)}); the "
            "demo needs a chat model that takes images"
        ) from error


def _subject(options: argparse.Namespace, config: Any, progress: _Progress) -> Subject:
    shown = pictures(options.image, options.image_size)
    dtype = getattr(torch, options.dtype)
    if options.model:
        progress(f"loading {options.model} (from the Hub if it is neither a directory nor cached)")
        prompt = options.prompt or "What do the pictures show?"
        return checkpoint_subject(shown, options.model, prompt, dtype)
    progress("building Qwen2-VL with random weights")
    return random_subject(shown, options.layers or 4, options.vision_layers or 2, dtype, config)


def _print_setting(subject: Subject, options: argparse.Namespace) -> None:
    transformers = need("transformers")
    print(
        f"vlmops {vlmops.__version__} demo: one model and prompt, before and after vlmops.patch\n"
    )
    setting = {
        "machine": f"{torch.get_num_threads()} threads, vlmops kernels for {vlmops.cpu_isa()}; "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        **subject.description,
    }
    setting["prompt"] += f"; up to {options.new_tokens} new tokens, greedy"
    for name, text in setting.items():
        print(_block(name, text))


def _block(name: str, text: str) -> str:
    return f"  {name:<10}" + text.replace("\n", "\n" + " " * 12)


def _print_agreement(
    agreement: Agreement, subject: Subject, before: Generation, after: Generation
) -> None:
    a = agreement
    relative = a.worst / a.largest if a.largest else math.inf
    print(f"Agreement: {'yes' if a.agree else 'NO'}\n")
    print(_block("tokens", f"{a.equal_tokens} of {a.tokens} equal{_difference(a)}"))
    print(_block("argmax", f"the same in {a.argmax} of the {a.steps} steps compared"))
    print(_block("logits", f"differ by {a.prefill:.2g} in the prefill, by {a.worst:.2g} at worst;"
                 f" the largest is {a.largest:.3g} ({relative:.1g} of it)"))  # fmt: skip
    print(_block("tolerance", f"{a.tolerance:.2g}: 3 x what Hugging Face's own eager and SDPA "
                 "attention differ by here,\nits convolutions in float64 besides: what a change of "
                 "rounding makes of these logits"))  # fmt: skip
    for name, generation in (("before", before), ("after", after)):
        print(_block(name, _shown(subject, generation)))


def _difference(a: Agreement) -> str:
    if a.first_difference is None or a.margin is None:
        return ""
    verdict = "a tie within rounding" if a.margin <= 2 * a.tolerance else "NOT a tie"
    return (
        f"; first difference at step {a.first_difference + 1},\nwhere the two tokens' logits are "
        f"{a.margin:.2g} apart: {verdict}"
    )


def _shown(subject: Subject, generation: Generation) -> str:
    if subject.decode is not None:
        return repr(subject.decode(generation.tokens))
    ids = generation.tokens
    return " ".join(map(str, ids[:12])) + (" ..." if len(ids) > 12 else "")


def _print_times(times: dict[str, Any]) -> None:
    print(f"\nTimes: medians of {times['repeats']}, before and after in turn\n")
    print(f"  {'stage':<26}{'before':>10}{'after':>10}{'speed':>9}")
    print(f"  {'image preprocessing':<26}{_seconds(times['preprocessing']):>10}"
          f"{'':>10}{'':>9}  not touched by vlmops, timed once")  # fmt: skip
    for name, row in {**times["stages"], **times["rope"]}.items():
        print(f"  {name:<26}{_row(row, times)}")
    print(f"  {'vlmops.patch itself':<26}{'':>10}{_seconds(times['patching']):>10}")
    print()
    print("\n".join(_conclusions(times)))


def _row(row: dict[str, float], times: dict[str, Any]) -> str:
    before, after = row["before"], row["after"]
    shown = f"{_seconds(before):>10}{_seconds(after):>10}"
    if _busy(times):
        return shown + f"{'?':>9}"
    # Of one or two rounds the spread is not known.
    noise = max(row["spread"], 0.02 if times["repeats"] > 2 else 0.1)
    larger, smaller = max(before, after), min(before, after)
    remark = "  within the noise" if larger / smaller - 1 <= noise else ""
    return shown + f"{before / after:>8.2f}x{remark}"


def _busy(times: dict[str, Any]) -> bool:
    waiting: float = times["waiting"]
    return waiting > DISTURBED


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _conclusions(times: dict[str, Any]) -> list[str]:
    lines = []
    rope = times["rope"].get("rope in the text prefill")
    if rope is not None:
        text = times["stages"]["text prefill"]
        before, after = (rope[side] / text[side] for side in ("before", "after"))
        lines += [
            f"Rope was {before:.1%} of the text prefill and is {after:.1%} now, by a clock that "
            "adds a little to both.",
            "No faster rope can save more of the prefill than the first figure.",
        ]
    if times["repeats"] < 3 and not _busy(times):
        lines.append("Few rounds: differences below 10 % say nothing; --repeat 5 is steadier.")
    if _busy(times):
        lines.append(
            f"Other programs kept the timed runs waiting for a core {times['waiting']:.0%} of the "
            "time, so before\nand after cannot be compared: stop them and run this again."
        )
    if "OMP_PROC_BIND" not in os.environ:
        lines.append("Threads are not bound; steadier with OMP_PROC_BIND=true OMP_PLACES=cores.")
    return lines


def _results(
    subject: Subject,
    options: argparse.Namespace,
    agreement: Agreement,
    report: Any,
) -> dict[str, Any]:
    return {
        "versions": {
            "vlmops": vlmops.__version__,
            "torch": torch.__version__,
            "transformers": need("transformers").__version__,
        },
        "cpu_isa": vlmops.cpu_isa(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        **subject.description,
        "agreement": {"agree": agreement.agree, **_finite(dataclasses.asdict(agreement))},
        "report": report.to_dict(),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    infinite = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: str(v) if k in infinite else v for k, v in values.items()}
