"""What the modules share: checks of what they are given, products, activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.hf.plain import bypassable
from vlmops.ops.add_norm import add_norm
from vlmops.ops.linear import linear


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "squared_relu": _squared_relu,
}
"""By name; "gelu" is the exact one."""


def require_activation(module: str, name: str) -> None:
    """Raises ValueError unless there is an activation of this name."""
    if name not in ACTIVATIONS:
        raise ValueError(
            f"vlmops.nn.{module}: activation: expected one of {', '.join(ACTIVATIONS)}, "
            f"got {name!r}"
        )


def require_heads(module: str, hidden_size: int, num_heads: int) -> None:
    """Raises ValueError unless heads divide hidden_size into what attention takes."""
    if hidden_size % (8 * num_heads) or hidden_size > 256 * num_heads:
        raise ValueError(
            f"vlmops.nn.{module}: hidden_size: expected num_heads times a multiple of 8 up to 256, "
            f"got {hidden_size} with num_heads {num_heads}"
        )


def require(module: str, name: str, x: Tensor, sizes: tuple[int | str, ...], like: Tensor) -> None:
    """Raises ValueError unless a tensor fits.

    Args:
        module: Of ``vlmops.nn``.
        name: The argument's.
        x: What was given.
        sizes: Its shape: numbers, and names of sizes that may be any.
        like: Has the dtype that it must have, but under autocast, which casts.
    """
    fits = x.ndim == len(sizes) and all(
        isinstance(size, str) or n == size for n, size in zip(x.shape, sizes, strict=True)
    )
    if not fits:
        shape = f"[{', '.join(map(str, sizes))}]"
        raise ValueError(f"vlmops.nn.{module}: {name}: expected shape {shape}, got {list(x.shape)}")
    if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"vlmops.nn.{module}: {name}: expected {like.dtype}, got {x.dtype}")


def require_mask(module: str, name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a mask, if there is one, is bool and of this shape."""
    if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
        raise ValueError(
            f"vlmops.nn.{module}: {name}: expected torch.bool of shape {list(shape)}, got "
            f"{mask.dtype} of shape {list(mask.shape)}"
        )


def require_lengths(module: str, name: str, lengths: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless lengths, if there are any, are whole numbers of this shape."""
    whole = torch.int32, torch.int64
    if lengths is not None and (lengths.shape != shape or lengths.dtype not in whole):
        raise ValueError(
            f"vlmops.nn.{module}: {name}: expected torch.int32 or torch.int64 of shape "
            f"{list(shape)}, got {lengths.dtype} of shape {list(lengths.shape)}"
        )


def product(layer: Any, x: Tensor, activation: str | None = None) -> Tensor:
    """``activation(layer(x))``, of a ``torch.nn.Linear`` by `vlmops.ops.linear`.

    What has become of the layer since (an adapter's or a quantiser's, one with hooks) is called.
    """
    fused: Any = None if activation == "squared_relu" else activation
    if bypassable(layer, nn.Linear):
        out = linear(x, layer.weight, layer.bias, activation=fused)
        if activation == fused:
            return out
    else:
        out = layer(x)
    return out if activation is None else ACTIVATIONS[activation](out)


def normed_sum(layer: Any, x: Tensor, residual: Tensor, norm: Any, return_sum: bool = False) -> Any:
    """``norm(layer(x) + residual)``, and the sum if wanted; a bias is added where the residual is.

    Under autocast the sum has the residual's dtype, as torch's has.

    Args:
        layer: A ``torch.nn.Linear``, or what has become of it.
        x: ``[B, S, K]``.
        residual: ``[B or 1, S, C]``.
        norm: A ``torch.nn.LayerNorm``.
        return_sum: Whether to return ``(normed, sum)``.
    """
    plain = bypassable(layer, nn.Linear)
    out = linear(x, layer.weight) if plain else layer(x)
    return add_norm(
        out.to(residual.dtype),
        residual,
        norm.weight,
        norm.bias,
        x_bias=layer.bias if plain else None,
        eps=norm.eps,
        return_sum=return_sum,
    )
