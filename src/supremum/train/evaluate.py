"""A tuned model scored by its task, alone or beside another on the same rows: `supremum evaluate` of what `tune` wrote.

    tune.json -> test rows -> each model's predictions -> figures, flips, labels, calibration, robustness, reasons

Rows are drawn 1,000 times for the intervals, the same rows for both models; p of a difference is the paired bootstrap's, that
of flips McNemar's exact one. ECE is that of the likeliest label's probability. The rows are those of the reference's recipe
where both models were tuned, and only models of one task, one set of labels and the same test rows are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import SupremumError
from ..measure.explain import Explained, check_captum, explain, log_probabilities, total
from ..measure.intervals import Compared, compare_all, mcnemar
from ..measure.metrics import calibration_error
from ..measure.perturb import AS_IT_IS, check_kinds
from ..progress import phase
from .base import reopen
from .rows import Row, digest
from .tasks import Task
from .tasks.base import doubt
from .tuned import Known, is_tuned, known

TRIED = 16  # rows looked at for each that is explained


@dataclass(frozen=True)
class Label:
    """One label (classify, pairs) or type of entity (tag). cases: what bears it; found: how many of those were said, so
    found / cases is the accuracy within the label (its recall); lost, gained: of those, what only one model found."""

    name: str
    cases: int
    found: int
    f1: Compared
    found_reference: int | None = None
    lost: int | None = None
    gained: int | None = None


@dataclass(frozen=True)
class Scored:
    """Figures of one set of rows by name, `ece` where the task gives probabilities. flips, beside a reference where answers
    are right or wrong: lost (right before), gained, both, McNemar's exact p. same: share of rows with the same answer.
    more: what the score holds beside its figures."""

    figures: dict[str, Compared]
    labels: list[Label]
    flips: dict[str, float] | None = None
    same: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    more_reference: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Why:
    """A row whose answer is explained: where it stands; `sure`: the answer's probability under the model, of a text the mean
    log p of its tokens (`unit` says which); `change`: that less what it is under the reference."""

    where: str
    sure: float
    change: float | None
    unit: str
    explained: Explained


@dataclass(frozen=True)
class TaskEvaluation:
    """`rows` of `total` test rows, whose `digest` tells them apart; leaked: of all, how many stand in the training text;
    as_tuned: they are those that the model was scored on when it was tuned."""

    task: str
    metric: str
    rows: int
    total: int
    digest: str
    leaked: int
    as_tuned: bool
    scored: Scored
    perturbed: dict[str, Scored]
    explained: list[Why]


@dataclass(frozen=True)
class _Answers:
    said: list[Any]
    chances_NC: np.ndarray | None  # float64


def evaluate_tuned(model: str | Path, reference: str | Path | None = None, *, data: str | Path | None = None,
                   samples: int | None = None, disturb: Sequence[str] = (), explained: int = 0,
                   seed: int = 0) -> TaskEvaluation:
    """Score `model`, and `reference` on the same test rows; one of them, at least, is a folder that `tune` wrote.

    data: the folder of the recipe's rows, where it is not the one that the model was tuned on. samples: so many rows, drawn
    by the seed. disturb: names of `perturb.KINDS`. explained: rows whose answer is explained. Raises SupremumError for
    rows that are gone, models of different tasks, labels or rows, a model without the task's head, and a task whose answers
    cannot be explained.
    """
    check_kinds(disturb)
    lead, task, own = _tasks(model, reference, Path(data) if data else None)
    opened = [open_checkpoint(source) for source in (model, reference) if source is not None]
    _check_explained(task, explained, opened)
    rows = lead.rows["test"]
    chosen = range(len(rows)) if samples is None or samples >= len(rows) else sorted(
        np.random.default_rng(seed).choice(len(rows), samples, replace=False).tolist())
    sets = {AS_IT_IS: [rows[place] for place in chosen]} | {
        kind: [task.disturbed(rows[place], kind, f"{seed} {place}") for place in chosen] for kind in disturb}
    ours = _answers(opened[0], own, sets, lead.recipe.score_batch, "model")
    theirs = _answers(opened[1], task, sets, lead.recipe.score_batch, "reference") if opened[1:] else {}
    with phase("intervals", len(sets)) as advance:
        scored = {}
        for name, some in sets.items():
            scored[name] = _scored(task, task.truth(some), ours[name], theirs.get(name), seed)
            advance()
    why = _why(opened, task, sets[AS_IT_IS], ours[AS_IT_IS], theirs.get(AS_IT_IS), explained, seed) if explained else []
    whole = scored.pop(AS_IT_IS)
    return TaskEvaluation(task.name, task.metric, len(chosen), len(rows), digest(rows), lead.leaked, lead.as_tuned, whole,
                          scored, why)


def _tasks(model: str | Path, reference: str | Path | None, data: Path | None) -> tuple[Known, Task, Task]:
    """What leads (the reference's recipe if it has one), its task, and the model's own: a prompt or length of its own."""
    found = [known(Path(source).expanduser(), data, asked="--data", option="--data")
             for source in (reference, model) if source is not None and is_tuned(source)]
    if not found:
        raise SupremumError(f"{model}: neither it nor the reference was tuned for a task.",
                            "Name the tuned model that it comes from with --reference.")
    lead, last = found[0], found[-1]
    if last.task.name != lead.task.name or last.task.labels != lead.task.labels:
        raise SupremumError(f"{model} was tuned for {_described(last.task)}, {reference} for {_described(lead.task)}.",
                            "Compare models of one task and its labels; evaluate each alone.")
    if digest(last.rows["test"]) != digest(lead.rows["test"]):
        raise SupremumError(f"{model} and {reference} have different test rows ({len(last.rows['test'])} and "
                            f"{len(lead.rows['test'])}).",
                            "Name one folder for both with --data, or evaluate each alone.")
    return lead, lead.task, last.task if last is not lead else copy.deepcopy(lead.task)


def _described(task: Task) -> str:
    return task.name + (f" with the labels {', '.join(task.labels)}" if task.labels else "")


def _check_explained(task: Task, explained: int, opened: Sequence[Checkpoint]) -> None:
    """Refuse before any row is scored what cannot be explained. opened: the model and its reference."""
    if not explained:
        return
    if type(task).question is Task.question:
        raise SupremumError(f"--explain shows what each token adds to an answer's probability; the task {task.name} gives no "
                            "such answer.", "Leave out --explain.")
    if len(opened) == 2 and opened[0].tokenizer().get_vocab() != opened[1].tokenizer().get_vocab():
        raise SupremumError(f"--explain compares what single tokens add; {opened[0].source} and {opened[1].source} have "
                            "different tokens.", "Leave it out, or explain beside a model of the same base.")
    check_captum()


def _answers(checkpoint: Checkpoint, task: Task, sets: Mapping[str, Sequence[Row]], batch: int,
             label: str) -> dict[str, _Answers]:
    model, tokenizer = reopen(checkpoint, task)
    found = {}
    with phase(f"answers of the {label}", len(sets)) as advance:
        for name, rows in sets.items():
            logits_NC = task.logits(model, tokenizer, rows, batch)
            if logits_NC is None:
                found[name] = _Answers(task.predict(model, tokenizer, rows, batch), None)
                _check_finite(checkpoint, [one for one in found[name].said if isinstance(one, np.ndarray)])
            else:
                _check_finite(checkpoint, logits_NC.numpy())
                said = [task.labels[number] for number in logits_NC.argmax(-1).tolist()]
                found[name] = _Answers(said, logits_NC.double().softmax(-1).numpy())
            advance()
    return found


def _check_finite(checkpoint: Checkpoint, answers: Sequence[Any] | np.ndarray) -> None:
    """answers: numbers (K,) of each row."""
    if lost := sum(not np.isfinite(one).all() for one in answers):
        raise SupremumError(f"{checkpoint.source}: {lost:,} of {len(answers):,} rows get no finite answer.",
                            "The file is damaged, or its numbers overflow: write it again with more bits.")


def _scored(task: Task, truth: list[Any], ours: _Answers, theirs: _Answers | None, seed: int) -> Scored:
    sides = [ours] if theirs is None else [ours, theirs]
    scores = [task.score(truth, side.said) for side in sides]  # first: it refuses rows that have no score
    parts, metric = zip(*(task.figures(truth, side.said) for side in sides), strict=True)
    figures = compare_all(metric[0], parts[:1], parts[1:] or None, seed=seed)
    if all(side.chances_NC is not None for side in sides):
        columns = [(_sure(side), _equal(truth, side.said)) for side in sides]
        figures |= compare_all(lambda sure, right: {"ece": calibration_error(sure, right)}, columns[0],
                               columns[1] if theirs else None, seed=seed)
    more = [{name: value for name, value in score.items() if name not in figures} for score in scores]
    flips, same = None, None
    if theirs is not None:
        before, after = task.right(truth, theirs.said), task.right(truth, ours.said)
        if before is not None and after is not None:
            found = mcnemar(before, after)
            flips = {"lost": found["lost"], "gained": found["gained"], "both": found["lost"] + found["gained"],
                     "p": found["p"]}
        if not isinstance(ours.said[0], np.ndarray):  # vectors are never quite alike
            same = float(_equal(theirs.said, ours.said).mean())
    return Scored(figures, _labels(task, truth, ours, theirs, seed), flips, same, more[0], more[1] if theirs else {})


def _sure(side: _Answers) -> np.ndarray:
    assert side.chances_NC is not None
    return np.asarray(side.chances_NC.max(1))


def _equal(one: Sequence[Any], other: Sequence[Any]) -> np.ndarray:
    return np.array([a == b for a, b in zip(one, other, strict=True)])


def _labels(task: Task, truth: list[Any], ours: _Answers, theirs: _Answers | None, seed: int) -> list[Label]:
    found = task.by_label(truth, ours.said)
    if found is None:
        return []
    beside = task.by_label(truth, theirs.said) if theirs else None
    f1 = compare_all(found[1], [found[0]], [beside[0]] if beside else None, seed=seed)
    hits, before = task.hits(truth, ours.said), task.hits(truth, theirs.said) if theirs else {}
    labels = []
    for name, compared in f1.items():
        cases, right = hits[name]
        changed: dict[str, int] = {}
        if before:
            was = before[name][1]
            changed = {"found_reference": len(was), "lost": len(was - right), "gained": len(right - was)}
        labels.append(Label(name, len(cases), len(right), compared, **changed))
    return labels


def _why(opened: Sequence[Checkpoint], task: Task, rows: Sequence[Row], ours: _Answers, theirs: _Answers | None, count: int,
         seed: int) -> list[Why]:
    """The `count` rows, of the first TRIED times as many, in which it changed most how sure the reference's answer is. Of one
    model alone: those of most `doubt`."""
    models, tokenizers = zip(*(reopen(checkpoint, task) for checkpoint in opened), strict=True)  # the reference last
    right: Sequence[bool | None] = task.right(task.truth(rows), ours.said) or [None] * len(rows)
    order, found = _order(ours, theirs, right, seed)[: TRIED * count], []
    with phase("choose rows", len(order)) as advance:
        for place in order:
            advance()
            asked = task.question(rows[place], tokenizers[-1], models[-1], *models[:-1])
            if asked is None:
                continue
            sure, *before = [asked.sure(total(asked, log_probabilities(one, asked))) for one in models]
            change = sure - before[0] if before else None
            weight = doubt(sure, right[place]) if change is None else (True, abs(change))
            found.append((weight, place, sure, change, asked))
    found = sorted(found, key=lambda one: one[0], reverse=True)[:count]
    why = []
    for (_, place, sure, change, asked), one in zip(found, explain([asked for *_, asked in found], *models), strict=True):
        if asked.written:  # not what each of its tokens would be, given those before it
            one = replace(one, model=replace(one.model, top=ours.said[place]))
            if one.reference is not None and theirs is not None:
                one = replace(one, reference=replace(one.reference, top=theirs.said[place]))
        why.append(Why(rows[place]["where"], sure, change, "nats a token" if asked.written else "probability", one))
    return why


def _order(ours: _Answers, theirs: _Answers | None, right: Sequence[bool | None], seed: int) -> list[int]:
    """Rows by how much they ask for a reason, as far as the answers tell it: by the probabilities of labels; without such
    those first whose answers differ, of one model alone those that are wrong, in an order drawn by the seed."""
    many = len(ours.said)
    if ours.chances_NC is None:
        drawn = np.random.default_rng(seed).permutation(many).tolist()
        last = _equal(theirs.said, ours.said).tolist() if theirs is not None else [one is not False for one in right]
        return sorted(drawn, key=lambda place: last[place])
    if theirs is None:
        sure_N = _sure(ours).tolist()
        return sorted(range(many), key=lambda place: doubt(sure_N[place], right[place]), reverse=True)
    assert theirs.chances_NC is not None
    every_N, likeliest_N = np.arange(many), theirs.chances_NC.argmax(1)
    change_N = ours.chances_NC[every_N, likeliest_N] - theirs.chances_NC[every_N, likeliest_N]
    found: list[int] = np.argsort(-np.abs(change_N), kind="stable").tolist()
    return found
