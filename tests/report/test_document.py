"""supremum.json: a document survives the disk, and one that is not ours is refused by the path of its first fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_sample import build

from supremum.errors import StateError
from supremum.plain import plain
from supremum.report import SCHEMA, encode, read_document, validate


def test_round_trip_through_the_disk(tmp_path: Path) -> None:
    (tmp_path / "supremum.json").write_bytes(encode(build()))
    assert read_document(tmp_path) == build()
    assert read_document(tmp_path / "supremum.json") == build()


def test_the_same_document_gives_the_same_bytes() -> None:
    assert encode(build()) == encode(build())


def test_unknown_fields_are_kept_and_numbers_that_are_not_finite_become_null() -> None:
    document = {**build(), "extra": {"a": (1, float("nan"))}}
    assert json.loads(encode(document))["extra"] == {"a": [1, None]}


@pytest.mark.parametrize("schema", ["supremum/2", "supremum/0", "", None, 1])
def test_another_schema_version_is_refused(schema: Any) -> None:
    with pytest.raises(StateError, match=SCHEMA):
        validate({**build(), "schema": schema})


def _without(document: dict[str, Any], *path: Any) -> dict[str, Any]:
    place = document
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return document


def _with(document: dict[str, Any], value: Any, *path: Any) -> dict[str, Any]:
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


@pytest.mark.parametrize(("document", "message"), [
    (_without(build(), "result", "bytes"), r"result\.bytes is missing"),
    (_without(build(), "plan", 3, "codec"), r"plan\[3\]\.codec is missing"),
    (_with(build(), "big", "result", "bytes"), r"result\.bytes is 'big', not of type int"),
    (_with(build(), True, "result", "bytes"), r"result\.bytes is 'True', not of type int"),
    (_with(build(), float("nan"), "result", "bits_per_weight"), r"result\.bits_per_weight"),
    (_with(build(), "guess", "frontier", 0, "kind"), r"frontier\[0\]\.kind is 'guess', not one of"),
    (_with(build(), [1, "x"], "plan", 0, "shape"), r"plan\[0\]\.shape\[1\]"),
    (_with(build(), {}, "phases"), "phases is not a list"),
    (_with(build(), [], "proof"), "proof is not an object"),
    (_with(build(), {"torch": 2}, "versions"), r"versions\.torch"),
    ([], "no schema"), ("text", "no schema"), ({}, "no schema"),
])
def test_the_first_fault_is_named(document: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        validate(document)


def test_null_is_allowed_only_where_a_value_may_be_unknown() -> None:
    validate(_with(build(), None, "result", "gap_bits"))
    with pytest.raises(StateError, match="tokens"):
        validate(_with(build(), None, "result", "measured", "tokens"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_folder_without_a_readable_document_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "supremum.json").write_bytes(content)
    with pytest.raises(StateError, match=r"supremum\.json"):
        read_document(tmp_path)


def test_plain_handles_what_engines_return() -> None:
    assert plain({"p": Path("a"), 1: (float("inf"), 2.5, None)}) == {"p": "a", "1": [None, 2.5, None]}
