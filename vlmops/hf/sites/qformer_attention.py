"""`vlmops.qformer_attention` in Q-Formers, and where a module writes attention out.

Q-Formers are found, and their attention replaced, as those of `vlmops.hf.sites.packed_attention`:
modules whose forward may be given the tokens of an encoder and keeps no cache. Self-attention among
queries and instruction is the same class. Masks that torch's own attention is given say which keys
are seen, and are handed on; others run the model's own code. Modules that call no attention
function (BLIP's text, Perceiver) are those of `vlmops.hf.eager_modules`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vlmops.hf import eager_modules
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site, packed_attention

OP = "qformer_attention"


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Attention modules of one class, cross-attention and self-attention apart."""
    yield from packed_attention.find_groups(model, OP)
    yield from eager_modules.find(model, OP)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    if isinstance(place.details, eager_modules.Details):
        return eager_modules.adapt(place, OP)
    return packed_attention.adapt(place)


def check(place: Place) -> str | None:
    """See `Site.check`."""
    if isinstance(place.details, eager_modules.Details):
        return eager_modules.check(place)
    return packed_attention.check(place)


SITE = Site(OP, find, adapt, check)
