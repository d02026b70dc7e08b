"""Scores by hand, against a float64 brute force, and against the statistics' definitions."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum.errors import SupremumError
from supremum.measure import Comparison, TokenScores, compare, scores, summarise


def test_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = ln 2/2 + 0 - ln 2/4 = ln 2/4."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    one = compare(p + 3.0, q - 7.0, torch.tensor([0]))  # logits are defined up to a constant
    assert one.kl.item() == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert one.nll_reference.item() == pytest.approx(math.log(2), rel=1e-6)
    assert one.nll.item() == pytest.approx(math.log(4), rel=1e-6)
    assert one.same.tolist() == [False]


def test_uniform_answers_have_the_vocabularys_size_as_perplexity():
    quality = summarise([compare(None, torch.zeros(7, 50), torch.arange(7))])
    assert quality.perplexity == pytest.approx(50, rel=1e-6)
    assert quality.perplexity_se is None and quality.kl_mean is None and quality.same_top is None
    assert (quality.tokens, quality.windows) == (7, 1)


def test_a_model_against_itself():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = compare(logits, logits, torch.arange(20))
    assert one.kl.abs().max() == 0 and one.same.all() and torch.equal(one.nll, one.nll_reference)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), positions=st.integers(1, 40), width=st.integers(2, 70),
       scale=st.floats(0.1, 20), block=st.integers(1, 400), cached=st.integers(1, 400))
def test_agrees_with_float64(seed, positions, width, scale, block, cached):
    generator = torch.Generator().manual_seed(seed)
    reference = scale * torch.randn(positions, width, generator=generator)
    candidate = reference + torch.randn(positions, width, generator=generator)
    targets = torch.randint(0, width, (positions,), generator=generator)
    old = scores.ELEMENTS, scores.CACHED
    scores.ELEMENTS, scores.CACHED = block, cached
    try:
        one = compare(reference, lambda rows: candidate[rows], targets)
    finally:
        scores.ELEMENTS, scores.CACHED = old
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(candidate.double(), -1)
    torch.testing.assert_close(one.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(one.nll.double(), -q[torch.arange(positions), targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.nll_reference.double(), -p[torch.arange(positions), targets], rtol=1e-5, atol=1e-5)
    assert torch.equal(one.same, p.argmax(-1) == q.argmax(-1))


def test_padding_of_the_candidates_vocabulary_is_ignored():
    reference = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([reference, torch.full((5, 6), 50.0)], 1)
    assert compare(reference, padded, torch.arange(5)).kl.abs().max() == 0
    with pytest.raises(SupremumError, match="predicts 10 tokens, its reference 16"):
        compare(padded, reference, torch.arange(5))


def test_tokens_that_both_exclude_cost_nothing():
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    assert compare(logits, torch.tensor([[2.0, 1.0, -math.inf]]), torch.tensor([0])).kl.item() == pytest.approx(
        math.tanh(0.5), rel=1e-6)  # (p - q)(log p - log q) of two logits one apart


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_refused(broken):
    good, bad = torch.zeros(3, 4), torch.zeros(3, 4)
    bad[1, 2] = broken
    with pytest.raises(SupremumError, match=r"model's answers are not finite \(1 of 3"):
        compare(good, bad, torch.tensor([2, 2, 2]))
    with pytest.raises(SupremumError, match="reference's answers are not finite"):
        compare(bad, good, torch.tensor([2, 2, 2]))


def test_summary_is_over_tokens_and_errors_are_over_windows():
    generator = torch.Generator().manual_seed(1)
    windows = [TokenScores(*(torch.rand(30, generator=generator) for _ in range(3)),
                           torch.rand(30, generator=generator) > 0.3) for _ in range(9)]
    quality = summarise(iter(windows))
    root = 3.0

    def error(values):
        return statistics.stdev([v.double().mean().item() for v in values]) / root

    every = sorted(torch.cat([w.kl for w in windows]).tolist())
    assert quality.kl_mean == pytest.approx(statistics.fmean(every), rel=1e-6)
    assert quality.kl_se == pytest.approx(error([w.kl for w in windows]), rel=1e-6)
    assert quality.kl_median == pytest.approx(statistics.median(every), rel=1e-6)
    low = int(0.99 * 269)
    assert quality.kl_p99 == pytest.approx(every[low] + (0.99 * 269 - low) * (every[low + 1] - every[low]), rel=1e-5)
    assert quality.kl_max == pytest.approx(every[-1])
    mean = statistics.fmean(torch.cat([w.nll for w in windows]).tolist())
    assert quality.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert quality.perplexity_se == pytest.approx(math.exp(mean) * error([w.nll for w in windows]), rel=1e-6)
    assert quality.excess_nll_se == pytest.approx(error([w.nll - w.nll_reference for w in windows]), rel=1e-5)
    assert quality.same_top == pytest.approx(torch.cat([w.same for w in windows]).double().mean().item())
    assert quality.same_top_se == pytest.approx(error([w.same for w in windows]), rel=1e-6)
    assert (quality.tokens, quality.windows) == (270, 9)
    assert quality.to_dict()["kl_mean"] == quality.kl_mean


def test_windows_added_one_by_one_give_the_same_quality():
    generator = torch.Generator().manual_seed(2)
    pairs = [(torch.randn(8, 20, generator=generator), torch.randn(8, 20, generator=generator)) for _ in range(3)]
    comparison = Comparison()
    kept = [comparison.add(p, q, torch.arange(8)) for p, q in pairs]
    assert comparison.quality() == summarise(kept)


def test_nothing_to_summarise():
    with pytest.raises(ValueError, match="no windows"):
        summarise([])
