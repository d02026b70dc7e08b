"""The target `gguf`: one file that stock llama.cpp opens.

    header   magic, version, keys (gguf_metadata, gguf_vocabulary), one record a tensor        padded to 32 bytes
    data     each tensor, in the order of the checkpoint                                       padded to 32 bytes

The container is the `gguf` library's; blocks are the codecs' own bytes. Tensors without a codec keep their precision:
matrices as they are stored (BF16, F16, F32; decoded integers of compressed-tensors as F16, 2^-12 of a weight at most),
vectors as F32, which is how llama.cpp computes with them. From a GGUF, untouched tensors and all keys are copied byte
for byte.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import gguf
import numpy as np
import torch

from .. import codecs
from ..codecs import Coded
from ..errors import CheckpointError
from ..workspace import replacing
from .gguf_header import read_header
from .gguf_layout import Layout
from .gguf_metadata import add_hyperparameters, rope_tensors
from .gguf_types import KINDS, Kind
from .gguf_vocabulary import add_vocabulary

FILE = "model.gguf"
PAIRS_AT = 16  # byte of the header that counts the keys; they follow
FLOATS = {name: KINDS[name] for name in ("BF16", "F16", "F32")}
# general.file_type (llama.cpp, include/llama.h): a label for people, by the commonest type.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
    "Q2_0": 41,
}  # fmt: skip
OWN_KEYS = ("general.file_type", "general.quantization_version", "general.quantized_by", "general.alignment",
            "quantize.", "split.")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. `source`: state-dict key, or "" for one that only GGUF has. `shape`: (O, I)."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) // self.kind.block * self.kind.nbytes


class Prepared:
    """What does not depend on the plan: keys, names and shapes, and the length of the header."""

    def __init__(self, checkpoint: Any) -> None:
        self.layout = Layout(checkpoint.config)
        self.path = Path(checkpoint.path)
        original = read_header(self.path) if checkpoint.format == "gguf" else None
        self.raw = dict(original.tensors) if original else {}
        self.entries = []
        for name, info in checkpoint.tensors.items():
            place = self.layout.name(name)
            shape = self.layout.shape(name, tuple(info.shape))
            self.entries.append(Entry(place, name, shape, self._kind(info, place)))
        self.extra = {} if original else {k: v.numpy() for k, v in rope_tensors(checkpoint.config).items()}
        self.entries += [Entry(place, "", value.shape, FLOATS["F32"]) for place, value in self.extra.items()]
        known = {entry.name for entry in self.entries}
        self.entries += [Entry(t.name, "", t.shape, t.type) for t in self.raw.values() if t.name not in known]
        writer = gguf.GGUFWriter(None, self.layout.arch)
        self._copied: list[bytes] = []
        if original:
            writer.kv_data = [{}]
            with self.path.open("rb") as file:
                for key, (begin, end) in original.spans.items():
                    if not key.startswith(OWN_KEYS):
                        file.seek(begin)
                        self._copied.append(file.read(end - begin))
        else:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(_model_name(checkpoint))
            add_hyperparameters(writer, checkpoint.config)
            add_vocabulary(writer, checkpoint.tokenizer(), checkpoint.config.vocab_size, checkpoint.source)
        writer.add_quantized_by("Supremum")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._keys = writer.kv_data[0]
        self.header = len(self.head(self.entries))

    def _kind(self, info: Any, place: str) -> Kind:
        """The type of a tensor that stays as it is."""
        if place in self.raw:
            return self.raw[place].type
        if len(info.shape) < 2 or place.startswith("position_embd"):
            return FLOATS["F32"]
        return FLOATS.get(info.kind, FLOATS["F32" if info.kind == "F64" else "F16"])

    def plan(self, chosen: Mapping[str, str]) -> list[Entry]:
        """The file's tensors when `chosen` (state-dict key -> codec name) are compressed."""
        unknown = chosen.keys() - {e.source for e in self.entries}
        if unknown:
            raise CheckpointError(f"The plan names {sorted(unknown)[0]}, which the checkpoint does not have.")
        return [_retyped(e, chosen[e.source]) if e.source in chosen else e for e in self.entries]

    def head(self, entries: list[Entry]) -> bytes:
        """Everything before the first tensor. The length does not depend on the tensors' types."""
        writer = gguf.GGUFWriter(None, self.layout.arch)
        writer.kv_data = [dict(self._keys)]
        writer.add_file_type(_file_type(entries))
        for e in entries:
            number: Any = e.kind.number  # the library writes it as it is, and has no member for every type
            writer.add_tensor_info(e.name, e.shape, np.dtype(np.float32), e.nbytes, raw_dtype=number)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = bytearray(path.read_bytes())
        (pairs,) = struct.unpack_from("<Q", header, PAIRS_AT)
        struct.pack_into("<Q", header, PAIRS_AT, pairs + len(self._copied))
        header[PAIRS_AT + 8 : PAIRS_AT + 8] = b"".join(self._copied)
        return bytes(header) + bytes(_padded(len(header)) - len(header))


