"""Times calls on a GPU: its own clock, cold caches, graphs for what is short, measured ceilings.

A GPU lies to a stopwatch in four ways, and each has its answer here:

* It works while the host runs ahead: events on the stream are the clock, and the host's own clock
  must agree with them where both can look (`measure_ceilings`).
* Its L2 holds the inputs of the last call: before each sample it is overwritten (`Device.flush`),
  and calls within one sample have inputs of their own. Overwritten, not read: the lines must be
  dirty as in steady state, or a small result would stay in L2 and its bytes would seem free.
* A kernel can cost less than its launch from Python, 100 us for Triton's: calls are replayed from
  CUDA graphs, and what a call costs the host is reported apart (`latency`). A call that cannot be
  captured is enqueued while the device is kept busy.
* A kernel that did not run is the fastest: nothing may beat the ceilings measured in this run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmops.bench import BenchError
from vlmops.bench.timer import Timing, summarize

K = TypeVar("K")
Call = Callable[[], Any]

DEVICES = ("cuda", "rehearsal")

SAMPLE = 400e-6
"""Seconds that a sample of short calls should take, so that events cost little of it."""

MOST_CALLS = 64
"""Calls in one graph."""

FLUSH = 5
"""The buffer that is written between samples is so many times the L2."""

SLACK = 1.03
"""A rate may be above its ceiling by that much: ceilings are the best of few samples, and vary."""

CLOCKS_AGREE = 0.8
"""The events' time of a long run of copies must be at least this part of the host's."""


class Device(Protocol):
    """What is replaced where there is no GPU."""

    torch: torch.device
    l2_bytes: int
    free_bytes: int

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Everything is built, captured and timed within."""

    def synchronize(self) -> None:
        """Waits until the device has nothing to do."""

    def flush(self) -> None:
        """Enqueues what makes L2 forget everything."""

    def busy(self, seconds: float) -> None:
        """Enqueues what keeps the device busy for so long and touches no memory."""

    def elapsed(self, work: Call) -> float:
        """Seconds on the device's clock from before to after ``work``."""

    def capture(self, calls: Sequence[Call]) -> Call:
        """Runs the calls, in turn, without the host: one replay of a graph.

        Raises:
            RuntimeError: they cannot be captured.
        """

    def launch(self) -> None:
        """Enqueues a kernel that does nothing."""

    def clock(self) -> float:
        """The host's, in seconds."""

    def describe(self) -> dict[str, Any]:
        """Name, driver, sizes: what the numbers depend on, ready for JSON."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BenchError(
                f"--device cuda: torch {torch.__version__} sees no CUDA device; install a torch "
                "built for CUDA, see that nvidia-smi lists the GPU, or leave --device out"
            )
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch)
        self.l2_bytes = int(self._properties.L2_cache_size)
        self.free_bytes = int(torch.cuda.mem_get_info(self.torch)[0])
        self._stream = torch.cuda.Stream(self.torch)
        # At least 256 MiB: a driver that tells no L2 size must not switch flushing off.
        words = max(FLUSH * self.l2_bytes, 1 << 28) // 4
        self._scratch = torch.empty(words, dtype=torch.int32, device=self.torch)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """One side stream: autograd runs backward where forward ran, which must be capturable."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Raises RuntimeError for what failed on the device, too."""
        torch.cuda.synchronize(self.torch)

    def flush(self) -> None:
        """Takes long enough for the host to enqueue a graph meanwhile."""
        self._scratch.zero_()

    def busy(self, seconds: float) -> None:
        """Counted in clocks of at most 2 GHz."""
        if seconds > 0:
            torch.cuda._sleep(int(2e9 * seconds))

    def elapsed(self, work: Call) -> float:
        """By events, which the GPU itself records."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        work()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def capture(self, calls: Sequence[Call]) -> Call:
        """Results are kept: a buffer used twice in a graph would be found in L2.

        So are the calls: a graph holds addresses, not tensors, and what only a call refers to
        (buffers to copy into, what a forward saved for its backward) would be given back to the
        driver by the next capture.
        """
        graph = torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            results = [call() for call in calls]

        def replay(_kept: Any = (calls, results)) -> None:
            graph.replay()

        return replay

    def launch(self) -> None:
        """One thread that returns at once."""
        torch.cuda._sleep(0)

    def clock(self) -> float:
        """The host's."""
        return time.perf_counter()

    def describe(self) -> dict[str, Any]:
        """The device, its driver and its clocks now."""
        p = self._properties
        smi = nvidia_smi(str(getattr(p, "uuid", "")))
        return {
            "type": "cuda",
            "name": p.name,
            "capability": f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": self.l2_bytes,
            "driver": smi.pop("driver_version", None),
            "clocks": smi or None,
        }


