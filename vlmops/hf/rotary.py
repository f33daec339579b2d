"""Reads the layout of a rotary embedding off a model's own code, by running it.

Hugging Face spreads a rotary embedding over a module that makes cosines and sines of positions and
a function that turns q and k by them. Only what the two do together is one rotation, so they are
probed together: one-hot positions, with every frequency of the module set to a value of its own,
and one head per channel, each holding a one in its channel. The matrix that comes out for each
position shows which channels form a pair, and which axis and which frequency turn it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.ops.mrope import Rotation

_SIGNATURES = (["self", "x", "position_ids"], ["self", "x", "position_ids", "layer_type"])
_AXES = (2, 3, 4)

LayoutKey = tuple[str | None, int]


class _UnusualError(Exception):
    """What keeps a rotary embedding from being served, in words that follow a colon."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `vlmops.mrope` needs to know about a model."""

    freq_axis: tuple[int, ...]
    freq_index: tuple[int, ...]
    """Which entry of the module's frequencies turns each pair of channels."""
    rotation: Rotation
    scaling: float
    buffer: str
    """The attribute of the module that holds its frequencies."""
    axes: int
    axes_dim: int | None
    """Dimension of position_ids that holds the axes: 0, -1, or None if there is none."""
    complex: bool


@dataclasses.dataclass(frozen=True)
class Apply:
    """A function that rotates.

    ``(q, k, cos, sin[, unsqueeze_dim])``, ``(x, cos, sin[, unsqueeze_dim])`` or ``(q, k, freqs)``
    with complex freqs.
    """

    name: str
    function: Callable[..., Any]
    rows: int
    """Number of tensors that it rotates: 2, or 1."""
    complex: bool
    unsqueeze_dim: int | None
    """Default of the parameter of that name, which says where the heads are."""


def find_apply(name: str, function: Any) -> Apply | None:
    """What a global name of a forward stands for, if that is a function that rotates."""
    if isinstance(function, nn.Module):  # what the `kernels` package makes of decorated functions
        function = function.forward
    if not inspect.isroutine(function):
        return None
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions in C have none
        return None
    names = list(parameters)
    last = parameters[names[-1]] if names else None
    unsqueeze = last.default if last is not None and last.name == "unsqueeze_dim" else None
    if unsqueeze is not None:
        names.pop()
    if names in (["q", "k", "cos", "sin"], ["x", "cos", "sin"]):
        if any(parameters[n].default is not inspect.Parameter.empty for n in names):
            return None
        return Apply(name, function, len(names) - 2, False, unsqueeze)
    if len(names) == 3 and names[2].startswith("freqs_ci"):
        return Apply(name, function, 2, True, None)
    return None


def takes_cosines(function: Any) -> bool:
    """Whether a global name of a forward stands for a function of cosines and sines."""
    if not inspect.isfunction(function):
        return False
    return {"cos", "sin"} <= set(inspect.signature(function).parameters)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module has frequencies, or a table of rotations, and the signature for them."""
    if any(True for _ in module.children()):
        return False
    if _parameters(module) in _SIGNATURES:
        return bool(_frequencies(module))
    return table_of(module) is not None


def _parameters(module: nn.Module) -> list[str]:
    """Of a module's forward; none where it has no signature, as in TorchScript."""
    forward = inspect.getattr_static(type(module), "forward")
    return list(inspect.signature(forward).parameters) if inspect.isfunction(forward) else []


def table_of(module: nn.Module) -> Tensor | None:
    """The constant ``[N, 1, R]`` of complex rotations that a module hands out whatever it is given.

    Llama-4's tower: channels [0, R / 2) turn with x + 1, the others with y + 1, the class token
    does not turn.
    """
    buffers = [b for b in module.buffers(recurse=False) if b.is_complex() and b.dim() == 3]
    return buffers[0] if len(buffers) == 1 and len(_parameters(module)) == 2 else None


def layer_types(rotary: nn.Module) -> list[str | None]:
    """The values of ``layer_type`` that a module knows; [None] if it takes none."""
    if "layer_type" not in _parameters(rotary):
        return [None]
    names = list(_frequencies(rotary))
    return [None if name == "inv_freq" else name.removesuffix("_inv_freq") for name in names]


