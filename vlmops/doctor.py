"""``vlmops doctor``: whether vlmops works here, how fast it can be, and what to do about either."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import vlmops
import vlmops.ops
from vlmops import _cpus, _library, dispatch

if TYPE_CHECKING:
    from vlmops.survey import Inspection

    _Looked = tuple[list[Inspection], str, list[Inspection]]
    """Models, what was found in them, and those that rotted."""

MINIMUM_TORCH = (2, 11)

VARIABLES = ("VLMOPS_BACKEND", "VLMOPS_CHECK", "VLMOPS_CPU_ISA", "VLMOPS_LIBRARY")
"""Every environment variable that vlmops reads."""

Grade = Literal["ok", "advice", "problem"]
_GRADES: tuple[Grade, ...] = ("ok", "advice", "problem")
_WIDTH = 100
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A problem keeps vlmops from working, advice makes it faster."""

    topic: str
    grade: Grade
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        start = f"{self.grade:9}{self.topic:17}"
        indent = " " * len(start)
        fill = functools.partial(
            textwrap.fill, width=_WIDTH, break_on_hyphens=False, break_long_words=False
        )
        text = fill(start + self.found, subsequent_indent=indent)
        if self.remedy:
            text += "\n" + fill(
                self.remedy, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   "
            )
        return text


