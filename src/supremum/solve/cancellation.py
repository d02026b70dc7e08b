"""Successive cancellation: round column by column, let the later columns absorb the error.

For a target W (O, I) and a metric S (I, I), minimise tr((W - W_hat) S (W - W_hat)^T) over the grid. With the columns in
some order and S^-1 = U^T U (U upper triangular), column i is rounded and its error is cancelled in the columns behind it:

    e_i = (w_i - round(w_i)) / U_ii,        w_k <- w_k - e_i U_ik   for k > i

This is Babai's nearest-plane algorithm on the lattice of S (arXiv 2507.18553). Settings of it are GPTQ (arXiv 2210.17323:
target = weights, S = E[x x^T]), Qronos (arXiv 2505.11695: target = W S_xxh S_hh^-1, S = S_hh, the drift corrected), and
nearest rounding (feedback off). The grid is fixed before any column is rounded, so any order works in any format.

Tensors are transposed inside (columns of W are contiguous rows), and errors are applied in blocks of BLOCK columns by one
matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import Codec, Coded, Grid, decode_grid
from .scales import nearest_levels, refit, search, uniform_levels

BLOCK = 64


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """S + damping * mean(diag S) * I, with dead inputs (zero diagonal) given the mean so that S is invertible."""
    diagonal_I = moment_II.diagonal()
    mean = diagonal_I[diagonal_I > 0].mean() if bool((diagonal_I > 0).any()) else torch.tensor(1.0)
    result_II = moment_II.clone()
    result_II.diagonal().add_(damping * mean).add_(torch.where(diagonal_I <= 0, mean, 0.0))
    return result_II


def inverse_factor(metric_II: Tensor) -> Tensor:
    """U upper triangular, float32, with S^-1 = U^T U; computed in float64.

    With P the reversal of the order, P S P = C C^T gives S = R R^T, R = P C P upper triangular, and U = R^-1.
    """
    reversed_II = metric_II.double().flip(0, 1)
    factor_II = torch.linalg.cholesky(reversed_II).flip(0, 1)  # upper triangular R, S = R R^T
    identity_II = torch.eye(len(metric_II), dtype=torch.float64)
    return torch.linalg.solve_triangular(factor_II, identity_II, upper=True).float()


def solve(target_OI: Tensor, moment_II: Tensor, codec: Codec, *, feedback: bool = True, act_order: bool = True,
          damping: float = 0.01, refits: int = 1, grid: Grid | None = None) -> Coded:
    """Choose the codes (and, unless `grid` is given, the scales) of one matrix.

    target_OI: what the codes should reproduce, (O, I). moment_II: second moment of the inputs, (I, I). feedback: cancel
    errors in later columns; False is nearest rounding under searched scales. act_order: largest diag(S) first, as the
    columns rounded last find nothing behind them to absorb their error. refits: joint least-squares scale fits, each
    followed by another pass. Raises torch.linalg.LinAlgError only if the damped moment is not positive definite.
    """
    target_OI = target_OI.float()
    metric_II = damped(moment_II.float(), damping)
    if not feedback:
        grid = grid or search(target_OI, metric_II.diagonal(), codec)
        return _coded(_nearest_codes(target_OI, grid, codec), grid, codec, target_OI)
    order_I = torch.argsort(metric_II.diagonal(), descending=True, stable=True) if act_order else \
        torch.arange(len(metric_II))
    factor_II = inverse_factor(metric_II[order_I][:, order_I])
    best: tuple[float, Tensor, Grid] | None = None
    grid = grid or search(target_OI, metric_II.diagonal(), codec)
    for turn in range(refits + 1):
        codes_OI = _cancel(target_OI, factor_II, order_I, grid, codec)
        loss = distortion(target_OI - decode_grid(codec, codes_OI, grid), metric_II)
        if best is None or loss < best[0]:
            best = (loss, codes_OI, grid)
        if turn < refits:
            grid = refit(target_OI, codes_OI, grid, metric_II, codec)
            loss = distortion(target_OI - decode_grid(codec, codes_OI, grid), metric_II)
            if loss < best[0]:
                best = (loss, codes_OI, grid)
    assert best is not None
    return _coded(best[1], best[2], codec, target_OI)


def nearest(weight_OI: Tensor, codec: Codec) -> Coded:
    """Nearest rounding with scales searched for the plain squared error: no calibration text needed."""
    grid = search(weight_OI.float(), torch.ones(weight_OI.shape[1]), codec)
    return _coded(_nearest_codes(weight_OI.float(), grid, codec), grid, codec, weight_OI)


def distortion(change_OI: Tensor, metric_II: Tensor) -> float:
    """tr(dW S dW^T): squared output error per token, summed over outputs."""
    return float(((change_OI @ metric_II) * change_OI).sum(dtype=torch.float64))


def _coded(codes_OI: Tensor, grid: Grid, codec: Codec, like_OI: Tensor) -> Coded:
    return Coded(codec, codec.pack(codes_OI, grid), (like_OI.shape[0], like_OI.shape[1]))


def _nearest_codes(weight_OI: Tensor, grid: Grid, codec: Codec) -> Tensor:
    step = codec.step or weight_OI.shape[1]
    scale_OI = grid.scale_OG.repeat_interleave(step, 1)
    shifted_OI = weight_OI if grid.offset_OG is None else weight_OI - grid.offset_OG.repeat_interleave(step, 1)
    return _index(nearest_levels(torch.where(scale_OI == 0, 0.0, shifted_OI / scale_OI), codec), codec)


def _index(level: Tensor, codec: Codec) -> Tensor:
    bounds = uniform_levels(codec)
    if bounds is not None:
        return (level - bounds[0]).to(torch.uint8)
    return torch.searchsorted(codec.levels, level.contiguous()).to(torch.uint8)


def _cancel(target_OI: Tensor, factor_II: Tensor, order_I: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """One pass over the columns in the given order; returns codes (O, I) in the natural order."""
    out_features, in_features = target_OI.shape
    step = codec.step or in_features
    work_IO = target_OI.T[order_I].contiguous()
    scale_GO = grid.scale_OG.T.contiguous()
    inverse_GO = torch.where(scale_GO == 0, 0.0, 1 / scale_GO)
    offset_GO = None if grid.offset_OG is None else grid.offset_OG.T.contiguous()
    group_I = (order_I // step).tolist()
    diagonal_I = factor_II.diagonal().tolist()
    level_IO = torch.empty_like(work_IO)
    for begin in range(0, in_features, BLOCK):
        end = min(begin + BLOCK, in_features)
        error_BO = torch.empty(end - begin, out_features)
        for i in range(begin, end):
            wish_O = work_IO[i]
            if i > begin:
                wish_O = torch.addmv(wish_O, error_BO[: i - begin].T, factor_II[begin:i, i], alpha=-1)
            group = group_I[i]
            if offset_GO is None:
                level_O = nearest_levels(wish_O * inverse_GO[group], codec)
                error_O = torch.addcmul(wish_O, level_O, scale_GO[group], value=-1)
            else:
                level_O = nearest_levels((wish_O - offset_GO[group]) * inverse_GO[group], codec)
                error_O = torch.addcmul(wish_O - offset_GO[group], level_O, scale_GO[group], value=-1)
            level_IO[i] = level_O
            torch.mul(error_O, 1 / diagonal_I[i], out=error_BO[i - begin])
        if end < in_features:
            work_IO[end:].addmm_(factor_II[begin:end, end:].T, error_BO, alpha=-1)
    codes_IO = torch.empty(in_features, out_features, dtype=torch.uint8)
    codes_IO[order_I] = _index(level_IO, codec)
    return codes_IO.T.contiguous()
