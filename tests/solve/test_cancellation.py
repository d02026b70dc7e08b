"""The solver against a textbook GPTQ, brute force, and what theory bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from supremum import codecs
from supremum.codecs import Grid
from supremum.solve import Metric, distortion, nearest, solve, solve_together
from supremum.solve.cancellation import FLOOR, _cancel, damped, inverse_factor
from supremum.solve.scales import search

from . import reference

SOME = ("int2-g32", "int3-g32", "int4-g64", "int4-channel", "int8-channel", "Q4_1", "Q8_0", "IQ4_NL", "MXFP4", "Q3_K",
        "Q4_K", "IQ4_XS")  # every kind: uniform and not, with offset and without, alone and in super-blocks


def test_the_factor_is_the_root_of_the_inverse() -> None:
    metric_II = damped(reference.moment(37), 0.01).double()
    factor_II = inverse_factor(metric_II).double()
    assert torch.equal(factor_II, factor_II.triu())
    torch.testing.assert_close(factor_II.T @ factor_II @ metric_II, torch.eye(37, dtype=torch.float64), rtol=0, atol=1e-4)


def test_damping_goes_by_each_inputs_own_size() -> None:
    """Inputs in other units are damped alike: D (S + a diag S) D = D S D + a diag(D S D). One huge input drowns no other."""
    moment_II, unit_I = reference.moment(37), torch.ones(37)
    unit_I[5] = 300.0
    expected_II = damped(moment_II, 0.1) * unit_I * unit_I[:, None]
    torch.testing.assert_close(damped(moment_II * unit_I * unit_I[:, None], 0.1), expected_II, rtol=0.03, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_equals_textbook_gptq(name: str, act_order: bool) -> None:
    codec = codecs.get(name)
    columns = 256 if codec.block == 256 else 192  # more than two of the solver's blocks
    weight_OI, moment_II = reference.weights(5, columns, seed=3), reference.moment(columns, seed=3)
    metric = Metric.of(moment_II, damping=0.01, act_order=act_order)
    diagonal_I = moment_II.double().diagonal()
    metric_II = moment_II.double() + (0.01 * diagonal_I + FLOOR * diagonal_I.mean()).diag()
    order_I = metric_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    grid = search(weight_OI, metric.moment_II.diagonal(), codec)

    cancelled_OI, loss_O = _cancel(weight_OI, metric, grid, codec)
    expected_OI = reference.gptq(weight_OI, metric_II, grid, codec, order_I)
    assert torch.equal(cancelled_OI.long(), expected_OI)
    expected_O = reference.losses(weight_OI, reference.decoded(expected_OI, grid, codec), metric_II)
    torch.testing.assert_close(loss_O.double(), expected_O, rtol=1e-4, atol=0)

    # what is returned: of that and plain rounding, row by row the better
    rounded_OI = reference.round_to_nearest(weight_OI, grid, codec)
    rounded_O = reference.losses(weight_OI, reference.decoded(rounded_OI, grid, codec), metric_II)
    best_OI = torch.where((expected_O < rounded_O)[:, None], expected_OI, rounded_OI)
    coded = solve(weight_OI, metric, codec, refits=0)
    assert torch.equal(coded.codec.unpack(coded.tensors, coded.shape)[0].long(), best_OI)


def test_without_feedback_it_is_nearest_rounding() -> None:
    codec, weight_OI = codecs.get("int3-g32"), reference.weights(4, 64)
    metric = Metric.of(reference.moment(64))
    codes_OI, grid = codec.unpack(solve(weight_OI, metric, codec, feedback=False).tensors, (4, 64))
    assert torch.equal(codes_OI.long(), reference.round_to_nearest(weight_OI, grid, codec))
    plain_OI, plain = codec.unpack(nearest(weight_OI, codec).tensors, (4, 64))
    assert torch.equal(plain_OI.long(), reference.round_to_nearest(weight_OI, plain, codec))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.4, 2.0))
def test_brute_force_on_two_by_three(seed: int, scale: float) -> None:
    """Never better than the best of all 8^3 points of a row, and within Babai's bound of zero where nothing is clipped."""
    codec, draw = codecs.get("int3-channel"), torch.Generator().manual_seed(seed)
    weight_OI, x_TI = torch.randn(2, 3, generator=draw), torch.randn(5, 3, generator=draw)
    metric = Metric.of(x_TI.T @ x_TI / 5)
    grid = codec.project(torch.full((2, 1), scale), None)
    codes_OI, _ = _cancel(weight_OI, metric, grid, codec)
    reached_O = reference.losses(weight_OI, reference.decoded(codes_OI, grid, codec), metric.moment_II)
    points_PI = torch.tensor(list(itertools.product(codec.levels.tolist(), repeat=3)), dtype=torch.float64)
    stored_O = grid.scale_OG.double()[:, 0]
    best_O = torch.stack([reference.losses(weight_OI[o].expand(len(points_PI), 3), points_PI * stored_O[o],
                                           metric.moment_II).min() for o in range(2)])
    assert (reached_O >= best_O * (1 - 1e-6)).all()
    bound_O = (stored_O / 2) ** 2 * (1 / metric.factor_II.diagonal().double().square()).sum()
    inside_O = ((codes_OI > 0) & (codes_OI < 7)).all(1)
    assert (reached_O <= bound_O * (1 + 1e-4))[inside_O].all()


