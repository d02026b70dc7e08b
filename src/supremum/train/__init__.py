"""Training: recipes, one run over Transformers' Trainer, objectives and what a run leaves."""

from __future__ import annotations

from .recipe import Training, load

__all__ = ["Training", "load"]
