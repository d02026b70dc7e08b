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

The loops over a row are Numba's. Letters: U units, H vectors of a unit, V = 8 / H columns of one, K vectors of
the book, F rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..codecs import UNIT, Codec, Grid

BLOCK = 64  # columns whose errors are applied to the later ones together
STARTS = 1.1, 0.9, 0.75, 0.6  # of a scale, in parts of the one that is best for normal weights; of three levels the first two
ROUNDS = 2  # of vectors and scale in turn
SHIFT = 0.125  # of the levels of a group, up or down, in a format with offsets
SIGNS = {"own": 0, "any": 1, "even": 2}
FAST: Any = {"reassoc", "contract", "nsz", "nnan"}
Floats = NDArray[np.float32]


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
    scale_OG, offset_OG = _search(weight_OI.contiguous().numpy(), importance_I.numpy(), metric, book, codec.step, starts,
                                  ROUNDS, codec.affine)
    return codec.project(torch.from_numpy(scale_OG), torch.from_numpy(offset_OG) if codec.affine else None)


def nearest(weight_OI: Tensor, importance_I: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """Levels (O, I) float32 of the nearest vectors under importances (I,)."""
    scale_OU, offset_OU = _units(grid, codec, torch.arange(weight_OI.shape[1] // UNIT))
    level_OI = torch.empty(weight_OI.shape)
    _nearest(weight_OI.numpy(), _diagonal(importance_I, codec), table(codec, True), scale_OU, offset_OU, level_OI.numpy())
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
        _cancel(work_OI.numpy(), begin, factor_II.numpy(), inverse_U88.numpy(), metric, table(codec), scale_OU, offset_OU,
                level_OI.numpy(), error_OB.numpy(), loss_O.numpy())
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
        _sweep(level_BI.numpy(), change_BI.numpy(), slope_BI.numpy(), moved_BI.numpy(), fisher_BB.numpy(), metric_II.numpy(),
               inverse_U88, metric, table(codec), scale_BU)
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


class Room(NamedTuple):
    """What `_choose` writes in: a row's wish in units of the scale, the levels chosen, and its scratch."""

    wish_8: Floats
    level_8: Floats
    want_8: Floats
    trial_8: Floats
    sign_8: Floats
    least_3: Floats
    cheap_3: NDArray[np.int64]
    coefficient_F: Floats
    score_K: Floats


@njit(cache=True, nogil=True)
def _room(book):
    count, terms = len(book.points_KV), len(book.terms_FK)
    return Room(np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32),
                np.empty(8, np.float32), np.empty(3, np.float32), np.empty(3, np.int64), np.zeros(terms, np.float32),
                np.empty(count, np.float32))


@njit(cache=True, nogil=True, fastmath=FAST)
def _choose(room, unit, metric, book):
    """The unit's vectors for `wish_8` into `level_8`."""
    wish_8, want_8, trial_8, sign_8, score_K = room.wish_8, room.want_8, room.trial_8, room.sign_8, room.score_K
    least_3, cheap_3, coefficient_F = room.least_3, room.cheap_3, room.coefficient_F
    inner_HVV, points_KV, terms_FK = metric.inner_UHVV[unit], book.points_KV, book.terms_FK
    count, width = points_KV.shape
    terms, even = len(terms_FK), book.signs == 2
    joint = terms > width  # signs tie the columns together
    odd = False
    sign_8[:], least_3[:] = 1, np.inf
    if book.signs:
        for i in range(8):
            if wish_8[i] < 0:
                sign_8[i], odd = np.float32(-1), not odd
            cost, at = wish_8[i] * wish_8[i] * inner_HVV[i // width, i % width, i % width], i
            for n in range(3):
                if cost < least_3[n]:
                    cost, least_3[n] = least_3[n], cost
                    at, cheap_3[n] = cheap_3[n], at
    best = np.float32(np.inf)
    for trial in range(3 if even and odd else 1 + joint):
        first, second = -1, -1  # signs to turn
        if even and odd:
            first = cheap_3[trial]
        elif trial == 1:
            first, second = cheap_3[0], cheap_3[1] if even else -1
        for i in range(8):
            want_8[i] = wish_8[i]
            if i in (first, second):
                sign_8[i] = -sign_8[i]
        loss = np.float32(0)
        for h in range(8 // width):
            start, pair = h * width, width
            for i in range(width):
                slope = np.float32(0)
                for j in range(width):
                    slope += inner_HVV[h, i, j] * want_8[start + j]
                loss += slope * want_8[start + i]
                coefficient_F[i] = slope * sign_8[start + i]
                if joint:
                    for j in range(i + 1, width):
                        coefficient_F[pair] = inner_HVV[h, i, j] * sign_8[start + i] * sign_8[start + j]
                        pair += 1
            for k in range(count):
                score_K[k] = metric.square_UHK[unit, h, k]
            for f in range(0, terms, 4):
                a, b, c, d = coefficient_F[f], coefficient_F[f + 1], coefficient_F[f + 2], coefficient_F[f + 3]
                for k in range(count):
                    score_K[k] += (a * terms_FK[f, k] + b * terms_FK[f + 1, k] + c * terms_FK[f + 2, k]
                                   + d * terms_FK[f + 3, k])
            at, low = 0, score_K[0]
            for k in range(count):
                low = min(low, score_K[k])
            for k in range(count):
                if score_K[k] == low:
                    at = k
                    break
            loss += low
            for i in range(width):
                trial_8[start + i] = sign_8[start + i] * points_KV[at, i]
            if start + width < 8 and joint:
                for j in range(width):
                    for i in range(width):
                        want_8[width + j] += (want_8[i] - trial_8[i]) * metric.cross_UVV[unit, i, j]
        for i in range(8):
            if loss < best:
                room.level_8[i] = trial_8[i]
            if i in (first, second):
                sign_8[i] = -sign_8[i]
        best = min(best, loss)


@njit(cache=True, nogil=True, fastmath=FAST)
def _nearest(weight_OI, metric, book, scale_OU, offset_OU, level_OI):
    room = _room(book)
    wish_8, level_8 = room.wish_8, room.level_8
    for u in range(scale_OU.shape[1]):
        for o in range(len(weight_OI)):
            for i in range(8):
                wish_8[i] = (weight_OI[o, 8 * u + i] - offset_OU[o, u]) / scale_OU[o, u]
            _choose(room, u, metric, book)
            for i in range(8):
                level_OI[o, 8 * u + i] = level_8[i]


@njit(cache=True, nogil=True, fastmath=FAST)
def _search(weight_OI, importance_I, metric, book, step, starts, rounds, affine):
    """Scales and offsets (O, G) that each serve their group best when they are free."""
    rows, groups = len(weight_OI), weight_OI.shape[1] // step
    scale_OG, offset_OG = np.zeros((rows, groups), np.float32), np.zeros((rows, groups), np.float32)
    room = _room(book)
    wish_8, level_8 = room.wish_8, room.level_8
    for g in range(groups):
        for o in range(rows):
            square = np.float32(0)
            for i in range(g * step, (g + 1) * step):
                square += weight_OI[o, i] * weight_OI[o, i]
            best = np.float32(0)
            for trial in range(len(starts) * (1 + affine)):
                shift = np.float32(SHIFT * (1 - 2 * (trial % 2)) if affine else 0)
                scale = starts[trial // (1 + affine)] * np.sqrt(square / step)
                for _ in range(rounds):
                    zz, zw = np.float32(0), np.float32(0)
                    for start in range(g * step, (g + 1) * step, 8):
                        for i in range(8):
                            wish_8[i] = weight_OI[o, start + i] / max(scale, np.float32(1e-30)) - shift
                        _choose(room, start // 8, metric, book)
                        for i in range(8):
                            z, h = level_8[i] + shift, importance_I[start + i]
                            zz += h * z * z
                            zw += h * z * weight_OI[o, start + i]
                    if zw <= 0:
                        break
                    scale = zw / zz
                    if zw * scale > best:  # the loss is sum h w^2 less this
                        best = zw * scale
                        scale_OG[o, g], offset_OG[o, g] = scale, shift * scale
    return scale_OG, offset_OG


@njit(cache=True, nogil=True, fastmath=FAST)
def _cancel(work_OI, begin, factor_II, inverse_U88, metric, book, scale_OU, offset_OU, level_OI, error_OB, loss_O):
    """A block of columns from `begin` on."""
    room = _room(book)
    wish_8, level_8 = room.wish_8, room.level_8
    end = begin + error_OB.shape[1]
    for o in range(len(work_OI)):
        for start in range(begin, end, 8):
            unit = start // 8
            scale, offset = scale_OU[o, unit], offset_OU[o, unit]
            for i in range(8):
                wish_8[i] = (work_OI[o, start + i] - offset) / scale
            _choose(room, unit, metric, book)
            for j in range(8):
                error = np.float32(0)
                for i in range(j + 1):
                    error += (wish_8[i] - level_8[i]) * inverse_U88[unit, i, j]
                error *= scale
                level_OI[o, start + j], error_OB[o, start - begin + j] = level_8[j], error
                loss_O[o] += error * error
            for i in range(8):
                error = error_OB[o, start - begin + i]
                for j in range(start + 8, end):
                    work_OI[o, j] -= error * factor_II[start + i, j]


@njit(cache=True, nogil=True, fastmath=FAST)
def _loss(difference_8, metric_II, start):
    loss = np.float32(0)
    for i in range(8):
        for j in range(8):
            loss += difference_8[i] * metric_II[start + i, start + j] * difference_8[j]
    return loss


@njit(cache=True, nogil=True, fastmath=FAST)
def _sweep(level_BI, change_BI, slope_BI, moved_BI, fisher_BB, metric_II, inverse_U88, metric, book, scale_BU):
    rows, columns = change_BI.shape
    room = _room(book)
    wish_8, level_8 = room.wish_8, room.level_8
    away_8 = np.empty(8, np.float32)
    for o in range(rows):
        slope_I, pivot = slope_BI[o], fisher_BB[o, o]
        for p in range(o):
            share = fisher_BB[o, p]
            for j in range(columns):
                slope_I[j] += share * moved_BI[p, j]
        for start in range(0, columns, 8):
            unit, scale = start // 8, scale_BU[o, start // 8]
            for i in range(8):
                step = np.float32(0)
                for j in range(8):
                    step += inverse_U88[unit, i, j] * slope_I[start + j]
                away_8[i] = step / (pivot * scale)
                wish_8[i] = level_BI[o, start + i] + away_8[i]
            before = _loss(away_8, metric_II, start)
            _choose(room, unit, metric, book)
            for i in range(8):
                away_8[i] = wish_8[i] - level_8[i]
            if _loss(away_8, metric_II, start) >= before * np.float32(0.9999):
                continue
            for i in range(8):
                delta = (level_8[i] - level_BI[o, start + i]) * scale
                level_BI[o, start + i] = level_8[i]
                if delta == 0:
                    continue
                change_BI[o, start + i] -= delta
                steep = pivot * delta
                for j in range(columns):
                    slope_I[j] -= steep * metric_II[start + i, j]
                    moved_BI[o, j] -= delta * metric_II[start + i, j]
