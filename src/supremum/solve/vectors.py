"""Vectors of a book (codecs.Book): which of them a unit of UNIT = 8 columns takes, and the scales they go with.

With x what a row should have in the unit, s its scale and M the metric (8, 8), the unit takes the q that minimises

    (x/s - q) M (x/s - q)^T

over all K vectors at once: under given signs the loss is linear in the magnitudes m_i and their products m_i m_j, so K losses
are sums of a fixed table's rows, and what does not depend on the row is summed before. Signs are those of x, or with the
cheapest of them turned where the format wants an even number of negative ones, or where M ties the columns together. Of two
vectors in a unit the second is told the first's error, whose metric is M's Schur complement. Three users, three metrics:

    nearest   M = diag(h), the importances
    cancel    M = (U_bb^T U_bb)^-1, S^-1 = U^T U: the error that is left after all later columns have absorbed what they can
    sweep     M = S_bb: the other columns stay as they are

The loops over a row are in vector_kernels.py. Letters: U units, H vectors of a unit, V = 8 / H columns of one, K vectors of
the book, F rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..codecs import UNIT, Codec, Grid
from . import vector_kernels as kernels
from .vector_kernels import SHIFT, Floats

BLOCK = 64  # columns whose errors are applied to the later ones together
STARTS = 1.1, 0.9, 0.75, 0.6  # of a scale, in parts of the one that is best for normal weights; of three levels the first two
ROUNDS = 2  # of vectors and scale in turn
SIGNS = {"own": 0, "any": 1, "even": 2}


class Table(NamedTuple):
    """The book as the loops read it. terms_FK: -2 m_i, then 2 m_i m_j for i < j where they are wanted; rows of zeros up to a
    multiple of four."""

    points_KV: Floats
    terms_FK: Floats
    signs: int


class Metric(NamedTuple):
    """A metric (8, 8) of each unit as the loops read it."""

    inner_UHVV: Floats  # of each vector, the later ones of its unit free
    cross_UVV: Floats  # what the second vector is told of the first's error
    square_UHK: Floats  # the part of q M q^T that does not depend on signs


@cache
def table(codec: Codec, diagonal: bool = False) -> Table:
    """Of a codec with a book. diagonal: for metrics that are."""
    assert codec.book is not None
    points_KV, signs = codec.book.points_KV, codec.book.signs
    terms_KF = -2 * points_KV
    if signs != "own" and not diagonal:
        one, other = torch.triu_indices(points_KV.shape[1], points_KV.shape[1], 1)
        terms_KF = torch.cat([terms_KF, 2 * points_KV[:, one] * points_KV[:, other]], 1)
    terms_FK = torch.nn.functional.pad(terms_KF.T, (0, 0, 0, -terms_KF.shape[1] % 4))
    return Table(points_KV.numpy(), terms_FK.contiguous().numpy(), SIGNS[signs])


def metric_of(metric_U88: Tensor, codec: Codec) -> Metric:
    """The units' metrics made ready."""
    assert codec.book is not None
    points_KV, width = codec.book.points_KV, codec.book.points_KV.shape[1]
    if width == UNIT:
        inner_UHVV, cross_UVV = metric_U88[:, None], torch.zeros_like(metric_U88)
    else:
        cross_UVV = metric_U88[:, :width, width:] @ torch.linalg.inv(metric_U88[:, width:, width:])
        first_UVV = metric_U88[:, :width, :width] - cross_UVV @ metric_U88[:, width:, :width]
        inner_UHVV = torch.stack([first_UVV, metric_U88[:, width:, width:]], 1)
    if codec.book.signs == "own":
        square_UHK = torch.stack([torch.linalg.vecdot(points_KV @ one_VV, points_KV) for one_VV in inner_UHVV.flatten(0, 1)])
    else:
        square_UHK = inner_UHVV.flatten(0, 1).diagonal(dim1=1, dim2=2) @ points_KV.square().T
    square_UHK = square_UHK.unflatten(0, inner_UHVV.shape[:2])
    return Metric(*(part.contiguous().numpy() for part in (inner_UHVV, cross_UVV, square_UHK)))


def _diagonal(importance_I: Tensor, codec: Codec) -> Metric:
    return metric_of(importance_I.float().clamp_min(1e-30).view(-1, UNIT).diag_embed(), codec)


@cache
def normal_scale(codec: Codec) -> float:
    """The scale under which standard normal weights lose least, within 3 %."""
    weight_OU = torch.randn(64, UNIT, generator=torch.Generator().manual_seed(0))
    losses = {}
    for scale in (0.97**n * 4 / float(codec.levels.abs().max()) for n in range(80)):
        grid = Grid(torch.full((64, 1), scale), torch.full((64, 1), scale * SHIFT) if codec.affine else None)
        losses[scale] = float((_decoded(nearest(weight_OU, torch.ones(UNIT), grid, codec), grid) - weight_OU).square().sum())
    return min(losses, key=lambda scale: losses[scale])


