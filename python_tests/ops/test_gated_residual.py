"""The gated residual: what is special to it beside the contract."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from dispatch import CountOps
from emulator.build import emulated
from testbed import TESTED_ISAS, extra_memory, reads_proc
from torch import nn
from transformers.models.idefics import modeling_idefics
from transformers.models.mllama import modeling_mllama

import vlmops
from vlmops.ops.gated_residual import reference

every_isa = pytest.mark.parametrize("isa", TESTED_ISAS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
FORMS = {"one": (1,), "channels": (1, 1, 70)}
every_form = pytest.mark.parametrize("form", FORMS)


def mllama(x, y, gate, added):
    """The layer's MLP, whose branch has both mask and gate; its attention adds nothing."""
    layer = SimpleNamespace(
        input_layernorm=nn.Identity(), post_attention_layernorm=nn.Identity(),
        cross_attn=lambda **_: (torch.zeros_like(x), None), mlp=lambda _: y,
        cross_attn_attn_gate=gate, cross_attn_mlp_gate=gate,
    )  # fmt: skip
    mask = added[:, None, :, None].to(x.dtype)  # [B, 1, S, 1]
    return modeling_mllama.MllamaCrossAttentionDecoderLayer.forward.__wrapped__(
        layer, x, None, None, None, mask
    )


def idefics(x, y, gate, added):
    """The layer's attention; its MLP adds nothing."""
    layer = SimpleNamespace(
        input_layernorm=nn.Identity(), post_attention_layernorm=nn.Identity(),
        cross_attn=lambda **_: (y, None), mlp=torch.zeros_like, config=0.0, training=False,
        act_cross_attn=nn.Tanh(), act_dense=nn.Tanh(), alpha_cross_attn=gate, alpha_dense=gate,
    )  # fmt: skip
    return modeling_idefics.IdeficsGatedCrossAttentionLayer.forward.__wrapped__(
        layer, x, image_hidden_states=y, cross_attention_gate=added.to(x.dtype)
    )


@every_form
@pytest.mark.parametrize("layer", [mllama, idefics])
def test_reference_is_what_transformers_computes(layer, form):
    x, y = torch.randn(2, 2, 7, 70, dtype=torch.float64)
    gate, added = torch.randn(FORMS[form], dtype=torch.float64), torch.rand(2, 7) < 0.6
    torch.testing.assert_close(reference(x, y, gate, added), layer(x, y, gate, added))


def run_by(backend, use_cpu_isa):
    """An instruction set of the CPU, or the emulated GPU."""
    if backend == "emulator":
        return emulated("checked")
    use_cpu_isa(backend)
    return contextlib.nullcontext()


def bits(t):
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16)


@every_dtype
@every_form
@pytest.mark.parametrize("backend", [*TESTED_ISAS, "emulator"])
def test_rows_that_are_not_added_to_are_moved_and_what_they_hide_is_not_read(
    backend, use_cpu_isa, dtype, form
):
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(whole)
    x = torch.randint(limits.min, limits.max, (3, 5, 70), dtype=whole).view(dtype)  # NaNs too
    y, grad = torch.randn(2, 3, 5, 70).to(dtype)
    gate, added = -torch.rand(FORMS[form]).to(dtype), torch.rand(3, 5) < 0.6
    poisoned = [t.masked_fill(~added[..., None], float("nan")) for t in (y, grad)]
    with run_by(backend, use_cpu_isa):
        out = vlmops.gated_residual(x, poisoned[0], gate, added)
        of_clean = vlmops.gated_residual(x, y, gate, added)
        of_y, of_gate = torch.ops.vlmops.gated_residual_backward(
            poisoned[1], poisoned[0], gate, added
        )
        clean = torch.ops.vlmops.gated_residual_backward(grad, y, gate, added)
    assert torch.equal(bits(out)[~added], bits(x)[~added])
    assert torch.equal(bits(out), bits(of_clean))
    assert (bits(of_y)[~added] == 0).all()
    assert torch.equal(of_y, clean[0])
    assert torch.equal(of_gate, clean[1])
    assert of_gate.isfinite().all()


@every_isa
@every_dtype
def test_a_closed_gate_leaves_x_to_the_bit(isa, use_cpu_isa, dtype):
    use_cpu_isa(isa)
    x, y = torch.randn(2, 3, 5, 70).to(dtype)
    for shape in FORMS.values():
        assert torch.equal(bits(vlmops.gated_residual(x, y, torch.zeros(shape))), bits(x))


