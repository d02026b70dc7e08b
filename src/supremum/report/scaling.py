"""The page of a ladder of runs: the fit, what it forecasts, the least loss of compute; drawn from its document alone."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ..limits.scaling_page import amount, between, budget_words
from ..sizes import figure, format_size
from ..workspace import write_atomic
from .theme import GRID, Figure, layout

LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
YEARS = 3  # that a trend is drawn beyond its source
LOSS = {"title": {"text": "loss, nats a token"}, **GRID}


def write_scaling(document: dict[str, Any], path: Path) -> None:
    """The page of `statistical_limit`'s document."""
    from .html import scaling_page

    write_atomic(path, scaling_page(document).encode())


def scaling_figures(document: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """{chart: {view: figure}}, as in `charts`."""
    found = {"runs": {"params": by_params(document)}, "draws": {"draws": exponents(document)}}
    found["trends"] = {row["what"]: trend(row) for row in document["trends"]}
    found["frontier"] = {"frontier": by_compute(document)} if document["frontier"] else {}
    return found


def by_params(document: dict[str, Any]) -> Figure:
    """Loss against parameters: the runs, the law at each of their tokens, and what was forecast."""
    curves, data = document["fits"], []
    for index, curve in enumerate(curves):
        colour = f"heat({0.25 + 0.75 * index / max(1, len(curves) - 1):.3f})"
        name = f"{amount(curve['tokens'])} tokens"
        data.append({"type": "scatter", "mode": "lines", "x": curve["params"], "y": curve["loss"], "legendgroup": name,
                     "name": name, "line": {"color": colour, "width": 1.5}, "hoverinfo": "skip"})
        runs = [run for run in document["runs"] if run["tokens"] == curve["tokens"]]
        data.append(_points(runs, name, colour, "circle", showlegend=False))
    rows = [*document["predictions"], *document["held_out"]]
    if rows:
        data.append({"type": "scatter", "mode": "markers", "name": "predicted, with interval",
                     "x": [r["params"] for r in rows], "y": [r["loss"] for r in rows],
                     "text": [html.escape(r["name"] or "to be run") for r in rows],
                     "marker": {"symbol": "circle-open", "size": 11, "color": "var(--predicted)"},
                     "error_y": {"type": "data", "symmetric": False, "array": [_gap(r, "high") for r in rows],
                                 "arrayminus": [_gap(r, "low") for r in rows], "color": "var(--predicted)"},
                     "hovertemplate": "%{text}<br>predicted %{y:.4~g}<extra></extra>"})
    if document["held_out"]:
        held = [{**row, "loss": row["measured"]} for row in document["held_out"]]
        data.append(_points(held, "measured afterwards", "var(--accent)", "star"))
    return {"data": data, "layout": layout(xaxis={"title": {"text": "parameters"}, "type": "log", **GRID},
                                           yaxis=LOSS, legend=LEGEND, hovermode="closest")}


def by_compute(document: dict[str, Any]) -> Figure:
    """The least loss of a budget of compute with its interval, the runs above it, and the budget's answer."""
    rows = document["frontier"]
    x, flops = [row["compute"] for row in rows], document["flops"]
    line = {"type": "scatter", "mode": "lines", "x": x}
    data: list[Figure] = [
        {**line, "y": [row["high"] for row in rows], "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"},
        {**line, "y": [row["low"] for row in rows], "line": {"width": 0}, "fill": "tonexty", "fillcolor": "var(--impossible)",
         "name": f"{100 * document['level']:.0f} % interval", "hoverinfo": "skip"},
        {**line, "y": [row["loss"] for row in rows], "name": "least loss", "line": {"color": "var(--limit)", "width": 2.5},
         "text": [f"{amount(row['params'])} parameters, {amount(row['tokens'])} tokens" for row in rows],
         "hovertemplate": "%{x:.3~g} FLOP<br>loss %{y:.4~g}<br>%{text}<extra></extra>"}]
    runs = [{**run, "params": flops * run["params"] * run["tokens"]} for run in document["runs"]]
    data.append(_points(runs, "runs", "var(--measured)", "circle"))
    if answer := document["best"]:
        choice = answer["choice"]
        data.append({"type": "scatter", "mode": "markers", "name": "the budget's best", "x": [answer["budget"]["compute"]],
                     "y": [choice["loss"]], "marker": {"symbol": "star", "size": 16, "color": "var(--accent)"},
                     "hovertemplate": f"{amount(choice['params'])} parameters, {amount(choice['tokens'])} tokens<br>"
                                      "loss %{y:.4~g}<extra></extra>"})
    return {"data": data, "layout": layout(xaxis={"title": {"text": "FLOP of training"}, "type": "log", **GRID},
                                           yaxis=LOSS, legend=LEGEND, hovermode="closest")}


def trend(row: dict[str, Any]) -> Figure:
    """What is still needed in the years after the source, if its trend went on: factor^-years, with its interval."""
    years = [step / 4 for step in range(4 * YEARS + 1)]
    line = {"type": "scatter", "mode": "lines", "x": years}
    edge = {**line, "line": {"width": 0}, "hoverinfo": "skip"}
    said = html.escape(f"{row['source'].split(',')[0]}, {row['date']}", quote=False)
    data: list[Figure] = []
    if row["factor_interval"]:
        slow, fast = row["factor_interval"]
        data += [{**edge, "y": [slow**-year for year in years], "showlegend": False},
                 {**edge, "y": [fast**-year for year in years], "fill": "tonexty", "fillcolor": "var(--impossible)",
                  "name": "the source's interval"}]
    data.append({**line, "y": [row["factor_a_year"] ** -year for year in years],
                 "line": {"color": "var(--predicted)", "dash": "dot"}, "name": said,
                 "hovertemplate": "after %{x:.2f} years<br>%{y:.3~g} of it<extra></extra>"})
    return {"data": data, "layout": layout(
        xaxis={"title": {"text": f"years after {row['date']}, if it went on"}, **GRID},
        yaxis={"title": {"text": "share still needed"}, "type": "log", "dtick": 1, "exponentformat": "power", **GRID},
        legend=LEGEND, hovermode="closest", height=380)}


def exponents(document: dict[str, Any]) -> Figure:
    """alpha and beta of the runs drawn again: a small cloud is known, a long one is not."""
    law, draws = document["law"], document["draws"]
    cloud = {"type": "scatter", "mode": "markers", "name": "runs drawn again", "x": [a for a, _ in draws],
             "y": [b for _, b in draws], "marker": {"size": 5, "color": "var(--predicted)", "opacity": 0.5},
             "hovertemplate": "alpha %{x:.3f}, beta %{y:.3f}<extra></extra>"}
    star = {**cloud, "name": "all runs", "x": [law["alpha"]], "y": [law["beta"]],
            "marker": {"symbol": "star", "size": 16, "color": "var(--accent)"}}
    return {"data": [cloud, star], "layout": layout(
        xaxis={"title": {"text": "alpha, of parameters"}, **GRID}, yaxis={"title": {"text": "beta, of tokens"}, **GRID},
        legend=LEGEND, hovermode="closest", height=380)}


def _points(runs: list[dict[str, Any]], name: str, colour: str, symbol: str, **more: Any) -> Figure:
    return {"type": "scatter", "mode": "markers", "name": name, "legendgroup": name, "x": [run["params"] for run in runs],
            "y": [run["loss"] for run in runs], "marker": {"symbol": symbol, "size": 9, "color": colour},
            "text": [html.escape(run["name"] or "run") for run in runs],
            "hovertemplate": "%{text}<br>loss %{y:.4~g}<extra></extra>", **more}


def _gap(row: dict[str, Any], end: str) -> float | None:
    return None if row[end] is None else abs(row[end] - row["loss"])


WORDS = {"amount": amount, "between": between, "budget_words": budget_words, "figure": figure, "size": format_size}
