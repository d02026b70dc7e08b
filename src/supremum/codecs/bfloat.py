"""bfloat16 numbers without loss: what can be foreseen of them to the entropy coder, the rest as it is.

    bits of a number      sign 1 | exponent 8 | mantissa 7
    symbol (8 bits)       exponent less the one expected of its row and column, and the 3 upper bits of the mantissa
    rest (5 bits)         sign and the 4 lower bits of the mantissa, which look random

The class of an entry is row_class_O + column_class_I: log2 of its expected size in quarters of an octave, UNIT standing for
2^OFFSET. Numbers far from what is expected (and zeros) are escapes, kept in full. The upper mantissa bits are not even
within an octave of a normal density, so they are coded with the exponent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OCTAVE = 4
UNIT, OFFSET = 44, -6
CLASSES = 88
LOWEST, HIGHEST = -26, 4  # exponents from the expected one that have a symbol: 31 of them, times 8, and the escape
REST = 5  # bits


@dataclass(frozen=True)
class Bfloat:
    """A matrix taken apart; int16 classes, uint8 symbols and rests, the escapes' 16 bits in order."""

    symbol_OI: NDArray[np.uint8]
    rest_OI: NDArray[np.uint8]
    escapes: NDArray[np.int16]
    row_class_O: NDArray[np.int16]
    column_class_I: NDArray[np.int16]


def take_apart(weight_OI: Tensor) -> Bfloat:
    """Of a bfloat16 matrix."""
    size_OI = weight_OI.float().abs().nan_to_num(0.0, 0.0, 0.0).clamp_max(2.0**60)
    row_O = size_OI.square().mean(1).clamp_min(1e-38)
    column_I = (size_OI / row_O.sqrt()[:, None]).square().mean(0).clamp_min(1e-38)
    row_class_O = (OCTAVE / 2 * row_O.log2()).round().clamp(-OCTAVE * 40, OCTAVE * 40)
    row_class_O = row_class_O.clamp(row_class_O.median() - 120, row_class_O.median() + 120) + UNIT - OCTAVE * OFFSET
    column_class_I = (OCTAVE / 2 * column_I.log2()).round().clamp(-120, 120)
    classes = row_class_O.short().numpy(), column_class_I.short().numpy()
    bits_OI = weight_OI.contiguous().view(torch.int16).numpy()
    distance_OI = ((bits_OI >> 7) & 255).astype(np.int16) - _expected(*classes)
    usual_OI = (distance_OI >= LOWEST) & (distance_OI <= HIGHEST)
    symbol_OI = np.where(usual_OI, 1 + (distance_OI - LOWEST) * 8 + ((bits_OI >> 4) & 7), 0).astype(np.uint8)
    rest_OI = (((bits_OI >> 11) & 16) | (bits_OI & 15)).astype(np.uint8)
    return Bfloat(symbol_OI, np.where(usual_OI, rest_OI, 0).astype(np.uint8), bits_OI[~usual_OI], *classes)


def put_together(parts: Bfloat) -> Tensor:
    """The matrix again, to the bit. Raises ValueError if there are more or fewer escapes than symbols ask for."""
    symbol_OI, rest_OI = parts.symbol_OI.astype(np.int16), parts.rest_OI.astype(np.int16)
    exponent_OI = _expected(parts.row_class_O, parts.column_class_I) + LOWEST + ((symbol_OI - 1) >> 3)
    bits_OI = (rest_OI >> 4) << 15 | (exponent_OI & 255) << 7 | ((symbol_OI - 1) & 7) << 4 | (rest_OI & 15)
    escaped_OI = symbol_OI == 0
    if int(escaped_OI.sum()) != len(parts.escapes):
        raise ValueError("has other escapes than its symbols ask for")
    bits_OI[escaped_OI] = parts.escapes
    return torch.from_numpy(bits_OI.astype(np.int16)).view(torch.bfloat16)


def _expected(row_class_O: NDArray[np.int16], column_class_I: NDArray[np.int16]) -> NDArray[np.int16]:
    """(O, I) biased exponent that is expected of each entry."""
    class_OI = np.clip(row_class_O[:, None] + column_class_I, 0, CLASSES - 1)
    return ((class_OI - UNIT) // OCTAVE + OFFSET + 127).astype(np.int16)
