"""The third limit as one document: what measured runs say of more parameters, data and compute, and what others found.

All that is fitted is an estimate; what the runs reached is measured; published laws and trends are other people's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SupremumError
from ..plain import plain
from .best import Best, Budget, best, choices
from .constants import Constants, constants
from .forecast import check, predict, rehearse
from .law import Law
from .runs import Run, read_runs
from .scaling import DRAWS, LEVEL, Fit, fit_runs

SCHEMA = "supremum-scaling/1"
LAWS = ("chinchilla_2022", "besiroglu_2024", "muennighoff_2023_loss", "kumar_2024_loss")
TRENDS = {"densing": "parameters for the same score", "pretraining_compute": "compute for the same loss",
          "price": "price of the same score", "price_task": "price of the same task"}
USUAL_COMPUTE = 1e21  # of the published laws' table, where no budget is given


def statistical_limit(path: Path | str, *, budget: Budget | None = None, data: float | None = None,
                      wanted: Sequence[tuple[float, float]] = (), held_out: Sequence[str] = (), extrapolate: bool = False,
                      seed: int = 0, draws: int = DRAWS) -> dict[str, Any]:
    """The fit of the runs in `path`, and what it says: of `wanted` (parameters, tokens) drawn from `data` different tokens,
    of the runs named in `held_out`, which the fit does not see, and of a budget."""
    runs = read_runs(path)
    kept, held = _split(runs, held_out, path)
    fit = fit_runs(kept, seed=seed, draws=draws)
    said = [predict(fit, *pair, unique=min(data, pair[1]) if data else None, extrapolate=extrapolate, seed=seed)
            for pair in wanted]
    answer = best(fit, budget, extrapolate=extrapolate, seed=seed) if budget else None
    return dict(plain({
        "schema": SCHEMA, "source": str(path), "runs": kept, "law": fit.law, "intervals": fit.intervals, "level": LEVEL,
        "draws": [[law.alpha, law.beta] for law in fit.draws], "residuals": fit.residuals, "flops": fit.flops,
        "identified": fit.identified, "doubts": fit.doubts, "notes": [*fit.notes, *_said_of(answer)], "predictions": said,
        "held_out": check(fit, held, extrapolate=extrapolate, seed=seed), "rehearsal": rehearse(kept, seed=seed),
        "best": answer,
        "frontier": frontier(fit) if fit.identified else [], "fits": fitted_curves(fit, held), **published(budget)}))


def published(budget: Budget | None = None) -> dict[str, Any]:
    """Other people's laws, each with its answer to the budget, and trends, each with what a year of it means."""
    asked = budget or Budget(USUAL_COMPUTE)
    rows = []
    for name in LAWS:
        row, law = constants()[f"scaling.{name}"], published_law(name)
        rows.append({**_source(row), "form": row.form, "values": row.values, "errors": row.errors,
                     "choice": choices(law, asked)[0]})
    trends = []
    for name, what in TRENDS.items():
        row = constants()[f"trend.{name}"]
        key, value = next(iter(row.values.items()))
        bounds = row.intervals.get(key)
        trends.append({**_source(row), "what": what, "value": value, "unit": row.unit, "interval": bounds,
                       "factor_a_year": _yearly(key, value),
                       "factor_interval": sorted(_yearly(key, at) for at in bounds) if bounds else None})
    return dict(plain({"published": rows, "published_budget": asked, "trends": trends}))


def published_law(name: str) -> Law:
    """A published law with the published forms of repeated data and of bits."""
    rows = (name, "muennighoff_2023", "kumar_2024_train")
    found, repeated, precise = (constants()[f"scaling.{row}"].values for row in rows)
    E, A, B, alpha, beta = (found[key] for key in ("E", "A", "B", "alpha", "beta"))
    return Law(E, A, B, alpha, beta, repeated["R_D"], repeated["R_N"], precise["gamma_w"], precise["n_w"])


def frontier(fit: Fit, points: int = 33) -> list[dict[str, float]]:
    """The least loss of compute, data without end: from the runs' least to ten times their most."""
    spent = [fit.flops * run.params * run.tokens for run in fit.runs]
    rows = []
    for compute in np.geomspace(min(spent), 10 * max(spent), points):
        params, tokens, loss = fit.law.frontier(compute, fit.flops)
        drawn = [law.frontier(compute, fit.flops)[2] for law in fit.draws if law.A > 0 and law.B > 0]
        low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if drawn else (math.nan, math.nan)
        rows.append({"compute": float(compute), "params": float(params), "tokens": float(tokens), "loss": float(loss),
                     "low": min(float(low), float(loss)), "high": max(float(high), float(loss))})
    return rows


def fitted_curves(fit: Fit, held: Sequence[Run]) -> list[dict[str, Any]]:
    """The law along parameters, at each number of tokens that the runs have, as far as the runs and those held out go."""
    runs = [*fit.runs, *held]
    params = np.geomspace(min(run.params for run in runs) / 1.5, max(run.params for run in runs) * 1.5, 25)
    unique = {run.tokens: run.unique_tokens for run in runs}
    return [{"tokens": tokens, "params": params.tolist(), "loss": fit.law.loss(params, tokens, unique[tokens]).tolist()}
            for tokens in sorted(unique)[:12]]


def _split(runs: Sequence[Run], names: Sequence[str], path: Path | str) -> tuple[list[Run], list[Run]]:
    known = {run.name for run in runs if run.name}
    for name in names:
        if name not in known:
            shown = ", ".join(sorted(known)[:8]) or "none has a name"
            raise SupremumError(f"{path}: holds no run named {name!r}.", f"Names there: {shown}.")
    return [run for run in runs if run.name not in names], [run for run in runs if run.name in names]


def _said_of(answer: Best | None) -> list[str]:
    if answer is None:
        return []
    said = ["A budget's bytes are those of the parameters at their bits; tables, scales and headers come on top."]
    if answer.budget.nbytes is not None:
        said.append("Bits are those that weights are trained in; rounding afterwards costs more, and grows with the tokens.")
    if answer.budget.data is not None:
        said.append("Parameters that the different tokens cannot fill fade as other people found (R_N).")
    return said


def _source(row: Constants) -> dict[str, Any]:
    return {"name": row.name, "source": row.source, "date": row.date, "checked": row.verified}


def _yearly(key: str, value: float) -> float:
    """The factor of one year, from a halving time in months or from the factor itself."""
    return 2 ** (12 / value) if key == "months" else value
