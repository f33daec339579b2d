"""Attention that is written out in a module's forward, followed until it is one call of an op.

Modules that call no attention function multiply q by k, scale, add a mask, take the softmax and
multiply by v, each in an order and with functions of its own. Their forward runs as it is, with
stand-ins (`vlmops.hf.lazy`) from q on, or from where two sequences of tokens are joined: what
is followed becomes one call of `vlmops.qformer_attention`, or of `vlmops.perceiver_attention`, to
which pieces are given as they are and never joined.

Masks that are added are looked at on the CPU, where all zeros are none and zeros beside the dtype's
minimum say who is seen. On a GPU nothing is read back: there a mask means the model's own steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from vlmops.hf import plain, rehearsal
from vlmops.hf.attentions import MAX_DIM, weights_wanted
from vlmops.hf.lazy import Compute, Lazy, StandIn, computed
from vlmops.ops.perceiver_attention import perceiver_attention
from vlmops.ops.qformer_attention import qformer_attention

Parts = tuple[Tensor, ...]
"""Keys or values, ``[B, H, S, D]``: one tensor, or two that follow each other along S."""
Attend = Callable[[Tensor, Parts, Parts, Tensor | None, float], Tensor | None]
"""``(q, k, v, mask, scale)`` -> ``[B, H, Q, D]``; None: the model's own steps have to do it."""

SMALL = 1 << 20
"""Multiplications of q and k below which following the model's own steps costs what it saves."""
_POINTWISE = (nn.Linear, nn.LayerNorm, rehearsal.Sparse)
"""Layers that treat each token alone, so that pieces of a sequence may be given to them."""
_PASSING = (nn.Dropout, nn.Softmax, nn.Identity)
"""Modules of torch's own that call a function that is followed."""


class _Step(Lazy):
    """Part of attention; once it has been computed, nothing of it is followed any more."""

    followed: ClassVar[Any] = {}

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """See `Lazy.value`."""
        if self._value is None:
            self._value = self._compute()
        return self._value


class Query(_Step):
    """q, or a view of it; a tensor that exists."""

    def __init__(self, tensor: Tensor, attend: Attend) -> None:
        """``attend``: what its attention becomes a call of."""
        super().__init__(lambda: tensor)
        self.tensor, self.attend = tensor, attend


