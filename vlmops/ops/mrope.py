"""Multimodal rotary position embedding (M-RoPE), fused: positions in, rotated q and k out.

Optionally with the RMSNorm of each head of q and k in front (Qwen3, Gemma-3), in one pass::

    x := x * rsqrt(mean(x ** 2) + norm_eps) * (norm_offset + norm_weight)

over all D channels. For token t and frequency j, with the axis a = freq_axis[j] that drives it::

    angle = float32(position_ids[a, t]) * inv_freq[j]
    c, s  = scaling * cos(angle), scaling * sin(angle)
    y[m]  = x[m] * c - x[n] * s
    y[n]  = x[n] * c + x[m] * s

with channels (m, n) = (j, j + R) for ``rotation="half"`` (rotate_half, NeoX) and (2j, 2j + 1) for
``"pairs"`` (GPT-J). The layout of a model is data:

==================  ==============================================  ========  ===============
model               freq_axis                                       rotation  norm
==================  ==============================================  ========  ===============
Llama, Qwen2        zeros, one axis                                 half
Qwen3               zeros, one axis                                 half      q and k
Gemma-3             zeros, one axis                                 half      norm_offset = 1
Qwen2-VL, 2.5-VL    chunked: 0 x 16, 1 x 24, 2 x 24                 half
Qwen3-VL            interleaved: 0, 1, 2, 0, 1, 2, ..               half      q and k
GLM-4V              chunked, 2R < D                                 pairs
Qwen, GLM towers    0 (height) x D/4, 1 (width) x D/4               half
Pixtral tower       the same; inv_freq cat(f[0::2], f[1::2]) of     half
                    one sequence f: even ones height, odd ones
                    width
Llama-4 tower       0 (width) x D/4, 1 (height) x D/4; ids + 1,     pairs
                    0 for the class token
==================  ==============================================  ========  ===============

No tensor of cosines or sines exists. Backward is the rotation by the opposite angle, so all that
is saved for it are the position ids, and q and k where they are normalised: with g the gradient
rotated back, r = rsqrt(mean(x ** 2) + norm_eps) and w = norm_offset + norm_weight::

    dx           = r * (w * g - r * x * mean(w * g * r * x))
    dnorm_weight = sum over tokens and heads of g * r * x

Sources: Su et al., RoFormer (arXiv 2104.09864); Wang et al., Qwen2-VL (arXiv 2409.12191); Zhang and
Sennrich, RMSNorm (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmops import _library, dispatch
from vlmops.ops.registration import overloads, register, triton_twin

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
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises the heads of q and k, if asked to, and rotates them by their positions.

    Differentiable in q, k and the weights of the norms. Arithmetic is float32, rounded once.

    Args:
        q: Queries ``[B, Hq, S, D]`` (``head_axis=1``), ``[B, S, Hq, D]`` (``head_axis=2``) or
            ``[N, Hq, D]``; float32, bfloat16 or float16; any strides.
        k: Keys like q, with any number of heads.
        position_ids: Integer ids ``[A, B, S]`` (``[A, N]``), one row for each of the A axes; any
            strides; within +-2^24, the integers that float32 holds.
        inv_freq: Radians per position ``[R]``, floating; 2R <= D. The first 2R channels are
            rotated, the others are not. ids x inv_freq is computed in float32.
        freq_axis: The axis that drives each frequency ``[R]``, integer, in [0, A). See
            `mrope_freq_axis`.
        rotation: Which channels form a pair: ``"half"`` (j, j + R) or ``"pairs"`` (2j, 2j + 1).
        scaling: Multiplies cosine and sine (Hugging Face's ``attention_scaling``).
        head_axis: Dimension of q that holds the heads.
        q_norm_weight: ``[D]``, float32, bfloat16 or float16, any stride: every head of q is
            normalised before its rotation. None: no norm, and the rest of it has no effect.
        k_norm_weight: The same for k.
        norm_eps: Added to the mean of squares; positive.
        norm_offset: Added to the weights in float32; 1.0 for Gemma's (1 + weight).
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None: what
            `vlmops.backend`, then ``VLMOPS_BACKEND``, then the default say.

    Returns:
        The rotated q and k, with the shapes, dtype and order of strides of q and k.

    Raises:
        RuntimeError: an argument does not fit, or the backend that was asked for cannot run; the
            message names it, what was expected, what came.
        ValueError: there is no such backend.
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
    tensors = (q, k, position_ids, inv_freq, freq_axis)
    norm = (q_norm_weight, k_norm_weight, norm_eps, norm_offset)
    if torch.compiler.is_compiling():
        name = dispatch.choose("mrope", backend, q.device.type)
        if name == "reference":
            return _plain(*tensors, rotation, scaling, head_axis, *norm)
        op = torch.ops.vlmops.mrope_triton if name == "triton" else torch.ops.vlmops.mrope
        result: tuple[Tensor, Tensor] = op(*tensors, rotation, scaling, head_axis, *norm)
        return result
    _library.require()
    _check_tensors("mrope", *tensors, q_norm_weight, k_norm_weight)
    ops = _COMPILED
    if backend is not None or dispatch.asked.get() is not None or not q.is_cpu:
        name = dispatch.choose("mrope", backend, q.device.type)
        if name == "reference":
            return _plain(*tensors, rotation, scaling, head_axis, *norm)
        if name == "triton":
            ops = _TRITON
    if q_norm_weight is None and k_norm_weight is None:
        return _rotate(ops.forward, *tensors, rotation, scaling, head_axis)
    return _norm_rotate(ops, *tensors, rotation, scaling, head_axis, *norm)


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
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`mrope` written over q and k: no memory beyond theirs, for inference.

    Args: see `mrope`. q and k must not overlap.

    Returns:
        q and k themselves.

    Raises:
        RuntimeError: as `mrope`; also if q, k or a weight requires grad while grad mode is on,
            under forward-mode differentiation, or if elements of q and k may share memory.
    """
    tensors = (q, k, position_ids, inv_freq, freq_axis)
    norm = (q_norm_weight, k_norm_weight, norm_eps, norm_offset)
    if torch.compiler.is_compiling():
        name = dispatch.choose("mrope", backend, q.device.type)
        if name == "reference":
            _plain_in_place(*tensors, rotation, scaling, head_axis, *norm)
        else:
            op = torch.ops.vlmops.mrope_triton_ if name == "triton" else torch.ops.vlmops.mrope_
            op(*tensors, rotation, scaling, head_axis, *norm)
        return q, k
    _library.require()
    _check_tensors("mrope_", *tensors, q_norm_weight, k_norm_weight)
    op = _COMPILED.in_place
    if backend is not None or dispatch.asked.get() is not None or not q.is_cpu:
        name = dispatch.choose("mrope", backend, q.device.type)
        if name == "reference":
            _plain_in_place(*tensors, rotation, scaling, head_axis, *norm)
            return q, k
        if name == "triton":
            op = _TRITON.in_place
    normed = q_norm_weight is not None or k_norm_weight is not None
    _in_place(op, *tensors, rotation, scaling, head_axis, *(norm if normed else ()))
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
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`mrope` in plain torch: exact in float64 once the float32 angle is formed; slow."""
    ids = position_ids.float().movedim(0, -1)  # [*tokens, A]
    angle = (ids[..., freq_axis.long()] * inv_freq.float()).double().unsqueeze(head_axis)
    cos, sin = angle.cos() * scaling, angle.sin() * scaling

    def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x.double()
            x = x / (x.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
            x = x * (norm_offset + weight.double())
        width = 2 * inv_freq.shape[0]
        head, rest = x[..., :width].double(), x[..., width:].double()
        if rotation == "half":
            a, b = head.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = head[..., 0::2], head[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((turned, rest), dim=-1)

    return rotate(q, q_norm_weight), rotate(k, k_norm_weight)


def _plain(*args: Any) -> tuple[Tensor, Tensor]:
    """`reference` as a backend: in the dtype of q, like the kernels."""
    *tensors, rotation, scaling, head_axis, q_weight, k_weight, eps, offset = args
    q, k = reference(
        *tensors,
        rotation=rotation,
        scaling=scaling,
        head_axis=head_axis,
        q_norm_weight=q_weight,
        k_norm_weight=k_weight,
        norm_eps=eps,
        norm_offset=offset,
    )
    return q.to(tensors[0].dtype), k.to(tensors[1].dtype)


def _plain_in_place(q: Tensor, k: Tensor, *args: Any) -> None:
    q_out, k_out = _plain(q, k, *args)
    q.copy_(q_out)
    k.copy_(k_out)


# Registration. The schemas and the CPU kernels are the library's, Triton's kernels are ops of their
# own with the same schemas; measured costs of the ways to register autograd are in CONTRIBUTING.md.


class _Ops(NamedTuple):
    """The overloads of one implementation."""

    forward: Any
    in_place: Any
    backward: Any
    norm_backward: Any


class _Rotate(torch.autograd.Function):
    """The rotation is linear and its adjoint is the rotation back: derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        _Rotate.save(ctx, args)
        return _call(*args)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...]) -> None:
        ctx.op, _, __, *tensors = inputs[:6]
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
        q, k = _rotate(_ADJOINTS[ctx.op], grad_q, grad_k, *ctx.saved_tensors, *ctx.options)
        return None, q if needs_q else None, k if needs_k else None, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, _: None, q: Tensor, k: Tensor, *__: None) -> tuple[Tensor, Tensor]:
        return _rotate(ctx.op, q, k, *ctx.saved_tensors, *ctx.options)


