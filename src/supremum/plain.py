"""Values as strict JSON holds them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` in dictionaries, lists, strings and numbers: data classes and mappings become dictionaries with strings for
    keys, tuples lists, paths strings, and numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
