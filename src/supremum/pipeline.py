"""The main job: a model and a budget in, a smaller model in a standard format out, with the limit and the proof.

    open -> gather (text, moments, candidates, Fisher) -> price -> plan -> verify and refit
         -> solve -> train gains -> write -> prove

An archive has no formats to choose among: from the Fisher it goes to one water level for all layers (fill.py). Where the
budget leaves one plan alone, it goes from the Fisher to the final solve.
"""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .allocate import Budget, Option, Unit
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.targets import Target, target_for
from .codecs.activations import rounder
from .costs import Costs, check_runtime, compare, measure_costs
from .gap import FileGap, gap_of
from .gather import (
    HELD_OUT_TOKENS,
    TOKENS,
    Gathered,
    compute_dtype,
    fit_leftovers,
    gather,
    gather_fisher,
    solve_candidates,
    window_length,
    windows_of,
    work_folder,
)
from .limits import LayerSpectrum, Limits, Machine, limits
from .limits import measure as measure_machine
from .measure.streamed import final_hidden
from .output import (
    check_output,
    check_replaced,
    convert,
    finished,
    rehearse,
    show_samples,
    store_without_loss,
    write,
)
from .planning import Menu, Reached, block_rate, damages, meets, menu_of, offered, only_plan, plan_of, prices, units_of
from .preflight import preflight
from .progress import forget_timings, keep_timings, note, phase
from .reach import reach, solve_and_train, verify_frontier
from .report import Document, write_report
from .report.assemble import assemble
from .runtime.verify import verify
from .solve.candidates import Candidates
from .solve.smoothing import smoothed
from .stats.streaming import BlockStream, orientation
from .text.generate import check_writes
from .text.pairs import bare, reads_pairs
from .text.sources import state_of
from .text.windows import check_budget
from .workspace import Workspace, move_into_place

