"""What a plan costs when it runs: seconds of a decode step and resident bytes, measured in the target's own runtime here.

With t(c, k) and m(c, k) of the model whose matrices of kind k (the blocks', or the tables') are all in format c where they
can be, the rest as in the original, and w(c, k) the weights that this changes,

    seconds(plan) = t(original) + sum_u w_u (t(c_u, k_u) - t(original)) / w(c_u, k_u)          bytes alike, with m

A step multiplies every matrix with one vector, so within a kind the seconds of a format go with the weights; what does not
depend on formats (attention, norms, sampling, the cache) is in t(original). A matrix's values do not change its time: the
files that are timed repeat a few rounded rows. Bytes are the process's resident set after decoding CONTEXT tokens' worth
of cache was allocated, less what it was before loading: mapped files count, and so does what the runtime makes of them
(llama.cpp keeps some types a second time, repacked for the processor). Of several timings the best is taken, since another
process's work only ever makes a step longer. The sum is only the prediction: a plan is settled by measuring its file.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import codecs
from .allocate import Allowance, Budget, Option, Unit
from .checkpoint import Checkpoint
from .checkpoint.targets import LazyCoded, Target
from .codecs import Coded
from .errors import BudgetError
from .limits.topology import usable_cores
from .planning import Menu, plan_of
from .progress import note, track
from .runtime import capabilities
from .runtime.verify import probe
from .sizes import figure, format_size
from .solve.cancellation import nearest
from .stats.streaming import read_weight
from .text.windows import fitting_length
from .workspace import Workspace

CONTEXT = 1024  # tokens that the cache holds, or as many as the model was made for
PROMPT, NEW, ROUNDS = 8, 12, 12  # tokens read and written in a round; rounds of which the best counts, fewer if slow
ROWS = 16  # of a matrix that are rounded, to be repeated
ATTEMPTS = 5
STRICTER = 1.1  # times what a plan was over its budget: taken off the next one's
NEAR = 1.02  # of the wished step: what timing cannot tell from it


@dataclass(frozen=True)
class Step:
    """One file in the runtime."""

    seconds: float  # of a decode step, batch of one
    resident: int  # bytes


@dataclass(frozen=True)
class Rate:
    """What a weight in one format takes beyond what it takes as it is; below zero: less."""

    seconds: float
    resident: float


@dataclass(frozen=True)
class Costs:
    """The measurements of one model on this machine."""

    original: Step
    runtime: str
    context: int
    rates: Mapping[tuple[bool, str], Rate]  # by (whether in a table, codec)
    tables: Collection[str]
    head: str | None
    step: Callable[[Mapping[str, str], str], Step]  # measures a plan; the word names it in the workspace

    def of(self, name: str, codec: str, weights: int) -> tuple[float, int]:
        """(seconds, resident bytes) that `name` in this format takes beyond its original. A table of which only a row a
        token is read takes no time."""
        rate = self.rates[name in self.tables, codec]
        read = name not in self.tables or name == self.head
        return rate.seconds * weights if read else 0.0, round(rate.resident * weights)

    def wished(self, budget: Budget) -> Step:
        """The budget as a step that a plan must not exceed."""
        return Step(budget.step_seconds(self.original.seconds) or math.inf, budget.memory or 1 << 62)

    def allowance(self, budget: Budget) -> Allowance:
        """The budget as what a plan may take beyond the original."""
        wished = self.wished(budget)
        return Allowance(wished.seconds - self.original.seconds if budget.speed else None,
                         wished.resident - self.original.resident if budget.memory else None)

    def check(self, budget: Budget, units: Sequence[Unit]) -> None:
        """Raises BudgetError, naming the best there is, if no plan could be so small or so fast."""
        wished, title = self.wished(budget), capabilities(self.runtime).title
        least = self.original.resident + sum(min(option.resident for option in unit.options) for unit in units)
        if wished.resident < least:
            raise BudgetError(f"{format_size(wished.resident)} of memory is too little: {title} takes at least "
                              f"{format_size(least)} for this model with a cache of {self.context} tokens, as measured here.",
                              f"Ask for --memory {least} or more.")
        fastest = self.original.seconds + sum(min(option.seconds for option in unit.options) for unit in units)
        if wished.seconds * NEAR < fastest:
            raise BudgetError(f"--speed {budget.speed} is out of reach: {title} on this machine would give about "
                              f"{1 / fastest:.0f} tokens/s at most, {self.original.seconds / fastest:.2f} times the "
                              f"original's {1 / self.original.seconds:.0f}.",
                              f"Ask for --speed {math.floor(100 * self.original.seconds / fastest) / 100}x or less.")

    def settle(self, budget: Budget, units: Sequence[Unit], spend: Callable[..., list[Option]], folder: str,
               ) -> list[Option]:
        """The options that `spend` makes of an allowance, measured, and chosen again with a stricter one until they hold.

        Raises BudgetError when they do not.
        """
        wished, allowed = self.wished(budget), self.allowance(budget)
        for attempt in range(ATTEMPTS):
            chosen = spend(allowance=allowed)
            found = self.step(plan_of(units, chosen), f"{folder}/step{attempt}")
            slower, larger = found.seconds - NEAR * wished.seconds, found.resident - wished.resident
            if slower <= 0 and larger <= 0:
                return chosen
            note(f"the plan takes {1000 * found.seconds:.2f} ms a step and {format_size(found.resident)}; planning again")
            allowed = Allowance(
                None if allowed.seconds is None else allowed.seconds - STRICTER * max(0.0, slower),
                None if allowed.resident is None else allowed.resident - math.ceil(STRICTER * max(0, larger)))
        raise BudgetError(f"{ATTEMPTS} plans missed the budget; the last took {1000 * found.seconds:.2f} ms a step and "
                          f"{format_size(found.resident)}.", "Allow more memory or less speed.")


def check_runtime(budget: Budget, target: Target) -> None:
    """Raises BudgetError for a runtime in which no plan takes less memory or time than another, or that is not timed here."""
    if not (budget.memory or budget.speed):
        return
    engine = capabilities(target.runtime)
    if engine.compressed and not engine.budgets:
        raise BudgetError(f"--memory and --speed are measured in llama.cpp; {engine.title} runs the {target.name} target.",
                          "Use --target gguf, or give --size or --bits.")
    if not engine.compressed:
        raise BudgetError(f"stock {engine.title} decodes the weights of the {target.name} target to floats as it loads them: "
                          "there no plan takes less memory or a shorter step than the original.",
                          "Use --target gguf, or give --size or --bits.")


def measure_costs(checkpoint: Checkpoint, target: Target, menu: Menu, shapes: Mapping[str, tuple[int, int]],
                  embedding: str, head: str | None, turned: Mapping[str, bool], workspace: Workspace) -> Costs:
    """Time every format of the menu; kept in the workspace, so that a run that resumes plans with the same figures.

    head: the table whose every row is multiplied. turned: whether a matrix is stored as its transpose.
    """
    tables = {embedding} if head is None else {embedding, head}

    def weight(name: str) -> torch.Tensor:
        return read_weight(checkpoint, name, turned[name])

    context = fitting_length(checkpoint, CONTEXT)

    def step(plan: Mapping[str, str], name: str) -> Step:
        return Step(**workspace.json(f"{name}.json", partial(_measure, checkpoint, target, plan, weight, workspace,
                                                             context)))

    original = step({}, "costs/original")
    cases = [(inside, codec) for inside in (False, True) for codec in dict.fromkeys(
        codec for name, names in menu.codecs.items() if (name in tables) is inside for codec in names)]
    rates = {}
    for inside, codec in track(cases, "time the formats"):
        plan = {name: codec for name, names in menu.codecs.items() if (name in tables) is inside and codec in names}
        found = step(plan, f"costs/{'tables' if inside else 'blocks'}-{codec}")
        stored = sum(math.prod(shapes[name]) for name in plan)
        read = sum(math.prod(shapes[name]) for name in plan if not inside or name == head)
        rates[inside, codec] = Rate((found.seconds - original.seconds) / max(read, 1),
                                    (found.resident - original.resident) / stored)
    return Costs(original, target.runtime, context, rates, tables, head, step)


def measure_file(path: Any, target: Target, context: int, tokens: list[int]) -> Step:
    """The best decode step of several, and what loading and running the file added to a fresh process."""
    _, _, facts = probe({
        "runtime": target.runtime, "path": str(path), "threads": usable_cores(), "context": context, "texts": [],
        "prompts": [], "lengths": [], "count": 0, "speed": [tokens, min(NEW, context // 4)], "rounds": ROUNDS}, 1800)
    return Step(1 / facts["decode"], facts["memory"])


def prompt(checkpoint: Checkpoint) -> list[int]:
    """Tokens to start from; which ones does not matter for the time."""
    size = checkpoint.config.get_text_config().vocab_size
    return [(7 * i + 5) % size for i in range(PROMPT)]


def _measure(checkpoint: Checkpoint, target: Target, plan: Mapping[str, str],
             weight: Callable[[str], torch.Tensor], workspace: Workspace, context: int) -> dict[str, Any]:
    folder = workspace.path("costs/file")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        path = target.write(checkpoint, LazyCoded(plan, lambda name: _filler(weight(name), plan[name])), folder)
        return asdict(measure_file(path, target, context, prompt(checkpoint)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _filler(weight_OI: torch.Tensor, codec: str) -> Coded:
    """A matrix of this shape and format with its first rows over and over."""
    few = nearest(weight_OI[:ROWS], codecs.get(codec))
    times = math.ceil(len(weight_OI) / len(weight_OI[:ROWS]))
    tensors = {key: torch.cat([value.reshape(few.shape[0], -1)] * times)[:len(weight_OI)].contiguous()
               for key, value in few.tensors.items()}
    return Coded(few.codec, tensors, (len(weight_OI), weight_OI.shape[1]))


def compare(checkpoint: Checkpoint, target: Target, costs: Costs, budget: Budget, written: Path, workspace: Workspace,
            ) -> list[dict[str, Any]]:
    """The written file beside the original, each measured twice in turn: what was asked for and what is reached."""
    folder = workspace.path("costs/file")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        files = [target.write(checkpoint, {}, folder), written]
        rounds = [[measure_file(path, target, costs.context, prompt(checkpoint)) for path in files] for _ in range(2)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    before, now = (Step(min(step.seconds for step in steps), max(step.resident for step in steps))
                   for steps in zip(*rounds, strict=True))
    return reached_lines(budget, costs, before, now)


def reached_lines(asked: Budget, costs: Costs, before: Step, now: Step) -> list[dict[str, Any]]:
    """What was asked for and what is reached, in the words of the report (`report.document.Running`)."""
    lines: list[dict[str, Any]] = []
    if asked.memory:
        lines.append({"name": "memory", "asked": format_size(asked.memory), "reached": format_size(now.resident),
                      "original": format_size(before.resident), "held": now.resident <= asked.memory,
                      "note": f"resident, with a cache of {costs.context} tokens"})
    if asked.speed:
        wished = asked.step_seconds(before.seconds) or math.inf
        lines.append({"name": "speed", "asked": asked.speed if asked.speed.endswith("x") else f"{asked.speed} tokens/s",
                      "reached": f"{figure(1 / now.seconds)} tokens/s", "original": f"{figure(1 / before.seconds)} tokens/s",
                      "held": now.seconds <= NEAR * wished,
                      "note": f"{before.seconds / now.seconds:.2f} times the original's, the best of several timings"})
    return lines
