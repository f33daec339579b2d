"""What an op's ``<op>_spec.py`` says about it.

Contract tests, benchmarks and tables are generated from these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmops.ops.linear import differentiable_alternative, has_alternative

if TYPE_CHECKING:
    from vlmops.bench.shapes import Model

Arguments = dict[str, Any]


def yardstick_linear(like: Tensor, k: int) -> Callable[..., Tensor]:
    """``f(x, weight, bias)`` whose errors products over ``k`` numbers may have, in dtype and place.

    F.linear; of a thousand float32 products and more on a CPU oneDNN, which adds them up as a plain
    loop would, with 2.1 times MKL's error: tests of `vlmops.ops.linear` hold it to that.
    """
    long = like.is_cpu and like.dtype == torch.float32 and k >= 1024
    return differentiable_alternative if long and has_alternative(like.dtype) else functional.linear


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs. ``make`` draws them for a dtype on a device from torch's global seed."""

    name: str
    make: Callable[[torch.dtype, torch.device], Arguments]


@dataclasses.dataclass(frozen=True)
class BadCall:
    """A call that must raise: the arguments replaced in a good call, and what the message says."""

    name: str
    change: Callable[[Arguments], Arguments]
    pattern: str
    exception: type[Exception] = RuntimeError
    reads_values: bool = False
    """Whether only the values of a tensor tell that it is bad: a GPU does not look."""


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """A real model's shape, and what the op must move and compute there."""

    name: str
    make: Callable[[torch.dtype, torch.device], Arguments]
    moved: Callable[[Arguments], list[Tensor]]
    """The tensors that any implementation reads and writes once: what the copy floor copies."""
    flops: Callable[[Arguments], float]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One op. All callables take the op's arguments by name."""

    op: str
    function: Callable[..., Any]
    in_place: Callable[..., Any] | None
    reference: Callable[..., Any]
    """Exact, in float64."""
    eager_for: Callable[[Arguments], Callable[..., Any]]
    """What Hugging Face runs, in the inputs' dtype: the yardstick for errors and speed.

    Written out for the layout of the given arguments, as a model's code is for its own.
    """
    differentiable: Sequence[str]
    """Arguments that get gradients; optional ones may be None."""
    written: Sequence[str]
    """Arguments that in_place writes over, one for each output, whose strides outputs have.

    Without an in_place: none, and outputs are contiguous."""
    cases: Sequence[Case]
    bench: Mapping[str, BenchCase]
    errors: Sequence[BadCall]
    few: Sequence[Case] = ()
    """Tiny cases that stand for all, for backends that are interpreted (0.01 s a program)."""
    alike: Sequence[str] = ()
    """Cases that differ from others in sizes and strides alone: opcheck, slow, leaves them out."""
    model_cases: Callable[[Model, Sequence[int], Sequence[int]], Iterable[BenchCase]] | None = None
    """What the op meets in a model, for numbers of tokens of text and of patches."""
    peers: Callable[[Arguments], Mapping[str, Callable[..., Any]]] | None = None
    """Other libraries that are installed and can do a call, by name; see `measure.admitted`."""

    yardstick_for: Callable[[Arguments], Callable[..., Any]] | None = None
    """What errors are judged by, where what is timed adds up in an order of its own."""
    multiplies_bf16: bool = False
    """Its CPU kernel multiplies bfloat16 as it is where the machine does (avx512_bf16)."""
    schema_arguments: Callable[[Arguments], tuple[Any, ...]] | None = None
    """Those of ``torch.ops.vlmops.<op>``, where they are not the arguments by name."""
    into: Callable[..., Any] | None = None
    """The op with ``out``, memory for its one result, where it has that argument."""
    products: Callable[[Arguments], Mapping[tuple[str, str], Callable[[], Any]]] | None = None
    """What an op that is mostly matrix products cannot beat: those alone, on operands that lie
    ready, by direction (forward, backward) and by who computes them."""

    casts_under_autocast: Sequence[str] = ()
    """Arguments that autocast casts, as it does those of products; of other ops it casts none."""

    def differentiable_in(self, args: Arguments) -> list[str]:
        """The arguments of a call that get gradients."""
        given = ((name, args[name]) for name in self.differentiable)
        return [n for n, t in given if isinstance(t, Tensor) and t.is_floating_point()]


def swap(**changes: Any) -> Callable[[Arguments], Arguments]:
    """For `BadCall`: a call with other arguments in the place of its own."""
    return lambda args: {**args, **changes}


def alter(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    """For `BadCall`: a call with something made of one of its tensors in the place of it."""
    return lambda args: {**args, name: change(args[name])}
