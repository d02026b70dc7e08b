"""The gap of a finished file as a page of 80 columns: the whole, where it lies, each kind of layer, the worst layers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..gap import FileGap, LayerGap

WIDTH, WORST = 80, 8


def render_gap(gap: FileGap) -> RenderableType:
    """Bits are a weight of the blocks' layers; the largest part says what to do first."""
    exact = not gap.layers and bool(gap.parts)
    limit = "the entropy of these numbers" if exact else "the limit at this KL"
    head = (f"[bold]{escape(gap.model)}[/] against {escape(gap.reference)}\n"
            f"{gap.bits:.2f} bits a weight, KL {gap.kl:.4f} ± {gap.kl_se:.4f} nats a token (measured); {limit} "
            f"is {gap.least_bits:.2f} bits ({'measured' if exact else 'bound'}): [bold]{gap.gap:+.2f} bits[/]")
    where = _table("Where the gap lies", "what would take it off", "bits", "KL")
    for part, bits in sorted(gap.parts.items(), key=lambda item: -item[1]):
        where.add_row(part, f"{bits:+.2f}", f"x {4 ** -bits:.2f}" if bits > 0.005 else "")
    where.caption = "bits a weight, estimates that add up to the gap; KL: what it would become in equal bytes"
    if not gap.layers:
        return Group(head, escape(f"\n{gap.remark}"), *([where] if gap.parts else []))
    kinds: dict[str, list[LayerGap]] = defaultdict(list)
    for layer in gap.layers:
        kinds[layer.name.removesuffix(".weight").rsplit(".", 1)[-1]].append(layer)
    by_kind = _layers("By kind of layer", {f"{kind} ({len(layers)})": layers for kind, layers in kinds.items()})
    spent = sorted(gap.layers, key=lambda layer: -(layer.bits - layer.level_bits) * layer.weights)[:WORST]
    return Group(head, where, by_kind, _layers("Most bits too many", {_short(layer.name): [layer] for layer in spent}))


def _short(name: str) -> str:
    """From the block's number on: what 80 columns can hold."""
    parts = name.removesuffix(".weight").split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def _layers(title: str, rows: dict[str, list[LayerGap]]) -> Table:
    table = _table(title, "layer", "bits", "at the limit", "own gap", "feedback", "nats")
    for name, layers in rows.items():
        weights = sum(layer.weights for layer in layers)

        def mean(key: str, layers: list[LayerGap] = layers, weights: int = weights) -> str:
            return f"{sum(getattr(layer, key) * layer.weights for layer in layers) / weights:.2f}"

        table.add_row(escape(name), mean("bits"), mean("level_bits"), mean("gap"), mean("feedback"),
                      f"{sum(layer.nats for layer in layers):.2g}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n[bold]{title}[/]", title_justify="left", title_style="", box=box.SIMPLE_HEAD, width=WIDTH,
                  pad_edge=False, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="ellipsis", no_wrap=True,
                         min_width=len(column) if number else None)
    return table
