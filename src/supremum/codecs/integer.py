"""Integer grids with one scale per group of columns, in the layout of compressed-tensors' `pack-quantized`.

    w_hat = scale * q,   q in [-2^(b-1), 2^(b-1) - 1]                            "int{b}-g{group}", "int{b}-channel"

for b = 2..8 bits and groups of 32, 64 or 128 columns. A `channel` codec has one scale for a whole row, whatever its
length: its `step` is 0, which stands for in_features. Scales are bfloat16. They keep the sign of the wish, because the
range has one level more on the negative side and a negative scale turns it round. They are never zero or
subnormal, which some kernels flush or divide by: a group of zeros gets the smallest normal number.

Stored tensors (https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized):

    weight_packed    int32 (O, ceil(I b / 32))    a row's codes as one little-endian stream of b-bit numbers
    weight_scale     bfloat16 (O, G)
    weight_shape     int64 (2,)

Everything is exact in float32 (8-bit significand times 8-bit level); a runtime that multiplies in bfloat16, as stock
Transformers does, rounds the product once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Grid, register

TINY = 2.0**-126  # smallest normal bfloat16
HUGE = 2.0**119  # times any level still finite


def to_bf16(scale_OG: Tensor, least: float = TINY, most: float = HUGE) -> Tensor:
    """The nearest bfloat16 whose size is from `least` to `most`, sign kept, as float32."""
    assert not scale_OG.isnan().any(), "a scale is not a number"
    size = scale_OG.float().abs().clamp(least, most).bfloat16().float()
    return torch.where(scale_OG < 0, -size, size)


def _merges(bits: int) -> list[tuple[int, int, int]]:
    """(mask of the lower fields, field width, gap to close) of the steps that push eight b-bit numbers together."""
    steps = []
    for slot in (8, 16, 32):
        width = bits * slot // 8
        mask = sum(((1 << width) - 1) << at for at in range(0, 64, 2 * slot))
        steps.append((mask, width, slot - width))
    return steps


def pack_bits(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 numbers below 2^bits (R, C) -> int32 (R, ceil(C bits / 32)): number i begins at bit i * bits of its row.

    Eight numbers at a time: neighbours in a 64-bit word are pushed together in three steps.
    """
    rows, columns = codes_RC.shape
    words = -(-columns * bits // 32)
    stream = _padded(codes_RC, columns + -columns % 32)
    if bits < 8:
        octets = stream.view(torch.int64)
        for mask, width, gap in _merges(bits):
            octets = (octets & mask) | ((octets >> gap) & (mask << width))
        stream = octets.view(torch.uint8).view(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return stream.view(torch.int32)[:, :words].contiguous()


def unpack_bits(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (R, columns)."""
    rows = words_RW.shape[0]
    stream = _padded(words_RW, words_RW.shape[1] + -words_RW.shape[1] % bits).view(torch.uint8)
    if bits < 8:
        octets = torch.nn.functional.pad(stream.view(rows, -1, bits), (0, 8 - bits)).view(torch.int64)
        for mask, width, gap in reversed(_merges(bits)):
            octets = (octets & mask) | ((octets & (mask << width)) << gap)
        stream = octets.view(torch.uint8).view(rows, -1)
    return stream[:, :columns].contiguous()


def _padded(values_RC: Tensor, columns: int) -> Tensor:
    """A copy, row by row, zeros behind. (One row counts as contiguous at any stride, but may not be viewed as words.)"""
    padded_RC = values_RC.new_zeros(values_RC.shape[0], columns)
    padded_RC[:, :values_RC.shape[1]] = values_RC
    return padded_RC


class Integer:
    """b-bit integers; `group` columns share a scale, 0 means the whole row."""

    affine = False

    def __init__(self, bits: int, group: int) -> None:
        assert 2 <= bits <= 8
        self.name = f"int{bits}-{f'g{group}' if group else 'channel'}"
        self.bits, self.step, self.block = bits, group, max(group, 1)
        half = 1 << (bits - 1)
        self.levels = torch.arange(-half, half, dtype=torch.float32)

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to bfloat16; there are no offsets."""
        assert offset_OG is None, self.name
        return Grid(to_bf16(scale_OG))

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors that compressed-tensors stores for one linear layer, without the layer's prefix."""
        return {
            "weight_packed": pack_bits(codes_OI, self.bits),
            "weight_scale": grid.scale_OG.bfloat16(),
            "weight_shape": torch.tensor(codes_OI.shape, dtype=torch.int64),
        }

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """(codes_OI uint8, grid)."""
        return unpack_bits(tensors["weight_packed"], self.bits, shape_OI[1]), Grid(tensors["weight_scale"].float())

    def nbytes(self, shape_OI: tuple[int, int]) -> int:
        """Bytes of all tensors of `pack`, the 16 of weight_shape included."""
        rows, columns = shape_OI
        groups = columns // self.step if self.step else 1
        return 4 * rows * -(-columns * self.bits // 32) + 2 * rows * groups + 16


for _bits in range(2, 9):
    for _group in (32, 64, 128, 0):
        _codec = Integer(_bits, _group)
        register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
