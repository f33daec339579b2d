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
_NOTES = """\
ms       median of one call; spread is the distance of the quartiles, in per cent of the median
GB/s     what any implementation must read and write once, over the time
% copy   time of copying the same tensors into memory that exists, over the time
% clone  the same into fresh memory, as results out of place are
x eager  time of eager in that direction over the time; backward is autograd.grad on a kept graph
void     samples thrown away because threads had to wait for a core, of all that were taken"""


def table(report: dict[str, Any]) -> str:
    """The whole report: where it was measured, one line per row, what the columns mean."""
    lines = [*_header(report), ""]
    width = max(12, *(len(row["case"]) + 2 for row in report["rows"]))
    by_thp = itertools.groupby(report["rows"], key=lambda row: row["thp_mem_alloc"])
    for thp, rows in by_thp:
        lines += [f"THP_MEM_ALLOC_ENABLE={int(thp)}", f"{'case':{width}}{_HEAD}"]
        for _, group in itertools.groupby(rows, key=lambda row: (row["case"], row["dtype"])):
            lines += [_line(row, width) for row in group]
            lines.append("")
    return "\n".join([*lines, _NOTES])


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
        f"{void:>8}"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
