"""Compiles the Triton kernels for GPUs that are not there, and holds the result to a budget.

    python python_tests/triton_aot.py [--arch 90] [kernel ..]

A process of its own: TRITON_INTERPRET replaces the compiler in the one that tests. Prints kernel,
architecture, registers, shared memory, spills, 128-bit accesses, instructions of tensor cores and
asynchronous copies; exits 1 if a budget is exceeded. What a GPU makes of it in time is not known.
"""

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vlmops.ops import (
    add_norm_triton,
    gated_residual_triton,
    hd_transform_triton,
    mlp_projector_triton,
    mrope_triton,
    packed_attention_triton,
    patch_embed_triton,
    perceiver_attention_triton,
    pixel_shuffle_triton,
    spatial_aggregate_triton,
)
from vlmops.ops.patch_embed import Position, arguments
from vlmops.ops.pixel_shuffle import Options

ARCHITECTURES = (80, 90, 100, 120)
SHARED = 99 * 1024  # what a block may have on sm_86, 89 and 120; on the others it is more
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
            torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32",
            torch.int16: "*i16", torch.uint8: "*u8"}  # fmt: skip


class Recorder:
    """Stands in for a kernel: keeps what the launcher would have launched."""

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.grid, self.args, self.constants = grid, args, constants

        return launch


def recorded(module, call, kernel_name):
    """The arguments with which `call` launches the module's kernel of that name."""
    recorder, others = Recorder(), Recorder()
    kernels = {n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction)}
    launch = module._launch
    for name in kernels:
        setattr(module, name, recorder if name == kernel_name else others)
    module._launch = lambda k, g, _, *a, **c: k[g](*a, **c)
    try:
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        module._launch = launch
    return kernels[kernel_name], recorder


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


class Budget(NamedTuple):
    """A call, the kernel of it to look at, and what that may and must have."""

    module: ModuleType
    kernel: str
    call: Callable[[], object]
    registers: int
    wide: int
    """128-bit loads and stores at least."""
    product: bool = False
    """Whether tensor cores multiply, fed by asynchronous copies."""


def qwen(dtype, tokens=8, heads=(28, 4), d=128, r=64, layout="view", **options):
    """The arguments of a call; only dtypes, shapes and strides matter."""
    if layout == "fused":
        q, k = (torch.empty(tokens, 3, h, d, dtype=dtype).unbind(1)[1] for h in heads)
        ids = torch.zeros(2, tokens, dtype=torch.int64)
    else:
        q, k = (torch.empty(1, tokens, h, d, dtype=dtype).transpose(1, 2) for h in heads)
        ids = torch.zeros(3, 1, tokens, dtype=torch.int64)
    return [q, k, ids, torch.ones(r), torch.zeros(r, dtype=torch.int32)], options


def mrope_calls():
    bf16, fp32 = torch.bfloat16, torch.float32
    weight = torch.ones(128, dtype=bf16)

    def forward(dtype, registers, wide, *norm, rotation="half", **shape):
        args, _ = qwen(dtype, **shape)
        call = functools.partial(mrope_triton.forward, *args, rotation, 1.0, 1, *norm)
        return Budget(mrope_triton, "mrope_kernel", call, registers, wide)

    (q, k, *rest), _ = qwen(bf16, heads=(32, 8))
    backward = functools.partial(
        mrope_triton.norm_backward, q, k, q, k, *rest, "half", 1.0, 1, weight, weight
    )
    tower = {"heads": (16, 16), "layout": "fused"}
    return {
        "qwen2vl bf16": forward(bf16, 64, 2),
        "qwen2vl fp32": forward(fp32, 96, 4),
        "pairs bf16": forward(bf16, 96, 2, rotation="pairs", r=32),
        "qwen3vl norm bf16": forward(bf16, 128, 2, weight, weight, heads=(32, 8)),
        "tower d80 bf16": forward(bf16, 96, 2, d=80, r=40, **tower),
        "tower d72 bf16": forward(bf16, 96, 0, d=72, r=36, **tower),
        "gemma d256 bf16": forward(bf16, 96, 2, heads=(8, 4), d=256, r=128),
        "qwen3vl norm backward bf16": Budget(
            mrope_triton, "mrope_norm_backward_kernel", backward, 168, 2),
    }  # fmt: skip


