"""`vlmops bench compare`: verdicts, turns, and two revisions in real processes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import vlmops
from vlmops import _library, cli
from vlmops.bench import BenchError, compare, runner
from vlmops.bench.timer import ATTEMPTS, ENOUGH

PACKAGE = Path(compare.__file__).parent.parent
KEY = ("s1024", "float32", "forward")


@pytest.mark.parametrize(
    ("ratios", "verdict", "ratio", "noise"),
    [
        ([1.0, 1.01, 0.99], "same", 1.0, 0.01),
        ([1.06, 1.06, 1.06], "slower", 1.06, 0.0),
        ([1.06, 1.06, 1.10], "same", 1.06, 0.02),  # the noise could explain it
        ([1.2, 1.25, 1.15], "slower", 1.2, 0.05),
        ([0.9, 0.91, 0.89], "faster", 0.9, 0.01),
        ([0.95, 0.9, 1.0], "same", 0.95, 0.05),
        ([1.0, 1.01, None, 0.99], "same", 1.0, 0.01),
        ([9.0], "slower", 9.0, 0.0),
    ],
)
def test_compare_says_slower_beyond_threshold_and_noise(ratios, verdict, ratio, noise):
    times = [None if r is None else (2e-3, 2e-3 * r, r) for r in ratios]
    row = compare.row(KEY, times, threshold=1.05)
    assert (row["case"], row["dtype"], row["variant"], row["verdict"]) == (*KEY, verdict)
    assert row["ratio"] == pytest.approx(ratio)
    assert row["noise"] == pytest.approx(noise)
    assert row["base_ms"] == pytest.approx(2.0)
    assert row["new_ms"] == pytest.approx(2.0 * ratio)


@pytest.mark.parametrize("times", [[None], [None, None, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)]])
def test_compare_gives_no_number_on_a_busy_machine(times):
    assert compare.row(KEY, times, 1.05)["verdict"] == "not measured"


class Worker:
    """Answers with the next of its samples; a negative one was disturbed."""

    def __init__(self, log, *samples):
        self.log, self.samples = log, list(samples)

    def ask(self, variant, repeats):
        assert (variant, repeats) == ("forward", 3)
        self.log.append(self)
        seconds = self.samples.pop(0)
        return [abs(seconds), seconds < 0]


def test_compare_takes_turns_and_repeats_disturbed_pairs():
    log = []
    base = Worker(log, *[1.0] * compare.ROUNDS, 1.0)
    new = Worker(log, -50.0, *[2.0] * compare.ROUNDS)
    assert compare._turns(base, new, "forward", 3) == (1.0, 2.0, 2.0)
    assert len(log) == 2 * (compare.ROUNDS + 1)
    firsts = log[::2]
    assert firsts.count(base) == firsts.count(new)


def test_compare_gives_up_on_a_busy_machine():
    log = []
    tries = ATTEMPTS * compare.ROUNDS
    quiet = [1.0] * (ENOUGH - 1)
    base = Worker(log, *quiet, *[-1.0] * (tries - len(quiet)))
    assert compare._turns(base, Worker(log, *[1.0] * tries), "forward", 3) is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with this package, which is installed from it without a compiler."""
    root = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, root / "vlmops", ignore=ignored)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "base"]):
        subprocess.run(["git", *command], cwd=root, check=True)

    def build(source, site):
        shutil.copytree(source / "vlmops", site / "vlmops")
        shutil.copy(_library.path, site / "vlmops" / "libvlmops.so")

    monkeypatch.setattr(compare, "build", build)
    monkeypatch.setattr(runner, "package", lambda: root / "vlmops")
    monkeypatch.setenv("VLMOPS_LIBRARY", "/of/another/build")
    return root


def worktrees(root):
    told = subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True)
    return told.stdout.strip().splitlines()


def test_compare_finds_what_became_slower(checkout):
    module = checkout / "vlmops" / "ops" / "mrope.py"
    module.write_text(
        module.read_text() + "\nimport time\n_quick = mrope\n\n"
        "def mrope(*args, **kwargs):\n    time.sleep(1e-3)\n    return _quick(*args, **kwargs)\n"
    )
    request = runner.request("mrope", ["decode_b1"], ["float32"])
    result = compare.run("HEAD", request, threads=1, launches=1)
    assert result["dirty"] is True
    assert result["base"] == result["commit"]
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["forward", "in place", "backward"]
    assert rows["forward"]["verdict"] == "slower"
    assert rows["forward"]["new_ms"] - rows["forward"]["base_ms"] > 0.9
    assert all(row["new_ms"] < 0.9 for name, row in rows.items() if name != "forward")
    assert result["isa"]["vlmops"] == vlmops.cpu_isa()
    assert len(worktrees(checkout)) == 1
    assert re.search(r"decode_b1 +float32 +forward .* slower$", compare.table(result), re.MULTILINE)


