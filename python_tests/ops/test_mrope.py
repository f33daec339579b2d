"""What is special to M-RoPE; the contract's clauses are in test_contract.py."""

import functools
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from emulator.build import emulated
from testbed import TESTED_ISAS, extra_memory, reads_proc
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import vlmops
from vlmops.ops.mrope import reference
from vlmops.ops.mrope_spec import SPEC

CASES = {case.name: case for case in SPEC.cases}
CPU = torch.device("cpu")
every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def case(name, dtype=torch.float32):
    return CASES[name].make(dtype, CPU)


def cos_sin(ids, inv_freq):
    """What the kernel computes: q of ones and zeros turns into cosines and sines."""
    ids, inv_freq = torch.as_tensor(ids), torch.as_tensor(inv_freq, dtype=torch.float32)
    q = torch.cat(
        (torch.ones(len(ids), 1, len(inv_freq)), torch.zeros(1).expand(len(ids), 1, len(inv_freq))),
        dim=-1,
    )
    axis = torch.zeros(len(inv_freq), dtype=torch.int32)
    turned, _ = vlmops.mrope(q, q[:, :0], ids[None], inv_freq, axis)
    return turned[:, 0].chunk(2, dim=-1)


@every_isa
@pytest.mark.parametrize("max_id", [1, 5000, 10**6, 2**24])
def test_sine_and_cosine_are_right_to_float32(isa, use_cpu_isa, max_id):
    use_cpu_isa(isa)
    ids = torch.randint(-max_id, max_id + 1, (4096,))
    inv_freq = 1e6 ** -(torch.arange(64) / 64)
    angle = (ids.float()[:, None] * inv_freq).double()
    for got, exact in zip(cos_sin(ids, inv_freq), (angle.cos(), angle.sin()), strict=True):
        ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor().clamp_min(-60)
        # Half an ulp is perfect; the polynomials add less than a hundredth.
        assert ((got.double() - exact).abs() / ulp).max() < 0.51


@every_isa
def test_angles_beyond_the_fast_range(isa, use_cpu_isa):
    use_cpu_isa(isa)
    ids, inv_freq = torch.tensor([2**24, 3, 0]), torch.tensor([100.0, 3e30, 1.0])
    angle = (ids.float()[:, None] * inv_freq).double()
    cos, sin = cos_sin(ids, inv_freq)
    assert torch.equal(cos, angle.cos().float())
    assert torch.equal(sin, angle.sin().float())


@every_isa
@sixteen_bits
def test_frequencies_that_are_no_numbers_give_nan(isa, use_cpu_isa, dtype):
    use_cpu_isa(isa)
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    args = case("qwen2vl_s17", dtype)
    args["inv_freq"][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, all_ones])
    q, _ = vlmops.mrope(**args)
    assert q[..., :4].isnan().all()
    assert q[..., 64:68].isnan().all()
    assert q[..., 4:64].isfinite().all()
    q, _ = vlmops.mrope(**{**case("qwen2vl_s17", dtype), "scaling": all_ones})
    assert q.isnan().all()


@every_isa
@sixteen_bits
@pytest.mark.parametrize("rotation", ["half", "pairs"])
def test_every_value_of_16_bits_survives_position_zero(isa, use_cpu_isa, dtype, rotation):
    """x * 1 - y * 0 is x: conversions there and back lose nothing, NaN stays NaN."""
    use_cpu_isa(isa)
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.stack((x, torch.zeros_like(x)), dim=-1).flatten()
    x = x.view(-1, 1, 64) if rotation == "pairs" else x.view(-1, 1, 2).repeat_interleave(32, dim=-1)
    ids = torch.zeros(1, len(x), dtype=torch.long)
    axis = torch.zeros(32, dtype=torch.int32)
    turned, _ = vlmops.mrope(x, x[:, :0], ids, torch.ones(32), axis, rotation=rotation)
    finite = x.isfinite() & turned.isfinite()
    assert torch.equal(turned[finite], x[finite])
    assert torch.equal(turned[x.isnan()].isnan(), torch.ones_like(x[x.isnan()], dtype=torch.bool))
    infinite = turned[x.isinf()]
    assert (infinite.isinf() | infinite.isnan()).all()


