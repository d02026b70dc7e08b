"""A block run once on all windows, held before each layer that is about to be solved.

Each batch of windows runs in a thread of its own, one thread at a time: all are brought to the next layer, its inputs are
handed out, its weights may be changed, and the threads go on with the new ones. So a block whose layers are solved one
after the other on what they really see is run once, and not once a layer.

A layer that writes into the residual stream (residual.py) is held where the stream is read next: its output is first taken
for zero, so that what is read is what the stream held, R; its real output is added when the walk goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..stats.calls import Call
from ..stats.sweep import batches
from .residual import OUTPUT


@dataclass(frozen=True)
class Seen:
    """One layer's inputs x (tokens, I), batch by batch, and what the stream held, R (tokens, d), if it writes into it."""

    inputs: list[Tensor]
    held: list[Tensor]


class _Abandoned(Exception):
    """Ends a batch's thread when the walk is given up."""


class _Lane(threading.Thread):
    """One batch's run through the block. It runs only while `advance` waits for it."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        super().__init__(daemon=True)
        self._run, self._threads = run, torch.get_num_threads()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._abandoned = False
        self.waiting: dict[str, Tensor] = {}  # inputs of the writers that have run, their output not yet in the stream
        self.key: str | None = None  # where it is held; None at the end
        self.x_TI: Tensor | None = None
        self.held_Td: Tensor | None = None
        self.output: Tensor | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
            torch.set_num_threads(self._threads)
            with torch.no_grad():
                self.output = self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        self.key = self.x_TI = self.held_Td = None
        self._back.release()

    def advance(self) -> str | None:
        """Run to the next layer; its name, or None at the end of the block."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.key

    def hold(self, key: str, x_TI: Tensor, held_Td: Tensor | None) -> None:
        self.key, self.x_TI, self.held_Td = key, x_TI, held_Td
        self._back.release()
        self._wait()

    def abandon(self) -> None:
        self._abandoned = True
        self._turn.release()
        self.join()

    def _wait(self) -> None:
        self._turn.acquire()
        if self._abandoned:
            raise _Abandoned


def _lane() -> _Lane:
    lane = threading.current_thread()
    assert isinstance(lane, _Lane)
    return lane


class Walk:
    """Iterate for (layer name, Seen) of each of `layers`, in the order in which they run; then `output` (N, T, d) is there.

    places: writer -> the submodule that reads the stream next (`residual.writers`). Layers that read the same input are
    held together, before the first of them, which is the one to name in `layers`.
    """

    output: Tensor

    def __init__(self, block: nn.Module, call: Call, hidden_NTd: Tensor, layers: Sequence[str],
                 places: Mapping[str, str]) -> None:
        self._block, self._call, self._hidden_NTd, self._layers = block, call, hidden_NTd, layers
        self._places = {name: place for name, place in places.items() if name in layers}

    def __iter__(self) -> Iterator[tuple[str, Seen]]:
        lanes = [_Lane(partial(self._run, self._call.at(part), self._hidden_NTd[part])) for part in batches(self._hidden_NTd)]
        try:
            with self._hooks():
                while (key := self._advance(lanes)) is not None:
                    yield key, Seen([lane.x_TI for lane in lanes if lane.x_TI is not None],
                                    [lane.held_Td for lane in lanes if lane.held_Td is not None])
            self.output = torch.cat([lane.output for lane in lanes if lane.output is not None])
        finally:
            for lane in lanes:
                lane.abandon()

    @staticmethod
    def _advance(lanes: Sequence[_Lane]) -> str | None:
        keys = {lane.advance() for lane in lanes}
        assert len(keys) == 1, keys  # every batch takes the same way
        return keys.pop()

    def _run(self, call: Call, hidden_NTd: Tensor) -> Tensor:
        output = call.output(self._block, hidden_NTd)
        self._meet(OUTPUT, output)
        return call.join(hidden_NTd, output)

    def _meet(self, place: str, stream_NTd: Tensor) -> None:
        """The stream is read: hand out what it held and add, in place, what the waiting writer gives."""
        lane = _lane()
        name = next((name for name in lane.waiting if self._places[name] == place), None)
        if name is None:
            return
        x_NTI = lane.waiting.pop(name)
        lane.hold(name, x_NTI.flatten(0, -2), stream_NTd.flatten(0, -2).clone())
        writer: Any = self._block.get_submodule(name)
        stream_NTd += type(writer).forward(writer, x_NTI)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        def before(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if name in self._places:
                    _lane().waiting[name] = args[0]
                else:
                    _lane().hold(name, args[0].flatten(0, -2), None)
            return hook

        def nothing(x_NTI: Tensor) -> Tensor:
            return x_NTI.new_zeros(*x_NTI.shape[:-1], self._hidden_NTd.shape[-1])

        def reading(place: str) -> Any:
            return lambda module, args: self._meet(place, args[0])

        modules = dict(self._block.named_modules())
        handles = [modules[place].register_forward_pre_hook(reading(place))
                   for place in dict.fromkeys(self._places.values()) if place != OUTPUT]
        handles += [modules[name].register_forward_pre_hook(before(name)) for name in self._layers]
        for name in self._places:
            modules[name].forward = nothing
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in self._places:
                del modules[name].forward
