"""From statistics to an archive that keeps its budget: one water level for the whole model, found by what it costs.

    level -> integers of every matrix (solve/water.py) -> bytes as they will be written, or true KL -> a better level

The first level is that of the limit curve some way below the budget; a bit is a factor of 4. Each matrix is solved for the
original's inputs. (Solving it for those that the compressed layers before it leave, as solve/final.py does for
fixed-length formats, took 8 times as long and 3 to 7 % off the KL at 3 bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .allocate import Budget, Option, Unit
from .checkpoint.targets import LazyCoded
from .checkpoint.write_archive import ArchiveTarget
from .codecs.lattice import Frame, Lattice
from .errors import BudgetError
from .gather import Gathered
from .limits import Curve, LayerSpectrum
from .measure.streamed import streamed_quality
from .planning import Reached
from .progress import phase
from .sizes import format_size
from .solve.cancellation import DAMPING, Metric, one_thread
from .solve.water import Outputs, Spread, water
from .stats.fisher import gradient_file, shrunk
from .stats.sweep import HEAD_MOMENTS, moments

OUTPUT_DAMPING = 0.01  # share of mean(diag B) added to B
START_BITS = 0.6  # a weight above the limit: where the search for the level begins, no more
LEAST_BITS = 0.1  # a weight: an archive of fewer would say nothing of the model
NEAR = 0.997  # of a budget: near enough to stop
ATTEMPTS = 8


@dataclass(frozen=True)
class Solved:
    """All matrices at one water level, and their exact bytes."""

    level: float
    coded: LazyCoded
    nats: dict[str, float]
    nbytes: dict[str, int]  # of each matrix in the archive, with its part of what they share
    size: int  # of all files


def fill(gathered: Gathered, budget: Budget, kind: ArchiveTarget, spectra: list[LayerSpectrum], reference: Tensor,
         names: list[str]) -> Reached:
    """The archive of `names` nearest to the original within the budget. Raises BudgetError where there is none."""
    curve = Curve(spectra)
    blocks = {name for block in gathered.stream.blocks for name in gathered.shapes if name.startswith(f"{block}.")}
    weights = sum(math.prod(gathered.shapes[name]) for name in names)
    inner = sum(math.prod(gathered.shapes[name]) for name in names if name in blocks)
    _check(gathered, budget, kind, names, weights)

    def over(solved: Solved) -> float:
        """Bits a weight by which the budget's bytes are exceeded; below zero: still to be had."""
        excess = [-math.inf]
        if budget.size is not None:
            excess.append(8 * (solved.size - budget.size) / weights)
        if budget.bits is not None:
            used = sum(solved.nbytes[name] for name in names if name in blocks)
            excess.append(8 * used / max(inner, 1) - budget.bits)
        return max(excess)

    if budget.max_kl is not None:
        level = 2.0 ** curve.level_at_kl(budget.max_kl / 4)
    else:
        rate = budget.bits or 8 * (budget.size - _fixed(gathered, kind, names)) / weights  # type: ignore[operator]
        level = 2.0 ** curve.level_at_bits(max(rate - START_BITS, LEAST_BITS))
    best: tuple[Solved, dict[str, Any]] | None = None
    for attempt in range(ATTEMPTS):
        solved = solve_level(gathered, kind, level, names, f"{budget.name}/level{attempt}")
        quality: dict[str, Any] = {}
        if budget.max_kl is not None:  # KL is proportional to the level, nearly; the highest level that keeps it is wanted
            quality = _quality(gathered, solved, reference, f"{budget.name}/quality{attempt}.json")
            octaves = math.log2(budget.max_kl / quality["kl_mean"]) - 0.03
            fits, near = quality["kl_mean"] <= budget.max_kl, octaves < 0.07
        else:  # two octaves a bit; the lowest level that keeps the bytes is wanted
            excess, bits = over(solved), 8 * sum(solved.nbytes[name] for name in names) / weights
            octaves = 2 * (excess + 0.0005 * bits)
            fits, near = excess <= 0, excess > -(1 - NEAR) * bits
        if fits and (best is None or (solved.level > best[0].level) is (budget.max_kl is not None)):
            best = solved, quality
        if fits and near:
            break
        level *= 2.0**octaves
    if best is None:
        raise BudgetError(f"the budget was not met in {ATTEMPTS} water levels.", "Allow a little more.")
    solved, quality = best
    if budget.max_kl is not None and over(solved) > 0:
        raise BudgetError(f"KL {budget.max_kl:g} takes {format_size(solved.size)}, more than the other limits allow.",
                          "Allow more bytes, more bits or more KL.")
    quality = quality or _quality(gathered, solved, reference, f"{budget.name}/quality.json")
    units, options = [], []
    for name, shape in gathered.shapes.items():
        nbytes = solved.nbytes.get(name, gathered.checkpoint.tensors[name].nbytes)  # kept bfloat16 is coded without loss
        option = Option("lattice", nbytes, solved.nats[name]) if name in names else Option(None, nbytes, 0.0)
        units.append(Unit((name,), math.prod(shape), name in blocks, (option,)))
        options.append(option)
    return Reached(units, options, solved.coded, quality, [], spectra, solved.size)


