"""Sizes as people write them: KB, MB, GB are powers of 1000, KiB, MiB, GiB powers of 1024, a bare number is bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "n/a"
UNITS = {"": 1, "B": 1,
         "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as "60MB", "1.2 GiB" or "98362432", rounded down to a whole byte.

    Raises ValueError, with a message for the person who wrote it, on anything else and on zero.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 60MB, 1.2GiB or 98362432")
    number, unit = match.groups()
    if unit.upper() not in UNITS:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    whole, _, fraction = number.partition(".")
    scale = UNITS[unit.upper()]
    size = int(whole) * scale + int(fraction or 0) * scale // 10 ** len(fraction)
    if size == 0:
        raise ValueError(f"{text!r} is less than one byte")
    return size


def format_size(size: float) -> str:
    """`size` bytes in decimal units with three significant figures: "60.0 MB", "1.23 GB", "512 B"."""
    if size < 0:
        return "-" + format_size(-size)
    if size < 999.5:
        return f"{size:.0f} B"
    for unit in ("KB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def figure(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant figures and no needless exponent."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def cells(one: Mapping[str, Any]) -> list[str]:
    """A `Compared`, made plain, in words: value, interval and, beside an original, its value, the change, its interval, p."""
    value, before, change = one["value"], one["reference"], one["change"]
    digits = 3 if abs(value["value"]) <= 1 else 2  # a share, or points of a hundred
    found = [f"{value['value']:.{digits}f}", f"{value['low']:.{digits}f} to {value['high']:.{digits}f}"]
    if before is not None:
        found += [f"{before['value']:.{digits}f}", f"{change['value']:+.{digits}f}",
                  f"{change['low']:+.{digits}f} to {change['high']:+.{digits}f}", figure(change["p"], 2)]
    return found
