"""How a codec of the target `compressed-tensors` lies in a file and in config.json: one class a format, told in one place.

    config.json       config_groups: {targets, weights: {num_bits, type, strategy, ...}, format, input_activations?}
    model.safetensors the tensors of `stored`, each behind the layer's name and a dot

(https://github.com/vllm-project/compressed-tensors: quantization/quant_args.py names the settings, compressors/ the tensors.)
A codec whose scheme also rounds the layer's inputs is called like its weights and "-a8" (activations.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TINY = 2.0**-126  # smallest normal bfloat16
HUGE = 2.0**119  # times any level still finite
TOKEN = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}  # of inputs, a scale a token

Shape = tuple[int, ...]


def to_bf16(scale_OG: Tensor, least: float = TINY, most: float = HUGE) -> Tensor:
    """The nearest bfloat16 whose size is from `least` to `most`, sign kept, as float32."""
    assert not scale_OG.isnan().any(), "a scale is not a number"
    size = scale_OG.float().abs().clamp(least, most).bfloat16().float()
    return torch.where(scale_OG < 0, -size, size)


def nbytes_of(stored: Mapping[str, tuple[torch.dtype, Shape]]) -> int:
    """Bytes of tensors of these types and shapes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in stored.values())


class Layout:
    """What every codec here has; see `supremum.codecs.Codec` for the numbers."""

    rows = 1
    affine = zero_points = False
    book = None
    format: str  # of compressed-tensors: "pack-quantized"
    alone = False  # whether stock Transformers reads it only where no layer of the file has another codec
    bfloat16 = False  # whether the library decodes to bfloat16 whatever the model computes in
    vllm = False  # whether vLLM has kernels for it

    def __init__(self, name: str, levels: Tensor, bits: int, group: int) -> None:
        self.name, self.levels, self.bits = name, levels, bits
        self.step, self.block = group, max(group, 1)

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Type and shape of each tensor that `pack` gives for a matrix of this shape."""
        raise TypeError("a codec says what it stores")

    def nbytes(self, shape_OI: Shape) -> int:
        """Bytes of all tensors of `pack`."""
        return nbytes_of(self.stored(shape_OI))

    def groups(self, shape_OI: Shape) -> int:
        """Scales of a row."""
        return shape_OI[1] // self.step if self.step else 1

    def weights(self) -> dict[str, Any]:
        """The scheme's `weights`."""
        kind = {"num_bits": self.bits, "type": "int", "symmetric": not self.zero_points, "dynamic": False}
        return kind | ({"strategy": "group", "group_size": self.step} if self.step else {"strategy": "channel"})

    def scheme(self) -> dict[str, Any]:
        """The entry of config_groups, without its targets."""
        entry: dict[str, Any] = {"weights": self.weights(), "format": self.format}
        if self.name.endswith("-a8"):
            entry["input_activations"] = TOKEN | {"type": entry["weights"]["type"]}
        return entry


def grouping(group: int) -> str:
    """The end of a codec's name: "g64", or "channel" for a scale a row."""
    return f"g{group}" if group else "channel"
