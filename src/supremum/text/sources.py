"""Documents from files and the hub: what the user names with --text.

    notes.txt notes.md          UTF-8, line ends of any system; one document (cut at line ends into pieces of about
                                4 MiB when larger)
    corpus.jsonl                one JSON object a line (or one JSON array), its "text" field is the document
    corpus.parquet              its "text" column, through pyarrow (extra `parquet`)
    folder/                     every such file in it, sorted by path
    owner/name[:config][:split] a dataset on the Hugging Face hub, streamed, its "text" column (extra `datasets`)

Nothing is skipped in silence: a file that cannot be read as text is an error that names the place.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import SupremumError

FIELD = "text"
PIECE = 4 << 20  # bytes of a plain text file that become one document; keeps a tokenizer's working memory bounded
PLAIN = {".txt", ".text", ".md", ".rst", ""}
LINES = {".jsonl", ".ndjson", ".json"}
READABLE = PLAIN | LINES | {".parquet"}
KNOWN = ".txt, .md, .jsonl, .json, .parquet"
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


def load_text(sources: Sequence[str | Path]) -> Iterator[str]:
    """Yield the documents of all `sources` in order, blank ones left out.

    Raises SupremumError for what is missing, empty, not text, badly encoded (with the offset), or without a "text"
    field. A source is opened only when its turn comes.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    if not sources:
        raise SupremumError("No text was given.", "Name a file with --text.")
    for source in sources:
        found = False
        for document in _documents(str(source)):
            if document.strip():
                found = True
                yield document
        if not found:
            raise SupremumError(f"{source}: holds no text.", "Name a file with text in it.")


def files_of(source: str) -> list[Path]:
    """The files that `source` names, in the order in which they are read; none for a dataset on the hub.

    Raises SupremumError for what does not exist, and for a dataset where the library that reads it is missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix.lower() in READABLE
                 and not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise SupremumError(f"{source}: the folder holds no text files.", f"Readable are {KNOWN}.")
        return files
    if path.is_file():
        return [path]
    if path.exists():
        raise SupremumError(f"{source}: neither a file nor a folder.", f"Readable are {KNOWN} and folders of them.")
    if HUB.fullmatch(source) and path.suffix.lower() not in READABLE - {""}:
        _datasets(source)
        return []
    raise SupremumError(f"{source}: no such file or folder.",
                        "Check the path; a dataset on the hub is named owner/name[:config][:split].")


def _documents(source: str) -> Iterator[str]:
    files = files_of(source)
    for file in files:
        yield from _file(file)
    if not files:
        yield from _hub(source)


def _file(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif path.stat().st_size == 0:
            raise SupremumError(f"{path}: the file is empty.", "Name a file with text in it.")
        elif suffix in LINES:
            yield from _json(path)
        elif suffix in PLAIN:
            yield from _plain(path)
        else:
            raise SupremumError(f"{path}: no reader for {suffix} files.", f"Readable are {KNOWN}.")
    except OSError as error:
        raise SupremumError(f"{path}: cannot be read ({error.strerror or error}).", "Check its permissions.") from error


def _plain(path: Path) -> Iterator[str]:
    """Pieces of at least PIECE bytes that end at a line end; all line ends become newlines, as Python reads."""
    with path.open("rb") as file:
        rest, offset = b"", 0  # `offset`: where `rest` begins in the file
        while block := file.read(PIECE):
            data = rest + block
            cut = data.rfind(b"\n") + 1 if len(block) == PIECE else len(data)
            if cut == 0 and len(data) < 4 * PIECE:
                rest = data  # a line longer than a piece
                continue
            cut = cut or _character_end(data)
            yield _lines(_decode(data[:cut], path, offset))
            rest, offset = data[cut:], offset + cut
        if rest:
            yield _lines(_decode(rest, path, offset))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _character_end(data: bytes) -> int:
    """The last position in `data` that does not cut a UTF-8 character."""
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 else len(data)


def _decode(data: bytes, path: Path, offset: int) -> str:
    if offset == 0:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SupremumError(f"{path}: the text is UTF-16.", "Save it as UTF-8.")
        if data.startswith(codecs.BOM_UTF8):
            data, offset = data[3:], 3
    if (zero := data.find(b"\0")) >= 0:
        raise SupremumError(f"{path}: not a text file (a zero byte at offset {offset + zero}).",
                            f"Readable are {KNOWN}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SupremumError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset + error.start}).",
            "Convert the file to UTF-8, for example with iconv.") from error


def _json(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        file.seek(0)
        if first == b"[" and path.suffix.lower() == ".json":
            for number, row in enumerate(_parse(_decode(file.read(), path, 0), str(path)), 1):
                yield _field(row, f"{path}: entry {number}")
            return
        offset = 0
        for number, line in enumerate(file, 1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield _field(_parse(text, f"{path}: line {number}"), f"{path}: line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise SupremumError(f"{where} is not JSON ({reason}).", "Give one JSON object a line.") from error


def _field(row: Any, where: str) -> str:
    value = row.get(FIELD) if isinstance(row, dict) else None
    if not isinstance(value, str):
        has = f"it has {', '.join(map(repr, list(row)[:6])) or 'no fields'}" if isinstance(row, dict) \
            else f"it is a {type(row).__name__}"
        what = f'"{FIELD}" is a {type(value).__name__}, not a string' if isinstance(row, dict) and FIELD in row \
            else f'has no "{FIELD}" field ({has})'
        raise SupremumError(f"{where}: {what}.", f'Rename the field that holds the document to "{FIELD}".')
    return value


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SupremumError(f"{path}: reading parquet files needs pyarrow.",
                            "pip install 'supremum[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if FIELD not in names:
                raise SupremumError(f'{path}: has no "{FIELD}" column (it has {", ".join(map(repr, names[:6]))}).',
                                    f'Rename the column that holds the document to "{FIELD}".')
            row = 0
            for batch in file.iter_batches(columns=[FIELD], batch_size=1024):
                for value in batch.column(0):
                    text = value.as_py()
                    if text is not None:  # a null is an absent document
                        yield _field({FIELD: text}, f"{path}: row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SupremumError(f"{path}: not a readable parquet file ({first}).",
                            "Download or write the file again.") from error


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SupremumError(f"{source}: no such file, and a dataset from the hub needs the datasets library.",
                            "Check the path, or pip install 'supremum[datasets]'") from error
    return datasets


def _hub(source: str) -> Iterator[str]:
    datasets = _datasets(source)
    name, *rest = source.split(":")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _field(row, f"{source}: row {number}")
    except SupremumError:
        raise
    except Exception as error:  # the library raises many kinds: network, missing, gated, configuration, parsing
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise SupremumError(f"{source}: the dataset cannot be read from the hub ({first}).",
                            "Check the name (owner/name[:config][:split]) and the network, or give a file.") from error
