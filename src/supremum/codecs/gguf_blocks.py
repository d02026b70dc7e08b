"""GGUF blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4; and of 64: Q2_0.

    w_hat = d * level[code] (+ m)

    type    level                 bytes of a block, in order
    Q4_0    -8 .. 7               d fp16, codes 16
    Q4_1    0 .. 15, offset m     d fp16, m fp16, codes 16
    Q5_0    -16 .. 15             d fp16, fifth bits 4, codes 16
    Q5_1    0 .. 31, offset m     d fp16, m fp16, fifth bits 4, codes 16
    Q8_0    -127 .. 127           d fp16, codes 32
    IQ4_NL  a table of 16         d fp16, codes 16
    MXFP4   doubled E2M1          e, codes 16; d = 2^(e - 128)
    Q2_0    -1 .. 2               d fp16, codes 16

`pack` gives {"blocks": uint8 (O, bytes of a row)}, exactly a row of a GGUF tensor. d may be negative except in MXFP4:
the levels are not symmetric, so its sign is worth something. Zero and fp16 subnormals are allowed, Inf and NaN cannot
occur. `decode_grid` equals `gguf.dequantize` of the bytes bit for bit, and of Q2_0, which that library lacks, ggml's decoder:
a product of d and a level is exact in float32.

Source: ggml/src/ggml-quants.c and ggml-common.h (https://github.com/ggml-org/ggml), and the `gguf` library's quants.py.
The machinery here (`Plane`, `Blocks`) also serves the 256-weight types in gguf_k.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from . import Grid, register

F16_MAX = 65504.0
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)


def to_f16(x: Tensor) -> Tensor:
    """The nearest finite float16."""
    assert not x.isnan().any(), "a scale or an offset is not a number"
    return x.clamp(-F16_MAX, F16_MAX).half()


@dataclass(frozen=True)
class Plane:
    """Some bits of every number of a block, woven into bytes.

    The numbers are cut into `chunks`, a chunk into 8 / width runs; a byte holds the bits [shift, shift + width) of the
    numbers that have the same place in the runs of a chunk, the first run lowest.
    """

    shift: int
    width: int
    chunks: int

    def weave(self, numbers_NB: Tensor) -> Tensor:
        """uint8 (N, B) -> uint8 (N, B width / 8)."""
        runs = 8 // self.width
        bits = numbers_NB if self.shift == 0 else numbers_NB >> self.shift
        bits = (bits & ((1 << self.width) - 1)).view(len(numbers_NB), self.chunks, runs, -1)
        woven = bits[:, :, 0]
        for run in range(1, runs):
            woven = woven | (bits[:, :, run] << (self.width * run))
        return woven.reshape(len(numbers_NB), -1)

    def unweave(self, bytes_NW: Tensor) -> Tensor:
        """The inverse of `weave`: uint8 (N, B), the plane's bits in their place, the others zero."""
        shifts = torch.arange(0, 8, self.width, dtype=torch.uint8)[:, None]
        bits = bytes_NW.reshape(len(bytes_NW), self.chunks, 1, -1) >> shifts
        return ((bits & ((1 << self.width) - 1)) << self.shift).reshape(len(bytes_NW), -1)


def unweave(planes: Iterable[Plane], parts: Iterable[Tensor]) -> Tensor:
    """The numbers (N, B) uint8 whose planes lie in `parts`."""
    return reduce(torch.bitwise_or, (plane.unweave(part) for plane, part in zip(planes, parts, strict=True)))


