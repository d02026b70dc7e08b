"""From statistics to an archive that keeps its budget: one water level for the whole model, found by what it costs.

    level -> integers of every matrix (solve/water.py) -> bytes as they will be written, or true KL -> a better level

The level is of K-FAC's price times the coupling (prices.py): a layer has theta / c, a table theta. The first is that of the
limit curve, which knows no coupling, some way below the budget; a bit is a factor of 4. There each matrix is solved for the
original's inputs, all blocks side by side; from the second on for those that the layers before leave (solve/final.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from scipy.special import lambertw
from torch import Tensor

from .allocate import Budget, Option, Unit
from .checkpoint import Checkpoint
from .checkpoint.targets import LazyCoded
from .checkpoint.write_archive import ArchiveTarget
from .codecs.lattice import Frame, Lattice
from .errors import BudgetError
from .gather import Gathered
from .limits import Curve, LayerSpectrum
from .measure.streamed import streamed_quality
from .planning import Reached
from .progress import note, phase
from .sizes import format_size
from .solve.cancellation import DAMPING, OUTPUT_DAMPING, Metric, one_thread, side_by_side
from .solve.candidates import Matrix, read_matrix, save_matrices
from .solve.final import solve_final
from .solve.gains import Trained, train_gains
from .solve.water import Outputs, Spread, Watered, water
from .stats.fisher import HEAD_FISHER, gradient_file, shrunk
from .stats.sweep import HEAD_MOMENTS, moments
from .text.pairs import answering

START_BITS = 0.45  # a weight above the limit: where the search for the level begins, no more
LEAST_BITS = 0.1  # a weight: an archive of fewer would say nothing of the model
MOST_BITS = 6.0  # a weight: above, ever more numbers have no symbol (codecs/rans.py), and nothing is left to gain
NEAR = 0.997  # of a budget: near enough to stop
ATTEMPTS = 8
FRAME = tuple(field.name for field in fields(Frame))


@dataclass(frozen=True)
class Solved:
    """All matrices at one water level, and their exact bytes."""

    level: float
    folder: str  # of the workspace
    coded: LazyCoded
    nats: dict[str, float]
    nbytes: dict[str, int]  # of each matrix in the archive, with its part of what they share
    size: int  # of all files


def fill(gathered: Gathered, budget: Budget, kind: ArchiveTarget, spectra: list[LayerSpectrum], reference: Tensor,
         names: list[str], *, quick: bool = False) -> Reached:
    """The archive of `names` nearest to the original within the budget. quick: each matrix solved for the original's inputs,
    nothing trained. Raises BudgetError where there is none (`check_size` knows of sizes beforehand)."""
    blocks = {name for block in gathered.stream.blocks for name in gathered.shapes if name.startswith(f"{block}.")}
    weights = sum(math.prod(gathered.shapes[name]) for name in names)
    inner = sum(math.prod(gathered.shapes[name]) for name in names if name in blocks)
    fixed = fixed_bytes(gathered.checkpoint, kind, names)

    def excess(solved: Solved) -> float:
        """Bits a weight by which the budget's bytes are exceeded; below zero: still to be had."""
        found = [8 * (solved.size - fixed) / weights - MOST_BITS]
        if budget.size is not None:
            found.append(8 * (solved.size - budget.size) / weights)
        if budget.bits is not None:
            used = sum(solved.nbytes[name] for name in names if name in blocks)
            found.append(8 * used / max(inner, 1) - budget.bits)
        return max(found)

    def trained(solved: Solved) -> Trained:
        return train_gains(gathered.stream, gathered.windows, gathered.held_out, reference, gathered.workspace, solved.coded,
                           solved.folder, quick=quick)

    def kl(solved: Solved, ready: bool) -> float:
        found: dict[str, Any] = gathered.workspace.json(f"{solved.folder}/trained.json", lambda: trained(solved).quality) \
            if ready else _quality(gathered, solved, reference)
        return max(found["kl_mean"], 1e-9)

    curve, levels = Curve(spectra), _Levels(gathered, kind, names, budget.name, quick)
    if budget.max_kl is not None:
        solved = levels.near(curve.level_at_kl(budget.max_kl / 4), kl, budget.max_kl)
        if excess(solved) > 0:
            limits = "the other limits allow" if budget.size or budget.bits else f"an archive's {MOST_BITS:g} bits a weight"
            raise BudgetError(f"KL {budget.max_kl:g} takes {format_size(solved.size)}, more than {limits}.",
                              "Allow more bytes, more bits or more KL.")
    else:
        allowed = min(rate for rate in (budget.bits, budget.size and 8 * (budget.size - fixed) / weights) if rate is not None)
        rate = min(allowed, MOST_BITS)
        if rate < allowed:
            note(f"{MOST_BITS:g} bits a weight are the most that an archive makes use of; the budget allows {allowed:.2f}.")
        solved = levels.within(curve.level_at_bits(max(rate - START_BITS, LEAST_BITS)), excess, rate)
    units, options = [], []
    for name, shape in gathered.shapes.items():
        nbytes = solved.nbytes.get(name, gathered.checkpoint.tensors[name].nbytes)  # kept bfloat16 is coded without loss
        option = Option("lattice", nbytes, solved.nats[name]) if name in names else Option(None, nbytes, 0.0)
        units.append(Unit((name,), math.prod(shape), name in blocks, (option,)))
        options.append(option)
    return Reached(units, options, trained(solved), [], spectra, solved.size)


