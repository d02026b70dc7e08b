"""Pre-training objectives: what is hidden of an example, what is to be said, and the loss.

    causal     -log p(x_t | x_<t)                                                     Radford et al. 2019
    masked     RATE of the words hidden: 80 % mask, 10 % a random token, 10 % kept      Devlin et al. 2019 (whole word: all
               tokens of a word together), drawn anew at every sight (RoBERTa)          Liu et al. 2019, arXiv:1907.11692
    span       spans of 3 on average become sentinels, the decoder writes them        Raffel et al. 2020, arXiv:1910.10683
    replaced   a small generator fills masks, the model finds what is not original    Clark et al. 2020, arXiv:2003.10555

A transform takes an example {"ids", "words"} and its own generator; a collator pads to a batch. Every loss is a sum over
tokens divided by the step's tokens, so accumulation and processes do not change it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..errors import SupremumError
from .recipe import limits

IGNORE = -100
Example = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    name: Literal["causal", "masked", "span", "replaced"]
    rate: float = limits(0.15, above=0, most=0.9)  # share of tokens that are hidden
    whole_words: bool = True
    span: float = limits(3.0, least=1)  # mean length of a span
    generator: float = limits(0.25, above=0, most=1)  # replaced: the generator's width over the model's
    weight: float = limits(50.0, above=0)  # replaced: of the discriminator's loss


class Hide:
    """An objective's transform on a tokenizer's tokens."""

    def __init__(self, objective: Objective, tokenizer: Any) -> None:
        self.objective, self.size, self.mask = objective, len(tokenizer), tokenizer.mask_token_id
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.end = tokenizer.eos_token_id
        if objective.name in ("masked", "replaced") and self.mask is None:
            raise SupremumError(f"objective: {objective.name} needs a tokenizer with a mask token.",
                                "Train one from the recipe, or choose another tokenizer.")
        self.sentinels = sentinels(tokenizer) if objective.name == "span" else []

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        ids = np.asarray(example["ids"], dtype=np.int64)
        if self.objective.name == "causal":
            labels = ids.copy()
            labels[0] = IGNORE  # nothing stands before it
            return {"input_ids": ids, "labels": labels}
        if self.objective.name == "span":
            return self._spans(ids, rng)
        return self._masked(ids, np.asarray(example["words"]), rng)

    def _masked(self, ids: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> Example:
        open_places = ~np.isin(ids, self.special)
        words = np.cumsum(starts | ~open_places) if self.objective.whole_words else np.arange(len(ids))
        wanted = max(1, round(self.objective.rate * int(open_places.sum())))
        hidden = np.zeros(len(ids), dtype=bool)
        left = wanted
        for word in rng.permutation(np.unique(words[open_places])):
            places = (words == word) & open_places
            if (count := int(places.sum())) <= left:  # a word that would pass the rate is left for a shorter one
                hidden |= places
                left -= count
            if left <= 0:
                break
        if not hidden.any() and open_places.any():
            hidden[rng.choice(np.flatnonzero(open_places))] = True
        labels = np.where(hidden, ids, IGNORE)
        fate, random = rng.random(len(ids)), rng.integers(0, self.size, len(ids))
        shown = np.where(hidden & (fate < 0.8), self.mask, ids)
        shown = np.where(hidden & (fate >= 0.9), random, shown)
        return {"input_ids": shown, "labels": labels, "original": ids} if self.objective.name == "replaced" \
            else {"input_ids": shown, "labels": labels}

    def _spans(self, ids: np.ndarray, rng: np.random.Generator) -> Example:
        """Noise and text in turn, text first: x1 <0> x2 <1> ... and <0> n1 <1> n2 ... </s>."""
        count = len(ids)
        noise = min(max(round(count * self.objective.rate), 1), count - 1)
        spans = min(max(round(noise / self.objective.span), 1), noise, count - noise, len(self.sentinels))
        text, dropped = _parts(count - noise, spans, rng), _parts(noise, spans, rng)
        source: list[int] = []
        answer: list[int] = []
        at = 0
        for sentinel, kept, lost in zip(self.sentinels, text, dropped, strict=False):
            source += [*ids[at:at + kept].tolist(), sentinel]
            answer += [sentinel, *ids[at + kept:at + kept + lost].tolist()]
            at += kept + lost
        return {"input_ids": np.array([*source, self.end]), "labels": np.array([*answer, self.end])}


def _parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` cut into `parts` positive lengths, every way as likely."""
    cuts = np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def sentinels(tokenizer: Any) -> list[int]:
    """T5's <extra_id_0>, <extra_id_1>, ... in order."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    if not found or tokenizer.eos_token_id is None:
        raise SupremumError("objective: span needs a tokenizer with <extra_id_0>, <extra_id_1>, ... and an end token.",
                            "Train one from the recipe, or use T5's.")
    return found


class Pad:
    """Examples of arrays to one padded batch of tensors."""

    def __init__(self, pad: int, decoder_start: int | None = None) -> None:
        self.pad, self.start = pad, decoder_start

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = {key: self._rows([e[key] for e in examples], IGNORE if key == "labels" else self.pad) for key in examples[0]}
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        width = batch["input_ids"].shape[1]
        if int(lengths.min()) < width or self.start is not None:
            batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        if self.start is not None:
            labels_BT = batch["labels"]
            shifted_BT = labels_BT.new_full(labels_BT.shape, self.start)
            shifted_BT[:, 1:] = labels_BT[:, :-1].masked_fill(labels_BT[:, :-1] == IGNORE, self.pad)
            batch["decoder_input_ids"] = shifted_BT
        return batch

    @staticmethod
    def _rows(rows: list[np.ndarray], fill: int) -> Tensor:
        out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
        for index, row in enumerate(rows):
            out[index, : len(row)] = torch.from_numpy(np.ascontiguousarray(row))
        return out


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy of masked and span objectives, per token of the step."""
    total = cross_entropy(outputs["logits"].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORE).sum())


