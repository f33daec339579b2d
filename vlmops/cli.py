"""The command ``vlmops``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import vlmops


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line, in one line."""

    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the whole usage."""
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def _parser() -> Parser:
    parser = Parser(prog="vlmops", description="Speed-up kernels for vision-language models.")
    parser.add_argument("--version", action="version", version=f"vlmops {vlmops.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    bench = commands.add_parser(
        "bench",
        help="measure an op on this machine",
        description="Measures an op against eager, torch.compile and the speed of memory, forward "
        "and backward, without and with huge pages in torch's allocator. Results are checked "
        "before they are timed.",
        epilog="Exit code: 0 measured; 1 a result is wrong; 2 the command is.",
    )
    bench.add_argument("op", metavar="OP", help="the op's name, e.g. mrope")
    bench.add_argument("--case", action="append", help="a shape; may be repeated (default: all)")
    bench.add_argument(
        "--dtype",
        action="append",
        help="float32, bfloat16 or float16; may be repeated (default: float32 and bfloat16)",
    )
    bench.add_argument("--threads", type=int, help="bound threads (default: one per core)")
    bench.add_argument(
        "--isa",
        help="cap the instruction set of vlmops and torch: portable, avx2 or avx512 "
        "(default: the machine's best)",
    )
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    bench.add_argument("--quick", action="store_true", help="few rounds: a look, not a claim")
    bench.add_argument("--json", metavar="PATH", type=Path, help="write the report there as JSON")
    bench.set_defaults(run=_bench)

    commands.add_parser("demo", help="see what vlmops does to a model", add_help=False)
    return parser


def _bench(args: argparse.Namespace) -> int:
    from vlmops.bench import BenchError, report, runner

    try:
        request = runner.request(
            args.op, args.case, args.dtype, args.isa, not args.no_compile, args.quick
        )
        if args.json is not None:
            _check_writable(args.json)
        measured = runner.run(request, args.threads)
    except BenchError as error:
        print(f"vlmops bench: {error}", file=sys.stderr)
        return error.code
    print(report.table(measured))
    if args.json is not None:
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    disturbed = report.busy(measured["rows"], measured["threads"])
    if disturbed is not None:
        print(f"vlmops bench: {disturbed}", file=sys.stderr)
    return 0


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    from vlmops.bench import BenchError

    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(
            f"--json: expected a file that can be written, in a folder that exists, got {path}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["demo"]:  # not through argparse: every option is the demo's own
            from vlmops import demo

            return demo.main(argv[1:])
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        return code
    except SystemExit as stop:  # argparse: help, version, a wrong command line
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
