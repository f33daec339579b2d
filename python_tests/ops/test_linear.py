"""`vlmops.ops.linear`: by every way the product of F.linear, forward and backward."""

import functools
import warnings

import pytest
import torch
from dispatch import CountOps
from torch import nn
from torch.nn import functional

from vlmops.ops import linear as ways
from vlmops.ops import linear_tuning
from vlmops.ops.compare import largest_error, mismatch
from vlmops.ops.linear import FROM_ROWS, linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONEDNN = "mkldnn::_linear_pointwise"
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SHAPES = {
    "vector": ((7,), 5),
    "one_row": ((1, 64), 33),
    "rows": ((6, 48), 40),
    "batch": ((2, 3, 130), 257),
    "one_output": ((4, 20), 1),
    "one_input": ((4, 1), 20),
    "no_rows": ((0, 8), 5),
    "no_batch": ((2, 0, 8), 5),
    "no_outputs": ((2, 8), 0),
    "no_inputs": ((2, 0), 5),
}


@pytest.fixture(autouse=True)
def _no_measurements(monkeypatch):
    monkeypatch.setattr(ways, "measured", {})


def always(dtype, n, k):
    return (ways.has_alternative(dtype),) * len(FROM_ROWS)


def never(dtype, n, k):
    return (False,) * len(FROM_ROWS)


@pytest.fixture(params=["torch", "alternative"])
def way(request, monkeypatch):
    """Both, whatever this machine prefers."""
    monkeypatch.setattr(ways, "wins", always if request.param == "alternative" else never)
    return request.param


@pytest.fixture
def by_alternative(monkeypatch):
    monkeypatch.setattr(ways, "wins", always)


def draw(x_shape, n, dtype, bias=True):
    k = x_shape[-1]
    x, weight = torch.randn(x_shape).to(dtype), torch.randn(n, k).to(dtype)
    return x, weight, torch.randn(n).to(dtype) if bias else None


def assert_right(got, exact, dtype, theirs):
    """Within twice F.linear's error plus one rounding."""
    assert (wrong := mismatch(got, exact, dtype, largest_error(theirs, exact))) is None, wrong


@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", SHAPES)
def test_linear_is_right(name, bias, dtype, way):
    x, weight, b = draw(*SHAPES[name], dtype, bias)
    assert_right(
        linear(x, weight, b), reference(x, weight, b), dtype, functional.linear(x, weight, b)
    )


@dtypes
@pytest.mark.parametrize("rows", [1, 70])
def test_linear_over_long_rows(rows, dtype, by_alternative):
    """No worse than adding the products one by one in float32, as a plain loop would."""
    x, weight, _ = draw((rows, 4096), 24, dtype)
    exact = reference(x, weight)
    one_by_one = torch.zeros(rows, 24)
    for a, b in zip(x.float().unbind(1), weight.float().unbind(1), strict=True):
        one_by_one += a[:, None] * b
    assert largest_error(one_by_one, exact) < 1e-2
    assert_right(linear(x, weight), exact, dtype, one_by_one)


@dtypes
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "torch"])
def test_panels_and_blocks_meet_at_their_edges(dtype, onednn, monkeypatch, by_alternative):
    monkeypatch.setattr(ways, "_default", lambda _: (onednn,) * len(FROM_ROWS))
    monkeypatch.setattr(ways, "_PANEL", 16 * 48)
    monkeypatch.setattr(ways, "_BLOCK", 4)
    for rows in (3, 4, 5, 9):
        for n in (15, 16, 17, 40):
            x, weight, bias = draw((rows, 48), n, dtype)
            args = x, weight, bias
            assert_right(linear(*args), reference(*args), dtype, functional.linear(*args))


STRIDES = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other_column": lambda t: torch.stack((t, t.neg()), -1).flatten(-2)[..., ::2],
    "slice_of_wider": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "repeated_row": lambda t: t[:1].expand_as(t),
    "repeated_column": lambda t: t[..., :1].expand_as(t),
    "negative_view": lambda t: torch._neg_view(t),
}


