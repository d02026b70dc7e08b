"""Plain float64 versions of what the solver does, written from the papers: slow, short, and sharing no code with it."""

from __future__ import annotations

import torch
from torch import Tensor

from supremum import codecs
from supremum.codecs import Codec, Grid

SCALARS = [name for name in codecs.names() if codecs.get(name).book is None]  # each weight rounds by itself


def columns(codec: Codec) -> int:
    """A small number of columns that the codec can hold: two of its blocks, or some."""
    return 2 * codec.block if 1 < codec.block < 256 else 256 if codec.block == 256 else 40


def weights(rows: int, columns: int, seed: int = 0, tail: float = 0.3) -> Tensor:
    """Gaussian weights whose size varies from column to column by a log-normal factor."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw) * torch.exp(tail * torch.randn(columns, generator=draw))


def moment(columns: int, seed: int = 0, skew: float = 0.5, tokens: int | None = None) -> Tensor:
    """Second moment of correlated inputs; eigenvalues fall as k^-2 skew, directions mixed with the axes."""
    draw = torch.Generator().manual_seed(seed + 1000)
    size = torch.arange(1.0, columns + 1) ** -skew
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=draw) / columns**0.5
    x_TI = torch.randn(tokens or 4 * columns, columns, generator=draw) * size[torch.randperm(columns, generator=draw)] @ mix
    return x_TI.T @ x_TI / len(x_TI)


def spread(grid: Grid, columns: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of every weight, float64 (O, I)."""
    step = columns // grid.scale_OG.shape[1]
    scale_OI = grid.scale_OG.double().repeat_interleave(step, 1)
    return scale_OI, (torch.zeros_like(scale_OI) if grid.offset_OG is None else
                      grid.offset_OG.double().repeat_interleave(step, 1))


def closest(wish: Tensor, scale: Tensor, offset: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """(codes, values) of the reconstruction points closest to the wishes (all of one shape), by trying every level."""
    points = codec.levels.double() * scale[..., None] + offset[..., None]
    code = (points - wish[..., None]).abs().argmin(-1)
    return code, points.gather(-1, code[..., None])[..., 0]


def decoded(codes_OI: Tensor, grid: Grid, codec: Codec) -> Tensor:
    scale_OI, offset_OI = spread(grid, codes_OI.shape[1])
    return codec.levels.double()[codes_OI.long()] * scale_OI + offset_OI


def round_to_nearest(weight_OI: Tensor, grid: Grid, codec: Codec) -> Tensor:
    """Codes (O, I) of plain rounding."""
    return closest(weight_OI.double(), *spread(grid, weight_OI.shape[1]), codec)[0]


def gptq(weight_OI: Tensor, metric_II: Tensor, grid: Grid, codec: Codec, order_I: Tensor) -> Tensor:
    """Codes (O, I) by arXiv 2210.17323, algorithm 1 without its blocks. `metric_II`: damped already."""
    scale_OI, offset_OI = (x[:, order_I] for x in spread(grid, weight_OI.shape[1]))
    work_OI = weight_OI.double()[:, order_I]
    inverse_II = torch.linalg.inv(metric_II.double()[order_I][:, order_I])
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    codes_OI = torch.empty(work_OI.shape, dtype=torch.long)
    for i in range(work_OI.shape[1]):
        codes_OI[:, i], value_O = closest(work_OI[:, i], scale_OI[:, i], offset_OI[:, i], codec)
        error_O = (work_OI[:, i] - value_O) / factor_II[i, i]
        work_OI[:, i:] -= error_O[:, None] * factor_II[i, i:]
    natural_OI = torch.empty_like(codes_OI)
    natural_OI[:, order_I] = codes_OI
    return natural_OI


def losses(weight_OI: Tensor, decoded_OI: Tensor, metric_II: Tensor) -> Tensor:
    """(w - w_hat) S (w - w_hat)^T of every row, float64."""
    change_OI = weight_OI.double() - decoded_OI.double()
    return ((change_OI @ metric_II.double()) * change_OI).sum(1)


def absmax(weight_OI: Tensor, codec: Codec) -> Grid:
    """The stored grid whose levels just reach each group's extremes."""
    rows, columns = weight_OI.shape
    weight_OGS = weight_OI.view(rows, -1, codec.step or columns)
    least, greatest = weight_OGS.amin(-1), weight_OGS.amax(-1)
    if codec.rows > 1:  # all rows of a test lie in one tile
        least, greatest = least.amin(0).expand(rows, -1), greatest.amax(0).expand(rows, -1)
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    if codec.affine:
        scale_OG = (greatest - least) / (high - low)
        return codec.project(scale_OG, least - low * scale_OG)
    return codec.project(torch.maximum(least / low, greatest / high), None)
