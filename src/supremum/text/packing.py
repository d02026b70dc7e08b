"""Sources in, a folder of packed tokens out (its form: text/packed.py).

Each document becomes the tokenizer's frame around its tokens (a BOS; [CLS] and [SEP]), and ends with the end-of-text token
where the frame has no end. What looks like a special token in the text is text: a document cannot forge a boundary. The
same sources and tokenizer give the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import SupremumError
from ..progress import phase
from ..workspace import replacing_folder, write_atomic
from .packed import FORMAT, INDEX, STARTS, VERSION, Encoder
from .parallel import ordered_map
from .reading import Reading
from .sources import bytes_of, names_of, watched
from .vocabulary import check_folder
from .windows import frame

SHARD = 1 << 26  # tokens


@dataclass
class Packing:
    """What was packed. `unknown`: tokens that stand for characters the tokenizer lacks; `unreadable`: records left out."""

    out: str
    documents: int = 0
    tokens: int = 0
    characters: int = 0
    unknown: int = 0
    unreadable: int = 0
    faults: list[str] = field(default_factory=list)
    dtype: str = ""
    shards: int = 0
    seconds: float = 0.0


def pack(sources: Sequence[str | Path], tokenizer: Any, out: str | Path, *, shard: int = SHARD, workers: int | None = None,
         reading: Reading | None = None, strict: bool = False, fresh: bool = False) -> Packing:
    """Write the folder `out`. tokenizer: a name (tokenizer_named) or a fast tokenizer of Transformers.

    Records that cannot be read are counted, with `strict` an error. Raises SupremumError for what the user can mend.
    """
    started, folder = time.perf_counter(), Path(out).expanduser()
    check_folder(folder, INDEX, fresh)
    if shard < 1:
        raise SupremumError(f"A shard of {shard} tokens holds nothing.", f"{SHARD} is usual.")
    bytes_of(sources)  # they exist, before a model is opened
    if isinstance(tokenizer, (str, Path)):
        tokenizer = tokenizer_named(str(tokenizer))
    if not getattr(tokenizer, "is_fast", False):
        raise SupremumError("The tokenizer has no tokenizer.json form.", "Convert it to a fast tokenizer.")
    prefix, suffix = frame(tokenizer)
    if not suffix and tokenizer.eos_token_id is not None:
        suffix = [tokenizer.eos_token_id]
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    done = Packing(str(folder), dtype=dtype)
    reading = reading or Reading()
    if not strict:
        def refuse(fault: SupremumError) -> None:
            done.unreadable += 1
            if len(done.faults) < 5:
                done.faults.append(str(fault))
        reading.refuse = refuse
    unknown = -1 if tokenizer.unk_token_id is None or tokenizer.unk_token_id in suffix else tokenizer.unk_token_id

    def texts() -> Iterator[str]:
        for _, text in watched(sources, reading, "pack"):
            done.characters += len(text)
            yield text

    with replacing_folder(folder) as staging, (staging / STARTS).open("wb") as starts:
        stream = Shards(staging, dtype, shard)
        encoded = ordered_map(Encoder(tokenizer.backend_tokenizer), texts(), workers=workers or os.cpu_count() or 1, size=len)
        for ids in encoded:
            starts.write(np.int64(stream.total).tobytes())
            done.documents += 1
            done.unknown += int((ids == unknown).sum()) if unknown >= 0 else 0
            stream.write(np.concatenate([np.array(prefix, np.uint32), ids, np.array(suffix, np.uint32)]))
        shards = stream.close()
        done.tokens, done.shards = stream.total, len(shards)
        with phase("write"):
            tokenizer.save_pretrained(staging / "tokenizer")
            index = {"format": FORMAT, "version": VERSION, "dtype": dtype, "tokens": done.tokens, "documents": done.documents,
                     "vocabulary": len(tokenizer), "prefix": prefix, "suffix": suffix, "shards": shards,
                     "sources": names_of(sources),
                     "unknown": done.unknown, "unreadable": done.unreadable}
            write_atomic(staging / INDEX, json.dumps(index, indent=1).encode())
    done.seconds = time.perf_counter() - started
    return done


class Shards:
    """Files of `size` tokens each, but for the last."""

    def __init__(self, folder: Path, dtype: str, size: int) -> None:
        self.folder, self.dtype, self.size = folder, np.dtype(dtype), size
        self.total = self.held = 0
        self.done: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        self.total += len(ids)
        while len(ids):
            if self._file is None:
                self._name, self._hash, self.held = f"tokens-{len(self.done):05d}.bin", sha256(), 0
                self._file = (self.folder / self._name).open("wb")
            part, ids = ids[:self.size - self.held], ids[self.size - self.held:]
            data = part.astype(self.dtype).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self.held += len(part)
            if self.held == self.size:
                self._end()

    def close(self) -> list[dict[str, Any]]:
        if self._file is not None:
            self._end()
        return self.done

    def _end(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.done.append({"file": self._name, "tokens": self.held, "sha256": self._hash.hexdigest()})


def tokenizer_named(name: str) -> Any:
    """The tokenizer of a folder that holds one, else of a model (a folder, a .gguf file, a hub id, `demo`)."""
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as error:  # the library raises many kinds for a damaged file
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise SupremumError(f"{path}: its tokenizer cannot be read ({first}).",
                                "Name a folder with a whole tokenizer.json.") from error
    from ..checkpoint import open_checkpoint

    return open_checkpoint(name).tokenizer()
