"""Runs that are cut off and go on: the bytes and counts of an uninterrupted run, and no document worked on twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from supremum.errors import StateError, SupremumError
from supremum.text import clean_text, pack, packed, resuming
from supremum.text.resuming import PROGRESS, Work, hidden_folder, read_state, resumable
from supremum.text.steps import Cleaner, Rules

from ..conftest import tiny_tokenizer

COUNT = 300
KILLED = """
import os, signal
from supremum.cli import main
from supremum.text import parallel, resuming
resuming.EVERY, parallel.ITEMS, done = 0.05, 16, resuming.Work.done
def watched(self, counts):
    done(self, counts)
    if self.documents >= 150 and resuming.read_state(self.folder):
        os.kill(os.getpid(), signal.SIGKILL)
resuming.Work.done = watched
main()
"""


def text(seed: int, count: int = 40) -> str:
    chosen = random.Random(seed)
    return " ".join("".join(chosen.choice("abcdefghij") for _ in range(chosen.randrange(3, 9))) for _ in range(count))


@pytest.fixture
def source(tmp_path):
    """Documents, some of them copies, with addresses, leaks, halves of surrogate pairs, and records that cannot be read."""
    rows = [json.dumps({"text": text(n % 250) + f" me{n}@example.org" * (n % 9 == 0) + " \ud83d" * (n % 31 == 0)})
            for n in range(COUNT)]
    for n in range(5, COUNT, 40):
        rows[n] = '{"other": 1}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in (3, 50, 170, 249, 900)))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    return tmp_path / "a.jsonl"


def run(verb: str, source: Path, name: str, **options):
    """(bytes of each file of the output, the report without seconds)."""
    out, test = source.with_name(name), source.with_name("test.jsonl")
    if verb == "clean":
        found = clean_text(source, out, rules=Rules(quality=("repetition",)), against=[test], **options)
    else:
        found = pack(source, source.with_name("tok"), out, shard=700, **options)
    report = {key: value for key, value in vars(found).items() if key not in ("seconds", "out")}
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}, report


def cut(monkeypatch, at: int, call):
    """Run until `at` documents are done; the state is saved after every fortieth."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        def interrupted(self, counts, done=Work.done):
            patch.setattr(resuming, "EVERY", 0 if self.documents % 40 == 39 else 1e9)
            done(self, counts)
            if self.documents == at:
                raise KeyboardInterrupt

        patch.setattr(Work, "done", interrupted)
        call()
    return caught


def worked_on(monkeypatch) -> list[str]:
    """The documents that are worked on from now on, by this process."""
    seen: list[str] = []
    for kind in (Cleaner, packed.Encoder):
        def call(self, text, before=kind.__call__):
            seen.append(text)
            return before(self, text)
        monkeypatch.setattr(kind, "__call__", call)
    return seen


@pytest.mark.parametrize("verb", ["clean", "pack"])
def test_killed_and_gone_on_is_uninterrupted(source, monkeypatch, verb, capsys):
    whole, counted = run(verb, source, "whole.jsonl", workers=1)
    words = {"clean": ["--quality", "repetition", "--against", source.with_name("test.jsonl")],
             "pack": ["--tokenizer", source.with_name("tok"), "--shard", "700"]}[verb]
    program = subprocess.Popen([sys.executable, "-c", KILLED, "text", verb, source, *words, "--workers", "2", "--out",
                                source.with_name("cut.jsonl")], stderr=subprocess.PIPE, text=True)
    _, said = program.communicate(timeout=60)  # returns when the workers have ended, too: they hold the pipe
    assert program.returncode == -signal.SIGKILL, said
    folder = hidden_folder(source.with_name("cut.jsonl"))
    done = read_state(folder)["documents"]
    assert 0 < done < COUNT - 8 and not source.with_name("cut.jsonl").exists()
    seen = worked_on(monkeypatch)
    assert run(verb, source, "cut.jsonl", workers=1) == (whole, counted)
    assert len(seen) == COUNT - 8 - done
    assert f"goes on after {done} documents" in capsys.readouterr().err
    assert {path.name for path in source.parent.iterdir()} == {"a.jsonl", "cut.jsonl", "test.jsonl", "tok", "whole.jsonl"}


