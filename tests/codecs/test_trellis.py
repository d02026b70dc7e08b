"""The trellis: every path goes through the coder and back, what is no path is refused, and its moves are Ungerboeck's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supremum.codecs import trellis
from supremum.codecs.rans import LARGEST


def walk(k_I: list[int]) -> tuple[list[int], list[int]]:
    """(integers, quantisers) of coded numbers: the definition, a step at a time with the register's bits."""
    h0, h1 = ([int(bit) for bit in f"{check:07b}"[::-1]] for check in trellis.CHECKS)
    register = [0] * 6
    integers, quantisers = [], []
    for k in k_I:
        quantiser = register[0]
        quantisers.append(quantiser)
        integers.append(2 * k - quantiser * ((k > 0) - (k < 0)))
        parity = k % 2 if abs(k) <= LARGEST else 0
        above = [*register[1:], 0]
        register = [above[j] ^ h0[j + 1] & quantiser ^ h1[j + 1] & parity for j in range(6)]
    return integers, quantisers


@given(st.lists(st.one_of(st.integers(-3, 3), st.integers(-16000, 16000)), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_path_goes_through_and_comes_back(k_I):
    integers, quantisers = walk(k_I)
    integers_OI = np.array([integers, integers], np.int16)
    symbol_OI, quantiser_OI, escapes = trellis.symbols(integers_OI)
    assert quantiser_OI[1].tolist() == quantisers
    assert symbol_OI[0].tolist() == [k + 128 if abs(k) <= LARGEST else 0 for k in k_I]
    assert np.array_equal(trellis.integers(symbol_OI, escapes), integers_OI)


def test_what_is_no_path_is_refused():
    with pytest.raises(ValueError, match="no path"):
        trellis.symbols(np.array([[1]], np.int16))  # a row begins with the even integers
    with pytest.raises(ValueError, match="other escapes"):
        trellis.integers(np.array([[128, 0]], np.uint8), np.empty(0, np.int16))


def test_paths_that_part_differ_in_seven_columns_at_least():
    """64 states remember six numbers: from any of them, two sequences that part meet again after 7 columns or more."""
    for start in range(trellis.STATES):
        for length in range(1, 7):
            ends = [start]
            for _ in range(length):
                ends = [int(trellis.NEXT_S2[state, parity]) for state in ends for parity in (0, 1)]
            assert len(set(ends)) == len(ends)


def test_every_state_is_reached_in_two_ways():
    for to in range(trellis.STATES):
        assert int((to == trellis.NEXT_S2).sum()) == 2
