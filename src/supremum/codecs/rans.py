"""Range asymmetric numeral systems: small integers to bytes, at their entropy (J. Duda, arXiv 1311.2540).

A state x takes in a symbol of frequency f and cumulative frequency c (both out of 2^P) and gives it back by

    push   x <- (x // f) 2^P + c + x mod f             pop   s = symbol at x mod 2^P,   x <- f (x // 2^P) + x mod 2^P - c

so that log2 x grows by log2(2^P / f) bits. Whenever x would leave [2^31, 2^63) its lower 32 bits move to or from the stream.
LANES states follow a row each, so that a processor works on several at once. Each symbol has a class, which says by which
table it is coded: that of entry (o, i) of a matrix is row_O[o] + column_I[i], held to the classes there are. Where what came
before in the row matters too (trellis.py), `next_SP` gives the state that follows a state and a parity of the symbol; each
class then has a table for even and for odd states.

Symbols are z = -LARGEST..LARGEST, stored as z + ESCAPE; 0 stands for an integer outside, kept in full beside the stream.
Both loops are compiled by Numba.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

PRECISION = 12
TOTAL = 1 << PRECISION
LANES = 8
ESCAPE = 128  # added to z; the symbol 0 is left for what lies outside
LARGEST = ESCAPE - 1
LOWEST = np.uint64(1 << 31)

ALONE = np.zeros((1, 2), np.int64)  # `next_SP` of symbols that do not depend on each other

Frequencies = NDArray[np.uint16]  # (K, 256): of each table's symbols; rows sum to TOTAL


def quantised(weights_KA: NDArray[np.float64]) -> Frequencies:
    """Frequencies nearest to weights (K, 256) >= 0: at least 1 where a weight is positive, rows summing to TOTAL.

    Starts from the floor and gives the rest where the cost in bits falls most. Raises ValueError for a row of zeros.
    """
    result = np.zeros(weights_KA.shape, np.int64)
    for row, weights in zip(result, weights_KA, strict=True):
        if not weights.sum() > 0:
            raise ValueError("a class has no symbol")
        wish = weights / weights.sum() * TOTAL
        row[:] = np.where(weights > 0, np.maximum(1, np.floor(wish)), 0)
        while (left := TOTAL - int(row.sum())) != 0:
            step = 1 if left > 0 else -1
            usable = (weights > 0) & (row + step >= 1)
            gain = np.where(usable, wish * np.log(np.maximum(row + step, 1) / np.maximum(row, 1)), -np.inf)
            row[np.argsort(-gain, kind="stable")[: min(abs(left), int(usable.sum()))]] += step
    return result.astype(np.uint16)


def decoding_table(frequency_KA: Frequencies) -> NDArray[np.uint32]:
    """(K, TOTAL): symbol, frequency - 1 and offset within the symbol of every slot, in 8, 12 and 12 bits.

    Raises ValueError for frequencies that do not sum to TOTAL or leave a class a single symbol (its cost would be zero,
    and no state would tell how often it came)."""
    frequency_KA = frequency_KA.astype(np.int64)
    if (frequency_KA.sum(1) != TOTAL).any() or (frequency_KA.max(1) >= TOTAL).any():
        raise ValueError("the frequencies of a class are no distribution")
    table = np.empty((len(frequency_KA), TOTAL), np.uint32)
    for row, frequency in zip(table, frequency_KA, strict=True):
        symbol = np.repeat(np.arange(len(frequency)), frequency)
        offset = np.arange(TOTAL) - (frequency.cumsum() - frequency)[symbol]
        row[:] = symbol | (frequency[symbol] - 1) << 8 | offset << 20
    return table


def encode(symbol_OI: NDArray[np.uint8], row_O: NDArray[np.int16], column_I: NDArray[np.int16], frequency_KA: Frequencies,
           next_SP: NDArray[np.int64] = ALONE) -> NDArray[np.uint32]:
    """The stream of a matrix of symbols. Raises ValueError for a symbol to which its table gives no frequency."""
    symbol_OI = np.ascontiguousarray(symbol_OI)
    words = np.empty(symbol_OI.size + 2 * LANES, np.uint32)
    table_OI = np.empty(symbol_OI.shape, np.int32)
    _tables(symbol_OI, row_O, column_I, len(frequency_KA), next_SP, table_OI)
    cumulative_KA = np.cumsum(frequency_KA, 1, dtype=np.uint32) - frequency_KA
    used = _push(symbol_OI, table_OI, frequency_KA.astype(np.uint32), cumulative_KA.astype(np.uint32), words)
    if used < 0:
        raise ValueError("a symbol has no frequency in its class")
    return words[used:].copy()


def decode(words: NDArray[np.uint32], row_O: NDArray[np.int16], column_I: NDArray[np.int16], table_KT: NDArray[np.uint32],
           next_SP: NDArray[np.int64] = ALONE) -> NDArray[np.uint8]:
    """The matrix of symbols of a stream, by `decoding_table`. Raises ValueError for a stream that is not of this shape."""
    symbol_OI = np.empty((len(row_O), len(column_I)), np.uint8)
    if len(words) < 2 * LANES or not _pop(words, row_O, column_I, table_KT, next_SP, symbol_OI):
        raise ValueError("the coded integers are damaged")
    return symbol_OI


@njit(cache=True, nogil=True)
def _tables(symbol_OI, row_O, column_I, count, next_SP, table_OI):
    """Fill `table_OI`: by which table each symbol is coded."""
    several = 2 if len(next_SP) > 1 else 1
    last = count // several - 1
    for o in range(symbol_OI.shape[0]):
        state = 0
        for i in range(symbol_OI.shape[1]):
            table_OI[o, i] = several * min(max(row_O[o] + column_I[i], 0), last) + (state & (several - 1))
            state = next_SP[state, symbol_OI[o, i] & 1]


@njit(cache=True, nogil=True)
def _push(symbol_OI, table_OI, frequency_KA, cumulative_KA, words):
    """Fill `words` from its end; the place of the first, or -1."""
    rows, columns = symbol_OI.shape
    at = len(words)
    states = np.full(LANES, LOWEST, np.uint64)
    for begin in range((rows - 1) // LANES * LANES, -1, -LANES):
        for i in range(columns - 1, -1, -1):
            for lane in range(min(LANES, rows - begin) - 1, -1, -1):
                k, symbol, x = table_OI[begin + lane, i], symbol_OI[begin + lane, i], states[lane]
                frequency = np.uint64(frequency_KA[k, symbol])
                if frequency == 0:
                    return -1
                if x >= frequency << np.uint64(63 - PRECISION):
                    at -= 1
                    words[at] = np.uint32(x & np.uint64(0xFFFFFFFF))
                    x >>= np.uint64(32)
                quotient = x // frequency
                states[lane] = (quotient << np.uint64(PRECISION)) + (x - quotient * frequency) \
                    + np.uint64(cumulative_KA[k, symbol])
    for lane in range(LANES - 1, -1, -1):
        at -= 2
        words[at] = np.uint32(states[lane] >> np.uint64(32))
        words[at + 1] = np.uint32(states[lane] & np.uint64(0xFFFFFFFF))
    return at


@njit(cache=True, nogil=True)
def _pop(words, row_O, column_I, table_KT, next_SP, symbol_OI):
    """Fill `symbol_OI`; whether the stream ended where it should."""
    rows, columns = symbol_OI.shape
    several = 2 if len(next_SP) > 1 else 1
    last = table_KT.shape[0] // several - 1
    states, followed = np.empty(LANES, np.uint64), np.zeros(LANES, np.int64)
    for lane in range(LANES):
        states[lane] = np.uint64(words[2 * lane]) << np.uint64(32) | np.uint64(words[2 * lane + 1])
    at = 2 * LANES
    end = len(words)
    for begin in range(0, rows, LANES):
        followed[:] = 0
        height = min(LANES, rows - begin)
        for i in range(columns):
            for lane in range(height):
                k = several * min(max(row_O[begin + lane] + column_I[i], 0), last) + (followed[lane] & (several - 1))
                x = states[lane]
                entry = table_KT[k, x & np.uint64(TOTAL - 1)]
                symbol = entry & np.uint32(255)
                symbol_OI[begin + lane, i] = np.uint8(symbol)
                followed[lane] = next_SP[followed[lane], np.int64(symbol) & 1]
                x = np.uint64(((entry >> np.uint32(8)) & np.uint32(4095)) + np.uint32(1)) * (x >> np.uint64(PRECISION)) \
                    + np.uint64(entry >> np.uint32(20))
                if x < LOWEST:
                    if at == end:
                        return False
                    x = x << np.uint64(32) | np.uint64(words[at])
                    at += 1
                states[lane] = x
    for lane in range(LANES):
        if states[lane] != LOWEST:
            return False
    return at == end