class GGUFTarget:
    """See `supremum.checkpoint.targets.Target`."""

    name = "gguf"
    runtime = "llama_cpp"
    menu: tuple[str, ...] = ("Q2_K", "Q3_K", "MXFP4", "IQ4_XS", "IQ4_NL", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
    # Q2_0 for rows that no block of 256 divides, and of the vector types (codecs/gguf_vectors.py), which take five to ten
    # times as long to solve; `only` names the others
    least: tuple[str, ...] = ("Q2_0", "IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS")
    allocates = True

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[Any, Prepared] = WeakKeyDictionary()

    def _prepare(self, checkpoint: Any) -> Prepared:
        if checkpoint not in self._prepared:
            self._prepared[checkpoint] = Prepared(checkpoint)
        return self._prepared[checkpoint]

    def codecs(self, checkpoint: Any, name: str, shape_OI: tuple[int, int]) -> list[str]:
        """Every registered block type whose block divides the row; none for vectors and position embeddings."""
        place = self._prepare(checkpoint).layout.name(name)
        if len(shape_OI) != 2 or not place.endswith(".weight") or place.startswith(("position_embd", "rope")):
            return []
        return [n for n in codecs.names() if n in KINDS and codecs.fits(codecs.get(n), shape_OI)]

    def ties(self, checkpoint: Any) -> list[list[str]]:
        """None: llama.cpp mixes types freely."""
        return []

    def together(self, names: Collection[str]) -> None:
        """llama.cpp mixes types freely."""

    def size(self, checkpoint: Any, plan: Mapping[str, str]) -> int:
        """Bytes of the file; the first call for a checkpoint builds the header once."""
        prepared = self._prepare(checkpoint)
        return prepared.header + sum(_padded(e.nbytes) for e in prepared.plan(plan))

    def how_to_run(self, architecture: str, codecs: Collection[str], file: str) -> str:
        """llama.cpp's own programs."""
        return f"""```sh
llama-cli -m {file} -cnv                 # llama.cpp
llama-server -m {file}                   # OpenAI-compatible endpoint
```"""

    def write(self, checkpoint: Any, coded: Mapping[str, Coded], folder: Path) -> Path:
        """`folder`/model.gguf, whole or not there. One tensor is in memory at a time.

        The header's length is known, its types are not until each tensor has been seen: data first, header last.
        """
        prepared = self._prepare(checkpoint)
        prepared.plan(dict.fromkeys(coded, "F32"))  # refuses names that the checkpoint does not have
        with replacing(folder / FILE) as temporary, temporary.open("wb") as file:
            file.seek(prepared.header)
            entries = []
            for entry in prepared.entries:
                if entry.source and entry.source in coded:
                    entry, data = self._blocks(prepared.layout, entry, coded[entry.source])
                else:
                    data = _unchanged(checkpoint, prepared, entry)
                assert data.nbytes == entry.nbytes, (entry, data.nbytes)
                file.write(np.ascontiguousarray(data).data)
                file.write(bytes(_padded(entry.nbytes) - entry.nbytes))
                entries.append(entry)
            file.seek(0)
            file.write(prepared.head(entries))
        return folder / FILE

    @staticmethod
    def _blocks(layout: Layout, entry: Entry, coded: Coded) -> tuple[Entry, np.ndarray]:
        """The packed rows in the file's order."""
        if tuple(coded.shape) != entry.shape:
            raise CheckpointError(f"{entry.source}: {tuple(coded.shape)} does not fit {entry.name} {entry.shape}.")
        (blocks,) = coded.tensors.values()
        rows_OB = blocks.reshape(entry.shape[0], -1)
        order = layout.rows(entry.source, entry.shape[0])
        return _retyped(entry, coded.codec.name), (rows_OB if order is None else rows_OB[order]).numpy()


def _retyped(entry: Entry, codec: str) -> Entry:
    if codec not in KINDS or entry.shape[-1] % KINDS[codec].block:
        raise CheckpointError(f"{entry.source}: {codec} cannot hold rows of {entry.shape[-1]} weights in GGUF.")
    return replace(entry, kind=KINDS[codec])


def _model_name(checkpoint: Any) -> str:
    """The folder's name. llama.cpp patches the special tokens of a model called phi3 and dies if it lacks them."""
    name = Path(checkpoint.source).name
    vocabulary = checkpoint.tokenizer().get_vocab()
    if re.search("phi-?3", name.lower()) and not {"</s>", "<s>", "<unk>", "<|endoftext|>"} <= vocabulary.keys():
        return "Phi"
    return name


def _unchanged(checkpoint: Any, prepared: Prepared, entry: Entry) -> np.ndarray:
    """The bytes of a tensor that stays as it is."""
    if entry.name in prepared.raw:
        place = prepared.raw[entry.name]
        return np.fromfile(prepared.path, np.uint8, place.nbytes, offset=place.offset)
    if not entry.source:
        return prepared.extra[entry.name]
    value = prepared.layout.arrange(entry.source, checkpoint.read(entry.source)).contiguous()
    if entry.kind.name == "BF16":
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    return value.to(torch.float16 if entry.kind.name == "F16" else torch.float32).numpy()


def _padded(nbytes: int) -> int:
    return gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)


def _file_type(entries: list[Entry]) -> int:
    """By the type that holds most of the weights."""
    weights: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) > 1:
            weights[entry.kind.name] += int(np.prod(entry.shape))
    return FILE_TYPES.get(weights.most_common(1)[0][0], 0)