@every_isa
@sixteen_bits
def test_rounding_is_to_nearest_even(isa, use_cpu_isa, dtype):
    """Scaling scales before the one rounding, so it lets us choose the float32 that is rounded."""
    use_cpu_isa(isa)
    x = torch.randn(64, 1, 64).to(dtype)
    x[:8] *= 2.0**-20  # float16: subnormal
    x[8:12] *= 2.0**14  # float16: near and beyond the largest
    ids, axis = torch.zeros(1, 64, dtype=torch.long), torch.zeros(32, dtype=torch.int32)
    for scaling in (1.0 + 2.0**-9, 1.0 + 2.0**-12, 0.7, 3.1):
        turned, _ = vlmops.mrope(x, x[:, :0], ids, torch.ones(32), axis, scaling=scaling)
        assert torch.equal(turned, (x.float() * torch.tensor(scaling).float()).to(dtype))


@pytest.mark.skipif("avx512" not in TESTED_ISAS, reason="needs AVX-512 beside AVX2")
def test_vector_instruction_sets_agree_bit_for_bit(use_cpu_isa):
    for name, dtype in itertools.product(
        ("qwen2vl_s17", "tower_d88_pairs", "odd_r23_half", "norm_d88", "norm_pairs_partial"),
        (torch.float32, torch.bfloat16),
    ):
        results = []
        for isa in ("avx2", "avx512"):
            use_cpu_isa(isa)
            torch.manual_seed(0)
            results.append(vlmops.mrope(**case(name, dtype))[0])
        assert torch.equal(*results), name


@every_isa
@pytest.mark.parametrize("name", ["glm4v_pairs_partial", "partial_half_d256_r32", "no_frequencies"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_channels_beyond_the_frequencies_are_copied_bit_for_bit(isa, use_cpu_isa, name, dtype):
    use_cpu_isa(isa)
    args = case(name, dtype)
    args["q"][0, 0, 0, -1] = torch.nan
    width = 2 * len(args["inv_freq"])
    q, _ = vlmops.mrope(**args)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    kept, original = (t[..., width:].contiguous().view(bits) for t in (q, args["q"]))
    assert torch.equal(kept, original)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_2_to_31(isa, use_cpu_isa, dtype):
    """Rows 2^31 elements apart: only the pages that are touched become memory."""
    use_cpu_isa(isa)
    far = 2**31 + 7
    args = case("qwen2vl_s17", dtype)
    tokens, heads, head_dim = 3, 2, 128
    torch.use_deterministic_algorithms(False)  # the poison would make 17 GB real
    memory = torch.empty(far * 2 + 4096, dtype=dtype)
    x = memory.as_strided((1, heads, tokens, head_dim), (0, 384, far, 1), 0)
    x.copy_(torch.randn(x.shape))
    small = x.clone(memory_format=torch.contiguous_format)
    rest = {**args, "position_ids": torch.randint(999, (3, 1, tokens))}
    expected, _ = vlmops.mrope(**{**rest, "q": small, "k": small[:, :0]})
    got, _ = vlmops.mrope(**{**rest, "q": x, "k": small[:, :0]})
    assert torch.equal(got, expected)
    vlmops.mrope_(**{**rest, "q": x, "k": small[:, :0]})
    assert torch.equal(x, expected)


def test_position_ids_beyond_2_to_31_elements():
    args = case("one_head")
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(2**31 * 2 + 64, dtype=torch.uint8)
    ids = memory.as_strided((3, 2, 17), (2**31 + 5, 17, 1))
    ids.copy_(torch.randint(200, (3, 2, 17)))
    far, _ = vlmops.mrope(**{**args, "position_ids": ids})
    near, _ = vlmops.mrope(**{**args, "position_ids": ids.clone()})
    assert torch.equal(far, near)


@reads_proc
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, "s4096"), (torch.bfloat16, "s16384")])
def test_no_memory_beyond_the_outputs(dtype, shape):
    torch.use_deterministic_algorithms(False)
    args = SPEC.bench[shape].make(dtype, CPU)  # large enough that malloc keeps nothing back
    sizes = [args[n].numel() * args[n].element_size() for n in ("q", "k")]
    slack = 2**20  # code pages, the profiler
    grown, largest = extra_memory(lambda: vlmops.mrope(**args))
    assert largest == max(sizes)
    assert grown < sum(sizes) + slack
    grown, largest = extra_memory(lambda: vlmops.mrope_(**args))
    assert largest == 0
    assert grown < slack
    eager_grown, _ = extra_memory(lambda: SPEC.eager_for(args)(**args))
    assert eager_grown > 2 * sum(sizes)  # the measurement sees what eager allocates


