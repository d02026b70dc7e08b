"""Below 3 bits, or above KL 0.2, the second order no longer ranks plans: swaps of formats accepted by true KL.

    up u, down v       within the bytes, seconds and memory that the budget or the plan has; best predicted first
    accept             if  mean_n d_n < -s / sqrt(N),  d_n = KL_n(after) - KL_n(before) of held-out window n, s = std(d)

Only the blocks from the first changed one on are run again: the hidden states that enter each block are kept. Trials are
logged, so a killed search goes on where it was. The weights are the candidates', before drift correction. The search ends
after TRIALS, or after PATIENCE rejections in a row. A largest KL asks for few bytes: a search keeps to those of its plan, and
what the KL falls by makes the next plan smaller (reach.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .allocate import Budget, Option, Unit
from .checkpoint.targets import Target
from .gather import Gathered
from .measure.streamed import replacing, window_kl
from .planning import block_rate, plan_of
from .progress import note, phase
from .solve.candidates import Candidates
from .stats.sweep import batches, hidden_file, run_block
from .workspace import write_atomic

LOW_BITS, HIGH_KL = 3.0, 0.2  # of the finished file
MENDS = 2  # what the drift's correction and the trained gains about divide the KL by, where they follow
TRIALS, PATIENCE = 24, 8

Fits = Callable[[Sequence[Option]], bool]


@dataclass
class Log:
    """What was tried. kl: of the plan, each window's mean; trials: [up, its option, down, its option, accepted]."""

    before: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    trials: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        return {"trials": len(self.trials), "accepted": sum(trial[-1] for trial in self.trials),
                "kl_before": sum(self.before) / len(self.before), "kl_after": sum(self.kl) / len(self.kl),
                "seconds": self.seconds}


def wanted(units: Sequence[Unit], chosen: Sequence[Option], predicted: float, mends: float = MENDS) -> bool:
    """Whether the plan is where the second order misleads: below LOW_BITS, or a KL, of the finished file, that may be above
    HIGH_KL. predicted: corrected KL of the plan as it stands; mends: what the steps that follow divide it by."""
    weights, bits = block_rate(units, chosen)
    return bool(weights) and (bits < LOW_BITS or predicted > mends * HIGH_KL / 2)


def largest_size(budget: Budget, planned: int) -> int:
    """Bytes that swaps may fill: the budget's; of the plan, where there is none or where the plan is to be the smallest."""
    return planned if budget.size is None or budget.max_kl is not None else budget.size


def within(units: Sequence[Unit], chosen: Sequence[Option], budget: Budget, size: Callable[[Mapping[str, str]], int]) -> Fits:
    """Whether a plan takes no more bytes than `largest_size`, no more bits than the budget, and no more seconds or resident
    memory than the plan that was chosen."""
    largest = largest_size(budget, size(plan_of(units, chosen)))

    def running(options: Sequence[Option]) -> tuple[float, int]:
        return math.fsum(o.seconds for o in options), sum(o.resident for o in options)

    seconds, resident = running(chosen)

    def fits(options: Sequence[Option]) -> bool:
        longer, larger = running(options)
        return (longer <= seconds + 1e-12 and larger <= resident and size(plan_of(units, options)) <= largest
                and (budget.bits is None or block_rate(units, options)[1] <= budget.bits * (1 + 1e-12)))

    return fits


