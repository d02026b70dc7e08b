"""The archive: a Hugging Face folder whose matrices are entropy-coded.

config.json names `quantization_config: {"quant_method": "supremum", "version": 3}`. In the safetensors file beside it:

    NAME.codes           int32    rANS stream (codecs/rans.py) of a matrix's integers (codecs/lattice.py), or of what can be
                                  foreseen of its bfloat16 numbers (codecs/bfloat.py)
    NAME.rest            int32    of the latter the other bits, 5 a number, as one stream (codecs/integer.py)
    NAME.escapes         int16    what no symbol stands for, in order; absent when there is nothing
    archive.vectors      int32    rANS stream of all rows' and columns' vectors, each less an offset
    archive.frequencies  uint8    zlib of uint16 (TABLES, 256): how often each table has each symbol, out of 4096. A class of
                                  integers has a table for either quantiser of the trellis (codecs/trellis.py)
    archive.index        uint8    zlib of JSON: of each matrix its shape, its kind, whether it is stored transposed, the
                                  matrix whose columns it shares or null, and the offsets of its vectors

Other tensors lie there as they are. The frequencies are counted on the very symbols that are written, so the code is as
tight as their classes allow. Matrices that read the same inputs share the columns of their frame.
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

from ..codecs import bfloat, lattice, rans, trellis
from ..codecs.bfloat import Bfloat
from ..codecs.integer import pack_bits, unpack_bits
from ..codecs.lattice import Frame, Lattice
from ..errors import CheckpointError
from .architecture import TensorInfo
from .hf import SafetensorsStore
from .safety import parse_json

VERSION = 3  # 1 had no trellis, 2 one of 8 states
CODES, REST, ESCAPES = ".codes", ".rest", ".escapes"
INDEX, VECTORS, FREQUENCIES = "archive.index", "archive.vectors", "archive.frequencies"
LATTICE, BFLOAT = 0, 1  # kinds of matrices
ROWS, COLUMNS = ("row_O", "row_class_O"), ("column_I", "column_class_I")
VECTORS_OF = {LATTICE: (ROWS, COLUMNS), BFLOAT: (ROWS[1:], COLUMNS[1:])}
PLACES = {name: number for number, name in enumerate(ROWS + COLUMNS)}
INTEGERS = trellis.QUANTISERS * lattice.CLASSES
TABLES_OF = {LATTICE: slice(0, INTEGERS), BFLOAT: slice(INTEGERS, INTEGERS + bfloat.CLASSES)}
NEXT = {LATTICE: trellis.NEXT_S2, BFLOAT: rans.ALONE}
OF_VECTORS = slice(TABLES_OF[BFLOAT].stop, TABLES_OF[BFLOAT].stop + len(PLACES))  # each of PLACES has a table of its own
TABLES = OF_VECTORS.stop
MAX_INDEX = 64 << 20  # bytes of JSON
DAMAGED = "It is truncated or damaged; download it again."


@dataclass(frozen=True)
class Entry:
    """One matrix in the index."""

    shape: tuple[int, int]
    kind: int
    turned: bool  # whether the checkpoint stores the transpose (GPT-2)
    columns: str  # the matrix whose columns it shares; its own name, if it has its own
    offsets: tuple[int, ...]  # of its vectors, rows first

    def vectors(self, name: str) -> tuple[str, ...]:
        """Those that are stored with this matrix."""
        rows, columns = VECTORS_OF[self.kind]
        return rows + columns if self.columns == name else rows


@dataclass(frozen=True)
class Parts:
    """A matrix as it goes to the coder."""

    kind: int
    symbol_OI: NDArray[np.uint8]
    quantiser_OI: NDArray[np.uint8] | None  # of integers
    vectors: dict[str, NDArray[np.int16]]
    stored: dict[str, Tensor]  # suffix -> what lies beside the stream


def parts_of(matrix: Lattice | Tensor) -> Parts:
    """Of integers in their frame, or of a bfloat16 matrix."""
    if isinstance(matrix, Lattice):
        symbol_OI, quantiser_OI, escapes = trellis.symbols(matrix.integers_OI.numpy())
        vectors = {name: vector.numpy() for name, vector in vars(matrix.frame).items()}
        return Parts(LATTICE, symbol_OI, quantiser_OI, vectors, _escapes(escapes))
    apart = bfloat.take_apart(matrix)
    rest = pack_bits(torch.from_numpy(apart.rest_OI).view(1, -1), bfloat.REST)[0]
    return Parts(BFLOAT, apart.symbol_OI, None, {"row_class_O": apart.row_class_O, "column_class_I": apart.column_class_I},
                 {REST: rest} | _escapes(apart.escapes))


def _escapes(values: NDArray[np.int16]) -> dict[str, Tensor]:
    return {ESCAPES: torch.from_numpy(values.copy())} if len(values) else {}


# --- writing ---------------------------------------------------------------------------------------------------------


class Encoder:
    """Counts all matrices first (`count`), then codes them one by one (`encode`), then what they share (`tables`)."""

    def __init__(self) -> None:
        self._counts = np.zeros((TABLES, 256))
        self._index: dict[str, Entry] = {}
        self._vectors: list[tuple[int, NDArray[np.uint8]]] = []
        self._owners: dict[tuple[int, bytes], str] = {}
        self._frequencies: rans.Frequencies | None = None

    def count(self, name: str, matrix: Lattice | Tensor, turned: bool = False) -> None:
        """Take a matrix in. name: of its tensor; turned: whether that is the transpose."""
        parts = parts_of(matrix)
        rows, columns = VECTORS_OF[parts.kind]
        key = parts.kind, b"".join(parts.vectors[side].tobytes() for side in columns)
        owner = self._owners.setdefault(key, name)
        offsets = []
        for side in rows + columns:
            vector = parts.vectors[side].astype(np.int64)
            offset = int(vector.min() + vector.max()) // 2
            offsets.append(offset)
            if side in rows or owner == name:
                symbols = vector - offset + rans.ESCAPE
                assert symbols.min() > 0 and symbols.max() < 256, (name, side)  # the codecs hold them to that
                self._vectors.append((PLACES[side], symbols.astype(np.uint8)))
                self._counts[OF_VECTORS][PLACES[side]] += np.bincount(symbols, minlength=256)
        self._index[name] = Entry((len(parts.symbol_OI), parts.symbol_OI.shape[1]), parts.kind, turned, owner, tuple(offsets))
        counts = self._counts[TABLES_OF[parts.kind]]
        for part in np.array_split(np.arange(len(parts.symbol_OI)), max(1, parts.symbol_OI.size >> 22)):
            class_RI = parts.vectors["row_class_O"][part, None].astype(np.int32) + parts.vectors["column_class_I"]
            if parts.quantiser_OI is None:
                table_RI = np.clip(class_RI, 0, len(counts) - 1)
            else:
                table_RI = trellis.QUANTISERS * np.clip(class_RI, 0, lattice.CLASSES - 1) + parts.quantiser_OI[part]
            pairs = table_RI * 256 + parts.symbol_OI[part]
            counts += np.bincount(pairs.ravel(), minlength=counts.size).reshape(counts.shape)

    def encode(self, matrix: Lattice | Tensor) -> dict[str, Tensor]:
        """Suffix -> tensor of one matrix, after all have been counted."""
        parts = parts_of(matrix)
        words = rans.encode(parts.symbol_OI, parts.vectors["row_class_O"], parts.vectors["column_class_I"],
                            self.frequencies[TABLES_OF[parts.kind]], NEXT[parts.kind])
        return {CODES: torch.from_numpy(words.view(np.int32)), **parts.stored}

    @property
    def frequencies(self) -> rans.Frequencies:
        if self._frequencies is None:
            weights = self._counts.copy()
            weights[:, 0] = np.maximum(weights[:, 0], 0.5)  # no table without a symbol, and none with a single one
            weights[:, rans.ESCAPE] = np.maximum(weights[:, rans.ESCAPE], 0.5)
            self._frequencies = rans.quantised(weights)
        return self._frequencies

    def tables(self) -> dict[str, Tensor]:
        """The archive's own tensors."""
        symbols = np.concatenate([np.empty(0, np.uint8), *(vector for _, vector in self._vectors)])[None]
        classes = np.concatenate([np.empty(0, np.int16),
                                  *(np.full(len(vector), place, np.int16) for place, vector in self._vectors)])
        words = rans.encode(symbols, np.zeros(1, np.int16), classes, self.frequencies[OF_VECTORS])
        index = {name: [*entry.shape, entry.kind, int(entry.turned), entry.columns if entry.columns != name else None,
                        *entry.offsets] for name, entry in self._index.items()}
        return {VECTORS: torch.from_numpy(words.view(np.int32)),
                FREQUENCIES: _packed(self.frequencies.astype("<u2").tobytes()),
                INDEX: _packed(json.dumps(index, separators=(",", ":")).encode())}


