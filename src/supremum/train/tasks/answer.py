"""Extractive question answering: the span of the context that answers, log p(start) + log p(end) at its highest.

Contexts longer than the length are read in windows that overlap by `stride` tokens; the best span over all windows
counts. A question without an answer has its span at the first token, and is answered by "" where that scores highest
(only where such questions were trained on).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..rows import Row
from .base import Figures, Task, batches, means, tensors

if TYPE_CHECKING:
    from ...measure.explain import Question

NEAR = 4  # tokens on either side of an answer of which each is explained by itself


class Answer(Task):
    name = "answer"
    auto = "AutoModelForQuestionAnswering"
    metric = "f1"
    roles = ("question", "context", "answers", "start")
    reads = ("question",)  # the context holds the answers

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"length": 384, "stride": 128, "words": 30}  # words: the most tokens in an answer
        self.empty = False

    def learn(self, train: Sequence[Row]) -> None:
        self.empty = any(not row["answers"] for row in train)

    def check(self, rows: Sequence[Row]) -> None:
        pass

    def config(self) -> dict[str, Any]:
        return {}

    def _windows(self, rows: Sequence[Row], tokenizer: Any) -> tuple[list[dict[str, Any]], list[int], list[list[Any]]]:
        """Features, the row of each, and for each token its (first, end) characters in the context, or None."""
        room = max(16, self.settings["length"] - self.settings["stride"] - 16)
        asked = [tokenizer(row["question"], add_special_tokens=False)["input_ids"] for row in rows]
        questions = [row["question"] if len(ids) <= room else tokenizer.decode(ids[:room])
                     for row, ids in zip(rows, asked, strict=True)]
        found = tokenizer(questions, [row["context"] for row in rows], truncation="only_second",
                          max_length=self.settings["length"], stride=self.settings["stride"],
                          return_overflowing_tokens=True, return_offsets_mapping=True)
        of, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        places = [[span if part == 1 else None for span, part in zip(spans, found.sequence_ids(index), strict=True)]
                  for index, spans in enumerate(offsets)]
        return [{key: values[index] for key, values in found.items()} for index in range(len(of))], of, places

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        features, of, places = self._windows(rows, tokenizer)
        for feature, number, spans in zip(features, of, places, strict=True):
            row = rows[number]
            inside = [(token, span) for token, span in enumerate(spans) if span is not None]
            start, end = row["start"], row["start"] + len(row["answers"][0]) if row["answers"] else -1
            feature["start_positions"] = feature["end_positions"] = 0
            if row["answers"] and inside and inside[0][1][0] <= start and end <= inside[-1][1][1]:
                feature["start_positions"] = max(token for token, span in inside if span[0] <= start)
                feature["end_positions"] = min(token for token, span in inside if span[1] >= end)
        return features

    def collate(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    @torch.inference_mode()
    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        features, of, places = self._windows(rows, tokenizer)
        best = [(float("-inf"), "")] * len(rows)
        for numbers, inputs in batches(features, self.collate(tokenizer), batch, model.device):
            output = model(**inputs)
            for number, start_T, end_T in zip(numbers, output.start_logits.float(), output.end_logits.float(), strict=True):
                row, spans = rows[of[number]], places[number]
                value, start, end = self._best(start_T, end_T, spans)
                best[of[number]] = max(best[of[number]], (value, _between(row, spans, start, end)), key=lambda pair: pair[0])
        return [said for _, said in best]

    def _best(self, start_T: torch.Tensor, end_T: torch.Tensor, spans: Sequence[Any]) -> tuple[float, int, int]:
        """(score of the best span, its first and last token), both 0 where no answer scores higher."""
        inside = torch.tensor([token for token, span in enumerate(spans) if span is not None])
        if not len(inside):
            return float("-inf"), 0, 0
        total_NN = start_T[inside][:, None] + end_T[inside][None]
        total_NN = total_NN.masked_fill(~torch.ones_like(total_NN).triu().tril(self.settings["words"] - 1).bool(),
                                        float("-inf"))
        value, place = total_NN.flatten().max(0)
        if self.empty and start_T[0] + end_T[0] > value:
            return float(value), 0, 0
        start, end = (int(inside[index]) for index in divmod(int(place), len(inside)))
        return float(value), start, end

    @torch.inference_mode()
    def question(self, row: Row, tokenizer: Any, model: Any, beside: Any | None = None) -> Question | None:
        """The two ends of the span, in the window where it scores highest. Of a long window the question's tokens and those
        NEAR the span are parts by themselves, the rest is taken in stretches."""
        from ...measure.explain import Question, parted

        features, _, places = self._windows([row], tokenizer)
        found = []
        for feature, spans in zip(features, places, strict=True):
            output = model(**{name: values.to(model.device) for name, values in tensors(feature).items()})
            found.append(self._best(output.start_logits[0].float(), output.end_logits[0].float(), spans))
        number = max(range(len(found)), key=lambda place: found[place][0])
        (_, start, end), feature, spans = found[number], features[number], places[number]
        alone = {place for place, span in enumerate(spans) if span is None or start - NEAR <= place <= end + NEAR}
        return Question(tensors(feature), *parted(feature["input_ids"], tokenizer, alone),
                        lambda output: torch.stack([output.start_logits, output.end_logits], 1), [start, end],
                        _between(row, spans, start, end), row["answers"][0] if row["answers"] else "",
                        lambda logits_2T: _between(row, spans, *self._best(logits_2T[0], logits_2T[1], spans)[1:]))

    def truth(self, rows: Sequence[Row]) -> list[Any]:
        return [row["answers"] or [""] for row in rows]

    def text(self, row: Row) -> str:
        return f"{row['question']} \t {row['context']}"

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        return self._each(truth, predictions)["f1"]

    def _each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, list[float]]:
        from ...measure.metrics import answers

        rows = [answers([one], [other]) for one, other in zip(truth, predictions, strict=True)]
        return {name: [row[name] for row in rows] for name in ("exact_match", "f1")}

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        return means(self._each(truth, predictions))

    def by_label(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures] | None:
        return None

    def right(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[bool] | None:
        return [value == 1 for value in self._each(truth, predictions)["exact_match"]]

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import answers

        return answers(truth, predictions)


def _between(row: Row, spans: Sequence[Any], start: int, end: int) -> str:
    """The context's text from one token to another; none of what stands outside it."""
    said: str = row["context"][spans[start][0] : spans[end][1]] if spans[start] and spans[end] else ""
    return said
