"""The task that a folder was tuned for, found again through its tune.json: its recipe, its labels and its rows.

What scores a tuned model (`evaluate`, `optimize --floor`) asks here: both read the same rows and refuse the same things.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.architecture import objective
from ..errors import SupremumError
from ..progress import phase
from .recipe import again
from .rows import Row, digest
from .sections import Tune, settings_of
from .tasks import Task, make
from .tune import FILE, leaks, learnt_by, splits


@dataclass(frozen=True)
class Known:
    """What a tuned folder tells of its task. `rows`: "valid" and "test"; `leaked`: test rows that also stand in the training
    text; `as_tuned`: the test rows are those of the folder's own table."""

    task: Task
    recipe: Tune
    rows: dict[str, list[Row]]
    train: list[Row]
    leaked: int
    as_tuned: bool


@dataclass(frozen=True)
class Told:
    """What tune.json says. `tests`: digests of the rows that the folder was scored on; `leaked`: how many of them stand in
    the training text."""

    recipe: Tune
    data: Path | None
    labels: list[str]
    tests: set[str]
    leaked: int


def is_tuned(source: str | Path | None) -> bool:
    """Whether a model is a folder that `supremum tune` wrote."""
    return source is not None and (Path(source).expanduser() / FILE).is_file()


def is_language_model(source: str | Path) -> bool:
    """Whether a folder's model says the next token of one text, so that it has a quality beside that of its task."""
    try:
        config = json.loads((Path(source).expanduser() / "config.json").read_text())
        return not config.get("is_encoder_decoder") and objective(str(config["architectures"][0])) == "next"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def told(path: Path, asked: str) -> Told:
    """What the tune.json of a folder says. asked: the option that wants a task, for messages.

    Raises SupremumError where it is missing or damaged.
    """
    place = path / FILE
    try:
        tuned = json.loads(place.read_text())
        if several := tuned.get("tasks"):
            raise SupremumError(f"{path}: holds the models of several tasks.",
                                f"Name one of them: {', '.join(str(path / name) for name in several)}.")
        stored, folder, labels = dict(tuned["inputs"]["recipe"]), tuned.get("data"), list(tuned["labels"])
        digests = tuned["inputs"]["rows"]
        parts = [digests] if all(isinstance(one, str) for one in digests.values()) else digests.values()  # of several tasks
        tests, leaked = {part["test"] for part in parts}, int(tuned["leaks"]["test"])
    except OSError as error:
        raise SupremumError(f"{path}: holds no {FILE}, which tells the task that {asked} speaks of.",
                            f"Give a folder that `supremum tune` wrote, or leave out {asked}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SupremumError(f"{place}: is damaged ({type(error).__name__}: {error}).", "Tune the model again.") from error
    return Told(again(stored, Tune, str(place)), Path(folder) if folder else None, labels, tests, leaked)


def task_of(recipe: Tune, where: str) -> Task:
    """The task of a recipe, with its settings."""
    return make(recipe.task.name, settings_of(recipe.task), where)


def known(path: Path, data: Path | None, *, asked: str, option: str) -> Known:
    """The task of the folder `path`. data: the folder of the rows, where it is not the one that it was tuned on. asked: the
    option that wants a task, option: the one that names the rows' folder, both for messages.

    Raises SupremumError where tune.json is missing or damaged, the rows are gone, or they have other labels.
    """
    place, found = path / FILE, told(path, asked)
    task, folder = task_of(found.recipe, str(place)), data or found.data
    if folder is None or not folder.is_dir():
        raise SupremumError(f"{place}: the rows of its recipe are not in {folder or 'a folder that it names'}.",
                            f"Name their folder with {option}.")
    with phase("read rows"):
        train, valid, test = splits(task, found.recipe, folder)
    if found.labels != task.labels:
        has, own = (", ".join(map(str, labels[:8])) for labels in (task.labels, found.labels))
        raise SupremumError(f"{folder}: its training rows have the labels {has}, the model has {own}.",
                            f"Name the folder that it was tuned on with {option}.")
    as_tuned = digest(test) in found.tests
    leaked = found.leaked if as_tuned else leaks(task, learnt_by(task, train), test=test)["test"]
    return Known(task, found.recipe, {"valid": valid, "test": test}, train, leaked, as_tuned)
