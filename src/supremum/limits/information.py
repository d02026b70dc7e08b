"""The least KL that any code of a checkpoint's weights can have at a given size: one water level for the whole model.

To second order the model's answers move by  KL per token = 1/2 sum_l tr(B_l dW_l S_l dW_l^T)  (K-FAC Fisher:
S = E[x x^T] of a layer's inputs, B = E[g g^T] of its output gradients, g = d log p(y ~ model) / dy). With weights
~ N(0, s_l^2) the component (l, i, j) has variance u_lij = s_l^2 alpha_lj beta_li, alpha and beta the eigenvalues of
S and B, and

    bits(theta) = sum max(0, log2(u / theta) / 2)        KL(theta) = 1/2 sum min(u, theta)       nats per token

At high rate KL_min(R) = (N/2) G 4^-R with G = exp(mean ln u): a method with a gap of g bits has KL = KL_min 4^g.
The sums over all pairs are exact: ln u is a sum of two sorted lists, so each row of it needs one binary search and the
prefix sums of the other list. The parts of this bound are in arXiv 2603.04956 (inside a layer), 2505.22988 (metric) and
2411.17525 (layers add up); their union as a limit of a model is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import brentq
from torch import Tensor

from ..errors import SupremumError
from .entropy import negentropy_bits
from .waterfill import Numbers, numbers, sampling_bias_bits, shrinkage

ENOUGH = 10  # tokens per input feature below which S is shrunk


@dataclass(frozen=True)
class Metric:
    """The input side of one or several layers (q, k and v share one): S as the limit uses it, and its numbers."""

    moment_II: Tensor  # float64, shrunk; or its diagonal (I,)
    numbers: Numbers
    tokens: int
    shrunk: float  # share of mean(diag) I mixed in; 0: S as gathered
    bias_bits: float  # |S|^(1/I) from this many tokens reads this many bits per weight too low


@dataclass(frozen=True)
class LayerSpectrum:
    """What the limit needs of one layer. Eigenvalues are float64; those of a diagonal B are the diagonal itself
    (`exact_output` False), which can only overstate the bits."""

    name: str
    shape_OI: tuple[int, int]
    weight_variance: float  # mean square of the weights
    input_eigenvalues_I: Tensor  # of S, its columns scaled by the weights' profile
    output_eigenvalues_O: Tensor  # of B, likewise
    tokens: int
    exact_output: bool = True
    row_profile_O: Tensor | None = None  # variance of each row over the mean; None: all alike
    numbers: Numbers | None = None
    shrunk: float = 0.0
    bias_bits: float = 0.0
    negentropy: float = 0.0  # bits per weight by which these weights are easier than Gaussian ones at high rate

    @property
    def weights(self) -> int:
        return self.shape_OI[0] * self.shape_OI[1]

    def alone(self) -> LayerSpectrum:
        """The same layer with B = I, for the classic layer-wise error tr(dW S dW^T)."""
        rows = torch.ones(self.shape_OI[0], dtype=torch.float64) if self.row_profile_O is None else self.row_profile_O
        return replace(self, output_eigenvalues_O=rows.sort().values, exact_output=True)

    def gap_bits(self, bits: float, distortion: float) -> float:
        """Bits per weight above the limit of a code with this layer-wise D = tr(dW S dW^T) / (O I)."""
        return Curve([self.alone()]).gap_bits(bits, distortion * self.weights / 2)


def metric(moment_II: Tensor, *, tokens: int) -> Metric:
    """Analyse S once for all layers that read the same input.

    `moment_II`: (I, I), or (I,) for a diagonal one (an embedding's token frequencies). `tokens`: inputs it was taken
    from; below 10 a feature S is shrunk (a singular S would promise KL 0 at 0 bits).
    """
    size, moment = len(moment_II), moment_II.double()
    if moment.ndim == 1:
        mean = float(moment.mean())
        return Metric(moment, Numbers(mean, mean, mean, float(moment.log().mean().exp())), tokens, 0.0, 0.0)
    moment = (moment + moment.T) / 2
    mean = float(moment.diagonal().mean())
    mixed = shrinkage(moment, tokens) if tokens < ENOUGH * size else 0.0
    ridge = mixed * mean * torch.eye(size, dtype=moment.dtype, device=moment.device)
    moment = (1 - mixed) * moment + ridge
    bias = 0.0 if mixed else sampling_bias_bits(tokens, size)
    return Metric(moment, numbers(moment), tokens, mixed, bias)


def _eigenvalues(form: Tensor, profile: Tensor) -> Tensor:
    """Of P^1/2 form P^1/2, ascending, on the CPU; a diagonal form is its own."""
    if form.ndim == 1:
        return (form.double() * profile).cpu().clamp(min=0.0).sort().values
    root = profile.sqrt().to(form.device)
    form = form.double() * root[:, None] * root
    return torch.linalg.eigvalsh((form + form.T) / 2).cpu().clamp(min=0.0)


def spectrum(
    name: str,
    weight_OI: Tensor,
    moment: Tensor | Metric,
    fisher: Tensor,
    *,
    tokens: int = 0,
    profile: bool = True,
) -> LayerSpectrum:
    """The spectrum of one layer.

    `moment`: S (I, I), or a `Metric` made from it. `fisher`: B (O, O), or its diagonal (O,), per token. `profile`: take
    the weights as N(0, r_o c_i), a variance for each row and column (the limit for codes that scale rows and columns,
    and lower); False: one variance. `tokens` goes to `metric`. Shapes that disagree raise SupremumError.
    """
    side = moment if isinstance(moment, Metric) else metric(moment, tokens=tokens)
    shape = (int(weight_OI.shape[0]), int(weight_OI.shape[1]))
    if (len(fisher), len(side.moment_II)) != shape:
        raise SupremumError(
            f"{name}: weight {shape} against S of {len(side.moment_II)} and B of {len(fisher)}",
            "gather the statistics of this checkpoint again",
        )
    square = weight_OI.double().square()
    variance = float(square.mean())
    row, column = torch.ones(shape[0], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    if profile and variance > 0:
        row = square.mean(1)
        column = (square / row.clamp(min=1e-12 * variance)[:, None]).mean(0).cpu()
        row, column = row.cpu() / variance, column / column.mean()
    return LayerSpectrum(
        name, shape, variance,
        _eigenvalues(side.moment_II, column.to(side.moment_II.device)), _eigenvalues(fisher, row.to(fisher.device)),
        side.tokens, fisher.ndim == 2, row if profile else None, side.numbers, side.shrunk, side.bias_bits,
        negentropy_bits(weight_OI)[0],
    )  # fmt: skip


@dataclass(frozen=True)
class _Pairs:
    """One layer's log2 u = row + column, over all pairs of a row and a column; columns sorted, with partial sums."""

    rows: Tensor
    columns: Tensor
    above: Tensor  # above[k] = sum of columns[k:]
    below: Tensor  # below[k] = sum of 2^columns[:k]
    top: float

    @classmethod
    def of(cls, layer: LayerSpectrum) -> _Pairs:
        sides = [side[side > 0].double().log2().sort().values for side in
                 (layer.input_eigenvalues_I, layer.output_eigenvalues_O)]  # fmt: skip
        rows, columns = sorted(sides, key=len)
        rows = rows + math.log2(layer.weight_variance) if layer.weight_variance > 0 else rows[:0]
        zero = columns.new_zeros(1)
        above = torch.cat([columns.flip(0).cumsum(0).flip(0), zero])
        below = torch.cat([zero, columns.exp2().cumsum(0)])
        return cls(rows, columns, above, below, float(rows[-1] + columns[-1]) if len(rows) else -math.inf)

    def at(self, level: float) -> tuple[float, float]:
        """(bits, KL) of the layer at theta = 2^level."""
        split = torch.searchsorted(self.columns, level - self.rows, right=True)  # columns[split:] stand above the water
        wet = len(self.columns) - split
        bits = ((self.rows - level) * wet + self.above[split]).sum()
        kl = (2.0**level * wet + self.rows.exp2() * self.below[split]).sum()
        return 0.5 * float(bits), 0.5 * float(kl)


class Curve:
    """The limit curve of a set of layers: least KL (nats per token) against bits per weight, means over those layers.

    Convex and decreasing. `level` is log2 of the water level theta.
    """

    def __init__(self, layers: Iterable[LayerSpectrum]) -> None:
        self.layers: tuple[LayerSpectrum, ...] = tuple(layers)
        self._pairs = [_Pairs.of(layer) for layer in self.layers]
        self.weights = sum(layer.weights for layer in self.layers)
        self.top = max((pairs.top for pairs in self._pairs), default=-math.inf)
        if not math.isfinite(self.top):
            raise SupremumError("no layer has a positive spectrum", "give statistics of at least one layer")
        self.kl_at_zero = self.at(self.top)[1]  # every weight replaced by zero; far outside the second order

    def at(self, level: float) -> tuple[float, float]:
        """(bits per weight, KL) at theta = 2^level."""
        parts = [pairs.at(level) for pairs in self._pairs]
        return sum(bits for bits, _ in parts) / self.weights, sum(kl for _, kl in parts)

    def _solve(self, which: int, wanted: float) -> float:
        def excess(level: float) -> float:
            value = self.at(level)[which]
            return value - wanted if which == 0 else math.log2(value / wanted)

        low = self.top - 8.0
        while (excess(low) < 0) if which == 0 else (excess(low) > 0):
            low = self.top - 2 * (self.top - low)
        return float(brentq(excess, low, self.top, xtol=1e-9, rtol=1e-12))

    def level_at_kl(self, kl: float) -> float:
        """log2 theta at which KL is `kl` nats per token (> 0)."""
        if not kl > 0:
            raise SupremumError(f"a KL of {kl} has no finite size", "give a KL above zero")
        return self.top if kl >= self.kl_at_zero else self._solve(1, kl)

    def level_at_bits(self, bits: float) -> float:
        """log2 theta at which the layers take `bits` bits per weight."""
        return self.top if bits <= 0 else self._solve(0, bits)

    def bits_at_kl(self, kl: float) -> float:
        """Least bits per weight of any code whose KL is at most `kl`."""
        return self.at(self.level_at_kl(kl))[0]

    def kl_at_bits(self, bits: float) -> float:
        """Least KL of any code of at most `bits` bits per weight."""
        return self.at(self.level_at_bits(bits))[1]

    def gap_bits(self, bits: float, kl: float) -> float:
        """Bits per weight that a code of this size and KL spends above the limit."""
        return bits - self.bits_at_kl(kl)

    def layer_bits(self, level: float) -> list[float]:
        """Bits per weight of each layer at theta = 2^level, in the order of `layers`."""
        return [pairs.at(level)[0] / layer.weights for pairs, layer in zip(self._pairs, self.layers, strict=True)]

    def layer_kl(self, level: float) -> list[float]:
        """KL of each layer at theta = 2^level, nats per token."""
        return [pairs.at(level)[1] for pairs in self._pairs]

    def sample(self, *, low: float = 0.1, high: float = 8.0, step: float = 0.5) -> list[tuple[float, float]]:
        """(bits per weight, KL) points from `low` to `high` bits, `step` octaves of theta apart, ascending in bits."""
        points: list[tuple[float, float]] = []
        level = self.level_at_bits(low)
        while not points or points[-1][0] < high:
            points.append(self.at(level))
            level -= step
        return points

    def high_rate_constant(self) -> float:
        """log2(N G / 2): KL_min(R) = 2^(constant - 2 R) where no component is under water; -inf if one is zero."""
        total = 0.0
        for pairs, layer in zip(self._pairs, self.layers, strict=True):
            if len(pairs.rows) * len(pairs.columns) < layer.weights:
                return -math.inf
            total += float(pairs.rows.sum()) * len(pairs.columns) + float(pairs.columns.sum()) * len(pairs.rows)
        return math.log2(self.weights / 2) + total / self.weights
