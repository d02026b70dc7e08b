"""The model-wide curve against the outer product written out, and what a singular S or B does to it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waterfilling import distortion_of_rate

from supremum.errors import SupremumError
from supremum.limits import waterfill as wf
from supremum.limits.information import Curve, LayerSpectrum, metric, spectrum


def layer(name: str, shape_OI: tuple[int, int], seed: int = 0, decay: float = 6.0) -> LayerSpectrum:
    generator = torch.Generator().manual_seed(seed)
    alpha, beta = (torch.exp(-decay * torch.rand(n, generator=generator, dtype=torch.float64)) for n in shape_OI[::-1])
    return LayerSpectrum(name, shape_OI, 0.02 * (seed + 1), alpha, 1e-3 * beta, tokens=1000)


def components(layers: list[LayerSpectrum]) -> torch.Tensor:
    parts = [s.weight_variance * torch.outer(s.output_eigenvalues_O, s.input_eigenvalues_I) for s in layers]
    return torch.cat([part.flatten() for part in parts])


LAYERS = [layer("a", (5, 9), 0), layer("b", (12, 4), 1), layer("c", (3, 3), 2, decay=25.0)]


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 10))
def test_curve_equals_brute_force_over_all_components(bits):
    curve, u = Curve(LAYERS), components(LAYERS)
    assert curve.weights == len(u)
    level = curve.level_at_bits(bits)
    assert wf.rate_at(u, 2**level) == pytest.approx(bits, abs=1e-7)
    assert 0.5 * float(u.clamp(max=2**level).sum()) == pytest.approx(curve.kl_at_bits(bits), rel=1e-7)
    assert 2 / len(u) * curve.kl_at_bits(bits) == pytest.approx(distortion_of_rate(u, bits), rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 12), st.floats(0.05, 12))
def test_curve_is_decreasing_convex_and_its_inverse_is_exact(first, second):
    curve = Curve(LAYERS)
    low, high = sorted((first, second))
    kl_low, kl_high = curve.kl_at_bits(low), curve.kl_at_bits(high)
    assert kl_high <= kl_low * (1 + 1e-9)
    assert curve.kl_at_bits((low + high) / 2) <= (kl_low + kl_high) / 2 * (1 + 1e-9)
    assert curve.bits_at_kl(kl_low) == pytest.approx(low, abs=1e-6)


def test_layers_share_one_water_level():
    curve = Curve(LAYERS)
    level = curve.level_at_bits(2.0)
    for s, bits, kl in zip(LAYERS, curve.layer_bits(level), curve.layer_kl(level), strict=True):
        u = components([s])
        assert bits == pytest.approx(wf.rate_at(u, 2**level), abs=1e-9)
        assert kl == pytest.approx(0.5 * float(u.clamp(max=2**level).sum()))
    assert sum(b * s.weights for b, s in zip(curve.layer_bits(level), LAYERS, strict=True)) / curve.weights == (
        pytest.approx(2.0)
    )


def test_ends_of_the_curve():
    curve, u = Curve(LAYERS), components(LAYERS)
    assert curve.kl_at_zero == pytest.approx(float(u.sum()) / 2)
    assert curve.kl_at_bits(0.0) == pytest.approx(curve.kl_at_zero)
    assert curve.bits_at_kl(2 * curve.kl_at_zero) == 0.0
    with pytest.raises(SupremumError):
        curve.bits_at_kl(0.0)


def test_high_rate_constant_predicts_kl_and_four_per_bit():
    curve = Curve(LAYERS[:2])
    predicted = 2.0 ** (curve.high_rate_constant() - 2 * 25)
    assert curve.kl_at_bits(25.0) == pytest.approx(predicted, rel=1e-6)
    assert curve.gap_bits(25.0, 4 * predicted) == pytest.approx(1.0, abs=1e-6)


def test_a_dead_input_takes_no_bits_and_does_no_harm():
    live = layer("a", (4, 6))
    dead = LayerSpectrum("d", (4, 8), live.weight_variance,
                         torch.cat([live.input_eigenvalues_I, torch.zeros(2)]), live.output_eigenvalues_O, 1000)
    assert Curve([dead]).kl_at_bits(3.0) == pytest.approx(Curve([live]).kl_at_bits(4.0))
    assert Curve([dead]).high_rate_constant() == -math.inf
    with pytest.raises(SupremumError):
        Curve([])


def test_sampled_points_span_the_curve():
    points = Curve(LAYERS).sample(low=0.5, high=6.0)
    assert points[0][0] == pytest.approx(0.5, abs=1e-6) and points[-1][0] >= 6.0
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(points))


def test_one_whitened_layer_is_a_white_source():
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    s = spectrum("w", weight, torch.eye(50), torch.eye(40) * 0.1, tokens=10**6, profile=False)
    expected = 2000 / 2 * s.weight_variance * 0.1 * 2.0**-4
    assert Curve([s]).kl_at_bits(2.0) == pytest.approx(expected)
    assert s.numbers is not None and s.numbers.gaps()["nearest"] == pytest.approx(wf.SHAPING_BITS)
    diagonal = spectrum("w", weight, torch.ones(50), torch.full((40,), 0.1), tokens=10**6, profile=False)
    assert Curve([diagonal]).kl_at_bits(2.0) == pytest.approx(expected)
    assert not diagonal.exact_output


def test_too_few_tokens_are_shrunk_and_said():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    few = metric(x.T @ x / 20, tokens=20)
    assert few.shrunk > 0 and float(torch.linalg.eigvalsh(few.moment_II).min()) > 0
    assert metric(torch.eye(50), tokens=500).shrunk == 0


def test_statistics_of_another_layer_are_refused_by_name():
    with pytest.raises(SupremumError, match=r"mlp\.up"):
        spectrum("mlp.up", torch.ones(4, 5), torch.eye(4), torch.eye(4), tokens=100)


def test_a_variance_profile_is_part_of_the_spectrum():
    """W = R^1/2 Z C^1/2: its limit is that of Z under the metrics that R and C make of B and S."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.tensor([0.25, 1.0, 4.0, 1.0]).repeat(300), torch.tensor([4.0, 0.25, 1.0]).repeat(300)
    z = torch.randn(1200, 900, generator=generator)
    weight = row.sqrt()[:, None] * z * column.sqrt()
    s = spectrum("w", weight, torch.ones(900), torch.ones(1200), tokens=10**6)
    u = torch.outer(row, column).double().flatten()
    for bits in (1.0, 3.0):
        limit = distortion_of_rate(u, bits)
        assert Curve([s]).kl_at_bits(bits) == pytest.approx(limit * len(u) / 2, rel=0.02)
        assert s.gap_bits(bits + 0.25, limit) == pytest.approx(0.25, abs=0.02)
    blind = spectrum("w", weight, torch.ones(900), torch.ones(1200), tokens=10**6, profile=False)
    assert Curve([blind]).kl_at_bits(3.0) > 2 * Curve([s]).kl_at_bits(3.0)


def test_rotated_metrics_with_a_profile_equal_the_dense_covariance():
    generator = torch.Generator().manual_seed(1)
    root_S, root_B = torch.randn(6, 6, generator=generator).double(), torch.randn(4, 4, generator=generator).double()
    weight = torch.randn(4, 6, generator=generator)
    moment, fisher = root_S @ root_S.T, root_B @ root_B.T
    s = spectrum("w", weight, moment, fisher, tokens=10**6)
    square = weight.double().square()
    row = square.mean(1)
    column = (square / row[:, None]).mean(0)
    deviation = torch.kron((row / square.mean()).sqrt(), (column / column.mean()).sqrt())
    dense = torch.kron(fisher, moment) * deviation[:, None] * deviation * square.mean()
    assert 0.5 * 24 * distortion_of_rate(torch.linalg.eigvalsh(dense), 2.0) == pytest.approx(
        Curve([s]).kl_at_bits(2.0)
    )
