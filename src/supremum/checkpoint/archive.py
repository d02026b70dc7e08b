"""The archive: a Hugging Face folder whose matrices are entropy-coded integers (codecs/lattice.py).

config.json names `quantization_config: {"quant_method": "supremum", "version": 1}`. In the safetensors files beside it:

    NAME.codes           int32    rANS stream of a matrix's integers (codecs/rans.py)
    NAME.escapes         int32    those larger than LARGEST, in order; absent when there are none
    archive.vectors      int32    rANS stream of all frames' vectors, each less its first value's offset
    archive.frequencies  uint8    zlib of uint16 (CLASSES + 4, 256): how often each class has each symbol, out of 4096
    archive.index        uint8    zlib of JSON: of each matrix its shape, the matrix whose columns it shares, offsets

Tensors that are not coded lie there as they are. The frequencies are counted on the very integers that are written, so
the code is as tight as their classes allow. Matrices that read the same inputs share the columns of their frame.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codecs import rans
from ..codecs.lattice import CLASSES, Frame, Lattice
from ..errors import CheckpointError
from .architecture import TensorInfo
from .hf import SafetensorsStore
from .safety import parse_json

METHOD, VERSION = "supremum", 1
CODES, ESCAPES = ".codes", ".escapes"
INDEX, VECTORS, FREQUENCIES = "archive.index", "archive.vectors", "archive.frequencies"
KINDS = ("row_O", "row_class_O", "column_I", "column_class_I")  # a frame's vectors; each kind has a class of its own
MAX_INDEX = 64 << 20  # bytes of JSON
DAMAGED = "It is truncated or damaged; download it again."


@dataclass(frozen=True)
class Entry:
    """One matrix in the index."""

    shape: tuple[int, int]
    turned: bool  # whether the checkpoint stores the transpose (GPT-2)
    columns: str  # the matrix whose columns it shares; its own name, if it has its own
    offsets: tuple[int, ...]  # of the vectors of KINDS

    def kinds(self, name: str) -> tuple[str, ...]:
        """The vectors that are stored with this matrix."""
        return KINDS if self.columns == name else KINDS[:2]


# --- writing ---------------------------------------------------------------------------------------------------------


class Encoder:
    """Counts all matrices first (`count`), then codes them one by one (`encode`), then the rest (`tables`)."""

    def __init__(self) -> None:
        self._counts = np.zeros((CLASSES + len(KINDS), 256))
        self._index: dict[str, Entry] = {}
        self._vectors: list[tuple[int, NDArray[np.uint8]]] = []
        self._owners: dict[bytes, str] = {}
        self._frequencies: rans.Frequencies | None = None

    def count(self, name: str, lattice: Lattice, turned: bool = False) -> None:
        """Take a matrix in. name: of its tensor; turned: whether that is the transpose."""
        frame = lattice.frame
        key = frame.column_I.numpy().tobytes() + frame.column_class_I.numpy().tobytes()
        owner = self._owners.setdefault(key, name)
        offsets = []
        for number, kind in enumerate(KINDS):
            vector = getattr(frame, kind).numpy().astype(np.int64)
            offset = int(vector.min() + vector.max()) // 2
            offsets.append(offset)
            if number < 2 or owner == name:
                symbols = vector - offset + rans.ESCAPE
                assert symbols.min() > 0 and symbols.max() < 256, name  # `water` holds them to that
                self._vectors.append((number, symbols.astype(np.uint8)))
                self._counts[CLASSES + number] += np.bincount(symbols, minlength=256)
        self._index[name] = Entry(lattice.shape, turned, owner, tuple(offsets))
        symbol_OI = _symbols(lattice)
        for rows in np.array_split(np.arange(len(symbol_OI)), max(1, symbol_OI.size >> 22)):
            class_RI = frame.row_class_O.numpy()[rows, None].astype(np.int32) + frame.column_class_I.numpy()
            pairs = np.clip(class_RI, 0, CLASSES - 1) * 256 + symbol_OI[rows]
            self._counts[:CLASSES] += np.bincount(pairs.ravel(), minlength=CLASSES * 256).reshape(CLASSES, 256)

    def encode(self, lattice: Lattice) -> dict[str, Tensor]:
        """Suffix -> tensor of one matrix, after all have been counted."""
        frame, integers_OI = lattice.frame, lattice.integers_OI
        words = rans.encode(_symbols(lattice), frame.row_class_O.numpy(), frame.column_class_I.numpy(),
                            self.frequencies[:CLASSES])
        found = {CODES: torch.from_numpy(words.view(np.int32))}
        if bool((outside := integers_OI.abs() > rans.LARGEST).any()):
            found[ESCAPES] = integers_OI[outside].int()
        return found

    @property
    def frequencies(self) -> rans.Frequencies:
        if self._frequencies is None:
            weights = self._counts.copy()
            weights[:, 0] = np.maximum(weights[:, 0], 0.5)  # no class without a symbol, and none with a single one
            weights[:, rans.ESCAPE] = np.maximum(weights[:, rans.ESCAPE], 0.5)
            self._frequencies = rans.quantised(weights)
        return self._frequencies

    def tables(self) -> dict[str, Tensor]:
        """The archive's own tensors."""
        symbols = np.concatenate([vector for _, vector in self._vectors])[None]
        classes = np.concatenate([np.full(len(vector), kind, np.int16) for kind, vector in self._vectors])
        words = rans.encode(symbols, np.zeros(1, np.int16), classes, self.frequencies[CLASSES:])
        index = {name: [*entry.shape, int(entry.turned), entry.columns if entry.columns != name else None, *entry.offsets]
                 for name, entry in self._index.items()}
        return {VECTORS: torch.from_numpy(words.view(np.int32)),
                FREQUENCIES: _packed(self.frequencies.astype("<u2").tobytes()),
                INDEX: _packed(json.dumps(index, separators=(",", ":")).encode())}


