"""What every codec promises, whatever its bytes: checked for all registered names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from supremum import codecs
from supremum.checkpoint import write_gptq
from supremum.checkpoint.gguf_types import KINDS
from supremum.checkpoint.write_compressed_tensors import layout
from supremum.codecs import Codec, Coded, Grid, decode_grid

from ..solve.reference import SCALARS

SEED = 20


def width(codec: Codec) -> int:
    """A small number of columns that the codec can hold."""
    return 2 * codec.block if codec.block > 1 else 45


def groups(codec: Codec, columns: int) -> int:
    return columns // codec.step if codec.step else 1


def wishes(codec: Codec, rows: int, columns: int, size: float = 0.02) -> tuple[Tensor, Tensor | None]:
    """Scales of both signs and offsets as a solver would wish them for weights around zero."""
    shape = -(-rows // codec.rows), groups(codec, columns)
    draw = torch.Generator().manual_seed(SEED)
    scale_OG = (size * torch.rand(shape, generator=draw) + size / 10).repeat_interleave(codec.rows, 0)[:rows]
    if codec.affine:
        return scale_OG, -scale_OG * (len(codec.levels) - 1) * torch.rand(shape, generator=draw)
    sign_OG = (1 - 2 * torch.randint(2, shape, generator=draw)).repeat_interleave(codec.rows, 0)[:rows]
    return scale_OG * sign_OG, None


def same(one: Grid, other: Grid) -> bool:
    offsets = [torch.zeros(()) if grid.offset_OG is None else grid.offset_OG for grid in (one, other)]
    return torch.equal(one.scale_OG, other.scale_OG) and torch.equal(*offsets)


def nearest(weight_OI: Tensor, codec: Codec, grid: Grid) -> Tensor:
    """Codes of the nearest reconstruction points, by trying every level."""
    rows, columns = weight_OI.shape
    step = codec.step or columns
    scale_OI = grid.scale_OG.repeat_interleave(step, 1)
    offset_OI = 0 if grid.offset_OG is None else grid.offset_OG.repeat_interleave(step, 1)
    best = torch.full((rows, columns), torch.inf)
    codes_OI = torch.zeros(rows, columns, dtype=torch.uint8)
    for code, level in enumerate(codec.levels.tolist()):
        error_OI = (scale_OI * level + offset_OI - weight_OI).abs()
        codes_OI = torch.where(error_OI < best, code, codes_OI)
        best = torch.minimum(best, error_OI)
    return codes_OI


def absmax(weight_OI: Tensor, codec: Codec) -> Grid:
    """The grid whose levels just reach each group's extremes; a longer side of the levels faces the larger one."""
    rows, columns = weight_OI.shape
    weight_OGS = weight_OI.view(rows, groups(codec, columns), -1)
    least, greatest = weight_OGS.amin(-1), weight_OGS.amax(-1)
    if codec.rows > 1:  # the tests' matrices have fewer rows than a tile
        least, greatest = least.amin(0).expand(rows, -1), greatest.amax(0).expand(rows, -1)
    low, high = float(codec.levels[0]), float(codec.levels[-1])
    if codec.affine:
        scale_OG = (greatest - least) / (high - low)
        return codec.project(scale_OG, least - low * scale_OG)
    larger = torch.where(-least > greatest, least, greatest)
    return codec.project(larger / (low if abs(low) > high else high), None)


@pytest.mark.parametrize("name", codecs.names())
def test_levels_are_sorted_and_codes_fit_a_byte(name: str) -> None:
    codec = codecs.get(name)
    assert codec.name == name and 2 <= len(codec.levels) <= 256
    assert (codec.levels.diff() > 0).all() and torch.equal(codec.levels, codec.levels.round())
    assert codec.step == 0 or codec.block % codec.step == 0


@pytest.mark.parametrize("name", codecs.names())
def test_some_target_holds_it(name: str) -> None:
    assert name in KINDS or layout(name) or write_gptq.CODEC.fullmatch(name)


