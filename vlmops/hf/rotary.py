"""Reads the layout of a rotary embedding off a model's own code, by running it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.ops.mrope import Rotation

AXES = 3  # time, height, width
SIGNATURE = ["self", "x", "position_ids"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `vlmops.mrope` needs to know about a model."""

    freq_axis: tuple[int, ...]
    rotation: Rotation
    scaling: float


def on_cpu(rotary: Any) -> Any:
    """A copy to experiment with: dynamic rope types change their own buffers when called."""
    config = getattr(rotary, "config", None)
    if rotary.inv_freq.device.type == "meta":
        with torch.device("cpu"):
            return type(rotary)(config=config)
    memo = {} if config is None else {id(config): config}
    return copy.deepcopy(rotary, memo).to("cpu")


def takes_axes(rotary: nn.Module) -> bool:
    """Whether rotary takes position_ids [A, B, S] and returns cos and sin [B, S, width]."""
    if list(inspect.signature(type(rotary).forward).parameters) != SIGNATURE:
        return False
    try:
        probe = on_cpu(rotary)
        out = type(probe).forward(
            probe, torch.zeros(1, 1, 1, dtype=torch.float32), torch.zeros(AXES, 1, 2).long()
        )
    except Exception:  # asked with what it was not written for, foreign code may raise anything
        return False
    return (
        isinstance(out, tuple)
        and len(out) == 2
        and all(isinstance(t, Tensor) and t.dim() == 3 and t.shape[:2] == (1, 2) for t in out)
    )


def read_layout(rotary: Any, apply: Callable[..., Any]) -> Layout | str:
    """The layout of a rotary module and of the function that applies its cosines and sines.

    One-hot positions show which axis drives each frequency: token 0 is at position 0 on every axis,
    token 1 + a at position 1 on axis a alone. A one-hot query turned by 90 degrees shows which
    channel is the partner of channel 0.

    Args:
        rotary: From `on_cpu`.
        apply: ``apply(q, k, cos, sin)``.

    Returns:
        The layout, or what is unusual about it.
    """
    inv_freq = rotary.inv_freq.float()
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    frequencies = len(inv_freq)
    one_hot = torch.cat((torch.zeros(AXES, 1), torch.eye(AXES)), dim=1).long()[:, None]
    cos, sin = type(rotary).forward(
        rotary, torch.zeros(1, 1, 1, dtype=torch.float32), one_hot
    )  # [1, 1 + A, width]
    if cos.shape[-1] != 2 * frequencies:
        return f"cos has {cos.shape[-1]} channels for {frequencies} frequencies"
    driven = sin[0, 1:, :frequencies]  # [A, R]: sin(inv_freq) on the axis that drives, else 0
    axis = driven.abs().argmax(dim=0)
    expected = nn.functional.one_hot(axis, AXES).T * inv_freq.sin() * scaling
    if not torch.allclose(driven, expected, rtol=1e-5, atol=0):
        return "its channels are not driven by one axis and one frequency each"

    query = torch.zeros(1, 1, 1, 2 * frequencies, dtype=torch.float32)
    query[..., 0] = 1
    turned, _ = apply(query, query, torch.zeros_like(cos[:, :1]), torch.ones_like(sin[:, :1]))
    partner = turned.flatten().nonzero().flatten().tolist()
    rotations: dict[int, Rotation] = {frequencies: "half", 1: "pairs"}
    if len(partner) != 1 or partner[0] not in rotations:
        return f"it turns channel 0 into channels {partner}: neither halves nor pairs"
    return Layout(tuple(axis.tolist()), rotations[partner[0]], scaling)
