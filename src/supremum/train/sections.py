"""The sections of a recipe for `supremum tune`: a task, its rows, a model and a way (recipe.py reads and checks them)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .corpus import TokenizerRecipe
from .joint import Source
from .models import Model
from .recipe import Optimiser, Schedule, Training, limits
from .ways import Way


@dataclass(frozen=True)
class Gentle(Optimiser):
    lr: float = limits(5e-5, above=0)
    weight_decay: float = limits(0.01, least=0)
    betas: tuple[float, float] = limits((0.9, 0.999), least=0, most=0.999999)


@dataclass(frozen=True)
class Falling(Schedule):
    name: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup: float = limits(0.06, least=0, most=1)


@dataclass(frozen=True)
class TaskSection:
    """A task and its settings; what is not given is the task's own default."""

    name: Literal["classify", "pairs", "tag", "answer", "translate", "summarise", "instruct", "embed"]
    length: int | None = limits(None, least=8)  # tokens of an input
    stride: int | None = limits(None, least=0)
    words: int | None = limits(None, least=1)
    new: int | None = limits(None, least=1)
    prompt: str | None = None
    tokenize: str | None = None
    beams: int | None = limits(None, least=1, most=64)  # 1 is greedy
    smoothing: float | None = limits(None, least=0, most=0.9)
    temperature: float | None = limits(None, above=0)


@dataclass(frozen=True)
class Data:
    """Files below --data, each perhaps with [first:last]. What is not named is drawn from `train` by the seed."""

    train: tuple[str, ...]
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    kind: Literal["auto", "tsv", "csv", "jsonl", "conll", "squad"] = "auto"
    columns: dict[str, Any] = field(default_factory=dict)  # role -> the column's name, or its number without a header
    share: float = limits(0.1, above=0, most=0.5)  # of `train`, for each split that is not named
    missing: Literal["refuse", "drop"] = "refuse"  # what becomes of a row with an empty field


@dataclass(frozen=True, kw_only=True)
class Common(Training):
    """What a recipe of one task and one of several have in common."""

    model: str | Model = "minilm"  # a section is a model from scratch
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)  # of a model from scratch
    way: Way = field(default_factory=Way)
    optimiser: Gentle = Gentle()
    schedule: Falling = Falling()
    batch: int = limits(32, least=1)
    epochs: float | None = limits(None, least=0)
    score_batch: int = limits(64, least=1)
    lstm: bool = True  # a small LSTM among the baselines of tasks with labels


@dataclass(frozen=True, kw_only=True)
class Tune(Common):
    task: TaskSection
    data: Data
    source: Source | None = None  # rows of another domain beside data.train
    untuned: bool = False  # score the base as it is, too; only where the task adds no head


def settings_of(section: TaskSection) -> dict[str, Any]:
    """What a recipe sets of its task."""
    return {key: value for key, value in dataclasses.asdict(section).items() if key != "name" and value is not None}
