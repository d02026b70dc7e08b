"""The codecs of compressed-tensors against the library itself, which stock Transformers decodes with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from supremum import codecs
from supremum.codecs import decode_grid
from supremum.codecs.activations import round_inputs, rounder
from supremum.codecs.integer import pack_bits, unpack_bits
from supremum.codecs.layout import Layout

from .test_contract import SEED, width, wishes

LAYOUTS: list[Layout] = [codec for name in codecs.names() if isinstance(codec := codecs.get(name), Layout)]
PRESETS = {
    "fp8-channel-a8": "FP8_DYNAMIC", "int8-channel-a8": "W8A8", "mxfp4-g32": "MXFP4A16", "mxfp6-g32": "MXFP6A16",
    "mxfp8-g32": "MXFP8A16", "nvfp4-g16": "NVFP4A16", "uint4-g128": "W4A16_ASYM", "int3-g128": "W3A16",
}  # fmt: skip


def scheme(codec: Layout) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], **codec.scheme())


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 40), columns=st.integers(1, 100), seed=st.integers(0, 99))
@example(bits=8, rows=32, columns=1, seed=0)  # its transpose is one row of stride 1
@example(bits=2, rows=32, columns=1, seed=0)
def test_bits_lie_as_in_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes_RC = torch.randint(2**bits, (rows, columns), generator=draw).to(torch.uint8)
    signed = (codes_RC.short() - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_bits(codes_RC, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(pack_bits(codes_RC.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack_bits(packed, bits, columns), codes_RC)


@pytest.mark.parametrize("codec", LAYOUTS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("rows", [6, 130])
def test_compressed_tensors_decodes_the_same_weights(codec: Layout, rows: int) -> None:
    """It multiplies in bfloat16, or divides in float32 first, so its result is ours rounded once."""
    columns = width(codec)
    grid = codec.project(*wishes(codec, rows, columns))
    draw = torch.Generator().manual_seed(SEED)
    codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
    tensors = codec.pack(codes_OI, grid)
    compressor = BaseCompressor.get_value_from_registry(codec.format)
    assert set(tensors) == set(compressor.compression_param_names(scheme(codec)))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == codec.stored((rows, columns))
    theirs = compressor.decompress(tensors, scheme(codec))["weight"]
    ours = decode_grid(codec, codes_OI, grid)
    assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, ours.bfloat16())
    if codec.bfloat16:
        assert torch.equal(theirs.float(), ours), "not exact in bfloat16"
    elif not codec.zero_points:  # a float32 model multiplies in float32
        scale = {"weight_scale": tensors["weight_scale"].float()}
        assert torch.equal(compressor.decompress(tensors | scale, scheme(codec))["weight"], ours)


@pytest.mark.parametrize("codec", LAYOUTS, ids=lambda codec: codec.name)
def test_what_the_library_rounds_to_our_scales_comes_back(codec: Layout) -> None:
    """Their quantiser packs the values of our grid into our bytes."""
    rows, columns = 6, width(codec)
    grid = codec.project(*wishes(codec, rows, columns))
    grid = codec.unpack(codec.pack(torch.zeros(rows, columns, dtype=torch.uint8), grid), (rows, columns))[1]
    draw = torch.Generator().manual_seed(SEED)
    codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
    ours = codec.pack(codes_OI, grid)
    state = {"weight": decode_grid(codec, codes_OI, grid), "weight_scale": ours["weight_scale"].float()}
    if codec.format.startswith("mx"):
        state["weight_scale"] = (ours["weight_scale"].float() - 127).exp2()
    if "weight_global_scale" in ours:
        state["weight_global_scale"] = ours["weight_global_scale"]
    if codec.zero_points:
        half = 1 << (codec.bits - 1)
        state["weight_zero_point"] = (grid.fields["zero"].short() - half).to(torch.int8)
    theirs = BaseCompressor.get_value_from_registry(codec.format).compress(state, scheme(codec))
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_are_those_of_the_presets(name: str) -> None:
    """As the library names them; scale types that its defaults imply are left out."""
    codec = codecs.get(name)
    assert isinstance(codec, Layout)
    ours = scheme(codec).model_dump(exclude={"format"})
    preset = preset_name_to_scheme(PRESETS[name], ["Linear"]).model_dump(exclude={"format"})
    for part in ("weights", "input_activations"):
        one, other = ours[part] or {}, preset[part] or {}
        assert one.keys() | {"zp_dtype"} == other.keys() | {"zp_dtype"}
        assert all(one[key] == other[key] for key in one.keys() & other.keys()), (one, other)


@pytest.mark.parametrize("name", ["int8-channel-a8", "fp8-channel-a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_the_library_rounds_them(name: str, dtype: torch.dtype) -> None:
    codec, layer = codecs.get(name), nn.Linear(48, 3)
    assert isinstance(codec, Layout)
    layer.quantization_status = QuantizationStatus.DECOMPRESSED  # type: ignore[assignment]
    x_BTI = (torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(SEED)) * 3).to(dtype)
    x_BTI[0, 3], x_BTI[1, 4, 7] = 0, 500.0
    args = scheme(codec).input_activations
    assert args is not None
    theirs = forward_quantize(layer, x_BTI, "input", args)
    apply = rounder(name)
    assert apply is not None and torch.equal(apply(x_BTI), theirs) and not torch.equal(theirs, x_BTI)


def test_gradients_pass_rounded_inputs() -> None:
    layer, x_TI = nn.Linear(8, 4), torch.randn(5, 8, requires_grad=True)
    plain, = torch.autograd.grad(layer(x_TI).sum(), x_TI)
    hook = round_inputs(layer, "int8-channel-a8")
    rounded, = torch.autograd.grad(layer(x_TI).sum(), x_TI)
    hook.remove()
    assert torch.equal(plain, rounded) and round_inputs(layer, "int8-channel") is None


def test_numbers_of_each_float_format() -> None:
    """E2M1 and E2M3 as the OCP specification lists them, E4M3 as PyTorch reads the bytes."""
    assert codecs.get("mxfp4-g32").levels[7:].tolist() == [0, 1, 2, 3, 4, 6, 8, 12]
    assert (codecs.get("mxfp6-g32").levels[-4:] / 8).tolist() == [6, 6.5, 7, 7.5]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(codecs.get("fp8-channel").levels / 512, every[~every.isnan()].unique())


def test_negative_zero_is_zero() -> None:
    codec = codecs.get("mxfp4-g32")
    grid = codec.project(torch.ones(1, 1), None)
    codes_OI = torch.full((1, 32), 7, dtype=torch.uint8)
    tensors = codec.pack(codes_OI, grid)
    tensors["weight_packed"] = torch.full_like(tensors["weight_packed"], 0x88)
    assert torch.equal(codec.unpack(tensors, (1, 32))[0], codes_OI)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0])
def test_every_nvfp4_scale_has_an_inverse(size: float) -> None:
    scale_OG = codecs.get("nvfp4-g16").project(torch.tensor([[size, 0.0], [0.3 * size, size]]), None).scale_OG
    assert (1 / scale_OG).isfinite().all() and (scale_OG > 0).all()


@pytest.mark.parametrize("size", [1e-6, 0.011, 0.44, 0.45, 0.49, 300.0])
def test_the_largest_nvfp4_scale_is_not_clipped(size: float) -> None:
    scale_OG = torch.tensor([[size, size / 100]])
    codec = codecs.get("nvfp4-g16")
    assert bool(((codec.project(scale_OG, None).scale_OG - scale_OG).abs() <= scale_OG / 16).all())
    tensors = codec.pack(torch.zeros(1, 32, dtype=torch.uint8), codec.project(scale_OG, None))
    assert 200 < float(tensors["weight_scale"].float().amax()) <= 448  # the fine end of the range


@pytest.mark.parametrize("seed", range(4))
def test_matrices_solved_together_keep_exact_nvfp4_scales(seed: int) -> None:
    """Rows of one projection, cut into matrices: each finds the power of two that holds its own."""
    codec, draw = codecs.get("nvfp4-g16"), torch.Generator().manual_seed(seed)
    grid = codec.project(torch.exp(2 * torch.randn(12, 4, generator=draw)) * 1e-3, None)
    for rows in (slice(0, 1), slice(1, 12)):
        part = codecs.Grid(grid.scale_OG[rows], None, {key: value[rows] for key, value in grid.fields.items()})
        shape = part.scale_OG.shape[0], 64
        back = codec.unpack(codec.pack(torch.zeros(shape, dtype=torch.uint8), part), shape)[1]
        assert torch.equal(back.scale_OG, part.scale_OG)


@pytest.mark.parametrize("name", ["int4-g64", "int3-channel"])
def test_a_group_of_zeros_has_a_normal_scale(name: str) -> None:
    codec = codecs.get(name)
    grid = codec.project(torch.zeros(2, 1), None)
    assert (grid.scale_OG >= torch.finfo(torch.bfloat16).tiny).all()


def test_ranges_without_zero_are_widened() -> None:
    """Zero points are codes: the grid of weights between 1 and 3 has to reach from 0 to 3."""
    grid = codecs.get("uint2-g32").project(torch.tensor([[2 / 3, 2 / 3, 0.0]]), torch.tensor([[1.0, -3.0, -6.0]]))
    assert grid.offset_OG is not None
    assert grid.scale_OG.tolist() == [[1.0, 1.0, 2.0]] and grid.offset_OG.tolist() == [[0.0, -3.0, -6.0]]


def rate(name: str, shape: tuple[int, int]) -> float:
    return codecs.bits_per_weight(codecs.get(name), shape)


def test_rates_count_everything_that_is_written() -> None:
    """A thousand rows and columns: bits of the codes, of the scales, of the zero points, and 16 bytes of shape."""
    shape, small = (1024, 1024), 128 / 2**20
    assert rate("uint2-g64", shape) == 2 + 16 / 64 + 2 / 64 + small
    assert rate("ternary-g64", shape) == rate("int2-g64", shape) == 2.25 + small
    assert rate("mxfp6-g32", shape) == 6.25 and rate("nvfp4-g16", shape) == 4.5 + 32 / 2**20
    assert rate("fp8-b128", shape) == 8 + 16 / 128**2 and rate("fp8-b128", (1000, 1024)) == 8 + 16 * 64 / (1000 * 1024)
    assert rate("int8-channel-a8", shape) == 8 + 16 / 1024




def test_the_page_of_formats_names_every_codec_and_its_bits() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    named = set()
    for row in (line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")):
        parts = [word for quoted in row[0].split("`")[1::2] for word in quoted.split()]
        stems, ends = [part for part in parts if part[0] != "-"], [part for part in parts if part[0] == "-"] or [""]
        if stems == ["int2", "int8"]:  # "int2 ... int8"
            stems = [f"int{bits}" for bits in range(2, 9)]
        names = [stem + end for stem in stems for end in ends]
        named.update(names)
        *example, bits = row[3].split()
        assert float(bits) == round(rate(example[0].strip("`") if example else names[0], (4096, 4096)), 4), row
    assert named == {codec.name for codec in LAYOUTS}
