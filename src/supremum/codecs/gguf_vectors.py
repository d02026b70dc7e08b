"""GGUF super-blocks of 256 weights whose codes are vectors out of a table: IQ1_S .. IQ3_S, 1.56 to 3.44 bits a weight.

    w_hat = d u (2 s_g + 1) * level[code],     u = 1/8 (IQ2_*), 1/4 (IQ3_XXS), 1 (IQ3_S), 1/8 (IQ1_M)
    w_hat = d (2 s_g + 1) * (level[code] +- 1/8)                                  IQ1_S, the sign +- with each s_g

    type     bits    table of    vectors  signs of 8     s_g         fields of a super-block, in order of their bits
    IQ1_S    1.5625  -1, 0, 1    2048     own            3 bits, 32  d 16; index 8 x 32; 8 x (index' 3 x 4, s 3, shift 1)
    IQ1_M    1.75    the same    2048     own            3 bits, 16  index 8 x 32; index' 4 x 32; 4 x (s 3 x 4, d 4)
    IQ2_XXS  2.0625  8, 25, 43   256      even           4 bits, 32  d 16; 8 x (index 8 x 4, sign 7 x 4, s 4)
    IQ2_XS   2.3125  8, 25, 43   512      even           4 bits, 16  d 16; 32 x (index 9, sign 7); s 4 x 16
    IQ2_S    2.5625  8, 25, 43   1024     any            4 bits, 16  d 16; index 8 x 32; sign 8 x 32; index' 2 x 32; s 4 x 16
    IQ3_XXS  3.0625  4 .. 62     256      even           4 bits, 32  d 16; index 8 x 64; 8 x (sign 7 x 4, s 4)
    IQ3_S    3.4375  1 .. 15     512      any            4 bits, 32  d 16; index 8 x 64; index' 1 x 64; sign 8 x 32; s 4 x 8

IQ3 has tables of 4 weights, the others of 8. index' are the index's higher bits. A unit of 8 weights has 8 sign bits; where
an even number of them is set, the highest is not stored. In IQ1_M each vector has its own +-1/8: here those are 4096 vectors
of -9, -7, -1, 1, 7, 9 under an eighth of the scale, the shift's bit above the index's.

The tables are read from the `gguf` library. `decode_grid` equals `gguf.dequantize` of the bytes: all products are exact.
Source: ggml/src/ggml-quants.c and ggml-common.h (https://github.com/ggml-org/ggml), and the `gguf` library's quants.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from gguf import quants
from torch import Tensor

from . import UNIT, Book, Grid, register
from .gguf_k import share

BLOCK = 256
SHIFT = 0.125  # of the levels of IQ1
Signs = Literal["own", "any", "even"]
Fields = tuple[tuple[str, int, int], ...]  # (field, bits of a number, numbers)
Layout = tuple[tuple[int, Fields], ...]  # so many times these fields, one after the other


def table(kind: str) -> Tensor:
    """The vectors of a type, float32 (K, V), as the `gguf` library holds them; IQ1_M's shifted up, then shifted down."""
    found = getattr(quants, kind)
    found.init_grid()
    points_KV = torch.from_numpy(found.grid.copy()).float().flatten(0, 2)
    return torch.cat([points_KV / SHIFT + 1, points_KV / SHIFT - 1]) if kind == "IQ1_M" else points_KV