@dataclass(frozen=True)
class _Levels:
    """Water levels tried for one budget: the first (quick: all) for the original's inputs, which tells where to begin."""

    gathered: Gathered
    kind: ArchiveTarget
    names: list[str]
    folder: str
    quick: bool

    def solve(self, attempt: int, level: float) -> Solved:
        """`level`: log2 of theta."""
        return solve_level(self.gathered, self.kind, self.names, level, f"{self.folder}/level{attempt}",
                           drift=attempt > 0 and not self.quick)

    def drop(self, solved: Solved | None) -> None:
        """Free what a level takes on the disk; its counts stay, for a run that resumes."""
        if solved is not None:
            for pattern in ("*.safetensors", "block/*", "hidden/*"):
                self.gathered.workspace.remove(f"{solved.folder}/{pattern}")

    def within(self, level: float, excess: Callable[[Solved], float], rate: float) -> Solved:
        """The lowest level whose bytes the budget allows; two octaves are a bit a weight. `level`: where to begin."""
        best: Solved | None = None
        for attempt in range(ATTEMPTS):
            solved: Solved | None = self.solve(attempt, level)
            assert solved is not None
            over, final = excess(solved), self.quick or attempt > 0
            if final and over <= 0 and (best is None or solved.level < best.level):
                best, solved = solved, best
            self.drop(solved)
            if final and -(1 - NEAR) * rate <= over <= 0:
                break
            level += 2 * (over + 0.0005 * rate)
        if best is None:
            raise BudgetError(f"the budget was not met in {ATTEMPTS} water levels.", "Allow a little more.")
        return best

    def near(self, level: float, kl: Callable[[Solved, bool], float], max_kl: float) -> Solved:
        """The highest level that keeps the KL, which is nearly proportional to the level. kl: of a level, and whether it may
        be the last, whose gains are worth training."""
        best: Solved | None = None
        for attempt in range(ATTEMPTS):
            solved: Solved | None = self.solve(attempt, level)
            assert solved is not None
            final = self.quick or attempt > 0
            octaves = math.log2(max_kl / kl(solved, final))
            if final and octaves >= 0 and (best is None or solved.level > best.level):
                best, solved = solved, best
            self.drop(solved)
            if final and 0 <= octaves < 0.1:
                break
            level += octaves - 0.03
        if best is None:
            raise BudgetError(f"KL {max_kl:g} was not reached in {ATTEMPTS} water levels.", "Allow more KL.")
        return best


