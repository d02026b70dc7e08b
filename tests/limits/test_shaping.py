"""The table of codes against theory, published optima and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from supremum.limits import shaping
from supremum.limits.waterfill import SHAPING_BITS


def test_entropy_coding_leaves_the_shaping_loss():
    assert pytest.approx(0.25461, abs=1e-5) == SHAPING_BITS
    for rate in (2.0, 3.0, 5.0):
        assert shaping.entropy_coded_gap(rate).gap == pytest.approx(SHAPING_BITS, abs=3e-4)
    assert shaping.entropy_coded_gap(1.0).gap == pytest.approx(0.239, abs=1e-3)


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_reaches_max_s_table_of_1960(bits, mse):
    assert shaping.lloyd_max(bits).mse == pytest.approx(mse, rel=5e-4)


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_clipped_uniform_reaches_max_s_table_of_1960(bits, mse):
    assert shaping.clipped_uniform(bits).mse == pytest.approx(mse, rel=2e-3)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128)])
def test_absmax_quadrature_equals_simulation(bits, group):
    x = np.random.default_rng(1).standard_normal((20_000, group))
    scale = np.abs(x).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    mse = float(np.square(x - np.round(x / scale) * scale).mean())
    assert shaping.absmax(bits, group).mse == pytest.approx(mse, rel=0.01)


def test_better_codes_lose_less():
    for bits in (2, 3, 4):
        order = [shaping.lloyd_max(bits), shaping.clipped_uniform(bits), shaping.searched(bits, 128),
                 shaping.absmax(bits, 128)]  # fmt: skip
        gaps = [row.gap for row in order]
        assert gaps == sorted(gaps) and gaps[0] > SHAPING_BITS


def test_no_code_is_below_the_limit():
    for row in shaping.format_gaps():
        assert row.gap > 0 and row.gap == pytest.approx(row.rate + 0.5 * math.log2(row.mse))
        assert row.error < 0.01
