"""Text: where it comes from, how it is cleaned, how it becomes tokens and windows, and what a model writes itself.

    clean_text(sources, out)                 the same text without markup, control characters, duplicates, personal data; what
                                             of an evaluation text stands in it
    train_tokenizer(sources, out)            BPE, WordPiece or Unigram, with a report of fertility and coverage
    pack(sources, tokenizer, out)            tokens in memory-mapped shards; PackedTokens(out) reads them
    augment_text(sources, out)               masked, shortened, swapped, reworded and mixed copies
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_PLACES = {
    "fast_dtype": "generate", "self_generated": "generate", "load_text": "sources", "Reading": "reading",
    "calibration_and_held_out": "windows", "fingerprint": "windows", "split": "windows", "tokens_from_text": "windows",
    "clean_text": "cleaning", "train_tokenizer": "vocabulary", "tokenizer_report": "fertility",
    "pack": "packing", "PackedTokens": "packed", "augment_text": "augmentation",
}
__all__ = ["PackedTokens", "Reading", "augment_text", "calibration_and_held_out", "clean_text", "fast_dtype", "fingerprint",
           "load_text", "pack", "self_generated", "split", "tokenizer_report", "tokens_from_text",
           "train_tokenizer"]

if TYPE_CHECKING:
    from .augmentation import augment_text
    from .cleaning import clean_text
    from .fertility import tokenizer_report
    from .generate import fast_dtype, self_generated
    from .packed import PackedTokens
    from .packing import pack
    from .reading import Reading
    from .sources import load_text
    from .vocabulary import train_tokenizer
    from .windows import calibration_and_held_out, fingerprint, split, tokens_from_text


def __getattr__(name: str) -> Any:
    """Load a name from its file when it is first used: processes that clean text need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    return value
