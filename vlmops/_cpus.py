"""The CPUs of this machine, and those that this process was given.

Imported before torch: with ``OMP_PROC_BIND=true`` torch's OpenMP binds the main thread to one core
when it is loaded, and processes started from then on inherit that.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

ALLOWED = frozenset(os.sched_getaffinity(0))


def cores(cpus: Iterable[int] = ALLOWED) -> int:
    """Physical cores: two threads on one core share its bandwidth."""
    siblings = [read(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in cpus]
    return len(set(siblings)) if None not in siblings else len(siblings)


def name() -> str:
    """The model of the CPU."""
    for line in (read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def read(path: str) -> str | None:
    """What the kernel says in a file; None if it has no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
