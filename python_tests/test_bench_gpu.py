"""Timing on a GPU, with a device and clocks that do what tests tell them to."""

import contextlib
import dataclasses
import functools
import json
import re
import types
import weakref
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from test_bench import REQUEST, off_by, toy

from vlmops import cli, ops
from vlmops.bench import BenchError, gpu, measure_gpu, plot, report, runner

CEILINGS = gpu.Ceilings(1e12, {"float32": 1e12}, 2e-6)


class Fake(gpu.Rehearsal):
    """Keeps what is asked of it; `host` is how much faster the host's clock runs.

    Memory is small, and so is what ceilings are measured with.
    """

    def __init__(self, host=1.0, capturable=True, free_bytes=1 << 22):
        super().__init__()
        self.free_bytes = free_bytes
        self.host, self.capturable, self.log = host, capturable, []
        self.captures = 0

    def flush(self):
        self.log.append("flush")

    def elapsed(self, work):
        self.log.append("elapsed")
        return super().elapsed(work)

    def capture(self, calls):
        if not self.capturable and self.captures == 2:  # both of empty launches
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        self.captures += 1
        self.log.append(f"capture {len(calls)}")
        return super().capture(calls)

    def clock(self):
        return self.host * super().clock()


def run_toy(spec, monkeypatch, device=None, **changes):
    monkeypatch.setattr(ops, "spec", lambda op: spec)
    monkeypatch.setattr(
        measure_gpu.dispatch, "default", lambda *_: types.SimpleNamespace(backend="cuda")
    )
    request = dataclasses.replace(REQUEST, device="rehearsal", **changes)
    return measure_gpu.run(request, device or Fake())


def test_gpu_samples_are_cold_and_take_turns():
    device, log = Fake(), []
    works = {name: (lambda name=name: log.append(name), 4) for name in "abc"}
    timings = gpu.interleave(device, works, 1.0, (5, 5), after_round=lambda: log.append("|"))
    rounds = "".join(log).split("|")
    assert [sorted(r) for r in rounds[:-1]] == [["a", "b", "c"]] * 6
    assert len(set(rounds[1:-1])) > 1
    assert timings["a"].samples == 5
    assert timings["a"].median == pytest.approx(gpu.Rehearsal.LAUNCH / 4)
    assert device.log[6:] == ["flush", "elapsed"] * 3 * 6


@pytest.mark.parametrize(("budget", "samples"), [(0.0, 3), (1e9, 7)])
def test_gpu_rounds_follow_the_budget(budget, samples):
    timings = gpu.interleave(Fake(), {"a": (lambda: None, 1)}, budget, (3, 7))
    assert timings["a"].samples == samples


def test_gpu_graphs_hold_calls_until_a_sample_is_long_or_memory_is_full():
    device = Fake()
    assert gpu.calls_per_graph(device, 40e-6, 1) == 10
    assert gpu.calls_per_graph(device, 1e-6, 1) == gpu.MOST_CALLS
    assert gpu.calls_per_graph(device, 1e-6, device.free_bytes // 12) == 3
    assert gpu.calls_per_graph(device, 1e-6, device.free_bytes) == 1


def test_gpu_ceilings_are_those_of_the_device():
    ceilings = gpu.measure_ceilings(Fake(free_bytes=1 << 28), ["float32"], quick=True)
    assert 0.8e12 < ceilings.copy_bytes_per_s < 1e12
    assert 0.2e15 < ceilings.matmul_flops["float32"] <= 1e15
    assert ceilings.launch_s == pytest.approx(gpu.Rehearsal.LAUNCH)


def test_gpu_clock_that_disagrees_with_the_hosts_is_refused():
    with pytest.raises(BenchError, match=r"on the host's clock and .* cannot be trusted") as caught:
        gpu.measure_ceilings(Fake(host=2.0), [], quick=True)
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("bytes_", "flops", "seconds", "message"),
    [
        (10**12, 0.0, 1.01, None),
        (10**12, 0.0, 0.98, None),  # of which ceilings vary themselves
        (10**12, 0.0, 0.96, r"104 % of the copy bandwidth \(1042 of 1000 GB/s\)"),
        (1, 1e12, 0.5, r"200 % of the matmul rate \(2 of 1 TFLOP/s\)"),
        (1, 1.0, 0.0, r"the clock says 0 s"),
        (1, 1.0, -1.0, r"the clock says -1 s"),
    ],
)
def test_gpu_nothing_beats_a_ceiling(bytes_, flops, seconds, message):
    found = CEILINGS.beaten(bytes_, flops, "float32", seconds)
    if message is None:
        assert found is None
    else:
        assert re.match(message, found), found
    assert CEILINGS.beaten(1, 1e30, "bfloat16", 1.0) is None, "no ceiling was measured"