def embedding(
    shape, weight, dtype=torch.bfloat16, pixels=None, rows=0, taps=0, prefix=0, **options
):
    """The arguments of the op; only dtypes, shapes and strides matter."""
    x, d = torch.empty(shape, dtype=pixels or dtype), weight[0]
    positions = []
    if rows:
        index = torch.zeros(x.shape[0], taps, dtype=torch.int64) if taps else None
        factor = torch.empty(x.shape[0], taps, dtype=dtype) if taps else None
        positions = [Position(torch.empty(rows, d, dtype=dtype), index, factor)]
    if pixels == torch.uint8:
        options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    extra = torch.empty(prefix, d, dtype=dtype) if prefix else None
    return arguments(x, torch.empty(weight, dtype=dtype), torch.empty(d, dtype=dtype), prefix=extra,
                     positions=positions, **options)  # fmt: skip


def patch_embed_calls():
    fp32, fp16 = torch.float32, torch.float16
    clip = {"weight": (1024, 3, 14, 14), "prefix": 1, "rows": 577}
    many, one = (8, 3, 336, 336), (1, 3, 336, 336)
    qwen2, qwen3 = (1280, 3, 2, 14, 14), (1152, 3, 2, 16, 16)
    run, kernel = patch_embed_triton, "product_kernel"

    def product(registers, wide, *args, tensor_cores=True, **inputs):
        call = functools.partial(run.forward, *embedding(*args, **inputs))
        return Budget(run, kernel, call, registers, wide, tensor_cores)

    normed = functools.partial(
        run.forward, *embedding((4096, 1176), (1536, 3, 2, 14, 14), rows=64, taps=16, norm="rms")
    )
    packed = run.Arguments(*embedding(many, (1024, 3, 14, 14)))
    return {
        "clip p14 bf16": product(208, 8, many, **clip),
        "clip p14 bf16, one image": product(128, 4, one, **clip),
        "clip p14 fp16": product(208, 8, many, dtype=fp16, **clip),
        "clip p14 bf16 of fp32": product(208, 8, many, pixels=fp32, **clip),
        "clip p14 bf16 of uint8": product(144, 4, many, pixels=torch.uint8, **clip),
        "clip p14 fp32": product(168, 8, many, dtype=fp32, tensor_cores=False, **clip),
        "siglip p16 bf16": product(176, 8, (8, 3, 512, 512), (1152, 3, 16, 16), rows=1024),
        "qwen2vl flat bf16": product(168, 8, (4096, 1176), qwen2),
        "qwen3vl flat bf16, 4 taps": product(184, 8, (4096, 1536), qwen3, rows=2304, taps=4),
        "ovis2 norm bf16": Budget(run, "finish_kernel", normed, 128, 4),
        "pack p14 bf16": Budget(
            run, "pack_kernel", lambda: run.pack(packed, 0, 576, torch.bfloat16), 64, 0),
    }  # fmt: skip


def mlp_projector_calls():
    run, kernels = mlp_projector_triton, mlp_projector_triton.KERNELS

    def hidden(rows=2880, width=4096, dtype=torch.bfloat16):
        return torch.empty(rows, width, dtype=dtype)

    def activate(registers, wide, gate, kind, dtype=torch.bfloat16):
        h = hidden(dtype=dtype)
        call = functools.partial(kernels.activate, h, h if gate else None, kind, h)
        return Budget(run, "activate_kernel", call, registers, wide)

    def backward(registers, wide, gate, kind):
        h = hidden()
        call = functools.partial(
            kernels.activate_backward, h, h, h if gate else None, kind, h, True, True, gate
        )
        return Budget(run, "activate_backward_kernel", call, registers, wide)

    x, row = hidden(3328), torch.empty(4096, dtype=torch.bfloat16)
    norm = functools.partial(kernels.norm, x, "layer", row, row, 1e-5, 0.0)
    norm_backward = functools.partial(
        kernels.norm_backward, x, x, "layer", row, 1e-5, 0.0, x, True, True
    )
    return {
        "gelu bf16": activate(64, 1, False, "gelu"),
        "gelu fp32": activate(64, 2, False, "gelu", torch.float32),
        "swiglu bf16": activate(64, 1, True, "silu"),
        "gelu backward bf16": backward(96, 4, False, "gelu"),
        "swiglu backward bf16": backward(96, 6, True, "silu"),
        "layer norm bf16": Budget(run, "norm_kernel", norm, 64, 2),
        "layer norm backward bf16": Budget(run, "norm_backward_kernel", norm_backward, 96, 2),
        "layer norm sums bf16": Budget(run, "norm_sums_kernel", norm_backward, 64, 0),
    }


