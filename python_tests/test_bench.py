from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

import vlmops
from vlmops import _cpus, cli, ops
from vlmops.bench import BenchError, measure, report, runner, shapes
from vlmops.bench.gate import Gate
from vlmops.bench.timer import ATTEMPTS, Timing, interleave, waits
from vlmops.ops.spec import BenchCase, Spec

CPU = torch.device("cpu")
REQUEST = measure.Request("toy", ["small"], ["float32"], compile=False, quick=True)


class Machine:
    """A clock that only calls advance, and a neighbour who steals time when told to."""

    def __init__(self):
        self.now, self.waited, self.log = 0.0, {7: 0.0, 8: 1.0}, []

    def call(self, name, *durations, stolen=()):
        """Takes the durations in turn; the thread 8 waits for ``stolen`` of them, by index."""
        made = Counter()

        def run():
            i = made["calls"]
            made["calls"] += 1
            self.log.append(name)
            self.now += durations[i % len(durations)]
            if i in stolen:
                self.waited[8] += durations[i % len(durations)] / 2

        return run

    def interleave(self, calls, budget=1.0, rounds=(4, 4), **kwargs):
        return interleave(
            calls,
            budget,
            rounds,
            clock=lambda: self.now,
            waiting=lambda: dict(self.waited),
            **kwargs,
        )


def test_bench_reports_median_and_quartiles():
    machine = Machine()
    warm_up = [1.0] * 3
    timing = machine.interleave({"op": machine.call("op", *warm_up, 5, 1, 2, 4, 9)}, rounds=(5, 5))
    assert timing["op"] == Timing(4.0, 2.0, 5.0, samples=5, voided=0, calls_per_sample=1)


def test_bench_voids_and_repeats_disturbed_samples():
    machine = Machine()
    durations = [1, 1, 1, 2, 100, 2, 100, 2, 2]
    timings = machine.interleave(
        {"op": machine.call("op", *durations, stolen=(4, 6)), "quiet": machine.call("quiet", 3)}
    )
    assert timings["op"] == Timing(2.0, 2.0, 2.0, samples=4, voided=2, calls_per_sample=1)
    assert timings["quiet"].samples == 4
    assert machine.log.count("quiet") == 3 + 4, "what has its samples is not timed again"


def test_bench_tolerates_waits_below_the_limit():
    machine = Machine()

    def call():
        machine.now += 1.0
        machine.waited[7] += 0.01
        machine.waited[8] += 0.015

    assert machine.interleave({"op": call})["op"].voided == 0


def test_bench_gives_no_number_on_a_busy_machine():
    machine = Machine()
    timing = machine.interleave({"op": machine.call("op", 1.0, stolen=range(1000))})["op"]
    assert timing == Timing(None, None, None, 0, voided=ATTEMPTS * 4, calls_per_sample=1)


def test_bench_takes_every_call_once_a_round_in_changing_order():
    machine = Machine()
    names = ["a", "b", "c", "d"]
    rounds_ended = []
    machine.interleave(
        {name: machine.call(name, 1.0) for name in names},
        rounds=(12, 12),
        after_round=lambda: rounds_ended.append(len(machine.log)),
    )
    timed = machine.log[3 * len(names) :]
    orders = [timed[i : i + 4] for i in range(0, len(timed), 4)]
    assert len(orders) == 12
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) > 3
    assert rounds_ended == [12 + 4 * i for i in range(13)]


def test_bench_times_quick_calls_in_batches():
    machine = Machine()
    quick, slow = machine.call("quick", 5e-6), machine.call("slow", 1.0)
    timings = machine.interleave({"quick": quick, "slow": slow})
    assert timings["quick"].calls_per_sample == 100
    assert timings["quick"].median == pytest.approx(5e-6)
    assert timings["slow"].calls_per_sample == 1


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 4), (13.0, 6), (1e9, 9)])
def test_bench_rounds_follow_the_budget(budget, expected):
    machine = Machine()
    timings = machine.interleave({"op": machine.call("op", 2.0)}, budget, rounds=(4, 9))
    assert timings["op"].samples == expected