def solve_level(gathered: Gathered, kind: ArchiveTarget, level: float, names: list[str], folder: str) -> Solved:
    """Every matrix at one water level. Files: FOLDER/K of block K, FOLDER/TENSOR of a table."""
    workspace = gathered.workspace
    jobs: dict[str, Callable[[], dict[str, tuple[Lattice, float]]]] = {}
    files: dict[str, str] = {}
    for number, block in enumerate(gathered.stream.blocks):
        inside = [name for name in names if name.startswith(f"{block}.")]
        if inside:
            file = f"{folder}/{number:04d}.safetensors"
            files |= dict.fromkeys(inside, file)
            jobs[file] = partial(_solve_block, gathered, block, inside, level)
    for name in (name for name in names if name not in files):
        files[name] = f"{folder}/{name}.safetensors"
        jobs[files[name]] = partial(_solve_table, gathered, name, level)

    def run(file: str) -> None:
        if not workspace.has(file):
            workspace.save(file, {key: tensor for name, (lattice, nats) in jobs[file]().items() for key, tensor in {
                f"{name}|integers_OI": lattice.integers_OI, f"{name}|nats": torch.tensor([nats], dtype=torch.float64),
                **{f"{name}|{side}": vector for side, vector in vars(lattice.frame).items()}}.items()})

    workers = torch.get_num_threads()
    with phase(f"fill to level {level:.3g}", len(jobs)) as advance, one_thread(), \
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(run, jobs):
            advance()

    def load(name: str) -> Lattice:
        found = workspace.load(files[name], [f"{name}|{field}" for field in (
            "integers_OI", "row_O", "column_I", "row_class_O", "column_class_I")])
        integers_OI, *frame = found.values()
        return Lattice(integers_OI, Frame(*frame))

    coded = LazyCoded(dict.fromkeys(names, "lattice"), load)  # type: ignore[arg-type]
    nats = {name: float(workspace.load(files[name], [f"{name}|nats"])[f"{name}|nats"]) for name in names}
    counted = workspace.json(f"{folder}/bytes.json", lambda: kind.count(gathered.checkpoint, coded))
    share = 1 + counted["tables"] / sum(counted["matrices"].values())
    nbytes = {name: math.ceil(own * share) for name, own in counted["matrices"].items()}
    return Solved(level, coded, nats, nbytes, counted["size"])


