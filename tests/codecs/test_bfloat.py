"""bfloat16 matrices taken apart and put together to the bit, and how many bits are left to code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from supremum.codecs.bfloat import CLASSES, REST, Bfloat, put_together, take_apart


@given(arrays(np.int16, st.tuples(st.integers(1, 20), st.integers(1, 20))))
@settings(max_examples=200, deadline=None)
def test_any_sixteen_bits_come_back(bits_OI):
    """Zeros, subnormals, infinities and NaN too."""
    weight_OI = torch.from_numpy(bits_OI).view(torch.bfloat16)
    assert np.array_equal(put_together(take_apart(weight_OI)).view(torch.int16).numpy(), bits_OI)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 3.0])
def test_normal_weights_take_ten_and_a_half_bits(scale):
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(512, 1024, generator=draw) * torch.exp(torch.randn(512, 1, generator=draw)) * scale
    parts = take_apart(weight_OI.bfloat16())
    classes = np.clip(parts.row_class_O[:, None] + parts.column_class_I, 0, CLASSES - 1).astype(int)
    pairs = np.bincount((classes * 256 + parts.symbol_OI).ravel(), minlength=CLASSES * 256).reshape(CLASSES, 256)
    share = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    entropy = -(pairs * np.log2(np.where(share > 0, share, 1))).sum() / weight_OI.numel()
    assert len(parts.escapes) < 1e-3 * weight_OI.numel() and entropy + REST < 10.55


def test_missing_escapes_are_noticed():
    parts = take_apart(torch.zeros(3, 4, dtype=torch.bfloat16))
    assert len(parts.escapes) == 12
    with pytest.raises(ValueError, match="other escapes"):
        put_together(Bfloat(parts.symbol_OI, parts.rest_OI, parts.escapes[:-1], parts.row_class_O, parts.column_class_I))
