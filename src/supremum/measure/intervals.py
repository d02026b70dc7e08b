"""How far a figure can be trusted: bootstrap intervals, paired bootstrap, exact McNemar, Wilson.

    bootstrap    draw n items with replacement, score them, R times; the interval is the middle 95 % (Efron 1979)
    paired       the same draw for both systems; p = 2 min(#{d <= 0}, #{d >= 0}) / R, counted with one draw more
    McNemar      of k flips between right and wrong, those gained are Binomial(k, 1/2) if nothing changed: exact, two-sided
    Wilson       (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n): a proportion, at 0 and 1 too

Items must be independent: give windows or documents, not the tokens in them. Everything is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 1000
DRAWN = 1 << 19  # items that are drawn at one time
Metric = Callable[..., "float | Mapping[str, float]"]


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds between which `level` of its draws lie; `p` of "no difference" where two are compared."""

    value: float
    low: float
    high: float
    level: float = 0.95
    p: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Any, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """Bootstrap interval of the mean of `values` (N,)."""
    values_N = _column(values)
    return _interval(float(values_N.mean()), _means(values_N, resamples, seed), level)


def bootstrap(metric: Metric, *columns: Sequence[Any], key: str | None = None, resamples: int = RESAMPLES, seed: int = 0,
              level: float = 0.95) -> Interval:
    """Bootstrap interval of metric(*columns), columns of N items each (labels, predictions); `key` picks from a dict.

        bootstrap(classification, labels, predicted, key="f1_macro")
    """
    size = _size(columns)
    draws = [_score(metric, columns, key, pick) for picks in _draws(size, resamples, seed) for pick in picks]
    return _interval(_score(metric, columns, key), draws, level)


