"""The closing table on the terminal: 80 columns, readable without colour and in a log."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..sizes import format_size
from . import words
from .document import Document

WIDTH = 80
TIE = "\u2060"  # stands for a space at which no line is broken; never printed


def result_lines(document: Document, folder: Path) -> list[str]:
    """The table as lines of at most 80 columns (paths alone may be longer)."""
    source, result = document["inputs"], document["result"]
    measured, reference = result["measured"], result["measured"]["perplexity_reference"]
    saved = f"{source['bytes'] / result['bytes']:.2f} x smaller" if result["bytes"] else ""
    lines = ["", words.one_line(words.headline(document)), "=" * WIDTH, f"{'':<22}{'original':>16}{'now':>18}"]

    def row(label: str, before: str, now: str, remark: str = "") -> None:
        lines.append(f"{label:<22}{before:>16}{now:>18}  {remark}".rstrip()[:WIDTH])

    row("size", format_size(source["bytes"]), format_size(result["bytes"]), saved)
    if result["budget_bytes"]:
        row("  of the budget", "", words.percent(result["bytes"] / result["budget_bytes"]),
            f"budget {format_size(result['budget_bytes'])}")
    for line in result.get("running", []):
        row(line["name"], line["original"], line["reached"], f"asked {line['asked']}{'' if line['held'] else ': NOT held'}")
    if floor := result.get("floor"):
        for name in ("valid", "test"):
            row(f"{floor['metric']}, {name}"[:22], words.figure(floor["original"][name]["value"], 4),
                words.figure(floor["reached"][name]["value"], 4),
                f"floor {words.figure(floor['least'], 4)}" if name == "valid" else
                f"{floor['rows']['test']:,} rows{'' if floor['held_on_test'] else ': below'}")
    row("bits a weight", "", words.figure(result["bits_per_weight"]), "layers of the blocks")
    if measured["perplexity"] is not None:
        row("perplexity", words.figure(reference, 4), words.figure(measured["perplexity"], 4),
            f"± {words.figure(measured['perplexity_se'], 2)}")
    if measured["kl_mean"] is not None:
        row("KL of hidden states" if words.of_hidden_states(document) else "KL, nats a token", "0",
            words.figure(measured["kl_mean"]), f"± {words.figure(measured['kl_se'], 2)}")
    if measured["same_top"] is not None:
        row("same next token", "100 %", words.percent(measured["same_top"]), f"of {measured['tokens']:,} positions")
    lines.append("-" * WIDTH)
    if result["gap_bits"] is not None:
        row("limit at these bits", "", words.figure(result["limit_kl"]), "nats: no code is below")
        row("above the limit", "", f"{result['gap_bits']:.2f} bits", "a weight at this KL")
    lines += _wrapped(_proof(document))
    phases = sorted(document["phases"], key=lambda phase: -phase["seconds"])
    lines += _wrapped(f"time {_solid(words.seconds(sum(phase['seconds'] for phase in phases)))}: " + ", ".join(
        f"{words.one_line(phase['name'])} {_solid(words.seconds(phase['seconds']))}" for phase in phases[:4]))
    lines += ["=" * WIDTH, f"model   {words.one_line(str(folder / result['file']))}",
              f"report  {words.one_line(str((folder / 'report.html').resolve()))}"]
    return lines


def _proof(document: Document) -> str:
    proof = document["proof"]
    if not proof["positions"]:
        return words.one_line(words.vouched(document))
    return (f"proof passed: {words.one_line(words.runtime(document))} in a fresh process against our own decoding: "
            f"KL {words.figure(proof['kl_mean'], 2)}, same {'answer' if words.of_hidden_states(document) else 'token'} at "
            f"{words.percent(proof['same_top'], 0)} of {proof['positions']} positions"
            + (f"; decode {words.figure(proof['decode_tokens_per_second'])} tokens/s" if proof["decode_tokens_per_second"]
               else ""))


def show_result(document: Document, folder: Path) -> None:
    print("\n".join(result_lines(document, folder)))


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return [line.replace(TIE, " ") for line in lines]


def _solid(text: str) -> str:
    """`text` that is not to be broken between lines."""
    return text.replace(" ", TIE)