def _packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


# --- reading ---------------------------------------------------------------------------------------------------------


class ArchiveStore:
    """Logical weights over the stored streams; tensors that are not coded pass through."""

    def __init__(self, inner: SafetensorsStore, settings: Mapping[str, Any], config_path: Path) -> None:
        if settings.get("version") != VERSION:
            found = str(settings.get("version"))[:20]
            raise CheckpointError(f"{config_path}: an archive of version {found!r}, not {VERSION}.",
                                  "Convert it with the supremum that wrote it, or upgrade this one.")
        self._inner = inner
        missing = [name for name in (INDEX, VECTORS, FREQUENCIES) if name not in inner.entries]
        if missing:
            raise CheckpointError(f"{config_path.parent}: the archive lacks {missing[0]}.", DAMAGED)
        self._index = self._read_index()
        own = {INDEX, VECTORS, FREQUENCIES}
        self.entries: dict[str, TensorInfo] = {}
        shared, done = sum(inner.entries[name].nbytes for name in own), 0
        weights = max(1, sum(rows * columns for rows, columns in (entry.shape for entry in self._index.values())))
        for name, entry in self._index.items():
            parts = [name + suffix for suffix in (CODES, REST, ESCAPES) if name + suffix in inner.entries]
            if name + CODES not in parts or name in inner.entries or (entry.kind == BFLOAT) != (name + REST in parts):
                raise self._refuse(INDEX, f"names {name}, whose codes are not there")
            own.update(parts)
            shape = entry.shape[::-1] if entry.turned else entry.shape
            before, done = done, done + shape[0] * shape[1]
            share = shared * done // weights - shared * before // weights  # of what all matrices share, by their weights
            self.entries[name] = TensorInfo(name, shape, "lattice" if entry.kind == LATTICE else "BF16",
                                            share + sum(inner.entries[part].nbytes for part in parts))
        self.entries |= {name: info for name, info in inner.entries.items() if name not in own}
        self._frames: dict[str, dict[str, Tensor]] = {}
        self._table: NDArray[np.uint32] | None = None

    def file(self, name: str) -> Path:
        return self._inner.file(name + CODES if name in self._index else name)

    def read(self, name: str) -> Tensor:
        """The weight; integers as float32, bfloat16 to the bit."""
        if name not in self._index:
            return self._inner.read(name)
        matrix = self.matrix(name)
        weight_OI = matrix.decode() if isinstance(matrix, Lattice) else matrix
        return weight_OI.T.contiguous() if self._index[name].turned else weight_OI

    def lattice(self, name: str) -> tuple[Lattice, bool]:
        """The integers of a coded matrix in their frame, and whether the tensor is their transpose."""
        matrix = self.matrix(name)
        assert isinstance(matrix, Lattice), name
        return matrix, self._index[name].turned

    def matrix(self, name: str) -> Lattice | Tensor:
        """The integers in their frame, or the bfloat16 matrix (O, I). Raises CheckpointError for a stream that is not of
        its shape."""
        entry, vectors = self._index[name], self._all_vectors()[name]
        rows, columns = vectors["row_class_O"].numpy(), vectors["column_class_I"].numpy()
        escapes = torch.empty(0, dtype=torch.int16)
        if name + ESCAPES in self._inner.entries:
            escapes = self._inner.read(name + ESCAPES)
            if escapes.ndim != 1 or escapes.dtype != torch.int16:
                raise self._refuse(name + ESCAPES, f"is {escapes.dtype} {tuple(escapes.shape)}")
        words = self._words(name + CODES)
        try:
            symbol_OI = rans.decode(words, rows, columns, self._decoding()[TABLES_OF[entry.kind]], NEXT[entry.kind])
            if entry.kind == BFLOAT:
                return bfloat.put_together(Bfloat(symbol_OI, self._rest(name), escapes.numpy(), rows, columns))
            integers_OI = torch.from_numpy(trellis.integers(symbol_OI, escapes.numpy()))
        except ValueError as error:
            raise self._refuse(name + CODES, str(error)) from error
        return Lattice(integers_OI, Frame(**vectors))

    def _rest(self, name: str) -> NDArray[np.uint8]:
        rows, columns = self._index[name].shape
        words = self._words(name + REST)
        if len(words) != -(-rows * columns * bfloat.REST // 32):
            raise self._refuse(name + REST, f"has {len(words)} words for a shape of ({rows}, {columns})")
        stream = torch.from_numpy(words.view(np.int32))[None]
        return unpack_bits(stream, bfloat.REST, rows * columns).view(rows, columns).numpy()

    def _all_vectors(self) -> dict[str, dict[str, Tensor]]:
        """Every matrix's vectors; decoded at the first use, when the shapes have been checked against the config."""
        if not self._frames:
            parts = [(name, side, entry.shape[0] if side in ROWS else entry.shape[1])
                     for name, entry in self._index.items() for side in entry.vectors(name)]
            classes = np.concatenate([np.full(size, PLACES[side], np.int16) for _, side, size in parts])
            try:
                symbols = rans.decode(self._words(VECTORS), np.zeros(1, np.int16), classes, self._decoding()[OF_VECTORS])[0]
            except ValueError as error:
                raise self._refuse(VECTORS, str(error)) from error
            at, found = 0, {}
            for name, side, size in parts:
                offset = self._index[name].offsets[self._index[name].vectors(name).index(side)] - rans.ESCAPE
                found[name, side] = torch.from_numpy(symbols[at:at + size].astype(np.int16)) + offset
                at += size
            for name, entry in self._index.items():
                rows, columns = VECTORS_OF[entry.kind]
                self._frames[name] = {side: found[name, side] for side in rows} | {
                    side: found[entry.columns, side] for side in columns}
        return self._frames

    def _decoding(self) -> NDArray[np.uint32]:
        if self._table is None:
            data = self._unpacked(FREQUENCIES, TABLES * 512)
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
            rows, columns, kind, turned, owner, *offsets = value
            index[name] = Entry((rows, columns), kind, bool(turned), owner or name, tuple(offsets))
        for name, entry in index.items():
            other = index.get(entry.columns)
            if other is None or (other.shape[1], other.kind, other.columns) != (entry.shape[1], entry.kind, entry.columns):
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
    """Whether it is rows, columns, kind, turned or not, the owner of the columns or null, and the offsets."""
    if not isinstance(value, list) or len(value) < 5 or not all(type(n) is int for n in (*value[:4], *value[5:])):
        return False
    rows, columns, kind, turned, owner, *offsets = value
    return 0 < rows < 1 << 31 and 0 < columns < 1 << 31 and kind in TABLES_OF and turned in (0, 1) \
        and (owner is None or isinstance(owner, str)) and len(offsets) == sum(map(len, VECTORS_OF[kind])) \
        and all(abs(offset) < 1 << 14 for offset in offsets)
