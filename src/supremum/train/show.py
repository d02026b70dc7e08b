"""The table that ends a run of `tune`."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .tune import Tuned


def render(done: Tuned, name: str = "") -> Any:
    """Metric with its interval, for the tuned model and what it had to beat; then what it cost."""
    grid = Table(title=f"{name or done.task}: {done.model}, {done.way}, {done.rows['test']} test rows", title_justify="left")
    for name in ("", done.metric, "95 %", "tuned is ahead by", "95 %"):
        grid.add_column(name, justify="left" if not name else "right")
    for line in done.lines:
        metric, ahead = line.metric, line.ahead
        grid.add_row(line.name, f"{metric.value:.4g}", f"{metric.low:.4g} to {metric.high:.4g}",
                     f"{ahead.value:+.4g}" if ahead else "", f"{ahead.low:+.4g} to {ahead.high:+.4g}" if ahead else "")
    share = 100 * done.trained / done.parameters
    more = [f"trained {done.trained:,} of {done.parameters:,} parameters ({share:.3g} %), {done.steps} steps, "
            f"{done.minutes:.1f} minutes; valid {done.metric} {done.valid:.4g}"]
    if signature := done.lines[0].scores.get(f"{done.metric}_signature"):
        more.append(f"{done.metric}: {signature}")
    more += [f"It does not beat: {', '.join(done.beaten)}."] if done.beaten else []
    more += [f"{count} {name} rows also stand in the training text; their score says little."
             for name, count in done.leaks.items() if count]
    more.append(f"Written: {done.path}")
    return Group(grid, *(Text(line) for line in more))
