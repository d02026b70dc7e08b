"""How llama.cpp rounds the inputs of matrix products, so that its answers can be predicted, error included.

A weight of block type is multiplied with activations in 8 bits (ggml, `vec_dot_type`):

    blocks of 32     x^ = d q,  d = max |x| / 127 of 32 neighbours (stored in float16),  q = round(x 127 / max |x|)
    blocks of 256    x^ = d q,  d = -m / 127 with m the value of largest size of 256 neighbours (float32)
    BF16, F16        x rounded to that type                    F32    x

The rounding errors themselves are chaotic, but their size is not: a float32 model that rounds the same way is as far
from the exact model as llama.cpp is (measured: 0.90-1.06 times, for block types and BF16, tiny and real models).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.gguf_types import KINDS


def round_32(x: Tensor) -> Tensor:
    """Q8_0. Any shape whose size is a multiple of 32."""
    x_NB = x.reshape(-1, 32)
    top_N1 = x_NB.abs().amax(1, keepdim=True)
    q_NB = (x_NB * torch.where(top_N1 > 0, 127 / top_N1, 0.0)).round()
    return (q_NB * (top_N1 / 127).half().float()).reshape(x.shape)


def round_256(x: Tensor) -> Tensor:
    """Q8_K. Any shape whose size is a multiple of 256."""
    x_NB = x.reshape(-1, 256)
    top_N1 = x_NB.gather(1, x_NB.abs().argmax(1, keepdim=True))
    q_NB = (x_NB * torch.where(top_N1 != 0, -127 / top_N1, 0.0)).round().clamp(max=127)
    return (q_NB * (-top_N1 / 127)).reshape(x.shape)


def rounder(kind: str) -> Callable[[Tensor], Tensor]:
    """The rounding that goes with a weight's storage type."""
    if kind in ("F32", "F64"):
        return lambda x: x
    if kind in ("BF16", "F16"):
        dtype = torch.bfloat16 if kind == "BF16" else torch.float16
        return lambda x: x.to(dtype).float()
    return round_256 if KINDS[kind].block == 256 else round_32


@contextlib.contextmanager
def rounded(model: nn.Module, checkpoint: Any) -> Iterator[None]:
    """While it lasts, the linear layers of `model` round their inputs as llama.cpp does for `checkpoint`'s types."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = checkpoint.tied.get(f"{name}.weight", f"{name}.weight")
            apply = rounder(checkpoint.tensors[weight].kind)
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, apply=apply: (apply(inputs[0]),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
