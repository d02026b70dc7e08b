"""A checkpoint as a float32 model that runs, whether or not it fits into memory.

If it does not fit comfortably, the blocks hold no weights: each is decoded when its turn comes and forgotten after.
"""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from torch import nn

SHARE = 0.5  # of the available memory that a whole model may take


def float32_model(checkpoint: Any) -> nn.Module:
    """The model in eval mode, whole or block by block. `checkpoint`: see supremum.checkpoint."""
    nbytes = 4 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    if nbytes < SHARE * psutil.virtual_memory().available:
        model: nn.Module = checkpoint.model(torch.float32)
        return model
    return blockwise(checkpoint)


def blockwise(checkpoint: Any) -> nn.Module:
    """The model with its blocks on the meta device between their turns; everything else in memory."""
    model: nn.Module = checkpoint.skeleton()
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = {f"{name}.{key}": block for name in outer for key, block in model.get_submodule(name).named_children()}
    inside = tuple(f"{name}." for name in blocks)
    outside = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)]
    for name in (name for name in outside if name not in checkpoint.tied):
        parent, _, key = name.rpartition(".")
        weight = nn.Parameter(checkpoint.read(name).to(torch.float32), requires_grad=False)
        model.get_submodule(parent)._parameters[key] = weight
    for target, source in checkpoint.tied.items():
        parent, _, key = target.rpartition(".")
        model.get_submodule(parent)._parameters[key] = model.get_parameter(source)
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda module, _, name=name: _fill(checkpoint, module, name))
        block.register_forward_hook(lambda module, *_: _forget(module))
    return model


def _fill(checkpoint: Any, block: nn.Module, name: str) -> None:
    checkpoint.materialise(block, name, torch.float32)


def _forget(block: nn.Module) -> None:
    for module in block.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
