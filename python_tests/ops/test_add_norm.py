"""The norm behind a sum: what is special to it beside the contract."""

import contextlib

import pytest
import torch
from dispatch import CountOps
from emulator.build import emulated
from testbed import TESTED_ISAS, extra_memory, reads_proc
from torch.nn import functional
from transformers.models.blip_2 import configuration_blip_2, modeling_blip_2
from transformers.models.idefics2 import modeling_idefics2

import vlmops
from vlmops.ops.add_norm import reference

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
every_backend = pytest.mark.parametrize("backend", [*TESTED_ISAS, "emulator"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
both_norms = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])


def run_by(backend, use_cpu_isa):
    """An instruction set of the CPU, or the emulated GPU."""
    if backend == "emulator":
        return emulated("checked")
    use_cpu_isa(backend)
    return contextlib.nullcontext()


def some(*shape, dtype=torch.float32, channels=72):
    """x, residual, weight, bias and x_bias."""
    rows = torch.randn(2, *shape, channels).to(dtype)
    vectors = torch.randn(3, channels).to(dtype)
    return *rows, *vectors


def test_reference_is_what_a_qformer_computes():
    config = configuration_blip_2.Blip2QFormerConfig(hidden_size=48, intermediate_size=96)
    block = modeling_blip_2.Blip2QFormerSelfOutput(config).double().eval()
    hidden, residual = torch.randn(2, 2, 5, 48, dtype=torch.float64)
    norm = block.LayerNorm
    out, _ = reference(
        hidden @ block.dense.weight.t(), residual, norm.weight, norm.bias, block.dense.bias,
        norm.eps,
    )  # fmt: skip
    torch.testing.assert_close(out, block(hidden, residual))


def test_reference_is_what_a_perceiver_computes():
    norm = modeling_idefics2.Idefics2RMSNorm(48, eps=1e-6)
    x, residual = torch.randn(2, 2, 5, 48)
    out, total = reference(x, residual, norm.weight, eps=norm.variance_epsilon, rms=True)
    torch.testing.assert_close(out.float(), norm(x + residual))
    torch.testing.assert_close(total.float(), x + residual)


@every_backend
@every_dtype
def test_the_sum_is_rounded_once_and_normed_before_that(backend, use_cpu_isa, dtype):
    x, residual, weight, bias, x_bias = some(5, dtype=dtype, channels=200)
    x *= 40  # what the sum loses by rounding shows
    with run_by(backend, use_cpu_isa):
        out, total = vlmops.add_norm(x, residual, weight, bias, x_bias=x_bias, return_sum=True)
        alone = vlmops.add_norm(x, residual, weight, bias, x_bias=x_bias)
    exact = x.float() + x_bias.float() + residual.float()
    assert torch.equal(total, exact.to(dtype))
    assert torch.equal(out, alone)
    if dtype == torch.bfloat16:
        exact, rounded = (
            functional.layer_norm(s.float(), (200,), weight.float(), bias.float()).to(dtype)
            for s in (exact, total)
        )
        assert (out == exact).float().mean() > 0.98
        assert (out == rounded).float().mean() < 0.9


@every_isa
def test_nan_of_vectors_stays_nan(isa, use_cpu_isa):
    """Whatever bits it has: rounding must not carry into the exponent."""
    use_cpu_isa(isa)
    for bits in (0x7FFFFFFF, -1):  # NaN with all bits set
        nan = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
        x = torch.randn(3, 64).bfloat16()
        for name in ("weight", "bias", "x_bias"):
            assert vlmops.add_norm(x, **{name: nan}).isnan().all(), name


@both_norms
@every_dtype
def test_threads_and_strides_change_no_bit_of_gradients(dtype, rms):
    grad, total, weight, bias, x_bias = some(130, 3, dtype=dtype)
    more = torch.randn_like(grad)
    bias = None if rms else bias

    def run(*tensors):
        needs = True, True, not rms, True
        return torch.ops.vlmops.add_norm_backward(
            tensors[0], tensors[1], weight, bias, x_bias, tensors[2], 1e-5, rms, *needs
        )

    sideways = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (grad, total, more)]
    threads, results = torch.get_num_threads(), []
    for n, tensors in ((1, (grad, total, more)), (2, (grad, total, more)), (2, sideways)):
        torch.set_num_threads(n)
        results.append(run(*tensors))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@every_isa
@every_dtype
def test_large_results_are_those_of_small_ones(isa, use_cpu_isa, dtype):
    """They are written past the caches."""
    use_cpu_isa(isa)
    x, residual, weight, bias, x_bias = some(1100, dtype=dtype, channels=4096)
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias, "return_sum": True}
    parts = zip(x.split(100), residual.split(100), strict=True)
    each = [vlmops.add_norm(a, b, **vectors) for a, b in parts]
    whole = vlmops.add_norm(x, residual, **vectors)
    for got, parts in zip(whole, zip(*each, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))
    needs = True, False, False, False
    options = weight, bias, x_bias, None, 1e-5, False, *needs
    of_sum, *_ = torch.ops.vlmops.add_norm_backward(x, residual, *options)
    small, *_ = torch.ops.vlmops.add_norm_backward(x[:100], residual[:100], *options)
    assert torch.equal(of_sum[:100], small)


