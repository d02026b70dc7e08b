"""Rate and distortion of one layer as functions of each other, which the curve of many layers is checked against."""

from __future__ import annotations

from torch import Tensor

from supremum.limits import waterfill as wf


def rate_of_distortion(eigenvalues_I: Tensor, distortion: float) -> float:
    """R(D), bits per weight."""
    if distortion >= float(eigenvalues_I.double().mean()):
        return 0.0
    return wf.rate_at(eigenvalues_I, wf.level_of_distortion(eigenvalues_I, distortion))


def distortion_of_rate(eigenvalues_I: Tensor, rate: float) -> float:
    """D(R), mean squared error per weight."""
    return wf.distortion_at(eigenvalues_I, wf.level_of_rate(eigenvalues_I, rate))
