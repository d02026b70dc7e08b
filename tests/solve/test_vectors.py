"""Vectors of a book against all of them, and against llama.cpp's own quantiser in the same bytes."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from supremum import codecs
from supremum.codecs import Codec
from supremum.solve import Metric, distortion, nearest, solve, vector_kernels, vectors
from supremum.solve.descent import descend

from . import reference

VECTORS = [name for name in codecs.names() if codecs.get(name).book is not None]
AGAINST = [pytest.param(name, marks=pytest.mark.slow) if name.startswith("IQ1") else name for name in VECTORS]  # its tables

def ggml() -> Any:
    """bench/ggml.py."""
    path = Path(__file__).parents[2] / "bench" / "ggml.py"
    spec = importlib.util.spec_from_file_location("bench_ggml", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_unit(codec: Codec) -> Tensor:
    """All units (N, 8) of levels of a type with vectors of 8."""
    assert codec.book is not None
    points_KV = codec.book.points_KV
    if codec.book.signs == "own":
        return points_KV
    signs_S8 = torch.tensor(list(itertools.product((1.0, -1.0), repeat=8)))
    if codec.book.signs == "even":
        signs_S8 = signs_S8[signs_S8.prod(1) > 0]
    return (points_KV[:, None] * signs_S8).flatten(0, 1)


def rounded(wish_O8: Tensor, metric_88: Tensor, codec: Codec) -> Tensor:
    """Levels (O, 8) as the loops choose them under scales of one."""
    metric, book = vectors.metric_of(metric_88[None], codec), vectors.table(codec)
    room, chosen = vector_kernels._room(book), []
    for wish_8 in wish_O8:
        room.wish_8[:] = wish_8.numpy()
        vector_kernels._choose(room, 0, metric, book)
        chosen.append(room.level_8.copy())
    return torch.tensor(np.stack(chosen))


@pytest.mark.parametrize(("name", "slack"), [("IQ1_S", 1.00001), ("IQ1_M", 1.00001), ("IQ2_XXS", 1.03), ("IQ2_XS", 1.04)])
@pytest.mark.parametrize("tied", [0.0, 0.3])
def test_the_vector_is_the_best_of_all(name: str, slack: float, tied: float) -> None:
    """Exactly where signs are the vectors' own, else on the mean nearly so. tied: of the metric, off its diagonal."""
    codec, draw = codecs.get(name), torch.Generator().manual_seed(3)
    factor_88 = torch.eye(8) + tied * torch.randn(8, 8, generator=draw)
    metric_88 = factor_88 @ factor_88.T
    wish_O8 = torch.randn(40, 8, generator=draw) * float(codec.levels.square().mean().sqrt())
    chosen_O8, every_N8 = rounded(wish_O8, metric_88, codec), every_unit(codec)
    best_O = torch.stack([reference.losses(wish_8 - every_N8, torch.zeros(8), metric_88).min() for wish_8 in wish_O8])
    found_O = reference.losses(wish_O8, chosen_O8, metric_88)
    assert all((every_N8 == chosen_8).all(1).any() for chosen_8 in chosen_O8)
    assert (found_O >= best_O * (1 - 1e-5)).all() and found_O.sum() <= slack * best_O.sum()


@pytest.mark.parametrize("name", ["IQ2_S", "IQ3_S", "IQ3_XXS"])
def test_no_vector_or_sign_alone_is_better_where_columns_are_independent(name: str) -> None:
    """Tables of four and free signs, under a diagonal metric: the magnitudes one by one, signs as the wish has them."""
    codec, draw = codecs.get(name), torch.Generator().manual_seed(4)
    assert codec.book is not None
    points_KV, importance_8 = codec.book.points_KV, torch.rand(8, generator=draw) + 0.2
    wish_O8 = torch.randn(50, 8, generator=draw) * float(codec.levels.square().mean().sqrt())
    if codec.book.signs == "even":
        wish_O8[:, 0] *= wish_O8.sign().prod(1)
    chosen_O8, width = rounded(wish_O8, importance_8.diag(), codec), points_KV.shape[1]
    for start in range(0, 8, width):
        part = slice(start, start + width)
        error_OKV = (wish_O8[:, None, part].abs() - points_KV).square() * importance_8[part]
        found_O = ((wish_O8 - chosen_O8)[:, part].square() * importance_8[part]).sum(1)
        torch.testing.assert_close(found_O, error_OKV.sum(-1).amin(1))


@pytest.mark.parametrize("name", VECTORS)
def test_the_recurrence_adds_up_to_the_loss(name: str) -> None:
    codec, columns = codecs.get(name), 512
    weight_OI, metric = reference.weights(4, columns, seed=3), Metric.of(reference.moment(columns, seed=3))
    units = metric.in_units
    assert torch.equal(units.order_I.view(-1, 8) % 8, torch.arange(8).expand(columns // 8, 8))
    grid = vectors.search(weight_OI, metric.moment_II.diagonal(), codec)
    level_OI, loss_O = vectors.cancel(weight_OI, units.order_I, units.factor_II, grid, codec)
    scale_OI, offset_OI = reference.spread(grid, columns)
    expected_O = reference.losses(weight_OI, level_OI.double() * scale_OI + offset_OI, metric.moment_II)
    torch.testing.assert_close(loss_O.double(), expected_O, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", AGAINST)
def test_beats_llama_cpp_s_own_quantiser_in_its_bytes(name: str) -> None:
    """Inputs correlated and of different sizes, as a model's are; its encoder knows their diagonal, ours all of S."""
    codec, columns = codecs.get(name), 512
    weight_OI, moment_II = 0.05 * reference.weights(48, columns, seed=5), reference.moment(columns, seed=5)
    theirs = ggml().quantized(weight_OI, name, moment_II.diagonal())
    ours, metric = solve(weight_OI, moment_II, codec), Metric.of(moment_II)
    assert ours.nbytes == theirs.nbytes
    before, plain, after = (distortion(weight_OI - coded.decode(), moment_II)
                            for coded in (theirs, solve(weight_OI, metric, codec, feedback=False), ours))
    assert after < 0.75 * before and after < 0.75 * plain
    better = descend(ours, weight_OI, metric.moment_II, torch.ones(len(weight_OI)))
    assert distortion(weight_OI - better.decode(), metric.moment_II) < \
        0.99 * distortion(weight_OI - ours.decode(), metric.moment_II)


@pytest.mark.parametrize("name", AGAINST)
def test_nearest_rounding_is_as_good_as_llama_cpp_s(name: str) -> None:
    """Without an importance matrix, on normal weights: mean squared error."""
    weight_OI = 0.02 * torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    theirs = ggml().quantized(weight_OI, name, torch.ones(512))
    ours = nearest(weight_OI, codecs.get(name))
    error, reached = ((coded.decode() - weight_OI).square().sum() for coded in (theirs, ours))
    assert reached < 1.01 * error
