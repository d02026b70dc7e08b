"""The forward sweep: second moments of every linear layer's inputs, one block in memory at a time.

    S = E[x x^T]   (I, I), mean over calibration tokens, float32 sums of products

Layers that read the same input (q/k/v, gate/up) share one S. The hidden states between blocks live in the workspace, so
a killed sweep continues at the block it was in, and later passes start from any block.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import track
from ..text.pairs import answering
from ..workspace import Workspace
from .calls import Call
from .streaming import BlockStream, linears

BATCH_TOKENS = 4096
HEAD_MOMENTS = "moments/head.safetensors"
PANEL = 256  # columns of a product with itself that are multiplied at once: only its upper half is computed


def batches(windows: Tensor) -> list[slice]:
    """Slices of windows (N, T, ...) of about BATCH_TOKENS tokens."""
    step = max(1, BATCH_TOKENS // windows.shape[1])
    return [slice(i, i + step) for i in range(0, len(windows), step)]


class Inputs:
    """Hooks on a block's linear layers that hand each distinct input to `visit(key, x_TI)` once.

    `shared` maps every layer's name inside the block to its key, the first layer that read the same tensor.
    """

    def __init__(self, visit: Any) -> None:
        self.shared: dict[str, str] = {}
        self._visit = visit
        self._last: tuple[Tensor, str] | None = None

    @contextlib.contextmanager
    def on(self, block: nn.Module, call: Call | None = None) -> Iterator[Inputs]:
        """call: of which only the inputs that count are handed out."""
        self._rows = call.rows if call else lambda x_NTI: x_NTI.flatten(0, -2)
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in linears(block).items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._last is not None and self._last[0] is args[0]:
                self.shared[name] = self._last[1]
                return
            self.shared[name] = name
            self._last = (args[0], name)
            self._visit(name, self._rows(args[0].detach()))
        return hook


def accumulate(sums: dict[str, Tensor], key: str, x_TI: Tensor) -> None:
    """sums[key] += x^T x in float32; bfloat16 inputs are multiplied exactly by bfloat16 units where there are any.

    One half is computed and mirrored: 1.3 to 1.8 times faster on one core.
    """
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if x_TI.dtype == torch.bfloat16 else "highest")
        total_II, x_TI = sums.setdefault(key, torch.zeros(x_TI.shape[-1], x_TI.shape[-1])), x_TI.float()
        for start in range(0, len(total_II), PANEL):
            stop = start + PANEL
            total_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])
            total_II[stop:, start:stop] = total_II[start:stop, stop:].T
    finally:
        torch.set_float32_matmul_precision(previous)


def run_block(block: nn.Module, call: Call, hidden_NTd: Tensor) -> Tensor:
    """The block's output on all windows, batch by batch, without gradients."""
    with torch.no_grad():
        return torch.cat([call.at(part).run(block, hidden_NTd[part]) for part in batches(hidden_NTd)])


def hidden_file(call: int) -> str:
    return f"hidden/{call:04d}.safetensors"


def moments_file(call: int) -> str:
    return f"moments/{call:04d}.safetensors"


def sweep(stream: BlockStream, windows_NT: Tensor, workspace: Workspace) -> None:
    """Run the windows (N, T) through the model; leave hidden states and moments of every block call in the workspace.

    Files: hidden/K (N, T, d) enters call K; moments/K holds "S|layer" (I, I) for each distinct input, "tokens|layer" how many
    tokens it was taken from and, as bytes, "key|layer" naming the S that a layer shares; HEAD_MOMENTS the output head's "S"
    (d, d), where there is a head.
    """
    calls = stream.calls(windows_NT)
    workspace.tensors(hidden_file(0), lambda: {"h": torch.cat(
        [stream.embed(windows_NT[part]) for part in batches(windows_NT)])})
    for k, call in enumerate(track(calls, "gather moments")):
        if workspace.has(hidden_file(k + 1)):
            continue
        hidden_NTd = workspace.load(hidden_file(k))["h"]
        sums: dict[str, Tensor] = {}
        seen: Counter[str] = Counter()

        def look(key: str, x_TI: Tensor, sums: dict[str, Tensor] = sums, seen: Counter[str] = seen) -> None:
            accumulate(sums, key, x_TI)
            seen[key] += len(x_TI)

        inputs, output = Inputs(look), []
        with stream.block(call.block) as block:
            for part in batches(hidden_NTd):
                with inputs.on(block, some := call.at(part)):
                    output.append(run_block(block, some, hidden_NTd[part]))
        moments = {f"S|{key}": total / seen[key] for key, total in sums.items()}
        moments |= {f"tokens|{key}": torch.tensor(count) for key, count in seen.items()}
        keys = {f"key|{name}": torch.tensor(list(key.encode()), dtype=torch.uint8) for name, key in inputs.shared.items()}
        workspace.save(moments_file(k), moments | keys)
        workspace.save(hidden_file(k + 1), {"h": torch.cat(output)})
    if stream.model.get_output_embeddings() is not None and not workspace.has(HEAD_MOMENTS):
        workspace.save(HEAD_MOMENTS, {"S": _head_moment(
            stream, workspace.load(hidden_file(len(calls)))["h"], windows_NT)})


def _head_moment(stream: BlockStream, hidden_NTd: Tensor, windows_NT: Tensor) -> Tensor:
    """S = E[x x^T] (d, d) of the output head's inputs; of its products with them only one position's are computed."""
    sums: dict[str, Tensor] = {}
    answers_NT = answering(windows_NT)

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        accumulate(sums, "S", args[0].flatten(0, -2))
        return (args[0][:1, :1],)

    handle = stream.model.get_output_embeddings().register_forward_pre_hook(look)
    try:
        with stream.head() as head, torch.no_grad():
            for n, hidden_Td in enumerate(hidden_NTd):
                head(hidden_Td[answers_NT[n]][None])
    finally:
        handle.remove()
    return sums["S"] / int(answers_NT.sum())


def moments(workspace: Workspace, calls: list[Call], block: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(S by key, key by layer name) of one block; the mean over its calls where a block is used more than once."""
    found = [workspace.load(moments_file(k)) for k, call in enumerate(calls) if call.block == block]
    keys = {name.removeprefix("key|"): bytes(value.tolist()).decode() for name, value in found[0].items()
            if name.startswith("key|")}
    mean = {name.removeprefix("S|"): torch.stack([f[name] for f in found]).mean(0) if len(found) > 1 else value
            for name, value in found[0].items() if name.startswith("S|")}
    return mean, keys


def tokens(workspace: Workspace, calls: list[Call], block: str) -> dict[str, int]:
    """How many tokens each S of a block was taken from, by key."""
    file = next(moments_file(k) for k, call in enumerate(calls) if call.block == block)
    found = workspace.load(file, [key for key in workspace.keys(file) if key.startswith("tokens|")])
    return {key.removeprefix("tokens|"): int(value) for key, value in found.items()}
