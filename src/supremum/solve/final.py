"""The final solve: block by block in the model's order, each layer on the inputs that it will really see.

With x the original model's inputs and xh those of the already compressed one, layer W is replaced by the grid point
nearest to

    W* = W E[x xh^T] (E[xh xh^T] + lambda I)^-1     in the metric E[xh xh^T]                    (Qronos, arXiv 2505.11695)

(lambda is added to both moments, so that W* = W where nothing has drifted). Within a block the layers are solved in the
order in which they run, so the second sees the first's error too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import codecs
from ..codecs import Coded
from ..progress import track
from ..stats.streaming import BlockStream, Call, linears, set_weight
from ..stats.sweep import Inputs, accumulate, batches, hidden_file, moments, run_block
from ..workspace import Workspace
from .cancellation import Metric, damped, solve_together
from .candidates import Oriented, load_coded, save_coded

DAMPING = 0.01
REFITS = 1


class _Reached(Exception):
    """The wanted input was seen; the rest of the block need not run."""


def solve_final(stream: BlockStream, windows_NT: Tensor, workspace: Workspace, plan: Mapping[str, str], weight: Oriented,
                shapes: Mapping[str, tuple[int, int]], folder: str, tables: Mapping[str, Coded]) -> dict[str, str]:
    """Solve all of `plan` (tensor name -> codec name) and return the file that holds each tensor.

    `tables`: embedding and head, solved already; their error reaches the blocks. Files: FOLDER/block/K holds block K's
    compressed tensors, FOLDER/hidden/K what enters call K of the compressed model.
    """
    calls = stream.calls(windows_NT)
    files: dict[str, str] = {}
    stream.replaced = lambda name: tables[name].decode() if name in tables else None
    try:
        workspace.tensors(f"{folder}/{hidden_file(0)}", lambda: {"h": torch.cat(
            [stream.embed(windows_NT[part]) for part in batches(windows_NT)])})
    finally:
        stream.replaced = lambda name: None
    first_call = {call.block: k for k, call in reversed(list(enumerate(calls)))}
    for k, call in enumerate(track(calls, "solve the layers")):
        file = f"{folder}/block/{first_call[call.block]:04d}.safetensors"
        wanted = {f"{call.block}.{name}.weight": name for name in linears(stream.blocks[call.block])}
        chosen = {tensor: plan[tensor] for tensor in wanted if tensor in plan}
        files |= dict.fromkeys(chosen, file)
        after = f"{folder}/{hidden_file(k + 1)}"
        if workspace.has(after):
            continue
        drifted_NTd = workspace.load(f"{folder}/{hidden_file(k)}")["h"]
        with stream.block(call.block) as block:
            if not workspace.has(file):
                repeated = sum(c.block == call.block for c in calls) > 1
                original_NTd = None if repeated else workspace.load(hidden_file(k))["h"]
                save_coded(workspace, file, _solve_block(block, call, original_NTd, drifted_NTd, chosen, weight,
                                                         moments(workspace, calls, call.block)))
            for tensor, codec in chosen.items():
                coded = load_coded(workspace, file, f"{tensor}|{codec}", codec, shapes[tensor])
                set_weight(linears(block)[wanted[tensor]], coded.decode())
            workspace.save(after, {"h": run_block(block, call, drifted_NTd)})
        workspace.remove(f"{folder}/{hidden_file(k)}")
    return files


def _solve_block(block: nn.Module, call: Call, original_NTd: Tensor | None, drifted_NTd: Tensor, plan: Mapping[str, str],
                 weight: Oriented, gathered: tuple[dict[str, Tensor], dict[str, str]]) -> dict[str, Coded]:
    """All planned layers of one block, in the order in which they run. Without original hidden states (a block that is
    used more than once) the gathered moments are used and nothing is corrected."""
    layers = linears(block)
    sums, keys = gathered
    originals = None if original_NTd is None else _inputs(block, call, original_NTd)
    solved: dict[str, Coded] = {}
    for key in dict.fromkeys(keys.values()):
        names = {f"{call.block}.{name}.weight": name for name, k in keys.items() if k == key}
        names = {tensor: name for tensor, name in names.items() if tensor in plan}
        if not names:
            continue
        weights = {tensor: weight(tensor) for tensor in names}
        if originals is None:
            moment_II = sums[key]
        else:
            moment_II, cross_II = _drift(block, call, drifted_NTd, key, originals[key])
            weights = {tensor: _target(w, moment_II, cross_II) for tensor, w in weights.items()}
        metric = Metric.of(moment_II, damping=DAMPING)
        for codec in sorted({plan[tensor] for tensor in names}):
            together = {tensor: w for tensor, w in weights.items() if plan[tensor] == codec}
            for tensor, coded in solve_together(together, metric, codecs.get(codec), refits=REFITS).items():
                solved[f"{tensor}|{codec}"] = coded
                set_weight(layers[names[tensor]], coded.decode())
    return solved


def _inputs(block: nn.Module, call: Call, hidden_NTd: Tensor) -> dict[str, list[Tensor]]:
    """Every distinct linear input of the block, batch by batch: key -> [(tokens, I)]."""
    found: dict[str, list[Tensor]] = {}
    with Inputs(lambda key, x_TI: found.setdefault(key, []).append(x_TI)).on(block):
        run_block(block, call, hidden_NTd)
    return found


def _drift(block: nn.Module, call: Call, drifted_NTd: Tensor, key: str, originals: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(E[xh xh^T], E[x xh^T]) of one input, running the block only as far as that."""
    sums: dict[str, Tensor] = {}
    batch = iter(originals)

    def visit(name: str, drifted_TI: Tensor) -> None:
        if name == key:
            accumulate(sums, "hh", drifted_TI, drifted_TI)
            accumulate(sums, "xh", next(batch), drifted_TI)
            raise _Reached

    with Inputs(visit).on(block), torch.no_grad():
        for part in batches(drifted_NTd):
            try:
                block(drifted_NTd[part], *call.args, **call.kwargs)
            except _Reached:
                continue
    tokens = drifted_NTd.shape[0] * drifted_NTd.shape[1]
    return sums["hh"] / tokens, sums["xh"] / tokens


def _target(weight_OI: Tensor, moment_II: Tensor, cross_II: Tensor) -> Tensor:
    """W (S_xxh + lambda I) (S_hh + lambda I)^-1, in float64."""
    regular_II = damped(moment_II, DAMPING).double()
    cross_II = cross_II.double() + (regular_II - moment_II.double())
    factor_II = torch.linalg.cholesky(regular_II)
    return torch.cholesky_solve((weight_OI.double() @ cross_II).T, factor_II).T.float()
