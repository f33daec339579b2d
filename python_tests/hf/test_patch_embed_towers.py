"""`vlmops.patch` with towers that embed in their own forward: all of it in the pass over pixels."""

import copy
import pickle

import pytest
import torch
import transformers
from dispatch import CountOps
from hf.checks import batch_of
from hf.tiny import build, inputs, run
from torch import nn
from torch.nn import functional

import vlmops
from vlmops.hf import pending, plain, towers
from vlmops.hf.pending import Pending, Rows, Tokens

pytestmark = pytest.mark.usefixtures("only_patch_embed")

OP, BACKWARD = "vlmops::patch_embed", "vlmops::patch_embed_backward"

# Family -> its tower, the first layer, what the report says, positions and taps of each.
TOWERS = {
    "qwen3_vl": ("model.visual", "blocks.0", "pos_embed", [4]),
    "qwen3_vl_moe": ("model.visual", "blocks.0", "pos_embed", [4]),
    "glm4v": ("model.visual", "blocks.0", "embeddings, post_conv_layernorm", [16]),
    "mistral3": ("model.vision_tower", "transformer", "ln_pre", []),
    "llava_pixtral": ("model.vision_tower", "transformer", "ln_pre", []),
    "mllama": (
        "model.vision_model",
        "transformer.layers.0",
        "class_embedding, gated_positional_embedding, pre_tile_positional_embedding",
        [1, None, 1],
    ),
    "llama4": (
        "vision_model",
        "model.layers.0",
        "class_embedding, positional_embedding_vlm",
        [None],
    ),
}
every = pytest.mark.parametrize("family", TOWERS)
WITH_NORM = {"glm4v", "mistral3", "llava_pixtral"}


def made(family, dtype=torch.float32):
    """A model whose tower has random numbers everywhere: gates are 0 and norms 1 at first."""
    model = build(family, dtype=dtype)
    tower = model.get_submodule(TOWERS[family][0])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in tower.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.normal_(std=std)
    return model


@pytest.fixture
def fused(monkeypatch):
    """Calls of the op for tokens that were put off."""
    calls, right = [], pending.patch_embed

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return right(*args, **kwargs)

    monkeypatch.setattr(pending, "patch_embed", spy)
    return calls


class ReachedError(Exception):
    pass


def embedded(model, family, batch, grad=False):
    """What the first layer of a tower is given."""
    path, layer, *_ = TOWERS[family]
    found = []

    def stop(module, args, kwargs):
        given = (*args, *kwargs.values())
        found.append(
            next(t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point())
        )
        raise ReachedError

    handle = (
        model.get_submodule(path)
        .get_submodule(layer)
        .register_forward_pre_hook(stop, with_kwargs=True)
    )
    try:
        with pytest.raises(ReachedError), torch.set_grad_enabled(grad):
            run(model, batch)
    finally:
        handle.remove()
    assert type(found[0]) is torch.Tensor  # nothing that is put off gets there
    return found[0]


