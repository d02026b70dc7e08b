"""The statistical limit as a page of 80 columns: the law, the forecasts, the budget's answer, and other people's figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..sizes import figure, format_size
from .page import WIDTH, _table, how

SYMBOLS = {"E": "E, loss without end of either", "alpha": "alpha, of parameters", "beta": "beta, of tokens",
           "A": "A", "B": "B"}


def amount(value: float) -> str:
    """Three figures and k, M, B, T: parameters, tokens."""
    for scale, unit in ((1e15, ""), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g}{unit}" if unit else f"{value:.2e}"
    return f"{value:.3g}"


def between(pair: Sequence[float | None] | None, show: Any = figure) -> str:
    low, high = pair or (None, None)
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def four(value: float) -> str:
    return figure(value, 4)


def render_scaling(document: dict[str, Any]) -> RenderableType:
    """Of `statistical_limit`, or of `published` alone."""
    parts: list[RenderableType] = []
    if "law" in document:
        parts += [_head(document), _law(document)]
        parts += [Text(f"! {line}", style="yellow") for line in document["doubts"]]
        if rows := [*document["predictions"], *document["held_out"]]:
            parts += [_forecasts("Runs that the fit has not seen, nats a token", rows), *_warnings(rows)]
        if document["rehearsal"]:
            parts += [_forecasts("Rehearsal: the largest size, from the smaller ones", document["rehearsal"])]
        if document["best"]:
            parts += [_best(document["best"])]
        elif document["frontier"]:
            parts += [_frontier(document["frontier"])]
    parts += [_published(document), _trends(document)]
    if "law" in document:
        parts += [Text("\nAssumptions", style="bold"), *_list(document["notes"])]
    return Group(*parts)


def _head(document: dict[str, Any]) -> Panel:
    runs = document["runs"]
    params, tokens = ([run[key] for run in runs] for key in ("params", "tokens"))
    text = (f"[bold]{escape(document['source'])}[/]\n{len(runs)} runs, "
            f"{between((min(params), max(params)), amount)} parameters, {between((min(tokens), max(tokens)), amount)} tokens")
    return Panel(text, title="the statistical limit", width=WIDTH, box=box.ROUNDED)


def _law(document: dict[str, Any]) -> Table:
    table = _table("L = E + A/N^alpha + B/D^beta", "estimate", "", "value", f"{100 * document['level']:.0f} % interval")
    for name, text in SYMBOLS.items():
        table.add_row(text, figure(document["law"][name]), between(document["intervals"].get(name)))
    squares = [value**2 for value in document["residuals"]]
    table.caption = f"the runs lie {100 * (sum(squares) / len(squares)) ** 0.5:.2g} % from it (root mean square)"
    return table


def _forecasts(title: str, rows: list[dict[str, Any]]) -> Table:
    table = _table(title, None, "run", "N", "tokens", "predicted", "interval", "measured", "error")
    for row in rows:
        mark = "[green]in[/]" if row["inside"] else "[red]OUT[/]"
        done = row["measured"] is not None
        table.add_row(
            escape((row["name"] or ("-" if done else "to be run"))[:11]), amount(row["params"]), amount(row["tokens"]),
            four(row["loss"]), f"{four(row['low'])}-{four(row['high'])}", four(row["measured"]) if done else "",
            f"{100 * row['error']:+.2f} % {mark}" if done else "")
    table.caption = f"predicted: {how('estimate')}; measured: {how('measured')}; in, OUT: of the interval"
    return table


def _warnings(rows: list[dict[str, Any]]) -> list[RenderableType]:
    return [Text(f"! {line}", style="yellow") for line in dict.fromkeys(row["extrapolates"] for row in rows) if line]


def _best(answer: dict[str, Any]) -> RenderableType:
    budget = answer["budget"]
    columns = ("bits", "parameters", "tokens", "epochs", "weights", "loss", "bound also by")
    table = _table(f"Best for {budget_words(budget)}", "estimate", *columns, left=0)
    for index, row in enumerate(answer["bits"]):
        style = "bold" if index == 0 else ""
        table.add_row(figure(row["bits"], 2), amount(row["params"]), amount(row["tokens"]), figure(row["epochs"], 2),
                      format_size(row["nbytes"]), figure(row["loss"], 4), ", ".join(row["bound_by"]), style=style)
    table.caption = (f"first row, intervals: loss {between((answer['low'], answer['high']), four)},\n"
                     f"parameters {between(answer['params'], amount)}, tokens {between(answer['tokens'], amount)}")
    return Group(table, *([Text(f"! {answer['extrapolates']}", style="yellow")] if answer["extrapolates"] else []))


def budget_words(budget: dict[str, Any]) -> str:
    said = [f"{budget['compute']:.3g} FLOP"]
    if budget["data"] is not None:
        said.append(f"{amount(budget['data'])} different tokens")
    if budget["nbytes"] is not None:
        said.append(format_size(budget["nbytes"]))
    if budget["served"]:
        said.append(f"{amount(budget['served'])} tokens served")
    return ", ".join(said)


def _frontier(rows: list[dict[str, float]]) -> Table:
    columns = ("FLOP", "parameters", "tokens", "loss", "interval")
    table = _table("Least loss of a budget of compute", "estimate", *columns, left=0)
    for row in rows[::8]:
        table.add_row(f"{row['compute']:.2e}", amount(row["params"]), amount(row["tokens"]), four(row["loss"]),
                      between((row["low"], row["high"]), four))
    return table


def _published(document: dict[str, Any]) -> Table:
    table = _table("Other people's laws", "estimate", "", "E", "alpha", "beta", "best N", "tokens", "bits", "loss")
    for row in document["published"]:
        values, choice = row["values"], row["choice"]
        table.add_row(row["source"].partition(" et al.")[0] + f" {row['date'][:4]}", figure(values["E"]),
                      figure(values["alpha"]), figure(values["beta"]), amount(choice["params"]), amount(choice["tokens"]),
                      figure(choice["bits"], 2), figure(choice["loss"]))
    words = budget_words(document["published_budget"])
    table.caption = (f"best for {words}; on their data with their tokens:\n"
                     "losses of two rows, or of a row and yours, do not compare")
    return table


def _trends(document: dict[str, Any]) -> Table:
    table = _table("Other people's trends", "estimate", "falls by", "a year", "interval", "source", left=1)
    table.columns[3].justify = "left"
    for row in document["trends"]:
        bounds = between(row["factor_interval"], lambda x: figure(x, 2))
        table.add_row(row["what"], f"{figure(row['factor_a_year'], 2)}x", bounds,
                      textwrap.shorten(row["source"].partition(",")[0], 24, placeholder="") + f", {row['date']}")
    table.caption = "trends are no limits: what happened on average, at the best of many laboratories"
    return table


def _list(lines: list[str]) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("-", line, style="dim")
    return [grid]
