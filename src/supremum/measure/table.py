"""Quality as a table for the terminal, at most 80 columns wide."""

from __future__ import annotations

from rich.table import Table

from ..sizes import figure, format_size
from .cache import CacheQuality
from .encoders import EncoderQuality
from .intervals import Interval
from .scores import Quality
from .zeroshot import TaskReport


def render(quality: Quality | EncoderQuality) -> Table:
    """A table of value and standard error; print it with rich."""
    table = Table("", "value", "± s.e.", title=f"{quality.tokens:,} tokens in {quality.windows} windows", min_width=48)
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
    name = "perplexity" if quality.objective == "next" else "perplexity, unmasked"
    row(name, quality.perplexity, quality.perplexity_se)
    row("perplexity of the reference", quality.perplexity_reference, quality.perplexity_reference_se)
    row("loss above the reference, nats", quality.excess_nll, quality.excess_nll_se)
    row("KL to the reference, nats", quality.kl_mean, quality.kl_se)
    row("  median", quality.kl_median)
    row("  99th percentile", quality.kl_p99)
    row("  greatest", quality.kl_max)
    row("same most likely token", quality.same_top, quality.same_top_se, 100, " %")
    return table


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
        row(_cut(task.name), task.cases, task.acc, task.acc_reference, task.flips, task.margin_change)
        if task.acc_norm is not None:
            row("  by length", task.cases, task.acc_norm, task.acc_norm_reference, task.flips_norm, None)
    for gap in report.gaps:
        first, second = gap.groups
        table.add_row(_cut(f"{second} - {first}"), "", f"{100 * gap.acc.value:+.1f}",
                      f"{100 * gap.acc.low:.1f} - {100 * gap.acc.high:.1f}",
                      *([f"{100 * gap.acc_reference.value:+.1f}", "", "", ""] if gap.acc_reference else [""] * 4 * compared))
    return table


def _cut(name: str, width: int = 20) -> str:
    return name if len(name) <= width else name[:width - 1] + "…"
