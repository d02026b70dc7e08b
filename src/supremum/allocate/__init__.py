"""Allocation: one budget spent over many layers' options."""

from .budget import Allowance, Budget
from .knapsack import Option, Unit, choose, frontier

__all__ = ["Allowance", "Budget", "Option", "Unit", "choose", "frontier"]
