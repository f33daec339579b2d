"""Sites: where in a model an op belongs. Found by structure, adapted, and checked numerically."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Place:
    """Modules that change together, found by a site."""

    path: str
    module: str
    """Class name of the modules that call the op."""
    sites: int
    details: Any = None
    """What the site's own adapt and check need."""
    backend: str | None = None
    """What the op runs on there; None for the kernels of this build."""
    note: str = ""
    """For the report: what else is fused, or was not."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A place that looks right and cannot be patched."""

    place: Place
    reason: str


@dataclasses.dataclass(frozen=True)
class LeftAlone(Refused):
    """A place that could be patched and would gain nothing."""


@dataclasses.dataclass(frozen=True)
class AlreadyPatched:
    """A place whose modules carry our classes."""

    place: Place


@dataclasses.dataclass(frozen=True)
class Site:
    """How one op gets into models."""

    op: str
    find: Callable[[nn.Module], Iterator[Place | Refused | AlreadyPatched]]
    adapt: Callable[[Place], dict[nn.Module, type[nn.Module]]]
    """The class that each module gets."""
    check: Callable[[Place], str | None]
    """Compares with the model's own code on a tiny input; the reason if they differ."""


def all_sites() -> dict[str, Site]:
    """Op -> site."""
    from vlmops.hf.sites import (
        add_norm,
        gated_cross_attention,
        gated_residual,
        hd_transform,
        linear,
        mlp_projector,
        mrope,
        packed_attention,
        patch_embed,
        perceiver_attention,
        pixel_shuffle,
        qformer_attention,
    )

    # Linear layers last: those that another op has absorbed are not theirs.
    sites = (
        mrope.SITE,
        patch_embed.SITE,
        pixel_shuffle.SITE,
        hd_transform.SITE,
        mlp_projector.SITE,
        packed_attention.SITE,
        gated_cross_attention.SITE,
        qformer_attention.SITE,
        perceiver_attention.SITE,
        gated_residual.SITE,
        add_norm.SITE,
        linear.SITE,
    )
    return {site.op: site for site in sites}
