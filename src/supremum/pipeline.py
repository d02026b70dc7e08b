"""The main job: a model and a budget in, a smaller model in a standard format out, with the limit and the proof.

    open -> gather (text, moments, candidates, Fisher) -> price -> plan -> verify and refit -> solve -> write -> prove

An archive has no formats to choose among: from the Fisher it goes to one water level for all layers (fill.py).
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .allocate import Budget
from .checkpoint import open_checkpoint
from .checkpoint.targets import Target
from .checkpoint.targets import target as target_named
from .gap import FileGap, gap_of
from .gather import (
    HELD_OUT_TOKENS,
    TOKENS,
    Gathered,
    compute_dtype,
    gather,
    gather_fisher,
    solve_candidates,
    window_length,
    work_folder,
)
from .limits import Limits, limits
from .measure.streamed import final_hidden
from .output import (
    check_output,
    check_replaced,
    convert,
    finished,
    move_into_place,
    rehearse,
    show_samples,
    store_without_loss,
    write,
)
from .planning import Menu, Reached, menu_of, prices, units_of
from .preflight import preflight
from .progress import forget_timings, keep_timings, note, phase
from .reach import reach, verify_frontier
from .report import Document, write_report
from .report.assemble import assemble
from .runtime.verify import verify
from .stats.streaming import BlockStream, orientation
from .text.generate import check_writes
from .text.sources import files_of
from .text.windows import check_budget
from .workspace import Workspace


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, and supremum.json as a dictionary."""

    folder: Path
    document: Document


def optimize(model: str | Path, budget: Budget, *, target: str = "gguf", text: list[str] | None = None,
             tokens: int | None = None, out: str | Path = "supremum-out", keep: list[str] | None = None,
             only: list[str] | None = None, fresh: bool = False, seed: int = 0, dtype: str = "auto") -> Result:
    """Compress `model` to `budget` and prove it. Raises SupremumError for what the user can mend.

    target: "gguf", "compressed-tensors" or "archive". text: calibration and held-out sources; None: the model writes its own.
    keep: parts of tensor names that stay as they are. only: codec names to choose from instead of the target's menu.
    fresh: discard what an interrupted run left. dtype: of the forward passes, "auto", "float32" or "bfloat16".
    """
    checkpoint = open_checkpoint(model)
    kind = target_named(target)
    folder = Path(out)
    check_output(folder, checkpoint)
    check_budget(tokens or TOKENS, window_length(checkpoint))
    if not text:
        check_writes(checkpoint)
    forget_timings()
    options: dict[str, Any] = {"target": target, "tokens": tokens, "keep": sorted(keep or []), "only": sorted(only or []),
                               "dtype": dtype}
    inputs = {"supremum": __version__, "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(),
              "model": checkpoint.fingerprint, "text": [_text_state(source) for source in text or []], "seed": seed,
              "options": options}
    if not fresh and (done := finished(folder, inputs, budget)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return Result(folder, done)
    if not fresh:
        check_replaced(folder, inputs)
    with phase("check what is needed"):
        stream = BlockStream(checkpoint, dtype=compute_dtype(dtype))
        shapes = {name: shape for name, (shape, _) in orientation(stream).items()}
        menu = menu_of(kind, checkpoint, shapes, options["keep"], options["only"])
        preflight(checkpoint, kind, budget, folder, menu, shapes, stream.tables(),
                  tokens=(tokens or TOKENS) + HELD_OUT_TOKENS, blocks=len(stream.blocks), item=stream.dtype.itemsize)
    workspace = Workspace(work_folder(folder), inputs, fresh=fresh)
    keep_timings(workspace.path("timings.json"))
    try:
        rehearse(checkpoint, kind, menu, workspace)
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        reached = (_archive if kind.name == "archive" else _allocated)(gathered, kind, budget, menu, shapes, seed)
        written = write(checkpoint, kind, reached.coded, workspace.folder / budget.name / "output", reached.size)
        with phase("prove in the stock runtime"):
            proof = workspace.json(f"{budget.name}/proof.json", lambda: verify(written, kind).asdict())
        bounds = limits(checkpoint, reached.spectra, reached=reached.point())
        samples = show_samples(checkpoint, written)
        document = assemble(gathered, kind, budget, reached, proof=proof, bounds=bounds, written=written, samples=samples,
                            inputs=inputs, command=_command(model, folder, budget, options, text or [], seed))
        staging = written if written.is_dir() else written.parent
        write_report(document, staging)
        move_into_place(staging, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


def _allocated(gathered: Gathered, kind: Target, budget: Budget, menu: Menu, shapes: Mapping[str, tuple[int, int]],
               seed: int) -> Reached:
    """A format for every layer: candidates, prices, a plan that is measured and refitted, the final solve."""
    candidates = solve_candidates(gathered, menu.codecs)
    gather_fisher(gathered, candidates, seed)
    units = units_of(gathered.checkpoint, kind, menu, shapes, gathered.stream.tables(), prices(gathered))
    reference = _reference(gathered)
    points = verify_frontier(gathered, units, candidates, reference, budget, kind)
    chosen, coded, measured = reach(gathered, units, candidates, reference, budget, kind, points)
    size = kind.size(gathered.checkpoint, coded.plan)
    return Reached(units, chosen, coded, measured, points, list(gathered.spectra()), size)


def _archive(gathered: Gathered, kind: Any, budget: Budget, menu: Menu, shapes: Mapping[str, tuple[int, int]],
             seed: int) -> Reached:
    """Entropy-coded integers: one water level for all layers."""
    from .fill import fill

    gather_fisher(gathered, None, seed)
    return fill(gathered, budget, kind, list(gathered.spectra()), _reference(gathered),
                [name for name, names in menu.codecs.items() if names])


def _reference(gathered: Gathered) -> Tensor:
    """The original's last hidden states on the held-out windows."""
    return gathered.workspace.tensors("reference.safetensors",
                                      lambda: {"h": final_hidden(gathered.stream, gathered.held_out)})["h"]


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


def _text_state(source: str) -> list[Any]:
    """What tells whether the text changed: the path, the size and the time of each file that is read."""
    states = [(path, path.stat()) for path in files_of(source)]
    return [source, *([str(path), state.st_size, state.st_mtime_ns] for path, state in states)]


def _command(model: str | Path, folder: Path, budget: Budget, options: dict[str, Any], text: list[str], seed: int) -> str:
    words = ["supremum", "optimize", str(model)]
    for flag, value in (asdict(budget) | {"tokens": options["tokens"]}).items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    for name, values in (("--text", text), ("--keep", options["keep"]), ("--only", options["only"])):
        for value in values:
            words += [name, value]
    if options["dtype"] != "auto":
        words += ["--dtype", options["dtype"]]
    words += ["--target", options["target"], "--seed", str(seed), "--out", str(folder)]
    return shlex.join(words)


__all__ = ["Budget", "Result", "convert", "measure_gap", "measure_limits", "optimize", "store_without_loss"]