@dtypes
@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
@pytest.mark.parametrize("name", STRIDES)
def test_strides(name, argument, dtype, way):
    x, weight, bias = draw((6, 32), 16, dtype)
    args = {"x": x, "weight": weight, "bias": bias}
    args[argument] = STRIDES[name](args[argument])
    # What a user runs today, with these strides: MKL adds in another order for some of them.
    exact, theirs = reference(**args), functional.linear(*args.values())
    assert_right(linear(**args), exact, dtype, theirs)


@dtypes
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"])
@pytest.mark.parametrize("rows", [3, 40])
def test_activation_and_residual(activation, rows, dtype, way):
    x, weight, bias = draw((rows, 64), 24, dtype)
    residual = torch.randn(24, rows).to(dtype).t()
    before = residual.clone()
    options = {"activation": activation, "residual": residual}
    theirs = ways._ACTIVATIONS[activation](functional.linear(x, weight, bias)) + residual
    got = linear(x, weight, bias, **options)
    assert_right(got, reference(x, weight, bias, **options), dtype, theirs)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_nan_stays_nan(activation, way):
    x = torch.full((3, 8), torch.nan)
    assert linear(x, torch.ones(4, 8), activation=activation).isnan().all()


NEEDED = [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1) if x or w or b]


@dtypes
@pytest.mark.parametrize("needed", NEEDED, ids=str)
def test_gradients(needed, dtype, way):
    inputs = draw((2, 9, 48), 24, dtype)
    upstream = torch.randn(24, 2, 9).to(dtype).permute(1, 2, 0)
    before = [t.clone() for t in (*inputs, upstream)]

    def gradients(function, inputs, upstream):
        leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip(inputs, needed, strict=True)]
        function(*leaves).backward(upstream)
        return [leaf.grad for leaf in leaves]

    exact = gradients(functional.linear, [t.double() for t in inputs], upstream.double())
    theirs = gradients(functional.linear, inputs, upstream)
    got = gradients(linear, inputs, upstream)
    assert [g is not None for g in got] == [bool(n) for n in needed]
    for ours, their, true in zip(got, theirs, exact, strict=True):
        if true is not None:
            assert_right(ours, true, dtype, their)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, upstream), strict=True))


@dtypes
def test_only_gradients_that_are_needed_cost_a_product(dtype, by_alternative):
    x, weight, bias = draw((9, 48), 24, dtype)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
        out = linear(x, weight, bias)
        with CountOps() as ran:
            out.sum().backward()
        leaf.requires_grad_(False)
        products = sum(ran.counts[op] for op in (ONEDNN, "aten::mm", "aten::addmm"))
        assert products == (leaf is not bias)


def test_what_is_saved_is_what_gradients_need(by_alternative):
    x, weight, _ = draw((9, 48), 24, torch.float32)

    def saved(x, weight):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
            linear(x, weight)
        return kept

    assert saved(x, weight.clone().requires_grad_()) == [x.shape]
    assert saved(x.clone().requires_grad_(), weight) == [weight.shape]


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_second_derivatives(activation, way):
    x, weight, bias = (t.requires_grad_() for t in draw((3, 5), 4, torch.float32))
    residual = torch.randn(3, 4, requires_grad=True)
    options = {"activation": activation, "residual": residual}

    def second(function, *args, **options):
        (first,) = torch.autograd.grad(
            function(*args, **options).square().sum(), args[0], create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), args[:2])

    double = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    ours = second(linear, x, weight, bias, **options)
    theirs = second(reference, *double, **options)
    for got, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_alternative_is_what_runs(by_alternative):
    x, weight, _ = draw((3, 8), 4, torch.float32)
    with CountOps() as ran:
        linear(x, weight)
    assert ran.counts == {ONEDNN: 1}


def in_autocast(call):
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def in_inference_mode(call):
    with torch.inference_mode():
        return call()


