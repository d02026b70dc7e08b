"""Documents from files and the hub: what the user names as a source or with --text.

    notes.txt notes.md          UTF-8, line ends of any system; one document (cut at line ends into pieces of about
                                4 MiB when larger), or one a paragraph or a line
    corpus.jsonl                one JSON object a line (or one JSON array), its "text" field is the document
    corpus.csv corpus.tsv       a header line; the "text" column. Byte order marks and zero bytes are left out
    corpus.parquet              its "text" column, through pyarrow (extra `parquet`)
    notes.txt.gz                each of the above but parquet, compressed
    folder/                     every such file in it, sorted by path
    owner/name[:config][:split] a dataset on the Hugging Face hub, streamed, its "text" column (extra `datasets`)

Nothing is skipped in silence: what cannot be read as text is an error that names the place, or with tolerant reading
(text/reading.py) a fault that is counted. Memory is bounded by the longest record.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import SupremumError
from ..progress import phase
from .reading import UNITS, Reading, cut, decode, open_bytes
from .records import csv_rows, field_of, json_rows, parquet_rows

PIECE = 4 << 20  # bytes of a plain text file that become one document; keeps a tokenizer's working memory bounded
PLAIN = {".txt", ".text", ".md", ".rst", ""}
LINES = {".jsonl", ".ndjson", ".json"}
TABLES = {".csv", ".tsv"}
READABLE = PLAIN | LINES | TABLES | {".parquet"}
KNOWN = ".txt, .md, .jsonl, .json, .csv, .tsv, .parquet"
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


def load_text(sources: Sequence[str | Path], reading: Reading | None = None) -> Iterator[str]:
    """Yield the documents of all `sources` in order, blank ones left out.

    Raises SupremumError for what is missing, empty, not text, badly encoded (with the offset), or without the field; with
    tolerant `reading` only for what is missing and for a source that gives nothing. A source is opened only when its turn
    comes.
    """
    reading = reading or Reading()
    if isinstance(sources, (str, Path)):
        sources = [sources]
    if not sources:
        raise SupremumError("No text was given.", "Name a file with --text.")
    if reading.unit not in UNITS:
        raise SupremumError(f"{reading.unit!r} is no part of a text.", f"Choose from {', '.join(UNITS)}.")
    for source in sources:
        found, reading.first = False, None
        for document in _documents(str(source), reading):
            if document.strip():
                found = True
                yield document
        if not found:
            raise reading.first or SupremumError(f"{source}: holds no text.", "Name a file with text in it.")


def watched(sources: Sequence[str | Path], reading: Reading, name: str) -> Generator[tuple[str, str], None, None]:
    """(place, document) pairs of the sources, as one phase whose steps are MB read."""
    done, total = 0, -(-bytes_of(sources) // 10**6)
    with phase(name, total or None) as advance:
        for document in load_text(sources, reading):
            yield reading.place, document
            while done < min(reading.read // 10**6, total - 1):
                advance()
                done += 1
        if total:
            advance()


def names_of(sources: Sequence[str | Path] | str | Path) -> list[str]:
    return [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]


def suffix_of(path: Path) -> str:
    """The suffix that tells the format; that of a.txt.gz is .txt."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def files_of(source: str) -> list[Path]:
    """The files that `source` names, in the order in which they are read; none for a dataset on the hub.

    Raises SupremumError for what does not exist, and for a dataset where the library that reads it is missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and suffix_of(f) in READABLE
                 and not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise SupremumError(f"{source}: the folder holds no text files.", f"Readable are {KNOWN}.")
        return files
    if path.is_file():
        return [path]
    if path.exists():
        raise SupremumError(f"{source}: neither a file nor a folder.", f"Readable are {KNOWN} and folders of them.")
    if HUB.fullmatch(source) and suffix_of(path) not in READABLE - {""}:
        _datasets(source)
        return []
    raise SupremumError(f"{source}: no such file or folder.",
                        "Check the path; a dataset on the hub is named owner/name[:config][:split].")


def bytes_of(sources: Sequence[str | Path]) -> int:
    """How many bytes the sources' files hold together; 0 where one is a dataset on the hub. Checks that they exist."""
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    files = [files_of(str(source)) for source in sources]
    return sum(file.stat().st_size for each in files for file in each) if all(files) else 0


def state_of(source: str) -> list[Any]:
    """What tells whether the text changed: the path, the size and the time of each file that is read."""
    states = [(path, path.stat()) for path in files_of(source)]
    return [source, *([str(path), state.st_size, state.st_mtime_ns] for path, state in states)]


def _documents(source: str, reading: Reading) -> Iterator[str]:
    files = files_of(source)
    for file in files:
        end = reading.read + file.stat().st_size
        for place, document in _file(file, reading):
            reading.place = place
            yield document
        reading.read = end  # compressed and columnar files count at their end
    if not files:
        for place, document in _hub(source, reading):
            reading.place = place
            yield document


def _file(path: Path, reading: Reading) -> Iterator[tuple[str, str]]:
    """(place, document) pairs of one file."""
    suffix = suffix_of(path)
    try:
        if suffix == ".parquet":
            yield from parquet_rows(path, reading)
        elif path.stat().st_size == 0:
            reading.fault(f"{path}: the file is empty.", "Name a file with text in it.")
        elif suffix in LINES:
            yield from json_rows(path, reading, KNOWN)
        elif suffix in TABLES:
            yield from csv_rows(path, reading, KNOWN)
        elif suffix in PLAIN:
            documents = cut(_plain(path, reading), reading.unit, PIECE)
            yield from ((f"{path}: {reading.unit} {number}", document) for number, document in enumerate(documents, 1))
        else:
            raise SupremumError(f"{path}: no reader for {suffix} files.", f"Readable are {KNOWN}.")
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of them
        raise SupremumError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).",
                            "Check its permissions, and that it is whole.") from error


def _plain(path: Path, reading: Reading | None = None) -> Iterator[str]:
    """Pieces of at least PIECE bytes that end at a line end; all line ends become newlines, as Python reads."""
    reading = reading or Reading()
    with open_bytes(path) as file:
        rest, offset = b"", 0  # `offset`: where `rest` begins in the file
        while block := file.read(PIECE):
            reading.read += len(block)
            data = rest + block
            end = data.rfind(b"\n") + 1 if len(block) == PIECE else len(data)
            if end == 0 and len(data) < 4 * PIECE:
                rest = data  # a line longer than a piece
                continue
            end = end or _character_end(data)
            if (text := decode(data[:end], path, offset, reading, KNOWN)) is not None:
                yield _lines(text)
            rest, offset = data[end:], offset + end
        if rest and (text := decode(rest, path, offset, reading, KNOWN)) is not None:
            yield _lines(text)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _character_end(data: bytes) -> int:
    """The last position in `data` that does not cut a UTF-8 character."""
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 else len(data)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SupremumError(f"{source}: no such file, and a dataset from the hub needs the datasets library.",
                            "Check the path, or pip install 'supremum[datasets]'") from error
    return datasets


def _hub(source: str, reading: Reading) -> Iterator[tuple[str, str]]:
    datasets = _datasets(source)
    name, *rest = source.split(":")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            if (text := field_of(row, f"{source}: row {number}", reading)) is not None:
                yield f"{source}: row {number}", text
    except SupremumError:
        raise
    except Exception as error:  # the library raises many kinds: network, missing, gated, configuration, parsing
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SupremumError(f"{source}: the dataset cannot be read from the hub ({first}).",
                            "Check the name (owner/name[:config][:split]) and the network, or give a file.") from error
