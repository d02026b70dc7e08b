"""Words: the unit of quality rules, duplicates, leaks and fertility.

A word is a run of letters, digits and marks; in scripts that are written without spaces (Han, kana, Thai, Lao, Khmer,
Burmese) each letter counts as one. Hashes are 64 bits, the same on every machine and in every process.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b

import numpy as np

UNSPACED = ("\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3031-\u3035\u3041-\u30ff\u31f0-\u31ff"
            "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff")
WORD = re.compile(f"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\\W_])(?:['’]?(?:(?![{UNSPACED}])[\\w\u0300-\u036f]))*")
SPACED_WORD = re.compile(r"[^\W_][\w\u0300-\u036f]*(?:['’][\w\u0300-\u036f]+)*")  # the same where none of UNSPACED is; faster
SCRIPT_WITHOUT_SPACES = re.compile(f"[{UNSPACED}]")


def pattern(text: str) -> re.Pattern[str]:
    """What finds the words of this text."""
    return WORD if not text.isascii() and SCRIPT_WITHOUT_SPACES.search(text) else SPACED_WORD


def words(text: str) -> list[str]:
    return pattern(text).findall(text)


@lru_cache(1 << 16)
def word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(text: str) -> np.ndarray:
    """(W,) uint64: one a word, capitals ignored."""
    return np.array([word_hash(word) for word in words(text.casefold())], dtype=np.uint64)


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """(W - n + 1,) uint64: a hash of every run of n words; a polynomial in an odd base modulo 2^64, then mixed."""
    ends = len(hashes) - n + 1
    if ends <= 0:
        return np.zeros(0, dtype=np.uint64)
    value = np.zeros(ends, dtype=np.uint64)
    for offset in range(n):
        value = value * np.uint64(0x9E3779B97F4A7C15) + hashes[offset:offset + ends]
    return mix(value)


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads every bit over all (the finaliser of splitmix64; Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
