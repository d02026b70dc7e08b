"""Safetensors files: the header checked in full, tensors read one at a time without mapping the file.

    8 bytes  header length n, little-endian        n bytes  JSON {name: {dtype, shape, data_offsets: [begin, end]}}
    rest     the tensors' bytes: no gaps, no overlaps, nothing behind

(https://github.com/huggingface/safetensors#format). A plain file read puts a tensor's bytes where they are wanted and
leaves no pages of the file in this process; a file that shrinks while it is read is an error here, not a SIGBUS.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safety import parse_json, regular

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
MAX_DIMS = 8
DAMAGED = "It is truncated or damaged; download it again."
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as the format names it, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A checked header. Raises CheckpointError, naming the file, for anything that the format does not allow."""

    def __init__(self, path: Path) -> None:
        self.path = regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file.", DAMAGED)
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or length + 8 > size:
                raise CheckpointError(f"{path}: claims a header of {length} bytes in a file of {size}.", DAMAGED)
            header = parse_json(file.read(length), f"{path} (header)")
        header.pop("__metadata__", None)
        self.entries: dict[str, Entry] = {}
        for name, value in header.items():
            self.entries[name] = _entry(path, name, value, 8 + length)
        end = 8 + length
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != end:
                kind = "overlaps another" if entry.offset < end else "leaves a gap before it"
                raise CheckpointError(f"{path}: tensor {name} {kind}.", DAMAGED)
            end = entry.offset + entry.nbytes
        if end != size:
            raise CheckpointError(f"{path}: the tensors end at byte {end}, the file at {size}.", DAMAGED)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        read_into(self.path, entry.offset, tensor)
        return tensor


def read_into(path: Path, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the file's bytes from `offset` on."""
    if tensor.numel() == 0:
        return
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                got = file.readinto(view[done : done + (1 << 30)])  # one read call moves at most 2 GiB
                if not got:
                    raise CheckpointError(f"{path}: ended while it was being read.", DAMAGED)
                done += got
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).", "Check the disk and the file.") from error


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    def refuse(cause: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name} {cause}.", DAMAGED)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_natural(n) for n in shape):
        raise refuse(f"has the impossible shape {str(shape)[:60]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(n) for n in offsets):
        raise refuse(f"has the impossible offsets {str(offsets)[:60]}")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise refuse(f"has {end - begin} bytes; dtype and shape ask for {wanted}")
    return Entry(dtype, tuple(shape), start + begin, wanted)


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60
