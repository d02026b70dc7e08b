"""Codecs: representations of a weight matrix with a known rate.

Every scalar format here reconstructs a weight as

    w_hat[o, i] = scale[o, i // step] * levels[code[o, i]] + offset[o, i // step]

and differs from the others only in its levels, its geometry, which scales and offsets it can store (`project`) and how
the bytes lie (`pack`, `unpack`). Vector formats reconstruct weights in the same way, but know only some vectors of
neighbouring codes: their `book`. Choosing scales and codes is the solver's work (`supremum.solve`), so every
rounding method works for every format. A new format is one file that calls `register` and is imported below.

Letters: O out features, I in features, G = I / step scale groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The reconstruction points of one matrix, exactly as the format stores them.

    `scale_OG`, `offset_OG`: float32 (O, G), the values that the format's own decoder uses. `fields`: whatever else
    `pack` needs to write them (super-block scales and the like).
    """

    scale_OG: Tensor
    offset_OG: Tensor | None = None
    fields: dict[str, Tensor] = field(default_factory=dict)


UNIT = 8  # columns of a vector format that are chosen together


@dataclass(frozen=True, eq=False)
class Book:
    """The vectors of levels that a format knows, where it does not know all. A unit of UNIT columns is UNIT / V of them.

    `points_KV`: K vectors of V levels, float32. `signs`: "own" where they are the vectors' own; else the vectors are
    magnitudes, and of a unit's weights "any", or only an "even" number, may be negative.
    """

    points_KV: Tensor
    signs: Literal["own", "any", "even"]


class Codec(Protocol):
    """A number format. Stateless; instances are shared."""

    name: str  # "int4-g64", "Q4_K"
    levels: Tensor  # sorted whole numbers, float32 (K,), K <= 256; a common factor belongs to the scale
    step: int  # columns that share one scale (and offset); 0: the whole row
    rows: int  # rows that share them; more than one only without offsets
    block: int  # columns that are stored together; in_features must be a multiple
    affine: bool  # whether there is an offset
    zero_points: bool  # whether offsets are multiples of the scale, which stay when it changes
    book: Book | None  # None: any codes may stand side by side

    def __hash__(self) -> int: ...

    def project(self, scale_OG: Tensor, offset_OG: Tensor | None) -> Grid:
        """The storable grid nearest to the wished scales and offsets (float32, (O, G))."""

    def pack(self, codes_OI: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Tensors as the target stores them. `codes_OI`: uint8 indices into `levels`."""

    def unpack(self, tensors: dict[str, Tensor], shape_OI: tuple[int, int]) -> tuple[Tensor, Grid]:
        """The inverse of `pack`: (codes_OI, grid)."""

    def nbytes(self, shape_OI: tuple[int, int]) -> int:
        """Bytes of what `pack` returns for a matrix of this shape."""


def decode_grid(codec: Codec, codes_OI: Tensor, grid: Grid) -> Tensor:
    """w_hat (O, I) float32 from codes and grid, by the equation at the top of this module."""
    value_OI = codec.levels[codes_OI.long()]
    out_features = codes_OI.shape[0]
    value_OGS = value_OI.view(out_features, grid.scale_OG.shape[1], -1) * grid.scale_OG[..., None]
    if grid.offset_OG is not None:
        value_OGS = value_OGS + grid.offset_OG[..., None]
    return value_OGS.reshape(codes_OI.shape)


@dataclass(frozen=True)
class Coded:
    """One matrix, compressed: what is written and what is read back."""

    codec: Codec
    tensors: dict[str, Tensor]
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def decode(self) -> Tensor:
        """w_hat (O, I), float32."""
        codes_OI, grid = self.codec.unpack(self.tensors, self.shape)
        return decode_grid(self.codec, codes_OI, grid)


_factories: dict[str, Callable[[], Codec]] = {}


def register(name: str, factory: Callable[[], Codec]) -> None:
    """Make a codec known by `name`; `get(name)` builds it once."""
    _factories[name] = factory


@cache
def get(name: str) -> Codec:
    """The codec called `name`. Raises KeyError with the names that exist."""
    if name not in _factories:
        raise KeyError(f"unknown codec {name!r}; known: {', '.join(sorted(_factories))}")
    return _factories[name]()


def names() -> list[str]:
    """All registered codec names, sorted."""
    return sorted(_factories)


def fits(codec: Codec, shape_OI: tuple[int, int]) -> bool:
    """Whether the format can hold a matrix of this shape without padding."""
    return shape_OI[1] % codec.block == 0


def bits_per_weight(codec: Codec, shape_OI: tuple[int, int]) -> float:
    return 8.0 * codec.nbytes(shape_OI) / (shape_OI[0] * shape_OI[1])


from . import floats, gguf_blocks, gguf_k, gguf_vectors, gptq, integer  # noqa: E402, F401  (registration)

__all__ = ["UNIT", "Book", "Codec", "Coded", "Grid", "bits_per_weight", "decode_grid", "fits", "get", "names", "register"]
