"""Multimodal rotary position embedding (M-RoPE), fused: positions in, rotated q and k out.

For token t and frequency j, with the axis a = freq_axis[j] that drives it::

    angle = float32(position_ids[a, t]) * inv_freq[j]
    c, s  = scaling * cos(angle), scaling * sin(angle)
    y[m]  = x[m] * c - x[n] * s
    y[n]  = x[n] * c + x[m] * s

with channels (m, n) = (j, j + R) for ``rotation="half"`` (rotate_half, NeoX) and (2j, 2j + 1) for
``"pairs"`` (GPT-J). The layout of a model is data:

==================  ==============================================  =====================
model               freq_axis                                       rotation
==================  ==============================================  =====================
Llama, Qwen2        zeros, one axis                                 half
Qwen2-VL, 2.5-VL    chunked: 0 x 16, 1 x 24, 2 x 24                 half
Qwen3-VL            interleaved: 0, 1, 2, 0, 1, 2, ..               half
GLM-4V              chunked, 2R < D                                 pairs
Qwen, GLM towers    0 (height) x D/4, 1 (width) x D/4               half
==================  ==============================================  =====================

No tensor of cosines or sines exists. Backward is the rotation by the opposite angle, so all that
is saved for it are the position ids.

Sources: Su et al., RoFormer (arXiv 2104.09864); Wang et al., Qwen2-VL (arXiv 2409.12191).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library

Rotation = Literal["half", "pairs"]


def mrope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    *,
    rotation: Rotation = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotates q and k by their positions; differentiable in q and k.

    Args:
        q: Queries ``[B, Hq, S, D]`` (``head_axis=1``), ``[B, S, Hq, D]`` (``head_axis=2``) or
            ``[N, Hq, D]``; float32, bfloat16 or float16; any strides.
        k: Keys like q, with any number of heads.
        position_ids: Integer ids ``[A, B, S]`` (``[A, N]``), one row for each of the A axes; any
            strides; within +-2^24, the integers that float32 holds.
        inv_freq: Radians per position ``[R]``, floating; 2R <= D. The first 2R channels are
            rotated, the others copied. ids x inv_freq is computed in float32.
        freq_axis: The axis that drives each frequency ``[R]``, integer, in [0, A). See
            `mrope_freq_axis`.
        rotation: Which channels form a pair: ``"half"`` (j, j + R) or ``"pairs"`` (2j, 2j + 1).
        scaling: Multiplies cosine and sine (Hugging Face's ``attention_scaling``).
        head_axis: Dimension of q that holds the heads.

    Returns:
        The rotated q and k, with the shapes, dtype and order of strides of q and k.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected, what came.
        TypeError: an argument is not a tensor.
        ImportError: the compiled library is not loaded.

    Example:
        >>> import torch, vlmops
        >>> q, k = torch.randn(1, 28, 17, 128), torch.randn(1, 4, 17, 128)
        >>> position_ids = torch.arange(17).expand(3, 1, 17)
        >>> inv_freq = 1e6 ** -(torch.arange(64) / 64)
        >>> freq_axis = vlmops.mrope_freq_axis([16, 24, 24])
        >>> q_rotated, k_rotated = vlmops.mrope(q, k, position_ids, inv_freq, freq_axis)
        >>> q_rotated.shape
        torch.Size([1, 28, 17, 128])
    """
    args = (q, k, position_ids, inv_freq, freq_axis, rotation, scaling, head_axis)
    if torch.compiler.is_compiling():
        result: tuple[Tensor, Tensor] = torch.ops.vlmops.mrope(*args)
        return result
    _library.require()
    _check_tensors(
        "mrope", q=q, k=k, position_ids=position_ids, inv_freq=inv_freq, freq_axis=freq_axis
    )
    return _rotate(False, *args)


def mrope_(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    *,
    rotation: Rotation = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
) -> tuple[Tensor, Tensor]:
    """`mrope` written over q and k: no memory beyond theirs, for inference.

    Args: see `mrope`. q and k must not overlap.

    Returns:
        q and k themselves.

    Raises:
        RuntimeError: as `mrope`; also if q or k requires grad while grad mode is on, under
            forward-mode differentiation, or if elements of q and k may share memory.
    """
    args = (position_ids, inv_freq, freq_axis, rotation, scaling, head_axis)
    if torch.compiler.is_compiling():
        torch.ops.vlmops.mrope_(q, k, *args)
    else:
        _library.require()
        _check_tensors(
            "mrope_", q=q, k=k, position_ids=position_ids, inv_freq=inv_freq, freq_axis=freq_axis
        )
        _rotate_in_place(q, k, *args)
    return q, k


def mrope_freq_axis(mrope_section: Sequence[int], interleaved: bool = False) -> Tensor:
    """The ``freq_axis`` of a model from its configuration.

    Args:
        mrope_section: Number of frequencies of each axis (time, height, width), summing to R.
        interleaved: False (Qwen2-VL): axis 0's frequencies, then axis 1's, and so on. True
            (Qwen3-VL): axis a > 0 has its frequencies at a, a + A, a + 2A, .., axis 0 the rest.

    Returns:
        int32 ``[R]``, on the CPU.

    Raises:
        ValueError: a section is negative, or does not fit between the others when interleaved.

    Example:
        >>> mrope_freq_axis([2, 1, 1], interleaved=True)
        tensor([0, 1, 2, 0], dtype=torch.int32)
    """
    sections = [int(n) for n in mrope_section]
    if not sections or min(sections) < 0:
        raise ValueError(f"mrope_section: expected counts of frequencies, got {mrope_section}")
    if not interleaved:
        axes = [axis for axis, n in enumerate(sections) for _ in range(n)]
        return torch.tensor(axes, dtype=torch.int32)
    freq_axis = torch.zeros(sum(sections), dtype=torch.int32)
    for axis, n in enumerate(sections[1:], start=1):
        places = freq_axis[axis : len(sections) * n : len(sections)]
        if len(places) != n:
            raise ValueError(
                f"mrope_section: expected axis {axis}'s {n} frequencies to fit at every "
                f"{len(sections)}th of {sum(sections)} places, got {mrope_section}"
            )
        places.fill_(axis)
    return freq_axis


