"""What every op promises (README, "The contract"), generated from every SPEC.

No op is named here. A test's id is op, backend, dtype, case. Interpreted backends run the few
cases of a SPEC that stand for all, and clauses that look at no number's value take each case in one
dtype; VLMOPS_ALL_CASES=1 gives them every one. VLMOPS_TEST_DEVICE=cuda runs the same tests on a
GPU; what testbed.py's NOT_ON_A_GPU names is left out there.
"""

import functools
import itertools
import os

import pytest
import torch
from dispatch import CountOps
from emulator.build import emulated
from testbed import DEVICE, HAS_TRITON, NATIVE_BF16, NOT_ON_A_GPU, ON_GPU, TESTED_ISAS
from torch.autograd import forward_ad

import vlmops
from vlmops.ops.compare import largest_error, mismatch

SPECS = [vlmops.ops.spec(op) for op in vlmops.ops.__all__]
TRITON = ["triton"] if HAS_TRITON else []
ON_CPU = [f"cpu_{isa}" for isa in TESTED_ISAS + NATIVE_BF16]
BACKENDS = ["cuda", *TRITON] if ON_GPU else ON_CPU + TRITON
# One level of the CPU's is enough for what does not look at numbers.
EACH_ONCE = BACKENDS if ON_GPU else [f"cpu_{TESTED_ISAS[-1]}", *TRITON]
# The CUDA kernels, which see numbers only, on the emulated GPU that checks every access.
WITH_EMULATOR = BACKENDS if ON_GPU else [*BACKENDS, "emulator"]
ALL_CASES = os.environ.get("VLMOPS_ALL_CASES") == "1" or ON_GPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")


class Subject:
    """One op on one backend with one case's inputs, and what the clauses do with them."""

    def __init__(self, spec, case, dtype, op):
        self.spec, self.dtype, self.case, self.op = spec, dtype, case, op
        self.args = case.make(dtype, DEVICE)
        self.eager = (spec.yardstick_for or spec.eager_for)(self.args)
        self.differentiable = spec.differentiable_in(self.args)

    def tensors(self):
        return {n: t for n, t in self.args.items() if isinstance(t, torch.Tensor)}

    def with_grad(self, change=lambda t: t, names=None):
        """The arguments, the differentiable ones (or `names`) as leaves that keep their strides."""
        leaves = {
            name: change(self.args[name]).detach().requires_grad_()
            for name in (self.differentiable if names is None else names)
        }
        return {**self.args, **leaves}, leaves

    def forward(self, function):
        return list(function(**self.args))

    def backward(self, function, upstream, change=lambda t: t):
        args, leaves = self.with_grad(change)
        outputs = function(**args)
        return list(torch.autograd.grad(outputs, list(leaves.values()), upstream))

    def upstream(self):
        """Random, and strided as no kernel expects: the transpose of a contiguous tensor."""
        outputs = self.spec.reference(**self.args)
        flipped = [torch.randn(o.shape[::-1]).to(DEVICE, self.dtype) for o in outputs]
        return [t.permute(*reversed(range(t.dim()))) for t in flipped]


def assert_correct(got, exact, yardstick):
    problems = [
        mismatch(g, x, y.dtype, largest_error(y, x))
        for g, x, y in zip(got, exact, yardstick, strict=True)
    ]
    assert not any(problems), f"per output: {problems}"


def assert_bit_equal(got, expected, what):
    for g, e in zip(got, expected, strict=True):
        assert (g.dtype, g.shape) == (e.dtype, e.shape), what
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[g.element_size()]
        differ = g.contiguous().view(bits) != e.contiguous().view(bits)
        assert not differ.any(), f"{what}: differs at {differ.nonzero()[:3].tolist()} and so on"


def cases_for(spec, backend):
    return spec.few if backend == "triton" and not ALL_CASES else spec.cases


def has_kernels(spec, backend, dtype):
    return backend != "cpu_avx512_bf16" or (spec.multiplies_bf16 and dtype == torch.bfloat16)


