"""What was asked for, how the model is taken apart for it, and whether it can be had at all: before any work is done."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .allocate import Budget, Option, Unit
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.targets import Target, target_for
from .codecs.activations import rounder
from .costs import check_runtime
from .errors import BudgetError, SupremumError
from .gather import HELD_OUT_TOKENS, TOKENS, compute_dtype, window_length
from .output import check_output
from .planning import Menu, block_rate, meets, menu_of, only_plan, plan_of, smallest, units_of
from .preflight import preflight
from .progress import forget_timings
from .stats.streaming import BlockStream, orientation
from .text.generate import check_writes
from .text.pairs import reads_pairs
from .text.sources import state_of
from .text.windows import check_budget


@dataclass(frozen=True)
class Job:
    """What was asked for, but for the budget."""

    model: str
    checkpoint: Checkpoint
    kind: Target
    text: list[str]
    seed: int
    options: dict[str, Any]  # target, tokens, keep, only, dtype, and quick where it is
    inputs: dict[str, Any]  # what makes two runs the same
    data: Path | None = None  # the folder of a tuned model's rows, where it is not the one that it was tuned on

    @property
    def narrowed(self) -> str:
        """The end of a remedy, where options of the user's left less to choose from."""
        found = " and ".join(f"--{name}" for name in ("only", "keep") if self.options[name])
        return f" Or leave out {found}." if found else ""

    @property
    def quick(self) -> bool:
        """Whether every matrix is solved once, for the original's inputs, and nothing is trained."""
        return bool(self.options.get("quick"))

    def command(self, budget: Mapping[str, Any], folder: Path) -> str:
        """The command line that repeats it. budget: values by flag; True for a flag by itself."""
        words = ["supremum", "optimize", self.model]
        for flag, value in (*budget.items(), ("tokens", self.options["tokens"])):
            if value is not None:
                words += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
        for name, values in (("--text", self.text), ("--keep", self.options["keep"]), ("--only", self.options["only"])):
            for value in values:
                words += [name, value]
        if self.options["dtype"] != "auto":
            words += ["--dtype", self.options["dtype"]]
        if self.quick:
            words.append("--quick")
        return shlex.join([*words, "--target", self.options["target"], "--seed", str(self.seed), "--out", str(folder)])


def open_job(model: str | Path, folder: Path, *, target: str, text: list[str] | None, tokens: int | None,
             keep: list[str] | None, only: list[str] | None, seed: int, dtype: str, quick: bool = False,
             data: Path | None = None) -> Job:
    """The arguments of `optimize`, looked at; a new run begins."""
    checkpoint, kind, sources = open_checkpoint(model), target_for("optimize", target), text or []
    check_output(folder, checkpoint)
    if reads_pairs(checkpoint):
        from .train.pairs import state_of_pairs

        given = state_of_pairs(checkpoint, sources, data)
    else:
        check_budget(tokens or TOKENS, window_length(checkpoint))
        if not sources:
            check_writes(checkpoint)
        given = [state_of(source) for source in sources]
    forget_timings()
    options: dict[str, Any] = {"target": target, "tokens": tokens, "keep": sorted(keep or []), "only": sorted(only or []),
                               "dtype": dtype} | ({"quick": True} if quick else {})
    inputs = {"supremum": __version__, "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(),
              "model": checkpoint.fingerprint, "text": given, "seed": seed, "options": options}
    if any(map(rounder, options["only"])):
        inputs["smoothing"] = True  # the state of a version that did not smooth is not gone on with
    if target == "archive":
        from .checkpoint.archive import VERSION

        inputs["archive"] = VERSION  # nor integers of another trellis
    return Job(str(model), checkpoint, kind, sources, seed, options, inputs, data)


