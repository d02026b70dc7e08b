"""From priced options to a solved plan that keeps its budget: measure, correct the prediction, plan, solve, train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .allocate import Budget, Option, Unit, frontier
from .checkpoint.targets import LazyCoded, Target
from .codecs import Coded
from .costs import Costs
from .errors import BudgetError
from .gather import Gathered
from .measure.streamed import streamed_quality
from .planning import plan_of, spend
from .progress import note
from .solve.candidates import Candidates, load_coded
from .solve.final import Grids, solve_final
from .solve.gains import Trained, train_gains
from .swaps import MENDS, swap

RATIOS = (0.9, 1.0, 1.15)  # of the budget's bytes: the frontier points whose true KL is measured before the plan is made
ATTEMPTS, AIM, NEAR = 4, 0.97, 0.9  # plans tried to meet a largest KL; shares of it: aimed at, and near enough to stop


def verify_frontier(gathered: Gathered, units: list[Unit], candidates: Candidates, reference: torch.Tensor,
                    budget: Budget, kind: Target, costs: Costs | None = None) -> list[dict[str, Any]]:
    """True KL of a few frontier points, without drift correction: what the prediction is refitted on."""
    def measure() -> list[dict[str, Any]]:
        hull = frontier(units)
        if budget.size or budget.bits or costs:
            allowance = costs.allowance(budget) if costs else None
            centre = sum(o.nbytes for o in spend(replace(budget, max_kl=None), units, gathered.checkpoint, kind,
                                                 allowance=allowance))
        else:
            wanted = budget.max_kl or 1.0
            centre = sum(o.nbytes for o in min(hull, key=lambda c: abs(math.log(max(_nats(c), 1e-9) / wanted))))
        picked: list[list[Option]] = []
        for ratio in RATIOS:
            aim = centre * ratio
            near = min(hull, key=partial(lambda aim, c: abs(math.log(sum(o.nbytes for o in c) / aim)), aim))
            if near not in picked and _nats(near) > 0:
                picked.append(near)
        points = []
        for i, options in enumerate(picked):
            plan = plan_of(units, options)
            coded = candidates.coded(plan)
            quality = streamed_quality(gathered.stream, gathered.held_out, reference, coded.decoded,
                                       f"measure point {i + 1} of {len(picked)}", codec=plan.get)
            points.append({"plan": plan, "bytes": kind.size(gathered.checkpoint, plan), "nats": _nats(options),
                           "kl": quality.kl_mean})
        return points

    found: list[dict[str, Any]] = gathered.workspace.json(f"{budget.name}/verified.json", measure)
    return found


def correction(points: Sequence[Mapping[str, Any]]) -> float:
    """true KL / predicted nats: the geometric mean over the measured points."""
    ratios = [math.log(point["kl"] / point["nats"]) for point in points if point["kl"] > 0 and point["nats"] > 0]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


def reach(gathered: Gathered, units: list[Unit], candidates: Candidates, reference: torch.Tensor, budget: Budget,
          kind: Target, points: list[dict[str, Any]], costs: Costs | None = None, *, quick: bool = False,
          ) -> tuple[list[Option], Trained, dict[str, Any] | None]:
    """Plan, swap, solve, train and measure; with a largest KL again, looser or stricter, until the measurement is just below
    it. What swaps take off the KL at a plan's bytes lets the next plan be smaller.

    costs: what the formats take when they run, where the budget has memory or speed. The last that is returned: what the
    search for better formats bought, where there was one.
    """
    mends = 1.0 if quick else MENDS  # what the steps after the plan divide its KL by

    def planned(attempt: int, nats: float | None) -> list[Option]:
        plan = partial(spend, budget, units, gathered.checkpoint, kind, nats=nats)
        return costs.settle(budget, units, plan, f"{budget.name}/plan{attempt}") if costs else plan()

    def solved(plan: list[Option], attempt: int) -> tuple[list[Option], Trained, dict[str, Any] | None]:
        chosen, swaps = swap(gathered, kind, budget, units, plan, candidates, reference, correction(points) * _nats(plan),
                             f"{budget.name}/swaps{attempt}", mends)
        return chosen, solve_and_train(gathered, plan_of(units, chosen), candidates, reference,
                                       f"{budget.name}/solved{attempt}", quick=quick), swaps

    if budget.max_kl is None:
        return solved(planned(0, None), 0)
    factor = correction(points) / mends  # KL of the finished file over the nats of its plan, before swaps
    found: list[tuple[list[Option], Trained, dict[str, Any] | None]] = []  # what held
    tried: list[list[Option]] = []
    for attempt in range(ATTEMPTS):
        try:
            plan = planned(attempt, AIM * budget.max_kl / factor)
        except BudgetError as error:
            if found:
                break
            raise BudgetError(f"KL {budget.max_kl:g} cannot be reached within the other limits: {error.cause}",
                              f"{error.remedy} Or allow more KL.".strip()) from error
        if plan in tried:
            break
        tried.append(plan)
        result = solved(plan, attempt)
        kl = max(result[1].quality["kl_mean"], 1e-9)
        if kl <= budget.max_kl:
            found.append(result)
        if NEAR * budget.max_kl <= kl <= budget.max_kl or _nats(plan) == 0:
            break
        note(f"measured KL {kl:.4f} is {'above' if kl > budget.max_kl else 'well below'} {budget.max_kl:g}; planning again")
        factor = (1.03 if kl > budget.max_kl else 1) * kl / _nats(plan)
    if not found:
        raise BudgetError(f"KL {budget.max_kl:g} was not reached in {len(tried)} plans (last: {kl:.4f}).",
                          "Allow more KL, or more bytes.")
    return min(found, key=lambda each: kind.size(gathered.checkpoint, each[1].coded.plan))


def solve_and_train(gathered: Gathered, plan: Mapping[str, str], candidates: Candidates | None, reference: torch.Tensor,
                    folder: str, *, quick: bool = False) -> Trained:
    """The plan (tensor name -> codec name) solved, trained and measured. candidates: of the tables, where it codes any;
    quick: of all tensors, and they are what is measured."""
    if quick:
        assert candidates is not None
        coded = candidates.coded(plan)
    else:
        coded = _solve(gathered, plan, candidates, folder)
    return train_gains(gathered.stream, gathered.windows, gathered.held_out, reference, gathered.workspace, coded, folder,
                       quick=quick)


def _solve(gathered: Gathered, plan: Mapping[str, str], candidates: Candidates | None, folder: str) -> LazyCoded:
    """The blocks' matrices on the inputs that they will see, and the tables' candidates."""
    tables = {name: candidates.get(name, plan[name]) for name in gathered.stream.tables() if candidates and name in plan}
    files = solve_final(gathered.stream, gathered.windows, gathered.workspace, plan, gathered.weight, gathered.shapes,
                        folder, tables, Grids(gathered.fisher_of))

    def load(name: str) -> Coded:
        if name in tables:
            return tables[name]
        return load_coded(gathered.workspace, files[name], name, plan[name], gathered.shapes[name])

    return LazyCoded(plan, load)


def _nats(options: list[Option]) -> float:
    return sum(option.nats for option in options)