def crops(grids=((2, 2),), dtype=torch.bfloat16, g=24, channels=1024, **options):
    """The arguments of the op; only dtypes, shapes and strides matter."""
    o = hd_transform_triton.Options([n for grid in grids for n in grid], **options)
    features = torch.empty(sum(1 + h * w for h, w in grids), g * g + o.skip_prefix, channels)
    learned = torch.empty(channels * (1 if o.reduction == "mean" else o.factor**2), dtype=dtype)
    return features.to(dtype), learned, learned, *o


def hd_transform_calls():
    run, kernel, fp32 = hd_transform_triton, "place_kernel", torch.float32
    phi4 = {"g": 32, "channels": 1152, "reduction": "mean"}

    def forward(registers, wide, **inputs):
        call = functools.partial(run.forward, *crops(**inputs))
        return Budget(run, kernel, call, registers, wide)

    given = crops(skip_prefix=1)
    grad = torch.empty(12 * 2 * (12 * 2 + 1) + 1 + 12 * 13, 4096, dtype=torch.bfloat16)
    return {
        "phi3.5 bf16": forward(64, 4, skip_prefix=1),
        "phi3.5 fp32": forward(96, 4, dtype=fp32, skip_prefix=1),
        "phi4 mean bf16": forward(96, 1, **phi4),
        "phi3.5 backward bf16": Budget(
            run, kernel, functools.partial(run.backward, grad, *given), 64, 4),
    }  # fmt: skip


def gated(rows=512, gates=1, dtype=torch.bfloat16, masked=False):
    """The arguments of the op; only dtypes, shapes and strides matter."""
    x = torch.empty(1, rows, 4096, dtype=dtype)
    mask = torch.ones(1, rows, dtype=torch.bool) if masked else None
    return x, x, torch.empty(gates, dtype=dtype), mask


def gated_residual_calls():
    run = gated_residual_triton

    def budget(kernel, registers, wide, **inputs):
        function = run.forward if kernel == "forward_kernel" else run.backward
        return Budget(run, kernel, functools.partial(function, *gated(**inputs)), registers, wide)

    channels = {"gates": 4096, "masked": True}
    return {
        "residual bf16": budget("forward_kernel", 64, 2),
        "residual channels bf16": budget("forward_kernel", 64, 2, **channels),
        "residual fp32": budget("forward_kernel", 64, 2, dtype=torch.float32),
        "residual backward bf16": budget("backward_kernel", 64, 2, masked=True),
        "residual backward channels bf16": budget("backward_kernel", 64, 2, **channels),
        "residual gate bf16": budget("gate_grad_kernel", 64, 0),
        "residual gate channels bf16": budget("gate_grad_kernel", 64, 0, **channels),
    }


def gated_residual_keys():
    """name -> number of compile keys over numbers of rows."""
    run, sizes = gated_residual_triton, (1, 16, 17, 512)

    def number(kernel, function, **inputs):
        calls = [functools.partial(function, *gated(n, **inputs)) for n in sizes]
        return number_of_keys(run, kernel, calls)

    return {
        "forward": number("forward_kernel", run.forward),
        "forward, channels": number("forward_kernel", run.forward, gates=4096, masked=True),
        "backward": number("backward_kernel", run.backward, masked=True),
        "gate": number("gate_grad_kernel", run.backward, gates=4096),
    }


