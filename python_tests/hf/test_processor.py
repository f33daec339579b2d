"""`vlmops.patch(model, processor=...)`: uint8 pixels, the same numbers to the bit, or float32."""

import copy
import gc
import importlib
import importlib.util
import inspect
import pickle
import weakref

import numpy as np
import pytest
import torch
import transformers
from dispatch import CountOps
from hf.checks import assert_agree
from hf.tiny import IMAGE, P, build, inputs, run
from transformers import BatchFeature

import vlmops
from vlmops.hf import pixels as following
from vlmops.hf.pixels import PixelMap

pytestmark = pytest.mark.usefixtures("only_patch_embed")

OP = "vlmops::patch_embed"


def _square(side):
    return {"height": side, "width": side}


_QWEN = {"patch_size": P, "size": {"shortest_edge": 64, "longest_edge": 4096}}
_TILES = {"size": _square(16), "crop_to_patches": False}
# Family -> module and class of its image processor, settings, whether uint8 reaches the op.
PROCESSORS = {
    "llava": ("clip.CLIP", {"size": _square(8), "do_center_crop": False}, True),
    "llava_next": (
        "llava_next.LlavaNext",
        {"size": {"shortest_edge": 8}, "crop_size": _square(8), "image_grid_pinpoints": [[8, 8]]},
        True,
    ),
    "paligemma": ("siglip.Siglip", {"size": _square(8)}, True),
    "gemma3": ("gemma3.Gemma3", {"size": _square(16)}, True),
    "aya_vision": ("got_ocr2.GotOcr2", _TILES, True),
    "internvl": ("got_ocr2.GotOcr2", _TILES, False),
    "qwen2_vl": ("qwen2_vl.Qwen2VL", _QWEN, False),
    "qwen2_5_vl": ("qwen2_vl.Qwen2VL", _QWEN, False),
    "glm4v": ("glm4v.Glm4v", _QWEN, False),
    "llava_pixtral": (
        "pixtral.Pixtral",
        {"patch_size": _square(P), "size": {"longest_edge": 32}},
        False,
    ),
    "smolvlm": (
        "smolvlm.SmolVLM",
        {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
        | {"do_image_splitting": False},
        False,
    ),
}
every = pytest.mark.parametrize("family", PROCESSORS)
backends = pytest.mark.parametrize(
    "backend",
    [
        "pil",
        pytest.param(
            "torchvision",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torchvision") is None,
                reason="transformers' other processors need torchvision, which is not installed",
            ),
        ),
    ],
)


def made(stem, settings, backend="pil"):
    folder, name = stem.split(".")
    file, suffix = (
        ("image_processing_pil_", "Pil") if backend == "pil" else ("image_processing_", "")
    )
    try:
        module = importlib.import_module(f"transformers.models.{folder}.{file}{folder}")
    except ImportError:
        pytest.skip(f"{stem}: no {backend} processor in transformers {transformers.__version__}")
    return getattr(module, f"{name}ImageProcessor{suffix}")(**copy.deepcopy(settings))


def processor_of(family, backend="pil"):
    return made(*PROCESSORS[family][:2], backend)


def picture(height, width, seed=0):
    draw = np.random.default_rng(seed)
    return draw.integers(256, size=(height, width, 3), dtype=np.uint8)


def called(processor, *pictures, **options):
    nested = "SmolVLM" in type(processor).__name__
    return processor(images=[list(pictures)] if nested else list(pictures), return_tensors="pt",
                     **options)  # fmt: skip


def features(model, batch):
    """What the model makes of images, in one tensor."""
    base = getattr(model, "model", model)
    names = inspect.signature(base.get_image_features).parameters
    given = {name: value for name, value in batch.items() if name in names}
    found = base.get_image_features(**given).pooler_output
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found])


def row_of(report):
    (row,) = [row for row in report.rows if row.op == "processor"]
    return row


def pair(family, backend="pil", dtype=torch.float32, **build_more):
    """A patched model and processor, and the processor as it was."""
    model, processor = build(family, dtype=dtype, **build_more), processor_of(family, backend)
    twin = processor_of(family, backend)
    row = row_of(vlmops.patch(model, processor=processor))
    assert (row.status, row.backend) == ("patched", "uint8"), row
    assert row.module == type(twin).__name__
    return model, processor, twin


