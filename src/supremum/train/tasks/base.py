"""What every task offers; the defaults are those of a classifier's kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import SupremumError
from ..rows import Row

if TYPE_CHECKING:
    from ...measure.explain import Question

Figures = Callable[[np.ndarray], dict[str, float]]


class Task:
    """See the module `tasks`. `settings`: what a recipe may set, with defaults; `roles`: the columns that rows have."""

    name = ""
    auto = "AutoModelForSequenceClassification"
    metric = "accuracy"
    roles: tuple[str, ...] = ("text", "label")
    new_head = True  # the task puts a head on the trunk that no base has
    reads: tuple[str, ...] = ("text",)  # the roles that typos and the like change
    settings: dict[str, Any]
    labels: list[str]

    def __init__(self) -> None:
        self.settings = {"length": 128}
        self.labels = []

    def learn(self, train: Sequence[Row]) -> None:
        """Take from the training rows what the head needs (its labels)."""
        self.labels = sorted({row["label"] for row in train})
        if len(self.labels) < 2:
            raise SupremumError(f"{train[0]['where']}: every training row has the label {self.labels[0]!r}.",
                                "Give rows of at least two labels, or name another column as label.")

    def check(self, rows: Sequence[Row]) -> None:
        """Refuse rows whose label the training rows do not have."""
        known = set(self.labels)
        for row in rows:
            if row["label"] not in known:
                raise SupremumError(f"{row['where']}: the label {row['label']!r} does not occur in the training rows "
                                    f"(they have {', '.join(self.labels[:8])}).", "Correct the label, or train with it.")

    def config(self) -> dict[str, Any]:
        """What the model's config takes."""
        return {"num_labels": len(self.labels), "id2label": dict(enumerate(self.labels)),
                "label2id": {label: index for index, label in enumerate(self.labels)}}

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        """Rows as the features that training takes, in order; some rows may give several."""
        raise SupremumError(f"The task {self.name} cannot be trained.")

    def collate(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Features as one padded batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = model(**inputs).loss
        return found

    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        raise SupremumError(f"The task {self.name} cannot be scored.")

    def logits(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> torch.Tensor | None:
        """(N, C) float32 of the labels; None where the task does not say one label a row."""
        return None

    def question(self, row: Row, tokenizer: Any, model: Any, beside: Any | None = None) -> Question | None:
        """What `model` answers to a row, to be explained. Of several answers (tags) the one whose probability changed most in
        the model `beside`; without it the one of most `doubt`. None where the row has no answer.

        A task that leaves this as it is has nothing to explain.
        """
        raise SupremumError(f"The task {self.name} cannot be explained.")

    def truth(self, rows: Sequence[Row]) -> list[Any]:
        return [row["label"] for row in rows]

    def text(self, row: Row) -> str:
        """What a reader of the row sees; for leaks and bags of words."""
        return str(row["text"])

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        """One figure an item whose mean is the metric; None for a corpus metric."""
        return [float(one == other) for one, other in zip(truth, predictions, strict=True)]

    def parts(self, truth: Sequence[Any], predictions: Sequence[Any]) -> Any:
        """(N, K) counts of each item whose sums give the metric (`whole`); None where there are no such."""
        return None

    def whole(self, parts: Any) -> float:
        raise SupremumError(f"The task {self.name} has no counts.")

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import classification

        return classification(truth, predictions)

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        """(N, ...) of the rows, and the function of any of them that gives the figures of their score."""
        from ...measure.metrics import confused, confusion_scores

        size = len(self.labels)
        return confused(truth, predictions, self.labels), lambda places: confusion_scores(_matrix(places, size))

    def by_label(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures] | None:
        """As `figures`: F1 by label; None where the task has no labels."""
        from ...measure.metrics import confused, f1_of_each

        size = len(self.labels)
        return confused(truth, predictions, self.labels), lambda places: dict(
            zip(self.labels, f1_of_each(_matrix(places, size)).tolist(), strict=True))

    def hits(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, tuple[set[Any], set[Any]]]:
        """Label -> (what bears it, which of that was found)."""
        return {label: ({place for place, true in enumerate(truth) if true == label},
                        {place for place, (true, said) in enumerate(zip(truth, predictions, strict=True))
                         if true == said == label}) for label in self.labels}

    def right(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[bool] | None:
        """Which rows are right; None where an answer is neither right nor wrong."""
        return [one == other for one, other in zip(truth, predictions, strict=True)]

    def disturbed(self, row: Row, kind: str, seed: str) -> Row:
        """The row under one of `perturb.KINDS`; its truth stays."""
        from ...measure.perturb import perturb

        return row | {role: perturb(row[role], kind, seed) for role in self.reads}


def means(columns: Mapping[str, Sequence[float]]) -> tuple[np.ndarray, Figures]:
    """`Task.figures` of figures that are means over rows."""
    names = list(columns)
    return np.array([columns[name] for name in names], dtype=np.float64).T, lambda rows_NK: dict(
        zip(names, rows_NK.mean(0).tolist(), strict=True))


def doubt(sure: float, right: bool | None) -> tuple[bool, float]:
    """Orders answers by how much they ask for a reason: wrong ones, the surest last; before them the others, the least sure
    last. right: None where an answer is neither."""
    return right is False, sure if right is False else -sure


def tensors(feature: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """What a model is called with for one row (1, T)."""
    return {name: torch.tensor([values]) for name, values in feature.items()}


def _matrix(places_N: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(places_N, minlength=size * size).reshape(size, size)


def batches(features: list[dict[str, Any]], collate: Any, batch: int,
            device: torch.device) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(places, collated batch on the device) over all features, those of like length together: less padding."""
    order = sorted(range(len(features)), key=lambda index: -len(features[index]["input_ids"]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        yield places, {key: value.to(device) for key, value in collate([features[place] for place in places]).items()}
