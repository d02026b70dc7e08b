"""Scales (and offsets) of a grid, chosen to lose least.

For one group of weights w with importances h, and codes z(s) = nearest level to (w - b)/s:

    search      minimise  sum_i h_i (w_i - s z_i - b)^2   over s (and b)

by alternating nearest codes with the closed-form weighted least-squares fit of (s, b), from several starts. Every start's
result is projected on what the format can store before the best one is chosen, so the choice is honest.

    refit       minimise  tr((W - W_hat(s)) S (W - W_hat(s))^T)   over all scales of a row at once, codes fixed

is the joint fit under the full metric: one G x G system a row (G scales), used between passes of the solver.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..codecs import Codec, Grid

STARTS = (1.0, 0.85, 0.7)  # fractions of the scale that reaches the group's largest weight
ROUNDS = 3  # of codes and fit in turn
CHUNK = 1 << 16  # weights at a time: the working set stays in the second-level cache


@cache
def uniform_levels(codec: Codec) -> tuple[int, int] | None:
    """(lowest, highest) if the levels are consecutive integers, else None."""
    levels = codec.levels
    low, high = int(levels[0]), int(levels[-1])
    return (low, high) if len(levels) == high - low + 1 and torch.equal(levels, torch.arange(low, high + 1.0)) else None


@cache
def _nearest_table(codec: Codec) -> Tensor:
    """Nearest level of every integer between the lowest and the highest; the levels are integers."""
    integers = torch.arange(float(codec.levels[0]), float(codec.levels[-1]) + 1)
    return codec.levels[(integers[:, None] - codec.levels).abs().argmin(1)]


def nearest_levels(value: Tensor, codec: Codec) -> Tensor:
    """The level nearest to each value (same shape, float32); halves between two levels go to either."""
    bounds = uniform_levels(codec)
    if bounds is not None:
        return value.round().clamp_(*bounds)
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    return _nearest_table(codec)[value.clamp(low, high).sub_(low).round_().int()]


def search(weight_OI: Tensor, importance_I: Tensor, codec: Codec) -> Grid:
    """The best storable grid for nearest rounding of `weight_OI` (float32) under per-column importances (I,)."""
    out_features, in_features = weight_OI.shape
    step = codec.step or in_features
    rows = max(1, CHUNK // in_features)
    weight_ON = weight_OI.reshape(out_features, in_features // step, step)
    importance_1GS = importance_I.float().clamp_min(1e-30).view(1, -1, step)
    importance_1GS = importance_1GS / importance_1GS.mean(-1, keepdim=True)
    scales, offsets = [], []
    for start in range(0, out_features, rows):
        scale_RG, offset_RG = _search_rows(weight_ON[start:start + rows], importance_1GS, codec)
        scales.append(scale_RG)
        offsets.append(offset_RG)
    return codec.project(torch.cat(scales), torch.cat(offsets) if codec.affine else None)


def _search_rows(weight_RGS: Tensor, importance_1GS: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    least, greatest = weight_RGS.amin(-1), weight_RGS.amax(-1)
    starts: list[tuple[Tensor, Tensor]] = []
    zero = torch.zeros_like(least)
    if codec.affine:
        for fraction in STARTS:
            span = (greatest - least) * fraction
            middle = (greatest + least) / 2
            starts.append((span / (high - low), middle - span / 2 - low * span / (high - low)))
    else:
        # the level range may be longer on one side: put the longer side where the larger weight is, or try both signs
        both = abs(low) != abs(high)
        for fraction in STARTS:
            reach = torch.maximum(-least / -low, greatest / high) * fraction
            starts.append((reach, zero))
            if both:
                starts.append((-torch.maximum(greatest / -low, -least / high) * fraction, zero))
    best_error: Tensor | None = None
    best_scale = best_offset = zero
    for scale_RG, offset_RG in starts:
        for turn in range(ROUNDS):
            level_RGS = _levels(weight_RGS, scale_RG, offset_RG, codec)
            if turn < ROUNDS - 1:
                scale_RG, offset_RG = _fit(weight_RGS, level_RGS, importance_1GS, scale_RG, offset_RG, codec.affine)
        error_RGS = level_RGS.mul_(scale_RG[..., None]).add_(offset_RG[..., None]).sub_(weight_RGS)
        error_RG = error_RGS.square_().mul_(importance_1GS).sum(-1)
        if best_error is None:
            best_error, best_scale, best_offset = error_RG, scale_RG, offset_RG
        else:
            better = error_RG < best_error
            best_error = torch.where(better, error_RG, best_error)
            best_scale = torch.where(better, scale_RG, best_scale)
            best_offset = torch.where(better, offset_RG, best_offset)
    return best_scale, best_offset


def _levels(weight_RGS: Tensor, scale_RG: Tensor, offset_RG: Tensor, codec: Codec) -> Tensor:
    inverse_RG = torch.where(scale_RG == 0, 0.0, 1 / scale_RG)
    value_RGS = (weight_RGS - offset_RG[..., None]) if codec.affine else weight_RGS
    return nearest_levels(value_RGS * inverse_RG[..., None], codec)


def _fit(weight: Tensor, level: Tensor, importance: Tensor, scale: Tensor, offset: Tensor, affine: bool,
         ) -> tuple[Tensor, Tensor]:
    """Weighted least squares of w on z (and 1); keeps the old value where the system is singular."""
    zh = level * importance
    zz, zw = (zh * level).sum(-1), (zh * weight).sum(-1)
    if not affine:
        return torch.where(zz > 0, zw / zz.clamp_min(1e-30), scale), offset
    n, z1, w1 = importance.sum(-1), zh.sum(-1), (weight * importance).sum(-1)
    determinant = n * zz - z1 * z1
    usable = determinant > 1e-6 * (n * zz)
    safe = torch.where(usable, determinant, 1.0)
    new_scale = (n * zw - z1 * w1) / safe
    new_offset = (w1 - new_scale * z1) / n
    return torch.where(usable, new_scale, scale), torch.where(usable, new_offset, offset)


def refit(target_OI: Tensor, codes_OI: Tensor, grid: Grid, metric_II: Tensor, codec: Codec) -> Grid:
    """The storable grid nearest to the joint least-squares scales of each row under the full metric; codes fixed.

    Offsets stay. Row o solves M a = r with M_gh = z_g^T S_gh z_h and r_g = z_g^T S_g,: (w - b), ridge 1e-6.
    """
    out_features, in_features = target_OI.shape
    step = codec.step or in_features
    groups = in_features // step
    level_OI = codec.levels[codes_OI.long()]
    shifted_OI = target_OI
    if grid.offset_OG is not None:
        shifted_OI = target_OI - grid.offset_OG.repeat_interleave(step, 1)
    rows = max(1, (1 << 23) // (in_features * groups))
    scale_OG = torch.empty(out_features, groups)
    image_OI = shifted_OI @ metric_II
    for start in range(0, out_features, rows):
        level_RI = level_OI[start:start + rows]
        count = level_RI.shape[0]
        spread_RGI = torch.zeros(count, groups, in_features)
        spread_RGI.view(count, groups, groups, step).diagonal(dim1=1, dim2=2).copy_(
            level_RI.view(count, groups, step).transpose(1, 2))
        image_RGI = (spread_RGI.view(-1, in_features) @ metric_II).view_as(spread_RGI)
        system_RGG = (image_RGI.view(count, groups, groups, step) * level_RI.view(count, 1, groups, step)).sum(-1)
        right_RG = (image_OI[start:start + rows] * level_RI).view(count, groups, step).sum(-1)
        ridge = system_RGG.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-30) * 1e-6
        system_RGG.diagonal(dim1=1, dim2=2).add_(ridge)
        old_RG = grid.scale_OG[start:start + rows]
        solution_RG = torch.linalg.solve(system_RGG, (right_RG + ridge * old_RG)[..., None])[..., 0]
        scale_OG[start:start + rows] = torch.where(solution_RG.isfinite(), solution_RG, old_RG)
    return codec.project(scale_OG, grid.offset_OG)
