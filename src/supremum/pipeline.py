"""The main job: a model and a budget in, a smaller model in a standard format out, with the limit and the proof.

    job, layout     what is asked, and whether it can be had at all
    statistics      text, moments, Fisher; every layer in every format and its price; what formats take when they run
    made            a plan in the budget, better formats by true KL (swaps), the final solve, trained gains; the files
    finish          the proof in the stock runtime, the limits, the report

A plan is the best by its prices; the true KL of a few tells how far prices are off, which a budget of KL and the report need.
An archive has no formats to choose among: from the Fisher it goes to one water level for all layers (fill.py). Where the
budget leaves one plan, nothing is priced. Of a quick job the candidates are the result: nothing is solved again or trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .allocate import Budget, Option, Unit
from .checkpoint import open_checkpoint
from .codecs.activations import rounder
from .costs import Costs, compare, measure_costs
from .gap import FileGap, gap_of
from .gather import (
    HELD_OUT_TOKENS,
    TOKENS,
    Gathered,
    fit_leftovers,
    gather,
    gather_fisher,
    solve_candidates,
    windows_of,
)
from .job import Job, Layout, check, lay_out, open_job, plan_alone
from .limits import LayerSpectrum, Limits, Machine, limits
from .limits import measure as measure_machine
from .measure.streamed import final_hidden
from .output import (
    check_replaced,
    convert,
    finished,
    rehearse,
    show_samples,
    store_without_loss,
    write,
)
from .planning import Menu, Reached, offered, plan_of, smallest, units_of
from .prices import damages, prices
from .progress import keep_timings, note, phase
from .reach import reach, solve_and_train, verify_frontier
from .report import Document, write_report
from .report.assemble import assemble
from .runtime.verify import verify
from .solve.candidates import Candidates
from .solve.smoothing import smoothed
from .text.pairs import bare
from .workspace import Workspace, move_into_place, work_folder

PROVED = 6  # held-out pairs that the proof of an encoder-decoder is on


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and supremum.json as a dictionary."""

    folder: Path
    document: Document


def optimize(model: str | Path, budget: Budget, *, target: str = "gguf", text: list[str] | None = None,
             tokens: int | None = None, out: str | Path = "supremum-out", keep: list[str] | None = None,
             only: list[str] | None = None, quick: bool = False, fresh: bool = False, seed: int = 0, dtype: str = "auto",
             ) -> Result:
    """Compress `model` to `budget` and prove it. Raises SupremumError for what the user can mend.

    target: "gguf", "compressed-tensors", "gptq" or "archive". text: calibration and held-out sources; None: the model writes
    its own.
    keep: parts of tensor names that stay as they are. only: codec names to choose from instead of the target's menu.
    quick: every matrix is solved once, for the original's inputs, and nothing is trained: less time, more damage.
    fresh: discard what an interrupted run left. dtype: of the forward passes, "auto", "float32" or "bfloat16".
    """
    folder = Path(out)
    job = open_job(model, folder, target=target, text=text, tokens=tokens, keep=keep, only=only, seed=seed, dtype=dtype,
                   quick=quick)
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
        staging, document = finish(statistics(job, layout, workspace, [budget]), budget, folder)
        move_into_place(staging, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


@dataclass
class Statistics:
    """What every budget starts from."""

    job: Job
    gathered: Gathered
    menu: Menu
    units: list[Unit]  # none for an archive, which has no formats to choose among
    candidates: Candidates | None  # none for an archive, nor for the only plan of a job that is not quick
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


def statistics(job: Job, layout: Layout, workspace: Workspace, budgets: Sequence[Budget] = ()) -> Statistics:
    """Text, moments, Fisher; candidates and their prices (not for an archive; where a single budget leaves one plan, no
    prices, and candidates for a quick job alone); what a single budget of memory or speed needs, too."""
    menu, tables = layout.menu, layout.stream.tables()
    rehearse(job.checkpoint, job.kind, menu, layout.turned, workspace)
    costs = None
    if len(budgets) == 1 and (budgets[0].memory or budgets[0].speed):
        costs = measure_costs(job.checkpoint, job.kind, menu, layout.shapes, *layout.stream.table_names(), layout.turned,
                              workspace)
        costs.check(budgets[0], units_of(job.checkpoint, job.kind, menu, layout.shapes, tables, costs=costs))
    job, smoothing = _smooth(job, layout, workspace)
    gathered = gather(job.checkpoint, workspace, text=job.text, tokens=job.options["tokens"], seed=job.seed,
                      dtype=job.options["dtype"], data=job.data)
    units = layout.units(job, menu) if job.kind.allocates else []
    plan = plan_alone(job, units, budgets)
    gather_fisher(gathered, job.seed)
    candidates, solved = None, dict[str, list[str]]()
    if units and not plan:
        solved = menu.codecs
    elif plan and job.quick:
        solved = menu.only(plan_of(units, plan)).codecs
    fit_leftovers(workspace, solved)
    if solved:
        candidates = solve_candidates(gathered, solved)
    if candidates and not plan:
        units = units_of(job.checkpoint, job.kind, menu, layout.shapes, tables, prices(gathered, candidates), costs)
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
    there is nothing to choose, the final solve alone (of a quick job not even that)."""
    gathered, kind = found.gathered, found.job.kind
    if found.plan is not None:
        plan = plan_of(found.units, found.plan)
        trained = solve_and_train(gathered, plan, found.candidates, found.reference, f"{budget.name}/solved0",
                                  quick=found.job.quick)
        menu = found.menu.only(plan)
        nats = damages(gathered, menu.codecs, lambda name, codec: trained.coded[name].decode(), f"{budget.name}/damages")
        units = units_of(gathered.checkpoint, kind, menu, gathered.shapes, gathered.stream.tables(), nats)
        chosen = smallest(units)
        size = kind.size(gathered.checkpoint, plan)
        return Reached(units, chosen, trained, [], found.spectra, size, priced=False)
    if not kind.allocates:
        from .fill import fill

        return fill(gathered, budget, kind, found.spectra, found.reference,  # type: ignore[arg-type]
                    [name for name, names in found.menu.codecs.items() if names], quick=found.job.quick)
    assert found.candidates is not None
    units = found.units if found.job.options["only"] else offered(budget, found.units, gathered.checkpoint, kind)
    candidates, reference, costs = found.candidates, found.reference, found.costs
    points = verify_frontier(gathered, units, candidates, reference, budget, kind, costs)
    chosen, trained, swaps = reach(gathered, units, candidates, reference, budget, kind, points, costs, quick=found.job.quick)
    return Reached(units, chosen, trained, points, found.spectra, kind.size(gathered.checkpoint, trained.coded.plan), swaps)


def measure_limits(model: str | Path, *, text: list[str] | None = None, tokens: int | None = None, seed: int = 0,
                   dtype: str = "auto") -> Limits:
    """What is possible with this model on this machine; changes nothing and keeps nothing."""
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, seed)
        return limits(checkpoint, list(gathered.spectra()))


def measure_gap(model: str | Path, reference: str | Path, *, text: list[str] | None = None, tokens: int | None = None,
                seed: int = 0, dtype: str = "auto") -> FileGap:
    """How far a finished file is from the limit of the model it was made from, layer by layer; keeps nothing."""
    file, original = open_checkpoint(model), open_checkpoint(reference)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(original, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, seed)
        return gap_of(gathered, file)


__all__ = ["Budget", "Result", "convert", "measure_gap", "measure_limits", "optimize", "store_without_loss"]