def summed(rows=512, channels=4096, dtype=torch.bfloat16, vector=None):
    """Rows and a vector of their width; only dtypes, shapes and strides matter."""
    x = torch.empty(1, rows, channels, dtype=dtype)
    return x, torch.empty(channels, dtype=vector or dtype)


def add_norm_forward(**inputs):
    x, v = summed(**inputs)
    add_norm_triton.forward(x, x, v, v, v, 1e-5, False, True)


def add_norm_backward(**inputs):
    x, v = summed(**inputs)
    add_norm_triton.backward(x, x, v, v, v, x, 1e-5, False, True, True, True, True)


def add_norm_calls():
    def budget(kernel, function, registers, wide, **inputs):
        return Budget(
            add_norm_triton, kernel, functools.partial(function, **inputs), registers, wide
        )

    qformer = {"channels": 768, "dtype": torch.float32}
    return {
        "add norm bf16": budget("forward_kernel", add_norm_forward, 48, 4),
        "add norm fp32": budget("forward_kernel", add_norm_forward, 48, 6, **qformer),
        "add norm backward bf16": budget("backward_kernel", add_norm_backward, 80, 2),
        "add norm backward fp32": budget("backward_kernel", add_norm_backward, 64, 3, **qformer),
        "add norm sums bf16": budget("sums_kernel", add_norm_backward, 64, 0),
    }


def add_norm_keys():
    """name -> number of compile keys over numbers of rows."""
    sizes = (1, 16, 17, 512)

    def number(kernel, function, **inputs):
        calls = [functools.partial(function, rows=n, **inputs) for n in sizes]
        return number_of_keys(add_norm_triton, kernel, calls)

    return {
        "forward": number("forward_kernel", add_norm_forward),
        "forward, float32 vectors": number(
            "forward_kernel", add_norm_forward, vector=torch.float32
        ),
        "backward": number("backward_kernel", add_norm_backward),
        "sums": number("sums_kernel", add_norm_backward),
    }


def shuffled(tiles=13, channels=1024, dtype=torch.bfloat16, vectors=0, grid=None, **options):
    """The arguments of the op, for tiles of 32 x 32 or a packed grid."""
    shape = (tiles, 1024, channels) if grid is None else (grid[0] * grid[1], channels)
    vector = torch.empty(vectors, dtype=dtype) if vectors else None
    if grid is not None:
        options |= {"layout": "packed", "grid_hw": list(grid)}
    return torch.empty(shape, dtype=dtype), *Options(vector, vector, **options)


_MISTRAL = {"grid": (110, 110), "vectors": 1024, "norm": "rms", "norm_axis": "channel",
            "order": "cyx"}  # fmt: skip


def pixel_shuffle_calls():
    run = pixel_shuffle_triton

    def budget(kernel, registers, wide, **inputs):
        call = functools.partial(run.forward, *shuffled(**inputs))
        return Budget(run, kernel, call, registers, wide)

    x, *options = shuffled(vectors=4096, norm="layer")
    gradient = functools.partial(run.backward, x.new_empty(13, 256, 4096), x, *options)
    inverse = functools.partial(run.inverse, x.new_empty(13, 256, 4096))
    return {
        "shuffle bf16": budget("shuffle_kernel", 40, 1),
        "shuffle fp32": budget("shuffle_kernel", 40, 2, dtype=torch.float32),
        "shuffle cyx bf16": budget("shuffle_kernel", 40, 0, order="cyx"),
        "shuffle inverse bf16": Budget(run, "shuffle_kernel", inverse, 40, 1),
        "shuffle layer bf16": budget("norm_kernel", 96, 1, vectors=4096, norm="layer"),
        "shuffle layer 12800 bf16": budget(
            "norm_kernel", 128, 1, channels=3200, vectors=12800, norm="layer"),
        "shuffle mistral3 bf16": budget("norm_quads_kernel", 128, 0, **_MISTRAL),
        "shuffle layer backward bf16": Budget(run, "norm_backward_kernel", gradient, 168, 1),
    }  # fmt: skip


