"""The final solve: block by block in the model's order, each layer on the inputs that it will really see.

With x the original model's inputs and xh those of the already compressed one, layer W is replaced by the grid point
nearest to

    W* = W E[x xh^T] (E[xh xh^T] + lambda I)^-1     in the metric E[xh xh^T]                    (Qronos, arXiv 2505.11695)

(lambda is added to both moments, so that W* = W where nothing has drifted). A layer that writes into the residual stream
also mends the error that the stream already holds (residual.py). Within a block the layers are solved in the order in which
they run, so the second sees the first's error too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import codecs
from ..codecs import Coded
from ..progress import track
from ..stats.streaming import BlockStream, Call, linears, set_weight
from ..stats.sweep import accumulate, batches, hidden_file, moments, run_block
from ..workspace import Workspace
from .cancellation import Metric, damped, solve_together
from .candidates import Oriented, load_coded, save_coded
from .residual import OUTPUT, writers

DAMPING = 0.01  # of the metric that the solver works in, share of mean(diag S)
RIDGE = 0.2  # of the regression that gives W*: smaller ones fit the calibration text and not the next (bench/ridge.py)
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
            if not workspace.has(file):
                repeated = sum(c.block == call.block for c in calls) > 1
                original_NTd = None if repeated else workspace.load(hidden_file(k))["h"]
                save_coded(workspace, file, _solve_block(block, call, original_NTd, drifted_NTd, chosen, weight,
                                                         moments(workspace, calls, call.block)))
            for tensor, codec in chosen.items():
                coded = load_coded(workspace, file, f"{tensor}|{codec}", codec, shapes[tensor])
                set_weight(linears(block)[wanted[tensor]], coded.decode())
            workspace.save(f"{folder}/{hidden_file(k + 1)}", {"h": run_block(block, call, drifted_NTd)})
        workspace.remove(f"{folder}/{hidden_file(k)}")
    return files


@dataclass(frozen=True)
class Seen:
    """One layer's inputs x (tokens, I) and, where it writes into the residual stream, what that held: R (tokens, d)."""

    inputs: list[Tensor]
    held: list[Tensor]


def _solve_block(block: nn.Module, call: Call, original_NTd: Tensor | None, drifted_NTd: Tensor, plan: Mapping[str, str],
                 weight: Oriented, gathered: tuple[dict[str, Tensor], dict[str, str]]) -> dict[str, Coded]:
    """All planned layers of one block, in the order in which they run. Without original hidden states (a block that is
    used more than once) the gathered moments are used and nothing is corrected."""
    layers = linears(block)
    sums, keys = gathered
    order = list(dict.fromkeys(keys.values()))
    places = {} if original_NTd is None else writers(block, call, original_NTd[:1])
    originals = None if original_NTd is None else _watch(block, call, original_NTd, order, places)
    solved: dict[str, Coded] = {}
    for key in order:
        names = {f"{call.block}.{name}.weight": name for name, k in keys.items() if k == key}
        names = {tensor: name for tensor, name in names.items() if tensor in plan}
        if not names:
            continue
        weights = {tensor: weight(tensor) for tensor in names}
        if originals is None:
            moment_II = sums[key]
        else:
            width = drifted_NTd.shape[-1]
            alone = key not in places and key != order[0] and any(w.shape[0] == width for w in weights.values())
            drifted = _watch(block, call, drifted_NTd, [key], places, stop=True)[key]
            moment_II, cross_II, mend_dI = _moments(originals[key], drifted)
            if not alone:  # its output is normalised before it is added: see residual.py
                weights = {tensor: _target(w, moment_II, cross_II, mend_dI) for tensor, w in weights.items()}
        metric = Metric.of(moment_II, damping=DAMPING)
        for codec in sorted({plan[tensor] for tensor in names}):
            together = {tensor: w for tensor, w in weights.items() if plan[tensor] == codec}
            for tensor, coded in solve_together(together, metric, codecs.get(codec), refits=REFITS).items():
                solved[f"{tensor}|{codec}"] = coded
                set_weight(layers[names[tensor]], coded.decode())
    return solved


@torch.no_grad()
def _watch(block: nn.Module, call: Call, hidden_NTd: Tensor, keys: list[str], places: Mapping[str, str], *,
           stop: bool = False) -> dict[str, Seen]:
    """What the layers `keys` see, batch by batch; with `stop` the block is run only as far as needed (one key)."""
    seen = {key: Seen([], []) for key in keys}
    modules = dict(block.named_modules())
    outputs: dict[str, Tensor] = {}
    handles = []

    def hold(key: str, stream: Tensor) -> None:
        seen[key].held.append((stream - outputs.pop(key)).flatten(0, -2))

    def on_input(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[key].inputs.append(args[0].flatten(0, -2))
            if stop and key not in places:
                raise _Reached
        return hook

    def on_output(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[key] = output
        return hook

    def on_stream(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if key in outputs:
                hold(key, args[0])
                if stop:
                    raise _Reached
        return hook

    for key in keys:
        handles.append(modules[key].register_forward_pre_hook(on_input(key)))
        if key in places:
            handles.append(modules[key].register_forward_hook(on_output(key)))
            if places[key] != OUTPUT:
                handles.append(modules[places[key]].register_forward_pre_hook(on_stream(key)))
    try:
        for part in batches(hidden_NTd):
            try:
                output = block(hidden_NTd[part], *call.args, **call.kwargs)
            except _Reached:
                continue
            for key in list(outputs):
                hold(key, output)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _moments(original: Seen, drifted: Seen) -> tuple[Tensor, Tensor, Tensor | None]:
    """(E[xh xh^T], E[x xh^T], E[(R - Rh) xh^T] or None), means over tokens."""
    sums: dict[str, Tensor] = {}
    for i, (x_TI, xh_TI) in enumerate(zip(original.inputs, drifted.inputs, strict=True)):
        accumulate(sums, "hh", xh_TI, xh_TI)
        accumulate(sums, "xh", x_TI, xh_TI)
        if original.held:
            accumulate(sums, "rh", original.held[i].float() - drifted.held[i].float(), xh_TI.float())
    tokens = sum(len(x_TI) for x_TI in original.inputs)
    return sums["hh"] / tokens, sums["xh"] / tokens, sums["rh"] / tokens if "rh" in sums else None


def _target(weight_OI: Tensor, moment_II: Tensor, cross_II: Tensor, mend_OI: Tensor | None = None) -> Tensor:
    """(W (S_xxh + lambda I) + S_rh) (S_hh + lambda I)^-1 with lambda = RIDGE mean(diag S_hh), in float64."""
    regular_II = damped(moment_II, RIDGE).double()
    wish_OI = weight_OI.double() @ (cross_II.double() + (regular_II - moment_II.double()))
    if mend_OI is not None:
        wish_OI = wish_OI + mend_OI.double()
    return torch.cholesky_solve(wish_OI.T, torch.linalg.cholesky(regular_II)).T.float()
