"""Whole runs of `clean_text`: what stays, what is counted, bad input, interruption, the same bytes from any workers."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random

import numpy as np
import pytest

from supremum.errors import SupremumError
from supremum.text import Reading, clean_text, cleaning
from supremum.text.duplicates import banding, chance, jaccard, shingles, signature
from supremum.text.parallel import ordered_map
from supremum.text.steps import Rules


def sentence(seed: int, count: int = 60) -> str:
    chosen = random.Random(seed)
    return " ".join("".join(chosen.choice("abcdefghij") for _ in range(chosen.randrange(3, 9))) for _ in range(count))


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def kept(path) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["text"] for line in data.splitlines()]


def test_every_step_counts_and_shows_what_it_removed(tmp_path):
    near = sentence(1).split()
    near[30] = "changed"
    texts = [sentence(1), "<html><body><p>" + sentence(2) + "</p><script>x()</script></body></html>", sentence(3) + "\u200b",
             "Write to a@example.org. " + sentence(4), sentence(1).upper() + "  ", " ".join(near), "\u200b\x07", sentence(5)]
    found = clean_text(write(tmp_path / "a.jsonl", texts), tmp_path / "out.jsonl", workers=1)
    assert kept(tmp_path / "out.jsonl") == [sentence(1), sentence(2), sentence(3), "Write to <EMAIL>. " + sentence(4),
                                            sentence(5)]
    assert (found.read, found.kept) == (8, 5)
    assert sum(step.dropped for step in found.steps.values()) == 3
    assert {name: step.counts for name, step in found.steps.items() if step.counts} == {
        "html": {"pages": 1, "characters": len(texts[1]) - len(sentence(2))},
        "characters": {"zero width": 2, "control": 1, "nothing left": 1}, "pii": {"email": 1},
        "exact duplicates": {"documents": 1},
        "near duplicates": {"similarity 0.80 or more": 1}}
    assert "line 6" in found.steps["near duplicates"].samples[0]["place"]
    assert "a@example" not in json.dumps(found.steps["pii"].samples)
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    assert row["source"].endswith("a.jsonl: line 2")


def test_workers_and_formats_give_the_same(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [sentence(i % 40, 10 + i % 7) for i in range(300)])
    rules = Rules(languages=(), quality=("repetition",))
    monkeypatch.setattr("supremum.text.parallel.ITEMS", 16)
    one = clean_text(source, tmp_path / "one.jsonl", rules=rules, workers=1)
    two = clean_text(source, tmp_path / "two.jsonl.gz", rules=rules, workers=2)
    assert (tmp_path / "one.jsonl").read_bytes() == gzip.decompress((tmp_path / "two.jsonl.gz").read_bytes())
    assert one.steps == two.steps and one.kept == len(kept(tmp_path / "one.jsonl")) == 40
    clean_text(source, tmp_path / "three.txt", rules=rules, workers=1)
    assert (tmp_path / "three.txt").read_text().split("\n\n")[:-1] == kept(tmp_path / "one.jsonl")


def test_filters(tmp_path):
    english = "The people of the village had to carry their goods over the old bridge that they have with them. " * 3
    source = write(tmp_path / "a.jsonl", [
        english, "Der Hund, der gestern nicht kommen wollte, ist heute mit dem Zug gefahren."])
    found = clean_text(source, tmp_path / "out.jsonl", rules=Rules(languages=("en",)), workers=1)
    assert kept(tmp_path / "out.jsonl") == [english.strip()] or kept(tmp_path / "out.jsonl") == [english]
    assert found.steps["language"].counts == {"de": 1} and found.languages == {"en": 1}
    with pytest.raises(SupremumError, match="none is left; most fell to `quality`"):
        clean_text(source, tmp_path / "none.jsonl", rules=Rules(quality=("gopher", "repetition")), workers=1)
    assert not (tmp_path / "none.jsonl").exists()


def test_leaks_are_found_said_and_dropped(tmp_path):
    question = sentence(77, 20)
    long = sentence(78, 100)
    train = write(tmp_path / "train.jsonl", [sentence(1), f"{sentence(2)} {question.upper()}! {sentence(3)}",
                                             sentence(4) + " " + " ".join(long.split()[:40]), sentence(5)])
    test = write(tmp_path / "test.jsonl", [question, sentence(90), long, "two words"])
    found = clean_text(train, tmp_path / "a.jsonl", against=[test], workers=1)
    assert (found.read, found.kept) == (4, 4)
    leaks = found.leaks
    assert (leaks.evaluation, leaks.short, leaks.leaked, leaks.whole, leaks.carriers) == (4, 1, 2, 1, 2)
    assert [one["place"].rsplit("/")[-1] for one in leaks.documents] == ["test.jsonl: line 1", "test.jsonl: line 3"]
    assert [one["share"] for one in leaks.documents] == [1.0, pytest.approx((40 - 12) / (100 - 12))]
    assert leaks.share == pytest.approx((8 + 28) / (8 + 48 + 88))
    assert [place.rsplit("/")[-1] for place in found.leak_places] == ["train.jsonl: line 2", "train.jsonl: line 3"]
    found = clean_text(train, tmp_path / "b.jsonl", against=[test], rules=Rules(drop_leaks=True), workers=2)
    assert kept(tmp_path / "b.jsonl") == [sentence(1), sentence(5)] and found.steps["leaks"].dropped == 2
    with pytest.raises(SupremumError, match="no document of 5 words"):
        clean_text(train, tmp_path / "c.jsonl", against=[write(tmp_path / "short.jsonl", ["two words"])], workers=1)


def test_signatures_estimate_jaccard():
    words = sentence(0, 400).split()
    for changed in (2, 10, 40, 100):
        other = words[:]
        for place in np.linspace(0, 399, changed, dtype=int):
            other[place] = "zzz"
        one, two = shingles(" ".join(words)), shingles(" ".join(other))
        exact = {tuple(words[i:i + 5]) for i in range(396)}, {tuple(other[i:i + 5]) for i in range(396)}
        true = len(exact[0] & exact[1]) / len(exact[0] | exact[1])
        assert jaccard(one, two) == pytest.approx(true)
        estimate = np.mean(signature(one) == signature(two))
        assert abs(estimate - true) <= 4 * np.sqrt(true * (1 - true) / 128)


def test_banding_finds_what_it_promises():
    bands, rows = banding(0.8)
    assert (bands, rows) == (21, 6)
    assert chance(0.8, bands, rows) == pytest.approx(1 - (1 - 0.8 ** 6) ** 21)
    assert chance(0.8, *banding(0.8)) >= 0.995 > chance(0.8, 128 // 7, 7)


def test_near_duplicates_are_those_of_brute_force(tmp_path):
    chosen = random.Random(3)
    texts = []
    for group in range(25):
        words = sentence(1000 + group, 80).split()
        for _ in range(chosen.randrange(1, 4)):
            for _ in range(chosen.randrange(0, 3)):
                words[chosen.randrange(80)] = f"new{chosen.randrange(10 ** 6)}"
            texts.append(" ".join(words))
    chosen.shuffle(texts)
    sets = [shingles(text) for text in texts]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(sets[i], sets[j]) >= 0.8:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    expected = [text for i, text in enumerate(texts) if group[i] == i]
    clean_text(write(tmp_path / "a.jsonl", texts), tmp_path / "out.jsonl", workers=1)
    assert kept(tmp_path / "out.jsonl") == expected
    assert len(expected) < len(texts) - 5


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(SupremumError, match="A worker process ended"):
        list(ordered_map(os._exit, [3], workers=2, size=lambda _: 1))


def test_texts_without_words_are_not_alike(tmp_path):
    clean_text(write(tmp_path / "a.jsonl", ["!!!", "???", "!!!"]), tmp_path / "out.jsonl", workers=1)
    assert kept(tmp_path / "out.jsonl") == ["!!!", "???"]


def test_bad_records_are_counted_and_the_rest_is_kept(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b'{"text": "one \\ud83d lone half"}\n'
                                     b'{"text": 5}\n{"other": "x"}\nnot json\n{"text": "two"}\n')
    (folder / "b.txt").write_bytes(bytes(range(256)) * 400)
    (folder / "c.txt").write_bytes(b"")
    (folder / "d.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"three\r\nfour, ""five"""\r\n2\r\n3,s\0ix\r\n4,'
                                   + b"\xff" + b"seven\r\n")
    (folder / "e.csv").write_bytes(b"id,body\n1,eight\n")
    (folder / "f.txt").write_bytes(b"x" * 3 + b" caf\xe9 " + b"y" * 200)  # one bad byte in a text is repaired
    found = clean_text(folder, tmp_path / "out.jsonl", near=None, workers=1)
    assert kept(tmp_path / "out.jsonl") == ["one  lone half", "two", 'three\nfour, "five"', "six", "seven",
                                            "xxx caf " + "y" * 200]
    assert found.steps["read"].dropped == 7
    messages = " ".join(sample["before"] for step in found.steps.values() for sample in step.samples)
    assert "line 2" in messages and "surrogate" in found.steps["characters"].counts
    report = json.dumps(found.steps["read"].samples)
    assert "a.jsonl: line 2" in report and "is a int" in report
    with pytest.raises(SupremumError, match=r'a.jsonl: line 1: holds half of a surrogate pair \(U\+D83D\)'):
        clean_text(folder, tmp_path / "strict.jsonl", strict=True, workers=1)


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", b"", "the file is empty"), ("a.txt", bytes(range(256)) * 10, "not a text file"),
    ("a.csv", b"id,body\n1,x\n", "has no \"text\" column (it has 'id', 'body')"),
    ("a.jsonl", b'{"body": "x"}\n', "line 1: has no \"text\" field (it has 'body')"),
    ("a.jsonl", b"\x00\xff\xfe" * 100, "not a text file"), ("a.parquet", b"junk", "not a readable parquet file"),
    ("a.txt.gz", b"\x1f\x8bjunk", "cannot be read"),
])
def test_a_source_that_gives_nothing_is_an_error_with_its_cause(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SupremumError) as caught:
        clean_text(tmp_path / name, tmp_path / "out.jsonl", workers=1)
    assert message in str(caught.value) and name in str(caught.value) and caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_line_of_ten_megabytes(tmp_path):
    line = " ".join(f"word{number}" for number in range(1_000_000))
    assert len(line) > 10_000_000
    (tmp_path / "a.txt").write_text(line)
    found = clean_text(tmp_path / "a.txt", tmp_path / "out.jsonl", rules=Rules(pii=()), near=None, workers=1)
    assert "".join(kept(tmp_path / "out.jsonl")) == line and found.kept <= 3


