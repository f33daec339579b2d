"""Trains a small vision-language model with each connector, a few steps.

    python -m vlmops.demo.connectors [--connector qformer] [--steps 30]

A CLIP tower and a Llama of random weights are frozen, and what connects them learns what pictures
of eight kinds show. Most connectors make tokens that stand in the text; gated cross-attention looks
at the tower's from within the language model. Loss is that of pictures that nobody trained on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vlmops
from vlmops.demo.gated_cross_attention import (
    IMAGE,
    KINDS,
    VISUAL,
    add_images,
    answer,
    asked,
    batches,
    learn,
    loss_of,
    small_model,
)
from vlmops.nn import (
    PerceiverResampler,
    QFormerLayer,
    QwenVLResampler,
    SpatialVisionAggregator,
)

PIXELS, PATCH = 16, 4
SIDE = PIXELS // PATCH
"""Tokens on a side of a picture."""

Features = Sequence[Tensor]
"""Of the tower's first and last layer, ``[N, SIDE * SIDE, VISUAL]``."""


class Linear(nn.Module):
    """One projection (LLaVA)."""

    def __init__(self, visual_size: int, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(visual_size, hidden_size)

    def forward(self, features: Features) -> Tensor:
        """``[N, S, hidden_size]``, as all have it, with S of their own."""
        projected: Tensor = self.project(features[-1])
        return projected


class MLP(nn.Module):
    """Two layers (LLaVA-1.5)."""

    def __init__(self, visual_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(visual_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Features) -> Tensor:
        """See `Linear`."""
        first, second = self.linear_1, self.linear_2
        return vlmops.mlp_projector(
            features[-1], first.weight, first.bias, second.weight, second.bias, activation="gelu"
        )


class QFormer(nn.Module):
    """Learned queries, and layers of which every second one looks at the picture (BLIP-2)."""

    def __init__(self, visual_size: int, hidden_size: int, queries: int = 8) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, hidden_size))
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_size, looks, num_heads=4) for looks in (visual_size, None)
        )
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Features) -> Tensor:
        """See `Linear`."""
        queries: Tensor = self.queries
        for layer in self.layers:
            queries, _ = layer(queries, features[-1])
        projected: Tensor = self.project(queries)
        return projected


class Perceiver(nn.Module):
    """Latents that look at the picture and at each other (Flamingo, Idefics)."""

    def __init__(self, visual_size: int, hidden_size: int) -> None:
        super().__init__()
        self.resampler = PerceiverResampler(
            visual_size, depth=2, num_heads=4, head_dim=16, num_latents=8
        )
        self.project = nn.Linear(visual_size, hidden_size)

    def forward(self, features: Features) -> Tensor:
        """See `Linear`."""
        pictures = features[-1][:, None, None]  # one medium of one frame each
        projected: Tensor = self.project(self.resampler(pictures)[:, 0])
        return projected


class QwenVL(QwenVLResampler):
    """Queries on a grid, one cross-attention (the first Qwen-VL)."""

    def __init__(self, visual_size: int, hidden_size: int) -> None:
        super().__init__(visual_size, hidden_size, grid_size=4, num_heads=4)

    def forward(self, features: Features) -> Tensor:  # type: ignore[override]
        """See `Linear`."""
        return super().forward(features[-1])


class SVA(SpatialVisionAggregator):
    """Queries that look at their windows of several maps (Cambrian-1)."""

    def __init__(self, visual_size: int, hidden_size: int) -> None:
        super().__init__(
            (visual_size,) * 2, (SIDE,) * 2, hidden_size,
            vision_hidden_size=32, grids=(2,), depth=1, num_heads=4,
        )  # fmt: skip


CONNECTORS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "linear": Linear,
    "mlp": MLP,
    "qformer": QFormer,
    "perceiver": Perceiver,
    "qwen_vl": QwenVL,
    "sva": SVA,
    "gated_cross_attention": None,  # layers of the language model itself
}


def small_tower() -> Any:
    """A CLIP tower of random weights that nobody trains."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=VISUAL, intermediate_size=2 * VISUAL, num_hidden_layers=2,
        num_attention_heads=3, image_size=PIXELS, patch_size=PATCH,
    )  # fmt: skip
    tower: Any = CLIPVisionModel(config)
    return tower.eval().requires_grad_(False)


class SmallVLM(nn.Module):
    """A tower, a connector and a language model, called alike whatever the connector.

    Args:
        connector: A name of `CONNECTORS`.
    """

    def __init__(self, connector: str) -> None:
        super().__init__()
        self.tower, self.language_model = small_tower(), small_model()
        make = CONNECTORS[connector]
        hidden_size = self.language_model.config.hidden_size
        self.connector = None if make is None else make(VISUAL, hidden_size)
        self.looking = add_images(self.language_model) if make is None else []

    def features(self, pixel_values: Tensor) -> list[Tensor]:
        """See `Features`; without the class token."""
        out = self.tower(pixel_values, output_hidden_states=True)
        return [out.hidden_states[i][:, 1:] for i in (0, -1)]

    def forward(self, text: Tensor, pixel_values: Tensor) -> Tensor:
        """Logits of what each picture shows, ``[B, images, kinds]``.

        Args:
            text: ``[B, S]``, a token for each picture among them; all rows alike.
            pixel_values: ``[B, images, 3, PIXELS, PIXELS]``.
        """
        features = self.features(pixel_values.flatten(0, 1))
        if self.connector is None:
            pictures = features[-1].unflatten(0, pixel_values.shape[:2])
            return answer(self.language_model, self.looking, text, pictures)
        tokens = self.connector(features)
        stands_for = torch.where(text[0] == IMAGE, tokens.shape[1], 1)
        text = text.repeat_interleave(stands_for, 1)
        embeds = self.language_model.get_input_embeddings()(text)
        embeds = embeds.masked_scatter((text == IMAGE)[..., None], tokens)
        return asked(self.language_model(inputs_embeds=embeds, use_cache=False).logits, text)


def train(connector: str, steps: int = 30, rows: int = 16) -> tuple[int, float, float]:
    """Number of parameters that learned; loss before and after."""
    torch.manual_seed(0)
    model = SmallVLM(connector)
    trained = [p for p in model.parameters() if p.requires_grad]
    data = batches(rows, torch.Generator().manual_seed(0), (3, PIXELS, PIXELS))
    unseen = next(data)
    with torch.no_grad():
        before = loss_of(model, unseen).item()
    learn(trained, model, data, steps)
    with torch.no_grad():
        after = loss_of(model, unseen).item()
    return sum(p.numel() for p in trained), before, after


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if a loss did not fall."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connector", choices=CONNECTORS, help="one alone; default: all")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(argv)
    names = [options.connector] if options.connector else list(CONNECTORS)
    print(f"{'connector':22} {'parameters':>10} {'before':>7} {'after':>7}  loss", end=" ")
    print(f"({options.steps} steps; chance: {math.log(KINDS):.2f})")
    stuck = []
    for name in names:
        parameters, before, after = train(name, options.steps)
        print(f"{name:22} {parameters:10,} {before:7.3f} {after:7.3f}", flush=True)
        if not after < before:
            stuck.append(name)
    if stuck:
        print(f"the loss did not fall with {', '.join(stuck)}; try more --steps", file=sys.stderr)
    return 1 if stuck else 0


if __name__ == "__main__":
    sys.exit(main())
