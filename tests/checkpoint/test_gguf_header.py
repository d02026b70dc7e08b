"""Hostile GGUF headers: the attacks on record and random damage end in a CheckpointError and nothing else."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.gguf_header import read_header
from supremum.errors import CheckpointError
from tests.checkpoint.gguf_files import Q, convert, pair, raw, string, tensor

U8, U32, FLOAT, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(code: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + items


def one(*values: object, **options: object) -> bytes:
    return raw(tensors=(tensor(*values),), **options)  # type: ignore[arg-type]


NESTED = b"".join(array(ARRAY, 1) for _ in range(5000)) + array(U8, 1, b"\0")
ATTACKS: dict[str, tuple[bytes, str]] = {
    "not GGUF": (raw(magic=b"GGML"), "is not a GGUF file"),
    "cut after the magic": (b"GGUF", "the version needs 4 bytes"),
    "cut in the counts": (raw()[:20], "needs 8 bytes"),
    "version 99": (raw(version=99), "of version 99"),
    "version 1": (raw(version=1), "of version 1"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "2^60 tensors": (raw(n_tensors=2**60), "claims 1152921504606846976 tensors"),
    "2^63 pairs": (raw(n_pairs=2**63), "claims 0 tensors and 9223372036854775808 pairs"),
    "more tensors than bytes": (raw(n_tensors=1000), "needs 24000 bytes"),
    "key of 2^62 bytes": (raw(pairs=(struct.pack("<Q", 2**62) + bytes(32),)), "is a string of 46116860184273"),
    "empty key": (raw(pairs=(pair("", U32, u32(1)),)), "is empty"),
    "key not UTF-8": (raw(pairs=(string(b"\xff\xfe") + u32(U32) + u32(1),)), "not UTF-8"),
    "key twice": (raw(pairs=(pair("a.b", U32, u32(1)), pair("a.b", U32, u32(2)))), "'a.b' appears twice"),
    "unknown value type": (raw(pairs=(pair("a", 77, bytes(8)),)), "unknown type 77"),
    "string of 2^40 bytes": (raw(pairs=(pair("a", STRING, struct.pack("<Q", 2**40)),)), "is a string of"),
    "string beyond the end": (raw(pairs=(pair("a", STRING, struct.pack("<Q", 10**6)),)), "needs 1000000 bytes"),
    "array of 2^40 bytes": (raw(pairs=(pair("a", ARRAY, array(U8, 2**40)),)), "is an array of 1099511627776 items"),
    "array of 2^40 strings": (raw(pairs=(pair("a", ARRAY, array(STRING, 2**40)),)), "is an array of"),
    "array beyond the end": (raw(pairs=(pair("a", ARRAY, array(STRING, 10**6)),)), "needs 8000000 bytes"),
    "array of an unknown type": (raw(pairs=(pair("a", ARRAY, array(55, 4, bytes(64))),)), "unknown type 55"),
    "nested arrays": (raw(pairs=(pair("a", ARRAY, NESTED),)), "array of arrays"),
    "neither true nor false": (raw(pairs=(pair("a", BOOL, b"\x07"),)), "neither true nor false"),
    "alignment 0": (one("w", pairs=(pair("general.alignment", U32, u32(0)),)), "general.alignment is 0"),
    "alignment 33": (one("w", pairs=(pair("general.alignment", U32, u32(33)),)), "general.alignment is 33"),
    "alignment 2^31": (one("w", pairs=(pair("general.alignment", U32, u32(2**31)),)), "general.alignment is"),
    "alignment as text": (one("w", pairs=(pair("general.alignment", STRING, string("32")),)), "general.alignment is"),
    "no dimensions": (one("w", ()), "has 0 dimensions"),
    "five dimensions": (one("w", (1, 1, 1, 1, 32)), "has 5 dimensions"),
    "dimension 0": (one("w", (32, 0)), "impossible shape"),
    "dimensions that overflow": (one("w", (2**42, 2**42)), "impossible shape"),
    "dimension 2^64 - 1": (one("w", (2**64 - 1,)), "impossible shape"),
    "unknown tensor type": (one("w", (32,), 999), "unknown type 999"),
    "removed tensor type": (one("w", (32,), 4), "unknown type 4"),
    "part of a block": (one("w", (33,), 2), "rows of 33 weights; Q4_0 stores blocks of 32"),
    "long name": (one("w" * 129), "is a string of 129 bytes"),
    "tensor twice": (raw(tensors=(tensor("w", (8,)), tensor("w", (8,), 0, 32))), "w appears twice"),
    "overlap": (raw(tensors=(tensor("a", (16,)), tensor("b", (16,), 0, 32))), "b overlaps another"),
    "offset not aligned": (one("w", (8,), 0, 7), "starts at 7"),
    "offset outside": (one("w", (32,), 0, 2**40), "ends at byte"),
    "offset that wraps": (one("w", (32,), 0, 2**64 - 32), "ends at byte"),
    "data cut": (one("w", (32,), data=bytes(127)), "ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(tmp_path: Path, attack: str) -> None:
    data, message = ATTACKS[attack]
    path = tmp_path / "attack.gguf"
    path.write_bytes(data)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2
    assert str(path) in caught.value.cause and caught.value.remedy


def test_what_the_format_allows(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    pairs = (pair("general.alignment", U32, u32(64)), pair("a", ARRAY, array(STRING, 2, string("x") + string("ü"))),
             pair("b", BOOL, b"\x01"), pair("c", ARRAY, array(FLOAT, 2, struct.pack("<2f", 0.5, -1))),
             pair("d", U64, struct.pack("<Q", 2**64 - 1)))  # fmt: skip
    data = raw(pairs=pairs, tensors=(tensor("w", (8, 2)), tensor("v", (32,), 2, 64)), alignment=64)
    path.write_bytes(data)
    header = read_header(path)
    assert header.metadata == {"general.alignment": 64, "a": ["x", "ü"], "b": True, "c": [0.5, -1.0], "d": 2**64 - 1}
    assert header.tensors["w"].shape == (2, 8) and header.tensors["v"].nbytes == 18
    assert header.tensors["w"].offset == len(data) - 128 and header.tensors["v"].offset == len(data) - 64


def test_other_files(tmp_path: Path) -> None:
    for content, message in ((b"", "is empty"), (b"PK\3\4" + bytes(99), "is not a GGUF file"),
                             (b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer")):  # fmt: skip
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / "x.gguf")


LAYERS = string("llama.block_count") + u32(4)
CONTRADICTIONS: dict[str, tuple[bytes, bytes, str]] = {
    "another architecture": (string("llama") + b"\x16", string("lorem") + b"\x16", "architecture 'lorem'"),
    "missing key": (b"llama.embedding_length", b"llama.embedding_weight", "llama.embedding_length is None"),
    "tensor renamed": (b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", "ffn_xx"),
    "norm renamed": (b"output_norm.weight", b"output_norn.weight", "output_norn|missing"),
    "embedding renamed": (b"token_embd.weight", b"token_embx.weight", "has no tensor token_embd.weight"),
    "more layers": (LAYERS + u32(2), LAYERS + u32(3), "missing, first model.layers.2"),
    "a billion layers": (LAYERS + u32(2), LAYERS + u32(10**9), "1000000000 layers"),
    "wider": (string("llama.embedding_length") + u32(4) + u32(64), string("llama.embedding_length") + u32(4) + u32(128),
              "has shape"),
    "no heads": (string("llama.attention.head_count") + u32(4) + u32(4),
                 string("llama.attention.head_count") + u32(4) + u32(0), "head_count is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(tiny_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    path = convert(tiny_model("llama"), tmp_path / "model.gguf", Q.Q8_0)
    before, after, message = CONTRADICTIONS[case]
    if case == "another architecture":
        before, after = string("general.architecture") + u32(8) + string("llama"), \
            string("general.architecture") + u32(8) + string("lorem")  # fmt: skip
    data = path.read_bytes()
    assert data.count(before) == 1 and len(before) == len(after)
    path.write_bytes(data.replace(before, after))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.cause and caught.value.remedy


def test_not_a_number(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = convert(tiny_model("llama"), tmp_path / "model.gguf", Q.Q8_0)
    place = read_header(path).tensors["blk.1.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[place.offset : place.offset + 2] = b"\x00\x7e"  # the first block's float16 scale
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or Inf"):
        open_checkpoint(path).read("model.layers.1.mlp.up_proj.weight")


def test_split_files_and_experts(tmp_path: Path) -> None:
    for key, value, message in (("split.count", 2, "one part of a split model"), ("llama.expert_count", 8, "mixture")):
        path = tmp_path / "model.gguf"
        path.write_bytes(raw(pairs=(pair("general.architecture", STRING, string("llama")), pair(key, U32, u32(value)))))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


VALID = raw(
    pairs=(pair("general.architecture", STRING, string("llama")), pair("n", U32, u32(7)),
           pair("t", ARRAY, array(STRING, 2, string("ab") + string("c")))),
    tensors=(tensor("w", (32, 1), 2), tensor("v", (4, 2), 0, 32)), data=bytes(64))  # fmt: skip


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=5),
       keep=st.integers(len(VALID) // 3, len(VALID)))  # fmt: skip
def test_mutations_never_crash(tmp_path: Path, edits: list[tuple[int, int]], keep: int) -> None:
    data = bytearray(VALID)
    for place, value in edits:
        data[place] = value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data[:keep])
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in error.cause
    else:
        assert all(t.offset + t.nbytes <= keep for t in header.tensors.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3))
def test_mutated_models_open_or_are_refused(tiny_model: Callable[..., Path], tmp_path: Path,
                                            edits: list[tuple[int, int]]) -> None:  # fmt: skip
    """A whole model whose header is damaged: config, names and shapes go through the same gate."""
    path = tmp_path / "model.gguf"
    if not (tmp_path / "whole").exists():
        convert(tiny_model("gpt2"), path, Q.Q8_0)
        path.rename(tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    for place, value in edits:
        data[place] = value
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.tokenizer()
        checkpoint.model()
    except CheckpointError:
        pass
    finally:
        path.unlink()
