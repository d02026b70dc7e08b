"""Quality as a table for the terminal, at most 80 columns wide."""

from __future__ import annotations

from rich.table import Table

from ..sizes import figure, format_size
from .cache import CacheQuality
from .encoders import EncoderQuality
from .scores import Quality


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
