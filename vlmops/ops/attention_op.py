"""What the ops on the attention core share: how they are called, and get into torch's dispatcher.

Their schemas are alike. Forward takes queries, keys and values, then tensors that say who sees what
and how, then numbers, and returns the result and statistics; backward takes the gradient, queries,
keys and values, result and statistics, the rest, and of which arguments gradients are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.checks import require_tensor, same_device, wants_grad
from vlmops.ops.registration import overloads, plain_gradients, register, triton_twin

_ANYWHERE = {"cu_seqlens", "cu_seqlens_k", "key_lengths"}
"""Arguments that may lie on the host, whatever lies on a GPU."""


class Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    backward: Any


class AttentionOp:
    """One op: the schemas and CPU kernels are the library's, Triton's is an op of its own.

    Measured costs of the ways to register autograd are in CONTRIBUTING.md.
    """

    def __init__(
        self,
        name: str,
        heads: Sequence[str],
        options: Any,
        tensors: int,
        plain: Callable[..., Tensor],
        weights: Sequence[str] = (),
    ) -> None:
        """Registers the op.

        Args:
            name: ``torch.ops.vlmops.<name>``.
            heads: Its first arguments: queries, keys and values, differentiable.
            options: A NamedTuple of the others, with defaults; tensors come first.
            tensors: How many of those there are.
            plain: Its reference on all arguments, rounded: a backend, and derivatives without a
                kernel.
            weights: Tensors of the options that are differentiable.
        """
        self.name, self.options, self.plain = name, options, plain
        self.heads, self.tensors = len(heads), len(heads) + tensors
        self.names = (*heads, *options._fields)
        self.places = [self.names.index(of) for of in (*heads, *weights)]
        """Of the arguments that are differentiable."""
        if _library.error is not None:
            return
        lib = torch.library.Library("vlmops", "FRAGMENT")
        self.compiled = overloads(Ops, name)
        self.triton = triton_twin(lib, name, self.compiled)
        for ops in (self.compiled, self.triton):
            autograd, fakes = (self._forward, self._backward), (self._fake, self._fake_backward)
            register(lib, ops, autograd, fakes)
        self._lib = lib  # registrations live as long as this

    def __call__(self, backend: str | None, *args: Any) -> Tensor:
        """The op's result for all of its arguments, by the backend that is asked for."""
        device = args[0].device.type if isinstance(args[0], Tensor) else "cpu"
        if torch.compiler.is_compiling():
            name = dispatch.choose(self.name, backend, device)
            if name == "reference":
                return self.plain(*args)
            op = (self.triton if name == "triton" else self.compiled).forward
            result: Tensor = op(*args)[0]
            return result
        _library.require()
        for i in range(self.tensors):
            if i < self.heads or args[i] is not None:
                require_tensor(self.name, self.names[i], args[i])
        ops = self.compiled
        if backend is not None or dispatch.asked.get() is not None or device != "cpu":
            name = dispatch.choose(self.name, backend, device)
            if name == "reference":
                return self.plain(*args)
            if name == "triton":
                ops = self.triton
        return self._forward(ops, *args)[0]

    def all(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of forward; torch leaves out what is the schema's default."""
        return *args[: self.heads], *self.options(*args[self.heads :])

    def parts(self, args: Sequence[Any]) -> tuple[Any, list[bool]]:
        """Options, and what is needed, of what backward is given behind statistics."""
        count = len(self.options._fields)
        needs = list(args[count:])
        return self.options(*args[:count]), needs + [True] * (len(self.places) - len(needs))

    def _forward(self, ops: Ops, *args: Any) -> tuple[Tensor, Tensor]:
        """Skips autograd's Python layer where nobody differentiates."""
        args = self.all(args)
        if forward_ad._current_level >= 0:
            return self._without_statistics(args)
        recorded = wants_grad(*(args[i] for i in self.places))
        if torch._C._functorch.maybe_current_level() is not None:
            if recorded:
                return self._without_statistics(args)
            result: tuple[Tensor, Tensor] = ops.forward(*args)
            return result
        if not recorded:
            kept: tuple[Tensor, Tensor] = below_autograd(ops.forward, *args)
            return kept
        made: tuple[Tensor, Tensor] = _Attention.apply(self, ops, *args)  # type: ignore[no-untyped-call]
        return made

    def _without_statistics(self, args: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """For derivatives without a kernel, where nobody reads statistics."""
        out = self.plain(*args)
        return out, out.new_zeros(0, dtype=torch.float32)

    def _backward(self, ops: Ops, grad: Tensor, *args: Any) -> Sequence[Tensor]:
        """An empty tensor for a gradient that nobody needs, or of what is not there."""
        heads, rest = args[: self.heads], args[self.heads + 2 :]
        options, needs = self.parts(rest)
        whole = [*heads, *options]
        given = [i for i in self.places if whole[i] is not None]
        if not wants_grad(grad, *(whole[i] for i in given)):
            result: tuple[Tensor, ...] = below_autograd(ops.backward, grad, *args)
            return result

        def plain(*tensors: Tensor) -> Tensor:
            for i, t in zip(given, tensors, strict=True):
                whole[i] = t
            return self.plain(*whole)

        needed = [n for n, i in zip(needs, self.places, strict=True) if i in given]
        found = plain_gradients(plain, [whole[i] for i in given], (), needed, grad)
        made = dict(zip(given, found, strict=True))
        return [made[i] if i in made else grad.new_empty(0) for i in self.places]

    def _fake(self, *args: Any) -> tuple[Tensor, Tensor]:
        args = self.all(args)
        self._same_device(args)
        q = args[0]
        rows = math.prod(q.shape[:-2])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return out, q.new_empty(2, q.shape[-2], rows, dtype=torch.float32)

    def _fake_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        options, needs = self.parts(args[self.heads + 2 :])
        whole = [*args[: self.heads], *options]
        self._same_device(whole, grad=grad)
        return tuple(
            grad.new_empty(0) if t is None or not needed else t.new_empty(t.shape)
            for t, needed in zip((whole[i] for i in self.places), needs, strict=True)
        )

    def _same_device(self, args: Sequence[Any], **others: Tensor) -> None:
        named = dict(zip(self.names, args[: self.tensors], strict=False))
        named = {name: t for name, t in named.items() if name not in _ANYWHERE}
        q = named.pop("q")
        same_device(self.name, "q", q, **named, **others)


def below_autograd(op: Any, *args: Any) -> Any:
    """The op's kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Attention(torch.autograd.Function):
    """First derivatives; those beyond are the reference's."""

    @staticmethod
    def forward(ctx: Any, op: AttentionOp, ops: Ops, *args: Any) -> tuple[Tensor, Tensor]:
        out, statistics = below_autograd(ops.forward, *args)
        ctx.op, ctx.ops, ctx.numbers = op, ops, args[op.tensors :]
        heads, seen = args[: op.heads], args[op.heads : op.tensors]
        ctx.save_for_backward(*heads, out, statistics, *seen)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        op: AttentionOp = ctx.op
        made: list[Tensor | None] = [None] * (2 + len(op.names))
        if grad is None:
            return tuple(made)
        needs = [ctx.needs_input_grad[2 + i] for i in op.places]
        grads = op._backward(ctx.ops, grad, *ctx.saved_tensors, *ctx.numbers, *needs)
        for i, needed, found in zip(op.places, needs, grads, strict=True):
            made[2 + i] = found if needed else None
        return tuple(made)
