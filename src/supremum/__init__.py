"""Supremum: the best a language model can do on this machine within this budget, reached and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint.plugin import when_imported

__version__ = "0.1.0"

_PLACES = {
    "open_checkpoint": "checkpoint", "optimize": "pipeline", "Result": "pipeline", "Budget": "allocate",
    "convert": "pipeline", "measure_limits": "pipeline", "measure_gap": "pipeline",
    "optimize_frontier": "frontier", "FrontierResult": "frontier", "optimize_floor": "floor", "Floor": "floor",
    "evaluate": "measure", "evaluate_files": "measure", "evaluate_tuned": "train.evaluate",
    "verify": "runtime.verify", "SupremumError": "errors",
}
__all__ = ["Budget", "Floor", "FrontierResult", "Result", "SupremumError", "convert", "evaluate", "evaluate_files",
           "evaluate_tuned", "measure_gap", "measure_limits", "open_checkpoint", "optimize", "optimize_floor",
           "optimize_frontier", "verify"]

when_imported()

if TYPE_CHECKING:
    from .allocate import Budget
    from .checkpoint import open_checkpoint
    from .errors import SupremumError
    from .floor import Floor, optimize_floor
    from .frontier import FrontierResult, optimize_frontier
    from .measure import evaluate, evaluate_files
    from .pipeline import Result, convert, measure_gap, measure_limits, optimize
    from .runtime.verify import verify
    from .train.evaluate import evaluate_tuned


def __getattr__(name: str) -> Any:
    """Load a public name from its room when it is first used: importing the package stays fast."""
    if name not in _PLACES:
        raise AttributeError(f"module 'supremum' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"supremum.{_PLACES[name]}"), name)
    return value
