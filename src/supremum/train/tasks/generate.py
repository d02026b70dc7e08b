"""Text from text: translation, summaries, answers to instructions.

An encoder-decoder reads the source and writes the target. A causal model reads a prompt (through its chat template where
it has one) and writes the target after it; the loss is taken on the target's tokens alone. The prompt of a dialogue is its
turns, of which the oldest go where they do not fit:

    loss = - mean over tokens t of the target of log p(t | prompt, target before t)

With `smoothing` e, what is learnt is (1 - e) x the target + e x every token alike (Szegedy et al. 2016, arXiv:1512.00567).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import TemplateError

from ...errors import SupremumError
from ..rows import Row
from .base import Figures, Task, means, tensors

if TYPE_CHECKING:
    from ...measure.explain import Question

IGNORED = -100
WRITTEN = 32  # tokens of an answer that are explained


class Generate(Task):
    auto = "AutoModelForCausalLM"  # AutoModelForSeq2SeqLM where the model has an encoder
    roles = ("source", "target")
    new_head = False
    reads = ("source",)

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"length": 512, "new": 96, "prompt": "{source}",  # new: the most tokens that are written
                         "beams": 1, "smoothing": 0.0}
        self.encoder = False

    def learn(self, train: Sequence[Row]) -> None:
        if "{source}" not in self.settings["prompt"]:
            raise SupremumError(f"The prompt {self.settings['prompt']!r} has no place for the source.",
                                "Write {source} where it goes.")
        if self.settings["new"] >= self.settings["length"]:
            raise SupremumError("`new` leaves no room for the source.", "Make `length` larger than `new`.")

    def check(self, rows: Sequence[Row]) -> None:
        pass

    def config(self) -> dict[str, Any]:
        return {}

    def _prompt(self, row: Row, tokenizer: Any) -> list[int]:
        """Tokens of the prompt; what does not fit is cut off the source's end, after a dialogue's older turns."""
        room = self.settings["length"] - self.settings["new"]
        source, before = row["source"], row.get("turns", [])[:-1]
        while before and len(self._asked(source, tokenizer, before)) > room and before[-1]["role"] != "system":
            system = before[:1] if before[0]["role"] == "system" else []
            later = before[len(system) + 1:]
            before = system + (later[1:] if later and later[0]["role"] == "assistant" else later)
        for _ in range(4):
            ids = self._asked(source, tokenizer, before)
            if len(ids) <= room:
                return ids
            own: list[int] = tokenizer(source, add_special_tokens=False)["input_ids"]
            source = tokenizer.decode(own[: max(1, len(own) - (len(ids) - room))])
        return ids[:room]

    def _asked(self, source: str, tokenizer: Any, before: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of the source in its prompt. before: earlier turns of a dialogue."""
        text = self.settings["prompt"].replace("{source}", source)
        turns = [*before, {"role": "user", "content": text}]
        if self.encoder or not tokenizer.chat_template:
            if before:
                text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"
            found: list[int] = tokenizer(text)["input_ids"]
            return found
        try:
            written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise SupremumError(f"The chat template refuses the turns {', '.join(turn['role'] for turn in turns)} ({error}).",
                                "Leave out the system turn, let user and assistant alternate, or change it.") from error
        asked: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
        return asked

    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
        features = []
        for row in rows:
            prompt = self._prompt(row, tokenizer)
            target = tokenizer(text_target=row["target"], add_special_tokens=False)["input_ids"]
            target = [*target[: self.settings["new"] - 1], tokenizer.eos_token_id]
            if self.encoder:
                features.append({"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": target})
            else:
                features.append({"input_ids": prompt + target, "attention_mask": [1] * (len(prompt) + len(target)),
                                 "labels": [IGNORED] * len(prompt) + target})
        return features

    def collate(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}

        def pad(features: list[dict[str, Any]]) -> dict[str, Any]:
            batch = {}
            for key in features[0]:
                longest = max(len(feature[key]) for feature in features)
                batch[key] = torch.tensor([feature[key] + [fill[key]] * (longest - len(feature[key]))
                                           for feature in features])
            return batch

        return pad

    def loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.settings["smoothing"]:
            return super().loss(model, inputs)
        logits_BTV, labels_BT = model(**inputs).logits, inputs["labels"]
        if not self.encoder:  # a decoder alone says the next token; an encoder-decoder's inputs are shifted already
            logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED,
                                                 label_smoothing=self.settings["smoothing"])

    def predict(self, model: Any, tokenizer: Any, rows: Sequence[Row], batch: int) -> list[Any]:
        written = self._written(model, tokenizer, [self._prompt(row, tokenizer) for row in rows], batch)
        return [self._words(tokenizer, ids) for ids in written]

    @torch.inference_mode()
    def _written(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
        """The tokens that follow each prompt, the padding behind its end with them; of an encoder-decoder its start first."""
        found: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            longest = max(len(prompts[place]) for place in places)
            fill, ids, mask = tokenizer.pad_token_id, [], []
            for prompt in (list(prompts[place]) for place in places):
                gap = longest - len(prompt)  # an answer follows its prompt; an encoder counts places from the first token
                left, right = (0, gap) if self.encoder else (gap, 0)
                ids.append([fill] * left + prompt + [fill] * right)
                mask.append([0] * left + [1] * len(prompt) + [0] * right)
            ids_BT, mask_BT = torch.tensor(ids), torch.tensor(mask)
            out_BT = model.generate(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device),
                                    max_new_tokens=self.settings["new"], do_sample=False, num_beams=self.settings["beams"],
                                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
            for place, ids_T in zip(places, out_BT[:, 0 if self.encoder else longest :], strict=True):
                found[place] = ids_T.tolist()
        return found

    def question(self, row: Row, tokenizer: Any, model: Any, beside: Any | None = None) -> Question | None:
        """The text that the model writes, its first WRITTEN tokens, each given those before it."""
        from ...measure.explain import Question, parted

        prompt = self._prompt(row, tokenizer)
        (answer,) = self._written(model, tokenizer, [prompt], 1)
        start, answer = (answer[:1], answer[1:]) if self.encoder else ([], answer)
        if tokenizer.eos_token_id in answer:  # padding follows
            answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
        answer, many = answer[:WRITTEN], len(prompt)
        read = prompt if self.encoder else prompt + answer[:-1]
        inputs = {"input_ids": read, "attention_mask": [1] * len(read)}
        if self.encoder:
            inputs["decoder_input_ids"] = [*start, *answer[:-1]]
        return Question(tensors(inputs), *parted(prompt, tokenizer),
                        lambda output: output.logits if self.encoder else output.logits[:, many - 1 :], answer,
                        self._words(tokenizer, answer), row["target"],
                        lambda logits_RV: self._words(tokenizer, logits_RV.argmax(-1).tolist()), written=True)

    def _words(self, tokenizer: Any, ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def truth(self, rows: Sequence[Row]) -> list[Any]:
        return [row.get("references", [row["target"]]) for row in rows]

    def text(self, row: Row) -> str:
        return "\n".join(turn["content"] for turn in row["turns"]) if "turns" in row else str(row["source"])

    def by_label(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures] | None:
        return None

    def right(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[bool] | None:
        return None


class Summarise(Generate):
    name = "summarise"
    metric = "rougeL"

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        from ...measure.metrics import summaries

        found: list[float] = summaries(truth, predictions, each=True)["rougeL"]
        return found

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        from ...measure.metrics import summaries

        return means(summaries(truth, predictions, each=True))

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import summaries

        return summaries(truth, predictions)


class Instruct(Summarise):
    """Instructions and dialogue: scored by how much of the reference's wording is met."""

    name = "instruct"


class Translate(Generate):
    name = "translate"
    metric = "bleu"

    def __init__(self) -> None:
        super().__init__()
        self.settings["tokenize"] = "13a"  # sacrebleu's; zh for Chinese

    def each(self, truth: Sequence[Any], predictions: Sequence[Any]) -> list[float] | None:
        return None

    def score(self, truth: Sequence[Any], predictions: Sequence[Any]) -> dict[str, Any]:
        from ...measure.metrics import translation

        return translation(truth, predictions, tokenize=self.settings["tokenize"])

    def parts(self, truth: Sequence[Any], predictions: Sequence[Any]) -> Any:
        from ...measure.metrics import bleu_parts

        return bleu_parts(truth, predictions, tokenize=self.settings["tokenize"])

    def whole(self, parts: Any) -> float:
        from ...measure.metrics import bleu_of

        return bleu_of(parts)

    def figures(self, truth: Sequence[Any], predictions: Sequence[Any]) -> tuple[np.ndarray, Figures]:
        from ...measure.metrics import bleu_of, chrf_of, chrf_parts

        bleu_NK, chrf_NK = self.parts(truth, predictions), chrf_parts(truth, predictions).reshape(len(truth), -1)
        most = bleu_NK.shape[1]
        return np.hstack([bleu_NK, chrf_NK]), lambda parts_NK: {
            "bleu": bleu_of(parts_NK[:, :most]), "chrf": chrf_of(parts_NK[:, most:].reshape(len(parts_NK), -1, 3))}
