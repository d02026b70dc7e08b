"""What each kind of code loses on a unit Gaussian, recomputed here: gap = rate - log2(1 / MSE) / 2, bits per weight.

An interval [a, b] of a Gaussian has mass P = Phi(b) - Phi(a), mean phi(a) - phi(b) over P and second moment
P + a phi(a) - b phi(b), so every scalar code below is a finite sum, and absmax scaling one quadrature over the law of
the largest of g magnitudes. Only the searched scale is sampled (with its standard error).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FormatGap:
    """One code on a unit Gaussian. `error`: standard error of the gap, 0 where it is computed without sampling."""

    name: str
    rate: float  # bits per weight, scales included
    mse: float
    gap: float
    error: float = 0.0


def gaussian_gap(rate: float, mse: float) -> float:
    """Bits per weight that a code of this rate and mean squared error loses on a unit Gaussian."""
    return rate - 0.5 * math.log2(1 / mse)


def _density(x: Array) -> Array:
    return np.asarray(np.exp(-0.5 * np.square(x)) / math.sqrt(2 * math.pi))


def _cells(edges: Array) -> tuple[Array, Array, Array]:
    """Mass, first and second moment of the cells between consecutive `edges` (finite)."""
    mass = np.diff(ndtr(edges))
    return mass, -np.diff(_density(edges)), mass - np.diff(edges * _density(edges))


def _error(edges: Array, levels: Array) -> float:
    mass, first, second = _cells(edges)
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def entropy_coded(step: float) -> tuple[float, float]:
    """(rate, mse) of a uniform scalar quantiser with this step, centroids, and an ideal entropy code."""
    half = math.ceil(12 / step) + 0.5
    edges = step * np.arange(-half, half + 1)
    mass, first, second = (part[_cells(edges)[0] > 1e-300] for part in _cells(edges))
    return float(-(mass * np.log2(mass)).sum()), float((second - first**2 / mass).sum())


@cache
def entropy_coded_gap(rate: float) -> FormatGap:
    """The uniform scalar quantiser under an ideal entropy code at `rate` >= 0.3 bits; 0.2546 from 1.5 bits up."""
    step = float(brentq(lambda s: entropy_coded(s)[0] - rate, 2.0 ** (0.5 - rate), 8.0))
    got, mse = entropy_coded(step)
    return FormatGap(f"entropy-coded {rate:g} bit", got, mse, gaussian_gap(got, mse))


@cache
def lloyd_max(bits: int) -> FormatGap:
    """The best fixed-length scalar quantiser of 2^bits levels (Lloyd's iteration to a fixed point)."""
    levels: Array = np.asarray(np.linspace(-1, 1, 2**bits) * (1 + 0.75 * bits))
    for _ in range(20_000):
        edges = np.concatenate([[-40.0], (levels[1:] + levels[:-1]) / 2, [40.0]])
        mass, first, _ = _cells(edges)
        moved: Array = np.asarray(first / mass, dtype=np.float64)
        still = float(np.abs(moved - levels).max())
        levels = moved
        if still < 1e-12:
            break
    edges = np.concatenate([[-40.0], (levels[1:] + levels[:-1]) / 2, [40.0]])
    mse = _error(edges, levels)
    return FormatGap(f"Lloyd-Max {bits} bit", bits, mse, gaussian_gap(bits, mse))


def _uniform_error(step: float, low: int, high: int, reach: float = 40.0, offset: float = 0.0) -> float:
    """MSE of x -> step (clip(round(x / step - offset), low, high) + offset) on a Gaussian cut off at +-`reach`."""
    levels: Array = np.asarray(step * (np.arange(low, high + 1) + offset))
    inner = np.clip((levels[1:] + levels[:-1]) / 2, -reach, reach)
    total = _error(np.concatenate([[-reach], inner, [reach]]), levels)
    return total / float(ndtr(reach) - ndtr(-reach))


@cache
def clipped_uniform(bits: int) -> FormatGap:
    """The best uniform quantiser of 2^bits levels, placed symmetrically, values beyond it clipped."""
    half = 2 ** (bits - 1)
    best = minimize_scalar(
        lambda step: _uniform_error(step, -half, half - 1, offset=0.5), bounds=(0.01, 3), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    return FormatGap(f"clipped {bits} bit", bits, float(best.fun), gaussian_gap(bits, float(best.fun)))


@cache
def absmax(bits: int, group: int, scale_bits: int = 16) -> FormatGap:
    """Symmetric integers, scale = largest magnitude of the group / (2^(bits-1) - 1): that value is exact, and the
    others are Gaussians cut off at it."""
    top = 2 ** (bits - 1) - 1

    def weighted(m: float) -> float:
        law = group * (2 * float(ndtr(m)) - 1) ** (group - 1) * 2 * float(_density(np.asarray(m)))
        return law * _uniform_error(m / top, -top, top, reach=m) * (group - 1) / group

    mse = float(quad(weighted, 1e-3, 8, limit=200, epsabs=1e-10)[0])
    rate = bits + scale_bits / group
    return FormatGap(f"INT{bits} g{group} absmax", rate, mse, gaussian_gap(rate, mse))


@cache
def searched(bits: int, group: int, scale_bits: int = 16, groups: int = 2000) -> FormatGap:
    """Symmetric integers -2^(bits-1) .. 2^(bits-1) - 1 with the best of 48 scales a group; sampled, seed 0."""
    x = np.random.default_rng(0).standard_normal((groups, group))
    peak = np.abs(x).max(1, keepdims=True) / 2 ** (bits - 1)
    best = np.full(groups, np.inf)
    for share in np.linspace(0.3, 1.15, 48):
        codes = np.clip(np.round(x / (share * peak)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        best = np.minimum(best, np.square(x - codes * share * peak).mean(1))
    mse, rate = float(best.mean()), bits + scale_bits / group
    error = float(best.std()) / math.sqrt(groups) / mse / (2 * math.log(2))
    return FormatGap(f"INT{bits} g{group} searched", rate, mse, gaussian_gap(rate, mse), error)


@cache
def format_gaps() -> tuple[FormatGap, ...]:
    """The table: about a second of computation, once a process."""
    return (
        *(entropy_coded_gap(rate) for rate in (1.0, 2.0, 3.0, 4.0)),
        *(lloyd_max(bits) for bits in (2, 3, 4)),
        *(clipped_uniform(bits) for bits in (2, 3, 4)),
        *(searched(bits, 128) for bits in (2, 3, 4)),
        *(absmax(bits, 128) for bits in (2, 3, 4)),
        *(absmax(bits, 32) for bits in (2, 3, 4)),
    )
