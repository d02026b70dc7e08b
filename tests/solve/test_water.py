"""Integers at a water level: against a plain search over the whole matrix, the formulas and the limit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from supremum.codecs.lattice import CLASSES, OCTAVE, UNIT
from supremum.codecs.rans import ESCAPE, LARGEST
from supremum.codecs.trellis import DISTORTION, NEXT_S2, symbols
from supremum.errors import SupremumError
from supremum.limits import Curve
from supremum.limits.information import spectrum
from supremum.solve.cancellation import Metric
from supremum.solve.viterbi import ESCAPED, normal_bits
from supremum.solve.water import RARE, RATE, Outputs, Spread, Watered, water

from . import reference

DAMPING = 0.1


def case(seed: int = 0, rows: int = 40, columns: int = 96) -> tuple[torch.Tensor, Metric, torch.Tensor]:
    """(weights, metric of the inputs, output Fisher (O, O))."""
    draw = torch.Generator().manual_seed(seed + 7)
    weight_OI = reference.weights(rows, columns, seed) * torch.exp(0.5 * torch.randn(rows, 1, generator=draw))
    metric = Metric.of(reference.moment(columns, seed, tokens=20 * columns), damping=DAMPING, act_order=False)
    return weight_OI, metric, reference.moment(rows, seed + 3, tokens=20 * rows)


def solve(weight_OI: torch.Tensor, metric: Metric, fisher: torch.Tensor, level: float) -> Watered:
    return water(weight_OI, metric, Outputs.of(fisher, DAMPING), level, Spread.of(weight_OI))


def whole(fisher: torch.Tensor) -> torch.Tensor:
    """B (O, O) as the solver takes it, float64."""
    if fisher.ndim == 1:
        return torch.diag(fisher + RARE * fisher.mean()).double()
    return ((fisher + DAMPING * torch.diag(fisher.diagonal())) / (1 + DAMPING)).double()


def paths(weight_OI: torch.Tensor, metric: Metric, fisher: torch.Tensor, found: Watered) -> np.ndarray:
    """The integers by a search in float64 with whole histories, errors cancelled in the metric B (x) S at once; the frame as
    given. Rows one after the other, as the search decides a row before it begins the next."""
    outputs, frame = Outputs.of(fisher, DAMPING), found.lattice.frame
    rows = outputs.order_O.numpy()
    both = np.kron(whole(fisher).numpy()[rows][:, rows], metric.moment_II.double().numpy())
    factor = np.linalg.cholesky(np.linalg.inv(both)).T
    step_OI = 2.0 ** ((frame.row_O[:, None].double() + frame.column_I) / OCTAVE).numpy()[rows]
    class_OI = (frame.row_class_O[:, None] + frame.column_class_I).clamp(0, CLASSES - 1).numpy()[rows]
    height, width = step_OI.shape
    work = weight_OI.double().numpy()[rows].ravel()
    integers_OI = np.empty((height, width), int)
    for o in range(height):
        survivors: dict[int, tuple[float, list[int], np.ndarray]] = {0: (0.0, [], work)}
        for i in range(width):
            at, reached = o * width + i, {}
            for state, (cost, taken, left) in survivors.items():
                u, sigma, quantiser = left[at] / step_OI[o, i], 2.0 ** ((class_OI[o, i] - UNIT) / OCTAVE), state & 1
                near = int(abs(u) + quantiser) // 2
                for k in range(max(near - 1, 0), near + 2):
                    point = 2 * k - quantiser * (k > 0)
                    edges = sorted({-(0.5 + 0.5 * (1 - quantiser)) if k == 0 else (point + max(point - 2, 0)) / 2,
                                    (point + 2 * k + 2 - quantiser) / 2})
                    bits = -np.log2(max(norm.sf(edges[0] / sigma) - norm.sf(edges[1] / sigma), 2.0**-24))
                    charge = cost + (abs(u) - point) ** 2 + RATE * bits
                    to = int(NEXT_S2[state, k % 2])
                    if to not in reached or charge < reached[to][0]:
                        m = int(math.copysign(point, u))
                        rest = left.copy()
                        rest[at + 1:] -= (left[at] - m * step_OI[o, i]) / factor[at, at] * factor[at, at + 1:]
                        reached[to] = charge, [*taken, m], rest
            survivors = reached
        _, integers_OI[o], work = min(survivors.values(), key=lambda survivor: survivor[0])
    natural_OI = np.empty_like(integers_OI)
    natural_OI[rows] = integers_OI
    return natural_OI


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("level", "rows", "columns"),
                         [(1e-1, 8, 14), (1e-2, 8, 14), (1e-3, 8, 14), (1e-2, 4, 1), (1e-2, 4, 16), (1e-2, 3, 17),
                          (1e-2, 2, 150), (3e-4, 1, 330)])
def test_it_is_the_search_with_whole_histories(level, rows, columns, diagonal):
    weight_OI, metric, fisher_OO = case(rows=rows, columns=columns)
    fisher = fisher_OO.diagonal().clone() if diagonal else fisher_OO
    found = solve(weight_OI, metric, fisher, level)
    integers_OI = found.lattice.integers_OI.numpy()
    assert np.array_equal(paths(weight_OI, metric, fisher, found), integers_OI)
    assert found.bits == pytest.approx(written(found), rel=1e-5)


def written(found: Watered) -> float:
    """Bits of the integers by the normal's cost."""
    frame = found.lattice.frame
    class_OI = (frame.row_class_O[:, None] + frame.column_class_I).clamp(0, CLASSES - 1).numpy()
    symbol_OI, quantiser_OI, _ = symbols(found.lattice.integers_OI.numpy())
    size_OI = abs(symbol_OI.astype(int) - ESCAPE)
    bits_OI = np.where(symbol_OI == 0, ESCAPED, normal_bits()[class_OI, quantiser_OI, np.minimum(size_OI, LARGEST)])
    return float(bits_OI.sum(dtype=np.float64))


