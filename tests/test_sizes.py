"""Sizes: what is parsed is what was written, and what is not a size is refused with an example."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supremum.sizes import UNITS, format_size, parse_size


@pytest.mark.parametrize(("text", "size"), [
    ("60MB", 60_000_000), ("60 mb", 60_000_000), ("1.5KiB", 1536), ("1.2GiB", 1288490188), ("98362432", 98362432),
    (" 7B ", 7), ("0.5KB", 500), ("2TB", 2 * 10**12), ("0.1MB", 100_000),
])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [
    "", "MB", "-5MB", "60 megs", "1e6", "5MBit", "1,5GB", "nan", "inf", "0", "0.0001B", "٣MB",
])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a size|unknown unit|less than one byte"):
        parse_size(text)


@given(st.integers(1, 10**6), st.integers(0, 999), st.sampled_from([unit for unit in UNITS if len(unit) > 1]))
def test_parsing_is_exact_rational_arithmetic(whole: int, thousandths: int, unit: str) -> None:
    exact = Fraction(whole * 1000 + thousandths, 1000) * UNITS[unit]
    assert parse_size(f"{whole}.{thousandths:03d}{unit}") == exact.numerator // exact.denominator


@given(st.integers(1, 10**15))
def test_formatting_keeps_three_figures(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.0051 * size


def test_formatting_never_shows_four_figures() -> None:
    assert [format_size(n) for n in (999, 1000, 999_600, 60_000_000, 999_499_999, 1_234_567_890)] == [
        "999 B", "1.00 KB", "1.00 MB", "60.0 MB", "999 MB", "1.23 GB"]
