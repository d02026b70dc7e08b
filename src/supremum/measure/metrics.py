"""Scores of tasks: labels, entities, answers, translations, summaries, clusters. Lists in, a dict of floats out.

    precision = TP / (TP + FP), recall = TP / (TP + FN), F1 their harmonic mean      micro: pooled; macro: mean of classes
    ECE = sum over bins of (items in the bin / all) |accuracy - mean confidence|     equal-width bins (Guo et al. 2017)

Thin over scikit-learn, sacrebleu and rouge-score (extra `evaluate`). Entities are counted as conlleval counts them (Tjong
Kim Sang, Buchholz 2000), answers as SQuAD's script does (Rajpurkar et al. 2016), with each Han or kana character a word.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import SupremumError

BINS = 15
CHRF = 6  # characters of the longest n-gram
HAN = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
WIDE = re.compile(r"[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")  # punctuation beside them
References = Sequence[str] | Sequence[Sequence[str]]  # one a case, or several


def library(name: str, extra: str = "evaluate") -> Any:
    """The optional module `name`; a missing one is an error that names the extra."""
    try:
        return import_module(name)
    except ImportError as error:
        raise SupremumError(f"This score needs {name.partition('.')[0]}, which is not installed.",
                            f"Install it with: pip install 'supremum[{extra}]'") from error


def classification(labels: Sequence[Any], predicted: Sequence[Any], probabilities: Any = None) -> dict[str, float]:
    """Accuracy, precision, recall and F1 (micro and macro) and MCC of one label an item; `ece` where probabilities are given.

    probabilities: (N, C) of all classes, or (N,) of the predicted one. Macro means run over every class that occurs in
    either list; a class that was never predicted has precision 0.
    """
    _same_length(labels, predicted)
    metrics = library("sklearn.metrics")
    true, said = [np.asarray([str(value) for value in values]) for values in (labels, predicted)]
    scores = {"accuracy": float((true == said).mean())}
    for average in ("micro", "macro"):
        found = metrics.precision_recall_fscore_support(true, said, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), found[:3], strict=True):
            scores[f"{name}_{average}"] = float(value)
    scores["mcc"] = float(metrics.matthews_corrcoef(true, said))
    if probabilities is not None:
        rows = np.asarray(probabilities, dtype=np.float64)
        scores["ece"] = calibration_error(rows if rows.ndim == 1 else rows.max(1), true == said)
    return scores


def confused(labels: Sequence[Any], predicted: Sequence[Any], names: Sequence[Any]) -> np.ndarray:
    """(N,) place of each item in the confusion matrix of `names`, row by row; its counts give `confusion_scores`."""
    _same_length(labels, predicted)
    place = {name: index for index, name in enumerate(names)}
    return np.array([place[true] * len(place) + place[said] for true, said in zip(labels, predicted, strict=True)])


def confusion_scores(matrix_CC: np.ndarray) -> dict[str, float]:
    """What `classification` gives, of counts (true, predicted)."""
    total, right_C = matrix_CC.sum(), np.diagonal(matrix_CC).astype(np.float64)
    true_C, said_C = matrix_CC.sum(1).astype(np.float64), matrix_CC.sum(0).astype(np.float64)
    seen_C = (true_C + said_C) > 0
    accuracy = float(right_C.sum() / total)
    scores = {"accuracy": accuracy} | {f"{name}_micro": accuracy for name in ("precision", "recall", "f1")}
    for name, below_C in (("precision", said_C), ("recall", true_C), ("f1", (true_C + said_C) / 2)):
        scores[f"{name}_macro"] = float((right_C / below_C.clip(0.5))[seen_C].mean())  # counts: below 0.5 is none
    root = np.sqrt((total**2 - (said_C**2).sum()) * (total**2 - (true_C**2).sum()))
    scores["mcc"] = float((right_C.sum() * total - (true_C * said_C).sum()) / root) if root else 0.0
    return scores


def f1_of_each(matrix_CC: np.ndarray) -> np.ndarray:
    """(C,) F1 of every label; NaN for one that is neither true nor predicted."""
    below_C = matrix_CC.sum(1) + matrix_CC.sum(0)
    return np.where(below_C > 0, 2 * np.diagonal(matrix_CC) / below_C.clip(1), np.nan)


def calibration_error(confidence: Any, right: Any, bins: int = BINS) -> float:
    """ECE: how far stated probabilities (N,) lie from the share (N,) bool that came true, over equal-width bins."""
    confidence_N, right_N = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    _same_length(confidence_N, right_N)
    if confidence_N.min() < 0 or confidence_N.max() > 1 + 1e-6:
        raise ValueError("probabilities lie between 0 and 1")
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/bins], (1/bins, 2/bins], ...
    excess = np.bincount(bin_N, right_N - confidence_N, bins)
    return float(np.abs(excess).sum() / len(right_N))


def entities(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities (type and both ends right), pooled; `f1_macro` is the mean over types.

    Sentences of BIO tags: B-person, I-person, O.
    """
    _same_length(tags, predicted)
    right: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for number, (true, said) in enumerate(zip(tags, predicted, strict=True)):
        if len(true) != len(said):
            raise ValueError(f"sentence {number}: {len(true)} tags, {len(said)} predicted")
        one, other = spans(true), spans(said)
        wanted.update(kind for kind, *_ in one)
        found.update(kind for kind, *_ in other)
        right.update(kind for kind, *_ in one & other)
    precision, recall, f1 = _rates(sum(right.values()), sum(found.values()), sum(wanted.values()))
    kinds = sorted(wanted | found)
    macro = [_rates(right[kind], found[kind], wanted[kind])[2] for kind in kinds]
    return {"precision": precision, "recall": recall, "f1": f1, "f1_macro": sum(macro) / len(macro) if macro else 0.0,
            "entities": float(sum(wanted.values()))}


