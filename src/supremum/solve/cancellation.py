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

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from scipy.linalg.lapack import dtrtri
from torch import Tensor

from ..codecs import UNIT, Codec, Coded, Grid, decode_grid
from . import scales, vectors
from .scales import codes_of, nearest_levels, refit

Result = TypeVar("Result")
BLOCK = 64
DAMPING = 0.1  # share of diag(S) added to S: less fits the calibration text and not the next (bench/ridge.py)
OUTPUT_DAMPING = 1.0  # share of diag(B) added to B: less fits the few sequences that B was seen on (bench/ridge.py, water.py)
FLOOR = 1e-6  # share of mean(diag S) added besides, so that what was hardly ever seen can be factored


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """S + damping * diag(S), each input by its own size: a share of the mean would drown all but the few largest.

    Dead inputs (zero diagonal) are given the mean, so that the result is invertible."""
    diagonal_I = moment_II.diagonal()
    mean = diagonal_I[diagonal_I > 0].mean() if bool((diagonal_I > 0).any()) else torch.tensor(1.0)
    more_I = torch.where(diagonal_I > 0, damping * diagonal_I + FLOOR * mean, mean)
    result_II = moment_II.clone()
    result_II.diagonal().add_(more_I)
    return result_II


def inverse_factor(metric_II: Tensor) -> Tensor:
    """U upper triangular, float32, with S^-1 = U^T U; computed in float64.

    With P the reversal of the order, P S P = C C^T gives S = R R^T, R = P C P upper triangular, and U = R^-1.
    """
    reversed_II = metric_II.double().flip(0, 1)
    factor_II = torch.linalg.cholesky(reversed_II).flip(0, 1)  # P C P: upper triangular R, S = R R^T
    inverse_II, _ = dtrtri(factor_II.numpy().T, lower=1, overwrite_c=1)
    return torch.from_numpy(inverse_II.T).float().contiguous()


@dataclass(frozen=True)
class Metric:
    """A second moment made ready for solving: damped, ordered, inverted. Layers that share inputs share it."""

    moment_II: Tensor  # damped, float32
    order_I: Tensor
    factor_II: Tensor  # U of the ordered moment

    @classmethod
    def of(cls, moment_II: Tensor, *, damping: float = DAMPING, act_order: bool = True) -> Metric:
        """act_order: largest diag(S) first, as the columns rounded last find nothing behind them to absorb their error.
        Raises torch.linalg.LinAlgError if the damped moment is not positive definite."""
        moment_II = damped(moment_II.float(), damping)
        order_I = torch.argsort(moment_II.diagonal(), descending=True, stable=True) if act_order else \
            torch.arange(len(moment_II))
        return cls(moment_II, order_I, inverse_factor(moment_II[order_I][:, order_I]))

    @cached_property
    def in_units(self) -> Metric:
        """The same with the columns of a unit side by side, the units by the place of their columns on the mean."""
        place_U = torch.argsort(self.order_I).view(-1, UNIT).float().mean(1)
        order_I = (place_U.argsort(stable=True)[:, None] * UNIT + torch.arange(UNIT)).flatten()
        return Metric(self.moment_II, order_I, inverse_factor(self.moment_II[order_I][:, order_I]))


def solve(target_OI: Tensor, metric: Metric | Tensor, codec: Codec, *, feedback: bool = True, refits: int = 1) -> Coded:
    """Choose scales and codes of one matrix.

    target_OI: what the codes should reproduce, (O, I). metric: second moment of the inputs (I, I), or made ready.
    feedback: cancel errors in later columns; False is nearest rounding under searched scales. refits: joint
    least-squares scale fits, each followed by another pass. Of all passes and nearest rounding each row keeps the best.
    """
    return solve_together({"": target_OI}, metric, codec, feedback=feedback, refits=refits)[""]


def solve_together(targets: Mapping[str, Tensor], metric: Metric | Tensor, codec: Codec, *, feedback: bool = True,
                   refits: int = 1) -> dict[str, Coded]:
    """`solve` for layers that read the same inputs, their rows stacked: rows do not interact, so the result is the same."""
    metric = metric if isinstance(metric, Metric) else Metric.of(metric)
    target_OI = torch.cat([target.float() for target in targets.values()])
    with one_thread():
        if codec.rows > 1:  # no tile spans two matrices, and a row has no scale of its own to fit
            return {name: _solve_stacked({name: target}, target.float(), metric, codec, feedback, 0)[name]
                    for name, target in targets.items()}
        return _solve_stacked(targets, target_OI, metric, codec, feedback, refits)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Column by column the work is too small to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    if threads == 1:  # also in worker threads: the setting is partly the process's own
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(solve: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    """`map` with each call on a core of its own: for work that holds no lock and gains nothing from further threads."""
    workers = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(solve, *arguments))


