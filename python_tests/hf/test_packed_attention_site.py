"""`vlmops.patch` with packed_attention: same outputs and gradients; no loop, mask or read."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
import transformers
from dispatch import CountOps, Shapes
from hf import tiny
from hf.checks import (
    assert_agree,
    assert_gradients_agree,
    assert_twin_copies_and_pickles,
    batch_of,
    gradients,
    image_features,
)
from hf.tiny import FAMILIES, UNLISTED, build, inputs, row_of, run
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmops
from vlmops.hf import attentions, grids, targets
from vlmops.hf.patch import all_sites
from vlmops.hf.rebind import ops_of, original_class
from vlmops.hf.sites import packed_attention as site

pytestmark = [
    pytest.mark.usefixtures("only_packed_attention", "wide"),
    # Of transformers 5.17's own call of its own layer.
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning"),
]

OP, BACKWARD = "vlmops::packed_attention", "vlmops::packed_attention_backward"
SDPA = "aten::_scaled_dot_product_flash_attention_for_cpu"
READ = "aten::_local_scalar_dense"
SEGMENTS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker", "glm4v", "glm_ocr"]
IMAGES = ["mistral3", "llava_pixtral", "lighton_ocr"]
UNLISTED_PLACES = {
    "lighton_ocr": {"model.vision_encoder.transformer.layers.*.attention": 2},
    "exaone4_5": {"model.visual.blocks.*.attn": 2},
    "minimax_m3_vl": {"model.vision_tower.layers.*.self_attn": 2},
    "lfm2_vl": {"model.vision_tower.encoder.layers.*.self_attn": 2},
    "muse_glimmer": {"model.vision_tower.layers.*.attn": 2},
    "kimi_k25": {"model.vision_tower.layers.*.attn": 2},
}
AUDIO = {"qwen2_5_omni_thinker": {"model.audio_tower.layers.*.self_attn": 1}}
OLDER = transformers.__version__.startswith("5.17.")
UNUSED = {"phi4_multimodal": 1}  # layers behind the features
MASKED = {"lfm2_vl"}  # its tower makes a mask always
ROUTED = {"qwen3_vl_moe", "minimax_m3_vl"}  # a rounding decides on experts
EVERY = [*FAMILIES, *UNLISTED]
everywhere = pytest.mark.parametrize("family", EVERY)
# One of each way: segments with windows, images, padding, dense with and without more.
ways = pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "llava_pixtral", "mllama", "llava", "internvl", "llama4"]
)

WIDTHS = {20: 24, 40: 48, 80: 96, 160: 192}  # heads of 24 channels, not 20: a multiple of 8


def widened(row):
    def of(settings):
        return {k: WIDTHS.get(v, v) if type(v) is int else v for k, v in settings.items()}

    return dataclasses.replace(row, vision=of(row.vision), config=of(row.config))


@pytest.fixture
def wide(monkeypatch):
    for name in ("FAMILIES", "UNLISTED"):
        rows = {family: widened(row) for family, row in getattr(tiny, name).items()}
        monkeypatch.setattr(tiny, name, rows)


def places(report, decoders=False):
    rows = [row for row in report.rows if row.op == site.SITE.op and row.status == "patched"]
    return {row.path: row.sites for row in rows if (row.reason == site.DECODES) == decoders}


def of_towers(report):
    return sum(places(report).values())


def reasons(report):
    return [row.reason for row in report.rows if row.status in ("refused", "left alone")]


def expected_places(family, model):
    if family in UNLISTED:
        return UNLISTED_PLACES[family]
    expected = targets.expected_places(model.config.model_type)
    expected = {p.path: p.sites(model.config) for p in expected if p.op == "packed_attention"}
    expected = {path: n for path, n in expected.items() if n} | AUDIO.get(family, {})
    if OLDER and family == "qwen2_5_omni_thinker":  # there is no model.model
        return {path.removeprefix("model."): n for path, n in expected.items()}
    return expected


def calls(family, report, images=True, attention="sdpa"):
    """Of the op in a forward."""
    if family in MASKED or not (images or family == "idefics"):
        return 0
    return sum(places(report).values()) - sum(AUDIO.get(family, {}).values())


def attention_modules(model):
    """Of towers."""
    found = [m for m in model.modules() if "packed_attention" in ops_of(m)]
    found = [m for m in found if not isinstance(m, transformers.PreTrainedModel)]
    return [m for m in found if not hasattr(m, "layer_idx")]  # text has a cache


# Towers of segments.


class Reads(TorchFunctionMode):
    """Counts what waits for a device: values that Python reads, which no dispatch mode sees."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        names = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "numpy")
        self.count += getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", SEGMENTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_read_nothing_back_and_do_not_loop(family, attention):
    model, batch = build(family, attention), batch_of(family, "several_images")
    vlmops.patch(model)
    layers = attention_modules(model)
    read = []
    counter, reads = CountOps(), Reads()

    def before(*_):
        counter.counts.clear()
        reads.count = 0
        counter.__enter__()
        reads.__enter__()

    def after(module, args, output):
        reads.__exit__(None, None, None)
        counter.__exit__(None, None, None)
        read.append(dict(counter.counts))
        assert reads.count == 0

    for layer in layers:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    with torch.no_grad():
        run(model, batch)
    assert len(read) == 2
    for counts in read:
        assert counts[OP] == 1
        for name in (READ, SDPA, "aten::split_with_sizes"):
            assert name not in counts


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_towers_read_grids_once(family):
    model, batch = build(family), batch_of(family, "several_images")
    tower, grid = model.model.visual, batch["image_grid_thw"]
    with torch.no_grad():
        with Reads() as theirs:
            expected = tower(batch["pixel_values"], grid_thw=grid).pooler_output
        vlmops.patch(model)
        grids._results.clear()
        tower(batch["pixel_values"], grid_thw=grid)
        counts = []
        for given in (grid.clone(), grid.clone(), grid):
            with Reads() as ran:
                got = tower(batch["pixel_values"], grid_thw=given).pooler_output
            counts.append(ran.count)
            assert_agree(got, expected, family)
    assert theirs.count > 2
    assert counts == [1, 1, 1]


