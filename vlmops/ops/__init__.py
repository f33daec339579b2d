"""The ops. ``__all__`` is the one list of them: one name, one stem, everywhere in the tree."""

from __future__ import annotations

import importlib

from vlmops.ops.spec import Spec

__all__ = [
    "add_norm",
    "gated_cross_attention",
    "gated_residual",
    "hd_transform",
    "mlp_projector",
    "mrope",
    "packed_attention",
    "patch_embed",
    "perceiver_attention",
    "pixel_shuffle",
    "qformer_attention",
    "spatial_aggregate",
]


def spec(op: str) -> Spec:
    """The SPEC of an op, from ``vlmops/ops/<op>_spec.py``.

    Raises:
        ValueError: there is no such op.
    """
    if op not in __all__:
        raise ValueError(f"op: expected one of {', '.join(__all__)}, got {op!r}")
    found: Spec = importlib.import_module(f"vlmops.ops.{op}_spec").SPEC
    return found
