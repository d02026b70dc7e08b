"""Gaps between groups: the figures by hand, an interval and a p that hold what they promise, and groups in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supremum.errors import SupremumError
from supremum.measure.cases import Case, Task, read_task
from supremum.measure.groups import group_gaps
from supremum.measure.intervals import range_interval


def task(groups: list[str | None], name: str = "t") -> Task:
    return Task(name, "choice", tuple(Case(("q", "q"), ("a", "b"), 0, group) for group in groups), len(groups))


def marks(*counts: tuple[str, int, int]) -> tuple[list[str | None], np.ndarray]:
    """(group of each case, right or not) from (group, right, cases), dealt out in turn."""
    rows = [(group, place < right) for group, right, cases in counts for place in range(cases)]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[place][0] for place in order], np.array([rows[place][1] for place in order])


def test_the_gap_is_that_of_the_best_and_the_worst_of_any_number_of_groups() -> None:
    groups, right = marks(("old", 12, 40), ("young", 30, 40), ("middle", 10, 20), ("7", 33, 60))
    groups, right = [*groups, None, None], np.append(right, [False, False])  # cases without a group have no part
    (gap,) = group_gaps([task(groups)], [right], [np.ones(len(right), dtype=bool)])
    assert (gap.name, gap.groups, gap.paired) == ("t", ("old", "young"), False)
    assert gap.acc.value == pytest.approx(30 / 40 - 12 / 40) and 0.2 < gap.acc.low < 0.45 < gap.acc.high < 0.7
    assert {name: rate.value for name, rate in gap.by_group.items()} == {
        "old": 0.3, "young": 0.75, "middle": 0.5, "7": pytest.approx(0.55)}
    assert gap.acc.p is not None and gap.acc.p < 0.01
    assert gap.acc_reference is not None and gap.acc_reference.value == 0 and gap.acc_reference.p == 1


def test_the_references_gap_is_that_of_the_same_two_groups() -> None:
    """A model that turns the order of the groups round moves the gap from -0.4 to 0.4."""
    groups: list[str | None] = ["a"] * 5 + ["b"] * 5
    ours, theirs = np.array([True] * 5 + [True] * 3 + [False] * 2), np.array([True] * 3 + [False] * 2 + [True] * 5)
    (gap,) = group_gaps([task(groups)], [ours], [theirs])
    assert gap.groups == ("b", "a") and gap.acc.value == pytest.approx(0.4)
    assert gap.acc_reference is not None and gap.acc_reference.value == pytest.approx(-0.4)


def test_two_groups_are_enough_and_one_is_none() -> None:
    right = np.array([True, False, True, True])
    (gap,) = group_gaps([task(["b", "a", "b", "a"])], [right], [None])
    assert gap.groups == ("a", "b") and gap.acc.value == 0.5 and gap.acc_reference is None
    level = np.ones(4, dtype=bool)
    assert next(group_gaps([task(["b", "a", "b", "a"])], [level], [None])).groups == ("a", "b")  # two names, though level
    assert not list(group_gaps([task(["a", "a", None, None]), task([None] * 4, "u")], [right, right], [None, None]))


def test_p_is_even_where_groups_are_alike() -> None:
    """Under no difference a p below 0.2 comes in a fifth of the cases at most, and not much rarer."""
    random = np.random.default_rng(1)
    found = []
    for _ in range(100):
        right = random.random(90) < 0.6
        (gap,) = group_gaps([task(["a", "b", "c"] * 30)], [right], [None])
        found.append(gap.acc.p)
    assert 0.08 <= np.mean(np.array(found) <= 0.2) <= 0.32  # 0.2 +- three deviations of 100 draws


def test_the_interval_is_the_spread_of_gaps_of_new_draws() -> None:
    """Two groups far apart: the gap is a difference of means, whose deviation is known."""
    groups = [np.array([1.0] * 80 + [0.0] * 20), np.array([1.0] * 30 + [0.0] * 70), np.array([1.0] * 55 + [0.0] * 45)]
    found, error = range_interval(groups, resamples=4000), np.sqrt(0.8 * 0.2 / 100 + 0.3 * 0.7 / 100)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=0.02)


def write(path: Path, *groups: Any) -> Path:
    bare = {"query": "q", "choices": ["a", "b"], "gold": 0}
    rows = [bare if group == "none" else bare | {"group": group} for group in groups]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_groups_of_a_file(tmp_path: Path) -> None:
    found = read_task(write(tmp_path / "a.jsonl", "women", 3, None, "none"))
    assert [case.group for case in found.cases] == ["women", "3", None, None]
    cloze = tmp_path / "c.jsonl"
    cloze.write_text(json.dumps({"context": "a b", "continuation": "c", "group": "x"}))
    options = tmp_path / "o.jsonl"
    options.write_text(json.dumps({"context_options": ["a", "b"], "continuation": "c", "gold": 0, "group": "y"}))
    assert [read_task(file).cases[0].group for file in (cloze, options)] == ["x", "y"]


@pytest.mark.parametrize("group", [True, 1.5, ["a"], "  ", "\ud800"])
def test_what_is_no_group_is_refused(group: Any, tmp_path: Path) -> None:
    with pytest.raises(SupremumError, match=r"a\.jsonl: line 2"):
        read_task(write(tmp_path / "a.jsonl", "x", group))