def test_saves_positions_never_cosines():
    args = case("qwen2vl_threads_s131")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        vlmops.mrope(**{**args, "q": args["q"].requires_grad_()})
    assert {t.data_ptr() for t in saved} == {
        args[n].data_ptr() for n in ("position_ids", "inv_freq", "freq_axis")
    }


def leaves(args, *names):
    """The arguments with the named ones as leaves that require grad."""
    return {**args, **{n: args[n].detach().requires_grad_() for n in names}}


def test_saves_of_q_and_k_what_was_normalised():
    args = leaves(case("norm_q_alone"), "q", "k", "q_norm_weight")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        vlmops.mrope(**args)
    names = ("q", "q_norm_weight", "position_ids", "inv_freq", "freq_axis")
    assert {t.data_ptr() for t in saved} == {args[n].data_ptr() for n in names}


@every_isa
def test_weight_gradients_do_not_depend_on_threads_or_on_what_is_frozen(isa, use_cpu_isa):
    """Nor on the strides of the gradient; 131 tokens are several chunks."""
    use_cpu_isa(isa)
    args = case("norm_threads_s131")  # 17 and 3 heads: partial sums that fall differently show
    grads = [torch.randn(args[n].shape) for n in "qk"]
    strided = [g.mT.contiguous().mT for g in grads]
    weights = ("q_norm_weight", "k_norm_weight")
    everything = leaves(args, "q", "k", *weights)
    threads = torch.get_num_threads()
    results = []
    try:
        for n, names, upstream in (
            (1, weights, grads),
            (2, weights, grads),
            (3, ("q", "k", *weights), strided),
        ):
            torch.set_num_threads(n)
            used = {**args, **{name: everything[name] for name in names}}
            wanted = [everything[name] for name in weights]
            results.append(torch.autograd.grad(vlmops.mrope(**used), wanted, upstream))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needed", ["q", "k", "q_norm_weight", "k_norm_weight"])
def test_gradients_that_nobody_needs_are_empty(needed):
    """What the op returns: autograd would drop a gradient that was computed in vain."""
    args = leaves(case("qwen3vl_norm_s33"), needed)
    outputs = vlmops.mrope(**args)
    with RecordResults() as ran:
        torch.autograd.grad(outputs, args[needed], [torch.randn_like(o) for o in outputs])
    (grads,) = ran.results
    names = ("q", "k", "q_norm_weight", "k_norm_weight")
    assert [g.numel() for g in grads] == [args[n].numel() if n == needed else 0 for n in names]


class RecordResults(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.results = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "vlmops":
            self.results.append(result)
        return result


@every_isa
def test_norm_is_not_rounded_in_between(isa, use_cpu_isa):
    """bfloat16 in, one rounding out: equal to the float64 result rounded, but for ties."""
    use_cpu_isa(isa)
    args = case("qwen3vl_norm_s33", torch.bfloat16)
    for got, exact in zip(vlmops.mrope(**args), reference(**args), strict=True):
        rounded = exact.to(torch.bfloat16)
        assert (got == rounded).double().mean() > 0.999
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_zeros_and_of_no_numbers(isa, use_cpu_isa, dtype):
    """A head of zeros stays zero; NaN in a head, or in a weight, stays within its reach."""
    use_cpu_isa(isa)
    args = case("qwen3vl_norm_s33", dtype)
    args["q"][0, 1] = 0
    args["q"][1, 2, 5, 7] = torch.nan
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    args["k_norm_weight"] = args["k_norm_weight"].float()
    args["k_norm_weight"][3] = all_ones.item()
    q, k = vlmops.mrope(**args)
    assert (q[0, 1] == 0).all()
    assert q[1, 2, 5].isnan().all()
    q[1, 2, 5] = 0
    assert q.isfinite().all()
    reached = torch.zeros(128, dtype=torch.bool)
    reached[[3, 3 + 64]] = True
    assert torch.equal(k.isnan(), reached.expand_as(k))


def test_eps_and_offset_count():
    """eps under the root, in float32; the offset on the weight, not on the result."""
    x = torch.full((1, 1, 4), 2.0)
    ids, freq = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0)
    weight = torch.tensor([1.0, 2.0, 3.0, -1.0])
    got, _ = vlmops.mrope(
        x, x[:, :0], ids, freq, freq.int(), q_norm_weight=weight, norm_eps=5.0, norm_offset=1.0
    )
    assert torch.equal(got[0, 0], 2 * (1 + weight) / 3)


