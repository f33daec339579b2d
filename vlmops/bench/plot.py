"""``vlmops bench plot``: times and per cent of copy speed against size, from a report to SVG."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vlmops.bench import BenchError
from vlmops.bench.runner import SCHEMA

# Okabe and Ito's palette, which the colour-blind can tell apart; floors are dashed.
COLORS = {
    "vlmops": "#0072B2",
    "vlmops in place": "#56B4E9",
    "eager": "#D55E00",
    "torch.compile": "#E69F00",
    "copy": "#000000",
    "clone": "#777777",
    "launch": "#AA4499",
}
_FLOORS = ("copy", "clone", "launch")
_OTHERS = ("#009E73", "#CC79A7", "#F0E442")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 360, 240, 70, 80, 80, 70

_DRAWN = "vlmops bench OP --json"
_NEEDED = {"case", "dtype", "thp_mem_alloc", "direction", "variant", "bytes"}

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values to pixels: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float
    base: int | None = None
    """Of the logarithm; None for a linear axis."""

    @classmethod
    def log(cls, values: Sequence[float], start: float, end: float, base: int) -> Axis:
        """From the power of the base below all values to the one above."""
        low = math.floor(math.log(min(values), base) + 1e-9)
        high = math.ceil(math.log(max(values), base) - 1e-9)
        return cls(float(base) ** low, float(base) ** max(high, low + 1), start, end, base)

    @classmethod
    def linear(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """From 0 to the multiple of 50 above all values."""
        return cls(0, 50 * max(1, math.ceil(max(values) / 50)), start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.base is not None:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most nine."""
        if self.base is None:
            step = 50 * math.ceil(self.high / 400)
            return [float(tick) for tick in range(0, int(self.high) + 1, step)]
        powers = round(math.log(self.high / self.low, self.base))
        return [self.low * float(self.base) ** n for n in range(0, powers + 1, 1 + powers // 9)]


def load(path: Path) -> dict[str, Any]:
    """A report that ``vlmops bench OP --json PATH`` wrote.

    Raises:
        BenchError: it is not one, or nothing in it was measured.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        schema = report["schema"] if "rows" in report else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: expected a report of {_DRAWN} ({error})") from error
    if schema != SCHEMA:
        raise BenchError(f"{path}: expected a report of schema {SCHEMA}, got {schema}")
    if "kind" in report or not all(row.keys() >= _NEEDED for row in report["rows"]):
        kind = report.get("kind", f"another that measured {report.get('op')}")
        raise BenchError(f"{path}: expected a report of {_DRAWN}, got one of {kind}")
    if not any("median_ms" in row for row in report["rows"]):
        raise BenchError(f"{path}: nothing in it was measured, so nothing is drawn; measure again")
    return report


def write(report: Mapping[str, Any], stem: str, folder: Path) -> list[Path]:
    """One figure for each series of cases, dtype and setting of huge pages.

    Args:
        report: From `load`.
        stem: What the names of the figures begin with.
        folder: Where they go; made if it is not there.
    """

    def key(row: Mapping[str, Any]) -> tuple[str, str, bool]:
        return _series(row["case"]), row["dtype"], row["thp_mem_alloc"]

    timed = sorted((row for row in report["rows"] if "median_ms" in row), key=key)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for (series, dtype, thp), rows in itertools.groupby(timed, key):
            on_cpu = _on_cpu(report)
            setting = f"-thp{int(thp)}" if on_cpu else ""
            name = f"{stem}-{series}-{dtype}{setting}.svg".replace("/", "-")
            title = f"{report['op']} {series}*, {dtype}"
            title += f", THP_MEM_ALLOC_ENABLE={int(thp)}" if on_cpu else ""
            written.append(folder / name)
            written[-1].write_text(figure(list(rows), title, _origin(report)))
    except OSError as error:
        raise BenchError(f"--out: {folder} cannot be written ({error.strerror})") from error
    return written


def _on_cpu(report: Mapping[str, Any]) -> bool:
    return bool(report["device"].get("type", "cpu") == "cpu")


def _series(case: str) -> str:
    """Cases whose names differ in their last number are one series."""
    return re.sub(r"\d+$", "", case)


def _origin(report: Mapping[str, Any]) -> str:
    commit = (report["commit"] or "no commit")[:10]
    if not _on_cpu(report):
        return (
            f"{report['device']['name']}, driver {report['device']['driver']}; "
            f"torch {report['versions']['torch']}; {commit}, {report['date'][:10]}"
        )
    return (
        f"{report['device']['name']}, {report['threads']} threads, {report['isa']['vlmops']}; "
        f"torch {report['versions']['torch']}; {commit}, {report['date'][:10]}"
    )


def figure(rows: Sequence[Mapping[str, Any]], title: str, origin: str) -> str:
    """Four panels: time above, per cent of copy speed below; forward left, backward right."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    others = dict(zip((v for v in variants if v not in COLORS), itertools.cycle(_OTHERS)))
    colors = {variant: COLORS.get(variant) or others[variant] for variant in variants}
    width = _LEFT + 2 * _WIDTH + _GAP_X + 30
    height = _TOP + 2 * (_HEIGHT + _GAP_Y)
    body = [_text(_LEFT, 22, title, size=15), _text(_LEFT, 40, origin)]
    x = float(_LEFT)
    for variant, color in colors.items():
        body += [_line([(x, 58), (x + 22, 58)], color, variant), _text(x + 27, 62, variant)]
        x += 45 + 7 * len(variant)
    for column, direction in enumerate(("forward", "backward")):
        shown = [row for row in rows if row["direction"] in (direction, "floor")]
        if all(row["direction"] == "floor" for row in shown):
            continue
        left = _LEFT + column * (_WIDTH + _GAP_X)
        for line, (measure, label) in enumerate(
            (("median_ms", f"{direction}, ms"), ("percent_of_copy", "% of copy speed"))
        ):
            series: dict[str, Points] = {}
            for row in shown:
                if row[measure] is not None:
                    series.setdefault(row["variant"], []).append((row["bytes"], row[measure]))
            if series:
                body += _panel(series, colors, left, _TOP + line * (_HEIGHT + _GAP_Y), label)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="#FFFFFF"/>',
            *body,
            "</svg>\n",
        ]
    )


