"""Documents in records: JSON lines and arrays, CSV and TSV, parquet. Each yields (place, document) pairs.

A .tsv has no quoting (a quotation mark is a character); a .csv is quoted as RFC 4180 has it, and its separator is the one
of "," ";" and tab that its header holds most often.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SupremumError
from .reading import FIELD, LONGEST, Reading, decode, lines, open_bytes, whole

Row = tuple[str, str]
ARRAY = 1 << 30  # bytes of a JSON array, which must be parsed as a whole


def json_rows(path: Path, reading: Reading, known: str) -> Iterator[Row]:
    with open_bytes(path) as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if first == b"[" and ".json" in (path.suffix.lower(), path.with_suffix("").suffix.lower()):
            data = file.read(ARRAY + 1)
            if len(data) > ARRAY:
                raise SupremumError(f"{path}: a JSON array of more than 1 GiB.", "Write it as JSON lines.")
            rows = parse(decode(data, path, 0, reading, known), str(path), reading)
            for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
                if (text := field_of(row, f"{path}: entry {number}", reading)) is not None:
                    yield f"{path}: entry {number}", text
            return
        for number, offset, line in lines(file, path, reading):
            text = decode(line, path, offset, reading, known)
            where = f"{path}: line {number}"
            if text and text.strip() and (row := parse(text, where, reading)) is not None:
                document = field_of(row, where, reading)
                if document is not None:
                    yield where, document


def parse(text: str | None, where: str, reading: Reading) -> Any:
    """A JSON value, None after a fault (and for null, which is no record)."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return reading.fault(f"{where} is not JSON ({reason}).", "Give one JSON object a line.", error)


def field_of(row: Any, where: str, reading: Reading) -> str | None:
    """The document of a record, None after a fault."""
    field = reading.field
    value = row.get(field) if isinstance(row, dict) else None
    has = ""
    if not isinstance(value, str):
        if isinstance(row, dict) and field in row:
            has = f'"{field}" is a {type(value).__name__}, not a string'
        elif isinstance(row, dict):
            has = f'has no "{field}" field (it has {", ".join(map(repr, list(row)[:6])) or "no fields"})'
        else:
            has = f'has no "{field}" field (it is a {type(row).__name__})'
    return whole(value, where, field, has, reading)


def csv_rows(path: Path, reading: Reading, known: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)  # the module's own is 128 KiB, for the whole process
    with open_bytes(path) as file:
        texts = _csv_lines(file, path, reading, known)
        header = next(texts, "")
        tabs = ".tsv" in (path.suffix.lower(), path.with_suffix("").suffix.lower())
        separator = "\t" if tabs else max(",;\t", key=header.count)
        quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        names = next(csv.reader([header], delimiter=separator, quoting=quoting), [])
        if reading.field not in names:
            reading.fault(f'{path}: has no "{reading.field}" column (it has {", ".join(map(repr, names[:6]))}).',
                          f'Rename the column that holds the document to "{FIELD}", or name it: --field NAME.')
            return
        column = names.index(reading.field)
        rows = csv.reader(texts, delimiter=separator, quoting=quoting)
        number = 0
        while True:
            number += 1
            where = f"{path}: row {number}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                reading.fault(f"{where} is not CSV ({error}).", "Check its quotation marks.", error)
                continue
            if row:
                has = f'has no "{reading.field}" (it has {len(row)} of {len(names)} columns)'
                text = whole(row[column] if column < len(row) else None, where, reading.field, has, reading)
                if text is not None:
                    yield where, text.replace("\r\n", "\n")


def _csv_lines(file: Any, path: Path, reading: Reading, known: str) -> Iterator[str]:
    for _, offset, line in lines(file, path, reading):
        text = decode(line.replace(b"\0", b""), path, offset, reading, known)
        if text is not None:
            yield text


def parquet_rows(path: Path, reading: Reading) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SupremumError(f"{path}: reading parquet files needs pyarrow.",
                            "pip install 'supremum[parquet]'") from error
    field = reading.field
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise SupremumError(f'{path}: has no "{field}" column (it has {", ".join(map(repr, names[:6]))}).',
                                    f'Rename the column that holds the document to "{FIELD}", or name it: --field NAME.')
            row = 0
            for batch in file.iter_batches(columns=[field], batch_size=1024):
                for value in batch.column(0):
                    text = value.as_py()
                    where = f"{path}: row {row}"
                    if text is not None and (document := field_of({field: text}, where, reading)) is not None:
                        yield where, document  # a null is an absent document
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        reading.fault(f"{path}: not a readable parquet file ({first}).", "Download or write the file again.", error)
