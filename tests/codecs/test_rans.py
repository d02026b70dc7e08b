"""The entropy coder: exact, as short as its frequencies allow, and safe on bytes from anywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum.codecs import rans


def frequencies(seed: int, classes: int = 5, symbols: int = 40) -> rans.Frequencies:
    """Random distributions over symbols 100, 101, ...; every one of them possible."""
    weights = np.zeros((classes, 256))
    weights[:, 100:100 + symbols] = np.random.default_rng(seed).gamma(0.3, size=(classes, symbols)) + 1e-9
    return rans.quantised(weights)


def drawn(frequency_KA: rans.Frequencies, class_OI: np.ndarray, seed: int) -> np.ndarray:
    """Symbols with the given frequencies."""
    slot = np.random.default_rng(seed).integers(rans.TOTAL, size=class_OI.shape)
    return (np.cumsum(frequency_KA, 1)[class_OI] <= slot[..., None]).sum(-1).astype(np.uint8)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(rows, columns, seed):
    frequency_KA = frequencies(seed)
    draw = np.random.default_rng(seed)
    row_O, column_I = (draw.integers(-3, 7, size).astype(np.int16) for size in (rows, columns))
    class_OI = np.clip(row_O[:, None] + column_I, 0, 4)
    symbol_OI = drawn(frequency_KA, class_OI, seed)
    words = rans.encode(symbol_OI, row_O, column_I, frequency_KA)
    assert np.array_equal(rans.decode(words, row_O, column_I, rans.decoding_table(frequency_KA)), symbol_OI)


def test_the_stream_is_as_long_as_the_entropy():
    frequency_KA = frequencies(1)
    row_O, column_I = np.arange(300, dtype=np.int16) % 5, np.zeros(1000, np.int16)
    symbol_OI = drawn(frequency_KA, np.broadcast_to(row_O[:, None], (300, 1000)), 2)
    used = frequency_KA[np.broadcast_to(row_O[:, None], symbol_OI.shape), symbol_OI]
    ideal = -np.log2(used / rans.TOTAL).sum()
    coded = 32 * len(rans.encode(symbol_OI, row_O, column_I, frequency_KA))
    assert ideal <= coded <= ideal * 1.0005 + 64 * rans.LANES


@given(st.integers(0, 2**31), st.integers(2, 200))
@settings(max_examples=60, deadline=None)
def test_frequencies_are_a_distribution_near_the_weights(seed, symbols):
    weights = np.zeros((1, 256))
    weights[0, :symbols] = np.random.default_rng(seed).gamma(0.2, size=symbols) + 1e-12
    frequency = rans.quantised(weights)[0].astype(float)
    assert frequency.sum() == rans.TOTAL and (frequency[:symbols] >= 1).all() and not frequency[symbols:].any()
    share = weights[0, :symbols] / weights[0].sum()
    loss = (share * np.log2(share / (frequency[:symbols] / rans.TOTAL))).sum()  # bits a symbol above the entropy
    assert loss <= 2.0 * symbols / rans.TOTAL


def test_a_symbol_without_a_frequency_is_refused():
    frequency_KA = frequencies(3)
    with pytest.raises(ValueError, match="no frequency"):
        rans.encode(np.full((1, 4), 7, np.uint8), np.zeros(1, np.int16), np.zeros(4, np.int16), frequency_KA)


@given(st.integers(0, 2**31), st.integers(0, 200), st.binary(min_size=0, max_size=400))
@settings(max_examples=100, deadline=None)
def test_a_strangers_stream_is_refused_or_decodes_to_symbols(seed, columns, data):
    words = np.frombuffer(data[: len(data) // 4 * 4], np.uint32)
    table = rans.decoding_table(frequencies(seed))
    with pytest.raises(ValueError, match="damaged"):  # states end at one value of 2^31: chance does not meet it
        rans.decode(words, np.full(3, 32767, np.int16), np.full(columns, 32767, np.int16), table)


@pytest.mark.parametrize("change", ["cut", "longer", "flipped"])
def test_a_damaged_stream_is_noticed(change):
    frequency_KA = frequencies(5)
    row_O, column_I = np.zeros(20, np.int16), np.zeros(50, np.int16)
    words = rans.encode(drawn(frequency_KA, np.zeros((20, 50), int), 6), row_O, column_I, frequency_KA)
    if change == "cut":
        words = words[:-1]
    elif change == "longer":
        words = np.append(words, np.uint32(1))
    else:
        words[len(words) // 2] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        rans.decode(words, row_O, column_I, rans.decoding_table(frequency_KA))


@pytest.mark.parametrize("frequency", [np.full(256, 16) + (np.arange(256) == 0), np.eye(1, 256, 3)[0] * 4096])
def test_a_strangers_frequencies_are_refused(frequency):
    with pytest.raises(ValueError, match="no distribution"):
        rans.decoding_table(frequency[None].astype(np.uint16))