def test_gpu_rows_look_like_the_cpus_and_tell_how_they_were_timed(monkeypatch):
    device = Fake()
    found = run_toy(toy(in_place=lambda x: x.mul_(3)), monkeypatch, device)
    rows = {(row["direction"], row["variant"]): row for row in found["rows"]}
    assert set(rows) == {
        ("floor", "copy"),
        ("floor", "launch"),
        ("forward", "vlmops"),
        ("forward", "eager"),
        ("forward", "vlmops in place"),
        ("backward", "vlmops"),
        ("backward", "eager"),
    }
    ours = rows["forward", "vlmops"]
    assert ours["timing"] == "graph"
    assert ours["calls_per_sample"] == gpu.MOST_CALLS
    assert ours["times_eager"] == pytest.approx(1.0)
    assert 0 < ours["percent_of_ceiling"] < 100
    assert ours["latency_ms"] >= 0
    assert rows["floor", "launch"]["median_ms"] == pytest.approx(2e-3)
    assert found["errors"] == []
    assert found["backends"] == {"vlmops": "cuda"}
    assert found["device"]["type"] == "rehearsal"
    assert {"torch", "cuda", "triton", "transformers", "python"} <= set(found["versions"])
    json.dumps(found, allow_nan=False)


def test_gpu_times_what_cannot_be_captured_by_events(monkeypatch):
    found = run_toy(toy(), monkeypatch, Fake(capturable=False))
    timed = [row for row in found["rows"] if row["direction"] == "forward"]
    assert {row["timing"] for row in timed} == {"events"}
    assert {row["not_captured"] for row in timed} == {
        "operation not permitted when stream is capturing"
    }


def test_gpu_a_long_case_is_one_call_in_a_graph(monkeypatch):
    """Launched from Python, the host's time would be measured: 180 us of Triton's 75."""
    monkeypatch.setattr(gpu, "SAMPLE", 1e-9)
    found = run_toy(toy(), monkeypatch)
    assert {row["timing"] for row in found["rows"]} == {"graph"}
    assert {row["calls_per_sample"] for row in found["rows"]} == {1}


def test_gpu_is_busy_while_the_host_enqueues_what_is_not_captured(monkeypatch):
    device, busy = Fake(capturable=False), []
    monkeypatch.setattr(device, "busy", busy.append)
    monkeypatch.setattr(gpu, "latency", lambda *_: 7e-5)
    run_toy(toy(), monkeypatch, device)
    assert set(busy) == {0.0, 7e-5}  # ceilings and graphs, the rest


def test_gpu_graph_keeps_its_calls_alive(monkeypatch):
    """A replay goes to addresses; the next capture gives what is freed back to the driver."""

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(gpu.Cuda, "__init__", lambda self: None)
    monkeypatch.setattr(gpu.Cuda, "synchronize", lambda self: None)
    monkeypatch.setattr(gpu.Cuda, "_stream", None, raising=False)
    target = torch.empty(3)
    held = weakref.ref(target)
    replay = gpu.Cuda().capture([functools.partial(target.copy_, torch.ones(3))])
    del target
    replay()
    assert Graph.replays == 1
    assert held() is not None
    del replay
    assert held() is None


def test_gpu_a_kernel_that_did_not_run_gets_no_number(monkeypatch):
    """Faster than memory: the device forgets to count."""

    class Skipping(Fake):
        def elapsed(self, work):
            return super().elapsed(work) if len(self.log) < 60 else 1e-15

    found = run_toy(toy(), monkeypatch, Skipping())
    impossible = [row for row in found["rows"] if row.get("impossible")]
    assert impossible
    assert all("median_ms" not in row for row in impossible)
    assert all("did not run" in row["unavailable"] for row in impossible)
    assert len(found["errors"]) == len(impossible)


def test_gpu_a_copy_is_not_judged_by_products(monkeypatch):
    """It may be faster than all that the op multiplies."""
    spec = toy()
    case = dataclasses.replace(spec.bench["small"], flops=lambda args: 1e12)
    found = run_toy(dataclasses.replace(spec, bench={"small": case}), monkeypatch)
    impossible = {row["variant"]: row.get("impossible", False) for row in found["rows"]}
    assert not impossible["copy"]
    assert impossible["vlmops"]


