"""``vlmops bench``: what an op costs on this machine, against eager, torch.compile and memory.

Everything about an op comes from its SPEC. ``runner`` starts one process per environment, since
thread binding and torch's allocator are settled when a process starts; ``measure`` runs in them,
with ``gate`` before ``timer``; ``report`` prints.
"""

from __future__ import annotations

from vlmops.cli import CommandError


class BenchError(CommandError):
    """Ends a benchmark without numbers."""