def subjects(
    dtypes=DTYPES, cases=None, backends=BACKENDS, where=lambda spec, case: True, thinned=False
):
    """Parametrises a test over spec, backend, dtype and case.

    thinned: each case on each backend in one dtype, the next case in the next.
    """
    combinations = list(itertools.product(enumerate(backends), enumerate(dtypes.items())))
    rows = [
        pytest.param(backend, (spec, case, dtype), id=f"{spec.op}-{backend}-{name}-{case.name}")
        for spec in SPECS
        for (i, backend), (j, (name, dtype)) in combinations
        for n, case in enumerate(cases_for(spec, backend)[:cases])
        if has_kernels(spec, backend, dtype) and where(spec, case)
        if not thinned or ALL_CASES or (i + j + n) % len(dtypes) == 0
    ]
    return pytest.mark.parametrize(("backend", "subject"), rows, indirect=True)


def can_be_in_place(spec, case):
    """Elements that share memory cannot be written in place; SPEC.errors holds the refusal."""
    args = case.make(torch.float32, CPU)
    tensors = [args[n] for n in spec.written]
    return spec.in_place is not None and not any(t.numel() and 0 in t.stride() for t in tensors)


ONE_DTYPE = {"fp32": torch.float32}


@pytest.fixture
def backend(request, use_cpu_isa):
    if request.param in ("cuda", "triton"):
        with vlmops.backend(request.param):
            yield request.param
    elif request.param == "emulator":
        with emulated("checked"):
            yield request.param
    else:
        use_cpu_isa(request.param.removeprefix("cpu_"))
        yield request.param


@pytest.fixture
def subject(request, backend):
    op = request.param[0].op
    return Subject(*request.param, f"{op}_triton" if backend == "triton" else op)


# 1. Correct forward and backward.


@subjects(backends=WITH_EMULATOR)
def test_forward_is_correct(subject):
    spec = subject.spec
    got = subject.forward(spec.function)
    assert_correct(got, subject.forward(spec.reference), subject.forward(subject.eager))
    for output, name in itertools.zip_longest(got, spec.written):
        like = output if name is None else subject.args[name]
        fresh = torch.empty(like.shape) if name is None else torch.empty_like(like)
        assert output.stride() == fresh.stride()


@subjects(backends=WITH_EMULATOR)
def test_backward_is_correct(subject):
    spec, upstream = subject.spec, subject.upstream()
    exact = subject.backward(spec.reference, [u.double() for u in upstream], torch.Tensor.double)
    eager = subject.backward(subject.eager, upstream)
    assert_correct(subject.backward(spec.function, upstream), exact, eager)


# 2. The schema tells the truth on mutation.


@subjects(backends=WITH_EMULATOR, thinned=True)
def test_nothing_of_the_callers_is_written(subject):
    upstream = subject.upstream()
    watched = [*subject.tensors().values(), *upstream]
    before = [t.clone() for t in watched]
    versions = [t._version for t in watched]
    subject.backward(subject.spec.function, upstream)
    assert_bit_equal(watched, before, "inputs and upstream gradients")
    assert [t._version for t in watched] == versions


@subjects(backends=WITH_EMULATOR, where=can_be_in_place, thinned=True)
def test_in_place_writes_what_it_says_and_equals_out_of_place(subject):
    spec, names = subject.spec, subject.spec.written
    written = {n: subject.args[n] for n in names}
    expected = subject.forward(spec.function)
    untouched = {n: t.clone() for n, t in subject.tensors().items() if n not in names}
    versions = {n: t._version for n, t in written.items()}
    pointers = {n: t.data_ptr() for n, t in written.items()}
    results = subject.forward(spec.in_place)
    assert_bit_equal(written.values(), expected, "in place")
    assert all(r is w for r, w in zip(results, written.values(), strict=True))
    assert {n: t.data_ptr() for n, t in written.items()} == pointers
    assert all(t._version > versions[n] for n, t in written.items())
    assert_bit_equal([subject.args[n] for n in untouched], untouched.values(), "other arguments")


# 3. Dtypes, strides, sizes: by the cases. Determinism:


@subjects(thinned=True)
def test_runs_and_thread_counts_agree_bit_for_bit(subject):
    first = subject.forward(subject.spec.function)
    threads = torch.get_num_threads()
    for n in (*({1, 2} - {threads}), threads):
        torch.set_num_threads(n)
        assert_bit_equal(subject.forward(subject.spec.function), first, f"{n} threads")


# 4. opcheck, compile, export, autocast.


# Symbols for sizes take five times as long where second derivatives are `reference`'s.
AT_GIVEN_SIZES = (
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    "test_aot_dispatch_static",
)


