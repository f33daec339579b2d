"""`vlmops.hd_transform` for modules that lay out the crops of a batch of pictures (Phi-4).

Such a module asks its tower for the features of all crops, and then puts the crops of each picture
where they lie, cuts off what the picture does not fill, adds newlines and a separator, projects,
and writes the tokens over placeholders: picture by picture, with a value read back from the device
for each size. Here all pictures are laid out and projected at once, and what sizes depend on is
read together, once. The tower and the dropout are the module's own and are called as before; so are
its two linear layers, where these are more than layers, and else `vlmops.mlp_projector` does their
work.

A module is found by its parts, and what it does with them by running it with made up features:
which of its two parameters ends rows, which order it has.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init  # draws no random numbers

from vlmops import dispatch
from vlmops.hf import plain
from vlmops.hf.rebind import changed, original_class, subclass
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.ops.hd_transform import Order, hd_transform
from vlmops.ops.linear_tuning import tune
from vlmops.ops.mlp_projector import mlp_projector

_ARGUMENTS = ("input_ids", "inputs_embeds", "image_pixel_values", "image_sizes",
              "image_attention_mask")  # fmt: skip
_SECONDS = 0.5  # at most for timing products
_TOLERANCE = 1e-5  # of the largest value, in float32: products of other heights round otherwise


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names of what a module works with."""

    tower: str
    first: str
    """The linear layer that tokens pass first."""
    second: str
    dropout: str
    newline: str
    separator: str
    order: Order = "sub_glb"


