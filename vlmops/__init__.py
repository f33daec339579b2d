"""Hand-written kernels that speed up Hugging Face vision-language models, as torch custom ops."""

from vlmops import _cpus as _cpus  # before torch
from vlmops._library import cpu_isa
from vlmops.dispatch import backend
from vlmops.hf.patch import patch, patched, unpatch
from vlmops.hf.report import PatchReport
from vlmops.ops.add_norm import add_norm
from vlmops.ops.gated_cross_attention import gated_cross_attention
from vlmops.ops.gated_residual import gated_residual
from vlmops.ops.hd_transform import hd_token_counts, hd_transform
from vlmops.ops.mlp_projector import mlp_projector
from vlmops.ops.mrope import mrope, mrope_, mrope_freq_axis
from vlmops.ops.packed_attention import packed_attention
from vlmops.ops.patch_embed import Position, patch_embed
from vlmops.ops.perceiver_attention import perceiver_attention
from vlmops.ops.pixel_shuffle import pixel_shuffle, pixel_shuffle_inverse
from vlmops.ops.qformer_attention import qformer_attention
from vlmops.ops.spatial_aggregate import spatial_aggregate
from vlmops.warmup import Warmup, warmup

__version__ = "0.1.0"

__all__ = [
    "PatchReport",
    "Position",
    "Warmup",
    "add_norm",
    "backend",
    "cpu_isa",
    "gated_cross_attention",
    "gated_residual",
    "hd_token_counts",
    "hd_transform",
    "mlp_projector",
    "mrope",
    "mrope_",
    "mrope_freq_axis",
    "packed_attention",
    "patch",
    "patch_embed",
    "patched",
    "perceiver_attention",
    "pixel_shuffle",
    "pixel_shuffle_inverse",
    "qformer_attention",
    "spatial_aggregate",
    "unpatch",
    "warmup",
]
