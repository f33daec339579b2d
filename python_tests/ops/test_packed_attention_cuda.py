"""CUDA kernels of packed attention on the emulated GPU: what the contract's cases do not reach."""

import itertools
import math

import pytest
import torch
from emulator.build import emulated

import vlmops
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.packed_attention import reference
from vlmops.ops.packed_attention_spec import SPEC, _cu, _inputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


@pytest.fixture
def gpu():
    """Call with an architecture and a number of multiprocessors."""
    with emulated("checked") as module:
        yield module.set_device
        module.set_device(80, 8)


def made(*inputs, dtype=torch.bfloat16, **options):
    return _inputs(*inputs, **options)(dtype, CPU)


def gradients(args, upstream):
    leaves = [args[n].detach().requires_grad_() for n in "qkv"]
    result = vlmops.packed_attention(**{**args, **dict(zip("qkv", leaves, strict=True))})
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


# Few multiprocessors are filled by tiles of 128 rows, many are not by tiles of 64.
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "options"),
    [
        ([150, 9], 2, 64, {}),
        ([131], 1, 72, {"causal": True}),
        ([101, 66], 4, 80, {"kv_heads": 2, "causal": True}),
        ([200], 1, 88, {"padding": [137], "scale": -0.4}),
        ([140], 2, 128, {"kv_heads": 1}),
        ([130], 1, 64, {"scale": 3.0}),
    ],
)
def test_large_and_small_tiles_agree_bit_for_bit_on_the_emulator(
    gpu, name, lengths, heads, dim, options
):
    args = made(lengths, heads, dim, dtype=DTYPES[name], **options)
    results = []
    for multiprocessors in (1, 10_000):
        gpu(80, multiprocessors)
        results.append(vlmops.packed_attention(**args))
    assert torch.equal(*results)
    exact = reference(**args)
    eager = SPEC.eager_for(args)(**args)[0]
    assert mismatch(results[0], exact, DTYPES[name], largest_error(eager, exact)) is None


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_segment_does_not_depend_on_the_others_on_the_emulator(gpu, name, causal):
    """Split over keys or not, and whether lengths are known to the host or not."""
    gpu(80, 2)
    lengths, keys = [5, 70, 1, 0, 2, 33], [300, 70, 129, 7, 128, 290]
    args = made(lengths, 4, 64, keys=keys, kv_heads=2, dtype=DTYPES[name], causal=causal)
    packed = vlmops.packed_attention(**args)
    assert torch.isfinite(packed).all()
    exact = reference(**args)
    eager = SPEC.eager_for(args)(**args)[0]
    assert mismatch(packed, exact, DTYPES[name], largest_error(eager, exact)) is None
    rows, columns = _cu(lengths).tolist(), _cu(keys).tolist()
    for i in range(len(lengths)):
        q = args["q"][rows[i] : rows[i + 1]]
        k, v = (args[n][columns[i] : columns[i + 1]] for n in "kv")
        alone = vlmops.packed_attention(
            q, k, v, _cu(lengths[i : i + 1]), cu_seqlens_k=_cu(keys[i : i + 1]), causal=causal
        )
        batched = vlmops.packed_attention(q[None], k[None], v[None], causal=causal)[0]
        told = vlmops.packed_attention(
            *(q, k, v, _cu(lengths[i : i + 1])),
            cu_seqlens_k=_cu(keys[i : i + 1]),
            causal=causal,
            max_seqlen=max(lengths[i], 1),
        )
        for other in (alone, batched, told):
            assert torch.equal(other, packed[rows[i] : rows[i + 1]]), i


def test_gradients_of_split_segments_on_the_emulator(gpu):
    gpu(80, 8)
    args = made([5, 2], 4, 64, keys=[300, 140], kv_heads=2)
    upstream = torch.randn(7, 4, 64).bfloat16()
    got = gradients(args, upstream)
    leaves = [args[n].double().requires_grad_() for n in "qkv"]
    result = reference(**{**args, **dict(zip("qkv", leaves, strict=True))})
    exact = [result.detach(), *torch.autograd.grad(result, leaves, upstream.double())]
    for g, e in zip(got, exact, strict=True):
        assert largest_error(g, e) <= 0.02 * e.abs().max()


def test_shared_memory_of_small_gpus_is_enough_on_the_emulator(gpu):
    """99 KiB: what sm_86, sm_89 and sm_120 give a block."""
    gpu(86, 1)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 80, 96, 128, 256):
            args = made([140], 1, dim, dtype=dtype)
            for t in gradients(args, torch.randn(140, 1, dim).to(dtype)):
                assert torch.isfinite(t).all(), (dtype, dim)


def test_many_segments_are_found_on_the_emulator(gpu):
    """More than the 32 that a warp looks at in one step, some of them empty."""
    gpu(80, 8)
    lengths = [(7 * i) % 5 for i in range(100)]
    args = made(lengths, 1, 16)
    got, exact = vlmops.packed_attention(**args), reference(**args)
    assert mismatch(got, exact, torch.bfloat16, 0.01) is None
    starts = args["cu_seqlens"].tolist()
    alone = [
        vlmops.packed_attention(*(args[n][None, a:b] for n in "qkv"))[0]
        for a, b in itertools.pairwise(starts)
        if b > a
    ]
    assert torch.equal(torch.cat(alone), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_rows_on_the_emulator(gpu, dtype):
    gpu(80, 8)
    args = made([9, 80], 2, 64, dtype=dtype)
    args["q"][3, 1, 5] = math.nan
    got = vlmops.packed_attention(**args)
    assert got[3, 1].isnan().all()
    got[3, 1] = 0.0
    assert torch.isfinite(got).all()
