"""Token windows: text cut into rows of equal length.

The documents' tokens are joined into one stream (a separator between documents, none around a single one) and cut
into consecutive windows; a budget of tokens picks windows that lie evenly over the stream. Seed 0 takes every k-th
window from the first on, k = windows there / windows wanted; another seed shifts the phase. Where a tokenizer frames
its input (a beginning-of-sequence token; [CLS] and [SEP]), every window carries the frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SupremumError
from .sources import load_text

READ_TOKENS = 4_000_000  # no more of the sources is read than this, or than four times what is wanted
RUN = 32  # tokens in a row that held-out and calibration text must not share


def tokens_from_text(checkpoint: Any, sources: Sequence[str | Path], *, tokens: int, length: int,
                     seed: int = 0) -> Tensor:
    """Windows (n, length) int64 from the text, n = tokens // length, in the text's order.

    Raises SupremumError when the text holds fewer than n windows, or `length` exceeds the model's context.
    """
    count = check_budget(tokens, length)
    windows = read_windows(checkpoint, sources, length=length, wanted=count)
    return windows[spread(len(windows), count, seed)]


def calibration_and_held_out(checkpoint: Any, sources: Sequence[str | Path], *, tokens: int, held_out_tokens: int,
                             length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of windows (n, length) from one text that share no run of RUN tokens: (calibration, held-out)."""
    count, held_out = check_budget(tokens, length), check_budget(held_out_tokens, length)
    windows = read_windows(checkpoint, sources, length=length, wanted=count + held_out)
    return split(windows, calibration=count, held_out=held_out, seed=seed)


def split(windows: Tensor, *, calibration: int, held_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pick `held_out` windows evenly, and `calibration` others evenly from those that share no text with them.

    windows: (n, length) int64. Returns (calibration, held_out). Raises SupremumError when too few are left.
    """
    if len(windows) < calibration + held_out:
        raise _too_little(windows, calibration + held_out)
    chosen = spread(len(windows), held_out, seed)
    rest = torch.ones(len(windows), dtype=torch.bool)
    rest[chosen] = False
    others, kept = windows[rest], windows[chosen]
    clean = others[~shares_text(others, kept)]
    if len(clean) < calibration:
        raise SupremumError(
            f"Only {len(clean)} of {len(others)} windows share no text with the {held_out} held-out ones; "
            f"{calibration} are wanted for calibration.", "Give more text, or text that repeats itself less.")
    return clean[spread(len(clean), calibration, seed)], kept


def read_windows(checkpoint: Any, sources: Sequence[str | Path], *, length: int, wanted: int) -> Tensor:
    """All windows (n, length) int64 that the sources give, read up to a bound; at least `wanted` or SupremumError."""
    check_context(checkpoint, length)
    tokenizer = checkpoint.tokenizer()
    prefix, suffix = frame(tokenizer)
    body = length - len(prefix) - len(suffix)
    if body < 2:
        raise SupremumError(f"Windows of {length} tokens leave no room for text.", "Use a greater --length.")
    stream = token_stream(tokenizer, sources, at_most=max(READ_TOKENS, 4 * wanted * body))
    total = len(stream) // body
    rows = stream[: total * body].view(total, body)
    windows = torch.cat([torch.tensor([prefix] * total, dtype=torch.int64).view(total, len(prefix)), rows,
                         torch.tensor([suffix] * total, dtype=torch.int64).view(total, len(suffix))], 1)
    if total < wanted:
        raise _too_little(windows, wanted, len(stream))
    return windows


def token_stream(tokenizer: Any, sources: Sequence[str | Path], *, at_most: int) -> Tensor:
    """The documents' tokens (N,) int64, a separator between them; whole documents until `at_most` is passed."""
    prefix, suffix = frame(tokenizer)
    ends = suffix or prefix  # [SEP] of an encoder, BOS of a Llama; else the end-of-text token
    separator = np.array(ends[:1] or [t for t in [tokenizer.eos_token_id] if t is not None], dtype=np.int64)
    parts: list[np.ndarray] = []
    count, documents = 0, iter(load_text(sources))
    while count < at_most and (batch := _batch(documents)):
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False).input_ids:
            if parts:
                parts.append(separator)
            parts.append(np.array(ids, dtype=np.int64))
            count += len(ids)
    return torch.from_numpy(np.concatenate(parts))


