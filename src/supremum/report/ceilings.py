"""The limits of a run as tables and as a chart, from `Limits.to_dict()`; parts that were not measured are left out."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..sizes import format_size
from .document import Document
from .theme import GRID, Figure, layout
from .words import figure, limit_values, with_unit

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """`kind`: how its values are known ("measured", "bound", "estimate"), or "" where each row says it."""

    title: str
    kind: str
    head: Row
    rows: list[Row]
    note: str = ""


def tables(limits: dict[str, Any]) -> list[Table]:
    """Information, reading, products, ceilings and memory, as far as `limits` holds them."""
    hardware = limits.get("hardware") or {}
    machine = hardware.get("machine") or {}
    found = [_information(limits.get("information") or {}), *_machine(machine)]
    for phase, title in (("decode", "Decode, tokens/s at most"), ("prefill", "Prefill, tokens/s at most")):
        found.append(_ceilings([c for c in hardware.get("ceilings", []) if c["phase"] == phase], title))
    found.append(_memory(hardware.get("capacities", [])))
    return [table for table in found if table.rows]


def assumptions(document: Document) -> list[str]:
    """The run's own and those of the limits, each once."""
    parts = (document["limits"].get("information") or {}, document["limits"].get("hardware") or {})
    said = [*document["assumptions"], *(str(line) for part in parts for line in part.get("assumptions", []))]
    return list(dict.fromkeys(said))


def speed(document: Document, phase: str) -> Figure | None:
    """Bars: the most tokens a second that the machine could give, by weight format, and what the runtime gave."""
    limits, proof = document["limits"], document["proof"]
    ceilings = (limits.get("hardware") or {}).get("ceilings", [])
    ceilings = [c for c in ceilings if c["phase"] == phase and c["batch"] == 1]
    if not ceilings:
        return None
    context = min(c["context"] for c in ceilings)
    by_bits = sorted((c for c in ceilings if c["context"] == context), key=lambda c: -c["bits"])
    reached = proof["decode_tokens_per_second" if phase == "decode" else "prefill_tokens_per_second"]
    names = [f"{html.escape(c['format'])} ({figure(c['bits'])} bits)" for c in by_bits]
    data = [{"type": "bar", "orientation": "h", "name": "limit of this machine", "y": names,
             "x": [c["tokens_per_s"] for c in by_bits], "marker": {"color": "heat(0.5)"},
             "text": [figure(c["tokens_per_s"]) for c in by_bits], "textposition": "auto",
             "customdata": [f"limited by {html.escape(c['limited_by'])}, reads from {html.escape(c['lives_in'])}"
                            for c in by_bits],
             "hovertemplate": "%{y}<br>at most %{x:.3~s} tokens/s<br>%{customdata}<extra></extra>"}]
    if reached:
        data.append({"type": "bar", "orientation": "h", "name": "this file, measured", "y": ["this file"],
                     "x": [reached], "text": [figure(reached)], "textposition": "auto",
                     "marker": {"color": "var(--accent)"},
                     "hovertemplate": "measured in the proof<br>%{x:.3~s} tokens/s<extra></extra>"})
    return {"data": data, "layout": layout(
        barmode="overlay", height=150 + 30 * (len(names) + 1), yaxis={"automargin": True, "showgrid": False},
        xaxis={"title": {"text": f"tokens/s, one sequence of {context:,} tokens"}, **GRID},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})}


def _information(information: dict[str, Any]) -> Table:
    titles = {"bits at kl": "least bits at KL {}", "kl at bits": "least KL at {} bits", "stored": "the file as stored",
              "lossless": "without changing a weight", "gap of file": "the file spends beyond: {}",
              "high rate": "high-rate constant"}
    rows: list[Row] = []
    for path, value in limit_values(information):
        words = titles.get(path[0], path[0] + (": {}" if path[1:] else "")).format(", ".join(path[1:]))
        rows.append((words, with_unit(value), str(value["kind"]), str(value.get("note") or "")))
    return Table("Bits and damage", "", ("", "value", "how", ""), rows)


def _machine(machine: dict[str, Any]) -> Iterator[Table]:
    reads, peaks = machine.get("reads", []), machine.get("peaks", [])
    threads = sorted({entry["threads"] for entry in (*reads, *peaks)})
    columns = tuple(f"{count} thread{'s' if count > 1 else ''}" for count in threads)
    note = "Median (best) of several readings; the ceilings use the best."
    rows: list[Row] = []
    for size in sorted({read["working_set"] for read in reads}):
        own = {read["threads"]: read for read in reads if read["working_set"] == size}
        where = next(iter(own.values()))["where"]
        rows.append((f"{format_size(size)}, in {where}", *(_best(own.get(count), "gb_s") for count in threads)))
    yield Table("Reading, GB/s", "measured", ("working set", *columns), rows, note)
    rows = []
    for dtype in dict.fromkeys(peak["dtype"] for peak in peaks):
        own = {peak["threads"]: peak for peak in peaks if peak["dtype"] == dtype}
        rows.append((dtype, *(_best(own.get(count), "gflop_s") for count in threads)))
    yield Table("Matrix products, GFLOP/s", "measured", ("type", *columns), rows, note)


def _best(entry: dict[str, Any] | None, key: str) -> str:
    return "" if entry is None else f"{figure(entry[key])} ({figure(entry['best_' + key])})"


def _ceilings(ceilings: list[dict[str, Any]], title: str) -> Table:
    columns = sorted({(c["batch"], c["context"]) for c in ceilings})
    rows: list[Row] = []
    for name in dict.fromkeys(c["format"] for c in ceilings):
        own = {(c["batch"], c["context"]): c for c in ceilings if c["format"] == name}
        cells = (figure(own[at]["tokens_per_s"]) + ("*" if own[at]["limited_by"] == "arithmetic" else "")
                 if at in own else "" for at in columns)
        rows.append((f"{name} ({figure(next(iter(own.values()))['bits'])} bits)", *cells))
    head = ("weights as", *(f"{context:,} x {batch}" for batch, context in columns))
    return Table(title, "bound", head, rows, "Columns: tokens of context x sequences at once. "
                                             "* limited by arithmetic, the others by reading.")


def _memory(capacities: list[dict[str, Any]]) -> Table:
    rows: list[Row] = [
        (f"{c['format']}, {c['context']:,} x {c['batch']}", format_size(c["weight_bytes"]), format_size(c["kv_bytes"]),
         format_size(c["activation_bytes"]), "yes" if c["fits"] else "NO", f"{c['longest_context']:,}")
        for c in capacities]
    return Table("Memory", "estimate", ("weights as, tokens x sequences", "weights", "cache", "activations", "fits",
                                        "longest context"), rows)
