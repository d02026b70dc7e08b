"""The report's charts as Plotly figures in plain data; colours are theme tokens that the page's script resolves.

"var(--x)" is a colour of the style sheet, "heat(t)" the point t (0..1) of its sequential scale: few bits to many.
Every text that comes from the document is escaped, since Plotly reads its labels as HTML.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from ..sizes import format_size
from .ceilings import speed
from .document import Document, Layer, Point
from .theme import GRID, Figure, layout
from .words import figure, percent

MB = 1e-6  # of a byte
SAME_BITS = 0.1  # a weight: layers nearer to each other are of one colour, about
HEAT = [[0, "heat(0)"], [0.25, "heat(0.25)"], [0.5, "heat(0.5)"], [0.75, "heat(0.75)"], [1, "heat(1)"]]
STYLES: dict[str, dict[str, Any]] = {
    "limit": {"name": "limit", "mode": "lines", "line": {"color": "var(--limit)", "width": 2.5}},
    "predicted": {"name": "predicted", "mode": "lines+markers", "line": {"color": "var(--predicted)", "dash": "dot"},
                  "marker": {"symbol": "circle-open", "size": 9, "color": "var(--predicted)"}},
    "measured": {"name": "measured", "mode": "markers",
                 "marker": {"symbol": "circle", "size": 9, "color": "var(--measured)"}},
}


def charts(document: Document) -> dict[str, dict[str, Figure]]:
    """{chart: {view: figure}}; views are alternatives that the reader switches between."""
    found: dict[str, dict[str, Figure | None]] = {
        "frontier": {"size": frontier(document, "bytes"), "bits": frontier(document, "bits")},
        "layers": {view: layers(document["plan"], view) for view in ("bits", "damage", "gap")},
        "bytes": {"bytes": where_bytes_went(document)},
        "speed": {phase: speed(document, phase) for phase in ("decode", "prefill")},
    }
    return {name: {view: fig for view, fig in views.items() if fig} for name, views in found.items()}


def frontier(document: Document, axis: str) -> Figure:
    """KL (log) against bits or megabytes: limit, prediction, measurements, the file itself and its gap to the limit."""
    result = document["result"]
    kl = result["measured"]["kl_mean"]
    here = {"x": result["bytes"] * MB if axis == "bytes" else result["bits_per_weight"], "y": kl or 0.0}
    figure_ = curves(document["frontier"], axis, [here])
    figure_["data"].append({
        "type": "scatter", "mode": "markers", "name": "this file", "x": [here["x"]], "y": [kl],
        "marker": {"symbol": "star", "size": 18, "color": "var(--accent)", "line": {"color": "var(--paper)", "width": 1.5}},
        "error_y": {"type": "constant", "value": 2 * (result["measured"]["kl_se"] or 0), "color": "var(--accent)"},
        "hovertemplate": f"this file<br>{html.escape(format_size(result['bytes']))}, "
                         f"{figure(result['bits_per_weight'])} bits<br>KL %{{y:.3~g}}<extra></extra>"})
    limit = [p for p in document["frontier"] if p["kind"] == "limit" and _place(axis, p) is not None and p["kl"] > 0]
    _mark_gap(figure_["layout"], here, limit, partial(_place, axis), result["gap_bits"])
    return figure_


def curves(points: Sequence[Point], axis: str, also: Sequence[dict[str, float]] = ()) -> Figure:
    """Limit, prediction and measurements of `points`, KL (log) against `axis`, "bits" or "bytes" (in MB). also: further
    points that must lie within the frame."""
    place = partial(_place, axis)
    points = [p for p in points if place(p) is not None and p["kl"] > 0]
    data: list[Figure] = []
    for kind, style in STYLES.items():
        chosen = sorted((p for p in points if p["kind"] == kind), key=lambda p: place(p) or 0.0)
        if chosen:
            data.append({**style, "type": "scatter", "x": [place(p) for p in chosen], "y": [p["kl"] for p in chosen],
                         "text": [html.escape(p["label"]) for p in chosen],
                         "hovertemplate": "%{text}<br>%{x:.3~f} " + ("MB" if axis == "bytes" else "bits a weight") +
                                          "<br>KL %{y:.3~g}<extra></extra>"})
            if kind == "limit":
                data[-1].update(fill="tozeroy", fillcolor="var(--impossible)")
    others = [p for p in points if p["kind"] != "limit"]
    xs = [x for x in (place(p) for p in others) if x is not None] + [here["x"] for here in also]
    ys = [p["kl"] for p in others] + [here["y"] for here in also if here["y"] > 0]
    margin = 0.08 * (max(xs) - min(xs)) + 0.03 * max(xs)
    frame = layout(
        xaxis={"title": {"text": "size of the file, MB" if axis == "bytes" else "bits a weight"},
               "range": [min(xs) - 2 * margin, max(xs) + margin], **GRID},
        yaxis={"title": {"text": "KL from the original, nats a token"}, "type": "log", "dtick": 1, "exponentformat": "power",
               "range": [math.log10(min(ys) / 12), math.log10(max(ys) * 2)] if ys else None, **GRID},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hovermode="closest", annotations=[
            {"xref": "paper", "yref": "paper", "x": 0.01, "y": 0.03, "xanchor": "left", "yanchor": "bottom",
             "text": "no code of these weights lies here", "showarrow": False,
             "font": {"color": "var(--soft)", "size": 12}}] if any(p["kind"] == "limit" for p in points) else [])
    return {"data": data, "layout": frame}


def _place(axis: str, point: Any) -> float | None:
    """Where a point lies on the axis."""
    return None if point[axis] is None else point[axis] * (MB if axis == "bytes" else 1.0)


def _mark_gap(frame: Figure, here: dict[str, float], limit: list[Point], place: Any, gap: float | None) -> None:
    """A dotted line from the file to the limit at the same KL, with the gap in bits written on it."""
    ordered = sorted(limit, key=lambda p: -p["kl"])
    if gap is None or here["y"] <= 0:
        return
    for above, below in pairwise(ordered):
        if above["kl"] >= here["y"] > below["kl"]:
            part = math.log(above["kl"] / here["y"]) / math.log(above["kl"] / below["kl"])
            at = place(above) + part * (place(below) - place(above))
            frame["shapes"] = [{"type": "line", "x0": at, "x1": here["x"], "y0": here["y"], "y1": here["y"],
                                 "line": {"color": "var(--accent)", "width": 1.5, "dash": "dot"}}]
            frame["annotations"].append({
                "x": at, "y": math.log10(here["y"]), "yshift": 18, "showarrow": False,
                "text": f"gap {gap:.2f} bits", "xanchor": "left", "font": {"color": "var(--accent)", "size": 13}})
            return


def layers(plan: list[Layer], view: str) -> Figure | None:
    """A grid of blocks and projections, coloured by bits a weight, share of the damage, or gap; None without values."""
    cells = {}
    for layer in plan:
        block, projection = place_of(layer["name"])
        if block is not None:
            cells[projection, block] = layer
    rows = list(dict.fromkeys(projection for projection, _ in cells))
    columns = sorted({block for _, block in cells})

    def value(layer: Layer) -> float | None:
        return {"bits": layer["bits_per_weight"], "damage": 100 * layer["share"], "gap": layer["gap_bits"]}[view]

    z = [[value(cells[row, col]) if (row, col) in cells else None for col in columns] for row in rows]
    found = [v for line in z for v in line if v is not None]
    if not found:
        return None
    title, digits = {"bits": ("bits", ".3~g"), "damage": ("%", ".2~f"), "gap": ("bits", ".2~f")}[view]
    heat = {
        "type": "heatmap", "z": z, "x": columns, "y": [html.escape(row) for row in rows], "xgap": 1.5, "ygap": 1.5,
        "colorscale": HEAT, "texttemplate": f"%{{z:{digits}}}" if len(columns) <= 40 else "",
        "textfont": {"size": 10}, "customdata": [[_hover(cells.get((row, col))) for col in columns] for row in rows],
        "hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False,
        "colorbar": {"title": {"text": title, "side": "top"}, "thickness": 10, "outlinewidth": 0, "len": 1},
    }
    if view == "bits" and max(found) - min(found) < SAME_BITS:
        middle = (max(found) + min(found)) / 2
        heat |= {"zmin": middle - SAME_BITS, "zmax": middle + SAME_BITS}
    frame = layout(xaxis={"title": {"text": "block"}, "dtick": 1 if len(columns) <= 40 else 5, "showgrid": False,
                            "zeroline": False},
                     yaxis={"autorange": "reversed", "showgrid": False, "zeroline": False, "automargin": True},
                     height=110 + 38 * len(rows))
    return {"data": [heat], "layout": frame}


def where_bytes_went(document: Document) -> Figure:
    """Megabytes by kind of tensor, stacked by codec; the remainder is what is not in the plan."""
    amounts: dict[str, dict[str, int]] = {}
    weights: dict[str, int] = {}
    for layer in document["plan"]:
        kind = place_of(layer["name"])[1]
        amounts.setdefault(kind, {}).setdefault(layer["codec"], 0)
        amounts[kind][layer["codec"]] += layer["bytes"]
        weights[layer["codec"]] = weights.get(layer["codec"], 0) + math.prod(layer["shape"])
    rates = {codec: 8 * sum(those.get(codec, 0) for those in amounts.values()) / max(1, count)
             for codec, count in weights.items()}
    kinds = sorted(amounts, key=lambda kind: sum(amounts[kind].values()))
    low, high = min(rates.values(), default=0.0), max(rates.values(), default=1.0)
    data: list[Figure] = []
    for codec in sorted(rates, key=lambda name: rates[name]):
        heat = (rates[codec] - low) / (high - low) if high > low else 0.5
        data.append(_bar(f"{codec} ({figure(rates[codec])} bits)", kinds, [amounts[k].get(codec, 0) for k in kinds],
                         f"heat({heat:.3f})"))
    rest = document["result"]["bytes"] - sum(layer["bytes"] for layer in document["plan"])
    if rest > 0:
        data.append(_bar("kept as it was", ["norms, tokenizer, metadata"], [rest], "var(--baseline)"))
    frame = layout(barmode="stack", xaxis={"title": {"text": "MB"}, **GRID}, height=150 + 30 * (len(kinds) + 1),
                     yaxis={"automargin": True, "showgrid": False},
                     legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"})
    return {"data": data, "layout": frame}


def place_of(name: str) -> tuple[int | None, str]:
    """(block, projection) of a tensor: "model.layers.3.mlp.up_proj.weight" is (3, "mlp.up_proj"); no block: None."""
    stem = name.removesuffix(".weight")
    match = re.match(r"(?:.*?\.)??(\d+)\.(.+)", stem)
    return (int(match.group(1)), match.group(2)) if match else (None, stem.rpartition(".")[2])


def _bar(name: str, kinds: list[str], sizes: list[int], colour: str) -> Figure:
    return {"type": "bar", "orientation": "h", "name": html.escape(name), "y": [html.escape(kind) for kind in kinds],
            "x": [size / 1e6 for size in sizes], "marker": {"color": colour},
            "hovertemplate": "%{y}<br>%{x:.2f} MB<extra>%{fullData.name}</extra>"}


def _hover(layer: Layer | None) -> str:
    if layer is None:
        return ""
    limit = "" if layer["limit_bits"] is None else f", the limit would spend {figure(layer['limit_bits'])}"
    lines = (f"<b>{html.escape(layer['name'])}</b>",
             f"{html.escape(layer['codec'])}: {figure(layer['bits_per_weight'])} bits{limit}",
             f"{format_size(layer['bytes'])}, {percent(layer['share'], 2)} of the damage", html.escape(layer["reason"]))
    return "<br>".join(lines)