def with_onednn_off(call):
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags, less a warning of its own
    try:
        return call()
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("around", [in_autocast, with_onednn_off])
def test_falls_back_bit_for_bit(around, by_alternative):
    x, weight, bias = draw((3, 64), 24, torch.float32)
    with CountOps() as ran:
        got = around(functools.partial(linear, x, weight, bias))
    theirs = around(functools.partial(functional.linear, x, weight, bias))
    assert ran.counts["aten::addmm"] == 1
    assert got.dtype == theirs.dtype
    assert torch.equal(got, theirs)


@dtypes
def test_inference_mode(dtype, way):
    x, weight, bias = draw((3, 64), 24, dtype)
    args = x, weight.requires_grad_(), bias
    got = in_inference_mode(lambda: linear(*args, activation="silu", residual=x[:, :24]))
    assert got.is_inference()
    with torch.no_grad():
        assert torch.equal(got, linear(*args, activation="silu", residual=x[:, :24]))


def test_functorch_forward_mode_subclasses_and_meta(by_alternative):
    x, weight, bias = draw((3, 64), 24, torch.float32)
    stacked = torch.func.vmap(linear, in_dims=(0, None, None))(x, weight, bias)
    torch.testing.assert_close(stacked, linear(x, weight, bias))
    upstream = torch.func.grad(lambda t: linear(t, weight, residual=bias.expand(3, -1)).sum())(x)
    torch.testing.assert_close(upstream, weight.sum(0).expand(3, -1))
    _, tangent = torch.func.jvp(lambda t: linear(t, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.t())

    class Own(torch.Tensor):
        pass

    assert type(linear(x.as_subclass(Own), weight)) is Own
    assert linear(x.to("meta"), weight.to("meta")).shape == (3, 24)
    double = [t.double() for t in (x, weight, bias)]
    assert torch.equal(linear(*double), functional.linear(*double))


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_to_one_graph(grad, by_alternative):
    x, weight, bias = draw((3, 64), 24, torch.float32)
    weight.requires_grad_(grad)
    residual = torch.randn(3, 24)
    call = functools.partial(linear, activation="gelu", residual=residual)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), call(x, weight, bias))


def test_traces(by_alternative):
    x, weight, bias = draw((3, 64), 24, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda t: linear(t, weight, bias), x)
    assert "mkldnn" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), linear(x, weight, bias))


X, WEIGHT, BIAS = torch.ones(2, 8), torch.ones(4, 8), torch.ones(4)
ERRORS = [
    ((X, WEIGHT[0]), {}, r"weight: expected \[N, K\]"),
    ((X[:, :7], WEIGHT), {}, r"x: expected \[\.\.\., 8\].* got \[2, 7\]"),
    ((X.sum(), WEIGHT), {}, r"x: expected \[\.\.\., 8\].* got \[\]"),
    ((X.half(), WEIGHT), {}, r"x: expected torch.float32.* got \[2, 8\] of torch.float16"),
    ((X, WEIGHT, BIAS[:3]), {}, r"bias: expected \[4\].* got \[3\]"),
    ((X, WEIGHT, BIAS.half()), {}, r"bias: expected .*float32.* got .*float16"),
    ((X, WEIGHT), {"residual": BIAS}, r"residual: expected \[2, 4\].* got \[4\]"),
    ((X, WEIGHT), {"residual": X.half()[:, :4]}, r"residual: expected .*float32.* got .*float16"),
]


@pytest.mark.parametrize(("args", "options", "message"), ERRORS, ids=[e[2][:20] for e in ERRORS])
def test_wrong_arguments(args, options, message, way):
    with pytest.raises(RuntimeError, match=f"vlmops.ops.linear: {message}"):
        linear(*args, **options)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, .* got 'tanh'"):
        linear(X, WEIGHT, activation="tanh")


