"""A task's metric as the budget: the smallest file of a tuned model that still does its task.

    metric(file) >= floor        floor: a number (0.86), or a part of what the original scores (0.99x)

`supremum tune` left the recipe beside the weights (tune.json), so the rows are known. Its valid rows decide, as none of them
was trained on; its test rows have no part in the choice and are scored once, for the file that was chosen. What is scored is
the written file, decoded to float32, its inputs rounded where its format says so.

Without another budget bits a weight are bisected in steps of STEP, as far as the target's menu reaches: statistics once,
a file and a score for each of about log2(8 / STEP) points. The least of several points that hold is too often one that
was lucky on those rows, so in a search

    metric - e >= floor      e: the standard error of the change from the original on the same rows

(the one-standard-error rule of Breiman et al. 1984). The answer is a point that held above one that did not; nothing is said
of points that were not tried. With another budget there is one point, no choice, and the metric itself is held against the
floor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .allocate import Budget
from .checkpoint import Checkpoint, open_checkpoint
from .errors import BudgetError, SupremumError
from .job import Job, Layout, bit_range, check, lay_out, open_job
from .measure.intervals import Interval, bootstrap, mean_interval, paired_bootstrap, paired_mean
from .output import check_replaced, finished
from .pipeline import Result, Statistics, finish, made, statistics
from .plain import plain
from .progress import keep_timings, note, phase
from .train.base import reopen
from .train.rows import digest
from .train.tune import DRAWS
from .train.tuned import known
from .workspace import Workspace, move_into_place, work_folder

STEP, LEAST, MOST = 0.25, 1.0, 8.0  # bits a weight that are searched
WIDTH = 2 * 1.96  # of a 95 % interval, in standard errors


@dataclass(frozen=True)
class Floor:
    """The least that `metric` may be; `relative`: times what the original scores."""

    metric: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Of "accuracy=0.99x" or "accuracy=0.86", as the command line checked it."""
        metric, _, value = text.partition("=")
        return cls(metric, float(value.removesuffix("x")), value.endswith("x"))

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}{'x' if self.relative else ''}"


class Judge:
    """Scores models on the valid and test rows of the recipe that `checkpoint` was tuned by."""

    def __init__(self, checkpoint: Checkpoint, floor: Floor, data: Path | None, seed: int) -> None:
        self.floor, self.seed = floor, seed
        found = known(Path(checkpoint.path), data, asked="--floor", option="--floor-data")
        self.task, self.recipe, self.rows = found.task, found.recipe, found.rows
        self.digests = {name: digest(rows) for name, rows in self.rows.items()}
        self.checkpoint = checkpoint
        self.before: dict[str, list[Any]] = {}

    def original(self) -> dict[str, Any]:
        """What the model scores as it is, by split; `least`: what the floor asks for. Raises SupremumError for a floor that
        the original is below."""
        with phase("score the original"):
            self.before = self._said(self.checkpoint, ("valid", "test"))
        own = self._value("valid", self.before["valid"])
        if self.floor.relative and own <= 0:
            raise SupremumError(f"--floor {self.floor}: the original's {self.floor.metric} is {own:.4g}: there is nothing to "
                                "keep a part of.", "Tune a model that does its task.")
        least = self.floor.value * own if self.floor.relative else self.floor.value
        if own < least:
            raise SupremumError(f"--floor {self.floor}: the original itself has {self.floor.metric} {own:.4g} on the "
                                f"{len(self.rows['valid'])} valid rows.", "Ask for less, or tune a better model.")
        return {"least": least, **{name: self._interval(name, said) for name, said in self.before.items()}}

    def score(self, written: Path, split: str) -> dict[str, Any]:
        """A written file's metric on one split, and its difference to the original on the same rows."""
        with phase(f"score the {split} rows"):
            said = self._said(open_checkpoint(written), (split,))[split]
        return {"metric": self._interval(split, said), "change": self._change(split, said)}

    def _said(self, checkpoint: Checkpoint, splits: Sequence[str]) -> dict[str, list[Any]]:
        model, tokenizer = reopen(checkpoint, self.task)
        return {name: self.task.predict(model, tokenizer, self.rows[name], self.recipe.score_batch) for name in splits}

    def _each(self, split: str, said: list[Any]) -> list[float] | None:
        return self.task.each(self.task.truth(self.rows[split]), said) if self.floor.metric == self.task.metric else None

    def _parts(self, split: str, said: list[Any]) -> Any:
        """Counts of each row whose sums give the metric: BLEU's, which would be slow to draw from otherwise."""
        return self.task.parts(self.task.truth(self.rows[split]), said) if self.floor.metric == self.task.metric else None

    def _value(self, split: str, said: list[Any]) -> float:
        """The metric alone. Raises SupremumError for one that the task does not have."""
        scores = {name: value for name, value in self.task.score(self.task.truth(self.rows[split]), said).items()
                  if isinstance(value, float)}
        if self.floor.metric not in scores:
            raise SupremumError(f"--floor {self.floor}: the task {self.task.name} has no {self.floor.metric}.",
                                f"It has {', '.join(scores)}.")
        return scores[self.floor.metric]

    def _interval(self, split: str, said: list[Any]) -> Interval:
        truth, metric = self.task.truth(self.rows[split]), self.floor.metric
        each, parts = self._each(split, said), self._parts(split, said)
        if each is not None:
            return mean_interval(each, seed=self.seed)
        return bootstrap(self.task.whole, parts, seed=self.seed) if parts is not None else bootstrap(
            self.task.score, truth, said, key=metric, resamples=DRAWS, seed=self.seed)

    def _change(self, split: str, said: list[Any]) -> Interval:
        truth, before = self.task.truth(self.rows[split]), self.before[split]
        one, other = self._each(split, before), self._each(split, said)
        if one is not None and other is not None:
            return paired_mean(one, other, seed=self.seed)
        parts, others = self._parts(split, before), self._parts(split, said)
        if parts is not None and others is not None:
            return paired_bootstrap(self.task.whole, [parts], [others], seed=self.seed)
        return paired_bootstrap(self.task.score, (truth, before), (truth, said), key=self.floor.metric, resamples=DRAWS,
                                seed=self.seed)


