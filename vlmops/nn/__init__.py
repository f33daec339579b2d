"""Modules on the ops, for models that transformers does not ship."""

from vlmops.nn.hd_transform import HDTransform

__all__ = ["HDTransform"]
