"""Transfer: a base model, a task's rows and a way in; a plain folder, its score and what it had to beat out.

    rows -> leaks, labels -> base under the task's head -> way -> training -> merge -> test -> baselines -> OUT

OUT holds the model in Transformers' own files (adapters merged) and `tune.json`. OUT.work/ holds checkpoints; the same
command goes on from the newest whole one. Valid rows choose nothing of the tuned model; their score is shown beside the
test's.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import SupremumError
from ..measure.intervals import Interval, bootstrap, mean_interval, paired_bootstrap, paired_mean
from ..plain import plain
from ..progress import note, phase
from ..text.words import words
from ..versions import version_of
from ..workspace import replacing_folder
from .base import load as load_base
from .base import scratch
from .baselines import baselines
from .batches import trainer_of
from .joint import Joint, both, paired
from .models import Model
from .prompt import add_prompt
from .quantised import write_missing
from .recipe import load as load_recipe
from .result import check_out, put_document, standing
from .rows import Row, digest, read
from .sections import Tune, settings_of
from .tasks import Task, make
from .trainer import check, check_alone, fit, open_run
from .watch import State
from .ways import check_way, counts, merged, prepare

FILE = "tune.json"
DRAWS = 200  # resamples of a corpus metric (each is a whole scoring)


@dataclass(frozen=True)
class Line:
    """One row of the table; `ahead`: the tuned model's metric minus this one's, on the same rows."""

    name: str
    metric: Interval
    scores: Mapping[str, Any]
    ahead: Interval | None = None


@dataclass(frozen=True)
class Tuned:
    """`curve`: [step, loss, rate] of the training; `skipped`: [step, why] of the steps that the guards left out."""

    recipe: str
    task: str
    metric: str
    model: str
    way: str
    lines: list[Line]
    rows: dict[str, int]
    leaks: dict[str, int]
    labels: list[str]
    trained: int
    parameters: int
    steps: int
    minutes: float
    loss: float | None
    valid: float
    path: str
    data: str  # the folder that the recipe's files are in, as an absolute path
    curve: list[list[float]] = dataclasses.field(default_factory=list)
    skipped: list[list[Any]] = dataclasses.field(default_factory=list)

    @property
    def beaten(self) -> list[str]:
        """Baselines whose difference to the tuned model is not above zero with 95 %."""
        return [line.name for line in self.lines if line.ahead is not None and not line.ahead.low > 0]

    def to_dict(self) -> dict[str, Any]:
        """What tune.json and --json hold."""
        return {**dataclasses.asdict(self), "level_with_or_behind": self.beaten}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tuned:
        """The same again from what tune.json holds."""
        lines = [Line(line["name"], Interval(**line["metric"]), line["scores"],
                      Interval(**line["ahead"]) if line["ahead"] else None) for line in values["lines"]]
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
                   | {"lines": lines})


def tune(path: str | Path, data: str | Path = ".", out: str | Path | None = None, *, changes: Sequence[str] = (),
         fresh: bool = False) -> Tuned:
    """Tune as the recipe `path` says on the files below `data`; writes the model and tune.json into `out`,
    a folder of the recipe's name unless given.

    Raises SupremumError for what the user can mend; KeyboardInterrupt after a signal, with a checkpoint written.
    """
    recipe = load_recipe(path, Tune, changes)
    folder, out = Path(data), Path(out) if out else Path(Path(path).stem)
    check_alone()
    check_out(out, FILE)
    task = make(recipe.task.name, settings_of(recipe.task), str(path))
    check_before(recipe, task, str(path))
    with phase("read rows"):
        train, valid, test = splits(task, recipe, folder)
        others: list[Row] = []
        if recipe.source and recipe.epochs != 0:
            others = read(folder, recipe.source.train, task.roles, recipe.source.columns or recipe.data.columns,
                          recipe.data.kind if recipe.source.kind == "as data" else recipe.source.kind,
                          recipe.data.missing == "drop")
            task.check(others)
    leaked = leaks(task, learnt_by(task, [*train, *others]), valid=valid, test=test)
    for name, count in leaked.items():
        if count:
            note(f"{count} of {len(valid if name == 'valid' else test)} {name} rows also stand in the training text.")
    work = out.with_name(f"{out.name}.work")
    seed = recipe.seed
    if isinstance(recipe.model, Model):
        with phase("tokenizer"):
            model, tokenizer, fingerprint = scratch(recipe.model, recipe.tokenizer, task, train, seed)
    else:
        model, tokenizer, fingerprint = load_base(recipe.model, task, seed, quantised=recipe.way.name == "qlora")
    inputs = {"supremum": __version__, "recipe": plain(recipe), "model": fingerprint,
              "rows": digests(train=train, valid=valid, test=test, source=others)}
    if done := standing(out, FILE, inputs, fresh=fresh):
        return Tuned.from_dict(done)
    run = open_run(work, inputs, fresh=fresh)
    before: list[Any] | None = None
    if recipe.untuned:
        with phase("score the base as it is"):
            before = task.predict(model.eval(), tokenizer, test, recipe.score_batch)
    minutes, steps, state = 0.0, 0, State()
    trained, total = 0, counts(model)[1]
    if recipe.epochs != 0:
        prompt: list[int] = []
        if recipe.way.name == "prompt":
            tokenizer, prompt = add_prompt(model, tokenizer, recipe.way.tokens, seed)
        with phase("tokens"):
            features = task.encode(train, tokenizer)
        collate, joint = task.collate(tokenizer), None
        if recipe.source:
            features, collate = paired(task.encode(others, tokenizer), features), both(collate)
            joint = Joint(task, model, recipe.source)
        steps = recipe.total_steps(len(features))
        model, callbacks = prepare(model, recipe.way, steps, prompt)
        trained, total = counts(model)
        started = time.perf_counter()
        fitted = fit(model, features, recipe, work, collator=collate, callbacks=callbacks,
                     kind=trainer_of(task, recipe.batch, seed, joint))
        state = fitted.state
        minutes = max(state.seconds, time.perf_counter() - started) / 60
        model = merged(model)
        if joint:
            joint.leave(model)
    model.eval()
    with phase("score"):
        said = task.predict(model, tokenizer, test, recipe.score_batch)
        lines = table(task, train, test, said, before, seed, valid if recipe.lstm else None)
        held = task.score(task.truth(valid), task.predict(model, tokenizer, valid, recipe.score_batch))
    result = Tuned(recipe=str(path), task=task.name, metric=task.metric, model=said_of(recipe.model), way=recipe.way.name,
                   lines=lines, rows={"train": len(train), "valid": len(valid), "test": len(test)}, leaks=leaked,
                   labels=task.labels, trained=trained, parameters=total, steps=steps, minutes=minutes,
                   loss=state.loss, valid=float(held[task.metric]), path=str(out),
                   data=str(folder.resolve()), curve=state.curve, skipped=state.skipped)
    with replacing_folder(out) as staging:
        put(model, tokenizer, result, inputs, staging)
    if run is not None:
        run.discard()
    return result


def check_before(recipe: Tune, task: Task, path: str) -> None:
    """Refuse before any row is read what the recipe cannot ask of this machine, of the task or of its model."""
    if recipe.epochs != 0:
        check(recipe)
        check_way(recipe.way, f"{path}: ", bare=not task.new_head)
    if isinstance(recipe.model, Model) and recipe.way.name != "full":
        raise SupremumError(f"{path}: way: {recipe.way.name} changes part of a model that has learnt; this one is from "
                            "scratch.", "Use way: full.")
    if recipe.untuned and task.new_head:
        raise SupremumError(f"{path}: untuned needs a task that adds no head; {task.name} adds one.", "Leave it out.")
    if recipe.source and recipe.source.reverse and not task.new_head:
        raise SupremumError(f"{path}: source.reverse needs a task with a head of its own; {task.name} has none.",
                            "Use source.alpha.")
    for name, columns in (("data", recipe.data.columns), ("source", recipe.source.columns if recipe.source else {})):
        for role in columns:
            if role not in task.roles:
                raise SupremumError(f"{path}: {name}.columns: the task {task.name} has no column {role!r}.",
                                    f"It has {', '.join(task.roles)}.")


def splits(task: Task, recipe: Tune, folder: Path) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, valid and test rows; what the recipe does not name is drawn from train."""
    data = recipe.data
    drop = data.missing == "drop"
    train = read(folder, data.train, task.roles, data.columns, data.kind, drop)
    found: dict[str, list[Row]] = {}
    for name, files in (("valid", data.valid), ("test", data.test)):
        if files:
            found[name] = read(folder, files, task.roles, data.columns, data.kind, drop)
    for number, name in enumerate(("valid", "test")):
        if name not in found:
            lines = [list(rows) for _, rows in groupby(train, key=lambda row: row["where"])]  # a dialogue stays together
            random.Random(f"{recipe.seed} {number}").shuffle(lines)
            cut = max(1, round(data.share * len(lines)))
            found[name], train = list(chain(*lines[:cut])), list(chain(*lines[cut:]))
    if not train:
        raise SupremumError("No training rows are left after the splits.", "Give more rows.")
    task.learn(train)
    for rows in found.values():
        task.check(rows)
    return train, found["valid"], found["test"]


