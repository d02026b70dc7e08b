"""From candidates to a plan: options priced in real bytes and predicted nats, one chosen for each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import codecs
from .allocate import Budget, Option, Unit, choose
from .checkpoint import Checkpoint
from .errors import BudgetError, SupremumError
from .gather import Gathered, price
from .sizes import format_size


@dataclass(frozen=True)
class Menu:
    """Codec names by tensor, and the tensors that must share one."""

    codecs: dict[str, list[str]]
    ties: list[list[str]]


def menu_of(target: Any, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]], keep: Sequence[str],
            only: Sequence[str] = ()) -> Menu:
    """What each tensor may become. keep: parts of names that stay as they are. only: these codecs instead of the menu.

    Of the integer codecs one group size is taken: 64, or the next that divides the row. Raises SupremumError for a name
    in `only` that the target cannot hold.
    """
    held = {name: target.codecs(checkpoint, name, shape) for name, shape in shapes.items()}
    valid = sorted({codec for names in held.values() for codec in names})
    unknown = [codec for codec in only if codec not in valid]
    if unknown:
        raise SupremumError(f"The {target.name} target has no format {unknown[0]} for this model.",
                            f"Choose among: {', '.join(valid)}.")
    chosen: dict[str, list[str]] = {}
    for name, possible in held.items():
        wanted = only or target.menu
        names = [] if any(part in name for part in keep) else [n for n in wanted if n in possible]
        for group in ("-g64", "-g32"):
            if not only and any(n.endswith(group) for n in names):
                names = [n for n in names if n.endswith(group)]
        chosen[name] = names
    ties = [[name for name in tie if chosen.get(name)] for tie in target.ties(checkpoint)]
    return Menu(chosen, [tie for tie in ties if len(tie) > 1])


def units_of(gathered: Gathered, target: Any, menu: Menu, nats: Mapping[tuple[str, str], float]) -> list[Unit]:
    """Units with their options; a tensor may also stay as it is, at the bytes that the target then needs."""
    checkpoint, shapes, tables = gathered.checkpoint, gathered.shapes, set(gathered.tables)
    everything = {name: names[0] for name, names in menu.codecs.items() if names}
    whole = target.size(checkpoint, everything)
    as_it_is = {}
    for name, codec in everything.items():
        rest = {other: c for other, c in everything.items() if other != name}
        as_it_is[name] = target.size(checkpoint, rest) - whole + codecs.get(codec).nbytes(shapes[name])
    owner = {name: tuple(tie) for tie in menu.ties for name in tie}
    units = []
    for names in dict.fromkeys(owner.get(name, (name,)) for name in everything):
        shared = [codec for codec in menu.codecs[names[0]] if all(codec in menu.codecs[name] for name in names)]
        options = [Option(codec, sum(codecs.get(codec).nbytes(shapes[name]) for name in names),
                          sum(nats[name, codec] for name in names)) for codec in shared]
        options.append(Option(None, sum(as_it_is[name] for name in names), 0.0))
        units.append(Unit(names, sum(math.prod(shapes[name]) for name in names), names[0] not in tables, tuple(options)))
    return units


def prices(gathered: Gathered) -> dict[tuple[str, str], float]:
    """Predicted nats a token of every candidate, from the sequence-level Fisher."""
    return {key: price(product, gathered.fisher_length) for key, product in gathered.products().items()}


def plan_of(units: Sequence[Unit], options: Sequence[Option]) -> dict[str, str]:
    """Tensor name -> codec name; tensors that stay are left out."""
    return {name: option.codec for unit, option in zip(units, options, strict=True) if option.codec is not None
            for name in unit.tensors}


def fixed_bytes(checkpoint: Checkpoint, target: Any, units: Sequence[Unit]) -> int:
    """Bytes that no choice changes: metadata, tokenizer, norms, and what was kept."""
    options = [unit.options[0] for unit in units]
    return target.size(checkpoint, plan_of(units, options)) - sum(option.nbytes for option in options)


def spend(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Any, *, nats: float | None = None,
          ) -> list[Option]:
    """The best options within the budget; the target's exact size is checked, not estimated.

    nats: predicted damage that stands for budget.max_kl. Raises BudgetError naming the smallest feasible size.
    """
    fixed = fixed_bytes(checkpoint, target, units)
    weights = sum(unit.weights for unit in units if unit.in_blocks)
    block_bytes = None if budget.bits is None else budget.bits * weights / 8
    least = fixed + sum(min(option.nbytes for option in unit.options) for unit in units)
    least_bits = 8 * sum(min(o.nbytes for o in unit.options) for unit in units if unit.in_blocks) / max(weights, 1)
    if budget.size is not None and budget.size < least:
        raise BudgetError(f"{format_size(budget.size)} is too small: the smallest {target.name} file of this model is "
                          f"{format_size(least)} ({least} bytes).", f"Ask for --size {least} or more, or another --target.")
    if block_bytes is not None and budget.bits is not None and budget.bits < least_bits:
        raise BudgetError(f"{budget.bits:g} bits a weight is too few: the least this target can hold is "
                          f"{least_bits:.3f}.", f"Ask for --bits {math.ceil(least_bits * 1000) / 1000} or more, or "
                          "another --target.")
    size = None if budget.size is None else budget.size - fixed
    while True:
        options = choose(units, size=size, block_bytes=block_bytes, nats=nats)
        exact = target.size(checkpoint, plan_of(units, options))
        if budget.size is None or size is None or exact <= budget.size:
            return _tables_at_the_same_price(units, options) if budget.size is None and nats is None else options
        size -= exact - budget.size


def _tables_at_the_same_price(units: Sequence[Unit], options: list[Option]) -> list[Option]:
    """Where only the blocks' bits are given: the embedding and the head take the option that is best at the price, nats a
    byte, of the blocks' least worthwhile bytes."""
    worth = [min((o.nats - option.nats) / (option.nbytes - o.nbytes) for o in unit.options if o.nbytes < option.nbytes)
             for unit, option in zip(units, options, strict=True)
             if unit.in_blocks and any(o.nbytes < option.nbytes for o in unit.options)]
    price = max(0.0, min(worth, default=0.0))
    return [option if unit.in_blocks else min(unit.options, key=lambda o: (o.nats + price * o.nbytes, o.nbytes))
            for unit, option in zip(units, options, strict=True)]


def reason(unit: Unit, option: Option) -> str:
    """Why this option: what the next smaller and the next larger would have meant."""
    if len(unit.options) == 1:
        return "no format of the target holds it: it stays as it is"
    smaller = [o for o in unit.options if o.nbytes < option.nbytes]
    larger = [o for o in unit.options if o.nbytes > option.nbytes and o.nats < option.nats]
    parts = []
    if smaller:
        below = min(smaller, key=lambda o: o.nats)
        parts.append(f"{below.codec or 'as it is'} would save {format_size(option.nbytes - below.nbytes)} "
                     f"for {below.nats - option.nats:+.2g} nats")
    if larger:
        above = min(larger, key=lambda o: o.nbytes)
        parts.append(f"{above.codec or 'as it is'} would cost {format_size(above.nbytes - option.nbytes)} "
                     f"for {above.nats - option.nats:+.2g} nats")
    return "; ".join(parts) or "the least bytes and the least damage"
