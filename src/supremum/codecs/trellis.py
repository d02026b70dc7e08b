"""Which integers the archive may use: a trellis in place of all of them, for almost a fifth of a bit a weight less.

Dependent quantisation (Marcellin & Fischer 1990; with an entropy code Fischer & Wang 1992; in VVC with 4 states). A state
says which of two quantisers the next number of a row is taken from, and the parity of what was taken moves the state:

    m in Q0 = {2 k}   or   Q1 = {2 k - sgn k},    k the number that is coded

so points are as dense as the integers, and each is told apart from half of them only. A state's lowest bit names its
quantiser. The moves are Ungerboeck's code for amplitude modulation (IEEE Trans. IT 28, 1982; parity checks h0, h1), with r_1
the bit that names the quantiser:

    r_j <- r_{j+1} + h0_j r_1 + h1_j parity (mod 2),   r_{n+1} = 0

Every row begins in state 0 and runs along its columns. An integer outside the coder's symbols counts as even.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .lattice import GAIN
from .rans import ESCAPE, LARGEST

STATES = 64  # the search takes longer the more there are, the decoder does not; 8 leave 0.03 bit more (bench/trellis.py)
CHECKS = 0o103, 0o24  # h0, h1 of 64 states in one dimension
DISTORTION = 4 / 12 * 10 ** (-GAIN / 10)  # mean square error for points one apart
QUANTISERS = 2


def _moves() -> NDArray[np.int64]:
    h0, h1 = CHECKS
    return np.array([[state >> 1 ^ (state & 1) * (h0 >> 1) ^ parity * (h1 >> 1) for parity in range(2)]
                     for state in range(STATES)], np.int64)


NEXT_S2 = _moves()  # the state that follows, by the parity of what was coded


def symbols(integers_OI: NDArray[np.int16]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int16]]:
    """(symbols k + ESCAPE, quantisers, both (O, I); what no symbol stands for, in order). Raises ValueError for integers
    that are no path of the trellis."""
    symbol_OI, quantiser_OI = np.empty(integers_OI.shape, np.uint8), np.empty(integers_OI.shape, np.uint8)
    if not _symbols(np.ascontiguousarray(integers_OI), NEXT_S2, symbol_OI, quantiser_OI):
        raise ValueError("the integers are no path of the trellis")
    return symbol_OI, quantiser_OI, integers_OI[symbol_OI == 0]


def integers(symbol_OI: NDArray[np.uint8], escapes: NDArray[np.int16]) -> NDArray[np.int16]:
    """What `symbols` was given. Raises ValueError if there are more or fewer escapes than symbols ask for."""
    outside_OI = symbol_OI == 0
    if int(outside_OI.sum()) != len(escapes):
        raise ValueError("has other escapes than its symbols ask for")
    integers_OI = np.empty(symbol_OI.shape, np.int16)
    _integers(np.ascontiguousarray(symbol_OI), NEXT_S2, integers_OI)
    integers_OI[outside_OI] = escapes
    return integers_OI


@njit(cache=True, nogil=True)
def _symbols(integers_OI, next_S2, symbol_OI, quantiser_OI):
    """Fill both; whether every integer is one of its quantiser's."""
    for o in range(integers_OI.shape[0]):
        state = 0
        for i in range(integers_OI.shape[1]):
            m = np.int64(integers_OI[o, i])
            quantiser = state & 1
            k = (abs(m) + quantiser) >> 1
            if 2 * k - quantiser * (k > 0) != abs(m):
                return False
            symbol = 0 if k > LARGEST else (k if m > 0 else -k) + ESCAPE
            symbol_OI[o, i], quantiser_OI[o, i] = symbol, quantiser
            state = next_S2[state, symbol & 1]
    return True


@njit(cache=True, nogil=True)
def _integers(symbol_OI, next_S2, integers_OI):
    for o in range(symbol_OI.shape[0]):
        state = 0
        for i in range(symbol_OI.shape[1]):
            k = np.int64(symbol_OI[o, i]) - ESCAPE
            quantiser = state & 1
            integers_OI[o, i] = 2 * k - quantiser * ((k > 0) - (k < 0))
            state = next_S2[state, symbol_OI[o, i] & 1]