def digests(**parts: Sequence[Row]) -> dict[str, str]:
    """What tells whether any of the rows changed."""
    return {name: digest(rows) for name, rows in parts.items() if rows}


def said_of(model: str | Model) -> str:
    return model if isinstance(model, str) else f"{model.family} from scratch"


def learnt_by(task: Task, rows: Sequence[Row]) -> set[str]:
    """What a model learns from training rows, as `leaks` looks for it."""
    return {bare_words(task.text(row)) for row in rows}


def leaks(task: Task, learnt: Set[str], **parts: Sequence[Row]) -> dict[str, int]:
    """How many rows of each part stand, word for word, among the texts that the model learns from, given as bare words."""
    return {part: sum(bare_words(task.text(row)) in learnt for row in rows) for part, rows in parts.items()}


def bare_words(text: str) -> str:
    """A text apart from its capitals, punctuation and spaces; one without words as it is."""
    return " ".join(words(text.casefold())) or text.strip()


def table(task: Task, train: Sequence[Row], test: Sequence[Row], said: list[Any], before: list[Any] | None,
          seed: int, valid: Sequence[Row] | None = None) -> list[Line]:
    """The tuned model and what it had to beat, each with its interval and the paired difference. valid: rows that an LSTM's
    passes are chosen by; None leaves it out."""
    truth = task.truth(test)
    others = ({"untuned": before} if before is not None else {}) | baselines(task, train, test, valid, seed)
    own, counted = task.each(truth, said), task.parts(truth, said)
    if own is not None:
        ours = mean_interval(own, seed=seed)
    elif counted is not None:
        ours = bootstrap(task.whole, counted, seed=seed)
    else:
        ours = bootstrap(task.score, truth, said, key=task.metric, resamples=DRAWS, seed=seed)
    lines = [Line("tuned", ours, task.score(truth, said))]
    for name, other in others.items():
        each, parts = task.each(truth, other), task.parts(truth, other)
        if own is not None and each is not None:
            metric, ahead = mean_interval(each, seed=seed), paired_mean(each, own, seed=seed)
        elif counted is not None and parts is not None:
            metric = bootstrap(task.whole, parts, seed=seed)
            ahead = paired_bootstrap(task.whole, [parts], [counted], seed=seed)
        else:
            metric = bootstrap(task.score, truth, other, key=task.metric, resamples=DRAWS, seed=seed)
            ahead = paired_bootstrap(task.score, (truth, other), (truth, said), key=task.metric, resamples=DRAWS, seed=seed)
        lines.append(Line(name, metric, task.score(truth, other), ahead))
    return lines


def put(model: Any, tokenizer: Any, result: Tuned, inputs: Mapping[str, Any], folder: Path) -> None:
    """The model's files and tune.json."""
    transformers.utils.logging.disable_progress_bar()  # a moment's work
    model._keys_to_ignore_on_save = None  # computed tables of places, too: a folder is whole without its class's code
    model.save_pretrained(folder)
    write_missing(model, folder)
    tokenizer.save_pretrained(folder)
    versions = {name: version_of(name) for name in ("torch", "transformers", "peft", "scikit-learn")}
    document = {**result.to_dict(), "inputs": inputs, "versions": versions, "threads": torch.get_num_threads()}
    put_document(folder, FILE, document)