def on_cpu(rotary: Any) -> Any:
    """A copy to experiment with: dynamic rope types change their own buffers when called."""
    config = getattr(rotary, "config", None)
    if any(b.device.type == "meta" for b in rotary.buffers()):
        with torch.device("cpu"):
            return type(rotary)(config)
    memo = {} if config is None else {id(config): config}
    return copy.deepcopy(rotary, memo).to("cpu")


def cosines(rotary: Any, ids: Tensor, layer_type: str | None) -> Any:
    """What the module's own forward returns, in float32."""
    x = torch.zeros(1, 1, 1, dtype=torch.float32)
    given = (ids,) if layer_type is None else (ids, layer_type)
    return type(rotary).forward(rotary, x, *given)


def read_layouts(rotary: Any, apply: Apply) -> dict[LayoutKey, Layout] | str:
    """The layouts of a rotary module together with the function that rotates.

    Args:
        rotary: The module, of which a copy is probed.
        apply: The function.

    Returns:
        (layer_type, number of axes in position_ids) -> layout, or what is unusual.
    """
    try:
        rotary = on_cpu(rotary)
        if table_of(rotary) is not None:
            return {(None, 0): _read_table(rotary, apply)}
        layouts = {}
        for layer_type in layer_types(rotary):
            for axes, axes_dim in _positions(rotary, layer_type):
                layout = _read_frequencies(rotary, layer_type, apply, axes, axes_dim)
                layouts[layer_type, axes] = layout
        return layouts
    except _UnusualError as unusual:
        return str(unusual)
    except Exception as error:  # asked with what it was not written for, foreign code may raise any
        return f"{type(rotary).__name__} or {apply.name} cannot be probed: {error!r}"