def test_bench_reads_the_waits_of_threads():
    first = waits()
    assert first
    assert all(wait >= 0 for wait in first.values())
    second = waits()
    assert all(second[thread] >= wait for thread, wait in first.items() if thread in second)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.slope * grad, None


def right(x):
    return 3 * x


def toy(function=right, in_place=None):
    """y = 3 x."""
    case = BenchCase(
        "small",
        lambda dtype, device: {"x": torch.randn(5, 7).to(device, dtype)},
        moved=lambda args: [args["x"]],
        flops=lambda args: float(args["x"].numel()),
    )
    return Spec(
        "toy", function, in_place, right, lambda _: right, ("x",), ("x",), (), {"small": case}, ()
    )


def measure_toy(spec, request=REQUEST):
    return measure.measure(request, spec, CPU)


def off_by(where, value):
    def function(x):
        y = 3 * x
        y[where] = value
        return y

    return function


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            toy(off_by((3, 4), 1e3)),
            r"small float32 forward vlmops, result 0: 1 of 35 .* at \[3, 4\]: expected .*got 1000",
        ),
        (toy(off_by((0, 6), float("nan"))), r"at \[0, 6\]: expected .* got nan"),
        (toy(lambda x: 3 * x.double()), r"expected \[5, 7\] of torch.float32, got .*float64"),
        (toy(lambda x: 3 * x[1:]), r"expected \[5, 7\] of .*, got \[4, 7\]"),
        (toy(lambda x: (3 * x, x)), r"expected 1 results, got 2"),
        (toy(in_place=lambda x: x.mul_(2)), r"forward vlmops in place, result 0: .* at \[\d, \d\]"),
        (toy(in_place=lambda x: 3 * x), r"forward vlmops in place, result 0: .* at \["),
        (
            toy(lambda x: Triple.apply(x, 2.0)),
            r"backward vlmops, result 0: .* at \[\d, \d\]: expected",
        ),
    ],
    ids=["value", "nan", "dtype", "shape", "count", "in_place", "not_in_place", "backward"],
)
def test_bench_gate_refuses_wrong_results(spec, message, monkeypatch):
    monkeypatch.setattr(measure, "interleave", lambda *_, **__: pytest.fail("timed a wrong result"))
    with pytest.raises(BenchError, match=message) as caught:
        measure_toy(spec)
    assert caught.value.code == 1


@pytest.mark.parametrize(
    ("expected", "eager", "steps", "passes"),
    [
        (1024.0, 0, 0, True),
        (1024.0, 0, 1, False),
        (1024.0 + 2**-14, 0, 1, True),  # half a step off, as eager on the other side
        (1024.0 + 2**-14, 0, 2, True),  # 1.5 = 2 x 0.5 + one rounding
        (1024.0 + 2**-14, 0, 3, False),
        (1024.0 + 2**-14, 2, -3, True),  # 3.5 = 2 x 1.5 + one rounding
        (1024.0 + 2**-14, 2, -4, False),
    ],
)
def test_bench_gate_allows_twice_eagers_error_and_one_rounding(expected, eager, steps, passes):
    """In steps of 2^-13, which float32 takes at 1024."""

    def at(steps):
        return [torch.tensor([1024.0 + steps * 2**-13])]

    gate = Gate([torch.tensor([expected], dtype=torch.float64)], at(eager))
    if passes:
        gate.check("op", at(steps))
    else:
        with pytest.raises(BenchError, match=r"op, result 0: .* at \[0\]"):
            gate.check("op", at(steps))


def fixed_timings(calls, budget, rounds, *, after_round):
    """The n-th call takes n ms, quartiles 10 % around."""
    return {
        key: Timing(n * 1e-3, n * 0.9e-3, n * 1.1e-3, samples=5, voided=1, calls_per_sample=2)
        for n, key in enumerate(calls, start=1)
    }


