"""The table that ends a run of `tune`, and those of a tuned model that `evaluate` scored."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..measure.intervals import Compared
from ..measure.table import answered, one_line, weighed
from ..plain import plain
from ..sizes import cells
from .evaluate import AS_IT_IS, Scored, TaskEvaluation, Why
from .tune import Tuned

ALIKE = ("precision_micro", "recall_micro", "f1_micro")  # of one label a row these are the accuracy
WIDE = 14  # letters of a label


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


def render_evaluation(found: TaskEvaluation, compared: bool) -> Group:
    """Every figure with its interval and, beside a reference, the paired difference; flips, labels, robustness, reasons."""
    some = f"{found.rows:,}" if found.rows == found.total else f"{found.rows:,} of {found.total:,}"
    grid = _grid("", f"{found.task}: {some} test rows", compared=compared)
    for name, figure in found.scored.figures.items():
        if name not in ALIKE:
            grid.add_row(name, *_cells(figure))
    parts: list[Any] = [grid, *(Text(line) for line in _lines(found))]
    if found.scored.labels:
        parts.append(_labels(found.scored, compared))
    if found.perturbed:
        table = _grid("rows", f"robustness: {found.metric}", compared=compared)
        for name, one in {AS_IT_IS: found.scored, **found.perturbed}.items():
            table.add_row(name, *_cells(one.figures[found.metric]))
        parts.append(table)
    parts += [Text(f"{why.where}: {answered(why.explained)}; {_sureness(why)}; weighed most: {weighed(why.explained)}"
                   + ("" if why.unit == "probability" else " (nats of the whole answer)"))
              for why in found.explained]
    return Group(*parts)


def _grid(first: str, title: str, *, compared: bool) -> Table:
    table = Table(first, "value", "95 %", title=escape(title), title_justify="left")
    for name in ("original", "change", "95 %") if compared else ():
        table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _cells(figure: Compared) -> list[str]:
    """As the page has them, but for p."""
    return cells(plain(figure))[:5]


def _lines(found: TaskEvaluation) -> list[str]:
    scored, lines = found.scored, []
    if scored.flips:
        lines.append(f"Flips: {scored.flips['lost']:,} right answers are wrong now, {scored.flips['gained']:,} wrong ones "
                     f"right; McNemar's exact p {scored.flips['p']:.2g}.")
    if scored.same is not None:
        lines.append(f"The same answer in {100 * scored.same:.1f} % of the rows.")
    for name, value in scored.more.items():
        before = scored.more_reference.get(name)
        said, was = map(_number, (value, before))
        lines.append(f"{name}: {said}" + (f" (original {was})" if before is not None and before != value else ""))
    if not found.as_tuned:
        lines.append("These are not the test rows of when it was tuned.")
    if found.leaked:
        lines.append(f"{found.leaked:,} test rows also stand in the training text; their score says little.")
    return lines


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"


def _labels(scored: Scored, compared: bool) -> Table:
    table = Table("label", "cases", "found", "F1", *(["change", "95 %", "flips"] if compared else ["95 %"]),
                  title="label by label", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in scored.labels:
        said = _cells(one.f1)
        more = [*said[3:], f"-{one.lost} +{one.gained}"] if compared else [said[1]]
        name = one.name if len(one.name) <= WIDE else one.name[: WIDE - 1] + "…"
        table.add_row(escape(name), f"{one.cases:,}", f"{one.found / one.cases:.3f}" if one.cases else "",
                      said[0], *more)
    return table


def _sureness(why: Why) -> str:
    what = f"p({one_line(why.explained.target) or 'no answer'})" if why.unit == "probability" else f"log p, {why.unit},"
    return f"{what} {why.sure:.3g}" + ("" if why.change is None else f" (change {why.change:+.2g})")
