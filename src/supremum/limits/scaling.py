"""The statistical limit: what more parameters or more data would give, from a ladder of measured runs.

    minimise  sum_runs Huber_delta(log L(N, D) - log loss),   delta = 1e-3    (Hoffmann et al. 2203.15556, approach 3)

by variable projection: for each (alpha, beta) the best E, A, B >= 0 are found by Gauss-Newton steps on the logarithm, each a
weighted non-negative least squares of three unknowns (solved exactly: all supports are tried), and the search itself is in
the plane of alpha and beta. R_D of repeated data and gamma of the bits are fitted where the runs vary them, and other
people's otherwise. Intervals: the runs are drawn again with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar

from .constants import constants
from .law import REFERENCE_BITS, Law, effective, worth_of_bits
from .runs import Run, refuse_too_few

Array = NDArray[np.float64]
DELTA = 1e-3
LOWEST, HIGHEST = 0.02, 3.0  # exponents searched
DRAWS, LEVEL = 400, 0.95
MANY_EPOCHS = 4.0  # up to here repeated data is nearly as good as new, and says nothing about R_D


@dataclass(frozen=True)
class Fit:
    law: Law
    runs: tuple[Run, ...]
    draws: tuple[Law, ...]  # the law of each set of runs drawn again
    residuals: tuple[float, ...]  # log measured - log fitted
    intervals: dict[str, tuple[float, float]]
    condition: float  # of the Jacobian in (ln E, ln A, ln B, alpha, beta), its columns scaled to length one
    fitted: tuple[str, ...]  # of "repeats" and "gamma", those that the runs themselves tell
    doubts: tuple[str, ...] = ()  # why the exponents are not identified; empty: they are
    notes: tuple[str, ...] = ()
    flops: float = 6.0  # a parameter and token of training

    @property
    def identified(self) -> bool:
        return not self.doubts


def fit_runs(runs: Sequence[Run], *, seed: int = 0, draws: int = DRAWS, flops: float | None = None) -> Fit:
    """Fit the law to `runs`. Raises SupremumError where they are too few; `doubts` say where they are too alike."""
    refuse_too_few(list(runs))
    repeated, precise = (constants()[f"scaling.{name}"].values for name in ("muennighoff_2023", "kumar_2024_train"))
    repeats, excess, gamma, shift = repeated["R_D"], repeated["R_N"], precise["gamma_w"], precise["n_w"]
    loss, reference = np.array([run.loss for run in runs]), max(run.bits or REFERENCE_BITS for run in runs)
    once = np.ones((1, len(runs)))

    def features(gamma: float, shift: float, repeats: float) -> tuple[Array, Array]:
        bits = np.array([run.bits or reference for run in runs])
        n = np.array([run.params for run in runs]) * worth_of_bits(bits, gamma, shift, reference)
        d = effective(np.array([run.tokens for run in runs]), np.array([run.unique_tokens for run in runs]), repeats)
        return np.log(n), np.log(d)

    fitted: list[str] = []
    if len({run.bits for run in runs if run.bits}) >= 3:
        gamma, shift = _outer(lambda at: _search(*features(at, 0.0, repeats), loss, once)[0][0], 0.2, 20.0), 0.0
        fitted.append("gamma")
    if sum(run.tokens > MANY_EPOCHS * run.unique_tokens for run in runs) >= 3:
        repeats = _outer(lambda at: _search(*features(gamma, shift, at), loss, once)[0][0], 0.3, 300.0)
        excess = math.inf  # theirs belongs to their R_D
        fitted.append("repeats")

    ln_n, ln_d = features(gamma, shift, repeats)
    centre_n, centre_d = float(ln_n.mean()), float(ln_d.mean())
    ln_n, ln_d = ln_n - centre_n, ln_d - centre_d

    def law(place: Array, c: Array) -> Law:
        alpha, beta = (float(at) for at in np.exp(place))
        a, b = float(c[1]) * math.exp(alpha * centre_n), float(c[2]) * math.exp(beta * centre_d)
        return Law(float(c[0]), a, b, alpha, beta, repeats, excess, gamma, shift, reference)

    _, place, _ = _search(ln_n, ln_d, loss, once)
    polished = minimize(lambda at: _profile(at[None], ln_n, ln_d, loss, once, 80)[0][0], place[0], method="Nelder-Mead",
                        options={"xatol": 1e-7, "fatol": 1e-15, "maxiter": 80,
                                 "initial_simplex": place[0] + 2e-3 * np.array([[0, 0], [1, 0], [0, 1]])})
    at = np.clip(polished.x, math.log(LOWEST), math.log(HIGHEST))
    best = _profile(at[None], ln_n, ln_d, loss, once, 200)[1][0]
    found = law(at, best)
    fits = best[0] + best[1] * np.exp(-found.alpha * ln_n) + best[2] * np.exp(-found.beta * ln_d)
    laws = [law(*pair) for pair in _bootstrap(ln_n, ln_d, loss, seed, draws)]
    condition = _condition(best, found, ln_n, ln_d, fits)
    tail = 50 * (1 - LEVEL)
    intervals = {name: tuple(float(x) for x in np.percentile([getattr(drawn, name) for drawn in laws], [tail, 100 - tail]))
                 for name in ("E", "A", "B", "alpha", "beta")} if laws else {}
    given = [run.flops / (run.params * run.tokens) for run in runs if run.flops]
    residual, given = np.log(loss / fits), [run.flops / (run.params * run.tokens) for run in runs if run.flops]
    return Fit(found, tuple(runs), tuple(laws), tuple(float(x) for x in residual), intervals,  # type: ignore[arg-type]
               condition, tuple(fitted), tuple(_doubts(runs, found, laws, ln_n, ln_d, condition, residual)),
               tuple(_notes(fitted, draws, laws)), flops or (float(np.median(given)) if given else 6.0))


def _profile(place_P2: Array, ln_n: Array, ln_d: Array, loss: Array, counts_Pn: Array, steps: int) -> tuple[Array, Array]:
    """(least sum of Huber, its E, A, B) at each place (ln alpha, ln beta), runs counted `counts` times."""
    exponent_P2 = np.exp(np.clip(place_P2, math.log(LOWEST), math.log(HIGHEST)))
    x_Pn3 = np.stack(np.broadcast_arrays(1.0, np.exp(-exponent_P2[:, :1] * ln_n), np.exp(-exponent_P2[:, 1:] * ln_d)), -1)
    fits_Pn, weight_Pn = np.broadcast_to(loss, counts_Pn.shape), counts_Pn
    best_P, best_P3 = np.full(len(x_Pn3), np.inf), np.zeros((len(x_Pn3), 3))
    for _ in range(steps):
        weighted = x_Pn3 * (weight_Pn / fits_Pn**2)[..., None]
        target_Pn = fits_Pn * (1 + np.log(loss / fits_Pn))
        c_P3 = _nonnegative(weighted.swapaxes(1, 2) @ x_Pn3, np.einsum("pni,pn->pi", weighted, target_Pn))
        fits_Pn = np.maximum(np.einsum("pni,pi->pn", x_Pn3, c_P3), 1e-9 * loss)
        residual = np.abs(np.log(fits_Pn / loss))
        huber = np.where(residual < DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2))
        value_P = (counts_Pn * huber).sum(1)
        better = value_P < best_P
        gained = np.where(better, best_P - value_P, 0.0)
        best_P, best_P3 = np.where(better, value_P, best_P), np.where(better[:, None], c_P3, best_P3)
        if gained.max() < 1e-16:
            break
        weight_Pn = counts_Pn * np.minimum(1, DELTA / np.maximum(residual, 1e-300))
    return best_P, best_P3


def _nonnegative(gram_P33: Array, right_P3: Array) -> Array:
    """min c'Gc - 2 r'c over c >= 0, exactly: the whole support where it is feasible, else the best of the smaller ones."""
    c_P3 = _solve(gram_P33, right_P3)
    wrong = np.flatnonzero(~np.isfinite(c_P3).all(1) | (c_P3 < 0).any(1))
    if len(wrong):
        gram, right = gram_P33[wrong], right_P3[wrong]
        best, least = np.zeros_like(right), np.zeros(len(wrong))
        for support in ((1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            mask = np.array(support, float)
            c = _solve(gram * np.outer(mask, mask) + np.diag(1 - mask), right * mask)
            value = np.where(np.isfinite(c).all(1) & (c >= 0).all(1), -(right * c).sum(1), np.inf)
            best, least = np.where((value < least)[:, None], c, best), np.minimum(value, least)
        c_P3[wrong] = best
    return c_P3


def _solve(a_P33: Array, r_P3: Array) -> Array:
    """a x = r for many symmetric 3 x 3 matrices, by cofactors."""
    a, b, c, d, e, f = (a_P33[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)))
    first, second, third = d * f - e * e, c * e - b * f, b * e - c * d
    r, s, t = r_P3.T
    with np.errstate(all="ignore"):
        x_3P = np.stack([first * r + second * s + third * t, second * r + (a * f - c * c) * s + (b * c - a * e) * t,
                         third * r + (b * c - a * e) * s + (a * d - b * b) * t])
        return np.asarray((x_3P / (a * first + b * second + c * third)).T)


def _search(ln_n: Array, ln_d: Array, loss: Array, counts_Rn: Array) -> tuple[Array, Array, Array]:
    """(least sum, (ln alpha, ln beta), (E, A, B)) for each row of counts: a coarse grid, then ever smaller ones."""
    axis = np.linspace(math.log(LOWEST * 1.5), math.log(HIGHEST / 1.2), 14)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    near = np.stack(np.meshgrid(*[np.arange(-2, 3) / 1.5] * 2), -1).reshape(-1, 2)
    centre_R2, step_R = np.zeros((len(counts_Rn), 2)), np.full(len(counts_Rn), axis[1] - axis[0])
    centred = ln_n - ln_n.mean(), ln_d - ln_d.mean()
    for turn in range(15):
        offset = grid if turn == 0 else near
        place_RG2 = centre_R2[:, None] + offset * (1.0 if turn == 0 else step_R[:, None, None])
        place_RG2 = np.clip(place_RG2, math.log(LOWEST), math.log(HIGHEST))
        counts = np.repeat(counts_Rn, len(offset), axis=0)
        value, c = _profile(place_RG2.reshape(-1, 2), *centred, loss, counts, 8 if turn < 8 else 14)
        value_RG = value.reshape(len(counts_Rn), -1)
        chosen = value_RG.argmin(1)
        rows = np.arange(len(counts_Rn))
        inner = np.abs(offset[chosen]).max(1) < 1.3
        step_R = np.where(inner | (turn == 0), step_R * 0.55, step_R)
        centre_R2, best_R3 = place_RG2[rows, chosen], c.reshape(len(counts_Rn), -1, 3)[rows, chosen]
    return value_RG[rows, chosen], centre_R2, best_R3


def _bootstrap(ln_n: Array, ln_d: Array, loss: Array, seed: int, draws: int) -> list[tuple[Array, Array]]:
    """(place, coefficients) of runs drawn with replacement. Draws that a law of five parameters would pass through
    (fewer than six different runs, or one size or length only) are drawn again."""
    generator, n = np.random.default_rng(seed), len(loss)
    counts: list[Array] = []
    for _ in range(50 * draws):
        if len(counts) == draws:
            break
        count = np.bincount(generator.integers(n, size=n), minlength=n).astype(float)
        kept = count > 0
        if kept.sum() >= min(6, n - 1) and len(set(ln_n[kept])) > 1 and len(set(ln_d[kept])) > 1:
            counts.append(count)
    found: list[tuple[Array, Array]] = []
    for start in range(0, len(counts), 50):
        _, place, c = _search(ln_n, ln_d, loss, np.array(counts[start : start + 50]))
        found += list(zip(place, c, strict=True))
    return found


def _outer(objective: Any, low: float, high: float) -> float:
    """The least of a function of one positive number."""
    grid = np.geomspace(low, high, 13)
    index = int(np.argmin([objective(at) for at in grid]))
    bounds = math.log(grid[max(0, index - 1)]), math.log(grid[min(len(grid) - 1, index + 1)])
    return math.exp(minimize_scalar(lambda at: objective(math.exp(at)), bounds=bounds, method="bounded",
                                    options={"xatol": 1e-3}).x)


def _condition(c: Array, law: Law, ln_n: Array, ln_d: Array, fits: Array) -> float:
    a, b = c[1] * np.exp(-law.alpha * ln_n), c[2] * np.exp(-law.beta * ln_d)
    jacobian = np.stack([np.full_like(a, c[0]), a, b, -a * ln_n, -b * ln_d], 1) / fits[:, None]
    lengths = np.linalg.norm(jacobian, axis=0)
    if (lengths == 0).any():
        return math.inf
    return float(np.linalg.cond(jacobian / lengths))


def _doubts(runs: Sequence[Run], law: Law, laws: Sequence[Law], ln_n: Array, ln_d: Array, condition: float,
            residual: Array) -> list[str]:
    """Why these runs cannot tell the exponents, each reason a sentence."""
    said = []
    thin = np.linalg.svd(np.stack([ln_n - ln_n.mean(), ln_d - ln_d.mean()], 1), compute_uv=False)[-1] / math.sqrt(len(ln_n))
    if thin < 0.05:
        said.append("All runs lie on one line of log tokens over log parameters, so what parameters give and what data give "
                    "cannot be told apart.")
    for what, attribute in (("parameters", "params"), ("tokens", "tokens")):
        if len({getattr(run, attribute) for run in runs}) < 3:
            said.append(f"Two numbers of {what} fix a slope but no exponent; a third is needed.")
    spread, left = float(np.std(np.log([run.loss for run in runs]))), float(np.std(residual))
    if left > spread / 2:
        said.append(f"The runs are flat: their losses differ by {100 * spread:.2g} % (one deviation), and "
                    f"by {100 * left:.2g} % from the best law.")
    if law.E <= 0:
        said.append("The fit of E ended at 0: these runs do not tell the loss that neither parameters nor tokens remove.")
    elif condition > 1e4:
        said.append(f"The condition number of the fit is {condition:.1e}: other exponents fit the runs as well.")
    for name, greek in (("alpha", law.A), ("beta", law.B)):
        value = getattr(law, name)
        if greek == 0 or not 1.05 * LOWEST < value < HIGHEST / 1.05:
            said.append(f"The fit of {name} ended at the edge of what was searched ({value:.3g}).")
            continue
        if laws:
            low, high = np.percentile([getattr(drawn, name) for drawn in laws], [2.5, 97.5])
            if high - low > value:
                said.append(f"The interval of {name} ({low:.2f} to {high:.2f}) is wider than its value ({value:.2f}).")
    return said


def _notes(fitted: Sequence[str], draws: int, laws: Sequence[Law]) -> list[str]:
    said = [f"{100 * LEVEL:.0f} % intervals: percentiles of {len(laws)} fits to runs drawn with replacement."]
    if len(laws) < draws:
        said.append(f"Of {draws} draws wanted, {len(laws)} had six different runs of several sizes and lengths.")
    for name, text in (("repeats", "R of repeated data"), ("gamma", "gamma of the precision law")):
        said.append(f"{text}: " + ("fitted to these runs, and held there in the intervals." if name in fitted else
                                   "other people's, since these runs do not vary it enough."))
    said.append("The law holds for this corpus, tokenizer, architecture and training recipe alone.")
    return said


__all__ = ["Fit", "fit_runs"]
