"""Scales (and offsets) of a grid, chosen to lose least.

For one group of weights w with importances h, and codes z(s) = nearest level to (w - b)/s:

    search      minimise  sum_i h_i (w_i - s z_i - b)^2   over s (and b)

by alternating nearest codes with the closed-form weighted least-squares fit of (s, b), from several starts. What is
compared is what the format can store: each start and each result is projected first. Where groups share their stored
scale (super-blocks), the free choices are projected together and compared with the projected extremes, block by block.
So no format's result is worse than the scale that reaches the largest weight.

    refit       minimise  tr((W - W_hat(s)) S (W - W_hat(s))^T)   over all scales of a row at once, codes fixed

is the joint fit under the full metric: one G x G system a row (G scales), used between passes of the solver.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..codecs import Codec, Grid

STARTS = (1.0, 0.85, 0.7)  # fractions of the scale that reaches the group's largest weight; and Max's, see below
ROUNDS = 3  # of codes and fit in turn
CHUNK = 1 << 16  # weights at a time: the working set stays in the second-level cache
Wish = tuple[Tensor, Tensor]  # scales and offsets (offsets are zero where the codec has none)
LEAST = 1e-30  # a smaller scale counts as zero: its reciprocal would overflow


@cache
def uniform_levels(codec: Codec) -> tuple[int, int] | None:
    """(lowest, highest) if the levels are consecutive integers, else None."""
    levels = codec.levels
    low, high = int(levels[0]), int(levels[-1])
    return (low, high) if len(levels) == high - low + 1 and torch.equal(levels, torch.arange(low, high + 1.0)) else None


@cache
def code_table(codec: Codec) -> Tensor:
    """Code of the nearest level, uint8, in each half unit from the lowest to the highest: levels are whole, so midpoints are
    multiples of 1/2."""
    assert torch.equal(codec.levels, codec.levels.round())
    centre = torch.arange(float(codec.levels[0]) + 0.25, float(codec.levels[-1]) + 0.5, 0.5)
    return torch.searchsorted((codec.levels[1:] + codec.levels[:-1]) / 2, centre).to(torch.uint8)


@cache
def _nearest_table(codec: Codec) -> Tensor:
    """The nearest level itself."""
    return codec.levels[code_table(codec).long()]


def nearest_levels(value: Tensor, codec: Codec) -> Tensor:
    """The level nearest to each value (same shape, float32); halves between two levels go to either."""
    bounds = uniform_levels(codec)
    if bounds is not None:
        return value.round().clamp_(*bounds)
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    return _nearest_table(codec)[value.clamp(low, high).sub_(low).mul_(2).int()]


def codes_of(level: Tensor, codec: Codec) -> Tensor:
    """Their codes, uint8, of levels (float32)."""
    bounds = uniform_levels(codec)
    if bounds is not None:
        return (level - bounds[0]).to(torch.uint8)
    return code_table(codec)[(level - codec.levels[0]).mul_(2).int()]


@cache
def normal_step(codec: Codec) -> float:
    """The scale that rounds a standard normal with the least squared error (J. Max, 1960), within 2 %.

    Where a group is long its largest weight says little: at int3-channel this start saves a quarter of the error.
    """
    probability = (torch.arange(1024) + 0.5) / 1024
    normal_1N = torch.special.ndtri(probability)[None]
    step_S1 = 0.98 ** torch.arange(250.0)[:, None] * 8 / len(codec.levels)
    centre = _centre(codec)
    error_SN = (nearest_levels(normal_1N / step_S1 + centre, codec) - centre) * step_S1 - normal_1N
    return float(step_S1[error_SN.square().mean(1).argmin()])


def _centre(codec: Codec) -> float:
    return float(codec.levels[0] + codec.levels[-1]) / 2 if codec.affine else 0.0


def search(weight_OI: Tensor, importance_I: Tensor, codec: Codec) -> Grid:
    """The best storable grid for nearest rounding of `weight_OI` (float32) under per-column importances (I,)."""
    in_features = weight_OI.shape[1]
    step = codec.step or in_features
    importance_1GS = importance_I.float().clamp_min(1e-30).view(1, -1, step)
    weight_OGS = weight_OI.unflatten(1, (-1, step))
    if codec.rows > 1:  # the weights of a tile are one group
        weight_OGS = _tiles(weight_OGS, codec.rows)
        importance_1GS = importance_1GS.repeat(1, 1, codec.rows)
    importance_1G = importance_1GS.mean(-1)
    importance_1GS = importance_1GS / importance_1G[..., None]
    alone = codec.step in (0, codec.block)  # each group's scale is stored by itself
    pieces = weight_OGS.split(max(1, CHUNK // (in_features * codec.rows)))
    found = [_search_rows(piece_RGS, importance_1GS, codec, alone) for piece_RGS in pieces]
    best, extreme = _cat([wish for wish, _ in found]), _cat([wish for _, wish in found])
    grid = _project(best, codec)
    if codec.rows > 1:
        return Grid(grid.scale_OG.repeat_interleave(codec.rows, 0)[:len(weight_OI)])
    if alone:
        return grid

    def loss(grid: Grid) -> Tensor:
        wishes = zip(*(part.split(len(pieces[0])) for part in _wish(grid)), strict=True)
        loss_OG = torch.cat([_error(piece_RGS, _levels(piece_RGS, wish, codec), wish, importance_1GS)
                             for piece_RGS, wish in zip(pieces, wishes, strict=True)])
        blocks_ON = (loss_OG * importance_1G).unflatten(1, (-1, codec.block // step)).sum(-1)
        return blocks_ON.repeat_interleave(codec.block // step, 1)

    worse_OG = loss(_project(extreme, codec)) < loss(grid)
    return _project(_where(worse_OG, extreme, best), codec) if bool(worse_OG.any()) else grid


def _tiles(weight_OGS: Tensor, rows: int) -> Tensor:
    """(ceil(O / rows), G, rows S): rows that share their scales side by side, zeros below the last."""
    padded_OGS = torch.nn.functional.pad(weight_OGS, (0, 0, 0, 0, 0, -len(weight_OGS) % rows))
    return padded_OGS.unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)


def _search_rows(weight_RGS: Tensor, importance_1GS: Tensor, codec: Codec, alone: bool) -> tuple[Wish, Wish]:
    """The best wish for some rows, and the one that reaches the largest weight."""
    starts, extremes = _starts(weight_RGS, codec)
    best, error_RG = starts[0], torch.full_like(starts[0][0], torch.inf)
    for number, wish in enumerate(starts):
        for turn in range(ROUNDS):
            last = turn == ROUNDS - 1
            if alone and (turn == 0 or last):
                wish = _wish(_project(wish, codec))
            level_RGS = _levels(weight_RGS, wish, codec)
            if last or (alone and turn == 0 and number < extremes):
                new_RG = _error(weight_RGS, level_RGS, wish, importance_1GS)
                better_RG = new_RG < error_RG
                best, error_RG = _where(better_RG, wish, best), torch.where(better_RG, new_RG, error_RG)
            if not last:
                wish = _fit(weight_RGS, level_RGS, importance_1GS, wish, codec)
    return best, starts[0]


def _starts(weight_RGS: Tensor, codec: Codec) -> tuple[list[Wish], int]:
    """Wishes to start from, and how many of them, the first ones, reach the largest weight."""
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    least, greatest = weight_RGS.amin(-1), weight_RGS.amax(-1)
    if codec.zero_points:  # such a grid holds zero
        least, greatest = least.clamp(max=0), greatest.clamp(min=0)
    if codec.affine:
        middle = (greatest + least) / 2
        starts = [((greatest - least) * (fraction / (high - low)), middle) for fraction in STARTS]
        starts.append((weight_RGS.std(-1, correction=0) * normal_step(codec), weight_RGS.mean(-1)))
        starts = [(scale, centre - scale * _centre(codec)) for scale, centre in starts]
        if codec.zero_points:  # an offset is a whole multiple of the scale: both neighbours of what is wished
            starts = [(scale, torch.where(scale > LEAST, -scale * whole(-offset / scale), offset))
                      for scale, offset in starts for whole in (torch.floor, torch.ceil)]
        return starts, 2 if codec.zero_points else 1
    # the level range may be longer on one side: put the longer side where the larger weight is, or try both signs
    sides = [torch.maximum(-least / -low, greatest / high)]
    if abs(low) != abs(high):
        sides.append(-torch.maximum(greatest / -low, -least / high))
    usual = weight_RGS.square().mean(-1).sqrt_() * normal_step(codec)
    scales = [side * fraction for fraction in STARTS for side in sides] + [usual, -usual][:len(sides)]
    return [(scale, torch.zeros_like(least)) for scale in scales], len(sides)


def _cat(wishes: list[Wish]) -> Wish:
    return torch.cat([scale for scale, _ in wishes]), torch.cat([offset for _, offset in wishes])


def _where(first: Tensor, one: Wish, other: Wish) -> Wish:
    return torch.where(first, one[0], other[0]), torch.where(first, one[1], other[1])


def _project(wish: Wish, codec: Codec) -> Grid:
    return codec.project(wish[0], wish[1] if codec.affine else None)


def _wish(grid: Grid) -> Wish:
    return grid.scale_OG, torch.zeros_like(grid.scale_OG) if grid.offset_OG is None else grid.offset_OG


def _error(weight_RGS: Tensor, level_RGS: Tensor, wish: Wish, importance_1GS: Tensor) -> Tensor:
    """Weighted squared error of each group (R, G)."""
    error_RGS = (level_RGS * wish[0][..., None]).add_(wish[1][..., None]).sub_(weight_RGS)
    return error_RGS.square_().mul_(importance_1GS).sum(-1)


def _levels(weight_RGS: Tensor, wish: Wish, codec: Codec) -> Tensor:
    scale_RG, offset_RG = wish
    inverse_RG = torch.where(scale_RG.abs() < LEAST, 0.0, 1 / scale_RG)
    value_RGS = (weight_RGS - offset_RG[..., None]) if codec.affine else weight_RGS
    return nearest_levels(value_RGS * inverse_RG[..., None], codec)


def _fit(weight: Tensor, level: Tensor, importance: Tensor, wish: Wish, codec: Codec) -> Wish:
    """Weighted least squares of w on z (and 1); keeps the old value where the system is singular, and zero points."""
    scale, offset = wish
    if codec.zero_points:
        shift = offset / scale
        level = level + shift[..., None]
    zh = level * importance
    zz, zw = (zh * level).sum(-1), (zh * weight).sum(-1)
    if codec.zero_points:
        scale = torch.where(zz > 0, zw / zz.clamp_min(1e-30), scale)
        return scale, scale * shift
    if not codec.affine:
        return torch.where(zz > 0, zw / zz.clamp_min(1e-30), scale), offset
    n, z1, w1 = importance.sum(-1), zh.sum(-1), (weight * importance).sum(-1)
    determinant = n * zz - z1 * z1
    usable = determinant > 1e-6 * (n * zz)
    safe = torch.where(usable, determinant, 1.0)
    new_scale = (n * zw - z1 * w1) / safe
    new_offset = (w1 - new_scale * z1) / n
    return torch.where(usable, new_scale, scale), torch.where(usable, new_offset, offset)


def refit(codes_OI: Tensor, grid: Grid, missed_OI: Tensor, metric_II: Tensor, codec: Codec) -> Grid:
    """The storable grid nearest to the joint least-squares scales of each row under the full metric; codes fixed.

    missed_OI: (W - W_hat) S, of the grid as it is. Offsets stay, or the zero points do. Row o's scales move by d, with
    M d = r, M_gh = z_g^T S_gh z_h and r_g = z_g . (W - W_hat) S, ridge 1e-6; z is counted from zero points.
    """
    out_features, in_features = codes_OI.shape
    step = codec.step or in_features
    groups = in_features // step
    level_OI = codec.levels[codes_OI.long()]
    shift_OG = torch.zeros(())
    if grid.offset_OG is not None and codec.zero_points:
        shift_OG = grid.offset_OG / grid.scale_OG
        level_OI = level_OI + shift_OG.repeat_interleave(step, 1)
    rows = max(1, (1 << 23) // max(in_features, groups * groups))
    scale_OG = grid.scale_OG.clone()
    for start in range(0, out_features, rows):
        level_RI = level_OI[start:start + rows]
        system_RGG = torch.empty(len(level_RI), groups, groups)
        for g in range(groups):
            image_RJ = level_RI[:, g * step:(g + 1) * step] @ metric_II[g * step:(g + 1) * step, g * step:]
            system_RGG[:, g, g:] = image_RJ.mul_(level_RI[:, g * step:]).unflatten(1, (-1, step)).sum(-1)
            system_RGG[:, g + 1:, g] = system_RGG[:, g, g + 1:]
        right_RG = (missed_OI[start:start + rows] * level_RI).unflatten(1, (-1, step)).sum(-1)
        ridge = system_RGG.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-30) * 1e-6
        system_RGG.diagonal(dim1=1, dim2=2).add_(ridge)
        move_RG = torch.linalg.solve(system_RGG, right_RG[..., None])[..., 0]
        scale_OG[start:start + rows] += torch.where(move_RG.isfinite(), move_RG, 0.0)
    return codec.project(scale_OG, scale_OG * shift_OG if codec.zero_points else grid.offset_OG)
