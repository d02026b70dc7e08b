"""Multiple-choice knapsack: one option for each unit, least predicted damage within the budgets.

    minimise sum_u nats[u, x_u]   subject to   sum_u bytes[u, x_u] <= size,   sum_u block_bits[u, x_u] <= bits,
                                               sum_u seconds[u, x_u] <= seconds,   sum_u resident[u, x_u] <= resident

Solved exactly by SciPy's HiGHS (to a relative gap of 1e-4), over each unit's options that no other of its options beats
in everything. `frontier` draws the lower convex hull by a Lagrangian
sweep: for every price lambda (nats a byte) each unit takes the option with the least nats + lambda bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, csr_matrix

from ..errors import BudgetError
from .budget import Allowance

GAP = 1e-4
LARGE = 1e3  # largest coefficient given to HiGHS, whose tolerances are absolute: 1e-6 of a row, 1e-6 of the cost


@dataclass(frozen=True)
class Option:
    """One way to store a unit. codec None: the tensors stay as they are. nats: predicted KL a token, added up.

    seconds of a decode step and resident bytes: beyond those of the tensors as they are; 0 where they do not matter.
    """

    codec: str | None
    nbytes: int
    nats: float
    seconds: float = 0.0
    resident: int = 0


@dataclass(frozen=True)
class Unit:
    """Tensors that take one codec together (one tensor unless the target ties several)."""

    tensors: tuple[str, ...]
    weights: int
    in_blocks: bool  # counts for bits a weight
    options: tuple[Option, ...]


def choose(units: Sequence[Unit], *, size: int | None = None, block_bytes: float | None = None,
           nats: float | None = None, allowance: Allowance | None = None) -> list[Option]:
    """The best option of each unit, in order.

    size: bytes of all units. block_bytes: bytes of the units in blocks. nats: instead of least damage, least bytes with
    at most this predicted damage. allowance: seconds and resident bytes of all units. Raises BudgetError, with the least that
    can be reached, when nothing fits.
    """
    kept = [_undominated(unit.options, (_nbytes, _nats, _seconds, _resident)) for unit in units]
    options = [option for those in kept for option in those]
    owner = np.repeat(np.arange(len(units)), [len(those) for those in kept])
    count = len(options)
    nbytes = np.array([option.nbytes for option in options], float)
    damage = np.array([option.nats for option in options])
    inner = nbytes * np.array([unit.in_blocks for unit in units], float)[owner]
    one_each = csr_matrix(coo_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(units), count)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    limits = [(nbytes, size), (inner, block_bytes), (damage, nats)]
    if allowance is not None:
        limits += [(np.array([option.seconds for option in options]), allowance.seconds),
                   (np.array([option.resident for option in options], float), allowance.resident)]
    for row, bound in limits:
        if bound is not None:
            factor = LARGE / max(np.abs(row).max(), 1e-30)
            constraints.append(LinearConstraint(csr_matrix(row * factor), -np.inf, factor * (bound + 1e-12 * abs(bound))))
    cost = damage if nats is None else nbytes
    with _standard_output_kept():
        result = milp(cost * (LARGE / max(cost.max(), 1e-30)), constraints=constraints, integrality=np.ones(count),
                      bounds=Bounds(0, 1), options={"mip_rel_gap": GAP, "presolve": True})
    if result.x is None:
        raise BudgetError("no choice of formats fits the budget.", _least(units, block_bytes, nats, allowance))
    chosen = [int(i) for i in np.flatnonzero(result.x > 0.5)]
    assert [int(owner[i]) for i in chosen] == list(range(len(units)))
    return [options[i] for i in chosen]


@contextlib.contextmanager
def _standard_output_kept() -> Iterator[None]:
    """HiGHS sometimes prints a line for its developers: what C code writes to standard output is dropped meanwhile."""
    try:
        ours = os.dup(1)
    except OSError:  # there is none
        yield
        return
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(ours, 1)
        os.close(ours)


def _least(units: Sequence[Unit], block_bytes: float | None, nats: float | None, allowance: Allowance | None) -> str:
    """What the least of each limited quantity is."""
    least = sum(min(option.nbytes for option in unit.options) for unit in units)
    text = f"The least these layers take is {least} bytes"
    if block_bytes is not None:
        text += f", in blocks {sum(min(o.nbytes for o in unit.options) for unit in units if unit.in_blocks)} bytes"
    if nats is not None:
        text += f"; the least damage {sum(min(o.nats for o in unit.options) for unit in units):.3g} nats"
    if allowance is not None and allowance.seconds is not None:
        text += f"; a step at best {1000 * sum(min(map(_seconds, unit.options)) for unit in units):+.3g} ms to the original's"
    if allowance is not None and allowance.resident is not None:
        text += f"; resident at best {sum(min(map(_resident, unit.options)) for unit in units):+d} bytes to the original's"
    return text + "."


_nbytes, _nats, _seconds, _resident = map(attrgetter, ("nbytes", "nats", "seconds", "resident"))


def _undominated(options: Sequence[Option], by: Sequence[Callable[[Option], float]] = (_nbytes, _nats)) -> list[Option]:
    """Options that no other beats or equals in all that they are measured `by`, in its order."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: [measure(o) for measure in by]):
        if not any(all(measure(other) <= measure(option) for measure in by) for other in kept):
            kept.append(option)
    return kept


def frontier(units: Sequence[Unit], points: int = 40) -> list[list[Option]]:
    """Choices along the lower convex hull, from fewest to most bytes; at most `points` of them, all different."""
    hulls = [_hull(unit.options) for unit in units]
    slopes = [(a.nats - b.nats) / (b.nbytes - a.nbytes) for hull in hulls for a, b in itertools.pairwise(hull)]
    if not slopes:
        return [[hull[0] for hull in hulls]]
    prices = [2 * max(slopes), *(np.quantile(slopes, np.linspace(1, 0, points - 1)) * (1 - 1e-9))]
    found: list[list[Option]] = []
    for price in prices:
        choice = [min(hull, key=lambda o: (o.nats + price * o.nbytes, o.nbytes)) for hull in hulls]
        if not found or choice != found[-1]:
            found.append(choice)
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of (bytes, nats), by bytes."""
    hull: list[Option] = []
    for option in _undominated(options):
        while len(hull) > 1 and (hull[-1].nats - option.nats) * (hull[-1].nbytes - hull[-2].nbytes) >= \
                (hull[-2].nats - hull[-1].nats) * (option.nbytes - hull[-1].nbytes):
            hull.pop()
        hull.append(option)
    return hull
