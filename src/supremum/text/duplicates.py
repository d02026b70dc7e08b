"""Which documents of a stream repeat an earlier one: exactly, or nearly.

Exactly: the same text but for white space and capitals. Nearly: MinHash (Broder 1997) and banding (Leskovec, Rajaraman,
Ullman, Mining of Massive Datasets, ch. 3).

A text is the set of its runs of SHINGLE words. With h_k random orders, P(min h_k(A) = min h_k(B)) = J(A, B), so the share
of equal entries in two signatures estimates Jaccard's J with standard error sqrt(J (1 - J) / K). Signatures of K entries
are cut into b bands of r; two texts are candidates if a band is equal: P = 1 - (1 - J^r)^b. `banding` takes the longest r
that still finds a pair at the threshold with the wanted probability; candidates are then compared exactly, so what is
removed is a duplicate for certain and only the misses are random.

The stream leaves two files beside the documents: a 16-byte digest and a signature (512 bytes) each. Both are read through
a memory map and sorted, signatures one band at a time, so that memory grows by about 40 bytes a document. Groups are the
connected components of the pairs found (Lee et al. 2021, arXiv 2107.06499); the first document of a group stays.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .words import mix, runs, word_hashes

ENTRIES, SHINGLE, RECALL, THRESHOLD = 128, 5, 0.995, 0.8
CHUNK = 2048  # shingles that are permuted at a time: 2 MiB
_random = np.random.default_rng(0x5EED)
_MULTIPLIER_K = _random.integers(0, 1 << 64, ENTRIES, dtype=np.uint64) | np.uint64(1)
_ADDEND_K = _random.integers(0, 1 << 64, ENTRIES, dtype=np.uint64)
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def shingles(text: str, size: int = SHINGLE) -> np.ndarray:
    """(N,) sorted distinct uint64: the text's runs of `size` words, or one run of all where it has fewer."""
    hashes = word_hashes(text)
    return np.unique(runs(hashes, min(size, max(1, len(hashes)))))


def signature(shingles_N: np.ndarray) -> np.ndarray:
    """(K,) uint32: the least of (a_k x + b_k mod 2^64) >> 32 over the shingles (multiply-shift; Dietzfelbinger 1997)."""
    least_K = np.full(ENTRIES, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(shingles_N), CHUNK):
        chunk_N1 = shingles_N[start:start + CHUNK, None]
        values_NK = (chunk_N1 * _MULTIPLIER_K + _ADDEND_K) >> np.uint64(32)
        least_K = np.minimum(least_K, values_NK.min(0).astype(np.uint32))
    return least_K


def jaccard(one_N: np.ndarray, other_M: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted sets; 0 of empty ones, in which nothing is alike."""
    both = len(np.intersect1d(one_N, other_M, assume_unique=True))
    union = len(one_N) + len(other_M) - both
    return both / union if union else 0.0


def banding(threshold: float, entries: int = ENTRIES, recall: float = RECALL) -> tuple[int, int]:
    """(b, r): bands and rows a band."""
    for rows in range(entries, 0, -1):
        if chance(threshold, entries // rows, rows) >= recall:
            return entries // rows, rows
    return entries, 1


def chance(similarity: float, bands: int, rows: int) -> float:
    """That two texts of this similarity become candidates."""
    return 1 - (1 - similarity ** rows) ** bands


def band_hashes(signatures_NK: np.ndarray, band: int, rows: int) -> np.ndarray:
    """(N,) uint64: one hash of each signature's band."""
    value_N = np.full(len(signatures_NK), band, dtype=np.uint64)
    for column in range(band * rows, (band + 1) * rows):
        value_N = mix(value_N * np.uint64(0x9E3779B97F4A7C15) + signatures_NK[:, column].astype(np.uint64))
    return value_N


def digest(text: str) -> bytes:
    """16 bytes that tell texts apart, however their white space and capitals are."""
    return blake2b(" ".join(text.split()).casefold().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def exact_groups(file: Path) -> np.ndarray:
    """(N,) int64: for each document the first one with its digest."""
    if not file.stat().st_size:
        return np.zeros(0, dtype=np.int64)
    digests_N = np.memmap(file, dtype=DIGEST, mode="r")
    order_N = np.lexsort((digests_N["low"], digests_N["high"]))  # stable: equal ones keep their order
    sorted_N = digests_N[order_N]
    return _spread_first(order_N, np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))


def near_groups(file: Path, shingles_of: Callable[[int], np.ndarray], threshold: float, same_N: np.ndarray,
                step: Callable[[], None] = lambda: None) -> tuple[np.ndarray, dict[int, tuple[int, float]]]:
    """The first document of each one's group (N,) int64, and for those found: {document: (its likeness, Jaccard)}.

    `shingles_of`: a document's shingles. `same_N`: the groups known already (exact ones), whose members are not compared.
    `step` is called after each band.
    """
    if not file.stat().st_size:
        return np.zeros(0, dtype=np.int64), {}
    signatures_NK = np.memmap(file, dtype="<u4", mode="r").reshape(-1, ENTRIES)
    first_N = same_N.copy()
    alone_M = np.flatnonzero(same_N == np.arange(len(same_N)))
    bands, rows = banding(threshold)
    slack = 4 * np.sqrt(threshold * (1 - threshold) / ENTRIES)
    evidence: dict[int, tuple[int, float]] = {}
    refused: set[tuple[int, int]] = set()
    for band in range(bands):
        hashes_M = band_hashes(signatures_NK, band, rows)[alone_M]
        order_M = np.argsort(hashes_M, kind="stable")
        again_M = hashes_M[order_M[1:]] == hashes_M[order_M[:-1]]
        leaders_M = _spread_first(order_M, np.concatenate([[True], ~again_M]))
        for place in np.flatnonzero(again_M):
            later, before = order_M[place + 1], order_M[place]
            document = int(alone_M[later])
            for other in sorted({int(alone_M[leaders_M[later]]), int(alone_M[before])}):
                if root(first_N, document) == root(first_N, other) or (other, document) in refused:
                    continue
                if np.mean(signatures_NK[document] == signatures_NK[other]) < threshold - slack:
                    continue  # four standard errors below
                found = jaccard(shingles_of(document), shingles_of(other))
                if found < threshold:
                    refused.add((other, document))
                    continue
                evidence[document] = (other, found)
                join(first_N, document, other)
        step()
    for document in range(len(first_N)):
        first_N[document] = root(first_N, document)
    return first_N, evidence


def root(first_N: np.ndarray, document: int) -> int:
    while first_N[document] != document:
        first_N[document] = first_N[first_N[document]]  # halves the path
        document = int(first_N[document])
    return document


def join(first_N: np.ndarray, one: int, other: int) -> None:
    """Unite two groups under their earliest document."""
    one, other = root(first_N, one), root(first_N, other)
    first_N[max(one, other)] = min(one, other)


def _spread_first(order_N: np.ndarray, begins_N: np.ndarray) -> np.ndarray:
    """For each item the first of its run in the sorted order."""
    starts = np.flatnonzero(begins_N)
    first_N = np.empty(len(order_N), dtype=np.int64)
    first_N[order_N] = np.repeat(order_N[starts], np.diff(np.append(starts, len(order_N))))
    return first_N
