"""The order of training examples as a pure function: draw i of a run is example p_e[i mod n] of epoch e = i div n.

p_e is the permutation of the seed and e (of the examples' own making where they have `order(draw, seed)`: packed tokens are
too many to list); whatever is random about an example (which tokens are masked) comes from a
generator of the seed and i. So a run that starts again at step k sees what it would have seen, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

Transform = Callable[[Any, np.random.Generator], Any]  # (example, generator) -> example


class Drawn(Dataset[Any]):
    """`draws` examples of a data set in shuffled epochs, each through `transform`."""

    def __init__(self, examples: Sequence[Any], draws: int, seed: int, transform: Transform | None = None) -> None:
        self.examples, self.draws, self.seed, self.transform = examples, draws, seed, transform
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.draws

    def place(self, draw: int) -> int:
        """Which example draw number `draw` is."""
        if (order := getattr(self.examples, "order", None)) is not None:
            return int(order(draw, self.seed))
        epoch, within = divmod(draw, len(self.examples))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.examples))
        return int(self._order[1][within])

    def __getitem__(self, draw: int) -> Any:
        if not 0 <= draw < self.draws:
            raise IndexError(draw)
        example = self.examples[self.place(draw)]
        return self.transform(example, np.random.default_rng([self.seed, 1, draw])) if self.transform else example