def next_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy of the token after; labels are the inputs, as Transformers has them."""
    return token_loss({"logits": outputs["logits"][:, :-1]}, labels[:, 1:], num_items_in_batch)


def replaced_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The two losses that `Replaced` sums over its batch; the discriminator's is a mean over all tokens, and stands here
    for the masked ones of the batch, so that both weigh batches alike."""
    items = (labels != IGNORE).sum()
    total = outputs["generator"] + outputs["weighted"] * items
    return total / (num_items_in_batch if num_items_in_batch is not None else items)


class Replaced(PreTrainedModel):
    """Generator and discriminator with one table of token embeddings; only the discriminator is kept in the end."""

    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True  # its parts do
    supports_gradient_checkpointing = True

    def __init__(self, discriminator: Any, objective: Objective) -> None:
        super().__init__(discriminator.config)
        self.discriminator, self.weight = discriminator, objective.weight
        config = copy.deepcopy(discriminator.config)
        heads = max(1, round(config.num_attention_heads * objective.generator))
        config.num_attention_heads, config.hidden_size = heads, config.hidden_size // config.num_attention_heads * heads
        config.intermediate_size = max(1, round(config.intermediate_size * objective.generator))
        config.tie_word_embeddings = False  # the shared table is the discriminator's; a second name could not be stored
        self.generator = AutoModelForMaskedLM.from_config(config)
        self.generator.electra.embeddings.word_embeddings.weight.requires_grad_(False)  # never looked up

    def forward(self, input_ids: Tensor, original: Tensor, labels: Tensor | None = None,
                attention_mask: Tensor | None = None, hidden: Tensor | None = None) -> ModelOutput:
        assert hidden is not None
        table = self.discriminator.electra.embeddings.word_embeddings
        logits_BTV = self.generator(inputs_embeds=table(input_ids), attention_mask=attention_mask).logits.float()
        generator = cross_entropy(logits_BTV[hidden], original[hidden], reduction="sum")
        filled_BT = original.clone()
        with torch.no_grad():
            if bool(hidden.any()):
                filled_BT[hidden] = torch.multinomial(logits_BTV[hidden].softmax(-1), 1).squeeze(1)
        wrong_BT = (filled_BT != original).float()
        scores_BT = self.discriminator(input_ids=filled_BT, attention_mask=attention_mask).logits.float()
        losses_BT = binary_cross_entropy_with_logits(scores_BT, wrong_BT, reduction="none")
        there_BT = attention_mask.float() if attention_mask is not None else torch.ones_like(losses_BT)
        weighted = self.weight * (losses_BT * there_BT).sum() / there_BT.sum()
        return ModelOutput(generator=generator, weighted=weighted, found=scores_BT, wrong=wrong_BT)


class PadReplaced(Pad):
    """Adds where tokens are hidden, since the Trainer takes the labels away from the model's inputs."""

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        return batch | {"hidden": batch["labels"] != IGNORE}


def wrapped(model: Any, objective: Objective) -> nn.Module:
    return Replaced(model, objective) if objective.name == "replaced" else model


LOSSES: dict[str, Any] = {"causal": next_loss, "masked": token_loss, "span": token_loss, "replaced": replaced_loss}