def test_brute_force_is_reached_where_inputs_are_independent() -> None:
    codec, weight_OI = codecs.get("int2-channel"), reference.weights(2, 3, seed=5)
    metric = Metric.of(torch.diag(torch.tensor([1.0, 0.2, 3.0])))
    coded = solve(weight_OI, metric, codec)
    _, grid = codec.unpack(coded.tensors, coded.shape)
    points_PI = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.uint8)
    for o in range(2):
        row = Grid(grid.scale_OG[o:o + 1].expand(len(points_PI), 1))
        every = reference.losses(weight_OI[o].expand(len(points_PI), 3), reference.decoded(points_PI, row, codec),
                                 metric.moment_II)
        reached = reference.losses(weight_OI[o:o + 1], coded.decode()[o:o + 1], metric.moment_II)
        torch.testing.assert_close(reached[0], every.min())


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, Tensor, Tensor]:
    """(codec name, weights, moment): weights of any size, with outliers, equal or zero rows, and dead inputs."""
    name = draw(st.sampled_from(codecs.names()))
    columns, seed = reference.columns(codecs.get(name)), draw(st.integers(0, 2**31))
    weight_OI = reference.weights(3, columns, seed, tail=draw(st.sampled_from([0.0, 1.0])))
    kind = draw(st.sampled_from(["plain", "outlier", "constant", "zero", "positive"]))
    if kind == "outlier":
        weight_OI[0, seed % columns] = 100.0
    elif kind in ("constant", "zero"):
        weight_OI[0] = 0.7 if kind == "constant" else 0.0
    elif kind == "positive":
        weight_OI = weight_OI.abs() + 0.5
    moment_II = reference.moment(columns, seed, skew=draw(st.sampled_from([0.0, 0.5, 1.5])), tokens=columns // 2)
    if draw(st.booleans()):
        dead = seed % columns
        moment_II[dead] = moment_II[:, dead] = 0
    return name, weight_OI * draw(st.sampled_from([1e-38, 1e-6, 0.02, 1.0, 30.0])), moment_II


@settings(max_examples=60, deadline=None)
@given(problems())
def test_never_worse_than_nearest_rounding(problem: tuple[str, Tensor, Tensor]) -> None:
    name, weight_OI, moment_II = problem
    codec, metric = codecs.get(name), Metric.of(moment_II)
    rounded_O = reference.losses(weight_OI, solve(weight_OI, metric, codec, feedback=False).decode(), metric.moment_II)
    one_O, two_O = (reference.losses(weight_OI, solve(weight_OI, metric, codec, refits=refits).decode(), metric.moment_II)
                    for refits in (0, 1))
    assert two_O.isfinite().all()
    slack_O = 1e-10 * reference.losses(weight_OI, torch.zeros_like(weight_OI), metric.moment_II)
    assert (one_O <= rounded_O * (1 + 1e-4) + slack_O).all()
    assert (two_O <= one_O * (1 + 1e-4) + slack_O).all()


@pytest.mark.parametrize("name", SOME)
def test_feedback_pays(name: str) -> None:
    """On correlated inputs most of the error can be cancelled; a wrong sign would double it."""
    codec = codecs.get(name)
    columns = max(128, codec.block)
    metric = Metric.of(reference.moment(columns, skew=1.0, tokens=columns))
    weight_OI = reference.weights(16, columns, tail=0)
    grid = search(weight_OI, metric.moment_II.diagonal(), codec)
    cancelled = reference.decoded(_cancel(weight_OI, metric, grid, codec)[0], grid, codec)
    rounded = reference.decoded(reference.round_to_nearest(weight_OI, grid, codec), grid, codec)
    loss, plain = (reference.losses(weight_OI, w, metric.moment_II).sum() for w in (cancelled, rounded))
    assert loss < 0.7 * plain


@pytest.mark.parametrize("name", ["int2-g32", "int3-g32", "Q4_0"])
def test_a_joint_fit_and_a_second_pass_pay(name: str) -> None:
    metric, weight_OI = Metric.of(reference.moment(128, skew=1.0), damping=0.02), reference.weights(32, 128)
    once, twice = (distortion(weight_OI - solve(weight_OI, metric, codecs.get(name), refits=refits).decode(),
                              metric.moment_II) for refits in (0, 1))
    assert twice < 0.97 * once


@pytest.mark.parametrize("name", ["int3-g32", "uint4-g32", "IQ2_XXS"])
def test_a_row_alone_is_solved_as_among_others(name: str) -> None:
    codec = codecs.get(name)
    weight_OI, metric = reference.weights(3, 256), Metric.of(reference.moment(256))
    together = solve(weight_OI, metric, codec).decode()
    torch.testing.assert_close(solve(weight_OI[:1], metric, codec).decode(), together[:1])


def test_dead_inputs_are_rounded_to_nearest() -> None:
    """Columns that were never seen have no say: their weights are kept as well as the grid can, the rest is unmoved."""
    codec, weight_OI, moment_II = codecs.get("int4-g32"), reference.weights(6, 64), reference.moment(64)
    dead = [3, 40, 41]
    moment_II[dead] = 0
    moment_II[:, dead] = 0
    regular_II = damped(moment_II, 0.01)
    assert bool((regular_II.diagonal() > 0).all()) and torch.linalg.cholesky(regular_II).isfinite().all()
    codes_OI, grid = codec.unpack(solve(weight_OI, moment_II, codec, refits=0).tensors, (6, 64))
    expected_OI = reference.round_to_nearest(weight_OI, grid, codec)
    assert torch.equal(codes_OI[:, dead].long(), expected_OI[:, dead])
    assert torch.equal(damped(torch.zeros(4, 4), 0.01), torch.eye(4))


def test_act_order_is_better_on_average_where_inputs_differ_much() -> None:
    codec, ratios = codecs.get("int3-channel"), []
    for seed in range(12):
        moment_II, weight_OI = reference.moment(96, seed, skew=1.5), reference.weights(8, 96, seed, tail=0)
        ordered, natural = (Metric.of(moment_II, damping=0.01, act_order=act_order) for act_order in (True, False))
        one, other = (distortion(weight_OI - solve(weight_OI, m, codec, refits=0).decode(), ordered.moment_II)
                      for m in (ordered, natural))
        ratios.append(one / other)
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("name", SOME)
def test_together_is_the_same_as_alone_and_again(name: str) -> None:
    codec = codecs.get(name)
    columns = reference.columns(codec)
    metric = Metric.of(reference.moment(columns))
    targets = {part: reference.weights(rows, columns, rows) for part, rows in (("q", 7), ("k", 3), ("v", 4))}
    together = solve_together(targets, metric, codec)
    for part, weight_OI in targets.items():
        alone, again = solve(weight_OI, metric, codec), solve(weight_OI, metric, codec)
        assert alone.shape == together[part].shape == weight_OI.shape
        for key, value in alone.tensors.items():
            assert torch.equal(value, again.tensors[key]) and torch.equal(value, together[part].tensors[key])


def test_threads_are_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        solve(reference.weights(2, 64), reference.moment(64), codecs.get("int4-g64"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_distortion_is_the_squared_output_error() -> None:
    change_OI, x_TI = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.randn(50, 8)
    expected = (x_TI.double() @ change_OI.double().T).square().sum(1).mean()
    assert distortion(change_OI, x_TI.T @ x_TI / 50) == pytest.approx(float(expected), rel=1e-5)
