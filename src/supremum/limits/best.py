"""For a budget of compute, data and bytes: which parameters, tokens and bits are best, and what is the least loss.

    minimise L(N, D, P) over N and P,   D = (C - k/3 N T) / (k N),   N P / 8 <= bytes

k N D is the cost of training, k/3 N T that of T tokens served (a forward pass is a third of a step; Sardana et al.
2401.00448). With U different tokens at hand, more of them are repeats, and parameters that U cannot fill fade (Muennighoff
et al. 2305.16264). P bits are those that the weights are trained in; arithmetic costs the same at all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from ..errors import SupremumError
from .forecast import check_reach, interval
from .law import Law
from .scaling import LEVEL, Fit

BITS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0)
FEWEST_TOKENS = 1.0


@dataclass(frozen=True)
class Budget:
    compute: float  # FLOP, of training and of the tokens served
    data: float | None = None  # different tokens at hand; None: as many as wanted
    nbytes: float | None = None  # of all parameters, at their bits
    served: float = 0.0  # tokens


@dataclass(frozen=True)
class Choice:
    """The best of one number of bits."""

    bits: float
    params: float
    tokens: float
    epochs: float
    loss: float
    nbytes: float
    bound_by: tuple[str, ...]  # of "data", "bytes", "serving": those without which, beside compute, the loss would be less


@dataclass(frozen=True)
class Best:
    budget: Budget
    choice: Choice
    low: float  # of the loss that would be measured
    high: float
    params: tuple[float, float]  # interval of the best number of parameters
    tokens: tuple[float, float]
    bits: tuple[Choice, ...]  # the best at each number of bits, best first
    extrapolates: str = ""


def optimum(law: Law, budget: Budget, bits: float | None = None, flops: float = 6.0) -> tuple[float, float, float]:
    """(parameters, tokens, loss) of the least loss at one number of bits."""
    most = budget.compute / (flops * FEWEST_TOKENS + flops / 3 * budget.served)
    if budget.nbytes is not None:
        most = min(most, 8 * budget.nbytes / (bits or law.reference_bits))
    if most < 1:
        raise SupremumError("The budget does not pay for one parameter.", "Give more --compute or --bytes, or serve less.")

    def tokens(params: NDArray[np.float64]) -> NDArray[np.float64]:
        return budget.compute / (flops * params) - budget.served / 3

    def loss(ln_params: NDArray[np.float64]) -> NDArray[np.float64]:
        params = np.exp(ln_params)
        seen = np.maximum(tokens(params), FEWEST_TOKENS / 2)
        return np.asarray(_loss(law, budget, params, seen, bits))

    grid = np.linspace(0.0, math.log(most), 400)
    index = int(np.argmin(loss(grid)))
    low, high = grid[max(0, index - 1)], grid[min(len(grid) - 1, index + 1)]
    inner = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    at = min((inner.x, grid[index]), key=lambda place: float(loss(place)))
    params = min(math.exp(at), most)
    return params, float(tokens(np.asarray(params))), float(loss(np.log(params)))


def _loss(law: Law, budget: Budget, params: Any, tokens: Any, bits: float | None) -> Any:
    if budget.data is None:
        return law.loss(params, tokens, None, bits)
    return law.constrained(params, tokens, budget.data, bits)


def best(fit: Fit, budget: Budget, *, extrapolate: bool = False, seed: int = 0) -> Best:
    """Raises SupremumError where the runs cannot tell the exponents, and where the answer lies a decade beyond them."""
    if fit.doubts:
        raise SupremumError(f"These runs cannot say what is best: {fit.doubts[0]}",
                            "Add runs of other sizes and lengths; without --compute the fit is shown as it is.")
    ranked = choices(fit.law, budget, fit.flops)
    choice = ranked[0]
    sentence = check_reach(fit, choice.params, choice.tokens, extrapolate)
    losses = [_loss(law, budget, choice.params, choice.tokens, choice.bits) for law in fit.draws]
    low, high = interval(fit, losses, choice.loss, seed)
    others = np.array([optimum(law, budget, choice.bits, fit.flops)[:2] for law in fit.draws]).reshape(-1, 2)
    tail = 50 * (1 - LEVEL)
    ranges = np.percentile(others, [tail, 100 - tail], axis=0) if len(others) else np.full((2, 2), math.nan)
    return Best(budget, choice, low, high, (float(ranges[0, 0]), float(ranges[1, 0])),
                (float(ranges[0, 1]), float(ranges[1, 1])), ranked, sentence)


def choices(law: Law, budget: Budget, flops: float = 6.0) -> tuple[Choice, ...]:
    """The best at each number of bits, best first; one number only where bytes are not limited."""
    kinds = BITS if budget.nbytes is not None else (law.reference_bits,)
    found = [_choice(law, budget, bits, flops) for bits in kinds if bits <= law.reference_bits]
    return tuple(sorted(found, key=lambda choice: choice.loss))


def _choice(law: Law, budget: Budget, bits: float, flops: float) -> Choice:
    params, tokens, loss = optimum(law, budget, bits, flops)
    bound = []
    for name, without in (("data", replace(budget, data=None)), ("bytes", replace(budget, nbytes=None)),
                          ("serving", replace(budget, served=0.0))):
        if without != budget and optimum(law, without, bits, flops)[2] < loss * (1 - 1e-6):
            bound.append(name)
    epochs = max(1.0, tokens / budget.data) if budget.data else 1.0
    return Choice(bits, params, tokens, epochs, loss, params * bits / 8, tuple(bound))
