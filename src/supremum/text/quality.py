"""Rules that tell prose from the rest of the web, each with its published threshold.

    gopher      Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1: length, word length, symbols, bullets, ellipses,
                alphabetic words, function words
    repetition  the same, table A1: duplicate lines and paragraphs, frequent and duplicate n-grams
    c4          Raffel et al. 2020 (arXiv 1910.10683), section 2.2: lines that end as sentences do, of five words or more,
                without "javascript"; texts of five sentences or more, without "lorem ipsum" and braces

Thresholds of word length and spaces apply to scripts with spaces only. Where the authors count words of Chinese and its
like we count characters, 1.5 to a word. The function words are those of the text's own language: English has the eight of
the paper, the others the first twenty of text/language.py; texts of undetermined language are not held to them.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from .language import FUNCTION_WORDS
from .words import SCRIPT_WITHOUT_SPACES, runs, words

SHORTEST, LONGEST = 50, 100_000  # words
STOP_WORDS = {code: frozenset(text.split()[:20]) for code, text in FUNCTION_WORDS.items()}
STOP_WORDS["en"] = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # share of characters in the most frequent n-gram
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in n-grams that come more than once
BULLETS = ("•", "‣", "▪", "●", "-", "*", "·", "–")
ENDS = (".", "!", "?", '"', "”", "’", "…", "。", "！", "？", "」", "』", "؟", "۔", "।")
SENTENCE = re.compile(r"[.!?。！？؟۔।]+[\s\"”’」』)]*")
POLICY = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE)


def gopher(text: str, code: str, *, shortest: int = SHORTEST, longest: int = LONGEST) -> str | None:
    """Why the text fails, None if it passes. `code`: its language."""
    found = words(text)
    unspaced = len(SCRIPT_WITHOUT_SPACES.findall(text))
    count = len(found) - unspaced / 3  # 1.5 characters of such a script are a word
    spaced = unspaced * 2 < len(found)
    if count < shortest:
        return "too few words"
    if count > longest:
        return "too many words"
    if spaced and not 3 <= sum(map(len, found)) / len(found) <= 10:
        return "mean word length"
    if (text.count("#") + text.count("...") + text.count("…")) / count > 0.1:
        return "symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    if sum(any(c.isalpha() for c in word) for word in found) < 0.8 * len(found):
        return "words without letters"
    stop = STOP_WORDS.get(code) if spaced else None
    if stop and sum(word.lower() in stop for word in found) < 2:
        return "function words"
    return None


def repetition(text: str) -> str | None:
    total = max(1, len(text))
    for name, parts in (("paragraphs", re.split(r"\n\s*\n", text)), ("lines", text.split("\n"))):
        kept = [part.strip() for part in parts if part.strip()]
        again = [part for part, times in Counter(kept).items() for _ in range(times - 1)]
        if len(again) > 0.3 * len(kept) or sum(map(len, again)) > 0.2 * total:
            return f"duplicate {name}"
    found = words(text)
    hashes_W = np.fromiter(map(hash, found), dtype=np.int64, count=len(found)).view(np.uint64)
    lengths_W = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    before_W = np.concatenate([[0], np.cumsum(lengths_W)])  # letters before each word
    letters = max(1, int(before_W[-1]))
    for n in sorted(TOP | DUPLICATE):
        runs_R = runs(hashes_W, n)
        sorted_R = np.sort(runs_R)
        twice = np.unique(sorted_R[1:][sorted_R[1:] == sorted_R[:-1]])
        if not twice.size:
            return None  # what does not repeat at n words does not at more
        starts = np.flatnonzero(np.isin(runs_R, twice))
        if n in TOP:
            which = np.searchsorted(twice, runs_R[starts])
            counts = np.bincount(which)[which]
            if (counts * (before_W[starts + n] - before_W[starts])).max() > TOP[n] * letters:
                return f"one {n}-gram"
        else:
            edge_W = np.zeros(len(found) + 1, dtype=np.int64)  # letters are counted once, however many such n-grams hold them
            edge_W[starts] += 1
            edge_W[starts + n] -= 1
            if lengths_W[np.cumsum(edge_W[:-1]) > 0].sum() > DUPLICATE[n] * letters:
                return f"duplicate {n}-grams"
    return None


def c4(text: str) -> tuple[str, str | None, Counter[str]]:
    """(the lines that stay, why the text fails or None, lines removed by reason)."""
    removed: Counter[str] = Counter()
    if "lorem ipsum" in text.lower():
        return text, "lorem ipsum", removed
    if "{" in text or "}" in text:
        return text, "braces", removed
    lines = []
    for line in text.split("\n"):
        bare = line.strip()
        reason = ("empty" if not bare else "no end mark" if not bare.endswith(ENDS) or bare.endswith("...")
                  else "few words" if len(words(bare)) < 5 else "javascript" if "javascript" in bare.lower()
                  else "policy" if POLICY.search(bare) else None)
        if reason is None:
            lines.append(line)
        elif reason != "empty":
            removed[reason] += 1
    kept = "\n".join(lines)
    if len(SENTENCE.findall(kept)) < 5:
        return kept, "too few sentences", removed
    return kept, None, removed


RULES: tuple[str, ...] = ("gopher", "repetition", "c4")