def proposals(units: Sequence[Unit], chosen: Sequence[Option], trials: Sequence[tuple[int, int, int, int, bool]],
              slack: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """(up, its option, down, its option): one unit to its next larger option that is better, another to the next smaller,
    for at most `slack` more bytes together.

    Moves that were tried least come first, then the least predicted damage. Nothing is tried twice for the same two units.
    """
    ups, downs = [], []
    for u, (unit, now) in enumerate(zip(units, chosen, strict=True)):
        larger = [o for o in unit.options if o.nbytes > now.nbytes and o.nats < now.nats]
        smaller = [o for o in unit.options if o.nbytes < now.nbytes]
        if larger:
            option = min(larger, key=lambda o: (o.nbytes, o.nats))
            ups.append((u, unit.options.index(option), option.nats - now.nats, option.nbytes - now.nbytes))
        if smaller:
            option = max(smaller, key=lambda o: (o.nbytes, -o.nats))
            downs.append((u, unit.options.index(option), option.nats - now.nats, option.nbytes - now.nbytes))
    tried = Counter(move for u, i, v, j, _ in trials for move in ((u, i), (v, j)))
    done = {(u, i, v, j) for u, i, v, j, _ in trials}
    found = []
    for u, i, gain, more in ups:
        for v, j, loss, less in downs:
            if u != v and (u, i, v, j) not in done and more + less <= slack:
                found.append((tried[u, i] + tried[v, j], gain + loss, u, i, v, j))
    for *_, u, i, v, j in sorted(found):
        yield u, i, v, j


def search(gathered: Gathered, units: Sequence[Unit], chosen: Sequence[Option], candidates: Candidates, reference: Tensor,
           fits: Fits, folder: str, slack: int = 0, mends: float = MENDS) -> tuple[list[Option], dict[str, Any] | None]:
    """The plan after the swaps that held, and what they bought; None if the plan measures below the thresholds.

    slack: bytes that the plan leaves of its budget.
    """
    planned = chosen = list(chosen)
    kept = _States(gathered, candidates, reference, folder)
    place = gathered.workspace.path(f"{folder}/log.json")
    log = Log(**json.loads(place.read_text())) if place.exists() else Log()
    for u, i, v, j, accepted in log.trials:
        if accepted:
            trial = _moved(units, chosen, (u, i, v, j))
            slack, chosen = slack + _nbytes(chosen) - _nbytes(trial), trial

    def following() -> tuple[int, int, int, int] | None:
        found = () if _ended(log) else proposals(units, chosen, log.trials, slack)
        return next((move for move in found if fits(_moved(units, chosen, move))), None)

    def keep(since: float) -> float:
        now = time.perf_counter()
        log.seconds += now - since
        write_atomic(place, json.dumps(asdict(log)).encode())
        return now

    with phase("swap formats", TRIALS) as advance:
        started = time.perf_counter()
        if standing := not log.kl:
            log.before = log.kl = kept.start(plan_of(units, chosen))
            started = keep(started)
        if block_rate(units, planned)[1] >= LOW_BITS and sum(log.before) / len(log.before) <= mends * HIGH_KL:
            kept.drop()
            return planned, None
        for _ in log.trials:
            advance()
        while (move := following()) is not None:
            if not standing:  # of a search that was killed
                kept.start(plan_of(units, chosen))
                standing = True
            trial = _moved(units, chosen, move)
            kl = kept.attempt(plan_of(units, trial), [name for unit in (move[0], move[2]) for name in units[unit].tensors])
            accepted = falls(log.kl, kl)
            kept.settle(accepted)
            if accepted:
                note(f"{units[move[0]].tensors[0]} {trial[move[0]].codec or 'as it is'}, {units[move[2]].tensors[0]} "
                     f"{trial[move[2]].codec or 'as it is'}: KL {sum(log.kl) / len(kl):.4f} -> {sum(kl) / len(kl):.4f}")
                slack, chosen, log.kl = slack + _nbytes(chosen) - _nbytes(trial), trial, kl
            log.trials.append((*move, accepted))
            started = keep(started)
            advance()
    kept.drop()
    return chosen, log.report()


def _nbytes(options: Sequence[Option]) -> int:
    return sum(option.nbytes for option in options)


def falls(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the mean falls by more than the standard error of the paired difference."""
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return float(difference.mean()) < -error


def _ended(log: Log) -> bool:
    last = log.trials[-PATIENCE:]
    return len(log.trials) >= TRIALS or (len(last) == PATIENCE and not any(trial[-1] for trial in last))


def _moved(units: Sequence[Unit], chosen: Sequence[Option], move: tuple[int, int, int, int]) -> list[Option]:
    up, i, down, j = move
    moved = list(chosen)
    moved[up], moved[down] = units[up].options[i], units[down].options[j]
    return moved


class _States:
    """The hidden states of the plan that stands, and of the one that is tried, as files of the workspace."""

    def __init__(self, gathered: Gathered, candidates: Candidates, reference: Tensor, folder: str) -> None:
        self.gathered, self.candidates, self.reference, self.folder = gathered, candidates, reference, folder
        self.calls = gathered.stream.calls(gathered.held_out)

    def start(self, plan: Mapping[str, str]) -> list[float]:
        """Run the whole plan; its KL, by window."""
        return self._run(plan, 0, f"{self.folder}/now", None)

    def attempt(self, plan: Mapping[str, str], changed: Sequence[str]) -> list[float]:
        """KL of a plan that differs in `changed`; what is the same before the first of them is not run again."""
        embedding, _ = self.gathered.stream.table_names()
        first = min((k for k, call in enumerate(self.calls) for name in changed if name.startswith(f"{call.block}.")),
                    default=len(self.calls))
        return self._run(plan, 0, f"{self.folder}/trial", None) if embedding in changed else \
            self._run(plan, first, f"{self.folder}/trial", self.gathered.workspace.load(
                f"{self.folder}/now/{hidden_file(first)}")["h"])

    def settle(self, accepted: bool) -> None:
        """The tried states take the place of the standing ones, or go."""
        trial, now = (self.gathered.workspace.path(f"{self.folder}/{name}") for name in ("trial", "now"))
        for path in trial.rglob("*.safetensors") if accepted else ():
            os.replace(path, now / path.relative_to(trial))
        shutil.rmtree(trial, ignore_errors=True)

    def drop(self) -> None:
        for name in ("trial", "now"):
            shutil.rmtree(self.gathered.workspace.path(f"{self.folder}/{name}"), ignore_errors=True)

    def _run(self, plan: Mapping[str, str], first: int, folder: str, hidden_NTd: Tensor | None) -> list[float]:
        """From call `first`, or from the embedding without a hidden state; leaves the states that enter each call."""
        stream, windows, workspace = self.gathered.stream, self.gathered.held_out, self.gathered.workspace

        with replacing(stream, self.candidates.coded(plan).decoded, plan.get), torch.no_grad():
            if hidden_NTd is None:
                hidden_NTd = torch.cat([stream.embed(windows[part]) for part in batches(windows)])
                workspace.save(f"{folder}/{hidden_file(0)}", {"h": hidden_NTd})
            for k in range(first, len(self.calls)):
                with stream.block(self.calls[k].block) as block:
                    hidden_NTd = run_block(block, self.calls[k], hidden_NTd)
                workspace.save(f"{folder}/{hidden_file(k + 1)}", {"h": hidden_NTd})
            return window_kl(stream, windows, self.reference, hidden_NTd).tolist()


def swap(gathered: Gathered, kind: Target, budget: Budget, units: Sequence[Unit], chosen: Sequence[Option],
         candidates: Candidates, reference: Tensor, predicted: float, folder: str,
         mends: float = MENDS) -> tuple[list[Option], dict[str, Any] | None]:
    """The search where it is wanted and there is something to swap, else the plan as it is. predicted: the plan's corrected
    KL. folder: of the workspace, for this plan's search. mends: by what the steps that follow divide the KL."""
    if not wanted(units, chosen, predicted, mends):
        return list(chosen), None

    def size(plan: Mapping[str, str]) -> int:
        return kind.size(gathered.checkpoint, plan)

    planned = size(plan_of(units, chosen))
    slack = largest_size(budget, planned) - planned
    if next(proposals(units, chosen, (), slack), None) is None:
        return list(chosen), None
    return search(gathered, units, chosen, candidates, reference, within(units, chosen, budget, size), folder, slack,
                  mends)
