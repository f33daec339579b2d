"""Compiles the Triton kernels for GPUs that are not there, and holds the result to a budget.

    python python_tests/triton_aot.py [--arch 90] [kernel ..]

A process of its own: TRITON_INTERPRET replaces the compiler in the one that tests. Prints kernel,
architecture, registers, shared memory, spills and 128-bit accesses, and exits 1 if a budget is
exceeded. What a GPU makes of it in time is not known here.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vlmops.ops import mrope_triton

ARCHITECTURES = (80, 90, 100, 120)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip


class Recorder:
    """Stands in for a kernel: keeps what the launcher would have launched."""

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.grid, self.args, self.constants = grid, args, constants

        return launch


def recorded(call, kernel_name):
    """The arguments with which `call` launches the kernel of that name."""
    recorder = Recorder()
    original = getattr(mrope_triton, kernel_name)
    setattr(mrope_triton, kernel_name, recorder)
    launch, mrope_triton._launch = mrope_triton._launch, lambda k, g, _, *a, **c: k[g](*a, **c)
    try:
        call()
    finally:
        setattr(mrope_triton, kernel_name, original)
        mrope_triton._launch = launch
    return original, recorder


def source(kernel, recorder):
    """What triton.jit would compile for these arguments, on a GPU of any kind."""
    signature, constexprs, attrs = {}, {}, {}
    options = {k: v for k, v in recorder.constants.items() if k not in kernel.arg_names}
    given = iter(recorder.args)
    for param in kernel.params:
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(param.num,)] = recorder.constants[param.name]
            continue
        value = next(given)
        if value is None:
            signature[param.name] = "constexpr"
            constexprs[(param.num,)] = None
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            if not param.do_not_specialize_on_alignment:
                attrs[(param.num,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = param.annotation_type
    return ASTSource(kernel, signature, constexprs, attrs), options


def qwen(dtype, tokens=8, heads=(28, 4), d=128, r=64, layout="view", **options):
    """The arguments of a call; only dtypes, shapes and strides matter."""
    if layout == "fused":
        q, k = (torch.empty(tokens, 3, h, d, dtype=dtype).unbind(1)[1] for h in heads)
        ids = torch.zeros(2, tokens, dtype=torch.int64)
    else:
        q, k = (torch.empty(1, tokens, h, d, dtype=dtype).transpose(1, 2) for h in heads)
        ids = torch.zeros(3, 1, tokens, dtype=torch.int64)
    return [q, k, ids, torch.ones(r), torch.zeros(r, dtype=torch.int32)], options


def calls():
    """name -> (call, kernel, registers, 128-bit loads and stores at least)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    weight = torch.ones(128, dtype=bf16)

    def forward(dtype, *norm, rotation="half", **shape):
        args, _ = qwen(dtype, **shape)
        return lambda: mrope_triton.forward(*args, rotation, 1.0, 1, *norm)

    def backward(dtype):
        (q, k, *rest), _ = qwen(dtype, heads=(32, 8))
        args = q, k, q, k, *rest, "half", 1.0, 1, weight, weight
        return lambda: mrope_triton.norm_backward(*args)

    f, b = "mrope_kernel", "mrope_norm_backward_kernel"
    return {
        "qwen2vl bf16": (forward(bf16), f, 64, 2),
        "qwen2vl fp32": (forward(fp32), f, 96, 4),
        "pairs bf16": (forward(bf16, rotation="pairs", r=32), f, 96, 2),
        "qwen3vl norm bf16": (forward(bf16, weight, weight, heads=(32, 8)), f, 128, 2),
        "tower d80 bf16": (forward(bf16, heads=(16, 16), d=80, r=40, layout="fused"), f, 96, 2),
        "tower d72 bf16": (forward(bf16, heads=(16, 16), d=72, r=36, layout="fused"), f, 96, 0),
        "gemma d256 bf16": (forward(bf16, heads=(8, 4), d=256, r=128), f, 96, 2),
        "qwen3vl norm backward bf16": (backward(bf16), b, 168, 2),
    }


def key(kernel, recorder):
    """What decides whether triton.jit compiles anew, by its own code."""
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return str(binder(*recorder.args, **recorder.constants)[1])


