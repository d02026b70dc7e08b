"""Task scores against counts done by hand and the libraries' other entry points."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from supremum.errors import SupremumError
from supremum.measure import metrics
from supremum.measure.metrics import (
    answers,
    bleu_of,
    bleu_parts,
    calibration_error,
    chrf_of,
    chrf_parts,
    classification,
    clustering,
    confused,
    confusion_scores,
    entities,
    entity_parts,
    entity_scores,
    f1_of_each,
    spans,
    summaries,
    translation,
)

TRUE = ["cat", "cat", "cat", "dog", "dog", "emu"]
SAID = ["cat", "cat", "dog", "dog", "emu", "cat"]


def test_classification_by_hand():
    got = classification(TRUE, SAID)
    # cat: TP 2 FP 1 FN 1; dog: TP 1 FP 1 FN 1; emu: TP 0 FP 1 FN 1
    assert got["accuracy"] == got["precision_micro"] == got["recall_micro"] == got["f1_micro"] == pytest.approx(3 / 6)
    assert got["precision_macro"] == got["recall_macro"] == got["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # Gorodkin's R_K: (c s - sum t p) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)), c 3, s 6, t = p = (3, 2, 1)
    assert got["mcc"] == pytest.approx((3 * 6 - 14) / math.sqrt((36 - 14) * (36 - 14)))
    assert "ece" not in got
    uneven = classification([1, 1, 1, 0], [1, 0, 0, 0])  # numbers are labels, too; precision and recall differ
    assert uneven["precision_macro"] == pytest.approx((1 + 1 / 3) / 2)
    assert uneven["recall_macro"] == pytest.approx((1 / 3 + 1) / 2)
    assert uneven["mcc"] == pytest.approx((1 * 1 - 0 * 2) / math.sqrt(1 * 3 * 1 * 3))


def test_calibration_error_by_hand():
    # two bins of ten: (0.5, 0.6] holds 0.55 and 0.6 with one right; (0.9, 1] holds 0.95 right
    assert calibration_error([0.55, 0.6, 0.95], [1, 0, 1], bins=10) == pytest.approx((abs(1 - 1.15) + abs(1 - 0.95)) / 3)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0 and calibration_error([1.0, 1.0], [0, 0]) == 1
    probabilities = [[0.45, 0.55], [0.6, 0.4], [0.05, 0.95]]
    assert classification([1, 1, 1], [1, 0, 1], probabilities)["ece"] == pytest.approx(
        calibration_error([0.55, 0.6, 0.95], [1, 0, 1]))
    random = np.random.default_rng(0)
    stated = random.random(200_000)
    assert calibration_error(stated, random.random(200_000) < stated) < 0.01  # a forecaster that is right about itself
    assert calibration_error(stated, random.random(200_000) < stated**2) == pytest.approx(1 / 6, abs=0.01)  # E[x - x^2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration_error([1.5], [1])


def test_entities_are_whole_spans():
    assert spans(["B-p", "I-p", "O", "I-p", "B-p", "I-q", "O", "B-q"]) == {
        ("p", 0, 2), ("p", 3, 4), ("p", 4, 5), ("q", 5, 6), ("q", 7, 8)}
    true = [["B-p", "I-p", "O", "B-q"], ["O", "B-p"]]
    said = [["B-p", "O", "O", "B-q"], ["B-q", "B-p"]]  # one end wrong, one right, one too many, one right
    got = entities(true, said)
    assert got["precision"] == pytest.approx(2 / 4) and got["recall"] == pytest.approx(2 / 3)
    assert got["f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert got["f1_macro"] == pytest.approx((2 * 1 / (2 + 2) + 2 * 1 / (2 + 1)) / 2)
    assert entities([["O"]], [["O"]])["f1"] == 0
    with pytest.raises(SupremumError, match="'PER' is not a BIO tag"):
        entities([["PER"]], [["O"]])
    with pytest.raises(ValueError, match="sentence 0: 1 tags, 2 predicted"):
        entities([["O"]], [["O", "O"]])


def test_answers_as_squad_counts_them():
    got = answers([["The Eiffel Tower", "Tour Eiffel"], ["in 1889"], ["Paris"]], ["eiffel tower!", "1889", "Lyon"])
    assert got["exact_match"] == pytest.approx(1 / 3)
    assert got["f1"] == pytest.approx((1 + 2 * 1 / (1 + 2) + 0) / 3)
    assert answers(["", "x"], ["", ""]) == {"exact_match": 0.5, "f1": 0.5}  # no answer, rightly; and wrongly
    chinese = answers(["北京。"], ["北京市"])  # a character a word: 2 of 3 and 2 of 2
    assert chinese["f1"] == pytest.approx(2 * 2 / 5) and chinese["exact_match"] == 0
    assert answers(["北京。"], ["北京"])["exact_match"] == 1


def test_translation_is_sacrebleu_with_its_signature():
    import sacrebleu

    said = ["the cat is on the mat", "there is a house"]
    references = [["the cat sat on the mat", "a cat is on the mat"], ["there is a home"]]
    got = translation(references, said)
    streams = [["the cat sat on the mat", "there is a home"], ["a cat is on the mat", None]]
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, streams).score)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, streams).score)
    assert "nrefs:var" in got["bleu_signature"] and "version:" in got["chrf_signature"]
    # one sentence by hand: precisions 5/6, 4/5, 3/4, 2/3 at equal length
    assert translation(["a b c d e f"], ["a b c d e g"])["bleu"] == pytest.approx(100 * (1 / 3) ** 0.25)
    assert "tok:zh" in translation(["我爱你"], ["我爱你"], tokenize="zh")["bleu_signature"]


def test_summaries_by_hand():
    got = summaries(["the cat sat on the mat"], ["the mat the cat"])
    # unigrams 4 of 4 and 4 of 6; bigrams "the mat", "the cat" of 3 and 5; longest common run in order "the cat" or "the mat"
    assert got["rouge1"] == pytest.approx(2 * 4 / (4 + 6))
    assert got["rouge2"] == pytest.approx(2 * 2 / (3 + 5))
    assert got["rougeL"] == pytest.approx(2 * 2 / (4 + 6))
    assert summaries([["a dog", "the mat"]], ["the mat"])["rouge1"] == 1
    assert summaries(["a dog", "the mat"], ["the mat", "the mat"], each=True)["rouge1"] == [0, 1]


def test_clustering_of_two_directions():
    # unit vectors at +-a around each axis: within a group cosine distance 1 - cos 2a, to the other 1 - mean cos(90 -+ 2a), 90
    angles = np.radians([-10, 10, 80, 100])
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([[1], [5], [1], [2]])
    got = clustering(points, ["x", "x", "y", "y"])
    within = 1 - math.cos(math.radians(20))
    outer, inner = [1 - (math.cos(math.radians(a)) + math.cos(math.radians(b))) / 2 for a, b in ((90, 110), (70, 90))]
    assert got["silhouette"] == pytest.approx(((1 - within / outer) + (1 - within / inner)) / 2)
    assert got["nmi"] == pytest.approx(1) and got["silhouette_kmeans"] == pytest.approx(got["silhouette"])
    assert clustering(points, ["x", "y", "x", "y"])["nmi"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(SupremumError, match="4 items with 1 labels"):
        clustering(points, ["x"] * 4)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(SupremumError, match=r"needs sacrebleu.*supremum\[evaluate\]"):
        translation(["a"], ["a"])


@pytest.mark.parametrize("score", [classification, entities, answers, translation, summaries])
def test_lists_of_different_lengths_are_refused(score):
    with pytest.raises(ValueError, match="2 items against 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        score([], [])
    assert metrics.BINS == 15


def test_sums_of_bleus_parts_are_sacrebleus_corpus_score_of_those_rows() -> None:
    references = [["the dog runs home .", "a dog runs ."], ["red house"], ["ein Hund läuft , und bellt"], ["so"]]
    said = ["the dog runs there .", "red", "ein Hund bellt , und läuft", "no"]
    parts = bleu_parts(references, said)
    for rows in (slice(None), slice(0, 1), slice(1, 3), [2, 2, 0]):
        chosen = [references[n] for n in np.arange(4)[rows]], [said[n] for n in np.arange(4)[rows]]
        assert bleu_of(parts[rows]) == pytest.approx(translation(*chosen)["bleu"], abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_counts_are_those_of_the_rows(seed):
    random = np.random.default_rng(seed)
    names = list("abcde")[: 2 + seed % 4]
    true, said = ([names[i] for i in random.integers(len(names), size=1 + 3 * seed)] for _ in range(2))
    places = confused(true, said, names)
    matrix = np.bincount(places, minlength=len(names) ** 2).reshape(len(names), -1)
    assert confusion_scores(matrix) == pytest.approx(classification(true, said))
    f1 = dict(zip(names, f1_of_each(matrix), strict=True))
    assert all(math.isnan(f1[name]) == (name not in {*true, *said}) for name in names)
    seen = [value for value in f1.values() if not math.isnan(value)]
    assert np.mean(seen) == pytest.approx(classification(true, said)["f1_macro"])
    tags = [[["O", "B-x", "I-x", "B-y"][i] for i in random.integers(4, size=5)] for _ in range(6)]
    other = [[["O", "B-x", "I-x", "B-y"][i] for i in random.integers(4, size=5)] for _ in range(6)]
    expected = entities(tags, other)
    expected.pop("entities")
    assert entity_scores(entity_parts(tags, other, ["x", "y"])) == pytest.approx(expected)


def test_chrf_of_parts_is_sacrebleus():
    from sacrebleu.metrics import CHRF

    random = np.random.default_rng(0)
    words = ["river", "stone", "a", "garden gate", "", "x y", "Straße", "河"]
    for _ in range(40):
        said = [" ".join(words[i] for i in random.integers(len(words), size=4)) for _ in range(5)]
        cases = [[" ".join(words[i] for i in random.integers(len(words), size=4)) for _ in range(2)] for _ in range(5)]
        found = chrf_of(chrf_parts(cases, said))
        assert found == pytest.approx(CHRF().corpus_score(said, list(map(list, zip(*cases, strict=True)))).score)
    assert chrf_of(chrf_parts([["a"]], [""])) == 0 and chrf_of(chrf_parts([["a b"]], ["ab"])) == 100
