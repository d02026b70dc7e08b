"""Rows from files: every form read as it is meant, every broken one refused with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from supremum.errors import SupremumError
from supremum.train import rows as module
from supremum.train.rows import read

ROLES = ("text", "label")


def rows(folder: Path, name: str, data: bytes, columns: dict[str, Any] | None = None, roles: tuple[str, ...] = ROLES,
         kind: str = "auto") -> list[dict[str, Any]]:
    (folder / name).write_bytes(data)
    return read(folder, [name], roles, columns or {}, kind)


@pytest.mark.parametrize("name, data, columns", [
    ("a.tsv", b'good "film\t1\nbad\t0\n', {"text": 0, "label": 1}),
    ("a.tsv", b'label\ttext\r\n1\tgood "film\r\n0\tbad\r\n', {}),
    ("a.csv", b'\xef\xbb\xbflabel,text\r\n1,"good ""film"\r\n\r\n0,bad\r\n', {}),
    ("a.jsonl", b'{"t": "good \\"film", "y": 1}\n\n{"t": "bad", "y": 0, "z": null}', {"text": "t", "label": "y"}),
])
def test_the_same_rows_in_every_form(tmp_path: Path, name: str, data: bytes, columns: dict[str, Any]) -> None:
    found = rows(tmp_path, name, data, columns)
    assert [(row["text"], row["label"]) for row in found] == [('good "film', "1"), ("bad", "0")]
    assert found[-1]["where"].startswith(f"{tmp_path / name}, line ")


def test_a_quoted_field_may_hold_lines_and_the_line_number_is_where_it_begins(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.csv", b'text,label\n"one\ntwo",1\nthree,0\n')
    assert [row["text"] for row in found] == ["one\ntwo", "three"]
    assert [row["where"].rsplit(" ", 1)[1] for row in found] == ["2", "4"]


def test_sentences_end_at_lines_of_white_space(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.conll", b"Bad\tO\nSyston\tB-place\n\t\nNo\tO\n", roles=("words", "tags"))
    assert [(row["words"], row["tags"]) for row in found] == [(["Bad", "Syston"], ["O", "B-place"]), (["No"], ["O"])]


def test_parallel_files_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\n")
    found = read(tmp_path, ["a.en.gz,a.de"], ("source", "target"), {}, "auto")
    assert [(row["source"], row["target"]) for row in found] == [("one", "eins"), ("two", "zwei")]
    (tmp_path / "a.de").write_bytes(b"eins\n")
    with pytest.raises(SupremumError, match=r"has 2 lines, .* has 1"):
        read(tmp_path, ["a.en.gz,a.de"], ("source", "target"), {}, "auto")


def test_a_target_of_several_fields_gives_several_references(tmp_path: Path) -> None:
    data = b'{"d": "x", "s": "one"}\n{"d": "y", "s1": "two", "s2": "three"}\n'
    columns, roles = {"source": "d", "target": ["s", "s1", "s2"]}, ("source", "target")
    found = rows(tmp_path, "a.jsonl", data, columns, roles)
    assert [(row["target"], row["references"]) for row in found] == [("one", ["one"]), ("two", ["two", "three"])]
    with pytest.raises(SupremumError, match=r"line 1: there is no field \['t'\]"):
        rows(tmp_path, "a.jsonl", data, {"source": "d", "target": ["t"]}, roles)


def test_each_answer_of_a_dialogue_is_a_row(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "What flows?"), ("assistant", "The river."), ("user", "Where?"),
            ("assistant", "To the sea.")]
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"source": "x", "target": "y"}))
    one, two, plain = read(tmp_path, ["a.jsonl"], ("source", "target"), {})
    assert (one["source"], one["target"], one["turns"]) == ("What flows?", "The river.", messages[:2])
    assert (two["source"], two["target"], two["turns"]) == ("Where?", "To the sea.", messages[:4])
    assert one["where"] == two["where"] != plain["where"] and "turns" not in plain


@pytest.mark.parametrize(("messages", "told"), [
    ("hello", "no list of turns"), ([{"role": "robot", "content": "x"}], "turn 1 has the role 'robot'"),
    ([{"role": "user", "content": "x"}], "no turn of the assistant"),
    ([{"role": "user", "content": " "}], r"the content \(column messages, turn 1\) is missing")])
def test_broken_dialogues_are_refused_by_line(tmp_path: Path, messages: Any, told: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(SupremumError, match=rf"line 1: .*{told}"):
        read(tmp_path, ["a.jsonl"], ("source", "target"), {})


def test_dialogues_with_an_empty_turn_are_left_out_where_the_recipe_says_so(tmp_path: Path) -> None:
    good, bad = ([{"role": "user", "content": said}, {"role": "assistant", "content": "y"}] for said in ("x", " "))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in (good, bad)))
    columns = {"source": ["first", "second"]}  # of which no line has one
    assert [row["source"] for row in read(tmp_path, ["a.jsonl"], ("source", "target"), columns, drop=True)] == ["x"]


def test_questions_and_a_slice_of_them(tmp_path: Path) -> None:
    paragraph = {"context": "The tower is in Paris.", "qas": [
        {"question": "Where?", "answers": [{"text": "Paris", "answer_start": 16}]},
        {"question": "When?", "answers": []}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    roles = ("question", "context", "answers", "start")
    found = read(tmp_path, ["a.json"], roles, {}, "auto")
    assert [(row["answers"], row["start"]) for row in found] == [(["Paris"], 16), ([], -1)]
    assert [row["question"] for row in read(tmp_path, ["a.json[1:]"], roles, {}, "auto")] == ["When?"]


@pytest.mark.parametrize("name, data, columns, said", [
    ("a.csv", b"", {}, "is empty"),
    ("a.csv", b"text,label\n", {}, "holds no rows"),
    ("a.csv", b"text,label\nx,1\ny\0,0\n", {}, "line 3: a zero byte"),
    ("a.csv", b"text,label\nx,\n", {}, "line 2: the label .* missing"),
    ("a.csv", b"text,label\nx,1,2\n", {}, "line 2: 3 columns where 2"),
    ("a.csv", b'text,label\n"x,1\n', {}, "line 2: not CSV"),
    ("a.csv", b"text,mark\nx,1\n", {}, "no column 'label' .*text, mark"),
    ("a.csv", b"text,label\n" + b"x" * (10 << 20) + b",1\n", {}, "line 2: not CSV .*limit"),
    ("a.tsv", b"text\tlabel\n" + b"x" * (10 << 20) + b"\t1\n", {}, "line 2: the text has 10485760 characters"),
    ("a.tsv", b"x\t1\ny\n", {"text": 0, "label": 1}, "line 2: 1 columns where 2"),
    ("a.tsv", b"x\t1\n\xff\xff\t0\n", {"text": 0, "label": 1}, "line 2: not UTF-8"),
    ("a.tsv", "x\t1\n".encode("utf-16"), {"text": 0, "label": 1}, "UTF-16"),
    ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "\\ud800", "label": 0}\n', {}, "line 2: the text holds half"),
    ("a.jsonl", b'{"text": "x", "label": 1}\n{"text"', {}, "line 2: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n', {}, "line 1: there is no field 'label'"),
    ("a.xyz", b"x", {}, "no reader"),
])
def test_broken_files_are_refused_by_line(tmp_path: Path, name: str, data: bytes, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(SupremumError, match=f"{tmp_path / name}.*{said}"):
        rows(tmp_path, name, data, columns)


@pytest.mark.parametrize("name, data, count", [
    ("a.csv", b"text,label\nx,1\n,0\ny,0\nz,\n", 4),
    ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": " ", "label": 0}\n{"text": "y", "label": 0}\n'
                b'{"text": null, "label": 0}', 4),
])
def test_rows_with_an_empty_field_are_left_out_where_the_recipe_says_so(
        tmp_path: Path, name: str, data: bytes, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "note", said.append)
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path, [name], ("text", "label"), {}, "auto", drop=True)
    assert [(row["text"], row["label"]) for row in found] == [("x", "1"), ("y", "0")]
    assert len(said) == 1 and f"2 of {count} rows" in said[0]


def test_nothing_but_empty_fields_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n,1\n")
    with pytest.raises(SupremumError, match="no rows are left"):
        read(tmp_path, ["a.csv"], ("text", "label"), {}, "auto", drop=True)


@pytest.mark.parametrize("data, said", [(b"word\n", "line 1: 1 columns"),
                                        (b"a\tO\nb\tperson\n", "line 2: 'person' is not a BIO")])
def test_broken_tags_are_refused_by_line(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(SupremumError, match=said):
        rows(tmp_path, "a.conll", data, roles=("words", "tags"))