def is_checked(spec, case):
    """Large cases are alike too, and their long sums are more than opcheck's tolerance allows."""
    tensors = [t for t in case.make(torch.float32, CPU).values() if isinstance(t, torch.Tensor)]
    return case.name not in spec.alike and all(t.numel() < 2**18 for t in tensors)


# opcheck looks at every tensor that the op makes within.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@subjects(ONE_DTYPE, backends=EACH_ONCE, where=is_checked)
def test_opcheck(subject, backend):
    """The op at any size, which traces the call of backward as well; then backward itself."""
    spec = subject.spec
    args, _ = subject.with_grad()
    given = ((), args)
    if spec.schema_arguments is not None:
        given = spec.schema_arguments(args), {}
    torch.library.opcheck(getattr(torch.ops.vlmops, subject.op).default, *given)
    with CountOps() as ran:
        subject.backward(spec.function, subject.upstream())
    assert len(ran.calls) == 2
    backward, tensors, options = ran.calls[-1]
    # Second derivatives too: of everything but the frequencies, which get none.
    frozen = [t for n, t in subject.tensors().items() if n not in spec.differentiable]
    tensors = [
        t.detach().requires_grad_(t.is_floating_point() and not any(t is f for f in frozen))
        if isinstance(t, torch.Tensor)
        else t
        for t in tensors
    ]
    at_any_size = ALL_CASES or subject.case in cases_for(spec, backend)[:2]
    utils = [*AT_GIVEN_SIZES, *(["test_aot_dispatch_dynamic"] if at_any_size else [])]
    torch.library.opcheck(backward, tuple(tensors), options, test_utils=utils)
    if can_be_in_place(spec, subject.case):
        torch.library.opcheck(getattr(torch.ops.vlmops, f"{subject.op}_").default, (), subject.args)


@subjects(cases=2, thinned=True)
def test_compiles_to_one_graph_forward_and_backward(subject):
    spec, upstream = subject.spec, subject.upstream()
    torch._dynamo.reset()  # each case has a graph of its own
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    assert_bit_equal(subject.forward(compiled), subject.forward(spec.function), "compiled")
    expected = subject.backward(spec.function, upstream)
    assert_bit_equal(subject.backward(compiled, upstream), expected, "compiled backward")


@subjects(ONE_DTYPE, cases=2, where=can_be_in_place)
def test_compiles_with_inductor_and_in_place(subject):
    expected = [t + 1 for t in subject.forward(subject.spec.function)]
    halves = {n: subject.args[n] / 2 for n in subject.spec.written}

    @torch.compile(fullgraph=True)
    def scaled_in_place(halves):
        doubled = {n: t * 2 for n, t in halves.items()}
        return [t + 1 for t in subject.spec.in_place(**{**subject.args, **doubled})]

    assert_bit_equal(scaled_in_place(halves), expected, "compiled in place")


@subjects(ONE_DTYPE, cases=2)
def test_exports(subject):
    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return subject.spec.function(**{**subject.args, **tensors})

    program = torch.export.export(Module(), (), subject.tensors())
    names = [str(node.target) for node in program.graph.nodes]
    assert f"vlmops.{subject.op}.default" in names
    exported = program.module()(**subject.tensors())
    assert_bit_equal(exported, subject.forward(subject.spec.function), "exported")


@subjects(cases=2)
def test_autocast_casts_what_products_take_and_nothing_else(subject):
    names = subject.spec.casts_under_autocast
    cast = {n: t.bfloat16() for n, t in subject.tensors().items() if n in names}
    expected = list(subject.spec.function(**{**subject.args, **cast}))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_bit_equal(subject.forward(subject.spec.function), expected, "under autocast")


# 5. Bad input raises and says what is wrong.

BAD_CALLS = [
    pytest.param(
        *(backend, spec, bad),
        id=f"{spec.op}-{backend}-{bad.name}",
        marks=[pytest.mark.skip(reason=f"on a GPU: {NOT_ON_A_GPU['values']}")]
        if ON_GPU and bad.reads_values
        else [],
    )
    for spec in SPECS
    for backend in EACH_ONCE
    for bad in spec.errors
]


def on_device(value):
    """What a bad call makes on the CPU; its other devices are what is bad about it."""
    made_here = isinstance(value, torch.Tensor) and value.is_cpu
    return value.to(DEVICE) if made_here else value