@every_isa
def test_tanh_is_accurate(isa, use_cpu_isa):
    """To 2 units in the last place, where gates may be and beyond."""
    use_cpu_isa(isa)
    gate = torch.cat((torch.linspace(-20, 20, 40_001), torch.logspace(-30, 0, 5_000),
                      torch.tensor([0.0, 0.625, -0.625, 3e38, -3e38, 1e-42])))  # fmt: skip
    got = vlmops.gated_residual(torch.zeros_like(gate), torch.ones_like(gate), gate)
    exact = gate.double().tanh()
    unit = torch.finfo(torch.float32).eps * exact.float().abs().frexp().exponent.double().exp2() / 2
    assert ((got.double() - exact).abs() / unit.clamp(min=2.0**-149)).max() <= 2
    special = torch.tensor([float("nan"), float("inf"), float("-inf")])
    got = vlmops.gated_residual(torch.zeros(3), torch.ones(3), special)
    assert got.isnan().tolist() == [True, False, False]
    assert got[1:].tolist() == [1.0, -1.0]


@every_dtype
@every_form
def test_threads_and_strides_change_no_bit_of_gradients(dtype, form):
    grad, y = torch.randn(2, 130, 3, 70).to(dtype)
    gate, added = torch.randn(FORMS[form]).to(dtype), torch.rand(130, 3) < 0.6
    sideways = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (grad, y)]
    threads, results = torch.get_num_threads(), []
    for n, tensors in ((1, (grad, y)), (2, (grad, y)), (2, sideways)):
        torch.set_num_threads(n)
        results.append(torch.ops.vlmops.gated_residual_backward(*tensors, gate, added))
    torch.set_num_threads(threads)
    for of_y, of_gate in results[1:]:
        assert torch.equal(of_y, results[0][0])
        assert torch.equal(of_gate, results[0][1])


@every_form
@pytest.mark.parametrize("backend", [*TESTED_ISAS, "emulator"])
def test_the_gates_gradient_is_rounded_once_whatever_is_aligned(backend, use_cpu_isa, form):
    grad, y = torch.randn(2, 130, 40)
    gate = torch.randn((1,) if form == "one" else (40,))
    shifted = torch.cat((y.new_zeros(1), y.flatten()))[1:].view(y.shape)  # not on 16 bytes
    with run_by(backend, use_cpu_isa):
        results = [torch.ops.vlmops.gated_residual_backward(grad, t, gate)[1] for t in (y, shifted)]
    sums = (grad.double() * y.double()).sum(0).sum_to_size(gate.shape)
    exact = (1 - gate.double().tanh() ** 2) * sums
    assert all(torch.equal(got, exact.float()) for got in results)


@every_isa
@every_dtype
def test_large_results_are_those_of_small_ones(isa, use_cpu_isa, dtype):
    """They are written past the caches."""
    use_cpu_isa(isa)
    x, y = torch.randn(2, 1100, 4096).to(dtype)
    gate, added = torch.randn(4096).to(dtype), torch.rand(1100) < 0.8
    parts = zip(*(t.split(100) for t in (x, y, added)), strict=True)
    each = [vlmops.gated_residual(a, b, gate, rows) for a, b, rows in parts]
    assert torch.equal(vlmops.gated_residual(x, y, gate, added), torch.cat(each))
    of_y, _ = torch.ops.vlmops.gated_residual_backward(x, y, gate, added)
    small, _ = torch.ops.vlmops.gated_residual_backward(x[:100], y[:100], gate, added[:100])
    assert torch.equal(of_y[:100], small)


def test_one_gate_seen_as_many_gets_a_gradient_for_each():
    grad, y = torch.randn(2, 5, 40)
    gate = torch.randn(1)
    _, got = torch.ops.vlmops.gated_residual_backward(grad, y, gate.expand(40))
    _, expected = torch.ops.vlmops.gated_residual_backward(grad, y, gate.repeat(40))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("wanted", "saved", "calls"),
    [("x", set(), 1), ("y", {"gate", "row_mask"}, 2), ("gate", {"y", "gate", "row_mask"}, 2)],
)
def test_saves_and_computes_what_is_needed(wanted, saved, calls):
    args = {"x": torch.randn(5, 40), "y": torch.randn(5, 40), "gate": torch.randn(1),
            "row_mask": torch.rand(5) < 0.6}  # fmt: skip
    args[wanted].requires_grad_()
    kept = []
    with (
        CountOps() as ran,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        out = vlmops.gated_residual(**args)
        upstream = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, args[wanted], upstream)
    names = {name for t in kept for name, a in args.items() if t.data_ptr() == a.data_ptr()}
    assert names == saved
    assert len(ran.calls) == calls
    if wanted == "x":
        assert grad.data_ptr() == upstream.data_ptr()


def test_backward_refuses_a_gate_without_what_it_gates():
    for op in ("gated_residual_backward", "gated_residual_triton_backward"):
        with pytest.raises(RuntimeError, match="y: expected the y of the forward call"):
            getattr(torch.ops.vlmops, op)(torch.ones(2, 8), None, torch.ones(1))


@reads_proc
def test_needs_no_memory_but_the_result():
    x, y = torch.randn(2, 512, 4096)
    gate, added = torch.randn(4096), torch.rand(512) < 0.6
    grown, largest = extra_memory(lambda: vlmops.gated_residual(x, y, gate, added))
    assert largest == x.nbytes
    assert grown < 1.2 * x.nbytes