def ratio_interval(sums: Any, counts: Any, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """Bootstrap interval of sum(sums) / sum(counts) over N groups, such as windows with some tokens of a kind in each."""
    sums_N, counts_N = _column(sums), _column(counts)
    _size([sums_N, counts_N])
    drawn = [(sums_N[picks].sum(1), counts_N[picks].sum(1)) for picks in _draws(len(sums_N), resamples, seed)]
    draws = np.concatenate([sums[counts > 0] / counts[counts > 0] for sums, counts in drawn])
    return _interval(float(sums_N.sum() / counts_N.sum()), draws, level)


def paired_mean(one: Any, other: Any, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """mean(other) - mean(one) of the same N items, with its interval and p."""
    difference_N = _column(other) - _column(one)
    return _interval(float(difference_N.mean()), _means(difference_N, resamples, seed), level, paired=True)


def unpaired_mean(one: Any, other: Any, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """mean(other) - mean(one) of different items, drawn apart, with its interval and p."""
    one_N, other_M = _column(one), _column(other)
    draws = _means(other_M, resamples, seed + 1) - _means(one_N, resamples, seed)
    return _interval(float(other_M.mean() - one_N.mean()), draws, level, paired=True)


def range_interval(groups: Sequence[Any], *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """Bootstrap interval of the greatest less the least mean of G groups of items, each drawn apart. It is never negative."""
    columns = [_column(group) for group in groups]
    draws_GR = np.stack([_means(group_N, resamples, seed + place) for place, group_N in enumerate(columns)])
    means_G = np.array([group_N.mean() for group_N in columns])
    return _interval(float(np.ptp(means_G)), np.ptp(draws_GR, axis=0), level)


def paired_bootstrap(metric: Metric, one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]], *, key: str | None = None,
                     resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> Interval:
    """metric(*other) - metric(*one) over the same N items, with its interval and p.

        paired_bootstrap(answers, (references, first), (references, second), key="f1")
    """
    size = _size([*one, *other])

    def difference(pick: np.ndarray | None = None) -> float:
        return _score(metric, other, key, pick) - _score(metric, one, key, pick)

    draws = [difference(pick) for picks in _draws(size, resamples, seed) for pick in picks]
    return _interval(difference(), draws, level, paired=True)


@dataclass(frozen=True)
class Compared:
    """A figure with its interval and, of a reference on the same items, the same and the paired difference to it."""

    value: Interval
    reference: Interval | None = None
    change: Interval | None = None


def compare_all(metric: Callable[..., Mapping[str, float]], columns: Sequence[Any], reference: Sequence[Any] | None = None, *,
                resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> dict[str, Compared]:
    """Every figure of metric(*columns), and of metric(*reference) over the same N items, all from the same draws: what
    `bootstrap` and `paired_bootstrap` give for each `key`. Columns are arrays of N rows. A draw in which a figure is not
    defined (NaN) does not count for it; a figure that is not defined at all is left out.
    """
    sides = [columns] if reference is None else [columns, reference]
    size = _size([column for side in sides for column in side])
    whole = [metric(*side) for side in sides]
    drawn = [[metric(*(column[pick] for column in side)) for side in sides]
             for picks in _draws(size, resamples, seed) for pick in picks]

    names = [name for name in whole[0] if all(math.isfinite(one[name]) for one in whole)]
    value_SK = np.array([[one[name] for name in names] for one in whole])
    draws_RSK = np.array([[[one[name] for name in names] for one in draw] for draw in drawn])

    def interval(value: float, draws_R: np.ndarray, paired: bool = False) -> Interval:
        return _interval(float(value), draws_R[np.isfinite(draws_R)], level, paired=paired)

    found = {}
    for place, name in enumerate(names):
        value_S, draws_RS = value_SK[:, place], draws_RSK[:, :, place]
        each = [interval(value_S[side], draws_RS[:, side]) for side in range(len(sides))]
        change = None if reference is None else interval(value_S[0] - value_S[1], draws_RS[:, 0] - draws_RS[:, 1], True)
        found[name] = Compared(each[0], None if reference is None else each[1], change)
    return found


def mcnemar(before: Any, after: Any) -> dict[str, float]:
    """Flips between two systems that were right (N,) bool on the same items: gained, lost, and the exact p."""
    from scipy.stats import binomtest

    before_N, after_N = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    _size([before_N, after_N])
    gained, lost = int((~before_N & after_N).sum()), int((before_N & ~after_N).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": float(p)}


def wilson(hits: int, total: int, *, level: float = 0.95) -> Interval:
    """The proportion hits / total with its Wilson interval."""
    if not 0 <= hits <= total or not total:
        raise ValueError(f"{hits} of {total}")
    z, share = NormalDist().inv_cdf(0.5 + level / 2), hits / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = (middle - half) / scale if hits else 0.0, (middle + half) / scale if hits < total else 1.0
    return Interval(share, low, high, level)


def _score(metric: Metric, columns: Sequence[Sequence[Any]], key: str | None, pick: np.ndarray | None = None) -> float:
    if pick is not None:
        columns = [column[pick] if isinstance(column, np.ndarray) else [column[i] for i in pick] for column in columns]
    found = metric(*columns)
    if isinstance(found, Mapping):
        if key is None:
            raise ValueError(f"the metric gives {', '.join(found)}: name one as `key`")
        return float(found[key])
    return float(found)


def _draws(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draws (k, size) of items, `resamples` in all."""
    random = np.random.default_rng(seed)
    most = max(1, DRAWN // size)
    for start in range(0, resamples, most):
        yield random.integers(size, size=(min(most, resamples - start), size))


def _means(values_N: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    return np.concatenate([values_N[picks].mean(1) for picks in _draws(len(values_N), resamples, seed)])


def _interval(value: float, draws: Sequence[float] | np.ndarray, level: float, *, paired: bool = False) -> Interval:
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    p = None
    if paired:
        drawn = np.asarray(draws)
        p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn)))
    return Interval(value, float(low), float(high), level, None if p is None else float(p))


def _column(values: Any) -> np.ndarray:
    column_N = np.asarray(values, dtype=np.float64)
    if column_N.ndim != 1 or not len(column_N):
        raise ValueError(f"one number an item, not {column_N.shape}")
    return column_N


def _size(columns: Sequence[Any]) -> int:
    sizes = {len(column) for column in columns}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"columns of {sorted(sizes)} items")
    return sizes.pop()
