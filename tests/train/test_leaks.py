"""Held-out text that stands in the training text is told, from text and from shards, with the figures of a brute force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supremum.text.packing import pack
from supremum.train import leaks, pretrain
from supremum.train.corpus import TokenizerRecipe, make_tokenizer
from supremum.train.pretrain import Recipe, train
from supremum.train.recipe import load

LENGTH, HELD = 128, 0.2


def texts(copied: bool) -> list[str]:
    """40 documents of random words; with `copied` two of the last, which are held out, repeat earlier ones."""
    rng = np.random.default_rng(0)
    made = [" ".join("".join(rng.choice(list("abcdefgh"), rng.integers(3, 9))) for _ in range(60)) for _ in range(40)]
    if copied:
        made[36] = made[36][:50] + " " + made[3].upper()
        made[38] = made[7].replace(" ", ", ", 20)
    return made


def recipe(folder: Path, copied: bool, **changes: Any) -> Path:
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(copied)))
    wanted = {"text": ["t.jsonl"], "tokenizer": "characters", "held_out": HELD, "length": LENGTH, "batch": 2, "steps": 1,
              "model": {"family": "gpt2", "layers": 1, "width": 16, "heads": 2, "context": LENGTH}} | changes
    path = folder / "r.yaml"
    path.write_text(json.dumps(wanted))
    return path


def brute(copied: bool, run: int = 13) -> dict[str, Any]:
    """The figures from the text itself: with one token a character, windows are slices of it. A slice's first and last
    words may be cut, so they are left out, but where a document begins or ends there."""
    stream = "".join(text + "\n" for text in texts(copied))

    def inside(begin: int, end: int) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", stream[begin:end].lower())
        words = words[begin > 0 and "\n" not in stream[begin - 1:begin + 1]:]
        words = words[:len(words) - (end < len(stream) and "\n" not in stream[end - 1:end + 1])]
        return [tuple(words[at:at + run]) for at in range(len(words) - run + 1)]

    windows = len(stream) // LENGTH
    cut = windows - round(HELD * windows)
    known = set(inside(0, cut * LENGTH))
    found = [[one in known for one in inside(at * LENGTH, (at + 1) * LENGTH)] for at in range(cut, windows)]
    assert all(found)  # every window has a run
    return {"windows": len(found), "leaked": sum(map(any, found)), "whole": sum(map(all, found)),
            "share": pytest.approx(sum(map(sum, found)) / sum(map(len, found)))}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training text is read in some dozens of pieces."""
    monkeypatch.setattr(leaks, "PIECE", 500)
    monkeypatch.setattr(leaks, "OVERLAP", 200)


@pytest.mark.parametrize("packed", [False, True])
def test_held_out_text_in_the_training_text_is_told(packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, True)
    if packed:
        made = make_tokenizer(TokenizerRecipe("characters"), [tmp_path / "t.jsonl"], "causal", LENGTH)
        made.save_pretrained(tmp_path / "tokens")
        pack([tmp_path / "t.jsonl"], str(tmp_path / "tokens"), tmp_path / "packed", shard=3000, workers=1)
        path = recipe(tmp_path, True, packed="packed", text=[], tokenizer="bpe")
    found = train(path, tmp_path, tmp_path / "m")["leaks"]
    assert found == found | brute(True) and found["leaked"] > found["whole"] > 0 == found["short"]
    assert found["worst"][0]["share"] == 1.0 and found["worst"][0]["place"].startswith("held-out window")
    told = f"{found['leaked']} of {found['windows']} held-out windows share a run of 13 words with the training text"
    assert told in " ".join(capsys.readouterr().err.split())
    table = pretrain.render(json.loads((tmp_path / "m" / "train.json").read_text()))
    assert any(told in str(cell) for cell in table.columns[1].cells)


def test_text_without_overlap_is_not_called_leaked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = train(recipe(tmp_path, False), tmp_path, tmp_path / "m")
    found = document["leaks"]
    assert any(f"none of {found['windows']} windows" in str(cell) for cell in pretrain.render(document).columns[1].cells)
    assert found == found | brute(False) and found["leaked"] == 0 == found["share"] and found["worst"] == []
    assert "share a run" not in capsys.readouterr().err


def test_windows_of_few_words_are_counted_and_not_looked_for(tmp_path: Path) -> None:
    document = train(recipe(tmp_path, True, length=16), tmp_path, tmp_path / "m")
    assert document["leaks"]["windows"] == 0 < document["leaks"]["short"]
    assert any("too short to look for" in str(cell) for cell in pretrain.render(document).columns[1].cells)


@pytest.mark.parametrize("changes", [{"leaks": False}, {"held_out": 0}])
def test_nothing_is_looked_for_where_none_is_wanted_or_held_out(changes: dict[str, Any], tmp_path: Path) -> None:
    assert train(recipe(tmp_path, True, **changes), tmp_path, tmp_path / "m")["leaks"] is None


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, True)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "fit", killed)
        train(path, tmp_path, tmp_path / "m")
    monkeypatch.setattr(pretrain, "held_out_leaks", killed)
    found = train(path, tmp_path, tmp_path / "m")["leaks"]
    assert found == found | brute(True)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_other_tokenizers_find_a_copy(family: str, tmp_path: Path) -> None:
    """Encoders frame their windows, WordPiece puts words together again: of a text that stands there twice all is found."""
    path = recipe(tmp_path, False, tokenizer={"name": "wordpiece" if family == "bert" else "bpe", "vocabulary": 300},
                  held_out=0.5, model={"family": family, "layers": 1, "width": 16, "heads": 2, "context": LENGTH})
    (tmp_path / "t.jsonl").write_text("\n".join(2 * (tmp_path / "t.jsonl").read_text().split("\n")))
    found = train(path, tmp_path, tmp_path / "m")["leaks"]
    assert found["windows"] > 10 and found["share"] > 0.95 and load(path, Recipe).leaks
