"""What of an evaluation text stands in a training text: shared runs of N words.

Thirteen words in a row are the measure of Brown et al. 2020 (GPT-3, appendix C). An evaluation document of fewer words is
looked for as a whole, from FEWEST on; still shorter ones are common phrases, are not looked for, and are counted. Capitals,
punctuation and white space do not matter. Runs are 64-bit hashes: two of a million runs each meet by chance once in about
10^7 trials.

Memory: 17 bytes a run of the evaluation text, in each worker 8; the training text is streamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import SupremumError
from .words import runs, word_hashes, words

N, FEWEST = 13, 5


@dataclass
class Leaks:
    """`evaluation`: documents looked for, `short` of them too short for it. `leaked`: documents with a run in the training
    text, `whole`: with all of theirs; `share`: of all their runs, those found. `carriers`: training documents that hold
    one. `documents`: the leaked ones, those with the greatest share first."""

    n: int
    evaluation: int
    short: int
    leaked: int = 0
    whole: int = 0
    share: float = 0.0
    carriers: int = 0
    documents: list[dict[str, Any]] = field(default_factory=list)


class Index:
    """The distinct runs of an evaluation text, sorted; what workers need."""

    def __init__(self, known: np.ndarray, lengths: list[int]) -> None:
        self.known, self.lengths = known, lengths

    def find(self, text: str) -> tuple[np.ndarray, str | None]:
        """The places in `known` of the runs that the text holds, and the first of them in its words, None without any."""
        hashes = word_hashes(text)
        first: tuple[int, int] | None = None
        places = [np.zeros(0, dtype=np.int64)]
        for size in self.lengths:
            found_R = runs(hashes, size) + np.uint64(size)
            place_R = np.minimum(np.searchsorted(self.known, found_R), len(self.known) - 1)
            hit_R = self.known[place_R] == found_R
            if hit_R.any():
                places.append(place_R[hit_R])
                start = int(np.argmax(hit_R))
                first = min(first or (start, size), (start, size))
        shared = " ".join(words(text)[first[0]:first[0] + first[1]]) if first else None
        return np.unique(np.concatenate(places)), shared


class Evaluation:
    """An evaluation text, and which of its runs were seen."""

    def __init__(self, documents: Iterable[tuple[str, str]], n: int = N) -> None:
        """`documents`: (where it stands, text) pairs."""
        if n < FEWEST:
            raise SupremumError(f"Runs of {n} words are common phrases.", f"Use {FEWEST} words or more; {N} is usual.")
        self.found = Leaks(n, 0, 0)
        parts: list[np.ndarray] = []
        self.openings: list[tuple[str, str]] = []
        lengths: set[int] = set()
        for place, text in documents:
            hashes = word_hashes(text)
            size = min(n, len(hashes))
            self.found.evaluation += 1
            if size < FEWEST:
                self.found.short += 1
                continue
            parts.append(runs(hashes, size) + np.uint64(size))  # lengths are told apart
            lengths.add(size)
            self.openings.append((place, " ".join(text[:120].split())))
        if not parts:
            raise SupremumError(f"The evaluation text holds no document of {FEWEST} words or more "
                                f"({self.found.short} shorter).", "Name a text with longer documents.")
        self.starts = np.cumsum([0, *map(len, parts)])
        known, self.place_R = np.unique(np.concatenate(parts), return_inverse=True)
        self.index = Index(known, sorted(lengths))
        self.seen = np.zeros(len(known), dtype=bool)

    def mark(self, places: np.ndarray) -> np.ndarray:
        """Count a training document that holds these runs; those of them that no earlier one held."""
        new = places[~self.seen[places]]
        self.seen[new] = True
        self.found.carriers += len(places) > 0
        return new

    def result(self) -> Leaks:
        seen_R = self.seen[self.place_R]
        shares = np.add.reduceat(seen_R.astype(float), self.starts[:-1]) / np.diff(self.starts)
        self.found.leaked, self.found.whole = int((shares > 0).sum()), int((shares == 1).sum())
        self.found.share = float(seen_R.mean())
        worst = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
        self.found.documents = [{"place": self.openings[i][0], "share": float(shares[i]), "opening": self.openings[i][1]}
                                for i in worst]
        return self.found
