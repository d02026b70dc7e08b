"""What one use of a block does with the hidden state.

Of a model of one text the state (N, T, d) is the block's input, and its output the next state. Of an encoder-decoder it is
one tensor, too: the encoder's side before the decoder's, along T. An encoder block changes the first positions and hands on
the rest; a decoder block changes the last ones and reads the first. What stands behind the encoder's last block (a norm)
belongs to that block's call. So a sweep, there or back, is a loop over calls on one hidden state, and gradients flow from
every decoder block into the encoder's side.

A padded position has a state like any other, but nobody attends to it and it answers nothing: its gradient is exactly zero,
and with it its weight in every sum over gradients. Only sums over inputs alone must leave it out, by `rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..text.pairs import answering, begin

READ = object()  # in a decoder call's arguments: the encoder's side of the hidden state


def alone(found: Any) -> Tensor:
    """The state of what a block gave, which may be more: T5's hand a bias of positions on."""
    state_NTd: Tensor = found[0] if isinstance(found, tuple) else found
    return state_NTd


@dataclass(frozen=True)
class Call:
    """One use of a block, in the model's own order: `block` is its name, the rest what it is called with."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden_NTd: Tensor) -> Tensor:
        """The hidden state that leaves `block`, the module of that name or what stands for it."""
        return self.join(hidden_NTd, self.output(block, hidden_NTd))

    def output(self, block: Callable[..., Any], hidden_NTd: Tensor) -> Tensor:
        """What the block itself gives."""
        return alone(block(hidden_NTd, *self.args, **self.kwargs))

    def join(self, hidden_NTd: Tensor, output_NTd: Tensor) -> Tensor:
        """The hidden state with what the block gave."""
        return output_NTd

    def at(self, part: slice | Tensor) -> Call:
        """The call for some of its windows."""
        return self

    def rows(self, x_NTI: Tensor) -> Tensor:
        """The inputs (P, I) of a layer that count: those of tokens."""
        return x_NTI.flatten(0, -2)


@dataclass(frozen=True)
class SideCall(Call):
    """One use of an encoder-decoder's block. windows: the pairs (N, T) whose masks stand in the arguments."""

    windows_NT: Tensor
    encoder: bool
    close: Callable[[Tensor], Tensor] | None = None  # of the encoder's last call: what follows its last block

    def output(self, block: Callable[..., Any], hidden_NTd: Tensor) -> Tensor:
        start = begin(self.windows_NT)
        read_NTd, written_NTd = hidden_NTd[:, :start], hidden_NTd[:, start:]
        args = [read_NTd if value is READ else value for value in self.args]
        kwargs = {key: read_NTd if value is READ else value for key, value in self.kwargs.items()}
        return alone(block(read_NTd if self.encoder else written_NTd, *args, **kwargs))

    def join(self, hidden_NTd: Tensor, output_NTd: Tensor) -> Tensor:
        start = begin(self.windows_NT)
        if not self.encoder:
            return torch.cat([hidden_NTd[:, :start], output_NTd], 1)
        return torch.cat([output_NTd if self.close is None else self.close(output_NTd), hidden_NTd[:, start:]], 1)

    def at(self, part: slice | Tensor) -> SideCall:
        total = len(self.windows_NT)

        def some(value: Any) -> Any:
            return value[part] if isinstance(value, Tensor) and total > 1 and len(value) == total else value

        return replace(self, args=tuple(map(some, self.args)), windows_NT=self.windows_NT[part],
                       kwargs={key: some(value) for key, value in self.kwargs.items()})

    def rows(self, x_NTI: Tensor) -> Tensor:
        start = begin(self.windows_NT)
        if x_NTI.shape[1] == start:
            return x_NTI[self.windows_NT[:, :start] >= 0]
        return x_NTI[answering(self.windows_NT)[:, start:]]
