"""Quality as a table for the terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..sizes import figure, format_size
from .cache import CacheQuality
from .details import Details
from .encoders import EncoderQuality
from .explain import Explained
from .intervals import Interval
from .perturb import AS_IT_IS
from .quality import TextQuality
from .scores import Quality
from .zeroshot import TaskReport


def render(quality: Quality | EncoderQuality, found: Details | None = None, text: str | None = None) -> Table:
    """A table of value and standard error; print it with rich. `text` names what was read, `found` adds its lines."""
    title = f"{quality.tokens:,} tokens in {quality.windows} windows"
    table = Table("", "value", "± s.e.", title=escape(f"{text}: {title}") if text else title, min_width=48)
    table.columns[1].justify = table.columns[2].justify = "right"

    def row(name: str, value: float | None, error: float | None = None, scale: float = 1.0, unit: str = "") -> None:
        if value is not None:
            table.add_row(name, f"{figure(value * scale, 4)}{unit}", "" if error is None else figure(error * scale, 4))

    if isinstance(quality, EncoderQuality):
        row("cosine similarity, mean", quality.cosine_mean, quality.cosine_se)
        row("cosine similarity, least", quality.cosine_min)
        row("relative error, mean", quality.relative_error_mean, quality.relative_error_se)
        row("relative error, greatest", quality.relative_error_max)
        return table
    sees = ", unmasked" if quality.objective == "every" else ""  # each token that it says stands before its eyes
    row(f"perplexity{sees}", quality.perplexity, quality.perplexity_se)
    row("perplexity of the reference", quality.perplexity_reference, quality.perplexity_reference_se)
    row("loss above the reference, nats", quality.excess_nll, quality.excess_nll_se)
    row("KL to the reference, nats", quality.kl_mean, quality.kl_se)
    row("  median", quality.kl_median)
    row("  99th percentile", quality.kl_p99)
    row("  greatest", quality.kl_max)
    row("same most likely token", quality.same_top, quality.same_top_se, 100, " %")
    if found is not None:
        row(f"bits a byte{sees}", found.bits_per_byte)
        row("  of the reference", found.bits_per_byte_reference)
        row("calibration error (ECE)", found.ece, None, 100, " %")
        row("  of the reference", found.ece_reference, None, 100, " %")
    return table


def render_text(one: TextQuality, *, slices: bool = False) -> list[Table | Group]:
    """A text's tables: its figures, what typos and the like do to it, with `slices` where the loss lies; then what was
    explained, a line each."""
    tables: list[Table | Group] = [render(one.quality, one.details, Path(one.text).name if one.text else None)]
    if one.details and one.perturbed:
        tables.append(_perturbed(one))
    if one.details and slices:
        tables += [_slices(one.details), *([_changed(one.details)] if one.details.most_changed else [])]
    if one.explained:
        tables.append(Group(*(Text(f"{'' if each.kl is None else f'KL {figure(each.kl)}: '}{answered(each)}; weighed most: "
                                   f"{weighed(each)}") for each in one.explained)))
    return tables


def answered(one: Explained) -> str:
    """The right answer and what was said, by both models where there are two."""
    said = [("right", one.true), *([("original", one.reference.top), ("now", one.model.top)] if one.reference else
                                   [("said", one.model.top)])]
    return ", ".join(f"{name} '{one_line(text)}'" for name, text in said)


def weighed(one: Explained) -> str:
    """The three parts that weigh most for or against the answer, for each model, with their shares of its log p."""
    sides = []
    for name, side in (("original", one.reference), ("now", one.model)):
        if side is not None:
            best = sorted(range(len(side.shares)), key=lambda place: -abs(side.shares[place]))[:3]
            said = ", ".join(f"{one_line(one.tokens[place].strip(), 20)} {side.shares[place]:+.2f}" for place in best)
            sides.append(f"{name} {said}" if one.reference else said)
    return "; ".join(sides)


def one_line(text: str, width: int = 40) -> str:
    """`text` without line ends and control characters, at most `width` letters."""
    return _cut(repr(text)[1:-1], width)


def _perturbed(one: TextQuality) -> Table:
    table = Table("text", "bits a byte", "original", "KL", "same token", title="robustness", min_width=48)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in {AS_IT_IS: one, **one.perturbed}.items():
        quality, found = each.quality, each.details
        if isinstance(quality, Quality) and found is not None:
            same = "" if quality.same_top is None else f"{100 * quality.same_top:.1f} %"
            table.add_row(name, figure(found.bits_per_byte, 4), _or_blank(found.bits_per_byte_reference, 4),
                          _or_blank(quality.kl_mean), same)
    return table


def _slices(found: Details) -> Table:
    table = Table("tokens", "share", "nll", "+ nll", "KL", "95 %", "same", title="slice by slice")
    for column in table.columns[1:]:
        column.justify = "right"
    for rows in found.slices.values():
        table.add_section()
        for one in rows:
            interval = "" if one.interval is None else f"{figure(one.interval.low, 2)} - {figure(one.interval.high, 2)}"
            table.add_row(one.name, f"{100 * one.share:.1f} %", figure(one.nll),
                          _or_blank(one.excess_nll), _or_blank(one.kl), interval,
                          "" if one.same_top is None else f"{100 * one.same_top:.0f} %")
    return table


def _changed(found: Details) -> Table:
    table = Table("before", "token", "original", "now", "KL", title="tokens that changed most")
    for one in found.most_changed:
        words = [_cut(repr(text)[1:-1], 12) for text in (one.token, one.reference, one.model)]
        table.add_row(escape(_tail(repr(one.before)[1:-1], 24)), *map(escape, words), figure(one.kl))
    return table


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width:]


def _or_blank(value: float | None, digits: int = 3) -> str:
    return "" if value is None else figure(value, digits)


def render_cache(found: CacheQuality) -> Table:
    """A table of the quantised cache beside the exact one (16 bits, or as the model computes); print it with rich."""
    table = Table("", f"{found.keys} / {found.values}", "exact", min_width=48,
                  title=f"cache (keys / values), {found.positions:,} positions, {found.runtime}")
    table.columns[1].justify = table.columns[2].justify = "right"
    error = "" if found.kl_se is None else f" ± {figure(found.kl_se, 2)}"
    table.add_row("KL to the exact cache, nats", figure(found.kl_mean) + error, "0")
    table.add_row("same most likely token", f"{100 * found.same_top:.1f} %", "100 %")
    table.add_row("perplexity", figure(found.perplexity, 4), figure(found.perplexity_exact, 4))
    if found.kl_reference is not None:
        table.add_row("KL to the reference, nats", figure(found.kl_reference), figure(found.kl_reference_exact))
    table.add_row(f"bytes at {found.context:,} tokens", format_size(found.bytes), format_size(found.bytes_exact))
    return table


def render_tasks(report: TaskReport) -> Table:
    """Accuracy with intervals; beside a reference its own, the flips (- lost, + gained), McNemar's p, the margin's change."""
    compared = any(task.acc_reference is not None for task in report.tasks)
    table = Table("task", "cases", "%", "95 %", title="zero-shot accuracy")
    if compared:
        for name in ("original", "flips", "p", "margin"):
            table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, cases: int, acc: Interval, reference: Interval | None, flips: dict[str, float] | None,
            margin: Interval | None) -> None:
        beside = [] if not compared else ["", "", "", ""] if reference is None or flips is None else [
            f"{100 * reference.value:.1f}", f"-{flips['lost']} +{flips['gained']}", figure(flips["p"], 2),
            f"{margin.value:+.2f}" if margin else ""]
        table.add_row(name, f"{cases:,}", f"{100 * acc.value:.1f}", f"{100 * acc.low:.1f} - {100 * acc.high:.1f}", *beside)

    for task in report.tasks:
        row(escape(_cut(task.name)), task.cases, task.acc, task.acc_reference, task.flips, task.margin_change)
        if task.acc_norm is not None:
            row("  by length", task.cases, task.acc_norm, task.acc_norm_reference, task.flips_norm, None)
    for gap in report.gaps:
        first, second = gap.groups
        before = f"{100 * gap.acc_reference.value:+.1f}" if gap.acc_reference else ""
        table.add_row(escape(f"{_cut(gap.name)}: {_cut(f'{second} - {first}')}"), "", f"{100 * gap.acc.value:+.1f}",
                      f"{100 * gap.acc.low:.1f} - {100 * gap.acc.high:.1f}",
                      *([before, "", _or_blank(gap.acc.p, 2), ""] if compared else []))
    return table


def render_harness(rows: Sequence[dict[str, Any]]) -> Table:
    """The harness's metrics with its standard errors; beside a reference its value, the flips and McNemar's p."""
    compared = any("reference" in row for row in rows)
    table = Table("task", "metric", "value", "± s.e.", *(["original", "flips", "p"] if compared else []),
                  title="lm-evaluation-harness")
    for row in rows:
        flips = [f"-{row['lost']} +{row['gained']}", figure(row["p"], 2)] if "p" in row else ["", ""]
        beside = [figure(row["reference"], 4), *flips] if compared else []
        table.add_row(escape(_cut(row["task"])), escape(_cut(row["metric"], 16)), figure(row["value"], 4),
                      _or_blank(row["stderr"], 2), *beside)
    return table


def _cut(name: str, width: int = 20) -> str:
    return name if len(name) <= width else name[:width - 1] + "…"
