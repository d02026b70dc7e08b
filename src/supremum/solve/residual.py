"""Which layers write into the residual stream, found by watching and not by name.

A layer with output y writes into the stream if an input read before the next linear layer runs, or the block's output, is
R + y for an R that does not depend on y. Moving y by a random delta then moves that tensor, and exactly that much. R is
what the stream already holds; when the model's inputs have drifted, its error R - Rh is one that this layer can mend:

    W* = (W E[x xh^T] + E[(R - Rh) xh^T]) (E[xh xh^T])^-1

A layer whose output is normalised before it is added (Gemma) does not show R this way and is not corrected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..stats.calls import Call
from ..stats.streaming import linears

OUTPUT = ""  # the place of the block's own output


class Watch:
    """Inputs of all submodules (first argument) and outputs of linear layers, in the order in which they run."""

    def __init__(self, block: nn.Module, *, move: str | None = None, delta: Tensor | None = None) -> None:
        self.block, self.move, self.delta = block, move, delta
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        handles = []
        for name, module in self.block.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._before(name)))
        for name, layer in linears(self.block).items():
            handles.append(layer.register_forward_hook(self._after(name)))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self.inputs.setdefault(name, args[0].detach())
        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.outputs[name] = output.detach()
            return output + self.delta if name == self.move and self.delta is not None else output
        return hook


@torch.no_grad()
def writers(block: nn.Module, call: Call, hidden_NTd: Tensor) -> dict[str, str]:
    """Layer name -> the submodule whose input is R + y (OUTPUT: the block's output). `hidden_NTd`: one window, (1, T, d),
    the call's."""
    found: dict[str, str] = {}
    still = _run(block, call, hidden_NTd, Watch(block))
    for name, output in still.outputs.items():
        if output.shape != still.inputs[OUTPUT].shape:
            continue
        generator = torch.Generator().manual_seed(0)
        size = output.float().square().mean().sqrt()
        delta = (torch.randn(output.shape, generator=generator) * size).to(output.dtype)
        moved = _run(block, call, hidden_NTd, Watch(block, move=name, delta=delta))
        for place, before in _until_next_linear(still, name):
            after = moved.inputs.get(place)
            if before.shape != delta.shape or after is None:
                continue
            held = (before - output).float()
            # bfloat16 keeps 8 bits of the sum: compare on that scale; R = 0 is the layer's own consumer
            slack = 2.0**-6 * (before.abs() + after.abs() + output.abs()).float()
            if bool((((after - before) - delta).float().abs() <= slack).all()) and bool((held.abs() > slack).any()):
                found[name] = place
                break
    return found


def _until_next_linear(watch: Watch, name: str) -> Iterator[tuple[str, Tensor]]:
    """What is read after a layer has run, up to the next linear layer: a sum read later holds other layers' outputs too."""
    later = iter(watch.inputs.items())
    for place, _ in later:
        if place == name:
            break
    for place, value in later:
        yield place, value
        if place in watch.outputs:
            return


def _run(block: nn.Module, call: Call, hidden_NTd: Tensor, watch: Watch) -> Watch:
    with watch.on():
        output = call.output(block, hidden_NTd)
    watch.inputs[OUTPUT] = output
    return watch
