"""Changed copies of a text: words masked, deleted, swapped, replaced by neighbours; back-translation; mixing. All are off
unless asked for, and every copy is a function of (seed, document, copy) alone.

    delete, swap    Wei, Zou 2019 (arXiv 1901.11196): each word falls with probability p; p n times two neighbours change
                    places. What stands between words stays where it is
    mask            each word becomes the mask token with probability p (Devlin et al. 2018)
    synonyms        each word, with probability p, becomes one of its nearest neighbours (cosine) among the word tokens of a
                    model's own input embedding
    back-translate  a function of the caller's: texts in, as many texts out
    mix             with probability p the copy's beginning goes on with an earlier document's end, cut at a share
                    lambda ~ uniform of the words of each (the share is told, for labels that mix alike; Zhang et al. 2017)

A word is that of text/words.py: in Chinese a character.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SupremumError
from ..workspace import replacing
from .cleaning import check_file
from .reading import Reading
from .sources import names_of, watched
from .words import pattern

EARLIER = 64  # documents that mixing can choose from
BATCH = 32  # texts given to back-translation at a time
NEAREST, LEAST = 10, 0.4  # neighbours a word, and their least cosine
MASK = "<mask>"
Rng = np.random.Generator
Batched = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Changes:
    """Probabilities a word (mask, delete, swap, synonyms) and a copy (mix)."""

    mask: float = 0.0
    delete: float = 0.0
    swap: float = 0.0
    synonyms: float = 0.0
    mix: float = 0.0


@dataclass
class Augmented:
    """`read`: documents; `written`: with the copies; `counts`: words or copies that each operation changed; `same`: copies
    that came out as they were, left out."""

    out: str
    read: int = 0
    written: int = 0
    same: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, str]] = field(default_factory=list)


def augment_text(sources: Sequence[str | Path], out: str | Path, changes: Changes, *, copies: int = 1, originals: bool = True,
                 neighbours: Callable[[str], Sequence[str]] | None = None, back_translate: Batched | None = None,
                 mask_token: str = MASK, seed: int = 0, reading: Reading | None = None, fresh: bool = False) -> Augmented:
    """Write the documents (with `originals`) and `copies` changed copies of each into `out`, .jsonl or .txt.

    neighbours: of a word, for `synonyms` (see Neighbours). Raises SupremumError for what the user can mend.
    """
    path, wanted = Path(out).expanduser(), vars(changes)
    check_file(path, names_of(sources), fresh)
    if not any(wanted.values()) and back_translate is None:
        raise SupremumError("No change was asked for.", "Name one, such as --swap 0.1.")
    if strange := [name for name, share in wanted.items() if not 0 <= share <= 1]:
        raise SupremumError(f"{strange[0]} {wanted[strange[0]]:g} is no probability.", "Use 0 to 1.")
    if changes.synonyms and neighbours is None:
        raise SupremumError("Synonyms are neighbours in a model's embedding.", "Name it with --model, such as --model demo.")
    done, earlier = Augmented(str(path)), deque[str](maxlen=EARLIER)

    def rows() -> Iterator[dict[str, Any]]:
        for number, (place, text) in enumerate(watched(sources, reading or Reading(), "augment")):
            done.read += 1
            if originals:
                yield {"text": text, "source": place}
            for copy in range(copies):
                rng = np.random.default_rng([seed, number, copy])
                row: dict[str, Any] = {"text": changed(text, changes, rng, done.counts, neighbours, mask_token),
                                       "source": place, "copy": copy, "original": text}
                if changes.mix and earlier and rng.random() < changes.mix:
                    row["mixed"] = float(rng.random())
                    row["text"] = mixed(row["text"], earlier[int(rng.integers(len(earlier)))], row["mixed"])
                    done.counts["mix"] += 1
                yield row
            earlier.append(text)

    with replacing(path) as temporary, temporary.open("wb") as file:
        for row in translated(rows(), back_translate, done.counts) if back_translate else rows():
            original = row.pop("original", None)
            if original is not None:
                if row["text"] == original:
                    done.same += 1
                    continue
                if len(done.samples) < 5:
                    done.samples.append({"before": original[:160], "after": row["text"][:160]})
            line = f"{row['text'].strip()}\n\n" if path.suffix == ".txt" else json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "replace"))
            done.written += 1
    return done


def changed(text: str, changes: Changes, rng: Rng, counts: Counter[str],
            neighbours: Callable[[str], Sequence[str]] | None = None, mask_token: str = MASK) -> str:
    """The text after synonyms, swaps, deletions and masks, in this order."""
    words, gaps = apart(text)
    if changes.synonyms and neighbours:
        for place in np.flatnonzero(rng.random(len(words)) < changes.synonyms):
            if near := neighbours(words[place]):
                words[place] = near[int(rng.integers(len(near)))]
                counts["synonyms"] += 1
    if changes.swap and len(words) > 1:
        for left in rng.integers(len(words) - 1, size=rng.binomial(len(words), changes.swap)):
            words[left], words[left + 1] = words[left + 1], words[left]
            counts["swap"] += 1
    if changes.delete and words:
        falls = rng.random(len(words)) < changes.delete
        falls[int(rng.integers(len(words)))] = False  # one stays
        for place in np.flatnonzero(falls):
            words[place] = ""
            gaps[place + 1] = gaps[place + 1].lstrip() if place + 1 < len(words) else gaps[place + 1]
        counts["delete"] += int(falls.sum())
    if changes.mask:
        for place in np.flatnonzero(rng.random(len(words)) < changes.mask):
            if words[place]:
                words[place] = mask_token
                counts["mask"] += 1
    return "".join(part for pair in zip(gaps, [*words, ""], strict=True) for part in pair)


def apart(text: str) -> tuple[list[str], list[str]]:
    """The words, and what stands before, between and after them (one more)."""
    spans = [match.span() for match in pattern(text).finditer(text)]
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[a:b] for a, b in spans], [text[edges[i]:edges[i + 1]] for i in range(0, len(edges), 2)]


def mixed(one: str, other: str, share: float) -> str:
    """The first `share` of one's words, then the rest of other's, with what stands around them."""
    ends = []
    for text in (one, other):
        starts = [match.start() for match in pattern(text).finditer(text)]
        cut = round(share * len(starts))
        ends.append(starts[cut] if cut < len(starts) else len(text))
    begin, rest = one[:ends[0]], other[ends[1]:]
    glued = begin[-1:].isalnum() and begin[-1:].isascii() and rest[:1].isalnum()
    return begin + " " * glued + rest


def translated(rows: Iterator[dict[str, Any]], translate: Batched, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows with each copy's text back-translated."""
    while batch := list(islice(rows, BATCH)):
        copies = [row for row in batch if "copy" in row]
        texts = list(translate([row["text"] for row in copies])) if copies else []
        if len(texts) != len(copies) or not all(isinstance(text, str) for text in texts):
            raise SupremumError(f"Back-translation gave {len(texts)} texts for {len(copies)}.",
                                "The function must return one string for each.")
        for row, text in zip(copies, texts, strict=True):
            row["text"] = text
            counts["back-translate"] += 1
        yield from batch


