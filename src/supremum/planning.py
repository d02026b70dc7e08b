"""From candidates to a plan: options priced in real bytes and predicted nats, one chosen for each tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from . import codecs
from .allocate import Allowance, Budget, Option, Unit, choose
from .checkpoint import Checkpoint
from .checkpoint.targets import Target
from .errors import BudgetError, SupremumError
from .limits import LayerSpectrum
from .sizes import format_size

if TYPE_CHECKING:
    from .costs import Costs
    from .solve.gains import Trained


@dataclass(frozen=True)
class Menu:
    """Codec names by tensor, and the tensors that must share one."""

    codecs: dict[str, list[str]]
    ties: list[list[str]]

    def only(self, plan: Mapping[str, str]) -> Menu:
        """With nothing but what `plan` (tensor name -> codec name) takes."""
        return Menu({name: [plan[name]] if name in plan else [] for name in self.codecs}, self.ties)


@dataclass(frozen=True)
class Reached:
    """What a budget led to: every unit's option, what is to be written, and its quality."""

    units: list[Unit]
    chosen: list[Option]
    trained: Trained
    points: list[dict[str, Any]]  # of the frontier that were measured on the way
    spectra: list[LayerSpectrum]
    size: int  # bytes of all files
    swaps: dict[str, Any] | None = None  # what a search for better formats bought (swaps.py)
    priced: bool = True  # whether there was a choice, and candidates to price

    def point(self) -> tuple[float, float] | None:
        """(bits a weight, KL), to be shown beside the limit."""
        weights, bits = block_rate(self.units, self.chosen)
        kl = self.trained.quality["kl_mean"]
        return (bits, kl) if weights and kl else None


def menu_of(target: Target, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]], keep: Sequence[str],
            only: Sequence[str] = (), *, least: bool = False) -> Menu:
    """What each tensor may become. keep: parts of names that stay as they are. only: these codecs instead of the menu.
    least: the target's least ones beside its menu.

    Of the integer codecs one group size is taken: 64, or the next that divides the row. Raises SupremumError for a name
    in `only` that the target cannot hold, or not beside the others.
    """
    held = {name: target.codecs(checkpoint, name, shape) for name, shape in shapes.items()}
    valid = sorted({codec for names in held.values() for codec in names})
    unknown = [codec for codec in only if codec not in valid]
    if unknown:
        near = [f"{name}? " for name in get_close_matches(unknown[0], valid, 1)]
        raise SupremumError(f"The {target.name} target has no format {unknown[0]} for this model.",
                            f"{''.join(near)}Choose among: {', '.join(valid)}.")
    chosen: dict[str, list[str]] = {}
    for name, possible in held.items():
        wanted = only or (*target.menu, *(target.least if least else ()))
        names = [] if any(part in name for part in keep) else [n for n in wanted if n in possible]
        for group in ("-g64", "-g32"):
            if not only and any(n.endswith(group) for n in names):
                names = [n for n in names if n.endswith(group)]
        chosen[name] = names
    target.together({codec for names in chosen.values() for codec in names})
    ties = [[name for name in tie if chosen.get(name)] for tie in target.ties(checkpoint)]
    return Menu(chosen, [tie for tie in ties if len(tie) > 1])


def units_of(checkpoint: Checkpoint, target: Target, menu: Menu, shapes: Mapping[str, tuple[int, int]],
             tables: Collection[str], nats: Mapping[tuple[str, str], float] | None = None, costs: Costs | None = None,
             ) -> list[Unit]:
    """Every matrix with its options: its codecs, and to stay as it is, at the bytes that the target then needs.

    tables: the embedding and the head, which do not count for bits a weight. nats: predicted damage by (tensor, codec);
    None prices nothing. costs: what the formats take when they run; None leaves it out.
    """
    everything = {name: names[0] for name, names in menu.codecs.items() if names}
    whole = target.size(checkpoint, everything)

    def as_it_is(name: str) -> int:
        if name in everything:
            rest = {other: codec for other, codec in everything.items() if other != name}
            return target.size(checkpoint, rest) - whole + codecs.get(everything[name]).nbytes(shapes[name])
        if possible := target.codecs(checkpoint, name, shapes[name]):
            coded = target.size(checkpoint, everything | {name: possible[0]})
            return whole - coded + codecs.get(possible[0]).nbytes(shapes[name])
        return checkpoint.tensors[name].nbytes

    def running(names: Collection[str], codec: str) -> tuple[float, int]:
        taken = [costs.of(name, codec, math.prod(shapes[name])) for name in names] if costs else []
        return sum(seconds for seconds, _ in taken), sum(resident for _, resident in taken)

    owner = {name: tuple(tie) for tie in menu.ties for name in tie}
    units = []
    for names in dict.fromkeys(owner.get(name, (name,)) for name in menu.codecs):
        shared = [codec for codec in menu.codecs[names[0]] if all(codec in menu.codecs[name] for name in names)]
        options = [Option(codec, sum(codecs.get(codec).nbytes(shapes[name]) for name in names),
                          sum(nats[name, codec] for name in names) if nats is not None else 0.0, *running(names, codec))
                   for codec in shared]
        options.append(Option(None, sum(as_it_is(name) for name in names), 0.0))
        units.append(Unit(names, sum(math.prod(shapes[name]) for name in names), names[0] not in tables, tuple(options)))
    return units


