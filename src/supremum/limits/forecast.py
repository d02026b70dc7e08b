"""What a run not yet done would reach, with the interval of what would be measured; and, once it is done, the error.

The interval: the laws of the drawn runs, each with one of the fit's residuals, enlarged for the five parameters that were
fitted to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SupremumError
from .runs import Run
from .scaling import LEVEL, Fit, fit_runs

DECADE = 10.0
PARAMETERS = 5


@dataclass(frozen=True)
class Prediction:
    params: float
    tokens: float
    unique_tokens: float
    bits: float | None
    loss: float
    low: float
    high: float
    extrapolates: str = ""  # the sentence to print, if it does
    name: str = ""
    measured: float | None = None  # once the run is done
    error: float | None = None  # predicted / measured - 1
    inside: bool | None = None


def predict(fit: Fit, params: float, tokens: float, *, unique: float | None = None, bits: float | None = None,
            extrapolate: bool = False, seed: int = 0, name: str = "") -> Prediction:
    """Raises SupremumError more than a decade beyond the runs, unless told to `extrapolate`."""
    sentence = check_reach(fit, params, tokens, extrapolate)
    loss = float(fit.law.loss(params, tokens, unique, bits))
    low, high = interval(fit, [law.loss(params, tokens, unique, bits) for law in fit.draws], loss, seed)
    return Prediction(params, tokens, unique or tokens, bits, loss, low, high, sentence, name)


def check(fit: Fit, runs: Sequence[Run], *, extrapolate: bool = False, seed: int = 0) -> list[Prediction]:
    """Predict each of `runs`, of which the fit knows nothing, and compare with what was measured."""
    rows = []
    for run in runs:
        said = predict(fit, run.params, run.tokens, unique=run.unique_tokens, bits=run.bits, extrapolate=extrapolate,
                       seed=seed, name=run.name)
        rows.append(Prediction(**{**vars(said), "measured": run.loss, "error": said.loss / run.loss - 1,
                                  "inside": said.low <= run.loss <= said.high}))
    return rows


def rehearse(runs: Sequence[Run], *, seed: int = 0, draws: int = 100) -> list[Prediction]:
    """The runs of the largest size, forecast from the smaller ones; none where these are too few to fit. It shows what no
    interval of the law can: whether the runs follow it."""
    largest = max(run.params for run in runs)
    try:
        fit = fit_runs([run for run in runs if run.params < largest], seed=seed, draws=draws)
    except SupremumError:
        return []
    return check(fit, [run for run in runs if run.params == largest], extrapolate=True, seed=seed)


def interval(fit: Fit, losses: Sequence[Any], middle: float, seed: int) -> tuple[float, float]:
    """Of what would be measured, from the losses that the drawn laws say."""
    if not losses:
        return math.nan, math.nan
    spread = math.sqrt(len(fit.runs) / max(1, len(fit.runs) - PARAMETERS))
    noise = np.random.default_rng(seed).choice(np.array(fit.residuals) * spread, len(losses))
    low, high = np.percentile(np.array(losses, float) * np.exp(noise), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return min(float(low), middle), max(float(high), middle)


def check_reach(fit: Fit, params: float, tokens: float, extrapolate: bool) -> str:
    """The sentence that says how far a point lies outside the runs, where that is over a decade; an error unless told."""
    said = []
    for what, value, values in (("parameters", params, [run.params for run in fit.runs]),
                                ("tokens", tokens, [run.tokens for run in fit.runs])):
        factor = max(value / max(values), min(values) / value)
        if factor > DECADE * (1 + 1e-9):
            said.append(f"{value:.3g} {what} are {factor:.3g} times beyond the runs ({min(values):.3g} to {max(values):.3g})")
    if not said:
        return ""
    sentence = f"Extrapolation over a decade: {' and '.join(said)}; no run supports the law there."
    if not extrapolate:
        raise SupremumError(sentence, "Measure a nearer run, or give --extrapolate to have the figure all the same.")
    return sentence
