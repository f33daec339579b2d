"""Patching of Hugging Face models: `vlmops.patch`, `vlmops.unpatch`, `vlmops.patched`."""
