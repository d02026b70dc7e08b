"""Inputs of matrix products rounded to 8 bits, as compressed-tensors rounds them: a scale a token, found on the way.

    int8    x^ = s q,  s = max |x| / 127.5,  q = round(x / s) within -128 .. 127
    E4M3    x^ = s q,  s = max |x| / 448,    q = the nearest E4M3 number to x / s

(https://github.com/vllm-project/compressed-tensors, quantization/utils/helpers.py and lifecycle/forward_helpers.py, strategy
"token".) The operations are the library's, so in the same arithmetic the numbers are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

E4M3 = torch.finfo(torch.float8_e4m3fn)


def round_int8(x: Tensor) -> Tensor:
    """Any shape; the last dimension is one token's."""
    scale = _scale(x, 127.5)
    return (x / scale).clamp(-128, 127).round() * scale


def round_e4m3(x: Tensor) -> Tensor:
    """Any shape; the last dimension is one token's."""
    scale = _scale(x, E4M3.max)
    return (x / scale).clamp(E4M3.min, E4M3.max).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _scale(x: Tensor, top: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / top
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)


def rounder(codec: str | None) -> Callable[[Tensor], Tensor] | None:
    """What a layer of this codec does to its inputs; None: nothing."""
    if codec is None or not codec.endswith("-a8"):
        return None
    return round_int8 if codec.startswith("int8") else round_e4m3


def round_inputs(layer: nn.Module, codec: str | None) -> Any:
    """Make `layer` round its inputs as its codec says; returns the hook, or None. Gradients pass as if it did not."""
    apply = rounder(codec)
    if apply is None:
        return None

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        with torch.no_grad():
            rounded = apply(args[0])
        return (args[0] + (rounded - args[0]).detach() if args[0].requires_grad else rounded,)

    return layer.register_forward_pre_hook(before)