def same(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.detach(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def pair(family, dtype=torch.float32):
    theirs = made(family, dtype)
    ours = copy.deepcopy(theirs)
    vlmops.patch(ours)
    return ours, theirs


SIZES = [[[3, (4, 6), 2]], [[3, (2, 2), 1], [1, (6, 4), 2, (2, 4), 1]]]


def batches(family):
    if family in ("mllama", "llama4"):
        return [batch_of(family, "several_images")]
    return [inputs(family, rows) for rows in SIZES]


@every
def test_tokens_and_gradients_agree(family, fused):
    ours, theirs = pair(family)
    for batch in batches(family):
        found = []
        for model in (theirs, ours):
            fused.clear()
            model.zero_grad()
            with CountOps() as ran:
                out = embedded(model, family, batch, grad=True)
                out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((out, grads))
        assert (ran.counts[OP], ran.counts[BACKWARD], len(fused)) == (1, 1, 1)
        (expected, expected_grads), (got, grads) = found
        same(got, expected)
        assert grads.keys() == expected_grads.keys()
        assert len(grads) > 1
        for name, grad in expected_grads.items():
            same(grads[name], grad)
        taps = [p.index if p.index is None else p.index.shape[-1] for p in fused[0]["positions"]]
        assert taps == TOWERS[family][3]
        assert (fused[0]["norm"] is not None) == (family in WITH_NORM)


@every
def test_says_what_is_in_the_pass(family):
    model = made(family)
    rows = [row for row in vlmops.patch(model).rows if row.reason]
    assert [row.reason for row in rows] == [f"with {TOWERS[family][2]}"]
    assert vlmops.patch(model).rows[0].status == "already patched"


@every
def test_sixteen_bits_are_at_least_as_right(family, fused):
    ours, theirs = pair(family, torch.bfloat16)
    batch = batch_of(family, "several_images", torch.bfloat16)
    exact = copy.deepcopy(theirs).float()
    wide = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    fused.clear()
    expected = embedded(exact, family, wide)
    errors = [(embedded(m, family, batch).float() - expected).abs().max() for m in (ours, theirs)]
    assert len(fused) == 1
    assert errors[0] <= errors[1] + torch.finfo(torch.bfloat16).eps / 2 * expected.abs().max()


@every
def test_tables_that_change_are_used(family):
    """In place, by an optimizer, by way of .data, by another tensor: nothing is kept."""
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    embedded(ours, family, batch)
    for change in (
        lambda p: p.mul_(-2),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: setattr(p, "data", p.data + 1),
    ):
        with torch.no_grad():
            for model in (ours, theirs):
                for parameter in model.get_submodule(TOWERS[family][0]).parameters():
                    change(parameter)
        same(embedded(ours, family, batch), embedded(theirs, family, batch))


@every
def test_frozen_towers_are_not_differentiated(family):
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    tables = [n for n in TOWERS[family][2].split(", ") if n not in ("class_embedding",)]
    found = []
    for model in (ours, theirs):
        tower = model.get_submodule(TOWERS[family][0]).requires_grad_(False)
        assert not embedded(model, family, batch, grad=True).requires_grad
        part = getattr(tower, tables[-1])
        weights = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
        for weight in weights:
            weight.requires_grad_()
        embedded(model, family, batch, grad=True).square().sum().backward()
        found.append([weight.grad for weight in weights])
        convolution = next(
            m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Unfold)
        )
        assert all(p.grad is None for p in convolution.parameters())
    for our_grad, grad in zip(*found, strict=True):
        same(our_grad, grad)


# Modules between pixels and the first layer.
PARTS = [
    ("qwen3_vl", "patch_embed"), ("qwen3_vl", "patch_embed.proj"), ("qwen3_vl", "pos_embed"),
    ("glm4v", "patch_embed"), ("glm4v", "patch_embed.proj"), ("glm4v", "post_conv_layernorm"),
    ("glm4v", "embeddings"), ("glm4v", "embeddings.position_embedding"),
    ("mistral3", "patch_conv"), ("mistral3", "ln_pre"),
    ("mllama", "patch_embedding"), ("mllama", "pre_tile_positional_embedding"),
    ("mllama", "gated_positional_embedding"),
    ("mllama", "gated_positional_embedding.tile_embedding"),
    ("llama4", "patch_embedding"), ("llama4", "patch_embedding.linear"),
]  # fmt: skip


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(("family", "path"), PARTS, ids=" ".join)
def test_parts_that_are_watched_run_themselves(family, path, register, fused):
    """As hooks of PEFT, of offloading and of FSDP want it."""
    ours, theirs = pair(family)
    batch, seen = batch_of(family, "several_images"), []
    part = ours.get_submodule(TOWERS[family][0]).get_submodule(path)
    getattr(part, register)(lambda _, args, *__: seen.append(type(args[0])))
    fused.clear()
    same(embedded(ours, family, batch), embedded(theirs, family, batch))
    assert set(seen) <= {torch.Tensor, nn.Parameter}
    assert not fused


@pytest.mark.parametrize(("family", "path"), PARTS, ids=" ".join)
def test_parts_that_were_replaced_run_themselves(family, path, fused):
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    for model in (ours, theirs):
        part = model.get_submodule(TOWERS[family][0]).get_submodule(path)
        right = part.forward
        part.forward = lambda *args, right=right, **kwargs: 2 * right(*args, **kwargs)
    fused.clear()
    same(embedded(ours, family, batch), embedded(theirs, family, batch))
    assert not fused


@every
def test_autocast_and_inference_mode(family, fused):
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    fused.clear()
    with torch.inference_mode():
        same(embedded(ours, family, batch), embedded(theirs, family, batch))
    assert len(fused) == 1
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (embedded(m, family, batch) for m in (ours, theirs))
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert len(fused) == 1


@pytest.mark.parametrize("family", ["mistral3", "mllama"])
def test_defaults_of_the_caller_change_nothing(family, fused):
    """A default device and dtype are for the caller's own tensors."""
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    expected = embedded(theirs, family, batch)
    fused.clear()
    right = embedded(ours, family, batch)
    torch.set_default_dtype(torch.float64)
    try:
        same(embedded(ours, family, batch), right)
    finally:
        torch.set_default_dtype(torch.float32)
    same(right, expected)
    assert len(fused) == 2


@pytest.mark.parametrize("family", ["qwen3_vl", "llama4"])
def test_towers_compile(family, fused):
    """Their own forward, with the convolution's op; the compiler fuses sums itself."""
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(theirs, batch).logits
        ours.get_submodule(TOWERS[family][0]).compile(backend="eager")
        fused.clear()
        same(run(ours, batch).logits, expected)
    assert not fused


@every
def test_unpatch_copies_and_pickles(family, fused):
    ours, theirs = pair(family)
    batch = batch_of(family, "several_images")
    expected = embedded(theirs, family, batch)
    data = pickle.dumps(ours)
    assert b"vlmops" not in data
    fused.clear()
    for model, calls in ((copy.deepcopy(ours), 1), (pickle.loads(data), 0)):
        same(embedded(model, family, batch), expected)
        assert len(fused) == calls
        fused.clear()
    vlmops.unpatch(ours)
    assert torch.equal(embedded(ours, family, batch), expected)
    assert not fused
    assert not any(plain.original_class(m) for m in ours.modules())


def test_a_tower_that_is_rehearsed_wrongly_keeps_its_forward(monkeypatch):
    """Here, of a norm that is off."""
    monkeypatch.setattr(towers, "_studied", {})
    monkeypatch.setattr(towers, "rms_norm", lambda module: (1.0, 0.0))
    model = made("mistral3")
    (row,) = vlmops.patch(model).rows
    assert (row.status, row.reason) == ("patched", "")
    assert not plain.original_class(model.model.vision_tower)


def test_patches_whose_sums_are_out_of_reach_have_no_note():
    for family in ("qwen2_vl", "qwen2_5_vl"):
        assert [row.reason for row in vlmops.patch(build(family)).rows] == [""]


def test_udop_counts_what_runs():
    """Three convolutions: two share their weights, and the decoder's is given no pixels."""
    torch.manual_seed(0)
    config = transformers.UdopConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=99, image_size=16,
        patch_size=4,
    )  # fmt: skip
    model = transformers.UdopForConditionalGeneration(config).eval()
    ids = torch.randint(3, 99, (1, 5))
    given = {
        "input_ids": ids, "bbox": torch.rand(1, 5, 4), "pixel_values": torch.randn(1, 3, 16, 16),
        "decoder_input_ids": ids,
    }  # fmt: skip
    with torch.no_grad():
        expected = model(**given).logits
        for status in ("patched", "already patched"):
            report = vlmops.patch(model)
            assert report.counts == {"patch_embed": 1}
            assert sum(row.status == status for row in report.rows) == 2
            assert sum(row.status == "left alone" for row in report.rows) == 1
            with CountOps() as ran:
                same(model(**given).logits, expected)
            assert ran.counts[OP] == 1


