"""A largest KL: the smallest file that keeps it, whatever the prediction was off by."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supremum import reach as module
from supremum.allocate import Budget, Option, Unit
from supremum.errors import BudgetError
from supremum.workspace import Workspace

UNITS = [Unit((f"b.{k}",), 1000, True, tuple(Option(f"{bits}", 125 * bits, 0.002 * (1 + k % 3) * 4.0 ** (4 - bits))
                                             for bits in range(2, 9))) for k in range(40)]
TARGET = SimpleNamespace(size=lambda checkpoint, plan: 1000 + sum(125 * int(codec) for codec in plan.values()))


def nats(plan: dict[str, str]) -> float:
    return math.fsum(next(o.nats for o in unit.options if o.codec == plan[unit.tensors[0]]) for unit in UNITS)


@pytest.mark.parametrize("truth", [0.2, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("largest", [0.02, 0.3])
def test_the_file_is_just_within_the_kl(truth: float, largest: float, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """truth: the finished file's KL over the prediction's, corrected by points that measured what was predicted."""
    monkeypatch.setattr(module, "_solve", lambda gathered, plan, candidates, folder: SimpleNamespace(plan=plan))
    monkeypatch.setattr(module, "_measure", lambda gathered, coded, reference, name: SimpleNamespace(
        to_dict=lambda: {"kl_mean": truth * nats(coded.plan) ** 1.1}))  # and not proportional to it
    gathered: Any = SimpleNamespace(checkpoint=None, workspace=Workspace(tmp_path / "work", {}))
    points = [{"kl": 1.0, "nats": 1.0}]
    chosen, coded, quality, swaps = module.reach(gathered, UNITS, None, None, Budget(max_kl=largest), TARGET,  # type: ignore
                                                 points)
    assert 0.9 * largest <= quality["kl_mean"] <= largest and swaps is None
    assert coded.plan == {unit.tensors[0]: option.codec for unit, option in zip(UNITS, chosen, strict=True)}


def test_what_no_plan_keeps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_solve", lambda gathered, plan, candidates, folder: SimpleNamespace(plan=plan))
    monkeypatch.setattr(module, "_measure", lambda *_: SimpleNamespace(to_dict=lambda: {"kl_mean": 0.5}))
    gathered: Any = SimpleNamespace(checkpoint=None, workspace=Workspace(tmp_path / "work", {}))
    with pytest.raises(BudgetError, match=r"was not reached in \d plans|cannot be reached"):
        module.reach(gathered, UNITS, None, None, Budget(max_kl=0.4), TARGET, [{"kl": 1.0, "nats": 1.0}])  # type: ignore
