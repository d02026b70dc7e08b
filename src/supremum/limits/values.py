"""A number with its unit and how we know it. Nothing in a report of limits is printed without the three."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

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


def plain(thing: Any) -> Any:
    """`thing` (data classes, tuples, mappings, numbers) as JSON can hold it; infinities and NaN become None."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: plain(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
    if isinstance(thing, dict):
        return {str(key): plain(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [plain(item) for item in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return None
    return thing