PROVED = 6  # held-out pairs that the proof of an encoder-decoder is on


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and supremum.json as a dictionary."""

    folder: Path
    document: Document


def optimize(model: str | Path, budget: Budget, *, target: str = "gguf", text: list[str] | None = None,
             tokens: int | None = None, out: str | Path = "supremum-out", keep: list[str] | None = None,
             only: list[str] | None = None, fresh: bool = False, seed: int = 0, dtype: str = "auto") -> Result:
    """Compress `model` to `budget` and prove it. Raises SupremumError for what the user can mend.

    target: "gguf", "compressed-tensors", "gptq" or "archive". text: calibration and held-out sources; None: the model writes
    its own.
    keep: parts of tensor names that stay as they are. only: codec names to choose from instead of the target's menu.
    fresh: discard what an interrupted run left. dtype: of the forward passes, "auto", "float32" or "bfloat16".
    """
    folder = Path(out)
    job = open_job(model, folder, target=target, text=text, tokens=tokens, keep=keep, only=only, seed=seed, dtype=dtype)
    if not fresh and (done := finished(folder, job.inputs, budget)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return Result(folder, done)
    if not fresh:
        check_replaced(folder, job.inputs)
    with phase("check what is needed"):
        layout = lay_out(job, [budget])
        check(job, layout, [budget], folder)
    workspace = Workspace(work_folder(folder), job.inputs, fresh=fresh)
    keep_timings(workspace.path("timings.json"))
    try:
        staging, document = finish(statistics(job, layout, workspace, budget), budget, folder)
        move_into_place(staging, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


@dataclass(frozen=True)
class Job:
    """What was asked for, but for the budget."""

    model: str
    checkpoint: Checkpoint
    kind: Target
    text: list[str]
    seed: int
    options: dict[str, Any]  # target, tokens, keep, only, dtype
    inputs: dict[str, Any]  # what makes two runs the same
    data: Path | None = None  # the folder of a tuned model's rows, where it is not the one that it was tuned on

    def command(self, budget: Mapping[str, Any], folder: Path) -> str:
        """The command line that repeats it. budget: values by flag."""
        words = ["supremum", "optimize", self.model]
        for flag, value in (*budget.items(), ("tokens", self.options["tokens"])):
            if value is not None:
                words += [f"--{flag.replace('_', '-')}", str(value)]
        for name, values in (("--text", self.text), ("--keep", self.options["keep"]), ("--only", self.options["only"])):
            for value in values:
                words += [name, value]
        if self.options["dtype"] != "auto":
            words += ["--dtype", self.options["dtype"]]
        return shlex.join([*words, "--target", self.options["target"], "--seed", str(self.seed), "--out", str(folder)])


def open_job(model: str | Path, folder: Path, *, target: str, text: list[str] | None, tokens: int | None,
             keep: list[str] | None, only: list[str] | None, seed: int, dtype: str, data: Path | None = None) -> Job:
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
                               "dtype": dtype}
    inputs = {"supremum": __version__, "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(),
              "model": checkpoint.fingerprint, "text": given, "seed": seed, "options": options}
    if any(map(rounder, options["only"])):
        inputs["smoothing"] = True
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
        """With the widest menu, where one of the budgets cannot be met without."""
        if self.menu == self.widest:
            return self
        units = self.units(job, self.menu)
        enough = all(meets(budget, units, job.checkpoint, job.kind) for budget in budgets)
        return self if enough else replace(self, menu=self.widest)

    def units(self, job: Job, menu: Menu) -> list[Unit]:
        """Unpriced."""
        return units_of(job.checkpoint, job.kind, menu, self.shapes, self.stream.tables())


def lay_out(job: Job, budgets: Sequence[Budget] = ()) -> Layout:
    """What each tensor may become, and the shapes. The target's least codecs are offered where one of `budgets` cannot be met
    without."""
    stream = BlockStream(job.checkpoint, dtype=compute_dtype(job.options["dtype"]))
    oriented = orientation(stream)
    shapes = {name: shape for name, (shape, _) in oriented.items()}
    usual, widest = (menu_of(job.kind, job.checkpoint, shapes, job.options["keep"], job.options["only"], least=least)
                     for least in (False, True))
    layout = Layout(stream, shapes, usual, widest, {name: turned for name, (_, turned) in oriented.items()})
    return layout.offering(job, budgets)


def bit_range(job: Job, layout: Layout, menu: Menu) -> tuple[float, float]:
    """Bits a weight of the blocks: the least that `menu` can hold, and the most that say more than fewer do."""
    inner = {name: shape for name, shape in layout.shapes.items() if name not in layout.stream.tables()}
    stored = 8 * sum(job.checkpoint.tensors[name].nbytes for name in inner) / max(1, sum(o * i for o, i in inner.values()))
    most = math.nextafter(stored, 0)  # the original's bits are no compression
    if job.kind.name == "archive":
        from .fill import LEAST_BITS, MOST_BITS

        return LEAST_BITS, min(most, MOST_BITS)
    units = layout.units(job, menu)
    return block_rate(units, [min(unit.options, key=lambda option: option.nbytes) for unit in units])[1], most


def check(job: Job, layout: Layout, budgets: Sequence[Budget], folder: Path) -> None:
    """Refuse now what could not end well."""
    stream, menu = layout.stream, layout.menu
    for budget in budgets:
        check_runtime(budget, job.kind)
    if len(budgets) == 1 and job.kind.name != "archive":
        units = layout.units(job, menu)
        if plan := only_plan(budgets[0], units, job.checkpoint, job.kind):
            menu = menu.only(plan_of(units, plan))
    preflight(job.checkpoint, job.kind, budgets, folder, menu, layout.shapes, stream.tables(),
              tokens=(job.options["tokens"] or TOKENS) + HELD_OUT_TOKENS, blocks=len(stream.blocks),
              item=stream.dtype.itemsize)


@dataclass
class Statistics:
    """What every budget starts from."""

    job: Job
    gathered: Gathered
    menu: Menu
    units: list[Unit]  # none for an archive, which has no formats to choose among
    candidates: Candidates | None
    plan: list[Option] | None  # the only one, where the budget leaves no choice
    costs: Costs | None  # where the budget has memory or speed
    reference: Tensor  # the original's last hidden states on the held-out windows
    smoothing: dict[str, Any] | None = None  # what was folded, where a format rounds inputs (solve/smoothing.py)

    @cached_property
    def spectra(self) -> list[LayerSpectrum]:
        return list(self.gathered.spectra())

    @cached_property
    def machine(self) -> Machine:
        with phase("measure the machine"):
            return measure_machine("cuda" if torch.cuda.is_available() else "cpu")


def statistics(job: Job, layout: Layout, workspace: Workspace, budget: Budget | None = None) -> Statistics:
    """Text, moments, candidates and their prices (but for an archive, and where the budget leaves one plan), Fisher; what a
    budget of memory or speed needs, too."""
    menu = layout.menu
    rehearse(job.checkpoint, job.kind, menu, workspace)
    costs = None
    if budget and (budget.memory or budget.speed):
        costs = measure_costs(job.checkpoint, job.kind, menu, layout.shapes, *layout.stream.table_names(), layout.turned,
                              workspace)
        costs.check(budget, units_of(job.checkpoint, job.kind, menu, layout.shapes, layout.stream.tables(), costs=costs))
    job, smoothing = _smooth(job, layout, workspace)
    gathered = gather(job.checkpoint, workspace, text=job.text, tokens=job.options["tokens"], seed=job.seed,
                      dtype=job.options["dtype"], data=job.data)
    archive, tables = job.kind.name == "archive", gathered.stream.tables()
    units = [] if archive else layout.units(job, menu)
    plan = only_plan(budget, units, job.checkpoint, job.kind) if budget and units else None
    fit_leftovers(workspace, {} if archive or plan else menu.codecs)
    candidates = None if archive or plan else solve_candidates(gathered, menu.codecs)
    gather_fisher(gathered, candidates, job.seed)
    if candidates:
        units = units_of(job.checkpoint, job.kind, menu, layout.shapes, tables, prices(gathered), costs)
    reference = workspace.tensors("reference.safetensors",
                                  lambda: {"h": final_hidden(gathered.stream, gathered.held_out)})["h"]
    return Statistics(job, gathered, menu, units, candidates, plan, costs, reference, smoothing)


def _smooth(job: Job, layout: Layout, workspace: Workspace) -> tuple[Job, dict[str, Any] | None]:
    """Where a format rounds inputs: the job with the checkpoint's weights folded so that this hurts less."""
    if not any(rounder(codec) for names in layout.menu.codecs.values() for codec in names):
        return job, None
    windows, _, _ = windows_of(job.checkpoint, workspace, job.text, job.options["tokens"] or TOKENS, HELD_OUT_TOKENS,
                               job.seed, job.data)
    checkpoint, record = smoothed(layout.stream, windows, layout.menu.codecs, workspace)
    return replace(job, checkpoint=checkpoint), record


