"""What travels from rotary modules to attention modules in place of cosines and sines.

In place of cos ``[*tokens, D]`` travel the position ids ``[*tokens, A]``, in place of sin the bits
of the frequencies ``[*tokens, R]``, one row of memory seen as many: whatever a model does along the
tokens (Qwen2.5-VL sorts them into windows) does the right thing to both. Complex rotations
``[*tokens, R]`` become integers ``[*tokens, A + R]``. The dtype, int32, tells what it is.

Where the kernel cannot serve a call (float64, torch.jit.trace, ..) the rotary module does what it
did before, and an attention module that meets real cosines and sines applies them as it did before.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmops import dispatch
from vlmops.hf import norms, rotary
from vlmops.hf.aliasing import may_overwrite
from vlmops.hf.norms import Deferred, Norms, Study
from vlmops.hf.rotary import Apply, Layout, LayoutKey
from vlmops.ops.mrope import Rotation, mrope, mrope_

Layouts = Mapping[LayoutKey, Layout]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What an attention module needs beside what travels; A and R tell which."""

    freq_axis: tuple[int, ...]
    rotation: Rotation
    scaling: float
    tensors: dict[torch.device, Tensor] = dataclasses.field(compare=False)
    """freq_axis, on each device that has asked for it."""

    def freq_axis_on(self, device: torch.device) -> Tensor:
        """``freq_axis`` for an op; copied to each device once."""
        if device not in self.tensors:
            tensor = torch.tensor(self.freq_axis, dtype=torch.int32, device=device)
            if torch.compiler.is_compiling():
                return tensor
            self.tensors[device] = tensor
        return self.tensors[device]


Turns = Mapping[tuple[int, int], Turn]
"""By A and R."""


def turns_of(layouts: Iterable[Layouts]) -> dict[tuple[int, int], Turn] | None:
    """(A, R) -> turn for all layouts of a place; None if that is ambiguous."""
    turns: dict[tuple[int, int], Turn] = {}
    for layout in (layout for by_key in layouts for layout in by_key.values()):
        tensor = torch.tensor(layout.freq_axis, dtype=torch.int32)
        tensors = {tensor.device: tensor}
        turn = Turn(layout.freq_axis, layout.rotation, layout.scaling, tensors)
        if turns.setdefault((layout.axes, len(layout.freq_axis)), turn) != turn:
            return None
    return turns


