"""Log-likelihoods of answers behind their prompts, many cases in one row, what a case's texts share computed once.

    ll = sum over the answer's tokens of log p(token | all before)
    row: trunk_1 branch_11 branch_12 ... trunk_2 branch_21 ...      a token sees its own text's tokens only

A case is a tree: the tokens with which all its texts begin, then each text's rest. Positions count along a text, and a
mask hides what is not of it. Models whose attention takes no such mask, or counts positions by itself, show it on two
small trees at the start; they read one text at a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SupremumError
from .cases import Case

ROW = 384  # tokens in a row of trees: enough for fast products, few enough that masked pairs cost little
CLOSE = 2e-3  # nats a text by which trees and single texts may differ in float32 (a hundred times that in 16 bits)


@dataclass(frozen=True)
class Text:
    """Tokens whose part from `start` on is the answer."""

    ids: list[int]
    start: int


def encode(tokenizer: Any, case: Case, prefix: list[int], start: list[int]) -> list[Text]:
    """Each answer behind its prompt. `prefix`: what the tokenizer puts before a text; `start`: what stands before an answer
    that begins the text."""
    texts = []
    for prompt, answer in zip(case.prompts, case.answers, strict=True):
        alone = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        whole = tokenizer(f"{prompt} {answer.strip()}", add_special_tokens=False, verbose=False).input_ids
        shared = min(_common([alone, whole]), len(whole) - 1)
        before = prefix if shared or prefix else start
        texts.append(Text([*before, *whole], len(before) + shared))
    if len(set(case.prompts)) == 1:  # one prompt: what is scored begins at one place, so that answers stay comparable
        first = min(text.start for text in texts)
        texts = [Text(text.ids, first) for text in texts]
    return texts


def shorten(text: Text, limit: int | None) -> Text:
    """Without the first tokens that the model's context cannot hold."""
    over = len(text.ids) - limit if limit is not None else 0
    return Text(text.ids[over:], max(1, text.start - over)) if over > 0 else text


class TreeScorer:
    """(ll, greedy) of every text of every case, by `model`."""

    def __init__(self, model: Any, limit: int | None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters
        self.picks = "logits_to_keep" in parameters
        config = model.config.get_text_config()
        self.window = getattr(config, "sliding_window", None) or limit or 1 << 30
        self.trees = "position_ids" in parameters and "attention_mask" in parameters and self._trees_hold()

    def score(self, cases: Sequence[list[Text]]) -> Iterable[tuple[int, list[tuple[float, bool]]]]:
        """(index, [(ll, greedy) of each text]) as they come; long cases first, so that the time left is not underrated."""
        order = sorted(range(len(cases)), key=lambda i: -_tree_size(cases[i]))
        at = 0
        while at < len(order):
            group = [order[at]]
            total = _tree_size(cases[order[at]])
            while self.trees and at + len(group) < len(order):
                total += _tree_size(cases[order[at + len(group)]])
                if total > ROW:
                    break
                group.append(order[at + len(group)])
            at += len(group)
            yield from zip(group, self._group([cases[i] for i in group]), strict=True)

    def _group(self, cases: list[list[Text]]) -> list[list[tuple[float, bool]]]:
        longest = max(len(text.ids) for case in cases for text in case)
        if not self.trees or longest > self.window or (len(cases) == 1 and len(cases[0]) == 1):
            return [self._singly(case) for case in cases]
        return self._trees(cases)

    def _trees_hold(self) -> bool:
        """Whether trees give what single texts give, on two cases of three texts: 5 tokens shared, 4 of each one's own."""
        close = CLOSE * (1 if self.model.dtype == torch.float32 else 100)
        size = self.model.config.get_text_config().vocab_size
        ids = [(7919 * n + 13) % size for n in range(40)]
        cases = [[Text([*ids[at:at + 5], *ids[at + n:at + n + 4]], 6) for n in (6, 10, 14)] for at in (0, 20)]
        try:
            pairs = zip(self._trees(cases), map(self._singly, cases), strict=True)
            return all(abs(one[0] - other[0]) <= close for pair in pairs for one, other in zip(*pair, strict=True))
        except (TypeError, ValueError, RuntimeError, IndexError):  # an attention that takes no such mask
            return False

    def _singly(self, case: list[Text]) -> list[tuple[float, bool]]:
        scores = []
        for text in case:
            ids = torch.tensor([text.ids], device=self.device)
            keep = torch.arange(text.start - 1, len(text.ids) - 1, device=self.device)
            scores.append(_answer(self._logits(ids[:, :-1], keep), ids[0, text.start:]))
        return scores

    def _trees(self, cases: list[list[Text]]) -> list[list[tuple[float, bool]]]:
        """All texts of `cases` in one row."""
        ids: list[int] = []
        positions: list[int] = []
        seen: list[tuple[slice, slice]] = []  # a run of tokens and one that it sees
        wanted: list[list[int]] = []  # of each text, the places of the tokens that predict its answer
        for case in cases:
            shared = _shared(case)
            trunk = slice(len(ids), len(ids) + shared)
            ids += case[0].ids[:shared]
            positions += range(shared)
            seen.append((trunk, trunk))
            for text in case:
                branch = slice(len(ids), len(ids) + len(text.ids) - 1 - shared)
                ids += text.ids[shared:-1]
                positions += range(shared, len(text.ids) - 1)
                seen += [(branch, trunk), (branch, branch)]
                wanted.append([(trunk.start if t < shared else branch.start - shared) + t
                               for t in range(text.start - 1, len(text.ids) - 1)])
        size = len(ids)
        mask = torch.zeros(size, size, dtype=torch.bool)
        for rows, columns in seen:
            mask[rows, columns] = True
        mask = mask.tril_().to(self.device)
        dtype = self.model.dtype
        bias = torch.zeros(size, size, dtype=dtype, device=self.device).masked_fill_(~mask, torch.finfo(dtype).min)
        keep = torch.tensor([place for places in wanted for place in places], device=self.device)
        logits = self._logits(torch.tensor([ids], device=self.device), keep, attention_mask=bias[None, None],
                              position_ids=torch.tensor([positions], device=self.device))
        parts = iter(logits.split([len(places) for places in wanted]))
        return [[_answer(next(parts), torch.tensor(text.ids[text.start:], device=self.device)) for text in case]
                for case in cases]

    def _logits(self, ids: Tensor, keep: Tensor, **given: Tensor) -> Tensor:
        """Logits (n, V) float32 at the places `keep`."""
        if self.picks:
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=keep, **given).logits[0].float()
        return self.model(input_ids=ids, **given).logits[0, keep].float()


def _answer(logits_nV: Tensor, ids_n: Tensor) -> tuple[float, bool]:
    ll = torch.log_softmax(logits_nV, -1).gather(1, ids_n[:, None]).sum().item()
    if not math.isfinite(ll):
        raise SupremumError("The model's answers are not finite.", "Evaluate in float32, or look for broken weights.")
    return ll, bool((logits_nV.argmax(-1) == ids_n).all())


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _shared(case: list[Text]) -> int:
    return _common([text.ids[:-1] for text in case])


def _tree_size(case: list[Text]) -> int:
    shared = _shared(case)
    return shared + sum(len(text.ids) - 1 - shared for text in case)
