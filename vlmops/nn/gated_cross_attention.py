"""Flamingo's gated cross-attention: a layer between those of a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.nn.parts import ACTIVATIONS, require_activation
from vlmops.ops.gated_cross_attention import gated_cross_attention
from vlmops.ops.gated_residual import gated_residual


def image_mask(media_locations: Tensor, images: int, only_latest: bool = True) -> Tensor:
    """Which images the tokens of a text see, for `GatedCrossAttentionBlock`.

    Args:
        media_locations: ``[B, S]`` bool: tokens that stand for an image each, in order.
        images: Most images of a text, as ``visual_states`` has them.
        only_latest: A token sees the last image up to it, as Flamingo's do; False: all up to it.

    Returns:
        ``[B, S, images]`` bool. Tokens before the first image see none.

    Example:
        >>> import torch, vlmops.nn
        >>> text = torch.tensor([[5, 9, 9, 5, 9]])  # 5: an image
        >>> vlmops.nn.image_mask(text == 5, 2).int().tolist()
        [[[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]]
    """
    seen = media_locations.long().cumsum(-1)[..., None]
    number = torch.arange(1, images + 1, device=seen.device)
    return seen == number if only_latest else seen >= number


def gated_cross_attention_block(
    hidden_states: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Mapping[str, Tensor],
    *,
    num_heads: int,
    block_mask: Tensor | None = None,
    tokens_per_block: int = 1,
    key_lengths: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-5,
) -> Tensor:
    """`GatedCrossAttentionBlock` as a function of its weights.

    Args:
        hidden_states: Text, ``[B, S, C]``.
        k: Keys of visual tokens, ``[B, S_k, H_kv, D]``, projected, and normalised if there are
            norms: `GatedCrossAttentionBlock.keys_and_values`.
        v: Values, like k.
        weights: By the names of the module's ``state_dict``; those of k and v are not needed.
        num_heads: H.
        block_mask: ``[B, S, G]``, see `vlmops.gated_cross_attention`; tokens that see none keep
            what they were given by the attention's branch.
        tokens_per_block: Keys of a block.
        key_lengths: ``[B]``, see `vlmops.gated_cross_attention`.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"squared_relu"``.
        eps: Of all norms.

    Returns:
        ``[B, S, C]``.

    Raises:
        KeyError: a weight, or an activation of this name, is missing.
        RuntimeError: as `vlmops.gated_cross_attention` and `vlmops.gated_residual`.
    """

    def linear(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: functional.linear(x, weights[f"{name}.weight"])

    def norm(name: str) -> Callable[[Tensor], Tensor]:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return lambda x: functional.layer_norm(x, weight.shape, weight, bias, eps)

    parts = {"attn_norm": norm, "q_proj": linear, "o_proj": linear, "mlp_norm": norm}
    parts |= {"fc1": linear, "fc2": linear}
    attend = {
        "block_mask": block_mask,
        "tokens_per_block": tokens_per_block,
        "key_lengths": key_lengths,
        "q_norm_weight": weights.get("q_norm.weight"),
        "norm_eps": eps,
    }
    return _block(
        hidden_states,
        k,
        v,
        {name: make(name) for name, make in parts.items()},
        (weights["attn_gate"], weights["mlp_gate"]),
        num_heads,
        ACTIVATIONS[activation],
        attend,
    )


def _block(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Mapping[str, Callable[[Tensor], Tensor]],
    gates: tuple[Tensor, Tensor],
    heads: int,
    activation: Callable[[Tensor], Tensor],
    attend: Mapping[str, Any],
) -> Tensor:
    q = parts["q_proj"](parts["attn_norm"](x)).unflatten(-1, (heads, -1))
    out = gated_cross_attention(q, k, v, **attend)
    mask = attend["block_mask"]
    rows = None if mask is None else mask.any(-1)
    x = gated_residual(x, parts["o_proj"](out.flatten(2)), gates[0], rows)
    hidden = parts["fc2"](activation(parts["fc1"](parts["mlp_norm"](x))))
    return gated_residual(x, hidden, gates[1])


class GatedCrossAttentionBlock(nn.Module):
    """Flamingo's XATTN-DENSE: cross-attention to visual tokens, then an MLP, each behind a gate.

    With y the text and x the visual tokens, a and b the gates, 0 at first, so that a language model
    with new layers says what it said before::

        y = y + tanh(a) * attention(norm(y), x)
        y = y + tanh(b) * fc2(activation(fc1(norm(y))))

    Args:
        hidden_size: C, of text.
        visual_size: C_v, of visual tokens.
        num_heads: H.
        head_dim: D; a multiple of 8 up to 256. None: C / H.
        num_kv_heads: H_kv, divides H. None: H.
        mlp_ratio: Width of the MLP over C.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"squared_relu"``, the paper's.
        vector_gates: Gates of C numbers instead of one.
        qk_norm: RMSNorm over the D channels of q's and k's heads, as Llama-3.2-Vision has it.
        eps: Of all norms.
        device, dtype: Of the parameters.

    Attributes, which are the keys of its ``state_dict``:
        attn_norm, mlp_norm: LayerNorm ``[C]``, weight and bias.
        q_proj: Linear ``[H D, C]``, without bias, as all others are.
        k_proj, v_proj: ``[H_kv D, C_v]``.
        o_proj: ``[C, H D]``.
        q_norm, k_norm: RMSNorm ``[D]``, with qk_norm.
        fc1, fc2: ``[mlp_ratio C, C]`` and ``[C, mlp_ratio C]``.
        attn_gate, mlp_gate: ``[1]``, or ``[C]`` with vector_gates; zeros.

    Source: Alayrac et al., Flamingo (arXiv 2204.14198), section 3.1.2 and figure 4.

    Example:
        >>> import torch, vlmops.nn
        >>> block = vlmops.nn.GatedCrossAttentionBlock(512, 768, num_heads=8)
        >>> text, images = torch.randn(2, 10, 512), torch.randn(2, 3, 64, 768)
        >>> where = torch.zeros(2, 10, dtype=torch.bool)
        >>> where[:, [0, 4, 7]] = True
        >>> out = block(text, images, vlmops.nn.image_mask(where, 3))
        >>> torch.equal(out, text)  # its gates are closed
        True
    """

    def __init__(
        self,
        hidden_size: int,
        visual_size: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        vector_gates: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_activation("GatedCrossAttentionBlock", activation)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.activation, self.eps = activation, eps
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, **made)

        inner, of_keys = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        width = int(mlp_ratio * hidden_size)
        self.attn_norm = nn.LayerNorm(hidden_size, eps, **made)
        self.q_proj, self.o_proj = linear(hidden_size, inner), linear(inner, hidden_size)
        self.k_proj, self.v_proj = linear(visual_size, of_keys), linear(visual_size, of_keys)
        self.q_norm = nn.RMSNorm(self.head_dim, eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps, **made) if qk_norm else None
        self.mlp_norm = nn.LayerNorm(hidden_size, eps, **made)
        self.fc1, self.fc2 = linear(hidden_size, width), linear(width, hidden_size)
        gates = hidden_size if vector_gates else 1
        self.attn_gate = nn.Parameter(torch.zeros(gates, **made))
        self.mlp_gate = nn.Parameter(torch.zeros(gates, **made))

    def keys_and_values(self, visual_states: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of visual tokens, once for all steps of a generation.

        Args:
            visual_states: ``[B, images, T, C_v]`` or ``[B, S_k, C_v]``.

        Returns:
            k and v, ``[B, S_k, H_kv, D]``; k normalised, with qk_norm.
        """
        flat = visual_states.flatten(1, -2)
        shape = (self.num_kv_heads, self.head_dim)
        k, v = (project(flat).unflatten(-1, shape) for project in (self.k_proj, self.v_proj))
        return k if self.k_norm is None else self.k_norm(k), v

    def forward(
        self,
        hidden_states: Tensor,
        visual_states: Tensor | None,
        block_mask: Tensor | None = None,
        *,
        keys_and_values: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Text that has looked at images.

        Args:
            hidden_states: ``[B, S, C]``.
            visual_states: ``[B, images, T, C_v]``: T tokens of each image, a resampler's, say. None
                where there is no image: the layer is skipped.
            block_mask: ``[B, S, images]`` bool: which images a token sees, `image_mask`. None: all.
                Tokens that see none get nothing from attention.
            keys_and_values: What `keys_and_values` returned for visual_states, which are not looked
                at then but may be None, ``[B, images * T, H_kv, D]``.
            key_lengths: ``[B]``: how many of a row's ``images * T`` tokens there are.

        Returns:
            ``[B, S, C]``.

        Raises:
            RuntimeError: shapes do not fit; see `vlmops.gated_cross_attention`.
        """
        if keys_and_values is None:
            if visual_states is None:
                return hidden_states
            keys_and_values = self.keys_and_values(visual_states)
        k, v = keys_and_values
        tokens = 1 if block_mask is None else k.shape[1] // max(block_mask.shape[-1], 1)
        attend = {
            "block_mask": block_mask,
            "tokens_per_block": tokens,
            "key_lengths": key_lengths,
            "q_norm_weight": None if self.q_norm is None else self.q_norm.weight,
            "norm_eps": self.eps,
        }
        gates = self.attn_gate, self.mlp_gate
        activation = ACTIVATIONS[self.activation]
        return _block(hidden_states, k, v, self._modules, gates, self.num_heads, activation, attend)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, activation={self.activation!r}"
        )
