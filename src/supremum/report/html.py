"""report.html, frontier.html, a page of scaling runs: self-contained, drawn from their documents alone.

Model names, reasons and generated text are hostile input. Jinja escapes all text, JSON in a page has no "<", and each
page's Content-Security-Policy allows the two scripts written here by their hashes and forbids every network load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..plain import plain
from ..sizes import format_size
from . import words
from .ceilings import assumptions, tables
from .charts import charts, curves
from .document import Document
from .frontier import Frontier
from .theme import Figure


def page(document: Document) -> str:
    """The page of one run."""
    return _render(
        "page.html", charts(document), d=document, headline=words.headline(document),
        verdict=words.verdict(document), facts=words.facts(document), seconds=words.seconds,
        before=format_size(document["inputs"]["bytes"]), after=format_size(document["result"]["bytes"]),
        samples=_samples(document), agreement=words.agreement(document), vouched=words.vouched(document),
        speeds=words.speeds(document), runtime=words.runtime(document), tables=tables(document["limits"]),
        assumptions=assumptions(document), origins=_origins(document),
        total=sum(phase["seconds"] for phase in document["phases"]),
        longest=max((phase["seconds"] for phase in document["phases"]), default=0) or 1)


def frontier_page(frontier: Frontier) -> str:
    """The page of several points: the curves, and a table with a link to each point's own page."""
    sizes = [row["bytes"] for row in frontier["points"]]
    figures = {"frontier": {"bits": curves(frontier["frontier"], "bits"), "size": curves(frontier["frontier"], "bytes")}}
    return _render("frontier.html", figures, d=frontier, smallest=format_size(min(sizes)), largest=format_size(max(sizes)),
                   plus_minus=words.plus_minus, proved=all(row["passed"] for row in frontier["points"]))


def scaling_page(document: dict[str, Any]) -> str:
    """The page of a ladder of training runs."""
    from .scaling import WORDS, scaling_figures

    return _render("scaling.html", scaling_figures(document), d=document, **WORDS)


def evaluation_page(document: dict[str, Any]) -> str:
    """The page of `supremum evaluate`."""
    from .evaluation import WORDS, evaluation_figures, view

    return _render("evaluation.html", evaluation_figures(document), d=view(document), **WORDS)


def _render(template: str, figures: Mapping[str, Mapping[str, Figure]], **values: Any) -> str:
    """A template with what every page holds: style, scripts, figures, and the policy that allows no others."""
    plotly, script = get_plotlyjs(), _asset("script.js")
    policy = "; ".join(("default-src 'none'", "style-src 'unsafe-inline'", "img-src data: blob:",
                        f"script-src {_hash(plotly)} {_hash(script)}", "base-uri 'none'", "form-action 'none'"))

    def chart(name: str, views: dict[str, str], label: str, wide: bool = False) -> Markup:
        return _chart(name, {view: text for view, text in views.items() if view in figures[name]}, label, wide,
                      empty=not figures[name]) if figures[name] or wide else Markup("")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset(template)).render(
        policy=policy, css=Markup(_asset("style.css")), plotly=Markup(plotly), script=Markup(script),
        figures=Markup(script_json(figures)), chart=chart,
        **{"figure": words.figure, "percent": words.percent, "size": format_size, **values})


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: without "<", ">" and "&", nothing in it ends the element."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _chart(name: str, views: dict[str, str], label: str, wide: bool, empty: bool) -> Markup:
    """The place of a chart and the switch between its views."""
    if empty:
        return Markup("<p>This model has no blocks to draw; the table has every tensor.</p>")
    switch = Markup("")
    if len(views) > 1:
        choices = Markup("").join(
            Markup('<label><input type="radio" name="view-{}" value="{}"{}>{}</label>').format(
                name, view, Markup(" checked") if index == 0 else "", text)
            for index, (view, text) in enumerate(views.items()))
        switch = Markup("<fieldset><legend>Show</legend>{}</fieldset>").format(choices)
    area = Markup('<div class="chart" data-chart="{}" role="img" aria-label="{}"></div>').format(name, label)
    return switch + (Markup('<div class="scroll" tabindex="0">{}</div>').format(area) if wide else area)


def _samples(document: Document) -> list[dict[str, Any]]:
    found = []
    for sample in document["samples"]:
        start, original, compressed = words.first_difference(sample["original"], sample["compressed"])
        found.append({"prompt": sample["prompt"], "start": start, "original": original, "compressed": compressed,
                      "same": sample["original"] == sample["compressed"]})
    return found


def _origins(document: Document) -> list[tuple[str, str]]:
    source, machine, text = document["inputs"], document["machine"], document["text"]
    return [
        ("model", f"{source['model']} ({source['format']}, {source['architecture']}, "
                  f"{source['parameters']:,} parameters)"),
        ("model fingerprint", source["fingerprint"]),
        ("calibration text", f"{text['calibration']} ({text['calibration_tokens']:,} tokens)"),
        ("held-out text", f"{text['held_out']} ({text['held_out_tokens']:,} tokens)"),
        ("text fingerprint", source["text_fingerprint"]), ("seed", str(source["seed"])),
        ("options", json.dumps(source["options"], ensure_ascii=False)),
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("machine", f"{machine['cpu']}; {machine['cores']} cores; {format_size(machine['ram_bytes'])} memory; "
                    f"{machine['os']}"),
    ]


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


__all__ = ["evaluation_page", "frontier_page", "page", "scaling_page", "script_json"]
