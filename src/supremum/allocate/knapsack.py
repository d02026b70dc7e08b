"""Multiple-choice knapsack: one option for each unit, least predicted damage within the budgets.

    minimise sum_u nats[u, x_u]   subject to   sum_u bytes[u, x_u] <= size,   sum_u block_bits[u, x_u] <= bits

Solved exactly by SciPy's HiGHS (to a relative gap of 1e-4). `frontier` draws the lower convex hull by a Lagrangian
sweep: for every price lambda (nats a byte) each unit takes the option with the least nats + lambda bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, csr_matrix

from ..errors import BudgetError

GAP = 1e-4


@dataclass(frozen=True)
class Option:
    """One way to store a unit. codec None: the tensors stay as they are. nats: predicted KL a token, added up."""

    codec: str | None
    nbytes: int
    nats: float


@dataclass(frozen=True)
class Unit:
    """Tensors that take one codec together (one tensor unless the target ties several)."""

    tensors: tuple[str, ...]
    weights: int
    in_blocks: bool  # counts for bits a weight
    options: tuple[Option, ...]


def choose(units: Sequence[Unit], *, size: int | None = None, block_bytes: float | None = None,
           nats: float | None = None) -> list[Option]:
    """The best option of each unit, in order.

    size: bytes of all units. block_bytes: bytes of the units in blocks. nats: instead of least damage, least bytes with
    at most this predicted damage. Raises BudgetError, with the least that can be reached, when nothing fits.
    """
    options = [option for unit in units for option in unit.options]
    owner = np.repeat(np.arange(len(units)), [len(unit.options) for unit in units])
    count = len(options)
    nbytes = np.array([option.nbytes for option in options], float)
    damage = np.array([option.nats for option in options])
    in_blocks = np.array([unit.in_blocks for unit in units], float)[owner]
    one_each = csr_matrix(coo_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(units), count)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for row, bound, scale in ((nbytes, size, 1e-6), (nbytes * in_blocks, block_bytes, 1e-6), (damage, nats, None)):
        if bound is not None:
            factor = scale or 1 / max(bound, 1e-12)
            constraints.append(LinearConstraint(csr_matrix(row * factor), -np.inf, bound * factor * (1 + 1e-12)))
    cost = nbytes * 1e-6 if nats is not None else damage / max(damage.max(), 1e-30) + 1e-9 * nbytes / nbytes.max()
    result = milp(cost, constraints=constraints, integrality=np.ones(count), bounds=Bounds(0, 1),
                  options={"mip_rel_gap": GAP, "presolve": True})
    if result.x is None:
        least = sum(min(option.nbytes for option in unit.options) for unit in units)
        raise BudgetError("no choice of formats fits the budget.", f"The least these layers take is {least} bytes.")
    chosen = [int(i) for i in np.flatnonzero(result.x > 0.5)]
    assert [int(owner[i]) for i in chosen] == list(range(len(units)))
    return [options[i] for i in chosen]


def frontier(units: Sequence[Unit], points: int = 40) -> list[list[Option]]:
    """Choices along the lower convex hull, from fewest to most bytes; at most `points` of them, all different."""
    slopes: list[float] = []
    for unit in units:
        hull = _hull(unit.options)
        slopes += [(a.nats - b.nats) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
    if not slopes:
        return [[min(unit.options, key=lambda o: o.nbytes) for unit in units]]
    prices = np.quantile(np.sort(slopes)[::-1], np.linspace(0, 1, points - 1))[::-1] * (1 - 1e-9)
    prices = np.concatenate([[max(slopes) * 2], np.sort(prices)[::-1]])
    found: list[list[Option]] = []
    for price in prices:
        choice = [min(unit.options, key=lambda o: (o.nats + price * o.nbytes, o.nbytes)) for unit in units]
        if not found or choice != found[-1]:
            found.append(choice)
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of (bytes, nats), by bytes."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.nats)):
        if hull and option.nats >= hull[-1].nats:
            continue
        while len(hull) > 1 and (hull[-1].nats - option.nats) * (hull[-1].nbytes - hull[-2].nbytes) >= \
                (hull[-2].nats - hull[-1].nats) * (option.nbytes - hull[-1].nbytes):
            hull.pop()
        hull.append(option)
    return hull
