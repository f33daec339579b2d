"""Modules on the ops, for models that transformers does not ship."""

from vlmops.nn.gated_cross_attention import (
    GatedCrossAttentionBlock,
    gated_cross_attention_block,
    image_mask,
)
from vlmops.nn.hd_transform import HDTransform

__all__ = ["GatedCrossAttentionBlock", "HDTransform", "gated_cross_attention_block", "image_mask"]
