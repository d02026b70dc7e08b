"""How well a tokenizer suits a text, language by language.

    fertility   tokens a word, tokens a character (a word: text/words.py; a Han character is one)
    unknown     share of the characters that stand in an unknown token: they are lost
    spelled     share of the characters that take more than one token (bytes of a character); 1 - both is the coverage
    exact       share of the documents that decode to themselves

Languages are those of text/language.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..plain import plain
from .language import language
from .words import words

REPORT = "tokenizer_report.json"


@dataclass
class Suits:
    """Of one language's documents."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0
    unknown: int = 0
    spelled: int = 0
    exact: int = 0

    def ratios(self) -> dict[str, float]:
        characters = max(1, self.characters)
        return {"tokens_per_word": self.tokens / max(1, self.words), "tokens_per_character": self.tokens / characters,
                "bytes_per_token": self.bytes / max(1, self.tokens), "unknown": self.unknown / characters,
                "spelled": self.spelled / characters, "coverage": 1 - (self.unknown + self.spelled) / characters,
                "exact": self.exact / max(1, self.documents)}


@dataclass
class Fertility:
    """`size`: tokens in the vocabulary. `languages`: those with the most characters first; "all" is their sum."""

    size: int
    languages: dict[str, Suits]
    settings: dict[str, Any] = field(default_factory=dict)
    out: str = ""

    def document(self) -> dict[str, Any]:
        return {"out": self.out, "size": self.size, "settings": plain(self.settings),
                "languages": {code: plain(suits) | {"ratios": suits.ratios()} for code, suits in self.languages.items()}}

    def to_json(self) -> str:
        return json.dumps(self.document(), indent=1, ensure_ascii=False)


def tokenizer_report(tokenizer: Any, texts: Iterable[str]) -> Fertility:
    """`tokenizer`: a fast one of Transformers."""
    found: dict[str, Suits] = {}
    unknown_id = tokenizer.unk_token_id
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = np.array(encoded["input_ids"], dtype=np.int64), np.array(encoded["offset_mapping"], dtype=np.int64)
        suits = found.setdefault(language(text)[0], Suits())
        suits.documents += 1
        suits.bytes += len(text.encode("utf-8", "replace"))
        suits.characters += len(text)
        suits.words += len(words(text))
        suits.tokens += len(ids)
        if len(ids):
            lost = (ids == unknown_id) & (unknown_id is not None)
            unknown_C, spelled_C = covered(spans[lost], len(text)) > 0, covered(spans[~lost], len(text)) > 1
            suits.unknown += int(unknown_C.sum())
            suits.spelled += int((spelled_C & ~unknown_C).sum())
        suits.exact += tokenizer.decode(ids.tolist()) == text
    ordered = dict(sorted(found.items(), key=lambda item: -item[1].characters))
    total = Suits(*(sum(getattr(suits, name) for suits in found.values()) for name in Suits.__dataclass_fields__))
    return Fertility(len(tokenizer), {"all": total} | ordered)


def covered(spans_N2: np.ndarray, length: int) -> np.ndarray:
    """(length,) how many spans hold each character."""
    edges = np.zeros(length + 1, dtype=np.int64)
    if len(spans_N2):
        np.add.at(edges, spans_N2[:, 0], 1)
        np.add.at(edges, spans_N2[:, 1], -1)
    return np.cumsum(edges)[:length]
