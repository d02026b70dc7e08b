"""Tasks, in one form: how rows become inputs, the head, the loss, how outputs become predictions, and the score.

    predictions = task.predict(model, tokenizer, rows)        metric = mean over items of task.each(truth, predictions)

Corpus metrics (entity F1, BLEU) have no mean over items: `each` is None there, and the bootstrap draws rows instead.
A new task is a class below `Task` and one line in TASKS.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...errors import SupremumError
from .base import Task

__all__ = ["TASKS", "Task", "make"]

TASKS = {  # name in a recipe: module, class
    "classify": ("classify", "Classify"),
    "pairs": ("classify", "Pairs"),
    "tag": ("tag", "Tag"),
    "answer": ("answer", "Answer"),
    "translate": ("generate", "Translate"),
    "summarise": ("generate", "Summarise"),
    "instruct": ("generate", "Instruct"),
    "embed": ("embed", "Embed"),
}


def make(name: str, settings: dict[str, Any], where: str) -> Task:
    """The task `name` with its settings; `where`: the recipe, for messages."""
    if name not in TASKS:
        raise SupremumError(f"{where}: task {name!r} is not known.", f"Choose one of {', '.join(TASKS)}.")
    module, kind = TASKS[name]
    made: Task = getattr(import_module(f".{module}", __name__), kind)()
    for key, value in settings.items():
        if key not in made.settings:
            raise SupremumError(f"{where}: the task {name} has no setting {key!r}.", f"It has {', '.join(made.settings)}.")
        made.settings[key] = value
    return made
