"""The main job: a model and a budget in, a smaller model in a standard format out, with the limit and the proof.

    open -> gather (text, moments, candidates, Fisher) -> price -> plan -> verify and refit -> solve -> write -> prove
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from . import __version__
from .allocate import Budget, Option, Unit, frontier
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.targets import LazyCoded
from .checkpoint.targets import target as target_named
from .codecs import Coded
from .errors import BudgetError, StateError, SupremumError
from .gather import TOKENS, Gathered, gather, gather_fisher, solve_candidates, work_folder
from .limits import LayerSpectrum, Limits, limits
from .measure import Quality, samples
from .measure.answers import objective
from .measure.streamed import final_hidden, streamed_quality
from .planning import menu_of, plan_of, prices, spend, units_of
from .preflight import preflight
from .progress import note, phase
from .report import Document, read_document, write_report
from .report.assemble import assemble
from .runtime.verify import verify
from .solve.candidates import Candidates, load_coded
from .solve.final import solve_final
from .stats.streaming import BlockStream, orientation
from .text import fast_dtype
from .workspace import Workspace, plain

VERIFIED = 3  # frontier points whose true KL is measured before the plan is made
ATTEMPTS = 4  # plans tried to meet a largest KL


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
    _check_output(folder, checkpoint)
    options = {"target": target, "tokens": tokens, "keep": sorted(keep or []), "only": sorted(only or []),
               "dtype": dtype, "size": budget.size, "bits": budget.bits, "max_kl": budget.max_kl}
    inputs = {"supremum": __version__, "torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads(),
              "model": checkpoint.fingerprint, "text": [_text_state(source) for source in text or []], "seed": seed,
              "options": options}
    if not fresh and (done := _finished(folder, inputs)):
        note(f"{folder}: is finished with the same inputs; --fresh runs it again.")
        return done
    with phase("check what is needed"):
        shapes = _shapes(checkpoint)
        preflight(checkpoint, kind, budget, folder, menu_of(kind, checkpoint, shapes, keep or [], only), shapes,
                  tokens=tokens or TOKENS)
    workspace = Workspace(work_folder(folder), inputs, fresh=fresh)
    try:
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        menu = menu_of(kind, checkpoint, gathered.shapes, keep or [], only)
        candidates = solve_candidates(gathered, menu.codecs)
        gather_fisher(gathered, candidates, seed)
        units = units_of(gathered, kind, menu, prices(gathered))
        reference = workspace.tensors("reference.safetensors",
                                      lambda: {"h": final_hidden(gathered.stream, gathered.held_out)})["h"]
        measured = _verify_frontier(gathered, units, candidates, reference, budget, kind)
        chosen, coded, quality = _reach(gathered, units, candidates, reference, budget, kind, measured)
        result_folder = _write(gathered, kind, coded, workspace)
        written = (kind.name == "gguf" and result_folder / "model.gguf") or result_folder
        with phase("prove in the stock runtime"):
            proof = workspace.json("proof.json", lambda: verify(written, kind).asdict())
        spectra = list(gathered.spectra())
        document = assemble(gathered, kind, budget, units, chosen, measured, quality, proof,
                            _limits(gathered, spectra, chosen, units, quality), spectra, written,
                            _samples(checkpoint, written), inputs, factor=correction(measured),
                            command=_command(model, folder, options, text or [], seed))
        write_report(document, result_folder)
        _move_into_place(result_folder, folder)
        workspace.discard()
        return Result(folder, document)
    finally:
        workspace.close()


def _verify_frontier(gathered: Gathered, units: list[Unit], candidates: Candidates, reference: torch.Tensor,
                     budget: Budget, kind: Any) -> list[dict[str, Any]]:
    """True KL of a few frontier points, without drift correction: what the prediction is refitted on."""
    def measure() -> list[dict[str, Any]]:
        hull = frontier(units)
        if budget.size or budget.bits:
            centre = sum(o.nbytes for o in spend(Budget(budget.size, budget.bits), units, gathered.checkpoint, kind))
        else:
            wanted = budget.max_kl or 1.0
            centre = sum(o.nbytes for o in min(hull, key=lambda c: abs(math.log(max(_nats(c), 1e-9) / wanted))))
        picked: list[list[Option]] = []
        for ratio in (0.9, 1.0, 1.15)[:VERIFIED]:
            aim = centre * ratio
            near = min(hull, key=partial(lambda aim, c: abs(math.log(sum(o.nbytes for o in c) / aim)), aim))
            if near not in picked and _nats(near) > 0:
                picked.append(near)
        points = []
        for i, options in enumerate(picked):
            plan = plan_of(units, options)
            coded = LazyCoded(plan, partial(_candidate, candidates, plan))
            quality = _measure(gathered, coded, reference, f"measure point {i + 1} of {len(picked)}")
            points.append({"plan": plan, "bytes": kind.size(gathered.checkpoint, plan), "nats": _nats(options),
                           "kl": quality.kl_mean})
        return points

    found: list[dict[str, Any]] = gathered.workspace.json("verified.json", measure)
    return found


def correction(points: list[dict[str, Any]]) -> float:
    """true KL / predicted nats: the geometric mean over the measured points."""
    ratios = [math.log(point["kl"] / point["nats"]) for point in points if point["kl"] > 0 and point["nats"] > 0]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


def _reach(gathered: Gathered, units: list[Unit], candidates: Candidates, reference: torch.Tensor, budget: Budget,
           kind: Any, points: list[dict[str, Any]]) -> tuple[list[Option], LazyCoded, dict[str, Any]]:
    """Plan, solve and measure; with a largest KL, again with a stricter prediction until the measurement holds."""
    factor = correction(points)
    for attempt in range(ATTEMPTS):
        nats = None if budget.max_kl is None else 0.97 * budget.max_kl / factor
        try:
            chosen = spend(budget, units, gathered.checkpoint, kind, nats=nats)
        except BudgetError as error:
            if budget.max_kl is None:
                raise
            raise BudgetError(f"KL {budget.max_kl:g} cannot be reached within the other limits: {error.cause}",
                              "Allow more bytes, more bits or more KL.") from error
        plan = plan_of(units, chosen)
        coded = _solve(gathered, plan, candidates, f"final{attempt}")
        quality = gathered.workspace.json(
            f"final{attempt}/quality.json",
            partial(lambda coded: _measure(gathered, coded, reference, "measure the result").to_dict(), coded))
        if budget.max_kl is None or quality["kl_mean"] <= budget.max_kl:
            return chosen, coded, quality
        note(f"measured KL {quality['kl_mean']:.4f} is above {budget.max_kl:g}; planning again")
        factor *= 1.03 * quality["kl_mean"] / budget.max_kl
    raise BudgetError(f"KL {budget.max_kl:g} was not reached in {ATTEMPTS} plans (last: {quality['kl_mean']:.4f}).",
                      "Allow more KL, or more bytes.")


def _measure(gathered: Gathered, coded: LazyCoded, reference: torch.Tensor, name: str) -> Quality:
    return streamed_quality(gathered.stream, gathered.held_out, reference,
                            lambda tensor: coded[tensor].decode() if tensor in coded else None, name)


def _candidate(candidates: Candidates, plan: Mapping[str, str], name: str) -> Coded:
    return candidates.get(name, plan[name])


def _solve(gathered: Gathered, plan: Mapping[str, str], candidates: Candidates, folder: str) -> LazyCoded:
    tables = {name: candidates.get(name, plan[name]) for name in gathered.tables if name in plan}
    files = solve_final(gathered.stream, gathered.windows, gathered.workspace, plan, gathered.weight, gathered.shapes,
                        folder, tables)

    def load(name: str) -> Coded:
        if name in tables:
            return tables[name]
        return load_coded(gathered.workspace, files[name], f"{name}|{plan[name]}", plan[name], gathered.shapes[name])

    return LazyCoded(plan, load)


def _write(gathered: Gathered, kind: Any, coded: LazyCoded, workspace: Workspace) -> Path:
    folder = workspace.folder / "output"
    expected = kind.size(gathered.checkpoint, coded.plan)
    with phase("write"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind.write(gathered.checkpoint, coded, folder)
        found = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if found != expected:
        raise SupremumError(f"{folder}: {found} bytes were written where {expected} were planned.", "Please report this.")
    return folder


def _samples(checkpoint: Checkpoint, written: Path) -> list[dict[str, Any]]:
    """The original and the written file answer the same prompts, greedily; none for models that write no text or that
    do not fit the memory twice."""
    one = checkpoint.skeleton()
    parameters = sum(p.numel() for p in one.parameters())
    if objective(one) != "next" or 8 * parameters > psutil.virtual_memory().available:
        return []
    with phase("write samples"):
        dtype = fast_dtype()
        return [sample.to_dict() for sample in samples(checkpoint.model(dtype), open_checkpoint(written).model(dtype),
                                                       checkpoint.tokenizer())]


def _limits(gathered: Gathered, spectra: list[LayerSpectrum], chosen: list[Option], units: list[Unit],
            quality: dict[str, Any]) -> Limits:
    weights = sum(unit.weights for unit in units if unit.in_blocks)
    nbytes = sum(option.nbytes for unit, option in zip(units, chosen, strict=True) if unit.in_blocks)
    reached = (8 * nbytes / weights, quality["kl_mean"]) if weights and quality["kl_mean"] else None
    return limits(gathered.checkpoint, spectra, reached=reached)


def measure_limits(model: str | Path, *, text: list[str] | None = None, tokens: int | None = None, seed: int = 0,
                   dtype: str = "auto") -> Limits:
    """What is possible with this model on this machine; changes nothing and keeps nothing."""
    import tempfile

    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="supremum-") as folder:
        workspace = Workspace(Path(folder), {})
        gathered = gather(checkpoint, workspace, text=text or [], tokens=tokens, seed=seed, dtype=dtype)
        gather_fisher(gathered, None, seed)
        return limits(checkpoint, list(gathered.spectra()))


def convert(model: str | Path, target: str, out: str | Path) -> Path:
    """The same weights in another target's files; nothing is lost that the target can hold. Returns the written path."""
    checkpoint, kind, folder = open_checkpoint(model), target_named(target), Path(out)
    _check_output(folder, checkpoint)
    staging = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        written = kind.write(checkpoint, {}, staging)
        _move_into_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder / written.relative_to(staging)


