"""The LSTM baseline: it reads order, which a bag of words cannot, and the same seed says the same."""

from __future__ import annotations

import random

from supremum.measure.metrics import entities
from supremum.train import lstm


def ordered(count: int, seed: int) -> tuple[list[str], list[str]]:
    """"up" before "down" is good, the other way round bad; what stands between says nothing."""
    draw, texts, labels = random.Random(seed), [], []
    for number in range(count):
        pair = ["up", "down"] if number % 2 else ["down", "up"]
        middle = draw.choices(["river", "stone", "window", "garden"], k=3)
        texts.append(" ".join([pair[0], *middle, pair[1]]))
        labels.append("good" if number % 2 else "bad")
    return texts, labels


def test_order_is_learnt_and_seeded() -> None:
    train, valid, (texts, labels) = ordered(1200, 0), ordered(100, 1), ordered(200, 2)
    said = lstm.predict(train, valid, texts, 3)
    assert sum(one == other for one, other in zip(said, labels, strict=True)) > 190
    assert said == lstm.predict(train, valid, texts, 3)


def test_tags_follow_the_words_around_them() -> None:
    """"York" is a place after "in" and a person after "Mr": what each word's commonest tag cannot say."""
    def rows(count: int, seed: int) -> tuple[list[list[str]], list[list[str]]]:
        draw, words, tags = random.Random(seed), [], []
        for number in range(count):
            place = draw.choice(["York", "Lincoln", "Berlin"])
            more = draw.choices(["river", "stone", "window"], k=draw.randrange(3))
            words.append([*more, "in" if number % 2 else "Mr", place, "today"])
            tags.append(["O"] * (len(more) + 1) + ["B-place" if number % 2 else "B-person", "O"])
        return words, tags

    train, valid, (words, tags) = rows(1200, 0), rows(100, 1), rows(200, 2)
    said = lstm.tag(train, valid, words, 3)
    assert entities(tags, said)["f1"] > 0.95 and said == lstm.tag(train, valid, words, 3)
    long = [["in", "York", *["river"] * 2 * lstm.LENGTH], []]
    assert [len(one) for one in lstm.tag(train, valid, long, 3)] == [len(one) for one in long]


def test_rows_of_no_known_word_and_of_han_are_answered() -> None:
    train = ["天气很好", "天气不好", "很好", "不好"] * 4, ["a", "b", "a", "b"] * 4
    assert set(lstm.predict(train, train, ["", "zzz", "很好"], 0)) <= {"a", "b"}
    assert lstm._words("天气 good, x") == ["天", "气", "good", ",", "x"]