_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
)


def nvidia_smi(uuid: str = "") -> dict[str, str]:
    """Driver, clocks (MHz), temperature and power now; empty where nvidia-smi cannot tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    if uuid:
        command += ["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in told.stdout.splitlines()[0].split(",")]
    return dict(zip(_SMI, values, strict=False))


class _Traffic(TorchDispatchMode):
    """Counts the operators that run, and the bytes and products that each must move and do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops, self.bytes, self.flops = 0, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        leaves = torch.utils._pytree.tree_leaves
        read = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in leaves(result) if isinstance(t, Tensor)]
        if func.overloadpacket is torch.ops.aten.copy_:
            read = [args[1]]
        elif func._schema.is_mutable and not made:  # written in place, and not returned
            made = read
        self.ops += 1
        self.bytes += sum(t.numel() * t.element_size() for t in read + made)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            self.flops += 2.0 * left.numel() * right.shape[1]
        return result


class Rehearsal:
    """Runs on the CPU, with the clock of a GPU that does not exist.

    Only the device is replaced: all that is around it runs as it would on a GPU. Time is what the
    operators that ran would take at 1 TB/s, 1 PFLOP/s and 2 us a launch, so that numbers are the
    same everywhere and mean nothing.
    """

    BYTES, FLOPS, LAUNCH = 1e12, 1e15, 2e-6

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.l2_bytes = 1 << 20
        self.free_bytes = 1 << 28
        self._now = 0.0

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """There are none."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def flush(self) -> None:
        """There is no cache."""

    def busy(self, seconds: float) -> None:
        """There is nothing to wait for."""

    def elapsed(self, work: Call) -> float:
        """What the operators within would take."""
        before = self._now
        with _Traffic() as ran:
            work()
        rates = ran.bytes / self.BYTES, ran.flops / self.FLOPS
        self._now += max(ran.ops * self.LAUNCH + max(rates), self.LAUNCH)
        return self._now - before

    def capture(self, calls: Sequence[Call]) -> Call:
        """The calls themselves."""

        def replay() -> None:
            for call in calls:
                call()

        return replay

    def launch(self) -> None:
        """An operator that moves nothing."""
        torch.empty(0)

    def clock(self) -> float:
        """The same as the device's: there is no other."""
        return self._now

    def describe(self) -> dict[str, Any]:
        """So that nobody takes it for a GPU."""
        return {
            "type": "rehearsal",
            "name": "no GPU: a rehearsal on the CPU, whose numbers mean nothing",
            "capability": "none",
            "l2_bytes": self.l2_bytes,
            "driver": None,
            "clocks": None,
        }