def test_bench_keeps_what_was_measured_before_a_budget_was_spent(monkeypatch, capsys):
    monkeypatch.setattr(measure, "interleave", fixed_timings)
    now = iter([0.0, 5.0, 15.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(now))
    request = dataclasses.replace(REQUEST, dtypes=["float32", "bfloat16"], budget=10.0)
    assert {row["dtype"] for row in measure_toy(toy(), request)} == {"float32"}
    assert "small bfloat16: not measured: --budget was spent before it" in capsys.readouterr().err


def test_bench_rows_relate_times_to_floors_and_eager(monkeypatch):
    monkeypatch.setattr(measure, "interleave", fixed_timings)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    rows = measure_toy(toy(in_place=lambda x: x.mul_(3)))
    assert [(row["direction"], row["variant"]) for row in rows] == [
        ("floor", "copy"),
        ("floor", "clone"),
        ("forward", "vlmops"),
        ("forward", "eager"),
        ("forward", "vlmops in place"),
        ("backward", "vlmops"),
        ("backward", "eager"),
    ]
    copy, clone, ours, *_, ours_backward, _ = rows
    assert ours == {
        "case": "small",
        "dtype": "float32",
        "thp_mem_alloc": True,
        "bytes": 2 * 5 * 7 * 4,
        "flops": 35.0,
        "direction": "forward",
        "variant": "vlmops",
        "samples": 5,
        "voided": 1,
        "calls_per_sample": 2,
        "median_ms": pytest.approx(3.0),
        "p25_ms": pytest.approx(2.7),
        "p75_ms": pytest.approx(3.3),
        "gb_per_s": pytest.approx(280 / 3e-3 / 1e9),
        "percent_of_copy": pytest.approx(100 / 3),
        "percent_of_clone": pytest.approx(200 / 3),
        "times_eager": pytest.approx(4 / 3),
    }
    assert (copy["percent_of_copy"], clone["percent_of_clone"]) == (100, 100)
    assert copy["times_eager"] is None
    assert ours_backward["times_eager"] == pytest.approx(7 / 6)


def test_bench_restores_what_is_written_in_place(monkeypatch):
    seen = []

    def three_rounds(calls, budget, rounds, *, after_round):
        for _ in range(3):
            after_round()
            seen.append(calls["forward", "vlmops in place"]()[0].abs().sum().item())
        return fixed_timings(calls, budget, rounds, after_round=after_round)

    monkeypatch.setattr(measure, "interleave", three_rounds)
    measure_toy(toy(in_place=lambda x: x.mul_(3)))
    assert seen[0] == seen[1] == seen[2] > 0


def test_bench_says_why_torch_compile_has_no_row(monkeypatch):
    def no_compiler(_):
        def function(x):
            raise RuntimeError("no working C++ compiler\nand a long trace")

        return function

    monkeypatch.setattr(measure, "interleave", fixed_timings)
    monkeypatch.setattr(measure, "_compile", no_compiler)
    rows = measure_toy(toy(), measure.Request("toy", ["small"], ["float32"]))
    reasons = {row["direction"]: row["unavailable"] for row in rows if "unavailable" in row}
    assert reasons == dict.fromkeys(("forward", "backward"), "no working C++ compiler")
    assert {row["variant"] for row in rows if "median_ms" in row} >= {"copy", "vlmops", "eager"}


def test_bench_gives_a_miscompiled_yardstick_no_number(monkeypatch):
    monkeypatch.setattr(measure, "interleave", fixed_timings)
    monkeypatch.setattr(measure, "_compile", lambda _: lambda x: 4 * x)
    rows = measure_toy(toy(), measure.Request("toy", ["small"], ["float32"]))
    wrong = [row for row in rows if row["variant"] == measure.COMPILED]
    assert len(wrong) == 2
    assert all("elements are off" in row["unavailable"] for row in wrong)
    assert all("median_ms" not in row for row in wrong)
    assert {row["variant"] for row in rows if "median_ms" in row} >= {"copy", "vlmops", "eager"}


@pytest.fixture
def toy_bench(monkeypatch):
    """`vlmops bench toy`, its child processes run in this one."""

    def run_here(command, env, **_):
        assert command[1:3] == ["-m", "vlmops.bench.measure"]
        assert (env["OMP_PROC_BIND"], env["OMP_PLACES"]) == ("true", "cores")
        assert not Path(env["TORCHINDUCTOR_CACHE_DIR"]).exists()  # nobody else's code
        environments.append(env)
        assert os.sched_getaffinity(0) == _cpus.ALLOWED
        with monkeypatch.context() as inner:
            inner.setenv("THP_MEM_ALLOC_ENABLE", env["THP_MEM_ALLOC_ENABLE"])
            return types.SimpleNamespace(returncode=measure.main(command[3:]))

    def run(spec, *options):
        monkeypatch.setattr(ops, "spec", lambda op: spec)
        return cli.main(["bench", "toy", "--no-compile", "--dtype", "float32", *options])

    environments = run.environments = []
    monkeypatch.setattr(measure, "interleave", fixed_timings)
    monkeypatch.setattr(runner, "commit", lambda: {"commit": "0123456789abcdef", "dirty": True})
    monkeypatch.setattr(subprocess, "run", run_here)
    return run


@pytest.fixture
def bound():
    """The main thread as torch's OpenMP leaves it under OMP_PROC_BIND=true."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_bench_gives_its_processes_all_cpus(toy_bench, bound):
    assert toy_bench(toy()) == 0
    assert {env["OMP_NUM_THREADS"] for env in toy_bench.environments} == {str(_cpus.cores())}


def test_cpus_are_read_before_torch_binds_the_main_thread():
    script = "import vlmops; print(*sorted(vlmops._cpus.ALLOWED))"
    env = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    told = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert told.stdout.split() == [str(cpu) for cpu in sorted(os.sched_getaffinity(0))], told.stderr


def test_bench_prints_no_number_for_a_wrong_kernel(toy_bench, capsys, tmp_path):
    path = tmp_path / "report.json"
    assert toy_bench(toy(off_by((3, 4), 1e3)), "--json", str(path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert not path.exists()
    assert (
        "forward vlmops, result 0: 1 of 35 elements are off, worst at [3, 4]"
        in err.splitlines()[-1]
    )


def test_bench_json_and_table(toy_bench, capsys, tmp_path):
    path = tmp_path / "report.json"
    assert toy_bench(toy(), "--threads", "1", "--json", str(path)) == 0
    written = json.loads(path.read_text())
    assert {key: type(value) for key, value in written.items()} == {
        "schema": int,
        "date": str,
        "op": str,
        "quick": bool,
        "commit": str,
        "dirty": bool,
        "device": dict,
        "isa": dict,
        "threads": int,
        "binding": dict,
        "huge_pages": str,
        "versions": dict,
        "rows": list,
    }
    assert written["device"]["type"] == "cpu"
    assert written["isa"]["vlmops"] == vlmops.cpu_isa()
    assert written["versions"]["torch"] == torch.__version__
    assert [row["thp_mem_alloc"] for row in written["rows"]] == [False] * 6 + [True] * 6
    assert [env["THP_MEM_ALLOC_ENABLE"] for env in toy_bench.environments] == ["0", "1"]
    assert {env["OMP_NUM_THREADS"] for env in toy_bench.environments} == {"1"}

    out = capsys.readouterr().out
    assert out == report.table(written) + "\n"
    assert max(map(len, out.splitlines())) <= 110
    assert "commit 0123456789 with changes" in out
    line = "small       float32   forward    vlmops               3.0000     20%    0.00      33"
    assert out.count(line) == 2


def test_bench_prints_json_in_place_of_the_table(toy_bench, capsys):
    assert toy_bench(toy(), "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 12


def test_bench_caps_torch_together_with_vlmops(toy_bench):
    assert toy_bench(toy(), "--isa", vlmops.cpu_isa()) == 0
    env = toy_bench.environments[0]
    assert env["VLMOPS_CPU_ISA"] == vlmops.cpu_isa()
    assert runner.TORCH_CAPS[vlmops.cpu_isa()].items() <= env.items()


def test_bench_refuses_an_instruction_set_the_machine_lacks(toy_bench, capsys):
    missing = next(isa for isa in runner.TORCH_CAPS if isa != vlmops.cpu_isa())
    assert toy_bench(toy(), "--isa", missing) == 2
    assert f"--isa: this machine has no {missing}; its best is" in capsys.readouterr().err


@pytest.mark.parametrize(("returncode", "says"), [(-9, "signal 9; if memory"), (3, "code 3")])
def test_bench_says_that_the_measuring_process_died(returncode, says, monkeypatch, capsys):
    died = types.SimpleNamespace(returncode=returncode)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    assert cli.main(["bench", "mrope"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def row(**changes):
    known = dict.fromkeys(("percent_of_copy", "percent_of_clone", "times_eager"))
    timed = {"median_ms": 1.0, "p25_ms": 1.0, "p75_ms": 1.0, "gb_per_s": 1.0}
    counts = {"samples": 10, "voided": 0}
    names = {"case": "c", "dtype": "float32", "direction": "forward", "variant": "eager"}
    return {**known, **timed, **counts, **names, **changes}


@pytest.mark.parametrize(("voided", "says"), [(2, False), (20, True)])
def test_bench_says_when_the_machine_was_busy(voided, says):
    message = report.busy([row(voided=voided), {"unavailable": "reason"}], threads=2)
    assert (message is not None) == says
    if message is not None:
        assert f"{voided} of {voided + 10} samples are void" in message
        assert "--threads 1" in message


def test_bench_says_at_once_that_the_machine_is_busy(monkeypatch, capsys):
    def all_void(calls, *_, **__):
        return dict.fromkeys(calls, Timing(None, None, None, 0, voided=9, calls_per_sample=1))

    monkeypatch.setattr(measure, "interleave", all_void)
    rows = measure_toy(toy())
    assert {row["unavailable"] for row in rows} == {measure.TOO_FEW}
    assert "the machine is busy: 54 of 54 samples are void" in capsys.readouterr().err


def test_bench_table_shortens_reasons():
    line = report._line(row(unavailable="word " * 100), 12)
    assert line.startswith("c           float32   forward    eager            word word")
    assert len(line) <= 110


@pytest.mark.parametrize("name", shapes.MODELS)
def test_bench_makes_cases_of_models(name):
    spec, model = ops.spec("mrope"), shapes.MODELS[name]
    request = runner.request("mrope", models=[name], sizes=[4, 16])
    assert request.cases == [f"{name}/{case}" for case in ("s4", "s16", "tower_n4", "tower_n16")]
    cases = measure.known_cases(spec, request.models, request.sizes)
    args = cases[f"{name}/s16"].make(torch.bfloat16, CPU)
    text, tower = model.text, model.tower
    assert args["q"].shape == (1, text.heads, 16, text.head_dim)
    assert args["k"].shape == (1, text.kv_heads, 16, text.head_dim)
    counts = torch.bincount(args["freq_axis"].long()).tolist()
    assert counts == list(text.mrope_section)
    spec.function(**args)
    args = cases[f"{name}/tower_n4"].make(torch.bfloat16, CPU)
    assert args["q"].shape == args["k"].shape == (4, tower.heads, tower.head_dim)
    assert args["q"].stride(0) == 3 * tower.heads * tower.head_dim
    spec.function(**args)


def test_bench_takes_typical_sizes_of_models():
    cases = runner.request("mrope", models=["qwen2_vl-7b", "qwen3_vl-8b"]).cases
    assert cases[:5] == [f"qwen2_vl-7b/s{tokens}" for tokens in (1, 256, 1024, 4096, 16384)]
    # 448 / 14 = 32 patches on a side; 1344 x 1008 are 96 x 72 of 14, and 84 x 62 whole ones of 16.
    assert cases[5:7] == ["qwen2_vl-7b/tower_n1024", "qwen2_vl-7b/tower_n6912"]
    assert cases[-1] == "qwen3_vl-8b/tower_n5208"
    chosen = runner.request("mrope", cases=["s1024", "qwen2_vl-7b/s1"], models=["qwen2_vl-7b"])
    assert chosen.cases == ["s1024", "qwen2_vl-7b/s1"]


def test_bench_measures_a_model(toy_bench, capsys):
    def model_cases(model, tokens, patches):
        assert (model, tokens, patches) == (shapes.MODELS["glm4v-9b"], [7, 9], [7, 9])
        yield toy().bench["small"]

    spec = dataclasses.replace(toy(), model_cases=model_cases)
    assert toy_bench(spec, "--model", "glm4v-9b", "--sizes", "7,9") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("glm4v-9b/small  float32   forward") for line in lines) == 4
    assert toy_bench(toy(), "--model", "glm4v-9b") == 2
    assert "toy has no cases made from models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["bench", "mrope", "--model", "lists"],
            r"--model: expected one of qwen2_vl-2b, .*'lists'",
        ),
        (["bench", "rope", "--model", "list"], r"vlmops bench: op: expected one of .* got 'rope'"),
        (["bench", "mrope", "--sizes", "1"], r"--sizes: expected a --model"),
        (["bench", "mrope", "--sizes", "1,x"], r"--sizes: expected whole numbers .* got 1,x"),
        (["bench", "rope"], r"vlmops bench: op: expected one of .*mrope.*, got 'rope'"),
        (["bench", "mrope", "--case", "s9"], r"vlmops bench: --case: .*s4096.*, got 's9'"),
        (["bench", "mrope", "--dtype", "int8"], r"--dtype: expected .*bfloat16.*, got 'int8'"),
        (["bench", "mrope", "--isa", "sse9"], r"--isa: expected one of .*avx2.*, got 'sse9'"),
        (["bench", "mrope", "--threads", "0"], r"--threads: expected 1 to \d+, .* got 0"),
        (["bench", "mrope", "--threads", "x"], r"--threads: invalid int value: 'x'; see 'vlmops"),
        (["bench", "mrope", "--json", "/no/such/x.json"], r"--json: .* a folder that exists, got"),
        (["bench", "mrope", "--json", "/"], r"--json: expected a file .*, got /"),
        (["bench"], r"required: OP; see 'vlmops bench --help'"),
        (["bench", "mrope", "--fast"], r"unrecognized arguments: --fast"),
        (["banch"], r"invalid choice: 'banch'.*see 'vlmops --help'"),
        ([], r"required: COMMAND"),
    ],
)
def test_cli_answers_a_wrong_command_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started measuring"))
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_cli_lists_models(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started measuring"))
    assert cli.main(["bench", "mrope", "--model", "list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(shapes.MODELS)
    assert cli.main(["bench", "mrope", "--model", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": list(shapes.MODELS)}


def test_cli_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlmops {vlmops.__version__}\n"


COMMANDS = ["bench", "bench plot", "bench compare", "inspect", "doctor", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_every_command_tells_its_exit_codes_and_takes_json(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: vlmops {command} ")
    assert "[--json [PATH]]" in told
    codes = re.search(r"Exit code: 0 .*; 2 ", " ".join(told.split()))
    assert codes is not None
    assert ("; 1 " in codes[0]) == (command != "bench plot")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", [["--no-such-option"], ["--json", "/no/such/folder/x.json"]])
def test_cli_a_wrong_option_is_exit_code_2(command, wrong, capsys):
    needed = {"bench": ["mrope"], "bench plot": ["r.json"], "bench compare": ["--base=x", "mrope"]}
    assert cli.main([*command.split(), *needed.get(command, []), *wrong]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"vlmops {command}: ")
    assert wrong[-1] in err


def test_cli_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\w", told, re.MULTILINE), command


def test_cli_json_goes_where_it_is_asked_to(capsys, tmp_path):
    cli.write_json("-", {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    cli.write_json(str(tmp_path / "x.json"), [2])
    assert json.loads((tmp_path / "x.json").read_text()) == [2]
    with pytest.raises(cli.CommandError, match=r"--json: /dev/full cannot be written \(No space"):
        cli.write_json("/dev/full", [])


def test_cli_hands_everything_after_demo_to_the_demo(monkeypatch):
    seen = []
    demo = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(vlmops, "demo", demo, raising=False)
    for argv in ([], ["--help"], ["--tokens", "5", "--version", "image.png"]):
        assert cli.main(["demo", *argv]) == 3
        assert seen.pop() == argv


def test_bench_measures_mrope_in_child_processes(capfd):
    options = ["--quick", "--no-compile", "--case", "decode_b1", "--dtype", "bfloat16"]
    code = cli.main(["bench", "mrope", *options, "--threads", "1"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "threads: 1, bound;" in out
    assert "THP_MEM_ALLOC_ENABLE=0" in out
    assert "THP_MEM_ALLOC_ENABLE=1" in out
    for variant in ("copy", "clone", "vlmops", "vlmops in place", "eager"):
        assert f" {variant} " in out
    assert "decode_b1 bfloat16: timing" in err
