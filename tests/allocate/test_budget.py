"""What counts as a budget."""

from __future__ import annotations

import math

import pytest

from supremum.allocate import Budget
from supremum.errors import BudgetError


def test_any_of_the_three_is_a_budget() -> None:
    assert Budget(size=60_000_000).bits is None and Budget(bits=4.5).size is None and Budget(max_kl=0.01).max_kl == 0.01
    assert Budget(size=10**12, bits=0.01, max_kl=1e-9).size == 10**12


def test_none_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"no budget.*Give"):
        Budget()


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["size", "bits", "max_kl"])
def test_what_is_no_positive_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(BudgetError, match=name):
        Budget(**{"bits": 4.0} | {name: value})  # type: ignore[arg-type]