@dataclasses.dataclass(frozen=True)
class _Found:
    module: nn.Module
    parts: Parts


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Every module that lays out crops."""
    for path, module in model.named_modules():
        candidates = list(_candidates(module))
        if not candidates:
            continue
        place = Place(path, type(module).__name__, 1)
        if original_class(module):
            yield AlreadyPatched(place)
            continue
        newline = module.get_parameter(candidates[0].newline)
        reason = changed(module) or dispatch.refuses("hd_transform", newline.device)
        if reason is None and newline.dtype not in plain.DTYPES:
            reason = f"no kernel for parameters of {newline.dtype}"
        parts = study(module, candidates) if reason is None else None
        if isinstance(parts, Parts):
            layers = [module.get_submodule(name) for name in (parts.first, parts.second)]
            tune((m.weight for m in layers if _is_plain(m) and m.weight.is_cpu), _SECONDS)
            note = f"with {parts.newline}, {parts.first}, {parts.second}"
            yield dataclasses.replace(place, details=_Found(module, parts), note=note)
        else:
            yield Refused(place, reason or f"its tokens are not those of hd_transform: {parts}")


def _candidates(module: Any) -> Iterator[Parts]:
    """What the parts of a module may be; none if it does not lay out crops."""
    if not callable(getattr(module, "get_img_features", None)):
        return
    if tuple(p.name for p in _parameters(type(module).forward)) != _ARGUMENTS:
        return
    width = {p.numel() for p in module._parameters.values() if p is not None}
    learned = [name for name, p in module._parameters.items() if p is not None]
    children = dict(module.named_children())
    linears = [n for n, m in children.items() if hasattr(m, "in_features")]  # PEFT's too
    towers = [n for n, m in children.items() if any(m.children()) and n not in linears]
    dropouts = [n for n, m in children.items() if isinstance(m, nn.Dropout)]
    if (len(width), len(learned), len(linears)) != (1, 2, 2):
        return
    if (len(towers), len(dropouts)) != (1, 1):
        return
    for (first, second), (newline, separator), order in itertools.product(
        itertools.permutations(linears), itertools.permutations(learned), ("sub_glb", "glb_sub")
    ):
        up, down = children[first], children[second]
        if up.in_features in width and up.out_features == down.in_features == down.out_features:
            yield Parts(towers[0], first, second, dropouts[0], newline, separator, order)


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]


_studied: dict[Hashable, Parts | str] = {}


def study(module: Any, candidates: list[Parts]) -> Parts | str:
    """The parts by which the patched forward gives what the module's own does, or the difference.

    Once for each class and shapes.
    """
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters() if p.dim() < 3)
    key = (type(module), type(module).forward, tuple(candidates), shapes, repr(module.config))
    if key not in _studied:
        try:
            with torch.no_grad():
                _studied[key] = _proved(module, candidates)
        except Exception as error:  # foreign code, asked with what it was not written for
            _studied[key] = f"its forward raised {error!r}"
    return _studied[key]


def _proved(module: Any, candidates: list[Parts]) -> Parts | str:
    twin, given = _rehearsal(module, candidates[0])
    expected = type(module).forward(twin, **given)
    problem = "none of its parameters ends the rows"
    for parts in candidates:
        got = patched_class(type(module), parts).forward(twin, **given)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            problem = f"expected {list(expected.shape)}, got {list(got.shape)}"
            continue
        error = float((got - expected).abs().max() / expected.abs().max())
        if error <= _TOLERANCE:
            return parts
        problem = f"they are off by {error:.3g}"
    return problem


def _rehearsal(module: Any, parts: Parts) -> tuple[Any, dict[str, Tensor]]:
    """A module with random parameters and features, and the arguments of a call."""
    draw = torch.Generator().manual_seed(0)
    twin: Any = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float32)

    twin._parameters = {n: nn.Parameter(drawn(*p.shape)) for n, p in module._parameters.items()}
    twin._modules = dict(module._modules)
    for name in (parts.first, parts.second):
        layer = module.get_submodule(name)
        linear = skip_init(nn.Linear, layer.in_features, layer.out_features)
        linear.weight.copy_(drawn(*linear.weight.shape) / layer.in_features**0.5)
        linear.bias.copy_(drawn(layer.out_features))
        twin._modules[name] = linear
    twin.training = False
    twin._modules[parts.dropout] = nn.Identity()
    # 2 x 1 crops that are filled in part, and 1 x 3 of 4 that are; 3 x 3 tokens a crop.
    side, grids, filled, crops = 3, [(2, 1), (1, 3)], [(5, 2), (3, 8)], 5
    channels = getattr(module, parts.newline).numel()
    features = drawn(2 * crops, side**2, channels)
    twin.get_img_features = lambda *_, **__: features
    mask = torch.zeros(2, crops, 2 * side, 2 * side)
    tokens = 0
    for image, ((h, w), (height, width)) in enumerate(zip(grids, filled, strict=True)):
        picture = torch.zeros(h * 2 * side, w * 2 * side)
        picture[: 2 * height, : 2 * width] = 1
        placed = picture.view(h, 2 * side, w, 2 * side).transpose(1, 2)
        mask[image, 1 : 1 + h * w] = placed.reshape(h * w, 2 * side, 2 * side)
        mask[image, 0] = 1
        tokens += height * (width + 1) + 1 + side * (side + 1)
    placeholder = module.config.vision_config.image_token_id
    ids = torch.full((1, tokens + 4), placeholder)
    ids[0, [0, 7, tokens // 2, tokens + 3]] = placeholder + 1
    hidden = module.get_submodule(parts.second).out_features
    return twin, {
        "input_ids": ids,
        "inputs_embeds": drawn(1, tokens + 4, hidden),
        "image_pixel_values": torch.zeros(2, crops, 3, 1, 1),
        "image_sizes": torch.tensor(grids) * module.crop_size,
        "image_attention_mask": mask,
    }


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    module, parts = place.details.module, place.details.parts
    return {module: patched_class(type(module), parts)}


def patched_class(original: Any, parts: Parts) -> Any:
    """The class of a module that lays out all pictures at once."""

    def make_forward(_: str) -> Callable[..., Any]:
        signature = inspect.signature(original.forward)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs)
            given.apply_defaults()
            result = _laid_out(self, parts, *(given.arguments[name] for name in _ARGUMENTS))
            return original.forward(self, *args, **kwargs) if result is None else result

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    absorbs = parts.first, parts.second
    return subclass(original, ("hd_transform", parts, original.forward), make_forward, absorbs)


def _laid_out(
    module: Any,
    parts: Parts,
    input_ids: Any,
    inputs_embeds: Any,
    pixels: Any,
    image_sizes: Any,
    mask: Any,
) -> Tensor | None:
    """The decoder's embeddings, or None where the module's own code has to run."""
    newline, separator = getattr(module, parts.newline), getattr(module, parts.separator)
    dtype = next(getattr(module, parts.tower).parameters()).dtype
    first, second = getattr(module, parts.first), getattr(module, parts.second)
    if torch.compiler.is_compiling() or not all(
        isinstance(t, Tensor) for t in (input_ids, inputs_embeds, pixels, image_sizes, mask)
    ):
        return None
    if dtype != newline.dtype or not plain.runs("hd_transform", [newline, separator]):
        return None
    if torch.is_autocast_enabled(newline.device.type) or pixels.dim() != 5 or mask.dim() != 4:
        return None
    layout = _layout(module, input_ids, image_sizes, mask, pixels.shape[1])
    if layout is None:
        return None
    grids, valid, side, tokens = layout
    target = first.bias
    features = module.get_img_features(
        pixels.to(dtype).flatten(0, 1),
        attention_mask=mask.flatten(0, 1).to(dtype=torch.bool, device=target.device),
    )
    if features.shape[1:] != (side**2, newline.numel()) or features.dtype != newline.dtype:
        return None
    features = features.view(*pixels.shape[:2], *features.shape[1:])
    made = hd_transform(
        features, grids, newline, separator, valid_hw=valid, factor=1, order=parts.order
    )
    made = _projected(first, second, made.to(device=target.device, dtype=target.dtype))
    made = made.to(inputs_embeds)
    at = torch.nonzero_static(input_ids == _placeholder(module), size=tokens).unbind(1)
    with torch.autocast(inputs_embeds.device.type, enabled=False):
        filled = inputs_embeds.index_put(at, made)
    result: Tensor = getattr(module, parts.dropout)(filled)
    return result


def _is_plain(layer: Any) -> bool:
    return plain.bypassable(layer, nn.Linear)


def _projected(first: Any, second: Any, x: Tensor) -> Tensor:
    """By both linear layers, with a gelu between them."""
    tensors = [t for layer in (first, second) for t in plain.tensors(layer)]
    if (
        _is_plain(first)
        and _is_plain(second)
        and all(t.dtype == x.dtype for t in tensors)
        and plain.runs("mlp_projector", [x, *tensors])
    ):
        weights = first.weight, first.bias, second.weight, second.bias
        return mlp_projector(x, *weights, activation="gelu")
    projected: Tensor = second(functional.gelu(first(x)))
    return projected


def _placeholder(module: Any) -> int:
    placeholder: int = module.config.vision_config.image_token_id
    return placeholder


def _layout(
    module: Any, input_ids: Tensor, image_sizes: Tensor, mask: Tensor, crops: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int, int] | None:
    """Crops and filled tokens of each picture, tokens on a side of a crop, and all tokens.

    Everything that lies on a device is read from there in one piece. None if it does not add up:
    the module's own code says what is wrong.
    """
    images = len(mask)
    if image_sizes.numel() != 2 * images or mask.shape[1] != crops or not images:
        return None
    # Of each crop, the tokens of its first column and of its first row that are filled.
    columns = mask[:, :, ::2, 0].sum(-1)
    rows = mask[:, :, 0, ::2].sum(-1)
    count = (input_ids == _placeholder(module)).sum()
    read = [t.reshape(-1).to(mask.device, torch.int64) for t in (columns, rows, image_sizes, count)]
    numbers = iter(torch.cat(read).tolist())

    def table(height: int, width: int) -> list[list[int]]:
        return [list(itertools.islice(numbers, width)) for _ in range(height)]

    heights, widths, sizes = table(images, crops), table(images, crops), table(images, 2)
    side = mask[0, 0, ::2, 0].shape[0]
    grids = [(h // module.crop_size, w // module.crop_size) for h, w in sizes]
    if any(h < 1 or w < 1 or 1 + h * w > crops for h, w in grids):
        return None
    valid = [
        (sum(height[1 : 1 + h * w : w]), sum(width[1 : 1 + w]))
        for (h, w), height, width in zip(grids, heights, widths, strict=True)
    ]
    if any(height > h * side or width > w * side
           for (h, w), (height, width) in zip(grids, valid, strict=True)):  # fmt: skip
        return None
    tokens = sum(height * (width + 1) + 1 + side * (side + 1) for height, width in valid)
    return (grids, valid, side, tokens) if tokens == next(numbers) else None


def check(place: Place) -> str | None:
    """Nothing more: `find` has compared the patched forward with the module's own."""
    return None


SITE = Site("hd_transform", find, adapt, check)
