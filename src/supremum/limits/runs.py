"""A ladder of measured training runs, read and checked.

One run a line of RUNS.csv or RUNS.jsonl: `params` N, `tokens` D seen, `loss` in nats a token on held-out text of one corpus
and one tokenizer; and, where known, `unique_tokens` (or `epochs`, tokens/unique_tokens), `bits` of the weights in training,
`flops`, `seconds`, `name`. Other columns are left alone. What `supremum train` wrote is a run, too: its train.json.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SupremumError

NEEDED = ("params", "tokens", "loss")
OPTIONAL = ("unique_tokens", "epochs", "bits", "flops", "seconds")
TRAINED = "train.json"
FEWEST = 6  # five parameters, and one run to judge them by


@dataclass(frozen=True)
class Run:
    params: float
    tokens: float
    loss: float
    unique_tokens: float  # at most `tokens`
    bits: float | None = None
    flops: float | None = None
    seconds: float | None = None
    name: str = ""


def read_runs(path: Path | str) -> list[Run]:
    """The runs of a .csv or .jsonl file, or of a folder that holds runs.jsonl, runs.csv, one .json a run, or the folders that
    `supremum train` wrote."""
    path = Path(path)
    if path.is_dir():
        named = [path / name for name in ("runs.jsonl", "runs.csv") if (path / name).is_file()]
        files = named[:1] or sorted(path.glob(f"*/{TRAINED}")) or sorted(path.glob("*.json"))
        if not files:
            raise SupremumError(f"{path}: holds no runs.jsonl, no runs.csv, no .json files and no folders with a {TRAINED}.",
                                "Give the file of the runs.")
    elif path.is_file():
        files = [path]
    else:
        raise SupremumError(f"{path}: no such file or folder.", "Give a .csv or .jsonl file of runs, or its folder.")
    runs = [_run(row, where) for file in files for where, row in _rows(file)]
    if not runs:
        raise SupremumError(f"{path}: holds no runs.", f"Write one run a line with {', '.join(NEEDED)}.")
    return runs


def _rows(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where it stands, the record) of every run of a file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SupremumError(f"{file}: cannot be read as UTF-8 text ({error}).",
                            "Give a .csv or .jsonl file of runs.") from error
    if file.suffix.lower() == ".csv":
        table = csv.DictReader(text.splitlines())
        missing = [name for name in NEEDED if name not in (table.fieldnames or ())]
        if missing:
            raise SupremumError(f"{file}: has no column {', '.join(missing)}.",
                                f"The first line must name at least {', '.join(NEEDED)}.")
        try:
            yield from ((f"{file} line {table.line_num}", row) for row in table)
        except csv.Error as error:
            raise SupremumError(f"{file} line {table.line_num}: {error}.", "Write plain CSV with one run a line.") from error
        return
    lines = [text] if file.suffix.lower() == ".json" else text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SupremumError(f"{file} line {number}: not JSON ({error}).", "Write one JSON object a line.") from error
        if not isinstance(row, dict):
            raise SupremumError(f"{file} line {number}: not a JSON object.", "Write one JSON object a line.")
        yield f"{file} line {number}", _trained(row, file) if file.name == TRAINED else row


def _trained(row: dict[str, Any], file: Path) -> dict[str, Any]:
    """The run that a train.json tells of."""
    try:
        return {"name": file.parent.name, "params": row["parameters"], "tokens": row["tokens"], "seconds": row["seconds"],
                "loss": row["held_out"]["loss"], "unique_tokens": row["examples"] * row["inputs"]["recipe"]["length"]}
    except (KeyError, TypeError) as error:
        raise SupremumError(f"{file}: is no {TRAINED} with a held-out loss ({type(error).__name__}: {error}).",
                            "Train with held_out above 0, or leave the run out.") from error


def _run(row: dict[str, Any], where: str) -> Run:
    found: dict[str, float | None] = {}
    for name in (*NEEDED, *OPTIONAL):
        given = row.get(name)
        if given is None or given == "":
            if name in NEEDED:
                raise SupremumError(f"{where}: {name} is missing.", f"Every run needs {', '.join(NEEDED)}.")
            found[name] = None
            continue
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise SupremumError(f"{where}: {name} is {str(given)[:40]!r}, not a number above 0.",
                                "Correct it, or leave the run out.")
        found[name] = value
    tokens, unique, epochs = found["tokens"], found["unique_tokens"], found["epochs"]
    assert tokens is not None
    if unique is None:
        unique = tokens / max(1.0, epochs or 1.0)
    return Run(found["params"] or 0.0, tokens, found["loss"] or 0.0, min(unique, tokens), found["bits"], found["flops"],
               found["seconds"], str(row.get("name") or ""))


def refuse_too_few(runs: list[Run]) -> None:
    """Raise where no law of five parameters can be told from `runs` at all."""
    sizes, lengths = {run.params for run in runs}, {run.tokens for run in runs}
    if len(runs) < FEWEST:
        raise SupremumError(f"{len(runs)} runs cannot fix the five parameters of the law.",
                            f"Give at least {FEWEST}, better 10.")
    for name, values in (("number of parameters", sizes), ("number of tokens", lengths)):
        if len(values) < 2:
            raise SupremumError(f"All runs have one {name} ({min(values):,.0f}); its exponent cannot be told.",
                                "Add runs with at least two others.")
