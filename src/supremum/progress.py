"""Progress on stderr: a bar with an ETA on a terminal, a line per phase in a log."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .workspace import write_atomic

T = TypeVar("T")
console = Console(stderr=True)
timings: dict[str, float] = {}  # seconds a phase, in the order of their ends; the report shows them
peaks: dict[str, float] = {}  # the process's largest resident memory by the end of each phase, MB
_kept: list[Path] = []  # where a run keeps both, so that one that resumes it goes on counting


def keep_timings(file: Path) -> None:
    """Go on from the timings that `file` holds, if it exists, and keep them there at the end of every phase."""
    if file.exists():
        earlier = json.loads(file.read_text())
        now, peak = dict(timings), dict(peaks)
        timings.clear()
        timings.update(earlier["timings"])
        peaks.update(earlier["peaks"])
        for name, seconds in now.items():
            timings[name] = timings.get(name, 0.0) + seconds
            peaks[name] = max(peaks.get(name, 0.0), peak[name])
    _kept[:] = [file]


def branch_timings(file: Path, shared: tuple[dict[str, float], dict[str, float]]) -> None:
    """Count one of a run's results by itself: from what `file` holds of it, or from `shared`, (timings, peaks) of the work
    that all of them rest on."""
    found = json.loads(file.read_text()) if file.exists() else dict(zip(("timings", "peaks"), shared, strict=True))
    for mine, kept in ((timings, found["timings"]), (peaks, found["peaks"])):
        mine.clear()
        mine.update(kept)
    _kept[:] = [file]


def forget_timings() -> None:
    """A new run begins."""
    timings.clear()
    peaks.clear()
    _kept.clear()


@contextlib.contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show and time one phase of a run; the yielded function advances it by one of `total` steps."""
    started = time.perf_counter()
    try:
        if console.is_terminal:
            with Progress(TextColumn("{task.description:<24}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(),
                          TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
                task = bar.add_task(name, total=total)
                yield lambda: bar.advance(task)
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            yield lambda: None
            print(f"{name} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - started
        peaks[name] = max(peaks.get(name, 0.0), peak_rss_mb())
        for file in _kept:
            if file.parent.exists():
                write_atomic(file, json.dumps({"timings": timings, "peaks": peaks}).encode())


def track(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` as one phase."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with phase(name, total) as advance:
        for item in items:
            yield item
            advance()


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def note(text: str) -> None:
    """One line for the person who watches."""
    console.print(text, highlight=False)
