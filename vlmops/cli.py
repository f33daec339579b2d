"""The command ``vlmops``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import vlmops


class CommandError(Exception):
    """Ends a command: one line for the user, and the exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line, in one line."""

    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the whole usage."""
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, the same for every command; its value is for `write_json`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=_json_target,
        metavar="PATH",
        help="print JSON in place of text; with PATH, write it there besides the text",
    )


def _json_target(text: str) -> str:
    path = Path(text)  # looked at before minutes of measuring, not after
    writable = os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    if text != "-" and (path.is_dir() or not writable):
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, in a folder that exists, got {text}"
        )
    return text


def write_json(target: str, data: Any) -> None:
    """Writes to stdout if ``target`` is ``-``, else to the file of that name."""
    text = json.dumps(data, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise CommandError(f"--json: {target} cannot be written ({error.strerror})") from error


def _sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1, as 256,1024, got {text}")
    return [int(size) for size in sizes]


def _answer(args: argparse.Namespace, text: str, data: Any) -> None:
    if args.json != "-":
        print(text)
    if args.json is not None:
        write_json(args.json, data)


def _parser() -> Parser:
    parser = Parser(
        prog="vlmops",
        description="Speed-up kernels for vision-language models.",
        epilog="Every command takes --json [PATH] and says in its --help what its exit codes mean.",
    )
    parser.add_argument("--version", action="version", version=f"vlmops {vlmops.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    bench = commands.add_parser(
        "bench",
        help="measure an op on this machine",
        description="Measures an op against eager, torch.compile and the speed of memory, forward "
        "and backward, without and with huge pages in torch's allocator. Results are checked "
        "before they are timed.",
        epilog="'vlmops bench plot' draws results, 'vlmops bench compare' compares revisions. "
        "Exit code: 0 measured, or listed; 1 a result is wrong, or faster than the device can be; "
        "2 the command is wrong.",
    )
    bench.add_argument("op", metavar="OP", help="the op's name, e.g. mrope")
    bench.add_argument(
        "--model",
        action="append",
        help="measure at this model's shapes, text and tower, e.g. qwen2_vl-7b; may be repeated; "
        "'list' lists them",
    )
    bench.add_argument(
        "--sizes",
        type=_sizes,
        help="with --model: tokens and patches, e.g. 256,1024,4096 (default: typical ones)",
    )
    _add_what(bench)
    bench.add_argument(
        "--device",
        default="cpu",
        help="cpu (default), cuda, or rehearsal: what cuda would do, on the CPU with a made-up "
        "clock",
    )
    bench.add_argument(
        "--against",
        type=lambda text: text.split(","),
        help="what else is timed, of eager, compile, linear, sdpa, sdpa_loop and sdpa_folded "
        "(default: all; linear: the bare products of an op that is mostly products; sdpa: torch's "
        "fused attention, called once, once a segment, or with a group's heads as queries)",
    )
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    bench.add_argument("--quick", action="store_true", help="few rounds: a look, not a claim")
    bench.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="start no further case after so long; what was measured is reported",
    )
    add_json(bench)
    bench.set_defaults(run=_bench)

    plot = commands.add_parser(
        "bench plot",
        help="draw what bench wrote as JSON",
        description="Draws times and per cent of copy speed against size: one SVG for each series "
        "of cases, dtype and setting of huge pages.",
        epilog="Exit code: 0 drawn; 2 a RESULT is no report or has nothing to draw, or the "
        "figures cannot be written.",
    )
    plot.add_argument("results", nargs="+", metavar="RESULT", type=Path, help="a report in JSON")
    plot.add_argument("--out", metavar="FOLDER", type=Path, default=Path(), help="where to (here)")
    add_json(plot)
    plot.set_defaults(run=_plot)

    compare = commands.add_parser(
        "bench compare",
        help="measure this checkout against another revision",
        description="Builds another revision of this checkout, and the checkout as it is, and "
        "times an op of both in turn.",
        epilog="Exit code: 0 nothing is slower; 1 something is, beyond threshold and noise, or "
        "computes something wrong; 2 the command is wrong, or something could not be measured.",
    )
    compare.add_argument("op", metavar="OP", help="the op's name, e.g. mrope")
    compare.add_argument("--base", metavar="REV", required=True, help="e.g. main or HEAD~3")
    compare.add_argument(
        "--threshold",
        type=float,
        default=1.05,
        help="new over base, from which on it is slower if the noise allows (default 1.05)",
    )
    _add_what(compare)
    add_json(compare)
    compare.set_defaults(run=_compare)

    inspect = commands.add_parser(
        "inspect",
        help="what vlmops.patch would do to a model, from its config alone",
        description="Builds a model on the meta device, from its config, patches it and prints the "
        "report. Needs no weights and no network.",
        epilog="Exit code: 0 something would be patched; 1 nothing would; 2 the command is wrong, "
        "or there is no such model.",
    )
    inspect.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model type (qwen2_vl), a folder with a config.json (./qwen2_vl), or an id on the "
        "Hub whose config is in the local cache",
    )
    inspect.add_argument(
        "--all", action="store_true", help="every vision-language model type, in place of MODEL"
    )
    inspect.add_argument("--markdown", action="store_true", help="with --all: a table in Markdown")
    add_json(inspect)
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser(
        "doctor",
        help="whether vlmops works here, and what would make it faster",
        description="Looks at torch, transformers, the compiled library, the CPU, threads, huge "
        "pages, environment variables, and at the places where vlmops.patch gets into models.",
        epilog="Exit code: 0 vlmops works; 1 something keeps it from working; 2 the command is "
        "wrong.",
    )
    doctor.add_argument(
        "--sites",
        action="store_true",
        help="patch every vision-language model type of transformers: half a minute",
    )
    add_json(doctor)
    doctor.set_defaults(run=_doctor)

    commands.add_parser("demo", help="see what vlmops does to a model", add_help=False)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    """What to measure, and on what."""
    parser.add_argument("--case", action="append", help="a shape; may be repeated (default: all)")
    parser.add_argument(
        "--dtype",
        action="append",
        help="float32, bfloat16 or float16; may be repeated (default: float32 and bfloat16)",
    )
    parser.add_argument("--threads", type=int, help="bound threads (default: one per core)")
    parser.add_argument(
        "--isa",
        help="cap the instruction set of vlmops and torch: portable, avx2, avx512 "
        "(default: the machine's best)",
    )


