"""The page of `supremum evaluate`, drawn from its document alone: quality, a tuned model's task, zero-shot tasks, slices,
changed tokens and explanations."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plain import plain
from ..sizes import UNKNOWN, cells, figure
from ..workspace import write_atomic
from .theme import GRID, Figure, layout
from .words import percent, plus_minus

AS_IT_IS = "as it is"  # measure/perturb.py, which a page need not load

LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
SIDES = (("reference", "original"), ("model", "this model"))
ROW = 34  # pixels of a task or a slice


def write_evaluation(document: dict[str, Any], path: Path) -> None:
    """The page of the document that `supremum evaluate --json` prints."""
    from .html import evaluation_page

    write_atomic(path, evaluation_page(plain(document)).encode())


def view(document: dict[str, Any]) -> dict[str, Any]:
    """The document with every part that it may lack, each text with a name, each row of figures in words."""
    texts = [{**text, "name": Path(text["text"]).name if text["text"] else "what the model writes", "rows": _rows(text)}
             for text in document.get("texts", [])]
    return {"model": document["model"], "reference": document["reference"], "texts": texts,
            "verdict": _verdict(texts) or _task_verdict(document), "task": _task(document.get("task")),
            "tasks": document.get("tasks", []), "gaps": document.get("gaps", []), "harness": document.get("harness", [])}


def _verdict(texts: Sequence[dict[str, Any]]) -> str:
    first = texts[0]["quality"] if texts else {}
    if first.get("kl_mean") is not None:
        return (f"KL {plus_minus(first['kl_mean'], first['kl_se'])} nats a token from the original, the same most likely "
                f"token in {percent(first['same_top'])} ({texts[0]['name']}).")
    if first.get("perplexity") is not None:
        return f"Perplexity {plus_minus(first['perplexity'], first['perplexity_se'])} ({texts[0]['name']})."
    return ""


def _task(task: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tuned model's task, its figures in words."""
    if task is None:
        return None
    whole, metric = task["scored"], task["metric"]
    each = {AS_IT_IS: whole, **task["perturbed"]}
    return {**task, **whole, "figures": [{"name": name, "cells": cells(one)} for name, one in whole["figures"].items()],
            "labels": [{**one, "cells": cells(one["f1"])} for one in whole["labels"]],
            "perturbed": [{"name": name, "cells": cells(one["figures"][metric])} for name, one in each.items()]
            if task["perturbed"] else []}


def _task_verdict(document: dict[str, Any]) -> str:
    task = document.get("task")
    if not task:
        return ""
    said = cells(task["scored"]["figures"][task["metric"]])
    original = f", the original {said[2]}: {said[3]} ({said[4]})" if len(said) > 2 else ""
    return f"{task['metric']} {said[0]} ({said[1]}) on {task['rows']:,} test rows{original}."


def _rows(text: dict[str, Any]) -> list[dict[str, str]]:
    """The text as it is, then disturbed."""
    found = []
    for name, one in {AS_IT_IS: text, **text["perturbed"]}.items():
        quality, details = one["quality"], one["details"] or {}
        if "perplexity" not in quality:  # an encoder without a head
            return [{"name": name, "cosine": plus_minus(quality["cosine_mean"], quality["cosine_se"]),
                     "error": plus_minus(quality["relative_error_mean"], quality["relative_error_se"])}]
        found.append({
            "name": name, "perplexity": plus_minus(quality["perplexity"], quality["perplexity_se"]),
            "original": plus_minus(quality["perplexity_reference"], quality["perplexity_reference_se"]),
            "kl": plus_minus(quality["kl_mean"], quality["kl_se"]), "same": percent(quality["same_top"]),
            "bits": _beside(details, "bits_per_byte", lambda value: figure(value, 4)),
            "ece": _beside(details, "ece", percent)})
    return found


def _beside(details: dict[str, Any], name: str, say: Any) -> str:
    """"0.981 (0.975)": this model's and the original's."""
    value, other = details.get(name), details.get(f"{name}_reference")
    return UNKNOWN if value is None else say(value) + (f" ({say(other)})" if other is not None else "")