@pytest.mark.parametrize("broken", ["weight", "fisher"])
def test_what_is_not_finite_is_refused(broken):
    weight_OI, metric, fisher_OO = case(rows=8, columns=20)
    (weight_OI if broken == "weight" else fisher_OO)[3, 3] = math.nan
    with pytest.raises((SupremumError, torch.linalg.LinAlgError)):
        solve(weight_OI, metric, fisher_OO if broken == "weight" else fisher_OO.diagonal().clone(), 1e-2)


def test_outputs_that_never_mattered_are_all_alike():
    weight_OI, metric, _ = case(rows=8, columns=20)
    found = solve(weight_OI, metric, torch.zeros(8), 1e-2).lattice
    assert torch.equal(found.integers_OI, solve(weight_OI, metric, torch.full((8,), 1 / 1.01), 1e-2).lattice.integers_OI)


def test_without_feedback_no_path_is_cheaper():
    """S = B = 1: the search is exact, so of all 4^6 paths through the nearest numbers none has less error and bits."""
    weight_OI = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    metric = Metric(torch.eye(6), torch.arange(6), torch.eye(6))
    found = water(weight_OI, metric, Outputs(torch.arange(5), torch.ones(5, dtype=torch.float64), None), 0.02,
                  Spread.of(weight_OI)).lattice
    frame = found.frame
    step_OI = ((frame.row_O[:, None].double() + frame.column_I) / OCTAVE).exp2().numpy()
    class_OI = (frame.row_class_O[:, None] + frame.column_class_I).clamp(0, CLASSES - 1).numpy()
    for o in range(5):
        wish_I = weight_OI[o].double().numpy() / step_OI[o]

        def cost(k_I: tuple[int, ...], o: int = o, wish_I: np.ndarray = wish_I) -> float:
            total, state = 0.0, 0
            for i, k in enumerate(k_I):
                m = 2 * k - (state & 1) * ((k > 0) - (k < 0))
                total += (wish_I[i] - m) ** 2 + RATE * float(normal_bits()[class_OI[o, i], state & 1, abs(k)])
                state = int(NEXT_S2[state, k % 2])
            return total

        near = [sorted(range(-40, 41), key=lambda k, u=u: abs(u - 2 * k))[:4] for u in wish_I]
        symbol_OI, _, _ = symbols(found.integers_OI[o:o + 1].numpy())
        taken = cost(tuple(int(symbol) - 128 for symbol in symbol_OI[0]))
        assert taken <= min(cost(k_I) for k_I in itertools.product(*near)) + 1e-4


