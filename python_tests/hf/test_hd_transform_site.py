"""Phi-4's layout of crops: found, the same as Hugging Face's, without a value read back."""

import copy
import inspect
import pickle

import pytest
import torch
from dispatch import CountOps
from hf.checks import assert_agree, assert_gradients_agree
from hf.tiny import IMAGE, build

import vlmops
from vlmops.hf.sites import hd_transform as site
from vlmops.ops import linear as ways

PATH = "model.embed_tokens_extend.image_embed"
SIDE, CROP, CROPS = 2, 16, 7  # tokens and pixels on a side of a crop; crops of an image, padded
GRIDS = [(2, 3), (1, 1), (3, 1)]
FILLED = [(3, 5), (2, 2), (6, 1)]  # rows and columns of tokens


@pytest.fixture(autouse=True)
def only_hd_transform(monkeypatch):
    monkeypatch.setattr("vlmops.hf.patch.all_sites", lambda: {"hd_transform": site.SITE})


def batch(dtype=torch.float32, mask_dtype=torch.float32, extra=0):
    """Three pictures in one text, as the processor makes them; `extra` placeholders too many."""
    torch.manual_seed(2)
    images = len(GRIDS)
    mask = torch.zeros(images, CROPS, 2 * SIDE, 2 * SIDE)
    mask[:, 0] = 1
    ids = []
    for i, ((h, w), (height, width)) in enumerate(zip(GRIDS, FILLED, strict=True)):
        picture = torch.zeros(h * 2 * SIDE, w * 2 * SIDE)
        picture[: 2 * height, : 2 * width] = 1
        placed = picture.view(h, 2 * SIDE, w, 2 * SIDE).transpose(1, 2)
        mask[i, 1 : 1 + h * w] = placed.reshape(h * w, 2 * SIDE, 2 * SIDE)
        tokens = height * (width + 1) + 1 + SIDE * (SIDE + 1)
        ids += [5, 6, *[IMAGE] * tokens]
    ids += [7, 8, *[IMAGE] * extra]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "image_pixel_values": torch.randn(images, CROPS, 3, CROP, CROP).to(dtype),
        "image_sizes": torch.tensor(GRIDS) * CROP,
        "image_attention_mask": mask.to(mask_dtype),
    }


def embedded(model, given):
    """What the module itself returns; and the gradients."""
    module = model.get_submodule(PATH)
    model.zero_grad()
    embeds = model.get_input_embeddings()(given["input_ids"])
    arguments = inspect.signature(module.forward).parameters
    named = {n: given[n] for n in arguments if n in given}
    out = module(inputs_embeds=embeds, **named)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(upstream.to(out))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.int64], ids=str)
def test_phi4_is_the_same_and_reads_nothing_back(mask_dtype):
    model, given = build("phi4_multimodal"), batch(mask_dtype=mask_dtype)
    with torch.no_grad(), CountOps() as theirs:
        model(**given)
    expected, grads = embedded(model, given)
    report = vlmops.patch(model)
    assert report.counts == {"hd_transform": 1}
    got, ours = embedded(model, given)
    assert_agree(got, expected, "embeddings")
    assert_gradients_agree(ours, grads, at_least=10)
    assert ours["model.embed_tokens_extend.image_embed.sub_img_feature_extensor"].abs().sum() > 0
    with torch.no_grad(), CountOps() as ran:
        model(**given)
    assert ran.counts["vlmops::hd_transform"] == 1
    # Those of the tower and the decoder are not ours.
    module, features = model.get_submodule(PATH), torch.randn(len(GRIDS) * CROPS, SIDE**2, 40)
    module.get_img_features = lambda *_, **__: features
    assert theirs.counts["aten::_local_scalar_dense"] > ran.counts["aten::_local_scalar_dense"]
    with CountOps() as ran:
        embedded(model, given)
    assert ran.counts["vlmops::hd_transform"] == 1
    assert ran.counts["aten::_local_scalar_dense"] == 0
    assert ran.counts["aten::nonzero"] == 0
    vlmops.unpatch(model)
    with CountOps() as ran:
        embedded(model, given)
    # Two for what each mask fills, and those of sizes of tensors.
    assert ran.counts["aten::_local_scalar_dense"] >= 2 * len(GRIDS)
    assert ran.counts["aten::nonzero"] == 1


def test_phi4_projects_all_pictures_in_one_call():
    """Unless its layers are watched, or are more than that."""
    model, given = build("phi4_multimodal"), batch()
    expected, _ = embedded(model, given)
    (row,) = vlmops.patch(model).rows
    assert row.reason == "with sub_img_feature_extensor, img_projection_up, img_projection_down"
    with CountOps() as ran:
        assert_agree(embedded(model, given)[0], expected, "embeddings")
    assert ran.counts["vlmops::mlp_projector"] == ran.counts["vlmops::mlp_projector_backward"] == 1
    layer, seen = model.get_submodule(f"{PATH}.img_projection_down"), []
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    with CountOps() as ran:
        assert_agree(embedded(model, given)[0], expected, "embeddings")
    assert (len(seen), ran.counts["vlmops::mlp_projector"]) == (1, 0)
    hook.remove()
    model.get_submodule(PATH).img_projection_down = layer.bfloat16()
    with CountOps() as ran, pytest.raises(RuntimeError, match="mat1 and mat2"):
        embedded(model, given)
    assert ran.counts["vlmops::mlp_projector"] == 0