def solve_level(gathered: Gathered, kind: ArchiveTarget, names: list[str], level: float, folder: str, *,
                drift: bool) -> Solved:
    """Every matrix at one water level, log2; drift: each on the inputs that the ones before it leave (solve/final.py).

    Files: FOLDER/TENSOR of a table, and of the blocks FOLDER/K, or what `solve_final` says."""
    workspace, theta = gathered.workspace, 2.0**level
    blocks = {name: block for block in gathered.stream.blocks for name in names if name.startswith(f"{block}.")}
    plan = dict.fromkeys(names, "lattice")
    rounding = _Water(gathered, theta)
    files = {name: f"{folder}/{name}.safetensors" for name in names if name not in blocks}
    jobs: dict[str, Callable[[], Mapping[str, Matrix]]] = {file: partial(_solve_table, gathered, name, theta)
                                                           for name, file in files.items()}
    for number, block in enumerate(gathered.stream.blocks if not drift else ()):
        if inside := [name for name in names if blocks.get(name) == block]:
            file = f"{folder}/{number:04d}.safetensors"
            files |= dict.fromkeys(inside, file)
            jobs[file] = partial(_solve_block, gathered, block, inside, rounding)

    def run(file: str) -> None:
        if not workspace.has(file):
            save_matrices(workspace, file, jobs[file]())

    def load(name: str) -> Lattice:
        return rounding.read(read_matrix(workspace, files[name], name), "lattice", gathered.shapes[name])

    coded = LazyCoded(plan, load)  # type: ignore[arg-type]

    def count() -> dict[str, Any]:
        workers = torch.get_num_threads()
        with phase(f"fill to level {theta:.3g}", len(jobs)) as advance, one_thread(), \
                ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(run, jobs):
                advance()
        if drift:
            tables = {name: load(name) for name in files}
            inner = {name: codec for name, codec in plan.items() if name in blocks}
            files.update(solve_final(gathered.stream, gathered.windows, workspace, inner, gathered.weight, gathered.shapes,
                                     folder, tables, rounding))
        nats = {name: float(workspace.load(files[name], [f"{name}|nats"])[f"{name}|nats"]) for name in names}
        return {"files": files, "nats": nats, **kind.count(gathered.checkpoint, coded)}

    counted = workspace.json(f"{folder}/counted.json", count)
    files.update(counted["files"])
    counts = {name: math.prod(gathered.checkpoint.tensors[name].shape) for name in counted["matrices"]}
    share = counted["tables"] / sum(counts.values())  # by weights, as checkpoint/archive.py reads it
    nbytes = {name: own + math.ceil(share * counts[name]) for name, own in counted["matrices"].items()}
    return Solved(theta, folder, coded, counted["nats"], nbytes, counted["size"])


@dataclass(frozen=True)
class _Water:
    """`solve.final.Rounding` to one water level."""

    gathered: Gathered
    level: float

    def solve(self, weights: Mapping[str, Tensor], moment_II: Tensor, plan: Mapping[str, str]) -> dict[str, Watered]:
        """Matrices that read the same inputs share the columns of their frame; each is solved on a core of its own."""
        metric = Metric.of(moment_II, damping=DAMPING, act_order=False)
        spread = Spread.of(torch.cat(list(weights.values())))
        rows = spread.row_O.split([len(weight_OI) for weight_OI in weights.values()])

        def one(name: str, row_O: Tensor) -> Watered:
            outputs = Outputs.of(self.gathered.fisher_of(name), OUTPUT_DAMPING)
            coupling = self.gathered.coupling(*self.gathered.place(name))
            found = water(weights[name], metric, outputs, self.level / coupling, Spread(row_O, spread.column_I))
            return replace(found, nats=coupling * found.nats)

        return dict(zip(weights, side_by_side(one, weights, rows), strict=True))

    def read(self, tensors: dict[str, Tensor], codec: str, shape_OI: tuple[int, int]) -> Lattice:
        return Lattice(tensors["integers_OI"], Frame(*(tensors[field] for field in FRAME)))


def _solve_block(gathered: Gathered, block: str, names: list[str], rounding: _Water) -> dict[str, Watered]:
    """The block's matrices for the original's inputs."""
    sums, keys = moments(gathered.workspace, gathered.calls, block)
    solved: dict[str, Watered] = {}
    for key, moment_II in sums.items():
        together = [name for layer, own in keys.items() if own == key and (name := gathered.inner(block, layer)) in names]
        if together:
            weights = {name: gathered.weight(name) for name in together}
            solved |= rounding.solve(weights, moment_II, {})
    return solved


