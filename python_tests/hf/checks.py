"""How a model is run before and after patching, and how the results are compared."""

import copy
import inspect
import io
import pickle

import torch
from dispatch import CountOps
from hf.tiny import build, inputs, run

import vlmops

BATCHES = {
    "text": [[9], [9]],
    "left_padded": [[3, (2, 3), 5, (4, 2), 2], [4, (2, 2), 3]],
    "right_padded": [[3, (2, 3), 5, (4, 2), 2], [4, (2, 2), 3]],
    "several_images": [[3, (2, 3), 5, (4, 2), 2]],
}


def batch_of(family, name, dtype=torch.float32):
    pad = "right" if name == "right_padded" else "left"
    return inputs(family, BATCHES[name], dtype, pad)


def gradients(model, batch, **kwargs):
    """Logits of the tokens that are not padding, and gradients of a random functional of them."""
    model.zero_grad()
    logits = run(model, batch, **kwargs).logits[batch["attention_mask"].bool()]
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(upstream.to(logits))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def assert_agree(got, expected, what, floor=1e-30):
    """Within float32 noise of a few layers, relative to the largest element."""
    error = (got - expected).abs().max() / expected.abs().max().clamp_min(floor)
    assert error < 2e-5, f"{what}: relative error {error:.3g}"


def assert_gradients_agree(got, expected, at_least=20):
    assert got.keys() == expected.keys()
    assert len(expected) >= at_least
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for parameter, grad in expected.items():
        # Some are zero but for rounding (a bias of k where nothing is rotated). A gate's is one sum
        # that cancels: Hugging Face's own float32 is 2e-4 off there.
        floor = largest * (0.1 if grad.numel() == 1 else 0.01)
        assert_agree(got[parameter], grad, parameter, floor)


def assert_bfloat16_is_right(model, batch, batch16, op, calls):
    """A bfloat16 model, patched, is at most twice as far off as Hugging Face's."""
    with torch.no_grad():
        exact = run(copy.deepcopy(model).float(), batch).logits
        theirs = run(model, batch16).logits
        vlmops.patch(model)
        with CountOps() as ran:
            ours = run(model, batch16).logits
    assert ran.counts[op] == calls
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()


def assert_twin_copies_and_pickles(family, tmp_path):
    """`assert_left_alone` of a family's tiny model."""
    model, twin = build(family), build(family)
    return assert_left_alone(model, twin, batch_of(family, "several_images"), tmp_path)


def assert_left_alone(model, twin, batch, tmp_path):
    """What patching a model leaves alone, what copies it, and what undoes it; the twin is equal.

    Returns the report, and how many modules were restored at the end.
    """
    classes = [type(m) for m in model.modules()]
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = run(twin, batch).logits
        report = vlmops.patch(model)
        data, buffer = pickle.dumps(model), io.BytesIO()
        torch.save(model, buffer)
        assert b"vlmops" not in data + buffer.getvalue()
        assert vlmops.unpatch(pickle.loads(data)) == 0
        logits = run(model, batch).logits
        assert torch.equal(run(twin, batch).logits, expected)
        assert list(model.state_dict()) == keys
        assert [inspect.signature(m.forward) for m in model.modules()] == signatures
        for patched in (model, copy.deepcopy(model)):
            again = vlmops.patch(patched)
            assert again.counts == report.counts
            assert {row.status for row in again.rows} == {"already patched"}
            assert torch.equal(run(patched, batch).logits, logits)
        model.save_pretrained(tmp_path)
        attention = model.config._attn_implementation
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention).eval()
        vlmops.patch(loaded)
        assert torch.equal(run(loaded, batch).logits, logits)
        restored = vlmops.unpatch(model)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(run(model, batch).logits, expected)
    return report, restored


def image_features(model, batch):
    accepted = inspect.signature(model.base_model.get_image_features).parameters
    given = {name: value for name, value in batch.items() if name in accepted}
    strategy = accepted.get("vision_feature_select_strategy")
    if strategy is not None and strategy.default is inspect.Parameter.empty:  # transformers 5.17
        given["vision_feature_select_strategy"] = "default"
    out = model.base_model.get_image_features(**given)
    features = out.last_hidden_state if out.pooler_output is None else out.pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))