def _nats(options: list[Option]) -> float:
    return sum(option.nats for option in options)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    return {name: shape for name, (shape, _) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}


def _check_output(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse an output that would overwrite the input or a stranger's folder."""
    here, source = folder.resolve(), Path(checkpoint.path).resolve()
    if here in (source, source.parent if source.is_file() else source) or here in source.parents:
        raise SupremumError(f"{folder}: holds the model that is read.", "Choose another --out.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "supremum.json").exists())):
        raise SupremumError(f"{folder}: exists and is no Supremum output.", "Choose another --out, or remove it.")


def _finished(folder: Path, inputs: dict[str, Any]) -> Result | None:
    """The result of an earlier run with the same inputs, if it stands there."""
    try:
        document = read_document(folder)
    except (StateError, OSError):
        return None
    state: Any = document["inputs"]
    return Result(folder, document) if state.get("state") == plain(inputs) else None


def _text_state(source: str) -> list[Any]:
    path = Path(source)
    return [source, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [source]


def _move_into_place(staging: Path, folder: Path) -> None:
    """Replace `folder` by `staging` with two renames; the old one goes when the new one stands."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    shutil.rmtree(old, ignore_errors=True)


def _command(model: str | Path, folder: Path, options: dict[str, Any], text: list[str], seed: int) -> str:
    words = ["supremum", "optimize", str(model)]
    for flag in ("size", "bits", "max_kl", "tokens"):
        if options[flag] is not None:
            words += [f"--{flag.replace('_', '-')}", str(options[flag])]
    for name, values in (("--text", text), ("--keep", options["keep"])):
        for value in values:
            words += [name, value]
    words += ["--target", options["target"], "--seed", str(seed), "--out", str(folder)]
    return shlex.join(words)
