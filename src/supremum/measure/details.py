"""What lies behind a mean: bits a byte, calibration, and which tokens suffer, slice by slice and token by token.

    bits a byte = sum of nll / (ln 2 * UTF-8 bytes of the tokens scored)        comparable between tokenizers
    ECE of the likeliest next token: |how often it came - how likely it was said to be|, over 15 bins (metrics.py)
    slices: by how often the token occurs in the text scored, by its place in the window, by its kind or script

A slice's interval is a bootstrap over windows of (sum of its tokens' values) / (their count). KL is to the reference;
without one the slices hold nll alone.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .intervals import Interval, ratio_interval
from .metrics import calibration_error
from .scores import TokenScores

FREQUENCY = {"once": 1, "2 to 9 times": 9, "10 to 99": 99, "100 or more": math.inf}
PLACES = {"place 1 to 31": 31, "place 32 to 127": 127, "place 128 to 511": 511, "place 512 on": math.inf}
WINDOWS = 5  # fewer have no spread worth drawing from
WORST = 12  # tokens shown
BEFORE = 12  # tokens of context shown with each


@dataclass(frozen=True)
class Slice:
    """Tokens of one kind: mean nll, and beside a reference the excess over its nll, KL and the share of same top tokens."""

    name: str
    tokens: int
    share: float
    nll: float
    interval: Interval | None  # of KL beside a reference, else of nll; None below WINDOWS windows
    excess_nll: float | None = None
    kl: float | None = None
    same_top: float | None = None


@dataclass(frozen=True)
class Changed:
    """One token where the model moved most: what came before, what came, what each model held likeliest, and KL."""

    before: str
    token: str
    reference: str
    model: str
    nll_reference: float
    nll: float
    kl: float


@dataclass(frozen=True)
class Details:
    """See the module."""

    bytes: int
    bits_per_byte: float
    bits_per_byte_reference: float | None
    ece: float
    ece_reference: float | None
    slices: dict[str, list[Slice]]
    most_changed: list[Changed]


def details(scores: Sequence[TokenScores], targets: Tensor, tokenizer: Any, *, seed: int = 0) -> Details:
    """Details of windows' scores (asked for with `tops`) on targets (n, T) int64."""
    texts = {index: tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in targets.unique().tolist()}
    special = set(tokenizer.all_special_ids)
    size = sum(len(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
               for row in targets)
    count = Counter(targets.flatten().tolist())
    names = {
        "frequency": [_class(count[t], FREQUENCY) for t in targets.flatten().tolist()],
        "place": [_class(place + 1, PLACES) for _ in range(len(targets)) for place in range(targets.shape[1])],
        "kind": [kind_of(texts[t], t in special) for t in targets.flatten().tolist()],
    }
    nll = torch.stack([s.nll for s in scores])
    reference = [s.nll_reference for s in scores if s.nll_reference is not None]
    compared = len(reference) == len(scores)
    orders = {"frequency": list(FREQUENCY), "place": list(PLACES), "kind": sorted(set(names["kind"]))}
    return Details(
        bytes=size, bits_per_byte=_bits(nll, size), bits_per_byte_reference=_bits(torch.stack(reference), size) if compared
        else None,
        ece=_ece([s.confidence for s in scores], [s.top for s in scores], targets),
        ece_reference=_ece([s.confidence_reference for s in scores], [s.top_reference for s in scores], targets)
        if compared else None,
        slices={by: _slices(scores, np.array(names[by]).reshape(targets.shape), orders[by], seed) for by in names},
        most_changed=_worst(scores, targets, tokenizer) if compared else [])


def kind_of(text: str, special: bool = False) -> str:
    """What a token is: a script's letters ("Latin, word" where a word begins), number, punctuation, space, or part of a
    character."""
    if special:
        return "special"
    bare = text.strip()
    if not bare:
        return "space"
    first = next((c for c in bare if c.isalnum()), bare[0])
    if first == "\ufffd":
        return "part of a character"
    if first.isdigit():
        return "number"
    if not first.isalpha():
        return "punctuation"
    script = unicodedata.name(first, "OTHER").split()[0].split("-")[0].capitalize()
    if script == "Cjk":
        return "Han"
    return f"{script}, {'word' if text[0].isspace() or text[0] in '▁' else 'in a word'}" if script == "Latin" else script


def _class(value: int, classes: dict[str, float]) -> str:
    return next(name for name, most in classes.items() if value <= most)


def _bits(nll: Tensor, size: int) -> float:
    return nll.double().sum().item() / (math.log(2) * size) if size else math.nan


def _ece(confidence: list[Tensor | None], top: list[Tensor | None], targets: Tensor) -> float:
    sure = torch.cat([part for part in confidence if part is not None])
    right = torch.cat([part for part in top if part is not None]) == targets.flatten()
    return calibration_error(sure.clamp(0, 1).numpy(), right.numpy())


def _slices(scores: Sequence[TokenScores], names_nT: np.ndarray, order: list[str], seed: int) -> list[Slice]:
    nll = _rows([s.nll for s in scores])
    before, kl, same = [_rows([getattr(s, name) for s in scores]) for name in ("nll_reference", "kl", "same")]
    found = []
    for name in order:
        mask = names_nT == name
        tokens = int(mask.sum())
        if not tokens:
            continue
        main = nll if kl is None else kl
        assert nll is not None and main is not None
        interval = ratio_interval((main * mask).sum(1), mask.sum(1), seed=seed) if len(mask) >= WINDOWS else None
        found.append(Slice(
            name, tokens, tokens / mask.size, float(nll[mask].mean()), interval,
            None if before is None else float((nll - before)[mask].mean()), None if kl is None else float(kl[mask].mean()),
            None if same is None else float(same[mask].mean())))
    return found


def _rows(parts: list[Tensor | None]) -> np.ndarray | None:
    kept = [part for part in parts if part is not None]
    return torch.stack(kept).double().numpy() if len(kept) == len(parts) else None


def _worst(scores: Sequence[TokenScores], targets: Tensor, tokenizer: Any) -> list[Changed]:
    kl = torch.stack([s.kl for s in scores if s.kl is not None])
    width = kl.shape[1]
    found = []
    for place in kl.flatten().topk(min(WORST, kl.numel())).indices.tolist():
        window, at = divmod(place, width)
        one = scores[window]
        assert one.top is not None and one.top_reference is not None and one.nll_reference is not None
        before = tokenizer.decode(targets[window, max(0, at - BEFORE):at], clean_up_tokenization_spaces=False)
        ids = (targets[window, at], one.top_reference[at], one.top[at])
        token, reference, model = [tokenizer.decode([int(index)]) for index in ids]
        found.append(Changed(before, token, reference, model, one.nll_reference[at].item(), one.nll[at].item(),
                             kl[window, at].item()))
    return found
