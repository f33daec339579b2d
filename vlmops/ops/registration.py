"""How an op, and its twin in Triton, get into torch's dispatcher: names, autograd, fakes, vmap.

An op's overloads are a NamedTuple: ``forward`` is the op itself, ``in_place`` has an underscore
more, any other field is the end of a name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ENDS = {"forward": "", "in_place": "_"}


def overloads(kind: Any, op: str) -> Any:
    """Those of ``torch.ops.vlmops.<op>``, as a NamedTuple of this kind."""
    names = (op + _ENDS.get(field, f"_{field}") for field in kind._fields)
    return kind(*(getattr(torch.ops.vlmops, name).default for name in names))


def triton_twin(
    lib: torch.library.Library,
    op: str,
    compiled: Any,
    kernel: Callable[[str], Callable[..., Any]] | None = None,
) -> Any:
    """Defines ``<op>_triton``, with the schemas of the compiled op, and returns its overloads.

    Args:
        lib: Of the namespace vlmops.
        op: The op's name.
        compiled: Its overloads.
        kernel: What runs, for the name of a field; None: the function of this name in
            ``vlmops.ops.<op>_triton``.
    """
    for overload, field in zip(compiled, compiled._fields, strict=True):
        schema = str(overload._schema).replace(f"vlmops::{op}", f"{op}_triton", 1)
        lib.define(schema)
        run = functools.partial(_on_triton, op, field) if kernel is None else kernel(field)
        for key in ("CPU", "CUDA"):
            lib.impl(schema.partition("(")[0], run, key)
    return overloads(type(compiled), f"{op}_triton")


def _on_triton(op: str, name: str, *args: Any) -> Any:
    """Triton is imported when it is first used: it may be missing, and takes its time."""
    return getattr(importlib.import_module(f"vlmops.ops.{op}_triton"), name)(*args)


def register(
    lib: torch.library.Library,
    ops: Any,
    autograd: Sequence[Callable[..., Any]],
    fakes: Sequence[Callable[..., Any]],
    vmap: bool = True,
) -> None:
    """Autograd, fakes and vmap of an op's overloads, in the order of their fields.

    Args:
        lib: Of the namespace vlmops.
        ops: The overloads.
        autograd: Called with the overloads and the arguments.
        fakes: Called with the arguments.
        vmap: Whether those that return something are called one after another.
    """
    for op, kernel, fake in zip(ops, autograd, fakes, strict=True):
        lib.impl(op, functools.partial(kernel, ops), "Autograd")
        torch.library.register_fake(op, fake, lib=lib)
        if vmap and op._schema.returns:
            torch.library.register_vmap(op, _one_by_one(op), lib=lib)


def plain_gradients(
    plain: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    options: Sequence[Any],
    needs: Sequence[bool],
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of ``plain(*tensors, *options)`` that can be differentiated again.

    Empty tensors for those that nobody needs.
    """
    inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in tensors]
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
    grads = torch.autograd.grad(
        plain(*inputs, *options), wanted, grad, create_graph=True, materialize_grads=True
    )
    found = iter(grads)
    return [next(found) if needed else grad.new_empty(0) for needed in needs]


def _one_by_one(op: Any) -> Callable[..., tuple[Any, Any]]:
    """A rule for vmap: one call after another. Batches have more images, not more of the rest.

    ``op`` takes tensors and lists of tensors, and returns one tensor or several.
    """

    def run(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def one(value: Any, dim: Any, i: int) -> Any:
            if isinstance(value, list | tuple):
                dims = dim if isinstance(dim, list | tuple) else [dim] * len(value)
                return [one(v, d, i) for v, d in zip(value, dims, strict=True)]
            return value if dim is None else value.select(dim, i)

        outputs = [
            op(*[one(v, d, i) for v, d in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        columns = [torch.stack(column) for column in zip(*outputs, strict=True)]
        return columns, [0] * len(columns)

    return run
