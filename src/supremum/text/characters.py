"""Characters that carry no text, and one form for those that can be written in several ways (UAX #15).

Removed, and counted by class: control characters but tab and newline; zero-width and direction characters, soft hyphens
and byte order marks; halves of surrogate pairs; non-characters; U+FFFD, which stands for bytes that were lost. Zero-width
joiners stay inside emoji and between letters of the scripts that need them (Arabic, Syriac, the Indic ones). Line ends of
every system become newlines; lines lose the white space at their end, and of empty lines in a row two stay.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

FORMS = ("NFC", "NFKC", "NFD", "NFKD", "none")
_JOINED = ("\u0600-\u08ff\u0900-\u0dff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1800-\u18af\ufb50-\ufdcf\ufdf0-\ufdff"
           "\ufe70-\ufefe")
_EMOJI = "\u2190-\u2bff\u3030\u303d\ufe0f\U0001f000-\U0001faff"
LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_SETS = {
    "control": "\0-\x08\x0e-\x1f\x7f-\x9f",
    "zero width": "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\uffa0"
                  "\ufff9-\ufffb\U000e0000-\U000e0fff",
    "surrogate": "\ud800-\udfff",
    "non-character": "\ufdd0-\ufdef\ufffe\uffff" + "".join(
        f"{chr(plane << 16 | 0xfffe)}{chr(plane << 16 | 0xffff)}" for plane in range(1, 17)),
    "replacement": "\ufffd",
}
CLASSES = {name: re.compile(f"[{characters}]") for name, characters in _SETS.items()} | {
    "joiner": re.compile(f"(?<![{_JOINED}{_EMOJI}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}{_EMOJI}])")}
_ANY = re.compile(f"[{''.join(_SETS.values())}\u200c\u200d]")
_PAIR = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
_SPACES = re.compile(r"(?<![^\S\n])[^\S\n]+\n")  # tried at the beginning of a run only: linear
_EMPTY = re.compile(r"\n{4,}")


def clean_characters(text: str, form: str = "NFC") -> tuple[str, Counter[str]]:
    """The text without them, and how many of each class were removed
    (changed, for "line end"; "normalised" is 1 if the text was not in its form)."""
    counts: Counter[str] = Counter()
    if not text.isascii():
        text = _PAIR.sub(lambda pair: (pair[1] + pair[2]).encode("utf-16", "surrogatepass").decode("utf-16"), text)
        text, counts["normalised"] = _normalised(text, form)
    text, counts["line end"] = LINE_ENDS.subn("\n", text)
    if _ANY.search(text):
        for name, pattern in CLASSES.items():
            text, counts[name] = pattern.subn("", text)
        text, again = _normalised(text, form)  # what stood around a removed character may combine
        counts["normalised"] |= again
    text, counts["white space"] = _SPACES.subn("\n", text)
    return _EMPTY.sub("\n\n\n", text).strip("\n"), +counts


def _normalised(text: str, form: str) -> tuple[str, int]:
    if form == "none" or unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
        return text, 0
    return unicodedata.normalize(form, text), 1  # type: ignore[arg-type]
