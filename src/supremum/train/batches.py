"""The trainer of a task: batches of examples of like length, so that little is padded."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .joint import Joint
from .tasks import Task
from .trainer import Trainer

WINDOW = 50  # batches whose examples are sorted by length together


class Grouped(Dataset[Any]):
    """Draws of a data set, sorted by length within windows of batches, batches shuffled: a function of the seed alone."""

    def __init__(self, drawn: Any, batch: int, seed: int) -> None:
        self.drawn, self.batch, self.seed = drawn, batch, seed
        self._window: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, draw: int) -> Any:
        size = self.batch * WINDOW
        window, within = divmod(draw, size)
        if self._window[0] != window:
            places = range(window * size, min((window + 1) * size, len(self.drawn)))
            longest = sorted(places, key=lambda place: _lengths(self.drawn[place]))
            parts = [longest[start : start + self.batch] for start in range(0, len(longest), self.batch)]
            whole, rest = [p for p in parts if len(p) == self.batch], [p for p in parts if len(p) < self.batch]
            order = np.random.default_rng([self.seed, 2, window]).permutation(len(whole))
            self._window = window, [place for index in order for place in whole[index]] + [p for part in rest for p in part]
        return self.drawn[self._window[1][within]]


def _lengths(example: Any) -> tuple[int, int]:
    """What is read, then what is written."""
    labels = example.get("labels")
    return len(example["input_ids"]), len(labels) if isinstance(labels, list) else 0


def trainer_of(task: Task, batch: int, seed: int, joint: Joint | None = None) -> type[Trainer]:
    """The trainer of the task's loss, on batches of like length; of two domains', on pairs as they come."""

    class Tuning(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
                         num_items_in_batch: Any = None) -> Any:
            return (joint or task).loss(model, inputs)

        def get_train_dataloader(self) -> DataLoader[Any]:
            if joint:
                return super().get_train_dataloader()
            return self.accelerator.prepare(DataLoader(
                Grouped(self.train_dataset, batch, seed), batch_size=self.args.per_device_train_batch_size,
                collate_fn=self.data_collator, shuffle=False, drop_last=True))

    return Tuning
