"""GGUF headers, parsed with every size checked against the file before it is believed.

    magic "GGUF", u32 version, u64 tensors, u64 pairs
    pair    string key, u32 type, value             string: u64 length, UTF-8 bytes
    tensor  string name, u32 dims, u64 x dims (fastest first), u32 type, u64 offset
    padding to general.alignment, then the tensors' bytes at their offsets

(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The parsers of llama.cpp and of the `gguf` library have
been attacked with counts, lengths and dimensions that overflow, nest or allocate; here a count is compared with the
bytes that are left before anything is read or allocated, so a bad file costs no more than its size.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFValueType

from ..errors import CheckpointError
from .gguf_types import NUMBERED, Kind
from .safety import regular

MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEY = 1 << 16  # bytes, by the specification
MAX_NAME = 128  # bytes; ggml itself has room for 64
MAX_STRING = 64 << 20  # bytes
MAX_ITEMS = 1 << 24  # of one array
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
DAMAGED = "It is truncated, damaged or made to attack; download it again from a source that you trust."

SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file. `shape`: slowest dimension first, as in PyTorch; `offset`: from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: Kind
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """`spans`: where each key-value pair lies in the file, (begin, end) in bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    spans: dict[str, tuple[int, int]]


class _Cursor:
    """Reads little-endian values; refuses to pass the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def refuse(self, cause: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {cause}.", DAMAGED)

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.refuse(f"{what} needs {nbytes} bytes, {self.size - self.at} are left")

    def take(self, nbytes: int, what: str) -> bytes:
        self.need(nbytes, what)
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise self.refuse(f"{what}: the file ended while it was being read")
        self.at += nbytes
        return data

    def unsigned(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "little")

    def string(self, limit: int, what: str) -> str:
        length = self.unsigned(8, what)
        if length > limit:
            raise self.refuse(f"{what} is a string of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is not UTF-8") from error

    def value(self, code: int, what: str) -> Any:
        if code == GGUFValueType.STRING:
            return self.string(MAX_STRING, what)
        if code == GGUFValueType.ARRAY:
            return self.array(what)
        return self.scalars(code, 1, what)[0]

    def array(self, what: str) -> list[Any]:
        code, count = self.unsigned(4, what), self.unsigned(8, what)
        if code == GGUFValueType.ARRAY:
            raise self.refuse(f"{what} is an array of arrays")
        if count > MAX_ITEMS:
            raise self.refuse(f"{what} is an array of {count} items")
        if code == GGUFValueType.STRING:
            self.need(8 * count, what)
            return [self.string(MAX_STRING, what) for _ in range(count)]
        return self.scalars(code, count, what)

    def scalars(self, code: int, count: int, what: str) -> list[Any]:
        if code not in SCALARS:
            raise self.refuse(f"{what} has the unknown type {code}")
        dtype = np.dtype(SCALARS[GGUFValueType(code)])
        data = self.take(count * dtype.itemsize, what)
        if dtype == np.bool_ and data.strip(b"\0\1"):
            raise self.refuse(f"{what} is neither true nor false")
        return np.frombuffer(data, dtype).tolist()


def read_header(path: Path) -> GGUFHeader:
    """The key-value pairs and the tensors' places. Raises CheckpointError, naming the file, for anything else."""
    regular(path)
    with path.open("rb") as file:
        cursor = _Cursor(file, path)
        if cursor.take(4, "the magic number") != b"GGUF":
            raise CheckpointError(f"{path}: is not a GGUF file.", "Give a .gguf file or a model folder.")
        (version,) = struct.unpack("<I", cursor.take(4, "the version"))
        if version not in (2, 3):
            kind = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise CheckpointError(f"{path}: is a GGUF file {kind}; versions 2 and 3, little-endian, are read.",
                                  "Convert the model again with a current llama.cpp.")  # fmt: skip
        tensors, pairs = cursor.unsigned(8, "the tensor count"), cursor.unsigned(8, "the pair count")
        if tensors > MAX_TENSORS or pairs > MAX_PAIRS:
            raise cursor.refuse(f"claims {tensors} tensors and {pairs} pairs")
        cursor.need(13 * pairs + 24 * tensors, f"a header of {pairs} pairs and {tensors} tensors")
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for number in range(pairs):
            begin = cursor.at
            key = cursor.string(MAX_KEY, f"key {number}")
            if not key or key in metadata:
                raise cursor.refuse(f"the key {key!r} " + ("appears twice" if key else "is empty"))
            metadata[key] = cursor.value(cursor.unsigned(4, f"the type of {key}"), key)
            spans[key] = (begin, cursor.at)
        raw = [_tensor(cursor, number) for number in range(tensors)]
        return GGUFHeader(metadata, _placed(cursor, metadata, raw), spans)


def _tensor(cursor: _Cursor, number: int) -> GGUFTensor:
    name = cursor.string(MAX_NAME, f"the name of tensor {number}")
    what = f"tensor {name}"
    dims = cursor.unsigned(4, what)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.refuse(f"{what} has {dims} dimensions")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims, what))
    code, offset = cursor.unsigned(4, what), cursor.unsigned(8, what)
    if (kind := NUMBERED.get(code)) is None:
        raise cursor.refuse(f"{what} has the unknown type {code}")
    if min(shape) < 1 or math.prod(shape) > 1 << 50:
        raise cursor.refuse(f"{what} has the impossible shape {shape[::-1]}")
    if shape[0] % kind.block:
        raise cursor.refuse(f"{what} has rows of {shape[0]} weights; {kind.name} stores blocks of {kind.block}")
    return GGUFTensor(name, shape[::-1], kind, offset, math.prod(shape) // kind.block * kind.nbytes)


def _placed(cursor: _Cursor, metadata: dict[str, Any], raw: list[GGUFTensor]) -> dict[str, GGUFTensor]:
    """The tensors with offsets from the file's start, checked to be aligned, inside the file and apart."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.refuse(f"general.alignment is {str(alignment)[:40]}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end = start
    for tensor in sorted(raw, key=lambda t: t.offset):
        if tensor.name in tensors:
            raise cursor.refuse(f"tensor {tensor.name} appears twice")
        if tensor.offset % alignment:
            raise cursor.refuse(f"tensor {tensor.name} starts at {tensor.offset}, not a multiple of {alignment}")
        offset = start + tensor.offset
        if offset < end:
            raise cursor.refuse(f"tensor {tensor.name} overlaps another")
        end = offset + tensor.nbytes
        if end > cursor.size:
            raise cursor.refuse(f"tensor {tensor.name} ends at byte {end} of a file of {cursor.size}")
        tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.type, offset, tensor.nbytes)
    return tensors
