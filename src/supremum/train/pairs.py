"""Pairs of a source and what is written of it, for calibrating and comparing models that read one text and write another.

    a.en,a.de          two files of lines that belong together; with [first:last], some of them
    rows.jsonl .tsv    rows of a source and a target, in the columns that the model's own recipe names
    notes.txt          a source a line: the model writes what belongs to it, greedily; of a T5 that `supremum train` made, a
                       text a line, of which spans are hidden as its recipe says, and to be written

Without text they are the training rows of a folder that `supremum tune` wrote. A pair is encoded as the task trains on it
(its prompt and lengths), and a source comes once, so that no held-out pair is among those for calibration.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import SupremumError
from ..progress import phase
from ..text.pairs import join
from ..text.sources import state_of, suffix_of
from ..text.windows import spread
from .base import fitted, reopen
from .learnt import Spans, spans_of
from .rows import KINDS, PART, Row, decoded, digest, read
from .tasks import Task, make
from .tuned import is_tuned, known, task_of, told

SAMPLED = 256  # rows whose lengths say how many make a budget of tokens
BATCH = 32  # sources that the model writes of at one time


def state_of_pairs(checkpoint: Any, text: Sequence[str], data: Path | None) -> Any:
    """What tells whether the pairs changed. Raises SupremumError where there are none to be had. data: see `read_pairs`."""
    if text:
        return [state_of(part) for source in text for part in _part(source).split(",")]
    return digest(_trained_on(checkpoint, data))


def read_pairs(checkpoint: Any, text: Sequence[str], *, tokens: int, seed: int, data: Path | None = None) -> Tensor:
    """Windows (N, T) of pairs with about this many tokens on both sides together, evenly over what there is.

    data: the folder of a tuned model's rows, where it is not the one that it was tuned on. Raises SupremumError for too few.
    """
    encoder = _Encoder.of(checkpoint)
    rows = [row for source in text for row in encoder.rows(source)] if text else _trained_on(checkpoint, data)
    rows = list({encoder.task.text(row): row for row in rows}.values())
    some = encoder([rows[i] for i in spread(len(rows), min(SAMPLED, len(rows)), seed).tolist()])
    length = sum(len(source) + len(target) for source, target in some) / len(some)
    wanted = max(2, round(tokens / length))
    if len(rows) < wanted:
        raise SupremumError(f"There are {len(rows)} pairs of about {length:.0f} tokens, {tokens} tokens are wanted.",
                            "Give more pairs with --text, or ask for fewer --tokens.")
    pairs = encoder([rows[i] for i in spread(len(rows), wanted, seed).tolist()])
    return join(*zip(*pairs, strict=True))


@dataclass(frozen=True)
class _Encoder:
    """Rows as tokens, by the task of the model's recipe or, where it has none, by a translation's defaults."""

    checkpoint: Any
    task: Task
    tokenizer: Any
    start: int  # the token that the decoder begins with
    columns: dict[str, Any]
    kind: str
    spans: Spans | None = None  # of a model that learnt to write these

    @classmethod
    def of(cls, checkpoint: Any) -> _Encoder:
        if is_tuned(checkpoint.path):
            recipe = told(Path(checkpoint.path), "an encoder-decoder").recipe
            task, columns, kind = task_of(recipe, str(checkpoint.path)), recipe.data.columns, recipe.data.kind
            tokenizer = fitted(checkpoint, task, checkpoint.source)
        else:
            task, columns, kind = make("translate", {}, ""), {}, "auto"
            tokenizer = fitted(checkpoint, task, checkpoint.source)
            task.settings["new"] = task.settings["length"] // 2  # as much for either side
        start = getattr(checkpoint.config, "decoder_start_token_id", None)
        if start is None:
            raise SupremumError(f"{checkpoint.source}: names no token that its decoder begins with.",
                                "Write decoder_start_token_id into its config.json.")
        return cls(checkpoint, task, tokenizer, int(start), columns, kind, spans_of(checkpoint.path, tokenizer))

    def rows(self, source: str) -> list[Row]:
        """Rows of what --text names; those of plain text have no target."""
        if "," in source or suffix_of(Path(_part(source))) in KINDS:
            return read(Path(), [source], ("source", "target"), self.columns, self.kind)
        lines = decoded(Path(source)).replace("\r\n", "\n").split("\n")
        return [{"source": line.strip()} for line in lines if line.strip()]

    def __call__(self, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        """(source, what is written of it, start and end included) of each row; of rows without a target the model writes it,
        and those of which it writes nothing are left out."""
        blank = [row for row in rows if "target" not in row]
        hidden = [self._hidden(row["source"]) for row in blank] if self.spans else []
        if blank and not self.spans:
            model, _ = reopen(self.checkpoint, self.task)
            with phase("write what belongs to the sources"):
                said = self.task.predict(model, self.tokenizer, blank, BATCH)
            for row, target in zip(blank, said, strict=True):
                row["target"] = target
        pairs = [pair for pair in hidden if pair]
        kept = [row for row in rows if row.get("target")]
        if not kept and not pairs:
            raise SupremumError(f"{self.checkpoint.source}: writes nothing of these sources.",
                                "Give pairs: two files of lines, as --text a.en,a.de.")
        return pairs + [(one["input_ids"], [self.start, *one["labels"]]) for one in self.task.encode(kept, self.tokenizer)]

    def _hidden(self, text: str) -> tuple[list[int], list[int]] | None:
        """The text with spans left out, and these; None of less than two tokens. The same of the same text."""
        assert self.spans is not None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:self.spans.length - 1]
        if len(ids) < 2:
            return None
        pair = self.spans.hide({"ids": np.array(ids)}, np.random.default_rng(zlib.crc32(text.encode())))
        return pair["input_ids"].tolist(), [self.start, *pair["labels"].tolist()]


def _part(source: str) -> str:
    """A source without its [first:last]."""
    part = PART.fullmatch(source)
    return part[1] if part else source


def _trained_on(checkpoint: Any, data: Path | None) -> list[Row]:
    if not is_tuned(checkpoint.path):
        raise SupremumError(f"{checkpoint.source}: reads one text and writes another, and which, is not known.",
                            "Give pairs with --text: two files of lines (a.en,a.de) or rows of a source and a target "
                            "(.jsonl); of plain text the model writes the rest, or is asked for hidden spans.")
    option = "--floor-data, or give pairs with --text"
    return known(Path(checkpoint.path), data, asked="an encoder-decoder", option=option).train
