"""`vlmops.gated_cross_attention` where text attends to tiles or images.

Modules are found, and their attention replaced, as those of `vlmops.hf.sites.packed_attention`;
the mask of tiles or images travels as it is, and nothing is expanded. Besides, the norms of q and k
become one call each, and what a decoder projects anew from the same images in each step of
generation is kept (`vlmops.hf.kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import kept, norms, plain, rehearsal
from vlmops.hf.rebind import innermost, original_class
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site, packed_attention
from vlmops.ops.linear import has_alternative, linear
from vlmops.ops.linear_tuning import gains, tune

OP = "gated_cross_attention"


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Attention of text to visual tokens, by class, and the decoder that makes its mask."""
    return packed_attention.find_groups(model, OP)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    classes = packed_attention.adapt(place)
    details: packed_attention.Details = place.details
    for module in details.attentions:
        of_keys = _projections(module) if details.kind == "media" else []
        for name, child in module.named_children():
            if name in of_keys:
                classes[child] = kept.keeping_class(child, _product(child))
            elif (found := norms.rms_norm(child)) is not None and norms.defers(child):
                compute = norms.of_heads(*found, type(child).forward)
                if details.kind == "media":
                    classes[child] = kept.keeping_class(child, compute)
                else:
                    classes[child] = norms.heads_class(child, compute)
    return classes


def _projections(module: Any) -> list[str]:
    """The plain linear layers that are given the visual tokens."""
    made = rehearsal.twin(module)
    given: dict[str, list[Tensor]] = {}
    for name, child in made.named_children():
        if hasattr(child, "_given"):
            child._given = given[name] = []
    visual = torch.randn(1, rehearsal.TOKENS, 1)  # stand-ins take any width
    forward = innermost((original_class(module) or type(module)).forward)
    rehearsal.run(forward, made, False, key_value_states=visual)
    return [
        name
        for name, inputs in given.items()
        if any(x is visual for x in inputs)
        and plain.refusal(getattr(module, name), nn.Linear) is None
    ]


def _product(module: Any) -> Callable[[Any, Tensor], Tensor]:
    """The product of a linear layer that `vlmops.hf.sites.linear` leaves to this."""
    weight = module.weight
    if weight.device.type != "cpu" or not has_alternative(weight.dtype):
        return nn.Linear.forward
    tune([weight])
    return _fast if gains(weight.dtype, *weight.shape) else nn.Linear.forward


def _fast(self: Any, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)


SITE = Site(OP, find, adapt, packed_attention.check)
