"""A function over a stream of items in other processes: results in order, memory bounded.

At most AHEAD batches a worker are under way, so a fast reader waits for slow workers. One worker is this process itself.
Workers are spawned, import only the module of `function`, and are given it once; a script that asks for them guards its
main part with `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

from ..errors import SupremumError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # batches in flight a worker
CHARACTERS, ITEMS = 1 << 18, 256  # a batch ends with the item that reaches either; an interruption waits for those begun
_function: Callable[[Any], Any]  # of a worker


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int,
                size: Callable[[Item], int]) -> Iterator[Result]:
    """function(item) for each item, in the items' order. `size`: an item's characters."""
    if workers <= 1:
        yield from map(function, items)
        return
    pending: deque = deque()
    source = batches(items, size)
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (function,)) as pool:
        try:
            while True:
                for batch in islice(source, max(0, AHEAD * workers - len(pending))):
                    with _held_back():
                        pending.append(pool.submit(_apply, batch))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise SupremumError("A worker process ended before its work did (killed, or out of memory).",
                                "Run again with fewer --workers.") from error
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C waits, and is held back for good in processes begun meanwhile: one that died of it while it starts would be
    taken for a failure."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in lists of about CHARACTERS characters, at most ITEMS items."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= CHARACTERS or len(batch) >= ITEMS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _apply(batch: list[Any]) -> list[Any]:
    return [_function(item) for item in batch]


def _begin(function: Callable[[Any], Any]) -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone decides."""
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _end_with_parent() -> None:
    """A parent that was killed tells its workers nothing; they would wait for more work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