def open_device(name: str) -> Device:
    """One of `DEVICES`.

    Raises:
        BenchError: it is not there.
    """
    return Cuda() if name == "cuda" else Rehearsal()


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The best that this device did in this run, by torch's own copy and matrix product."""

    copy_bytes_per_s: float
    """Read plus written."""
    matmul_flops: Mapping[str, float]
    """FLOP per second, by dtype."""
    launch_s: float
    """A kernel that does nothing, among others in a graph."""

    def beaten(self, bytes_: float, flops: float, dtype: str, seconds: float) -> str | None:
        """Says which ceiling a time would be above, or None if it can be true."""
        if seconds <= 0:
            return f"the clock says {seconds:g} s, which no call takes"
        rates = [("copy bandwidth", bytes_ / seconds, self.copy_bytes_per_s, "GB/s", 1e9)]
        if dtype in self.matmul_flops:
            limit = self.matmul_flops[dtype]
            rates.append(("matmul rate", flops / seconds, limit, "TFLOP/s", 1e12))
        for what, rate, limit, unit, scale in rates:
            if rate > SLACK * limit:
                return (
                    f"{100 * rate / limit:.0f} % of the {what} ({rate / scale:.4g} of "
                    f"{limit / scale:.4g} {unit}): the clock is wrong or a kernel did not run"
                )
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in the units people read."""
        return {
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "matmul_tflops": {name: rate / 1e12 for name, rate in self.matmul_flops.items()},
            "launch_us": self.launch_s * 1e6,
        }


def measure_ceilings(device: Device, dtypes: Sequence[str], quick: bool = False) -> Ceilings:
    """Copies and multiplies what is large, on random data: zeros draw less power and run faster.

    Rates are those of the quickest sample, since nothing may be above them.

    Raises:
        BenchError: the device's clock and the host's disagree.
    """
    rounds = 5 if quick else 15
    copy = _copy_rate(device, rounds)
    products = {name: _matmul(device, getattr(torch, name), rounds) for name in dtypes}
    graph = device.capture([device.launch] * MOST_CALLS)
    graph()
    launches = [cold(device, graph) / MOST_CALLS for _ in range(rounds)]
    return Ceilings(copy, products, statistics.median(launches))


def _copy_rate(device: Device, rounds: int) -> float:
    size = int(min(1 << 30, device.free_bytes // 8))
    words = (size // 4,)
    source = torch.randint(-(1 << 31), (1 << 31) - 1, words, dtype=torch.int32, device=device.torch)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(rounds):
            target.copy_(source)

    copies()
    quickest = min(cold(device, lambda: target.copy_(source)) for _ in range(rounds))
    device.synchronize()
    start = device.clock()
    by_events = device.elapsed(copies)
    device.synchronize()
    by_host = device.clock() - start
    if by_events < CLOCKS_AGREE * by_host:
        raise BenchError(
            f"{rounds} copies of {size >> 20} MiB took {by_host * 1e3:.3g} ms on the host's clock "
            f"and {by_events * 1e3:.3g} ms on the device's: its clock cannot be trusted, or other "
            "programs hold the machine; stop them and run again",
            code=1,
        )
    return 2 * size / quickest


def _matmul(device: Device, dtype: torch.dtype, rounds: int) -> float:
    # Three matrices of 128 MiB in bfloat16; as large as fits elsewhere.
    n = 1 << int(math.log2(min(8192, math.isqrt(device.free_bytes // 64))))
    a, b = (torch.randn(n, n, device=device.torch).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2.0 * n**3 / min(cold(device, lambda: torch.mm(a, b, out=out)) for _ in range(rounds))


def cold(device: Device, work: Call, ahead: float = 0.0) -> float:
    """Seconds of one sample whose inputs are not in L2.

    ``ahead`` seconds the host may take to enqueue ``work`` without the device waiting for it.
    """
    device.flush()
    device.busy(ahead)
    return device.elapsed(work)


def latency(device: Device, call: Call, samples: int = 30) -> float:
    """Median seconds from an idle device to an idle device: host, launch and kernel; L2 is warm."""
    taken = []
    for _ in range(samples):
        device.synchronize()
        start = device.clock()
        call()
        device.synchronize()
        taken.append(device.clock() - start)
    return statistics.median(taken)


def estimate(device: Device, call: Call, ahead: float) -> float:
    """Seconds of a call that is launched from Python."""
    return min(cold(device, call, ahead) for _ in range(3))


def calls_per_graph(device: Device, shortest: float, bytes_per_call: int) -> int:
    """How many calls make a sample long enough, each with inputs of its own that must fit."""
    fitting = device.free_bytes // 4 // max(bytes_per_call, 1)
    return max(1, min(math.ceil(SAMPLE / max(shortest, 1e-7)), MOST_CALLS, fitting))


def interleave(
    device: Device,
    works: Mapping[K, tuple[Call, int]],
    budget: float,
    rounds: tuple[int, int],
    after_round: Call = lambda: None,
    ahead: Mapping[K, float] = MappingProxyType({}),
) -> dict[K, Timing]:
    """One cold sample of each work a round, in changing order; the device's clocks drift.

    Args:
        device: Where.
        works: What to time, by name, with the number of calls that it makes.
        budget: Seconds that all rounds together should take, flushes included.
        rounds: At least and at most so many, whatever the budget.
        after_round: Called between rounds, untimed.
        ahead: Seconds that the host needs to enqueue a work; 0 for what is not here.
    """
    flush = min(device.elapsed(device.flush) for _ in range(3))
    lead = {name: ahead.get(name, 0.0) for name in works}
    length = sum(
        cold(device, work, lead[name]) + flush + lead[name] for name, (work, _) in works.items()
    )
    after_round()
    wanted = min(max(int(budget / max(length, 1e-9)), rounds[0]), rounds[1])
    samples: dict[K, list[float]] = {name: [] for name in works}
    order = list(works)
    shuffle = random.Random(0).shuffle
    for _ in range(wanted):
        shuffle(order)
        for name in order:
            work, calls = works[name]
            samples[name].append(cold(device, work, lead[name]) / calls)
        after_round()
    return {name: summarize(samples[name], 0, calls) for name, (_, calls) in works.items()}
