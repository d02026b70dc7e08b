"""Integers against the compressed-tensors library, which stock Transformers decodes with."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import example, given, settings
from hypothesis import strategies as st

from supremum import codecs
from supremum.codecs import decode_grid
from supremum.codecs.integer import pack_bits, unpack_bits

from .test_contract import SEED, width, wishes

INTEGERS = [name for name in codecs.names() if name.startswith("int")]


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


@pytest.mark.parametrize("name", INTEGERS)
def test_compressed_tensors_decodes_the_same_weights(name: str) -> None:
    """It multiplies in bfloat16, so its result is ours rounded once."""
    codec = codecs.get(name)
    rows, columns = 6, width(codec)
    grid = codec.project(*wishes(codec, rows, columns))
    draw = torch.Generator().manual_seed(SEED)
    codes_OI = torch.randint(len(codec.levels), (rows, columns), generator=draw).to(torch.uint8)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=int(name[3]),
            symmetric=True,
            strategy="group" if codec.step else "channel",
            group_size=codec.step or None,
        ),
    )
    tensors = codec.pack(codes_OI, grid)
    assert set(tensors) == {key for key in PackedQuantizationCompressor.compression_param_names(scheme)}
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(theirs, decode_grid(codec, codes_OI, grid).bfloat16())


@pytest.mark.parametrize("name", ["int4-g64", "int3-channel"])
def test_a_group_of_zeros_has_a_normal_scale(name: str) -> None:
    codec = codecs.get(name)
    grid = codec.project(torch.zeros(2, 1), None)
    assert (grid.scale_OG >= torch.finfo(torch.bfloat16).tiny).all()