def _decoded(level_OU: Tensor, grid: Grid) -> Tensor:
    return level_OU * grid.scale_OG + (0 if grid.offset_OG is None else grid.offset_OG)


def search(weight_OI: Tensor, importance_I: Tensor, codec: Codec) -> Grid:
    """The grid for nearest rounding of `weight_OI` (float32) under per-column importances (I,): each scale by itself, the
    vectors and the closed-form fit in turn from several starts, then all of a super-block as the format shares them."""
    importance_I = importance_I.float() / importance_I.mean().clamp_min(1e-30)
    metric, book = _diagonal(importance_I, codec), table(codec, True)
    starts = np.array(STARTS if book.signs else STARTS[:2], np.float32) * np.float32(normal_scale(codec))
    scale_OG, offset_OG = kernels.search(weight_OI.contiguous().numpy(), importance_I.numpy(), metric, book, codec.step,
                                         starts, ROUNDS, codec.affine)
    return codec.project(torch.from_numpy(scale_OG), torch.from_numpy(offset_OG) if codec.affine else None)


def nearest(weight_OI: Tensor, importance_I: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """Levels (O, I) float32 of the nearest vectors under importances (I,)."""
    scale_OU, offset_OU = _units(grid, codec, torch.arange(weight_OI.shape[1] // UNIT))
    level_OI = torch.empty(weight_OI.shape)
    kernels.nearest(weight_OI.numpy(), _diagonal(importance_I, codec), table(codec, True), scale_OU, offset_OU,
                    level_OI.numpy())
    return level_OI


def cancel(target_OI: Tensor, order_I: Tensor, factor_II: Tensor, grid: Grid, codec: Codec) -> tuple[Tensor, Tensor]:
    """One pass over the units in the given order: levels (O, I) in the natural order, and each row's loss.

    order_I: whole units. factor_II: U of the ordered metric. As in cancellation.py, with a unit in place of a column:
    e_b = (x - s q) U_bb^-1, later columns lose e_b U_bk, and the loss is the sum of |e_b|^2."""
    work_OI = target_OI[:, order_I]
    scale_OU, offset_OU = _units(grid, codec, order_I[::UNIT] // UNIT)
    inverse_U88 = torch.linalg.inv(units_of(factor_II))
    metric = metric_of(inverse_U88 @ inverse_U88.mT, codec)
    level_OI, loss_O = torch.empty_like(work_OI), torch.zeros(len(work_OI))
    for begin in range(0, work_OI.shape[1], BLOCK):
        error_OB = torch.empty(len(work_OI), BLOCK)
        kernels.cancel(work_OI.numpy(), begin, factor_II.numpy(), inverse_U88.numpy(), metric, table(codec), scale_OU,
                       offset_OU, level_OI.numpy(), error_OB.numpy(), loss_O.numpy())
        end = begin + BLOCK
        work_OI[:, end:].addmm_(error_OB, factor_II[begin:end, end:], alpha=-1)
    natural_OI = torch.empty_like(level_OI)
    natural_OI[:, order_I] = level_OI
    return natural_OI, loss_O


def sweeper(metric_II: Tensor, codec: Codec) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Grid], None]:
    """`descent._sweep` with a unit in place of a weight, once over all of them. The result takes (levels, dW, g, the change
    of dW S, B, grid) of a block of rows and changes the first four in place."""
    metric_U88 = units_of(metric_II)
    metric, inverse_U88 = metric_of(metric_U88, codec), torch.linalg.inv(metric_U88).numpy()

    def sweep(level_BI: Tensor, change_BI: Tensor, slope_BI: Tensor, moved_BI: Tensor, fisher_BB: Tensor,
              grid: Grid) -> None:
        scale_BU, _ = _units(grid, codec, torch.arange(level_BI.shape[1] // UNIT))
        kernels.sweep(level_BI.numpy(), change_BI.numpy(), slope_BI.numpy(), moved_BI.numpy(), fisher_BB.numpy(),
                      metric_II.numpy(), inverse_U88, metric, table(codec), scale_BU)
    return sweep


def units_of(matrix_II: Tensor) -> Tensor:
    """The squares of the units on the diagonal, (U, 8, 8)."""
    return torch.stack([matrix_II[i:i + UNIT, i:i + UNIT] for i in range(0, len(matrix_II), UNIT)])


def _units(grid: Grid, codec: Codec, units_U: Tensor) -> tuple[Floats, Floats]:
    """Scale and offset (O, U) of each unit."""
    group_U = units_U * UNIT // codec.step
    scale_OU = grid.scale_OG[:, group_U]
    offset_OU = torch.zeros_like(scale_OU) if grid.offset_OG is None else grid.offset_OG[:, group_U]
    return scale_OU.numpy(), offset_OU.numpy()
