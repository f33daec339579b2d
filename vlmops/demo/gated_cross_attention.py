"""Teaches a small language model to look at images, by gated cross-attention.

    python -m vlmops.demo.gated_cross_attention [--steps 60]

A Llama of random weights is frozen, and `vlmops.nn.GatedCrossAttentionBlock` goes in front of every
second layer. Texts have two images each, of one of eight kinds: noise around a pattern, as a vision
tower would return it. After each image the model has to say what it shows. With its gates closed
it says what it said without them; once trained, it has looked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.nn import GatedCrossAttentionBlock, image_mask

KINDS, VISUAL, TOKENS, IMAGES = 8, 48, 9, 2
IMAGE, ASK = KINDS, KINDS + 1
"""Tokens: an image stands here, and the question what it shows."""


class WithImages(nn.Module):
    """A layer of a decoder, and the gated one in front of it."""

    def __init__(self, layer: nn.Module, block: GatedCrossAttentionBlock) -> None:
        super().__init__()
        self.layer, self.block = layer, block
        self.seen: dict[str, Any] = {"visual_states": None}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the decoder's own layers."""
        return self.layer(self.block(hidden_states, **self.seen), *args, **kwargs)


def small_model() -> Any:
    """A Llama of random weights that nobody trains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=KINDS + 2, initializer_range=0.1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def add_images(model: Any) -> list[WithImages]:
    """Puts a gated layer in front of every second layer of a decoder."""
    layers, size = model.model.layers, model.config.hidden_size
    for i in range(0, len(layers), 2):
        layers[i] = WithImages(layers[i], GatedCrossAttentionBlock(size, VISUAL, num_heads=4))
    return [layer for layer in layers if isinstance(layer, WithImages)]


Batch = tuple[Tensor, Tensor, Tensor]


def batches(
    rows: int, draw: torch.Generator, shape: tuple[int, ...] = (TOKENS, VISUAL)
) -> Iterator[Batch]:
    """Texts ``[B, S]``, what each image shows ``[B, images]``, and the images."""
    patterns = torch.randn(KINDS, *shape, generator=draw)
    while True:
        kinds = torch.randint(KINDS, (rows, IMAGES), generator=draw)
        noise = torch.randn(rows, IMAGES, *shape, generator=draw)
        text = torch.tensor([IMAGE, ASK] * IMAGES).expand(rows, -1)
        yield text, kinds, patterns[kinds] + 0.5 * noise


def answer(model: Any, layers: list[WithImages], text: Tensor, images: Tensor) -> Tensor:
    """Logits of what each image shows, ``[B, images, kinds]``."""
    seen = {"visual_states": images, "block_mask": image_mask(text == IMAGE, IMAGES)}
    for layer in layers:
        layer.seen = seen
    return asked(model(input_ids=text, use_cache=False).logits, text)


def asked(logits: Tensor, text: Tensor) -> Tensor:
    """Those of kinds where a text asks for one, ``[B, images, kinds]``."""
    at: Tensor = logits[text == ASK].unflatten(0, (len(text), IMAGES))
    return at[..., :KINDS]


def loss_of(answers: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of what ``answers(text, images)`` says that images show."""
    text, kinds, images = batch
    return functional.cross_entropy(answers(text, images).flatten(0, 1), kinds.flatten())


def learn(
    parameters: Iterable[nn.Parameter],
    answers: Callable[[Tensor, Tensor], Tensor],
    data: Iterable[Batch],
    steps: int,
) -> list[float]:
    """Loss of each step."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    losses = []
    for _, batch in zip(range(steps), data, strict=False):
        loss = loss_of(answers, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(steps: int = 60, rows: int = 32) -> list[float]:
    """Loss of each step."""
    torch.manual_seed(0)
    model = small_model()
    draw = torch.Generator().manual_seed(0)
    data = batches(rows, draw)
    text, _, images = next(data)
    before = model(input_ids=text, use_cache=False).logits[text == ASK][..., :KINDS]
    layers = add_images(model)
    with torch.no_grad():
        closed = answer(model, layers, text, images)
    if not torch.equal(closed.flatten(0, 1), before):
        raise RuntimeError("closed gates changed the model; please report it")
    trained = [p for layer in layers for p in layer.block.parameters()]
    return learn(trained, lambda text, images: answer(model, layers, text, images), data, steps)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    losses = train(steps)
    print(f"{'step':>5}  loss (chance: {torch.tensor(float(KINDS)).log():.2f})")
    for step in range(0, steps, 10):
        print(f"{step:5}  {losses[step]:.3f}")
    print(f"{steps - 1:5}  {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
