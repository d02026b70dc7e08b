"""Zero-shot tasks as files: one JSON object a line, in one of three forms.

    {"query": "...", "choices": ["...", ...], "gold": 1}                         which choice follows the query
    {"context_options": ["...", ...], "continuation": "...", "gold": 1}          after which context the continuation follows
    {"context": "...", "continuation": "..."}                                    cloze: the continuation itself, word by word

`gold` counts from 0, a "group" that a line may have is a text or a whole number (groups.py). A prompt is the query or context
in its set's template, a space, and the choice or continuation. The templates are those of the Language Model Evaluation
Harness where a set is known by its file's name; otherwise the query stands as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SupremumError
from .perturb import perturb

PROMPTS = {"arc": "{}\nAnswer:", "boolq": "{}\nAnswer:", "piqa": "{}\nAnswer:", "sciq": "{}\nAnswer:",
           "openbookqa": "{}"}  # by the beginning of the file's name
FORMS = {"choice": ("query", "choices", "gold"), "context": ("context_options", "continuation", "gold"),
         "cloze": ("context", "continuation")}


@dataclass(frozen=True)
class Case:
    """Texts (prompt, answer) of which the likeliest answer should be `gold`; a cloze has one. `group`: of those that are
    compared with each other, the one that the case belongs to."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int = 0
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """A file's cases, all of one form; `total`: those in the file, before a subset was taken."""

    name: str
    kind: str  # "choice" or "cloze"
    cases: tuple[Case, ...]
    total: int


def tasks_from(sources: Sequence[str | Path], *, samples: int | None = None, seed: int = 0,
               disturb: Sequence[str] = ()) -> list[Task]:
    """The tasks of files, or of folders' .jsonl files; `samples` takes a seeded subset of each, in the file's order.

    disturb: names of `perturb.KINDS` under which each task comes once more, its prompts disturbed.
    Raises SupremumError naming file, line and remedy.
    """
    files = [file for source in sources for file in _files(Path(source).expanduser())]
    tasks = [read_task(file, samples=samples, seed=seed, change=change) for file in files for change in (None, *disturb)]
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SupremumError(f"Two tasks are named {twice}.", "Give each file once, and files of different names.")
    return tasks


def read_task(path: Path, *, samples: int | None = None, seed: int = 0, change: str | None = None) -> Task:
    """One file's cases, under the perturbation `change`."""
    rows = list(_rows(path))
    if not rows:
        raise SupremumError(f"{path}: holds no cases.", f"Give one JSON object a line: {_forms()}.")
    total = len(rows)
    template = next((text for name, text in PROMPTS.items() if path.stem.lower().startswith(name)), "{}")
    changes = [partial(perturb, kind=change, seed=f"{seed} {number}") if change else str for number in range(total)]
    found = [_case(row, where, template, alter) for (where, row), alter in zip(rows, changes, strict=True)]
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise SupremumError(f"{path}: holds cloze cases among those with choices.", "Give each form a file of its own.")
    if samples is not None and samples < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, samples, replace=False))
        found = [found[index] for index in chosen]
    return Task(f"{path.stem}, {change}" if change else path.stem, kinds.pop(), tuple(case for _, case in found), total)


def _case(row: Any, where: str, template: str, alter: Callable[[str], str] = str) -> tuple[str, Case]:
    form = next((form for form, fields in FORMS.items() if isinstance(row, dict) and all(field in row for field in fields)),
                None)
    if form is None:
        has = ", ".join(map(repr, list(row)[:6])) or "no fields" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SupremumError(f"{where}: is no case (it has {has}).", f"Write one of: {_forms()}.")
    group = _group(row.get("group"), where)
    if form == "cloze":
        prompt = alter(_text(row, "context", where)).rstrip()
        return "cloze", Case((prompt,), (_text(row, "continuation", where),), group=group)
    options = row["choices" if form == "choice" else "context_options"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise SupremumError(f"{where}: the choices are not two or more texts.", "List the choices as strings.")
    gold = row["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise SupremumError(f"{where}: gold is {gold!r}, of {len(options)} choices.",
                            "Give the right choice's index, counted from 0.")
    for option in options:
        _encodable(option, where)
    if form == "choice":
        prompt = template.format(alter(_text(row, "query", where)).rstrip())
        return "choice", Case((prompt,) * len(options), tuple(options), gold, group)
    continuation = _text(row, "continuation", where)
    return "choice", Case(tuple(alter(option).rstrip() for option in options), (continuation,) * len(options), gold, group)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise SupremumError(f'{where}: "{field}" is not a text.', f'Write "{field}" as a string that is not empty.')
    _encodable(value, where)
    return value


def _group(value: Any, where: str) -> str | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value is None else str(value)
    return _text({"group": value}, "group", where)


def _encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SupremumError(f"{where}: holds half of a surrogate pair ({text[error.start]!r}), which no text has.",
                            "Write the character whole, or leave the line out.") from error


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, parsed object) of every line that is not blank."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise SupremumError(f"{path}: cannot be read ({error.strerror or error}).", "Check the path and its permissions.") \
            from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"{path}: line {number}", json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise SupremumError(f"{path}: line {number} is not JSON ({error}).", f"Write one of: {_forms()}.") from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("*.jsonl")):
        return found
    raise SupremumError(f"{path}: the folder holds no .jsonl files.", "Name a folder of tasks, or the files.")


def _forms() -> str:
    return "; ".join("{" + ", ".join(f'"{field}"' for field in fields) + "}" for fields in FORMS.values())