@pytest.mark.parametrize(("backend", "spec", "bad"), BAD_CALLS, indirect=["backend"])
def test_bad_call_raises(backend, spec, bad):
    good = spec.cases[0].make(torch.float32, DEVICE)
    args = {name: on_device(value) for name, value in bad.change(good).items()}
    with pytest.raises(bad.exception, match=bad.pattern):
        spec.function(**args)
    if spec.in_place is not None:
        before = [good[n].clone() for n in spec.written]
        with pytest.raises(bad.exception, match=bad.pattern):
            spec.in_place(**args)
        assert_bit_equal([good[n] for n in spec.written], before, "after the error")


# 6. Outputs are written in full: conftest.py poisons what is allocated, and here is the proof.


def test_memory_is_poisoned():
    assert torch.empty(64, device=DEVICE).isnan().all()
    assert torch.empty(64, dtype=torch.bfloat16, device=DEVICE).isnan().all()


# 7. Angles are the float32 product: `reference` forms them so, and clause 1 compares with it.

# 8. No value is read back to the host.


@subjects(ONE_DTYPE, cases=2)
def test_reads_no_value_back(subject):
    upstream = subject.upstream()
    with CountOps() as ran:
        subject.backward(subject.spec.function, upstream)
    assert ran.counts["aten::_local_scalar_dense"] == 0
    assert ran.counts[f"vlmops::{subject.op}"] == 1
    assert len(ran.calls) == 2  # and one backward


# 9. Derivatives: skipped where not needed, of second order, forward mode, vmap.


@subjects(ONE_DTYPE, cases=2)
def test_frozen_inputs_cost_nothing(subject):
    spec = subject.spec
    outputs = spec.function(**subject.args)
    assert not any(o.requires_grad for o in outputs)
    upstream = subject.upstream()
    all_of_them = subject.backward(spec.function, upstream)
    for name, expected in zip(subject.differentiable, all_of_them, strict=True):
        args, leaves = subject.with_grad(names=[name])
        total = sum((o * u).sum() for o, u in zip(spec.function(**args), upstream, strict=True))
        total.backward()
        assert_bit_equal([leaves[name].grad], [expected], name)
        others = [args[n] for n in subject.differentiable if n != name]
        assert all(t.grad is None for t in others)


@subjects(ONE_DTYPE, cases=2)
def test_double_backward(subject):
    upstream = subject.upstream()

    def second(function, cast=lambda t: t):
        args, leaves = subject.with_grad(cast)
        ups = [cast(u).clone().requires_grad_() for u in upstream]
        grads = torch.autograd.grad(function(**args), [*leaves.values()], ups, create_graph=True)
        directions = [torch.linspace(-1, 1, g.numel()).view(g.shape).to(g) for g in grads]
        return torch.autograd.grad(
            grads, [*ups, *leaves.values()], directions, materialize_grads=True
        )

    exact = second(subject.spec.reference, torch.Tensor.double)
    # Not the yardstick: fused ones have no second derivative.
    eager = subject.spec.eager_for(subject.args)
    assert_correct(second(subject.spec.function), exact, second(eager))


@subjects(ONE_DTYPE, cases=2)
def test_forward_mode_and_vmap(subject):
    spec = subject.spec
    for name in subject.differentiable:
        value = subject.args[name]
        tangent = torch.randn_like(value)

        def call(function, value, name=name):
            return tuple(function(**{**subject.args, name: value}))

        with forward_ad.dual_level():
            outputs = call(spec.function, forward_ad.make_dual(value, tangent))
            got = [forward_ad.unpack_dual(o).tangent for o in outputs]
        _, exact = torch.func.jvp(
            functools.partial(call, spec.reference), (value.double(),), (tangent.double(),)
        )
        for g, e in zip(got, exact, strict=True):
            g = torch.zeros_like(e) if g is None else g  # an output that does not depend on it
            torch.testing.assert_close(g.double(), e, rtol=1e-5, atol=1e-5)

        stacked = torch.stack([value, tangent])
        mapped = torch.vmap(functools.partial(call, spec.function))(stacked)
        each = [call(spec.function, t) for t in stacked]
        assert_bit_equal(mapped, [torch.stack(o) for o in zip(*each, strict=True)], "vmap")
