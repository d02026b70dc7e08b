"""Integers at a water level: against Babai's algorithm on the whole matrix, the formulas and the limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from supremum.codecs.lattice import CLASSES, OCTAVE, UNIT
from supremum.limits import Curve
from supremum.limits.information import spectrum
from supremum.solve.cancellation import Metric, damped
from supremum.solve.water import RATE, Outputs, Spread, Watered, normal_bits, water

from . import reference

DAMPING = 0.01


def case(seed: int = 0, rows: int = 40, columns: int = 96) -> tuple[torch.Tensor, Metric, torch.Tensor]:
    """(weights, metric of the inputs, output Fisher (O, O))."""
    draw = torch.Generator().manual_seed(seed + 7)
    weight_OI = reference.weights(rows, columns, seed) * torch.exp(0.5 * torch.randn(rows, 1, generator=draw))
    metric = Metric.of(reference.moment(columns, seed, tokens=20 * columns), damping=DAMPING)
    return weight_OI, metric, reference.moment(rows, seed + 3, tokens=20 * rows)


def solve(weight_OI: torch.Tensor, metric: Metric, fisher: torch.Tensor, level: float) -> Watered:
    return water(weight_OI, metric, Outputs.of(fisher, DAMPING), level, Spread.of(weight_OI))


def whole(fisher: torch.Tensor) -> torch.Tensor:
    """B (O, O) as the solver takes it, float64."""
    if fisher.ndim == 1:
        return torch.diag(fisher + DAMPING * fisher.mean()).double()
    return damped(fisher.float(), DAMPING).double()


def babai(weight_OI: torch.Tensor, metric: Metric, fisher: torch.Tensor, found: Watered) -> np.ndarray:
    """The integers by successive cancellation over all O I entries in the metric B (x) S, in float64; the frame as given."""
    outputs, frame = Outputs.of(fisher, DAMPING), found.lattice.frame
    rows, columns = outputs.order_O.numpy(), metric.order_I.numpy()
    both = np.kron(whole(fisher).numpy()[rows][:, rows], metric.moment_II.double().numpy()[columns][:, columns])
    factor = np.linalg.cholesky(np.linalg.inv(both)).T
    step = 2.0 ** ((frame.row_O[:, None].double() + frame.column_I) / OCTAVE).numpy()[rows][:, columns].ravel()
    classes = (frame.row_class_O[:, None] + frame.column_class_I).clamp(0, CLASSES - 1).numpy()[rows][:, columns].ravel()
    work = weight_OI.double().numpy()[rows][:, columns].ravel()
    integers = np.empty(len(work), int)
    for i in range(len(work)):
        u, sigma = work[i] / step[i], 2.0 ** ((classes[i] - UNIT) / OCTAVE)
        near = np.array([math.floor(u), math.ceil(u)])
        mass = norm.sf((abs(near) - 0.5) / sigma) - norm.sf((abs(near) + 0.5) / sigma)
        integers[i] = near[np.argmin((u - near) ** 2 - RATE * np.log2(np.maximum(mass, 2.0**-24)))]
        work[i + 1:] -= (work[i] - integers[i] * step[i]) / factor[i, i] * factor[i, i + 1:]
    natural_OI = np.empty(weight_OI.shape, int)
    natural_OI[rows[:, None], columns] = integers.reshape(weight_OI.shape)
    return natural_OI


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("level", [1e-1, 1e-3, 1e-5])
def test_it_is_babais_algorithm(level, diagonal):
    weight_OI, metric, fisher_OO = case(rows=10, columns=12)
    fisher = fisher_OO.diagonal().clone() if diagonal else fisher_OO
    found = solve(weight_OI, metric, fisher, level)
    assert np.array_equal(babai(weight_OI, metric, fisher, found), found.lattice.integers_OI.numpy())


@pytest.mark.parametrize("rows", [31, 32, 70])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    weight_OI, metric, fisher_OO = case(rows=rows, columns=24)
    found = solve(weight_OI, metric, fisher_OO, 1e-3)
    monkeypatch.setattr("supremum.solve.water.BLOCK", rows)
    assert (solve(weight_OI, metric, fisher_OO, 1e-3).lattice.integers_OI == found.lattice.integers_OI).double().mean() > 0.99


def test_steps_are_those_of_the_water_level():
    weight_OI, metric, fisher_OO = case(1)
    outputs = Outputs.of(fisher_OO, DAMPING)
    frame = solve(weight_OI, metric, fisher_OO, 1e-3).lattice.frame
    wish_OI = torch.empty(weight_OI.shape, dtype=torch.float64)
    wish_OI[outputs.order_O[:, None], metric.order_I] = math.sqrt(12e-3) * torch.outer(
        outputs.pivot_O, metric.factor_II.diagonal().double())
    found_OI = ((frame.row_O[:, None].double() + frame.column_I) / OCTAVE).exp2()
    assert (found_OI / wish_OI).log2().abs().max() <= 1 / OCTAVE + 1e-9


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_nats_are_those_of_the_integers(diagonal):
    weight_OI, metric, fisher_OO = case(2)
    fisher = fisher_OO.diagonal().clone() if diagonal else fisher_OO
    found = solve(weight_OI, metric, fisher, 1e-3)
    change_OI = (weight_OI - found.lattice.decode()).double()
    expected = 0.5 * (whole(fisher) @ change_OI @ metric.moment_II.double() * change_OI).sum()
    assert found.nats == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("bits", "most"), [(2.0, 0.42), (4.0, 0.30), (5.5, 0.29)])
def test_it_spends_a_quarter_bit_more_than_the_limit(bits, most):
    """log2(2 pi e / 12) / 2 = 0.2546 at high rate; at two bits part of this matrix lies under water, which costs more."""
    weight_OI, metric, fisher_OO = case(2, 192, 192)
    curve = Curve([spectrum("w", weight_OI, metric.moment_II, whole(fisher_OO), tokens=10**6)])
    found = solve(weight_OI, metric, fisher_OO, 2 ** curve.level_at_bits(bits - 0.27))
    assert found.bits / weight_OI.numel() == pytest.approx(bits, abs=0.1)
    assert 0.22 < curve.gap_bits(found.bits / weight_OI.numel(), found.nats) < most


def test_feedback_between_rows_is_worth_bits():
    weight_OI, metric, fisher_OO = case(3, 96, 96)

    def cost(fisher: torch.Tensor) -> float:
        found = solve(weight_OI, metric, fisher, 1e-4)
        change_OI = (weight_OI - found.lattice.decode()).double()
        return found.bits / weight_OI.numel() + 0.5 * math.log2(
            (whole(fisher_OO) @ change_OI @ metric.moment_II.double() * change_OI).sum())

    assert cost(fisher_OO) < cost(fisher_OO.diagonal().clone()) - 0.05


def test_counting_bits_beats_nearest_rounding_at_low_rates(monkeypatch):
    """Nearer to the limit at about one bit a weight."""
    weight_OI, metric, fisher_OO = case(3, 192, 192)
    curve = Curve([spectrum("w", weight_OI, metric.moment_II, whole(fisher_OO), tokens=10**6)])
    cost_KM = normal_bits()

    def gap() -> float:
        found = solve(weight_OI, metric, fisher_OO, 2 ** curve.level_at_bits(1.0))
        frame, integers_OI = found.lattice.frame, found.lattice.integers_OI
        classes_OI = (frame.row_class_O[:, None] + frame.column_class_I).clamp(0, CLASSES - 1)
        return curve.gap_bits(float(cost_KM[classes_OI.numpy(), integers_OI.abs().numpy()].mean()), found.nats)

    aware = gap()
    monkeypatch.setattr("supremum.solve.water.normal_bits", lambda: np.ones((CLASSES, 128), np.float32))
    assert aware < gap() - 0.01


def test_rows_that_matter_more_get_finer_steps():
    weight_OI, metric, _ = case(4)
    fisher_O = torch.ones(len(weight_OI))
    fisher_O[0] = 64.0
    change_OI = weight_OI - solve(weight_OI, metric, fisher_O, 1e-3).lattice.decode()
    loss_O = ((change_OI @ metric.moment_II) * change_OI).sum(1)
    assert loss_O[0] < loss_O[1:].min() / 8


def test_extreme_rows_and_weights_stay_within_a_byte_and_decode():
    weight_OI, metric, fisher_OO = case(5)
    weight_OI[3] *= 1e8
    weight_OI[4] = 0.0
    fisher_O = fisher_OO.diagonal().clone()
    fisher_O[5] = 0.0
    found = solve(weight_OI, metric, fisher_O, 1e-4)
    for vector in vars(found.lattice.frame).values():
        assert int(vector.max()) - int(vector.min()) <= 240
    assert found.lattice.decode().isfinite().all()
