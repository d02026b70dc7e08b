"""GGUF super-blocks of 256 weights: the K-quants Q2_K .. Q6_K, and IQ4_XS.

Scales of sub-blocks (16 or 32 weights) are themselves small integers, multiples of one fp16 number of the super-block:

    w_hat = d s_k * level[code]                  Q3_K, IQ4_XS (s 6 bits signed), Q6_K (s 8 bits signed)
    w_hat = d s_k * code - dmin m_k              Q2_K (s, m 4 bits), Q4_K, Q5_K (s, m 6 bits), all unsigned

    type    sub-block  level        bytes of a super-block, in order
    Q2_K    16         0 .. 3       s and m 16, codes 64, d, dmin
    Q3_K    16         -4 .. 3      third bits 32, low bits 64, s 12, d
    Q4_K    32         0 .. 15      d, dmin, s and m 12, codes 128
    Q5_K    32         0 .. 31      d, dmin, s and m 12, fifth bits 32, low bits 128
    Q6_K    16         -32 .. 31    low bits 128, high bits 64, s 16, d
    IQ4_XS  32         IQ4 table    d, s 6, codes 128

`project` picks the super-scale that leaves the wished scales the least squared error, see `share`. Products of d, s and
a level are exact in float32, so `decode_grid` equals `gguf.dequantize` bit for bit.

Source: ggml/src/ggml-quants.c and ggml-common.h (https://github.com/ggml-org/ggml), and the `gguf` library's quants.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import Grid, register
from .gguf_blocks import IQ4_VALUES, Blocks, Plane, to_f16, unweave

F16_TINY = 2.0**-24  # smallest positive float16


def _fit(wish_NK: Tensor, d_N: Tensor, low: int, high: int, odd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(multiples s_NK of d_N nearest to the wish, squared error (N,), largest |s| (N,))."""
    s_NK = wish_NK / d_N[:, None]
    s_NK = (s_NK.sub_(1).div_(2).round_().mul_(2).add_(1) if odd else s_NK.round_()).clamp_(low, high)
    error_N = torch.addcmul(wish_NK, s_NK, d_N[:, None], value=-1).square_().sum(-1)
    return s_NK, error_N, s_NK.abs().amax(-1)


def share(wish_NK: Tensor, top: int, *, signed: bool, odd: bool = False) -> tuple[Tensor, Tensor]:
    """Scales as multiples of one float16 each row: (d float16 (N,), s float32 (N, K) of whole numbers).

    s is in [-top, top - 1] if `signed`, else in [0, top]; if `odd` it is one of 1, 3 .. top, and d is never zero. Tried are
    d = extreme / n for n from top down to 3/4 of it, then the least-squares d for the best one's multiples; the least sum of
    squared errors wins. A result whose largest |s| is not among those n is not taken (unless d is the smallest number there
    is): sharing twice changes nothing.
    """
    wish_NK = wish_NK.float()
    assert not wish_NK.isnan().any(), "a scale or an offset is not a number"
    low, high, lowest = (-top if signed else int(odd)), (top - 1 if signed else top), 3 * top // 4 - 1
    wish_NK = wish_NK.clamp(min(low, 0) * 65504.0, high * 65504.0)
    extreme_N = wish_NK.gather(-1, wish_NK.abs().argmax(-1, keepdim=True))[:, 0]

    def storable(d_N: Tensor) -> Tensor:
        d_N = to_f16(d_N).float()
        return torch.where(d_N.abs() < F16_TINY, F16_TINY, d_N)

    def refused(d_N: Tensor, largest_N: Tensor) -> Tensor:
        return (largest_N < lowest) & (d_N.abs() > F16_TINY)

    best_d = storable(extreme_N / (-top if signed else top))
    best_s, best_error, _ = _fit(wish_NK, best_d, low, high, odd)
    for n in range(top - 1 - odd, lowest - 1, -1 - odd):
        d_N = storable(extreme_N / (-n if signed else n))
        s_NK, error_N, largest_N = _fit(wish_NK, d_N, low, high, odd)
        better = (error_N < best_error) & ~refused(d_N, largest_N)
        best_d, best_error = torch.where(better, d_N, best_d), torch.where(better, error_N, best_error)
        best_s = torch.where(better[:, None], s_NK, best_s)
    d_N = storable((wish_NK * best_s).sum(-1) / best_s.square().sum(-1).clamp(min=1))
    s_NK, error_N, largest_N = _fit(wish_NK, d_N, low, high, odd)
    better = (error_N < best_error) & ~refused(d_N, largest_N)
    d_N = torch.where(better, d_N, best_d)
    s_NK = torch.where(better[:, None], s_NK, best_s)
    return torch.where(s_NK.any(-1), d_N, 0).half(), s_NK


def pack_sixes(s_N8: Tensor, m_N8: Tensor) -> Tensor:
    """Eight 6-bit scales and minima -> 12 bytes: s_j and m_j (j < 4) with the two high bits of s_j+4 and m_j+4 above
    them, then the low nibbles of s_j+4 and m_j+4 together (get_scale_min_k4 of ggml)."""
    (s, s4), (m, m4) = s_N8.split(4, -1), m_N8.split(4, -1)
    return torch.cat([s | (s4 >> 4 << 6), m | (m4 >> 4 << 6), (s4 & 15) | (m4 << 4)], -1)