def entity_parts(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]],
                 kinds: Sequence[str]) -> np.ndarray:
    """(N, K, 3) entities of each sentence and type that were met, found and wanted; sums over any sentences give their
    scores (`entity_scores`)."""
    place = {kind: index for index, kind in enumerate(kinds)}
    parts = np.zeros((len(tags), len(place), 3), dtype=np.int64)
    for number, (true, said) in enumerate(zip(tags, predicted, strict=True)):
        one, other = spans(true), spans(said)
        for column, several in enumerate((one & other, other, one)):
            for kind, *_ in several:
                parts[number, place[kind], column] += 1
    return parts


def entity_scores(parts: np.ndarray) -> dict[str, float]:
    """What `entities` gives, of the rows of `entity_parts`; without the count of entities."""
    total_K3 = parts.sum(0)
    precision, recall, f1 = _rates(*total_K3.sum(0).tolist())
    macro = entity_f1(parts)
    macro = macro[np.isfinite(macro)]
    return {"precision": precision, "recall": recall, "f1": f1, "f1_macro": float(macro.mean()) if len(macro) else 0.0}


def entity_f1(parts: np.ndarray) -> np.ndarray:
    """(K,) F1 of every type; NaN for one that is neither wanted nor found."""
    total_K3 = parts.sum(0)
    below_K = total_K3[:, 1] + total_K3[:, 2]
    return np.where(below_K > 0, 2 * total_K3[:, 0] / below_K.clip(1), np.nan)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, end) of each entity; I-x after another type or after O begins one, too."""
    out: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if mark not in ("B", "I", "O") or (mark == "O") == bool(name):
            raise SupremumError(f"{tag!r} is not a BIO tag.", "Write B-TYPE, I-TYPE or O.")
        if kind and (mark != "I" or name != kind):
            out.add((kind, start, index))
            kind = ""
        if mark != "O" and not kind:
            kind, start = name, index
    return out


def answers(references: References, predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and word F1 of extracted answers, each against the nearest of its references; fractions.

    A question without an answer has the reference "".
    """
    _same_length(references, predictions)
    exact, overlap = [], []
    for several, said in zip(_several(references), predictions, strict=True):
        exact.append(max(float(_normal(true) == _normal(said)) for true in several))
        overlap.append(max(_word_f1(_normal(true), _normal(said)) for true in several))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _normal(text: str) -> list[str]:
    """Lower case, no punctuation, no articles, single spaces; the words."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", WIDE.sub("", text))
    return HAN.sub(r" \1 ", text).split()


def _word_f1(true: list[str], said: list[str]) -> float:
    if not true or not said:
        return float(true == said)
    return _rates(sum((Counter(true) & Counter(said)).values()), len(said), len(true))[2]


def translation(references: References, hypotheses: Sequence[str], *, tokenize: str | None = None) -> dict[str, Any]:
    """Corpus BLEU and chrF (0 to 100) with sacrebleu's signatures; `tokenize` is sacrebleu's ("zh" for Chinese)."""
    _same_length(references, hypotheses)
    metrics = library("sacrebleu.metrics")
    several = _several(references)
    most = max(map(len, several))
    streams = [[case[n] if n < len(case) else None for case in several] for n in range(most)]
    scores: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU(tokenize=tokenize)), ("chrf", metrics.CHRF())):
        scores[name] = float(metric.corpus_score(list(hypotheses), streams).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def bleu_parts(references: References, hypotheses: Sequence[str], *, tokenize: str | None = None) -> np.ndarray:
    """(N, 10): n-grams met (4), n-grams written (4), length, reference's length of each hypothesis. Their sums over any rows
    give those rows' BLEU (`bleu_of`), so a bootstrap need not read the texts again."""
    _same_length(references, hypotheses)
    metric = library("sacrebleu.metrics").BLEU(tokenize=tokenize, effective_order=True)  # which changes no count
    found = [metric.sentence_score(said, list(case)) for case, said in zip(_several(references), hypotheses, strict=True)]
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=np.int64).reshape(-1, 10)


