"""Labelled rows from files: what a recipe's `data` names, each row with the place that it came from.

    .tsv              tab-separated, no quoting; the first line is a header unless every column is given by number
    .csv              comma-separated, quoted as RFC 4180 says; the same about the header
    .jsonl            one JSON object a line; a list of fields for the target means those of them that a line has: the first
                      is trained on, all are references. A line of `messages` ({"role", "content"}, the form of chat
                      templates) is a row for each turn of the assistant, what stands before it being its source
    conll             a word a line, columns by tab or space, an empty line between sentences (.conll, or kind: conll)
    .json             questions in SQuAD's form
    a,b               two files of lines that belong together (translation), each may be .gz

UTF-8 with or without a mark at the start, line ends of any system. What is not text (a zero byte, another encoding, half a
surrogate pair), an empty file, a missing column or label is an error that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..errors import SupremumError
from ..progress import note

Row = dict[str, Any]  # roles of the task -> values; "where": file and line
Columns = Mapping[str, Any]  # role -> the column's name, or its number from 0
KINDS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".conll": "conll", ".bio": "conll",
         ".json": "squad"}
LONGEST = 1 << 20  # characters of one field
ROLES = ("system", "user", "assistant")
MESSAGES = 'Give [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], perhaps after a system turn.'
PART = re.compile(r"(.+?)\[(\d*):(\d*)\]")


def read(folder: Path, names: Sequence[str], roles: Sequence[str], columns: Columns, kind: str = "auto",
         drop: bool = False) -> list[Row]:
    """The rows of all files `names` below `folder`; a name may end in [first:last] to take some of its rows. drop: a row with
    an empty field is left out, and counted, instead of refused."""
    rows: list[Row] = []
    for name in names:
        part = PART.fullmatch(name)
        found = _file(folder, part[1] if part else name, roles, columns, kind, drop)
        rows += found[int(part[2] or 0) : int(part[3]) if part[3] else None] if part else found
    if not rows:
        raise SupremumError(f"{', '.join(names)}: no rows are left.", "Name files with rows, or widen [first:last].")
    return rows


def digest(rows: Sequence[Row]) -> str:
    """Of the rows, wherever their files lie."""
    bare = [{key: value for key, value in row.items() if key != "where"} for row in rows]
    return blake2b(json.dumps(bare, sort_keys=True).encode(), digest_size=8).hexdigest()


def _file(folder: Path, name: str, roles: Sequence[str], columns: Columns, kind: str, drop: bool) -> list[Row]:
    if "source" in roles and "," in name:
        one, other = (folder / part.strip() for part in name.split(",", 1))
        return _whole(f"{one}, {other.name}", _parallel(one, other, drop))
    path = folder / name
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix.lower(), "") if kind == "auto" else kind
    text = decoded(path)
    if kind in ("tsv", "csv"):
        rows = list(_table(path, text, kind, {role: columns.get(role, role) for role in roles}, drop))
    elif kind == "jsonl":
        rows = list(_objects(path, text, {role: columns.get(role, role) for role in roles}, drop))
    elif kind == "conll" and "words" in roles:
        rows = list(_sentences(path, text, columns.get("words", 0), columns.get("tags", -1)))
    elif kind == "squad" and "context" in roles:
        rows = list(_questions(path, text))
    else:
        raise SupremumError(f"{path}: no reader of this task for {kind or 'such'} files.",
                            "Readable are .tsv, .csv, .jsonl; .conll for tags, SQuAD's .json for answers, and two files a,b "
                            "for translation. data.kind names a file's kind where its suffix does not.")
    if not rows:
        raise SupremumError(f"{path}: holds no rows.", "Name a file with rows.")
    return _whole(str(path), rows)


def _whole(name: str, rows: list[Row]) -> list[Row]:
    """The rows that lack nothing."""
    kept = [row for row in rows if row]
    if len(kept) < len(rows):
        note(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows have an empty field and are left out.")
    return kept


def decoded(path: Path) -> str:
    """The whole text of a file, unpacked if its name ends in .gz."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SupremumError(f"{path}: cannot be read ({reason}).", "Check the path; --data names the folder.") from error
    if not data.strip():
        raise SupremumError(f"{path}: the file is empty.", "Name a file with rows in it.")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SupremumError(f"{path}: the text is UTF-16.", "Save it as UTF-8.")
    if (place := data.find(b"\0")) >= 0:
        raise SupremumError(f"{path}, line {data.count(10, 0, place) + 1}: a zero byte; this is no text.",
                            "Remove it, or name another file.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SupremumError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}).",
                            "Convert the file to UTF-8, for example with iconv.") from error