def unpack_sixes(bytes_N12: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_sixes`."""
    s, m, both = bytes_N12.split(4, -1)
    s_N8 = torch.cat([s & 63, (both & 15) | (s >> 6 << 4)], -1)
    return s_N8, torch.cat([m & 63, (both >> 4) | (m >> 6 << 4)], -1)


class Super(Blocks):
    """What both kinds of super-block share: fp16 super-scales beside the sub-scales."""

    def __init__(
        self, name: str, levels: Sequence[int], step: int, top: int, sections: Sequence[Plane | tuple[str, int]]
    ) -> None:
        super().__init__(name, levels, sections, block=256, step=step)
        self.top, self.subs = top, 256 // step

    def _times(self, d: Tensor, s_OG: Tensor) -> Tensor:
        return d.float().repeat_interleave(self.subs, -1) * s_OG.float()

    def _share(self, wish_OG: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
        d_N, s_NK = share(wish_OG.reshape(-1, self.subs), self.top, signed=signed)
        return d_N.view(len(wish_OG), -1), s_NK.view_as(wish_OG).to(torch.int8 if signed else torch.uint8)


class Signed(Super):
    """Q3_K, Q6_K, IQ4_XS: signed sub-scales s in [-top, top - 1], no offset; s + bias lies in `planes`."""

    def __init__(
        self,
        name: str,
        levels: Sequence[int],
        step: int,
        top: int,
        sections: Sequence[Plane | tuple[str, int]],
        planes: Sequence[Plane],
        bias: int,
    ) -> None:
        super().__init__(name, levels, step, top, sections)
        self.planes, self.bias = tuple(planes), bias

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales as multiples of one float16 a super-block, signs kept; an offset is ignored."""
        d, s = self._share(scale_OG, signed=True)
        return self.grid({"d": d, "s": s})

    def grid(self, fields: dict[str, Tensor]) -> Grid:
        return Grid(self._times(fields["d"], fields["s"]), None, fields)

    def encode(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        biased_NK = (fields["s"].reshape(-1, self.subs) + self.bias).view(torch.uint8)
        scales = torch.cat([plane.weave(biased_NK) for plane in self.planes], -1)
        return {**super().encode({"d": fields["d"]}), "s": scales}

    def decode(self, sections: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        parts = sections["s"].split([plane.width * self.subs // 8 for plane in self.planes], -1)
        biased_NK = unweave(self.planes, parts)
        s = (biased_NK.view(torch.int8) - self.bias).view(rows, -1)
        return {**super().decode({"d": sections["d"]}, rows), "s": s}


class WithMinimum(Super):
    """Q2_K, Q4_K, Q5_K: scales d s and offsets -dmin m, with s and m in [0, top]: no offset is above zero."""

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """Scales and offsets as multiples of one float16 each a super-block.

        A wish that the format cannot hold keeps the far end of its range: a negative scale is turned round, an offset
        above zero becomes zero and its scale grows.
        """
        scale_OG = scale_OG.float()
        offset_OG = torch.zeros_like(scale_OG) if offset_OG is None else offset_OG.float()
        reach = len(self.levels) - 1
        offset_OG = offset_OG + scale_OG.clamp(max=0) * reach
        scale_OG = scale_OG.abs() + offset_OG.clamp(min=0) / reach
        d, s = self._share(scale_OG, signed=False)
        dmin, m = self._share(-offset_OG.clamp(max=0), signed=False)
        return self.grid({"d": d, "dmin": dmin, "s": s, "m": m})

    def grid(self, fields: dict[str, Tensor]) -> Grid:
        return Grid(self._times(fields["d"], fields["s"]), -self._times(fields["dmin"], fields["m"]), fields)

    def encode(self, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        s_NK, m_NK = fields["s"].reshape(-1, self.subs), fields["m"].reshape(-1, self.subs)
        both = s_NK | (m_NK << 4) if self.top == 15 else pack_sixes(s_NK, m_NK)
        return {**super().encode({"d": fields["d"], "dmin": fields["dmin"]}), "s": both}

    def decode(self, sections: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
        both = sections["s"]
        s_NK, m_NK = (both & 15, both >> 4) if self.top == 15 else unpack_sixes(both)
        fields = super().decode({"d": sections["d"], "dmin": sections["dmin"]}, rows)
        return {**fields, "s": s_NK.reshape(rows, -1), "m": m_NK.reshape(rows, -1)}


_d, _dmin = ("d", 2), ("dmin", 2)
_two, _four, _fifth = Plane(0, 2, 2), Plane(0, 4, 4), Plane(4, 1, 1)

for _codec in (
    WithMinimum("Q2_K", range(4), 16, 15, [("s", 16), _two, _d, _dmin]),
    Signed("Q3_K", range(-4, 4), 16, 32, [Plane(2, 1, 1), _two, ("s", 12), _d], [Plane(0, 4, 1), Plane(4, 2, 1)], 32),
    WithMinimum("Q4_K", range(16), 32, 63, [_d, _dmin, ("s", 12), _four]),
    WithMinimum("Q5_K", range(32), 32, 63, [_d, _dmin, ("s", 12), _fifth, _four]),
    Signed("Q6_K", range(-32, 32), 16, 128, [Plane(0, 4, 2), Plane(4, 2, 2), ("s", 16), _d], [Plane(0, 8, 1)], 0),
    Signed("IQ4_XS", IQ4_VALUES, 32, 32, [_d, ("s", 6), Plane(0, 4, 8)], [Plane(4, 2, 2), Plane(0, 4, 4)], 32),
):
    register(_codec.name, lambda codec=_codec: codec)  # type: ignore[misc]
