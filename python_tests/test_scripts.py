"""Scripts in bench/ start, and hand on what was asked for; mypy checks the names they use."""

import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "bench"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def run(monkeypatch):
    """Runs a script in this process, as the command line does."""

    def run(path, *argv):
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [str(path), *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        return stop.value.code

    yield run
    sys.modules.pop("e2e", None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_tell_what_they_do(run, path, capsys):
    assert not run(path, "--help")
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("script", ["e2e", "linear"])
@pytest.mark.parametrize("bound", [True, False])
def test_scripts_cap_what_they_are_told_to_wherever_threads_are_bound(
    run, script, bound, monkeypatch
):
    def start(argv, env):
        started.update(env)
        assert argv[1:] == [str(FOLDER / f"{script}.py"), *options]
        return types.SimpleNamespace(returncode=7)

    started, options = {}, ["--isa", "avx2", "--cpu-time"]
    monkeypatch.setattr(subprocess, "run", start)
    if bound:
        monkeypatch.setenv("OMP_PROC_BIND", "true")
    assert run(FOLDER / f"{script}.py", *options) == 7
    assert started["VLMOPS_CPU_ISA"] == started["ATEN_CPU_CAPABILITY"] == "avx2"
    assert started["TORCHINDUCTOR_CACHE_DIR"].endswith("-avx2")
    assert (started["OMP_NUM_THREADS"], started["OMP_PROC_BIND"]) == ("1", "true")


def test_scripts_measure_what_a_call_costs():
    command = [sys.executable, str(FOLDER / "call_cost.py"), "--samples", "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counts = [len(line[46:].split()) for line in ran.stdout.splitlines()[2:]]
    assert counts == [1, 1, 3, 3, 3, 1, 3]
