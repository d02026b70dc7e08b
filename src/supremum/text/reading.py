"""How sources are read: which field, cut into what, and what becomes of that which cannot be read.

Strict reading (the default) raises at the first fault. Tolerant reading (`refuse` given) hands each fault to it, leaves
the record out and goes on; then bytes that are not UTF-8 become U+FFFD where they are less than JUNK of the text, and a
text with more of them, or of control characters, counts as binary.
"""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import SupremumError

FIELD = "text"
UNITS = ("document", "paragraph", "line")
LONGEST = 64 << 20  # bytes of one line (a JSON record, a CSV record's line): longer ones are refused, not loaded
JUNK = 0.01  # share of undecodable and control characters above which a text is binary
CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f\ufffd]")
LONE = re.compile("[\ud800-\udfff]")


@dataclass
class Reading:
    """`field`: the column or key that holds the document. `unit`: what of a plain text file is one document.
    `refuse`: called with each fault of tolerant reading. `read`: bytes of files consumed so far. `place`: of the document
    that was yielded last. `first`: the present source's first fault."""

    field: str = FIELD
    unit: str = "document"
    refuse: Callable[[SupremumError], None] | None = None
    read: int = 0
    place: str = ""
    first: SupremumError | None = None

    def fault(self, cause: str, remedy: str, error: Exception | None = None) -> Any:
        """Raise, or count, give None and go on."""
        found = SupremumError(cause, remedy)
        if self.refuse is None:
            raise found from error
        self.first = self.first or found
        self.refuse(found)
        return None


def open_bytes(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def lines(file: BinaryIO, path: Path, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each line; those beyond LONGEST are a fault and passed over, never held whole."""
    number = offset = 0
    while line := file.readline(LONGEST):
        number += 1
        start = offset
        offset += len(line)
        reading.read += len(line)
        if len(line) < LONGEST or line.endswith(b"\n"):
            yield number, start, line
            continue
        while (more := file.readline(LONGEST)) and not more.endswith(b"\n"):
            offset += len(more)
            reading.read += len(more)
        offset += len(more)
        reading.read += len(more)
        reading.fault(f"{path}: line {number} is longer than {LONGEST >> 20} MiB.", "Cut it into lines.")


def decode(data: bytes, path: Path, offset: int, reading: Reading, known: str) -> str | None:
    """`data` as text, the byte order mark of a file's beginning left out; None after a fault that was not raised."""
    if offset == 0:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return reading.fault(f"{path}: the text is UTF-16.", "Save it as UTF-8.")
        if data.startswith(codecs.BOM_UTF8):
            data, offset = data[3:], 3
    if reading.refuse is not None:
        text = data.decode("utf-8", "replace")
        junk = len(CONTROL.findall(text))
        if junk > max(JUNK * len(text), 1):
            return reading.fault(f"{path}: not a text file ({junk} of {len(text)} characters from offset {offset} are "
                                 f"undecodable or control characters).", f"Readable are {known}.")
        return text
    if (zero := data.find(b"\0")) >= 0:
        raise SupremumError(f"{path}: not a text file (a zero byte at offset {offset + zero}).",
                            f"Readable are {known}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SupremumError(
            f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {offset + error.start}).",
            "Convert the file to UTF-8, for example with iconv.") from error


def whole(value: object, where: str, field: str, has: str, reading: Reading) -> str | None:
    """A record's document, checked to be a string without lone surrogates (tolerant reading leaves those to cleaning)."""
    if not isinstance(value, str):
        return reading.fault(f"{where}: {has}.", f'Rename the field that holds the document to "{FIELD}", or name it: '
                                                 f"--field NAME." if field == FIELD else "Name another --field.")
    if reading.refuse is None and (lone := LONE.search(value)):
        raise SupremumError(f"{where}: holds half of a surrogate pair (U+{ord(lone[0]):04X}), which is no character.",
                            "Repair the escape sequence; `supremum text clean` removes such halves.")
    return value


def cut(pieces: Iterator[str], unit: str, most: int) -> Iterator[str]:
    """A plain text's pieces as documents: themselves, what stands between blank lines, or lines."""
    if unit == "document":
        yield from pieces
        return
    rest = ""
    for piece in pieces:
        parts = re.split(r"\n[^\S\n]*\n\s*" if unit == "paragraph" else r"\n", rest + piece)
        rest = parts.pop()
        yield from parts
        if len(rest) > most:
            yield rest
            rest = ""
    yield rest
