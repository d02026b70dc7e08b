"""A number with its unit and how we know it. Nothing in a report of limits is printed without the three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "bound", "estimate"]
"""measured: by this program, on this machine or this file. bound: nothing can be better, if the stated assumptions
hold. estimate: computed from a model or from other people's figures, and may err on either side."""


@dataclass(frozen=True)
class Value:
    """One reported number. `unit` in words ("bits/weight", "GB/s", "tokens/s", "nats/token", "bytes")."""

    value: float
    unit: str
    kind: Kind
    note: str = ""
