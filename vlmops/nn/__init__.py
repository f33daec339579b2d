"""Modules on the ops, for models that transformers does not ship."""

from vlmops.nn.gated_cross_attention import (
    GatedCrossAttentionBlock,
    gated_cross_attention_block,
    image_mask,
)
from vlmops.nn.hd_transform import HDTransform
from vlmops.nn.perceiver_resampler import PerceiverResampler
from vlmops.nn.qformer import QFormerLayer
from vlmops.nn.qwen_vl_resampler import QwenVLResampler
from vlmops.nn.spatial_vision_aggregator import (
    SpatialVisionAggregator,
    VisionTokenSampler,
    existing_tokens,
)

__all__ = [
    "GatedCrossAttentionBlock",
    "HDTransform",
    "PerceiverResampler",
    "QFormerLayer",
    "QwenVLResampler",
    "SpatialVisionAggregator",
    "VisionTokenSampler",
    "existing_tokens",
    "gated_cross_attention_block",
    "image_mask",
]
