"""Connectors of `vlmops.nn`: equal to what papers and published code say, loops in float64."""

import math

import pytest
import torch
from dispatch import CountOps
from torch.nn import functional

import vlmops.nn
from vlmops.demo import connectors


def drawn(module):
    """With parameters that leave nothing out: norms and biases are not what they start as."""
    for name, p in module.named_parameters():
        if p.requires_grad:
            norm = name.rpartition(".")[0].lower().endswith(("norm", "ln_q", "ln_kv"))
            offset = 1.0 if norm and name.endswith("weight") else 0.0
            torch.nn.init.normal_(p, offset, 0.3)
    return module


def agrees(module, formula, inputs, **options):
    """Outputs and gradients against ``formula(weights, *inputs, **options)`` in float64."""
    weights = {n: t.detach().double() for n, t in module.state_dict().items()}
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    for name in named:
        weights[name].requires_grad_()
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    got, expected = module(*inputs, **options), formula(weights, *leaves, **options)
    got, expected = listed(got), listed(expected)
    assert [y.shape for y in got] == [y.shape for y in expected]
    wanted = [x for x in inputs if x is not None] + list(named.values())
    exact = [x for x in leaves if x is not None] + [weights[name] for name in named]
    upstream = [torch.randn_like(y) for y in got]
    grads = torch.autograd.grad(got, wanted, upstream, allow_unused=True)
    of_exact = torch.autograd.grad(
        expected, exact, [g.double() for g in upstream], allow_unused=True
    )
    for y, of in zip(got, expected, strict=True):
        torch.testing.assert_close(y.double(), of, rtol=1e-5, atol=2e-5)
    for g, of, like in zip(grads, of_exact, wanted, strict=True):
        g, of = (torch.zeros_like(like) if x is None else x for x in (g, of))
        torch.testing.assert_close(g.double(), of.double(), rtol=1e-4, atol=2e-4)
    return got


def listed(out):
    """The tensors that a module returned."""
    return [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]