class Blocks:
    """A block type as a sequence of sections: planes of the codes, and named fields of so many bytes.

    Subclasses say how fields become bytes (`encode`, `decode`) and scales (`grid`), and which fields serve a wish
    (`project`). Every field has the leading dimension O; N counts blocks.
    """

    rows, zero_points, book = 1, False, None

    def __init__(
        self,
        name: str,
        levels: Sequence[int],
        sections: Sequence[Plane | tuple[str, int]],
        *,
        block: int = 32,
        step: int = 32,
    ) -> None:
        self.name, self.block, self.step = name, block, step
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.sections = tuple(sections)
        self.sizes = [s.width * block // 8 if isinstance(s, Plane) else s[1] for s in self.sections]
        self.affine = any(s[0] in ("m", "dmin") for s in self.sections if not isinstance(s, Plane))

    def nbytes(self, shape_OI: tuple[int, int]) -> int:
        """Bytes of the blocks of a matrix of this shape."""
        return shape_OI[0] * (shape_OI[1] // self.block) * sum(self.sizes)

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """The storable grid nearest to the wish; see `Codec`."""
        raise TypeError("a block type defines which fields serve a wish")

    def grid(self, fields: dict[str, Tensor]) -> Grid:
        """Scales and offsets from the stored fields, with the operations of ggml's decoder."""
        raise TypeError("a block type defines its scales")

    def encode(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fields -> the bytes (N, size) of each named section. Here: fp16 numbers."""
        return {key: value.reshape(-1, 1).view(torch.uint8) for key, value in fields.items()}

    def decode(self, sections: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        """The inverse of `encode`."""
        return {key: value.contiguous().view(torch.float16).view(rows, -1) for key, value in sections.items()}

    def stored(self, codes_NB: Tensor) -> Tensor:
        """Codes (places in the sorted `levels`) -> the numbers that the format writes for them."""
        return codes_NB

    def codes(self, stored_NB: Tensor) -> Tensor:
        """The inverse of `stored`."""
        return stored_NB

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """{"blocks": uint8 (O, bytes of a row)}, as a GGUF file holds the tensor."""
        stored_NB = self.stored(codes_OI.reshape(-1, self.block))
        fields = self.encode(grid.fields)
        parts = [s.weave(stored_NB) if isinstance(s, Plane) else fields[s[0]] for s in self.sections]
        return {"blocks": torch.cat(parts, dim=-1).view(codes_OI.shape[0], -1)}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """(codes_OI uint8, grid) of the blocks that `pack` wrote, or any other encoder."""
        parts = tensors["blocks"].reshape(-1, sum(self.sizes)).split(self.sizes, dim=-1)
        pairs = list(zip(self.sections, parts, strict=True))
        planes, woven = zip(*((s, part) for s, part in pairs if isinstance(s, Plane)), strict=True)
        fields = self.decode({s[0]: part for s, part in pairs if not isinstance(s, Plane)}, shape_OI[0])
        return self.codes(unweave(planes, woven)).view(shape_OI), self.grid(fields)


class Plain(Blocks):
    """One fp16 scale a block, and perhaps an fp16 offset."""

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Both numbers to the nearest float16, signs kept."""
        fields = {"d": to_f16(scale_OG)}
        if self.affine:
            fields["m"] = to_f16(torch.zeros_like(scale_OG) if offset_OG is None else offset_OG)
        return self.grid(fields)

    def grid(self, fields: dict[str, Tensor]) -> Grid:
        return Grid(fields["d"].float(), fields["m"].float() if self.affine else None, fields)


class Q8(Plain):
    """Codes 0 .. 254 are written as the signed bytes -127 .. 127; a foreign -128 is read as -127."""

    def stored(self, codes_NB: Tensor) -> Tensor:
        return codes_NB + 129

    def codes(self, stored_NB: Tensor) -> Tensor:
        return (stored_NB.view(torch.int8).clamp(min=-127) + 127).view(torch.uint8)


class MX4(Blocks):
    """E2M1 numbers under a shared power of two (OCP Microscaling Formats 1.0).

    ggml doubles the numbers and halves the power, so that the levels are whole.
    """

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """The power of two p with 0.6 p < |scale| <= 1.2 p, within 2^-126 .. 2^124: p is normal and 12 p finite.

        Clipping costs more than coarseness: of the thresholds 1.05, 1.1 .. 1.7, 1.2 left Gaussian and Laplace blocks
        the least squared error, whether the wish was max|w| / 12 or the best free scale (ggml's choice amounts to 4/3).
        """
        assert not scale_OG.isnan().any(), "a scale is not a number"
        exponent = (scale_OG.double().abs() / 1.2).log2().ceil().clamp(-126, 124)
        return self.grid({"e": (exponent + 128).to(torch.uint8)})

    def grid(self, fields: dict[str, Tensor]) -> Grid:
        e = fields["e"].int()
        bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)  # ggml_e8m0_to_fp32_half
        return Grid(bits.view(torch.float32), None, fields)

    def encode(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"e": fields["e"].reshape(-1, 1)}

    def decode(self, sections: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        return {"e": sections["e"].reshape(rows, -1)}

    def stored(self, codes_NB: Tensor) -> Tensor:
        return torch.where(codes_NB < 7, 15 - codes_NB, codes_NB - 7)  # sign and magnitude

    def codes(self, stored_NB: Tensor) -> Tensor:
        return torch.where(stored_NB < 8, stored_NB + 7, 15 - stored_NB)


_d, _m, _low, _fifth = ("d", 2), ("m", 2), Plane(0, 4, 1), Plane(4, 1, 4)

for _codec in (
    Plain("Q4_0", range(-8, 8), [_d, _low]),
    Plain("Q4_1", range(16), [_d, _m, _low]),
    Plain("Q5_0", range(-16, 16), [_d, _fifth, _low]),
    Plain("Q5_1", range(32), [_d, _m, _fifth, _low]),
    Q8("Q8_0", range(-127, 128), [_d, Plane(0, 8, 1)]),
    Plain("IQ4_NL", IQ4_VALUES, [_d, _low]),
    MX4("MXFP4", E2M1_DOUBLED, [("e", 1), _low]),
    Plain("Q2_0", range(-1, 3), [_d, Plane(0, 2, 16)], block=64, step=64),
):
    register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
