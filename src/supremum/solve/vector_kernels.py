"""The loops of vectors.py, a row and a unit at a time: Numba's, and outside Python's lock.

Arrays as there: `metric` is a `vectors.Metric`, `book` a `vectors.Table`; what is found is written into the arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

SHIFT = 0.125  # of the levels of a group, up or down, in a format with offsets
FAST: Any = {"reassoc", "contract", "nsz", "nnan"}
Floats = NDArray[np.float32]


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
def nearest(weight_OI, metric, book, scale_OU, offset_OU, level_OI):
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
def search(weight_OI, importance_I, metric, book, step, starts, rounds, affine):
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
def cancel(work_OI, begin, factor_II, inverse_U88, metric, book, scale_OU, offset_OU, level_OI, error_OB, loss_O):
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
def sweep(level_BI, change_BI, slope_BI, moved_BI, fisher_BB, metric_II, inverse_U88, metric, book, scale_BU):
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
