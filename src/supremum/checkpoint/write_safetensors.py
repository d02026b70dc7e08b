"""Safetensors files written tensor by tensor: the header first, then each tensor at its place.

    8 bytes  header length, little-endian, a multiple of 8        JSON, padded with spaces
    data     by type (ORDER), then by name, without gaps: wider types first, so that every tensor lies aligned

(https://github.com/huggingface/safetensors#format). The library writes a dictionary of all tensors at once; a model
larger than memory needs them one by one. The bytes are the library's.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..workspace import replacing
from .safetensors_file import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(specs: Iterable[Spec]) -> tuple[bytes, dict[str, int]]:
    """(header with its length, place of each tensor from the file's start)."""
    ordered = sorted(specs, key=lambda s: (ORDER.index(NAMES[s.dtype]), s.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    end = 0
    for spec in ordered:
        offsets[spec.name] = end
        end += spec.nbytes
        header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape),
                             "data_offsets": [offsets[spec.name], end]}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}


def measure(specs: Iterable[Spec]) -> int:
    """Bytes of the file."""
    specs = list(specs)
    return len(layout(specs)[0]) + sum(spec.nbytes for spec in specs)


class SafetensorsWriter:
    """A file that is in its place, whole, when the `with` block ends without an error; every tensor is put once."""

    def __init__(self, path: Path, specs: Iterable[Spec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._header, self._offsets = layout(self._specs.values())
        self._left = set(self._specs)
        self._path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> SafetensorsWriter:
        temporary = self._stack.enter_context(replacing(self._path))
        self._file = self._stack.enter_context(temporary.open("wb"))
        self._file.write(self._header)
        return self

    def put(self, name: str, value: Tensor) -> None:
        spec = self._specs[name]
        assert (value.dtype, tuple(value.shape)) == (spec.dtype, spec.shape), (spec, value.dtype, tuple(value.shape))
        self._left.remove(name)
        self._file.seek(self._offsets[name])
        self._file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, *error: object) -> bool | None:
        if error[0] is None:
            assert not self._left, f"not written: {sorted(self._left)[:3]}"
        return self._stack.__exit__(*error)  # type: ignore[arg-type]
