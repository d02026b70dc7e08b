"""Descent against brute force in float64, and what it promises: no more damage, rows that make up for each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from supremum import codecs
from supremum.codecs import Coded
from supremum.solve import Metric, descent, solve
from supremum.solve.cancellation import damped
from supremum.solve.descent import descend

from . import reference

EVERY = ("int2-g32", "int3-g32", "int4-g64", "uint4-g32", "ternary-g32", "int4-channel", "int8-channel", "Q4_0", "Q4_1",
         "IQ4_NL", "MXFP4", "mxfp8-g32", "nvfp4-g16", "fp8-b128", "gptq3-g32", "Q3_K", "Q4_K", "IQ4_XS", "IQ1_S",
         "IQ2_XXS", "IQ3_XXS")


def problem(name: str, rows: int = 12, seed: int = 0) -> tuple[Coded, Tensor, Tensor, Tensor]:
    """(solved, target, S damped, B): rows in pairs that are read as their sum."""
    codec = codecs.get(name)
    columns = 128 if codec.block == 128 else reference.columns(codec)
    target_OI, moment_II = reference.weights(rows, columns, seed), reference.moment(columns, seed)
    fisher_OO = torch.kron(torch.eye(rows // 2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])) * torch.linspace(0.5, 2, rows).sqrt()
    metric = Metric.of(moment_II)
    return solve(target_OI, metric, codec), target_OI, metric.moment_II, (fisher_OO + fisher_OO.T) / 2


def damage(coded: Coded, target_OI: Tensor, metric_II: Tensor, fisher_OO: Tensor) -> float:
    change_OI = target_OI.double() - coded.decode().double()
    return float((damped(fisher_OO, descent.OUTPUT_DAMPING).double() * (change_OI @ metric_II.double() @ change_OI.T)).sum())


@pytest.mark.parametrize("name", EVERY)
def test_never_more_damage_and_usually_less(name: str) -> None:
    coded, *rest = problem(name)
    before, after = damage(coded, *rest), damage(descend(coded, *rest), *rest)
    assert after < before * (1.0 if name.startswith(("int8", "fp8", "mxfp8")) else 0.97)


@pytest.mark.parametrize("name", ["int2-g32", "int3-g32", "uint4-g32", "IQ4_NL", "ternary-g32"])
def test_ends_where_no_single_code_can_be_changed(name: str) -> None:
    """All other codes of every weight, tried one by one."""
    coded, target_OI, metric_II, fisher_OO = problem(name, rows=4)
    found = descend(coded, target_OI, metric_II, fisher_OO, rounds=60)
    codec = found.codec
    codes_OI, grid = codec.unpack(found.tensors, found.shape)
    scale_OI, _ = reference.spread(grid, codes_OI.shape[1])
    levels_K, fisher_OO = codec.levels.double(), damped(fisher_OO, descent.OUTPUT_DAMPING).double()
    change_OI, metric_II = target_OI.double() - found.decode().double(), metric_II.double()
    move_OIK = (levels_K - levels_K[codes_OI.long()][..., None]) * scale_OI[..., None]
    slope_OI = fisher_OO @ change_OI @ metric_II
    steep_OI = fisher_OO.diagonal()[:, None] * metric_II.diagonal()
    # tr(B dW S dW^T) before less after
    gained_OIK = 2 * slope_OI[..., None] * move_OIK - steep_OI[..., None] * move_OIK.square()
    assert gained_OIK.max() < 1e-5 * float((fisher_OO * (change_OI @ metric_II @ change_OI.T)).sum())
    assert gained_OIK.amin(-1).max() < 0  # and every weight could have been worse


def test_ends_where_no_single_scale_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than bfloat16 rounds it: what the best change of one group's scale would gain, in parts of the damage."""
    monkeypatch.setattr(descent, "OUTPUT_DAMPING", 0.01)
    coded, target_OI, metric_II, fisher_OO = problem("int3-g32", rows=8)
    found = descend(coded, target_OI, metric_II, fisher_OO, rounds=60)
    codes_OI, _ = found.codec.unpack(found.tensors, found.shape)
    fisher_OO, metric_II = damped(fisher_OO, 0.01).double(), metric_II.double()
    change_OI = target_OI.double() - found.decode().double()
    level_OGS = found.codec.levels.double()[codes_OI.long()].unflatten(1, (-1, 32))
    slope_OGS = (fisher_OO @ change_OI @ metric_II).unflatten(1, (-1, 32))
    inner_GSS = torch.stack([metric_II[i:i + 32, i:i + 32] for i in range(0, len(metric_II), 32)])
    steep_OG = torch.einsum("ogs,gst,ogt->og", level_OGS, inner_GSS, level_OGS) * fisher_OO.diagonal()[:, None]
    gain_OG = (slope_OGS * level_OGS).sum(-1).square() / steep_OG
    assert gain_OG.max() < 0.002 * float((fisher_OO * (change_OI @ metric_II @ change_OI.T)).sum())


def test_rows_make_up_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two rows are read as their sum, errors of opposite sign are free: no row by itself knows that."""
    monkeypatch.setattr(descent, "OUTPUT_DAMPING", 0.01)
    coded, target_OI, metric_II, fisher_OO = problem("int3-g32", rows=32)
    apart = descend(coded, target_OI, metric_II, fisher_OO.diagonal(), rounds=10)
    together = descend(coded, target_OI, metric_II, fisher_OO, rounds=10)
    assert damage(together, target_OI, metric_II, fisher_OO) < 0.7 * damage(apart, target_OI, metric_II, fisher_OO)


def test_a_diagonal_leaves_the_rows_apart() -> None:
    coded, target_OI, metric_II, fisher_OO = problem("int3-g32")
    alone = [descend(coded, target_OI, metric_II, one) for one in (fisher_OO.diagonal(), torch.eye(len(fisher_OO)))]
    assert all(torch.equal(alone[0].tensors[key], alone[1].tensors[key]) for key in coded.tensors)
    together = descend(coded, target_OI, metric_II, fisher_OO)
    assert any(not torch.equal(alone[0].tensors[key], together.tensors[key]) for key in coded.tensors)


def test_leaves_alone_what_is_exact() -> None:
    coded, _, metric_II, fisher_OO = problem("int4-g64")
    assert descend(coded, coded.decode(), metric_II, fisher_OO) is coded


def test_the_same_twice_and_the_input_is_untouched() -> None:
    coded, *rest = problem("int3-g32")
    kept = {key: value.clone() for key, value in coded.tensors.items()}
    one, two = descend(coded, *rest), descend(coded, *rest)
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in kept)
    assert all(torch.equal(coded.tensors[key], value) for key, value in kept.items())
