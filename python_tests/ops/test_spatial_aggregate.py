"""The spatial aggregation and its modules: what is special to them beside the contract."""

import contextlib

import pytest
import torch
from dispatch import CountOps
from emulator.build import emulated
from testbed import TESTED_ISAS, extra_memory, reads_proc
from torch.nn import functional

import vlmops
import vlmops.nn
from vlmops.ops.spatial_aggregate import reference
from vlmops.ops.spatial_aggregate_spec import peers

BACKENDS = [*TESTED_ISAS, "emulator"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def on(use_cpu_isa):
    def enter(backend):
        if backend == "emulator":
            return emulated("checked")
        use_cpu_isa(backend)
        return contextlib.nullcontext()

    return enter


def maps(grid, windows, heads, dim, batch=1, dtype=torch.float32):
    """Keys and values."""
    shapes = [(batch, grid[0] * h, grid[1] * w, heads, dim) for h, w in windows]
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(dtype) for s in shapes]


def test_reference_is_a_loop_over_queries():
    """Written down again from the paper: each query, its own tokens, one softmax."""
    grid, windows, scale = (2, 3), ((1, 2), (3, 1)), 0.3
    q = torch.randn(2, *grid, 2, 8, dtype=torch.float64)
    keys, values = maps(grid, windows, 2, 8, batch=2, dtype=torch.float64)
    masks = [None, torch.rand(2, 6, 3) < 0.5]
    expected = torch.zeros_like(q)
    for b, y, x, h in torch.cartesian_prod(*map(torch.arange, (2, *grid, 2))).tolist():
        seen = []
        for k, v, mask, (m_h, m_w) in zip(keys, values, masks, windows, strict=True):
            for i in range(y * m_h, (y + 1) * m_h):
                for j in range(x * m_w, (x + 1) * m_w):
                    if mask is None or mask[b, i, j]:
                        seen.append((k[b, i, j, h], v[b, i, j, h]))
        if seen:
            k, v = (torch.stack(rows) for rows in zip(*seen, strict=True))
            expected[b, y, x, h] = (k @ q[b, y, x, h] * scale).softmax(0) @ v
    torch.testing.assert_close(reference(q, keys, values, masks=masks, scale=scale), expected)


def test_fused_attention_on_copies_agrees():
    """What `vlmops bench` times against."""
    q = torch.randn(1, 2, 2, 2, 16)
    keys, values = maps((2, 2), ((1, 1), (2, 2)), 2, 16)
    args = {"q": q, "scale": None} | {f"mask_{i}": None for i in range(4)}
    for i in range(4):
        args[f"key_{i}"] = keys[i] if i < 2 else None
        args[f"value_{i}"] = values[i] if i < 2 else None
    (got,) = peers(args)["sdpa"](**args)
    torch.testing.assert_close(got, vlmops.spatial_aggregate(q, keys, values))


@every_backend
def test_queries_without_tokens_and_tokens_that_do_not_exist(on, backend):
    grid, windows = (2, 2), ((1, 1), (2, 3))
    q, grad = torch.randn(2, 1, *grid, 2, 16)
    keys, values = maps(grid, windows, 2, 16)
    masks = [torch.rand(1, 2, 2) < 0.5, torch.rand(1, 4, 6) < 0.5]
    masks[0][:, 0, 1] = masks[1][:, :2, 3:] = False  # all of query (0, 1)'s
    masks[0][:, 0, 0] = masks[1][:, :2, :3] = True
    poisoned = [
        [x.masked_fill(~m[..., None, None], float("nan")) for x, m in zip(of, masks, strict=True)]
        for of in (keys, values)
    ]
    needs = [1] * 5
    with on(backend):
        out = vlmops.spatial_aggregate(q, *poisoned, masks=masks)
        clean = vlmops.spatial_aggregate(q, keys, values, masks=masks)
        of = torch.ops.vlmops.spatial_aggregate_backward(grad, needs, q, *poisoned, masks)
        of_clean = torch.ops.vlmops.spatial_aggregate_backward(grad, needs, q, keys, values, masks)
    assert torch.equal(out, clean)
    assert (out[:, 0, 1] == 0).all()
    assert (out[:, 0, 0] != 0).all()
    for a, b in zip(of, of_clean, strict=True):
        assert torch.equal(a, b)
    assert (of[0][:, 0, 1] == 0).all()
    for g, mask in zip(of[1:], masks * 2, strict=True):
        assert (g[~mask] == 0).all()
        assert (g[mask] != 0).any()


