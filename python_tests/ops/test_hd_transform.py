"""The HD transform: what is special to it beside the contract.

First, the module is what Phi-3.5-vision's published description says, read token by token."""

import pytest
import torch
from emulator.build import emulated
from testbed import extra_memory, reads_proc
from torch import nn

import vlmops
import vlmops.nn
from vlmops.ops.hd_transform import reference
from vlmops.ops.hd_transform_spec import SPEC

CASES = {case.name: case for case in SPEC.cases}


class Described(nn.Module):
    """Phi-3.5-vision's image embedding behind CLIP, one token at a time."""

    def __init__(self, channels, hidden_size, order):
        super().__init__()
        self.order = order
        self.glb_GN = nn.Parameter(torch.randn(1, 1, 4 * channels))
        self.sub_GN = nn.Parameter(torch.randn(1, 1, 1, 4 * channels))
        self.img_projection = nn.Sequential(
            nn.Linear(4 * channels, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features, grids):
        """``[B, crops, g * g, C]``, the whole picture first."""
        g = round(features.shape[2] ** 0.5)
        tokens = []
        for crops, (h_crop, w_crop) in zip(features, grids, strict=True):

            def pixel(y, x, crops=crops, w_crop=w_crop):  # of the picture
                crop = 1 + (y // g) * w_crop + x // g
                return crops[crop, y % g * g + x % g]

            def whole(y, x, crops=crops):
                return crops[0, y * g + x]

            sub = self.rows(pixel, h_crop * g, w_crop * g)
            glb = self.rows(whole, g, g)
            between = [self.glb_GN[0, 0]]
            tokens += sub + between + glb if self.order == "sub_glb" else glb + between + sub
        return self.img_projection(torch.stack(tokens))

    def rows(self, pixel, height, width):
        tokens = []
        for y in range(0, height, 2):
            for x in range(0, width, 2):
                block = [pixel(y + dy, x + dx) for dy in (0, 1) for dx in (0, 1)]
                tokens.append(torch.cat(block))
            tokens.append(self.sub_GN[0, 0, 0])
        return tokens


PICTURES = [(2, 3), (1, 1), (3, 2), (1, 4)]


def described_and_module(order, dtype=torch.float32, skip_prefix=0):
    described = Described(8, 12, order).to(dtype)
    module = vlmops.nn.HDTransform(8, 12, order=order, skip_prefix=skip_prefix, dtype=dtype)
    module.load_state_dict(described.state_dict())
    return described, module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("order", ["sub_glb", "glb_sub"])
def test_hd_transform_module_is_what_is_described(order, dtype):
    described, module = described_and_module(order, dtype)
    theirs = torch.randn(4, 7, 16, 8).to(dtype).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    expected, got = described(theirs, PICTURES), module(ours, crop_grids=PICTURES)
    assert torch.equal(got, expected)
    assert got.shape[0] == sum(vlmops.hd_token_counts(PICTURES, side=2))
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)
    for (name, mine), other in zip(module.named_parameters(), described.parameters(), strict=True):
        if "GN" not in name:
            assert torch.equal(mine.grad, other.grad), name
    # Sums: theirs is one bfloat16 addition after another, ours is the exact one rounded.
    for name in ("sub_GN", "glb_GN"):
        exact = exact_gradient(described, theirs, upstream, name)
        grad = getattr(module, name).grad
        assert grad.dtype == dtype
        assert grad.shape == getattr(described, name).shape
        error = (grad.double() - exact).abs().max()
        theirs_error = (getattr(described, name).grad.double() - exact).abs().max()
        assert error <= 2 * theirs_error + torch.finfo(dtype).eps * exact.abs().max()


def exact_gradient(described, features, upstream, name):
    """In float64, from what the first linear layer hands back in the dtype of the model."""
    tokens = []
    handle = described.img_projection[0].register_full_backward_hook(
        lambda module, grad_in, grad_out: tokens.append(grad_in[0])
    )
    torch.autograd.grad(described(features, PICTURES), features, upstream)
    handle.remove()
    at, learned = 0, torch.zeros_like(getattr(described, name), dtype=torch.float64)
    for h, w in PICTURES:
        sub = [("sub_GN", (y + 1) * (2 * w + 1) - 1) for y in range(2 * h)]
        glb = [("sub_GN", (y + 1) * 3 - 1) for y in range(2)]
        parts, whole = 2 * h * (2 * w + 1), 6
        if described.order == "sub_glb":
            rows = sub + [("glb_GN", parts)] + [(n, parts + 1 + i) for n, i in glb]
        else:
            rows = glb + [("glb_GN", whole)] + [(n, whole + 1 + i) for n, i in sub]
        for whose, row in rows:
            if whose == name:
                learned += tokens[0][at + row].double()
        at += parts + 1 + whole
    return learned


def test_hd_transform_module_loads_a_checkpoint():
    described, _ = described_and_module("sub_glb")
    prefix = "model.vision_embed_tokens."
    checkpoint = {prefix + name: value for name, value in described.state_dict().items()}
    checkpoint[prefix + "img_processor.vision_model.post_layernorm.bias"] = torch.zeros(8)
    names = ["glb_GN", "sub_GN", "img_projection.0.weight", "img_projection.0.bias",
             "img_projection.2.weight", "img_projection.2.bias"]  # fmt: skip
    module = vlmops.nn.HDTransform(8, 12, skip_prefix=1)
    assert list(module.state_dict()) == names
    module.load_state_dict({name: checkpoint[prefix + name] for name in module.state_dict()})
    features = torch.randn(2, 7, 17, 8)
    got = module(features, torch.tensor([[672, 1008], [336, 336]]))
    assert torch.equal(got, described(features[:, :, 1:], [(2, 3), (1, 1)]))
    assert torch.equal(got, module(features, [(672, 1008), (336, 336)]))
    packed = torch.cat((features[0], features[1, :2]))
    assert torch.equal(got, module(packed, crop_grids=[(2, 3), (1, 1)]))


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({}, "expected either image_sizes or crop_grids, got neither"),
        ({"image_sizes": [(336, 336)], "crop_grids": [(1, 1)]}, "crop_grids, got both"),
        ({"image_sizes": [(336, 400)]}, r"whole crops of 336 pixels.*got \[\(336, 400\)\]"),
    ],
)
def test_hd_transform_module_refuses(arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        vlmops.nn.HDTransform(8, 12)(torch.randn(1, 2, 16, 8), **arguments)


def test_hd_transform_module_compiles_to_one_graph():
    _, module = described_and_module("sub_glb")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    features = torch.randn(4, 7, 16, 8)
    assert torch.equal(
        compiled(features, crop_grids=PICTURES), module(features, crop_grids=PICTURES)
    )


def bits(x):
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("device", ["cpu", "emulator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["phi3_padded", "xcomposer2_4khd", "factor_3", "sliced", "unaligned"]
)
def test_hd_transform_moves_bits(name, dtype, device):
    """Also those that no arithmetic leaves alone: NaNs with a payload, and their gradients."""
    args = CASES[name].make(dtype, torch.device("cpu"))
    features = args["image_features"]
    integer = bits(features).dtype
    payloads = torch.randint(
        torch.iinfo(integer).min, torch.iinfo(integer).max, features.shape, dtype=integer
    )
    args["image_features"] = features.copy_(payloads.view(dtype))
    # float64 widens every value exactly but NaNs: where each element comes from, by its number.
    numbers = torch.arange(features.numel(), dtype=torch.float64).view(features.shape) + 1
    learned = -torch.arange(1, 2 * args["newline"].numel() + 1, dtype=torch.float64)
    newline, separator = learned.view(2, *args["newline"].shape[-1:])
    where = reference(**{**args, "image_features": numbers, "newline": newline,
                         "separator": separator}).long()  # fmt: skip
    table = torch.cat((bits(args["newline"]).flatten(), bits(args["separator"]).flatten()))
    flat = bits(features.contiguous()).flatten()
    expected = torch.where(where > 0, flat[where.abs().clamp(max=len(flat)) - 1],
                           table[where.abs().clamp(max=len(table)) - 1])  # fmt: skip
    if device == "emulator":
        with emulated("checked"):
            got = vlmops.hd_transform(**args)
    else:
        got = vlmops.hd_transform(**args)
    assert torch.equal(bits(got), expected)


@pytest.mark.parametrize("name", ["phi3_padded", "phi4", "valid_nothing", "mean_prefix"])
def test_hd_transform_reads_no_padding(name):
    """NaN where no token reads comes through nowhere, and its gradient is zero."""
    args = CASES[name].make(torch.float32, torch.device("cpu"))
    leaf = args["image_features"].clone().requires_grad_()
    out = vlmops.hd_transform(**{**args, "image_features": leaf})
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    unread = grad == 0
    assert unread.any()
    poisoned = args["image_features"].masked_fill(unread, float("nan"))
    assert torch.equal(vlmops.hd_transform(**{**args, "image_features": poisoned}), out)


def test_hd_transform_counts_are_those_of_its_result():
    args = CASES["phi4"].make(torch.float32, torch.device("cpu"))
    grids, valid = args["crop_grids"], args["valid_hw"]
    counts = vlmops.hd_token_counts(grids, 3, valid_hw=valid)
    assert sum(counts) == len(vlmops.hd_transform(**args))
    assert counts == [3 * 6 + 1 + 12, 8 * 3 + 1 + 12, 6 * 5 + 1 + 12]
    # As published: (h * w + 1) * 144 + 1 + (h + 1) * 12.
    assert vlmops.hd_token_counts([(4, 4), (1, 5)], 12) == [2509, 889]
    with pytest.raises(TypeError, match="crop_grids: expected a list of pairs of integers"):
        vlmops.hd_token_counts([4, 4], 12)


def test_hd_transform_sums_more_rows_than_bfloat16_counts():
    """Ones of 4,000 rows: bfloat16 would stay at 256, and float32 loses nothing here."""
    features = torch.zeros(500 * 2, 16, 2, dtype=torch.bfloat16)
    newline = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    separator = torch.zeros(8, requires_grad=True)
    out = vlmops.hd_transform(features, [(1, 1)] * 500, newline, separator)
    out.backward(torch.ones_like(out))
    assert newline.grad.tolist() == [2000.0] * 8
    assert separator.grad.tolist() == [500.0] * 8
    assert separator.grad.dtype == torch.float32


@reads_proc
def test_hd_transform_needs_no_memory_but_the_result():
    args = CASES["threads"].make(torch.float32, torch.device("cpu"))
    args["image_features"] = torch.randn(18, 145, 1024)
    args["newline"], args["separator"] = torch.randn(2, 4096)
    result = sum(vlmops.hd_token_counts(args["crop_grids"], 6)) * 4096 * 4
    grown, largest = extra_memory(lambda: vlmops.hd_transform(**args))
    assert largest == result
    assert grown < 1.5 * result