def _symbols(lattice: Lattice) -> NDArray[np.uint8]:
    integers_OI = lattice.integers_OI.numpy()
    return np.where(np.abs(integers_OI) > rans.LARGEST, 0, integers_OI + rans.ESCAPE).astype(np.uint8)


def _packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


# --- reading ---------------------------------------------------------------------------------------------------------


class ArchiveStore:
    """Logical weights over the stored streams; tensors that are not coded pass through."""

    def __init__(self, inner: SafetensorsStore, settings: Mapping[str, Any], config_path: Path) -> None:
        if settings.get("version") != VERSION:
            raise CheckpointError(f"{config_path}: an archive of version {str(settings.get('version'))[:20]!r}.",
                                  "Upgrade supremum.")
        self._inner = inner
        missing = [name for name in (INDEX, VECTORS, FREQUENCIES) if name not in inner.entries]
        if missing:
            raise CheckpointError(f"{config_path.parent}: the archive lacks {missing[0]}.", DAMAGED)
        self._index = self._read_index()
        own = {INDEX, VECTORS, FREQUENCIES}
        self.entries: dict[str, TensorInfo] = {}
        for name, entry in self._index.items():
            parts = [part for part in (name + CODES, name + ESCAPES) if part in inner.entries]
            if name + CODES not in parts or name in inner.entries:
                raise self._refuse(INDEX, f"names {name}, whose codes are not there")
            own.update(parts)
            shape = entry.shape[::-1] if entry.turned else entry.shape
            self.entries[name] = TensorInfo(name, shape, "lattice", sum(inner.entries[part].nbytes for part in parts))
        self.entries |= {name: info for name, info in inner.entries.items() if name not in own}
        self._frames: dict[str, Frame] = {}
        self._table: NDArray[np.uint32] | None = None

    def file(self, name: str) -> Path:
        return self._inner.file(name + CODES if name in self._index else name)

    def read(self, name: str) -> Tensor:
        """The weight; coded ones as float32."""
        if name not in self._index:
            return self._inner.read(name)
        weight_OI = self.lattice(name).decode()
        return weight_OI.T.contiguous() if self._index[name].turned else weight_OI

    def lattice(self, name: str) -> Lattice:
        """The integers and their frame. Raises CheckpointError for a stream that is not of the matrix's shape."""
        frame = self._all_frames()[name]
        words = self._words(name + CODES)
        try:
            symbol_OI = rans.decode(words, frame.row_class_O.numpy(), frame.column_class_I.numpy(),
                                    self._decoding()[:CLASSES])
        except ValueError as error:
            raise self._refuse(name + CODES, str(error)) from error
        integers_OI = torch.from_numpy(symbol_OI).short() - rans.ESCAPE
        outside_OI = integers_OI == -rans.ESCAPE
        escapes = self._inner.read(name + ESCAPES) if name + ESCAPES in self._inner.entries else torch.empty(0)
        if escapes.ndim != 1 or int(outside_OI.sum()) != len(escapes):
            raise self._refuse(name + CODES, "has other escapes than its symbols ask for")
        if len(escapes):
            integers_OI[outside_OI] = escapes.short()
        return Lattice(integers_OI, frame)

    def _all_frames(self) -> dict[str, Frame]:
        """Every matrix's frame; decoded at the first use, when the shapes have been checked against the config."""
        if not self._frames:
            parts = [(name, kind, entry.shape[0] if kind.startswith("row") else entry.shape[1])
                     for name, entry in self._index.items() for kind in entry.kinds(name)]
            classes = np.concatenate([np.full(size, KINDS.index(kind), np.int16) for _, kind, size in parts])
            try:
                symbols = rans.decode(self._words(VECTORS), np.zeros(1, np.int16), classes, self._decoding()[CLASSES:])[0]
            except ValueError as error:
                raise self._refuse(VECTORS, str(error)) from error
            at, vectors = 0, {}
            for name, kind, size in parts:
                offset = self._index[name].offsets[KINDS.index(kind)] - rans.ESCAPE
                vectors[name, kind] = torch.from_numpy(symbols[at:at + size].astype(np.int16)) + offset
                at += size
            self._frames = {name: Frame(vectors[name, "row_O"], vectors[entry.columns, "column_I"],
                                        vectors[name, "row_class_O"], vectors[entry.columns, "column_class_I"])
                            for name, entry in self._index.items()}
        return self._frames

    def _decoding(self) -> NDArray[np.uint32]:
        if self._table is None:
            data = self._unpacked(FREQUENCIES, (CLASSES + len(KINDS)) * 512)
            try:
                self._table = rans.decoding_table(np.frombuffer(data, "<u2").reshape(-1, 256))
            except ValueError as error:
                raise self._refuse(FREQUENCIES, str(error)) from error
        return self._table

    def _words(self, name: str) -> NDArray[np.uint32]:
        info = self._inner.entries[name]
        if info.kind != "I32" or len(info.shape) != 1:
            raise self._refuse(name, f"is {info.kind} {info.shape}, not a stream")
        return self._inner.read(name).numpy().view(np.uint32)

    def _read_index(self) -> dict[str, Entry]:
        found = parse_json(self._unpacked(INDEX, MAX_INDEX), str(self._inner.file(INDEX)))
        index = {}
        for name, value in found.items():
            if not _describes(value):
                raise self._refuse(INDEX, f"does not describe {name[:60]}")
            rows, columns, turned, owner, *offsets = value
            index[name] = Entry((rows, columns), bool(turned), owner or name, tuple(offsets))
        for name, entry in index.items():
            other = index.get(entry.columns)
            if other is None or other.shape[1] != entry.shape[1] or other.columns != entry.columns:
                raise self._refuse(INDEX, f"gives {name[:60]} columns that are not there")
        return index

    def _unpacked(self, name: str, limit: int) -> bytes:
        """At most `limit` bytes of zlib data; `limit` itself is asked for of a table of known size."""
        if self._inner.entries[name].kind != "U8":
            raise self._refuse(name, f"is {self._inner.entries[name].kind}")
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(self._inner.read(name).numpy().tobytes(), limit)
        except zlib.error as error:
            raise self._refuse(name, f"cannot be unpacked ({error})") from error
        if not stream.eof or stream.unused_data or (name == FREQUENCIES and len(data) != limit):
            raise self._refuse(name, "is longer or shorter than it should be")
        return data

    def _refuse(self, name: str, cause: str) -> CheckpointError:
        return CheckpointError(f"{self._inner.file(name)}: {name} {cause}.", DAMAGED)


def _describes(value: object) -> bool:
    """Whether it is rows, columns, turned or not, the owner of the columns or null, and four offsets."""
    if not isinstance(value, list) or len(value) != 8 or not all(type(n) is int for n in (*value[:3], *value[4:])):
        return False
    rows, columns, turned, owner, *offsets = value
    return 0 < rows < 1 << 31 and 0 < columns < 1 << 31 and turned in (0, 1) and (owner is None or isinstance(owner, str)) \
        and all(abs(offset) < 1 << 14 for offset in offsets)
