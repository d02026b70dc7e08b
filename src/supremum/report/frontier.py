"""The frontier of a run: frontier.json put together from the points' own documents, and the page and the table of it.

A point is a finished folder with its own supremum.json; nothing is kept here that does not stand in one of them, but the
budgets that could not be had.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

from ..errors import StateError
from ..plain import plain
from ..sizes import UNKNOWN, figure, format_size
from ..workspace import write_atomic
from .document import Document, Inputs, Number, Point, Text, mismatch
from .words import one_line, plus_minus

SCHEMA = "supremum-frontier/1"
FILE, PAGE = "frontier.json", "frontier.html"


class Row(TypedDict):
    """One point: what was asked for, and what its file is."""

    asked: float  # bits a weight
    folder: str
    file: str  # what the runtime opens, relative to `folder`
    bits_per_weight: float
    bytes: int
    predicted_kl: Number
    kl: Number
    kl_se: Number
    perplexity: Number
    same_top: Number
    limit_kl: Number
    gap_bits: Number
    decode_tokens_per_second: Number
    passed: bool


class Skipped(TypedDict):
    asked: float
    why: str


class Frontier(TypedDict):
    schema: str
    command: str
    target: str
    inputs: Inputs
    text: Text
    asked: list[float]
    points: list[Row]
    skipped: list[Skipped]
    frontier: list[Point]
    assumptions: list[str]


def folder_of(asked: float) -> str:
    """The folder of a point, inside the output folder: "3.5"."""
    return f"{asked:g}"


def assemble_frontier(documents: Sequence[tuple[float, Document]], skipped: Sequence[tuple[float, str]], *, command: str,
                      asked: Sequence[float]) -> Frontier:
    """documents: (bits asked for, the point's document), at least one. skipped: (bits, why there is no such point)."""
    first = documents[0][1]
    limit: dict[float, Point] = {}  # of each rate, with the fewest bytes outside the blocks that any point has
    curve: list[Point] = []
    for bits, document in documents:
        for point in document["frontier"]:
            known = limit.get(point["bits"])
            if point["kind"] == "limit" and (known is None or (point["bytes"] or 0) < (known["bytes"] or 0)):
                limit[point["bits"]] = point
        result = document["result"]
        for kind, kl in (("predicted", result["predicted_kl"]), ("measured", result["measured"]["kl_mean"])):
            if kl:
                curve.append(cast(Point, {"bits": result["bits_per_weight"], "bytes": result["bytes"], "kl": kl,
                                          "kind": kind, "label": f"{folder_of(bits)} bits"}))
    return plain({
        "schema": SCHEMA, "command": command, "target": first["result"]["target"], "inputs": first["inputs"],
        "text": first["text"], "asked": list(asked), "points": [_row(bits, document) for bits, document in documents],
        "skipped": [{"asked": bits, "why": why} for bits, why in skipped],
        "frontier": [limit[bits] for bits in sorted(limit)] + curve, "assumptions": first["assumptions"]})


def _row(bits: float, document: Document) -> Row:
    result, measured, proof = document["result"], document["result"]["measured"], document["proof"]
    return {"asked": bits, "folder": folder_of(bits), "file": result["file"], "bits_per_weight": result["bits_per_weight"],
            "bytes": result["bytes"], "predicted_kl": result["predicted_kl"], "kl": measured["kl_mean"],
            "kl_se": measured["kl_se"], "perplexity": measured["perplexity"], "same_top": measured["same_top"],
            "limit_kl": result["limit_kl"], "gap_bits": result["gap_bits"],
            "decode_tokens_per_second": proof["decode_tokens_per_second"], "passed": proof["passed"]}


def read_frontier(folder: Path) -> Frontier:
    """The frontier that stands in `folder`. Raises StateError where there is none, or a damaged one."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StateError(f"{folder}: holds no {FILE}.", "Give the folder of a frontier.") from error
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: not valid JSON ({error}).", "Run `supremum optimize --frontier` again.") from error
    wrong = mismatch(found, Frontier, "") or (f"schema is not {SCHEMA}" if found["schema"] != SCHEMA else None)
    if wrong:
        raise StateError(f"{path}: {wrong}.", "The file was edited or damaged; run `supremum optimize --frontier` again.")
    return cast(Frontier, found)


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """frontier.html and frontier.json, in this order: where the second stands, the first does."""
    from .html import frontier_page

    write_atomic(folder / PAGE, frontier_page(frontier).encode())
    data = json.dumps(frontier, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(folder / FILE, data.encode())


def frontier_lines(frontier: Frontier, folder: Path) -> list[str]:
    """The points as a table of at most 80 columns (paths alone may be longer)."""
    rule = "=" * 80
    lines = ["", f"{one_line(frontier['inputs']['name'])}: {format_size(frontier['inputs']['bytes'])}"[:80], rule,
             f"{'asked':>6}{'bits':>8}{'size':>10}{'KL, nats a token':>20}{'at least':>11}{'gap':>8}{'same token':>12}  "]
    for row in frontier["points"]:
        same = UNKNOWN if row["same_top"] is None else f"{100 * row['same_top']:.1f} %"
        lines.append(f"{folder_of(row['asked']):>6}{row['bits_per_weight']:>8.3f}{format_size(row['bytes']):>10}"
                     f"{plus_minus(row['kl'], row['kl_se']):>20}{figure(row['limit_kl']):>11}"
                     f"{figure(row['gap_bits']):>8}{same:>12}".rstrip())
    for skipped in frontier["skipped"]:
        lines.append(f"{folder_of(skipped['asked']):>6}  {one_line(skipped['why'])}"[:80])
    return [*lines, rule, f"points  {one_line(str(folder))}/" + "|".join(row["folder"] for row in frontier["points"]),
            f"report  {one_line(str((folder / PAGE).resolve()))}"]


def show_frontier(frontier: Frontier, folder: Path) -> None:
    print("\n".join(frontier_lines(frontier, folder)))