@every_backend
def test_one_token_is_the_result_and_logits_get_no_gradient(on, backend):
    q, grad = torch.randn(2, 1, 3, 2, 2, 24).bfloat16()
    (key,), (value,) = maps((3, 2), ((1, 1),), 2, 24, dtype=torch.bfloat16)
    with on(backend):
        out = vlmops.spatial_aggregate(q, [key], [value])
        of_q, of_key, of_value = torch.ops.vlmops.spatial_aggregate_backward(
            grad, [1] * 3, q, [key], [value], []
        )
    assert torch.equal(out, value)
    assert torch.equal(of_value, grad)
    assert (of_q == 0).all()
    assert (of_key == 0).all()


@every_backend
def test_eight_encoders_and_a_thousand_tokens(on, backend):
    """As many as there may be; heads of several blocks on the CPU."""
    grid, windows = (1, 1), ((16, 16), (16, 16), (16, 16), (3, 5), (1, 1), (16, 14), (2, 2), (2, 6))
    assert sum(h * w for h, w in windows) == 1024
    q, grad = torch.randn(2, 1, *grid, 17, 8)
    keys, values = maps(grid, windows, 17, 8)
    args = (q, keys, values, [])
    with on(backend):
        out = vlmops.spatial_aggregate(q, keys, values)
        grads = torch.ops.vlmops.spatial_aggregate_backward(grad, [1] * 17, *args)
    leaves = [t.double().requires_grad_() for t in (q, *keys, *values)]
    exact = reference(leaves[0], leaves[1:9], leaves[9:])
    expected = torch.autograd.grad(exact, leaves, grad.double())
    for got, of in zip((out, *grads), (exact, *expected), strict=True):
        torch.testing.assert_close(got.double(), of, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", TESTED_ISAS)
def test_heads_threads_and_masks_change_no_bit(use_cpu_isa, isa, dtype):
    """Gradients too, those of a call large enough to be shared and written past the caches."""
    use_cpu_isa(isa)
    grid, windows, heads = (6, 6), ((1, 1), (6, 6)), 12
    q, grad = torch.randn(2, 2, *grid, heads, 128).to(dtype)
    keys, values = maps(grid, windows, heads, 128, batch=2, dtype=dtype)
    needs = [1] * 5
    assert keys[1].nbytes >= 8 << 20 or dtype != torch.float32

    def run(part=slice(None), masks=()):
        k, v = ([x[:, :, :, part] for x in of] for of in (keys, values))
        args = (q[:, :, :, part], k, v, list(masks))
        out = torch.ops.vlmops.spatial_aggregate(*args)
        return [
            out,
            *torch.ops.vlmops.spatial_aggregate_backward(grad[:, :, :, part], needs, *args),
        ]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    first = run()
    torch.set_num_threads(2)
    second = run(masks=[torch.ones(x.shape[:3], dtype=torch.bool) for x in keys])
    halves = [torch.cat(h, 3) for h in zip(run(slice(5)), run(slice(5, None)), strict=True)]
    torch.set_num_threads(threads)
    for a, b, c in zip(first, second, halves, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("wanted", ["q", "keys[1]", "values[0]"])
@every_backend
def test_computes_what_is_needed(on, backend, wanted):
    q = torch.randn(1, 2, 2, 2, 16)
    keys, values = maps((2, 2), ((1, 1), (2, 2)), 2, 16)
    tensors = {"q": q, "keys[0]": keys[0], "keys[1]": keys[1], "values[0]": values[0],
               "values[1]": values[1]}  # fmt: skip
    grad = torch.randn_like(q)
    with on(backend):
        everything = torch.ops.vlmops.spatial_aggregate_backward(grad, [1] * 5, q, keys, values, [])
        tensors[wanted].requires_grad_()
        with CountOps() as ran:
            out = vlmops.spatial_aggregate(q, keys, values)
            (got,) = torch.autograd.grad(out, tensors[wanted], grad)
    names = list(tensors)
    assert torch.equal(got, everything[names.index(wanted)])
    (_, given, _) = ran.calls[-1]
    assert list(given[1]) == [int(name == wanted) for name in names]


def test_saves_its_arguments_alone():
    q = torch.randn(1, 2, 2, 2, 16, requires_grad=True)
    keys, values = maps((2, 2), ((1, 1), (2, 2)), 2, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vlmops.spatial_aggregate(q, keys, values)
    given = {t.data_ptr() for t in (q, *keys, *values)}
    assert {t.data_ptr() for t in kept} == given


def test_backward_refuses_needs_that_do_not_fit():
    q = torch.randn(1, 1, 1, 1, 8)
    for op in ("spatial_aggregate_backward", "spatial_aggregate_triton_backward"):
        with pytest.raises(RuntimeError, match=r"needs: expected 3, one for q, .*, got 2"):
            getattr(torch.ops.vlmops, op)(q, [1, 1], q, [q], [q], [])
        with pytest.raises(RuntimeError, match=r"grad: expected shape \[1, 1, 1, 1, 8\]"):
            getattr(torch.ops.vlmops, op)(q[0], [1] * 3, q, [q], [q], [])


@reads_proc
def test_copies_no_window_and_no_map():
    q = torch.randn(1, 24, 24, 4, 64)
    fused = [torch.randn(1, side, side, 2, 4, 64) for side in (24, 96)]
    keys, values = zip(*(x.unbind(3) for x in fused), strict=True)
    grown, largest = extra_memory(lambda: vlmops.spatial_aggregate(q, keys, values))
    assert largest == q.nbytes
    assert grown < 2 * q.nbytes
    args = (q, [1, *[0] * 4], q, list(keys), list(values), [])
    call = torch.ops.vlmops.spatial_aggregate_backward
    assert extra_memory(lambda: call(*args))[1] == q.nbytes


def test_the_emulator_is_given_copies_of_what_does_not_lie_on_16_bytes():
    """And of nothing else."""
    q = torch.randn(1, 2, 2, 2, 16)
    keys, values = maps((2, 2), ((2, 2),), 2, 16)
    shifted = torch.cat((q.new_zeros(1), keys[0].flatten()))[1:].view(keys[0].shape)
    allocated, outputs = [], []
    for key in (keys[0], shifted):
        with (
            emulated("checked"),
            torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile,
        ):
            outputs.append(vlmops.spatial_aggregate(q, [key], values))
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
        allocated.append(sum(e.nbytes() for e in events if e.nbytes() > 0))
    assert torch.equal(*outputs)
    assert allocated == [q.nbytes, q.nbytes + keys[0].nbytes]


# The modules.


def sampled(weights, prefix, y, c, tokens, exists, heads, depth):
    """A query's layers by the paper's formulas: y, c [C]; tokens of each encoder [m * m, C]."""

    def w(name):
        return weights[prefix + name]

    def norm(name, x):
        return functional.layer_norm(x, x.shape[-1:], w(name + ".weight"), w(name + ".bias"))

    def project(name, x):
        return w(f"{name}.1.weight") @ norm(f"{name}.0", x)

    for layer in range(depth):
        at = f"layers.{layer}."
        z = w(at + "proj_in.weight") @ torch.cat([y, w(at + "proj_context.weight") @ c])
        q = project(at + "cross_attn.q_proj", z)
        keys, values = [], []
        for i, (x, there) in enumerate(zip(tokens, exists, strict=True)):
            if len(x) > 1:
                x = x + w(f"{at}pos_embed_{i}")
            keys += [project(f"{at}cross_attn.k_proj_{i}", t) for t in x[there]]
            values += [project(f"{at}cross_attn.v_proj_{i}", t) for t in x[there]]
        parts = []
        for of_q, k, v in zip(*(q.chunk(heads), *(torch.stack(t).chunk(heads, 1) for t in
                                                   (keys, values))), strict=True):  # fmt: skip
            parts.append((k @ of_q * len(of_q) ** -0.5).softmax(0) @ v)
        z = norm(at + "norm", z + w(at + "cross_attn.o_proj.weight") @ torch.cat(parts))
        hidden = functional.gelu(w(at + "proj_out.linear_1.weight") @ z)
        y = y + w(at + "proj_out.linear_2.weight") @ hidden
    return y


def window(x, y, column, m):
    return x[y * m : (y + 1) * m, column * m : (column + 1) * m].flatten(0, 1)


SIZES, SIDES, GRIDS, DEPTH, HEADS, WIDTH = (12, 20), (4, 8), (4, 2), 2, 2, 16


def randomised(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, 0.1, 0.5)
    return module


@pytest.fixture
def connector():
    module = vlmops.nn.SpatialVisionAggregator(
        SIZES, SIDES, 24, vision_hidden_size=WIDTH, grids=GRIDS, depth=DEPTH, num_heads=HEADS
    )
    return randomised(module)


def drawn(batch=2):
    pairs = zip(SIDES, SIZES, strict=True)
    return [torch.randn(batch, side * side, size) for side, size in pairs]


@pytest.mark.parametrize("image_sizes", [None, [(300, 100), (50, 60)]])
def test_connector_is_what_the_paper_says(connector, image_sizes):
    features = drawn()
    got = connector(features, image_sizes)
    w = {name: t.double() for name, t in connector.state_dict().items()}

    def mlp(name, x, *, normed=False):
        x = functional.linear(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        x = functional.linear(functional.gelu(x), w[f"{name}.2.weight"], w[f"{name}.2.bias"])
        if normed:
            x = functional.layer_norm(x, x.shape[-1:], w[f"{name}.3.weight"], w[f"{name}.3.bias"])
        return x

    expected = []
    for b in range(2):
        tokens = [
            mlp(f"mm_projector_aux_{k}", x[b].double(), normed=True).view(side, side, WIDTH)
            for k, (x, side) in enumerate(zip(features, SIDES, strict=True))
        ]
        context = tokens[0].mean((0, 1))
        groups = []
        for g, grid in enumerate(GRIDS):
            out = torch.zeros(grid, grid, WIDTH, dtype=torch.float64)
            for y in range(grid):
                for x in range(grid):
                    windows, exist = [], []
                    for side, of in zip(SIDES, tokens, strict=True):
                        windows.append(window(of, y, x, side // grid))
                        there = torch.ones(side, side, dtype=torch.bool)
                        if image_sizes is not None:
                            height, width = image_sizes[b]
                            if width > height:
                                bar = (side - side * height // width) // 2
                                there[:bar] = there[side - bar :] = False
                            else:
                                bar = (side - side * width // height) // 2
                                there[:, :bar] = there[:, side - bar :] = False
                        there = window(there, y, x, side // grid)
                        exist.append(there if there.any() else ~there)
                    prefix = f"vision_sampler_{g}."
                    query = w["vision_query"][g]
                    out[y, x] = sampled(w, prefix, query, context, windows, exist, HEADS, DEPTH)
            if grid != GRIDS[0]:
                sizes = (GRIDS[0],) * 2
                out = functional.interpolate(out.permute(2, 0, 1)[None], sizes, mode="bilinear")
                out = out[0].permute(1, 2, 0)
            groups.append(out)
        expected.append(mlp("mm_projector", torch.cat(groups, -1).flatten(0, 1)))
    torch.testing.assert_close(got.double(), torch.stack(expected), rtol=2e-4, atol=2e-4)


def test_sampler_with_queries_of_another_width():
    """As within a language model: other channels, on a grid that is not square."""
    sampler = randomised(vlmops.nn.VisionTokenSampler(12, 20, 16, (1, 2), depth=2, num_heads=2))
    y, c = torch.randn(1, 2, 3, 12), torch.randn(1, 20)
    maps = [torch.randn(1, 2, 3, 16), torch.randn(1, 4, 6, 16)]
    got = sampler(y, c, maps)
    w = {name: t.double() for name, t in sampler.state_dict().items()}
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        tokens = [window(x[0].double(), i, j, m) for x, m in zip(maps, (1, 2), strict=True)]
        exist = [torch.ones(len(x), dtype=torch.bool) for x in tokens]
        expected = sampled(w, "", y[0, i, j].double(), c[0].double(), tokens, exist, 2, 2)
        torch.testing.assert_close(got[0, i, j].double(), expected, rtol=1e-4, atol=1e-4)


def test_parameters_have_the_published_names(connector):
    norm_and_linear = {"0.weight", "0.bias", "1.weight"}
    layer = {
        "proj_context.weight",
        "proj_in.weight",
        "norm.weight",
        "norm.bias",
        "proj_out.linear_1.weight",
        "proj_out.linear_2.weight",
        "cross_attn.o_proj.weight",
    }
    for name in ("q_proj", "k_proj_0", "v_proj_0", "k_proj_1", "v_proj_1"):
        layer |= {f"cross_attn.{name}.{end}" for end in norm_and_linear}
    expected = {"vision_query"}
    expected |= {f"mm_projector.{end}" for end in ("0.weight", "0.bias", "2.weight", "2.bias")}
    for k in range(2):
        ends = ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias")
        expected |= {f"mm_projector_aux_{k}.{end}" for end in ends}
    # Windows of one token have no place.
    for g, placed in enumerate(({"pos_embed_1"}, {"pos_embed_0", "pos_embed_1"})):
        for i in range(DEPTH):
            expected |= {f"vision_sampler_{g}.layers.{i}.{name}" for name in layer | placed}
    assert connector.state_dict().keys() == expected
    assert connector.vision_sampler_0.layers[0].pos_embed_1.shape == (4, WIDTH)


def test_all_parameters_learn_and_windows_are_not_copied(connector):
    features = drawn()
    with CountOps() as ran:
        connector(features).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in connector.parameters())
    assert ran.counts["vlmops::spatial_aggregate"] == len(GRIDS) * DEPTH
    assert ran.counts["vlmops::spatial_aggregate_backward"] == len(GRIDS) * DEPTH


def test_connector_compiles_to_one_graph(connector):
    features = drawn()
    compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), connector(features))


def test_existing_tokens_of_pictures():
    """Bars of padding on the longer side's both ends; windows of padding alone exist."""
    exist = vlmops.nn.existing_tokens([(100, 400), (300, 150), (7, 7)], (8, 8), (4, 4))
    wide, high, square = exist
    # 2 of 8 rows: 3 to 4. Windows of rows 0, 1 and 6, 7 are of padding alone.
    assert wide[:, 0].tolist() == [True, True, False, True, True, False, True, True]
    assert (wide == wide[:, :1]).all()
    assert high[0].tolist() == [True, True, True, True, True, True, True, True]  # 4 of 8: whole
    assert square.all()
    with pytest.raises(ValueError, match=r"map_size: expected multiples of the grid 3 x 3, got 8"):
        vlmops.nn.existing_tokens([(1, 1)], (8, 8), (3, 3))


def test_modules_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"map_sides: expected one for each of the 2 encoders"):
        vlmops.nn.SpatialVisionAggregator((8, 8), (24,), 16)
    with pytest.raises(ValueError, match=r"map_sides: expected multiples of all grids \[24, 7\]"):
        vlmops.nn.SpatialVisionAggregator((8,), (24,), 16, grids=(24, 7))
    with pytest.raises(ValueError, match=r"hidden_size: expected num_heads times a multiple of 8"):
        vlmops.nn.VisionTokenSampler(8, 8, 20, (1,), num_heads=2)