def _bench(args: argparse.Namespace) -> int:
    from vlmops.bench import report, runner, shapes

    if "list" in (args.model or ()):
        runner.request(args.op)  # there is such an op
        _answer(args, "\n".join(shapes.MODELS), {"models": list(shapes.MODELS)})
        return 0
    request = runner.request(
        args.op,
        args.case,
        args.dtype,
        args.isa,
        not args.no_compile,
        args.quick,
        args.model,
        args.sizes,
        args.device,
        args.against,
        args.budget,
    )
    measured = runner.run(request, args.threads)
    _answer(args, report.table(measured), measured)
    for error in measured.get("errors", ()):
        print(f"vlmops bench: {error}", file=sys.stderr)
    if measured.get("errors"):
        return 1
    disturbed = report.busy(measured["rows"], measured["threads"])
    if disturbed is not None:
        print(f"vlmops bench: {disturbed}", file=sys.stderr)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from vlmops.bench import plot

    reports = [(plot.load(path), path.stem) for path in args.results]
    written = [str(path) for report in reports for path in plot.write(*report, args.out)]
    _answer(args, "\n".join(written), {"written": written})
    return 0


def _compare(args: argparse.Namespace) -> int:
    from vlmops.bench import compare, runner

    request = runner.request(args.op, args.case, args.dtype, args.isa)
    result = compare.run(args.base, request, args.threads, args.threshold)
    _answer(args, compare.table(result), result)
    verdicts = {row["verdict"] for row in result["rows"]}
    if "slower" in verdicts:
        return 1
    if "not measured" in verdicts:
        raise CommandError("the machine was too busy to measure everything; run it again")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from vlmops import doctor

    findings = doctor.examine(args.sites)
    result = doctor.to_dict(findings)
    _answer(args, doctor.report(findings), result)
    return 0 if result["works"] else 1


def _inspect(args: argparse.Namespace) -> int:
    if args.all == (args.model is not None) or (args.markdown and not args.all):
        raise CommandError(
            "expected a MODEL, or --all with or without --markdown; --json takes the next word for "
            "its PATH, so let it come last"
        )
    from vlmops import survey

    try:
        if not args.all:
            found = survey.inspect(args.model)
            _answer(args, str(found), found.to_dict())
            return 0 if found.patched else 1
        every = []
        for inspection in survey.inspect_all():
            every.append(inspection)
            if sys.stderr.isatty():
                print(f"\r{len(every)} {inspection.model_type:24}", end="\r", file=sys.stderr)
    except ImportError as error:
        raise CommandError(str(error)) from error
    text = survey.markdown(every) if args.markdown else survey.table(every)
    _answer(args, text, [inspection.to_dict() for inspection in every])
    return 0 if any(inspection.patched for inspection in every) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["demo"]:  # not through argparse: every option is the demo's own
            from vlmops import demo

            return demo.main(argv[1:])
        if argv[:2] in (["bench", "plot"], ["bench", "compare"]):
            argv = [" ".join(argv[:2]), *argv[2:]]
        args, unknown = _parser().parse_known_args(argv)
        try:
            if unknown:  # argparse would name no command
                raise CommandError(
                    f"unrecognized arguments: {' '.join(unknown)}; see "
                    f"'vlmops {args.command} --help'"
                )
            code: int = args.run(args)
        except CommandError as error:
            print(f"vlmops {args.command}: {error}", file=sys.stderr)
            return error.code
        return code
    except SystemExit as stop:  # argparse: help, version, a wrong command line
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