def _solve_block(gathered: Gathered, block: str, names: list[str], level: float) -> dict[str, tuple[Lattice, float]]:
    """The block's matrices; those that read the same inputs share the columns of their frame."""
    sums, keys = moments(gathered.workspace, gathered.calls, block)
    fishers, shares = gathered.block_fisher(block, "B|"), gathered.block_fisher(block, "r|")
    uses = sum(call.block == block for call in gathered.calls)
    solved: dict[str, tuple[Lattice, float]] = {}
    for key, moment_II in sums.items():
        layers = [layer for layer, own in keys.items() if own == key and gathered.inner(block, layer) in names]
        weights = {layer: gathered.weight(gathered.inner(block, layer)) for layer in layers}
        if not weights:
            continue
        metric = Metric.of(moment_II, damping=DAMPING)
        spread = Spread.of(torch.cat(list(weights.values())))
        start = 0
        for layer, weight_OI in weights.items():
            steady = shrunk(fishers[f"B|{layer}"], float(shares[f"r|{layer}"]) / uses)
            rows = slice(start, start + len(weight_OI))
            found = water(weight_OI, metric, Outputs.of(steady, OUTPUT_DAMPING), level,
                          Spread(spread.row_O[rows], spread.column_I))
            solved[gathered.inner(block, layer)] = found.lattice, found.nats
            start = rows.stop
    return solved


def _solve_table(gathered: Gathered, name: str, level: float) -> dict[str, tuple[Lattice, float]]:
    """The embedding or the head. A row v of the head weighs its logit's Fisher b_v in the metric S of the head's inputs;
    of the embedding, how often f_v the token comes in the metric G of the gradients there. Of a tied table the damage is
    the sum b_v S + f_v G, taken as one metric with the mean weights and one weight a row that keeps the trace."""
    embedding, head = gathered.stream.table_names()
    weight_OI = gathered.weight(name)
    metric_II, rows_O = torch.zeros(weight_OI.shape[1], weight_OI.shape[1]), torch.zeros(len(weight_OI), dtype=torch.float64)
    if name == head:
        tables = gathered.workspace.load("fisher/tables.safetensors")
        moment_II = gathered.workspace.load(HEAD_MOMENTS)["S"]
        fisher = shrunk(tables[f"B|{name}"], float(tables[f"r|{name}"])).double()
        fisher_O = fisher.diagonal() if fisher.ndim == 2 else fisher
        metric_II += moment_II * float(fisher_O.mean())
        rows_O += fisher_O * float(moment_II.trace())
    if name == embedding:
        tokens_NT = gathered.windows[:, :gathered.fisher_length]
        gradient_Td = gathered.stream.embedding_gradient(
            tokens_NT, gathered.workspace.load(gradient_file(0))["g"]).float().flatten(0, 1)
        form_II = gradient_Td.T @ gradient_Td / len(gradient_Td)
        often_O = torch.bincount(tokens_NT.flatten(), minlength=len(weight_OI)).double() + 0.5
        often_O /= often_O.sum()
        metric_II += form_II * float(often_O.mean())
        rows_O += often_O * float(form_II.trace())
    rows_O /= rows_O.mean()
    found = water(weight_OI, Metric.of(metric_II, damping=DAMPING), Outputs.of(rows_O, OUTPUT_DAMPING), level,
                  Spread.of(weight_OI))
    return {name: (found.lattice, found.nats)}


def _quality(gathered: Gathered, solved: Solved, reference: Tensor, file: str) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        return streamed_quality(gathered.stream, gathered.held_out, reference, lambda tensor: solved.coded[
            tensor].decode() if tensor in solved.coded else None, "measure the result").to_dict()

    found: dict[str, Any] = gathered.workspace.json(file, measure)
    return found


def _fixed(gathered: Gathered, kind: ArchiveTarget, names: list[str]) -> int:
    """Bytes of all files without the coded matrices."""
    stays = {name: info for name, info in gathered.checkpoint.tensors.items() if name not in names}
    return kind.rest(gathered.checkpoint, stays)


def _check(gathered: Gathered, budget: Budget, kind: ArchiveTarget, names: list[str], weights: int) -> None:
    """Raises BudgetError for a budget that leaves the matrices next to nothing."""
    least = _fixed(gathered, kind, names) + math.ceil(LEAST_BITS * weights / 8)
    if budget.size is not None and budget.size < least:
        raise BudgetError(f"{format_size(budget.size)} is too small: what stays as it is leaves less than {LEAST_BITS} "
                          "bits a weight.",
                          f"Ask for --size {least} or more.")


