"""bench/gpu_check.py: what runs, what is kept, what is told, without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.fixture
def step(check):
    def make(name, code, seconds=20.0, **options):
        return check.Step(name, seconds, [sys.executable, "-c", code], **options)

    return make


def run(check, steps, out, **options):
    made = check.Check(steps, out, options.pop("identity", "commit 1"), **options)
    return made.run(), {name: outcome.status for name, outcome in made.outcomes.items()}


def test_a_failing_step_stops_only_those_that_need_it(check, step, tmp_path, capsys):
    steps = [
        step("bad", "print('the reason'); raise SystemExit(3)"),
        step("after", "", needs=("bad",)),
        step("other", "print('fine')"),
        step("either", "", needs=("bad", "other")),
        step("instead", "", instead_of="bad"),
        step("not_needed", "", instead_of="other"),
        step("left_out", "", skip=lambda: "no such tool"),
    ]
    code, found = run(check, steps, tmp_path)
    assert code == 1
    assert found == {
        "bad": "failed", "after": "skipped", "other": "passed", "either": "passed",
        "instead": "passed", "not_needed": "skipped", "left_out": "skipped",
    }  # fmt: skip
    told = (tmp_path / "verdict.txt").read_text()
    assert "code 3: the reason" in told
    assert "needs bad, which did not pass" in told
    assert "no such tool" in told
    assert "1 of 7 steps did not pass, 3 skipped" in told
    assert told in capsys.readouterr().out
    assert "fine" in (tmp_path / "other.log").read_text()


def test_a_rerun_does_the_rest(check, step, tmp_path):
    """Also what was cut off; nothing of another commit is kept."""
    count = tmp_path / "count"
    steps = [
        step("counted", f"open({str(count)!r}, 'a').write('x')"),
        step("slow", "import time; time.sleep(60)", seconds=0.5),
    ]
    assert run(check, steps, tmp_path) == (1, {"counted": "passed", "slow": "timed out"})
    steps[1] = step("slow", "")
    assert run(check, steps, tmp_path) == (0, {"counted": "passed", "slow": "passed"})
    assert count.read_text() == "x"
    run(check, steps, tmp_path, identity="commit 2")
    assert count.read_text() == "xx"
    run(check, steps, tmp_path, identity="commit 2", fresh=True)
    assert count.read_text() == "xxx"
    (tmp_path / "state.json").write_text("{")
    run(check, steps, tmp_path)
    assert count.read_text() == "xxxx"


def test_when_the_time_is_spent_the_rest_is_for_the_next_run(check, step, tmp_path):
    now = iter(range(0, 1000, 40))
    steps = [step(name, "") for name in "abc"]
    code, found = run(check, steps, tmp_path, budget=100, clock=lambda: next(now))
    assert (code, found["a"], found["c"]) == (1, "passed", "not reached")
    assert "run again to continue" in (tmp_path / "verdict.txt").read_text()


def test_a_step_without_its_result_has_failed(check, step, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("{}")  # of an earlier run
    code, found = run(check, [step("bench", "", makes=result)], tmp_path)
    assert (code, found) == (1, {"bench": "failed"})


def test_tests_are_counted_with_workers_and_without(check, tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "t.py::test_a[x y] PASSED [ 1%]\nt.py::test_b FAILED [ 2%]\n"
        "[gw1] [  3%] PASSED t.py::test_c \nother PASSED\n"
    )
    assert check.counts(log) == "2 passed, 1 failed; "


def test_contract_runs_in_processes_where_xdist_is_installed(check, monkeypatch, tmp_path):
    def command():
        steps = check.steps(tmp_path, dry_run=False)
        return next(list(s.command) for s in steps if s.name == "contract-cuda")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "-n" not in command()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(check.os, "cpu_count", lambda: 4)
    assert command()[command().index("-n") + 1] == "3"


def test_numbers_meet_targets_or_miss_them(check):
    def row(case, variant, **more):
        head = {"case": case, "variant": variant, "dtype": "bfloat16", "direction": "forward"}
        return {**head, "median_ms": 1.0, "times_eager": None, **more}

    report = {
        "device": {"name": "a GPU", "driver": "1"},
        "versions": {"torch": "2"},
        "ceilings": {"copy_gb_per_s": 4000, "launch_us": 2},
        "errors": ["s1 float32: wrong"],
        "rows": [
            row("s4096", "vlmops", percent_of_ceiling=90.0, times_eager=7.0),
            row("s4096", "torch.compile", median_ms=1.6),
            row("s1024", "vlmops", percent_of_ceiling=1.0, times_eager=1.0),  # no target
            row("decode_b1", "launch"),
            row("decode_b1", "vlmops", median_ms=1.3),
        ],
    }
    lines = [" ".join(line.split()) for line in check.numbers(report)]
    assert lines[1:] == [
        "met s4096 vlmops percent_of_ceiling 90 (target >= 85)",
        "MISSED s4096 vlmops times_eager 7 (target >= 8)",
        "met s4096 vlmops times_compiled 1.6 (target >= 1.5)",
        "MISSED decode_b1 vlmops launches 1.3 (target <= 1.2)",
        "ERROR s1 float32: wrong",
    ]


def test_dry_run(check, tmp_path):
    """All of it on the CPU; only the device is replaced, and what is not installed left out."""
    assert check.main([str(tmp_path), "--dry-run"]) == 0, (tmp_path / "verdict.txt").read_text()
    state = json.loads((tmp_path / "state.json").read_text())
    passed = {name for name, step in state["steps"].items() if step["status"] == "passed"}
    assert passed >= {"environment", "build", "small", "contract-cuda", "patched", "bench", "plots"}
    told = (tmp_path / "verdict.txt").read_text()
    assert "dry run" in told
    assert "numbers mean nothing" in told
    assert list((tmp_path / "plots").glob("*.svg"))