def test_phi4_linear_layers_are_not_counted_twice(monkeypatch):
    monkeypatch.undo()  # all ops
    always = (True,) * len(ways.FROM_ROWS)
    monkeypatch.setattr(ways, "wins", lambda *_: always)
    monkeypatch.setattr("vlmops.ops.linear_tuning.wins", lambda *_: always)
    alone, both = (
        vlmops.patch(build("phi4_multimodal"), ops=ops).counts["linear"]
        for ops in (["linear"], ["hd_transform", "linear"])
    )
    assert alone == both + 2


def test_phi4_in_bfloat16():
    model, given = build("phi4_multimodal", dtype=torch.bfloat16), batch(torch.bfloat16)
    expected, grads = embedded(model, given)
    assert vlmops.patch(model).counts == {"hd_transform": 1}
    with CountOps() as ran:
        got, ours = embedded(model, given)
    assert ran.counts["vlmops::hd_transform"] == 1
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    name = f"{PATH}.sub_img_feature_extensor"
    torch.testing.assert_close(ours[name], grads[name], rtol=0.1, atol=0.5)


def test_phi4_generates_the_same():
    model, given = build("phi4_multimodal"), batch()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**given, **options)
    vlmops.patch(model)
    with CountOps() as ran:
        assert torch.equal(model.generate(**given, **options), expected)
    assert ran.counts["vlmops::hd_transform"] == 1


def wrong_sizes(given):
    given["image_sizes"] = given["image_sizes"] * 3


def no_mask(given):
    given["image_attention_mask"] = None


def too_many_placeholders(given):
    given.update(batch(extra=2))


@pytest.mark.parametrize("spoil", [wrong_sizes, no_mask, too_many_placeholders])
def test_phi4_raises_what_it_raised(spoil):
    model, given = build("phi4_multimodal"), batch()
    spoil(given)
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        embedded(model, given)
    assert vlmops.patch(model).counts == {"hd_transform": 1}
    with pytest.raises(theirs.type) as ours:
        embedded(model, given)
    assert str(ours.value) == str(theirs.value)


def test_phi4_runs_its_own_code_under_autocast_and_of_other_dtypes():
    model, given = build("phi4_multimodal"), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**given).logits
    vlmops.patch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CountOps() as ran:
        assert torch.equal(model(**given).logits, expected)
    assert ran.counts["vlmops::hd_transform"] == 0
    model.double()
    given["image_pixel_values"] = given["image_pixel_values"].double()
    with torch.no_grad(), CountOps() as ran:
        model(**given)
    assert ran.counts["vlmops::hd_transform"] == 0


def test_phi4_patched_module_keeps_its_dropout_and_hooks():
    model, given = build("phi4_multimodal"), batch()
    module = model.get_submodule(PATH)
    module.drop.p = 0.5
    model.train()
    seen = []
    module.img_projection_up.register_forward_hook(lambda *_: seen.append(1))
    torch.manual_seed(4)
    expected, _ = embedded(model, given)
    vlmops.patch(model)
    torch.manual_seed(4)
    seen.clear()
    got, _ = embedded(model, given)
    assert seen == [1]  # all pictures at once
    assert_agree(got, expected, "with dropout")
    assert (got == 0).any()


def test_phi4_comes_back_as_it_was():
    model = build("phi4_multimodal")
    module, original = model.get_submodule(PATH), type(model.get_submodule(PATH))
    state = copy.deepcopy(model.state_dict())
    signature = inspect.signature(module.forward)
    vlmops.patch(model)
    assert type(module) is not original
    assert inspect.signature(module.forward) == signature
    assert type(pickle.loads(pickle.dumps(module))) is original
    assert vlmops.patch(model).counts == {"hd_transform": 1}  # patched already
    assert vlmops.unpatch(model) == 1
    assert type(module) is original
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_a_module_that_does_something_else_is_refused():
    model = build("phi4_multimodal")
    module = model.get_submodule(PATH)

    class Other(type(module)):
        def forward(
            self, input_ids, inputs_embeds, image_pixel_values, image_sizes=None,
            image_attention_mask=None,
        ):  # fmt: skip
            return 2 * super().forward(
                input_ids, inputs_embeds, image_pixel_values, image_sizes, image_attention_mask
            )

    module.__class__ = Other
    row = next(iter(vlmops.patch(model).rows))
    assert row.status == "refused"
    assert "its tokens are not those of hd_transform: they are off by" in row.reason


def test_what_parts_are_for_is_found_by_trying():
    """Newline and separator exchanged in name: the layout that is found has them right."""
    model = build("phi4_multimodal")
    module = model.get_submodule(PATH)
    parts = site.study(module, list(site._candidates(module)))
    assert (parts.newline, parts.separator) == (
        "sub_img_feature_extensor", "global_img_feature_extensor")  # fmt: skip
    assert (parts.first, parts.second) == ("img_projection_up", "img_projection_down")
    assert (parts.order, parts.tower) == ("sub_glb", "img_processor")
