"""One BIO tag a word; a word's first token carries its tag, the others are left out of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import SupremumError
from ..rows import Row
from .base import Figures, Task, batches, doubt, tensors

if TYPE_CHECKING:
    from ...measure.explain import Question


class Tag(Task):
    name = "tag"
    auto = "AutoModelForTokenClassification"
    metric = "f1"
    roles = ("words", "tags")

    def learn(self, train: Sequence[Row]) -> None:
        self.labels = sorted({tag for row in train for tag in row["tags"]})
        if len(self.labels) < 2:
            raise SupremumError(f"{train[0]['where']}: every word has the tag {self.labels[0]!r}.",
                                "Give sentences with entities, or name another column as tag.")

    def check(self, rows: Sequence[Row]) -> None:
        known = set(self.labels)
        for row in rows:
            for tag in row["tags"]:
                if tag not in known:
                    raise SupremumError(f"{row['where']}: the tag {tag!r} does not occur in the training rows "
                                        f"(they have {', '.join(self.labels[:8])}).", "Correct the tag, or train with it.")

    def _tokens(self, rows: Sequence[Row], tokenizer: Any) -> tuple[list[dict[str, Any]], list[list[int | None]]]:
        """Features, and for each token the word that it is the first of."""
        found = tokenizer([row["words"] for row in rows], is_split_into_words=True, truncation=True,
                          max_length=self.settings["length"])
        features = [{key: values[index] for key, values in found.items()} for index in range(len(rows))]
        firsts = []
        for index in range(len(rows)):
            words = found.word_ids(index)
            firsts.append([word if word != before else None for word, before in zip(words, [None, *words], strict=False)])
        return features, firsts

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        number = {label: index for index, label in enumerate(self.labels)}
        features, firsts = self._tokens(rows, tokenizer)
        return [{**one, "labels": [-100 if word is None else number[row["tags"][word]] for word in words]}
                for one, words, row in zip(features, firsts, rows, strict=True)]

    def collate(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(tokenizer)

    @torch.inference_mode()
    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        """A word beyond the length, or one without a token, is O."""
        features, firsts = self._tokens(rows, tokenizer)
        said = [["O"] * len(row["words"]) for row in rows]
        for places, inputs in batches(features, super().collate(tokenizer), batch, model.device):
            numbers_BT = model(**inputs).logits.argmax(-1).tolist()
            for place, numbers_T in zip(places, numbers_BT, strict=True):
                for word, number in zip(firsts[place], numbers_T, strict=False):
                    if word is not None:
                        said[place][word] = self.labels[number]
        return said

    def question(self, row: Row, tokenizer: Any, model: Any, beside: Any | None = None) -> Question | None:
        """The tag of one word, at its first token."""
        from ...measure.explain import Question, likeliest, log_probabilities, parted

        (feature,), (firsts,) = self._tokens([row], tokenizer)
        places = [place for place, word in enumerate(firsts) if word is not None]
        if not places:
            return None
        words = [(row["words"][word], row["tags"][word]) for word in firsts if word is not None]
        every = likeliest(Question(tensors(feature), *parted(feature["input_ids"], tokenizer),
                                   lambda output: output.logits[:, places], [0] * len(words), "", "",
                                   lambda logits_WC: self.labels[int(logits_WC[0].argmax())]), model)
        sure_W, *now = [log_probabilities(one, every).exp()[range(len(words)), list(every.answer)].tolist()
                        for one in (model, beside) if one is not None]
        chosen = max(range(len(words)), key=lambda at: abs(now[0][at] - sure_W[at]) if now else doubt(
            sure_W[at], self.labels[every.answer[at]] == words[at][1]))
        place, (word, tag), said = places[chosen], words[chosen], every.answer[chosen]
        return replace(every, logits=lambda output: output.logits[:, place : place + 1], answer=[said], true=tag,
                       target=f"{self.labels[said]} of {word}")

    def truth(self, rows: Sequence[Row]) -> list[Any]:
        return [row["tags"] for row in rows]

    def text(self, row: Row) -> str:
        return " ".join(row["words"])

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        return None

    def _kinds(self) -> list[str]:
        return sorted({tag.partition("-")[2] for tag in self.labels} - {""})

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        from ...measure.metrics import entity_parts, entity_scores

        return entity_parts(truth, predictions, self._kinds()), entity_scores

    def by_label(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures] | None:
        from ...measure.metrics import entity_f1, entity_parts

        kinds = self._kinds()
        return entity_parts(truth, predictions, kinds), lambda parts: dict(
            zip(kinds, entity_f1(parts).tolist(), strict=True))

    def hits(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, tuple[set[Any], set[Any]]]:
        """Of whole entities."""
        from ...measure.metrics import spans

        wanted, found = [{(place, *span) for place, tags in enumerate(rows) for span in spans(tags)}
                         for rows in (truth, predictions)]
        return {kind: ({one for one in wanted if one[1] == kind}, {one for one in wanted & found if one[1] == kind})
                for kind in self._kinds()}

    def disturbed(self, row: Row, kind: str, seed: str) -> Row:
        """Word by word; of a sentence that is cut the tags are cut, too."""
        from ...measure.perturb import perturb

        if kind == "truncate":
            half = len(row["words"]) // 2
            return row | {"words": row["words"][half:], "tags": row["tags"][half:]}
        return row | {"words": [perturb(word, kind, f"{seed} {place}") for place, word in enumerate(row["words"])]}

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import entities

        return entities(truth, predictions)
