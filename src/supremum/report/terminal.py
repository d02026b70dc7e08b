"""The closing table on the terminal: 80 columns, readable without colour and in a log."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ..sizes import format_size
from . import words
from .document import Document

WIDTH = 80


def result_lines(document: Document, folder: Path) -> list[str]:
    """The table as lines of at most 80 columns (paths alone may be longer)."""
    source, result, proof = document["inputs"], document["result"], document["proof"]
    measured, reference = result["measured"], result["measured"]["perplexity_reference"]
    saved = f"{source['bytes'] / result['bytes']:.2f} x smaller" if result["bytes"] else ""
    lines = ["", words.one_line(words.headline(document)), "=" * WIDTH, f"{'':<22}{'original':>16}{'now':>18}"]

    def row(label: str, before: str, now: str, remark: str = "") -> None:
        lines.append(f"{label:<22}{before:>16}{now:>18}  {remark}".rstrip()[:WIDTH])

    row("size", format_size(source["bytes"]), format_size(result["bytes"]), saved)
    if result["budget_bytes"]:
        row("  of the budget", "", words.percent(result["bytes"] / result["budget_bytes"]),
            f"budget {format_size(result['budget_bytes'])}")
    row("bits a weight", "", words.figure(result["bits_per_weight"]), "layers of the blocks")
    row("perplexity", words.figure(reference, 4), words.figure(measured["perplexity"], 4),
        f"± {words.figure(measured['perplexity_se'], 2)}")
    row("KL, nats a token", "0", words.figure(measured["kl_mean"]), f"± {words.figure(measured['kl_se'], 2)}")
    row("same next token", "100 %", words.percent(measured["same_top"]), f"of {measured['tokens']:,} positions")
    lines.append("-" * WIDTH)
    if result["gap_bits"] is not None:
        row("limit at these bits", "", words.figure(result["limit_kl"]), "nats: no code is below")
        row("above the limit", "", f"{result['gap_bits']:.2f} bits", "a weight at this KL")
    agreement = ", ".join(f"{key} {value}" for key, value in words.labelled(proof["agreement"]))
    state = "passed" if proof["passed"] else "FAILED"
    lines += _wrapped(f"proof {state}: {proof['runtime']} {proof['version']}, fresh process; {agreement}")
    lines += _wrapped(f"time {words.seconds(sum(phase['seconds'] for phase in document['phases']))}: " + ", ".join(
        f"{phase['name']} {words.seconds(phase['seconds'])}"
        for phase in sorted(document["phases"], key=lambda phase: -phase["seconds"])[:4]))
    lines += ["=" * WIDTH, f"model   {words.one_line(str(folder / result['file']))}",
              f"report  {words.one_line(str((folder / 'report.html').resolve()))}"]
    return lines


def limits_lines(limits: dict[str, Any]) -> list[str]:
    """Every value of `supremum limit`, grouped, with how it is known."""
    lines: list[str] = []
    group = None
    for path, value in words.limit_values(limits):
        head = ": ".join(path[:2]) if len(path) > 2 else path[0]
        if head != group:
            lines += ["", head, "-" * WIDTH]
            group = head
        label = ", ".join(path[2:] or path[1:])
        lines.append(f"{words.one_line(label)[:38]:<38} {words.with_unit(value)[:28]:>28}  {value['kind']}")
        if value.get("note"):
            remark = textwrap.wrap(words.one_line(value["note"]), WIDTH - 4)
            lines += [f"    {line}" for line in remark]
    return lines


def show_result(document: Document, folder: Path) -> None:
    print("\n".join(result_lines(document, folder)))


def show_limits(limits: dict[str, Any]) -> None:
    print("\n".join(limits_lines(limits)))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(words.one_line(text), WIDTH, subsequent_indent="  ")