def pixel_shuffle_keys():
    """name -> number of compile keys over batches and grids."""
    run, sizes = pixel_shuffle_triton, (1, 2, 13, 16)
    grids = [(2, 2), (16, 16), (38, 64), (110, 110)]
    layer = {"vectors": 4096, "norm": "layer"}

    def forwards(**inputs):
        return [functools.partial(run.forward, *shuffled(n, **inputs)) for n in sizes]

    def gradient(n):
        x, *options = shuffled(n, **layer)
        return functools.partial(run.backward, x.new_empty(n, 256, 4096), x, *options)

    packed = [functools.partial(run.forward, *shuffled(**{**_MISTRAL, "grid": g})) for g in grids]
    return {
        "tiles": number_of_keys(run, "shuffle_kernel", forwards()),
        "tiles, norm": number_of_keys(run, "norm_kernel", forwards(**layer)),
        "grids": number_of_keys(run, "norm_quads_kernel", packed),
        "backward": number_of_keys(run, "norm_backward_kernel", [gradient(n) for n in sizes]),
    }


def attended(lengths, heads, dim, dtype=torch.bfloat16, kv_heads=None, batched=False, **options):
    """The arguments of the op, packed or a batch; only dtypes, shapes and strides matter."""
    counts = heads, *[kv_heads or heads] * 2
    rows = torch.empty(sum(lengths), sum(counts) * dim, dtype=dtype)
    split = rows.split([n * dim for n in counts], -1)
    q, k, v = (t.unflatten(-1, (-1, dim)) for t in split)
    if batched:
        q, k, v = (t.unflatten(0, (len(lengths), -1)) for t in (q, k, v))
    else:
        ends = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
        options["cu_seqlens"] = torch.cat([ends.new_zeros(1), ends])
    return q, k, v, *packed_attention_triton.Options(**options)


def packed_attention_calls():
    run, fp32 = packed_attention_triton, torch.float32
    qwen, clip = ([64] * 16, 16, 80), ([577] * 5, 16, 64)
    padding = torch.zeros(6432, dtype=torch.bool)
    decode = {"kv_heads": 2, "batched": True}

    def budget(kernel, registers, wide, *args, staged=True, **inputs):
        args = attended(*args, **inputs)
        call = functools.partial(run.forward, *args)
        if kernel != "forward_kernel":
            q, rows = args[0], args[0].shape[:-2].numel()
            statistics = torch.empty(2, q.shape[-2], rows)
            call = functools.partial(run.backward, q, *args[:3], q, statistics, *args[3:])
        return Budget(run, kernel, call, registers, wide, staged and inputs.get("dtype") != fp32)

    forward, of_kv, of_q = "forward_kernel", "backward_kv_kernel", "backward_q_kernel"
    return {
        "attention d80 bf16": budget(forward, 255, 0, [5476], 16, 80),
        "attention d80 windows bf16": budget(forward, 255, 0, *qwen, max_seqlen=64),
        "attention d72 bf16": budget(forward, 255, 0, [4096], 16, 72),
        "attention d64 bf16": budget(forward, 255, 0, *clip, batched=True),
        "attention d96 bf16": budget(forward, 255, 0, [4096], 16, 96),
        "attention d128 causal bf16": budget(forward, 255, 0, [4096], 16, 128, causal=True),
        "attention d256 bf16": budget(forward, 255, 0, [4096], 16, 256, staged=False),
        "attention mllama bf16": budget(
            forward, 255, 0, [6432], 16, 80, padding=padding, staged=False),
        "attention decode bf16": budget(forward, 255, 0, [1] * 16, 14, 64, **decode),
        "attention d64 fp32": budget(forward, 255, 0, *clip, dtype=fp32),
        "attention d64 windows bf16": budget(forward, 255, 0, [64] * 16, 16, 64, max_seqlen=64),
        "attention d96 fp32": budget(forward, 255, 0, [4096], 16, 96, dtype=fp32),
        "attention d80 fp32": budget(forward, 255, 0, *qwen, dtype=fp32),
        "attention d128 fp32": budget(forward, 255, 0, [4096], 16, 128, dtype=fp32),
        "attention d256 fp32": budget(forward, 255, 0, [4096], 16, 256, dtype=fp32),
        "attention delta d80 bf16": budget(
            "delta_kernel", 255, 0, [5476], 16, 80, staged=False),
        "attention dkv d80 bf16": budget(of_kv, 255, 0, [5476], 16, 80),
        "attention dkv d96 bf16": budget(of_kv, 255, 0, [4096], 16, 96),
        "attention dkv d64 bf16": budget(of_kv, 255, 0, *clip, batched=True),
        "attention dkv mllama bf16": budget(
            of_kv, 255, 0, [6432], 16, 80, padding=padding, staged=False),
        "attention dkv d128 causal bf16": budget(of_kv, 255, 0, [4096], 16, 128, causal=True),
        "attention dkv d256 bf16": budget(of_kv, 255, 0, [4096], 16, 256),
        "attention dkv d80 fp32": budget(of_kv, 255, 0, *qwen, dtype=fp32),
        "attention dkv d128 fp32": budget(of_kv, 255, 0, [4096], 16, 128, dtype=fp32),
        "attention dkv d256 fp32": budget(of_kv, 255, 0, [4096], 16, 256, dtype=fp32),
        "attention dq d80 bf16": budget(of_q, 255, 0, [5476], 16, 80),
        "attention dq d96 bf16": budget(of_q, 255, 0, [4096], 16, 96),
        "attention dq d64 bf16": budget(of_q, 255, 0, *clip, batched=True),
        "attention dq mllama bf16": budget(
            of_q, 255, 0, [6432], 16, 80, padding=padding, staged=False),
        "attention dq d128 causal bf16": budget(of_q, 255, 0, [4096], 16, 128, causal=True),
        "attention dq d256 bf16": budget(of_q, 255, 0, [4096], 16, 256),
        "attention dq d80 fp32": budget(of_q, 255, 0, *qwen, dtype=fp32),
        "attention dq d128 fp32": budget(of_q, 255, 0, [4096], 16, 128, dtype=fp32),
        "attention dq d256 fp32": budget(of_q, 255, 0, [4096], 16, 256, dtype=fp32),
    }  # fmt: skip


