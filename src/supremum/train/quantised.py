"""A base that stays quantised while an adapter is trained on it (way: qlora).

    y = x W^T + b + s (x A^T) B^T        W decoded from the file where a product needs it, and let go after it
    dL/dx = dL/dy W                      W decoded once more

(QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3.) There W is NF4 in memory; here it is what the base's file holds,
of any format that opens: the operating system keeps as much of it in memory as it has room for, this process one layer's
floats. What is merged at the end is written layer by layer. Embeddings and heads stay float32, as do layers stored as floats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..checkpoint.hf import SINGLE
from ..checkpoint.safetensors_file import DTYPES, SafetensorsFile
from ..checkpoint.write_safetensors import SafetensorsWriter, Spec


class QuantisedLinear(nn.Linear):
    """A linear layer without a weight of its own: `decode` gives it, (O, I) float32 on the CPU, in memory of its own.

    An nn.Linear, so that PEFT puts its adapters around it; `weight` is empty. A bias is trained by nobody.
    """

    def __init__(self, inside: int, outside: int, bias: nn.Parameter | None, decode: Callable[[], Tensor]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inside, outside
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.bias = bias  # type: ignore[assignment]  # as where nn.Linear has none
        self.decode = decode

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.bias, self.decode)
        return y

    def add(self, update: Callable[[], Tensor]) -> None:
        """Make the weight `decode() + update()`."""
        before = self.decode
        self.decode = lambda: before() + update()


class _Product(torch.autograd.Function):
    """x W^T + b, which keeps neither W nor x for the gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, decode: Callable[[], Tensor]) -> Tensor:
        context.decode, context.dtype = decode, x.dtype
        return nn.functional.linear(x, decode().to(x.device), bias)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight_OI = context.decode().to(gradient.device, gradient.dtype)
        return (gradient @ weight_OI).to(context.dtype), None, None


def keep_quantised(model: nn.Module, blocks: Sequence[nn.Module], checkpoint: Checkpoint, stored: Mapping[str, str],
                   ) -> list[str]:
    """Put a QuantisedLinear where the checkpoint has a quantised matrix of a block; returns the names of their weights.

    stored: the checkpoint's name of each tensor of the model. A weight that another tensor is tied to stays a float.
    """
    tied = {*checkpoint.tied, *checkpoint.tied.values()}
    inside = {module for block in blocks for module in block.modules()}
    replaced = []
    for path, module in list(model.named_modules()):
        name = stored.get(f"{path}.weight", "")
        if (type(module) is not nn.Linear or module not in inside or name not in checkpoint.tensors or name in tied
                or checkpoint.tensors[name].kind in DTYPES):
            continue
        layer = QuantisedLinear(module.in_features, module.out_features, module.bias, _decoder(checkpoint, name))
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        replaced.append(f"{path}.weight")
    return replaced


def _decoder(checkpoint: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(name).float()


def draw_missing(model: Any) -> None:
    """Give every parameter that has no memory yet some, drawn as Transformers draws a new model's."""
    given: dict[int, nn.Parameter] = {}
    for module in model.modules():
        module._is_hf_initialized = False  # it drew into nothing
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = given.setdefault(
                    id(parameter), nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.initialize_weights()


def fold_adapters(model: nn.Module) -> None:
    """Add the updates of PEFT's LoRA layers to the quantised layers under them, each made when the weight is; the quantised
    layers stand where those of PEFT did."""
    for path, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if isinstance(base, QuantisedLinear):
            for adapter in module.active_adapters:
                base.add(_update(module, adapter))
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, base)


def _update(layer: Any, adapter: str) -> Callable[[], Tensor]:
    def update() -> Tensor:
        with torch.no_grad():
            found: Tensor = layer.get_delta_weight(adapter)
        return found.cpu()

    return update


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """By name, in the order of the module tree."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def write_missing(model: nn.Module, folder: Path) -> None:
    """Complete the weights that `save_pretrained` wrote into `folder`, which lack those of the quantised layers: a new file,
    one tensor in memory at a time."""
    layers = {f"{name}.weight": layer for name, layer in quantised_layers(model).items()}
    if not layers:
        return
    path = folder / SINGLE
    there = SafetensorsFile(path)
    specs = [Spec(name, DTYPES[entry.dtype], entry.shape) for name, entry in there.entries.items()]
    specs += [Spec(name, torch.float32, (layer.out_features, layer.in_features)) for name, layer in layers.items()]
    with SafetensorsWriter(path, specs) as file:
        for name in there.entries:
            file.put(name, there.read(name))
        for name, layer in layers.items():
            file.put(name, layer.decode())
