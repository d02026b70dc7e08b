"""The least rate of one linear layer, and where the known algorithms stand above it.

y = W x, W (O, I), S = E[x x^T] (second moment, not centred), D = tr(dW S dW^T) / (O I). Rows of W ~ N(0, s^2 I); with
lam_i the eigenvalues of s^2 S, reverse water-filling (Cover & Thomas, Elements of Information Theory, 10.3.3) is

    R(theta) = mean_i max(0, log2(lam_i / theta) / 2)        bits per weight
    D(theta) = mean_i min(lam_i, theta)

and, while theta <= min lam,  R(D) = log2(s^2 |S|^(1/I) / D) / 2.

With S = L L^T, uniform integers under an ideal entropy code, columns taken last to first (arXiv 2601.17187,
2603.04956):

    nearest     D = step^2/12 mean S_ii       gap = shaping + log2(mean S_ii   / |S|^(1/I)) / 2
    GPTQ        D = step^2/12 mean L_ii^2     gap = shaping + log2(mean L_ii^2 / |S|^(1/I)) / 2
    WaterSIC    step_i = c / L_ii             gap = shaping = log2(2 pi e / 12) / 2 = 0.2546 bits

All functions compute in float64. A gap is in bits per weight above R(D) at the same distortion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import SupremumError

SHAPING_BITS = 0.5 * math.log2(2 * math.pi * math.e / 12)  # what the integer lattice loses against a sphere


def rate_at(eigenvalues_I: Tensor, theta: float) -> float:
    """R(theta), bits per weight. `eigenvalues_I`: variances lam_i >= 0; `theta` > 0: water level, same unit."""
    lam = eigenvalues_I.double()
    return float(torch.where(lam > theta, 0.5 * torch.log2(lam / theta), torch.zeros_like(lam)).mean())


def distortion_at(eigenvalues_I: Tensor, theta: float) -> float:
    """D(theta), mean squared error per weight in the unit of `eigenvalues_I`."""
    return float(eigenvalues_I.double().clamp(max=theta).mean())


def level_of_distortion(eigenvalues_I: Tensor, distortion: float) -> float:
    """The water level at which D(theta) = distortion; the largest eigenvalue where nothing need be stored."""
    lam = eigenvalues_I.double().sort(descending=True).values
    if not distortion > 0:
        raise SupremumError(f"a distortion of {distortion} has no finite rate", "give a distortion above zero")
    if distortion >= float(lam.mean()):
        return float(lam[0])
    active = torch.arange(1, len(lam) + 1, dtype=torch.float64)  # k components lie above the water
    dry = lam.flip(0).cumsum(0).flip(0) - lam  # the energy of those below it
    theta = (len(lam) * distortion - dry) / active
    below = torch.cat([lam[1:], lam.new_zeros(1)])
    return float(theta[(theta <= lam) & (theta >= below)][0])


def level_of_rate(eigenvalues_I: Tensor, rate: float) -> float:
    """The water level at which R(theta) = rate (bits per weight, >= 0)."""
    lam = eigenvalues_I.double().sort(descending=True).values
    lam = lam[lam > 0]
    if rate <= 0 or not len(lam):
        return float(lam[0]) if len(lam) else 0.0
    active = torch.arange(1, len(lam) + 1, dtype=torch.float64)
    level = (lam.log2().cumsum(0) - 2 * rate * len(eigenvalues_I)) / active  # log2 of theta with k components active
    k = int((lam.log2() > level).nonzero()[-1])  # the condition holds for the first k and fails after it
    return float(2 ** level[k])


@dataclass(frozen=True)
class Numbers:
    """The three numbers of a layer's metric, which predict what each algorithm loses before it runs."""

    mean_diagonal: float  # mean S_ii
    mean_pivot: float  # mean L_ii^2, columns in their own order
    mean_pivot_ordered: float  # mean L_ii^2, columns with large S_ii taken first (act-order)
    geometric_mean: float  # |S|^(1/I)

    def gaps(self, shaping: float = SHAPING_BITS) -> dict[str, float]:
        """High-rate gap in bits per weight of each algorithm. `shaping`: what the scalar code itself loses
        (0.2546 entropy-coded; for a fixed-length format take its row of `shaping.format_gaps`)."""

        def over(mean: float) -> float:
            return shaping + 0.5 * math.log2(mean / self.geometric_mean) if self.geometric_mean > 0 else math.inf

        return {
            "nearest": over(self.mean_diagonal),
            "gptq": over(self.mean_pivot),
            "gptq-act-order": over(self.mean_pivot_ordered),
            "watersic": shaping,
        }


def pivots(moment_II: Tensor, *, order: Literal["natural", "activation"] = "natural") -> Tensor:
    """L_ii^2 (I,) of S = L L^T: what remains of S_ii when the columns before i take up the errors of column i.
    "activation" rounds columns with large S_ii first, that is, puts them last."""
    moment = moment_II.double()
    if order == "activation":
        columns = moment.diagonal().argsort()
        moment = moment[columns][:, columns]
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for share in (0.0, 1e-12, 1e-9, 1e-6, 1e-4):  # float32 sums miss being semi-definite by rounding
        factor, failed = torch.linalg.cholesky_ex(moment + share * float(moment.diagonal().mean()) * identity)
        if not int(failed):
            return factor.diagonal().square()
    raise SupremumError("a second moment is not positive semi-definite", "gather the statistics again")


def numbers(moment_II: Tensor) -> Numbers:
    """The three numbers of S (I, I), float64, O(I^3)."""
    natural = pivots(moment_II)
    return Numbers(
        mean_diagonal=float(moment_II.diagonal().double().mean()),
        mean_pivot=float(natural.mean()),
        mean_pivot_ordered=float(pivots(moment_II, order="activation").mean()),
        geometric_mean=float(natural.log().mean().exp()),
    )


def shrinkage(moment_II: Tensor, samples: int) -> float:
    """Weight r in [0, 1] that moves S towards mean(diag) I:  (1 - r) S + r mean(diag) I.

    The oracle-approximating form, which takes x as Gaussian (Chen, Wiesel, Eldar, Hero 2010). `samples`: number of
    independent x.
    """
    moment = moment_II.double()
    size = len(moment)
    square = float(moment.square().sum())
    trace2 = float(moment.diagonal().sum()) ** 2
    spread = square - trace2 / size  # |S - mean(diag) I|^2
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / size) * square + trace2) / ((samples + 1 - 2 / size) * spread))


def sampling_bias_bits(samples: float, size: int) -> float:
    """How many bits per weight too low log2|S|/(2 I) comes out of `samples` Gaussian vectors of `size` entries, in the
    limit of large sizes (Marchenko-Pastur); infinite when there are fewer samples than entries."""
    ratio = size / samples
    if ratio > 1:
        return math.inf
    rest = 0.0 if ratio == 1 else (1 - ratio) / ratio * math.log(1 - ratio)
    return 0.5 * math.log2(math.e) * (1 + rest)