NAMES = ("x", "residual", "weight", "bias", "x_bias")


@pytest.mark.parametrize(
    ("wanted", "saved"),
    [("x", {"sum", "weight"}), ("residual", {"sum", "weight"}), ("weight", {"sum", "weight"}),
     ("bias", {"weight", "bias"}), ("x_bias", {"sum", "weight", "x_bias"})],
)  # fmt: skip
def test_saves_and_computes_what_is_needed(wanted, saved):
    args = dict(zip(NAMES, some(5), strict=True))
    args[wanted].requires_grad_()
    kept = []
    with (
        CountOps() as ran,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        out, total = vlmops.add_norm(**args, return_sum=True)
        torch.autograd.grad(out, args[wanted], torch.randn_like(out))
    known = {**args, "sum": total}
    names = {name for t in kept for name, a in known.items() if t.data_ptr() == a.data_ptr()}
    assert names == saved
    assert len(kept) == len(saved)
    assert len(ran.calls) == 2
    backward, tensors, options = ran.calls[-1]
    results = backward(*tensors, **options)
    given = dict(zip(("sum", "weight", "bias", "x_bias"), results, strict=True))
    asked = "sum" if wanted in ("x", "residual") else wanted
    assert [name for name, t in given.items() if t.numel()] == [asked]


def test_keeps_less_than_eager_does():
    args = dict(zip(NAMES, some(64, channels=256), strict=True))
    leaves = [t.requires_grad_() for t in args.values()]

    def kept_by(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
        ):
            function()
        given = {t.data_ptr() for t in leaves}
        return sum(t.nbytes for p, t in kept.items() if p not in given)

    def eager():
        s = args["x"] + args["x_bias"] + args["residual"]
        return functional.layer_norm(s, (256,), args["weight"], args["bias"])

    ours = kept_by(lambda: vlmops.add_norm(**args))
    assert ours == args["x"].nbytes
    assert ours < kept_by(eager)


def test_x_and_residual_share_a_gradient():
    x, residual, weight, *_ = some(5)
    args = x.requires_grad_(), residual.requires_grad_()
    out, total = vlmops.add_norm(*args, weight, return_sum=True)
    grads = torch.autograd.grad((out, total), args, (torch.randn_like(x), torch.randn_like(x)))
    assert grads[0].data_ptr() == grads[1].data_ptr()


def test_gradients_of_the_sum_alone_are_those_of_a_sum():
    args = [t.requires_grad_() for t in some(5)]
    _, total = vlmops.add_norm(*args[:4], x_bias=args[4], return_sum=True)
    upstream = torch.randn_like(total)
    grads = torch.autograd.grad(total, args, upstream, materialize_grads=True)
    assert torch.equal(grads[0], upstream)
    assert torch.equal(grads[1], upstream)
    assert not grads[2].any()
    assert not grads[3].any()
    torch.testing.assert_close(grads[4], upstream.sum(0))


def test_where_nothing_is_added_the_sum_is_x():
    x, _, weight, *_ = some(5)
    x.requires_grad_()
    out, total = vlmops.add_norm(x, weight=weight, return_sum=True)
    assert total is x
    upstream = torch.randn(2, 5, 72)
    (grad,) = torch.autograd.grad((out, total), x, tuple(upstream))
    (alone,) = torch.autograd.grad(vlmops.add_norm(x, weight=weight), x, upstream[0])
    assert torch.equal(grad, alone + upstream[1])


@pytest.mark.parametrize("kind", ["", "_triton"])
def test_backward_refuses_what_it_cannot_compute(kind):
    backward = getattr(torch.ops.vlmops, f"add_norm{kind}_backward")
    x, total, weight, *_ = some(5)
    with pytest.raises(RuntimeError, match="sum: expected what was normed"):
        backward(x, None, weight, None, None, None, 1e-5, True, True, False, False, False)
    with pytest.raises(RuntimeError, match="bias: expected a tensor, since its gradient is wanted"):
        backward(x, total, weight, None, None, None, 1e-5, False, True, False, True, False)


@reads_proc
def test_needs_no_memory_but_the_result():
    x, residual, weight, bias, x_bias = some(1024, channels=4096)
    grown, largest = extra_memory(lambda: vlmops.add_norm(x, residual, weight, bias, x_bias=x_bias))
    assert largest == x.nbytes
    assert grown < 1.2 * x.nbytes