def test_norm_weights_that_require_grad_are_refused_in_place():
    args = leaves(case("qwen3vl_norm_s33"), "k_norm_weight")
    with pytest.raises(RuntimeError, match=r"weights of norms.*require no grad.*use vlmops.mrope"):
        vlmops.mrope_(**args)
    with pytest.raises(TypeError, match=r"q_norm_weight: expected a torch.Tensor, got float"):
        vlmops.mrope(**{**args, "q_norm_weight": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "q": None}, r"q: expected a tensor, since q_norm_weight is given"),
        (lambda a: {**a, "q": a["q"][:, 1:]}, r"q: expected shape \[2, 4, 33, 128\].*that of its"),
        (lambda a: {**a, "k": a["k"].half()}, r"k: expected dtype float32, that of its gradient"),
        (lambda a: {**a, "norm_eps": 0.0}, r"norm_eps: expected a positive"),
    ],
)
def test_norm_backward_refuses(change, message):
    args = case("qwen3vl_norm_s33")
    args = {"grad_q": args["q"].clone(), "grad_k": args["k"].clone(), **args}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vlmops.mrope_norm_backward(**change(args))


def test_gradient_through_views_of_a_projection():
    """As in attention: q and k are views of Linear outputs, whose weight gets their gradients."""
    args = case("qwen2vl_s17")
    x = torch.randn(2, 17, 32)
    project = nn.Linear(32, 6 * 128)

    def loss(rotate, module, x):
        q, k = module(x).view(2, 17, 6, 128).transpose(1, 2).split((4, 2), dim=1)
        q, k = rotate(**{**args, "q": q, "k": k})
        return (q.sin().sum() + (k * k.detach().cos()).sum()).to(x.dtype)

    loss(vlmops.mrope, project, x).backward()
    got = project.weight.grad.double()
    project.zero_grad()
    project.double()
    loss(reference, project, x.double()).backward()
    torch.testing.assert_close(got, project.weight.grad, rtol=1e-4, atol=1e-4)


