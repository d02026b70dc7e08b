"""The limits as a page of 80 columns: what the file holds, what it could shrink to, what the machine can give."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..sizes import format_size
from .roofline import Ceiling, HardwareLimit
from .summary import InformationLimit, LayerLimit
from .topology import MIB
from .values import Kind

if TYPE_CHECKING:
    from . import Limits

COLOUR: dict[Kind, str] = {"measured": "green", "bound": "cyan", "estimate": "yellow"}
WIDTH = 80


def how(kind: Kind) -> str:
    """The label that every value carries."""
    return f"[{COLOUR[kind]}]{kind}[/]"


def rate(tokens: float) -> str:
    """Tokens per second, three digits, thousands as k."""
    power = 0 if tokens < 999.5 else 1 if tokens < 999.5e3 else 2
    return f"{tokens / 1000**power:.3g}{('', 'k', 'M')[power]}"


def _table(title: str, kind: Kind | None, *columns: str, left: int = 1) -> Table:
    label = f"  {how(kind)}" if kind else ""
    table = Table(title=f"\n[bold]{title}[/]{label}", title_justify="left", title_style="", box=box.SIMPLE_HEAD,
                  width=WIDTH, pad_edge=False, caption_justify="left")  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _bits(info: InformationLimit, total: int) -> Table:
    table = _table("Bits per weight", None, "", "bits", "size", "how")
    rows = [("stored", info.stored), ("without changing a weight", info.lossless)]
    rows += [(f"at KL {kl} nats/token, at least", value) for kl, value in info.bits_at_kl.items()]
    for name, value in rows:
        if value:
            covered = format_size(value.value * (info.weights or total) / 8)
            table.add_row(name, f"{value.value:.2f}", covered, how(value.kind))
    for name, value in info.gap_of_file.items():
        text = {"lossless": "the file spends beyond lossless", "reached": "the file spends beyond its limit"}
        table.add_row(text.get(name, f"the file spends beyond the limit at {name}"), f"{value.value:+.2f}", "",
                      how(value.kind))  # fmt: skip
    if info.weights:
        table.caption = f"size: of the {info.weights:,} weights that the limit covers"
    return table


def _curve(info: InformationLimit) -> Table:
    table = _table("Least KL at a size", "bound", "bits/weight", "KL, nats/token", "")
    table.columns[0].justify = "right"
    table.columns[2].justify = "left"
    bits, kls = zip(*info.curve, strict=True)
    wanted = [at for at in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0) if bits[0] <= at <= bits[-1]]
    points = list(zip(wanted, 2 ** np.interp(wanted, bits, np.log2(kls)), strict=True))
    logs = [math.log10(kl) for _, kl in points]
    for at, kl in points:
        length = 1 + round(39 * (math.log10(kl) - min(logs)) / max(1e-9, max(logs) - min(logs)))
        style = "dim cyan" if kl > 0.2 else "cyan"
        table.add_row(f"{at:.1f}", f"{kl:.3g}", Text("█" * length, style=style))
    return table


def _layers(layers: tuple[LayerLimit, ...]) -> Table:
    groups: dict[str, list[LayerLimit]] = defaultdict(list)
    for layer in layers:
        groups[layer.name.removesuffix(".weight").rsplit(".", 1)[-1]].append(layer)
    columns = ("layer", "n", "bits", "range", "KL %", "nearest", "GPTQ", "act-order", "WaterSIC")
    table = _table("Layers at KL 0.05", None, *columns)
    for name, rows in groups.items():
        weights = [row.shape[0] * row.shape[1] for row in rows]
        bits = sum(row.bits * w for row, w in zip(rows, weights, strict=True)) / sum(weights)

        def gap(method: str, rows: list[LayerLimit] = rows) -> str:
            known = [row.gaps[method] for row in rows if math.isfinite(row.gaps.get(method, math.inf))]
            return f"+{sum(known) / len(known):.2f}" if known else "-"

        table.add_row(
            escape(name), str(len(rows)), f"{bits:.2f}",
            f"{min(row.bits for row in rows):.1f}-{max(row.bits for row in rows):.1f}",
            f"{100 * sum(row.kl_share for row in rows):.1f}", gap("nearest"), gap("gptq"), gap("gptq-act-order"),
            gap("watersic"),
        )  # fmt: skip
    table.caption = (
        f"bits and share of the KL: {how('bound')}. Last four: bits above the layer's own limit\n"
        f"that each algorithm would lose with an entropy code: {how('estimate')}"
    )
    return table


def _formats(info: InformationLimit) -> Table:
    table = _table("What codes lose on a Gaussian", "estimate", "code", "bits", "gap", "code", "bits", "gap")
    table.columns[3].justify = "left"
    rows = [row for row in info.formats if row.rate >= 2]
    half = (len(rows) + 1) // 2
    cells = [(row.name, f"{row.rate:.3g}", f"{row.gap:.2f}") for row in rows] + [("", "", "")]
    for first, second in zip(cells[:half], cells[half : 2 * half], strict=True):
        table.add_row(*first, *second)
    return table


def _machine(limit: HardwareLimit) -> list[RenderableType]:
    machine = limit.machine
    threads = sorted({read.threads for read in machine.reads})
    columns = [f"{t} thread{'s' * (t > 1)}" if machine.device == "cpu" else machine.device for t in threads]
    table = _table("Reading, GB/s", "measured", "working set", "lives in", *columns, left=2)
    for nbytes in sorted({read.working_set for read in machine.reads}):
        rates = {read.threads: read for read in machine.reads if read.working_set == nbytes}
        text = f"{nbytes / MIB:.3g} MiB"
        table.add_row(text, machine.home(nbytes), *(_read(rates[t].gb_s, rates[t].best_gb_s) if t in rates else ""
                                                     for t in threads))  # fmt: skip
    table.caption = "median (best) of several readings; the ceilings below use the best"
    peaks = _table("Products, GFLOP/s", "measured", "type", *columns)
    for dtype in dict.fromkeys(peak.dtype for peak in machine.peaks):
        found = {peak.threads: peak for peak in machine.peaks if peak.dtype == dtype}
        peaks.add_row(dtype, *(_read(found[t].gflop_s, found[t].best_gflop_s) if t in found else "" for t in threads))
    known = ", ".join(f"L{c.level} {c.nbytes / MIB:.3g} MiB{'' if c.kind == 'measured' else ' (assumed)'}"
                      for c in machine.caches)  # fmt: skip
    head = f"{machine.name.strip()}, {machine.cores} cores, {format_size(machine.memory_bytes)} usable, {known}"
    return [Text(head), table, peaks]


def _read(median: float, best: float) -> str:
    return f"{median:.0f} ({best:.0f})" if best >= 10 else f"{median:.1f} ({best:.1f})"


def _ceilings(limit: HardwareLimit, phase: str) -> Table:
    found = [c for c in limit.ceilings if c.phase == phase]
    contexts, batches = (sorted({getattr(c, key) for c in found}) for key in ("context", "batch"))
    middle = contexts[min(1, len(contexts) - 1)]
    columns = [(contexts[0], batches[0]), (middle, batches[0]), (contexts[-1], batches[0])]
    if phase == "decode":
        columns[2:2] = [(middle, batch) for batch in batches[1:3]]
    columns = list(dict.fromkeys(columns))
    rows: dict[tuple[str, ...], list[Ceiling]] = defaultdict(list)  # formats that come to the same share a row
    for name in dict.fromkeys(c.format for c in found):
        own = {(c.context, c.batch): c for c in found if c.format == name}
        cells = [rate(own[key].tokens_per_s) + ("" if own[key].limited_by == "memory" else "*") for key in columns]
        rows[tuple([*cells, own[columns[0]].lives_in])].append(own[columns[0]])
    title = "Decode, tokens/s at most" if phase == "decode" else "Prefill, tokens/s at most"
    table = _table(title, "bound", "weights as", "bits", *(f"{_k(c)} x {b}" for c, b in columns), "lives in")
    for cells_of, same in rows.items():
        ends = list(dict.fromkeys((same[0], same[-1])))
        table.add_row(" to ".join(c.format for c in ends), "-".join(f"{c.bits:.3g}" for c in ends), *cells_of)
    table.caption = "columns: context x sequences at once. * limited by arithmetic, not by reading"
    return table


def _k(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 and context % 1024 == 0 else str(context)


def _capacity(limit: HardwareLimit) -> Table:
    table = _table("Memory", "estimate", "weights as", "weights", "cache", "activations", "of RAM", "longest context")
    one = [c for c in limit.capacities if c.batch == min(x.batch for x in limit.capacities)]
    longest = max(c.context for c in one)
    for row in (c for c in one if c.context == longest):
        used = row.weight_bytes + row.kv_bytes + row.activation_bytes
        table.add_row(
            row.format, format_size(row.weight_bytes), format_size(row.kv_bytes) if row.kv_bytes else "-",
            format_size(row.activation_bytes), f"{100 * used / row.memory_bytes:.3g} %" if row.fits else "[red]too large[/]",
            f"{row.longest_context:,}" if row.longest_context else "[red]none[/]",
        )  # fmt: skip
    table.caption = f"one sequence of {longest:,} tokens, 16-bit cache; at most the model's own context"
    return table


def render(limits: Limits) -> RenderableType:
    """Everything as one rich renderable for 80 columns."""
    info, hard = limits.information, limits.hardware
    stored = format_size(limits.stored_bytes)
    head = f"[bold]{escape(limits.source)}[/]\n{limits.weights:,} weights, {limits.format}, {stored}"
    title = Panel(head, title="limits", width=WIDTH, box=box.ROUNDED)
    parts: list[RenderableType] = [title, _bits(info, limits.weights)]
    if info.curve:
        parts += [_curve(info), _layers(info.layers)]
    parts += [_formats(info), *_machine(hard)]
    parts += [_ceilings(hard, phase) for phase in ("decode", "prefill") if any(c.phase == phase for c in hard.ceilings)]
    parts.append(_capacity(hard))
    said = [*info.assumptions, *hard.assumptions]
    if any(cache.kind == "estimate" for cache in hard.machine.caches):
        said.append("cache sizes assumed: the system does not tell them")
    parts.append(Text("\nAssumptions", style="bold"))
    grid = Table.grid(padding=(0, 1))
    for line in said:
        grid.add_row("-", line, style="dim")
    return Group(*parts, grid)


