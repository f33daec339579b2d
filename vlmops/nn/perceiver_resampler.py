"""Flamingo's connector: any number of visual tokens in, always the same number out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmops.nn.parts import (
    normed_sum,
    product,
    require,
    require_activation,
    require_lengths,
    require_mask,
)
from vlmops.ops.perceiver_attention import perceiver_attention

_IDEFICS = {
    "0.context_layer_norm": "0.norm_media",
    "0.latents_layer_norm": "0.norm_latents",
    "0.q_proj": "0.to_q",
    "0.output_proj": "0.to_out",
    "1.ln": "1.0",
    "1.fc": "1.1",
    "1.c_proj": "1.3",
}
"""Names of Idefics' parameters within a layer, and ours, where they are not the same."""


class PerceiverResampler(nn.Module):
    """Latents that look at the visual tokens of a picture or a video, and at each other.

    Of a medium's tokens x, with the embeddings of their frame and of the medium's place, and the
    latents y, a layer is::

        y = y + to_out(attention(to_q(norm(y)), to_kv([norm(x); norm(y)])))
        y = y + fc2(activation(fc1(norm(y))))

    and a norm follows the last; each norm has weights of its own. Keys are two segments that are
    never concatenated (`vlmops.perceiver_attention`); what the first layer makes of latents alone
    is made once for all media.

    Parameters have the names of OpenFlamingo's checkpoints, where they stand behind
    ``perceiver.``::

        prefix = "perceiver."
        mine = {name: checkpoint[prefix + name] for name in module.state_dict()}
        module.load_state_dict(mine)

    Idefics' (the first's), behind ``model.perceiver_resampler.``, go through `from_idefics`; the
    module wants ``activation="relu"`` then, and ``qk_norm`` as its ``qk_layer_norms_perceiver``.

    Args:
        hidden_size: C, of visual tokens and latents.
        depth: Layers, at least one.
        num_heads: H.
        head_dim: D; a multiple of 8 up to 256.
        num_latents: L.
        max_num_media: Most media of a sample, each with an embedding of its place. None: without.
        max_num_frames: Most frames of a medium, each with a time embedding. None: without.
        mlp_ratio: Width of the feed-forward layers over C.
        activation: ``"gelu"``, OpenFlamingo's, ``"relu"``, Idefics', ``"silu"`` or
            ``"squared_relu"``, the paper's.
        qk_norm: LayerNorm over the D channels of q's and k's heads.
        eps: Of all norms.
        device, dtype: Of the parameters.

    Keys of its ``state_dict``; no linear layer has a bias:
        latents: ``[L, C]``.
        frame_embs: ``[max_num_frames, C]``, if there are any.
        media_time_embs: ``[max_num_media, 1, C]``, if there are any.
        layers.{i}.0.norm_media, layers.{i}.0.norm_latents: LayerNorm ``[C]``, weight and bias.
        layers.{i}.0.to_q.weight: ``[H D, C]``.
        layers.{i}.0.to_kv.weight: ``[2 H D, C]``, keys first.
        layers.{i}.0.to_out.weight: ``[C, H D]``.
        layers.{i}.0.q_layer_norm, layers.{i}.0.k_layer_norm: LayerNorm ``[D]``, with qk_norm.
        layers.{i}.1.0: LayerNorm ``[C]``.
        layers.{i}.1.1.weight, layers.{i}.1.3.weight: ``[mlp_ratio C, C]``, ``[C, mlp_ratio C]``.
        norm: LayerNorm ``[C]``.

    Source: Alayrac et al., Flamingo (arXiv 2204.14198), section 3.1.1, figure 5 and appendix A.1.1.

    Example:
        >>> import torch, vlmops.nn
        >>> resampler = vlmops.nn.PerceiverResampler(1024, max_num_frames=8)
        >>> videos = torch.randn(1, 2, 8, 256, 1024)  # a text's two videos of up to 8 frames
        >>> frames = torch.arange(8) < torch.tensor([[[8], [3]]])
        >>> resampler(videos, frame_mask=frames).shape
        torch.Size([1, 2, 64, 1024])
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        qk_norm: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_activation("PerceiverResampler", activation)
        if head_dim % 8 or not 0 < head_dim <= 256:
            raise ValueError(
                "vlmops.nn.PerceiverResampler: head_dim: expected a multiple of 8 up to 256, got "
                f"{head_dim}"
            )
        if depth < 1:
            raise ValueError(
                f"vlmops.nn.PerceiverResampler: depth: expected 1 or more, got {depth}"
            )
        self.num_heads, self.head_dim, self.activation = num_heads, head_dim, activation
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, **made)

        def norm(size: int = hidden_size) -> nn.LayerNorm:
            return nn.LayerNorm(size, eps, **made)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, hidden_size, **made))

        self.latents = drawn(num_latents)
        self.frame_embs = None if max_num_frames is None else drawn(max_num_frames)
        self.media_time_embs = None if max_num_media is None else drawn(max_num_media, 1)
        inner, width = num_heads * head_dim, int(mlp_ratio * hidden_size)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention: dict[str, nn.Module] = {"norm_media": norm(), "norm_latents": norm()}
            if qk_norm:
                attention |= {"q_layer_norm": norm(head_dim), "k_layer_norm": norm(head_dim)}
            attention |= {"to_q": linear(hidden_size, inner)}
            attention |= {"to_kv": linear(hidden_size, 2 * inner)}
            attention |= {"to_out": linear(inner, hidden_size)}
            mlp = {"0": norm(), "1": linear(hidden_size, width), "3": linear(width, hidden_size)}
            self.layers.append(nn.ModuleList([nn.ModuleDict(attention), nn.ModuleDict(mlp)]))
        self.norm = norm()

    @staticmethod
    def from_idefics(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Idefics' parameters of a perceiver resampler under this module's names.

        Args:
            state_dict: ``latents``, ``blocks.{i}...`` and ``layer_norm...``, of
                ``IdeficsPerceiverResampler`` of transformers.

        Returns:
            What `load_state_dict` takes.
        """
        renamed = {}
        for name, tensor in state_dict.items():
            if name.endswith(".v_proj.weight"):
                continue
            new = name.replace("layer_norm.", "norm.") if name.startswith("layer_norm.") else name
            if name.startswith("blocks."):
                _, layer, part = name.split(".", 2)
                part, _, end = part.rpartition(".")
                if part == "0.k_proj":
                    part = "0.to_kv"
                    of_v = state_dict[name.replace("k_proj", "v_proj")]
                    tensor = torch.cat((tensor, of_v))
                new = f"layers.{layer}.{_IDEFICS.get(part, part)}.{end}"
            renamed[new] = tensor
        return renamed

    def forward(
        self,
        media: Tensor,
        *,
        frame_mask: Tensor | None = None,
        token_lengths: Tensor | None = None,
    ) -> Tensor:
        """Latents of each medium.

        Args:
            media: ``[B, T, F, v, C]``: v tokens of each of F frames of the T media of a sample. A
                picture has one frame.
            frame_mask: ``[B, T, F]`` bool: which frames exist. None: all.
            token_lengths: ``[B, T]`` int32 or int64: how many of a medium's F v tokens exist, frame
                by frame. None: all.

        Returns:
            ``[B, T, L, C]``. Latents of a medium of which nothing exists have looked at each other
            alone: they are the same for all such media, and nothing else sees what stands in
            ``media`` there. Tell the language model to leave them out (`vlmops.nn.image_mask`).

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected, what
                came.
            RuntimeError: as `vlmops.perceiver_attention`.
        """
        sizes = ("B", "T", "F", "v", self.latents.shape[1])
        require("PerceiverResampler", "media", media, sizes, self.latents)
        samples, count, frames, tokens = media.shape[:4]
        if frames * tokens == 0:
            raise ValueError(
                "vlmops.nn.PerceiverResampler: media: expected at least one token of each, got "
                f"shape {list(media.shape)}; frame_mask or token_lengths say which do not exist"
            )
        require_mask("PerceiverResampler", "frame_mask", frame_mask, (samples, count, frames))
        require_lengths("PerceiverResampler", "token_lengths", token_lengths, (samples, count))
        x = self._placed(media).flatten(2, 3).flatten(0, 1)  # [B T, F v, C]
        seen: dict[str, Any] = {
            "key_mask": None if frame_mask is None else frame_mask.flatten(0, 1),
            "tokens_per_block": tokens if frame_mask is not None else 1,
            "key_lengths": None if token_lengths is None else token_lengths.flatten(),
        }
        layers: Any = self.layers
        y = self.latents[None]  # one for all media, until they have looked
        norms = [*(attention["norm_latents"] for attention, _ in layers), self.norm]
        normed = norms[0](y)
        for (attention, mlp), norm in zip(layers, norms[1:], strict=True):
            out = self._attend(attention, x, normed, seen)
            normed, y = normed_sum(attention["to_out"], out, y, mlp["0"], return_sum=True)
            hidden = product(mlp["1"], normed, self.activation)
            normed, y = normed_sum(mlp["3"], hidden, y, norm, return_sum=True)
        result: Tensor = normed.unflatten(0, (samples, count))
        return result

    def _placed(self, media: Tensor) -> Tensor:
        """Tokens with the embeddings of their frames and media, added in one pass."""
        place: Tensor | None = None
        if self.frame_embs is not None:
            self._require_places("max_num_frames", media.shape[2], len(self.frame_embs))
            place = self.frame_embs[: media.shape[2], None]  # [F, 1, C]
        if self.media_time_embs is not None:
            self._require_places("max_num_media", media.shape[1], len(self.media_time_embs))
            of_media = self.media_time_embs[: media.shape[1], None]  # [T, 1, 1, C]
            place = of_media if place is None else place + of_media
        return media if place is None else media + place

    @staticmethod
    def _require_places(option: str, given: int, most: int) -> None:
        if given > most:
            what = option.removeprefix("max_num_")
            raise ValueError(
                f"vlmops.nn.PerceiverResampler: media: expected up to {most} {what}, as {option} "
                f"says, got {given}"
            )

    def _attend(self, attention: Any, x: Tensor, y: Tensor, seen: dict[str, Any]) -> Tensor:
        """``[B T, L, H D]`` of normalised latents y, ``[B T or 1, L, C]``."""
        shape = self.num_heads, self.head_dim
        q = product(attention["to_q"], y).unflatten(-1, shape)
        segments = (attention["norm_media"](x), y)
        (k, v), (k_latents, v_latents) = (
            product(attention["to_kv"], part).unflatten(-1, (2, *shape)).unbind(2)
            for part in segments
        )
        if "q_layer_norm" in attention:
            # Autocast has norms in float32, and attention wants one dtype.
            q = attention["q_layer_norm"](q).to(v.dtype)
            k, k_latents = (attention["k_layer_norm"](of).to(v.dtype) for of in (k, k_latents))
        of_all = [part.expand(len(x), -1, -1, -1) for part in (q, k_latents, v_latents)]
        return perceiver_attention(of_all[0], k, v, *of_all[1:], **seen).flatten(2)

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parameters."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, activation={self.activation!r}"
        )