def packed_attention_keys():
    """name -> number of compile keys over images, windows and batches."""
    run, sizes = packed_attention_triton, [[700], [1025], [256, 1600], [4096] * 3]

    def number(kernel, inputs, **options):
        calls = []
        for lengths in inputs:
            args = attended(lengths, 16, 80, **options)
            if kernel == "forward_kernel":
                calls.append(functools.partial(run.forward, *args))
            else:
                q, *rest = args
                statistics = torch.empty(2, q.shape[-2], q.shape[:-2].numel())
                calls.append(
                    functools.partial(run.backward, q, q, *rest[:2], q, statistics, *rest[2:])
                )
        return number_of_keys(run, kernel, calls)

    kernels = ("forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel")
    windows = [[64] * 3, [64] * 86, [64] * 81 + [16] * 17 + [4]]
    return {
        **{f"images, {kernel}": number(kernel, sizes) for kernel in kernels},
        "windows": number("forward_kernel", windows, max_seqlen=64),
        "windows of no length": number("forward_kernel", [[30] * 3, [17] * 86]),
        "batch": number("forward_kernel", [[577], [577] * 5, [730] * 2], batched=True),
        "batch, scale": number("forward_kernel", [[577], [730] * 2], batched=True, scale=0.5),
    }


def aggregated(sides=(24, 96), grid=24, batch=1, heads=16, dtype=torch.bfloat16, masked=False):
    """The arguments of the op; only dtypes, shapes and strides matter."""
    q = torch.empty(batch, grid, grid, heads, 64, dtype=dtype)
    maps = [torch.empty(batch, side, side, heads, 64, dtype=dtype) for side in sides]
    masks = [torch.empty(x.shape[:3], dtype=torch.bool) for x in maps] if masked else []
    return q, maps, maps, masks


