"""`vlmops doctor`: what it finds, advises and returns, also where nothing works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vlmops
from vlmops import _cpus, _library, cli, doctor, survey
from vlmops.hf import targets
from vlmops.hf.report import PatchReport, Row

ROOT = Path(__file__).parent.parent
TOPICS = [
    "vlmops", "torch", "GPU", "Triton", "transformers", "libvlmops", "libvlmops_cuda",
    "backends", "instruction set", "oneDNN", "MKL", "CPU", "threads", "huge pages", "environment",
    "sites",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("VLMOPS_CPU_ISA", "OMP_PROC_BIND", "OMP_PLACES", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)


def test_doctor_finds_that_this_machine_works(capsys, tmp_path):
    path = tmp_path / "findings.json"
    assert cli.main(["doctor", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["works"] is True
    assert [finding["topic"] for finding in written["findings"]] == TOPICS
    found = {finding["topic"]: finding for finding in written["findings"]}
    for topic, says in {
        "torch": torch.__version__,
        "libvlmops": str(_library.path),
        "backends": "mrope on cpu: cpu (measured); mrope on cuda: ",
        "instruction set": vlmops.cpu_isa(),
        "CPU": f"{_cpus.cores()} cores",
    }.items():
        assert says in found[topic]["found"]
    for family in targets.families():
        assert f"{next(iter(family))}: " in found["sites"]["found"]
    counts = [sum(f["grade"] == grade for f in found.values()) for grade in ("ok", "advice")]
    assert out.splitlines()[-1] == f"{counts[0]} ok, {counts[1]} advice, 0 problem"
    assert max(map(len, out.splitlines())) <= max(100, len(str(_library.path)) + 30)


def test_doctor_prints_json_and_nothing_else(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_sites", lambda: doctor.Finding("sites", "ok", "two"))
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"][-1]["found"] == "two"


def test_doctor_survives_old_torch_no_transformers_and_a_bad_library(tmp_path):
    """A process of its own, since all three are settled when vlmops is imported."""
    library = tmp_path / "libvlmops.so"
    library.write_text("not a library")
    script = (
        "import sys, torch; torch.__version__ = '2.4.1+cpu'; sys.modules['transformers'] = None; "
        "from vlmops.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    env = {**os.environ, "VLMOPS_LIBRARY": str(library)}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "")
    written = json.loads(ran.stdout)
    assert written["works"] is False
    found = {finding["topic"]: finding for finding in written["findings"]}
    assert list(found) == TOPICS
    grades = {topic: finding["grade"] for topic, finding in found.items()}
    problems = [topic for topic, grade in grades.items() if grade == "problem"]
    assert problems == ["torch", "libvlmops"]
    assert "2.4.1+cpu, built" in found["torch"]["found"]
    assert found["torch"]["remedy"] == "pip install -U 'torch>=2.11'"
    assert f"{library} does not load into torch 2.4.1" in found["libvlmops"]["found"]
    assert "reinstall with: pip install" in found["libvlmops"]["found"]
    assert grades["transformers"] == "advice"
    assert "pip install -U 'transformers>=5.17'" in found["transformers"]["found"]
    assert found["sites"]["found"] == "not looked for without libvlmops"


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (lambda patch: patch.setitem(sys.modules, "transformers", None), 0),
        (lambda patch: patch.setattr("transformers.__version__", "5.16.2"), 1),
        (lambda patch: patch.setattr(_library, "error", "no library: build it"), 1),
        (lambda patch: patch.setattr(torch, "__version__", "2.10.0"), 1),
    ],
    ids=["transformers_missing", "transformers_old", "library_missing", "torch_old"],
)
def test_doctor_exit_code_tells_whether_vlmops_works(monkeypatch, capsys, problem, code):
    monkeypatch.setattr(doctor, "_sites", lambda: doctor.Finding("sites", "ok", "two"))
    problem(monkeypatch)
    assert cli.main(["doctor"]) == code
    assert ("0 problem" in capsys.readouterr().out) == (code == 0)


def _says(finding, grade, found, remedy=""):
    assert finding.grade == grade
    assert re.search(found, finding.found), finding.found
    assert re.search(remedy, finding.remedy), finding.remedy
    assert bool(finding.remedy) == bool(remedy)


def test_doctor_tells_a_broken_transformers_from_a_missing_one(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.16.2")
    _says(doctor._transformers(), "problem", r"5\.17 or later, found 5\.16\.2: pip install")
    monkeypatch.setitem(sys.modules, "transformers", None)
    _says(doctor._transformers(), "advice", r"not installed: .*pip install")


@pytest.mark.parametrize(
    ("enabled", "asked", "grade", "remedy"),
    [
        ("always [madvise] never", "", "advice", r"^THP_MEM_ALLOC_ENABLE=1, "),
        ("always [madvise] never", "1", "ok", ""),
        ("[always] madvise never", "", "ok", ""),
        ("always madvise [never]", "1", "advice", r"^as root: echo madvise > /sys/"),
        (None, "", "ok", ""),
    ],
)
def test_doctor_advises_huge_pages(monkeypatch, enabled, asked, grade, remedy):
    monkeypatch.setattr(_cpus, "read", lambda path: enabled)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", asked)
    _says(doctor._huge_pages(), grade, "" if enabled else "not in this kernel", remedy)


@pytest.mark.parametrize(
    ("threads", "env", "grade", "found", "remedy"),
    [
        (2, {}, "advice", "2, not bound", "OMP_PROC_BIND=true OMP_PLACES=cores"),
        (2, {"OMP_PROC_BIND": "FALSE"}, "advice", "2, not bound", "OMP_PROC_BIND=true"),
        (2, {"OMP_PROC_BIND": "true"}, "ok", "2, bound by OMP_PROC_BIND=true", ""),
        (2, {"GOMP_CPU_AFFINITY": "0 1"}, "ok", "bound by GOMP_CPU_AFFINITY=0 1", ""),
        (3, {"OMP_PROC_BIND": "true"}, "advice", "3 on 2 cores", "OMP_NUM_THREADS=2"),
    ],
)
def test_doctor_advises_threads(monkeypatch, threads, env, grade, found, remedy):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(_cpus, "cores", lambda: 2)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    _says(doctor._threads(), grade, found, remedy)


def test_doctor_advises_against_a_cap(monkeypatch, use_cpu_isa):
    _says(doctor._isa(), "ok", f"^{vlmops.cpu_isa()}; .*the best of this machine")
    best = vlmops.cpu_isa()
    use_cpu_isa("portable")
    _says(doctor._isa(), "advice", "^portable; torch: ", f"VLMOPS_CPU_ISA: this machine has {best}")
    assert vlmops.cpu_isa() == "portable", "looking changes nothing"

    def unknown():
        raise RuntimeError("VLMOPS_CPU_ISA: expected one of avx2, portable, got 'x'")

    monkeypatch.setattr(vlmops, "cpu_isa", unknown)
    _says(doctor._isa(), "problem", "expected one of .* got 'x'", "unset VLMOPS_CPU_ISA")


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"


@pytest.mark.parametrize(
    ("available", "driver", "cuda", "grade", "found", "remedy"),
    [
        (False, None, None, "ok", r"none \(no NVIDIA driver\)", ""),
        (False, DRIVER, None, "advice", r"driver 550\.54\.15, and this torch has no CUDA", "built"),
        (False, DRIVER, "13.0", "advice", "torch sees no GPU", "nvidia-smi"),
        (True, DRIVER, "13.0", "ok", r"A GPU, A GPU; driver 550\.54\.15", ""),
    ],
)  # fmt: skip
def test_doctor_finds_gpus(monkeypatch, available, driver, cuda, grade, found, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(_cpus, "read", lambda _: driver)
    _says(doctor._gpu(), grade, found, remedy)


@pytest.mark.parametrize(
    ("error", "gpus", "grade", "found"),
    [
        ("this torch is a build for CPUs", [], "ok", "not loaded: this torch is"),
        ("vlmops was built without CUDA", [(9, 0)], "advice", "not loaded: vlmops was built"),
        (None, [], "ok", "loaded, built for 80-real 90-real$"),
        (None, [(9, 0)], "ok", "loaded, built for 80-real 90-real$"),
        (
            None,
            [(9, 0), (12, 0)],
            "advice",
            "; GPU 1: the GPU is an sm_120, and this build .* sm_90",
        ),
    ],
)
def test_doctor_tells_of_cuda_kernels(monkeypatch, error, gpus, grade, found):
    monkeypatch.setattr(_library, "cuda_error", error)
    monkeypatch.setattr(_library, "cuda_architectures", "80-real 90-real")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    _says(doctor._libvlmops_cuda(), grade, found, "")


def test_doctor_advises_float32_where_bfloat16_is_slow(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(_cpus, "read", lambda _: "flags : avx2")
    _says(doctor._onednn(), "advice", r"^\d+\.\d.*bfloat16 .*times", "run models in float32")
    monkeypatch.setattr(_cpus, "read", lambda _: "flags : avx2 avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    _says(doctor._onednn(), "advice", "", r"unset ONEDNN_MAX_CPU_ISA \(AVX2\)")


def test_doctor_knows_every_variable_that_is_read(monkeypatch):
    read = set()
    for path in [*ROOT.glob("vlmops/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]:
        pattern = r'(?:getenv\(|environ\.get\(|environ\[)"(VLMOPS_\w+)"'
        read |= set(re.findall(pattern, path.read_text()))
    assert read == set(doctor.VARIABLES)
    monkeypatch.setenv("VLMOPS_CPU_ISA", "avx2")
    _says(doctor._environment(), "ok", "VLMOPS_CPU_ISA=avx2")
    monkeypatch.setenv("VLMOPS_CPU_ISAS", "avx2")
    _says(
        doctor._environment(),
        "advice",
        "=avx2",
        "unset VLMOPS_CPU_ISAS: known are VLMOPS_BACKEND VLMOPS_",
    )


@pytest.mark.parametrize(
    ("statuses", "grade"),
    [
        (["patched", "patched"], "ok"),
        (["patched", "refused"], "advice"),
        (["refused", "refused"], "problem"),
        (["not present", "not present"], "problem"),
    ],
)
def test_doctor_tells_sites_that_rotted(monkeypatch, statuses, grade):
    reports = [PatchReport("M", (Row("mrope", "A", "", 2, "", status),)) for status in statuses]
    monkeypatch.setattr(vlmops, "patch", lambda _: reports.pop(0))
    families = ({"qwen2_vl": (), "qwen2_5_vl": ()}, {"qwen3_vl": ()})
    monkeypatch.setattr(targets, "families", lambda: families)
    remedy = "" if grade == "ok" else "please report this with the versions above"
    _says(doctor._sites(), grade, r"^qwen2_vl: .*; qwen3_vl: ", remedy)


@pytest.mark.parametrize(
    ("families", "others", "grade", "remedy"),
    [
        (["patched"], ["patched", "not present"], "ok", ""),
        (["patched"], [None, "patched"], "ok", ""),
        (["patched"], ["patched", "refused"], "advice", "above: b$"),
        (["patched"], ["patched", RuntimeError("boom")], "advice", "above: b$"),
        (["patched", "refused"], ["patched", "patched"], "advice", "above: qwen3_vl$"),
        (["patched"], ["refused", "refused"], "problem", "above$"),
        (["patched"], [None, None], "problem", "above$"),
        ([RuntimeError("boom")], [RuntimeError("boom")], "problem", "above$"),
    ],
)
def test_doctor_grades_all_sites_by_their_verdicts(monkeypatch, families, others, grade, remedy):
    def inspection(model_type, status):
        if isinstance(status, str):
            report = PatchReport("M", (Row("mrope", "A", "", 2, "", status),))
            return survey.Inspection(model_type, "", report)
        return survey.Inspection(model_type, "", problem="bad", built=status is not None)

    known = dict(zip(("qwen2_vl", "qwen3_vl"), families, strict=False))
    monkeypatch.setattr(targets, "families", lambda: tuple({name: ()} for name in known))
    monkeypatch.setattr(survey, "inspect", lambda name: inspection(name, known[name]))
    every = [inspection(*pair) for pair in zip("ab", others, strict=False)]
    monkeypatch.setattr(survey, "inspect_all", lambda: iter(every))
    found = rf"^{len(others)} model types .*inspect --all says which; qwen2_vl: "
    _says(doctor._all_sites(), grade, found, remedy)


@pytest.mark.parametrize("option", [[], ["--sites"]])
def test_doctor_where_sites_cannot_be_examined_does_not_work(monkeypatch, capsys, option):
    def fail():
        raise AttributeError("no such family")

    monkeypatch.setattr(targets, "families", fail)
    monkeypatch.setattr(survey, "inspect_all", lambda: iter(()))
    assert cli.main(["doctor", *option]) == 1
    assert "could not be examined: AttributeError: no such family" in capsys.readouterr().out


def test_doctor_tells_what_it_could_not_look_at(monkeypatch, capsys):
    def fail():
        raise AttributeError("torch has no such thing")

    monkeypatch.setattr(doctor, "_mkl", fail)
    monkeypatch.setattr(doctor, "_all_sites", lambda: doctor.Finding("sites", "ok", "all of them"))
    assert cli.main(["doctor", "--sites"]) == 0
    out = capsys.readouterr().out
    assert "could not be examined: AttributeError: torch has no such thing" in out
    assert "please report this" in out
    assert "all of them" in out


def test_doctor_minimum_is_the_packages():
    minimum = ".".join(map(str, doctor.MINIMUM_TORCH))
    assert f'dependencies = ["torch>={minimum}"]' in (ROOT / "pyproject.toml").read_text()