class _RotateUnderTransforms(_Rotate):
    """The same for functorch, which wants forward without a context: twice the cost of a call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _call(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Rotate.save(ctx, inputs)


class _NormRotate(torch.autograd.Function):
    """With norms: first derivatives; the others come from `_in_parts`."""

    @staticmethod
    def forward(ctx: Any, ops: _Ops, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *positions, rotation, scaling, head_axis, q_weight, k_weight, eps, offset = args
        ctx.save_for_backward(
            None if q_weight is None else q,
            None if k_weight is None else k,
            *positions,
            q_weight,
            k_weight,
        )
        ctx.ops = ops
        ctx.options = rotation, scaling, head_axis
        ctx.norm = eps, offset
        return _call(ops.forward, q, k, *args)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[i] for i in (1, 2, 9, 10)]
        *tensors, q_weight, k_weight = ctx.saved_tensors
        args = *tensors, *ctx.options, q_weight, k_weight, *ctx.norm
        grads = _norm_backward(ctx.ops, grad_q, grad_k, *args, *needs)
        used = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return None, *used[:2], *[None] * 6, *used[2:], None, None


def _call(op: Any, *args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, Tensor] = op(*args)
    return result


def _rotate(op: Any, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Forward or backward; skips autograd's Python layer when no derivative can be asked for."""
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if not wants_grad and forward_ad._current_level < 0:
        return _call(op, q, k, *args)
    transformed = torch._C._functorch.maybe_current_level() is not None
    function = _RotateUnderTransforms if transformed else _Rotate
    result: tuple[Tensor, Tensor] = function.apply(  # type: ignore[no-untyped-call]
        op, q, k, *args
    )
    return result