@dataclass(frozen=True)
class Layout:
    """The model as the run takes it apart."""

    stream: BlockStream
    shapes: dict[str, tuple[int, int]]  # (O, I) of every matrix
    menu: Menu
    widest: Menu  # with the target's least codecs
    turned: dict[str, bool]  # whether the checkpoint stores the transpose

    def offering(self, job: Job, budgets: Sequence[Budget]) -> Layout:
        """With the widest menu, where the size or the bits of one of the budgets cannot be had without."""
        if self.menu == self.widest:
            return self
        units = self.units(job, self.menu)
        enough = all(meets(budget, units, job.checkpoint, job.kind) for budget in budgets)
        return self if enough else replace(self, menu=self.widest)

    def units(self, job: Job, menu: Menu) -> list[Unit]:
        """Unpriced."""
        return units_of(job.checkpoint, job.kind, menu, self.shapes, self.stream.tables())


def lay_out(job: Job, budgets: Sequence[Budget] = ()) -> Layout:
    """What each tensor may become, and the shapes. `budgets`: `Layout.offering`."""
    stream = BlockStream(job.checkpoint, dtype=compute_dtype(job.options["dtype"]))
    oriented = orientation(stream)
    shapes = {name: shape for name, (shape, _) in oriented.items()}
    for part in job.options["keep"]:
        if not any(part in name for name in (*shapes, *job.checkpoint.tensors)):
            raise SupremumError(f"--keep {part}: no tensor of {job.model} has this in its name.",
                                f"Its tables are {' and '.join(stream.tables())}; a layer is {next(iter(shapes))}.")
    usual, widest = (menu_of(job.kind, job.checkpoint, shapes, job.options["keep"], job.options["only"], least=least)
                     for least in (False, True))
    layout = Layout(stream, shapes, usual, widest, {name: turned for name, (_, turned) in oriented.items()})
    return layout.offering(job, budgets)


def bit_range(job: Job, layout: Layout, menu: Menu) -> tuple[float, float]:
    """Bits a weight of the blocks: the least that `menu` can hold, and the most that say more than fewer do."""
    inner = {name: shape for name, shape in layout.shapes.items() if name not in layout.stream.tables()}
    stored = 8 * sum(job.checkpoint.tensors[name].nbytes for name in inner) / max(1, sum(o * i for o, i in inner.values()))
    most = math.nextafter(stored, 0)  # the original's bits are no compression
    if not job.kind.allocates:
        from .fill import LEAST_BITS, MOST_BITS

        return LEAST_BITS, min(most, MOST_BITS)
    units = layout.units(job, menu)
    return block_rate(units, smallest(units))[1], most


def plan_alone(job: Job, units: Sequence[Unit], budgets: Sequence[Budget]) -> list[Option] | None:
    """The options of `units` where a single budget leaves one plan; None where there is a choice, or nothing to choose."""
    return only_plan(budgets[0], units, job.checkpoint, job.kind) if len(budgets) == 1 and units else None


def check(job: Job, layout: Layout, budgets: Sequence[Budget], folder: Path) -> None:
    """Refuse now what could not end well."""
    stream, menu = layout.stream, layout.menu
    for budget in budgets:
        check_runtime(budget, job.kind)
    try:
        if not job.kind.allocates and any(menu.codecs.values()):
            from .fill import check_size

            coded = {name: layout.shapes[name] for name, names in menu.codecs.items() if names}
            for budget in budgets:
                check_size(budget, job.checkpoint, job.kind, coded)  # type: ignore[arg-type]
        units = layout.units(job, menu) if job.kind.allocates and any(menu.codecs.values()) else []
        if options := plan_alone(job, units, budgets):
            plan = plan_of(units, options)
            if not plan:
                raise BudgetError("the smallest that can be had is the original itself.", "Ask for fewer bits or bytes.")
            menu = menu.only(plan)
        preflight(job.checkpoint, job.kind, budgets, folder, menu, layout.shapes, stream.tables(),
                  tokens=(job.options["tokens"] or TOKENS) + HELD_OUT_TOKENS, blocks=len(stream.blocks),
                  item=stream.dtype.itemsize)
    except BudgetError as error:
        raise BudgetError(error.cause, error.remedy + job.narrowed) from None
