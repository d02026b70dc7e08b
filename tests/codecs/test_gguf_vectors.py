"""GGUF's vector types against the `gguf` library's decoder, for any bytes and for what we write."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from supremum import codecs
from supremum.codecs import Coded, decode_grid
from supremum.codecs.gguf_k import share
from supremum.codecs.gguf_vectors import BLOCK, Vectors

VECTORS = [name for name in codecs.names() if codecs.get(name).book is not None]


def codec_of(name: str) -> Vectors:
    codec = codecs.get(name)
    assert isinstance(codec, Vectors)
    return codec


def reference(blocks: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(blocks.numpy(), Kind[name]))


def random_codes(codec: Vectors, rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Codes (rows, columns) of vectors of the book, with signs that the format allows."""
    points_KV = codec.book.points_KV
    chosen = torch.randint(len(points_KV), (rows * columns // points_KV.shape[1],), generator=draw)
    level_U8 = points_KV[chosen].reshape(-1, 8)
    if codec.book.signs != "own":
        sign_U8 = 1 - 2 * torch.randint(2, level_U8.shape, generator=draw)
        if codec.book.signs == "even":
            sign_U8[:, 0] *= sign_U8.prod(1)
        level_U8 = level_U8 * sign_U8
    return torch.searchsorted(codec.levels, level_U8).to(torch.uint8).view(rows, columns)


def test_all_of_llama_cpp_s_types_are_there() -> None:
    assert VECTORS == ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS"]


@pytest.mark.parametrize("name", VECTORS)
def test_sizes_are_ggml_s(name: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[Kind[name]]
    assert block == BLOCK and codecs.get(name).nbytes((7, 3 * block)) == 7 * 3 * nbytes


@pytest.mark.parametrize("name", VECTORS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_to_the_library_s_bits_and_are_written_back(name: str, data: st.DataObject) -> None:
    """Where the super-scale is no number the weights are none either."""
    codec, nbytes = codec_of(name), gguf.GGML_QUANT_SIZES[Kind[name]][1]
    raw = np.frombuffer(data.draw(st.binary(min_size=4 * nbytes, max_size=4 * nbytes)), np.uint8).reshape(2, -1).copy()
    blocks = {"blocks": torch.from_numpy(raw)}
    ours, theirs = Coded(codec, blocks, (2, 2 * BLOCK)).decode(), reference(blocks["blocks"], name)
    number = theirs.isfinite()
    assert torch.equal(ours[number], theirs[number]) and not ours[~number].isfinite().any()
    assert torch.equal(codec.pack(*codec.unpack(blocks, (2, 2 * BLOCK)))["blocks"], blocks["blocks"])


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("size", [1e-6, 0.02, 1e3])
def test_what_is_packed_comes_back_and_decodes_the_same(name: str, size: float) -> None:
    codec, draw = codec_of(name), torch.Generator().manual_seed(20)
    wish_OG = size * (torch.rand(5, 2 * BLOCK // codec.step, generator=draw) + 0.1)
    grid = codec.project(wish_OG, wish_OG * torch.randn(wish_OG.shape, generator=draw) if codec.affine else None)
    codes_OI = random_codes(codec, 5, 2 * BLOCK, draw)
    tensors = codec.pack(codes_OI, grid)
    back_OI, back = codec.unpack(tensors, (5, 2 * BLOCK))
    assert torch.equal(back_OI, codes_OI) and torch.equal(back.scale_OG, grid.scale_OG)
    assert all(torch.equal(back.fields[key], grid.fields[key]) for key in grid.fields)
    assert torch.equal(decode_grid(codec, codes_OI, grid), reference(tensors["blocks"], name))
    assert tensors["blocks"].is_contiguous() and tensors["blocks"].numel() == codec.nbytes((5, 2 * BLOCK))


@pytest.mark.parametrize("name", VECTORS)
def test_codes_that_the_format_does_not_have_are_refused(name: str) -> None:
    codec = codec_of(name)
    grid = codec.project(torch.full((1, BLOCK // codec.step), 0.1), None)
    codes_OI = random_codes(codec, 1, BLOCK, torch.Generator().manual_seed(0))
    if codec.book.signs == "even":
        odd_OI = codes_OI.clone()
        odd_OI[0, 3] = len(codec.levels) - 1 - odd_OI[0, 3]
        with pytest.raises(AssertionError, match="odd number"):
            codec.pack(odd_OI, grid)
    width = codec.book.points_KV.shape[1]
    every = torch.cartesian_prod(*[torch.arange(2)] * width) if width == 8 else torch.cartesian_prod(*[torch.arange(8)] * 4)
    rank_KV = torch.searchsorted(codec.levels, codec.book.points_KV)
    missing = next(v for v in every + int(rank_KV.min()) if not (rank_KV == v).all(1).any())
    codes_OI[0, :width] = missing.to(torch.uint8)
    with pytest.raises(AssertionError, match=r"does not have|odd number"):
        codec.pack(codes_OI, grid)


extreme = st.one_of(st.sampled_from([0.0, 1e-45, 2.0**-126, 6e-8, -3e-8, 65504.0, -1e6, 3e38, 1.0]),
                    st.floats(-1.0, 1.0, width=32), st.floats(allow_nan=False, allow_infinity=False, width=32))


@pytest.mark.parametrize("name", VECTORS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_wish_becomes_a_finite_grid_that_projects_on_itself(name: str, data: st.DataObject) -> None:
    codec = codec_of(name)
    count = 2 * BLOCK // codec.step
    wish_OG, offset_OG = (torch.tensor(data.draw(st.lists(extreme, min_size=count, max_size=count))).view(2, -1)
                          for _ in range(2))
    grid = codec.project(wish_OG, offset_OG)
    again = codec.project(grid.scale_OG, grid.offset_OG)
    assert torch.equal(again.scale_OG, grid.scale_OG) and bool((grid.scale_OG > 0).all())
    assert (grid.offset_OG is None) == (again.offset_OG is None) == (not codec.affine)
    if grid.offset_OG is not None and again.offset_OG is not None:
        assert torch.equal(again.offset_OG, grid.offset_OG)
    codes_OI = random_codes(codec, 2, BLOCK, torch.Generator().manual_seed(1))
    assert decode_grid(codec, codes_OI, grid).isfinite().all()


@pytest.mark.parametrize("top", [15, 31])
def test_odd_multiples_are_near_the_best_of_all_float16(top: int) -> None:
    """Brute force over d on a fine mesh. Twice changes nothing."""
    wish_NK = torch.rand(60, 8, generator=torch.Generator().manual_seed(20)) + 0.1
    d_N, odd_NK = share(wish_NK, top, signed=False, odd=True)
    assert bool((odd_NK % 2 == 1).all()) and float(odd_NK.min()) >= 1 and float(odd_NK.max()) <= top
    shared_NK = d_N.float()[:, None] * odd_NK
    mesh = wish_NK.amax(-1, keepdim=True) / torch.linspace(top / 2, top * 1.02, 4000)
    odd = ((wish_NK[:, None] / mesh[..., None] - 1) / 2).round().mul(2).add(1).clamp(1, top)
    best_N = (odd * mesh[..., None] - wish_NK[:, None]).square().sum(-1).amin(-1)
    assert float((shared_NK - wish_NK).square().sum()) < 1.35 * float(best_N.sum())
    again_N, again_NK = share(shared_NK, top, signed=False, odd=True)
    assert torch.equal(again_N.float()[:, None] * again_NK, shared_NK)