def _row(where: str, values: Mapping[str, Any], roles: Mapping[str, Any], drop: bool = False) -> Row:
    """A row of strings; blanks and half surrogates are refused. drop: of a row with a blank nothing is left."""
    row: Row = {"where": where}
    for role, column in roles.items():
        value = values[role]
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if drop and (text is None or (isinstance(text, str) and not text.strip())):
            return {}
        if not isinstance(text, str) or not text.strip():
            raise SupremumError(f"{where}: the {role} (column {column}) is missing.",
                                "Fill it in or remove the row; data.missing: drop leaves such rows out.")
        if len(text) > LONGEST:
            raise SupremumError(f"{where}: the {role} has {len(text)} characters.", f"At most {LONGEST} are read; split it.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise SupremumError(f"{where}: the {role} holds half a surrogate pair.", "Repair the text; it is no Unicode.")
        row[role] = text.strip()
    return row


def _table(path: Path, text: str, kind: str, roles: Mapping[str, Any], drop: bool) -> Iterator[Row]:
    numbered = all(isinstance(column, int) for column in roles.values())
    if kind == "tsv":
        lines = text.splitlines() if "\n" not in text else text.replace("\r\n", "\n").split("\n")
        table: Iterator[tuple[int, list[str]]] = ((number, line.split("\t")) for number, line in enumerate(lines, 1))
    else:
        table = _csv(path, text)
    places: dict[str, int] = dict(roles) if numbered else {}
    width = max(places.values(), default=-1) + 1
    for number, cells in table:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {number}"
        if not places:
            names = [cell.strip() for cell in cells]
            for role, column in roles.items():
                if column not in names:
                    raise SupremumError(f"{where}: there is no column {column!r} for the {role} (it has "
                                        f"{', '.join(names[:8])[:200]}).",
                                        f"Name it in the recipe, as data.columns.{role}; a number where there is no header.")
                places[role] = names.index(column)
            width = len(names)
            continue
        if len(cells) < width or (not numbered and len(cells) > width):
            raise SupremumError(f"{where}: {len(cells)} columns where {width} are expected.",
                                "Correct the line; a text that holds the separator needs quotes (.csv) or another form.")
        yield _row(where, {role: cells[place] for role, place in places.items()}, roles, drop)


def _csv(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    before = csv.field_size_limit(LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    last = 0
    try:
        for cells in reader:
            yield last + 1, cells
            last = reader.line_num
    except csv.Error as error:
        remedy = f"At most {LONGEST} characters are read; split it, or look for a quote without its end." \
            if "field larger" in str(error) else "Look for a quote without its end."
        raise SupremumError(f"{path}, line {last + 1}: not CSV ({error}).", remedy) from error
    finally:
        csv.field_size_limit(before)


def _objects(path: Path, text: str, roles: Mapping[str, Any], drop: bool) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SupremumError(f"{where}: not JSON ({error}).", "Give one JSON object a line.") from error
        if not isinstance(found, dict):
            raise SupremumError(f"{where}: is no JSON object.", "Give one JSON object a line.")
        own = roles.get("source", ())
        if "messages" in found and "target" in roles and found.keys().isdisjoint(own if isinstance(own, list) else [own]):
            yield from _turns(where, found["messages"], drop)
            continue
        several = {role: [column for column in columns if column in found]
                   for role, columns in roles.items() if isinstance(columns, list)}
        here = {role: several[role][0] if several.get(role) else column for role, column in roles.items()}
        missing = [column for column in here.values() if isinstance(column, list) or column not in found]
        if missing:
            raise SupremumError(f"{where}: there is no field {missing[0]!r} (it has {', '.join(map(str, found))[:200]}).",
                                "Name the field in the recipe, under data.columns.")
        row = _row(where, {role: found[column] for role, column in here.items()}, here, drop)
        if row and "target" in several:
            row["references"] = [_row(where, {"target": found[column]}, {"target": column})["target"]
                                 for column in several["target"]]
        yield row


def _turns(where: str, messages: Any, drop: bool) -> Iterator[Row]:
    """Of a dialogue: each of the assistant's turns that answers the user's as the target of those before it, "turns";
    "source" is their last."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise SupremumError(f"{where}: messages is no list of turns.", MESSAGES)
    turns: list[dict[str, str]] = []
    answers = 0
    for number, one in enumerate(messages, 1):
        if one.get("role") not in ROLES:
            raise SupremumError(f"{where}: turn {number} has the role {str(one.get('role'))[:40]!r}.", MESSAGES)
        found = _row(where, {"content": one.get("content")}, {"content": f"messages, turn {number}"}, drop)
        if not found:
            yield {}
            return
        said = found["content"]
        if one["role"] == "assistant" and turns and turns[-1]["role"] == "user":
            yield {"where": where, "source": turns[-1]["content"], "target": said, "turns": list(turns)}
            answers += 1
        turns.append({"role": one["role"], "content": said})
    if not answers:
        raise SupremumError(f"{where}: no turn of the assistant answers one of the user.", MESSAGES)


def _sentences(path: Path, text: str, word: int, tag: int) -> Iterator[Row]:
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield {"where": f"{path}, line {start}", "words": words, "tags": tags}
            words, tags = [], []
            continue
        cells = line.rstrip().split("\t") if "\t" in line else line.split()
        if not words:
            start = number
        if len(cells) < 2 or not -len(cells) <= tag < len(cells):
            raise SupremumError(f"{path}, line {number}: {len(cells)} columns; a word and its tag are expected.",
                                "Write the word, a tab and its tag, and an empty line between sentences.")
        mark = cells[tag].strip()
        if not re.fullmatch(r"O|[BI]-.+", mark):
            raise SupremumError(f"{path}, line {number}: {mark[:40]!r} is not a BIO tag.", "Write B-TYPE, I-TYPE or O.")
        words.append(cells[word].strip() or "_")
        tags.append(mark)


def _questions(path: Path, text: str) -> Iterator[Row]:
    remedy = "Give SQuAD's form: data, paragraphs, context, qas, question, answers."
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SupremumError(f"{path}: not JSON ({error}).", remedy) from error
    number = 0
    try:
        for article in found["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    number += 1
                    given = [(str(one["text"]), int(one["answer_start"])) for one in asked["answers"]]
                    row = _row(f"{path}, question {number}", {"question": asked["question"], "context": paragraph["context"]},
                               {"question": "question", "context": "context"})
                    # an answer's place counts from the context as it was stored
                    row["context"] = str(paragraph["context"])
                    start = given[0][1] if given else -1
                    if given and row["context"][start : start + len(given[0][0])] != given[0][0]:
                        raise SupremumError(f"{row['where']}: the answer {given[0][0][:40]!r} does not stand at {start}.",
                                            remedy)
                    yield {**row, "answers": [said for said, _ in given], "start": start}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SupremumError(f"{path}, question {number}: not SQuAD's form ({type(error).__name__}: {error}).",
                            remedy) from error


def _parallel(one: Path, other: Path, drop: bool) -> list[Row]:
    sources, targets = (decoded(path).replace("\r\n", "\n").rstrip("\n").split("\n") for path in (one, other))
    if len(sources) != len(targets):
        raise SupremumError(f"{one} has {len(sources)} lines, {other} has {len(targets)}.",
                            "Lines belong together by number; give files of the same length.")
    roles = {"source": one.name, "target": other.name}
    return [_row(f"{one}, line {number}", {"source": source, "target": target}, roles, drop)
            for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1)]
