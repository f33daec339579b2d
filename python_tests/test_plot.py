"""`vlmops bench plot`: valid SVG, points where their values belong, every label there."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vlmops import cli
from vlmops.bench import plot

_FOLDER = Path(__file__).parent.parent / "bench" / "results"
COMMITTED = sorted(_FOLDER.glob("*/*.json"))
# Scripts write times of models and of matrix products, which are no series over sizes.
OF_SCRIPTS = [p for p in COMMITTED if re.search("-(e2e|linear|qformer)-(?!attention)", p.name)]
RESULTS = [path for path in COMMITTED if path not in OF_SCRIPTS]
SVG = "{http://www.w3.org/2000/svg}"


def row(case, direction, variant, size, ms, percent, **changes):
    return {
        "case": case,
        "dtype": "float32",
        "thp_mem_alloc": False,
        "direction": direction,
        "variant": variant,
        "bytes": size,
        "median_ms": ms,
        "percent_of_copy": percent,
        **changes,
    }


def report(rows):
    return {
        "schema": plot.SCHEMA,
        "op": "toy <&>",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "device": {"name": "A CPU"},
        "threads": 2,
        "isa": {"vlmops": "avx2"},
        "versions": {"torch": "2.13.0"},
        "rows": rows,
    }


ROWS = [
    row("s16", "floor", "copy", 1024, 0.01, 100),
    row("s16", "forward", "vlmops", 1024, 0.02, 50),
    row("s16", "forward", "vlmops in place", 1024, 0.005, None),
    row("s64", "floor", "copy", 4096, 1.0, 100),
    row("s64", "forward", "vlmops", 4096, 10.0, 10),
    row("s64", "backward", "vlmops", 4096, 2.0, 40),
]
UNAVAILABLE = row("s64", "backward", "eager", 4096, 0, 0, unavailable="busy")
del UNAVAILABLE["median_ms"]


def panels(svg):
    """Points (x, y) and tooltips of the circles, by panel: column and line of the figure."""
    found = {}
    for circle in ET.fromstring(svg).iter(f"{SVG}circle"):
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        place = (x > plot._LEFT + plot._WIDTH + 1, y > plot._TOP + plot._HEIGHT + 1)
        found.setdefault(place, {})[circle.find(f"{SVG}title").text] = (x, y)
    return found


def test_plot_places_points_by_their_logarithms():
    found = panels(plot.figure(ROWS, "title", "origin"))
    time = found[False, False]
    left, right = plot._LEFT, plot._LEFT + plot._WIDTH
    top, bottom = plot._TOP, plot._TOP + plot._HEIGHT
    # 1 to 4 KiB from left to right; 0.001 to 10 ms, four decades, from bottom to top.
    expected = {
        "copy: 1 KiB, 0.01 ms": (left, bottom - plot._HEIGHT / 4),
        "copy: 4 KiB, 1 ms": (right, bottom - plot._HEIGHT * 3 / 4),
        "vlmops: 1 KiB, 0.02 ms": (left, bottom - plot._HEIGHT * (math.log10(20) / 4)),
        "vlmops in place: 1 KiB, 0.005 ms": (left, bottom - plot._HEIGHT * (math.log10(5) / 4)),
        "vlmops: 4 KiB, 10 ms": (right, top),
    }
    assert time.keys() == expected.keys()
    for told, place in expected.items():
        assert time[told] == pytest.approx(place, abs=0.01), told


def test_plot_places_per_cent_linearly_and_leaves_out_what_is_not_known():
    share = panels(plot.figure(ROWS, "title", "origin"))[False, True]
    bottom = plot._TOP + 2 * plot._HEIGHT + plot._GAP_Y
    assert len(share) == 4
    assert share["vlmops: 1 KiB, 50 %"][1] == pytest.approx(bottom - plot._HEIGHT / 2)
    assert share["copy: 4 KiB, 100 %"][1] == pytest.approx(bottom - plot._HEIGHT)


def test_plot_labels_axes_and_variants():
    svg = ET.fromstring(plot.figure(ROWS, "toy <&>", "A CPU"))
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"toy <&>", "A CPU", "forward, ms", "backward, ms", "% of copy speed"} <= set(texts)
    assert {"1 KiB", "2 KiB", "4 KiB", "0.001", "10", "0", "100", "read and written"} <= set(texts)
    assert {"copy", "vlmops", "vlmops in place"} <= set(texts), "the legend"
    width, height = float(svg.get("width")), float(svg.get("height"))
    for text in svg.iter(f"{SVG}text"):
        assert 0 < float(text.get("x")) < width
        assert 0 < float(text.get("y")) < height


def test_plot_leaves_out_a_direction_that_was_not_measured():
    found = panels(plot.figure([r for r in ROWS if r["direction"] != "backward"], "t", "o"))
    assert found.keys() == {(False, False), (False, True)}


def test_plot_gives_variants_colors_that_differ():
    rows = [row("s1", "forward", name, 8, 1, 1) for name in (*plot.COLORS, "other", "another")]
    svg = ET.fromstring(plot.figure(rows, "t", "o"))
    filled = {circle.get("fill") for circle in svg.iter(f"{SVG}circle")}
    assert len(filled) == len(plot.COLORS) + 2


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_plot_draws_the_committed_results(path, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert cli.main(["bench", "plot", str(path), "--out", str(folder), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written
    assert sorted(map(str, folder.iterdir())) == sorted(written)
    points = sum(len(panels(Path(name).read_text())[False, False]) for name in written)
    rows = json.loads(path.read_text())["rows"]
    assert points == sum(r["direction"] in ("forward", "floor") for r in rows if "median_ms" in r)


@pytest.mark.parametrize("path", OF_SCRIPTS, ids=lambda path: path.stem)
def test_plot_refuses_what_scripts_measured(path, tmp_path, capsys):
    assert cli.main(["bench", "plot", str(path), "--out", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(
        r"expected a report of vlmops bench OP --json, got .*(e2e|linear|qformer)(\.py)?$", err
    )
    assert not (tmp_path / "new").exists()


def test_plot_draws_one_figure_per_series_dtype_and_huge_pages(tmp_path):
    rows = [
        *ROWS,
        UNAVAILABLE,
        row("s64", "forward", "vlmops", 8, 1, 1, dtype="bfloat16"),
        row("s64", "forward", "vlmops", 8, 1, 1, thp_mem_alloc=True),
        row("model-7b/tower_n4", "forward", "vlmops", 8, 1, 1),
    ]
    names = {path.name for path in plot.write(report(rows), "r", tmp_path)}
    assert names == {
        "r-s-float32-thp0.svg",
        "r-s-bfloat16-thp0.svg",
        "r-s-float32-thp1.svg",
        "r-model-7b-tower_n-float32-thp0.svg",
    }
    svg = (tmp_path / "r-s-float32-thp0.svg").read_text()
    assert "toy &lt;&amp;&gt; s*, float32, THP_MEM_ALLOC_ENABLE=0" in svg
    assert "A CPU, 2 threads, avx2; torch 2.13.0; 0123456789, 2026-01-02" in svg


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "expected a report of vlmops bench OP --json"),
        ('{"schema": 1, "rows": []}', "nothing in it was measured, so nothing is drawn"),
        (json.dumps(report([UNAVAILABLE])), "nothing in it was measured, so nothing is drawn"),
        (json.dumps({**report(ROWS), "kind": "bench/toy.py"}), ".*, got one of bench/toy.py"),
        ("[]", "expected a report of schema 1, got None"),
        ('{"schema": 9, "rows": []}', "expected a report of schema 1, got 9"),
        (None, "expected a report of vlmops bench OP --json .*No such file"),
    ],
)
def test_plot_refuses_what_is_no_report(tmp_path, capsys, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["bench", "plot", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.search(f"vlmops bench plot: .*r.json: {message}", err)


def test_plot_says_that_it_cannot_write(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(report(ROWS)))
    out = tmp_path / "r.json" / "below"
    assert cli.main(["bench", "plot", str(tmp_path / "r.json"), "--out", str(out)]) == 2
    assert "--out: " in capsys.readouterr().err
