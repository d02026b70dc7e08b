"""What cleaning does to one document, and what it tells of it. Nothing here needs torch: worker processes import this.

    html -> characters -> language -> quality -> leaks -> pii -> digest and signature

Filters come before masking, so that rules see words, and masking before the fingerprints, so that two copies of a text
with different telephone numbers are one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .characters import clean_characters
from .duplicates import digest, shingles, signature
from .language import language
from .leakage import Index
from .markup import html_to_text, is_html
from .pii import KINDS, mask_pii
from .quality import LONGEST, SHORTEST, c4, gopher, repetition

EXCERPT = 160  # characters of a sample


@dataclass(frozen=True)
class Rules:
    """`html`: "auto" (what looks like it), "always" or "never". `form`: Unicode normal form or "none". `languages`: those
    that stay; none: all, and `confidence`: the least that counts. `quality`: names of quality.RULES. `shortest`,
    `longest`: words, for "gopher". `drop_leaks`: whether documents that share a run with the evaluation text fall. `pii`:
    kinds to mask. `near`: whether signatures are wanted."""

    html: str = "auto"
    form: str = "NFC"
    languages: tuple[str, ...] = ()
    confidence: float = 0.5
    quality: tuple[str, ...] = ()
    shortest: int = SHORTEST
    longest: int = LONGEST
    drop_leaks: bool = False
    pii: tuple[str, ...] = tuple(KINDS)
    near: bool = True


@dataclass
class Event:
    """One step's doing at one document: what it counted, whether the document fell, and an excerpt of what it met."""

    step: str
    counts: dict[str, int]
    dropped: bool = False
    before: str = ""
    after: str = ""


@dataclass
class Cleaned:
    """`text` is None for a document that fell. `language` is measured where it was asked for, `leaked`: the runs of the
    evaluation text that the document holds, as places in its index."""

    text: str | None
    events: list[Event] = field(default_factory=list)
    language: str = ""
    digest: bytes = b""
    signature: bytes = b""
    leaked: np.ndarray | None = None


class Cleaner:
    """A function of a document; it travels to worker processes with its settings and the runs of an evaluation text."""

    def __init__(self, rules: Rules, index: Index | None = None) -> None:
        self.rules, self.index = rules, index

    def __call__(self, text: str) -> Cleaned:
        rules, out = self.rules, Cleaned(None)

        def drop(step: str, reason: str) -> Cleaned:
            out.events.append(Event(step, {reason: 1}, True, excerpt(text)))
            return out

        if rules.html == "always" or (rules.html == "auto" and is_html(text)):
            plain = html_to_text(text)
            if plain != text:
                out.events.append(Event("html", {"pages": 1, "characters": len(text) - len(plain)}, False,
                                        *difference(text, plain)))
                text = plain
        plain, counts = clean_characters(text, rules.form)
        if counts:
            out.events.append(Event("characters", dict(counts), False, *difference(text, plain)))
        text = plain
        if not text.strip():
            return drop("characters", "nothing left")
        code, sure = language(text) if rules.languages or rules.quality else ("", 1.0)
        out.language = code
        if rules.languages and (code not in rules.languages or sure < rules.confidence):
            return drop("language", code if code not in rules.languages else f"{code}, unsure")
        for name in rules.quality:
            if name == "c4":
                plain, reason, removed = c4(text)
                if removed:
                    out.events.append(Event("quality", {f"c4: lines, {k}": v for k, v in removed.items()}, False,
                                            *difference(text, plain)))
            else:
                plain, reason = text, (gopher(text, code, shortest=rules.shortest, longest=rules.longest)
                                       if name == "gopher" else repetition(text))
            if reason is not None:
                return drop("quality", f"{name}: {reason}")
            text = plain
        if self.index is not None:
            out.leaked, shared = self.index.find(text)
            if shared is not None:
                out.events.append(Event("leaks", {"documents": 1}, rules.drop_leaks, excerpt(text), excerpt(shared)))
                if rules.drop_leaks:
                    return out
        if rules.pii:
            text, counts, finds = mask_pii(text, rules.pii)
            if finds:
                out.events.append(Event("pii", dict(counts), False, ", ".join(finds[:4])))
        out.text, out.digest = text, digest(text)
        if rules.near:
            out.signature = signature(shingles(text)).astype("<u4").tobytes()
        return out


def excerpt(text: str, start: int = 0) -> str:
    """EXCERPT characters, what is not printable escaped, so that a report is safe to show anywhere."""
    piece = text[start:start + EXCERPT]
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in piece)


def difference(before: str, after: str) -> tuple[str, str]:
    """Excerpts of both from shortly before they part."""
    low, high = 0, min(len(before), len(after))
    while low < high:  # the longest common beginning, by bisection
        middle = (low + high + 1) // 2
        if before[low:middle] == after[low:middle]:
            low = middle
        else:
            high = middle - 1
    start = max(0, low - 40)
    return excerpt(before, start), excerpt(after, start)

