"""GGUF blocks against the `gguf` library's decoders and encoders."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from torch import Tensor

from supremum import codecs
from supremum.checkpoint.gguf_types import KINDS
from supremum.codecs import decode_grid
from supremum.codecs.gguf_blocks import Blocks, Plane
from supremum.codecs.gguf_k import share

from .test_contract import SEED, absmax, nearest, wishes

K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q2_0", *K_TYPES]
GGML = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))  # for what the `gguf` library does not know yet


def reference(blocks: Tensor, name: str) -> Tensor:
    if name != "Q2_0":
        return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))
    decoded_OI = torch.empty(len(blocks), blocks.shape[1] // 18 * 64)
    GGML.dequantize_row_q2_0(*map(ctypes.c_void_p, (blocks.contiguous().data_ptr(), decoded_OI.data_ptr())),
                             ctypes.c_int64(decoded_OI.numel()))
    return decoded_OI


def foreign(name: str, rows: int, blocks: int) -> Tensor:
    """Random bytes (rows, bytes of a row) such as any encoder could have written: float16 numbers finite, normal."""
    codec = codecs.get(name)
    assert isinstance(codec, Blocks)
    draw = np.random.default_rng(SEED)
    raw = draw.integers(0, 256, (rows * blocks, sum(codec.sizes)), dtype=np.uint8)
    starts = np.cumsum([0, *codec.sizes])
    for section, start in zip(codec.sections, starts[:-1], strict=True):
        if not isinstance(section, Plane) and section[0] in ("d", "dmin", "m"):
            raw[:, start : start + 2] = draw.normal(0, 0.01, (rows * blocks, 1)).astype(np.float16).view(np.uint8)
        if name == "MXFP4":
            raw[:, 0] = draw.integers(0, 250, rows * blocks)  # the E8M0 code of NaN is 255
    return torch.from_numpy(raw.reshape(rows, -1))


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_ggml_s(name: str) -> None:
    codec = codecs.get(name)
    block, nbytes = KINDS[name].block, KINDS[name].nbytes
    assert GGML.ggml_blck_size(KINDS[name].number) == block == codec.block
    assert GGML.ggml_type_size(KINDS[name].number) == nbytes and codec.nbytes((7, 3 * block)) == 7 * 3 * nbytes


@pytest.mark.parametrize("name", TYPES)
def test_gguf_decodes_the_same_bits(name: str) -> None:
    codec = codecs.get(name)
    rows, columns = 9, 2 * codec.block
    draw = torch.Generator().manual_seed(SEED)
    for size in (1e-6, 0.02, 1e3):
        grid = codec.project(*wishes(codec, rows, columns, size))
        codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
        theirs = reference(codec.pack(codes_OI, grid)["blocks"], name)
        ours = decode_grid(codec, codes_OI, grid)
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("name", TYPES)
def test_foreign_blocks_are_read_and_written_back(name: str) -> None:
    codec = codecs.get(name)
    rows, blocks = 6, 4
    raw = foreign(name, rows, blocks)
    codes_OI, grid = codec.unpack({"blocks": raw}, (rows, blocks * codec.block))
    decoded = decode_grid(codec, codes_OI, grid)
    theirs = reference(raw, name)
    if name == "Q8_0":  # -128, which no encoder writes, is read as -127
        assert torch.equal(decoded[codes_OI > 0], theirs[codes_OI > 0])
        return
    assert torch.equal(decoded, theirs)
    again = codec.pack(codes_OI, grid)["blocks"]
    if name == "MXFP4":  # has two zeros
        assert torch.equal(reference(again, name), theirs)
    else:
        assert torch.equal(again, raw)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_nearest_rounding_is_as_good_as_the_library_s_encoder(name: str) -> None:
    codec = codecs.get(name)
    weight_OI = 0.03 * torch.randn(64, 512, generator=torch.Generator().manual_seed(SEED))
    grid = absmax(weight_OI, codec)
    ours = decode_grid(codec, nearest(weight_OI, codec, grid), grid)
    theirs = reference(torch.from_numpy(gguf.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType[name])), name)
    assert float((ours - weight_OI).square().sum()) <= 1.05 * float((theirs - weight_OI).square().sum())


LOSS = {"Q2_K": 1.1, "Q3_K": 1.05, "Q4_K": 1.03, "Q5_K": 1.03, "Q6_K": 1.01}


@pytest.mark.parametrize(("name", "loss"), LOSS.items())
def test_sharing_a_scale_costs_little(name: str, loss: float) -> None:
    """Against the same levels with a free float32 scale (and offset) for every sub-block."""
    codec = codecs.get(name)
    weight_OI = torch.randn(32, 1024, generator=torch.Generator().manual_seed(SEED))
    weight_NS = weight_OI.view(-1, codec.step)
    low, high = codec.levels[0], codec.levels[-1]
    if codec.affine:
        offset = weight_NS.amin(-1, keepdim=True)
        scale = (weight_NS.amax(-1, keepdim=True) - offset) / high
    else:
        offset = torch.zeros(())
        scale = weight_NS.gather(-1, weight_NS.abs().argmax(-1, keepdim=True)) / low
    free = ((weight_NS - offset) / scale).round().clamp(low, high) * scale + offset
    grid = absmax(weight_OI, codec)
    shared = decode_grid(codec, nearest(weight_OI, codec, grid), grid)
    ratio = (shared - weight_OI).square().sum() / (free - weight_NS).square().sum()
    assert float(ratio) < loss


@pytest.mark.parametrize(("top", "signed"), [(15, False), (63, False), (32, True), (128, True)])
def test_shared_scales_are_near_the_best_of_all_float16(top: int, signed: bool) -> None:
    """Brute force: every d from extreme / top to extreme / (top / 2) on a fine mesh, both signs."""
    draw = torch.Generator().manual_seed(SEED)
    wish_NK = torch.randn(40, 8, generator=draw) if signed else torch.rand(40, 8, generator=draw)
    d_N, s_NK = share(wish_NK, top, signed=signed)
    assert d_N.dtype == torch.float16
    low, high = (-top, top - 1) if signed else (0, top)
    assert float(s_NK.min()) >= low and float(s_NK.max()) <= high
    error_N = (d_N.float()[:, None] * s_NK - wish_NK).square().sum(-1)
    mesh = wish_NK.abs().amax(-1, keepdim=True) / torch.linspace(top / 2, top * 1.02, 4000)
    mesh = torch.cat([mesh, -mesh], -1) if signed else mesh
    s = (wish_NK[:, None] / mesh[..., None]).round().clamp(low, high)
    best_N = (s * mesh[..., None] - wish_NK[:, None]).square().sum(-1).amin(-1)
    assert float(error_N.sum()) < 1.35 * float(best_N.sum())


def test_a_wish_that_k_quants_cannot_hold_keeps_its_far_end() -> None:
    """A range above zero is reached from zero; a negative scale is the same range from the other end."""
    codec = codecs.get("Q4_K")
    scale_OG = torch.full((1, 8), 0.1)
    above = codec.project(scale_OG, torch.full((1, 8), 0.5))
    assert above.offset_OG is not None and (above.offset_OG == 0).all()
    torch.testing.assert_close(15 * above.scale_OG, torch.full((1, 8), 0.5 + 1.5), rtol=1e-3, atol=0)
    turned = codec.project(-scale_OG, torch.full((1, 8), 0.5))
    straight = codec.project(scale_OG, torch.full((1, 8), -1.0))
    torch.testing.assert_close(turned.scale_OG, straight.scale_OG, rtol=1e-3, atol=0)
    torch.testing.assert_close(turned.offset_OG, straight.offset_OG, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("top", "signed"), [(15, False), (63, False), (32, True), (128, True)])
def test_sharing_twice_changes_nothing_where_float16_is_coarse(top: int, signed: bool) -> None:
    """Wishes from far below the smallest float16 to thousands: among the subnormals, d itself moves in big steps."""
    draw = torch.Generator().manual_seed(SEED)
    size = 2.0 ** torch.randint(-27, 13, (60000, 1), generator=draw)
    wish_NK = torch.randn(60000, 16, generator=draw) * size * 2.0 ** torch.randint(-8, 1, (60000, 16), generator=draw)
    d_N, s_NK = share(wish_NK if signed else wish_NK.abs(), top, signed=signed)
    first_NK = d_N.float()[:, None] * s_NK
    d_N, s_NK = share(first_NK, top, signed=signed)
    assert torch.equal(d_N.float()[:, None] * s_NK, first_NK)