# What is put off, function by function.

TABLE = torch.randn(36, 24, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(36, (2, 5), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(2))


def grid(t):
    return t.reshape(1, 6, 6, 24).permute(0, 3, 1, 2)


def sampled(t, mode="bicubic", align_corners=False):
    places = torch.rand(1, 7, 1, 2, generator=torch.Generator().manual_seed(3)) * 2.4 - 1.2
    return functional.grid_sample(
        grid(t), places, mode=mode, padding_mode="border", align_corners=align_corners
    )


FOLLOWED = {
    "itself": lambda t: t,
    "slices": lambda t: t[2:, :],
    "one": lambda t: t[3],
    "dots": lambda t: grid(t)[..., :4, 1:3],
    "reshape": lambda t: t.reshape(6, 6, -1),
    "view": lambda t: t.view(1, 36, 24),
    "flatten": lambda t: t.view(6, 6, 24).flatten(0, 1),
    "unsqueeze": lambda t: t.unsqueeze(0).unsqueeze(2),
    "squeeze": lambda t: t.view(36, 1, 24).squeeze(1),
    "squeeze_nothing": lambda t: t.squeeze(0),
    "transpose": lambda t: t.transpose(0, 1),
    "turned": lambda t: t.T,
    "unbind": lambda t: t.view(6, 6, 24).unbind(0)[2],
    "loop": lambda t: next(iter(t.view(6, 6, 24))),
    "cat": lambda t: torch.cat((t[:1], t[3:5]), dim=0),
    "embedding": lambda t: functional.embedding(IDS, t),
    "gate": lambda t: torch.full((1,), 0.3).tanh() * t,
    "scalar_gate": lambda t: t * torch.tensor(0.3),
    "weighted": lambda t: functional.embedding(IDS, t) * WEIGHTS,
    "taps": lambda t: (functional.embedding(IDS, t) * WEIGHTS).sum(1),
    "twice_weighted": lambda t: (WEIGHTS * (functional.embedding(IDS, t) * WEIGHTS)).sum(1),
    "to": lambda t: t.to(torch.float32).to(device="cpu"),
    "dropout": lambda t: functional.dropout(t, 0.5, training=False),
    "sampled": sampled,
    "sampled_corners": lambda t: sampled(t, align_corners=True),
    **{
        f"interpolated_{name}": lambda t, size=size, named=named: functional.interpolate(
            grid(t), size=size, **named
        )
        for name, size, named in (
            ("bicubic", (9, 7), {"mode": "bicubic", "align_corners": False}),
            ("bicubic_smaller", (3, 4), {"mode": "bicubic", "align_corners": False}),
            ("corners", (9, 7), {"mode": "bilinear", "align_corners": True}),
            ("antialiased", (4, 11), {"mode": "bilinear", "antialias": True}),
            ("nearest", (4, 11), {"mode": "nearest"}),
            ("square", 8, {"mode": "bicubic"}),
        )
    },
    "scaled": lambda t: functional.interpolate(grid(t), scale_factor=(1.5, 0.7), mode="bicubic"),
    "interpolated_with_a_class": lambda t: torch.cat(
        (
            t.unsqueeze(0)[:, :1],
            functional.interpolate(grid(t), size=(4, 5), mode="bicubic")
            .permute(0, 2, 3, 1)
            .view(1, 20, 24),
        ),
        dim=1,
    ),
}


def gathered(rows):
    """What rows stand for, by what they know."""
    weight = torch.ones(rows.taken.shape) if rows.weight is None else rows.weight
    found = (rows.table[rows.taken] * weight[..., None]).sum(-2)
    found = found if rows.scale is None else found * rows.scale
    return found.movedim(-1, rows.channel)


@pytest.mark.parametrize("name", FOLLOWED)
def test_rows_are_followed(name):
    expected, got = FOLLOWED[name](TABLE), FOLLOWED[name](pending.rows(TABLE))
    assert type(got) is Rows
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    torch.testing.assert_close(gathered(got), expected)
    assert torch.equal(pending.computed(got), expected)  # by the functions that were called


def test_wide_rows_are_split():
    """Mllama's: a row holds the positions of all tiles."""
    wide = TABLE.view(9, 96)
    got, expected = (
        functional.embedding(IDS % 9, t).reshape(2, 5, 4, 24) for t in (pending.rows(wide), wide)
    )
    assert type(got) is Rows
    assert torch.equal(gathered(got), expected)


NOT_FOLLOWED = {
    "sine": lambda t: t.sin(),
    "across_channels": lambda t: t.reshape(24, 36),
    "channels": lambda t: t[:, 3:7],
    "fancy": lambda t: t[IDS[0]],
    "every_other_channel": lambda t: t[..., ::2],
    "sum_of_channels": lambda t: t.sum(1),
    "sum_of_all": lambda t: t.sum(),
    "times_channels": lambda t: t * torch.arange(24.0),
    "other_tables": lambda t: torch.cat((t, torch.ones(2, 24)), dim=0),
    "half": lambda t: t.to(torch.int32),
    "dropout": lambda t: functional.dropout(t, 1.0),
    "many_taps": lambda t: functional.embedding(torch.zeros(2, 65, dtype=torch.long), t).sum(1),
    "bilinear": lambda t: sampled(t, "bilinear"),
    "requires_grad": lambda t: torch.tensor(t.requires_grad),
    "ids_out_of_range": lambda t: functional.embedding(torch.tensor([40]), t),
    "ids_below_zero": lambda t: functional.embedding(torch.tensor([-1]), t),
    "bad_view": lambda t: t.view(5, 7),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_anything_else_gets_values(name):
    def outcome(given):
        torch.manual_seed(0)
        try:
            return NOT_FOLLOWED[name](given)
        except (RuntimeError, IndexError) as error:
            return type(error), str(error)

    expected, got = outcome(TABLE), outcome(pending.rows(TABLE))
    assert not isinstance(got, Pending)
    assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


CONVOLUTION = nn.Conv2d(3, 24, 4, 4)
CLASS = torch.randn(24, generator=torch.Generator().manual_seed(4))


def sequence(x):
    return x.flatten(2).transpose(1, 2)


# Programs of patches [2, 24, 3, 5], the options of the op that come out.
PROGRAMS = {
    "sum": (lambda x: sequence(x) + TABLE[:15], {"positions": 1}),
    "sum_from_the_left": (lambda x: TABLE[:15] + sequence(x), {"positions": 1}),
    "one_row": (lambda x: sequence(x) + TABLE[:1], {"positions": 1}),
    "each_image": (lambda x: sequence(x) + TABLE[:30].view(2, 15, 24), {"positions": 1}),
    "each_row": (
        lambda x: x.permute(0, 2, 3, 1) + TABLE[:3].view(3, 1, 24),
        {"positions": 1},
    ),
    "two_sums": (lambda x: sequence(x) + TABLE[:15] + TABLE[15:30], {"positions": 2}),
    "first": (
        lambda x: torch.cat((CLASS.expand(2, 1, -1), sequence(x)), dim=1) + TABLE[:16],
        {"positions": 1, "prefix": 1},
    ),
    "last": (
        lambda x: torch.cat((sequence(x), CLASS.expand(2, 1, -1)), dim=1) + TABLE[:16],
        {"positions": 1, "prefix": 1, "prefix_last": True},
    ),
    "between": (
        lambda x: torch.cat((CLASS.expand(2, 1, -1), sequence(x) + TABLE[:15]), 1) + TABLE[:16],
        {"positions": 2, "prefix": 1},
    ),
    "layer_norm": (
        lambda x: functional.layer_norm(sequence(x), (24,), CLASS, eps=0.1) + TABLE[:15],
        {"positions": 1, "norm": "layer"},
    ),
    "packed": (
        lambda x: (
            torch.cat(
                [i[..., :h, :w].flatten(1).T for i, h, w in zip(x, (2, 3), (4, 1), strict=True)]
            )
            + TABLE[:11]
        ),
        {"positions": 1, "image_sizes": [(8, 16), (12, 4)]},
    ),
}


def put_off(program, x):
    ours = lambda: CONVOLUTION(x)  # noqa: E731
    with pending.putting_off(CONVOLUTION):
        got = program(pending.tokens(x, CONVOLUTION.weight, CONVOLUTION.bias, ours))
        return got, pending.computed(got)


@pytest.mark.parametrize("name", PROGRAMS)
def test_tokens_are_followed(name, fused):
    program, options = PROGRAMS[name]
    x = torch.randn(2, 3, 13, 20)
    with torch.no_grad():
        got, values = put_off(program, x)
        expected = program(CONVOLUTION(x))
    assert type(got) is Tokens
    same(values, expected)
    (call,) = fused
    found = {
        "positions": len(call["positions"]), "prefix": 0 if call["prefix"] is None else 1,
        **{name: call[name] for name in ("prefix_last", "norm", "image_sizes")},
    }  # fmt: skip
    default = {"positions": 0, "prefix": 0, "prefix_last": False, "norm": None, "image_sizes": None}
    assert found == {**default, **options}


UNKNOWN = {
    "scaled": lambda x: 2 * sequence(x),
    "doubled": lambda x: sequence(x) + sequence(x),
    "shifted": lambda x: sequence(x) + 1.0,
    "alpha": lambda x: torch.add(sequence(x), TABLE[:15], alpha=2),
    "broadcast": lambda x: sequence(x)[:, None] + TABLE[:30].view(2, 15, 24),
    "wide": lambda x: sequence(x) + TABLE[:15].double(),
    "own_token_each": lambda x: torch.cat((torch.ones(2, 1, 24).cumsum(0), sequence(x)), dim=1),
    "two_tokens": lambda x: torch.cat((CLASS.expand(2, 2, -1), sequence(x)), dim=1),
    "backwards": lambda x: torch.cat(tuple(reversed(sequence(x).unbind(0)))) + TABLE[:30],
    "columns": lambda x: x.transpose(2, 3).flatten(2).transpose(1, 2) + TABLE[:15],
    "norm_of_sums": lambda x: functional.layer_norm(sequence(x) + TABLE[:15], (24,)),
    "in_place": lambda x: sequence(x).clone().add_(TABLE[:15]),
    "assigned": lambda x: torch.zeros(2, 15, 24).copy_(sequence(x)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_op_cannot_say_is_computed(name):
    x = torch.randn(2, 3, 13, 20)
    with torch.no_grad():
        _, values = put_off(UNKNOWN[name], x)
        same(values, UNKNOWN[name](CONVOLUTION(x)))


def test_code_below_torch_is_told_what_to_do():
    """Where no function can be followed, an error, never wrong gradients."""
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match=r"vlmops\.unpatch"),
    ):
        torch.sin(pending.rows(TABLE))
