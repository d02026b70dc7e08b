"""Packed tokens as training reads them: windows of T + 1 tokens out of memory-mapped shards, in a seeded order.

A folder that `supremum text pack` wrote holds one stream of tokens, cut into shards:

    index.json            {"format", "version", "dtype", "tokens", "documents", "vocabulary", "shards": [{"file", "tokens",
                          "sha256"}], "prefix", "suffix", ...}
    tokens-00000.bin ...  little-endian uint16 or uint32, nothing else
    starts.bin            little-endian int64: where each document begins in the stream
    tokenizer/            what AutoTokenizer loads

Window i is tokens i T to i T + T inclusive, so that inputs are its first T and labels its last T; neighbours share one
token, and what is left of the stream at its end is not read. Epoch e reads them in the order of a keyed permutation of
{0 .. n - 1}: a Feistel network of four rounds (Luby, Rackoff 1988) on the next power of four, walked until it falls below
n; it takes no memory. Needs numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SupremumError
from .reading import LONE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INDEX, STARTS, FORMAT, VERSION = "index.json", "starts.bin", "supremum packed tokens", 1
ROUNDS = 4


class PackedTokens:
    """`len`: windows; `[i]`: window i in the stream's order; iterating: the windows of this rank from the position on, epoch
    after epoch, without end. `state` and `resume` are the position, whatever the number of ranks."""

    def __init__(self, folder: str | Path, length: int, *, seed: int = 0, shuffle: bool = True, boundaries: bool = False,
                 rank: int = 0, ranks: int = 1) -> None:
        """length: T. boundaries: windows come as (tokens, document), both (T + 1,), the document counted from the window's
        first one. rank, ranks: of the processes that share the windows. Raises SupremumError for a damaged folder."""
        self.folder, self.length = Path(folder).expanduser(), length
        self.seed, self.shuffle, self.boundaries, self.rank, self.ranks = seed, shuffle, boundaries, rank, ranks
        self.index = read_index(self.folder)
        self.tokens, self.documents = int(self.index["tokens"]), int(self.index["documents"])
        self.vocabulary = int(self.index["vocabulary"])
        self.first = np.cumsum([0, *(shard["tokens"] for shard in self.index["shards"])])
        self.consumed = 0  # windows, by all ranks and epochs
        self._maps: dict[str, np.ndarray] = {}
        if length < 1 or self.tokens <= length:
            raise SupremumError(f"{self.folder}: {self.tokens} tokens make no window of {length} + 1.",
                                "Use shorter windows, or pack more text.")

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def __getitem__(self, window: int) -> Any:
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.length
        tokens = self.read(start, start + self.length + 1)
        if not self.boundaries:
            return tokens
        starts = self._map(STARTS, "<i8")
        document = np.searchsorted(starts, np.arange(start, start + self.length + 1), side="right")
        return tokens, (document - document[0]).astype(np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 of the stream."""
        parts = []
        shard = int(np.searchsorted(self.first, start, side="right")) - 1
        while start < stop:
            begin, end = int(self.first[shard]), int(self.first[shard + 1])
            values = self._map(self.index["shards"][shard]["file"], self.index["dtype"])
            parts.append(values[start - begin:min(stop, end) - begin].astype(np.int64))
            start, shard = min(stop, end), shard + 1
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[Any]:
        while True:
            place = self.consumed + self.rank
            window = self.order(place)
            self.consumed += self.ranks  # before the window is given: a state taken after it is past it
            yield self[window]

    def order(self, place: int) -> int:
        """The window that comes as number `place` over all epochs."""
        epoch, number = divmod(place, len(self))
        return permuted(number, len(self), f"{self.seed}/{epoch}") if self.shuffle else number

    def state(self) -> dict[str, Any]:
        """What `resume` takes; plain JSON."""
        return {"fingerprint": fingerprint(self.index), "length": self.length, "seed": self.seed, "shuffle": self.shuffle,
                "consumed": self.consumed}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises SupremumError if it belongs to other tokens, windows or another order."""
        mine = self.state()
        changed = [name for name in mine if name != "consumed" and state.get(name) != mine[name]]
        if changed:
            raise SupremumError(f"{self.folder}: the position belongs to another run ({', '.join(changed)} changed).",
                                "Resume with the same tokens, length and seed, or begin anew.")
        self.consumed = int(state["consumed"])

    def _map(self, name: str, dtype: str) -> np.ndarray:
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / name, dtype=np.dtype(dtype), mode="r")
        return self._maps[name]

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a process that the loader spawns opens its own."""
        return {**self.__dict__, "_maps": {}}


class Encoder:
    """A document's tokens, without special ones: what a worker process of packing does (here, so that it loads no torch)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ready = False

    def __call__(self, text: str) -> np.ndarray:
        if not self.ready:  # the setting does not travel
            self.tokenizer.encode_special_tokens = True
            self.ready = True
        text = LONE.sub("\ufffd", text)
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def read_index(folder: Path) -> dict[str, Any]:
    """The index, its files present and of the size it says."""
    try:
        index = json.loads((folder / INDEX).read_text())
        shards, dtype = index["shards"], np.dtype(index["dtype"])
        sizes = {str(shard["file"]): int(shard["tokens"]) * dtype.itemsize for shard in shards}
        sizes[STARTS] = 8 * int(index["documents"])
        whole = (index["format"] == FORMAT and index["dtype"] in ("<u2", "<u4") and all(Path(n).name == n for n in sizes)
                 and int(index["tokens"]) == sum(int(shard["tokens"]) for shard in shards))
        version = index["version"]
    except OSError as error:
        raise SupremumError(f"{folder}: is no folder of packed tokens ({INDEX}: {error.strerror}).",
                            "Write one with `supremum text pack`.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SupremumError(f"{folder / INDEX}: is damaged ({error}).", "Pack the text again.") from error
    if not whole or version != VERSION:
        raise SupremumError(f"{folder / INDEX}: is no index of packed tokens of version {VERSION}.", "Pack the text again.")
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            raise SupremumError(f"{folder / name}: has {found} bytes where the index says {size}.", "Pack the text again.")
    return index


def fingerprint(index: dict[str, Any]) -> str:
    """Of the stream: its type and its shards' hashes."""
    parts = [index["dtype"], *(shard["sha256"] for shard in index["shards"])]
    return blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def permuted(number: int, count: int, key: str) -> int:
    """Where the permutation `key` of {0 .. count - 1} takes `number`."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [int.from_bytes(blake2b(f"{key}/{round_}".encode(), digest_size=8).digest(), "little") for round_ in range(ROUNDS)]
    while True:
        left, right = number >> half, number & mask
        for each in keys:
            left, right = right, left ^ (mix(right ^ each) & mask)
        number = left << half | right
        if number < count:
            return number


def mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