@pytest.mark.parametrize(("family", "expected"), [("qwen2_5_vl", [16, 32]), ("mistral3", [32, 32])])
def test_the_longest_segment_reaches_the_op(family, expected):
    """Of a window here, of an image there."""
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    with torch.no_grad(), CountOps() as ran:
        image_features(model, batch)
    longest = [
        (args[10] if len(args) > 10 else 0, int((args[3][1:] - args[3][:-1]).max()))
        for func, args, _ in ran.calls
        if func._schema.name == OP
    ]
    assert [given for given, _ in longest] == [found for _, found in longest] == expected


GRIDS = [[[1, 4, 6]], [[3, 4, 8], [1, 2, 2]], [[2, 6, 4], [2, 6, 4], [1, 12, 8]]]


@pytest.mark.parametrize("grid", GRIDS)
def test_what_towers_make_of_grids(grid):
    module = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    forward = module.Qwen2_5_VisionTransformerPretrainedModel.forward
    made = grids.helpers(inspect.unwrap(forward))
    assert made.keys() >= {"get_vision_position_ids", "get_vision_window_index"}
    grid = torch.tensor(grid)
    calls = {
        "get_vision_position_ids": (2,),
        "get_vision_window_index": (2, 16, 4),
    }
    for name, args in calls.items():
        theirs = getattr(module, name)
        for _ in range(2):  # made, then kept
            ours, expected = made[name](grid, *args, kwargs={}), theirs(grid, *args)
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        given = {"position_ids": 1, "window_index": 2, "cu_window_seqlens": 3}
        assert made[name](grid, *args, kwargs=dict(given)) == theirs(grid, *args, kwargs=given)
    _, windows = made["get_vision_window_index"](grid, *calls["get_vision_window_index"])
    assert grids.longest_of(windows) == int((windows[1:] - windows[:-1]).max())
    assert grids.longest_of(windows.clone()) is None


def test_grids_that_change_are_read_again():
    module = transformers.models.qwen2_vl.modeling_qwen2_vl
    theirs = module.get_vision_position_ids
    ours = grids._hosted(theirs)
    grid = torch.tensor([[1, 4, 6]])
    ours(grid, 2)
    grid[0, 1] = 8
    assert torch.equal(ours(grid, 2), theirs(grid, 2))
    assert not torch.equal(ours(grid, 2), ours(grid, 1))
    for height in range(2, 2 * grids._KEPT + 6, 2):
        ours(torch.tensor([[1, height, 4]]), 2)
    assert len(grids._results) == grids._KEPT


def test_helpers_keep_results_apart():
    made = [grids._hosted(lambda grid_thw, kwargs=None, n=n: grid_thw + n) for n in (1, 2)]
    grid = torch.tensor([[1, 4, 6]])
    assert [int(helper(grid)[0, 0]) for helper in made] == [2, 3]


def test_grids_of_inference_mode():
    """Which have no version."""
    theirs = transformers.models.qwen2_vl.modeling_qwen2_vl.get_vision_position_ids
    ours = grids._hosted(theirs)
    with torch.inference_mode():
        grid = torch.tensor([[1, 4, 6]])
        ours(grid, 2)
        grid[0, 1] = 8
        assert torch.equal(ours(grid, 2), theirs(grid, 2))


