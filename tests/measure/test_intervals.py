"""Intervals against theory: coverage, exact binomial sums, Wilson's published example."""

from __future__ import annotations

import math

import numpy as np
import pytest

from supremum.measure.intervals import (
    bootstrap,
    compare_all,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_mean,
    wilson,
)
from supremum.measure.metrics import classification


def test_the_mean_s_interval_covers_it_and_has_the_normal_s_width():
    random = np.random.default_rng(1)
    covered, widths = 0, []
    for trial in range(100):
        got = mean_interval(random.normal(3, 2, 100), resamples=200, seed=trial)
        covered += got.low <= 3 <= got.high
        widths.append(got.high - got.low)
    assert 88 <= covered <= 99  # 95 % of 100; percentile intervals of 100 items cover a little less
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 10, rel=0.05)


def test_seeds_repeat_and_differ():
    values = np.arange(50.0)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values)
    assert mean_interval(values, level=0.5).low > mean_interval(values).low


def test_any_metric_has_an_interval():
    def accuracy(true, said):
        return float(np.mean([a == b for a, b in zip(true, said, strict=True)]))

    true, said = ["a", "b"] * 30, ["a"] * 60
    got = bootstrap(accuracy, true, said, resamples=300)
    assert got == mean_interval([1.0, 0.0] * 30, resamples=300)  # the same draws: accuracy is a mean
    assert bootstrap(classification, true, said, key="accuracy", resamples=20).value == 0.5
    with pytest.raises(ValueError, match="name one as `key`"):
        bootstrap(classification, true, said, resamples=2)
    with pytest.raises(ValueError, match=r"columns of \[1, 2\] items"):
        bootstrap(accuracy, ["a"], ["a", "b"])


def test_pairs_see_what_their_spread_hides():
    random = np.random.default_rng(2)
    base = random.normal(0, 10, 200)
    better = base + random.normal(0.5, 1, 200)
    got = paired_mean(base, better)
    assert got.low > 0.2 and got.high < 0.8 and got.p is not None and got.p < 0.01
    assert mean_interval(base).high > mean_interval(better).low  # apart, the intervals overlap
    assert paired_mean(base, base).p == 1
    same = paired_bootstrap(lambda a: float(np.mean(a)), (base,), (better,), resamples=200)
    assert same.value == pytest.approx(got.value)
    assert same.low == pytest.approx(paired_mean(base, better, resamples=200).low)


def test_p_is_uniform_when_nothing_differs():
    random = np.random.default_rng(3)
    values = [paired_mean(random.normal(size=60), random.normal(size=60), resamples=300, seed=s).p for s in range(150)]
    assert np.mean([p < 0.1 for p in values]) == pytest.approx(0.1, abs=0.07)
    assert np.mean(values) == pytest.approx(0.5, abs=0.08)


def test_mcnemar_is_the_binomial_sum():
    before = [True] * 10 + [False] * 12
    after = [True] * 7 + [False] * 3 + [True] * 9 + [False] * 3  # lost 3, gained 9
    got = mcnemar(before, after)
    assert (got["gained"], got["lost"]) == (9, 3)
    assert got["p"] == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    assert mcnemar(before, before) == {"gained": 0, "lost": 0, "p": 1.0}
    assert mcnemar([True, False], [False, True])["p"] == 1


def test_wilson_s_interval():
    got = wilson(81, 263)  # the worked example of Newcombe (1998), table I
    assert (got.low, got.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    none = wilson(0, 20)
    assert none.low == 0 and none.high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-5)
    assert wilson(20, 20).high == 1 and wilson(20, 20).low == pytest.approx(1 - none.high)
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_all_figures_at_once_are_those_of_one_at_a_time():
    random = np.random.default_rng(4)
    true, one, other = (random.integers(3, size=60) for _ in range(3))

    def figures(true, said):
        return {"accuracy": float((true == said).mean()), "of ones": float((said[true == 1] == 1).mean()) if (true == 1).any()
                else math.nan, "never": math.nan}

    found = compare_all(figures, [true, one], [true, other], seed=2)
    assert found.keys() == {"accuracy", "of ones"}
    for name, each in found.items():
        assert each.value == bootstrap(figures, true, one, key=name, seed=2)
        assert each.reference == bootstrap(figures, true, other, key=name, seed=2)
        assert each.change == paired_bootstrap(figures, (true, other), (true, one), key=name, seed=2)
    alone = compare_all(figures, [true, one], seed=2)["accuracy"]
    assert alone.value == found["accuracy"].value and alone.reference is None and alone.change is None
    rare = compare_all(figures, [np.array([1, 0, 0]), np.array([1, 0, 1])])["of ones"]  # no such row in a third of draws
    assert rare.value.value == rare.value.low == rare.value.high == 1