@pytest.mark.parametrize("verb", ["clean", "pack"])
def test_cut_off_again_and_again(source, monkeypatch, verb):
    expected = run(verb, source, "whole.jsonl", workers=1)
    for at in (2, 41, 43, 120, 250):
        cut(monkeypatch, at, lambda: run(verb, source, "cut.jsonl", workers=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after the last document
        patch.setattr("supremum.text.cleaning._duplicates" if verb == "clean" else "supremum.text.packing.Shards.close", stop)
        run(verb, source, "cut.jsonl", workers=1)
    seen = worked_on(monkeypatch)
    assert run(verb, source, "cut.jsonl", workers=1) == expected and not seen


def test_a_run_that_was_cut_off_writes_no_more(source, monkeypatch):
    """What it had buffered would come after a later run has cut the files."""
    held = cut(monkeypatch, 101, lambda: run("clean", source, "cut.jsonl", workers=1))  # its traceback holds the files
    assert held and not [file for file in psutil.Process().open_files() if "cut.jsonl" in file.path]


def stop(*_):
    raise KeyboardInterrupt


def test_what_was_never_saved_leaves_nothing(source, monkeypatch):
    monkeypatch.setattr(Work, "done", stop)
    for verb in ("clean", "pack"):
        with pytest.raises(KeyboardInterrupt):
            run(verb, source, "cut.jsonl", workers=1)
    assert sorted(path.name for path in source.parent.iterdir()) == ["a.jsonl", "test.jsonl", "tok"]


CHANGES = {
    "sources": lambda source, state: source.write_text(source.read_text() + json.dumps({"text": "new"}) + "\n"),
    "no JSON": lambda _, state: state.write_text("{"),
    "a digit": lambda _, state: state.write_text(state.read_text().replace('"documents": 8', '"documents": 7')),
    "a file": lambda _, state: os.truncate(next(state.parent.rglob("starts*")), 3),
}


@pytest.mark.parametrize(("verb", "change"), [
    *(("clean", change) for change in CHANGES), ("pack", "sources"), ("pack", "a file")])
def test_another_run_and_a_damaged_state_begin_anew(source, monkeypatch, verb, change, capsys):
    cut(monkeypatch, 101, lambda: run(verb, source, "cut.jsonl", workers=1))
    folder = hidden_folder(source.with_name("cut.jsonl"))
    assert read_state(folder)["documents"] == 80
    CHANGES[change](source, folder / PROGRESS)
    made = run(verb, source, "cut.jsonl", workers=1)
    shown = capsys.readouterr().err
    assert ("differs in its sources" if change == "sources" else "is damaged") in shown
    assert "begins anew" in shown and "goes on" not in shown and not folder.exists()
    assert made == run(verb, source, "whole.jsonl", workers=1)


def test_settings_tell_runs_apart_and_fresh_begins_anew(source, monkeypatch, capsys):
    out = source.with_name("b.jsonl")
    for options, said in (({"exact": False}, "differs in its settings"), ({"fresh": True}, "")):
        cut(monkeypatch, 100, lambda: clean_text(source, out, workers=1))
        seen = worked_on(monkeypatch)
        clean_text(source, out, workers=1, **options)
        shown = capsys.readouterr().err
        assert len(seen) == COUNT - 8 and said in shown and "goes on" not in shown
        out.unlink()
    tokenizer = tiny_tokenizer()
    cut(monkeypatch, 100, lambda: pack(source, tokenizer, source.with_name("p"), workers=1))
    tokenizer.add_tokens(["abc"])
    pack(source, tokenizer, source.with_name("p"), workers=1)
    assert "differs in its tokenizer" in capsys.readouterr().err


def test_sources_that_changed_unseen_are_refused(source, monkeypatch):
    times = os.stat(source)
    cut(monkeypatch, 100, lambda: run("clean", source, "b.jsonl", workers=1))
    source.write_text(source.read_text().replace("me9@", "me8@"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(StateError, match="no longer give the documents"):
            run("clean", source, "b.jsonl", workers=1)
    assert run("clean", source, "b.jsonl", workers=1, fresh=True) == run("clean", source, "c.jsonl", workers=1)


@pytest.mark.parametrize("verb", ["clean", "pack"])
def test_what_stands_there_is_replaced_by_the_run_that_may(source, monkeypatch, verb):
    out = source.with_name("b.jsonl")
    old = run(verb, source, "b.jsonl", workers=1)
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    cut(monkeypatch, 100, lambda: run(verb, source, "b.jsonl", workers=1, fresh=True))
    mine = out.read_bytes() if verb == "clean" else (out / "starts.bin").read_bytes()
    assert mine in old[0].values()
    with pytest.raises(SupremumError, match="exists"):  # another run
        run(verb, source, "b.jsonl", workers=1, strict=True)
    new = run(verb, source, "b.jsonl", workers=1)
    assert new != old and new == run(verb, source, "c.jsonl", workers=1)
    cut(monkeypatch, 100, lambda: run(verb, source, "d.jsonl", workers=1))
    source.with_name("d.jsonl").write_text("mine")  # came meanwhile
    with pytest.raises(SupremumError, match="exists"):
        run(verb, source, "d.jsonl", workers=1)
    assert source.with_name("d.jsonl").read_text() == "mine"


def test_one_run_at_a_time_and_a_folder_of_another_kind(source):
    out = source.with_name("b.jsonl")
    with resumable(out, {"verb": "text clean"}, False):
        for fresh in (False, True):
            with pytest.raises(StateError, match="another run is using this output"):
                run("clean", source, "b.jsonl", fresh=fresh)
    assert not hidden_folder(out).exists()
    hidden_folder(out).mkdir()
    (hidden_folder(out) / "diary").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(StateError, match="no state of a run"):
            run("clean", source, "b.jsonl", fresh=fresh)
    assert (hidden_folder(out) / "diary").read_text() == "mine"