def evaluation_figures(document: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """{chart: {view: figure}}, as in `charts`."""
    shown = view(document)
    found: dict[str, dict[str, Figure]] = {"tasks": {"tasks": tasks(shown["tasks"])} if shown["tasks"] else {}}
    if task := document.get("task"):
        found["task"] = {"task": robustness(task)}
        found |= {f"attentiontask-{place}": {f"v{index}": looks(one["explained"], block)
                                             for index, block in enumerate(blocks(one["explained"]))}
                  for place, one in enumerate(task["explained"])}
    for number, text in enumerate(shown["texts"]):
        parts = (text["details"] or {}).get("slices", {})
        found[f"slices{number}"] = {name: slices(rows) for name, rows in parts.items() if rows}
        for place, one in enumerate(text["explained"]):
            found[f"attention{number}-{place}"] = {f"v{index}": looks(one, block) for index, block in enumerate(blocks(one))}
    return found


def tasks(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy with its interval, this model's below the original's, and what guessing gives."""
    names = [html.escape(row["name"], quote=False) for row in rows]
    data = []
    for key, name, colour, symbol in (("acc_reference", "original", "var(--baseline)", "circle-open"),
                                      ("acc", "this model", "var(--measured)", "circle")):
        chosen = [(label, row[key]) for label, row in zip(names, rows, strict=True) if row[key]]
        if chosen:
            data.append(_dots(chosen, name, colour, symbol, 100))
    guess = {"type": "scatter", "orientation": "h", "mode": "markers", "name": "guessing", "y": names,
             "x": [100 * row["chance"] for row in rows], "hovertemplate": "guessing %{x:.1f} %<extra></extra>",
             "marker": {"symbol": "line-ns-open", "size": 14, "color": "var(--soft)"}}
    return {"data": [*data, guess], "layout": _rows_layout(len(names), "accuracy, %, 95 % interval", scattermode="group")}


def robustness(task: dict[str, Any]) -> Figure:
    """The task's metric of both models, rows as they are and disturbed."""
    rows = [(name, one["figures"][task["metric"]])
            for name, one in {AS_IT_IS: task["scored"], **task["perturbed"]}.items()]
    data = [_dots([(name, one[key]) for name, one in rows], side, colour, symbol, 1)
            for key, side, colour, symbol in (("reference", "original", "var(--baseline)", "circle-open"),
                                              ("value", "this model", "var(--measured)", "circle")) if rows[0][1][key]]
    return {"data": data, "layout": _rows_layout(len(rows), f"{task['metric']}, 95 % interval", scattermode="group")}


def slices(rows: Sequence[dict[str, Any]]) -> Figure:
    """KL of each kind of token with its interval; nll where there is no original."""
    key = "kl" if rows[0]["kl"] is not None else "nll"
    chosen = [(f"{html.escape(row['name'])} ({100 * row['share']:.0f} %)",
               {"value": row[key], **({"low": row["interval"]["low"], "high": row["interval"]["high"]} if row["interval"] else
                                      {"low": row[key], "high": row[key]})}) for row in rows]
    title = "KL to the original, nats a token" if key == "kl" else "nll, nats a token"
    return {"data": [_dots(chosen, title, "var(--measured)", "circle", 1)],
            "layout": _rows_layout(len(chosen), title, showlegend=False)}


def _dots(rows: Sequence[tuple[str, dict[str, Any]]], name: str, colour: str, symbol: str, scale: float) -> Figure:
    values = [(label, scale * one["value"], scale * one["low"], scale * one["high"]) for label, one in rows]
    return {"type": "scatter", "orientation": "h", "mode": "markers", "name": name, "y": [label for label, *_ in values],
            "x": [value for _, value, _, _ in values], "marker": {"color": colour, "symbol": symbol, "size": 10},
            "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 1.5,
                        "array": [high - value for _, value, _, high in values],
                        "arrayminus": [value - low for _, value, low, _ in values]},
            "hovertemplate": f"{name} %{{x:.3~g}}<extra></extra>"}


def _rows_layout(rows: int, title: str, **more: Any) -> Figure:
    return layout(xaxis={"title": {"text": title}, **GRID, "rangemode": "tozero"},
                  yaxis={"autorange": "reversed", "automargin": True, "type": "category", **GRID}, legend=LEGEND,
                  hovermode="closest", height=130 + ROW * rows, **more)


def sides(one: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, what it makes of the answer): the original, where there is one, and this model."""
    return [(name, one[key]) for key, name in SIDES if one[key] is not None]


def blocks(one: dict[str, Any]) -> list[str]:
    """Blocks whose attention every side gave."""
    return [name for name in one["model"]["attention"] if all(name in side["attention"] for _, side in sides(one))]


def looks(one: dict[str, Any], block: str) -> Figure:
    """Who reads whom, every side by itself. The first token, where most of the weight rests, does not set the scale."""
    labels = [f"{index + 1} {html.escape(token.strip() or '␣', quote=False)}" for index, token in enumerate(one["tokens"])]
    both = sides(one)
    most = max((value for _, side in both for row in side["attention"][block] for value in row[1:]), default=1.0)
    small = {"type": "category", "showgrid": False, "zeroline": False, "tickfont": {"size": 9}, "dtick": 1,
             "automargin": True}
    axes = {"xaxis": {**small, "domain": [0, 0.48], "tickangle": -90}, "yaxis": {**small, "autorange": "reversed"},
            "xaxis2": {**small, "domain": [0.52, 1], "tickangle": -90},
            "yaxis2": {**small, "autorange": "reversed", "matches": "y", "showticklabels": False, "anchor": "x2"}}
    data, titles = [], []
    for number, (name, side) in enumerate(both, 1):
        maps = side["attention"][block]
        shown = [[value if column <= row or maps[0][-1] > 0 else None for column, value in enumerate(values)]
                 for row, values in enumerate(maps)]
        last = number == len(both)
        data.append({"type": "heatmap", "z": shown, "x": labels, "y": labels, "zmin": 0, "zmax": most, "xaxis": f"x{number}",
                     "yaxis": f"y{number}", "colorscale": [[0, "heat(0)"], [0.5, "heat(0.5)"], [1, "heat(1)"]],
                     "showscale": last, "colorbar": {"title": {"text": "weight"}, "thickness": 12, "outlinewidth": 0},
                     "hovertemplate": f"{name}<br>%{{y}} reads %{{x}}<br>%{{z:.3f}}<extra></extra>"})
        titles.append({"text": name, "x": (0.24, 0.76)[number - 1], "y": 1.02, "xref": "paper", "yref": "paper",
                       "xanchor": "center", "yanchor": "bottom", "showarrow": False})
    used = {key: axis for key, axis in axes.items() if len(both) == 2 or not key.endswith("2")}
    return {"data": data, "layout": layout(**used, annotations=titles, height=560)}


def strengths(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Each side's tokens with their share of log p and how strongly they are coloured (percent of the greatest of all)."""
    most = max((abs(share) for _, side in sides(one) for share in side["shares"]), default=0.0) or 1.0
    return [{"name": name, **side, "tokens": [
        {"text": token.replace("\n", "↵\n"), "share": share, "strength": round(100 * abs(share) / most), "up": share > 0}
        for token, share in zip(one["tokens"], side["shares"], strict=True)]} for name, side in sides(one)]


def sureness(why: dict[str, Any]) -> str:
    """"its probability 0.412, change -0.5": how sure this model is of the answer that is explained."""
    what = "its probability" if why["unit"] == "probability" else f"its log p, {why['unit']},"
    change = "" if why["change"] is None else f", change {why['change']:+.2g}"
    return f"{what} {why['sure']:.3g}{change}"


WORDS = {"plus_minus": plus_minus, "strengths": strengths, "blocks": blocks, "sureness": sureness}
