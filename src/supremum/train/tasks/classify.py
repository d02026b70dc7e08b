"""One label for a text, or for a pair of texts (entailment, paraphrase)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..rows import Row
from .base import Task, batches, tensors

if TYPE_CHECKING:
    from ...measure.explain import Question


class Classify(Task):
    name = "classify"

    def _tokens(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=self.settings["length"])
        return [{key: values[index] for key, values in found.items()} for index in range(len(rows))]

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        index = {label: number for number, label in enumerate(self.labels)}
        return [{**one, "labels": index[row["label"]]} for one, row in
                zip(self._tokens(rows, tokenizer), rows, strict=True)]

    @torch.inference_mode()
    def logits(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> torch.Tensor | None:
        found = torch.empty(len(rows), len(self.labels))
        for places, inputs in batches(self._tokens(rows, tokenizer), self.collate(tokenizer), batch, model.device):
            found[places] = model(**inputs).logits.float().cpu()
        return found

    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        logits_NC = self.logits(model, tokenizer, rows, batch)
        assert logits_NC is not None
        return [self.labels[number] for number in logits_NC.argmax(-1).tolist()]

    def question(self, row: Row, tokenizer: Any, model: Any, beside: Any | None = None) -> Question | None:
        from ...measure.explain import Question, likeliest, parted

        (feature,) = self._tokens([row], tokenizer)
        return likeliest(Question(tensors(feature), *parted(feature["input_ids"], tokenizer),
                                  lambda output: output.logits[:, None], [0], "", row["label"],
                                  lambda logits_1C: self.labels[int(logits_1C.argmax())]), model)


class Pairs(Classify):
    name = "pairs"
    roles = ("text", "second", "label")
    reads = ("text", "second")

    def _tokens(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        found = tokenizer([row["text"] for row in rows], [row["second"] for row in rows], truncation=True,
                          max_length=self.settings["length"])
        return [{key: values[index] for key, values in found.items()} for index in range(len(rows))]

    def text(self, row: Row) -> str:
        return f"{row['text']} \t {row['second']}"