def _solve_table(gathered: Gathered, name: str, level: float) -> dict[str, Watered]:
    """The embedding or the head. A row v of the head weighs its logit's Fisher b_v in the metric S of the head's inputs;
    of the embedding, how often f_v the token comes in the metric G of the gradients there. Of a tied table the damage is
    the sum b_v S + f_v G, taken as one metric with the mean weights and one weight a row that keeps the trace."""
    embedding, head = gathered.stream.table_names()
    weight_OI = gathered.weight(name)
    metric_II, rows_O = torch.zeros(weight_OI.shape[1], weight_OI.shape[1]), torch.zeros(len(weight_OI), dtype=torch.float64)
    if name == head:
        found = gathered.workspace.load(HEAD_FISHER)
        moment_II = gathered.workspace.load(HEAD_MOMENTS)["S"]
        fisher = shrunk(found["B|head"], float(found["r|head"])).double()
        fisher_O = felt(fisher.diagonal() if fisher.ndim == 2 else fisher, level * weight_OI.shape[1])
        metric_II += moment_II * float(fisher_O.mean())
        rows_O += fisher_O * float(moment_II.trace())
    if name == embedding:
        tokens_NT = gathered.windows
        gradient_Td = gathered.stream.embedding_gradient(
            tokens_NT, gathered.workspace.load(gradient_file(0))["g"]).float().flatten(0, 1)
        form_II = gradient_Td.T @ gradient_Td / int(answering(tokens_NT).sum())
        often_O = torch.bincount(tokens_NT[tokens_NT >= 0], minlength=len(weight_OI)).double() + 0.5
        often_O /= often_O.sum()
        metric_II += form_II * float(often_O.mean())
        rows_O += often_O * float(form_II.trace())
    rows_O /= rows_O.mean()
    return {name: water(weight_OI, Metric.of(metric_II, damping=DAMPING, act_order=False), Outputs.of(rows_O, OUTPUT_DAMPING),
                        level, Spread.of(weight_OI))}


def felt(fisher_V: Tensor, nats: float) -> Tensor:
    """What b_v, the Fisher of a token's logit, has to be taken for where `nats` are spent on each logit.

    An error of variance s costs p_v (exp(s / 2) - 1), which b_v s / 2 says of a small one only. b s = nats at
    b = b_v exp(s / 2), so s = 2 W(nats / 2 b_v), W Lambert's function: a rare token's logit must not err by many nats."""
    spread_V = 2 * torch.from_numpy(lambertw(0.5 * nats / fisher_V.clamp_min(1e-300).numpy()).real)
    return nats / spread_V.clamp_min(1e-300)


def _quality(gathered: Gathered, solved: Solved, reference: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = gathered.workspace.json(f"{solved.folder}/quality.json", lambda: streamed_quality(
        gathered.stream, gathered.held_out, reference, solved.coded.decoded, "measure the result").to_dict())
    return found


def fixed_bytes(checkpoint: Checkpoint, kind: ArchiveTarget, names: Collection[str]) -> int:
    """About the bytes of all that is not among the coded matrices `names`."""
    return kind.rest(checkpoint, {name: info for name, info in checkpoint.tensors.items() if name not in names})


def check_size(budget: Budget, checkpoint: Checkpoint, kind: ArchiveTarget, coded: Mapping[str, tuple[int, int]]) -> None:
    """Raises BudgetError for a size that leaves the matrices next to nothing. coded: their shapes."""
    weights = sum(math.prod(shape) for shape in coded.values())
    least = fixed_bytes(checkpoint, kind, coded) + math.ceil(LEAST_BITS * weights / 8)
    if budget.size is not None and budget.size < least:
        raise BudgetError(f"{format_size(budget.size)} is too small: what stays as it is leaves less than {LEAST_BITS} "
                          "bits a weight.", f"Ask for --size {least} or more.")
