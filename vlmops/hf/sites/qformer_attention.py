"""`vlmops.qformer_attention` in Q-Formers.

Modules are found, and their attention replaced, as those of `vlmops.hf.sites.packed_attention`:
those whose forward may be given the tokens of an encoder and keeps no cache. Self-attention among
queries and instruction is the same class. Masks that torch's own attention is given say which keys
are seen, and are handed on; others run the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site, packed_attention

OP = "qformer_attention"


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Attention modules of one class, cross-attention and self-attention apart."""
    return packed_attention.find_groups(model, OP)


SITE = Site(OP, find, packed_attention.adapt, packed_attention.check)
