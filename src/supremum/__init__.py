"""Supremum: the best a language model can do on this machine within this budget, reached and proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "open_checkpoint": "checkpoint", "optimize": "optimize", "Result": "optimize", "Budget": "allocate",
    "convert": "optimize", "measure_limits": "optimize", "evaluate": "measure", "evaluate_files": "measure",
    "verify": "runtime.verify", "SupremumError": "errors",
}
__all__ = ["Budget", "Result", "SupremumError", "convert", "evaluate", "evaluate_files", "measure_limits",
           "open_checkpoint", "optimize", "verify"]

if TYPE_CHECKING:
    from .allocate import Budget
    from .checkpoint import open_checkpoint
    from .errors import SupremumError
    from .measure import evaluate, evaluate_files
    from .optimize import Result, convert, measure_limits, optimize
    from .runtime.verify import verify


def __getattr__(name: str) -> Any:
    """Load a public name from its room when it is first used: importing the package stays fast."""
    if name not in _PLACES:
        raise AttributeError(f"module 'supremum' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"supremum.{_PLACES[name]}"), name)
