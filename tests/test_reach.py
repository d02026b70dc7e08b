"""A largest KL: the smallest file that keeps it, whatever the prediction was off by."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supremum import reach as module
from supremum import swaps
from supremum.allocate import Budget, Option, Unit
from supremum.checkpoint import open_checkpoint
from supremum.codecs import Coded
from supremum.errors import BudgetError
from supremum.gather import damage, gather, gather_fisher
from supremum.solve.candidates import load_coded
from supremum.solve.final import solve_final
from supremum.solve.gains import Trained
from supremum.stats.sweep import moments
from supremum.workspace import Workspace

from .test_pipeline import text  # noqa: F401  (a fixture)

UNITS = [Unit((f"b.{k}",), 1000, True, tuple(Option(f"{bits}", 125 * bits, 0.002 * (1 + k % 3) * 4.0 ** (4 - bits))
                                             for bits in range(2, 9))) for k in range(40)]
TARGET = SimpleNamespace(size=lambda checkpoint, plan: 1000 + sum(125 * int(codec) for codec in plan.values()))


def gathered_in(folder: Path) -> Any:
    return SimpleNamespace(workspace=Workspace(folder / "work", {}), checkpoint=None, stream=None, windows=None,
                           held_out=None)


def nats(plan: dict[str, str]) -> float:
    return math.fsum(next(o.nats for o in unit.options if o.codec == plan[unit.tensors[0]]) for unit in UNITS)


def finishes(patch: pytest.MonkeyPatch, kl: Callable[[dict[str, str]], float]) -> None:
    """Solving and training a plan leaves this KL."""
    patch.setattr(module, "solve_and_train", lambda gathered, plan, *given, **options: Trained(
        SimpleNamespace(plan=plan), {}, {"kl_mean": kl(plan)}, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("truth", [0.2, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("largest", [0.02, 0.3])
def test_the_file_is_just_within_the_kl(truth: float, largest: float, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """truth: the finished file's KL over the prediction's, corrected by points that measured what was predicted."""
    monkeypatch.setattr(module, "swap", lambda *given: (given[4], None))
    finishes(monkeypatch, lambda plan: truth * nats(plan) ** 1.1)  # and not proportional to it
    gathered: Any = gathered_in(tmp_path)
    points = [{"kl": 1.0, "nats": 1.0}]
    chosen, trained, found = module.reach(gathered, UNITS, None, None, Budget(max_kl=largest), TARGET, points)  # type: ignore
    assert 0.9 * largest <= trained.quality["kl_mean"] <= largest and found is None
    assert trained.coded.plan == {unit.tensors[0]: option.codec for unit, option in zip(UNITS, chosen, strict=True)}


def truly(plan: dict[str, str]) -> float:
    """Nats of a plan where the layers matter otherwise than was priced: as much on the mean."""
    return math.fsum((0.25, 1.75)[k % 2] * next(o.nats for o in unit.options if o.codec == plan[unit.tensors[0]])
                     for k, unit in enumerate(UNITS))


class Windows:
    """Stands for the candidates' model: KL of four windows."""

    def __init__(self, *given: Any) -> None:
        pass

    def start(self, plan: dict[str, str]) -> list[float]:
        return [share * truly(plan) for share in (0.8, 1.0, 1.0, 1.2)]

    def attempt(self, plan: dict[str, str], changed: list[str]) -> list[float]:
        return self.start(plan)

    def settle(self, accepted: bool) -> None:
        pass

    def drop(self) -> None:
        pass


def searched(folder: Path, budget: Budget, patch: pytest.MonkeyPatch, trials: int = 24) -> Any:
    """`reach` with the search for better formats, where the finished file has half of the candidates' KL."""
    patch.setattr(swaps, "_States", Windows)
    patch.setattr(swaps, "TRIALS", trials)
    finishes(patch, lambda plan: 0.5 * truly(plan))
    return module.reach(gathered_in(folder), UNITS, None, None, budget, TARGET, [{"kl": 1.0, "nats": 1.0}])  # type: ignore