def test_the_error_at_high_rate_is_the_codes():
    """DISTORTION of a step^2: 1.27 dB below the 4 / 12 of either quantiser alone."""
    weight_OI = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    metric = Metric(torch.eye(256), torch.arange(256), torch.eye(256))
    rows = Outputs(torch.arange(256), torch.ones(256, dtype=torch.float64), None)
    found = water(weight_OI, metric, rows, 4.0**-5, Spread.of(weight_OI)).lattice
    step_OI = ((found.frame.row_O[:, None].double() + found.frame.column_I) / OCTAVE).exp2()
    error = ((weight_OI - found.decode()) / step_OI).square().mean()
    assert float(error) == pytest.approx(4 / 12 * 10**-0.127, rel=0.02)


def test_an_input_that_is_far_larger_than_the_others_does_not_leave_the_integers():
    """A hidden state of thousands (a massive activation) asks for more steps than int16 has: it gets those there are."""
    weight_OI = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    moment_II = torch.eye(32)
    moment_II[5, 5] = 4.0**14
    metric = Metric(moment_II, torch.arange(32), torch.diag(moment_II.diagonal().rsqrt()))
    rows = Outputs(torch.arange(64), torch.ones(64, dtype=torch.float64), None)
    found = water(weight_OI, metric, rows, 4.0**-5, Spread.of(weight_OI))
    largest = weight_OI[:, 5].abs().max()
    assert 8192 < int(found.lattice.integers_OI[:, 5].abs().max()) <= 16384 + 1
    error_O, escaped = (found.decode() - weight_OI)[:, 5].abs(), found.lattice.integers_OI[:, 5].abs() > 255
    assert float(error_O[escaped].max()) < 1.1 * float(largest) / 16384  # a step, of whole eighths
    assert float(error_O.max()) < 2.2 * float(largest) / 16384
    assert found.bits == pytest.approx(written(found), rel=1e-5)  # what has no symbol is on the path, too
    rest = torch.arange(32) != 5
    assert float((found.decode() - weight_OI)[:, rest].square().mean()) == pytest.approx(4.0**-5, rel=0.1)  # whole eighths


@pytest.mark.parametrize("rows", [31, 32, 70])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    weight_OI, metric, fisher_OO = case(rows=rows, columns=24)
    found = solve(weight_OI, metric, fisher_OO, 1e-3)
    monkeypatch.setattr("supremum.solve.water.BLOCK", rows)
    assert (solve(weight_OI, metric, fisher_OO, 1e-3).lattice.integers_OI == found.lattice.integers_OI).double().mean() > 0.97


def test_a_long_row_is_as_near_to_the_limit():
    """Many more columns than survivors differ in."""
    weight_OI, metric, fisher_OO = case(6, 24, 400)
    curve = Curve([spectrum("w", weight_OI, metric.moment_II, whole(fisher_OO), tokens=10**6)])
    found = solve(weight_OI, metric, fisher_OO, 2 ** curve.level_at_bits(3.7))
    assert curve.gap_bits(found.bits / weight_OI.numel(), found.nats) < 0.11


def test_steps_are_those_of_the_water_level():
    weight_OI, metric, fisher_OO = case(1)
    outputs = Outputs.of(fisher_OO, DAMPING)
    frame = solve(weight_OI, metric, fisher_OO, 1e-3).lattice.frame
    wish_OI = torch.empty(weight_OI.shape, dtype=torch.float64)
    wish_OI[outputs.order_O] = math.sqrt(1e-3 / DISTORTION) * torch.outer(
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


@pytest.mark.parametrize(("bits", "most"), [(2.0, 0.18), (4.0, 0.125)])
def test_it_spends_a_tenth_of_a_bit_more_than_the_limit(bits, most):
    """log2(2 pi e / 12) / 2 = 0.2546 of the integers, less 1.27 dB and what the choice of the quantiser costs; at two bits
    part of this matrix lies under water, which costs more."""
    weight_OI, metric, fisher_OO = case(2, 192, 192)
    curve = Curve([spectrum("w", weight_OI, metric.moment_II, whole(fisher_OO), tokens=10**6)])
    found = solve(weight_OI, metric, fisher_OO, 2 ** curve.level_at_bits(bits - 0.2))
    assert found.bits / weight_OI.numel() == pytest.approx(bits, abs=0.1)
    assert 0.0436 < curve.gap_bits(found.bits / weight_OI.numel(), found.nats) < most


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

    def gap() -> float:
        found = solve(weight_OI, metric, fisher_OO, 2 ** curve.level_at_bits(1.0))
        return curve.gap_bits(written(found) / weight_OI.numel(), found.nats)

    aware = gap()
    monkeypatch.setattr("supremum.solve.viterbi.normal_bits", lambda: np.ones_like(normal_bits()))
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
