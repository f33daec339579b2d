"""Modules that merge or average blocks of tokens, and multiply: what they do, read by running them.

Three kinds, told by their parts. One has a linear layer and unfolds the tokens of each image in
turn (Mistral-3): it is run with a spy in place of the layer. One has a pool, a norm and a matrix
(Gemma-3): it is run once, at its own size and with random values, and compared. The last is a pool
by itself, that is given tokens (LLaVA-NeXT-Video, Phi-4).
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmops.hf import embeddings, plain
from vlmops.hf.norms import rms_norm
from vlmops.hf.rebind import original_class
from vlmops.hf.shuffles import LARGEST, TURNS, methods, number
from vlmops.ops.pixel_shuffle import Order, pixel_shuffle, reference

_CHANNELS = 3  # of a probe
_TOLERANCE = 1e-4  # of values around 1, in float32; agreement is about 1e-6


@dataclasses.dataclass(frozen=True)
class Unfolding:
    """A module that cuts images of several sizes into blocks, and multiplies those."""

    linear: str
    factor: str
    """What the module calls the side of a block in tokens."""
    patch: str
    """What it calls the side of a token in pixels."""
    order: Order
    absorbs: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return f"all images in one call ({', '.join(self.order)})"

    def __call__(self, module: Any, x: Tensor, image_sizes: Any) -> Tensor | None:
        """The result, or None where the model's own code has to run."""
        factor, patch = number(module, self.factor), number(module, self.patch)
        sizes = _integers(image_sizes)
        if sizes is None or x.dim() != 2 or not factor or not patch:
            return None
        grids = [(h // patch, w // patch) for h, w in sizes]
        if sum(h * w for h, w in grids) != len(x) or x.numel() == 0:
            return None
        if any(min(grid) < factor for grid in grids):
            return None
        merged = pixel_shuffle(x, factor, grid_hw=grids, order=self.order, drop_remainder=True)
        product: Tensor = getattr(module, self.linear)(merged)
        return product

    def difference(self, module: Any) -> str | None:
        """What the replacement does otherwise, on tokens that are no probe."""
        factor, patch = number(module, self.factor), number(module, self.patch)
        grids = [(factor, 4 * factor + 1), (3 * factor, 2 * factor - 1)]
        sizes = torch.tensor([[h * patch, w * patch + patch - 1] for h, w in grids])
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(sum(h * w for h, w in grids), 24, generator=draw)
        shadow = _shadow(module, self.linear, torch.neg)
        for dtype in plain.DTYPES:
            expected = type(shadow).forward(shadow, x.to(dtype), sizes)
            for given in (sizes, sizes.tolist()):
                got = self(shadow, x.to(dtype), given)
                if got is None or got.dtype != dtype or not torch.equal(got, expected):
                    return f"the numeric check failed: merged tokens of {dtype} differ"
        return None


def _integers(image_sizes: Any) -> list[tuple[int, int]] | None:
    """Heights and widths in pixels."""
    if isinstance(image_sizes, Tensor):
        if torch.compiler.is_compiling() or image_sizes.dim() != 2 or image_sizes.shape[1] != 2:
            return None  # traced, sizes would have no values
        image_sizes = image_sizes.tolist()
    if not isinstance(image_sizes, Sequence):
        return None
    pairs = [(size[0], size[1]) for size in image_sizes if isinstance(size, tuple | list)]
    ints = len(pairs) == len(image_sizes) and all(type(n) is int for pair in pairs for n in pair)
    return pairs if ints else None


def unfolding(module: nn.Module) -> Unfolding | str | None:
    """What a module of one linear layer does to blocks of tokens; None if it does not unfold."""
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if isinstance(child, nn.Linear)]
    if len(children) != 1 or not linears or module._parameters or module._buffers:
        return None
    forward = inspect.unwrap((original_class(module) or type(module)).forward)
    if not isinstance(forward, types.FunctionType) or forward.__code__.co_argcount != 3:
        return None
    names = set(_all_names(forward.__code__))
    if "unfold" not in names:
        return None
    numbers = {n: v for n in sorted(names) if isinstance(v := number(module, n), int) and v > 0}
    found = []
    for factor, patch in itertools.permutations(numbers, 2):
        if not 2 <= numbers[factor] <= LARGEST:
            continue
        for order in ("yxc", "cyx"):
            if _unfolds(module, forward, linears[0], numbers[factor], numbers[patch], order):
                found.append(Unfolding(linears[0], factor, patch, order))
    return found[0] if len(found) == 1 else "it merges blocks of tokens in a way of its own"


def _all_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_names(constant)


def _unfolds(module: Any, forward: Any, linear: str, factor: int, patch: int, order: Order) -> bool:
    """Whether a module merges images of several sizes like the op, and multiplies nothing else."""
    given = []

    def spy(x: Tensor) -> Tensor:
        given.append(x)
        return x.clone()

    shadow = _shadow(module, linear, spy)
    grids = [(2 * factor + 1, 3 * factor), (factor, 3 * factor - 1), (factor, factor)]
    tokens = sum(h * w for h, w in grids)
    sizes = torch.tensor([[h * patch + patch - 1, w * patch] for h, w in grids])
    x = torch.randperm(tokens * _CHANNELS, generator=torch.Generator().manual_seed(0))
    x = x.float().view(tokens, _CHANNELS)
    try:
        y = forward(shadow, x, sizes)
    except Exception:  # foreign code, asked with what it was not written for
        return False
    expected = reference(x, factor, grid_hw=grids, order=order, drop_remainder=True).float()
    return len(given) == 1 and torch.equal(given[0], expected) and torch.equal(y, expected)


def _shadow(module: Any, linear: str, product: Callable[[Tensor], Tensor]) -> Any:
    """A module with the same numbers, and another function for its linear layer."""
    made: Any = object.__new__(original_class(module) or type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_modules"] = {**module._modules, linear: product}
    return made


@dataclasses.dataclass(frozen=True)
class Pooling:
    """A module that averages blocks of tokens, normalises and multiplies."""

    pool: str
    norm: str
    norm_class: type[nn.Module]
    weight: str
    """A parameter ``[C, D]``."""
    factor: int
    side: int
    """Of an image, in tokens."""
    eps: float
    offset: float

    def __str__(self) -> str:
        return f"blocks of {self.factor} x {self.factor} (mean), with {self.norm}"

    @property
    def absorbs(self) -> tuple[str, ...]:
        """The children that are passed over."""
        return self.pool, self.norm

    def refuses(self, module: Any) -> str | None:
        """Why they may not be passed over."""
        pool, norm = module._modules[self.pool], module._modules[self.norm]
        reason = plain.refusal(pool, nn.AvgPool2d)
        if reason is None and not plain.bypassable(norm, self.norm_class):
            reason = "its norm has hooks, another forward or a special weight"
        return reason

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """The result, or None where the model's own code has to run."""
        pool, norm = module._modules.get(self.pool), module._modules.get(self.norm)
        weight = module._parameters.get(self.weight)
        if weight is None or not plain.bypassable(norm, self.norm_class):
            return None
        if not plain.bypassable(pool, nn.AvgPool2d) or not is_pool(pool, self.factor):
            return None
        if not plain.runs("pixel_shuffle", [x, weight, norm.weight]):
            return None
        if x.dim() != 3 or x.shape[1] != self.side**2 or x.numel() == 0:
            return None
        if x.shape[2] != len(norm.weight) or torch.is_autocast_enabled(x.device.type):
            return None
        if not (x.dtype == weight.dtype == norm.weight.dtype):
            return None
        y = pixel_shuffle(
            x,
            self.factor,
            grid_hw=(self.side, self.side),
            reduction="mean",
            norm="rms",
            norm_weight=norm.weight,
            norm_offset=self.offset,
            eps=self.eps,
        )
        return torch.matmul(y, weight)

    def difference(self, _: Any) -> str | None:
        """None: it was compared when it was found."""
        return None


@dataclasses.dataclass(frozen=True)
class Pool:
    """An `nn.AvgPool2d` that is given tokens."""

    factor: int
    absorbs: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return f"blocks of {self.factor} x {self.factor} (mean)"

    def refuses(self, module: Any) -> str | None:
        """Why it may not be replaced."""
        return None if original_class(module) else plain.refusal(module, nn.AvgPool2d)

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        """The result, or None where the model's own code has to run."""
        if x.dim() != 4 or x.stride(1) != 1 or min(x.shape[2:]) < self.factor or x.numel() == 0:
            return None
        if not is_pool(module, self.factor) or torch.is_autocast_enabled(x.device.type):
            return None
        h, w = (side // self.factor for side in x.shape[2:])
        tokens = x.permute(0, 2, 3, 1)
        y = pixel_shuffle(tokens, self.factor, reduction="mean", drop_remainder=True)
        channels_last: Tensor = y.unflatten(1, (h, w)).permute(0, 3, 1, 2)
        return channels_last

    def difference(self, module: Any) -> str | None:
        """What the replacement does otherwise, where sums are rounded once."""
        f = self.factor
        x = torch.randn(2, 4 * f + 1, 3 * f, 24, generator=torch.Generator().manual_seed(0))
        for dtype in plain.DTYPES:
            given = x.to(dtype).permute(0, 3, 1, 2)
            got, exact = self(module, given), nn.AvgPool2d.forward(module, given.double())
            if got is None or got.dtype != dtype or got.shape != exact.shape:
                return f"the numeric check failed: averages of {dtype} are of another size"
            if not (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max():
                return f"the numeric check failed: averages of {dtype} differ"
        return None


def left_alone(module: nn.Module) -> Iterator[str]:
    """Why what a module does to tokens inside of functions that do more is not served."""
    factor = _merged_before_a_product(module)
    if factor is not None:
        yield f"its merging of {factor} x {factor} takes no time beside the product that follows"
    for name, function in methods(module):
        code = function.__code__
        if "interpolate" in code.co_names and TURNS & set(code.co_names) and code.co_argcount == 2:
            sides = _interpolated(module, function)
            if sides is not None:
                side, new = sides
                blocks = "" if side % new == 0 else ", which averages no blocks"
                yield f"{name} interpolates {side} x {side} tokens to {new} x {new}{blocks}"


def _merged_before_a_product(module: nn.Module) -> int | None:
    """The factor by which a forward itself merges tokens for one of its linear layers."""
    forward = inspect.unwrap((original_class(module) or type(module)).forward)
    names = set(forward.__code__.co_names) if isinstance(forward, types.FunctionType) else set()
    if not {"permute", "reshape"} <= names:
        return None
    sizes = {v for v in vars(getattr(module, "config", None) or object).values() if type(v) is int}
    factors = [v for n in names if type(v := number(module, n)) is int and 2 <= v <= LARGEST]
    for name, child in module.named_children():
        if name in names and isinstance(child, nn.Linear):
            width = child.in_features
            for factor in factors:
                # Attention's heads may be as many as that, but its layers take single tokens.
                if width not in sizes and any(size * factor**2 == width for size in sizes):
                    return factor
    return None


def _interpolated(module: nn.Module, function: Any) -> tuple[int, int] | None:
    """The side of a picture in tokens, before and after a method that makes it smaller."""
    for side in range(2, 65):
        try:
            y = function(module, torch.zeros(1, side**2, _CHANNELS))
        except Exception:  # asked with another size than its own
            continue
        if isinstance(y, Tensor) and y.dim() == 3 and y.shape[1] < side**2:
            return side, math.isqrt(y.shape[1])
        return None
    return None


def side_of(pool: Any) -> int:
    """Of the blocks that a pool averages."""
    side = pool.kernel_size
    return int(side if isinstance(side, int) else side[0])


def is_pool(module: Any, factor: int | None = None) -> bool:
    """Whether a module averages blocks of tokens, of this side or any that the op takes."""
    if not isinstance(module, nn.AvgPool2d):
        return False
    side = side_of(module)
    return (
        module.kernel_size in (side, (side, side))
        and module.stride in (side, (side, side))
        and (factor is None or side == factor)
        and 2 <= side <= LARGEST
        and module.padding in (0, (0, 0))
        and not module.ceil_mode
        and module.divisor_override is None
    )


def pooling(module: nn.Module) -> Pooling | str | None:
    """What a module of a pool, a norm and a matrix does; None for modules of other parts."""
    children = dict(module.named_children())
    pools = [name for name, child in children.items() if is_pool(child)]
    weights = [n for n, p in module._parameters.items() if p is not None and p.dim() == 2]
    if len(children) != 2 or len(pools) != 1 or len(weights) != 1 or len(module._parameters) != 1:
        return None
    norm = next(name for name in children if name not in pools)
    kind = rms_norm(children[norm])
    if kind is None:
        return f"{norm} is no RMSNorm"
    factor = side_of(children[pools[0]])
    sides = {v for v in vars(module).values() if type(v) is int and v >= factor and v % factor == 0}
    forward: Any = (original_class(module) or type(module)).forward
    twin: Any = embeddings.stand_in(module, torch.Generator().manual_seed(0))
    width = len(twin._parameters[weights[0]])
    for side in sorted(sides):
        kinds = pools[0], norm, original_class(children[norm]) or type(children[norm])
        found = Pooling(*kinds, weights[0], factor, side, *kind)
        x = torch.randn(1, side * side, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            try:
                expected = forward(twin, x)
            except Exception:  # asked with another size than its own
                continue
            got = found(twin, x)
        if got is None or got.shape != expected.shape or got.dtype != expected.dtype:
            continue
        error = float((got - expected).abs().max() / math.sqrt(width))
        if error <= _TOLERANCE:
            return found
    return "it does something else with its pool, norm and matrix"