def pixel_dtypes(calls):
    return [args[0][0].dtype for func, args, _ in calls if func._schema.name == OP]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_same_to_the_bit(family, dtype, backend):
    """What the model makes of uint8 is what it makes of float32, resized or not."""
    model, processor, twin = pair(family, backend, dtype)
    unpatched = build(family, dtype=dtype)
    for pictures in (
        [picture(16, 16)],
        [picture(16, 16, 1), picture(16, 16, 2)],
        [picture(40, 30)],
    ):
        raw, plain = called(processor, *pictures), called(twin, *pictures)
        assert raw.keys() == plain.keys()
        assert raw["pixel_values"].dtype == torch.uint8
        assert plain["pixel_values"].dtype == torch.float32
        assert raw["pixel_values"].shape == plain["pixel_values"].shape
        for name in raw.keys() - {"pixel_values"}:
            assert torch.equal(torch.as_tensor(raw[name]), torch.as_tensor(plain[name])), name
        plain = plain.to(dtype)
        with torch.no_grad():
            with CountOps() as ran:
                ours = features(model, raw.to(dtype))  # casts what floats, and nothing else
            assert torch.equal(ours, features(model, plain))
            if dtype == torch.float32:
                assert_agree(ours, features(unpatched, plain), "features")
        fused = PROCESSORS[family][2]
        assert pixel_dtypes(ran.calls)[0] == (torch.uint8 if fused else dtype)


@every
def test_black_and_white(family):
    """Zeros are black pixels, not padding."""
    model, processor, twin = pair(family)
    for value in (0, 255):
        flat = np.full((16, 16, 3), value, dtype=np.uint8)
        raw, plain = called(processor, flat, picture(16, 16)), called(twin, flat, picture(16, 16))
        assert raw["pixel_values"].dtype == torch.uint8
        with torch.no_grad():
            assert torch.equal(features(model, raw), features(model, plain))


@pytest.mark.parametrize(
    ("family", "size", "pieces"), [("llava", (8, 8), (1, 1)), ("qwen2_vl", (16, 24), (2, 3))]
)
def test_logits_and_gradients(family, size, pieces):
    model, processor, twin = pair(family)
    batch = inputs(family, [[3, pieces, 2]])
    found = []
    for p in (processor, twin):
        model.zero_grad()
        logits = run(model, {**batch, **called(p, picture(*size))}).logits
        logits.square().sum().backward()
        grads = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
        assert any("patch_embed" in name for name in grads)
        found.append((logits, grads))
    (ours, our_grads), (theirs, their_grads) = found
    assert torch.equal(ours, theirs)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        assert torch.equal(our_grads[name], grad), name


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_compiles(family):
    """To the op, and to the adapter of a method that casts."""
    model, processor, twin = pair(family)
    raw, plain = (called(p, picture(16, 16))["pixel_values"] for p in (processor, twin))

    def look(pixel_values):
        return model.model.get_image_features(pixel_values).pooler_output

    torch._dynamo.reset()  # sizes of another family
    compiled = torch.compile(look, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = look(plain)
        assert_agree(torch.cat(list(compiled(raw))), torch.cat(list(expected)), "features")


# Calls that do not hand over.


@backends
@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": [0.5, 0.5, 0.4]},
        {"rescale_factor": 1 / 256},
    ],
    ids=str,
)
def test_other_arithmetic_comes_as_float32(options, backend):
    _, processor, twin = pair("llava", backend)
    ours, theirs = (
        called(processor, picture(9, 8), **options),
        called(twin, picture(9, 8), **options),
    )
    assert ours["pixel_values"].dtype == theirs["pixel_values"].dtype
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert called(processor, picture(9, 8))["pixel_values"].dtype == torch.uint8
    # The same numbers, given by hand.
    given = {"image_mean": list(twin.image_mean), "rescale_factor": 1 / 255}
    assert called(processor, picture(9, 8), **given)["pixel_values"].dtype == torch.uint8


