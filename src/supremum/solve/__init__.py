"""Solvers: what picks a codec's values. Nearest rounding, GPTQ and the drift-corrected target are settings of one."""

from .cancellation import Metric, distortion, nearest, solve, solve_together

__all__ = ["Metric", "distortion", "nearest", "solve", "solve_together"]
