"""The final solve: block by block in the model's order, each layer on the inputs that it will really see.

With x the original model's inputs and xh those of the already compressed one, layer W is replaced by the grid point
nearest to

    W* = W E[x xh^T] (E[xh xh^T] + Lambda)^-1     in the metric E[xh xh^T]                    (Qronos, arXiv 2505.11695)

(Lambda is added to both moments, so that W* = W where nothing has drifted). The means over tokens weigh each by what an
error there does to the answers, w_t = |g_t| (stats/fisher.py). A layer that writes into the residual stream also mends the
error that the stream already holds (residual.py). What cancellation found is then improved weight by weight, rows together
(descent.py). Within a block the layers are solved in the order in which they run, so the second sees the first's error too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import codecs
from ..codecs import Coded
from ..progress import track
from ..stats.calls import Call
from ..stats.fisher import fisher_file
from ..stats.streaming import BlockStream, linears, set_weight
from ..stats.sweep import accumulate, batches, hidden_file, moments, run_block
from ..workspace import Workspace
from .cancellation import DAMPING, Metric, damped, side_by_side, solve_together
from .candidates import Matrix, Oriented, read_matrix, save_matrices
from .descent import descend
from .residual import writers
from .walk import Seen, Walk

RIDGE = 3.0  # share of diag E[xh xh^T] in Lambda: less fits the calibration text and not the next (bench/ridge.py)
REFITS = 1


class Rounding(Protocol):
    """How layers that read the same inputs become numbers, and how those are read back."""

    def solve(self, weights: Mapping[str, Tensor], moment_II: Tensor, plan: Mapping[str, str]) -> Mapping[str, Matrix]:
        """weights: tensor name -> target (O, I). moment_II: of the inputs."""

    def read(self, tensors: dict[str, Tensor], codec: str, shape_OI: tuple[int, int]) -> Matrix:
        """The matrix whose tensors these are."""


@dataclass(frozen=True)
class Grids:
    """The codecs' own grids: those of the same codec together, then each matrix by itself in its output Fisher's metric.

    fisher: tensor name -> B (O, O) or its diagonal; without it the rows stay as cancellation left them. feedback: of
    cancellation; False is nearest rounding under searched scales."""

    fisher: Callable[[str], Tensor] | None = None
    feedback: bool = True

    def solve(self, weights: Mapping[str, Tensor], moment_II: Tensor, plan: Mapping[str, str]) -> Mapping[str, Coded]:
        metric = Metric.of(moment_II, damping=DAMPING)
        solved: dict[str, Coded] = {}
        for codec in sorted({plan[tensor] for tensor in weights}):
            together = {tensor: w for tensor, w in weights.items() if plan[tensor] == codec}
            solved |= solve_together(together, metric, codecs.get(codec), feedback=self.feedback, refits=REFITS)
        if (fisher := self.fisher) is not None:
            def better(tensor: str) -> Coded:
                return descend(solved[tensor], weights[tensor], metric.moment_II, fisher(tensor))

            solved = dict(zip(weights, side_by_side(better, weights), strict=True))
        return solved

    def read(self, tensors: dict[str, Tensor], codec: str, shape_OI: tuple[int, int]) -> Coded:
        return Coded(codecs.get(codec), tensors, shape_OI)


def solve_final(stream: BlockStream, windows_NT: Tensor, workspace: Workspace, plan: Mapping[str, str], weight: Oriented,
                shapes: Mapping[str, tuple[int, int]], folder: str, tables: Mapping[str, Matrix],
                rounding: Rounding = Grids()) -> dict[str, str]:
    """Solve all of `plan` (tensor name -> codec name) and return the file that holds each tensor, for `read_matrix`.

    `tables`: embedding and head, solved already; their error reaches the blocks. `sweep` and `fisher` must have run. Files:
    FOLDER/block/K holds block K's compressed tensors, FOLDER/hidden/K what enters call K of the compressed model.
    """
    calls = stream.calls(windows_NT)
    files: dict[str, str] = {}
    reached = max((k for k in range(len(calls) + 1) if workspace.has(f"{folder}/{hidden_file(k)}")), default=0)
    if not workspace.has(f"{folder}/{hidden_file(reached)}"):
        stream.replaced = lambda name: tables[name].decode() if name in tables else None
        try:
            workspace.save(f"{folder}/{hidden_file(0)}", {"h": torch.cat(
                [stream.embed(windows_NT[part]) for part in batches(windows_NT)])})
        finally:
            stream.replaced = lambda name: None
    first_call = {call.block: k for k, call in reversed(list(enumerate(calls)))}
    for k, call in enumerate(track(calls, "solve the layers")):
        file = f"{folder}/block/{first_call[call.block]:04d}.safetensors"
        wanted = {f"{call.block}.{name}.weight": name for name in linears(stream.blocks[call.block])}
        chosen = {tensor: plan[tensor] for tensor in wanted if tensor in plan}
        files |= dict.fromkeys(chosen, file)
        if k < reached:
            continue
        drifted_NTd = workspace.load(f"{folder}/{hidden_file(k)}")["h"]
        with stream.block(call.block) as block:
            output_NTd = None
            if not workspace.has(file):
                sums, keys = moments(workspace, calls, call.block)
                if sum(c.block == call.block for c in calls) == 1:
                    original_NTd = workspace.load(hidden_file(k))["h"]
                    found = workspace.load(fisher_file(k), [f"w|{layer}" for layer in keys])
                    scores = {name.removeprefix("w|"): score_NT.flatten() for name, score_NT in found.items()}
                    solved, output_NTd = _solve_block(block, call, original_NTd, drifted_NTd, chosen, weight, keys, scores,
                                                       rounding)
                else:
                    solved = solve_repeated(call.block, chosen, weight, sums, keys, rounding)
                save_matrices(workspace, file, solved)
            if output_NTd is None:
                for tensor, codec in chosen.items():
                    matrix = rounding.read(read_matrix(workspace, file, tensor), codec, shapes[tensor])
                    set_weight(linears(block)[wanted[tensor]], matrix.decode())
                output_NTd = run_block(block, call, drifted_NTd)
            workspace.save(f"{folder}/{hidden_file(k + 1)}", {"h": output_NTd})
        workspace.remove(f"{folder}/{hidden_file(k)}")
    return files


def _solve_block(block: nn.Module, call: Call, original_NTd: Tensor, drifted_NTd: Tensor, plan: Mapping[str, str],
                 weight: Oriented, keys: Mapping[str, str], scores: Mapping[str, Tensor],
                 rounding: Rounding) -> tuple[dict[str, Matrix], Tensor]:
    """All planned layers of one block, each on the inputs that the ones before it leave, and the block's output.

    keys: layer -> the first layer that reads the same input (`sweep.moments`). scores: |g_t| (positions,) of each
    layer, zero where nothing answers. The block ends up with the new weights."""
    places = writers(block, call.at(slice(0, 1)), original_NTd[:1])
    planned = {name: f"{call.block}.{name}.weight" for name in keys if f"{call.block}.{name}.weight" in plan}
    order = list(dict.fromkeys(keys[name] for name in planned))
    originals = dict(Walk(block, call, original_NTd, order, places))
    walk = Walk(block, call, drifted_NTd, order, places)
    solved: dict[str, Matrix] = {}
    for key, drifted in walk:
        drift = _drift(originals.pop(key), drifted, joint_weights([scores[name] for name in keys if keys[name] == key]))
        weights = {tensor: weight(tensor) for name, tensor in planned.items() if keys[name] == key}
        width = drifted_NTd.shape[-1]
        alone = key not in places and key != order[0] and any(w.shape[0] == width for w in weights.values())
        if not alone:  # its output is normalised before it is added: see residual.py
            weights = _targets(weights, drift)
        found = rounding.solve(weights, drift.moment_II, plan)
        for name, tensor in planned.items():
            if tensor in found:
                set_weight(block.get_submodule(name), found[tensor].decode())
        solved |= found
    return solved, walk.output


def solve_repeated(block: str, plan: Mapping[str, str], weight: Oriented, sums: Mapping[str, Tensor],
                    keys: Mapping[str, str], rounding: Rounding) -> dict[str, Matrix]:
    """A block that is used more than once sees other inputs each time: solved on the gathered moments, nothing corrected."""
    solved: dict[str, Matrix] = {}
    for key, moment_II in sums.items():
        tensors = [f"{block}.{name}.weight" for name, k in keys.items() if k == key]
        weights = {tensor: weight(tensor) for tensor in tensors if tensor in plan}
        if weights:
            solved |= rounding.solve(weights, moment_II, plan)
    return solved


def joint_weights(scores: list[Tensor]) -> Tensor:
    """Weights (tokens,) of mean 1 of an input that several layers read: the norm of all their gradients together."""
    weight_T = torch.stack(scores).square().sum(0).sqrt()
    return weight_T / weight_T.mean().clamp_min(1e-30)


@dataclass(frozen=True)
class Drift:
    """What corrects a layer's target, weighted means over tokens: E[w xh xh^T] (I, I), E[w (x - xh) xh^T] (I, I) and, of a
    writer, E[w (R - Rh) xh^T] (d, I)."""

    moment_II: Tensor
    change_II: Tensor
    mend_dI: Tensor | None


def _drift(original: Seen, drifted: Seen, weight_T: Tensor) -> Drift:
    sums: dict[str, Tensor] = {}
    start = 0
    for i, (x_TI, xh_TI) in enumerate(zip(original.inputs, drifted.inputs, strict=True)):
        root_T1 = weight_T[start:start + len(x_TI), None].sqrt()
        start += len(x_TI)
        seen_TI = (xh_TI.float() * root_T1).to(xh_TI.dtype)
        accumulate(sums, "moment", seen_TI)
        _add_product(sums, "change", x_TI, xh_TI, root_T1, seen_TI)
        if original.held:
            _add_product(sums, "mend", original.held[i], drifted.held[i], root_T1, seen_TI)
    return Drift(sums["moment"] / start, sums["change"] / start, sums["mend"] / start if "mend" in sums else None)


def _add_product(sums: dict[str, Tensor], key: str, one: Tensor, other: Tensor, root_T1: Tensor, seen_TI: Tensor) -> None:
    """sums[key] += (one - other)^T w xh. A correction need not be exact to the last bits: multiplied in the compute dtype."""
    change_Td = ((one.float() - other.float()) * root_T1).to(seen_TI.dtype)
    product_dI = (change_Td.T @ seen_TI).float()
    sums[key] = sums[key] + product_dI if key in sums else product_dI


def _targets(weights: Mapping[str, Tensor], drift: Drift) -> dict[str, Tensor]:
    """W + (W E[(x - xh) xh^T] + E[(R - Rh) xh^T]) (E[xh xh^T] + Lambda)^-1, Lambda = RIDGE diag.

    The equation above, with W (E[xh xh^T] + Lambda) taken out on both sides. Lambda is large enough for float32.
    """
    weight_OI = torch.cat(list(weights.values()))
    wish_OI = weight_OI @ drift.change_II
    if drift.mend_dI is not None:
        wish_OI = wish_OI + drift.mend_dI
    factor_II = torch.linalg.cholesky(damped(drift.moment_II, RIDGE))
    target_OI = weight_OI + torch.cholesky_solve(wish_OI.T, factor_II).T
    return dict(zip(weights, target_OI.split([len(weight) for weight in weights.values()]), strict=True))