def _norm_rotate(
    ops: _Ops,
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `_rotate`, with norms. Defaults are the schema's: torch leaves out what equals them."""
    args = (q, k, position_ids, inv_freq, freq_axis, rotation, scaling, head_axis)
    if q_weight is None and k_weight is None:
        return _rotate(ops.forward, *args)
    norm = (q_weight, k_weight, eps, offset)
    wants_grad = torch.is_grad_enabled() and _any_requires_grad(q, k, q_weight, k_weight)
    if not wants_grad and forward_ad._current_level < 0:
        return _call(ops.forward, *args, *norm)
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        return _in_parts(ops, *args, *norm)
    result: tuple[Tensor, Tensor] = _NormRotate.apply(  # type: ignore[no-untyped-call]
        ops, *args, *norm
    )
    return result


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _in_parts(
    ops: _Ops,
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str,
    scaling: float,
    head_axis: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Norms by torch's operators, then the rotation: slower, for derivatives of every kind."""

    def normalised(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float()
        if weight is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + weight.float())

    rest = (position_ids, inv_freq, freq_axis, rotation, scaling, head_axis)
    rotated = _rotate(ops.forward, normalised(q, q_weight), normalised(k, k_weight), *rest)
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def _all_needs(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    return *needs, *[True] * (4 - len(needs))  # torch leaves out what is the schema's default


def _norm_backward(
    ops: _Ops,
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *needs: bool,
) -> Sequence[Tensor]:
    """The gradients of q, k and the weights; an empty tensor for one that nobody needs."""
    args = (position_ids, inv_freq, freq_axis, rotation, scaling, head_axis)
    differentiable = _any_requires_grad(grad_q, grad_k, q, k, q_weight, k_weight)
    if not (torch.is_grad_enabled() and differentiable):
        with torch._C._AutoDispatchBelowAutograd():
            result: tuple[Tensor, ...] = ops.norm_backward(
                grad_q, grad_k, q, k, *args, q_weight, k_weight, eps, offset, *needs
            )
        return result
    # What has no norm is not saved: its gradient does not depend on it.
    q = torch.zeros_like(grad_q) if q is None else q
    k = torch.zeros_like(grad_k) if k is None else k
    inputs: list[Any] = [
        t if t is None or t.requires_grad else t.detach().requires_grad_()
        for t in (q, k, q_weight, k_weight)
    ]
    q, k, q_weight, k_weight = inputs
    outputs = _in_parts(ops, q, k, *args, q_weight, k_weight, eps, offset)
    needs = _all_needs(needs)
    wanted = {i: t for i, t in enumerate(inputs) if needs[i] and t is not None}
    grads = torch.autograd.grad(outputs, list(wanted.values()), (grad_q, grad_k), create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found[i] if i in found else grad_q.new_empty(0) for i in range(4)]


def _in_place(op: Any, q: Tensor, k: Tensor, *args: Any) -> None:
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or _any_requires_grad(*args[6:8])
    ):
        raise RuntimeError(
            "vlmops.mrope_: q, k and the weights of norms: expected tensors that require no grad, "
            "since q and k are written in place; use vlmops.mrope, or torch.no_grad()"
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
        op(q, k, *args)
    torch.autograd.graph.increment_version([t for t in (q, k) if not t.is_inference()])


_TENSORS = ("q", "k", "position_ids", "inv_freq", "freq_axis", "q_norm_weight", "k_norm_weight")


def _check_tensors(op: str, *tensors: Any) -> None:
    """What C++ cannot say: it sees tensors only, and no gradients."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) and (tensor is not None or i < 5):  # norms are optional
            raise TypeError(
                f"vlmops.{op}: {_TENSORS[i]}: expected a torch.Tensor, got {type(tensor).__name__}"
            )
    if tensors[3].requires_grad:
        raise RuntimeError(
            f"vlmops.{op}: inv_freq: expected a tensor that requires no grad, since its gradient "
            "is not computed; detach it"
        )


def _fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _fake_in_place(q, k, *args)
    return torch.empty_like(q), torch.empty_like(k)


def _fake_in_place(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *_: Any,
) -> None:
    # On the meta device nothing else looks.
    others = (k, position_ids, inv_freq, freq_axis, q_weight, k_weight)
    for name, tensor in zip(_TENSORS[1:], others, strict=True):
        if tensor is not None and tensor.device != q.device:
            raise RuntimeError(
                f"vlmops.mrope: {name}: expected on {q.device}, where q is, got {tensor.device}"
            )


def _fake_norm_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    position_ids: Tensor,
    inv_freq: Tensor,
    freq_axis: Tensor,
    rotation: str = "half",
    scaling: float = 1.0,
    head_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *needs: bool,
) -> tuple[Tensor, ...]:
    needs = _all_needs(needs)
    grads = zip((grad_q, grad_k), needs[:2], strict=True)
    weights = zip((q_weight, k_weight), (grad_q, grad_k), needs[2:], strict=True)
    return (
        *(torch.empty_like(g) if needed else g.new_empty(0) for g, needed in grads),
        *(
            g.new_empty(0) if w is None else w.new_empty(w.shape if needed else 0)
            for w, g, needed in weights
        ),
    )


if _library.error is None:
    _lib = torch.library.Library("vlmops", "FRAGMENT")
    _COMPILED = overloads(_Ops, "mrope")
    _TRITON = triton_twin(_lib, "mrope", _COMPILED)
    _AUTOGRAD = (
        _norm_rotate,
        lambda ops, *args: _in_place(ops.in_place, *args),
        lambda ops, *args: _rotate(ops.backward, *args),
        _norm_backward,
    )
    for _ops in (_COMPILED, _TRITON):
        register(
            _lib, _ops, _AUTOGRAD, (_fake, _fake_in_place, _fake, _fake_norm_backward), vmap=False
        )
    _ADJOINTS = {
        op: adjoint
        for ops in (_COMPILED, _TRITON)
        for op, adjoint in ((ops.forward, ops.backward), (ops.backward, ops.forward))
    }
