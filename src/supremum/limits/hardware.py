"""What this machine can do, measured here: bytes read per second by cache level, operations per second by data type.

Reading is timed by summing a float32 vector of a given size over and over (torch.sum of a broadcast row, so one call
makes many passes and its overhead vanishes); on x86 this reaches what a hand-written AVX-512 loop reaches. Threads are
Python threads, each with a vector of its own and one torch thread, started together at a barrier. Products are square
`torch.mm` (and `torch._int_mm`). Of several timings the median is reported and the best is kept: a ceiling is computed
from the best, since a loaded machine only ever makes a reading smaller.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from .topology import GIB, MIB, Cache, caches, home, memory_limit, processor_name, usable_cores


@dataclass(frozen=True)
class Read:
    """Sustained sequential reading of one working set, over and over."""

    where: str  # "L2", "L3" or "memory": the smallest level that holds it
    working_set: int  # bytes, all threads together
    threads: int
    gb_s: float  # 10^9 bytes a second, median
    best_gb_s: float


@dataclass(frozen=True)
class Peak:
    """Square matrix products."""

    dtype: str
    threads: int
    gflop_s: float  # 10^9 multiply or add operations a second, median
    best_gflop_s: float


@dataclass(frozen=True)
class Machine:
    device: str  # "cpu" or "cuda"
    name: str
    cores: int  # that this process may use
    memory_bytes: int  # that this process may use: the least of RAM and control-group limits
    caches: tuple[Cache, ...]
    reads: tuple[Read, ...]
    peaks: tuple[Peak, ...]
    busy: float = 0.0  # share of the processors that was taken by others just before the measurement

    def bandwidth(self, working_set: int, threads: int | None = None) -> float:
        """Best bytes per second seen for reading `working_set` bytes, on a straight line in the logarithm of the size
        between the measured sizes; `threads` None: the best of any thread count."""
        points: dict[int, float] = {}
        for read in self.reads:
            if threads in (None, read.threads):
                points[read.working_set] = max(points.get(read.working_set, 0.0), read.best_gb_s * 1e9)
        sizes = sorted(points)
        if not sizes:
            raise ValueError(f"no reading was measured with {threads} threads")
        above = next((i for i, size in enumerate(sizes) if size >= working_set), len(sizes))
        if above in (0, len(sizes)):
            return points[sizes[min(above, len(sizes) - 1)]]
        low, high = sizes[above - 1 : above + 1]
        share = math.log(working_set / low) / math.log(high / low)
        return points[low] + share * (points[high] - points[low])

    def peak(self, dtypes: Sequence[str], threads: int | None = None) -> float:
        """Best operations per second seen over these data types."""
        rates = [p.best_gflop_s for p in self.peaks if p.dtype in dtypes and threads in (None, p.threads)]
        return 1e9 * max(rates, default=0.0)

    def home(self, nbytes: int) -> str:
        """The smallest level of the memory hierarchy that holds `nbytes`."""
        return home(nbytes, self.caches, self.cores)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _together(work: Sequence[Callable[[], object]], seconds: float, least: int = 3) -> list[float]:
    """Seconds that one round of `work` takes, its parts at the same time, for about `seconds` in all."""
    barrier = threading.Barrier(len(work))
    begin: list[list[float]] = [[] for _ in work]
    end: list[list[float]] = [[] for _ in work]
    failures: list[BaseException] = []

    def loop(index: int, rounds: int) -> None:
        try:
            for _ in range(rounds):
                barrier.wait()
                begin[index].append(time.perf_counter())
                work[index]()
                end[index].append(time.perf_counter())
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    def rounds(count: int) -> list[float]:
        for times in (*begin, *end):
            times.clear()
        threads = [threading.Thread(target=loop, args=(i, count), daemon=True) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
        return [max(ends) - min(begins) for begins, ends in zip(zip(*begin, strict=True), zip(*end, strict=True),
                                                                strict=True)]  # fmt: skip

    warm = rounds(2)[-1]
    return rounds(max(least, min(200, round(seconds / max(warm, 1e-7)))))


def read_rate(working_set: int, threads: int = 1, *, seconds: float = 0.15, device: str = "cpu") -> tuple[float, float]:
    """(median, best) bytes per second of reading `working_set` bytes again and again, split over `threads`."""
    length = max(256, working_set // 4 // threads)
    passes = max(1, 16 * MIB // (4 * length)) if device == "cpu" else max(1, GIB // (4 * length))
    rows = [torch.ones(length, device=device).expand(passes, length) for _ in range(threads)]

    def one(row: torch.Tensor) -> Callable[[], object]:
        def work() -> None:
            row.sum(1)
            if device != "cpu":
                torch.cuda.synchronize()

        return work

    with _one_torch_thread():
        times = _together([one(row) for row in rows], seconds)
    nbytes = 4 * length * passes * threads
    return nbytes / statistics.median(times), nbytes / min(times)


def matmul_rate(
    dtype: str, threads: int = 1, *, size: int = 512, seconds: float = 0.3, device: str = "cpu"
) -> tuple[float, float] | None:
    """(median, best) operations per second of `size`^3 products, one a thread; None where the data type has none."""
    def product(a: torch.Tensor, b: torch.Tensor) -> object:
        return torch._int_mm(a, b) if dtype == "int8" else torch.mm(a, b)

    kind: torch.dtype = getattr(torch, dtype)
    pairs = [(torch.ones(size, size, device=device).to(kind), torch.ones(size, size, device=device).to(kind))
             for _ in range(threads)]  # fmt: skip

    def one(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
        def work() -> None:
            product(a, b)
            if device != "cpu":
                torch.cuda.synchronize()

        return work

    try:
        with _one_torch_thread():
            times = _together([one(a, b) for a, b in pairs], seconds)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    operations = 2 * size**3 * threads
    return operations / statistics.median(times), operations / min(times)


def _thread_counts(cores: int) -> list[int]:
    return sorted({1, cores, *(2**k for k in range(1, 10) if 2**k < cores)})


def measure(
    device: str = "cpu",
    *,
    working_sets: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    size: int | None = None,
    seconds: float = 0.15,
) -> Machine:
    """Measure the machine in a few seconds. `working_sets`: bytes (by default half of L2 up to four times the last
    cache); `threads`: counts (by default 1, 2, 4, ... and all cores); `size` of the products."""
    if device != "cpu":
        return _measure_cuda(working_sets, size or 8192, seconds)
    known, cores, limit = caches(), usable_cores(), memory_limit()
    busy = psutil.cpu_percent(interval=0.1) / 100
    last = known[-1].nbytes
    if working_sets is None:
        roof = max(MIB, min(2 * GIB, psutil.virtual_memory().available // 4))
        levels = [cache.nbytes // 2 for cache in known[:-1]]
        working_sets = sorted({min(roof, n) for n in (*levels, last // 4, last // 2, last, 2 * last, 4 * last)})
    counts = list(threads or _thread_counts(cores))
    reads, peaks = [], []
    for count in counts:
        for nbytes in working_sets:
            middle, best = read_rate(nbytes, count, seconds=seconds)
            reads.append(Read(home(nbytes, known, count), nbytes, count, middle / 1e9, best / 1e9))
        for dtype in ("float32", "bfloat16", "int8"):
            if rate := matmul_rate(dtype, count, size=size or 512, seconds=2 * seconds):
                peaks.append(Peak(dtype, count, rate[0] / 1e9, rate[1] / 1e9))
    return Machine("cpu", processor_name(), cores, limit, known, tuple(reads), tuple(peaks), busy)


def _measure_cuda(working_sets: Sequence[int] | None, size: int, seconds: float) -> Machine:
    facts = torch.cuda.get_device_properties(0)
    cache = int(getattr(facts, "L2_cache_size", 0)) or 4 * MIB
    known = (Cache(2, cache, 1, "measured"),)
    reads, peaks = [], []
    for nbytes in working_sets or (cache // 2, 2 * cache, min(4 * GIB, facts.total_memory // 8)):
        middle, best = read_rate(nbytes, seconds=seconds, device="cuda")
        reads.append(Read(home(nbytes, known, 1), nbytes, 1, middle / 1e9, best / 1e9))
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        if rate := matmul_rate(dtype, size=size, seconds=2 * seconds, device="cuda"):
            peaks.append(Peak(dtype, 1, rate[0] / 1e9, rate[1] / 1e9))
    return Machine("cuda", facts.name, 1, int(facts.total_memory), known, tuple(reads), tuple(peaks))