@backends
def test_other_images_come_as_float32(backend):
    _, processor, twin = pair("llava", backend)
    floats = picture(8, 8).astype(np.float32)
    for pictures in ([floats], [picture(8, 8), floats], [floats, picture(8, 8)]):
        options = {"do_resize": False, "input_data_format": "channels_last"}
        ours, theirs = (called(p, *pictures, **options) for p in (processor, twin))
        assert ours["pixel_values"].dtype == torch.float32
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@backends
def test_attributes_are_read_in_each_call(backend):
    _, processor, twin = pair("llava", backend)
    for p in (processor, twin):
        p.image_std = (0.1, 0.2, 0.3)
    ours, theirs = called(processor, picture(8, 8)), called(twin, picture(8, 8))
    assert ours["pixel_values"].dtype == torch.float32
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@backends
def test_what_is_padded_comes_as_float32(backend):
    """Pixtral pads to the largest image once pixels are normalised."""
    model, processor, twin = (
        build("llava_pixtral"),
        *(processor_of("llava_pixtral", backend) for _ in range(2)),
    )
    row = row_of(vlmops.patch(model, processor=processor))
    assert row.reason == "float32 where it pads images of several sizes"
    pictures = picture(16, 16), picture(24, 32)
    ours, theirs = called(processor, *pictures), called(twin, *pictures)
    assert ours["pixel_values"].dtype == torch.float32
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    with torch.no_grad():
        assert torch.equal(features(model, ours), features(model, theirs))


def test_errors_are_the_processors_own():
    _, processor, twin = pair("llava")
    for p in (processor, twin):
        with pytest.raises(TypeError, match="only a single or a list of entries"):
            p(images=[3.0])


def test_numpy_and_lists():
    _, processor, twin = pair("llava")
    pictures = [picture(8, 8), picture(9, 8)]
    table = following.takes_raw(_.model.vision_tower.embeddings)
    for kind in ("np", None):
        ours, theirs = (p(images=pictures, return_tensors=kind)["pixel_values"]
                        for p in (processor, twin))  # fmt: skip
        assert type(ours) is type(theirs)
        for raw, plain in zip(ours, theirs, strict=True):
            assert raw.dtype == np.uint8
            mapped = table.normalised(torch.from_numpy(raw), torch.float32)
            assert torch.equal(mapped, torch.from_numpy(plain))


