"""How a model is run before and after patching, and how the results are compared."""

import torch
from hf.tiny import inputs, run

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