def spatial_aggregate_calls():
    run = spatial_aggregate_triton

    def forward(registers, wide, **inputs):
        call = functools.partial(run.forward, *aggregated(**inputs))
        return Budget(run, "forward_kernel", call, registers, wide)

    def backward(registers, wide, **inputs):
        q, *rest = aggregated(**inputs)
        call = functools.partial(run.backward, q, [1] * (1 + 2 * len(rest[0])), q, *rest)
        return Budget(run, "backward_kernel", call, registers, wide)

    cambrian = {"sides": (24, 24, 24, 96)}
    return {
        "aggregate bf16": forward(255, 8, **cambrian),
        "aggregate fp32": forward(255, 8, **cambrian, dtype=torch.float32),
        "aggregate masks bf16": forward(255, 4, masked=True),
        "aggregate backward bf16": backward(255, 8, **cambrian),
    }


def spatial_aggregate_keys():
    """name -> number of compile keys over batches, grids and numbers of heads."""
    run = spatial_aggregate_triton
    sizes = [{"grid": n, "sides": (n, 4 * n), "batch": b, "heads": h}
             for n, b, h in ((1, 1, 16), (16, 2, 16), (17, 3, 13))]  # fmt: skip

    def number(kernel, function, **inputs):
        calls = [functools.partial(function, **inputs, **size) for size in sizes]
        return number_of_keys(run, kernel, calls)

    def forward(**inputs):
        run.forward(*aggregated(**inputs))

    def backward(**inputs):
        q, *rest = aggregated(**inputs)
        run.backward(q, [1] * 5, q, *rest)

    return {
        "forward": number("forward_kernel", forward),
        "forward, masks": number("forward_kernel", forward, masked=True),
        "backward": number("backward_kernel", backward),
    }


def perceiver_attention_calls():
    run = perceiver_attention_triton

    def budget(registers, wide, heads, dim, dtype):
        out, statistics = torch.empty(8, 64, heads, dim, dtype=dtype), torch.empty(2, heads, 512)
        call = functools.partial(run._join, out, out, statistics, statistics)
        return Budget(run, "join_kernel", call, registers, wide)

    return {
        "attention joined d96 bf16": budget(255, 2, 16, 96, torch.bfloat16),
        "attention joined d64 fp32": budget(255, 2, 16, 64, torch.float32),
    }


def calls():
    """name -> `Budget`"""
    calls = (
        add_norm_calls,
        gated_residual_calls,
        hd_transform_calls,
        mlp_projector_calls,
        mrope_calls,
        packed_attention_calls,
        patch_embed_calls,
        perceiver_attention_calls,
        pixel_shuffle_calls,
        spatial_aggregate_calls,
    )
    return {name: call for of_op in calls for name, call in of_op().items()}


def key(kernel, recorder):
    """What decides whether triton.jit compiles anew, by its own code."""
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return str(binder(*recorder.args, **recorder.constants)[1])


def number_of_keys(module, kernel, calls):
    return len({key(*recorded(module, call, kernel)) for call in calls})


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
        name: number_of_keys(
            run,
            "mrope_norm_backward_kernel" if name == "norm backward" else "mrope_kernel",
            [functools.partial(f, *a) for f, a in of_model],
        )
        for name, of_model in calls.items()
    }


def patch_embed_keys():
    """name -> number of compile keys over batches and sizes of images that fill a GPU or do not."""
    run = patch_embed_triton
    clip = {"weight": (1024, 3, 14, 14), "prefix": 1}
    flat = {"weight": (1280, 3, 2, 14, 14)}
    small = [(b, 3, h * 14, w * 14) for b, h, w in ((1, 1, 1), (1, 24, 24), (2, 3, 16), (5, 7, 11))]
    large = [(b, 3, h * 14, w * 14) for b, h, w in ((8, 24, 24), (13, 32, 32), (16, 64, 27))]
    few, many = [(n, 1176) for n in (1, 16, 37, 1024)], [(n, 1176) for n in (1664, 5476, 32768)]

    def forwards(shapes, **inputs):
        return [functools.partial(run.forward, *embedding(s, **inputs)) for s in shapes]

    packs = [
        functools.partial(run.pack, run.Arguments(*embedding(s, clip["weight"])), 0, 1, torch.half)
        for s in small + large
    ]
    sized = embedding((3, 3, 56, 56), **clip, image_sizes=[(28, 56), (56, 42), (29, 14)])
    return {
        "images": number_of_keys(run, "product_kernel", forwards(small, rows=600, **clip)),
        "many images": number_of_keys(run, "product_kernel", forwards(large, rows=1729, **clip)),
        "flat": number_of_keys(run, "product_kernel", forwards(few, **flat)),
        "flat taps": number_of_keys(run, "product_kernel", forwards(few, rows=9, taps=4, **flat)),
        "more flat": number_of_keys(run, "product_kernel", forwards(many, **flat)),
        "image sizes": number_of_keys(
            run, "product_kernel", [functools.partial(run.forward, *sized)]
        ),
        "norm": number_of_keys(run, "finish_kernel", forwards(few + many, norm="rms", **flat)),
        "pack": number_of_keys(run, "pack_kernel", packs),
    }


