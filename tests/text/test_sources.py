"""Every source a user can name, and every way in which it can be wrong."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supremum.errors import SupremumError
from supremum.text import load_text, sources


def texts(*names) -> list[str]:
    return list(load_text([str(name) for name in names]))


def refusal(*names) -> str:
    with pytest.raises(SupremumError) as caught:
        texts(*names)
    assert caught.value.remedy
    return str(caught.value)


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße,\r\nworld\r".encode())
    (tmp_path / "b.md").write_text("# Second")
    assert texts(tmp_path / "a.txt", tmp_path / "b.md") == ["Grüße,\nworld\n", "# Second"]


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=30), min_size=1),
       piece=st.integers(1, 40))
def test_long_text_is_cut_without_loss(tmp_path_factory, lines, piece):
    path = tmp_path_factory.mktemp("long") / "a.txt"
    whole = "x" + "\n".join(lines)
    path.write_bytes(whole.encode())
    old, sources.PIECE = sources.PIECE, piece
    try:
        pieces = list(sources._plain(path))
    finally:
        sources.PIECE = old
    assert "".join(pieces) == whole
    assert len(whole.encode()) >= piece or len(pieces) == 1


def test_json_lines_and_arrays(tmp_path):
    rows = [{"text": "one", "id": 1}, {"text": "  "}, {"text": "zwei ü"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.json") == ["one", "zwei ü"]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pa.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["one", "three"]


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}')
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "weights.bin").write_bytes(b"\0")
    assert texts(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"", "a.txt: the file is empty"),
    ("a.txt", b" \n\t ", "a.txt: holds no text"),
    ("a.txt", b"good \xff bad", r"a.txt: not UTF-8 (byte 0xff at offset 5)"),
    ("a.txt", b"good \xc3", r"a.txt: not UTF-8 (byte 0xc3 at offset 5)"),
    ("a.txt", b"\x7fELF\x00\x01", "a.txt: not a text file (a zero byte at offset 4)"),
    ("a.txt", "hello".encode("utf-16"), "a.txt: the text is UTF-16"),
    ("a.pdf", b"%PDF", "a.pdf: no reader for .pdf files"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl: line 2 is not JSON"),
    ("a.jsonl", b'{"content": "x", "id": 1}', """line 1: has no "text" field (it has 'content', 'id')"""),
    ("a.jsonl", b"{}", 'line 1: has no "text" field (it has no fields)'),
    ("a.jsonl", b'["text"]', 'line 1: has no "text" field (it is a list)'),
    ("a.jsonl", b'{"text": 5}', 'line 1: "text" is a int, not a string'),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "not UTF-8 (byte 0xff at offset 24)"),
    ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("a.json", b'[{"text": "x"}, {"t": 1}]', "entry 2: has no"),
    ("a.json", b"[1, 2", "is not JSON"),
    ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
    ("a.parquet", b"", "not a readable parquet file"),
])
def test_bad_files_are_refused_by_name_and_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in refusal(tmp_path / name)


def test_offsets_count_from_the_files_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 16)
    (tmp_path / "a.txt").write_bytes(b"0123456\n" * 10 + b"\xfe")
    assert "byte 0xfe at offset 80" in refusal(tmp_path / "a.txt")


def test_parquet_without_the_column_or_the_library(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pa.table({"content": ["one"]}), tmp_path / "a.parquet")
    assert """has no "text" column (it has 'content')""" in refusal(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    assert '"text" is a int' in refusal(tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "supremum[parquet]" in refusal(tmp_path / "a.parquet")


def test_what_is_not_there(tmp_path):
    assert "No text was given" in refusal()
    assert "no such file or folder" in refusal(tmp_path / "none.txt")
    assert "no such file or folder" in refusal("data/none.jsonl")
    assert "the folder holds no text files" in refusal(tmp_path)


def test_hub_datasets_are_streamed(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("owner/set") == texts("owner/set:test") == texts("owner/set:small-v1:test") == ["one", "two"]
    assert calls == [("owner/set", None, "train", True), ("owner/set", None, "test", True),
                     ("owner/set", "small-v1", "test", True)]


def test_hub_datasets_that_fail(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert "cannot be read from the hub (no route to host)" in refusal("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: [{"body": "x"}]))
    assert """owner/set: row 0: has no "text" field (it has 'body')""" in refusal("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "supremum[datasets]" in refusal("owner/set")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources.Path, "open", denied)
    assert "cannot be read (Permission denied)" in refusal(tmp_path / "a.txt")
