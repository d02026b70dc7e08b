"""What the folder of a model from `supremum train` tells of the text that it learnt: which files, and what was hidden."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .objectives import Hide
from .pretrain import FILE, Recipe, objective_in, sums_of
from .recipe import again


@dataclass(frozen=True)
class Spans:
    """How an encoder-decoder learnt: what hides spans, and of how many tokens at most."""

    hide: Hide
    length: int


def spans_of(folder: Path, tokenizer: Any) -> Spans | None:
    """None of any model but an encoder-decoder that `train` made."""
    stored = _inputs(folder).get("recipe")
    if stored is None:
        return None
    recipe = again(stored, Recipe, str(folder / FILE))
    objective = objective_in(recipe)
    return Spans(Hide(objective, tokenizer), recipe.length) if objective.name == "span" else None


def trained_on(model: str | None, texts: Sequence[str]) -> list[str]:
    """Those of `texts` (files and folders) of which `model`, if it is a folder that `train` made of text files, learnt every
    file, by their sums."""
    known = set(map(str, _inputs(Path(model or "").expanduser()).get("text", ())))
    return [text for text in texts if known and Path(text).exists() and known.issuperset(sums_of([Path(text)]))]


def _inputs(folder: Path) -> dict[str, Any]:
    """Of train.json; empty where there is none."""
    try:
        return dict(json.loads((folder / FILE).read_text())["inputs"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