def hd_transform_keys():
    """name -> number of compile keys over pictures of different sizes."""
    run = hd_transform_triton
    sizes = [[(1, 1)], [(1, 16)], [(4, 4), (2, 3)], [(3, 5), (1, 2), (16, 1)]]
    calls = {
        "forward": [functools.partial(run.forward, *crops(s)) for s in sizes],
        "glb_sub": [functools.partial(run.forward, *crops(s, order="glb_sub")) for s in sizes],
        "mean": [functools.partial(run.forward, *crops(s, reduction="mean")) for s in sizes],
        "valid": [
            functools.partial(run.forward, *crops([(2, 2)], valid_hw=[h, w]))
            for h, w in ((1, 1), (16, 24), (7, 23))
        ],
    }
    return {name: number_of_keys(run, "place_kernel", of_name) for name, of_name in calls.items()}


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
          f"{'spill':>6}{'ld.128':>7}{'st.128':>7}{'mma':>5}{'async':>6}  sines")  # fmt: skip
    for name, budget in calls().items():
        if options.only and name not in options.only:
            continue
        kernel, recorder = recorded(budget.module, budget.call, budget.kernel)
        for arch in options.arch or ARCHITECTURES:
            src, launch = source(kernel, recorder)
            compiled = triton.compile(
                src,
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": 4, "num_stages": 1, **launch},
            )
            sass, numbers = disassemble(compiled.asm["cubin"])
            shared = compiled.metadata.shared
            if options.keep:
                stem = options.keep / f"{name.replace(' ', '_')}_{arch}"
                stem.with_suffix(".sass").write_text(sass)
                for kind in ("ttgir", "ptx"):
                    stem.with_suffix(f".{kind}").write_text(compiled.asm[kind])
            loads = len(re.findall(r"LDG\S*\.128", sass))
            stores = len(re.findall(r"STG\S*\.128", sass))
            products = len(re.findall(r"HMMA|HGMMA|UTC\w*MMA", sass))
            copies = len(re.findall(r"LDGSTS", sass))
            spilled = numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(LDL|STL)\b", sass))
            # pi/2's first part, which one sine takes three times.
            angles = len(re.findall(r"1\.570796\d*", sass)) // 3
            problems = [
                text
                for text, bad in {
                    f"more than {budget.registers} registers": numbers["REG"] > budget.registers,
                    "spills": spilled > 0,
                    f"more than {SHARED} bytes of shared memory": shared > SHARED,
                    f"fewer than {budget.wide} 128-bit loads": loads < budget.wide,
                    f"fewer than {budget.wide} 128-bit stores": stores < budget.wide,
                    "no tensor cores": budget.product and products == 0,
                    "no asynchronous copies": budget.product and copies == 0,
                    "sines computed by every thread again": angles > 2,
                }.items()
                if bad
            ]
            failed += bool(problems)
            print(f"{'BAD' if problems else 'ok':15}{name:28}{f'sm_{arch}':>8}{numbers['REG']:6}"
                  f"{shared:8}{spilled:6}{loads:7}{stores:7}{products:5}{copies:6}{angles:7}  "
                  f"{', '.join(problems)}", flush=True)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
