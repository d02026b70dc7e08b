"""What every job needs first: text as windows, the sweeps forward and back, and candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .limits import LayerSpectrum, spectrum
from .limits import metric as analysed
from .progress import phase
from .solve.cancellation import Metric
from .solve.candidates import Candidates
from .stats.calls import Call
from .stats.fisher import fisher, fisher_file, shrunk
from .stats.streaming import BlockStream, orientation, read_weight
from .stats.sweep import HEAD_MOMENTS, moments, sweep, tokens
from .text import calibration_and_held_out, fast_dtype, self_generated
from .text.pairs import count, reads_pairs
from .text.windows import fitting_length, spread
from .workspace import Workspace, write_atomic

TOKENS, HELD_OUT_TOKENS = 16384, 4096
LENGTH = 512  # tokens of a window
MENU = "menu.json"  # codec names of the candidates by tensor name


@dataclass
class Gathered:
    """A checkpoint with its statistics in a workspace."""

    checkpoint: Checkpoint
    workspace: Workspace
    stream: BlockStream
    windows: Tensor  # calibration (N, T)
    held_out: Tensor  # (n, T)
    calls: list[Call]
    shapes: dict[str, tuple[int, int]]  # (O, I) of every matrix that can be compressed
    turned: dict[str, bool]
    text: dict[str, Any]

    def weight(self, name: str, checkpoint: Checkpoint | None = None) -> Tensor:
        """The original weight (O, I), float32; or another checkpoint's, of the same architecture."""
        return read_weight(checkpoint or self.checkpoint, name, self.turned[name])

    def inner(self, block: str, layer: str) -> str:
        """The tensor's name of one linear layer by its name inside the block."""
        return f"{block}.{layer}.weight"

    def spectra(self) -> Iterator[LayerSpectrum]:
        """What the information limit needs of each linear layer of the blocks, once the Fisher is gathered."""
        with phase("analyse the layers", len(self.stream.blocks)) as advance:
            for block in self.stream.blocks:
                sums, keys = moments(self.workspace, self.calls, block)
                seen = tokens(self.workspace, self.calls, block)
                sides = {key: analysed(total, tokens=seen[key]) for key, total in sums.items()}
                for layer, key in keys.items():
                    name = self.inner(block, layer)
                    yield spectrum(name, self.weight(name), sides[key], self.fisher(block, layer))
                advance()

    def fisher(self, block: str, layer: str) -> Tensor:
        """The output Fisher, shrunk, of one linear layer by its name inside the block."""
        found, share = (self.block_fisher(block, key)[key] for key in (f"B|{layer}", f"r|{layer}"))
        return shrunk(found, float(share) / sum(call.block == block for call in self.calls))

    def place(self, name: str) -> tuple[str, str]:
        """The block of a tensor, and its layer's name inside: `inner` undone."""
        block = next(block for block in self.stream.blocks if name.startswith(f"{block}."))
        return block, name.removeprefix(f"{block}.").removesuffix(".weight")

    def fisher_of(self, name: str) -> Tensor:
        """The same by the tensor's name."""
        return self.fisher(*self.place(name))

    def coupling(self, block: str, layer: str) -> float:
        """What a change of one linear layer costs over K-FAC (stats/fisher.py); the mean over the block's uses."""
        return float(self.block_fisher(block, f"c|{layer}")[f"c|{layer}"]) / sum(call.block == block for call in self.calls)

    def block_fisher(self, block: str, prefix: str) -> dict[str, Tensor]:
        """Fisher files' entries of one block that start with `prefix`, summed over its calls."""
        total: dict[str, Tensor] = {}
        for k, call in enumerate(self.calls):
            if call.block == block:
                file = fisher_file(k)
                found = self.workspace.load(file, [key for key in self.workspace.keys(file) if key.startswith(prefix)])
                for key, value in found.items():
                    total[key] = total[key] + value if key in total else value
        return total


def damage(fisher: Tensor, change_OI: Tensor, image_OI: Tensor) -> float:
    """tr(B dW S dW^T) / 2 of one layer: nats a token, to second order and by K-FAC. fisher: B (O, O) or its diagonal;
    change: dW; image: dW S."""
    weighted_OI = fisher @ change_OI if fisher.ndim == 2 else fisher[:, None] * change_OI
    return max(0.0, 0.5 * float((weighted_OI * image_OI).sum()))


