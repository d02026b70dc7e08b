"""One layer's limit against closed forms, brute force, and quantisers that are run for real."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waterfilling import distortion_of_rate, rate_of_distortion

from supremum.errors import SupremumError
from supremum.limits import waterfill as wf

spectra = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=20).map(lambda values: torch.tensor(values).double())


def correlated(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(-2, 1, size, dtype=torch.float64)
    return basis * scale @ basis.T


def entropy(codes: torch.Tensor) -> float:
    p = codes.unique(return_counts=True)[1].double() / codes.numel()
    return float(-(p * p.log2()).sum())


def test_white_source_is_half_log2_of_the_signal_to_noise_ratio():
    lam = torch.full((7,), 3.0)
    assert rate_of_distortion(lam, 0.75) == pytest.approx(1.0)
    assert distortion_of_rate(lam, 2.5) == pytest.approx(3.0 * 2**-5)
    assert rate_of_distortion(lam, 3.0) == rate_of_distortion(lam, 5.0) == 0.0


def test_a_component_under_water_costs_nothing():
    lam = torch.tensor([4.0, 1.0, 0.01])
    assert rate_of_distortion(lam, (0.25 + 0.25 + 0.01) / 3) == pytest.approx((2 + 1) / 3)
    assert distortion_of_rate(lam, 1.0) == pytest.approx((0.25 + 0.25 + 0.01) / 3)
    assert distortion_of_rate(torch.tensor([1.0, 0.0]), 1.0) == pytest.approx(2.0**-4 / 2)


@settings(deadline=None, max_examples=60)
@given(spectra, st.floats(0.01, 8), st.floats(0.01, 8))
def test_rate_and_distortion_are_inverse_decreasing_and_convex(lam, first, second):
    low, high = sorted((first, second))
    d_low, d_high = distortion_of_rate(lam, low), distortion_of_rate(lam, high)
    assert rate_of_distortion(lam, d_low) == pytest.approx(low, abs=1e-6)
    assert d_high <= d_low * (1 + 1e-12)
    assert distortion_of_rate(lam, (low + high) / 2) <= (d_low + d_high) / 2 * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(spectra, st.floats(0.05, 6))
def test_no_other_split_of_the_rate_is_better(lam, rate):
    best = distortion_of_rate(lam, rate)
    shares = torch.rand(200, len(lam), generator=torch.Generator().manual_seed(1)).double()
    shares = shares / shares.sum(1, keepdim=True) * rate * len(lam)
    assert float((lam * 4.0**-shares).mean(1).min()) >= best * (1 - 1e-9)


def test_zero_distortion_is_refused():
    with pytest.raises(SupremumError, match="no finite rate"):
        wf.level_of_distortion(torch.ones(3), 0.0)


def test_pivots_multiply_to_the_determinant_in_any_order():
    moment = correlated(8)
    for order in ("natural", "activation"):
        assert float(wf.pivots(moment, order=order).log().sum()) == pytest.approx(float(moment.logdet()))


def test_an_indefinite_moment_is_refused_and_a_singular_one_is_not():
    with pytest.raises(SupremumError, match="semi-definite"):
        wf.pivots(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert wf.numbers(torch.ones(2, 2)).geometric_mean < 1e-2


@pytest.mark.parametrize("method", ["nearest", "gptq", "gptq-act-order", "watersic"])
def test_predicted_gap_is_what_the_simulated_algorithm_loses(method):
    """Random W, known S, entropy of the integers that each algorithm writes (WaterSIC: column by column)."""
    moment = correlated(24)
    if method == "gptq-act-order":
        order = moment.diagonal().argsort()
        moment = moment[order][:, order]
    weight = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    factor = torch.linalg.cholesky(moment)
    step = torch.full((24,), 0.05, dtype=torch.float64)
    if method == "watersic":
        step = 0.05 * factor.diagonal().log().mean().exp() / factor.diagonal()
    codes = torch.empty_like(weight)
    target = weight.clone()
    for i in reversed(range(24)):
        codes[:, i] = (target[:, i] / step[i]).round()
        error = target[:, i] - codes[:, i] * step[i]
        if method != "nearest":  # the columns before i take up what column i got wrong: their part of L[i, :]
            target[:, :i] += error[:, None] * factor[i, :i] @ torch.linalg.inv(factor[:i, :i])
    delta = weight - codes * step
    distortion = float(((delta @ moment) * delta).sum(1).mean() / 24)
    rate = sum(entropy(codes[:, i]) for i in range(24)) / 24
    gap = rate - rate_of_distortion(torch.linalg.eigvalsh(moment), distortion)
    assert gap == pytest.approx(wf.numbers(moment).gaps()[method], abs=0.015)


def test_shrinkage_falls_with_samples_and_matches_the_best_mixture():
    size, samples = 40, 60
    truth = correlated(size)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(truth).T
    moment = x.T @ x / samples

    def error(share: float) -> float:
        mixed = (1 - share) * moment + share * moment.diagonal().mean() * torch.eye(size)
        return float((mixed - truth).square().sum())

    best = min(error(k / 100) for k in range(101))
    assert error(wf.shrinkage(moment, samples)) < 1.1 * best
    assert wf.shrinkage(moment, 10**6) < 1e-3


@pytest.mark.parametrize("samples", [100, 400, 1000])
def test_sampling_bias_is_that_of_a_wishart_determinant(samples):
    size = 100
    x = torch.randn(samples, size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    exact = -float(sum(torch.digamma(torch.tensor((samples - i) / 2.0).double()) for i in range(size)))
    exact = (exact / size - math.log(2 / samples)) / (2 * math.log(2))
    assert wf.sampling_bias_bits(samples, size) == pytest.approx(exact, abs=0.02)
    if samples > size:
        assert -float(torch.logdet(x.T @ x / samples)) / (2 * size * math.log(2)) == pytest.approx(exact, abs=0.02)
    assert wf.sampling_bias_bits(size - 1, size) == math.inf
