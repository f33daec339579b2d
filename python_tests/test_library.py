"""The built library keeps its promises: stable ABI, no Python, no OpenMP, old C libraries."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vlmops
from vlmops import _library

ROOT = Path(__file__).parent.parent
# What Debian 12's compiler asks for; a release wheel is built on an older system.
NEWEST = {"GLIBC": (2, 32), "GLIBCXX": (3, 4, 26), "CXXABI": (1, 3, 9)}


def dynamic(*flags):
    tool = {"nm": ["nm", "-D", "-C"], "readelf": ["readelf", "-d"]}[flags[0]]
    command = [*tool, *flags[1:], str(_library.path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def undefined():
    return [line.split(maxsplit=1)[1] for line in dynamic("nm", "--undefined-only").splitlines()]


def test_no_cpp_symbols_of_torch(undefined):
    """What we take from torch is C functions of its stable shim."""
    cpp = [s for s in undefined if "::" in s]
    assert not [s for s in cpp if re.search(r"\b(at|c10|torch|caffe2|pybind11)::", s)]
    assert not [s for s in cpp if not re.search(r"\bstd::|__cxxabiv1::", s)]
    shim = [s for s in undefined if s.startswith(("aoti_torch_", "torch_"))]
    assert "torch_parallel_for" in shim


def test_no_python_and_no_openmp(undefined):
    assert not [s for s in undefined if re.match(r"_?Py|GOMP_|omp_|__kmpc", s)]
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic("readelf"))
    assert "libtorch.so" in needed
    assert "libstdc++.so.6" in needed  # a copy within would break streams, and so error messages
    expected = r"libtorch\.so|lib(stdc\+\+|m|gcc_s|c|pthread|dl)\.so\.\d|ld-linux.*"
    assert not [n for n in needed if not re.fullmatch(expected, n)]
    assert "RPATH" not in dynamic("readelf")
    assert "RUNPATH" not in dynamic("readelf")


def test_defines_nothing_for_others_to_find():
    """Symbols of one kernel library must not meet those of another; two calls are for Python."""
    defined = dynamic("nm", "--defined-only").splitlines()
    ours = {line.split()[-1] for line in defined if "vlmops" in line}
    assert ours == {"vlmops_set_cuda", "vlmops_set_emulator"}


def test_c_library_versions(undefined):
    for name, newest in NEWEST.items():
        found = [
            tuple(map(int, v.split(".")))
            for s in undefined
            for v in re.findall(rf"@{name}_([\d.]+)", s)
        ]
        assert found
        assert max(found) <= newest, f"{name}: {max(found)}"


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("80-real 90-real 120", (8, 0), True),
        ("80-real 90-real 120", (8, 9), True),  # machine code of sm_80 runs on every sm_8x
        ("80-real 90-real 120", (10, 0), False),  # neither code nor older PTX
        ("80-real 90-real 120", (12, 1), True),
        ("80-real 90-real 120", (13, 0), True),  # by PTX
        ("80-real 90-real 120-real", (13, 0), False),
        ("86-real", (8, 0), False),
        ("90-virtual", (10, 3), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
    ],
)
def test_which_gpus_a_build_serves(monkeypatch, built, gpu, runs):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_library, "cuda_architectures", built)
    reason = _library.cuda_refuses(gpu)
    if runs:
        assert reason is None
    else:
        number = 10 * gpu[0] + gpu[1]
        assert f"the GPU is an sm_{number}, and this build of vlmops has kernels for " in reason
        assert all(f"sm_{entry.partition('-')[0]}" in reason for entry in built.split())
        assert f"VLMOPS_CUDA_ARCHITECTURES={number}" in reason


def test_wheel_tag_binds_to_no_cpython():
    wheel = importlib.metadata.distribution("vlmops").read_text("WHEEL")
    assert re.search(r"^Tag: py3-none-\w+$", wheel, re.MULTILINE)
    assert "Root-Is-Purelib: false" in wheel


def test_wheel_holds_the_package_and_one_library(tmp_path):
    """What `pip install .` installs: every module, wherever it lies, and nothing else."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert re.fullmatch(r"vlmops-[\d.]+-py3-none-\w+\.whl", wheel.name)
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vlmops").rglob("*.py")}
    assert names == modules | {"vlmops/libvlmops.so"}


def test_version_is_said_once():
    assert vlmops.__version__ == importlib.metadata.version("vlmops")


def test_every_op_is_in_every_room():
    """The list of ops is the tree's: csrc/ops, the Python side, its SPEC, a bench script."""
    ops = set(vlmops.ops.__all__)
    assert ops == {p.name for p in (ROOT / "csrc/ops").iterdir()}
    for op in ops:
        assert op in vlmops.__all__
        here = ROOT / f"csrc/ops/{op}"
        if [p.name for p in here.iterdir()] == [f"{op}.cpp"]:  # of others' kernels
            assert '#include "binding/' in (here / f"{op}.cpp").read_text()
        else:
            on_core = '"common/attention.h"' in (here / f"{op}.h").read_text()
            assert (
                ROOT / "csrc/common/attention_cpu.h" if on_core else here / f"{op}_cpu.h"
            ).exists()
        for room in (
            "csrc/ops/{0}/{0}.cpp",
            "vlmops/ops/{0}.py",
            "vlmops/ops/{0}_spec.py",
            "bench/{0}.py",
            "python_tests/ops/test_{0}.py",
        ):
            assert (ROOT / room.format(op)).exists(), room.format(op)
