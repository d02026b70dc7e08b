"""Texts as careless people write them: how much worse a model reads them says how robust it is.

    typos      one word in ten has two neighbouring letters swapped, one left out, one doubled, or one replaced by its
               neighbour on the keyboard; seeded, words of fewer than 4 letters stay
    lower      all in lower case
    upper      all in capitals
    truncate   the second half of each text only: less to go by
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import SupremumError
from ..text.windows import frame

AS_IT_IS = "as it is"  # what is not disturbed, beside the names of KINDS
RATE = 0.1
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
WORD = re.compile(r"[^\W\d_]{4,}")


def typos(text: str, source: random.Random, rate: float = RATE) -> str:
    """`text` with a mistake in a share `rate` of its words."""
    return WORD.sub(lambda match: _mistaken(match[0], source) if source.random() < rate else match[0], text)


def _mistaken(word: str, source: random.Random) -> str:
    at = source.randrange(1, len(word) - 1)  # first letters are rarely wrong
    letter, way = word[at], source.randrange(4)
    if way == 0:
        return word[:at] + word[at + 1] + letter + word[at + 2:]
    if way == 1:
        return word[:at] + word[at + 1:]
    row = next((row for row in ROWS if letter in row), None)
    if way == 2 or row is None:
        return word[:at] + letter + word[at:]
    place = row.index(letter)
    return word[:at] + source.choice(row[max(0, place - 1):place] + row[place + 1:place + 2]) + word[at + 1:]


def truncate(text: str, _: random.Random) -> str:
    """The second half of `text`, from the start of a word on."""
    words = re.findall(r"\S+\s*", text)
    return "".join(words[len(words) // 2:])


KINDS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": typos, "lower": lambda text, _: text.lower(), "upper": lambda text, _: text.upper(), "truncate": truncate}


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises SupremumError for the first that is none of KINDS."""
    for kind in kinds:
        if kind not in KINDS:
            raise SupremumError(f"{kind!r} is no way to disturb a text.", f"Choose of {', '.join(KINDS)}.")


def perturb(text: str, kind: str, seed: int | str = 0) -> str:
    """`text` under one of KINDS; the same text and seed give the same, and texts that begin alike stay alike there."""
    check_kinds([kind])
    return KINDS[kind](text, random.Random(seed))


def perturbed_windows(tokenizer: Any, windows: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Windows (m, T) of the disturbed text of windows (n, T), with the tokenizer's frame; m follows from its length.

    truncate: windows of half the length, which hold the second half of each.
    """
    check_kinds([kind])
    prefix, suffix = frame(tokenizer)
    length = windows.shape[1]
    body = windows[:, len(prefix):length - len(suffix)]
    if kind == "truncate":
        body = body[:, body.shape[1] // 2:]
    else:
        stream: list[int] = []
        for number, row in enumerate(body):
            text = tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stream += tokenizer(perturb(text, kind, f"{seed} {number}"), add_special_tokens=False, verbose=False).input_ids
        size = min(body.shape[1], len(stream))
        if size < 2:
            raise SupremumError("The text holds nothing to disturb.", "Give more text.")
        count = len(stream) // size
        body = torch.tensor(stream[:count * size], dtype=torch.int64).view(count, size)
    rows = [torch.tensor([part] * len(body), dtype=torch.int64).view(len(body), len(part)) for part in (prefix, suffix)]
    return torch.cat([rows[0], body, rows[1]], 1)
