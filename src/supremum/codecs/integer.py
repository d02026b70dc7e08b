"""Integer grids with one scale per group of columns, in the layouts of compressed-tensors.

    w_hat = scale * q              "int{b}-g{group}", "int{b}-channel": q in [-2^(b-1), 2^(b-1) - 1]
                                   "ternary-g{group}", "ternary-channel": q in {-1, 0, 1}, stored as 2 bits
                                   "int8-channel-a8": the same as int8-channel, and inputs are rounded to int8 (W8A8)
    w_hat = scale * (q - zero)     "uint{b}-g{group}", "uint{b}-channel": q and zero in [0, 2^b - 1]

for b = 2..8 bits (2, 3, 4, 8 with zero points) and groups of 32, 64 or 128 columns. A `channel` codec has one scale for a
whole row, whatever its length: its `step` is 0, which stands for in_features. Scales are bfloat16. They keep the sign of the
wish, because the range has one level more on the negative side and a negative scale turns it round. They are never zero or
subnormal, which some kernels flush or divide by: a group of zeros gets the smallest normal number.

Stored tensors (https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized):

    weight_packed      int32 (O, ceil(I b / 32))    a row's codes as one little-endian stream of b-bit numbers
    weight_scale       bfloat16 (O, G)
    weight_shape       int64 (2,)
    weight_zero_point  int32 (ceil(O b / 32), G)    a column's zero points as such a stream

and unpacked (`int-quantized`): weight int8 (O, I), weight_scale bfloat16 (O, 1).

Everything is exact in float32 (8-bit significand times 8-bit level); a runtime that multiplies in bfloat16, as stock
Transformers does, rounds the product once more. The library multiplies zero-point grids in the scale's type always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Grid, register
from .layout import HUGE, Layout, Shape, grouping, to_bf16

GROUPS = (32, 64, 128, 0)


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


class Integer(Layout):
    """b-bit integers; `group` columns share a scale, 0 means the whole row. `low`: the lowest code, as it is stored."""

    format = "pack-quantized"

    def __init__(self, name: str, bits: int, group: int, levels: range | None = None) -> None:
        assert 2 <= bits <= 8
        half = 1 << (bits - 1)
        levels = levels or range(-half, half)
        super().__init__(f"{name}-{grouping(group)}", torch.tensor(levels, dtype=torch.float32), bits, group)
        self.low = levels[0] + half
        self.vllm = bits in (4, 8)

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to bfloat16; there are no offsets."""
        assert offset_OG is None, self.name
        return Grid(to_bf16(scale_OG))

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors that compressed-tensors stores for one linear layer, without the layer's prefix."""
        return {
            "weight_packed": pack_bits(codes_OI + self.low, self.bits),
            "weight_scale": grid.scale_OG.bfloat16(),
            "weight_shape": torch.tensor(codes_OI.shape, dtype=torch.int64),
        }

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """(codes_OI uint8, grid)."""
        codes_OI = unpack_bits(tensors["weight_packed"], self.bits, shape_OI[1])
        return codes_OI - self.low, Grid(tensors["weight_scale"].float())

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = shape_OI
        return {"weight_packed": (torch.int32, (rows, -(-columns * self.bits // 32))),
                "weight_scale": (torch.bfloat16, (rows, self.groups(shape_OI))), "weight_shape": (torch.int64, (2,))}


class Asymmetric(Integer):
    """Integers with a zero point, a code itself, a group: the grid always holds the number zero."""

    affine = zero_points = alone = True

    def __init__(self, name: str, bits: int, group: int) -> None:
        super().__init__(name, bits, group)
        self.levels = torch.arange(1 << bits, dtype=torch.float32)
        self.vllm = False

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to bfloat16, zero points to the nearest code; a range without zero is widened until it holds it."""
        top = len(self.levels) - 1
        scale_OG = scale_OG.double().clamp(-HUGE, HUGE)
        offset_OG = torch.zeros_like(scale_OG) if offset_OG is None else offset_OG.double().clamp(-top * HUGE, top * HUGE)
        ends = offset_OG, offset_OG + top * scale_OG
        low_OG = torch.minimum(*ends).clamp(max=0)
        high_OG = torch.maximum(*ends).clamp(min=0)
        outside = (torch.minimum(*ends) > 0) | (torch.maximum(*ends) < 0)
        sign = torch.where(scale_OG < 0, -1.0, 1.0)
        scale_OG = torch.where(outside, sign * (high_OG - low_OG) / top, scale_OG)
        first_OG = torch.where(scale_OG < 0, high_OG, low_OG)  # where code 0 lies
        zero_OG = torch.where(scale_OG == 0, 0.0, -first_OG / scale_OG).round().clamp(0, top)
        return self._grid(to_bf16(scale_OG), zero_OG.to(torch.uint8))

    def _grid(self, scale_OG: Tensor, zero_OG: Tensor) -> Grid:
        return Grid(scale_OG, -scale_OG * zero_OG.float(), {"zero": zero_OG})

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        zero = pack_bits(grid.fields["zero"].T, self.bits).T
        return super().pack(codes_OI, grid) | {"weight_zero_point": zero.contiguous()}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        codes_OI, grid = super().unpack(tensors, shape_OI)
        zero_OG = unpack_bits(tensors["weight_zero_point"].T.contiguous(), self.bits, shape_OI[0]).T.contiguous()
        return codes_OI, self._grid(grid.scale_OG, zero_OG)

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        words = -(-shape_OI[0] * self.bits // 32)
        return super().stored(shape_OI) | {"weight_zero_point": (torch.int32, (words, self.groups(shape_OI)))}


class Bytes(Layout):
    """int8 as it is, a scale a row; the layer's inputs are rounded to int8 too."""

    format = "int-quantized"
    vllm = True

    def __init__(self) -> None:
        super().__init__("int8-channel-a8", torch.arange(-128.0, 128.0), 8, 0)

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to bfloat16; there are no offsets."""
        assert offset_OG is None, self.name
        return Grid(to_bf16(scale_OG))

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        return {"weight": (codes_OI.short() - 128).to(torch.int8), "weight_scale": grid.scale_OG.bfloat16()}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        return (tensors["weight"].short() + 128).to(torch.uint8), Grid(tensors["weight_scale"].float())

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return {"weight": (torch.int8, shape_OI), "weight_scale": (torch.bfloat16, (shape_OI[0], 1))}


for _codec in (
    *(Integer(f"int{bits}", bits, group) for bits in range(2, 9) for group in GROUPS),
    *(Asymmetric(f"uint{bits}", bits, group) for bits in (2, 3, 4, 8) for group in GROUPS),
    *(Integer("ternary", 2, group, range(-1, 2)) for group in GROUPS),
    Bytes(),
):
    register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