def test_what_swaps_take_off_the_kl_makes_the_file_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0.4
    _, plain, none = searched(tmp_path / "plain", Budget(max_kl=largest), monkeypatch, trials=0)
    chosen, trained, record = searched(tmp_path / "swapped", Budget(max_kl=largest), monkeypatch)
    assert 0.9 * largest <= trained.quality["kl_mean"] <= largest and plain.quality["kl_mean"] <= largest
    assert TARGET.size(None, trained.coded.plan) < 0.99 * TARGET.size(None, plain.coded.plan)
    assert none["accepted"] == 0 < record["accepted"] and record["kl_after"] < record["kl_before"]
    assert record["kl_after"] == pytest.approx(truly(trained.coded.plan))  # of the plan that is returned, not of another
    assert trained.coded.plan == {unit.tensors[0]: option.codec for unit, option in zip(UNITS, chosen, strict=True)}


def test_a_small_kl_is_planned_without_swaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trained, record = searched(tmp_path, Budget(max_kl=0.02), monkeypatch)
    assert record is None and trained.quality["kl_mean"] <= 0.02


def test_a_killed_run_goes_on_to_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the search of the second plan: that of the first is not run again."""
    budget, attempt, seen = Budget(max_kl=0.4), Windows.attempt, list[str]()

    def counted(self: Windows, plan: dict[str, str], changed: list[str]) -> list[float]:
        seen.append("".join(changed))
        return attempt(self, plan, changed)

    def killed(self: Windows, plan: dict[str, str], changed: list[str]) -> list[float]:
        if len(seen) == 30:
            raise KeyboardInterrupt
        return counted(self, plan, changed)

    monkeypatch.setattr(Windows, "attempt", counted)
    whole = searched(tmp_path / "whole", budget, monkeypatch)
    order = list(seen)
    seen.clear()
    monkeypatch.setattr(Windows, "attempt", killed)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "killed", budget, monkeypatch)
    assert {path.parent.name for path in (tmp_path / "killed").rglob("log.json")} == {"swaps0", "swaps1"}
    monkeypatch.setattr(Windows, "attempt", counted)
    chosen, trained, record = searched(tmp_path / "killed", budget, monkeypatch)
    assert seen == order and (chosen, trained.quality) == (whole[0], whole[1].quality)
    assert {**record, "seconds": 0} == {**whole[2], "seconds": 0}


def test_what_no_plan_keeps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "swap", lambda *given: (given[4], None))
    finishes(monkeypatch, lambda plan: 0.5)
    gathered: Any = gathered_in(tmp_path)
    with pytest.raises(BudgetError, match=r"was not reached in \d plans|cannot be reached"):
        module.reach(gathered, UNITS, None, None, Budget(max_kl=0.4), TARGET, [{"kl": 1.0, "nats": 1.0}])  # type: ignore


def test_the_final_solve_descends_in_the_output_fisher_s_metric(tmp_path: Path, tiny_model: Callable[..., Path],
                                                                text: str) -> None:  # noqa: F811
    """Of the first layers, whose inputs are the original's, rows together leave less damage than cancellation does."""
    gathered = gather(open_checkpoint(tiny_model("llama")), Workspace(tmp_path / "work", {}), text=[text], tokens=2048,
                      seed=0, dtype="float32")
    gather_fisher(gathered, 0)
    plan = {name: "int3-g32" for name in gathered.shapes if name not in gathered.stream.tables()}
    with_descent = module._solve(gathered, plan, None, "with")
    files = solve_final(gathered.stream, gathered.windows, gathered.workspace, plan, gathered.weight, gathered.shapes,
                        "without", {})
    block = next(iter(gathered.stream.blocks))
    sums, keys = moments(gathered.workspace, gathered.calls, block)

    def left(layer: str, coded: Coded) -> float:
        change_OI = coded.decode() - gathered.weight(gathered.inner(block, layer))
        return damage(gathered.fisher(block, layer), change_OI, change_OI @ sums[keys[layer]])

    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        name = gathered.inner(block, layer)
        cancelled = load_coded(gathered.workspace, files[name], name, plan[name], gathered.shapes[name])
        assert left(layer, with_descent[name]) < 0.97 * left(layer, cancelled), layer