def keys_by_model():
    """name -> number of compile keys over sizes: 1, multiples of 16, odd ones, decode steps."""
    bf16 = torch.bfloat16
    weight = torch.ones(128, dtype=bf16)

    def decode(step, heads, *norm):
        """One token, whose ids lie somewhere in those of a long sequence."""
        (q, k, _, *rest), _ = qwen(bf16, 1, heads)
        ids = torch.zeros(3, 1, 64, dtype=torch.int64)[..., step : step + 1]
        return q, k, ids, *rest, "half", 1.0, 1, *norm

    def prefill(tokens, *norm, **shape):
        args, _ = qwen(bf16, tokens, **shape)
        return *args, "half", 1.0, 1, *norm

    def gradient(tokens):
        q, k, *rest = prefill(tokens, weight, weight, heads=(32, 8))
        return q, k, q, k, *rest

    tower = {"heads": (16, 16), "d": 80, "r": 40, "layout": "fused"}
    norms = (weight, weight)
    run, sizes = mrope_triton, (1, 16, 17, 33, 64, 255, 1024)
    calls = {
        "text": [(run.forward, prefill(n)) for n in sizes]
        + [(run.forward, decode(i, (28, 4))) for i in (0, 1, 7, 16)],
        "text in place": [(run.in_place, prefill(n)) for n in sizes],
        "text backward": [(run.backward, prefill(n)) for n in sizes],
        "norm": [(run.forward, prefill(n, *norms, heads=(32, 8))) for n in sizes]
        + [(run.forward, decode(i, (32, 8), *norms)) for i in (0, 1, 7, 16)],
        "norm in place": [(run.in_place, prefill(n, *norms, heads=(32, 8))) for n in sizes],
        "norm backward": [(run.norm_backward, gradient(n)) for n in sizes],
        "tower": [(run.forward, prefill(n, **tower)) for n in sizes],
        "tower in place": [(run.in_place, prefill(n, **tower)) for n in sizes],
        "tower backward": [(run.backward, prefill(n, **tower)) for n in sizes],
        "partial": [(run.forward, prefill(n, r=32)) for n in sizes],
    }
    return {
        name: len({key(*recorded(lambda f=f, a=a: f(*a), kernel_of(f))) for f, a in of_model})
        for name, of_model in calls.items()
    }


def kernel_of(function):
    gradient = function is mrope_triton.norm_backward
    return "mrope_norm_backward_kernel" if gradient else "mrope_kernel"


def disassemble(cubin):
    """SASS, registers, spilled bytes and shared memory of the one kernel of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(tool) if tool.exists() else shutil.which("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage, sass = (
            subprocess.run(
                [tool, *flags, f.name], capture_output=True, text=True, check=True
            ).stdout
            for flags in (["-res-usage"], ["-sass"])
        )
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return sass, numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append")
    parser.add_argument("--keep", type=Path, help="a folder for PTX and SASS")
    parser.add_argument("only", nargs="*")
    options = parser.parse_args()
    failed = 0
    print(f"triton {triton.__version__}: {'kernel':28}{'arch':>8}{'regs':>6}{'shared':>8}"
          f"{'spill':>6}{'ld.128':>7}{'st.128':>7}  sines a thread")  # fmt: skip
    for name, (call, kernel_name, registers, wide) in calls().items():
        if options.only and name not in options.only:
            continue
        kernel, recorder = recorded(call, kernel_name)
        for arch in options.arch or ARCHITECTURES:
            src, _ = source(kernel, recorder)
            compiled = triton.compile(
                src, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 1}
            )
            sass, numbers = disassemble(compiled.asm["cubin"])
            if options.keep:
                stem = options.keep / f"{name.replace(' ', '_')}_{arch}"
                stem.with_suffix(".sass").write_text(sass)
                for kind in ("ttgir", "ptx"):
                    stem.with_suffix(f".{kind}").write_text(compiled.asm[kind])
            loads = len(re.findall(r"LDG\S*\.128", sass))
            stores = len(re.findall(r"STG\S*\.128", sass))
            spilled = numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(LDL|STL)\b", sass))
            # pi/2's first part, which one sine takes three times.
            angles = len(re.findall(r"1\.570796\d*", sass)) // 3
            problems = [
                text
                for text, bad in {
                    f"more than {registers} registers": numbers["REG"] > registers,
                    "spills": spilled > 0,
                    f"fewer than {wide} 128-bit loads": loads < wide,
                    f"fewer than {wide} 128-bit stores": stores < wide,
                    "sines computed by every thread again": angles > 2,
                }.items()
                if bad
            ]
            failed += bool(problems)
            print(f"{'BAD' if problems else 'ok':15}{name:28}{f'sm_{arch}':>8}{numbers['REG']:6}"
                  f"{numbers['SHARED']:8}{spilled:6}{loads:7}{stores:7}{angles:7}  "
                  f"{', '.join(problems)}", flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