def reference(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    *,
    rotation: Rotation = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
) -> tuple[Tensor, Tensor]:
    """`mrope` in plain torch: exact in float64 once the float32 angle is formed; slow."""
    ids = position_ids.float().movedim(0, -1)  # [*tokens, A]
    angle = (ids[..., freq_axis.long()] * inv_freq.float()).double().unsqueeze(head_axis)
    cos, sin = angle.cos() * scaling, angle.sin() * scaling

    def rotate(x: Tensor) -> Tensor:
        width = 2 * inv_freq.shape[0]
        head, rest = x[..., :width].double(), x[..., width:].double()
        if rotation == "half":
            a, b = head.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = head[..., 0::2], head[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)

    return rotate(q), rotate(k)


# Registration. The schemas and the CPU kernels are the library's; measured costs of the ways to
# register autograd are in CONTRIBUTING.md.


class _Rotate(torch.autograd.Function):
    """The rotation is linear and its adjoint is the rotation back: derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _Rotate.save(ctx, args)
        return _call(*args)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...]) -> None:
        ctx.inverse, _, __, *tensors = inputs[:6]
        ctx.options = inputs[6:]
        ctx.head_axis = inputs[8] if len(inputs) > 8 else 1
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        needs_q, needs_k = ctx.needs_input_grad[1:3]
        # A gradient nobody needs is computed for no heads.
        if not needs_q:
            grad_q = grad_q.narrow(ctx.head_axis, 0, 0)
        if not needs_k:
            grad_k = grad_k.narrow(ctx.head_axis, 0, 0)
        q, k = _rotate(not ctx.inverse, grad_q, grad_k, *ctx.saved_tensors, *ctx.options)
        return None, q if needs_q else None, k if needs_k else None, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, _: None, q: Tensor, k: Tensor, *__: None) -> tuple[Tensor, Tensor]:
        return _rotate(ctx.inverse, q, k, *ctx.saved_tensors, *ctx.options)


class _RotateUnderTransforms(_Rotate):
    """The same for functorch, which wants forward without a context: twice the cost of a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _call(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Rotate.save(ctx, inputs)


def _call(inverse: bool, *args: Any) -> tuple[Tensor, Tensor]:
    op = torch.ops.vlmops.mrope_backward if inverse else torch.ops.vlmops.mrope
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor] = op.default(*args)
    return result


def _rotate(inverse: bool, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Skips autograd's Python layer when no derivative can be asked for."""
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if not wants_grad and forward_ad._current_level < 0:
        return _call(inverse, q, k, *args)
    transformed = torch._C._functorch.maybe_current_level() is not None
    function = _RotateUnderTransforms if transformed else _Rotate
    result: tuple[Tensor, Tensor] = function.apply(  # type: ignore[no-untyped-call]
        inverse, q, k, *args
    )
    return result


def _rotate_in_place(q: Tensor, k: Tensor, *args: Any) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError(
            "vlmops.mrope_: q, k: expected tensors that require no grad, since they are written in "
            "place; use vlmops.mrope, or torch.no_grad()"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "vlmops.mrope_: expected no forward-mode differentiation, since tangents would stay "
            "unrotated; use vlmops.mrope"
        )
    if (q.is_inference() or k.is_inference()) and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "vlmops.mrope_: q, k: expected tensors made outside torch.inference_mode(), or to be "
            "called inside; clone them, or use vlmops.mrope"
        )
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vlmops.mrope_.default(q, k, *args)
    torch.autograd.graph.increment_version([t for t in (q, k) if not t.is_inference()])


def _check_tensors(op: str, **tensors: Tensor) -> None:
    """What C++ cannot say: it sees tensors only, and no gradients."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"vlmops.{op}: {name}: expected a torch.Tensor, got {type(tensor).__name__}"
            )
    if tensors["inv_freq"].requires_grad:
        raise RuntimeError(
            f"vlmops.{op}: inv_freq: expected a tensor that requires no grad, since its gradient "
            "is not computed; detach it"
        )


def _fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _fake_in_place(q, k, *args)
    return torch.empty_like(q), torch.empty_like(k)


def _fake_in_place(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, freq_axis: Tensor, *_: Any
) -> None:
    # On the meta device nothing else looks.
    others = {"k": k, "position_ids": position_ids, "inv_freq": inv_freq, "freq_axis": freq_axis}
    for name, tensor in others.items():
        if tensor.device != q.device:
            raise RuntimeError(
                f"vlmops.mrope: {name}: expected on {q.device}, where q is, got {tensor.device}"
            )


if _library.error is None:
    _lib = torch.library.Library("vlmops", "IMPL")
    _lib.impl("mrope", lambda *args: _rotate(False, *args), "Autograd")
    _lib.impl("mrope_backward", lambda *args: _rotate(True, *args), "Autograd")
    _lib.impl("mrope_", _rotate_in_place, "Autograd")
    torch.library.register_fake("vlmops::mrope", _fake)
    torch.library.register_fake("vlmops::mrope_backward", _fake)
    torch.library.register_fake("vlmops::mrope_", _fake_in_place)