def _read_frequencies(
    rotary: Any, layer_type: str | None, apply: Apply, axes: int, axes_dim: int | None
) -> Layout:
    scaling = read_scaling(rotary, layer_type)
    names = _set_apart(rotary)
    one_hot = torch.cat((torch.zeros(1, axes), torch.eye(axes))).long()  # [1 + A tokens, A]
    turned = cosines(rotary, arranged(one_hot, axes_dim), layer_type)
    again = cosines(rotary, arranged(one_hot, axes_dim), layer_type)
    if not all(torch.equal(a, b) for a, b in zip(_tensors(turned), _tensors(again), strict=True)):
        raise _UnusualError(f"{type(rotary).__name__} returns something else each time")
    rotation = _rotation(apply, turned)
    matrices = _matrices(apply, turned) / scaling  # [1 + A, D, D]
    first, second = _pairs(rotation, matrices.shape[-1] // 2)
    angles = torch.atan2(matrices[:, second, first], matrices[:, first, first])  # [1 + A, R]
    freq_axis = angles[1:].abs().argmax(dim=0)
    driving = angles[1:].gather(0, freq_axis[None])[0]

    distances = {name: (driving[:, None] - getattr(rotary, name).float()).abs() for name in names}
    buffer = min(distances, key=lambda name: float(distances[name].amin(dim=1).amax()))
    freq_index = distances[buffer].argmin(dim=1)
    expected = torch.zeros(1 + axes, len(first))
    expected[1 + freq_axis, torch.arange(len(first))] = getattr(rotary, buffer)[freq_index].float()
    if not torch.allclose(matrices, _rotations(expected, first, second), atol=1e-5):
        raise _UnusualError("its channels are not driven by one axis and one frequency each")
    return Layout(
        tuple(freq_axis.tolist()),
        tuple(freq_index.tolist()),
        rotation,
        scaling,
        buffer,
        axes,
        axes_dim,
        apply.complex,
    )


def _read_table(rotary: Any, apply: Apply) -> Layout:
    table = rotary(torch.zeros(1))
    pairs = table.shape[-1]
    if _rotation(apply, table) != "pairs":
        raise _UnusualError("its table turns something else than neighbouring channels")
    ids, inv_freq = factor_table(table)
    freq_axis = torch.arange(pairs) // (pairs // 2)
    rebuilt = torch.polar(torch.ones(()), ids[:, freq_axis] * inv_freq)
    if not torch.allclose(rebuilt, table[:, 0], atol=1e-5):
        raise _UnusualError("its table is not one of positions on two axes times frequencies")
    freq_index = tuple(range(pairs))
    return Layout(tuple(freq_axis.tolist()), freq_index, "pairs", 1.0, "", 2, -1, True)


def factor_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``[N, 2]`` (float32) and frequencies ``[R]`` of a `table_of` rotations.

    Token 0 is at position 1 of both axes, so its angles are the frequencies; the lowest frequency
    of an axis turns too slowly to wrap around, so it tells the positions.
    """
    angles = table[:, 0].angle()  # [N, R]
    inv_freq = angles[0]
    half = len(inv_freq) // 2
    lowest = [half - 1, 2 * half - 1]
    return (angles[:, lowest] / inv_freq[lowest]).round(), inv_freq


def read_scaling(rotary: Any, layer_type: str | None) -> float:
    """The module's own factor of cosine and sine."""
    name = "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"
    return float(getattr(rotary, name, 1.0))


def _frequencies(rotary: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer
        for name, buffer in rotary.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1
    }


def _set_apart(rotary: nn.Module) -> list[str]:
    """Gives every frequency of the module another value, in (0.2, 1.4) radians per position."""
    buffers = _frequencies(rotary)
    total = sum(len(b) for b in buffers.values())
    values = torch.linspace(0.2, 1.4, total + 2)[1:-1].split([len(b) for b in buffers.values()])
    for (name, buffer), value in zip(buffers.items(), values, strict=True):
        buffer.copy_(value)
        original = getattr(rotary, name.replace("inv_freq", "original_inv_freq"), None)
        if isinstance(original, Tensor) and original.shape == value.shape:
            original.copy_(value)  # some rope types restore it at each call
    return list(buffers)


def _positions(rotary: Any, layer_type: str | None) -> list[tuple[int, int | None]]:
    """The shapes of position_ids that a module takes: number of axes, dimension that holds them.

    [A, B, S] and [B, S] exclude each other; of [N, A] some modules take any A.
    """
    failures: list[Exception] = []

    def tokens(*ids: int) -> list[int]:
        try:
            out = cosines(rotary, torch.zeros(ids, dtype=torch.int64), layer_type)
        except Exception as error:  # asked with what it was not written for, it may raise anything
            failures.append(error)
            return []
        return list(_tensors(out)[0].shape[:-1])

    for axes in _AXES:
        if tokens(axes, 5, 7) == [5, 7]:
            return [(axes, 0)]
    if tokens(5, 7) == [5, 7]:
        return [(1, None)]
    found: list[tuple[int, int | None]] = [(a, -1) for a in _AXES if tokens(7, a) == [7]]
    if not found:
        reason = f" ({failures[0]!r})" if failures else ""
        raise _UnusualError(
            f"{type(rotary).__name__} takes position_ids of none of the shapes [B, S], [A, B, S] "
            f"and [N, A]{reason}"
        )
    return found


def arranged(ids: Tensor, axes_dim: int | None) -> Tensor:
    """Ids ``[T, A]`` as a module takes them (`Layout.axes_dim`), a batch of one."""
    if axes_dim is None:
        return ids.T
    return ids.T[:, None] if axes_dim == 0 else ids


def _tensors(out: Any) -> tuple[Tensor, ...]:
    """(cos, sin), or (freqs,)."""
    tensors: tuple[Tensor, ...] = out if isinstance(out, tuple) else (out,)
    kinds = [isinstance(t, Tensor) and t.is_complex() for t in tensors]
    if kinds in ([False, False], [True]) and all(isinstance(t, Tensor) for t in tensors):
        return tensors
    raise _UnusualError("its rotary module returns neither cosines and sines nor complex numbers")


def _matrices(apply: Apply, turned: Any) -> Tensor:
    """What the function does to each token: ``[T, D, D]``, column m from channel m alone."""
    tensors = _tensors(turned)
    tokens = math.prod(tensors[0].shape[:-1])
    width = tensors[0].shape[-1] * (2 if apply.complex else 1)
    outs = call(apply, turned, torch.eye(width).expand(tokens, -1, -1))  # one head per channel
    if any(not torch.equal(out, outs[0]) for out in outs):
        raise _UnusualError(f"{apply.name} rotates k in another way than q")
    return outs[0].transpose(1, 2)


def call(
    apply: Apply, turned: Any, x: Tensor, function: Callable[..., Any] | None = None
) -> list[Tensor]:
    """What the function, or another in its place, makes of x given as q and as k.

    Args:
        apply: The function.
        turned: What a rotary module returned for T tokens, a batch of one.
        x: ``[T, H, D]``, as the results; the function gets it as it expects it.
        function: To call in place of ``apply.function``.
    """
    tensors = turned if isinstance(turned, tuple) else (turned,)
    heads_last = heads_from_right(apply, tensors[0].dim() - 1, None) == 2
    batched = tensors[0].dim() == 3
    given = x if heads_last else x.transpose(0, 1)
    given = given[None] if batched else given
    out = (function or apply.function)(*(given.clone() for _ in range(apply.rows)), *tensors)
    outs = out if isinstance(out, tuple) else (out,)
    if len(outs) != apply.rows or any(out.shape != given.shape for out in outs):
        raise _UnusualError(f"{apply.name} does not keep the shape of q")
    outs = tuple(out[0] for out in outs) if batched else outs
    return [out if heads_last else out.transpose(0, 1) for out in outs]


def heads_from_right(apply: Apply, token_dims: int, unsqueeze_dim: int | None) -> int:
    """Which dimension of q, counted from the right, holds the heads: 2 or 3.

    Args:
        apply: The function.
        token_dims: Dimensions of cos without its channels.
        unsqueeze_dim: As given in the call, or None.
    """
    if unsqueeze_dim is None:
        unsqueeze_dim = apply.unsqueeze_dim
    if unsqueeze_dim is None:  # complex, or `cos.unsqueeze(-2)`
        return 2
    rank = token_dims + 2
    return rank - (unsqueeze_dim if unsqueeze_dim >= 0 else unsqueeze_dim + rank)


def _rotation(apply: Apply, turned: Any) -> Rotation:
    """Which channels form pairs: turns by 0 and 90 degrees, whatever the positions."""
    ones = torch.ones_like(_tensors(turned)[0])
    still = ones if apply.complex else (ones, ones * 0)
    quarter = ones * 1j if apply.complex else (ones * 0, ones)
    width = ones.shape[-1] * (2 if apply.complex else 1)
    if not torch.equal(_matrices(apply, still)[0], torch.eye(width)):
        raise _UnusualError(f"{apply.name} puts the channels into another order")
    matrix = _matrices(apply, quarter)[0]
    quarters = torch.full((1, width // 2), math.pi / 2)
    rotations: tuple[Rotation, ...] = ("half", "pairs")
    for rotation in rotations:
        expected = _rotations(quarters, *_pairs(rotation, width // 2))
        if torch.allclose(matrix, expected[0], atol=1e-6):
            return rotation
    raise _UnusualError(f"{apply.name} turns neither halves nor neighbouring channels")


def _pairs(rotation: Rotation, pairs: int) -> tuple[Tensor, Tensor]:
    """First and second channel of each pair."""
    j = torch.arange(pairs)
    return (j, j + pairs) if rotation == "half" else (2 * j, 2 * j + 1)


def _rotations(angles: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rotations ``[T, D, D]`` of pairs (first, second) by angles ``[T, R]``."""
    width = 2 * angles.shape[1]
    matrices = torch.zeros(len(angles), width, width)
    matrices[:, first, first] = matrices[:, second, second] = angles.cos()
    matrices[:, second, first], matrices[:, first, second] = angles.sin(), -angles.sin()
    return matrices


def modules_with_rotaries(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Modules that hold rotary modules as their children: path, module, rotary modules."""
    for path, module in model.named_modules():
        # Not getattr: wrappers (compiled modules, PEFT) forward it to what is inside them.
        rotaries = [m for m in module._modules.values() if m is not None and is_rotary(m)]
        if rotaries:
            yield path, module, rotaries