def _solve_stacked(targets: Mapping[str, Tensor], target_OI: Tensor, metric: Metric, codec: Codec, feedback: bool,
                   refits: int) -> dict[str, Coded]:
    codes_OI, grid = _nearest(target_OI, metric.moment_II.diagonal(), codec)
    best = codes_OI, grid
    loss_O = _loss(target_OI, codes_OI, grid, codec, metric) if feedback else torch.empty(0)
    for number in range(1 + refits if feedback else 0):
        if number > 0:
            missed_OI = (target_OI - decode_grid(codec, *best)) @ metric.moment_II
            grid = refit(*best, missed_OI, metric.moment_II, codec)
        codes_OI, found_O = _cancel(target_OI, metric, grid, codec)
        better_O = found_O < loss_O
        loss_O = torch.where(better_O, found_O, loss_O)
        best = torch.where(better_O[:, None], codes_OI, best[0]), pick_rows(better_O, grid, best[1])
    coded, start = {}, 0
    for name, target in targets.items():
        rows = slice(start, start + target.shape[0])
        coded[name] = Coded(codec, codec.pack(best[0][rows], rows_of(best[1], rows)), (target.shape[0], target.shape[1]))
        start = rows.stop
    return coded


def _loss(target_OI: Tensor, codes_OI: Tensor, grid: Grid, codec: Codec, metric: Metric) -> Tensor:
    change_OI = target_OI - decode_grid(codec, codes_OI, grid)
    return torch.linalg.vecdot(change_OI @ metric.moment_II, change_OI)


def rows_of(grid: Grid, rows: slice | Tensor) -> Grid:
    """The grid of some rows: a view for a slice, a copy for indices."""
    return Grid(grid.scale_OG[rows], None if grid.offset_OG is None else grid.offset_OG[rows],
                {key: value[rows] for key, value in grid.fields.items()})


def pick_rows(first_O: Tensor, first: Grid, second: Grid) -> Grid:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(first_O.view(-1, *[1] * (a.ndim - 1)), a, b)

    return Grid(pick(first.scale_OG, second.scale_OG),
                None if first.offset_OG is None or second.offset_OG is None else pick(first.offset_OG, second.offset_OG),
                {key: pick(value, second.fields[key]) for key, value in first.fields.items()})


def nearest(weight_OI: Tensor, codec: Codec) -> Coded:
    """Nearest rounding with scales searched for the plain squared error: no calibration text needed."""
    codes_OI, grid = _nearest(weight_OI.float(), torch.ones(weight_OI.shape[1]), codec)
    return Coded(codec, codec.pack(codes_OI, grid), (weight_OI.shape[0], weight_OI.shape[1]))


def distortion(change_OI: Tensor, metric_II: Tensor) -> float:
    """tr(dW S dW^T): squared output error per token, summed over outputs."""
    return float(((change_OI @ metric_II) * change_OI).sum(dtype=torch.float64))


def _nearest(weight_OI: Tensor, importance_I: Tensor, codec: Codec) -> tuple[Tensor, Grid]:
    """Codes and grid of nearest rounding under searched scales."""
    if codec.book is not None:
        grid = vectors.search(weight_OI, importance_I, codec)
        return codes_of(vectors.nearest(weight_OI, importance_I, grid, codec), codec), grid
    grid = scales.search(weight_OI, importance_I, codec)
    step = codec.step or weight_OI.shape[1]
    scale_OI = grid.scale_OG.repeat_interleave(step, 1)
    shifted_OI = weight_OI if grid.offset_OG is None else weight_OI - grid.offset_OG.repeat_interleave(step, 1)
    return codes_of(nearest_levels(torch.where(scale_OI == 0, 0.0, shifted_OI / scale_OI), codec), codec), grid


def _cancel(target_OI: Tensor, metric: Metric, grid: Grid, codec: Codec) -> tuple[Tensor, Tensor]:
    """One pass over the columns in the given order: codes (O, I) in the natural order, and each row's loss.

    The loss is the sum of e_i^2: by the recurrence W - W_hat = e U, and S^-1 = U^T U, so (W - W_hat) S (W - W_hat)^T = e e^T.
    """
    if codec.book is not None:
        units = metric.in_units
        level_OI, loss_O = vectors.cancel(target_OI, units.order_I, units.factor_II, grid, codec)
        return codes_of(level_OI, codec), loss_O
    out_features, in_features = target_OI.shape
    step = codec.step or in_features
    factor_II, order_I = metric.factor_II, metric.order_I
    work_IO = target_OI.T[order_I].contiguous()
    scale_GO = grid.scale_OG.T.contiguous()
    inverse_GO = torch.where(scale_GO == 0, 0.0, 1 / scale_GO)
    offset_GO = None if grid.offset_OG is None else grid.offset_OG.T.contiguous()
    group_I = (order_I // step).tolist()
    diagonal_I = factor_II.diagonal().tolist()
    level_IO = torch.empty_like(work_IO)
    loss_O = torch.zeros(out_features)
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
        loss_O += error_BO.square().sum(0)
        if end < in_features:
            work_IO[end:].addmm_(factor_II[begin:end, end:].T, error_BO, alpha=-1)
    codes_IO = torch.empty(in_features, out_features, dtype=torch.uint8)
    codes_IO[order_I] = codes_of(level_IO, codec)
    return codes_IO.T.contiguous(), loss_O
