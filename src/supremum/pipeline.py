"""The main job: a model and a budget in, a smaller model in a standard format out, with the limit and the proof.

    open -> gather (text, moments, candidates, Fisher) -> price -> plan -> verify and refit -> solve -> write -> prove
"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .allocate import Budget, Option, Unit
from .checkpoint import open_checkpoint
from .checkpoint.targets import target as target_named
from .gather import (
    HELD_OUT_TOKENS,
    TOKENS,
    compute_dtype,
    gather,
    gather_fisher,
    solve_candidates,
    window_length,
    work_folder,
)
from .limits import Limits, limits
from .measure.streamed import final_hidden
from .output import check_output, check_replaced, convert, finished, move_into_place, rehearse, show_samples, write
from .planning import block_rate, menu_of, prices, units_of
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

    target: "gguf" or "compressed-tensors". text: calibration and held-out sources; None: the model writes its own.
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
        candidates = solve_candidates(gathered, menu.codecs)
        gather_fisher(gathered, candidates, seed)
        units = units_of(checkpoint, kind, menu, shapes, gathered.stream.tables(), prices(gathered))
        reference = workspace.tensors("reference.safetensors",
                                      lambda: {"h": final_hidden(gathered.stream, gathered.held_out)})["h"]
        points = verify_frontier(gathered, units, candidates, reference, budget, kind)
        chosen, coded, measured = reach(gathered, units, candidates, reference, budget, kind, points)
        written = write(checkpoint, kind, coded, workspace.folder / budget.name / "output")
        with phase("prove in the stock runtime"):
            proof = workspace.json(f"{budget.name}/proof.json", lambda: verify(written, kind).asdict())
        spectra = list(gathered.spectra())
        bounds = limits(checkpoint, spectra, reached=_reached(units, chosen, measured))
        samples = show_samples(checkpoint, written)
        document = assemble(gathered, kind, budget, units, chosen, points=points, measured=measured, proof=proof,
                            bounds=bounds, spectra=spectra, written=written, samples=samples, inputs=inputs,
                            command=_command(model, folder, budget, options, text or [], seed))
        staging = written if written.is_dir() else written.parent
        write_report(document, staging)
        move_into_place(staging, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


def _reached(units: list[Unit], chosen: list[Option], measured: dict[str, Any]) -> tuple[float, float] | None:
    """(bits a weight, KL) of the result, to be shown beside the limit."""
    weights, bits = block_rate(units, chosen)
    return (bits, measured["kl_mean"]) if weights and measured["kl_mean"] else None


def measure_limits(model: str | Path, *, text: list[str] | None = None, tokens: int | None = None, seed: int = 0,
                   dtype: str = "auto") -> Limits:
    """What is possible with this model on this machine; changes nothing and keeps nothing."""
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, None, seed)
        return limits(checkpoint, list(gathered.spectra()))


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


__all__ = ["Budget", "Result", "convert", "measure_limits", "optimize"]