class Neighbours:
    """Of a word that is one token: the NEAREST other words by the cosine of their input embeddings, LEAST or more."""

    def __init__(self, tokenizer: Any, embedding_VH: Any) -> None:
        """embedding_VH: a tensor, a row a token."""
        ids: dict[str, int] = {}
        pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(embedding_VH)))))
        spaced = any(piece and piece[0] in "Ġ▁" for piece in pieces)
        for token, piece in enumerate(pieces):
            if not piece or piece in tokenizer.all_special_tokens or piece.startswith("##"):
                continue
            word = tokenizer.decode([token]).strip()
            begins = piece[0] in "Ġ▁" or not spaced or not word.isascii()
            if begins and len(word) > (2 if word.isascii() else 0) and word.isalpha():
                ids.setdefault(word, token)
        self.place = {word: number for number, word in enumerate(ids)}
        self.words = list(ids)
        rows_WH = embedding_VH[list(ids.values())].float().numpy()
        self.unit_WH = rows_WH / np.maximum(np.linalg.norm(rows_WH, axis=1, keepdims=True), 1e-12)
        self.known: dict[str, list[str]] = {}

    def __call__(self, word: str) -> list[str]:
        if word not in self.known:
            place = self.place.get(word)
            self.known[word] = [] if place is None else self._nearest(word, place)
        return self.known[word]

    def _nearest(self, word: str, place: int) -> list[str]:
        cosine_W = self.unit_WH @ self.unit_WH[place]
        best = np.argsort(-cosine_W, kind="stable")[:4 * NEAREST]
        others = [self.words[n] for n in best if cosine_W[n] >= LEAST]
        return [other for other in others if other.lower() != word.lower() and other.istitle() == word.istitle()
                and other.isupper() == word.isupper()][:NEAREST]


def neighbours_of(model: str) -> Neighbours:
    """Of a model's own embedding."""
    import torch

    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    module: Any = checkpoint.model(torch.float32).get_input_embeddings()
    return Neighbours(checkpoint.tokenizer(), module.weight.detach())


def function_named(name: str) -> Batched:
    """"module:function" or "file.py:function": the user's own code."""
    import importlib
    import importlib.util

    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        found = getattr(module, function)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise SupremumError(f"{name}: no such function ({error}).",
                            "Write it like translate.py:back or package.module:back.") from error
    return found
