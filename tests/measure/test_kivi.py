"""The coded cache against float64 brute force, and through a model's decoding."""

from __future__ import annotations

import pytest
import torch

from supremum.checkpoint import open_checkpoint
from supremum.measure.kivi import GROUP, RESIDUAL, KiviLayer, decode, encode, evaluate_kivi


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_the_nearest_points(bits):
    x = torch.randn(40, GROUP, generator=torch.Generator().manual_seed(0))
    coded = encode(x, bits)
    step, low = coded[1].double(), coded[2].double()
    points = low[..., None] + step[..., None] * torch.arange(2**bits, dtype=torch.float64)
    nearest = points.expand(40, GROUP, -1).gather(2, (points - x.double()[..., None]).abs().argmin(2, keepdim=True))[..., 0]
    torch.testing.assert_close(decode(coded, bits).double(), nearest, rtol=1e-6, atol=1e-6)
    assert coded[0].shape == (40, GROUP * bits // 8)


def test_last_tokens_are_exact_and_keys_are_coded_by_channel():
    layer, draw = KiviLayer(2), torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 2, 100, 64, generator=draw) for _ in range(2))
    k[..., 5] *= 100  # a channel of large keys spoils no other
    layer.update(k, v)
    keys, values = layer.update(k[..., :1, :], v[..., :1, :])
    assert keys.shape[-2] == layer.get_seq_length() == 101
    assert torch.equal(keys[..., -1 - RESIDUAL:-1, :], k[..., -RESIDUAL:, :])
    assert not torch.equal(values[..., :64, :], v[..., :64, :])
    rest = [i for i in range(64) if i != 5]
    assert (keys[..., :100, rest] - k[..., rest]).abs().max() < 1.5


def test_fewer_bits_cost_more(tiny_model):
    file = open_checkpoint(tiny_model("qwen3"))
    windows = torch.randint(384, (2, 160), generator=torch.Generator().manual_seed(0))
    eight, two = (evaluate_kivi(file, windows, bits) for bits in (8, 2))
    assert 0 < eight["found"].kl_mean < two["found"].kl_mean / 10 and two["bytes"] < eight["bytes"] < eight["bytes_exact"]
