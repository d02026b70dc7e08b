"""Published constants (constants.toml): other people's figures, labelled so wherever they are shown."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from .values import Value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Constants:
    """One published law or figure."""

    name: str  # "scaling.chinchilla_2022"
    form: str
    values: dict[str, float]
    unit: str
    source: str
    date: str
    verified: bool  # read in the source by us; otherwise recalled or second hand
    errors: dict[str, float] = field(default_factory=dict)  # standard errors
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def value(self, key: str) -> Value:
        """One figure with its label, for a report."""
        doubt = "" if self.verified else "; not checked against the source"
        return Value(self.values[key], self.unit, "estimate", f"other people's: {self.source}, {self.date}{doubt}")


@cache
def constants() -> dict[str, Constants]:
    """All rows by name, for example `constants()["scaling.besiroglu_2024"].values["alpha"]`."""
    text = resources.files(__package__).joinpath("constants.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(text)
    found: dict[str, Constants] = {}
    for room, laws in rows.items():
        for law, row in laws.items():
            intervals = {key: (low, high) for key, (low, high) in row.pop("intervals", {}).items()}
            found[f"{room}.{law}"] = Constants(name=f"{room}.{law}", intervals=intervals, **row)
    return found