def examine(all_sites: bool = False) -> list[Finding]:
    """Looks at everything.

    Args:
        all_sites: Patch every vision-language model type, not one of each family that is known.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "vlmops": _vlmops,
        "torch": _torch,
        "GPU": _gpu,
        "Triton": _triton,
        "transformers": _transformers,
        "libvlmops": _libvlmops,
        "libvlmops_cuda": _libvlmops_cuda,
        "backends": _backends,
        "instruction set": _isa,
        "oneDNN": _onednn,
        "MKL": _mkl,
        "CPU": _cpu,
        "threads": _threads,
        "huge pages": _huge_pages,
        "environment": _environment,
    }
    findings = [_try(topic, check) for topic, check in checks.items()]
    grades = {finding.topic: finding.grade for finding in findings}
    needed = [t for t in ("transformers", "libvlmops", "instruction set") if grades[t] == "problem"]
    if needed or importlib.util.find_spec("transformers") is None:
        why = " and ".join(needed) or "transformers"
        return [*findings, Finding("sites", "advice", f"not looked for without {why}")]
    return [*findings, _try("sites", _all_sites if all_sites else _sites, "problem")]


def _try(topic: str, check: Callable[[], Finding], failed: Grade = "advice") -> Finding:
    try:
        return check()
    except Exception as error:  # torch and transformers of any version, on any machine
        found = f"could not be examined: {type(error).__name__}: {error}"
        return Finding(topic, failed, found, "please report this")


def report(findings: Sequence[Finding]) -> str:
    """For people: one block per finding, and how many of each grade there are."""
    grades = [finding.grade for finding in findings]
    counts = (f"{grades.count(grade)} {grade}" for grade in _GRADES)
    return "\n".join([*map(str, findings), "", ", ".join(counts)])


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {
        "works": all(finding.grade != "problem" for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _vlmops() -> Finding:
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    folder = Path(vlmops.__file__).parent
    return Finding("vlmops", "ok", f"{vlmops.__version__} in {folder}; {where}")


def _torch() -> Finding:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    found = f"{torch.__version__}, built {built}"
    minimum = ".".join(map(str, MINIMUM_TORCH))
    if _numbers(torch.__version__) < MINIMUM_TORCH:
        remedy = f"pip install -U 'torch>={minimum}'"
        return Finding("torch", "problem", f"{found}; vlmops needs {minimum} or later", remedy)
    return Finding("torch", "ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _gpu() -> Finding:
    driver = re.search(r"Module\D*([\d.]+)", _cpus.read("/proc/driver/nvidia/version") or "")
    loaded = f"driver {driver[1]}" if driver else "no NVIDIA driver"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", f"{', '.join(names)}; {loaded}")
    if driver and torch.version.cuda is None:
        remedy = "models run on the GPU with a torch that is built for CUDA"
        return Finding("GPU", "advice", f"{loaded}, and this torch has no CUDA", remedy)
    if driver:
        remedy = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
        return Finding("GPU", "advice", f"{loaded}, and torch sees no GPU", remedy)
    return Finding("GPU", "ok", f"none ({loaded})")


def _triton() -> Finding:
    version = _installed("triton")
    return Finding("Triton", "ok", version or "not installed; backend 'triton' needs it")


def _backends() -> Finding:
    """The default of every op on each kind of device, and whether it is more than a guess."""
    found = []
    for op in vlmops.ops.__all__:
        for device in ("cpu", "cuda"):
            try:
                choice = dispatch.default(op, device)
            except RuntimeError as error:
                found.append(f"{op} on {device}: none ({error})")
                continue
            kind = "measured" if choice.measured else "a guess, not measured"
            found.append(f"{op} on {device}: {choice.backend} ({kind})")
    return Finding("backends", "ok", "; ".join(found))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _transformers() -> Finding:
    from vlmops.hf.patch import _require_transformers

    try:
        _require_transformers()
    except ImportError as error:
        if importlib.util.find_spec("transformers") is None:
            return Finding("transformers", "advice", f"not installed: {error}")
        why = f" ({error.__cause__})" if error.__cause__ else ""
        return Finding("transformers", "problem", f"{error}{why}")
    return Finding("transformers", "ok", f"{_installed('transformers')}")


def _libvlmops() -> Finding:
    source = " (VLMOPS_LIBRARY)" if os.environ.get("VLMOPS_LIBRARY") else ""
    if _library.error is not None:
        return Finding("libvlmops", "problem", _library.error + source)
    return Finding("libvlmops", "ok", f"loaded from {_library.path}{source}")


def _libvlmops_cuda() -> Finding:
    topic = "libvlmops_cuda"
    if _library.cuda_error is not None:
        # Without a GPU nothing is missing, and Triton's kernels may do with one.
        grade: Grade = "advice" if torch.cuda.is_available() else "ok"
        return Finding(topic, grade, f"not loaded: {_library.cuda_error}")
    found = f"loaded, built for {_library.cuda_architectures}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            reason = _library.cuda_refuses(torch.cuda.get_device_capability(i))
            if reason is not None:
                return Finding(topic, "advice", f"{found}; GPU {i}: {reason}")
    return Finding(topic, "ok", found)


def _isa() -> Finding:
    topic = "instruction set"
    if _library.error is not None:
        return Finding(topic, "ok", "unknown, as libvlmops is not loaded")
    try:
        chosen = vlmops.cpu_isa()
    except RuntimeError as error:
        remedy = "correct or unset VLMOPS_CPU_ISA"
        return Finding(topic, "problem", str(error).splitlines()[0], remedy)
    best = torch.ops.vlmops.set_cpu_isa("")
    torch.ops.vlmops.set_cpu_isa(chosen)
    found = f"{chosen}; torch: {torch.backends.cpu.get_cpu_capability()}"
    if chosen != best:
        remedy = f"unset VLMOPS_CPU_ISA: this machine has {best}"
        return Finding(topic, "advice", found, remedy)
    return Finding(topic, "ok", f"{found}; the best of this machine")


def _onednn() -> Finding:
    if not torch.backends.mkldnn.is_available():
        remedy = "matrix products are faster with a torch that has it, as PyPI's"
        return Finding("oneDNN", "advice", "not in this torch", remedy)
    version = _built_with(r"MKL-DNN v([\d.]+)")
    flags = re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", _cpus.read("/proc/cpuinfo") or "")
    native = f"the CPU has {' and '.join(sorted(set(flags)))}" if flags else "not in hardware"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
        remedy = f"unset ONEDNN_MAX_CPU_ISA ({cap})" if cap and flags else "run models in float32"
        found = f"{version}; bfloat16 matrix products take 10 to 100 times as long as float32's"
        return Finding("oneDNN", "advice", found, remedy)
    return Finding("oneDNN", "ok", f"{version}; bfloat16: {native}")


def _mkl() -> Finding:
    if not torch.backends.mkl.is_available():
        return Finding("MKL", "ok", "not in this torch")
    return Finding("MKL", "ok", _built_with(r"Math Kernel Library Version ([\d.]+)"))


def _built_with(pattern: str) -> str:
    found = re.search(pattern, torch.__config__.show())
    return found[1] if found else "of unknown version"


def _cpu() -> Finding:
    found = f"{_cpus.name()}: {_cpus.cores()} cores, {len(_cpus.ALLOWED)} CPUs"
    others = (os.cpu_count() or 0) - len(_cpus.ALLOWED)
    return Finding("CPU", "ok", found + (f"; not for this process: {others}" if others > 0 else ""))


def _threads() -> Finding:
    threads, cores = torch.get_num_threads(), _cpus.cores()
    variables = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
    binding = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]
    if threads > cores:
        remedy = f"OMP_NUM_THREADS={cores}: two threads on one core wait for each other"
        return Finding("threads", "advice", f"{threads} on {cores} cores", remedy)
    if not binding or os.environ.get("OMP_PROC_BIND", "").lower() == "false":
        remedy = "OMP_PROC_BIND=true OMP_PLACES=cores keeps each on its core, for steadier times"
        return Finding("threads", "advice", f"{threads}, not bound", remedy)
    return Finding("threads", "ok", f"{threads}, bound by {' '.join(binding)}")


def _huge_pages() -> Finding:
    enabled = _cpus.read(_HUGE_PAGES)
    mode = re.search(r"\[(\w+)\]", enabled or "")
    if mode is None:
        return Finding("huge pages", "ok", "not in this kernel")
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    found = f"{mode[1]}; THP_MEM_ALLOC_ENABLE={'1' if asked else 'not set'}"
    if mode[1] == "always" or (mode[1] == "madvise" and asked):
        return Finding("huge pages", "ok", found)
    switch = f"as root: echo madvise > {_HUGE_PAGES}; then " if mode[1] == "never" else ""
    remedy = (
        f"{switch}THP_MEM_ALLOC_ENABLE=1, for every model: on two cores of a Zen 4, Hugging Face's "
        "M-RoPE of 16,384 tokens took 148 ms with it and 677 ms without"
    )
    return Finding("huge pages", "advice", found, remedy)


def _environment() -> Finding:
    names = sorted(name for name in os.environ if name.startswith("VLMOPS_"))
    found = " ".join(f"{name}={os.environ[name]}" for name in names) or "no VLMOPS_* is set"
    unknown = [name for name in names if name not in VARIABLES]
    if unknown:
        remedy = f"unset {' '.join(unknown)}: known are {' '.join(VARIABLES)}"
        return Finding("environment", "advice", found, remedy)
    return Finding("environment", "ok", found)


def _sites() -> Finding:
    return _graded(_families())


def _all_sites() -> Finding:
    from vlmops import survey

    every = list(survey.inspect_all())
    says = f"{survey.summary(every)}; vlmops inspect --all says which"
    # What is not built is transformers' affair: a package it wants, a default config of its own.
    rotten = [i for i in every if i.verdict in ("refused", "patch failed")]
    return _graded((every, says, rotten), _families())


def _families() -> _Looked:
    from vlmops import survey
    from vlmops.hf import targets

    found = [survey.inspect(next(iter(family))) for family in targets.families()]
    says = "; ".join(f"{i.model_type}: {survey.cells(i)}" for i in found)
    return found, says, [i for i in found if i.report is None or i.refused]


def _graded(*looked: _Looked) -> Finding:
    says = "; ".join(text for _, text, _ in looked)
    remedy = "please report this with the versions above"
    if not all(any(i.patched for i in found) for found, _, _ in looked):
        return Finding("sites", "problem", says, remedy)
    rotten = dict.fromkeys(i.model_type for _, _, some in looked for i in some)
    if rotten:
        return Finding("sites", "advice", says, f"{remedy}: {', '.join(rotten)}")
    return Finding("sites", "ok", says)