class _Joined:
    """A processor that puts videos, normalised, behind images; and leaves out what it likes."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, images=None, videos=None, **options):
        found = {"input_ids": torch.tensor([[2001, 5]])}
        if images is not None:
            found |= self.image_processor(images=images, **options)
        if videos is not None:
            found["pixel_values"] = torch.cat((found["pixel_values"], videos.to(torch.float32)))
        return BatchFeature(found)


def test_processors_around_image_processors():
    model, twin = build("llava"), _Joined(processor_of("llava"))
    processor = _Joined(processor_of("llava"))
    assert row_of(vlmops.patch(model, processor=processor)).module == "_Joined"
    image, video = picture(8, 8), torch.full((1, 3, 8, 8), 0.5)
    raw = called(processor, image)
    assert raw["pixel_values"].dtype == torch.uint8
    assert torch.equal(raw["input_ids"], torch.tensor([[2001, 5]]))
    assert "pixel_values" not in processor()
    # Joined with what is normalised, pixels have to be normalised too.
    ours, theirs = called(processor, image, videos=video), called(twin, image, videos=video)
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    # Its image processor, called by itself, is as it was.
    assert called(processor.image_processor, image)["pixel_values"].dtype == torch.float32
    vlmops.unpatch(model)
    assert type(processor) is _Joined
    assert torch.equal(
        called(processor, image)["pixel_values"], called(twin, image)["pixel_values"]
    )


def test_a_processor_with_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<image>": IMAGE, "what": 3, "is": 4}
    model_of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model_of_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model_of_words, unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip

    def joined():
        return transformers.LlavaProcessor(
            processor_of("llava"), tokenizer, patch_size=P, num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        )  # fmt: skip

    model, processor, twin = build("llava"), joined(), joined()
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    given = {"text": "what is <image>", "images": picture(20, 30), "return_tensors": "pt"}
    raw, plain = processor(**given), twin(**given)
    assert (raw["pixel_values"].dtype, plain["pixel_values"].dtype) == (torch.uint8, torch.float32)
    assert torch.equal(raw["input_ids"], plain["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**raw).logits, model(**plain).logits)
    assert processor(text="what is", return_tensors="pt").keys() == {"input_ids", "attention_mask"}
    processor.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    names = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


# Who hands over to whom.


def test_saved_copied_pickled(tmp_path):
    model, processor, twin = pair("llava")
    assert inspect.signature(processor.__call__) == inspect.signature(twin.__call__)
    assert processor.to_dict() == twin.to_dict()
    assert repr(processor) == repr(twin)
    for p, folder in ((processor, "ours"), (twin, "theirs")):
        p.save_pretrained(tmp_path / folder)
    (ours,), (theirs,) = (list((tmp_path / folder).iterdir()) for folder in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    data = pickle.dumps(processor)
    assert b"vlmops" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is type(twin)
    plain = called(twin, picture(8, 8))["pixel_values"]
    assert torch.equal(called(loaded, picture(8, 8))["pixel_values"], plain)
    assert b"vlmops" not in pickle.dumps(model)
    assert list(model.state_dict()) == list(build("llava").state_dict())
    # A copy of either serves as they do, as long as the model is patched.
    other, copied = copy.deepcopy(processor), copy.deepcopy(model)
    raw = called(other, picture(8, 8))
    assert raw["pixel_values"].dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(features(copied, raw), features(model, raw))
    vlmops.unpatch(copied)
    assert called(processor, picture(8, 8))["pixel_values"].dtype == torch.uint8
    vlmops.unpatch(model)
    for p in (processor, other):
        assert torch.equal(called(p, picture(8, 8))["pixel_values"], plain)
    assert type(processor) is type(twin)


@every
def test_unpatch(family):
    model = build(family)
    classes = [type(module) for module in model.modules()]
    processor, twin = processor_of(family), processor_of(family)
    kind, state = type(processor), dict(vars(processor))
    vlmops.patch(model, processor=processor)
    again = vlmops.patch(model, processor=processor)
    assert {row.status for row in again.rows} == {"already patched"}
    assert type(processor) is not kind
    vlmops.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert type(processor) is kind
    assert vars(processor) == state
    plain = called(twin, picture(16, 16))["pixel_values"]
    assert torch.equal(called(processor, picture(16, 16))["pixel_values"], plain)
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    assert called(processor, picture(16, 16))["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("before", [False, True])
def test_for_a_while(family, before):
    """What was patched before stays patched."""
    model, processor = build(family), processor_of(family)
    if before:
        vlmops.patch(model)
    classes = [type(module) for module in model.modules()]
    kind = type(processor)
    with vlmops.patched(model, processor=processor) as report:
        assert row_of(report).status == "patched"
        assert called(processor, picture(16, 16))["pixel_values"].dtype == torch.uint8
    assert [type(module) for module in model.modules()] == classes
    assert type(processor) is kind


def test_a_model_that_is_gone():
    model, processor, _ = pair("llava")
    alive = weakref.ref(model)
    del model, _
    gc.collect()
    assert alive() is None
    assert called(processor, picture(8, 8))["pixel_values"].dtype == torch.float32


def test_other_processors_and_models():
    model, processor, same = pair("llava")
    assert row_of(vlmops.patch(model, processor=same)).status == "patched"
    assert called(same, picture(8, 8))["pixel_values"].dtype == torch.uint8
    other = made("siglip.Siglip", {"size": _square(8)})
    row = row_of(vlmops.patch(model, processor=other))
    assert row.status == "refused"
    assert "takes raw pixels of another processor" in row.reason
    assert called(other, picture(8, 8))["pixel_values"].dtype == torch.float32
    row = row_of(vlmops.patch(build("llava"), processor=processor))
    assert row.status == "refused"
    assert "hands over to another model" in row.reason
    vlmops.unpatch(model)
    assert row_of(vlmops.patch(model, processor=other)).status == "patched"


REFUSED = {
    "siglip2": ("siglip2.Siglip2", {}, "pads them once they are normalised"),
    "hybrid": (
        "deepseek_vl_hybrid.DeepseekVLHybrid",
        {},
        "its pixels are in pixel_values, high_res_pixel_values",
    ),
    "kosmos": ("kosmos2_5.Kosmos2_5", {}, "it does more with normalised pixels"),
    "plain": (
        "clip.CLIP",
        {"do_rescale": False, "do_normalize": False},
        "it does not rescale and normalise",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_processors(name):
    stem, settings, reason = REFUSED[name]
    model, processor = build("llava"), made(stem, settings)
    kind = type(processor)
    report = vlmops.patch(model, processor=processor)
    row = row_of(report)
    assert row.status == "refused"
    assert reason in row.reason
    assert report.counts == {"patch_embed": 1, "processor": 0}
    assert type(processor) is kind
    assert following.takes_raw(model.model.vision_tower.embeddings) is None


def test_refused_models():
    """Nothing of it is patched, or pixels do not get to it."""
    for family, reason in {
        "ernie4_5_vl_moe": "no patch embedding of this model is patched",
        "phi4_multimodal": "pixels could not be followed",
    }.items():
        processor = made("qwen2_vl.Qwen2VL", _QWEN)
        row = row_of(vlmops.patch(build(family), processor=processor))
        assert row.status == "refused"
        assert reason in row.reason
        assert called(processor, picture(16, 16))["pixel_values"].dtype == torch.float32


def test_replaced_methods_are_refused():
    model, processor = build("internvl"), processor_of("internvl")
    theirs = model.model.get_image_features
    model.model.get_image_features = lambda *args, **kwargs: theirs(*args, **kwargs)
    row = row_of(vlmops.patch(model, processor=processor))
    assert row.status == "refused"
    assert "InternVLModel.get_image_features" in row.reason
    assert called(processor, picture(16, 16))["pixel_values"].dtype == torch.float32


def test_methods_that_ask_for_the_dtype():
    """What they do with it cannot be seen by following pixels."""

    def asks(self, pixel_values):
        return self.cast(pixel_values.dtype)

    def does_not(self, pixel_values, other):
        return pixel_values.shape, other.dtype

    assert following._asks_dtype(asks, "pixel_values")
    assert not following._asks_dtype(does_not, "pixel_values")


# What does not come from the processor.


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_raw_pixels_that_were_cast_are_stopped(family):
    model, processor, twin = pair(family)
    raw, plain = called(processor, picture(16, 16)), called(twin, picture(16, 16))
    raw["pixel_values"] = raw["pixel_values"].float()
    with pytest.raises(RuntimeError, match="raw pixels have that were cast"):
        features(model, raw)
    with torch.no_grad():
        plain["pixel_values"][..., 0] = float("nan")
        assert features(model, plain).isnan().any()


def test_towers_take_uint8_by_themselves():
    model, processor, twin = pair("llava")
    raw, plain = called(processor, picture(8, 8)), called(twin, picture(8, 8))
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = tower(**plain).last_hidden_state
        assert torch.equal(tower(**raw).last_hidden_state, expected)
        embedded = tower.embeddings(plain["pixel_values"])
        for options in ({}, {"interpolate_pos_encoding": False}):  # by the module's own code too
            assert torch.equal(tower.embeddings(raw["pixel_values"], **options), embedded)
        larger = called(processor, picture(12, 12), size=_square(12))
        plain = called(twin, picture(12, 12), size=_square(12))
        ours, theirs = (
            tower.embeddings(x["pixel_values"], interpolate_pos_encoding=True)
            for x in (larger, plain)
        )
        assert torch.equal(ours, theirs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(
                tower(**raw).last_hidden_state,
                tower(pixel_values=called(twin, picture(8, 8))["pixel_values"]).last_hidden_state,
            )


def test_bad_arguments():
    model, processor = build("llava"), processor_of("llava")
    with pytest.raises(TypeError, match=r"processor: expected a Hugging Face processor.*got dict"):
        vlmops.patch(model, processor={})
    with pytest.raises(ValueError, match="processor: expected 'patch_embed' among ops"):
        vlmops.patch(model, ops=[], processor=processor)
    assert vlmops.unpatch(model) == 0


@pytest.mark.parametrize("channels", ["images", "outer", "inner"])
def test_maps(channels):
    table = torch.randn(3, 256)
    pixels = PixelMap("pixel_values", table, channels)
    raw = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = torch.stack([row[raw[:, i].long()] for i, row in enumerate(table)], 1)
    if channels == "inner":
        raw, expected = raw.movedim(1, -1), expected.movedim(1, -1)
    if channels != "images":
        raw, expected = raw.flatten(1), expected.flatten(1)
    assert torch.equal(pixels.normalised(raw, torch.float32), expected)
    assert pixels == PixelMap("pixel_values", table.clone(), channels)
    assert pixels != PixelMap("pixel_values", table + 1, channels)
    assert pixels.accepted([raw, expected], torch.bfloat16)[0].dtype == torch.bfloat16
    assert pixels.accepted([raw, expected], torch.bfloat16)[1] is expected


# Models that do with pixels what no family here does.


class _Embeds(torch.nn.Module):
    """As towers do it; subclasses do more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 16, 4, 4)

    def forward(self, pixel_values):
        return self.conv(pixel_values).flatten(2)