@pytest.mark.parametrize("name", SCALARS)
def test_what_is_packed_comes_back(name: str) -> None:
    codec = codecs.get(name)
    rows, columns = 5, width(codec)
    grid = codec.project(*wishes(codec, rows, columns))
    draw = torch.Generator().manual_seed(SEED)
    codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
    tensors = codec.pack(codes_OI, grid)
    back_OI, back = codec.unpack(tensors, (rows, columns))
    assert torch.equal(back_OI, codes_OI) and back_OI.dtype == torch.uint8
    assert same(back, grid)
    assert all(torch.equal(back.fields[key], grid.fields[key]) for key in grid.fields)
    coded = Coded(codec, tensors, (rows, columns))
    assert coded.nbytes == codec.nbytes((rows, columns))
    assert torch.equal(coded.decode(), decode_grid(codec, codes_OI, grid))
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("name", SCALARS)
def test_projection_is_near_the_wish(name: str) -> None:
    """float16 and bfloat16 lose half a unit in the last place, E4M3 too; a shared scale half a multiple; E8M0 up to 5/3;
    a zero point half a scale."""
    codec = codecs.get(name)
    scale_OG, offset_OG = wishes(codec, 64, width(codec))
    grid = codec.project(scale_OG, offset_OG)
    if name.upper().startswith("MXFP"):
        ratio = scale_OG.abs() / grid.scale_OG
        assert float(ratio.min()) >= 0.5 and float(ratio.max()) <= 1.2 + 1e-6
        return
    if codec.levels[0] == -codec.levels[-1]:  # a sign would be worth nothing, and some formats have none
        scale_OG = torch.where(grid.scale_OG < 0, -1, 1) * scale_OG.abs()
    multiples = {"Q2_K": 15, "Q3_K": 32, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128, "IQ4_XS": 32}.get(name)
    loss = (2**-4 if name == "nvfp4-g16" else 2**-8) if multiples is None else 0.75 / multiples
    assert float((grid.scale_OG - scale_OG).abs().max()) <= loss * float(scale_OG.abs().max())
    if offset_OG is not None:
        assert grid.offset_OG is not None
        error = (grid.offset_OG - offset_OG).abs() - (grid.scale_OG / 2 if codec.zero_points else 0)
        assert float(error.max()) <= loss * float(offset_OG.abs().max())


extreme = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 2.0**-149, 2.0**-126, 6e-8, -3e-8, 65504.0, 65520.0, -1e6, 3e38, -3e38, 1.0]),
    st.floats(-1.0, 1.0, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)


REPRESENTATIVES = (
    ["int2-g32", "int5-g32", "int8-channel", "uint2-g32", "uint8-channel", "gptq3-g32", "gptq8-channel"]  # the other
    + [name for name in SCALARS if not name.startswith(("int", "uint", "gptq"))]  # integers differ in a number only
)


@pytest.mark.parametrize("name", REPRESENTATIVES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_wish_becomes_a_finite_grid_that_projects_on_itself(name: str, data: st.DataObject) -> None:
    codec = codecs.get(name)
    count = 2 * groups(codec, max(codec.block, 1))
    values = [st.lists(extreme, min_size=count, max_size=count) for _ in range(1 + codec.affine)]
    wished = [torch.tensor(data.draw(v), dtype=torch.float32).view(2, -1) for v in values]
    wished = [wish[:1].expand(2, -1) if codec.rows > 1 else wish for wish in wished]
    grid = codec.project(wished[0], wished[1] if codec.affine else None)
    assert same(codec.project(grid.scale_OG, grid.offset_OG), grid)
    shape = (2, max(codec.block, 1))
    for code in (0, len(codec.levels) - 1):
        codes_OI = torch.full(shape, code, dtype=torch.uint8)
        assert decode_grid(codec, codes_OI, grid).isfinite().all()
        back_OI, back = codec.unpack(codec.pack(codes_OI, grid), shape)
        assert torch.equal(back_OI, codes_OI) and same(back, grid)


@pytest.mark.parametrize("name", SCALARS)
def test_zeros_stay_zero(name: str) -> None:
    codec = codecs.get(name)
    weight_OI = torch.zeros(3, width(codec))
    grid = absmax(weight_OI, codec)
    assert decode_grid(codec, nearest(weight_OI, codec, grid), grid).eq(0).all()


@pytest.mark.parametrize("name", SCALARS)
def test_gaussian_error_lies_between_the_bound_and_the_step(name: str) -> None:
    """Rate-distortion: no code of R bits has less than 2^-2R. Uniform levels that reach the extremes: step^2 / 12."""
    codec = codecs.get(name)
    rows, columns = 24, 512
    weight_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED))
    grid = absmax(weight_OI, codec)
    codes_OI = nearest(weight_OI, codec, grid)
    error = float((decode_grid(codec, codes_OI, grid) - weight_OI).square().mean())
    rate = codecs.bits_per_weight(codec, (4096, 4096)) if codec.step else 8 * codec.nbytes((24, 512)) / (24 * 512)
    assert error > 4.0**-rate
    spacing = codec.levels.diff()
    if len(codec.levels) >= 8 and (spacing == 1).all():
        uniform = float(grid.scale_OG.square().mean()) / 12
        assert 0.85 * uniform < error < 1.1 * uniform  # a coarse grid meets the Gaussian's tails, a fine one not
