"""The table of a report, for people: plain text, 110 columns if the cases have short names."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

BUSY = 0.2
"""From this part of voided samples on, the machine is called busy."""

_REASON = 60
_HEAD = (
    f"{'dtype':10}{'direction':11}{'variant':17}{'ms':>10}{'spread':>8}{'GB/s':>8}"
    f"{'% copy':>8}{'% clone':>9}{'x eager':>9}{'void':>8}"
)
_GPU_HEAD = (
    f"{'dtype':10}{'direction':11}{'variant':17}{'us':>9}{'spread':>7}{'GB/s':>7}"
    f"{'% copy':>7}{'% best':>7}{'x eager':>8}{'call us':>8} by"
)
_GPU_NOTES = """\
us       median of one call on the device, L2 cold; spread is the distance of the quartiles
GB/s     what any implementation must read and write once, over the time
% copy   time of copying the same tensors into memory that exists, over the time
% best   GB/s over those of the best large copy in this run; above 100 is an error, not a number
x eager  time of eager in that direction over the time; backward is autograd.grad on a kept graph
x prod.  the time over that of the fastest bare product, of an op that is mostly products
call us  one call from Python with the device idle before and after it, L2 warm
by       graph: replayed from a CUDA graph; events: launched from Python, since not capturable
launch   a kernel that does nothing, timed in the same way"""
_NOTES = """\
ms       median of one call; spread is the distance of the quartiles, in per cent of the median
GB/s     what any implementation must read and write once, over the time
% copy   time of copying the same tensors into memory that exists, over the time
% clone  the same into fresh memory, as results out of place are
x eager  time of eager in that direction over the time; backward is autograd.grad on a kept graph
x prod.  the time over that of the fastest bare product, of an op that is mostly products
void     samples thrown away because threads had to wait for a core, of all that were taken"""


def table(report: dict[str, Any]) -> str:
    """The whole report: where it was measured, one line per row, what the columns mean."""
    if report["device"]["type"] != "cpu":
        return _gpu_table(report)
    lines = [*_header(report), ""]
    width = max(12, *(len(row["case"]) + 2 for row in report["rows"]))
    by_thp = itertools.groupby(report["rows"], key=lambda row: row["thp_mem_alloc"])
    for thp, rows in by_thp:
        lines += [f"THP_MEM_ALLOC_ENABLE={int(thp)}", f"{'case':{width}}{_HEAD}"]
        for _, group in itertools.groupby(rows, key=lambda row: (row["case"], row["dtype"])):
            lines += [_line(row, width) for row in group]
            lines.append("")
    return "\n".join([*lines, _NOTES])


def _gpu_table(report: dict[str, Any]) -> str:
    device, versions, ceilings = report["device"], report["versions"], report["ceilings"]
    commit = report["commit"]
    source = "no commit" if commit is None else f"commit {commit[:10]}"
    products = ", ".join(f"{n} {v:.0f}" for n, v in ceilings["matmul_tflops"].items())
    width = max(12, *(len(row["case"]) + 2 for row in report["rows"]))
    lines = [
        f"{report['op']} on {device['name']} ({device['capability']}), driver {device['driver']}",
        f"vlmops {versions['vlmops']}, {source}{' with changes' if report['dirty'] else ''}; "
        f"{report['date']}",
        f"torch {versions['torch']}, CUDA {versions['cuda']}, triton {versions['triton']}, "
        f"python {versions['python']}",
        f"ceilings: copy {ceilings['copy_gb_per_s']:.0f} GB/s; matmul, TFLOP/s: {products}; "
        f"launch {ceilings['launch_us']:.2f} us",
        f"backends: {', '.join(f'{v} = {b}' for v, b in report['backends'].items())}",
        "",
        f"{'case':{width}}{_GPU_HEAD}",
    ]
    groups = itertools.groupby(report["rows"], key=lambda row: (row["case"], row["dtype"]))
    for _, group in groups:
        lines += [_gpu_line(row, width) for row in group] + [""]
    return "\n".join([*lines, _GPU_NOTES])


def _gpu_line(row: dict[str, Any], width: int) -> str:
    start = f"{row['case']:{width}}{row['dtype']:10}{row['direction']:11}{row['variant']:17}"
    if "unavailable" in row:
        return start + textwrap.shorten(row["unavailable"], _REASON, placeholder=" ..")
    spread = 100 * (row["p75_ms"] - row["p25_ms"]) / row["median_ms"]
    start += f"{row['median_ms'] * 1e3:9.2f}{spread:6.0f}%"
    if row["variant"] == "launch":
        return f"{start}{'':37} {row['timing']}"
    eager = "" if row["times_eager"] is None else f"{row['times_eager']:.2f}"
    call = f"{row['latency_ms'] * 1e3:.1f}" if "latency_ms" in row else ""
    return (
        f"{start}{row['gb_per_s']:7.0f}{_percent(row['percent_of_copy']):>7}"
        f"{_percent(row['percent_of_ceiling']):>7}{eager:>8}{call:>8} "
        f"{row['timing']}{_over_product(row)}"
    )


def busy(rows: Sequence[dict[str, Any]], threads: int) -> str | None:
    """What to tell if other programs disturbed too much of the measurement."""
    voided = sum(row.get("voided", 0) for row in rows)
    taken = voided + sum(row.get("samples", 0) for row in rows)
    if voided <= BUSY * taken:
        return None
    fewer = max(1, threads - 1)
    return (
        f"the machine is busy: {voided} of {taken} samples are void, as other programs held the "
        f"cores; stop them, or leave them a core with --threads {fewer}, and run again"
    )


def _header(report: dict[str, Any]) -> Iterator[str]:
    versions, isa, commit = report["versions"], report["isa"], report["commit"]
    source = "no commit" if commit is None else f"commit {commit[:10]}"
    yield (
        f"{report['op']} on {report['device']['name']}, threads: {report['threads']}, bound; "
        f"{isa['vlmops']} (torch: {isa['torch']})"
    )
    yield (
        f"vlmops {versions['vlmops']}, {source}{' with changes' if report['dirty'] else ''}; "
        f"torch {versions['torch']}; python {versions['python']}; {report['date']}"
    )
    yield f"kernel's transparent huge pages: {report['huge_pages'] or 'unknown'}"


def _line(row: dict[str, Any], width: int) -> str:
    start = f"{row['case']:{width}}{row['dtype']:10}{row['direction']:11}{row['variant']:17}"
    if "unavailable" in row:
        return start + textwrap.shorten(row["unavailable"], _REASON, placeholder=" ..")
    void = f"{row['voided']}/{row['voided'] + row['samples']}"
    spread = 100 * (row["p75_ms"] - row["p25_ms"]) / row["median_ms"]
    eager = "" if row["times_eager"] is None else f"{row['times_eager']:.2f}"
    return (
        f"{start}{row['median_ms']:10.4f}{spread:7.0f}%{row['gb_per_s']:8.2f}"
        f"{_percent(row['percent_of_copy']):>8}{_percent(row['percent_of_clone']):>9}{eager:>9}"
        f"{void:>8}{_over_product(row)}"
    )


def _over_product(row: dict[str, Any]) -> str:
    return f"  {row['over_product']:.2f} x product" if "over_product" in row else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