def plan_of(units: Sequence[Unit], options: Sequence[Option]) -> dict[str, str]:
    """Tensor name -> codec name; tensors that stay are left out."""
    return {name: option.codec for unit, option in zip(units, options, strict=True) if option.codec is not None
            for name in unit.tensors}


def fixed_bytes(checkpoint: Checkpoint, target: Target, units: Sequence[Unit]) -> int:
    """Bytes that no choice changes: metadata, tokenizer, norms, and what was kept."""
    options = [unit.options[0] for unit in units]
    return target.size(checkpoint, plan_of(units, options)) - sum(option.nbytes for option in options)


def block_rate(units: Sequence[Unit], options: Sequence[Option]) -> tuple[int, float]:
    """(weights of the blocks' linear layers, bits each of them takes, scales included)."""
    weights = sum(unit.weights for unit in units if unit.in_blocks)
    nbytes = sum(option.nbytes for unit, option in zip(units, options, strict=True) if unit.in_blocks)
    return weights, 8 * nbytes / max(weights, 1)


def smallest(units: Sequence[Unit]) -> list[Option]:
    """The option of fewest bytes of each."""
    return [min(unit.options, key=lambda option: option.nbytes) for unit in units]


def check_feasible(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Target) -> None:
    """Raises BudgetError, naming the least that would do, if even the smallest options exceed the size or the bits."""
    least = smallest(units)
    size = target.size(checkpoint, plan_of(units, least))
    if budget.size is not None and budget.size < size:
        raise BudgetError(f"{format_size(budget.size)} is too small: the smallest {target.name} file to be had is "
                          f"{format_size(size)} ({size} bytes).",
                          f"Ask for --size {size} or more, or another --target.")
    _, bits = block_rate(units, least)
    if budget.bits is not None and budget.bits < bits:
        raise BudgetError(f"{budget.bits:g} bits a weight is too few: the least to be had is {bits:.3f}.",
                          f"Ask for --bits {math.ceil(bits * 1000) / 1000} or more, or another --target.")


def meets(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Target) -> bool:
    """Whether the size and the bits can be had."""
    try:
        check_feasible(budget, units, checkpoint, target)
    except BudgetError:
        return False
    return True


def offered(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Target) -> list[Unit]:
    """The units without the target's least codecs, where the size and the bits can be had without: what other budgets are
    given beside this one changes nothing."""
    usual = [replace(unit, options=tuple(o for o in unit.options if o.codec not in target.least)) for unit in units]
    return usual if meets(budget, usual, checkpoint, target) else list(units)


def only_plan(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Target) -> list[Option] | None:
    """The smallest plan, where size or bits a weight leave room for no other and the embedding and the head are kept: then
    there is nothing to choose, and no candidate has to be solved or priced. None where there is a choice."""
    if (budget.size is None and budget.bits is None) or budget.max_kl or budget.memory or budget.speed:
        return None
    if any(not unit.in_blocks and len(unit.options) > 1 for unit in units):
        return None
    check_feasible(budget, units, checkpoint, target)
    least = smallest(units)
    size = target.size(checkpoint, plan_of(units, least))
    for place, unit in enumerate(units):
        for option in unit.options:
            other = [*least[:place], option, *least[place + 1:]]
            if option is not least[place] and (
                    budget.size is None or size + option.nbytes - least[place].nbytes <= budget.size) and (
                    budget.bits is None or block_rate(units, other)[1] <= budget.bits * (1 + 1e-12)):
                return None
    return least


def spend(budget: Budget, units: Sequence[Unit], checkpoint: Checkpoint, target: Target, *, nats: float | None = None,
          allowance: Allowance | None = None) -> list[Option]:
    """The best options within the budget; the target's exact size is checked, not estimated.

    nats: predicted damage that stands for budget.max_kl. allowance: what stands for its memory and speed. Raises BudgetError
    naming the smallest feasible size.
    """
    check_feasible(budget, units, checkpoint, target)
    fixed = fixed_bytes(checkpoint, target, units)
    weights, _ = block_rate(units, [unit.options[0] for unit in units])
    block_bytes = None if budget.bits is None else budget.bits * weights / 8
    size = None if budget.size is None else budget.size - fixed
    while True:
        options = choose(units, size=size, block_bytes=block_bytes, nats=nats, allowance=allowance)
        exact = target.size(checkpoint, plan_of(units, options))
        if budget.size is None or size is None or exact <= budget.size:
            alone = budget.size is None and nats is None and allowance is None
            return _tables_at_the_same_price(units, options) if alone else options
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
    if option.codec == "lattice":
        return "entropy-coded: as many bits as the water level that all layers share leaves it"
    if len(unit.options) == 1:
        return "stays as it is: kept, or in no format that this target has"
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