def test_no_recompile_storm():
    """One compilation for the first length, one with a dynamic length, none after that."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vlmops.mrope, fullgraph=True, backend=counter)
    args = case("qwen2vl_s17")
    for tokens in (17, 33, 64, 5, 131, 16):
        q, k = torch.randn(2, 4, tokens, 128), torch.randn(2, 2, tokens, 128)
        changed = {**args, "q": q, "k": k, "position_ids": torch.randint(9, (3, 2, tokens))}
        for got, expected in zip(compiled(**changed), vlmops.mrope(**changed), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2


def test_in_place_refuses_what_requires_grad():
    args = case("qwen2vl_s17")
    args["k"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"require no grad.*use vlmops.mrope"):
        vlmops.mrope_(**args)
    with pytest.raises(RuntimeError, match=r"require no grad.*use vlmops.mrope"):
        torch.ops.vlmops.mrope_(*args.values())
    with torch.no_grad():
        vlmops.mrope_(**args)


def test_in_place_refuses_what_it_would_leave_half_done():
    """Tangents that stay unrotated, and version counters that are not there."""
    args = case("qwen2vl_s17")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args["q"], torch.ones_like(args["q"]))
        with pytest.raises(RuntimeError, match=r"forward-mode.*use vlmops.mrope"):
            vlmops.mrope_(**{**args, "q": dual})
    with torch.inference_mode():
        made_inside = torch.randn(2, 4, 17, 128)
        vlmops.mrope_(**{**args, "q": made_inside, "k": made_inside.clone()})
    with pytest.raises(RuntimeError, match=r"made outside torch.inference_mode"):
        vlmops.mrope_(**{**args, "q": made_inside})


@pytest.mark.parametrize("function", [vlmops.mrope, vlmops.mrope_])
def test_what_only_python_can_refuse(function):
    args = case("qwen2vl_s17")
    with pytest.raises(TypeError, match=r"position_ids: expected a torch.Tensor, got list"):
        function(**{**args, "position_ids": args["position_ids"].tolist()})
    with pytest.raises(RuntimeError, match=r"inv_freq: expected a tensor that requires no grad"):
        function(**{**args, "inv_freq": args["inv_freq"].requires_grad_()})


def test_in_place_refuses_shared_memory():
    args = case("expanded_heads")
    with pytest.raises(RuntimeError, match=r"mrope_: q: expected a tensor whose elements do not "):
        vlmops.mrope_(**args)
    args = case("qwen2vl_s17")
    memory = torch.randn(2, 17, 6, 128).transpose(1, 2)
    flat = torch.randn(2 * 4 * 17 * 128 + 1)
    for q, k in (
        (args["q"], args["q"]),
        (memory[:, :4], memory[:, 2:]),
        (memory[:, 2:], memory[:, :4]),
        (memory[:, 0:4:2], memory[:, 2:4]),
        (flat[:-1].view(2, 4, 17, 128), flat[1:].view(2, 4, 17, 128)),
        (flat[:-1].view(2, 4, 17, 128), flat[:-1].view(2, 17, 4, 128).transpose(1, 2)),
    ):
        with pytest.raises(RuntimeError, match=r"mrope_: k: expected memory of its own.*clone"):
            vlmops.mrope_(**{**args, "q": q, "k": k})


def test_in_place_takes_slices_of_one_tensor():
    """Fused qkv, in blocks, interleaved head by head, one before and one after the other."""
    args = case("qwen2vl_s17")
    blocks = torch.randn(2, 17, 8, 128).transpose(1, 2)
    heads = torch.randn(2, 17, 4, 3, 128).permute(3, 0, 2, 1, 4)
    for q, k in (
        (blocks[:, :4], blocks[:, 4:6]),
        (blocks[:, 4:6], blocks[:, :4]),
        (blocks[:, :1], blocks[:, 1:2]),
        (heads[0], heads[1]),
        (heads[2], heads[0]),
        torch.randn(2, 2, 4, 17, 128).unbind(),
    ):
        expected = vlmops.mrope(**{**args, "q": q, "k": k})
        vlmops.mrope_(**{**args, "q": q, "k": k})
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap's loop
def test_functorch():
    args = case("qwen2vl_s17")
    q, tangent = args["q"], torch.randn_like(args["q"])

    def rotated(x, function=vlmops.mrope):
        return function(**{**args, "q": x})[0]

    def loss(x, function=vlmops.mrope):
        return rotated(x, function).sin().sum()

    exact = torch.func.grad(lambda x: loss(x, reference))(q.double())
    torch.testing.assert_close(torch.func.grad(loss)(q).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.func.jvp(rotated, (q,), (tangent,))[1], rotated(tangent))
    each = torch.stack([torch.func.grad(loss)(x) for x in (q, tangent)])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(torch.stack([q, tangent])), each)
    args = case("qwen3vl_norm_s33")
    weight = args["q_norm_weight"]

    def normed(weight, function=vlmops.mrope):
        return function(**{**args, "q_norm_weight": weight})[0].sin().sum()

    exact = torch.func.hessian(lambda w: normed(w, reference))(weight.double())
    torch.testing.assert_close(
        torch.func.hessian(normed)(weight).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_the_registered_ops_are_differentiable_too():
    args = case("qwen2vl_s17")
    q = args["q"].detach().clone().requires_grad_()
    out, _ = torch.ops.vlmops.mrope(*{**args, "q": q}.values())
    (via_op,) = torch.autograd.grad(out.cos().sum(), q)
    out, _ = vlmops.mrope(**{**args, "q": q})
    (via_function,) = torch.autograd.grad(out.cos().sum(), q)
    assert torch.equal(via_op, via_function)


@pytest.mark.parametrize(
    ("section", "interleaved", "expected"),
    [
        ([16, 24, 24], False, [0] * 16 + [1] * 24 + [2] * 24),
        ([24, 20, 20], True, [0, 1, 2] * 20 + [0] * 4),
        ([4], False, [0] * 4),
        ([2, 0, 1], False, [0, 0, 2]),
        ([3, 1], True, [0, 1, 0, 0]),
    ],
)
def test_freq_axis(section, interleaved, expected):
    freq_axis = vlmops.mrope_freq_axis(section, interleaved)
    assert freq_axis.dtype == torch.int32
    assert freq_axis.tolist() == expected


@pytest.mark.parametrize(
    ("section", "interleaved", "message"),
    [
        ([], False, "mrope_section: expected counts"),
        ([4, -1], False, "mrope_section: expected counts"),
        ([2, 8, 8], True, "expected axis 1's 8 frequencies to fit"),
    ],
)
def test_freq_axis_refuses(section, interleaved, message):
    with pytest.raises(ValueError, match=message):
        vlmops.mrope_freq_axis(section, interleaved)


def _child(code, **env):
    command = [sys.executable, "-c", f"import vlmops; {code}"]
    env = {**os.environ, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@every_isa
def test_isa_is_capped_by_the_environment(isa):
    assert _child("print(vlmops.cpu_isa())", VLMOPS_CPU_ISA=isa).stdout.strip() == isa


def test_isa_that_does_not_exist():
    child = _child("vlmops.cpu_isa()", VLMOPS_CPU_ISA="sse9")
    assert child.returncode == 1
    known = "avx512_bf16, avx512, avx2, portable"
    assert f"VLMOPS_CPU_ISA: expected one of {known}, got 'sse9'" in child.stderr


def test_library_that_is_not_there_is_said_on_first_use():
    child = _child("print('imported'); vlmops.cpu_isa()", VLMOPS_LIBRARY="/nowhere/lib.so")
    assert child.stdout.strip() == "imported"
    assert "ImportError: vlmops: no compiled library at /nowhere/lib.so" in child.stderr
    assert "pip install" in child.stderr


def test_library_that_does_not_load_is_said_on_first_use(tmp_path):
    broken = tmp_path / "libvlmops.so"
    broken.write_text("not a library")
    child = _child("print('imported'); vlmops.cpu_isa()", VLMOPS_LIBRARY=str(broken))
    assert child.stdout.strip() == "imported"
    assert "does not load into torch" in child.stderr
    assert "reinstall" in child.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "frequencies"), [(128, 64), (88, 22), (72, 16)])
def test_bits_do_not_depend_on_strides_emulator(dtype, head_dim, frequencies):
    """Compiled, a gradient arrives with other strides than in eager mode; sums must not show it."""
    shapes = [(2, 3, 5, head_dim), (2, 2, 5, head_dim)]
    q, k, grad_q, grad_k = (torch.randn(s).to(dtype) for s in shapes * 2)
    weights = torch.randn(2, head_dim).unbind()  # and so are their gradients: every bit shows
    positions = (
        torch.randint(5000, (3, 2, 5)),
        10000.0 ** -(torch.arange(frequencies) / frequencies),
        torch.arange(frequencies) % 3,
    )

    def results(relaid):
        tensors = [relaid(t).requires_grad_() for t in (q, k)]
        leaves = [*tensors, *(w.clone().requires_grad_() for w in weights)]
        norms = {"q_norm_weight": leaves[2], "k_norm_weight": leaves[3]}
        outputs = vlmops.mrope(*leaves[:2], *positions, **norms)
        grads = torch.autograd.grad(outputs, leaves, [relaid(grad_q), relaid(grad_k)])
        return [t.detach().contiguous().view(torch.uint8) for t in (*outputs, *grads)]

    def scattered(t):
        return torch.stack((t, t), -1)[..., 0]

    def unaligned(t, by=1):
        return torch.cat((t.flatten()[:by], t.flatten()))[by:].view(t.shape)

    def between_heads(t):
        return t.transpose(1, 2).clone().transpose(1, 2)

    with emulated("checked"):
        expected = results(torch.clone)
        half_aligned = functools.partial(unaligned, by=4)  # to 8 of 16 bytes
        for relaid in (scattered, unaligned, half_aligned, between_heads):
            for got, e in zip(results(relaid), expected, strict=True):
                assert torch.equal(got, e)