@pytest.mark.parametrize(
    ("vendor", "isa", "primitive", "expected"),
    [
        ("AuthenticAMD", "AVX512", True, {torch.float32: "11111", torch.bfloat16: "00000"}),
        ("AuthenticAMD", "AVX2", False, {torch.float32: "00000", torch.bfloat16: "00111"}),
        ("GenuineIntel", "AVX512", True, {torch.float32: "00000", torch.float16: "00000"}),
        (None, "DEFAULT", False, {torch.float32: "00000", torch.float16: "00111"}),
    ],
)
def test_defaults(vendor, isa, primitive, expected, monkeypatch):
    monkeypatch.setattr(ways, "_vendor", lambda: vendor)
    monkeypatch.setattr(ways, "multiplies", lambda _: primitive)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    ways._default.cache_clear()
    try:
        for dtype, pattern in {**expected, torch.float64: "00000"}.items():
            assert "".join("01"[w] for w in ways.wins(dtype, 4096, 4096)) == pattern
            assert not any(ways.wins(dtype, 64, 64))
    finally:
        ways._default.cache_clear()


def test_rows_choose_the_way():
    weight = torch.randn(4, 8)
    for at, first in enumerate(FROM_ROWS):
        ways.measured[torch.float32, 4, 8] = tuple(i == at for i in range(len(FROM_ROWS)))
        last = [*FROM_ROWS, 1001][at + 1] - 1
        following = [(last + 1, 0)] if last < 1000 else []
        for rows, chosen in [(first, 1), (last, 1), (first - 1, 0), *following]:
            with CountOps() as ran:
                linear(torch.ones(rows, 8), weight)
            assert ran.counts[ONEDNN] == chosen, rows


@pytest.mark.parametrize(
    ("dtype", "faster_at", "expected"),
    [
        (torch.float32, {1, 8, 64, 512}, "11111"),
        (torch.float32, {1}, "10000"),
        (torch.float32, {1, 8}, "11000"),
        (torch.float32, {8, 64}, "00100"),
        (torch.float32, {512}, "00001"),
        (torch.bfloat16, {64, 512}, "00011"),
        (torch.bfloat16, {1, 64, 512}, "00011"),
        (torch.bfloat16, {1, 8}, "00000"),
        (torch.bfloat16, {1, 8, 64, 512}, "00111"),
    ],
)
def test_tuning_believes_its_clock(dtype, faster_at, expected, monkeypatch):
    clock = [0.0]

    def timed(product, slow_at):
        def call(x, weight):
            clock[0] += 2.0 if len(x) in slow_at else 1.0
            return product(x, weight)

        return call

    everywhere = {1, 8, 64, 512}
    monkeypatch.setattr(
        linear_tuning, "time", type("Clock", (), {"perf_counter": lambda: clock[0]})
    )
    monkeypatch.setattr(
        linear_tuning, "alternative", timed(functional.linear, everywhere - faster_at)
    )
    monkeypatch.setattr(functional, "linear", timed(functional.linear, faster_at))
    monkeypatch.setattr(linear_tuning, "measured", ways.measured)
    linear_tuning.tune([nn.Parameter(torch.zeros(256, 256, dtype=dtype))])
    assert "".join("01"[w] for w in ways.measured[dtype, 256, 256]) == expected
    assert linear_tuning.gains(dtype, 256, 256) == ("1" in expected)


def test_tuning_measures_the_heaviest_while_there_is_time_and_each_class_once(monkeypatch):
    monkeypatch.setattr(linear_tuning, "measured", ways.measured)
    seen = []

    def measure(weights):
        seen.append((tuple(weights[0].shape), len(weights)))
        return (True,) * len(FROM_ROWS)

    monkeypatch.setattr(linear_tuning, "_measure", measure)
    light, heavy, tiny = torch.ones(256, 256), torch.ones(512, 256), torch.ones(8, 8)
    linear_tuning.tune([light, heavy, heavy, tiny], seconds=0)
    assert seen == []
    linear_tuning.tune([light, heavy, heavy, tiny, heavy.double()])
    assert seen == [((512, 256), 2), ((256, 256), 1)]
    linear_tuning.tune([light])
    assert len(seen) == 2
