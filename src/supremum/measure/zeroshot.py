"""Zero-shot accuracy: which answer a model finds likeliest, with no training and no examples.

    ll_a = sum over the answer's tokens of log p(token | all before)
    acc: argmax_a ll_a is gold        acc_norm: argmax_a ll_a / (UTF-8 bytes of a) is gold
    cloze: every token of the answer is the model's first choice (greedy, exact)
    margin = ll_gold - the greatest other ll; a cloze's is ll itself

An answer's tokens are those of prompt + " " + answer behind what it shares with the prompt's own. Against a reference, the
same cases give flips (right to wrong and back) with McNemar's exact p, and the margin's mean change.
Gaps between groups of cases: groups.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from ..text.windows import context_length, frame
from .cases import Task
from .groups import GroupGap, group_gaps
from .intervals import Interval, mcnemar, paired_mean, wilson
from .trees import TreeScorer, encode, shorten


@dataclass(frozen=True)
class Scores:
    """What a model made of a task's cases: ll (N, A) of every answer in nats (NaN where a case has fewer), `right` (N,)."""

    ll: np.ndarray
    right: np.ndarray
    right_norm: np.ndarray
    margin: np.ndarray
    tokens: np.ndarray  # (N,) of the gold answer
    truncated: int


@dataclass(frozen=True)
class TaskQuality:
    """Accuracy with its Wilson interval and, beside a reference, what changed; `chance` is that of guessing."""

    name: str
    kind: str
    cases: int
    total: int
    chance: float
    acc: Interval
    acc_norm: Interval | None
    target_perplexity: float | None  # a cloze's: exp(-mean ll of an answer)
    truncated: int
    acc_reference: Interval | None = None
    acc_norm_reference: Interval | None = None
    acc_change: Interval | None = None
    flips: dict[str, float] | None = None
    flips_norm: dict[str, float] | None = None
    margin_change: Interval | None = None


@dataclass(frozen=True)
class TaskReport:
    """All tasks of one run, and the gaps between groups among them."""

    tasks: list[TaskQuality]
    gaps: list[GroupGap]


def evaluate_tasks(model: Any, reference: Any | None, tasks: Sequence[Task], *,
                   dtype: torch.dtype | str = torch.float32, seed: int = 0) -> TaskReport:
    """Score `model`, and `reference` on the same cases: Checkpoints, or what `open_checkpoint` opens. One is in memory at a
    time."""
    from ..checkpoint import open_checkpoint

    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    opened = [open_checkpoint(one) if isinstance(one, str | Path) else one for one in (model, reference)]
    found, beside = [score_tasks(one, tasks, dtype=kind) if one is not None else None for one in opened]
    assert found is not None
    return compare_tasks(tasks, found, beside, seed=seed)


def compare_tasks(tasks: Sequence[Task], found: Sequence[Scores], reference: Sequence[Scores] | None = None, *,
                  seed: int = 0) -> TaskReport:
    """The report of what `score_tasks` gave for a model and for its reference."""
    beside = list(reference) if reference is not None else [None] * len(tasks)
    return TaskReport([summarise_task(*each, seed=seed) for each in zip(tasks, found, beside, strict=True)],
                      list(group_gaps(tasks, [each.right for each in found],
                                      [each.right if each is not None else None for each in beside], seed=seed)))


@torch.inference_mode()
def score_tasks(checkpoint: Any, tasks: Sequence[Task], *, dtype: torch.dtype = torch.float32) -> list[Scores]:
    """Log-likelihoods of every case's answers."""
    model, tokenizer = checkpoint.model(dtype), checkpoint.tokenizer()
    if objective(type(model).__name__) != "next":
        raise SupremumError(f"{checkpoint.source}: a {type(model).__name__} predicts no next tokens.",
                            "Zero-shot tasks need a causal language model.")
    limit = context_length(checkpoint)
    scorer = TreeScorer(model, limit)
    return [_score_task(scorer, tokenizer, task, limit, f"{task.name}: {checkpoint.source}") for task in tasks]


def _score_task(scorer: TreeScorer, tokenizer: Any, task: Task, limit: int | None, label: str) -> Scores:
    prefix, _ = frame(tokenizer)
    start = prefix or [t for t in (tokenizer.eos_token_id, 0) if t is not None][:1]
    cases, truncated = [], 0
    for case in task.cases:
        texts = encode(tokenizer, case, prefix, start)
        cases.append([shorten(text, limit) for text in texts])
        truncated += any(limit is not None and len(text.ids) > limit for text in texts)
    count, most = len(cases), max(map(len, cases))
    ll_NA, greedy_N = np.full((count, most), np.nan), np.zeros(count, dtype=bool)
    with phase(label, count) as advance:
        for index, found in scorer.score(cases):
            ll_NA[index, :len(found)] = [ll for ll, _ in found]
            greedy_N[index] = found[0][1]
            advance()
    gold_N = np.array([case.gold for case in task.cases])
    tokens_N = np.array([len(texts[g].ids) - texts[g].start for texts, g in zip(cases, gold_N, strict=True)])
    if task.kind == "cloze":
        return Scores(ll_NA, greedy_N, greedy_N, ll_NA[:, 0], tokens_N, truncated)
    bytes_NA = np.full((count, most), np.nan)
    for index, case in enumerate(task.cases):
        bytes_NA[index, :len(case.answers)] = [len(answer.encode()) for answer in case.answers]
    each = np.arange(count)
    others_NA = ll_NA.copy()
    others_NA[each, gold_N] = np.nan
    return Scores(ll_NA, np.nanargmax(ll_NA, 1) == gold_N, np.nanargmax(ll_NA / bytes_NA, 1) == gold_N,
                  ll_NA[each, gold_N] - np.nanmax(others_NA, 1), tokens_N, truncated)


def summarise_task(task: Task, found: Scores, reference: Scores | None = None, *, seed: int = 0) -> TaskQuality:
    """A task's figures, beside a reference's on the same cases where there is one."""
    def accuracy(right: np.ndarray) -> Interval:
        return wilson(int(right.sum()), len(right))

    cloze = task.kind == "cloze"
    beside: dict[str, Any] = {}
    if reference is not None:
        beside = dict(
            acc_reference=accuracy(reference.right), acc_norm_reference=None if cloze else accuracy(reference.right_norm),
            acc_change=paired_mean(reference.right, found.right, seed=seed), flips=mcnemar(reference.right, found.right),
            flips_norm=None if cloze else mcnemar(reference.right_norm, found.right_norm),
            margin_change=paired_mean(reference.margin, found.margin, seed=seed))
    return TaskQuality(
        name=task.name, kind=task.kind, cases=len(task.cases), total=task.total,
        chance=0.0 if cloze else float(np.mean([1 / len(case.answers) for case in task.cases])),
        acc=accuracy(found.right), acc_norm=None if cloze else accuracy(found.right_norm),
        target_perplexity=math.exp(min(700.0, -float(found.margin.mean()))) if cloze else None,
        truncated=found.truncated, **beside)
