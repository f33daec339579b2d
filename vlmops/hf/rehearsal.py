"""Runs an attention module on a few tokens, whatever its size and wherever its weights are.

Its linear layers are stood in for by modules that return noise of the right width and remember what
they were given, so that no matrix product takes place; what remains is the module's own forward.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 5
_SMALL = 1 << 16  # elements of a parameter that is drawn anew


class ImpossibleError(Exception):
    """Why a module cannot be rehearsed, in words that follow a colon."""


class _StandIn(nn.Module):
    """A linear layer that returns noise, the same in every rehearsal."""

    def __init__(self, linear: Any, seed: int, given: list[Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._seed, self._given = seed, given

    def forward(self, x: Tensor) -> Tensor:
        self._given.append(x)
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randn(*x.shape[:-1], self.out_features, generator=generator)


class Sparse(nn.Module):
    """Stands for a linear layer of any size: each of its results is a sum over four channels."""

    def __init__(self, linear: Any, seed: int, _: list[Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        draw = torch.Generator().manual_seed(seed)
        shape = 4, self.out_features
        self._index = torch.randint(self.in_features, shape, generator=draw)
        self._factor, bias = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        self.weight = torch.zeros(()).expand(self.out_features, self.in_features)
        self.bias = None if getattr(linear, "bias", None) is None else bias[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.in_features} channels were expected, not {x.shape[-1]}")
        out = sum(x[..., i] * f for i, f in zip(self._index, self._factor, strict=True))
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or whatever others have put in the place of one."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def twin(
    module: Any,
    given: list[Tensor] | None = None,
    seed: int = 0,
    stand_in: Callable[[Any, int, list[Tensor]], nn.Module] = _StandIn,
) -> Any:
    """A module of the same class in float32 on the CPU, with stand-ins for its linear layers.

    Args:
        module: The original, which is not touched.
        given: Collects what the stand-ins are given, in order.
        seed: Of the stand-in, if the module is a linear layer itself.
        stand_in: Makes one of a linear layer, a seed and ``given``.
    """
    given = [] if given is None else given
    if is_linear(module):
        return stand_in(module, seed, given)
    made: Any = type(module).__new__(type(module))  # type: ignore[call-overload]
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward"})
    for name, value in module.__dict__.items():
        if isinstance(value, OrderedDict) and name.endswith("_hooks"):
            made.__dict__[name] = OrderedDict()
    made._parameters = {name: _drawn(p) for name, p in module._parameters.items()}
    made._buffers = {name: _drawn(b) for name, b in module._buffers.items()}
    made._modules = {
        name: None if child is None else twin(child, given, seed, stand_in)
        for seed, (name, child) in enumerate(module._modules.items())
    }
    if getattr(module, "config", None) is not None:
        made.config = copy.copy(module.config)
        # A string would reach the configs inside it, which the copy shares with the model.
        made.config._attn_implementation = {"": "eager"}
    made.training = False
    return made


def _drawn(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    if tensor.numel() > _SMALL:
        raise ImpossibleError(f"it has a parameter of shape {list(tensor.shape)} of its own")
    if not tensor.is_floating_point():
        return tensor.new_zeros(tensor.shape, device="cpu")
    generator = torch.Generator().manual_seed(tensor.numel())
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    return nn.Parameter(drawn, False) if isinstance(tensor, nn.Parameter) else drawn


def positions(forward: Callable[..., Any]) -> list[str]:
    """The parameters of an attention module's forward that take what its rotary module made."""
    known = ("position_embeddings", "freqs_ci")
    return [name for name in inspect.signature(forward).parameters if name in known]


def run(forward: Callable[..., Any], attention: nn.Module, packed: bool, **given: Any) -> None:
    """Calls a forward of a module from `twin`.

    Args:
        forward: A function ``forward(self, ...)`` with the module's signature.
        attention: From `twin`.
        packed: Whether its hidden states are ``[N, C]``, not ``[B, S, C]``.
        given: Arguments by name; the others are made up.

    Raises:
        ImpossibleError: it wants what is not known here, or raises.
    """
    widths = [m.in_features for m in attention.modules() if isinstance(m, _StandIn)]
    if not widths:
        raise ImpossibleError("it has no linear layers")
    shape = (TOKENS, widths[0]) if packed else (1, TOKENS, widths[0])
    hidden_states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    known = {
        "hidden_states": hidden_states,
        "attention_mask": None,
        "position_ids": torch.arange(TOKENS)[None],
        "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
        "max_seqlen": TOKENS,
        "shared_kv_states": {},
        "cross_attention_states": hidden_states,
        **given,
    }
    parameters = inspect.signature(forward).parameters
    known = {name: value for name, value in known.items() if name in parameters}
    try:
        with torch.no_grad():
            forward(attention, **known)
    except Exception as error:  # asked with what it was not written for, it may raise anything
        if "key_value_states" not in parameters or "key_value_states" in known:
            raise ImpossibleError(f"its forward raised {error!r}") from error
        run(forward, attention, packed, **given, key_value_states=hidden_states)
