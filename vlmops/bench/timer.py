"""Times calls in turns, and voids the samples that other programs disturbed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)

SHORTEST_SAMPLE = 500e-6
"""Seconds; quicker calls are timed in batches, where clock and cold caches cost little."""

DISTURBED = 0.02
"""A sample is void when a thread waited for a core for more than this part of it."""

ATTEMPTS = 3
"""Voided samples are repeated until each call was tried this many times the rounds asked for."""

ENOUGH = 3
"""Fewer undisturbed samples than this give no number."""

_TIME_SLICE = 4e-3  # what an involuntary context switch costs when a busy program causes it


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call over the undisturbed samples; None where there are too few of them."""

    median: float | None
    p25: float | None
    p75: float | None
    samples: int
    voided: int
    calls_per_sample: int


def waits() -> dict[int, float]:
    """Seconds that each thread of this process has been kept waiting for a core, up to now.

    From the kernel's ``schedstat``. Involuntary context switches cannot tell a busy neighbour from
    the kernel's own threads, which on an idle machine interrupt whatever faults in pages 60 times
    a second for microseconds each: they are counted only where there is no ``schedstat``.
    """
    found = {}
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            ran, waited, _ = task.read_text().split()
            if int(ran) > 0:  # zero: a kernel that does not count
                found[int(task.parent.name)] = int(waited) * 1e-9
    return found or {0: resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw * _TIME_SLICE}


def longest_wait(since: Mapping[int, float], now: Mapping[int, float]) -> float:
    """Seconds that the thread which waited most was kept waiting between two `waits`."""
    return max(wait - since.get(thread, 0.0) for thread, wait in now.items())


def interleave(
    calls: Mapping[K, Callable[[], Any]],
    budget: float,
    rounds: tuple[int, int],
    *,
    after_round: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    waiting: Callable[[], Mapping[int, float]] = waits,
) -> dict[K, Timing]:
    """Times each call once a round, so that drift of the machine meets all of them alike.

    The order changes from round to round: none always finds the cache its neighbour left.

    Args:
        calls: What to time, by name. Results are dropped at once, as part of the call.
        budget: Seconds that all rounds together should take.
        rounds: At least and at most so many rounds, whatever the budget.
        after_round: Called between rounds, untimed.
        clock: Seconds.
        waiting: Seconds that each thread has waited for a core, see `waits`.
    """

    def sample(call: Callable[[], Any], repeats: int) -> tuple[float, bool]:
        before, start = waiting(), clock()
        for _ in range(repeats):
            call()
        elapsed = clock() - start
        return elapsed / repeats, longest_wait(before, waiting()) > DISTURBED * elapsed

    repeats = {}
    round_length = 0.0
    for name, call in calls.items():
        quickest = min(sample(call, 1)[0] for _ in range(3))
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(quickest, 1e-7)))
        round_length += quickest * repeats[name]
    after_round()

    wanted = min(max(int(budget / round_length), rounds[0]), rounds[1])
    samples: dict[K, list[float]] = {name: [] for name in calls}
    voided = dict.fromkeys(calls, 0)
    shuffle = random.Random(0).shuffle
    for _ in range(ATTEMPTS * wanted):
        pending = [name for name in calls if len(samples[name]) < wanted]
        if not pending:
            break
        shuffle(pending)
        for name in pending:
            seconds, disturbed = sample(calls[name], repeats[name])
            if disturbed:
                voided[name] += 1
            else:
                samples[name].append(seconds)
        after_round()
    return {name: summarize(samples[name], voided[name], repeats[name]) for name in calls}


def summarize(samples: list[float], voided: int, calls_per_sample: int) -> Timing:
    """Median and quartiles of undisturbed samples, in seconds per call."""
    p25 = median = p75 = None
    if len(samples) >= ENOUGH:
        p25, median, p75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, p25, p75, len(samples), voided, calls_per_sample)
