"""Each change does what its definition says, at the rate that was asked for, and the seed decides it."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch

from supremum.errors import SupremumError
from supremum.text import augment_text
from supremum.text.augmentation import Changes, Neighbours, apart, changed, mixed
from supremum.text.words import words

from ..conftest import tiny_tokenizer

TEXT = " ".join(f"w{n}" for n in range(2000)) + "."


def apply(changes: Changes, text: str = TEXT, **options) -> tuple[str, Counter]:
    counts: Counter = Counter()
    return changed(text, changes, np.random.default_rng(0), counts, **options), counts


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("text", ["", "...", "one", " a, b\n\nc. ", "你好 world!"])
def test_words_and_gaps_are_the_text(text):
    found, gaps = apart(text)
    assert "".join(part for pair in zip(gaps, [*found, ""], strict=True) for part in pair) == text
    assert found == words(text)
    assert apply(Changes(), text)[0] == text


@pytest.mark.parametrize("name", ["mask", "delete", "synonyms"])
def test_rates_are_those_asked_for(name):
    text, counts = apply(Changes(**{name: 0.2}), neighbours=lambda word: [word.upper()])
    assert abs(counts[name] - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5  # four standard deviations
    kept = [word for word in words(text) if word.startswith("w")]
    original = words(TEXT)
    if name == "mask":
        assert text.count("<mask>") == counts["mask"] and len(kept) == 2000 - counts["mask"]
    if name == "delete":
        assert len(words(text)) == 2000 - counts["delete"] and "  " not in text
    if name == "synonyms":
        assert [word.lower() for word in words(text)] == original
    assert [word for word in original if word in set(kept)] == kept  # the others stay, in order


def test_swaps_keep_the_words_and_the_gaps():
    text, counts = apply(Changes(swap=0.1))
    assert sorted(words(text)) == sorted(words(TEXT)) and apart(text)[1] == apart(TEXT)[1]
    assert abs(counts["swap"] - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    one = apply(Changes(swap=1.0), "a b")[0]
    assert one in ("a b", "b a")


def test_deletion_leaves_a_word():
    assert len(words(apply(Changes(delete=1.0), "one two three.")[0])) == 1


def test_mixing():
    assert mixed("a b c d.", "e f g h.", 0.5) == "a b g h."
    assert mixed("a b", "e f", 0.0) == "e f" and mixed("a b", "e f", 1.0) == "a b"
    assert mixed("你好吗", "很好啊", 1 / 3) == "你好啊"


def test_a_run_is_seeded_and_off_by_default(tmp_path):
    source = write(tmp_path / "a.jsonl", [" ".join(random.Random(n).choices("abcdefgh", k=30)) for n in range(40)])
    everything = Changes(mask=0.1, delete=0.1, swap=0.1, mix=0.5)
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        done = augment_text(source, tmp_path / f"{name}.jsonl", everything, copies=2, seed=seed)
        assert (done.read, done.written + done.same) == (40, 120)
    one, two, three = ((tmp_path / f"{name}.jsonl").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three
    found = rows(tmp_path / "one.jsonl")
    assert [row["text"] for row in found if "copy" not in row] == [row["text"] for row in rows(source)]
    assert any("mixed" in row for row in found)
    assert all(row["source"].endswith(f"line {1 + n // 3}") for n, row in enumerate(found))
    with pytest.raises(SupremumError, match="No change"):
        augment_text(source, tmp_path / "none.jsonl", Changes())
    with pytest.raises(SupremumError, match="no probability"):
        augment_text(source, tmp_path / "none.jsonl", Changes(swap=1.5))
    with pytest.raises(SupremumError, match="embedding"):
        augment_text(source, tmp_path / "none.jsonl", Changes(synonyms=0.1))
    assert not (tmp_path / "none.jsonl").exists()


def test_back_translation_is_the_callers(tmp_path):
    source = write(tmp_path / "a.jsonl", [f"text {n}" for n in range(70)])
    sizes = []

    def back(texts):
        sizes.append(len(texts))
        return [text[::-1] for text in texts]

    augment_text(source, tmp_path / "out.jsonl", Changes(), back_translate=back, originals=False)
    assert [row["text"] for row in rows(tmp_path / "out.jsonl")] == [f"text {n}"[::-1] for n in range(70)]
    assert sum(sizes) == 70 and max(sizes) <= 32
    with pytest.raises(SupremumError, match="gave 1 texts for"):
        augment_text(source, tmp_path / "bad.jsonl", Changes(), back_translate=lambda texts: texts[:1])
    assert not (tmp_path / "bad.jsonl").exists() and len(list(tmp_path.iterdir())) == 2


def test_neighbours_are_those_of_the_embedding():
    tokenizer = tiny_tokenizer()
    embedding = torch.randn(len(tokenizer), 512, generator=torch.Generator().manual_seed(0))
    ids = {word: tokenizer(" " + word, add_special_tokens=False).input_ids for word in ("river", "stone", "teacher", "the")}
    assert all(len(tokens) == 1 for tokens in ids.values())
    embedding[ids["stone"][0]] = 2 * embedding[ids["river"][0]] + 0.1 * embedding[ids["teacher"][0]]
    near = Neighbours(tokenizer, embedding)
    assert near("river") == ["stone"] and near("unheard") == [] and near("the") == []
    assert near("stone")[0] == "river"
    text, counts = apply(Changes(synonyms=1.0), "The river, the stone!", neighbours=near)
    assert text == "The stone, the river!" and counts["synonyms"] == 2
