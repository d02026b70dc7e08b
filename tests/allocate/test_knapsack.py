"""Allocation against trying every choice, and what a frontier must be."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum.allocate import Option, Unit, choose, frontier
from supremum.errors import BudgetError

GAP = 1.1e-4  # the solver's relative gap, and float's share

nats = st.one_of(st.just(0.0), st.floats(1e-7, 3.0))
option = st.builds(lambda size, damage: Option(f"c{size}", size, damage), st.integers(1, 60), nats)
unit = st.builds(lambda options, inner: Unit(("t",), 8, inner, tuple(options)),
                 st.lists(option, min_size=1, max_size=4), st.booleans())
problem = st.lists(unit, min_size=1, max_size=5)


def sums(units: Sequence[Unit], choice: Sequence[Option]) -> tuple[int, int, float]:
    """(bytes, bytes in blocks, nats)."""
    return (sum(o.nbytes for o in choice), sum(o.nbytes for u, o in zip(units, choice, strict=True) if u.in_blocks),
            sum(o.nats for o in choice))


def every(units: Sequence[Unit]) -> np.ndarray:
    """`sums` of every choice, (choices, 3)."""
    return np.array([sums(units, choice) for choice in itertools.product(*(u.options for u in units))])


def check_choice(units: Sequence[Unit], choice: Sequence[Option]) -> None:
    assert len(choice) == len(units)
    assert all(option in unit.options for unit, option in zip(units, choice, strict=True))


@settings(max_examples=120, deadline=None)
@given(units=problem, share=st.floats(-0.05, 1.1), inner=st.one_of(st.none(), st.floats(-0.05, 1.1)))
def test_least_damage_within_bytes(units: list[Unit], share: float, inner: float | None) -> None:
    choices = every(units)
    low, high = choices.min(0), choices.max(0)
    size = round(low[0] + share * (high[0] - low[0]))
    block_bytes = None if inner is None else low[1] + inner * (high[1] - low[1])
    possible = choices[:, 0] <= size
    if block_bytes is not None:
        possible &= choices[:, 1] <= block_bytes
    if not possible.any():
        with pytest.raises(BudgetError, match=f"The least these layers take is {int(low[0])} bytes"):
            choose(units, size=size, block_bytes=block_bytes)
        return
    choice = choose(units, size=size, block_bytes=block_bytes)
    check_choice(units, choice)
    nbytes, blocks, damage = sums(units, choice)
    assert nbytes <= size and (block_bytes is None or blocks <= block_bytes * (1 + 1e-9))
    assert damage <= choices[possible, 2].min() * (1 + GAP) + 1e-12


@settings(max_examples=100, deadline=None)
@given(units=problem, share=st.floats(0, 1.1), size_share=st.one_of(st.none(), st.floats(0, 1)))
def test_least_bytes_within_damage(units: list[Unit], share: float, size_share: float | None) -> None:
    choices = every(units)
    low, high = choices.min(0), choices.max(0)
    limit = low[2] + share * (high[2] - low[2])
    size = None if size_share is None else int(low[0] + size_share * (high[0] - low[0]))
    slack = 1e-8 * max(option.nats for unit in units for option in unit.options)  # the solver's tolerance
    within = choices[:, 0] <= (np.inf if size is None else size)
    surely, barely = (within & (choices[:, 2] <= limit + side * slack) for side in (-1, 1))
    try:
        choice = choose(units, nats=limit, size=size)
    except BudgetError as error:
        assert not surely.any()
        assert "nats" in str(error)
        return
    check_choice(units, choice)
    nbytes, _, damage = sums(units, choice)
    assert damage <= limit + slack and (size is None or nbytes <= size)
    assert choices[barely, 0].min() <= nbytes
    if surely.any():
        assert nbytes <= choices[surely, 0].min() * (1 + GAP)


def test_a_budget_that_is_met_exactly() -> None:
    """Bytes of real layers: not one too many, and none wasted."""
    units = [Unit((str(i),), 1, True, (Option("a", 318_505_267 + i, 1.0), Option("b", 637_010_534 + 2 * i, 0.1)))
             for i in range(6)]
    least = sum(unit.options[0].nbytes for unit in units)
    for extra in (0, 1, units[0].options[0].nbytes - 1, units[0].options[0].nbytes, 4 * units[0].options[0].nbytes + 10):
        choice = choose(units, size=least + extra)
        possible = [c for c in itertools.product(*(u.options for u in units)) if sum(o.nbytes for o in c) <= least + extra]
        assert sum(o.nbytes for o in choice) <= least + extra
        assert sum(o.nats for o in choice) == pytest.approx(min(sum(o.nats for o in c) for c in possible), rel=1e-4)
    with pytest.raises(BudgetError, match=f"The least these layers take is {least} bytes"):
        choose(units, size=least - 1)


def test_small_damages_are_told_apart_beside_a_large_one() -> None:
    """One option of 1000 nats must not drown choices of a millionth."""
    units = [Unit((str(i),), 1, True, (Option("a", 10, 3e-6 * (1 + i)), Option("b", 20, 1e-6))) for i in range(6)]
    units.append(Unit(("table",), 1, False, (Option("a", 1, 1000.0), Option("b", 2, 1e-6))))
    choice = choose(units, size=2 + 20 * 3 + 10 * 3)
    assert [o.codec for o in choice] == ["a", "a", "a", "b", "b", "b", "b"]


def test_ties_and_dominated_options() -> None:
    """Of equals the smaller, and never an option that another beats in both."""
    same = Unit(("t",), 1, True, (Option("big", 20, 0.5), Option("small", 10, 0.5), Option("bad", 30, 0.7)))
    assert [o.codec for o in choose([same] * 3, size=1000)] == ["small"] * 3
    assert [o.codec for o in choose([same] * 3, nats=10.0)] == ["small"] * 3
    alike = Unit(("t",), 1, True, (Option("first", 10, 0.5), Option("second", 10, 0.5)))
    assert [o.codec for o in choose([alike], size=10)] == ["first"]
    assert choose([alike] * 4, size=40) == choose([alike] * 4, size=40)


def test_what_the_solver_prints_is_no_result() -> None:
    """Of C's standard output; what was written before and is written after arrives in order."""
    script = """
import ctypes
from supremum.allocate import Option, Unit, choose, knapsack
puts, solve = ctypes.CDLL(None).puts, knapsack.milp
knapsack.milp = lambda *given, **more: (puts(b"for developers"), solve(*given, **more))[1]
print("before", choose([Unit(("a",), 1, True, (Option("x", 1, 1.0),))], size=1)[0].codec)
puts(b"after")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "before x\nafter\n"


def test_only_blocks_count_for_bits() -> None:
    inner = Unit(("w",), 8, True, (Option("small", 10, 1.0), Option("large", 20, 0.1)))
    table = Unit(("e",), 8, False, (Option("small", 10, 1.0), Option("large", 1000, 0.1)))
    assert [o.codec for o in choose([inner, table], block_bytes=10)] == ["small", "large"]
    with pytest.raises(BudgetError, match="in blocks 10 bytes"):
        choose([inner, table], block_bytes=9.99)


def test_hundreds_of_layers_take_about_a_second() -> None:
    """A 7B model: 224 layers, 11 options each."""
    draw = np.random.default_rng(0)
    units = []
    for i in range(225):
        weights, weight = int(draw.choice([4096, 11008])) * 4096, float(draw.lognormal(0, 1.5))
        units.append(Unit((str(i),), weights, i > 0, tuple(
            Option(f"{bits}", int(weights * (bits + 0.25) / 8), 1e-3 * weight * 4.0 ** (2 - bits))
            for bits in (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 12, 16))))
    size = int(sum(unit.weights for unit in units) * 4.5 / 8)
    started = time.process_time()
    nbytes, _, damage = sums(units, choose(units, size=size))
    assert time.process_time() - started < 10 and nbytes <= size
    points = [sums(units, choice) for choice in frontier(units)]
    assert damage <= min(point[2] for point in points if point[0] <= size) * (1 + GAP)  # no worse than a point on the hull
    prices = np.logspace(-14, -6, 200)
    dual = max(sum(min(o.nats + price * o.nbytes for o in unit.options) for unit in units) - price * size for price in prices)
    assert dual <= damage <= 1.02 * dual  # Lagrange's bound, close for many units


@settings(max_examples=100, deadline=None)
@given(units=problem)
def test_frontier_is_the_lower_convex_hull(units: list[Unit]) -> None:
    choices, found = every(units), frontier(units, points=200)
    for choice in found:
        check_choice(units, choice)
    points = np.array([sums(units, choice) for choice in found])
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 2]) < 0).all()  # ordered, none dominated
    slopes = np.diff(points[:, 2]) / np.diff(points[:, 0])
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[:-1])).all()  # convex
    least = choices[choices[:, 0] == choices[:, 0].min()]
    assert points[0, 0] == least[0, 0] and points[0, 2] == pytest.approx(least[:, 2].min())  # both ends
    best = choices[choices[:, 2] <= choices[:, 2].min() + 1e-12]
    assert points[-1, 2] == pytest.approx(best[0, 2], abs=1e-12) and points[-1, 0] <= best[:, 0].min()
    for nbytes, _, damage in choices:  # no choice at all lies below it
        assert damage >= np.interp(nbytes, points[:, 0], points[:, 2]) - 1e-9


def test_frontier_takes_few_points_from_many() -> None:
    draw = np.random.default_rng(1)
    units = [Unit((str(i),), 1, True, tuple(Option(f"{k}", 100 * (k + 1), float(draw.uniform(1, 2)) * 4.0 ** -k)
                                            for k in range(6))) for i in range(50)]
    found = frontier(units, points=12)
    assert 8 <= len(found) <= 12
    totals = [sums(units, choice) for choice in found]
    assert totals[0][0] == 50 * 100 and totals[-1][0] == 50 * 600
    assert frontier(units, points=12) == found


def test_frontier_of_layers_without_a_choice() -> None:
    units = [Unit((str(i),), 1, True, (Option("only", 10, 0.5),)) for i in range(3)]
    assert frontier(units) == [[unit.options[0] for unit in units]]