def test_what_inference_made_serves_training():
    model, batch = build("qwen2_5_vl"), batch_of("qwen2_5_vl", "several_images")
    vlmops.patch(model)
    grids._results.clear()
    with torch.inference_mode():
        image_features(model, batch)
    assert grids._results
    for kept in grids._results.values():
        assert not any(t.is_inference() for t in kept if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_segments_do_not_see_each_other(family):
    """Two images together give what they give alone; in a window too."""
    model = build(family)
    vlmops.patch(model)
    sizes = [(2, 3), (4, 2)]
    with torch.no_grad():
        alone = [image_features(model, inputs(family, [[size]])) for size in sizes]
        both = inputs(family, [[*sizes]])
        pixels = [inputs(family, [[size]])["pixel_values"] for size in sizes]
        together = image_features(model, both | {"pixel_values": torch.cat(pixels)})
    assert_agree(together, torch.cat(alone), "together")


def test_calls_that_the_op_refuses_run_per_segment(monkeypatch):
    model, batch = build("qwen2_5_vl"), batch_of("qwen2_5_vl", "several_images")
    with torch.no_grad():
        expected = image_features(copy.deepcopy(model).double(), to(batch, torch.float64))
        vlmops.patch(model)
        with CountOps() as ran:
            got = image_features(model.double(), to(batch, torch.float64))
    assert ran.counts[OP] == 0
    assert torch.equal(got, expected)


def to(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def test_dropout_in_training_is_in_the_report():
    model = build("qwen2_5_vl")
    for block in model.model.visual.blocks:
        block.attn.attention_dropout = 0.1
    row = next(row for row in vlmops.patch(model).rows if row.path.startswith("model.visual"))
    assert row.reason == "in training its own attention, which drops some weights"


def test_dropout_in_training_runs_the_models_own_code():
    model, batch = build("qwen2_5_vl"), batch_of("qwen2_5_vl", "several_images")
    plain = copy.deepcopy(model)
    vlmops.patch(model)
    for made in (model, plain):
        made.train()
        for module in made.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    results = []
    for made in (model, plain):
        torch.manual_seed(0)
        with torch.no_grad(), CountOps() as ran:
            results.append(image_features(made, batch))
        assert ran.counts[OP] == 0
    assert torch.equal(*results)
    with torch.no_grad(), CountOps() as ran:
        image_features(model.eval(), batch)
    assert ran.counts[OP] == 2


@pytest.mark.parametrize("name", ["mine", "flash_of_mine"])
def test_another_implementation_that_is_selected_is_left_to_itself(name):
    model, batch = build("qwen2_5_vl"), batch_of("qwen2_5_vl", "several_images")
    seen = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        seen.append("cu_seq_lens_q" in kwargs)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    vlmops.patch(model)
    ALL_ATTENTION_FUNCTIONS[name] = mine
    try:
        for module in attention_modules(model):
            module.config._attn_implementation_internal = name
        with torch.no_grad(), CountOps() as ran:
            image_features(model, batch)
        assert ran.counts[OP] == 0
        assert seen == [True] * 2 if "flash" in name else len(seen) > 2 and not any(seen)
        vlmops.unpatch(model)
        assert f"{name} is selected" in str(vlmops.patch(model))
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def test_an_sdpa_of_somebody_else_gets_segments_one_by_one(monkeypatch):
    model, batch = build("qwen2_5_vl"), batch_of("qwen2_5_vl", "several_images")
    with torch.no_grad():
        expected = image_features(model, batch)
        vlmops.patch(model)
        theirs, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

        def mine(*args, **kwargs):
            seen.append(kwargs.keys())
            return theirs(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
        with CountOps() as ran:
            assert torch.equal(image_features(model, batch), expected)
    assert ran.counts[OP] == 0
    assert len(seen) > 2
    assert not any("cu_seq_lens_q" in keys for keys in seen)


# Towers with masks for images.


@pytest.mark.parametrize("family", IMAGES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_mask_of_images_is_built(family, attention):
    model, batch = build(family, attention), batch_of(family, "several_images")
    tower = next(m for m in model.modules() if type(m).__name__ == "PixtralVisionModel")
    given = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    tokens = int((batch["image_sizes"] // tiny.P).prod(dim=1).sum())
    with torch.no_grad():
        with Shapes() as ran:
            expected = tower(**given).last_hidden_state
        assert ran.squares(tokens)
        vlmops.patch(model)
        with Shapes() as ran:
            got = tower(**given).last_hidden_state
    assert not ran.squares(tokens)
    assert ran.counts[OP] == 2
    assert_agree(got, expected, "features")


@pytest.mark.parametrize("family", ["llava_pixtral", "mllama"])
def test_weights_that_are_watched_are_the_models_own(family):
    model, batch = build(family, "eager"), batch_of(family, "several_images")
    tower = model.model.vision_tower if family != "mllama" else model.model.vision_model
    names = ("pixel_values", "image_sizes", "aspect_ratio_ids", "aspect_ratio_mask")
    given = {name: batch[name] for name in names if name in batch}

    def weights():
        seen, count = [], len(expected_places(family, model))
        hooks = [
            m.register_forward_hook(lambda _, __, out: seen.append(out[1]))
            for m in tower.modules()
            if type(m).__name__ in ("PixtralAttention", "MllamaVisionAttention")
        ]
        tower(**given)
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(hooks) > count
        return seen

    with torch.no_grad():
        expected = weights()
        report = vlmops.patch(model)
        for ours, theirs in zip(weights(), expected, strict=True):
            assert_agree(ours, theirs, "weights")
        with CountOps() as ran:
            tower(**given)
    assert ran.counts[OP] == of_towers(report)


def test_a_tower_keeps_its_mask_when_a_layer_is_replaced():
    model, batch = build("llava_pixtral"), batch_of("llava_pixtral", "several_images")
    with torch.no_grad():
        expected = image_features(model, batch)
        vlmops.patch(model)
        layer = model.model.vision_tower.transformer.layers[1].attention
        layer.__class__ = original_class(layer)
        with CountOps() as ran:
            assert_agree(image_features(model, batch), expected, "features")
    assert ran.counts[OP] == 0


# Mllama's tower.


def mllama(tiles, attention="sdpa", **vision):
    """A tower, and a batch of pictures that use so many tiles."""
    rows = dict(tiny.FAMILIES)
    more = {"max_num_tiles": 4, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 2], [1, 4]]}
    row = dataclasses.replace(rows["mllama"], vision=rows["mllama"].vision | more | vision)
    tiny.FAMILIES["mllama"] = row
    model = build("mllama", attention).model.vision_model
    size = row.vision["image_size"]
    torch.manual_seed(5)
    mask = torch.arange(4)[None, None] < torch.tensor(tiles)[:, None, None]
    return model, {
        "pixel_values": torch.randn(len(tiles), 1, 4, 3, size, size),
        "aspect_ratio_ids": torch.tensor(tiles)[:, None],
        "aspect_ratio_mask": mask.long(),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tiles", [(1,), (1, 2, 4), (4,)])
def test_padding_is_hidden_from_padding_alone(attention, tiles):
    tower, batch = mllama(tiles, attention)
    tokens = 4 * 8
    with torch.no_grad():
        with Shapes() as ran:
            expected = tower(**batch).last_hidden_state
        assert ran.squares(tokens)
        vlmops.patch(tower)
        with Shapes() as ran:
            got = tower(**batch).last_hidden_state
    assert not ran.squares(tokens)
    assert ran.counts[OP] == 3
    assert_agree(got, expected, "features")


def test_a_picture_without_a_tile_keeps_the_mask():
    """Where everything is padding, everything weighs the same."""
    tower, batch = mllama((2, 0))
    with torch.no_grad():
        expected = tower(**batch).last_hidden_state
        vlmops.patch(tower)
        with CountOps() as ran:
            assert torch.equal(tower(**batch).last_hidden_state, expected)
    assert ran.counts[OP] == 0


@pytest.mark.parametrize("tiles", [(2, 0), (1, 2)])
def test_a_picture_without_a_tile_where_values_are_not_read(tiles, monkeypatch):
    """Compiled, and on a GPU."""
    tower, batch = mllama(tiles)
    with torch.no_grad():
        with CountOps() as theirs:
            expected = tower(**batch).last_hidden_state
        vlmops.patch(tower)
        monkeypatch.setattr(attentions, "_on_host", lambda _: False)
        with CountOps() as ran:
            got = tower(**batch).last_hidden_state
    assert_agree(got, expected, "features")
    assert ran.counts[OP] == 3
    assert ran.counts[READ] == theirs.counts[READ]


def test_the_mask_of_a_tower_without_padding_stays_as_it_is():
    """There ``[:, :, -0:] = 0`` hides everything: 7 patches and a token of class are 8."""
    function = transformers.models.mllama.modeling_mllama._prepare_aspect_ratio_attention_mask
    ours = attentions.mask_of_padding(function)
    for patches, length in ((8, 8), (5, 8)):
        args = (torch.tensor([[1, 0]]), patches, length, torch.float32)
        made, theirs = ours(*args), function(*args)
        if patches == length:
            assert torch.equal(made, theirs)
        else:
            assert made.shape == (1, 2 * length)
            assert torch.equal(attentions.padding_mask(made, torch.float32), theirs)


@pytest.mark.parametrize("mask", [[[0.5, 0.0]], [[2, 1]]])
def test_masks_that_are_no_masks_keep_their_meaning(mask):
    function = transformers.models.mllama.modeling_mllama._prepare_aspect_ratio_attention_mask
    args = (torch.tensor(mask), 5, 8, torch.float32)
    assert torch.equal(attentions.mask_of_padding(function)(*args), function(*args))


# Towers where all attend to all.


def dense(name, **more):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "image_size": 16, "patch_size": 4, **more}
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize(
    "name", ["Blip2Vision", "InstructBlipVision", "Dinov2", "ViT", "CLIPVision", "SiglipVision"]
)
def test_towers_by_themselves(name):
    tower, pixels = dense(name), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = tower(pixels)[0]
        assert places(vlmops.patch(tower)).popitem()[1] == 2
        with CountOps() as ran:
            assert_agree(tower(pixels)[0], expected, name)
    assert ran.counts[OP] == 2
    assert ran.counts[SDPA] == 0


def idefics2():
    module = transformers.models.idefics2.modeling_idefics2
    config = transformers.models.idefics2.configuration_idefics2.Idefics2VisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return module.Idefics2VisionTransformer(config).eval()


def test_masks_of_padding_are_left_to_the_model():
    tower, pixels = idefics2(), torch.randn(2, 3, 16, 16)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    for padded, count in ((False, 2), (True, 0)):
        if padded:
            mask[1, 2:] = False
        given = {"pixel_values": pixels, "patch_attention_mask": mask}
        with torch.no_grad():
            vlmops.unpatch(tower)
            expected = tower(**given)[0]
            vlmops.patch(tower)
            with CountOps() as ran:
                assert_agree(tower(**given)[0], expected, "features")
        assert ran.counts[OP] == count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causality_is_that_of_what_is_selected(attention):
    """Phi-4's attention says that it is causal, which SDPA heeds and eager code does not."""
    model = build("phi4_multimodal", attention)
    tower = model.model.embed_tokens_extend.image_embed.img_processor.encoder
    attend = tower.layers[0].self_attn
    assert attend.is_causal
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected = attend(x, attention_mask=None)[0]
        vlmops.patch(model)
        with CountOps() as ran:
            got = attend(x, attention_mask=None)[0]
    assert ran.counts[OP] == 1
    assert ran.calls[0][1][9:10] == ((True,) if attention == "sdpa" else ())
    assert_agree(got, expected, attention)


@pytest.mark.parametrize("hooked", ["forward", "pre"])
def test_hooks_see_the_weights_of_eager_code(hooked):
    tower, pixels = dense("CLIPVision"), torch.randn(2, 3, 16, 16)
    tower.set_attn_implementation("eager")
    vlmops.patch(tower)
    attention, seen = attention_modules(tower)[0], []
    if hooked == "forward":
        attention.register_forward_hook(lambda *args: seen.append(args[2][1]))
    else:
        attention.register_forward_pre_hook(lambda *args: seen.append(args))
    with torch.no_grad(), CountOps() as ran:
        tower(pixels)
    assert len(seen) == 1
    assert ran.counts[OP] == (1 if hooked == "forward" else 2)
    assert hooked == "pre" or seen[0].shape == (2, 2, 17, 17)


def test_hooks_of_transformers_matter_only_while_they_collect_weights():
    tower, pixels = dense("CLIPVision"), torch.randn(2, 3, 16, 16)
    tower.set_attn_implementation("eager")
    vlmops.patch(tower)
    counts = []
    with torch.no_grad():
        for ask in ({"output_attentions": True}, {"output_hidden_states": True}, {}):
            with CountOps() as ran:
                tower(pixels, **ask)
            counts.append(ran.counts[OP])
        tower.config.output_attentions = True  # and no argument says so
        with CountOps() as ran:
            assert len(tower(pixels).attentions) == 2
        counts.append(ran.counts[OP])
    assert counts == [0, 2, 2, 0]


@pytest.mark.parametrize(
    "given",
    [
        {"dropout": 0.1},
        {"softcap": 20.0},
        {"position_bias": torch.zeros(1, 2, 5, 5)},
        {"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
        {"output_attentions": True},
        {"k": torch.randn(1, 2, 5, 16)},
        {"k": torch.randn(1, 2, 5, 16), "v": torch.randn(1, 2, 5, 16)},
        {"v": torch.randn(1, 2, 5, 24).bfloat16()},
        {"dim": 20},
        {"dim": 264},
    ],
)
def test_what_the_op_does_not_compute_goes_to_the_models_own(given):
    given = dict(given)
    dim = given.pop("dim", 24)
    q, k, v = (torch.randn(1, 2, 5, dim) for _ in range(3))
    k, v = given.pop("k", k), given.pop("v", v)
    seen = []

    def theirs(*args, **kwargs):
        seen.append((args, kwargs))
        return "theirs"

    functions = attentions.Functions(
        type("Interface", (), {"get_interface": lambda self, name, default: default})(), "dense"
    )
    attend = functions.get_interface("eager", theirs)
    mask = given.pop("attention_mask", None)
    assert attend(nn.Linear(1, 1), q, k, v, mask, scaling=0.5, **given) == "theirs"
    assert len(seen) == 1


def test_heads_that_share_keys():
    """Fewer heads of keys; and another scale than usual."""
    q, k, v = (torch.randn(2, n, 5, 24) for n in (4, 2, 2))
    functions = attentions.Functions(ALL_ATTENTION_FUNCTIONS, "dense")
    module = nn.Linear(1, 1)
    module.is_causal, module.num_key_value_groups = False, 2
    made = functions.get_interface("sdpa", None)(module, q, k, v, None, scaling=0.3)[0]
    expected = functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(made, expected.transpose(1, 2))


# Decoders.


def generated(model, batch, **options):
    model.generation_config.eos_token_id = None
    options |= {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    return run(model, batch, model.generate, **options, output_logits=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama", "llama4", "smolvlm"])
def test_steps_of_generation(family, attention, monkeypatch):
    """And beside mrope, whose forward may wrap the model's own to put off norms."""
    all_of(monkeypatch, "packed_attention", "mrope")
    model, batch = build(family, attention), batch_of(family, "several_images")
    expected = generated(model, batch)
    report = vlmops.patch(model)
    (layers,) = places(report, decoders=True).values()
    with CountOps() as ran:
        got = generated(model, batch)
    # Eager code is given a mask in each step.
    steps = 3 if attention == "sdpa" else 0
    assert ran.counts[OP] == calls(family, report) + steps * layers
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert_agree(ours, theirs, "logits")


def test_steps_with_padding_are_the_models_own():
    model, batch = build("llava"), batch_of("llava", "left_padded")
    expected = generated(model, batch)
    report = vlmops.patch(model)
    with CountOps() as ran:
        got = generated(model, batch)
    assert ran.counts[OP] == of_towers(report)
    assert torch.equal(got.sequences, expected.sequences)


def test_decoders_attend_to_a_text_by_themselves():
    model, batch = build("llava"), batch_of("llava", "text")
    assert sum(places(vlmops.patch(model), decoders=True).values()) == 3
    with torch.no_grad(), CountOps() as ran:
        run(model, batch)
    assert ran.counts[OP] == 0


def test_a_step_that_differs_is_refused(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    monkeypatch.setattr(attentions, "packed_attention", lambda q, k, v, **_: q.clone())
    report = vlmops.patch(build("llava"))
    assert sum("numeric check failed" in reason for reason in reasons(report)) == 2


# Whether it gains.


def test_what_is_slower_is_left_alone(monkeypatch):
    monkeypatch.undo()
    tower = dense("CLIPVision", image_size=64)
    monkeypatch.setattr(site, "_share", lambda *_: 2.0)
    monkeypatch.setattr(site, "_measured", {})
    report = vlmops.patch(tower, ops=["packed_attention"])
    assert report.counts["packed_attention"] == 0
    assert "measured: torch's own attention takes 0.50 of the op's time" in str(report)
    monkeypatch.setattr(site, "_share", lambda *_: 0.5)
    monkeypatch.setattr(site, "_measured", {})
    assert vlmops.patch(tower, ops=["packed_attention"]).counts["packed_attention"] == 2


def test_what_is_slower_in_training_serves_inference(monkeypatch):
    monkeypatch.setattr(site, "worthwhile", lambda *args: "it is slow" if args[-1] else None)
    tower, pixels = dense("CLIPVision"), torch.randn(2, 3, 16, 16)
    report = vlmops.patch(tower)
    assert "where nothing is differentiated; there it is slow" in str(report)
    counts = []
    for trained in (True, False):
        with torch.set_grad_enabled(trained), CountOps() as ran:
            tower(pixels)
        counts.append(ran.counts[OP])
    tower.requires_grad_(False)
    with CountOps() as ran:
        tower(pixels)
    assert [*counts, ran.counts[OP]] == [0, 2, 2]


def test_measurements_run_and_are_kept(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(site, "_measured", {})
    heads, cpu = site.Heads(16, 2, 64), torch.device("cpu")
    given = 1, 1024, heads, torch.float32
    for trained in (False, True):
        site.worthwhile(*given, cpu, trained)
    assert len(site._measured) == 2
    assert min(site._measured.values()) > 0
    monkeypatch.setattr(site, "_share", lambda *_: 1 / 0)
    for trained in (False, True):
        site.worthwhile(*given, cpu, trained)
    assert site.worthwhile(8, 16, heads, torch.float32, cpu) == "too small to gain"
    assert "not measured on meta" in site.worthwhile(*given, torch.device("meta"))


# Refusals.


def test_heads_that_the_kernel_does_not_take(monkeypatch):
    monkeypatch.setattr(tiny, "FAMILIES", FAMILIES)
    report = vlmops.patch(build("qwen2_vl"))
    assert "heads of 20 channels" in reasons(report)[0]


def test_float64_and_other_modules_are_refused():
    assert "no kernel for torch.float64" in reasons(vlmops.patch(build("qwen2_vl").double()))[0]
    model = build("qwen2_vl")
    attention = model.model.visual.blocks[0].attn
    attention.forward = lambda *args, **kwargs: None
    assert "was replaced on the instance" in reasons(vlmops.patch(model))[0]


def test_what_differs_is_refused(monkeypatch):
    monkeypatch.setattr(site, "_checked", {})
    monkeypatch.setattr(attentions, "_packed", lambda q, *_: q.transpose(1, 2))
    assert "numeric check failed" in reasons(vlmops.patch(build("qwen2_vl")))[0]


def test_a_mask_function_that_was_replaced_is_left_alone(monkeypatch):
    module = transformers.models.pixtral.modeling_pixtral

    def mine(patch_embeds_list, tensor):
        return None

    model = build("llava_pixtral")
    monkeypatch.setattr(module, "generate_block_attention_mask", mine)
    assert "generate_block_attention_mask was replaced" in reasons(vlmops.patch(model))[0]


# Compiled.


@pytest.mark.parametrize("family", ["llava", "llama4", "mllama", "internvl"])
def test_towers_compile_to_one_graph(family):
    model, batch = build(family), batch_of(family, "several_images")
    vlmops.patch(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = image_features(model, batch) if family != "mllama" else None
        paths = {"llama4": "vision_model", "mllama": "model.vision_model"}
        tower = model.get_submodule(paths.get(family, "model.vision_tower"))
        if family == "mllama":
            names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            given = {name: batch[name] for name in names}
            expected = tower(**given).last_hidden_state
            compiled = torch.compile(tower, fullgraph=True, backend="eager")
            assert_agree(compiled(**given).last_hidden_state, expected, "compiled")
            return
        tower.compile(fullgraph=True, backend="eager")
        assert_agree(image_features(model, batch), expected, "compiled")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_blocks_of_segments_compile_to_one_graph(family):
    model = build(family)
    vlmops.patch(model)
    torch._dynamo.reset()
    block = model.model.visual.blocks[0]
    starts = torch.tensor([0, 4, 10], dtype=torch.int32)
    x = torch.randn(10, 48)
    cosines = torch.randn(10, 24), torch.randn(10, 24)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = block(x, cu_seqlens=starts, position_embeddings=cosines)
        got = compiled(x, cu_seqlens=starts, position_embeddings=cosines)
    assert_agree(got, expected, "compiled")


def test_pickled_towers_are_hugging_faces_again():
    model = build("mllama")
    vlmops.patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert not attention_modules(loaded)


# Every family: last, they take the longest.


@everywhere
def test_family_table_holds(family):
    """A site that rots with a new transformers turns this red; so does one that appears."""
    model = build(family)
    report = vlmops.patch(model)
    assert places(report) == expected_places(family, model)
    assert len(places(report, decoders=True)) == (family not in ("idefics", "kimi_k25"))
    assert vlmops.unpatch(model) > 0


@everywhere
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_agree(family, attention):
    model, batches = build(family, attention), ("text", "right_padded", "several_images")
    batches = {name: batch_of(family, name) for name in batches}
    with torch.no_grad():
        expected = {name: run(model, batch).logits for name, batch in batches.items()}
        report = vlmops.patch(model)
        for name, batch in batches.items():
            with CountOps() as ran:
                logits = run(model, batch).logits
            wanted = calls(family, report, name != "text", attention)
            if family == "mllama" and name == "right_padded":
                wanted = 0  # a row without an image is all padding
            assert ran.counts[OP] == wanted, name
            kept = batch["attention_mask"].bool()
            assert_agree(logits[kept], expected[name][kept], name)


@everywhere
def test_gradients_agree(family):
    model, batch = build(family), batch_of(family, "several_images")
    logits, grads = gradients(model, batch)
    report = vlmops.patch(model)
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch)
    count = calls(family, report)
    used = count - UNUSED.get(family, 0)
    assert (ran.counts[OP], ran.counts[BACKWARD]) == (count, used)
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@everywhere
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant):
    if use_reentrant and "reentrant" in row_of(family).lacks:
        pytest.skip(row_of(family).lacks["reentrant"])
    model, batch = build(family), batch_of(family, "several_images")
    logits, grads = gradients(model, batch)
    report = vlmops.patch(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    model.train()  # no dropout in these models; checkpointing runs in training mode only
    with CountOps() as ran:
        ours, our_grads = gradients(model, batch, use_cache=False)
    count = calls(family, report)
    again = count - UNUSED.get(family, 0)
    if family == "mllama":
        again = 0  # its layers never are checkpointed
    assert ran.counts[OP] == count + again
    assert_agree(ours, logits, "logits")
    assert_gradients_agree(our_grads, grads)


@pytest.mark.parametrize("family", [n for n in EVERY if n not in ROUTED])
def test_bfloat16_is_at_least_as_right_as_hugging_face(family):
    dtypes = (torch.float32, torch.bfloat16)
    batch, batch16 = (batch_of(family, "several_images", dtype) for dtype in dtypes)
    model = build(family, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), batch).logits
        theirs = run(model, batch16).logits
        report = vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch16).logits
    assert ran.counts[OP] == calls(family, report)
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


@ways
def test_twin_copies_and_pickles(family, tmp_path):
    report, restored = assert_twin_copies_and_pickles(family, tmp_path)
    towers = {"llava_pixtral": 1, "mllama": 1, "qwen2_5_vl": 1}.get(family, 0)
    assert restored == report.counts["packed_attention"] + towers


@ways
def test_what_is_selected_reads_unchanged(family):
    model = build(family)
    vlmops.patch(model)
    run(model, batch_of(family, "several_images"))
    assert {m.config._attn_implementation for m in attention_modules(model)} == {"sdpa"}


@ways
def test_autocast_and_inference_mode(family):
    model, batch = build(family), batch_of(family, "several_images")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, batch).logits
        report = vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch).logits
    assert ran.counts[OP] == calls(family, report)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@everywhere
def test_outputs_that_are_asked_for_are_still_there(family):
    model, batch = build(family, "eager"), batch_of(family, "several_images")
    ask = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = run(model, batch, **ask)
        vlmops.patch(model)
        got = run(model, batch, **ask)
    assert_agree(got.logits, expected.logits, "logits")
    assert len(got.attentions) == len(expected.attentions) > 0


# Together with mrope and the other sites.


def all_of(monkeypatch, *ops):
    sites = {op: found for op, found in all_sites_of.items() if op in ops}
    monkeypatch.setattr("vlmops.hf.patch.all_sites", lambda: sites)


all_sites_of = all_sites()


@everywhere
def test_order_does_not_matter(family, monkeypatch):
    """Beside mrope and patch_embed, which replace the same forwards."""
    batch, others = batch_of(family, "several_images"), ("mrope", "patch_embed")
    all_of(monkeypatch, "packed_attention", *others)
    there = {op for op, count in vlmops.patch(build(family)).counts.items() if count}
    made = []
    for order in (("packed_attention", *others), (*others, "packed_attention")):
        model = build(family)
        classes = [type(m) for m in model.modules()]
        for op in (op for op in order if op in there):
            report = vlmops.patch(model, ops=[op])
            assert not any("some of its" in reason for reason in reasons(report))
        again = vlmops.patch(model)
        assert "patched" not in {row.status for row in again.rows}
        with torch.no_grad(), CountOps() as ran:
            logits = run(model, batch).logits
        made.append((again.counts, logits, {k: n for k, n in ran.counts.items() if "vlmops" in k}))
        assert vlmops.unpatch(model) > 0
        assert [type(m) for m in model.modules()] == classes
    (counts, logits, ran), (their_counts, their_logits, their_ran) = made
    assert counts == their_counts
    assert ran == their_ran
    assert torch.equal(logits, their_logits)


def test_patched_block_gives_back_what_was_patched_before(monkeypatch):
    all_of(monkeypatch, "packed_attention", "mrope")
    model = build("qwen2_vl")
    vlmops.patch(model, ops=["mrope"])
    classes = [type(m) for m in model.modules()]
    with vlmops.patched(model, ops=["packed_attention"]) as report:
        assert of_towers(report) == 2
    assert [type(m) for m in model.modules()] == classes
