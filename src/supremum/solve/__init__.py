"""Solvers: what picks a codec's values. Nearest rounding, GPTQ and the drift-corrected target are settings of one."""

from .cancellation import distortion, nearest, solve

__all__ = ["distortion", "nearest", "solve"]
