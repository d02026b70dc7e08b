"""The forms of the statistical limit: loss of N parameters trained on D tokens, and the least loss of a compute budget.

    L(N, D) = E + A / N^alpha + B / D^beta                                              (Hoffmann et al. 2203.15556)
    least L under k N D = C:  N = G (C/k)^(beta/(alpha+beta)),  D = (C/k) / N,  G = (alpha A / (beta B))^(1/(alpha+beta))
    D' = U (1 + R_D (1 - exp(-(D/U - 1)/R_D)))   what D tokens out of U different ones are worth
    N' = V (1 + R_N (1 - exp(-(N/V - 1)/R_N)))   V = min(N, the N whose best D is U)    (Muennighoff et al. 2305.16264)
    N_P = N (1 - exp(n - P/gamma))               what N parameters of P bits are worth  (Kumar et al. 2411.04330)
    k N D + k/3 N T = C                          T tokens served after training, k = 6  (Sardana et al. 2401.00448)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

REFERENCE_BITS = 16.0  # of runs that do not say


@dataclass(frozen=True)
class Law:
    """E + A/N^alpha + B/D^beta, N counted at `reference_bits`. Arguments may be arrays."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    repeats: float  # R_D: epochs after which a repeated token is worth 1/e of a new one
    excess: float  # R_N: the same of parameters beyond those that the different tokens can fill
    gamma: float  # bits
    shift: float = 0.0  # n; a matrix of gamma n bits is worth nothing
    reference_bits: float = REFERENCE_BITS

    def loss(self, params: Any, tokens: Any, unique: Any = None, bits: Any = None) -> Any:
        """Of tokens drawn from `unique` different ones; what the runs are fitted with."""
        seen = tokens if unique is None else effective(tokens, unique, self.repeats)
        return self._sum(params * self.worth(bits), seen)

    def constrained(self, params: Any, tokens: Any, unique: Any, bits: Any = None) -> Any:
        """Of tokens drawn from `unique` different ones, where parameters that these cannot fill fade, too."""
        once, held = np.minimum(unique, tokens), params * self.worth(bits)
        if self.A > 0 and self.B > 0 and math.isfinite(self.excess):
            held = effective(held, np.minimum(held, self.params_for(once)), self.excess)
        return self._sum(held, effective(tokens, once, self.repeats))

    def worth(self, bits: Any) -> Any:
        return 1.0 if bits is None else worth_of_bits(bits, self.gamma, self.shift, self.reference_bits)

    def params_for(self, tokens: Any) -> Any:
        """The N whose best D, under a compute budget, is `tokens`."""
        return self.balance * (self.balance * tokens) ** (self.beta / self.alpha)

    def frontier(self, compute: Any, flops: float = 6.0) -> tuple[Any, Any, Any]:
        """(parameters, tokens, loss) of the least loss under flops N D = compute, data without end."""
        product = compute / flops
        params = self.balance * product ** (self.beta / (self.alpha + self.beta))
        return params, product / params, self._sum(params, product / params)

    @property
    def balance(self) -> float:
        if not (self.A > 0 and self.B > 0):
            return math.inf if self.A > 0 else 0.0
        return math.exp(math.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta))

    def _sum(self, params: Any, tokens: Any) -> Any:
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta


def effective(amount: Any, once: Any, fades: float) -> Any:
    """What `amount` is worth when all beyond `once` is more of the same; `amount` itself where it is less than `once`."""
    over = np.maximum(amount / once - 1, 0)
    return np.minimum(amount, once) + once * fades * -np.expm1(-over / fades)


def worth_of_bits(bits: Any, gamma: float, shift: float = 0.0, reference: float = REFERENCE_BITS) -> Any:
    """Share of a parameter that is left at `bits`, of one at `reference` bits."""
    return np.maximum(1e-9, -np.expm1(shift - np.asarray(bits) / gamma)) / -np.expm1(shift - reference / gamma)