def optimize_floor(model: str | Path, floor: Floor, budget: Budget | None = None, *, data: str | Path | None = None,
                   target: str = "gguf", text: list[str] | None = None, tokens: int | None = None,
                   out: str | Path = "supremum-out", keep: list[str] | None = None, only: list[str] | None = None,
                   quick: bool = False, fresh: bool = False, seed: int = 0, dtype: str = "auto") -> Result:
    """The smallest file of a tuned model that keeps the floor; with a budget: that file, if it keeps it.

    data: the folder of the recipe's rows, where it is not the one that the model was tuned on. Raises BudgetError where the
    floor is missed; what was computed stays beside `out` for another floor or budget. The rest as for `optimize`.
    """
    folder = Path(out)
    job = open_job(model, folder, target=target, text=text, tokens=tokens, keep=keep, only=only, seed=seed, dtype=dtype,
                   quick=quick, data=Path(data) if data else None)
    judge = Judge(job.checkpoint, floor, Path(data) if data else None, seed)
    if not fresh and (done := _finished(folder, job, judge, budget)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return Result(folder, done)
    if not fresh:
        check_replaced(folder, job.inputs)
    with phase("check what is needed"):
        layout = lay_out(job, [budget] if budget else ())
        points = [budget] if budget else _points(job, layout)
        check(job, layout, points[:2], folder)  # of a search the smallest, and as many files as stand at a time
    original = judge.original()
    workspace = Workspace(work_folder(folder), job.inputs, fresh=fresh)
    keep_timings(workspace.path("timings.json"))
    try:
        found = statistics(job, layout, workspace, points)
        tried: list[dict[str, Any]] = []
        chosen = _search(found, judge, points, original["least"], tried, searched=budget is None)
        if chosen is None:
            other = "allow more" if budget else "choose another --target"
            raise BudgetError(_missed(judge, original, tried, budget), f"Ask for less than {floor}, or {other}; the finished "
                              f"steps are kept in {workspace.folder}.")
        scores = {"valid": _score(found, judge, chosen, "valid"), "test": _score(found, judge, chosen, "test")}
        given = asdict(budget) if budget else {}
        staging, document = finish(found, chosen, folder, floor=plain({
            "asked": str(floor), "metric": floor.metric, "least": original["least"], "searched": budget is None,
            "rows": {name: len(rows) for name, rows in judge.rows.items()}, "digests": judge.digests,
            "original": {name: original[name] for name in judge.rows},
            "reached": {name: score["metric"] for name, score in scores.items()},
            "change": {name: score["change"] for name, score in scores.items()}, "tried": tried,
            "held_on_test": scores["test"]["metric"]["value"] >= floor.value * (
                original["test"].value if floor.relative else 1)}),
            command={**given, "floor": str(floor), "floor_data": str(data) if data else None})
        move_into_place(staging, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


def _finished(folder: Path, job: Job, judge: Judge, budget: Budget | None) -> Any:
    """The document of an earlier run of the same inputs, rows, floor and budget."""
    try:
        stored = json.loads((folder / "supremum.json").read_text())
        made_for, bits = stored["result"].get("floor") or {}, stored["budget"]["bits"]
        told = made_for["asked"], made_for["searched"], made_for["digests"]
        if told != (str(judge.floor), budget is None, judge.digests):
            return None
        return finished(folder, job.inputs, budget or Budget(bits=bits))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _points(job: Job, layout: Layout) -> list[Budget]:
    """Every STEP bits that the target can hold and the original exceeds, fewest first."""
    least, most = bit_range(job, layout, layout.menu)
    first = -int(-max(least, LEAST) // STEP)
    found = [Budget(bits=number * STEP) for number in range(first, int(min(most, MOST) / STEP) + 1)]
    if not found:
        raise BudgetError(f"the {job.kind.name} target has nothing to search between {least:.3f} and {most:.3f} bits a "
                          "weight.", "Choose another --target." + job.narrowed)
    return found


def _search(found: Statistics, judge: Judge, points: Sequence[Budget], least: float, tried: list[dict[str, Any]], *,
            searched: bool) -> Budget | None:
    """The first of the points that holds, by bisection; None if the last does not. `tried` grows by what was measured."""
    low, high, best = 0, len(points), None  # every point below `low` missed, `high` held
    while low < high:
        middle = (low + high) // 2
        budget = points[middle]
        if len(points) > 1:
            note(f"try {budget.bits:g} bits a weight")
        score = _score(found, judge, budget, "valid")
        value, error = score["metric"]["value"], (score["change"]["high"] - score["change"]["low"]) / WIDTH
        held = value - (error if searched else 0) >= least
        tried.append({"bits": budget.bits, "bytes": score["bytes"], "value": value, "error": error, "held": held})
        note(f"{judge.floor.metric} {value:.4g}, error {error:.2g}, on the valid rows: {'held' if held else 'missed'}.")
        if held:
            if best is not None:
                _drop(found, best)
            high, best = middle, budget
        else:
            low = middle + 1
            if len(points) > 1:
                _drop(found, budget)
    return best


def _score(found: Statistics, judge: Judge, budget: Budget, split: str) -> dict[str, Any]:
    """A point's metric on one split, and its bytes; kept, so that a killed search goes on."""
    def compute() -> dict[str, Any]:
        reached, written = made(found, budget)
        return plain({**judge.score(written, split), "bytes": reached.size})

    words = f"{judge.floor.metric}-{split}-{judge.digests[split]}"
    scored: dict[str, Any] = found.gathered.workspace.json(f"floor/{budget.name}-{words}.json", compute)
    return scored


def _drop(found: Statistics, budget: Budget) -> None:
    """Free what a point takes on the disk; its score stays."""
    shutil.rmtree(found.gathered.workspace.folder / budget.name, ignore_errors=True)


def _missed(judge: Judge, original: Mapping[str, Any], tried: Sequence[Mapping[str, Any]], budget: Budget | None) -> str:
    best = max(tried, key=lambda point: point["value"])
    where = "it" if budget else f"the best of {len(tried)} files ({best['bits']:g} bits a weight)"
    more = "" if budget else f" (standard error of its change {best['error']:.2g})"
    return (f"--floor {judge.floor} was missed: {where} has {judge.floor.metric} {best['value']:.4g}{more} on the "
            f"{len(judge.rows['valid'])} valid rows, {original['least']:.4g} is asked, the original has "
            f"{original['valid'].value:.4g}.")
