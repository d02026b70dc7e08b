"""GPTQ's layout against an unpacker written from its description, number by number, in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from supremum import codecs
from supremum.codecs import decode_grid
from supremum.codecs.gptq import BITS

from .test_contract import SEED, width, wishes

NAMES = [name for name in codecs.names() if name.startswith("gptq")]


def fields(words: np.ndarray, bits: int, count: int) -> list[int]:
    """`count` numbers from 32-bit words, the first one lowest: at 3 bits numbers 10 and 21 lie across two words."""
    stream = sum(int(word) << (32 * place) for place, word in enumerate(words.astype(np.uint32)))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]


def unpacked(tensors: dict[str, torch.Tensor], bits: int, stored_less: int = 1) -> np.ndarray:
    """w (O, I) in float64; stored_less: what version 1 takes off its zero points, which wrap round one by one."""
    qweight, qzeros, scales, order = (tensors[key].numpy() for key in ("qweight", "qzeros", "scales", "g_idx"))
    inputs, outputs = len(order), qweight.shape[1]
    codes = np.array([fields(qweight[:, o], bits, inputs) for o in range(outputs)])
    zeros = (np.array([fields(row, bits, outputs) for row in qzeros]) + stored_less) % (1 << bits)
    return (codes - zeros.T[:, order]) * scales.astype(np.float64).T[:, order]


@pytest.mark.parametrize("name", NAMES)
def test_the_described_layout_gives_our_weights(name: str) -> None:
    codec = codecs.get(name)
    rows, columns = 32, width(codec)
    grid = codec.project(*wishes(codec, rows, columns))
    draw = torch.Generator().manual_seed(SEED)
    codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
    tensors = codec.pack(codes_OI, grid)
    bits = int(name[4])
    assert tensors["qweight"].shape == (columns * bits // 32, rows) and tensors["scales"].dtype == torch.float16
    assert tensors["qzeros"].shape == (grid.scale_OG.shape[1], rows * bits // 32)
    assert np.array_equal(unpacked(tensors, bits), decode_grid(codec, codes_OI, grid).double().numpy())


def test_zero_points_of_four_bits() -> None:
    """Eight is stored as seven, eight times a word: what AutoGPTQ writes for symmetric weights."""
    codec = codecs.get("gptq4-g32")
    tensors = codec.pack(torch.zeros(32, 64, dtype=torch.uint8), codec.project(torch.ones(32, 2), None))
    assert torch.equal(tensors["qzeros"], torch.full((2, 4), 0x77777777, dtype=torch.int32))
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32


@pytest.mark.parametrize("bits", BITS)
def test_no_cast_moves_a_scale(bits: int) -> None:
    codec = codecs.get(f"gptq{bits}-g64")
    wished = torch.logspace(-8, 6, 4000)[:, None] * torch.tensor([[1.0, -1.0]])
    scale_OG = codec.project(wished, None).scale_OG
    assert torch.equal(scale_OG.half().float(), scale_OG) and torch.equal(scale_OG.bfloat16().float(), scale_OG)
    assert (scale_OG.sign() == wished.sign()).all()
    products = scale_OG[..., None] * codec.levels
    assert products.half().isfinite().all()
    if bits <= 4:
        normal = scale_OG[..., None].abs() >= 2.0**-14
        assert torch.equal(products.half().float() * normal, products * normal)