def bleu_of(parts: np.ndarray) -> float:
    """Corpus BLEU of the rows of `bleu_parts`."""
    total = parts.sum(0).tolist()
    return float(library("sacrebleu.metrics").BLEU.compute_bleu(total[:4], total[4:8], total[8], total[9],
                                                                     smooth_method="exp").score)


def chrf_parts(references: References, hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 6, 3): character n-grams written, of the reference, met, for n = 1 to 6; of several references the best counts.
    Their sums over any rows give those rows' chrF (`chrf_of`)."""
    _same_length(references, hypotheses)
    best = []
    for several, said in zip(_several(references), hypotheses, strict=True):
        written = _characters(said)
        found = [np.array([[sum(one.values()) if other else 0, sum(other.values()), sum((one & other).values())]
                           for one, other in zip(written, _characters(true), strict=True)]) for true in several]
        best.append(max(found, key=lambda part: chrf_of(part[None])))
    return np.array(best, dtype=np.int64).reshape(-1, CHRF, 3)


def _characters(text: str) -> list[Counter[str]]:
    text = "".join(text.split())
    return [Counter(text[at : at + n] for at in range(len(text) - n + 1)) for n in range(1, CHRF + 1)]


def chrf_of(parts: np.ndarray) -> float:
    """Corpus chrF (0 to 100) of the rows of `chrf_parts`: F of the mean precision and recall over n, recall twice as heavy
    (Popovic 2015), over the n that both sides have, as sacrebleu does."""
    written_n, wanted_n, met_n = parts.sum(0).T.astype(np.float64)
    both_n = (written_n > 0) & (wanted_n > 0)
    if not both_n.any():
        return 0.0
    precision, recall = (met_n[both_n] / written_n[both_n]).mean(), (met_n[both_n] / wanted_n[both_n]).mean()
    return float(100 * 5 * precision * recall / (4 * precision + recall)) if precision + recall else 0.0


def summaries(references: References, hypotheses: Sequence[str], *, each: bool = False) -> dict[str, Any]:
    """Mean F of ROUGE-1, 2, L (whole text) and Lsum (line by line), stemmed; of several references the best counts.

    `each`: lists with one score a summary instead of means. rouge-score reads Latin letters and digits only.
    """
    _same_length(references, hypotheses)
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = library("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True)
    rows = [scorer.score_multi(case, said) for case, said in zip(_several(references), hypotheses, strict=True)]
    columns = {name: [row[name].fmeasure for row in rows] for name in names}
    return columns if each else {name: float(np.mean(values)) for name, values in columns.items()}


def clustering(embeddings: Any, labels: Sequence[Any], *, seed: int = 0) -> dict[str, float]:
    """How embeddings (N, D) lie by label: silhouette of the labels, NMI and silhouette of as many k-means clusters.

    Angles count, not lengths: distances are cosine, and k-means runs on the unit sphere.
    """
    _same_length(embeddings, labels)
    metrics, cluster = library("sklearn.metrics"), library("sklearn.cluster")
    rows_ND = np.asarray(embeddings, dtype=np.float64)
    rows_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True).clip(1e-12)
    names = [str(label) for label in labels]
    kinds = len(set(names))
    if not 2 <= kinds < len(names):
        raise SupremumError(f"{len(names)} items with {kinds} labels cannot be compared as clusters.",
                            "Give at least two labels, and more items than labels.")
    found = cluster.KMeans(kinds, n_init=10, random_state=seed).fit_predict(rows_ND)
    return {"silhouette": float(metrics.silhouette_score(rows_ND, names, metric="cosine")),
            "silhouette_kmeans": float(metrics.silhouette_score(rows_ND, found, metric="cosine")),
            "nmi": float(metrics.normalized_mutual_info_score(names, found))}


def _rates(right: int, found: int, wanted: int) -> tuple[float, float, float]:
    """(precision, recall, F1), 0 where there is nothing to divide by."""
    return right / found if found else 0.0, right / wanted if wanted else 0.0, \
        2 * right / (found + wanted) if found + wanted else 0.0


def _several(references: References) -> list[list[str]]:
    several = [[case] if isinstance(case, str) else list(case) for case in references]
    if any(not case for case in several):
        raise ValueError("a case without references")
    return several


def _same_length(one: Any, other: Any) -> None:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} items against {len(other)}")
    if not len(one):
        raise ValueError("nothing to score")
