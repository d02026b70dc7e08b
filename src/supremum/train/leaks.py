"""What of the held-out text also stands in the training text: then the held-out loss tells what was learnt by heart.

    held-out windows -> their runs of 13 words -> an index;   training text, piece by piece -> which of the runs it holds

The measure is that of text/leakage.py (Brown et al. 2020). Both sides are decoded again from their tokens, so text and
packed shards are treated alike. The word at a window's border may be cut and is left out, but where a document ends there.
Only the windows that the held-out loss is taken on are looked for. Memory: 17 bytes a word of theirs, and one piece of the
training text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..progress import phase
from ..text.leakage import FEWEST, Evaluation, N
from ..text.words import pattern, words
from .corpus import Chunks, PackedChunks

PIECE, OVERLAP = 1 << 16, 1 << 10  # tokens of the training text decoded at once, and those that the next piece repeats
NAMED = 5  # windows that are told one by one


@dataclass(frozen=True)
class HeldOutLeaks:
    """`windows`: held-out windows that were looked for, `short` more have fewer than FEWEST words. `leaked`: windows that
    share a run of `run` words with the training text, `whole`: with all of their runs; `share`: of all runs of all windows,
    those found. `worst`: {"place", "share", "opening"} of the windows with the greatest shares."""

    windows: int
    short: int
    run: int = N
    leaked: int = 0
    whole: int = 0
    share: float = 0.0
    worst: list[dict[str, Any]] = field(default_factory=list)


def in_words(found: Mapping[str, Any]) -> str:
    """`HeldOutLeaks`, as train.json holds them, in one line."""
    short = f"; {found['short']:,} too short to look for" if found["short"] else ""
    if not found["windows"]:
        return f"not looked for in the training text{short}"
    if not found["leaked"]:
        return f"none of {found['windows']:,} windows shares a run of {found['run']} words with the training text{short}"
    return (f"{found['leaked']:,} of {found['windows']:,} held-out windows share a run of {found['run']} words with the "
            f"training text ({found['whole']:,} stand there whole; {found['share']:.1%} of all runs{short})")


def held_out_leaks(learned: Chunks | PackedChunks, held: Chunks | PackedChunks, indices: Sequence[int], tokenizer: Any,
                   ) -> HeldOutLeaks | None:
    """What of the windows `indices` of `held` stands in the text of `learned`; None without windows."""
    if not len(indices):
        return None
    decoder = Decoder(tokenizer)
    windows = [(f"held-out window {index + 1} of {len(held)}", decoder.text(held, *held.bounds(index))) for index in indices]
    short = sum(len(words(text)) < FEWEST for _, text in windows)
    if short == len(windows):
        return HeldOutLeaks(0, short)
    evaluation = Evaluation(windows)
    first, last = learned.bounds(0)[0], learned.bounds(len(learned) - 1)[1]
    with phase("look for held-out text", -(-(last - first) // PIECE)) as advance:
        for begin in range(first, last, PIECE):
            text = decoder.text(learned, begin, min(begin + PIECE + OVERLAP, last))
            evaluation.mark(evaluation.index.find(text)[0])
            advance()
    found = evaluation.result()
    return HeldOutLeaks(found.evaluation - found.short, found.short, found.n, found.leaked, found.whole, found.share,
                    found.documents[:NAMED])


class Decoder:
    """Tokens as text: special tokens end a line, since they stand between documents."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer.backend_tokenizer
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)

    def text(self, chunks: Chunks | PackedChunks, begin: int, end: int) -> str:
        """Tokens begin to end of the stream, without the words at its borders, but where a document ends there."""
        before, after = max(0, begin - 1), min(chunks.total, end + 1)
        ids = chunks.read(before, after)
        special = np.isin(ids, self.special)
        text = "\n".join(self.inner.decode_batch(list(self._segments(ids[begin - before:len(ids) - (after - end)]))))
        places = [match.span() for match in pattern(text).finditer(text)]
        start = places[0][1] if places and before < begin and not special[0] and not special[1] else 0
        stop = places[-1][0] if places and end < after and not special[-1] and not special[-2] else len(text)
        return text[start:stop] if start < stop else ""

    def _segments(self, ids: np.ndarray) -> Iterator[list[int]]:
        for part in np.split(ids, np.flatnonzero(np.isin(ids, self.special))):
            if len(part := part[~np.isin(part, self.special)]):
                yield part.tolist()
