"""The text verbs as programs: help, exit codes, JSON, one-line errors, what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supremum.cli import app

VERBS = ["clean", "tokenizer", "pack", "augment"]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def invoke(*words: object):
    return CliRunner().invoke(app, ["text", *map(str, words)])


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_they_parse(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no example's source is: nothing is run
    shown = ANSI.sub("", CliRunner().invoke(app, ["text", verb, "--help"], terminal_width=200).stdout)
    examples = re.findall(r"^ +supremum text (\S+.*?) *$", shown, re.MULTILINE)
    assert examples and "Examples" in shown
    for example in examples:
        words = shlex.split(example)
        assert words[0] == verb
        assert invoke(*words).exit_code == 1, f"wrong usage in the example: {example}"


@pytest.mark.parametrize("words", [
    ["clean", "a.txt"], ["clean", "a.txt", "--out", "b.jsonl", "--language", "klingon"],
    ["clean", "a.txt", "--out", "b.jsonl", "--pii", "names"], ["clean", "a.txt", "--out", "b.jsonl", "--near", "2"],
    ["clean", "a.txt", "--out", "b.jsonl", "--drop-leaks"], ["clean", "--out", "b.jsonl"], ["polish", "a.txt"],
    ["augment", "a.txt", "--out", "b.jsonl"], ["augment", "a.txt", "--out", "b.jsonl", "--swap", "2"],
    ["augment", "a.txt", "--out", "b.jsonl", "--synonyms", "0.1"],
    ["tokenizer", "a.txt"], ["tokenizer", "a.txt", "--out", "t", "--measure", "demo"], ["pack", "a.txt", "--out", "p"],
    ["tokenizer", "a.txt", "--out", "t", "--kind", "magic"], ["tokenizer", "a.txt", "--out", "t", "--most", "lots"],
])
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2 and result.stdout == "" and len(result.stderr) > 40


def test_clean_reports_in_json_in_a_file_and_in_a_table(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    review = '"Write to me@example.org [bold]now[/bold]"'
    source.write_text(f"id,review\n1,{review}\n2,{review}\n3\n")
    result = invoke("clean", source, "--field", "review", "--out", tmp_path / "b.jsonl", "--workers", 1, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "b.report.json").read_text())
    assert (document["read"], document["kept"], document["steps"]["read"]["dropped"]) == (2, 1, 1)
    assert document["steps"]["exact duplicates"]["dropped"] == 1
    result = invoke("clean", source, "--field", "review", "--out", tmp_path / "b.jsonl", "--workers", 1, "--fresh")
    assert result.exit_code == 0 and "2 documents read, 1 kept" in result.stdout and "[bold]" in result.stdout


def test_cleaning_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n")
    code = ("import sys; from typer.testing import CliRunner; from supremum.cli import app; "
            "found = CliRunner().invoke(app, sys.argv[1:]); sys.exit(found.exit_code or 'torch' in sys.modules)")
    words = ["text", "clean", str(tmp_path / "a.txt"), "--out", str(tmp_path / "b.jsonl"), "--workers", "2"]
    assert subprocess.run([sys.executable, "-c", code, *words]).returncode == 0


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    result = invoke("clean", tmp_path / "a.txt", "--out", tmp_path / "b.jsonl", "--json")
    assert result.exit_code == 1
    assert "the file is empty" in json.loads(result.stdout)["error"]["cause"]
    assert result.stderr.strip().splitlines()[-1].startswith("supremum: error: ")


def test_ctrl_c_leaves_nothing_but_what_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} " + "some words to clean " * 500}) + "\n" for n in range(3000)))
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # whoever began the tests may ignore it
    program = subprocess.Popen(
        [sys.executable, "-c", f"{heard}; from supremum.cli import main; from supremum.text import resuming; "
                               "resuming.EVERY = 0.1; main()", "text", "clean", str(source),
         "--workers", "2", "--quality", "repetition", "--out", str(tmp_path / "b.jsonl")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ), start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".b.jsonl.work" / "progress.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to every process
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130, said
    assert "the same command (without --fresh) resumes" in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.jsonl.work", "a.jsonl"]