def layer_norm(x, w, name, eps):
    x = x - x.mean()
    return x / (x.square().mean() + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attended(queries, keys, values, heads):
    """Of each query ``[C]`` and the keys that it sees, a head at a time."""
    outs = []
    for q in queries:
        of_heads = []
        for h, of_q in enumerate(q.chunk(heads)):
            if not keys:
                of_heads.append(torch.zeros_like(of_q))
                continue
            k, v = (torch.stack([x.chunk(heads)[h] for x in rows]) for rows in (keys, values))
            of_heads.append((k @ of_q / math.sqrt(len(of_q))).softmax(0) @ v)
        outs.append(torch.cat(of_heads))
    return outs


def rows_of(x, batch):
    return x.expand(batch, *x.shape[1:])


def which(mask, lengths, shape):
    """What of rows of tokens exists."""
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.clone()
    if lengths is not None:
        seen &= torch.arange(shape[1]) < lengths[:, None]
    return seen


# The Q-Former.

C, C_V, HEADS = 16, 24, 2


def blip2(w, queries, visual=None, text=None, *, text_mask=None, visual_mask=None,
          visual_lengths=None, eps=1e-12):  # fmt: skip
    """BERT's layer, a row of the batch and a token at a time."""

    def dense(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def block(name, x, seen):
        q, k, v = (
            [dense(f"{name}.attention.{part}", t) for t in of]
            for part, of in (("query", x), ("key", seen), ("value", seen))
        )
        return [
            layer_norm(dense(f"{name}.output.dense", a) + t, w, f"{name}.output.LayerNorm", eps)
            for a, t in zip(attended(q, k, v, HEADS), x, strict=True)
        ]

    def feed_forward(suffix, t):
        hidden = functional.gelu(dense(f"intermediate{suffix}.dense", t))
        name = f"output{suffix}"
        return layer_norm(dense(f"{name}.dense", hidden) + t, w, f"{name}.LayerNorm", eps)

    cross = "crossattention.output.dense.weight" in w
    given = [queries, text] + [visual] * cross
    batch = max(len(x) for x in given if x is not None)
    outs, texts = [], []
    for b in range(batch):
        y = list(rows_of(queries, batch)[b])
        t = [] if text is None else list(text[b])
        exists = which(text_mask, None, (batch, len(t)))[b].tolist()
        among = y + [x for x, there in zip(t, exists, strict=True) if there]
        y, t = block("attention", y, among), block("attention", t, among)
        if cross:
            seen = which(visual_mask, visual_lengths, visual.shape[:2])[b]
            y = block("crossattention", y, list(visual[b][seen]))
        outs.append(torch.stack([feed_forward("_query", x) for x in y]))
        texts += [feed_forward("", x) for x in t]
    if text is None:
        return torch.stack(outs)
    return torch.stack(outs), torch.stack(texts).view(text.shape) if texts else text


def qformer(cross=True, text=True, **options):
    made = vlmops.nn.QFormerLayer(
        C, C_V if cross else None, num_heads=HEADS, intermediate_size=20, text=text, **options
    )
    return drawn(made)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("text", ["none", "whole", "padded", "empty"])
@pytest.mark.parametrize("cross", [True, False])
def test_qformer_layer_is_what_the_paper_says(cross, text, rows):
    """Among the padded instructions is one without tokens."""
    layer = qformer(cross, text != "none")
    queries, visual = torch.randn(rows, 4, C), torch.randn(3, 6, C_V)
    words = None if text == "none" else torch.randn(3, 0 if text == "empty" else 5, C)
    options = {}
    if text == "padded":
        options["text_mask"] = torch.arange(5) < torch.tensor([[5], [2], [0]])
    if cross and text == "padded":
        options["visual_lengths"] = torch.tensor([6, 0, 3])
    elif cross and text == "none":
        options["visual_mask"] = torch.rand(3, 6) < 0.5
    out = agrees(layer, blip2, [queries, visual if cross else None, words], **options)
    one = not cross and words is None
    assert out[0].shape == (rows if one else 3, 4, C)


def test_what_does_not_exist_is_not_read():
    layer = qformer()
    queries, visual, text = torch.randn(1, 4, C), torch.randn(2, 6, C_V), torch.randn(2, 5, C)
    masks = {
        "text_mask": torch.tensor([[True] * 3 + [False] * 2, [False] * 5]),
        "visual_mask": torch.rand(2, 6) < 0.5,
    }
    out, words = layer(queries, visual, text, **masks)
    other, others = layer(
        queries,
        visual.masked_fill(~masks["visual_mask"][..., None], 7.0),
        text.masked_fill(~masks["text_mask"][..., None], -7.0),
        **masks,
    )
    assert torch.equal(out, other)
    assert torch.equal(words[0, :3], others[0, :3])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", ["blip_2", "instructblip"])
def test_qformer_layer_takes_checkpoints_of_transformers(family, index):
    """Names, and what comes of them, with an instruction of which a part is padding."""
    if family == "blip_2":
        from transformers.models.blip_2 import modeling_blip_2 as modeling

        config, kind = modeling.Blip2QFormerConfig, modeling.Blip2QFormerLayer
    else:
        from transformers.models.instructblip import modeling_instructblip as modeling

        config, kind = modeling.InstructBlipQFormerConfig, modeling.InstructBlipQFormerLayer
    made = config(
        hidden_size=C, num_attention_heads=HEADS, intermediate_size=20, encoder_hidden_size=C_V,
        cross_attention_frequency=2,
    )  # fmt: skip
    made.use_qformer_text_input = True
    made._attn_implementation = "eager"
    theirs = drawn(kind(made, index)).eval()
    ours = vlmops.nn.QFormerLayer(
        C, C_V if index == 0 else None, num_heads=HEADS, intermediate_size=20, text=True
    )
    ours.load_state_dict(theirs.state_dict())
    queries, text, visual = torch.randn(2, 4, C), torch.randn(2, 5, C), torch.randn(2, 6, C_V)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    added = functional.pad((~mask).float() * torch.finfo(torch.float32).min, (4, 0))
    expected = theirs(torch.cat((queries, text), 1), added[:, None, None], visual, query_length=4)
    got = torch.cat(ours(queries, visual, text, text_mask=mask), 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_queries_of_one_row_are_computed_once(monkeypatch):
    """And nothing is split off or concatenated."""
    ran = []
    attention = vlmops.nn.qformer.qformer_attention

    def spy(q, *args, **kwargs):
        ran.append(len(q))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(vlmops.nn.qformer, "qformer_attention", spy)
    queries, visual, text = torch.randn(1, 4, C), torch.randn(3, 6, C_V), torch.randn(3, 5, C)
    with CountOps() as counted:
        qformer(text=False)(queries, visual)
        qformer()(queries, visual, text)
    assert ran == [1, 1, 3]
    assert not {"aten::cat", "aten::split", "aten::stack"} & set(counted.counts)


# The perceiver resampler.


def flamingo(w, media, *, frame_mask=None, token_lengths=None, heads=2, activation=None, eps=1e-5):
    """Figure 5 of the paper, with OpenFlamingo's norms, a medium and a token at a time."""
    activation = activation or functional.gelu
    samples, count, frames, tokens = media.shape[:4]
    depth = sum(name.endswith("to_q.weight") for name in w)

    def heads_normed(name, x):
        if f"{name}.weight" not in w:
            return x
        return torch.cat([layer_norm(of, w, name, eps) for of in x.chunk(heads)])

    outs = []
    for b in range(samples):
        for m in range(count):
            x = []
            for f in range(frames):
                for t in range(tokens):
                    token = media[b, m, f, t]
                    if "frame_embs" in w:
                        token = token + w["frame_embs"][f]
                    if "media_time_embs" in w:
                        token = token + w["media_time_embs"][m, 0]
                    there = frame_mask is None or frame_mask[b, m, f]
                    if there and (token_lengths is None or f * tokens + t < token_lengths[b, m]):
                        x.append(token)
            y = list(w["latents"])
            for i in range(depth):
                at = f"layers.{i}."
                latents = [layer_norm(t, w, at + "0.norm_latents", eps) for t in y]
                seen = [layer_norm(t, w, at + "0.norm_media", eps) for t in x] + latents
                q = [
                    heads_normed(at + "0.q_layer_norm", w[at + "0.to_q.weight"] @ t)
                    for t in latents
                ]
                of_k, of_v = w[at + "0.to_kv.weight"].chunk(2)
                k = [heads_normed(at + "0.k_layer_norm", of_k @ t) for t in seen]
                out = attended(q, k, [of_v @ t for t in seen], heads)
                y = [t + w[at + "0.to_out.weight"] @ a for t, a in zip(y, out, strict=True)]
                hidden = [w[at + "1.1.weight"] @ layer_norm(t, w, at + "1.0", eps) for t in y]
                y = [
                    t + w[at + "1.3.weight"] @ activation(h) for t, h in zip(y, hidden, strict=True)
                ]
            outs.append(torch.stack([layer_norm(t, w, "norm", eps) for t in y]))
    return torch.stack(outs).view(samples, count, *w["latents"].shape)


RESAMPLERS = {
    "plain": {},
    "videos": {"max_num_frames": 4, "max_num_media": 3},
    "norms": {"qk_norm": True, "max_num_frames": 3},
}


def resampler(name="plain", depth=2, **options):
    options = {"num_heads": 2, "head_dim": 8, "num_latents": 3} | RESAMPLERS[name] | options
    return drawn(vlmops.nn.PerceiverResampler(12, depth=depth, **options))


@pytest.mark.parametrize("missing", ["nothing", "frames", "tokens"])
@pytest.mark.parametrize("name", RESAMPLERS)
def test_perceiver_resampler_is_what_the_paper_says(name, missing):
    """Some media have less than others, one sample has none at all."""
    frames = torch.tensor([[[1, 1, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    options = {
        "nothing": {},
        "frames": {"frame_mask": frames},
        "tokens": {"token_lengths": torch.tensor([[6, 3], [0, 0]])},
    }[missing]
    media = torch.randn(2, 2, 3, 2, 12)
    (out,) = agrees(resampler(name), flamingo, [media], **options)
    if missing != "nothing":
        assert torch.equal(out[1, 0], out[1, 1]), "media of which nothing exists"


def test_perceiver_resampler_does_not_read_what_does_not_exist():
    module, media = resampler("videos"), torch.randn(2, 2, 3, 2, 12)
    frames = torch.rand(2, 2, 3) < 0.5
    frames[1] = False
    poisoned = media.masked_fill(~frames[..., None, None], 1e4)
    out = module(media, frame_mask=frames)
    assert torch.equal(out, module(poisoned, frame_mask=frames))
    alone = module(media, token_lengths=torch.zeros(2, 2, dtype=torch.int32))
    torch.testing.assert_close(out[1], alone[1])
    assert module(media[:, :0]).shape == (2, 0, 3, 12)


@pytest.mark.parametrize("activation", ["relu", "squared_relu"])
def test_perceiver_resampler_with_other_activations(activation):
    def of_paper(x):
        return functional.relu(x) ** (1 if activation == "relu" else 2)

    def formula(w, media):
        return flamingo(w, media, activation=of_paper)

    agrees(resampler(activation=activation), formula, [torch.randn(1, 2, 1, 5, 12)])


@pytest.mark.parametrize("norms", [True, False])
def test_perceiver_resampler_takes_idefics_checkpoints(norms):
    from transformers.models.idefics.configuration_idefics import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(
        vision_config={"embed_dim": 12}, perceiver_config={"qk_layer_norms_perceiver": norms}
    )
    theirs = drawn(IdeficsPerceiverResampler(config, 12, 2, 2, 8, 3))
    ours = resampler(qk_norm=norms, activation="relu")
    ours.load_state_dict(vlmops.nn.PerceiverResampler.from_idefics(theirs.state_dict()))
    images = torch.randn(2, 7, 12)
    got = ours(images[:, None, None])
    torch.testing.assert_close(got[:, 0], theirs(images), rtol=1e-4, atol=1e-4)


def test_perceiver_resampler_has_the_published_names():
    names = {"latents", "frame_embs", "media_time_embs", "norm.weight", "norm.bias"}
    for i in range(2):
        attention = ("to_q", "to_kv", "to_out")
        names |= {f"layers.{i}.0.{part}.weight" for part in attention}
        names |= {f"layers.{i}.1.{part}.weight" for part in (1, 3)}
        for norm in ("0.norm_media", "0.norm_latents", "1.0"):
            names |= {f"layers.{i}.{norm}.{end}" for end in ("weight", "bias")}
    module = resampler("videos")
    assert module.state_dict().keys() == names
    assert module.media_time_embs.shape == (3, 1, 12)


# Qwen-VL's resampler.


def cubic(t, a=-0.75):
    """Keys' kernel, that of torch's bicubic interpolation."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def placed(table, side, rows, columns):
    """A square table on another grid, one place at a time: four by four neighbours, clamped."""
    if (rows, columns) == (side, side):
        return list(table)
    outs = []
    for i in range(rows):
        for j in range(columns):
            y, x = ((n + 0.5) * side / of - 0.5 for n, of in ((i, rows), (j, columns)))
            out = 0
            for y_near in range(math.floor(y) - 1, math.floor(y) + 3):
                for x_near in range(math.floor(x) - 1, math.floor(x) + 3):
                    row, column = (min(max(n, 0), side - 1) for n in (y_near, x_near))
                    weight = cubic(y - y_near) * cubic(x - x_near)
                    out = out + weight * table[row * side + column]
            outs.append(out)
    return outs


def qwen_vl(w, visual, *, grid=None, visual_mask=None, visual_lengths=None, heads=2, eps=1e-6):
    """Section 2.1, a query and a token at a time."""
    count = visual.shape[1]
    grid = grid or (math.isqrt(count),) * 2
    places = placed(w["pos_embed"], math.isqrt(len(w["query"])), *grid)
    of, bias = w["attn.in_proj_weight"].chunk(3), w["attn.in_proj_bias"].chunk(3)
    exists = which(visual_mask, visual_lengths, visual.shape[:2])
    outs = []
    for b in range(len(visual)):
        q = [
            of[0] @ (layer_norm(query, w, "ln_q", eps) + place) + bias[0]
            for query, place in zip(w["query"], w["pos_embed"], strict=True)
        ]
        keys, values = [], []
        for token, place, there in zip(visual[b], places, exists[b].tolist(), strict=True):
            if "kv_proj.weight" in w:
                token = w["kv_proj.weight"] @ token
            token = layer_norm(token, w, "ln_kv", eps)
            if there:
                keys.append(of[1] @ (token + place) + bias[1])
                values.append(of[2] @ token + bias[2])
        out = attended(q, keys, values, heads)
        weight, last = w["attn.out_proj.weight"], w["attn.out_proj.bias"]
        outs.append(torch.stack([weight @ x + last for x in out]))
    return torch.stack(outs)


def qwen(visual_size=20, **options):
    return drawn(vlmops.nn.QwenVLResampler(visual_size, 16, grid_size=3, num_heads=2, **options))


@pytest.mark.parametrize("grid", [(3, 3), (5, 5), (2, 4)])
@pytest.mark.parametrize("exist", ["all", "mask", "lengths"])
def test_qwen_vl_resampler_is_what_the_paper_says(grid, exist):
    count = grid[0] * grid[1]
    visual = torch.randn(3, count, 20)
    options = {
        "all": {},
        "mask": {"visual_mask": torch.rand(3, count) < 0.5},
        "lengths": {"visual_lengths": torch.tensor([count, 0, 3], dtype=torch.int32)},
    }[exist]
    if grid[0] != grid[1]:
        options["grid"] = grid
    agrees(qwen(), qwen_vl, [visual], **options)


def test_qwen_vl_resampler_without_a_projection():
    module = qwen(16)
    assert "kv_proj.weight" not in module.state_dict()
    agrees(module, qwen_vl, [torch.randn(1, 4, 16)])


def test_qwen_vl_positions_are_sines_of_columns_then_rows():
    table = vlmops.nn.QwenVLResampler(16, 16, grid_size=3, num_heads=2).pos_embed
    assert not table.requires_grad
    for row in range(3):
        for column in range(3):
            for c in range(16):
                place = column if c < 8 else row
                angle = place / 10000 ** ((c % 4) / 4)
                value = math.sin(angle) if c % 8 < 4 else math.cos(angle)
                assert abs(table[row * 3 + column, c].item() - value) < 1e-6


def test_qwen_vl_resampler_is_torchs_attention_with_the_published_names():
    """Under the names and shapes of ``torch.nn.MultiheadAttention``, which the checkpoints have."""
    module = qwen()
    names = {"query", "pos_embed", "kv_proj.weight"}
    names |= {f"{norm}.{end}" for norm in ("ln_q", "ln_kv") for end in ("weight", "bias")}
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    names |= {f"attn.{name}" for name in attention.state_dict()}
    assert module.state_dict().keys() == names
    attention.load_state_dict(module.attn.state_dict())
    visual = torch.randn(2, 9, 20)
    x = module.ln_kv(module.kv_proj(visual))
    q = (module.ln_q(module.query) + module.pos_embed).expand(2, -1, -1)
    expected, _ = attention(q, x + module.pos_embed, x)
    torch.testing.assert_close(module(visual), expected, rtol=1e-4, atol=1e-5)


# What all have in common.

MODULES = {
    "qformer": (
        qformer,
        lambda: (torch.randn(1, 4, C), torch.randn(2, 6, C_V), torch.randn(2, 5, C)),
    ),
    "perceiver": (lambda: resampler("norms"), lambda: (torch.randn(2, 2, 3, 2, 12),)),
    "qwen_vl": (qwen, lambda: (torch.randn(2, 16, 20),)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def summed(out):
    return sum(y.square().sum() for y in listed(out))


def close(got, exact, dtype):
    for y, of in zip(listed(got), listed(exact), strict=True):
        tolerance = 16 * torch.finfo(dtype).eps * of.abs().max().item()
        torch.testing.assert_close(y.float(), of, rtol=0, atol=tolerance)


@every_module
def test_all_parameters_learn(name):
    make, inputs = MODULES[name]
    module = make()
    summed(module(*inputs())).backward()
    for of, p in module.named_parameters():
        assert not p.requires_grad or p.grad.abs().sum() > 0, of


@every_module
def test_connectors_compile_to_one_graph(name):
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), module(*given))


@pytest.mark.parametrize(
    "make",
    [
        lambda **made: vlmops.nn.QFormerLayer(text=True, **made),
        lambda **made: vlmops.nn.PerceiverResampler(64, max_num_frames=2, qk_norm=True, **made),
        vlmops.nn.QwenVLResampler,
    ],
)
def test_connectors_are_made_where_they_are_wanted(make):
    module = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_module
def test_connectors_in_16_bits(name, dtype):
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    exact = module(*given)
    got = module.to(dtype)(*(x.to(dtype) for x in given))
    close(got, exact, dtype)
    assert all(y.dtype == dtype for y in listed(got))


@every_module
def test_connectors_under_autocast(name):
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    exact = module(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*given)
    close(got, exact, torch.bfloat16)


@every_module
def test_layers_that_somebody_watches_are_called(name):
    """Hooks run, and an adapter's layer in place of a linear one does its work."""
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    before = summed(module(*given))
    linears = [m for m in module.modules() if type(m) is torch.nn.Linear]
    if name == "qwen_vl":
        linears = [module.kv_proj, module.attn.out_proj]
    seen = []
    for layer in linears:
        layer.register_forward_hook(lambda m, args, out: seen.append(m))
    torch.testing.assert_close(summed(module(*given)), before)
    assert set(seen) == set(linears)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vlmops.nn.QFormerLayer(20, num_heads=2), r"QFormerLayer: hidden_size: .* got 20"),
        (lambda: vlmops.nn.QFormerLayer(activation="swish"), r"activation: .* got 'swish'"),
        (lambda: resampler(activation="swish"), r"activation: .* got 'swish'"),
        (lambda: resampler(head_dim=12), r"head_dim: expected a multiple of 8 .* got 12"),
        (lambda: resampler(depth=0), r"depth: expected 1 or more, got 0"),
        (lambda: vlmops.nn.QwenVLResampler(8, 40, num_heads=4), r"hidden_size: .* got 40"),
    ],
)
def test_connectors_refuse_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


QUERIES, VISUAL, TEXT, MEDIA, TOKENS = (
    torch.zeros(shape)
    for shape in ((1, 4, C), (3, 6, C_V), (3, 5, C), (2, 2, 3, 2, 12), (2, 16, 20))
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qformer()(QUERIES[0], VISUAL), r"queries: expected shape \[B, Q, 16\], got \[4"),
        (lambda: qformer()(QUERIES.double(), VISUAL), r"queries: expected torch.float32, got .*64"),
        (lambda: qformer()(QUERIES), r"visual_states: expected a tensor, .* got None"),
        (lambda: qformer()(QUERIES, VISUAL[:, :0]), r"visual_states: expected at least one token"),
        (
            lambda: qformer()(QUERIES.expand(2, -1, -1), VISUAL),
            r"visual_states: expected shape \[2, S, 24\], got \[3, 6, 24\]",
        ),
        (
            lambda: qformer()(QUERIES, VISUAL, visual_mask=torch.ones(3, 5, dtype=torch.bool)),
            r"visual_mask: expected torch.bool of shape \[3, 6\], got torch.bool of shape \[3, 5\]",
        ),
        (
            lambda: qformer()(QUERIES, VISUAL, visual_lengths=torch.ones(3)),
            r"visual_lengths: expected torch.int32 or torch.int64 of shape \[3\], got torch.fl",
        ),
        (lambda: qformer(text=False)(QUERIES, VISUAL, TEXT), r"text_states: expected None"),
        (
            lambda: qformer()(QUERIES.expand(3, -1, -1), VISUAL, TEXT[:1]),
            r"text_states: expected shape \[3, T, 16\], got \[1, 5, 16\]",
        ),
        (
            lambda: qformer()(QUERIES, VISUAL, TEXT, text_mask=torch.ones(3, 5)),
            r"text_mask: expected torch.bool of shape \[3, 5\], got torch.float32",
        ),
        (
            lambda: qformer()(QUERIES, VISUAL, text_mask=torch.ones(3, 5, dtype=torch.bool)),
            r"text_mask: expected None, as there are no text_states, got shape \[3, 5\]",
        ),
        (lambda: resampler()(MEDIA[0]), r"media: expected shape \[B, T, F, v, 12\], got \[2, 3"),
        (lambda: resampler()(MEDIA[:, :, :, :0]), r"media: expected at least one token of each"),
        (
            lambda: resampler("videos")(MEDIA.expand(-1, -1, 3, -1, -1).repeat(1, 1, 2, 1, 1)),
            r"media: expected up to 4 frames, as max_num_frames says, got 6",
        ),
        (
            lambda: resampler("videos")(MEDIA.repeat(1, 2, 1, 1, 1)),
            r"media: expected up to 3 media, as max_num_media says, got 4",
        ),
        (
            lambda: resampler()(MEDIA, frame_mask=torch.ones(2, 3, dtype=torch.bool)),
            r"frame_mask: expected torch.bool of shape \[2, 2, 3\], got .* of shape \[2, 3\]",
        ),
        (
            lambda: resampler()(MEDIA, token_lengths=torch.ones(2, dtype=torch.int64)),
            r"token_lengths: expected .* of shape \[2, 2\], got torch.int64 of shape \[2\]",
        ),
        (lambda: qwen()(TOKENS[..., :8]), r"visual_states: expected shape \[B, S, 20\], got"),
        (lambda: qwen()(TOKENS[:, :15]), r"grid: .* tokens of visual_states, 15, got 3 x 3"),
        (lambda: qwen()(TOKENS, grid=(2, 9)), r"grid: .* tokens of visual_states, 16, got 2 x 9"),
        (lambda: qwen()(TOKENS[:, :0]), r"grid: .* tokens of visual_states, 0, got 0 x 0"),
        (
            lambda: qwen()(TOKENS, visual_mask=torch.ones(2, 9, dtype=torch.bool)),
            r"visual_mask: expected torch.bool of shape \[2, 16\]",
        ),
        (
            lambda: qwen()(TOKENS, visual_lengths=torch.ones(3, dtype=torch.int64)),
            r"visual_lengths: expected .* of shape \[2\], got torch.int64 of shape \[3\]",
        ),
    ],
)  # fmt: skip
def test_connectors_name_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The example.


@pytest.mark.parametrize("connector", connectors.CONNECTORS)
def test_example_learns_by_each_connector(connector):
    """Chance is the best without looking at the picture."""
    parameters, before, after = connectors.train(connector)
    assert parameters > 0
    assert before > 1.9
    assert after < 1.6 < math.log(connectors.KINDS)


def test_example_says_what_it_found(capsys):
    assert connectors.main(["--connector", "linear", "--steps", "5"]) == 0
    out, err = capsys.readouterr()
    head, row = out.splitlines()
    assert head.endswith("before   after  loss (5 steps; chance: 2.08)")
    name, parameters, before, after = row.split()
    assert (name, int(parameters.replace(",", ""))) == ("linear", 48 * 64 + 64)
    assert float(after) < float(before)
    assert err == ""
    assert connectors.main(["--connector", "mlp", "--steps", "0"]) == 1
    assert capsys.readouterr().err == "the loss did not fall with mlp; try more --steps\n"
