"""Block by block, a model answers exactly as it does whole."""

from __future__ import annotations

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.runtime import blockwise
from supremum.runtime.rounding import rounded, rounder
from supremum.runtime.transformers import answers

from ..conftest import FAMILIES

TOKENS = [5, 9, 200, 31, 77, 120, 8, 300]
ENDS = list(range(1, len(TOKENS) + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_and_no_weights_left(family, tiny_model, monkeypatch):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    whole = blockwise.float32_model(checkpoint)
    monkeypatch.setattr(blockwise, "SHARE", 0.0)
    parts = blockwise.float32_model(checkpoint)
    assert not any(p.is_meta for p in whole.parameters())
    expected = answers(whole, TOKENS, ENDS)
    for _ in range(2):
        assert torch.equal(answers(parts, TOKENS, ENDS), expected)
    inner = [parameter for name, parameter in parts.named_parameters() if ".0." in name]
    assert inner and all(parameter.is_meta for parameter in inner)
    with rounded(whole, checkpoint):
        changed = answers(whole, TOKENS, ENDS)
    with rounded(parts, checkpoint):
        assert torch.equal(answers(parts, TOKENS, ENDS), changed)
    assert not torch.equal(changed, expected)
    assert torch.equal(answers(whole, TOKENS, ENDS), expected)


@pytest.mark.parametrize(("kind", "block", "levels"), [("Q4_0", 32, 127), ("Q6_K", 256, 127.5)])
def test_activations_round_to_8_bits(kind, block, levels):
    """Half a step of the block's largest value at most, and the largest value kept (to float16 for blocks of 32)."""
    x = torch.randn(3, 4 * block, generator=torch.Generator().manual_seed(1))
    y = rounder(kind)(x)
    top = x.view(-1, block).abs().amax(1, keepdim=True)
    assert ((x - y).view(-1, block).abs() <= top / levels * 0.5 + top * 2**-10).all()
    assert len(y.view(-1, block)[0].unique()) > block / 3
    assert torch.equal(rounder(kind)(torch.zeros(1, block)), torch.zeros(1, block))
    assert torch.equal(rounder("F32")(x), x) and torch.equal(rounder("BF16")(x), x.bfloat16().float())
