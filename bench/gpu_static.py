"""Compiles every CUDA kernel for every architecture, no GPU needed, and holds it to its budget.

    python bench/gpu_static.py [--arch 90] [--write]

Per kernel and architecture: registers, static shared memory, spills, local memory and 128-bit
accesses, as ptxas and the disassembler tell. The budget, csrc/gpu_budget.json, has the most
registers that a kernel may take (more would cost occupancy) and the fewest 128-bit accesses; spills
and local memory are never allowed. ``--write`` renews it.

nvcc and cuobjdump are taken from PATH, CUDACXX or PyPI's packages (pip install -e ".[cuda]").
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "csrc" / "gpu_budget.json"
ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")
# What one multiprocessor holds: registers, and threads.
REGISTERS, THREADS = 65536, {"86": 1536, "89": 1536, "120": 1536}


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit."""
    chosen = os.environ.get("CUDACXX") if name == "nvcc" else None
    beside = [Path(p) / "nvidia" / "cu13" / "bin" / name for p in sys.path]
    found = chosen or next((str(p) for p in beside if p.exists()), None) or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"gpu_static: no {name} on PATH and no PyPI package of it: pip install -e '.[cuda]'"
        )
    return found


def command(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"gpu_static: {args[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short(symbol: str) -> str:
    """A kernel's name and template arguments, without parameters and namespaces."""
    name = command("c++filt", symbol).strip()
    name = re.sub(r"\(vlmops::\w+::(\w+)\)(?=\d)", r"\1 ", name).removeprefix("void ")
    return re.sub(r"vlmops::(\w+::)?", "", name[: name.rindex("(")])


def compiled(source: Path, arch: str, folder: Path) -> dict[str, dict[str, int]]:
    """Kernel -> what ptxas and the disassembler say of it."""
    nvcc, cubin = tool("nvcc"), folder / f"{source.stem}-{arch}.cubin"
    lib = Path(nvcc).resolve().parents[1] / "lib"
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", f"-L{lib}"]
    told = command(nvcc, *flags, "-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin))
    kernels: dict[str, dict[str, int]] = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for symbol, stack, stores, loads, registers, rest in re.findall(pattern, told, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[symbol] = {
            "registers": int(registers),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(stores) + int(loads),
            "stack": int(stack),
        }
    code = command(tool("cuobjdump"), "-sass", str(cubin))
    for part in re.split(r"Function : ", code)[1:]:
        kernel = kernels[part.split()[0]]
        kernel["local"] = len(re.findall(r"\b(?:LDL|STL)\b", part))
        kernel["wide"] = len(re.findall(r"\b(?:LDG|STG)\.E\.128\b|\b(?:LDG|STG)\.\S*128", part))
    return {short(symbol): kernel for symbol, kernel in kernels.items()}


def occupancy(kernel: dict[str, int], arch: str, threads: int = 256) -> float:
    """Of a block's threads, by registers alone."""
    per_block = -(-kernel["registers"] // 8) * 8 * threads
    most = THREADS.get(arch.rstrip("a"), 2048)
    return min(REGISTERS // per_block * threads, most) / most


def problems(found: dict[str, dict[str, int]], budget: dict[str, dict[str, int]]) -> list[str]:
    """What is over budget, in words."""
    wrong = []
    for name, kernel in found.items():
        for what in ("spills", "stack", "local"):
            if kernel[what]:
                wrong.append(f"{name}: {what} {kernel[what]}, expected none")
        allowed = budget.get(name)
        if allowed is None:
            wrong.append(f"{name}: has no budget; run bench/gpu_static.py --write and look at it")
            continue
        if kernel["registers"] > allowed["registers"]:
            wrong.append(f"{name}: {kernel['registers']} registers of {allowed['registers']}")
        if kernel["wide"] < allowed["wide"]:
            wrong.append(f"{name}: {kernel['wide']} 128-bit accesses, expected {allowed['wide']}")
    wrong += [f"{name}: in the budget and not compiled" for name in budget.keys() - found.keys()]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated")
    parser.add_argument("--write", action="store_true", help="make what was found the budget")
    options = parser.parse_args()
    architectures = options.arch or ARCHITECTURES
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    wrong = []
    print(f"{'kernel':58}{'sm':>5}{'regs':>6}{'smem':>6}{'spill':>6}{'128b':>6}{'occup.':>8}")
    for arch in architectures:
        found: dict[str, dict[str, int]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for source in sorted(ROOT.glob("csrc/ops/*/*.cu")):
                found |= compiled(source, arch, Path(folder))
        for name, kernel in sorted(found.items()):
            print(
                f"{name:58}{arch:>5}{kernel['registers']:6}{kernel['shared']:6}"
                f"{kernel['spills']:6}{kernel['wide']:6}{occupancy(kernel, arch):8.0%}"
            )
        if options.write:
            budget[arch] = {n: {w: k[w] for w in ("registers", "wide")} for n, k in found.items()}
        wrong += [f"sm_{arch}: {text}" for text in problems(found, budget.get(arch, {}))]
    if options.write:
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    print("\n".join(wrong) or f"all within budget: {', '.join(f'sm_{a}' for a in architectures)}")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
