"""What a candidate costs, nats a token: of the blocks' layers predicted, of the embedding and the head measured.

    block's layer    c / 2 tr(B dW S dW^T)      K-FAC, which averages over every token, times the layer's coupling c
    table            KL(original, original with this format alone) on held-out windows

(docs/limits.md, Coupling, has why, and bench/prices.py how near the truth that is.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gather import Gathered, damage
from .measure.streamed import final_hidden, replacing, window_kl
from .progress import track
from .stats.streaming import BlockStream
from .stats.sweep import moments
from .text.pairs import count
from .text.windows import spread

if TYPE_CHECKING:
    from .solve.candidates import Candidates

MEASURED_TOKENS = 2048  # held-out, on which the embedding's and the head's candidates are measured


def prices(gathered: Gathered, candidates: Candidates) -> dict[tuple[str, str], float]:
    """Nats a token of every candidate: of the blocks by coupled K-FAC, of the embedding and the head measured."""
    found = damages(gathered, candidates.menu, lambda name, codec: candidates.get(name, codec).decode(), "prices")
    tables = {name: candidates.menu[name] for name in gathered.stream.tables() if candidates.menu[name]}
    return found | (measured_alone(gathered, candidates, tables, "prices") if tables else {})


def measured_alone(gathered: Gathered, candidates: Candidates, menu: Mapping[str, Sequence[str]], folder: str, *,
                   tokens: int = MEASURED_TOKENS) -> dict[tuple[str, str], float]:
    """KL, nats a token of held-out text, of the model with nothing but one tensor in one codec, for each of `menu`.

    It is the only price of an embedding that knows the rows of tokens that the calibration text lacks. In float32: bfloat16
    has a KL of its own, above that of 8 bits. Files: FOLDER/TENSOR-CODEC.json.
    """
    stream, held_out = BlockStream(gathered.checkpoint, dtype=torch.float32), gathered.held_out
    embedding, head = stream.table_names()
    wanted = math.ceil(tokens * len(held_out) / count(held_out))
    windows_NT = held_out[spread(len(held_out), min(wanted, len(held_out)))]
    reference_NTd = final_hidden(stream, windows_NT)

    def measure(name: str, codec: str) -> float:
        decoded_OI = candidates.get(name, codec).decode()
        with replacing(stream, lambda asked: decoded_OI if asked == name else None), torch.no_grad():
            same = name == head != embedding  # the hidden states are the original's
            candidate_NTd = reference_NTd if same else final_hidden(stream, windows_NT)
            return max(0.0, float(window_kl(stream, windows_NT, reference_NTd, candidate_NTd).mean()))

    keys = [(name, codec) for name, names in menu.items() for codec in names]
    return {(name, codec): gathered.workspace.json(f"{folder}/{name}-{codec}.json", partial(measure, name, codec))
            for name, codec in track(keys, "price the tables")}


def damages(gathered: Gathered, menu: Mapping[str, Sequence[str]], decoded: Callable[[str, str], Tensor], folder: str,
            ) -> dict[tuple[str, str], float]:
    """Nats a token, by K-FAC times the layer's coupling, of matrices of the blocks in the codecs of `menu`. decoded: by
    tensor and codec name. Files: FOLDER/K.json of block K."""
    def measure(block: str) -> dict[str, dict[str, float]]:
        sums, keys = moments(gathered.workspace, gathered.calls, block)
        found: dict[str, dict[str, float]] = {}
        for layer, key in keys.items():
            name = gathered.inner(block, layer)
            weight_OI, fisher, found[name] = gathered.weight(name), gathered.fisher(block, layer), {}
            coupling = gathered.coupling(block, layer)
            for codec in menu.get(name, ()):
                change_OI = decoded(name, codec) - weight_OI
                found[name][codec] = coupling * damage(fisher, change_OI, change_OI @ sums[key])
        return found

    nats: dict[tuple[str, str], float] = {}
    for k, block in enumerate(track(gathered.stream.blocks, "price the layers")):
        for name, each in gathered.workspace.json(f"{folder}/{k:04d}.json", partial(measure, block)).items():
            nats |= {(name, codec): value for codec, value in each.items()}
    return nats