def _batch(documents: Any, most: int = 1 << 22) -> list[str]:
    """Documents of together about `most` characters (at least one, if there is one)."""
    batch: list[str] = []
    size = 0
    while size < most and (one := list(islice(documents, 1))):
        batch += one
        size += len(one[0])
    return batch


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text: ([CLS], [SEP]), ([BOS], []), ([], [])."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start:start + len(bare)] == bare:
            return full[:start], full[start + len(bare):]
    return [], []


def context_length(checkpoint: Any) -> int | None:
    """Tokens that the model can attend over, None if its configuration sets no bound."""
    config = checkpoint.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limit -= (config.pad_token_id or 0) + 1  # their positions begin after the padding index
    return limit


def fitting_length(checkpoint: Any, most: int) -> int:
    """`most` tokens, or as many as the model can attend over."""
    return min(most, context_length(checkpoint) or most)


def check_one_text(checkpoint: Any) -> None:
    """Refuse encoder-decoders where windows of one text are what is measured."""
    if getattr(checkpoint.config, "is_encoder_decoder", False):
        name = (checkpoint.config.architectures or ["this model"])[0]
        raise SupremumError(f"{checkpoint.source}: a {name} reads one text and writes another; windows of one text say "
                            "nothing of it.", "`evaluate --text a.en,a.de`, `optimize` and `limit` take pairs of texts.")


def check_context(checkpoint: Any, length: int) -> None:
    """Refuse windows that the model cannot attend over."""
    check_one_text(checkpoint)
    context = context_length(checkpoint)
    if context is not None and length > context:
        raise SupremumError(f"Windows of {length} tokens are longer than the model's context of {context}.",
                            f"Use --length {context} or less.")


def spread(total: int, count: int, seed: int = 0) -> Tensor:
    """`count` increasing indices below `total`, evenly spaced; the seed sets the phase."""
    stride = total // count
    if stride >= 2:
        start = seed % (total - (count - 1) * stride)
        return torch.arange(count) * stride + start
    return (torch.arange(count) * total + seed % total) // count  # fewer than two windows for each wanted one


def shares_text(windows: Tensor, held_out: Tensor, run: int = RUN) -> Tensor:
    """Which windows (n,) bool hold a run of `run` tokens that is also in `held_out`, at any offset."""
    run = min(run, windows.shape[1], held_out.shape[1])
    known = np.unique(_runs(held_out, run))
    hits = [np.isin(_runs(rows, run), known).any(1) for rows in windows.split(256)]
    return torch.from_numpy(np.concatenate(hits)) if hits else torch.zeros(0, dtype=torch.bool)


def _runs(windows: Tensor, run: int) -> np.ndarray:
    """A 64-bit hash of every run of tokens, (n, length - run + 1): a polynomial in an odd base, modulo 2^64."""
    tokens = windows.numpy().astype(np.uint64) + np.uint64(1)
    ends = tokens.shape[1] - run + 1
    value = np.zeros((tokens.shape[0], ends), dtype=np.uint64)
    for offset in range(run):
        value = value * np.uint64(0x9E3779B97F4A7C15) + tokens[:, offset:offset + ends]
    return value


def fingerprint(windows: Tensor) -> str:
    """sha256 of the windows' shape and tokens."""
    rows = windows.to(torch.int64).contiguous().cpu()
    return hashlib.sha256(f"{tuple(rows.shape)}".encode() + rows.numpy().astype("<i8").tobytes()).hexdigest()


def check_budget(tokens: int, length: int) -> int:
    """How many windows a budget of tokens makes."""
    if length < 2:
        raise SupremumError(f"Windows of {length} tokens hold nothing to predict.", "Use --length 2 or more.")
    if tokens < length:
        raise SupremumError(f"{tokens} tokens are less than one window of {length}.",
                            f"Use --tokens {length} or more.")
    return tokens // length


def _too_little(windows: Tensor, wanted: int, tokens: int | None = None) -> SupremumError:
    have, length = windows.shape
    there = f"{tokens} tokens, " if tokens is not None else ""
    return SupremumError(f"The text holds {there}{have} windows of {length}; {wanted} are wanted.",
                         "Give more text, or ask for fewer --tokens.")
