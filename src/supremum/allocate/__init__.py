"""Allocation: one budget spent over many layers' options."""

from .budget import Budget
from .knapsack import Option, Unit, choose, frontier

__all__ = ["Budget", "Option", "Unit", "choose", "frontier"]
