"""Integer grids with one scale per group of columns, in the layout of GPTQ checkpoints, version 1.

    w_hat = scale * q,   q in [-2^(b-1), 2^(b-1) - 1],   stored as q + 2^(b-1)         "gptq{b}-g{group}", "gptq{b}-channel"

for b = 2, 3, 4, 8 bits and groups of 32, 64 or 128 columns; a `channel` codec has one scale for a whole row (`step` 0).

Stored tensors (https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear; AutoGPTQ and Exllama read the same):

    qweight    int32 (I b / 32, O)          a column's codes, one input after the other, as a little-endian stream
    qzeros     int32 (G, ceil(O b / 32))    the code that means zero, 2^(b-1), less one: version 1 adds it when it reads
    scales     float16 (G, O)
    g_idx      int32 (I,)                   the group of each input

Scales are float16 numbers that are bfloat16 numbers too: runtimes cast them to the type that they compute in, and no cast
may move a weight. Eight bits of significand also make scale * q exact in float16 up to 4 bits. Scales keep the sign of the
wish, as in codecs/integer.py: every reader multiplies, and the range has one level more on the negative side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Grid, register
from .integer import pack_bits, unpack_bits
from .layout import Shape, nbytes_of, to_bf16

BITS = (2, 3, 4, 8)
BLOCK = 32  # inputs (and outputs) that readers unpack together
TINY = 2.0**-17  # from here on float16 has every bfloat16 number up to its largest


class GPTQ:
    """b-bit integers; `group` columns share a scale, 0 means the whole row."""

    rows, affine, zero_points, book = 1, False, False, None

    def __init__(self, bits: int, group: int) -> None:
        assert bits in BITS
        self.name = f"gptq{bits}-{f'g{group}' if group else 'channel'}"
        self.bits, self.step, self.block = bits, group, max(group, BLOCK)
        self.middle = 1 << (bits - 1)
        self.levels = torch.arange(-self.middle, self.middle, dtype=torch.float32)
        self.huge = 2.0 ** (16 - bits)  # times any level still finite in float16

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales to numbers of both 16-bit types; there are no offsets."""
        assert offset_OG is None, self.name
        return Grid(to_bf16(scale_OG, TINY, self.huge))

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors of one linear layer, without the layer's prefix."""
        rows, columns = codes_OI.shape
        groups = grid.scale_OG.shape[1]
        zeros_GO = torch.full((groups, rows), self.middle - 1, dtype=torch.uint8)
        return {
            "qweight": pack_bits(codes_OI, self.bits).T.contiguous(),
            "qzeros": pack_bits(zeros_GO, self.bits),
            "scales": grid.scale_OG.T.half().contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
        }

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """(codes_OI uint8, grid)."""
        codes_OI = unpack_bits(tensors["qweight"].T.contiguous(), self.bits, shape_OI[1])
        return codes_OI, Grid(tensors["scales"].T.float().contiguous())

    def stored(self, shape_OI: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
        """Type and shape of each tensor that `pack` gives for a matrix of this shape."""
        rows, columns = shape_OI
        groups = columns // self.step if self.step else 1
        return {"qweight": (torch.int32, (columns * self.bits // 32, rows)),
                "qzeros": (torch.int32, (groups, -(-rows * self.bits // 32))),
                "scales": (torch.float16, (groups, rows)), "g_idx": (torch.int32, (columns,))}

    def nbytes(self, shape_OI: tuple[int, int]) -> int:
        """Bytes of all tensors of `pack`."""
        return nbytes_of(self.stored(shape_OI))


for _bits in BITS:
    for _group in (32, 64, 128, 0):
        _codec = GPTQ(_bits, _group)
        register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