def places(layout: Layout) -> dict[str, Tensor]:
    """Where in a block's bits, lowest first, the bits of each field's numbers lie: (numbers, bits)."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for times, fields in layout:
        parts: dict[str, list[Tensor]] = {}
        for _ in range(times):
            for field, bits, numbers in fields:
                parts.setdefault(field, []).append(torch.arange(start, start + bits * numbers).view(numbers, bits))
                start += bits * numbers
        for field, part in parts.items():
            found.setdefault(field, []).append(torch.cat(part))
    joined = {field: torch.cat(parts, 1) for field, parts in found.items()}
    return joined | {"d": joined["d"].view(1, 16)}  # IQ1_M has it in four parts


class Vectors:
    """One type. Codes are places in the sorted `levels`, as in every codec; N counts blocks, U = 8 weights are a unit."""

    rows, block = 1, BLOCK

    def __init__(self, name: str, signs: Signs, step: int, quantum: float, layout: Layout) -> None:
        self.name, self.step, self.quantum = name, step, quantum
        points_KV = table(name)
        self.book: Book | None = Book(points_KV, signs)
        self.signs = signs
        self.places = places(layout)
        self.bits = sum(place.numel() for place in self.places.values())
        self.top = 2 ** (self.places["s"].shape[1] + 1) - 1
        self.affine = self.zero_points = "shift" in self.places
        values = points_KV.unique()
        self.levels = values if signs == "own" else torch.cat([-values.flip(0), values])
        self._ranks_KV = torch.searchsorted(values, points_KV).to(torch.uint8)
        self._base_V = len(values) ** torch.arange(points_KV.shape[1])
        self._index = torch.full((len(values) ** points_KV.shape[1],), -1, dtype=torch.int16)
        self._index[self._ranks_KV.long() @ self._base_V] = torch.arange(len(points_KV), dtype=torch.int16)

    def nbytes(self, shape_OI: tuple[int, int]) -> int:
        """Bytes of the blocks of a matrix of this shape."""
        return shape_OI[0] * (shape_OI[1] // BLOCK) * self.bits // 8

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales as odd multiples of one float16 a super-block, without their sign; of an offset its sign is kept."""
        d_N, odd_NK = share(scale_OG.abs().reshape(-1, BLOCK // self.step) / self.quantum, self.top, signed=False, odd=True)
        fields = {"d": d_N.view(len(scale_OG), -1), "s": ((odd_NK - 1) / 2).to(torch.uint8).view_as(scale_OG)}
        if offset_OG is not None and self.affine:
            fields["shift"] = (offset_OG < 0).to(torch.uint8)
        elif self.affine:
            fields["shift"] = torch.zeros_like(fields["s"])
        return self._grid(fields)

    def _grid(self, fields: dict[str, Tensor]) -> Grid:
        d_OG = fields["d"].float().repeat_interleave(BLOCK // self.step, -1)
        scale_OG = d_OG * self.quantum * (2 * fields["s"].float() + 1)
        return Grid(scale_OG, scale_OG * (SHIFT - 2 * SHIFT * fields["shift"].float()) if self.affine else None, fields)

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """{"blocks": uint8 (O, bytes of a row)}, as a GGUF file holds the tensor. Every vector of codes is in the book."""
        rank_OI, numbers = codes_OI, {"d": grid.fields["d"].view(torch.int16).reshape(-1, 1)}
        if self.signs != "own":
            half = len(self.levels) // 2
            negative_OI = codes_OI < half
            rank_OI = torch.where(negative_OI, half - 1 - codes_OI, codes_OI - half)
            signs = (negative_OI.view(-1, UNIT).short() << torch.arange(UNIT, dtype=torch.int16)).sum(-1, dtype=torch.int16)
            assert self.signs == "any" or bool((signs == _even(signs)).all()), "an odd number of weights is negative"
            numbers["sign"] = signs.view(-1, BLOCK // UNIT)
        index = self._index[rank_OI.reshape(-1, len(self._base_V)).long() @ self._base_V]
        assert bool((index >= 0).all()), "a vector of codes that the format does not have"
        numbers["index"] = index.view(-1, BLOCK // len(self._base_V))
        for field in self.places.keys() - numbers.keys():
            numbers[field] = grid.fields[field].reshape(-1, BLOCK // self.step).short()
        bits_NP = torch.empty(numbers["d"].shape[0], self.bits, dtype=torch.uint8)
        for field, place in self.places.items():
            for bit in range(place.shape[1]):
                bits_NP[:, place[:, bit]] = (numbers[field] >> bit & 1).to(torch.uint8)
        blocks = (bits_NP.view(len(codes_OI), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        return {"blocks": blocks}

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """(codes_OI uint8, grid) of the blocks that `pack` wrote, or any other encoder."""
        blocks_NB = tensors["blocks"].reshape(-1, self.bits // 8)
        bits_NP = (blocks_NB[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).short()
        numbers = {}
        for field, place in self.places.items():
            numbers[field] = torch.zeros(len(bits_NP), len(place), dtype=torch.int16)
            for bit in range(place.shape[1]):
                numbers[field] |= bits_NP[:, place[:, bit]] << bit
        fields = {"d": numbers["d"].view(torch.float16).view(shape_OI[0], -1)}
        fields |= {field: numbers[field].to(torch.uint8).view(shape_OI[0], -1) for field in numbers.keys() & {"s", "shift"}}
        codes_OI = self._ranks_KV[numbers["index"].long()].view(shape_OI)
        if self.signs != "own":
            half = len(self.levels) // 2
            signs = numbers["sign"] if self.signs == "any" else _even(numbers["sign"])
            negative_OI = (signs[..., None] >> torch.arange(UNIT, dtype=torch.int16) & 1).view(shape_OI).bool()
            codes_OI = torch.where(negative_OI, half - 1 - codes_OI, half + codes_OI)
        return codes_OI, self._grid(fields)


def _even(signs: Tensor) -> Tensor:
    """The lower seven bits, and an eighth that makes the number of set bits even."""
    low = signs & 127
    parity = low ^ (low >> 4)
    parity = parity ^ (parity >> 2)
    return low | (((parity ^ (parity >> 1)) & 1) << 7)


_d, _index8, _s = (1, (("d", 16, 1),)), (1, (("index", 8, 32),)), (1, (("s", 4, 16),))
_index3, _sign8 = (1, (("index", 8, 64),)), (1, (("sign", 8, 32),))
_signs_s: tuple[int, Fields] = (8, (("sign", 7, 4), ("s", 4, 1)))

_TYPES: dict[str, tuple[Signs, int, float, Layout]] = {  # signs, step, u, fields
    "IQ1_S": ("own", 32, 1.0, (_d, _index8, (8, (("index", 3, 4), ("s", 3, 1), ("shift", 1, 1))))),
    "IQ1_M": ("own", 16, 0.125, (_index8, (1, (("index", 4, 32),)), (4, (("s", 3, 4), ("d", 4, 1))))),
    "IQ2_XXS": ("even", 32, 0.125, (_d, (8, (("index", 8, 4), ("sign", 7, 4), ("s", 4, 1))))),
    "IQ2_XS": ("even", 16, 0.125, (_d, (32, (("index", 9, 1), ("sign", 7, 1))), _s)),
    "IQ2_S": ("any", 16, 0.125, (_d, _index8, _sign8, (1, (("index", 2, 32),)), _s)),
    "IQ3_XXS": ("even", 32, 0.25, (_d, _index3, _signs_s)),
    "IQ3_S": ("any", 32, 1.0, (_d, _index3, (1, (("index", 1, 64),)), _sign8, (1, (("s", 4, 8),)))),
}

for _name in _TYPES:
    register(_name, lambda name=_name: Vectors(name, *_TYPES[name]))  # type: ignore[misc]
