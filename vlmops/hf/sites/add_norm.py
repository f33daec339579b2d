"""`vlmops.add_norm` at the ends of blocks with norms behind: Q-Formers', BLIP's text, BERT's.

Found are modules whose forward is ``norm(dropout(linear(x)) + residual)`` and nothing besides: it
names no more than these layers, and gives on noise what they give. The linear layer is called as
it is, whatever it has become; small tensors, dropout in training, autocast, torch.compile and hooks
run the module's own code.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.hf import plain, rehearsal
from vlmops.hf.eager_modules import difference, forward_of, key_of, refusal
from vlmops.hf.rebind import ops_of, original_class, references, subclass
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.hf.sites.packed_attention import starred
from vlmops.ops.add_norm import add_norm

OP = "add_norm"
SMALL = 1 << 15
"""Elements below which the calls of a sum and a norm cost less than asking whether to join them."""
SMALL_RECORDED = 1 << 20
"""The same where autograd records: backward of 256 rows of 768 takes 60 us more than torch's."""
_DROPS = "in training with dropout its own code"


@dataclasses.dataclass(frozen=True)
class _Block:
    """Names of a module's layers."""

    linear: str
    norm: str
    dropout: str | None


@dataclasses.dataclass(frozen=True)
class _Details:
    modules: tuple[nn.Module, ...]
    block: _Block


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Modules of one class at one place of a model's layers."""
    groups: dict[tuple[str, type, _Block], list[Any]] = {}
    for path, module in model.named_modules():
        block = _study(module)
        if block is not None:
            kind = original_class(module) or type(module)
            group = groups.setdefault((starred(path), kind, block), [])
            if module not in group:
                group.append(module)
    for (path, _, block), modules in groups.items():
        details = _Details(tuple(modules), block)
        drops = block.dropout is not None and getattr(modules[0], block.dropout).p > 0
        name, note = type(modules[0]).__name__, _DROPS if drops else ""
        place = Place(path, name, len(modules), details, note=note)
        if all(OP in ops_of(module) for module in modules):
            yield AlreadyPatched(place)
            continue
        reasons = (plain.refusal(getattr(m, block.norm), nn.LayerNorm) for m in modules)
        reason = refusal(modules, OP) or next(filter(None, reasons), None)
        yield place if reason is None else Refused(place, reason)


_studied: dict[Hashable, _Block | None] = {}


def _study(module: nn.Module) -> _Block | None:
    """The layers of a module, if it is a block."""
    names: dict[str, list[str]] = {"linear": [], "norm": [], "dropout": [], "other": []}
    for name, child in module.named_children():
        norm = isinstance(child, nn.LayerNorm) and len(child.normalized_shape) == 1
        kind = "norm" if norm else "dropout" if isinstance(child, nn.Dropout) else "other"
        names["linear" if rehearsal.is_linear(child) else kind].append(name)
    if [len(names[kind]) for kind in ("linear", "norm", "other")] != [1, 1, 0]:
        return None
    if len(names["dropout"]) > 1:
        return None
    forward = forward_of(module)
    if forward is None or len(inspect.signature(forward).parameters) != 3:
        return None
    if not set(forward.__code__.co_names) <= {name for found in names.values() for name in found}:
        return None
    block = _Block(names["linear"][0], names["norm"][0], next(iter(names["dropout"]), None))
    key = key_of(module)
    if key not in _studied:
        expected = _run(module, block, lambda h, residual, norm: norm(h + residual))
        own = _run(module, block, None)
        same = own is not None and expected is not None and torch.equal(own, expected)
        _studied[key] = block if same else None
    return _studied[key]


def _run(
    module: Any, block: _Block, finish: Callable[[Tensor, Tensor, Any], Tensor] | None
) -> Tensor | None:
    """What a module makes of noise; None if it raises.

    Args:
        module: In the place of which a twin is run.
        block: Its layers.
        finish: ``(h, residual, norm)``: does what follows the linear layer; None: the module.
    """
    try:
        made = rehearsal.twin(module)
        draw = torch.Generator().manual_seed(0)
        linear, norm = getattr(made, block.linear), getattr(made, block.norm)
        x = torch.randn(2, rehearsal.TOKENS, linear.in_features, generator=draw)
        residual = torch.randn(2, rehearsal.TOKENS, linear.out_features, generator=draw)
        with torch.no_grad():
            if finish is None:
                own: Tensor = forward_of(module)(made, x, residual)
                return own
            return finish(linear(x), residual, norm)
    except Exception:  # foreign code, asked with what it was not written for
        return None


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    details: _Details = place.details
    return {module: _class(module, details.block) for module in details.modules}


def _class(module: nn.Module, block: _Block) -> type[nn.Module]:
    original: Any = type(module)
    inner = original.forward
    signature = inspect.signature(inner)
    names = list(signature.parameters)[1:]

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if len(given) != 2 or not _serves(self, block, given.get(names[1])):
                return inner(self, *args, **kwargs)
            x, residual = (given[name] for name in names)
            h, norm = getattr(self, block.linear)(x), getattr(self, block.norm)
            if _fits(h, residual, norm):
                return _finish(h, residual, norm)
            return norm(h + residual)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    key = (OP, block, inner, references(forward_of(module)))
    return subclass(original, key, make_forward)


def _serves(module: Any, block: _Block, residual: Any) -> bool:
    """Whether nobody can tell in this call that sum and norm are one step."""
    if torch.compiler.is_compiling() or type(residual) is not Tensor:
        return False
    if residual.numel() < (SMALL_RECORDED if torch.is_grad_enabled() else SMALL):
        return False
    if torch.nn.modules.module._has_any_global_hook():
        return False
    if block.dropout is not None:
        dropout = getattr(module, block.dropout)
        if plain.watched(dropout) or (dropout.training and dropout.p > 0):
            return False
    device = residual.device.type
    # Under autocast a norm is computed, and returned, in float32.
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    return plain.bypassable(getattr(module, block.norm), nn.LayerNorm)


def _fits(h: Any, residual: Tensor, norm: Any) -> bool:
    """Whether the op takes what was computed."""
    if type(h) is not Tensor or h.shape != residual.shape or h.dtype != residual.dtype:
        return False
    vectors = plain.tensors(norm)
    return all(v.dtype == h.dtype for v in vectors) and plain.runs(OP, (h, residual, *vectors))


def _finish(h: Tensor, residual: Tensor, norm: Any) -> Tensor:
    return add_norm(h, residual, norm.weight, norm.bias, eps=norm.eps)


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs a block with the op and without; once per class and shapes."""
    details: _Details = place.details
    for module in details.modules:
        key = key_of(module)
        if key not in _checked:
            own, ours = (_run(module, details.block, how) for how in (None, _finish))
            if own is None or ours is None:
                return f"{type(module).__name__} cannot be rehearsed"
            _checked[key] = difference(type(module).__name__, (ours,), (own,))
        if _checked[key] is not None:
            return _checked[key]
    return None


SITE = Site(OP, find, adapt, check)