@pytest.mark.parametrize("name", ["mrope", "mrope_"])
def test_compare_times_nothing_that_is_wrong(checkout, monkeypatch, name):
    module = checkout / "vlmops" / "ops" / "mrope.py"
    module.write_text(
        f"{module.read_text()}\n_right = {name}\n\ndef {name}(q, *args, **kwargs):\n"
        "    q = q + 1\n    return _right(q, *args, **kwargs)\n"
    )
    monkeypatch.setattr(compare, "_launch", lambda *_: pytest.fail("timed"))
    request = runner.request("mrope", ["decode_b1"], ["float32"])
    variant = "vlmops in place" if name == "mrope_" else "vlmops"
    wrong = f"^decode_b1 float32 forward {variant}, result 0: .* has no speed"
    with pytest.raises(BenchError, match=wrong) as error:
        compare.run("HEAD", request, threads=1, launches=1)
    assert error.value.code == 1


def test_compare_refuses_an_instruction_set_that_is_not_there(checkout, monkeypatch):
    monkeypatch.setattr(compare, "_launch", lambda *_: pytest.fail("timed"))
    bound = runner.bound
    monkeypatch.setattr(runner, "bound", lambda isa, threads: bound("portable", threads))
    request = runner.request("mrope", ["decode_b1"], ["float32"], isa="avx512")
    with pytest.raises(BenchError, match="--isa: this machine has no avx512; its best is portable"):
        compare.run("HEAD", request, threads=1, launches=1)


def test_compare_says_why_git_makes_no_worktree(checkout, monkeypatch, capsys):
    (checkout / ".git" / "worktrees").write_text("in the way")
    monkeypatch.setattr(compare, "build", lambda *_: pytest.fail("built"))
    assert cli.main(["bench", "compare", "mrope", "--base", "HEAD"]) == 1
    assert re.search(r"git worktree add failed: .*\.git/worktrees", capsys.readouterr().err)


def test_compare_starts_either_revision_first(monkeypatch):
    class Told:
        def __init__(self, site, env):
            started.append(site)
            self.site = site

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, **_):
            return {"forward": 1.0}

    started, turns = [], []
    monkeypatch.setattr(compare, "_Worker", Told)
    monkeypatch.setattr(compare, "_turns", lambda base, new, *_: turns.append((base, new)))
    request = runner.request("mrope", ["decode_b1"], ["float32"])
    for new_first in (False, True):
        list(compare._launch(request, ["base", "new"], {}, new_first))
    assert started == ["base", "new", "new", "base"]
    assert [(base.site, new.site) for base, new in turns] == [("base", "new")] * 2


def test_compare_leaves_no_worktree_behind_a_failed_build(checkout, monkeypatch, capsys):
    def fail(source, site):
        raise BenchError(f"{source} does not build", code=1)

    monkeypatch.setattr(compare, "build", fail)
    assert cli.main(["bench", "compare", "mrope", "--base", "HEAD"]) == 1
    assert "base does not build" in capsys.readouterr().err
    assert len(worktrees(checkout)) == 1


def test_compare_shows_why_a_build_fails(tmp_path):
    (tmp_path / "pyproject.toml").write_text("no toml at all")
    with pytest.raises(
        BenchError, match=r"does not build, with .* pip install .*:\n.*pyproject"
    ) as e:
        compare.build(tmp_path, tmp_path / "site")
    assert e.value.code == 1


def test_compare_times_no_other_vlmops_than_the_revisions(tmp_path, capfd):
    died = pytest.raises(BenchError, match="failed with code 1")
    with compare._Worker(tmp_path, os.environ) as worker, died as error:
        worker.ask(op="mrope", case="decode_b1", dtype="float32")
    assert error.value.code == 1
    assert f"expected vlmops and its library in {tmp_path}, got" in capfd.readouterr().err


def test_compare_refuses_what_it_cannot_compare(checkout, monkeypatch, capsys):
    assert cli.main(["bench", "compare", "mrope", "--base", "no-such"]) == 2
    assert "--base: expected a revision of " in capsys.readouterr().err
    monkeypatch.setattr(compare, "_gate", lambda *_: {})
    monkeypatch.setattr(compare, "_launch", lambda *_, **__: [])
    assert cli.main(["bench", "compare", "mrope", "--base", "HEAD"]) == 2
    assert "--base: HEAD has none of the cases" in capsys.readouterr().err
    monkeypatch.setattr(runner, "package", lambda: checkout.parent)
    assert cli.main(["bench", "compare", "mrope", "--base", "HEAD"]) == 2
    assert "needs a git checkout, and this vlmops is installed in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (["same", "faster"], 0),
        (["same", "slower", "not measured"], 1),
        (["same", "not measured"], 2),
    ],
)
def test_compare_exit_code_is_the_verdict(monkeypatch, capsys, verdicts, code):
    def run(base, request, threads, threshold):
        assert (base, request.op, threads, threshold) == ("main", "mrope", None, 1.2)
        rows = [dict(zip(("case", "dtype", "variant"), KEY, strict=True)) for _ in verdicts]
        head = {"op": "mrope", "device": "A CPU", "threads": 2, "launches": 5, "dirty": False}
        head["isa"] = {"vlmops": "avx2", "torch": "AVX2"}
        rows = [{**row, "verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)]
        return {**head, "base": "0" * 40, "commit": "1" * 40, "rows": rows}

    monkeypatch.setattr(compare, "run", run)
    argv = ["bench", "compare", "mrope", "--base", "main", "--threshold", "1.2"]
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert [line.split("forward")[1].strip() for line in out.splitlines()[4:]] == verdicts
    assert ("too busy" in err) == (code == 2)
