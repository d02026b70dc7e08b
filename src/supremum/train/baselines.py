"""What a tuned model has to beat, on the same test rows: the commonest answer, a bag of words, a copy.

    classify, pairs   the commonest label; logistic regression on TF-IDF of words and pairs of words (of characters, where
                      the text has no spaces); a small LSTM (lstm.py)
    tag               O everywhere is 0 F1 by definition: each word's commonest tag in the training text; a small LSTM
    answer            the sentence of the context that shares most words with the question
    generation        the source itself (translation); its first three sentences (summaries)
    embed             latent semantic analysis: TF-IDF to 100 dimensions
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ..measure.metrics import library
from ..progress import phase
from .rows import Row
from .tasks import Task

SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
HAN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def baselines(task: Task, train: Sequence[Row], test: Sequence[Row], valid: Sequence[Row] | None = None,
              seed: int = 0) -> dict[str, list[Any]]:
    """Predictions on the test rows by the baseline's name. valid: rows that an LSTM's passes are chosen by; None leaves it
    out."""
    if task.name in ("classify", "pairs"):
        common = Counter(task.truth(train)).most_common(1)[0][0]
        found = {"majority": [common] * len(test), "TF-IDF + logistic regression": bag_of_words(task, train, test)}
        return found | ({"LSTM": recurrent(task, train, valid, test, seed)} if valid else {})
    if task.name == "tag":
        return {"word's commonest tag": lookup(train, test)} | ({"LSTM": tagged(train, valid, test, seed)} if valid else {})
    if task.name == "answer":
        return {"sentence with most of the question's words": [nearest_sentence(row) for row in test]}
    if task.name == "embed":
        return {"TF-IDF + SVD": semantic(task, train, test)}
    if task.name == "translate":
        return {"copy of the source": [row["source"] for row in test]}
    return {"first three sentences": ["".join(SENTENCE.findall(row["source"])[:3]).strip() for row in test]}


def _vectors(task: Task, train: Sequence[Row], test: Sequence[Row]) -> tuple[Any, Any]:
    text = library("sklearn.feature_extraction.text")
    one, other = [task.text(row) for row in train], [task.text(row) for row in test]
    han = sum(bool(HAN.search(document)) for document in one) > len(one) / 2
    maker = text.TfidfVectorizer(analyzer="char" if han else "word", ngram_range=(1, 2), sublinear_tf=True,
                                 token_pattern=r"(?u)\b\w+\b")
    return maker.fit_transform(one), maker.transform(other)


def bag_of_words(task: Task, train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    rows_NV, test_MV = _vectors(task, train, test)
    model = library("sklearn.linear_model").LogisticRegression(C=10.0, max_iter=1000)
    found: list[str] = model.fit(rows_NV, task.truth(train)).predict(test_MV).tolist()
    return found


def recurrent(task: Task, train: Sequence[Row], valid: Sequence[Row], test: Sequence[Row], seed: int) -> list[str]:
    from .lstm import predict

    one, other = (([task.text(row) for row in rows], task.truth(rows)) for rows in (train, valid))
    with phase("train the LSTM"):
        return predict(one, other, [task.text(row) for row in test], seed)


def tagged(train: Sequence[Row], valid: Sequence[Row], test: Sequence[Row], seed: int) -> list[list[str]]:
    from .lstm import tag

    one, other = (([row["words"] for row in rows], [row["tags"] for row in rows]) for rows in (train, valid))
    with phase("train the LSTM"):
        return tag(one, other, [row["words"] for row in test], seed)


def semantic(task: Task, train: Sequence[Row], test: Sequence[Row]) -> list[Any]:
    rows_NV, test_MV = _vectors(task, train, test)
    size = min(100, rows_NV.shape[1] - 1, rows_NV.shape[0] - 1)
    model = library("sklearn.decomposition").TruncatedSVD(max(1, size), random_state=0).fit(rows_NV)
    return list(model.transform(test_MV))


def lookup(train: Sequence[Row], test: Sequence[Row]) -> list[list[str]]:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [[best.get(word, "O") for word in row["words"]] for row in test]


def nearest_sentence(row: Row) -> str:
    def words(text: str) -> set[str]:
        return set(re.findall(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|\w+", text.lower()))

    asked = words(row["question"])
    sentences = SENTENCE.findall(row["context"]) or [row["context"]]
    return str(max(sentences, key=lambda sentence: len(asked & words(sentence)) / (1 + len(words(sentence))) ** 0.5).strip())
