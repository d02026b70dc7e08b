"""Sources in, a folder of packed tokens out (its form: text/packed.py).

Each document becomes the tokenizer's frame around its tokens (a BOS; [CLS] and [SEP]), and ends with the end-of-text token
where the frame has no end. What looks like a special token in the text is text: a document cannot forge a boundary. The
same sources and tokenizer give the same bytes, whatever the number of workers and interruptions (text/resuming.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import __version__
from ..errors import SupremumError
from ..progress import phase
from ..versions import version_of
from ..workspace import move_into_place, write_atomic
from .packed import FORMAT, INDEX, STARTS, VERSION, Encoder
from .parallel import ordered_map
from .reading import Reading
from .resuming import may_replace, resumable
from .sources import bytes_of, names_of, state_of, watched
from .vocabulary import check_folder
from .windows import frame

SHARD = 1 << 26  # tokens
STAGING = "packed"  # in the folder of what is under way


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

    Records that cannot be read are counted, with `strict` an error. fresh: replace what stands there, and discard what an
    interrupted run left. Raises SupremumError for what the user can mend.
    """
    folder, reading = Path(out).expanduser(), reading or Reading()
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
    if not strict:
        def refuse(fault: SupremumError) -> None:
            done.unreadable += 1
            if len(done.faults) < 5:
                done.faults.append(str(fault))
        reading.refuse = refuse
    unknown = -1 if tokenizer.unk_token_id is None or tokenizer.unk_token_id in suffix else tokenizer.unk_token_id
    identity = {"verb": "text pack", "version": [__version__, version_of("tokenizers")],
                "tokenizer": [sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(), prefix, suffix, unknown],
                "settings": [shard, strict, reading.field, reading.unit],
                "sources": [state_of(source) for source in names_of(sources)]}
    real = folder.resolve()  # where `folder` is a link
    check_folder(folder, INDEX, fresh or may_replace(real, identity))

    def read() -> Iterator[tuple[str, str]]:
        for place, text in watched(sources, reading, "pack"):
            done.characters += len(text)
            yield place, text

    def counts() -> dict[str, Any]:
        return {"unknown": done.unknown, "tokens": stream.total, "shards": stream.done}

    with resumable(real, identity, fresh) as work:
        begun = work.counts or {"unknown": 0, "tokens": 0, "shards": []}
        staging, starts, done.unknown = work.folder / STAGING, work.open(f"{STAGING}/{STARTS}"), begun["unknown"]
        stream = Shards(lambda name: work.open(f"{STAGING}/{name}"), dtype, shard, begun["tokens"], begun["shards"])
        encoded = ordered_map(Encoder(tokenizer.backend_tokenizer), (text for _, text in work.left(read())),
                              workers=workers or os.cpu_count() or 1, size=len)
        for ids in encoded:
            starts.write(np.int64(stream.total).tobytes())
            done.unknown += int((ids == unknown).sum()) if unknown >= 0 else 0
            stream.write(np.concatenate([np.array(prefix, np.uint32), ids, np.array(suffix, np.uint32)]))
            work.done(counts)
        work.save(counts())
        shards = stream.close()
        done.documents, done.tokens, done.shards = work.documents, stream.total, len(shards)
        with phase("write"):
            tokenizer.save_pretrained(staging / "tokenizer")
            index = {"format": FORMAT, "version": VERSION, "dtype": dtype, "tokens": done.tokens, "documents": done.documents,
                     "vocabulary": len(tokenizer), "prefix": prefix, "suffix": suffix, "shards": shards,
                     "sources": names_of(sources),
                     "unknown": done.unknown, "unreadable": done.unreadable}
            write_atomic(staging / INDEX, json.dumps(index, indent=1).encode())
            move_into_place(staging, folder)
        done.seconds = work.seconds()
    return done


class Shards:
    """Files of `size` tokens each, but for the last. `total` tokens stand in those that are `done` and in one under way."""

    def __init__(self, open_file: Callable[[str], BinaryIO], dtype: str, size: int, total: int,
                 done: list[dict[str, Any]]) -> None:
        self.open_file, self.dtype, self.size, self.total, self.done = open_file, np.dtype(dtype), size, total, done
        self._file: BinaryIO | None = None
        if total > sum(shard["tokens"] for shard in done):
            self._begin()

    def write(self, ids: np.ndarray) -> None:
        self.total += len(ids)
        while len(ids):
            if self._file is None:
                self._begin()
            assert self._file is not None
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

    def _begin(self) -> None:
        """Open the next shard, or the one under way, whose hash is taken again."""
        self._name, self._hash, self.held = f"tokens-{len(self.done):05d}.bin", sha256(), 0
        self._file = self.open_file(self._name)
        self._file.seek(0)
        while data := self._file.read(1 << 20):
            self._hash.update(data)
            self.held += len(data) // self.dtype.itemsize

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
