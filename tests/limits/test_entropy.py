"""Code lengths against a real coder and against entropies that are known."""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass

import pytest
import torch

from supremum.limits import entropy as ll


@dataclass
class Info:
    shape: tuple[int, ...]
    kind: str
    nbytes: int


class Folder:
    """As much of a checkpoint as the entropy needs."""

    format = "safetensors"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        kinds = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "int4-g64"}
        self._tensors = tensors
        self.tensors = {n: Info(tuple(t.shape), kinds[t.dtype], t.nbytes) for n, t in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_adaptive_length_is_the_product_of_its_predictions():
    symbols, counts, bits = [0, 1, 1, 2, 1, 0, 1], [0.5, 0.5, 0.5], 0.0
    for s in symbols:
        bits -= math.log2(counts[s] / sum(counts))
        counts[s] += 1
    assert ll.adaptive_bits(torch.tensor([2, 4, 1])) == pytest.approx(bits)
    assert ll.adaptive_bits(torch.tensor([[2, 4, 1], [0, 0, 0]])) == pytest.approx(bits)


def test_bfloat16_gaussian_takes_its_entropy():
    w = gaussian(600, 800).bfloat16()
    values, counts = w.view(torch.int16).unique(return_counts=True)
    p = counts.double() / w.numel()
    joint = float(-(p * p.log2()).sum()) + (len(values) - 1) / (2 * w.numel() * math.log(2))  # Miller-Madow
    bits, _ = ll.float_bits(w)
    assert joint - 0.02 < bits < joint + 0.06


def test_a_real_coder_does_no_better():
    w = gaussian(200, 300).bfloat16()
    packed = len(lzma.compress(w.view(torch.uint8).numpy().tobytes(), preset=9)) * 8 / w.numel()
    assert ll.float_bits(w)[0] < packed


def test_bfloat16_stored_as_float32_costs_what_bfloat16_costs():
    w = gaussian(300, 400).bfloat16()
    assert ll.float_bits(w.float())[0] == pytest.approx(ll.float_bits(w)[0], abs=0.05)


def test_float16_and_vectors_are_coded():
    bits, context = ll.float_bits(gaussian(4096).half())
    assert 10 < bits < 16.2 and context in ("none", "left")


@pytest.mark.parametrize("context", ["row", "column"])
def test_scales_that_vary_are_found(context):
    spread = torch.exp2(8 * gaussian(512, 1, seed=1))
    w = gaussian(512, 512) * (spread if context == "row" else spread.T)
    assert ll.float_bits(w.bfloat16())[1] == context


def test_constant_weights_cost_almost_nothing():
    assert ll.float_bits(torch.ones(100, 1000).bfloat16())[0] < 0.05


def test_blocks_are_coded_by_place():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (4000, 4), dtype=torch.uint8, generator=generator)
    blocks[:, 0] = 7
    assert ll.block_bits(blocks) == pytest.approx(3 * 8 * 4000, rel=0.01)


def test_a_checkpoint_is_summed_and_what_is_opaque_is_named():
    folder = Folder({"a": gaussian(64, 64).bfloat16(), "b": torch.zeros(100, dtype=torch.uint8)})
    result = ll.lossless(folder)
    assert result.weights == 64 * 64 + 100 and result.skipped == ("int4-g64",)
    assert result.stored_bits == pytest.approx((64 * 64 * 16 + 800) / result.weights)
    assert result.lossless_bits < result.stored_bits


def test_negentropy_is_zero_for_a_gaussian_and_known_for_others():
    w = gaussian(400, 500)
    scaled = w * torch.exp2(gaussian(400, 1, seed=2)) * torch.exp2(gaussian(1, 500, seed=3))
    for matrix in (w, scaled):
        assert ll.negentropy_bits(matrix)[0] == pytest.approx(0, abs=0.005)
    assert ll.negentropy_bits(w)[1] == pytest.approx(0, abs=0.01)
    u = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(4)).double() - 0.5
    laplace = -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-12).log()  # h = log2(2 e b), variance 2 b^2
    assert ll.negentropy_bits(laplace)[0] == pytest.approx(0.5 * math.log2(math.pi / math.e), abs=0.01)
    rows = torch.exp2(torch.arange(400).double()[:, None] % 2 * 2) * w
    assert ll.negentropy_bits(rows)[1] == pytest.approx(0.5 * math.log2(8.5 / 4), abs=0.01)
