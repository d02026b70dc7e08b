"""Gaps between groups of people, or of anything that cases are marked with.

    by the cases' field "group" (two values or more)     the greatest accuracy of a group less the least
    by file names (set_female, set_male)                 accuracy of the second file less the first, paired where line i of
                                                         both has the same choices

The first is never negative, and above zero by chance alone: its interval draws each group's cases with replacement and takes
greatest less least anew (Efron 1979), and its p is the share of 1,000 shufflings of the groups over the cases whose gap is as
great (Fisher 1935). The reference's figure is of the two groups that are the model's least and greatest. Cases without a
group count in the task's accuracy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .cases import Task
from .intervals import Interval, paired_mean, range_interval, unpaired_mean, wilson

FILES = ("female", "male")  # last parts of the names of files that differ in the group of people alone


@dataclass(frozen=True)
class GroupGap:
    """Accuracy on the second of `groups` less that on the first, for the model and its reference. Of a file whose cases have
    groups these are its least and its most accurate one; `by_group`: the accuracy of each of them."""

    name: str
    groups: tuple[str, str]
    paired: bool
    acc: Interval
    acc_reference: Interval | None = None
    by_group: Mapping[str, Interval] = field(default_factory=dict)


def group_gaps(tasks: Sequence[Task], right: Sequence[np.ndarray], reference: Sequence[np.ndarray | None], *,
               seed: int = 0) -> Iterator[GroupGap]:
    """All gaps of these tasks. right: (N,) bool of each task, `reference`: the reference's."""
    for task, ours, theirs in zip(tasks, right, reference, strict=True):
        yield from _within(task, ours, theirs, seed)
    yield from _between(tasks, right, reference, seed)


def _within(task: Task, right: np.ndarray, reference: np.ndarray | None, seed: int) -> Iterator[GroupGap]:
    places: dict[str, list[int]] = {}
    for place, case in enumerate(task.cases):
        if case.group is not None:
            places.setdefault(case.group, []).append(place)
    if len(places) < 2:
        return
    rates = {name: wilson(int(right[found].sum()), len(found)) for name, found in sorted(places.items())}
    ordered = sorted(rates, key=lambda name: rates[name].value)
    worst, best = (places[ordered[at]] for at in (0, -1))
    before = unpaired_mean(reference[worst], reference[best], seed=seed) if reference is not None else None
    yield GroupGap(task.name, (ordered[0], ordered[-1]), False, _range(right, places, seed), before, rates)


def _range(right: np.ndarray, places: Mapping[str, Sequence[int]], seed: int) -> Interval:
    groups = [right[places[name]] for name in sorted(places)]
    found = range_interval(groups, seed=seed)
    return replace(found, p=_by_chance(groups, found.value, seed))


def _by_chance(groups: Sequence[np.ndarray], gap: float, seed: int, shuffles: int = 1000) -> float:
    """The share of shufflings whose gap is as great as `gap`, this one counted among them."""
    random, every_N = np.random.default_rng(seed), np.concatenate(groups).astype(float)
    ends = np.cumsum([len(group) for group in groups])
    sizes = np.diff(ends, prepend=0)
    as_great = 1
    for _ in range(shuffles):
        sums = np.diff(random.permutation(every_N).cumsum()[ends - 1], prepend=0)
        means = sums / sizes
        as_great += means.max() - means.min() >= gap - 1e-12
    return float(as_great / (shuffles + 1))


def _between(tasks: Sequence[Task], right: Sequence[np.ndarray], reference: Sequence[np.ndarray | None], seed: int) \
        -> Iterator[GroupGap]:
    places = {task.name: index for index, task in enumerate(tasks)}
    first, second = FILES
    for name, one in places.items():
        stem, _, change = name.partition(", ")
        other = places.get(name.replace(f"_{first}", f"_{second}"))
        if not stem.endswith(f"_{first}") or other is None:
            continue
        stem = stem.removesuffix(f"_{first}") + (f", {change}" if change else "")
        paired = [set(case.answers) for case in tasks[one].cases] == [set(case.answers) for case in tasks[other].cases]
        less = paired_mean if paired else unpaired_mean
        before, after = reference[one], reference[other]
        yield GroupGap(stem, FILES, paired, less(right[one], right[other], seed=seed),
                       less(before, after, seed=seed) if before is not None and after is not None else None,
                       {group: wilson(int(right[place].sum()), len(right[place]))
                        for group, place in zip(FILES, (one, other), strict=True)})