def made(found: Statistics, budget: Budget) -> tuple[Reached, Path]:
    """A budget's result in a folder of the workspace, and what the runtime opens of it; finished steps are not repeated."""
    reached = _reached(found, budget)
    vectors = reached.trained.vectors
    return reached, write(found.job.checkpoint.changed(lambda name, stored: vectors.get(name, stored)), found.job.kind,
                          reached.trained.coded, found.gathered.workspace.folder / budget.name / "output", reached.size)


def finish(found: Statistics, budget: Budget, folder: Path, *, command: Mapping[str, Any] | None = None,
           floor: Mapping[str, Any] | None = None) -> tuple[Path, Document]:
    """A budget's result, written, proved and reported, in a folder of the workspace. folder: where it will stand. command:
    what was asked for, by flag, where it was not the budget; floor: of a task's metric (floor.py)."""
    job, workspace = found.job, found.gathered.workspace
    reached, written = made(found, budget)
    with phase("prove in the stock runtime"):
        asked = [bare(window_T) for window_T in found.gathered.held_out[:PROVED]] if found.gathered.stream.pairs else None
        proof = workspace.json(f"{budget.name}/proof.json", lambda: verify(written, job.kind, prompts=asked).asdict())
    running = []
    if costs := found.costs:
        with phase("measure beside the original"):
            running = workspace.json(f"{budget.name}/running.json", lambda: compare(
                job.checkpoint, job.kind, costs, budget, written, workspace))
    bounds = limits(job.checkpoint, reached.spectra, machine=found.machine, reached=reached.point())
    samples = show_samples(job.checkpoint, written)
    document = assemble(found.gathered, job.kind, budget, reached, proof=proof, bounds=bounds, written=written,
                        samples=samples, inputs=job.inputs, command=job.command(command or asdict(budget), folder),
                        running=running, smoothing=found.smoothing, floor=floor)
    staging = written if written.is_dir() else written.parent
    write_report(document, staging)
    return staging, document


def _reached(found: Statistics, budget: Budget) -> Reached:
    """A format for every layer: a plan that is measured and refitted, the final solve; an archive: one water level; where
    there is nothing to choose, the final solve alone."""
    gathered, kind = found.gathered, found.job.kind
    if found.plan is not None:
        plan = plan_of(found.units, found.plan)
        trained = solve_and_train(gathered, plan, None, found.reference, f"{budget.name}/solved0")
        units = units_of(gathered.checkpoint, kind, found.menu.only(plan), gathered.shapes, gathered.stream.tables(),
                         damages(gathered, trained.coded, f"{budget.name}/damages.json"))
        chosen = [min(unit.options, key=lambda option: option.nbytes) for unit in units]
        size = kind.size(gathered.checkpoint, plan)
        return Reached(units, chosen, trained, [], found.spectra, size, priced=False)
    if found.candidates is None:
        from .fill import fill

        return fill(gathered, budget, kind, found.spectra, found.reference,  # type: ignore[arg-type]
                    [name for name, names in found.menu.codecs.items() if names])
    units = offered(budget, found.units, gathered.checkpoint, kind)
    candidates, reference, costs = found.candidates, found.reference, found.costs
    points = verify_frontier(gathered, units, candidates, reference, budget, kind, costs)
    chosen, trained, swaps = reach(gathered, units, candidates, reference, budget, kind, points, costs)
    return Reached(units, chosen, trained, points, found.spectra, kind.size(gathered.checkpoint, trained.coded.plan), swaps)


def measure_limits(model: str | Path, *, text: list[str] | None = None, tokens: int | None = None, seed: int = 0,
                   dtype: str = "auto") -> Limits:
    """What is possible with this model on this machine; changes nothing and keeps nothing."""
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, None, seed)
        return limits(checkpoint, list(gathered.spectra()))


def measure_gap(model: str | Path, reference: str | Path, *, text: list[str] | None = None, tokens: int | None = None,
                seed: int = 0, dtype: str = "auto") -> FileGap:
    """How far a finished file is from the limit of the model it was made from, layer by layer; keeps nothing."""
    file, original = open_checkpoint(model), open_checkpoint(reference)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(original, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, None, seed)
        return gap_of(gathered, file)


__all__ = ["Budget", "Result", "convert", "measure_gap", "measure_limits", "optimize", "store_without_loss"]