class Segments(_Step):
    """Two tensors that are joined along a dimension, or what a layer made of each of them."""

    def __init__(self, compute: Compute, parts: Parts, dim: int, attend: Attend) -> None:
        """``dim``: where they are joined, from 0 on."""
        super().__init__(compute)
        self.parts, self.dim, self.attend = parts, dim, attend

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that they would be."""
        sizes = list(self.parts[0].shape)
        sizes[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return torch.Size(sizes)

    def size(self, dim: int | None = None) -> Any:
        """As a tensor has it."""
        return self.shape if dim is None else self.shape[dim]


class Scores(_Step):
    """q times k, scaled, and perhaps a mask that was added."""

    def __init__(
        self,
        compute: Compute,
        q: Tensor,
        k: Parts,
        attend: Attend,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(compute)
        self.q, self.k, self.attend, self.scale, self.mask = q, k, attend, scale, mask

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return self.q.device

    @property
    def shape(self) -> torch.Size:
        """``[B, H, Q, S]``."""
        rows = max(self.q.shape[0], self.k[0].shape[0])
        keys = sum(part.shape[2] for part in self.k)
        return torch.Size((rows, *self.q.shape[1:3], keys))

    def changed(self, compute: Compute, scale: float = 1.0, mask: Tensor | None = None) -> Scores:
        """After one more step."""
        mask = self.mask if mask is None else mask
        return Scores(compute, self.q, self.k, self.attend, self.scale * scale, mask)


class Largest(_Step):
    """The largest score of each row, which no softmax notices."""

    def __init__(self, compute: Compute, scores: Scores) -> None:
        super().__init__(compute)
        self.scores = scores


class Weights(_Step):
    """The softmax of scores."""

    def __init__(self, compute: Compute, scores: Scores) -> None:
        super().__init__(compute)
        self.scores = scores


# Steps.


_Kind = TypeVar("_Kind", bound=_Step)


def _open(value: Any, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether nobody has asked for the tensor of a step, and might have written to it."""
    return isinstance(value, kind) and value._value is None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _dims(given: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Of ``f(x, 1, 2)`` or ``f(x, (1, 2))``."""
    if len(given) == 1 and isinstance(given[0], tuple | list):
        given = tuple(given[0])
    return given if all(type(n) is int for n in given) else None


def _view(compute: Compute, x: Any, *given: Any, **more: Any) -> Any:
    if isinstance(x, Query):
        return Query(compute(), x.attend)
    sizes = _dims(given)
    if more or sizes is None or not _open(x, Segments):
        return None
    whole, rest = x.shape, math.prod(n for n in sizes if n != -1)
    if rest == 0:
        return None
    sizes = tuple(whole.numel() // rest if n == -1 else n for n in sizes)
    behind = x.dim + 1
    if sizes[:behind] != whole[:behind] or math.prod(sizes) != whole.numel():
        return None
    made = tuple(p.reshape(*p.shape[:behind], *sizes[behind:]) for p in x.parts)
    return Segments(compute, made, x.dim, x.attend)


def _permute(compute: Compute, x: Any, *given: Any, **more: Any) -> Any:
    if isinstance(x, Query):
        return Query(compute(), x.attend)
    order = _dims(given)
    if more or order is None or not _open(x, Segments):
        return None
    count = len(x.shape)
    order = tuple(n % count for n in order)
    made = tuple(part.permute(order) for part in x.parts)
    return Segments(compute, made, order.index(x.dim), x.attend)


def _transpose(compute: Compute, x: Any, *given: Any, **more: Any) -> Any:
    if isinstance(x, Query):
        return Query(compute(), x.attend)
    if more or len(given) != 2 or not _open(x, Segments):
        return None
    order = list(range(len(x.shape)))
    a, b = given
    order[a], order[b] = order[b], order[a]
    return _permute(compute, x, order)


def _scaled(compute: Compute, x: Any, factor: Any, **more: Any) -> Any:
    return None if more else _times(compute, x, factor, lambda: float(factor))


def _divided(compute: Compute, x: Any, by: Any, **more: Any) -> Any:
    return None if more else _times(compute, x, by, lambda: 1.0 / by)


def _times(compute: Compute, x: Any, number: Any, factor: Callable[[], float]) -> Any:
    if not _is_number(number) or number == 0:
        return None
    if isinstance(x, Query):
        return Query(compute(), x.attend)
    if _open(x, Scores) and x.mask is None:
        return x.changed(compute, factor())
    return None


def _matmul(compute: Compute, a: Any, b: Any, **more: Any) -> Any:
    if more:
        return None
    if _open(a, Weights):
        return _context(a, b)
    if isinstance(b, Tensor | Segments) and len(b.shape) == 4:
        return _scores(compute, a, b.transpose(-1, -2))
    return None


_TIMES_KEYS = re.compile(r"(\.\.\.|\w*)(\w)(\w),\1(\w)\3->\1\2\4")
_TIMES_VALUES = re.compile(r"(\.\.\.|\w*)(\w)(\w),\1\3(\w)->\1\2\4")


def _einsum(compute: Compute, equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    letters = equation.replace(" ", "")
    if _open(operands[0], Weights):
        return _context(*operands) if _TIMES_VALUES.fullmatch(letters) else None
    return _scores(compute, *operands) if _TIMES_KEYS.fullmatch(letters) else None


def _scores(compute: Compute, q: Any, k: Any) -> Any:
    """Of q ``[B, H, Q, D]`` and k ``[B, H, S, D]``."""
    attend = k.attend if isinstance(k, Segments) else getattr(q, "attend", None)
    q = q.tensor if isinstance(q, Query) else q
    keys = _parts(k)
    if keys is None or attend is None or type(q) is not Tensor or q.dim() != 4:
        return None
    if any(part.shape[1] != q.shape[1] or part.shape[3] != q.shape[3] for part in keys):
        return None
    return Scores(compute, q, keys, attend)


def _parts(x: Any) -> Parts | None:
    """Of keys or values ``[B, H, S, D]``."""
    if _open(x, Segments):
        return x.parts if x.dim == 2 and len(x.shape) == 4 else None
    return (x,) if type(x) is Tensor and x.dim() == 4 else None


def _context(weights: Weights, v: Any) -> Tensor | None:
    """Weights times v, which is where the op is called."""
    scores, values = weights.scores, _parts(v)
    if values is None:
        return None
    return scores.attend(scores.q, scores.k, values, scores.mask, scores.scale)


def _add(compute: Compute, a: Any, b: Any, **more: Any) -> Any:
    scores, mask = (a, b) if isinstance(a, Scores) else (b, a)
    if more or not _open(scores, Scores) or type(mask) is not Tensor or mask.dim() != 4:
        return None
    if scores.mask is not None or not mask.is_floating_point() or mask.requires_grad:
        return None
    *others, keys = scores.shape
    fits = all(n in (1, m) for n, m in zip(mask.shape, others, strict=False))
    return scores.changed(compute, mask=mask) if fits and mask.shape[3] == keys else None


def _sub(compute: Compute, scores: Any, other: Any, **more: Any) -> Any:
    known = _open(scores, Scores) and _open(other, Largest) and other.scores is scores
    return scores.changed(compute) if known and not more else None


def _is_last(dim: Any) -> bool:
    return dim in (-1, 3, (-1,), [-1])


def _amax(compute: Compute, scores: Any, dim: Any = None, keepdim: Any = False, **more: Any) -> Any:
    known = _open(scores, Scores) and _is_last(dim) and keepdim is True
    return Largest(compute, scores) if known and not more else None


def _detach(compute: Compute, largest: Any) -> Any:
    return Largest(compute, largest.scores) if _open(largest, Largest) else None


def _softmax(
    compute: Compute, scores: Any, dim: Any = None, *rest: Any, dtype: Any = None, **more: Any
) -> Any:
    more.pop("_stacklevel", None)
    known = _open(scores, Scores) and dim in (-1, 3) and dtype is None
    return Weights(compute, scores) if known and not rest and not more else None


def _dropout(
    _: Compute, weights: Any, p: Any = 0.5, training: Any = True, inplace: Any = False
) -> Any:
    return weights if _open(weights, Weights) and (p == 0.0 or not training) else None


_Step.followed = {
    Tensor.view: _view,
    Tensor.reshape: _view,
    torch.reshape: _view,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mul: _scaled,
    Tensor.__mul__: _scaled,
    Tensor.__rmul__: _scaled,
    torch.mul: _scaled,
    Tensor.div: _divided,
    Tensor.__truediv__: _divided,
    torch.div: _divided,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.matmul: _matmul,
    torch.einsum: _einsum,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.add: _add,
    Tensor.sub: _sub,
    Tensor.__sub__: _sub,
    torch.sub: _sub,
    Tensor.amax: _amax,
    torch.amax: _amax,
    Tensor.detach: _detach,
    Tensor.softmax: _softmax,
    torch.softmax: _softmax,
    functional.softmax: _softmax,
    functional.dropout: _dropout,
}


# In a forward.


class _Child:
    """In a forward: a module below it. Modules are given tensors, whatever they are called with."""

    def __init__(self, module: nn.Module, attend: Attend | None) -> None:
        """``attend``: if it makes q."""
        self._module, self._attend = module, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, attend = self._module, self._attend
        first = args[0] if args else None
        if isinstance(first, Query):
            attend = first.attend
        elif isinstance(first, _Step) and type(module) in _PASSING:
            return module(*args, **kwargs)
        elif _open(first, Segments) and len(args) == 1 and not kwargs and _is_pointwise(module):
            made = tuple(module(part) for part in first.parts)
            return Segments(lambda: module(first.value()), made, first.dim, first.attend)
        out = module(*computed(args), **computed(kwargs))
        return Query(out, attend) if attend is not None and type(out) is Tensor else out


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a layer gives the same for each token, whatever tokens are beside it."""
    one = len(getattr(module, "normalized_shape", (1,))) == 1
    return one and plain.bypassable(module, *_POINTWISE)


class Joining:
    """In place of ``torch`` in a forward: two sequences that are joined stay apart."""

    def __init__(self, attend: Attend) -> None:
        """``attend``: what attention to them becomes a call of."""
        self._attend = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def cat(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch has it."""
        given = (*args, *kwargs.values())
        known = len(given) == 1 and set(kwargs) <= {"dim"} and given[0] in (1, -2)
        if known and len(tensors) == 2 and all(_is_sequence(t) for t in tensors):
            parts = tuple(tensors)
            return Segments(lambda: torch.cat(parts, 1), parts, 1, self._attend)
        return torch.cat(computed(tensors), *args, **kwargs)

    concat = concatenate = cat


def _is_sequence(x: Any) -> bool:
    return type(x) is Tensor and x.dim() == 3


def standing_in(module: Any, attend: Attend, query: str | None = None) -> StandIn:
    """A module, for its own forward.

    Args:
        module: Attention.
        attend: What it becomes a call of.
        query: The layer from whose result on steps are followed; None: from where sequences are
            joined on, for a forward whose ``torch`` is `Joining`.
    """
    children = module._modules.items()
    return StandIn(
        module,
        {n: _Child(m, attend if n == query else None) for n, m in children if m is not None},
    )


def finished(result: Any) -> Any:
    """What a forward returns: tensors, but for weights, which most callers drop.

    Whoever does look at them gets them by the model's own steps.
    """
    if type(result) is tuple:
        return tuple(x if _open(x, Weights) else computed(x) for x in result)
    return computed(result)


def may_follow(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether nobody can tell that a forward is followed in this call.

    Args:
        module: Attention.
        given: Arguments of its forward, by name.
    """
    if torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook():
        return False
    if module._backward_hooks or module._backward_pre_hooks or weights_wanted(module, given):
        return False
    return not any(plain.watched(child) for child in module.children())


# The ops.


def attend(q: Tensor, k: Parts, v: Parts, mask: Tensor | None, scale: float) -> Tensor | None:
    """`served` where that is worth a few microseconds."""
    multiplications = q.numel() * sum(part.shape[2] for part in k)
    return None if multiplications < SMALL else served(q, k, v, mask, scale)


def served(q: Tensor, k: Parts, v: Parts, mask: Tensor | None, scale: float) -> Tensor | None:
    """Attention by an op: `Attend`. Heads of k and v divide those of q."""
    op = "qformer_attention" if len(k) == 1 else "perceiver_attention"
    tensors = (q, *k, *v)
    if not plain.runs(op, tensors) or len({t.dtype for t in tensors}) != 1:
        return None
    device, dtype = q.device.type, q.dtype
    if torch.is_autocast_enabled(device):
        if dtype != torch.get_autocast_dtype(device):
            return None
    elif mask is not None and mask.dtype not in (dtype, torch.bool):
        return None
    if any(t.numel() == 0 for t in tensors) or [p.shape for p in k] != [p.shape for p in v]:
        return None
    rows, heads, _, dim = q.shape
    if dim % 8 or dim > MAX_DIM or any(p.shape[3] != dim or heads % p.shape[1] for p in k):
        return None
    if any(p.shape[:2] != k[0].shape[:2] for p in k):
        return None
    if rows != k[0].shape[0] and not (rows == 1 and len(k) == 1):
        return None
    seen: Tensor | None = None
    if mask is not None:
        looked = _looked_at(mask, k)
        if looked is None:
            return None
        seen = looked[0]
    q, *others = (t.transpose(1, 2) for t in tensors)  # [B, S, H, D]
    if len(k) == 1:
        keys, values = others
        return qformer_attention(q, keys, values, seen, scale=scale).transpose(1, 2)
    media, latents, of_media, of_latents = others
    out = perceiver_attention(q, media, of_media, latents, of_latents, seen, scale=scale)
    return out.transpose(1, 2)


_known = WeakTensorKeyDictionary()
"""Mask -> its version, the lengths of segments, and what `_look` said of it."""


def _looked_at(mask: Tensor, k: Parts) -> tuple[Tensor | None] | None:
    """`_look`, once for all layers that share a mask."""
    if mask.device.type != "cpu":
        return None
    rows, lengths = k[0].shape[0], [part.shape[2] for part in k]
    if mask.is_inference():  # has no version
        return _look(mask, rows, lengths)
    key = mask._version, rows, lengths
    known = _known.get(mask)
    if known is None or known[0] != key:
        known = _known[mask] = key, _look(mask, rows, lengths)
    looked: tuple[Tensor | None] | None = known[1]
    return looked


def _look(mask: Tensor, rows: int, lengths: Sequence[int]) -> tuple[Tensor | None] | None:
    """Which keys a mask ``[B or 1, 1, Q or 1, S]`` shows, as the ops take it; None: it says more.

    ``[B, S]`` where all queries see the same, else ``[B, Q, S]``, without the second of two
    segments, of which everything is seen. None in the tuple: all of them.
    """
    if mask.shape[1] != 1:
        return None
    mask = mask[:, 0]  # [B or 1, Q or 1, S]
    if mask.dtype == torch.bool:
        seen = mask.clone()  # what is kept for a mask may not keep the mask
    else:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    if len(lengths) == 2:
        seen, others = seen.split(list(lengths), 2)
        if not bool(others.all()):
            return None
    elif not bool(seen.any(2).all()):
        return None  # what sees nothing sees everything
    if bool(seen.all()):
        return (None,)
    if bool((seen == seen[:, :1]).all()):
        seen = seen[:, 0]
    return (seen.expand(rows, *seen.shape[1:]),)