def _panel(
    series: Mapping[str, Points], colors: Mapping[str, str], left: float, top: float, label: str
) -> Iterator[str]:
    right, bottom = left + _WIDTH, top + _HEIGHT
    points = [point for line in series.values() for point in line]
    x = Axis.log([x for x, _ in points], left, right, base=2)
    values = [y for _, y in points]
    unit = "ms" if label.endswith("ms") else "%"
    y = Axis.log(values, bottom, top, 10) if unit == "ms" else Axis.linear(values, bottom, top)
    for tick in x.ticks():
        yield _line([(x(tick), top), (x(tick), bottom)], "#DDDDDD")
        yield _text(x(tick), bottom + 16, _bytes(tick), anchor="middle")
    for tick in y.ticks():
        yield _line([(left, y(tick)), (right, y(tick))], "#DDDDDD")
        yield _text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end")
    yield _text((left + right) / 2, bottom + 34, "read and written", anchor="middle")
    middle = (top + bottom) / 2
    yield _text(left - 46, middle, label, anchor="middle", rotate=True)
    for variant, line in series.items():
        placed = [(x(size), y(value)) for size, value in sorted(line)]
        yield _line(placed, colors[variant], variant)
        for (cx, cy), (size, value) in zip(placed, sorted(line), strict=True):
            told = escape(f"{variant}: {_bytes(size)}, {value:.4g} {unit}")
            yield (
                f'<circle cx="{cx:.2f}" cy="{cy:.2f}" r="3.5" fill="{colors[variant]}">'
                f"<title>{told}</title></circle>"
            )


def _bytes(count: float) -> str:
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _line(points: Sequence[tuple[float, float]], color: str, variant: str = "") -> str:
    joined = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    dash = ' stroke-dasharray="6 4"' if variant in _FLOORS else ""
    width = 2 if variant else 1
    return (
        f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>'
    )


def _text(
    x: float, y: float, text: str, size: int = 12, anchor: str = "start", rotate: bool = False
) -> str:
    turn = f' transform="rotate(-90 {x:.2f} {y:.2f})"' if rotate else ""
    place = f'x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}"{turn}'
    return f"<text {place}>{escape(text)}</text>"