def rotary_forward(original: Any, layouts: Layouts) -> Callable[..., Any]:
    """A forward that returns what travels, or what it returned before."""
    if (None, 0) in layouts:
        return _table_forward(original)
    indices = {layout: torch.tensor(layout.freq_index) for layout in layouts.values()}

    @torch.no_grad()
    def carry(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        given = () if layer_type is None else (layer_type,)
        layout = _layout_for(layouts, position_ids, layer_type)
        if layout is None or rotary.read_scaling(self, layer_type) != layout.scaling:
            return original(self, x, position_ids, *given)
        # A copy, since dynamic types change the buffer; as bits, since wrappers that cast floating
        # inputs (FSDP's mixed precision) would round it.
        inv_freq = getattr(self, layout.buffer).to(device=x.device, dtype=torch.float32, copy=True)
        if layout.freq_index != tuple(range(len(inv_freq))):
            inv_freq = inv_freq[indices[layout].to(x.device)]
        ids = position_ids
        if (
            not torch.compiler.is_compiling()
            and ids.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            ids = ids.clone()  # backward could not save it
        if layout.axes_dim is None:
            ids = ids[..., None]
        elif layout.axes_dim == 0:
            ids = ids.expand(layout.axes, -1, -1).movedim(0, -1)
        bits = inv_freq.view(torch.int32).expand(*ids.shape[:-1], -1)
        return torch.cat((ids.int(), bits), dim=-1) if layout.complex else (ids, bits)

    if _is_dynamic(original):
        from transformers.modeling_rope_utils import dynamic_rope_update

        carry = dynamic_rope_update(carry)  # type: ignore[no-untyped-call]

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        given = () if layer_type is None else (layer_type,)
        served = (
            refuses(x.device) is None  # a model may move after it was patched
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and not position_ids.is_floating_point()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and not self._forward_hooks  # they expect cosines and sines
        )
        return (carry if served else original)(self, x, position_ids, *given)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def refuses(device: torch.device) -> str | None:
    """Why the op does not run on a device and what to do, or None if it does."""
    return dispatch.refuses("mrope", device)


def _table_forward(original: Any) -> Callable[..., Any]:
    """The same for a constant table of rotations (`rotary.table_of`)."""

    @torch.no_grad()
    def forward(self: Any, x: Tensor) -> Tensor:
        table: Tensor = original(self, x)
        if table.device.type not in ("cpu", "meta"):
            return table  # its factors would be read back from a GPU at every call
        if torch.jit.is_tracing() or self._forward_hooks:  # type: ignore[attr-defined, no-untyped-call]
            return table
        ids, inv_freq = rotary.factor_table(table)
        bits = inv_freq.view(torch.int32).expand(len(ids), -1)
        return torch.cat((ids.int(), bits), dim=-1)[:, None]  # [N, 1, A + R]

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return forward


def _layout_for(layouts: Layouts, ids: Tensor, layer_type: str | None) -> Layout | None:
    for (known, axes), layout in layouts.items():
        if known != layer_type:
            continue
        if layout.axes_dim is None and ids.dim() == 2:
            return layout
        if layout.axes_dim == 0 and ids.dim() == 3 and ids.shape[0] in (1, axes):
            return layout
        if layout.axes_dim == -1 and ids.shape[-1] == axes:
            return layout
    return None


def _is_dynamic(function: Any) -> bool:
    while function is not None:
        if function.__globals__["__name__"] == "transformers.modeling_rope_utils":
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def apply_function(apply: Apply, turns: Turns, study: Study) -> Any:
    """The function that rotates, for what travels; the model's own for anything else.

    In place only for attention that has been rehearsed, in place too.
    """
    default = apply.unsqueeze_dim
    put_off = study.norms if isinstance(study.norms, Norms) else None
    rehearsed = study.rehearsed

    def rotate_complex(q: Tensor, k: Tensor, freqs: Any = None, **named: Any) -> Any:
        freqs = named.popitem()[1] if freqs is None else freqs  # whatever its name is
        if freqs.is_complex():
            return apply.function(q, k, freqs)
        in_place = rehearsed and may_overwrite(q) and may_overwrite(k)
        axes = next(axes for axes, frequencies in turns if axes + frequencies == freqs.shape[-1])
        if freqs.dim() == q.dim() - 1 and freqs.shape[1] == 1 != q.shape[1]:
            freqs = freqs[:, 0]  # a tower's table
        return _rotate(turns, q, k, freqs[..., :axes], freqs[..., axes:], 2, in_place)

    def rotate_one(x: Tensor, cos: Any, sin: Any, unsqueeze_dim: int | None = default) -> Any:
        if sin.dtype != torch.int32:
            _require_real(turns, cos, sin)
            return apply.function(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
        in_place = rehearsed and may_overwrite(x)
        heads = rotary.heads_from_right(apply, cos.dim() - 1, unsqueeze_dim)
        return _rotate(turns, x, x.narrow(-heads, 0, 0), cos, sin, heads, in_place)[0]

    def rotate(
        q: Tensor, k: Tensor, cos: Any, sin: Any, unsqueeze_dim: int | None = default
    ) -> Any:
        sin, *deferred = sin if isinstance(sin, Deferred) else (sin,)
        if sin.dtype != torch.int32:  # the rotary module was not asked, or could not serve
            _require_real(turns, cos, sin)
            if deferred:
                q, k = norms.normalise(deferred[0], q), norms.normalise(deferred[1], k)
            given = {} if unsqueeze_dim is None else {"unsqueeze_dim": unsqueeze_dim}
            return apply.function(q, k, cos, sin, **given)
        in_place = rehearsed and may_overwrite(q) and may_overwrite(k)
        heads = rotary.heads_from_right(apply, cos.dim() - 1, unsqueeze_dim)
        weights: list[Any] = [n.weight if norms.defers(n) else None for n in deferred]
        return _rotate(turns, q, k, cos, sin, heads, in_place, weights, put_off)

    return rotate_complex if apply.complex else rotate if apply.rows == 2 else rotate_one


def _require_real(turns: Turns, cos: Tensor, sin: Tensor) -> None:
    """Cosines and sines have the same width; what travels has not, whatever it was cast to."""
    if cos.shape[-1] != sin.shape[-1] and (cos.shape[-1], sin.shape[-1]) in turns:
        raise RuntimeError(
            f"the model cast its position_embeddings to {sin.dtype} on their way to the attention "
            "layers, and vlmops.patch had put integers in their place: call vlmops.unpatch, and "
            "please report the model"
        )


def _rotate(
    turns: Turns,
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    bits: Tensor,
    heads: int,
    in_place: bool,
    weights: Sequence[Tensor | None] = (),
    put_off: Norms | None = None,
) -> tuple[Tensor, Tensor]:
    """`mrope` of q and k, given what travels.

    Args:
        turns: See `turns_of`.
        q: Queries, their heads in the dimension ``-heads``.
        k: Keys.
        ids: ``[*tokens, A]``.
        bits: ``[*tokens, R]``.
        heads: 2 or 3.
        in_place: Whether q and k may be written.
        weights: Of the norms of q and k, if they were put off.
        put_off: Those norms.
    """
    turn = turns[ids.shape[-1], bits.shape[-1]]
    packed = ids.dim() == 2
    position_ids = ids.T if packed else ids.permute(2, 0, 1)  # [A, *tokens]
    if ids.shape[0] and ids.shape[-2]:
        bits = bits[0] if packed else bits[0, 0]
    else:
        bits = bits.new_zeros(bits.shape[-1])
    if q.dim() == 4:
        position_ids = position_ids[:, None] if packed else position_ids
        if position_ids.shape[1] != q.shape[0]:
            position_ids = position_ids.expand(-1, q.shape[0], -1)
    options: dict[str, Any] = {
        "position_ids": position_ids,
        "inv_freq": bits.view(torch.float32),
        "freq_axis": turn.freq_axis_on(q.device),
        "rotation": turn.rotation,
        "scaling": turn.scaling,
        "head_axis": q.dim() - heads,
    }
    if put_off is not None:
        options |= {"norm_eps": put_off.eps, "norm_offset": put_off.offset}
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights, strict=True))
    if q.dtype != k.dtype:  # autocast around one of the projections
        none_of_q, none_of_k = q.narrow(-heads, 0, 0), k.narrow(-heads, 0, 0)
        return mrope(q, none_of_q, **options)[0], mrope(none_of_k, k, **options)[1]
    if in_place:
        return mrope_(q, k, **options)
    return mrope(q, k, **options)