class _DropsBlack(_Embeds):
    def forward(self, pixel_values):
        return super().forward(pixel_values[(pixel_values != 0).flatten(1).any(1)])


class _AsksDtype(_Embeds):
    def forward(self, pixel_values):
        return super().forward(pixel_values) * torch.tensor(1.5).to(pixel_values.dtype)


class _Reads(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values.float().mean()


class _GivesToOthers(_Embeds):
    def __init__(self):
        super().__init__()
        self.reads = _Reads()

    def forward(self, pixel_values):
        return super().forward(pixel_values) + self.reads(pixel_values)


class _Casts(_Embeds):
    def forward(self, pixel_values):
        return super().forward(pixel_values.to(self.conv.weight.dtype))


class _Around(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x=1.0, pixel_values=None):
        return x + self.tower(pixel_values)


@pytest.mark.parametrize("tower", [_Embeds, _DropsBlack, _AsksDtype, _GivesToOthers, _Casts])
def test_unusual_models(tower):
    model, processor, twin = _Around(tower()), processor_of("llava"), processor_of("llava")
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    for pictures in ([black], [picture(8, 8), black]):
        raw, plain = (called(p, *pictures)["pixel_values"] for p in (processor, twin))
        assert raw.dtype == torch.uint8
        with torch.no_grad(), CountOps() as ran:
            assert torch.equal(model(1.0, raw), model(1.0, pixel_values=plain))
            assert torch.equal(model.tower(pixel_values=raw), model.tower(plain))
        assert pixel_dtypes(ran.calls)[0] == (torch.uint8 if tower is _Embeds else torch.float32)


def test_hooks_see_what_they_saw():
    """Pixels are normalised in front of a module that somebody watches."""
    model, processor, twin = _Around(_Embeds()), processor_of("llava"), processor_of("llava")
    seen = []
    model.tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    assert seen == []
    raw, plain = (called(p, picture(8, 8))["pixel_values"] for p in (processor, twin))
    with torch.no_grad():
        assert torch.equal(model(1.0, raw), model(1.0, plain))
    assert torch.equal(seen[0], plain)


# Processors that do with pixels what no processor here does.


class _Copies(_Joined):
    def __call__(self, copied=False, **options):
        found = super().__call__(**options)
        return BatchFeature({**found, "thumbnails": found["pixel_values"] + 1}) if copied else found


def test_pixels_that_are_returned_twice():
    model, processor, twin = build("llava"), *(_Copies(processor_of("llava")) for _ in "ab")
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    assert called(processor, picture(8, 8))["pixel_values"].dtype == torch.uint8
    ours, theirs = (called(p, picture(8, 8), copied=True) for p in (processor, twin))
    for name in ("pixel_values", "thumbnails"):
        assert torch.equal(ours[name], theirs[name])


def test_another_image_processor():
    """It is not what was tried, whatever its arguments are."""
    kind = type(processor_of("llava"))

    class Brighter(kind):
        def normalize(self, image, mean, std, **kwargs):
            return super().normalize(image, mean, std, **kwargs) + 1

    model, processor = build("llava"), _Joined(processor_of("llava"))
    assert row_of(vlmops.patch(model, processor=processor)).status == "patched"
    settings = PROCESSORS["llava"][1]
    processor.image_processor = Brighter(**settings)
    ours = called(processor, picture(8, 8))["pixel_values"]
    assert torch.equal(ours, called(Brighter(**settings), picture(8, 8))["pixel_values"])


def test_arithmetic_that_is_no_table():
    kind = type(processor_of("llava"))

    class Vignette(kind):
        def normalize(self, image, mean, std, **kwargs):
            found = super().normalize(image, mean, std, **kwargs)
            return found * np.linspace(0, 1, found.shape[-1], dtype=np.float32)

    row = row_of(vlmops.patch(build("llava"), processor=Vignette(**PROCESSORS["llava"][1])))
    assert row.status == "refused"
    assert "are not what its steps make of pixels" in row.reason
