"""Floating-point numbers of 4, 6 and 8 bits under shared scales, in the layouts of compressed-tensors.

    w_hat = scale * q,   q = (-1)^s 2^(e - bias) (1 + m / 2^M), and for e = 0 the multiples of 2^(1 - bias - M)

    codec           q      scale                                                        tensors
    mxfp4-g32       E2M1   a power of two (E8M0) for 32 columns (OCP Microscaling 1.0)   packed, scale
    mxfp6-g32       E2M3   the same                                                     packed, scale
    mxfp8-g32       E4M3   the same                                                     weight, scale
    nvfp4-g16       E2M1   E4M3 for 16 columns, over a power of two for the matrix       packed, scale, global_scale
    fp8-channel     E4M3   bfloat16 for a row                                           weight, scale
    fp8-channel-a8  E4M3   the same; inputs are rounded to E4M3 too                     weight, scale
    fp8-b128        E4M3   bfloat16 for 128 rows and 128 columns                        weight, scale

(https://github.com/vllm-project/compressed-tensors 0.20: compressors/mxfp4, mxfp6, mxfp8, nvfp4, naive_quantized. It has no
layout for E3M2 and E5M2.) Levels are q times 2, 8 or 512, so that they are whole. A product of q and a power of two, or of
E2M1 and E4M3, is exact in bfloat16, which the library decodes microscaling formats and NVFP4 to; fp8 products are exact in
float32 and rounded once by a model in bfloat16. NVFP4's factor for the matrix is free; taken as a power of two it costs no
precision, since E4M3 is a floating point, and leaves every product exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Grid, register
from .integer import pack_bits, unpack_bits
from .layout import Layout, Shape, to_bf16

E4M3_MAX = 448.0
LOW, HIGH = -110, 119  # exponents of power-of-two scales: every level of every format stays normal and finite


def magnitudes(mantissa: int, codes: int) -> list[int]:
    """The `codes` smallest numbers without sign, in units of the least one above zero."""
    steps = 1 << mantissa
    return [m if e == 0 else (steps + m) << (e - 1) for e, m in (divmod(code, steps) for code in range(codes))]


E2M1, E2M3, E4M3 = magnitudes(1, 8), magnitudes(3, 32), magnitudes(3, 127)  # E4M3's last code is no number
UNITS = {4: 2.0, 6: 8.0, 8: 512.0}  # levels by bits: what q is multiplied with


class Float(Layout):
    """Numbers of sign and magnitude. Subclasses say how scales are stored."""

    def __init__(self, name: str, bits: int, group: int) -> None:
        sizes = {4: E2M1, 6: E2M3, 8: E4M3}[bits]
        levels = [-size for size in reversed(sizes[1:])] + sizes
        super().__init__(name, torch.tensor(levels, dtype=torch.float32), bits, group)
        self.unit = UNITS[bits]

    def numbers(self, codes_OI: Tensor) -> dict[str, Tensor]:
        """The stored numbers: E4M3 by itself, smaller ones packed with the sign as their highest bit."""
        if self.bits == 8:
            return {"weight": (self.levels[codes_OI.long()] / self.unit).to(torch.float8_e4m3fn)}
        zero = len(self.levels) // 2
        signed_OI = torch.where(codes_OI < zero, (1 << (self.bits - 1)) + zero - codes_OI, codes_OI - zero)
        return {"weight_packed": pack_bits(signed_OI, self.bits).view(torch.uint8)}

    def codes(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> Tensor:
        """The inverse of `numbers`; the negative zero of another writer is zero."""
        if self.bits == 8:
            return torch.searchsorted(self.levels, tensors["weight"].float() * self.unit).to(torch.uint8)
        signed_OI = unpack_bits(tensors["weight_packed"].view(torch.int32), self.bits, shape_OI[1])
        zero, sign = len(self.levels) // 2, 1 << (self.bits - 1)
        return torch.where(signed_OI >= sign, zero + sign - signed_OI, zero + signed_OI)

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        rows, columns = shape_OI
        if self.bits == 8:
            return {"weight": (torch.float8_e4m3fn, (rows, columns))}
        return {"weight_packed": (torch.uint8, (rows, columns * self.bits // 8))}

    def weights(self) -> dict[str, object]:
        return super().weights() | {"type": "float"}


class Microscaled(Float):
    """A power of two for 32 columns, stored as its exponent plus 127."""

    bfloat16 = True

    def __init__(self, bits: int) -> None:
        super().__init__(f"mxfp{bits}-g32", bits, 32)
        self.format = "mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
        top = self.levels[-2:].tolist()
        self.reach = float((1.5 * top[1] - 0.5 * top[0]) / top[1])  # what still rounds to the highest level, in units of it

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """The power of two p with reach p / 2 < |scale| <= reach p: clipping costs more than coarseness."""
        assert offset_OG is None and not scale_OG.isnan().any(), self.name
        exponent_OG = (scale_OG.double().abs() * self.unit / self.reach).log2().ceil().clamp(LOW, HIGH)
        return self._grid((exponent_OG + 127).to(torch.uint8))

    def _grid(self, stored_OG: Tensor) -> Grid:
        return Grid((stored_OG.float() - 127).exp2() / self.unit, None, {"exponent": stored_OG})

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        return self.numbers(codes_OI) | {"weight_scale": grid.fields["exponent"].contiguous()}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        return self.codes(tensors, shape_OI), self._grid(tensors["weight_scale"])

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return super().stored(shape_OI) | {"weight_scale": (torch.uint8, (shape_OI[0], self.groups(shape_OI)))}

    def weights(self) -> dict[str, object]:
        return super().weights() | {"scale_dtype": "torch.uint8"}


class Nvidia(Float):
    """E4M3 scales of 16 columns, divided by one power of two that brings the largest near the end of E4M3's range.

    The power is that of all rows projected together. Where rows of two projections are mixed, the smaller one holds for all:
    scales 2^15 below the largest then lose bits.
    """

    format = "nvfp4-pack-quantized"
    bfloat16 = True

    def __init__(self) -> None:
        super().__init__("nvfp4-g16", 4, 16)

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """The nearest E4M3 scales above zero, without sign."""
        assert offset_OG is None and not scale_OG.isnan().any(), self.name
        scale_OG = (scale_OG.float().abs() * self.unit).clamp(max=2.0**HIGH)
        fraction, exponent = torch.frexp(scale_OG.amax().clamp_min(2.0**(LOW + 18)))  # the least is 2^LOW, too
        power = 9 - exponent - (fraction > E4M3_MAX / 512).int()  # the largest scale times 2^power: above 224, at most 448
        return self._grid(scale_OG, power.expand(len(scale_OG), 1).contiguous())

    def _grid(self, scale_OG: Tensor, power_O1: Tensor) -> Grid:
        return Grid(self._small(scale_OG, power_O1).float() * (-power_O1.float()).exp2() / self.unit, None,
                    {"power": power_O1})

    def _small(self, scale_OG: Tensor, power_O1: Tensor) -> Tensor:
        return (scale_OG * power_O1.float().exp2()).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn)

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        power = grid.fields["power"].amin()
        return self.numbers(codes_OI) | {
            "weight_scale": self._small(grid.scale_OG * self.unit, power.view(1, 1)),
            "weight_global_scale": power.float().exp2().view(1),
        }

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """Of any writer: a factor that is no power of two is divided by as the library does."""
        factor = tensors["weight_global_scale"].float()
        power_O1 = factor.log2().round().int().expand(shape_OI[0], 1).contiguous()
        return self.codes(tensors, shape_OI), Grid(tensors["weight_scale"].float() / factor / self.unit, None,
                                                   {"power": power_O1})

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        return super().stored(shape_OI) | {
            "weight_scale": (torch.float8_e4m3fn, (shape_OI[0], self.groups(shape_OI))),
            "weight_global_scale": (torch.float32, (1,))}

    def weights(self) -> dict[str, object]:
        return super().weights() | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}


class Float8(Float):
    """E4M3 under bfloat16 scales, each for `rows` rows and `group` columns (0: the whole row)."""

    format = "float-quantized"

    def __init__(self, name: str, rows: int, group: int) -> None:
        super().__init__(name, 8, group)
        self.rows = rows
        self.vllm = rows == 1

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to bfloat16 without sign, each by itself: the rows of a tile are given the same."""
        assert offset_OG is None, self.name
        return Grid(to_bf16(scale_OG.abs() * self.unit).clamp_min(2.0**LOW) / self.unit)

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        scale_TG = grid.scale_OG[::self.rows]
        assert torch.equal(scale_TG.repeat_interleave(self.rows, 0)[:len(codes_OI)], grid.scale_OG), "a tile has two scales"
        return self.numbers(codes_OI) | {"weight_scale": (scale_TG * self.unit).bfloat16()}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        scale_OG = tensors["weight_scale"].float().repeat_interleave(self.rows, 0)[:shape_OI[0]]
        return self.codes(tensors, shape_OI), Grid(scale_OG / self.unit)

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        tiles = -(-shape_OI[0] // self.rows)
        return super().stored(shape_OI) | {"weight_scale": (torch.bfloat16, (tiles, self.groups(shape_OI)))}

    def weights(self) -> dict[str, object]:
        entry = super().weights()
        if self.rows == 1:
            return entry
        del entry["group_size"]
        return entry | {"strategy": "block", "block_structure": [self.rows, self.step]}


for _codec in (Microscaled(4), Microscaled(6), Microscaled(8), Nvidia(), Float8("fp8-channel", 1, 0),
               Float8("fp8-channel-a8", 1, 0), Float8("fp8-b128", 128, 128)):  # fmt: skip
    register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
