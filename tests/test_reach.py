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
from supremum.solve.gains import Trained
from supremum.workspace import Workspace

UNITS = [Unit((f"b.{k}",), 1000, True, tuple(Option(f"{bits}", 125 * bits, 0.002 * (1 + k % 3) * 4.0 ** (4 - bits))
                                             for bits in range(2, 9))) for k in range(40)]
TARGET = SimpleNamespace(size=lambda checkpoint, plan: 1000 + sum(125 * int(codec) for codec in plan.values()))


def gathered_in(folder: Path) -> Any:
    return SimpleNamespace(workspace=Workspace(folder / "work", {}), checkpoint=None, stream=None, windows=None,
                           held_out=None)


def nats(plan: dict[str, str]) -> float:
    return math.fsum(next(o.nats for o in unit.options if o.codec == plan[unit.tensors[0]]) for unit in UNITS)


@pytest.mark.parametrize("truth", [0.2, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("largest", [0.02, 0.3])
def test_the_file_is_just_within_the_kl(truth: float, largest: float, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """truth: the finished file's KL over the prediction's, corrected by points that measured what was predicted."""
    monkeypatch.setattr(module, "_solve", lambda gathered, plan, candidates, folder: SimpleNamespace(plan=plan))
    monkeypatch.setattr(module, "train_gains", lambda *given: Trained(  # and not proportional to it
        given[-2], {}, {"kl_mean": truth * nats(given[-2].plan) ** 1.1}, None))
    gathered: Any = gathered_in(tmp_path)
    points = [{"kl": 1.0, "nats": 1.0}]
    chosen, trained, swaps = module.reach(gathered, UNITS, None, None, Budget(max_kl=largest), TARGET, points)  # type: ignore
    assert 0.9 * largest <= trained.quality["kl_mean"] <= largest and swaps is None
    assert trained.coded.plan == {unit.tensors[0]: option.codec for unit, option in zip(UNITS, chosen, strict=True)}


def test_what_no_plan_keeps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_solve", lambda gathered, plan, candidates, folder: SimpleNamespace(plan=plan))
    monkeypatch.setattr(module, "train_gains", lambda *given: Trained(given[-2], {}, {"kl_mean": 0.5}, None))
    gathered: Any = gathered_in(tmp_path)
    with pytest.raises(BudgetError, match=r"was not reached in \d plans|cannot be reached"):
        module.reach(gathered, UNITS, None, None, Budget(max_kl=0.4), TARGET, [{"kl": 1.0, "nats": 1.0}])  # type: ignore