def window_length(checkpoint: Checkpoint) -> int:
    """Tokens of a calibration window."""
    return fitting_length(checkpoint, LENGTH)


def windows_of(checkpoint: Checkpoint, workspace: Workspace, text: list[str], tokens: int, held_out_tokens: int,
               seed: int, data: Path | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(calibration, held-out, where they came from); read once and kept in the workspace. data: the folder of a tuned
    encoder-decoder's rows, where it is not the one that it was tuned on."""
    length, pairs = window_length(checkpoint), reads_pairs(checkpoint)

    def compute() -> dict[str, Tensor]:
        if pairs:
            from .train.pairs import read_pairs

            every = read_pairs(checkpoint, text, tokens=tokens + held_out_tokens, seed=seed, data=data)
            chosen = spread(len(every), max(1, round(len(every) * held_out_tokens / (tokens + held_out_tokens))), seed)
            rest = torch.ones(len(every), dtype=torch.bool)
            rest[chosen] = False
            calibration, held_out = every[rest], every[chosen]
        elif text:
            calibration, held_out = calibration_and_held_out(
                checkpoint, text, tokens=tokens, held_out_tokens=held_out_tokens, length=length, seed=seed)
        else:
            every = self_generated(checkpoint, tokens=tokens + held_out_tokens, length=length, seed=seed)
            count = held_out_tokens // length
            calibration, held_out = every[count:], every[:count]
        return {"calibration": calibration, "held_out": held_out}

    found = workspace.tensors("windows.safetensors", compute)
    source = ", ".join(text) if text else "the rows that it was tuned on" if pairs else "written by the model itself"
    return found["calibration"], found["held_out"], {
        "calibration": source, "calibration_tokens": count(found["calibration"]),
        "held_out": f"{source} (other {'pairs' if pairs else 'windows'})", "held_out_tokens": count(found["held_out"])}


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of forward passes: "auto" is bfloat16 where the processor multiplies in it."""
    return fast_dtype() if name == "auto" else getattr(torch, name)


def gather(checkpoint: Checkpoint, workspace: Workspace, *, text: list[str], tokens: int | None, seed: int, dtype: str,
           held_out_tokens: int = HELD_OUT_TOKENS, data: Path | None = None) -> Gathered:
    """Windows and the forward sweep."""
    windows, held_out, source = windows_of(checkpoint, workspace, text, tokens or TOKENS, held_out_tokens, seed, data)
    stream = BlockStream(checkpoint, dtype=compute_dtype(dtype))
    sweep(stream, windows, workspace)
    oriented = orientation(stream)
    return Gathered(checkpoint, workspace, stream, windows, held_out, stream.calls(windows),
                    {name: shape for name, (shape, _) in oriented.items()},
                    {name: turned for name, (_, turned) in oriented.items()}, source)


def fit_leftovers(workspace: Workspace, menu: Mapping[str, list[str]]) -> None:
    """Free the candidates that a killed run of another budget left, unless they are those of `menu`."""
    if workspace.json(MENU, lambda: menu) != menu:
        write_atomic(workspace.path(MENU), b"null")  # they are about to go
        for pattern in ("candidates/*", "prices/*"):
            workspace.remove(pattern)
        write_atomic(workspace.path(MENU), json.dumps(menu).encode())


def solve_candidates(gathered: Gathered, menu: Mapping[str, list[str]]) -> Candidates:
    """Every layer in every codec of its menu."""
    candidates = Candidates(gathered.workspace, gathered.weight, menu, gathered.shapes)
    blocks = list(gathered.stream.blocks)
    with phase("solve candidates", len(blocks)) as advance:
        for i, block in enumerate(blocks):
            sums, keys = moments(gathered.workspace, gathered.calls, block)
            groups: dict[str, list[str]] = {}
            for layer, key in keys.items():
                groups.setdefault(key, []).append(gathered.inner(block, layer))
            candidates.solve_block(f"candidates/{i:04d}.safetensors", sums, groups)
            advance()
    _, head = gathered.stream.table_names()
    for name in gathered.stream.tables():
        metric = Metric.of(gathered.workspace.load(HEAD_MOMENTS)["S"]) if name == head else None
        candidates.solve_table(f"candidates/{name}.safetensors", name, metric)
    return candidates


def gather_fisher(gathered: Gathered, seed: int) -> None:
    """The backward sweep."""
    fisher(gathered.stream, gathered.windows, gathered.workspace, length=gathered.windows.shape[1], seed=seed)
