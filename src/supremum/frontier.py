"""The frontier in one run: statistics and candidates once, then a finished folder for each number of bits.

    OUT/3.5/                            what `--bits 3.5` alone gives, byte for byte, with its own proof and report
    OUT/frontier.json, frontier.html    all of them beside the prediction and the limit

Points are finished one after another in OUT.work/frontier/, so a killed run goes on with the next; OUT takes their place
when the last one is done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .allocate import Budget
from .errors import BudgetError, StateError
from .job import Job, Layout, bit_range, check, lay_out, open_job
from .output import check_replaced, finished
from .pipeline import finish, statistics
from .plain import plain
from .progress import branch_timings, keep_timings, note, peaks, phase, timings
from .report import Document
from .report.frontier import Frontier, assemble_frontier, folder_of, read_frontier, write_frontier
from .workspace import Workspace, discard_left, move_into_place, work_folder

BITS = (2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)


@dataclass(frozen=True)
class FrontierResult:
    """A finished run: its folder, and frontier.json as a dictionary."""

    folder: Path
    frontier: Frontier


def optimize_frontier(model: str | Path, bits: Sequence[float] | None = None, *, target: str = "gguf",
                      text: list[str] | None = None, tokens: int | None = None, out: str | Path = "supremum-out",
                      keep: list[str] | None = None, only: list[str] | None = None, quick: bool = False,
                      fresh: bool = False, seed: int = 0, dtype: str = "auto") -> FrontierResult:
    """Compress `model` to each of `bits` a weight, every one a file that can be kept. The rest as for `optimize`.

    bits None: BITS, as far as the target reaches; a number that is named and cannot be had is refused.
    """
    folder = Path(out)
    job = open_job(model, folder, target=target, text=text, tokens=tokens, keep=keep, only=only, seed=seed, dtype=dtype,
                   quick=quick)
    asked = sorted(set(BITS if bits is None else bits))
    budgets = {value: Budget(bits=value) for value in asked}
    if not fresh and (done := _finished(folder, job, asked)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return FrontierResult(folder, done)
    if not fresh:
        check_replaced(folder, job.inputs)
    with phase("check what is needed"):
        layout = lay_out(job)
        skipped = _out_of_reach(job, layout, asked)
        if skipped and (bits is not None or len(skipped) == len(asked)):
            remedy = "Choose another --target." if bits is None else "Leave this point out, or choose another --target."
            raise BudgetError(skipped[0][1], remedy + job.narrowed)
        for value, why in skipped:
            del budgets[value]
            note(f"{folder_of(value)} bits is left out: {why}")
        layout = layout.offering(job, list(budgets.values()))
        check(job, layout, list(budgets.values()), folder)
    workspace = Workspace(work_folder(folder), job.inputs, fresh=fresh)
    keep_timings(workspace.path("timings.json"))
    try:
        documents = _points(job, layout, workspace, budgets, folder)
        staging = workspace.folder / "frontier"
        for path in staging.iterdir():
            if path.name not in map(folder_of, budgets):  # of a list that was asked for earlier
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        frontier = assemble_frontier(documents, skipped, asked=asked, command=job.command(
            {"frontier": True if bits is None else ",".join(map(folder_of, asked))}, folder))
        write_frontier(frontier, staging)
        move_into_place(staging, folder)
        workspace.discard()
        return FrontierResult(folder, frontier)
    finally:
        workspace.close()


def _points(job: Job, layout: Layout, workspace: Workspace, budgets: dict[float, Budget], folder: Path,
            ) -> list[tuple[float, Document]]:
    """Every budget's document; its files in the workspace's `frontier` folder."""
    documents: dict[float, Document] = {}
    for bits, budget in budgets.items():
        if done := finished(workspace.folder / "frontier" / folder_of(bits), job.inputs, budget):
            documents[bits] = done
    missing = [bits for bits in budgets if bits not in documents]
    found = statistics(job, layout, workspace, list(budgets.values())) if missing else None
    shared = dict(timings), dict(peaks)
    for bits in missing:
        assert found is not None
        note(f"point {1 + list(budgets).index(bits)} of {len(budgets)}: {folder_of(bits)} bits a weight")
        branch_timings(workspace.path(f"{budgets[bits].name}/timings.json"), shared)
        staging, documents[bits] = finish(found, budgets[bits], folder / folder_of(bits))
        place = workspace.folder / "frontier" / folder_of(bits)
        place.parent.mkdir(exist_ok=True)
        os.replace(staging, place)
        shutil.rmtree(workspace.folder / budgets[bits].name)
    return [(bits, documents[bits]) for bits in budgets]


def _out_of_reach(job: Job, layout: Layout, asked: Sequence[float]) -> list[tuple[float, str]]:
    """(bits, why) of those that the target cannot hold, or that gain nothing."""
    least, most = bit_range(job, layout, layout.widest)
    few = f"the least to be had as {job.kind.name} is {least:.3f} bits a weight."
    many = f"the original, or all that the target makes use of, has {most:.3f} bits a weight."
    return [(bits, few if bits < least else many) for bits in asked if not least <= bits <= most]


def _finished(folder: Path, job: Job, asked: Sequence[float]) -> Frontier | None:
    """The frontier of an earlier run with the same inputs and points, if it stands there. Raises StateError if a point's
    model is no longer whole."""
    try:
        found = read_frontier(folder)
    except StateError:
        return None
    state: dict[str, object] = dict(found["inputs"])
    if found["asked"] != list(asked) or state.get("state") != plain(job.inputs):
        return None
    bits = {folder_of(value): value for value in asked}
    for row in found["points"]:
        point = folder / row["folder"]
        if not finished(point, job.inputs, Budget(bits=bits[row["folder"]])):
            raise StateError(f"{point}: is no longer the result that was written.", "--fresh makes it again.")
    discard_left(work_folder(folder), job.inputs)
    return found
