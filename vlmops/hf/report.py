"""What `vlmops.patch` did and did not do."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Status = Literal["patched", "already patched", "refused", "left alone", "not present"]
_HEADERS = ("op", "module", "sites", "backend", "status")


@dataclasses.dataclass(frozen=True)
class Row:
    """One group of modules that were patched, or not, together."""

    op: str
    module: str
    """Class of the modules that call the op."""
    path: str
    """Where in the model the group hangs."""
    sites: int
    """Number of calls of the op in one forward pass."""
    backend: str
    status: Status
    reason: str = ""
    """Why it was left alone; of what was patched, what else is in it."""


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """Printable; `rows` in the order in which sites were found."""

    model: str
    rows: tuple[Row, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Op -> number of sites that run on it, however many of them this call patched.

        "processor", where one was given: 1 if it hands over raw pixels.
        """
        counts: dict[str, int] = {}
        for row in self.rows:
            patched = row.status in ("patched", "already patched")
            counts[row.op] = counts.get(row.op, 0) + (row.sites if patched else 0)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "counts": self.counts,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        table = [_HEADERS]
        for row in self.rows:
            module = f"{row.module} ({row.path})" if row.path else row.module
            status = f"{row.status}: {row.reason}" if row.reason else row.status
            table.append((row.op, module, str(row.sites or "-"), row.backend or "-", status))
        widths = [max(len(line[i]) for line in table) for i in range(len(_HEADERS) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]])
            for line in table
        ]
        return "\n".join([f"vlmops: {self.model}", *lines])
