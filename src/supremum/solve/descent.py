"""Coordinate descent: codes and scales of a solved matrix, changed one at a time while that lowers

    tr(B dW S dW^T) / 2,   dW = W - W_hat,   S = E[x x^T],   B = E[g g^T] the output Fisher      (K-FAC's KL per token)

Successive cancellation (cancellation.py) minimises it for B = I, never looks back at a column, and knows no other row. Here
each weight takes the level that is best with all others as they are: with M = dW S and g_o = (B M)_o,

    w_hat_oi <- nearest level to  w_hat_oi + g_oi / (B_oo S_ii)

(QuantEase, arXiv 2309.01885, has it for B = I; of a vector format eight weights move together, vectors.py), and each row's
scales are fitted once more (scales.refit) to the row that would set the derivative to zero if all others stayed: w_hat_o +
(B dW)_o / B_oo. So rows that the model reads together, as those of one attention head, make up for each other's errors.

Few weights change, and what one changes is a row of S: a sweep costs hardly more than reading the matrix once. M is kept
between blocks of rows; a block's g is one matrix product. The loops over a row are Numba's.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..codecs import Codec, Coded, Grid, decode_grid
from . import vectors
from .cancellation import OUTPUT_DAMPING, damped, pick_rows, rows_of
from .scales import code_table, codes_of, refit

ROUNDS = 2  # over all rows; a third buys hardly anything
SWEEPS = 2  # over the columns of a row, each time that its turn comes
BLOCK = 64  # rows whose scales are fitted, and whose g is computed, together


def descend(coded: Coded, target_OI: Tensor, metric_II: Tensor, fisher: Tensor, *, rounds: int = ROUNDS) -> Coded:
    """The same format with other codes and scales, never with more damage.

    target_OI: W (O, I). metric_II: S, damped. fisher: B (O, O), or its diagonal (O,), which leaves the rows
    apart: then its values do not matter."""
    codec = coded.codec
    codes_OI, grid = codec.unpack(coded.tensors, coded.shape)
    codes_OI, grid = codes_OI.clone(), rows_of(grid, torch.arange(len(codes_OI)))
    fisher_OO = damped(fisher.float(), OUTPUT_DAMPING) if fisher.ndim == 2 else None
    sweep = vectors.sweeper(metric_II, codec) if codec.book is not None else None
    levels_K, code_H = codec.levels.numpy(), code_table(codec).numpy()
    change_OI = target_OI - decode_grid(codec, codes_OI, grid)
    moved_OI = change_OI @ metric_II
    before = _damage(change_OI, moved_OI, fisher_OO)
    blocks = -(-len(codes_OI) // BLOCK)
    for _ in range(rounds):
        for start in range(blocks):
            rows = torch.arange(start, len(codes_OI), blocks)  # far apart: neighbours depend on each other most
            fisher_BO = None if fisher_OO is None else fisher_OO[rows]
            fisher_BB = torch.eye(len(rows)) if fisher_BO is None else fisher_BO[:, rows].contiguous()
            codes_BI, part, change_BI = codes_OI[rows], rows_of(grid, rows), change_OI[rows]
            slope_BI = moved_OI[rows] if fisher_BO is None else fisher_BO @ moved_OI
            if codec.rows == 1:
                missed_BI = slope_BI / fisher_BB.diagonal()[:, None]
                part, step_BI, moved_BI = _refitted(target_OI[rows], codes_BI, part, change_BI, missed_BI, metric_II, codec)
                _replace(grid, rows, part)
                change_BI += step_BI
                moved_OI[rows] += moved_BI
                slope_BI += fisher_BB @ moved_BI
            moved_BI = torch.zeros_like(slope_BI)
            if sweep is not None:
                level_BI = codec.levels[codes_BI.long()]
                sweep(level_BI, change_BI, slope_BI, moved_BI, fisher_BB, part)
                codes_BI = codes_of(level_BI, codec)
            else:
                _sweep(codes_BI.numpy(), change_BI.numpy(), slope_BI.numpy(), moved_BI.numpy(), fisher_BB.numpy(),
                       metric_II.numpy(), part.scale_OG.numpy(), codec.step or len(metric_II), levels_K, code_H)
            codes_OI[rows], change_OI[rows] = codes_BI, change_BI
            moved_OI[rows] += moved_BI
    result = Coded(codec, codec.pack(codes_OI, grid), coded.shape)
    change_OI = target_OI - result.decode()  # as stored: rows of some formats share a factor
    return result if _damage(change_OI, change_OI @ metric_II, fisher_OO) < before else coded


def _damage(change_OI: Tensor, moved_OI: Tensor, fisher_OO: Tensor | None) -> float:
    """tr(B dW S dW^T) / 2, moved_OI: dW S; without B the sum over rows."""
    return float((moved_OI * (change_OI if fisher_OO is None else fisher_OO @ change_OI)).sum(dtype=torch.float64)) / 2


def _refitted(target_BI: Tensor, codes_BI: Tensor, grid: Grid, change_BI: Tensor, missed_BI: Tensor, metric_II: Tensor,
              codec: Codec) -> tuple[Grid, Tensor, Tensor]:
    """The grid with the rows' scales fitted to w_hat + (B dW)_o / B_oo, and what that changes of dW and of dW S; rows that
    this does not serve keep theirs. missed_BI: (B dW S)_o / B_oo."""
    new = refit(codes_BI, grid, missed_BI, metric_II, codec)
    step_BI = target_BI - decode_grid(codec, codes_BI, new) - change_BI
    moved_BI = step_BI @ metric_II
    better_B = torch.linalg.vecdot(2 * missed_BI + moved_BI, step_BI) < 0
    step_BI, moved_BI = (torch.where(better_B[:, None], change, 0.0) for change in (step_BI, moved_BI))
    return pick_rows(better_B, new, grid), step_BI, moved_BI


def _replace(grid: Grid, rows: Tensor, part: Grid) -> None:
    grid.scale_OG[rows] = part.scale_OG
    if grid.offset_OG is not None and part.offset_OG is not None:
        grid.offset_OG[rows] = part.offset_OG
    for key, value in grid.fields.items():
        value[rows] = part.fields[key]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _sweep(codes_BI, change_BI, slope_BI, moved_BI, fisher_BB, metric_II, scale_BG, step, levels_K, code_H):
    """Change codes, dW and g of a block of rows in place; moved_BI becomes the change of dW S.

    code_H: `scales.code_table`."""
    rows, columns = change_BI.shape
    for o in range(rows):
        slope_I, pivot = slope_BI[o], fisher_BB[o, o]
        for p in range(o):
            share = fisher_BB[o, p]
            for j in range(columns):
                slope_I[j] += share * moved_BI[p, j]
        for _ in range(SWEEPS):
            changed = False
            for i in range(columns):
                scale = scale_BG[o, i // step]
                if scale == 0:
                    continue
                before = levels_K[codes_BI[o, i]]
                half = (before + slope_I[i] / (pivot * metric_II[i, i] * scale) - levels_K[0]) * np.float32(2)
                code = code_H[int(min(max(half, np.float32(0)), np.float32(len(code_H) - 1)))]
                if code != codes_BI[o, i]:
                    delta = (levels_K[code] - before) * scale
                    codes_BI[o, i], changed = code, True
                    change_BI[o, i] -= delta
                    steep = pivot * delta
                    for j in range(columns):
                        slope_I[j] -= steep * metric_II[i, j]
                        moved_BI[o, j] -= delta * metric_II[i, j]
            if not changed:
                break