def test_tables_and_units(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([["id", "review"], [1, "first; one"], [2, "second"]])
    (tmp_path / "b.tsv").write_text('label\treview\n1\ta "quoted word\n')
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("p one\nline two\n\n \np two\n")
    clean_text([tmp_path / "a.csv", tmp_path / "b.tsv"], tmp_path / "out.jsonl", near=None, workers=1,
               reading=Reading("review"))
    assert kept(tmp_path / "out.jsonl") == ["first; one", "second", 'a "quoted word']
    clean_text(tmp_path / "c.txt.gz", tmp_path / "p.jsonl", near=None, workers=1, reading=Reading(unit="paragraph"))
    assert kept(tmp_path / "p.jsonl") == ["p one\nline two", "p two"]
    clean_text(tmp_path / "c.txt.gz", tmp_path / "l.jsonl", near=None, workers=1, reading=Reading(unit="line"))
    assert kept(tmp_path / "l.jsonl") == ["p one", "line two", "p two"]


def test_outputs_are_refused_before_work(tmp_path):
    source = write(tmp_path / "a.jsonl", [sentence(1)])
    for out, message in ((source, "one of the files that are read"),
                         (tmp_path / "x.docx", "no writer"), (tmp_path, "no writer")):
        with pytest.raises(SupremumError, match=message):
            clean_text(source, out)
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(SupremumError, match="exists"):
        clean_text(source, tmp_path / "out.jsonl")
    clean_text(source, tmp_path / "out.jsonl", fresh=True, workers=1)
    assert kept(tmp_path / "out.jsonl") == [sentence(1)]


@pytest.mark.parametrize("moment", ["_steps", "_duplicates", "_write"])
def test_an_interrupted_run_leaves_nothing_half_written(tmp_path, monkeypatch, moment):
    def interrupt(*args):
        args[-1] if moment != "_write" else args[2].write_text("half")
        raise KeyboardInterrupt

    source = write(tmp_path / "a.jsonl", [sentence(1)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cleaning, moment, interrupt)
        clean_text(source, tmp_path / "out.jsonl", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*[".out.jsonl.work"] * (moment != "_steps"), "a.jsonl"]
    clean_text(source, tmp_path / "out.jsonl", workers=1)
    assert kept(tmp_path / "out.jsonl") == [sentence(1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]