def test_gpu_a_wrong_case_is_told_and_the_others_measured(monkeypatch):
    wrong, right = toy(off_by((3, 4), 1e3)), toy()
    cases = {"big": dataclasses.replace(right.bench["small"], name="big"), **right.bench}
    calls = []

    def function(x):
        calls.append(1)
        return (wrong if len(calls) == 1 else right).function(x)

    spec = dataclasses.replace(right, function=function, bench=cases)
    found = run_toy(spec, monkeypatch, cases=["big", "small"])
    assert [error[:38] for error in found["errors"]] == [
        "big float32: big float32 forward vlmops, "[:38]
    ]
    assert {row["case"] for row in found["rows"] if "median_ms" in row} == {"small"}


def test_gpu_peers_are_measured_if_right_and_named_if_wrong(monkeypatch):
    peers = {"good": lambda x: x.mul_(3), "bad": lambda x: 4 * x}
    spec = dataclasses.replace(toy(), peers=lambda args: peers)
    found = run_toy(spec, monkeypatch)
    rows = {row["variant"]: row for row in found["rows"] if row["direction"] == "forward"}
    assert rows["good"]["median_ms"] > 0
    assert "elements are off" in rows["bad"]["unavailable"]
    assert found["errors"] == []


def test_gpu_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchError, match=r"--device cuda: torch .* sees no CUDA device; install"):
        gpu.open_device("cuda")


def test_gpu_clocks_are_told_where_nvidia_smi_is(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert gpu.nvidia_smi() == {}
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/bin/nvidia-smi")
    answer = "580.1, 1980, 3201, 1980, 3201, 40, 100.5, 700\n"
    asked = []

    def run(command, **_):
        asked.extend(command)
        return types.SimpleNamespace(stdout=answer)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    told = gpu.nvidia_smi("abc")
    assert (told["driver_version"], told["clocks.sm"]) == ("580.1", "1980")
    assert asked[-2:] == ["-i", "GPU-abc"]


def test_gpu_report_is_printed_and_drawn(monkeypatch, tmp_path, capsys):
    found = run_toy(toy(in_place=lambda x: x.mul_(3)), monkeypatch)
    head = {"schema": runner.SCHEMA, "date": "2026-01-02T03:04:05+00:00", "op": "toy"}
    whole = {**head, "quick": True, "commit": "0123456789ab", "dirty": True, **found}
    printed = report.table(whole)
    assert max(map(len, printed.splitlines())) <= 110
    assert "ceilings: copy" in printed
    assert "mean nothing" in printed
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole))
    written = plot.write(plot.load(path), "r", tmp_path)
    assert [p.name for p in written] == ["r-small-float32.svg"]
    ElementTree.parse(written[0])


def test_gpu_errors_end_bench_with_code_1(monkeypatch, capsys):
    measured = {"errors": ["s1 float32: 120 % of the copy bandwidth"], "rows": []}
    monkeypatch.setattr(runner, "run", lambda *_: measured)
    monkeypatch.setattr(report, "table", lambda _: "table")
    assert cli.main(["bench", "mrope", "--device", "rehearsal"]) == 1
    out, err = capsys.readouterr()
    assert out == "table\n"
    assert "120 % of the copy bandwidth" in err
    assert cli.main(["bench", "mrope", "--device", "tpu"]) == 2
    assert "--device: expected one of cpu, cuda, rehearsal, got 'tpu'" in capsys.readouterr().err


def test_gpu_rehearsal_counts_what_operators_move():
    device, x = gpu.Rehearsal(), torch.ones(1000)
    seconds = device.elapsed(lambda: x.copy_(torch.Tensor(x)))
    assert seconds == pytest.approx(2e-6 + 8000e-12)
    with contextlib.suppress(ZeroDivisionError):
        assert device.clock() == seconds


def test_a_spent_budget_leaves_the_cases_that_are_left(monkeypatch):
    """What was measured before it is kept, and what was not is named."""
    now = iter([0.0, 5.0, 15.0])
    monkeypatch.setattr(measure_gpu.time, "monotonic", lambda: next(now))
    result = run_toy(toy(), monkeypatch, dtypes=["float32", "bfloat16"], budget=10.0)
    assert {row["dtype"] for row in result["rows"]} == {"float32"}
    assert result["errors"] == ["small bfloat16: not measured: --budget was spent before it"]
    for options in (["--budget", "0"], ["--device", "rehearsal", "--budget", "-1"]):
        assert cli.main(["bench", "mrope", *options]) == 2
